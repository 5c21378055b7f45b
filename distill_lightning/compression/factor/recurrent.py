"""Recurrent layers whose weights are stored as factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.costs.products import Cost
from distill_lightning.compression.factor.decompositions import exact, relative_error, truncated_svd
from distill_lightning.compression.factor.layers import copy_into, take_over


class _FactoredWeights(nn.RNNBase):
    """The common part of the three kinds: weights as ``<name>_left @ <name>_right``, recomposed once per forward pass.

    Biases, and weights that ``ranks`` does not name, stay parameters under their own names.
    """

    def __init__(self, layer: nn.RNNBase, *, ranks: Mapping[str, int], **options: Any) -> None:
        plain = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
        options |= {name: getattr(layer, name) for name in plain}
        weight = next(layer.parameters())
        super().__init__(**options, device="meta", dtype=weight.dtype)
        self.dropout = layer.dropout  # set afterwards: with one layer, the constructor would warn about it again
        self.ranks = dict(ranks)
        for name, rank in self.ranks.items():
            rows, columns = getattr(self, name).shape
            delattr(self, name)
            for suffix, shape in (("left", (rows, rank)), ("right", (rank, columns))):
                factor = torch.empty(shape, device="meta", dtype=weight.dtype)
                self.register_parameter(f"{name}_{suffix}", nn.Parameter(factor))
        self.description = {"kind": "recurrent", "ranks": self.ranks}
        take_over(self, layer, weight)

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        return f"{super().extra_repr()}, ranks={self.ranks}"

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the fused operation of the dense layer on weights that are recomposed first."""
        before = self._flat_weights
        self._flat_weights = [self._weight(name) for name in self._flat_weights_names]
        try:
            return super().forward(*inputs, **named)
        finally:
            # Otherwise the layer would hold a graph and could not be copied.
            self._flat_weights = before

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights like the dense layer, and factors such that their product has the same variance."""
        super().reset_parameters()
        # The base class draws once before there are factors.
        for name, rank in getattr(self, "ranks", {}).items():
            for suffix in ("left", "right"):
                getattr(self, f"{name}_{suffix}").normal_(std=(3 * self.hidden_size * rank) ** -0.25)

    def fill(self, layer: nn.RNNBase) -> float:
        """Copy the factors of a dense layer's weights, and the parameters that are not factored.

        Returns:
            The relative error of the factored weights together.
        """
        approximated, originals = [], []
        for name, rank in self.ranks.items():
            weight = exact(getattr(layer, name))
            factors = truncated_svd(weight, rank)
            copy_into({getattr(self, f"{name}_left"): factors.left, getattr(self, f"{name}_right"): factors.right})
            approximated.append(factors.full().flatten())
            originals.append(weight.flatten())
        copy_into({own: getattr(layer, name) for name, own in self.named_parameters() if hasattr(layer, name)})
        return relative_error(torch.cat(approximated), torch.cat(originals))

    def count_macs(self, inputs: tuple[Any, ...], output: Any) -> Cost:
        """The cost of the dense layer at every step of every sample, plus the products of the factors once."""
        given = inputs[0].data if isinstance(inputs[0], nn.utils.rnn.PackedSequence) else inputs[0]
        steps = given.shape[:-1].numel()
        weights = [self._weight(name) for name in self._flat_weights_names if name.startswith("weight")]
        dense = steps * sum(weight.numel() for weight in weights)
        effective = steps * sum(int(weight.count_nonzero()) for weight in weights)
        for name in self.ranks:
            left, right = getattr(self, f"{name}_left"), getattr(self, f"{name}_right")
            dense += left.numel() * right.shape[1]
            # Column k of the left factor meets row k of the right one.
            effective += int((left.count_nonzero(dim=0) * right.count_nonzero(dim=1)).sum())
        return Cost(dense, effective)

    def _weight(self, name: str) -> Tensor:
        if name not in self.ranks:
            weight: Tensor = getattr(self, name)
            return weight
        left, right = getattr(self, f"{name}_left"), getattr(self, f"{name}_right")
        # The fused operation casts all of its weights, so these must have the type of the others.
        with torch.autocast(left.device.type, enabled=False):
            return torch.mm(left, right)

    def _update_flat_weights(self) -> None:
        """Do nothing: `forward` sets the weights, and the base class would look for them by name."""


class FactoredLSTM(_FactoredWeights, nn.LSTM):
    """An LSTM whose weights are stored as factors and recomposed once per forward pass for the fused operation.

    This saves bytes and parameters, but **neither time nor multiply-accumulates**: a step costs as much as in the dense
    layer, and the products of the factors are computed once for the whole sequence.

    Args:
        layer: the dense layer.
        ranks: ranks of the factored weights, by name: ``{"weight_hh_l0": 8}``.
    """

    def __init__(self, layer: nn.LSTM, *, ranks: Mapping[str, int]) -> None:
        super().__init__(layer, ranks=ranks, proj_size=layer.proj_size)


class FactoredGRU(_FactoredWeights, nn.GRU):
    """A GRU whose weights are stored as factors; see `FactoredLSTM` for what this saves.

    Args:
        layer: the dense layer.
        ranks: ranks of the factored weights, by name.
    """

    def __init__(self, layer: nn.GRU, *, ranks: Mapping[str, int]) -> None:
        super().__init__(layer, ranks=ranks)


class FactoredRNN(_FactoredWeights, nn.RNN):
    """An RNN whose weights are stored as factors; see `FactoredLSTM` for what this saves.

    Args:
        layer: the dense layer.
        ranks: ranks of the factored weights, by name.
    """

    def __init__(self, layer: nn.RNN, *, ranks: Mapping[str, int]) -> None:
        super().__init__(layer, ranks=ranks, nonlinearity=layer.nonlinearity)
