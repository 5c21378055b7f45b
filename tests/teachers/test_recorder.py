"""``record``: the store that it leaves is the one that training would have filled, whoever fills it."""

import errno
import json
import threading
import time

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch.nn import functional as F

from distill_lightning import Batch, FEEDModule, IndexedDataModule, InputError, KDModule, TeacherStore
from distill_lightning.cli import main
from distill_lightning.errors import DiskError
from distill_lightning.storage.rows import RowFile
from distill_lightning.teachers.recorder import record
from distill_lightning.teachers.teachers import Teachers
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def teachers_of(count=2):
    torch.manual_seed(5)
    networks = [TinyNet(width=8) for _ in range(count)]
    for network in networks:
        torch.nn.init.normal_(network.head.weight)
    return networks


def kd(teachers):
    torch.manual_seed(0)
    return KDModule(TinyNet(), teachers, num_classes=3, temperature=2.0)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def recorded(folder, *, views=2, size=7, data=None, teachers=None, **options):
    store = TeacherStore(folder, teachers or teachers_of(), shard_size=size)
    return record(tiny_trainer(**options), kd(store), data or TinyDataModule(views=views)), store


def test_everything_is_asked_once_and_kept(tmp_path):
    networks, sizes = teachers_of(), []
    networks[0].register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    done, store = recorded(tmp_path, teachers=networks)
    assert done.answers == sum(sizes) == 48
    assert done.nbytes == 48 * 3 * 2
    assert done.seconds > 0
    assert store.is_complete
    # Shards of 7 in batches of at most 8: no batch reaches into another shard.
    assert sizes == 2 * [7, 7, 7, 3]
    batch = TinyDataModule().dataset("train", augment=True).__getitems__([(5, 0), (23, 1), (5, 1)])
    told = store.read_or_ask(batch, None, device="cpu")["probabilities"]
    with torch.no_grad():
        expected = torch.stack([F.softmax(network.eval()(batch.input) / 2, dim=1) for network in networks]).mean(0)
    assert torch.allclose(told, expected, atol=1e-3)


@pytest.mark.slow
def test_it_leaves_what_training_would_have_filled_up_to_the_last_bit(tmp_path):
    recorded(tmp_path / "ahead", size=8)
    store = TeacherStore(tmp_path / "online", teachers_of(), shard_size=8)
    tiny_trainer(max_epochs=2).fit(kd(store), datamodule=TinyDataModule(views=2))
    ahead, online = files_of(tmp_path / "ahead"), files_of(tmp_path / "online")
    assert ahead.keys() == online.keys()
    assert ahead["header.json"] == online["header.json"]
    batch = TinyDataModule().dataset("train", augment=True).__getitems__([(index, 1) for index in range(24)])
    told = []
    for folder in ("ahead", "online"):
        _, found = recorded(tmp_path / folder, size=8)
        told.append(found.read_or_ask(batch, None, device="cpu")["probabilities"])
    # The batches were others, and so may be the last bits of their arithmetic.
    assert torch.allclose(*told, atol=1e-3)


def test_a_second_call_asks_nothing(tmp_path):
    recorded(tmp_path)
    before = files_of(tmp_path)
    done, store = recorded(tmp_path)
    assert (done.answers, done.nbytes) == (0, 0)
    assert store.is_complete
    assert files_of(tmp_path) == before


