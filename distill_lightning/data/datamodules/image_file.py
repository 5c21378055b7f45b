"""Reading one image file, of whatever kind, as red, green and blue."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import io as torchvision_io

from distill_lightning.errors import InputError

SUFFIXES = (
    *(".jpeg", ".jpg", ".jfif", ".png", ".webp", ".gif"),
    *(".bmp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm"),
)
"""How the names of image files end."""

_PNG = b"\x89PNG\r\n\x1a\n"
# How a file begins that torchvision decodes, and, by the name of Pillow's decoder, one that Pillow does.
_OF_TORCHVISION = (b"\xff\xd8\xff", b"RIFF", b"GIF8")
_OF_PILLOW = {
    # torchvision's decoder ends the process where the pixels inside are damaged, and is little faster.
    "PNG": (_PNG,),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "PPM": tuple(b"P%d%c" % (kind, space) for kind in range(1, 7) for space in b" \t\n\r#"),
}
# How many bytes a byte of a deflated stream can stand for.
_DEFLATED_AT_MOST = 1032
# A bitonal fax may well say "all white" in fewer bytes than that; so many bytes do no harm.
_HARMLESS = 2**26
# Numbers of TIFF's tags.
_BITS, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0

_FAILURES = (
    *(RuntimeError, OSError, ValueError, Image.DecompressionBombError),
    # What Pillow's decoders stumble over in damaged files.
    *(SyntaxError, struct.error, LookupError, TypeError, ArithmeticError, EOFError),
)


class DamagedImageError(InputError):
    """An image file whose content cannot be decoded.

    Args:
        message: the line, which names the file.
    """


def decode(path: Path) -> Tensor:
    """Read an image file, whichever of the known kinds its content is of, as ``ImageFolderDataModule`` says.

    Returns:
        uint8 ``(3, H, W)``, red, green and blue.

    Raises:
        DamagedImageError: it is of another kind, damaged, or so large that no honest file of its length could be.
        InputError: it cannot be read at all.
    """
    try:
        # A pipe would be waited for.
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file: take it out of the folder")
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(_message(path, error)) from error
    try:
        return _decoded(content)
    except _FAILURES as error:
        raise DamagedImageError(_message(path, error)) from error


def _message(path: Path, error: Exception) -> str:
    # torchvision says where in its own sources it happened, and then what.
    first = (str(error) or type(error).__name__).splitlines()[0]
    reason = (".cpp:" in first and first.rpartition(".cpp:")[2].partition(", ")[2]) or first
    return f"{path} cannot be decoded ({reason}): mend it, or take it out of the folder"


def _decoded(content: NDArray[np.uint8]) -> Tensor:
    head = content[: len(_PNG)].tobytes()
    if head == _PNG:
        _check_png(content)
    for kind, heads in _OF_PILLOW.items():
        if head.startswith(heads):
            return _by_pillow(content.tobytes(), kind)
    if not head.startswith(_OF_TORCHVISION):
        raise ValueError("it is none of JPEG, PNG, WebP, GIF, BMP, TIFF, PBM, PGM and PPM")
    coded = torch.from_numpy(content)
    image: Tensor = torchvision_io.decode_image(
        coded, mode=torchvision_io.ImageReadMode.RGB, apply_exif_orientation=True
    )
    if image.dtype == torch.uint16:
        image = (image.int() >> 8).to(torch.uint8)
    return image if image.ndim == 3 else image[0]


# What no decoder looks at before it makes room for the pixels, or looks at only in part


def _check_png(content: NDArray[np.uint8]) -> None:
    """Look at the pieces of a PNG file and at their checksums.

    Raises:
        ValueError: one is damaged or missing, or there are too few bytes for the image's size.
    """
    view, place, kind, coded, wanted = content.data, len(_PNG), b"", 0, 0
    while kind != b"IEND":
        size = int.from_bytes(view[place : place + 4], "big")
        kind, end = bytes(view[place + 4 : place + 8]), place + 8 + size
        if end + 4 > len(view):
            raise ValueError("the PNG file is not complete")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"the checksum of a PNG file's {kind.decode('latin-1')!r} does not fit")
        if kind == b"IHDR":
            wanted = _png_bytes(bytes(view[place + 8 : end]))
        elif kind == b"IDAT":
            coded += size
        place = end + 4
    if not wanted or wanted > coded * _DEFLATED_AT_MOST:
        raise ValueError(f"a PNG file has {coded} bytes for an image of {wanted}")


def _png_bytes(header: bytes) -> int:
    """Bytes of a PNG file's pixels without compression."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    depth, colour = header[8], header[9]
    return height * -(-width * depth * {2: 3, 4: 2, 6: 4}.get(colour, 1) // 8)


# What Pillow decodes


def _by_pillow(content: bytes, kind: str) -> Tensor:
    """The first image of a file, decoded by Pillow's decoder of this name.

    Raises:
        ValueError: the file is too short for such an image, or its pixels are no intensities.
    """
    with warnings.catch_warnings():
        # What is merely large is no bomb. Pillow refuses twice as many pixels by itself.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=[kind])
    wanted = image.width * image.height * len(image.getbands())
    if wanted > max(_HARMLESS, len(content) * _DEFLATED_AT_MOST):
        raise ValueError(f"a {kind} file has {len(content)} bytes for an image of {wanted}")
    tags = dict(getattr(image, "tag_v2", {}))
    image.load()
    if kind == "TIFF" and image.mode in ("I", "F"):
        raise ValueError("numbers with a sign, of 32 bits or with a fraction have no white: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> _depth(tags) - 8
        pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            pixels = 255 - pixels
    else:
        pixels = np.array((ImageOps.exif_transpose(image) if kind == "PNG" else image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _depth(tags: dict[int, tuple[int, ...]]) -> int:
    """How many bits Pillow has left of a grey TIFF image's 12 or 16; PGM's numbers it stretches to 16."""
    return tags.get(_BITS, (16,))[0]
