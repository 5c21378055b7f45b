"""Extracurricular Learning against naive references, its equalities, its inputs, its options and its refusals."""

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from distill_lightning import (
    Batch,
    CutMixSampler,
    EmpiricalSampler,
    ExtracurricularModule,
    FunctionSampler,
    Gaussian,
    GeneratorSampler,
    InputError,
    KDModule,
    MatchPoint,
    MixupSampler,
    RegressionModule,
    SmallResNet,
    SupervisedModule,
    TeacherEnsemble,
    functional,
)
from distill_lightning.data.mixing import mixup
from distill_lightning.data.views import uniform_draws
from distill_lightning.layers import GaussianHead
from distill_lightning.modules.extracurricular import Match, MatchDistribution
from distill_lightning.networks import without_deviation
from distill_lightning.networks.weights import read_weights
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)
# What keeps the samplers' draws apart from others; with another number no run could be repeated.
SAMPLERS_STREAM = 0x45435543


# Networks, samplers and batches


class Table(nn.Module):
    """Gives row ``r`` of its table for the input ``r``, so that a test says what a network answers."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(torch.as_tensor(outputs).clone())

    def forward(self, inputs):
        return self.outputs[inputs[:, 0].long()]


def following(count):
    """Makes the table's rows after those of the batch into the additional inputs."""
    return FunctionSampler(lambda inputs, draws: inputs + count)


def rows_of(count, target=None, first=0):
    rows = torch.arange(first, first + count)
    return Batch(rows[:, None].float(), target, rows, torch.zeros_like(rows))


