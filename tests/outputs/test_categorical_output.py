"""Categorical, method by method, against naive references in loops and double precision."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from distill_lightning import Batch, Categorical, Gaussian, InputError
from distill_lightning.outputs import Output, output_of

MASKS = [[True, False, True, True], [False, False, True, False], [False] * 4]


def draw(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def classes(*shape, of=3, seed=0):
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(seed))


def batch_of(target, counted=None):
    counted = None if counted is None else torch.tensor(counted)
    return Batch(torch.zeros(len(target), 1), target, counted=counted)


def softmax(row, temperature=1.0):
    top = max(row)
    exponentials = [math.exp((value - top) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def entropy_to(row, target):
    """Cross entropy of one row of logits to a class or to a distribution."""
    log_probs = [math.log(p) for p in softmax(row)]
    if isinstance(target, list):
        return -sum(q * log_p for q, log_p in zip(target, log_probs, strict=True))
    return -log_probs[target]


def divergence_to(row, distribution, temperature):
    p = softmax(row, temperature)
    pairs = zip(distribution, p, strict=True)
    return temperature**2 * sum(q * (math.log(q) - math.log(p_k)) for q, p_k in pairs if q > 0)


def mean_of(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# The labels' likelihood


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("soft", [False, True])
def test_the_labels_loss_is_the_naive_cross_entropy(count, size, soft):
    logits = draw(count, size)
    target = draw(count, size, seed=1).softmax(dim=1) if soft else classes(count, of=size)
    expected = mean_of(entropy_to(*pair) for pair in zip(logits.tolist(), target.tolist(), strict=True))
    assert float(Categorical(size).label_loss(logits, batch_of(target))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("counted", MASKS)
@pytest.mark.parametrize("soft", [False, True])
def test_the_labels_loss_is_the_mean_over_the_samples_that_count(counted, soft):
    logits = draw(4, 3)
    target = draw(4, 3, seed=1).softmax(dim=1) if soft else classes(4)
    rows = zip(logits.tolist(), target.tolist(), counted, strict=True)
    expected = mean_of(entropy_to(row, label) for row, label, counts in rows if counts)
    loss = Categorical(3).label_loss(logits, batch_of(target, counted))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("counted", [None, *MASKS, "positions"])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_labels_loss_of_positions_is_the_mean_over_those_that_count(counted, ignored):
    logits, target = draw(4, 5, 3), classes(4, 5)
    if ignored:
        target[0, 1], target[2, 3:], target[3] = -100, -100, -100
    mask = draw(4, 5, seed=2) > 0 if counted == "positions" else None
    batch = Batch(torch.zeros(4, 5), target, counted=mask) if counted == "positions" else batch_of(target, counted)
    expected = mean_of(
        entropy_to(logits[n, t].tolist(), int(target[n, t]))
        for n in range(4)
        for t in range(5)
        if target[n, t] != -100 and (counted is None or (bool(mask[n, t]) if counted == "positions" else counted[n]))
    )
    assert float(Categorical(3).label_loss(logits, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("counted", [None, *MASKS])
def test_the_labels_loss_of_distributions_at_positions(counted):
    logits, target = draw(4, 5, 3), draw(4, 5, 3, seed=1).softmax(dim=-1)
    expected = mean_of(
        entropy_to(logits[n, t].tolist(), target[n, t].tolist())
        for n in range(4)
        for t in range(5)
        if counted is None or counted[n]
    )
    assert float(Categorical(3).label_loss(logits, batch_of(target, counted))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("places", [(), (5,)])
def test_samples_without_a_label_have_no_gradient(places):
    logits, target = draw(4, *places, 3).requires_grad_(), classes(4, *places)
    target[1] = -100
    Categorical(3).label_loss(logits, batch_of(target)).backward()
    moved = logits.grad.abs().flatten(1).sum(dim=1) > 0
    assert moved.tolist() == [True, False, True, True]


def test_a_batch_in_which_nothing_counts_gives_zero_and_no_gradient():
    logits, batch = draw(4, 3).requires_grad_(), batch_of(torch.full((4,), -100))
    means = Categorical(3)
    losses = [means.label_loss(logits, batch), means.divergence(logits, draw(4, 3).softmax(dim=1), batch)]
    sum(losses).backward()
    assert [float(loss) for loss in losses] == [0, 0]
    assert not logits.grad.any()


# Divergences


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_the_naive_ones(count, size, temperature):
    logits, distribution = draw(count, size), draw(count, size, seed=1).softmax(dim=1)
    means = Categorical(size)
    expected = [divergence_to(*pair, temperature) for pair in zip(logits.tolist(), distribution.tolist(), strict=True)]
    rows = means.divergence_rows(logits, distribution, temperature=temperature)
    assert rows.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    mean = means.divergence(logits, distribution, batch_of(classes(count, of=size)), temperature=temperature)
    assert float(mean) == pytest.approx(mean_of(expected), rel=1e-4)
    if temperature == 1:
        assert torch.equal(rows, means.divergence_rows(logits, distribution))


@pytest.mark.parametrize("counted", [None, *MASKS])
@pytest.mark.parametrize("target", ["classes", "ignored", "none", "distributions"])
def test_the_divergence_of_positions_is_the_mean_over_those_that_count(counted, target):
    # As many positions as samples: a mask that is not spread over the positions would go unnoticed otherwise.
    logits, distribution = draw(4, 4, 3), draw(4, 4, 3, seed=1).softmax(dim=-1)
    labels = {"none": None, "distributions": distribution}.get(target, classes(4, 4))
    if target == "ignored":
        labels[0, 1:], labels[2, 0] = -100, -100
    mask = None if counted is None else torch.tensor(counted)
    batch = Batch(torch.zeros(4, 4), labels, counted=mask)
    expected = mean_of(
        divergence_to(logits[n, t].tolist(), distribution[n, t].tolist(), 2.0)
        for n in range(4)
        for t in range(4)
        if (counted is None or counted[n]) and not (target == "ignored" and labels[n, t] == -100)
    )
    mean = Categorical(3).divergence(logits, distribution, batch, temperature=2.0)
    assert float(mean) == pytest.approx(expected, rel=1e-4)


def test_a_class_without_mass_costs_nothing():
    logits = torch.tensor([[0.5, 1.0, -2.0]])
    expected = divergence_to(logits[0].tolist(), [0.0, 1.0, 0.0], 1.0)
    assert Categorical(3).divergence_rows(logits, torch.tensor([[0.0, 1.0, 0.0]])).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("size", [2, 5])
def test_at_a_point_it_is_the_cross_entropy_to_the_likeliest_class(size):
    logits, distribution = draw(4, size), draw(4, size, seed=1).softmax(dim=1)
    expected = [
        entropy_to(row, max(range(size), key=lambda k, q=q: q[k]))
        for row, q in zip(logits.tolist(), distribution.tolist(), strict=True)
    ]
    rows = Categorical(size).point_divergence_rows(logits, distribution)
    assert rows.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    logits, distribution, batch = draw(4, 3, dtype=dtype), draw(4, 3, seed=1).softmax(dim=1), batch_of(classes(4))
    means = Categorical(3)
    for method in (
        lambda output: means.label_loss(output, batch),
        lambda output: means.divergence(output, distribution, batch, temperature=4.0),
        lambda output: means.divergence_rows(output, distribution),
        lambda output: means.point_divergence_rows(output, distribution),
        lambda output: means.collapse([output, output.flip(0)], temperature=4.0),
        lambda output: means.collapse([output, output.flip(0)], combine="logits", weights=[1.0, 2.0]),
    ):
        assert method(logits).dtype == torch.float32
        torch.testing.assert_close(method(logits).double(), method(logits.double()).double(), rtol=1e-5, atol=1e-6)


# Ensembles


@pytest.mark.parametrize("places", [(), (5,)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize(("members", "weights"), [(1, None), (3, None), (3, [1.0, 3.0, 0.5])])
def test_an_ensemble_is_the_naive_mean(members, weights, combine, temperature, places):
    outputs = [draw(2, *places, 3, seed=m, dtype=torch.float64) for m in range(members)]
    shares = [1 / members] * members if weights is None else [weight / sum(weights) for weight in weights]
    found = Categorical(3).collapse(outputs, weights=weights, combine=combine, temperature=temperature)
    assert found.shape == outputs[0].shape
    rows = [output.view(-1, 3).tolist() for output in outputs]
    for row, members_rows in zip(found.view(-1, 3).tolist(), zip(*rows, strict=True), strict=True):
        if combine == "logits":
            logits = [sum(w * one[k] for w, one in zip(shares, members_rows, strict=True)) for k in range(3)]
            expected = softmax(logits, temperature)
        else:
            softened = [softmax(one, temperature) for one in members_rows]
            expected = [sum(w * q[k] for w, q in zip(shares, softened, strict=True)) for k in range(3)]
        assert row == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("places", [(), (5,)])
def test_uncertainty_is_the_entropy(places):
    distribution = draw(2, *places, 4).softmax(dim=-1)
    distribution[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    expected = [-sum(q * math.log(q) for q in row if q > 0) for row in distribution.view(-1, 4).tolist()]
    assert Categorical(4).uncertainty(distribution).flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


# In the form of metrics and logs


def test_predictions_are_the_logits():
    logits = draw(2, 3)
    means = Categorical(3)
    assert torch.equal(means.prediction(logits), logits)
    assert torch.equal(means.teacher_prediction(logits), logits)


def test_a_distribution_as_a_prediction_is_its_logarithm_and_finite():
    distribution = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
    found = Categorical(3).as_prediction(distribution)
    assert found[0, :2].tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.softmax(dim=1), distribution)


@pytest.mark.parametrize("counted", [None, [True, True, False, True], [False, False, True, False], [False] * 4])
def test_the_comparison_is_the_share_of_agreement(counted):
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    distribution = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    same = [True, True, False, False]
    expected = mean_of(one for one, counts in zip(same, counted or [True] * 4, strict=True) if counts)
    found = Categorical(2).comparison(logits, distribution, None if counted is None else torch.tensor(counted))
    assert {name: float(value) for name, value in found.items()} == pytest.approx({"agreement": expected})


@pytest.mark.parametrize(("size", "top5"), [(3, False), (5, False), (6, True)])
def test_the_metrics_are_those_of_classifiers(size, top5):
    names = {"accuracy", "nll", "ece", "brier", "aurc", "eaurc"} | ({"top5"} if top5 else set())
    assert set(Categorical(size).metrics()) == names


def test_the_comparison_with_teachers_is_the_naive_one():
    logits, distribution = draw(6, 3), draw(6, 3, seed=1).softmax(dim=1)
    means = Categorical(3)
    found = means.teacher_metrics()(logits, means.as_prediction(distribution))
    kl = mean_of(divergence_to(*pair, 1.0) for pair in zip(logits.tolist(), distribution.tolist(), strict=True))
    same = logits.argmax(dim=1) == distribution.argmax(dim=1)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"agreement": float(same.float().mean()), "teacher_kl": kl}, rel=1e-4
    )


# What counts


def test_without_a_mask_all_samples_count():
    assert Categorical(3).counted(draw(4, 3), batch_of(classes(4))) is None


@pytest.mark.parametrize("counted", MASKS)
def test_a_mask_of_samples_is_spread_over_their_positions(counted):
    found = Categorical(3).counted(draw(4, 5, 3), batch_of(classes(4, 5), counted))
    assert found.tolist() == [[one] * 5 for one in counted]
    assert Categorical(3).counted(draw(4, 3), batch_of(classes(4), counted)).tolist() == counted


def test_positions_without_a_label_do_not_count_wherever_the_batch_was_made():
    target = classes(2, 3)
    batch = batch_of(target)
    # As on a device, where looking at the target in the constructor would wait.
    target[1, 2] = -100
    assert batch.counted is None
    assert Categorical(3).counted(draw(2, 3, 3), batch).tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize("places", [(), (5,)])
@pytest.mark.parametrize("counted", [None, *MASKS])
@pytest.mark.parametrize("other", ["classes", "outputs"])
def test_selected_are_the_rows_that_count(places, counted, other):
    logits = draw(4, *places, 3)
    target = classes(4, *places) if other == "classes" else draw(4, *places, 3, seed=1)
    rows, targets = Categorical(3).select(logits, target, None if counted is None else torch.tensor(counted))
    kept = torch.tensor([True] * 4 if counted is None else counted)
    assert torch.equal(rows, logits[kept].reshape(-1, 3))
    assert torch.equal(targets, target[kept].flatten(0, len(places)))


def test_selected_are_the_positions_that_count():
    logits, target, counted = draw(4, 5, 3), classes(4, 5), draw(4, 5) > 0
    rows, targets = Categorical(3).select(logits, target, counted)
    assert torch.equal(rows, logits[counted])
    assert torch.equal(targets, target[counted])


# Refusals


@pytest.mark.parametrize("size", [1, 0, -3])
def test_fewer_than_two_classes_are_refused(size):
    with pytest.raises(InputError, match=f"num_classes must be at least 2, got {size}"):
        Categorical(size)


@pytest.mark.parametrize(
    ("shape", "per_position", "message"),
    [
        ((4, 5), False, r"student \(Linear\) has 5 classes where num_classes=3 is needed"),
        ((4, 5), True, r"student \(Linear\) has 5 classes where num_classes=3 is needed"),
        ((4,), False, r"an output of shape \(4,\) where num_classes=3"),
        ((4, 7, 5), True, r"an output of shape \(4, 7, 5\) where num_classes=3"),
        ((4, 7, 3), False, r"predicts a class for each position, \(4, 7, 3\): use a module that takes positions: S"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(shape, per_position, message):
    for check in (Categorical(3).check, Categorical(3).check_teacher):
        with pytest.raises(InputError, match=message):
            check("student", nn.Linear(1, 1), shape, per_position=per_position)


@pytest.mark.parametrize(("shape", "per_position"), [((4, 3), False), ((4, 3), True), ((4, 7, 3), True)])
def test_outputs_that_fit_pass(shape, per_position):
    assert Categorical(3).check("student", nn.Linear(1, 1), shape, per_position=per_position) is None


def test_classes_of_positions_are_refused_where_samples_have_one():
    means = Categorical(3)
    with pytest.raises(
        InputError, match=r"XModule takes one class for each sample, and the targets have shape \(4, 5\)"
    ):
        means.check_target("XModule", classes(4, 5))
    for target, per_position in ((classes(4, 5), True), (classes(4), False), (draw(4, 3), False), (None, False)):
        assert means.check_target("XModule", target, per_position=per_position) is None


@pytest.mark.parametrize("output", [Categorical(3), Gaussian(1)])
@pytest.mark.parametrize("target", [[0, 1], ("cat", "dog"), np.zeros(2), {"label": classes(2)}])
def test_a_target_that_is_no_tensor_is_refused(output, target):
    kind = type(target).__name__
    with pytest.raises(InputError, match=f"XModule: the targets are of the type {kind}: let the data module give a te"):
        output.check_target("XModule", target, is_evaluated=True)
    assert output.check_target("XModule", None) is None


def test_a_target_of_another_number_of_positions_is_refused():
    with pytest.raises(InputError, match="need a target for each position"):
        Categorical(3).label_loss(draw(4, 5, 3), batch_of(classes(4, 6)))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_both_rules_of_an_ensemble_have_a_meaning(combine):
    assert Categorical(3).check_rule(combine) is None


# Which output it is


def test_the_output_is_made_from_what_is_counted():
    assert output_of("Net", 4, None) == Categorical(4)
    assert output_of("Net", None, 2) == Gaussian(2)
    for given in ((None, None), (4, 2)):
        with pytest.raises(InputError, match="^Net needs either num_classes"):
            output_of("Net", *given)
    with pytest.raises(InputError, match="num_classes must be at least 2, got 0"):
        output_of("Net", 0, None)
    with pytest.raises(InputError, match="num_targets must be at least 1, got 0"):
        output_of("Net", None, 0)


def test_an_output_says_how_it_is_called():
    assert [(kind.name, kind.label_term) for kind in (Categorical, Gaussian)] == [
        ("probabilities", "ce"),
        ("gaussian", "nll"),
    ]


def test_a_subclass_must_define_the_distribution():
    class Half(Output):
        """An output of which nothing is known."""

    with pytest.raises(TypeError, match="abstract"):
        Half()
