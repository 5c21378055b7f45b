"""lightning-bolts' optimiser, schedule and callbacks in the trainings of this package, in Python and in YAML."""

import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import yaml
from bolts_files import write_fashion_mnist
from pl_bolts.callbacks import ModuleDataMonitor, PrintTableMetricsCallback, TrainingDataMonitor
from pl_bolts.callbacks.verification import batch_gradient
from pl_bolts.optimizers import LARS, LinearWarmupCosineAnnealingLR
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import FixedDiscriminator, KDModule, MEALV2Module, SupervisedModule
from distill_lightning.cli import main
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
warmup_cosine = partial(
    LinearWarmupCosineAnnealingLR, warmup_epochs=3, max_epochs=8, warmup_start_lr=0.01, eta_min=0.02
)


def warmed_and_annealed(epoch, peak):
    """A line from 0.01 to the peak in epochs 0 to 2, then half a cosine from epoch 3 to 0.02 in epoch 8."""
    if epoch < 3:
        return 0.01 + epoch / 2 * (peak - 0.01)
    return 0.02 + (peak - 0.02) * (1 + math.cos(math.pi * (epoch - 3) / 5)) / 2


class Rates(pl.Callback):
    """The learning rates of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_the_rate_rises_and_falls_by_epochs():
    rates = Rates()
    module = SupervisedModule(TinyNet(), num_classes=3, optimizer=sgd, lr_scheduler=warmup_cosine)
    tiny_trainer(max_epochs=8, callbacks=[rates], limit_val_batches=0).fit(module, datamodule=TinyDataModule())
    assert rates.seen == [[pytest.approx(warmed_and_annealed(epoch, 0.1))] for epoch in range(8)]


def test_groups_have_schedules_of_their_own():
    rates = Rates()
    adversary = FixedDiscriminator(lr=0.3, lr_scheduler=warmup_cosine)
    module = MEALV2Module(
        TinyNet(), TinyNet(), num_classes=3, discriminator=adversary, optimizer=sgd, hard_label_weight=1.0,
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )  # fmt: skip
    tiny_trainer(max_epochs=8, callbacks=[rates], limit_val_batches=0).fit(module, datamodule=TinyDataModule())
    expected = [[0.1 * 0.5**epoch, warmed_and_annealed(epoch, 0.3)] for epoch in range(8)]
    assert rates.seen == [pytest.approx(row) for row in expected]


lars = partial(LARS, lr=0.5, momentum=0.9, weight_decay=1e-2, trust_coefficient=0.1)


class Weights(pl.Callback):
    """The weights and gradients at each step, and the weights after it."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, *rest):
        self.steps.append([(one.detach().clone(), one.grad.clone()) for one in pl_module.student.parameters()])

    def on_train_end(self, trainer, pl_module):
        self.last = [one.detach().clone() for one in pl_module.student.parameters()]


def test_every_step_is_that_of_lars():
    weights = Weights()
    module = KDModule(TinyNet(), TinyNet(), num_classes=3, optimizer=lars)
    tiny_trainer(max_epochs=2, callbacks=[weights], limit_val_batches=0).fit(module, datamodule=TinyDataModule())
    assert len(weights.steps) == 6
    velocities = [torch.zeros_like(value) for value, _ in weights.steps[0]]
    afterwards = [*[[value for value, _ in step] for step in weights.steps[1:]], weights.last]
    for step, after in zip(weights.steps, afterwards, strict=True):
        for place, (value, gradient) in enumerate(step):
            lengths = value.norm() * gradient.norm() > 0
            trust = 0.1 * value.norm() / (gradient.norm() + 0.01 * value.norm()) if lengths else 1.0
            velocities[place] = 0.9 * velocities[place] + trust * (gradient + 0.01 * value * lengths)
            assert torch.allclose(after[place], value - 0.5 * velocities[place], atol=1e-6)


class SaveAfter(pl.callbacks.Checkpoint):
    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def test_a_training_goes_on_from_a_checkpoint(tmp_path):
    path = tmp_path / "middle.ckpt"

    def trained(seed, *callbacks, **options):
        torch.manual_seed(seed)
        module = KDModule(TinyNet(), TEACHER, num_classes=3, optimizer=lars, lr_scheduler=warmup_cosine)
        trainer = tiny_trainer(max_epochs=6, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=TinyDataModule(), **options)
        return module.state_dict()

    whole = trained(0, SaveAfter(path, 3))
    assert torch.load(path, weights_only=True)["lr_schedulers"][0]["warmup_epochs"] == 3
    resumed = trained(1, ckpt_path=str(path))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


