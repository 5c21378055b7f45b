"""compare: what it writes, that it resumes, and what it refuses."""

import io
import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypedDict, Unpack

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from compare_files import compare, lines_of, numbers_of, write_config
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from distill_lightning import (
    DigitsDataModule,
    DocstringsDataModule,
    FEEDModule,
    InputError,
    KDModule,
    OneCycle,
    ParaphraserModule,
    SmallResNet,
    SupervisedModule,
)
from distill_lightning.cli import main
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.studies.compare import attempt, runner
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.output import table_of
from distill_lightning.testing import tiny_trainer

pytestmark = pytest.mark.slow

CONFIG = {
    "data": {
        "class_path": "DigitsDataModule",
        "init_args": {"subset": 128, "val_size": 100, "test_size": 200, "image_size": 8},
    },
    "teachers": {"network": {"class_path": "SmallResNet", "init_args": {"width": 4}}, "number": 2, "epochs": 12},
    "student": {"class_path": "SmallResNet", "init_args": {"width": 2}},
    "methods": {
        "kd_one": {"class_path": "KDModule", "teachers": 1},
        "feed": {"class_path": "FEEDModule", "init_args": {"student_layer": "stage3", "beta": 20.0}},
    },
    "epochs": 3,
    "seeds": [0, 1],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
    "lr_scheduler": {"class_path": "OneCycle"},
    "accelerator": "cpu",
}  # fmt: skip


