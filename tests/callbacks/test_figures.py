"""Figures of confidence: what they are drawn from, when, and where they go."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import InputError, SupervisedModule
from distill_lightning.callbacks import ConfidenceFigure, ReliabilityDiagram, RiskCoverage, log_figure
from distill_lightning.functional import calibration_bins, risk_coverage
from distill_lightning.plots import reliability_diagram, risk_coverage_curve
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


class Kept(ConfidenceFigure):
    """Remembers what it was to draw; in a file, where processes are spawned."""

    title = "kept"

    def __init__(self, *, stages=("val", "test"), path=None):
        super().__init__(stages=stages)
        self.path, self.drawn = path, []

    def draw(self, stage, confidence, correct):
        self.drawn.append((stage, confidence, correct))
        if self.path:
            torch.save((confidence, correct), self.path)
        return Figure(figsize=(1, 1))


def supervised(norm="batch"):
    return SupervisedModule(TinyNet(norm=norm), num_classes=3)


def expected(module, loader):
    """Confidence and correctness, sample by sample."""
    confidences, hits = [], []
    module.eval()
    with torch.no_grad():
        for batch in loader:
            for image, target in zip(batch.input, batch.target, strict=True):
                probs = module(image[None])[0].double().softmax(-1).tolist()
                confidences.append(max(probs))
                hits.append(float(probs.index(max(probs)) == target))
    return confidences, hits


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["val", "test"])
def test_every_sample_of_a_stage_is_drawn_once(stage):
    module, data, callback = supervised(), TinyDataModule(val_size=21), Kept()
    trainer = tiny_trainer(callbacks=[callback])
    (trainer.validate if stage == "val" else trainer.test)(module, datamodule=data, verbose=False)
    ((name, confidence, correct),) = callback.drawn
    confidences, hits = expected(module, data.val_dataloader() if stage == "val" else data.test_dataloader())
    assert name == stage
    assert len(confidence) == (21 if stage == "val" else 24)
    assert confidence.tolist() == pytest.approx(confidences, rel=1e-5)
    assert correct.tolist() == hits


def test_one_sample_is_enough():
    callback = Kept()
    tiny_trainer(callbacks=[callback]).validate(supervised(), datamodule=TinyDataModule(val_size=1), verbose=False)
    ((_, confidence, correct),) = callback.drawn
    assert confidence.shape == correct.shape == (1,)


@pytest.mark.slow
def test_a_figure_is_drawn_after_every_validation_and_not_in_the_sanity_check():
    callback, seen = Kept(), []

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append((len(callback.drawn), callback.figure))

    tiny_trainer(max_epochs=3, callbacks=[callback, Watch()]).fit(supervised(), datamodule=TinyDataModule())
    assert seen == [(0, None)]
    assert [stage for stage, *_ in callback.drawn] == ["val"] * 3
    assert [len(confidence) for _, confidence, _ in callback.drawn] == [24] * 3
    assert isinstance(callback.figure, Figure)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "drawn"), [(["val"], ["val"]), (["test"], ["test"])])
def test_only_the_stages_asked_for_are_drawn(stages, drawn):
    module, callback = supervised(), Kept(stages=stages)
    trainer = tiny_trainer(callbacks=[callback])
    trainer.validate(module, datamodule=TinyDataModule(), verbose=False)
    trainer.test(module, datamodule=TinyDataModule(), verbose=False)
    assert [stage for stage, *_ in callback.drawn] == drawn


def lines(figure):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for axes in figure.axes for line in axes.lines]


@pytest.mark.slow
def test_the_reliability_diagram_is_that_of_the_validation():
    module, data, callback = supervised(), TinyDataModule(val_size=60, samples=60), ReliabilityDiagram(bins=4)
    tiny_trainer(callbacks=[callback]).validate(module, datamodule=data, verbose=False)
    confidences, hits = expected(module, data.val_dataloader())
    bins = calibration_bins(torch.tensor(confidences), torch.tensor(hits), bins=4)
    reference = reliability_diagram({"val": tuple(part.numpy() for part in bins)})
    for (x, y), (known_x, known_y) in zip(lines(callback.figure), lines(reference), strict=True):
        assert x == pytest.approx(known_x, rel=1e-5)
        assert y == pytest.approx(known_y, rel=1e-5)
    assert len(callback.figure.axes[0].patches) == 4


def test_the_risk_coverage_curve_is_that_of_the_test():
    module, data, callback = supervised(), TinyDataModule(), RiskCoverage()
    tiny_trainer(callbacks=[callback]).test(module, datamodule=data, verbose=False)
    confidences, hits = expected(module, data.test_dataloader())
    coverage, risk = risk_coverage(torch.tensor(confidences), torch.tensor(hits))
    reference = risk_coverage_curve({"test": (coverage.double().numpy(), risk.double().numpy())})
    for (x, y), (known_x, known_y) in zip(lines(callback.figure), lines(reference), strict=True):
        assert x == pytest.approx(known_x, rel=1e-5)
        assert y == pytest.approx(known_y, rel=1e-5)
    label = callback.figure.axes[0].get_legend().get_texts()[0].get_text()
    assert label.startswith("test: AURC ")


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_both(tmp_path, start_method):
    # Nine samples in batches of four: the second process's last batch holds nothing but a sample of the first's.
    module, data = supervised(norm="group"), TinyDataModule(val_size=9, batch_size=4)
    trainer = tiny_trainer(callbacks=[Kept(path=tmp_path / "drawn.pt")], devices=2, strategy=f"ddp_{start_method}")
    trainer.validate(module, datamodule=data, verbose=False)
    confidence, correct = torch.load(tmp_path / "drawn.pt")
    confidences, hits = expected(module, data.val_dataloader())
    order = torch.tensor(confidences).argsort()
    assert confidence.sort().values.tolist() == pytest.approx(sorted(confidences), rel=1e-5)
    assert correct[confidence.argsort()].tolist() == torch.tensor(hits)[order].tolist()


# What is refused


@pytest.mark.parametrize("stages", [(), ["train"], ["val", "train"], "val"])
@pytest.mark.parametrize("callback", [ReliabilityDiagram, RiskCoverage])
def test_unknown_stages_are_refused(callback, stages):
    with pytest.raises(InputError, match="stages must be a list of 'val' and 'test', got "):
        callback(stages=stages)


def test_a_diagram_without_bins_is_refused():
    with pytest.raises(InputError, match="bins must be at least 1, got 0"):
        ReliabilityDiagram(bins=0)


class Plain(pl.LightningModule):
    """A user's own module; returns what it is told to."""

    def __init__(self, returned):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.returned = returned

    def validation_step(self, batch, batch_idx):
        return self.returned


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "ReliabilityDiagram: Plain.validation_step must return .'output': logits"),
        (torch.zeros(()), "Plain.validation_step must return"),
        ({"output": torch.zeros(2, 3)}, "Plain.validation_step must return"),
        # A regression's: parameters of Gaussians, and real targets.
        ({"output": torch.zeros(2, 4), "target": torch.zeros(2, 2)}, "output \\(2, 4\\) and a torch.float32 target"),
        ({"output": torch.zeros(2, 2), "target": torch.zeros(2)}, "leave the callback out where there are no classes"),
        ({"output": torch.zeros(2), "target": torch.zeros(2, dtype=torch.long)}, "logits \\(N, K\\) and classes"),
    ],
)
def test_a_module_that_does_not_classify_is_refused_at_the_first_batch(returned, message):
    loader = DataLoader(TensorDataset(torch.zeros(2, 1)), batch_size=2)
    with pytest.raises(InputError, match=message):
        tiny_trainer(callbacks=[ReliabilityDiagram()]).validate(Plain(returned), loader, verbose=False)


