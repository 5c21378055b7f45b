"""compare as a function: the command line's numbers from Python's objects, what it returns, and what it refuses."""

import copy
import io
import os
import pickle
import re
import statistics
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest
import torch
import yaml
from compare_files import numbers_in
from rich.console import Console
from torch import nn
from torch.optim import SGD

from distill_lightning import (
    Comparison,
    DigitsDataModule,
    FEEDModule,
    InputError,
    KDModule,
    OneCycle,
    SmallResNet,
    compare,
)
from distill_lightning.cli import main
from distill_lightning.studies.compare import given as carriers
from distill_lightning.studies.compare.blueprint import Blueprint
from distill_lightning.studies.compare.from_python import config_from
from distill_lightning.studies.compare.python_digest import import_path, python_digest

DATA = {"subset": 64, "val_size": 50, "test_size": 100, "image_size": 8}
CONFIG = {
    "data": {"class_path": "DigitsDataModule", "init_args": DATA},
    "teachers": {"network": {"class_path": "SmallResNet", "init_args": {"width": 4}}, "number": 1},
    "student": {"class_path": "SmallResNet", "init_args": {"width": 2}},
    "methods": {
        "kd": {"class_path": "KDModule", "init_args": {"temperature": 3.0}},
        "feed": {"class_path": "FEEDModule", "init_args": {"student_layer": "stage3", "beta": 20.0}},
    },
    "epochs": 2,
    "seeds": [0, 1],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
    "lr_scheduler": {"class_path": "OneCycle"},
    "accelerator": "cpu",
}
QUIET = Console(quiet=True)


class Interrupted(KDModule):
    """One whose second epoch is interrupted, once."""

    left = 1

    def on_train_epoch_start(self):
        if self.current_epoch == 1 and Interrupted.left:
            Interrupted.left -= 1
            raise KeyboardInterrupt


def from_objects(output):
    """The comparison of CONFIG, of whatever Python may give."""

    class Own(KDModule):
        """One that no other process can import."""

    return {
        "data": DigitsDataModule(**DATA),
        "teachers": {"network": SmallResNet(10, width=4), "number": 1},
        "student": lambda: SmallResNet(10, width=2),
        "methods": {
            "kd": lambda s, ts: Own(s, ts, num_classes=10, temperature=3.0),
            "feed": partial(FEEDModule, student_layer="stage3", beta=20.0),
        },
        "epochs": 2,
        "seeds": range(2),
        "optimizer": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
        "lr_scheduler": OneCycle,
        "accelerator": "cpu",
        "output": output,
        "console": QUIET,
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of one comparison, from the command line and from Python, and what compare returned."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("api")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    assert main(["compare", str(folder / "config.yaml"), "--output", str(folder / "command")]) == 0
    return folder, compare(**from_objects(folder / "python"))


@pytest.mark.slow
def test_objects_give_the_command_lines_numbers(folders):
    folder, _ = folders
    for name in ("results.csv", "teachers.csv"):
        expected = numbers_in(folder / "command" / name)
        assert len(expected) > 0
        assert numbers_in(folder / "python" / name) == expected


@pytest.mark.slow
def test_a_file_and_classes_go_on_where_the_command_line_stopped(folders):
    folder, _ = folders
    made = {path: path.stat().st_mtime_ns for path in folder.glob("command/runs/**/result.json")}
    partials = {
        "teachers": {"network": partial(SmallResNet, width=4), "number": 1},
        "student": {"class_path": SmallResNet, "init_args": {"width": 2}},
        "optimizer": partial(SGD, lr=0.05, momentum=0.9),
    }
    again = compare(folder / "config.yaml", output=str(folder / "command"), console=QUIET, **partials)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("command/runs/**/result.json")} == made
    assert repr(again) == repr(Comparison.load(folder / "command"))


@pytest.mark.slow
def test_the_table_and_the_runs_are_numbers(folders, monkeypatch):
    folder, comparison = folders
    lines = numbers_in(folder / "python/results.csv")
    accuracies = [float(line["test_accuracy"]) for line in lines if line["method"] == "kd"]
    assert list(comparison.table.index) == ["teacher_1", "ensemble", "alone", "kd", "feed"]
    assert comparison.table.loc["kd", "test_accuracy"] == pytest.approx(statistics.fmean(accuracies))
    assert comparison.table.loc["kd", "test_accuracy_sd"] == pytest.approx(statistics.stdev(accuracies))
    kd = comparison.runs[comparison.runs["method"] == "kd"]
    assert kd["test_accuracy"].tolist() == accuracies
    assert isinstance(comparison.runs, pd.DataFrame)

    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [row["row"] for row in comparison.table] == ["teacher_1", "ensemble", "alone", "kd", "feed"]
    assert comparison.table[3]["test_accuracy"] == pytest.approx(statistics.fmean(accuracies))


