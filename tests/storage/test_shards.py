"""Sharded records against a plain dictionary, and against kills, damage, several processes and a full disk."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from distill_lightning import InputError
from distill_lightning.storage import FORMAT, Field, ShardedRecords, files, read_fields, read_header, sweep_records

FIELDS = (Field("probs", "float16", (3,)), Field("classes", "int16", (2,)), Field("map", "float32", (2, 2)))
SAMPLES, VIEWS, SIZE = 11, 2, 4


def records(folder, **options):
    defaults = {"samples": SAMPLES, "views": VIEWS, "fields": FIELDS, "shard_size": SIZE, "made_by": {"data": "a"}}
    found = ShardedRecords(Path(folder), **(defaults | options))
    found.create()
    return found


def row_of(sample, view):
    """What the record of a sample and view holds, from a formula."""
    return {
        "probs": np.array([sample, view, sample + view / 2], dtype=np.float16),
        "classes": np.array([sample * 7 % 5, -view], dtype=np.int16),
        "map": np.array([[sample, view], [0.25 * sample, -1.5]], dtype=np.float32),
    }


def rows_of(samples, view):
    rows = [row_of(sample, view) for sample in samples]
    return {field.name: np.stack([row[field.name] for row in rows]) for field in FIELDS}


def filled(folder):
    found = records(folder)
    for view in range(VIEWS):
        for shard in range(found.shards):
            found.write_shard(view, shard, rows_of(found.samples_of(shard), view))
    return found


def assert_holds(found, known=None):
    """Every record that should be known is the formula's, bit for bit, and the others are zero."""
    samples, views = (part.ravel() for part in np.meshgrid(np.arange(SAMPLES), np.arange(VIEWS)))
    order = np.random.default_rng(0).permutation(len(samples))
    samples, views = samples[order], views[order]
    rows, is_known = found.read(samples, views)
    for place, (sample, view) in enumerate(zip(samples, views, strict=True)):
        wanted = known is None or (sample, view) in known
        assert is_known[place] == wanted
        for name, value in row_of(sample, view).items():
            assert np.array_equal(rows[name][place], value if wanted else np.zeros_like(value))


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


# Reading and writing


def test_what_is_written_is_read_by_sample_and_view(tmp_path):
    filled(tmp_path)
    assert_holds(records(tmp_path))
    assert_holds(ShardedRecords.open(tmp_path))


def test_the_file_is_a_header_the_fields_the_known_bytes_and_a_checksum(tmp_path):
    content = filled(tmp_path).path_of(1, 2).read_bytes()
    samples = [8, 9, 10]
    fields = [{"name": field.name, "dtype": field.dtype, "shape": list(field.shape)} for field in FIELDS]
    fields.append({"name": "_known", "dtype": "bool", "shape": []})
    assert json.loads(content[:4096]) == {"format": FORMAT, "rows": 3, "view": 1, "shard": 2, "fields": fields}
    expected = b"".join(rows_of(samples, 1)[field.name].tobytes() for field in FIELDS) + b"\1\1\1"
    assert content[4096:] == expected + zlib.crc32(content[:-4]).to_bytes(4, "little")
    assert ShardedRecords.open(tmp_path).record_bytes == 3 * 2 + 2 * 2 + 4 * 4


def test_nothing_is_known_before_it_is_written(tmp_path):
    found = records(tmp_path)
    assert_holds(found, known=set())
    assert found.unfinished() == [(view, shard) for view in range(VIEWS) for shard in range(3)]
    assert {found.state_of(*place) for place in found.unfinished()} == {"missing"}


def test_an_unknown_record_is_zero_whatever_was_given(tmp_path):
    found = records(tmp_path)
    known = np.array([True, False, True, False])
    found.write_shard(0, 1, rows_of([4, 5, 6, 7], 0), known=known)
    assert_holds(found, known={(4, 0), (6, 0)})
    assert found.state_of(0, 1) == "partial"
    shutil.copytree(tmp_path, tmp_path / "copy")
    other = rows_of([4, 5, 6, 7], 0)
    other["map"][1] = np.nan
    found.write_shard(0, 1, other, known=known)
    assert found.path_of(0, 1).read_bytes() == (tmp_path / "copy/view_00000/00001.shard").read_bytes()


