"""Fashion-MNIST's files, whole and damaged."""

import gzip
import struct

import pytest
import torch

from distill_lightning import FashionMNISTDataModule, InputError
from distill_lightning.data.datamodules import fashion_mnist
from distill_lightning.data.datamodules.fashion_mnist import DEBIAN_FOLDER, read_idx

TRAIN, TEST = 300, 40
NAMES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("t10k", "images"): "t10k-images-idx3-ubyte",
    ("t10k", "labels"): "t10k-labels-idx1-ubyte",
}


def idx_bytes(values, *, kind=8, shape=None):
    """The IDX format: two zero bytes, type, rank, sizes as big-endian 32-bit numbers, data."""
    shape = tuple(values.shape) if shape is None else shape
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values.flatten().tolist())


def random_arrays():
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        arrays[part, "images"] = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        arrays[part, "labels"] = torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)
    return arrays


ARRAYS = random_arrays()


def write(folder, *, packed=True, **contents):
    """The four files; ``contents`` replaces some by other bytes, ``train_images=b"..."``."""
    folder.mkdir(parents=True, exist_ok=True)
    for (part, kind), name in NAMES.items():
        content = contents.get(f"{part}_{kind}", idx_bytes(ARRAYS[part, kind]))
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content, 1, mtime=0) if packed else content)
    return folder


def data_of(folder, **arguments):
    return FashionMNISTDataModule(data_dir=folder, **({"val_size": 50} | arguments))


# whole files


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", [(), ("FashionMNIST", "raw")])
@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_the_files_are_read_packed_or_not_and_in_both_layouts(tmp_path, packed, layout, as_path):
    write(tmp_path.joinpath(*layout), packed=packed)
    for part, images in zip(("train", "t10k"), data_of(as_path(tmp_path)).read(), strict=True):
        assert images.images.dtype == torch.uint8
        assert images.targets.dtype == torch.int64
        assert torch.equal(images.images, ARRAYS[part, "images"][:, None])
        assert torch.equal(images.targets, ARRAYS[part, "labels"].long())


def test_packed_and_plain_files_may_stand_side_by_side(tmp_path):
    write(tmp_path)
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        packed = tmp_path / f"{name}.gz"
        (tmp_path / name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    train, test = data_of(tmp_path).read()
    assert torch.equal(train.images, ARRAYS["train", "images"][:, None])
    assert torch.equal(test.targets, ARRAYS["t10k", "labels"].long())


def test_a_batch_is_normalised(tmp_path):
    data = data_of(write(tmp_path))
    batch = next(iter(data.test_dataloader()))
    assert batch.input.shape == (TEST, 1, 28, 28)
    expected = (ARRAYS["t10k", "images"][:, None].double() / 255 - 0.286) / 0.353
    assert torch.allclose(batch.input.double(), expected, atol=1e-6)


def test_validation_comes_from_the_training_files_and_test_does_not(tmp_path):
    data = data_of(write(tmp_path), subset=100, test_size=30)
    rows = {
        split: {bytes(image.flatten().tolist()) for image in data.dataset(split).images}
        for split in ("train", "val", "test")
    }
    assert {split: len(images) for split, images in rows.items()} == {"train": 100, "val": 50, "test": 30}
    files = {part: {bytes(image.flatten().tolist()) for image in ARRAYS[part, "images"]} for part in ("train", "t10k")}
    assert rows["train"] | rows["val"] <= files["train"]
    assert not rows["train"] & rows["val"]
    assert rows["test"] <= files["t10k"]


def test_half_of_the_training_views_are_mirrored_by_default(tmp_path):
    data = data_of(write(tmp_path), padding=0, batch_size=250)
    plain = data.dataset("train").images
    batch = next(iter(data.train_dataloader()))
    pixels = (batch.input * 0.353 + 0.286).mul(255).round().to(torch.uint8)
    kept = (pixels == plain[batch.index]).flatten(1).all(1)
    mirrored = (pixels == plain[batch.index].flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 95 < mirrored.sum().item() < 155


def test_the_data_module_says_what_it_holds(tmp_path):
    data = data_of(write(tmp_path))
    assert data.input_shape == tuple(data.dataset("train")[0, 0].input.shape)
    assert data.num_classes == len(data.class_names) == 10


def test_without_a_folder_the_debian_package_is_read():
    assert FashionMNISTDataModule().data_dir == DEBIAN_FOLDER


# download


def test_download_asks_torchvision_for_the_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fashion_mnist.datasets, "FashionMNIST", lambda root, **options: asked.append((root, options)))
    data_of(tmp_path).prepare_data()
    assert asked == []
    data_of(tmp_path, download=True).prepare_data()
    assert asked == [(str(tmp_path), {"download": True})]


def test_download_needs_a_folder():
    with pytest.raises(InputError, match="download=True needs data_dir"):
        FashionMNISTDataModule(download=True)


# missing and damaged files


@pytest.mark.parametrize("name", NAMES.values())
def test_a_missing_file_is_named_with_the_ways_out(tmp_path, name):
    (write(tmp_path) / f"{name}.gz").unlink()
    with pytest.raises(InputError, match=rf"no {name}\.gz in {tmp_path}: apt-get install .*, or give data_dir"):
        data_of(tmp_path).setup()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=rf"no train-images-idx3-ubyte\.gz in {tmp_path / 'none'}"):
        data_of(tmp_path / "none").setup()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_gz_is_refused(tmp_path, name, kept):
    path = write(tmp_path) / f"{name}.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=rf"{path} is (damaged .*|not an IDX file of bytes): fetch it again"):
        data_of(tmp_path).setup()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize("place", [0, 0.5, -6, -2])