def draw(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@dataclass(frozen=True)
class MatchReversed(Match):
    """The divergence the other way round, as a user may add it."""

    def divergence_rows(self, output, student, teacher, temperature):
        if isinstance(output, Gaussian):
            return functional.gaussian_kl_rows(*output.prediction(student).chunk(2, dim=1), *teacher.chunk(2, dim=1))
        return functional.softened_kl_rows(
            student, teacher, temperature=temperature, from_logits=False, direction="reverse"
        )


MATCHES = {"forward": MatchDistribution(), "reverse": MatchReversed(), "point": MatchPoint()}


def tables_module(student, teachers, *, num_targets=None, weights=None, combine="probabilities", **options):
    """Of tables; the first half of their rows is the batch, the second what the sampler makes."""
    student, teachers = torch.as_tensor(student), [torch.as_tensor(teacher) for teacher in teachers]
    options |= {"num_targets": num_targets} if num_targets else {"num_classes": student.shape[1]}
    count = len(student) // 2
    return ExtracurricularModule(
        Table(student),
        TeacherEnsemble([Table(teacher) for teacher in teachers], weights, combine),
        samplers=[following(count)],
        **options,
    ), rows_of(count)


def observed_of(module, batch):
    """The terms of a batch and what is logged beside them."""
    logged = {}
    module.observe = lambda name, value: logged.update({name: float(value)})
    terms = module.terms(batch)
    return terms, logged


def batch_of(count=8, seed=0, view=0, targets=None):
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % 3 if targets is None else torch.randn(count, targets, generator=generator)
    index = torch.arange(count) + 100
    return Batch(torch.rand(count, *SHAPE, generator=generator), target, index, torch.full((count,), view))


def generator_of(latent_dim=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(latent_dim, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Unflatten(1, SHAPE))


def tiny_module(*, teachers=2, seed=0, targets=None, **options):
    torch.manual_seed(seed)
    classes = None if targets else 3
    networks = [TinyNet(classes, num_targets=targets).eval() for _ in range(teachers)]
    for network in networks:
        # Far from the student and from one another.
        nn.init.normal_(network.head.weight, std=2)
    student = TinyNet(classes, num_targets=targets)
    outputs = {"num_targets": targets} if targets else {"num_classes": 3}
    return ExtracurricularModule(student, networks, **outputs, **options)


def whole_loss(module, batch):
    terms, weights = module.terms(batch), module.weights()
    return sum(weights[name] * term for name, term in terms.items())


def seen_by(network):
    """Inputs that a network gets from now on."""
    seen = []

    def note(_module, args, named):
        seen.append(named or (args if len(args) > 1 else args[0]))

    network.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def fit(module, batches, **options):
    loader = DataLoader(batches, batch_size=None)
    trainer = tiny_trainer(limit_val_batches=0, **options)
    trainer.fit(module, loader, loader)
    return trainer


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Naive references, in double precision and loops


def naive_softmax(row, temperature=1.0):
    top = max(row)
    exponentials = [math.exp((value - top) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def shares_of(weights, members):
    weights = [1.0] * members if weights is None else weights
    return [weight / sum(weights) for weight in weights]


def naive_probabilities(teachers, row, temperature, weights, combine="probabilities"):
    shares = shares_of(weights, len(teachers))
    rows = [teacher[row].tolist() for teacher in teachers]
    if combine == "logits":
        return naive_softmax(
            [sum(w * r[k] for w, r in zip(shares, rows, strict=True)) for k in range(len(rows[0]))], temperature
        )
    softened = [naive_softmax(r, temperature) for r in rows]
    return [sum(w * q[k] for w, q in zip(shares, softened, strict=True)) for k in range(len(rows[0]))]


def naive_divergence(student, target, temperature, direction="forward"):
    p = naive_softmax(student.tolist(), temperature)
    pairs = list(zip(target, p, strict=True) if direction == "forward" else zip(p, target, strict=True))
    return temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in pairs)


def naive_entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def naive_collapse(teachers, row, weights):
    """Mean and variance of the mixture, per target."""
    shares, d = shares_of(weights, len(teachers)), teachers[0].shape[1] // 2
    found = []
    for j in range(d):
        means = [float(teacher[row, j]) for teacher in teachers]
        seconds = [math.exp(float(teacher[row, d + j])) + m**2 for teacher, m in zip(teachers, means, strict=True)]
        mean = sum(w * m for w, m in zip(shares, means, strict=True))
        found.append((mean, sum(w * second for w, second in zip(shares, seconds, strict=True)) - mean**2))
    return found


def naive_gaussian_divergence(first, second):
    """Of lists of (mean, variance)."""
    return sum(
        (math.log(v2 / v1) + v1 / v2 + (m1 - m2) ** 2 / v2 - 1) / 2
        for (m1, v1), (m2, v2) in zip(first, second, strict=True)
    )


def gaussians_of(output):
    d = output.shape[1] // 2
    return [[(row[j], math.exp(row[d + j])) for j in range(d)] for row in output.double().tolist()]


# The divergence, classification


ENSEMBLES = [
    (1, None, "probabilities"), (2, None, "probabilities"), (3, [1.0, 3.0, 0.5], "probabilities"),
    (2, [1.0, 3.0], "logits"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("members", "weights", "combine"), ENSEMBLES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("classes", [2, 5])
def test_classification_equals_the_naive_reference(members, weights, combine, temperature, direction, classes):
    student, teachers = draw(6, classes), [draw(6, classes, seed=1 + m) for m in range(members)]
    module, batch = tables_module(
        student, teachers, weights=weights, combine=combine, temperature=temperature, match=MATCHES[direction]
    )
    terms, logged = observed_of(module, batch)
    targets = [naive_probabilities(teachers, row, temperature, weights, combine) for row in range(6)]
    kl = [naive_divergence(student[row], targets[row], temperature, direction) for row in range(6)]
    entropy = [naive_entropy(target) for target in targets]
    agreement = [
        max(range(classes), key=lambda k: target[k]) == int(student[row].argmax()) for row, target in enumerate(targets)
    ]
    assert list(terms) == ["kl"]
    assert float(terms["kl"]) == pytest.approx(sum(kl) / 6, rel=1e-4)
    assert logged == pytest.approx(
        {
            "kl_real": sum(kl[:3]) / 3, "kl_function": sum(kl[3:]) / 3,
            "uncertainty_real": sum(entropy[:3]) / 3, "uncertainty_function": sum(entropy[3:]) / 3,
            "agreement": sum(agreement) / 6,
        }, rel=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_the_difference_of_the_softened_outputs(temperature):
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    module, batch = tables_module(student, [teacher], temperature=temperature)
    module.terms(batch)["kl"].backward()
    softened = ([naive_softmax(row, temperature) for row in logits.tolist()] for logits in (student, teacher))
    p, q = (torch.tensor(rows) for rows in softened)
    expected = temperature * (p - q) / 6
    torch.testing.assert_close(module.student.outputs.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_constant_added_to_the_logits_changes_nothing():
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    value = tables_module(student, [teacher])[0].terms(rows_of(3))["kl"]
    shifted = tables_module(student + 3, [teacher - draw(6, 1, seed=2)])[0].terms(rows_of(3))["kl"]
    assert float(value) == pytest.approx(float(shifted), rel=1e-5)


@pytest.mark.parametrize(("members", "weights", "combine"), ENSEMBLES)
def test_matched_at_a_point_classification_is_the_cross_entropy_to_the_likeliest_class(members, weights, combine):
    student, teachers = draw(6, 4), [draw(6, 4, seed=1 + m) for m in range(members)]
    module, batch = tables_module(student, teachers, weights=weights, combine=combine, match=MatchPoint())
    expected = 0.0
    for row in range(6):
        target = naive_probabilities(teachers, row, 1.0, weights, combine)
        likeliest = max(range(4), key=lambda k, target=target: target[k])
        expected -= math.log(naive_softmax(student[row].tolist())[likeliest]) / 6
    assert float(module.terms(batch)["kl"]) == pytest.approx(expected, rel=1e-4)


# The divergence, regression


@pytest.mark.slow
@pytest.mark.parametrize(("members", "weights"), [(1, None), (2, None), (3, [1.0, 3.0, 0.5])])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("targets", [1, 3])
def test_regression_equals_the_naive_reference(members, weights, direction, targets):
    student, teachers = draw(6, 2 * targets), [draw(6, 2 * targets, seed=1 + m) for m in range(members)]
    module, batch = tables_module(student, teachers, weights=weights, num_targets=targets, match=MATCHES[direction])
    terms, logged = observed_of(module, batch)
    mixtures = [naive_collapse([t.double() for t in teachers], row, weights) for row in range(6)]
    pairs = list(zip(mixtures, gaussians_of(student), strict=True))
    kl = [naive_gaussian_divergence(*(pair if direction == "forward" else pair[::-1])) for pair in pairs]
    variance = [sum(v for _, v in mixture) for mixture in mixtures]
    deviations = [[math.sqrt(v) for row in rows for _, v in row] for rows in zip(*pairs, strict=True)]
    assert list(terms) == ["kl"]
    assert float(terms["kl"]) == pytest.approx(sum(kl) / 6, rel=1e-4)
    assert logged == pytest.approx(
        {
            "kl_real": sum(kl[:3]) / 3, "kl_function": sum(kl[3:]) / 3,
            "uncertainty_real": sum(variance[:3]) / 3, "uncertainty_function": sum(variance[3:]) / 3,
            "teacher_deviation": sum(deviations[0]) / len(deviations[0]),
            "student_deviation": sum(deviations[1]) / len(deviations[1]),
        }, rel=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize(("direction", "best"), [("forward", 2.0), ("reverse", 1.0)])
def test_the_student_widens_where_its_mean_is_off_and_only_forward(direction, best):
    # The teacher's variance is 1, the student's mean is off by 1: a variance of 1 + 1 is best, and 1 in reverse.
    losses = []
    for variance in (best * 0.99, best, best * 1.01):
        student = torch.tensor([[1.0, math.log(variance)]] * 2, dtype=torch.float64)
        module, batch = tables_module(student, [torch.zeros(2, 2)], num_targets=1, match=MATCHES[direction])
        losses.append(float(module.terms(batch)["kl"]))
    assert losses[1] < min(losses[0], losses[2])


def test_with_equal_fixed_variances_the_gradient_is_that_of_the_squared_error():
    student, teacher = draw(6, 4, dtype=torch.float64), draw(6, 4, seed=1, dtype=torch.float64)
    student[:, 2:] = teacher[:, 2:] = math.log(0.7)
    module, batch = tables_module(student, [teacher], num_targets=2)
    module.terms(batch)["kl"].backward()
    expected = (student - teacher)[:, :2] / 0.7 / 6
    torch.testing.assert_close(module.student.outputs.grad[:, :2], expected, rtol=1e-6, atol=1e-9)
    assert float(module.student.outputs.grad[:, 2:].abs().max()) > 1e-3


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_matched_at_a_point_regression_is_the_squared_error_of_the_means(columns, variance):
    # The student may or may not have log-variances.
    student, teachers = draw(6, columns), [draw(6, 4, seed=1 + m) for m in range(2)]
    module, batch = tables_module(
        student, teachers, weights=[1.0, 3.0], num_targets=2, match=MatchPoint(variance=variance)
    )
    terms, logged = observed_of(module, batch)
    expected = 0.0
    for row in range(6):
        for j in range(2):
            mean = 0.25 * float(teachers[0][row, j]) + 0.75 * float(teachers[1][row, j])
            expected += (float(student[row, j]) - mean) ** 2 / (2 * variance) / 6
    assert float(terms["kl"]) == pytest.approx(expected, rel=1e-5)
    assert logged["student_deviation"] == pytest.approx(math.sqrt(variance))


# Ensembles


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 2.0]])
@pytest.mark.parametrize("targets", [None, 2])
def test_an_ensembles_gradient_is_the_mean_of_its_members_gradients(targets, weights):
    student = draw(6, 4, dtype=torch.float64)
    teachers = [draw(6, 4, seed=1 + m, scale=1.0, dtype=torch.float64) for m in range(3)]
    gradients, values = [], []
    for members, given in ((teachers, weights), *(([teacher], None) for teacher in teachers)):
        module, batch = tables_module(student, members, weights=given, num_targets=targets)
        value = module.terms(batch)["kl"]
        value.backward()
        gradients.append(module.student.outputs.grad)
        values.append(float(value))
    shares = shares_of(weights, 3)
    expected = sum(share * gradient for share, gradient in zip(shares, gradients[1:], strict=True))
    torch.testing.assert_close(gradients[0], expected, rtol=1e-5, atol=1e-9)
    # The value differs by what the members disagree about.
    assert values[0] < sum(share * value for share, value in zip(shares, values[1:], strict=True)) - 0.05


def test_the_value_gap_of_an_ensemble_is_the_jensen_shannon_divergence():
    student, teachers = draw(6, 4), [draw(6, 4, seed=1 + m) for m in range(3)]
    value = float(tables_module(student, teachers)[0].terms(rows_of(3))["kl"])
    singles = [float(tables_module(student, [teacher])[0].terms(rows_of(3))["kl"]) for teacher in teachers]
    gap = 0.0
    for row in range(6):
        gap += naive_entropy(naive_probabilities(teachers, row, 1.0, None)) / 6
        gap -= sum(naive_entropy(naive_softmax(teacher[row].tolist())) for teacher in teachers) / 18
    assert sum(singles) / 3 - value == pytest.approx(gap, rel=1e-4)


# The labels


def naive_label(student, target, rows):
    return -sum(math.log(naive_softmax(student[row].tolist())[target[row]]) for row in range(rows)) / rows


def test_the_label_term_is_the_cross_entropy_of_the_clean_rows():
    student, teacher = draw(8, 3), draw(8, 3, seed=1)
    module, batch = tables_module(student, [teacher], label_weight=0.3, kl_weight=0.5, temperature=2.0)
    target = torch.tensor([2, 0, 1, 1])
    terms = module.terms(batch.replace(target=target))
    assert list(terms) == ["kl", "label"]
    assert module.weights() == {"kl": 0.5, "label": 0.3}
    assert float(terms["label"]) == pytest.approx(naive_label(student, target.tolist(), 4), rel=1e-5)
    terms["label"].backward()
    gradient = module.student.outputs.grad.abs().sum(dim=1)
    assert (gradient[:4] > 0).all()
    assert not gradient[4:].any()


@pytest.mark.parametrize(("match", "variance"), [(MatchDistribution(), None), (MatchPoint(variance=0.3), 0.3)])
def test_the_label_term_of_a_regression_is_the_likelihood_of_the_clean_rows(match, variance):
    student, teacher, target = draw(8, 4), draw(8, 4, seed=1), draw(4, 2, seed=2)
    module, batch = tables_module(student, [teacher], num_targets=2, label_weight=1.0, match=match)
    expected = 0.0
    for row in range(4):
        for j in range(2):
            m, y = float(student[row, j]), float(target[row, j])
            v = variance or math.exp(float(student[row, 2 + j]))
            expected += (math.log(v) + (y - m) ** 2 / v + math.log(2 * math.pi)) / 2 / 4
    assert float(module.terms(batch.replace(target=target))["label"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, 2])
def test_labels_do_not_matter_where_they_have_no_weight(targets):
    states = []
    for change in (lambda y: y, lambda y: y.flip(0), lambda y: None):
        module = tiny_module(targets=targets, samplers=[MixupSampler(), GeneratorSampler(generator_of(), 3)])
        batches = [batch_of(seed=seed, view=seed, targets=targets) for seed in range(3)]
        fit(module, [batch.replace(target=change(batch.target)) for batch in batches], max_epochs=2)
        states.append(module.student.state_dict())
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_labels_matter_where_they_have_a_weight():
    states = []
    for shift in (0, 1):
        module = tiny_module(label_weight=0.5)
        batches = [batch.replace(target=(batch.target + shift) % 3) for batch in (batch_of(), batch_of(seed=1))]
        fit(module, batches)
        states.append(module.student.head.weight)
    assert not torch.equal(*states)


# Equalities, bit for bit over a whole fit


def run(module, **options):
    before = copy.deepcopy(module.student.state_dict())
    data = TinyDataModule(num_targets=module.num_targets, **options)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert not torch.equal(before["head.weight"], module.student.head.weight)
    return module.student.state_dict(), trainer.callback_metrics


@functools.cache
def run_of_standard_distillation(temperature):
    module = tiny_module(temperature=temperature)
    return run(
        KDModule(
            module.student, module.teachers.ensemble, num_classes=3, temperature=temperature, hard_label_weight=0.0
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        {"samplers": [EmpiricalSampler()]},
        {"samplers": [EmpiricalSampler(), EmpiricalSampler()], "extra_ratio": 2.0},
        {"samplers": []},
        {"extra_ratio": 0.0},
        {"extra_ratio": 0.0, "bn_mode": "separate"},
    ],
)
def test_without_additional_inputs_it_is_standard_distillation(temperature, options):
    module = tiny_module(temperature=temperature, **options)
    state, logged = run(module)
    expected, known = run_of_standard_distillation(temperature)
    assert_same(expected, state)
    assert torch.equal(logged["train/kl"], known["train/kd"])
    assert torch.equal(logged["train/kl"], logged["train/kl_real"])
    evaluated = {name: value for name, value in known.items() if name.startswith("val/")}
    assert "val/teacher_kl" in evaluated
    assert_same(evaluated, {name: logged[name] for name in evaluated})


@pytest.mark.slow
def test_additional_inputs_change_the_training():
    states = [run(tiny_module(extra_ratio=ratio))[0] for ratio in (0.0, 1.0)]
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, 2])
def test_with_labels_alone_it_is_plain_training(targets):
    module = tiny_module(targets=targets, kl_weight=0.0, label_weight=1.0, extra_ratio=0.0)
    student = copy.deepcopy(module.student)
    plain = RegressionModule(student, num_targets=targets) if targets else SupervisedModule(student, num_classes=3)
    state, logged = run(module)
    expected, known = run(plain)
    assert_same(expected, state)
    assert torch.equal(logged["train/label"], known["train/nll" if targets else "train/ce"])
    assert torch.equal(logged["val/nll"], known["val/nll"])


# Who is asked about what


@pytest.mark.parametrize("bn_mode", ["joint", "separate"])
def test_teachers_are_asked_once_about_the_very_inputs_of_the_student(bn_mode):
    module = tiny_module(samplers=[MixupSampler(), GeneratorSampler(generator_of(), 3)], bn_mode=bn_mode)
    student, *teachers = (seen_by(network) for network in (module.student, *module.teachers))
    batch = batch_of()
    before = batch.input.clone()
    module.terms(batch)
    assert [len(seen) for seen in teachers] == [1, 1]
    if bn_mode == "separate":
        # The batch last, so that nothing follows its statistics.
        assert torch.equal(student[1], batch.input)
        student[:] = [torch.cat([student[1], student[0]])]
    assert len(student) == 1
    assert student[0].shape == (16, *SHAPE)
    assert all(torch.equal(seen[0], student[0]) for seen in teachers)
    assert torch.equal(student[0][:8], batch.input)
    assert not torch.equal(student[0][8:], batch.input)
    assert torch.equal(batch.input, before)


def test_the_teacher_is_asked_at_the_mixed_input_and_its_answers_are_not_mixed():
    torch.manual_seed(0)
    # Linear, it would hide the difference.
    teacher = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 3))
    nn.init.normal_(teacher[0].weight, std=3)
    nn.init.normal_(teacher[2].weight, std=2)
    student = nn.Linear(1, 3)
    share = 0.3

    def mixed(inputs, draws):
        return share * inputs + (1 - share) * inputs.flip(0)

    inputs = torch.linspace(-2, 2, 6)[:, None]
    module = ExtracurricularModule(student, teacher, num_classes=3, samplers=[FunctionSampler(mixed)])
    index = torch.arange(6)
    _, logged = observed_of(module, Batch(inputs, None, index, index))
    with torch.no_grad():
        middle = mixed(inputs, None)
        asked = teacher(middle).softmax(dim=1)
        answers = teacher(inputs).softmax(dim=1)
        interpolated = share * answers + (1 - share) * answers.flip(0)
        kl = {
            name: sum(naive_divergence(row, q, 1.0) for row, q in zip(student(middle), target.tolist(), strict=True))
            / 6
            for name, target in (("asked", asked), ("interpolated", interpolated))
        }
    assert logged["kl_function"] == pytest.approx(kl["asked"], rel=1e-4)
    assert abs(kl["interpolated"] - kl["asked"]) > 0.05


def test_gradients_go_to_the_student_alone():
    sampler = GeneratorSampler(generator_of(), 3)
    module = tiny_module(samplers=[MixupSampler(), sampler])
    graphs = []
    for network in (*module.teachers, sampler.generator):
        network.register_forward_hook(lambda _m, _i, output: graphs.append(output.requires_grad))
    module.terms(batch_of())["kl"].backward()
    assert graphs == [False] * 3
    assert all(p.grad is None for network in (*module.teachers, *module.samplers) for p in network.parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in module.student.parameters())


def test_samplers_run_without_a_graph():
    # The module knows nothing of this network, so it is not frozen.
    network, graphs = nn.Conv2d(1, 1, 3, padding=1), []

    def sample(inputs, draws):
        graphs.append(torch.is_grad_enabled())
        return network(inputs)

    module = tiny_module(samplers=[FunctionSampler(sample)])
    module.terms(batch_of())["kl"].backward()
    assert graphs == [False]
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.slow
def test_teachers_and_generator_keep_every_bit_of_weights_and_buffers():
    module = tiny_module(samplers=[GeneratorSampler(generator_of(), 3), MixupSampler()])
    frozen = (*module.teachers, module.samplers[0].generator)
    before = [copy.deepcopy(network.state_dict()) for network in frozen]
    module.train()
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=TinyDataModule())
    for network, state in zip(frozen, before, strict=True):
        assert "num_batches_tracked" in " ".join(state)
        assert_same(state, network.state_dict())
        assert not any(child.training for child in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    assert not [name for name in checkpoint["state_dict"] if not name.startswith("student.")]


class Noise(nn.Module):
    """What a user might write: a sampler with a network of its own, not frozen."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))

    def forward(self, inputs, draws):
        return self.network(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Noise, lambda: FunctionSampler(Noise())])
def test_a_users_sampler_with_weights_is_frozen_too(make):
    sampler = make()
    before = copy.deepcopy(sampler.state_dict())
    module = tiny_module(samplers=[sampler])
    assert not any(p.requires_grad for p in sampler.parameters())
    module.terms(batch_of())
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    assert_same(before, sampler.state_dict())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.student.parameters()}


# How many inputs, from whom


@pytest.mark.slow
@pytest.mark.parametrize(("count", "ratio", "extra"), [(8, 0.0, 0), (8, 0.5, 4), (5, 1.0, 5), (3, 2.0, 6), (4, 0.1, 0)])
@pytest.mark.parametrize("sampler", [MixupSampler, lambda: GeneratorSampler(generator_of(), 3)])
def test_the_ratio_is_that_of_additional_to_training_inputs(count, ratio, extra, sampler):
    module = tiny_module(samplers=[sampler()], extra_ratio=ratio)
    seen = seen_by(module.student)
    terms, logged = observed_of(module, batch_of(count))
    assert len(seen[0]) == count + extra
    rest = {name: value for name, value in logged.items() if name.startswith("kl_") and name != "kl_real"}
    assert len(rest) == (extra > 0)
    mean = (count * logged["kl_real"] + extra * sum(rest.values())) / (count + extra)
    assert float(terms["kl"]) == pytest.approx(mean, rel=1e-5)


def noting(notes, value=0.0):
    def sample(inputs, draws):
        notes.append((inputs, len(draws), draws.index.tolist(), draws.uniform(2)))
        return inputs + value

    return FunctionSampler(sample)


@pytest.mark.parametrize(
    ("count", "ratio", "weights", "rows"),
    [
        (8, 1.0, [3.0, 1.0], [[0, 1, 2, 3, 4, 5], [6, 7]]),
        (8, 1.0, None, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 2.0, [0.5, 0.5], [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (4, 1.5, [2.0, 1.0], [[0, 1, 2, 3], [0, 1]]),
        (4, 2.0, [1.0, 3.0], [[0, 1], [2, 3, 0, 1, 2, 3]]),
        (6, 0.5, [1.0, 0.0], [[0, 1, 2], []]),
    ],
)
def test_samplers_share_the_additional_inputs_by_their_weights(count, ratio, weights, rows):
    notes = [], []
    module = tiny_module(
        samplers=[noting(notes[0], 0.1), noting(notes[1], 0.2)], sampler_weights=weights, extra_ratio=ratio
    )
    seen = seen_by(module.student)
    batch = batch_of(count)
    terms, logged = observed_of(module, batch)
    expected, sizes, divergences, numbers = [batch.input], [count], [logged["kl_real"]], []
    for number, (note, own) in enumerate(zip(notes, rows, strict=True)):
        # A sampler without rows is not asked.
        assert len(note) == bool(own)
        assert (f"kl_function_{number}" in logged) == (f"uncertainty_function_{number}" in logged) == bool(own)
        if own:
            inputs, size, index, drawn = note[0]
            assert torch.equal(inputs, batch.input[own])
            assert (size, index) == (len(own), [100 + row for row in own])
            expected.append(inputs + 0.1 * (number + 1))
            sizes.append(size)
            divergences.append(logged[f"kl_function_{number}"])
            numbers += drawn.flatten().tolist()
    assert torch.equal(seen[0], torch.cat(expected))
    assert len(set(numbers)) == len(numbers) == 2 * (sum(sizes) - count)
    mean = sum(size * value for size, value in zip(sizes, divergences, strict=True)) / sum(sizes)
    assert float(terms["kl"]) == pytest.approx(mean, rel=1e-5)


def test_among_other_samplers_the_empirical_one_gives_the_batch_once_more():
    module = tiny_module(samplers=[EmpiricalSampler(), MixupSampler()])
    seen, batch = seen_by(module.student), batch_of()
    _, logged = observed_of(module, batch)
    assert torch.equal(seen[0][8:12], batch.input[:4])
    assert not torch.equal(seen[0][12:], batch.input[4:])
    assert {"kl_empirical", "kl_mixup"} < logged.keys()


def test_data_with_partners_are_mixed_with_these():
    data = TinyDataModule()
    data.partners = True
    batch = next(iter(data.train_dataloader()))
    module = tiny_module(extra_ratio=2.0, seed=3)
    seen = seen_by(module.student)
    observed_of(module, batch)
    rows = torch.arange(16) % 8
    draws = batch.draws(module.samplers.seed + SAMPLERS_STREAM, rows=rows, copies=torch.arange(16) // 8)
    mixed = module.samplers[0].mix(batch.input, draws, pool=batch.partner.input, paired=True)
    expected = mixup(batch.input[rows], batch.partner.input[rows], mixed.share)
    assert torch.equal(seen[0], torch.cat([batch.input, expected]))


def test_a_few_rows_are_mixed_with_partners_from_the_whole_batch():
    module, partners = tiny_module(extra_ratio=0.25, seed=3), set()
    mix = module.samplers[0].mix

    def noted(inputs, draws, *, pool):
        mixed = mix(inputs, draws, pool=pool)
        assert torch.equal(pool, batch.input)
        partners.update(mixed.second.tolist())
        return mixed

    module.samplers[0].mix = noted
    for epoch in range(40):
        batch = batch_of(8).replace(view=torch.full((8,), epoch))
        observed_of(module, batch)
    assert partners == set(range(8))


def test_mixup_of_the_batch_is_what_is_sampled_by_default():
    (sampler,) = tiny_module().samplers
    assert isinstance(sampler, MixupSampler)
    assert sampler.alpha == 1
    seen = []
    for module in (tiny_module(), tiny_module(samplers=[MixupSampler()], extra_ratio=1.0)):
        seen.append(seen_by(module.student))
        module.terms(batch_of())
    assert torch.equal(seen[0][0], seen[1][0])


def test_what_is_logged_has_the_samplers_names():
    module = tiny_module(
        samplers=[MixupSampler(), CutMixSampler(), GeneratorSampler(generator_of(), 3), MixupSampler(0.2)],
        label_weight=0.5,
    )
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(batch_size=24))
    train = {name.removeprefix("train/") for name in trainer.callback_metrics if name.startswith("train/")}
    of = {
        f"{what}_{name}"
        for what in ("kl", "uncertainty")
        for name in ("real", "mixup_0", "cutmix", "generator", "mixup_3")
    }
    assert train == {"loss", "kl", "kl_share", "label", "label_share", "agreement"} | of


def test_every_row_counts_alike():
    student, teacher = draw(4, 3), draw(4, 3, seed=1)
    once, _ = tables_module(student, [teacher])
    twice = ExtracurricularModule(
        once.student,
        once.teachers.ensemble,
        num_classes=3,
        samplers=[FunctionSampler(lambda inputs, draws: inputs + 2)],
    )
    rows = torch.tensor([0, 1, 0, 1])
    doubled = Batch(rows[:, None].float(), None, rows, rows)
    assert float(twice.terms(doubled)["kl"]) == pytest.approx(float(once.terms(rows_of(2))["kl"]), rel=1e-6)


@pytest.mark.parametrize("targets", [None, 2])
def test_samples_that_do_not_count_have_no_part_in_what_is_matched_and_logged(targets):
    student, teacher = draw(8, 4), draw(8, 4, seed=1)
    module, batch = tables_module(student, [teacher], num_targets=targets)
    terms, logged = observed_of(module, batch.replace(counted=torch.tensor([True, False, True, True])))
    if targets:
        pairs = list(zip(gaussians_of(teacher), gaussians_of(student), strict=True))
        kl = [naive_gaussian_divergence(*pair) for pair in pairs]
        uncertainty = [sum(v for _, v in mixture) for mixture, _ in pairs]
    else:
        answers = [naive_softmax(row) for row in teacher.tolist()]
        kl = [naive_divergence(*pair, 1.0) for pair in zip(student, answers, strict=True)]
        uncertainty = [naive_entropy(answer) for answer in answers]
    # Additional inputs always count.
    assert float(terms["kl"]) == pytest.approx(sum(kl[:1] + kl[2:]) / 7, rel=1e-4)
    assert logged["kl_real"] == pytest.approx((kl[0] + kl[2] + kl[3]) / 3, rel=1e-4)
    assert logged["kl_function"] == pytest.approx(sum(kl[4:]) / 4, rel=1e-4)
    assert logged["uncertainty_real"] == pytest.approx((uncertainty[0] + uncertainty[2] + uncertainty[3]) / 3, rel=1e-4)
    assert logged["uncertainty_function"] == pytest.approx(sum(uncertainty[4:]) / 4, rel=1e-4)
    if not targets:
        same = (student.argmax(dim=1) == teacher.argmax(dim=1)).tolist()
        assert logged["agreement"] == pytest.approx(sum(same[:1] + same[2:]) / 7)
    terms["kl"].backward()
    assert (module.student.outputs.grad.abs().sum(dim=1) > 0).tolist() == [True, False] + 6 * [True]


# Inputs of several tensors


class TwoInputs(nn.Module):
    """Reads an image and a pose, by keyword or by position."""

    def __init__(self, outputs=3, head=nn.Linear):
        super().__init__()
        self.image, self.pose = nn.Linear(64, 8), nn.Linear(2, 8)
        self.head = head(8, outputs)

    def forward(self, image, pose):
        return self.head(torch.tanh(self.image(image.flatten(1)) + self.pose(pose)))


def two_inputs(kind, count=8, seed=0):
    """Images, and poses that are linear in their image, so that they stay so only if both are mixed alike."""
    batch = batch_of(count, seed=seed)
    pose = poses_of(batch.input)
    inputs = {"image": batch.input, "pose": pose} if kind == "dict" else (batch.input, pose)
    return batch.replace(input=inputs)


def poses_of(images):
    return images.flatten(1) @ draw(64, 2, seed=3, scale=1.0)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.parametrize("bn_mode", ["joint", "separate"])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_an_image_and_a_pose_are_mixed_with_the_same_rows_and_shares(kind, bn_mode, ratio):
    module = ExtracurricularModule(TwoInputs(), TwoInputs(), num_classes=3, extra_ratio=ratio, bn_mode=bn_mode)
    teacher, student = seen_by(module.teachers[0]), seen_by(module.student)
    batch = two_inputs(kind)
    module.terms(batch)
    assert type(teacher[0]) is type(student[0]) is type(batch.input)
    image, pose = teacher[0].values() if kind == "dict" else teacher[0]
    assert len(image) == len(pose) == 8 + 8 * ratio
    torch.testing.assert_close(pose, poses_of(image), rtol=1e-4, atol=1e-4)
    given = batch.input["image"] if kind == "dict" else batch.input[0]
    assert torch.equal(image[:8], given)
    # Most rows are none of the batch's own.
    assert sum(float((mixed - given).flatten(1).abs().amax(dim=1).min()) > 0.05 for mixed in image[8:]) >= 4


def test_a_pose_is_mixed_by_the_share_of_the_image_that_is_left():
    # Every image has one value, and so has its pose: the mean over the pixels tells the share.
    values = torch.linspace(0, 1, 8)
    inputs = (values.view(8, 1, 1, 1).expand(8, *SHAPE).clone(), values[:, None].expand(8, 2).clone())
    module = ExtracurricularModule(TwoInputs(), TwoInputs(), num_classes=3, samplers=[CutMixSampler()])
    seen = seen_by(module.student)
    module.terms(batch_of().replace(input=inputs))
    image, pose = seen[0]
    torch.testing.assert_close(image.mean(dim=(1, 2, 3))[:, None].expand(-1, 2), pose, rtol=1e-4, atol=1e-5)
    assert int((image[8:].flatten(1).std(dim=1) > 0).sum()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.parametrize("targets", [None, 2])
def test_inputs_of_several_tensors_are_trained_and_validated_on(kind, targets):
    if targets:
        networks, options = [TwoInputs(targets, GaussianHead) for _ in range(2)], {"num_targets": targets}
    else:
        networks, options = [TwoInputs() for _ in range(2)], {"num_classes": 3}
    module = ExtracurricularModule(*networks, label_weight=0.1, **options)
    batches = [two_inputs(kind, seed=seed) for seed in range(3)]
    if targets:
        batches = [batch.replace(target=draw(8, 2, seed=seed)) for seed, batch in enumerate(batches)]
    loader = DataLoader(batches, batch_size=None)
    trainer = tiny_trainer()
    trainer.fit(module, loader, loader)
    assert torch.isfinite(trainer.callback_metrics["train/kl_mixup"])
    assert torch.isfinite(trainer.callback_metrics["val/teacher_kl"])


# What is drawn


def draws_in_a_fit(*, draws_seed=0, epochs=2, **fields):
    notes = []
    module = ExtracurricularModule(TinyNet(), TinyNet(), num_classes=3, samplers=[noting(notes)], seed=draws_seed)
    batches = [batch_of(4, seed=number).replace(**fields) for number in range(3)]
    fit(module, batches, max_epochs=epochs)
    return torch.stack([numbers for *_, numbers in notes])


@pytest.mark.slow
def test_data_without_indices_draw_anew_in_every_batch_and_epoch():
    first = draws_in_a_fit(index=None, view=None)
    assert first.shape == (6, 4, 2)
    assert len(set(first.flatten().tolist())) == 48
    assert torch.equal(first, draws_in_a_fit(index=None, view=None))
    assert torch.equal(first[:3], draws_in_a_fit(index=None, view=None, epochs=1))
    assert not set(first.flatten().tolist()) & set(
        draws_in_a_fit(index=None, view=None, draws_seed=1).flatten().tolist()
    )


def test_data_without_indices_draw_anew_in_every_process():
    drawn = []
    for rank, number in ((0, 0), (1, 0), (0, 1), (1, 1)):
        notes = []
        module = tiny_module(teachers=1, samplers=[noting(notes)])
        module._trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=0)
        module.terms(module.prepared(batch_of(4).replace(index=None, view=None), number))
        drawn += notes[0][3].flatten().tolist()
    assert len(set(drawn)) == len(drawn) == 32


def test_terms_can_be_looked_at_without_a_trainer():
    module = tiny_module()
    values = [float(module.eval().terms(batch_of().replace(index=None, view=None))["kl"]) for _ in range(2)]
    assert values[0] == values[1] > 0


def test_draws_are_not_those_that_augment_the_images():
    notes = []
    module = tiny_module(teachers=1, samplers=[noting(notes)])
    batch = batch_of()
    module.terms(batch)
    assert not torch.equal(notes[0][3], uniform_draws(module.samplers.seed, batch.index, batch.view, 2))


def test_data_with_indices_alone_draw_anew_in_every_epoch():
    # Every batch has the same indices here, and what belongs to a sample is the same wherever it stands.
    drawn = draws_in_a_fit(view=None)
    assert torch.equal(drawn[0], drawn[1])
    assert not set(drawn[0].flatten().tolist()) & set(drawn[3].flatten().tolist())


@pytest.mark.slow
def test_data_with_views_draw_what_belongs_to_the_view():
    drawn = draws_in_a_fit()
    assert all(torch.equal(drawn[0], numbers) for numbers in drawn)
    assert len(set(drawn[0].flatten().tolist())) == 8


def test_draws_do_not_depend_on_the_order_of_the_batch_or_on_its_other_rows():
    def drawn_for(rows):
        notes = []
        module = tiny_module(teachers=1, samplers=[noting(notes)], extra_ratio=2.0)
        batch = batch_of(6)
        module.terms(Batch(*(part[rows] for part in batch)))
        return dict(zip(range(2 * len(rows)), notes[0][3].tolist(), strict=True))

    whole = drawn_for(torch.arange(6))
    assert len({tuple(numbers) for numbers in whole.values()}) == 12
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned = drawn_for(order)
    part = drawn_for(torch.tensor([3, 1]))
    for place, row in enumerate(order.tolist()):
        assert (turned[place], turned[6 + place]) == (whole[row], whole[6 + row])
    assert [part[place] for place in range(4)] == [whole[row] for row in (3, 1, 9, 7)]


def test_a_generator_makes_the_same_for_a_sample_wherever_it_stands():
    module = tiny_module(samplers=[GeneratorSampler(generator_of(), 3)], extra_ratio=2.0).eval()
    seen = seen_by(module.student)
    batch, order = batch_of(), torch.randperm(8)
    whole, turned = (module.terms(given)["kl"] for given in (batch, Batch(*(part[order] for part in batch))))
    torch.testing.assert_close(seen[1], seen[0].view(3, 8, *SHAPE)[:, order].flatten(0, 1))
    assert float(turned) == pytest.approx(float(whole), rel=1e-5)
    # The generator's outputs for one latent vector each, all different.
    assert len({tuple(image.flatten().tolist()) for image in seen[0]}) == 24


@pytest.mark.slow
def test_draws_come_from_the_seed_the_index_and_the_view_and_touch_no_global_generator():
    def extra(view=0, shift=0, seed=0):
        torch.manual_seed(0)
        module = ExtracurricularModule(TinyNet(), TinyNet(), num_classes=3, seed=seed)
        seen, state = seen_by(module.student), torch.get_rng_state()
        batch = batch_of(view=view)
        module.terms(batch.replace(index=batch.index + shift))
        assert torch.equal(torch.get_rng_state(), state)
        return seen[0][8:]

    assert torch.equal(extra(), extra())
    for other in (extra(view=1), extra(shift=8), extra(seed=1)):
        assert not torch.equal(extra(), other)


def test_uncertain_rows_are_not_dropped():
    student, teacher = draw(6, 3), 6 * draw(6, 3, seed=1)
    values = []
    for logits in (torch.zeros(3), torch.tensor([0.2, 0.0, 0.1])):
        teacher[4] = logits
        module, batch = tables_module(student, [teacher])
        values.append(float(module.terms(batch)["kl"]))
    entropies = [naive_entropy(naive_softmax(row)) for row in teacher.tolist()]
    assert max(range(6), key=lambda row: entropies[row]) == 4
    assert abs(values[0] - values[1]) > 1e-3


# Extreme inputs


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("match", MATCHES)
def test_extreme_logits_stay_finite(dtype, match):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, -1e4, 0.0], [0.0, 1.0, 2.0]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0], [1e4, 0.0, 0.0]], dtype=dtype)
    module, batch = tables_module(student, [teacher, teacher.flip(0)], match=MATCHES[match], label_weight=0.1)
    terms, logged = observed_of(module, batch.replace(target=torch.tensor([1, 0])))
    (terms["kl"] + terms["label"]).backward()
    assert all(math.isfinite(value) for value in logged.values())
    assert all(torch.isfinite(term) and term > 0 and term.dtype == torch.float32 for term in terms.values())
    assert torch.isfinite(module.student.outputs.grad).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("match", MATCHES)
def test_extreme_gaussians_stay_finite(dtype, match):
    values = [-50.0, 50.0]
    student = torch.tensor([[100.0, s] for s in values for _ in values], dtype=dtype)
    teachers = [torch.tensor([[m, s] for _ in values for s in values], dtype=dtype) for m in (-100.0, 80.0)]
    module, batch = tables_module(student, teachers, num_targets=1, match=MATCHES[match], label_weight=0.1)
    terms, logged = observed_of(module, batch.replace(target=torch.tensor([[300.0], [0.0]])))
    (1e-6 * (terms["kl"] + terms["label"])).backward()
    assert all(math.isfinite(value) for value in logged.values())
    assert all(torch.isfinite(term) and term.dtype == torch.float32 for term in terms.values())
    assert torch.isfinite(module.student.outputs.grad).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize("match", ["forward", "point"])
def test_half_precision_outputs_are_compared_in_float32(dtype, targets, match):
    student, teacher = draw(8, 4, dtype=dtype), draw(8, 4, seed=1, dtype=dtype)
    target = draw(4, 2, seed=2) if targets else torch.tensor([0, 1, 2, 3])
    values = []
    for wide in (False, True):
        outputs = (student.double(), teacher.double()) if wide else (student, teacher)
        module, batch = tables_module(
            outputs[0], [outputs[1]], num_targets=targets, match=MATCHES[match], label_weight=1.0
        )
        values.append({name: float(term) for name, term in module.terms(batch.replace(target=target)).items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("bounds", [(-1.0, 2.0), [-3.0, 0.5]])
def test_log_variances_of_both_sides_are_clamped(bounds):
    student, teacher = 5 * draw(6, 4), 5 * draw(6, 4, seed=1)
    output = Gaussian(2, log_var_bounds=bounds)
    module, batch = tables_module(student, [teacher], num_targets=2, output=output)
    pairs = []
    for output in (teacher, student):
        clamped = output.clone()
        clamped[:, 2:].clamp_(*bounds)
        assert not torch.equal(clamped, output)
        pairs.append(gaussians_of(clamped))
    expected = sum(naive_gaussian_divergence(*pair) for pair in zip(*pairs, strict=True)) / 6
    assert float(module.terms(batch)["kl"]) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(module.output.prediction(student)[:, 2:], student[:, 2:].clamp(*bounds))


# Deterministic teachers


@pytest.mark.slow
@pytest.mark.parametrize(("variance", "per_target"), [(0.5, [0.5, 0.5]), ([0.5, 2.0], [0.5, 2.0]), (3, [3, 3])])
@pytest.mark.parametrize("members", [1, 2])
def test_deterministic_teachers_get_the_given_variance(variance, per_target, members):
    student, teachers = draw(6, 4), [draw(6, 2, seed=1 + m) for m in range(members)]
    module, batch = tables_module(student, teachers, num_targets=2, output=Gaussian(2, teacher_variance=variance))
    log_vars = torch.tensor(per_target, dtype=torch.float64).log().expand(6, 2)
    full = [torch.cat([teacher.double(), log_vars], dim=1) for teacher in teachers]
    mixtures = [naive_collapse(full, row, None) for row in range(6)]
    expected = sum(naive_gaussian_divergence(*pair) for pair in zip(mixtures, gaussians_of(student), strict=True)) / 6
    assert float(module.terms(batch)["kl"]) == pytest.approx(expected, rel=1e-4)


def test_a_given_variance_is_that_of_the_teachers_that_give_means_alone():
    student, teachers = draw(6, 4), [draw(6, 4, seed=1), draw(6, 2, seed=2)]
    mixed, batch = tables_module(student, teachers, num_targets=2, output=Gaussian(2, teacher_variance=0.7))
    told = torch.cat([teachers[1], torch.full((6, 2), math.log(0.7))], dim=1)
    whole, _ = tables_module(student, [teachers[0], told], num_targets=2)
    assert torch.allclose(mixed.terms(batch)["kl"], whole.terms(batch)["kl"], rtol=1e-6)
    first, second = mixed.teacher_predictions(batch)
    assert torch.allclose(first, teachers[0][:3])
    assert torch.allclose(second, told[:3])


@pytest.mark.parametrize("match", ["forward", "point"])
@pytest.mark.parametrize("targets", [1, 2])
def test_a_deterministic_teacher_without_a_variance_is_refused(match, targets):
    # With two targets, a mean must not pass for a log-variance.
    student, teacher = draw(6, 2 * targets), draw(6, targets, seed=1)
    module, batch = tables_module(student, [teacher], num_targets=targets, match=MATCHES[match])
    with pytest.raises(InputError, match="teacher_variance"):
        module.terms(batch)


# BatchNorm


def test_separate_normalises_each_domain_by_its_own_statistics():
    module = tiny_module(bn_mode="separate", samplers=[GeneratorSampler(generator_of(), 3)])
    seen = seen_by(module.teachers[0])
    twin = copy.deepcopy(module.student)
    _, logged = observed_of(module, batch_of())
    real, extra = seen[0].split(8)
    with torch.no_grad():
        targets = [module.teachers.ensemble.probabilities(inputs) for inputs in (real, extra)]
        outputs = [twin(inputs) for inputs in (real, extra)]
        joint = twin(seen[0])
    for name, output, target in zip(("real", "generator"), outputs, targets, strict=True):
        rows = zip(output, target.tolist(), strict=True)
        assert logged[f"kl_{name}"] == pytest.approx(sum(naive_divergence(*row, 1.0) for row in rows) / 8, rel=1e-4)
    assert float((torch.cat(outputs) - joint).abs().max()) > 0.05


def test_joint_normalises_all_inputs_together():
    module = tiny_module(samplers=[GeneratorSampler(generator_of(), 3)])
    seen = seen_by(module.teachers[0])
    twin = copy.deepcopy(module.student)
    value = float(module.terms(batch_of())["kl"])
    with torch.no_grad():
        rows = zip(twin(seen[0]), module.teachers.ensemble.probabilities(seen[0]).tolist(), strict=True)
        assert value == pytest.approx(sum(naive_divergence(*row, 1.0) for row in rows) / 16, rel=1e-4)
    assert_same(twin.state_dict(), module.student.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, 2])
def test_separate_keeps_the_running_statistics_of_a_run_without_additional_inputs(targets):
    states = []
    for options in ({"bn_mode": "separate"}, {"extra_ratio": 0.0}, {"bn_mode": "joint"}):
        # Without steps, because the weights would soon differ, and with them everything else.
        module = tiny_module(
            targets=targets, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            samplers=[GeneratorSampler(generator_of(), 3), MixupSampler()], **({"extra_ratio": 1.5} | options),
        )  # fmt: skip
        tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule(num_targets=targets))
        states.append(module.student.state_dict())
    assert int(states[0]["features.1.num_batches_tracked"]) == 6
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["features.1.running_mean"], states[2]["features.1.running_mean"])


def test_separate_gives_gradients_from_both_domains():
    gradients = []
    for bn_mode in ("separate", "joint"):
        module = tiny_module(bn_mode=bn_mode, samplers=[EmpiricalSampler(), FunctionSampler(lambda x, draws: x)])
        # Repeated, the batch has the statistics of the batch: both modes are then the same, but for rounding.
        module.terms(batch_of())["kl"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.student.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_separate_leaves_norms_alone_that_the_user_keeps_in_eval_mode():
    module = tiny_module(bn_mode="separate", samplers=[GeneratorSampler(generator_of(), 3)])
    for child in module.student.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
            child.running_mean.uniform_(-1, 1)
    twin = copy.deepcopy(module.student)
    seen = seen_by(module.teachers[0])
    value = float(module.terms(batch_of())["kl"])
    with torch.no_grad():
        rows = zip(twin(seen[0]), module.teachers.ensemble.probabilities(seen[0]).tolist(), strict=True)
        assert value == pytest.approx(sum(naive_divergence(*row, 1.0) for row in rows) / 16, rel=1e-4)
    assert_same(twin.state_dict(), module.student.state_dict())


def test_separate_puts_the_statistics_back_when_the_student_fails():
    module = tiny_module(bn_mode="separate", samplers=[FunctionSampler(lambda inputs, draws: inputs)])
    before = copy.deepcopy(module.student.state_dict())

    def fail(network, args):
        raise RuntimeError("out of memory")

    handle = module.student.head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        module.terms(batch_of())
    handle.remove()
    assert_same(before, module.student.state_dict())
    assert all(child.track_running_stats for child in module.student.modules() if isinstance(child, nn.BatchNorm2d))


# Metrics


def test_validation_compares_with_the_labels_and_with_the_ensemble():
    module = tiny_module(temperature=4.0).eval()
    data = TinyDataModule()
    logged = tiny_trainer().validate(module, datamodule=data, verbose=False)[0]
    batches = list(data.val_dataloader())
    inputs, target = torch.cat([b.input for b in batches]), torch.cat([b.target for b in batches])
    with torch.no_grad():
        student, teachers = module.student(inputs), [network(inputs) for network in module.teachers]
    answers = [naive_probabilities(teachers, row, 1.0, None) for row in range(24)]
    kl = [naive_divergence(student[row], answers[row], 1.0) for row in range(24)]
    agreement = [max(range(3), key=lambda k, q=q: q[k]) == int(student[row].argmax()) for row, q in enumerate(answers)]
    assert logged["val/teacher_kl"] == pytest.approx(sum(kl) / 24, rel=1e-4)
    assert logged["val/agreement"] == pytest.approx(sum(agreement) / 24)
    assert logged["val/nll"] == pytest.approx(naive_label(student, target.tolist(), 24), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"match": MatchPoint(variance=0.3)}, {"output": Gaussian(2, log_var_bounds=(-0.2, 0.2))}],
)
def test_validation_of_a_regression_compares_with_the_mixture(options):
    module = tiny_module(targets=2, **options).eval()
    nn.init.normal_(module.student.head.weight)
    data = TinyDataModule(num_targets=2)
    logged = tiny_trainer().validate(module, datamodule=data, verbose=False)[0]
    batches = list(data.val_dataloader())
    inputs, target = torch.cat([b.input for b in batches]), torch.cat([b.target for b in batches])
    bounds = (-0.2, 0.2) if "output" in options else (-10, 10)
    with torch.no_grad():
        student, *teachers = (network(inputs).double() for network in (module.student, *module.teachers))
    for output in (student, *teachers):
        output[:, 2:].clamp_(*bounds)
    if "match" in options:
        student[:, 2:] = math.log(0.3)
    mixtures = [naive_collapse(teachers, row, None) for row in range(24)]
    rows = gaussians_of(student)
    kl = [naive_gaussian_divergence(*pair) for pair in zip(mixtures, rows, strict=True)]
    nll = [
        sum((math.log(v) + (y - m) ** 2 / v + math.log(2 * math.pi)) / 2 for (m, v), y in zip(row, values, strict=True))
        for row, values in zip(rows, target.tolist(), strict=True)
    ]
    error = (student[:, :2] - target).abs().mean()
    assert logged["val/teacher_kl"] == pytest.approx(sum(kl) / 24, rel=1e-4)
    assert logged["val/nll"] == pytest.approx(sum(nll) / 24, rel=1e-4)
    assert logged["val/mae"] == pytest.approx(float(error), rel=1e-4)


# Export and checkpoints


@pytest.mark.slow
def test_an_exported_student_is_a_plain_network(tmp_path):
    module = tiny_module(samplers=[GeneratorSampler(generator_of(), 3)])
    tiny_trainer().fit(module, datamodule=TinyDataModule())
    plain = TinyNet()
    weights = read_weights(module.export_student(tmp_path / "student.safetensors"))
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights, strict=True)
    inputs = batch_of().input
    with torch.no_grad():
        assert torch.equal(plain.eval()(inputs), module.eval()(inputs))


def test_a_regression_student_without_its_deviation_gives_the_trained_means():
    module = tiny_module(targets=2)
    tiny_trainer().fit(module, datamodule=TinyDataModule(num_targets=2))
    inputs = batch_of().input
    with torch.no_grad():
        means = without_deviation(module.eval().student)(inputs)
        assert torch.equal(means, module(inputs)[:, :2])
    assert means.shape == (8, 2)


def small_module(targets=None, **options):
    torch.manual_seed(0)
    outputs = {"num_targets": targets} if targets else {"num_classes": 3}
    teachers = TeacherEnsemble([SmallResNet(**outputs, width=w) for w in (2, 3)], weights=[1, 3])
    return ExtracurricularModule(SmallResNet(**outputs, width=2), teachers, input_shape=SHAPE, **outputs, **options)


class Stop(pl.callbacks.Checkpoint):
    """Saves after the first epoch and ends there."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, 2])
def test_training_goes_on_from_a_checkpoint_that_builds_the_module(tmp_path, targets, recwarn):
    options = {"label_weight": 0.1, "seed": 5, "extra_ratio": 0.5, "bn_mode": "separate"}

    def samplers():
        return [MixupSampler(0.5), GeneratorSampler(generator_of(), 3)]

    whole = small_module(targets, samplers=samplers(), **options)
    data = TinyDataModule(num_targets=targets)
    tiny_trainer(max_epochs=3).fit(whole, datamodule=data)
    first = small_module(targets, samplers=samplers(), **options)
    path = tmp_path / "xcl.ckpt"
    tiny_trainer(max_epochs=3, callbacks=[Stop(path)], enable_checkpointing=True).fit(first, datamodule=data)
    loaded = ExtracurricularModule.load_from_checkpoint(path, teachers=first.teachers.ensemble, samplers=samplers())
    assert_same(first.student.state_dict(), loaded.student.state_dict())
    tiny_trainer(max_epochs=3).fit(loaded, datamodule=data, ckpt_path=str(path))
    assert_same(whole.student.state_dict(), loaded.student.state_dict())
    assert not [warning for warning in recwarn if "samplers" in str(warning.message)]


@pytest.mark.slow
def test_a_checkpoint_keeps_every_option(tmp_path):
    options = {
        "extra_ratio": 0.5, "kl_weight": 0.7, "label_weight": 0.2, "match": MatchPoint(variance=0.3),
        "bn_mode": "separate", "seed": 9,
        "output": Gaussian(2, teacher_variance=[0.5, 2.0], log_var_bounds=(-4.0, 3.0)),
    }  # fmt: skip
    module = small_module(2, **options)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(num_targets=2))
    trainer.save_checkpoint(tmp_path / "xcl.ckpt")
    loaded = ExtracurricularModule.load_from_checkpoint(tmp_path / "xcl.ckpt", teachers=module.teachers.ensemble)
    kept = {
        "extra_ratio": loaded.samplers.ratio, "kl_weight": loaded.kl_weight, "label_weight": loaded.label_weight,
        "match": loaded.match, "bn_mode": loaded.bn_mode, "seed": loaded.samplers.seed,
        "output": dataclasses.replace(loaded.output, fixed_variance=None),
    }  # fmt: skip
    assert kept == options
    assert (loaded.output.fixed_variance, loaded.num_targets) == (0.3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("samplers", [None, [MixupSampler(0.5)], [MixupSampler(), MixupSampler()]])
def test_a_checkpoint_notices_other_samplers(tmp_path, samplers):
    module = small_module(samplers=[CutMixSampler()])
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "xcl.ckpt")
    given = {} if samplers is None else {"samplers": samplers}
    with pytest.warns(UserWarning, match="training on would follow other samplers"):
        ExtracurricularModule.load_from_checkpoint(tmp_path / "xcl.ckpt", teachers=module.teachers.ensemble, **given)


# Refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bn_mode": "apart"}, "bn_mode must be one of joint, separate, got 'apart'"),
        ({"num_targets": 2}, r"needs either num_classes \(a classifier\) or num_targets \(a regression\)"),
        ({"num_classes": None}, r"needs either num_classes \(a classifier\) or num_targets \(a regression\)"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan"),
        ({"extra_ratio": -0.5}, "extra_ratio cannot be negative, got -0.5"),
        ({"extra_ratio": math.nan}, "extra_ratio must be a finite number, got nan"),
        ({"kl_weight": -1.0}, "kl_weight and label_weight cannot be negative, nor both 0: -1.0 and 0.0"),
        ({"label_weight": math.nan}, "label_weight must be a finite number, got nan"),
        ({"kl_weight": 0.0}, "nor both 0: 0.0 and 0.0"),
        ({"output": Gaussian(2)}, r"output=Gaussian\(.*\) does not go with num_classes=3: let them agree"),
        (
            {"sampler_weights": [1.0, 2.0]},
            "sampler_weights must be 1 finite numbers, none negative and not all zero, got .1.0, 2.0.",
        ),
        ({"samplers": [], "sampler_weights": [1.0]}, "sampler_weights must be 0 finite numbers"),
        (
            {"sampler_weights": [-1.0]},
            "sampler_weights must be 1 finite numbers, none negative and not all zero, got .-1.0.",
        ),
        (
            {"sampler_weights": [0.0]},
            "sampler_weights must be 1 finite numbers, none negative and not all zero, got .0.0.",
        ),
        (
            {"samplers": [lambda inputs, draws: inputs]},
            "samplers must be modules, got function: wrap .*FunctionSampler",
        ),
        ({"input_shape": SHAPE, "num_classes": 4}, r"student \(TinyNet\) has 3 classes where num_classes=4"),
        ({"input_shape": (3, 8, 8)}, "does not take an input of shape"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        ExtracurricularModule(TinyNet(), TinyNet(), **({"num_classes": 3} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        (
            {"num_targets": 3, "input_shape": SHAPE},
            r"student \(TinyNet\) has an output of shape \(1, 4\) where num_targets=3 needs \(N, 6\)",
        ),
        (
            {"num_targets": 3, "input_shape": SHAPE, "match": MatchPoint()},
            r"student \(TinyNet\) has an output of shape",
        ),
    ],
)
def test_refusals_of_a_regression_name_what_is_wrong(options, message):
    networks = [TinyNet(None, num_targets=2) for _ in range(2)]
    with pytest.raises(InputError, match=message):
        ExtracurricularModule(*networks, **({"num_targets": 2} | options))


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_a_variance_that_is_not_positive_is_refused(variance):
    with pytest.raises(InputError, match=f"MatchPoint: variance must be positive, got {variance}"):
        MatchPoint(variance=variance)


def test_teachers_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"teacher 1 \(TinyNet\) has 5 classes where num_classes=3"):
        ExtracurricularModule(TinyNet(), [TinyNet(), TinyNet(5)], num_classes=3, input_shape=SHAPE)
    student, options = TinyNet(None, num_targets=2), {"num_targets": 2, "input_shape": SHAPE}
    with pytest.raises(InputError, match=r"teacher 0 \(TinyNet\) has an output of shape \(1, 2\).* teacher_variance"):
        ExtracurricularModule(student, TinyNet(2), **options)
    with pytest.raises(InputError, match=r"teacher 0 \(TinyNet\) has an output of shape \(1, 6\)"):
        ExtracurricularModule(
            student, TinyNet(None, num_targets=3), output=Gaussian(2, teacher_variance=1.0), **options
        )
    module = ExtracurricularModule(student, TinyNet(2), output=Gaussian(2, teacher_variance=1.0), **options)
    assert [output[0, 2:].exp().tolist() for output in module.teacher_predictions(batch_of())] == [[1, 1]]


def test_a_student_of_means_fits_where_points_are_matched():
    teacher = TinyNet(None, num_targets=2)
    options = {"num_targets": 2, "input_shape": SHAPE}
    with pytest.raises(InputError, match=r"student \(TinyNet\) has an output of shape \(1, 2\)"):
        ExtracurricularModule(TinyNet(2), teacher, **options)
    module = ExtracurricularModule(TinyNet(2), teacher, match=MatchPoint(), label_weight=0.1, **options)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(num_targets=2))
    assert torch.isfinite(trainer.callback_metrics["val/nll"])


