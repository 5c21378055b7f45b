"""Language modelling on documentation strings: what is read, how it is split, and what batches hold."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from distill_lightning import Batch, DocstringsDataModule, InputError, SmallLSTM, SupervisedModule
from distill_lightning.data.datamodules.docstrings import read_docstrings
from distill_lightning.testing import tiny_trainer

MODULE = '''"""Module first.

    Indented line.
"""

import os  # a comment


def outer(x="""no documentation"""):
    """Outer, with an umlaut: \u00fc."""

    def inner():
        r"""Inner, with \\d."""

    return "no documentation"


class Thing:
    """Thing."""

    number = """no documentation"""

    async def method(self):
        "Method."

    def bare(self):
        pass


def last():
    """Last."""
'''
READ = "\n\n".join(
    [
        "Module first.",
        "Indented line.",
        "Outer, with an umlaut: \u00fc.",
        "Inner, with \\d.",
        "Thing.",
        "Method.",
        "Last.",
    ]
)


def word(number):
    return f"file {number:03d} " + "".join(chr(97 + (number * 7 + place * place) % 26) for place in range(40))


@pytest.fixture
def library(tmp_path):
    """Forty files of one string each, of 49 bytes, and files that do not count."""
    for number in range(40):
        path = tmp_path / ("package" if number % 2 else ".") / f"module_{number:03d}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""{word(number)}"""\n')
    for folder in ("test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "package/test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "unread.py").write_text('"""Nobody reads this."""\n')
    (tmp_path / "without.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text('"""Nobody reads this."""')
    return tmp_path


def data_of(folder, **options):
    return DocstringsDataModule(
        data_dir=folder, **({"length": 8, "val_size": 10, "test_size": 12, "batch_size": 4} | options)
    )


def text_of(windows):
    return bytes(windows.text.tolist())


def every(loader):
    return Batch(*(torch.cat(parts) for parts in zip(*loader, strict=True)))


def rows(data, split):
    dataset = data.dataset(split)
    return [tuple(row) for row in dataset.make(torch.arange(len(dataset)), torch.zeros(len(dataset))).input.tolist()]


# What is read


def test_the_strings_are_read_in_the_order_of_the_file(tmp_path):
    (tmp_path / "module.py").write_text(MODULE, encoding="utf-8")
    assert read_docstrings(tmp_path) == (READ.encode(),)


def test_files_are_read_in_the_order_of_their_paths_and_tests_are_left_out(library):
    names = sorted(f"package/module_{n:03d}.py" if n % 2 else f"module_{n:03d}.py" for n in range(40))
    assert read_docstrings(library) == tuple(word(int(name[-6:-3])).encode() for name in names)


def test_files_are_not_run(tmp_path):
    (tmp_path / "module.py").write_text('"""A string."""\nraise SystemExit("was run")\n')
    assert read_docstrings(tmp_path) == (b"A string.",)


def test_other_encodings_and_odd_strings_are_read(tmp_path):
    (tmp_path / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""\xfc"""\n')
    # An escape that Python warns of, and half of a pair, which UTF-8 has no bytes for.
    (tmp_path / "odd.py").write_text('"""a \\d and \\ud800"""\n')
    assert read_docstrings(tmp_path) == ("\u00fc".encode(), b"a \\d and ?")


def test_a_file_that_is_no_python_is_named(tmp_path):
    (tmp_path / "fine.py").write_text('"""Fine."""\n')
    (tmp_path / "broken.py").write_text("def :\n")
    with pytest.raises(InputError, match=r"broken\.py: invalid syntax"):
        data_of(tmp_path).setup()


@pytest.mark.parametrize("content", [None, "x = 1\n"])
def test_a_folder_without_strings_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "module.py").write_text(content)
    with pytest.raises(InputError, match=r"has no Python files with documentation strings: give data_dir"):
        data_of(tmp_path).setup()


@pytest.mark.slow
def test_the_standard_library_gives_more_than_a_million_bytes():
    data = DocstringsDataModule()
    data.setup()
    files = read_docstrings(data.data_dir)
    text = b"\n\n".join(files)
    assert len(text) > 1_000_000
    assert len(files) > 200
    assert b"Serialize ``obj`` to a JSON formatted ``str``." in text
    assert [len(data.dataset(split)) for split in ("val", "test")] == [1000, 1000]
    assert len(data.dataset("train")) > 10_000
    # It is text.
    letters = sum(chr(byte).isalpha() for byte in text[:100_000])
    assert letters > 60_000


# How it is split


def naive_splits(folder, *, seed=0, length=8, val_size=10, test_size=12):
    """Windows as tuples of bytes, by the rule of the docstring."""
    files = read_docstrings(folder)
    generator = torch.Generator().manual_seed(seed)
    queue = [files[place] for place in torch.randperm(len(files), generator=generator).tolist()]
    splits = {}
    for name, size in (("test", test_size), ("val", val_size)):
        text, windows = b"", []
        while len(windows) < size:
            text += queue.pop(0) + b"\n\n"
            windows = [text[start : start + length] for start in range(0, len(text) - length, length)]
        splits[name] = windows[:size]
    text = b"\n\n".join(queue)
    splits["train"] = [text[start : start + length] for start in range(0, len(text) - length, length)]
    return splits


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"length": 5, "val_size": 1, "test_size": 50}])
def test_the_splits_are_those_of_a_naive_reading(library, options):
    data, expected = data_of(library, **options), naive_splits(library, **options)
    for split in ("val", "test"):
        assert [bytes(row) for row in rows(data, split)] == expected[split]
    assert sorted(bytes(row) for row in rows(data, "train")) == sorted(expected["train"])


