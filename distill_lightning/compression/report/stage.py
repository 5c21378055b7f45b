"""One stage of a compression run: what it costs and saves, in plain values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from distill_lightning.compression.costs.latency import NO_SPEED_UP, Latency
from distill_lightning.errors import check_one_of, refusing

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
Runtime = Literal["torch", "onnxruntime", "onnxruntime int8"]
Baseline = Literal["torch", "onnxruntime"]

INT8 = "onnx_int8"
"""The kind of file that has a row of its own once it is scored."""

INT8_RUNTIME: Runtime = "onnxruntime int8"


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
