"""Rows in files beside the checkpoint: the same store, through damage, moves, kills, a full disk and two processes."""

import copy
import errno
import io
import json
import os
import pickle
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from distill_lightning import InputError
from distill_lightning.storage import FORMAT, PredictionStore, Sidecar, files
from distill_lightning.storage import rows as rows_file
from distill_lightning.testing.processes import leave_the_group

N, K = 11, 5
KINDS = [
    {},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"top_k": 2},
    {"top_k": 1, "dtype": torch.float16},
    {"top_k": K, "dtype": torch.bfloat16},
]


def probabilities(count, classes=K, seed=0):
    return (torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * 3).softmax(1)


def everything(store):
    return store.read(torch.arange(store.num_samples))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(everything(first), everything(second), strict=True))


def loaded(state):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def store_in(folder, *, keep=2, writes=True, **kind):
    return PredictionStore(N, K, **kind, sidecar=Sidecar(folder, keep=keep, writes=writes))


def filled(folder, generations=1, **options):
    """Every sample written in every generation but the last of the samples, which is only written in the first."""
    store = store_in(folder, **options)
    for generation in range(generations):
        count = N - (generation > 0)
        store.write(torch.arange(count), probabilities(count, seed=generation))
        store.advance()
    return store


def names(folder):
    """The files without the training's number."""
    return sorted(path.name.split(".", 1)[1] for path in Path(folder).iterdir())


def path_of(state, name="rows", folder=None):
    reference = state["sidecar"][name]
    return Path(folder or reference["folder"]) / reference["file"]


@pytest.fixture(params=["mapped", "on a device"])
def where(request, monkeypatch):
    """A store on the CPU maps its file; on another device, for which the CPU stands here, it keeps both buffers."""
    if request.param == "on a device":
        monkeypatch.setattr(PredictionStore, "_reads_the_file", False)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_is_the_store_without_files(tmp_path, kind, where, monkeypatch):
    # Several pieces of everything.
    monkeypatch.setattr(rows_file, "_PIECE_BYTES", 24)
    beside, inside = store_in(tmp_path, **kind).to("cpu"), PredictionStore(N, K, **kind)
    generator = torch.Generator().manual_seed(5)
    for epoch in range(4):
        for step in range(3):
            # Drawn with replacement: samples come twice, others not at all.
            index, rows = torch.randint(N, (3,), generator=generator), probabilities(3, seed=10 * epoch + step)
            for store in (beside, inside):
                store.write(index, rows)
            assert same(beside, inside)
        for store in (beside, inside):
            store.advance()
        assert same(beside, inside)
        assert beside.sidecar.generation == epoch + 1
    assert 0 < int(everything(beside)[1].sum()) < N


def test_nothing_is_known_at_first_and_an_epoch_without_writing_makes_no_file(tmp_path):
    store = store_in(tmp_path / "rows")
    probs, known = everything(store)
    assert not known.any()
    assert probs.tolist() == [[pytest.approx(1 / K)] * K] * N
    store.advance()
    assert not (tmp_path / "rows").exists()
    assert store.state_dict()["sidecar"]["rows"] is None


def test_a_file_is_a_page_of_json_the_rows_and_a_checksum(tmp_path):
    store = store_in(tmp_path, dtype=torch.float16, top_k=2)
    store.write(torch.arange(N - 1), probabilities(N - 1))
    store.advance()
    content = path_of(store.state_dict()).read_bytes()
    header = json.loads(content[:4096])
    fields = [
        {"name": "probabilities", "dtype": "float16", "shape": [2]},
        {"name": "classes", "dtype": "int16", "shape": [2]},
    ]
    wanted = {
        "format": FORMAT, "num_samples": N, "num_classes": K, "dtype": "float16", "top_k": 2, "rows": N,
        "generation": 1, "pending": 0, "training": store.sidecar.training, "fields": fields,
    }  # fmt: skip
    assert header == wanted
    probs = np.frombuffer(content[4096 : 4096 + N * 2 * 2], dtype="<f2").reshape(N, 2)
    classes = np.frombuffer(content[4096 + N * 2 * 2 : -4], dtype="<i2").reshape(N, 2)
    for row, values, best in zip(probabilities(N - 1).tolist(), probs, classes, strict=False):
        order = sorted(range(K), key=lambda k, row=row: -row[k])[:2]
        assert best.tolist() == order
        assert values.tolist() == [float(np.float16(row[k])) for k in order]
    assert not probs[-1].any()
    assert int.from_bytes(content[-4:], "little") == zlib.crc32(content[:-4])


