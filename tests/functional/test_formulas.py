"""Every formula against plain loops, then its invariances, then its edges."""

import itertools
import math

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.functional import (
    calibration_bins,
    expected_calibration_error,
    factor_distance,
    mean_probabilities,
    member_shares,
    soft_cross_entropy,
    softened_kl,
    weighted_mean,
)

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def draw(*shape, seed=0, dtype=torch.float64, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def naive_softmax(row, temperature=1.0):
    top = max(row)
    exponentials = [math.exp((value - top) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_kl(student_rows, teacher_rows, temperature):
    total = 0.0
    for student, teacher in zip(student_rows, teacher_rows, strict=True):
        p, q = naive_softmax(student, temperature), naive_softmax(teacher, temperature)
        for k in range(len(p)):
            total += q[k] * (math.log(q[k]) - math.log(p[k]))
    return temperature * temperature * total / len(student_rows)


# softened_kl


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (1, 7), (5, 2), (4, 10)])
def test_softened_kl_is_the_loop(temperature, samples, classes):
    student, teacher = draw(samples, classes), draw(samples, classes, seed=1)
    expected = naive_kl(student.tolist(), teacher.tolist(), temperature)
    assert softened_kl(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_softened_kl_of_two_classes_is_a_hand_value():
    # q = (3/4, 1/4), p = (1/2, 1/2), T = 1.
    value = softened_kl(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_softened_kl_is_at_temperature_1_by_default():
    student, teacher = draw(3, 4), draw(3, 4, seed=1)
    assert torch.equal(softened_kl(student, teacher), softened_kl(student, teacher, temperature=1.0))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_softened_kl_takes_probabilities_as_they_are(temperature):
    student, teacher = draw(4, 5), draw(4, 5, seed=1)
    probabilities = torch.tensor([naive_softmax(row, temperature) for row in teacher.tolist()], dtype=torch.float64)
    given = softened_kl(student, probabilities, temperature=temperature, from_logits=False)
    assert given.item() == pytest.approx(naive_kl(student.tolist(), teacher.tolist(), temperature), rel=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_softened_kl_has_the_gradient_of_the_formula(temperature):
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    softened_kl(student, teacher, temperature=temperature).backward()
    for i in range(3):
        p = naive_softmax(student[i].tolist(), temperature)
        q = naive_softmax(teacher[i].tolist(), temperature)
        expected = [temperature * (p[k] - q[k]) / 3 for k in range(4)]
        assert student.grad[i].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-15)


def test_softened_kl_averages_over_every_leading_dimension():
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    flat = softened_kl(student.reshape(6, 4), teacher.reshape(6, 4), temperature=2.0)
    assert softened_kl(student, teacher, temperature=2.0).item() == pytest.approx(flat.item(), rel=1e-14)


def test_softened_kl_of_a_batch_is_the_mean_of_single_samples():
    student, teacher = draw(6, 5), draw(6, 5, seed=1)
    single = [softened_kl(student[i : i + 1], teacher[i : i + 1], temperature=3.0).item() for i in range(6)]
    assert softened_kl(student, teacher, temperature=3.0).item() == pytest.approx(sum(single) / 6, rel=1e-14)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_softened_kl_is_zero_only_for_equal_distributions(temperature):
    logits = draw(3, 5)
    assert softened_kl(logits, logits + 7.0, temperature=temperature).item() == pytest.approx(0.0, abs=1e-11)
    assert softened_kl(logits, draw(3, 5, seed=1), temperature=temperature).item() > 0


def test_softened_kl_does_not_see_a_constant_added_to_the_logits():
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    shifted = softened_kl(student + draw(3, 1, seed=2), teacher + draw(3, 1, seed=3), temperature=2.0)
    assert shifted.item() == pytest.approx(softened_kl(student, teacher, temperature=2.0).item(), rel=1e-12)


def test_softened_kl_sees_which_side_is_the_teacher():
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    assert softened_kl(student, teacher).item() != pytest.approx(softened_kl(teacher, student).item(), rel=1e-3)


def test_softened_kl_does_not_see_the_order_of_samples_or_classes():
    student, teacher = draw(4, 5), draw(4, 5, seed=1)
    rows, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 1, 0, 3, 2])
    permuted = softened_kl(student[rows][:, columns], teacher[rows][:, columns], temperature=2.0)
    assert permuted.item() == pytest.approx(softened_kl(student, teacher, temperature=2.0).item(), rel=1e-12)


def test_softened_kl_at_high_temperature_is_the_squared_distance_of_centred_logits():
    # Hinton et al., section 2.1: T^2 KL -> |(s - mean s) - (t - mean t)|^2 / (2 K).
    student, teacher = draw(4, 5), draw(4, 5, seed=1)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.square().sum().item() / (2 * 5 * 4)
    assert softened_kl(student, teacher, temperature=1e4).item() == pytest.approx(limit, rel=1e-3)


def test_softened_kl_is_the_soft_cross_entropy_less_the_entropy():
    student, teacher = draw(4, 5), draw(4, 5, seed=1).softmax(-1)
    entropy = -sum(q * math.log(q) for q in teacher.flatten().tolist()) / 4
    expected = soft_cross_entropy(student, teacher).item() - entropy
    assert softened_kl(student, teacher, from_logits=False).item() == pytest.approx(expected, rel=1e-10)


def test_softened_kl_takes_a_teacher_probability_of_zero():
    student = draw(2, 3).requires_grad_()
    loss = softened_kl(student, torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).double(), from_logits=False)
    loss.backward()
    first, second = (naive_softmax(row) for row in student.tolist())
    expected = -math.log(first[0]) + sum(0.5 * (math.log(0.5) - math.log(second[k])) for k in (0, 1))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-12)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_softened_kl_of_huge_logits_is_finite_and_right(dtype, from_logits):
    student = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4], [-1e4, 1e4]], dtype=dtype)
    loss = softened_kl(student, teacher if from_logits else teacher.softmax(-1), from_logits=from_logits)
    loss.backward()
    # The first sample is wrong by 2e4 nats, the second is right; bfloat16 holds 1e4 as 9984.
    assert loss.item() == pytest.approx(1e4, rel=2e-3)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_kl_is_computed_in_float32(dtype, temperature):
    student, teacher = draw(4, 5, dtype=dtype), draw(4, 5, seed=1, dtype=dtype)
    loss = softened_kl(student, teacher, temperature=temperature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_kl(student.tolist(), teacher.tolist(), temperature), rel=1e-5)


