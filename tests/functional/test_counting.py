"""Means over what counts, against a loop, at their edges and in their gradients."""

import math

import pytest
import torch

from distill_lightning import functional


def naive_mean(rows, counted):
    kept = [row for row, counts in zip(rows, counted, strict=True) if counts]
    return sum(kept) / len(kept) if kept else 0.0


@pytest.mark.parametrize("counted", [[True] * 4, [True, False, True, False], [False, False, False, True], [False] * 4])
def test_it_equals_the_loop(counted):
    rows = torch.tensor([1.5, -2.0, 4.0, 0.25], dtype=torch.float64)
    mean = functional.counted_mean(rows, torch.tensor(counted))
    assert float(mean) == pytest.approx(naive_mean(rows.tolist(), counted), rel=1e-12)
    assert mean.shape == ()


def test_positions_count_one_by_one():
    rows, counted = torch.arange(6.0).view(2, 3), torch.tensor([[True, False, False], [True, True, False]])
    assert float(functional.counted_mean(rows, counted)) == pytest.approx((0 + 3 + 4) / 3)


def test_without_a_mask_it_is_the_mean_bit_for_bit():
    rows = torch.randn(37)
    assert torch.equal(functional.counted_mean(rows), rows.mean())
    assert torch.equal(functional.counted_mean(rows, None), rows.mean())


def test_the_gradient_is_shared_by_what_counts():
    rows = torch.randn(5, requires_grad=True)
    functional.counted_mean(rows, torch.tensor([True, False, True, True, False])).backward()
    assert rows.grad.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_does_not_count_may_be_anything(value):
    rows = torch.tensor([1.0, value, 3.0], requires_grad=True)
    mean = functional.counted_mean(rows, torch.tensor([True, False, True]))
    mean.backward()
    assert float(mean) == 2
    assert rows.grad.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_where_nothing_counts_it_is_zero_and_so_is_the_gradient(value):
    rows = torch.full((3,), value, requires_grad=True)
    mean = functional.counted_mean(rows, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert float(mean) == 0
    assert rows.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_dtype(dtype):
    assert functional.counted_mean(torch.ones(2, dtype=dtype), torch.tensor([True, False])).dtype == dtype