def test_only_a_damaged_shard_is_asked_about_again(tmp_path):
    recorded(tmp_path)
    before = files_of(tmp_path)
    path = tmp_path / "view_00001/00002.shard"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    done, _ = recorded(tmp_path)
    assert done.answers == 7
    assert files_of(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("last", range(1, 9))
def test_a_recording_that_was_killed_is_continued(tmp_path, last, monkeypatch):
    recorded(tmp_path / "whole")
    write, written = TeacherStore.write, []

    def killed(store, *args):
        written.append(args)
        if len(written) == last:
            raise KeyError("killed")
        write(store, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherStore, "write", killed)
        with pytest.raises(KeyError, match="killed"):
            recorded(tmp_path / "killed")
    done, _ = recorded(tmp_path / "killed")
    assert done.answers < 48 or last == 1
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 8])
def test_a_disk_that_is_full_is_one_line_and_what_was_written_is_kept(tmp_path, last, monkeypatch):
    recorded(tmp_path / "whole")
    write, written = RowFile.write, []

    def full(*args):
        written.append(args)
        if len(written) >= last:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "write", full)
        line = f"^the disk of the store {tmp_path}/full is full: make room and call again, what is written is kept$"
        with pytest.raises(DiskError, match=line):
            recorded(tmp_path / "full")
    assert len(list((tmp_path / "full").rglob("*.shard"))) == last - 1
    assert not is_writing()
    done, _ = recorded(tmp_path / "full")
    assert done.answers == {2: 41, 8: 3}[last]
    assert files_of(tmp_path / "full") == files_of(tmp_path / "whole")


def is_writing():
    """Whether a recording has left a thread."""
    return any(thread.name.startswith("recorder") for thread in threading.enumerate())


def test_ctrl_c_waits_for_what_is_being_written_and_leaves_no_thread(tmp_path, monkeypatch):
    write, begun, asked = TeacherStore.write, threading.Event(), []

    def slow(*args):
        begun.set()
        time.sleep(0.05)
        write(*args)

    def interrupted(teachers, batch):
        asked.append(batch)
        if len(asked) == 2:
            assert begun.wait(10)
            raise KeyboardInterrupt
        return rows(teachers, batch)

    rows = Teachers.rows_to_store
    with monkeypatch.context() as patch:
        patch.setattr(TeacherStore, "write", slow)
        patch.setattr(Teachers, "rows_to_store", interrupted)
        # Lightning ends the process.
        with pytest.raises(SystemExit):
            recorded(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.shard")] == ["00000.shard"]
    assert not is_writing()
    done, store = recorded(tmp_path)
    assert (done.answers, store.is_complete) == (41, True)
    assert not is_writing()


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    recorded(tmp_path / "whole")
    data = TinyDataModule(views=2)
    data.num_workers = 2
    recorded(tmp_path / "workers", data=data)
    assert files_of(tmp_path / "workers") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    recorded(tmp_path / "one")
    recorded(tmp_path / "two", devices=2, strategy="ddp_fork")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
def test_feature_maps_are_recorded(tmp_path):
    torch.manual_seed(0)
    options = {"num_classes": 3, "student_layer": "features", "beta": 10.0, "input_shape": (1, 8, 8)}
    module = FEEDModule(TinyNet(), TeacherStore(tmp_path, teachers_of()), **options)
    done = record(tiny_trainer(), module, TinyDataModule(views=2))
    assert done.nbytes == 48 * 2 * 16 * 4 * 4 * 2
    alone = FEEDModule(TinyNet(), TeacherStore(tmp_path, fill="never"), **options)
    tiny_trainer(max_epochs=2).fit(alone, datamodule=TinyDataModule(views=2))


@pytest.mark.parametrize("missing", ["store", "networks"])
def test_without_networks_or_a_store_there_is_nothing_to_record(tmp_path, missing):
    given = {"store": teachers_of(), "networks": TeacherStore(tmp_path)}[missing]
    with pytest.raises(InputError, match="record needs a TeacherStore with networks that fill it: give KDModule one"):
        record(tiny_trainer(), kd(given), TinyDataModule(views=2))


def test_endless_views_cannot_be_recorded(tmp_path):
    with pytest.raises(InputError, match="a TeacherStore keeps a number of views"):
        record(tiny_trainer(), kd(TeacherStore(tmp_path, teachers_of())), TinyDataModule())


# The command line


def written(tmp_path, *, store=True, networks=True):
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}}
    given = [network, network] if networks else None
    if store:
        options = {"path": str(tmp_path / "store"), "shard_size": 64, "networks": given}
        given = {"class_path": "TeacherStore", "init_args": options}
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": str(tmp_path), "logger": False,
                    "enable_checkpointing": False, "enable_progress_bar": False},
        "model": {"class_path": "KDModule", "init_args": {"student": network, "teachers": given}},
        "data": {"class_path": "DigitsDataModule", "init_args": {"image_size": 8, "subset": 100, "views": 2}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


@pytest.mark.slow
def test_the_command_fills_the_store_and_fit_needs_no_teachers(tmp_path, capsys):
    config = written(tmp_path)
    assert main(["record", "--config", config]) == 0
    said = capsys.readouterr().out
    assert "Recorded 200 answers of 20 bytes, 0.0 MB in " in said
    assert "store is complete." in said
    assert main(["fit", "--config", written(tmp_path, networks=False)]) == 0


@pytest.mark.slow
def test_the_command_says_in_one_line_what_is_missing(tmp_path, capsys):
    assert main(["record", "--config", written(tmp_path, store=False)]) == 2
    assert (
        "error: record needs a TeacherStore with networks that fill it: give KDModule one as teachers\n"
        in capsys.readouterr().err
    )


def test_a_module_without_teachers_has_nothing_to_record(tmp_path):
    from distill_lightning.cli.lightning_cli import RecordingTrainer

    with pytest.raises(InputError, match="record needs a method whose teachers are a TeacherStore, got Lightning"):
        RecordingTrainer(accelerator="cpu", logger=False).record(pl.LightningModule(), TinyDataModule())


# Data that know of no views and of no fingerprint


class Rows(torch.utils.data.Dataset):
    """Map-style and nothing more: samples are dicts, asked for one by one."""

    def __init__(self, count=24, *, order=None, noise=0.0):
        images, targets = TinyDataModule(samples=count).read()[0]
        self.images = images.float()[order if order is not None else slice(count)] / 255
        self.targets, self.noise = targets, noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return {"image": image + self.noise * torch.rand_like(image), "label": self.targets[index]}


class PlainDataModule(pl.LightningDataModule):
    """What a user has: no views, no indices, no fingerprint."""

    def __init__(self, dataset=None, **options):
        super().__init__()
        self.dataset = dataset or Rows()
        self.options = {"batch_size": 8, "shuffle": True} | options

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.dataset, **self.options)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Rows(), batch_size=8)


