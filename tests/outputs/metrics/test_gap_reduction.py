"""A metric between a baseline and the teacher: it hands everything on and keeps nothing of its own."""

import pytest
import torch
from torchmetrics import MeanAbsoluteError, MetricCollection

from distill_lightning.outputs.metrics import AURC, Accuracy, GapReduction, classification_metrics

LOGITS, TARGET = torch.eye(4), torch.tensor([0, 1, 2, 0])  # three of four are right


def test_it_is_the_gap_reduction_of_the_other_metrics_value():
    metric = GapReduction(0.5, 0.8, of=Accuracy())
    metric.update(LOGITS[:1], TARGET[:1])
    metric.update(LOGITS[1:], TARGET[1:])
    assert metric.compute().item() == pytest.approx((0.75 - 0.5) / (0.8 - 0.5))


def test_of_an_error_it_is_the_error_form():
    metric = GapReduction(2.0, 0.5, of=MeanAbsoluteError())
    metric.update(torch.tensor([1.0, 2.0]), torch.zeros(2))
    # (err_KD - err) / (err_KD - err_T) with errors 2, 1.5 and 0.5.
    assert metric.compute().item() == pytest.approx((2.0 - 1.5) / (2.0 - 0.5))


def test_values_are_not_clipped_and_no_gap_is_nan():
    values = []
    for baseline, teacher in ((0.75, 0.9), (0.5, 0.75), (0.8, 0.9), (0.5, 0.6), (0.6, 0.6)):
        metric = GapReduction(baseline, teacher, of=Accuracy())
        metric.update(LOGITS, TARGET)
        values.append(metric.compute().item())
    assert values == pytest.approx([0, 1, -0.5, 2.5, float("nan")], abs=1e-6, nan_ok=True)


def test_reset_forgets_and_a_new_batch_changes_the_value():
    metric = GapReduction(0.5, 1.0, of=Accuracy())
    metric.update(LOGITS, TARGET)
    assert metric.compute().item() == pytest.approx(0.5)
    metric.update(LOGITS[3:], TARGET[3:])
    assert metric.compute().item() == pytest.approx((0.6 - 0.5) / 0.5)
    metric.reset()
    metric.update(LOGITS[:3], TARGET[:3])
    assert metric.compute().item() == pytest.approx(1.0)


def test_calling_it_gives_the_batchs_own_value():
    metric = GapReduction(0.5, 1.0, of=Accuracy())
    assert metric(LOGITS[:2], TARGET[:2]).item() == pytest.approx(1.0)
    assert metric(LOGITS[2:], TARGET[2:]).item() == pytest.approx(0.0)
    assert metric.compute().item() == pytest.approx(0.5)


def test_it_stands_in_a_collection_whose_clones_count_alone():
    metrics = classification_metrics(4)
    metrics.add_metrics({"gap": GapReduction(1000.0, 0.0, of=AURC())})
    first, second = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")
    first.update(LOGITS, TARGET)
    second.update(LOGITS[:3], TARGET[:3])
    values = first.compute() | second.compute()
    assert values["val/gap"].item() == pytest.approx(1 - values["val/aurc"].item() / 1000)
    assert values["test/gap"].item() == 1
    assert isinstance(metrics, MetricCollection)


def test_more_is_better_even_of_an_error():
    assert GapReduction(2.0, 0.5, of=MeanAbsoluteError()).higher_is_better is True