def test_a_process_holds_one_buffer_and_maps_the_other(tmp_path, monkeypatch):
    marks, buffer = N * 8 + N, N * K * 4
    store = filled(tmp_path)
    assert store.nbytes == buffer + marks
    assert not store._now
    assert isinstance(store._file._bytes.base, np.memmap)
    assert not store._file._bytes.flags.writeable
    copies = [copy.deepcopy(store), pickle.loads(pickle.dumps(store))]
    assert all(same(store, other) and isinstance(other._file._bytes.base, np.memmap) for other in copies)
    with monkeypatch.context() as patch:
        patch.setattr(PredictionStore, "_reads_the_file", False)
        store.to("cpu")
        assert store.nbytes == 2 * buffer + marks
        kept = everything(store)
    # Back from the device.
    store.to("cpu")
    assert store.nbytes == buffer + marks
    assert all(torch.equal(a, b) for a, b in zip(kept, everything(store), strict=True))
    assert same(store, copies[0])


def test_what_is_read_is_a_copy_and_the_file_does_not_change(tmp_path):
    store = filled(tmp_path)
    content = path_of(store.state_dict()).read_bytes()
    read, _ = everything(store)
    kept = read.clone()
    read.zero_()
    store.write(torch.arange(N), probabilities(N, seed=7))
    assert torch.equal(everything(store)[0], kept)
    assert path_of(store.state_dict()).read_bytes() == content


