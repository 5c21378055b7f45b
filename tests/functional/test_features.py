"""hint_distance, attention_distance and unit_feature; factor_distance is in test_formulas."""

import math

import numpy as np
import pytest
import torch

from distill_lightning import InputError
from distill_lightning.functional import attention_distance, factor_distance, hint_distance, unit_feature


def draw(*shape, seed=0, dtype=torch.float64, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


# hint_distance


def naive_hint(student, teacher, reduction):
    sums = []
    for one, other in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(np.ravel(one), np.ravel(other), strict=True)
        sums.append(sum((a - b) ** 2 for a, b in pairs))
    return sum(sums) / len(sums) / (student[0].numel() if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (4, 3, 2, 5), (3, 6, 2), (2, 7)])
def test_hint_distance_is_the_loop(shape, reduction):
    student, teacher = draw(*shape), draw(*shape, seed=1)
    value = hint_distance(student, teacher, reduction=reduction)
    assert value.item() == pytest.approx(naive_hint(student, teacher, reduction), rel=1e-12)


def test_hint_distance_is_a_hand_value_and_the_mean_by_default():
    student, teacher = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert hint_distance(student, teacher).item() == pytest.approx((4 + 1 + 0 + 4) / 4)
    assert hint_distance(student, teacher, reduction="sum").item() == pytest.approx((5 + 4) / 2)


def test_hint_distance_grows_with_the_square_of_the_scale():
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    once, twice = hint_distance(student, teacher), hint_distance(2 * student, 2 * teacher)
    assert twice.item() == pytest.approx(4 * once.item(), rel=1e-12)
    assert hint_distance(2 * student, student).item() > 1


def test_hint_distance_has_the_gradient_of_the_formula():
    student, teacher = draw(2, 3, 2, 2).requires_grad_(), draw(2, 3, 2, 2, seed=1)
    hint_distance(student, teacher).backward()
    assert torch.allclose(student.grad, 2 * (student.detach() - teacher) / student.numel(), rtol=1e-12)


# attention_distance


def naive_map(feature):
    """Of one sample ``(C, H, W)``: where its squares are, as a list of norm 1."""
    channels, height, width = feature.shape
    squares = [sum(feature[c, y, x].item() ** 2 for c in range(channels)) for y in range(height) for x in range(width)]
    norm = math.sqrt(sum(value * value for value in squares))
    return [value / norm for value in squares]


def naive_attention(student, teacher, reduction):
    total = 0.0
    for one, other in zip(student, teacher, strict=True):
        total += sum((a - b) ** 2 for a, b in zip(naive_map(one), naive_map(other), strict=True))
    sites = student.shape[2] * student.shape[3]
    return total / len(student) / (sites if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("student", "teacher"), [((3, 2, 4, 5), (3, 6, 4, 5)), ((1, 4, 3, 3), (1, 4, 3, 3))])
def test_attention_distance_is_the_loop_whatever_the_channels(student, teacher, reduction):
    student, teacher = draw(*student), draw(*teacher, seed=1)
    value = attention_distance(student, teacher, reduction=reduction)
    assert value.item() == pytest.approx(naive_attention(student, teacher, reduction), rel=1e-12)


def test_attention_distance_is_a_hand_value_and_the_mean_by_default():
    # Maps (9, 16) and (1, 0) before, (0.49.., 0.87..) and (1, 0) after normalising.
    student, teacher = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    norm = math.sqrt(9**2 + 16**2)
    expected = (9 / norm - 1) ** 2 + (16 / norm) ** 2
    assert attention_distance(student, teacher, reduction="sum").item() == pytest.approx(expected, rel=1e-6)
    assert attention_distance(student, teacher).item() == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 100.0])
def test_attention_distance_does_not_see_scale_sign_or_channels(scale):
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    expected = attention_distance(student, teacher).item()
    assert attention_distance(-scale * student, teacher).item() == pytest.approx(expected, rel=1e-10)
    assert attention_distance(student, scale * teacher).item() == pytest.approx(expected, rel=1e-10)


def test_a_permutation_of_channels_is_seen_by_the_factors_and_not_by_the_attention():
    feature, order = draw(3, 4, 2, 2), torch.tensor([1, 2, 3, 0])
    assert attention_distance(feature[:, order], feature).item() < 1e-17
    assert factor_distance(feature[:, order], feature).item() > 0.05
    assert hint_distance(feature[:, order], feature).item() > 1


