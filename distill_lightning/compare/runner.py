"""Training the runs of a comparison, each at most once."""

from __future__ import annotations

import datetime
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import distill_lightning
from distill_lightning.batch import Batch
from distill_lightning.callbacks import RunKeeper
from distill_lightning.compare.config import CompareConfig, Experiment
from distill_lightning.errors import refusing
from distill_lightning.modules import DistillationModule
from distill_lightning.networks import Pretrained
from distill_lightning.weights import read_checkpoint

# Teachers' seeds begin far from the students', so that no teacher shares its initial weights with a student.
_TEACHER_SEED = 1000


@dataclass(frozen=True)
class Run:
    """One training: a row's name, its seed, its length, and where its files are."""

    name: str
    seed: int
    epochs: int
    folder: Path

    @property
    def title(self) -> str:
        """For the progress bar."""
        return self.name if self.name.startswith("teacher_") else f"{self.name}, seed {self.seed}"

    @property
    def result_file(self) -> Path:
        """Written last: a run with this file is finished."""
        return self.folder / "result.json"

    @property
    def checkpoint(self) -> Path:
        """Of the last complete epoch, while the run is not finished."""
        return self.folder / "last.ckpt"

    @property
    def student_file(self) -> Path:
        """The trained network's weights after the last epoch."""
        return self.folder / "student.safetensors"

    def result(self) -> RunResult:
        """What the finished run left.

        Raises:
            InputError: the file is damaged.
        """
        with refusing(f"{self.result_file} is damaged, remove it to make the run again", ValueError, TypeError):
            return RunResult(**json.loads(self.result_file.read_text()))

    def logits(self) -> dict[str, Tensor]:
        """The test logits ``(N, K)`` of the weights after the ``"last"`` and at the ``"selected"`` epoch."""
        return load_file(self.folder / "test_logits.safetensors")


@dataclass(frozen=True)
class RunResult:
    """What a finished run is remembered by, besides its weights and test logits."""

    parameters: int
    selected_epoch: int
    history: list[dict[str, float]]
    made: str


def plan(experiment: Experiment, folder: Path) -> list[Run]:
    """All runs in the order they are made: the teachers, then seed by seed every row of the table."""
    config = experiment.config
    epochs = config.teachers.epochs or config.epochs
    runs = [
        Run(f"teacher_{number}", _TEACHER_SEED + number, epochs, folder / "runs" / f"teacher_{number}")
        for number in range(1, config.teachers.number + 1)
    ]
    return runs + [
        Run(name, seed, config.epochs, folder / "runs" / name / f"seed_{seed}")
        for seed in config.seeds
        for name in experiment.names
    ]


def execute(experiment: Experiment, run: Run, teachers: Sequence[Run], on_epoch: Callable[[int], None]) -> None:
    """Train a run, from its last checkpoint if it has one, and evaluate it on the test images.

    Args:
        experiment: builds the networks, the data and the method.
        run: which.
        teachers: the finished teachers' runs.
        on_epoch: called with the number of finished epochs, after each.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    networks = [Pretrained(experiment.teacher(), teacher.student_file) for teacher in teachers]
    torch.manual_seed(run.seed)
    if run.name.startswith("teacher_"):
        module: DistillationModule = experiment.supervised(experiment.teacher())
    else:
        module = experiment.method(run.name, experiment.student(), networks)
    keeper = RunKeeper(run.folder, seed=run.seed)
    trainer = make_trainer(experiment.config, max_epochs=run.epochs, callbacks=[keeper, _Ticker(on_epoch)])
    checkpoint = str(run.checkpoint) if run.checkpoint.exists() else None
    if checkpoint is not None:
        read_checkpoint(run.checkpoint)
    with warnings.catch_warnings():
        # A run killed between its last checkpoint and its result resumes with nothing left to train.
        warnings.filterwarnings("ignore", message=".*has already.*max_epochs.*")
        trainer.fit(module, datamodule=experiment.data(order_seed=run.seed), ckpt_path=checkpoint)
    if len(keeper.history) < run.epochs:
        # Lightning may return from an interrupted fit as if it had ended.
        raise KeyboardInterrupt(f"{run.title} was interrupted")
    write_atomically(run.student_file, module.export_student)
    logits = {"last": _test_logits(experiment, module)}
    module.student.load_state_dict(load_file(run.folder / "selected.safetensors"))
    logits["selected"] = _test_logits(experiment, module)
    write_atomically(run.folder / "test_logits.safetensors", lambda path: save_file(logits, path))
    result = RunResult(count_parameters(module.student), keeper.selected_epoch, keeper.history, made=provenance())
    write_atomically(run.result_file, lambda path: path.write_text(json.dumps(asdict(result), indent=1)))
    run.checkpoint.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written beside its place and moved there when it is complete."""
    partial = path.with_name(f"partial{path.suffix}")
    write(partial)
    partial.replace(path)


def count_parameters(network: nn.Module) -> int:
    """Numbers that learn, as the network is used at test time."""
    return sum(parameter.numel() for parameter in network.parameters())


def load_test_targets(experiment: Experiment) -> Tensor:
    """The test images' classes ``(N,)``."""
    return torch.cat([Batch.of(batch).target for batch in experiment.sample.test_dataloader()])


def provenance() -> str:
    """The day, and what numbers are made with."""
    return (
        f"{datetime.datetime.now(tz=datetime.UTC).date()}, distill_lightning {distill_lightning.__version__}, "
        f"torch {torch.__version__}, pytorch-lightning {version('pytorch-lightning')}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads, {platform.machine()}"
    )


def _test_logits(experiment: Experiment, module: DistillationModule) -> Tensor:
    outputs = make_trainer(experiment.config).predict(module, dataloaders=experiment.sample.test_dataloader())
    return torch.cat(cast("list[Tensor]", outputs)).float().cpu()


def make_trainer(config: CompareConfig, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one device.

    Raises:
        InputError: there is no such accelerator or precision.
    """
    with refusing("accelerator or precision", MisconfigurationException, ValueError):
        return pl.Trainer(
            accelerator=config.accelerator,
            precision=config.precision,  # type: ignore[arg-type]  # the Trainer itself checks it
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )


class _Ticker(pl.Callback):
    """Tells the progress bar about every finished epoch."""

    def __init__(self, on_epoch: Callable[[int], None]) -> None:
        self.on_epoch = on_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_epoch(trainer.current_epoch + 1)
