"""Frozen networks: what freezing means, and an ensemble of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.layers.feature_tap import dry_forward

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(module: ModuleT) -> ModuleT:
    """Put a network in eval mode and stop its gradients; the same network is returned."""
    return module.eval().requires_grad_(requires_grad=False)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers: names, types, shapes and every byte."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # A view as bytes covers the types numpy lacks (bfloat16).
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TeacherEnsemble(nn.Module):
    """Some frozen teachers and the rule that makes one prediction of theirs.

    Frozen means: eval mode whatever mode the ensemble is put in, no gradient, no graph.

    Args:
        networks: one network or several; each maps ``(N, ...)`` to logits ``(N, K)``.
        weights: one non-negative number per teacher, divided by their sum; ``None`` weighs all alike.
        combine: ``"probabilities"``: weighted mean of the softmaxes; ``"logits"``: softmax of the weighted mean.

    Raises:
        InputError: no teacher, the same teacher twice, or weights that do not fit.
    """

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        combine: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        super().__init__()
        if isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList):
            networks = [networks]
        members: list[nn.Module] = list(networks)
        if not members:
            raise InputError("teachers is empty: give at least one network")
        if len({id(member) for member in members}) < len(members):
            raise InputError("the same network object stands twice among the teachers: give each its own")
        if combine not in ("probabilities", "logits"):
            raise InputError(f"combine must be 'probabilities' or 'logits', got {combine!r}")
        functional.member_shares(weights, len(members))
        self.networks = nn.ModuleList(members)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.combine = combine
        freeze(self)

    @classmethod
    def of(cls, teachers: nn.Module | Sequence[nn.Module]) -> TeacherEnsemble:
        """What a method was given as ``teachers``: an ensemble as it is, a network or a list of networks wrapped."""
        return teachers if isinstance(teachers, cls) else cls(teachers)

    def __len__(self) -> int:
        return len(self.networks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.networks)

    def extra_repr(self) -> str:
        """The rule, for the printed ensemble."""
        return f"combine={self.combine!r}, weights={self.weights}"

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (nn.Module's signature)
        """The ensemble stays in eval mode: a BatchNorm in train mode would change them with every batch."""
        return super().train(mode=False)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Every teacher's logits, ``(M, N, K)``, without a graph."""
        # no_grad and not inference_mode: the losses save these tensors for backward, which inference tensors forbid.
        return torch.stack([network(inputs) for network in self.networks])

    def combined(self, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The ensemble's prediction ``(N, K)`` from its members' logits ``(M, N, K)``."""
        if self.combine == "probabilities":
            return functional.mean_probabilities(logits, temperature=temperature, weights=self.weights)
        mean = functional.weighted_mean(logits.float(), self.weights)
        return functional.mean_probabilities(mean[None], temperature=temperature)

    def probabilities(self, inputs: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The ensemble's prediction at a temperature, ``(N, K)``, without a graph."""
        return self.combined(self.logits(inputs), temperature=temperature)

    def forward(self, inputs: Tensor) -> Tensor:
        """Log-probabilities ``(N, K)``: an ensemble can stand wherever a network that returns logits stands."""
        probs = self.probabilities(inputs)
        # A probability that underflowed to zero would be an infinite logit.
        return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()

    def check(self, input_shape: Sequence[int], num_classes: int) -> None:
        """Run every teacher once on zeros and look at what comes out.

        Raises:
            InputError: a teacher does not take such an input, or has another number of classes.
        """
        for number, network in enumerate(self.networks):
            check_classes(f"teacher {number}", network, dry_forward(network, input_shape).shape, num_classes)


def check_gaussian(who: str, network: nn.Module, shape: Sequence[int], num_targets: int) -> None:
    """Look at the shape of a network's output.

    Raises:
        InputError: it is not ``(N, 2 * num_targets)``.
    """
    if len(shape) != 2 or shape[1] != 2 * num_targets:
        raise InputError(
            f"{who} ({type(network).__name__}) has an output of shape {tuple(shape)} where num_targets={num_targets} "
            f"needs (N, {2 * num_targets}), means and log-variances: end it in a GaussianHead"
        )


def check_classes(who: str, network: nn.Module, shape: Sequence[int], num_classes: int) -> None:
    """Look at the shape of a network's output.

    Raises:
        InputError: it is not ``(N, num_classes)``.
    """
    if len(shape) != 2 or shape[1] != num_classes:
        found = f"{shape[1]} classes" if len(shape) == 2 else f"an output of shape {tuple(shape)}"
        raise InputError(
            f"{who} ({type(network).__name__}) has {found} where num_classes={num_classes} is needed: "
            "build it with the data's number of classes"
        )
