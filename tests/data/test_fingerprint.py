"""Data are known again, and other data are not taken for them."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets

from distill_lightning import DigitsDataModule, ImageFolderDataModule, IndexedDataModule
from distill_lightning.data.columns import rows_at_hand
from distill_lightning.data.digests import digest_of
from distill_lightning.data.fingerprint import LOOKED_AT, data_difference, data_fingerprint, loader_fingerprint
from distill_lightning.testing import TinyDataModule


def pixels(count, seed=0):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def labels_of(count):
    return torch.arange(count) % 3


class Hidden(Dataset):
    """Has nothing at hand: samples are made when they are asked for."""

    def __init__(self, images, labels, change=lambda image: image):
        self.pairs_ = dict(enumerate(zip(images, labels.tolist(), strict=True)))
        self.change = change

    def __len__(self):
        return len(self.pairs_)

    def __getitem__(self, index):
        image, label = self.pairs_[index]
        return self.change(image), label


class Attributes(Hidden):
    """Has arrays at hand, as torchvision's small sets have."""

    def __init__(self, images, labels, change=lambda image: image):
        super().__init__(images, labels, change)
        self.data, self.targets = images.numpy(), labels.tolist()


class Wrapper(Dataset):
    """Anybody's."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Mappings(Hidden):
    """Samples are mappings, as those of Hugging Face are."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"pixel_values": image, "folder": "/mnt/a", "label": label}


KINDS = {
    "tensors": TensorDataset,
    "attributes": Attributes,
    "hidden": Hidden,
    "mappings": Mappings,
    "list": lambda images, labels: list(zip(images, labels, strict=True)),
    "subset": lambda images, labels: Subset(TensorDataset(images.flip(0), labels.flip(0)), range(len(images))[::-1]),
    "joined": lambda images, labels: ConcatDataset(
        [TensorDataset(images[:7], labels[:7]), TensorDataset(images[7:], labels[7:])]
    ),
    "wrapped": lambda images, labels: Wrapper(Attributes(images, labels)),
    "pillow": lambda images, labels: [
        (Image.fromarray((image[0].numpy() * 255).astype(np.uint8)), label)
        for image, label in zip(images, labels.tolist(), strict=True)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images, labels), ""),
        (lambda images, labels: (images[:-1], labels[:-1]), "40 samples, not 39"),
        (lambda images, labels: (images, torch.cat([labels[:17], 2 - labels[17:18], labels[18:]])), "other labels"),
        (lambda images, labels: (torch.cat([images[:9], 1 - images[9:10], images[10:]]), labels), "other contents"),
        (lambda images, labels: (images.flip(0), labels.flip(0)), "another order"),
        (lambda images, labels: (images[SWAPPED], labels[SWAPPED]), "another order"),
    ],
    ids=["same", "fewer", "label", "content", "reversed", "swapped"],
)
def test_every_difference_has_its_name_in_every_kind_of_data(kind, change, message):
    images, labels = pixels(40), labels_of(40)
    known = data_fingerprint(KINDS[kind](images, labels))
    present = data_fingerprint(KINDS[kind](*change(images, labels)))
    assert data_difference(known, present) == message


# Two samples of 40 that 16 spread ones are not among.
SWAPPED = [0, *range(1, 4), 7, 5, 6, 4, *range(8, 40)]


def test_a_loader_of_the_same_data_has_the_same_fingerprint_however_it_loads():
    dataset = Hidden(pixels(20), labels_of(20))
    known = loader_fingerprint(DataLoader(dataset, batch_size=4))
    for options in (
        {"batch_size": 7}, {"shuffle": True}, {"num_workers": 2}, {"drop_last": True}, {"collate_fn": list},
        {"batch_sampler": torch.utils.data.BatchSampler(range(20), 3, drop_last=False)},
    ):  # fmt: skip
        assert loader_fingerprint(DataLoader(dataset, **options)) == known


def test_indices_that_are_told_are_no_part_of_the_data():
    data = TinyDataModule()
    known = loader_fingerprint(data.train_dataloader())
    assert loader_fingerprint(IndexedDataModule(data).train_dataloader()) == known
    assert known["labels"] is not None


def test_a_data_set_that_makes_batches_is_asked_for_batches_of_one():
    class Batches(Hidden):
        def __getitem__(self, indices):
            assert isinstance(indices, list)
            samples = [super(Batches, self).__getitem__(index) for index in indices]
            return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])

    sampler = torch.utils.data.BatchSampler(range(20), 8, drop_last=False)

    def of(labels):
        return loader_fingerprint(DataLoader(Batches(pixels(20), labels), batch_size=None, sampler=sampler))

    assert data_difference(of(labels_of(20)), of(labels_of(20))) == ""
    assert data_difference(of(labels_of(20)), of(2 - labels_of(20))) == "other labels"


