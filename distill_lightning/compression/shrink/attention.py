"""Multi-head attention whose heads can be removed, in place of PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.compression.access.hooks import carry_hooks, check_hooks
from distill_lightning.errors import InputError

_SHOWING = ("__init__", "__repr__", "extra_repr", "_reset_parameters", "__setstate__", "__getstate__", "__class__")


class Attention(nn.Module):
    """Computes the same as `nn.MultiheadAttention`, with separate projections and any number of heads.

    The projections ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are ordinary linear layers, so that everything
    that handles linear layers (quantization, low rank, counting hooks) finds them. The arguments of a call and its
    results are those of `nn.MultiheadAttention`, also inside PyTorch's Transformer layers. Their fast path, which would
    bypass this module, is never used.

    Args:
        embed_dim: features ``E`` of a query and of the output.
        num_heads: ``h``; an ``attn_mask`` of three dimensions is ``(N h, L, S)``.
        head_dim: features of one head.
        kdim: features of a key; ``None``: ``E``.
        vdim: features of a value; ``None``: ``E``.
        bias: whether the projections have a bias.
        dropout: dropout probability of the attention weights in training.
        batch_first: whether sequences are ``(N, L, E)`` instead of ``(L, N, E)``.
        device: device of the parameters.
        dtype: type of the parameters.

    Raises:
        InputError: a size that is not positive.
    """

    in_proj_weight: None = None
    in_proj_bias: None = None
    """Read by PyTorch's Transformer layers, which with False do not use their fast path."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "head_dim": head_dim, "kdim": kdim, "vdim": vdim}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"Attention: {name} must be at least 1, got {size}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        # The projections may be replaced by layers without such attributes.
        self.bias = bias
        inner = num_heads * head_dim
        self.q_proj = nn.Linear(embed_dim, inner, bias, device, dtype)
        self.k_proj = nn.Linear(self.kdim, inner, bias, device, dtype)
        self.v_proj = nn.Linear(self.vdim, inner, bias, device, dtype)
        self.out_proj = nn.Linear(inner, embed_dim, bias, device, dtype)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def forward(  # noqa: PLR0917  # as PyTorch's Transformer layers call it
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002  # in PyTorch's order
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the output and, if asked for, the attention weights.

        Args:
            query: ``(L, N, E)``, ``(N, L, E)`` with ``batch_first``, or ``(L, E)``.
            key: the same with ``S`` for ``L`` and ``kdim`` features.
            value: the same with ``S`` for ``L`` and ``vdim`` features.
            key_padding_mask: ``(N, S)`` or ``(S,)``: true, or minus infinity, where a key is left out.
            need_weights: whether the weights are returned.
            attn_mask: ``(L, S)`` or ``(N h, L, S)``: true where a query does not see a key, or a number that is added.
            average_attn_weights: whether the weights are averaged over the heads, ``(N, L, S)`` instead of ``(N, h, L,
                S)``.
            is_causal: whether ``attn_mask`` is causal, which makes no difference here.

        Raises:
            InputError: ``is_causal`` without ``attn_mask``, or an ``attn_mask`` of another shape.
        """
        if is_causal and attn_mask is None:
            raise InputError("Attention: is_causal needs attn_mask, as in nn.MultiheadAttention: give the mask")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _split(self, projected: Tensor) -> Tensor:
        """``(N, L, h d)`` to ``(N, h, L, d)``."""
        return projected.reshape(*projected.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one additive mask, broadcast to ``(N, h, L, S)``."""
        shape = (q.shape[0], self.num_heads, q.shape[2], k.shape[2])
        mask = None
        if attn_mask is not None:
            if attn_mask.shape not in (shape[2:], (shape[0] * shape[1], *shape[2:])):
                raise InputError(
                    f"Attention: attn_mask has shape {tuple(attn_mask.shape)}, but must have {shape[2:]} or "
                    f"{(shape[0] * shape[1], *shape[2:])}, for each of {self.num_heads} heads"
                )
            mask = _additive(attn_mask, q)
            mask = mask.view(shape) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q).view(-1, 1, 1, shape[3])
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def convert_attention(network: nn.Module, paths: Collection[str] | None = None) -> nn.Module:
    """Replace every `nn.MultiheadAttention` inside a network by an `Attention` that computes the same, in place.

    One of a class that computes something of its own, see `foreign_attention`, stays.

    Where PyTorch's encoder has a ``src_key_padding_mask`` in eval mode, its fast path writes zeros to the outputs at
    padded positions; without the fast path they are ordinary numbers, as in training.

    Args:
        network: the network to change.
        paths: paths of those that are replaced; ``None`` for all.

    Returns:
        The same network, or the new `Attention` if the network itself is an `nn.MultiheadAttention`.

    Raises:
        InputError: an attention has ``add_bias_kv``, ``add_zero_attn`` or hooks of its state dict; nothing is changed
            then.
    """
    check_attention(network)
    foreign = foreign_attention(network)
    converted = {
        id(module): from_multihead(module)
        for path, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention) and path not in foreign and (paths is None or path in paths)
    }
    if id(network) in converted:
        return converted[id(network)]
    for parent in list(network.modules()):
        # All names of a shared layer, not only the first one as in named_children.
        for name, child in parent._modules.items():  # noqa: SLF001
            if id(child) in converted:
                setattr(parent, name, converted[id(child)])
    forbid_nested(network)
    return network


