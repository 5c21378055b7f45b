"""Libraries that are needed for some things alone."""

from __future__ import annotations

import importlib
from typing import Any

from distill_lightning.errors import InputError


def package(name: str, *, extra: str) -> Any:
    """Import a module of an optional library.

    Args:
        name: of the module, dotted.
        extra: of this package that installs the library; empty: it is one that this package needs.

    Raises:
        InputError: it is not installed.

    Example:
        >>> from distill_lightning.libraries import package
        >>> package("torchvision.models", extra="").resnet18.__name__
        'resnet18'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".", maxsplit=1)[0]:
            raise
        what = f"'distill-lightning[{extra}]'" if extra else error.name
        raise InputError(f"{error.name} is not installed: pip install {what}") from error
