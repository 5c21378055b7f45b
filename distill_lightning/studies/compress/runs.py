"""The trainings behind a report: the compression itself and its controls, seed by seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import pytorch_lightning as pl
from torch import nn

from distill_lightning.callbacks import CompressionCallback, Measurements
from distill_lightning.callbacks.stages import measure
from distill_lightning.compression.access.calibration import first_samples
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.file.artefact import load_compressed, write_artefact
from distill_lightning.compression.onnx.export import export_onnx
from distill_lightning.compression.onnx.int8 import quantize_onnx
from distill_lightning.compression.report.controls import random_steps, same_size_network
from distill_lightning.compression.report.stage import CONTROL_RANDOM, CONTROL_SCRATCH, FINAL, FINAL_INT8, INT8, Stage
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.run.preview import Preview, preview
from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError, refusing
from distill_lightning.layers import by_position
from distill_lightning.storage.files import write_whole
from distill_lightning.studies.data import DataWatch, OtherDataError, Splits
from distill_lightning.studies.progress import EpochCounter, OnEpoch

RunKind = Literal["compressed", "same_size", "random"]
PACKED, CHECKPOINT, ONNX, ONNX_INT8 = "network.dlpk", "compressed.ckpt", "network.onnx", "network_int8.onnx"


@dataclass(frozen=True)
class Setup:
    """The objects that a configuration describes, all new: a module, its data and a Trainer."""

    model: Any
    data: pl.LightningDataModule
    trainer: pl.Trainer

    @property
    def callback(self) -> CompressionCallback:
        """What compresses: the module's own, or one of the Trainer's.

        Raises:
            InputError: there is none.
        """
        callbacks = [*cast("Any", self.trainer).callbacks, getattr(self.model, "callback", None)]
        found = [callback for callback in callbacks if isinstance(callback, CompressionCallback)]
        if not found or not found[0].steps:
            raise InputError(
                "there is nothing to compress with: give model.steps to a CompressionBaseline, or a "
                "CompressionCallback with steps to trainer.callbacks"
            )
        return found[0]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: the compression, or one of its controls.
        seed: of the initial weights and the order of the data.
        folder: where its files are.
        earlier: for how many epochs the dense network was trained before; ``None``: nobody knows.
        epochs: of its training; ``None``: as the configuration says.
    """

    kind: RunKind
    seed: int
    folder: Path
    earlier: int | None = 0
    epochs: int | None = None

    @property
    def title(self) -> str:
        """For the progress bar."""
        return f"{self.kind.replace('_', ' ')}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether it has left its measurements."""
        return self.stages_file.exists()

    @property
    def stages_file(self) -> Path:
        """Written last: a run with this file is finished."""
        return self.folder / "stages.json"

    def stages(self) -> list[Stage]:
        """What a finished run measured.

        Raises:
            InputError: the file is damaged.
        """
        with refusing(f"{self.stages_file} is damaged: remove it to make the run again", ValueError, TypeError):
            return [Stage.of_plain(plain) for plain in json.loads(self.stages_file.read_text())["stages"]]

    def reason(self) -> str | None:
        """Why a finished control could not be made; ``None``: it could."""
        reason: str | None = json.loads(self.stages_file.read_text())["reason"]
        return reason


def execute(run: Run, make: Callable[..., Setup], splits: Splits, wanted: Measurements, on_epoch: OnEpoch) -> None:
    """Make a run and keep what it measured.

    Args:
        run: which; the compression of its seed is finished before its controls begin.
        make: makes the setup for a seed, a folder and, if the configuration does not say it, a number of epochs.
        splits: fingerprints of the data that it is to be made with.
        wanted: what is measured of every stage.
        on_epoch: called with the number of epochs that are done, after each.
    """
    setup = make(run.seed, run.folder, *([] if run.epochs is None else [run.epochs]))
    callback = setup.callback
    cast("Any", setup.trainer).callbacks.append(EpochCounter(on_epoch))
    if isinstance(setup.data, ViewDataModule):
        # Others may draw their splits anew at every setup.
        cast("Any", setup.trainer).callbacks.append(DataWatch(run.title, splits))
    if getattr(setup.data, "order_seed", run.seed) is None:
        setup.data.order_seed = run.seed  # type: ignore[attr-defined]
    reason = None
    try:
        stages = {"compressed": _compress, "same_size": _train_same_size, "random": _compress_at_random}[run.kind](
            run, setup, callback, wanted
        )
    except InputError as error:
        if run.kind == "compressed" or isinstance(error, OtherDataError):
            raise
        # A control that this network or these steps do not allow; the report gives the reason.
        stages, reason = [], str(error)
    if run.kind != "same_size":
        stages = [replace(stage, earlier=run.earlier) for stage in stages]
    content = json.dumps({"reason": reason, "stages": [stage.as_plain() for stage in stages]})
    write_whole(run.stages_file, [content.encode()])