def test_unknown_samples_are_refused(tmp_path):
    with pytest.raises(InputError, match="num_samples=11 does not fit the data's indices: index 11 is out of bounds"):
        filled(tmp_path).read(torch.tensor([3, N]))


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("into", ["files", "other files", "memory"])
@pytest.mark.parametrize("come_from", ["files", "memory"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_in_the_middle_of_an_epoch_loses_nothing(tmp_path, kind, come_from, into, where):
    def made(place):
        return PredictionStore(N, K, **kind) if place == "memory" else store_in(tmp_path / place, **kind).to("cpu")

    store, other = made(come_from), made(into)
    store.write(torch.arange(N - 2), probabilities(N - 2))
    store.advance()
    store.write(torch.tensor([1, 2, 10]), probabilities(3, seed=1))
    # What the other held is forgotten.
    other.write(torch.tensor([5, 9]), probabilities(2, seed=2))
    other.advance()
    other.write(torch.tensor([6, 9]), probabilities(2, seed=3))
    other.load_state_dict(loaded(store.state_dict()))
    third = made(into)
    for step in range(2):
        assert same(store, other)
        # A checkpoint of what has just been loaded.
        third.load_state_dict(loaded(other.state_dict()))
        assert same(store, third)
        for one in (store, other):
            # The later write of sample 2 must win over the loaded one.
            one.write(torch.tensor([2, 3]), probabilities(2, seed=4 + step))
            one.advance()
    third.load_state_dict(loaded(other.state_dict()))
    assert same(store, other)
    assert same(store, third)
    assert everything(other)[1].tolist() == [True] * 9 + [False, True]


def test_a_checkpoint_before_anything_is_readable_goes_on_too(tmp_path, where):
    store, whole = store_in(tmp_path).to("cpu"), PredictionStore(N, K)
    for one in (store, whole):
        one.write(torch.arange(4), probabilities(4))
    other = store_in(tmp_path).to("cpu")
    other.load_state_dict(loaded(store.state_dict()))
    assert not everything(other)[1].any()
    for one in (other, whole):
        one.advance()
    assert same(other, whole)
    empty = PredictionStore(N, K)
    empty.load_state_dict(loaded(store_in(tmp_path).state_dict()))
    assert not everything(empty)[1].any()


def test_a_checkpoint_holds_marks_and_plain_values_but_no_rows(tmp_path):
    for kind in KINDS:
        store = filled(tmp_path, **kind)
        store.write(torch.tensor([3]), probabilities(1))
        state = store.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        assert {name: tuple(value.shape) for name, value in tensors.items()} == {"known": (N,), "pending": (1,)}
        rest = json.loads(json.dumps({name: value for name, value in state.items() if name not in tensors}))
        assert {name: value for name, value in loaded(state).items() if name not in tensors} == rest
        for name in ("rows", "pending"):
            reference, content = rest["sidecar"][name], path_of(state, name).read_bytes()
            assert reference["bytes"] == len(content)
            assert reference["crc"] == zlib.crc32(content[:-4])


def test_saving_changes_nothing_and_saving_again_writes_nothing(tmp_path):
    stores = [store_in(tmp_path / str(save)) for save in range(2)]
    for step in range(4):
        for save, store in enumerate(stores):
            store.write(torch.tensor([step, 2 * step]), probabilities(2, seed=step))
            if save:
                first, second = store.state_dict(), store.state_dict()
                assert first["sidecar"] == second["sidecar"]
            if step == 1:
                store.advance()
    assert names(tmp_path / "0") == ["000001.rows"]
    assert names(tmp_path / "1") == ["000001.000001.pending", "000001.000002.pending", "000001.rows"]
    for store in stores:
        store.advance()
    assert same(*stores)


# Which files are kept


@pytest.mark.parametrize(
    ("keep", "saved", "kept"),
    [
        (2, [], [6, 7]),
        (2, [1, 2, 3, 4, 5, 6, 7], [6, 7]),
        # The last checkpoint can always be resumed.
        (2, [2], [2, 6, 7]),
        (2, [2, 4], [4, 6, 7]),
        (2, [6], [6, 7]),
        (4, [], [4, 5, 6, 7]),
        (3, [1, 2, 3], [2, 3, 5, 6, 7]),
    ],
)
def test_the_last_generations_are_kept_and_those_of_the_last_checkpoints(tmp_path, keep, saved, kept):
    store = store_in(tmp_path, keep=keep)
    for generation in range(1, 8):
        store.write(torch.arange(N), probabilities(N, seed=generation))
        store.advance()
        if generation in saved:
            state = loaded(store.state_dict())
            store = store_in(tmp_path, keep=keep)
            store.load_state_dict(state)
    assert names(tmp_path) == [f"{generation:06d}.rows" for generation in kept]


def test_pending_files_go_with_their_rows_and_the_oldest_first(tmp_path):
    store = store_in(tmp_path)
    for number in range(3):
        store.write(torch.tensor([number]), probabilities(1, seed=number))
        states = [loaded(store.state_dict())]
    assert names(tmp_path) == ["000000.000002.pending", "000000.000003.pending"]
    # Resumed, it counts on.
    store = store_in(tmp_path)
    store.load_state_dict(states[-1])
    store.write(torch.tensor([5]), probabilities(1))
    store.state_dict()
    assert names(tmp_path) == ["000000.000003.pending", "000000.000004.pending"]
    for generation in (1, 2):
        store.advance()
        store.write(torch.tensor([generation]), probabilities(1))
        store.state_dict()
    assert names(tmp_path) == ["000001.000001.pending", "000001.rows", "000002.000001.pending", "000002.rows"]


def test_files_of_others_are_left_alone(tmp_path):
    store = filled(tmp_path)
    training = store.sidecar.training
    others = ["README", f"{training}.000001.rows.bak", "0badcafe.000001.rows", "partial.1.0badcafe.000001.rows"]
    half = tmp_path / f"partial.1.{training}.000002.rows"
    for name in (*others, half.name):
        (tmp_path / name).write_text("")
    for generation in range(3):
        store.write(torch.arange(N), probabilities(N, seed=generation))
        store.advance()
    assert all((tmp_path / name).exists() for name in others)
    assert not half.exists()
    assert filled(tmp_path).sidecar.training != training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": "../victim/b*"}, r"names the training '../victim/b\*'"),
        ({"training": "b*"}, r"names the training 'b\*'"),
        ({"training": "7f3a90c1\n"}, "names the training"),
        ({"training": "7F3A90C1"}, "names the training"),
        ({"training": None}, "names the training None"),
        ({"training": "7f3a90c1"}, "names the training '7f3a90c1' and none of its files"),
        ({"rows": None, "pending": None}, "names the training '[0-9a-f]{8}' and none of its files"),
        ({"generation": "../../1"}, "names generations"),
        ({"generation": -1}, "names generations"),
        ({"pendings": 1.5}, "names generations"),
        ({"saved": [1, "*"]}, "names generations"),
        ({"file": "../victim/7f3a90c1.000001.rows"}, "refers to past predictions '../victim/7f3a90c1.000001.rows'"),
        ({"file": "/etc/passwd"}, "refers to past predictions '/etc/passwd'"),
        ({"file": "7f3a90c1.1.rows"}, "refers to past predictions"),
        ({"file": None}, "refers to past predictions None"),
    ],
)
def test_names_that_this_package_does_not_give_are_refused(tmp_path, change, message):
    own, victim = tmp_path / "own", tmp_path / "victim"
    victim.mkdir()
    for name in ("b1.000001.rows", "b1.000002.rows", "partial.1.b1.000001.rows"):
        (victim / name).write_text("kept")
    state = filled(own, 2).state_dict()
    if "file" in change:
        state["sidecar"]["rows"].update(change)
    else:
        state["sidecar"].update(change)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        store_in(own).load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(
        "it was not written by this package, or it was changed since: resume from another checkpoint"
    )
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert all(path.read_text() == "kept" for path in victim.iterdir())


