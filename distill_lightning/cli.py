"""The command line: LightningCLI's verbs for every method, ``record``, ``compare`` and ``compress``.

Bad input ends in one line on standard error and exit status 2; a traceback is a bug.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import Namespace
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file

import distill_lightning
from distill_lightning import __version__, callbacks, compression
from distill_lightning.compression import Step, steps
from distill_lightning.compression.structure import restore_structure
from distill_lightning.data import datamodules
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError, refusing
from distill_lightning.modules import DistillationModule
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.networks.weights import read_checkpoint
from distill_lightning.schedules import OneCycle
from distill_lightning.teachers import TeacherStore
from distill_lightning.teachers.recorder import Recorded, record

_TOLD_BY_DATA = ("num_classes", "input_shape")
# Classes are found by their short names once they are imported.
__all__ = ["DistillCLI", "callbacks", "main", "one_line"]
_DESCRIPTION = """Train, evaluate and compare the methods of distill_lightning.

Besides the verbs below: distill-lightning compare CONFIG [--output FOLDER], distill-lightning compress CONFIG."""


class RecordingTrainer(Trainer):
    """A Trainer that can fill a store of teachers' answers, too."""

    recorded: Recorded | None = None

    def record(self, model: LightningModule, datamodule: LightningDataModule) -> Recorded:
        """Fill the store of a method's teachers: they need not run in training then.

        Args:
            model: with teachers and a store.
            datamodule: with a number of views.
        """
        if not isinstance(model, DistillationModule):
            raise InputError(f"record needs a method with teachers and a store, got {type(model).__name__}")
        self.recorded = record(self, model, datamodule)
        return self.recorded


