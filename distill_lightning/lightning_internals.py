"""Everything that depends on Lightning's insides, in one place.

What is public in Lightning stands where it is used; what it may change without notice stands here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import isroutine
from pathlib import PurePath
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchmetrics import Metric

import distill_lightning
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError

AVERAGING: tuple[Any, ...] = (
    pl.callbacks.StochasticWeightAveraging,
    # Since Lightning 2.6.
    *([pl.callbacks.WeightAveraging] if hasattr(pl.callbacks, "WeightAveraging") else []),
)
"""Callbacks that keep an average of the parameters that there were at first."""

_NEVER_REACHED = 10**9
_OF_LIGHTNING = vars(pl.LightningDataModule()).keys()
# Their orders are not those of a run before.
_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_VERSION = tuple(map(int, pl.__version__.split(".")[:2]))


# What older versions do otherwise


class PortableModule(pl.LightningModule):
    """A module that is trained alike under every version of Lightning, or refuses what a version cannot do.

    Before 2.2, Lightning puts everything in train mode at a training's start and after a validation, frozen parts, too:
    here parts come out of both in the modes that they were in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept_modes: list[dict[nn.Module, bool]] = []
        # Of a checkpoint that was loaded, see `settle_progress`.
        self.resumed_at: dict[str, Any] | None = None

    def on_fit_start(self) -> None:
        """Note the modes in which the training is to begin.

        Raises:
            InputError: it would go on from inside an epoch, which this version of Lightning cannot.
        """
        refuse_mid_epoch(self.trainer)
        _begin_after_finder(self.trainer)
        # A fit that broke off may have left some.
        self._kept_modes = []
        self._keep_modes()
        expect_eval_modes()

    def on_train_start(self) -> None:
        """Begin in the modes that were noted, and go on at a checkpoint's place."""
        forget_eval_modes()
        self._restore_modes()
        go_on(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let callbacks and schedules keep plain values alone: PyTorch reads nothing else from a file of weights.

        Lightning 1.9 writes the folders of callbacks as they were given, and PyTorch 2.6 a function of the schedule of
        `StochasticWeightAveraging`, which has it anyway.
        """
        for name in checkpoint.keys() & {"callbacks", "lr_schedulers"}:
            checkpoint[name] = _readable(checkpoint[name])

    def _keep_modes(self) -> None:
        self._kept_modes.append({part: part.training for part in self.modules()})

    def _restore_modes(self) -> None:
        for part, training in (self._kept_modes.pop() if self._kept_modes else {}).items():
            part.training = training

    if _VERSION < (2, 2):

        def on_validation_model_eval(self) -> None:
            """All in eval mode."""
            self._keep_modes()
            super().on_validation_model_eval()

        def on_validation_model_train(self) -> None:
            """All in the modes of before."""
            super().on_validation_model_train()
            self._restore_modes()

        on_test_model_eval, on_test_model_train = on_validation_model_eval, on_validation_model_train


def _readable(state: Any) -> Any:
    """A state without functions, and with paths as strings."""
    if type(state) is dict:
        return {name: _readable(value) for name, value in state.items() if not isroutine(value)}
    if type(state) is list:
        return [_readable(value) for value in state]
    return str(state) if isinstance(state, PurePath) else state


def _begin_after_finder(trainer: Any) -> None:
    """Have a training begin with its first batch, where `LearningRateFinder` has read some before.

    Lightning 2.5.0 goes on behind the last that it read, and leaves the others of the first epoch out.
    """
    finders = any(isinstance(callback, pl.callbacks.LearningRateFinder) for callback in trainer.callbacks)
    if finders and hasattr(trainer.fit_loop, "_combined_loader"):
        trainer.fit_loop._combined_loader = None


def refuse_mid_epoch(trainer: Any) -> None:
    """Refuse to go on with a training from inside an epoch where Lightning would read batches twice or never.

    Raises:
        InputError: Lightning is older than 2.5.
    """
    loops = trainer._checkpoint_connector._loaded_checkpoint.get("loops")
    if _VERSION >= (2, 5) or not loops:
        return
    epoch, batch = loops["fit_loop"]["epoch_progress"], loops["fit_loop"]["epoch_loop.batch_progress"]
    if epoch["current"]["processed"] < epoch["current"]["ready"]:
        raise InputError(
            f"pytorch-lightning {pl.__version__} cannot go on from inside an epoch, and the checkpoint was made after "
            f"{batch['current']['ready']} of its batches: install pytorch-lightning>=2.5, or take the checkpoint of an "
            "epoch's end"
        )


# Where a training is


def place_of(module: Any, batch_idx: int) -> tuple[int, int]:
    """Epoch, and the batch's place among those of all processes in it; both 0 without a Trainer."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return 0, 0
    return trainer.current_epoch, batch_idx * trainer.world_size + trainer.global_rank


def has_trainer(module: Any) -> bool:
    """Whether a Trainer runs the module."""
    return getattr(module, "_trainer", None) is not None


def circumstances(module: Any) -> dict[str, Any]:
    """With what and on which data a module is trained, and how good it is now, for whoever gets the checkpoint.

    Returns:
        Plain values: ``"versions"`` by package; with a Trainer ``"training"``, its length, precision and optimiser;
        ``"metrics"``, those of the last validation and test by name; and ``"data"``, the data module's class, its
        plain options without paths, which are the machine's own, and what its inputs and classes mean.
    """
    versions = {"distill_lightning": distill_lightning.__version__, "torch": str(torch.__version__)}
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return {"versions": versions}
    metrics = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("val/", "test/")) and value.numel() == 1
    }
    # Indices are for the training alone.
    data = vars(trainer.datamodule or object).get("datamodule", trainer.datamodule)
    options = {} if data is None else {name: vars(data)[name] for name in vars(data).keys() - _OF_LIGHTNING}
    name = f"{type(data).__module__}.{type(data).__qualname__}"
    told = None if data is None else {"class": name, **_plain(options), **_meaning(data)}
    optimizers = [{"class": type(one).__name__, **_plain(one.defaults)} for one in trainer.optimizers]
    training = {"max_epochs": trainer.max_epochs, "precision": str(trainer.precision), "optimizers": optimizers}
    return {"versions": versions, "training": training, "metrics": metrics, "data": told}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and words of some options, in the order of their names."""
    return {
        name: value
        for name, value in sorted(options.items())
        if type(value) in (int, float, bool, str) and not name.startswith("_") and "/" not in str(value)
    }


def _meaning(data: Any) -> dict[str, Any]:
    """Names of the classes, and mean and standard deviation by channel, where a data module has them as attributes."""
    found = {name: getattr(data, name, None) for name in ("class_names", "mean", "std")}
    rows = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in found.items()}
    return {name: row for name, row in rows.items() if row and all(type(one) in (int, float, str) for one in row)}


def begins_anew(trainer: Any) -> bool:
    """Whether the training starts from its beginning, not from a checkpoint."""
    return bool(trainer.fit_loop.total_batch_idx < 0)


def is_last_batch(trainer: Any) -> bool:
    """Whether the training batch that is done is the last of its epoch."""
    # Lightning 1.9 tells only where no limit ends the epoch.
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(trainer.is_last_batch or ready >= trainer.num_training_batches)


def validation_interval(module: Any) -> int:
    """Number of epochs from one validation to the next; 1 where the steps are counted, or without a Trainer."""
    trainer = getattr(module, "_trainer", None)
    return 1 if trainer is None else trainer.check_val_every_n_epoch or 1


def planned_epochs(trainer: Any) -> int | None:
    """``max_epochs`` as the user gave it.

    Where there is BatchNorm, `StochasticWeightAveraging` adds an epoch to it that trains nothing and only measures the
    statistics of the averaged weights.
    """
    epochs: int | None = trainer.max_epochs
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, pl.callbacks.StochasticWeightAveraging):
            # Set when the fit starts, before the module hears of it.
            epochs = getattr(callback, "_max_epochs", epochs)
    return epochs


def planned_steps(module: pl.LightningModule) -> float:
    """Number of optimiser steps of the whole training, or of the phase of it that a schedule is made for.

    Returns:
        Infinity if it has no end, less than 1 if its data have no length.
    """
    # Not an attribute of the module, which would take the Trainer along wherever it is copied to.
    asked = [getattr(callback, "phase_length", None) for callback in cast("Any", module.trainer).callbacks]
    lengths = [length for ask in asked if ask is not None and (length := ask()) is not None]
    steps = lengths[0] if lengths else module.trainer.estimated_stepping_batches
    if module.trainer._checkpoint_connector._loaded_checkpoint:
        # To count the batches, Lightning has begun to read them, before it knows where in its epoch the checkpoint was
        # made: it has to begin once more.
        module.trainer.fit_loop._combined_loader = None
    return steps


def total_steps(module: pl.LightningModule) -> int:
    """As `planned_steps`.

    Raises:
        InputError: the training has no end, or its data have no length.
    """
    steps = planned_steps(module)
    if steps == float("inf"):
        raise InputError("OneCycle needs the length of the training: give the Trainer max_epochs or max_steps")
    if steps < 1:
        raise InputError(
            f"OneCycle needs the length of the training, which comes to {steps} steps: give the Trainer max_steps, or "
            "limit_train_batches where the training data have no length, or OneCycle total_steps"
        )
    return int(steps)


def steps_left(module: pl.LightningModule) -> int | None:
    """Number of optimiser steps to the end of a resumed training, asked when it starts.

    Returns:
        ``None``: it is not resumed, has no length, or a callback divides it into phases.
    """
    trainer = cast("Any", module.trainer)
    phases = [ask for callback in trainer.callbacks if (ask := getattr(callback, "phase_length", None)) is not None]
    batches = trainer.num_training_batches
    if begins_anew(trainer) or any(ask() is not None for ask in phases):
        return None
    left, epochs = math.inf, planned_epochs(trainer)
    if epochs is not None and epochs >= 0 and not math.isinf(batches):
        # Older versions do not go on from inside an epoch.
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready if _VERSION >= (2, 5) else 0
        accumulated = trainer.accumulate_grad_batches
        stepped = math.ceil(begun / accumulated) if begun == batches else begun // accumulated
        left = (epochs - trainer.current_epoch) * math.ceil(batches / accumulated) - stepped
    if trainer.max_steps >= 0:
        left = min(left, trainer.max_steps - trainer.global_step)
    return None if math.isinf(left) else int(left)


def epochs_in(checkpoint: Mapping[str, Any]) -> int | None:
    """The whole epochs of training that a checkpoint was written after; ``None``: a Trainer did not write it.

    Its ``"epoch"`` alone does not tell: in the last batch of the first epoch it is 0, and 1 once the training is over.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return None
    begun, whole = (int(loop["epoch_progress"]["current"][count]) for count in ("ready", "completed"))
    return begun if loop["epoch_loop.batch_progress"]["is_last_batch"] else whole


