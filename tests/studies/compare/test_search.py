"""Searches: what is tried, on which seeds, what is chosen, and that the table has it."""

import io
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from compare_files import lines_of, write_config
from rich.console import Console
from safetensors.torch import load_file

from distill_lightning import InputError
from distill_lightning.cli import main
from distill_lightning.errors import NonFiniteError
from distill_lightning.studies.compare import command
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.compare.rows import rows_of
from distill_lightning.studies.compare.runner import execute
from distill_lightning.studies.compare.runs import RunResult
from distill_lightning.studies.compare.search import options_of, search_section, trials_in
from distill_lightning.studies.compare.storage import Reads, Storage
from distill_lightning.studies.compare.trials import search_seeds_of, trials_of, with_options

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
RATE = "optimizer.init_args.lr"
CONFIG = {
    "data": {
        "class_path": "DigitsDataModule",
        "init_args": {"subset": 96, "batch_size": 16, "val_size": 100, "test_size": 100, "image_size": 8},
    },
    "teachers": {"network": {"class_path": "SmallResNet", "init_args": {"width": 2}}, "number": 1},
    "student": {"class_path": "SmallResNet", "init_args": {"width": 2}},
    "methods": {
        "kd": {"class_path": "KDModule", "init_args": {"temperature": 4.0}},
        "after": {"class_path": "KDModule", "teachers": "kd"},
    },
    "epochs": 1,
    "seeds": [0, 1],
    "optimizer": SGD,
    "search": {"alone": {RATE: [0.1, 0.01]}, "kd": {"temperature": [2.0, 8.0]}},
    "accelerator": "cpu",
}  # fmt: skip


def config_of(folder, *arguments, **changes):
    return parse_config([write_config(CONFIG | changes, folder), "--output", str(folder / "out"), *arguments])


def planned(folder, **changes):
    config = config_of(folder, **changes)
    made = {name: SimpleNamespace(epochs=spec["epochs"]) for name, spec in (config.backbones or {}).items()}
    fake = SimpleNamespace(config=config, rows=rows_of(config), backbones=made, storage=Storage())
    return plan(fake, folder / "out")


TASK = SimpleNamespace(monitor="val/accuracy", mode="max", watched="accuracy", watched_scale=100)


def finish(run, score, diverged=""):
    """Leave a trial's result without a training."""
    run.folder.mkdir(parents=True, exist_ok=True)
    history = [] if score is None else [{"val/accuracy": 1.0 - score}, {"val/accuracy": score}]
    run.result_file.write_text(json.dumps(RunResult(1, 1, history, "today", diverged).__dict__))


