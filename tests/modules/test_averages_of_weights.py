"""Callbacks that average weights average what learns: teachers stay as they were given, and out of checkpoints."""

import copy
import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import FEEDModule, KDModule, MEALV2Module, NoDiscriminator, SupervisedModule
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy

AVERAGES = {
    "stochastic": partial(StochasticWeightAveraging, swa_lrs=0.05, swa_epoch_start=2),
    # Since Lightning 2.6.
    **(
        {
            "exponential": partial(pl.callbacks.EMAWeightAveraging, decay=0.5),
            "equal": pl.callbacks.WeightAveraging,
            "without buffers": partial(pl.callbacks.EMAWeightAveraging, decay=0.5, use_buffers=False),
        }
        if hasattr(pl.callbacks, "WeightAveraging")
        else {}
    ),
}
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}
EPOCHS = 4


def teacher(norm="batch"):
    """With norms of its own, which are no fresh network's."""
    network = TinyNet(norm=norm)
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(layer.weight, 0.8, 1.2)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(0.2, 0.4)
            layer.running_var.uniform_(2, 3)
            layer.num_batches_tracked.fill_(77)
    return network


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def kd(student, teachers):
    return KDModule(student, teachers, num_classes=3, optimizer=optimizer)


def feed(student, teachers):
    return FEEDModule(
        student, teachers, num_classes=3, student_layer="features", input_shape=(1, 8, 8), optimizer=optimizer
    )


def meal(student, teachers):
    return MEALV2Module(student, teachers, num_classes=3, discriminator=NoDiscriminator(), optimizer=optimizer)


METHODS = {"kd": kd, "feed": feed, "meal": meal}


def made(method, norm="batch"):
    """A module, its teachers, and copies of these."""
    torch.manual_seed(3)
    teachers = [teacher(norm) for _ in range(2)]
    torch.manual_seed(4)
    return METHODS[method](TinyNet(norm=norm), teachers), teachers, copy.deepcopy(teachers)


def assert_as_given(teachers, given):
    """Bit for bit; a precision for all of a training has converted them, once."""
    for network, before in zip(teachers, given, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, before.state_dict()[name].to(value.dtype)), name
        assert not any(part.training for part in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def assert_holds_no_teacher(checkpoint, teachers):
    """Nowhere: neither in the weights, nor in what the callbacks keep."""
    kept = list(tensors_in(checkpoint))
    for network in teachers:
        for name, value in network.state_dict().items():
            if value.numel() > 1:
                assert not any(one.shape == value.shape and torch.equal(one.to(value), value) for one in kept), name


class Stop(pl.callbacks.Checkpoint):
    """Saves after an epoch and ends."""

    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    ("method", "precision"),
    [*(("kd", precision) for precision in PRECISIONS), ("feed", "32-true"), ("meal", "32-true"), ("feed", "bf16-true")],
)
def test_teachers_stay_as_they_were_given_in_every_precision(average, method, precision, tmp_path):
    if (average, precision) == ("equal", "16-true"):
        pytest.skip("torch does not average half precision with the float32 in which Lightning keeps the average")
    module, teachers, given = made(method)
    trainer = tiny_trainer(max_epochs=EPOCHS, callbacks=[AVERAGES[average]()], precision=precision)
    trainer.fit(module, datamodule=TinyDataModule())
    assert teachers[0].head.weight.dtype == PRECISIONS[precision]
    assert_as_given(teachers, given)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_holds_no_teacher(torch.load(tmp_path / "end.ckpt", weights_only=True), teachers)
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_resumed_training_runs_under_the_teachers_that_it_is_given(average, precision, tmp_path):
    """And ends, bit for bit, as the undisturbed one; what the checkpoint was trained under is in it nowhere."""
    options = {"max_epochs": EPOCHS, "precision": precision}
    whole, _, _ = made("kd")
    tiny_trainer(callbacks=[AVERAGES[average]()], **options).fit(whole, datamodule=TinyDataModule())
    first, teachers, given = made("kd")
    path = tmp_path / "half.ckpt"
    stopped = tiny_trainer(callbacks=[AVERAGES[average](), Stop(path, 2)], enable_checkpointing=True, **options)
    stopped.fit(first, datamodule=TinyDataModule())
    assert_as_given(teachers, given)
    assert_holds_no_teacher(torch.load(path, weights_only=True), teachers)
    resumed, teachers, given = made("kd")
    asked = []
    for network in teachers:
        network.register_forward_hook(lambda one, *_: asked.append(copy.deepcopy(one.state_dict())))
    tiny_trainer(callbacks=[AVERAGES[average]()], **options).fit(
        resumed, datamodule=TinyDataModule(), ckpt_path=str(path)
    )
    assert_as_given(teachers, given)
    assert asked
    assert all(
        torch.equal(value, given[number % 2].state_dict()[name].to(value.dtype))
        for number, state in enumerate(asked)
        for name, value in state.items()
    )
    # Of float64, Lightning keeps the stochastic average in float32 when it resumes.
    tolerance = 1e-6 if (average, precision) == ("stochastic", "64-true") else 0
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
def test_other_teachers_than_the_checkpoints_are_used_and_left_alone(average, tmp_path):
    first, _, _ = made("kd")
    path = tmp_path / "half.ckpt"
    stopped = tiny_trainer(max_epochs=EPOCHS, callbacks=[AVERAGES[average](), Stop(path, 2)], enable_checkpointing=True)
    stopped.fit(first, datamodule=TinyDataModule())
    torch.manual_seed(99)
    others = [teacher() for _ in range(2)]
    given, module = copy.deepcopy(others), kd(TinyNet(), others)
    trainer = tiny_trainer(max_epochs=EPOCHS, callbacks=[AVERAGES[average]()])
    with pytest.warns(UserWarning, match="teachers: the weights are not those that this checkpoint was trained with"):
        trainer.fit(module, datamodule=TinyDataModule(), ckpt_path=str(path))
    assert_as_given(others, given)


