"""Training the runs of a comparison, each at most once."""

from __future__ import annotations

import datetime
import json
import platform
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
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
from distill_lightning.lightning_internals import epochs_in
from distill_lightning.modules import DistillationModule
from distill_lightning.networks import Pretrained
from distill_lightning.networks.weights import read_checkpoint
from distill_lightning.storage import write_tensors, write_whole
from distill_lightning.studies.compare.claims import claimed
from distill_lightning.studies.compare.config import CompareConfig
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.foreign import LossGuard, SubjectKeeper
from distill_lightning.studies.compare.foreign_data import Prepared
from distill_lightning.studies.compare.memory import PeakMemory
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import Row
from distill_lightning.studies.compare.runs import TEACHER_SEED, Run, RunResult, seed_in_set
from distill_lightning.studies.compare.scored_task import ScoredTask
from distill_lightning.studies.compare.search import options_of
from distill_lightning.studies.compare.specs import set_up
from distill_lightning.studies.compare.subject import Judge, Subject
from distill_lightning.studies.data import DataWatch, OtherDataError, differences_of, splits_of
from distill_lightning.studies.progress import EpochCounter, OnEpoch
from distill_lightning.teachers.recorder import record

IN_EPOCH = "in epoch"
BESIDE = "beside"
"""In a run's history: whether another one was made on the machine in this epoch."""


def execute(experiment: Experiment, run: Run, on_epoch: OnEpoch, is_beside: Callable[[], bool] = lambda: False) -> None:
    """Train a run, from its last checkpoint if it has one, and evaluate it on the test samples.

    Args:
        experiment: builds the networks, the data and the method.
        run: which; the runs that it learns from have scores.
        on_epoch: called with the number of finished epochs, after each.
        is_beside: whether other runs were made on this machine since it was asked last.

    Raises:
        NonFiniteError: its numbers were not finite.
    """
    if run.is_given:
        _evaluate_given(experiment, run)
        return
    if run.makes_store:
        _write_result(run, _filled(experiment, run, on_epoch))
        return
    memory = PeakMemory()
    subject, keeper = _trained(experiment, run, on_epoch, is_beside, memory)
    scores: dict[str, dict[str, float]] = {}
    if run.makes_backbone:
        cast("DistillationModule", subject.module).export_backbone(run.backbone_file)
    else:
        subject.export(run.student_file)
        # What is chosen by a search must not have seen them.
        scores = {} if run.in_search else _tested(experiment, run, subject, keeper)
    size = _size_of(subject.kept)
    signatures = dict(getattr(subject.module, "signatures", {}))
    history = keeper.history
    shared = any(line.get(BESIDE) for line in history)
    _write_result(
        run,
        RunResult(
            size, keeper.selected_epoch, history, made_with(), "", scores, signatures,
            shared=shared, peak_memory=memory.bytes,
        ),
    )  # fmt: skip


def _evaluate_given(experiment: Experiment, run: Run) -> None:
    """Keep the weights of a teacher that is trained already, and its outputs on the test samples."""
    run.folder.mkdir(parents=True, exist_ok=True)
    network = experiment.teacher(run.number)
    subject = experiment.subject(None, experiment.supervised(network), network)
    subject.export(run.student_file)
    outputs = _test_outputs(experiment, subject)
    # safetensors refuses tensors that share their memory.
    write_tensors(run.folder / "test_logits.safetensors", {"last": outputs, "selected": outputs.clone()})
    _write_result(run, RunResult(_size_of(subject.kept), 0, [], made_with()))


def _tested(experiment: Experiment, run: Run, subject: Subject, keeper: RunKeeper) -> dict[str, dict[str, float]]:
    """What a run scored on the test samples; where that is computed from outputs, these are kept instead."""
    if isinstance(experiment.task, ScoredTask):
        return _scores(experiment, experiment.task, run, subject, keeper)
    outputs = {"last": _test_outputs(experiment, subject)}
    subject.evaluated.load_state_dict(load_file(run.folder / "selected.safetensors"))
    outputs["selected"] = _test_outputs(experiment, subject)
    write_tensors(run.folder / "test_logits.safetensors", outputs)
    return {}


def leave_none(experiment: Experiment, run: Run, *, diverged: str = "", failed: str = "") -> None:
    """Leave a result that says why a run has no scores."""
    size = _size_of(experiment.student())
    _write_result(run, RunResult(size, 0, [], made_with(), diverged=diverged, failed=failed))


