"""What a list of steps would take out of a network, without touching it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import Loss, first_samples
from distill_lightning.compression.access.computed import computed_in
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.old_hooks import refuse_old_hooks
from distill_lightning.compression.access.parameters import cuda_devices, join_path
from distill_lightning.compression.access.targets import Targets, match_layers
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.mask.learned import LearnedMask, bake_masks, learned
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.run.phases import check_network, check_order, check_targets
from distill_lightning.compression.steps.base import Step
from distill_lightning.compression.steps.workpiece import RemovedUnits, Workpiece, cross_entropy
from distill_lightning.errors import InputError

HEADER = ("layer", "before", "after", "parameters", "MACs", "why it is left alone")
UNITS_HEADER = ("layer", "units", "leave", "which", "with slices of")


@dataclass(frozen=True)
class PreviewRow:
    """What would become of one layer.

    Attributes:
        layer: path of the layer.
        before: its class and the shapes of its weights.
        after: the same after the steps, with the share of zeros and the bits of a weight; ``""`` if it stays as it is.
        parameters: numbers of its parameters, before and after.
        macs: its multiply-accumulates of one sample, before and after.
        reason: why it is left alone, or keeps all of its channels, or what only the training decides; ``""`` if there
            is nothing to say.
    """

    layer: str
    before: str
    after: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class Preview:
    """What would become of a network.

    Attributes:
        rows: one for each layer with weights, in the network's order.
        notes: what the steps say about their work.
        units: the channels, hidden units, neurons, heads and layers that would leave, step by step.
    """

    rows: list[PreviewRow]
    notes: list[str]
    units: list[RemovedUnits] = field(default_factory=list)

    def table(self) -> list[list[str]]:
        """The rows as text: a header, the layers and their total."""
        total = PreviewRow(
            "total",
            "",
            "",
            (sum(row.parameters[0] for row in self.rows), sum(row.parameters[1] for row in self.rows)),
            (sum(row.macs[0] for row in self.rows), sum(row.macs[1] for row in self.rows)),
            "",
        )
        lines = [
            [row.layer, row.before, row.after, _change(*row.parameters), _change(*row.macs), row.reason]
            for row in [*self.rows, total]
        ]
        return [list(HEADER), *lines]

    def units_table(self) -> list[list[str]]:
        """The units that would leave as text: a header, and a line for each layer that makes them; or nothing."""
        lines = [
            [one.layer, f"{one.size} {one.unit}s", str(len(one.gone)), _runs(one.gone), ", ".join(one.others)]
            for one in self.units
        ]
        return [list(UNITS_HEADER), *lines] if lines else []

    def __str__(self) -> str:
        return "\n\n".join(_in_columns(lines) for lines in (self.table(), self.units_table()) if lines)


def _in_columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _runs(numbers: Sequence[int]) -> str:
    """Rising numbers in a few words: ``"0-2, 5"``."""
    known = set(numbers)
    starts = [number for number in numbers if number - 1 not in known]
    ends = [number for number in numbers if number + 1 not in known]
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def preview(
    network: nn.Module,
    steps: Step | Sequence[Step],
    example_inputs: Any,
    *,
    batches: Iterable[tuple[Any, Any]] | Callable[[], Sequence[tuple[Any, Any]]] | None = None,
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> Preview:
    """Show what would leave a network, layer by layer; the network is not touched.

    The steps run one after the other on a copy, each to the end of its phase, but without any training between: which
    weights go may differ after training. How many go does not, if the steps have amounts or budgets; where a threshold,
    a penalty or learned gates decide, the row says that it depends on the training.

    In the middle of a training, a network in the phase of a `LearnMask` loses before all steps what its masks would
    take if that phase ended now, and ``preview(network, [], images)`` shows that alone.

    ::

        >>> from distill_lightning.compression import PruneUnits, preview
        >>> import torch; from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
        >>> print(preview(network, [PruneUnits(unit="channel", amount=0.5)], torch.rand(1, 1, 8, 8)).table()[1][:3])
        ['0', 'Conv2d 8x1x3x3', 'Conv2d 4x1x3x3']

    Args:
        network: any network.
        steps: one step, or several in their order; none for what learned masks take at present.
        example_inputs: a tensor ``(N, ...)`` that the network takes, or a tuple of its arguments.
        batches: calibration data, see `Compressor`; only for steps that need it.
        loss: see `Compressor`.
        seed: see `Compressor`.

    Raises:
        InputError: what `Compressor` and the steps raise for this network, such as missing calibration data.
    """
    steps = [steps] if isinstance(steps, Step) else list(steps)
    check_network(network)
    check_order(steps)
    check_targets(network, steps)
    refuse_old_hooks(network)
    copied = copy_network(network)
    known = list(batches) if batches is not None and not callable(batches) else None
    draw = batches if callable(batches) else None if known is None else lambda: known
    piece = Workpiece(copied, example_inputs, seed=seed, draw=draw, loss=loss)
    layers = {path: layer for path, layer in copied.named_modules() if weight_names(layer)}
    before = {path: (_told(layer, Masks(), path), _own_parameters(layer)) for path, layer in layers.items()}
    sample = first_samples(example_inputs, 1)
    macs = _macs(copied, sample, piece)
    later: dict[str, str] = {}
    for place in learned(copied, LearnedMask):  # type: ignore[type-abstract]
        later |= dict.fromkeys(_rows_at(layers, copied, place), "as its learned mask is at present")
    piece.prune(bake_masks(copied))
    with torch.random.fork_rng(devices=cuda_devices(copied)):
        torch.manual_seed(seed)
        for step in steps:
            work = step.start()
            if step.rewinds_to is not None:
                work.watch_epoch(piece, step.rewinds_to)
            work.explain(piece)
            work.begin(piece)
            for place, why in work.in_training(piece).items():
                for path in _rows_at(layers, copied, place):
                    later[path] = why
            work.finish(piece)
            piece.forget_batches()
    after_macs = _macs(copied, sample, piece)
    places = {layer: path for path, layer in copied.named_modules()}
    rows = []
    for path, layer in layers.items():
        told, parameters = before[path]
        now = places.get(layer, path)
        here = _at(copied, now)
        if here is not layer and here in layers.values():
            # Another layer has taken its place: those after a removed one are numbered anew.
            here = None
        # A layer that was replaced by several may hold another one that is shown by itself.
        inner = [place for place in layers if path and place.startswith(f"{path}.") and here is not layer]
        seen = "removed" if here is None else _told(here, piece.masks, now)
        left = 0 if here is None else _own_parameters(here) - sum(_parameters_at(copied, place) for place in inner)
        counted = [place for place in after_macs if _is_in(place, now) and not any(_is_in(place, one) for one in inner)]
        own = sum(after_macs[place] for place in counted)
        after = "" if seen == told else seen
        said = [why[path] for why in (piece.left, later) if path in why]
        reason = "; ".join(said) or ("" if after else _reason(network, path, steps))
        rows.append(PreviewRow(path, told, after, (parameters, left), (macs.get(path, 0), own), reason))
    return Preview(rows, list(piece.notes), list(piece.removed))


def _macs(network: nn.Module, sample: Any, piece: Workpiece) -> Mapping[str, int]:
    try:
        return count_macs(network, sample).by_module
    except InputError as error:
        piece.note(f"multiply-accumulates are not counted: {error}")
        return {}


def _is_in(place: str, path: str) -> bool:
    return place == path or place.startswith(f"{path}.")


def _rows_at(layers: Mapping[str, nn.Module], network: nn.Module, place: str) -> list[str]:
    """The paths, before all steps, of the layers that a step found at the path of a layer or weight."""
    here = _at(network, place) or _at(network, place.rpartition(".")[0])
    same = [path for path, layer in layers.items() if layer is here]
    return same or [path for path in layers if _is_in(path, place) or _is_in(place, path)]


def _reason(network: nn.Module, path: str, steps: Sequence[Step]) -> str:
    """Why a layer is as it was, of which no step has said why."""
    named = not steps or any(step.targets is None or _matches(network, step.targets, path) for step in steps)
    return "not changed by these steps" if named else "not among the targets"


def _matches(network: nn.Module, targets: Targets, path: str) -> bool:
    """Whether targets name a layer."""
    layer = network.get_submodule(path)
    try:
        return path in match_layers(network, targets, fits=lambda module: module is layer, what="layers")
    except InputError:
        return False


def _parameters_at(network: nn.Module, path: str) -> int:
    layer = _at(network, path)
    return 0 if layer is None else _own_parameters(layer)


def _own_parameters(layer: nn.Module) -> int:
    """The parameters of a layer in the shapes in which they are used; those of a container with all of its parts."""
    names = weight_names(layer)
    if not names:
        return sum(parameter.numel() for parameter in layer.parameters())
    others = [value for name, value in layer.named_parameters(recurse=False) if name not in names]
    weights: list[Tensor] = [getattr(layer, name) for name in names]
    return sum(value.numel() for value in [*weights, *others])


def _told(layer: nn.Module, masks: Masks, path: str) -> str:
    """A layer in a few words."""
    names = weight_names(layer)
    shapes = [tuple(getattr(layer, name).shape) for name in names] or [tuple(p.shape) for p in layer.parameters()]
    kind = type(layer).__name__.removeprefix("Parametrized")
    words = [kind, *("x".join(map(str, shape)) for shape in shapes if len(shape) > 1)]
    words += [f"{bits} bit" for bits in sorted({entry.bits for entry in computed_in(layer).values() if entry.bits})]
    # The masks of a layer's own weights, or of everything in what has replaced it.
    prefix = join_path(path, "")
    own = [
        mask
        for name, mask in masks.kept.items()
        if name.startswith(prefix)
        and (not names or name.removeprefix(prefix).replace("parametrizations.", "").removesuffix(".original") in names)
    ]
    zeros = sum(int((~mask).sum()) for mask in own)
    return " ".join([*words, *([f"{zeros / sum(mask.numel() for mask in own):.0%} zeros"] if zeros else [])])


def _at(network: nn.Module, path: str) -> nn.Module | None:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