@pytest.mark.parametrize(("samples", "views"), [([11], [0]), ([-1], [0]), ([0], [2]), ([0], [-1])])
def test_what_is_out_of_range_is_refused(tmp_path, samples, views):
    with pytest.raises(InputError, match="has samples 0 to 10 and views 0 to 1"):
        records(tmp_path).read(np.array(samples), np.array(views))


def test_no_record_at_all_may_be_asked_for(tmp_path):
    rows, known = records(tmp_path).read(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert known.shape == (0,)
    assert rows["map"].shape == (0, 2, 2)


def test_rows_of_another_shape_are_refused(tmp_path):
    found = records(tmp_path)
    with pytest.raises(InputError, match=r"needs probs \(3, 3\), and was given \(4, 3\)"):
        found.write_shard(0, 2, rows_of([0, 1, 2, 3], 0))
    with pytest.raises(InputError, match=r"needs probs \(1, 3\), and was given \(2, 3\)"):
        found.append(0, 0, np.array([4]), rows_of([4, 5], 0))
    rows = rows_of([4], 0)
    for wrong in ({**rows, "more": rows["map"]}, {"probs": rows["probs"]}):
        with pytest.raises(InputError, match=r"holds probs, classes, map, and was given probs"):
            found.append(0, 0, np.array([4]), wrong)


# What the records depend on


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 12}, "samples is 11, not 12"),
        ({"views": 3}, "views is 2, not 3"),
        ({"shard_size": 5}, "shard_size is 4, not 5"),
        ({"fields": FIELDS[:2]}, "fields is .*, not "),
        ({"made_by": {"data": "b"}}, "data is a, not b"),
        ({"made_by": {"data": "a", "teachers": ["x"]}}, r"teachers is None, not \['x'\]"),
    ],
)
def test_records_of_another_kind_are_refused_with_what_differs(tmp_path, change, message):
    records(tmp_path)
    with pytest.raises(InputError, match=message):
        records(tmp_path, **change)


def changed_header(folder, **change):
    header = json.loads((folder / "header.json").read_text()) | change
    (folder / "header.json").write_text(json.dumps(header))
    return header


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"shape": [30_000_000_000]}, r"records of 60,000,000,000 bytes, and no file of the store holds as many"),
        ({"shape": [2**40, 2**40]}, "no file of the store holds as many"),
        ({"shape": [-1]}, "its fields are of no known kind"),
        ({"shape": [1e10]}, "its fields are of no known kind"),
        ({"shape": 3}, "is damaged"),
        ({"dtype": "V8000000000"}, "its fields are of no known kind"),
        ({"name": 3}, "its fields are of no known kind"),
    ],
)
@pytest.mark.parametrize("fill", [records, filled])
def test_sizes_in_a_header_are_not_believed(tmp_path, field, message, fill):
    fill(tmp_path)
    probs = {"name": "probs", "dtype": "float16", "shape": [3]}
    header = changed_header(tmp_path, fields=[probs | field])
    for act in (lambda: read_fields(tmp_path, header), lambda: ShardedRecords.open(tmp_path)):
        with pytest.raises(InputError, match=message) as caught:
            act()
        assert f"remove the store {tmp_path} and fill it again" in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / "header.json"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"samples": "9"}, {"views": 0}, {"shard_size": 0}, {"shard_size": 1.5}])
def test_numbers_in_a_header_are_not_believed(tmp_path, change):
    filled(tmp_path)
    changed_header(tmp_path, **change)
    with pytest.raises(InputError, match=r"header.json is damaged, it says .*fill it again"):
        ShardedRecords.open(tmp_path)


def test_large_records_that_are_there_are_read(tmp_path):
    field = Field("map", "float32", (2**24 + 1,))
    found = records(tmp_path, fields=(field,), samples=1, views=1)
    found.write_shard(0, 0, {"map": np.ones((1, 2**24 + 1), np.float32)})
    assert read_fields(tmp_path, read_header(tmp_path)) == [field]