class WholeBatches(Rows):
    """Makes batches itself."""

    def __getitem__(self, index):
        assert isinstance(index, list)
        return {"image": self.images[index], "label": self.targets[index]}


class Batched(Rows):
    """Is asked for all samples of a batch at once, and collated by a function of its own."""

    def __getitems__(self, indices):
        return [(self.images[index], self.targets[index]) for index in indices]


def stacked(samples):
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(targets)


def named(folder, teachers=None, **options):
    return kd(TeacherStore(folder, teachers or teachers_of(), shard_size=7, data="rows", **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        PlainDataModule,
        lambda: IndexedDataModule(PlainDataModule()),
        lambda: PlainDataModule(Batched(), collate_fn=stacked),
        lambda: IndexedDataModule(PlainDataModule(Batched(), collate_fn=stacked)),
        lambda: PlainDataModule(
            WholeBatches(),
            batch_size=None,
            shuffle=None,
            sampler=torch.utils.data.BatchSampler(range(24), 8, drop_last=False),
        ),
        lambda: PlainDataModule(
            batch_size=1,
            shuffle=False,
            batch_sampler=torch.utils.data.BatchSampler(range(24), 8, drop_last=False),
        ),
    ],
)
def test_samples_without_views_are_recorded_however_they_are_fetched(tmp_path, make):
    networks = teachers_of()
    module = named(tmp_path, networks)
    assert record(tiny_trainer(), module, make()).answers == 24
    images = Rows().images
    with torch.no_grad():
        expected = torch.stack([F.softmax(network(images) / 2, dim=1) for network in networks]).mean(0)
    batch = Batch(images, None, torch.arange(24))
    answers = module.teachers.store.read_or_ask(batch, None, device="cpu")
    assert torch.allclose(answers["probabilities"], expected, atol=1e-3)