def test_no_file_is_in_two_splits(library):
    data = data_of(library)
    texts = {split: text_of(data.dataset(split)) for split in ("train", "val", "test")}
    for number in range(40):
        assert sum(word(number).encode() in text for text in texts.values()) == 1


def test_the_same_seed_splits_the_same_and_another_seed_otherwise(library):
    first, again, other = (data_of(library, seed=seed) for seed in (1, 1, 2))
    for split in ("train", "val", "test"):
        assert rows(first, split) == rows(again, split)
        assert rows(first, split) != rows(other, split)


def test_smaller_subsets_are_part_of_larger_ones_and_leave_the_rest_alone(library):
    sets = [data_of(library, subset=size) for size in (1, 10, 60, None)]
    read = [rows(data, "train") for data in sets]
    assert [len(part) for part in read[:3]] == [1, 10, 60]
    for smaller, larger in itertools.pairwise(read):
        assert larger[: len(smaller)] == smaller
    assert len({tuple(rows(data, "val")) for data in sets}) == 1


# Batches


def test_a_target_is_the_byte_that_follows(library):
    data = data_of(library)
    for split in ("train", "val", "test"):
        dataset = data.dataset(split)
        batch = dataset.__getitems__([(place, 0) for place in range(len(dataset))])
        text = text_of(dataset)
        assert batch.input.dtype == batch.target.dtype == torch.int64
        assert batch.input.shape == batch.target.shape == (len(dataset), 8)
        for row, start in enumerate(dataset.starts.tolist()):
            assert bytes(batch.input[row].tolist()) == text[start : start + 8]
            assert bytes(batch.target[row].tolist()) == text[start + 1 : start + 9]


def test_what_the_data_tell_of_themselves(library):
    data = data_of(library, length=16)
    assert (data.num_classes, data.input_shape, data.views) == (256, (16,), 1)
    assert DocstringsDataModule().input_shape == (64,)


def test_an_epoch_reads_every_window_once_in_an_order_of_its_own(library):
    data = data_of(library)
    epochs = []
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        epochs.append(every(loader))
    for batch in epochs:
        assert sorted(batch.index.tolist()) == list(range(len(data.dataset("train"))))
        assert (batch.view == 0).all()
    assert len({tuple(batch.index.tolist()) for batch in epochs}) == 3
    again = data_of(library).train_dataloader()
    assert every(again).index.tolist() == epochs[0].index.tolist()
    other = data_of(library, order_seed=5)
    assert every(other.train_dataloader()).index.tolist() != epochs[0].index.tolist()
    assert rows(other, "train") == rows(data, "train")
    assert every(data.val_dataloader()).index.tolist() == list(range(10))


def test_an_interrupted_epoch_goes_on_where_it_was(library):
    loader = data_of(library).train_dataloader()
    whole = [batch.index.tolist() for batch in loader]
    loader = data_of(library).train_dataloader()
    given = [batch.index.tolist() for batch in itertools.islice(loader, 3)]
    resumed = data_of(library).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert given + [batch.index.tolist() for batch in resumed] == whole


def test_processes_share_the_windows(library):
    data = data_of(library)
    found = []
    for rank in range(2):
        data.trainer = SimpleNamespace(
            world_size=2, global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        found.append(every(data.train_dataloader()).index.tolist())
    assert set(found[0]) | set(found[1]) == set(range(len(data.dataset("train"))))
    assert len(set(found[0]) & set(found[1])) <= 1


def test_the_fingerprint_is_of_the_training_windows(library):
    first = data_of(library).fingerprint()
    assert data_of(library, batch_size=2, order_seed=3).fingerprint() == first
    others = [{"seed": 1}, {"length": 9}, {"subset": 5}, {"val_size": 30}]
    known = [data_of(library, **options).fingerprint() for options in others]
    assert all(fingerprint != first for fingerprint in known)


@pytest.mark.slow
def test_a_language_model_learns_more_than_how_often_a_byte_comes(tmp_path):
    for number in range(30):
        (tmp_path / f"module_{number}.py").write_text(f'"""{"abcdefghij" * 8}"""\n')
    data = data_of(tmp_path, length=10, batch_size=16)
    torch.manual_seed(0)
    module = SupervisedModule(
        SmallLSTM(256, vocabulary=256, width=32), num_classes=256, input_shape=data.input_shape,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    )  # fmt: skip
    trainer = tiny_trainer(max_epochs=10)
    trainer.fit(module, datamodule=data)
    # Ten letters in a circle, and two line breaks after eighty of them.
    assert trainer.callback_metrics["val/accuracy"] > 0.9


# What is refused


@pytest.mark.parametrize("name", ["subset", "val_size", "test_size", "batch_size", "length"])
def test_a_size_that_is_not_positive_is_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1"):
        DocstringsDataModule(**{name: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_size": 10_000}, "not enough text for test_size=10000 windows of 8 bytes: lower it"),
        ({"val_size": 10_000}, "not enough text for val_size=10000 windows of 8 bytes: lower it"),
        ({"test_size": 120, "val_size": 133}, "leave nothing to train on: lower them"),
        ({"subset": 10_000}, r"subset=10000 is larger than the \d+ training windows that are left"),
    ],
)
def test_sizes_beyond_the_text_are_refused(library, options, message):
    with pytest.raises(InputError, match=message):
        data_of(library, **options).setup()
