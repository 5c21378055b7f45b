"""Positions of samples as samples of their own."""

import pytest
import torch
from torch.nn import functional as F

from distill_lightning import InputError, functional


def draws(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_rows_are_the_positions_sample_by_sample():
    logits, target = draws(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 1]])
    rows, classes = functional.by_position(logits, target)
    expected = [(logits[n, t], target[n, t]) for n in range(2) for t in range(3)]
    assert torch.equal(rows, torch.stack([row for row, _ in expected]))
    assert torch.equal(classes, torch.stack([label for _, label in expected]))


def test_the_cross_entropy_over_rows_is_the_mean_over_positions():
    logits, target = draws(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 1]])
    naive = -sum(
        logits[n, t].double().softmax(-1)[target[n, t]].log() for n in range(2) for t in range(3)
    ) / 6  # fmt: skip
    assert F.cross_entropy(*functional.by_position(logits, target)).item() == pytest.approx(naive.item(), rel=1e-6)


@pytest.mark.parametrize("target", [torch.tensor([1, 0]), draws(2, 4), torch.tensor([[1], [0]])])
def test_what_has_no_positions_stays_as_it_is(target):
    logits = draws(2, 4)
    rows, same = functional.by_position(logits, target)
    assert torch.equal(rows, logits)
    assert torch.equal(same, target)


def test_distributions_and_more_dimensions_will_do():
    rows, probs = functional.by_position(draws(2, 3, 4), draws(2, 3, 4).softmax(-1))
    assert rows.shape == probs.shape == (6, 4)
    rows, classes = functional.by_position(draws(2, 3, 5, 4), torch.zeros(2, 3, 5, dtype=torch.long))
    assert (rows.shape, classes.shape) == ((30, 4), (30,))


def test_an_empty_batch_has_no_positions():
    rows, classes = functional.by_position(draws(0, 3, 4), torch.zeros(0, 3, dtype=torch.long))
    assert (rows.shape, classes.shape) == ((0, 4), (0,))


@pytest.mark.parametrize(
    ("logits", "target"),
    [((2, 3, 4), (2,)), ((2, 3, 4), (2, 4)), ((2, 4), (3,)), ((2, 4, 5, 5), (2, 5, 5)), ((4,), ())],
)
def test_other_shapes_are_refused(logits, target):
    with pytest.raises(InputError, match=r"need a target for each position, .*: choose a network that predicts"):
        functional.by_position(draws(*logits), torch.zeros(target, dtype=torch.long))