def test_of_a_stream_and_of_what_is_no_loader_nothing_is_known():
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("was read")

    unknown = loader_fingerprint(DataLoader(Stream()))
    assert unknown == loader_fingerprint([1, 2])
    assert unknown["seen"] == "nothing"
    assert set(unknown.values()) == {None, "nothing"}
    assert data_difference(unknown, data_fingerprint(TensorDataset(pixels(3)))) == ""


# Augmentation


class Own:
    """Draws from a generator that nobody can seed."""

    def __init__(self, share):
        self.draws, self.share = np.random.default_rng(), share

    def __call__(self, image):
        return image.flip(-1) if self.draws.random() < self.share else image


AUGMENTED = {
    "torch": lambda image: image + torch.rand_like(image),
    "numpy": lambda image: image + np.random.rand(),  # noqa: NPY002
    "python": lambda image: image.flip(-1) if random.random() < 0.5 else image,
    "own": Own(0.5),
    "rare": Own(0.02),
}


@pytest.mark.parametrize("kind", AUGMENTED)
@pytest.mark.parametrize("count", [1, 2, 40, LOOKED_AT + 44])
def test_augmented_data_are_the_same_data(kind, count):
    def of(labels):
        return data_fingerprint(Hidden(pixels(count), labels, AUGMENTED[kind]))

    known = of(labels_of(count))
    if kind != "rare":
        assert (known["contents"], known["some_contents"]) == (None, None)
    for _ in range(5):
        assert data_difference(known, of(labels_of(count))) == ""
    assert data_difference(known, of(1 + labels_of(count))) == "other labels"


def test_looking_draws_nothing():
    def drawn(look):
        pl.seed_everything(3)
        look()
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    for kind in ("torch", "numpy", "python"):
        dataset = Hidden(pixels(5), labels_of(5), AUGMENTED[kind])
        assert drawn(lambda dataset=dataset: data_fingerprint(dataset)) == drawn(lambda: None)


def test_a_data_set_that_opens_files_when_first_asked_has_not_opened_them():
    class Lazy(Hidden):
        file = None

        def __getitem__(self, index):
            self.file = "open"
            return super().__getitem__(index)

    dataset = Lazy(pixels(5), labels_of(5))
    loader_fingerprint(DataLoader(dataset))
    data_fingerprint(dataset)
    assert dataset.file is None


def test_a_list_that_is_filled_while_training_is_no_content():
    class Caching(Hidden):
        def __init__(self, images, labels):
            super().__init__(images, labels)
            self.images, self.targets = [None] * len(images), labels

        def __getitem__(self, index):
            self.images[index] = super().__getitem__(index)[0]
            return self.images[index], self.targets[index]

    dataset = Caching(pixels(300), labels_of(300))
    known = data_fingerprint(dataset)
    for _ in range(2):
        assert data_difference(known, data_fingerprint(dataset)) == ""
        for index in range(300):
            dataset[index]


def test_what_cannot_all_be_made_is_looked_at_here_and_there():
    count = 4 * LOOKED_AT
    known = data_fingerprint(Hidden(pixels(count), labels_of(count)))
    assert known["seen"] == f"labels of {LOOKED_AT}; contents of {LOOKED_AT}"
    other = data_fingerprint(Hidden(pixels(count).flip(0), labels_of(count).flip(0)))
    assert data_difference(known, other) == "other labels and contents"
    # The first and the last are always among them.
    for place in (0, count - 1):
        labels = labels_of(count).index_fill(0, torch.tensor(place), 7)
        assert data_difference(known, data_fingerprint(Hidden(pixels(count), labels))) == "other labels"


def test_large_mapped_files_are_not_read_whole(tmp_path):
    mapped = np.memmap(tmp_path / "x.bin", np.uint8, "w+", shape=(1000, 4))

    class Mapped(Hidden):
        def __init__(self):
            super().__init__(torch.from_numpy(np.array(mapped)), labels_of(1000))
            self.data = mapped

    assert data_fingerprint(Mapped())["seen"] == f"labels of {LOOKED_AT}; contents of {LOOKED_AT}"


