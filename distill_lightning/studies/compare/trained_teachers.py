"""Teachers that were trained before the comparison: that they are, and that they stay the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill_lightning.errors import InputError
from distill_lightning.layers import same_bits
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.runs import Run


def refuse_untrained(experiment: Experiment) -> None:
    """Refuse networks that are given as trained teachers, and have other weights each time they are built.

    Raises:
        InputError: one has.
    """
    for number in range(1, len(experiment.config.teachers.given or ()) + 1):
        states = []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                # torch.manual_seed would seed the GPUs, too.
                torch.default_generator.manual_seed(seed)
                states.append(experiment.teacher(number).state_dict())
        if not _same(*states):
            name = type(experiment.teacher(number)).__name__
            raise InputError(
                f"teachers.{number - 1} is to be trained already, and this {name} begins with random weights: give it "
                "those of a file, {class_path: Pretrained, init_args: {network: ..., checkpoint: ...}}, or let compare "
                "train teachers, {network: ..., number: ...}"
            )


def refuse_other_teachers(experiment: Experiment, runs: Sequence[Run]) -> None:
    """Refuse trained teachers that are not those any more that a folder's runs have learnt from.

    Raises:
        InputError: one has other weights now.
    """
    for run in runs:
        if run.is_given and run.is_finished:
            state = experiment.teacher(run.number).state_dict()
            if not _same({name: value.cpu() for name, value in state.items()}, load_file(run.student_file)):
                raise InputError(
                    f"teachers.{run.number - 1} has other weights than when {run.folder} was made: give another folder "
                    "with --output, or make the runs again with --anew"
                )


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(value, other[name]) for name, value in one.items())
