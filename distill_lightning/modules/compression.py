"""Every compression method in one module: a network, a list of steps, and an optional teacher."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Unpack, cast

import pytorch_lightning as pl
from torch import Tensor, nn

from distill_lightning.callbacks.compression import CompressionCallback
from distill_lightning.callbacks.stages import Measurements
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.steps import Step
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError, check_finite
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.teachers import Softened, Teachers, TeacherStore


class CompressionBaseline(DistillationModule):
    r"""Compresses a network by a list of steps, between which it is trained, if asked for under a teacher.

    .. math:: L = \lambda \, \mathrm{CE}(s, y) + (1 - \lambda) \, T^2 \,
        \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    with the network's logits ``s`` and the teacher's ``t``, ``(N, K)`` or ``(N, T, K)``; without a teacher
    :math:`\lambda = 1`. Of a regression, with ``num_targets``, the terms are those of `KDModule`'s. Logged as
    ``train/ce`` (``train/nll``) and ``train/kd``, beside what `CompressionCallback` logs, which this
    module brings along and which does the steps::

        CompressionBaseline(
            SmallCNN(10), num_classes=10, dense_epochs=20, teacher="dense",
            steps=[PruneWeights(amount=0.9, finetune_epochs=10), ShareWeights(finetune_epochs=5), Encode("huffman")],
        )

    O'Neill: *An Overview of Neural Network Compression*, https://arxiv.org/abs/2006.03669

    Args:
        network: compressed in place; ``student`` is another name for it.
        num_classes: ``K`` of a classifier.
        num_targets: ``d`` of a regression.
        steps: the steps, in order; without any, this is ordinary training, bit for bit.
        dense_epochs: number of epochs of ordinary training before the first step, if that step has no ``at``.
        teacher: ``"none"``; ``"dense"``: the network as it is when the first step begins, frozen, which should
            have been trained by then; or a network, several, a `TeacherEnsemble` or a `TeacherStore`, which teach from
            the first epoch on.
        temperature: ``T`` of a classifier; a regression has none.
        hard_label_weight: the labels' share :math:`\lambda` in ``[0, 1]`` under a teacher.
        calibration_batches: see `CompressionCallback`.
        restart: see `CompressionCallback`.
        seed: see `CompressionCallback`.
        report: see `CompressionCallback`.
        options: see `TrainingOptions`; optimiser and schedule are made anew for every phase. ``compile``
            cannot be combined with steps.

    Raises:
        InputError: an option is out of range or would do nothing, or a network does not fit.
    """

    per_position = True

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int | None = None,
        num_targets: int | None = None,
        steps: Sequence[Step] = (),
        dense_epochs: int = 0,
        teacher: Literal["none", "dense"] | nn.Module | Sequence[nn.Module] | TeacherStore = "none",
        temperature: float = 4.0,
        hard_label_weight: float = 0.5,
        calibration_batches: int = 50,
        restart: bool = True,
        seed: int | None = None,
        report: Measurements | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(network, num_classes=num_classes, num_targets=num_targets, **options)
        check_finite("temperature", temperature)
        if not 0 <= hard_label_weight <= 1:
            raise InputError(f"hard_label_weight must be in [0, 1], got {hard_label_weight}")
        if isinstance(teacher, str) and teacher not in ("none", "dense"):
            raise InputError(f"teacher must be 'none', 'dense' or networks, got {teacher!r}")
        self.temperature, self.hard_label_weight = temperature, hard_label_weight
        self.teacher = teacher if isinstance(teacher, str) else "given"
        self.teachers = self._taught_by(None if isinstance(teacher, str) else teacher)
        if teacher == "none":
            self.refuse_unused("temperature", temperature, "without a teacher")
            self.refuse_unused("hard_label_weight", hard_label_weight, "without a teacher")
        elif not self.output.has_temperature:
            self.refuse_unused("temperature", temperature, f"with {type(self.output).__name__} outputs")
        self.callback = CompressionCallback(
            steps,
            dense_epochs=dense_epochs,
            calibration_batches=calibration_batches,
            restart=restart,
            seed=seed,
            report=report,
        )

    def _taught_by(self, given: nn.Module | Sequence[nn.Module] | TeacherStore | None) -> Teachers:
        question = Softened(self.temperature)
        return Teachers(given, ask=[] if given is None else [question])

    def configure_callbacks(self) -> list[pl.Callback]:
        """What does the steps.

        Raises:
            InputError: the Trainer has another one.
        """
        trainer = cast("Any", self.trainer)
        if not self.callback.steps:
            # Lightning would put it in the place of one that has steps.
            return []
        others = [other for other in trainer.callbacks if isinstance(other, CompressionCallback)]
        if trainer.state.fn == "fit" and any(other.steps and other is not self.callback for other in others):
            raise InputError(
                "CompressionBaseline does its own steps: leave the Trainer's CompressionCallback out, or give "
                "CompressionBaseline no steps"
            )
        # From an earlier run of the same Trainer: Lightning would remark that it replaces itself.
        return [] if self.callback in trainer.callbacks else [self.callback]

    @property
    def reads_labels(self) -> bool:
        """Whether the labels have a weight."""
        return not self.teachers or self.hard_label_weight > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The labels' likelihood and, under a teacher, the divergence from its prediction."""
        output = self.respond(batch)
        # Labels that have no weight may be missing.
        label = {self.output.label_term: self.output.label_loss(output, batch)} if self.reads_labels else {}
        if not self.teachers:
            return label
        teacher = self.teachers.distribution(batch)
        return {**label, "kd": self.output.divergence(output, teacher, batch, temperature=self.temperature)}

    def weights(self) -> dict[str, float]:
        """The labels' share and, under a teacher, the rest."""
        if not self.teachers:
            return {self.output.label_term: 1.0}
        label = {self.output.label_term: self.hard_label_weight} if self.hard_label_weight else {}
        return {**label, "kd": 1 - self.hard_label_weight}

    def before_compression(self) -> None:
        """Keep the dense network as the teacher, if it is to be one; `CompressionCallback` calls this."""
        if self.teacher == "dense":
            if _is_untrained(self.student):
                warnings.warn(
                    "teacher='dense': the network has not been trained when the first step begins, and teaches "
                    "nothing: give dense_epochs, or a trained network",
                    stacklevel=2,
                )
            self.teachers = self._taught_by(copy_network(self.student))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every module; the dense teacher comes from this very run, so its weights are kept, too."""
        super().on_save_checkpoint(checkpoint)
        # By the names that the constructor knows them by.
        names = {"student": "network", "teachers": "teacher"}
        checkpoint["recipes"] = {names.get(name, name): recipe for name, recipe in checkpoint["recipes"].items()}
        if self.teacher == "dense":
            checkpoint["fingerprints"] = {}
            checkpoint["recipes"].pop("teacher", None)
            if self.teachers:
                checkpoint["dense_teacher"] = dict(self.teachers[0].state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the dense teacher, then what every module takes."""
        if "dense_teacher" in checkpoint:
            dense = self.__dict__.get("_uncompressed", {}).get("student", self.student)
            teacher = copy_network(dense)
            teacher.load_state_dict(checkpoint["dense_teacher"])
            self.teachers = self._taught_by(teacher)
        super().on_load_checkpoint(checkpoint)


def _is_untrained(network: nn.Module) -> bool:
    """Whether a network has BatchNorms, and none has ever seen a batch; of others it cannot be known."""
    seen = [value for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]
    return bool(seen) and not any(bool(value) for value in seen)
