"""The Compressor in a loop of one's own, and at once; descriptions from which a network is made again."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from distill_lightning import SmallCNN, SmallLSTM, SmallTransformer
from distill_lightning.compression import (
    Compressor,
    Cubic,
    Encode,
    HashShare,
    Iterative,
    LearnMask,
    LowRank,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    Sensitivity,
    ShareWeights,
    TieLayers,
    load_compressed,
)
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.structure.changes import plain_copy, rebuild_structure, structure_of
from distill_lightning.errors import InputError
from distill_lightning.testing import TinyNet


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(size, 1, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def train(network, steps, *, epochs=4, stop=None, go_on=None, watch=None, **options):
    """The loop of the docstring; may be stopped before an epoch, and gone on with there."""
    data = batches()
    compressor = Compressor(network, steps, data[0][0], epochs=epochs, batches=data, watch=watch, **options)
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
    if go_on is not None:
        rebuild_structure(network, go_on["description"])
        network.load_state_dict(go_on["network"])
        compressor.load_state_dict(go_on["compressor"])
        optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
        optimizer.load_state_dict(go_on["optimizer"])
    for epoch in range(0 if go_on is None else go_on["epoch"], epochs):
        if epoch == stop:
            state = {"network": network.state_dict(), "compressor": compressor.state_dict(), "epoch": epoch}
            return state | {"optimizer": optimizer.state_dict(), "description": structure_of(network)}
        if compressor.begin_epoch(epoch, steps_per_epoch=len(data), optimizer=optimizer):
            optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
        for inputs, targets in data:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
    compressor.finish()
    return compressor


def net(seed=0):
    torch.manual_seed(seed)
    return TinyNet(3)


STEPS = {
    "masks": lambda: [PruneWeights(amount=0.6, schedule=Cubic(), finetune_epochs=3)],
    "channels": lambda: [PruneUnits(amount=0.5, unit="channel", schedule=Cubic(), finetune_epochs=3)],
    "low rank": lambda: [LowRank(rank=2, finetune_epochs=3)],
    "values": lambda: [
        PruneWeights(amount=0.5, finetune_epochs=1),
        Quantize(weight_bits=4, finetune_epochs=2),
        Encode(),
    ],
    "movement": lambda: [LearnMask(Movement(0.5), finetune_epochs=2), ShareWeights(finetune_epochs=1)],
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("kind", STEPS)
def test_a_loop_that_is_gone_on_with_ends_like_the_whole_one(tmp_path, kind, stop):
    whole = net()
    train(whole, STEPS[kind](), dense_epochs=1)
    state = train(net(), STEPS[kind](), dense_epochs=1, stop=stop)
    # As a file, which holds nothing but tensors and plain values.
    torch.save(state, tmp_path / "state.pt")
    resumed = net(seed=5)
    train(resumed, STEPS[kind](), dense_epochs=1, go_on=torch.load(tmp_path / "state.pt", weights_only=True))
    first, second = whole.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parameters_keep_their_order_when_they_were_computed_for_a_while():
    """An optimiser's saved state goes by it."""
    network = net()
    names = [name for name, _ in network.named_parameters()]
    train(network, [LearnMask(Movement(0.5), finetune_epochs=1)], epochs=1)
    assert [name for name, _ in network.named_parameters()] == names


def test_moments_are_told_in_their_order():
    told = []
    steps = [PruneWeights(amount=0.5, finetune_epochs=1), Quantize(weight_bits=4, finetune_epochs=1), Encode()]
    compressor = train(
        net(), steps, dense_epochs=1, watch=lambda moment, phase: told.append((moment, phase and phase.number))
    )
    assert told == [
        ("dense", None), ("before", 1), ("after", 1), ("before", 2), ("after", 2), ("before", 3), ("after", 3),
    ]  # fmt: skip
    assert not compressor.waiting
    assert compressor.phase is None


def test_the_network_stays_the_same_object_and_random_states_stay():
    network = net()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    steps = [PruneUnits(amount=0.5, criterion="random", unit="channel"), HashShare(ratio=4)]
    compressed = Compressor(network, steps, torch.rand(2, 1, 8, 8, generator=torch.Generator()), bn_batches=0).apply()
    assert compressed is network
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_others():
    kept = []
    for seed in (0, 0, 1):
        network = net()
        Compressor(network, [PruneWeights(amount=0.5, criterion="random")], torch.rand(2, 1, 8, 8), seed=seed).apply()
        kept.append(torch.cat([p.flatten() != 0 for p in network.parameters() if p.dim() > 1]))
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_batch_norm_is_measured_again_on_the_calibration_data():
    network, data = net(), batches()
    for inputs, _ in data:
        network(inputs)
    steps = [PruneWeights(amount=0.5, targets="features.0")]
    Compressor(network, steps, data[0][0], batches=data).apply()
    convolution, norm = network.features[0], network.features[1]
    with torch.no_grad():
        outputs = [convolution(inputs) for inputs, _ in data]
    assert torch.allclose(norm.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0), rtol=1e-5)


