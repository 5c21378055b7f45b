"""The command line: LightningCLI's verbs, the warning about checkpoints, and one clear line for bad input."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from pytorch_lightning.utilities import rank_zero_info
from safetensors.torch import load_file

import distill_lightning
from distill_lightning import BeamSearch, FEEDModule, HintDistance, SmallResNet, SupervisedModule, cli
from distill_lightning.cli import DistillCLI, main
from distill_lightning.modules.parts.translating import Translating
from distill_lightning.networks.weights import read_weights
from distill_lightning.studies.quiet import quiet_down
from distill_lightning.testing import TinyDataModule, tiny_trainer

# Of a parser and of nobody, where a checkpoint has a module's options.
NOT_OPTIONS = ["init_args", "dict_kwargs", "class_path", "__path__", "nobodys"]


def small(width=2, num_classes=10):
    return {"class_path": "SmallResNet", "init_args": {"num_classes": num_classes, "width": width}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a configuration of one short FEED training, changed by a function, into the working folder."""
    monkeypatch.chdir(tmp_path)

    def writer(change=lambda config: None):
        config = {
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": "out"},
            "model": {
                "class_path": "FEEDModule",
                "init_args": {
                    "student": small(),
                    "teachers": [small(3), small(4)],
                    "student_layer": "stage3",
                    "beta": 2.0,
                },
            },
            "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 64, "val_size": 32, "image_size": 8}},
        }
        change(config)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return "config.yaml"

    return writer


def refused(capsys, tmp_path, *arguments):
    """The line that a refused call prints; nothing but the inputs may lie in the folder."""
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("distill-lightning: error: ")
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    return lines[0]


