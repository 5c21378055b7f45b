"""A training that is killed and resumed, twice and anywhere, against the undisturbed one."""

import re
import tempfile
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint
from pytorch_lightning.loggers import Logger
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import (
    InputError,
    KDModule,
    NoSearch,
    PastModel,
    SelfKDDetectionModule,
    SelfKDModule,
    SelfKDTranslationModule,
    SmallTransformer,
    SupervisedModule,
    translation_transformer,
)
from distill_lightning.testing import (
    TinyDataModule,
    TinyDetectionDataModule,
    TinyFasterRCNN,
    TinyNet,
    TinyTranslationDataModule,
    tiny_trainer,
)
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.1)


class Lines(Logger):
    """What was logged last under each name and step."""

    name, version = "lines", 0

    def __init__(self):
        super().__init__()
        self.known = {}

    def log_metrics(self, metrics, step=None):
        self.known |= {(name, step): float(value) for name, value in metrics.items()}

    def log_hyperparams(self, params):
        pass


class KilledError(Exception):
    pass


class Watch(Callback):
    """Notes what happens, and the learning rate."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(("batch", trainer.current_epoch, batch_idx, trainer.optimizers[0].param_groups[0]["lr"]))

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(("validation", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("end", trainer.current_epoch, trainer.global_step))


class Kill(Checkpoint):
    """Kills at a moment, counted; it stands behind what makes checkpoints."""

    def __init__(self, at):
        self.left = at

    def count(self, *args):
        self.left -= 1
        if self.left == 0:
            raise KilledError

    on_train_batch_start = on_train_batch_end = on_validation_batch_end = on_validation_end = count


class PlainData(pl.LightningDataModule):
    """A DataLoader without a state, in a fixed order."""

    def __init__(self, batch_size=4, *, shuffle=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.samples = TensorDataset(torch.randn(24, 1, 8, 8, generator=generator), torch.arange(24) % 3)
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self):
        return DataLoader(self.samples, self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(self.samples, 12)


class NoisyData(PlainData):
    """Whose batches are drawn in the training's own process."""

    def train_dataloader(self):
        def noisy(samples):
            inputs, targets = torch.utils.data.default_collate(samples)
            return inputs + 0.1 * torch.randn_like(inputs), targets

        return DataLoader(self.samples, self.batch_size, collate_fn=noisy)


def transformer(dropout=0.3):
    return SmallTransformer(3, length=8, input_size=8, width=8, depth=1, heads=2, feedforward=8, dropout=dropout)


def module_of(kind):
    torch.manual_seed(0)
    if kind == "self_kd":
        return SelfKDModule(TinyNet(), num_classes=3, optimizer=sgd)
    if kind == "drawing":
        return SupervisedModule(transformer(), num_classes=3, optimizer=sgd)
    schedule = plateau if kind == "plateau" else None
    return SupervisedModule(TinyNet(), num_classes=3, optimizer=sgd, lr_scheduler=schedule)


def run(folder, lines, kind="plain", data=None, *, kill=0, every=None, ckpt_path=None, **options):
    """Train for three epochs of 6 steps; returns what the training ended with, or ``None`` if it was killed."""
    module, watch = module_of(kind), Watch()
    # A training that goes on draws what comes next all the same.
    torch.manual_seed(1 if ckpt_path is None else 7)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, **options}
    keep = {"save_on_train_epoch_end": False} if every is None else {"every_n_train_steps": every}
    keeper = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **keep)
    trainer = tiny_trainer(
        callbacks=[watch, keeper, Kill(kill)],
        enable_checkpointing=True,
        logger=lines,
        log_every_n_steps=1,
        **options,
    )
    try:
        trainer.fit(module, datamodule=data or TinyDataModule(batch_size=4), ckpt_path=ckpt_path)
    except KilledError:
        return None
    return module.state_dict(), trainer.global_step, watch.seen


