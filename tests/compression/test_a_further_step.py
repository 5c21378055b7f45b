"""A step from outside the package is one class: it runs in a `Compressor`, a module and on the command line."""

from dataclasses import dataclass

import pytest
import torch
import yaml

from distill_lightning import CompressionBaseline, DigitsDataModule, InputError, SmallCNN
from distill_lightning.cli import main
from distill_lightning.compression import Compressor, Encode, Quantize, TrainedStep
from distill_lightning.compression.steps import Order
from distill_lightning.testing import tiny_trainer


@dataclass(frozen=True, kw_only=True)
class ClampWeights(TrainedStep):
    """Clips every parameter to a range when its phase begins.

    Args:
        limit: the largest absolute value.
    """

    limit: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self.refuse((self.limit <= 0, f"limit must be positive, got {self.limit}"))

    @property
    def order(self):
        return Order.MASKS

    def act(self, piece):
        with torch.no_grad():
            for parameter in piece.network.parameters():
                parameter.clamp_(-self.limit, self.limit)
        piece.changed = True


def largest(network):
    return max(float(parameter.detach().abs().max()) for parameter in network.parameters())


def test_it_runs_without_a_training_and_is_checked_printed_and_ordered():
    network = SmallCNN(10)
    assert largest(network) > 0.1
    Compressor(network, [ClampWeights(), Encode()], torch.rand(2, 1, 8, 8)).apply()
    assert largest(network) == pytest.approx(0.1)
    assert repr(ClampWeights(limit=0.5)) == "ClampWeights(at=None, finetune_epochs=0, limit=0.5)"
    assert ClampWeights() == ClampWeights(limit=0.1)
    with pytest.raises(InputError, match="ClampWeights: limit must be positive, got 0"):
        ClampWeights(limit=0)
    with pytest.raises(InputError, match=r"step 2 \(ClampWeights\) cannot come after step 1 \(Quantize"):
        Compressor(network, [Quantize(), ClampWeights()], torch.rand(2, 1, 8, 8))


def test_a_base_of_steps_is_no_step():
    with pytest.raises(InputError, match="TrainedStep: it is a base of steps, and does nothing: define act or start"):
        TrainedStep()


def test_it_runs_in_a_module():
    module = CompressionBaseline(SmallCNN(10), num_classes=10, steps=[ClampWeights(limit=0.05, at="end")])
    tiny_trainer(max_epochs=1).fit(module, datamodule=DigitsDataModule(image_size=8, subset=64))
    assert largest(module.student) == pytest.approx(0.05)


@pytest.mark.slow
def test_it_runs_from_a_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {
            "class_path": "CompressionBaseline",
            "init_args": {
                "network": {"class_path": "SmallCNN", "init_args": {"num_classes": 10}},
                "steps": [
                    {"class_path": f"{__name__}.ClampWeights", "init_args": {"limit": 0.2, "finetune_epochs": 1}}
                ],
            },
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"image_size": 8, "subset": 64}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["compress", "config.yaml", "--preview"]) == 0
    assert "features.0" in capsys.readouterr().out
    assert main(["fit", "--config", "config.yaml"]) == 0
