"""The second moments of layers' inputs on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.compression.access.calibration import Batches, calibrating, inputs_of, watching
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide


@torch.no_grad()
def input_moments(
    network: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, *, exact: bool = False
) -> dict[str, Tensor]:
    """The mean of ``x x^T`` over all samples and positions, one pass over the data for all layers.

    Args:
        network: run in eval mode, and left as it was.
        layers: layers of the network, `torch.nn.Linear` or `torch.nn.Conv2d`, by any names.
        batches: calibration data; the targets are not read.
        exact: whether the moments are computed in float64 and kept on the CPU; not for grouped convolutions.

    Returns:
        Tensors ``(G, D, D)`` by name: ``G`` groups (1 for a linear layer), ``D`` inputs of a row of the weight; for a
        convolution they are a patch of ``C H W`` numbers.

    Raises:
        InputError: a layer does not run as a module, or gets inputs that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def add(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = _rows(layer, inputs[0].double() if exact else wide(inputs[0]))
        # A batch of small matrices is multiplied in another order than a single one.
        products = (rows[0].T @ rows[0])[None].cpu() if exact else rows.mT @ rows
        sums[name] = sums[name] + products if name in sums else products
        counts[name] += rows.shape[1]

    with watching(layers, add), calibrating(network):
        for inputs, _ in batches:
            network(*inputs_of(inputs))
    silent = [name for name, count in counts.items() if not count]
    if silent:
        raise InputError(
            f"the layer of {silent[0]!r} did not run on the calibration data as a module of its own: exclude it, or "
            "give at least one batch"
        )
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise InputError(
                f"the inputs of the layer of {name!r} hold NaN or infinity on the calibration data: check the data "
                "and the network"
            )
    return {name: sums[name] / counts[name] for name in layers}


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs that the layer's weight rows are multiplied with: ``(G, samples, D)``."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.reshape(1, -1, inputs.shape[-1])
    batch = inputs if inputs.ndim == 4 else inputs[None]
    sides = layer._reversed_padding_repeated_twice  # noqa: SLF001  # the one place where "same" has become numbers
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    patches = F.unfold(F.pad(batch, sides, mode=mode), kernel, dilation=dilation, stride=stride)
    grouped = patches.view(len(batch), layer.groups, -1, patches.shape[2])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)
