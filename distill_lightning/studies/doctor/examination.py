"""The examination itself: a few batches of a validation and of a training, of which nothing is left."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError, in_a_line
from distill_lightning.layers import fingerprint
from distill_lightning.modules import DistillationModule
from distill_lightning.modules.parts.past import RunningStore
from distill_lightning.studies.doctor import checks
from distill_lightning.studies.doctor.findings import Finding, Report
from distill_lightning.studies.doctor.keys import Keys
from distill_lightning.studies.doctor.watch import EnoughError, Watch
from distill_lightning.teachers import Frozen, TeacherStore

_LABELS = 2048
"""Training samples whose labels are read where the data set does not tell all of them."""

_FILES = 20_000
"""Training samples up to which all files are read."""


def examine(
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    *,
    trainer: pl.Trainer | None = None,
    steps: int = 5,
    scored: int = 512,
    copies: bool = True,
) -> Report:
    """Look at a training before hours are spent on it.

    A copy of the module is validated on a few batches and trained for a few steps. Nothing is left of that: no file, no
    answer in a store, and the module's weights are what they were.

    Args:
        module: a method of this package, or any other LightningModule.
        datamodule: its data.
        trainer: that is meant for the training; its loggers, callbacks and profiler are left out meanwhile, and it
            cannot go on with another training's state afterwards. ``None``: one of a single epoch on whatever there is.
        steps: training steps that are timed, after two others.
        scored: validation samples that the teachers are scored on.
        copies: whether the module is copied; ``False`` saves its memory, and leaves it trained for a few steps.

    Returns:
        What was found; ``report.is_well``, ``report.rows()``.

    Raises:
        InputError: the Trainer runs several processes.
    """
    trainer = trainer or pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1
    )
    if trainer.world_size > 1:
        raise InputError(
            f"doctor looks at one process, and the Trainer has {trainer.world_size}: give one with devices=1"
        )
    patient = copy.deepcopy(module) if copies else module
    device = trainer.strategy.root_device
    drawing = [device] if device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=drawing):
        leave_no_trace(patient, folder)
        watch = Watch(patient, steps=steps, scored=scored)
        with _alone(trainer, watch), watch.hooked(patient):
            return _report(patient, datamodule, trainer, watch)


def leave_no_trace(module: Any, folder: str) -> None:
    """Have what a module keeps in files stay out of them, or go to a folder that will be removed.

    Args:
        module: that will be trained for a few steps.
        folder: the folder.
    """
    for part in vars(module).values():
        if isinstance(getattr(part, "store", None), TeacherStore):
            part.store.is_read_only = True
        if isinstance(part, RunningStore):
            part.options = dataclasses.replace(part.options, folder=folder)


@contextmanager
def _alone(trainer: Any, watch: Watch) -> Iterator[None]:
    """Within it, the Trainer has no other callback, and nothing that writes."""
    names = ("callbacks", "loggers", "profiler", "num_sanity_val_steps")
    before = {name: getattr(trainer, name) for name in names}
    trainer.callbacks, trainer.loggers, trainer.profiler = [watch], [], PassThroughProfiler()
    # What a sanity check would run was validated before.
    trainer.num_sanity_val_steps = 0
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def _report(module: Any, data: Any, trainer: Any, watch: Watch) -> Report:
    keys = Keys(module, data)
    frozen = _fingerprints(module)
    failures: list[Finding] = []
    has_validation = (
        is_overridden("val_dataloader", data)
        and is_overridden("validation_step", module)
        and getattr(data, "val_size", None) != 0
    )
    if has_validation:
        run = lambda: trainer.validate(module, datamodule=data, verbose=False)  # noqa: E731
        failures += _failure("validation", run, keys)
    failures += _failure("training", lambda: trainer.fit(module, datamodule=data), keys)
    failures = [one for n, one in enumerate(failures) if one.found not in [other.found for other in failures[:n]]]
    given = getattr(getattr(module, "teachers", None), "store", None)
    findings = [
        *failures,
        checks.shapes(watch),
        checks.normalisation(watch.channels, keys, are_images=watch.image_type is not None),
        _classes(module, data, keys),
        _files(data),
        *(checks.teachers(watch, keys) if has_validation else [Finding("teachers", "no validation to score them on")]),
        *checks.unchanged(frozen, _fingerprints(module), keys),
        checks.taps(watch, keys, reads_store=given is not None),
        checks.optimiser(watch, _optimiser_key(module, keys)),
        checks.store(watch, given, keys.model("teachers", "teacher")),
        *checks.costs(watch, epochs=trainer.max_epochs, steps=trainer.max_steps),
    ]
    return Report(tuple(findings))


def _failure(check: str, run: Callable[[], Any], keys: Keys) -> list[Finding]:
    """What stopped a validation or a training, if it was not the watch."""
    try:
        run()
    except EnoughError:
        pass
    except (InputError, MisconfigurationException) as error:
        message = in_a_line(error)
        if message.startswith(("the store ", "there is no store ", "a TeacherStore ")):
            return [Finding("store", message, f"{keys.model('teachers', 'teacher')}.init_args.path", _end_of(message))]
        return [Finding(check, message, keys.said_in(message), _end_of(message))]
    return []


def _end_of(message: str) -> str:
    """The way out, which a message ends with."""
    return message.rpartition(": ")[2]


def _fingerprints(module: Any) -> dict[str, str]:
    parts = {name: part for name, part in vars(module).items() if isinstance(part, Frozen) and part.networks}
    return {name: fingerprint(nn.ModuleList(part.networks)) for name, part in parts.items()}


def _optimiser_key(module: Any, keys: Keys) -> str:
    """Where parameters are left out: the class's own groups, or an optimiser that does not take them."""
    own = [name for name in ("parameter_groups", "configure_optimizers") if not _is_the_bases(module, name)]
    return "model.class_path" if own else keys.model("optimizer")


