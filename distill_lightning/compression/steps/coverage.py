"""How much of a network a step works on: one that goes past most weights without a word is of no use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.targets import Targets
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError


def check_coverage(
    piece: Workpiece, step: object, weights: Iterable[str], *, targets: Targets | None, refuse: bool = True
) -> None:
    """Note which share of the network's weights a step works on.

    Args:
        piece: whose network it is; all parameters of two or more dimensions count, tied ones once.
        step: for the messages.
        weights: dotted names of those that it works on, as the layers have them.
        targets: of the step; where someone has named the layers, nothing is said.
        refuse: whether less than half is an error.

    Raises:
        InputError: it is, and nobody has named these layers.
    """
    if targets is not None:
        return
    known = _weights_of(piece.network)
    total = sum(dict(known.values()).values())
    covered = sum(dict(known[name] for name in weights if name in known).values())
    share = f"{covered / total:.0%} of {type(piece.network).__name__}'s weights"
    if refuse and 2 * covered < total:
        raise InputError(f"{step!r} would work on {share} alone: name the layers as targets if that is what you want")
    piece.note(f"{step!r} works on {share}")


def _weights_of(network: nn.Module) -> dict[str, tuple[object, int]]:
    """By name of all parameters of two or more dimensions what tied ones have in common, and their number of entries.

    Those that are computed count as they are used, with their whole size.
    """
    found: dict[str, tuple[object, int]] = {}
    for path, module in network.named_modules():
        if "parametrizations" in path.split("."):
            continue
        computed: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
        for name in [name for name, _ in module.named_parameters(recurse=False)] + list(computed):
            whole, tensor = f"{path}.{name}" if path else name, getattr(module, name)
            if tensor.ndim > 1:
                # A computed one lives no longer than this loop, and another may get its id.
                found[whole] = whole if name in computed else id(tensor), tensor.numel()
    return found