@pytest.mark.slow
def test_a_notebook_shows_the_table_and_the_figures_and_print_the_table(folders):
    folder, comparison = folders
    loaded = Comparison.load(folder / "python")
    shown = loaded._repr_html_()
    for cell in ("feed", *(text for row in comparison.report.rows() for text in row)):
        assert cell in shown
        assert cell in str(loaded)
    assert shown.count("data:image/png;base64,") == len(comparison.figures) >= 2
    assert set(comparison.figures) == {path.stem for path in (folder / "python/figures").glob("*.png")}
    heading = (folder / "python/results.md").read_text()
    assert "`distill_lightning.compare(...)`" in heading
    assert "Data: DigitsDataModule(" in heading


@pytest.mark.slow
def test_a_folder_goes_on_only_with_the_functions_that_it_was_begun_with(folders):
    folder, _ = folders
    given = from_objects(folder / "python")
    given["methods"]["kd"] = lambda s, ts: KDModule(s, ts, num_classes=10, temperature=4.0)
    with pytest.raises(InputError, match=r"belongs to another configuration \(methods was .*given in Python: lambda s"):
        compare(**given)


@pytest.mark.slow
def test_the_same_call_goes_on_after_an_interrupt(tmp_path, folders):
    _, undisturbed = folders
    shown = io.StringIO()
    given = from_objects(str(tmp_path)) | {"console": Console(file=shown)}
    given["methods"] = {"kd": lambda s, ts: Interrupted(s, ts, num_classes=10, temperature=3.0)}
    with pytest.raises(KeyboardInterrupt):
        compare(**given)
    assert re.search(r"Interrupted: \d of \d runs are finished and kept", shown.getvalue())
    assert Interrupted.left == 0
    comparison = compare(**given)
    measured = ["seconds_per_epoch", "seconds_per_epoch_sd", "peak_memory"]
    expected = undisturbed.table.drop(index="feed", columns=measured)
    pd.testing.assert_frame_equal(comparison.table[expected.columns], expected)


TRAINED = SmallResNet(10, width=2)
with torch.no_grad():
    TRAINED.head.weight.mul_(3)


