"""Outputs that are logits of the next token of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchmetrics import MetricCollection

from distill_lightning.outputs.categorical import Categorical
from distill_lightning.outputs.metrics import token_metrics


@dataclass(frozen=True)
class Tokens(Categorical):
    """Logits ``(N, T, K)`` of the token at each position of a text, judged by `outputs.metrics.token_metrics`.

    Args:
        num_classes: ``K``, the number of token ids.
        class_dim: see `Categorical`.

    Example:
        >>> from distill_lightning.outputs import Tokens
        >>> sorted(Tokens(8000).metrics())
        ['accuracy', 'ece', 'nll', 'perplexity']
    """

    class_dim: Literal["last", "second"] | None = "last"

    def metrics(self) -> MetricCollection:
        """`token_metrics`."""
        return token_metrics()
