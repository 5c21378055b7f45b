"""TeacherReport: its numbers, its warnings, and that the training does not notice it."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import Batch, Gaussian, InputError, KDModule, SupervisedModule, TeacherEnsemble
from distill_lightning.callbacks import TeacherReport
from distill_lightning.outputs.metrics import classification_metrics, regression_metrics
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

# Untrained teachers are near chance, which most of these tests are not about.
quiet = pytest.mark.filterwarnings("ignore:.* little better than guessing:UserWarning")


def teachers(count=2, norm="batch"):
    torch.manual_seed(5)
    return [TinyNet(norm=norm) for _ in range(count)]


def kd(networks=None, norm="batch", **options):
    ensemble = TeacherEnsemble(networks or teachers(norm=norm), weights=[1, 3])
    torch.manual_seed(7)
    return KDModule(TinyNet(norm=norm), ensemble, num_classes=3, **options)


def report(module, data=None, **options):
    callback = TeacherReport()
    trainer = tiny_trainer(callbacks=[callback], **options)
    trainer.fit(module, datamodule=data or TinyDataModule())
    return callback


def numbers(outputs, targets):
    """The metrics of all outputs at once."""
    metrics = classification_metrics(3)
    metrics.update(outputs, targets)
    return {name: pytest.approx(value.item(), rel=1e-4, abs=1e-6) for name, value in metrics.compute().items()}


@pytest.mark.slow
@quiet
def test_the_rows_are_the_teachers_and_their_ensemble_on_the_validation_data():
    networks, data = teachers(), TinyDataModule(val_size=21)
    data.setup()
    batches = list(data.val_dataloader())
    images, targets = torch.cat([b.input for b in batches]), torch.cat([b.target for b in batches])
    with torch.no_grad():
        first, second = (network.eval()(images) for network in networks)
    mean = (first.softmax(-1) + 3 * second.softmax(-1)) / 4
    rows = report(kd(networks), TinyDataModule(val_size=21)).rows
    assert [row["name"] for row in rows] == ["teacher_0", "teacher_1", "ensemble"]
    for row, outputs in zip(rows, (first, second, mean.log()), strict=True):
        assert row == {"name": row["name"], **numbers(outputs, targets)}
        assert all(isinstance(value, float) for name, value in row.items() if name != "name")
    assert len({row["nll"] for row in rows}) == 3


@pytest.mark.slow
@quiet
def test_a_single_teacher_has_no_ensemble():
    module = KDModule(TinyNet(), TinyNet(), num_classes=3)
    assert [row["name"] for row in report(module).rows] == ["teacher_0"]


@pytest.mark.slow
@quiet
def test_the_figure_shows_the_rows():
    callback = report(kd())
    accuracy = callback.figure.axes[0]
    assert [bar.get_height() for bar in accuracy.patches] == pytest.approx(
        [100 * row["accuracy"] for row in callback.rows]
    )
    assert accuracy.lines[0].get_ydata() == pytest.approx([100 / 3, 100 / 3])


@pytest.mark.slow
@quiet
def test_numbers_and_figure_are_logged_before_the_first_step(tmp_path):
    callback = report(kd(), logger=CSVLogger(tmp_path, name="run"), log_every_n_steps=1)
    folder = tmp_path / "run" / "version_0"
    header, first, *_ = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    logged = {name: value for name, value in zip(header, first, strict=True) if name.startswith("teacher/") and value}
    assert first[header.index("step")] == "0"
    expected = {f"teacher/{row['name']}/{name}": row[name] for row in callback.rows for name in row if name != "name"}
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(expected)
    assert len(expected) == 18
    assert [path.name for path in (folder / "figures").iterdir()] == ["teachers_0.png"]


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("limit", [2, 1.0])
def test_the_limit_of_validation_batches_holds(limit):
    networks, data, seen = teachers(), TinyDataModule(), []
    module = kd(networks)

    class Count(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            networks[0].register_forward_hook(lambda _, args, __: seen.append((len(args[0]), torch.is_grad_enabled())))

        def on_train_batch_start(self, *args):
            seen.append("train")

    trainer = tiny_trainer(callbacks=[Count(), TeacherReport()], limit_val_batches=limit)
    trainer.fit(module, datamodule=data)
    assert seen[: seen.index("train")] == [(8, False)] * (2 if limit == 2 else 3)


# Nothing else changes


class Restless(TinyDataModule):
    """Validation data whose every reading draws random numbers: global ones, and the loader's own."""

    def setup(self, stage=None):
        super().setup(stage)
        self.generator = torch.Generator().manual_seed(11)

    def val_dataloader(self):
        images, targets, *_ = (torch.cat(parts) for parts in zip(*super().val_dataloader(), strict=True))
        return DataLoader(TensorDataset(images, targets), batch_size=5, shuffle=True, generator=self.generator)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and not isinstance(batch, Batch):
            raise AssertionError("the data think that the student is training")
        noise = random.random() + np.random.random() + torch.rand(())  # noqa: NPY002
        batch = Batch.of(batch)
        return Batch(batch.input + 0.01 * noise, batch.target)


