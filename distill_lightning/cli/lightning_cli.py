"""LightningCLI's verbs for every method, and ``record``."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning
import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]  # it does not say that it exports it
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

import distill_lightning
from distill_lightning.arguments import arguments_of, takes
from distill_lightning.callables import check_callables, named
from distill_lightning.callbacks import PredictionWriter, write_checkpoints_whole, writer_for, written_checkpoints
from distill_lightning.choices import choice_class, is_choice, is_plain, plain
from distill_lightning.cli.class_page import page_of
from distill_lightning.cli.from_file import class_of, safe_options
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError, refusing
from distill_lightning.modules import DistillationModule
from distill_lightning.modules.parts.checkpoints import check_format
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.networks.provenance import restore_structure
from distill_lightning.networks.weights import check_architecture, read_checkpoint
from distill_lightning.schedules import OneCycle
from distill_lightning.storage import free_path, write_tensors
from distill_lightning.teachers import TeacherStore
from distill_lightning.teachers.recorder import Recorded, record

_FROM_DATA = ("num_classes", "input_shape")
_DESCRIPTION = """Train, evaluate and compare the methods of distill_lightning.

Besides the verbs below: distill-lightning compare CONFIG [--output FOLDER], distill-lightning compress CONFIG,
distill-lightning export CKPT [--to FORMAT ...], distill-lightning doctor CONFIG."""


class RecordingTrainer(Trainer):
    """A Trainer that can also fill a store of teachers' answers."""

    recorded: Recorded | None = None

    def record(self, model: LightningModule, datamodule: LightningDataModule) -> Recorded:
        """Fill the store of a method's teachers, so that they need not run in training.

        Args:
            model: a method with teachers and a store.
            datamodule: data with a fixed number of views.

        Returns:
            What was recorded.

        Raises:
            InputError: the model is no such method.
        """
        if not isinstance(model, DistillationModule):
            raise InputError(f"record needs a method whose teachers are a TeacherStore, got {type(model).__name__}")
        self.recorded = record(self, model, datamodule)
        return self.recorded


class _Parser(LightningArgumentParser):
    """A parser for networks that functions make, too.

    On its way to an option in the line, jsonargparse hands what is linked to the model's options on to the networks in
    them, and has an argument for it only where these are classes. Nothing is linked to an option of a network.
    """

    def add_function_arguments(self, *args: Any, linked_targets: object = None, **kwargs: Any) -> list[str]:
        """Add the arguments of a function."""
        return super().add_function_arguments(*args, **kwargs)


