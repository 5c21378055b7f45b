"""Parameters, files and latencies; an injected clock decides what takes how long."""

import copy
import itertools
import math
import statistics
import zlib

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.compression.access.outputs import largest_difference, scale_of
from distill_lightning.compression.costs.latency import (
    NO_SPEED_UP,
    Clocks,
    Latency,
    Ratio,
    bootstrap_ratio,
    compare_latency,
)
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.report.measure import measure_file
from distill_lightning.networks.weights import load_strictly, read_weights, write_weights
from distill_lightning.testing import TinyNet


def test_parameters_are_counted_stored_and_nonzero_and_tied_ones_once():
    network = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3)})
    network["b"].weight = network["a"].weight
    with torch.no_grad():
        network["a"].weight.fill_(1)[0] = 0
        for name in "ab":
            network[name].bias.fill_(2)
    # weight 12, of which 4 zeros; two biases of 3; BatchNorm's weight 3 and zero bias 3
    assert count_parameters(network) == (12 + 6 + 6, 8 + 6 + 3)
    assert count_parameters(nn.ReLU()) == (0, 0)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2], [1, 4], 2),
        ([math.nan, 1], [math.nan, 1.5], 0.5),
        ([math.inf, -math.inf, 0], [math.inf, -math.inf, 0], 0),
        ([math.nan], [1], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([], [], 0),
    ],
)
def test_what_is_no_number_equals_itself_only(one, other, expected):
    assert largest_difference(torch.tensor(one), torch.tensor(other)) == expected
    assert largest_difference(torch.tensor(other), torch.tensor(one)) == expected


def test_a_tolerance_is_relative_to_the_largest_number():
    assert scale_of([torch.tensor([0.5, -3]), torch.tensor([math.inf, math.nan])]) == 3
    assert scale_of([torch.tensor([0.5])]) == scale_of([]) == 1


# files


def reader(template):
    def read(path):
        network = copy.deepcopy(template)
        nn.init.zeros_(network.head.weight)
        load_strictly(network, read_weights(path), source=str(path))
        return network.eval()

    return read


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_is_measured_when_it_gives_equal_outputs(tmp_path, suffix):
    network, images = TinyNet().eval(), torch.randn(4, 1, 8, 8)
    path = tmp_path / f"net{suffix}"
    size = measure_file(
        path,
        write=lambda target: write_weights(network, target),
        read=reader(network),
        expected=network(images).detach(),
        example_inputs=images,
    )
    assert size.size == path.stat().st_size
    assert size.deflated == len(zlib.compress(path.read_bytes(), 9))
    assert size.difference == 0
    assert size.size > 4 * count_parameters(network).stored


def test_a_file_that_changes_the_outputs_is_refused_beyond_the_tolerance(tmp_path):
    network, images = TinyNet().eval(), torch.randn(4, 1, 8, 8)
    expected = network(images).detach()
    expected[2, 1] += 0.25
    given = {
        "write": lambda target: write_weights(network, target),
        "read": reader(network),
        "expected": expected,
        "example_inputs": (images,),
    }
    with pytest.raises(InputError, match=r"net.pt does not reproduce the network: outputs differ by up to 0.25 after"):
        measure_file(tmp_path / "net.pt", **given)
    with pytest.raises(InputError, match=r"more than the tolerance 0.2$"):
        measure_file(tmp_path / "net.pt", tolerance=0.2, **given)
    assert measure_file(tmp_path / "net.pt", tolerance=0.3, **given).difference == pytest.approx(0.25, rel=1e-5)


def measured(tmp_path, found, expected, tolerance=0.0):
    return measure_file(
        tmp_path / "file.bin",
        write=lambda path: path.write_bytes(b"1" * 100),
        read=lambda path: lambda inputs: found,
        expected=expected,
        example_inputs=torch.zeros(1),
        tolerance=tolerance,
    )


def test_outputs_may_be_structures(tmp_path):
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    assert measured(tmp_path, (one, {"a": other}), (one, {"a": other})).difference == 0
    assert measured(tmp_path, [one, other + 0.5], (one, other), 1.0).difference == 0.5
    for found in ((one,), (one, {"b": other}), (one, other)):
        with pytest.raises(InputError, match="alike before and after"):
            measured(tmp_path, found, (one, {"a": other}))


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ([float("inf")], [float("inf")], True),
        ([float("nan")], [float("nan")], True),
        ([float("nan")], [1.0], False),
        ([1.0], [float("inf")], False),
    ],
)
def test_what_is_no_number_must_be_so_on_both_sides(tmp_path, found, expected, equal):
    if equal:
        assert measured(tmp_path, torch.tensor(found), torch.tensor(expected)).difference == 0
    else:
        with pytest.raises(InputError, match="does not reproduce the network"):
            measured(tmp_path, torch.tensor(found), torch.tensor(expected), tolerance=1.0)


def test_files_that_cannot_be_measured_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.bin: write\(\) left no file there"):
        measure_file(
            tmp_path / "none.bin",
            write=lambda _: None,
            read=lambda _: None,
            expected=None,
            example_inputs=torch.zeros(1),
        )
    with pytest.raises(InputError, match=r"gives torch.Size\(\[2\]\) after reading it again, where \(3,\) is expected"):
        measured(tmp_path, torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match="outputs must be tensors"):
        measured(tmp_path, "text", "text")


# latency


