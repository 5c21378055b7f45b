"""The verb ``compress``: runs of a configuration and its controls, what they leave, and what they refuse."""

import csv
import importlib.util
import json
import re
import shutil
import signal

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import nn

from distill_lightning import (
    DigitsDataModule,
    Pretrained,
    RegressionModule,
    SmallCNN,
    SmallLSTM,
    SmallTransformer,
    SupervisedModule,
)
from distill_lightning.callbacks import Measurements
from distill_lightning.callbacks.stages import trained_before
from distill_lightning.cli import main
from distill_lightning.compression import (
    Compressor,
    LearnMask,
    LowRank,
    PruneUnits,
    PruneWeights,
    Quantize,
    ShareWeights,
    SoftMovement,
    Stage,
    load_compressed,
)
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.report.controls import random_steps, same_size_network
from distill_lightning.errors import InputError
from distill_lightning.studies.compress import command, runs
from distill_lightning.studies.compress.config import parse_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def without_onnx():
    """Every export takes seconds: one test makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "find_spec", lambda name: None)
        yield


CNN = {"class_path": "SmallCNN", "init_args": {"num_classes": 10, "width": 4}}


def configuration(change=lambda config: None):
    steps = [
        {"class_path": "PruneUnits", "init_args": {"amount": 0.5, "unit": "channel", "finetune_epochs": 1}},
        {"class_path": "Encode", "init_args": {"method": "deflate"}},
    ]
    config = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        "model": {
            "class_path": "CompressionBaseline",
            "init_args": {
                "network": CNN,
                "dense_epochs": 1,
                "steps": steps,
                "report": {"class_path": "Measurements", "init_args": {"batch_sizes": [1], "rounds": 50}},
            },
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 64, "val_size": 32, "image_size": 8}},
    }
    change(config)
    return yaml.safe_dump(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds with both controls; returns the working folder."""
    folder = tmp_path_factory.mktemp("compress")
    (folder / "tiny.yaml").write_text(configuration())
    assert main(["compress", str(folder / "tiny.yaml"), "--output", str(folder / "out"), "--seeds", "0", "1"]) == 0
    return folder


def stages_of(folder, name):
    return [
        Stage.of_plain(plain) for plain in json.loads((folder / "runs" / name / "stages.json").read_text())["stages"]
    ]


def test_its_files_are_there_and_can_be_read(finished):
    out = finished / "out"
    names = {path.name for path in out.iterdir()}
    assert {"compress.yaml", "report.md", "report.csv", "report.json", "figures"} <= names
    assert {"network.dlpk", "compressed.ckpt"} <= names
    inputs = torch.rand(3, 1, 8, 8)
    packed, checkpoint = load_compressed(out / "network.dlpk"), load_compressed(out / "compressed.ckpt")
    with torch.no_grad():
        assert torch.equal(packed(inputs), checkpoint(inputs))
    assert sum(layer.out_channels for layer in packed.features if hasattr(layer, "out_channels")) == 14
    assert (out / "figures/pareto.png").read_bytes()[:4] == b"\x89PNG"
    # They are the first seed's.
    assert (out / "network.dlpk").read_bytes() == (out / "runs/compressed_0/network.dlpk").read_bytes()
    assert (out / "network.dlpk").stat().st_size == stages_of(out, "compressed_0")[-1].nbytes["artefact"]


def test_the_report_says_what_the_runs_measured(finished):
    out = finished / "out"
    report = json.loads((out / "report.json").read_text())
    text = (out / "report.md").read_text()
    kinds = ("compressed", "same_size", "random")
    assert {path.name for path in (out / "runs").iterdir()} == {f"{kind}_{seed}" for kind in kinds for seed in (0, 1)}
    by_seed = {seed: [stage for kind in kinds for stage in stages_of(out, f"{kind}_{seed}")] for seed in (0, 1)}
    names = [stage.name for stage in by_seed[0]]
    assert names[0] == "dense"
    assert names[-3:] == ["final", "control: same size from scratch", "control: random criterion"]
    for name in names:
        assert name in text
    told = json.dumps(report)
    for stages in by_seed.values():
        for stage in stages:
            assert json.dumps(stage.scores["accuracy"]) in told
            assert json.dumps(stage.nbytes["artefact"]) in told
    finals = [stages[names.index("final")].scores["accuracy"] for stages in by_seed.values()]
    assert f"{100 * sum(finals) / 2:.2f}" in text or f"{100 * sum(finals) / 2:.1f}" in text


