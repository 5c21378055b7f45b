"""Pictures composed of small images: where the objects are, what is written, and when it is written again."""

import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from distill_lightning import (
    DigitsDataModule,
    FashionMNISTDataModule,
    FashionVOC,
    FashionVOCDataModule,
    InputError,
    VOCDetectionDataModule,
    write_fashion_voc,
)
from distill_lightning.data.datamodules.detection import fashion_voc
from distill_lightning.data.datamodules.fashion_mnist import DEBIAN_FOLDER

FEW = FashionVOC(items="digits", images=(6, 2, 3), size=48, item_size=(12, 20), per_image=(1, 4))
CROWDED = FashionVOC(items="digits", size=40, item_size=(16, 24), per_image=(4, 6), max_hidden=0.8)


def naive_box(owners, item):
    """Pixel by pixel: left, top, and the first column and row behind."""
    columns, rows = [], []
    for row, line in enumerate(owners.tolist()):
        for column, owner in enumerate(line):
            if owner == item:
                rows.append(row)
                columns.append(column)
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def test_boxes_are_tight_around_what_is_seen_of_the_items():
    scenes = CROWDED.scenes("train", range(12))
    assert sum(len(scene.classes) for scene in scenes) > 30
    for scene in scenes:
        assert set(scene.owners.flatten().tolist()) == {-1, *range(len(scene.classes))}
        for item in range(len(scene.classes)):
            assert scene.box(item) == naive_box(scene.owners, item)


def test_items_keep_their_pixels_and_what_is_hidden_of_them_is_known(monkeypatch):
    # One item, a white square in a black frame: alone it would be seen whole.
    item = np.zeros((8, 8), dtype=np.uint8)
    item[2:6, 2:6] = 255
    monkeypatch.setattr(FashionVOC, "_items", lambda self, split: (item[None], [3]))
    pictures = FashionVOC(items="digits", size=40, item_size=(16, 16), per_image=(4, 6), max_hidden=0.8)
    whole = np.count_nonzero(np.asarray(Image.fromarray(item).resize((16, 16), Image.Resampling.BILINEAR)))
    hidden = []
    for scene in pictures.scenes("train", range(20)):
        assert scene.classes == [3] * len(scene.classes)
        for number in range(len(scene.classes)):
            seen = sum(owner == number for line in scene.owners.tolist() for owner in line)
            assert scene.hidden[number] == pytest.approx(1 - seen / whole)
            left, top, right, bottom = scene.box(number)
            assert max(right - left, bottom - top) <= 10
        assert scene.hidden[-1] == 0
        hidden += scene.hidden
    assert max(hidden) <= 0.8
    assert sum(part > 0.5 for part in hidden) > 3


def test_nothing_is_hidden_where_that_is_asked_for():
    pictures = FashionVOC(items="digits", size=48, item_size=(16, 24), per_image=(4, 6), max_hidden=0.0)
    assert {part for scene in pictures.scenes("val", range(8)) for part in scene.hidden} == {0.0}


def test_pictures_are_a_function_of_seed_split_and_number():
    first, again = FEW.scenes("train", range(6)), FEW.scenes("train", range(3, 5))
    assert np.array_equal(first[3].pixels, again[0].pixels)
    assert np.array_equal(first[4].owners, again[1].owners)
    assert not np.array_equal(first[0].pixels, first[1].pixels)
    assert not np.array_equal(first[0].pixels, FEW.scenes("val", range(1))[0].pixels)
    other = FashionVOC(items="digits", size=48, item_size=(12, 20), per_image=(1, 4), seed=1)
    assert not np.array_equal(first[0].pixels, other.scenes("train", range(1))[0].pixels)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_items_of_a_split_are_of_no_other(split):
    items, classes = FEW._items(split)
    expected = DigitsDataModule(image_size=8).dataset(split)
    assert np.array_equal(items, expected.images[:, 0].numpy())
    assert classes == expected.targets.tolist()


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_test_items_are_from_fashion_mnists_test_files():
    items, classes = FashionVOC()._items("test")
    expected = FashionMNISTDataModule()._pair("t10k")
    assert np.array_equal(items, expected.images[:, 0].numpy())
    assert classes == expected.targets.tolist()
    assert FashionVOC().class_names[classes[0]] == "Ankle boot"