def test_a_resumed_training_writes_over_what_the_killed_one_left(tmp_path):
    store = filled(tmp_path, 2)
    state = loaded(store.state_dict())
    for seed in (5, 6, 7):
        store.write(torch.arange(N), probabilities(N, seed=seed))
        store.advance()
        store.write(torch.arange(2), probabilities(2, seed=seed))
    assert names(tmp_path) == ["000002.rows", "000004.rows", "000005.rows"]
    resumed = store_in(tmp_path)
    resumed.load_state_dict(state)
    for seed in (5, 8, 9):
        resumed.write(torch.arange(N), probabilities(N, seed=seed))
        resumed.advance()
        resumed.state_dict()
    assert torch.equal(everything(resumed)[0], probabilities(N, seed=9))
    # The one that has it mapped still reads what it wrote.
    assert torch.equal(everything(store)[0], probabilities(N, seed=7))
    assert names(tmp_path) == ["000004.rows", "000005.rows"]


# What a checkpoint refers to is not there any more, or not the same


def refused(state, folder, **kind):
    with pytest.raises(InputError) as caught:
        store_in(folder, **kind).load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert "name the folder that holds it" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["rows", "pending"])
def test_a_file_that_is_gone_is_named_with_the_way_out(tmp_path, name):
    store = filled(tmp_path)
    store.write(torch.tensor([3]), probabilities(1))
    state = store.state_dict()
    path_of(state, name).unlink()
    message = refused(state, tmp_path)
    wanted = (
        f"{path_of(state, name).name} that the checkpoint refers to are not in {tmp_path}: name the folder that holds"
    )
    assert wanted in message
    message = refused(state, tmp_path / "other")
    assert f"are not in {tmp_path / 'other'} or {tmp_path}: " in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "pending"])