class _TensorWriter(Callback):
    """Writes what a process predicts, which the Trainer would only return, beside the configuration that it is of."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any) -> None:
        """Keep the outputs of a batch."""
        self._outputs.append(outputs.cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        share = "" if trainer.world_size == 1 else f"_{trainer.global_rank}"
        path = free_path(Path(trainer.log_dir or trainer.default_root_dir) / f"predictions{share}.safetensors")
        # A regression's outputs are no logits.
        name = "logits" if getattr(pl_module, "num_classes", None) else "output"
        write_tensors(path, {name: torch.cat(self._outputs).float()})
        print(f"Written: {path}")


class DistillCLI(LightningCLI):
    """LightningCLI for the package's modules, any other LightningModule and any LightningDataModule.

    Classes are named by ``class_path``, those of this package by their short names. ``num_classes`` and ``input_shape``
    come from the data. Subclass it, or call `distill_lightning.cli.main`.

    Args:
        args: what follows the program's name; ``None``: the process's own arguments.
        run: whether a verb is expected and run; ``False``: the objects are only built.
    """

    _checkpoint: dict[str, Any] | None = None

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True) -> None:
        # Classes have short names once they are imported.
        distill_lightning.import_all()
        verbs, words = self.subcommands(), sys.argv[1:] if args is None else args
        if run and words and words[0] in verbs:
            # Of each verb LightningCLI would make a parser, which takes a while, and the others are not asked.
            self.subcommands = lambda: {words[0]: verbs[words[0]]}  # type: ignore[method-assign]
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
                "version": distill_lightning.__version__,
                "exit_on_error": False,
                **{verb: {"exit_on_error": False} for verb in self.subcommands()},
            },
            args=None if args is None else list(args),
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's parser, of a class of this package."""
        parser = _Parser(**{"dump_header": [f"pytorch_lightning=={pytorch_lightning.__version__}"], **kwargs})
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a configuration file in YAML.")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's verbs, and ``record``."""
        return {**LightningCLI.subcommands(), "record": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the number of classes and the shape of the inputs from the data to the model."""
        for name in _FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check the checkpoint before anything is built or written."""
        words = [_unambiguous(word) for word in (sys.argv[1:] if args is None else args)]
        page = page_of(words)
        if page is not None:
            print(page)
            raise SystemExit(0)
        _check_files(words)
        super().parse_arguments(parser, words)
        path = self._checkpoint_path()
        if path is not None:
            self._checkpoint = read_checkpoint(path)
            self._check_class(path, self._checkpoint)
        self._given = _model_options(self.config)
        self._check_callables()

    def _parse_ckpt_path(self) -> None:
        """Take the checkpoint's hyper-parameters; LightningCLI would import and call whatever they name."""
        found, path = (self._checkpoint or {}).get("hyper_parameters"), self._checkpoint_path()
        if not found or path is None:
            return
        class_path = self._model_class_path()
        kind: Any = named(class_path)
        options = safe_options(path, found, kind, self._given, linked=_FROM_DATA)
        verb = {"model": {"class_path": class_path, "dict_kwargs": options}}
        self.config = self.parser.parse_object({self.config["subcommand"]: verb}, self.config)

    def _check_callables(self) -> None:
        class_path = self._model_class_path()
        kind = named(class_path)
        known = {} if kind is None else arguments_of(kind)
        for name, value in self._given.items():
            if name in known:
                check_callables(f"model.init_args.{name}", known[name].annotation, value)

    def _model_class_path(self) -> str:
        verb = self.config.get("subcommand")
        class_path: str = (self.config[verb] if verb else self.config).get("model.class_path") or ""
        return class_path

    def before_instantiate_classes(self) -> None:
        """Add the keys that are linked to the data.

        Warn where the checkpoint's hyper-parameters override the command line's.
        """
        self._make_room_for_links()
        for name, value in _model_options(self.config).items():
            given = self._given.get(name, value)
            if name not in _FROM_DATA and _complete(given) != _complete(value):
                warnings.warn(
                    f"--ckpt_path: the checkpoint's {name}={value!r} overrides the given {name}={given!r}", stacklevel=2
                )

    def _make_room_for_links(self) -> None:
        """Give the model the keys that the data's are linked to.

        jsonargparse passes over a link to a key that is not there, and shared options in ``**options`` have no default.
        """
        subcommand = self.config.get("subcommand")
        model = (self.config[subcommand] if subcommand else self.config).get("model")
        if model is None:
            return
        kind: Any = named(model.class_path)
        if model.get("init_args") is None:
            model["init_args"] = Namespace()  # type: ignore[no-untyped-call]
        for key in _FROM_DATA:
            if takes(kind, key) and key not in model.init_args:
                model.init_args[key] = None

    def _check_class(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        if "recipes" in checkpoint:
            check_format(checkpoint, str(path))
        made_by, given = class_of(checkpoint["hyper_parameters"]), self._model_class_path()
        if made_by and _owner_and_name(made_by) != _owner_and_name(given):
            raise InputError(
                f"{path} is a checkpoint of {made_by}, not of {given}: give the configuration it was trained with"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; arguments that it refuses are an `InputError`."""
        with refusing("trainer", MisconfigurationException, ValueError):
            trainer = super().instantiate_trainer(**kwargs)
        write_checkpoints_whole(trainer)
        return trainer

    def instantiate_classes(self) -> None:
        """As of every `LightningCLI`; check the data, the checkpoint and the optimiser before anything is written."""
        super().instantiate_classes()
        if isinstance(self.datamodule, ViewDataModule) and self.trainer.world_size == 1:
            self.datamodule.prepare_data()
            self.datamodule.setup()
        path, checkpoint = self._checkpoint_path(), self._checkpoint
        # What the Trainer reads itself is not to be in memory twice.
        self._checkpoint = None
        if self.config.get("subcommand") == "predict":
            self._write_predictions()
        if not isinstance(self.model, DistillationModule):
            return
        if checkpoint is not None:
            restore_structure(self.model, checkpoint)
            check_architecture(self.model, checkpoint["state_dict"], source=str(path))
        if self.config.get("subcommand") == "fit":
            endless = self.trainer.max_epochs == self.trainer.max_steps == -1
            if isinstance(check_optimizer(self.model), OneCycle) and endless:
                raise InputError("OneCycle needs the length of the training: give trainer.max_epochs or max_steps")

    def _write_predictions(self) -> None:
        """Have predictions that have a format of their own written, unless the configuration says where."""
        if not any(isinstance(callback, PredictionWriter) for callback in self._callbacks):
            self._callbacks.append(writer_for(self.model) or _TensorWriter())

    @property
    def _callbacks(self) -> list[Any]:
        """The Trainer's, which it has not declared."""
        callbacks: list[Any] = cast("Any", self.trainer).callbacks
        return callbacks

    def after_fit(self) -> None:
        """Say where the checkpoints are, by which the next command finds what was trained."""
        if self.trainer.is_global_zero:
            for line in written_checkpoints(self.trainer):
                print(line)

    def after_predict(self) -> None:
        """Say where translations and boxes are."""
        for path in (path for one in self._callbacks if isinstance(one, PredictionWriter) for path in one.written):
            print(f"Written: {path}")

    def after_validate(self) -> None:
        """Say the unit of what Lightning's table has just shown."""
        if any("aurc" in name for name in self.trainer.callback_metrics):
            print("aurc and eaurc are in per mille (‰).")

    def after_test(self) -> None:
        """As after a validation."""
        self.after_validate()

    def after_record(self) -> None:
        """Print what ``record`` has written."""
        self.trainer.strategy.barrier("recorded")
        if not self.trainer.is_global_zero:
            return
        recorded = cast("Recorded", cast("RecordingTrainer", self.trainer).recorded)
        rate = recorded.answers / max(recorded.seconds, 1e-9)
        here = "" if self.trainer.world_size == 1 else f" in the first of {self.trainer.world_size} processes"
        store = cast("TeacherStore", self.model.teachers.store)
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


def _unambiguous(word: str) -> str:
    """A word of the command line; PyTorch's class is meant where Lightning has one of the same name."""
    flag, equals, value = word.rpartition("=")
    name = ReduceLROnPlateau.__name__
    return f"{flag}{equals}{ReduceLROnPlateau.__module__}.{name}" if value == name else word


def _check_files(arguments: Sequence[str]) -> None:
    """Refuse a configuration that cannot be read, by its name, which jsonargparse leaves out.

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


def _owner_and_name(class_path: str) -> tuple[bool, str]:
    """Whether a class is this package's, and its name; a module of it may have moved since a checkpoint was made."""
    package = __name__.partition(".")[0]
    return class_path.partition(".")[0] == package, class_path.rpartition(".")[2]


def _model_options(config: Namespace) -> dict[str, Any]:
    subcommand = config.get("subcommand")
    options = (config[subcommand] if subcommand else config).get("model.init_args")
    return dict(cast("Namespace", options).as_dict()) if options else {}


def _complete(value: Any) -> Any:
    """A value of a configuration, choices in it with all their options, the defaults too."""
    if isinstance(value, list):
        return [_complete(part) for part in value]
    if isinstance(value, dict) and is_choice(value.get("class_path")):
        kind = choice_class(value["class_path"])
        known = arguments_of(kind)
        defaults = {name: plain(known[name].default) for name in known if is_plain(known[name].default)}
        given = {name: _complete(part) for name, part in (value.get("init_args") or {}).items()}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": defaults | given}
    return plain(value) if is_plain(value) else value