def test_a_folder_without_a_store_and_one_of_another_version_are_told(tmp_path):
    with pytest.raises(InputError, match="there is no store in .*distill-lightning record"):
        ShardedRecords.open(tmp_path)
    records(tmp_path)
    header = json.loads((tmp_path / "header.json").read_text())
    for version in (1, 99):
        (tmp_path / "header.json").write_text(json.dumps(header | {"format": version}))
        for act in (lambda: read_header(tmp_path), lambda: records(tmp_path), lambda: ShardedRecords.open(tmp_path)):
            with pytest.raises(InputError, match=f"has format {version}, this version reads 2: fill it") as caught:
                act()
            assert "\n" not in str(caught.value)
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(InputError, match=r"header.json is damaged"):
        read_header(tmp_path)


# Damage


@pytest.mark.parametrize("kind", ["cut", "longer", "empty", "page", *range(0, 60, 7)])
def test_a_damaged_shard_is_noticed_and_alone_made_again(tmp_path, kind):
    found = filled(tmp_path)
    path = found.path_of(0, 1)
    content = path.read_bytes()
    if isinstance(kind, int):
        # Half of the places in what the file says of itself, half in the rows and the checksum.
        place = kind * 5 if kind % 2 else 4096 + kind * (len(content) - 4096) // 60
        changed = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    else:
        changed = {"cut": content[:-1], "longer": content + b"\0", "empty": b"", "page": content[:4096]}[kind]
    path.write_bytes(changed)
    again = records(tmp_path)
    assert again.state_of(0, 1) == "damaged"
    assert again.unfinished() == [(0, 1)]
    everything = {(sample, view) for sample in range(SAMPLES) for view in range(VIEWS)}
    assert_holds(again, known=everything - {(sample, 0) for sample in range(4, 8)})
    again.write_shard(0, 1, rows_of(range(4, 8), 0))
    assert path.read_bytes() == content
    assert_holds(again)


def test_a_shard_that_lies_in_the_place_of_another_is_told(tmp_path):
    found = filled(tmp_path)
    shutil.copy(found.path_of(0, 1), found.path_of(1, 1))
    with pytest.raises(InputError, match=r"00001.shard belongs to another store, its view is 0, not 1: remove it, and"):
        records(tmp_path).unfinished()


def test_another_process_opens_the_files_itself(tmp_path):
    found = filled(tmp_path)
    assert_holds(found)
    content = pickle.dumps(found)
    assert len(content) < found.path_of(0, 0).stat().st_size
    assert_holds(pickle.loads(content))


def test_a_file_that_was_being_written_is_no_shard(tmp_path):
    found = records(tmp_path)
    found._folder_of(0).mkdir()
    (found._folder_of(0) / "partial.123.00000.shard").write_bytes(b"half")
    assert found.state_of(0, 0) == "missing"
    (tmp_path / "partial.123.header.json").write_bytes(b"half")
    others = {"partial.csv", "notes/partial.1.txt"}
    for other in others:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    sweep_records(tmp_path)
    assert files_of(tmp_path).keys() == others | {"header.json"}


# Logs: records in the order that they come


def test_logs_become_the_shards_that_would_have_been_written(tmp_path):
    filled(tmp_path / "whole")
    found = records(tmp_path / "logged")
    order = np.random.default_rng(1).permutation(SAMPLES)
    for view in range(VIEWS):
        # Two processes; sample 3 came twice.
        for rank, part in enumerate((order[:6], np.append(order[6:], 3))):
            for some in np.array_split(part, 3):
                found.append(view, rank, some, rows_of(some, view))
        assert found.state_of(view, 0) == "missing"
        found.seal(view)
    assert_holds(found)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "logged")


def test_records_that_come_later_join_those_that_are_there(tmp_path):
    found = records(tmp_path)
    for some in ([0, 5, 9], [1, 2, 3], [5, 10]):
        found.append(1, 0, np.array(some), rows_of(some, 1))
        found.seal(1)
    assert_holds(found, known={(sample, 1) for sample in (0, 1, 2, 3, 5, 9, 10)})
    assert [found.state_of(1, shard) for shard in range(3)] == ["complete", "partial", "partial"]


def test_sealing_nothing_changes_nothing(tmp_path):
    found = filled(tmp_path)
    before = files_of(tmp_path)
    found.seal(0)
    assert files_of(tmp_path) == before


