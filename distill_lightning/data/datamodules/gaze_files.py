"""The files of MPIIGaze: a MATLAB file of normalised eye images for each person and day, and lists of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill_lightning import functional
from distill_lightning.data.datamodules.mat_file import read_mat
from distill_lightning.errors import InputError, refusing

SHAPE = (36, 60)
SIDES = ("left", "right")
NORMALISED = Path("Data/Normalized")
LISTS = Path("Evaluation Subset/sample list for eye image")
SOURCE = "http://datasets.d2.mpi-inf.mpg.de/MPIIGaze/MPIIGaze.tar.gz"


class Eyes(NamedTuple):
    """Samples of a person or more.

    Attributes:
        images: uint8 ``(N, 1, 36, 60)``.
        poses: of the head, pitch and yaw in radians, float32 ``(N, 2)``.
        gazes: pitch and yaw in radians, float32 ``(N, 2)``.
    """

    images: Tensor
    poses: Tensor
    gazes: Tensor

    def take(self, index: Tensor) -> Eyes:
        """The samples at ``index``."""
        return Eyes(*(part[index] for part in self))


class Day(NamedTuple):
    """What a file holds.

    Attributes:
        frames: their file names.
        eyes: of each side the eye in every frame, in the order of the names.
    """

    frames: list[str]
    eyes: dict[str, Eyes]


def people(folder: Path) -> dict[str, Path]:
    """The folders of the people, by their names ``p00``, ``p01`` and so on.

    Args:
        folder: ``MPIIGaze``, or the one that it is in.

    Raises:
        InputError: there are none.
    """
    roots = (folder, folder / "MPIIGaze")
    root = next((root for root in roots if (root / NORMALISED).is_dir()), folder)
    found = {path.name: path for path in sorted((root / NORMALISED).glob("p[0-9][0-9]")) if path.is_dir()}
    if not found:
        raise InputError(f"no {NORMALISED}/p00 in {folder}: unpack MPIIGaze.tar.gz there, from {SOURCE}")
    return found


def read_person(folder: Path, *, listed: bool, sides: Sequence[str] = SIDES, mirror_right: bool = True) -> Eyes:
    """All samples of a person.

    Args:
        folder: of the person's days, ``Data/Normalized/p00`` say.
        listed: whether to read those alone that the person's list in ``Evaluation Subset`` names, in its order; else
            all, day by day, one side after the other.
        sides: of the face whose eyes are read.
        mirror_right: whether right eyes are made to look like left ones, see `read_day`.

    Raises:
        InputError: a file is missing, damaged or of something else.
    """
    paths = sorted(folder.glob("day*.mat"))
    if not paths:
        raise InputError(f"{folder} has no day01.mat: unpack MPIIGaze.tar.gz again, from {SOURCE}")
    days = {path.stem: read_day(path, mirror_right=mirror_right) for path in paths}
    every = joined([day.eyes[side] for day in days.values() for side in sides])
    if not listed:
        return every
    places: dict[tuple[str, str, str], list[int]] = {}
    names = ((name, frame, side) for name, day in days.items() for side in sides for frame in day.frames)
    for place, called in enumerate(names):
        places.setdefault(called, []).append(place)
    return every.take(torch.tensor(_listed(folder, places, sides), dtype=torch.long))


def joined(parts: Sequence[Eyes]) -> Eyes:
    """One after another."""
    return Eyes(*map(torch.cat, zip(*parts, strict=True)))


def read_day(path: Path, *, mirror_right: bool = True) -> Day:
    """What a person's file of a day holds: ``data``, a struct of ``left`` and ``right``, and ``filenames``.

    Each side is a struct of ``image`` (N, 36, 60), ``gaze`` (N, 3), the direction, and ``pose`` (N, 3), the rotation
    vector of the head; they become angles by `functional.gaze_to_angles` and `functional.pose_to_angles`.

    Args:
        path: of a MATLAB file before version 7.3, ``day01.mat`` say.
        mirror_right: whether images of right eyes are mirrored, so that they look like left ones; the yaw of their gaze
            and pose changes its sign then.

    Raises:
        InputError: the file is damaged, or holds something else.
    """
    found = read_mat(path, ["data", "filenames"])
    names = found.get("filenames", [])
    # A cell of texts, or a text of several lines; of a single one, just that.
    frames = [str(name) for name in ([names] if isinstance(names, str) else names)]
    eyes = {}
    for side in SIDES:
        struct = _field(path, found.get("data"), "data", side)
        parts = {name: _field(path, struct, f"data.{side}", name) for name in ("image", "gaze", "pose")}
        eyes[side] = _eyes(path, side, parts, frames)
    if mirror_right:
        images, poses, gazes = eyes["right"]
        turned = torch.tensor([1.0, -1.0])
        eyes["right"] = Eyes(images.flip(3), poses * turned, gazes * turned)
    return Day(frames, eyes)


def _field(path: Path, struct: Any, name: str, field: str) -> Any:
    if not isinstance(struct, Mapping) or field not in struct:
        raise InputError(f"{path}: {name} is no struct with {field}: it is not one of MPIIGaze's normalised files")
    return struct[field]


def _eyes(path: Path, side: str, parts: Mapping[str, Any], frames: Sequence[str]) -> Eyes:
    count = len(frames)
    shapes = {"image": (count, *SHAPE), "gaze": (count, 3), "pose": (count, 3)}
    for name, values in parts.items():
        kinds = ("uint8",) if name == "image" else ("float64", "float32")
        if getattr(values, "shape", None) != shapes[name] or values.dtype not in kinds:
            shape, kind = getattr(values, "shape", None), getattr(values, "dtype", type(values).__name__)
            raise InputError(
                f"{path}: data.{side}.{name} is {shape} of {kind} where {count} filenames need {shapes[name]} of "
                f"{'uint8' if name == 'image' else 'double'}: it is not one of MPIIGaze's normalised files"
            )
    # MATLAB's order of bytes and dimensions is not PyTorch's.
    gaze, pose = (torch.from_numpy(np.array(parts[name], dtype=np.float64, order="C")) for name in ("gaze", "pose"))
    for name, values in (("gaze", gaze), ("pose", pose)):
        wrong = (~values.isfinite().all(dim=1) | ((name == "gaze") & ~values.any(dim=1))).nonzero().flatten().tolist()
        if wrong:
            raise InputError(
                f"{path}: data.{side}.{name} of frame {frames[wrong[0]]} is {values[wrong[0]].tolist()}, no direction: "
                "fetch the file again"
            )
    images = torch.from_numpy(np.array(parts["image"], dtype=np.uint8, order="C"))[:, None]
    return Eyes(images, functional.pose_to_angles(pose).float(), functional.gaze_to_angles(gaze).float())


def _listed(folder: Path, places: Mapping[tuple[str, str, str], list[int]], sides: Sequence[str]) -> list[int]:
    """The places of the samples that a person's list names, lines such as ``day01/0001.jpg left``."""
    path = folder.parents[2] / LISTS / f"{folder.name}.txt"
    if not path.is_file():
        raise InputError(f"no {path}: unpack the whole of MPIIGaze.tar.gz, or give samples='all'")
    found = []
    with refusing(f"{path} cannot be read", OSError, UnicodeDecodeError):
        lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        image, _, side = line.strip().partition(" ")
        day, _, frame = image.partition("/")
        if not image or (side in SIDES and side not in sides):
            continue
        named = places.get((day, frame, side), [])
        if len(named) != 1:
            raise InputError(
                f"{path}, line {number}: {line.strip()!r} names {len(named) or 'no'} sample{'s' * (len(named) > 1)} of "
                f"{folder}: unpack MPIIGaze.tar.gz again"
            )
        found += named
    if not found:
        raise InputError(f"{path} lists no {' or '.join(sides)} eye: unpack MPIIGaze.tar.gz again")
    return found
