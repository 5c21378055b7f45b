"""Every method under transforms: what its terms get, what is logged, and what a store makes of it."""

import math

import pytest
import torch

from distill_lightning import (
    CompressionBaseline,
    CutMix,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    KDModule,
    LabelSmoothing,
    LogitTerm,
    MEALV2Module,
    Mixup,
    MixupSampler,
    PastModel,
    SelfKDModule,
    SupervisedModule,
)
from distill_lightning.teachers import TeacherStore
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

K, EPOCHS = 3, 2


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def supervised(student, teachers, **options):
    return SupervisedModule(student, **options)


def kd(student, teachers, **options):
    return KDModule(student, teachers, **options)


def feed(student, teachers, **options):
    return FEEDModule(
        student, teachers, student_layer="features", beta=10.0, logit_term=LogitTerm(weight=0.5),
        input_shape=(1, 8, 8), **options,
    )  # fmt: skip


def self_kd(student, teachers, **options):
    return SelfKDModule(student, **options)


def self_kd_of_a_past_model(student, teachers, **options):
    return SelfKDModule(student, past=PastModel(), **options)


def meal(student, teachers, **options):
    return MEALV2Module(student, teachers, discriminator=FixedDiscriminator(), hard_label_weight=0.1, **options)


def xcl(student, teachers, **options):
    return ExtracurricularModule(student, teachers, samplers=[MixupSampler()], label_weight=0.1, **options)


def compression(student, teachers, **options):
    return CompressionBaseline(student, teacher=teachers, **options)


TAUGHT = [kd, feed, meal, xcl]
METHODS = [supervised, self_kd, self_kd_of_a_past_model, compression, *TAUGHT]
TRANSFORMS = {
    "mixup and smoothing": [Mixup(probability=0.5), LabelSmoothing(0.1)],
    "cutmix": [CutMix()],
}


def teachers_of(count=2):
    torch.manual_seed(5)
    networks = [TinyNet(width=8) for _ in range(count)]
    for network in networks:
        # Far enough from uniform that another input could be seen.
        torch.nn.init.normal_(network.head.weight)
    return networks


class Run:
    """A training, with the batches that the terms got and what they made of them."""

    def __init__(self, build, teachers, transforms, **data):
        torch.manual_seed(0)
        self.module = build(TinyNet(), teachers, num_classes=K, transforms=transforms, optimizer=sgd)
        self.batches, self.terms, terms = [], [], self.module.terms

        def spied(batch):
            found = terms(batch)
            self.batches.append(batch)
            self.terms.append({name: float(value) for name, value in found.items()})
            return found

        self.module.terms = spied
        self.trainer = tiny_trainer(max_epochs=EPOCHS, limit_val_batches=0)
        self.trainer.fit(self.module, datamodule=TinyDataModule(**data))

    @property
    def shares(self):
        return torch.cat([batch.mixture.share for batch in self.batches])

    @property
    def targets(self):
        return torch.cat([batch.target for batch in self.batches])


@pytest.mark.slow
@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("build", METHODS)
def test_a_method_trains_on_mixed_batches(build, name, partners):
    run, again = (Run(build, teachers_of(), TRANSFORMS[name], partners=partners) for _ in range(2))
    assert len(run.terms) == EPOCHS * 3
    assert all(math.isfinite(value) for terms in run.terms for value in terms.values())
    assert torch.isfinite(run.trainer.callback_metrics["train/loss"])
    shares, targets = run.shares, run.targets
    # About half of the rows; the others are whole.
    assert 10 < (shares < 1).sum() < 38
    assert targets.shape == (EPOCHS * 24, K)
    assert torch.allclose(targets.sum(dim=1), torch.ones(len(targets)), atol=1e-5)
    for batch in run.batches:
        share, first, second, _ = batch.mixture
        assert torch.allclose(batch.target, share[:, None] * first + (1 - share[:, None]) * second, atol=1e-6)
    between = (shares < 1) & (run_labels(run, "first") != run_labels(run, "second"))
    assert between.any()
    assert (targets[between].max(dim=1).values < 1 - 0.1 * (name != "cutmix") + 0.1 / K).all()
    assert all(torch.equal(one, two) for one, two in ((shares, again.shares), (targets, again.targets)))
    assert all(
        torch.equal(one.input, two.input) and torch.equal(one.mixture.index, two.mixture.index)
        for one, two in zip(run.batches, again.batches, strict=True)
    )
    assert run.terms == again.terms


def run_labels(run, which):
    return torch.cat([getattr(batch.mixture, which).argmax(dim=1) for batch in run.batches])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("build", [*TAUGHT, compression])
def test_teachers_are_asked_about_what_the_student_reads(build, name):
    teachers, asked = teachers_of(), []
    for network in teachers:
        network.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].clone()))
    run = Run(build, teachers, TRANSFORMS[name])
    # After the forwards in which a method looks at the sizes; behind each batch come additional inputs.
    asked = [inputs for inputs in asked if len(inputs) >= 8]
    assert len(asked) == len(teachers) * len(run.batches)
    for number, inputs in enumerate(asked):
        assert torch.equal(inputs[:8], run.batches[number // len(teachers)].input)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("build", [*TAUGHT, compression])
def test_a_training_from_the_filled_store_is_the_live_one(tmp_path, build, name):
    data, transforms = {"partners": True, "views": EPOCHS}, TRANSFORMS[name]
    live = Run(build, teachers_of(), transforms, **data)
    filling = Run(build, TeacherStore(tmp_path, teachers_of(), dtype="float32"), transforms, **data)
    reading = Run(build, TeacherStore(tmp_path, dtype="float32", fill="never"), transforms, **data)
    assert filling.module.teachers.store.is_complete
    assert len(reading.module.teachers) == 0
    assert reading.terms == filling.terms
    for told, asked in zip(reading.terms, live.terms, strict=True):
        assert told == pytest.approx(asked, rel=1e-4, abs=1e-6)
    assert torch.equal(reading.shares, live.shares)
    assert torch.equal(reading.targets, live.targets)
