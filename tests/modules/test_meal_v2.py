"""MEAL V2 against naive references, its invariances, its rates and schedules, its warnings and its refusals."""

import copy
import math
import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torchvision
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, MultiStepLR, ReduceLROnPlateau

from distill_lightning import (
    AdaptedInput,
    Batch,
    FixedDiscriminator,
    GroupSchedules,
    InputError,
    MEALV2Module,
    NoDiscriminator,
    OfficialDiscriminator,
    OneCycle,
    OwnDiscriminator,
    SmallResNet,
    TeacherEnsemble,
    torchvision_network,
)
from distill_lightning.cli import main
from distill_lightning.layers import Discriminator
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)


class Given(nn.Module):
    """Returns its own logits, whatever the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, inputs):
        return self.logits[: len(inputs)]


def draw(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def batch_of(count=4, classes=3):
    return Batch(torch.zeros(count, *SHAPE), torch.arange(count) % classes)


def given_module(student, *teachers, **options):
    """The module of networks that give these logits."""
    ensemble = TeacherEnsemble([Given(logits) for logits in teachers], **options.pop("ensemble", {}))
    defaults = {"num_classes": student.shape[1], "discriminator": FixedDiscriminator()}
    return MEALV2Module(Given(student), ensemble, **(defaults | options))


def tiny_module(seed=0, **options):
    torch.manual_seed(seed)
    teachers = [TinyNet() for _ in range(2)]
    return MEALV2Module(TinyNet(), teachers, **({"num_classes": 3, "discriminator": FixedDiscriminator()} | options))


def rectified(num_classes=3, hidden=16):
    """A discriminator of a user's own, with the official one's last ReLU, alive at the start."""
    network = nn.Sequential(nn.Linear(num_classes, hidden), nn.ReLU(), nn.Linear(hidden, 2), nn.ReLU())
    nn.init.constant_(network[2].bias, 0.3)
    return network


def naive_softmax(row, temperature=1.0):
    exponentials = [math.exp((value - max(row)) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_mean(teachers, sample, temperature, weights):
    rows = [naive_softmax(logits[sample].tolist(), temperature) for logits in teachers]
    return [sum(w * row[k] for w, row in zip(weights, rows, strict=True)) / sum(weights) for k in range(len(rows[0]))]


def naive_similarity(student, teachers, temperature, weights):
    total = 0.0
    for i in range(len(student)):
        p, q = naive_softmax(student[i].tolist(), temperature), naive_mean(teachers, i, temperature, weights)
        total -= sum(q[k] * math.log(p[k]) for k in range(len(p)))
    return temperature**2 * total / len(student)


def naive_discriminator_loss(scores):
    """Of scores ``(2 N, 2)``, the student's rows first."""
    total, rows = 0.0, scores.tolist()
    for number, row in enumerate(rows):
        target = (1, 0) if number < len(rows) / 2 else (0, 1)
        for k in (0, 1):
            probability = 1 / (1 + math.exp(-row[k]))
            total -= math.log(probability if target[k] else 1 - probability)
    return total / (2 * len(rows))


# the terms


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shown", ["logits", "probabilities", "log_probabilities"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (5, 7)])
def test_terms_equal_the_naive_reference(temperature, shown, weights, samples, classes):
    student, teachers = draw(samples, classes), [draw(samples, classes, seed=seed) for seed in (1, 2)]
    module = given_module(
        student, *teachers, temperature=temperature, discriminator=FixedDiscriminator(shown=shown, weight=0.7),
        ensemble={"weights": weights}, hard_label_weight=0.3,
    )  # fmt: skip
    batch, shares = batch_of(samples, classes), weights or [1.0, 1.0]
    terms = module.terms(batch)
    rows = {"student": [], "teacher": []}
    for i in range(samples):
        p, q = naive_softmax(student[i].tolist(), temperature), naive_mean(teachers, i, temperature, shares)
        mean = [sum(w * z[i, k].item() for w, z in zip(shares, teachers, strict=True)) / sum(shares) for k in range(classes)]  # fmt: skip  # noqa: E501
        if shown == "logits":
            p, q = student[i].tolist(), mean
        elif shown == "log_probabilities":
            p, q = [math.log(x) for x in p], [math.log(x) for x in q]
        rows["student"].append(p)
        rows["teacher"].append(q)
    scores = module.discriminator(torch.tensor(rows["student"] + rows["teacher"]))
    assert list(terms) == list(module.weights()) == ["similarity", "discriminator", "ce"]
    assert float(terms["similarity"]) == pytest.approx(
        naive_similarity(student, teachers, temperature, shares), rel=1e-5
    )
    assert float(terms["discriminator"]) == pytest.approx(naive_discriminator_loss(scores), rel=1e-5)
    ce = -sum(math.log(naive_softmax(student[i].tolist())[i % classes]) for i in range(samples)) / samples
    assert float(terms["ce"]) == pytest.approx(ce, rel=1e-5)
    assert module.weights() == {"similarity": 1.0, "discriminator": 0.7, "ce": 0.3}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((2.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.44675, 0.44675, 0.10651)),
        ((10.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.60593, 0.28808, 0.10599)),
    ],
)
def test_the_target_is_the_mean_of_the_softmaxes_and_not_the_softmax_of_the_mean(first, second, expected):
    # The gradient at a student of zero logits is 1/3 minus the target.
    module = given_module(
        torch.zeros(1, 3), torch.tensor([first]), torch.tensor([second]), discriminator=NoDiscriminator()
    )
    module.terms(batch_of(1))["similarity"].backward()
    assert (1 / 3 - module.student.logits.grad)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_similarity_is_pytorchs_cross_entropy_and_kl_with_the_same_gradient():
    student, teachers = draw(6, 5), [draw(6, 5, seed=1), draw(6, 5, seed=2)]
    module = given_module(student, *teachers, discriminator=NoDiscriminator())
    probs = (F.softmax(teachers[0], 1) + F.softmax(teachers[1], 1)) / 2
    loss = module.terms(batch_of(6))["similarity"]
    loss.backward()
    assert float(loss) == pytest.approx(float(F.cross_entropy(student, probs)), rel=1e-5)
    kl = F.kl_div(F.log_softmax(student, 1), probs, reduction="batchmean")
    entropy = -(probs * probs.log()).sum(1).mean()
    assert float(loss - entropy) == pytest.approx(float(kl), rel=1e-4)
    assert torch.allclose(module.student.logits.grad, (F.softmax(student, 1) - probs) / 6, atol=1e-7)


