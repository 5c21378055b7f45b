"""compare with teachers that one already has: of unlike kinds, in a list, never trained again."""

import json
import re

import pytest
import torch
from compare_files import compare, lines_of, write_config
from safetensors.torch import load_file, save_file

from distill_lightning import SmallCNN, SmallResNet
from distill_lightning.cli import main
from distill_lightning.studies.compare import attempt, trained_teachers
from distill_lightning.studies.compare.config import CompareConfig, TeachersConfig, parse_config
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.plan import plan

pytestmark = pytest.mark.slow


def pretrained(path, name, **options):
    network = {"class_path": name, "init_args": options}
    return {"class_path": "Pretrained", "init_args": {"network": network, "checkpoint": str(path)}}


@pytest.fixture
def config(tmp_path):
    """A comparison under a residual and a plain network; their weights are in files."""
    torch.manual_seed(5)
    networks = {"resnet": SmallResNet(10, width=4), "cnn": SmallCNN(10, width=4)}
    for name, network in networks.items():
        # As after some training: statistics that are not those of a new network.
        network.train()(torch.rand(64, 1, 8, 8))
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    layers = {"student_layer": "stage3", "teacher_layers": ["stage3", "features"], "beta": 20.0}
    return {
        "data": {
            "class_path": "DigitsDataModule",
            "init_args": {"subset": 64, "val_size": 50, "test_size": 100, "image_size": 8},
        },
        "teachers": [
            pretrained(tmp_path / "resnet.safetensors", "SmallResNet", width=4),
            pretrained(tmp_path / "cnn.safetensors", "SmallCNN", width=4),
        ],
        "student": {"class_path": "SmallResNet", "init_args": {"width": 2}},
        "methods": {
            "kd_one": {"class_path": "KDModule", "teachers": 1},
            "feed": {"class_path": "FEEDModule", "init_args": layers},
        },
        "epochs": 1,
        "seeds": [0],
        "accelerator": "cpu",
        "teachers_store": None,
    }


