"""The share of a network that a step works on: a step must not silently skip most of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.parameters import join_path, split_path
from distill_lightning.compression.access.targets import Targets, match_layers
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.compression.steps.base import Step
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError

_SHOWN = 8
"""How many layers a message names for one reason; a network may have hundreds."""
_EXPECTED = "they are the network's outputs"
"""Why a last layer keeps all of its units, which goes without saying."""


def check_coverage(
    piece: Workpiece,
    step: Step,
    weights: Iterable[str],
    *,
    targets: Targets | None,
    refuse: bool = True,
    why: Mapping[str, str] | None = None,
    rule: str = "",
) -> None:
    """Note the share of the network's weights that a step works on, and the layers that it leaves out, with the reason.

    Args:
        piece: the workpiece; all parameters of two or more dimensions count, tied ones once.
        step: the step, for the messages.
        weights: dotted names of the weights that it works on, as the layers have them.
        targets: targets of the step; if they name the layers, nothing is noted.
        refuse: whether a share below one half is an error.
        why: why layers are left out or keep their units, by path, as far as the step has reasons of its own beside
            ``piece.left``.
        rule: why it leaves out those layers for which there is no other reason: what it works on.

    Raises:
        InputError: the share is below one half, and the layers were not named.
    """
    if targets is not None:
        return
    known = _weights_of(piece.network)
    total = sum(dict(known.values()).values())
    covered = dict(known[name] for name in weights if name in known)
    part = sum(covered.values()) / total
    left = [name for name, (value, _) in known.items() if value not in covered]
    # A weight from which inputs go may keep all of its outputs.
    whole = {path: reason for path, reason in (why or {}).items() if not reason.endswith(_EXPECTED)}
    kept = [name for name, (value, _) in known.items() if value in covered and split_path(name)[0] in whole]
    # Rounded, a few weights that are left out would be none.
    share = f"{min(part, 0.99) if left or kept else part:.0%} of {type(piece.network).__name__}'s weights"
    if refuse and 2 * part < 1:
        others = _told(piece, step, left, why or {}, rule, most=_SHOWN)
        raise InputError(
            f"{step.title} would work on only {share}: name the layers in targets to do so on purpose; it leaves out "
            f"{others}"
        )
    others = _told(piece, step, left, why or {}, rule)
    partly = f", only in part on {_told(piece, step, kept, whole, rule)}" if kept else ""
    piece.note(f"{step.title} works on {share}{f', not on {others}' if left else ''}{partly}")


def _told(
    piece: Workpiece, step: Step, names: Iterable[str], why: Mapping[str, str], rule: str, *, most: int | None = None
) -> str:
    """The layers of some weights, together where the reason is the same, each time so many at most."""
    excluded = match_layers(piece.network, step.exclude, fits=lambda _: True, what="layers") if step.exclude else ()
    by_reason: dict[str, dict[str, None]] = {}
    for name in names:
        path, own = split_path(name)
        layer = piece.network.get_submodule(path)
        # What stands first has decided.
        reasons = (
            "excluded" if path in excluded else None,
            why.get(path),
            piece.left.get(path, piece.left.get(name)),
            "shared, quantized or masked already" if parametrize.is_parametrized(layer, own) else None,
            None if own in weight_names(layer) else f"a parameter of {type(layer).__name__}, no layer's weight",
        )
        reason = next((one for one in reasons if one is not None), rule or f"{type(layer).__name__}, not its kind")
        shown = path if path and own in weight_names(layer) else name
        by_reason.setdefault(reason, {})[shown] = None
    return "; ".join(f"{_some(list(layers), most)} ({reason})" for reason, layers in by_reason.items())


def _some(layers: Sequence[str], most: int | None) -> str:
    if most is None or len(layers) <= most + 1:
        return ", ".join(layers)
    return f"{', '.join(layers[:most])} and {len(layers) - most} others"


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
