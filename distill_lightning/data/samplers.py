"""Where inputs beyond the training set come from: approximations of the data's distribution.

A sampler makes new inputs from those of a batch, without labels. Whatever it draws comes from the rows' own
`distill_lightning.data.views.Draws`, so a run can be resumed, repeated and spread over processes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from distill_lightning.data.batch import first_tensor, map_tensors
from distill_lightning.data.mixing import beta_quantiles, beta_shares, cutmix_inputs, mixup_inputs
from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError
from distill_lightning.layers import freeze

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a network reads: a tensor, or several with one row per sample each (an image and a head pose, say)."""

InputsT = TypeVar("InputsT", bound=Inputs)


class Sampler(Protocol):
    """Makes inputs from a batch's inputs; a function with this signature becomes one by `FunctionSampler`.

    It runs without a graph.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import FunctionSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> def negative(inputs, draws):
        ...     return -inputs
        >>> FunctionSampler(negative)(torch.ones(3, 1), draws).tolist()
        [[-1.0], [-1.0], [-1.0]]
    """

    def __call__(self, inputs: Inputs, draws: Draws) -> Inputs:
        """New inputs, as many rows as ``draws`` has, of the batch's shapes and dtypes; the batch's are not changed."""


class Mixed(NamedTuple):
    """Inputs that were mixed from two rows of a batch.

    Attributes:
        inputs: the mixed inputs, ``(S, ...)``.
        first: which row of the batch each began as, int64 ``(S,)``.
        second: which row of the batch, or of the ``pool``, was mixed in, int64 ``(S,)``.
        share: the part of the first in it, ``(S,)``.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import MixupSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> mixed = MixupSampler().mix(torch.tensor([[0.0], [1.0], [2.0]]), draws)
        >>> mixed.first, mixed.second
        (tensor([0, 1, 2]), tensor([2, 0, 1]))
        >>> mixed.share
        tensor([0.1881, 0.6900, 0.5687])
    """

    inputs: Inputs
    first: Tensor
    second: Tensor
    share: Tensor


class EmpiricalSampler(nn.Module):
    """The batch itself: the training set is the approximation, as in standard knowledge distillation.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import EmpiricalSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> EmpiricalSampler()(torch.tensor([[5.0], [6.0]]), draws).tolist()
        [[5.0], [6.0], [5.0]]
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, inputs: Inputs, draws: Draws) -> Inputs:
        """The batch's rows, repeated or cut to the number of ``draws``."""
        rows = torch.arange(len(draws), device=draws.index.device) % count_rows(inputs)
        return take(inputs, rows)


class PairSampler(nn.Module):
    """Mixes each row with another of the batch; the share is drawn from Beta(alpha, alpha), one for each row.

    A subclass defines `blend`.

    Args:
        alpha: of the Beta distribution that the share is drawn from; 1 is uniform.

    Raises:
        InputError: ``alpha`` is not positive and finite.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import PairSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> class Halves(PairSampler):
        ...     def blend(self, first, second, share, draws):
        ...         return (first + second) / 2, torch.full_like(share, 0.5)
        >>> Halves()(torch.tensor([[0.0], [1.0], [2.0]]), draws).tolist()
        [[1.0], [0.5], [1.5]]
    """

    quantiles: Tensor

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not 0 < alpha < math.inf:
            raise InputError(f"{type(self).__name__}: alpha must be positive and finite, got {alpha}")
        self.alpha = alpha
        self.register_buffer("quantiles", beta_quantiles(alpha), persistent=False)

    def extra_repr(self) -> str:
        """For the printed module."""
        return f"alpha={self.alpha}"

    def mix(self, inputs: Inputs, draws: Draws, *, pool: Inputs | None = None, paired: bool = False) -> Mixed:
        """Mixed inputs, with what they were mixed from.

        Args:
            inputs: of the batch, ``(N, ...)`` each; several are mixed with the same rows and shares.
            draws: of the ``S`` rows that are wanted; row ``i`` begins as the batch's row ``i mod N``.
            pool: where the rows that are mixed in are taken from; ``None``: the batch.
            paired: whether the pool's row ``i mod N`` is what is mixed into row ``i``.
        """
        pool = inputs if pool is None else pool
        count = count_rows(inputs)
        first = torch.arange(len(draws), device=draws.index.device) % count
        second = first if paired else _partners(draws, count_rows(pool))
        share = beta_shares(self.quantiles, draws.uniform(1)[:, 0])
        mixed, share = self.blend(take(inputs, first), take(pool, second), share, draws)
        return Mixed(mixed, first, second, share)

    def blend(self, first: Inputs, second: Inputs, share: Tensor, draws: Draws) -> tuple[Inputs, Tensor]:
        """Mixed inputs, and the share of ``first`` that is really in them."""
        raise NotImplementedError(f"{type(self).__name__} must define blend(first, second, share, draws)")

    def forward(self, inputs: Inputs, draws: Draws, **pool: Any) -> Inputs:
        """The mixed inputs alone; arguments as `mix`'s."""
        return self.mix(inputs, draws, **pool).inputs


class MixupSampler(PairSampler):
    """Mixup of two rows, see `distill_lightning.data.mixing.mixup`; every tensor of the inputs is mixed alike.

    Args:
        alpha: of the Beta distribution that the share is drawn from; 1 is uniform.

    Raises:
        InputError: ``alpha`` is not positive and finite, or, when called, an input holds whole numbers.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import MixupSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> MixupSampler()(torch.tensor([[0.0], [1.0], [2.0]]), draws)
        tensor([[1.6239],
                [0.6900],
                [1.5687]])
    """

    def blend(self, first: Inputs, second: Inputs, share: Tensor, draws: Draws) -> tuple[Inputs, Tensor]:
        """Linear interpolation."""
        return mixup_inputs(first, second, share), share


