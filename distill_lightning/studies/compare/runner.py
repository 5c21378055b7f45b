"""Training the runs of a comparison, each at most once."""

from __future__ import annotations

import datetime
import json
import platform
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor, nn

import distill_lightning
from distill_lightning.callbacks import RunKeeper, write_checkpoints_whole
from distill_lightning.data.batch import Batch
from distill_lightning.errors import NonFiniteError, refusing
from distill_lightning.modules import DistillationModule
from distill_lightning.networks import Pretrained
from distill_lightning.networks.weights import read_checkpoint
from distill_lightning.storage import write_tensors, write_whole
from distill_lightning.studies.compare.config import CompareConfig, Row
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.data import DataWatch
from distill_lightning.studies.progress import EpochCounter, OnEpoch

# Teachers' seeds begin far from the students', so that no teacher shares its initial weights with a student.
_TEACHER_SEED = 1000
# An odd number near the golden ratio of 2 ** 32: no stage meets its teacher's seed again.
_STAGE_STRIDE = 0x9E3779B1


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        row: of the table; ``None``: a teacher.
        name: the row's, or the teacher's.
        seed: of the order of the data.
        initial_seed: of the initial weights.
        epochs: its length.
        folder: where its files are.
        teachers: the runs whose networks teach it.
        initial: the run whose student's weights it begins with.
    """

    row: Row | None
    name: str
    seed: int
    initial_seed: int
    epochs: int
    folder: Path
    teachers: tuple[Run, ...] = ()
    initial: Run | None = None

    @property
    def is_teacher(self) -> bool:
        """Whether it makes one of the teachers, not a student."""
        return self.row is None

    @property
    def title(self) -> str:
        """For the progress bar."""
        return self.name if self.is_teacher else f"{self.name}, seed {self.seed}"

    @property
    def result_file(self) -> Path:
        """Written last: a run with this file is finished."""
        return self.folder / "result.json"

    @property
    def is_finished(self) -> bool:
        """Whether it has left its result."""
        return self.result_file.exists()

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

    def outputs(self) -> dict[str, Tensor]:
        """The outputs on the test samples, with the weights after the ``"last"`` and at the ``"selected"`` epoch.

        Despite the file's name, these are a regression's outputs as well.
        """
        return load_file(self.folder / "test_logits.safetensors")


@dataclass(frozen=True)
class RunResult:
    """What is kept of a finished run, besides its weights and its outputs on the test samples.

    Attributes:
        parameters: of its network.
        selected_epoch: whose validation was the best.
        history: what was logged of each epoch.
        made: when and with what.
        diverged: why the run was stopped, if its numbers were not finite; it has no weights and no outputs then.
    """

    parameters: int
    selected_epoch: int
    history: list[dict[str, float]]
    made: str
    diverged: str = ""


def plan(experiment: Experiment, folder: Path) -> list[Run]:
    """All runs in the order they are made: the teachers, then seed by seed every row of the table."""
    config = experiment.config
    epochs = config.teachers.epochs or config.epochs
    teachers = []
    for number in range(1, config.teachers.number + 1):
        name, seed = f"teacher_{number}", _TEACHER_SEED + number
        teachers.append(Run(None, name, seed, seed, epochs, folder / "runs" / name))
    runs = list(teachers)
    for seed in config.seeds:
        students: dict[str, Run] = {}
        for row in experiment.rows:
            own = [students[row.teachers]] if isinstance(row.teachers, str) else teachers[: row.teachers]
            # A student that is taught by one of its kind must not begin with its teacher's initial weights.
            # PyTorch reads the lower 32 bits of a seed.
            initial_seed = (seed + row.stage * _STAGE_STRIDE) % 2**32
            place = folder / "runs" / row.name / f"seed_{seed}"
            initial = None if row.initial is None else students[row.initial]
            students[row.name] = Run(row, row.name, seed, initial_seed, config.epochs, place, tuple(own), initial)
        runs += students.values()
    return runs


def execute(experiment: Experiment, run: Run, on_epoch: OnEpoch) -> None:
    """Train a run, from its last checkpoint if it has one, and evaluate it on the test images.

    Args:
        experiment: builds the networks, the data and the method.
        run: which; its teachers' runs are finished.
        on_epoch: called with the number of finished epochs, after each.
    """
    try:
        module, keeper = _trained(experiment, run, on_epoch)
    except NonFiniteError as error:
        if run.is_teacher:
            raise NonFiniteError(f"{run.title} is to teach the others: {error}") from error
        _write_result(run, RunResult(_size_of(experiment.student()), 0, [], made_with(), diverged=str(error)))
        return
    module.export_student(run.student_file)
    outputs = {"last": _test_outputs(experiment, module)}
    module.student.load_state_dict(load_file(run.folder / "selected.safetensors"))
    outputs["selected"] = _test_outputs(experiment, module)
    write_tensors(run.folder / "test_logits.safetensors", outputs)
    _write_result(run, RunResult(_size_of(module.student), keeper.selected_epoch, keeper.history, made_with()))


def _write_result(run: Run, result: RunResult) -> None:
    write_whole(run.result_file, [json.dumps(asdict(result), indent=1).encode()])
    run.checkpoint.unlink(missing_ok=True)


def _size_of(network: nn.Module) -> int:
    """The number of parameters of a network as it is used at test time."""
    return sum(parameter.numel() for parameter in network.parameters())


def _trained(experiment: Experiment, run: Run, on_epoch: OnEpoch) -> tuple[DistillationModule, RunKeeper]:
    """A run's module after its last epoch, and what its epochs logged.

    Raises:
        NonFiniteError: its numbers, or those of a run that it learns from, were not finite.
    """
    for other in (*run.teachers, run.initial):
        if other is not None and other.result().diverged:
            raise NonFiniteError(f"{other.title}, from which it learns, has no finite numbers")
    run.folder.mkdir(parents=True, exist_ok=True)
    networks = [
        Pretrained(experiment.teacher() if teacher.is_teacher else experiment.student(), teacher.student_file)
        for teacher in run.teachers
    ]
    paraphrasers = None if run.row is None else _paraphrasers(experiment, run, networks)
    torch.manual_seed(run.initial_seed)
    if run.row is None:
        module = experiment.supervised(experiment.teacher())
    else:
        student = experiment.student()
        if run.initial is not None:
            student = Pretrained(student, run.initial.student_file)
        module = experiment.method(run.row, student, networks, paraphrasers)
    task = experiment.task
    keeper = RunKeeper(run.folder, seed=run.seed, monitor=task.monitor, mode=task.mode)
    callbacks = [keeper, EpochCounter(on_epoch), DataWatch(run.title, experiment.splits)]
    trainer = make_trainer(experiment.config, max_epochs=run.epochs, callbacks=callbacks)
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
    return module, keeper


def _paraphrasers(experiment: Experiment, run: Run, teachers: Sequence[nn.Module]) -> list[nn.Module] | None:
    """A row's paraphrasers: trained once for all seeds under the same teachers, or for each seed under a student."""
    row = cast("Row", run.row)
    torch.manual_seed(_TEACHER_SEED)
    module = experiment.paraphrasers(row, teachers)
    if module is None:
        return None
    # The comparison's teachers are the same for all seeds of the row; a student that teaches has the run's own seed.
    place = run.folder.parent if all(teacher.is_teacher for teacher in run.teachers) else run.folder
    file = place / "paraphrasers.safetensors"
    if file.exists():
        module.paraphrasers.load_state_dict(load_file(file))
    else:
        epochs = experiment.config.methods[cast("str", row.method)]["paraphrasers"]["epochs"]
        watch = DataWatch(f"the paraphrasers of {run.name}", experiment.splits)
        trainer = make_trainer(experiment.config, max_epochs=epochs, enable_checkpointing=False, callbacks=[watch])
        trainer.fit(module, datamodule=experiment.data(order_seed=_TEACHER_SEED))
        if trainer.current_epoch < epochs:
            raise KeyboardInterrupt(f"the paraphrasers of {run.name} were interrupted")
        write_tensors(file, module.paraphrasers.state_dict())
    return list(module.paraphrasers)


