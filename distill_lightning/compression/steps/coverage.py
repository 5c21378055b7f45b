"""How much of a network a step works on: one that goes past most weights without a word is of no use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.targets import Targets
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError


def check_coverage(piece: Workpiece, step: object, weights: Iterable[str], *, targets: Targets | None) -> None:
    """Note which share of the network's weights a step works on.

    Args:
        piece: whose network it is; all parameters of two or more dimensions count, tied ones once.
        step: for the messages.
        weights: dotted names of those that it works on, as the layers have them.
        targets: of the step; where someone has named the layers, nothing is said.

    Raises:
        InputError: it is less than half, and nobody has named these layers.
    """
    if targets is not None:
        return
    sizes = _weight_sizes(piece.network)
    covered, total = sum(sizes[name] for name in set(weights) & set(sizes)), sum(sizes.values())
    share = f"{covered / total:.0%} of {type(piece.network).__name__}'s weights"
    if 2 * covered < total:
        raise InputError(f"{step!r} would work on {share} alone: name the layers as targets if that is what you want")
    piece.note(f"{step!r} works on {share}")


def _weight_sizes(network: nn.Module) -> dict[str, int]:
    """Entries of all parameters of two or more dimensions, as they are used: computed ones with their whole size."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for path, module in network.named_modules():
        if "parametrizations" in path.split("."):
            continue
        computed: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
        names = [name for name, _ in module.named_parameters(recurse=False)] + list(computed)
        for name in names:
            tensor = getattr(module, name)
            if tensor.ndim > 1 and id(tensor) not in seen:
                # A computed one lives no longer than this loop, and another may get its id.
                seen.update(() if name in computed else (id(tensor),))
                sizes[f"{path}.{name}" if path else name] = tensor.numel()
    return sizes
