"""The patterns by which a configuration names the layers that a step works on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from distill_lightning.errors import InputError

Targets = str | Sequence[str]
"""One or more patterns: a glob over the layers' paths (``"features.*"``), the name of a layer's class (``"Conv2d"``),
or ``"re:"`` and a regular expression that must match the whole path."""


def match_layers(
    network: nn.Module,
    targets: Targets | None,
    exclude: Targets = (),
    *,
    fits: Callable[[nn.Module], bool],
    what: str,
    argument: str = "targets",
) -> list[str]:
    """The paths of the layers that match, in the network's order; a layer with several paths is listed once.

    Args:
        network: the network that has the layers.
        targets: patterns of the layers; ``None`` for every layer that fits.
        exclude: patterns of layers to leave out; a pattern that matches nothing is an error here, too.
        fits: returns whether a layer can be worked on; it is never called with parametrizations.
        what: what the layers that fit are called in the message: "linear and convolutional layers".
        argument: what the patterns ``targets`` are called in the message, if they are those of another option.

    Raises:
        InputError: a pattern matches no layer that fits, or nothing is left.
    """
    paths = {path: module for path, module in network.named_modules() if "parametrizations" not in path.split(".")}
    fitting = {path: module for path, module in paths.items() if fits(module)}
    chosen = list(fitting) if targets is None else _matching(network, fitting, targets, argument, what)
    # The name of a part of the network ("encoder") leaves out everything in it.
    unwanted = set(_matching(network, fitting, exclude, "exclude", what))
    left = [path for path in fitting if path in set(chosen) - unwanted]
    if not left:
        raise InputError(
            f"{type(network).__name__}: nothing is left to work on, which needs {what}: "
            f"{argument}={_listed(targets)}, exclude={_listed(exclude)}"
        )
    return left


def check_patterns(network: nn.Module, patterns: Targets, argument: str) -> None:
    """Refuse patterns that match no part of a network at all, regardless of what a step can work on."""
    _matching(network, dict(network.named_modules()), patterns, argument, "layers")


def _matching(
    network: nn.Module, fitting: dict[str, nn.Module], patterns: Targets, argument: str, what: str
) -> list[str]:
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = [path for path, module in fitting.items() if _matches(pattern, path, module, argument)]
        if not matched:
            near = (
                difflib.get_close_matches(pattern, fitting, n=5, cutoff=0.3) or [path for path in fitting if path][:5]
            )
            raise InputError(
                f"{argument} {pattern!r} matches none of {type(network).__name__}'s {what}: "
                f"similar names: {', '.join(near) or 'it has none'}"
            )
        found += matched
    return found


def _matches(pattern: str, path: str, module: nn.Module, argument: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            raise InputError(f"{argument} {pattern!r} is not a regular expression: {error}") from error
    # Layers inside a named part belong to it.
    parts = path.split(".")
    inside = any(fnmatchcase(".".join(parts[:number]), pattern) for number in range(1, len(parts) + 1))
    return inside or pattern in (kind.__name__ for kind in type(module).__mro__)


def _listed(patterns: Targets | None) -> str:
    if patterns is None or isinstance(patterns, str):
        return repr(patterns)
    return repr(list(patterns))
