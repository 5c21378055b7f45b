"""compare without teachers, of tasks that are measured by what modules log, with backbones, and paired by seed."""

import json
import math
import multiprocessing
import re
import shutil
import statistics
import time
import warnings

import pytest
import pytorch_lightning as pl
import torch
from compare_files import compare, lines_of, numbers_in, write_config
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import DigitsDataModule, InputError, SmallResNet, SupervisedModule
from distill_lightning.cli import main
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.plan import plan
from distill_lightning.testing import tiny_trainer

pytestmark = pytest.mark.slow


class Sentences(pl.LightningDataModule):
    """Something that says it is a translation."""

    task = "translation"
    num_classes = 5
    pad_id = 0
    input_shape = None

    def setup(self, stage=None):
        generator = torch.Generator().manual_seed(0)
        self.pairs = TensorDataset(torch.rand(24, 6, generator=generator), torch.arange(24) % 5)

    def train_dataloader(self):
        return DataLoader(self.pairs, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class Pictures(Sentences):
    """Something that says it is a detection."""

    task = "detection"
    in_channels = 1

    def setup(self, stage=None):
        generator = torch.Generator().manual_seed(0)
        self.pairs = TensorDataset(torch.rand(24, 1, 8, 8, generator=generator), torch.arange(24) % 5)


class Translator(SupervisedModule):
    """Logs a BLEU and a chrF that are functions of its weights."""

    def __init__(self, student: nn.Module, *, num_classes: int, pad_id: int, factor: float = 1.0, **options: object):
        super().__init__(student, num_classes=num_classes, **options)
        self.factor = factor

    @property
    def signatures(self):
        return {"bleu": "nrefs:1|tok:13a"}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        total = next(self.student.parameters()).detach().double().sum()
        self.log_dict({"test/bleu": 10 + total, "test/chrf": self.factor * total}, on_epoch=True)
        return super().test_step(batch, batch_idx, dataloader_idx)


class Detector(SupervisedModule):
    def _logged(self, stage):
        total = next(self.student.parameters()).detach().double().abs().mean()
        self.log_dict({f"{stage}/{name}": total for name in ("map", "map_50", "voc07_map_50", "map_class_shoe")})

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self._logged("val")
        return super().validation_step(batch, batch_idx, dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self._logged("test")
        return super().test_step(batch, batch_idx, dataloader_idx)


def flat_net(num_classes: int, width: int = 4) -> nn.Module:
    """A network without a place for weights of another."""
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, num_classes))


class Detecting(nn.Module):
    """A classifier's layers under a head of its own."""

    def __init__(self, num_classes: int, backbone: nn.Module, backbone_weights: str | None = None):
        super().__init__()
        self.backbone = backbone
        self.backbone.head = nn.Linear(backbone.head.in_features, num_classes)
        if backbone_weights is not None:
            own = {key: value for key, value in backbone.state_dict().items() if key.startswith("head")}
            self.backbone.load_state_dict(load_file(backbone_weights) | own)

    def forward(self, images):
        return self.backbone(images)


