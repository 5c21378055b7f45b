"""Lottery tickets: the weights of a pruned network are rewound to their beginning and trained again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill_lightning.compression.access.parameters import cuda_devices
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.errors import InputError
from distill_lightning.networks.weights import load_strictly

LISTS = (nn.ParameterList, nn.ParameterDict)


class Snapshot:
    """A network's parameters and buffers (BatchNorm's statistics) at one moment: its beginning, or an early epoch.

    Frankle, Carbin: *The Lottery Ticket Hypothesis*, https://arxiv.org/abs/1803.03635; Frankle, Dziugaite, Roy, Carbin:
    *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, https://arxiv.org/abs/1912.05671 (rewinding to an
    early epoch)

    Args:
        network: the network, which is copied now and may change afterwards.
    """

    def __init__(self, network: nn.Module) -> None:
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def rewind(self, network: nn.Module, masks: Masks, *, optimizer: Optimizer | None = None) -> None:
        """Set surviving weights and all buffers to the snapshot's, bit for bit, and pruned weights to zero.

        Args:
            network: the pruned network, changed in place.
            masks: the masks of the surviving weights.
            optimizer: its momentum, moments and step counts are forgotten; learning rates stay as they are. ``None``:
                the caller makes a new one.

        Raises:
            InputError: the network is of another architecture than the snapshot's.
        """
        load_strictly(network, self.state, source="the snapshot")
        masks.project(network)
        if optimizer is not None:
            optimizer.state.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot as a dict of tensors."""
        return dict(self.state)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace this snapshot by a saved one.

        Raises:
            InputError: it belongs to another architecture.
        """
        if {name: value.shape for name, value in state_dict.items()} != {
            name: value.shape for name, value in self.state.items()
        }:
            raise InputError("the saved snapshot is of another architecture: build the network that the run began with")
        self.state = {name: value.detach().clone() for name, value in state_dict.items()}


def reinitialize(network: nn.Module, *, seed: int, init: Callable[[nn.Module], None] | None = None) -> None:
    """Draw new weights: the control for a lottery ticket, with the ticket's masks but not its initial weights.

    Project the masks afterwards, or let ``Snapshot(network).rewind`` do so.

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
    """Draw a layer's own parameters anew, but not those of its children.

    Raises:
        InputError: it has parameters of its own, but no ``reset_parameters``.
    """
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