def test_a_bit_flipped_in_a_gz_is_noticed(tmp_path, name, place):
    # In the magic number, in the middle of the data, in the check sum, in the length.
    path = write(tmp_path) / f"{name}.gz"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if place == 0.5 else place] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=rf"{path} is damaged"):
        data_of(tmp_path).setup()


@pytest.fixture
def small_gz(tmp_path):
    path = tmp_path / "small.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.arange(12, dtype=torch.uint8).reshape(3, 4)), 0, mtime=0))
    return path


@pytest.mark.parametrize("name", ["bomb.gz", "large"])
def test_a_file_is_not_read_beyond_its_limit(tmp_path, name):
    path, content = tmp_path / name, idx_bytes(torch.zeros(3, 2**20, dtype=torch.uint8))
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(InputError, match=rf"{name} holds more than 2,000,000 bytes: .* larger limit of read_idx"):
        read_idx(path, limit=2_000_000)
    assert read_idx(path, limit=len(content)).shape == (3, 2**20)
    with pytest.raises(InputError, match="holds more than"):
        read_idx(path, limit=len(content) - 1)


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(2**9):
            file.write(bytes(2**20))
    with pytest.raises(InputError, match="holds more than 268,435,456 bytes: it is not one of Fashion-MNIST's files"):
        read_idx(path)


def test_a_gz_cut_anywhere_is_refused(small_gz):
    content = small_gz.read_bytes()
    for length in range(len(content)):
        small_gz.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"small\.gz is"):
            read_idx(small_gz)


