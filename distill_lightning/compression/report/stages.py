"""The measured costs and savings of one stage of a compression run, in plain values."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.calibration import calibrating, inputs_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.costs.latency import NO_SPEED_UP, Latency, compare_latency
from distill_lightning.compression.costs.macs import Macs, count_macs
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.report.measure import measure_file, scale_of
from distill_lightning.compression.report.onnx import (
    TOLERANCE,
    OnnxNetwork,
    at_batch,
    check_batch,
    export_onnx,
    onnx_latency,
    outputs_of,
    quantize_onnx,
    tensors_of,
)
from distill_lightning.errors import InputError, check_one_of, refusing
from distill_lightning.layers import eval_mode
from distill_lightning.networks.weights import load_strictly, read_weights, write_weights

DENSE = "dense"
FINAL = "final"
IN_INT8 = ", int8 ONNX"
"""The end of the name of an int8 file's own row."""
DENSE_INT8, FINAL_INT8 = DENSE + IN_INT8, FINAL + IN_INT8
CONTROL_SCRATCH = "control: same size from scratch"
CONTROL_RANDOM = "control: random criterion"

SEE = "see "
"""The beginning of a reason that refers to the row with the measurement."""

MARGIN = 0.02
"""A margin for ratios of times: two equal networks differ by up to a hundredth, because one always runs second."""

StageKind = Literal["dense", "before", "after", "control"]
Onnx = Literal["none", "float", "static", "dynamic"]
Runtime = Literal["torch", "onnxruntime", "onnxruntime int8"]
Baseline = Literal["torch", "onnxruntime"]
Write = Callable[[nn.Module, Path], object]
"""A function that writes a network's artefact to a path."""
Read = Callable[[Path], nn.Module]
"""A function that loads an artefact as a plain network, which shares nothing with the one that was written."""

INT8 = "onnx_int8"
"""The kind of file that has a row of its own once it is scored."""
INT8_RUNTIME: Runtime = "onnxruntime int8"
INT8_FILE = "int8.onnx"
"""Its name in the folder of `measure_stage`."""

_ONNX_FILES: dict[str, tuple[str, Runtime]] = {
    "onnx": ("float.onnx", "onnxruntime"),
    INT8: (INT8_FILE, INT8_RUNTIME),
}


@dataclass(frozen=True)
class LatencyRow:
    """The times of a compressed network and the dense one, measured in turns, in milliseconds per forward pass.

    Args:
        batch: samples in a forward pass.
        runtime: the runtime of the compressed network; ``"onnxruntime int8"`` runs its int8 version.
        baseline: the runtime of the dense network; if it is not ``runtime``, the ratio includes what that saves or
            costs.
        dense_ms: median processor time of the dense network.
        compressed_ms: median processor time of the compressed network.
        ratio: ratio of these medians, compressed to dense.
        low: lower end of the ratio's 95 % interval.
        high: upper end of that interval.
        wall_ratio: the ratio of the times on the clock.
        wall_low: lower end of its interval.
        wall_high: upper end of its interval.
        claim: what may be said about it.
        dense_rounds: processor times of the dense network, one per turn.
        compressed_rounds: processor times of the compressed network, one per turn.
    """

    batch: int
    runtime: Runtime
    baseline: Baseline
    dense_ms: float
    compressed_ms: float
    ratio: float
    low: float
    high: float
    wall_ratio: float
    wall_low: float
    wall_high: float
    claim: str
    dense_rounds: list[float] = field(default_factory=list)
    compressed_rounds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, latency: Latency, *, batch: int, runtime: Runtime, baseline: Baseline) -> LatencyRow:
        """Make a row of a measurement by thread time.

        Args:
            latency: the measurement.
            batch: samples in a forward pass.
            runtime: the runtime of the compressed network.
            baseline: the runtime of the dense network.
        """
        dense, compressed = ([1000 * value for value in times] for times in (latency.dense, latency.compressed))
        row = cls(
            batch, runtime, baseline, statistics.median(dense), statistics.median(compressed),
            *latency.ratio, *latency.wall_ratio, latency.claim, dense, compressed,
        )  # fmt: skip
        if row.faster or row.slower:
            return row
        return replace(row, claim=f"{NO_SPEED_UP} ({row.ratio:.2f}, 95 % interval {row.low:.2f} to {row.high:.2f})")

    @property
    def is_alike(self) -> bool:
        """Whether the same runtime ran both networks, so that no saving comes from the runtime."""
        return self.runtime.removesuffix(" int8") == self.baseline

    @property
    def faster(self) -> bool:
        """Whether the whole interval is below 1, by more than `MARGIN`."""
        return self.high < 1 - MARGIN

    @property
    def slower(self) -> bool:
        """Whether the whole interval is above 1, by more than `MARGIN`."""
        return self.low > 1 + MARGIN


