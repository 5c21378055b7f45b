"""The verb: the student of a checkpoint alone, its files, and its model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from torch import nn

from distill_lightning.compression.structure.changes import plain_structure, structure_of
from distill_lightning.errors import InputError, check_one_of, refusing_to_write
from distill_lightning.layers import InputShape, dry_forward, plain_shape
from distill_lightning.storage import write_whole
from distill_lightning.studies.export.card import data_of, model_card, rows_of
from distill_lightning.studies.export.config import FORMATS, ExportConfig, Format
from distill_lightning.studies.export.formats import Exported, reads_sentences, refuse_sentences, write_format
from distill_lightning.studies.export.student import DESCRIPTION, read_training, recipe_in, student_of
from distill_lightning.studies.output import print_written, refuse_foreign_folder, table_of, wide_console

CARD = "README.md"


@dataclass(frozen=True)
class Export:
    """What `export_checkpoint` wrote.

    Attributes:
        student: the network, plain, in eval mode and on the CPU.
        files: one for each format.
        folder: that they are in.
    """

    student: nn.Module
    files: tuple[Exported, ...]
    folder: Path

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [*dict.fromkeys(file.path for file in self.files), self.folder / DESCRIPTION, self.folder / CARD]


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    to: Sequence[Format] = ("safetensors",),
    student: nn.Module | None = None,
    input_shape: InputShape | None = None,
) -> Export:
    """Write the student of a checkpoint alone, run the files, and describe it in a model card.

    The folder gets ``model.safetensors``, ``model.pt2`` or ``model.onnx``, all for a batch of any size;
    ``config.json``, from which `load_exported` builds the network again; and ``README.md``. With ``model.safetensors``
    it can be put on the Hugging Face Hub as it is (``hf upload NAME FOLDER``). A network that translates, which reads
    more than one tensor, is written as weights alone, which are compared and not run.

    Args:
        checkpoint: of a training with one of this package's methods. Only tensors and plain values are read of it.
        output: a new or empty folder, or one of an export before, whose files are replaced.
        to: formats: ``"safetensors"``; ``"torch_export"``; ``"onnx"`` (needs the extra ``onnx``); ``"hub"``:
            ``"safetensors"``, read back as ``huggingface_hub`` reads it (needs the extra ``hub``). Nothing is
            downloaded or sent.
        student: a network that is built as the trained one was; only needed if no factory of this package built it.
        input_shape: of one input, or of each of several by name; only needed if the checkpoint does not say it; not
            read of a network that translates.

    Returns:
        The student, and what was measured of the files.

    Raises:
        InputError: the checkpoint is missing, damaged, unsafe, or of something else; ``student`` or ``input_shape`` is
            needed; the network cannot be exported, as one that translates in a format of more than weights, or a file
            gives other outputs than it; the folder is another's; the disk is full or refuses.
    """
    path, folder = Path(checkpoint), Path(output)
    for kind in to:
        check_one_of("export: to", kind, FORMATS)
    refuse_foreign_folder(folder, known=DESCRIPTION)
    told = read_training(path)
    network = student_of(path, told, student)
    shape = input_shape or told["hyper_parameters"].get("input_shape")
    if reads_sentences(network):
        shape = None
        refuse_sentences(network, to)
    elif shape is None:
        raise InputError(
            f"{path} does not say what shape its inputs have: give --input_shape, for example 1 28 28, or in Python "
            "export_checkpoint(..., input_shape=(1, 28, 28))"
        )
    else:
        dry_forward(network, shape)
    description = {
        "library": "distill_lightning",
        "class": type(network).__name__,
        "recipe": recipe_in(told) if student is None else None,
        "structure": plain_structure(structure_of(network)),
        "input_shape": None if shape is None else plain_shape(shape),
        **{name: told["hyper_parameters"].get(name) for name in ("num_classes", "num_targets")},
        # Without them nobody can feed the files, or read what they say.
        **{name: value for name, value in data_of(told).items() if name in ("class_names", "mean", "std")},
    }
    with refusing_to_write("output"):
        folder.mkdir(parents=True, exist_ok=True)
        # What was exported before stays until all is written and checked.
        with TemporaryDirectory(prefix="partial.", dir=folder) as name:
            partial = Path(name)
            write_whole(partial / DESCRIPTION, [json.dumps(description, indent=1).encode()])
            files = tuple(write_format(network, kind, partial, description, shape) for kind in to)
            write_whole(partial / CARD, [model_card(network, told, description, files).encode()])
            for written in partial.iterdir():
                written.replace(folder / written.name)
    return Export(network, tuple(file._replace(path=folder / file.path.name) for file in files), folder)


def run(config: ExportConfig, make: Callable[[Sequence[str]], Any], *, console: Console | None = None) -> Export:
    """Run ``distill-lightning export CKPT [--to FORMAT ...] [--output FOLDER]``.

    Args:
        config: what is exported, and how.
        make: builds what a configuration of a training describes; its ``model`` has the ``student``.
        console: where the table is shown.

    Raises:
        InputError: see `export_checkpoint`.
    """
    console = wide_console(console)
    student = None
    if config.config is not None:
        model = make(["--config", config.config]).model
        student = getattr(model, "student", None)
        if student is None:
            raise InputError(f"{config.config} describes a {type(model).__name__}, which has no student")
    export = export_checkpoint(
        config.checkpoint, config.output, to=config.formats, student=student, input_shape=config.input_shape
    )
    console.print(table_of(rows_of(export.files)))
    print_written(console, export.paths)
    return export
