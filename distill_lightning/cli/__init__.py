"""The command line: LightningCLI's verbs, ``record``, ``compare``, ``compress``, ``export`` and ``doctor``.

Bad input ends in one line on standard error and exit status 2; a traceback is a bug.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distill_lightning.cli.entry import main
from distill_lightning.studies.error_line import one_line

if TYPE_CHECKING:
    from distill_lightning.cli.lightning_cli import DistillCLI
else:

    def __getattr__(name: str) -> Any:
        # LightningCLI comes with PyTorch, which "compare --help" need not wait for.
        if name == "DistillCLI":
            return import_module("distill_lightning.cli.lightning_cli").DistillCLI
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DistillCLI", "main", "one_line"]
