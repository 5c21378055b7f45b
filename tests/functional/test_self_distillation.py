"""Self-KD's targets against plain loops, then their invariances, then their edges."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.functional import hard_targets, progressive_targets, soft_cross_entropy, soften


def draw(*shape, seed=0, dtype=torch.float64, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def naive_softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


# hard_targets


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(("targets", "classes"), [([1], 2), ([0, 2, 1, 2], 3), ([6, 0], 7)])
def test_hard_targets_is_the_loop(targets, classes, label_smoothing):
    rows = hard_targets(torch.tensor(targets), classes, label_smoothing=label_smoothing).tolist()
    for row, target in zip(rows, targets, strict=True):
        for k in range(classes):
            one = 1.0 if k == target else 0.0
            assert row[k] == pytest.approx((1 - label_smoothing) * one + label_smoothing / classes, abs=1e-7)


def test_hard_targets_without_smoothing_are_exactly_one_hot_in_float32():
    rows = hard_targets(torch.tensor([2, 0]), 3)
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_hard_targets_are_what_cross_entropy_smooths_to(label_smoothing):
    logits, targets = draw(5, 4, dtype=torch.float32), torch.tensor([0, 3, 1, 1, 2])
    expected = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    loss = soft_cross_entropy(logits, hard_targets(targets, 4, label_smoothing=label_smoothing))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_hard_targets_take_any_integer_type_and_many_or_no_rows():
    assert torch.equal(hard_targets(torch.tensor([1, 0], dtype=torch.int32), 2), torch.eye(2).flip(0))
    assert hard_targets(torch.empty(0, dtype=torch.long), 3).shape == (0, 3)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0, math.nan])
def test_hard_targets_refuse_a_smoothing_out_of_range(label_smoothing):
    with pytest.raises(InputError, match=r"label_smoothing must be in \[0, 1\)"):
        hard_targets(torch.tensor([0]), 2, label_smoothing=label_smoothing)


# progressive_targets


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (5, 2), (4, 10)])
def test_progressive_targets_is_the_loop(samples, classes, alpha):
    hard, past = draw(samples, classes).softmax(-1), draw(samples, classes, seed=1).softmax(-1)
    rows = progressive_targets(hard, past, alpha).tolist()
    for i in range(samples):
        for k in range(classes):
            assert rows[i][k] == pytest.approx((1 - alpha) * float(hard[i, k]) + alpha * float(past[i, k]), abs=1e-15)


def test_progressive_targets_are_the_papers_figure():
    # The official overview: P = (.45, .40, .15), Y = (1, 0, 0), alpha = .4.
    rows = progressive_targets(torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.45, 0.40, 0.15]]), 0.4)
    assert rows[0].tolist() == pytest.approx([0.78, 0.16, 0.06], abs=1e-7)


@pytest.mark.parametrize("alpha", [number / 300 * 0.8 for number in (1, 77, 150, 299, 300)])
def test_progressive_targets_are_distributions(alpha):
    rows = progressive_targets(
        hard_targets(torch.arange(50) % 10, 10), draw(50, 10, dtype=torch.float32).softmax(1), alpha
    )
    assert torch.allclose(rows.sum(1), torch.ones(50), atol=1e-6)
    assert float(rows.min()) >= 0


def test_progressive_targets_with_alpha_zero_are_the_labels_bit_for_bit():
    hard = hard_targets(torch.tensor([0, 2]), 3)
    assert torch.equal(progressive_targets(hard, draw(2, 3, dtype=torch.float32).softmax(1), 0.0), hard)


def test_the_gradient_is_the_prediction_less_the_target():
    logits, past = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).softmax(1)
    target = progressive_targets(hard_targets(torch.tensor([1, 0, 3]), 4).double(), past, 0.6)
    soft_cross_entropy(logits, target).backward()
    for i in range(3):
        p = naive_softmax(logits[i].tolist())
        expected = [(p[k] - float(target[i, k])) / 3 for k in range(4)]
        assert logits.grad[i].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("alpha", "factor"), [(0.2, 0.7333), (0.6, 0.2)])
def test_the_gradient_is_rescaled_as_the_paper_says(alpha, factor):
    # Their equations 7 to 11: sum_k |dL/dz_k| is 1 - alpha * gamma_past / gamma_now times that of plain cross entropy.
    now, past = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.6, 0.25, 0.15]])
    hard = hard_targets(torch.tensor([0]), 3)
    sums = []
    for target in (progressive_targets(hard, past, alpha), hard):
        logits = now.log().requires_grad_()
        soft_cross_entropy(logits, target).backward()
        sums.append(float(logits.grad.abs().sum()))
    assert sums[0] / sums[1] == pytest.approx(factor, abs=1e-4)
    assert factor == pytest.approx(1 - alpha * 0.4 / 0.3, abs=1e-4)


def test_the_loss_cannot_fall_below_the_targets_entropy():
    past = draw(6, 5, dtype=torch.float32).softmax(1)
    target = progressive_targets(hard_targets(torch.arange(6) % 5, 5), past, 0.5)
    entropy = float(torch.special.entr(target).sum(1).mean())
    assert float(soft_cross_entropy(target.log(), target)) == pytest.approx(entropy, rel=1e-5)
    assert float(soft_cross_entropy(draw(6, 5, seed=2, dtype=torch.float32), target)) > entropy > 0.1


@pytest.mark.parametrize("logits", [[[1e4, -1e4]], [[0.0, 0.0]]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_hot_targets_give_cross_entropys_gradient_bit_for_bit(dtype, logits):
    for rows, targets in (
        (torch.tensor(logits, dtype=dtype), [1]),
        (draw(37, 7, dtype=dtype), [k % 7 for k in range(37)]),
    ):
        targets = torch.tensor(targets)  # noqa: PLW2901
        gradients = []
        for loss in (
            lambda z, t=targets: soft_cross_entropy(z, hard_targets(t, z.shape[1])),
            lambda z, t=targets: F.cross_entropy(z.float(), t),
        ):
            z = rows.clone().requires_grad_()
            loss(z).backward()
            gradients.append(z.grad)
        assert torch.equal(*gradients)
        assert torch.isfinite(gradients[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_progressive_targets_are_made_in_float32(dtype):
    past = draw(4, 5, dtype=dtype).softmax(1)
    rows = progressive_targets(hard_targets(torch.arange(4), 5), past, 0.3)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, 0.7 * torch.eye(4, 5) + 0.3 * past.float())


def test_progressive_targets_refuse_other_shapes_and_shares():
    with pytest.raises(InputError, match=r"hard \(2, 3\) and past \(3,\) must have the same shape"):
        progressive_targets(torch.zeros(2, 3), torch.zeros(3), 0.5)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"alpha must be in \[0, 1\]"):
            progressive_targets(torch.zeros(2, 3), torch.zeros(2, 3), alpha)


# soften


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_soften_is_the_softmax_of_the_logits_at_that_temperature(temperature):
    logits = draw(4, 6)
    expected = torch.tensor([naive_softmax([value / temperature for value in row]) for row in logits.tolist()])
    assert torch.allclose(soften(logits.softmax(1), temperature=temperature).float(), expected, atol=1e-6)


def test_soften_at_temperature_1_changes_no_bit_and_keeps_zeros_zero():
    probs = draw(3, 4, dtype=torch.float32).softmax(1)
    assert soften(probs) is probs
    sharp = soften(torch.tensor([[0.0, 0.2, 0.8]]), temperature=2.0)
    assert sharp[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-6)


def test_soften_refuses_a_temperature_that_is_not_positive():
    with pytest.raises(InputError, match="temperature must be positive"):
        soften(torch.ones(1, 2) / 2, temperature=0)
