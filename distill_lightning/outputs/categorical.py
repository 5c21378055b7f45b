"""Outputs that are logits of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import IGNORED, Batch, spread
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.outputs.metrics import Agreement, MeanDivergence, classification_metrics
from distill_lightning.outputs.output import Output, check_is_tensor

_POSITIONS = (
    "use a module that takes positions: SupervisedModule, KDModule, CompressionBaseline, or SelfKDModule with "
    "past=PastModel()"
)


@dataclass(frozen=True)
class Categorical(Output):
    """Logits ``(N, K)`` of classes, or ``(N, T, K)`` where each position has one; distributions are probabilities.

    Any number of dimensions may stand in the place of ``T``. Everything here but `check` reads the classes from the
    last one, to which `laid_out` brings them.

    Args:
        num_classes: ``K``.
        class_dim: where networks that predict positions have the classes: ``"last"``, ``(N, T, K)``; ``"second"``,
            ``(N, K, T)`` or ``(N, K, H, W)``, as `torch.nn.CrossEntropyLoss` does; ``None``: last, and where the
            second dimension has ``K`` entries, too, the first output is refused.

    Raises:
        InputError: fewer than two classes, or an unknown dimension.

    Example:
        >>> import torch
        >>> from torch import tensor
        >>> from distill_lightning import Batch, Categorical
        >>> output = Categorical(2)
        >>> batch = Batch(input=torch.zeros(2, 4), target=tensor([0, 1]))
        >>> output.label_loss(tensor([[0.0, 0.0], [0.0, 2.0]]), batch)
        tensor(0.4100)
        >>> output.uncertainty(tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """

    num_classes: int
    class_dim: Literal["last", "second"] | None = None

    name = "probabilities"
    label_term = "ce"
    has_temperature = True

    def __post_init__(self) -> None:
        """Check the number of classes."""
        if self.num_classes < 2:
            raise InputError(f"num_classes must be at least 2, got {self.num_classes}")
        if self.class_dim is not None:
            self.check_known(class_dim=("last", "second"))

    def needs_layout(self, shape: Sequence[int]) -> str:
        """Where the classes stand, if they may be in the second dimension as well as in the last."""
        if self.class_dim is not None or len(shape) < 3 or not shape[1] == shape[-1] == self.num_classes:
            return ""
        return (
            f"{self.num_classes} entries in its second and in its last dimension: say which are the classes, "
            f"output=Categorical({self.num_classes}, class_dim='last') or class_dim='second'"
        )

    def laid_out(self, output: Tensor) -> Tensor:
        """``(N, K)`` as it is, ``(N, T, K)`` of any layout."""
        return output.movedim(1, -1) if self.class_dim == "second" and output.ndim > 2 else output

    def check(self, who: str, network: nn.Module, shape: Sequence[int], *, per_position: bool = False) -> None:
        """The last dimension, or that of ``class_dim``, must be ``K``, and the only one unless ``per_position``."""
        if len(shape) > 2 and shape[1 if self.class_dim == "second" else -1] == self.num_classes:
            if not per_position:
                raise InputError(
                    f"{who} ({type(network).__name__}) predicts a class for each position, {tuple(shape)}: {_POSITIONS}"
                )
        elif len(shape) != 2 or shape[1] != self.num_classes:
            found = f"{shape[1]} classes" if len(shape) == 2 else f"an output of shape {tuple(shape)}"
            is_second = len(shape) > 2 and self.class_dim is None and shape[1] == self.num_classes
            way_out = f"output=Categorical({self.num_classes}, class_dim='second')" if is_second else ""
            raise InputError(
                f"{who} ({type(network).__name__}) has {found} where num_classes={self.num_classes} is needed: "
                f"{way_out and f'give {way_out}, or '}build it with the data's number of classes"
            )

    def check_values(self, who: str, output: Tensor) -> None:
        """Rows between 0 and 1 that sum to 1 are no logits."""
        rows = output.detach().float().flatten(0, -2)
        # Of logits that happens by chance for a row, not for all of several.
        if len(rows) > 1 and (rows >= 0).all() and ((rows.sum(dim=1) - 1).abs() < 1e-3).all():
            raise InputError(f"{who} gives probabilities where logits are needed: leave out its softmax")

    def broken(self, output: Tensor) -> Tensor:
        """Where logits hold nan or infinity, or are all minus infinity, which is how single classes are masked."""
        lowest, largest = output.aminmax(dim=-1)
        return ~largest.isfinite() | lowest.isnan()

    def check_target(
        self, who: str, target: Tensor | None, *, per_position: bool = False, is_evaluated: bool = False
    ) -> None:
        """One class for each sample, unless ``per_position``; or, for a loss, a distribution ``(N, K)``."""
        if target is None:
            return
        check_is_tensor(who, target)
        found = f"{who}: the targets are {str(target.dtype).removeprefix('torch.')} of shape {tuple(target.shape)}"
        if target.is_floating_point():
            if target.ndim < 2 or target.shape[-1] != self.num_classes:
                raise InputError(f"{found}: give classes as integers (N,), or distributions (N, {self.num_classes})")
            if is_evaluated:
                raise InputError(f"{found}, and metrics need classes: give integers, target.argmax(-1) for example")
        elif target.is_complex() or target.ndim == 0:
            raise InputError(f"{found}: give classes as integers (N,)")
        elif target.ndim > 1 and not per_position:
            ways = {1: "give target.squeeze(1), or ", self.num_classes: "give target.argmax(1) or floats, or "}
            raise InputError(
                f"{who} takes one class for each sample, and the targets have shape {tuple(target.shape)}: "
                f"{ways.get(target.shape[-1], '')}{_POSITIONS}"
            )

    def as_target(self, target: Tensor) -> Tensor:
        """Classes in int64, which `torch.nn.functional.one_hot` insists on."""
        return target if target.is_floating_point() or target.is_complex() else target.long()

    def target_rule(self, target: Tensor) -> str:
        """The range of classes, or what a distribution is."""
        if target.is_floating_point():
            return "distributions, not negative and of sum 1"
        return f"classes from 0 to {self.num_classes - 1}, or {IGNORED} where none counts"

    def wrong_targets(self, target: Tensor) -> Tensor:
        """Classes out of range, ``(N,)`` or ``(N, T)``, and rows that are no distributions."""
        if target.is_floating_point():
            # Half precision rounds each of K numbers, and what is left of 1 may be a little less than nothing.
            return ~((target > -1e-3).all(dim=-1) & ((target.float().sum(dim=-1) - 1).abs() < 0.01))
        classes = target.long()
        return ((classes < 0) | (classes >= self.num_classes)) & (classes != IGNORED)

    def check_rule(self, combine: str) -> None:
        """Probabilities are combined, or logits."""
        if combine not in ("probabilities", "logits"):
            raise InputError(f"combine must be 'probabilities' or 'logits', got {combine!r}")

    def select(self, output: Tensor, target: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows ``(R, K)``, and ``(R,)`` classes or ``(R, K)``."""
        if counted is not None and counted.ndim == 1:
            output, target = output[counted], target[counted]
        _check_pair(output, target)
        rows, targets = functional.by_position(output, target)
        if counted is not None and counted.ndim > 1:
            counted = counted.flatten()
            rows, targets = rows[counted], targets[counted]
        return rows, targets

    def counted(self, output: Tensor, batch: Batch) -> Tensor | None:
        """Bool ``(N,)``, or ``(N, T)`` of outputs for positions, among which targets of -100 do not count."""
        counted, target, places = batch.counted, batch.target, output[..., 0]
        if isinstance(target, Tensor):
            _check_pair(output, target)
        if counted is not None:
            counted = spread(counted, places).expand(places.shape)
        if output.ndim < 3 or target is None or target.is_floating_point():
            return counted
        # On the CPU a batch in which everything counts has no mask; building one here makes its means match other
        # devices' bit for bit.
        known: Tensor = target != IGNORED
        return known if counted is None else known & counted

    def label_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross entropy to classes ``(N,)``, ``(N, T)``, or to distributions ``(N, K)``."""
        if batch.target is None:
            raise InputError(
                "the labels have a weight in the loss, and the batch has none: let the data module give them"
            )
        _check_pair(output, batch.target)
        logits, target = functional.by_position(wide(output), batch.target)
        if batch.counted is None:
            return F.cross_entropy(logits, target)
        counted = self.counted(output, batch)
        rows = F.cross_entropy(logits, target, reduction="none")
        return functional.counted_mean(rows, None if counted is None else counted.flatten())

    def divergence_rows(self, output: Tensor, distribution: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Sum over the classes, times ``temperature ** 2``, see `functional.softened_kl_rows`."""
        return functional.softened_kl_rows(output, distribution, temperature=temperature, from_logits=False)

    def divergence(self, output: Tensor, distribution: Tensor, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Mean over the samples or positions that count."""
        rows = self.divergence_rows(output, distribution, temperature=temperature)
        return functional.counted_mean(rows, self.counted(output, batch))

    def point_divergence_rows(self, output: Tensor, distribution: Tensor) -> Tensor:
        """Cross entropy to the distribution's most probable class, ``(N,)``."""
        return F.cross_entropy(wide(output), distribution.argmax(dim=1), reduction="none")

    def collapse(
        self,
        outputs: Sequence[Tensor],
        *,
        weights: Sequence[float] | None = None,
        combine: str = "probabilities",
        temperature: float = 1.0,
    ) -> Tensor:
        """Mean of the softmaxes or, with ``combine="logits"``, softmax of the mean."""
        self.check_rule(combine)
        logits = torch.stack(list(outputs))
        if combine == "probabilities":
            return functional.mean_probabilities(logits, temperature=temperature, weights=weights)
        mean = functional.weighted_mean(wide(logits), weights)
        return functional.mean_probabilities(mean[None], temperature=temperature)

    def uncertainty(self, distribution: Tensor) -> Tensor:
        """Entropy of each sample or position in nats."""
        entropy: Tensor = torch.special.entr(distribution).sum(dim=-1)
        return entropy

    def prediction(self, output: Tensor) -> Tensor:
        """The logits, as they are."""
        return output

    def as_prediction(self, distribution: Tensor) -> Tensor:
        """Log-probabilities; a probability that underflowed to zero is the smallest one."""
        return distribution.clamp_min(torch.finfo(distribution.dtype).tiny).log()

    def comparison(self, output: Tensor, distribution: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
        """``agreement``: share of samples on which both name the same class."""
        same = output.argmax(dim=-1) == distribution.argmax(dim=-1)
        return {"agreement": functional.counted_mean(same.float(), counted)}

    def metrics(self) -> MetricCollection:
        """`classification_metrics`."""
        return classification_metrics(self.num_classes)

    def teacher_metrics(self) -> MetricCollection:
        """``agreement``, and ``teacher_kl`` in nats."""
        return MetricCollection({"agreement": Agreement(), "teacher_kl": MeanDivergence()}, compute_groups=False)


def _check_pair(output: Tensor, target: Tensor) -> None:
    """Refuse integers that are no class for each sample; those of positions are looked at where they are unfolded."""
    if output.ndim == 2 and not target.is_floating_point() and target.ndim != 1:
        raise InputError(
            f"an output of shape {tuple(output.shape)} needs classes of shape {tuple(output.shape[:1])}, and the "
            f"targets have {tuple(target.shape)}: reshape them, or choose a network that predicts what they are"
        )
