"""The base of every method: one student, named loss terms, and discipline about what is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.layers import dry_forward
from distill_lightning.modules.evaluating import EvaluatedModule
from distill_lightning.modules.hparams import objects_given, unplain_arguments
from distill_lightning.modules.optimization import (
    LRSchedulerCallable,
    OptimizerCallable,
    compile_networks,
    default_optimizer,
    with_schedule,
)
from distill_lightning.modules.parts.data_wait import DataWait
from distill_lightning.modules.parts.means import RunningMeans
from distill_lightning.teachers import TeacherEnsemble, TeacherStore, check_classes, check_gaussian
from distill_lightning.teachers.origin import begin_store, finish_epoch


class DistillationModule(EvaluatedModule):
    r"""A student and a loss that is a weighted sum of named terms, :math:`L = \sum_t w_t L_t`.

    A method overrides `terms` and `weights`, and nothing else::

        class LogitRegression(DistillationModule):
            frozen = ("teachers",)

            def __init__(
                self, student: nn.Module, teachers: list[nn.Module], *, num_classes: int, beta: float = 1.0
            ) -> None:
                super().__init__(student, num_classes=num_classes)
                self.teachers = TeacherEnsemble.of(teachers)
                self.beta = beta

            def terms(self, batch: Batch) -> dict[str, Tensor]:
                logits = self.student(batch.input)
                teacher = self.teachers.logits(batch.input).mean(dim=0)
                return {"ce": F.cross_entropy(logits, batch.target), "mse": F.mse_loss(logits, teacher)}

            def weights(self) -> dict[str, float]:
                return {"ce": 1.0, "mse": self.beta}

    The annotations are what the command line reads the arguments by. A method whose terms can do with logits for each
    position, ``(N, T, K)``, and targets ``(N, T)`` says ``per_position = True``.

    This class does the rest. In training it logs ``train/loss``, ``train/<term>`` (unweighted) and, where there are
    several, ``train/<term>_share`` (weighted, as a part of the loss). In validation and test it logs the student's
    metrics under ``val/`` and ``test/``. The submodules named in ``frozen`` stay in eval mode, out of the optimiser and
    out of the checkpoint, which holds how they were built and a fingerprint of their weights instead.

    Args:
        student: the network that learns; maps ``(N, ...)`` to logits ``(N, K)``.
        num_classes: ``K`` of a classifier.
        num_targets: ``d`` of a regression, instead of ``num_classes``; the student then gives the parameters of a
            Gaussian, ``(N, 2 d)``: means, then log-variances.
        input_shape: shape of one input, ``(C, H, W)`` or, of tokens, ``(T,)``; with it, networks are checked here and
            not at the first batch.
        optimizer: makes the optimiser from the trainable parameters; `default_optimizer` without.
        lr_scheduler: makes the schedule from the optimiser. It is stepped after every epoch, `OneCycle` after every
            batch; `ReduceLROnPlateau` watches ``val/nll``.
        metrics: of the student's output and the target; ``classification_metrics(num_classes)`` or
            ``regression_metrics(num_targets)`` without.
        compile: whether a ``fit`` compiles the student and the teachers (``batched`` ones run as they are), in place:
            their names, hooks and state dicts stay. The first steps take a while, and after them a step is faster; a
            CPU needs a C++ compiler for it.
        channels_last: whether the student's weights are laid out channels last, which most convolutions are faster in.

    Raises:
        InputError: not one of ``num_classes`` and ``num_targets`` is given, or the student does not give as many
            outputs for an input of ``input_shape``.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int | None = None,
        num_targets: int | None = None,
        input_shape: Sequence[int] | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        metrics: MetricCollection | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        objects = unplain_arguments(self)
        self.save_hyperparameters(ignore=list(objects))
        if (num_classes is None) == (num_targets is None):
            raise InputError(
                f"{type(self).__name__} needs num_classes (a classifier) or num_targets (a regression), and not both"
            )
        if num_classes is not None and num_classes < 2:
            raise InputError(f"num_classes must be at least 2, got {num_classes}")
        if num_targets is not None and num_targets < 1:
            raise InputError(f"num_targets must be at least 1, got {num_targets}")
        self.student = student.to(memory_format=torch.channels_last) if channels_last else student
        self.compiles = compile
        self.num_classes = num_classes
        self.num_targets = num_targets
        if input_shape is not None:
            self.check_output("student", student, dry_forward(student, input_shape).shape)
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.make_metrics(metrics)
        self.teacher_store: TeacherStore | None = None
        self._objects = objects_given(self, objects)
        self._observed: dict[str, Tensor] = {}
        self._running, self._wait = RunningMeans(), DataWait()
        # The batch that is trained on, and the same with index and view as they were before it went to the device.
        self._batch: Batch | None = None
        self._host_keys: Batch | None = None

    # What a method fills in

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The unweighted loss terms of a batch, scalars by name, in the paper's order."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(batch)")

    def weights(self) -> dict[str, float]:
        """The weight of each term; 0 for a term that is only logged. A function of progress where the paper has one."""
        raise NotImplementedError(f"{type(self).__name__} must define weights()")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser gets: every trainable parameter, in one group unless a method says otherwise."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def teacher_prediction(self, batch: Batch) -> Tensor | None:
        """The teachers' one prediction for a batch, which the student is compared with in validation and test.

        Returns:
            Log-probabilities ``(N, K)``, or a Gaussian's parameters ``(N, 2 d)``; ``None`` where there is no teacher.
            Here: that of the `TeacherEnsemble` named ``teachers``, if the method has one and classifies. Where
            ``teachers`` are `frozen`, they are asked once in a ``fit`` about each validation sample.
        """
        teachers = getattr(self, "teachers", None)
        if self.num_classes is None or not isinstance(teachers, TeacherEnsemble):
            return None
        log_probs: Tensor = teachers(batch.input)
        return log_probs

    def teacher_predictions(self, batch: Batch) -> list[Tensor]:
        """Each teacher's own prediction for a batch.

        Returns:
            For each teacher logits ``(N, K)``, or a Gaussian's parameters ``(N, 2 d)``. Here: those of a classifier's
            `TeacherEnsemble` named ``teachers``, and nothing where there is none.
        """
        teachers = getattr(self, "teachers", None)
        if self.num_classes is None or not isinstance(teachers, TeacherEnsemble):
            return []
        return list(teachers.logits(batch.input))

    def ask(self, batch: Batch) -> dict[str, Tensor]:
        """What the teachers say about a training batch, which a `TeacherStore` can keep in their place.

        A method that takes a ``store`` defines this, or `answers`, and reads `told` in its terms.

        Returns:
            Tensors ``(N, ...)`` by name, without a graph, functions of each sample's input alone. Here: `answers` to
            the logits of the `TeacherEnsemble` named ``teachers``.
        """
        return self.answers(cast("TeacherEnsemble", self.teachers).logits(batch.input))

    def answers(self, logits: Tensor) -> dict[str, Tensor]:
        """What `ask` gives, of a method that needs nothing of its teachers but their logits.

        Args:
            logits: of every teacher, ``(M, N, K)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define ask(batch) or answers(logits) to use a store")

    def kept(self, batch: Batch) -> dict[str, Tensor]:
        """What a store keeps about a batch: what the method asks, or the logits alone that it can be answered from.

        Raises:
            InputError: the store is to keep logits, and the method needs other things.
        """
        if self.teacher_store is None or self.teacher_store.keep == "answers":
            return self.ask(batch)
        if type(self).answers is DistillationModule.answers:
            raise InputError(f"{type(self).__name__} needs more than its teachers' logits: leave the store's keep out")
        return {"logits": cast("TeacherEnsemble", self.teachers).logits(batch.input).transpose(0, 1)}

    def question(self) -> dict[str, Any]:
        """Plain values of the method's options that the answers depend on."""
        return {}

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """The teachers' answers about a training batch: `ask`'s, or those that the store has kept.

        Raises:
            InputError: there are no teachers, and no store that knows their answers.
        """
        ask = None if getattr(self, "teachers", None) is None else partial(self.kept, batch)
        if self.teacher_store is None:
            if ask is None:
                raise InputError("teachers is null and there is no store: give teachers, or a complete TeacherStore")
            return ask()
        told = self.teacher_store.told(self._on_the_host(batch), ask, device=self.device)
        return told if self.teacher_store.keep == "answers" else self.answers(told["logits"].transpose(0, 1))

    def check_output(self, who: str, network: nn.Module, shape: Sequence[int]) -> None:
        """Look at the shape of a network's output.

        Raises:
            InputError: it does not fit ``num_classes`` or ``num_targets``; the message begins with ``who``.
        """
        if self.num_classes is not None:
            check_classes(who, network, shape, self.num_classes, per_position=self.per_position)
        elif self.num_targets is not None:
            check_gaussian(who, network, shape, self.num_targets)

    # Training

    def observe(self, name: str, value: Tensor) -> None:
        """Have a scalar of this batch logged as ``train/<name>``, beside the terms that `terms` returns.

        Args:
            name: what stands behind ``train/``.
            value: a scalar on the device; its mean over the epoch is logged.
        """
        self._observed[name] = value.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Weigh, sum and log the terms of a batch."""
        self._batch = batch = self._checked(batch)
        self._observed = {}
        terms, weights = self.terms(batch), self.weights()
        if terms.keys() != weights.keys():
            raise KeyError(f"terms() gave {sorted(terms)}, weights() gave {sorted(weights)}: they must name the same")
        weighted = {name: weights[name] * term for name, term in terms.items()}
        loss = torch.stack(list(weighted.values())).sum()
        logs = {"loss": loss, **terms}
        if len(terms) > 1:
            logs |= {f"{name}_share": weighted[name] / loss for name in terms if weights[name] != 0}
        if self._observed.keys() & logs.keys():
            raise KeyError(f"{sorted(self._observed.keys() & logs.keys())}: observed under the name of a term")
        self._running.add(logs | self._observed, batch.size)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimiser over `parameter_groups` and, if there is one, its schedule.

        Raises:
            InputError: the student has no parameter that can be trained.
        """
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            raise InputError(
                f"{type(self).__name__}: the student has nothing to train, all its parameters are frozen: a network "
                "that was given to another module as its teacher stays frozen; give a copy.deepcopy of it there"
            )
        optimizer = self.optimizer(self.parameter_groups())
        return with_schedule(self, optimizer, self.lr_scheduler, monitor="val/nll")

    # What happens when

    def on_fit_start(self) -> None:
        """A module that enters ``fit`` in eval mode would train in it; the student must not."""
        super().on_fit_start()
        self.train()
        if self.compiles:
            compile_networks(self)
        if self._missing:
            warnings.warn(
                f"this {type(self).__name__} was loaded from a checkpoint, which cannot hold every argument: "
                f"{', '.join(self._missing)} are the defaults now, not those of the training before; give them to "
                "load_from_checkpoint",
                stacklevel=2,
            )
        # Frozen weights keep while fit lasts, and large ones take a while: once is enough.
        self._fingerprints = self._fingerprint()
        # An interrupted fit may have left some.
        self._running.forget()

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # Lightning's own step around the public hook, which, if it were defined here, would put the data module's out
        # of action. Without it, a store on a GPU only waits for the device.
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        # Which samples a training batch holds, for the store, while they are still on the host.
        # No hook behind the transfer can change the rows: with a store they are refused.
        if self.teacher_store is not None and self.trainer.training:
            self._host_keys = Batch.of(batch)
        return batch

    def _on_the_host(self, batch: Batch) -> Batch:
        """A batch with index and view where a store can read them without waiting for the device."""
        moved = batch.index is not None and batch.index.device.type != "cpu"
        return self._host_keys if moved and batch is self._batch and self._host_keys is not None else batch

    def on_train_start(self) -> None:
        """Tell the store what it is about, and take up what a killed training has left in it."""
        if self.teacher_store is not None:
            begin_store(self, self.teacher_store)

    def on_train_epoch_start(self) -> None:
        """The wait for data and the means under ``train/`` are measured anew in every epoch."""
        self._wait.begin()
        self._running.forget()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The wait is over."""
        self._wait.arrived()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """With the last batch, log the means under ``train/``; show how much of the time went by waiting for data."""
        self._wait.done()
        trainer = self.trainer
        # Not at the end of the epoch: callbacks read the means there, and come before the module.
        if trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._log_means()
        bar = self.trainer.progress_bar_callback
        if bar is not None and getattr(bar, "is_enabled", True):
            # A number would be copied to the device, and read back from it for the bar.
            share = torch.tensor(self._wait.share)
            self.log("data_wait", share, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        """Log the means under ``train/``; what the teachers have said in this epoch can be read from now on."""
        # Of an epoch that has ended in another way than with its last batch.
        self._log_means()
        if self.teacher_store is not None:
            finish_epoch(self, self.teacher_store)

    def _log_means(self) -> None:
        for name, mean, samples in self._running.means():
            self.log(f"train/{name}", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=samples)
        self._running.forget()

    def on_validation_start(self) -> None:
        """Waiting for the data of validation does not count."""
        super().on_validation_start()
        self._wait.pause()