def test_the_similarity_is_linear_in_the_teachers_and_the_kl_is_not():
    student, teachers = draw(6, 5), [draw(6, 5, seed=seed) for seed in (1, 2, 3)]
    together = given_module(student, *teachers, discriminator=NoDiscriminator())
    similarity = float(together.terms(batch_of(6))["similarity"])
    kl = float(together._observed["kl"])
    alone = [given_module(student, logits, discriminator=NoDiscriminator()) for logits in teachers]
    parts = [float(module.terms(batch_of(6))["similarity"]) for module in alone]
    assert similarity == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert kl < 0.9 * sum(float(module._observed["kl"]) for module in alone) / 3


def test_the_order_of_two_teachers_does_not_matter_and_equal_ones_count_as_one():
    student, first, second = draw(6, 5), draw(6, 5, seed=1), draw(6, 5, seed=2)
    found = [given_module(student, *teachers).terms(batch_of(6)) for teachers in ((first, second), (second, first))]
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("similarity", "discriminator"))
    one, three = (given_module(student, *([first] * count)).terms(batch_of(6)) for count in (1, 3))
    for name in ("similarity", "discriminator"):
        assert float(one[name]) == pytest.approx(float(three[name]), rel=1e-6)


def test_a_student_equal_to_its_teacher_has_no_gradient_and_the_teachers_entropy_as_its_loss():
    logits = draw(6, 5)
    module = given_module(logits, logits, discriminator=NoDiscriminator())
    loss = module.terms(batch_of(6))["similarity"]
    loss.backward()
    assert float(module.student.logits.grad.abs().max()) < 1e-7
    entropy = -sum(p * math.log(p) for row in logits.tolist() for p in naive_softmax(row)) / 6
    assert float(loss) == pytest.approx(entropy, rel=1e-5)
    assert float(module._observed["kl"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [2.0, 50.0])
def test_a_temperature_keeps_the_size_of_the_gradient(temperature):
    student, teacher = draw(8, 5), draw(8, 5, seed=1)
    module = given_module(student, teacher, discriminator=NoDiscriminator(), temperature=temperature)
    module.terms(batch_of(8))["similarity"].backward()
    p, q = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    assert torch.allclose(module.student.logits.grad, temperature * (p - q) / 8, rtol=1e-3, atol=1e-6)


def test_an_ensemble_that_combines_logits_gives_that_target():
    module = given_module(
        torch.zeros(1, 3), torch.tensor([[2.0, 0, 0]]), torch.tensor([[0, 2.0, 0]]), discriminator=NoDiscriminator(),
        ensemble={"combine": "logits"},
    )  # fmt: skip
    module.terms(batch_of(1))["similarity"].backward()
    assert (1 / 3 - module.student.logits.grad)[0].tolist() == pytest.approx((0.42232, 0.42232, 0.15536), abs=1e-5)


# the labels


@pytest.mark.slow
def test_without_hard_labels_the_labels_are_never_looked_at():
    states = []
    for labels in ("right", "permuted", "unusable"):
        module = tiny_module(input_shape=SHAPE)
        data = TinyDataModule()
        data.setup()
        train = data._splits["train"]
        targets = train.targets.clone()
        if labels != "right":
            targets = targets.flip(0) if labels == "permuted" else torch.full_like(targets, 99)
        data._splits["train"] = train._replace(targets=targets)
        tiny_trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
        states.append(module.state_dict())
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_hard_labels_are_one_more_term_of_the_loss():
    student, teacher = draw(6, 3), draw(6, 3, seed=1)
    gradients = []
    for weight in (0.0, 0.5):
        module = given_module(student, teacher, discriminator=NoDiscriminator(), hard_label_weight=weight)
        terms, weights = module.terms(batch_of(6)), module.weights()
        sum(weights[name] * term for name, term in terms.items()).backward()
        gradients.append(module.student.logits.grad)
    labels = (F.softmax(student, 1) - F.one_hot(torch.arange(6) % 3)) / 6
    assert torch.allclose(gradients[1] - gradients[0], 0.5 * labels, atol=1e-6)


# the discriminator


@pytest.mark.parametrize("shown", ["logits", "probabilities", "log_probabilities"])
def test_the_discriminator_is_shown_both_at_once_the_student_first(shown):
    student, teachers = draw(4, 5), [draw(4, 5, seed=1), draw(4, 5, seed=2)]
    module = given_module(student, *teachers, discriminator=FixedDiscriminator(shown=shown))
    seen = []
    module.discriminator.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0], output)))
    module.terms(batch_of(4, 5))
    assert len(seen) == 1
    rows, scores = seen[0]
    probs = (F.softmax(teachers[0], 1) + F.softmax(teachers[1], 1)) / 2
    expected = {
        "logits": (student, (teachers[0] + teachers[1]) / 2),
        "probabilities": (F.softmax(student, 1), probs),
        "log_probabilities": (F.log_softmax(student, 1), probs.log()),
    }[shown]
    assert rows.shape == (8, 5)
    assert scores.shape == (8, 2)
    assert torch.allclose(rows[:4], expected[0], atol=1e-6)
    assert torch.allclose(rows[4:], expected[1], atol=1e-6)
    assert not module.teachers[0].logits.requires_grad


