"""Boxes on images and sample translations: which are shown, when, and where they go."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import InputError, TranslationModule
from distill_lightning.callbacks import DetectionFigures, Table, TranslationSamples, log_table
from distill_lightning.data.detection_batch import DetectionBatch
from distill_lightning.outputs import Boxes
from distill_lightning.testing import (
    TinyDetectionDataModule,
    TinyEncoderDecoder,
    TinyTranslationDataModule,
    tiny_trainer,
)


def translation(**options):
    return TranslationModule(TinyEncoderDecoder(), num_classes=12, pad_id=0, **options)


class Finds(pl.LightningModule):
    """Finds each true box, and one that it is less sure of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.output = Boxes(2, class_names=("one", "two"))

    def validation_step(self, batch, batch_idx):
        batch = DetectionBatch.of(batch)
        counted = [True] * batch.size if batch.counted is None else batch.counted.tolist()
        return {
            "output": [
                {
                    "boxes": torch.cat([target["boxes"], target["boxes"] / 2]),
                    "labels": target["labels"].repeat(2),
                    "scores": torch.tensor([0.9, 0.3]),
                }
                for target, counts in zip(batch.target, counted, strict=True)
                if counts
            ]
        }


def drawn(axes):
    return [(*patch.get_xy(), patch.get_width(), patch.get_height(), patch.get_linestyle()) for patch in axes.patches]


@pytest.mark.parametrize(("threshold", "found"), [(0.5, 1), (0.2, 2)])
def test_boxes_of_the_first_images_are_drawn(threshold, found, tmp_path):
    callback, data = DetectionFigures(samples=5, threshold=threshold), TinyDetectionDataModule(batch_size=4)
    trainer = tiny_trainer(callbacks=[callback], logger=CSVLogger(tmp_path, name="run"))
    trainer.validate(Finds(), datamodule=data, verbose=False)
    images = [axes for axes in callback.figure.axes if axes.images]
    assert len(images) == 5
    dataset = data.dataset("val")
    for number, axes in enumerate(images):
        left, top, right, bottom = dataset.boxes[number].tolist()
        sure = (left - 0.5, top - 0.5, right - left, bottom - top)
        assert drawn(axes)[:2] == [(*sure, "--"), (*sure, "-")]
        assert len(axes.patches) == 1 + found
        name = ("one", "two")[number % 2]
        assert [text.get_text() for text in axes.texts][:2] == [name, f"{name} 0.90"]
        assert axes.images[0].get_array().tolist() == dataset.images[number, 0].tolist()
    (file,) = (tmp_path / "run" / "version_0" / "figures").iterdir()
    assert file.name == "val_detections_0.png"


def test_images_without_boxes_and_without_targets_are_drawn():
    class Nothing(Finds):
        def validation_step(self, batch, batch_idx):
            empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
            return {"output": [empty for _ in batch.input]}

    callback = DetectionFigures()
    batches = [DetectionBatch([torch.rand(3, 6, 9), torch.rand(3, 5, 4)])]
    tiny_trainer(callbacks=[callback]).validate(Nothing(), DataLoader(batches, batch_size=None), verbose=False)
    shapes = [axes.images[0].get_array().shape for axes in callback.figure.axes]
    assert shapes == [(6, 9, 3), (5, 4, 3)]
    assert not any(axes.patches for axes in callback.figure.axes)


def test_translations_are_those_of_the_module(tmp_path):
    callback, data, module = TranslationSamples(samples=11), TinyTranslationDataModule(), translation()
    trainer = tiny_trainer(callbacks=[callback], logger=CSVLogger(tmp_path, name="run"))
    trainer.validate(module, datamodule=data, verbose=False)
    dataset, loader = data.dataset("val"), data.val_dataloader()
    sources, targets = ([data.decode(ids) for ids in side[:11]] for side in (dataset.sources, dataset.targets))
    translations = [text for batch in loader for text in module.translate(batch)][:11]
    assert callback.table.columns == ("source", "reference", "translation")
    assert list(callback.table.rows) == list(zip(sources, targets, translations, strict=True))
    (file,) = (tmp_path / "run" / "version_0" / "tables").iterdir()
    assert file.name == "val_translations_0.csv"
    assert list(csv.reader(file.read_text().splitlines()))[1:] == [list(row) for row in callback.table.rows]


