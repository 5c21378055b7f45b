"""An ensemble of frozen networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.layers import FeatureTap, freeze, resolve_layer
from distill_lightning.layers.call import call, outputs_of
from distill_lightning.layers.feature_tap import Channels
from distill_lightning.outputs import Categorical


class EnsembleRule(NamedTuple):
    """How the predictions of several teachers are combined into one.

    Attributes:
        combine: ``"probabilities"``: weighted mean of the softmaxes; ``"logits"``: softmax of the weighted mean.
        weights: one number per teacher, divided by their sum; ``None`` weights all equally.
    """

    combine: str = "probabilities"
    weights: list[float] | None = None

    def combined(self, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The ensemble's prediction ``(N, K)`` from its members' logits ``(M, N, K)``."""
        output = Categorical(logits.shape[-1])
        return output.collapse(logits.unbind(), weights=self.weights, combine=self.combine, temperature=temperature)


class TeacherEnsemble(nn.Module):
    """Some frozen teachers and the rule that combines their predictions into one.

    Frozen means: eval mode whatever mode the ensemble is put in, no gradient, no graph. Where teachers predict a class
    for each of ``T`` positions, ``(N, T, K)`` stands for ``(N, K)`` everywhere.

    The networks are frozen, converted and laid out in place; give copies to keep them trainable.

    Args:
        networks: one network or several; each maps ``(N, ...)`` to logits ``(N, K)``.
        weights: one non-negative number per teacher, divided by their sum; ``None`` weights all equally.
        combine: ``"probabilities"``: weighted mean of the softmaxes; ``"logits"``: softmax of the weighted mean.
        dtype: that the teachers are converted to, ``"float16"`` or ``"bfloat16"``; ``None``: they stay as they are.
        channels_last: whether their weights are laid out channels last, which most convolutions are faster in.

    Raises:
        InputError: no teacher, the same teacher twice, or weights or options that do not fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning import TeacherEnsemble
        >>> ensemble = TeacherEnsemble([nn.Linear(4, 3), nn.Linear(4, 3)], weights=[1, 3])
        >>> probs = ensemble.probabilities(torch.rand(2, 4), temperature=2.0)
        >>> probs.shape, probs.requires_grad
        (torch.Size([2, 3]), False)
        >>> torch.allclose(probs.sum(dim=1), torch.ones(2))
        True
    """

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        combine: Literal["probabilities", "logits"] = "probabilities",
        *,
        dtype: Literal["float16", "bfloat16"] | None = None,
        channels_last: bool = False,
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
        if dtype not in (None, "float16", "bfloat16"):
            raise InputError(f"a teacher's dtype must be 'float16' or 'bfloat16', got {dtype!r}")
        functional.member_shares(weights, len(members))
        for member in members:
            member.to(dtype=getattr(torch, dtype) if dtype else None)
            if channels_last:
                member.to(memory_format=torch.channels_last)
        self.networks = nn.ModuleList(members)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.combine, self.dtype, self.channels_last = combine, dtype, channels_last
        self._last: tuple[Any, list[Any]] | None = None
        freeze(self)

    @classmethod
    def of(cls, teachers: nn.Module | Sequence[nn.Module]) -> TeacherEnsemble:
        """What a method was given as ``teachers``: an ensemble as it is, a network or a list of networks wrapped."""
        return teachers if isinstance(teachers, cls) else cls(teachers)

    def __len__(self) -> int:
        return len(self.networks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.networks)

    @property
    def rule(self) -> EnsembleRule:
        """How the members' predictions become one."""
        return EnsembleRule(self.combine, self.weights)

    def extra_repr(self) -> str:
        """The rule, for the printed ensemble."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())

    def options(self) -> dict[str, Any]:
        """What it was made with besides the networks."""
        return {name: getattr(self, name) for name in ("combine", "weights", "dtype", "channels_last")}

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (nn.Module's signature)
        """The ensemble stays in eval mode: a BatchNorm in train mode would change them with every batch."""
        return super().train(mode=False)

    def each(self, inputs: Any, runs: Sequence[Callable[[Any], Any]] | None = None) -> list[Any]:
        """What every teacher gives, without a graph.

        Args:
            inputs: of the networks; floating-point numbers are converted to ``dtype``.
            runs: what to call in the networks' places, `tapped` ones, say.
        """
        if runs is None and self._last is not None and self._last[0] is inputs:
            return self._last[1]
        outputs = self._run(self.networks if runs is None else runs, self._converted(inputs))
        if runs is None and self._last is not None:
            self._last = (inputs, outputs)
        return outputs

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within it, networks do not run again on the inputs that they last ran on, if these are the same object."""
        self._last = (None, [])
        try:
            yield
        finally:
            self._last = None

    @staticmethod
    def _run(runs: Iterable[Callable[..., Any]], inputs: Any) -> list[Any]:
        # Losses save the answers for backward, which autograd refuses for a tensor that was made in inference mode.
        return [tree_map_only(Tensor, _ordinary, _said_by(run, inputs)) for run in runs]

    def logits(self, inputs: Any) -> Tensor:
        """Every teacher's logits, ``(M, N, K)``, without a graph."""
        return torch.stack(self.each(inputs))

    def tapped(
        self, layers: Sequence[str], channels: Channels | Sequence[Channels | None] | None = None
    ) -> list[FeatureTap]:
        """A tap of one layer in each network.

        Args:
            layers: of each network.
            channels: see `layers.FeatureTap`; one for all, or one each.

        Raises:
            InputError: a layer that does not exist, by a message that names the teacher, or another number of
                ``channels`` than of networks.
        """
        each = [channels] * len(self) if channels is None or isinstance(channels, str) else list(channels)
        if len(each) != len(self):
            raise InputError(
                f"channels of {len(each)} features for {len(self)} teachers: give one for all, or one each"
            )
        return [self._tap(number, *pair) for number, pair in enumerate(zip(layers, each, strict=True))]

    def _tap(self, number: int, layer: str, channels: Channels | None) -> FeatureTap:
        network = self.networks[number]
        try:
            return FeatureTap(network, resolve_layer(network, layer), channels=channels)
        except InputError as error:
            way_out = ": unlike teachers need teacher_layers with one layer each" if len(self) > 1 else ""
            raise InputError(f"teacher {number}: {error}{way_out}") from error

    def _converted(self, inputs: Any) -> Any:
        if self.dtype is None:
            return inputs
        kind = getattr(torch, self.dtype)
        return tree_map_only(Tensor, lambda part: part.to(kind) if part.is_floating_point() else part, inputs)

    def combined(self, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The ensemble's prediction ``(N, K)`` from its members' logits ``(M, N, K)``."""
        return self.rule.combined(logits, temperature=temperature)

    def probabilities(self, inputs: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The ensemble's prediction at a temperature, ``(N, K)``, without a graph."""
        return self.combined(self.logits(inputs), temperature=temperature)

    def forward(self, inputs: Tensor) -> Tensor:
        """Log-probabilities ``(N, K)``: an ensemble can stand wherever a network that returns logits stands."""
        probs = self.probabilities(inputs)
        # A probability that underflowed to zero would be an infinite logit.
        return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def _said_by(run: Callable[..., Any], inputs: Any) -> Any:
    """What a network, or a tap of one, gives, without a graph."""
    if isinstance(run, nn.Module):
        with torch.inference_mode():
            return call(run, inputs)
    # Tensors of inference mode do not tell who writes into them: a tap would have to copy every feature.
    with torch.inference_mode(mode=False), torch.no_grad():
        return outputs_of(run, tree_map_only(Tensor, _ordinary, inputs))


def _ordinary(answer: Tensor) -> Tensor:
    """A tensor that is nobody else's; features have been copied where they were tapped."""
    return answer.clone() if answer.is_inference() else answer
