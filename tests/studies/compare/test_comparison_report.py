"""A report is what its folder says, wherever it is read."""

import math

import pytest
import torch

from distill_lightning import Comparison, InputError, SupervisedModule
from distill_lightning.plots.style import row_styles
from distill_lightning.studies.compare import memory
from distill_lightning.studies.compare.checks import check
from distill_lightning.studies.compare.config import CompareConfig
from distill_lightning.studies.compare.memory import PeakMemory
from distill_lightning.studies.compare.report import Report
from distill_lightning.studies.compare.scores import Score, Scores, Section
from distill_lightning.studies.compare.task import Column
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

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


def table(rows):
    header, *lines = rows
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}


def of_sets(kd=(0.02, 0.03), **options):
    """Two sets of teachers with three seeds each, under which ``kd`` is better by so much."""
    runs = [score("teacher_1", 1001, 0.9 + s / 100, teacher_set=s, is_teacher=True) for s in (1, 2)]
    for s, gain in zip((1, 2), kd, strict=True):
        for seed in (0, 1, 2):
            alone = 0.7 + seed / 100
            runs += [score("alone", seed, alone, teacher_set=s), score("kd", seed, alone + gain, teacher_set=s)]
    ensembles = {s: {"test_accuracy": 0.9 + s / 50, "nll": 0.1} for s in (1, 2)}
    return scores(runs, ensembles=ensembles, **options)