def test_a_rule_for_probabilities_is_refused_in_regression():
    teachers = TeacherEnsemble([TinyNet(None, num_targets=1) for _ in range(2)], combine="logits")
    with pytest.raises(InputError, match="collapsed to one Gaussian: combine has no meaning there"):
        ExtracurricularModule(TinyNet(None, num_targets=1), teachers, num_targets=1).terms(batch_of(targets=1))


def test_missing_labels_are_refused_where_they_have_a_weight():
    module = tiny_module(label_weight=0.1)
    with pytest.raises(InputError, match="label_weight=0.1 needs labels, and the batch has none"):
        module.terms(batch_of().replace(target=None))


def test_a_generator_of_other_inputs_is_refused():
    generator = nn.Sequential(nn.Linear(3, 49), nn.Unflatten(1, (1, 7, 7)))
    module = tiny_module(samplers=[GeneratorSampler(generator, 3)])
    with pytest.raises(InputError, match=r"makes inputs of shape \(1, 7, 7\), the data's have \(1, 8, 8\)"):
        module.terms(batch_of())
    module = ExtracurricularModule(TwoInputs(), TwoInputs(), num_classes=3, samplers=[GeneratorSampler(generator, 3)])
    with pytest.raises(InputError, match="makes one tensor, but the batch's inputs are several"):
        module.terms(two_inputs("dict"))


