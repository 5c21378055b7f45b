"""What the figures of a report show layer by layer, in plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from distill_lightning.compression.access.computed import computed_in
from distill_lightning.compression.access.parameters import split_path
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.compression.structure.changes import changes_of
from distill_lightning.plots import plot_bits, plot_codebook, plot_sensitivity, plot_sparsity, plot_spectra

# A figure with more lines or panels could not be read, nor a file with every weight be opened.
_LAYERS, _WEIGHTS, _VALUES = 12, 2000, 256

Details = dict[str, Any]


@torch.no_grad()
def details_of(
    dense: nn.Module, network: nn.Module, piece: Workpiece, sparsity: Mapping[str, Sequence[float]]
) -> Details:
    """What became of single layers.

    Args:
        dense: the network before compression.
        network: the compressed network, with its quantizers.
        piece: the workpiece of its steps.
        sparsity: share of zeros of each pruned weight, after each epoch.

    Returns:
        Of ``"sparsity"``, ``"sensitivity"``, ``"spectra"``, ``"codebook"`` and ``"bits"`` those that there are.
    """
    entries = {path: entry for path, entry in computed_in(network).items() if entry.bits is not None}
    found: Details = {
        "sparsity": {path: [float(share) for share in shares] for path, shares in sparsity.items()},
        "sensitivity": piece.curves,
        "spectra": _spectra(dense, network),
        "codebook": {},
        "bits": {path: {"bits": entry.bits, "size": _weight(network, path).numel()} for path, entry in entries.items()},
    }
    for path in entries:
        before, now = _weight(dense, path), _weight(network, path)
        levels = torch.unique(now)
        if before is not None and before.shape == now.shape and len(levels) <= _VALUES:
            step = -(-before.numel() // _WEIGHTS)
            found["codebook"][path] = {"weights": before.flatten()[::step].tolist(), "levels": levels.tolist()}
    return {name: told for name, told in found.items() if told}


def draw_details(details: Details) -> dict[str, Figure]:
    """The figures by file name."""
    figures = {}
    if "sparsity" in details:
        figures["sparsity.png"] = plot_sparsity(_first(details["sparsity"]))
    if "sensitivity" in details:
        told = details["sensitivity"]
        figures["sensitivity.png"] = plot_sensitivity(
            _first(told["curves"]), told["levels"], reference=told["dense"], label="loss", scale=1
        )
    if "spectra" in details:
        told = _first(details["spectra"])
        ranks = {path: one["rank"] for path, one in told.items()}
        figures["spectra.png"] = plot_spectra({path: one["values"] for path, one in told.items()}, ranks)
    if "codebook" in details:
        told = _first(details["codebook"])
        weights, levels = ({path: one[key] for path, one in told.items()} for key in ("weights", "levels"))
        figures["codebook.png"] = plot_codebook(weights, levels)
    if len({told["bits"] for told in details.get("bits", {}).values()}) > 1:
        told = details["bits"]
        bits, sizes = ({path: one[key] for path, one in told.items()} for key in ("bits", "size"))
        figures["bits.png"] = plot_bits(bits, sizes=sizes)
    return figures


def _spectra(dense: nn.Module, network: nn.Module) -> dict[str, Any]:
    """The singular values of weights that were factored by one rank each, and that rank."""
    found: dict[str, Any] = {}
    for change in changes_of(network):
        for path, told in change["layers"].items() if change["kind"] == "low_rank" else ():
            ranks = [told["rank"]] if "rank" in told else told.get("ranks", [])
            weight = _weight(dense, f"{path}.weight")
            if isinstance(ranks, list) and len(ranks) == 1 and weight is not None:
                values = torch.linalg.svdvals(weight.flatten(1).double())
                found[path] = {"values": values[:_VALUES].tolist(), "rank": ranks[0]}
    return found


def _weight(network: nn.Module, path: str) -> Any:
    """The weight at a path, computed or not; ``None`` if there is none."""
    module, name = split_path(path)
    try:
        weight: Tensor | None = getattr(network.get_submodule(module), name, None)
    except AttributeError:
        return None
    return weight


def _first(told: Mapping[str, Any]) -> dict[str, Any]:
    return dict(list(told.items())[:_LAYERS])
