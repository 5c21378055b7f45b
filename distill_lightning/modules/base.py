"""The base of every method: one student, named loss terms, and discipline about what is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill_lightning.arguments import arguments_of
from distill_lightning.data.batch import Batch
from distill_lightning.data.transforms import BatchTransform
from distill_lightning.errors import InputError
from distill_lightning.layers import dry_forward, wake
from distill_lightning.layers.call import InputShape, call, only_output, plain_shape
from distill_lightning.layers.modes import refuse_exported
from distill_lightning.lightning_internals import place_of, summarise_frozen
from distill_lightning.modules.options import LRSchedulerCallable, OptimizerCallable, default_optimizer
from distill_lightning.modules.parts import checkpoints
from distill_lightning.modules.parts.asleep_norms import AsleepNorms
from distill_lightning.modules.parts.backbone import ExportsBackbone
from distill_lightning.modules.parts.checkpoints import RemembersArguments
from distill_lightning.modules.parts.data_wait import DataWait
from distill_lightning.modules.parts.evaluation import Evaluation
from distill_lightning.modules.parts.guard import Guard, with_targets
from distill_lightning.modules.parts.holds_frozen import HoldsFrozen
from distill_lightning.modules.parts.means import RunningMeans, balanced, weighted_sum
from distill_lightning.modules.parts.optimization import compile_networks, plan_anew, with_rate, with_schedule
from distill_lightning.modules.parts.random_state import RandomState
from distill_lightning.modules.parts.skipping import Skipping, nothing_to_learn
from distill_lightning.networks.provenance import plain_network
from distill_lightning.networks.weights import write_weights
from distill_lightning.outputs import Output, output_of
from distill_lightning.part import Part
from distill_lightning.teachers import Teachers
from distill_lightning.teachers.layer_errors import explained


class DistillationModule(RemembersArguments, HoldsFrozen, ExportsBackbone):
    r"""A student and a loss that is a weighted sum of named terms, :math:`L = \sum_t w_t L_t`.

    A method defines its arguments, `terms` and `weights`::

        class LogitRegression(DistillationModule):
            def __init__(
                self,
                student: nn.Module,
                teachers: list[nn.Module],
                *,
                num_classes: int,
                beta: float = 1.0,
                **options: Unpack[TrainingOptions],
            ) -> None:
                super().__init__(student, num_classes=num_classes, **options)
                self.teachers = Teachers(teachers, ask=[Logits()])
                self.beta = beta

            def terms(self, batch: Batch) -> dict[str, Tensor]:
                logits = call(self.student, batch.input)
                teacher = self.teachers.logits(batch).mean(dim=0)
                errors = (logits - teacher).square().mean(dim=1)
                mse = functional.counted_mean(errors, batch.counted)
                return {"ce": self.output.label_loss(logits, batch), "mse": mse}

            def weights(self) -> dict[str, float]:
                return {"ce": 1.0, "mse": self.beta}

    The annotations are what the command line reads the arguments by. A method whose terms can do with logits for each
    position, ``(N, T, K)``, and targets ``(N, T)`` says ``per_position = True`` and runs the student by `respond`.

    This class does the rest. In training it logs ``train/loss``, ``train/<term>`` (unweighted) and, where there are
    several, ``train/<term>_share`` (weighted, as a part of the loss). In validation and test it logs the student's
    metrics under ``val/`` and ``test/``. Attributes that are `Part` objects are called at the moments of a training;
    those that are `Frozen`, `Teachers` for example, stay in eval mode, out of the optimiser and out of the checkpoint,
    which holds how they were built and a fingerprint of their weights instead. The checkpoint holds the state of
    torch's random generators, too: a training that goes on from it, in as many processes, ends as the undisturbed one
    does, also where dropout or a detector's samplers draw. A ``fit`` puts the module in train mode; a part of the
    student all of whose parameters are frozen keeps the mode that it came in.

    Args:
        student: the network that learns; maps ``(N, ...)`` to logits ``(N, K)``.
        num_classes: ``K`` of a classifier.
        num_targets: ``d`` of a regression, instead of ``num_classes``; the student then gives the parameters of a
            Gaussian, ``(N, 2 d)``: means, then log-variances.
        output: see `TrainingOptions`, as all that follow.
        input_shape: see `TrainingOptions`.
        optimizer: see `TrainingOptions`.
        lr_scheduler: see `TrainingOptions`.
        transforms: see `TrainingOptions`.
        metrics: see `TrainingOptions`.
        compile: see `TrainingOptions`.
        channels_last: see `TrainingOptions`.
        nonfinite: see `TrainingOptions`.

    Attributes:
        output: what an output of the student means.
        lr: a learning rate that the optimiser gets in the place of its own, as Lightning's `LearningRateFinder` sets
            it; groups of `parameter_groups` that have an ``lr`` keep theirs. ``None``: its own.

    Raises:
        InputError: not one of ``num_classes`` and ``num_targets`` is given, ``output`` does not go with it, or the
            student does not give as many outputs for an input of ``input_shape``.
    """

    per_position: bool = False

    @property
    def reads_labels(self) -> bool:
        """Whether `terms` reads the labels, whose values are looked at then."""
        return True

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int | None = None,
        num_targets: int | None = None,
        output: Output | None = None,
        input_shape: InputShape | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        transforms: Sequence[BatchTransform] = (),
        metrics: MetricCollection | None = None,
        compile: bool = False,
        channels_last: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        given = self.given_arguments()
        self.save_hyperparameters(checkpoints.hyperparameters(type(self), given))
        self._objects = checkpoints.objects(type(self), given)
        # Names of arguments that the checkpoint could not hold, which have their defaults now.
        self._missing: list[str] = []
        self.output = self._checked_output(output, num_classes, num_targets)
        self.num_classes: int | None = getattr(self.output, "num_classes", None)
        self.num_targets: int | None = getattr(self.output, "num_targets", None)
        unfit = [type(transform).__name__ for transform in transforms if transform.needs_classes]
        if unfit and self.num_classes is None:
            raise InputError(f"{type(self).__name__}: {', '.join(unfit)} need a classifier's batches: leave them out")
        refuse_exported(f"{type(self).__name__}: the student", student)
        self.student = student.to(memory_format=torch.channels_last) if channels_last else student
        self.input_shape = None if input_shape is None else plain_shape(input_shape)
        if self.input_shape is not None:
            self.check_output("student", student, dry_forward(student, self.input_shape).shape)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.lr: float | None = None
        self.transforms, self.compiles = tuple(transforms), compile
        self.has_own_metrics = metrics is not None
        metrics = self.output.metrics() if metrics is None else metrics
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")
        comparison = self.output.teacher_metrics()
        self.val_teacher_metrics = comparison.clone(prefix="val/")
        self.test_teacher_metrics = comparison.clone(prefix="test/")
        self.means, self.data_wait, self.evaluation, self.guard = RunningMeans(), DataWait(), Evaluation(), Guard()
        self.skipping, self.asleep_norms, self.random_state = Skipping(nonfinite), AsleepNorms(), RandomState()
        # No teachers by default.
        self.teachers = Teachers(None, ask=[])
        self._observed: dict[str, Tensor] = {}
        self._fingerprints: dict[str, str] | None = None

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
            Here: that of the `Teachers` named ``teachers``, who are asked once in a ``fit`` about each validation
            sample.
        """
        return self.teachers.prediction(batch.input) if isinstance(self.teachers, Teachers) else None

    def teacher_predictions(self, batch: Batch) -> list[Tensor]:
        """Each teacher's own prediction for a batch: logits ``(N, K)``, or a Gaussian's parameters ``(N, 2 d)``."""
        return self.teachers.predictions(batch.input) if isinstance(self.teachers, Teachers) else []

    def refuse_unused(self, name: str, value: Any, where: str) -> None:
        """Refuse an argument that would do nothing.

        Args:
            name: of the constructor's argument.
            value: that it has.
            where: in which case it does nothing, for the message.

        Raises:
            InputError: the value is not the argument's default.
        """
        if value != arguments_of(type(self))[name].default:
            raise InputError(f"{type(self).__name__}: {name}={value} would do nothing {where}: leave it out")

    def check_output(self, who: str, network: nn.Module, shape: Sequence[int]) -> None:
        """Look at the shape of a network's output.

        Raises:
            InputError: it does not fit `output`; the message begins with ``who``.
        """
        self.output.check(who, network, shape, per_position=self.per_position)

    # Steps

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The student's output for its inputs, or for a batch of any kind, labelled or not."""
        if named or len(inputs) != 1:
            return only_output(self.student, self.student(*inputs, **named))
        return call(self.student, inputs[0] if isinstance(inputs[0], Tensor) else self.read_batch(inputs[0]).input)

    def read_batch(self, batch: Any) -> Batch:
        """The batch of any data module, of any stage, as this method looks at it; reading it again changes nothing."""
        return Batch.of(batch)

    def prepared(self, batch: Any, batch_idx: int = 0) -> Batch:
        """The training batch of any data module as `terms` gets it, transformed."""
        epoch, place = place_of(self, batch_idx)
        # Without views, a store holds one answer per sample, so draws must not depend on the epoch.
        has_store = isinstance(self.teachers, Teachers) and self.teachers.store is not None
        ready = with_targets(self, self.read_batch(batch)).replace(when=(0 if has_store else epoch, place))
        for transform in self.transforms:
            ready = transform(ready, num_classes=self.num_classes or 0)
        return ready

    def respond(self, batch: Batch) -> Tensor:
        """The student's output for a batch; where it has positions, with the numbers of each of them last."""
        return self.guard.laid_out(self, call(self.student, batch.input))

    def observe(self, name: str, value: Tensor) -> None:
        """Have a scalar of this batch logged as ``train/<name>``, beside the terms that `terms` returns.

        Args:
            name: what stands behind ``train/``.
            value: a scalar on the device; its mean over the epoch is logged.
        """
        self._observed[name] = value.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Weigh, sum and log the terms of a batch."""
        batch = self.prepared(batch, batch_idx)
        self._observed = {}
        terms = explained(self, self.terms, batch, f"training batch {batch_idx}")
        logs = weighted_sum(terms, self.weights())
        if self._observed.keys() & logs.keys():
            raise KeyError(f"{sorted(self._observed.keys() & logs.keys())}: observed under the name of a term")
        # Shares of a loss that is 0 are not finite.
        watched = {name: logs[name] for name in ("loss", *terms)}
        if self.skipping.skips(self, watched, batch, batch_idx):
            return nothing_to_learn(self)
        values = self.means.add(logs | self._observed, batch.count)
        self.guard.hold(self, values[: len(watched)], list(watched), batch, batch_idx)
        return balanced(self, logs["loss"], batch.count)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add a batch to the metrics under ``val/``; callbacks get the student's ``output`` and the ``target``.

        Several loaders have metrics of their own, ``val/nll/dataloader_idx_0`` and so on.
        """
        return self.evaluation.update(self, self._evaluated(batch), batch_idx, "val", dataloader_idx=dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add a batch to the metrics under ``test/``, as `validation_step` does under ``val/``."""
        return self.evaluation.update(self, self._evaluated(batch), batch_idx, "test", dataloader_idx=dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """The student's output for the samples of a batch that count, or for a tensor of inputs."""
        batch = Batch(batch) if isinstance(batch, Tensor) else self.read_batch(batch)
        output: Tensor = explained(self, lambda one: call(self, one.input), batch, f"prediction batch {batch_idx}")
        return output[batch.counted] if batch.counted is not None and batch.counted.ndim == 1 else output

    def score(self, batches: Iterable[Any]) -> dict[str, float]:
        """The student's metrics over some batches, by their bare names, logged nowhere.

        Args:
            batches: on the module's device, as for `validation_step`.
        """
        return self.evaluation.score(self, map(self._evaluated, batches))

    def _evaluated(self, batch: Any) -> Batch:
        return with_targets(self, self.read_batch(batch), is_evaluated=True)

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
        optimizer = with_rate(self.optimizer, self.parameter_groups(), self.lr)
        return with_schedule(self, optimizer, self.lr_scheduler, monitor=f"val/{self.output.watched}")

    # Parts, and networks that stand outside of the registry

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Part):
            value.joined(self)

    @property
    def parts(self) -> dict[str, Part]:
        """The attributes that are called at the moments of a training, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Part)}

    def fingerprints(self) -> dict[str, str]:
        """What tells the frozen networks from others; computed once in a ``fit``, because large ones take a while."""
        if self._fingerprints is not None:
            return self._fingerprints
        return {key: value for name, frozen in self.frozen.items() for key, value in frozen.fingerprints(name).items()}

    def forget_fingerprints(self) -> None:
        """Compute them anew when they are next asked for: the networks may be others."""
        self._fingerprints = None

    # Moments

    def _tell(self, moment: str) -> None:
        for part in self.parts.values():
            getattr(part, moment)(self)

    def on_fit_start(self) -> None:
        """Call the parts' ``fit_starts``; then train mode for all but frozen parts of the student, and compilation."""
        self.forget_fingerprints()
        self._tell("fit_starts")
        wake(self)
        super().on_fit_start()
        if self.compiles:
            compile_networks(self)
        if self._missing:
            warnings.warn(
                f"this {type(self).__name__} was loaded from a checkpoint, which cannot hold every argument: "
                f"{', '.join(self._missing)} are the defaults now, not those of the training before; give them to "
                "load_from_checkpoint",
                stacklevel=2,
            )
        summarise_frozen(self, self.extra_repr().splitlines())
        self._fingerprints = self.fingerprints()

    def on_train_start(self) -> None:
        """Go on at a checkpoint's place with learning rates for the rest; then call the parts' ``training_starts``."""
        super().on_train_start()
        plan_anew(self)
        self._tell("training_starts")

    def on_train_epoch_start(self) -> None:
        """Call the parts' ``epoch_starts``."""
        self._tell("epoch_starts")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the labels, and call the parts' ``batch_starts``."""
        # A method of its own may get batches of any kind.
        if not _has_own(type(self), "prepared", "training_step"):
            self.guard.look(self, batch, batch_idx, "train")
        self._tell("batch_starts")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step if there is something to learn, and tell the parts.

        Here, because a checkpoint that is made after the batch is written before its end.
        """
        # The last one in every version of Lightning.
        *given, closure = args
        closure = self.skipping.closure(self, closure)
        if closure is not None:
            super().optimizer_step(*given, closure, **kwargs)  # type: ignore[call-arg]  # it cannot count them
            self._tell("step_ends")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call the parts' ``batch_ends``."""
        self._tell("batch_ends")

    def on_train_epoch_end(self) -> None:
        """Call the parts' ``epoch_ends``."""
        self._tell("epoch_ends")

    def on_validation_start(self) -> None:
        """Call the parts' ``validation_starts``."""
        self._tell("validation_starts")

    def on_test_start(self) -> None:
        """Call the parts' ``test_starts``."""
        self._tell("test_starts")

    def on_fit_end(self) -> None:
        """Call the parts' ``fit_ends``."""
        self._tell("fit_ends")
        self.forget_fingerprints()

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how module and networks were made, what the frozen ones weigh, and what the parts keep."""
        super().on_save_checkpoint(checkpoint)
        checkpoints.note(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what the parts had kept.

        Raises:
            InputError: the checkpoint is of another architecture, or of another version of this package.
        """
        checkpoints.take(self, checkpoint)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a restricted classmethod with more arguments
        cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu", **overrides: Any
    ) -> Self:
        """Build the module of a checkpoint, its networks included where this package's factories made them.

        Only tensors and plain values are read, never pickled code, and no file or folder that only the checkpoint names
        is used.

        Args:
            checkpoint_path: a checkpoint of this class.
            map_location: the device that the module is put on.
            overrides: constructor arguments that replace what the checkpoint holds. A network that was built elsewhere
                must be given (``student=...``, ``teachers=...``); if the training is to go on, the optimiser and
                whatever else was no plain value, too: `fit` warns of those that are missing.

        Raises:
            InputError: there is no such checkpoint, it is of another module, architecture or version, or it cannot tell
                how a network was built.
        """
        module: Self = checkpoints.rebuilt(cls, Path(checkpoint_path), overrides)
        return module.to(map_location)

    def export_student(self, path: str | Path) -> Path:
        """Write the plain student's state dict; a freshly built network of its kind loads it with ``strict=True``.

        Weights that are computed (quantized, shared) are written as the values that they have. A network that was
        shrunk fits one of its own sizes: `compression.structure.changes.rebuild_structure`.

        Args:
            path: ``.safetensors``, or ``.pt`` / ``.pth`` for `torch.save`; its folder is made.

        Returns:
            The path.

        Raises:
            InputError: another suffix; the disk is full or refuses, and then what was there before is kept.
        """
        return write_weights(plain_network(self.student), Path(path))

    def _checked_output(self, output: Output | None, num_classes: int | None, num_targets: int | None) -> Output:
        name = type(self).__name__
        if output is None:
            return output_of(name, num_classes, num_targets)
        for key, value in (("num_classes", num_classes), ("num_targets", num_targets)):
            if value is not None and getattr(output, key, None) != value:
                raise InputError(f"{name}: output={output} does not go with {key}={value}: let them agree")
        return output


def _has_own(kind: type[DistillationModule], *names: str) -> bool:
    return any(getattr(kind, name) is not getattr(DistillationModule, name) for name in names)