def test_softened_kl_keeps_float64():
    assert softened_kl(draw(2, 3), draw(2, 3, seed=1)).dtype == torch.float64


def test_softened_kl_is_the_same_under_autocast():
    student, teacher = draw(4, 5, dtype=torch.float32), draw(4, 5, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = softened_kl(student, teacher, temperature=2.0)
    assert torch.equal(inside, softened_kl(student, teacher, temperature=2.0))


@pytest.mark.parametrize("function", [softened_kl, soft_cross_entropy, factor_distance])
@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3,), (2, 3, 1)])
def test_different_shapes_are_refused_and_never_broadcast(function, shape):
    with pytest.raises(InputError, match=rf"{function.__name__}: student \(2, 3\) and teacher .* the same shape"):
        function(torch.zeros(2, 3), torch.zeros(shape))


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(InputError, match="temperature must be positive"):
        softened_kl(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)
    with pytest.raises(InputError, match="temperature must be positive"):
        mean_probabilities(torch.zeros(2, 2, 3), temperature=temperature)


# soft_cross_entropy


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (1, 7), (5, 2), (4, 10)])
def test_soft_cross_entropy_is_the_loop(samples, classes):
    logits, probs = draw(samples, classes), draw(samples, classes, seed=1).softmax(-1)
    total = 0.0
    for row, target in zip(logits.tolist(), probs.tolist(), strict=True):
        total -= sum(q * math.log(p) for q, p in zip(target, naive_softmax(row), strict=True))
    assert soft_cross_entropy(logits, probs).item() == pytest.approx(total / samples, rel=1e-12)


