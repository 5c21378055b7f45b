"""CIFAR's pickled files: as they are distributed, written again, damaged, and malicious."""

import io
import os
import pickle
import struct
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from distill_lightning import CIFARDataModule, InputError, KDModule, RandAugment, SmallResNet, SupervisedModule
from distill_lightning.data.datamodules import cifar
from distill_lightning.data.datamodules.cifar_pickle import read_pickle, whole_numbers
from distill_lightning.data.views import uniform_draws
from distill_lightning.studies.doctor.examination import examine
from distill_lightning.testing import CONTRACT, Kit, TinyNet, tiny_trainer

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
RANDOM = np.random.default_rng(0)


# Writing files


def python2(value):
    """What Python 2's pickle writes for a value in protocol 2, where text is a string of bytes."""
    if isinstance(value, bytes):
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return head + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for pair in value.items() for part in pair) + b"u"
    rebuilt = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + b"U\x01b" + b"\x87R"
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    dtype = b"cnumpy\ndtype\n" + b"U\x02u1K\x00K\x01\x87R" + b"(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    return rebuilt + b"(K\x01" + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


def official(content):
    return b"\x80\x02" + python2(content) + b"."


def as_text(value):
    return value.decode() if isinstance(value, bytes) else value


def with_lists(content):
    """Text for keys and names, lists for arrays."""
    lists = {key.decode(): value.tolist() if isinstance(value, np.ndarray) else value for key, value in content.items()}
    return {key: list(map(as_text, value)) if isinstance(value, list) else value for key, value in lists.items()}


def by_numpy(protocol, module):
    """Written by Python 3; ``module`` is where the version of NumPy has its function."""

    def write(content):
        made = pickle.dumps(content, protocol=protocol)
        for known in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
            made = made.replace(known, b"c" + module + b"\n")
        assert module in made or b"data" not in content
        return made

    return write


def by_old_numpy(content):
    """As by NumPy 1 in protocol 5, without frames, which tell the length of what is in them."""
    file, new, old = io.BytesIO(), b"numpy._core.numeric", b"numpy.core.numeric"
    pickler = pickle._Pickler(file, protocol=5)
    pickler.framer.start_framing = lambda: None
    pickler.dump(content)
    # Where NumPy 1 writes them, it is old already.
    assert (new in file.getvalue() or old in file.getvalue()) == (b"data" in content)
    return file.getvalue().replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)


def with_axes_exchanged(content):
    """Images as such, of which NumPy 2 writes the pixels in the order that they have in memory."""
    pixels = content.get(b"data")
    if pixels is not None:
        places_first = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(2, 3, 0, 1))
        content = content | {b"data": places_first.transpose(2, 3, 0, 1)}
    return pickle.dumps(content, protocol=5)


WRITERS = {
    "official": official,
    "python 3, protocol 2, old numpy": by_numpy(2, b"numpy.core.multiarray"),
    "python 3, protocol 2, new numpy": by_numpy(2, b"numpy._core.multiarray"),
    "python 3, protocol 3, old numpy": by_numpy(3, b"numpy.core.multiarray"),
    "python 3, protocol 4": lambda content: pickle.dumps(content, protocol=4),
    "python 3, protocol 5, new numpy": lambda content: pickle.dumps(content, protocol=5),
    "python 3, protocol 5, old numpy": by_old_numpy,
    "python 3, protocol 5, images with their axes exchanged": with_axes_exchanged,
    "text for keys, lists": lambda content: pickle.dumps(with_lists(content)),
    "text for keys, arrays by column and of other numbers": lambda content: pickle.dumps(
        {
            key.decode(): np.asfortranarray(value, dtype=">i4")
            if key in (b"data", b"labels", b"fine_labels")
            else value
            for key, value in content.items()
        },
        protocol=3,
    ),
    "images as such": lambda content: pickle.dumps(
        {key: value.reshape(-1, 3, 32, 32) if key == b"data" else value for key, value in content.items()}, protocol=4
    ),
}


