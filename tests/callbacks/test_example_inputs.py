"""Batches of any structure give a compression its example inputs: a few samples of every tensor."""

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader

from distill_lightning.callbacks import CompressionCallback
from distill_lightning.compression import PruneUnits, Quantize
from distill_lightning.compression.access.calibration import first_samples
from distill_lightning.testing import tiny_trainer


class ThreeInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, y, z):
        return self.head(self.hidden(torch.cat([x, y, z], 1)).relu())


class Nested(ThreeInputs):
    def forward(self, x, others):  # type: ignore[override]
        return super().forward(x, others["y"], others["z"])


class Elsewhere(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self, network):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen = network, []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        output = self.net(**inputs) if isinstance(inputs, dict) else self.net(*inputs)
        return F.cross_entropy(output, targets)

    def configure_optimizers(self):
        return SGD(self.net.parameters(), lr=0.1)


def samples(structure):
    x, y, z = (torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    return [(structure(x[n], y[n], z[n]), n % 3) for n in range(8)]


STRUCTURES = {
    "tuple": (ThreeInputs, lambda x, y, z: (x, y, z)),
    "dict": (ThreeInputs, lambda x, y, z: {"z": z, "x": x, "y": y}),
    "nest": (Nested, lambda x, y, z: (x, {"y": y, "z": z})),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_batches_of_any_structure_are_compressed(kind):
    network, structure = STRUCTURES[kind]
    module = Elsewhere(network())
    steps = [
        PruneUnits(unit="channel", amount=0.5, criterion="taylor", finetune_epochs=1),
        Quantize(weight_bits=8, act_bits=8),
    ]
    callback = CompressionCallback(steps, attribute="net", calibration_batches=2)
    tiny_trainer(max_epochs=1, callbacks=[callback]).fit(module, DataLoader(samples(structure), batch_size=4))
    assert module.net.hidden.out_features == 4
    example = callback.compressor.piece.example_inputs
    flat = [example[0], example[1]["y"], example[1]["z"]] if kind == "nest" else list(example)
    wanted = [torch.stack([sample[0][part] for sample in samples(lambda *all: all)[:2]]) for part in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(flat, wanted, strict=True))


def test_the_first_samples_of_every_tensor_are_taken():
    whole, state = torch.arange(12).view(4, 3), {"h": [torch.ones(4, 2)], "scale": torch.tensor(2.0), "name": "a"}
    first, rest = first_samples((whole, state), 2)
    assert torch.equal(first, whole[:2])
    assert torch.equal(rest["h"][0], torch.ones(2, 2))
    assert (float(rest["scale"]), rest["name"]) == (2.0, "a")
    assert torch.equal(first_samples(whole, 1), whole[:1])
