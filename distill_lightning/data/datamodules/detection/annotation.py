"""Reading one annotation of Pascal VOC: which objects an image shows, and where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from distill_lightning.errors import InputError, refusing

_SIDES = ("xmin", "ymin", "xmax", "ymax")
# Tools count from 0 or from 1, and round up or down.
_ROUNDING = 1.0
_NO_AREA = "without an area"
_IS_DIFFICULT = {"": False, "0": False, "false": False, "1": True, "true": True}

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels, of which the first has its left edge at 0."""


class Annotation(NamedTuple):
    """What a VOC annotation says of its image.

    Attributes:
        width: of the image, in pixels.
        height: of the image, in pixels.
        numbers: of each object among those in the file, from 1.
        names: the class of each.
        boxes: where each is.
        difficult: whether it is marked as hard to recognise.
        faults: a line for each box that was left out or cut off at the image's edge.
        cut: those of them that were cut off.
    """

    width: int
    height: int
    numbers: list[int]
    names: list[str]
    boxes: list[Box]
    difficult: list[bool]
    faults: list[str]
    cut: list[str]


def read_annotation(path: Path, *, mend: bool = False) -> Annotation:
    """Read an annotation file of Pascal VOC.

    VOC counts pixels from 1 and a box holds its last pixel, so ``xmin, ymin, xmax, ymax`` of the file become
    ``xmin - 1, ymin - 1, xmax, ymax``: a box around the left upper pixel alone is ``1, 1, 1, 1`` there, and
    ``0, 0, 1, 1`` here. A box of which two opposite sides have the same number is nevertheless left out: no annotator
    draws a row of pixels, tools write a click like that.

    Args:
        path: the file.
        mend: whether boxes outside the image, by more than a pixel, are cut off at its edge, and those without an area
            in it left out, instead of being refused.

    Raises:
        InputError: the file is missing or no XML, has no size in whole pixels, or has an object without a name or a
            box, or one of which it is not clear whether it is difficult; or a box is outside the image or upside down.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there: add the annotation, or take the image out of ImageSets")
    with refusing(f"{path} is not an XML file of annotations", ET.ParseError, OSError, ValueError):
        # Python's parser stops at entities that multiply.
        root = ET.parse(path).getroot()  # noqa: S314
    width, height = (_number(root.find(f"size/{side}")) for side in ("width", "height"))
    if not (width >= 1 and height >= 1):
        raise InputError(f"{path} has no size with the image's width and height: add it")
    if not (width.is_integer() and height.is_integer()):
        raise InputError(f"{path} has the size {width:g}x{height:g}, and pixels are whole: mend it")
    found = Annotation(int(width), int(height), [], [], [], [], [], [])
    for number, element in enumerate(root.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        where = f"{path}: object {number} ({name or 'without a name'})"
        corners = [_number(element.find(f"bndbox/{side}")) for side in _SIDES]
        if not name or not all(map(math.isfinite, corners)):
            raise InputError(f"{where} must have a name, and a bndbox with the numbers {', '.join(_SIDES)}: mend it")
        fault = _fault(corners, found)
        if fault and fault != _NO_AREA and not mend:
            raise InputError(
                f"{where} has a box {fault}, {_written(corners)} in an image of {found.width}x{found.height} pixels: "
                "mend it, or give on_damaged='mend'"
            )
        difficult = (element.findtext("difficult") or "").strip()
        if difficult.lower() not in _IS_DIFFICULT:
            raise InputError(f"{where} has difficult={difficult!r}: write 1 or 0")
        if fault:
            found.faults.append(f"{where} has a box {fault}, {_written(corners)}")
        left, top = max(corners[0] - 1, 0.0), max(corners[1] - 1, 0.0)
        right, bottom = min(corners[2], width), min(corners[3], height)
        if fault != _NO_AREA and left < right and top < bottom:
            found.numbers.append(number)
            found.names.append(name)
            found.boxes.append((left, top, right, bottom))
            found.difficult.append(_IS_DIFFICULT[difficult.lower()])
            found.cut.extend(found.faults[-1:] if fault else [])
    return found


def _fault(corners: list[float], found: Annotation) -> str:
    """What is wrong with a box, in words; empty: nothing."""
    xmin, ymin, xmax, ymax = corners
    if xmin == xmax or ymin == ymax:
        return _NO_AREA
    if xmin > xmax or ymin > ymax:
        return "upside down"
    least, most = 1 - _ROUNDING, (found.width + _ROUNDING, found.height + _ROUNDING)
    is_outside = xmin < least or ymin < least or xmax > most[0] or ymax > most[1]
    return "outside the image" if is_outside else ""


def _number(element: ET.Element | None) -> float:
    """What an element says; NaN: it is not there, or says something else."""
    try:
        return float((element.text or "") if element is not None else "")
    except ValueError:
        return math.nan


def _written(corners: list[float]) -> str:
    return "(" + ", ".join(f"{corner:g}" for corner in corners) + ")"
