"""The student of a checkpoint, and the one of a folder that was exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distill_lightning.compression.file.artefact import load_compressed
from distill_lightning.compression.structure.changes import rebuild_structure
from distill_lightning.errors import InputError, refusing
from distill_lightning.modules.parts.checkpoints import check_format
from distill_lightning.networks.budget import Budget, bytes_of_tensors
from distill_lightning.networks.provenance import Recipe, build_from, without_weights
from distill_lightning.networks.weights import load_strictly, read_checkpoint, read_weights

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"

# Bytes that a network may take by its recipe, at any rate and for each byte of its weights.
_SMALL = 2**28
_RATIO = 100


def read_training(path: Path) -> dict[str, Any]:
    """A checkpoint of one of this package's methods.

    Raises:
        InputError: there is none, it is damaged or unsafe, of another kind of module, or of another version.
    """
    checkpoint = read_checkpoint(path)
    if "recipes" not in checkpoint:
        raise InputError(
            f"{path} is the checkpoint of another kind of module, which has no student: "
            "distill_lightning.Pretrained(network, checkpoint, part=...) takes a network's weights from it"
        )
    check_format(checkpoint, str(path))
    return checkpoint


def recipe_in(checkpoint: Mapping[str, Any]) -> Recipe | None:
    """How a checkpoint's student was built, before anything was done to it; ``None``: it does not tell."""
    compressed = (checkpoint.get("compression") or {}).get("recipe")
    return without_weights(compressed or checkpoint["recipes"].get("student"))


def student_of(path: Path, checkpoint: Mapping[str, Any], student: nn.Module | None) -> nn.Module:
    """The student of a checkpoint, with plain weights and in eval mode, on the CPU.

    Args:
        path: of the checkpoint.
        checkpoint: its content.
        student: built as the trained one was before it was trained or compressed; changed in place. ``None``: the
            checkpoint tells how.

    Raises:
        InputError: it does not tell, or has the weights of another architecture.
    """
    recipe = recipe_in(checkpoint)
    if student is None and recipe is None:
        raise InputError(
            f"{path} does not tell how its student was built, because no factory of this package built it: give the "
            "configuration that it was trained with, --config FILE, or in Python export_checkpoint(..., student=...)"
        )
    if checkpoint.get("compression"):
        return load_compressed(path, student)
    weights = read_weights(path)
    network = _built(recipe, path, bytes_of_tensors(weights)) if student is None else student.cpu()
    load_strictly(network, weights, source=str(path))
    return network.eval()


def load_exported(folder: str | Path, network: nn.Module | None = None) -> nn.Module:
    """The student in a folder that ``distill-lightning export`` wrote, in eval mode on the CPU.

    Only tensors and plain values are read, never pickled code, and only factories of this package are called.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        network: built as the student was before it was trained; only needed if no factory of this package built it.

    Raises:
        InputError: a file is missing or damaged, or ``network`` is needed or of another architecture.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise InputError(f"there is no {path}: give a folder that 'distill-lightning export' wrote")
    with refusing(f"{path} is damaged", ValueError, OSError):
        told = json.loads(path.read_text())
    weights = read_weights(Path(folder) / WEIGHTS)
    with refusing(f"{path} is damaged", KeyError, TypeError, AttributeError):
        if network is None:
            network = _built(without_weights(told["recipe"]), path, bytes_of_tensors(weights))
        rebuild_structure(network, told["structure"])
    load_strictly(network, weights, source=str(folder))
    return network.eval()


def _built(recipe: Recipe | None, path: Path, size: int) -> nn.Module:
    if recipe is None:
        raise InputError(f"{path} does not tell how the network was built: give load_exported(folder, network)")
    with Budget(max(_SMALL, _RATIO * size), source=str(path), way_out="if it is meant, give the network itself"):
        return build_from(recipe)
