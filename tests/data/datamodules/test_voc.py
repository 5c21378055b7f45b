"""Folders in VOC's layout: what is read of them, which views they give, and what is refused."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_lightning import DetectionAugmentation, DetectionBatch, InputError, VOCDetectionDataModule
from distill_lightning.data.datamodules import ViewSampler, read_annotation
from distill_lightning.data.datamodules.detection import voc
from distill_lightning.data.fingerprint import data_difference

HEIGHT, WIDTH = 48, 64
# Class, and rows and columns from 0 without the last, of the rectangles on the images.
COLOURS = {"cat": (250, 20, 20), "dog": (20, 250, 20), "emu": (20, 20, 250)}
RECTANGLES = [
    [("dog", 4, 20, 6, 30), ("cat", 24, 40, 33, 60)],
    [("emu", 10, 30, 20, 50)],
    [],
    [("cat", 0, HEIGHT, 0, WIDTH)],
    [("dog", 30, 48, 40, 64)],
    [("emu", 2, 12, 2, 30), ("dog", 20, 40, 30, 44)],
]


def pixels_of(rectangles):
    pixels = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    for name, top, bottom, left, right in rectangles:
        pixels[top:bottom, left:right] = COLOURS[name]
    return pixels


def object_of(name, top, bottom, left, right, *, difficult=0, more=""):
    corners = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
    box = "".join(f"<{side}>{value}</{side}>" for side, value in corners.items())
    return f"<object><name>{name}</name>{more}<difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


def annotation_of(objects, *, size=(WIDTH, HEIGHT)):
    said = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation>{said}{''.join(objects)}</annotation>"


def write(folder, name, rectangles, **options):
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(rectangles)).save(folder / f"JPEGImages/{name}.png")
    objects = [object_of(*rectangle, **options) for rectangle in rectangles]
    (folder / f"Annotations/{name}.xml").write_text(annotation_of(objects))


def write_lists(folder, **lists):
    for split, names in lists.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def folder(tmp_path):
    """A set of twelve images: six to train, three to validate and three to test."""
    folder = tmp_path / "VOC2007"
    names = [f"{number:06}" for number in range(12)]
    for number, name in enumerate(names):
        write(folder, name, RECTANGLES[number % 6])
    write_lists(folder, train=names[:6], trainval=names[:9], val=names[6:9], test=names[9:])
    return folder


def data_of(folder, **options):
    return VOCDetectionDataModule(data_dir=folder, **{"batch_size": 2, "num_workers": 0} | options)


def every(data, split, **options):
    dataset = data.dataset(split, **options)
    return dataset.__getitems__(range(len(dataset)))


def paths_of(data, split):
    return [path.decode() for path in data.dataset(split).files.paths.tolist()]


# What is read


def test_a_box_holds_the_pixels_of_its_object_and_no_others(folder):
    data = data_of(folder)
    assert data.class_names == ("cat", "dog", "emu")
    assert (data.num_classes, data.in_channels, data.input_shape, data.task) == (3, 3, None, "detection")
    batch = every(data, "test")
    assert isinstance(batch, DetectionBatch)
    assert [len(target["labels"]) for target in batch.target] == [1, 1, 2]
    for image, target in zip(batch.input, batch.target, strict=True):
        assert image.shape == (3, HEIGHT, WIDTH)
        assert target["boxes"].dtype == torch.float32
        for (left, top, right, bottom), label in zip(target["boxes"].int().tolist(), target["labels"], strict=True):
            colour = torch.tensor(COLOURS[data.class_names[label - 1]]) / 255
            inside = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert torch.equal(torch.isclose(image, colour[:, None, None]).all(dim=0), inside)


@pytest.fixture
def fetched(monkeypatch):
    """What torchvision is asked for; it unpacks a set with one image for each of the split's archives."""
    asked = []

    def fetch(root, *, year, image_set, download):
        assert download
        asked.append((year, image_set))
        home = Path(root) / ("TrainVal/VOCdevkit" if year == "2011" else "VOCdevkit") / f"VOC{year}"
        splits = ["test"] if image_set == "test" else ["train", "val", "trainval"]
        for split in splits:
            write(home, f"{year}_{split}", [("dog", 4, 20, 6, 30)])
            write_lists(home, **{split: [f"{year}_{split}"]})

    monkeypatch.setattr(voc.datasets, "VOCDetection", fetch)
    return asked


