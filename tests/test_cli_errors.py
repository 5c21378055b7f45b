"""What the command line says where Lightning, or a user's own code, finds an error after everything is built."""

import re
import sys
import textwrap

import pytest
import torch

from distill_lightning.cli import main
from distill_lightning.studies.error_line import own_lines

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: SupervisedModule
  init_args:
    student: {class_path: SmallResNet, init_args: {num_classes: 10, width: 4}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data:
  class_path: DigitsDataModule
  init_args: {subset: 64, batch_size: 32, num_workers: 0}
"""


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """Runs ``fit`` with further options, and returns its status and what it said of an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.yaml").write_text(CONFIG)

    def run(*options):
        status = main(["fit", "--config", "config.yaml", *options])
        return status, capsys.readouterr().err

    return run


def plateau(**options):
    name = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    return [f"--model.lr_scheduler={name}", *(f"--{key}={value}" for key, value in options.items())]


REFUSED = {
    "early stopping": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/nl"],
        "Early stopping conditioned on metric `val/nl` which is not available.",
    ),
    "checkpoints": (
        [
            "--trainer.callbacks+=ModelCheckpoint",
            "--trainer.callbacks.monitor=val/nl",
            "--trainer.enable_checkpointing=true",
        ],
        "`ModelCheckpoint(monitor='val/nl')` could not find the monitored key",
    ),
    "rates without a logger": (
        ["--trainer.callbacks+=LearningRateMonitor"],
        "Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger.",
    ),
    "a logger whose package is missing": (["--trainer.logger=CometLogger"], "Requirement 'comet-ml"),
    "a plateau of a metric that is not there": (
        ["--model.lr_scheduler=pytorch_lightning.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/nl"],
        "ReduceLROnPlateau conditioned on metric val/nl which is not available.",
    ),
    "a plateau without validation": (
        plateau(**{"trainer.limit_val_batches": 0}),
        "ReduceLROnPlateau conditioned on metric val/nll which is not available.",
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(("options", "told"), REFUSED.values(), ids=REFUSED)
def test_what_lightning_finds_is_one_line(fit, options, told):
    status, error = fit(*options)
    assert status == 2
    assert error.startswith(f"distill-lightning: error: {told}")
    assert error.count("\n") == 1
    # A name that is nearly one that is logged.
    assert error.strip().endswith("; set monitor to one of these, such as val/nll") == (
        re.search(r"val/nl\b", told) is not None
    )
    assert "Did you call" not in error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("every", [1, 2])
def test_a_plateau_is_looked_for_after_every_validation(fit, every):
    assert fit(*plateau(**{"trainer.check_val_every_n_epoch": every}))[0] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_the_plateaus_short_name_is_pytorchs(fit):
    assert fit("--model.lr_scheduler", "ReduceLROnPlateau", "--model.lr_scheduler.patience", "3")[0] == 0


OWN = """
import pytorch_lightning as pl

class Shapes(pl.LightningDataModule):
    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(self, size: int = 2):
        super().__init__()
        self.scale = 1 / (size - 2)

    def train_dataloader(self):
        return [][0]
"""


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize(
    ("options", "line", "told"),
    [
        (["--data=shapes_of_ones_own.Shapes"], 10, "in __init__: ZeroDivisionError: division by zero"),
        (
            ["--data=shapes_of_ones_own.Shapes", "--data.size=3"],
            13,
            "in train_dataloader: IndexError: list index out of range",
        ),
    ],
)
def test_an_error_in_ones_own_code_begins_with_its_line(fit, tmp_path, monkeypatch, options, line, told):
    (tmp_path / "shapes_of_ones_own.py").write_text(OWN)
    # A test before has imported its own.
    monkeypatch.delitem(sys.modules, "shapes_of_ones_own", raising=False)
    status, error = fit(*options)
    lines = error.rstrip().splitlines()
    assert status == 1
    assert lines[0] == f"distill-lightning: error: {tmp_path / 'shapes_of_ones_own.py'}, line {line}, {told}"
    assert lines[2].strip() == OWN.splitlines()[line - 1].strip()
    assert len(lines) < 6


def test_errors_elsewhere_keep_their_traceback():
    scope = {"torch": torch}
    # Code without a file is nobody's own.
    exec(compile(textwrap.dedent("def fail():\n    torch.zeros(2) + torch.zeros(3)"), "<string>", "exec"), scope)
    with pytest.raises(RuntimeError) as error:
        scope["fail"]()
    # This file's own frame is that of a user here.
    error.value.__traceback__ = error.value.__traceback__.tb_next
    assert own_lines(error.value) is None


def test_data_without_a_number_of_classes_say_where_to_give_it(fit, tmp_path):
    (tmp_path / "plain_of_ones_own.py").write_text(
        OWN.replace("num_classes = 10", "other = 10").replace("= 2)", "= 3)")
    )
    status, error = fit("--data=plain_of_ones_own.Shapes")
    assert status == 2
    assert "set model.init_args.num_classes, or give the data module the attributes num_classes and input_sha" in error


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--model=KDModule", "--model.temprature=4"],
            "Option 'temprature' is not accepted; similar names: temperature",
        ),
        (["--data.batch_sise=4"], "Option 'batch_sise' is not accepted; similar names: batch_size"),
    ],
)
def test_near_names_of_an_option_are_told(fit, options, told):
    status, error = fit(*options)
    assert status == 2
    assert told in error
    assert error.count("\n") == 1


def test_a_wrong_verb_is_told_all_verbs(capsys):
    assert main(["comparr"]) == 2
    error = capsys.readouterr().err
    assert "there is no verb comparr: fit, validate, test, predict, record, compare, compress, export, doctor" in error
    assert "did you mean compare?" in error


def test_a_function_of_the_package_is_told_by_its_whole_name(fit):
    status, error = fit("--model.student=Pretrained")
    assert status == 2
    assert "Pretrained is a function, which has no short name: give distill_lightning.Pretrained" in error
