"""Layers and networks at which compression used to break: norms without weights, sparse gradients, lazy layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression import (
    L0,
    Compressor,
    Cubic,
    HashShare,
    LearnMask,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    Sensitivity,
    ShareWeights,
    SoftMovement,
    Threshold,
    export_onnx,
    preview,
)
from distill_lightning.compression.structure.changes import rebuild_structure, structure_of

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
HALF = PruneUnits(unit="channel", amount=0.5, scope="layer")


# Norms without a tensor


NORMS = {
    "instance": lambda: nn.InstanceNorm2d(8),
    "batch": lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("schedule", ["at once", "masked"])
def test_channels_leave_a_norm_that_has_no_tensors(kind, schedule):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), NORMS[kind](), nn.ReLU(), nn.Conv2d(8, 4, 3))

    network, dense = build(), build().eval()
    if schedule == "at once":
        Compressor(network, [HALF], IMAGES).apply()
    else:
        step = PruneUnits(unit="channel", amount=0.5, scope="layer", schedule=Cubic(), finetune_epochs=1)
        compressor = Compressor(network, [step], IMAGES, epochs=1)
        compressor.begin_epoch(0, steps_per_epoch=1)
        compressor.finish()
    assert (network[0].out_channels, network[1].num_features, network[3].in_channels) == (4, 4, 4)
    # Beside the same network, by hand, without the channels of the smallest filters.
    weights = torch.cat([dense[0].weight.flatten(1), dense[3].weight.transpose(0, 1).flatten(1)], 1)
    kept = weights.abs().mean(1).topk(4).indices.sort().values
    hidden = F.conv2d(IMAGES, dense[0].weight[kept], dense[0].bias[kept])
    normed = F.instance_norm(hidden) if kind == "instance" else F.batch_norm(hidden, None, None, training=True)
    expected = F.conv2d(normed.relu(), dense[3].weight[:, kept], dense[3].bias)
    torch.testing.assert_close(network.eval()(IMAGES), expected, atol=1e-5, rtol=1e-5)
    again = rebuild_structure(build(), structure_of(network))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(IMAGES), network(IMAGES))


# Embeddings with sparse gradients


class Words(nn.Module):
    def __init__(self, *, sparse):
        super().__init__()
        self.embed = nn.Embedding(20, 6, sparse=sparse)
        self.head = nn.Linear(6, 3)

    def forward(self, words):
        return self.head(self.embed(words).mean(1))


WORDS = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(1))
BATCHES = [(WORDS, torch.tensor([0, 1, 2, 0]))]
STEPS = {
    "mask": PruneWeights(amount=0.5, finetune_epochs=1),
    "taylor": PruneWeights(amount=0.5, criterion="taylor", finetune_epochs=1),
    "regrow": PruneWeights(amount=0.5, schedule=Cubic(), regrow=0.2, finetune_epochs=1),
    "sensitivity": PruneWeights(scope=Sensitivity(target=0.4, levels=[0.2, 0.5]), finetune_epochs=1),
    "penalty": Regularise(penalty="l1", weight=0.1, finetune_epochs=1),
    "movement": LearnMask(Movement(0.5), finetune_epochs=1),
    "soft": LearnMask(SoftMovement(), finetune_epochs=1),
    "gates": LearnMask(L0(0.1), finetune_epochs=1),
    "shared": ShareWeights(k=4, finetune_epochs=1),
    "hashed": HashShare(ratio=2, finetune_epochs=1),
    "quantized": Quantize(weight_bits=4, finetune_epochs=1),
}


@pytest.mark.parametrize("kind", STEPS)
def test_an_embedding_with_sparse_gradients_ends_like_one_with_dense_ones(kind):
    trained = []
    for sparse in (False, True):
        torch.manual_seed(0)
        network = Words(sparse=sparse)
        compressor = Compressor(network, [STEPS[kind]], WORDS, batches=BATCHES, epochs=1)
        compressor.begin_epoch(0, steps_per_epoch=3)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(WORDS), BATCHES[0][1]).backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
        trained.append(compressor.finish().eval()(WORDS).detach())
    torch.testing.assert_close(*trained, atol=1e-6, rtol=1e-6)


# What is refused at once


@pytest.mark.slow
def test_a_compiled_network_is_refused_by_name():
    network = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    inner = copy.deepcopy(network)
    inner[0].compile()
    for given, name in ((torch.compile(network), "Sequential"), (inner, "0")):
        for start in (
            lambda given=given: Compressor(given, [HALF], torch.randn(2, 6)),
            lambda given=given: preview(given, [HALF], torch.randn(2, 6)),
        ):
            with pytest.raises(
                InputError, match=rf"^{name} is compiled by torch.compile.* compress the network without"
            ):
                start()


def test_a_lazy_layer_is_refused_until_it_has_seen_an_input():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LazyLinear(2))
    for start in (Compressor, preview):
        with pytest.raises(InputError, match=r"^2 \(LazyLinear\) has no weights before .* run the network once"):
            start(network, [HALF], torch.randn(2, 6))
    network(torch.randn(2, 6))
    Compressor(network, [HALF], torch.randn(2, 6)).apply()
    assert network[2].in_features == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneUnits(unit="channel", amount="0.5"), "PruneUnits: amount must be a number, .* got '0.5'"),
        (lambda: PruneWeights(amount={"Linear": "0.5"}), "PruneWeights: amount must be a number, .*'0.5'"),
        (lambda: Movement("0.5"), "Movement: amount must be a number, .* got '0.5'"),
        (lambda: L0("0.1"), "L0: weight must be a number, got '0.1'"),
        (lambda: Threshold("0.1"), "Threshold: value must be a number, got '0.1'"),
        (lambda: Cubic(end="0.5"), "Cubic: end must be a number, got '0.5'"),
        (lambda: Sensitivity(target="0.5"), "Sensitivity: target must be a number, got '0.5'"),
        (lambda: Regularise(penalty="l1", weight="0.1"), "Regularise: weight must be a number, got '0.1'"),
    ],
)
def test_a_number_in_quotes_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


class Fixed(nn.Module):
    """A network that is built for batches of four."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(x.reshape(4, 12))


def test_a_network_of_one_batch_size_is_refused_as_an_onnx_file_of_all(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    message = r"^Fixed runs with a batch of 4 and not with one of 1 \(shape .*give dynamic_batch=False"
    with pytest.raises(InputError, match=message) as caught:
        export_onnx(Fixed(), tmp_path / "fixed.onnx", torch.randn(4, 3, 4))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fixed.onnx").exists()