def newest(folder):
    return max(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def assert_undisturbed(kills, data_of, **options):
    whole_lines, lines = Lines(), Lines()
    with tempfile.TemporaryDirectory() as folder:
        weights, steps, seen = run(folder, whole_lines, data=data_of(), **options)
    with tempfile.TemporaryDirectory() as folder:
        for kill in kills:
            assert run(folder, lines, data=data_of(), kill=kill, ckpt_path=newest(folder), **options) is None
        resumed_weights, resumed_steps, resumed = run(
            folder, lines, data=data_of(), ckpt_path=newest(folder), **options
        )
    assert resumed_steps == steps
    assert resumed == seen[len(seen) - len(resumed) :]
    assert all(torch.equal(value, resumed_weights[name]) for name, value in weights.items())
    assert lines.known == whole_lines.known


# An epoch has 6 batches, each counted as it starts and ends, 2 of validation and the validation's end: 15 moments. The
# first kill comes right after the checkpoint of the first epoch's last batch, in its validation, in the second epoch.
KILLS = [(12, 14), (13, 9), (21, 15)]


@pytest.mark.slow
@pytest.mark.parametrize("data_of", [partial(TinyDataModule, batch_size=4), PlainData], ids=["own", "plain"])
@pytest.mark.parametrize("every", [1, 3, 4, None])
@pytest.mark.parametrize("kills", KILLS)
def test_a_training_that_was_killed_twice_is_the_undisturbed_one(every, data_of, kills):
    if every is None:
        kills = (kills[0] + 10, 9)
    assert_undisturbed(kills, data_of, every=every)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("self_kd", {"every": 3}),
        ("self_kd", {"every": 1, "val_check_interval": 0.5}),
        ("plateau", {"every": 3}),
        ("plateau", {"every": None}),
        ("plain", {"every": 2, "limit_val_batches": 0}),
        ("plain", {"every": 2, "accumulate_grad_batches": 2}),
        ("plain", {"every": 1, "max_epochs": -1, "max_steps": 14}),
        ("plain", {"every": 3, "check_val_every_n_epoch": 2}),
    ],
)
def test_also_with_parts_schedules_and_other_lengths(kind, options):
    assert_undisturbed((24, 11), partial(TinyDataModule, batch_size=4), kind=kind, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "data_of", [partial(TinyDataModule, batch_size=4), PlainData, NoisyData], ids=["own", "plain", "noisy"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"every": 3, "num_sanity_val_steps": 2},
        {"every": 4, "limit_val_batches": 0},
        {"every": 1, "val_check_interval": 0.5},
        {"every": 2, "val_check_interval": 2},
        {"every": None, "check_val_every_n_epoch": 2},
    ],
)
def test_also_where_the_network_draws_random_numbers(options, data_of):
    assert_undisturbed((24, 11), data_of, kind="drawing", **options)


def sampling_detector():
    network = TinyFasterRCNN(2)
    network.rpn.fg_bg_sampler.batch_size_per_image = network.roi_heads.fg_bg_sampler.batch_size_per_image = 6
    return network


def kd():
    return KDModule(transformer(), [transformer(dropout=0.0)], num_classes=3, optimizer=sgd)


def self_kd_translation():
    sizes = {"width": 8, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "feedforward": 8, "max_length": 8}
    student = translation_transformer(12, dropout=0.3, **sizes)
    return SelfKDTranslationModule(
        student, num_classes=12, pad_id=0, past=PastModel(), beam=NoSearch(), bleu_every=0, optimizer=sgd
    )


def self_kd_detection():
    return SelfKDDetectionModule(sampling_detector(), num_classes=2, past=PastModel(), alpha_T=0.7, optimizer=sgd)


class Seed(Callback):
    """Other numbers in every process, as where each of them is started by itself."""

    def __init__(self, seed):
        self.seed = seed

    def on_fit_start(self, trainer, pl_module):
        torch.manual_seed(self.seed + trainer.global_rank)