def check_attention(network: nn.Module) -> None:
    """Refuse a network with attention whose replacement would miss something. One that stays is passed over.

    Raises:
        InputError: an attention has hooks of its state dict.
    """
    foreign = foreign_attention(network)
    for path, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention) and path not in foreign:
            check_hooks(path, module)


def foreign_attention(network: nn.Module) -> dict[str, str]:
    """Why attention cannot be replaced by one that computes the same, by path: its class is another one."""
    found = {
        path: overridden(module, nn.MultiheadAttention)
        for path, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    return {path: f"its class has its own {methods[0]}()" for path, methods in found.items() if methods}


def overridden(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """The methods of one of PyTorch's classes in whose place a module has its own.

    Constructors and what only shows or saves a module are left out.
    """
    below = type(module).__mro__[: type(module).__mro__.index(kind)]
    return [
        name
        for own in (module, *below)
        for name, value in vars(own).items()
        if callable(value) and callable(getattr(kind, name, None)) and name not in _SHOWING
    ]


def from_multihead(attention: nn.MultiheadAttention) -> Attention:
    """An `Attention` with copies of the weights of PyTorch's attention, and with its hooks.

    Raises:
        InputError: it has ``add_bias_kv`` or ``add_zero_attn``.
    """
    if attention.bias_k is not None or attention.add_zero_attn:
        raise InputError(
            "nn.MultiheadAttention with add_bias_kv or add_zero_attn has no counterpart with free heads: build it "
            "without, or leave it out"
        )
    own = rebuild_attention(attention, describe_attention(attention))
    carry_hooks(attention, own)
    packed = attention.in_proj_weight
    separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = None if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    with torch.no_grad():
        for number, weight in enumerate(separate if packed is None else packed.chunk(3)):
            projection = (own.q_proj, own.k_proj, own.v_proj)[number]
            projection.weight.copy_(weight)
            projection.weight.requires_grad_((weight if packed is None else packed).requires_grad)
            if biases is not None:
                projection.bias.copy_(biases[number])
                projection.bias.requires_grad_(attention.in_proj_bias.requires_grad)
        for name, parameter in attention.out_proj.named_parameters():
            own.out_proj.get_parameter(name).copy_(parameter)
            own.out_proj.get_parameter(name).requires_grad_(parameter.requires_grad)
    return own


def describe_attention(attention: nn.MultiheadAttention | Attention) -> dict[str, Any]:
    """The arguments of the `Attention` that computes the same, in plain values."""
    names = ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first")
    bias = attention.bias if isinstance(attention, Attention) else attention.out_proj.bias is not None
    return {**{name: getattr(attention, name) for name in names}, "bias": bias}


def rebuild_attention(original: nn.MultiheadAttention | Attention, description: dict[str, Any]) -> Attention:
    """A new `Attention` as described, with the original's device, type and mode, and its own weights."""
    weight = original.out_proj.weight
    return Attention(**description, device=weight.device, dtype=weight.dtype).train(original.training)


def forbid_nested(network: nn.Module) -> None:
    """Stop `nn.TransformerEncoder` from using nested tensors, in place, if one of its layers has an `Attention`.

    It would read the packed weights, which no longer exist.
    """
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, Attention) for m in module.modules()):
            module.use_nested_tensor = False
