"""Images of other channels than a network reads, and batches of one under BatchNorm: one line, no traceback."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import (
    Batch,
    DigitsDataModule,
    IndexedDataModule,
    InputError,
    KDModule,
    ParaphraserModule,
    SupervisedModule,
    TeacherStore,
)
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyNet, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def loader_of(channels, *, samples=6, batch_size=3, size=8, labelled=True, **options):
    torch.manual_seed(0)
    images, labels = torch.rand(samples, channels, size, size), torch.arange(samples) % 3
    dataset = TensorDataset(images, labels) if labelled else images
    return DataLoader(dataset, batch_size=batch_size, **options)


class Pairs(pl.LightningDataModule):
    """A data module of one's own."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def train_dataloader(self):
        return loader_of(**self.options)


def refusal_of(function, *arguments, **named):
    with pytest.raises(InputError) as refused:
        function(*arguments, **named)
    assert "\n" not in str(refused.value)
    return refused.value


# Channels

WAYS = {
    (3, 1): "build the network with in_channels=1 (timm: in_chans=1), or let the data module give images of 3, "
    "image.expand(3, -1, -1)",
    (1, 3): "build the network with in_channels=3 (timm: in_chans=3), or let the data module give images of 1, "
    "image.mean(0, keepdim=True)",
    (3, 4): "build the network with in_channels=4 (timm: in_chans=4), or let the data module give images of 3",
}


def expected(who, reads, has, where):
    channels = "1 channel" if reads == 1 else f"{reads} channels"
    return (
        f"{who} (TinyNet) reads {channels} by its first layer, Conv2d 'features.0', which gets {has} of the inputs "
        f"(N, {has}, 8, 8) of {where} batch 0: {WAYS[reads, has]}"
    )


@pytest.mark.parametrize(("reads", "has"), WAYS)
@pytest.mark.parametrize(
    ("method", "where"),
    [("fit", "training"), ("validate", "validation"), ("test", "test"), ("predict", "prediction")],
)
def test_a_student_of_other_channels_is_named_everywhere(reads, has, method, where):
    module, trainer = SupervisedModule(TinyNet(in_channels=reads), num_classes=3), tiny_trainer()
    refused = refusal_of(getattr(trainer, method), module, loader_of(has))
    assert str(refused) == f"SupervisedModule: {expected('the student', reads, has, where)}"
    # What torch had said is not lost.
    assert "channels" in str(refused.__cause__)


def test_predictions_of_plain_images_are_explained_too():
    module = SupervisedModule(TinyNet(in_channels=3), num_classes=3)
    refused = refusal_of(tiny_trainer().predict, module, loader_of(1, labelled=False))
    assert str(refused) == f"SupervisedModule: {expected('the student', 3, 1, 'prediction')}"


@pytest.mark.parametrize("has", [1, 3])
@pytest.mark.parametrize(("method", "where"), [("fit", "training"), ("validate", "validation")])
def test_a_teacher_of_other_channels_is_named(has, method, where):
    reads = 4 - has
    teachers = [TinyNet(in_channels=has), TinyNet(in_channels=reads)]
    module = KDModule(TinyNet(in_channels=has), teachers, num_classes=3)
    refused = refusal_of(getattr(tiny_trainer(), method), module, loader_of(has))
    assert str(refused) == f"KDModule: {expected('teacher 1', reads, has, where)}"


def test_recording_a_store_names_the_teacher(tmp_path):
    module = KDModule(TinyNet(10), TeacherStore(tmp_path, [TinyNet(10, in_channels=3)]), num_classes=10)
    refused = refusal_of(record, tiny_trainer(), module, DigitsDataModule(image_size=8, views=1))
    assert expected("teacher 0", 3, 1, "recorded") in str(refused)


@pytest.mark.parametrize(("method", "where"), [("fit", "training"), ("validate", "validation")])
def test_a_teacher_of_paraphrasers_is_named(method, where):
    module = ParaphraserModule([TinyNet(), TinyNet()], layers="features", input_shape=(1, 8, 8))
    # Fits what was said, and not the data.
    module.teachers[0].networks[1].features[0] = nn.Conv2d(3, 4, 3, padding=1)
    refused = refusal_of(getattr(tiny_trainer(), method), module, loader_of(1))
    assert str(refused) == f"ParaphraserModule: {expected('teacher 1', 3, 1, where)}"


@pytest.mark.parametrize("wrap", [lambda data: data, IndexedDataModule])
def test_with_any_data_module(wrap):
    module = SupervisedModule(TinyNet(in_channels=3), num_classes=3)
    refused = refusal_of(tiny_trainer().fit, module, datamodule=wrap(Pairs(channels=1)))
    assert expected("the student", 3, 1, "training") in str(refused)
    module = SupervisedModule(TinyNet(10, in_channels=3), num_classes=10)
    refused = refusal_of(tiny_trainer(num_sanity_val_steps=1).fit, module, datamodule=DigitsDataModule(image_size=8))
    assert expected("the student", 3, 1, "validation") in str(refused)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 3)),
            "reads 192 values by its first layer, Linear '1', which gets 64 of the inputs (N, 1, 8, 8) of training "
            "batch 0: build the network for such inputs, or let the data module give others",
        ),
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3)),
            "reads 3 channels by its first layer, BatchNorm2d '0', which gets 1 of the inputs",
        ),
        (
            nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 3, 8), nn.Flatten()),
            "reads 3 channels by its first layer, Conv1d '1', which gets 1 of the inputs",
        ),
    ],
)
def test_whatever_the_first_layer_is(network, message):
    refused = refusal_of(tiny_trainer().fit, SupervisedModule(network, num_classes=3), loader_of(1))
    assert message in str(refused)


