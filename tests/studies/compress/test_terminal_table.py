"""The table of `distill-lightning compress` in a terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from distill_lightning.compression.report.report import Report
from distill_lightning.compression.report.stage import LatencyRow, Stage
from distill_lightning.studies.compress.command import _claims, _table


def row(batch, runtime):
    return LatencyRow(
        batch, runtime, runtime.removesuffix(" int8"), 2.0, 1.0, 0.5, 0.45, 0.55, 0.5, 0.45, 0.55, "-", [2.0], [1.0]
    )


def stage(name, kind, accuracy, **options):
    given = {"parameters": 100_000, "nonzero": 90_000, "macs": 800_000, "effective_macs": 700_000} | options
    return Stage(name, kind, {"accuracy": accuracy}, nbytes={"artefact": 4 * given["parameters"]}, **given)


def report():
    small = {"parameters": 25_000, "nonzero": 25_000, "macs": 200_000}
    times = [row(batch, runtime) for batch in (1, 32) for runtime in ("torch", "onnxruntime", "onnxruntime int8")]
    return Report(
        {
            seed: [
                stage("dense", "dense", 0.98 + seed / 100),
                stage(
                    "1 PruneUnits hidden_unit, before fine-tuning",
                    "before",
                    0.5,
                    missing={"latency": "see final"},
                    **small,
                ),
                replace(
                    stage("final, int8 ONNX", "after", 0.96, latency=times[2:3], **small),
                    nbytes={"onnx_int8": 30_000},
                    epochs=12,
                    earlier=None,
                ),
                replace(stage("final", "after", 0.97, latency=times, **small), epochs=12, earlier=300),
            ]
            for seed in (0, 1)
        }
    )


@pytest.mark.parametrize("width", [80, 132])
def test_it_fits_and_breaks_no_word(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(_table(report(), width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    for whole in (
        "hidden_unit,",
        "fine-tuning",
        "parameters",
        "100,000",
        "(0.25)",
        "98.50",
        "ONNX",
        "int8",
        "32",
    ):
        assert whole in words, whole
    # Where a time is not measured there is nothing, in the place of a reason that the report's files give.
    assert "see" not in words
    assert ("[0.45," in words) == (width == 132)
    assert ("-1.50" in words) == ("epochs" in words) == ("300" in words) == (width == 132)
    assert report().epochs_line() == (
        "epochs: dense not noted; 1 PruneUnits hidden_unit, before fine-tuning not noted; "
        "final 300 + 12; final, int8 ONNX ? + 12"
    )


def test_every_row_that_shows_a_time_says_what_it_means():
    same = LatencyRow(1, "torch", "torch", 2.0, 1.9, 0.95, 0.8, 1.1, 1.0, 0.9, 1.1, "-")
    int8 = stage("final", "after", 0.97, latency=[same, row(1, "onnxruntime int8")])
    int8.nbytes["onnx_int8"] = 50_000
    stages = [
        stage("dense", "dense", 0.98),
        stage("1 PruneWeights, before fine-tuning", "before", 0.5, missing={"latency": "see 1 PruneWeights"}),
        stage("1 PruneWeights", "after", 0.97, latency=[same]),
        int8,
        stage("control: random criterion", "control", 0.9, missing={"latency": "not asked for"}),
    ]
    stages[0].nbytes["onnx"] = 200_000
    pruned, final, control = _claims(Report({0: stages}))
    assert pruned.startswith("1 PruneWeights: ")
    assert "no measured speed-up at batch 1 (0.95 [0.80, 1.10])" in pruned
    assert "int8: 0.25 of the ONNX file" in final
    assert "in ONNX Runtime int8" in final
    assert control.startswith("control: random criterion: ")
    assert "time not measured: not asked for" in control