TRANSLATION = {
    "data": {"class_path": f"{__name__}.Sentences"},
    "student": {"class_path": f"{__name__}.flat_net"},
    "supervised": {"class_path": f"{__name__}.Translator"},
    "methods": {
        "same": {"class_path": f"{__name__}.Translator"},
        "slow": {
            "class_path": f"{__name__}.Translator",
            "init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.001}}},
        },
    },
    "epochs": 2,
    "seeds": [0, 1, 2],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
    "accelerator": "cpu",
}
DIGITS = {
    "class_path": "DigitsDataModule",
    "init_args": {"subset": 64, "val_size": 50, "test_size": 50, "image_size": 8},
}
BACKBONE = {
    "class_path": "SupervisedModule",
    "data": DIGITS,
    "epochs": 2,
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
}
DETECTION = {
    "data": {"class_path": f"{__name__}.Pictures"},
    "student": {
        "class_path": f"{__name__}.Detecting",
        "init_args": {"backbone": {"class_path": "SmallResNet", "init_args": {"width": 2}}},
    },
    "backbones": {
        "plain": BACKBONE,
        "self_kd": {**BACKBONE, "class_path": "SelfKDModule", "init_args": {"alpha_T": 0.8, "past": "PastModel"}},
    },
    "supervised": {"class_path": f"{__name__}.Detector", "backbone": "plain"},
    "methods": {
        "b1": {"class_path": f"{__name__}.Detector", "backbone": "self_kd"},
        "b2": {"class_path": f"{__name__}.Detector", "backbone": "plain"},
        "scratch": {"class_path": f"{__name__}.Detector"},
    },
    "epochs": 1,
    "seeds": [0, 1],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}},
    "accelerator": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def translated(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("translated")
    return folder, compare(write_config(TRANSLATION, folder), folder / "out")


def test_a_translation_is_scored_by_what_its_test_logs(translated):
    folder, shown = translated
    header = (folder / "out/results.csv").read_text().splitlines()[0]
    assert header.startswith("method,seed,test_bleu,test_bleu_selected,chrf,nll,ece,perplexity,accuracy,")
    assert header.endswith(",parameters,seconds_per_epoch,peak_memory,shared")
    data = Sentences()
    data.setup()
    for line in lines_of(folder / "out/results.csv"):
        place = folder / "out/runs" / line["method"] / f"seed_{line['seed']}"
        last, selected = (load_file(place / f"{name}.safetensors") for name in ("student", "selected"))
        assert float(line["test_bleu"]) == pytest.approx(10 + float(last["0.weight"].double().sum()))
        assert float(line["test_bleu_selected"]) == pytest.approx(10 + float(selected["0.weight"].double().sum()))
        network = flat_net(5)
        network.load_state_dict(last)
        with torch.no_grad():
            nll = nn.functional.cross_entropy(network(data.pairs.tensors[0]), data.pairs.tensors[1])
        assert float(line["nll"]) == pytest.approx(float(nll), rel=1e-5)
        assert not (place / "test_logits.safetensors").exists()
        history = json.loads((place / "result.json").read_text())["history"]
        epochs = [entry["val/nll"] for entry in history]
        assert json.loads((place / "result.json").read_text())["selected_epoch"] == 1 + epochs.index(min(epochs))
    text = (folder / "out/results.md").read_text()
    assert "| row | BLEU | sel. | chrF | NLL | params | s/epoch | peak MB |" in text
    assert "nrefs:1|tok:13a" in text
    assert "nrefs:1|tok:13a" in shown
    assert "test sentences, no epoch chosen on them" in text
    assert "ensemble" not in text
    assert "teacher" not in text
    assert not (folder / "out/teachers.csv").exists()
    assert "validation NLL" in shown
    for name in ("bleu.png", "learning_curves.png"):
        assert (folder / "out/figures" / name).stat().st_size > 0


def test_rows_are_paired_with_the_student_alone_by_seed(translated):
    folder, shown = translated
    scores = {(line["method"], line["seed"]): line for line in lines_of(folder / "out/results.csv")}
    found = lines_of(folder / "out/paired.csv")
    columns = ["test_bleu", "chrf", "nll", "ece"]
    assert {(line["baseline"], line["sets"], line["pairs"]) for line in found} == {("alone", "1", "3")}
    assert [(line["method"], line["column"]) for line in found] == [(m, c) for m in ("same", "slow") for c in columns]
    text = (folder / "out/results.md").read_text()
    for line in found:
        name = line["column"]
        differences = [float(scores[line["method"], s][name]) - float(scores["alone", s][name]) for s in "012"]
        mean, sd = sum(differences) / 3, statistics.stdev(differences)
        assert float(line["mean"]) == pytest.approx(mean, abs=1e-9)
        assert float(line["sd"]) == pytest.approx(sd, abs=1e-9)
        worse = name in ("nll", "ece")
        better = sum(d < 0 if worse else d > 0 for d in differences)
        assert int(line["better"]) == better
        # A table's 97.5 % of Student's t with 2 degrees of freedom.
        half = 4.3027 * sd / math.sqrt(3)
        assert (float(line["low"]), float(line["high"])) == pytest.approx((mean - half, mean + half), abs=1e-3)
        is_noise = abs(mean) <= half
        assert line["within_noise"] == str(is_noise)
        if name == "test_bleu":
            bounds = f"[{mean - half + 0.0:+.2f}, {mean + half + 0.0:+.2f}]"
            assert f"| {line['method']} | {'≈ ' if is_noise else ''}{mean + 0.0:+.2f} {bounds} |" in text
    assert "| minus alone, 3 seeds | BLEU | chrF | NLL |" in text
    for written_or_shown in (text, shown):
        assert "slow: " in written_or_shown
        assert "the interval holds 0" in written_or_shown


def test_one_seed_has_no_differences(tmp_path):
    shown = compare(write_config(TRANSLATION, tmp_path, lambda config: config.update(seeds=[4])), tmp_path / "out")
    assert not (tmp_path / "out/paired.csv").exists()
    assert "minus alone" not in shown
    assert "One run a row: nothing tells how far these figures would vary." in shown


def test_classifiers_are_compared_without_teachers(tmp_path):
    def change(config):
        config.update(data=DIGITS, student={"class_path": "SmallResNet", "init_args": {"width": 2}}, epochs=1)
        config.update(seeds=[0, 1], confidence=True)
        del config["supervised"]
        config["methods"] = {
            "self_kd": {"class_path": "SelfKDModule", "init_args": {"alpha_T": 0.5}},
            "again": {"class_path": "KDModule", "teachers": "alone"},
        }

    shown = compare(write_config(TRANSLATION, tmp_path, change), tmp_path / "out")
    header = (tmp_path / "out/results.csv").read_text().splitlines()[0]
    assert header == (
        "method,seed,test_accuracy,test_accuracy_selected,nll,ece,brier,aurc,eaurc,top5,parameters,seconds_per_epoch,"
        "peak_memory,shared"
    )
    text = (tmp_path / "out/results.md").read_text()
    assert "| row | test % | sel. % | NLL | ECE % | Brier | AURC ‰ | E-AURC ‰ | params | s/epoch | peak MB |" in text
    for word in ("ensemble", "agree", "gap", "teacher"):
        assert word not in text
        assert word not in shown
    assert sorted(path.name for path in (tmp_path / "out/runs").iterdir()) == ["again", "alone", "self_kd"]
    for name in ("accuracy", "learning_curves", "reliability"):
        assert (tmp_path / f"out/figures/{name}.png").stat().st_size > 0
    # Called again, nothing is trained.
    before = (tmp_path / "out/results.csv").read_bytes()
    compare(write_config(TRANSLATION, tmp_path, change), tmp_path / "out")
    assert (tmp_path / "out/results.csv").read_bytes() == before


KD = {"class_path": "KDModule"}
NETWORK = {"class_path": "SmallResNet"}


NUMBERS = {"class_path": "distill_lightning.testing.TinyDataModule", "init_args": {"num_targets": 1}}


def plain_by(class_path):
    return lambda config: config["backbones"]["plain"].update(class_path=class_path)


def with_methods(**methods):
    return lambda config: config["methods"].update(methods)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TRANSLATION, with_methods(kd=KD), "methods.kd: KDModule takes teachers, and the comparison has none"),
        (TRANSLATION, with_methods(kd={**KD, "teachers": 1}), "methods.kd.teachers is 1, but the comparison has"),
        (TRANSLATION, lambda c: c.update(teachers={"number": 2}), "teachers.network is missing"),
        (TRANSLATION, lambda c: c.update(teachers={"network": NETWORK}), "teachers: Sentences is for a task"),
        (TRANSLATION, lambda c: c.update(backbones={"plain": BACKBONE}), "backbones: .*flat_net, the student, has"),
        (TRANSLATION, lambda c: c["supervised"].update(backbone="x"), "supervised.backbone: 'x' is none"),
        (DETECTION, lambda c: c["methods"]["b1"].update(backbone="x"), "methods.b1.backbone: 'x' is none .* plain"),
        (DETECTION, lambda c: c["methods"]["b1"].update(initial="alone"), "methods.b1: initial and backbone both"),
        (DETECTION, with_methods(backbone_plain=KD), "'backbone_plain' cannot be a method's name"),
        (DETECTION, lambda c: c["backbones"]["plain"].pop("data"), "backbones.plain: expected data and epochs"),
        (DETECTION, lambda c: c["backbones"]["plain"].update(epochs=0), "backbones.plain: expected data and epochs"),
        (DETECTION, lambda c: c["backbones"]["plain"].update(epoch=1), "backbones.plain: unknown key 'epoch'"),
        (DETECTION, lambda c: c["backbones"]["plain"].update(class_path="Supr"), "backbones.plain.*Supr"),
        (DETECTION, lambda c: c["backbones"]["plain"].update(data=c["data"]), "backbones.plain.data: a backbone le"),
        (DETECTION, lambda c: c["backbones"]["plain"].update(data=NUMBERS), "backbones.plain.data: a backbone le"),
        (DETECTION, plain_by("SelfKDDetectionModule"), "backbones.plain: a backbone is .* and SelfKDDetectionModule"),
        (DETECTION, plain_by("TranslationModule"), "backbones.plain: a backbone is .*, and TranslationModule trains"),
        (DETECTION, plain_by("RegressionModule"), "backbones.plain: a backbone is a classifier's, and RegressionM"),
        (DETECTION, lambda c: c["backbones"]["plain"]["optimizer"]["init_args"].update(lr=-1), "Invalid learning rate"),
        (DETECTION, lambda c: c["student"]["init_args"]["backbone"]["init_args"].update(widht=3), "widht"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, config, change, message):
    assert main(["compare", write_config(config, tmp_path, change), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_keys_inside_of_a_spec_are_given_on_the_command_line(tmp_path):
    line = [
        "--data.init_args.data_dir=here", "--methods.b1.init_args.width", "3", "--epochs", "7",
        "--student.init_args.backbone.init_args.width=5", "--backbones.plain.data.init_args.subset", "[1, 2]",
    ]  # fmt: skip
    config = parse_config([write_config(DETECTION, tmp_path), *line])
    assert config.data["init_args"] == {"data_dir": "here"}
    assert config.methods["b1"]["init_args"] == {"width": 3}
    assert config.student["init_args"]["backbone"]["init_args"] == {"width": 5}
    assert config.backbones["plain"]["data"]["init_args"]["subset"] == [1, 2]
    assert config.backbones["plain"]["data"]["init_args"]["val_size"] == 50
    assert config.epochs == 7
    for given, message in (
        (["--data.init_args.size"], "--data.init_args.size needs a value"),
        (["--data.init_args.size", "--epochs"], "--data.init_args.size needs a value"),
        (["--methods.none.init_args.size", "3"], "there is no methods.none with keys of its own"),
        (["--lr_scheduler.init_args.size", "3"], "there is no lr_scheduler with keys of its own"),
        (["--data.init_args.size", "{"], "--data.init_args.size is no YAML"),
    ):
        with pytest.raises(InputError, match=message):
            parse_config([write_config(DETECTION, tmp_path), *given])


@pytest.mark.usefixtures("undrawn")
def test_what_the_data_warn_of_is_said_once(tmp_path, monkeypatch):
    def setup(data, stage=None):
        if not hasattr(data, "pairs"):
            warnings.warn("2 sentences (of 26) were left out", stacklevel=2)
            original(data)

    original = Sentences.setup
    monkeypatch.setattr(Sentences, "setup", setup)
    with pytest.warns(UserWarning, match="2 sentences") as caught:
        compare(write_config(TRANSLATION, tmp_path, lambda config: config.update(seeds=[0])), tmp_path / "out")
    assert len([warning for warning in caught if "2 sentences (of 26)" in str(warning.message)]) == 1


def test_an_unknown_task_and_a_test_that_logs_no_headline_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Sentences, "task", "parsing")
    with pytest.raises(InputError, match="Sentences is for the task 'parsing', which compare does not know"):
        Experiment(parse_config([write_config(TRANSLATION, tmp_path)]))
    monkeypatch.setattr(Sentences, "task", "translation")
    silent = {"class_path": "SupervisedModule"}
    config = write_config(TRANSLATION, tmp_path, lambda config: config.update(supervised=silent, methods={}, seeds=[0]))
    compare(config, tmp_path / "out")
    said = (tmp_path / "out/results.md").read_text()
    assert re.search("alone, seed 0: SupervisedModule logged no test/bleu in its test, only .*test/nll", said)


@pytest.fixture(scope="module")
def detected(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("detected")
    return folder, compare(write_config(DETECTION, folder), folder / "out")


def test_a_detection_is_scored_by_its_precision(detected):
    folder, shown = detected
    text = (folder / "out/results.md").read_text()
    assert "| row | mAP % | sel. % | mAP@50 % | VOC07 mAP@50 % | params | s/epoch | peak MB |" in text
    header = (folder / "out/results.csv").read_text().splitlines()[0]
    assert header.startswith("method,seed,test_map,test_map_selected,map_50,voc07_map_50,ece,")
    assert "map_class_shoe" in header
    assert "Backbone self_kd: SelfKDModule(alpha_T=0.8, past=PastModel) on DigitsDataModule(subset=64" in text
    assert len(re.findall(r"2 epochs \(validation accuracy [\d.]+ %, validation accuracy [\d.]+ %\)\.", text)) == 2
    assert "Student: Detecting(backbone=SmallResNet(width=2))" in text
    assert "backbone_plain, seed 0: validation accuracy" in shown
    assert "alone, seed 0: validation mAP@50" in shown
    assert {line["method"] for line in lines_of(folder / "out/results.csv")} == {"alone", "b1", "b2", "scratch"}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_begins_with_the_backbone_of_its_seed_and_the_head_of_all(detected, seed):
    folder, _ = detected
    runs = folder / "out/runs"
    torch.manual_seed(seed)
    network = SmallResNet(10, width=2)
    module = SupervisedModule(
        network, num_classes=10, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    )
    data = DigitsDataModule(**DIGITS["init_args"], order_seed=seed)
    tiny_trainer(max_epochs=2).fit(module, datamodule=data)
    plain = load_file(runs / f"backbone_plain/seed_{seed}/backbone.safetensors")
    assert plain
    for key, value in plain.items():
        assert torch.allclose(network.state_dict()[key].double(), value.double(), rtol=1e-4, atol=1e-6), key
    # Their rate is zero: parameters stay where they began.
    parameters = [name for name, _ in network.named_parameters() if not name.startswith("head")]
    students = {
        name: load_file(runs / f"{name}/seed_{seed}/student.safetensors") for name in ("alone", "b1", "b2", "scratch")
    }
    own = load_file(runs / f"backbone_self_kd/seed_{seed}/backbone.safetensors")
    for key in parameters:
        assert torch.equal(students["alone"][f"backbone.{key}"], plain[key])
        assert torch.equal(students["b2"][f"backbone.{key}"], plain[key])
        assert torch.equal(students["b1"][f"backbone.{key}"], own[key])
    assert any(not torch.equal(plain[key], own[key]) for key in parameters)
    torch.manual_seed(seed)
    drawn = Detecting(5, SmallResNet(5, width=2)).state_dict()
    for name, state in students.items():
        assert torch.equal(state["backbone.head.weight"], drawn["backbone.head.weight"]), name
    assert torch.equal(students["scratch"][f"backbone.{parameters[0]}"], drawn[f"backbone.{parameters[0]}"])


def test_backbones_of_one_seed_begin_alike(tmp_path):
    experiment = Experiment(parse_config([write_config(DETECTION, tmp_path)]))
    states = []
    for run in plan(experiment, tmp_path)[:2]:
        assert run.makes_backbone
        torch.manual_seed(run.initial_seed)
        states.append(experiment.backbones[run.makes_backbone].module().student.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


@pytest.mark.usefixtures("undrawn")
def test_a_backbone_is_added_and_none_is_changed(detected, tmp_path, capsys):
    folder, _ = detected
    shutil.copytree(folder / "out", tmp_path / "out")

    def more(config):
        config["backbones"]["short"] = {**BACKBONE, "epochs": 1}
        config["methods"]["b3"] = {"class_path": f"{__name__}.Detector", "backbone": "short"}

    shown = compare(write_config(DETECTION, tmp_path, more), tmp_path / "out")
    assert re.findall(r"^(\S+, seed \d): ", shown, flags=re.MULTILINE) == [
        f"{name}, seed {seed}" for seed in (0, 1) for name in ("backbone_short", "b3")
    ]

    def other(config):
        config["backbones"]["plain"] = {**BACKBONE, "epochs": 1}

    assert main(["compare", write_config(DETECTION, tmp_path, other), "--output", str(tmp_path / "out")]) == 2
    assert "belongs to another configuration (backbones was" in capsys.readouterr().err


def test_a_backbone_without_finite_numbers_leaves_its_rows_without_scores(tmp_path):
    def diverging(config):
        config.update(seeds=[0])
        config["backbones"]["self_kd"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e12}}

    compare(write_config(DETECTION, tmp_path, diverging), tmp_path / "out")
    text = (tmp_path / "out/results.md").read_text()
    assert "backbone_self_kd, seed 0: SelfKDModule: " in text
    assert "b1, seed 0: backbone_self_kd, seed 0, from which it learns, has no finite numbers" in text
    assert [line["test_map"] == "nan" for line in lines_of(tmp_path / "out/results.csv")] == [False, True, False, False]


@pytest.mark.parametrize(
    ("config", "after"),
    [
        (TRANSLATION, "runs/same/seed_1/last.ckpt"),
        (DETECTION, "runs/backbone_self_kd/seed_0/last.ckpt"),
        (DETECTION, "runs/b1/seed_1/last.ckpt"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_killed_comparison_ends_like_an_undisturbed_one(request, tmp_path, config, after, start_method):
    folder, _ = request.getfixturevalue("translated" if config is TRANSLATION else "detected")
    path = write_config(config, tmp_path)
    process = multiprocessing.get_context(start_method).Process(target=compare, args=(path, tmp_path / "out"))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / after).exists() and not (tmp_path / "out" / after).with_name("result.json").exists():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline, f"{after} did not appear"
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not (tmp_path / "out/results.csv").exists()
    compare(path, tmp_path / "out")

    assert numbers_in(tmp_path / "out/results.csv") == numbers_in(folder / "out/results.csv")
    assert (tmp_path / "out/paired.csv").read_bytes() == (folder / "out/paired.csv").read_bytes()
