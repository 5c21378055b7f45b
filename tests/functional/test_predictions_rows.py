"""The softened divergence of every sample, in both directions, against loops."""

import math

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.functional import mean_probabilities, softened_kl, softened_kl_rows

TEMPERATURES = [0.5, 1.0, 4.0]
DIRECTIONS = ["forward", "reverse"]


def draw(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def naive_softmax(row, temperature=1.0):
    top = max(row)
    exponentials = [math.exp((value - top) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_kl(first, second):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(first, second, strict=True) if p > 0)


def naive_rows(student_rows, teacher_rows, temperature, direction):
    rows = []
    for student, teacher in zip(student_rows, teacher_rows, strict=True):
        p, q = naive_softmax(student, temperature), naive_softmax(teacher, temperature)
        rows.append(temperature**2 * (naive_kl(q, p) if direction == "forward" else naive_kl(p, q)))
    return rows


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (1, 7), (5, 2), (4, 10)])
def test_the_rows_are_those_of_the_loop(direction, temperature, samples, classes):
    student, teacher = draw(samples, classes), draw(samples, classes, seed=1)
    rows = softened_kl_rows(student, teacher, temperature=temperature, direction=direction)
    assert rows.shape == (samples,)
    assert rows.tolist() == pytest.approx(naive_rows(student.tolist(), teacher.tolist(), temperature, direction))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_are_taken_as_they_are(direction, temperature):
    student, teacher = draw(4, 5), draw(4, 5, seed=1)
    probabilities = torch.tensor([naive_softmax(row, temperature) for row in teacher.tolist()], dtype=torch.float64)
    rows = softened_kl_rows(
        student, probabilities, temperature=temperature, from_logits=False, direction=direction
    )  # fmt: skip
    assert rows.tolist() == pytest.approx(naive_rows(student.tolist(), teacher.tolist(), temperature, direction))


def test_the_rows_of_two_classes_are_hand_values():
    # q = (3/4, 1/4), p = (1/2, 1/2).
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert softened_kl_rows(student, teacher, direction="forward").item() == pytest.approx(forward, rel=1e-6)
    assert softened_kl_rows(student, teacher, direction="reverse").item() == pytest.approx(reverse, rel=1e-6)


def test_forward_at_temperature_1_from_logits_is_the_default():
    student, teacher = draw(3, 4), draw(3, 4, seed=1)
    plain = softened_kl_rows(student, teacher)
    assert torch.equal(
        plain, softened_kl_rows(student, teacher, temperature=1.0, from_logits=True, direction="forward")
    )
    assert not torch.allclose(plain, softened_kl_rows(student, teacher, direction="reverse"), rtol=0.01)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_softened_kl_is_the_mean_of_the_forward_rows(temperature):
    student, teacher = draw(6, 5), draw(6, 5, seed=1)
    for targets, from_logits in ((teacher, True), (teacher.softmax(1), False)):
        options = {"temperature": temperature, "from_logits": from_logits}
        rows = softened_kl_rows(student, targets, **options)
        assert softened_kl(student, targets, **options).item() == pytest.approx(rows.mean().item(), rel=1e-14)