def test_what_is_written_is_what_was_drawn(tmp_path):
    pictures = FashionVOC(items="digits", images=(10, 1, 1), size=40, item_size=(16, 24), per_image=(4, 6))
    write_fashion_voc(tmp_path / "set", pictures)
    data = VOCDetectionDataModule(
        data_dir=tmp_path / "set", class_names=list("0123456789"), keep_difficult=True, channels=1, num_workers=0
    )
    dataset = data.dataset("train")
    places = {path.decode(): place for place, path in enumerate(dataset.files.paths.tolist())}
    marked = 0
    for number, scene in enumerate(pictures.scenes("train", range(10))):
        sample = dataset[places[f"VOC2007/JPEGImages/train_{number:06}.jpg"]]
        assert sample.target["boxes"].tolist() == [list(scene.box(item)) for item in range(len(scene.classes))]
        assert sample.target["labels"].tolist() == [label + 1 for label in scene.classes]
        assert sample.target["difficult"].tolist() == [part > 0.5 for part in scene.hidden]
        marked += int(sample.target["difficult"].sum())
        # JPEG keeps what it shows, not each pixel.
        assert (sample.input[0] * 255 - torch.from_numpy(scene.pixels)).abs().mean() < 8
    assert marked
    root = ET.parse(tmp_path / "set/VOC2007/Annotations/train_000000.xml").getroot()
    assert root.findtext("filename") == "train_000000.jpg"
    assert [root.findtext(f"size/{side}") for side in ("width", "height", "depth")] == ["40", "40", "1"]


def test_a_folder_is_written_once(tmp_path):
    data = FashionVOCDataModule(data_dir=tmp_path / "set", pictures=FEW, batch_size=2, num_workers=0)
    data.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    assert (data.num_classes, data.class_names) == (10, tuple("0123456789"))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [6, 2, 3]
    write_fashion_voc(tmp_path / "again", FEW)
    for path in (path for path in before if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "set")).read_bytes()
    # Without a Trainer, too, who would call prepare_data.
    lazy = FashionVOCDataModule(data_dir=tmp_path / "lazy", pictures=FEW, num_workers=0)
    assert lazy.fingerprint() == data.fingerprint()


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    write_fashion_voc(tmp_path / "set", FEW)
    other = FashionVOC(items="digits", images=(6, 2, 3), size=64, item_size=(12, 20), per_image=(1, 4))
    with pytest.raises(InputError, match="set was written with size=48, not 64: remove it, or give another folder"):
        write_fashion_voc(tmp_path / "set", other)
    told = tmp_path / "set/fashion_voc.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "version": 0}))
    with pytest.raises(InputError, match="was written with version=0, not 1"):
        write_fashion_voc(tmp_path / "set", FEW)
    told.write_text("{")
    with pytest.raises(InputError, match=r"fashion_voc\.json is damaged, remove .*set"):
        write_fashion_voc(tmp_path / "set", FEW)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="mine is there, and was not written by FashionVOC: give another folder"):
        write_fashion_voc(tmp_path / "mine", FEW)
    assert (tmp_path / "mine/thesis.txt").exists()


def test_what_was_begun_and_not_ended_is_not_there(tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fashion_voc, "_annotation", stop)
    with pytest.raises(KeyboardInterrupt):
        write_fashion_voc(tmp_path / "set", FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": "cats"}, "items must be one of fashion_mnist, digits, got 'cats'"),
        ({"images": (5, 0, 5)}, r"images must be three numbers of at least 1, got \(5, 0, 5\)"),
        ({"per_image": (3, 2)}, "per_image must be two ascending numbers from 1 on"),
        ({"item_size": (2, 20)}, "item_size must be two ascending numbers from 8 on"),
        ({"size": 40}, r"item_size=\(28, 56\) does not fit into size=40"),
        ({"max_hidden": 1.0}, r"max_hidden must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=f"FashionVOC: {message}"):
        FashionVOC(**options)
