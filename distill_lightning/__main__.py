"""``python -m distill_lightning`` is ``distill-lightning``."""

import sys

from distill_lightning.cli import main

sys.exit(main())