@pytest.mark.slow
def test_a_log_may_end_at_any_byte(tmp_path):
    found = records(tmp_path / "log")
    for some in ([0, 5, 9], [1, 2]):
        found.append(0, 0, np.array(some), rows_of(some, 0))
    log = found._log_of(0, 0).path
    content, first = log.read_bytes(), 4 + 4 + 3 * (8 + found.record_bytes) + 4
    for size in range(len(content) + 1):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        cut = records(tmp_path / "cut")
        cut._folder_of(0).mkdir()
        cut._log_of(0, 0).path.write_bytes(content[:size])
        # What comes after the kill can be read.
        cut.mend_log(0, 0)
        cut.append(0, 0, np.array([7]), rows_of([7], 0))
        cut.seal(0)
        known = {7} | ({0, 5, 9} if size >= first else set()) | ({1, 2} if size == len(content) else set())
        assert_holds(cut, known={(sample, 0) for sample in known})


def test_a_log_with_a_wrong_bit_is_read_up_to_it(tmp_path):
    found = records(tmp_path)
    for some in ([0, 5, 9], [1, 2]):
        found.append(0, 0, np.array(some), rows_of(some, 0))
    log = found._log_of(0, 0).path
    content = bytearray(log.read_bytes())
    content[-20] ^= 1
    log.write_bytes(content)
    found.seal(0)
    assert_holds(found, known={(sample, 0) for sample in (0, 5, 9)})


# A full disk


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


def test_a_full_disk_is_one_line_and_the_store_can_be_continued(tmp_path, monkeypatch):
    filled(tmp_path / "whole")
    found = records(tmp_path / "full")
    with monkeypatch.context() as patch:
        full_disk(patch, after=300)
        found.append(0, 0, np.array([1, 2]), rows_of([1, 2], 0))
        with pytest.raises(InputError, match="the disk of the store .* is full: make room and call again") as caught:
            found.append(0, 0, np.arange(SAMPLES), rows_of(range(SAMPLES), 0))
    assert "\n" not in str(caught.value)
    for some in np.array_split(np.arange(SAMPLES), 4):
        found.append(0, 0, some, rows_of(some, 0))
    found.seal(0)
    for shard in range(found.shards):
        with monkeypatch.context() as patch:
            full_disk(patch, after=(20, 4096, 4130)[shard])
            with pytest.raises(InputError, match="is full"):
                found.write_shard(1, shard, rows_of(found.samples_of(shard), 1))
        assert found.state_of(1, shard) == "missing"
        found.write_shard(1, shard, rows_of(found.samples_of(shard), 1))
    assert files_of(tmp_path / "full") == files_of(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the store .*file/store cannot be written"):
        records(tmp_path / "file/store")


# Processes that are killed, and several at once


def fill(folder, log):
    """What a process does that may be killed at any moment; ``log`` is called with how far it came."""
    found = records(folder)
    for view in range(VIEWS):
        if all(found.state_of(view, shard) == "complete" for shard in range(found.shards)):
            continue
        found.mend_log(view, 0)
        for sample in np.random.default_rng(view).permutation(SAMPLES):
            found.append(view, 0, np.array([sample]), rows_of([sample], view))
            log()
        found.seal(view)
        log()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # the child does nothing but write files
def test_a_store_that_was_filled_through_kills_is_the_undisturbed_one(tmp_path):
    filled(tmp_path / "whole")
    generator = np.random.default_rng(0)
    start = time.monotonic()
    fill(tmp_path / "timed", lambda: None)
    whole, killed = time.monotonic() - start, 0
    for _ in range(10):
        child = os.fork()
        if child == 0:
            fill(tmp_path / "killed", lambda: None)
            os._exit(0)
        time.sleep(generator.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    assert killed
    fill(tmp_path / "killed", lambda: None)
    sweep_records(tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_store_that_was_filled_through_a_kill_at_each_step_is_the_undisturbed_one(tmp_path):
    class Kill(BaseException):
        pass

    filled(tmp_path / "whole")
    for last in range(VIEWS * (SAMPLES + 1) + 1):
        done = []

        def step(done=done, last=last):
            done.append(1)
            if len(done) > last:
                raise Kill

        with contextlib.suppress(Kill):
            fill(tmp_path / f"{last}", step)
        fill(tmp_path / f"{last}", lambda: None)
        assert files_of(tmp_path / f"{last}") == files_of(tmp_path / "whole")