def batch(count, classes, *, labels=b"labels"):
    """A file's content, as the official ones have it."""
    return {
        b"batch_label": b"a batch",
        labels: RANDOM.integers(0, classes, count).tolist(),
        b"data": RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"picture_%d.png" % number for number in range(count)],
    }


NAMES = {10: [f"kind {number}" for number in range(10)], 100: [f"sort {number}" for number in range(100)]}
SETS = {
    10: {
        **{f"data_batch_{number}": batch(6, 10) for number in range(1, 6)},
        "test_batch": batch(8, 10),
        "batches.meta": {b"num_vis": 3072, b"label_names": [name.encode() for name in NAMES[10]]},
    },
    100: {
        "train": batch(30, 100, labels=b"fine_labels"),
        "test": batch(8, 100, labels=b"fine_labels"),
        "meta": {b"fine_label_names": [name.encode() for name in NAMES[100]]},
    },
}
FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


def write(folder, classes=10, writer=official, **replaced):
    """A set's files in a folder; ``replaced`` contents by name, ``None``: no such file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (SETS[classes] | replaced).items():
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else writer(content))
    return folder


def data_of(folder, classes=10, **options):
    return CIFARDataModule(data_dir=folder, num_classes=classes, **({"val_size": 6} | options))


# What is read


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_files_are_read_whoever_wrote_them(tmp_path, classes, writer):
    write(tmp_path / FOLDERS[classes], classes, WRITERS[writer])
    data = data_of(tmp_path, classes)
    labels = b"labels" if classes == 10 else b"fine_labels"
    *training, test = [content for content in SETS[classes].values() if b"data" in content]
    for images, contents in zip(data.read(), (training, [test]), strict=True):
        pixels = np.concatenate([content[b"data"] for content in contents])
        assert images.images.dtype == torch.uint8
        assert torch.equal(images.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
        assert images.targets.tolist() == [label for content in contents for label in content[labels]]
        assert images.targets.dtype == torch.int64
    assert data.class_names == tuple(NAMES[classes])
    assert (data.num_classes, data.input_shape) == (classes, (3, 32, 32))


def test_the_hand_written_opcodes_are_what_pickle_reads():
    content = SETS[10]["test_batch"]
    read = pickle.loads(official(content), encoding="bytes")
    assert (read.pop(b"data") == content[b"data"]).all()
    assert read == {key: value for key, value in content.items() if key != b"data"}


@pytest.mark.parametrize("classes", [10, 100])
def test_the_folder_may_be_given_itself_and_the_usual_names_do_without_a_file(tmp_path, classes):
    write(tmp_path, classes, **{"batches.meta" if classes == 10 else "meta": None})
    data = data_of(str(tmp_path), classes)
    usual = data.class_names
    assert len(set(usual)) == classes
    assert list(usual) == sorted(usual)
    data.setup()
    assert data.class_names == usual
    assert len(data.dataset("train")) == 24


def test_a_batch_is_normalised_by_channel(tmp_path):
    data = data_of(write(tmp_path))
    found = next(iter(data.test_dataloader()))
    pixels = SETS[10]["test_batch"][b"data"].reshape(8, 3, 32, 32)
    for channel in range(3):
        wanted = (pixels[:, channel] / 255.0 - MEAN[channel]) / STD[channel]
        assert found.input[:, channel].numpy() == pytest.approx(wanted, abs=1e-5)
    assert found.target.tolist() == SETS[10]["test_batch"][b"labels"]


def test_by_default_views_are_padded_by_four_cropped_and_mirrored(tmp_path):
    data = data_of(write(tmp_path))
    views = data.dataset("train", augment=True)
    plain = data.dataset("train").images
    keys = [(index, view) for index in range(24) for view in range(4)]
    found = views.__getitems__(keys)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for image, (index, view) in zip(found.input, keys, strict=True):
        down, right, mirrored = uniform_draws(0, torch.tensor([index]), torch.tensor([view]), 3)[0].tolist()
        padded = functional.pad(plain[index], (4, 4, 4, 4))
        crop = padded[:, int(9 * down) : int(9 * down) + 32, int(9 * right) : int(9 * right) + 32]
        wanted = crop.flip(2) if mirrored < 0.5 else crop
        assert torch.allclose(image, (wanted / 255 - mean) / std, atol=1e-5)


def test_the_options_of_the_views_reach_the_data_set(tmp_path):
    data = data_of(write(tmp_path), cutout=8, randaugment=RandAugment(3, 5), padding=0, flip=False)
    assert (data.dataset("train", augment=True).cutout, data.dataset("val").cutout) == (8, 0)
    assert data.dataset("train", augment=True).randaugment == RandAugment(3, 5)


def test_all_training_images_may_be_trained_on(tmp_path):
    data = data_of(write(tmp_path), val_size=0, batch_size=10)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [30, 0, 8]
    torch.manual_seed(0)
    module = SupervisedModule(SmallResNet(10, width=2, in_channels=3), num_classes=10)
    before = module.student.head.weight.clone()
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert not torch.equal(module.student.head.weight, before)
    assert trainer.global_step == 3
    assert not [name for name in trainer.callback_metrics if name.startswith("val")]
    assert trainer.validate(module, datamodule=data) == []


class CIFARKit(Kit):
    """The contract's data, from files."""

    num_classes = fewest_classes = 10

    def __init__(self, folder):
        self.folder = folder

    def network(self, num_classes, *, norm):
        return TinyNet(num_classes, in_channels=3, norm=norm)

    def data(self, *, samples=24, batch_size=8, val_size=6, num_classes=10):
        return data_of(self.folder, num_classes, subset=samples, batch_size=batch_size, val_size=val_size)


