"""In which dimension of a feature its channels are, as the network's own operations tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_SECOND = {"batch_norm", "instance_norm", "group_norm", "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle",
           "local_response_norm", "grid_sample"}  # fmt: skip
"""Functions of ``(N, C, ...)``; those of a number of spatial dimensions end in it, as ``conv2d`` does."""

_LAST = {"linear", "bilinear", "embedding", "rms_norm", "layer_norm", "multi_head_attention_forward", "lstm", "gru",
         "rnn_tanh", "rnn_relu"}  # fmt: skip
"""Functions of ``(..., C)``."""

_MOVES = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "T", "mT", "H", "mH"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
_PARTS = {"cat", "concat", "concatenate", "chunk", "split", "tensor_split", "narrow", "pad", "repeat", "expand",
          "expand_as", "index_select", "__getitem__"}  # fmt: skip
"""Functions that change sizes, and leave every dimension where it is."""

_MIXES = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "tensordot",
          "scaled_dot_product_attention", "as_strided", "unfold", "fold", "squeeze", "t"}  # fmt: skip
"""Functions after which a dimension need not be what it was, whatever the shapes."""

_MEANS = {"mean", "sum", "amax"}

# Sizes that tell the dimensions of a tensor apart.
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class ChannelDims(TorchFunctionMode):
    """Follows a forward, and knows of its tensors which dimension holds their channels.

    A convolution, a BatchNorm or a pooling has its channels in the second dimension, a linear layer or a LayerNorm in
    the last one; a permutation moves them, and what computes entry by entry leaves them where they are. What is read by
    the first operation of such a kind is known by it, too. Nothing else is taken to be known.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers.channels import ChannelDims
        >>> convolution = nn.Conv2d(1, 4, 1)
        >>> with ChannelDims() as dims:
        ...     features = convolution(torch.zeros(1, 1, 4, 4))
        ...     permuted = features.relu().permute(0, 2, 3, 1)
        >>> dims.of(features), dims.of(permuted), dims.of(torch.zeros(1, 4, 4, 4))
        (1, 3, None)
    """

    def __init__(self) -> None:
        super().__init__()
        # With the tensors, so that no other one gets the number of one that has gone.
        self._known: dict[int, tuple[Tensor, int]] = {}

    def of(self, tensor: Tensor) -> int | None:
        """The dimension of a tensor's channels; ``None``: nothing has told."""
        known = self._known.get(id(tensor))
        return None if known is None or known[1] >= tensor.ndim else known[1]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, and note what it does to the channels."""
        call = _Call(func, args, kwargs or {})
        result = func(*call.args, **call.kwargs)
        several = isinstance(result, (tuple, list))
        for tensor in (result if call.name in _PARTS else result[:1]) if several else [result]:
            if isinstance(tensor, Tensor) and (dim := self._dim_after(call, tensor)) is not None:
                self._known[id(tensor)] = tensor, dim
        return result

    def _dim_after(self, call: _Call, result: Tensor) -> int | None:
        first = call.first
        before = self.of(first)
        if (own := call.own_dim()) is not None:
            if before is None and first.is_floating_point():
                self._known[id(first)] = first, own % first.ndim
            # What works along another dimension than that of the channels, on tokens say, leaves them where they are.
            return before if before is not None and first.ndim == result.ndim else own % result.ndim
        if before is None and (left := call.left_by_mean()) is not None:
            self._known[id(first)] = first, left
        if call.name in _MOVES:
            return None if before is None else call.moved(before)
        if call.name in _RESHAPES:
            return None if before is None else _reshaped(first.shape, result.shape, before)
        if call.name in _MIXES or (call.name == "__getitem__" and not _are_slices(call.args[1])):
            return None
        alike = [
            part.ndim == result.ndim if call.name in _PARTS else part.shape == result.shape for part in call.tensors()
        ]
        # The dimension that is known of some of them, and no other of the rest.
        known = {self.of(part) for part, is_alike in zip(call.tensors(), alike, strict=True) if is_alike} - {None}
        return known.pop() if len(known) == 1 else None


class _Call(NamedTuple):
    """A function and what it is called with."""

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        name: str = getattr(self.func, "__name__", "")
        # Of an attribute, ``tensor.T`` say.
        return getattr(getattr(self.func, "__self__", None), "__name__", "") if name == "__get__" else name

    @property
    def first(self) -> Tensor:
        """What it works on; a tensor of which nothing is known, if that is none."""
        found = self.args[0] if self.args else self.kwargs.get("input")
        return found if isinstance(found, Tensor) else _NOTHING

    def tensors(self) -> list[Tensor]:
        return [part for part in tree_leaves((self.args, self.kwargs)) if isinstance(part, Tensor)]

    def own_dim(self) -> int | None:
        """Where it has its channels, if it says so itself."""
        if self.name[-2:] in ("1d", "2d", "3d"):
            return -1 - int(self.name[-2])
        if self.name == "layer_norm":
            shape = self.args[1] if len(self.args) > 1 else self.kwargs["normalized_shape"]
            return -1 if len(shape) == 1 else None
        return 1 if self.name in _SECOND else -1 if self.name in _LAST else None

    def left_by_mean(self) -> int | None:
        """Of a mean over two dimensions of ``(N, C, H, W)`` or ``(N, H, W, C)``, the third."""
        given = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else None)
        if self.name not in _MEANS or self.first.ndim != 4 or not isinstance(given, (tuple, list)):
            return None
        left = {0, 1, 2, 3} - {dim % 4 for dim in given}
        return max(left) if len(left) == 2 and 0 in left else None

    def moved(self, dim: int) -> int:
        """Where it moves a dimension."""
        sizes = _PRIMES[: self.first.ndim]
        rest = {name: value for name, value in self.kwargs.items() if name != "input"}
        probe = self.func(torch.empty(sizes, device="meta"), *self.args[1:], **rest)
        return tuple(probe.shape).index(sizes[dim])


_NOTHING = torch.empty(0, dtype=torch.int64)


def _reshaped(before: Sequence[int], after: Sequence[int], dim: int) -> int | None:
    """A dimension stays what it is if all before it, or all behind it, have kept their sizes, and itself."""
    if tuple(before[: dim + 1]) == tuple(after[: dim + 1]):
        return dim
    behind = len(before) - dim
    return len(after) - behind if tuple(before[dim:]) == tuple(after[-behind:]) else None


def _are_slices(index: Any) -> bool:
    return all(
        part is Ellipsis or isinstance(part, slice) for part in (index if isinstance(index, tuple) else (index,))
    )