@pytest.mark.parametrize("kind", ["cut", "longer", "empty", "page", *range(20)])
def test_a_damaged_file_is_named(tmp_path, name, kind):
    store = filled(tmp_path, dtype=torch.float16)
    store.write(torch.tensor([3]), probabilities(1))
    state = store.state_dict()
    path = path_of(state, name)
    content = path.read_bytes()
    if isinstance(kind, int):
        # Half of the places in what the file says of itself, half in the rows and the checksum.
        place = kind * 35 if kind < 10 else 4096 + (kind - 10) * (len(content) - 4096) // 10
        changed = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    else:
        changed = {"cut": content[:-1], "longer": content + b"\0", "empty": b"", "page": content[:4096]}[kind]
    path.write_bytes(changed)
    assert f"{path} is damaged: " in refused(state, tmp_path, dtype=torch.float16)
    path.write_bytes(content)
    store_in(tmp_path, dtype=torch.float16).load_state_dict(state)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def memmap(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    state = filled(tmp_path).state_dict()
    monkeypatch.setattr(np, "memmap", memmap)
    with pytest.raises(InputError, match=r"\.rows cannot be read: .*Permission denied"):
        store_in(tmp_path).load_state_dict(state)


def of_format(content, version):
    """A file's bytes as another version of the format would have written them, as far as they are read."""
    header = json.dumps({**json.loads(content[:4096]), "format": version}).encode().ljust(4096)
    changed = header + content[4096:-4]
    return changed + zlib.crc32(changed).to_bytes(4, "little")


@pytest.mark.parametrize("name", ["rows", "pending"])
@pytest.mark.parametrize("version", [1, 99])
def test_a_file_of_another_version_is_refused_in_one_line(tmp_path, name, version):
    store = filled(tmp_path)
    store.write(torch.tensor([3]), probabilities(1))
    state = store.state_dict()
    path = path_of(state, name)
    path.write_bytes(of_format(path.read_bytes(), version))
    assert f"{path} has format {version}, this version reads {FORMAT}: " in refused(state, tmp_path)


def test_a_checkpoint_of_another_version_is_refused_before_its_files_are_looked_for(tmp_path):
    state = filled(tmp_path).state_dict()
    del state["format"]
    path_of(state).unlink()
    with pytest.raises(InputError, match=f"has format 1, this version reads {FORMAT}: resume with") as caught:
        store_in(tmp_path).load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_another_file_of_the_name_is_told(tmp_path):
    state = filled(tmp_path / "one").state_dict()
    for other, message in (
        (filled(tmp_path / "two", top_k=2), "belongs to another store, its top_k is 2, not None"),
        (PredictionStore(N + 1, K, sidecar=Sidecar(tmp_path / "two")), "its num_samples is 12, not 11; its rows is 12"),
        (filled(tmp_path / "two", generations=2), "has other rows than the checkpoint refers to"),
    ):
        other.write(torch.arange(N), probabilities(N, seed=4))
        other.advance()
        shutil.copy(path_of(other.state_dict()), path_of(state))
        assert message in refused(state, tmp_path / "one")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((N + 1, K, {}), "num_samples=11 and not 12"),
        ((N, K + 1, {}), "num_classes=5 and not 6"),
        ((N, K, {"top_k": 2}), "top_k=None and not 2"),
        ((N, K, {"dtype": torch.float16}), "dtype=float32 and not float16"),
    ],
)
def test_a_checkpoint_of_another_store_is_refused(tmp_path, other, message):
    samples, classes, kind = other
    for sidecar in (None, Sidecar(tmp_path)):
        with pytest.raises(InputError, match=message):
            PredictionStore(samples, classes, **kind, sidecar=sidecar).load_state_dict(filled(tmp_path).state_dict())


