"""Looking over the shoulder of a validation and of the first steps of a training, and ending both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from distill_lightning.data.batch import Batch, tensors_of
from distill_lightning.functional.common import wide
from distill_lightning.layers import FeatureTap
from distill_lightning.layers.modes import uncompiled
from distill_lightning.modules import DistillationModule
from distill_lightning.modules.parts.guard import with_targets
from distill_lightning.teachers import Frozen, TeacherEnsemble, Teachers

_WARM_UP = 2
"""Steps that are not timed: the first ones compile, choose kernels and fill caches."""


class EnoughError(Exception):
    """Ends what the Trainer does; nothing that comes at a training's end is done."""


class Clock:
    """Times steps from the end of one to the end of the next, without what is done in between while it is stopped."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._since, self._so_far = time.perf_counter(), 0.0

    def lap(self, device: torch.device) -> None:
        """A step has ended."""
        self.stop(device)
        self.laps.append(self._so_far)
        self._so_far = 0.0
        self.go_on()

    def stop(self, device: torch.device) -> None:
        """Pause, once the device has done what it was given."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._so_far += time.perf_counter() - self._since

    def go_on(self) -> None:
        """Go on."""
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float | None:
        """Of a step: the median, warm-up left out where there are more steps; ``None``: there was none."""
        timed = sorted(self.laps[min(_WARM_UP, len(self.laps) - 1) :])
        return timed[len(timed) // 2] if timed else None


class Channels:
    """Mean, standard deviation, smallest and largest value of each channel of some inputs, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._squares = torch.zeros(0)
        self.low, self.high = float("inf"), -float("inf")

    def add(self, inputs: Tensor) -> None:
        """Add a batch ``(N, C, ...)``."""
        rows = inputs.detach().double().movedim(1, 0).flatten(1).cpu()
        if not self.count:
            self._sum, self._squares = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
        self.count += rows.shape[1]
        self._sum, self._squares = self._sum + rows.sum(1), self._squares + rows.square().sum(1)
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))

    @property
    def mean(self) -> Tensor:
        """``(C,)``."""
        return self._sum / self.count

    @property
    def std(self) -> Tensor:
        """``(C,)``."""
        return (self._squares / self.count - self.mean.square()).clamp_min(0).sqrt()


class Heard:
    """What one teacher has said about validation samples, and what would have been right."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.answers: list[Tensor] = []
        self.targets: list[Tensor] = []
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(self, prediction: Tensor, target: Tensor | None) -> None:
        """Add a batch: predictions ``(N, ...)``; of classes their most probable one is kept, else the prediction."""
        rows = wide(prediction.detach()).flatten(1)
        low, high = rows.amin(0), rows.amax(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if target is None:
            return
        if target.is_floating_point() and target.shape == prediction.shape:
            target = target.argmax(dim=-1)
        has_classes = not target.is_floating_point()
        self.answers.append((prediction.argmax(dim=-1) if has_classes else prediction).detach().cpu())
        self.targets.append(target.detach().cpu())

    @property
    def is_constant(self) -> bool:
        """Whether the predictions for all inputs are the same but for rounding."""
        if self._low is None or self._high is None:
            return False
        scale = torch.maximum(self._low.abs(), self._high.abs()).amax()
        return bool((self._high - self._low).amax() <= 1e-5 * scale)


class Watch(pl.Callback):
    """Sees what a validation and a training do, until it has seen enough.

    Args:
        module: that is looked at.
        steps: training steps that are timed.
        scored: validation samples that the teachers are scored on.
    """

    def __init__(self, module: Any, *, steps: int, scored: int) -> None:
        self.steps, self.scored = steps, scored
        self.shapes: dict[str, str] = {}
        self.image_type: torch.dtype | None = None
        self.channels = Channels()
        self.teachers: list[Heard] = []
        self.scored_samples = 0
        self.taps = dict(_taps_of(module))
        self.fired: dict[str, str] = {}
        self.is_training = False
        self.uncovered: list[str] | None = None
        self.learning = 0
        self.unreached: list[str] = []
        self.clock, self.val_clock = Clock(), Clock()
        self.batches = self.val_batches = 0.0
        self.store_state: tuple[int, int, bool] | None = None
        self.memory = 0

    @contextmanager
    def hooked(self, module: Any) -> Iterator[None]:
        """Within it, see what the student gives and which tapped layers run in a training step."""
        handles = []
        student = getattr(module, "student", None)
        if isinstance(student, nn.Module):
            network = uncompiled(student)

            def note(module: nn.Module, inputs: Any, output: Any) -> None:
                # Not of copies, which a compression makes; a bound method would be copied with all that it is bound to.
                if module is network:
                    self._note_output(module, inputs, output)

            handles.append(network.register_forward_hook(note))
        for name, tap in self.taps.items():
            for layer in tap.layers:
                place = uncompiled(tap.network).get_submodule(layer)
                handles.append(place.register_forward_hook(self._note_feature(f"{name} {layer}")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.shapes.setdefault("student", _described(output))

    def _note_feature(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.is_training:
                self.fired[name] = _described(output)

        return note

    # Validation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.val_batches = float(sum(trainer.num_val_batches))
        self.val_clock.go_on()

    def on_validation_batch_end(  # noqa: PLR0917  # Lightning's arguments
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ask each teacher, and end the validation if they were asked often enough."""
        self.val_clock.lap(pl_module.device)
        ready = Batch.of(batch)
        if batch_idx == 0:
            self.shapes["validation"] = _described(ready.input)
        self._hear(pl_module, ready)
        self.scored_samples += ready.size
        self.val_clock.go_on()
        if self.scored_samples >= self.scored:
            raise EnoughError

    @torch.no_grad()
    def _hear(self, module: Any, batch: Batch) -> None:
        if isinstance(module, DistillationModule):
            batch = with_targets(module, batch, is_evaluated=True)
            predictions = module.teacher_predictions(batch)
        else:
            ensembles = [one for frozen in _frozen_of(module) for one in frozen if isinstance(one, TeacherEnsemble)]
            predictions = [answer for ensemble in ensembles for answer in ensemble.each(batch.input)]
        if not self.teachers:
            self.teachers = [Heard(name) for name in _names_of(module, len(predictions))]
        for heard, prediction in zip(self.teachers, predictions, strict=True):
            target = batch.target
            if isinstance(module, DistillationModule):
                counted = module.output.counted(prediction, batch)
                prediction, target = module.output.select(prediction, target, counted)  # noqa: PLW2901
            heard.add(prediction, target if isinstance(target, Tensor) else None)

    # Training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """See what the optimiser holds, and how much there is to do."""
        self.is_training = True
        self.batches = float(trainer.num_training_batches)
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        learning = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
        self.learning = sum(parameter.numel() for _, parameter in learning)
        self.uncovered = [name for name, parameter in learning if id(parameter) not in held]
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.clock.go_on()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look at the batch as the device has it, and at what the store knew."""
        self.clock.stop(pl_module.device)
        ready = Batch.of(batch)
        if not self.clock.laps:
            self._look_at_first(pl_module, ready)
        for tensor in list(tensors_of(ready.input))[:1]:
            if tensor.is_floating_point() and tensor.ndim > 1 and bool(tensor.isfinite().all()):
                self.channels.add(tensor)
        self.clock.go_on()

    def _look_at_first(self, module: Any, batch: Batch) -> None:
        self.shapes = {"input": _described(batch.input), "target": _described(batch.target), **self.shapes}
        image = next(tensors_of(batch.input), None)
        if image is not None and image.ndim == 4:
            self.image_type = image.dtype
        store = getattr(getattr(module, "teachers", None), "store", None)
        if store is not None:
            self.store_state = (store.answers, store.wanted, store.is_complete)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any, *_: Any) -> None:
        """See which parameters a gradient has reached."""
        if not self.clock.laps:
            self.unreached = [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Time the step, and end the training if there were enough."""
        self.clock.lap(pl_module.device)
        if len(self.clock.laps) >= _WARM_UP + self.steps or trainer.is_last_batch:
            if pl_module.device.type == "cuda":
                self.memory = torch.cuda.max_memory_allocated(pl_module.device)
            raise EnoughError


def _described(value: Any) -> str:
    """Types and shapes of the tensors in a value."""
    found = [f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors_of(value)]
    return ", ".join(found) or ("none" if value is None else type(value).__name__)


def _frozen_of(module: Any) -> list[Frozen]:
    return [value for value in vars(module).values() if isinstance(value, Frozen)]


def _names_of(module: Any, count: int) -> list[str]:
    teachers = getattr(module, "teachers", None)
    networks = list(teachers) if isinstance(teachers, Teachers) else []
    if isinstance(teachers, Frozen) and not networks:
        networks = [one for ensemble in teachers if isinstance(ensemble, TeacherEnsemble) for one in ensemble]
    kinds = [f" ({type(network).__name__})" for network in networks]
    return [f"teacher {number}{kinds[number] if len(kinds) == count else ''}" for number in range(count)]


def _taps_of(module: Any) -> Iterator[tuple[str, FeatureTap]]:
    """The taps among a module's attributes and those of its teachers, by what they tap."""
    for name, value in vars(module).items():
        if isinstance(value, FeatureTap):
            yield name.removesuffix("_tap"), value
        taps = value.taps if isinstance(value, Teachers) else value if isinstance(value, list) else []
        for number, tap in enumerate(taps):
            if isinstance(tap, FeatureTap):
                yield f"teacher {number}", tap