class CutMixSampler(PairSampler):
    """CutMix of two rows, see `distill_lightning.data.mixing.cutmix`; inputs that are not images are mixed linearly.

    Args:
        alpha: of the Beta distribution that the share is drawn from; 1 is uniform.

    Raises:
        InputError: ``alpha`` is not positive and finite, or, when called, none of the inputs is an image.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import CutMixSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> CutMixSampler()(torch.rand(3, 1, 8, 8), draws).shape
        torch.Size([3, 1, 8, 8])
    """

    def blend(self, first: Inputs, second: Inputs, share: Tensor, draws: Draws) -> tuple[Inputs, Tensor]:
        """One rectangle of the second image in the first."""
        return cutmix_inputs(first, second, share, draws.uniform(2).float())


class GeneratorSampler(nn.Module):
    """Inputs from a trained generator, ``G(z)`` with ``z`` from a standard normal distribution.

    The generator must give what the student reads: the range and normalisation of the training inputs. A frozen copy of
    it is used, so the generator itself can be trained on.

    Args:
        generator: maps ``(N, latent_dim)`` to inputs ``(N, ...)``.
        latent_dim: length of ``z``.

    Raises:
        InputError: ``latent_dim`` is not positive, or, when called, the generator's outputs are not shaped like the
            batch's inputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.data.samplers import GeneratorSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> generator = nn.Linear(2, 5)
        >>> GeneratorSampler(generator, latent_dim=2)(torch.rand(3, 5), draws).shape
        torch.Size([3, 5])
    """

    def __init__(self, generator: nn.Module, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise InputError(f"GeneratorSampler: latent_dim must be at least 1, got {latent_dim}")
        self.generator = freeze(copy.deepcopy(generator))
        self.latent_dim = latent_dim

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (nn.Module's signature)
        """The generator stays in eval mode."""
        super().train(mode)
        self.generator.eval()
        return self

    def forward(self, inputs: Inputs, draws: Draws) -> Inputs:
        """As many samples as ``draws`` has rows."""
        if not isinstance(inputs, Tensor):
            raise InputError(
                "GeneratorSampler makes one tensor, but the batch's inputs are several: use FunctionSampler(function)"
            )
        sample: Tensor = self.generator(draws.normal(self.latent_dim).to(inputs.dtype))
        if sample.shape[1:] != inputs.shape[1:]:
            raise InputError(
                f"the generator makes inputs of shape {tuple(sample.shape[1:])}, the data's have "
                f"{tuple(inputs.shape[1:])}: train one on the same data"
            )
        return sample.to(inputs.dtype)


class FunctionSampler(nn.Module):
    """Any function ``(inputs, draws) -> inputs`` as a sampler.

    Args:
        function: as `Sampler`.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import FunctionSampler
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> FunctionSampler(lambda inputs, draws: inputs + 1)(torch.zeros(3, 1), draws).tolist()
        [[1.0], [1.0], [1.0]]
    """

    def __init__(self, function: Callable[[Inputs, Draws], Inputs]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Inputs, draws: Draws) -> Inputs:
        """What the function makes."""
        return self.function(inputs, draws)


def _partners(draws: Draws, count: int) -> Tensor:
    """Which of a pool's ``count`` rows is mixed into each, int64 ``(S,)``.

    Every round through the pool is a permutation, so that each row is mixed in equally often. A last round that is not
    whole takes its rows, without repetition, from the whole pool.
    """
    partners = draws.order(count)
    short = len(draws) % count
    if short:
        # Rows as far apart as they can be, from one that is drawn for all.
        begin = (draws.uniform(1)[-short, 0] * count).long()
        partners[-short:] = (partners[-short:] * count // short + begin) % count
    return partners


def count_rows(inputs: Inputs) -> int:
    """Number of samples in a batch's inputs.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import count_rows
        >>> count_rows({"image": torch.zeros(4, 1, 8, 8), "pose": torch.zeros(4, 2)})
        4
    """
    return len(first_tensor(inputs))


def take(inputs: InputsT, rows: Tensor) -> InputsT:
    """The samples at ``rows``.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import take
        >>> take({"pose": torch.tensor([[5], [6], [7]])}, torch.tensor([2, 0]))
        {'pose': tensor([[7],
                [5]])}
    """
    return cast("InputsT", map_tensors(lambda values: values[rows], inputs))


def join(parts: Sequence[InputsT]) -> InputsT:
    """The samples of several inputs, one after the other.

    Raises:
        InputError: they have another structure than the first.

    Example:
        >>> import torch
        >>> from distill_lightning.data.samplers import join
        >>> join([torch.tensor([5, 6]), torch.tensor([7])])
        tensor([5, 6, 7])
    """
    try:
        return cast("InputsT", map_tensors(lambda *tensors: torch.cat(tensors), *parts))
    except InputError as error:
        first = parts[0]
        names = (
            ", ".join(first)
            if isinstance(first, Mapping)
            else f"{1 if isinstance(first, Tensor) else len(first)} tensors"
        )
        raise InputError(
            f"a sampler gave other inputs than the batch's ({names}): let it keep their structure"
        ) from error