class Watch(LeaveTheGroup):
    """Notes in every process whether the teachers are what they were at first, and has the first one tell."""

    def __init__(self, given):
        self.given = given

    def on_train_end(self, trainer, pl_module):
        assert_as_given(list(pl_module.teachers), self.given)
        assert trainer.world_size == 2


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
def test_in_two_processes(average, tmp_path):
    """In each of them, and in a training that goes on; an assertion in a process ends the fit of all."""
    module, _, given = made("kd", norm="group")
    options = {"devices": 2, "strategy": process_strategy(), "max_epochs": EPOCHS}
    path = tmp_path / "half.ckpt"
    first = tiny_trainer(
        callbacks=[AVERAGES[average](), Watch(given), Stop(path, 2)], enable_checkpointing=True, **options
    )
    first.fit(module, datamodule=TinyDataModule(batch_size=4))
    assert_holds_no_teacher(torch.load(path, weights_only=True), given)
    module, _, given = made("kd", norm="group")
    tiny_trainer(callbacks=[AVERAGES[average](), Watch(given)], **options).fit(
        module, datamodule=TinyDataModule(batch_size=4), ckpt_path=str(path)
    )


# What stochastic averaging does to the student


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_epoch_for_batch_norm_moves_no_parameter(accumulated):
    """Lightning computes no gradient in it, and would make a step by what is left of the last one."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
    data = DataLoader(TensorDataset(inputs, labels), 8)
    module = SupervisedModule(TinyNet(), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    ends = []

    class Ends(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            ends.append(pl_module.student.head.weight.detach().clone())

    callbacks = [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2), Ends()]
    tiny_trainer(max_epochs=4, callbacks=callbacks, accumulate_grad_batches=accumulated, limit_val_batches=0).fit(
        module, data, data
    )
    assert len(ends) == 5
    # The average is of the weights at the beginnings of the second, third and fourth epoch.
    torch.testing.assert_close(module.student.head.weight.detach(), torch.stack(ends[1:4]).mean(0))
    assert torch.equal(module.student.head.weight, ends[4])
    # The first layer's statistics are those of its inputs under the averaged weights, batch by batch.
    with torch.no_grad():
        maps = [module.student.features[0](inputs[start : start + 8]) for start in range(0, 40, 8)]
    means = torch.stack([part.mean((0, 2, 3)) for part in maps]).mean(0)
    torch.testing.assert_close(module.student.features[1].running_mean, means)
    assert math.isfinite(module.student.features[1].running_var.sum())


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
def test_a_frozen_part_of_the_student_keeps_its_statistics(average):
    """Stochastic averaging resets those of every BatchNorm, and measures them again where there is train mode."""
    module, _, _ = made("kd")
    part = module.student.features[:3].requires_grad_(requires_grad=False).eval()
    part[1].running_mean.uniform_(0.2, 0.4)
    before = copy.deepcopy(part.state_dict())
    tiny_trainer(max_epochs=EPOCHS, callbacks=[AVERAGES[average]()]).fit(module, datamodule=TinyDataModule())
    for name, value in before.items():
        assert torch.equal(value, part.state_dict()[name]), name
    assert part[1].momentum == 0.1
    assert not torch.equal(module.student.features[4].running_mean, torch.zeros(8))
