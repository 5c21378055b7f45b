"""What the figures of a report show layer by layer, in plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from distill_lightning.compression.access.computed import computed_in, original_of
from distill_lightning.compression.access.parameters import split_path
from distill_lightning.compression.access.weights import histogram_of
from distill_lightning.compression.steps.workpiece import SHOWN_LAYERS, Workpiece
from distill_lightning.plots import plot_bits, plot_codebook, plot_sensitivity, plot_sparsity, plot_spectra

_VALUES = 256

Details = dict[str, Any]


@torch.no_grad()
def details_of(network: nn.Module, piece: Workpiece, sparsity: Mapping[str, Sequence[float]]) -> Details:
    """What became of single layers.

    Args:
        network: the compressed network, with its quantizers.
        piece: the workpiece of its steps.
        sparsity: share of zeros of each pruned weight, after each epoch.

    Returns:
        Of ``"sparsity"``, ``"sensitivity"``, ``"spectra"``, ``"codebook"`` and ``"bits"`` those that there are.
    """
    entries = {path: entry for path, entry in computed_in(network).items() if entry.bits is not None}
    codebook, bits = {}, {}
    for path, entry in entries.items():
        module, name = split_path(path)
        layer = network.get_submodule(module)
        weight = getattr(layer, name)
        bits[path] = {"bits": entry.bits, "size": weight.numel()}
        levels = torch.unique(weight)
        before = piece.details.get("codebook", {}).get(path)
        if entry.keeps_parameter:
            before = histogram_of(original_of(layer, name))
        if before is not None and len(levels) <= _VALUES:
            codebook[path] = {"histogram": before, "levels": levels.tolist()}
    found: Details = {
        "sparsity": {path: list(shares) for path, shares in _first(sparsity).items()},
        "sensitivity": piece.details.get("sensitivity"),
        "spectra": piece.details.get("spectra"),
        "codebook": _first(codebook),
        "bits": bits,
    }
    return {name: layers for name, layers in found.items() if layers}


def draw_details(details: Details) -> dict[str, Figure]:
    """The figures by file name."""
    figures = {}
    if "sparsity" in details:
        figures["sparsity.png"] = plot_sparsity(details["sparsity"])
    if "sensitivity" in details:
        # Each step has levels of its own, and a dense loss: that of the network as it found it.
        curves: dict[tuple[tuple[float, ...], float], dict[str, Any]] = {}
        for path, told in details["sensitivity"].items():
            curves.setdefault((tuple(told["levels"]), told["dense"]), {})[path] = told["losses"]
        for number, ((amounts, dense), losses) in enumerate(curves.items(), start=1):
            name = "sensitivity.png" if number == 1 else f"sensitivity_{number}.png"
            figures[name] = plot_sensitivity(losses, amounts, reference=dense, label="loss", scale=1)
    if "spectra" in details:
        figures["spectra.png"] = plot_spectra(_each(details["spectra"], "values"), _each(details["spectra"], "rank"))
    if "codebook" in details:
        # Reports of earlier versions hold some of the weights themselves.
        weights = {path: told.get("histogram", told.get("weights")) for path, told in details["codebook"].items()}
        figures["codebook.png"] = plot_codebook(weights, _each(details["codebook"], "levels"))
    if len(set(_each(details.get("bits", {}), "bits").values())) > 1:
        figures["bits.png"] = plot_bits(_each(details["bits"], "bits"), sizes=_each(details["bits"], "size"))
    return figures


def _each(layers: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {path: values[key] for path, values in layers.items()}


def _first(layers: Mapping[str, Any]) -> dict[str, Any]:
    """As many layers as a figure can show."""
    return dict(list(layers.items())[:SHOWN_LAYERS])
