"""What does not count: its contents move no term, no observed value and no gradient, and the rest is as without it."""

import copy
import math

import pytest
import torch
from torch import nn

from distill_lightning import (
    AttentionDistance,
    Batch,
    CompressionBaseline,
    FactorDistance,
    FEEDModule,
    FixedDiscriminator,
    HintDistance,
    InputError,
    KDModule,
    LogitTerm,
    MEALV2Module,
    NoTranslator,
    OfficialDiscriminator,
    OwnDiscriminator,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.functional import discriminator_loss
from distill_lightning.testing import TinyNet

# The official discriminator has few rows for three classes, which is no matter here.
pytestmark = pytest.mark.filterwarnings("ignore:Discriminator. with 3 classes")

SHAPE = (1, 8, 8)
COUNTED = torch.tensor([True, False, True, True, False])


def networks():
    torch.manual_seed(0)
    student, *teachers = [TinyNet().eval() for _ in range(3)]
    return student, teachers


def feed(**options):
    student, teachers = networks()
    torch.manual_seed(1)
    return FEEDModule(student, teachers, num_classes=3, student_layer="features", input_shape=SHAPE, **options)


def meal(**options):
    student, teachers = networks()
    torch.manual_seed(1)
    return MEALV2Module(student, teachers, num_classes=3, hard_label_weight=0.5, **options)


def kd():
    student, teachers = networks()
    return KDModule(student, teachers, num_classes=3)


METHODS = {
    "kd": kd,
    "feed": lambda: feed(logit_term=LogitTerm()),
    "feed_p2_sum": lambda: feed(distance=FactorDistance(p=2, reduction="sum")),
    "feed_channel": lambda: feed(distance=FactorDistance(normalize="channel", translator=NoTranslator())),
    "hint": lambda: feed(distance=HintDistance()),
    "attention": lambda: feed(distance=AttentionDistance()),
    "meal_fixed": lambda: meal(discriminator=FixedDiscriminator(mode="adversarial", shown="probabilities")),
    "meal_relu": lambda: meal(discriminator=OwnDiscriminator(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))),
    "meal_official": lambda: meal(discriminator=OfficialDiscriminator(shown="log_probabilities")),
}


def batch_of(fill):
    """Five samples, of which two do not count and hold whatever ``fill`` says."""
    generator = torch.Generator().manual_seed(0)
    images, target = torch.rand(5, *SHAPE, generator=generator), torch.arange(5) % 3
    images[~COUNTED] = fill
    return Batch(images, target, counted=COUNTED)


def evaluated(module, batch):
    """Terms, observed values, and the gradient of the weighted sum, without BatchNorm's dependence on the batch."""
    module.eval()
    module._observed = {}
    terms, weights = module.terms(batch), module.weights()
    module.zero_grad()
    sum(weights[name] * term for name, term in terms.items()).backward()
    values = {name: float(value) for name, value in {**terms, **module._observed}.items()}
    return values, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_is_as_if_the_sample_were_not_there(method):
    module = METHODS[method]()
    batch = batch_of(0.5)
    values, gradients = evaluated(module, batch)
    alone, gradients_alone = evaluated(module, Batch(batch.input[COUNTED], batch.target[COUNTED]))
    assert values == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert gradients.keys() == gradients_alone.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fill", [-30.0, 0.0, 50.0])
def test_its_contents_move_nothing(method, fill):
    module = METHODS[method]()
    values, gradients = evaluated(module, batch_of(0.5))
    others, other_gradients = evaluated(module, batch_of(fill))
    assert values == others
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_nothing_that_counts_has_finite_terms_and_no_gradient(method):
    module = METHODS[method]()
    batch = batch_of(0.5)
    values, gradients = evaluated(module, batch.replace(counted=torch.zeros(5, dtype=torch.bool)))
    assert all(math.isfinite(value) for value in values.values())
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


def test_the_discriminators_loss_is_that_of_the_rows_that_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 2), torch.randn(5, 2)
    expected = 0.0
    for row in (0, 2, 3):
        for score, sign in ((student[row, 0], 1), (student[row, 1], -1), (teacher[row, 0], -1), (teacher[row, 1], 1)):
            expected += math.log1p(math.exp(-sign * float(score))) / 12
    assert float(discriminator_loss(student, teacher, COUNTED)) == pytest.approx(expected, rel=1e-5)
    everything = discriminator_loss(student, teacher, torch.ones(5) > 0)
    torch.testing.assert_close(everything, discriminator_loss(student, teacher))


def baseline(weight):
    student, teachers = networks()
    return CompressionBaseline(student, num_classes=3, teacher=TeacherEnsemble(teachers), hard_label_weight=weight)


def weighted_kd(weight):
    student, teachers = networks()
    return KDModule(student, teachers, num_classes=3, hard_label_weight=weight)


@pytest.mark.parametrize("method", [weighted_kd, baseline])
def test_labels_without_a_weight_may_be_missing(method):
    images = batch_of(0.5).input
    module, labelled = method(0.0), copy.deepcopy(batch_of(0.5))
    for target in (None, torch.full((5,), -1)):
        terms = module.terms(Batch(images, target))
        assert terms.keys() == module.weights().keys() == {"kd"}
        assert torch.equal(terms["kd"], method(0.3).terms(Batch(images, labelled.target))["kd"])


def test_an_option_that_would_do_nothing_is_refused():
    student, teachers = networks()
    regression = [TinyNet(None, num_targets=2) for _ in range(2)]
    with pytest.raises(InputError, match="KDModule: temperature=9 would do nothing with Gaussian outputs: leave it"):
        KDModule(regression[0], regression[1], num_targets=2, temperature=9)
    with pytest.raises(InputError, match="temperature=2.0 would do nothing without a teacher: leave it out"):
        CompressionBaseline(student, num_classes=3, temperature=2.0)
    assert SupervisedModule(student, num_classes=3).teachers.store is None
    assert teachers