@pytest.mark.slow
def test_the_contract_holds_on_them(tmp_path):
    def build(student, teachers, num_classes):
        return KDModule(student, teachers, num_classes=num_classes)

    build.kit = CIFARKit(write(tmp_path))
    for point in (
        "a_resumed_run_equals_the_uninterrupted_one",
        "one_sample_and_two_classes_work",
    ):
        CONTRACT[point](build)


@pytest.mark.slow
def test_the_doctor_finds_all_well_and_says_what_there_is_none_of(tmp_path):
    of_every_class = {
        name: content | {b"labels": [(6 * number + place) % 10 for place in range(6)]}
        for number, (name, content) in enumerate(SETS[10].items())
        if name.startswith("data_batch")
    }
    write(tmp_path, **of_every_class)
    for val_size, teachers in ((6, "teacher 0 (TinyNet): accuracy"), (0, "no validation to score them on")):
        student, teacher = (TinyNet(10, in_channels=3) for _ in range(2))
        data = data_of(tmp_path, val_size=val_size, batch_size=8)
        report = examine(KDModule(student, teacher, num_classes=10), data, trainer=tiny_trainer(max_epochs=1))
        assert report.is_well, report.rows()
        found = {finding.check: finding.found for finding in report.findings}
        assert "input float32 (8, 3, 32, 32); target int64 (8,)" in found["shapes"]
        assert teachers in found["teachers"]
        assert "in each of 10 classes" in found["classes"]


# Download


@pytest.mark.parametrize(("classes", "name"), [(10, "CIFAR10"), (100, "CIFAR100")])
def test_what_is_missing_is_asked_of_torchvision(tmp_path, monkeypatch, classes, name):
    asked = []
    monkeypatch.setattr(cifar.datasets, name, lambda root, **options: asked.append((root, options)))
    data_of(tmp_path, classes).prepare_data()
    assert asked == []
    data_of(tmp_path, classes, download=True).prepare_data()
    assert asked == [(str(tmp_path), {"download": True})]
    # Copies that are not the official ones would be replaced.
    write(tmp_path / FOLDERS[classes], classes, WRITERS["text for keys, lists"])
    data_of(tmp_path, classes, download=True).prepare_data()
    assert len(asked) == 1


