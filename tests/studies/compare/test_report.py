"""A report is what its folder says, wherever it is read."""

import math

import pytest

from distill_lightning import InputError
from distill_lightning.studies.compare.report import Report
from distill_lightning.studies.compare.scores import Score, Scores, Section
from distill_lightning.studies.compare.task import Column

COLUMNS = [Column("test_accuracy", "test %", 100, 2), Column("nll", "NLL", mode="min")]


def score(method, seed, accuracy, **options):
    values = {"test_accuracy": accuracy, "test_accuracy_selected": accuracy, "nll": 1 - accuracy}
    return Score(method, seed, values, 1000, 1.5, curve=[accuracy / 2, accuracy], **options)


def scores(runs, **options):
    return Scores(COLUMNS, "accuracy", "accuracy", 100, runs, heading="# Comparison", **options)


def test_a_report_is_read_as_it_was_written(tmp_path):
    bins = [[20.0, 30.0], [5.0, 27.0], [4.0, 28.0]]
    runs = [score("teacher_1", 1001, 0.9, is_teacher=True, bins=bins)]
    runs += [score(name, seed, 0.7 + seed / 100, bins=bins) for seed in (0, 1, 2) for name in ("alone", "kd")]
    # What has diverged has numbers that JSON does not know.
    runs[-1] = Score("kd", 2, dict.fromkeys(runs[-1].values, math.nan), 1000, math.nan, failed="not finite")
    ensembles = {1: {"test_accuracy": 0.95, "nll": math.nan}}
    written = scores(runs, ensembles=ensembles, ensemble_bins={1: bins}, sections=[Section("Search", [["a"], ["b"]])])
    Report(written).write(tmp_path / "one")
    read = Report.load(tmp_path / "one")
    assert repr(read.scores) == repr(written)
    read.write(tmp_path / "two")
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert {name.name for name in names} >= {"report.json", "results.md", "results.csv", "learning_curves.png"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_folder_without_a_report_or_with_a_damaged_one_is_named(tmp_path):
    with pytest.raises(InputError, match="has no report.json: run the comparison to its end first"):
        Report.load(tmp_path)
    for content in ("{", "[]", '{"columns": []}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InputError, match="report.json is damaged, call compare again"):
            Report.load(tmp_path)
