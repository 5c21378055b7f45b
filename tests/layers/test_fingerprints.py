"""What tells networks apart: values, and what computes with them."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from distill_lightning import InputError
from distill_lightning.layers import fingerprint, freeze, structure


def network_of(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, **options), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).eval()


def told(network):
    return fingerprint(network), structure(network)


def compiled_inside(network):
    network[3] = torch.compile(network[3], backend="eager")
    return network


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        nn.SyncBatchNorm.convert_sync_batchnorm,
        compiled_inside,
        lambda network: torch.compile(network, backend="eager"),
        lambda network: nn.DataParallel(torch.compile(network, backend="eager")),
    ],
    ids=["data parallel", "average", "sync batch norm", "a part compiled", "compiled", "two wrappers"],
)
def test_wrappers_do_not_count(wrap):
    assert told(wrap(network_of())) == told(network_of())


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_parametrized_weight_is_what_it_gives(norm):
    kept, removed = network_of(), network_of()
    for network in (kept, removed):
        torch.manual_seed(1)
        norm(network[3])
        network(torch.rand(2, 1, 8, 8))
        network.eval()
    # torch deletes the property from a class that copies share: no copies here.
    parametrize.remove_parametrizations(removed[3], "weight")
    assert torch.equal(kept[3].weight, removed[3].weight)
    assert told(kept) == told(removed)
    with torch.no_grad():
        removed[3].weight[0, 0] += 1
    assert fingerprint(kept) != fingerprint(removed)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked", "3.bias"])
def test_every_value_counts(name):
    network = network_of()
    with torch.no_grad():
        network.state_dict()[name].add_(1)
    assert fingerprint(network) != fingerprint(network_of())
    assert structure(network) == structure(network_of())


def test_types_shapes_and_buffers_that_are_not_saved_count():
    fingerprints = [fingerprint(network_of()), fingerprint(network_of().double()), fingerprint(network_of().bfloat16())]
    network = network_of()
    network.register_buffer("scale", torch.ones(1), persistent=False)
    fingerprints.append(fingerprint(network))
    network.scale += 1
    fingerprints.append(fingerprint(network))
    network.scale = network.scale.reshape(1, 1)
    fingerprints.append(fingerprint(network))
    assert len(set(fingerprints)) == len(fingerprints)


def test_options_that_no_weight_shows_count():
    found = {structure(network_of(**options)) for options in ({}, {"stride": 2}, {"padding": 1}, {"dilation": 2})}
    assert len(found) == 4
    assert structure(nn.Sequential(nn.ReLU())) != structure(nn.Sequential(nn.GELU()))
    assert structure(nn.BatchNorm2d(2, eps=0.1)) != structure(nn.BatchNorm2d(2))


class PrintsItself(nn.Module):
    """Tells its option nowhere but here."""

    def __init__(self, power):
        super().__init__()
        self.power = power

    def __repr__(self):
        return f"PrintsItself(power={self.power})"


def test_who_prints_himself_is_told_by_that():
    assert structure(nn.Sequential(PrintsItself(2))) != structure(nn.Sequential(PrintsItself(3)))
    parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    wrapped = nn.ModuleList([nn.DataParallel(nn.Linear(2, 2)), nn.Linear(2, 2)])
    assert structure(parts) == structure(wrapped)


class Extra(nn.Module):
    """Has state that is no tensor."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"bits": 8}, {"bits": 4}),
        ({"bits": [1, (2, None)]}, {"bits": [1, (2, 0.0)]}),
        ([torch.zeros(2), "a"], [torch.ones(2), "a"]),
        ({"a", "b"}, {"a", "c"}),
        (torch.float16, torch.bfloat16),
        (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
    ],
)
def test_state_that_is_no_tensor_counts(one, other):
    assert fingerprint(Extra(one)) == fingerprint(Extra(copy.deepcopy(one)))
    assert fingerprint(Extra(one)) != fingerprint(Extra(other))


def test_what_has_no_value_or_cannot_be_told_is_named():
    with pytest.raises(InputError, match=r"'0\.\w+' has no value yet"):
        fingerprint(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(InputError, match=r"'\w+' has no value yet"):
        fingerprint(nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match=r"'0\._extra_state' holds a function, which cannot be pickled"):
        fingerprint(nn.Sequential(Extra(lambda: 0)))


def test_a_fingerprint_is_the_same_in_another_process():
    code = (
        "from tests.layers.test_fingerprints import *\n"
        "print(fingerprint(nn.Sequential(network_of(), Extra({'a': {'x', 'y', 'z'}, 'b': [1.5]}))))"
    )
    other = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(nn.Sequential(network_of(), Extra({"a": {"z", "y", "x"}, "b": [1.5]})))


# quantized, scripted and exported networks


def quantized(seed=0):
    torch.manual_seed(seed)
    network = nn.ModuleDict({"linear": nn.Linear(4, 3), "lstm": nn.LSTM(4, 3)})
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear, nn.LSTM})


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_a_quantized_network_counts_with_all_its_values():
    assert told(quantized()) == told(quantized())
    assert len({fingerprint(part) for seed in (0, 1) for part in quantized(seed).values()}) == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated:FutureWarning")
def test_the_code_of_a_traced_network_counts():
    def traced(**options):
        return torch.jit.trace(network_of(**options)[:2], torch.zeros(1, 1, 8, 8))

    assert told(traced()) == told(traced())
    assert fingerprint(traced()) == fingerprint(traced(stride=2))
    assert structure(traced()) != structure(traced(stride=2))


def exported(network):
    return torch.export.export(network, (torch.zeros(2, 1, 8, 8),)).module()


@pytest.mark.slow
def test_an_exported_network_can_be_frozen_and_its_code_counts():
    networks = [freeze(exported(network_of()[:2].eval())) for _ in range(2)]
    strided = freeze(exported(network_of(stride=2)[:2].eval()))
    assert told(networks[0]) == told(networks[1])
    assert fingerprint(networks[0]) == fingerprint(strided)
    assert structure(networks[0]) != structure(strided)
    inputs = torch.rand(2, 1, 8, 8)
    assert torch.equal(networks[0](inputs), network_of()[:2](inputs))
    assert not any(module.training for module in networks[0].modules())
    # Again, and inside of another module.
    freeze(nn.Sequential(nn.Identity(), networks[0])).train().eval()


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1), nn.Dropout(0.5)])
def test_a_network_that_was_exported_in_train_mode_cannot_be_frozen(layer):
    network = nn.Sequential(nn.Identity(), exported(nn.Sequential(layer).train()))
    with pytest.raises(InputError, match=r"1 was exported in train mode \(aten\..*network\.eval\(\) before"):
        freeze(network)
