"""Image folders with a folder for each split, and such with damaged files."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from distill_lightning import ImageFolderDataModule, InputError, KDModule, TeacherStore
from distill_lightning.data.datamodules import image_folder
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyNet, tiny_trainer

CLASSES = ("ant", "bee", "cat")


def write(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(fields.repeat(4, axis=0).repeat(4, axis=1)).save(path)


def fill(folder, part, count, *, first=0):
    for number, name in enumerate(CLASSES):
        for place in range(count):
            write(folder / part / name / f"{place}.png", first + number * count + place)


@pytest.fixture
def folder(tmp_path):
    """8 images of each class under ``train``, 4 of each under ``val``."""
    fill(tmp_path / "images", "train", 8)
    fill(tmp_path / "images", "val", 4, first=100)
    return tmp_path / "images"


def data_of(folder, **arguments):
    defaults = {"image_size": 16, "resize_size": 20, "val_size": 6, "batch_size": 8, "num_workers": 0}
    return ImageFolderDataModule(data_dir=folder, **(defaults | arguments))


def paths_of(data, split):
    return [path.decode() for path in data.dataset(split).files.paths.tolist()]


def below(folder, part):
    return sorted(str(path.relative_to(folder)) for path in (folder / part).rglob("*.png"))


# With a folder for each split


def test_with_a_test_folder_each_split_has_its_own(folder):
    fill(folder, "test", 5, first=200)
    data = data_of(folder, val_size=None)
    assert sorted(paths_of(data, "train")) == below(folder, "train")
    assert paths_of(data, "val") == below(folder, "val")
    assert paths_of(data, "test") == below(folder, "test")
    for split in ("train", "val", "test"):
        expected = [CLASSES.index(path.split("/")[1]) for path in paths_of(data, split)]
        assert data.dataset(split).files.targets.tolist() == expected
    assert sum(batch.size for batch in data.val_dataloader()) == 12
    assert sum(batch.size for batch in data.test_dataloader()) == 15


def test_a_part_of_the_validation_images_is_drawn_from_all_classes(folder):
    fill(folder, "test", 5, first=200)
    drawn = paths_of(data_of(folder, val_size=5), "val")
    assert len(set(drawn)) == 5
    assert set(drawn) < set(below(folder, "val"))
    assert len({path.split("/")[1] for path in drawn}) > 1
    assert drawn != paths_of(data_of(folder, val_size=5, seed=1), "val")
    assert len(data_of(folder, val_size=5).dataset("train")) == 24
    with pytest.raises(InputError, match="val_size=13 is larger than the 12 validation images"):
        data_of(folder, val_size=13).setup()
    with pytest.raises(InputError, match="subset=25 is larger than the 24 training images$"):
        data_of(folder, val_size=None, subset=25).setup()


def test_with_train_and_test_alone_the_validation_images_come_from_train(folder):
    fill(folder, "test", 5, first=200)
    shutil.rmtree(folder / "val")
    data = data_of(folder)
    assert paths_of(data, "test") == below(folder, "test")
    assert sorted(paths_of(data, "train") + paths_of(data, "val")) == below(folder, "train")
    assert len(data.dataset("val")) == 6


@pytest.mark.parametrize("part", ["val", "test"])
def test_without_files_for_validation_alone_their_number_is_needed(folder, part):
    if part == "test":
        (folder / "val").rename(folder / "test")
    message = "has not both val and test, so the validation images are drawn from train: give val_size, the number"
    with pytest.raises(InputError, match=message):
        data_of(folder, val_size=None)


def test_a_test_folder_without_classes_is_refused(folder):
    write(folder / "test/1.png", 1)
    with pytest.raises(InputError, match="test has no class folders: sort its images into one folder per class"):
        data_of(folder).setup()


def test_a_class_of_the_test_folder_that_train_has_not_is_refused(folder):
    fill(folder, "test", 2)
    write(folder / "test/dog/1.png", 1)
    with pytest.raises(InputError, match="test/dog is a class that .*train does not have"):
        data_of(folder).setup()


# Damaged images


def damage(folder, content=b"hello"):
    """Damage every fourth file, and return the paths of those."""
    paths = [path for part in ("train", "val") for path in below(folder, part)][::4]
    for path in paths:
        (folder / path).write_bytes(content)
    return paths


@pytest.fixture
def whole(folder, tmp_path):
    """A copy of the folder, which stays as it is."""
    return shutil.copytree(folder, tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_check_reads_every_file_and_tells_what_is_damaged_in_one_line_each(folder, workers):
    data = data_of(folder, num_workers=workers)
    assert data.check() == []
    paths = damage(folder)
    lines = data.check()
    found = [line.partition(" cannot be decoded (it is none of")[0] for line in lines]
    assert sorted(found) == [str(folder / path) for path in paths]
    assert not any("\n" in line for line in lines)
    data.setup()
    missing = paths_of(data, "train")[0]
    (folder / missing).unlink()
    assert any(line.startswith(str(folder / missing)) for line in data.check())


@pytest.mark.parametrize("augment", [True, False])
def test_a_damaged_image_is_of_the_mean_colour_and_does_not_count(folder, whole, augment):
    paths = damage(folder)
    dataset = data_of(folder, on_damaged="skip").dataset("train", augment=augment)
    keys = [(index, view) for index in range(18) for view in (0, 3)]
    batch = dataset.__getitems__(keys)
    expected = data_of(whole).dataset("train", augment=augment).__getitems__(keys)
    is_damaged = torch.tensor([dataset.files.paths[index].decode() in paths for index, _ in keys])
    assert 4 <= is_damaged.sum() <= 32
    assert torch.equal(batch.counted, ~is_damaged)
    assert torch.equal(batch.input, torch.where(is_damaged[:, None, None, None], 0.0, expected.input))
    for name in ("target", "index", "view"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    readable = [key for key, bad in zip(keys, is_damaged.tolist(), strict=True) if not bad]
    assert dataset.__getitems__(readable).counted is None


def test_a_damaged_image_is_no_ones_partner(folder, whole):
    damage(folder)
    dataset = data_of(folder, on_damaged="skip", partners=True).dataset("train", augment=True)
    keys = [(index, view) for index in range(18) for view in range(4)]
    batch = dataset.__getitems__(keys)
    drawn = data_of(whole, partners=True).dataset("train", augment=True).__getitems__(keys).partner.index.tolist()
    damaged = dataset.damaged.nonzero().flatten().tolist()
    expected = [index if other in damaged else other for (index, _), other in zip(keys, drawn, strict=True)]
    assert batch.partner.index.tolist() == expected
    assert expected != drawn
    assert batch.partner.view.tolist() == [view for _, view in keys]
    assert batch.partner.counted.tolist() == [other not in damaged for other in expected]


def networks(count):
    torch.manual_seed(5)
    return [TinyNet(width=8, in_channels=3) for _ in range(count)]


def kd(given=None):
    student, *teachers = networks(2)
    torch.nn.init.normal_(student.head.weight)
    return KDModule(student, teachers if given is None else given, num_classes=3)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_skipped_images_are_listed_at_the_end_and_in_no_metric(folder, workers):
    paths = damage(folder)
    data = data_of(folder, on_damaged="skip", num_workers=workers)
    module, trainer = kd(), tiny_trainer(max_epochs=2)
    in_fit, in_test = ([path for path in paths if path.startswith(part)] for part in ("train/", "val/"))
    with pytest.warns(UserWarning, match="damaged images") as told:
        trainer.fit(module, datamodule=data)
    [said] = [str(one.message) for one in told if "damaged" in str(one.message)]
    first, *listed = said.splitlines()
    assert first == f"ImageFolderDataModule has skipped {len(in_fit)} damaged images below {folder}:"
    assert sorted(map(str.strip, listed)) == in_fit == sorted(data.skipped())
    with pytest.warns(UserWarning, match=f"skipped {len(in_test)} damaged images"):
        [scores] = trainer.test(module, datamodule=data, verbose=False)
    assert sorted(data.skipped()) == paths
    assert sum(map(len, trainer.predict(module, datamodule=data))) == 12 - len(in_test)
    # The same test images in a folder without the damaged ones.
    for path in in_test:
        (folder / path).unlink()
    [expected] = trainer.test(module, datamodule=data_of(folder), verbose=False)
    assert scores == pytest.approx(expected, rel=1e-5)


def test_a_file_that_cannot_be_read_is_not_skipped(folder):
    data = data_of(folder, on_damaged="skip")
    (folder / paths_of(data, "train")[3]).unlink()
    with pytest.raises(InputError, match="No such file"):
        data.dataset("train")[3]


def test_a_long_list_of_skipped_images_is_cut_and_told_once(folder, monkeypatch, recwarn):
    monkeypatch.setattr(image_folder, "_SHOWN", 2)
    damage(folder)
    data = data_of(folder, on_damaged="skip")
    data.dataset("train").__getitems__(range(18))
    data.teardown("fit")
    data.teardown("fit")
    [told] = [text for one in recwarn if "skipped" in (text := str(one.message))]
    assert len(told.splitlines()) == 4
    assert told.endswith(f"and {len(data.skipped()) - 2} more, which skipped() tells")


def test_another_answer_to_damage_is_refused(folder):
    with pytest.raises(InputError, match="on_damaged must be one of error, skip, got 'ignore'"):
        data_of(folder, on_damaged="ignore")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*damaged image:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_is_recorded_around_damaged_images(folder, tmp_path, workers):
    damage(folder)
    data = data_of(folder, on_damaged="skip", views=2, num_workers=workers)
    store = TeacherStore(tmp_path / "store", networks(2), shard_size=7)
    record(tiny_trainer(), kd(store), data)
    assert store.is_complete
    assert data.skipped()
    tiny_trainer(max_epochs=2).fit(kd(TeacherStore(tmp_path / "store", fill="never", shard_size=7)), datamodule=data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*damaged image:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_skip_images_together(folder, start_method, workers):
    paths = damage(folder)
    data = data_of(folder, on_damaged="skip", drop_last=True, batch_size=4, num_workers=workers)
    # What is shared is made before there are several processes.
    data.setup()
    module, trainer = kd(), tiny_trainer(max_epochs=2, devices=2, strategy=f"ddp_{start_method}")
    trainer.fit(module, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert sorted(data.skipped()) == [path for path in paths if path.startswith("train/")]
