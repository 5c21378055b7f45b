"""Which inputs the teachers are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill_lightning.data.batch import Batch
from distill_lightning.data.samplers import count_rows
from distill_lightning.errors import InputError


class About:
    """Which inputs the teachers are asked about; here, a batch's own."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Inputs by name, the batch's own first, under the empty name."""
        return {"": batch.input}

    def check_storable(self, batch: Batch, inputs: Mapping[str, Any]) -> None:
        """Refuse inputs that are not functions of the rows' indices and views.

        Raises:
            InputError: some are not.
        """

    def suffixes(self, batch: Batch, inputs: Mapping[str, Any]) -> list[str]:
        """What stands behind an answer's name for each ``N`` rows of the inputs; behind a batch's own, nothing.

        Raises:
            InputError: as `check_storable`; or the batch's own inputs were mixed with one another.
        """
        if batch.mixture is not None and batch.partner is None:
            raise InputError(
                "a TeacherStore keeps what is said about each sample, and these were mixed with others of their batch: "
                "give the data module partners=True"
            )
        extra = {name: count_rows(values) // batch.size for name, values in inputs.items() if name}
        if extra:
            self.check_storable(batch, inputs)
        return ["", *(f"_{name}_{copy}" for name, copies in extra.items() for copy in range(copies))]

    def describe(self) -> dict[str, Any]:
        """Plain values of everything that the other inputs depend on."""
        return {}


def split_rows(answers: Mapping[str, Tensor], suffixes: list[str], size: int) -> dict[str, Tensor]:
    """Answers about several inputs as answers about a sample each, ``(N, ...)``, which a store can keep."""
    return {
        f"{name}{suffix}": rows
        for name, whole in answers.items()
        for suffix, rows in zip(suffixes, torch.split(whole, size), strict=True)
    }


def join_rows(answers: Mapping[str, Tensor], suffixes: list[str]) -> dict[str, Tensor]:
    """What `split_rows` was given."""
    if len(suffixes) == 1:
        return dict(answers)
    names = [name for name in answers if not name.endswith(tuple(suffixes[1:]))]
    return {name: torch.cat([answers[f"{name}{suffix}"] for suffix in suffixes]) for name in names}