def gradients_of(mode, seed=0):
    torch.manual_seed(seed)
    module = given_module(draw(6, 5), draw(6, 5, seed=1), discriminator=OwnDiscriminator(rectified(5), mode=mode))
    module.terms(batch_of(6))["discriminator"].backward()
    return module, module.student.logits.grad, [parameter.grad for parameter in module.discriminator.parameters()]


def test_modes_differ_in_the_students_gradient_alone():
    _, together, discriminator = gradients_of("cooperative")
    _, against, same = gradients_of("adversarial")
    _, detached, too = gradients_of("detached")
    assert float(together.abs().max()) > 0
    assert torch.equal(against, -together)
    assert detached is None
    for first, second, third in zip(discriminator, same, too, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.parametrize(("mode", "falls"), [("cooperative", True), ("adversarial", False)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_of_the_student_lowers_the_loss_where_they_work_together_and_raises_it_otherwise(mode, falls, seed):
    module, gradient, _ = gradients_of(mode, seed)
    before = float(module.terms(batch_of(6))["discriminator"])
    with torch.no_grad():
        module.student.logits -= 0.1 * gradient / gradient.norm()
    after = float(module.terms(batch_of(6))["discriminator"])
    assert (after < before) == falls


class Dropping(TinyNet):
    """Draws random numbers in training."""

    def forward(self, images):
        return F.dropout(super().forward(images), 0.3, self.training)


def fitted_student(**options):
    torch.manual_seed(3)
    teachers = [TinyNet(), TinyNet()]
    torch.manual_seed(4)
    module = MEALV2Module(Dropping(), teachers, num_classes=3, **options)
    tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule())
    return module


@pytest.mark.slow
def test_without_a_discriminator_and_with_one_that_only_watches_the_student_is_the_same_bit_for_bit():
    detached = partial(FixedDiscriminator, mode="detached")
    modules = {
        "none": fitted_student(discriminator=NoDiscriminator()),
        "detached": fitted_student(discriminator=detached()),
        "detached, rate": fitted_student(discriminator=detached(lr=1.0)),
    }
    reference = modules["none"].student.state_dict()
    for name, module in modules.items():
        assert (module.discriminator is None) == (not name.startswith("detached"))
        for key, value in module.student.state_dict().items():
            assert torch.equal(value, reference[key]), f"{name}: {key}"
    together = fitted_student(discriminator=FixedDiscriminator()).student.state_dict()
    assert not torch.equal(together["head.weight"], reference["head.weight"])


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63])
def test_making_a_discriminator_leaves_the_random_state_alone_and_follows_the_seed(seed):
    torch.manual_seed(seed)
    student, teacher = TinyNet(), TinyNet()
    state = torch.get_rng_state()
    first, second = (
        MEALV2Module(student, teacher, num_classes=3, discriminator=FixedDiscriminator()) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.initial_seed() == seed % 2**64
    weights = first.discriminator.layers[0].weight
    assert torch.equal(weights, second.discriminator.layers[0].weight)
    torch.manual_seed(17)
    other = MEALV2Module(student, teacher, num_classes=3, discriminator=FixedDiscriminator())
    assert not torch.equal(weights, other.discriminator.layers[0].weight)


def test_the_kinds_are_those_of_the_layer():
    assert (
        given_module(draw(2, 300), draw(2, 300), discriminator=OfficialDiscriminator()).discriminator.kind == "official"
    )
    with pytest.warns(
        UserWarning, match=r"kind='fixed' \(FixedDiscriminator\(\) in MEALV2Module\) has neither problem"
    ):
        default = MEALV2Module(TinyNet(), TinyNet(), num_classes=3)
    assert default.discriminator.kind == "official"
    own = rectified()
    assert tiny_module(discriminator=OwnDiscriminator(own)).discriminator is own


# what is observed


def test_observed_values_are_those_counted_by_hand():
    student, teachers = draw(6, 5), [draw(6, 5, seed=1), draw(6, 5, seed=2)]
    module = given_module(student, *teachers, discriminator=OwnDiscriminator(rectified(5)), temperature=2.0)
    scores = []
    module.discriminator.register_forward_hook(lambda _m, _i, output: scores.extend(output.tolist()))
    module.terms(batch_of(6))
    right = dead = agree = entropy = 0.0
    for number, row in enumerate(scores):
        own, other = row if number < 6 else row[::-1]
        right += 1.0 if own > other else 0.5 if own == other else 0.0
        dead += row.count(0.0)
    for i in range(6):
        target = naive_mean(teachers, i, 2.0, [1, 1])
        agree += target.index(max(target)) == int(student[i].argmax())
        entropy -= sum(p * math.log(p) for p in target)
    kl = naive_similarity(student, teachers, 2.0, [1, 1]) - 4 * entropy / 6
    expected = {
        "discriminator_accuracy": right / 12, "discriminator_dead": dead / 24, "agreement": agree / 6,
        "teacher_entropy": entropy / 6, "kl": kl,
    }  # fmt: skip
    found = {name: float(value) for name, value in module._observed.items()}
    assert 0 < expected["discriminator_dead"] < 1
    assert 0 < expected["agreement"] < 1
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_dead_discriminator_is_at_chance_and_a_perfect_one_right():
    for weight, accuracy, dead, loss in ((0.0, 0.5, 1.0, math.log(2)), (100.0, 1.0, 0.5, math.log(2) / 2)):
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[weight, 0, 0], [0, weight, 0]]))
            layer.bias.zero_()
        module = given_module(
            torch.tensor([[9.0, -1, 0]] * 4), torch.tensor([[-1.0, 9, 0]] * 4),
            discriminator=OwnDiscriminator(nn.Sequential(layer, nn.ReLU())),
        )  # fmt: skip
        assert float(module.terms(batch_of(4))["discriminator"]) == pytest.approx(loss, rel=1e-6)
        assert float(module._observed["discriminator_accuracy"]) == accuracy
        assert float(module._observed["discriminator_dead"]) == dead


