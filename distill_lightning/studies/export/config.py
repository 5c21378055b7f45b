"""The options of ``export``: read and checked without PyTorch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from distill_lightning.errors import InputError

Format = Literal["safetensors", "torch_export", "onnx", "hub"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and how.

    Attributes:
        checkpoint: of a training.
        formats: of the files.
        output: folder for everything that is written.
        input_shape: of one input; ``None``: the checkpoint says it.
        config: path of the configuration that builds a student of which the checkpoint does not tell how.
    """

    checkpoint: Path
    formats: list[Format]
    output: Path
    input_shape: list[int] | None
    config: str | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"export: {message}")


def parse_config(arguments: Sequence[str]) -> ExportConfig:
    """Read ``CKPT [--to FORMAT ...] [--output FOLDER] [--input_shape C H W] [--config FILE]``.

    Raises:
        InputError: the options cannot be read.
    """
    parser = _Parser(
        prog="distill-lightning export",
        description="Write the student of a checkpoint alone, run what was written, and describe it in a model card.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a checkpoint of a training")
    parser.add_argument(
        "--to", nargs="+", choices=FORMATS, default=["safetensors"],
        help="formats; 'hub' is 'safetensors', read back as the Hugging Face Hub's library reads it",
    )  # fmt: skip
    parser.add_argument("--output", help="folder of the files; results/export/<name of the checkpoint>")
    parser.add_argument("--input_shape", type=int, nargs="+", help="of one input, such as 1 28 28")
    parser.add_argument("--config", help="the configuration of the training, for a student that no factory built")
    options = parser.parse_args(list(arguments))
    path = Path(options.checkpoint)
    return ExportConfig(
        checkpoint=path,
        formats=list(dict.fromkeys(options.to)),
        output=Path(options.output or Path("results") / "export" / path.stem),
        input_shape=options.input_shape,
        config=options.config,
    )
