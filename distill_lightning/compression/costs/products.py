"""Multiply-accumulates of PyTorch's own operations, which all of its functions and layers end in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Cost(NamedTuple):
    """Dense and effective multiply-accumulates of one call."""

    dense: int
    effective: int


class Product(NamedTuple):
    """A sum of products: how many, and the tensors one of which may be a weight with zeros."""

    size: int
    operands: tuple[Tensor, ...] = ()


class Weights:
    """Knows which tensors hold a network's parameters: they, views of them, and copies that only move their entries.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._places = {_place(parameter) for parameter in network.parameters()} - {0}
        # As long as they live, no other tensor has their place.
        self._copies: list[Tensor] = []

    def __contains__(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._places

    def follow(self, operation: str, args: tuple[Any, ...], output: Any) -> None:
        """See what an operation returned, which may be such a copy; the arguments are those of `products_of`."""
        if operation not in _COPYING:
            return
        sources = args[0] if isinstance(args[0], (tuple, list)) else [args[0]]
        if all(source in self for source in sources):
            self._places.add(_place(output))
            self._copies.append(output)

    def cost(self, product: Product) -> Cost:
        """The cost of a product, from which a weight's zeros can be left out."""
        weight = next((tensor for tensor in product.operands if tensor in self), None)
        if weight is None or not weight.numel():
            return Cost(product.size, product.size)
        return Cost(product.size, product.size * int(weight.count_nonzero()) // weight.numel())


def counts(operation: str) -> bool:
    """Whether an operation has products, by its name without namespace and overload: ``"mm"``."""
    return operation in _RULES or operation.startswith(_ATTENTION)


def products_of(operation: str, args: tuple[Any, ...], output: Any) -> Iterator[Product]:
    """The products of one call of an operation that `counts`, with its positional arguments and what it returned."""
    default: Callable[..., Iterator[Product]] = _attention
    rule = _RULES.get(operation, default)
    return rule(output, *args)


def _place(tensor: Tensor) -> int:
    """The address of what a tensor shares with its views; 0 where there is none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _matrices(_output: Tensor, left: Tensor, right: Tensor, *_: Any) -> Iterator[Product]:
    yield Product(left.numel() * (right.shape[-1] if right.ndim > 1 else 1), (left, right))


def _added_matrices(output: Tensor, _added: Tensor, *factors: Any) -> Iterator[Product]:
    return _matrices(output, *factors)


def _convolution(output: Tensor, inputs: Tensor, weight: Tensor, *options: Any) -> Iterator[Product]:
    is_transposed = options[4]
    yield Product((inputs if is_transposed else output).numel() * weight[0].numel(), (weight,))


def _convolution_over_time(output: Tensor, _inputs: Tensor, weight: Tensor, *_: Any) -> Iterator[Product]:
    yield Product(output.numel() * weight[..., 0].numel(), (weight,))


def _bilinear(output: Tensor, _first: Tensor, weight: Tensor, second: Tensor, *_: Any) -> Iterator[Product]:
    # x W as one matrix product, then times y.
    yield Product(weight.numel() * len(second), (weight,))
    yield Product(output.numel() * second.shape[-1])


def _attention(_output: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Iterator[Product]:
    yield Product(query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _recurrent_layer(_output: Any, inputs: Tensor, *weights: Any) -> Iterator[Product]:
    for weight in weights[:2]:
        yield Product(inputs.shape[:-1].numel() * weight.numel(), (weight,))


def _recurrent_layers(_output: Any, inputs: Tensor, weights: list[Tensor], *_: Any) -> Iterator[Product]:
    for weight in weights:
        if weight.ndim > 1:
            yield Product(inputs.shape[:-1].numel() * weight.numel(), (weight,))


_RULES: dict[str, Callable[..., Iterator[Product]]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm"), _matrices),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv", "_addmm_activation"), _added_matrices),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "conv_tbc": _convolution_over_time,
    "_trilinear": _bilinear,
    "mkldnn_rnn_layer": _recurrent_layer,
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _recurrent_layers),
    "flex_attention": _attention,
}
_ATTENTION = "_scaled_dot_product_"
"""What the names of its fused operations begin with, of which each device has others."""
_COPYING = frozenset({"clone", "_to_copy", "cat", "stack", "repeat"})