@pytest.mark.slow
def test_a_training_logs_what_it_promises():
    names = {"similarity", "kl", "teacher_entropy", "agreement", "loss"}
    watched = {"discriminator", "discriminator_accuracy"}
    for options, expected in (
        ({"discriminator": NoDiscriminator()}, names),
        ({}, names | watched),
        ({"discriminator": OwnDiscriminator(rectified())}, names | watched | {"discriminator_dead"}),
        ({"hard_label_weight": 1.0}, names | watched | {"ce"}),
    ):
        trainer = tiny_trainer()
        trainer.fit(tiny_module(seed=2, **options), datamodule=TinyDataModule())
        logged = {name.removeprefix("train/") for name in trainer.callback_metrics if name.startswith("train/")}
        assert {name for name in logged if not name.endswith("_share")} == expected
        assert float(trainer.callback_metrics["train/kl"]) == pytest.approx(
            float(trainer.callback_metrics["train/similarity"] - trainer.callback_metrics["train/teacher_entropy"]),
            abs=1e-5,
        )


# warnings


def meal_warnings(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "MEALV2Module" in str(warning.message)]


class Kill(pl.Callback):
    """Lets outputs of the discriminator die before an epoch."""

    def __init__(self, epoch, *columns):
        self.epoch, self.columns = epoch, list(columns)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            with torch.no_grad():
                pl_module.discriminator[2].bias[self.columns] = -1000.0
                pl_module.discriminator[2].weight[self.columns] = 0.0


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(
    ("columns", "name"), [((0,), "for 'student' was"), ((1,), "'teacher' was"), ((0, 1), "'student' and 'teacher' was")]
)
def test_a_dead_discriminator_is_told_once_after_the_epoch_it_died_in(epoch, columns, name):
    module = tiny_module(seed=2, discriminator=OwnDiscriminator(rectified()))
    ends = []

    class Epochs(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            ends.append(pl_module.liveness._has_warned)

    trainer = tiny_trainer(max_epochs=4, callbacks=[Kill(epoch, *columns), Epochs()])
    found = meal_warnings(lambda: trainer.fit(module, datamodule=TinyDataModule()))
    assert len(found) == 1
    assert name in found[0]
    assert "use FixedDiscriminator()" in found[0]
    assert ends == [number > epoch for number in range(4)]


def test_an_output_that_is_zero_for_all_rows_but_one_is_not_dead():
    module = tiny_module(seed=2, discriminator=OwnDiscriminator(rectified()))
    rows = []

    def almost(_module, _inputs, output):
        rows.append(len(output))
        output = output.clone()
        output[1 if len(rows) == 1 else 0 :, 1] = 0.0
        output[:, 0] = 1.0
        if len(rows) == 1:
            output[0, 1] = 1.0
        return output

    module.discriminator.register_forward_hook(almost)
    trainer = tiny_trainer(max_epochs=1)
    assert meal_warnings(lambda: trainer.fit(module, datamodule=TinyDataModule())) == []
    assert rows == [16, 16, 16]


@pytest.mark.slow
def test_living_and_fixed_discriminators_are_not_warned_about():
    for discriminator in (OwnDiscriminator(rectified()), FixedDiscriminator(), NoDiscriminator()):
        module = tiny_module(seed=2, discriminator=discriminator)
        trainer = tiny_trainer(max_epochs=2)
        assert meal_warnings(lambda: trainer.fit(module, datamodule=TinyDataModule())) == []  # noqa: B023


def hinted(*, student_scale=0.0, teacher_scale=60.0, first_epoch=0, **options):
    """What is said of a student whose logits, and under a teacher whose logits, are scaled."""
    torch.manual_seed(1)
    student, teacher = TinyNet(), TinyNet()
    with torch.no_grad():
        for network, scale in ((student, student_scale), (teacher, teacher_scale)):
            network.head.weight *= scale
            network.head.bias.zero_()
    module = MEALV2Module(student, teacher, num_classes=3, discriminator=NoDiscriminator(), **options)
    trainer = tiny_trainer(max_epochs=first_epoch + 2)
    trainer.fit_loop.epoch_progress.current.processed = trainer.fit_loop.epoch_progress.current.completed = first_epoch
    found = meal_warnings(lambda: trainer.fit(module, datamodule=TinyDataModule()))
    return found, module


def test_a_student_that_looks_untrained_is_hinted_at_once():
    found, _ = hinted()
    assert len(found) == 1
    assert "begins with pretrained weights (distill_lightning.Pretrained)" in found[0]
    assert "(1.00 ln K)" in found[0]


@pytest.mark.slow
def test_the_hint_is_silent_with_labels_unsure_teachers_a_better_or_worse_student_and_later():
    assert hinted(hard_label_weight=0.5)[0] == []
    assert hinted(teacher_scale=1.0)[0] == []
    assert hinted(student_scale=60.0)[0] == []
    assert hinted(first_epoch=1)[0] == []


# learning rates


class Rates(pl.Callback):
    """Compares every step of the discriminator with its gradient; notes the groups' rates by epoch."""

    def __init__(self):
        self.rates, self.steps = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer, *_):
        self.before = [
            (parameter, parameter.detach().clone(), parameter.grad.clone())
            for network in (pl_module.discriminator, pl_module.student)
            for parameter in network.parameters()
        ]

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append([(old - new.detach(), gradient) for new, old, gradient in self.before])