def test_a_bit_flipped_anywhere_in_the_data_of_a_gz_is_refused(small_gz):
    # Ten bytes of header and one with the bits that begin a stored block; behind them every bit counts.
    content = small_gz.read_bytes()
    for place in range(11, len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            small_gz.write_bytes(bytes(flipped))
            with pytest.raises(InputError, match=r"small\.gz is"):
                read_idx(small_gz)


LABELS = torch.arange(10, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of bytes"),
        (b"\0\0\x08", "not an IDX file of bytes"),
        (b"\0\0\x08\x01\0\0", "not an IDX file of bytes"),
        (b"<html>not found</html>", "not an IDX file of bytes"),
        (idx_bytes(LABELS, kind=0x0D), "not an IDX file of bytes"),
        (b"\1" + idx_bytes(LABELS)[1:], "not an IDX file of bytes"),
        (b"\0\1" + idx_bytes(LABELS)[2:], "not an IDX file of bytes"),
        (idx_bytes(LABELS)[:-1], r"is damaged: 9 bytes of data for shape \(10,\): fetch it again"),
        (idx_bytes(LABELS) + b"\0", r"is damaged: 11 bytes of data for shape \(10,\)"),
        (idx_bytes(LABELS, shape=(11,)), r"is damaged: 10 bytes of data for shape \(11,\)"),
        (idx_bytes(LABELS, shape=(2, 6)), r"is damaged: 10 bytes of data for shape \(2, 6\)"),
        (idx_bytes(LABELS, shape=(2**32 - 1,) * 3), "is damaged: 10 bytes of data for shape"),
        (idx_bytes(LABELS[:0], shape=(2**16, 2**16, 2**16, 2**16)), "is damaged: 0 bytes of data for shape"),
    ],
    ids=[
        "empty file",
        "cut magic number",
        "cut header",
        "web page",
        "floats",
        "first byte",
        "second byte",
        "a byte short",
        "a byte long",
        "one label too many in the header",
        "another rank in the header",
        "huge sizes",
        "sizes whose product overflows to 0",
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_no_idx_file_is_refused(tmp_path, content, message, packed):
    path = tmp_path / ("file.gz" if packed else "file")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=message):
        read_idx(path)


@pytest.mark.parametrize("shape", [(10,), (2, 5), (1, 1, 10), (0, 28, 28)])
def test_an_idx_file_of_any_rank_is_read(tmp_path, shape):
    values = LABELS[: torch.Size(shape).numel()].reshape(shape)
    (tmp_path / "file").write_bytes(idx_bytes(values))
    read = read_idx(tmp_path / "file")
    assert read.dtype == torch.uint8
    assert torch.equal(read, values)
    read.add_(1)  # writable


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("label", [10, 255])
def test_labels_out_of_range_are_refused(tmp_path, part, label):
    labels = ARRAYS[part, "labels"].clone()
    labels[3] = label
    write(tmp_path, **{f"{part}_labels": idx_bytes(labels)})
    with pytest.raises(
        InputError, match=rf"{tmp_path}: the {part} labels go up to {label}, not 9: these are not Fashion-MNIST's files"
    ):
        data_of(tmp_path).setup()


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("count", [0, 1, 39])
def test_another_number_of_labels_than_images_is_refused(tmp_path, part, count):
    write(tmp_path, **{f"{part}_labels": idx_bytes(ARRAYS[part, "labels"][:count])})
    with pytest.raises(InputError, match=rf"the {part} files hold images .* and labels \({count},\), not"):
        data_of(tmp_path).setup()


@pytest.mark.parametrize("shape", [(300, 784), (300, 14, 56), (300 * 784,)])
def test_images_of_another_shape_are_refused(tmp_path, shape):
    write(tmp_path, train_images=idx_bytes(ARRAYS["train", "images"], shape=shape))
    with pytest.raises(InputError, match=r"not \(N, 28, 28\) and \(N,\): these are not Fashion-MNIST's files"):
        data_of(tmp_path).setup()


def test_labels_of_two_dimensions_are_refused(tmp_path):
    write(tmp_path, train_labels=idx_bytes(ARRAYS["train", "labels"], shape=(300, 1)))
    with pytest.raises(InputError, match=r"labels \(300, 1\), not"):
        data_of(tmp_path).setup()


def test_empty_files_are_refused(tmp_path):
    empty = {"train_images": idx_bytes(torch.empty(0, 28, 28)), "train_labels": idx_bytes(torch.empty(0))}
    write(tmp_path, **empty)
    with pytest.raises(InputError, match="val_size=50 leaves none of 0 images to train on"):
        data_of(tmp_path).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_size": 300}, "FashionMNISTDataModule: val_size=300 leaves none of 300 images to train on"),
        ({"subset": 251}, "subset=251 is larger than the 250 training images that val_size=50 leaves"),
        ({"test_size": 41}, "test_size=41 is larger than the 40 test images"),
    ],
)
def test_a_split_larger_than_the_files_is_refused(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        data_of(write(tmp_path), **arguments).setup()


# the real files


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_debian_files_are_fashion_mnist():
    data = FashionMNISTDataModule()
    train, test = data.read()
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert train.targets.bincount().tolist() == [6000] * 10
    assert test.targets.bincount().tolist() == [1000] * 10
    pixels = train.images.flatten().bincount(minlength=256).double()
    values = torch.arange(256) / 255
    mean = (pixels * values).sum().item() / pixels.sum().item()
    deviation = ((pixels * (values - mean) ** 2).sum().item() / pixels.sum().item()) ** 0.5
    assert mean == pytest.approx(data.mean, abs=1e-3)
    assert deviation == pytest.approx(data.std, abs=1e-3)