def test_sets_that_are_missing_are_asked_of_torchvision(tmp_path, fetched):
    splits = {"train": ["VOC2007/trainval", "VOC2011/train"], "val": "VOC2011/val", "test": "VOC2007/test"}
    data = VOCDetectionDataModule(data_dir=tmp_path, download=True, **splits)
    assert (data.num_classes, data.class_names[:2], data.class_names[-1]) == (20, ("aeroplane", "bicycle"), "tvmonitor")
    assert fetched == []
    data.prepare_data()
    # One archive has train, val and trainval.
    assert fetched == [("2007", "trainval"), ("2011", "train"), ("2007", "test")]
    data.prepare_data()
    VOCDetectionDataModule(data_dir=tmp_path, **splits).prepare_data()
    assert len(fetched) == 3
    data.setup()
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [2, 1, 1]
    assert [target["labels"].tolist() for target in every(data, "train").target] == 2 * [
        [1 + data.class_names.index("dog")]
    ]


@pytest.mark.parametrize("split", ["trainval", "VOC2012/test", "VOC2013/train", "VOC2007/cat_train"])
def test_what_torchvision_cannot_fetch_is_refused(tmp_path, split):
    with pytest.raises(
        InputError, match=f"^download=True: torchvision cannot fetch the split '{split}': name it with its"
    ):
        VOCDetectionDataModule(data_dir=tmp_path, download=True, train=split, val=None, test="VOC2007/test")


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(voc.datasets, "VOCDetection", fail)
    data = VOCDetectionDataModule(
        data_dir=tmp_path, download=True, train="VOC2007/train", val="VOC2007/val", test="VOC2007/test"
    )
    with pytest.raises(InputError, match="the download failed: no network"):
        data.prepare_data()


def test_an_image_without_objects_is_kept(folder):
    batch = every(data_of(folder, subset=6), "train", augment=True)
    (empty,) = [target for target in batch.target if not len(target["labels"])]
    assert empty["boxes"].shape == (0, 4)
    assert (empty["labels"].dtype, empty["difficult"].dtype) == (torch.int64, torch.bool)
    assert [int(target["image_id"]) for target in batch.target] == list(range(6)) == batch.index.tolist()


def test_grey_images_are_those_of_pillow(folder):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)).save(
        folder / "JPEGImages/000009.png"
    )
    data = data_of(folder, channels=1)
    image = every(data, "test").input[0]
    with Image.open(folder / "JPEGImages/000009.png") as expected:
        assert torch.equal((image * 255).round().to(torch.uint8)[0], torch.from_numpy(np.array(expected.convert("L"))))
    assert data.in_channels == 1


def test_several_sets_are_read_at_once(folder):
    second = folder.parent / "VOC2012"
    shutil.copytree(folder, second)
    (second / "ImageSets/Main/test.txt").unlink()
    write_lists(second, trainval=["000000", "000001"])
    data = data_of(folder.parent, train="trainval", val=None, val_size=3, test="VOC2007/test")
    parts = {split: paths_of(data, split) for split in ("train", "val", "test")}
    of_second = [f"VOC2012/JPEGImages/{n:06}.png" for n in (0, 1)]
    listed = [f"VOC2007/JPEGImages/{n:06}.png" for n in range(9)] + of_second
    assert sorted(parts["train"] + parts["val"]) == listed
    assert len(parts["val"]) == 3
    assert parts["test"] == [f"VOC2007/JPEGImages/{n:06}.png" for n in (9, 10, 11)]
    other = data_of(folder.parent, train="VOC2012/trainval", val=["VOC2007/train", "VOC2007/val"])
    assert sorted(paths_of(other, "train")) == of_second
    assert len(paths_of(other, "val")) == 9


def test_objects_that_are_difficult_are_seen_in_evaluation_alone(folder):
    for name in ("000000", "000006"):
        write(folder, name, RECTANGLES[0], difficult=1)
    data = data_of(folder)
    place = paths_of(data, "train").index("JPEGImages/000000.png")
    assert len(data.dataset("train")[place].target["labels"]) == 0
    # The others keep their own.
    assert sum(len(target["labels"]) for target in every(data, "train").target) == sum(map(len, RECTANGLES)) - 2
    assert every(data, "val").target[0]["difficult"].tolist() == [True, True]
    assert every(data, "val").target[1]["difficult"].tolist() == [False]
    kept = data_of(folder, keep_difficult=True).dataset("train")[place].target
    assert kept["difficult"].tolist() == [True, True]