def trained_rates(epochs, **options):
    module, rates = tiny_module(optimizer=partial(SGD, lr=0.01), **options), Rates()
    trainer = tiny_trainer(max_epochs=epochs, callbacks=[rates])
    trainer.fit(module, datamodule=TinyDataModule())
    return module, trainer, rates


@pytest.mark.slow
@pytest.mark.parametrize(("own", "expected"), [(None, [0.01, 0.001]), (1e-4, [1e-4, 1e-4]), (0.5, [0.5, 0.5])])
def test_the_discriminators_effective_rate_is_its_own_also_after_the_schedules_step(own, expected):
    module, _, rates = trained_rates(
        2, discriminator=FixedDiscriminator(lr=own), lr_scheduler=partial(MultiStepLR, milestones=[1])
    )
    theirs = len(list(module.discriminator.parameters()))
    assert len(rates.steps) == 6
    for number, step in enumerate(rates.steps):
        epoch = number // 3
        for place, (change, gradient) in enumerate(step):
            rate = expected[epoch] if place < theirs else (0.01, 0.001)[epoch]
            assert torch.allclose(change, rate * gradient, rtol=1e-3, atol=1e-7)
        assert max(float(gradient.abs().max()) for _, gradient in step[:theirs]) > 1e-3


def test_the_groups_hold_every_parameter_once():
    one = tiny_module(discriminator=FixedDiscriminator(lr=None)).parameter_groups()
    two = tiny_module(discriminator=FixedDiscriminator(lr=0.3)).parameter_groups()
    assert (len(one), len(two)) == (1, 2)
    assert "lr" not in two[0]
    assert two[1]["lr"] == 0.3
    module = tiny_module(discriminator=FixedDiscriminator(lr=0.3))
    first, second = (group["params"] for group in module.parameter_groups())
    assert [id(p) for p in first] == [id(p) for p in module.student.parameters()]
    assert [id(p) for p in second] == [id(p) for p in module.discriminator.parameters()]
    scheduled = tiny_module(
        discriminator=FixedDiscriminator(lr_scheduler=partial(ExponentialLR, gamma=0.5))
    ).parameter_groups()
    assert len(scheduled) == 2
    assert "lr" not in scheduled[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"discriminator": FixedDiscriminator(lr=0.5)}, [(0.01, 0.5)] * 3),
        (
            {"discriminator": FixedDiscriminator(lr=0.5, lr_scheduler=partial(ExponentialLR, gamma=0.1))},
            [(0.01, 0.5), (0.01, 0.05), (0.01, 0.005)],
        ),
        (
            {
                "lr_scheduler": partial(MultiStepLR, milestones=[2]),
                "discriminator": FixedDiscriminator(lr_scheduler=partial(ExponentialLR, gamma=0.5)),
            },
            [(0.01, 0.01), (0.01, 0.005), (0.001, 0.0025)],
        ),
        ({"lr_scheduler": partial(MultiStepLR, milestones=[1])}, [(0.01,), (0.001,), (0.001,)]),
    ],
)
def test_rates_and_schedules_by_epoch(options, expected):
    _, _, rates = trained_rates(3, **options)
    for found, wanted in zip(rates.rates, expected, strict=True):
        assert found == pytest.approx(wanted)