def test_a_stage_that_is_not_asked_for_may_return_anything():
    callback = RiskCoverage(stages=["test"])
    loader = DataLoader(TensorDataset(torch.zeros(2, 1)), batch_size=2)
    tiny_trainer(callbacks=[callback]).validate(Plain(None), loader, verbose=False)
    assert callback.figure is None


def test_a_module_of_the_users_own_is_drawn():
    returned = {"output": torch.eye(2), "target": torch.tensor([0, 0])}
    callback = Kept()
    loader = DataLoader(TensorDataset(torch.zeros(2, 1)), batch_size=2)
    tiny_trainer(callbacks=[callback]).validate(Plain(returned), loader, verbose=False)
    assert callback.drawn[0][2].tolist() == [1, 0]


# Where figures go


class Fake(pl.loggers.Logger):
    """A logger with an experiment that writes down what it is called with."""

    name = version = "fake"
    run_id = "run"

    def __init__(self):
        super().__init__()
        self.calls = []
        self._experiment = Experiment(self.calls)

    @property
    def experiment(self):
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.calls.append(("log_metrics", metrics, step))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_image(self, key, images, step=None):
        self.calls.append(("log_image", key, images, step))


class Experiment:
    def __init__(self, calls):
        self.calls = calls

    def add_figure(self, tag, figure, global_step=None, close=True):
        self.calls.append(("add_figure", tag, figure, global_step, close))

    def log_figure(self, *args, **kwargs):
        self.calls.append(("log_figure", *args, *kwargs.items()))

    def __getitem__(self, name):
        return Series(name, self.calls)


class Series:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def append(self, value, step=None):
        self.calls.append(("append", self.name, value, step))


