"""``record``: the store that it leaves is the one that training would have filled, whoever fills it."""

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch.nn import functional as F

from distill_lightning import FEEDModule, InputError, KDModule, TeacherStore
from distill_lightning.cli import main
from distill_lightning.modules.recording import record
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def teachers_of(count=2):
    torch.manual_seed(5)
    networks = [TinyNet(width=8) for _ in range(count)]
    for network in networks:
        torch.nn.init.normal_(network.head.weight)
    return networks


def kd(store, teachers=None):
    torch.manual_seed(0)
    return KDModule(TinyNet(), teachers or teachers_of(), num_classes=3, temperature=2.0, store=store)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def recorded(folder, *, views=2, size=7, data=None, teachers=None, **options):
    store = TeacherStore(folder, shard_size=size)
    return record(tiny_trainer(**options), kd(store, teachers), data or TinyDataModule(views=views)), store


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
    told = store.told(batch, None, device="cpu")["probabilities"]
    with torch.no_grad():
        expected = torch.stack([F.softmax(network.eval()(batch.input) / 2, dim=1) for network in networks]).mean(0)
    assert torch.allclose(told, expected, atol=1e-3)


def test_it_leaves_what_training_would_have_filled_up_to_the_last_bit(tmp_path):
    recorded(tmp_path / "ahead", size=8)
    store = TeacherStore(tmp_path / "online", shard_size=8)
    tiny_trainer(max_epochs=2).fit(kd(store), datamodule=TinyDataModule(views=2))
    ahead, online = files_of(tmp_path / "ahead"), files_of(tmp_path / "online")
    assert ahead.keys() == online.keys()
    assert ahead["header.json"] == online["header.json"]
    batch = TinyDataModule().dataset("train", augment=True).__getitems__([(index, 1) for index in range(24)])
    told = []
    for folder in ("ahead", "online"):
        _, found = recorded(tmp_path / folder, size=8)
        told.append(found.told(batch, None, device="cpu")["probabilities"])
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


@pytest.mark.parametrize("last", range(1, 8))
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


def test_workers_change_nothing(tmp_path):
    recorded(tmp_path / "whole")
    data = TinyDataModule(views=2)
    data.num_workers = 2
    recorded(tmp_path / "workers", data=data)
    assert files_of(tmp_path / "workers") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    recorded(tmp_path / "one")
    recorded(tmp_path / "two", devices=2, strategy="ddp_spawn")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_feature_maps_are_recorded(tmp_path):
    torch.manual_seed(0)
    options = {"num_classes": 3, "student_layer": "features", "beta": 10.0, "input_shape": (1, 8, 8)}
    module = FEEDModule(TinyNet(), teachers_of(), store=TeacherStore(tmp_path), **options)
    done = record(tiny_trainer(), module, TinyDataModule(views=2))
    assert done.nbytes == 48 * 2 * 16 * 4 * 4 * 2
    alone = FEEDModule(TinyNet(), None, store=TeacherStore(tmp_path, fill="never"), **options)
    tiny_trainer(max_epochs=2).fit(alone, datamodule=TinyDataModule(views=2))


@pytest.mark.parametrize("missing", ["store", "teachers"])
def test_without_teachers_or_a_store_there_is_nothing_to_record(tmp_path, missing):
    store = None if missing == "store" else TeacherStore(tmp_path)
    teachers = None if missing == "teachers" else teachers_of()
    module = KDModule(TinyNet(), teachers, num_classes=3, store=store)
    with pytest.raises(InputError, match="record needs teachers and a store: give both to KDModule"):
        record(tiny_trainer(), module, TinyDataModule(views=2))


def test_endless_views_cannot_be_recorded(tmp_path):
    with pytest.raises(InputError, match="a TeacherStore keeps a number of views"):
        record(tiny_trainer(), kd(TeacherStore(tmp_path)), TinyDataModule())


# The command line


def written(tmp_path, **model):
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}}
    options = {"student": network, "teachers": [network, network], **model}
    store = {"class_path": "TeacherStore", "init_args": {"path": str(tmp_path / "store"), "shard_size": 64}}
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": str(tmp_path), "logger": False,
                    "enable_checkpointing": False, "enable_progress_bar": False},
        "model": {"class_path": "KDModule", "init_args": {"store": store, **options}},
        "data": {"class_path": "DigitsDataModule", "init_args": {"image_size": 8, "subset": 100, "views": 2}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


def test_the_command_fills_the_store_and_fit_needs_no_teachers(tmp_path, capsys):
    config = written(tmp_path)
    assert main(["record", "--config", config]) == 0
    said = capsys.readouterr().out
    assert "Recorded 200 answers of 20 bytes, 0.0 MB in " in said
    assert "store is complete." in said
    assert main(["fit", "--config", written(tmp_path, teachers=None)]) == 0


def test_the_command_says_in_one_line_what_is_missing(tmp_path, capsys):
    assert main(["record", "--config", written(tmp_path, store=None)]) == 2
    assert "error: record needs teachers and a store: give both to KDModule\n" in capsys.readouterr().err


def test_a_module_without_teachers_has_nothing_to_record(tmp_path):
    from distill_lightning.cli import RecordingTrainer

    with pytest.raises(InputError, match="record needs a method with teachers and a store, got LightningModule"):
        RecordingTrainer(accelerator="cpu", logger=False).record(pl.LightningModule(), TinyDataModule())
