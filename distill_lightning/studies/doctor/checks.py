"""What is made of what was seen: a finding for each check, with the key to change where something is wrong."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_lightning.functional import chance_agreement
from distill_lightning.studies.doctor.findings import Finding
from distill_lightning.studies.doctor.keys import Keys
from distill_lightning.studies.doctor.watch import Channels, Heard, Watch

_FEWEST = 30
"""Samples below which a score says nothing about chance."""

_DEVIATIONS = 3
"""Standard deviations of a binomial distribution by which a teacher has to be better than chance."""

_FARTHEST = 2.65
"""The largest mean of white images under ImageNet's normalisation, which networks that were trained so ask for."""

_SHOWN = 4


def shapes(watch: Watch) -> Finding:
    """What the networks read and give."""
    found = "; ".join(f"{name} {shape}" for name, shape in watch.shapes.items()) or "no batch was seen"
    if watch.image_type is not None and not watch.image_type.is_floating_point:
        name = str(watch.image_type).removeprefix("torch.")
        return Finding("shapes", found, "data", f"images are {name}: let the data module convert them to float32")
    return Finding("shapes", found)


def normalisation(seen: Channels, keys: Keys, *, are_images: bool) -> Finding:
    """Mean and standard deviation of each channel of what the networks read."""
    if not seen.count:
        return Finding("normalisation", "the inputs are no floating-point numbers")
    mean, std = seen.mean.tolist(), seen.std.tolist()
    found = f"mean {_numbers(mean)}, std {_numbers(std)} by channel, from {seen.low:.3g} to {seen.high:.3g}"
    if not are_images:
        found = f"mean {_numbers([sum(mean) / len(mean)])}, from {seen.low:.3g} to {seen.high:.3g}"
        return Finding("normalisation", found)
    off = max(map(abs, mean)) > _FARTHEST or not all(0.1 <= one <= 4 for one in std)
    if off or (seen.low >= 0 and seen.high <= 1):
        way_out = "the images are not normalised: give their own mean and std, so that they have 0 and 1"
        return Finding("normalisation", found, keys.data("mean", "std"), way_out)
    return Finding("normalisation", found)


def class_counts(labels: Tensor | None, num_classes: int | None, keys: Keys, *, is_all: bool) -> Finding:
    """How many training samples each class has.

    Args:
        labels: int64 ``(N,)``; ``None``: the targets are not one class each.
        num_classes: that there should be; ``None``: it is not known.
        keys: of the configuration.
        is_all: whether these are all labels of the training set.
    """
    if labels is None:
        return Finding(
            "classes", "the targets, token ids or numbers or boxes, are not one class for each sample: none are counted"
        )
    labels = labels[labels >= 0]
    counts = torch.bincount(labels, minlength=num_classes or 0).tolist()
    among = f"{len(labels):,} samples" if is_all else f"{len(labels):,} samples looked at"
    if not counts:
        return Finding("classes", "no label was seen")
    found = f"{min(counts):,} to {max(counts):,} of {among} in each of {len(counts)} classes"
    missing = [number for number, count in enumerate(counts) if not count]
    # Of some of the samples a rare class may be missing by chance.
    if missing and (is_all or len(labels) >= 20 * len(counts)):
        found = f"none of {among} is of {_classes(missing)} of {len(counts)}"
        way_out = (
            "let the training set have samples of every class, or leave the class out: students never learn what is "
            "not there"
        )
        return Finding("classes", found, keys.data("subset"), way_out)
    return Finding("classes", found)


def teachers(watch: Watch, keys: Keys) -> Iterator[Finding]:
    """Each frozen teacher's score on validation samples."""
    if not watch.teachers:
        yield Finding("teachers", "no network is frozen")
    for heard in watch.teachers:
        yield _teacher(heard, keys.model("teachers", "teacher"), watch.scored_samples)


def _teacher(heard: Heard, key: str, samples: int) -> Finding:
    where = f"{key}, {heard.name}"
    if heard.is_constant and samples > 1:
        way_out = "its output does not depend on its input: give its trained weights, or another network"
        return Finding("teachers", f"{heard.name}: the same output for {samples} inputs", where, way_out)
    if not heard.targets:
        return Finding("teachers", f"{heard.name}: no labels to score it by")
    answers, targets = torch.cat(heard.answers), torch.cat(heard.targets)
    score = _regression if targets.is_floating_point() else _classification
    if not targets.is_floating_point() and answers.shape != targets.shape:
        return Finding("teachers", f"{heard.name}: its outputs are not of the labels' classes")
    found, is_chance = score(answers, targets)
    if len(targets) < _FEWEST:
        return Finding("teachers", f"{heard.name}: {found}, too few to tell")
    if is_chance:
        way_out = (
            "it is no better than chance, or too little to tell: give the checkpoint of its training and the "
            "normalisation of that, or train it longer"
        )
        return Finding("teachers", f"{heard.name}: {found}", where, way_out)
    return Finding("teachers", f"{heard.name}: {found}")


