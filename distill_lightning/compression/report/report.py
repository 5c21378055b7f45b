"""The report of a compression run: one row for each stage, with a claim that follows from its numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from distill_lightning.compression.costs.latency import NO_SPEED_UP
from distill_lightning.compression.costs.macs import DEFINITION
from distill_lightning.compression.report.cells import (
    FILES,
    RUNTIMES,
    as_interval,
    counted,
    epochs_of,
    is_percent,
    ratio_in,
    spread,
    without_ratio,
)
from distill_lightning.compression.report.claims import claim_of, file_of
from distill_lightning.compression.report.drawing import draw_stages
from distill_lightning.compression.report.stage import DENSE, IN_INT8, INT8, MARGIN, SEE, Stage
from distill_lightning.compression.report.stages_by_seed import NOT_RUN, StagesBySeed
from distill_lightning.errors import in_a_line
from distill_lightning.pages import csv_text, machine, markdown_table, write_pages

LEGEND = (
    "In brackets: ratio to dense. Time: ratio of medians to dense in the same runtime (dense always in float), taken "
    f"in turns, one thread, with its 95 % interval; {NO_SPEED_UP} where that holds 1 or comes nearer to it than "
    f"{MARGIN}. Bytes: of a file that was written and read again. MACs, of one sample: {DEFINITION}. Effective MACs "
    "leave out weights that are zero: what an ideal kernel would be left with. Epochs: of this run, after those that "
    "the dense network had before it (?: nobody knows how many)."
)
"""What the table's titles mean."""

_PACKAGES = ("distill-lightning", "torchvision", "pytorch-lightning", "onnxruntime", "numpy")
_PER_MILLE = ("aurc", "eaurc")


def circumstances() -> dict[str, str | int]:
    """Versions, processor, threads and engine, on which this machine's figures depend. The caller adds the date."""
    return {**machine(*_PACKAGES), "quantized engine": torch.backends.quantized.engine}


class Report(StagesBySeed):
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
        super().__init__(stages_by_seed, metric=metric, higher_is_better=higher_is_better)
        self.about = dict(about or {})

    def header(self) -> list[str]:
        """The table's titles."""
        percent = " %" if is_percent(self.metric) else ""
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
            cells += [without_ratio(cell) if is_dense else ratio_in(cell) for cell in line[3:last]]
            cells += [without_ratio(line[last]) if is_dense else line[last]]
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
        return f"epochs: {'; '.join(f'{name} {epochs_of(stage)}' for name, stage in shown)}"

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
            return [name, NOT_RUN, *["" for _ in self.header()[2:-1]], NOT_RUN]
        dense = self.baseline(name)
        scale = 100 if is_percent(self.metric) else 1
        key, before, _ = file_of(dense, stage)
        size = counted(stage.nbytes.get(key), dense.nbytes.get(before), stage.missing.get("artefact", "not asked for"))
        if key != "artefact" and key in stage.nbytes:
            size += f", {FILES[key]}"
        return [
            name,
            spread(self.scores(name), scale, seeds=len(self.seeds)),
            "" if stage.kind == "dense" else spread(self.differences(name), scale, seeds=len(self.seeds), sign="+"),
            *[epochs_of(stage)] * self.tells_epochs,
            counted(stage.parameters, dense.parameters),
            counted(stage.nonzero, dense.nonzero),
            counted(stage.macs or None, dense.macs, stage.missing.get("macs", "none")),
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
            shown = [("" if row.runtime == "torch" else f"{RUNTIMES[row.runtime]} ") + as_interval(row) for row in rows]
            cells.append(", ".join(shown) or in_a_line(stage.missing.get("latency", "not measured")))
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
                f"{name}: {what} not measured: {in_a_line(reason)}"
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
            dense = self.baseline(name)
            # Dense only has a float file.
            before = {**dense.nbytes, INT8: dense.nbytes.get("onnx")}
            reasons = dict.fromkeys(keys, "") if name.endswith(IN_INT8) else {}
            reasons |= {INT8: f"{SEE}{name}{IN_INT8}"} if name + IN_INT8 in self.names else {}
            reasons |= stage.missing
            cells = [counted(stage.nbytes.get(key), before.get(key), reasons.get(key, "not asked for")) for key in keys]
            gaps = ", ".join(f"{FILES[key]} {gap:.1e}" for key, gap in stage.differences.items() if gap) or "0"
            effective = counted(stage.effective_macs or None, dense.effective_macs, stage.missing.get("macs", "none"))
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
                as_interval(row), f"{row.wall_ratio:.2f} [{row.wall_low:.2f}, {row.wall_high:.2f}]", row.claim,
            ]
            for name, stage in shown
            for row in stage.latency
        ]  # fmt: skip

    def score_rows(self) -> list[list[str]]:
        """Every score: mean ± standard deviation over the seeds."""
        metrics = list(dict.fromkeys(m for stages in self.seeds.values() for s in stages.values() for m in s.scores))
        body = [
            [name, *(spread(self.scores(name, metric), 1, seeds=len(self.seeds)) for metric in metrics)]
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
        return draw_stages(self)

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


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as text, because JSON has neither."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