# Malicious files


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path, function=os.mkdir):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "posix.mkdir"), (exec, r"(__builtin__|builtins)\.exec")])
def test_what_a_file_asks_to_be_run_is_not_run(tmp_path, protocol, function, name):
    path = tmp_path / "ran"
    evil = Touch(path, function) if function is os.mkdir else Touch(f"import os; os.mkdir({str(path)!r})", function)
    content = pickle.dumps({"data": evil, "labels": []}, protocol=protocol)
    pickle.loads(content)
    path.rmdir()
    write(tmp_path, data_batch_2=content)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/data_batch_2 asks for {name}, which .* not run: get .*cifar\.html$"
    ):
        data_of(tmp_path).setup()
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
        (b"cnumpy._core.numeric\nfromfile\n.", "numpy._core.numeric.fromfile"),
        (b"c_codecs\ndecode\n.", "_codecs.decode"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        (b"c__builtin__\ngetattr\n.", "__builtin__.getattr"),
        (b"ccopy_reg\n_reconstructor\n.", "copy_reg._reconstructor"),
    ],
)
def test_nothing_but_arrays_and_bytes_is_found(tmp_path, content, name):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=rf"file asks for {name}, which CIFAR's files do not need"):
        read_pickle(tmp_path / "file")


FROM_BUFFER = b"cnumpy.core.numeric\n_frombuffer\n"


@pytest.mark.parametrize("state", [b"}U\x05partsK\x01s", b"N}U\x0c__setstate__K\x01s\x86", b"(K\x01K\x02t"])
@pytest.mark.parametrize("known", [b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", FROM_BUFFER])
def test_a_file_cannot_change_what_reads_it(tmp_path, known, state):
    (tmp_path / "file").write_bytes(b"\x80\x02" + known + state + b"b.")
    with pytest.raises(InputError, match="file is damaged"):
        read_pickle(tmp_path / "file")
    (tmp_path / "file").write_bytes(official(SETS[10]["test_batch"]))
    assert whole_numbers(tmp_path / "file", read_pickle(tmp_path / "file"), "data").shape == (8, 3072)


U1 = b"cnumpy\ndtype\nU\x02u1\x85R"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"U\x02ab" + U1 + b"K\x02\x85X\x01\0\0\0A", "file is damaged: .* an array is in the order 'A'"),
        (b"U\x02ab" + U1 + b"K\x02\x85X\x01\0\0\0K", "file is damaged: .* an array is in the order 'K'"),
        (b"K\x02" + U1 + b"K\x02\x85X\x01\0\0\0C", "no whole numbers as 'data'"),
        (b"U\x02ab" + b"N" + b"K\x02\x85X\x01\0\0\0C", "no whole numbers as 'data'"),
        (b"U\x02ab" + U1 + b"K\x03\x85X\x01\0\0\0C", "no whole numbers as 'data': .*cannot reshape"),
        (b"U\x02ab" + U1, "file is damaged"),
    ],
)
def test_bytes_that_are_no_array_are_refused(tmp_path, given, message):
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x02}U\x04data" + FROM_BUFFER + b"(" + given + b"tRs.")
    with pytest.raises(InputError, match=message):
        whole_numbers(path, read_pickle(path), "data")


# Missing and damaged files


@pytest.mark.parametrize(
    ("classes", "name"), [(10, "data_batch_1"), (10, "data_batch_4"), (10, "test_batch"), (100, "test")]
)
def test_a_missing_file_is_named_with_the_way_out(tmp_path, classes, name):
    folder = write(tmp_path / FOLDERS[classes], classes, **{name: None})
    source = rf"https://\S+/cifar-{classes}-python\.tar\.gz"
    with pytest.raises(InputError, match=rf"^no {name} in {folder}: unpack {source} there, or give download=True$"):
        data_of(tmp_path, classes).setup()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=rf"no data_batch_1 in {tmp_path / 'none'}: unpack"):
        data_of(tmp_path / "none").setup()


