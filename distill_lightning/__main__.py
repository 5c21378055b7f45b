"""``python -m distill_lightning`` is ``distill-lightning``."""

import sys

from distill_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
