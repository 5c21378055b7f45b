"""The workpiece of compression steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from distill_lightning.compression.access.calibration import Loss
from distill_lightning.compression.costs.latency import Clocks
from distill_lightning.compression.file.packed import Coding
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.errors import InputError

SHOWN_LAYERS = 12
"""The number of layers that a figure can show."""


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits ``(N, ..., K)`` with classes ``(N, ...)``, mean over samples and positions."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class RemovedUnits(NamedTuple):
    """Units of one layer that have left a network.

    Attributes:
        layer: path of the layer that makes them.
        unit: what they are: ``"channel"``, ``"head"`` and so on.
        size: how many there were.
        gone: which have left, counted from 0.
        others: paths of the other layers that lose slices with them: norms, and layers that read them.
    """

    layer: str
    unit: str
    size: int
    gone: tuple[int, ...]
    others: tuple[str, ...]


@dataclass
class Workpiece:
    """A network that is being compressed, and what else a step needs.

    Attributes:
        network: the network; it is changed in place and stays the same object.
        example_inputs: a tensor ``(N, ...)`` that the network takes, or a tuple of its arguments.
        masks: masks of the pruned weights, by the current paths of the parameters; the `Compressor` applies them.
        optimizer: optimiser of the current training, whose state of pruned weights has to be cleared; ``None`` if there
            is no training.
        seed: seed of everything that is drawn.
        draw: returns the calibration batches, pairs of inputs and targets from the training set; ``None`` if there are
            none.
        loss: a function of the network's output and the targets, a mean over the samples.
        clocks: the clocks by which the time of networks is measured; ``None`` for the system's.
        coding: coding of a packed file's bytes: ``"plain"``, ``"deflate"`` or ``"huffman"``.
        notes: sentences about the steps, for the report.
        left: why layers are left alone, by path.
        removed: the units that steps have removed, for `preview`.
        details: what steps have seen in single layers, in plain values, for figures; see `record`.
        changed: set by a step that has changed weights or structure.
        restart: set by a step after which the training starts again, with a new optimiser and the initial learning
            rate.
    """

    network: nn.Module
    example_inputs: Any
    masks: Masks = field(default_factory=Masks)
    optimizer: Optimizer | None = None
    seed: int = 0
    draw: Callable[[], Sequence[tuple[Any, Any]]] | None = None
    loss: Loss = cross_entropy
    clocks: Clocks | None = None
    coding: Coding = "plain"
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    removed: list[RemovedUnits] = field(default_factory=list)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: bool = False
    restart: bool = False
    _drawn: Sequence[tuple[Any, Any]] | None = None

    def batches(self, what: str) -> Sequence[tuple[Any, Any]]:
        """The calibration batches, drawn once for each step.

        Args:
            what: what needs them, for the message.

        Raises:
            InputError: there are none.
        """
        if self._drawn is None:
            self._drawn = self.draw() if self.draw is not None else ()
        if not self._drawn:
            raise InputError(f"{what} needs calibration data: give batches of training inputs and targets")
        return self._drawn

    def forget_batches(self) -> None:
        """Make the next step draw its own batches."""
        self._drawn = None

    def prune(self, masks: Masks) -> None:
        """Add masks: from now on the masked weights and the optimiser's state of them are zero."""
        self.masks.kept.update(masks.kept)
        masks.project(self.network)
        if self.optimizer is not None:
            masks.project_optimizer(self.network, self.optimizer)
        self.changed = self.changed or masks.pruned > 0

    def rename_mask(self, path: str, new: str) -> None:
        """Move a parameter's mask to another path, such as that under a parametrization."""
        if path in self.masks.kept:
            self.masks.kept[new] = self.masks.kept.pop(path)

    def record(self, kind: str, path: str, value: Any) -> None:
        """Keep what a step has seen in a layer, for as many layers as a figure can show.

        Args:
            kind: ``"sensitivity"`` (the loss at each level), ``"spectra"`` (singular values and rank) or ``"codebook"``
                (`histogram_of` the weights).
            path: path of the layer or weight.
            value: plain values.
        """
        layers = self.details.setdefault(kind, {})
        if path in layers or len(layers) < SHOWN_LAYERS:
            layers[path] = value

    def leave(self, path: str, reason: str) -> None:
        """Note why a layer is left alone."""
        self.left[path] = reason
        self.note(f"{path}: {reason}: left as it is")

    def note(self, sentence: str) -> None:
        """Add a sentence to the report's notes, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
