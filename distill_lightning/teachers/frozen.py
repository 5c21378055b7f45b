"""Networks that a module uses and does not train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.layers import fingerprint, freeze
from distill_lightning.part import Part


class Frozen(Part):
    """Frozen networks beside a module, outside of its registry.

    They stand in no state dict, optimiser or average of weights, and no ``train()`` reaches them; the module moves them
    with itself. Frozen means: eval mode, no gradient, bitwise unchanged.

    The networks are frozen and moved in place; give copies to keep them trainable.

    Args:
        networks: that are frozen; may be empty.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.teachers import Frozen
        >>> frozen = Frozen([nn.Linear(4, 3)])
        >>> frozen, frozen[0].training, frozen[0].weight.requires_grad
        (Frozen(Linear), False, False)
    """

    def __init__(self, networks: Sequence[nn.Module] = ()) -> None:
        self.networks = [freeze(network) for network in networks]

    def __len__(self) -> int:
        return len(self.networks)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.networks)

    def __getitem__(self, number: int) -> Any:
        return self.networks[number]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(type(network).__name__ for network in self)})"

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every parameter and buffer in place, as ``nn.Module._apply`` does."""
        for network in self.networks:
            network._apply(function)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def fit_starts(self, module: Any) -> None:
        """Move to the module's device, for strategies which move parameters one by one."""
        device: torch.device = module.device
        self.apply(lambda tensor: tensor.to(device))

    def fingerprints(self, name: str) -> dict[str, str]:
        """What tells these networks from others, for a checkpoint.

        Args:
            name: of the module's attribute.
        """
        if not self.networks:
            return {}
        return {name: fingerprint(nn.ModuleList(self.networks))}

    def recipe(self) -> Any:
        """How to build what the constructor was given again, in plain values; ``None``: it cannot be told."""
        return None
