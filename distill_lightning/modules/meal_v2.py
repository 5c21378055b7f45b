"""MEAL V2: the mean prediction of an ensemble as the only target, and a discriminator beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.layers import Discriminator, DiscriminatorKind, dry_forward
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.hparams import refuse_unused
from distill_lightning.modules.optimization import (
    LRSchedulerCallable,
    OptimizerCallable,
    default_optimizer,
    total_steps,
)
from distill_lightning.schedules import GroupSchedules, OneCycle
from distill_lightning.teachers import TeacherStore
from distill_lightning.teachers.origin import ensemble_if_any, rule_of

DiscriminatorInput = Literal["logits", "probabilities", "log_probabilities"]
DiscriminatorMode = Literal["cooperative", "adversarial", "detached"]

# Turns the run's seed into another one: the student was drawn from the seed itself.
_OTHER_SEED = 0x5EED
# Parts of ln K. A loss as near as that to ln K is what random weights give; but to teachers that are themselves as
# unsure as that, a good student has such a loss, too.
_UNTRAINED = 0.1
_UNSURE = 0.5


class MEALV2Module(DistillationModule):
    r"""MEAL V2: a pretrained student follows an ensemble's mean prediction, without labels.

    .. math:: L = -\frac{T^2}{N} \sum_{i,c} \bar p_{ic} \log \mathrm{softmax}(s_i / T)_c
        + \gamma \, L_D + \lambda \, \mathrm{CE}(s, y),
        \qquad \bar p = \frac{1}{M} \sum_m \mathrm{softmax}(z_m / T)

    with student logits ``s`` and teachers' logits ``z_m``, both ``(N, K)``; summed over the classes, averaged over the
    batch, in nats. :math:`L_D` is `functional.discriminator_loss` of a small network that is shown the student's logits
    and the mean :math:`\frac{1}{M} \sum_m z_m` of the teachers' raw logits, and tells which is which.

    The paper calls this adversarial; the released code, and so the default, is not: student and discriminator
    **together** lower :math:`L_D` (``"cooperative"``), which pushes the student's logits a little away from the
    teachers', "as a regularizer". ``"adversarial"`` turns the gradient round between them, with the same optimiser.

    The released training: SGD with learning rate 0.01 (0.001 after 101 epochs), momentum 0.9 and **no weight decay**,
    no labels, and a student that begins with pretrained weights (`Pretrained`), on which the result rests. From
    scratch, labels help: set ``hard_label_weight``.

    Logged: ``train/similarity``, ``train/discriminator`` and ``train/ce``, unweighted, as far as they are part of the
    loss; ``train/kl`` (the similarity without the teachers' own entropy: what the student can still gain),
    ``train/teacher_entropy`` (of :math:`\bar p`, nats), ``train/agreement`` (samples on which student and ensemble name
    the same class), ``train/discriminator_accuracy`` (of rows; 0.5 is chance) and, but for ``"fixed"``,
    ``train/discriminator_dead`` (outputs that are exactly zero). After an epoch it warns of a discriminator with an
    output that was zero for every row, and after the first epoch of a student that looked untrained.

    Gradient clipping by norm counts the discriminator's gradient, too.

    Shen, Savvides: *MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks*,
    https://arxiv.org/abs/2009.08453

    ::

        model:
          class_path: MEALV2Module
          init_args:
            student:
              class_path: distill_lightning.Pretrained
              init_args: {network: {class_path: SmallResNet, init_args: {width: 8}}, checkpoint: student.ckpt}
            teachers:
              - class_path: distill_lightning.Pretrained
                init_args: {network: {class_path: SmallResNet, init_args: {width: 16}}, checkpoint: teacher.ckpt}
            discriminator: fixed
            discriminator_lr: 1.0e-4

    Args:
        student: the network that learns.
        teachers: a network, several, or a `TeacherEnsemble`, whose ``weights`` weigh probabilities and logits alike.
        num_classes: ``K``.
        discriminator: ``"official"`` or ``"fixed"`` (see `Discriminator`; ``"fixed"`` below 256 classes), a network
            from ``(N, K)`` to scores ``(N, 2)``, which `load_from_checkpoint` must be given again, or ``None`` (or
            ``"none"``).
        discriminator_input: what it is shown: ``"logits"``, or ``"probabilities"`` or ``"log_probabilities"`` at
            temperature ``T`` (the student's and :math:`\bar p`).
        discriminator_mode: ``"cooperative"``, ``"adversarial"``, or ``"detached"``: it watches, and the student does
            not feel it.
        discriminator_weight: :math:`\gamma`; with 0 there is no discriminator.
        discriminator_lr: its own learning rate, which ``lr_scheduler`` leaves alone; ``None``: it has the student's
            rate, and, without a schedule of its own, the student's schedule.
        discriminator_lr_scheduler: makes a schedule for the discriminator's rate alone; ``None`` with a
            ``discriminator_lr``: constant. `OneCycle` here needs `OneCycle` (or nothing) as ``lr_scheduler``.
        hard_label_weight: :math:`\lambda`; 0 never looks at the labels.
        temperature: ``T``, 1 in the paper.
        store: keeps what the teachers say, see `TeacherStore`; with a complete one ``teachers`` may be ``None``.
        input_shape: shape of one input, ``(C, H, W)``, to check the networks with.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes the schedule from the optimiser.
        metrics: of the student's output and the target.
        compile: see `DistillationModule`.
        channels_last: see `DistillationModule`.

    Raises:
        InputError: an option is out of range or needs a discriminator, a network does not fit, or schedules cannot be
            stepped together.
    """

    frozen = ("teachers",)

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module] | None = None,
        *,
        num_classes: int,
        discriminator: DiscriminatorKind | Literal["none"] | nn.Module | None = "official",
        discriminator_input: DiscriminatorInput = "logits",
        discriminator_mode: DiscriminatorMode = "cooperative",
        discriminator_weight: float = 1.0,
        discriminator_lr: float | None = None,
        discriminator_lr_scheduler: LRSchedulerCallable | None = None,
        hard_label_weight: float = 0.0,
        temperature: float = 1.0,
        store: TeacherStore | None = None,
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
        for name, value, known in (
            ("discriminator_input", discriminator_input, ("logits", "probabilities", "log_probabilities")),
            ("discriminator_mode", discriminator_mode, ("cooperative", "adversarial", "detached")),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, number in (("discriminator_lr", discriminator_lr), ("temperature", temperature)):
            if number is not None and not number > 0:
                raise InputError(f"{name} must be positive, got {number}")
        for name, number in (("discriminator_weight", discriminator_weight), ("hard_label_weight", hard_label_weight)):
            if not number >= 0:
                raise InputError(f"{name} cannot be negative, got {number}")
        self.teachers, self.teacher_store = ensemble_if_any(teachers), store
        if input_shape is not None and self.teachers is not None:
            self.teachers.check(input_shape, num_classes)
        self.discriminator_input, self.discriminator_mode = discriminator_input, discriminator_mode
        self.discriminator_weight, self.hard_label_weight = discriminator_weight, hard_label_weight
        self.temperature = temperature
        self.discriminator = _discriminator(discriminator, num_classes) if discriminator_weight else None
        if discriminator in (None, "none"):
            refuse_unused(
                MEALV2Module,
                "without a discriminator",
                discriminator_input=discriminator_input,
                discriminator_mode=discriminator_mode,
                discriminator_lr=discriminator_lr,
                discriminator_lr_scheduler=discriminator_lr_scheduler,
            )
        _refuse_top_k(store, asks_for_logits=self._asks_for_logits)
        self.discriminator_lr = discriminator_lr
        own_schedule = discriminator_lr_scheduler is not None
        self._own_group = self.discriminator is not None and (discriminator_lr is not None or own_schedule)
        if self._own_group and (lr_scheduler is not None or own_schedule):
            self.lr_scheduler = partial(GroupSchedules, factories=[lr_scheduler, discriminator_lr_scheduler])
        # No buffers: DDP would overwrite what a process has seen with what the first one has.
        self._alive: Tensor | None = None
        self._first: Tensor | None = None
        self._told_dead = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything trainable, the discriminator in a group of its own if its learning rate is its own."""
        groups = super().parameter_groups()
        if self.discriminator is None or not self._own_group:
            return groups
        own = {} if self.discriminator_lr is None else {"lr": self.discriminator_lr}
        parameters = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        places = {id(parameter) for parameter in parameters}
        others = [parameter for parameter in groups[0]["params"] if id(parameter) not in places]
        return [{"params": others}, {"params": parameters, **own}]

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedules; those of two groups are stepped after every batch if they are `OneCycle`."""
        configured = super().configure_optimizers()
        config = configured["lr_scheduler"] if isinstance(configured, dict) else {"scheduler": None}
        if isinstance(config["scheduler"], GroupSchedules):
            for schedule in config["scheduler"].schedules:
                if isinstance(schedule, OneCycle):
                    config["interval"] = "step"
                    schedule.total_steps = schedule.total_steps or total_steps(self)
                if isinstance(schedule, ReduceLROnPlateau):
                    config |= {"monitor": "val/nll", "reduce_on_plateau": True}
        return configured

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The similarity to the ensemble's prediction, the discriminator's loss, and the labels' cross entropy."""
        logits = self.student(batch.input)
        told = self.told(batch)
        probs = told["probabilities"]
        softened = wide(logits) / self.temperature
        cross_entropy = functional.soft_cross_entropy(softened, probs)
        self._watch_student(logits, probs, cross_entropy.detach())
        terms = {"similarity": cross_entropy * self.temperature**2}
        if self.discriminator is not None:
            if self.discriminator_input == "logits":
                student, teacher = logits, told["mean_logits"]
            elif self.discriminator_input == "probabilities":
                student, teacher = F.softmax(softened, dim=-1), probs
            else:
                student, teacher = F.log_softmax(softened, dim=-1), _log(probs)
            terms["discriminator"] = self._discriminator_loss(self.discriminator, student, teacher)
        if self.hard_label_weight:
            terms["ce"] = F.cross_entropy(logits, batch.target)
        return terms

    def answers(self, logits: Tensor) -> dict[str, Tensor]:
        """The ensemble's prediction and, where the discriminator is shown logits, the teachers' mean ones."""
        rule = rule_of(self)
        answers = {"probabilities": rule.combined(logits, temperature=self.temperature)}
        if self._asks_for_logits:
            answers["mean_logits"] = functional.weighted_mean(wide(logits), rule.weights)
        return answers

    def question(self) -> dict[str, Any]:
        """The temperature, and whether mean logits are asked for, too."""
        return {"temperature": self.temperature, "mean_logits": self._asks_for_logits}

    @property
    def _asks_for_logits(self) -> bool:
        return self.discriminator is not None and self.discriminator_input == "logits"

    def weights(self) -> dict[str, float]:
        """One, ``discriminator_weight`` and ``hard_label_weight``."""
        weights = {"similarity": 1.0}
        if self.discriminator is not None:
            weights["discriminator"] = self.discriminator_weight
        if self.hard_label_weight:
            weights["ce"] = self.hard_label_weight
        return weights

    def on_train_epoch_end(self) -> None:
        """Warn of what the epoch has shown; a step would have to wait for the device."""
        super().on_train_epoch_end()
        if self._alive is not None:
            # Every process has seen rows of its own.
            gathered = cast("Tensor", self.all_gather(self._alive.float()))
            alive = gathered.reshape(-1, 2).amax(dim=0).tolist()
            dead = [name for name, seen in zip(("'student'", "'teacher'"), alive, strict=True) if not seen]
            if dead:
                self._told_dead = True
                rank_zero_warn(
                    f"MEALV2Module: the discriminator's output for {' and '.join(dead)} was zero for every row of the "
                    "epoch: it is dead and learns no more; use discriminator='fixed', or another seed"
                )
        if self._first is not None and not self.hard_label_weight:
            loss, entropy = self._first.tolist()
            if abs(loss - 1) <= _UNTRAINED and entropy < _UNSURE:
                rank_zero_warn(
                    f"MEALV2Module: in its first batch the student was as far from its teachers as by guessing "
                    f"({loss:.2f} ln K): MEAL V2 begins with pretrained weights (distill_lightning.Pretrained); from "
                    "scratch, set hard_label_weight, too"
                )
        self._alive = self._first = None

    def _discriminator_loss(self, discriminator: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        """:math:`L_D` of the student's and the teachers' predictions ``(N, K)``, which go in as one batch."""
        if self.discriminator_mode == "adversarial":
            student = functional.reverse_gradient(student)
        elif self.discriminator_mode == "detached":
            student = student.detach()
        # Networks give half precision or float32, whatever the discriminator's weights are.
        dtype = next(discriminator.parameters(), student).dtype
        scores = discriminator(torch.cat([student.to(dtype), teacher.to(dtype)]))
        of_student, of_teacher = scores.chunk(2)
        with torch.no_grad():
            margin = torch.cat([of_student[:, 0] - of_student[:, 1], of_teacher[:, 1] - of_teacher[:, 0]])
            # A tie is half right: so chance is 0.5, and a dead discriminator is at chance.
            self.observe("discriminator_accuracy", (1 + margin.sign()).mean() / 2)
            if not (isinstance(discriminator, Discriminator) and discriminator.kind == "fixed"):
                self.observe("discriminator_dead", (scores == 0).float().mean())
                alive = (scores != 0).any(dim=0)
                if not self._told_dead:
                    self._alive = alive if self._alive is None else self._alive | alive
        return functional.discriminator_loss(of_student, of_teacher)

    @torch.no_grad()
    def _watch_student(self, logits: Tensor, probs: Tensor, cross_entropy: Tensor) -> None:
        entropy = torch.special.entr(probs).sum(dim=-1).mean()
        self.observe("kl", (cross_entropy - entropy) * self.temperature**2)
        self.observe("teacher_entropy", entropy)
        self.observe("agreement", (logits.argmax(dim=-1) == probs.argmax(dim=-1)).float().mean())
        if self._first is None and self.current_epoch == 0:
            self._first = torch.stack([cross_entropy, entropy]) / math.log(logits.shape[-1])


def _refuse_top_k(store: TeacherStore | None, *, asks_for_logits: bool) -> None:
    if asks_for_logits and store is not None and store.top_k is not None:
        raise InputError(
            "MEAL V2: a store of the top_k probabilities would keep all mean logits beside them, for the "
            "discriminator: set discriminator_input='probabilities', or leave top_k out"
        )


def _discriminator(given: DiscriminatorKind | Literal["none"] | nn.Module | None, num_classes: int) -> nn.Module | None:
    """What ``discriminator`` names, drawn without touching the random state that the rest of the run draws from."""
    if given is None or given == "none":
        return None
    if isinstance(given, nn.Module):
        who = f"discriminator ({type(given).__name__})"
        try:
            shape = tuple(dry_forward(given, (num_classes,)).shape)
        except InputError as error:
            raise InputError(f"{who} does not take rows of {num_classes} logits: build it for (N, K)") from error
        if shape != (1, 2):
            raise InputError(f"{who} makes {shape} of one row of logits: it must give two scores, (N, 2)")
        return given
    if given not in ("official", "fixed"):
        raise InputError(f"discriminator must be 'official', 'fixed', 'none' or a network, got {given!r}")
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would seed the GPUs', too.
        torch.default_generator.manual_seed(torch.initial_seed() ^ _OTHER_SEED)
        return Discriminator(num_classes, kind=given)


def _log(probs: Tensor) -> Tensor:
    # A probability that underflowed to zero would be infinite.
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
