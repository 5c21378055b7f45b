"""The plan of a comparison: which runs there are, from which seeds, and what each waits for."""

import itertools
from types import SimpleNamespace

import pytest
import yaml
from compare_files import write_config

from distill_lightning import InputError
from distill_lightning.studies.compare import command
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.compare.rows import rows_of
from distill_lightning.studies.compare.storage import Reads, Storage

KD = {"class_path": "KDModule"}
CONFIG = {
    "data": {"class_path": "DigitsDataModule"},
    "teachers": {"network": {"class_path": "SmallResNet"}, "number": 2, "epochs": 7},
    "student": {"class_path": "SmallResNet"},
    "methods": {"kd": {**KD, "teachers": 1}, "feed": {**KD, "stages": 2}, "after": {**KD, "teachers": "kd"}},
    "epochs": 3,
    "seeds": [0, 5],
}  # fmt: skip


def config_of(folder, **changes):
    return parse_config([write_config(CONFIG | changes, folder), "--output", str(folder / "out")])


def planned(folder, *, backbones=(), storage=None, **changes):
    """The plan, without the networks and the data that it does not look at."""
    config = config_of(folder, **changes)
    storage = storage or Storage()
    experiment = SimpleNamespace(
        config=config, rows=rows_of(config), backbones=dict.fromkeys(backbones), storage=storage
    )
    return plan(experiment, folder)


def sets(number):
    return {"teachers": {**CONFIG["teachers"], "sets": number}}


def test_with_one_set_everything_is_where_it_was(tmp_path):
    found = {str(run.folder.relative_to(tmp_path)): run for run in planned(tmp_path)}
    rows = ("alone", "kd", "feed_1", "feed_2", "after")
    students = [f"runs/{row}/seed_{seed}" for seed in (0, 5) for row in rows]
    assert list(found) == ["runs/teacher_1", "runs/teacher_2", *students]
    assert found["runs/teacher_2"].title == "teacher_2"
    assert found["runs/teacher_2"].initial_seed == found["runs/teacher_2"].order_seed == 1002
    assert found["runs/kd/seed_5"].title == "kd, seed 5"
    assert found["runs/kd/seed_5"].initial_seed == found["runs/kd/seed_5"].order_seed == 5


def test_sets_have_teachers_and_students_of_their_own(tmp_path):
    one, three = planned(tmp_path), planned(tmp_path, **sets(3))
    # The first set is the comparison with one: sets can be added to it.
    first = [run for run in three if run.teacher_set == 1]
    assert [(run.folder, run.initial_seed, run.order_seed) for run in first] == [
        (run.folder, run.initial_seed, run.order_seed) for run in one
    ]
    assert len({run.folder for run in three}) == len(three) == 3 * len(one)
    # What is paired is of the same set and, as the user wrote it, of the same seed.
    expected = {(row, number, seed) for row in ("alone", "kd", "feed_1", "feed_2", "after") for number in (1, 2, 3)
                for seed in (0, 5)}  # fmt: skip
    assert {(run.name, run.teacher_set, run.seed) for run in three if run.is_student} == expected
    for run in three:
        assert {other.teacher_set for other in run.depends_on} <= {run.teacher_set}
        assert run.epochs == (7 if run.is_teacher else 3)
    titles = [run.title for run in three if run.teacher_set == 2]
    assert titles[:3] == ["teacher_1, set 2", "teacher_2, set 2", "alone, seed 0, set 2"]


def test_each_set_has_a_store_for_the_rows_that_read(tmp_path):
    storage = Storage(kept_views=9, rows={"kd": Reads(1, True, ())})
    runs = planned(tmp_path, storage=storage, **sets(2))
    stores = [run for run in runs if run.makes_store]
    assert [(run.title, run.epochs) for run in stores] == [("store, set 1", 9), ("store, set 2", 9)]
    for run in runs:
        assert run.store == (stores[run.teacher_set - 1] if run.name == "kd" else None)
        assert not (run.makes_store and (run.is_student or run.is_teacher))
    for store in stores:
        assert [(each.name, each.teacher_set) for each in store.teachers] == [("teacher_1", store.teacher_set)]


def test_no_seed_is_drawn_twice(tmp_path):
    seeds = list(range(50))
    methods = {"feed": {**KD, "stages": 9}}
    teachers = {**CONFIG["teachers"], "number": 20, "sets": 40}
    runs = planned(tmp_path, seeds=seeds, methods=methods, teachers=teachers)
    # Rows that begin alike are meant to: the same student under other teachers.
    chain = [run for run in runs if run.name.startswith(("feed", "teacher"))]
    assert len({run.initial_seed for run in chain}) == len(chain)
    orders = [run.order_seed for run in runs if run.is_teacher or run.name == "alone"]
    assert len(set(orders)) == len(orders)
    assert all(0 <= run.initial_seed < 2**32 and 0 <= run.order_seed < 2**32 for run in runs)


def test_what_a_run_waits_for_stands_before_it(tmp_path):
    runs = planned(tmp_path, **sets(2))
    for earlier, run in itertools.accumulate(runs, lambda made, run: ([*made[0], made[1]], run), initial=([], None)):
        if run is not None:
            assert all(other in earlier for other in run.depends_on)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (sets(0), "teachers.sets must be at least 1, got 0"),
        ({"methods": {"search": KD}}, "'search' cannot be a method's name"),
        ({"methods": {"set_2": KD}}, "'set_2' cannot be a method's name"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("before", "now", "goes_on"), [(1, 3, True), (None, 3, True), (None, 1, True), (2, 2, True), (3, 2, False)]
)
def test_sets_can_be_added_to_a_folder(tmp_path, before, now, goes_on):
    config = config_of(tmp_path, **sets(now))
    plain = config.as_plain()
    plain["teachers"] = {key: value for key, value in plain["teachers"].items() if key != "sets"}
    plain["teachers"] |= {} if before is None else {"sets": before}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/compare.yaml").write_text(yaml.safe_dump(plain))
    if goes_on:
        command._check_folder(tmp_path / "out", config)
    else:
        with pytest.raises(InputError, match=r"another configuration \(teachers was"):
            command._check_folder(tmp_path / "out", config)
