"""The discriminator's loss against plain loops, its bounds and edges, and the turned gradient."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.functional import discriminator_loss, reverse_gradient


def draw(*shape, seed=0, dtype=torch.float64, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def naive_cross_entropy(score, target):
    probability = 1 / (1 + math.exp(-score))
    return -math.log(probability) if target == 1 else -math.log(1 - probability)


def naive_discriminator_loss(student, teacher):
    rows = [(row, (1, 0)) for row in student] + [(row, (0, 1)) for row in teacher]
    return sum(naive_cross_entropy(row[k], target[k]) for row, target in rows for k in (0, 1)) / (2 * len(rows))


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_discriminator_loss_is_the_loop(samples):
    student, teacher = draw(samples, 2), draw(samples, 2, seed=1)
    expected = naive_discriminator_loss(student.tolist(), teacher.tolist())
    assert discriminator_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_discriminator_loss_is_pytorchs_with_the_papers_targets():
    student, teacher = draw(5, 2), draw(5, 2, seed=1)
    targets = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5, dtype=torch.float64)
    theirs = F.binary_cross_entropy_with_logits(torch.cat([student, teacher]), targets)
    assert discriminator_loss(student, teacher).item() == pytest.approx(theirs.item(), rel=1e-12)


def test_discriminator_loss_has_the_gradient_of_the_formula():
    student, teacher = draw(3, 2).requires_grad_(), draw(3, 2, seed=1).requires_grad_()
    discriminator_loss(student, teacher).backward()
    for scores, target in ((student, (1, 0)), (teacher, (0, 1))):
        for i in range(3):
            expected = [(1 / (1 + math.exp(-scores[i, k].item())) - target[k]) / 12 for k in (0, 1)]
            assert scores.grad[i].tolist() == pytest.approx(expected, rel=1e-12)


def test_the_plateaus_of_the_official_discriminator():
    zero, high = torch.zeros(4, 2), torch.full((4,), 200.0)
    nothing = torch.zeros(4)
    assert discriminator_loss(zero, zero).item() == pytest.approx(math.log(2), rel=1e-6)
    # The best that scores which are never negative can do, and the same with one output dead.
    best = discriminator_loss(torch.stack([high, nothing], 1), torch.stack([nothing, high], 1))
    assert best.item() == pytest.approx(math.log(2) / 2, rel=1e-6)
    one_dead = discriminator_loss(torch.stack([high, nothing], 1), zero)
    assert one_dead.item() == pytest.approx(0.51986, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_scores_that_are_not_negative_cost_at_least_half_of_ln_2(seed):
    student, teacher = draw(64, 2, seed=seed).abs(), draw(64, 2, seed=seed + 100).abs()
    assert discriminator_loss(student, teacher).item() > math.log(2) / 2


def test_right_and_sure_costs_nothing_and_wrong_and_sure_the_score():
    right = torch.tensor([[1e4, -1e4]])
    assert discriminator_loss(right, -right).item() == 0
    assert discriminator_loss(-right, right).item() == pytest.approx(1e4)


def test_turning_both_the_roles_and_the_columns_changes_nothing():
    student, teacher = draw(6, 2), draw(6, 2, seed=1)
    turned = discriminator_loss(teacher.flip(1), student.flip(1))
    assert turned.item() == pytest.approx(discriminator_loss(student, teacher).item(), rel=1e-12)
    assert discriminator_loss(teacher, student).item() != pytest.approx(discriminator_loss(student, teacher).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_half_precision_is_computed_in_float32(dtype, scale):
    student, teacher = draw(5, 2, dtype=dtype, scale=scale), draw(5, 2, seed=1, dtype=dtype, scale=scale)
    student.requires_grad_()
    loss = discriminator_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(discriminator_loss(student.double(), teacher.double()).item(), rel=1e-5)
    assert torch.isfinite(student.grad).all()


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"student \(3, 2\) and teacher \(4, 2\) must have the same shape"):
        discriminator_loss(torch.zeros(3, 2), torch.zeros(4, 2))
    for shape in ((3, 1), (3,), (3, 2, 2)):
        with pytest.raises(InputError, match=r"needs scores of shape \(N, 2\), got"):
            discriminator_loss(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_reverse_gradient_is_the_identity_with_another_gradient(scale):
    values = draw(3, 4).requires_grad_()
    turned = reverse_gradient(values, scale)
    assert torch.equal(turned, values)
    (turned**2).sum().backward()
    assert torch.equal(values.grad, -scale * 2 * values.detach())


def test_reverse_gradient_turns_exactly_by_default():
    values = draw(3, 4, dtype=torch.float32)
    gradients = []
    for turn in (lambda tensor: tensor, reverse_gradient):
        leaf = values.clone().requires_grad_()
        turn(leaf * 1.7).exp().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], -gradients[1])


def test_reverse_gradient_keeps_half_precision_and_asks_for_no_gradient_of_its_own():
    assert not reverse_gradient(torch.zeros(2)).requires_grad
    leaf = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    reverse_gradient(leaf).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.tolist() == [-1, -1]
