"""Lottery tickets: the weights of a pruned network are rewound to their beginning and trained again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.parameters import cuda_devices
from distill_lightning.errors import InputError

LISTS = (nn.ParameterList, nn.ParameterDict)


def copy_state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's parameters and buffers (BatchNorm's statistics): its beginning, or an early epoch.

    Frankle, Carbin: *The Lottery Ticket Hypothesis*, https://arxiv.org/abs/1803.03635; Frankle, Dziugaite, Roy, Carbin:
    *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, https://arxiv.org/abs/1912.05671 (rewinding to an
    early epoch)
    """
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def reinitialize(network: nn.Module, *, seed: int, init: Callable[[nn.Module], None] | None = None) -> None:
    """Draw new weights: the control for a lottery ticket, with the ticket's masks but not its initial weights.

    Project the masks afterwards.

    Args:
        network: changed in place; its buffers are reset where the layers do that (BatchNorm).
        seed: seed of the draws; the global random state stays as it is.
        init: called with every module, from the innermost outwards; ``None`` for each layer's own ``reset_parameters``.

    Raises:
        InputError: a module with parameters of its own has no ``reset_parameters``.
    """
    with torch.random.fork_rng(devices=cuda_devices(network)), torch.no_grad():
        torch.manual_seed(seed)
        network.apply(init or reset_layer)


def reset_layer(module: nn.Module) -> None:
    """Draw a layer's own parameters anew, but not those of its children."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is not None:
        reset()
    elif not isinstance(module, LISTS) and _has_own(module):
        raise InputError(
            f"{type(module).__name__} has parameters and no reset_parameters(): give it one, or init=, a function of "
            "every module"
        )


def _has_own(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, or in a list, which its ``reset_parameters`` has to draw."""
    holders = [module, *(child for child in module.children() if isinstance(child, LISTS))]
    return any(next(holder.parameters(recurse=False), None) is not None for holder in holders)
