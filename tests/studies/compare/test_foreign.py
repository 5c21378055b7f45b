"""compare with modules and data modules that know nothing of this package."""

import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from compare_files import compare, lines_of, numbers_in, write_config
from safetensors.torch import load_file

from distill_lightning.cli import main
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.foreign import SubjectKeeper
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.compare.runner import load_test_targets
from distill_lightning.studies.compare.trial import try_runs

pytestmark = [
    pytest.mark.slow,
    # Lightning's words about what people do in modules of their own.
    pytest.mark.filterwarnings("ignore:Attribute '.*' is an instance of `nn.Module`"),
]

# What a person has in a file of their own.
MINE = '''
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from distill_lightning import KDModule


class Digits(Dataset):
    """Noisy bars: the class is where the bar is."""

    def __init__(self, count, seed, layout):
        draw = torch.Generator().manual_seed(seed)
        self.layout = layout
        self.labels = torch.arange(count) % 4
        self.images = torch.rand(count, 1, 8, 8, generator=draw)
        self.images[torch.arange(count), 0, 2 * self.labels] += 0.7

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image, label = self.images[index], self.labels[index]
        return {"image": image, "label": label} if self.layout == "dict" else (image, label)


class Bars(pl.LightningDataModule):
    num_classes = 4

    def __init__(self, layout: str = "tuple"):
        super().__init__()
        self.layout = layout

    def setup(self, stage=None):
        self.train, self.val, self.test = (Digits(n, s, self.layout) for n, s in ((48, 1), (40, 2), (60, 3)))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=20)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=25)


class Untold(Bars):
    num_classes = None


class MyKD(KDModule):
    """One's own subclass of a method."""

    def weights(self):
        return {name: 2.0 * weight for name, weight in super().weights().items()}


class Plain(pl.LightningModule):
    """As in Lightning's own tutorial: it logs a loss, and stores its network among its hyper-parameters."""

    def __init__(self, model: nn.Module, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.model = model
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return self.scale * self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        loss = F.cross_entropy(self(self.dropout(x)), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Logs(Plain):
    """Logs another validation score than the one that would be computed."""

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", 1.0 / (1 + self.current_epoch))


class Distils(pl.LightningModule):
    """Teacher first, and an average of the student's weights is what counts."""

    def __init__(self, teacher: nn.Module, student: nn.Module, lr: float = 0.05):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.average = torch.optim.swa_utils.AveragedModel(student)

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        logits = self.student(x)
        with torch.no_grad():
            soft = self.teacher.eval()(x).softmax(1)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, soft)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.update_parameters(self.student)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.05)


class Alone(pl.LightningModule):
    """Builds its own network."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Breaks(Plain):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("no such thing")


class Diverges(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if self.current_epoch else 1)


class SaysNothing(Plain):
    """Trains well, and says NaN when it is evaluated."""

    def forward(self, x):
        return super().forward(x) * (1 if self.training else float("nan"))


class Silent(Alone):
    forward = pl.LightningModule.forward


class Behind(Plain):
    def __init__(self, lr: float, model: nn.Module):
        super().__init__(model, lr)


class Untested(Bars):
    test_dataloader = pl.LightningDataModule.test_dataloader


class Shuffled(Bars):
    def test_dataloader(self):
        return DataLoader(self.test, batch_size=25, shuffle=True)


class Places(Bars):
    """Where the bar is, as a number."""

    num_classes = None
    num_targets = 1

    def setup(self, stage=None):
        super().setup(stage)
        for split in (self.train, self.val, self.test):
            split.labels = 1.0 * split.labels[:, None]


class Points(Alone):
    """Predicts a number without a variance."""

    def __init__(self, width: int):
        super().__init__(width, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y)


class Short(Alone):
    def __init__(self, width: int):
        super().__init__(width, 5)
'''