class Repeats(nn.Module):
    """Makes three channels of one itself: what stands first in it does not run first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)
        self.runs = 0

    def forward(self, images):
        self.runs += 1
        return self.head(self.conv(images.expand(-1, 3, -1, -1)).mean(dim=(2, 3)))


def test_a_network_that_makes_its_channels_itself_is_let_alone_and_run_once():
    network = Repeats()
    tiny_trainer(max_epochs=1).fit(SupervisedModule(network, num_classes=3), loader_of(1))
    assert network.runs == 2


class Broken(nn.Module):
    """Fails by itself, behind its first layer."""

    def __init__(self, error):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.error, self.runs = error, 0

    def forward(self, images):
        self.runs += 1
        self.conv(images)
        raise self.error


@pytest.mark.parametrize(
    ("error", "runs"),
    [(RuntimeError("mine"), 2), (ValueError("mine"), 2), (KeyError("mine"), 1), (InputError("mine"), 1),
     (torch.OutOfMemoryError("mine"), 1)],
)  # fmt: skip
def test_other_failures_stay_what_they_are(error, runs):
    network = Broken(error)
    with pytest.raises(type(error)) as raised:
        SupervisedModule(network, num_classes=3).training_step((torch.rand(2, 1, 8, 8), torch.tensor([0, 1])), 0)
    assert raised.value is error
    assert network.runs == runs


def test_a_wrong_layer_behind_the_first_is_the_networks_own_matter():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels instead"):
        SupervisedModule(network, num_classes=3).predict_step(Batch(torch.rand(2, 1, 8, 8)))


def test_no_hook_stays():
    module = KDModule(TinyNet(in_channels=3), TinyNet(in_channels=3), num_classes=3)
    refusal_of(module.predict_step, torch.rand(2, 1, 8, 8))
    every = [layer for network in (module.student, *module.teachers) for layer in network.modules()]
    assert not any(layer._forward_pre_hooks for layer in every)


@pytest.mark.slow
def test_compiled_networks_are_explained_as_well():
    module = SupervisedModule(TinyNet(in_channels=3), num_classes=3, compile=True)
    refused = refusal_of(tiny_trainer().fit, module, loader_of(1))
    assert expected("the student", 3, 1, "training") in str(refused)


# A batch of one under BatchNorm


def dense(*, norm=True):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3)
    )


def one_value(where, layer="BatchNorm1d 'student.2'"):
    return (
        f"{layer} cannot be trained on {where}, which leaves it one value per channel: where that is the last, "
        "smaller batch of an epoch, give the data module (or its DataLoader) drop_last=True, else a larger batch_size"
    )


def test_a_last_batch_of_one_is_told_and_drop_last_leaves_it_out():
    module = SupervisedModule(dense(), num_classes=3)
    refused = refusal_of(tiny_trainer(max_epochs=1).fit, module, loader_of(1, samples=7))
    assert str(refused) == f"SupervisedModule: {one_value('training batch 2')}"
    assert "Expected more than 1 value per channel" in str(refused.__cause__)
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(SupervisedModule(dense(), num_classes=3), loader_of(1, samples=7, drop_last=True))
    assert trainer.global_step == 2


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_data_modules_have_the_option(drop_last):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    data = DigitsDataModule(image_size=8, subset=17, batch_size=8, drop_last=drop_last)
    module, trainer = SupervisedModule(network, num_classes=10), tiny_trainer(max_epochs=1, limit_val_batches=1)
    if drop_last:
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 2
    else:
        assert one_value("training batch 2") in str(refusal_of(trainer.fit, module, datamodule=data))


class WithNorm(SupervisedModule):
    """Has a BatchNorm beside the student."""

    def __init__(self):
        super().__init__(dense(norm=False), num_classes=3)
        self.norms = nn.ModuleList([nn.BatchNorm1d(64)])

    def terms(self, batch):
        return super().terms(batch.replace(input=self.norms[0](batch.input.flatten(1))))


def test_a_layer_beside_the_student_is_named():
    layer = "BatchNorm1d 'norms.0'"
    refused = refusal_of(WithNorm().training_step, (torch.rand(1, 1, 8, 8), torch.tensor([0])), 4)
    assert str(refused) == f"WithNorm: {one_value('training batch 4', layer)}"


@pytest.mark.parametrize(
    "network",
    [
        # Feature maps have several values per channel.
        TinyNet(),
        dense(norm=False),
        nn.Sequential(*dense()[:2], nn.BatchNorm1d(8).eval().requires_grad_(requires_grad=False), *dense()[3:]),
    ],
)
def test_where_nothing_is_wrong_a_batch_of_one_trains(network):
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(SupervisedModule(network, num_classes=3), loader_of(1, samples=7))
    assert trainer.global_step == 3


def test_a_batch_of_one_is_evaluated():
    module, trainer = SupervisedModule(dense(), num_classes=3), tiny_trainer()
    trainer.validate(module, loader_of(1, samples=4), verbose=False)
    assert [len(output) for output in trainer.predict(module, loader_of(1, samples=4))] == [3, 1]