FIGURE = Figure(figsize=(1, 1))
HANDED = {
    "TensorBoardLogger": ("add_figure", "val/one", FIGURE, 7, False),
    "WandbLogger": ("log_image", "val/one", [FIGURE], 7),
    "MLFlowLogger": ("log_figure", "run", FIGURE, "figures/val_one_7.png"),
    "CometLogger": ("log_figure", ("figure_name", "val/one"), ("figure", FIGURE), ("step", 7)),
    "NeptuneLogger": ("append", "val/one", FIGURE, 7),
}


@pytest.mark.parametrize("kind", HANDED)
def test_known_loggers_get_the_figure_itself(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = type(kind, (Fake,), {})()
    heir = type("Mine", (type(kind, (Fake,), {}),), {})()
    log_figure(tiny_trainer(logger=[logger, heir]), "val/one", FIGURE, 7)
    assert logger.calls == heir.calls == [HANDED[kind]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_csv_logger_gets_a_file(tmp_path):
    callback = ReliabilityDiagram()
    logger = CSVLogger(tmp_path, name="run")
    trainer = tiny_trainer(callbacks=[callback], logger=logger, max_epochs=2, log_every_n_steps=1)
    trainer.fit(supervised(), datamodule=TinyDataModule())
    trainer.test(supervised(), datamodule=TinyDataModule(), verbose=False)
    folder = tmp_path / "run" / "version_0" / "figures"
    names = {"val_reliability_3.png", "val_reliability_6.png", "test_reliability_6.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.iterdir())


def test_a_figure_that_comes_first_does_not_disturb_the_csv_logger(tmp_path):
    # Its writer warns of a folder that is not empty, and warnings are errors here.
    trainer = tiny_trainer(logger=CSVLogger(tmp_path, name="run"))
    log_figure(trainer, "one", FIGURE, 0)
    trainer.logger.log_metrics({"x": 1.0}, step=0)
    trainer.logger.save()
    (row,) = csv.DictReader((tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines())
    assert row["x"] == "1.0"
    assert (tmp_path / "run" / "version_0" / "figures" / "one_0.png").exists()


def test_an_unknown_logger_gets_a_file_where_it_keeps_things(tmp_path):
    logger = type("SomeLogger", (Fake,), {"save_dir": str(tmp_path / "kept")})()
    log_figure(tiny_trainer(logger=logger), "a/b", FIGURE, 3)
    assert (tmp_path / "kept" / "figures" / "a_b_3.png").exists()
    assert logger.calls == []


def test_a_logger_that_keeps_nothing_is_named():
    with pytest.warns(UserWarning, match="Fake takes no figures and has no folder: val/one is not kept"):
        log_figure(tiny_trainer(logger=Fake()), "val/one", FIGURE, 0)


def test_without_a_logger_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = RiskCoverage()
    trainer = tiny_trainer(callbacks=[callback])
    trainer.validate(supervised(), datamodule=TinyDataModule(), verbose=False)
    assert callback.figure is not None
    assert list(tmp_path.iterdir()) == []


def test_a_fast_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = Kept()
    trainer = tiny_trainer(callbacks=[callback], logger=CSVLogger(tmp_path), fast_dev_run=True)
    trainer.fit(supervised(), datamodule=TinyDataModule())
    assert len(callback.drawn) == 1
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_hands_figures_over():
    class Second:
        is_global_zero = False
        loggers = (Fake(),)

    log_figure(Second(), "one", FIGURE, 0)
    assert Second.loggers[0].calls == []


class Two(TinyDataModule):
    """Two loaders of other samples in each stage."""

    def val_dataloader(self):
        return [super().val_dataloader(), super().test_dataloader()]

    def test_dataloader(self):
        return [super().test_dataloader(), super().val_dataloader()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["val", "test"])
def test_several_loaders_have_a_figure_each(stage, tmp_path):
    module, data, callback = supervised(), Two(val_size=13), Kept()
    logger = CSVLogger(tmp_path, name="run")
    trainer = tiny_trainer(callbacks=[callback], logger=logger)
    (trainer.validate if stage == "val" else trainer.test)(module, datamodule=data, verbose=False)
    assert len(callback.drawn) == len(callback.figures) == 2
    loaders = data.val_dataloader() if stage == "val" else data.test_dataloader()
    for (name, confidence, correct), loader in zip(callback.drawn, loaders, strict=True):
        confidences, hits = expected(module, loader)
        assert name == stage
        assert confidence.tolist() == pytest.approx(confidences, rel=1e-5)
        assert correct.tolist() == hits
    figures = {path.name for path in (tmp_path / "run" / "version_0" / "figures").iterdir()}
    assert figures == {f"{stage}_kept_dataloader_idx_{number}_0.png" for number in (0, 1)}
    assert callback.figure is callback.figures[0]
