"""ParaphraserModule against a naive reference, its teachers' discipline, and Factor Transfer with what it trained."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from distill_lightning import Batch, FEEDModule, InputError, OneCycle, ParaphraserModule, SmallResNet, TeacherEnsemble
from distill_lightning.layers import Paraphraser
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer
from distill_lightning.testing.processes import process_strategy

SHAPE = (1, 8, 8)


def module_of(*widths, seed=0, **options):
    torch.manual_seed(seed)
    teachers = [TinyNet(width=width) for width in widths or (4, 6)]
    return ParaphraserModule(teachers, **({"layers": "features", "input_shape": SHAPE} | options))


def batch_of(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(count, *SHAPE, generator=generator), torch.zeros(count, dtype=torch.long))


def naive_errors(paraphraser, teacher, batches):
    """Mean absolute error and relative error over all batches, from flat lists."""
    made, wanted = [], []
    for images in batches:
        feature = teacher.features(images)
        made += paraphraser.decoder(paraphraser.encoder(feature)).flatten().tolist()
        wanted += feature.flatten().tolist()
    error = sum(abs(a - b) for a, b in zip(made, wanted, strict=True))
    return error / len(made), error / sum(abs(b) for b in wanted)


def test_the_loss_is_the_sum_of_the_mean_absolute_errors():
    module, batch = module_of(4, 6), batch_of()
    expected = [
        naive_errors(paraphraser, teacher, [batch.input])[0]
        for paraphraser, teacher in zip(module.paraphrasers, module.teachers[0], strict=True)
    ]
    logged = {}
    module.log_dict = lambda values, **_: logged.update(values)
    loss = module.training_step(batch, 0)
    assert float(loss) == pytest.approx(sum(expected), rel=1e-5)
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(
        {
            "train/loss": sum(expected),
            "train/reconstruction_0": expected[0],
            "train/reconstruction_1": expected[1],
        },
        rel=1e-5,
    )


def test_the_loss_and_the_forward_take_any_batch_of_images():
    module, batch = module_of(4, 6), batch_of()
    module.log_dict = lambda values, **_: None
    assert torch.equal(module.training_step(batch, 0), module.training_step((batch.input, batch.target), 0))
    first, second = module(batch.input)
    assert (first.shape, second.shape) == ((4, 8, 4, 4), (4, 12, 4, 4))
    assert torch.equal(first, module.paraphrasers[0](module.teachers[0].networks[0].features(batch.input)))


def test_validation_logs_the_errors_over_all_images():
    module, data = module_of(4, 6), TinyDataModule(val_size=20)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=data)
    data.trainer = None
    images = [batch.input for batch in data.val_dataloader()]
    assert [len(part) for part in images] == [8, 8, 4]
    total = 0.0
    for number, teacher in enumerate(module.teachers[0]):
        absolute, relative = naive_errors(module.paraphrasers[number], teacher, images)
        total += absolute
        assert float(trainer.callback_metrics[f"val/reconstruction_{number}"]) == pytest.approx(absolute, rel=1e-5)
        assert float(trainer.callback_metrics[f"val/relative_{number}"]) == pytest.approx(relative, rel=1e-5)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_together_each_paraphraser_learns_as_alone():
    ends = []
    for both in (True, False):
        module = module_of(4, 6)
        if not both:
            first = module.paraphrasers[0]
            module = ParaphraserModule(module.teachers[0].networks[0], layers="features", input_shape=SHAPE)
            module.paraphrasers[0].load_state_dict(first.state_dict())
        tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule())
        ends.append(module.paraphrasers[0].state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_training_lowers_the_error():
    module, data = module_of(4, optimizer=partial(torch.optim.Adam, lr=3e-3)), TinyDataModule(samples=48)
    ends = []
    for epochs in (1, 15):
        trainer = tiny_trainer(max_epochs=epochs)
        trainer.fit(module, datamodule=data)
        ends.append(float(trainer.callback_metrics["val/relative_0"]))
    assert ends[1] < 0.85 < 1 < ends[0]


def test_the_optimiser_holds_the_paraphrasers_alone_with_factor_transfers_settings():
    module, smallest = module_of(4, 6), []
    module.on_before_optimizer_step = lambda *_: smallest.append(
        min(float(p.grad.abs().sum()) for p in module.paraphrasers.parameters())
    )
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    (optimizer,) = trainer.optimizers
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module.paraphrasers.parameters()]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.9, 5e-4, False)
    assert min(smallest) > 0


def test_teachers_stay_as_they_are_in_any_mode():
    module = module_of(4, 6)
    before = copy.deepcopy(module.teachers[0].state_dict())
    module.train()
    assert not any(child.training for child in module.teachers[0].modules())
    assert all(child.training for child in module.paraphrasers.modules())
    module.eval()
    modes = []
    module.on_train_batch_start = lambda *_: modes.append(
        (module.paraphrasers.training, any(child.training for child in module.teachers[0].modules()))
    )
    tiny_trainer().fit(module, datamodule=TinyDataModule())
    assert modes == [(True, False)] * 3
    assert all(torch.equal(value, before[name]) for name, value in module.teachers[0].state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in module.teachers[0].parameters())


def test_teachers_run_once_a_step_without_a_graph():
    module = module_of(4, 6)
    module.log_dict = lambda values, **_: None
    graphs = []
    for network in module.teachers[0]:
        network.register_forward_hook(lambda _module, _inputs, output: graphs.append(output.requires_grad))
    module.training_step(batch_of(), 0)
    assert graphs == [False, False]


@pytest.mark.slow
def test_a_checkpoint_has_no_teacher_and_rebuilds_the_paraphrasers(tmp_path):
    module = module_of(4, 6, rate=0.25, batch_norm=True)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "stage.ckpt")
    state = torch.load(tmp_path / "stage.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all(name.startswith("paraphrasers.") for name in state)
    loaded = ParaphraserModule.load_from_checkpoint(tmp_path / "stage.ckpt", teachers=list(module.teachers[0]))
    assert loaded.paraphrasers[0].factors == 2
    assert sum(isinstance(child, nn.BatchNorm2d) for child in loaded.paraphrasers[1].modules()) == 6
    for name, value in module.paraphrasers.state_dict().items():
        assert torch.equal(value, loaded.paraphrasers.state_dict()[name])
    for name, value in module.teachers[0].state_dict().items():
        assert torch.equal(value, loaded.teachers[0].state_dict()[name])


def test_other_teachers_are_warned_of(tmp_path):
    module = module_of(4)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "stage.ckpt")
    with pytest.warns(UserWarning, match="not those that these paraphrasers were trained with"):
        ParaphraserModule.load_from_checkpoint(tmp_path / "stage.ckpt", teachers=TinyNet())


@pytest.mark.slow
def test_a_resumed_stage_equals_the_uninterrupted_one(tmp_path):
    whole, resumed = module_of(4), module_of(4)
    teacher = copy.deepcopy(resumed.teachers[0].state_dict())
    tiny_trainer(max_epochs=3).fit(whole, datamodule=TinyDataModule())
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(resumed, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "stage.ckpt")
    again = module_of(4, seed=9)
    again.teachers[0].load_state_dict(teacher)
    tiny_trainer(max_epochs=3).fit(again, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "stage.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["steps", "cycle", "plateau"])
def test_schedules_are_stepped_at_their_own_pace(schedule):
    makers = {
        "steps": partial(StepLR, step_size=1, gamma=0.1),
        "cycle": OneCycle,
        # The error never falls to a hundredth, so every epoch after the first is a bad one.
        "plateau": partial(ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.99),
    }
    module = module_of(4, lr_scheduler=makers[schedule])
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    trainer = tiny_trainer(max_epochs=3)
    trainer.fit(module, datamodule=TinyDataModule())
    if schedule == "steps":
        assert rates == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3)
    elif schedule == "plateau":
        assert rates == pytest.approx([0.1] * 6 + [0.01] * 3)
    else:
        whole = OneCycle(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), total_steps=9)
        assert rates == pytest.approx([0.1 * whole.factor(step / 8) for step in range(9)])


def test_one_cycle_needs_a_length():
    module = module_of(4, lr_scheduler=OneCycle)
    with pytest.raises(InputError, match="OneCycle needs the length of the training"):
        tiny_trainer(max_epochs=-1).fit(module, datamodule=TinyDataModule())


def test_factor_transfer_takes_what_was_trained():
    data, stage = TinyDataModule(), module_of(4, 4)
    tiny_trainer().fit(stage, datamodule=data)
    before = copy.deepcopy(stage.paraphrasers.state_dict())
    torch.manual_seed(1)
    module = FEEDModule(
        TinyNet(), list(stage.teachers[0]), num_classes=3, student_layer="features", paraphrasers=stage.paraphrasers,
        beta=10.0, input_shape=SHAPE,
    )  # fmt: skip
    assert [translator[-2].out_channels for translator in module.translators] == [4, 4]
    batch = batch_of()
    code = stage.paraphrasers[0].encoder(stage.teachers[0].networks[0].features(batch.input))
    module.eval()
    translated = module.translators[0](module.student.features(batch.input))
    made, wanted = (value.detach().double().flatten(1).numpy() for value in (translated, code))
    norms = [np.sqrt((value**2).sum(axis=1, keepdims=True)) for value in (made, wanted)]
    expected = np.abs(made / norms[0] - wanted / norms[1]).mean()
    assert float(module.terms(batch)["feed_teacher_0"]) == pytest.approx(expected, rel=1e-4)
    tiny_trainer(max_epochs=2).fit(module, datamodule=data)
    for name, value in before.items():
        assert torch.equal(stage.paraphrasers.state_dict()[name], value)


def test_layers_can_differ_and_channels_are_found_without_an_input_shape():
    teachers = TeacherEnsemble([SmallResNet(3, width=2), SmallResNet(3, width=4)])
    module = ParaphraserModule(teachers, layers=["stage3", "stage2"], rate=0.25)
    assert module.teachers[0] is teachers
    assert [(p.channels, p.factors) for p in module.paraphrasers] == [(8, 2), (8, 2)]
    assert all(isinstance(p, Paraphraser) for p in module.paraphrasers)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in module.paraphrasers.modules())


def test_a_batch_of_one_and_a_zero_feature_are_finite():
    module = module_of(4)
    with torch.no_grad():
        for parameter in module.teachers[0].parameters():
            parameter.zero_()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(batch_size=1, samples=3))
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_under_half_precision_the_errors_are_finite(precision):
    trainer = tiny_trainer(precision=precision)
    trainer.fit(module_of(4), datamodule=TinyDataModule())
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())


@pytest.mark.slow
def test_two_processes_equal_one():
    alone = module_of(4)
    together = copy.deepcopy(alone)
    single = tiny_trainer(max_epochs=2)
    single.fit(alone, datamodule=TinyDataModule(batch_size=8))
    double = tiny_trainer(max_epochs=2, devices=2, strategy=process_strategy())
    double.fit(together, datamodule=TinyDataModule(batch_size=4))
    for name, value in alone.state_dict().items():
        assert torch.allclose(value, together.state_dict()[name], rtol=1e-4, atol=1e-6), name
    for name, value in single.callback_metrics.items():
        assert float(double.callback_metrics[name]) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "featurs"}, "TinyNet has no layer 'featurs'; similar names: features"),
        ({"layers": ["features"]}, "1 layers for 2 teachers: give one for all, or one each"),
        ({"layers": "features.*"}, "names 6 layers"),
        ({"layers": "head"}, r"teacher 0's 'head' gives shape \(1, 3\), not \(N, C, H, W\)"),
        ({"rate": 0.01}, "rate 0.01 of 8 channels leaves no factor channel"),
        ({"input_shape": (3, 8, 8)}, "does not take an input of shape"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        module_of(4, 6, **options)


def test_the_frozen_teachers_are_printed():
    assert "(teachers, frozen): Frozen(TeacherEnsemble)" in repr(module_of(4))
