"""A study does not mix runs on different data, whatever has become of the files in between."""

import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import IndexedDataModule, InputError, SmallCNN, SupervisedModule
from distill_lightning.cli import main
from distill_lightning.studies.compare import attempt as compare_attempt
from distill_lightning.studies.compress import command as compress_command
from distill_lightning.studies.data import DataWatch, has_loader, keep_data, refuse_other_data, splits_of
from distill_lightning.testing import TinyDataModule, tiny_trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

SMALL = {"class_path": "SmallCNN", "init_args": {"width": 2}}


@pytest.fixture
def images(tmp_path):
    """Noise of three classes, in files."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "abc":
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(generator.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def data_of(folder):
    arguments = {"data_dir": str(folder), "image_size": 8, "resize_size": 8, "val_size": 4, "num_workers": 0}
    return {"class_path": "ImageFolderDataModule", "init_args": arguments}


def comparison(images, seeds=(0,)):
    return {
        "data": data_of(images),
        "teachers": {"network": SMALL, "number": 1},
        "student": SMALL,
        "methods": {"kd": {"class_path": "KDModule"}},
        "epochs": 1,
        "seeds": list(seeds),
        "accelerator": "cpu",
    }


def compression(images):
    steps = [{"class_path": "PruneWeights", "init_args": {"amount": 0.5}}]
    network = {"class_path": "SmallCNN", "init_args": {"width": 2, "num_classes": 3, "in_channels": 3}}
    report = {"class_path": "Measurements", "init_args": {"batch_sizes": [1], "rounds": 50}}
    arguments = {"network": network, "dense_epochs": 1, "steps": steps, "report": report}
    return {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        "model": {"class_path": "CompressionBaseline", "init_args": arguments},
        "data": data_of(images),
    }


def study(verb, tmp_path, images, *arguments, out="out", controls=()):
    """Run ``compare`` or ``compress``; returns the exit status."""
    if verb == "compress":
        arguments = (*arguments, "--controls", *controls)
    config = comparison(images) if verb == "compare" else compression(images)
    (tmp_path / f"{verb}.yaml").write_text(yaml.safe_dump(config))
    return main([verb, str(tmp_path / f"{verb}.yaml"), "--output", str(tmp_path / out), *arguments])


@pytest.fixture(autouse=True)
def without_onnx(monkeypatch):
    monkeypatch.setattr(compress_command, "find_spec", lambda name: None)


def runs_in(folder):
    names = ("result.json", "stages.json", "test_logits.safetensors")
    return {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.name in names}


def move_one(images):
    (images / "val/a/0.png").rename(images / "val/c/x.png")


def remove_one(images):
    (images / "val/a/0.png").unlink()


def change_training(images):
    (images / "train/a/0.png").rename(images / "train/a/zzz.png")


OTHER = [
    (move_one, r"\(test: other names and labels\)"),
    (remove_one, r"\(test: 24 samples, not 23\)"),
    (change_training, r"\(train: other names; val: other names\)"),
]


@pytest.mark.parametrize("verb", ["compare", "compress"])
@pytest.mark.parametrize(("change", "message"), OTHER)
def test_runs_on_other_files_are_not_taken_up(tmp_path, images, capsys, verb, change, message):
    assert study(verb, tmp_path, images) == 0
    before = runs_in(tmp_path / "out")
    assert before
    # Touched and moved, they are the same.
    for path in images.rglob("*.png"):
        os.utime(path, (1, 1))
    assert study(verb, tmp_path, images) == 0
    assert runs_in(tmp_path / "out") == before
    change(images)
    capsys.readouterr()
    more = ("--seeds", "[0,1]") if verb == "compare" else ("--seeds", "0", "1")
    for arguments in ((), more):
        assert study(verb, tmp_path, images, *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(rf"has runs on other data {message}: give another folder .* or .* with --anew", error), error
    assert runs_in(tmp_path / "out") == before


def table(folder):
    (path,) = [folder / name for name in ("results.csv", "report.csv") if (folder / name).exists()]
    timed = ("seconds", "torch to torch", "claim", "peak_memory", "shared")
    rows = csv.DictReader(path.read_text().splitlines())
    return [{name: value for name, value in row.items() if not any(word in name for word in timed)} for row in rows]


@pytest.mark.parametrize("verb", ["compare", "compress"])
def test_on_request_a_study_starts_anew(tmp_path, images, verb):
    assert study(verb, tmp_path, images) == 0
    (tmp_path / "out/mine.txt").write_text("kept")
    move_one(images)
    assert study(verb, tmp_path, images, "--anew") == 0
    assert study(verb, tmp_path, images, out="fresh") == 0
    assert table(tmp_path / "out") == table(tmp_path / "fresh")
    assert (tmp_path / "out/mine.txt").read_text() == "kept"
    # What was made anew is known again.
    before = runs_in(tmp_path / "out")
    assert study(verb, tmp_path, images) == 0
    assert runs_in(tmp_path / "out") == before


@pytest.mark.parametrize("verb", ["compare", "compress"])
def test_anew_makes_the_runs_of_another_configuration_again_and_touches_no_foreign_folder(
    tmp_path, images, verb, capsys
):
    assert study(verb, tmp_path, images) == 0
    shutil.copytree(images, tmp_path / "moved")
    assert study(verb, tmp_path, tmp_path / "moved") == 2
    assert "or make the runs again with --anew" in capsys.readouterr().err
    assert study(verb, tmp_path, tmp_path / "moved", "--anew") == 0
    (tmp_path / "theirs/runs").mkdir(parents=True)
    (tmp_path / "theirs/runs/precious").write_text("kept")
    assert study(verb, tmp_path, images, "--anew", out="theirs") == 2
    assert (tmp_path / "theirs/runs/precious").read_text() == "kept"


@pytest.mark.parametrize("verb", ["compare", "compress"])
def test_runs_whose_data_nobody_noted_are_refused(tmp_path, images, capsys, verb):
    assert study(verb, tmp_path, images) == 0
    noted = tmp_path / "out/data.json"
    noted.write_text("[1")
    assert study(verb, tmp_path, images) == 2
    assert f"{noted} is damaged, give another folder with --output, or --anew" in capsys.readouterr().err
    noted.unlink()
    # The folder of an earlier version; it stays as it is.
    (tmp_path / "out/at_work.lock").unlink(missing_ok=True)
    assert study(verb, tmp_path, images) == 2
    assert not (tmp_path / "out/at_work.lock").exists()
    error = capsys.readouterr().err
    assert "does not tell on which data its runs were made: give another folder with --output, or make the" in error


@pytest.mark.parametrize("verb", ["compare", "compress"])
def test_files_that_change_between_two_runs_of_a_call_are_noticed(tmp_path, images, capsys, monkeypatch, verb):
    place = compare_attempt if verb == "compare" else compress_command
    execute, done = place.execute, []

    def changing(*given):
        if len(done) == 1:
            change_training(images)
        execute(*given)
        done.append(given)

    monkeypatch.setattr(place, "execute", changing)
    assert study(verb, tmp_path, images, controls=["same_size"]) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"(store would be filled|same size, seed 0 would be trained) on other data than the study began", error
    )
    assert len(done) == 1
    # The run has left no result that another call would take up.
    assert len([path for path in runs_in(tmp_path / "out") if path.suffix == ".json"]) == 1


# Any data module


class Foreign(pl.LightningDataModule):
    """Draws its split anew at every setup, from whatever seed there is."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def setup(self, stage):
        dataset = TensorDataset(torch.arange(192.0).view(3, 1, 8, 8).repeat(10, 1, 1, 1), torch.arange(30) % 3)
        self.parts = torch.utils.data.random_split(dataset, [20, 10])

    def train_dataloader(self):
        return DataLoader(self.parts[0], **{"batch_size": 10, "shuffle": True} | self.options)

    def val_dataloader(self):
        return [DataLoader(part, batch_size=5) for part in self.parts]


