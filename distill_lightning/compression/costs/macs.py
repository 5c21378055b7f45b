"""Counting multiply-accumulates, where the usual counters miss recurrent layers and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill_lightning.compression.access.calibration import calibrating, inputs_of
from distill_lightning.compression.costs.products import Cost, Weights, counts, products_of
from distill_lightning.errors import InputError

DEFINITION = (
    "multiply-accumulates of convolutions, linear layers, recurrent layers, attention (its two products included) and "
    "other matrix products; embeddings, biases, normalisation and activations count nothing"
)


class Macs(NamedTuple):
    """The cost of one forward pass.

    Attributes:
        dense: multiply-accumulates, as the layers are computed.
        effective: those whose weight is not zero: what would remain for an ideal sparse kernel. This saves no time by
            itself.
        by_module: ``dense`` by module path; products outside of layers belong to the module whose ``forward`` computes
            them.
        uncounted: paths of modules that ran and have matrices of their own, none of whose products were counted.
    """

    dense: int
    effective: int
    by_module: dict[str, int]
    uncounted: tuple[str, ...]


class CountsMacs(Protocol):
    """A module that knows the cost of its call; nothing inside it is counted then."""

    def count_macs(self, inputs: tuple[Any, ...], output: Any) -> Cost:
        """The cost of a call with these arguments."""
        ...


def count_macs(network: nn.Module, example_inputs: Any) -> Macs:
    """Run a network once and count, by `DEFINITION`.

    The network runs in eval mode, without gradients and without the Transformer's fast path, which would bypass its
    layers; all three are restored afterwards. Factored layers are counted as the layers that they consist of.
    Weights that masks have set to zero only count in ``dense``.

    Args:
        network: any network.
        example_inputs: a tensor, or a tuple of arguments. The count is for this batch size.

    Raises:
        InputError: nothing that `DEFINITION` names runs in the network.
    """
    counter = _Counter(network)
    names = {module: name for name, module in network.named_modules()}
    with ExitStack() as stack:
        stack.enter_context(calibrating(network))
        stack.enter_context(torch.no_grad())
        for module in names:
            before = module.register_forward_pre_hook(counter.enter)
            # Before all other hooks, with what the module itself returned.
            after = module.register_forward_hook(counter.leave, with_kwargs=True, prepend=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(counter)
        network(*inputs_of(example_inputs))
    costs = {names[module]: cost for module, cost in counter.costs.items() if cost.dense}
    if not costs:
        raise InputError(f"{type(network).__name__}: nothing that counts as multiply-accumulates ran")
    uncounted = [names[module] for module in counter.ran if module not in counter.costs and _has_matrix(module)]
    return Macs(
        dense=sum(cost.dense for cost in costs.values()),
        effective=sum(cost.effective for cost in costs.values()),
        by_module={name: cost.dense for name, cost in costs.items()},
        uncounted=tuple(uncounted),
    )


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of modules that have a rule and, outside of those modules, of all operations that have products.

    Operations are seen below the functions and methods that lead to them, so it does not matter by which they come.
    """

    supports_higher_order_operators = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = Weights(network)
        self.costs: dict[nn.Module, Cost] = {}
        self.ran: dict[nn.Module, None] = {}
        self.stack: list[nn.Module] = []

    def enter(self, module: nn.Module, _: Any) -> None:
        if not _covered(self.stack):
            self.ran[module] = None
        self.stack.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rule = _rule_of(module)
        if rule is not None and not _covered(self.stack[:-1]):
            # Still on the stack: reading a parametrized weight may compute products, which are not the network's.
            self._add(module, rule(module, _Call(args, kwargs, output)))
        self.stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # "aten::addmm_.out" is "addmm".
        operation = func.name().rpartition("::")[2].partition(".")[0].rstrip("_")
        if not counts(operation) and hasattr(func, "decompose"):
            # In inference mode, functions come here that are made of others.
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        self.weights.follow(operation, args, output)
        if counts(operation) and self.stack and not _covered(self.stack):
            for product in products_of(operation, args, output):
                self._add(self.stack[-1], self.weights.cost(product))
        return output

    def _add(self, module: nn.Module, cost: Cost) -> None:
        before = self.costs.get(module, Cost(0, 0))
        self.costs[module] = Cost(before.dense + cost.dense, before.effective + cost.effective)