@pytest.mark.parametrize("bleu_every", [0, 1])
def test_samples_are_shown_every_few_epochs_and_not_in_the_sanity_check(bleu_every):
    shown = []

    class Kept(TranslationSamples):
        def show(self, trainer, pl_module, kept):
            shown.append((trainer.current_epoch, len(kept)))

    # Where a validation does not translate, the callback does.
    trainer = tiny_trainer(callbacks=[Kept(samples=3, every_n_epochs=2)], max_epochs=5)
    trainer.fit(translation(bleu_every=bleu_every), datamodule=TinyTranslationDataModule())
    assert shown == [(1, 3), (3, 3)]


@pytest.mark.parametrize("options", [{"samples": 0}, {"every_n_epochs": 0}])
@pytest.mark.parametrize("callback", [DetectionFigures, TranslationSamples])
def test_no_samples_and_no_epochs_are_refused(callback, options):
    (name,) = options
    with pytest.raises(InputError, match=f"{callback.__name__}: {name} must be at least 1, got 0"):
        callback(**options)


def test_a_threshold_that_is_no_score_is_refused():
    with pytest.raises(InputError, match=r"threshold must be in \[0, 1\], got 1.5"):
        DetectionFigures(threshold=1.5)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            DetectionFigures(),
            "DetectionFigures: Plain.validation_step must return .'output': a list of dicts with boxes",
        ),
        (TranslationSamples(), "TranslationSamples: Plain has no method translate: leave the callback out"),
    ],
)
def test_a_module_that_does_something_else_is_refused(callback, message):
    class Plain(pl.LightningModule):
        def validation_step(self, batch, batch_idx):
            return {"output": batch[0]}

    loader = DataLoader(TensorDataset(torch.zeros(2, 1)))
    with pytest.raises(InputError, match=message):
        tiny_trainer(callbacks=[callback]).validate(Plain(), loader, verbose=False)


# Where tables go


class Experiment:
    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, kwargs))

    def __getitem__(self, name):
        self.calls.append(("at", name))
        return self


class Fake(pl.loggers.Logger):
    """A logger that writes down what it is called with."""

    name = version = "fake"
    run_id = "run"

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def experiment(self):
        return Experiment(self.calls)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_table(self, **kwargs):
        self.calls.append(kwargs)


TABLE = Table(("source", "translation"), [("a|b", "c\nd")])
MARKDOWN = "| source | translation |\n| --- | --- |\n| a\\|b | c d |"
CSV = 'source,translation\na|b,"c\nd"\n'
ROWS = [["a|b", "c\nd"]]
HANDED = {
    "TensorBoardLogger": [("add_text", "val/one", MARKDOWN, {"global_step": 7})],
    "WandbLogger": [{"key": "val/one", "columns": ["source", "translation"], "data": ROWS, "step": 7}],
    "MLFlowLogger": [("log_text", "run", CSV, "tables/val_one_7.csv", {})],
    "CometLogger": [
        ("log_table", "val_one_7.csv", {"tabular_data": ROWS, "headers": ["source", "translation"]}),
    ],
    "NeptuneLogger": [("at", "val/one"), ("append", MARKDOWN, {"step": 7})],
}


@pytest.mark.parametrize("kind", HANDED)
def test_known_loggers_get_the_table(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = type(kind, (Fake,), {})()
    log_table(tiny_trainer(logger=logger), "val/one", TABLE, 7)
    assert logger.calls == HANDED[kind]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_logger_gets_a_file_where_it_keeps_things(tmp_path):
    logger = type("SomeLogger", (Fake,), {"save_dir": str(tmp_path / "kept")})()
    log_table(tiny_trainer(logger=logger), "a/b", TABLE, 3)
    assert (tmp_path / "kept" / "tables" / "a_b_3.csv").read_text() == CSV


def test_a_logger_that_keeps_nothing_is_named():
    with pytest.warns(UserWarning, match="Fake takes no tables and has no folder: val/one is not kept"):
        log_table(tiny_trainer(logger=Fake()), "val/one", TABLE, 0)
