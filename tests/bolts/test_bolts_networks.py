"""lightning-bolts' networks as students and teachers."""

from functools import partial

import pytest
import torch
from bolts_files import fashion_mnist, write_fashion_mnist
from pl_bolts.models.autoencoders.components import resnet18_encoder
from pl_bolts.models.mnist_module import LitMNIST
from pl_bolts.models.regression import LogisticRegression
from pl_bolts.models.self_supervised.evaluator import SSLEvaluator
from pl_bolts.models.self_supervised.resnets import resnet18
from pl_bolts.models.vision import UNet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import (
    Categorical,
    FEEDModule,
    FixedDiscriminator,
    HintDistance,
    InputError,
    KDModule,
    MEALV2Module,
    SupervisedModule,
)
from distill_lightning.testing import tiny_trainer


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    return write_fashion_mnist(tmp_path_factory.mktemp("fashion"))


adam = partial(torch.optim.Adam, lr=1e-2)


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


meal_v2 = partial(MEALV2Module, discriminator=FixedDiscriminator(), hard_label_weight=1.0)


@pytest.mark.parametrize("method", [KDModule, meal_v2], ids=["kd", "meal_v2"])
def test_a_lightning_module_of_theirs_is_student_and_teacher(fashion, tmp_path, method):
    data = fashion_mnist(fashion)
    teacher, student = LitMNIST(hidden_dim=32), LitMNIST(hidden_dim=8)
    tiny_trainer(max_epochs=4).fit(teacher, datamodule=data)
    before, begun = state_of(teacher), state_of(student)
    module = method(student, teacher, num_classes=10, optimizer=adam)
    tiny_trainer(max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path).fit(module, datamodule=data)
    assert same(before, teacher.state_dict())
    assert not same(begun, student.state_dict())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert not [name for name in torch.load(checkpoint, weights_only=True)["state_dict"] if "teacher" in name]
    fresh = LitMNIST(hidden_dim=8)
    loaded = type(module).load_from_checkpoint(checkpoint, student=fresh, teachers=teacher)
    assert same(module.student.state_dict(), loaded.student.state_dict())
    module.export_student(tmp_path / "student.pt")
    fresh.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True), strict=True)
    images = next(iter(data.val_dataloader()))[0]
    assert torch.equal(fresh(images), module(images))


def test_a_logistic_regression_learns_from_one():
    inputs = torch.randn(64, 5)
    loader = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=16)
    teacher = LogisticRegression(input_dim=5, num_classes=2)
    with torch.no_grad():
        teacher.linear.weight.copy_(torch.tensor([[-3.0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0]]))
    module = KDModule(
        LogisticRegression(input_dim=5, num_classes=2), teacher, num_classes=2, hard_label_weight=0,
        optimizer=partial(torch.optim.Adam, lr=0.1),
    )  # fmt: skip
    trainer = tiny_trainer(max_epochs=5)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["val/accuracy"] > 0.9


def images(side, labels, *, count=4):
    return DataLoader(TensorDataset(torch.rand(count, 3, side, side), labels), batch_size=2)


def with_head(encoder, classes=10):
    return nn.Sequential(encoder, SSLEvaluator(512, classes, n_hidden=None, p=0.0))


@pytest.mark.slow
def test_features_of_an_encoder_are_learned_from():
    student, teacher = with_head(resnet18_encoder(False, True)), with_head(resnet18_encoder(False, False))
    before = state_of(teacher)
    module = FEEDModule(
        student, [teacher], num_classes=10, student_layer="0.layer2", teacher_layers="0.layer3",
        distance=HintDistance(), optimizer=adam, input_shape=(3, 32, 32),
    )  # fmt: skip
    trainer = tiny_trainer()
    trainer.fit(module, *2 * [images(32, torch.tensor([1, 2, 3, 4]))])
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert same(before, teacher.state_dict())


def test_a_self_supervised_resnet_has_no_logits():
    """It returns a list of features."""
    with pytest.raises(InputError, match="student .ResNet. has 512 classes"):
        SupervisedModule(resnet18(num_classes=10, first_conv=False), num_classes=10, input_shape=(3, 32, 32))


def test_a_unet_learns_every_pixel_from_a_unet():
    torch.manual_seed(0)
    pixels = {"output": Categorical(2, class_dim="second"), "optimizer": adam}
    student, teacher = (UNet(2, num_layers=2, features_start=width) for width in (4, 8))
    is_bright = torch.rand(8, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2) > 0.5
    pictures = is_bright[:, None] + torch.rand(8, 3, 16, 16)
    loader = DataLoader(TensorDataset(pictures, is_bright.long()), batch_size=4)
    tiny_trainer(max_epochs=15).fit(SupervisedModule(teacher, **pixels), loader, loader)
    trainer = tiny_trainer(max_epochs=15)
    trainer.fit(KDModule(student, teacher, **pixels), loader, loader)
    assert trainer.callback_metrics["val/accuracy"] > 0.85
