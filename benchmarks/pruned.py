"""Half of a network's channels, removed with `PruneUnits` and with Torch-Pruning, for `benchmarks.architectures`."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.networks import CLASSES, build
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.steps import units
from distill_lightning.compression.steps.prune_units import PruneUnits
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError

AMOUNT = 0.5
EQUAL = 1e-5
WORKS, SILENT = "works", "silent change"
RAN = (WORKS, SILENT)
"""Something was removed, and the network runs and returns tensors of the same shape."""
Row = dict[str, Any]


def prune(name: str) -> Row:
    """Remove half of a network's units with `PruneUnits`, and compare with the same units masked."""
    network, inputs = build(name)
    begin = time.process_time()
    step = PruneUnits(unit="channel", amount=AMOUNT, scope="layer")
    small = copy.deepcopy(network)
    try:
        Compressor(small, [step], inputs).apply()
    except InputError as error:
        return {"status": "refused", "why": str(error), "seconds": time.process_time() - begin}
    seconds = time.process_time() - begin
    row = _left(network, small, inputs) | {"seconds": seconds}
    return _compared(_masked(network, inputs), small, inputs) | row


def _compared(masked: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> Row:
    """Whether a network without some units returns what it does with their weights at zero."""
    difference = _difference(masked, small, inputs)
    if EQUAL < difference < float("inf"):
        # In single precision a deep network's rounding may be more than that.
        precise = tuple(value.double() if value.is_floating_point() else value for value in inputs)
        difference = _difference(copy.deepcopy(masked).double(), copy.deepcopy(small).double(), precise)
    row: Row = {"status": WORKS if difference <= EQUAL else SILENT}
    return row | ({"difference": difference} if difference < float("inf") else {})


def _masked(network: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """A copy of the network with the units at zero that `PruneUnits` removes."""
    masked = copy.deepcopy(network)
    piece = Workpiece(masked, inputs)
    families = units.find_families(piece, "channel", targets=None, exclude=())
    scores = units.score_units(piece, families, "magnitude")
    kept = units.choose_units(families, scores, AMOUNT, scope="layer", relative=True)
    with torch.no_grad():
        for path, mask in units.unit_masks(masked, families, kept).kept.items():
            masked.get_parameter(path).masked_fill_(~mask, 0)
    return masked


@torch.no_grad()
def _difference(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference of two networks' outputs, as a part of the largest output; infinite if it is no number."""
    first, second = _output(one.eval()(*inputs)), _output(other.eval()(*inputs))
    if first.shape != second.shape:
        return float("inf")
    largest = float((first - second).abs().max() / first.abs().max())
    return largest if largest == largest else float("inf")  # noqa: PLR0124  # not a number


def _output(output: Any) -> Tensor:
    """The first tensor that a network returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def _left(network: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> Row:
    """The shares of the parameters and multiply-accumulates that are left."""
    parameters, macs = (
        [of(one) for one in (small, network)]
        for of in (lambda n: count_parameters(n).stored, lambda n: count_macs(n, inputs).dense)
    )
    return {"parameters": parameters[0] / parameters[1], "macs": macs[0] / macs[1]}


def prune_with_torch_pruning(name: str) -> Row:
    """Remove half of a network's channels with Torch-Pruning, but none of the classifier's outputs."""
    network, inputs = build(name)
    library = importlib.import_module("torch_pruning")
    begin = time.process_time()
    small, masked = copy.deepcopy(network), copy.deepcopy(network)
    ends = [layer for layer in small.modules() if _channels(layer) == CLASSES]
    pruner = library.pruner.MagnitudePruner(
        small, inputs if len(inputs) > 1 else inputs[0], importance=library.importance.MagnitudeImportance(p=2),
        pruning_ratio=AMOUNT, ignored_layers=ends,
    )  # fmt: skip
    with _masking(library, small, masked):
        pruner.step()
    seconds = time.process_time() - begin
    with torch.no_grad():
        one, other = _output(network(*inputs)), _output(small.eval()(*inputs))
    row = _left(network, small, inputs) | {"seconds": seconds}
    if one.shape != other.shape:
        return {"status": "other shape", "why": f"outputs of shape {tuple(other.shape)}"} | row
    if row["parameters"] == 1:
        return {"status": "removes nothing"} | row
    return _compared(masked, small, inputs) | row


@contextmanager
def _masking(library: Any, network: nn.Module, masked: nn.Module) -> Iterator[None]:
    """Afterwards a copy of the network has the weights at zero that Torch-Pruning has removed from it within this."""
    kind = library.pruner.function.BasePruningFunc
    cut = kind._prune_parameter_and_grad  # noqa: SLF001  # through which all of its cuts go
    # By the id of a parameter: its name, and which indices of each of its dimensions are left.
    left = {id(p): (name, [torch.arange(size) for size in p.shape]) for name, p in network.named_parameters()}
    alive = list(network.parameters())

    def following(pruner: Any, weight: Tensor, keep: Any, dim: int) -> Tensor:
        new: Tensor = cut(pruner, weight, keep, dim)
        name, indices = left[id(weight)]
        indices[dim] = indices[dim][torch.as_tensor(keep)]
        left[id(new)] = name, indices
        alive.append(new)  # so that no other gets its id
        return new

    with mock.patch.object(kind, cut.__name__, following):
        yield
    with torch.no_grad():
        for name, indices in left.values():
            parameter = masked.get_parameter(name)
            stays = torch.zeros_like(parameter, dtype=torch.bool)
            stays[torch.meshgrid(*indices, indexing="ij") if indices else ()] = True
            parameter.masked_fill_(~stays, 0)


def _channels(layer: nn.Module) -> Any:
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))
