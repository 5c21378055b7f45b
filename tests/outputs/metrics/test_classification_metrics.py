"""The package's own metrics against plain loops over several batches."""

import math

import pytest
import torch
from torch import multiprocessing
from torchmetrics import MetricCollection

from distill_lightning import InputError
from distill_lightning.functional import (
    area_under_risk_coverage,
    brier_score,
    excess_area_under_risk_coverage,
    expected_calibration_error,
)
from distill_lightning.outputs.metrics import (
    AURC,
    Accuracy,
    Agreement,
    BrierScore,
    CalibrationError,
    Confidences,
    MeanDivergence,
    NegativeLogLikelihood,
    classification_metrics,
)
from distill_lightning.testing.processes import leave_the_group

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


def naive_brier(pairs):
    distances = [sum((p - (j == k)) ** 2 for j, p in enumerate(naive_softmax(row))) for row, k in rows_of(pairs)]
    return sum(distances) / len(distances)


def naive_areas(pairs):
    """AURC and E-AURC, times 1000."""
    answers = sorted(
        ((max(naive_softmax(row)), naive_argmax(row) == k) for row, k in rows_of(pairs)), key=lambda a: -a[0]
    )
    samples, errors = len(answers), sum(not right for _, right in answers)
    area = sum(sum(not right for _, right in answers[:k]) / k for k in range(1, samples + 1)) / samples
    best = sum(j / (samples - errors + j) for j in range(1, errors + 1)) / samples
    return 1000 * area, 1000 * (area - best)


def naive_divergence(pairs):
    total, samples = 0.0, 0
    for student, teacher in pairs:
        for row, given in zip(student.tolist(), teacher.tolist(), strict=True):
            total += sum(math.exp(t) * (t - math.log(p)) for t, p in zip(given, naive_softmax(row), strict=True))
            samples += 1
    return total / samples


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


# Accuracy


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("top", [1, 2, 4])
def test_accuracy_is_the_loop(sizes, top):
    pairs = batches(sizes)
    assert value_of(Accuracy(top=top), pairs).item() == pytest.approx(naive_accuracy(pairs, top))


def test_of_equal_logits_the_first_is_named():
    metric = Accuracy()
    metric.update(torch.zeros(4, 10), torch.tensor([0, 0, 0, 8]))
    assert metric.compute().item() == 0.75


def test_accuracy_of_no_class_is_refused():
    with pytest.raises(InputError, match="top must be at least 1, got 0"):
        Accuracy(top=0)


# BrierScore


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("classes", [2, 10])
def test_the_brier_score_is_the_loop(sizes, classes):
    pairs = batches(sizes, classes)
    logits, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    value = value_of(BrierScore(), pairs).item()
    assert value == pytest.approx(naive_brier(pairs), rel=1e-5)
    assert value == pytest.approx(brier_score(logits, target).item(), rel=1e-5)


# AURC


@pytest.mark.parametrize("sizes", [*SIZES, [40, 17]])
def test_the_areas_are_the_loops_times_1000(sizes):
    pairs = batches(sizes, seed=2)
    area, excess_area = naive_areas(pairs)
    assert value_of(AURC(), pairs).item() == pytest.approx(area, rel=1e-5)
    assert value_of(AURC(excess=True), pairs).item() == pytest.approx(excess_area, rel=1e-4, abs=1e-4)


def test_the_hand_values_of_self_kd():
    # Confidences 0.9, 0.8, 0.7, 0.6, moved a hundredth off the edges of the bins; all name class 0.
    probs = torch.tensor([[0.89, 0.11], [0.79, 0.21], [0.69, 0.31], [0.59, 0.41]])
    pairs = [(probs.log(), torch.tensor([0, 1, 0, 1]))]
    assert value_of(AURC(), pairs).item() == pytest.approx(333.33, abs=0.01)
    assert value_of(AURC(excess=True), pairs).item() == pytest.approx(125.0, abs=1e-3)
    assert 100 * value_of(CalibrationError(bins=10), pairs).item() == pytest.approx(45.0, abs=1e-4)


def test_the_areas_do_not_see_how_samples_are_batched_or_ordered():
    logits, target = batches([60])[0]
    order = torch.randperm(60)
    for metric, area in ((AURC(), area_under_risk_coverage), (excess(), excess_area_under_risk_coverage)):
        confidence, predicted = logits.softmax(-1).max(-1)
        expected = 1000 * area(confidence, predicted == target).item()
        split = zip(logits[order].split(7), target[order].split(7), strict=True)
        assert value_of(metric, split).item() == pytest.approx(expected, rel=1e-6)