def _is_the_bases(module: Any, name: str) -> bool:
    return getattr(type(module), name, None) is getattr(DistillationModule, name)


def _classes(module: Any, data: Any, keys: Keys) -> Finding:
    try:
        labels, is_all = _labels(data.train_dataloader())
    except InputError as error:
        return Finding("classes", str(error), keys.said_in(str(error)), _end_of(str(error)))
    return checks.class_counts(labels, getattr(module, "num_classes", None), keys, is_all=is_all)


def _labels(loader: Any) -> tuple[Tensor | None, bool]:
    """The classes of the training samples, and whether these are all; ``None``: the targets are not one class each."""
    dataset = getattr(loader, "dataset", None)
    targets = getattr(getattr(dataset, "files", dataset), "targets", None)
    if targets is not None:
        return _as_classes(torch.as_tensor(targets)), True
    found: list[Tensor] = []
    for batch in loader:
        classes = _as_classes(Batch.of(batch).target)
        if classes is None:
            return None, False
        found.append(classes)
        if sum(map(len, found)) >= _LABELS:
            return torch.cat(found), False
    return (torch.cat(found) if found else None), True


def _as_classes(target: Any) -> Tensor | None:
    is_of_classes = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
    return target.long() if is_of_classes else None


def _length(data: Any) -> int:
    try:
        return len(data.train_dataloader().dataset)
    except (AttributeError, TypeError, NotImplementedError):
        # Without a length there is no telling how long it would take.
        return _FILES + 1


def _files(data: Any) -> Finding:
    """Damaged files, where the data module can look for them with ``check()``."""
    check = getattr(data, "check", None)
    if check is None:
        return Finding("files", "the data module has no check() of its files")
    count = _length(data)
    if count > _FILES:
        return Finding("files", "there are too many to read here: call the data module's check()")
    way_out = "mend these files or take them out of the folder"
    try:
        damaged = list(check() or ())
    except InputError as error:
        return Finding("files", str(error), "data", way_out)
    if damaged:
        return Finding("files", f"{len(damaged)} are damaged: {', '.join(map(str, damaged[:3]))}", "data", way_out)
    return Finding("files", "none is damaged")