@pytest.mark.slow
def test_any_data_with_indices_and_a_name_are_filled_online_and_read(tmp_path):
    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(float(outputs["loss"]))

    def fit(module):
        losses.clear()
        torch.manual_seed(3)
        data = IndexedDataModule(PlainDataModule())
        tiny_trainer(max_epochs=3, callbacks=[Losses()]).fit(module, datamodule=data)
        return list(losses)

    losses, networks = [], teachers_of()
    online = fit(kd(networks))
    filling = fit(named(tmp_path, networks))
    assert filling == pytest.approx(online, rel=1e-3)
    torch.manual_seed(0)
    store = TeacherStore(tmp_path, fill="never", shard_size=7, data="rows")
    alone = KDModule(TinyNet(), store, num_classes=3, temperature=2.0)
    assert fit(alone) == filling
    assert alone.teachers.store.is_complete


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Rows(order=list(range(23, -1, -1))), "data has other contents"),
        (Rows(order=[1, 0, *range(2, 24)]), "data has other contents"),
        (Rows(order=list(range(1, 25))), "data has other contents"),
        (Rows(20), "samples is 24, not 20"),
    ],
)
def test_other_data_of_the_same_name_are_refused(tmp_path, dataset, message):
    record(tiny_trainer(), named(tmp_path), PlainDataModule())
    with pytest.raises(InputError, match=message):
        record(tiny_trainer(), named(tmp_path), PlainDataModule(dataset))


@pytest.mark.parametrize("kind", [Rows, lambda count, order: Batched(count, order=order)])
def test_two_samples_of_many_that_were_exchanged_are_seen(tmp_path, kind):
    def filled(order):
        record(tiny_trainer(), named(tmp_path), PlainDataModule(kind(40, order=order)))

    filled(list(range(40)))
    # Not among 16 that are spread evenly.
    exchanged = [*range(4), 6, 5, 4, *range(7, 40)]
    with pytest.raises(InputError, match="was made by something else: data has other contents"):
        filled(exchanged)
    filled(list(range(40)))


def test_a_store_says_what_was_looked_at_and_one_without_a_fingerprint_is_refused(tmp_path):
    record(tiny_trainer(), named(tmp_path), PlainDataModule())
    header = json.loads((tmp_path / "header.json").read_text())
    assert header["made_by"]["data"]["seen"] == "labels, contents of all samples; contents of 24"
    header["made_by"]["data"] = "rows"
    (tmp_path / "header.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match="data has no fingerprint that this version reads"):
        record(tiny_trainer(), named(tmp_path), PlainDataModule())


@pytest.mark.parametrize("run", ["record", "fit"])
def test_samples_that_are_augmented_at_random_are_refused(tmp_path, run):
    data = IndexedDataModule(PlainDataModule(Rows(noise=0.1)))
    with pytest.raises(InputError, match="needs samples that stay the same.*views be functions of index and view"):
        record(tiny_trainer(), named(tmp_path), data) if run == "record" else tiny_trainer().fit(named(tmp_path), data)
    assert not list(tmp_path.rglob("*"))


def test_data_without_a_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="PlainDataModule has no fingerprint\\(\\): name the data"):
        record(tiny_trainer(), kd(TeacherStore(tmp_path, teachers_of())), PlainDataModule())


def test_data_without_indices_are_refused_in_training(tmp_path):
    with pytest.raises(InputError, match="the batches have no index: wrap the data in IndexedDataModule"):
        tiny_trainer().fit(named(tmp_path), PlainDataModule(Batched(), collate_fn=stacked))


def test_a_stream_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Rows())

        def __len__(self):
            return 24

    with pytest.raises(InputError, match="which sample is which, and Stream is an IterableDataset"):
        record(tiny_trainer(), named(tmp_path), PlainDataModule(Stream(), shuffle=False))
