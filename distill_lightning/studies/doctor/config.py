"""The options of ``doctor``: read and checked without PyTorch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distill_lightning.errors import InputError


@dataclass(frozen=True)
class DoctorConfig:
    """What is looked at, and how long.

    Attributes:
        modules: paths of the configurations that describe Trainer, module and data, as for ``fit``.
        overrides: what is passed on to them, as on the command line of ``fit``.
        steps: training steps that are timed.
        scored: validation samples that the teachers are scored on.
    """

    modules: list[str]
    overrides: list[str]
    steps: int
    scored: int

    @property
    def arguments(self) -> list[str]:
        """What ``fit`` would get."""
        return [*(word for path in self.modules for word in ("--config", path)), *self.overrides]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"doctor: {message}")


def parse_config(arguments: Sequence[str]) -> DoctorConfig:
    """Read ``CONFIG [--steps N] [--scored N] [--key value ...]``; ``--config CONFIG`` will do, too.

    Raises:
        InputError: the options cannot be read, or there is no such configuration.
    """
    # An abbreviation could be meant for the configuration.
    parser = _Parser(
        prog="distill-lightning doctor",
        usage="distill-lightning doctor [-h] CONFIG [--steps STEPS] [--scored SAMPLES] [--key value ...]",
        description="Look at a configuration before hours are spent on it: a few steps of its training, of which "
        "nothing is left, and one table. The exit status is 0 only if all is well, and 1 if something is not.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", action="append", default=[], help="a configuration, as for fit")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed, after two others")
    parser.add_argument("--scored", type=int, default=512, help="validation samples that the teachers are scored on")
    words = list(arguments)
    # Not an argument of the parser, which would take the value of a key that it does not know for it.
    first = [words.pop(0)] if words and not words[0].startswith("-") else []
    options, overrides = parser.parse_known_args(words)
    modules = [*first, *options.config]
    if not modules:
        raise InputError("doctor: give the path of a configuration, as for fit")
    for path in modules:
        if not Path(path).is_file():
            raise InputError(f"there is no configuration {path}: give the path of a YAML file")
    for name in ("steps", "scored"):
        if getattr(options, name) < 1:
            raise InputError(f"doctor: --{name} must be at least 1, got {getattr(options, name)}")
    return DoctorConfig(modules, overrides, options.steps, options.scored)