def test_soft_cross_entropy_to_one_hot_targets_is_the_negative_log_likelihood():
    logits = draw(3, 4)
    expected = -sum(math.log(naive_softmax(logits[i].tolist())[k]) for i, k in enumerate([1, 3, 0])) / 3
    targets = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=torch.float64)
    assert soft_cross_entropy(logits, targets).item() == pytest.approx(expected, rel=1e-12)


def test_soft_cross_entropy_of_a_batch_is_the_mean_of_single_samples():
    logits, probs = draw(2, 3, 5), draw(2, 3, 5, seed=1).softmax(-1)
    single = [soft_cross_entropy(logits[i, j], probs[i, j]).item() for i in range(2) for j in range(3)]
    assert soft_cross_entropy(logits, probs).item() == pytest.approx(sum(single) / 6, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_cross_entropy_of_huge_half_precision_logits_is_finite(dtype):
    logits = torch.tensor([[1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[0.0, 1.0]], dtype=dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2e4, rel=2e-3)
    assert torch.isfinite(logits.grad).all()


# mean_probabilities, weighted_mean, member_shares


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [2, 0, 1], [0.1, 0.7, 5.0]])
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (4, 5)])
def test_mean_probabilities_is_the_loop(temperature, weights, samples, classes):
    logits = draw(3, samples, classes)
    probs = mean_probabilities(logits, temperature=temperature, weights=weights)
    shares = weights or [1, 1, 1]
    assert probs.shape == (samples, classes)
    for i in range(samples):
        members = [naive_softmax(logits[m, i].tolist(), temperature) for m in range(3)]
        expected = [sum(shares[m] * members[m][k] for m in range(3)) / sum(shares) for k in range(classes)]
        assert probs[i].tolist() == pytest.approx(expected, rel=1e-12)


def test_mean_probabilities_is_not_the_softmax_of_the_mean():
    # A sure teacher and one that leans the other way: the mean of softmaxes is (1/2 + 1/6, ...), not nearly sure.
    logits = torch.tensor([[[100.0, 0.0]], [[0.0, math.log(2.0)]]])
    assert mean_probabilities(logits).tolist()[0] == pytest.approx([2 / 3, 1 / 3], rel=1e-6)
    assert logits.mean(0).softmax(-1)[0, 0].item() > 0.999


@pytest.mark.parametrize("weights", [None, [1, 2, 3]])
def test_mean_probabilities_takes_a_sequence_or_a_tensor(weights):
    logits = draw(3, 4, 5)
    for sequence in (list(logits), tuple(logits)):
        assert torch.equal(mean_probabilities(sequence, weights=weights), mean_probabilities(logits, weights=weights))


def test_mean_probabilities_does_not_see_the_order_of_members():
    logits, weights = draw(4, 3, 5), [1.0, 2.0, 0.0, 4.0]
    expected = mean_probabilities(logits, weights=weights)
    for order in itertools.permutations(range(4)):
        permuted = mean_probabilities(logits[list(order)], weights=[weights[m] for m in order])
        assert torch.allclose(permuted, expected, rtol=1e-14, atol=0)


def test_mean_probabilities_of_one_member_is_its_softmax():
    logits = draw(1, 3, 5)
    assert torch.equal(mean_probabilities(logits), logits[0].softmax(-1))
    assert torch.allclose(mean_probabilities(logits, weights=[0.3]), logits[0].softmax(-1), rtol=1e-14)


def test_a_member_without_weight_does_not_count():
    logits = draw(2, 3, 5)
    assert torch.equal(mean_probabilities(logits, weights=[1, 0]), logits[0].softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mean_probabilities_of_huge_half_precision_logits_sum_to_one(dtype):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], dtype=dtype)
    probs = mean_probabilities(logits, temperature=2.0)
    assert probs.dtype == torch.float32
    assert probs.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("logits", [[], (), torch.empty(0, 2, 3)], ids=["list", "tuple", "tensor"])
def test_mean_probabilities_of_no_member_is_refused(logits):
    with pytest.raises(InputError, match="at least one member, got none"):
        mean_probabilities(logits)