@pytest.mark.slow
def test_fit_then_validate_test_and_predict(write, tmp_path, capsys):
    config = write()
    assert main(["fit", "--config", config]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert (tmp_path / "out/lightning_logs/version_0/config.yaml").is_file()
    capsys.readouterr()
    assert main(["validate", "--config", config, "--ckpt_path", str(checkpoint)]) == 0
    assert "val/accuracy" in capsys.readouterr().out
    assert main(["test", "--config", config, "--ckpt_path", str(checkpoint)]) == 0
    assert "test/nll" in capsys.readouterr().out
    assert main(["predict", "--config", config, "--ckpt_path", str(checkpoint)]) == 0
    written = "out/lightning_logs/version_3/predictions.safetensors"
    assert written in capsys.readouterr().out
    assert load_file(tmp_path / written)["logits"].shape == (500, 10)
    assert set(read_weights(checkpoint)) == set(SmallResNet(10, width=2).state_dict())


@pytest.mark.slow
def test_functions_are_networks_in_yaml(write):
    def change(config):
        config["model"]["init_args"]["teachers"][1] = {
            "class_path": "distill_lightning.torchvision_network",
            "init_args": {"name": "resnet18", "num_classes": 10, "in_channels": 1},
        }
        config["model"]["init_args"] |= {
            "teacher_layers": ["stage3", "layer2"],
            "sizes": {"class_path": "TeacherSize"},
        }
        config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
        config["model"]["init_args"]["lr_scheduler"] = {"class_path": "OneCycle", "init_args": {"warmup": 0.1}}
        config["trainer"]["fast_dev_run"] = True

    assert main(["fit", "--config", write(change)]) == 0


@pytest.mark.slow
def test_a_checkpoint_that_overrides_the_command_line_says_so(write, tmp_path):
    config = write()
    main(["fit", "--config", config])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    with pytest.warns(UserWarning, match=r"the checkpoint's beta=2.0 overrides the given beta=7.0") as caught:
        main(["validate", "--config", config, "--ckpt_path", str(checkpoint), "--model.init_args.beta", "7"])
    assert sum("overrides" in str(warning.message) for warning in caught) == 1


def model(**options):
    return lambda config: config["model"]["init_args"].update(options)


def data(**options):
    return lambda config: config["data"]["init_args"].update(options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(modle=1), "modle"),
        (model(betta=1), "'betta' is not accepted"),
        (model(beta="much"), "beta.*float.*much"),
        (model(student={"class_path": "SmallResNet", "init_args": {"widht": 2}}), "student.*'widht'"),
        (model(student={"class_path": "nowhere.Net"}), "No module named 'nowhere'"),
        (lambda config: config["model"].update(class_path="FEDModule"), "FEDModule"),
        (model(student_layer="stage9"), "SmallResNet has no layer 'stage9'; similar names: stage"),
        (model(teachers=[small(3, num_classes=7)]), "teacher 0 .SmallResNet. has 7 classes where num_classes=10"),
        (model(student=small(2, num_classes=7)), "student .SmallResNet. has 7 classes where num_classes=10"),
        (
            model(
                teachers=[
                    {
                        "class_path": "distill_lightning.Pretrained",
                        "init_args": {"network": small(), "checkpoint": "no.pt"},
                    }
                ]
            ),
            "no checkpoint at no.pt",
        ),
        (model(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": -1.0}}), "optimizer: Invalid learning"),
        (model(lr_scheduler={"class_path": "OneCycle", "init_args": {"warmup": 30}}), "warmup is a share"),
        (
            lambda c: (model(lr_scheduler={"class_path": "OneCycle"})(c), c["trainer"].update(max_epochs=-1)),
            "OneCycle needs the length of the training",
        ),
        (lambda config: config["trainer"].update(accelerator="gpuu"), "trainer: .*gpuu"),
        (lambda config: config["trainer"].update(devices=0), "trainer: .*0"),
        (model(sizes={"class_path": "StudnetSize"}), "sizes.*StudnetSize"),
        (data(subset=5000), "subset=5000 is larger than the 1265 training images"),
        (data(test_size=0), "test_size must be at least 1, got 0: the split or batch would be empty"),
        (data(val_size=1297), "leaves none of 1297 images"),
        (
            lambda config: config.update(
                data={"class_path": "FashionMNISTDataModule", "init_args": {"data_dir": "none"}}
            ),
            "no train-images-idx3-ubyte.gz in none: apt-get install",
        ),
    ],
)  # fmt: skip
def test_bad_configurations_get_one_line(write, tmp_path, capsys, change, message):
    config = write(change)
    line = refused(capsys, tmp_path, "fit", "--config", config)
    assert re.search(message, line), line


def test_what_this_package_tells_is_heard_and_what_lightning_tells_is_not(caplog):
    quiet_down()
    # This file is not of the package.
    rank_zero_info("GPU available: False")
    told = Translating(BeamSearch(), 1, None)
    told.signatures = {"bleu": "nrefs:1|tok:13a"}
    told.fit_ends(None)
    assert [record.getMessage() for record in caplog.records] == ["bleu: nrefs:1|tok:13a"]


def test_a_missing_configuration_gets_one_line(write, tmp_path, capsys):
    assert "nope.yaml" in refused(capsys, tmp_path, "fit", "--config", "nope.yaml")


@pytest.mark.slow
def test_a_broken_yaml_gets_one_line(write, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("model: [\n")
    assert "line 2" in refused(capsys, tmp_path, "fit", "--config", "broken.yaml")


@pytest.mark.slow
def test_an_unknown_verb_gets_one_line(write, tmp_path, capsys):
    assert "fti" in refused(capsys, tmp_path, "fti")


@pytest.mark.slow
def test_a_corrupt_data_file_gets_one_line(write, tmp_path, capsys):
    def change(config):
        config["data"] = {"class_path": "FashionMNISTDataModule", "init_args": {"data_dir": "fashion"}}

    config = write(change)
    (tmp_path / "fashion").mkdir()
    whole = gzip.compress(bytes(5000))
    (tmp_path / "fashion/train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    assert "train-images-idx3-ubyte.gz is damaged" in refused(capsys, tmp_path, "fit", "--config", config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.yaml is empty: give a configuration"),
        ("- 1", "config.yaml holds no keys: give a configuration"),
        ("a: [1,\nb: }", "config.yaml is no YAML: while parsing a flow node"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(write, tmp_path, capsys, content, message):
    (tmp_path / write()).write_text(content)
    for arguments in (["--config", "config.yaml"], ["--config=config.yaml"], ["-c", "config.yaml"]):
        assert message in refused(capsys, tmp_path, "fit", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no checkpoint at some.ckpt"),
        (b"no checkpoint", "some.ckpt"),
        (b"", "some.ckpt cannot be read as weights"),
    ],
)
def test_a_bad_checkpoint_gets_one_line(write, tmp_path, capsys, content, message):
    config = write()
    if content is not None:
        (tmp_path / "some.ckpt").write_bytes(content)
    assert message in refused(capsys, tmp_path, "fit", "--config", config, "--ckpt_path", "some.ckpt")


@pytest.mark.slow
def test_a_checkpoint_that_would_run_code_is_refused(write, tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    config = write()
    torch.save({"state_dict": {}, "extra": Attack()}, tmp_path / "evil.ckpt")
    assert "evil.ckpt is refused" in refused(capsys, tmp_path, "fit", "--config", config, "--ckpt_path", "evil.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "found",
    [
        {
            "_class_path": "distill_lightning.FEEDModule",
            "optimizer": {"class_path": "evilmod.f", "init_args": {"x": 1}},
        },
        {"_class_path": "distill_lightning.FEEDModule", "lr_scheduler": {"class_path": "evilmod.f", "init_args": {}}},
        {"_class_path": "distill_lightning.FEEDModule", "optimizer": "evilmod.f"},
        {"_class_path": "distill_lightning.FEEDModule", "optimizer": '{"class_path": "evilmod.f"}'},
        {"_class_path": "distill_lightning.FEEDModule", "optimizer.class_path": "evilmod.f"},
        {"_class_path": "evilmod.FEEDModule"},
        {"class_path": "evilmod.FEEDModule", "init_args": {}},
        {"optimizer": {"class_path": "evilmod.f", "init_args": {}}},
        *({"_class_path": "distill_lightning.FEEDModule", name: {"optimizer": "evilmod.f"}} for name in NOT_OPTIONS),
    ],
)
def test_a_checkpoint_names_nothing_that_is_imported(write, tmp_path, capsys, monkeypatch, found):
    config = write()
    (tmp_path / "evilmod.py").write_text("from pathlib import Path\nPath('owned').touch()\ndef f(x): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "hyper_parameters": found}, "evil.ckpt")
    for verb in ("fit", "validate", "test", "predict"):
        assert "evil.ckpt" in refused(capsys, tmp_path, verb, "--config", config, "--ckpt_path", "evil.ckpt")
    assert "evilmod" not in sys.modules


@pytest.mark.slow
def test_plain_values_and_choices_of_a_checkpoint_are_taken(write, tmp_path):
    config = write(model(distance={"class_path": "HintDistance", "init_args": {"reduction": "sum"}}))
    main(["fit", "--config", config])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    arguments = ["validate", "--config", write(), "--ckpt_path", str(checkpoint), "--model.init_args.beta", "7"]
    with pytest.warns(UserWarning, match=r"the checkpoint's (beta|distance)=.* overrides"):
        module = DistillCLI(arguments).model
    assert module.beta == 2.0
    assert module.distance == HintDistance(reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_names_no_folder_that_is_written_to(write, tmp_path, capsys, verb):
    def self_kd(**options):
        def change(config):
            own = {"student": small(), "alpha_schedule": "constant", **options}
            config["model"] = {"class_path": "SelfKDModule", "init_args": own}

        return change

    victim = {"class_path": "StoredPast", "init_args": {"folder": "victim/deep", "in_checkpoint": 0}}
    config = write(self_kd(past=victim))
    assert main(["fit", "--config", config]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    # What the configuration says itself goes on.
    longer = ["--trainer.max_epochs", "2"]
    assert main([verb, "--config", config, "--ckpt_path", str(checkpoint), *longer]) == 0
    # Also from another place.
    (tmp_path / "victim").rename(tmp_path / "moved")
    moved = write(self_kd(past={"class_path": "StoredPast", "init_args": {"folder": "moved/deep", "in_checkpoint": 0}}))
    assert main([verb, "--config", moved, "--ckpt_path", str(checkpoint), *longer]) == 0
    assert not (tmp_path / "victim").exists()
    shutil.rmtree(tmp_path / "moved")
    capsys.readouterr()
    line = refused(capsys, tmp_path, verb, "--config", write(self_kd()), "--ckpt_path", str(checkpoint), *longer)
    assert "names the file or folder 'victim/deep' in past.folder, which the configuration does not name" in line


@pytest.mark.slow
def test_a_checkpoint_names_no_other_store_of_the_configurations_class(write, tmp_path, capsys):
    store = {"class_path": "TeacherStore", "init_args": {"path": "own", "networks": small(3)}}

    def change(config):
        config["model"] = {"class_path": "KDModule", "init_args": {"student": small(), "teachers": store}}
        config["data"]["init_args"]["views"] = 2

    config = write(change)
    # As the parsed configuration spells it.
    network = {"class_path": "distill_lightning.SmallResNet", "init_args": {"num_classes": 10, "width": 3}}
    for name in ("victim", "own"):
        options = {"path": name, "networks": network}
        found = {"_class_path": "distill_lightning.modules.kd.KDModule"}
        found["teachers"] = {"class_path": "distill_lightning.TeacherStore", "init_args": options}
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "hyper_parameters": found}, "evil.ckpt")
        # What it holds is refused later.
        assert "victim" not in refused(capsys, tmp_path, "fit", "--config", config, "--ckpt_path", "evil.ckpt")
        assert not (tmp_path / "victim").exists()


@pytest.mark.slow
def test_another_packages_module_goes_on_with_the_classes_of_its_configuration(write, tmp_path, capsys, monkeypatch):
    (tmp_path / "foreign_module.py").write_text(
        """
import torch
from typing import Callable, Iterable
from pytorch_lightning import LightningModule
from distill_lightning.data.batch import Batch

class Plain(LightningModule):
    def __init__(self, net: torch.nn.Module, optimizer: Callable[[Iterable], torch.optim.Optimizer], rate: float = 1.0):
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net, self.optimizer, self.rate = net, optimizer, rate

    def training_step(self, batch, batch_idx):
        batch = Batch.of(batch)
        return self.rate * torch.nn.functional.cross_entropy(self.net(batch.input), batch.target)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.optimizer(self.parameters())
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(config):
        options = {
            "net": small(),
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            "rate": 0.5,
        }
        config["model"] = {"class_path": "foreign_module.Plain", "init_args": options}

    config = write(change)
    assert main(["fit", "--config", config]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    arguments = ["fit", "--config", config, "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "2"]
    # The rate of the checkpoint counts.
    with pytest.warns(UserWarning, match=r"the checkpoint's rate=0.5 overrides the given rate=2.0"):
        module = DistillCLI([*arguments, "--model.init_args.rate", "2"]).model
    assert module.rate == 0.5
    assert module.trainer.current_epoch == 2
    line = refused(capsys, tmp_path, *arguments, "--model.init_args.optimizer", "torch.optim.SGD",
                   "--model.init_args.optimizer.init_args.lr", "0.1")  # fmt: skip
    assert "names 'torch.optim.Adam' in optimizer" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_what_makes_no_optimizer_is_refused(write, tmp_path, capsys, name):
    config = write(model(**{name: {"class_path": "os.system", "init_args": {"command": "touch owned"}}}))
    line = refused(capsys, tmp_path, "fit", "--config", config)
    assert f"model.init_args.{name}: os.system makes no" in line


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture_gets_one_line(write, tmp_path, capsys):
    config = write()
    options = {"num_classes": 3, "student_layer": "stage3", "beta": 2.0}
    for name, module in (
        ("other", FEEDModule(SmallResNet(3, width=6), SmallResNet(3, width=3), **options)),
        ("plain", SupervisedModule(SmallResNet(3, width=2), num_classes=3)),
    ):
        trainer = tiny_trainer()
        trainer.fit(module, datamodule=TinyDataModule())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    line = refused(capsys, tmp_path, "fit", "--config", config, "--ckpt_path", "other.ckpt")
    assert "other.ckpt is a checkpoint of another architecture than FEEDModule: it has" in line
    line = refused(capsys, tmp_path, "fit", "--config", config, "--ckpt_path", "plain.ckpt")
    assert re.search(r"plain.ckpt is a checkpoint of .*SupervisedModule, not of .*FEEDModule: give", line)


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_gets_one_line(write, tmp_path, capsys):
    config = write()
    trainer = tiny_trainer()
    options = {"num_classes": 3, "student_layer": "stage3", "beta": 2.0}
    trainer.fit(FEEDModule(SmallResNet(3, width=2), SmallResNet(3, width=3), **options), datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    checkpoint = torch.load(tmp_path / "now.ckpt", weights_only=True)
    del checkpoint["distill_lightning"]
    # Where the class lay, and what it took.
    path = "distill_lightning.modules.feed.module.FEEDModule"
    checkpoint["hyper_parameters"] = {"_class_path": path, "num_classes": 3, "loss": "hint", "translator": "conv3"}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    (tmp_path / "now.ckpt").unlink()
    for command in ("fit", "test"):
        line = refused(capsys, tmp_path, command, "--config", config, "--ckpt_path", "old.ckpt")
        assert "old.ckpt has format 1 of distill_lightning's checkpoints, this version reads 2: train anew" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student.pt", "student.safetensors"])
def test_an_exported_student_is_no_checkpoint(write, tmp_path, capsys, name):
    config = write()
    SupervisedModule(SmallResNet(10, width=2), num_classes=10).export_student(tmp_path / name)
    line = refused(capsys, tmp_path, "fit", "--config", config, "--ckpt_path", name)
    assert f"{name} is not a checkpoint of a training" in line
    assert "Pretrained" in line


@pytest.mark.slow
def test_the_best_checkpoint_of_another_process_is_refused(write, tmp_path, capsys):
    assert "give its path" in refused(capsys, tmp_path, "validate", "--config", write(), "--ckpt_path", "best")


@pytest.mark.slow
def test_overfitting_one_batch_reads_that_batch(write, monkeypatch):
    seen = []
    original = SupervisedModule.terms

    def change(config):
        config["model"] = {"class_path": "SupervisedModule", "init_args": {"student": small()}}
        config["trainer"]["overfit_batches"] = 1

    monkeypatch.setattr(SupervisedModule, "terms", lambda self, batch: (seen.append(batch), original(self, batch))[1])
    with pytest.warns(UserWarning, match="overfit"):
        assert main(["fit", "--config", write(change)]) == 0
    assert seen[0].index.tolist() == list(range(64))


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(write, monkeypatch):
    config = write()
    # What the package itself calls so; code of a test's own would be a user's.
    monkeypatch.setattr("distill_lightning.modules.feed.FEEDModule.weights", int)
    with pytest.raises((TypeError, AttributeError)):
        main(["fit", "--config", config])


@pytest.mark.slow
def test_help_names_compare(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "distill-lightning compare CONFIG" in capsys.readouterr().out


@pytest.mark.slow
def test_callbacks_have_short_names(write):
    config = write()
    for name in ("ReliabilityDiagram", "RiskCoverage", "TeacherReport"):
        arguments = ["fit", "--config", config, "--trainer.fast_dev_run", "true", "--trainer.callbacks+", name]
        with warnings.catch_warnings():
            # Random teachers are near chance.
            warnings.filterwarnings("ignore", message=".*little better than guessing.*")
            assert main(arguments) == 0


# Prints the exit status and which of the heavy packages a call has imported.
WATCHED = """
import json, sys
from distill_lightning.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
heavy = {"torch", "pytorch_lightning", "numpy", "matplotlib"} & set(sys.modules)
print(json.dumps([status, sorted(heavy)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["compare", "--help"], 0, "usage: distill-lightning compare CONFIG"),
        (["compress", "--help"], 0, "usage: distill-lightning compress"),
        (["--version"], 0, f"distill-lightning {distill_lightning.__version__}"),
        (["compare", "none.yaml"], 2, "none.yaml"),
        (["compress", "none.yaml"], 2, "there is no configuration none.yaml"),
    ],
)
def test_help_version_and_what_is_refused_at_once_need_no_torch(arguments, status, expected):
    call = [sys.executable, "-c", WATCHED, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    *said, last = done.stdout.splitlines()
    assert json.loads(last) == [status, []]
    assert expected in "\n".join([*said, done.stderr])


def test_the_cli_class_is_imported_when_it_is_asked_for():
    assert cli.DistillCLI is DistillCLI
    assert DistillCLI.subcommands()["record"] == {"model", "datamodule"}
    with pytest.raises(AttributeError, match=r"module 'distill_lightning.cli' has no attribute 'nope'"):
        cli.nope  # noqa: B018


@pytest.mark.slow
def test_the_console_script_finds_modules_of_the_working_directory_and_short_names_and_is_quiet(write, tmp_path):
    config = write()
    (tmp_path / "mydata.py").write_text(
        "from distill_lightning import DigitsDataModule\n\n\nclass ShapesData(DigitsDataModule):\n"
        "    def prepare_data(self):\n        print('shapes')\n"
    )
    content = yaml.safe_load((tmp_path / config).read_text())
    content["data"]["class_path"] = "mydata.ShapesData"
    (tmp_path / config).write_text(yaml.safe_dump(content))
    # As pip writes it, in a folder of its own.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/distill-lightning").write_text(
        "import sys\nfrom distill_lightning.cli import main\nsys.exit(main())\n"
    )

    def done(*command):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)

    found = done("bin/distill-lightning", "fit", "--config", config, "--trainer.fast_dev_run", "true")
    assert found.returncode == 0, found.stderr
    assert "shapes" in found.stdout
    # Lightning's own lines, and the warnings that are meant to be so.
    assert "GPU available" not in found.stderr + found.stdout
    assert "Warning" not in found.stderr
    # -P keeps the folders of scripts off the path, and this one, too.
    calls = "from distill_lightning.cli import main; main(); import mydata"
    assert "No module named 'mydata'" in done("-P", "-c", calls, "--version").stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_unit_of_aurc_stands_below_the_table(verb, write, capsys):
    assert main([verb, "--config", write()]) == 0
    out = capsys.readouterr().out
    assert out.index("aurc and eaurc are in per mille") > out.index("nll")


@pytest.mark.slow
def test_a_fit_ends_with_its_checkpoint_and_leaves_no_doubt_of_an_older_one(write, capfd):
    best = {
        "class_path": "ModelCheckpoint",
        "init_args": {"dirpath": "out/best", "filename": "best", "monitor": "val/nll"},
    }
    config = write(lambda config: config["trainer"].update(callbacks=[best], logger=False, default_root_dir="out/best"))
    assert main(["fit", "--config", config]) == 0
    out, err = capfd.readouterr()
    path, score = re.fullmatch(r"Checkpoint: (\S+) \(val/nll ([\d.]+)\)", out.strip().splitlines()[-1]).groups()
    assert path == "out/best/best.ckpt"
    kept = torch.load(path, weights_only=True)
    assert kept["circumstances"]["metrics"]["val/nll"] == pytest.approx(float(score), rel=1e-3)
    # The folder holds the training's own configuration, of which nothing need be said.
    assert "not empty" not in out + err

    assert main(["fit", "--config", config]) == 0
    first, second = capfd.readouterr().out.strip().splitlines()[-2:]
    assert first.startswith("Checkpoint: out/best/best-v1.ckpt (")
    assert second == "out/best/best.ckpt was there before, and is what it was."


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(could not find the monitored key|have no `val_dataloader`|running validation)")
def test_a_fit_that_leaves_no_checkpoint_says_so(write, capsys):
    best = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/nll"}}
    config = write(lambda config: config["trainer"].update(callbacks=[best], limit_val_batches=0))
    assert main(["fit", "--config", config]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == (
        "No checkpoint: nothing logged val/nll, which its ModelCheckpoint is to monitor."
    )