CONFIG = {
    "data": {"class_path": "mymodule.Bars"},
    "teachers": {"network": {"class_path": "SmallCNN", "init_args": {"width": 4}}, "number": 2, "epochs": 1},
    "student": {"class_path": "SmallResNet", "init_args": {"width": 2}},
    "methods": {
        "kd": {"class_path": "mymodule.MyKD"},
        "plain": {"class_path": "mymodule.Plain"},
        "distils": {"class_path": "mymodule.Distils", "teachers": 1},
        "average": {"class_path": "mymodule.Distils", "teachers": 1, "evaluate": "average.module"},
        "alone_mlp": {"class_path": "mymodule.Alone", "init_args": {"width": 8}},
    },
    "epochs": 2,
    "seeds": [0],
    "accelerator": "cpu",
    "teachers_store": None,
}


@pytest.fixture(autouse=True)
def mymodule(tmp_path, monkeypatch):
    """The person's file, importable."""
    (tmp_path / "mymodule.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodule", raising=False)
    torch.set_num_threads(1)
    yield
    sys.modules.pop("mymodule", None)


written = partial(write_config, CONFIG)


def compared(folder, change=lambda config: None, *, out="out"):
    """The lines of the results by row."""
    compare(written(folder, change), folder / out)
    return {line["method"]: line for line in lines_of(folder / out / "results.csv")}


def only(*names, **keys):
    """A change of the configuration: some of its rows, one teacher, with further keys."""

    def change(config):
        config.update(methods={name: config["methods"][name] for name in names})
        config["teachers"].update(number=1)
        config.update(keys)

    return change


def test_rows_of_any_module_are_scored_by_what_is_evaluated(tmp_path):
    rows = compared(tmp_path)
    assert list(rows) == ["alone", *CONFIG["methods"]]
    experiment = Experiment(parse_config([written(tmp_path)]))
    targets = load_test_targets(experiment)[0]
    assert targets.tolist() == [number % 4 for number in range(60)]
    for name, row in rows.items():
        run = tmp_path / f"out/runs/{name}/seed_0"
        logits, state = load_file(run / "test_logits.safetensors")["last"], load_file(run / "student.safetensors")
        accuracy = np.mean([int(z.argmax()) == y for z, y in zip(logits, targets.tolist(), strict=True)])
        assert float(row["test_accuracy"]) == pytest.approx(accuracy)
        network = sys.modules["mymodule"].Alone(8, 4) if name == "alone_mlp" else experiment.student()
        network.load_state_dict(state)
        images = torch.cat([image for image, _ in experiment.sample.test_dataloader()])
        with torch.no_grad():
            found = network.eval()(images)
        # The network of `plain` stands behind a scale that is trained, too.
        scale = (logits / found).median() if name == "plain" else 1.0
        assert torch.allclose(scale * found, logits, atol=1e-4), name
        assert name != "plain" or scale != 1.0
        assert int(row["parameters"]) == sum(p.numel() for p in network.parameters())
    runs = (tmp_path / f"out/runs/{name}/seed_0/student.safetensors" for name in ("distils", "average"))
    assert not torch.equal(*(load_file(run)["head.weight"] for run in runs)), "an average is not what it is of"


@pytest.mark.usefixtures("undrawn")
def test_the_computed_validation_score_is_that_of_the_network(tmp_path):
    compared(tmp_path, only("plain"))
    run = tmp_path / "out/runs/plain/seed_0"
    result = json.loads((run / "result.json").read_text())
    scores = [line["val/accuracy"] for line in result["history"]]
    assert result["selected_epoch"] == 1 + int(np.argmax(scores))
    assert {"val/nll", "val/ece", "loss"} <= result["history"][0].keys()
    module = sys.modules["mymodule"].Plain(Experiment(parse_config([written(tmp_path)])).student()).eval()
    module.load_state_dict(load_file(run / "selected.safetensors"))
    data = sys.modules["mymodule"].Bars()
    data.setup()
    hits = [(module(images).argmax(1) == labels).float() for images, labels in data.val_dataloader()]
    assert max(scores) == pytest.approx(float(torch.cat(hits).mean()))


