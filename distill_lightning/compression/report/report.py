"""The report of a compression run: one row for each stage, with a claim that follows from its numbers."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from distill_lightning.compression.costs.latency import NO_SPEED_UP
from distill_lightning.compression.costs.macs import DEFINITION
from distill_lightning.compression.report.details import draw_details
from distill_lightning.compression.report.stages import (
    CONTROL_RANDOM,
    CONTROL_SCRATCH,
    DENSE,
    DENSE_INT8,
    FINAL,
    FINAL_INT8,
    IN_INT8,
    INT8,
    MARGIN,
    SEE,
    LatencyRow,
    Stage,
    measure_stage,
)
from distill_lightning.errors import InputError
from distill_lightning.pages import csv_text, fixed, machine, markdown_table, write_pages
from distill_lightning.plots import plot_latency, plot_pareto

__all__ = [
    "CONTROL_RANDOM", "CONTROL_SCRATCH", "DENSE", "FINAL", "LEGEND", "LatencyRow", "Report", "Stage",
    "circumstances", "claim_of", "measure_stage",
]  # fmt: skip

FILES = {
    "state_dict": "state dict",
    "artefact": "artefact",
    "artefact_deflated": "artefact, deflated",
    "onnx": "ONNX",
    INT8: "ONNX int8",
}
"""Kinds of files and their titles."""

LEGEND = (
    "In brackets: ratio to dense. Time: ratio of medians to dense in the same runtime (dense always in float), taken "
    f"in turns, one thread, with its 95 % interval; {NO_SPEED_UP} where that holds 1 or comes nearer to it than "
    f"{MARGIN}. Bytes: of a file that was written and read again. MACs, of one sample: {DEFINITION}. Effective MACs "
    "leave out weights that are zero: what an ideal kernel would be left with. Epochs: of this run, after those that "
    "the dense network had before it (?: nobody knows how many)."
)
"""What the table's titles mean."""

_NOT_RUN = "not run"
_DRAWN = {DENSE: "dense (float)"}
_RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "onnxruntime int8": "ONNX Runtime int8"}
_PACKAGES = ("distill-lightning", "torchvision", "pytorch-lightning", "onnxruntime", "numpy")


def circumstances() -> dict[str, str | int]:
    """Versions, processor, threads and engine, on which this machine's figures depend. The caller adds the date."""
    return {**machine(*_PACKAGES), "quantized engine": torch.backends.quantized.engine}


def claim_of(dense: Stage, stage: Stage) -> str:
    """What may be said about a stage, in one sentence that follows only from its measurements."""
    if stage.kind == "dense":
        return "the baseline"
    key, before, size = _size(dense, stage)
    measured = [row for row in stage.latency if row.is_alike]
    faster = [row for row in measured if row.faster]
    parts = []
    if size is not None:
        told = f"{_ratio(size)} of the {_title(before)}"
        parts.append(f"int8: {told}" if key == INT8 else told if size < 1 else f"no smaller ({told})")
    parts += [_said(row) for row in measured if row.runtime in ("torch", "onnxruntime")]
    if key != INT8 and INT8 in stage.nbytes and "onnx" in dense.nbytes:
        parts.append(f"int8: {_ratio(stage.nbytes[INT8] / dense.nbytes['onnx'])} of the {_title('onnx')}")
    parts += [_said(row) for row in measured if row.runtime == "onnxruntime int8"]
    if size is None:
        parts.insert(0, f"file not measured: {_one_line(stage.missing.get('artefact', 'not asked for'))}")
    if not measured:
        parts.append(f"time not measured: {_one_line(stage.missing.get('latency', 'not asked for'))}")
    sentence = "; ".join(parts)
    if stage.weight_bits is not None and stage.weight_bits < 8:
        saves = "they save storage only" if faster else "storage only"
        sentence += f"; no kernel here uses {stage.weight_bits}-bit weights: {saves}"
    elif measured and not faster and size is not None and size < 1:
        sentence = f"storage only: {sentence}"
    return sentence