def test_attention_distance_sees_where():
    feature = draw(3, 4, 2, 3)
    assert attention_distance(feature.flip(3), feature).item() > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_attention_distance_keeps_its_bounds(seed):
    student, teacher = draw(8, 3, 4, 4, seed=seed), draw(8, 5, 4, 4, seed=seed + 100)
    assert 0 < attention_distance(student, teacher, reduction="sum").item() < 2
    apart = torch.zeros(1, 1, 1, 2)
    apart[..., 0] = 1
    assert attention_distance(apart, 1 - apart, reduction="sum").item() == pytest.approx(2)


def test_attention_distance_has_the_gradient_of_finite_differences():
    student, teacher = draw(2, 3, 2, 2).requires_grad_(), draw(2, 2, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda z: attention_distance(z, teacher), student)


@pytest.mark.parametrize("norm", [0.0, 1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_of_a_small_or_zero_feature_is_finite(norm, dtype):
    student = (torch.ones(2, 3, 4, 4) * norm).to(dtype).requires_grad_()
    loss = attention_distance(student, draw(2, 3, 4, 4, dtype=dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


# Both, and unit_feature


@pytest.mark.parametrize("distance", [hint_distance, attention_distance])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_features_are_computed_in_float32(distance, dtype):
    # The squares of 1e4 overflow float16.
    student = draw(2, 3, 4, 4, dtype=dtype, scale=1e4).requires_grad_()
    teacher = draw(2, 3, 4, 4, dtype=dtype, seed=1, scale=1e4)
    loss = distance(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(distance(student.double(), teacher.double()).item(), rel=1e-5)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("distance", [hint_distance, attention_distance])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_features_are_not_apart_and_a_batch_is_the_mean_of_its_parts(distance, reduction):
    student, teacher = draw(6, 3, 2, 2), draw(6, 3, 2, 2, seed=1)
    assert distance(student, student, reduction=reduction).item() == 0
    whole = distance(student, teacher, reduction=reduction).item()
    for size in (1, 2, 3):
        parts = zip(student.split(size), teacher.split(size), strict=True)
        values = [distance(a, b, reduction=reduction).item() for a, b in parts]
        assert sum(values) / len(values) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("distance", [hint_distance, attention_distance])
def test_another_reduction_is_refused(distance):
    with pytest.raises(InputError, match="reduction must be 'mean' or 'sum', got 'avg'"):
        distance(draw(2, 3, 2, 2), draw(2, 3, 2, 2), reduction="avg")


@pytest.mark.parametrize("shape", [(2, 4, 2, 2), (2, 3, 2, 1), (1, 3, 2, 2), (2, 3, 2)])
def test_hint_distance_refuses_other_shapes_and_never_broadcasts(shape):
    with pytest.raises(InputError, match=r"hint_distance: student \(2, 3, 2, 2\) and teacher .* the same shape"):
        hint_distance(draw(2, 3, 2, 2), draw(*shape))


@pytest.mark.parametrize("shape", [(2, 4, 2, 1), (1, 3, 2, 2), (2, 3, 2), (2, 3)])
def test_attention_distance_refuses_other_places_and_never_broadcasts(shape):
    with pytest.raises(
        InputError, match=r"attention_distance: student \(2, 3, 2, 2\) and teacher .* equal except for C"
    ):
        attention_distance(draw(2, 3, 2, 2), draw(*shape))
    with pytest.raises(InputError, match="equal except for C"):
        attention_distance(draw(2, 3), draw(2, 3))


@pytest.mark.parametrize("normalize", ["sample", "channel", "none"])
def test_factors_are_apart_by_their_units(normalize):
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    apart = (unit_feature(student, normalize=normalize) - unit_feature(teacher, normalize=normalize)).abs().mean()
    assert factor_distance(student, teacher, normalize=normalize).item() == pytest.approx(apart.item(), rel=1e-13)


def test_units_have_norm_one_and_their_feature_is_unchanged():
    feature = draw(3, 4, 2, 2)
    before = feature.clone()
    assert torch.allclose(unit_feature(feature).norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(unit_feature(feature, normalize="channel").norm(dim=2), torch.ones(3, 4, dtype=torch.float64))
    assert torch.equal(unit_feature(feature, normalize="none"), before)
    assert torch.equal(feature, before)
    assert unit_feature(torch.full((1, 4), 1e-8)).norm().item() == pytest.approx(2e-8 / 1e-6)
