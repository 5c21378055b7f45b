"""What a compression step works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from distill_lightning.compression.calibration import Loss
from distill_lightning.compression.masks import Masks
from distill_lightning.compression.packing.packed import Coding
from distill_lightning.errors import InputError


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits ``(N, ..., K)`` and classes ``(N, ...)``, mean over samples and positions."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@dataclass
class Workpiece:
    """A network that is being compressed, and what a step needs beside it.

    Attributes:
        network: changed in place; it stays the same object.
        example_inputs: a tensor ``(N, ...)`` that the network takes, or a tuple of its arguments.
        masks: of the weights that are pruned, by the path that the parameter has now; kept at zero by the `Compressor`.
        optimizer: of the training that goes on, whose memory of pruned weights has to go; ``None`` outside of one.
        seed: of everything that is drawn.
        draw: gives the calibration batches, pairs of inputs and targets from the training set; ``None``: there are
            none.
        loss: of the network's output and the targets, a mean.
        coding: of the bytes of a packed file: ``"plain"``, ``"deflate"`` or ``"huffman"``.
        notes: what the report has to say about the steps, in sentences.
        changed: set by a step that has changed weights or structure.
        restart: set by a step after which training begins anew, with an optimiser and a learning rate as at first.
    """

    network: nn.Module
    example_inputs: Any
    masks: Masks = field(default_factory=Masks)
    optimizer: Optimizer | None = None
    seed: int = 0
    draw: Callable[[], Sequence[tuple[Any, Any]]] | None = None
    loss: Loss = cross_entropy
    coding: Coding = "plain"
    notes: list[str] = field(default_factory=list)
    changed: bool = False
    restart: bool = False
    _drawn: Sequence[tuple[Any, Any]] | None = None

    def batches(self, what: str) -> Sequence[tuple[Any, Any]]:
        """The calibration batches, drawn once for each step.

        Args:
            what: needs them, for the message.

        Raises:
            InputError: there are none.
        """
        if self._drawn is None:
            self._drawn = self.draw() if self.draw is not None else ()
        if not self._drawn:
            raise InputError(f"{what} needs calibration data: give batches of training inputs and targets")
        return self._drawn

    def forget_batches(self) -> None:
        """Have the next step draw its own."""
        self._drawn = None

    def prune(self, masks: Masks) -> None:
        """Take masks over: these parameters' weights are zero from now on, and so is what the optimiser remembers."""
        self.masks.kept.update(masks.kept)
        masks.project(self.network)
        if self.optimizer is not None:
            masks.project_optimizer(self.network, self.optimizer)
        self.changed = self.changed or masks.pruned > 0

    def rename_mask(self, path: str, new: str) -> None:
        """Have the mask of a parameter belong to another name: that under a parametrization, say."""
        if path in self.masks.kept:
            self.masks.kept[new] = self.masks.kept.pop(path)

    def note(self, sentence: str) -> None:
        """Have the report say something, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
