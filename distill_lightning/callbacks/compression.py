"""Compressing a module's network while its own training runs."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as pl
from torch import nn

from distill_lightning.callbacks.compression_checks import check_steps, check_trainer
from distill_lightning.callbacks.stage_log import Row, StageLog, row_at
from distill_lightning.callbacks.stages import Measurements, check_scored, on_cpu, trained_before
from distill_lightning.callbacks.structure_hooks import LoadHook, SaveHook, write_compressed
from distill_lightning.callbacks.training_batches import first_batches
from distill_lightning.compression.access.calibration import first_samples
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.report.report import Report, circumstances
from distill_lightning.compression.report.stage import FINAL, Stage
from distill_lightning.compression.run.compressor import Compressor, Moment, has_parameters
from distill_lightning.compression.run.phases import Phase, check_order
from distill_lightning.compression.steps import Order, Step
from distill_lightning.compression.structure.changes import NOTHING, checkpoint_entry, structure_of
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import (
    forget_best,
    keep_patience,
    new_optimizer,
    planned_epochs,
    refuse_mid_epoch,
    refuse_reshaping,
    stand_last,
)


class CompressionCallback(pl.Callback):
    """Compresses a network of any module, step by step, while the module trains it as usual.

    ::

        steps = [PruneWeights(amount=0.9, finetune_epochs=10), ShareWeights(k=16, finetune_epochs=5), Encode("huffman")]
        Trainer(max_epochs=35, callbacks=[CompressionCallback(steps, dense_epochs=20)]).fit(KDModule(...), data)

    Each phase of a step begins with an epoch. Where the network has other parameters then, and by default with every
    phase, the module makes its optimiser and its schedule anew, for the length of the phase. Checkpoints hold what was
    done, so that a module made with the uncompressed network loads and resumes them. A `ModelCheckpoint` or
    `EarlyStopping` forgets with every phase what it took for the best, because that was another network; at the end
    ``compressed.ckpt`` is written beside its files, which `load_compressed` opens; where one is there already, it is
    ``compressed-v1.ckpt``. While steps wait, no `EarlyStopping` ends the training by its patience. Epochs after the
    last step are a phase of their own.

    Weights that are quantized, shared or learned masks are parametrizations, which PyTorch does not pickle whole:
    `write_artefact` writes the network, `plain_copy` makes one of plain weights.
    A module from elsewhere is resumed and tested from its checkpoints with this callback in the Trainer;
    its own ``load_from_checkpoint`` knows nothing of compression.

    Penalties are added to the gradients before each optimiser step, and logged as ``train/penalty``; the module's own
    ``train/loss`` is without them. After each epoch ``compress/parameters``, ``compress/nonzero`` and
    ``compress/sparsity`` are logged.

    Args:
        steps: the steps, in order.
        attribute: the module's network that is compressed.
        dense_epochs: number of epochs of ordinary training before the first step, if that step has no ``at``.
        calibration_batches: the number of training batches used for criteria, ranges and BatchNorm's statistics; each
            step that needs them keeps so many in memory.
        restart: whether every phase begins with a new optimiser and a new schedule, else only those that must, whose
            schedule goes on.
        seed: the seed of all random draws; ``None``: the run's (``seed_everything``).
        report: what is measured of every stage, for `report` and ``stages``; ``None``: nothing, which takes no time.

    Attributes:
        stages: the network before, between and after the steps, each a `Stage`.
        calibration: inputs that int8 versions of the network can be calibrated with, where the report has one.

    Raises:
        InputError: an option out of range or an order that makes no sense; when the fit starts: no ``max_epochs``, a
            network or a Trainer that cannot be used, or a network that is compressed already; when the first epoch
            begins: a step that cannot change the network, see `Work.rehearse`.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        attribute: str = "student",
        dense_epochs: int = 0,
        calibration_batches: int = 50,
        restart: bool = True,
        seed: int | None = None,
        report: Measurements | None = None,
    ) -> None:
        if calibration_batches < 1:
            raise InputError(f"calibration_batches must be at least 1, got {calibration_batches}")
        if dense_epochs < 0:
            raise InputError(f"dense_epochs must not be negative, got {dense_epochs}")
        check_order(steps)
        self.steps = list(steps)
        self.attribute, self.dense_epochs, self.restart = attribute, dense_epochs, restart
        self.calibration_batches, self.seed = calibration_batches, seed
        self.measurements = report
        self._log = StageLog(attribute)
        self.calibration: list[Any] = []
        self.compressor: Compressor | None = None
        self._seen = 0
        # The last epoch that has begun, and how many weights were pruned when the network was validated.
        self._epoch, self._pruned = -1, 0
        # Whether the training has come to its end, with the last steps, and whether it began with a compressed network.
        self._is_over = self._is_begun = False
        # The Trainer and the module of the fit that is under way.
        self._fit: tuple[pl.Trainer, Any] | None = None

    @property
    def stages(self) -> list[Stage]:
        """What was measured, in its order."""
        return self._log.stages

    # Before the training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the plan.

        Raises:
            InputError: it cannot be followed.
        """
        if not self.steps:
            return
        pl_module.__dict__["on_load_checkpoint"] = LoadHook(pl_module)
        pl_module.__dict__["on_save_checkpoint"] = SaveHook(pl_module)
        if stage != "fit":
            return
        network = getattr(pl_module, self.attribute, None)
        if not isinstance(network, nn.Module):
            raise InputError(
                f"{type(pl_module).__name__} has no network {self.attribute!r} to compress: give attribute="
            )
        callbacks = cast("Any", trainer).callbacks
        others = [other for other in callbacks if isinstance(other, CompressionCallback) and other is not self]
        check_trainer(trainer, pl_module, self.attribute, [other.attribute for other in others if other.steps])
        # A checkpoint that is loaded later says how far the compression is.
        self._is_begun = structure_of(network) != NOTHING or self._has_begun(network)
        self._fit, self._epoch, self._pruned, self._is_over = (trainer, pl_module), -1, 0, False
        if self.measurements is not None:
            check_scored(trainer, pl_module, self.measurements.split)
            self._log.earlier = trained_before(network)
        self.compressor = Compressor(
            network,
            self.steps,
            None,
            batches=self._draw,
            epochs=cast("int", trainer.max_epochs),
            dense_epochs=self.dense_epochs,
            bn_batches=self.calibration_batches,
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed,
            watch=self._watch,
        )
        check_steps(trainer, pl_module, self.compressor)
        end = self.compressor.phases[-1].end
        if cast("int", trainer.max_epochs) > end:
            warnings.warn(
                f"the last step of the compression is over after {end} epochs, and the training goes on to "
                f"max_epochs={trainer.max_epochs} (1000 if it is not given), with an optimiser and a schedule of its "
                "own: the final row is that of the network then",
                stacklevel=2,
            )
        # Checkpoints of other phases are loaded into what it was at first.
        kept = pl_module.__dict__.setdefault("_uncompressed", {})
        if structure_of(network) == NOTHING:
            kept.setdefault(self.attribute, self.compressor.dense)
        self.compressor.dense = kept.get(self.attribute, self.compressor.dense)
        stand_last(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """By now a checkpoint is loaded, if there is one.

        Raises:
            InputError: there is none, and the network is compressed already; or it is from inside an epoch, and this
                version of Lightning cannot go on there.
        """
        refuse_mid_epoch(trainer)
        if self.compressor is None or trainer.ckpt_path is not None:
            return
        if self._is_begun:
            raise InputError(
                f"{type(pl_module).__name__}.{self.attribute} is compressed already: make the module anew, or go on "
                "from a checkpoint with fit(ckpt_path=...)"
            )
        self._log.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See what the network is given."""
        if self.compressor is not None:
            self.compressor.piece.example_inputs = first_samples(self._draw(1)[0][0], 2)
            self._seen = trainer.global_step

    # In the training

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End and begin phases."""
        self._begin_epoch(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """End and begin phases of an epoch that Lightning begins silently, after a checkpoint of the last batch."""
        if trainer.current_epoch != self._epoch:
            self._begin_epoch(trainer, pl_module)

    def _begin_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        compressor = self.compressor
        if compressor is None:
            return
        self._epoch = epoch = trainer.current_epoch
        # Weights that were averaged may have been put into the network.
        compressor.project()
        due = compressor.is_due(epoch)
        optimizer = trainer.optimizers[0]
        before = list(compressor.network.parameters())
        changed = compressor.begin_epoch(epoch, steps_per_epoch=self._steps_per_epoch(), optimizer=optimizer)
        if not has_parameters(compressor.network, before):
            self._check_change(trainer, pl_module)
        if changed or (due and self.restart):
            new_optimizer(trainer, optimizer, restart=self.restart)
        if due:
            forget_best(trainer)
            self._pruned = compressor.pruned

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Add the penalty's gradient, and keep pruned weights out of it."""
        if self.compressor is None:
            return
        penalty = self.compressor.before_optimizer_step()
        if penalty is not None:
            pl_module.log("train/penalty", penalty, on_step=False, on_epoch=True, batch_size=1)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Go on after an optimiser step."""
        if self.compressor is not None and trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.compressor.after_optimizer_step(trainer.optimizers[0])

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is validated may be an average of weights, in which pruned ones are not quite zero."""
        if self.compressor is not None and trainer.state.fn == "fit":
            self.compressor.project()
            self._forget_if_pruned(trainer, self.compressor)
            if _untrained(self.compressor):
                keep_patience(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how large the network is."""
        compressor = self.compressor
        if compressor is None:
            return
        parameters = count_parameters(compressor.network)
        logs = {
            "compress/parameters": float(parameters.stored),
            "compress/nonzero": float(parameters.nonzero),
            "compress/sparsity": compressor.sparsity,
        }
        pl_module.log_dict(logs, on_step=False, on_epoch=True, sync_dist=True)
        self._log.note_sparsity(compressor, self._epoch)
        self._forget_if_pruned(trainer, compressor)
        if _untrained(compressor):
            keep_patience(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what is left, and write the compressed network."""
        compressor = self.compressor
        if compressor is None:
            return
        self._is_over = True
        waiting = [phase.step for phase in compressor.waiting]
        self._note_epochs(trainer.current_epoch, compressor)
        compressor.finish()
        self._forget_if_pruned(trainer, compressor)
        if any(step.order is not Order.STORAGE for step in waiting):
            forget_best(trainer)
        if self.measurements is not None:
            if self.measurements.onnx == "static":
                self.calibration = [on_cpu(inputs) for inputs, _ in self._draw()]
            self._log.add(trainer, pl_module, compressor, self.measurements, row=Row(FINAL, "after"), final=True)
        write_compressed(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The fit is over; one that was resumed after its last epoch has not trained, and still has to be ended."""
        if self.compressor is not None and not self._is_over and trainer.limit_train_batches:
            # Lightning has moved it away already.
            pl_module.to(trainer.strategy.root_device)
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
            pl_module.cpu()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was found."""
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        self._fit = None
        pl_module.__dict__.pop("on_load_checkpoint", None)
        pl_module.__dict__.pop("on_save_checkpoint", None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the Trainer: a module can be copied while it is trained."""
        return {**self.__dict__, "_fit": None}

    # In checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what was done to the network; what another callback saves in its place is pruned, too."""
        checkpoint["compression"] = checkpoint_entry(getattr(pl_module, self.attribute), self.attribute)
        if self.compressor is not None:
            state = checkpoint["state_dict"]
            for path, kept in self.compressor.masks.kept.items():
                name = f"{self.attribute}.{path}"
                state[name] = state[name].masked_fill(~kept.to(state[name].device), 0)

    @property
    def state_key(self) -> str:
        """In checkpoints: its own for each network."""
        return self._generate_state_key(attribute=self.attribute)

    def state_dict(self) -> dict[str, Any]:
        """Where the compression is."""
        if self.compressor is None:
            return {}
        self._log.note_sparsity(self.compressor, self._epoch)
        return {
            "compressor": self.compressor.state_dict(),
            **self._log.state_dict(),
            "epoch": self._epoch,
            "pruned": self._pruned,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        if self.compressor is not None and "compressor" in state_dict:
            self.compressor.load_state_dict(state_dict["compressor"])
            self._log.load_state_dict(state_dict)
            self._epoch, self._pruned = state_dict["epoch"], state_dict["pruned"]

    def report(self, *, metric: str = "accuracy", higher_is_better: bool = True) -> Report:
        """The stages of the fit as a table, with its files.

        Args:
            metric: the score that it is about.
            higher_is_better: whether more of it is better.

        Raises:
            InputError: nothing was measured.
        """
        if not self.stages:
            raise InputError("nothing was measured: give CompressionCallback report=Measurements(), and fit")
        return Report({0: self.stages}, metric=metric, higher_is_better=higher_is_better, about=circumstances())

    # What the compressor asks

    def _draw(self, number: int | None = None) -> Sequence[tuple[Any, Any]]:
        trainer, pl_module = cast("tuple[pl.Trainer, Any]", self._fit)
        network = getattr(pl_module, self.attribute)
        return first_batches(trainer, pl_module, network, number or self.calibration_batches)

    def _watch(self, moment: Moment, phase: Phase | None) -> None:
        trainer, pl_module = cast("tuple[pl.Trainer, Any]", self._fit)
        before = getattr(pl_module, "before_compression", None)
        if moment == "dense" and before is not None:
            before()
        compressor = cast("Compressor", self.compressor)
        row = row_at(moment, phase, last=compressor.phases[-1])
        if self.measurements is not None and row is not None:
            self._log.add(trainer, pl_module, compressor, self.measurements, row=row)

    def _note_epochs(self, epochs: int, compressor: Compressor) -> None:
        """Say in the final row, and if it is a loss as a warning, that the training was not as long as the steps."""
        untrained = _untrained(compressor)
        end = compressor.phases[-1].end
        if untrained:
            note = f"the training ended after {epochs} epochs: not fine-tuned were {', '.join(untrained)}"
            warnings.warn(note, stacklevel=2)
            compressor.piece.notes.append(note)
        elif epochs > end:
            compressor.piece.notes.append(f"trained for {epochs - end} epochs after the last step")

    def _has_begun(self, network: nn.Module) -> bool:
        """Whether an earlier fit has begun with the steps; masks alone leave no trace in the network."""
        before = self.compressor
        if before is None or before.network is not network:
            return False
        return self._is_begun or len(before.waiting) < len(before.phases)

    def _forget_if_pruned(self, trainer: pl.Trainer, compressor: Compressor) -> None:
        """Schedules prune more and more in their phase: what was good with fewer zeros is not what is asked for."""
        pruned = compressor.pruned
        if pruned > self._pruned:
            forget_best(trainer)
        self._pruned = pruned

    def _steps_per_epoch(self) -> int:
        trainer, _ = cast("tuple[pl.Trainer, Any]", self._fit)
        return math.ceil(trainer.estimated_stepping_batches / max(trainer.max_epochs or 1, 1))

    def phase_length(self) -> int | None:
        """Optimiser steps from the epoch that now begins to the end of its phase; ``None``: there are no phases.

        For the module's schedule. What follows the last phase is one more.
        """
        if self._fit is None or self.compressor is None:
            return None
        trainer, _ = self._fit
        epochs = cast("int", planned_epochs(trainer))
        if not self.restart:
            return self._steps_per_epoch() * epochs
        bounds = [bound for phase in self.compressor.phases for bound in (phase.begin, phase.end)]
        ahead = [bound for bound in bounds if trainer.current_epoch < bound < epochs]
        return (min(ahead, default=epochs) - trainer.current_epoch) * self._steps_per_epoch()

    def _check_change(self, trainer: pl.Trainer, pl_module: Any) -> None:
        phase = cast("Compressor", self.compressor).phase
        refuse_reshaping(trainer, "this step" if phase is None else phase.name)
        after = getattr(pl_module, "after_compression", None)
        if after is not None:
            after()


def _untrained(compressor: Compressor) -> list[str]:
    """The phases that have not begun and need training."""
    return [phase.name for phase in compressor.waiting if phase.end > phase.begin]