def test_one_direction_is_the_other_with_the_sides_swapped():
    student, teacher = draw(5, 4), draw(5, 4, seed=1)
    swapped = softened_kl_rows(teacher, student, temperature=2.0)
    assert torch.allclose(softened_kl_rows(student, teacher, temperature=2.0, direction="reverse"), swapped, rtol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_leading_dimension_is_kept(direction):
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    rows = softened_kl_rows(student, teacher, temperature=2.0, direction=direction)
    flat = softened_kl_rows(student.reshape(6, 4), teacher.reshape(6, 4), temperature=2.0, direction=direction)
    assert rows.shape == (2, 3)
    assert torch.allclose(rows.flatten(), flat, rtol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_does_not_see_the_others(direction):
    student, teacher = draw(4, 5), draw(4, 5, seed=1)
    rows = softened_kl_rows(student, teacher, direction=direction)
    other = student.clone()
    other[2] += draw(5, seed=2)
    changed = softened_kl_rows(other, teacher, direction=direction) != rows
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rows_are_zero_only_for_equal_distributions(direction, temperature):
    logits = draw(3, 5)
    options = {"temperature": temperature, "direction": direction}
    assert softened_kl_rows(logits, logits + 7.0, **options).abs().max().item() < 1e-12
    assert (softened_kl_rows(logits, draw(3, 5, seed=1), **options) > 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_constant_added_to_the_logits_of_a_row_changes_nothing(direction):
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    rows = softened_kl_rows(student, teacher, temperature=2.0, direction=direction)
    shifted = softened_kl_rows(
        student + draw(3, 1, seed=2), teacher + draw(3, 1, seed=3), temperature=2.0, direction=direction
    )
    assert torch.allclose(shifted, rows, rtol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_forward_gradient_is_the_difference_of_the_probabilities(temperature):
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    softened_kl_rows(student, teacher, temperature=temperature).sum().backward()
    for i in range(3):
        p, q = naive_softmax(student[i].tolist(), temperature), naive_softmax(teacher[i].tolist(), temperature)
        expected = [temperature * (p[k] - q[k]) for k in range(4)]
        assert student.grad[i].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_reverse_gradient_weighs_by_the_student(temperature):
    # d KL(p || q) / d s_k = T p_k (log p_k / q_k - KL), with the factor T ** 2.
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    softened_kl_rows(student, teacher, temperature=temperature, direction="reverse").sum().backward()
    for i in range(3):
        p, q = naive_softmax(student[i].tolist(), temperature), naive_softmax(teacher[i].tolist(), temperature)
        expected = [temperature * p[k] * (math.log(p[k] / q[k]) - naive_kl(p, q)) for k in range(4)]
        assert student.grad[i].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_the_gradient_towards_an_ensemble_is_the_mean_of_those_towards_its_members():
    student, members = draw(4, 6).requires_grad_(), draw(5, 4, 6, seed=1, scale=1.5)
    mixture = mean_probabilities(members)
    collapsed = softened_kl_rows(student, mixture, from_logits=False).mean()
    singles = torch.stack([softened_kl_rows(student, member).mean() for member in members]).mean()
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (collapsed, singles)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-16)
    # The values differ by the Jensen-Shannon term, which no student can change.
    rows = [[naive_softmax(row) for row in member] for member in members.tolist()]
    means = [[sum(rows[m][i][k] for m in range(5)) / 5 for k in range(6)] for i in range(4)]
    term = sum(naive_kl(rows[m][i], means[i]) for m in range(5) for i in range(4)) / 20
    assert singles.item() - collapsed.item() == pytest.approx(term, rel=1e-10)
    assert term > 0.1


def test_the_forward_rows_are_the_students_nll_of_the_teachers_labels_less_their_entropy():
    student, teacher = draw(3, 4), draw(3, 4, seed=1)
    rows = softened_kl_rows(student, teacher)
    for i in range(3):
        p, q = naive_softmax(student[i].tolist()), naive_softmax(teacher[i].tolist())
        nll = -sum(q[k] * math.log(p[k]) for k in range(4))
        entropy = -sum(q[k] * math.log(q[k]) for k in range(4))
        assert rows[i].item() == pytest.approx(nll - entropy, rel=1e-10)


def test_the_forward_rows_are_the_limit_of_training_on_the_teachers_labels():
    student, teacher = draw(3, 4), draw(3, 4, seed=1)
    labels = torch.multinomial(teacher.softmax(1), 100_000, True, generator=torch.Generator().manual_seed(0))
    ratio = (teacher.log_softmax(1) - student.log_softmax(1)).gather(1, labels)
    error = ratio.std(dim=1) / math.sqrt(100_000)
    rows = softened_kl_rows(student, teacher)
    # Four standard errors.
    assert ((ratio.mean(dim=1) - rows).abs() < 4 * error).all()
    assert (error < 0.1 * rows).all()


# edges


def test_a_class_that_the_teacher_never_names_costs_nothing_forward_and_much_in_reverse():
    student = draw(2, 3, scale=1.0)
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    forward = softened_kl_rows(student, teacher, from_logits=False)
    probabilities = [naive_softmax(row) for row in student.tolist()]
    assert forward.tolist() == pytest.approx(
        [naive_kl(q, p) for q, p in zip(teacher.tolist(), probabilities, strict=True)]
    )
    for dtype, tiny in ((torch.float64, 2.0**-1022), (torch.float32, 2.0**-126)):
        logits = student.detach().clone().to(dtype).requires_grad_()
        reverse = softened_kl_rows(logits, teacher.to(dtype), from_logits=False, direction="reverse")
        expected = [
            naive_kl(p, [max(value, tiny) for value in q]) for q, p in zip(teacher.tolist(), probabilities, strict=True)
        ]
        assert reverse.tolist() == pytest.approx(expected, rel=1e-5)
        reverse.sum().backward()
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_huge_logits_are_finite_and_right(dtype, from_logits, direction):
    student = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4], [-1e4, 1e4]], dtype=dtype)
    targets = teacher if from_logits else teacher.softmax(1)
    rows = softened_kl_rows(student, targets, from_logits=from_logits, direction=direction)
    rows.sum().backward()
    gap = 2 * float(student.detach()[0, 0])
    if direction == "reverse" and not from_logits:
        gap = -math.log(torch.finfo(rows.dtype).tiny)
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rows.tolist() == pytest.approx([gap, 0], rel=1e-6, abs=1e-6)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_is_computed_in_float32(direction):
    student, teacher = draw(4, 6).half(), draw(4, 6, seed=1).half()
    rows = softened_kl_rows(student, teacher, temperature=4.0, direction=direction)
    expected = softened_kl_rows(student.double(), teacher.double(), temperature=4.0, direction=direction)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "backward"}, "direction must be 'forward' or 'reverse', got 'backward'"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": -1.0, "direction": "reverse"}, "temperature must be positive, got -1.0"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        softened_kl_rows(draw(2, 3), draw(2, 3), **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_other_shapes_are_refused(direction):
    with pytest.raises(InputError, match=r"softened_kl: student \(2, 3\) and teacher \(1, 3\) must have"):
        softened_kl_rows(draw(2, 3), draw(1, 3), direction=direction)