def test_right_answers_have_no_area_and_one_wrong_answer_has_all_of_it():
    right = [(4 * torch.eye(3), torch.tensor([0, 1, 2]))]
    assert value_of(AURC(), right).item() == value_of(excess(), right).item() == 0
    wrong = [(torch.eye(3)[:1], torch.tensor([2]))]
    assert value_of(AURC(), wrong).item() == 1000
    assert value_of(excess(), wrong).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_confidences_are_kept_in_float32_and_nothing_else(dtype):
    metric = Confidences()
    pairs = [(logits.to(dtype), target) for logits, target in batches([4, 3])]
    confidence, correct = value_of(metric, pairs)
    rows = rows_of(pairs)
    assert confidence.dtype == correct.dtype == torch.float32
    assert confidence.tolist() == pytest.approx([max(naive_softmax(row)) for row, _ in rows], rel=1e-5)
    assert correct.tolist() == [float(naive_argmax(row) == k) for row, k in rows]
    assert sum(tensor.numel() for name in metric._defaults for tensor in getattr(metric, name)) == 14


def measured(parts):
    values = classification_metrics(6)
    divergence = MeanDivergence()
    for logits, target in parts:
        values.update(logits, target)
        divergence.update(logits, logits.roll(1, 0).log_softmax(-1))
    return {name: value.item() for name, value in {**values.compute(), "divergence": divergence.compute()}.items()}


def in_a_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parts = batches([9, 4, 2], 6)
    # One process has most of the samples, and the other's last batch is empty.
    own = parts[:2] if rank == 0 else [parts[2], tuple(part[:0] for part in parts[2])]
    torch.save(measured(own), f"{folder}/{rank}.pt")
    leave_the_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, start_method):
    multiprocessing.start_processes(in_a_process, args=(str(tmp_path),), nprocs=2, start_method=start_method)
    alone = measured(batches([9, 4, 2], 6))
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone, rel=1e-5)


# MeanDivergence


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("classes", [2, 10])
def test_the_divergence_is_the_loop(sizes, classes):
    students = [logits for logits, _ in batches(sizes, classes)]
    teachers = [logits.log_softmax(-1) for logits, _ in batches(sizes, classes, seed=1)]
    pairs = list(zip(students, teachers, strict=True))
    value = value_of(MeanDivergence(), pairs).item()
    assert value == pytest.approx(naive_divergence(pairs), rel=1e-4)
    swapped = [(teacher, student.log_softmax(-1)) for student, teacher in pairs]
    assert value != pytest.approx(value_of(MeanDivergence(), swapped).item(), rel=1e-3)


def test_the_divergence_from_oneself_is_zero():
    logits = batches([20])[0][0]
    pairs = [(logits + 3, logits.log_softmax(-1))]
    assert value_of(MeanDivergence(), pairs).item() == pytest.approx(0, abs=1e-6)


