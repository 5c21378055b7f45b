"""Scores of translations against sacrebleu itself, and metrics of tokens against plain loops."""

import math

import pytest
import sacrebleu
import torch

from distill_lightning import Batch, Categorical, Tokens
from distill_lightning.outputs.metrics import corpus_scores, token_metrics

TRANSLATIONS = ["Ein Hund läuft schnell über das Gras.", "Zwei Katzen sitzen hier.", "Ein Haus"]
REFERENCES = ["Ein Hund rennt schnell über das Gras.", "Zwei Katzen sitzen dort im Haus.", "Das Haus ist alt."]


def test_scores_are_sacrebleus_of_the_whole_corpus():
    scores = corpus_scores(TRANSLATIONS, REFERENCES)
    assert scores["bleu"].value == sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES]).score
    assert scores["chrf"].value == sacrebleu.corpus_chrf(TRANSLATIONS, [REFERENCES]).score
    parts = [corpus_scores([one], [other])["bleu"].value for one, other in zip(TRANSLATIONS, REFERENCES, strict=True)]
    assert abs(scores["bleu"].value - sum(parts) / 3) > 1
    for name, start in (
        ("bleu", "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"),
        ("chrf", "nrefs:1|case:mixed|"),
    ):
        assert scores[name].signature.startswith(start)
    assert corpus_scores(TRANSLATIONS[::-1], REFERENCES[::-1]) == scores


def test_a_corpus_of_nothing_has_no_score_and_one_of_itself_the_best():
    assert all(math.isnan(score.value) for score in corpus_scores([], []).values())
    assert [score.value for score in corpus_scores(REFERENCES, REFERENCES).values()] == pytest.approx([100, 100])


def test_metrics_of_tokens_are_those_of_all_batches_together():
    logits, target = 2 * torch.randn(50, 7), torch.randint(0, 7, (50,))
    metrics = token_metrics()
    for part in (slice(0, 30), slice(30, 30), slice(30, 50)):
        metrics.update(logits[part], target[part])
    nll = hits = 0.0
    bins = [[0.0, 0.0] for _ in range(15)]
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        exps = [math.exp(value) for value in row]
        probs = [value / sum(exps) for value in exps]
        nll -= math.log(probs[label]) / 50
        hits += (probs.index(max(probs)) == label) / 50
        place = min(math.ceil(max(probs) * 15) - 1, 14)
        bins[place][0] += max(probs)
        bins[place][1] += probs.index(max(probs)) == label
    ece = sum(abs(sure - right) for sure, right in bins) / 50
    expected = {"accuracy": hits, "nll": nll, "perplexity": math.exp(nll), "ece": ece}
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(expected, rel=1e-5)


def test_an_output_of_tokens_is_one_of_classes_with_other_metrics():
    output = Tokens(4)
    # As many places as tokens: the classes are last without a question.
    assert output.needs_layout((2, 4, 4)) == ""
    batch = Batch(torch.zeros(2, 4), torch.tensor([[1, 2, 3, 0], [2, 0, -100, -100]]))
    logits = torch.randn(2, 4, 4)
    expected = Categorical(4, class_dim="last").label_loss(logits, batch)
    assert torch.equal(output.label_loss(logits, batch), expected)
    assert set(output.metrics()) == {"accuracy", "nll", "perplexity", "ece"}