def test_every_combination_is_tried_once(tmp_path):
    options = {"temperature": [1.0, 2.0, 4.0], "hard_label_weight": [0.0, 0.1], RATE: [0.1, 0.03]}
    config = config_of(tmp_path, search={"kd": options})
    expected = [tuple(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    assert trials_of(config, rows_of(config)) == {"kd": expected}
    # A smaller number draws different ones of each, and a larger number the same and others.
    drawn = []
    for count in (3, 7, 12):
        config = config_of(tmp_path, search={"kd": options}, trials=count)
        drawn.append(trials_of(config, rows_of(config))["kd"])
        assert len({*drawn[-1]}) == count
        assert {*drawn[-1]} <= {*expected}
    assert {*drawn[0]} <= {*drawn[1]}
    assert drawn[2] == expected


def test_trials_have_seeds_and_folders_of_their_own(tmp_path):
    runs = planned(tmp_path, search_seeds=[7, 9], teachers={**CONFIG["teachers"], "sets": 2})
    trials = [run for run in runs if run.options]
    assert [str(run.folder.relative_to(tmp_path / "out/runs")) for run in trials] == [
        f"search/{row}/trial_{number}/seed_{seed}" for row in ("alone", "kd") for number in (1, 2) for seed in (7, 9)
    ]
    assert [run.options for run in trials if run.name == "kd"][::2] == [
        (("temperature", 2.0),),
        (("temperature", 8.0),),
    ]
    assert not any(run.is_student or run.is_teacher for run in trials)
    assert {run.seed for run in runs if run.is_student} == {0, 1}
    # Both sets of teachers have what was chosen under the first.
    for run in runs:
        if run.is_student:
            of_row = tuple(trial for trial in trials if trial.name == run.name)
            assert run.chosen_from == of_row
            assert {trial.teacher_set for trial in run.chosen_from} <= {1}
    assert trials[-1].title == "kd, seed 9, set 1, search (temperature 8.0)"
    assert [run.teachers[0].name for run in trials if run.name == "kd"] == ["teacher_1"] * 4


def test_a_trial_learns_from_students_with_the_seed_of_the_search(tmp_path):
    methods = {
        "kd": {"class_path": "KDModule"},
        "feed": {"class_path": "FEEDModule", "stages": 2, "backbone": "plain"},
        "more": {"class_path": "KDModule", "initial": "feed_2"},
        "other": {"class_path": "KDModule"},
    }
    backbones = {"plain": {"class_path": "SupervisedModule", "data": CONFIG["data"], "epochs": 5}}
    search = {"feed": {"beta": [1.0, 2.0]}, "more": {"temperature": [1.0, 2.0]}}
    runs = planned(tmp_path, methods=methods, search=search, backbones=backbones)
    made = [run for run in runs if run.in_search]
    # Each stage chooses for itself, and the next one learns from what was chosen.
    assert [str(run.folder.relative_to(tmp_path / "out/runs/search")) for run in made] == [
        "alone/seed_2000",
        "backbone_plain/seed_2000",
        *(f"feed_1/trial_{number}/seed_2000" for number in (1, 2)), "feed_1/seed_2000",
        *(f"feed_2/trial_{number}/seed_2000" for number in (1, 2)), "feed_2/seed_2000",
        *(f"more/trial_{number}/seed_2000" for number in (1, 2)),
    ]  # fmt: skip
    found = {str(run.folder.relative_to(tmp_path / "out/runs/search")): run for run in made}
    second = found["feed_2/trial_1/seed_2000"]
    assert second.teachers == (found["feed_1/seed_2000"],)
    assert second.backbone == found["backbone_plain/seed_2000"]
    assert found["feed_1/seed_2000"].chosen_from == tuple(found[f"feed_1/trial_{n}/seed_2000"] for n in (1, 2))
    assert found["more/trial_2/seed_2000"].initial == found["feed_2/seed_2000"]
    for place, run in enumerate(runs):
        assert all(other in runs[:place] for other in run.depends_on)


@pytest.mark.parametrize(
    ("mode", "scores", "chosen"),
    [
        ("max", [(0.5, 0.7), (0.8, 0.6), (0.1, 0.9)], 1),
        ("min", [(0.5, 0.7), (0.8, 0.6), (0.1, 0.8)], 2),
        # The first of equals; and never one that has diverged with any seed.
        ("max", [(0.5, 0.5), (0.4, 0.6), (0.1, 0.1)], 0),
        ("max", [(0.5, 0.7), (None, 0.9), (float("nan"), 0.9)], 0),
    ],
)
def test_the_best_mean_is_chosen(tmp_path, mode, scores, chosen):
    runs = planned(tmp_path, search={"kd": {"temperature": [1.0, 2.0, 4.0]}}, search_seeds=[7, 9])
    trials = [run for run in runs if run.options]
    for run, score in zip(trials, itertools.chain(*scores), strict=True):
        finish(run, score, "" if score is not None else "its numbers are not finite")
    task = SimpleNamespace(**{**vars(TASK), "mode": mode})
    student = next(run for run in runs if run.is_student and run.name == "kd")
    assert options_of(student, task) == (("temperature", [1.0, 2.0, 4.0][chosen]),)
    assert options_of(trials[0], task) == (("temperature", 1.0),)
    assert options_of(next(run for run in runs if run.name == "after"), task) == ()
    written = json.loads((tmp_path / "out/runs/search/kd/chosen.json").read_text())
    assert written["options"] == {"temperature": [1.0, 2.0, 4.0][chosen]}
    assert len(written["tried"]) == 3


def test_what_was_chosen_holds(tmp_path):
    runs = planned(tmp_path, search={"kd": {"temperature": [1.0, 2.0]}})
    first, second = (run for run in runs if run.options)
    student = next(run for run in runs if run.is_student and run.name == "kd")
    for run in (first, second):
        finish(run, None, "its numbers are not finite")
    with pytest.raises(NonFiniteError, match="search.kd: no combination of options has finite numbers"):
        options_of(student, TASK)
    finish(first, 0.5)
    assert options_of(student, TASK) == options_of(student, TASK) == first.options
    # It is made again, and is the better one.
    finish(second, 0.6)
    with pytest.raises(InputError, match=r"kd had temperature 1.0, but its trials speak for temperature 2.0 now"):
        options_of(student, TASK)


def test_the_report_lists_what_was_tried(tmp_path):
    runs = planned(tmp_path)
    for run, score in zip([run for run in runs if run.options], (0.5, 0.75, 0.9, None), strict=True):
        finish(run, score, "" if score else "its numbers are not finite")
    (section,) = search_section(trials_in(runs, TASK), TASK, ["alone", "kd", "after"])
    assert section.rows == [
        ["row", "options tried", "validation accuracy %", ""],
        ["alone", "lr 0.1", "50.0", ""],
        ["alone", "lr 0.01", "75.0", "chosen"],
        ["kd", "temperature 2.0", "90.0", "chosen"],
        ["kd", "temperature 8.0", "-", ""],
    ]
    assert section.text.startswith("2 combinations of options for each of these rows, with seed 2000, of which")
    assert section.text.endswith("Not searched: after.")
    assert search_section([], TASK, ["alone"]) == []


def test_options_are_put_where_they_belong(tmp_path):
    methods = {"kd": {"class_path": "KDModule", "init_args": {"temperature": 4.0, "distance": "FactorDistance"}}}
    config = config_of(tmp_path, methods=methods, search=None)
    alone, kd = rows_of(config)
    options = (("temperature", 2.0), (RATE, 0.3), ("distance.init_args.p", 2), ("paraphrasers.epochs", 3))
    with pytest.raises(InputError, match=r"search.kd.paraphrasers.epochs: there is no paraphrasers with keys"):
        with_options(config, kd, options)
    changed = with_options(config, kd, options[:3])
    assert changed.methods["kd"]["init_args"] == {
        "temperature": 2.0,
        "distance": {"class_path": "FactorDistance", "init_args": {"p": 2}},
        "optimizer": {**SGD, "init_args": {**SGD["init_args"], "lr": 0.3}},
    }
    # The teachers' and the other rows' are as they were.
    assert (changed.optimizer, changed.supervised, config.methods) == (SGD, None, methods)
    assert with_options(config, alone, options[1:2]).supervised == {
        "init_args": {"optimizer": {**SGD, "init_args": {**SGD["init_args"], "lr": 0.3}}}
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"feed": {"beta": [1]}}}, "search.feed: there is no such row; rows: alone, kd, after"),
        ({"search": {"kd": {"temperature": 2}}}, "search.kd.temperature: expected a list of different values, got 2"),
        ({"search": {"kd": {"temperature": [2, 2]}}}, "expected a list of different values"),
        ({"search": {"kd": {}}}, "search.kd: expected lists of values by option"),
        ({"search": {"kd": {"teachers": [1, 2]}}}, "search.kd.teachers: only what is in init_args, paraphrasers"),
        (
            {"search": {"alone": {RATE: [0.1, 0.2, 0.3]}, "kd": {"temperature": [2, 4]}}},
            "search: alone has 3 combinations to try and kd has 2, but every row gets the same number",
        ),
        ({"trials": 3}, "trials must be between 1 and 2, the number of combinations that search.alone has, got 3"),
        ({"search_seeds": [1, 7]}, "search_seeds: 1 is one of the table's seeds"),
        ({"search_seeds": []}, "search_seeds must be different numbers"),
        ({"search": None, "trials": 2}, "trials and search_seeds belong to a search"),
        (
            {
                "methods": {"feed": {"class_path": "FEEDModule", "stages": 2}},
                "search": {"feed": {"beta": [1]}, "feed_1": {"beta": [2]}},
            },
            "search: feed_1 is one of the rows of feed",
        ),
    ],
)
def test_searches_that_cannot_be_made_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError) as refused:
        config_of(tmp_path, **changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_default_seed_is_none_of_the_tables(tmp_path):
    assert search_seeds_of(config_of(tmp_path)) == [2000]
    assert search_seeds_of(config_of(tmp_path, seeds=[2000, 2001])) == [2002]


@pytest.mark.parametrize("written", [[2000], None])
def test_a_folder_keeps_the_seeds_of_its_search(tmp_path, written):
    """Older folders do not tell their default."""
    (tmp_path / "out").mkdir()
    first = command._check_folder(tmp_path / "out", config_of(tmp_path))
    assert first.as_plain()["search_seeds"] == [2000]
    stored = yaml.safe_dump({**first.as_plain(), "search_seeds": written})
    (tmp_path / "out/compare.yaml").write_text(stored)
    more = command._check_folder(tmp_path / "out", config_of(tmp_path, seeds=[0, 1, 2]))
    assert (more, more.search_seeds) == (command._check_folder(tmp_path / "out", more), [2000])
    with pytest.raises(InputError, match="search_seeds: 2000 is one of the table's seeds"):
        command._check_folder(tmp_path / "out", config_of(tmp_path, seeds=[0, 1, 2000]))
    with pytest.raises(InputError, match=r"another configuration \(search_seeds was \[2000\]\)"):
        command._check_folder(tmp_path / "out", config_of(tmp_path, search_seeds=[5]))
    anew = command._check_folder(tmp_path / "out", config_of(tmp_path, "--anew", seeds=[0, 1, 2000]))
    assert anew.search_seeds == [2001]


def test_a_search_may_come_later_with_seeds_of_its_own(tmp_path):
    (tmp_path / "out").mkdir()
    plain = command._check_folder(tmp_path / "out", config_of(tmp_path, search=None)).as_plain()
    assert plain["search_seeds"] is None
    (tmp_path / "out/compare.yaml").write_text(yaml.safe_dump(plain))
    some = {"methods": {**CONFIG["methods"], "new": {"class_path": "KDModule"}}, "search_seeds": [7]}
    config = config_of(tmp_path, search={"new": {"temperature": [1.0, 3.0]}}, **some)
    assert command._check_folder(tmp_path / "out", config).search_seeds == [7]


def test_rows_are_added_with_their_searches(tmp_path):
    (tmp_path / "out").mkdir()
    plain = config_of(tmp_path).as_plain()
    (tmp_path / "out/compare.yaml").write_text(yaml.safe_dump(plain))
    methods = {**CONFIG["methods"], "kd_new": {"class_path": "KDModule"}}
    more = {**CONFIG["search"], "kd_new": {"temperature": [1.0, 3.0]}}
    command._check_folder(tmp_path / "out", config_of(tmp_path, methods=methods, search=more))
    for search in (None, {**CONFIG["search"], "after": {"temperature": [1.0, 3.0]}}):
        with pytest.raises(InputError, match=r"another configuration \(search was"):
            command._check_folder(tmp_path / "out", config_of(tmp_path, search=search))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"kd": {"hard_label_weight": [0.0, 1.5]}}, "hard_label_weight must be in [0, 1], got 1.5"),
        ({"kd": {"temprature": [1.0, 2.0]}}, "temprature"),
        ({"alone": {"lr_scheduler.init_args.x": [1, 2]}}, "search.alone.lr_scheduler.init_args.x: there is no"),
    ],
)
def test_options_that_do_not_fit_are_found_before_the_first_training(tmp_path, capsys, search, message):
    config_of(tmp_path, search=search)
    assert main(["compare", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_kept_of_teachers_holds_for_all_trials(tmp_path):
    feed = {"class_path": "FEEDModule", "init_args": {"student_layer": "stage3"}}
    methods = {"kd": CONFIG["methods"]["kd"], "mixed": CONFIG["methods"]["kd"], "feed": feed}
    mixed = [[], [{"class_path": "Mixup", "init_args": {"alpha": 1.0}}]]
    layers = {"student_layer": ["stage2", "stage3"]}
    search = {"kd": {"temperature": [1.0, 2.0]}, "mixed": {"transforms": mixed}, "feed": layers}
    experiment = Experiment(config_of(tmp_path, methods=methods, search=search, teachers_store={"features": "1GB"}))
    assert experiment.storage.rows == {"kd": Reads(1, True, ())}
    assert experiment.storage.live == dict.fromkeys(("mixed", "feed"), "its search changes what is asked")


@pytest.mark.slow
def test_the_table_has_what_was_chosen(tmp_path):
    methods = {"kd": CONFIG["methods"]["kd"]}
    search = {"alone": {RATE: [0.3, 0.03]}, "kd": {RATE: [0.01, 0.1]}}
    some = {"methods": methods, "epochs": 2, "seeds": [3]}
    config = config_of(tmp_path, search=search, search_seeds=[5], **some)
    console = Console(file=io.StringIO(), width=160)
    command.run(config, [str(tmp_path / "config.yaml")], console=console)
    out = tmp_path / "out"
    lines = lines_of(out / "search.csv")
    chosen = {}
    for row, rates in (("alone", [0.3, 0.03]), ("kd", [0.01, 0.1])):
        results = [json.loads((out / f"runs/search/{row}/trial_{n}/seed_5/result.json").read_text()) for n in (1, 2)]
        reached = [result["history"][-1]["val/accuracy"] for result in results]
        # They are trained with other rates.
        assert results[0]["history"][0]["train/loss"] != results[1]["history"][0]["train/loss"]
        chosen[row] = rates[reached.index(max(reached))]
        told = [(line["options"], float(line["validation"]), line["chosen"]) for line in lines if line["method"] == row]
        tried = [(rate, score, str(rate == chosen[row])) for rate, score in zip(rates, reached, strict=True)]
        assert told == [(json.dumps({RATE: rate}), score, is_chosen) for rate, score, is_chosen in tried]
    # The trials saw no test images, and the table no trials.
    assert not list((out / "runs/search").rglob("test_logits.safetensors"))
    table = lines_of(out / "results.csv")
    assert [(line["method"], line["seed"]) for line in table] == [("alone", "3"), ("kd", "3")]
    # Its students are, bit for bit, those of a comparison with these options, under the same teachers.
    of_row = {row: {"init_args": {"optimizer": {**SGD, "init_args": {**SGD["init_args"], "lr": rate}}}}
              for row, rate in chosen.items()}  # fmt: skip
    some["methods"] = {"kd": {**methods["kd"], "init_args": methods["kd"]["init_args"] | of_row["kd"]["init_args"]}}
    experiment = Experiment(config_of(tmp_path, search=None, supervised=of_row["alone"], **some))
    runs = plan(experiment, tmp_path / "plain")
    shutil.copytree(out / "runs/teacher_1", tmp_path / "plain/runs/teacher_1")
    for run in runs[1:]:
        execute(experiment, run, lambda epoch: None)
        if run.makes_store:
            continue
        given, searched = load_file(run.student_file), load_file(out / f"runs/{run.name}/seed_3/student.safetensors")
        assert all((searched[key] == given[key]).all() for key in given)