def _compress(run: Run, setup: Setup, callback: CompressionCallback, wanted: Measurements) -> list[Stage]:
    callback.measurements = wanted
    setup.trainer.fit(setup.model, datamodule=setup.data)
    compressor = cast("Compressor", callback.compressor)
    setup.trainer.save_checkpoint(run.folder / CHECKPOINT, weights_only=True)
    write_artefact(compressor.network, run.folder / PACKED, coding=compressor.piece.coding)
    final = {stage.name: stage for stage in callback.stages}
    if "onnx" in final[FINAL].nbytes:
        network = load_compressed(run.folder / PACKED, copy_network(compressor.dense))
        export_onnx(network, run.folder / ONNX, compressor.piece.example_inputs)
    if FINAL_INT8 in final or INT8 in final[FINAL].nbytes:
        mode = cast("Literal['static', 'dynamic']", wanted.onnx)
        batches = callback.calibration if mode == "static" else None
        quantize_onnx(run.folder / ONNX, run.folder / ONNX_INT8, mode=mode, batches=batches)
    return callback.stages


def _compress_at_random(_: Run, setup: Setup, callback: CompressionCallback, wanted: Measurements) -> list[Stage]:
    callback.steps = random_steps(callback.steps)
    callback.measurements = replace(wanted, onnx="none")
    setup.trainer.fit(setup.model, datamodule=setup.data)
    final = next(stage for stage in callback.stages if stage.name == FINAL)
    return [replace(final, name=CONTROL_RANDOM, kind="control")]


def _train_same_size(run: Run, setup: Setup, callback: CompressionCallback, wanted: Measurements) -> list[Stage]:
    network = cast("nn.Module", getattr(setup.model, callback.attribute))
    dense = copy_network(network)
    checkpoint = run.folder.parent / f"compressed_{run.seed}" / CHECKPOINT
    callback.steps = []
    scoring = _Scoring(callback.attribute, dense, wanted, notes=_shorter(run, setup.trainer.max_epochs))
    cast("Any", setup.trainer).callbacks.append(scoring)
    setup.data.prepare_data()
    setup.data.setup("fit")
    inputs = first_samples(by_position(network, Batch.of(next(iter(setup.data.train_dataloader()))).input), 2)
    # Not the packed file: what quantization has rounded to zero there was not pruned.
    compressed = load_compressed(checkpoint, copy_network(dense), bake=False)
    same_size_network(network, compressed, inputs, seed=run.seed)
    setup.trainer.fit(setup.model, datamodule=setup.data)
    return scoring.stages


def _shorter(run: Run, epochs: int | None) -> list[str]:
    """The note on a control that could not be trained for as long as the dense network was."""
    if run.earlier is not None:
        return []
    return [f"only this run's {epochs} epochs; nobody knows how many the dense network had before it"]


class _Scoring(pl.Callback):
    """Measures a network that was trained and not compressed."""

    def __init__(self, attribute: str, dense: nn.Module, wanted: Measurements, *, notes: Sequence[str]) -> None:
        self.attribute, self.dense, self.wanted, self.notes = attribute, dense, wanted, notes
        self.stages: list[Stage] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure the network beside the dense one."""
        network = getattr(pl_module, self.attribute)
        inputs = by_position(network, Batch.of(next(iter(cast("Any", trainer.train_dataloader)))).input)
        compressor = Compressor(network, [], first_samples(inputs, 2))
        compressor.dense = self.dense
        self.stages = measure(
            trainer, pl_module, compressor, self.wanted, name=CONTROL_SCRATCH, kind="control", notes=self.notes
        )


def preview_of(setup: Setup) -> Preview:
    """What the steps would take out of the network, by the data of the setup; nothing is trained or touched."""
    setup.data.prepare_data()
    setup.data.setup("fit")

    callback = setup.callback
    network = cast("nn.Module", getattr(setup.model, callback.attribute))

    def drawn(count: int) -> list[tuple[Any, Any]]:
        batches = [Batch.of(batch) for batch in islice(setup.data.train_dataloader(), count)]
        return [(by_position(network, batch.input), batch.target) for batch in batches]

    inputs = first_samples(drawn(1)[0][0], 1)
    return preview(network, callback.steps, inputs, batches=lambda: drawn(callback.calibration_batches))


def plan(
    folder: Path, seeds: Sequence[int], controls: Sequence[RunKind], *, earlier: int | None = 0, epochs: int = 0
) -> list[Run]:
    """All runs in the order they are made.

    Args:
        folder: of the study.
        seeds: each with every run.
        controls: beside the compression.
        earlier: for how many epochs the dense network was trained before; the control of the same size gets as many
            more than the configuration says. ``None``: nobody knows, and it does not.
        epochs: that the configuration says.
    """
    kinds: list[RunKind] = ["compressed", *controls]
    longer = {"same_size": epochs + earlier} if earlier else {}
    return [
        Run(kind, seed, folder / "runs" / f"{kind}_{seed}", earlier, longer.get(kind))
        for seed in seeds
        for kind in kinds
    ]