def load_test_targets(experiment: Experiment) -> tuple[Tensor, Tensor]:
    """The test targets row by row as the runs' outputs, and which of them count.

    Returns:
        Classes ``(R,)``, one for each position of a sequence, or real targets ``(R, d)``; and bool ``(R,)``.
    """
    targets, counted = [], []
    for batch in map(Batch.of, experiment.sample.test_dataloader()):
        target, known = batch.target, batch.counted
        if known is not None and known.ndim == 1:
            # Predictions leave out the samples that do not count.
            target, known = target[known], None
        flat = experiment.task.flat_targets(target)
        targets.append(flat)
        counted.append(torch.ones(len(flat), dtype=torch.bool) if known is None else known.flatten())
    return torch.cat(targets), torch.cat(counted)


def made_with() -> str:
    """The day, and what numbers are made with."""
    return (
        f"{datetime.datetime.now(tz=datetime.UTC).date()}, distill_lightning {distill_lightning.__version__}, "
        f"torch {torch.__version__}, pytorch-lightning {version('pytorch-lightning')}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads, {platform.machine()}"
    )


def _test_outputs(experiment: Experiment, module: DistillationModule) -> Tensor:
    outputs = make_trainer(experiment.config).predict(module, dataloaders=experiment.sample.test_dataloader())
    output = module.output.laid_out(torch.cat(cast("list[Tensor]", outputs)).float().cpu())
    return experiment.task.flat_output(module.output.prediction(output))


def make_trainer(config: CompareConfig, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one device.

    Raises:
        InputError: there is no such accelerator or precision.
    """
    with refusing("accelerator or precision", MisconfigurationException, ValueError):
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            precision=config.precision,  # type: ignore[arg-type]  # the Trainer itself checks it
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
    write_checkpoints_whole(trainer)
    return trainer
