"""The options of ``compress``: read and checked without PyTorch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from distill_lightning.errors import InputError

Control = Literal["same_size", "random"]
_CONTROLS: tuple[Control, ...] = ("same_size", "random")


@dataclass(frozen=True)
class CompressConfig:
    """A compression and its controls.

    Attributes:
        module: path of the configuration of a module that compresses.
        overrides: what is passed on to that configuration, as on the command line of ``fit``.
        output: folder for everything that is written.
        seeds: of the runs, each with every control.
        controls: what the compression is held against.
        metric: the score that the table is about.
        preview: whether only to show what the steps would take out of the network.
        anew: whether the runs that are in the folder are removed and made again.
        dense_epochs: for how many epochs the dense network was trained before; ``None``: as its checkpoint tells.
    """

    module: str
    overrides: list[str]
    output: str
    seeds: list[int]
    controls: list[Control]
    metric: str
    preview: bool
    anew: bool
    dense_epochs: int | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"compress: {message}")


def parse_config(arguments: Sequence[str]) -> CompressConfig:
    """Read ``CONFIG [--preview] [--anew] [--output FOLDER] [--seeds 0 1] [--controls ...] [--dense-epochs N] ...``.

    Raises:
        InputError: the options cannot be read, or there is no such configuration.
    """
    # An abbreviation could be meant for the configuration.
    parser = _Parser(
        prog="distill-lightning compress",
        description="Compress, train the controls, write and print the report.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="a configuration of a module that compresses, as for fit")
    parser.add_argument("--output", help="folder of the results; results/compress/<name of the configuration>")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each; the table has mean and sd")
    parser.add_argument(
        "--controls", nargs="*", choices=_CONTROLS, default=_CONTROLS,
        help="a dense network of the same size from scratch, and the same steps with a random criterion",
    )  # fmt: skip
    parser.add_argument("--metric", default="accuracy", help="the score that the table is about")
    parser.add_argument("--preview", action="store_true", help="show what would leave the network, and train nothing")
    parser.add_argument("--anew", action="store_true", help="remove the runs in the folder, and make them again")
    parser.add_argument(
        "--dense-epochs", type=int, metavar="N",
        help="epochs that a pretrained dense network has had, where its checkpoint does not tell: the control of the "
        "same size is trained for as many more",
    )  # fmt: skip
    options, overrides = parser.parse_known_args(list(arguments))
    if not Path(options.config).is_file():
        raise InputError(f"there is no configuration {options.config}: give the path of a YAML file")
    if options.dense_epochs is not None and options.dense_epochs < 0:
        raise InputError(f"--dense-epochs must not be negative, got {options.dense_epochs}: give 0 to fresh weights")
    twice = next((seed for seed in options.seeds if options.seeds.count(seed) > 1), None)
    if twice is not None:
        raise InputError(f"--seeds has {twice} twice: give each seed once")
    return CompressConfig(
        module=options.config,
        overrides=overrides,
        output=options.output or str(Path("results") / "compress" / Path(options.config).stem),
        seeds=options.seeds,
        controls=list(dict.fromkeys(options.controls)),
        metric=options.metric,
        preview=options.preview,
        anew=options.anew,
        dense_epochs=options.dense_epochs,
    )
