"""The options that every method shares, and the default optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict

from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MetricCollection

from distill_lightning.data.transforms import BatchTransform
from distill_lightning.layers.call import InputShape
from distill_lightning.outputs import Output

OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]  # jsonargparse needs the bare Iterable
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the settings of the papers' CIFAR experiments."""
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class TrainingOptions(TypedDict, total=False):
    """Options of every `DistillationModule`; a method takes them as ``**options: Unpack[TrainingOptions]``.

    Args:
        output: what an output of the networks means; ``None``: `Categorical` of ``num_classes``, or `Gaussian` of
            ``num_targets``.
        input_shape: shape of one input, ``(C, H, W)`` or, of tokens, ``(T,)``; of inputs that a network gets by keyword
            those of each, ``{image: (C, H, W), pose: (2,)}``. With it, networks are checked in the constructor and not
            at the first batch. ``None`` by default.
        optimizer: makes the optimiser from the trainable parameters; `default_optimizer` by default.
        lr_scheduler: makes the schedule from the optimiser; ``None`` by default. It is stepped after every epoch,
            `OneCycle`, `InverseSquareRoot`, PyTorch's `OneCycleLR` and `CyclicLR` after every batch;
            `ReduceLROnPlateau` watches ``val/nll``, of detectors ``val/map``, of several validation loaders that of the
            first.
        transforms: what is done to each training batch of a classifier, in this order: `Mixup`, `CutMix`, `Cutout`,
            `LabelSmoothing`. Empty by default.
        metrics: of the student's output and the target; by default those of the output,
            `outputs.metrics.classification_metrics` or `outputs.metrics.regression_metrics`.
        compile: whether a ``fit`` compiles the student and the teachers, in place: their names, hooks and state dicts
            stay. The first steps take a while, and after them a step is faster; a CPU needs a C++ compiler for it.
            ``False`` by default.
        channels_last: whether the student's weights are laid out channels last, which most convolutions are faster in.
            ``False`` by default.
        nonfinite: what happens to a training batch whose loss, or a teacher's answer to it, is nan or infinite:
            ``"stop"``, the default, ends the run with a message that names it; ``"skip"`` leaves the batch out, as
            `Skipping` tells, and every step waits for the device.
    """

    output: Output | None
    input_shape: InputShape | None
    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    transforms: Sequence[BatchTransform]
    metrics: MetricCollection | None
    compile: bool
    channels_last: bool
    nonfinite: Literal["stop", "skip"]