class Dropping(nn.Module):
    """A teacher that would draw random numbers, were it not in eval mode."""

    def __init__(self):
        super().__init__()
        self.net = TinyNet()
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.net(images))


@pytest.mark.slow
@quiet
@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_training_is_the_same_with_and_without_the_report(sanity):
    ends, logs, drawn, modes = [], [], [], []

    class After(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            modes.append([[child.training for child in one.modules()] for one in (pl_module, *pl_module.teachers)])
            drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))  # noqa: NPY002
            assert trainer.training
            assert torch.is_grad_enabled()
            assert trainer.datamodule.generator.initial_seed() == 11

        def on_validation_epoch_end(self, trainer, pl_module):
            logs.append({name: value.clone() for name, value in trainer.callback_metrics.items()})

    for callbacks in ([After()], [TeacherReport(), After()]):
        torch.manual_seed(5)
        module, data = kd([Dropping(), Dropping()]), Restless()
        pl.seed_everything(3)
        tiny_trainer(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=sanity).fit(module, datamodule=data)
        drawn.append(data.generator.get_state().tolist())
        ends.append({name: value.clone() for name, value in module.state_dict().items()})
    assert drawn[:2] == drawn[2:]
    assert modes[0] == modes[1]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert logs[: len(logs) // 2] == logs[len(logs) // 2 :]


@pytest.mark.slow
@quiet
def test_modes_that_were_set_by_hand_come_back():
    module = kd()

    class Before(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.student.features[1].eval()
            pl_module.teachers[0].training = True
            pl_module.teachers[0].features[1].training = True
            note(self, pl_module)

    class After(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            note(self, pl_module)

    def note(callback, module):
        networks = nn.ModuleList([module.student, *module.teachers])
        callback.modes = [child.training for child in networks.modules()]
        callback.buffers = [buffer.clone() for buffer in networks.buffers()]

    before, after = Before(), After()
    trainer = tiny_trainer(callbacks=[before, TeacherReport(), after])
    trainer.fit(module, datamodule=TinyDataModule())
    assert before.modes == after.modes
    assert all(torch.equal(*pair) for pair in zip(before.buffers, after.buffers, strict=True))


@quiet
def test_validation_data_are_asked_for_where_the_trainer_has_not_yet():
    callback = report(kd(), num_sanity_val_steps=0, check_val_every_n_epoch=5, max_epochs=1)
    assert len(callback.rows) == 3


# Warnings


class Knowing(nn.Module):
    """Says of the bright corners' images what they are, as far as it is told to."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        corners = F.avg_pool2d(images, 4).flatten(1)[:, :3]
        return 20 * (corners - corners.mean(dim=1, keepdim=True))[:, self.order]


@pytest.mark.slow
def test_a_teacher_near_chance_is_warned_of_and_only_that_one():
    with pytest.warns(UserWarning, match="guessing") as caught:
        rows = report(kd([Knowing([0, 1, 2]), Knowing([1, 2, 0])])).rows
    assert [row["accuracy"] > 0.9 for row in rows[:2]] == [True, False]
    messages = [str(warning.message) for warning in caught if "guessing" in str(warning.message)]
    assert len(messages) == 1
    accuracy = f"{rows[1]['accuracy']:.3f}"
    expected = f"teacher_1 has an accuracy of {accuracy} on the validation data, little better than guessing among 3"
    assert messages[0].startswith(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("near_chance", "warned"), [(1.5, True), (1.49, False)])
def test_the_threshold_is_a_multiple_of_guessing(near_chance, warned):
    # Half of the images of two classes, of three that there are: an accuracy of 0.5, which is 1.5 / 3.
    class Half(TinyDataModule):
        def val_dataloader(self):
            images = next(iter(super().val_dataloader())).input[:4]
            return DataLoader(TensorDataset(images, torch.tensor([0, 0, 1, 2])), batch_size=4)

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, images):
            return 2 * torch.eye(3)[torch.zeros(len(images), dtype=torch.long)]

    callback = TeacherReport(near_chance=near_chance)
    trainer = tiny_trainer(callbacks=[callback])
    module = KDModule(TinyNet(), Zero(), num_classes=3)
    if warned:
        with pytest.warns(UserWarning, match="teacher_0 has an accuracy of 0.500"):
            trainer.fit(module, datamodule=Half())
    else:
        trainer.fit(module, datamodule=Half())
    assert callback.rows[0]["accuracy"] == 0.5


# What is refused


def test_a_module_without_teachers_is_refused():
    with pytest.raises(InputError, match="TeacherReport: SupervisedModule has no teachers to report on"):
        report(SupervisedModule(TinyNet(), num_classes=3))


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"limit_val_batches": 0, "num_sanity_val_steps": 0}])
def test_without_validation_data_it_is_refused(options):
    with pytest.raises(InputError, match="there are none: give the data module a val_dataloader"):
        report(kd(), **options)


# Other modules and other data


class Gauss(pl.LightningModule):
    """A regression with teachers of its own, as far as the report must know."""

    def __init__(self, answers):
        super().__init__()
        self.output = Gaussian(1)
        self.layer = nn.Linear(3, 2)
        self.answers = answers

    def teacher_predictions(self, batch):
        return self.answers * [batch.input[:, :2]]

    def teacher_prediction(self, batch):
        return batch.input[:, 1:] if self.answers else None

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def regression_data():
    inputs = torch.randn(20, 3)
    return TensorDataset(inputs, inputs[:, :1] + 0.3 * torch.randn(20, 1))


@pytest.mark.slow
@pytest.mark.parametrize("answers", [1, 3])
def test_a_regression_reports_each_teacher_and_the_ensemble(answers):
    data, callback = regression_data(), TeacherReport()
    loader = DataLoader(data, batch_size=6)
    tiny_trainer(max_epochs=1, callbacks=[callback]).fit(Gauss(answers), loader, loader)
    names = [f"teacher_{number}" for number in range(answers)] + ["ensemble"] * (answers > 1)
    assert [row["name"] for row in callback.rows] == names
    for row in callback.rows:
        columns = slice(1, 3) if row.pop("name") == "ensemble" else slice(2)
        metrics = regression_metrics(1)
        metrics.update(data.tensors[0][:, columns], data.tensors[1])
        assert row == pytest.approx({name: value.item() for name, value in metrics.compute().items()}, rel=1e-5)
    assert len(callback.figure.axes) == 4


def test_a_regression_without_teachers_is_refused():
    loader = DataLoader(regression_data(), batch_size=6)
    with pytest.raises(InputError, match="Gauss has no teachers to report on"):
        tiny_trainer(callbacks=[TeacherReport()]).fit(Gauss(0), loader, loader)


class Two(TinyDataModule):
    """The second loader's labels are others, and it is longer."""

    def val_dataloader(self):
        other = [batch.replace(target=(batch.target + 1) % 3) for batch in super().test_dataloader()]
        return [super().val_dataloader(), DataLoader(other, batch_size=None)]


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("count", [1, 2])
def test_several_validation_loaders_are_reported_each_on_its_own(count, tmp_path):
    networks, data = teachers(count), Two(val_size=9)
    data.setup()
    callback = TeacherReport()
    logger = CSVLogger(tmp_path, name="run")
    trainer = tiny_trainer(callbacks=[callback], logger=logger, log_every_n_steps=1)
    trainer.fit(KDModule(TinyNet(), networks, num_classes=3), datamodule=Two(val_size=9))
    written = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    header, first, *_ = (line.split(",") for line in written)
    logged = dict(zip(header, first, strict=True))
    rows = {(row["name"], row["loader"]): row for row in callback.rows}
    names = ["teacher_0"] if count == 1 else ["teacher_0", "teacher_1", "ensemble"]
    assert list(rows) == [(name, loader) for loader in (0, 1) for name in names]
    for loader, batches in enumerate(map(list, data.val_dataloader())):
        images, targets = torch.cat([b.input for b in batches]), torch.cat([b.target for b in batches])
        for number, network in enumerate(networks):
            name = f"teacher_{number}"
            with torch.no_grad():
                assert rows[name, loader] == {"name": name, "loader": loader, **numbers(network(images), targets)}
            suffix = f"dataloader_idx_{loader}"
            assert float(logged[f"teacher/{name}/nll/{suffix}"]) == pytest.approx(rows[name, loader]["nll"], rel=1e-5)
    figures = {path.name for path in (tmp_path / "run" / "version_0" / "figures").iterdir()}
    assert figures == {"teachers_dataloader_idx_0_0.png", "teachers_dataloader_idx_1_0.png"}
    assert callback.figure is not None


@pytest.mark.slow
def test_the_warning_names_the_loader():
    message = r"teacher_\d has an accuracy of .* on the validation data of loader [01], little better"
    with pytest.warns(UserWarning, match=message):
        report(kd(), Two())


@pytest.mark.slow
@quiet
@pytest.mark.parametrize(
    "precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.lightning(since=(2, 1)))]
)
def test_it_runs_in_the_trainers_precision(precision):
    networks, seen = teachers(), set()
    networks[0].register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    rows = report(kd(networks), precision=precision).rows
    assert seen == {torch.bfloat16}
    assert all(np.isfinite(row["nll"]) for row in rows)


@quiet
@pytest.mark.slow
def test_two_processes_report_what_one_does(tmp_path, start_method):
    # Nine samples in batches of four: the second process's last batch holds nothing but a sample of the first's.
    alone = report(kd(norm="group"), TinyDataModule(val_size=9, batch_size=4))
    logger = CSVLogger(tmp_path, name="run")
    data = TinyDataModule(val_size=9, batch_size=4)
    report(kd(norm="group"), data, devices=2, strategy=f"ddp_{start_method}", logger=logger, log_every_n_steps=1)
    header, first, *_ = (
        line.split(",") for line in (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    )
    logged = dict(zip(header, first, strict=True))
    for row in alone.rows:
        for name, value in row.items():
            if name != "name":
                assert float(logged[f"teacher/{row['name']}/{name}"]) == pytest.approx(value, rel=1e-4, abs=1e-5)
