"""The package's modules on lightning-bolts' data modules."""

from functools import partial

import pytest
import torch
from bolts_files import cifar10, fashion_mnist, voc, write_cifar10, write_fashion_mnist, write_voc
from pl_bolts.datamodules import SklearnDataModule
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from distill_lightning import (
    Batch,
    DetectionModule,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    Gaussian,
    IndexedDataModule,
    InputError,
    KDModule,
    MEALV2Module,
    MixupSampler,
    RegressionModule,
    SelfKDDetectionModule,
    SelfKDModule,
    SupervisedModule,
    TeacherStore,
)
from distill_lightning.cli import main
from distill_lightning.testing import TinyFasterRCNN, TinyNet, tiny_trainer


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    return write_fashion_mnist(tmp_path_factory.mktemp("fashion"))


@pytest.fixture(scope="module")
def pascal(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


def network(width=4):
    return TinyNet(10, in_channels=3, width=width)


def supervised():
    return SupervisedModule(network(), num_classes=10)


def kd():
    return KDModule(network(), network(8), num_classes=10)


def feed():
    return FEEDModule(network(), [network(8), network(6)], num_classes=10, student_layer="features", beta=10.0)


def self_kd():
    return SelfKDModule(network(), num_classes=10)


def meal_v2():
    return MEALV2Module(
        network(), [network(8)], num_classes=10, discriminator=FixedDiscriminator(), hard_label_weight=1.0
    )


def extracurricular():
    return ExtracurricularModule(network(), [network(8)], num_classes=10, samplers=[MixupSampler()])


@pytest.mark.parametrize("build", [supervised, kd, feed, self_kd, meal_v2, extracurricular])
def test_every_method_trains_on_cifar10(cifar, build):
    module = build()
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=IndexedDataModule(cifar10(cifar)))
    assert trainer.global_step == 2 * 4
    assert not [name for name, value in module.student.named_parameters() if torch.equal(value, before[name])]
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    (found,) = trainer.test(module, datamodule=cifar10(cifar), verbose=False)
    assert 0 <= found["test/accuracy"] <= 1


def linear(width, classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(width, classes))


def test_students_learn_fashion_mnist_from_its_files(fashion):
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    teacher = linear(28 * 28)
    tiny_trainer(max_epochs=5).fit(
        SupervisedModule(teacher, num_classes=10, optimizer=sgd), datamodule=fashion_mnist(fashion, normalize=True)
    )
    module = KDModule(linear(28 * 28), teacher, num_classes=10, optimizer=sgd, hard_label_weight=0)
    trainer = tiny_trainer(max_epochs=5)
    data = fashion_mnist(fashion, normalize=True)
    trainer.fit(module, datamodule=data)
    assert data.num_classes == 10
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"] > 0.9


def test_a_method_that_needs_indices_says_so_and_gets_them(fashion):
    def module():
        return SelfKDModule(linear(28 * 28), num_classes=10, alpha_T=0.5)

    with pytest.raises(InputError, match="IndexedDataModule"):
        tiny_trainer(max_epochs=2).fit(module(), datamodule=fashion_mnist(fashion))
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module(), datamodule=IndexedDataModule(fashion_mnist(fashion)))
    assert trainer.callback_metrics["train/known_fraction"] == 1


def test_the_index_is_the_place_in_the_split_that_is_trained_on(fashion):
    data = IndexedDataModule(fashion_mnist(fashion, val_split=30))
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(50))
    for batch in batches:
        assert isinstance(batch, Batch)
        for image, target, index in zip(batch.input, batch.target, batch.index, strict=True):
            same_image, same_target = data.dataset_train[index]
            assert torch.equal(image, same_image)
            assert target == same_target


