"""The script behind benchmarks/results/prediction_store.json, in small, and what it has written in full."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script():
    spec = importlib.util.spec_from_file_location("prediction_store", BENCHMARKS / "prediction_store.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_sizes(result):
    samples, classes = result["samples"], result["classes"]
    assert [(case["top_k"], case["kept"]) for case in result["cases"]] == [
        (top_k, kept) for top_k in (None, 10) for kept in ("in files", "in the checkpoint")
    ]
    for case in result["cases"]:
        row = classes * 2 if case["top_k"] is None else case["top_k"] * (2 + 2)
        in_files = case["kept"] == "in files"
        assert case["files_bytes"] == (4096 + samples * row + 4 if in_files else 0)
        half = -(-samples // result["batch"]) // 2 * result["batch"]
        assert case["files_mid_epoch_bytes"] == (case["files_bytes"] + 4096 + half * row + 4 if in_files else 0)
        # Whether a sample is known, a byte each, and what torch writes around it.
        beside = samples + (0 if in_files else samples * row)
        assert beside < case["checkpoint_bytes"] < beside + 8192
        assert all(value > 0 for name, value in case.items() if name.endswith("_s"))


def test_a_small_run_measures_and_writes_every_case(tmp_path, capsys):
    arguments = ["--samples", "1000", "--classes", "20", "--batch", "64", "--here", "--folder", str(tmp_path)]
    result = script().main([*arguments, "--output", str(tmp_path / "result.json")])
    check_sizes(result)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "N=1,000, K=20, float16, batches of 64"
    assert len(table) == 3 + len(script().COLUMNS)


def test_the_committed_run_is_of_imagenets_size():
    result = json.loads((BENCHMARKS / "results/prediction_store.json").read_text())
    assert (result["samples"], result["classes"]) == (1_281_167, 1000)
    assert {"cpu", "threads", "versions"} <= result.keys()
    check_sizes(result)
    dense, whole = (case for case in result["cases"] if case["top_k"] is None)
    buffer = 1_281_167 * 1000 * 2
    # One buffer of its own instead of two, the other one mapped.
    assert dense["anonymous"] == pytest.approx(buffer, rel=0.05)
    assert dense["mapped"] == pytest.approx(buffer, rel=0.05)
    assert whole["anonymous"] == pytest.approx(2 * buffer, rel=0.05)