# Going on from a checkpoint, wherever it was made


def noted_place(module: Any) -> dict[str, Any]:
    """What a checkpoint says, besides Lightning's own progress, of the place in a training at which it was made.

    Returns:
        ``batches``, how the training data come, and ``metrics``, what callbacks and schedules can read; nothing where
        Lightning cannot go on from inside an epoch.
    """
    if _VERSION < (2, 5):
        return {}
    trainer = module.trainer
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    return {"batches": _ways_of_batches(trainer), "metrics": metrics}


def settle_progress(module: Any, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Bring the progress in a checkpoint to one of two forms, between epochs or after a batch, before it is loaded.

    Lightning tells some ten states apart by the differences of its counters, loses a validation or the end of an epoch
    in some, and leaves counters behind in others from which a second resumption goes astray.

    Args:
        module: that is resumed.
        checkpoint: which is changed.

    Returns:
        What `go_on` needs to know; ``None``: no training is resumed.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    fits = has_trainer(module) and module.trainer.state.fn == "fit"
    if not fits or loops is None or not hasattr(module.trainer.fit_loop, "restarted_mid_epoch"):
        return None
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    validated = loops["epoch_loop.val_loop.batch_progress"]
    # A checkpoint is made before a batch that is done, and an epoch, count as completed.
    done, is_ending = batches["current"]["processed"], epochs["current"]["completed"] < epochs["current"]["processed"]
    is_inside = epochs["current"]["started"] > epochs["current"]["processed"] and done > 0
    is_validation_open = batches["current"]["completed"] < done or validated["total"]["completed"] < max(
        validated["total"].values()
    )
    batches["is_last_batch"] &= is_inside and batches["current"]["ready"] == done
    for kind in ("total", "current"):
        batches[kind] = dict.fromkeys(batches[kind], batches[kind]["processed"] if is_inside or kind == "total" else 0)
        before = epochs[kind]["processed"]
        epochs[kind] = dict.fromkeys(epochs[kind], before) | dict.fromkeys(("ready", "started"), before + is_inside)
        # Begun but not done: so Lightning knows that it has to validate.
        begun = int(is_inside and is_validation_open)
        validated[kind] = dict.fromkeys(validated[kind], 0) | dict.fromkeys(("ready", "started"), begun)
    return {"is_ending": is_ending, **checkpoint.get("place", {})}


def go_on(module: Any) -> None:
    """Let a resumed training go on where its checkpoint was made, as if it had not been interrupted.

    After an epoch's last batch what is left of the epoch comes next: its validation, and what happens at its end. In
    the middle of an epoch, loaders without a state give the batches again that were read before, and they are passed
    over, unless their order was drawn.

    Args:
        module: whose training starts; its ``resumed_at``, from `settle_progress`, is used up.

    Raises:
        InputError: in the middle of an epoch, and the training data now come in other batches.
    """
    trainer, place = module.trainer, module.resumed_at
    module.resumed_at = None
    if place is None:
        return
    epoch, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.batch_progress
    metrics = {name: torch.tensor(value) for name, value in place.get("metrics", {}).items()}
    trainer._logger_connector._callback_metrics.update(metrics)
    if progress.current.ready and not progress.is_last_batch:
        _refuse_other_batches(trainer, place, progress.current.ready)
    if progress.current.ready == 0:
        epoch.restarting = False
    elif progress.is_last_batch or progress.current.ready >= trainer.num_training_batches:
        _stand_at_the_end(trainer)
    else:
        _warn_of_gradients(trainer, progress.current.ready)
        _pass_over(trainer, progress.current.ready)
    # By now Lightning knows whether it has to validate; counts that stayed behind would say so once more.
    epoch.val_loop.batch_progress.reset()
    if module.automatic_optimization:
        is_due = progress.current.ready > 0 and epoch._should_check_val_fx(trainer.fit_loop._data_fetcher)
        # A batch that has its validation before it is counted a second time.
        epoch._batches_that_stepped = trainer.global_step - int(is_due and not epoch._should_accumulate())
    _let_schedules_follow(trainer, place)


def _stand_at_the_end(trainer: Any) -> None:
    """An epoch's last batch is done, and no other follows, whatever the loaders say now."""
    progress, batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
    progress.is_last_batch = True
    if not math.isinf(batches):
        progress.current.__dict__.update(dict.fromkeys(vars(progress.current), batches))
    fetcher = trainer.fit_loop._data_fetcher
    fetcher.iterator, fetcher.batches = iter(()), []


def _warn_of_gradients(trainer: Any, begun: int) -> None:
    if begun % trainer.accumulate_grad_batches:
        rank_zero_warn(
            "the checkpoint was made between two optimiser steps, and the gradients that were accumulated for the next "
            "one are not in it: resume from a checkpoint that was made after a step"
        )


def _let_schedules_follow(trainer: Any, place: dict[str, Any]) -> None:
    """Have schedules that follow a metric asked at the end of the epoch; Lightning has no metrics left and does not."""
    fit = trainer.fit_loop
    if "metrics" in place or fit.epoch_loop.batch_progress.current.ready == 0:
        fit._restarting = False
    if "metrics" in place and place["is_ending"]:
        # They come after the callbacks that make checkpoints.
        fit.epoch_progress.current.completed -= 1
        fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        fit.epoch_progress.current.completed += 1


def _ways_of_batches(trainer: Any) -> list[dict[str, int | None]]:
    """How each loader's batches come: samples in one, batches in an epoch, and the processes that share the data."""
    loader = trainer.fit_loop._combined_loader
    return [
        {"size": _batch_size_of(part), "number": _length_of(part), "processes": trainer.world_size}
        for part in ([] if loader is None else loader.flattened)
    ]


def _length_of(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        # As data without a length say.
        return None


def _batch_size_of(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _refuse_other_batches(trainer: Any, place: dict[str, Any], begun: int) -> None:
    now, before = _ways_of_batches(trainer), place.get("batches", [])
    if before and before != now:
        raise InputError(
            f"the checkpoint was made after {begun} batches of an epoch, where the training data came in "
            f"{_described(before)}, and now they come in {_described(now)}: samples would be read twice or never; "
            "resume with the same, or from a checkpoint of an epoch's end"
        )


def _described(ways: list[dict[str, int | None]]) -> str:
    return " and ".join(
        f"{'an unknown number of' if way['number'] is None else way['number']} batches of {way['size'] or '?'} samples "
        f"in {way['processes']} process{'es' if way['processes'] != 1 else ''}"
        for way in ways
    )


def _pass_over(trainer: Any, batches: int) -> None:
    """Have the loaders begin behind some batches of the epoch."""
    fetcher, loaders = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader.flattened
    for loader in loaders:
        if hasattr(loader, "begin_after"):
            # It counts those that were fetched; the last of them may not have been trained on.
            loader.begin_after(batches, epoch=trainer.current_epoch)
    if any(
        isinstance(part, _DRAWING) or hasattr(part, "load_state_dict") for one in loaders for part in drawing_parts(one)
    ):
        return
    for part in (part for loader in loaders for part in drawing_parts(loader)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(trainer.current_epoch)
    # Once more, because workers have begun with the order of another epoch.
    iter(fetcher)
    for _ in range(batches):
        next(fetcher)
    # Lightning adds them.
    fetcher.fetched -= batches


def forget_known_metrics(module: Any) -> None:
    """Have a module look again for the metrics among its attributes, of which it logs no others."""
    module._metric_attributes = None


def summarise_frozen(module: Any, lines: Iterable[str]) -> None:
    """Tell of networks beside the module where Lightning has printed its model summary."""
    if any(isinstance(callback, pl.callbacks.ModelSummary) for callback in module.trainer.callbacks):
        for line in lines:
            rank_zero_info(line)


def summarise_without_metrics(module: Any) -> None:
    """Have the Trainer's model summary leave out metrics, which have neither parameters nor an input.

    Args:
        module: that is about to be summarised.
    """
    summaries: list[Any] = [one for one in module.trainer.callbacks if isinstance(one, pl.callbacks.ModelSummary)]
    for callback in summaries:
        callback._summary = partial(_summary_without_metrics, callback)


def _summary_without_metrics(callback: Any, trainer: Any, module: Any) -> Any:
    summary = type(callback)._summary(callback, trainer, module)
    for name, child in module.named_modules():
        if _is_of_metrics(child):
            summary._layer_summary.pop(name, None)
    return summary


def _is_of_metrics(module: Any) -> bool:
    return any(isinstance(child, Metric) for child in module.modules()) and next(module.parameters(), None) is None


_EVAL_REMARK = re.compile(r"Found .* module.* in eval mode at the start of training", re.IGNORECASE)


def expect_eval_modes() -> None:
    """Until `forget_eval_modes`, do not warn of parts in eval mode: these are frozen, and meant to be in it."""
    warnings.filterwarnings("ignore", message=_EVAL_REMARK.pattern)


def forget_eval_modes() -> None:
    """Warn of others' parts in eval mode again."""
    ours = [one for one in warnings.filters if one[0] == "ignore" and one[1] is not None and one[1] == _EVAL_REMARK]
    for one in ours[:1]:
        cast("list[Any]", warnings.filters).remove(one)


# The Trainer's own batches, for callbacks that look at the data before or after the training


class TrainersBatches:
    """A loader whose batches go the way that the Trainer's own go, through the module's and the data's hooks.

    Args:
        trainer: at work.
        pl_module: whose batches they are.
        loader: one of the Trainer's.
        number: of the loader among those of its kind.
        training: whether the hooks are to see a training or a validation, which is not augmented.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Iterable[Any], *, number: int, training: bool
    ) -> None:
        self.trainer, self.pl_module, self.loader = trainer, pl_module, loader
        self.number, self.training = number, training

    def __iter__(self) -> Iterator[Batch]:
        with self._stage():
            batches = iter(self.loader)
        while True:
            with self._stage():
                batch = next(batches, None)
                if batch is None:
                    return
                prepared = self.pl_module._on_before_batch_transfer(self._converted(batch), dataloader_idx=self.number)
                moved = self.trainer.strategy.batch_to_device(prepared, dataloader_idx=self.number)
            yield Batch.of(moved)

    def _converted(self, batch: Any) -> Any:
        plugin: Any = self.trainer.precision_plugin
        if _VERSION >= (2, 0):
            return plugin.convert_input(batch)
        return apply_to_collection(batch, torch.Tensor, plugin.convert_input) if plugin.precision == "64" else batch

    @contextmanager
    def _stage(self) -> Iterator[None]:
        before = self.trainer.state.stage
        self.trainer.state.stage = (
            type(before).TRAINING if self.training else type(before).VALIDATING  # type: ignore[union-attr]
        )
        try:
            yield
        finally:
            self.trainer.state.stage = before


def repeated_rows(module: Any, batch_idx: int, dataloader_idx: int, rows: int) -> Tensor | None:
    """Which rows of an evaluation's batch a distributed sampler has added, so that all processes have equally many.

    Args:
        module: that is evaluated.
        batch_idx: number of the batch in this process.
        dataloader_idx: number of the loader.
        rows: of the batch.

    Returns:
        bool ``(N,)`` on the host; ``None``: none of them.
    """
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.world_size == 1:
        return None
    evaluation = trainer._evaluation_loop
    loaders = evaluation._combined_loader.flattened if _VERSION >= (2, 0) else evaluation.dataloaders
    loader = loaders[dataloader_idx]
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader if batches is None else batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
        return None
    if type(batches) is not BatchSampler:
        rank_zero_warn(
            f"{sampler.total_size - len(sampler.dataset)} samples are evaluated twice, so that all processes have "  # type: ignore[arg-type]
            "equally many, and with a batch sampler of its own a data set does not tell which: validate and test in "
            "one process (devices=1) for exact metrics"
        )
        return None
    places = sampler.rank + sampler.num_replicas * (batch_idx * batches.batch_size + torch.arange(rows))
    repeated = places >= len(sampler.dataset)  # type: ignore[arg-type]
    return repeated if bool(repeated.any()) else None


def training_loaders(trainer: Any) -> Any:
    """What the data gave a training: a loader, a collection of them, or ``None``."""
    if _VERSION >= (2, 0):
        return trainer.train_dataloader
    # Lightning 1.9 puts them together, and asks for none where no epoch is left.
    if trainer.train_dataloader is None and trainer._data_connector._train_dataloader_source.instance is not None:
        trainer.reset_train_dataloader()
    return getattr(trainer.train_dataloader, "loaders", None)


def validation_loaders(trainer: Any) -> Any:
    """What the data gave a training for its validation: a loader, a collection of them, or ``None``."""
    if trainer.val_dataloaders is None:
        # Without a sanity check, the Trainer asks for them only when it first validates.
        if _VERSION >= (2, 0):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        else:
            trainer.reset_val_dataloader()
    return trainer.val_dataloaders


def watch_first_loader(trainer: Any) -> None:
    """Have schedules that watch a validation metric watch that of the first of several loaders, which have one each."""
    watching = [config for config in getattr(trainer, "lr_scheduler_configs", ()) if config.monitor is not None]
    if not watching:
        return
    validation_loaders(trainer)
    if len(trainer.num_val_batches) > 1:
        for config in watching:
            first = "/dataloader_idx_0"
            if config.monitor.startswith("val/") and not config.monitor.endswith(first):
                config.monitor += first


def step_precision(trainer: Any) -> AbstractContextManager[Any]:
    """The precision in which a Trainer's validation steps compute."""
    context: AbstractContextManager[Any] = trainer.precision_plugin.val_step_context()
    return context


def convert_early(module: Any, networks: Iterable[Any]) -> None:
    """Give networks the precision that a module is about to get, with ``"bf16-true"`` say.

    A Trainer loads a checkpoint before it converts the module.
    """
    plugin = getattr(getattr(module, "_trainer", None), "precision_plugin", None)
    if type(plugin).__name__ in ("HalfPrecision", "DoublePrecision"):
        for network in networks:
            cast("Any", plugin).convert_module(network)


def trains(trainer: Any) -> bool:
    """Whether the batches are trained on.

    In the epoch that `StochasticWeightAveraging` adds, Lightning computes no gradients, but makes a step by those that
    are left of the last batch.
    """
    return not trainer.fit_loop._skip_backward


def scales_gradients(trainer: Any) -> bool:
    """Whether a gradient scaler skips the steps whose gradients are not finite, as with ``precision="16-mixed"``."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def spawns(trainer: Any) -> bool:
    """Whether the Trainer spawns processes, whose changes to the module are lost."""
    return getattr(trainer.strategy, "_start_method", "popen") != "popen"


def drawing_parts(loader: Any) -> Iterator[Any]:
    """A loader and its samplers: what may have an epoch, or a generator of its own."""
    loader = loader.loader if isinstance(loader, TrainersBatches) else loader
    batch_sampler = getattr(loader, "batch_sampler", None)
    for part in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if part is not None:
            yield part


@contextmanager
def undrawn(loader: Any) -> Iterator[None]:
    """Afterwards, put a loader's epoch and generators back to what they were."""
    parts = list(drawing_parts(loader))
    epochs = [(part, part.epoch) for part in parts if hasattr(part, "set_epoch") and hasattr(part, "epoch")]
    generators = [part.generator for part in parts if isinstance(getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for part, epoch in epochs:
            part.set_epoch(epoch)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


# How a Trainer is told that the network it trains has changed


def refuse_reshaping(trainer: Any, name: str) -> None:
    """Refuse a training in which something holds on to the parameters that there were.

    Raises:
        InputError: several processes, or a callback that averages.
    """
    if trainer.world_size > 1:
        raise InputError(
            f"step {name} gives the network other parameters, which several processes cannot agree on: train it in "
            "one (devices=1), or give it at='end'"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGING):
            raise InputError(
                f"step {name} gives the network other parameters, of which {type(callback).__name__} keeps no "
                "average: leave one of them out, or give the step at='end'"
            )


def keep_patience(trainer: Any) -> None:
    """Have no `EarlyStopping` lose its patience as long as there are phases to come; each of them begins at zero."""
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.EarlyStopping):
            # Lightning asks it after all other callbacks: what it counts then must be too little.
            callback.wait_count = -_NEVER_REACHED


def stand_last(trainer: Any, callback: pl.Callback) -> None:
    """Come after the callbacks that write weights, and before those that save them."""
    others = [other for other in trainer.callbacks if other is not callback]
    place = next((n for n, other in enumerate(others) if isinstance(other, pl.callbacks.Checkpoint)), len(others))
    # A new list, because Lightning is walking through the old one.
    trainer.callbacks = [*others[:place], callback, *others[place:]]


def new_optimizer(trainer: pl.Trainer, old: Optimizer, *, restart: bool) -> None:
    """Have the module make its optimiser and schedule for the parameters that there are now."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    trainer.strategy.setup_optimizers(trainer)
    watch_first_loader(trainer)
    if restart:
        return
    for group, before in zip(trainer.optimizers[0].param_groups, old.param_groups, strict=True):
        group.update({name: value for name, value in before.items() if name != "params"})
    for config, schedule in zip(trainer.lr_scheduler_configs, schedules, strict=True):
        config.scheduler.load_state_dict(schedule.state_dict())


def forget_best(trainer: Any) -> None:
    """What was the best so far was another network: whatever comes now is better."""
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.monitor is not None:
            worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.best_k_models = {path: worst.to(score.device) for path, score in callback.best_k_models.items()}
            callback.kth_value = worst
            callback.best_model_score = worst if callback.best_k_models else None
        elif isinstance(callback, pl.callbacks.EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