@pytest.mark.parametrize("written", ["1", "true", " True "])
def test_difficult_may_be_a_word(folder, written):
    path = folder / "Annotations/000000.xml"
    path.write_text(annotation_of([object_of("cat", 2, 20, 3, 30, difficult=written)]))
    assert read_annotation(path).difficult == [True]


def test_a_list_may_begin_with_a_mark_of_its_coding(folder):
    path = folder / "ImageSets/Main/train.txt"
    path.write_bytes("\N{BYTE ORDER MARK}".encode() + path.read_bytes())
    assert len(data_of(folder).dataset("train")) == 6


def test_a_batch_has_eight_images_if_nothing_else_is_said(folder):
    data = VOCDetectionDataModule(data_dir=folder)
    assert data.batch_size == data.train_dataloader().batch_size == 8


def test_parts_of_objects_are_no_objects(folder):
    head = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    path = folder / "Annotations/000000.xml"
    path.write_text(annotation_of([object_of("cat", 2, 20, 3, 30, more=head)]))
    found = read_annotation(path)
    assert (found.names, found.boxes) == (["cat"], [(3.0, 2.0, 30.0, 20.0)])


# Views


@pytest.mark.parametrize(
    "augmentation",
    [
        DetectionAugmentation(flip=0.5),
        DetectionAugmentation(zoom_out=1.0),
        DetectionAugmentation(iou_crop=1.0),
        DetectionAugmentation(sizes=(40, 80), flip=0.0),
        DetectionAugmentation(zoom_out=0.5, iou_crop=0.5, sizes=(60, 96), max_size=110),
    ],
)
def test_boxes_stay_around_their_objects_in_every_view(folder, augmentation):
    data = data_of(folder, augmentation=augmentation)
    dataset = data.dataset("train", augment=True)
    seen, changed = 0, 0
    for view in range(10):
        batch = dataset.__getitems__([(index, view) for index in range(6)])
        for image, target in zip(batch.input, batch.target, strict=True):
            assert augmentation.max_size is None or max(image.shape) <= augmentation.max_size
            assert not augmentation.sizes or min(image.shape[1:]) <= max(augmentation.sizes)
            changed += image.shape[1:] != (HEIGHT, WIDTH) or augmentation.flip > 0
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                colour = torch.tensor(COLOURS[data.class_names[label - 1]]) / 255
                rows, columns = ((image - colour[:, None, None]).abs().amax(dim=0) < 0.3).nonzero().unbind(dim=1)
                found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                # Resizing blurs the edges.
                assert (found - box).abs().max() <= (3 if augmentation.sizes else 1)
                seen += 1
    assert seen > 20
    assert changed > 10


def test_distorted_colours_leave_boxes_alone(folder):
    for channels in (1, 3):
        plain = every(data_of(folder, channels=channels), "train")
        data = data_of(folder, channels=channels, augmentation=DetectionAugmentation(photometric=1.0, flip=0.0))
        view = every(data, "train", augment=True)
        assert all(torch.equal(one["boxes"], two["boxes"]) for one, two in zip(plain.target, view.target, strict=True))
        pairs = zip(plain.input, view.input, strict=True)
        assert sum(float((image - other).abs().max()) > 0.02 for image, other in pairs) >= 4