@dataclass(frozen=True)
class Stage:
    """One row of a compression run: scores and measurements of the network at one moment.

    Args:
        name: name of the row: "dense", "1 PruneWeights", "final", "control: random criterion" and so on.
        kind: "dense", "before" fine-tuning, "after" it, or "control".
        scores: scores by metric.
        parameters: number of stored parameters; tied ones count once.
        nonzero: number of those that are not zero.
        macs: multiply-accumulates of one sample, as `distill_lightning.compression.costs.macs.DEFINITION` counts them.
        effective_macs: those whose weight is not zero; a theoretical number.
        uncounted: layers whose multiply-accumulates could not be counted.
        nbytes: bytes by kind of file, each written and read again with equal outputs: "state_dict", "artefact",
            "artefact_deflated", "onnx", "onnx_int8".
        differences: the largest absolute difference of an output after reading each file again.
        latency: against the dense network.
        notes: what a reader has to know about this row.
        missing: the reason for each measurement that is missing ("artefact", "latency" and so on).
        weight_bits: bits of the smallest weights that are stored; ``None`` if all are floats.
        details: what figures show of single layers, see `details_of`.
        epochs: for how many epochs of this run it had been trained; ``None``: it was not noted.
        earlier: for how many epochs it had been trained before this run; ``None``: nobody knows.
    """

    name: str
    kind: StageKind
    scores: dict[str, float]
    parameters: int
    nonzero: int
    macs: int
    effective_macs: int
    uncounted: list[str] = field(default_factory=list)
    nbytes: dict[str, int] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    latency: list[LatencyRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    weight_bits: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    earlier: int | None = 0

    def __post_init__(self) -> None:
        check_one_of(f"stage {self.name!r}: kind", self.kind, get_args(StageKind))

    def as_plain(self) -> dict[str, Any]:
        """The stage as str, int, float, list and dict (and ``None``), which ``torch.load(weights_only=True)`` reads."""
        return asdict(self)

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Stage:
        """Restore a stage from what `as_plain` returned.

        Raises:
            InputError: the values are not those of a stage.
        """
        with refusing(f"stage {plain.get('name')!r} was not written by this version", TypeError):
            stage = cls(**plain)
            return replace(stage, latency=[LatencyRow(**row) for row in plain.get("latency", [])])

    def without_int8(self) -> Stage:
        """What is left for the float network's row when its int8 file has one of its own."""
        return replace(
            self,
            nbytes={what: size for what, size in self.nbytes.items() if what != INT8},
            differences={what: gap for what, gap in self.differences.items() if what != INT8},
            latency=[row for row in self.latency if row.runtime != INT8_RUNTIME],
            missing={what: reason for what, reason in self.missing.items() if what != f"{INT8} latency"},
        )

    def in_int8(self, scores: Mapping[str, float]) -> Stage:
        """The row of its int8 ONNX file.

        Args:
            scores: of that file in ONNX Runtime, by metric, on the samples of this row's own scores.
        """
        reason = self.missing.get(f"{INT8} latency", self.missing.get("latency", "not asked for"))
        latency = [row for row in self.latency if row.runtime == INT8_RUNTIME]
        return replace(
            self,
            name=self.name + IN_INT8,
            kind="after",
            scores=dict(scores),
            nbytes={INT8: self.nbytes[INT8]},
            differences={INT8: self.differences[INT8]},
            latency=latency,
            notes=[f"parameters, zeros and MACs are those of {self.name!r}, from which ONNX Runtime made it"],
            missing={} if latency else {"latency": reason},
            weight_bits=8,
            details={},
        )


def measure_stage(
    name: str,
    network: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    *,
    kind: StageKind,
    scores: Mapping[str, float],
    write: Write | None = None,
    read: Read | None = None,
    tolerance: float = 0.0,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 50,
    onnx: Onnx = "none",
    calibration: Iterable[Any] | None = None,
    weight_bits: int | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
    folder: Path | None = None,
) -> Stage:
    """Measure one stage: parameters, multiply-accumulates, files (which are read again) and time.

    Everything is measured on the network that ``read`` returns, which is what a user would run: it has no quantizers
    for training. Both networks are left as they were. What cannot be measured is in the stage's ``missing``, with the
    reason; this stops nothing else.

    Args:
        name: name of the row.
        network: the network at this stage, on the CPU.
        dense: the network before compression, on the CPU.
        example_inputs: a tensor, or a tuple of arguments, each with the batch as its first dimension; the samples are
            repeated to reach the batch sizes.
        kind: kind of the row.
        scores: scores of this network on the test data, by metric.
        write: writes the network's artefact to a path; ``None`` for no artefact.
        read: loads the artefact as a plain network, which shares nothing with the one that was written.
        tolerance: the largest difference of an output after reading the artefact; 0: bit-equal.
        batch_sizes: batch sizes at which time is measured; none for a stage with the structure of another one.
        rounds: number of turns, at least 50.
        onnx: ``"float"``: an ONNX file, too; ``"static"`` or ``"dynamic"``: also its int8 version, by that mode of
            `distill_lightning.compression.report.onnx.quantize_onnx`, and the time of both in ONNX Runtime, each
            against the dense network in float32.
        calibration: inputs from the training set for ``onnx="static"``.
        weight_bits: bits of the smallest weights in the artefact; ``None`` if all are floats.
        notes: notes on the row.
        seed: seed of the bootstrap.
        folder: an empty folder in which the files are left; ``None``: they are not kept.

    Raises:
        InputError: a network is not on the CPU, or an argument is invalid for every stage.
    """
    for given in (network, dense):
        if any(parameter.device.type != "cpu" for parameter in given.parameters()):
            raise InputError(f"stage {name!r}: time and files are measured on the CPU: move the networks with .cpu()")
    if (write is None) != (read is None):
        raise InputError(f"stage {name!r}: give write and read, or neither")
    check_one_of(f"stage {name!r}: onnx", onnx, get_args(Onnx))
    measuring = _Measuring(network, dense, example_inputs, rounds=rounds, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if folder is None else folder
        measuring.files(folder, write, read, tolerance)
        with measuring.reporting("macs"):
            measuring.macs = count_macs(measuring.plain, measuring.at_batch(1))
        if onnx != "none":
            with measuring.reporting("onnx"):
                measuring.onnx(folder, onnx, calibration)
        if kind != "dense":
            if not batch_sizes:
                measuring.missing["latency"] = "not asked for"
            for size in batch_sizes:
                with measuring.reporting("latency"):
                    measuring.torch_latency(size)
                for what in [what for what in _ONNX_FILES if what in measuring.nbytes]:
                    with measuring.reporting(f"{what} latency"):
                        measuring.onnx_latency(folder, size, what)
    parameters, macs = count_parameters(measuring.plain), measuring.macs
    return Stage(
        name=name,
        kind=kind,
        scores=dict(scores),
        parameters=parameters.stored,
        nonzero=parameters.nonzero,
        macs=macs.dense if macs else 0,
        effective_macs=macs.effective if macs else 0,
        uncounted=list(macs.uncounted) if macs else [],
        nbytes=measuring.nbytes,
        differences=measuring.differences,
        latency=measuring.latency,
        notes=list(notes),
        missing=measuring.missing,
        weight_bits=weight_bits,
    )


class _Measuring:
    """The measurements of a stage so far."""

    def __init__(self, network: nn.Module, dense: nn.Module, example_inputs: Any, *, rounds: int, seed: int) -> None:
        self.network, self.dense, self.example_inputs = network, dense, example_inputs
        self.rounds, self.seed = rounds, seed
        # The network in the artefact, or the network itself if there is none.
        self.plain = network
        self.macs: Macs | None = None
        self.nbytes: dict[str, int] = {}
        self.differences: dict[str, float] = {}
        self.latency: list[LatencyRow] = []
        self.missing: dict[str, str] = {}

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """If something cannot be measured, keep the reason in place of the measurement."""
        try:
            yield
        except InputError as error:
            self.missing[what] = str(error)

    def at_batch(self, size: int) -> Any:
        """The example inputs at a batch size, with which both networks have to run."""
        inputs = at_batch(self.example_inputs, size)
        for network in (self.dense, self.plain):
            check_batch(network, self.example_inputs, inputs, "so nothing is measured at that size")
        return inputs

    def _measure(self, what: str, path: Path, **options: Any) -> None:
        size = measure_file(path, **options)
        self.nbytes[what], self.differences[what] = size.size, size.difference
        if what == "artefact":
            self.nbytes["artefact_deflated"] = size.deflated

    def _expected(self, network: nn.Module) -> Any:
        with torch.inference_mode():
            return network(*inputs_of(self.example_inputs))

    def files(self, folder: Path, write: Write | None, read: Read | None, tolerance: float) -> None:
        """Measure the artefact and the state dict."""
        # Both sides compute in the same way: without the Transformer's fast path, which rounds differently.
        with calibrating(self.network):
            if write is None or read is None:
                self.missing["artefact"] = "not asked for"
            else:
                with self.reporting("artefact"):
                    self.plain = self._artefact(folder / "artefact", write, read, tolerance)
            if any(parametrize.is_parametrized(module) for module in self.plain.modules()):
                self.missing["state_dict"] = "the network is parametrized, and there is no artefact with a plain one"
                return
            with self.reporting("state_dict"):
                self._measure(
                    "state_dict",
                    folder / "state_dict.pt",
                    write=lambda path: write_weights(self.plain, path),
                    read=lambda path: _loaded(self.plain, path),
                    expected=self._expected(self.plain),
                    example_inputs=self.example_inputs,
                )

    def _artefact(self, path: Path, write: Write, read: Read, tolerance: float) -> nn.Module:
        kept: list[nn.Module] = []

        def reading(path: Path) -> nn.Module:
            # The network is needed afterwards, outside inference mode.
            with torch.inference_mode(mode=False):
                kept.append(read(path).eval())
            return kept[-1]

        self._measure(
            "artefact",
            path,
            write=lambda path: write(self.network, path),
            read=reading,
            expected=self._expected(self.network),
            example_inputs=self.example_inputs,
            tolerance=tolerance,
        )
        return kept[-1]

    def onnx(self, folder: Path, onnx: Onnx, calibration: Iterable[Any] | None) -> None:
        """Measure the ONNX file in float32 and, if asked for, in int8."""
        with calibrating(self.plain):
            outputs = outputs_of(self._expected(self.plain))
        # Flat, as ONNX Runtime returns them.
        expected = outputs[0] if len(outputs) == 1 else outputs
        options = {"expected": expected, "example_inputs": tensors_of(self.example_inputs), "read": OnnxNetwork}
        exact = folder / _ONNX_FILES["onnx"][0]
        self._measure(
            "onnx",
            exact,
            write=lambda path: export_onnx(self.plain, path, self.example_inputs),
            tolerance=TOLERANCE * scale_of(outputs),
            **options,
        )
        if onnx == "float":
            return
        mode: Literal["static", "dynamic"] = "static" if onnx == "static" else "dynamic"
        with self.reporting(INT8):
            self._measure(
                INT8,
                folder / INT8_FILE,
                write=lambda path: quantize_onnx(
                    exact, path, mode=mode, batches=calibration if mode == "static" else None
                ),
                # int8 rounds on purpose; the difference shows how much.
                tolerance=math.inf,
                **options,
            )

    def torch_latency(self, size: int) -> None:
        """Measure both networks in PyTorch, with the fast paths that a user would get."""
        arguments = inputs_of(self.at_batch(size))
        with eval_mode(self.dense, self.plain):
            latency = compare_latency(
                lambda: self.dense(*arguments), lambda: self.plain(*arguments), rounds=self.rounds, seed=self.seed
            )
        self.latency.append(LatencyRow.of(latency, batch=size, runtime="torch", baseline="torch"))

    def onnx_latency(self, folder: Path, size: int, what: str) -> None:
        """Measure an ONNX file against the dense network in float32, in ONNX Runtime and in PyTorch."""
        file, runtime = _ONNX_FILES[what]
        baseline = folder / "dense.onnx"
        if not baseline.exists():
            export_onnx(self.dense, baseline, self.example_inputs)
        inputs = self.at_batch(size)
        found = onnx_latency(folder / file, baseline, self.dense, inputs, rounds=self.rounds, seed=self.seed)
        for other, latency in found.items():
            self.latency.append(LatencyRow.of(latency, batch=size, runtime=runtime, baseline=other))


def _loaded(like: nn.Module, path: Path) -> nn.Module:
    # Attention with inference tensors is computed and rounded differently than with parameters.
    with torch.inference_mode(mode=False):
        network = copy_network(like)
    with torch.no_grad():
        # Values that the file lacks must not come from the copy.
        for tensor in network.state_dict().values():
            tensor.zero_()
    load_strictly(network, read_weights(path), source=str(path))
    return network.eval()
