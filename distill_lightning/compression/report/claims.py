"""What may be said about a compressed network, from what was measured of it."""

from __future__ import annotations

from distill_lightning.compression.costs.latency import NO_SPEED_UP
from distill_lightning.compression.report.cells import RUNTIMES, as_interval, as_ratio, title_of
from distill_lightning.compression.report.stage import INT8, LatencyRow, Stage
from distill_lightning.errors import in_a_line


def claim_of(dense: Stage, stage: Stage) -> str:
    """What may be said about a stage, in one sentence that follows only from its measurements."""
    if stage.kind == "dense":
        return "the baseline"
    key, before, size = file_of(dense, stage)
    measured = [row for row in stage.latency if row.is_alike]
    faster = [row for row in measured if row.faster]
    parts = []
    if size is not None:
        told = f"{as_ratio(size)} of the {title_of(before)}"
        parts.append(f"int8: {told}" if key == INT8 else told if size < 1 else f"no smaller ({told})")
    parts += [_said(row) for row in measured if row.runtime in ("torch", "onnxruntime")]
    if key != INT8 and INT8 in stage.nbytes and "onnx" in dense.nbytes:
        parts.append(f"int8: {as_ratio(stage.nbytes[INT8] / dense.nbytes['onnx'])} of the {title_of('onnx')}")
    parts += [_said(row) for row in measured if row.runtime == "onnxruntime int8"]
    if size is None:
        parts.insert(0, f"file not measured: {in_a_line(stage.missing.get('artefact', 'not asked for'))}")
    if not measured:
        parts.append(f"time not measured: {in_a_line(stage.missing.get('latency', 'not asked for'))}")
    sentence = "; ".join(parts)
    if stage.weight_bits is not None and stage.weight_bits < 8:
        saves = "they save storage only" if faster else "storage only"
        sentence += f"; no kernel here uses {stage.weight_bits}-bit weights: {saves}"
    elif measured and not faster and size is not None and size < 1:
        sentence = f"storage only: {sentence}"
    return sentence


def file_of(dense: Stage, stage: Stage) -> tuple[str, str, float | None]:
    """A stage's kind of file (the artefact if possible), that of dense which it is held against, and their ratio."""
    # A row of an int8 file has no other one, and dense is always in float.
    pairs = (("artefact", "artefact"), ("state_dict", "state_dict"), (INT8, "onnx"))
    for key, before in pairs:
        if key in stage.nbytes and before in dense.nbytes:
            return key, before, stage.nbytes[key] / dense.nbytes[before]
    return "artefact", "artefact", None


def _said(row: LatencyRow) -> str:
    place = f"at batch {row.batch}" + ("" if row.runtime == "torch" else f" in {RUNTIMES[row.runtime]}")
    if row.faster:
        return f"{as_interval(row)} of the time {place}"
    return f"slower {place}: {as_interval(row)}" if row.slower else f"{NO_SPEED_UP} {place} ({as_interval(row)})"
