"""The table of `distill-lightning compress` in a terminal."""

import io

import pytest
from rich.console import Console

from distill_lightning.compress.command import _table
from distill_lightning.compression.report import LatencyRow, Report, Stage


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
                    "1 Prune hidden_unit, before fine-tuning", "before", 0.5, missing={"latency": "see final"}, **small
                ),
                stage("final", "after", 0.97, latency=times, **small),
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
    for whole in ("hidden_unit,", "fine-tuning", "parameters", "100,000", "(0.25)", "98.50", "ONNX", "int8", "32"):
        assert whole in words, whole
    # Where a time is not measured there is nothing, in the place of a reason that the report's files give.
    assert "see" not in words
    assert ("[0.45," in words) == (width == 132)
    assert ("-1.50" in words) == (width == 132)