def _scores(
    experiment: Experiment, task: ScoredTask, run: Run, subject: Subject, keeper: RunKeeper
) -> dict[str, dict[str, float]]:
    """What a test logs with the weights after the last epoch, and with those of the selected one."""

    def tested() -> dict[str, float]:
        # With the data module: that is where a module looks for how tokens are read, and classes called.
        trainer = make_trainer(experiment.config)
        trainer.test(subject.module, datamodule=experiment.sample, verbose=False)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return task.scores_of(type(subject.module).__name__, logged)

    last = tested()
    if keeper.selected_epoch == run.epochs:
        return {"last": last, "selected": last}
    subject.evaluated.load_state_dict(load_file(run.folder / "selected.safetensors"))
    return {"last": last, "selected": tested()}


def _write_result(run: Run, result: RunResult) -> None:
    write_whole(run.result_file, [json.dumps(asdict(result), indent=1).encode()])
    run.checkpoint.unlink(missing_ok=True)


def _size_of(network: nn.Module) -> int:
    """The number of parameters of a network as it is used at test time."""
    return sum(parameter.numel() for parameter in network.parameters())


def _trained(
    experiment: Experiment, run: Run, on_epoch: OnEpoch, is_beside: Callable[[], bool], memory: PeakMemory
) -> tuple[Subject, RunKeeper]:
    """A run's module, by what it is evaluated with, after its last epoch, and what its epochs logged."""
    run.folder.mkdir(parents=True, exist_ok=True)
    options = options_of(run, experiment.task)
    if run.row is not None and options:
        experiment = experiment.with_options(run.row, options)
    networks = _networks(experiment, run)
    paraphrasers = None if run.row is None else _paraphrasers(experiment, run, networks)
    torch.manual_seed(run.initial_seed)
    subject = _subject(experiment, run, networks, paraphrasers)
    # Without it, the teachers that there are say the same beside the student.
    if run.store is not None and not run.store.result().without_scores:
        experiment.storage.read_by(run.store.folder, subject.module, run.name)
    source = experiment.backbones[run.makes_backbone] if run.makes_backbone else experiment
    task = source.task
    keeper = SubjectKeeper(
        run.folder, seed=run.order_seed, task=task, subject=subject, note=lambda: {BESIDE: is_beside()}
    )
    callbacks = [keeper, EpochCounter(on_epoch), DataWatch(run.title, source.splits), memory]
    if not subject.is_own:
        callbacks.append(LossGuard())
    trainer = make_trainer(experiment.config, max_epochs=run.epochs, callbacks=callbacks)
    checkpoint, first_epoch = None, 0
    if run.checkpoint.exists():
        checkpoint, first_epoch = str(run.checkpoint), epochs_in(read_checkpoint(run.checkpoint)) or 0
    with warnings.catch_warnings():
        # A run killed between its last checkpoint and its result resumes with nothing left to train.
        warnings.filterwarnings("ignore", message=".*has already.*max_epochs.*")
        # The validation of a module that has none is the keeper's.
        warnings.filterwarnings("ignore", message=".*have no `validation_step`.*")
        for text in source.warned:
            # It was said when the comparison began.
            warnings.filterwarnings("ignore", message=re.escape(text))
        data = source.data(order_seed=run.order_seed, first_epoch=first_epoch)
        if run.row is not None:
            experiment.storage.number(data)
        try:
            trainer.fit(subject.module, datamodule=data, ckpt_path=checkpoint)
        except Exception as error:
            # From 1, as in histories, curves and tables.
            error.add_note(f"{IN_EPOCH} {trainer.current_epoch + 1}")
            raise
    if len(keeper.history) < run.epochs:
        # Lightning may return from an interrupted fit as if it had ended.
        raise KeyboardInterrupt(f"{run.title} was interrupted")
    return subject, keeper


def _networks(experiment: Experiment, run: Run) -> list[nn.Module]:
    """The trained networks of a run's teachers."""
    return [
        Pretrained(
            experiment.teacher(teacher.number) if teacher.is_teacher else experiment.student(), teacher.student_file
        )
        for teacher in run.teachers
    ]


def _filled(experiment: Experiment, run: Run, on_epoch: OnEpoch) -> RunResult:
    """Ask a run's teachers for all that is kept of them, as far as that was not done; and what it took."""
    storage, networks = experiment.storage, _networks(experiment, run)
    row = next(row for row in experiment.rows if row.name in storage.rows)
    with torch.random.fork_rng(devices=[]):
        module = experiment.method(row, experiment.student(), networks[: storage.rows[row.name].teachers])
    storage.filled_by(run.folder, module, networks, experiment.sample.input_shape)
    data = experiment.data(order_seed=0)
    found = differences_of(experiment.splits, splits_of(set_up(data)))
    if found:
        raise OtherDataError(
            f"{run.title} would be filled on other data than the study began with ({'; '.join(found)}): leave the "
            "files as they are"
        )
    data.views = storage.kept_views
    done = record(make_trainer(experiment.config, callbacks=[_Views(storage.kept_views, on_epoch)]), module, data)
    asked = storage.samples * storage.kept_views
    took = {"answers": asked, "seconds": done.seconds / max(done.answers, 1) * asked, "bytes": done.nbytes}
    return RunResult(0, 0, [], made_with(), scores={"store": took})