def test_checkpoint_and_folder_can_be_moved_together(tmp_path):
    store = filled(tmp_path / "here", 3)
    store.write(torch.tensor([3]), probabilities(1))
    state, expected = loaded(store.state_dict()), everything(store)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    # Another folder for what is written from now on, and the old one for what is read.
    elsewhere = store_in(tmp_path / "new")
    elsewhere.load_state_dict(state)
    shutil.rmtree(tmp_path / "here")
    refused(state, tmp_path / "nowhere")
    moved, inside, told = store_in(tmp_path / "there"), PredictionStore(N, K), store_in(tmp_path / "last")
    moved.load_state_dict(state)
    inside.load_state_dict(state, folder=tmp_path / "there")
    told.load_state_dict(state, folder=str(tmp_path / "there"))
    for other in (elsewhere, moved, inside, told):
        assert all(torch.equal(a, b) for a, b in zip(everything(other), expected, strict=True))
        other.advance()
        assert torch.equal(everything(other)[0][3], probabilities(1)[0])
    assert names(tmp_path / "new") == names(tmp_path / "last") == ["000004.rows"]
    # The newer place wins: it may hold what the old one has lost.
    assert path_of(state, folder=tmp_path / "there").exists()


@pytest.mark.parametrize("keep", [1, 0])
def test_fewer_than_two_generations_are_refused(tmp_path, keep):
    with pytest.raises(InputError, match=f"keep must be at least 2, .* got {keep}"):
        Sidecar(tmp_path, keep=keep)


# Disks


