"""What predicted tokens, and translations, are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torchmetrics import MetricCollection

from distill_lightning.libraries import package
from distill_lightning.outputs.metrics.classification import Accuracy, CalibrationError, NegativeLogLikelihood


class Perplexity(NegativeLogLikelihood):
    r"""The exponential of the mean negative log-likelihood, :math:`\exp(-\frac{1}{N} \sum_i \log p_i)`.

    From logits ``(N, K)`` and classes ``(N,)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import Perplexity
        >>> metric = Perplexity()
        >>> metric.update(tensor([[0.0, 0.0], [0.0, 0.0]]), tensor([0, 1]))
        >>> metric.compute()
        tensor(2.)
    """

    def compute(self) -> Tensor:
        """The perplexity over everything added; NaN if that is nothing."""
        return super().compute().exp()


class CorpusScore(NamedTuple):
    """A score of a whole corpus.

    Attributes:
        value: from 0 to 100.
        signature: how sacrebleu has computed it; two values can be compared if theirs are equal.
    """

    value: float
    signature: str


def token_metrics() -> MetricCollection:
    """What predicted tokens are judged by, from logits ``(N, K)`` and ids ``(N,)`` of those that count.

    ``nll`` (nats per token), ``perplexity``, ``accuracy`` (share of tokens whose id is the most probable one) and
    ``ece`` (15 bins).

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import token_metrics
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> {name: round(float(value), 4) for name, value in token_metrics()(logits, target).items()}
        {'accuracy': 0.75, 'ece': 0.0781, 'nll': 0.5167, 'perplexity': 1.6764}
    """
    metrics = {
        "accuracy": Accuracy(),
        "nll": NegativeLogLikelihood(),
        "perplexity": Perplexity(),
        "ece": CalibrationError(),
    }
    return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]  # its values are invariant


def corpus_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, CorpusScore]:
    """BLEU and chrF of a whole corpus, as sacrebleu computes them by default; a mean over batches would be another.

    Args:
        translations: texts, not tokenized.
        references: one text for each of them.

    Returns:
        ``"bleu"`` and ``"chrf"``; NaN where there are no translations.

    Raises:
        InputError: sacrebleu is not installed.

    Example:
        >>> from distill_lightning.outputs.metrics import corpus_scores
        >>> scores = corpus_scores(["Ein Hund schläft im hohen Gras."], ["Ein Hund schläft in dem hohen Gras."])
        >>> round(scores["bleu"].value, 2), round(scores["chrf"].value, 2)
        (35.64, 80.56)
        >>> scores["bleu"].signature.partition("|version")[0]
        'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp'

    Post: *A Call for Clarity in Reporting BLEU Scores*, https://arxiv.org/abs/1804.08771; Popović: *chrF: character
    n-gram F-score for automatic MT evaluation*, https://aclanthology.org/W15-3049
    """
    sacrebleu = package("sacrebleu.metrics", extra="translation")
    found = {}
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        # Without translations it raises; without a call it knows no number of references for its signature.
        value = metric.corpus_score(list(translations) or [""], [list(references) or [""]]).score
        found[name] = CorpusScore(value if translations else float("nan"), str(metric.get_signature()))
    return found
