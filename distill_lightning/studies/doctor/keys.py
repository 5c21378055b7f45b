"""Which key of a configuration something is set by."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from distill_lightning.arguments import arguments_of

_TOO_COMMON = {"data", "output", "metrics", "seed", "compile", "weights", "network"}


class Keys:
    """The keys of a module and its data in the configuration that they are made by.

    Args:
        module: the LightningModule.
        data: the LightningDataModule.
    """

    def __init__(self, module: Any, data: Any) -> None:
        self._module, self._data = set(arguments_of(type(module))), set(arguments_of(type(data)))

    def model(self, *names: str) -> str:
        """The first of some arguments that the module's class takes; ``"model"`` if it takes none of them."""
        return _first("model", self._module, names)

    def data(self, *names: str) -> str:
        """The first of some arguments that the data module's class takes; ``"data"`` if it takes none of them."""
        return _first("data", self._data, names)

    def said_in(self, message: str) -> str:
        """The key that a message is about: an argument that it names, or else the part of the configuration."""
        words = re.findall(r"\w+", message)
        for word in words:
            if word in self._module - _TOO_COMMON:
                return f"model.init_args.{word}"
            if word in self._data - _TOO_COMMON:
                return f"data.init_args.{word}"
        if re.search(r"\bteachers?\b", message):
            return self.model("teachers", "teacher")
        if re.search(r"\bTrainer\b", message):
            return "trainer"
        return "data" if re.search(r"\b(data|label|labels|batch|inputs|samples?)\b", message) else "model"


def _first(part: str, known: set[str], names: Iterable[str]) -> str:
    return next((f"{part}.init_args.{name}" for name in names if name in known), part)