def _classification(answers: Tensor, targets: Tensor) -> tuple[str, bool]:
    count, accuracy = len(targets), float((answers == targets).float().mean())
    chance = float(chance_agreement(answers, targets))
    deviation = math.sqrt(chance * (1 - chance) / count)
    found = f"accuracy {accuracy:.3f} of {count} validation samples (chance: {chance:.3f})"
    return found, accuracy <= chance + _DEVIATIONS * deviation


def _regression(answers: Tensor, targets: Tensor) -> tuple[str, bool]:
    means = answers[:, : targets.shape[1]]
    error = float((means - targets).square().sum(1).mean().sqrt())
    spread = float((targets - targets.mean(0)).square().sum(1).mean().sqrt())
    found = f"error {error:.3g} (root mean square) of {len(targets)} validation samples (their mean's: {spread:.3g})"
    return found, error >= spread


def unchanged(before: dict[str, str], after: dict[str, str], keys: Keys) -> list[Finding]:
    """Whether frozen networks are, after some steps, what they were."""
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    way_out = "the steps change them: give the student a network of its own, a copy.deepcopy of it"
    return [Finding("teachers", f"{name} changed", keys.model("teachers", "teacher"), way_out) for name in changed]


def taps(watch: Watch, keys: Keys, *, reads_store: bool) -> Finding:
    """Which tapped layers ran in the training step, and what they gave."""
    wanted = [f"{name} {layer}" for name, tap in watch.taps.items() for layer in tap.layers]
    if not wanted:
        return Finding("taps", "no layer is tapped")
    silent = [name for name in wanted if name not in watch.fired]
    # A store answers in the teachers' place.
    silent = [name for name in silent if not (reads_store and name.startswith("teacher"))]
    found = "; ".join(f"{name} {shape}" for name, shape in watch.fired.items())
    if silent and watch.clock.laps:
        names = ("teacher_layers", "layers") if silent[0].startswith("teacher") else ("student_layer", "layers")
        return Finding("taps", f"silent: {_some(silent)}", keys.model(*names, "student_layer"), "tap layers that run")
    return Finding("taps", found or "no step was made")


def optimiser(watch: Watch, key: str) -> Finding:
    """Whether every parameter that learns is in a group of the optimiser."""
    if watch.uncovered is None:
        return Finding("optimiser", "no optimiser was made")
    if watch.uncovered:
        names = _some(watch.uncovered)
        way_out = (
            f"{names} would not be trained: let parameter_groups() (or configure_optimizers()) hold them, or set their "
            "requires_grad to False"
        )
        return Finding("optimiser", f"in no group: {names}", key, way_out)
    unreached = f"; no gradient reaches {_some(watch.unreached)}" if watch.unreached else ""
    return Finding("optimiser", f"all {watch.learning:,} parameters that learn are in its groups{unreached}")


def store(watch: Watch, given: Any, key: str) -> Finding:
    """Whether a store of answers fits, and how much of it there is."""
    if given is None:
        return Finding("store", "there is none")
    if watch.store_state is None:
        return Finding("store", f"{given.path} was not read")
    answers, wanted, is_complete = watch.store_state
    found = f"{given.path}: {answers:,} of {wanted:,} answers, made by these teachers and data"
    if is_complete:
        return Finding("store", f"{found}; complete")
    if given.fill == "never" or given.networks is None:
        way_out = "nobody fills it: run 'distill-lightning record', or give networks and fill: online"
        return Finding("store", found, f"{key}.init_args.{'fill' if given.fill == 'never' else 'networks'}", way_out)
    return Finding("store", f"{found if answers else f'{given.path} is empty'}; the training fills it")


def costs(watch: Watch, *, epochs: int | None, steps: int | None) -> Iterator[Finding]:
    """Estimated time of an epoch, and the memory that there was at most."""
    step, val_step = watch.clock.seconds, watch.val_clock.seconds
    if step is None:
        yield Finding("time", "no step was made")
        return
    train, val = step * watch.batches, (val_step or 0.0) * watch.val_batches
    found = f"{f'{1000 * step:.3g} ms' if step < 1 else _duration(step)} a step"
    if math.isfinite(train):
        found += f", {int(watch.batches):,} steps and the validation: {_duration(train + val)} an epoch"
        length = epochs if epochs is not None and epochs >= 0 else None
        if length is not None:
            found += f", {_duration(length * (train + val))} for {length}"
    if steps is not None and steps >= 0:
        found += f", {_duration(steps * step)} for {steps:,} steps"
    yield Finding("time", found)
    if watch.memory:
        yield Finding("memory", f"{watch.memory / 2**20:,.0f} MiB of the GPU at most")
    elif sys.platform != "win32":
        yield Finding("memory", f"{_resident() / 2**20:,.0f} MiB of this process at most")


def _resident() -> int:
    import resource  # noqa: PLC0415  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:_SHOWN])
    return shown if len(values) <= _SHOWN else f"{shown}, ..."


def _classes(numbers: Sequence[int]) -> str:
    return f"{'class' if len(numbers) == 1 else 'classes'} {_some(list(map(str, numbers)))}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
