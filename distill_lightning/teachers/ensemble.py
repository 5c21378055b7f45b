"""An ensemble of frozen networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_map_only

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.layers import FeatureTap, dry_forward, freeze, resolve_layer


class EnsembleRule(NamedTuple):
    """How the predictions of several teachers become one.

    Attributes:
        combine: ``"probabilities"``: weighted mean of the softmaxes; ``"logits"``: softmax of the weighted mean.
        weights: one number per teacher, divided by their sum; ``None`` weighs all alike.
    """

    combine: str = "probabilities"
    weights: list[float] | None = None

    def combined(self, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The ensemble's prediction ``(N, K)`` from its members' logits ``(M, N, K)``."""
        if self.combine == "probabilities":
            return functional.mean_probabilities(logits, temperature=temperature, weights=self.weights)
        mean = functional.weighted_mean(logits.float(), self.weights)
        return functional.mean_probabilities(mean[None], temperature=temperature)


class TeacherEnsemble(nn.Module):
    """Some frozen teachers and the rule that makes one prediction of theirs.

    Frozen means: eval mode whatever mode the ensemble is put in, no gradient, no graph. Where teachers predict a class
    for each of ``T`` positions, ``(N, T, K)`` stands for ``(N, K)`` everywhere.

    Args:
        networks: one network or several; each maps ``(N, ...)`` to logits ``(N, K)``.
        weights: one non-negative number per teacher, divided by their sum; ``None`` weighs all alike.
        combine: ``"probabilities"``: weighted mean of the softmaxes; ``"logits"``: softmax of the weighted mean.
        dtype: that the teachers are converted to, ``"float16"`` or ``"bfloat16"``; ``None``: they stay as they are.
        channels_last: whether their weights are laid out channels last, which most convolutions are faster in.
        batched: whether teachers of one architecture run as one, by `torch.func.vmap`. That is faster where they are
            small enough to leave the device idle, and slower where each fills it: measure. They must run without taps.

    Raises:
        InputError: no teacher, the same teacher twice, weights or options that do not fit, or, with ``batched``,
            teachers of several architectures, or with an RNN.
    """

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        combine: Literal["probabilities", "logits"] = "probabilities",
        *,
        dtype: Literal["float16", "bfloat16"] | None = None,
        channels_last: bool = False,
        batched: bool = False,
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
        if batched and channels_last:
            raise InputError("channels_last means nothing to teachers that run as one (batched=True): leave one out")
        functional.member_shares(weights, len(members))
        for member in members:
            member.to(dtype=getattr(torch, dtype) if dtype else None)
            if channels_last:
                member.to(memory_format=torch.channels_last)
        self.networks = nn.ModuleList(members)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.combine, self.dtype, self.channels_last, self.batched = combine, dtype, channels_last, batched
        self._together: _Together | None = _Together(members) if batched else None
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
        return {name: getattr(self, name) for name in ("combine", "weights", "dtype", "channels_last", "batched")}

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (nn.Module's signature)
        """The ensemble stays in eval mode: a BatchNorm in train mode would change them with every batch."""
        return super().train(mode=False)

    def each(self, inputs: Any, runs: Sequence[Callable[[Any], Any]] | None = None) -> list[Any]:
        """What every teacher gives, without a graph.

        Args:
            inputs: of the networks; floating-point numbers are converted to ``dtype``.
            runs: what to call in the networks' places, `tapped` ones, say.
        """
        inputs = self._converted(inputs)
        with torch.inference_mode():
            if runs is None and self._together is not None:
                outputs = self._together(inputs)
            else:
                outputs = [run(inputs) for run in runs or self.networks]
        # Losses save the answers for backward, which autograd refuses for a tensor that was made in inference mode.
        return [tree_map_only(Tensor, Tensor.clone, output) for output in outputs]

    def logits(self, inputs: Any) -> Tensor:
        """Every teacher's logits, ``(M, N, K)``, without a graph."""
        return torch.stack(self.each(inputs))

    def tapped(self, layers: Sequence[str]) -> list[FeatureTap]:
        """A tap of one layer in each network.

        Raises:
            InputError: a layer that does not exist, or ``batched`` teachers, which run as one.
        """
        if self.batched:
            raise InputError("teachers with batched=True run as one and have no inner features to tap: leave it out")
        pairs = zip(self.networks, layers, strict=True)
        return [FeatureTap(network, resolve_layer(network, layer)) for network, layer in pairs]

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

    def check(self, input_shape: Sequence[int], num_classes: int, *, per_position: bool = False) -> None:
        """Run every teacher once on zeros and look at what comes out.

        Args:
            input_shape: of one input.
            num_classes: ``K``.
            per_position: whether a prediction for each position will do, too, see `check_classes`.

        Raises:
            InputError: a teacher does not take such an input, or has another number of classes.
        """
        for number, network in enumerate(self.networks):
            shape = dry_forward(network, input_shape).shape
            check_classes(f"teacher {number}", network, shape, num_classes, per_position=per_position)


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


def check_classes(
    who: str, network: nn.Module, shape: Sequence[int], num_classes: int, *, per_position: bool = False
) -> None:
    """Look at the shape of a network's output.

    Args:
        who: what the message begins with.
        network: that gave it.
        shape: of the output.
        num_classes: ``K``.
        per_position: whether ``(N, T, K)``, with any number of dimensions in the place of ``T``, will do, too.

    Raises:
        InputError: it is not ``(N, num_classes)``.
    """
    if len(shape) > 2 and shape[-1] == num_classes:
        if not per_position:
            raise InputError(
                f"{who} ({type(network).__name__}) predicts a class for each position, {tuple(shape)}: "
                "SupervisedModule and KDModule take such networks, this method does not"
            )
    elif len(shape) != 2 or shape[1] != num_classes:
        found = f"{shape[1]} classes" if len(shape) == 2 else f"an output of shape {tuple(shape)}"
        raise InputError(
            f"{who} ({type(network).__name__}) has {found} where num_classes={num_classes} is needed: "
            "build it with the data's number of classes"
        )


class _Together:
    """Networks of one architecture as one function of stacked weights.

    No module: the stacked weights are copies that no state dict shall hold.

    Args:
        networks: that are stacked.

    Raises:
        InputError: they are of several architectures, or of one that cannot run so.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in networks]
        if len({type(network) for network in networks}) > 1 or any(other != shapes[0] for other in shapes):
            raise InputError("teachers can only run as one (batched=True) if all have the same architecture")
        if any(isinstance(module, nn.RNNBase) for module in networks[0].modules()):
            raise InputError("torch.func.vmap cannot run an LSTM, GRU or RNN: leave the teachers' batched=True out")
        self.networks = list(networks)
        self.template = copy.deepcopy(networks[0]).eval().to("meta")
        self.made_of: list[tuple[int, int]] = []
        self.state: Any = None

    def __call__(self, inputs: Any) -> list[Any]:
        # The teachers may have been moved, or loaded, since.
        made_of = [
            (tensor.data_ptr(), tensor._version)  # noqa: SLF001
            for network in self.networks
            for tensor in (*network.parameters(), *network.buffers())
        ]
        is_new = made_of != self.made_of
        if is_new:
            self.state, self.made_of = stack_module_state(self.networks), made_of
        run = partial(functional_call, self.template)
        outputs = vmap(lambda state: run(state, (inputs,)))(self.state)
        if is_new:
            self._compare(inputs, outputs)
        return list(outputs.unbind())

    def _compare(self, inputs: Any, outputs: Tensor) -> None:
        """Networks of equal weights may still differ, in a stride or an input size: once they run both ways."""
        for number, network in enumerate(self.networks):
            # Under autocast vmap may leave an output in another precision.
            alone = network(inputs).float()
            if not torch.allclose(outputs[number].float(), alone, rtol=0.05, atol=0.05 * float(alone.abs().max())):
                raise InputError(
                    f"teacher {number} answers otherwise alone than together with the first one (batched=True): they "
                    "are of several architectures"
                )
