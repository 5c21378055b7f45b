"""Batches whose numbers are not finite, left out as if they had never come."""

import copy
import math
import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import precision as precisions
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import (
    Batch,
    CompressionBaseline,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    KDModule,
    MEALV2Module,
    MovingAverage,
    PastModel,
    RegressionModule,
    SelfKDModule,
    StoredPast,
    SupervisedModule,
)
from distill_lightning.errors import InputError, NonFiniteError
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy

CLASSES = 3
INPUTS = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % CLASSES
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
}
# Called so since Lightning 2.
MixedPrecision = getattr(precisions, "MixedPrecision", None) or precisions.MixedPrecisionPlugin
WAS_SKIPPED = "ignore:.* batches of epoch .* were skipped"
pytestmark = pytest.mark.filterwarnings(WAS_SKIPPED)


def supervised(**options):
    return SupervisedModule(TinyNet(), num_classes=CLASSES, nonfinite="skip", **options)


def kd(**options):
    return KDModule(TinyNet(), TinyNet(), num_classes=CLASSES, nonfinite="skip", **options)


def feed(**options):
    return FEEDModule(
        TinyNet(), TinyNet(), num_classes=CLASSES, student_layer="features", beta=1.0, nonfinite="skip", **options
    )


def meal(**options):
    discriminator = FixedDiscriminator(mode="adversarial")
    teachers, options["nonfinite"] = [TinyNet(), TinyNet()], "skip"
    return MEALV2Module(TinyNet(), teachers, num_classes=CLASSES, discriminator=discriminator, **options)


def xcl(**options):
    return ExtracurricularModule(TinyNet(), TinyNet(), num_classes=CLASSES, nonfinite="skip", **options)


def self_kd(past, **options):
    return SelfKDModule(TinyNet(), num_classes=CLASSES, past=past, nonfinite="skip", **options)


def baseline(**options):
    return CompressionBaseline(TinyNet(), num_classes=CLASSES, nonfinite="skip", **options)


METHODS = {
    "supervised": supervised,
    "kd": kd,
    "feed": feed,
    "meal": meal,
    "xcl": xcl,
    "past model": partial(self_kd, PastModel()),
    "moving average": partial(self_kd, MovingAverage(0.5)),
    "baseline": baseline,
}


def loader(*bad, value=math.nan):
    """Four batches of eight, the bad ones with a sample that is not finite."""
    inputs = INPUTS.clone()
    for number in bad:
        inputs[8 * number + 3] = value
    return DataLoader(TensorDataset(inputs, LABELS), batch_size=8)