def _covered(stack: Sequence[nn.Module]) -> bool:
    """Whether one of these modules has a rule, which covers everything inside it."""
    return any(_rule_of(module) is not None for module in stack)


def _times(weight: Tensor, uses: int) -> Cost:
    """The cost of a weight, each entry of which is multiplied this many times."""
    return Cost(weight.numel() * uses, int(weight.count_nonzero()) * uses)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(sum(cost.dense for cost in costs), sum(cost.effective for cost in costs))


# Rules of modules: module and what it was called with


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def argument(self, position: int, name: str) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs[name]


def _linear(module: nn.Module, call: _Call) -> Cost:
    layer = cast("nn.Linear", module)
    return _times(layer.weight, call.output.shape[:-1].numel())


def _bilinear(module: nn.Module, call: _Call) -> Cost:
    layer = cast("nn.Bilinear", module)
    # x W as one matrix product, then times y.
    return _sum(
        [_times(layer.weight, call.output.shape[:-1].numel()), Cost(*[call.output.numel() * layer.in2_features] * 2)]
    )


def _convolution(module: nn.Module, call: _Call) -> Cost:
    layer = cast("nn.Conv2d", module)
    return _times(layer.weight, call.output.numel() // layer.out_channels)


def _transposed(module: nn.Module, call: _Call) -> Cost:
    layer = cast("nn.ConvTranspose2d", module)
    return _times(layer.weight, call.argument(0, "input").numel() // layer.in_channels)


def _recurrent(module: nn.Module, call: _Call) -> Cost:
    layer = cast("nn.RNNBase", module)
    inputs = call.argument(0, "input")
    data = inputs.data if isinstance(inputs, nn.utils.rnn.PackedSequence) else inputs
    steps = data.shape[:-1].numel()
    # By attribute, because a parametrized weight is no parameter of that name.
    names = [name for names in layer._all_weights for name in names if name.startswith("weight")]  # noqa: SLF001
    return _sum([_times(getattr(layer, name), steps) for name in names])


def _cell(module: nn.Module, call: _Call) -> Cost:
    layer = cast("nn.RNNCell", module)
    steps = call.argument(0, "input").shape[:-1].numel()
    return _sum([_times(layer.weight_ih, steps), _times(layer.weight_hh, steps)])


def _attention(module: nn.Module, call: _Call) -> Cost:
    layer = cast("nn.MultiheadAttention", module)
    query = call.argument(0, "query")
    key = call.argument(1, "key")
    queries, keys = query.shape[:-1].numel(), key.shape[:-1].numel()
    batched = query.ndim == 3
    samples = query.shape[0 if layer.batch_first else 1] if batched else 1
    size = layer.embed_dim
    weights = getattr(layer, "in_proj_weight", None)
    if weights is None:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        weights = weights.split(size)
    projections = [_times(weights[0], queries), _times(weights[1], keys), _times(weights[2], keys)]
    # Keys and values may have a learned position and a zero position in addition.
    attended = keys // samples + (layer.bias_k is not None) + layer.add_zero_attn
    products = 2 * queries * attended * size
    return _sum([*projections, Cost(products, products), _times(layer.out_proj.weight, queries)])


def _known(module: nn.Module, call: _Call) -> Cost:
    return cast("CountsMacs", module).count_macs((*call.args, *call.kwargs.values()), call.output)


Rule = Callable[[nn.Module, _Call], Cost]
_RULES: list[tuple[tuple[type[nn.Module], ...], Rule]] = [
    ((nn.Linear,), _linear),
    ((nn.Bilinear,), _bilinear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    ((nn.RNNBase,), _recurrent),
    ((nn.RNNCellBase,), _cell),
    ((nn.MultiheadAttention,), _attention),
]


def _rule_of(module: nn.Module) -> Rule | None:
    if hasattr(module, "count_macs"):
        return _known
    return next((rule for kinds, rule in _RULES if isinstance(module, kinds) and _runs_torchs(module)), None)


def _runs_torchs(module: nn.Module) -> bool:
    """Whether a module of one of PyTorch's classes, or of a class below it, computes what that class does."""
    steps = [getattr(module, name, None) for name in ("forward", "_conv_forward")]
    return all(step is None or step.__module__.startswith("torch.nn.") for step in steps)


def _has_matrix(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return not isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)) and any(p.ndim > 1 for p in own)
