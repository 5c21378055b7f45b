"""Folders of image files: what is read, which views it gives, and how stores are filled from them."""

import os
import pickle
import re
import shutil
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader

from distill_lightning import Batch, ImageFolderDataModule, InputError, KDModule, TeacherStore
from distill_lightning.cli import main
from distill_lightning.data.datamodules import ImageDataModule, ViewDataset, ViewSampler, image_files, image_folder
from distill_lightning.data.datamodules.image_file import DamagedImageError, decode
from distill_lightning.data.fingerprint import data_difference
from distill_lightning.data.views import uniform_draws
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyNet, tiny_trainer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(20, 26), (26, 20), (24, 24), (18, 40)]


def pixels_of(number, height, width):
    """Colour fields of 4x4 pixels, of each number other ones."""
    fields = np.random.default_rng(number).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return fields.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]


def write(path, number=0, *, size=(20, 26)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(number, *size)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """8 images of each of 3 classes for training and validation, 4 of each for test."""
    folder = tmp_path_factory.mktemp("images")
    number = 0
    for part, count in (("train", 8), ("val", 4)):
        for name in ("ant", "bee", "cat"):
            for place in range(count):
                below = "more/" if place % 2 else ""
                write(folder / part / name / f"{below}{place}.png", number, size=SIZES[number % 4])
                number += 1
    return folder


def data_of(folder, **arguments):
    defaults = {"image_size": 16, "resize_size": 20, "val_size": 6, "batch_size": 8, "num_workers": 0}
    return ImageFolderDataModule(data_dir=folder, **(defaults | arguments))


def paths_of(data, split):
    return [path.decode() for path in data.dataset(split).files.paths.tolist()]


def joined(loader):
    return Batch(*(torch.cat(parts) for parts in zip(*loader, strict=True)))


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return joined(loader)


def by_key(batch):
    order = (batch.index * 1000 + batch.view).argsort()
    return Batch(*(part[order] for part in batch))


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def normalised(image):
    """A PIL image as the networks read it."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    return (values - torch.tensor(MEAN)[:, None, None].double()) / torch.tensor(STD)[:, None, None].double()


# One level of 255, in the channel with the smallest deviation.
LEVEL = 1 / 255 / min(STD)


# Folders and splits


def test_classes_are_known_before_anything_is_listed(folder):
    data = data_of(folder)
    assert data.class_names == ("ant", "bee", "cat")
    assert data.num_classes == 3
    assert data.input_shape == (3, 16, 16)


def test_validation_images_come_from_train_and_test_images_from_val(folder):
    data = data_of(folder)
    train, val, test = (paths_of(data, split) for split in ("train", "val", "test"))
    every = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert sorted(train + val) == sorted(path for path in every if path.startswith("train/"))
    assert sorted(test) == sorted(path for path in every if path.startswith("val/"))
    assert (len(train), len(val), len(test)) == (18, 6, 12)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_have_the_class_of_their_folder(folder, split):
    data = data_of(folder)
    expected = [data.class_names.index(path.split("/")[1]) for path in paths_of(data, split)]
    assert data.dataset(split).files.targets.tolist() == expected
    assert data.dataset(split).__getitems__(range(len(expected))).target.tolist() == expected


def test_the_seed_draws_the_splits_and_smaller_subsets_are_part_of_larger_ones(folder):
    few, more, every = (data_of(folder, subset=size) for size in (3, 10, None))
    assert paths_of(few, "train") == paths_of(more, "train")[:3] == paths_of(every, "train")[:3]
    assert paths_of(few, "val") == paths_of(every, "val")
    assert paths_of(data_of(folder, seed=1), "val") != paths_of(every, "val")


def test_a_part_of_the_test_images_is_drawn_from_all_classes(folder):
    # The first 4 in the order of the files are all ants.
    drawn = paths_of(data_of(folder, test_size=4), "test")
    assert len(set(drawn)) == 4
    assert len({path.split("/")[1] for path in drawn}) > 1
    assert drawn == sorted(drawn)
    assert drawn == paths_of(data_of(folder, test_size=4), "test")
    assert drawn != paths_of(data_of(folder, test_size=4, seed=1), "test")


def test_the_order_of_samples_does_not_depend_on_that_of_the_files(folder, tmp_path):
    # Written in another order, to another folder.
    for path in sorted(folder.rglob("*.png"), reverse=True):
        (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(folder))
    first, second = data_of(folder), data_of(tmp_path)
    for split in ("train", "val", "test"):
        assert paths_of(first, split) == paths_of(second, split)
    assert first.fingerprint() == second.fingerprint()


def test_hidden_files_other_files_and_hidden_folders_are_passed_over(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            write(tmp_path / part / name / "one.PNG")
            write(tmp_path / part / name / "deep/er/zwei ä.jpeg")
            write(tmp_path / part / name / ".hidden.png")
            write(tmp_path / part / name / ".thumbnails/one.png")
            (tmp_path / part / name / "notes.txt").write_text("not an image")
        write(tmp_path / part / ".ipynb_checkpoints/one.png")
    data = data_of(tmp_path, val_size=1)
    assert data.class_names == ("a", "b")
    assert sorted(path for split in ("train", "val") for path in (paths_of(data, split))) == [
        "train/a/deep/er/zwei ä.jpeg",
        "train/a/one.PNG",
        "train/b/deep/er/zwei ä.jpeg",
        "train/b/one.PNG",
    ]
    assert epoch_of(data).input.shape == (3, 3, 16, 16)


@pytest.mark.parametrize(("place", "target"), [("train/cat/l", "."), ("train/l", "."), ("train/cat/a/l", "../../..")])
def test_a_link_back_to_a_folder_above_is_refused(tmp_path, place, target):
    for number in range(4):
        write(tmp_path / f"train/cat/{number}.png", number)
        write(tmp_path / f"val/cat/{number}.png", number)
    link = tmp_path / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    # A second one multiplies what the first adds.
    link.with_name("m").symlink_to(target)
    with pytest.raises(InputError, match="is a link back to a folder that it is in") as caught:
        ImageFolderDataModule(data_dir=tmp_path, val_size=1).setup()
    assert str(tmp_path / "train") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_to_other_folders_are_followed(tmp_path):
    for number in range(4):
        write(tmp_path / f"else/where/{number}.png", number)
        write(tmp_path / f"val/cat/{number}.png", number)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/cat").symlink_to(tmp_path / "else")
    (tmp_path / "train/cat/again").symlink_to("where")
    data = ImageFolderDataModule(data_dir=tmp_path, val_size=1)
    data.setup()
    assert len(data.dataset("train")) + len(data.dataset("val")) == 8


@pytest.mark.parametrize("suffix", ["bmp", "tif", "TIFF", "pgm", "ppm", "jfif"])
def test_a_class_may_have_files_of_one_kind_alone(folder, tmp_path, suffix):
    shutil.copytree(folder, tmp_path / "images")
    kind = {"jfif": "JPEG", "pgm": "PPM"}.get(suffix)
    expected = []
    for path in sorted((tmp_path / "images/train/bee").rglob("*.png")):
        with Image.open(path) as image:
            (image.convert("L") if suffix == "pgm" else image).save(path.with_suffix(f".{suffix}"), format=kind)
        path.unlink()
        expected.append(str(path.with_suffix(f".{suffix}").relative_to(tmp_path / "images")))
    data = data_of(tmp_path / "images")
    assert sorted(path for split in ("train", "val") for path in paths_of(data, split) if "bee" in path) == expected
    batch = epoch_of(data)
    assert (batch.target == 1).any()
    assert (batch.input[batch.target == 1].flatten(1).std(dim=1) > 0.1).all()


def test_a_second_setup_lists_nothing(folder, monkeypatch):
    data = data_of(folder)
    data.setup("fit")
    monkeypatch.setattr(image_folder.os, "walk", None)
    data.setup("test")
    assert len(data.dataset("train")) == 18


def test_a_class_may_have_no_test_images(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    shutil.rmtree(tmp_path / "images/val/bee")
    data = data_of(tmp_path / "images")
    assert data.num_classes == 3
    assert data.dataset("test").files.targets.tolist() == [0] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: shutil.rmtree(d / "train"),
            r"train is not there: data_dir must have train and val, each with .*; ImageNet is at https://image-net\.org$",
        ),
        (lambda d: shutil.rmtree(d / "val"), r"val is not there: data_dir must have train and val, each with one"),
        (lambda d: write(d / "val/dog/1.png"), r"val/dog is a class that .*train does not have: take it out, or add"),
        (lambda d: (d / "train/dog").mkdir(), r"train/dog holds no images \(.jpeg, .*\): fill it, or take it out"),
        (
            lambda d: [shutil.rmtree(path) for path in (d / "val").iterdir()] and write(d / "val/1.png"),
            r"val has no class folders: sort its images into one folder per class",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_refused(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "images")
    change(tmp_path / "images")
    with pytest.raises(InputError, match=message) as refused:
        data_of(tmp_path / "images").setup()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_size": 24}, "val_size=24 leaves none of 24 images to train on"),
        ({"subset": 19}, "subset=19 is larger than the 18 training images that val_size=6 leaves"),
        ({"test_size": 13}, "test_size=13 is larger than the 12 test images"),
    ],
)
def test_a_split_larger_than_the_data_is_refused(folder, arguments, message):
    with pytest.raises(InputError, match=f"ImageFolderDataModule: {message}"):
        data_of(folder, **arguments).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views_per_load": 0}, "views_per_load must be at least 1, got 0"),
        ({"batch_size": 9, "views_per_load": 2}, "batch_size=9 is not a multiple of views_per_load=2"),
        ({"views": 3, "views_per_load": 2}, "views=3 is not a multiple of views_per_load=2"),
        ({"image_size": 0}, "image_size=0 and resize_size=20: .* at least 1 and at most the second"),
        ({"image_size": 21}, "image_size=21 and resize_size=20: .* at least 1 and at most the second"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be two ascending parts .*, got \(0.0, 1.0\)"),
        ({"crop_scale": (0.5, 0.4)}, "crop_scale must be two ascending parts"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale must be two ascending parts"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio must be two ascending ratios above 0"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be two ascending ratios above 0"),
        ({"std": (0.2, 0.0, 0.2)}, r"std must be above 0 in every channel, got \(0.2, 0.0, 0.2\)"),
        ({"num_workers": -1}, "num_workers cannot be negative, got -1"),
    ],
)
def test_options_out_of_range_are_refused(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        data_of(folder, **arguments)


# Decoding


def as_pil(path):
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def saved(path, image, **options):
    image.save(path, **options)
    return path


COLOURED = Image.fromarray(pixels_of(5, 20, 28))


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("rgb.jpg", "RGB", {"quality": 95}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("rgb.png", "RGB", {}),
        ("grey.png", "L", {}),
        ("two.png", "1", {}),
        ("palette.png", "P", {}),
        ("palette_with_a_hole.png", "P", {"transparency": 0}),
        ("transparent.png", "RGBA", {}),
        ("grey_transparent.png", "LA", {}),
        ("rgb.webp", "RGB", {"lossless": True}),
        ("rgb.gif", "RGB", {}),
        # ImageNet has PNG and CMYK files under JPEG's name: the content counts.
        ("png_of_another_name.JPEG", "RGB", {"format": "PNG"}),
    ],
)
def test_files_are_decoded_to_rgb(tmp_path, name, mode, options):
    path = saved(tmp_path / name, COLOURED.convert(mode), **options)
    image = image_folder.decode(path)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(as_pil(path)).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_followed(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = saved(tmp_path / f"turned.{suffix}", COLOURED, exif=exif)
    image = image_folder.decode(path)
    assert tuple(image.shape[1:]) == ((20, 28) if orientation <= 4 else (28, 20))
    assert torch.equal(image, torch.from_numpy(as_pil(path)).permute(2, 0, 1))


def test_of_16_bits_the_upper_8_count(tmp_path):
    values = np.arange(0, 65536, 65536 // 80, dtype=np.uint16)[:80].reshape(8, 10)
    image = image_folder.decode(saved(tmp_path / "deep.png", Image.fromarray(values)))
    assert image.dtype == torch.uint8
    assert (image == torch.from_numpy((values // 256).astype(np.uint8))).all()


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    image = image_folder.decode(saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert image.shape == (3, 8, 12)
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]


def damaged(folder, content):
    """A copy of the folder with a damaged file in every class of ``train``."""
    copy = folder.parent / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    whole = (copy / "train/ant/0.png").read_bytes()
    for path in (copy / "train").rglob("*.png"):
        path.write_bytes(whole[:150] if content is None else content)
    return copy


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "cut"])
def test_a_file_that_cannot_be_decoded_is_named(folder, content):
    data = data_of(damaged(folder, content))
    with pytest.raises(InputError, match=r"train/\w+/.*\.png cannot be decoded \(\w.*\): mend it, or") as refused:
        data.dataset("train", augment=True)[0]
    assert "\n" not in str(refused.value)
    assert ".cpp" not in str(refused.value)


def chunk(kind, content, *, wrong=0):
    """A piece of a PNG file."""
    crc = zlib.crc32(kind + content) ^ wrong
    return len(content).to_bytes(4, "big") + kind + content + crc.to_bytes(4, "big")


def png(*, comment=b"", end=True):
    """A grey image of 4x3 pixels."""
    header = (4).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes([row] * 4) for row in range(3))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + comment + pixels + chunk(b"IEND", b"") * end


def refusal_of(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        image_folder.decode(path)
    assert str(refused.value).startswith(f"{path} cannot be decoded (")
    assert str(refused.value).endswith("): mend it, or take it out of the folder")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_png_file_with_any_flipped_bit_is_refused(tmp_path):
    whole = png()
    for place in range(8, len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        refusal_of(tmp_path / "flipped.png", bytes(flipped))
    for end in range(8, len(whole)):
        refusal_of(tmp_path / "cut.png", whole[:end])


def test_what_is_wrong_with_a_png_file_is_told(tmp_path):
    path, whole = tmp_path / "image.png", png()
    place = whole.index(b"IDAT")
    flipped = whole[: place + 6] + bytes([whole[place + 6] ^ 1]) + whole[place + 7 :]
    assert "the checksum of a PNG file's 'IDAT' does not fit" in refusal_of(path, flipped)
    comment = png(comment=chunk(b"tEXt", b"A\0b", wrong=1))
    assert "the checksum of a PNG file's 'tEXt' does not fit" in refusal_of(path, comment)
    assert "the PNG file is not complete" in refusal_of(path, png(end=False))
    header = (40000).to_bytes(4, "big") * 2 + bytes([16, 6, 0, 0, 0])
    bomb = whole[:8] + chunk(b"IHDR", header) + whole[whole.index(b"IDAT") - 4 :]
    assert re.search(r"has \d+ bytes for an image of 12800000000", refusal_of(path, bomb))
    assert "bytes for an image of 0" in refusal_of(path, whole[:8] + whole[whole.index(b"IDAT") - 4 :])


@pytest.mark.parametrize(
    "content",
    [
        png(),
        png(comment=chunk(b"tEXt", b"Title\0mine")),
        png() + b"more",
    ],
    ids=["plain", "comment", "more behind it"],
)
def test_what_is_no_pixel_of_a_png_is_left_out(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    image = image_folder.decode(tmp_path / "image.png")
    assert image.tolist() == [[[row] * 4 for row in range(3)]] * 3


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone.png cannot be decoded \(.*No such file"):
        image_folder.decode(tmp_path / "gone.png")


# Plain images and views


def naive_plain(path, resize, size):
    """The shorter side resized, and the centre of that, by Pillow."""
    with Image.open(path) as image:
        shorter = min(image.size)
        wide, tall = (int(resize * side / shorter) for side in image.size)
        resized = image.resize((wide, tall), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    return resized.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("split", ["val", "test"])
def test_validation_and_test_give_every_image_once_in_order_and_plain(folder, split):
    data = data_of(folder)
    batch = joined({"val": data.val_dataloader, "test": data.test_dataloader}[split]())
    paths = paths_of(data, split)
    assert batch.index.tolist() == list(range(len(paths)))
    assert batch.view.tolist() == [0] * len(paths)
    assert batch.input.dtype == torch.float32
    for image, path in zip(batch.input, paths, strict=True):
        assert torch.allclose(image.double(), normalised(naive_plain(folder / path, 20, 16)), atol=1.01 * LEVEL)


def test_prediction_reads_the_test_images(folder):
    data = data_of(folder)
    assert same(joined(data.predict_dataloader()), joined(data.test_dataloader()))


def naive_view(path, index, view, *, seed, size, scale, ratio):
    """A random resized crop and a flip, drawn by the definition and made by Pillow."""
    draws = uniform_draws(seed, torch.tensor([index]), torch.tensor([view]), 41)[0].tolist()
    with Image.open(path) as image:
        image.load()
    width, height = image.size
    box = (0, 0, width, height)
    for trial in range(10):
        area, shape, down, right = draws[1 + 4 * trial : 5 + 4 * trial]
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        shape = ratio[0] * (ratio[1] / ratio[0]) ** shape
        wide, tall = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(right * (width - wide + 1)), int(down * (height - tall + 1))
            box = (left, top, left + wide, top + tall)
            break
    made = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return ImageOps.mirror(made) if draws[0] < 0.5 else made


def test_a_view_is_the_crop_that_its_draws_give(folder):
    data = data_of(folder, seed=3)
    dataset = data.dataset("train", augment=True)
    keys = [(index, view) for index in range(18) for view in (0, 1, 7)]
    batch = dataset.__getitems__(keys)
    assert list(zip(batch.index.tolist(), batch.view.tolist(), strict=True)) == keys
    paths = paths_of(data, "train")
    for row, (index, view) in zip(batch.input, keys, strict=True):
        path = folder / paths[index]
        expected = naive_view(path, index, view, seed=3, size=16, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        assert torch.allclose(row.double(), normalised(expected), atol=1.01 * LEVEL)


def test_half_of_the_views_are_mirrored(folder):
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (0.1, 10.0)}
    fixed = data_of(folder, flip=False, **whole).dataset("train", augment=True)
    flipped = data_of(folder, flip=True, **whole).dataset("train", augment=True)
    keys = [(index, view) for index in range(18) for view in range(20)]
    plain, views = (dataset.__getitems__(keys).input for dataset in (fixed, flipped))
    kept, mirrored = ((views == other).flatten(1).all(1) for other in (plain, plain.flip(3)))
    assert (kept ^ mirrored).all()
    # 360 draws: a standard deviation of 9.5 around 180.
    assert 140 < mirrored.sum().item() < 220


def test_the_options_of_the_crop_are_used(folder):
    # Boxes of half a percent of the area are a pixel or two: views of nearly one colour.
    data = data_of(folder, crop_scale=(0.005, 0.005))
    views = epoch_of(data).input
    assert (views.flatten(2).std(2) < 0.02).float().mean() > 0.3
    assert (epoch_of(data_of(folder)).input.flatten(2).std(2) < 0.02).float().mean() < 0.05
    narrow = data_of(folder, crop_ratio=(0.2, 0.2))
    assert not torch.equal(epoch_of(narrow).input, epoch_of(data_of(folder)).input)


def test_views_seeds_and_epochs_differ(folder):
    data = data_of(folder)
    dataset, other = (data_of(folder, seed=seed).dataset("train", augment=True) for seed in (0, 1))
    other.files = dataset.files
    first, second, reseeded = (
        made.__getitems__([(index, view) for index in range(18)]).input
        for made, view in ((dataset, 0), (dataset, 1), (other, 0))
    )
    for one, another in ((first, second), (first, reseeded)):
        assert (one != another).flatten(1).any(1).all()
    assert by_key(epoch_of(data, 1)).view.tolist() == [1] * 18


@pytest.mark.slow
def test_a_view_is_the_same_bit_for_bit_in_any_batch_order_and_worker(folder):
    keys = [(index, view) for index in range(18) for view in (0, 3)]
    dataset = data_of(folder).dataset("train", augment=True)
    whole = dataset.__getitems__(keys)
    backwards = dataset.__getitems__(keys[::-1])
    assert same(whole, [part.flip(0) for part in backwards])
    for row, key in enumerate(keys):
        assert same(dataset[key], [part[row] for part in whole])
    assert same(dataset[4], dataset[4, 0])
    epochs = [
        by_key(epoch_of(data_of(folder, batch_size=size, order_seed=order, num_workers=workers), 3))
        for size, order, workers in ((8, 0, 0), (5, 1, 2), (18, 2, 1))
    ]
    assert same(epochs[0], epochs[1])
    assert same(epochs[0], epochs[2])
    assert torch.equal(epochs[0].input, whole.input[1::2])


@pytest.mark.slow
def test_a_view_is_the_same_bit_for_bit_in_a_worker_that_is_sent_everything(folder):
    dataset = data_of(folder, partners=True).dataset("train", augment=True)
    collate = data_of(folder).train_dataloader().collate_fn
    loaders = [
        DataLoader(dataset, batch_size=6, collate_fn=collate, num_workers=workers, multiprocessing_context=context)
        for workers, context in ((0, None), (1, "forkserver"))
    ]
    for here, there in zip(*loaders, strict=True):
        assert isinstance(there, Batch)
        assert same(here, there)
        assert same(here.partner, there.partner)


def test_a_pickled_dataset_makes_the_same_batches(folder):
    dataset = data_of(folder).dataset("train", augment=True)
    assert same(
        pickle.loads(pickle.dumps(dataset)).__getitems__([(2, 5), (0, 1)]), dataset.__getitems__([(2, 5), (0, 1)])
    )


def test_paths_lie_in_one_array_that_workers_share(folder):
    files = data_of(folder).dataset("train").files
    assert files.paths.dtype.kind == "S"
    assert files.paths.flags.c_contiguous


def test_partners_are_views_of_their_own_keys(folder):
    paired = data_of(folder, partners=True).dataset("train", augment=True)
    plain = data_of(folder).dataset("train", augment=True)
    keys = [(index, view) for index in range(18) for view in (0, 5)]
    batch = paired.__getitems__(keys)
    assert isinstance(batch, Batch)
    assert same(batch, plain.__getitems__(keys))
    pairs = list(zip(batch.partner.index.tolist(), batch.partner.view.tolist(), strict=True))
    assert same(batch.partner, plain.__getitems__(pairs))
    assert batch.partner.view.tolist() == batch.view.tolist()
    assert len(set(batch.partner.index.tolist())) > 9
    assert same(paired[3, 5].partner, [part[7] for part in batch.partner])
    assert data_of(folder, partners=True).dataset("val")[0].partner is None


def test_what_is_abstract_says_so():
    data = ImageDataModule(val_size=1)
    for ask in (data.setup, partial(data.dataset, "train")):
        with pytest.raises(NotImplementedError, match="ImageDataModule must define"):
            ask()
    for ask in (len, lambda dataset: dataset[0]):
        with pytest.raises(NotImplementedError, match="ViewDataset must define"):
            ask(ViewDataset(seed=0, partners=False))


# Several views of a decoding


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, in order."""
    paths, whole = [], image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda path: paths.append(path) or whole(path))
    return paths


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_image_is_decoded_once_for_the_views_that_follow_one_another(folder, decoded, count):
    data = data_of(folder, views=4, views_per_load=count)
    loader = data.train_dataloader()
    assert len(loader) == -(-18 * count // 8)
    for epoch in range(4 // count):
        decoded.clear()
        loader.sampler.set_epoch(epoch)
        rows = sum(len(batch.target) for batch in loader)
        assert rows == 18 * count
        assert len(decoded) == len(set(decoded)) == 18


@pytest.mark.parametrize("epoch", range(5))
def test_the_rows_of_an_image_are_the_next_views_of_it(folder, epoch):
    data = data_of(folder, views=6, views_per_load=2)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    expected = [(2 * epoch) % 6, (2 * epoch + 1) % 6]
    assert data.views_in_epoch(epoch) == expected
    seen = []
    for batch in loader:
        assert batch.index[0::2].tolist() == batch.index[1::2].tolist()
        assert batch.view.tolist() == expected * (len(batch.view) // 2)
        seen += batch.index[0::2].tolist()
    assert sorted(seen) == list(range(18))
    assert same(by_key(joined(loader)), data.dataset("train", augment=True).__getitems__(
        [(index, view) for index in range(18) for view in expected]
    ))  # fmt: skip


def test_without_a_number_of_views_they_go_on_for_ever(folder):
    data = data_of(folder, views_per_load=2)
    assert data.views_in_epoch(7) == [14, 15]
    assert epoch_of(data, 7).view.unique().tolist() == [14, 15]


def test_as_many_single_views_are_the_same_samples(folder):
    single, several = data_of(folder, views=4), data_of(folder, views=4, views_per_load=4)
    parts = [epoch_of(single, epoch) for epoch in range(4)]
    together = Batch(*(torch.cat(part) for part in zip(*parts, strict=True)))
    assert same(by_key(together), by_key(epoch_of(several)))


def test_evaluation_reads_one_view_whatever_training_reads(folder):
    data = data_of(folder, views=4, views_per_load=4)
    assert same(joined(data.val_dataloader()), joined(data_of(folder).val_dataloader()))


@pytest.mark.parametrize("processes", [2, 4, 5])
def test_processes_share_images_and_cut_none_apart(folder, processes):
    dataset = data_of(folder).dataset("train", augment=True)
    shares = []
    for rank in range(processes):
        sampler = ViewSampler(
            dataset, views=6, views_per_load=3, shuffle=True, seed=0, num_replicas=processes, rank=rank
        )
        sampler.set_epoch(1)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == 3 * -(-18 // processes)
    for share in shares:
        assert [view for _, view in share] == [3, 4, 5] * (len(share) // 3)
        assert share[0::3] == [(index, 3) for index, _ in share[1::3]] == [(index, 3) for index, _ in share[2::3]]
    alone = ViewSampler(dataset, views=6, views_per_load=3, shuffle=True, seed=0)
    alone.set_epoch(1)
    images = [index for parts in zip(*(share[0::3] for share in shares), strict=True) for index, _ in parts]
    # Every process has equally many: the first ones again at the end.
    assert images[:18] == [index for index, _ in list(alone)[0::3]]
    assert images[18:] == images[: len(images) - 18]


def test_surplus_rows_of_an_evaluation_do_not_count(folder):
    dataset = data_of(folder).dataset("train")
    keys = [list(ViewSampler(dataset, views=1, shuffle=False, seed=0, num_replicas=4, rank=rank)) for rank in range(4)]
    assert [key for part in keys for key in part if key[1] == -1] == [(0, -1), (1, -1)]
    assert same(list(dataset[0, -1])[:2], list(dataset[0, 0])[:2])
    assert not dataset[0, -1].counted
    counted = [dataset.__getitems__(part).counted for part in keys]
    assert [part if part is None else part.tolist() for part in counted] == [None, None, *[[True] * 4 + [False]] * 2]


class Notes(pl.Callback):
    """What a training read, epoch by epoch."""

    def __init__(self):
        self.read = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.read.append([])
        self.read[-1] += zip(batch.index.tolist(), batch.view.tolist(), strict=True)


def teachers_of(count=2):
    torch.manual_seed(5)
    networks = [TinyNet(width=8, in_channels=3) for _ in range(count)]
    for network in networks:
        torch.nn.init.normal_(network.head.weight)
    return networks


def kd(store):
    torch.manual_seed(0)
    network = TinyNet(in_channels=3)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return KDModule(network, store, num_classes=3, temperature=2.0, optimizer=optimizer)


def test_lightning_sets_the_epoch_of_the_sampler_and_keeps_it(folder):
    notes = Notes()
    data = data_of(folder, views=4, views_per_load=2)
    tiny_trainer(max_epochs=3, callbacks=[notes]).fit(kd(teachers_of()), datamodule=data)
    assert [sorted(epoch) for epoch in notes.read] == [
        [(index, view) for index in range(18) for view in views] for views in ([0, 1], [2, 3], [0, 1])
    ]
    assert notes.read[0] != notes.read[2]


# Stores


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def told_by(store_folder, data):
    """What a complete store says about every view of every sample, and the teachers themselves."""
    dataset = data.dataset("train", augment=True)
    batch = dataset.__getitems__([(index, view) for index in range(len(dataset)) for view in range(data.views)])
    module = kd(TeacherStore(store_folder, fill="never", shard_size=7))
    tiny_trainer(limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=data)
    told = module.teachers.store.read_or_ask(batch, None, device="cpu")["probabilities"]
    with torch.no_grad():
        asked = [F.softmax(network.eval()(batch.input) / 2, dim=1) for network in teachers_of()]
    return told, torch.stack(asked).mean(0)


def several_views(folder, **options):
    return data_of(folder, views=4, views_per_load=2, **options)


@pytest.mark.slow
def test_a_store_is_filled_while_training_and_says_what_the_teachers_say(folder, tmp_path):
    teachers, asked = teachers_of(), []
    teachers[0].register_forward_hook(lambda _, args, __: asked.append(len(args[0])))
    trainer = tiny_trainer(max_epochs=4, limit_val_batches=0)
    trainer.fit(kd(TeacherStore(tmp_path, teachers, shard_size=7)), datamodule=several_views(folder))
    # 4 views of 18 samples once, in the first two of the four epochs.
    assert sum(asked) == 72
    told, expected = told_by(tmp_path, several_views(folder))
    assert torch.allclose(told, expected, atol=1e-3)


class Kill(pl.Callback):
    """Stops the run at a step, as a kill would: nothing is finished."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class Losses(pl.Callback):
    """The losses of a run, step by step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def fitted(folder, store_folder, *, checkpoint=None, callbacks=()):
    losses = Losses()
    keep = pl.callbacks.ModelCheckpoint(store_folder.parent / f"{store_folder.name}_checkpoints", save_top_k=-1)
    trainer = tiny_trainer(
        max_epochs=4, limit_val_batches=0, callbacks=[losses, keep, *callbacks], enable_checkpointing=True
    )
    module = kd(TeacherStore(store_folder, teachers_of(), shard_size=7))
    trainer.fit(module, datamodule=several_views(folder), ckpt_path=checkpoint)
    return losses.values


# An epoch has 5 steps: in the middle of the first one, and of the second one, and at the ends of them.
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5, 7, 10])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_training_that_was_killed_goes_on_as_the_undisturbed_one(folder, tmp_path, step):
    expected = fitted(folder, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        fitted(folder, tmp_path / "killed", callbacks=[Kill(step)])
    kept = sorted((tmp_path / "killed_checkpoints").glob("*.ckpt"))
    assert len(kept) == (step - 1) // 5
    losses = fitted(folder, tmp_path / "killed", checkpoint=kept[-1] if kept else None)
    # What is known of the views that go on is asked again, and not read in half precision.
    assert losses == expected[5 * len(kept) :]
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_fill_a_store_together(folder, tmp_path, start_method):
    trainer = tiny_trainer(max_epochs=2, limit_val_batches=0, devices=2, strategy=f"ddp_{start_method}")
    trainer.fit(kd(TeacherStore(tmp_path, teachers_of(), shard_size=7)), datamodule=several_views(folder))
    told, expected = told_by(tmp_path, several_views(folder))
    assert torch.allclose(told, expected, atol=1e-3)


@pytest.mark.slow
def test_a_store_is_recorded_with_and_without_workers(folder, tmp_path):
    for workers in (0, 2):
        store = TeacherStore(tmp_path / str(workers), teachers_of(), shard_size=7)
        done = record(tiny_trainer(), kd(store), several_views(folder, num_workers=workers))
        assert done.answers == 72
        assert store.is_complete
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")
    told, expected = told_by(tmp_path / "0", several_views(folder))
    assert torch.allclose(told, expected, atol=1e-3)


def test_a_store_of_single_views_serves_several_at_once(folder, tmp_path):
    record(tiny_trainer(), kd(TeacherStore(tmp_path, teachers_of())), data_of(folder, views=4))
    module = kd(TeacherStore(tmp_path, fill="never"))
    tiny_trainer(max_epochs=2).fit(module, datamodule=several_views(folder))
    assert module.teachers.store.is_complete


# What a store's answers depend on


def test_the_fingerprint_knows_the_samples_and_their_order(folder, tmp_path):
    def after(change):
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "images")
        change(tmp_path / "images")
        return data_of(tmp_path / "images").fingerprint()["data"]

    def rename_cats(images):
        for part in ("train", "val"):
            (images / part / "cat").rename(images / part / "ape")

    data = data_of(folder)
    # A training image, not one of those for validation.
    one = paths_of(data, "train")[0]
    known = data.fingerprint()["data"]
    assert after(lambda images: None) == known
    seen = {
        "size": after(lambda images: (images / one).write_bytes((images / one).read_bytes() + b"\0")),
        "name": after(lambda images: (images / one).rename((images / one).with_suffix(".PNG"))),
        "missing": after(lambda images: (images / one).unlink()),
        "class": after(rename_cats),
        "seed": data_of(folder, seed=1).fingerprint()["data"],
        "subset": data_of(folder, subset=17).fingerprint()["data"],
    }  # fmt: skip
    every = [known, *seen.values()]
    assert all(data_difference(one, other) for one in every for other in every if one is not other)


@pytest.mark.parametrize(
    "option",
    [
        {"image_size": 15}, {"crop_scale": (0.1, 1.0)}, {"crop_ratio": (0.7, 4 / 3)}, {"flip": False},
        {"partners": True}, {"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}, {"seed": 1},
    ],
)  # fmt: skip
def test_the_fingerprint_knows_what_a_view_depends_on(folder, option):
    assert data_of(folder, **option).fingerprint()["transform"] != data_of(folder).fingerprint()["transform"]


@pytest.mark.parametrize(
    "option",
    [
        {"resize_size": 30}, {"batch_size": 2}, {"views": 4}, {"views_per_load": 2}, {"order_seed": 5},
        {"num_workers": 2}, {"test_size": 3}, {"mean": list(MEAN)}, {"crop_scale": [0.08, 1]},
    ],
)  # fmt: skip
def test_the_fingerprint_knows_nothing_else(folder, option):
    assert data_of(folder, **option).fingerprint() == data_of(folder).fingerprint()


# The command line


def configuration(tmp_path, folder, *, teachers=True, **data):
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 3, "in_channels": 3, "width": 2}}
    answers = {"path": str(tmp_path / "store"), "networks": [network] if teachers else None, "top_k": 2}
    options = {"student": network, "teachers": {"class_path": "TeacherStore", "init_args": answers}}
    sizes = {"image_size": 16, "resize_size": 20, "val_size": 6, "batch_size": 8, "num_workers": 0}
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path), "logger": False,
                    "enable_checkpointing": False, "enable_progress_bar": False},
        "model": {"class_path": "KDModule", "init_args": options},
        "data": {"class_path": "ImageFolderDataModule", "init_args": {"data_dir": str(folder), **sizes, **data}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


@pytest.mark.slow
def test_the_command_line_records_a_store_and_trains_from_it(folder, tmp_path, capsys):
    views = {"views": 4, "views_per_load": 2}
    assert main(["record", "--config", configuration(tmp_path, folder, **views)]) == 0
    said = capsys.readouterr().out
    assert "Recorded 72 answers of " in said
    assert "store is complete." in said
    assert main(["fit", "--config", configuration(tmp_path, folder, teachers=False, **views)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"hello", png().replace(b"IDAT", b"IDAU")], ids=["text", "damaged"])
def test_a_damaged_image_is_one_line_on_the_command_line(folder, tmp_path, capfd, workers, content):
    config = configuration(tmp_path, damaged(folder, content), num_workers=workers, views=2)
    assert main(["fit", "--config", config, "--trainer.num_sanity_val_steps", "0"]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("distill-lightning: error:")]
    assert line.startswith(f"distill-lightning: error: {folder.parent / 'damaged' / 'train'}")
    assert line.endswith("): mend it, or take it out of the folder")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data_dir": "no/such/folder"}, "no/such/folder/train is not there: data_dir must have train and val, each"),
        ({"val_size": 100}, "ImageFolderDataModule: val_size=100 leaves none of 24 images to train on"),
        ({"views": 3, "views_per_load": 2}, "views=3 is not a multiple of views_per_load=2"),
    ],
)
def test_bad_data_options_are_one_line_on_the_command_line(folder, tmp_path, capsys, data, message):
    assert main(["fit", "--config", configuration(tmp_path, folder, **data)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distill-lightning: error: {message}")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="pipe.png is no file: take it out of the folder"):
        decode(tmp_path / "pipe.png")


ROWS = b"".join(b"\0" + bytes(range(96)) for _ in range(32))
WHOLE = zlib.compress(ROWS)


DAMAGED = {
    "cut": (WHOLE[: len(WHOLE) // 2], 0),
    "flipped": (WHOLE[:20] + bytes([WHOLE[20] ^ 0xFF]) + WHOLE[21:], 0),
    "noise": (bytes(range(200)), 0),
    "filter 9": (zlib.compress(b"\t" + ROWS[1:]), 0),
    "few rows": (zlib.compress(ROWS[:300]), 0),
    "few rows of seven passes": (zlib.compress(ROWS[:300]), 1),
    "empty": (b"", 0),
}


def what_is_decoded(paths):
    """The shape of each image, or what is said of it."""
    lines = []
    for path in paths:
        try:
            lines.append(str(tuple(decode(path).shape)))
        except DamagedImageError as error:
            lines.append(str(error))
    return lines


def test_pixels_that_are_damaged_behind_right_checksums_are_one_line_each(tmp_path, elsewhere):
    """In another process, because torchvision's decoder would end this one."""
    paths = [tmp_path / f"{name}.png" for name in DAMAGED]
    for path, (stream, interlaced) in zip(paths, DAMAGED.values(), strict=True):
        header = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, interlaced)
        parts = [chunk(b"IHDR", header), chunk(b"IDAT", stream), chunk(b"IEND", b"")]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    for path, line in zip(paths, elsewhere(what_is_decoded, paths), strict=True):
        assert line == "(3, 32, 32)" or re.match(rf"{path} cannot be decoded .*: mend it", line), line