WRONG_WEIGHTS = [
    ([1.0], "1 weights for 2 teachers"),
    ([1.0, 1.0, 1.0], "3 weights for 2 teachers"),
    ([], "0 weights for 2 teachers"),
    ([1.0, -0.1], r"non-negative and not all zero, got \[1.0, -0.1\]"),
    ([0.0, 0.0], "non-negative and not all zero"),
    ([1.0, math.nan], "non-negative and not all zero"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        member_shares(weights, 2)
    with pytest.raises(InputError, match=message):
        weighted_mean(torch.zeros(2, 3), weights)
    with pytest.raises(InputError, match=message):
        mean_probabilities(torch.zeros(2, 1, 3), weights=weights)


@pytest.mark.parametrize(
    ("weights", "members", "shares"),
    [
        (None, 1, [1.0]),
        (None, 4, [0.25] * 4),
        ([3, 1], 2, [0.75, 0.25]),
        ([0, 5], 2, [0, 1]),
        ([1e-30, 3e-30], 2, [0.25, 0.75]),
    ],
)
def test_member_shares_divide_by_the_sum(weights, members, shares):
    assert member_shares(weights, members) == pytest.approx(shares)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 1)])
@pytest.mark.parametrize("weights", [None, [1, 2, 5]])
def test_weighted_mean_is_the_loop(shape, weights):
    values = draw(*shape)
    shares = [weight / sum(weights) for weight in weights] if weights else [1 / 3] * 3
    flat = [member.flatten().tolist() for member in values]
    expected = [sum(shares[m] * flat[m][d] for m in range(3)) for d in range(len(flat[0]))]
    assert weighted_mean(values, weights).shape == shape[1:]
    assert weighted_mean(values, weights).flatten().tolist() == pytest.approx(expected, rel=1e-12)


# factor_distance


def naive_units(sample, normalize, eps):
    """One sample's normalised entries as a flat list."""
    rows = list(sample) if normalize == "channel" else [sample]
    units = []
    for row in rows:
        entries = row.flatten().tolist()
        norm = math.sqrt(sum(value * value for value in entries))
        units += [value if normalize == "none" else value / max(norm, eps) for value in entries]
    return units


def naive_factor_distance(student, teacher, *, p=1, reduction="mean", normalize="sample", eps=1e-6):
    total, entries = 0.0, 0
    for i in range(len(student)):
        pairs = zip(naive_units(student[i], normalize, eps), naive_units(teacher[i], normalize, eps), strict=True)
        distances = [abs(a - b) ** p for a, b in pairs]
        total += sum(distances)
        entries = len(distances)
    return total / len(student) / (entries if reduction == "mean" else 1)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", ["sample", "channel", "none"])
@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (4, 3, 2, 5), (3, 6, 2)])
def test_factor_distance_is_the_loop(p, reduction, normalize, shape):
    student, teacher = draw(*shape), draw(*shape, seed=1)
    options = {"p": p, "reduction": reduction, "normalize": normalize}
    expected = naive_factor_distance(student, teacher, **options)
    assert factor_distance(student, teacher, **options).item() == pytest.approx(expected, rel=1e-12)


def test_factor_distance_is_p_1_mean_and_sample_by_default():
    student, teacher = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    assert factor_distance(student, teacher).item() == pytest.approx(naive_factor_distance(student, teacher), rel=1e-12)


def test_factor_distance_takes_vectors():
    student, teacher = draw(3, 7), draw(3, 7, seed=1)
    assert factor_distance(student, teacher).item() == pytest.approx(naive_factor_distance(student, teacher), rel=1e-12)


def test_factor_distance_of_two_entries_is_a_hand_value():
    # u = (0.6, 0.8) and (1, 0).
    value = factor_distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]), reduction="sum")
    assert value.item() == pytest.approx(0.4 + 0.8, rel=1e-6)


def test_factor_distance_of_positive_multiples_is_zero():
    feature = draw(3, 4, 2, 2)
    scales = torch.tensor([0.5, 3.0, 1000.0], dtype=torch.float64)[:, None, None, None]
    assert factor_distance(feature, feature).item() == 0
    assert factor_distance(feature * scales, feature).item() == pytest.approx(0, abs=1e-16)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 2.0, 1e5])