@pytest.mark.usefixtures("undrawn")
def test_a_score_that_the_module_logs_comes_first(tmp_path):
    def logs(config):
        only("plain")(config)
        config["methods"]["plain"]["class_path"] = "mymodule.Logs"

    compared(tmp_path, logs)
    result = json.loads((tmp_path / "out/runs/plain/seed_0/result.json").read_text())
    assert [line["val/accuracy"] for line in result["history"]] == pytest.approx([1, 1 / 2])
    assert result["selected_epoch"] == 1


@pytest.mark.usefixtures("undrawn")
def test_dicts_and_data_that_tell_nothing_make_the_same_table(tmp_path):
    """Students of a seed see the data in one order, whoever shuffles them and however their batches look."""
    untold = {"class_path": "mymodule.Untold", "num_classes": 4, "input_shape": [1, 8, 8]}
    data = {"class_path": "mymodule.Bars", "init_args": {"layout": "dict"}}

    def table(out, **keys):
        compare(written(tmp_path, only("kd", "plain", **keys)), tmp_path / out)
        return numbers_in(tmp_path / out / "results.csv")

    assert table("tuples") == table("dicts", data=data) == table("untold", data=untold)


def test_the_order_of_foreign_data_is_a_function_of_seed_and_epoch(tmp_path):
    experiment = Experiment(parse_config([written(tmp_path)]))

    def epochs(seed, count, first_epoch=0):
        data = experiment.data(order_seed=seed, first_epoch=first_epoch)
        data.setup()
        loader = data.train_dataloader()
        for epoch in range(first_epoch, first_epoch + count):
            if epoch > first_epoch:
                loader.batch_sampler.sampler.set_epoch(epoch)
            torch.rand(epoch + 1)
            yield torch.cat([image.flatten(1).sum(1) for image, _ in loader]).tolist()

    first, second, third = epochs(5, 3)
    assert first != second != third
    assert sorted(first) == sorted(second)
    assert [second, third] == list(epochs(5, 2, first_epoch=1))
    assert [first] != list(epochs(6, 1))


@pytest.mark.parametrize("row", ["plain", "average"])
@pytest.mark.usefixtures("undrawn")
def test_a_run_of_a_foreign_module_goes_on_where_it_was_killed(tmp_path, monkeypatch, row):
    change = only(row, epochs=3)
    undisturbed = compared(tmp_path, change)[row]
    save = SubjectKeeper.on_train_epoch_end

    def killed(self, trainer, pl_module):
        save(self, trainer, pl_module)
        if f"runs/{row}" in str(self.folder) and trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(SubjectKeeper, "on_train_epoch_end", killed)
    with pytest.raises(SystemExit):
        compared(tmp_path, change, out="again")
    assert (tmp_path / f"again/runs/{row}/seed_0/last.ckpt").exists()
    monkeypatch.setattr(SubjectKeeper, "on_train_epoch_end", save)
    assert compared(tmp_path, change, out="again")[row]["nll"] == undisturbed["nll"]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("Diverges", "Diverges: train/loss is not finite in batch 0 of epoch 2"),
        ("SaysNothing", "SaysNothing: its network gives nan or inf for test samples"),
    ],
)
def test_a_foreign_module_that_diverges_is_a_row_that_says_so(tmp_path, name, note):
    def diverges(config):
        only("plain")(config)
        config["methods"]["plain"]["class_path"] = f"mymodule.{name}"

    rows = compared(tmp_path, diverges)
    assert rows["plain"]["nll"] == "nan" != rows["alone"]["nll"]
    assert f"plain, seed 0: {note}" in (tmp_path / "out/results.md").read_text()