@pytest.mark.parametrize(
    "value",
    [
        torch.rand(2, 3), torch.rand(3).bfloat16(), torch.tensor(True), torch.rand(0, 3), torch.eye(3).to_sparse(),
        np.arange(3), np.float32(1.5), np.array(["a", {"b": 1}], dtype=object), "text", b"bytes", 1, 2.5, None,
        [1, [2]], {"a": torch.ones(1)}, Path("x/y"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_digest_is_of_the_value(value):
    assert digest_of(value) == digest_of(value)
    assert digest_of(value) != digest_of([value])


def test_digests_tell_neighbours_apart():
    values = [
        1, 1.0, True, "1", b"1", None, [], [1], [[1]], ["1", "1"], ["11"], {"a": 1}, {"a": "1"}, torch.tensor(1),
        torch.tensor([1]), torch.tensor([1], dtype=torch.int32), torch.tensor([1.0]), np.int64(1), "/x/a", "/x/b",
    ]  # fmt: skip
    assert len({digest_of(value) for value in values}) == len(values)
    # Data may be moved.
    assert digest_of("/x/a.png") == digest_of("/elsewhere/b/a.png")


# Files


@pytest.fixture
def folder(tmp_path):
    """Six images in each of three classes, for training and for test; each has its own colour."""
    for part in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cat")):
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (8, 8), (40 * number, 80 * label, 30)).save(place / f"{number}.bmp")
    # Uncompressed, so that all are of one size; nobody decodes them.
    for path in (tmp_path / "images").rglob("*.bmp"):
        path.rename(path.with_suffix(".png"))
    return tmp_path / "images"


def ours(folder):
    return ImageFolderDataModule(data_dir=folder, image_size=8, resize_size=8, val_size=2).dataset("test")


def theirs(folder):
    return datasets.ImageFolder(str(folder / "val"))


def move_one(folder):
    (folder / "val/ant/0.png").rename(folder / "val/cat/x.png")


def exchange(folder):
    one, other = folder / "val/ant/0.png", folder / "val/ant/5.png"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("kind", [ours, theirs, lambda folder: Subset(theirs(folder), range(len(theirs(folder))))])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: None, ""),
        (lambda folder: [os.utime(path, (1, 1)) for path in folder.rglob("*.png")], ""),
        (move_one, "other names and labels"),
        (lambda folder: (folder / "val/bee/3.png").unlink(), "18 samples, not 17"),
        (lambda folder: (folder / "val/bee/3.png").rename(folder / "val/bee/3b.png"), "other names"),
        (lambda folder: (folder / "val/bee/3.png").write_bytes(b"longer" * 99), "other contents"),
        # The files are as large as before.
        (exchange, "other contents"),
    ],
    ids=["same", "touched", "label", "fewer", "renamed", "resized", "exchanged"],
)
def test_a_folder_of_images_is_known_again_wherever_it_lies(folder, tmp_path, kind, change, message):
    known = data_fingerprint(kind(folder))
    moved = tmp_path / "elsewhere/for/a/while"
    moved.parent.mkdir(parents=True)
    shutil.move(folder, moved)
    change(moved)
    assert data_difference(known, data_fingerprint(kind(moved))) == message


def test_of_files_is_said_what_was_looked_at(folder):
    assert data_fingerprint(ours(folder))["seen"] == "names, labels, sizes of all samples; contents of 18"


def test_names_that_are_no_files_are_names():
    class Named(Hidden):
        def __init__(self, names):
            super().__init__(pixels(3), labels_of(3))
            self.names = names

    known, other = data_fingerprint(Named(["a", "b", "c"])), data_fingerprint(Named(["a", "b", "d"]))
    assert data_difference(known, other) == "other names"
    assert rows_at_hand(Named(["a", "b", "c"])).contents is None


# This package's data


def digits(**options):
    return data_fingerprint(DigitsDataModule(**({"subset": 200} | options)).dataset("train"))


def test_options_that_leave_the_data_what_they_are_leave_the_fingerprint():
    known = digits(seed=0)
    for options in ({"batch_size": 3}, {"num_workers": 1}, {"order_seed": 5}, {"views": 4}, {"padding": 0}):
        assert digits(**options) == known
    assert data_difference(known, digits(seed=1)) == "other labels and contents"
    assert data_difference(known, digits(subset=201)) == "200 samples, not 201"


class Corrected(Dataset):
    """Labels that a table corrects on their way out."""

    def __init__(self, dataset, fixes):
        self.dataset, self.fixes = dataset, fixes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image, self.fixes.get(index, label)


class Reordered(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(len(self) - 1 - index)


@pytest.mark.parametrize("count", [40, 300])
def test_what_a_data_set_changes_on_its_way_out_is_seen(count):
    inputs, labels = torch.rand(count, 2), torch.arange(count) % 3
    plain = TensorDataset(inputs, labels)
    known = data_fingerprint(Corrected(plain, {}))
    assert data_difference(known, data_fingerprint(Corrected(plain, {}))) == ""
    wrong = {index: torch.tensor(0) for index in range(count)}
    assert data_difference(known, data_fingerprint(Corrected(plain, wrong))) == "other labels"
    assert data_difference(data_fingerprint(plain), data_fingerprint(Reordered(inputs, labels))) == ""
    known = data_fingerprint(Reordered(inputs, labels))
    assert data_difference(known, data_fingerprint(Reordered(inputs.roll(1, 0), labels.roll(1)))) != ""


def test_two_samples_that_an_own_subset_swaps_are_seen():
    class Own(Dataset):
        def __init__(self, dataset, places):
            self.dataset, self.places = dataset, places

        def __len__(self):
            return len(self.places)

        def __getitem__(self, index):
            return self.dataset[self.places[index]]

    plain, places = TensorDataset(torch.rand(80, 2), torch.arange(80) % 3), list(range(80))
    swapped = places.copy()
    swapped[41], swapped[43] = swapped[43], swapped[41]
    assert data_difference(data_fingerprint(Own(plain, places)), data_fingerprint(Own(plain, swapped))) != ""