def test_a_view_is_a_function_of_seed_index_and_view(folder):
    every_one = DetectionAugmentation(photometric=0.5, zoom_out=0.5, iou_crop=0.5, sizes=(32, 40, 48))

    def views(keys, seed=0):
        batch = data_of(folder, augmentation=every_one, seed=seed).dataset("train", augment=True).__getitems__(keys)
        return dict(zip(keys, zip(batch.input, batch.target, strict=True), strict=True))

    def same(first, second):
        return first[0].shape == second[0].shape and torch.equal(first[0], second[0])

    keys = [(index, view) for index in range(6) for view in range(3)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    known = views(keys)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = views(keys[::-1])
    assert all(same(known[key], again[key]) for key in keys)
    assert all(torch.equal(known[key][1]["boxes"], again[key][1]["boxes"]) for key in keys)
    assert not any(same(known[index, 0], known[index, 1]) for index in range(6))
    other = data_of(folder, augmentation=every_one, seed=1)
    place = {path: number for number, path in enumerate(paths_of(other, "train"))}
    moved = [(place[path], 0) for path in paths_of(data_of(folder), "train")]
    assert not any(same(known[index, 0], view) for index, view in enumerate(views(moved, seed=1).values()))


def test_an_epoch_goes_on_where_it_was_left(folder):
    first, second = data_of(folder).train_dataloader(), data_of(folder).train_dataloader()
    whole = list(first)
    begun = iter(first)
    next(begun)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert [batch.index.tolist() for batch in rest] == [batch.index.tolist() for batch in whole[1:]]
    for one, other in zip(rest, whole[1:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.input, other.input, strict=True))


def test_images_read_twice_by_several_processes_count_once(folder):
    dataset = data_of(folder).dataset("test")
    parts = [
        dataset.__getitems__(list(ViewSampler(dataset, views=1, shuffle=False, seed=0, num_replicas=2, rank=rank)))
        for rank in range(2)
    ]
    assert [int(part.count) for part in parts] == [2, 1]
    assert [part.size for part in parts] == [2, 2]


def test_workers_make_the_same_batches(folder):
    here, there = (list(data_of(folder, num_workers=number).train_dataloader()) for number in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert one.index.tolist() == other.index.tolist()
        assert all(torch.equal(*pair) for pair in zip(one.input, other.input, strict=True))


# By what data are known again


def test_data_are_known_again_elsewhere_and_told_from_others(folder, tmp_path):
    known = data_of(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert data_of(tmp_path / "elsewhere").fingerprint() == known
    (tmp_path / "elsewhere/Annotations/000000.xml").write_text(annotation_of([object_of("cat", 2, 20, 3, 30)]))
    assert data_difference(known["data"], data_of(tmp_path / "elsewhere").fingerprint()["data"]) == "other labels"
    other = data_of(folder, augmentation=DetectionAugmentation(iou_crop=0.5)).fingerprint()
    assert other["transform"] != known["transform"]


# What is refused


def test_a_box_without_an_area_is_left_out_and_said_so_once(folder):
    path = folder / "Annotations/000000.xml"
    path.write_text(annotation_of([object_of("dog", 5, 6, 7, 8), object_of("cat", 24, 40, 33, 60)]))
    with pytest.warns(UserWarning, match=r"1 box in .* left out:\n.*000000.xml: object 1 \(dog\) has a box without an"):
        data = data_of(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup()
        place = paths_of(data, "train").index("JPEGImages/000000.png")
        assert data.dataset("train")[place].target["boxes"].tolist() == [[33, 24, 60, 40]]
    assert len(data.faults) == 1
    # Nothing was cut off.
    with pytest.warns(UserWarning, match="1 box in .* left out:"):
        data_of(folder, on_damaged="mend")


def test_boxes_beyond_the_edge_are_cut_off_where_that_is_asked_for(folder):
    path = folder / "Annotations/000000.xml"
    # By a pixel, which is rounding; by more; and wholly.
    boxes = [(-1, 20, 6, 65), (24, 52, 33, 70), (60, 70, 5, 20)]
    path.write_text(annotation_of([object_of("cat", *box) for box in boxes]))
    with pytest.raises(InputError, match=r"000000.xml: object 2 \(cat\) has a box outside .*\(34, 25, 70, 52\)"):
        read_annotation(path)
    found = read_annotation(path, mend=True)
    assert found.boxes == [(6, 0, 64, 20), (33, 24, 64, 48)]
    assert len(found.faults) == 2
    assert found.cut == found.faults[:1]
    with pytest.warns(UserWarning, match="2 boxes in .* left out or cut off at the image's edge:"):
        data_of(folder, on_damaged="mend")
    path.write_text(annotation_of([object_of("cat", 24, 52, 33, 70)]))
    with pytest.warns(UserWarning, match="1 box in .* cut off at the image's edge:"):
        data_of(folder, on_damaged="mend")


def edited(old, new, name="Annotations/000001.xml"):
    def edit(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


TRAIN = "ImageSets/Main/train.txt"
BAD = {
    "no size": (edited("size>", "sizes>"), r"000001\.xml has no size with the image's width and height: add it"),
    "size of zero": (edited("<width>64", "<width>0"), r"000001\.xml has no size with the image's width"),
    "no box": (edited("bndbox", "box"), r"000001\.xml: object 1 \(emu\) must have a name, and a bndbox with"),
    "a side that is no number": (edited("<xmin>21", "<xmin>x"), r"object 1 \(emu\) must have a name, and a bndbox"),
    "a side that is nan": (edited("<xmin>21", "<xmin>nan"), r"object 1 \(emu\) must have a name, and a bndbox"),
    "no name": (edited("emu", ""), r"000001\.xml: object 1 \(without a name\) must have a name"),
    "upside down": (edited("<xmin>21", "<xmin>55"), r"000001\.xml: object 1 \(emu\) has a box upside down, \(55, 11"),
    "outside": (edited("<xmax>50", "<xmax>66"), r"object 1 \(emu\) has a box outside .* in an image of 64x48 pixels"),
    "cut": (edited("</annotation>", ""), r"000001\.xml is not an XML file of annotations: .*line 1, column"),
    "no annotation": (edited("000003", "999", TRAIN), r"train\.txt:4: 999 has no annotation .*999\.xml: add it, or"),
    "no image": (lambda d: (d / "JPEGImages/000004.png").unlink(), r"train\.txt:5: there is no image .*000004\.jpg"),
    "no list": (lambda d: (d / "ImageSets/Main/test.txt").unlink(), r"test='test': .*test\.txt is not there: give"),
    "empty list": (lambda d: (d / "ImageSets/Main/val.txt").write_text("\n"), r"val \(val\) has no image: give"),
    "twice": (edited("000003", "000002", TRAIN), r"train\.txt:4: 000002 is listed twice in train, first in .*txt:3:"),
    "size of a fraction": (edited("<width>64", "<width>64.7"), r"000001\.xml has the size 64.7x48, and pixels are"),
    "size without an end": (edited("<width>64", "<width>inf"), r"000001\.xml has the size infx48, and pixels are"),
    "perhaps difficult": (edited("<difficult>0", "<difficult>2"), r"object 1 \(emu\) has difficult='2': write 1 or 0"),
    "list in Latin-1": (lambda d: (d / TRAIN).write_bytes(b"caf\xe9\n"), r"train\.txt is no text in UTF-8, save it so"),
    "list of a class": (edited("000003", "000003 -1", TRAIN), r"train\.txt:4: '000003 -1' is an image and whether a"),
    "class of val alone": (edited("dog", "fox", "Annotations/000006.xml"), r"000006\.xml: object 1 \(fox\) is none"),
    "no set": (lambda d: shutil.rmtree(d / "ImageSets"), r"holds no folder in VOC's layout, with Annotations"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(folder, case):
    edit, message = BAD[case]
    edit(folder)
    with pytest.raises(InputError, match=message) as refused:
        data_of(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "trainval"}, r"val\.txt:1: 000006 is already in train \(.*trainval\.txt:7\).*val=null and val_size"),
        ({"train": "VOC2012/train"}, r"train='VOC2012/train': no folder VOC2012"),
        ({"val": None}, "give val_size, the number of training images"),
        ({"subset": 7}, "subset=7 is larger than the 6 training images"),
        (
            {"class_names": ["cat", "dog"]},
            r"000001\.xml: object 1 \(emu\) is none of the classes cat, dog: mend",
        ),
        ({"class_names": ["cat", "cat"]}, "class_names must be a list of at least one name, and each once"),
        ({"class_names": "cat"}, "class_names must be a list .* got 'cat'"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"on_damaged": "skip"}, "on_damaged must be one of error, mend, got 'skip'"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(InputError, match=message):
        data_of(folder, **options).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"flip must be in \[0, 1\], got 1.5"),
        ({"sizes": (0,)}, "sizes and max_size must be at least 1"),
        ({"max_size": 100}, "max_size bounds the resizing to sizes: give these, too"),
    ],
)
def test_augmentations_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=f"DetectionAugmentation: {message}"):
        DetectionAugmentation(**options)


def cut(folder):
    path = folder / "JPEGImages/000009.jpg"
    (folder / "JPEGImages/000009.png").unlink()
    Image.fromarray(pixels_of(RECTANGLES[0])).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def turned(folder):
    (folder / "JPEGImages/000009.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels_of(RECTANGLES[0])).save(folder / "JPEGImages/000009.jpg", exif=exif)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cut, r"JPEGImages/000009\.jpg cannot be decoded \(.*\): mend it"),
        (turned, r"000009\.jpg has 48x64 pixels as its EXIF orientation turns it, .* says 64x48: .*save it upright"),
        (
            lambda d: Image.new("RGB", (30, 20)).save(d / "JPEGImages/000009.png"),
            r"JPEGImages/000009\.png has 30x20 pixels, and its annotation says 64x48",
        ),
    ],
    ids=["cut", "turned", "another size"],
)
def test_images_that_cannot_be_used_are_named(folder, edit, message):
    edit(folder)
    with pytest.raises(InputError, match=message) as refused:
        next(iter(data_of(folder).test_dataloader()))
    assert "\n" not in str(refused.value)