class Machine:
    """Time that passes only where the test says; ``noise`` slows both contestants of a round alike."""

    def __init__(self, dense, compressed, *, noise=(0.0,)):
        self.now = 0.0
        self.calls = []
        self.costs = {"dense": dense, "compressed": compressed}
        self.noise = itertools.cycle(noise)
        self.slow = 0.0
        self.state = []

    def call(self, name):
        def work():
            if name == "dense":
                self.slow = next(self.noise)
            self.calls.append(name)
            self.state.append((torch.is_inference_mode_enabled(), torch.get_num_threads()))
            self.now += self.costs[name] + self.slow

        return work

    def run(self, **options):
        clocks = Clocks(thread=lambda: self.now, wall=lambda: 3 * self.now)
        return compare_latency(self.call("dense"), self.call("compressed"), clocks=clocks, **options)


def test_contestants_take_turns_after_the_warm_up_in_inference_mode_with_one_thread():
    machine = Machine(2.0, 1.0)
    torch.set_num_threads(2)
    latency = machine.run(rounds=60, warm_up=3)
    assert torch.get_num_threads() == 2
    assert not torch.is_inference_mode_enabled()
    assert machine.calls == ["dense", "compressed"] * 63
    assert set(machine.state) == {(True, 1)}
    assert latency.dense == (2.0,) * 60
    assert latency.compressed == (1.0,) * 60
    assert latency.compressed_wall == (3.0,) * 60
    assert latency.ratio == latency.wall_ratio == (0.5, 0.5, 0.5)
    assert latency.claim == "faster: 0.50 of the dense time, 95 % interval 0.50 to 0.50"


def test_the_default_is_ten_rounds_of_warm_up_and_fifty_that_count():
    machine = Machine(1.0, 1.0)
    assert len(machine.run().dense) == 50
    assert len(machine.calls) == 120


def test_an_interval_that_holds_one_is_no_speed_up():
    latency = Machine(1.0, 1.0).run()
    assert latency.claim == f"{NO_SPEED_UP} (1.00 of the dense time, 95 % interval 1.00 to 1.00)"
    assert Machine(1.0, 1.5).run().claim.startswith("slower: 1.50 of the dense time")


def test_noise_widens_the_interval_until_nothing_can_be_claimed():
    generator = torch.Generator().manual_seed(0)
    dense = (1 + torch.rand(50, generator=generator)).tolist()
    compressed = (0.97 + torch.rand(50, generator=generator)).tolist()
    ratio = bootstrap_ratio(compressed, dense)
    assert ratio.low < 1 < ratio.high
    latency = Latency(tuple(dense), tuple(compressed), (), (), ratio, Ratio(0.5, 0.4, 0.6), "thread")
    assert latency.claim.startswith(NO_SPEED_UP)
    assert latency._replace(by="wall").claim.startswith("faster: 0.50")


def test_what_slows_the_machine_slows_both_and_the_ratio_stands():
    latency = Machine(2.0, 1.0, noise=(0.0, 0.0, 0.0, 30.0)).run()
    assert latency.ratio.value == 0.5
    assert max(latency.dense) == 32


def test_the_bootstrap_is_the_loop():
    over, under = [1.0, 1.4, 3.0, 2.5, 1.7, 2.2, 5.0, 1.1], [2.0, 2.5, 3.0, 2.9, 2.3, 2.6, 3.5, 2.2]
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(8, (300, 8), generator=generator).tolist()
    ratios = sorted(
        statistics.median(over[i] for i in rows) / statistics.median(under[i] for i in rows) for rows in drawn
    )
    found = bootstrap_ratio(over, under, resamples=300, seed=4)

    def quantile(share):
        position = share * 299
        low = int(position)
        return ratios[low] + (position - low) * (ratios[low + 1] - ratios[low])

    assert found.value == pytest.approx(1.95 / 2.55)
    assert found.low == pytest.approx(quantile(0.025))
    assert found.high == pytest.approx(quantile(0.975))


@pytest.mark.slow
def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(200):
        over, under = torch.rand(2, 60, generator=generator) + 1
        ratio = bootstrap_ratio(over.tolist(), under.tolist(), resamples=300)
        inside += ratio.low <= 1 <= ratio.high
    assert 0.88 <= inside / 200 <= 0.99


def test_the_bootstrap_leaves_the_global_random_state():
    state = torch.random.get_rng_state()
    assert bootstrap_ratio([1.0, 2.0], [1.0, 2.0]) == bootstrap_ratio([1.0, 2.0], [1.0, 2.0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_real_clocks_measure_real_work():
    weight = torch.randn(64, 64)
    latency = compare_latency(lambda: weight @ weight, lambda: weight + weight)
    assert all(seconds > 0 for seconds in (*latency.dense, *latency.compressed_wall))
    assert latency.ratio.low <= latency.ratio.value <= latency.ratio.high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 49}, "rounds >= 50, warm_up >= 0 and resamples >= 1, got 49, 10 and 2000"),
        ({"warm_up": -1}, "got 50, -1 and 2000"),
        ({"resamples": 0}, "got 50, 10 and 0"),
        ({"by": "gpu"}, "by must be one of thread, wall, got 'gpu'"),
    ],
)
def test_measurements_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Machine(1.0, 1.0).run(**options)


def test_no_time_at_all_is_refused():
    with pytest.raises(InputError, match="takes no measurable time: raise the batch size"):
        Machine(0.0, 1.0).run()