def test_unlike_teachers_are_rows_and_teach_but_are_not_trained(tmp_path, config, monkeypatch):
    trained, execute = [], attempt.execute

    def watched(experiment, run, *given):
        execute(experiment, run, *given)
        if not run.makes_store:
            trained.append((run.name, run.is_given, len(run.result().history)))

    monkeypatch.setattr(attempt, "execute", watched)
    shown = compare(write_config(config, tmp_path), tmp_path / "out")
    assert trained == [
        ("teacher_1", True, 0), ("teacher_2", True, 0), ("alone", False, 1), ("kd_one", False, 1), ("feed", False, 1)
    ]  # fmt: skip
    assert "teacher_1: done" in shown
    rows = {row["method"]: row for row in lines_of(tmp_path / "out/teachers.csv")}
    experiment = Experiment(parse_config([write_config(config, tmp_path)]))
    for name, file, network in (
        ("teacher_1", "resnet", SmallResNet(10, width=4)),
        ("teacher_2", "cnn", SmallCNN(10, width=4)),
    ):
        network.load_state_dict(load_file(tmp_path / f"{file}.safetensors"))
        hits = [
            int(network.eval()(batch.input)[row].argmax() == batch.target[row])
            for batch in experiment.sample.test_dataloader()
            for row in range(batch.size)
        ]
        assert float(rows[name]["test_accuracy"]) == pytest.approx(sum(hits) / 100)
        assert int(rows[name]["parameters"]) == sum(p.numel() for p in network.parameters())
        kept = load_file(tmp_path / f"out/runs/{name}/student.safetensors")
        assert all(torch.equal(value, kept[key]) for key, value in network.state_dict().items())
    table = (tmp_path / "out/results.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert names[2:7] == ["teacher_1", "teacher_2", "ensemble", "alone", "kd_one"]
    assert "Teachers, trained before: Pretrained(network=SmallResNet(width=4)" in table


@pytest.mark.usefixtures("undrawn")
def test_students_learn_from_the_teachers_that_are_given(tmp_path, config):
    """With nothing but the teacher's word for it, a student agrees with a teacher that always says 3."""
    teacher = SmallCNN(10, width=4)
    torch.nn.init.zeros_(teacher.head.weight)
    teacher.head.bias.data = 20.0 * torch.nn.functional.one_hot(torch.tensor(3), 10).float()
    save_file(teacher.state_dict(), tmp_path / "cnn.safetensors")
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    kd = {"class_path": "KDModule", "init_args": {"temperature": 1.0, "hard_label_weight": 0.0}}
    config.update(teachers=config["teachers"][1:], methods={"kd": kd}, optimizer=optimizer, epochs=8)
    compare(write_config(config, tmp_path), tmp_path / "out")
    logits = load_file(tmp_path / "out/runs/kd/seed_0/test_logits.safetensors")["last"]
    assert (logits.argmax(1) == 3).all()


def test_the_plan_has_no_training_of_them(tmp_path, config):
    experiment = Experiment(parse_config([write_config(config, tmp_path)]))
    assert experiment.config.teachers == TeachersConfig(given=config["teachers"])
    assert experiment.config.number_of_teachers == 2
    runs = plan(experiment, tmp_path)
    assert [(run.name, run.epochs, run.is_given, run.number) for run in runs if run.is_teacher] == [
        ("teacher_1", 0, True, 1),
        ("teacher_2", 0, True, 2),
    ]
    assert not any(run.is_given for run in runs if run.is_student)


def test_a_list_stands_for_the_key_given(config):
    keys = {name: config[name] for name in ("data", "student", "methods", "epochs", "seeds")}
    assert CompareConfig(**keys, teachers=config["teachers"]) == CompareConfig(
        **keys, teachers=TeachersConfig(given=config["teachers"])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(teachers=[]), "teachers, where it is a list, holds networks by class_path"),
        (lambda c: c.update(teachers=["SmallCNN"]), "teachers, where it is a list, holds networks by class_path"),
        (
            lambda c: c.update(teachers={"given": c["teachers"], "number": 5}),
            "are trained already .* leave out network",
        ),
        (lambda c: c["teachers"][1].update(class_path="Pretraind"), "teachers.1.*Pretraind"),
        (lambda c: c["teachers"][1]["init_args"].update(checkpoint="no.pt"), "no.pt"),
        (lambda c: c["teachers"][1]["init_args"]["network"]["init_args"].update(width=3), "cnn.safetensors"),
        (
            lambda c: c["teachers"][0].update(class_path="SmallResNet", init_args={}),
            "teachers.0 is to be trained already, and this",
        ),
        (lambda c: c["methods"]["kd_one"].update(teachers=3), "methods.kd_one.teachers must be between 1 and 2"),
        (
            lambda c: c["methods"]["feed"]["init_args"].update(teacher_layers=["stage3", "stage3"]),
            "methods.feed: .*stage3",
        ),
    ],
)
def test_what_cannot_teach_is_one_line_and_writes_nothing(tmp_path, config, capsys, change, message):
    change(config)
    assert main(["compare", write_config(config, tmp_path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_other_weights_under_the_same_name_are_refused(tmp_path, config, capsys):
    compare(write_config(config, tmp_path), tmp_path / "out")
    before = json.loads((tmp_path / "out/runs/feed/seed_0/result.json").read_text())
    save_file(SmallCNN(10, width=4).state_dict(), tmp_path / "cnn.safetensors")
    config["seeds"] = [0, 1]
    assert main(["compare", write_config(config, tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "teachers.1 has other weights than when" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/runs/feed/seed_0/result.json").read_text()) == before
    assert not (tmp_path / "out/runs/feed/seed_1").exists()


def test_what_is_no_number_is_no_other_weight():
    state = {"weight": torch.tensor([1.0, torch.nan])}
    assert trained_teachers._same(state, {"weight": state["weight"].clone()})
    assert not trained_teachers._same(state, {"weight": torch.tensor([1.0, 2.0])})
    assert not trained_teachers._same(state, {})