class Report:
    """The stages of a compression run, over its seeds.

    Scores are means over the seeds, differences are taken seed by seed. Sizes and times are the first seed's.

    Args:
        stages_by_seed: by seed, the stages in their order, one of which is called "dense".
        metric: the score that the table shows, in percent if it is an accuracy.
        higher_is_better: whether a higher score is better.
        about: command, date, versions and so on, see `machine`; stands above the table.

    Raises:
        InputError: there is no seed, a seed has no dense stage or two stages of one name, or a stage lacks the metric.
    """

    def __init__(
        self,
        stages_by_seed: Mapping[int, Sequence[Stage]],
        *,
        metric: str = "accuracy",
        higher_is_better: bool = True,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if not stages_by_seed:
            raise InputError("a report needs the stages of at least one seed")
        self.metric, self.higher_is_better = metric, higher_is_better
        self.about = dict(about or {})
        self.seeds: dict[int, dict[str, Stage]] = {}
        for seed, stages in stages_by_seed.items():
            names = [stage.name for stage in stages]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"seed {seed} has two stages {twice!r}: number the steps")
            if DENSE not in names:
                raise InputError(f"seed {seed} has no stage {DENSE!r}: measure the network before its compression")
            without = next((stage.name for stage in stages if metric not in stage.scores), None)
            if without is not None:
                raise InputError(f"stage {without!r} of seed {seed} has no score {metric!r}")
            self.seeds[seed] = {stage.name: stage for stage in stages}
        self.names = self._ordered()

    def _ordered(self) -> list[str]:
        """Dense first, then the steps in their order, the final network and the controls."""
        places = {DENSE: 0, DENSE_INT8: 1, FINAL: 3, FINAL_INT8: 4, CONTROL_SCRATCH: 5, CONTROL_RANDOM: 5}
        kinds = {stage.name: stage.kind for stages in self.seeds.values() for stage in stages.values()}
        names = dict.fromkeys([*kinds, DENSE, FINAL, CONTROL_SCRATCH, CONTROL_RANDOM])
        # The sort is stable.
        return sorted(names, key=lambda name: places.get(name, 5 if kinds.get(name) == "control" else 2))

    def first(self, name: str) -> Stage | None:
        """The stage whose sizes and times are shown: that of the first seed that has it."""
        return next((stages[name] for stages in self.seeds.values() if name in stages), None)

    @property
    def dense(self) -> Stage:
        """The first seed's dense stage."""
        return next(iter(self.seeds.values()))[DENSE]

    def _baseline(self, name: str) -> Stage:
        """The dense stage of the same seed as in `first`."""
        return next((stages[DENSE] for stages in self.seeds.values() if name in stages), self.dense)

    def claim(self, name: str) -> str:
        """What may be said about a stage; see `claim_of`."""
        stage = self.first(name)
        return _NOT_RUN if stage is None else claim_of(self._baseline(name), stage)

    def scores(self, name: str, metric: str | None = None) -> list[float]:
        """A stage's scores, one for each seed that has it."""
        metric = metric or self.metric
        stages = (stages[name] for stages in self.seeds.values() if name in stages)
        return [stage.scores[metric] for stage in stages if metric in stage.scores]

    def differences(self, name: str) -> list[float]:
        """A stage's scores minus those of the dense network of the same seed."""
        pairs = ((stages[name], stages[DENSE]) for stages in self.seeds.values() if name in stages)
        return [stage.scores[self.metric] - dense.scores[self.metric] for stage, dense in pairs]

    def batch_sizes(self) -> list[int]:
        """The batch sizes at which time was measured, ascending."""
        stages = (stage for stages in self.seeds.values() for stage in stages.values())
        return sorted({row.batch for stage in stages for row in stage.latency})

    @property
    def tells_epochs(self) -> bool:
        """Whether any stage says for how long it was trained; reports of earlier versions do not."""
        return any(stage.epochs is not None for stages in self.seeds.values() for stage in stages.values())

    def header(self) -> list[str]:
        """The table's titles."""
        percent = " %" if _is_percent(self.metric) else ""
        better = "higher" if self.higher_is_better else "lower"
        times = [f"time, batch {size}" for size in self.batch_sizes()] or ["time"]
        return [
            "stage", f"{self.metric}{percent} ({better} is better)", "to dense", *["epochs"] * self.tells_epochs,
            "parameters", "not zero", "MACs", "bytes", *times, "claim",
        ]  # fmt: skip

    def rows(self) -> list[list[str]]:
        """The table: a header, then a row for each stage. The ratio to dense is in brackets; a time is such a ratio."""
        return [self.header(), *(self._row(name) for name in self.names)]

    def brief_rows(self, *, narrow: bool = False) -> list[list[str]]:
        """The table for a terminal, without claims: numbers for dense and ratios for the others, but both for bytes.

        Args:
            narrow: whether to leave out differences to dense, epochs (`epochs_line`) and intervals of times, for 80
                columns.
        """
        header, *body = self.rows()
        # In the columns up to bytes a cell is a number and its ratio; times have one line for each runtime.
        last = header.index("bytes")
        brief = [["stage", header[1].partition(" (")[0], *header[2:-1]]]
        for line in body:
            is_dense = line[0] == DENSE
            cells = [cell.removesuffix(f" (n={len(self.seeds)})") for cell in line[:3]]
            cells += [_number(cell) if is_dense else _ratio_of(cell) for cell in line[3:last]]
            cells += [_number(line[last]) if is_dense else line[last]]
            for cell in line[last + 1 : -1]:
                shown = (
                    ""
                    if cell.startswith(SEE)
                    else cell.replace(", ONNX Runtime ", "\nONNX ").replace("ONNX Runtime ", "ONNX ")
                )
                bare = re.sub(r"(ONNX|int8) ", r"\1\n", re.sub(r" \[.*?\]", "", shown))
                cells.append(bare if narrow else shown)
            brief.append(cells)
        return [line[:2] + line[header.index("parameters") :] for line in brief] if narrow else brief

    def epochs_line(self) -> str:
        """The epochs of all rows in a line, which `brief_rows` have no room for if they are narrow."""
        shown = [(name, stage) for name in self.names if (stage := self.first(name)) is not None]
        return f"epochs: {'; '.join(f'{name} {_epochs(stage)}' for name, stage in shown)}"

    def caption(self) -> str:
        """A description of the scores in `brief_rows`."""
        number = len(self.seeds)
        better = "higher" if self.higher_is_better else "lower"
        scores = f"mean ± standard deviation of {number} seeds" if number > 1 else "one seed"
        epochs = "; epochs: of this run, after those before it (?: unknown)" if self.tells_epochs else ""
        return f"{self.metric}: {scores}, {better} is better; the rest: of the first seed, as ratios to dense{epochs}"

    def _row(self, name: str) -> list[str]:
        stage = self.first(name)
        if stage is None:
            return [name, _NOT_RUN, *["" for _ in self.header()[2:-1]], _NOT_RUN]
        dense = self._baseline(name)
        scale = 100 if _is_percent(self.metric) else 1
        key, before, _ = _size(dense, stage)
        size = _counted(stage.nbytes.get(key), dense.nbytes.get(before), stage.missing.get("artefact", "not asked for"))
        if key != "artefact" and key in stage.nbytes:
            size += f", {FILES[key]}"
        return [
            name,
            _spread(self.scores(name), scale, seeds=len(self.seeds)),
            "" if stage.kind == "dense" else _spread(self.differences(name), scale, seeds=len(self.seeds), sign="+"),
            *[_epochs(stage)] * self.tells_epochs,
            _counted(stage.parameters, dense.parameters),
            _counted(stage.nonzero, dense.nonzero),
            _counted(stage.macs or None, dense.macs, stage.missing.get("macs", "none")),
            size,
            *self._times(stage),
            claim_of(dense, stage),
        ]

    def _times(self, stage: Stage) -> list[str]:
        sizes = self.batch_sizes()
        if stage.kind == "dense":
            return ["1" for _ in sizes] or ["1"]
        cells = []
        for size in sizes or [0]:
            rows = [row for row in stage.latency if row.batch == size and row.is_alike]
            # ONNX Runtime's ratio differs from PyTorch's, and that of int8 from that of float.
            shown = [("" if row.runtime == "torch" else f"{_RUNTIMES[row.runtime]} ") + _interval(row) for row in rows]
            cells.append(", ".join(shown) or _one_line(stage.missing.get("latency", "not measured")))
        return cells

    def notes(self) -> list[str]:
        """Notes on the rows: their own, what is missing and why, and sizes that differ between seeds."""
        lines = []
        for name in self.names:
            stage = self.first(name)
            if stage is None:
                continue
            lines += [f"{name}: {note}" for note in stage.notes]
            lines += [
                f"{name}: {what} not measured: {_one_line(reason)}"
                for what, reason in stage.missing.items()
                if not reason.startswith(SEE)
            ]
            if stage.uncounted:
                lines.append(f"{name}: MACs leave out {', '.join(stage.uncounted)}")
            lines += self._differing(name)
        return lines

    def _differing(self, name: str) -> list[str]:
        stages = [stages[name] for stages in self.seeds.values() if name in stages]
        lines = []
        if len(stages) < len(self.seeds):
            lines.append(f"{name}: {len(stages)} of {len(self.seeds)} seeds")
        counts = {
            "parameters": [stage.parameters for stage in stages],
            "not zero": [stage.nonzero for stage in stages],
            "MACs": [stage.macs for stage in stages],
            **{
                f"{title} bytes": [stage.nbytes[key] for stage in stages if key in stage.nbytes]
                for key, title in FILES.items()
            },
        }
        # Deflated and Huffman-coded weights always differ by some bytes; the CSV has every size.
        differing = [
            f"{what} from {min(values):,} to {max(values):,}"
            for what, values in counts.items()
            if values and max(values) > 1.01 * min(values)
        ]
        if differing:
            lines.append(f"{name}: {', '.join(differing)} over the seeds")
        return lines

    def file_rows(self) -> list[list[str]]:
        """Bytes of every kind of file that was written, with the ratio to dense's file of the same kind."""
        present = {key for stages in self.seeds.values() for stage in stages.values() for key in stage.nbytes}
        keys = [key for key in FILES if key in present]
        body = []
        for name in self.names:
            stage = self.first(name)
            if stage is None:
                continue
            dense = self._baseline(name)
            # Dense only has a float file.
            before = {**dense.nbytes, INT8: dense.nbytes.get("onnx")}
            reasons = dict.fromkeys(keys, "") if name.endswith(IN_INT8) else {}
            reasons |= {INT8: f"{SEE}{name}{IN_INT8}"} if name + IN_INT8 in self.names else {}
            reasons |= stage.missing
            cells = [
                _counted(stage.nbytes.get(key), before.get(key), reasons.get(key, "not asked for")) for key in keys
            ]
            gaps = ", ".join(f"{FILES[key]} {gap:.1e}" for key, gap in stage.differences.items() if gap) or "0"
            effective = _counted(stage.effective_macs or None, dense.effective_macs, stage.missing.get("macs", "none"))
            body.append([name, *cells, gaps, effective])
        titles = [FILES[key] for key in keys]
        return [["stage", *titles, "largest difference of an output after reading", "effective MACs"], *body]

    def latency_rows(self) -> list[list[str]]:
        """Every measured time: medians in milliseconds and ratios with their intervals."""
        header = [
            "stage", "batch", "runtime", "dense (float) in", "dense ms", "ms", "ratio, thread time",
            "ratio, wall time", "claim",
        ]  # fmt: skip
        shown = [(name, stage) for name in self.names if (stage := self.first(name)) is not None]
        return [header] + [
            [
                name, str(row.batch), row.runtime, row.baseline, f"{row.dense_ms:.3f}", f"{row.compressed_ms:.3f}",
                _interval(row), f"{row.wall_ratio:.2f} [{row.wall_low:.2f}, {row.wall_high:.2f}]", row.claim,
            ]
            for name, stage in shown
            for row in stage.latency
        ]  # fmt: skip

    def score_rows(self) -> list[list[str]]:
        """Every score: mean ± standard deviation over the seeds."""
        metrics = list(dict.fromkeys(m for stages in self.seeds.values() for s in stages.values() for m in s.scores))
        body = [
            [name, *(_spread(self.scores(name, metric), 1, seeds=len(self.seeds)) for metric in metrics)]
            for name in self.names
            if self.first(name) is not None
        ]
        return [["stage", *(f"{metric} (‰)" if metric in _PER_MILLE else metric for metric in metrics)], *body]

    def markdown(self) -> str:
        """The whole report."""
        seeds = f"Scores: mean ± standard deviation over seeds {', '.join(map(str, self.seeds))}."
        parts = [
            "# Compression",
            "\n".join(f"- {key}: {value}" for key, value in self.about.items()),
            markdown_table(self.rows()),
            f"{seeds} {LEGEND}",
            "\n".join(f"- {line}" for line in self.notes()),
            f"## Files\n\n{markdown_table(self.file_rows())}",
            f"## Times\n\n{markdown_table(self.latency_rows())}",
            f"## Scores\n\n{markdown_table(self.score_rows())}",
        ]
        return "\n\n".join(part.strip() for part in parts if part) + "\n"

    def lines(self) -> list[dict[str, Any]]:
        """One flat dict for each seed and stage, the lines of the CSV file."""
        found = []
        for seed, stages in self.seeds.items():
            for stage in stages.values():
                line: dict[str, Any] = {"seed": seed, "stage": stage.name, "kind": stage.kind}
                line |= {f"score {metric}": value for metric, value in stage.scores.items()}
                line |= {"epochs": stage.epochs, "epochs before": stage.earlier}
                line |= {name: getattr(stage, name) for name in ("parameters", "nonzero", "macs", "effective_macs")}
                line |= {f"bytes {key}": size for key, size in stage.nbytes.items()}
                for row in stage.latency:
                    place = f"{row.runtime} to {row.baseline}, batch {row.batch}"
                    for name in ("dense_ms", "compressed_ms", "ratio", "low", "high"):
                        line[f"{place}: {name}"] = getattr(row, name)
                line["claim"] = claim_of(stages[DENSE], stage)
                line["missing"] = "; ".join(f"{what}: {reason}" for what, reason in stage.missing.items())
                found.append(line)
        return found

    def as_plain(self) -> dict[str, Any]:
        """The whole report, as in the JSON file."""
        return {
            "about": self.about,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "macs": DEFINITION,
            "claims": {name: self.claim(name) for name in self.names},
            "stages": {
                str(seed): [stage.as_plain() for stage in stages.values()] for seed, stages in self.seeds.items()
            },
        }

    def figures(self) -> dict[str, Figure]:
        """Figures by file name: the score against its costs, and the times of the last network if measured."""
        # Networks before fine-tuning score far lower, and nobody uses them; the last step's network is the final one.
        shown = {
            name: stage
            for name in self.names
            if (stage := self.first(name)) is not None
            and stage.kind != "before"
            and stage.missing.get("latency") != f"{SEE}{FINAL}"
        }
        percent = _is_percent(self.metric)
        has_int8 = DENSE_INT8 in shown or FINAL_INT8 in shown
        plain = [stage for name, stage in shown.items() if name not in (DENSE_INT8, FINAL_INT8)]
        key = "artefact" if all("artefact" in stage.nbytes for stage in plain) else "state_dict"
        onnx = {name: s.nbytes.get(INT8, s.nbytes.get("onnx")) for name, s in shown.items()} if has_int8 else {}
        costs: dict[str, dict[str, float]] = {
            f"bytes of the {FILES[key]}": {name: s.nbytes[key] for name, s in shown.items() if key in s.nbytes},
            f"bytes of the {_title('onnx')}": {name: size for name, size in onnx.items() if size is not None},
            "MACs of a sample": {name: s.macs for name, s in shown.items() if s.macs},
        }
        if self.batch_sizes():
            size = self.batch_sizes()[-1]
            costs[f"ms, batch of {size}"] = self._milliseconds(size)
        figures = {
            "pareto.png": plot_pareto(
                {_DRAWN.get(name, name): self.scores(name) for name in shown},
                {
                    title: {_DRAWN.get(name, name): cost for name, cost in found.items()}
                    for title, found in costs.items()
                    if found
                },
                dense=_DRAWN[DENSE],
                controls={name for name, stage in shown.items() if stage.kind == "control"},
                label=f"{self.metric} (%)" if percent else self.metric,
                scale=100 if percent else 1,
                logarithmic={title for title in costs if title.startswith("bytes")},
            )
        }
        if FINAL in shown:
            figures |= draw_details(shown[FINAL].details)
        final = [shown[name] for name in (FINAL, FINAL_INT8) if name in shown]
        rows = [row for stage in final for row in stage.latency if row.is_alike]
        if rows:
            figures["latency.png"] = plot_latency(
                {
                    f"{_RUNTIMES[row.runtime]},\nbatch of {row.batch}": (row.dense_rounds, row.compressed_rounds)
                    for row in sorted(rows, key=lambda row: row.batch)
                },
                dense=_DRAWN[DENSE],
            )
        return figures

    def _milliseconds(self, size: int) -> dict[str, float]:
        """Each stage's time in PyTorch: its ratio to dense times one time of dense, whatever slowed the machine."""
        rows = {
            name: row
            for name in self.names
            if (stage := self.first(name)) is not None
            for row in stage.latency
            if row.batch == size and row.runtime == row.baseline == "torch"
        }
        if not rows:
            return {}
        dense = statistics.median(row.dense_ms for row in rows.values())
        return {DENSE: dense, **{name: row.ratio * dense for name, row in rows.items()}}

    def write(self, folder: Path) -> list[Path]:
        """Write ``report.md``, ``report.csv``, ``report.json`` and the figures.

        Args:
            folder: the folder, which is made if it does not exist.

        Returns:
            The paths.
        """
        pages = {
            "report.md": self.markdown(),
            "report.csv": csv_text(self.lines(), last=("claim", "missing")),
            "report.json": json.dumps(_finite(self.as_plain()), indent=1, allow_nan=False, default=str) + "\n",
        }
        return write_pages(folder, pages, self.figures())


