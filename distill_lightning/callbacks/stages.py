"""Measurements of a network before, between and after the steps of its compression."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import each_tensor
from distill_lightning.compression.access.computed import fewest_bits
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.costs.latency import MIN_ROUNDS
from distill_lightning.compression.file.artefact import load_compressed, write_artefact
from distill_lightning.compression.onnx.session import NetworkInOnnx, OnnxNetwork
from distill_lightning.compression.report.details import details_of
from distill_lightning.compression.report.measure_stage import INT8_FILE, Onnx, measure_stage
from distill_lightning.compression.report.stage import INT8, SEE, Stage, StageKind
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import TrainersBatches, epochs_in, undrawn, validation_loaders
from distill_lightning.networks.provenance import weights_from
from distill_lightning.networks.weights import read_content


@dataclass(frozen=True)
class Measurements:
    """The measurements of each stage of a compression.

    Args:
        split: the samples that are scored: ``"test"``, which needs a data module, or ``"val"``.
        batch_sizes: batch sizes at which time is measured, dense and compressed in turns; empty for no measurement.
        rounds: number of turns, at least 50.
        onnx: ``"float"`` or, with int8 versions, ``"static"`` (convolutions) or ``"dynamic"`` (recurrent networks and
            Transformers): ONNX files of the dense and of the final network, with their time in ONNX Runtime. An int8
            version has a row of its own, with the scores of that file.

    Raises:
        InputError: a value is not one of these.
    """

    split: Literal["test", "val"] = "test"
    batch_sizes: Sequence[int] = (1, 32)
    rounds: int = 50
    onnx: Onnx = "none"

    def __post_init__(self) -> None:
        for name, value, known in (("split", self.split, ("test", "val")), ("onnx", self.onnx, get_args(Onnx))):
            if value not in known:
                raise InputError(f"Measurements: {name} must be one of {', '.join(known)}, got {value!r}")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in self.batch_sizes):
            raise InputError(
                f"Measurements: batch_sizes must be integers of at least 1, got {list(self.batch_sizes)}: give [] to "
                "measure no time"
            )
        if self.rounds < MIN_ROUNDS:
            raise InputError(f"Measurements: rounds must be at least {MIN_ROUNDS}, got {self.rounds}")


def measure(
    trainer: pl.Trainer,
    pl_module: Any,
    compressor: Compressor,
    wanted: Measurements,
    *,
    name: str,
    kind: StageKind,
    final: bool = False,
    timed_as: str | None = None,
    notes: Sequence[str] = (),
    sparsity: Mapping[str, Sequence[float]] | None = None,
    attribute: str = "student",
    earlier: int | None = 0,
) -> list[Stage]:
    """Score and measure a network as it is now; random states and the Trainer's data are left as they were.

    Args:
        trainer: the Trainer of the current training.
        pl_module: the `DistillationModule` whose student is scored.
        compressor: the compressor of the network.
        wanted: the measurements to make.
        name: name of the row.
        kind: kind of the row.
        final: whether it is the final network, for which ONNX files are made as for the dense one.
        timed_as: the row whose time is measured instead, because this one has the same structure.
        notes: notes on the row.
        sparsity: share of zeros of each pruned weight after each epoch, for the final network's figures.
        attribute: the module's network.
        earlier: for how many epochs it had been trained before this run; ``None``: nobody knows.

    Returns:
        The stage and, where an int8 ONNX file was made, the row of that.
    """
    with isolate_rng(), tempfile.TemporaryDirectory() as temporary:
        scores = pl_module.score(_scored_batches(trainer, pl_module, wanted.split))
        network, dense = (copy_network(one).cpu() for one in (compressor.network, compressor.dense))
        onnx = wanted.onnx if final or kind == "dense" else "none"
        inputs = on_cpu(compressor.piece.example_inputs)
        batches = compressor.piece.batches("ONNX") if onnx == "static" else ()
        compressor.piece.forget_batches()
        stage = measure_stage(
            name,
            network,
            dense,
            inputs,
            kind=kind,
            scores=scores,
            write=lambda network, path: write_artefact(network, path, coding=compressor.piece.coding),
            read=lambda path: load_compressed(path, copy_network(dense)),
            batch_sizes=wanted.batch_sizes if timed_as is None else (),
            rounds=wanted.rounds,
            onnx=onnx,
            calibration=[on_cpu(given) for given, _ in batches],
            weight_bits=fewest_bits(network),
            notes=notes,
            folder=Path(temporary),
        )
        if final:
            stage.details.update(details_of(network, compressor.piece, sparsity or {}))
        if timed_as is not None:
            stage.missing["latency"] = f"{SEE}{timed_as}"
        stage = replace(stage, epochs=trainer.current_epoch, earlier=earlier)
        if INT8 not in stage.nbytes:
            return [stage]
        in_onnx = NetworkInOnnx(OnnxNetwork(Path(temporary, INT8_FILE)), network, inputs)
        try:
            with _standing_in(pl_module, attribute, in_onnx):
                scores = pl_module.score(_scored_batches(trainer, pl_module, wanted.split))
        except InputError as error:
            # Such as sequences of another length than the file was made for; the reason stands in the report.
            stage.missing["score in int8"] = str(error)
            return [stage]
    return [stage.without_int8(), stage.in_int8(scores)]


@contextmanager
def _standing_in(pl_module: Any, attribute: str, network: nn.Module) -> Iterator[None]:
    """Have a module score another network in the place of its own."""
    own = getattr(pl_module, attribute)
    setattr(pl_module, attribute, network)
    try:
        yield
    finally:
        setattr(pl_module, attribute, own)


def trained_before(network: nn.Module) -> int | None:
    """For how many epochs a network was trained before it was loaded, by the checkpoint that `Pretrained` has read.

    ``None``: nobody knows. It was not `Pretrained`, or no Trainer wrote the file.
    """
    files = [Path(file) for file in weights_from(network)]
    told = [epochs_in(read_content(file)) if file.is_file() else None for file in files]
    known = [count for count in told if count is not None]
    return max(known) if known and len(known) == len(told) else None


def check_scored(trainer: Any, pl_module: Any, split: str) -> None:
    """Refuse early what could not be scored later.

    Raises:
        InputError: the module cannot score itself, or there are no such samples.
    """
    if not hasattr(pl_module, "score"):
        raise InputError(f"{type(pl_module).__name__} cannot score itself for a report: leave report out")
    if split == "test" and trainer.datamodule is None:
        raise InputError("a report on test samples needs a data module: give one, or split='val'")
    if split == "val" and not trainer.enable_validation:
        raise InputError("a report with split='val' needs validation batches: give them (limit_val_batches), or 'test'")


def _scored_batches(trainer: Any, pl_module: Any, split: str) -> Iterable[Any]:
    if split == "test":
        trainer.datamodule.setup("test")
        loaders = trainer.datamodule.test_dataloader()
    else:
        loaders = validation_loaders(trainer)
    for number, loader in enumerate(loaders if isinstance(loaders, (list, tuple)) else [loaders]):
        own = TrainersBatches(trainer, pl_module, loader, number=number, training=False)
        with undrawn(loader):
            yield from own


def on_cpu(values: Any) -> Any:
    """A network's inputs on the CPU."""
    return each_tensor(Tensor.cpu, values)