# A toy with a known truth


def curve(hidden):
    return nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), GaussianHead(hidden, 1))


def learn(module, inputs, targets, steps):
    optimizer = torch.optim.Adam(module.student.parameters(), lr=1e-2)
    for step in range(steps):
        index = torch.arange(len(inputs))
        optimizer.zero_grad()
        whole_loss(module, Batch(inputs, targets, index, torch.full_like(index, step))).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_between_the_training_inputs_the_student_follows_the_teacher(seed):
    # Two stretches of x with a hole between them, where no one has ever seen a target. What the teacher says there is
    # not the truth, and the student must not be judged by that.
    torch.manual_seed(seed)
    inputs = torch.cat([torch.rand(64, 1) * 2 - 4, torch.rand(64, 1) * 2 + 2])
    noise = 0.05 + 0.1 * (inputs > 0)
    targets = inputs.sin() + noise * torch.randn_like(inputs)
    teacher = curve(64)
    learn(RegressionModule(teacher, num_targets=1), inputs, targets, 150)
    start = curve(8)
    hole = torch.linspace(-1.5, 1.5, 101)[:, None]
    divergences = {}
    for name, samplers in (("kd", [EmpiricalSampler()]), ("xcl", [MixupSampler()])):
        module = ExtracurricularModule(copy.deepcopy(start), teacher, num_targets=1, samplers=samplers)
        learn(module, inputs, None, 150)
        with torch.no_grad():
            pairs = zip(gaussians_of(teacher(hole)), gaussians_of(module.student(hole)), strict=True)
            divergences[name] = sum(naive_gaussian_divergence(*pair) for pair in pairs) / 101
    assert divergences["xcl"] < divergences["kd"] / 2