def row(name, **keys):
    """A change by which there is one row, of a class of the person's file."""

    def change(config):
        only()(config)
        config["methods"] = {"row": {"class_path": name if "." in name else f"mymodule.{name}", **keys}}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (row("Breaks"), r"methods.row: Breaks fails in its first step \(mymodule.py, line \d+\): RuntimeError: no"),
        (row("Plain", evaluate="modle"), "methods.row.evaluate: Plain has no network 'modle'; it has model, dropout"),
        (row("Silent", init_args={"width": 4}), "methods.row: Silent has no student and no forward: .* evaluate: <att"),
        (row("Short", init_args={"width": 4}), "methods.row: what is evaluated of Short .* has 5 classes"),
        (row("Behind", init_args={"lr": 0.1}), "methods.row: Behind takes model behind other arguments"),
        (row("Alone", init_args={"width": 4}, initial="alone"), "methods.row: .*Alone builds a network of its own: le"),
        (row("Plain", teachers=1), "methods.row: mymodule.Plain has no teachers: leave out teachers"),
        (row("Distils", init_args={"lrr": 1}), "methods.row: .*lrr"),
        (row("distill_lightning.SelfKDModule"), "methods.row: StoredPast needs to know which sample .* no index: wrap"),
        (lambda c: (only("distils")(c), c["teachers"].update(number=2), c["methods"]["distils"].pop("teachers")),
         "methods.distils takes one teacher, and the row has 2: let it say teachers: 1"),
        (lambda c: (only("alone_mlp")(c), c["methods"].update(kd={"class_path": "KDModule", "teachers": "alone_mlp"})),
         r"methods.kd.teachers: the network of alone_mlp \(Alone\) is not such as the student"),
        (only(data={"class_path": "mymodule.Bars", "num_classes": 5}), "data.num_classes is 5, and Bars tells 4"),
        (only(data={"class_path": "mymodule.Untold"}), "data: Untold does not tell its num_classes: give it .* beside"),
        (only(data={"class_path": "mymodule.Untested"}), "data: Untested has no test_dataloader"),
        (only(data={"class_path": "mymodule.Shuffled"}), "data: Shuffled shuffles the test samples"),
        (only(supervised={"class_path": "mymodule.Alone", "init_args": {"width": 4}}), "supervised: .*Alone builds a"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_in_one_line_before_anything_is_trained(tmp_path, capsys, change, message):
    assert main(["compare", written(tmp_path, change), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_the_trial_draws_no_random_number_and_leaves_the_data_alone(tmp_path):
    experiment = Experiment(parse_config([written(tmp_path, only("kd", "plain"))]))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    try_runs(experiment, plan(experiment, tmp_path / "out"))
    assert torch.equal(torch.rand(3), expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_persons_module_may_train_the_teachers_and_the_student_alone(tmp_path):
    def supervised(config):
        only("kd", supervised={"class_path": "mymodule.Plain", "evaluate": "model"})(config)
        config["methods"]["kd"] = {"class_path": "mymodule.MyKD"}

    compared(tmp_path, supervised)
    experiment = Experiment(parse_config([written(tmp_path, supervised)]))
    images = torch.cat([image for image, _ in experiment.sample.test_dataloader()])
    for name, network in (("teacher_1", experiment.teacher()), ("alone/seed_0", experiment.student())):
        network.load_state_dict(load_file(tmp_path / f"out/runs/{name}/student.safetensors"))
        with torch.no_grad():
            logits = load_file(tmp_path / f"out/runs/{name}/test_logits.safetensors")["last"]
            assert torch.allclose(network.eval()(images), logits, atol=1e-5)


def test_a_point_has_errors_and_no_likelihood(tmp_path):
    def regression(config):
        only(data={"class_path": "mymodule.Places"})(config)
        config["methods"] = {"points": {"class_path": "mymodule.Points", "init_args": {"width": 8}}}
        config["teachers"]["network"]["class_path"] = "SmallResNet"

    rows = compared(tmp_path, regression)
    output = load_file(tmp_path / "out/runs/points/seed_0/test_logits.safetensors")["last"]
    targets = load_test_targets(Experiment(parse_config([written(tmp_path, regression)])))[0]
    assert targets.shape == (60, 1)
    errors = [abs(float(mean) - float(target)) for (mean, _), target in zip(output, targets, strict=True)]
    assert float(rows["points"]["test_mae"]) == pytest.approx(np.mean(errors), rel=1e-5)
    assert rows["points"]["nll"] == "nan" != rows["alone"]["nll"]
    history = json.loads((tmp_path / "out/runs/points/seed_0/result.json").read_text())["history"]
    assert all(np.isfinite(line["val/mae"]) for line in history)