def test_the_control_of_the_same_size_is_no_larger(finished):
    for seed in (0, 1):
        final = stages_of(finished / "out", f"compressed_{seed}")[-1]
        (control,) = stages_of(finished / "out", f"same_size_{seed}")
        assert control.parameters <= final.nonzero
        assert control.parameters > 0.7 * final.nonzero


@pytest.mark.usefixtures("undrawn")
def test_a_lost_run_alone_is_made_again(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "copy")
    out = tmp_path / "copy/out"
    before = {path.parent.name: path.read_text() for path in out.rglob("stages.json")}
    (out / "runs/random_1/stages.json").unlink()
    made, execute = [], runs.execute

    def counting(run, *args):
        made.append(run.folder.name)
        execute(run, *args)

    monkeypatch.setattr("distill_lightning.studies.compress.command.execute", counting)
    arguments = ["compress", str(tmp_path / "copy/tiny.yaml"), "--output", str(out), "--seeds", "0", "1"]
    assert main(arguments) == 0
    assert made == ["random_1"]
    for path in out.rglob("stages.json"):
        first, second = (json.loads(text) for text in (before[path.parent.name], path.read_text()))
        for stage in (*first["stages"], *second["stages"]):
            del stage["latency"]
        assert first == second
    made.clear()
    assert main(arguments) == 0
    assert not made


