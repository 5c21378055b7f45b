"""Inputs beyond the training set for one batch: every sampler gets its own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.data.samplers import FunctionSampler, Inputs, PairSampler, count_rows, take
from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError


@torch.no_grad()
def extra_inputs(
    samplers: nn.ModuleList,
    shares: Sequence[float],
    total: int,
    batch: Batch,
    draws: Callable[[Tensor, Tensor], Draws],
) -> dict[str, Inputs]:
    """What each sampler makes of a batch, by name.

    Args:
        samplers: in their order.
        shares: of the samplers in the rows that are wanted; they sum to 1.
        total: number of rows that are wanted.
        batch: what they are made of.
        draws: gives the random numbers of some of the batch's rows, each with the number of its copy.
    """
    device = device_of(batch.input)
    bounds = accumulate((share * total for share in shares), initial=0.0)
    extras: dict[str, Inputs] = {}
    for number, (start, end) in enumerate(pairwise(round(bound) for bound in bounds)):
        if end == start:
            continue
        rows = torch.arange(start, end, device=device)
        sampled, sampler = rows % batch.size, samplers[number]
        # What mixes two inputs finds the second beside the first, or else, where it has some rows alone, among all.
        pool: dict[str, Any] = {}
        if isinstance(sampler, PairSampler) and batch.partner is not None:
            pool = {"pool": take(batch.partner.input, sampled), "paired": True}
        elif isinstance(sampler, PairSampler) and len(rows) % batch.size:
            pool = {"pool": batch.input}
        inputs: Any = take(batch.input, sampled)
        extras[sampler_name(samplers, number)] = sampler(inputs, draws(sampled, rows // batch.size), **pool)
    return extras


def sampler_name(samplers: nn.ModuleList, number: int) -> str:
    """What a sampler is called in logs."""
    name = type(samplers[number]).__name__.removesuffix("Sampler").lower()
    names = [type(sampler).__name__ for sampler in samplers]
    return name if names.count(type(samplers[number]).__name__) == 1 else f"{name}_{number}"


def storable_names(samplers: nn.ModuleList, batch: Batch, extras: Mapping[str, Inputs]) -> list[str]:
    """A name for each ``N`` additional inputs, whose row ``i`` belongs to the batch's row ``i``.

    Raises:
        InputError: a sampler's inputs are no functions of the rows' indices and views.
    """
    paired = [type(sampler).__name__ for sampler in samplers if isinstance(sampler, PairSampler)]
    if extras and paired and batch.partner is None:
        raise InputError(
            f"{paired[0]} finds a row's partner in its batch, which no store can know again: give the data module "
            "partners=True"
        )
    if any(isinstance(sampler, FunctionSampler) for sampler in samplers):
        raise InputError(
            "a store cannot know FunctionSampler's function again: make it a sampler of its own, an nn.Module whose "
            "extra_repr tells its options"
        )
    names = []
    for name, inputs in extras.items():
        copies, rest = divmod(count_rows(inputs), batch.size)
        if rest:
            raise InputError(
                f"a store needs as many rows of each sampler as the batch has, or a multiple, and {name} makes "
                f"{count_rows(inputs)} of {batch.size}: set extra_ratio to the number of samplers"
            )
        names += [f"{name}_{copy}" for copy in range(copies)]
    return names


def device_of(inputs: Any) -> torch.device:
    """Where a batch's inputs are."""
    first = inputs
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return first.device
