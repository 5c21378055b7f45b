"""Lightning remarks on nothing that this package does on purpose, and its summary shows what can be trained."""

import logging
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from distill_lightning import CompressionBaseline, KDModule, ParaphraserModule, SupervisedModule
from distill_lightning.compression import PruneWeights
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

EVAL = "in eval mode at the start of training"


class Summary(pl.callbacks.ModelSummary):
    """Keeps what it would print."""

    @staticmethod
    def summarize(summary_data, *args, **options):
        Summary.shown = dict(summary_data)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (lambda: SupervisedModule(TinyNet(), num_classes=3), ["student"]),
        (lambda: KDModule(TinyNet(), TinyNet(), num_classes=3), ["student"]),
        (lambda: ParaphraserModule(TinyNet(), layers="features", input_shape=(1, 8, 8)), ["paraphrasers"]),
    ],
)
def test_the_summary_has_no_rows_of_metrics(module, names):
    tiny_trainer(callbacks=[Summary()]).fit(module(), datamodule=TinyDataModule())
    assert Summary.shown["Name"] == names
    assert len(Summary.shown["Params"]) == len(names)


def test_the_summary_has_no_rows_of_metrics_at_any_depth():
    module = SupervisedModule(TinyNet(), num_classes=3)
    tiny_trainer(callbacks=[Summary(max_depth=-1)]).fit(module, datamodule=TinyDataModule())
    expected = [f"student.{name}".rstrip(".") for name, _ in module.student.named_modules()]
    assert Summary.shown["Name"] == expected


class Counted(nn.Module):
    """Not a metric, and without parameters: it stays among the rows."""

    def __init__(self):
        super().__init__()
        self.network, self.activation = TinyNet(), nn.ReLU()

    def forward(self, images):
        return self.network(self.activation(images))


def test_a_layer_without_parameters_keeps_its_row():
    module = SupervisedModule(Counted(), num_classes=3)
    tiny_trainer(callbacks=[Summary(max_depth=2)]).fit(module, datamodule=TinyDataModule())
    assert "student.activation" in Summary.shown["Name"]


@pytest.mark.filterwarnings("always:Found")
def test_frozen_parts_in_eval_mode_are_no_news():
    network = TinyNet()
    network.features[1].requires_grad_(requires_grad=False).eval()
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_trainer().fit(SupervisedModule(network, num_classes=3), datamodule=TinyDataModule())
    assert not [one for one in caught if EVAL in str(one.message)]
    assert warnings.filters == before


class Others(pl.LightningModule):
    """Somebody else's module, part of which is in eval mode by mistake."""

    def __init__(self):
        super().__init__()
        self.network = SupervisedModule(TinyNet().eval(), num_classes=3).student.eval()

    def training_step(self, batch, batch_idx):
        return self.network(batch.input).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_of_other_modules_lightning_still_warns():
    module = Others()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_trainer().fit(SupervisedModule(TinyNet(), num_classes=3), datamodule=TinyDataModule())
        tiny_trainer(limit_val_batches=0).fit(module, datamodule=TinyDataModule())
    # Since Lightning 2.6.
    if hasattr(getattr(pl.loops.fit_loop, "_FitLoop", None), "_warn_if_modules_in_eval_mode"):
        assert [one for one in caught if EVAL in str(one.message)]


@pytest.mark.filterwarnings("ignore:the last step of the compression is over")
def test_a_second_run_of_a_trainer_does_not_say_that_the_callback_is_replaced(caplog):
    module = CompressionBaseline(TinyNet(), num_classes=3, steps=[PruneWeights(amount=0.5)])
    trainer = tiny_trainer()
    with caplog.at_level(logging.INFO):
        trainer.fit(module, datamodule=TinyDataModule())
        trainer.test(module, datamodule=TinyDataModule(), verbose=False)
    assert "override" not in caplog.text
    assert trainer.callbacks.count(module.callback) == 1