def test_another_configuration_in_the_same_folder_is_refused(finished, tmp_path, capsys):
    changed = configuration(lambda config: config["trainer"].update(max_epochs=3))
    (tmp_path / "other.yaml").write_text(changed)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main(["compress", str(tmp_path / "other.yaml"), "--output", str(finished / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "belongs to another configuration" in line
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_configuration_that_cannot_be_used_claims_no_folder(tmp_path, capsys, monkeypatch):
    """Neither one that cannot be parsed, nor one that is refused when the training starts."""
    for change in (
        lambda config: config["model"]["init_args"].update(dense_epoch=1),
        changed_steps(prune(amount=0.5, targets="nowhere")),
    ):
        (tmp_path / "tiny.yaml").write_text(configuration(change))
        assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out"), "--controls"]) == 2
    (tmp_path / "tiny.yaml").write_text(configuration())
    capsys.readouterr()

    def begin(*_):
        raise InputError("it begins")

    monkeypatch.setattr("distill_lightning.studies.compress.command.execute", begin)
    assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out"), "--controls"]) == 2
    assert "it begins" in capsys.readouterr().err
    claimed = yaml.safe_load((tmp_path / "out/compress.yaml").read_text())
    assert claimed["config"] == (tmp_path / "tiny.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "report", "message"),
    [
        (["--metric", "acc"], {}, "--metric acc: CompressionBaseline has no such score, but accuracy, aurc"),
        (["--seeds", "0", "1", "0"], {}, "--seeds has 0 twice"),
        ([], {"rounds": 3}, "rounds must be at least 50, got 3"),
        ([], {"batch_sizes": [1, 0]}, "batch_sizes must be integers of at least 1, got [1, 0]"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_the_training(tmp_path, capsys, options, report, message):
    (tmp_path / "tiny.yaml").write_text(
        configuration(lambda config: config["model"]["init_args"]["report"]["init_args"].update(report))
    )
    assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "bogus"}, "split must be one of test, val, got 'bogus'"),
        ({"onnx": "int8"}, "onnx must be one of none, float, static, dynamic, got 'int8'"),
        ({"rounds": 49}, "rounds must be at least 50, got 49"),
        ({"batch_sizes": (True,)}, r"batch_sizes must be integers of at least 1, got \[True\]"),
    ],
)
def test_measurements_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Measurements(**options)


class Interrupting(pl.Callback):
    """Presses Ctrl-C in the second epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["training", "between"])
def test_an_interrupt_tells_what_is_kept(finished, tmp_path, capsys, monkeypatch, where):
    """In a training Lightning catches it and leaves the process; elsewhere nobody does."""
    shutil.copytree(finished, tmp_path / "copy")
    out = tmp_path / "copy/out"
    shutil.rmtree(out / "runs/random_1")
    execute = runs.execute

    def interrupted(run, make, *args):
        def making(seed, root):
            if where == "between":
                raise KeyboardInterrupt
            parts = make(seed, root)
            parts.trainer.callbacks.append(Interrupting())
            return parts

        execute(run, making, *args)

    monkeypatch.setattr("distill_lightning.studies.compress.command.execute", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["compress", str(tmp_path / "copy/tiny.yaml"), "--output", str(out), "--seeds", "0", "1"])
    finally:
        # Lightning has it ignored from then on.
        signal.signal(signal.SIGINT, handler)
    assert stop.value.code == 130
    said = " ".join(capsys.readouterr().out.split())
    assert f"Interrupted: 5 of 6 runs are finished and kept in {out}; the same command goes on" in said
    assert not (out / "runs/random_1/stages.json").exists()


def test_a_network_from_elsewhere_is_told_of_at_the_start(tmp_path, capsys, monkeypatch):
    def change(config):
        config["model"]["init_args"]["network"] = {"class_path": f"{__name__}.from_elsewhere"}

    def begin(*_):
        raise InputError("it begins")

    monkeypatch.setattr("distill_lightning.studies.compress.command.execute", begin)
    for number, (changed, expected) in enumerate(((change, True), (lambda config: None, False))):
        (tmp_path / "tiny.yaml").write_text(configuration(changed))
        assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / f"out{number}")]) == 2
        caught = capsys.readouterr()
        assert "it begins" in caught.err
        told = "Sequential was built by no factory of this package: network.dlpk and compressed.ckpt will be loaded"
        assert (told in " ".join(caught.out.split())) == expected


def from_elsewhere() -> nn.Module:
    """A network that no factory of the package made."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def changed_steps(*steps):
    return lambda config: config["model"]["init_args"].update(steps=list(steps))


def prune(**options):
    return {"class_path": "PruneWeights", "init_args": options}


@pytest.mark.filterwarnings("ignore:the last step of the compression is over")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_steps(), "there is nothing to compress with: give model.steps"),
        (changed_steps({"class_path": "Quantize"}, prune(amount=0.5)), "cannot come after step 1"),
        (changed_steps(prune(amount=0.5, targets="nowhere")), "targets 'nowhere' matches none of SmallCNN's"),
        (
            changed_steps(prune(amount=0.5, at=1, finetune_epochs=5)),
            "the training ends at 2: train for 6 epochs",
        ),
        (changed_steps(prune(amount=0.5, at="end", finetune_epochs=1)), "nothing is trained after at='end'"),
        (changed_steps(prune(amount=2.0)), "amount"),
        (
            changed_steps({"class_path": "Quantize", "init_args": {"weight_bits": 9}}),
            "weight_bits must be 2 to 8, got 9",
        ),
        (
            changed_steps(prune(amount=0.5, at="middle")),
            "model.steps.at of PruneWeights: Expected int, float, 'start', 'end'. Got value: middle",
        ),
        (
            changed_steps({"class_path": "Prun"}),
            "there is no step Prun: known ones are Encode, HashShare, LearnMask, LowRank, PruneUnits, PruneWeights, "
            "Quantize, Regularise, ShareWeights, TieLayers",
        ),
        (
            lambda config: config["model"]["init_args"].update(network={"class_path": "SmalCNN"}),
            "similar names: SmallCNN",
        ),
        (lambda config: config["model"]["init_args"].update(dense_epochs=7), "dense_epochs=7 of 2 epochs"),
        (lambda config: config["model"]["init_args"].update(teacher="nobody"), "teacher"),
    ],
)
def test_what_cannot_be_gets_one_line(tmp_path, capsys, change, message):
    (tmp_path / "wrong.yaml").write_text(configuration(change))
    assert main(["compress", str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "out"), "--controls"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("distill-lightning: error: ")
    assert message in lines[0]


def test_wrong_arguments_get_one_line(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(configuration())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/file").touch()
    for arguments, message in (
        (["nowhere.yaml"], "there is no configuration nowhere.yaml"),
        ([str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "foreign")], "holds something else"),
        ([str(tmp_path / "tiny.yaml"), "--controls", "smaller"], "smaller"),
        ([str(tmp_path / "tiny.yaml"), "--seeds", "one"], "one"),
    ):
        assert main(["compress", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_without_controls_and_with_an_argument_of_the_configuration(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(configuration())
    arguments = ["--controls", "--model.init_args.network.init_args.width", "2"]
    assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out"), *arguments]) == 0
    assert {path.name for path in (tmp_path / "out/runs").iterdir()} == {"compressed_0"}
    assert stages_of(tmp_path / "out", "compressed_0")[0].parameters == count_parameters(SmallCNN(10, width=2)).stored
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("control: ")]
    assert len(lines) == 2
    assert all("not run" in line for line in lines)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_fit_of_the_command_line_can_be_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def change(config):
        config["trainer"].update(enable_checkpointing=True, default_root_dir="out", enable_progress_bar=False)
        config["model"]["init_args"] |= {"teacher": "dense", "report": None}

    (tmp_path / "tiny.yaml").write_text(configuration(change))
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    (checkpoint,) = tmp_path.rglob("compressed.ckpt")
    capsys.readouterr()
    for verb in ("validate", "test"):
        assert main([verb, "--config", "tiny.yaml", "--ckpt_path", str(checkpoint)]) == 0
        assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "metric", "higher"),
    [
        (SupervisedModule(SmallCNN(10), num_classes=10), "accuracy", True),
        (SupervisedModule(SmallCNN(10), num_classes=10), "ece", False),
        (SupervisedModule(SmallCNN(10), num_classes=10), "eaurc", False),
        (RegressionModule(SmallCNN(4), num_targets=2), "rmse", False),
        (RegressionModule(SmallCNN(4), num_targets=2), "calibration_error", False),
    ],
)
def test_the_metric_itself_says_whether_more_is_better(module, metric, higher):
    assert command._higher_is_better(module, metric) is higher


def test_a_control_that_is_named_twice_is_made_once(tmp_path):
    (tmp_path / "tiny.yaml").write_text("")
    config = parse_config([str(tmp_path / "tiny.yaml"), "--controls", "random", "random"])
    assert config.controls == ["random"]


def test_a_control_that_cannot_be_made_is_explained(tmp_path):
    """A Transformer's width cannot shrink, and quantization has no criterion that could be random."""

    def change(config):
        model = config["model"]["init_args"]
        sizes = {"num_classes": 10, "length": 8, "input_size": 8, "width": 8, "heads": 2, "feedforward": 8, "depth": 1}
        model["network"] = {"class_path": "SmallTransformer", "init_args": sizes}
        model["steps"] = [prune(amount=0.95, finetune_epochs=1)]

    (tmp_path / "tiny.yaml").write_text(configuration(change))
    assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out")]) == 0
    reason = json.loads((tmp_path / "out/runs/same_size_0/stages.json").read_text())["reason"]
    assert "there is no dense network of this size" in reason
    for name in ("report.md", "report.json"):
        assert "there is no dense network of this size" in (tmp_path / "out" / name).read_text()


# How long each network was trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that was trained for three epochs: a Trainer's checkpoint, and a file of its weights alone."""
    folder = tmp_path_factory.mktemp("trained")
    module = SupervisedModule(SmallCNN(10, width=4), num_classes=10)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = [
        pl.callbacks.ModelCheckpoint(dirpath=folder, filename="last"),
        pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
    ]
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=checkpoints, **options)
    trainer.fit(module, datamodule=DigitsDataModule(subset=64, val_size=32, image_size=8, batch_size=32))
    trainer.save_checkpoint(folder / "end.ckpt")
    module.export_student(folder / "weights.pt")
    return folder


