"""Rows of any fields in one file: what is written is read, by number and in pieces, or refused in one line."""

import json
import pickle
import zlib

import numpy as np
import pytest
import torch

from distill_lightning import InputError
from distill_lightning.storage import FORMAT, Field
from distill_lightning.storage.rows import DamagedError, Layout, RowFile

# Odd sizes in front, so that most fields begin where their numbers are not aligned.
FIELDS = (
    Field("known", "bool", ()),
    Field("half", "float16", (3,)),
    Field("brain", "bfloat16", (2, 2)),
    Field("map", "float32", (1, 2)),
    Field("index", "int64", ()),
)
COUNT = 7
WAY_OUT = "ask for another"


def tensors_of(count, fields=FIELDS):
    generator = torch.Generator().manual_seed(1)
    return {
        field.name: (torch.randn(count, *field.shape, generator=generator) * 9).to(getattr(torch, field.dtype))
        for field in fields
    }


def written(path, *, count=COUNT, fields=FIELDS, about=None, pieces=(3, 0, 4)):
    layout = Layout(fields, count, about or {"of": "test"})
    tensors = tensors_of(count, fields)
    columns = {field.name: [field.array(part) for part in tensors[field.name].split(pieces)] for field in fields}
    RowFile.write(path, layout, columns)
    return RowFile(path, layout, way_out=WAY_OUT), tensors


@pytest.mark.parametrize("index", [[], [0], [6, 2, 2, 0, 5]])
def test_rows_are_found_by_their_number_bit_for_bit(tmp_path, index):
    file, tensors = written(tmp_path / "a")
    taken = file.take(np.array(index, dtype=np.int64))
    for field in FIELDS:
        rows = field.tensor(taken[field.name])
        assert rows.dtype == getattr(torch, field.dtype)
        assert torch.equal(rows, tensors[field.name][index])
        assert taken[field.name].flags.writeable


def test_a_column_is_the_memory_map_itself(tmp_path):
    file, tensors = written(tmp_path / "a")
    for field in FIELDS:
        column = file.column(field.name)
        assert np.shares_memory(column, file._bytes)
        assert not column.flags.writeable
        assert torch.equal(field.tensor(column.copy()), tensors[field.name])


def test_the_file_says_what_it_holds_and_ends_with_a_checksum(tmp_path):
    file, tensors = written(tmp_path / "a", fields=FIELDS[:2])
    content = file.path.read_bytes()
    fields = [{"name": "known", "dtype": "bool", "shape": []}, {"name": "half", "dtype": "float16", "shape": [3]}]
    assert json.loads(content[:4096]) == {"of": "test", "format": FORMAT, "rows": COUNT, "fields": fields}
    assert content[4096:-4] == tensors["known"].numpy().tobytes() + tensors["half"].numpy().tobytes()
    assert int.from_bytes(content[-4:], "little") == file.crc == zlib.crc32(content[:-4])
    assert file.nbytes == len(content) == 4096 + COUNT * (1 + 6) + 4


@pytest.mark.parametrize("spare", [-1, 0, 1, 9000])
def test_what_a_file_says_of_itself_may_take_several_pages(tmp_path, spare):
    empty = len(json.dumps(Layout(FIELDS, COUNT, {"of": ""}).header()))
    file, tensors = written(tmp_path / "a", about={"of": "x" * (4096 - empty + spare)})
    header = {-1: 4096, 0: 4096, 1: 8192, 9000: 4096 * 4}[spare]
    assert file.path.stat().st_size == header + file.layout.nbytes + 4
    assert torch.equal(FIELDS[1].tensor(file.verify().take(np.arange(COUNT))["half"]), tensors["half"])


def test_no_rows_are_a_file_too(tmp_path):
    file, _ = written(tmp_path / "a", count=0, pieces=(0,))
    assert file.verify().take(np.zeros(0, np.int64))["brain"].shape == (0, 2, 2)


def test_a_copy_maps_the_file_again(tmp_path):
    file, _ = written(tmp_path / "a", about={"of": "test", "note": "n" * 500})
    content = pickle.dumps(file)
    assert len(content) < 2000
    other = pickle.loads(content)
    assert isinstance(other._bytes.base, np.memmap)
    assert (other.path, other.layout, other.way_out, other.crc) == (file.path, file.layout, file.way_out, file.crc)


def test_a_file_that_was_replaced_is_still_read_and_tells_so(tmp_path):
    file, tensors = written(tmp_path / "a")
    assert file.is_current
    written(tmp_path / "a", count=4, pieces=(4,))
    assert not file.is_current
    assert torch.equal(FIELDS[1].tensor(file.verify().take(np.arange(COUNT))["half"]), tensors["half"])
    file.path.unlink()
    assert not file.is_current


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(FIELDS, 8, {"of": "test"}), "belongs to another store, its rows is 7, not 8: ask for another"),
        (Layout(FIELDS, COUNT, {"of": "b"}), "belongs to another store, its of is test, not b: ask for another"),
        (Layout(FIELDS[:2], COUNT, {}), "belongs to another store, its fields is .*, not "),
    ],
)
def test_a_file_of_something_else_is_refused_with_what_differs(tmp_path, layout, message):
    file, _ = written(tmp_path / "a")
    with pytest.raises(InputError, match=message) as caught:
        RowFile(file.path, layout, way_out=WAY_OUT)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, DamagedError)


def test_a_file_that_is_gone_is_told(tmp_path):
    with pytest.raises(InputError, match="/a is not there: ask for another"):
        RowFile(tmp_path / "a", Layout(FIELDS, COUNT, {}), way_out=WAY_OUT)


def test_every_changed_byte_and_every_other_length_is_noticed(tmp_path):
    file, _ = written(tmp_path / "a", fields=FIELDS[:2])
    content = file.path.read_bytes()
    spoilt = [content[:size] for size in (0, 1, 4095, 4096, 4099, len(content) - 1)] + [content + b"\0"]
    places = [*range(200), 4000, *range(4096, len(content))]
    spoilt += [content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] for place in places]
    for changed in spoilt:
        file.path.write_bytes(changed)
        with pytest.raises(DamagedError, match="/a is damaged: put back the file that was there, or ask for another"):
            RowFile(file.path, file.layout, way_out=WAY_OUT).verify()