@pytest.mark.slow
def test_the_published_schedule_has_101_epochs_at_the_first_rate():
    module = tiny_module(
        optimizer=partial(SGD, lr=0.01, momentum=0.9, weight_decay=0.0),
        lr_scheduler=partial(MultiStepLR, milestones=[101], gamma=0.1),
    )
    rates = Rates()
    trainer = tiny_trainer(max_epochs=103, limit_train_batches=1, limit_val_batches=0, callbacks=[rates])
    trainer.fit(module, datamodule=TinyDataModule(samples=3))
    by_epoch = [rate for (rate,) in rates.rates]
    assert by_epoch[0] == by_epoch[100] == 0.01
    assert by_epoch[101] == pytest.approx(0.001)
    assert by_epoch.count(0.01) == 101


def test_two_one_cycles_get_the_length_of_the_training_and_step_with_every_batch():
    own = FixedDiscriminator(lr=0.5, lr_scheduler=partial(OneCycle, warmup=0.0, end=0.1))
    _, trainer, _ = trained_rates(2, discriminator=own, lr_scheduler=OneCycle)
    config = trainer.lr_scheduler_configs[0]
    assert isinstance(config.scheduler, GroupSchedules)
    assert config.interval == "step"
    assert [schedule.total_steps for schedule in config.scheduler.schedules] == [6, 6]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.01 * 1e-4, 0.5 * 0.1])


def test_one_cycle_for_the_student_leaves_a_constant_rate_alone():
    _, trainer, rates = trained_rates(2, discriminator=FixedDiscriminator(lr=0.5), lr_scheduler=OneCycle)
    assert trainer.lr_scheduler_configs[0].scheduler.schedules[0].total_steps == 6
    assert [second for _, second in rates.rates] == [0.5, 0.5]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 1e-4)


def test_one_cycle_beside_an_epoch_wise_schedule_is_refused_before_and_in_training():
    own = FixedDiscriminator(lr_scheduler=partial(ExponentialLR, gamma=0.5))
    module = tiny_module(lr_scheduler=OneCycle, discriminator=own)
    with pytest.raises(InputError, match="OneCycle and ExponentialLR cannot be stepped together"):
        check_optimizer(module)
    with pytest.raises(InputError, match="make both OneCycle, or none"):
        tiny_trainer().fit(module, datamodule=TinyDataModule())


def test_plateau_watches_the_validation_nll_beside_a_constant_rate():
    plateau = partial(ReduceLROnPlateau, patience=0, factor=0.5, threshold=1e3, threshold_mode="abs")
    _, trainer, rates = trained_rates(3, discriminator=FixedDiscriminator(lr=0.5), lr_scheduler=plateau)
    assert trainer.lr_scheduler_configs[0].monitor == "val/nll"
    assert rates.rates == [pytest.approx([0.01, 0.5]), pytest.approx([0.01, 0.5]), pytest.approx([0.005, 0.5])]


# checkpoints


def halving(optimizer):
    return LambdaLR(optimizer, lambda epoch: 0.5**epoch)


@pytest.mark.slow
def test_a_resumed_run_has_the_discriminator_its_momenta_and_both_rates(tmp_path):
    options = {
        "discriminator": FixedDiscriminator(lr=0.02, lr_scheduler=halving),
        "lr_scheduler": partial(MultiStepLR, milestones=[1, 3], gamma=0.5), "optimizer": partial(Adam, lr=0.01),
    }  # fmt: skip
    whole, part, resumed = tiny_module(**options), tiny_module(**options), tiny_module(seed=9, **options)
    resumed.teachers.ensemble.load_state_dict(whole.teachers.ensemble.state_dict())
    trainers = [tiny_trainer(max_epochs=epochs) for epochs in (4, 2, 4)]
    trainers[0].fit(whole, datamodule=TinyDataModule())
    trainers[1].fit(part, datamodule=TinyDataModule())
    trainers[1].save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert {name for name in kept["state_dict"] if not name.startswith("student.")} == {
        f"discriminator.{name}" for name in whole.discriminator.state_dict()
    }
    trainers[2].fit(resumed, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "half.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    first, second = (trainer.optimizers[0].state_dict() for trainer in (trainers[0], trainers[2]))
    assert [group["lr"] for group in first["param_groups"]] == [group["lr"] for group in second["param_groups"]]
    assert [group["lr"] for group in first["param_groups"]] == pytest.approx([0.01 / 4, 0.02 / 16])
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert all(torch.equal(value, second["state"][key][name]) for name, value in state.items())


@pytest.mark.slow
def test_a_checkpoint_rebuilds_the_module_with_adapted_teachers_alone(tmp_path):
    teachers = TeacherEnsemble(
        [SmallResNet(3, width=2), AdaptedInput(SmallResNet(3, width=2), size=(12, 12), mean=0.3, std=0.5)],
        weights=[1, 2],
    )
    module = MEALV2Module(
        SmallResNet(3, width=2), teachers, num_classes=3,
        discriminator=FixedDiscriminator(lr=0.25, mode="adversarial"), hard_label_weight=0.5, input_shape=SHAPE,
    )  # fmt: skip
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "meal.ckpt")
    with pytest.warns(UserWarning, match="teachers: the weights are not those"):
        loaded = MEALV2Module.load_from_checkpoint(tmp_path / "meal.ckpt")
    assert (loaded.adversary, loaded.hard_label_weight) == (FixedDiscriminator(lr=0.25, mode="adversarial"), 0.5)
    assert isinstance(loaded.discriminator, Discriminator)
    for network in ("student", "discriminator"):
        state = getattr(loaded, network).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in getattr(module, network).state_dict().items())
    adapted = loaded.teachers[1]
    assert (adapted.size, float(adapted.scale), float(adapted.shift)) == ((12, 12), 2.0, pytest.approx(-0.6))