def test_a_class_without_mass_costs_nothing_and_huge_logits_much():
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert value_of(MeanDivergence(), [(torch.zeros(1, 3), teacher)]).item() == pytest.approx(math.log(1.5), rel=1e-6)
    huge = [(torch.tensor([[1e4, -1e4, 0.0]]), teacher)]
    assert value_of(MeanDivergence(), huge).item() == pytest.approx(1e4 - math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_divergence_reads_half_precision_in_float32(dtype):
    student, teacher = (batches([30], seed=seed)[0][0].to(dtype) for seed in (0, 1))
    given = teacher.float().log_softmax(-1)
    value = value_of(MeanDivergence(), [(student, given)])
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(naive_divergence([(student, given)]), rel=1e-5)


def test_the_divergence_of_other_shapes_is_refused():
    with pytest.raises(InputError, match="must have the same shape"):
        MeanDivergence().update(torch.zeros(3, 4), torch.zeros(3, 5))


# all of them


def excess():
    return AURC(excess=True)


OF_LABELS = [NegativeLogLikelihood, CalibrationError, Accuracy, BrierScore, AURC, excess]
OF_NETWORKS = [Agreement, MeanDivergence]


@pytest.mark.parametrize("metric", OF_LABELS + OF_NETWORKS)
def test_reset_forgets_everything(metric):
    def pairs(seed):
        found = batches([6, 3], seed=seed)
        return [(logits, logits.roll(1, 0)) for logits, _ in found] if metric in OF_NETWORKS else found

    used = metric()
    value_of(used, pairs(0))
    used.reset()
    assert value_of(used, pairs(1)).item() == value_of(metric(), pairs(1)).item()


@pytest.mark.parametrize(
    ("metric", "naive"),
    [
        (NegativeLogLikelihood, naive_nll),
        (CalibrationError, lambda pairs: naive_ece(pairs, 15)),
        (Accuracy, naive_accuracy),
        (BrierScore, naive_brier),
        (AURC, lambda pairs: naive_areas(pairs)[0]),
        (excess, lambda pairs: naive_areas(pairs)[1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_in_float32(metric, naive, dtype):
    pairs = [(logits.to(dtype), target) for logits, target in batches([8, 8])]
    value = value_of(metric(), pairs)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(naive(pairs), rel=1e-5)


@pytest.mark.parametrize("metric", OF_LABELS + OF_NETWORKS)
def test_a_batch_without_samples_changes_nothing(metric):
    # In several processes a last batch may hold nothing but what another process counts.
    pairs = [(logits, logits.roll(1, 0)) if metric in OF_NETWORKS else (logits, k) for logits, k in batches([6, 3])]
    none = tuple(part[:0] for part in pairs[0])
    expected = value_of(metric(), pairs).item()
    assert value_of(metric(), [none, pairs[0], none, pairs[1], none]).item() == expected


@pytest.mark.parametrize("metric", OF_LABELS + OF_NETWORKS)
def test_no_samples_at_all_give_nan(metric):
    none = (torch.zeros(0, 3), torch.zeros(0, 3) if metric in OF_NETWORKS else torch.zeros(0, dtype=torch.long))
    assert value_of(metric(), [none]).isnan()


@pytest.mark.parametrize("metric", OF_LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_huge_logits_give_finite_values(metric, dtype):
    pairs = [(torch.tensor([[1e4, -1e4], [1e4, -1e4], [-1e4, 1e4]], dtype=dtype), torch.tensor([1, 0, 1]))]
    assert torch.isfinite(value_of(metric(), pairs))


@pytest.mark.parametrize("metric", [NegativeLogLikelihood, CalibrationError, Accuracy, BrierScore, *OF_NETWORKS])
def test_states_of_two_processes_add_up(metric):
    (one, two) = batches([6, 6])
    pairs = [(logits, logits.roll(1, 0)) if metric in OF_NETWORKS else (logits, k) for logits, k in (one, two)]
    first, second = metric(), metric()
    first.update(*pairs[0])
    second.update(*pairs[1])
    merged = metric()
    for name, reduction in merged._reductions.items():
        setattr(merged, name, reduction(torch.stack([getattr(first, name), getattr(second, name)])))
    merged._update_count = 1
    assert merged.compute().item() == pytest.approx(value_of(metric(), pairs).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        (NegativeLogLikelihood, False),
        (CalibrationError, False),
        (Agreement, True),
        (Accuracy, True),
        (BrierScore, False),
        (AURC, False),
        (MeanDivergence, False),
    ],
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
    expected |= {"brier": naive_brier(pairs), "aurc": naive_areas(pairs)[0], "eaurc": naive_areas(pairs)[1]}
    if classes > 5:
        expected["top5"] = naive_accuracy(pairs, top=5)
    assert values == pytest.approx(expected, rel=1e-5)


def test_accuracy_is_the_share_of_samples_and_not_of_classes():
    # Three of class 0 right, one of class 1 wrong: 3/4, where an average over classes would say 1/2.
    metrics = classification_metrics(3)
    metrics.update(torch.eye(3)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]))
    assert metrics.compute()["accuracy"].item() == 0.75


@pytest.mark.parametrize("metric", [make() for make in OF_LABELS + OF_NETWORKS])
def test_no_state_needs_float64(metric):
    # Apple's devices have none, and a module with such a metric could not be moved there.
    logits, target = batches([3])[0]
    metric.update(logits, logits.log_softmax(-1) if type(metric) in OF_NETWORKS else target)
    states = [getattr(metric, name) for name in metric._defaults]
    tensors = [tensor for state in states for tensor in (state if isinstance(state, list) else [state])]
    assert tensors
    assert all(tensor.dtype in (torch.float32, torch.long) for tensor in tensors)
