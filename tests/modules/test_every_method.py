"""Every module of the package goes through a Trainer's verbs: what must hold under every version of Lightning."""

import inspect

import pytest
import pytorch_lightning as pl
import torch

import distill_lightning
from distill_lightning import (
    CompressionBaseline,
    DetectionModule,
    DistillationModule,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    GeneratorModule,
    KDModule,
    MEALV2Module,
    MixupSampler,
    ParaphraserModule,
    RegressionModule,
    SelfKDDetectionModule,
    SelfKDModule,
    SelfKDTranslationModule,
    SupervisedModule,
    TranslationModule,
    sequential_feed,
)
from distill_lightning.compression import PruneWeights
from distill_lightning.testing import (
    DetectionKit,
    ImageKit,
    TinyDataModule,
    TinyNet,
    TranslationKit,
    tiny_trainer,
)

SHAPE = (1, 8, 8)


def compressed(student, _teachers, number):
    return CompressionBaseline(student, num_classes=number, steps=[PruneWeights(amount=0.5, finetune_epochs=1)], seed=0)


def feed(student, teachers, number):
    return FEEDModule(student, teachers, num_classes=number, student_layer="features", beta=10.0, input_shape=SHAPE)


def meal_v2(student, teachers, number):
    return MEALV2Module(student, teachers, num_classes=number, discriminator=FixedDiscriminator())


def generator(_student, _teachers, _number):
    return GeneratorModule(input_shape=SHAPE, latent_dim=2, output_range=(-2, 3))


def paraphraser(_student, teachers, _number):
    return ParaphraserModule(teachers, layers="features", input_shape=SHAPE)


def without_teachers(kind, **options):
    return lambda student, _teachers, number: kind(student, num_classes=number, **options)


# Of each module its kit, and what builds it of a student, two teachers and the number of classes.
METHODS = {
    SupervisedModule: (ImageKit(), without_teachers(SupervisedModule)),
    RegressionModule: (
        ImageKit(num_targets=1),
        lambda student, _teachers, _number: RegressionModule(student, num_targets=1),
    ),
    KDModule: (ImageKit(), lambda student, teachers, number: KDModule(student, teachers, num_classes=number)),
    FEEDModule: (ImageKit(), feed),
    SelfKDModule: (ImageKit(), without_teachers(SelfKDModule)),
    MEALV2Module: (ImageKit(), meal_v2),
    ExtracurricularModule: (
        ImageKit(),
        lambda student, teachers, number: ExtracurricularModule(
            student, teachers, num_classes=number, samplers=[MixupSampler()]
        ),
    ),
    CompressionBaseline: (ImageKit(), compressed),
    TranslationModule: (TranslationKit(), without_teachers(TranslationModule, pad_id=0)),
    SelfKDTranslationModule: (TranslationKit(), without_teachers(SelfKDTranslationModule, pad_id=0)),
    DetectionModule: (DetectionKit(), without_teachers(DetectionModule)),
    SelfKDDetectionModule: (DetectionKit(), without_teachers(SelfKDDetectionModule)),
    GeneratorModule: (ImageKit(), generator),
    ParaphraserModule: (ImageKit(), paraphraser),
}


def test_no_module_is_missing():
    public = {getattr(distill_lightning, name) for name in distill_lightning.__all__}
    modules = {one for one in public if inspect.isclass(one) and issubclass(one, pl.LightningModule)}
    assert modules == METHODS.keys() | {DistillationModule}


def made(kind):
    """A module of this kind, and data for it."""
    kit, build = METHODS[kind]
    student, *teachers = (kit.network(kit.num_classes, norm="batch") for _ in range(3))
    return build(student, teachers, kit.num_classes), kit.data()


def state_of(module):
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_every_module_trains_and_comes_back_from_its_checkpoint(kind, tmp_path):
    module, data = made(kind)
    before = state_of(module)
    trainer = tiny_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3
    metrics = dict(trainer.callback_metrics)
    assert metrics["train/loss"].isfinite()
    trained = state_of(module)
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())
    with torch.no_grad():
        for value in module.parameters():
            value.zero_()
    (found,) = trainer.validate(
        module, datamodule=data, ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False
    )
    assert all(torch.equal(value, trained[name]) for name, value in state_of(module).items())
    assert found == {name: pytest.approx(float(metrics[name]), nan_ok=True) for name in found}
    if isinstance(module, DistillationModule):
        assert trainer.test(module, datamodule=data, verbose=False)[0].keys() == {
            name.replace("val/", "test/") for name in found
        }
        assert len(trainer.predict(module, data.test_dataloader())) == 3


@pytest.mark.slow
def test_a_student_becomes_the_teacher_of_the_next():
    options = {"num_classes": 3, "student_layer": "features", "beta": 10.0, "input_shape": SHAPE}
    stages = sequential_feed(TinyNet, tiny_trainer, TinyDataModule(), stages=1, **options)
    assert [stage.number for stage in stages] == [0, 1]
