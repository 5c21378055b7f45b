"""Inputs beyond the training set, which teachers and student are asked about besides a batch's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.data.samplers import EmpiricalSampler, FunctionSampler, PairSampler, count_rows, take
from distill_lightning.errors import InputError, check_finite
from distill_lightning.layers import fingerprint, structure
from distill_lightning.teachers import About, Frozen

# Keeps the samplers' random numbers apart from those that crop and flip the images of the same views.
_STREAM = 0x45435543


class ExtraInputs(Frozen, About):
    """What some samplers make of each batch, every sampler its share of the rows; the samplers are frozen.

    Args:
        samplers: see `distill_lightning.data.samplers`.
        weights: shares of the samplers in the additional inputs, divided by their sum; ``None``: equal.
        ratio: additional inputs per training input.
        seed: of the samplers' draws.

    Raises:
        InputError: a sampler is no module, or numbers do not fit.
    """

    def __init__(
        self, samplers: Sequence[nn.Module], *, weights: Sequence[float] | None, ratio: float, seed: int
    ) -> None:
        kinds = [type(sampler).__name__ for sampler in samplers if not isinstance(sampler, nn.Module)]
        if kinds:
            raise InputError(f"samplers must be modules, got {', '.join(kinds)}: wrap a function in FunctionSampler")
        count = len(samplers)
        if weights is not None and (len(weights) != count or min(weights) < 0 or not 0 < sum(weights) < math.inf):
            wanted = f"{count} finite numbers, none negative and not all zero"
            raise InputError(f"sampler_weights must be {wanted}, got {weights}")
        check_finite("extra_ratio", ratio)
        if not ratio >= 0:
            raise InputError(f"extra_ratio cannot be negative, got {ratio}")
        super().__init__(samplers)
        self.seed = seed
        self.shares = functional.member_shares(weights, count) if samplers else []
        # A training input once more would say nothing new.
        self.ratio = 0.0 if all(isinstance(sampler, EmpiricalSampler) for sampler in samplers) else ratio

    @torch.no_grad()
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The batch's own inputs, and what each sampler made of them, by name."""
        total = round(self.ratio * batch.size)
        bounds = accumulate((share * total for share in self.shares), initial=0.0)
        found: dict[str, Any] = {"": batch.input}
        for number, (start, end) in enumerate(pairwise(round(bound) for bound in bounds)):
            if end > start:
                found[self.name_of(number)] = self._sampled(batch, number, start, end)
        return found

    def _sampled(self, batch: Batch, number: int, start: int, end: int) -> Any:
        """The additional rows from ``start`` to ``end``, by one sampler."""
        rows, sampler = torch.arange(start, end, device=batch.device), self.networks[number]
        sampled = rows % batch.size
        # Pair samplers mix each row with its partner or, without partners, with rows of the whole batch.
        pool: dict[str, Any] = {}
        if isinstance(sampler, PairSampler) and batch.partner is not None:
            pool = {"pool": take(batch.partner.input, sampled), "paired": True}
        elif isinstance(sampler, PairSampler) and len(rows) % batch.size:
            pool = {"pool": batch.input}
        draws = batch.draws(self.seed + _STREAM, rows=sampled, copies=rows // batch.size)
        return sampler(take(batch.input, sampled), draws, **pool)

    def name_of(self, number: int) -> str:
        """What a sampler is called in logs."""
        kinds = [type(sampler).__name__ for sampler in self.networks]
        name = kinds[number].removesuffix("Sampler").lower()
        return name if kinds.count(kinds[number]) == 1 else f"{name}_{number}"

    def check_storable(self, batch: Batch, inputs: Mapping[str, Any]) -> None:
        """Refuse inputs that no store can reproduce.

        Raises:
            InputError: a sampler's inputs are no functions of the rows' indices and views, or not as many as rows.
        """
        paired = [type(sampler).__name__ for sampler in self.networks if isinstance(sampler, PairSampler)]
        if paired and batch.partner is None:
            raise InputError(
                f"{paired[0]} finds a row's partner in its batch, which no store can reproduce: give the data module "
                "partners=True"
            )
        if any(isinstance(sampler, FunctionSampler) for sampler in self.networks):
            raise InputError(
                "no store can tell whether FunctionSampler's function is unchanged: make it a sampler of its own, an "
                "nn.Module whose extra_repr tells its options"
            )
        for name, values in inputs.items():
            if count_rows(values) % batch.size:
                raise InputError(
                    f"a store needs as many rows of each sampler as the batch has, or a multiple, and {name} makes "
                    f"{count_rows(values)} of {batch.size}: set extra_ratio to the number of samplers"
                )

    def describe(self) -> dict[str, Any]:
        """Samplers, shares, ratio and seed."""
        samplers = nn.ModuleList(self.networks)
        told = f"{fingerprint(samplers)} {structure(samplers)} {self.shares}"
        return {"samplers": told, "seed": self.seed, "extra_ratio": self.ratio}

    def fingerprints(self, name: str) -> dict[str, str]:
        """Samplers without weights differ in kind and options."""
        samplers = nn.ModuleList(self.networks)
        return {name: f"{fingerprint(samplers)} {structure(samplers)}"} if self.networks else {}

    def counts(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Rows of each of `inputs`, the batch's own as ``real``."""
        return {name or "real": count_rows(values) for name, values in inputs.items()}