def test_teachers_are_asked_once_about_each_sample(fashion, tmp_path):
    teacher, asked = linear(28 * 28), []
    teacher.register_forward_hook(lambda network, inputs, output: asked.append(len(output)))
    store = TeacherStore(tmp_path / "store", [teacher], data="fashion")
    module = KDModule(linear(28 * 28), store, num_classes=10)
    tiny_trainer(max_epochs=3, limit_val_batches=0).fit(module, datamodule=IndexedDataModule(fashion_mnist(fashion)))
    assert sum(asked) == 64


def test_detectors_train_on_voc(pascal):
    sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    data = voc(pascal)
    # 20 classes and the background, which lightning-bolts counts.
    assert data.num_classes == 21
    module = DetectionModule(TinyFasterRCNN(20, in_channels=3), num_classes=20, optimizer=sgd)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    # Of sheep and cows there are some.
    metrics = trainer.callback_metrics
    assert [number for number in range(1, 21) if metrics[f"val/map_class_{number}"].isfinite()] == [10, 17]


DETECTION = """
trainer:
  max_epochs: 1
  default_root_dir: {out}
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: DetectionModule
  init_args:
    student: {{class_path: distill_lightning.testing.TinyFasterRCNN, init_args: {{num_classes: 20, in_channels: 3}}}}
data:
  class_path: bolts_files.{data}
  init_args: {{data_dir: {folder}, batch_size: 2, pin_memory: false}}
"""


def test_the_background_is_no_class_of_a_detection_module(pascal, tmp_path, capsys):
    def fit(data):
        path = tmp_path / f"{data}.yaml"
        path.write_text(DETECTION.format(data=data, folder=pascal, out=tmp_path))
        return main(["fit", "--config", str(path)])

    assert fit("WrittenVOCDataModule") != 0
    assert "has 21 classes where num_classes=21 needs 22" in (said := capsys.readouterr().err)
    assert "leave the background out of num_classes, in the data module where it comes from there" in said
    assert fit("ForegroundVOCDataModule") == 0, capsys.readouterr().err


def test_self_kd_of_a_detector_trains_on_voc(pascal):
    module = SelfKDDetectionModule(TinyFasterRCNN(20, in_channels=3), num_classes=20, alpha_T=0.5)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=IndexedDataModule(voc(pascal)))
    assert trainer.callback_metrics["train/alpha"] == 0.5
    assert trainer.callback_metrics["train/known_fraction"] == 1


def test_arrays_of_scikit_learn_are_classified():
    images, targets = load_digits(return_X_y=True)
    data = IndexedDataModule(SklearnDataModule(images / 16, targets, batch_size=128, pin_memory=False))
    module = SelfKDModule(linear(64), num_classes=10, alpha_T=0.3)
    trainer = tiny_trainer(max_epochs=5)
    trainer.fit(module, datamodule=data)
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"] > 0.85


def diabetes():
    """Ten measurements of a patient each, and the disease's progression, all of about unit variance."""
    inputs, targets = load_diabetes(return_X_y=True)
    return SklearnDataModule(inputs * 20, (targets - 152) / 77, batch_size=64, pin_memory=False)


@pytest.mark.parametrize("indexed", [IndexedDataModule, lambda data: data], ids=["indexed", "plain"])
def test_arrays_of_scikit_learn_are_regressed(indexed):
    data = indexed(diabetes())
    sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    teacher = nn.Linear(10, 2)
    trainer = tiny_trainer(max_epochs=5)
    trainer.fit(RegressionModule(teacher, num_targets=1, optimizer=sgd), datamodule=data)
    module = KDModule(nn.Linear(10, 2), teacher, num_targets=1, optimizer=sgd)
    trainer = tiny_trainer(max_epochs=5)
    trainer.fit(module, datamodule=data)
    plain = SupervisedModule(nn.Linear(10, 1), output=Gaussian(1, fixed_variance=1.0), optimizer=sgd)
    tiny_trainer(max_epochs=5).fit(plain, datamodule=data)
    for one in (module, plain):
        # The mean alone would have an error of 1.
        assert tiny_trainer().test(one, datamodule=data, verbose=False)[0]["test/rmse"] < 0.85
