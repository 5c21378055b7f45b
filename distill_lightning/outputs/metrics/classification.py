"""What torchmetrics lacks, or counts otherwise, for classification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.functional.calibration import ECE_BINS
from distill_lightning.outputs.metrics.exact import ExactMetric
from distill_lightning.outputs.metrics.mean import SampleMean


class Accuracy(SampleMean):
    """Share of samples whose class is among the ``top`` largest of the logits ``(N, K)``.

    torchmetrics' accuracy fails on a batch without samples, which a process may have as its last.

    Args:
        top: how many classes a sample may name.

    Raises:
        InputError: ``top`` is not positive.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import Accuracy
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> metric = Accuracy()
        >>> metric.update(logits, target)
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = True

    def __init__(self, *, top: int = 1) -> None:
        super().__init__()
        if top < 1:
            raise InputError(f"top must be at least 1, got {top}")
        self.top = top

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, K)`` and classes ``(N,)``."""
        # argmax and not topk for one: of equal logits the first counts, as everywhere else.
        named = logits.argmax(dim=-1, keepdim=True) if self.top == 1 else logits.topk(self.top, dim=-1).indices
        hits = (named == target.unsqueeze(-1)).any(dim=-1)
        self.total += hits.sum()
        self.count += len(target)


class NegativeLogLikelihood(SampleMean):
    """Mean of ``-log p(target)`` in nats, from logits ``(N, K)`` and classes ``(N,)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import NegativeLogLikelihood
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(logits, target)
        >>> metric.compute()
        tensor(0.5167)
    """

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.total += F.cross_entropy(logits.float(), target, reduction="sum")
        self.count += len(target)


class BrierScore(SampleMean):
    """`distill_lightning.functional.brier_score` over all batches, in ``[0, 2]``.

    From logits ``(N, K)`` and classes ``(N,)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import BrierScore
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> metric = BrierScore()
        >>> metric.update(logits, target)
        >>> metric.compute()
        tensor(0.3467)
    """

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.add(functional.brier_score(logits, target), len(target))


class MeanDivergence(SampleMean):
    r"""Mean over the samples of :math:`\mathrm{KL}(\text{teacher} \,\|\, \text{student})` at temperature 1, in nats.

    From the student's logits ``(N, K)`` and the teacher's log-probabilities ``(N, K)``, minus infinity allowed.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import MeanDivergence
        >>> student_logits, teacher_probs = tensor([[0.0, 0.0]]), tensor([[0.9, 0.1]])
        >>> metric = MeanDivergence()
        >>> metric.update(student_logits, teacher_probs.log())
        >>> metric.compute()
        tensor(0.3681)
    """

    def update(self, student_logits: Tensor, teacher_log_probs: Tensor) -> None:
        """Add a batch."""
        # As probabilities, because 0 * log 0 must be 0 where the teacher gives a class no mass.
        probs = teacher_log_probs.float().exp()
        self.total += functional.softened_kl_rows(student_logits, probs, from_logits=False).sum()
        self.count += len(probs)


class CalibrationError(ExactMetric):
    """Expected calibration error of `distill_lightning.functional.expected_calibration_error`, over all batches.

    torchmetrics puts a confidence of exactly 1 into a bin of its own; here it counts in the last one.

    Args:
        bins: number of equally wide bins.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import CalibrationError
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> metric = CalibrationError()
        >>> metric.update(logits, target)
        >>> metric.compute()
        tensor(0.0781)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    binned: Tensor

    def __init__(self, *, bins: int = ECE_BINS) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("binned", torch.zeros(3, bins), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, K)`` and classes ``(N,)``."""
        confidence, predicted = F.softmax(logits.float(), dim=-1).max(dim=-1)
        bins = functional.calibration_bins(confidence, predicted == target, bins=self.bins)
        self.binned += torch.stack(bins).to(self.binned)

    def compute(self) -> Tensor:
        """The error over everything added."""
        return functional.binned_calibration_error(*self.binned.unbind())


class Confidences(ExactMetric):
    """How sure a network is of each sample, and whether it is right: 8 bytes a sample, from all processes.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import Confidences
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0]]), tensor([0, 1])
        >>> metric = Confidences()
        >>> metric.update(logits, target)
        >>> metric.compute()
        (tensor([0.8808, 0.7311]), tensor([1., 0.]))
    """

    is_differentiable = False
    full_state_update = False
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("confidence", [], dist_reduce_fx="cat")
        # Numbers and not booleans: a process without samples joins in with an empty float32 tensor.
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, K)`` and classes ``(N,)``."""
        confidence, predicted = F.softmax(logits.float(), dim=-1).max(dim=-1)
        self.confidence.append(confidence)
        self.correct.append((predicted == target).float())

    def joined(self) -> tuple[Tensor, Tensor]:
        """Confidence and correctness of everything added, two float32 tensors ``(N,)``."""
        return _joined(self.confidence), _joined(self.correct)

    def compute(self) -> Tensor | tuple[Tensor, Tensor]:
        """As `joined`, over all processes."""
        return self.joined()


class AURC(Confidences):
    """Area under the risk-coverage curve, **times 1000** as in Self-KD's tables; smaller is better.

    `distill_lightning.functional.area_under_risk_coverage` over all batches, from logits ``(N, K)`` and classes
    ``(N,)``: 0 where every answer is right, 1000 where every answer is wrong. It keeps two numbers a sample. Equal
    confidences keep the order of the batches.

    Args:
        excess: E-AURC instead, `distill_lightning.functional.excess_area_under_risk_coverage`: only what a better order
            of the same answers would avoid.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import AURC
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> metric = AURC()
        >>> metric.update(logits, target)
        >>> metric.compute()
        tensor(62.5000)
    """

    higher_is_better = False

    def __init__(self, *, excess: bool = False) -> None:
        super().__init__()
        self.excess = excess

    def compute(self) -> Tensor:
        """The area over everything added; NaN if that is nothing."""
        area = functional.excess_area_under_risk_coverage if self.excess else functional.area_under_risk_coverage
        return 1000 * area(*self.joined())


class Agreement(SampleMean):
    """Share of samples on which two networks name the same class, from their outputs ``(N, K)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import Agreement
        >>> student_logits = tensor([[2.0, 0.0], [1.0, 0.0]])
        >>> teacher_logits = tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> metric = Agreement()
        >>> metric.update(student_logits, teacher_logits)
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add a batch."""
        self.total += (first.argmax(dim=-1) == second.argmax(dim=-1)).sum()
        self.count += len(first)


def classification_metrics(num_classes: int) -> MetricCollection:
    """What every classifier is judged by.

    ``accuracy`` (the plain share of samples that are right), ``nll`` (nats), ``ece`` (15 bins), ``brier``, ``aurc`` and
    ``eaurc`` (both times 1000), and ``top5`` beyond five classes.

    Args:
        num_classes: ``K``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import classification_metrics
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> metrics = classification_metrics(2)
        >>> values = metrics(logits, target)
        >>> {name: round(float(value), 4) for name, value in values.items()}
        {'accuracy': 0.75, 'aurc': 62.5, 'brier': 0.3467, 'eaurc': 0.0, 'ece': 0.0781, 'nll': 0.5167}
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": Accuracy(),
        "nll": NegativeLogLikelihood(),
        "ece": CalibrationError(),
        "brier": BrierScore(),
        "aurc": AURC(),
        "eaurc": AURC(excess=True),
    }
    if num_classes > 5:
        metrics["top5"] = Accuracy(top=5)
    return MetricCollection(metrics, compute_groups=False)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    # Between processes torchmetrics has joined the list itself.
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.zeros(0, dtype=torch.float32)
