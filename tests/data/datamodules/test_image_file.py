"""Image files of the kinds that torchvision does not decode, written here byte by byte as their formats say."""

import re
import shutil
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, TiffImagePlugin

from distill_lightning import InputError
from distill_lightning.data.datamodules.image_file import SUFFIXES, DamagedImageError, decode

RNG = np.random.default_rng(3)
ROWS, COLUMNS = 6, 11
GREY = RNG.integers(0, 256, (ROWS, COLUMNS), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (ROWS, COLUMNS, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (ROWS, COLUMNS), dtype=np.uint16)
DEEP_COLOUR = RNG.integers(0, 65536, (ROWS, COLUMNS, 3), dtype=np.uint16)
BITS = RNG.integers(0, 2, (ROWS, COLUMNS), dtype=np.uint8)
INDEX = RNG.integers(0, 4, (ROWS, COLUMNS), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
ALPHA = RNG.integers(1, 255, (ROWS, COLUMNS, 1), dtype=np.uint8)


def rgb(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def tiff(pixels, bits, photometric, *, order="<", size=(ROWS, COLUMNS), **tags):
    """One uncompressed strip: a header, the directory and what does not fit into it, then the pixels."""
    samples = len(bits)
    held = {
        256: (size[1],), 257: (size[0],), 258: bits, 259: (1,), 262: (photometric,), 273: (0,), 277: (samples,),
        278: (size[0],), 279: (len(pixels),), **{int(name[1:]): value for name, value in tags.items()},
    }  # fmt: skip
    start = 8 + 2 + 12 * len(held) + 4
    far = b"".join(struct.pack(f"{order}{len(values)}H", *values) for values in held.values() if len(values) > 2)
    held[273] = (start + len(far),)
    entries, place = b"", start
    for tag, values in sorted(held.items()):
        if len(values) == 1:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, *values)
        elif len(values) == 2:
            entries += struct.pack(f"{order}HHIHH", tag, 3, 2, *values)
        else:
            entries += struct.pack(f"{order}HHII", tag, 3, len(values), place)
            place += 2 * len(values)
    far = b"".join(struct.pack(f"{order}{len(held[tag])}H", *held[tag]) for tag in sorted(held) if len(held[tag]) > 2)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return header + struct.pack(f"{order}H", len(held)) + entries + bytes(4) + far + pixels


def bmp(rows, bits, palette=b""):
    """Rows from the bottom to the top, each filled up to a multiple of 4 bytes."""
    body = b"".join(row + bytes(-len(row) % 4) for row in reversed(rows))
    start = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
    header += struct.pack("<IiiHHIIiiII", 40, COLUMNS, ROWS, 1, bits, 0, len(body), 2835, 2835, len(palette) // 4, 0)
    return header + palette + body


def pnm(kind, body, *largest):
    return b"P%d\n# written by hand\n%d %d\n" % (kind, COLUMNS, ROWS) + b"".join(b"%d\n" % n for n in largest) + body


def packed(bits):
    """Eight pixels a byte, each row beginning a new one."""
    return [np.packbits(row).tobytes() for row in bits]


def plain(values):
    return b" ".join(b"%d" % value for value in values.flatten().tolist())


TIFF_PALETTE = tuple(int(value) * 257 for value in np.pad(PALETTE, ((0, 252), (0, 0))).T.flatten())
BMP_PALETTE = np.pad(PALETTE[:, ::-1], ((0, 0), (0, 1))).tobytes()
TWO_COLOURS = bytes([0, 0, 0, 0, 255, 255, 255, 0])
TWELVE = DEEP >> 4


def twelve_bits(values):
    """Two numbers in three bytes, each row beginning a new one."""
    padded = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    whole = b"".join(int((int(a) << 12) + int(b)).to_bytes(3, "big") for a, b in padded.reshape(-1, 2))
    length = padded.shape[1] * 3 // 2
    cut = -(-values.shape[1] * 12 // 8)
    return b"".join(whole[place : place + cut] for place in range(0, len(whole), length))


FILES = {
    "one_bit.tif": (tiff(b"".join(packed(BITS)), (1,), 1), rgb(BITS * 255)),
    "one_bit_white_is_zero.tif": (tiff(b"".join(packed(BITS)), (1,), 0), rgb((1 - BITS) * 255)),
    "grey.tif": (tiff(GREY.tobytes(), (8,), 1), rgb(GREY)),
    "grey_white_is_zero.tif": (tiff(GREY.tobytes(), (8,), 0), rgb(255 - GREY)),
    "grey_and_alpha.tif": (
        tiff(np.concatenate([GREY[..., None], ALPHA], axis=2).tobytes(), (8, 8), 1, t338=(2,)), rgb(GREY)
    ),
    "deep.tif": (tiff(DEEP.tobytes(), (16,), 1), rgb((DEEP // 256).astype(np.uint8))),
    "deep_big_endian.tiff": (
        tiff(DEEP.astype(">u2").tobytes(), (16,), 1, order=">"), rgb((DEEP // 256).astype(np.uint8))
    ),
    "deep_white_is_zero.tif": (tiff(DEEP.tobytes(), (16,), 0), rgb(((65535 - DEEP) // 256).astype(np.uint8))),
    "twelve_bits.tif": (tiff(twelve_bits(TWELVE), (12,), 1), rgb((TWELVE // 16).astype(np.uint8))),
    "palette.tif": (tiff(INDEX.tobytes(), (8,), 3, t320=TIFF_PALETTE), PALETTE[INDEX]),
    "rgb.TIFF": (tiff(COLOUR.tobytes(), (8, 8, 8), 2), COLOUR),
    "rgb_big_endian.tif": (tiff(COLOUR.tobytes(), (8, 8, 8), 2, order=">"), COLOUR),
    "rgba.tif": (
        tiff(np.concatenate([COLOUR, ALPHA], axis=2).tobytes(), (8, 8, 8, 8), 2, t338=(2,)), COLOUR
    ),
    "deep_rgb.tif": (tiff(DEEP_COLOUR.tobytes(), (16, 16, 16), 2), (DEEP_COLOUR // 256).astype(np.uint8)),
    "turned.tif": (
        tiff(COLOUR.transpose(1, 0, 2).tobytes(), (8, 8, 8), 2, size=(COLUMNS, ROWS), t274=(6,)), COLOUR[:, ::-1]
    ),
    "one_bit.bmp": (bmp(packed(BITS), 1, TWO_COLOURS), rgb(BITS * 255)),
    "palette.bmp": (bmp([row.tobytes() for row in INDEX], 8, BMP_PALETTE), PALETTE[INDEX]),
    "rgb.bmp": (bmp([row.tobytes() for row in COLOUR[..., ::-1]], 24), COLOUR),
    "rgb_and_nothing.BMP": (bmp([np.pad(row, ((0, 0), (0, 1))).tobytes() for row in COLOUR[..., ::-1]], 32), COLOUR),
    "bits.pbm": (pnm(4, b"".join(packed(BITS))), rgb((1 - BITS) * 255)),
    "plain_bits.pbm": (pnm(1, plain(BITS)), rgb((1 - BITS) * 255)),
    "grey.pgm": (pnm(5, GREY.tobytes(), 255), rgb(GREY)),
    "plain_grey.pgm": (pnm(2, plain(GREY), 255), rgb(GREY)),
    "few_levels.pgm": (pnm(5, (GREY // 64).tobytes(), 3), rgb(GREY // 64 * 85)),
    "deep.pgm": (pnm(5, DEEP.astype(">u2").tobytes(), 65535), rgb((DEEP // 256).astype(np.uint8))),
    "of_twelve_bits.pgm": (
        pnm(5, TWELVE.astype(">u2").tobytes(), 4095), rgb((np.rint(TWELVE / 4095 * 65535) // 256).astype(np.uint8))
    ),
    "rgb.ppm": (pnm(6, COLOUR.tobytes(), 255), COLOUR),
    "plain_rgb.ppm": (pnm(3, plain(COLOUR), 255), COLOUR),
    "deep_rgb.ppm": (
        pnm(6, DEEP_COLOUR.astype(">u2").tobytes(), 65535), np.rint(DEEP_COLOUR / 65535 * 255).astype(np.uint8)
    ),
    # The content counts, not the name.
    "bmp_of_another_name.jpg": (bmp([row.tobytes() for row in COLOUR[..., ::-1]], 24), COLOUR),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_pixels_are_those_that_were_written(tmp_path, name):
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    image = decode(tmp_path / name)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "group4"])
def test_compressed_tiff_files(tmp_path, compression):
    pixels = BITS.astype(bool) if compression == "group4" else COLOUR
    Image.fromarray(pixels).save(tmp_path / "image.tif", compression=compression)
    expected = rgb(BITS * 255) if compression == "group4" else COLOUR
    assert np.array_equal(decode(tmp_path / "image.tif").permute(1, 2, 0).numpy(), expected)


def test_of_several_pages_the_first_counts(tmp_path):
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(decode(tmp_path / "pages.tif")[1].numpy(), GREY)


def test_jfif_is_a_name_of_jpeg(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "image.jpg")
    shutil.copy(tmp_path / "image.jpg", tmp_path / "image.jfif")
    assert torch.equal(decode(tmp_path / "image.jfif"), decode(tmp_path / "image.jpg"))
    assert ".jfif" in SUFFIXES


def refusal_of(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedImageError) as refused:
        decode(path)
    message = str(refused.value)
    assert message.startswith(f"{path} cannot be decoded (")
    assert message.endswith("): mend it, or take it out of the folder")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("pixels", "bits", "kind"),
    [(DEEP.astype(np.int16), (16,), 2), (DEEP.astype(np.uint32), (32,), 1), (DEEP.astype(np.float32), (32,), 3)],
    ids=["signed", "32 bits", "floats"],
)
def test_numbers_without_a_white_are_refused(tmp_path, pixels, bits, kind):
    said = refusal_of(tmp_path / "image.tif", tiff(pixels.tobytes(), bits, 1, t339=(kind,)))
    assert "have no white: save it with 8 or 16 bits" in said


@pytest.mark.parametrize(
    "name", ["rgb.TIFF", "palette.tif", "deep.tif", "palette.bmp", "rgb.bmp", "rgb.ppm", "deep.pgm"]
)
def test_a_file_that_is_cut_off_is_refused(tmp_path, name):
    whole = FILES[name][0]
    for length in range(0, len(whole), 7):
        with warnings.catch_warnings():
            # Of Pillow, about tags that a cut has taken the end of.
            warnings.simplefilter("ignore", UserWarning)
            refusal_of(tmp_path / name, whole[:length])


@pytest.mark.parametrize(
    "name", ["rgba.tif", "palette.tif", "deep.tif", "palette.bmp", "rgb.bmp", "rgb.ppm", "deep.pgm"]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_is_wrong_in_a_file_is_one_line_or_an_image(tmp_path, name):
    whole = FILES[name][0]
    refused = 0
    for place in range(min(len(whole), 300)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(changed)
        try:
            image = decode(tmp_path / name)
        except DamagedImageError:
            refused += 1
        else:
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
    assert refused


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bomb.tif", tiff(b"", (8, 8, 8), 2, size=(9000, 9000))),
        ("larger.tif", tiff(b"", (8, 8, 8), 2, size=(60000, 60000))),
        ("bomb.ppm", b"P6 9000 9000 255 " + bytes(100)),
        ("larger.pgm", b"P5 60000 60000 255 " + bytes(100)),
    ],
)
def test_a_small_file_of_a_huge_image_takes_no_memory(tmp_path, monkeypatch, name, content):
    for kind in (ImageFile.ImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(kind, "load", lambda self: pytest.fail("the pixels were read"))
    assert re.search(r"bytes for an image of 243000000|exceeds limit of", refusal_of(tmp_path / name, content))


def test_a_large_honest_image_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", ROWS * COLUMNS - 1)
    (tmp_path / "image.bmp").write_bytes(FILES["rgb.bmp"][0])
    assert np.array_equal(decode(tmp_path / "image.bmp").permute(1, 2, 0).numpy(), COLOUR)


def test_an_unknown_kind_is_told(tmp_path):
    assert "it is none of JPEG, PNG, WebP, GIF, BMP, TIFF" in refusal_of(tmp_path / "image.tif", b"hello")


def test_a_file_that_is_not_there_is_not_damaged(tmp_path):
    with pytest.raises(InputError, match=r"gone.tif cannot be decoded \(.*No such file") as refused:
        decode(tmp_path / "gone.tif")
    assert not isinstance(refused.value, DamagedImageError)
