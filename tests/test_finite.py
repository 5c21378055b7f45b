"""Options that are numbers are finite, in every method and in what methods are made of."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD

from distill_lightning import (
    AdaptedInput,
    CompressionBaseline,
    ExtracurricularModule,
    FactorDistance,
    FEEDModule,
    FixedDiscriminator,
    GapReduction,
    Gaussian,
    InputError,
    KDModule,
    LabelSmoothing,
    LogitTerm,
    MatchPoint,
    MEALV2Module,
    Mixup,
    MixupSampler,
    MovingAverage,
    OneCycle,
    PastModel,
    RegressionModule,
    SelfKDModule,
    SmallTransformer,
    Softened,
)
from distill_lightning.callbacks import ReconstructionErrorProbe
from distill_lightning.data.datamodules import RotatedDigitsDataModule
from distill_lightning.errors import check_finite
from distill_lightning.functional import factor_distance, softened_kl
from distill_lightning.layers import ImageDecoder, Paraphraser
from distill_lightning.outputs.metrics import Accuracy
from distill_lightning.testing import TinyNet


def under(kind, **options):
    return kind(TinyNet(), TinyNet(), num_classes=3, **options)


feed = partial(under, FEEDModule, student_layer="features", input_shape=(1, 8, 8))
baseline = partial(CompressionBaseline, num_classes=3)
ROWS = torch.zeros(2, 3)
CASES = [
    ("temperature", lambda x: under(KDModule, temperature=x)),
    ("hard_label_weight", lambda x: under(KDModule, hard_label_weight=x)),
    ("beta", lambda x: feed(beta=x)),
    ("teacher_weights", lambda x: feed(teacher_weights=[x])),
    ("p", lambda x: FactorDistance(p=x)),
    ("p", lambda x: factor_distance(ROWS, ROWS, p=x)),
    ("weight", lambda x: LogitTerm(weight=x)),
    ("temperature", lambda x: LogitTerm(temperature=x)),
    ("weight", lambda x: FixedDiscriminator(weight=x)),
    ("lr", lambda x: FixedDiscriminator(lr=x)),
    ("temperature", lambda x: under(MEALV2Module, discriminator=FixedDiscriminator(), temperature=x)),
    ("hard_label_weight", lambda x: under(MEALV2Module, discriminator=FixedDiscriminator(), hard_label_weight=x)),
    ("kl_weight", lambda x: under(ExtracurricularModule, kl_weight=x)),
    ("label_weight", lambda x: under(ExtracurricularModule, label_weight=x)),
    ("temperature", lambda x: under(ExtracurricularModule, temperature=x)),
    ("extra_ratio", lambda x: under(ExtracurricularModule, extra_ratio=x)),
    ("variance", lambda x: MatchPoint(variance=x)),
    ("alpha_T", lambda x: SelfKDModule(TinyNet(), num_classes=3, alpha_T=x)),
    ("total_epochs", lambda x: SelfKDModule(TinyNet(), num_classes=3, total_epochs=x)),
    ("past_temperature", lambda x: SelfKDModule(TinyNet(), num_classes=3, past_temperature=x)),
    ("decay", lambda x: MovingAverage(decay=x)),
    ("refresh_epochs", lambda x: PastModel(refresh_epochs=x)),
    ("burn_in_epochs", lambda x: RegressionModule(TinyNet(None, num_targets=1), num_targets=1, burn_in_epochs=x)),
    ("temperature", lambda x: baseline(TinyNet(), teacher=[TinyNet()], temperature=x)),
    ("hard_label_weight", lambda x: baseline(TinyNet(), teacher=[TinyNet()], hard_label_weight=x)),
    ("temperature", Softened),
    ("temperature", lambda x: softened_kl(ROWS, ROWS, temperature=x)),
    ("teacher_variance", lambda x: Gaussian(2, teacher_variance=[1.0, x])),
    ("fixed_variance", lambda x: Gaussian(2, fixed_variance=x)),
    ("baseline", lambda x: GapReduction(x, 1.0, of=Accuracy())),
    ("teacher", lambda x: GapReduction(0.5, x, of=Accuracy())),
    ("alpha", lambda x: Mixup(alpha=x)),
    ("probability", lambda x: Mixup(probability=x)),
    ("alpha", lambda x: MixupSampler(alpha=x)),
    ("epsilon", LabelSmoothing),
    ("max_angle", lambda x: RotatedDigitsDataModule(max_angle=x)),
    ("rate", lambda x: Paraphraser(8, rate=x)),
    ("output_range", lambda x: ImageDecoder((1, 8, 8), 2, output_range=(0.0, x))),
    ("mean", lambda x: AdaptedInput(TinyNet(), mean=x, std=1.0)),
    ("source_std", lambda x: AdaptedInput(TinyNet(), mean=0.0, std=1.0, source_std=[1.0, x])),
    ("dropout", lambda x: SmallTransformer(num_classes=3, length=8, input_size=8, dropout=x)),
    ("beta", lambda x: ReconstructionErrorProbe("features", beta=x)),
    ("rate", lambda x: ReconstructionErrorProbe("features", rate=x)),
    *(
        (name, lambda x, name=name: OneCycle(SGD(nn.Linear(1, 1).parameters(), lr=1.0), **{name: x}))
        for name in ("warmup", "start", "end")
    ),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "make"), CASES, ids=[f"{name}-{number}" for number, (name, _) in enumerate(CASES)])
def test_no_option_is_infinite_or_nan(name, make, value):
    with pytest.raises(InputError, match=f"{name} .*, got {value}") as caught:
        make(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "4", [1.0], 10**400])
def test_what_is_no_finite_number_is_refused_with_the_key(value):
    with pytest.raises(InputError, match="^weight must be a finite number, got "):
        check_finite("weight", 1.0, value)


def test_numbers_of_every_kind_pass():
    check_finite("weight", 0, -1.5, True, torch.tensor(2.0), 10**9)


@pytest.mark.parametrize(("options", "message"), [({"end": -0.1}, "not negative"), ({"total_steps": 0}, "at least 1")])
def test_a_cycle_of_negative_rates_or_no_steps_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        OneCycle(SGD(nn.Linear(1, 1).parameters(), lr=1.0), **options)