def test_an_own_discriminator_must_be_given_again(tmp_path):
    module = MEALV2Module(
        SmallResNet(3, width=2),
        SmallResNet(3, width=2),
        num_classes=3,
        discriminator=OwnDiscriminator(rectified()),
        hard_label_weight=1,
    )
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "meal.ckpt")
    loaded = MEALV2Module.load_from_checkpoint(
        tmp_path / "meal.ckpt", teachers=module.teachers.ensemble, discriminator=OwnDiscriminator(rectified())
    )
    assert torch.equal(loaded.discriminator[0].weight, module.discriminator[0].weight)
    with pytest.raises(InputError, match="another architecture than MEALV2Module: it .*'discriminator"):
        MEALV2Module.load_from_checkpoint(
            tmp_path / "meal.ckpt", teachers=module.teachers.ensemble, discriminator=FixedDiscriminator()
        )


def test_the_exported_student_loads_into_a_bare_network_of_torchvision(tmp_path):
    network = torchvision_network("mobilenet_v3_small", num_classes=3)
    module = MEALV2Module(network, TinyNet(in_channels=3), num_classes=3, discriminator=FixedDiscriminator())
    bare = torchvision.models.mobilenet_v3_small(num_classes=3)
    bare.load_state_dict(load_file(module.export_student(tmp_path / "student.safetensors")), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(bare.eval()(images), module.eval()(images))


# mixed images, precision, edges


def test_teachers_see_the_mixed_images_and_no_share_enters_the_loss():
    module = tiny_module()
    seen = []
    for network in (module.student, *module.teachers):
        network.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    images = torch.rand(6, *SHAPE)
    mixed = images.clone()
    mixed[:, :, 2:5, 1:6] = images.flip(0)[:, :, 2:5, 1:6]
    results = [module.eval().terms(Batch(mixed, targets)) for targets in (torch.arange(6) % 3, torch.zeros(6).long())]
    assert len(seen) == 6
    assert all(inputs is mixed for inputs in seen)
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_teachers_in_bfloat16_are_close_to_those_in_float32():
    logits = [draw(500, 10, seed=seed, scale=4.0) for seed in (1, 2)]
    student = draw(500, 10)
    wide, narrow = (
        given_module(student, *(each.to(dtype) for each in logits)) for dtype in (torch.float32, torch.bfloat16)
    )
    inputs = torch.zeros(500, *SHAPE)
    first, second = (module.teachers.ensemble.probabilities(inputs) for module in (wide, narrow))
    assert second.dtype == torch.float32
    assert 0 < float((first - second).abs().max()) < 0.03
    assert float((first.argmax(1) == second.argmax(1)).float().mean()) > 0.99
    terms = [module.terms(Batch(inputs, torch.zeros(500).long())) for module in (wide, narrow)]
    for name in ("similarity", "discriminator"):
        assert float(terms[1][name]) == pytest.approx(float(terms[0][name]), rel=0.01)


@pytest.mark.parametrize("shown", ["logits", "probabilities", "log_probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(shown, dtype):
    narrow = [draw(6, 5, seed=seed).to(dtype) for seed in range(4)]
    options = {"temperature": 3.0, "discriminator": FixedDiscriminator(shown=shown), "ensemble": {"weights": [1, 2, 3]}}
    found = given_module(*narrow, **options).terms(batch_of(6))
    wide = given_module(*(logits.float() for logits in narrow), **options).terms(batch_of(6))
    for name, term in found.items():
        assert float(term) == pytest.approx(float(wide[name]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shown", ["logits", "probabilities", "log_probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_extreme_logits_of_any_precision_stay_finite(shown, dtype, scale):
    student, teacher = (draw(4, 2, seed=seed).sign().to(dtype) * scale for seed in (0, 1))
    module = given_module(student, teacher, discriminator=FixedDiscriminator(shown=shown), hard_label_weight=1.0)
    terms = module.terms(batch_of(4, 2))
    terms["similarity"].backward(retain_graph=True)
    terms["discriminator"].backward()
    assert terms["similarity"].dtype == terms["discriminator"].dtype == torch.float32
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(value) for value in module._observed.values())
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.lightning(since=(2, 1))
def test_weights_in_bfloat16_train():
    module = tiny_module(discriminator=FixedDiscriminator(shown="probabilities", lr=0.01))
    trainer = tiny_trainer(precision="bf16-true")
    trainer.fit(module, datamodule=TinyDataModule())
    assert module.discriminator.layers[0].weight.dtype == torch.bfloat16
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.slow
def test_a_student_learns_from_its_teachers_alone():
    torch.manual_seed(0)
    teacher = TinyNet()
    data = TinyDataModule(samples=60)
    data.setup()
    images, targets, *_ = data.dataset("train").__getitems__(list(range(60)))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), targets).backward()
        optimizer.step()
    module = MEALV2Module(
        TinyNet(), [teacher, copy.deepcopy(teacher)], num_classes=3, discriminator=FixedDiscriminator(lr=0.01),
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
    )  # fmt: skip
    trainer = tiny_trainer(max_epochs=12)
    said = meal_warnings(lambda: trainer.fit(module, datamodule=data))
    assert trainer.callback_metrics["val/accuracy"] > 0.85
    assert trainer.callback_metrics["train/agreement"] > 0.6
    # The teachers are sure and the student began with random weights.
    assert len(said) == 1


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"discriminator": OwnDiscriminator(nn.Linear(3, 1))},
            r"discriminator \(Linear\) makes \(1, 1\) of one row of logits: it must give two",
        ),
        (
            {"discriminator": OwnDiscriminator(nn.Linear(4, 2))},
            r"discriminator \(Linear\) does not take rows of 3 logits",
        ),
        ({"hard_label_weight": -0.5}, "hard_label_weight cannot be negative, got -0.5"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"num_classes": 4, "input_shape": SHAPE}, r"student \(TinyNet\) has 3 classes where num_classes=4"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        tiny_module(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shown": "probs"}, "shown must be one of logits, .*, got 'probs'"),
        ({"mode": "against"}, "mode must be one of cooperative, .*, got 'against'"),
        ({"weight": -1.0}, r"weight must be positive, got -1.0: NoDiscriminator\(\) has none"),
        ({"weight": 0.0}, "weight must be positive, got 0.0"),
        ({"weight": math.nan}, "weight must be a finite number, got nan"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
    ],
)
@pytest.mark.parametrize(
    "kind", [OfficialDiscriminator, FixedDiscriminator, partial(OwnDiscriminator, nn.Linear(3, 2))]
)
def test_options_of_a_discriminator_out_of_range_are_refused(kind, options, message):
    name = getattr(kind, "func", kind).__name__
    with pytest.raises(InputError, match=f"{name}: {message}"):
        kind(**options)