def _size(dense: Stage, stage: Stage) -> tuple[str, str, float | None]:
    """A stage's kind of file (the artefact if possible), that of dense which it is held against, and their ratio."""
    # A row of an int8 file has no other one, and dense is always in float.
    pairs = (("artefact", "artefact"), ("state_dict", "state_dict"), (INT8, "onnx"))
    for key, before in pairs:
        if key in stage.nbytes and before in dense.nbytes:
            return key, before, stage.nbytes[key] / dense.nbytes[before]
    return "artefact", "artefact", None


def _title(key: str) -> str:
    return "ONNX file" if key == "onnx" else FILES[key]


def _epochs(stage: Stage) -> str:
    """Epochs of this run, after those before it."""
    if stage.epochs is None:
        return "not noted"
    before = "? + " if stage.earlier is None else f"{stage.earlier} + " if stage.earlier else ""
    return f"{before}{stage.epochs}"


def _said(row: LatencyRow) -> str:
    place = f"at batch {row.batch}" + ("" if row.runtime == "torch" else f" in {_RUNTIMES[row.runtime]}")
    if row.faster:
        return f"{_interval(row)} of the time {place}"
    return f"slower {place}: {_interval(row)}" if row.slower else f"{NO_SPEED_UP} {place} ({_interval(row)})"


