"""Masks that keep pruned weights at zero by projection: the network's parameters stay the same objects.

Nothing is wrapped or renamed, so the keys of the state dict, fused recurrent layers, pickling, copying and exporting
work as without masks. In return the masks have to be projected after every optimiser step, and before weights that
were averaged or loaded are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill_lightning.compression.access.parameters import parameter_of
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide


class Masks:
    """Masks of some parameters: which of their entries stay.

    ::

        masks = Masks({"head.weight": kept})     # kept: bool, True where a weight stays
        loss.backward()
        masks.project_gradients(network)
        optimizer.step()
        masks.project(network)

    Args:
        kept: a bool tensor for each parameter's path, in the parameter's shape; copied.

    Raises:
        InputError: a mask that is not bool; in the methods that take a network: a path that it does not have, or a mask
            whose shape is not its parameter's.
    """

    def __init__(self, kept: Mapping[str, Tensor] | None = None) -> None:
        self.kept: dict[str, Tensor] = {}
        self.load_state_dict(kept or {})

    def __repr__(self) -> str:
        return f"Masks({len(self.kept)} parameters, {self.sparsity():.1%} of {self.total} pruned)"

    @property
    def total(self) -> int:
        """Number of entries, kept or pruned."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def pruned(self) -> int:
        """Number of pruned entries."""
        return self.total - sum(int(mask.sum()) for mask in self.kept.values())

    def sparsity(self) -> float:
        """Share of pruned entries among all entries, in ``[0, 1]``; 0 without any mask."""
        return self.pruned / max(self.total, 1)

    def sparsities(self) -> dict[str, float]:
        """`sparsity` of each parameter."""
        return {path: 1 - int(mask.sum()) / max(mask.numel(), 1) for path, mask in self.kept.items()}

    @torch.no_grad()
    def project(self, network: nn.Module) -> None:
        """Set the pruned weights to zero, in place, even if they are NaN or infinite."""
        for _, parameter, pruned in self._of(network):
            parameter.masked_fill_(pruned, 0)

    @torch.no_grad()
    def project_gradients(self, network: nn.Module) -> None:
        """Set the gradients of pruned weights to zero, so that they contribute to no norm and no moment."""
        for _, parameter, pruned in self._of(network):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                # A row of an embedding that was read twice has two entries before.
                parameter.grad = gradient = gradient.coalesce()
                gradient.values().masked_fill_(pruned[gradient.indices().unbind()], 0)
            else:
                gradient.masked_fill_(pruned, 0)

    @torch.no_grad()
    def project_optimizer(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Set an optimiser's state of pruned weights to zero: momentum, moments, averages.

        Needed once after each pruning: with projected gradients these stay zero. State of another shape than its
        parameter (Adafactor's rows and columns) is left alone.
        """
        for _, parameter, pruned in self._of(network):
            for name, value in optimizer.state.get(parameter, {}).items():
                # A counter of steps has the shape of a parameter that is a scalar.
                if name != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(pruned, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The masks as a dict of tensors, which `torch.load` reads with ``weights_only=True``."""
        return dict(self.kept)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace all masks by saved ones.

        Raises:
            InputError: a mask is not bool.
        """
        for path, mask in state_dict.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = getattr(mask, "dtype", type(mask).__name__)
                raise InputError(f"the mask of {path!r} must be a bool tensor, True where weights stay, got {kind}")
        self.kept = {path: mask.detach().clone() for path, mask in state_dict.items()}

    def _of(self, network: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """The path, the parameter and where it is pruned, on the parameter's device."""
        for path, mask in self.kept.items():
            parameter = parameter_of(network, path)
            if mask.shape != parameter.shape:
                raise InputError(
                    f"the mask of {path!r} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}: "
                    "masks belong to the network that they were made for"
                )
            # Kept on that device, so that it is moved only once.
            self.kept[path] = mask.to(parameter.device)
            yield path, parameter, self.kept[path].logical_not()


def regrow(masks: Masks, scores: Mapping[str, Tensor], amount: float) -> Masks:
    """Unmask the most promising pruned weights.

    They start at zero, so use the scores of a criterion that does not depend on the weight itself, such as the
    gradient.

    Args:
        masks: the current masks.
        scores: a tensor for each masked parameter, in its shape; the weights with the highest scores grow first.
        amount: share of the pruned weights that grow, in ``[0, 1]``: exactly ``round(amount * pruned)``, over all
            parameters together.

    Returns:
        New masks.

    Raises:
        InputError: an amount outside ``[0, 1]``, or a parameter without scores.
    """
    if not 0 <= amount <= 1:
        raise InputError(f"regrow: amount is a share of the pruned weights, between 0 and 1, got {amount}")
    pairs = {path: _paired(scores, path, mask) for path, mask in masks.kept.items()}
    if not pairs:
        return Masks()
    flat = torch.cat([wide(score)[~mask] for mask, score in pairs.values()])
    growing = lowest(-flat, round(amount * len(flat)))
    grown: dict[str, Tensor] = {}
    for path, (mask, _) in pairs.items():
        own, growing = growing.tensor_split([int((~mask).sum())])
        grown[path] = mask.clone()
        grown[path][~mask] = own
    return Masks(grown)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` lowest of ``(N,)`` scores are; of equal scores, the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # A full sort takes several times as long.
    limit = scores.kthvalue(count).values
    chosen = scores < limit
    chosen[(scores == limit).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen


def _paired(scores: Mapping[str, Tensor], path: str, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask and its parameter's scores, on the scores' device."""
    if path not in scores or scores[path].shape != mask.shape:
        raise InputError(f"the masked parameter {path!r} has no scores of its shape {tuple(mask.shape)}: score it, too")
    return mask.to(scores[path].device), scores[path]