class Token(nn.Module):
    """One with a parameter that nothing draws."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"student": TRAINED}, "student: a network object .* head.weight of this SmallResNet is not distributed as"),
        ({"student": Token()}, "token of this Token is drawn by no layer's reset_parameters: give a function"),
        ({"student": 3}, "student: expected a class_path, an object or a function that makes one, got 3"),
        ({"teachers": SmallResNet(10)}, r"teachers is a network: give \[network\] if it is trained already"),
        ({"methods": {"kd": nn.Linear(1, 1)}}, "methods.kd: this Linear belongs to one student"),
        ({"epoch": 3}, "Option 'epoch' is not accepted"),
        ({"epochs": "long"}, "epochs: Expected a <class 'int'>. Got value: long"),
        ({"teachers": "x"}, "teachers is a network and a number, .* or a list of networks .* got 'x'"),
        ({"confidence": "yes"}, "confidence must be true or false, got 'yes'"),
        ({"retry": 1}, "retry must be true or false, got 1"),
        ({"anew": None}, "anew must be true or false, got None"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"search": {"kd": {"temperature": [len]}}}, "search.kd.temperature.0: len was given in Python, and values to"),
        ({"student": lambda: 3}, "student: lambda makes a int, and a Module is needed here"),
        ({"methods": {"kd": lambda: 3}}, "methods.kd: lambda makes a int, and a LightningModule is needed here"),
        (
            {"methods": {"kd": lambda s, ts, *, b: 3}},
            "methods.kd: lambda s, ts, b is called with other .*argument: 'b'",
        ),
        ({"teachers": [lambda: SmallResNet(10)]}, "teachers.0 is to be trained already, and this SmallResNet begins"),
        ({"methods": {"kd": lambda s, t: s}}, "methods.kd: lambda s, t makes a SmallResNet, and a "),
        ({"data": lambda: 3}, "data: lambda makes a int, and a LightningDataModule is needed here"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(keys, message, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        compare({**CONFIG, **keys}, output=str(tmp_path / "none"), console=QUIET)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone.yaml cannot be read: .*No such file"):
        compare(tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match=r"list.yaml has no keys"):
        compare(tmp_path / "list.yaml")


def plain_network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("make", [plain_network, partial(SmallResNet, 10, width=2)])
def test_a_network_object_stands_for_those_that_its_constructor_makes(make):
    torch.manual_seed(1)
    blueprint = Blueprint("student", make())
    torch.manual_seed(5)
    expected = make().state_dict()
    torch.manual_seed(5)
    found = blueprint().state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_that_were_trained_are_not_thrown_away():
    network = plain_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    network(torch.rand(8, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    with pytest.raises(InputError, match=r"copy.deepcopy\(network\), where every run is to begin with these weights"):
        Blueprint("student", network)


def test_finished_teachers_keep_their_weights():
    config = config_from({**CONFIG, "teachers": [TRAINED, {"class_path": "SmallCNN"}]}, {})
    made = config.teachers.given[0]["class_path"].make()
    assert made is not TRAINED
    assert torch.equal(made.head.weight, TRAINED.head.weight)
    plain = config.as_plain()["teachers"]["given"]
    assert plain[0]["class_path"].startswith("given in Python: SmallResNet (")
    assert config_from(config, {}).as_plain() == config.as_plain()


TEMPERATURE = 4.0


def functions():
    """Pairs of functions that differ, each in another way."""

    def closed_over(beta):
        return lambda: beta

    def in_class(number):
        class Local(KDModule):
            def terms(self, batch):
                return number

        return Local

    network = nn.Linear(2, 2)
    return {
        "a constant": (lambda: 1, lambda: 2),
        "a name": (lambda x: x.real, lambda x: x.imag),
        "a default": (lambda x=1: x, lambda x=2: x),
        "a closure": (closed_over(1), closed_over(2)),
        "a global": (lambda: TEMPERATURE, lambda: CONFIG),
        "an inner function": (lambda: lambda: 1, lambda: lambda: 2),
        "an option": (partial(closed_over, 1), partial(closed_over, 2)),
        "a class": (in_class(1), in_class(2)),
        "a network": (lambda: network, lambda: copy.deepcopy(network)),
    }


def test_what_differs_has_another_digest_and_what_does_not_the_same(monkeypatch):
    for (name, (one, other)), (same, _) in zip(functions().items(), functions().values(), strict=True):
        assert python_digest(one) != python_digest(other), name
        assert python_digest(one) == python_digest(same) or name == "a network", name
    before = python_digest(functions()["a global"][0])
    monkeypatch.setitem(globals(), "TEMPERATURE", 5.0)
    assert python_digest(functions()["a global"][0]) != before


def test_a_network_counts_by_its_layers_or_by_its_weights_too():
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    assert python_digest(one, weights=False) == python_digest(other, weights=False)
    assert python_digest(one, weights=False) != python_digest(nn.Linear(2, 4), weights=False)
    assert python_digest(one) != python_digest(other)
    assert python_digest(one) == python_digest(copy.deepcopy(one))


@pytest.mark.slow
def test_a_digest_is_the_same_in_every_process():
    code = (
        "from distill_lightning.studies.compare.python_digest import python_digest\n"
        "class A:\n    def f(self): return {'x', 'y', 'z'}\n"
        "found = python_digest(lambda number=1: (A, {'a', 'b', 'c'}))"
    )
    here = {"__name__": "__main__"}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(found)"],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here["found"]


def test_classes_have_the_names_that_yaml_gives_them():
    assert import_path(SmallResNet) == "SmallResNet"
    assert import_path(SGD) == "torch.optim.SGD"
    assert import_path(compare) == "distill_lightning.compare"
    assert import_path(lambda: 1) is None


def test_functions_go_to_other_processes_where_something_can_send_them(monkeypatch):
    config = config_from({**CONFIG, "student": lambda: SmallResNet(10, width=2)}, {"workers": 2})
    sent = pickle.loads(pickle.dumps(config))
    assert sent.as_plain() == config.as_plain()
    assert isinstance(sent.student["class_path"].make(), SmallResNet)
    monkeypatch.setattr(carriers, "_by_value", lambda: None)
    with pytest.raises(InputError, match=r"student: lambda cannot be sent to another process .* give workers=1"):
        config_from({**CONFIG, "student": lambda: SmallResNet(10, width=2)}, {"workers": 2})