def full_disk(monkeypatch, after):
    """From some byte on, files take no more."""
    left = [after]
    write_all = files.write_all

    def write(file, content):
        if len(content) > left[0]:
            file.write(content[: left[0]])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= len(content)
        write_all(file, content)

    monkeypatch.setattr(files, "write_all", write)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *[("advance", after) for after in (0, 4000, 4096, 4150, 4096 + N * K * 4)],
        *[("state_dict", after) for after in (0, 4096, 4096 + 2 * K * 4)],
    ],
)
def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch, name, after):
    store, whole = filled(tmp_path / "full", 2), filled(tmp_path / "whole", 2)
    for one in (store, whole):
        one.write(torch.tensor([1, 2]), probabilities(2, seed=5))
    before, there = everything(store), names(tmp_path / "full")
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        with pytest.raises(InputError, match="the disk of the store .* is full: make room and resume") as caught:
            getattr(store, name)()
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "full") == there
    assert all(torch.equal(a, b) for a, b in zip(everything(store), before, strict=True))
    for one in (store, whole):
        getattr(one, name)()
        one.advance()
    assert same(store, whole)
    assert names(tmp_path / "full") == names(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the store .*file/rows cannot be written"):
        filled(tmp_path / "file/rows")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # the child does nothing but write files
@pytest.mark.parametrize("last", range(5))
def test_killed_while_it_writes_it_goes_on_from_the_generation_before(tmp_path, last, monkeypatch):
    monkeypatch.setattr(rows_file, "_PIECE_BYTES", 100)
    store = filled(tmp_path, 2)
    state, expected, there = loaded(store.state_dict()), everything(store), names(tmp_path)
    child = os.fork()
    if child == 0:
        write_all, done = files.write_all, []

        def write(file, content):
            done.append(1)
            if len(done) > last:
                file.write(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write_all(file, content)

        files.write_all = write
        store.write(torch.arange(N), probabilities(N, seed=9))
        store.advance()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    left = [path for path in tmp_path.iterdir() if path.name.startswith("partial.")]
    assert len(left) == 1
    assert len(names(tmp_path)) == len(there) + 1
    resumed = store_in(tmp_path)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(everything(resumed), expected, strict=True))
    resumed.write(torch.arange(N), probabilities(N, seed=9))
    resumed.advance()
    assert torch.equal(everything(resumed)[0], probabilities(N, seed=9))
    assert names(tmp_path) == ["000002.rows", "000003.rows"]


# Several processes


def two_processes(rank, folder):
    """Stores written to by two processes, in files that one of them writes; what each then holds goes to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows_file._PIECE_BYTES = 24
    results, messages = [], []
    for number, kind in enumerate(KINDS):
        place = Path(folder) / f"rows {number}"
        store = store_in(place, writes=rank == 0, **kind)
        # Rank 1 has fewer rows, and samples 2 and 5 stand on both ranks.
        index = torch.tensor([[0, 2, 4, 5], [1, 2, 7, 7]][rank])
        store.write(index, probabilities(4, seed=rank))
        if rank == 1:
            store.write(torch.tensor([5]), probabilities(1, seed=3))
        middle, again = loaded(store.state_dict()), loaded(store.state_dict())
        assert middle["sidecar"] == again["sidecar"]
        store.write(torch.tensor([[4], [3]][rank]), probabilities(1, seed=4 + rank))
        store.advance()
        after = everything(store)
        if rank == 1:
            store.write(torch.tensor([9]), probabilities(1, seed=6))
        store.advance()
        resumed = store_in(place, writes=rank == 0, **kind)
        resumed.load_state_dict(middle)
        resumed.write(torch.tensor([[4], [3]][rank]), probabilities(1, seed=4 + rank))
        resumed.advance()
        results.append([after, everything(store), everything(resumed)])
    # What one of them cannot do, none does.
    state = loaded(store.state_dict())
    write_all = files.write_all
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            full_disk(patch, 0)
            store.write(torch.tensor([1]), probabilities(1, seed=8))
            with pytest.raises(InputError) as caught:
                store.advance()
        assert files.write_all is write_all
    else:
        with pytest.raises(InputError) as caught:
            store.advance()
    messages.append(str(caught.value))
    if rank == 1:
        # A disk of its own, without the file.
        state["sidecar"]["rows"]["folder"] = folder
    with pytest.raises(InputError) as caught:
        store_in(Path(folder) / f"rank {rank}", **kind).load_state_dict(state)
    messages.append(str(caught.value))
    torch.save({"results": results, "messages": messages}, Path(folder) / f"{rank}.pt")
    leave_the_group()


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(tmp_path, start_method):
    multiprocessing.start_processes(two_processes, args=(str(tmp_path),), nprocs=2, start_method=start_method)
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for number, kind in enumerate(KINDS):
        # In turns, as one process would have seen the samples; then 4, 3; then 9.
        first, second = probabilities(4, seed=0), probabilities(4, seed=1)
        rows = [first[0], second[0], first[1], second[1], first[2], second[2], first[3], second[3]]
        rows += [probabilities(1, seed=seed)[0] for seed in (3, 4, 5)]
        alone = store_in(tmp_path / "alone", **kind)
        alone.write(torch.tensor([0, 1, 2, 2, 4, 7, 5, 7, 5, 4, 3]), torch.stack(rows))
        alone.advance()
        after, content = everything(alone), path_of(alone.state_dict()).read_bytes()
        alone.write(torch.tensor([9]), probabilities(1, seed=6))
        alone.advance()
        for rank in (0, 1):
            got = told[rank]["results"][number]
            for one, other in zip(got, (after, everything(alone), after), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), kind
        # Byte for byte, but for the training's number and the checksum over it; the resumed one wrote it last.
        theirs = next((tmp_path / f"rows {number}").glob("*.000001.rows")).read_bytes()
        assert theirs[4096:-4] == content[4096:-4]
        assert {**json.loads(theirs[:4096]), "training": ""} == {**json.loads(content[:4096]), "training": ""}
    assert "is full: make room" in told[0]["messages"][0]
    assert "are not in" in told[1]["messages"][1]
    for message in (told[1]["messages"][0], told[0]["messages"][1]):
        assert message.startswith("another process has failed at the files of its store")
