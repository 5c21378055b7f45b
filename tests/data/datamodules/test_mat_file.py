"""MATLAB's files, against SciPy's writer; what is damaged is one line."""

import struct
from contextlib import suppress

import numpy as np
import pytest
from scipy import sparse
from scipy.io import savemat

from distill_lightning import InputError
from distill_lightning.data.datamodules.mat_file import read_mat

CONTENT = {
    **{kind: (np.arange(24).reshape(2, 3, 4) - (0 if kind[0] == "u" else 7)).astype(kind)
       for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")},
    "large": np.random.default_rng(0).normal(size=(40, 30)) * 1e6,
    "empty": np.zeros((0, 3)),
    "scalar": np.array([[2.5]]),
    "text": "a line",
    "lines": np.array(["one", "three"]),
    "cell": np.array([["a.jpg"], ["bb.jpg"]], dtype=object),
    "struct": {"a": {"x": np.array([[1.0, 2.0]]), "long_name_of_a_field": "b"}, "c": np.array([[3]], dtype=np.uint8)},
    "structs": np.array([(1.0,), (2.0,)], dtype=[("x", "O")]),
}  # fmt: skip


def same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return all(same(found[name], value) for name, value in expected.items())
    if isinstance(expected, np.ndarray) and expected.dtype.names:
        return [row["x"].item() for row in found] == expected["x"].tolist()
    if isinstance(expected, np.ndarray) and expected.dtype.kind in "OU":
        return found == expected.ravel().tolist()
    if isinstance(expected, str):
        return found == expected
    return found.dtype.newbyteorder("=") == expected.dtype and np.array_equal(found, expected)


@pytest.mark.parametrize("compressed", [True, False])
def test_what_scipy_writes_is_read(tmp_path, compressed):
    path = tmp_path / "x.mat"
    savemat(path, CONTENT, do_compression=compressed)
    found = read_mat(path, CONTENT)
    assert found.keys() == CONTENT.keys()
    for name, expected in CONTENT.items():
        assert same(found[name], expected), name
    assert read_mat(path, ["text", "missing"]) == {"text": "a line"}


@pytest.mark.parametrize(
    ("shape", "codes"),
    [((1, 1), struct.pack("<IIf4x", 7, 4, 65.0)), ((1,), struct.pack("<IIH6x", 4, 2, 65)),
     ((1, 1), struct.pack("<III4x", 6, 4, 2**31))],
    ids=["of floats", "of one dimension", "of no code"],
)  # fmt: skip
def test_a_text_that_is_none_is_one_line(tmp_path, shape, codes):
    path = tmp_path / "x.mat"
    sizes = struct.pack(f"<{len(shape)}i", *shape).ljust(8, b"\0")
    array = struct.pack("<IIII", 6, 8, 4, 0) + struct.pack("<II", 5, 4 * len(shape)) + sizes
    array += struct.pack("<I4s", (1 << 16) | 1, b"x") + codes
    path.write_bytes(b" " * 124 + struct.pack("<H", 0x0100) + b"IM" + struct.pack("<II", 14, len(array)) + array)
    with pytest.raises(InputError, match=rf"^{path} is damaged or no MATLAB file before 7.3, fetch it again"):
        read_mat(path, ["x"])


def test_the_other_order_of_bytes_is_read(tmp_path):
    """By hand: an array of flags, shape, name and three numbers, the name and the numbers' bytes in short elements."""
    flags = struct.pack(">IIII", 6, 8, 6, 0)
    shape = struct.pack(">IIii", 5, 8, 1, 3)
    name = struct.pack(">I4s", (1 << 16) | 1, b"x")
    numbers = struct.pack(">I3bx", (3 << 16) | 1, 1, -2, 3)
    array = flags + shape + name + numbers
    content = b" " * 124 + struct.pack(">H", 0x0100) + b"MI" + struct.pack(">II", 14, len(array)) + array
    (tmp_path / "x.mat").write_bytes(content)
    found = read_mat(tmp_path / "x.mat", ["x"])["x"]
    assert found.dtype == np.float64
    assert found.tolist() == [[1.0, -2.0, 3.0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": sparse.eye(3)}, "an array of class 5"),
        ({"x": np.array([[1j]])}, "of complex numbers"),
    ],
)
def test_what_holds_something_else_is_one_line(tmp_path, content, message):
    path = tmp_path / "x.mat"
    savemat(path, content | {"y": 1.0})
    with pytest.raises(InputError, match=message):
        read_mat(path, ["x"])
    assert read_mat(path, ["y"])["y"].tolist() == [[1.0]]


def test_files_of_other_formats_are_one_line(tmp_path):
    path = tmp_path / "x.mat"
    with pytest.raises(
        InputError, match="x.mat is damaged or no MATLAB file before 7.3, fetch it again: .*No such file"
    ):
        read_mat(path, ["x"])
    savemat(path, {"x": 1.0}, format="4")
    old = path.read_bytes()
    for content in (b"", b"text" * 100, old, b" " * 124 + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" + bytes(500)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="it begins in another way"):
            read_mat(path, ["x"])


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [True, False])
def test_whatever_is_damaged_is_read_or_one_line(tmp_path, compressed):
    path = tmp_path / "x.mat"
    savemat(path, {name: value for name, value in CONTENT.items() if name != "large"}, do_compression=compressed)
    whole = path.read_bytes()
    generator, refused = np.random.default_rng(0), []
    for number in range(120):
        broken = bytearray(whole)
        if number % 3:
            broken[generator.integers(len(whole))] = generator.integers(256)
        else:
            del broken[generator.integers(len(whole)) :]
        path.write_bytes(broken)
        with suppress(InputError):
            read_mat(path, CONTENT)
            continue
        refused.append(InputError.latest)
    assert all(str(path) in line and "\n" not in line for line in refused)
    # What is compressed has a checksum; of plain numbers nobody knows that they have changed.
    assert len(refused) > (100 if compressed else 40)