def test_a_teacher_with_other_classes_is_named():
    with pytest.raises(InputError, match=r"teacher 1 \(TinyNet\) has 5 classes where num_classes=3"):
        MEALV2Module(
            TinyNet(), [TinyNet(), TinyNet(5)], num_classes=3, discriminator=FixedDiscriminator(), input_shape=SHAPE
        )


# the command line


TEACHER = {
    "class_path": "distill_lightning.AdaptedInput",
    "init_args": {
        "network": {
            "class_path": "distill_lightning.Pretrained",
            "init_args": {
                "network": {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}},
                "checkpoint": "teacher.safetensors",
            },
        },
        "size": [12, 12],
        "mean": 0.5,
        "std": [0.5],
        "source_mean": 0.3,
        "source_std": 0.4,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "discriminator",
    [
        {"discriminator": "NoDiscriminator"},
        {
            "discriminator": {
                "class_path": "FixedDiscriminator",
                "init_args": {
                    "lr": 1e-4,
                    "lr_scheduler": {
                        "class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}
                    },
                },
            },
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.MultiStepLR", "init_args": {"milestones": [1]}},
        },
        {
            "discriminator": {
                "class_path": "OwnDiscriminator",
                "init_args": {
                    "network": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 10, "out_features": 2}},
                    "mode": "adversarial",
                    "lr_scheduler": {"class_path": "OneCycle"},
                },
            },
        },
    ],
)  # fmt: skip
def test_every_kind_of_discriminator_can_be_written_in_yaml(discriminator, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(SmallResNet(10, width=2).state_dict(), "teacher.safetensors")
    options = {
        "student": {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}},
        "teachers": [TEACHER],
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
    }
    config = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        "model": {"class_path": "MEALV2Module", "init_args": options | discriminator},
        "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 64, "val_size": 40, "test_size": 40}},
    }
    (tmp_path / "meal.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "meal.yaml"]) == 0, capsys.readouterr().err


# the contract


def cooperative(student, teachers, num_classes):
    return MEALV2Module(
        student, TeacherEnsemble(teachers, weights=[1, 3]), num_classes=num_classes,
        discriminator=FixedDiscriminator(lr=0.02, lr_scheduler=halving),
        lr_scheduler=partial(MultiStepLR, milestones=[1]), input_shape=SHAPE,
    )  # fmt: skip


def adversarial(student, teachers, num_classes):
    return MEALV2Module(
        student, teachers, num_classes=num_classes,
        discriminator=OwnDiscriminator(rectified(num_classes), mode="adversarial", weight=0.5), hard_label_weight=0.5,
    )  # fmt: skip


def detached(student, teachers, num_classes):
    return MEALV2Module(
        student, teachers, num_classes=num_classes, temperature=2.0,
        discriminator=FixedDiscriminator(mode="detached", shown="log_probabilities"),
    )  # fmt: skip


def without(student, teachers, num_classes):
    return MEALV2Module(student, teachers, num_classes=num_classes, discriminator=NoDiscriminator())


@pytest.mark.slow
@pytest.mark.parametrize("build", [cooperative, adversarial, detached, without])
@pytest.mark.parametrize("point", [point for point in CONTRACT if point != "two_processes_equal_one"])
def test_contract(point, build):
    CONTRACT[point](build)


@pytest.mark.slow
@pytest.mark.parametrize("build", [cooperative, adversarial, detached])
def test_two_processes_equal_one(build):
    CONTRACT["two_processes_equal_one"](build)
