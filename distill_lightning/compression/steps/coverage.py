"""The share of a network that a step works on: a step must not silently skip most of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.parameters import join_path
from distill_lightning.compression.access.targets import Targets
from distill_lightning.compression.steps.base import Step
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError


def check_coverage(
    piece: Workpiece, step: Step, weights: Iterable[str], *, targets: Targets | None, refuse: bool = True
) -> None:
    """Note the share of the network's weights that a step works on.

    Args:
        piece: the workpiece; all parameters of two or more dimensions count, tied ones once.
        step: the step, for the messages.
        weights: dotted names of the weights that it works on, as the layers have them.
        targets: targets of the step; if they name the layers, nothing is noted.
        refuse: whether a share below one half is an error.

    Raises:
        InputError: the share is below one half, and the layers were not named.
    """
    if targets is not None:
        return
    known = _weights_of(piece.network)
    total = sum(dict(known.values()).values())
    covered = sum(dict(known[name] for name in weights if name in known).values())
    share = f"{covered / total:.0%} of {type(piece.network).__name__}'s weights"
    if refuse and 2 * covered < total:
        raise InputError(f"{step.title} would work on only {share}: name the layers in targets to do so on purpose")
    piece.note(f"{step.title} works on {share}")


def _weights_of(network: nn.Module) -> dict[str, tuple[object, int]]:
    """All parameters of two or more dimensions by name: what tied ones have in common, and the number of entries.

    Computed weights count with the size in which they are used.
    """
    found: dict[str, tuple[object, int]] = {}
    for path, module in network.named_modules():
        if "parametrizations" in path.split("."):
            continue
        computed: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
        for name in [name for name, _ in module.named_parameters(recurse=False)] + list(computed):
            whole, tensor = join_path(path, name), getattr(module, name)
            if tensor.ndim > 1:
                # A computed weight does not outlive this loop, and another may get its id.
                found[whole] = whole if name in computed else id(tensor), tensor.numel()
    return found