def set_up(data, seed=0):
    torch.manual_seed(seed)
    data.setup("fit")
    return data


def test_the_splits_of_any_data_module_are_known_again():
    known = splits_of(set_up(Foreign()))
    assert known.keys() == {"train", "val 0", "val 1"}
    assert [splits["count"] for splits in known.values()] == [20, 20, 10]
    assert splits_of(set_up(Foreign(batch_size=3, num_workers=2, shuffle=False))) == known
    assert splits_of(IndexedDataModule(set_up(Foreign()))) == known
    assert splits_of(set_up(Foreign(), seed=1)) != known
    assert [has_loader(Foreign(), split) for split in ("train", "val", "test")] == [True, True, False]
    assert splits_of(None) == {}


def test_a_split_that_is_gone_is_another(tmp_path):
    known = splits_of(TinyDataModule())
    keep_data(tmp_path, {"data": known})
    keep_data(tmp_path, {"more": known})
    assert json.loads((tmp_path / "data.json").read_text()).keys() == {"data", "more"}
    refuse_other_data(tmp_path, {"data": known, "unknown": {}})
    with pytest.raises(InputError, match=r"has runs on other data \(test: none now\)"):
        refuse_other_data(tmp_path, {"data": {name: found for name, found in known.items() if name != "test"}})


@pytest.mark.parametrize("content", ["[1", "[1]", "3", '{"data": 3}', '{"data": {"train": 3}}'])
def test_a_damaged_note_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(
        InputError, match=r"data.json is damaged, give another folder with --output, or --anew: "
    ) as error:
        refuse_other_data(tmp_path, {"data": splits_of(TinyDataModule())})
    assert "\n" not in str(error.value)


def test_a_split_that_is_drawn_anew_for_every_run_is_refused():
    data = Foreign()
    watch = DataWatch("kd, seed 0", splits_of(set_up(data)))

    def fit():
        module = SupervisedModule(SmallCNN(num_classes=3, width=2), num_classes=3)
        tiny_trainer(callbacks=[watch]).fit(module, datamodule=data)

    torch.manual_seed(7)
    with pytest.raises(InputError, match=r"kd, seed 0 would be .* let Foreign draw its splits from a seed of its own"):
        fit()