class _Views(pl.Callback):
    """Reports how many views have been asked about."""

    def __init__(self, views: int, on_epoch: OnEpoch) -> None:
        self.views, self.on_epoch = views, on_epoch

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Report it."""
        self.on_epoch(self.views * (batch_idx + 1) // int(trainer.num_predict_batches[0]))


def _subject(
    experiment: Experiment, run: Run, teachers: Sequence[nn.Module], paraphrasers: Sequence[nn.Module] | None
) -> Subject:
    """A run's module before its training, and what of it is evaluated; the random state is set."""
    if run.makes_backbone:
        return Subject(f"backbones.{run.makes_backbone}", experiment.backbones[run.makes_backbone].module())
    if run.row is None:
        network = experiment.teacher(run.number)
        return experiment.subject(None, experiment.supervised(network), network)
    student = experiment.student(None if run.backbone is None else run.backbone.backbone_file)
    if run.initial is not None:
        student = Pretrained(student, run.initial.student_file)
    return experiment.subject(run.row, experiment.method(run.row, student, teachers, paraphrasers), student)


def _paraphrasers(experiment: Experiment, run: Run, teachers: Sequence[nn.Module]) -> list[nn.Module] | None:
    """A row's paraphrasers: trained once for all seeds under the same teachers, or for each seed under a student."""
    row = cast("Row", run.row)
    seed = seed_in_set(TEACHER_SEED, run.teacher_set)
    torch.manual_seed(seed)
    module = experiment.paraphrasers(row, teachers)
    if module is None:
        return None
    # The comparison's teachers are the same for all seeds of the row; a student that teaches has the run's own seed.
    place = run.folder.parent if all(teacher.is_teacher for teacher in run.teachers) else run.folder
    file = place / "paraphrasers.safetensors"
    # Runs of other seeds may need them at the same time.
    with nullcontext() if place == run.folder else claimed(place):
        if file.exists():
            module.paraphrasers.load_state_dict(load_file(file))
        else:
            epochs = experiment.config.methods[cast("str", row.method)]["paraphrasers"]["epochs"]
            watch = DataWatch(f"the paraphrasers of {run.name}", experiment.splits)
            trainer = make_trainer(experiment.config, max_epochs=epochs, enable_checkpointing=False, callbacks=[watch])
            trainer.fit(module, datamodule=experiment.data(order_seed=seed))
            if trainer.current_epoch < epochs:
                raise KeyboardInterrupt(f"the paraphrasers of {run.name} were interrupted")
            write_tensors(file, module.paraphrasers.state_dict())
    return list(module.paraphrasers)


def load_test_targets(experiment: Experiment) -> tuple[Tensor, Tensor]:
    """The test targets row by row as the runs' outputs, and which of them count.

    Returns:
        Classes ``(R,)``, one for each position of a sequence, or real targets ``(R, d)``; and bool ``(R,)``.
    """
    task = cast("OutputsTask", experiment.task)
    targets, counted = [], []
    for batch in map(Batch.of, experiment.sample.test_dataloader()):
        target, known = batch.target, batch.counted
        if known is not None and known.ndim == 1:
            # Predictions leave out the samples that do not count.
            target, known = target[known], None
        flat = task.flat_targets(target)
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


def _test_outputs(experiment: Experiment, subject: Subject) -> Tensor:
    judge = subject.judge(experiment.sample)
    outputs = make_trainer(experiment.config).predict(judge, datamodule=Prepared(experiment.sample, predicts="test"))
    output = judge.output.laid_out(torch.cat(cast("list[Tensor]", outputs)).float().cpu())
    # A point has no variance, which stands behind it; minus infinity masks a class.
    said = output[..., : judge.num_targets] if isinstance(judge, Judge) else output
    if bool((said.isnan() | said.isposinf()).any()):
        raise NonFiniteError(f"{type(subject.module).__name__}: its network gives nan or inf for test samples")
    return cast("OutputsTask", experiment.task).flat_output(judge.output.prediction(output))


def make_trainer(config: CompareConfig, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one device.

    Raises:
        InputError: there is no such accelerator or precision.
    """
    with refusing("accelerator or precision", MisconfigurationException, ValueError):
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            gradient_clip_val=config.gradient_clip_val,
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