# The contract


def mixed_and_made(student, teachers, num_classes):
    return ExtracurricularModule(
        student, teachers, num_classes=num_classes, samplers=[MixupSampler(), GeneratorSampler(generator_of(), 3)],
        label_weight=0.1, temperature=2.0,
    )  # fmt: skip


def mixed_with_partners(student, teachers, num_classes):
    # Each sampler has as many rows as the batch, so none depends on its place in it.
    return ExtracurricularModule(
        student, teachers, num_classes=num_classes, samplers=[MixupSampler(), CutMixSampler()], extra_ratio=2.0
    )


mixed_with_partners.partners = True


def made(student, teachers, num_classes):
    return ExtracurricularModule(
        student, teachers, num_classes=num_classes, samplers=[GeneratorSampler(generator_of(), 3)], input_shape=SHAPE
    )


def made_regression(student, teachers, num_classes):
    return ExtracurricularModule(student, teachers, num_targets=2, samplers=[GeneratorSampler(generator_of(), 3)])


made_regression.num_targets = 2


def made_separate(student, teachers, num_classes):
    return ExtracurricularModule(
        student, TeacherEnsemble(teachers, weights=[1, 3]), num_classes=num_classes, bn_mode="separate",
        samplers=[GeneratorSampler(generator_of(), 3)],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("build", [mixed_and_made, mixed_with_partners, made, made_regression, made_separate])
@pytest.mark.parametrize("point", CONTRACT)
def test_contract(point, build):
    if (point, build) == ("two_processes_equal_one", mixed_and_made):
        pytest.skip("mixing partners come from a process's own batch")
    CONTRACT[point](build)