@pytest.mark.parametrize("normalize", ["sample", "channel"])
def test_factor_distance_does_not_see_the_scale_of_either_side(scale, normalize):
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    expected = factor_distance(student, teacher, normalize=normalize).item()
    assert factor_distance(student * scale, teacher, normalize=normalize).item() == pytest.approx(expected, rel=1e-12)
    assert factor_distance(student, teacher * scale, normalize=normalize).item() == pytest.approx(expected, rel=1e-12)


def test_factor_distance_sees_the_sign():
    feature = draw(3, 4, 2, 2)
    assert factor_distance(-feature, feature).item() > 0.1


def test_channel_normalisation_does_not_see_the_scale_of_a_channel_but_sample_normalisation_does():
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    scaled = student * torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64)[:, None, None]
    per_channel = factor_distance(student, teacher, normalize="channel").item()
    per_sample = factor_distance(student, teacher).item()
    assert factor_distance(scaled, teacher, normalize="channel").item() == pytest.approx(per_channel, rel=1e-12)
    assert factor_distance(scaled, teacher).item() != pytest.approx(per_sample, rel=1e-3)


def test_the_gradient_is_orthogonal_to_the_feature():
    student, teacher = draw(5, 3, 2, 2).requires_grad_(), draw(5, 3, 2, 2, seed=1)
    factor_distance(student, teacher).backward()
    for feature, gradient in zip(student.detach().flatten(1), student.grad.flatten(1), strict=True):
        assert gradient.norm() > 0
        assert abs(torch.dot(feature, gradient) / (feature.norm() * gradient.norm())).item() < 1e-13


