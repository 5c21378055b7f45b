"""Biases that make up for what quantization does to the mean outputs of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from distill_lightning.compression.access.calibration import inputs_of, watching
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.layers import eval_mode


@torch.no_grad()
def correct_biases(network: nn.Module, reference: nn.Module, batches: Sequence[Any]) -> list[str]:
    """Correct the biases of a quantized network, in place, so that every layer's mean output is the float network's.

    Layers are corrected in the order in which they first run, because each changes the inputs of the next ones. Both
    networks run in eval mode. Layers without a bias are left alone. Returns the names of the layers that were
    corrected.
    """
    if not batches:
        raise InputError("bias correction needs at least one batch of training inputs")
    wanted = _mean_outputs(reference, _with_bias(reference), batches)
    layers = _with_bias(network)
    if not wanted:
        raise InputError(
            f"{type(reference).__name__} has no linear or conv layer with a bias to correct: leave bias_correction out"
        )
    if wanted.keys() - layers.keys():
        raise InputError("bias correction needs two networks with the same linear or conv layers, with biases")
    for name, mean in wanted.items():
        found = _mean_outputs(network, {name: layers[name]}, batches)
        bias: Any = layers[name].bias
        bias.add_((mean - found[name]).to(bias.dtype))
    return list(wanted)


def _with_bias(network: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and module.bias is not None
    }


def _mean_outputs(network: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The mean of each layer's output channels over the batches, in float64, in the order of their first calls."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def count(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        unbatched = output.ndim == 1 or (isinstance(layer, _ConvNd) and output.ndim == layer.weight.ndim - 1)
        channels = -1 if isinstance(layer, nn.Linear) else int(not unbatched)
        rows = wide(output).double().movedim(channels, -1).flatten(0, -2)
        sums[name] = sums.get(name, 0) + rows.reshape(-1, rows.shape[-1]).sum(dim=0)
        counts[name] = counts.get(name, 0) + rows.numel() // rows.shape[-1]

    with watching(layers, count, outputs=True), eval_mode(network):
        for batch in batches:
            network(*inputs_of(batch))
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise InputError(
                f"bias correction: the outputs of {name!r} on the calibration data hold NaN or infinity: check the "
                "data and the network"
            )
    return {name: total / counts[name] for name, total in sums.items()}
