"""Replacing layers by factors: factoring them, putting them into a network, and rebuilding them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

from torch import Tensor, nn

from distill_lightning.compression.access.hooks import carry_hooks, check_hooks
from distill_lightning.compression.access.parameters import shared_outside
from distill_lightning.compression.factor.convolutions import ConvChain
from distill_lightning.compression.factor.layers import LowRankEmbedding, LowRankLinear, TrainEmbedding, TrainLinear
from distill_lightning.compression.factor.plans import chosen_ranks, kind_of, plan_matrix, plan_of, without_macs
from distill_lightning.compression.factor.ranks import Rank, RankRule, UnfactorableError, rank_rule
from distill_lightning.compression.factor.recurrent import FactoredGRU, FactoredLSTM, FactoredRNN
from distill_lightning.errors import InputError

Method = Literal["svd", "svd_channel", "svd_spatial", "tucker2", "cp", "tt"]
METHODS: tuple[str, ...] = get_args(Method)

_RECURRENT: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: FactoredLSTM, nn.GRU: FactoredGRU, nn.RNN: FactoredRNN}
_FACTORED: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "low_rank_linear": {nn.Linear: LowRankLinear},
    "tt_linear": {nn.Linear: TrainLinear},
    "low_rank_embedding": {nn.Embedding: LowRankEmbedding},
    "tt_embedding": {nn.Embedding: TrainEmbedding},
    "conv_chain": {nn.Conv2d: ConvChain},
    "recurrent": _RECURRENT,
}


class Factored(NamedTuple):
    """The result of factoring a layer.

    Args:
        layer: the factored layer, or the given one itself.
        description: plain values for `build_factors`; ``None`` if the layer was left untouched.
        note: one sentence, for a report.
        error: relative error of the weight, 0 if it is untouched.
    """

    layer: nn.Module
    description: dict[str, Any] | None
    note: str
    error: float


def factorize(
    layer: nn.Module,
    *,
    rank: Rank,
    method: Method = "svd",
    only_if_smaller: bool = True,
    moment: Tensor | None = None,
    damping: float = 0.01,
    input_size: Sequence[int] | None = None,
    parts: int = 3,
) -> Factored:
    """Factor a layer's weights.

    Args:
        layer: `Linear` (methods svd, tt), `Conv2d` (svd, the same as svd_channel, svd_spatial, tucker2, cp, tt),
            `Embedding` (svd, tt), `LSTM`, `GRU` or `RNN` (svd; each of its weights separately). It is not changed.
        rank: number of components to keep, see `rank_rule`; if a method has several ranks, they follow in proportion,
            or each from its own singular values (those of the weight, even with a moment). ``"evbmf"`` keeps at least
            one.
        method: the decomposition; see `ConvChain` for those of convolutions.
        only_if_smaller: whether to leave the layer untouched if the factors would not have fewer weights.
        moment: second moment ``(D, D)`` of the layer's inputs, see `input_moments`, with which the outputs are
            approximated instead of the weights; for svd of a `Linear` and a `Conv2d`.
        damping: damping of the moment, see `whitened_svd`.
        input_size: ``(H, W)`` of a convolution's input; needed for ``rank="macs:..."``.
        parts: number of cores in the tensor train of a `Linear` or an `Embedding`.

    Raises:
        InputError: the layer, method and rank cannot be combined; the message says which can.
        UnfactorableError: no factors can replace the layer, or none within the budget (an `InputError`, too).
    """
    rule = rank_rule(rank)
    if parts < 2:
        raise InputError(f"parts must be at least 2, got {parts}")
    if type(layer) in _RECURRENT:
        return _factorize_recurrent(cast("nn.RNNBase", layer), rule, method, moment, only_if_smaller=only_if_smaller)
    plan = plan_of(layer, method, input_size, parts)
    if moment is not None and not (isinstance(layer, nn.Linear | nn.Conv2d) and method in ("svd", "svd_channel")):
        raise InputError(
            f"a moment is used by method 'svd' of Linear and Conv2d, not by {method!r} of {kind_of(layer)}"
        )
    if rule.kind == "macs" and not plan.dense.macs:
        raise UnfactorableError(f"rank='macs:{rule.value:g}' of {kind_of(layer)}: " + without_macs(layer))
    ranks = plan.fit(chosen_ranks(rule, plan))
    cost = plan.cost(ranks)
    name = f"{kind_of(layer)} as {method} of rank {'x'.join(map(str, ranks))}"
    if only_if_smaller and cost.weights >= plan.dense.weights:
        note = f"{name} would have {cost.weights:,} weights instead of {plan.dense.weights:,}: left as it is"
        return Factored(layer, None, note, 0.0)
    description = plan.describe(ranks)
    factored: Any = build_factors(layer, description)
    error = factored.fill(layer) if moment is None else factored.fill(layer, moment=moment, damping=damping)
    note = f"{name}: {cost.weights:,} weights instead of {plan.dense.weights:,}, relative error {error:.3g}"
    return Factored(factored, description, note, error)


def build_factors(layer: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Build a factored layer with weights of zero, into which a state dict can be loaded.

    The weights of the dense layer are not read, and may be on the meta device.
    """
    values = dict(description)
    kind = values.pop("kind", None)
    if kind not in _FACTORED:
        raise InputError(f"kind {kind!r} is not a factored layer: it must be one of {', '.join(_FACTORED)}")
    if type(layer) not in _FACTORED[kind]:
        wanted = " or ".join(dense.__name__ for dense in _FACTORED[kind])
        raise InputError(f"a {kind} layer is built from {wanted}, not from {kind_of(layer)}: is it another network?")
    made: Any = _FACTORED[kind][type(layer)]
    try:
        rebuilt: nn.Module = made(layer, **values)
    except TypeError as error:
        raise InputError(f"the description of a {kind} layer does not fit: {error}") from error
    return rebuilt