TEACHER = TinyNet()


def test_the_table_has_a_row_for_each_epoch(monkeypatch):
    tables = []
    # Where Lightning's messages go depends on what ran before in the process.
    monkeypatch.setattr("pl_bolts.callbacks.printing.rank_zero_info", tables.append)
    tiny_trainer(max_epochs=2, callbacks=[PrintTableMetricsCallback()]).fit(
        KDModule(TinyNet(), TEACHER, num_classes=3), datamodule=TinyDataModule()
    )
    assert [len(table.splitlines()) for table in tables] == [3, 4]
    head, _, *rows = [line.split("│") for line in tables[-1].splitlines()]
    assert {"train/loss", "train/kd", "val/accuracy"} <= set(head)
    assert all(math.isfinite(float(value)) for row in rows for value in row)


class Histograms(TensorBoardLogger):
    """Keeps their names, and writes nothing."""

    def __init__(self, folder):
        super().__init__(folder)
        self.names = set()

    @property
    def experiment(self):
        return self

    def add_histogram(self, *, tag, values, global_step):
        assert len(values)
        self.names.add(tag)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, metrics=None):
        pass

    def save(self):
        pass

    def finalize(self, status):
        pass


@pytest.fixture
def pairs():
    """Tuples of images and classes, as lightning-bolts' data modules give them."""
    images = torch.rand(16, 1, 8, 8)
    return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)


def test_monitors_see_what_goes_in_and_out(tmp_path, pairs):
    logger = Histograms(tmp_path)
    callbacks = [ModuleDataMonitor(submodules=["student"], log_every_n_steps=1), TrainingDataMonitor(1)]
    trainer = tiny_trainer(logger=logger, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(KDModule(TinyNet(), TEACHER, num_classes=3), pairs, pairs)
    assert logger.names == {
        "input/student/[8, 1, 8, 8]",
        "output/student/[8, 3]",
        "training_step/0/[8, 1, 8, 8]",
        "training_step/1/[8]",
    }


def test_the_verification_of_gradients_runs_and_leaves_the_training_alone(pairs):
    def trained(*callbacks):
        torch.manual_seed(0)
        module = KDModule(TinyNet(norm="group"), TEACHER, num_classes=3, optimizer=sgd)
        module.example_input_array = torch.rand(4, 1, 8, 8)
        tiny_trainer(callbacks=list(callbacks)).fit(module, pairs, pairs)
        return module.state_dict()

    verified = trained(batch_gradient.BatchGradientVerificationCallback(error=True))
    plain = trained()
    assert all(torch.equal(value, verified[name]) for name, value in plain.items())


CONFIG = """
trainer:
  max_epochs: 3
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}/out
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {folder}/out}}}}
  callbacks:
    - class_path: pl_bolts.callbacks.PrintTableMetricsCallback
    - class_path: LearningRateMonitor
model:
  class_path: KDModule
  init_args:
    num_classes: 10
    student: {{class_path: pl_bolts.models.mnist_module.LitMNIST, init_args: {{hidden_dim: 8}}}}
    teachers:
      - {{class_path: pl_bolts.models.mnist_module.LitMNIST, init_args: {{hidden_dim: 16}}}}
    optimizer:
      class_path: pl_bolts.optimizers.LARS
      init_args: {{lr: 0.5, momentum: 0.9, weight_decay: 0.0001}}
    lr_scheduler:
      class_path: pl_bolts.optimizers.LinearWarmupCosineAnnealingLR
      init_args: {{warmup_epochs: 2, max_epochs: 3, warmup_start_lr: 0.1}}
data:
  class_path: pl_bolts.datamodules.FashionMNISTDataModule
  init_args: {{data_dir: {folder}, batch_size: 16, pin_memory: false}}
"""


def test_the_command_line_takes_them_all(tmp_path, capsys):
    write_fashion_mnist(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0, capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    states = torch.load(checkpoint, weights_only=True)
    assert states["optimizer_states"][0]["param_groups"][0]["trust_coefficient"] == 0.001
    assert states["lr_schedulers"][0]["warmup_epochs"] == 2
    assert states["lr_schedulers"][0]["base_lrs"] == [0.5]
    (saved,) = (tmp_path / "out").rglob("config.yaml")
    model = yaml.safe_load(saved.read_text())["model"]["init_args"]
    assert model["optimizer"]["class_path"].endswith(".LARS")
    capsys.readouterr()
    assert main(["test", "--config", str(saved), "--ckpt_path", str(checkpoint)]) == 0, capsys.readouterr().err
    assert "test/accuracy" in capsys.readouterr().out