def test_statistics_that_could_not_be_measured_are_told():
    inputs = torch.rand(2, 1, 8, 8)
    told = "BatchNorm's statistics are the old ones"

    def notes(network, steps, **options):
        compressor = Compressor(network, steps, inputs, **options)
        compressor.apply()
        return " ".join(compressor.piece.notes)

    assert told in notes(net(), [PruneWeights(amount=0.5)])
    assert told not in notes(net(), [PruneWeights(amount=0.5)], bn_batches=0)
    assert told not in notes(net(), [PruneWeights(amount=0.5)], batches=batches())
    assert told not in notes(net(), [PruneWeights(amount=0.0)])
    assert told not in notes(net(), [Quantize(weight_bits=4)])
    assert told not in notes(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), [PruneWeights(amount=0.5)])


def test_targets_that_match_nothing_are_refused_before_the_training():
    inputs = torch.rand(2, 1, 8, 8)
    for options in ({"targets": "zz*"}, {"exclude": ["head", "zz*"]}):
        late = PruneWeights(amount=0.5, at=3, **options)
        with pytest.raises(InputError, match=r"step 2 \(PruneWeights\): (targets|exclude) 'zz\*' matches none of"):
            Compressor(net(), [PruneWeights(amount=0.1), late], inputs, epochs=5)
    # These layers are there when their turn comes.
    Compressor(net(), [LowRank(rank=2), PruneWeights(amount=0.5, targets="features.0.0")], inputs).apply()


def test_a_penalty_adds_its_gradient():
    network, data = net(), batches(1)
    steps = [Regularise(penalty="l1", weight=0.1, finetune_epochs=1)]
    compressor = Compressor(network, steps, data[0][0], epochs=1, batches=data)
    compressor.begin_epoch(0, steps_per_epoch=1)
    F.cross_entropy(network(data[0][0]), data[0][1]).backward()
    before = {name: p.grad.clone() for name, p in network.named_parameters()}
    penalty = compressor.before_optimizer_step()
    matrices = {name: p for name, p in network.named_parameters() if p.dim() > 1}
    assert float(penalty) == pytest.approx(0.1 * sum(float(p.abs().sum()) for p in matrices.values()), rel=1e-5)
    for name, parameter in network.named_parameters():
        added = 0.1 * parameter.sign() if name in matrices else torch.zeros_like(parameter)
        assert torch.allclose(parameter.grad, before[name] + added)


def test_what_cannot_be_is_refused():
    inputs = torch.rand(2, 1, 8, 8)
    with pytest.raises(InputError, match="leave epochs out to apply it"):
        Compressor(net(), [PruneWeights(amount=0.5)], inputs, epochs=3).apply()
    with pytest.raises(InputError, match=r"step 1 \(PruneWeights\): .* give the Compressor epochs, and train"):
        Compressor(net(), [PruneWeights(amount=0.5, schedule=Cubic())], inputs)
    with pytest.raises(InputError, match="bn_batches must not be negative"):
        Compressor(net(), [], inputs, bn_batches=-1)
    with pytest.raises(InputError, match="criterion.*needs calibration data|needs calibration data: give batches"):
        Compressor(net(), [PruneWeights(amount=0.5, criterion="taylor")], inputs).apply()


def saved(*steps):
    return Compressor(net(), steps, torch.rand(2, 1, 8, 8), epochs=4 if steps else 0).state_dict()


CUBIC = PruneWeights(amount=0.5, schedule=Cubic(), finetune_epochs=2)


@pytest.mark.parametrize(
    ("made", "here", "message"),
    [
        ([], [CUBIC], "the checkpoint was made without steps, and this is 1 PruneWeights: give the steps"),
        ([CUBIC], [], "made with the steps 1 PruneWeights, and this is no step"),
        ([replace(CUBIC, amount=0.9)], [CUBIC], r"step 1 PruneWeights has amount=0\.9, and this one amount=0\.5: give"),
        (
            [replace(CUBIC, schedule=Cubic(initial=0.1))],
            [CUBIC],
            r"has schedule\.initial=0\.1, and this one schedule\.initial=0\.0: give the steps that it was made with",
        ),
        (
            [replace(CUBIC, schedule=Iterative(2))],
            [CUBIC],
            r"has schedule=Iterative\(\.\.\.\), and this one schedule=Cubic",
        ),
        ([CUBIC, Encode(at=3)], [CUBIC, Encode()], "step 2 Encode deflate has at=3, and this one at=None"),
    ],
)
def test_a_state_of_steps_with_other_options_is_refused(made, here, message):
    compressor = Compressor(net(), here, torch.rand(2, 1, 8, 8), epochs=4 if here else 0)
    with pytest.raises(InputError, match=message):
        compressor.load_state_dict(saved(*made))