class SaveOften(Checkpoint):
    """A checkpoint of every moment at which Lightning makes one."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, moment):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}-{moment}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch")

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, "training")


def trained(build, data, seed, *, callbacks=(), ckpt_path=None, **options):
    """What a training of two epochs of 3 steps ends with."""
    torch.manual_seed(0)
    module = build()
    callbacks = [Seed(seed), *callbacks]
    trainer = tiny_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=len(callbacks) > 1, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.state_dict()


KINDS = {"2-batch", "3-batch", "3-validation", "3-epoch", "6-training"}


def assert_goes_on(build, data_of, folder, callbacks=(), only=None, **options):
    """From every checkpoint, or some, and with another seed, a training ends as the undisturbed one."""
    whole = trained(build, data_of(), 1, callbacks=[*callbacks, SaveOften(folder)], **options)
    other = trained(build, data_of(), 7, callbacks=callbacks, **options)
    assert any(not torch.equal(value, other[name]) for name, value in whole.items()), "it draws nothing"
    paths = sorted(folder.glob("*.ckpt"))
    assert {path.stem for path in paths} >= KINDS
    for path in paths:
        if only is not None and path.stem not in only:
            continue
        resumed = trained(build, data_of(), 7, callbacks=callbacks, ckpt_path=path, **options)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), path.stem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "data_of"),
    [
        (kd, partial(TinyDataModule, batch_size=8)),
        (self_kd_translation, TinyTranslationDataModule),
        (self_kd_detection, TinyDetectionDataModule),
    ],
)
def test_random_numbers_go_on_where_the_checkpoint_was_made(tmp_path, build, data_of):
    assert_goes_on(build, data_of, tmp_path)


@pytest.mark.slow
def test_random_numbers_of_every_process_go_on(tmp_path):
    options = {"devices": 2, "strategy": process_strategy(), "callbacks": [LeaveTheGroup()], "only": KINDS}
    assert_goes_on(partial(module_of, "drawing"), partial(TinyDataModule, batch_size=4), tmp_path, **options)


@pytest.mark.slow
def test_what_is_left_of_an_epoch_is_done_first(tmp_path):
    """Killed after the checkpoint of an epoch's last batch: its validation and its end are still to come."""
    assert run(tmp_path, Lines(), every=6, kill=12) is None
    _, _, seen = run(tmp_path, Lines(), every=6, ckpt_path=newest(tmp_path))
    assert seen[:3] == [("validation", 0, 6), ("end", 0, 6), ("batch", 1, 0, 0.1)]


def stopped(folder, data, *, at=4, **options):
    """A checkpoint after some batches of 4 samples."""
    trainer = tiny_trainer(limit_val_batches=0, **options)

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx + 1 == at:
                trainer.save_checkpoint(folder / "stopped.ckpt")

    trainer.callbacks.append(Save())
    trainer.fit(module_of("plain"), datamodule=data)
    return folder / "stopped.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("data_of", [TinyDataModule, PlainData, partial(PlainData, shuffle=True)])
def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(tmp_path, data_of):
    path = stopped(tmp_path, data_of(batch_size=4))
    expected = (
        "after 4 batches of an epoch, where the training data came in 6 batches of 4 samples in 1 process, and now "
        "they come in 3 batches of 8 samples in 1 process"
    )
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        tiny_trainer(max_epochs=2).fit(module_of("plain"), datamodule=data_of(batch_size=8), ckpt_path=path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_another_number_of_processes_in_the_middle_of_an_epoch_is_refused(tmp_path):
    path = stopped(tmp_path, TinyDataModule(batch_size=4))
    checkpoint = torch.load(path, weights_only=True)
    (way,) = checkpoint["place"]["batches"]
    assert way == {"size": 4, "number": 6, "processes": 1}
    way |= {"number": 3, "processes": 2}
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="came in 3 batches of 4 samples in 2 processes, and now they come in 6"):
        tiny_trainer(max_epochs=2).fit(module_of("plain"), datamodule=TinyDataModule(batch_size=4), ckpt_path=path)


@pytest.mark.slow
@pytest.mark.parametrize("data_of", [TinyDataModule, PlainData])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_another_batch_size_after_an_epoch_is_not(tmp_path, data_of, batch_size):
    run(tmp_path, Lines(), data=data_of(batch_size=4), every=6, kill=12)
    _, steps, seen = run(tmp_path, Lines(), data=data_of(batch_size=batch_size), ckpt_path=newest(tmp_path))
    assert steps == 6 + 2 * 24 // batch_size
    assert seen[:2] == [("validation", 0, 6), ("end", 0, 6)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_loader_refuses_other_batches_to_any_module(tmp_path):
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = TinyNet()

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch.input), batch.target)

        def configure_optimizers(self):
            return sgd(self.parameters())

    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = tiny_trainer(callbacks=[keeper], enable_checkpointing=True, limit_val_batches=0)
    trainer.fit(Plain(), datamodule=TinyDataModule(batch_size=4))
    trainer, data = tiny_trainer(limit_val_batches=0), TinyDataModule(batch_size=8)
    with pytest.raises(InputError, match=r"after 4 batches of an epoch, with batch_size=4 in 1 .*batch_size=8"):
        trainer.fit(Plain(), datamodule=data, ckpt_path=tmp_path / "step=4.ckpt")


@pytest.mark.slow
def test_gradients_that_no_checkpoint_holds_are_told_of(tmp_path):
    path = stopped(tmp_path, TinyDataModule(batch_size=4), at=3, accumulate_grad_batches=2)
    trainer = tiny_trainer(accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="made between two optimiser steps, and the gradients"):
        trainer.fit(module_of("plain"), datamodule=TinyDataModule(batch_size=4), ckpt_path=path)