def damaged(content):
    """Pieces of a file, and files with another byte somewhere."""
    for place in range(len(content)):
        yield content[:place]
        other = bytes([content[place] ^ (place * 37 % 255 + 1)])
        yield content[:place] + other + content[place + 1 :]
        # Keeps an object under a number of four bytes, for which there is no room.
        yield content[:place] + b"r" + content[place + 1 :]


@pytest.mark.parametrize("writer", [official, partial(pickle.dumps, protocol=5)])
def test_a_file_damaged_anywhere_is_read_or_refused(tmp_path, writer):
    small = writer({b"data": np.zeros((2, 3), np.uint8), b"labels": [1, 300]})
    path, refusals = tmp_path / "file", []
    for content in damaged(small):
        path.write_bytes(content)
        try:
            whole_numbers(path, read_pickle(path), "data")
        except InputError as error:
            refusals.append(str(error))
    assert all(line.startswith(str(path)) and "\n" not in line for line in refusals)
    assert len(refusals) > len(small)


PIXELS = SETS[10]["test_batch"][b"data"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "test_batch is damaged: get the python version again from http.*: EOFError"),
        (b"<html>", "test_batch is damaged"),
        (pickle.dumps([1]), "test_batch holds a list, not a dict: get"),
        ({b"labels": [1]}, "test_batch has no whole numbers as 'data': get .*: 'data'"),
        ({b"data": PIXELS}, "test_batch has no whole numbers as 'labels'"),
        (pickle.dumps({"data": PIXELS / 2, "labels": [1] * 8}), "no whole numbers as 'data': .* of the type 'f8'"),
        (pickle.dumps({"data": [[0.5]], "labels": [1]}), "no whole numbers as 'data': .* of the type float64"),
        (pickle.dumps({"data": [[1], [1, 2]], "labels": [1]}), "no whole numbers as 'data'"),
        (pickle.dumps({"data": np.array([None]), "labels": [1]}), "no whole numbers as 'data': .* of the type 'O8'"),
        ({b"data": PIXELS, b"labels": [1] * 7}, r"data \(8, 3072\) and labels \(7,\), not \(N, 3072\) and \(N,\)"),
        ({b"data": PIXELS[:, :784], b"labels": [1] * 8}, r"data \(8, 784\) and labels \(8,\), not"),
        (pickle.dumps({"data": PIXELS, "labels": [[1] * 8]}), r"data \(8, 3072\) and labels \(1, 8\), not"),
        (
            {b"data": PIXELS, b"labels": [1] * 7 + [10]},
            "labels go from 1 to 10, not from 0 to 9: these are not CIFAR-10's",
        ),
        (
            pickle.dumps({"data": PIXELS.astype(int) - 1, "labels": [1] * 8}),
            "data go from -1 to 254, not from 0 to 255",
        ),
    ],
)
def test_files_with_something_else_in_them_are_refused(tmp_path, content, message):
    write(tmp_path, test_batch=content)
    with pytest.raises(InputError, match=message):
        data_of(tmp_path).setup()


@pytest.mark.parametrize("names", [None, 7, [b"cat"], [b"cat"] * 9 + [3]])
def test_other_names_than_the_classes_are_refused(tmp_path, names):
    write(tmp_path, **{"batches.meta": pickle.dumps({"label_names": names})})
    with pytest.raises(InputError, match=r"batches\.meta does not name 10 classes as 'label_names': take it out"):
        data_of(tmp_path).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 20}, "num_classes must be 10 or 100, for CIFAR-10 or CIFAR-100, got 20"),
        ({"cutout": -1}, "cutout is a square's side in pixels, 0 for none, got -1"),
        ({"val_size": 30}, "CIFARDataModule: val_size=30 leaves none of 30 images to train on"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        data_of(tmp_path, **options).setup()