def replace_layer(network: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    """Replace a layer at all its places, and stop surrounding modules from bypassing the new one.

    ``nn.TransformerEncoderLayer`` reads the weights of its linear layers in eval mode without calling them; if one is
    replaced, this shortcut is switched off. The new layer takes over the hooks, see `carry_hooks`. Returns the previous
    layer. See `check_replaceable` for what is refused.
    """
    check_replaceable(network, path)
    modules: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
    replaced = modules[path]
    carry_hooks(replaced, layer)
    for place in _places(modules, replaced):
        above = _above(modules, place)
        for module in above:
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
        setattr(above[-1], place.rpartition(".")[2], layer)
    return replaced


def check_replaceable(network: nn.Module, path: str) -> None:
    """Refuse layers that `replace_layer` cannot replace.

    Raises:
        InputError: the layer does not exist, is inside an ``nn.MultiheadAttention``, which never calls it, has hooks of
            its state dict, or shares a weight with another layer. The same layer at several paths is one layer.
    """
    modules: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
    if not path or path not in modules:
        raise InputError(f"{kind_of(network)} has no layer {path!r}: give a path of network.named_modules()")
    places = _places(modules, modules[path])
    if any(isinstance(_above(modules, place)[-1], nn.MultiheadAttention) for place in places):
        raise InputError(
            f"{path!r} is inside a MultiheadAttention, which uses its weight without calling it: "
            "exclude it, or convert the attention into separate layers first"
        )
    check_hooks(path, modules[path])
    other = shared_outside(network, modules[path])
    if other is not None:
        raise InputError(
            f"{path!r} shares a weight with {other!r}, which factoring would untie: exclude both, or untie them first"
        )


def _factorize_recurrent(
    layer: nn.RNNBase, rule: RankRule, method: str, moment: Tensor | None, *, only_if_smaller: bool
) -> Factored:
    name = kind_of(layer)
    if method != "svd" or moment is not None:
        raise InputError(
            f"the weights of {name} are factored by method 'svd' without a moment: exclude it from other methods"
        )
    if rule.kind == "macs":
        raise UnfactorableError(f"rank='macs:{rule.value:g}' of {name}: " + without_macs(layer))
    ranks, before, after = {}, 0, 0
    for weight_name, weight in layer.named_parameters():
        if not weight_name.startswith("weight_"):
            continue
        rows, columns = weight.shape
        (rank,) = chosen_ranks(rule, plan_matrix(weight))
        if not only_if_smaller or rank * (rows + columns) < rows * columns:
            ranks[weight_name] = rank
            before, after = before + rows * columns, after + rank * (rows + columns)
    if not ranks:
        return Factored(layer, None, f"no weight of {name} would be smaller as factors: left as it is", 0.0)
    description = {"kind": "recurrent", "ranks": ranks}
    factored: Any = build_factors(layer, description)
    error = factored.fill(layer)
    parts = ", ".join(f"{weight_name} {rank}" for weight_name, rank in ranks.items())
    note = f"{name} with factors of rank {parts}: {after:,} weights instead of {before:,}, relative error {error:.3g}"
    return Factored(factored, description, note, error)


def _places(modules: Mapping[str, nn.Module], layer: nn.Module) -> list[str]:
    """All paths of a layer."""
    return [path for path, module in modules.items() if module is layer]


def _above(modules: Mapping[str, nn.Module], path: str) -> list[nn.Module]:
    """The modules along a path, from the network to the parent of the layer."""
    return [modules[".".join(path.split(".")[:depth])] for depth in range(path.count(".") + 1)]
