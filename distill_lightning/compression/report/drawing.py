"""The figures of a report."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from distill_lightning.compression.report.cells import FILES, RUNTIMES, is_percent, title_of
from distill_lightning.compression.report.details import draw_details
from distill_lightning.compression.report.stage import DENSE, DENSE_INT8, FINAL, FINAL_INT8, INT8, SEE
from distill_lightning.compression.report.stages_by_seed import StagesBySeed
from distill_lightning.plots import plot_latency, plot_pareto

_DRAWN = {DENSE: "dense (float)"}


def draw_stages(stages: StagesBySeed) -> dict[str, Figure]:
    """Figures by file name: the score against its costs, and the times of the last network if measured."""
    # Networks before fine-tuning score far lower, and nobody uses them; the last step's network is the final one.
    shown = {
        name: stage
        for name in stages.names
        if (stage := stages.first(name)) is not None
        and stage.kind != "before"
        and stage.missing.get("latency") != f"{SEE}{FINAL}"
    }
    percent = is_percent(stages.metric)
    has_int8 = DENSE_INT8 in shown or FINAL_INT8 in shown
    plain = [stage for name, stage in shown.items() if name not in (DENSE_INT8, FINAL_INT8)]
    key = "artefact" if all("artefact" in stage.nbytes for stage in plain) else "state_dict"
    onnx = {name: s.nbytes.get(INT8, s.nbytes.get("onnx")) for name, s in shown.items()} if has_int8 else {}
    costs: dict[str, dict[str, float]] = {
        f"bytes of the {FILES[key]}": {name: s.nbytes[key] for name, s in shown.items() if key in s.nbytes},
        f"bytes of the {title_of('onnx')}": {name: size for name, size in onnx.items() if size is not None},
        "MACs of a sample": {name: s.macs for name, s in shown.items() if s.macs},
    }
    if stages.batch_sizes():
        size = stages.batch_sizes()[-1]
        costs[f"ms, batch of {size}"] = _milliseconds(stages, size)
    figures = {
        "pareto.png": plot_pareto(
            {_DRAWN.get(name, name): stages.scores(name) for name in shown},
            {
                title: {_DRAWN.get(name, name): cost for name, cost in found.items()}
                for title, found in costs.items()
                if found
            },
            dense=_DRAWN[DENSE],
            controls={name for name, stage in shown.items() if stage.kind == "control"},
            label=f"{stages.metric} (%)" if percent else stages.metric,
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
                f"{RUNTIMES[row.runtime]},\nbatch of {row.batch}": (row.dense_rounds, row.compressed_rounds)
                for row in sorted(rows, key=lambda row: row.batch)
            },
            dense=_DRAWN[DENSE],
        )
    return figures


def _milliseconds(stages: StagesBySeed, size: int) -> dict[str, float]:
    """Each stage's time in PyTorch: its ratio to dense times one time of dense, whatever slowed the machine."""
    rows = {
        name: row
        for name in stages.names
        if (stage := stages.first(name)) is not None
        for row in stage.latency
        if row.batch == size and row.runtime == row.baseline == "torch"
    }
    if not rows:
        return {}
    dense = statistics.median(row.dense_ms for row in rows.values())
    return {DENSE: dense, **{name: row.ratio * dense for name, row in rows.items()}}