written = partial(write_config, CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison: its folder, and what it printed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare")
    return folder, compare(written(folder), folder / "out")


def test_results_have_a_row_per_method_and_seed(finished):
    folder, _ = finished
    text = (folder / "out/results.csv").read_text()
    assert text.splitlines()[0] == (
        "method,seed,test_accuracy,test_accuracy_selected,nll,ece,brier,aurc,eaurc,top5,agreement,teacher_kl,"
        "gap_closed,parameters,seconds_per_epoch,peak_memory,shared"
    )
    rows = lines_of(folder / "out/results.csv")
    expected = [(name, str(seed)) for seed in (0, 1) for name in ("alone", "kd_one", "feed")]
    assert [(row["method"], row["seed"]) for row in rows] == expected
    parameters = sum(p.numel() for p in SmallResNet(10, width=2).parameters())
    assert {row["parameters"] for row in rows} == {str(parameters)}
    assert [row["method"] for row in lines_of(folder / "out/teachers.csv")] == ["teacher_1", "teacher_2"]


def test_the_scores_equal_naive_ones(finished):
    folder, _ = finished
    experiment = Experiment(parse_config([written(folder), "--output", str(folder / "out")]))
    targets = runner.load_test_targets(experiment)[0].tolist()

    def outputs(name, which="last"):
        return load_file(folder / "out/runs" / name / "test_logits.safetensors")[which].double().numpy()

    def softmax(logits):
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exps / exps.sum(axis=1, keepdims=True)

    def accuracy(probs):
        return sum(int(row.argmax() == target) for row, target in zip(probs, targets, strict=True)) / len(targets)

    ensemble = (softmax(outputs("teacher_1")) + softmax(outputs("teacher_2"))) / 2
    alone = [accuracy(outputs(f"alone/seed_{seed}")) for seed in (0, 1)]
    for row in lines_of(folder / "out/results.csv"):
        name = f"{row['method']}/seed_{row['seed']}"
        probs = softmax(outputs(name))
        assert float(row["test_accuracy"]) == pytest.approx(accuracy(probs))
        assert float(row["test_accuracy_selected"]) == pytest.approx(accuracy(outputs(name, "selected")))
        nll = -sum(np.log(probs[i, target]) for i, target in enumerate(targets)) / len(targets)
        assert float(row["nll"]) == pytest.approx(nll, rel=1e-4)
        agreement = np.mean([a.argmax() == b.argmax() for a, b in zip(probs, ensemble, strict=True)])
        assert float(row["agreement"]) == pytest.approx(agreement)
        assert accuracy(ensemble) > np.mean(alone), "this test needs a gap"
        gap = (accuracy(probs) - np.mean(alone)) / (accuracy(ensemble) - np.mean(alone))
        assert float(row["gap_closed"]) == pytest.approx(gap)
        ece = 0.0
        for low in range(15):
            inside = [i for i, p in enumerate(probs.max(axis=1)) if low / 15 < p <= (low + 1) / 15]
            hits = sum(probs[i].argmax() == targets[i] for i in inside)
            ece += abs(hits - sum(probs[i].max() for i in inside)) / len(targets)
        assert float(row["ece"]) == pytest.approx(ece, rel=1e-3)


def test_the_table_is_printed_and_written(finished):
    folder, shown = finished
    rows = ["teacher_1", "teacher_2", "ensemble", "alone", "kd_one", "feed"]
    table = (folder / "out/results.md").read_text()
    for text in (table, shown):
        places = [re.search(rf"^\|? ?{row} ", text, flags=re.MULTILINE).start() for row in rows]
        assert places == sorted(places)
    mean = np.mean(
        [float(row["test_accuracy"]) for row in lines_of(folder / "out/results.csv") if row["method"] == "feed"]
    )
    assert f"| feed | {100 * mean:.2f} ± " in table
    assert "distill-lightning compare" in table
    assert "45/45 epochs" in shown
    for path in ("results.csv", "report.json", "figures/accuracy.png", "figures/learning_curves.png"):
        assert path in shown
        assert (folder / "out" / path).stat().st_size > 0
    assert (folder / "out/figures/accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_trained_student_loads_into_a_plain_network(finished):
    folder, _ = finished
    plain = SmallResNet(10, width=2)
    plain.load_state_dict(load_file(folder / "out/runs/feed/seed_1/student.safetensors"), strict=True)
    experiment = Experiment(parse_config([written(folder)]))
    with torch.no_grad():
        logits = torch.cat([plain.eval()(batch.input) for batch in experiment.sample.test_dataloader()])
    stored = load_file(folder / "out/runs/feed/seed_1/test_logits.safetensors")["last"]
    assert torch.allclose(logits, stored, atol=1e-5)


def test_students_of_one_seed_start_alike_and_see_the_same_order(finished):
    folder, _ = finished
    experiment = Experiment(parse_config([written(folder)]))
    firsts = [next(iter(experiment.data(order_seed=seed).train_dataloader())).index.tolist() for seed in (0, 0, 1)]
    assert firsts[0] == firsts[1] != firsts[2]


class Options(TypedDict, total=False):
    optimizer: Callable[[Iterable], torch.optim.Optimizer]
    lr_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
    input_shape: Sequence[int]


class WithSharedOptions(KDModule):
    """Takes most of its base's arguments as shared options, and one by handing it on."""

    def __init__(
        self, student: nn.Module, teachers: Sequence[nn.Module], *, num_classes: int, **options: Unpack[Options]
    ):
        super().__init__(student, teachers, num_classes=num_classes, **options)


def test_shared_options_are_filled_in_as_a_modules_own(tmp_path):
    def change(config):
        config["methods"] = {
            "shared": {"class_path": f"{__name__}.WithSharedOptions"},
            "kd": {"class_path": "KDModule"},
        }

    experiment = Experiment(parse_config([written(tmp_path, change)]))
    teachers = [experiment.teacher() for _ in range(2)]
    shared, plain = (experiment.method(row, experiment.student(), teachers) for row in experiment.rows[1:])
    assert isinstance(shared, WithSharedOptions)
    for module in (shared, plain):
        schedule = check_optimizer(module)
        assert isinstance(schedule, OneCycle)
        assert isinstance(schedule.optimizer, torch.optim.SGD)
        assert schedule.optimizer.defaults["momentum"] == 0.9
    assert shared.num_classes == plain.num_classes == 10


def test_a_finished_comparison_trains_nothing_again(finished, monkeypatch):
    folder, _ = finished
    before = (folder / "out/results.csv").read_text()
    monkeypatch.setattr(attempt, "execute", lambda *_: pytest.fail("trained again"))
    compare(written(folder), folder / "out")
    assert (folder / "out/results.csv").read_text() == before


@pytest.mark.usefixtures("undrawn")
def test_a_seed_and_a_method_can_be_added(finished, tmp_path, monkeypatch):
    folder, _ = finished
    output = tmp_path / "out"
    subprocess.run(["cp", "-r", folder / "out", output], check=True)
    executed = []
    execute = attempt.execute
    monkeypatch.setattr(attempt, "execute", lambda *given: (executed.append(given[1].title), execute(*given)))

    def more(config):
        config["seeds"] = [0, 1, 2]
        config["methods"]["kd"] = {"class_path": "KDModule", "init_args": {"temperature": 2.0}}

    compare(written(tmp_path, more), output)
    added = {"alone, seed 2", "kd_one, seed 2", "feed, seed 2", "kd, seed 0", "kd, seed 1", "kd, seed 2"}
    # Of both teachers, and not of the first alone, something is asked now.
    assert set(executed) == added | {"store"}
    old = [row for row in lines_of(output / "results.csv") if row["seed"] != "2" and row["method"] == "feed"]
    assert [row["nll"] for row in old] == [
        row["nll"] for row in lines_of(folder / "out/results.csv") if row["method"] == "feed"
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(epochs=4),
        lambda config: config.update(seeds=[1]),
        lambda config: config["methods"].pop("feed"),
        lambda config: config["methods"]["feed"]["init_args"].update(beta=21.0),
        lambda config: config["data"]["init_args"].update(subset=64),
        lambda config: config["optimizer"]["init_args"].update(lr=0.2),
        lambda config: config["teachers"].update(number=3),
    ],
)
def test_the_folder_of_another_configuration_is_refused(finished, tmp_path, capsys, change):
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    assert main(["compare", written(tmp_path, change), "--output", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert "belongs to another configuration" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == before


SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch owned"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(epoch=4), "'epoch'"),
        (lambda c: c.pop("student"), "student"),
        (lambda c: c["teachers"].update(numbr=4), "numbr"),
        (lambda c: c.update(teachers=[c["teachers"]["network"]]), "teachers.0 is to be trained already, .*Pretrained"),
        (lambda c: c.update(teachers=3), "teachers is a network and a number.* or a list"),
        (lambda c: c["methods"]["feed"]["init_args"].update(betta=4), "methods.feed: Option 'betta'"),
        (lambda c: c["methods"]["feed"]["init_args"].update(student_layer="stage4"), "no layer 'stage4'; similar"),
        (lambda c: c["methods"]["feed"].update(class_path="FEDModule"), "methods.feed.*FEDModule"),
        (lambda c: c["methods"]["feed"].update(teachers=3), r"methods.feed.teachers must be between 1 and 2, .* got 3"),
        (lambda c: c["methods"]["feed"].update(beta=3), "methods.feed: unknown key 'beta'"),
        (lambda c: c["methods"].update(alone=c["methods"]["feed"]), "'alone' cannot be a method's name"),
        (lambda c: c["teachers"]["network"]["init_args"].update(num_classes=7), "teachers.network .* has 7 classes"),
        (lambda c: c["student"]["init_args"].update(num_classes=7), "student .* has 7 classes"),
        (lambda c: c["student"]["init_args"].update(widht=7), "widht"),
        (lambda c: c["optimizer"]["init_args"].update(lrr=7), r"(?<!supervised\.)optimizer: .*lrr"),
        (lambda c: c["data"]["init_args"].update(subset=5000), "subset=5000 is larger than the 1497"),
        (lambda c: c["data"]["init_args"].update(test_size=0), "split or batch would be empty"),
        (lambda c: c["data"]["init_args"].update(val_size=0), "has no validation samples, by which an epoch is cho"),
        (lambda c: c.update(data={"class_path": "FashionMNISTDataModule", "init_args": {"data_dir": "no"}}), "no tra"),
        (lambda c: c.update(seeds=[]), "seeds must be different numbers, at least one"),
        (lambda c: c.update(epochs=0), "epochs must be at least 1"),
        (lambda c: c.update(seeds=[2**70]), "seeds must lie between 0 and"),
        (lambda c: c.update(accelerator="gpuu"), "accelerator or precision: .*gpuu"),
        (lambda c: c.update(precision="17"), "accelerator or precision: .*17"),
        (lambda c: c["optimizer"]["init_args"].update(lr=-1.0), "optimizer: Invalid learning rate"),
        (lambda c: c["lr_scheduler"].update(init_args={"warmup": 30}), "warmup is a share of the training"),
        (lambda c: c.update(optimizer=SYSTEM), r"(?<!supervised\.)optimizer: os.system makes no Optimizer"),
        (lambda c: c.update(lr_scheduler=SYSTEM), r"(?<!supervised\.)lr_scheduler: os.system makes no LRS"),
        (lambda c: c.update(supervised=SYSTEM), "supervised: os.system makes no LightningModule"),
        (lambda c: c["methods"].update(feed=SYSTEM), "methods.feed: os.system makes no LightningModule"),
        (lambda c: c["student"].update(init_args=[1]), "student: expected a class_path and init_args with its arg"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, capsys, change, message):
    config = written(tmp_path, change)
    assert main(["compare", config, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_foreign_folder_are_refused(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("precious")
    assert main(["compare", written(tmp_path), "--output", str(tmp_path / "mine")]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "goes on where it stopped" in shown
    assert "beside ``--only``: those of the file's that are made" in shown
    written = ("results.md", "results.csv", "teachers.csv", "paired.csv", "search.csv", "report.json", "figures")
    assert all(name in shown for name in (*written, "compare.yaml", "data.json"))


def history_of(checkpoint):
    """The epochs in a checkpoint; the killed process may have finished the run just before it died."""
    if not checkpoint.exists():
        return json.loads(checkpoint.with_name("result.json").read_text())["history"]
    return torch.load(checkpoint, weights_only=True)["callbacks"]["RunKeeper"]["history"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_killed_between_its_last_epoch_and_its_result_is_finished_without_training(
    finished, tmp_path, monkeypatch
):
    folder, _ = finished
    output = tmp_path / "out"
    original = runner._test_outputs

    def killed(experiment, module):
        if (output / "runs/alone/seed_0").exists():
            raise KeyboardInterrupt
        return original(experiment, module)

    monkeypatch.setattr(runner, "_test_outputs", killed)
    with pytest.raises(SystemExit, match="130"):
        compare(written(tmp_path), output)
    kept = history_of(output / "runs/alone/seed_0/last.ckpt")
    assert len(kept) == CONFIG["epochs"]
    monkeypatch.setattr(runner, "_test_outputs", original)
    compare(written(tmp_path), output)
    assert json.loads((output / "runs/alone/seed_0/result.json").read_text())["history"] == kept
    first, second = (lines_of(path / "results.csv")[0] for path in (folder / "out", output))
    cost = {"seconds_per_epoch": "", "peak_memory": ""}
    assert {**first, **cost} == {**second, **cost}


def poison(monkeypatch, *places, epoch=1):
    """Let the runs in these folders meet a weight that is not finite in an epoch, by default the second."""
    original = runner.make_trainer

    class Poison(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                next(pl_module.student.parameters()).data.fill_(torch.nan)

    def poisoning(config, **options):
        callbacks = options.get("callbacks", [])
        if callbacks and any(str(getattr(callbacks[0], "folder", "")).endswith(place) for place in places):
            options["callbacks"] = [*callbacks, Poison()]
        return original(config, **options)

    monkeypatch.setattr(runner, "make_trainer", poisoning)


def test_a_diverged_run_and_a_missing_gap_do_not_stop_the_table(tmp_path, monkeypatch):
    poison(monkeypatch, "runs/alone/seed_0", "runs/alone/seed_1")

    def short(config):
        config.update(epochs=2, methods={})

    shown = compare(written(tmp_path, short), tmp_path / "out")
    table = (tmp_path / "out/results.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| alone"))
    assert row.split("|")[2].strip() == "-", "the diverged runs' accuracy"
    assert row.split("|")[6].strip() == "-", "the gap, which has no beginning"
    lines = lines_of(tmp_path / "out/results.csv")
    assert {line["gap_closed"] for line in lines} == {line["test_accuracy"] for line in lines} == {"nan"}
    for seed in CONFIG["seeds"]:
        note = f"alone, seed {seed}: SupervisedModule: train/ce is not finite in batch 0 of epoch 2"
        assert note in table
        assert note in " ".join(shown.split())
    assert not list((tmp_path / "out/figures").glob("accuracy.png"))


def test_a_row_with_a_diverged_seed_says_so_and_the_others_are_scored(tmp_path, monkeypatch):
    poison(monkeypatch, "runs/kd/seed_1")

    def only_kd(config):
        config.update(epochs=2, methods={"kd": {"class_path": "KDModule"}})

    compare(written(tmp_path, only_kd), tmp_path / "out")
    table = (tmp_path / "out/results.md").read_text()
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in table.splitlines() if "|" in line}
    assert cells["kd"] == "-"
    assert "±" in cells["alone"]
    assert "kd, seed 1: KDModule: " in table
    assert "kd, seed 0" not in table
    kept = [line["test_accuracy"] for line in lines_of(tmp_path / "out/results.csv") if line["method"] == "kd"]
    assert kept[0] != "nan"
    assert kept[1] == "nan"
    # It is known as a finished run, and not made again.
    before = (tmp_path / "out/results.csv").read_bytes()
    compare(written(tmp_path, only_kd), tmp_path / "out")
    assert (tmp_path / "out/results.csv").read_bytes() == before


def test_who_learns_from_a_run_that_diverged_at_once_has_no_scores_either(tmp_path, monkeypatch):
    poison(monkeypatch, "runs/kd/seed_0", epoch=0)

    def in_turn(config):
        kd = {"class_path": "KDModule"}
        config.update(epochs=2, seeds=[0], methods={"kd": kd, "ban": {**kd, "teachers": "kd"}})

    compare(written(tmp_path, in_turn), tmp_path / "out")
    table = (tmp_path / "out/results.md").read_text()
    assert "kd, seed 0: KDModule: train/ce is not finite in batch 0 of epoch 1" in table
    assert "ban, seed 0: kd, seed 0, from which it learns, has no finite numbers" in table
    assert [line["test_accuracy"] == "nan" for line in lines_of(tmp_path / "out/results.csv")] == [False, True, True]


def test_the_rows_of_a_teacher_that_diverges_say_so_and_the_others_are_made(tmp_path, monkeypatch):
    poison(monkeypatch, "runs/teacher_2")

    def short(config):
        config["teachers"].update(epochs=2)
        config.update(epochs=1, seeds=[0])

    compare(written(tmp_path, short), tmp_path / "out")
    text = (tmp_path / "out/results.md").read_text()
    assert "teacher_2: SupervisedModule: train/ce is not finite in batch 0 of epoch 2" in text
    assert "feed, seed 0: teacher_2, from which it learns, has no finite numbers" in text
    scored = {line["method"]: line["test_accuracy"] != "nan" for line in lines_of(tmp_path / "out/results.csv")}
    assert scored == {"alone": True, "kd_one": True, "feed": False}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("compare.yaml", "seeds: [", "compare.yaml is damaged"),
        ("compare.yaml", "", "compare.yaml is damaged"),
        ("runs/feed/seed_1/result.json", "{", "result.json is damaged, remove it"),
        ("runs/feed/seed_1/last.ckpt", "{", "last.ckpt"),
    ],
)
def test_a_damaged_folder_is_named(finished, tmp_path, capsys, name, content, message):
    folder, _ = finished
    output = tmp_path / "out"
    subprocess.run(["cp", "-r", folder / "out", output], check=True)
    (output / name).write_text(content)
    if name.endswith("last.ckpt"):
        (output / name).with_name("result.json").unlink()
    assert main(["compare", written(tmp_path), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_a_call_killed_at_its_very_start_can_be_made_again(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/partial.0.compare.yaml").write_text("half")

    def short(config):
        config.update(epochs=1, seeds=[0], methods={})

    compare(written(tmp_path, short), tmp_path / "out")
    assert (tmp_path / "out/results.csv").exists()
    assert not list((tmp_path / "out").glob("partial*"))


OWN_DATA = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Pairs(pl.LightningDataModule):
    num_classes = 10
    input_shape = (1, 8, 8)

    def setup(self, stage):
        images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.pairs = TensorDataset(images, torch.arange(32) % 10)

    def train_dataloader(self):
        return DataLoader(self.pairs, batch_size=16)

    val_dataloader = test_dataloader = train_dataloader
"""


@pytest.mark.usefixtures("undrawn")
def test_any_data_module_that_tells_its_classes_and_shape_will_do(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)

    def own(config):
        config.update(data={"class_path": "mine.Pairs"}, epochs=1, seeds=[0])

    compare(written(tmp_path, own), tmp_path / "out")
    assert len(lines_of(tmp_path / "out/results.csv")) == 3


def silent(tmp_path, monkeypatch, change):
    """The configuration of a comparison on data that tell less."""
    (tmp_path / "silent.py").write_text(OWN_DATA.replace(*change))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "silent", raising=False)
    return parse_config([str(written(tmp_path, lambda config: config.update(data={"class_path": "silent.Pairs"})))])


def test_a_number_of_classes_that_is_not_told_is_asked_for_at_once(tmp_path, monkeypatch):
    config = silent(tmp_path, monkeypatch, ("num_classes = 10", "num_classes = None"))
    with pytest.raises(InputError, match="data: Pairs does not tell its num_classes: give it"):
        Experiment(config)


def test_a_shape_that_is_not_told_is_seen(tmp_path, monkeypatch):
    config = silent(tmp_path, monkeypatch, ("input_shape = (1, 8, 8)", "nothing = 0"))
    assert Experiment(config).sample.input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    "after", ["runs/teacher_2/last.ckpt", "runs/kd_one/seed_0/last.ckpt", "runs/feed/seed_1/last.ckpt"]
)
@pytest.mark.usefixtures("undrawn")
def test_a_killed_comparison_ends_like_an_undisturbed_one(finished, tmp_path, after, start_method):
    folder, _ = finished
    config = written(tmp_path)
    process = multiprocessing.get_context(start_method).Process(target=compare, args=(config, tmp_path / "out"))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / after).exists():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline, f"{after} did not appear"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (tmp_path / "out/results.csv").exists()
    kept = history_of(tmp_path / "out" / after)
    compare(config, tmp_path / "out")

    # The epochs before the kill were not made again: they took just as long.
    history = json.loads((tmp_path / "out" / after).with_name("result.json").read_text())["history"]
    assert history[: len(kept)] == kept
    assert numbers_of(tmp_path / "out") == numbers_of(folder / "out")
    assert not list((tmp_path / "out").rglob("partial*"))


def test_the_table_fits_a_narrow_terminal():
    header = ["row", "test %", "sel. %", "NLL", "ECE %", "agree %", "gap %", "params", "s/epoch"]
    row = ["kd_one_teacher", "85.49 ± 0.07", "85.56 ± 0.16", "0.402 ± 0.003", "10.84 ± 0.10", "94.0 ± 0.2", "146 ± 14"]
    shown = io.StringIO()
    Console(file=shown, width=80).print(table_of([header, [*row, "233,262", "11.75 ± 0.05"]]))
    assert "…" not in shown.getvalue()
    assert "kd_one_teacher" in shown.getvalue()
    assert "233,262" in shown.getvalue()


def remade(folder, name, seed):
    """The weights of a run, made once more without compare: the same seeds, data, teachers, optimiser and schedule."""
    teachers = []
    for number in (1, 2):
        teachers.append(SmallResNet(10, width=4))
        weights = folder / f"out/runs/teacher_{number}/student.safetensors"
        if not name.startswith("teacher"):
            teachers[-1].load_state_dict(load_file(weights))
    torch.manual_seed(seed)
    network = SmallResNet(10, width=4 if name.startswith("teacher") else 2)
    options = {
        "num_classes": 10,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "lr_scheduler": OneCycle,
    }
    if name == "kd_one":
        module = KDModule(network, teachers[0], **options)
    elif name == "feed":
        module = FEEDModule(network, teachers, student_layer="stage3", beta=20.0, **options)
    else:
        module = SupervisedModule(network, **options)
    data = DigitsDataModule(**CONFIG["data"]["init_args"], order_seed=seed)
    tiny_trainer(max_epochs=12 if name.startswith("teacher") else 3).fit(module, datamodule=data)
    return network.state_dict()


@pytest.mark.parametrize(
    ("name", "place", "seed"),
    [
        ("teacher_1", "teacher_1", 1001),
        ("teacher_2", "teacher_2", 1002),
        ("alone", "alone/seed_1", 1),
        ("kd_one", "kd_one/seed_1", 1),
        ("feed", "feed/seed_0", 0),
        ("feed", "feed/seed_1", 1),
    ],
)
def test_a_run_is_what_the_configuration_says(finished, name, place, seed):
    folder, _ = finished
    stored = load_file(folder / "out/runs" / place / "student.safetensors")
    for key, value in remade(folder, name, seed).items():
        assert torch.allclose(value.double(), stored[key].double(), rtol=1e-4, atol=1e-6), key


def test_last_and_selected_logits_belong_to_their_weights(finished):
    folder, _ = finished
    images = torch.cat([b.input for b in Experiment(parse_config([written(folder)])).sample.test_dataloader()])
    for run in (path.parent for path in (folder / "out/runs").rglob("test_logits.safetensors")):
        logits = load_file(run / "test_logits.safetensors")
        for which, weights in (("last", "student"), ("selected", "selected")):
            network = SmallResNet(10, width=4 if "teacher" in run.name else 2).eval()
            network.load_state_dict(load_file(run / f"{weights}.safetensors"))
            with torch.no_grad():
                assert torch.allclose(network(images), logits[which], atol=1e-5), (run, which)
        result = json.loads((run / "result.json").read_text())
        accuracies = [line["val/accuracy"] for line in result["history"]]
        assert result["selected_epoch"] == 1 + int(np.argmax(accuracies))
        assert not (run / "last.ckpt").exists()


def test_the_cells_are_means_and_sample_deviations(finished):
    folder, _ = finished
    table = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in (folder / "out/results.md").read_text().partition("\n## ")[0].splitlines()
        if line.startswith("| ")
    }
    rows = [row for row in lines_of(folder / "out/results.csv") if row["method"] == "feed"]

    def cell(column, scale, digits):
        values = scale * np.array([float(row[column]) for row in rows])
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"

    assert table["feed"] == [
        cell("test_accuracy", 100, 2), cell("test_accuracy_selected", 100, 2), cell("nll", 1, 3),
        cell("agreement", 100, 1), cell("gap_closed", 100, 0),
        f"{int(rows[0]['parameters']):,}", cell("seconds_per_epoch", 1, 2),
        f"{max(int(row['peak_memory']) for row in rows) / 1e6:.0f}",
    ]  # fmt: skip
    logits = [load_file(folder / f"out/runs/teacher_{n}/test_logits.safetensors")["last"].double() for n in (1, 2)]
    probs = sum(torch.softmax(value, dim=1) for value in logits) / 2
    targets, _ = runner.load_test_targets(Experiment(parse_config([written(folder)])))
    nll = -probs[torch.arange(len(targets)), targets].log().mean()
    parameters = 2 * sum(p.numel() for p in SmallResNet(10, width=4).parameters())
    accuracy = 100 * (probs.argmax(dim=1) == targets).double().mean()
    assert table["ensemble"][:3] == [f"{accuracy:.2f}", "", f"{nll:.3f}"]
    assert table["ensemble"][3:] == ["100.0", "100", f"{parameters:,}", "", ""]
    history = json.loads((folder / "out/runs/feed/seed_0/result.json").read_text())["history"]
    assert float(rows[0]["seconds_per_epoch"]) == pytest.approx(np.median([line["seconds"] for line in history]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(seeds=[1, 1]), "seeds must be different numbers"),
        (lambda c: c["teachers"].update(number=0), "teachers.number must be at least 1"),
        (lambda c: c["teachers"].update(epochs=0), "epochs must be at least 1"),
        (lambda c: c["methods"].update(teacher_3=c["methods"]["feed"]), "'teacher_3' cannot be a method's name"),
        (lambda c: c["methods"].update({"a/b": c["methods"]["feed"]}), "'a/b' cannot be a method's name"),
        (lambda c: c["methods"].update({"..": c["methods"]["feed"]}), "'..' cannot be a method's name"),
        (lambda c: c["methods"].update({".feed": c["methods"]["feed"]}), "'.feed' cannot be a method's name"),
        (
            lambda c: c["methods"].update(teacher={"class_path": "KDModule", "stages": 2}),
            "'teacher_1' cannot be a method's name",
        ),
    ],
)
def test_numbers_and_names_that_cannot_be_used_are_named(tmp_path, capsys, change, message):
    assert main(["compare", written(tmp_path, change), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    assert main(["compare", written(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.usefixtures("undrawn")
def test_students_teach_students_in_stages(tmp_path):
    def sequential(config):
        config.update(epochs=1, seeds=[3])
        config["teachers"].update(number=1, epochs=1)
        feed = config["methods"]["feed"]
        config["methods"] = {
            "again": {"class_path": "KDModule", "teachers": "alone"},
            "feed": {**feed, "stages": 2},
            "after": {"class_path": "KDModule", "teachers": "feed_2"},
        }

    experiment = Experiment(parse_config([written(tmp_path, sequential)]))
    runs = {run.name: run for run in plan(experiment, tmp_path / "plan")}
    taught = {name: [teacher.name for teacher in run.teachers] for name, run in runs.items()}
    assert taught == {
        "teacher_1": [], "alone": [], "again": ["alone"], "feed_1": ["alone"], "feed_2": ["feed_1"], "after": ["feed_2"]
    }  # fmt: skip
    assert {run.seed for run in runs.values() if run.name != "teacher_1"} == {3}
    first = {}
    for name in ("alone", "again", "feed_1", "feed_2", "after"):
        torch.manual_seed(runs[name].initial_seed)
        first[name] = experiment.student().stem[0].weight
    # A student never begins with its teacher's initial weights.
    assert torch.equal(first["again"], first["feed_1"])
    for pupil, teacher in (("feed_1", "alone"), ("feed_2", "feed_1"), ("after", "feed_2")):
        assert not torch.equal(first[pupil], first[teacher])

    compare(written(tmp_path, sequential), tmp_path / "out")
    rows = [row["method"] for row in lines_of(tmp_path / "out/results.csv")]
    assert rows == ["alone", "again", "feed_1", "feed_2", "after"]
    # Stage 2 is FEED under the student of stage 1.
    teacher = SmallResNet(10, width=2)
    teacher.load_state_dict(load_file(tmp_path / "out/runs/feed_1/seed_3/student.safetensors"))
    torch.manual_seed(runs["feed_2"].initial_seed)
    module = FEEDModule(
        SmallResNet(10, width=2), teacher, num_classes=10, student_layer="stage3", beta=20.0, lr_scheduler=OneCycle,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )  # fmt: skip
    tiny_trainer(max_epochs=1).fit(module, datamodule=DigitsDataModule(**CONFIG["data"]["init_args"], order_seed=3))
    stored = load_file(tmp_path / "out/runs/feed_2/seed_3/student.safetensors")
    for key, value in module.student.state_dict().items():
        assert torch.allclose(value.double(), stored[key].double(), rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["feed"].update(stages=0), "methods.feed.stages is a number, at least 1"),
        (lambda m: m["feed"].update(stages=2, teachers=1), "leaves no choice of teachers"),
        (lambda m: m["feed"].update(teachers="later"), "methods.feed.teachers: 'later' is no earlier row; .*alone"),
        (lambda m: m["feed"].update(initial="later"), "methods.feed.initial: 'later' is no earlier row; .*alone"),
        (lambda m: m["feed"].update(initial=["alone"]), "methods.feed.initial is an earlier row's name"),
        (lambda m: m["feed"].update(initial="alone", stages=2), "methods.feed.initial .* stages begin afresh"),
        (lambda m: m["feed"].update(teachers=True), "methods.feed.teachers must be between 1 and 2"),
        (lambda m: m.update(kd_one_1=m["feed"], kd_one={"class_path": "KDModule", "stages": 1}), "two rows are called"),
        (lambda m: m.update(ls={"class_path": "SupervisedModule", "teachers": 1}), "SupervisedModule has no teachers"),
        (lambda m: m.update(ls={"class_path": "SupervisedModule", "stages": 1}), "SupervisedModule has no teachers"),
    ],
)
def test_rows_that_cannot_be_are_named(tmp_path, capsys, change, message):
    config = written(tmp_path, lambda config: change(config["methods"]))
    assert main(["compare", config, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_methods_without_teachers_and_another_plain_training(tmp_path):
    def plain(config):
        config.update(epochs=1, seeds=[0])
        config["teachers"].update(number=1, epochs=1)
        config["supervised"] = {
            "class_path": "SupervisedModule",
            "init_args": {"transforms": [{"class_path": "LabelSmoothing", "init_args": {"epsilon": 0.3}}]},
        }
        config["methods"] = {
            "smooth": {
                "class_path": "SupervisedModule",
                "init_args": {"transforms": [{"class_path": "LabelSmoothing", "init_args": {"epsilon": 0.3}}]},
            },
            "hard": {"class_path": "SupervisedModule"},
        }

    compare(written(tmp_path, plain), tmp_path / "out")
    nll = {row["method"]: row["nll"] for row in lines_of(tmp_path / "out/results.csv")}
    assert nll["alone"] == nll["smooth"] != nll["hard"]


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("regression")

    def rotated(config):
        config["data"]["class_path"] = "RotatedDigitsDataModule"
        config["supervised"] = {"class_path": "RegressionModule", "init_args": {"burn_in_epochs": 1}}
        config["teachers"].update(epochs=4)
        config["methods"] = {
            "point": {
                "class_path": "ExtracurricularModule",
                "init_args": {
                    "match": {"class_path": "MatchPoint", "init_args": {"variance": 0.2}},
                    "extra_ratio": 0,
                },
            },
            "xcl": {"class_path": "ExtracurricularModule"},
        }

    config = written(folder, rotated)
    return folder, config, compare(config, folder / "out")


def test_a_regression_is_compared_by_its_errors(regression):
    folder, config, shown = regression
    experiment = Experiment(parse_config([config]))
    targets = runner.load_test_targets(experiment)[0].double().numpy()[:, 0]

    def gaussian(name, which="last"):
        output = load_file(folder / "out/runs" / name / "test_logits.safetensors")[which].double().numpy()
        return output[:, 0], np.exp(output[:, 1])

    means, variances = zip(gaussian("teacher_1"), gaussian("teacher_2"), strict=True)
    mean = (means[0] + means[1]) / 2
    variance = (variances[0] + variances[1]) / 2 + (means[0] ** 2 + means[1] ** 2) / 2 - mean**2
    ensemble = np.abs(mean - targets).mean()
    alone = np.mean([np.abs(gaussian(f"alone/seed_{seed}")[0] - targets).mean() for seed in (0, 1)])
    rows = lines_of(folder / "out/results.csv")
    assert [row["method"] for row in rows] == ["alone", "point", "xcl"] * 2
    for row in rows:
        m, v = gaussian(f"{row['method']}/seed_{row['seed']}")
        assert float(row["test_mae"]) == pytest.approx(np.abs(m - targets).mean(), rel=1e-4)
        selected = gaussian(f"{row['method']}/seed_{row['seed']}", "selected")[0]
        assert float(row["test_mae_selected"]) == pytest.approx(np.abs(selected - targets).mean(), rel=1e-4)
        assert float(row["rmse"]) == pytest.approx(np.sqrt(((m - targets) ** 2).mean()), rel=1e-4)
        nll = (np.log(2 * np.pi * v) + (m - targets) ** 2 / v).mean() / 2
        assert float(row["nll"]) == pytest.approx(nll, rel=1e-3)
        kl = (np.log(v / variance) + (variance + (m - mean) ** 2) / v - 1).mean() / 2
        assert float(row["teacher_kl"]) == pytest.approx(kl, rel=1e-3)
        if ensemble < alone:
            gap = (alone - np.abs(m - targets).mean()) / (alone - ensemble)
            assert float(row["gap_closed"]) == pytest.approx(gap, rel=1e-3)
        else:
            assert row["gap_closed"] == "nan"
    assert ensemble < alone, "this test needs a gap"
    assert np.allclose(gaussian("point/seed_0")[1], 0.2)
    for path in ("figures/mae.png", "figures/learning_curves.png", "results.md"):
        assert path in shown
        assert (folder / "out" / path).stat().st_size > 0
    assert "validation error" in shown
    assert "mean absolute error on the test images" in (folder / "out/results.md").read_text()


def language_models(tmp_path):
    """The data's options, and what changes the configuration."""
    (tmp_path / "library").mkdir()
    for number in range(20):
        (tmp_path / f"library/module_{number}.py").write_text(f'"""Text {number}, {"and so on, " * 5}."""\n')
    options = {"data_dir": str(tmp_path / "library"), "length": 8, "val_size": 20, "test_size": 22}

    def texts(config):
        reads = {"vocabulary": 256, "width": 8}
        config.update(data={"class_path": "DocstringsDataModule", "init_args": options}, epochs=2, seeds=[0])
        config["teachers"] = {"network": {"class_path": "SmallTransformer", "init_args": {**reads, "length": 8}}}
        config["teachers"].update(number=2, epochs=1)
        config["student"] = {"class_path": "SmallLSTM", "init_args": reads}
        config["methods"] = {"kd": {"class_path": "KDModule"}}

    return options, texts


def test_language_models_are_compared_at_every_position(tmp_path):
    options, texts = language_models(tmp_path)
    compare(written(tmp_path, texts), tmp_path / "out", "--confidence")
    targets = torch.cat([batch.target for batch in DocstringsDataModule(**options).test_dataloader()])
    for row in lines_of(tmp_path / "out/results.csv"):
        logits = load_file(tmp_path / "out/runs" / row["method"] / "seed_0/test_logits.safetensors")["last"]
        assert logits.shape == (22 * 8, 256)
        probs = logits.double().softmax(-1).view(22, 8, 256)
        hits = [probs[n, t].argmax() == targets[n, t] for n in range(22) for t in range(8)]
        nll = [-probs[n, t, targets[n, t]].log() for n in range(22) for t in range(8)]
        assert float(row["test_accuracy"]) == pytest.approx(np.mean(hits), abs=1e-6)
        assert float(row["nll"]) == pytest.approx(np.mean(nll), rel=1e-4)
    assert (tmp_path / "out/figures/reliability.png").stat().st_size > 0


def test_positions_that_do_not_count_are_not_scored(tmp_path, monkeypatch):
    options, texts = language_models(tmp_path)
    plain = DocstringsDataModule.test_dataloader

    def masked(data):
        hidden = torch.arange(8) % 3 == 1
        found = [batch.replace(target=batch.target.masked_fill(hidden, -100)) for batch in plain(data)]
        return DataLoader(found, batch_size=None)

    monkeypatch.setattr(DocstringsDataModule, "test_dataloader", masked)
    compare(written(tmp_path, texts), tmp_path / "out", "--confidence")
    targets = torch.cat([batch.target for batch in DocstringsDataModule(**options).test_dataloader()]).flatten()
    for row in lines_of(tmp_path / "out/results.csv"):
        logits = load_file(tmp_path / "out/runs" / row["method"] / "seed_0/test_logits.safetensors")["last"]
        scored = [(z.double().softmax(0), int(y)) for z, y in zip(logits, targets, strict=True) if y != -100]
        assert len(scored) == 22 * 5
        assert float(row["test_accuracy"]) == pytest.approx(
            np.mean([int(p.argmax()) == y for p, y in scored]), abs=1e-6
        )
        assert float(row["nll"]) == pytest.approx(np.mean([-float(p[y].log()) for p, y in scored]), rel=1e-4)
    assert (tmp_path / "out/figures/reliability.png").stat().st_size > 0


def test_the_epoch_of_the_smallest_error_is_selected(regression):
    folder, _, _ = regression
    for path in (folder / "out/runs").rglob("result.json"):
        result = json.loads(path.read_text())
        errors = [line["val/mae"] for line in result["history"]]
        assert result["selected_epoch"] == 1 + int(np.argmin(errors))


@pytest.mark.usefixtures("undrawn")
def test_factor_transfer_trains_its_paraphrasers_once(tmp_path, monkeypatch):
    def transfer(config):
        config.update(epochs=1, seeds=[0, 1])
        config["teachers"].update(epochs=1)
        config["methods"] = {
            "ft": {
                "class_path": "FEEDModule",
                "init_args": {"student_layer": "stage3", "beta": 20.0},
                "paraphrasers": {"epochs": 2, "init_args": {"rate": 0.25}},
            }
        }

    fits = []
    fit = ParaphraserModule.on_fit_start
    monkeypatch.setattr(ParaphraserModule, "on_fit_start", lambda self: (fits.append(self), fit(self)))
    compare(written(tmp_path, transfer), tmp_path / "out")
    assert len(fits) == 1
    assert fits[0].trainer.max_epochs == 2
    stored = load_file(tmp_path / "out/runs/ft/paraphrasers.safetensors")
    for key, value in fits[0].paraphrasers.state_dict().items():
        assert torch.equal(value, stored[key])
    # The same weights as without compare, and the student learnt the codes.
    networks = []
    for number in (1, 2):
        networks.append(SmallResNet(10, width=4))
        networks[-1].load_state_dict(load_file(tmp_path / f"out/runs/teacher_{number}/student.safetensors"))
    torch.manual_seed(1)
    module = FEEDModule(
        SmallResNet(10, width=2), networks, num_classes=10, student_layer="stage3", beta=20.0, lr_scheduler=OneCycle,
        paraphrasers=list(fits[0].paraphrasers),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )  # fmt: skip
    tiny_trainer(max_epochs=1).fit(module, datamodule=DigitsDataModule(**CONFIG["data"]["init_args"], order_seed=1))
    student = load_file(tmp_path / "out/runs/ft/seed_1/student.safetensors")
    for key, value in module.student.state_dict().items():
        assert torch.allclose(value.double(), student[key].double(), rtol=1e-4, atol=1e-6), key


@pytest.mark.usefixtures("undrawn")
def test_paraphrasers_of_a_student_that_teaches_are_those_of_its_seed(tmp_path, monkeypatch):
    def transfer(config):
        config.update(epochs=1, seeds=[0, 1])
        config["teachers"].update(number=1, epochs=1)
        config["methods"] = {
            "ft": {
                "class_path": "FEEDModule",
                "init_args": {"student_layer": "stage3", "beta": 20.0},
                "teachers": "alone",
                "paraphrasers": {"epochs": 1, "init_args": {"rate": 0.5}},
            }
        }

    fits = []
    fit = ParaphraserModule.on_fit_start
    monkeypatch.setattr(ParaphraserModule, "on_fit_start", lambda self: (fits.append(self), fit(self)))
    compare(written(tmp_path, transfer), tmp_path / "out")
    assert len(fits) == 2
    for seed, module in enumerate(fits):
        stored = load_file(tmp_path / f"out/runs/ft/seed_{seed}/paraphrasers.safetensors")
        for key, value in module.paraphrasers.state_dict().items():
            assert torch.equal(value, stored[key])
    first, second = (module.paraphrasers.state_dict() for module in fits)
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("given", [5, {"epochs": 0}, {"epochs": 1, "rate": 0.5}])
def test_paraphrasers_that_cannot_be_are_named(tmp_path, capsys, given):
    config = written(tmp_path, lambda config: config["methods"]["feed"].update(paraphrasers=given))
    assert main(["compare", config, "--output", str(tmp_path / "out")]) == 2
    assert "methods.feed.paraphrasers: expected epochs, at least 1, and init_args" in capsys.readouterr().err


def test_paraphrasers_of_a_method_that_takes_none_are_refused(tmp_path, capsys):
    config = written(tmp_path, lambda config: config["methods"]["kd_one"].update(paraphrasers={"epochs": 1}))
    assert main(["compare", config, "--output", str(tmp_path / "out")]) == 2
    assert "methods.kd_one: KDModule takes no paraphrasers: leave them out" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_row_can_begin_with_another_rows_student(tmp_path):
    def still(config):
        config.update(epochs=1, seeds=[0, 1])
        config["teachers"].update(number=1, epochs=1)
        optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
        meal = {
            "class_path": "MEALV2Module",
            "init_args": {"discriminator": {"class_path": "NoDiscriminator"}, "optimizer": optimizer},
        }
        config["methods"] = {"meal": {**meal, "initial": "alone"}, "scratch": meal}

    compare(written(tmp_path, still), tmp_path / "out")
    # With a rate of zero the parameters stay where they began.
    for seed in (0, 1):
        weights = {
            name: load_file(tmp_path / f"out/runs/{name}/seed_{seed}/student.safetensors")["head.weight"]
            for name in ("alone", "meal", "scratch")
        }
        assert torch.equal(weights["meal"], weights["alone"])
        assert not torch.equal(weights["scratch"], weights["alone"])
