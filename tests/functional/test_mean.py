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


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2)])
def test_samples_that_do_not_count_become_zero(shape, dtype):
    values = torch.arange(1, 1 + math.prod(shape)).view(shape).to(dtype)
    found = functional.zero_uncounted(values, torch.tensor([True, False, True]))
    assert found.dtype == dtype
    assert torch.equal(found[[0, 2]], values[[0, 2]])
    assert not found[1].any()
    assert torch.equal(functional.zero_uncounted(values), values)


def test_a_target_that_is_nan_and_does_not_count_leaves_the_gradient_alone():
    output, target, counted = torch.ones(2, 1, requires_grad=True), torch.tensor([[3.0], [math.nan]]), [True, False]
    mask = torch.tensor(counted)
    errors = (output - functional.zero_uncounted(target, mask)).square().sum(dim=1)
    functional.counted_mean(errors, mask).backward()
    assert output.grad.tolist() == [[-4], [0]]