def pretrained(checkpoint):
    network = {
        "class_path": "distill_lightning.Pretrained",
        "init_args": {"network": CNN, "checkpoint": str(checkpoint)},
    }
    return lambda config: config["model"]["init_args"].update(network=network)


def test_a_checkpoint_tells_the_whole_epochs_before_it(trained):
    """Two batches are an epoch, of which Lightning's own number is 0 until the next one has begun."""
    files = {**{f"step={step}.ckpt": step // 2 for step in range(1, 7)}, "last.ckpt": 3, "end.ckpt": 3}
    for file, expected in files.items():
        network = Pretrained(SmallCNN(10, width=4), trained / file)
        assert trained_before(network) == expected, file
    assert trained_before(Pretrained(SmallCNN(10, width=4), trained / "weights.pt")) is None
    assert trained_before(SmallCNN(10, width=4)) is None
    assert trained_before(copy_network(nn.Sequential(network))) == 3


@pytest.fixture
def lengths(monkeypatch):
    """The number of epochs of each run, counted as they end."""
    found, execute = {}, runs.execute

    def counting(run, make, splits, wanted, on_epoch):
        def ended(count):
            found[run.kind] = found.get(run.kind, 0) + 1
            on_epoch(count)

        execute(run, make, splits, wanted, ended)

    monkeypatch.setattr("distill_lightning.studies.compress.command.execute", counting)
    return found


@pytest.mark.parametrize(
    ("file", "options", "earlier", "expected"),
    [
        # Lightning's checkpoint of the last epoch says "epoch": 2, and three were trained.
        ("last.ckpt", [], 3, "3 + 2"),
        ("weights.pt", ["--dense-epochs", "4"], 4, "4 + 2"),
        ("last.ckpt", ["--dense-epochs", "1"], 1, "1 + 2"),
        ("weights.pt", ["--dense-epochs", "0"], 0, "2"),
        ("weights.pt", [], None, "? + 2"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_control_is_trained_for_as_long_as_the_dense_network_was(
    trained, lengths, tmp_path, capsys, file, options, earlier, expected
):
    (tmp_path / "tiny.yaml").write_text(configuration(pretrained(trained / file)))
    out = tmp_path / "out"
    assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(out), *options]) == 0
    length = 2 + (earlier or 0)
    assert lengths == {"compressed": 2, "same_size": length, "random": 2}
    stages = {stage.name: stage for kind in lengths for stage in stages_of(out, f"{kind}_0")}
    counts = {name: (stage.epochs, stage.earlier) for name, stage in stages.items()}
    assert counts["dense"] == counts["1 PruneUnits channel, before fine-tuning"] == (1, earlier)
    assert counts["1 PruneUnits channel"] == counts["final"] == counts["control: random criterion"] == (2, earlier)
    assert counts["control: same size from scratch"] == (length, 0)
    # It stands in everything that is written, and in what is printed.
    text, printed = (out / "report.md").read_text(), " ".join(capsys.readouterr().out.split())
    header, *lines = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    place = header.index("epochs")
    cells = {line[0].removeprefix("| "): line[place] for line in lines[1:10] if len(line) == len(header)}
    assert cells["final"] == expected
    assert cells["control: same size from scratch"] == str(length)
    with (out / "report.csv").open(newline="") as file_:
        (row,) = (row for row in csv.DictReader(file_) if row["stage"] == "final")
    assert (row["epochs"], row["epochs before"]) == ("2", "" if earlier is None else str(earlier))
    assert expected in printed
    unknown = "nobody knows for how many epochs SmallCNN was trained before: the control of the same size has only this"
    note = "control: same size from scratch: only this run's 2 epochs; nobody knows how many the dense network had"
    for told, where in ((unknown, printed), (note, printed), (note, text)):
        assert (told in where) == (earlier is None)


def test_a_fresh_network_has_no_earlier_epochs(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(configuration())
    for number, told in (("5", "--dense-epochs 5: the weights of SmallCNN are fresh"), ("-1", "must not be negative")):
        arguments = ["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out")]
        assert main([*arguments, "--dense-epochs", number]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_other_epochs_of_the_dense_network_are_another_study(trained, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(configuration(pretrained(trained / "weights.pt")))
    arguments = ["compress", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out"), "--controls"]
    assert main([*arguments, "--dense-epochs", "4"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--dense-epochs", "5"]) == 2
    assert "give another folder with --output" in capsys.readouterr().err


def test_the_int8_file_is_scored_like_every_other_row(tmp_path, capsys):
    """By hand: the file that the study leaves, run in ONNX Runtime on the test samples."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def change(config):
        config["model"]["init_args"]["report"]["init_args"]["onnx"] = "static"
        config["trainer"]["max_epochs"] = 6
        config["model"]["init_args"]["dense_epochs"] = 5
        config["data"]["init_args"]["subset"] = 512

    (tmp_path / "tiny.yaml").write_text(configuration(change))
    out = tmp_path / "out"
    assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(out), "--controls"]) == 0
    stages = {stage.name: stage for stage in stages_of(out, "compressed_0")}
    names = list(stages)
    assert names[:2] == ["dense", "dense, int8 ONNX"]
    assert names[-2:] == ["final", "final, int8 ONNX"]
    session = onnxruntime.InferenceSession(str(out / "network_int8.onnx"), providers=["CPUExecutionProvider"])
    data = DigitsDataModule(subset=512, val_size=32, image_size=8)
    data.setup("test")
    right, losses = [], []
    for batch in data.test_dataloader():
        (logits,) = session.run(None, {session.get_inputs()[0].name: batch.input.numpy()})
        right += (logits.argmax(1) == batch.target.numpy()).tolist()
        losses += nn.functional.cross_entropy(torch.tensor(logits), batch.target, reduction="none").tolist()
    int8, final = stages["final, int8 ONNX"], stages["final"]
    assert int8.scores["accuracy"] == pytest.approx(sum(right) / len(right))
    assert int8.scores["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert int8.scores["nll"] != pytest.approx(final.scores["nll"], rel=1e-4)
    assert int8.scores.keys() == final.scores.keys()
    # Its size and its time are its own.
    assert int8.nbytes == {"onnx_int8": (out / "network_int8.onnx").stat().st_size}
    assert {row.runtime for row in int8.latency} == {"onnxruntime int8"}
    assert "onnx_int8" not in final.nbytes
    assert {row.runtime for row in final.latency} == {"torch", "onnxruntime"}
    report = (out / "report.md").read_text()
    assert report.index("| dense |") < report.index("| dense, int8 ONNX |") < report.index("| 1 PruneUnits")
    assert report.index("| final |") < report.index("| final, int8 ONNX |") < report.index("| control: same")
    claim = re.search(r"final, int8 ONNX: (storage only: )?int8: \d\.\d+ of the ONNX file", capsys.readouterr().out)
    assert claim is not None


def test_an_int8_file_that_cannot_be_scored_stays_with_its_reason(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def change(config):
        config["model"]["init_args"]["report"]["init_args"] |= {"onnx": "static", "batch_sizes": []}

    def refuse(*_):
        raise InputError("sequences of another length")

    monkeypatch.setattr("distill_lightning.compression.onnx.session.NetworkInOnnx.forward", refuse)
    (tmp_path / "tiny.yaml").write_text(configuration(change))
    out = tmp_path / "out"
    assert main(["compress", str(tmp_path / "tiny.yaml"), "--output", str(out), "--controls"]) == 0
    final = stages_of(out, "compressed_0")[-1]
    assert final.name == "final"
    assert final.nbytes["onnx_int8"] == (out / "network_int8.onnx").stat().st_size
    note = "final: score in int8 not measured: sequences of another length"
    assert note in (out / "report.md").read_text()


def test_quantization_alone_is_compared_with_a_network_of_the_dense_size(tmp_path, monkeypatch):
    """Two bits round most weights to zero, and none of them was pruned; ONNX files are there where they can be made."""
    monkeypatch.setattr(command, "find_spec", importlib.util.find_spec)

    def change(config):
        steps = [{"class_path": "Quantize", "init_args": {"weight_bits": 2, "finetune_epochs": 1}}]
        config["model"]["init_args"]["steps"] = steps

    (tmp_path / "tiny.yaml").write_text(configuration(change))
    arguments = ["--output", str(tmp_path / "out"), "--controls", "same_size"]
    assert main(["compress", str(tmp_path / "tiny.yaml"), *arguments]) == 0
    stages = stages_of(tmp_path / "out", "compressed_0")
    (control,) = stages_of(tmp_path / "out", "same_size_0")
    assert stages[-1].nonzero < 0.7 * stages[-1].parameters
    assert control.parameters == stages[0].parameters
    assert (tmp_path / "out/network.onnx").exists() == bool(importlib.util.find_spec("onnxruntime"))


# The controls themselves


def test_the_random_control_draws_what_is_pruned():
    steps = [PruneWeights(amount=0.5), LowRank(rank=2), PruneUnits(amount=0.5, unit="channel", criterion="taylor")]
    drawn = random_steps(steps)
    assert [getattr(step, "criterion", None) for step in drawn] == ["random", None, "random"]
    assert [getattr(step, "criterion", None) for step in steps] == ["magnitude", None, "taylor"]
    with pytest.raises(InputError, match="threshold is one of the learned scores"):
        random_steps([LearnMask(SoftMovement(), finetune_epochs=1)])
    with pytest.raises(InputError, match="no step prunes: there is no criterion to compare with a random one"):
        random_steps([Quantize()])


def test_the_random_control_is_random_in_the_network():
    """The largest weights stay by magnitude, and go as often as any by chance."""
    survivors = {}
    for name, steps in (
        ("magnitude", [PruneWeights(amount=0.5)]),
        ("random", random_steps([PruneWeights(amount=0.5)])),
    ):
        torch.manual_seed(0)
        network = SmallCNN(10)
        before = torch.cat([p.detach().abs().flatten() for p in network.parameters() if p.dim() > 1])
        Compressor(network, steps, torch.rand(2, 1, 8, 8), bn_batches=0).apply()
        after = torch.cat([p.detach().abs().flatten() for p in network.parameters() if p.dim() > 1])
        large = before > before.quantile(0.75)
        survivors[name] = float((after[large] != 0).float().mean())
    assert survivors["magnitude"] == 1
    assert survivors["random"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda: SmallCNN(10), [PruneWeights(amount=0.9)]),
        (lambda: SmallCNN(10), [PruneUnits(amount=0.5, unit="channel"), PruneWeights(amount=0.5)]),
        (lambda: SmallCNN(10), [LowRank(rank=4)]),
        (lambda: SmallLSTM(10, input_size=8), [PruneWeights(amount=0.8)]),
        (lambda: SmallLSTM(10, input_size=8), [PruneUnits(amount=0.5, unit="hidden_unit")]),
        (lambda: SmallTransformer(10, length=8, input_size=8), [PruneWeights(amount=0.5)]),
        (lambda: SmallCNN(10), [ShareWeights(k=16)]),
    ],
)
def test_a_network_of_the_same_size_has_at_most_as_many_parameters(make, steps):
    torch.manual_seed(0)
    compressed, inputs = make(), torch.rand(2, 1, 8, 8)
    Compressor(compressed, steps, inputs, bn_batches=0).apply()
    parameters = list(load_plain(compressed).parameters())
    # Biases begin as zeros, which no step prunes.
    nonzero = sum(int(value.count_nonzero()) if value.dim() > 1 else len(value) for value in parameters)
    torch.manual_seed(1)
    fresh = same_size_network(make(), compressed, inputs, seed=3)
    stored = sum(parameter.numel() for parameter in fresh.parameters())
    assert 0.5 * nonzero < stored <= nonzero
    assert fresh(inputs).shape == (2, 10)
    # Dense: nothing but what is zero in every network, biases and norms' shifts.
    assert all(bool(p.all()) for p in fresh.parameters() if p.dim() > 1)
    torch.manual_seed(1)
    again = same_size_network(make(), compressed, inputs, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(fresh.parameters(), again.parameters(), strict=True))


def load_plain(network):
    from distill_lightning.compression.structure.changes import plain_copy

    return plain_copy(network)