def without(*bad):
    """The batches that are left of it."""
    rows = [row for row in range(32) if row // 8 not in bad]
    return DataLoader(TensorDataset(INPUTS[rows], LABELS[rows]), batch_size=8)


def fitted(module, data, **options):
    """Without validation, whose loader is there."""
    trainer = tiny_trainer(limit_val_batches=0, **options)
    trainer.fit(module, data, data)
    return trainer


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [(1,), (0, 3), (1, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_rest_is_trained_on_as_if_the_batch_were_not_there(method, bad, value):
    """Parameters, BatchNorm's statistics, the optimiser's state and the epoch's means: bit for bit."""
    if method == "xcl":
        # What is drawn depends on a batch's place in the epoch.
        bad = tuple(range(4 - len(bad), 4))
    module = METHODS[method](optimizer=OPTIMIZERS["adamw"])
    alone = copy.deepcopy(module)
    trainer, other = fitted(module, loader(*bad, value=value)), fitted(alone, without(*bad))
    assert same(module.state_dict(), alone.state_dict())
    for key, state in trainer.optimizers[0].state_dict()["state"].items():
        assert same(state, other.optimizers[0].state_dict()["state"][key])
    logged = dict(trainer.callback_metrics)
    assert float(logged.pop("train/skipped_batches")) == len(bad)
    assert float(other.callback_metrics["train/skipped_batches"]) == 0
    for name, mean in logged.items():
        assert torch.equal(mean, other.callback_metrics[name]), name


class Snapshots(pl.Callback):
    """What there is before and after every batch."""

    def __init__(self):
        self.before, self.after = [], []

    @staticmethod
    def take(trainer, module):
        states = trainer.optimizers[0].state_dict()["state"]
        return copy.deepcopy({
            **module.state_dict(),
            **{f"{key}.{name}": value for key, state in states.items() for name, value in state.items()
               if isinstance(value, torch.Tensor)},
        })  # fmt: skip

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(self.take(trainer, pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(self.take(trainer, pl_module))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_batch_changes_nothing(optimizer):
    """Not even by the momentum or the weight decay that an optimiser goes on by without a gradient."""
    snapshots = Snapshots()
    fitted(supervised(optimizer=OPTIMIZERS[optimizer]), loader(1, 2), callbacks=[snapshots])
    unchanged = [same(before, after) for before, after in zip(snapshots.before, snapshots.after, strict=True)]
    assert unchanged == [False, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "steps"), [((0,), [1, 3]), ((1,), [1, 3]), ((0, 1), [3]), ((1, 2), [1, 3]), ((), [1, 3])]
)
def test_accumulated_gradients_are_of_the_batches_that_are_left(bad, steps):
    module = supervised(optimizer=OPTIMIZERS["sgd"])
    alone, snapshots = copy.deepcopy(module), Snapshots()
    fitted(module, loader(*bad), accumulate_grad_batches=2, callbacks=[snapshots])
    pairs = enumerate(zip(snapshots.before, snapshots.after, strict=True))
    moved = [n for n, (one, two) in pairs if not torch.equal(one["student.head.weight"], two["student.head.weight"])]
    assert moved == steps
    # By hand.
    optimizer = OPTIMIZERS["sgd"](alone.parameters())
    alone.train()
    for number in range(4):
        if number not in bad:
            rows = slice(8 * number, 8 * number + 8)
            (nn.functional.cross_entropy(alone.student(INPUTS[rows]), LABELS[rows]) / 2).backward()
        if number in steps:
            optimizer.step()
            optimizer.zero_grad()
    assert same(module.student.state_dict(), alone.student.state_dict())


class Broken(TinyNet):
    """Gives nan for inputs that are marked by their first pixel."""

    def forward(self, inputs):
        return super().forward(inputs) + torch.where(inputs[:, 0, 0, 0] == 0.5, math.nan, 0.0)[:, None]


def marked(row):
    inputs = INPUTS.clone()
    inputs[row, 0, 0, 0] = 0.5
    return DataLoader(TensorDataset(inputs, LABELS), batch_size=8)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_teachers_answer_that_is_not_finite_is_skipped(weight):
    module = KDModule(TinyNet(), [TinyNet(), Broken()], num_classes=CLASSES, nonfinite="skip", hard_label_weight=weight)
    with pytest.warns(UserWarning, match=r"1 of 4 batches of epoch 1 .* teacher 1 \(Broken\) in batch 2"):
        trainer = fitted(module, marked(17))
    assert all(value.isfinite().all() for value in trainer.callback_metrics.values())
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_the_warning_names_the_first_term_and_its_samples():
    class Exploding(SupervisedModule):
        def terms(self, batch):
            factor = math.inf if self.trainer.fit_loop.batch_idx > 1 else 1.0
            terms = super().terms(batch)
            return {**terms, "more": factor * terms["ce"]}

        def weights(self):
            return {"ce": 1.0, "more": 1.0}

    module = Exploding(TinyNet(), num_classes=CLASSES, nonfinite="skip")
    message = r"2 of 3 batches of epoch 1 were skipped .*, the first for train/more in batch 2 \(samples \d+, .*\)$"
    with pytest.warns(UserWarning, match=message.replace("2 of 3", "1 of 3")):
        tiny_trainer().fit(module, datamodule=TinyDataModule())


def test_an_epoch_of_nothing_else_stops():
    with pytest.raises(NonFiniteError, match="4 of 4 batches of epoch 1 were skipped .*: mend the data") as caught:
        fitted(supervised(), loader(0, 1, 2, 3))
    assert "\n" not in str(caught.value)


def test_nothing_is_told_where_nothing_was_skipped():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*skipped")
        assert float(fitted(supervised(), loader()).callback_metrics["train/skipped_batches"]) == 0


def test_by_default_it_stops_and_logs_no_number():
    module = SupervisedModule(TinyNet(), num_classes=CLASSES)
    assert "train/skipped_batches" not in fitted(module, loader()).callback_metrics
    with pytest.raises(NonFiniteError, match="hold nan or inf"):
        fitted(module, loader(2))


@pytest.mark.slow
def test_the_past_keeps_no_row_that_is_not_finite():
    """Those of the next epoch would not be finite either."""

    class Sometimes(pl.Callback):
        """Breaks a batch of the first epoch alone."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx == 1:
                batch.input[2] = math.nan

    module = self_kd(StoredPast())
    trainer = tiny_trainer(max_epochs=3, callbacks=[Sometimes()])
    trainer.fit(module, datamodule=TinyDataModule())
    assert float(trainer.callback_metrics["train/skipped_batches"]) == 0
    assert float(trainer.callback_metrics["train/known_fraction"]) == 1
    assert math.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.slow
@pytest.mark.lightning(since=(2, 1))
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_in_every_precision(precision):
    snapshots = Snapshots()
    fitted(supervised(optimizer=OPTIMIZERS["adamw"]), loader(1), callbacks=[snapshots], precision=precision)
    assert [same(*pair) for pair in zip(snapshots.before, snapshots.after, strict=True)] == [False, True, False, False]


@pytest.mark.slow
def test_a_gradient_scaler_is_left_alone():
    plugin, snapshots = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), Snapshots()
    fitted(supervised(optimizer=OPTIMIZERS["sgd"]), loader(2), plugins=[plugin], callbacks=[snapshots])
    assert same(snapshots.before[2], snapshots.after[2])
    assert not same(snapshots.before[3], snapshots.after[3])
    assert plugin.scaler.get_scale() >= 2.0**16


def test_gradients_are_clipped_as_ever():
    module = supervised(optimizer=OPTIMIZERS["sgd"])
    alone = copy.deepcopy(module)
    fitted(module, loader(1), gradient_clip_val=1e-3)
    fitted(alone, without(1), gradient_clip_val=1e-3)
    assert same(module.state_dict(), alone.state_dict())


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(InputError, match="nonfinite must be one of stop, skip, got 'ignore'"):
        SupervisedModule(TinyNet(), num_classes=CLASSES, nonfinite="ignore")
    with pytest.raises(InputError, match="LBFGS does so several times: take another, or leave nonfinite out"):
        fitted(supervised(optimizer=partial(torch.optim.LBFGS, lr=0.1)), loader())


def test_without_a_trainer_nothing_is_skipped():
    assert supervised().training_step(Batch(INPUTS[:4] * math.nan, LABELS[:4]), 0).isnan()


def test_a_regression_skips_too():
    module = RegressionModule(TinyNet(None, num_targets=2), num_targets=2, nonfinite="skip")
    inputs = INPUTS.clone()
    inputs[9] = math.inf
    data = DataLoader(TensorDataset(inputs, torch.zeros(32, 2)), batch_size=8)
    assert float(fitted(module, data).callback_metrics["train/skipped_batches"]) == 1
    assert all(value.isfinite().all() for value in module.state_dict().values())


class Halves(pl.LightningDataModule):
    """Batches of eight, of which each of two processes gets its half; one process's third batch is broken."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        rows = [row for row in range(32) if row % 8 // (8 // world) == rank or world == 1]
        return DataLoader(TensorDataset(self.inputs[rows], LABELS[rows]), batch_size=8 // world)

    val_dataloader = train_dataloader


def grouped(**options):
    return SupervisedModule(TinyNet(norm="group"), num_classes=CLASSES, nonfinite="skip", **options)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("row", [17, 22, 30])
def test_two_processes_skip_together_as_one_does(accumulated, row):
    inputs = INPUTS.clone()
    inputs[row] = math.nan
    together = grouped(optimizer=OPTIMIZERS["sgd"])
    alone = copy.deepcopy(together)
    options = {
        "accumulate_grad_batches": accumulated,
        "use_distributed_sampler": False,
        "max_epochs": 2,
        "limit_val_batches": 0,
    }
    single = tiny_trainer(**options)
    single.fit(alone, datamodule=Halves(inputs))
    double = tiny_trainer(devices=2, strategy=process_strategy(), callbacks=[LeaveTheGroup()], **options)
    double.fit(together, datamodule=Halves(inputs))
    assert float(double.callback_metrics["train/skipped_batches"]) == 1
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, together.state_dict()[name], rtol=1e-4, atol=1e-6)
    for name, value in single.callback_metrics.items():
        torch.testing.assert_close(value, double.callback_metrics[name], rtol=1e-4, atol=1e-6)
