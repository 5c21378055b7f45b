"""Self-KD for classification (PS-KD): the labels, refined by what the network itself said before."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.data.mixing import cutout, mixup
from distill_lightning.data.samplers import CutMixSampler, Mixed, MixupSampler
from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.hparams import refuse_unused
from distill_lightning.modules.optimization import LRSchedulerCallable, OptimizerCallable, default_optimizer
from distill_lightning.modules.parts.past_network import AveragedNetwork, PastNetwork
from distill_lightning.modules.parts.progress import (
    AlphaSchedule,
    early_ends,
    is_mixed,
    training_length,
    training_progress,
)
from distill_lightning.modules.self_kd.options import (
    DTYPES,
    check_choices,
    check_counts,
    check_device,
    check_files,
    check_shares,
)
from distill_lightning.modules.self_kd.storing import new_store
from distill_lightning.storage import PredictionStore

# Keeps the draws of cutout and mixing apart from those that crop and flip the images of the same views.
_STREAM = 0x53454C46


class SelfKDModule(DistillationModule):
    r"""Self-Knowledge Distillation with progressive refinement of targets (Self-KD, PS-KD).

    .. math:: L = -\frac{1}{N} \sum_{i=1}^{N} \sum_{k=1}^{K} q_{ik} \log \mathrm{softmax}(z_i)_k, \qquad
        q_i = (1 - \alpha_t) \, y_i + \alpha_t \, s_i, \qquad \alpha_t = \alpha_T \, t / T

    in epoch ``t`` of ``T``, with logits ``z`` ``(N, K)``, labels ``y`` and the network's own past prediction ``s``. It
    is the only term, logged as ``train/self_kd``; the labels are in ``q``. A sample without a past has its label as the
    target, so the first epoch is plain cross entropy.

    The paper says that ``s`` is what the student of the epoch before predicts; its code keeps what was predicted while
    that epoch was training. Here:

    - ``past="stored"``, the code's way, with no forward of its own: what the forward that the sample was last trained
      with in an earlier epoch gave (in train mode, for that epoch's augmented view), kept by the sample's index in a
      `PredictionStore`. Batches need an index: `IndexedDataModule` gives one to any data.
    - ``past="past_model"``, the equation: a copy of the student, made at the end of every ``refresh_epochs``-th epoch,
      in eval mode, predicts for the very input that the student sees. One more forward per step.
    - ``past="ema"``, an extension: the moving average of the student's parameters and buffers, in the same place. It
      takes part from the second epoch on.

    A mixed input (`MixupSampler`, `CutMixSampler`) has a mixed label. ``past_model`` and ``ema`` predict for the mixed
    input; with ``stored`` the rows of the two samples are mixed like their labels, and a mixed batch is not stored.

    Logged besides: ``train/alpha``; ``train/target_gt_prob`` and ``train/target_entropy``, the mean ``q`` at the label
    (of a mixed input, at its first) and the mean entropy of ``q``; ``train/known_fraction``, the part of the samples
    that have a past, and ``train/agree_past``, the part of these whose most probable class is still the past one (0
    where none has).

    Kim, Ji, Yoon, Hwang: *Self-Knowledge Distillation with Progressive Refinement of Targets*,
    https://arxiv.org/abs/2006.12000

    ::

        model:
          class_path: SelfKDModule
          init_args:
            student: {class_path: SmallResNet, init_args: {num_classes: 10, width: 8}}
            alpha_T: 0.8

    Args:
        student: the network that learns.
        num_classes: ``K``.
        alpha_T: the past's share at the end of the training, in ``[0, 1]``; 0 is plain training, bit for bit.
        alpha_schedule: ``"linear"``, ``"constant"``, or a function of the progress in ``(0, 1]`` that gives the factor
            of ``alpha_T``.
        alpha_unit: whether ``alpha`` changes with every ``"epoch"`` or every optimiser ``"step"``; in the last one it
            is exactly ``alpha_T``.
        total_epochs: ``T``; ``None``: the Trainer's ``max_epochs``.
        past: where ``s`` comes from: ``"stored"``, ``"past_model"`` or ``"ema"``.
        past_temperature: that ``s`` is softened with, :math:`\mathrm{softmax}(\log s / \tau)`; 1 in the paper.
        label_smoothing: :math:`\epsilon` in ``[0, 1)``: ``y`` becomes :math:`(1 - \epsilon) y + \epsilon / K`.
        cutout: pixels of the side of the square that is removed from every training image; 0 removes none.
        mixing: makes the inputs of mixed batches.
        mixing_probability: share of the batches that are mixed, drawn from ``seed``, the epoch and the batch's number.
        refresh_epochs: epochs from one copy to the next with ``past_model``.
        ema_decay: what remains of the average in every optimiser step with ``ema``.
        store_dtype: of the stored probabilities: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        store_top_k: how many of a sample's largest probabilities are stored; ``None``: all.
        store_device: where the store is kept, see `PredictionStore` for its size; ``None``: on the training's device,
            where no step waits for it. ``"cpu"`` saves that memory and costs a copy per step.
        store_in_checkpoint: bytes of the stored rows up to which they stand in checkpoints. More are written to a file
            at the end of every epoch (and of what is not readable yet, with a checkpoint in its middle), which
            checkpoints refer to. With ``store_device="cpu"`` or a training on the CPU it is mapped: the processes of a
            node share it, and each holds one buffer. On a GPU both buffers stay there, and the files serve checkpoints
            alone. See `Sidecar` for which files are kept.
        store_dir: folder of these files, which wins over the one that a checkpoint names: both may be moved. ``None``:
            ``self_kd_store`` in the Trainer's ``default_root_dir``. Two trainings that are resumed at once from one
            checkpoint need two.
        store_keep: epochs whose files are kept, at least 2; a checkpoint that is older than these, and not the last
            one, cannot be resumed.
        num_samples: size of the training set whose indices the batches carry; ``None``: length of the training
            loader's data set.
        seed: of cutout and mixing; what a sample gets depends on it, the sample's index and its view (else the epoch)
            alone. Partners are found within a process's batch, unless the data module gives them (`Batch.partner`).
        input_shape: shape of one input, ``(C, H, W)``, to check the network with.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes the schedule from the optimiser.
        metrics: of the student's output and the target.
        compile: see `DistillationModule`.
        channels_last: see `DistillationModule`.

    Raises:
        InputError: an option is unknown, out of range or does not go with the others, ``mixing`` in every batch
            would leave nothing to store, or, in training, ``T`` is not known, or with ``stored`` the batches have no
            index, the training set no length or the checkpoint another, or a file of the store cannot be written, is
            gone, damaged or another one.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int,
        alpha_T: float = 0.8,  # noqa: N803  # the paper's name
        alpha_schedule: AlphaSchedule = "linear",
        alpha_unit: Literal["epoch", "step"] = "epoch",
        total_epochs: int | None = None,
        past: Literal["stored", "past_model", "ema"] = "stored",
        past_temperature: float = 1.0,
        label_smoothing: float = 0.0,
        cutout: int = 0,
        mixing: MixupSampler | CutMixSampler | None = None,
        mixing_probability: float = 0.5,
        refresh_epochs: int = 1,
        ema_decay: float = 0.999,
        store_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        store_top_k: int | None = None,
        store_device: str | None = None,
        store_in_checkpoint: int = 2**26,
        store_dir: str | None = None,
        store_keep: int = 2,
        num_samples: int | None = None,
        seed: int = 0,
        input_shape: Sequence[int] | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        metrics: MetricCollection | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            student,
            num_classes=num_classes,
            input_shape=input_shape,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            metrics=metrics,
            compile=compile,
            channels_last=channels_last,
        )
        check_choices(past, alpha_schedule, alpha_unit, store_dtype)
        check_device(store_device)
        check_shares(alpha_T=alpha_T, mixing_probability=mixing_probability)
        check_shares(below_one=True, label_smoothing=label_smoothing, ema_decay=ema_decay)
        check_counts(
            total_epochs=total_epochs, refresh_epochs=refresh_epochs, store_top_k=store_top_k, num_samples=num_samples
        )
        if store_top_k is not None and store_top_k > num_classes:
            raise InputError(f"store_top_k cannot be larger than num_classes={num_classes}, got {store_top_k}")
        check_files(store_in_checkpoint, store_keep)
        if cutout < 0 or not past_temperature > 0:
            raise InputError(
                f"cutout cannot be negative and past_temperature must be positive, got {cutout} and {past_temperature}"
            )
        if past == "stored" and mixing is not None and mixing_probability == 1:
            raise InputError(
                "past='stored' keeps no prediction of a mixed batch, and mixing_probability=1 mixes every one: lower "
                "it, or use past='past_model'"
            )
        unused = partial(refuse_unused, SelfKDModule)
        if past != "stored":
            kept = {"store_top_k": store_top_k, "store_device": store_device, "num_samples": num_samples}
            files = {"store_in_checkpoint": store_in_checkpoint, "store_dir": store_dir, "store_keep": store_keep}
            unused(f"with past={past!r}", store_dtype=store_dtype, **kept, **files)
        if past != "past_model":
            unused(f"with past={past!r}", refresh_epochs=refresh_epochs)
        if past != "ema":
            unused(f"with past={past!r}", ema_decay=ema_decay)
        self.alpha_T, self.alpha_schedule, self.alpha_unit = alpha_T, alpha_schedule, alpha_unit
        self.total_epochs = total_epochs
        self.past, self.past_temperature, self.label_smoothing = past, past_temperature, label_smoothing
        self.cutout, self.mixing, self.mixing_probability = cutout, mixing, mixing_probability
        self.store_dtype, self.store_top_k, self.store_device = store_dtype, store_top_k, store_device
        self.store_in_checkpoint, self.store_dir, self.store_keep = store_in_checkpoint, store_dir, store_keep
        self.num_samples = num_samples
        self.seed = seed
        # Neither is a part of the module: DDP would overwrite the one, the optimiser and the weights hold the other.
        self.store: PredictionStore | None = None
        self.past_network: PastNetwork | None = None
        if past != "stored":
            self.past_network = AveragedNetwork(ema_decay) if past == "ema" else PastNetwork(refresh_epochs)
        # Epochs whose end the past has seen, and of the whole training; what a checkpoint tells, until it begins.
        self._epochs = self._total = 0
        self._loaded: dict[str, Any] | None = None

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The cross entropy to the refined labels."""
        alpha = self.alpha()
        inputs, mixed = self._inputs(batch)
        logits = self.student(inputs)
        hard = functional.hard_targets(batch.target, logits.shape[-1], label_smoothing=self.label_smoothing)
        past, known = self._past(batch, inputs, hard, mixed)
        if mixed is not None:
            hard = _blend(hard, self._partners_hard(batch, hard), mixed)
        # Without a past exactly the label: (1 - alpha) + alpha need not round to 1.
        target = torch.where(known[:, None], functional.progressive_targets(hard, past, alpha), hard)
        if self.store is not None and mixed is None:
            self.store.write(_index(batch), wide(logits.detach()).softmax(dim=-1))
        self._observe_targets(alpha, target, batch.target, logits.argmax(dim=1) == past.argmax(dim=1), known)
        return {"self_kd": functional.soft_cross_entropy(logits, target)}

    def weights(self) -> dict[str, float]:
        """The one term is the loss."""
        return {"self_kd": 1.0}

    def alpha(self) -> float:
        r"""The past's share :math:`\alpha_t` in the current epoch or step.

        Raises:
            InputError: the length of the training is not known, or ``alpha_schedule`` gives what is no share.
        """
        if self.alpha_schedule == "constant":
            return self.alpha_T
        length = training_length(self.trainer, self.total_epochs)
        progress = training_progress(self.trainer, length, self.alpha_unit)
        if not callable(self.alpha_schedule):
            return self.alpha_T * progress
        alpha = self.alpha_T * self.alpha_schedule(progress)
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha_schedule({progress}) times alpha_T is {alpha}: let it stay in [0, 1]")
        return alpha

    def _past(self, batch: Batch, inputs: Any, hard: Tensor, mixed: Mixed | None) -> tuple[Tensor, Tensor]:
        """Past predictions ``(N, K)``, and of which samples there are any, bool ``(N,)``."""
        if self.past_network is not None:
            known = torch.full((len(hard),), self.past_network.ready, device=hard.device)
            past = self.past_network.predict(inputs) if self.past_network.ready else hard
            return functional.soften(past, temperature=self.past_temperature), known
        if self.store is None:
            raise RuntimeError("SelfKDModule makes its store when a Trainer begins to train it")
        past, known = self.store.read(_index(batch))
        past = functional.soften(past, temperature=self.past_temperature)
        if mixed is not None:
            own, own_known = torch.where(known[:, None], past, hard), known
            other, other_known = own, own_known
            if batch.partner is not None:
                other, other_known = self.store.read(_index(batch.partner))
                other = functional.soften(other, temperature=self.past_temperature)
                other = torch.where(other_known[:, None], other, self._partners_hard(batch, hard))
            past = _blend(own, other, mixed)
            known = own_known[mixed.first] | other_known[mixed.second]
        return past, known

    def _partners_hard(self, batch: Batch, hard: Tensor) -> Tensor:
        """The label targets of what is mixed in: of the batch itself, or of its partners."""
        if batch.partner is None:
            return hard
        return functional.hard_targets(batch.partner.target, hard.shape[-1], label_smoothing=self.label_smoothing)

    def _inputs(self, batch: Batch) -> tuple[Any, Mixed | None]:
        """What the student sees, and how it was mixed."""
        epoch, number = self.trainer.current_epoch, self.trainer.fit_loop.batch_idx
        mixing = self.mixing if is_mixed(self.seed, epoch, number, probability=self.mixing_probability) else None
        if mixing is None and not self.cutout:
            return batch.input, None
        draws = self._draws(batch, epoch, number)
        inputs: Any = batch.input
        if self.cutout:
            inputs = cutout(inputs, self.cutout, draws.uniform(2))
        if mixing is None:
            return inputs, None
        if batch.partner is None:
            mixed = mixing.mix(inputs, draws)
        else:
            others: Any = batch.partner.input
            if self.cutout:
                others = cutout(others, self.cutout, self._draws(batch.partner, epoch, number).uniform(2))
            mixed = mixing.mix(inputs, draws, pool=others, paired=True)
        return mixed.inputs, mixed

    def _draws(self, batch: Batch, epoch: int, number: int) -> Draws:
        index = batch.index
        if index is None:
            place = number * self.trainer.world_size + self.trainer.global_rank
            index = torch.arange(batch.size, device=self.device) + place * 2**32
        view = torch.full_like(index, epoch) if batch.view is None else batch.view
        return Draws(self.seed + _STREAM, index.long(), view.long())

    def _observe_targets(self, alpha: float, target: Tensor, label: Tensor, agree: Tensor, known: Tensor) -> None:
        self.observe("alpha", torch.full((), alpha, device=target.device))
        self.observe("target_gt_prob", target.gather(1, label.long()[:, None]).mean())
        self.observe("target_entropy", torch.special.entr(target).sum(dim=1).mean())
        self.observe("agree_past", (agree & known).sum() / known.sum().clamp_min(1))
        self.observe("known_fraction", known.float().mean())

    # When the past becomes the past, and what a checkpoint holds of it

    def on_fit_start(self) -> None:
        """Refuse a training of unknown length before anything is done."""
        super().on_fit_start()
        self._length()

    def on_train_start(self) -> None:
        """Make the store, take what a checkpoint holds, and warn of what will keep alpha from its end."""
        loaded, self._loaded = self._loaded, None
        if self.trainer.fit_loop.total_batch_idx < 0:
            # A training that begins has no past, whatever this module was trained or loaded with before.
            loaded, self.store, self._epochs = None, None, 0
            if self.past_network is not None:
                self.past_network.forget()
        if self.past == "stored":
            self.store = (self.store or self._new_store()).to(self.store_device or self.device)
        if self.past_network is not None:
            self.past_network.to(self.device)
        length = self._length()
        self._total = length or 0
        if loaded is not None:
            self._restore(loaded)
        # A checkpoint may be older than the end of its epoch, and resumed behind it.
        self._finish(self.trainer.current_epoch)
        ends = [] if length is None else early_ends(self.trainer, length)
        if ends:
            warnings.warn(
                f"alpha reaches alpha_T={self.alpha_T} in epoch {length}, but training may end earlier because of "
                f"{' and '.join(ends)}: set total_epochs to the epochs that will be trained",
                stacklevel=2,
            )

    def on_train_epoch_end(self) -> None:
        """What this epoch said is the past of the next."""
        super().on_train_epoch_end()
        self._finish(self.trainer.current_epoch + 1)

    def on_fit_end(self) -> None:
        """As Lightning does with the module, what is kept beside it leaves the device."""
        super().on_fit_end()
        if self.store is not None:
            self.store.to("cpu")
        if self.past_network is not None:
            self.past_network.to("cpu")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and average; here and not after the batch, because a checkpoint of the batch is written before that."""
        super().optimizer_step(*args, **kwargs)
        if self.past_network is not None:
            self.past_network.after_step(self.student)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the past; a checkpoint of weights alone, which no training can go on from, gets none."""
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" not in checkpoint:
            return
        if self._loaded is not None:
            checkpoint["self_kd"] = self._loaded
        elif self.past_network is not None:
            self.past_network.share_buffers()
            checkpoint["self_kd"] = self._state(self.past_network.state_dict())
        elif self.store is not None:
            checkpoint["self_kd"] = self._state(self.store.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the past until training begins, when the size of the training set is known."""
        super().on_load_checkpoint(checkpoint)
        self._loaded = checkpoint.get("self_kd")

    def _state(self, past: dict[str, Any]) -> dict[str, Any]:
        return {"kind": self.past, "epochs": self._epochs, "length": self._total, "past": past}

    def _restore(self, state: dict[str, Any]) -> None:
        if state["kind"] != self.past:
            raise InputError(f"the checkpoint was trained with past={state['kind']!r}, not {self.past!r}: set it so")
        if state["length"] and self._total and state["length"] != self._total:
            warnings.warn(
                f"the checkpoint was trained towards {state['length']} epochs, now they are {self._total}: alpha does "
                "not go on where it was; set total_epochs to keep it",
                stacklevel=2,
            )
        if self.store is not None:
            self.store.load_state_dict(state["past"], folder=self.store_dir)
        if self.past_network is not None:
            self.past_network.load_state_dict(state["past"], self.student)
        self._epochs = state["epochs"]

    def _finish(self, epochs: int) -> None:
        """So many epochs are done; told again, nothing happens."""
        if epochs <= self._epochs:
            return
        if self.store is not None:
            self.store.advance()
        if self.past_network is not None:
            self.past_network.after_epochs(self._epochs, epochs, self.student)
        self._epochs = epochs

    def _length(self) -> int | None:
        """``T``; a constant alpha needs none."""
        return None if self.alpha_schedule == "constant" else training_length(self.trainer, self.total_epochs)

    def _new_store(self) -> PredictionStore:
        return new_store(
            self.trainer,
            num_samples=self.num_samples,
            num_classes=cast("int", self.num_classes),
            dtype=DTYPES[self.store_dtype],
            top_k=self.store_top_k,
            in_checkpoint=self.store_in_checkpoint,
            folder=self.store_dir,
            keep=self.store_keep,
        )


def _blend(rows: Tensor, others: Tensor, mixed: Mixed) -> Tensor:
    """Rows ``(N, K)`` and those of what is mixed in, mixed as the inputs were."""
    return mixup(rows[mixed.first], others[mixed.second], mixed.share)


def _index(batch: Batch) -> Tensor:
    if batch.index is None:
        raise InputError(
            "past='stored' needs to know which sample is which, and the batches have no index: wrap the data in "
            "IndexedDataModule(datamodule), or use past='past_model'"
        )
    return batch.index.long()