def test_a_state_knows_options_by_their_values_not_by_their_classes():
    made = PruneWeights(scope=Sensitivity(max_drop=0.1, levels=(0.1, 0.2)), targets=("*",))
    here = PruneWeights(scope=Sensitivity(max_drop=0.1, levels=[0.1, 0.2]), targets=["*"])
    Compressor(net(), [here], torch.rand(2, 1, 8, 8)).load_state_dict(
        Compressor(net(), [made], torch.rand(2, 1, 8, 8)).state_dict()
    )


def test_a_state_of_before_knows_the_titles_only():
    state = saved(CUBIC)
    del state["options"]
    Compressor(net(), [CUBIC], torch.rand(2, 1, 8, 8), epochs=4).load_state_dict(state)


# Descriptions

LSTM = lambda: SmallLSTM(3, input_size=8, width=12)  # noqa: E731
TRANSFORMER = lambda: SmallTransformer(3, length=8, input_size=8, width=16, feedforward=24)  # noqa: E731
CNN = lambda: SmallCNN(3, width=4)  # noqa: E731


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (
            CNN,
            [
                PruneUnits(amount=0.5, unit="channel"),
                LowRank(rank=2),
                PruneWeights(amount=0.5),
                Quantize(weight_bits=3),
            ],
        ),
        (CNN, [LowRank(rank=2), PruneUnits(amount=0.3, unit="channel"), ShareWeights(k=4), Encode()]),
        (CNN, [HashShare(ratio=4)]),
        (CNN, [Quantize(weight_bits=4, act_bits=8)]),
        (LSTM, [PruneUnits(amount=0.5, unit="hidden_unit"), LowRank(rank=3), ShareWeights(k=8)]),
        (LSTM, [PruneWeights(amount=0.5), Quantize(weight_bits=4)]),
        (
            TRANSFORMER,
            [PruneUnits(amount=0.5, unit="head"), PruneUnits(amount=0.5, unit="neuron"), Quantize(weight_bits=8)],
        ),
        (TRANSFORMER, [TieLayers(groups=[["encoder.layers.0", "encoder.layers.1"]]), ShareWeights(k=8)]),
    ],
)
def test_a_description_makes_the_structure_again(tmp_path, make, steps):
    torch.manual_seed(0)
    network, data = make(), batches()
    compressor = Compressor(network, steps, data[0][0], batches=data)
    compressor.apply()
    # In plain values only.
    description = json.loads(json.dumps(structure_of(network)))
    torch.manual_seed(9)
    again = rebuild_structure(make(), description)
    again.load_state_dict(network.state_dict(), strict=True)
    inputs = data[1][0]
    with torch.no_grad():
        output = network.eval()(inputs)
        assert torch.equal(again.eval()(inputs), output)
        assert torch.equal(copy_network(network)(inputs), output)
        assert torch.equal(plain_copy(network)(inputs), output)
        compressor.write(tmp_path / "network.dlpk")
        assert torch.equal(load_compressed(tmp_path / "network.dlpk")(inputs), output)
    assert structure_of(again) == structure_of(network)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert count_parameters(plain_copy(again)) == count_parameters(plain_copy(network))


def test_a_network_is_rebuilt_once():
    network = SmallCNN(3, width=4)
    Compressor(network, [LowRank(rank=2)], torch.rand(2, 1, 8, 8), bn_batches=0).apply()
    with pytest.raises(InputError, match="SmallCNN is compressed already: build a new one"):
        rebuild_structure(network, structure_of(network))
    with pytest.raises(InputError, match="has no layer"):
        rebuild_structure(nn.Sequential(nn.Linear(2, 2)), structure_of(network))


@pytest.mark.parametrize(
    "after", [ShareWeights(k=8), Quantize(weight_bits=4), LearnMask(Movement(amount=0.8), finetune_epochs=1)]
)
def test_pruned_weights_stay_pruned_for_the_log_whatever_holds_them_at_zero(after):
    torch.manual_seed(0)
    network, data = TinyNet(), batches()
    steps = [PruneWeights(amount=0.8, scope="layer"), after]
    compressor = Compressor(network, steps, data[0][0], epochs=2, batches=data)
    pruned, shares = [], []
    for epoch in range(2):
        compressor.begin_epoch(epoch, steps_per_epoch=1)
        compressor.after_optimizer_step()
        pruned.append(compressor.pruned)
        shares.append(compressor.sparsity)
        for path, share in compressor.sparsities().items():
            with torch.no_grad():
                weight = network.get_submodule(path.rpartition(".")[0]).weight
            assert share <= float((weight == 0).float().mean()) + 1e-6
    assert 0 < pruned[0] <= pruned[1]
    assert shares == [pytest.approx(0.8, abs=0.01)] * 2