def test_doubling_the_feature_halves_its_gradient():
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    once, twice = student.clone().requires_grad_(), (2 * student).requires_grad_()
    factor_distance(once, teacher).backward()
    factor_distance(twice, teacher).backward()
    assert torch.allclose(2 * twice.grad, once.grad, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("normalize", ["sample", "channel", "none"])
@pytest.mark.parametrize("p", [1, 2])
def test_the_gradient_is_that_of_finite_differences(normalize, p):
    teacher = draw(2, 3, 2, 2, seed=1)
    student = draw(2, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: factor_distance(z, teacher, p=p, normalize=normalize), student)


@pytest.mark.slow
@pytest.mark.parametrize("entries", [1, 2, 16, 900])
@pytest.mark.parametrize("seed", range(5))
def test_factor_distance_keeps_its_bounds(entries, seed):
    student, teacher = draw(8, entries, seed=seed), draw(8, entries, seed=seed + 100)
    assert 0 <= factor_distance(student, teacher).item() <= 2 / math.sqrt(entries) * (1 + 1e-12)
    positive = factor_distance(student.abs(), teacher.abs()).item()
    assert 0 <= positive <= math.sqrt(2 / entries) * (1 + 1e-12)


@pytest.mark.parametrize("entries", [2, 16, 900])
def test_factor_distance_attains_its_bounds(entries):
    ones = torch.ones(1, entries, dtype=torch.float64)
    assert factor_distance(ones, -5 * ones).item() == pytest.approx(2 / math.sqrt(entries), rel=1e-12)
    first, second = ones.clone(), ones.clone()
    first[:, entries // 2 :] = 0
    second[:, : entries // 2] = 0
    assert factor_distance(first, second).item() == pytest.approx(math.sqrt(2 / entries), rel=1e-12)


def test_independent_feature_maps_are_as_far_apart_as_documented():
    student, teacher = draw(16, 64, 8, 8).relu(), draw(16, 64, 8, 8, seed=1).relu()
    assert factor_distance(student, teacher).item() == pytest.approx(0.8 / math.sqrt(4096), rel=0.02)


@pytest.mark.parametrize("normalize", ["sample", "channel", "none"])
@pytest.mark.parametrize("p", [1, 2])
def test_sum_is_d_times_mean(normalize, p):
    student, teacher = draw(3, 4, 2, 5), draw(3, 4, 2, 5, seed=1)
    mean = factor_distance(student, teacher, p=p, normalize=normalize)
    total = factor_distance(student, teacher, p=p, normalize=normalize, reduction="sum")
    assert total.item() == pytest.approx(40 * mean.item(), rel=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factor_distance_of_a_batch_is_the_mean_of_single_samples_and_of_micro_batches(reduction):
    student, teacher = draw(6, 3, 2, 2), draw(6, 3, 2, 2, seed=1)
    whole = factor_distance(student, teacher, reduction=reduction).item()
    for size in (1, 2, 3):
        parts = zip(student.split(size), teacher.split(size), strict=True)
        values = [factor_distance(a, b, reduction=reduction).item() for a, b in parts]
        assert sum(values) / len(values) == pytest.approx(whole, rel=1e-13)


def test_factor_distance_is_symmetric():
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    assert torch.equal(factor_distance(student, teacher), factor_distance(teacher, student))


def test_permuting_the_channels_of_one_side_changes_the_distance_and_of_both_does_not():
    feature, order = draw(3, 4, 2, 2), torch.tensor([1, 2, 3, 0])
    assert factor_distance(feature[:, order], feature).item() > 0.05
    other = draw(3, 4, 2, 2, seed=1)
    both = factor_distance(feature[:, order], other[:, order]).item()
    assert both == pytest.approx(factor_distance(feature, other).item(), rel=1e-13)


@pytest.mark.parametrize("normalize", ["sample", "channel", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_feature_has_a_finite_distance_and_gradient(normalize, reduction, p, dtype):
    student = torch.zeros(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    teacher = draw(2, 3, 4, 4, dtype=dtype)
    loss = factor_distance(student, teacher, p=p, reduction=reduction, normalize=normalize)
    loss.backward()
    expected = naive_factor_distance(student, teacher, p=p, reduction=reduction, normalize=normalize)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(student.grad).all()


def test_a_zero_feature_in_half_precision_has_a_finite_gradient():
    student = torch.zeros(2, 64, 4, 4, dtype=torch.float16, requires_grad=True)
    loss = factor_distance(student, draw(2, 64, 4, 4, dtype=torch.float16))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_two_zero_features_are_not_apart():
    student = torch.zeros(2, 3, 4, requires_grad=True)
    loss = factor_distance(student, torch.zeros(2, 3, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(2, 3, 4))


def test_a_zero_sample_does_not_touch_the_gradients_of_others():
    student, teacher = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    alone = student[1:].clone().requires_grad_()
    factor_distance(alone, teacher[1:]).backward()
    beside = torch.stack([torch.zeros_like(student[0]), student[1]]).requires_grad_()
    factor_distance(beside, teacher).backward()
    assert torch.allclose(2 * beside.grad[1], alone.grad[0], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_a_norm_below_eps_is_divided_by_eps(eps):
    student = torch.tensor([[0.3 * eps, -0.4 * eps]], dtype=torch.float64)
    value = factor_distance(student, torch.zeros(1, 2).double(), reduction="sum", eps=eps)
    assert value.item() == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 1000.0])
def test_factor_distance_of_half_precision_is_computed_in_float32(dtype, scale):
    # A half precision norm of these features overflows at the large scale and loses digits at the others.
    student = draw(3, 4, 4, 4, dtype=dtype, scale=scale).requires_grad_()
    teacher = draw(3, 4, 4, 4, seed=1, dtype=dtype, scale=scale)
    loss = factor_distance(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_factor_distance(student, teacher), rel=1e-5)
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()


def test_factor_distance_is_the_same_under_autocast():
    student, teacher = draw(3, 4, 4, 4, dtype=torch.float32), draw(3, 4, 4, 4, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = factor_distance(student, teacher)
    assert torch.equal(inside, factor_distance(student, teacher))


def test_unknown_options_of_factor_distance_are_refused():
    feature = torch.ones(1, 2, 2, 2)
    with pytest.raises(InputError, match="reduction must be 'mean' or 'sum', got 'none'"):
        factor_distance(feature, feature, reduction="none")
    with pytest.raises(InputError, match="normalize must be 'sample', 'channel' or 'none', got 'batch'"):
        factor_distance(feature, feature, normalize="batch")


# expected_calibration_error, calibration_bins


def naive_bin(confidence, bins):
    for b in range(1, bins + 1):
        if confidence <= b / bins:
            return b - 1
    return bins - 1


def naive_calibration(confidences, correct, bins):
    counts, sums, hits = [0] * bins, [0.0] * bins, [0] * bins
    for confidence, right in zip(confidences, correct, strict=True):
        b = naive_bin(confidence, bins)
        counts[b] += 1
        sums[b] += confidence
        hits[b] += right
    return counts, sums, hits


def draw_confidences(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(samples, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(samples, generator=generator, dtype=torch.float64) < confidence**2


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
@pytest.mark.parametrize("samples", [1, 7, 400])
def test_calibration_bins_and_error_are_the_loop(bins, samples):
    confidence, correct = draw_confidences(samples)
    counts, sums, hits = naive_calibration(confidence.tolist(), correct.tolist(), bins)
    found = calibration_bins(confidence, correct, bins=bins)
    assert [part.dtype for part in found] == [torch.float64] * 3
    assert found[0].tolist() == counts
    assert found[1].tolist() == pytest.approx(sums, rel=1e-12)
    assert found[2].tolist() == hits
    error = sum(
        count / samples * abs(hit / count - total / count)
        for count, total, hit in zip(counts, sums, hits, strict=True)
        if count
    )
    assert expected_calibration_error(confidence, correct, bins=bins).item() == pytest.approx(error, rel=1e-12)


def test_the_error_has_15_bins_by_default():
    confidence, correct = draw_confidences(300)
    default = expected_calibration_error(confidence, correct)
    assert default.item() == expected_calibration_error(confidence, correct, bins=15).item()
    assert default.item() != expected_calibration_error(confidence, correct, bins=14).item()
    assert len(calibration_bins(confidence, correct)[0]) == 15


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 10, 15, 20, 25, 50])
def test_a_confidence_on_an_edge_counts_in_the_lower_bin(bins):
    edges = torch.tensor([b / bins for b in range(1, bins + 1)], dtype=torch.float64)
    counts, _, _ = calibration_bins(edges, torch.ones(bins, dtype=torch.bool), bins=bins)
    assert counts.tolist() == [1.0] * bins


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_confidence_0_counts_in_the_first_bin_and_1_in_the_last(dtype):
    counts, sums, hits = calibration_bins(torch.tensor([0, 1, 1], dtype=dtype), torch.tensor([True, True, False]))
    assert (counts[0].item(), counts[-1].item(), counts.sum().item()) == (1, 2, 3)
    assert (sums[0].item(), sums[-1].item()) == (0, 2)
    assert (hits[0].item(), hits[-1].item()) == (1, 1)


def test_a_confidence_rounded_to_above_1_counts_in_the_last_bin():
    above = torch.nextafter(torch.tensor([1.0]), torch.tensor([2.0]))
    counts, _, _ = calibration_bins(above, torch.tensor([True]))
    assert counts.tolist() == [0.0] * 14 + [1.0]


def test_a_perfectly_calibrated_bin_adds_no_error():
    confidence = torch.full((4,), 0.75)
    assert expected_calibration_error(confidence, torch.tensor([1, 1, 1, 0])).item() == 0


def test_sure_and_wrong_is_an_error_of_1():
    assert expected_calibration_error(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 1


def test_the_error_stays_in_its_bounds_and_does_not_see_the_order():
    confidence, correct = draw_confidences(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    error = expected_calibration_error(confidence, correct).item()
    assert 0 < error < 1
    assert expected_calibration_error(confidence[order], correct[order]).item() == pytest.approx(error, rel=1e-12)


def test_the_error_of_one_bin_is_the_gap_between_accuracy_and_mean_confidence():
    confidence, correct = draw_confidences(200)
    gap = abs(sum(correct.tolist()) / 200 - sum(confidence.tolist()) / 200)
    assert expected_calibration_error(confidence, correct, bins=1).item() == pytest.approx(gap, rel=1e-12)


def test_the_error_of_no_samples_is_nan():
    assert math.isnan(expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)).item())