class DistillCLI(LightningCLI):
    """LightningCLI for the package's modules, any other LightningModule and any LightningDataModule.

    Classes are named by ``class_path``, those of this package by their short names. ``num_classes`` and ``input_shape``
    are told by the data. Subclass it, or call `distill_lightning.cli.main`.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=RecordingTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "distill-lightning",
                "description": _DESCRIPTION,
                "version": __version__,
                "exit_on_error": False,
                **{verb: {"exit_on_error": False} for verb in self.subcommands()},
            },
            args=None if args is None else list(args),
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's verbs, and ``record``."""
        return {**LightningCLI.subcommands(), "record": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data tells the model its classes and the shape of its input."""
        for name in _TOLD_BY_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and look at the checkpoint: what is wrong with it is told before anything is built or written."""
        _check_files(sys.argv[1:] if args is None else args)
        super().parse_arguments(parser, args)
        path = self._checkpoint_path()
        if path is not None:
            self._check_class(path)
        self._given = _model_options(self.config)

    def before_instantiate_classes(self) -> None:
        """Lightning lets a checkpoint's hyper-parameters win over the command line; say which did."""
        for name, value in _model_options(self.config).items():
            given = self._given.get(name, value)
            if name not in _TOLD_BY_DATA and given != value:
                warnings.warn(
                    f"--ckpt_path: the checkpoint's {name}={value!r} overrides the given {name}={given!r}", stacklevel=2
                )

    def _check_class(self, path: Path) -> None:
        made_by = read_checkpoint(path)["hyper_parameters"].get("_class_path", "")
        given = self.config[self.config["subcommand"]].get("model.class_path") or ""
        if made_by and given and made_by.rpartition(".")[2] != given.rpartition(".")[2]:
            raise InputError(
                f"{path} is a checkpoint of {made_by.rpartition('.')[2]}, not of {given.rpartition('.')[2]}: "
                "give the configuration it was trained with"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer; what it refuses is the user's to mend."""
        with refusing("trainer", MisconfigurationException, ValueError):
            return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Look at the data, the checkpoint and the optimiser before the Trainer writes anything."""
        if isinstance(self.datamodule, ViewDataModule) and self.trainer.world_size == 1:
            self.datamodule.prepare_data()
            self.datamodule.setup()
        if not isinstance(self.model, DistillationModule):
            return
        path = self._checkpoint_path()
        if path is not None:
            checkpoint = read_checkpoint(path)
            restore_structure(self.model, checkpoint)
            self.model.check_weights(checkpoint["state_dict"], source=str(path))
        if self.config.get("subcommand") == "fit":
            endless = self.trainer.max_epochs == self.trainer.max_steps == -1
            if isinstance(check_optimizer(self.model), OneCycle) and endless:
                raise InputError("OneCycle needs the length of the training: give trainer.max_epochs or max_steps")

    def after_predict(self) -> None:
        """Keep what ``predict`` found, which the Trainer would only return."""
        share = "" if self.trainer.world_size == 1 else f"_{self.trainer.global_rank}"
        path = Path(self.trainer.default_root_dir) / f"predictions{share}.safetensors"
        outputs = self.trainer.predict_loop.predictions
        # A regression's outputs are no logits.
        name = "logits" if getattr(self.model, "num_classes", None) else "output"
        save_file({name: torch.cat(outputs).float().contiguous()}, path)
        print(f"Written: {path}")

    def after_record(self) -> None:
        """Say what ``record`` has done."""
        self.trainer.strategy.barrier("recorded")
        if not self.trainer.is_global_zero:
            return
        recorded = cast("Recorded", cast("RecordingTrainer", self.trainer).recorded)
        rate = recorded.answers / max(recorded.seconds, 1e-9)
        here = "" if self.trainer.world_size == 1 else f" in the first of {self.trainer.world_size} processes"
        store = cast("TeacherStore", self.model.teacher_store)
        # Other processes have written their shares since.
        store.refresh()
        print(
            f"Recorded {recorded.answers:,} answers of {store.nbytes:,} bytes, {recorded.nbytes / 1e6:,.1f} MB in "
            f"{recorded.seconds:,.1f} s{here}: {rate:,.0f} a second. {store.path} is "
            f"{'complete' if store.is_complete else 'not complete'}."
        )

    def _checkpoint_path(self) -> Path | None:
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path == "best":
            raise InputError("--ckpt_path best means the best checkpoint of a fit in the same process: give its path")
        return None if path in (None, "last", "hpc", "registry") else Path(path)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: what follows the program's name; ``None``: the process's own arguments.

    Returns:
        The exit status: 0, or 2 after bad input.
    """
    _quiet_down()
    try:
        _run(sys.argv[1:] if args is None else list(args))
    except (ArgumentError, ValueError) as error:
        if not isinstance(error, ArgumentError) and _refusal(error) is None:
            raise
        print(f"distill-lightning: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["compare"]:
        # Imported here, so that the other verbs need not wait for what only this one uses.
        from distill_lightning.studies.compare.command import run  # noqa: PLC0415

        run(arguments[1:])
    elif arguments[:1] == ["compress"]:
        from distill_lightning.studies.compress.command import run as compress  # noqa: PLC0415  (likewise)

        compress(arguments[1:], _parts_of)
    else:
        DistillCLI(arguments)


def _parts_of(arguments: Sequence[str]) -> Any:
    """What a configuration makes, without running anything."""
    from distill_lightning.studies.compress.runs import Parts  # noqa: PLC0415  (likewise)

    cli = DistillCLI(arguments, run=False)
    return Parts(cli.model, cli.datamodule, cli.trainer)


def one_line(error: Exception) -> str:
    """The heart of an error in one line: where, and what is wrong there.

    jsonargparse nests one message in another. The innermost of the chain is the reason; the outermost names the keys
    and classes on the way to it.
    """
    refusal = _refusal(error)
    if refusal is not None:
        # A loader's worker process puts its whole traceback before the message.
        message = refusal.rpartition(f"{InputError.__module__}.InputError: ")[2]
        return " ".join(message.split())
    last = list(_chain(error))[-1]
    # A KeyError shows its message in quotes.
    reason = " ".join(str(last.args[0] if isinstance(last, KeyError) and last.args else last).split())
    keys = dict.fromkeys(re.findall(r'Parser key "([^"]+)"', str(error)))
    reason = _none_of_union(error, reason) or _unknown_class(reason, [*keys, ""][len(keys) - 1]) or reason
    classes = re.findall(r"class_path '([^']+)'", str(error))
    inside = f" of {classes[-1].rpartition('.')[2]}" if classes else ""
    where = ".".join(keys) + inside
    return f"{where}: {reason}" if where else reason


def _none_of_union(error: Exception, reason: str) -> str | None:
    """All that would have been accepted, where the innermost reason names one kind only; ``None``: it is no such."""
    got = re.fullmatch(r"Expected a (?:<class '\w+'>|typing\.Literal\[.*\])\. Got value: (.*)", reason)
    union = next((text for text in map(str, [*_chain(error)][-2:-1]) if text.startswith("Does not validate")), "")
    kinds = re.findall(r"- Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*)\])", union)
    names = [name or literal for name, literal in kinds if name != "NoneType"]
    return f"Expected {', '.join(names)}. Got value: {got[1]}" if got and names else None


def _unknown_class(reason: str, key: str) -> str | None:
    """What a class's name could be meant for; ``None``: the reason is another one."""
    prefix = "Expected a dot import path string: "
    if not reason.startswith(prefix):
        return None
    name = reason.removeprefix(prefix)
    if key == "steps":
        known = (one for one in map(vars(steps).get, steps.__all__) if isinstance(one, type) and issubclass(one, Step))
        return f"there is no step {name}: known are {', '.join(one.__name__ for one in known if one is not Step)}"
    modules = (distill_lightning, callbacks, datamodules, compression)
    near = difflib.get_close_matches(name, sorted({one for module in modules for one in module.__all__}), cutoff=0.5)
    way_out = f"near names: {', '.join(near)}" if near else "give package.module.Class for one of another package"
    return f"there is no class {name}; {way_out}"


def _check_files(arguments: Sequence[str]) -> None:
    """Name the configuration that cannot be read, which jsonargparse does not.

    Raises:
        InputError: it is no YAML, or holds no keys.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for flag, path in itertools.pairwise(words):
        if flag not in ("-c", "--config") or not Path(path).is_file():
            continue
        with refusing(f"{path} is no YAML", yaml.YAMLError, UnicodeDecodeError, OSError):
            content = yaml.safe_load(Path(path).read_text())
        if not isinstance(content, dict):
            what = "is empty" if content is None else "holds no keys"
            raise InputError(f"{path} {what}: give a configuration with trainer, model and data")


def _refusal(error: Exception) -> str | None:
    """The message of the InputError behind an error, which may have come through jsonargparse; None: there is none."""
    for link in _chain(error):
        if isinstance(link, InputError):
            return str(link)
    return InputError.latest if InputError.latest and InputError.latest in str(error) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _model_options(config: Namespace) -> dict[str, Any]:
    subcommand = config.get("subcommand")
    options = config[subcommand].get("model.init_args") if subcommand else None
    return dict(cast("Namespace", options).as_dict()) if options else {}


def _quiet_down() -> None:
    """Leave out what Lightning says about things that are meant to be so."""
    for message in (
        ".*does not have many workers.*",
        "Found .* module.* in eval mode at the start of training.*",
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*instantiate_classes. was deprecated.*",
        # main(args) passes its arguments on.
        "LightningCLI's args parameter is intended.*",
        ".*`tensorboardX` has been removed.*",
        "The dirpath has changed from .*",
        "The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


if __name__ == "__main__":
    sys.exit(main())