def _interval(row: LatencyRow) -> str:
    return f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _counted(value: int | None, dense: int | None, otherwise: str = "") -> str:
    """A number with its ratio to dense, or the reason why there is none."""
    if value is None:
        return _one_line(otherwise)
    return f"{value:,} ({_ratio(value / dense)})" if dense else f"{value:,}"


def _number(cell: str) -> str:
    return cell.partition(" (")[0]


def _ratio_of(cell: str) -> str:
    """The ratio that `_counted` puts in brackets, or the whole cell if there is no ratio."""
    before, bracket, ratio = cell.rpartition("(")
    return ratio.removesuffix(")") if bracket and before else cell


def _spread(values: Sequence[float], scale: float, *, seeds: int, sign: str = "") -> str:
    if not values:
        return "not measured"
    lost = sum(not math.isfinite(value) for value in values)
    if lost:
        return f"not finite in {lost} of {len(values)}"
    digits = 2 if scale == 100 else 3
    mean = fixed(scale * statistics.fmean(values), digits, sign=sign)
    if len(values) > 1:
        mean += f" ± {fixed(scale * statistics.stdev(values), digits)}"
    return mean if seeds == 1 else f"{mean} (n={len(values)})"


_PER_MILLE = ("aurc", "eaurc")


def _is_percent(metric: str) -> bool:
    return "accuracy" in metric


def _one_line(reason: str) -> str:
    return " ".join(reason.split())


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as text, because JSON has neither."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
