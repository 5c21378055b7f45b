"""The package's own metrics against plain loops over several batches."""

import math

import pytest
import torch
from torchmetrics import MetricCollection

from distill_lightning.functional import expected_calibration_error
from distill_lightning.metrics import Agreement, CalibrationError, NegativeLogLikelihood, classification_metrics

SIZES = [[1], [5], [4, 4, 4], [7, 1, 3]]


def batches(sizes, classes=4, seed=0):
    """Some batches of logits and targets, the targets somewhat like the logits."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for size in sizes:
        logits = 2 * torch.randn(size, classes, generator=generator)
        target = (logits + 2 * torch.randn(size, classes, generator=generator)).argmax(-1)
        result.append((logits, target))
    return result


def value_of(metric, pairs):
    for pair in pairs:
        metric.update(*pair)
    return metric.compute()


def naive_softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_argmax(row):
    return max(range(len(row)), key=lambda k: (row[k], -k))


def rows_of(pairs):
    """Every sample of every batch: a list of logits and a class."""
    return [(row, k) for logits, target in pairs for row, k in zip(logits.tolist(), target.tolist(), strict=True)]


def naive_nll(pairs):
    losses = [-math.log(naive_softmax(row)[k]) for row, k in rows_of(pairs)]
    return sum(losses) / len(losses)


def naive_accuracy(pairs, top=1):
    hits = [k in sorted(range(len(row)), key=lambda j: -row[j])[:top] for row, k in rows_of(pairs)]
    return sum(hits) / len(hits)


def naive_ece(pairs, bins):
    members = [[] for _ in range(bins)]
    for row, k in rows_of(pairs):
        confidence = max(naive_softmax(row))
        b = next(b for b in range(bins) if confidence <= (b + 1) / bins or b == bins - 1)
        members[b].append((confidence, naive_argmax(row) == k))
    total = len(rows_of(pairs))
    error = 0.0
    for inside in members:
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            error += len(inside) / total * abs(accuracy - sum(confidence for confidence, _ in inside) / len(inside))
    return error


# NegativeLogLikelihood


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("classes", [2, 10])
def test_the_negative_log_likelihood_is_the_loop(sizes, classes):
    pairs = batches(sizes, classes)
    assert value_of(NegativeLogLikelihood(), pairs).item() == pytest.approx(naive_nll(pairs), rel=1e-6)


def test_the_negative_log_likelihood_of_even_logits_is_log_k():
    pairs = [(torch.zeros(3, 7), torch.tensor([0, 3, 6]))]
    assert value_of(NegativeLogLikelihood(), pairs).item() == pytest.approx(math.log(7), rel=1e-6)


def test_the_negative_log_likelihood_of_huge_logits_is_finite():
    pairs = [(torch.tensor([[1e4, -1e4], [1e4, -1e4]]), torch.tensor([1, 0]))]
    assert value_of(NegativeLogLikelihood(), pairs).item() == pytest.approx(1e4, rel=1e-6)


def test_the_negative_log_likelihood_of_many_small_batches_keeps_its_digits():
    metric = NegativeLogLikelihood()
    for _ in range(2000):
        metric.update(torch.zeros(1, 2), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx(math.log(2), rel=1e-4)


# CalibrationError


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bins", [1, 5, 15])
def test_the_calibration_error_is_the_loop(sizes, bins):
    pairs = batches(sizes)
    assert value_of(CalibrationError(bins=bins), pairs).item() == pytest.approx(naive_ece(pairs, bins), rel=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_calibration_error_is_the_functional_version_of_all_batches(sizes):
    pairs = batches(sizes)
    logits, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    confidence, predicted = logits.softmax(-1).max(-1)
    expected = expected_calibration_error(confidence, predicted == target)
    assert value_of(CalibrationError(), pairs).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_calibration_error_does_not_see_how_samples_are_batched():
    (logits, target), *_ = batches([60])
    whole = value_of(CalibrationError(), [(logits, target)]).item()
    split = value_of(CalibrationError(), zip(logits.split(7), target.split(7), strict=True)).item()
    assert split == pytest.approx(whole, rel=1e-6)
    # The mean of the batches' own errors is another number.
    parts = [value_of(CalibrationError(), [pair]).item() for pair in zip(logits.split(7), target.split(7), strict=True)]
    assert sum(parts) / len(parts) != pytest.approx(whole, rel=1e-2)


def test_a_confidence_of_exactly_1_counts_in_the_last_bin():
    metric = CalibrationError()
    metric.update(torch.tensor([[200.0, 0.0], [0.0, 200.0]]), torch.tensor([0, 0]))
    assert metric.binned[0].tolist() == [0.0] * 14 + [2.0]
    assert metric.compute().item() == 0.5


@pytest.mark.parametrize(("bins", "place"), [(2, 0), (4, 1), (10, 4)])
def test_a_confidence_on_an_inner_edge_counts_in_the_lower_bin(bins, place):
    # Two equal logits: a confidence of exactly one half.
    metric = CalibrationError(bins=bins)
    metric.update(torch.zeros(3, 2), torch.tensor([0, 0, 1]))
    counts, confidences, hits = metric.binned.tolist()
    assert counts == [3.0 if b == place else 0.0 for b in range(bins)]
    assert confidences[place] == 1.5
    assert hits[place] == 2


def test_the_calibration_error_has_15_bins_by_default():
    assert CalibrationError().binned.shape == (3, 15)


# Agreement


@pytest.mark.parametrize("sizes", SIZES)
def test_agreement_is_the_loop(sizes):
    first = [logits for logits, _ in batches(sizes)]
    second = [a + logits for a, (logits, _) in zip(first, batches(sizes, seed=1), strict=True)]
    same = [
        naive_argmax(a) == naive_argmax(b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one.tolist(), other.tolist(), strict=True)
    ]
    value = value_of(Agreement(), zip(first, second, strict=True))
    assert value.item() == pytest.approx(sum(same) / len(same))


def test_agreement_is_symmetric_and_does_not_see_scale_or_shift():
    first, second = (batches([50], seed=seed)[0][0] for seed in (0, 1))
    value = value_of(Agreement(), [(first, second)]).item()
    assert 0 < value < 1
    assert value_of(Agreement(), [(second, first)]).item() == value
    assert value_of(Agreement(), [(3 * first + 5, second.softmax(-1))]).item() == value
    assert value_of(Agreement(), [(first, first)]).item() == 1


def test_agreement_weighs_samples_and_not_batches():
    alike, different = torch.eye(3), torch.eye(3).roll(1, 0)
    assert value_of(Agreement(), [(alike, alike), (alike[:1], different[:1])]).item() == 0.75


# all of them


@pytest.mark.parametrize("metric", [NegativeLogLikelihood, CalibrationError, Agreement])
def test_reset_forgets_everything(metric):
    def pairs(seed):
        found = batches([6, 3], seed=seed)
        return [(logits, logits.roll(1, 0)) for logits, _ in found] if metric is Agreement else found

    used = metric()
    value_of(used, pairs(0))
    used.reset()
    assert value_of(used, pairs(1)).item() == value_of(metric(), pairs(1)).item()


@pytest.mark.parametrize("metric", [NegativeLogLikelihood, CalibrationError])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_in_float32(metric, dtype):
    pairs = [(logits.to(dtype), target) for logits, target in batches([8, 8])]
    naive = naive_nll(pairs) if metric is NegativeLogLikelihood else naive_ece(pairs, 15)
    value = value_of(metric(), pairs)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("metric", [NegativeLogLikelihood, CalibrationError, Agreement])
def test_states_of_two_processes_add_up(metric):
    (one, two) = batches([6, 6])
    pairs = [(logits, logits.roll(1, 0)) if metric is Agreement else (logits, target) for logits, target in (one, two)]
    first, second = metric(), metric()
    first.update(*pairs[0])
    second.update(*pairs[1])
    merged = metric()
    for name, reduction in merged._reductions.items():
        setattr(merged, name, reduction(torch.stack([getattr(first, name), getattr(second, name)])))
    merged._update_count = 1
    assert merged.compute().item() == pytest.approx(value_of(metric(), pairs).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "higher"), [(NegativeLogLikelihood, False), (CalibrationError, False), (Agreement, True)]
)
def test_metrics_say_which_direction_is_better(metric, higher):
    assert metric().higher_is_better is higher


# classification_metrics


@pytest.mark.parametrize("classes", [2, 5, 6, 10])
def test_the_metrics_of_a_classifier_are_the_loops(classes):
    pairs = batches([9, 4], classes)
    metrics = classification_metrics(classes)
    assert isinstance(metrics, MetricCollection)
    values = {name: value.item() for name, value in value_of(metrics, pairs).items()}
    expected = {"accuracy": naive_accuracy(pairs), "nll": naive_nll(pairs), "ece": naive_ece(pairs, 15)}
    if classes > 5:
        expected["top5"] = naive_accuracy(pairs, top=5)
    assert values == pytest.approx(expected, rel=1e-5)


def test_accuracy_is_the_share_of_samples_and_not_of_classes():
    # Three of class 0 right, one of class 1 wrong: 3/4, where an average over classes would say 1/2.
    metrics = classification_metrics(3)
    metrics.update(torch.eye(3)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]))
    assert metrics.compute()["accuracy"].item() == 0.75


@pytest.mark.parametrize("metric", [NegativeLogLikelihood(), CalibrationError(), Agreement()])
def test_no_state_needs_float64(metric):
    # Apple's devices have none, and a module with such a metric could not be moved there.
    assert all(getattr(metric, name).dtype in (torch.float32, torch.long) for name in metric._defaults)