def test_means_are_over_sets_and_it_is_said_whose_the_variance_is(tmp_path):
    report = Report(of_sets())
    cells = table(report.rows())
    # The sets of teachers differ by a hundredth, seeds by one as well; of alone, only seeds.
    assert cells["alone"]["test %"] == "71.00 ± 1.00"
    assert cells["teacher_1"]["test %"] == "91.50 ± 0.71"
    assert cells["ensemble"]["test %"] == "93.00 ± 1.41"
    assert cells["ensemble"]["params"] == "1,000"
    header, alone, kd = report.spread_rows()
    assert header[1:] == ["test %", "95 % interval", "sd between sets", "sd between seeds"]
    assert alone[1:] == ["71.00", "[71.00, 71.00]", "0.00", "1.00"]
    # t = 12.706 on the means 73 and 74; the variance between them is 1/2 less 1/3.
    assert kd[1:] == ["73.50", "[67.15, 79.85]", "0.41", "1.00"]
    assert report.verdicts() == {
        "kd": "not told apart from alone: +2.50 [-3.85, +8.85]; of that, sd 0.71 between sets of teachers, "
        "0.00 between seeds"
    }
    report.write(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "## Whose the variance is: 2 sets of teachers, 3 seeds each" in text
    assert "these teachers only" not in text
    assert (tmp_path / "results.csv").read_text().startswith("method,teacher_set,seed,")


def test_a_table_of_numbers_says_what_the_report_says(tmp_path):
    comparison = Comparison(Report(of_sets()), tmp_path)
    rows = comparison.table.reset_index().to_dict("records") if hasattr(comparison.table, "loc") else comparison.table
    found = {row["row"]: row for row in rows}
    assert list(found) == ["teacher_1", "ensemble", "alone", "kd"]
    # The sets' means are 0.73 and 0.74, and the seeds under each lie 0.01 apart.
    assert found["kd"]["test_accuracy"] == pytest.approx(0.735)
    assert found["kd"]["test_accuracy_sd"] == pytest.approx((0.01**2 + (0.01**2 / 2 - 0.01**2 / 3)) ** 0.5)
    assert found["alone"]["test_accuracy_sd"] == pytest.approx(0.01)
    assert found["ensemble"]["parameters"] == found["teacher_1"]["parameters"] == 1000
    runs = comparison.runs.to_dict("records") if hasattr(comparison.runs, "loc") else comparison.runs
    assert {(run["teacher_set"], run["seed"]) for run in runs if run["method"] == "kd"} == {
        (number, seed) for number in (1, 2) for seed in (0, 1, 2)
    }


def test_no_figure_costs_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(Report, "figures", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Report(of_sets()).write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"results.md", "results.csv", "paired.csv", "report.json"}


def test_of_one_set_the_report_says_that_it_speaks_of_these_teachers_only():
    runs = [score("teacher_1", 1001, 0.9, is_teacher=True)]
    runs += [score(name, seed, 0.7) for seed in (0, 1) for name in ("alone", "kd")]
    assert "of these teachers only" in Report(scores(runs)).notes()[0]
    # Where there are none, there is nothing to say of them.
    assert Report(scores(runs[1:])).notes() == []


def test_the_baseline_is_a_row_of_ones_choice():
    report = Report(of_sets(kd=(0.02, 0.02), baseline="kd"))
    assert report.verdicts() == {
        "alone": "worse than kd by 2.00 [2.00, 2.00]; of that, sd 0.00 between sets of teachers, 0.00 between seeds"
    }
    assert report.paired_rows()[0][0] == "minus kd, 2 sets of teachers, 3 seeds each"


def test_what_cannot_be_paired_says_what_it_needs():
    runs = [score(name, seed, 0.7) for seed in (0, 1) for name in ("alone", "kd")]
    assert Report(scores(runs[:2])).paired_rows() == [["no differences from alone: they need several seeds"]]
    assert Report(scores(runs[::2])).paired_rows() == [["no differences from alone: they need another row"]]


def test_a_run_without_scores_leaves_a_row_that_says_so(tmp_path):
    runs = [score(name, seed, 0.7 + seed / 100) for seed in (0, 1, 2) for name in ("alone", "kd", "feed")]
    lost = dict.fromkeys(runs[0].values, math.nan)
    runs[4] = Score("kd", 1, lost, 1000, math.nan, failed="not finite in batch 0 of epoch 1")
    report = Report(scores(runs, failures=["kd, seed 1: not finite in batch 0 of epoch 1"]))
    assert table(report.rows())["kd"] == {
        "test %": "-", "sel. %": "-", "NLL": "-", "params": "1,000", "s/epoch": "1.50 ± 0.00"
    }  # fmt: skip
    assert report.verdicts()["kd"] == "cannot be compared with alone: 1 of 3 pairs has no scores"
    assert report.verdicts()["feed"].startswith("not told apart from alone")
    report.write(tmp_path)
    assert "\nkd, seed 1: not finite in batch 0 of epoch 1\n" in (tmp_path / "results.md").read_text()
    (axes,) = report.figures()["accuracy.png"].axes
    assert {label.get_text() for label in axes.get_yticklabels()} == {"alone", "feed"}
    # Its colour is not another's.
    curves = report.figures()["learning_curves.png"].axes
    styles = row_styles(["alone", "kd", "feed"])
    assert [axes.title.get_color() for axes in curves] == [styles["alone"].color, styles["feed"].color]


def test_costs_are_of_runs_that_tell():
    alone = [score("alone", 0, 0.7, peak_memory=2_000_000), score("alone", 1, 0.7, peak_memory=3_400_000)]
    beside = Score("kd", 0, alone[0].values, 1000, math.nan, shared=True)
    report = Report(scores([alone[0], beside, alone[1], Score("kd", 1, alone[0].values, 1000, 2.5)]))
    cells = table(report.rows())
    assert (cells["alone"]["s/epoch"], cells["alone"]["peak MB"]) == ("1.50 ± 0.00", "3")
    assert (cells["kd"]["s/epoch"], cells["kd"]["peak MB"]) == ("2.50", "-")
    assert "s/epoch: of the epochs in which no other run was made beside it" in report.notes()[0]


def test_confidence_is_shown_where_it_is_asked_for(tmp_path):
    columns = [*COLUMNS, Column("ece", "ECE %", 100, 2, mode="min", of_confidence=True)]
    bins = [[20.0, 30.0], [5.0, 27.0], [4.0, 28.0]]
    runs = [score(name, seed, 0.7 + seed / 10, bins=bins) for seed in (0, 1) for name in ("alone", "kd")]
    for run in runs:
        run.values["ece"] = 0.01
    silent, telling = (Report(Scores(columns, "accuracy", "accuracy", 100, runs, confidence=c)) for c in (False, True))
    for report, is_there in ((silent, False), (telling, True)):
        assert ("ECE %" in report.header()) == ("ECE %" in report.paired_rows()[0]) == is_there
        assert ("reliability.png" in report.figures()) == is_there
    # The files keep it in any case.
    silent.write(tmp_path)
    assert "ece" in (tmp_path / "results.csv").read_text().splitlines()[0]
    assert "kd,alone,ece," in (tmp_path / "paired.csv").read_text()


class Greedy(SupervisedModule):
    """Needs so many bytes in every step, and leaves none of them."""

    needs = 0

    def terms(self, batch):
        torch.ones(self.needs, dtype=torch.uint8)
        return super().terms(batch)


@pytest.mark.skipif(not memory._IS_KNOWN, reason="the peak of a process is known under Linux alone")
def test_the_peak_of_a_training_is_its_own(monkeypatch):
    def peak(needs):
        monkeypatch.setattr(Greedy, "needs", needs)
        found = PeakMemory()
        tiny_trainer(callbacks=[found]).fit(Greedy(TinyNet(), num_classes=3), datamodule=TinyDataModule())
        return found

    peak(0)
    before, greedy, after = (peak(needs).bytes for needs in (0, 400_000_000, 0))
    assert greedy - before == pytest.approx(400_000_000, rel=0.2)
    # What an earlier training needed is forgotten.
    assert abs(after - before) < 100_000_000


@pytest.mark.skipif(not memory._IS_KNOWN, reason="the peak of a process is known under Linux alone")
def test_a_resumed_training_tells_of_all_its_parts():
    found = PeakMemory()
    found.load_state_dict({"bytes": 10**15})
    assert found.state_dict() == {"bytes": 10**15}


def test_a_baseline_that_is_no_row_is_named():
    config = CompareConfig({}, {}, {"kd": {"teachers": "alone"}}, 1, [0], baseline="kdd")
    with pytest.raises(InputError, match="baseline: 'kdd' is no row; rows: alone, kd"):
        check(config)
