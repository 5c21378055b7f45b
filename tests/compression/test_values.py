"""Grids, codes, ranges, quantizers that train, and what helps without training."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

from distill_lightning import InputError
from distill_lightning.compression.access.computed import (
    bake_layer,
    computed,
    describe_weights,
    original_of,
    rebuild_weights,
)
from distill_lightning.compression.access.moments import input_moments
from distill_lightning.compression.access.weights import channel_axis, channel_groups, weight_names
from distill_lightning.compression.values import ranges
from distill_lightning.compression.values.activations import (
    ActivationQuantizer,
    describe_input,
    observing_inputs,
    quantize_input,
    rebuild_input,
)
from distill_lightning.compression.values.allocation import allocate_bits, weight_errors
from distill_lightning.compression.values.corrections import correct_biases
from distill_lightning.compression.values.equalisation import equalisable_pairs, equalise, pairs_that_keep_outputs
from distill_lightning.compression.values.estimators import (
    binary,
    binary_connect,
    codes,
    dorefa_activation,
    dorefa_weight,
    lsq,
    lsq_start,
    pact,
    ternary,
    ttq,
    ttq_codes,
    ttq_start,
)
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.ranges import Observer, find_range, kl_divergence_of_clipping, weight_grid
from distill_lightning.compression.values.scheme import Codes, Scheme, dequantize, fake_quantize, grid


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_bits(one, other):
    """Equal in every bit: -0.0 is not 0.0."""
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    return one.detach().contiguous().numpy().tobytes() == other.detach().contiguous().numpy().tobytes()


SCHEMES = [
    Scheme(bits, kind, per, axis)
    for bits, kind, per, axis in itertools.product(
        (2, 4, 8), ("symmetric", "affine", "pow2"), ("tensor", "channel", "group:5"), (0, 1)
    )
]
SCHEMES.append(Scheme(3, "affine", "group:100"))
# Of grouped transposed convolutions.
SCHEMES += [Scheme(4, "affine", "channel", 1, 2), Scheme(3, "symmetric", "group:5", 1, 3)]
OTHERS = [
    Scheme(3, "dorefa", "tensor"), Scheme(1, "binary"), Scheme(1, "binary", "tensor"),
    Scheme(1, "binary", "group:4"), Scheme(1, "binaryconnect", "tensor"), Scheme(2, "ternary"),
    Scheme(2, "ternary", "tensor"), Scheme(2, "ternary", "group:7", 1), Scheme(2, "ttq", "tensor"),
]  # fmt: skip


def groups_of(weight, scheme):
    """The entries of every scale's group, as flat lists of positions, by loops."""
    positions = np.arange(weight.numel()).reshape(weight.shape)
    if scheme.per == "tensor":
        return [positions.ravel().tolist()]
    rows = [
        np.take(part, channel, axis=scheme.axis).ravel().tolist()
        for part in np.split(positions, scheme.groups)
        for channel in range(weight.shape[scheme.axis])
    ]
    if scheme.per == "channel":
        return rows
    size = int(scheme.per.split(":")[1])
    return [row[begin : begin + size] for row in rows for begin in range(0, len(row), size)]


def naive_fake(weight, scheme):
    """Min-max fake quantization of one group after the other in Python floats."""
    flat, result = weight.double().flatten().tolist(), [0.0] * weight.numel()
    for group in groups_of(weight, scheme):
        values = [flat[place] for place in group]
        low, high = min(0.0, *values), max(0.0, *values)
        if scheme.kind == "affine":
            levels = 2**scheme.bits - 1
            step = (high - low) / levels or 1.0
            zero = min(max(round(-low / step), 0), levels)
            bounds = (-zero, levels - zero)
        else:
            most = 2 ** (scheme.bits - 1) - 1
            step = max(-low, high) / most or 1.0
            step = 2.0 ** math.ceil(math.log2(step)) if scheme.kind == "pow2" else step
            bounds = (-most, most)
        for place, value in zip(group, values, strict=True):
            result[place] = min(max(round(value / step), bounds[0]), bounds[1]) * step
    return torch.tensor(result, dtype=torch.float64).reshape(weight.shape)


# Grids and codes


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_fake_quantization_is_the_loop_and_the_codes_give_it_back(scheme):
    weight = draw(6, 4, 3, dtype=torch.float64)
    fake = fake_quantize(weight, *weight_grid(weight, scheme), scheme)
    assert torch.allclose(fake, naive_fake(weight, scheme), rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = weight.to(dtype)
        found = codes(given, scheme)
        again = dequantize(found, scheme, dtype=dtype)
        as_numbers = fake_quantize(given, found.scales, found.zero_points, scheme)
        assert torch.equal(again.view(torch.uint8), as_numbers.contiguous().view(torch.uint8))
        assert found.values.min() >= scheme.lowest
        assert found.values.max() <= scheme.highest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_errors_are_half_a_step_rounding_twice_is_rounding_once_and_zero_is_zero(scheme):
    weight = draw(6, 4, 3)
    weight[0, 0, 0] = weight[2, 1, 1] = 0
    scale, zero_point = weight_grid(weight, scheme)
    fake = fake_quantize(weight, scale, zero_point, scheme)
    steps = dequantize(Codes(torch.ones_like(weight, dtype=torch.int8), scale, torch.zeros_like(scale)), scheme)
    assert bool(((fake - weight).abs() <= steps / 2 * (1 + 1e-5)).all())
    assert same_bits(fake_quantize(fake, scale, zero_point, scheme), fake)
    assert fake[0, 0, 0] == fake[2, 1, 1] == 0
    assert torch.equal(zero_point, zero_point.round())
    if scheme.kind != "affine":
        assert codes(weight, scheme).values.min() > -(2 ** (scheme.bits - 1))
        assert bool((zero_point == 0).all())
    if scheme.kind == "pow2":
        assert torch.equal(scale, 2 ** scale.log2().round())


def test_a_power_of_two_is_its_own_scale_and_the_smallest_that_cuts_nothing_off():
    scheme = Scheme(8, "pow2", "tensor")
    for reach, scale in ((127.0, 1.0), (127.01, 2.0), (126.0, 1.0), (63.5, 0.5), (0.0, 1.0)):
        assert weight_grid(torch.tensor([[reach, -1.0 if reach else 0.0]]), scheme)[0].item() == scale


def test_a_weight_of_zeros_stays_and_has_scale_one():
    for scheme in SCHEMES:
        scale, _ = weight_grid(torch.zeros(6, 4, 3), scheme)
        assert bool((scale == 1).all())
        assert not dequantize(codes(torch.zeros(6, 4, 3), scheme), scheme).any()


def test_ranges_of_one_sign_spend_no_code_on_the_other():
    assert weight_grid(draw(1, 500).abs(), Scheme(4, "affine", "tensor"))[1].item() == 0
    assert weight_grid(-draw(1, 500).abs(), Scheme(4, "affine", "tensor"))[1].item() == 15


def test_the_straight_through_gradient_is_one_inside_and_zero_outside():
    scheme = Scheme(4, "symmetric", "tensor")
    values = torch.tensor([-9.0, -7.6, -7.0, -0.2, 0.0, 3.3, 7.0, 7.4, 7.6, 100.0], requires_grad=True)
    fake_quantize(values, torch.ones(1, 1), torch.zeros(1, 1), scheme).sum().backward()
    assert values.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    weight = draw(5, 7).requires_grad_()
    for kind in ("symmetric", "affine", "pow2"):
        own = Scheme(3, kind)
        (gradient,) = torch.autograd.grad(fake_quantize(weight, *weight_grid(weight, own), own).sum(), weight)
        assert bool((gradient == 1).all()), "a range that holds everything cuts nothing off"


@pytest.mark.slow
def test_finer_groups_are_never_worse_and_more_bits_are_better():
    weight = draw(16, 64, seed=3) * torch.linspace(0.1, 3, 16)[:, None]

    def error(scheme, rule="minmax"):
        return (dequantize(codes(weight, scheme, rule=rule), scheme) - weight).square().sum().item()

    for kind, rule in itertools.product(("symmetric", "affine"), ("minmax", "mse")):
        for bits in (2, 4, 8):
            tensor, channel = (error(Scheme(bits, kind, per), rule) for per in ("tensor", "channel"))
            assert channel < tensor
        assert error(Scheme(8, kind), rule) < error(Scheme(4, kind), rule) < error(Scheme(2, kind), rule)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "full", "clipped"), [(8, 39.7, 40.5), (4, 14.5, 18.9), (2, 0.3, 7.2)])
def test_the_signal_to_noise_ratio_of_a_gaussian_is_that_of_the_books(bits, full, clipped):
    weight, scheme = draw(1, 100_000, dtype=torch.float64), Scheme(bits, "symmetric", "tensor")
    for rule, expected in (("minmax", full), ("mse", clipped)):
        noise = dequantize(codes(weight, scheme, rule=rule), scheme) - weight
        ratio = 10 * math.log10(weight.square().sum() / noise.square().sum())
        assert ratio == pytest.approx(expected, abs=1)


def test_integer_arithmetic_is_fake_quantization():
    activations, weight = draw(32, 64).relu(), draw(24, 64, seed=1)
    of_inputs, of_weights = Scheme(8, "symmetric", "tensor"), Scheme(8, "symmetric", "channel")
    left, right = codes(activations, of_inputs), codes(weight, of_weights)
    products = torch._int_mm(left.values, right.values.t().contiguous())
    assert products.dtype == torch.int32
    exact = products.double() * left.scales.double() * right.scales.double().t()
    fakes = (dequantize(left, of_inputs), dequantize(right, of_weights))
    fake = fakes[0] @ fakes[1].t()
    assert ((fake - exact).norm() / exact.norm()).item() < 5e-7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "2 to 8"), ({"bits": 9}, "2 to 8"), ({"kind": "log"}, "kind must be"),
        ({"per": "row"}, "per must be"), ({"per": "group:0"}, "per must be"), ({"axis": 2}, "axis"),
        ({"kind": "binary"}, "bits=1"), ({"kind": "ternary", "bits": 3}, "bits=2"),
        ({"kind": "dorefa"}, "per='tensor'"),
    ],
)  # fmt: skip
def test_schemes_that_cannot_be_are_one_line(options, words):
    with pytest.raises(InputError, match=words) as caught:
        Scheme(**options)
    assert "\n" not in str(caught.value)


def test_weights_without_a_range_or_channels_are_one_line():
    scheme = Scheme()
    for weight in (torch.tensor([[1.0, math.nan]]), torch.tensor([[math.inf, 0.0]]), torch.empty(0, 3)):
        with pytest.raises(InputError, match="no range"):
            codes(weight, scheme)
    with pytest.raises(InputError, match="per='tensor'"):
        codes(torch.ones(3), scheme)
    with pytest.raises(InputError, match="rule must be"):
        codes(torch.ones(3, 3), scheme, rule="best")
    with pytest.raises(InputError, match="ttq_codes"):
        codes(torch.ones(3, 3), Scheme(2, "ttq", "tensor"))


def test_schemes_are_plain_values():
    for scheme in (*SCHEMES, *OTHERS):
        assert Scheme(**json.loads(json.dumps(scheme.describe()))) == scheme


# Ranges


@pytest.mark.parametrize("kind", ["symmetric", "affine", "pow2"])
def test_the_mse_range_is_the_best_of_the_grid(kind):
    scheme = Scheme(3, kind, "channel")
    weight = draw(4, 50, seed=5, dtype=torch.float64) + 0.3
    low, high = find_range(weight, scheme, rule="mse", candidates=40)
    for row in range(4):
        values = weight[row].tolist()
        best = math.inf
        for step in range(1, 41):
            ends = [step / 40 * min(*values, 0.0), step / 40 * max(*values, 0.0)]
            if kind == "affine":
                scale = (ends[1] - ends[0]) / 7
                zero = min(max(round(-ends[0] / scale), 0), 7)
                bounds = (-zero, 7 - zero)
            else:
                scale = max(-ends[0], ends[1]) / 3
                scale = 2.0 ** math.ceil(math.log2(scale)) if kind == "pow2" else scale
                bounds = (-3, 3)
            best = min(best, sum((min(max(round(v / scale), bounds[0]), bounds[1]) * scale - v) ** 2 for v in values))
        own = Scheme(3, kind, "tensor")
        ends = low[row : row + 1, None], high[row : row + 1, None]
        found = (fake_quantize(weight[row], *grid(*ends, own), own) - weight[row]).square().sum().item()
        assert found == pytest.approx(best, rel=1e-9)


@pytest.mark.slow
def test_percentiles_are_those_of_a_sorted_list_with_and_without_counts():
    values = draw(3, 1000, seed=2, dtype=torch.float64)
    symmetric, affine = Scheme(8, "symmetric", "channel"), Scheme(8, "affine", "channel")
    _, high = find_range(values, symmetric, rule="percentile", percentile=99)
    assert high.tolist() == [sorted(abs(v) for v in row.tolist())[989] for row in values]
    low, high = find_range(values, affine, rule="percentile", percentile=98)
    assert high.tolist() == [sorted(row.tolist())[989] for row in values]
    assert low.tolist() == [sorted(row.tolist())[10] for row in values]
    counts = torch.randint(0, 4, (1, 30), generator=torch.Generator().manual_seed(1))
    few = draw(1, 30, seed=3)
    repeated = few[0].repeat_interleave(counts[0])[None]
    for rule in ("minmax", "percentile", "mse", "kl"):
        for scheme in (symmetric, affine):
            one = find_range(few, scheme, rule=rule, counts=counts, percentile=90)
            other = find_range(repeated, scheme, rule=rule, percentile=90)
            assert torch.allclose(torch.stack(one), torch.stack(other), rtol=1e-6)
    with pytest.raises(InputError, match="percentile"):
        find_range(values, symmetric, rule="percentile", percentile=40)
    with pytest.raises(InputError, match="candidates"):
        find_range(values, symmetric, rule="mse", candidates=0)


def naive_kl(histogram, kept, levels):
    reference = [float(count) for count in histogram[:kept]]
    reference[-1] += sum(histogram[kept:])
    merged = [0.0] * kept
    for level in range(levels):
        bins = [place for place in range(kept) if place * levels // kept == level]
        occupied = [place for place in bins if reference[place] > 0]
        for place in occupied:
            merged[place] = sum(histogram[one] for one in bins) / len(occupied)
    whole, total = sum(reference), sum(merged)
    return sum(
        p / whole * math.log(p / whole / max(m / total, 1e-12))
        for p, m in zip(reference, merged, strict=True) if p > 0
    )  # fmt: skip


def test_the_kl_divergence_is_the_loop_and_outliers_are_cut_off():
    histogram = torch.randint(0, 9, (2, 64), generator=torch.Generator().manual_seed(0)).double()
    for kept, levels in itertools.product((8, 20, 33, 64), (2, 4, 8)):
        found = kl_divergence_of_clipping(histogram, kept, levels)
        for row in range(2):
            expected = naive_kl(histogram[row].int().tolist(), kept, levels)
            assert found[row].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert kl_divergence_of_clipping(histogram, 4, 8).isinf().all()
    values = torch.cat([draw(1, 20_000), torch.tensor([[60.0]])], dim=1)
    for kind in ("symmetric", "affine"):
        low, high = find_range(values, Scheme(8, kind, "tensor"), rule="kl")
        assert 2.5 < high.item() < 30
        assert -6 < low.item() < -2.5


def naive_kl_threshold(values, levels):
    """The best of the candidates, the first of equals, of one list of values."""
    largest = max(abs(value) for value in values)
    histogram = [0] * ranges._KL_BINS
    for value in values:
        histogram[min(int(abs(value) / (largest / len(histogram))), len(histogram) - 1)] += 1
    step = len(histogram) // ranges._KL_CANDIDATES
    losses = {
        kept: naive_kl(histogram, kept, levels) for kept in range(step, len(histogram) + 1, step) if kept >= levels
    }
    return min(losses, key=losses.get) * largest / len(histogram)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("kind", "signs", "levels"),
    [
        ("symmetric", "both", lambda bits: 2 ** (bits - 1)),
        # An affine grid of both signs has half its codes for the magnitudes of each, of one sign all of them.
        ("affine", "both", lambda bits: 2 ** (bits - 1)),
        ("affine", "one", lambda bits: 2**bits),
    ],
)
def test_the_kl_threshold_is_the_best_for_the_levels_that_a_sign_has(kind, signs, levels, bits):
    values = draw(1, 5000, seed=4).double() ** 3
    values = values.abs() if signs == "one" else values
    expected = naive_kl_threshold(values[0].tolist(), levels(bits))
    low, high = find_range(values, Scheme(bits, kind, "tensor"), rule="kl")
    reached = max(high.item(), -low.item())
    assert reached == pytest.approx(expected, rel=1e-6)
    # With other numbers of levels the best one is another.
    assert naive_kl_threshold(values[0].tolist(), 2 * levels(bits)) != pytest.approx(expected, rel=1e-3)


def test_observers_do_not_depend_on_the_order_or_division_of_batches():
    values = torch.cat([draw(4000), 5 * draw(1000, seed=1), torch.zeros(500)])
    scheme = Scheme(8, "affine", "tensor")
    for rule in ("minmax", "percentile", "mse", "kl"):
        ranges = []
        for pieces in (values.split(5500), values.split(700), values.flip(0).split(91)):
            observer = Observer(rule)
            for piece in pieces:
                assert observer(piece) is piece
            ranges.append(torch.stack(observer.range(scheme)))
        assert torch.equal(ranges[0], ranges[1])
        assert torch.equal(ranges[0], ranges[2])
        exact = torch.stack(find_range(values[None], scheme, rule=rule, percentile=99.99))[:, 0]
        assert torch.allclose(ranges[0], exact, rtol=0.02), rule


def test_an_observer_of_zeros_first_still_resolves_small_values():
    observer = Observer("percentile", percentile=99.0)
    observer(torch.zeros(10))
    observer(1e-3 * draw(1000))
    _, high = observer.range(Scheme(8, "symmetric", "tensor"))
    assert 1e-3 < high.item() < 4e-3


def test_the_moving_average_is_the_loop():
    observer = Observer("ema", momentum=0.25)
    low = high = None
    for seed in range(5):
        batch = draw(50, seed=seed)
        smallest, largest = batch.min().item(), batch.max().item()
        low = smallest if low is None else 0.75 * low + 0.25 * smallest
        high = largest if high is None else 0.75 * high + 0.25 * largest
        observer(batch)
    found = observer.range(Scheme(8, "affine", "tensor"))
    assert [edge.item() for edge in found] == pytest.approx([low, high], rel=1e-6)


def test_observers_refuse_in_one_line():
    with pytest.raises(InputError, match="seen nothing"):
        Observer().range(Scheme(8, "affine", "tensor"))
    with pytest.raises(InputError, match="observer must be"):
        Observer("mean")
    with pytest.raises(InputError, match="momentum"):
        Observer("ema", momentum=0)
    for rule, odd in itertools.product(("minmax", "ema", "percentile", "mse", "kl"), (math.nan, math.inf)):
        with pytest.raises(InputError, match=f"observer '{rule}' saw NaN or infinity"):
            Observer(rule)(torch.tensor([1.0, odd]))


def test_a_batch_of_training_that_is_not_finite_does_not_spoil_the_moving_average():
    quantizer = ActivationQuantizer(scheme=Scheme(8, "affine", "tensor"), observer="ema", momentum=0.5).train()
    quantizer(torch.tensor([math.nan, 1.0]))
    quantizer(torch.tensor([0.0, 2.0]))
    quantizer(torch.tensor([0.0, math.inf]))
    quantizer(torch.tensor([0.0, 4.0]))
    assert quantizer.observer.high == 3
    assert quantizer.eval()(torch.tensor([2.5])).item() == pytest.approx(2.5, abs=0.01)


@pytest.mark.parametrize("rule", ["minmax", "ema", "percentile", "mse", "kl"])
@pytest.mark.parametrize("values", [torch.zeros(50), torch.full((50,), 1e-44)], ids=["zeros", "the smallest numbers"])
def test_an_observer_of_nothing_but_zeros_has_scale_one(rule, values):
    scheme, observer = Scheme(8, "affine", "tensor"), Observer(rule)
    observer(values)
    edges = torch.stack(observer.range(scheme))
    assert bool(edges.isfinite().all())
    if not values.any():
        assert grid(*edges, scheme)[0] == 1


@pytest.mark.slow
def test_zeros_do_not_narrow_the_range_that_kl_finds():
    torch.manual_seed(0)
    clipped = (torch.randn(40_000) - 1).relu()
    scheme = Scheme(8, "affine", "tensor")
    for given in (clipped, clipped[clipped > 0]):
        observer = Observer("kl")
        observer(given)
        # Of the largest 3.563; with the zeros in the first bin, 0.445.
        assert observer.range(scheme)[1].item() == pytest.approx(2.728, abs=0.001)
        assert find_range(given[None], scheme, rule="kl")[1].item() == pytest.approx(2.728, rel=0.02)


def test_kl_takes_all_of_fewer_values_than_a_histogram_can_tell_apart():
    scheme = Scheme(4, "symmetric", "tensor")
    many = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0))
    few = many[:, :4095]
    for values in (few, torch.cat([few, torch.zeros(1, 9000)], dim=1)):
        assert find_range(values, scheme, rule="kl")[1].item() == few.abs().max().item()
    assert find_range(many, scheme, rule="kl")[1].item() < 0.9 * many.abs().max().item()


# Estimators


def definition_of_lsq(values, scale, low, high):
    clipped = (values / scale).clamp(low, high)
    return (clipped + (clipped.round() - clipped).detach()) * scale


@pytest.mark.parametrize("per", ["tensor", "channel", "group:4"])
def test_lsq_has_the_gradient_of_its_definition(per):
    scheme = Scheme(3, "symmetric", per)
    weight = draw(4, 10, dtype=torch.float64).requires_grad_()
    scale = (lsq_start(weight, scheme) * 0.7).requires_grad_()
    upstream = draw(4, 10, seed=1, dtype=torch.float64)
    factor = 1 / math.sqrt(weight.numel() / scale.numel() * 3)
    found = torch.autograd.grad((lsq(weight, scale, scheme) * upstream).sum(), (weight, scale))
    spread = {"tensor": lambda s: s.expand(4, 10), "channel": lambda s: s.expand(4, 10)}.get(
        per, lambda s: s.repeat_interleave(4, dim=1)[:, :10]
    )
    value = definition_of_lsq(weight, spread(scale), -3, 3)
    expected = torch.autograd.grad((value * upstream).sum(), (weight, scale))
    assert torch.allclose(lsq(weight, scale, scheme), value, rtol=1e-12)
    assert torch.allclose(found[0], expected[0], rtol=1e-12)
    assert torch.allclose(found[1], factor * expected[1], rtol=1e-12)


def test_lsq_clips_before_it_rounds_as_the_paper_has_it():
    scheme = Scheme(3, "symmetric", "tensor")
    for value, slope, passes in ((3.3, 3, 0), (3.0, 3, 0), (2.8, 0.2, 1), (-3.4, -3, 0), (0.4, -0.4, 1), (9.0, 3, 0)):
        scale, given = torch.ones(1, 1, requires_grad=True), torch.tensor([value], requires_grad=True)
        lsq(given, scale, scheme, factor=1.0).sum().backward()
        assert scale.grad.item() == pytest.approx(slope, abs=1e-6)
        assert given.grad.item() == passes


def test_lsq_starts_as_the_paper_has_it():
    weight = draw(5, 6)
    start = lsq_start(weight, Scheme(4, "symmetric", "channel"))
    assert torch.allclose(start[:, 0], 2 * weight.abs().mean(dim=1) / math.sqrt(7))
    assert bool((lsq_start(torch.zeros(5, 6), Scheme(4)) == 1).all())


def test_pact_is_its_formula_with_its_gradient():
    values = torch.tensor([-1.0, 0.4, 1.0, 1.9, 2.0, 5.0], requires_grad=True)
    alpha = torch.tensor(2.0, requires_grad=True)
    result = pact(values, alpha, bits=2)
    assert result.tolist() == pytest.approx([0, 2 / 3, 4 / 3, 2, 2, 2], abs=1e-6)
    result.backward(torch.arange(1.0, 7.0))
    assert values.grad.tolist() == [0, 2, 3, 4, 0, 0]
    assert alpha.grad.item() == 11


def test_dorefa_is_its_formula():
    values = torch.tensor([-1.0, 0.1, 0.4, 0.9, 3.0], requires_grad=True)
    result = dorefa_activation(values, bits=2)
    assert result.tolist() == pytest.approx([0, 0, 1 / 3, 1, 1], abs=1e-6)
    result.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 0]
    weight = draw(4, 5, dtype=torch.float64).requires_grad_()
    largest = max(abs(math.tanh(w)) for w in weight.flatten().tolist())
    expected = [
        2 * round((math.tanh(w) / (2 * largest) + 0.5) * 7) / 7 - 1 for w in weight.flatten().tolist()
    ]  # fmt: skip
    levels = dorefa_weight(weight, bits=3)
    assert levels.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    smooth = weight.tanh() / weight.tanh().abs().max()
    upstream = draw(4, 5, seed=1, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((value * upstream).sum(), weight)[0] for value in (levels, smooth))
    assert torch.allclose(found, wanted, rtol=1e-10)


@pytest.mark.slow
def test_binary_weights_are_two_values_a_filter_and_the_best_of_them():
    weight = draw(5, 3, 2, 2, dtype=torch.float64)
    weight[0, 0, 0, 0] = 0
    levels = binary(weight, Scheme(1, "binary"))
    for filters, rounded in zip(weight, levels, strict=True):
        alpha = sum(abs(w) for w in filters.flatten().tolist()) / filters.numel()
        assert sorted(set(rounded.flatten().tolist())) == pytest.approx([-alpha, alpha])
        signs = torch.where(filters >= 0, 1.0, -1.0)
        errors = {step: (step / 1000 * signs - filters).square().sum().item() for step in range(3000)}
        assert min(errors, key=errors.get) / 1000 == pytest.approx(alpha, abs=1e-3)
        assert (rounded - filters).square().sum().item() <= min(errors.values()) + 1e-12


def test_binary_weights_have_the_gradient_of_their_scale_and_of_the_sign():
    weight = torch.tensor([[0.5, -2.0, 0.1]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.float64)
    (binary(weight, Scheme(1, "binary")) * upstream).sum().backward()
    alpha, towards = 2.6 / 3, (1 - 10 + 100) / 3
    assert weight.grad[0].tolist() == pytest.approx([alpha + towards, -towards, 100 * alpha + towards])


def test_binary_connect_takes_signs_and_passes_gradients_straight_through():
    weight = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])
    assert binary_connect(weight).tolist() == [-1, -1, -1, 1, 1, 1, 1]
    binary_connect(weight.requires_grad_()).sum().backward()
    assert weight.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_ternary_weights_are_the_best_for_their_threshold():
    weight = draw(4, 20, dtype=torch.float64).requires_grad_()
    levels = ternary(weight, Scheme(2, "ternary"))
    for values, rounded in zip(weight.tolist(), levels.tolist(), strict=True):
        limit = 0.7 * sum(abs(v) for v in values) / len(values)
        beyond = [abs(v) for v in values if abs(v) > limit]
        alpha = sum(beyond) / len(beyond)
        assert rounded == pytest.approx([math.copysign(alpha, v) if abs(v) > limit else 0 for v in values])
        best = min(range(4000), key=lambda step: sum((step / 1000 - v) ** 2 for v in beyond)) / 1000
        assert best == pytest.approx(alpha, abs=1e-3)
    upstream = draw(4, 20, seed=1, dtype=torch.float64)
    (levels * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)
    assert not ternary(torch.zeros(2, 3), Scheme(2, "ternary")).any()


def test_trained_ternary_weights_have_the_gradients_of_the_paper():
    weight = torch.tensor([2.0, 0.05, -0.3, 0.4, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    up, down = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 1.3))
    result = ttq(weight, up, down, threshold=0.05)
    assert result.tolist() == pytest.approx([0.7, 0, -1.3, 0.7, -1.3, 0])
    result.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64))
    assert up.grad.item() == 5
    assert down.grad.item() == -8
    assert weight.grad.tolist() == pytest.approx([0.7, 2, 3.9, 2.8, 6.5, 6])
    starts = ttq_start(weight)
    assert [start.item() for start in starts] == pytest.approx([1.2, 0.65])


@pytest.mark.parametrize("scheme", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_codes_of_every_kind_give_back_its_values_in_every_type(scheme, dtype):
    weight = draw(6, 4, 5, dtype=dtype)
    weight[0, 0, 0] = 0
    up, down = (torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32)) for value in (0.3, 0.7))
    values = {
        "dorefa": lambda: dorefa_weight(weight, bits=scheme.bits),
        "binary": lambda: binary(weight, scheme),
        "binaryconnect": lambda: binary_connect(weight),
        "ternary": lambda: ternary(weight, scheme),
        "ttq": lambda: ttq(weight, up, down),
    }[scheme.kind]()
    found = ttq_codes(weight, up, down) if scheme.kind == "ttq" else codes(weight, scheme)
    assert values.dtype == dtype
    assert torch.equal(dequantize(found, scheme, dtype=dtype), values)
    assert scheme.lowest <= found.values.min()
    assert found.values.max() <= scheme.highest


# Parametrizations


def layers():
    torch.manual_seed(1)
    return {
        "linear": (nn.Linear(7, 5), ["weight"], torch.randn(3, 7)),
        "conv": (nn.Conv2d(4, 6, 3, groups=2), ["weight"], torch.randn(2, 4, 5, 5)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3), ["weight"], torch.randn(2, 4, 5, 5)),
        "embedding": (nn.Embedding(9, 4), ["weight"], torch.tensor([[1, 2, 8]])),
        "lstm": (
            nn.LSTM(4, 3, num_layers=2, bidirectional=True),
            sorted(
                f"weight_{kind}_l{layer}{side}"
                for kind, layer, side in itertools.product(("ih", "hh"), (0, 1), ("", "_reverse"))
            ),
            torch.randn(5, 2, 4),
        ),
        "gru": (nn.GRU(4, 3), ["weight_hh_l0", "weight_ih_l0"], torch.randn(5, 2, 4)),
        "rnn": (nn.RNN(4, 3), ["weight_hh_l0", "weight_ih_l0"], torch.randn(5, 2, 4)),
        "attention": (nn.MultiheadAttention(8, 2), ["in_proj_weight"], torch.randn(5, 2, 8)),
        "attention_of_others": (
            nn.MultiheadAttention(8, 2, kdim=8, vdim=6),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
            (torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 6)),
        ),
    }


def run(layer, given):
    if isinstance(layer, nn.MultiheadAttention):
        return layer(*(given if isinstance(given, tuple) else (given, given, given)))[0]
    result = layer(given)
    return result[0] if isinstance(result, tuple) else result


def options_of(scheme, **options):
    return {"scheme": scheme, **options}


QUANTIZERS = [
    *(options_of(scheme) for scheme in (Scheme(4), Scheme(3, "affine", "group:3"), Scheme(5, "pow2", "tensor"))),
    options_of(Scheme(3), rule="mse"), options_of(Scheme(4, "affine"), rule="percentile"),
    options_of(Scheme(4, "symmetric", "tensor"), rule="kl"),
    options_of(Scheme(3), estimator="lsq"), options_of(Scheme(3, "symmetric", "group:2"), estimator="lsq"),
    *(options_of(scheme) for scheme in OTHERS),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", QUANTIZERS, ids=str)
@pytest.mark.parametrize("kind", list(layers()))
def test_quantized_layers_use_describe_rebuild_and_bake_their_codes(kind, options):
    layer, names, given = layers()[kind]
    fresh, dense = copy.deepcopy(layer), run(layer, given)
    assert weight_names(layer) == names
    assert quantize_weights(layer, **options) == names
    assert weight_names(layer) == names
    layer.eval()
    output = run(layer, given)
    assert not torch.equal(output, dense)

    assert list(computed(layer)) == names
    for name, entry in computed(layer).items():
        found = entry.codes(original_of(layer, name))
        assert same_bits(dequantize(found, entry.scheme, dtype=torch.float32), getattr(layer, name))
    used = copy.deepcopy(fresh)
    with torch.no_grad():
        for name in names:
            getattr(used, name).copy_(getattr(layer, name))
    assert torch.equal(run(used, given), output), "the layer computes with the quantized values"

    description = json.loads(json.dumps(describe_weights(layer)))
    rebuilt = rebuild_weights(copy.deepcopy(fresh), description).eval()
    rebuilt.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(run(rebuilt, given), output)
    assert describe_weights(rebuilt) == describe_weights(layer)

    layer.train()
    run(layer, given).square().sum().backward()
    for name in names:
        gradient = layer.parametrizations[name].original.grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0

    assert bake_layer(rebuilt) == names
    assert rebuilt.state_dict().keys() == fresh.state_dict().keys()
    assert torch.equal(run(rebuilt, given), output)
    assert describe_weights(rebuilt) == {}


def test_learned_scales_are_trained_and_grids_follow_the_weight():
    layer = nn.Linear(6, 4)
    quantize_weights(layer, scheme=Scheme(3), estimator="lsq")
    names = {name for name, _ in layer.named_parameters()}
    assert "parametrizations.weight.0.scale" in names
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.parametrizations.weight[0].scale.detach().clone()
    layer(draw(8, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.parametrizations.weight[0].scale)

    following, fixed = nn.Linear(6, 4), nn.Linear(6, 4)
    quantize_weights(following, scheme=Scheme(8))
    quantize_weights(fixed, scheme=Scheme(8), rule="mse")
    for layer, factor in ((following, 2.0), (fixed, 1.0)):
        reach = layer.weight.abs().max().item()
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(2)
        assert layer.weight.abs().max().item() == pytest.approx(factor * reach, rel=0.01)


def test_quantizing_works_in_float64_and_on_transposed_channels():
    layer = nn.ConvTranspose2d(4, 6, 3).double()
    quantize_weights(layer, scheme=Scheme(4, axis=channel_axis(layer)), rule="mse")
    assert layer.weight.dtype == torch.float64
    assert layer.parametrizations.weight[0].scale.shape == (6, 1)
    assert channel_axis(nn.Conv2d(1, 1, 1)) == 0
    assert weight_names(nn.LSTM(4, 3, proj_size=2)) == ["weight_hh_l0", "weight_hr_l0", "weight_ih_l0"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_output_of_a_grouped_transposed_convolution_has_its_own_scale(groups):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 4, 2, 2, groups=groups, bias=False).double()
    with torch.no_grad():
        for out in range(4):
            group, channel = divmod(out, 4 // groups)
            layer.weight[group * 4 // groups : (group + 1) * 4 // groups, channel] *= 10.0**-out
    images = draw(2, 4, 3, 3, dtype=torch.float64)
    before = layer(images)
    scheme = Scheme(8, axis=channel_axis(layer), groups=channel_groups(layer))
    quantize_weights(layer, scheme=scheme)
    errors = (layer(images) - before).abs().amax((0, 2, 3)) / before.abs().amax((0, 2, 3))
    assert bool((errors < 0.01).all())


def test_a_layer_that_cannot_be_quantized_is_one_line():
    layer = nn.Linear(3, 3)
    quantize_weights(layer, scheme=Scheme())
    with pytest.raises(InputError, match="already"):
        quantize_weights(layer, scheme=Scheme())
    with pytest.raises(InputError, match="has the weights"):
        quantize_weights(nn.ReLU(), scheme=Scheme())
    with pytest.raises(InputError, match="cannot quantize"):
        quantize_weights(nn.Linear(3, 3), scheme=Scheme(), names=["bias"])
    with pytest.raises(InputError, match="symmetric"):
        quantize_weights(nn.Linear(3, 3), scheme=Scheme(4, "affine"), estimator="lsq")
    with pytest.raises(InputError, match="one of ste, lsq"):
        quantize_weights(nn.Linear(3, 3), scheme=Scheme(4), estimator="pact")
    with pytest.raises(InputError, match="right layer"):
        rebuild_weights(nn.ReLU(), describe_weights(layer))


# Activations


ACTIVATIONS = [
    {"scheme": Scheme(bits, kind, "tensor"), "estimator": estimator, "observer": observer}
    for bits, kind, estimator, observer in (
        (8, "affine", "ste", "minmax"), (8, "symmetric", "ste", "ema"), (4, "affine", "ste", "percentile"),
        (4, "pow2", "ste", "mse"), (8, "affine", "ste", "kl"), (4, "affine", "lsq", "minmax"),
        (4, "symmetric", "lsq", "mse"), (3, "affine", "pact", "minmax"), (3, "affine", "dorefa", "minmax"),
    )
]  # fmt: skip


@pytest.mark.parametrize("options", ACTIVATIONS, ids=str)
def test_quantized_inputs_are_calibrated_described_rebuilt_and_trained(options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    fresh = copy.deepcopy(network)
    quantize_input(network[2], ActivationQuantizer(**options))
    batches = [draw(16, 6, seed=seed) for seed in range(4)]
    if options["estimator"] != "dorefa":
        with pytest.raises(InputError, match="observing_inputs"):
            network.eval()(batches[0])
    with observing_inputs(network):
        for batch in batches:
            assert torch.equal(network(batch), fresh(batch)), "calibration changes nothing"
    network.eval()
    hidden = fresh[:2](batches[0])
    quantizer = network[2].input_quantizer
    levels = quantizer(hidden)
    assert len(levels.unique()) <= 2 ** options["scheme"].bits
    assert torch.equal(network(batches[0]), fresh[2](levels))

    description = json.loads(json.dumps(describe_input(network[2])))
    again = copy.deepcopy(fresh)
    rebuild_input(again[2], description)
    again.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(again.eval()(batches[0]), network(batches[0]))
    assert torch.equal(copy.deepcopy(network)(batches[0]), network(batches[0]))
    assert describe_input(fresh[2]) is None

    network.train()
    # Beyond what was seen in calibration, so that something is cut off.
    network(3 * batches[0]).square().sum().backward()
    assert network[0].weight.grad.abs().sum() > 0
    learned = {"lsq": "scale", "pact": "alpha"}.get(options["estimator"])
    if learned:
        assert getattr(quantizer, learned).grad.abs().sum() > 0


def test_learned_scales_of_affine_grids_keep_negative_activations():
    scheme, values = Scheme(4, "affine", "tensor"), draw(500) - 0.5
    quantizer = ActivationQuantizer(scheme=scheme, estimator="lsq")
    with observing_inputs(quantizer):
        quantizer(values)
    levels = quantizer(values)
    assert bool(((levels - values).abs() <= quantizer.scale / 2 * (1 + 1e-5)).all())
    assert torch.equal(fake_quantize(values, quantizer.scale.detach(), quantizer.zero_point, scheme), levels)


def test_the_moving_average_follows_in_train_mode_only():
    quantizer = ActivationQuantizer(scheme=Scheme(8, "affine", "tensor"), observer="ema", momentum=0.5)
    with observing_inputs(quantizer):
        quantizer(draw(50).clamp(-1, 1))
    before = quantizer.scale.clone()
    quantizer.eval()(10 * draw(50))
    assert torch.equal(quantizer.scale, before)
    quantizer.train()(10 * draw(50))
    assert quantizer.scale.item() > 2 * before.item()


def test_eight_bits_come_close_on_recurrent_and_attention_layers():
    for kind in ("lstm", "gru", "attention"):
        layer, _, given = layers()[kind]
        layer.eval()
        dense = run(layer, given).detach()
        quantize_weights(layer, scheme=Scheme(8))
        quantize_input(layer, ActivationQuantizer(scheme=Scheme(8, "affine", "tensor")))
        with observing_inputs(layer):
            run(layer, given)
        relative = ((run(layer, given) - dense).norm() / dense.norm()).item()
        assert 0 < relative < 0.06, kind
    packed = pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([5, 3]))
    lstm = nn.LSTM(4, 3)
    quantize_input(lstm, ActivationQuantizer(scheme=Scheme(2, "affine", "tensor")))
    with observing_inputs(lstm):
        lstm(packed)
    rounded = packed._replace(data=lstm.input_quantizer(packed.data))
    assert torch.equal(lstm(packed)[0].data, nn.LSTM.forward(lstm, rounded)[0].data)


def test_activation_quantizers_refuse_in_one_line():
    affine = Scheme(8, "affine", "tensor")
    for options, words in (
        ({"scheme": Scheme(8, "affine", "channel")}, "per='tensor'"),
        ({"scheme": Scheme(8, "symmetric", "tensor"), "estimator": "pact"}, "kind='affine'"),
        ({"scheme": Scheme(8, "pow2", "tensor"), "estimator": "lsq"}, "any scale"),
        ({"scheme": affine, "estimator": "twn"}, "estimator must be"),
    ):
        with pytest.raises(InputError, match=words):
            ActivationQuantizer(**options)
    layer = nn.Linear(3, 3)
    quantize_input(layer, ActivationQuantizer(scheme=affine, estimator="pact"))
    with pytest.raises(InputError, match="already"):
        quantize_input(layer, ActivationQuantizer(scheme=affine))
    with pytest.raises(InputError, match="no positive"), observing_inputs(layer):
        layer(-torch.ones(2, 3))
    with (
        pytest.raises(InputError, match="seen nothing"),
        observing_inputs(nn.Sequential(ActivationQuantizer(scheme=affine))),
    ):
        pass


# Without training


def chain():
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, groups=2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(32, 7), nn.ReLU(),
        nn.Dropout(0.1), nn.Linear(7, 4), nn.Sigmoid(), nn.Linear(4, 4),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for layer in (network[0], network[5], network[8]):
            spread = torch.logspace(-2, 1, len(layer.weight), dtype=torch.float64)
            layer.weight.mul_(spread.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    return network


def test_equalisation_keeps_outputs_and_equalises_ranges():
    network = chain()
    images = draw(4, 3, 8, 8, dtype=torch.float64)
    before = network(images)
    assert equalisable_pairs(network) == [("0", "2"), ("2", "5"), ("5", "8"), ("8", "11")]
    equalise(network, sweeps=200)
    assert ((network(images) - before).norm() / before.norm()).item() < 1e-6

    reach = network[8].weight.abs().amax(dim=1)
    assert torch.allclose(reach, network[11].weight.abs().amax(dim=0), rtol=1e-6)
    flattened = network[8].weight.reshape(7, 8, -1).abs().amax(dim=(0, 2))
    assert torch.allclose(network[5].weight.flatten(1).abs().amax(dim=1), flattened, rtol=1e-6)
    depthwise = network[2].weight.abs().flatten(1).amax(dim=1)
    assert torch.allclose(network[0].weight.flatten(1).abs().amax(dim=1), depthwise, rtol=1e-6)
    # A grouped convolution: input channel c meets the outputs of its group only.
    grouped = [network[5].weight[4 * (c // 3) : 4 * (c // 3) + 4, c % 3].abs().max().item() for c in range(6)]
    assert torch.allclose(depthwise, torch.tensor(grouped, dtype=torch.float64), rtol=1e-6)


def test_equalisation_undoes_unequal_channels_before_per_tensor_quantization():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10))
    values = draw(50, 20)
    dense = network(values)
    spread = torch.logspace(-2, 2, 16)
    with torch.no_grad():
        network[0].weight.mul_(spread[:, None])
        network[0].bias.mul_(spread)
        network[2].weight.div_(spread)

    def loss(one):
        one = copy.deepcopy(one)
        for layer in (one[0], one[2]):
            quantize_weights(layer, scheme=Scheme(6, "symmetric", "tensor"))
        return ((one(values) - dense).norm() / dense.norm()).item()

    unequal = loss(network)
    equalise(network)
    assert loss(network) < 0.06 < 0.5 < unequal


def test_equalisation_stops_leaves_dead_channels_alone_and_refuses_in_one_line():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].weight[1] = 0
    kept = network[2].weight[:, 1].clone()
    assert equalise(network) <= 3
    assert torch.equal(network[2].weight[:, 1], kept)
    assert all(value.isfinite().all() for value in network.state_dict().values())
    for pairs, words in (([("0", "1")], "in float"), ([("0", "9")], "in float"), ([("2", "2")], None)):
        if words:
            with pytest.raises(InputError, match=words):
                equalise(network, pairs=pairs)
    odd = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(InputError, match="which has other inputs"):
        equalise(odd, pairs=[("0", "1")])
    assert equalisable_pairs(nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Linear(4, 2))) == []
    assert equalisable_pairs(nn.Sequential(nn.Linear(2, 4), nn.Flatten(), nn.Linear(8, 2))) == []


class ReadByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = self.first(inputs).relu()
        return self.second(hidden) + self.first.weight.sum()


def hooked(place, *, before=False):
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    if before:
        network[place].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    else:
        network[place].register_forward_hook(lambda _module, _args, output: output + 1)
    return network


UNEQUALISABLE = {
    "flattened positions": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(8, 5)), (2, 3, 8)
    ),
    "hook of the first": (lambda: hooked(0), (2, 4)),
    "hook between": (lambda: hooked(1), (2, 4)),
    "hook of the second": (lambda: hooked(2, before=True), (2, 4)),
    "read by name": (ReadByName, (2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEQUALISABLE)
def test_what_is_not_two_layers_with_relu_between_is_not_equalised(name):
    build, shape = UNEQUALISABLE[name]
    torch.manual_seed(0)
    network = build()
    inputs = draw(*shape)
    before = network(inputs).detach()
    assert equalisable_pairs(network) == []
    equalise(network)
    assert torch.equal(network(inputs).detach(), before)


def test_a_trial_finds_the_pairs_that_would_change_the_outputs():
    torch.manual_seed(0)
    # Without a dimension of samples, what is flattened are not the channels.
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    pairs, before = equalisable_pairs(network), copy.deepcopy(network.state_dict())
    assert pairs == [("0", "3"), ("3", "5")]
    assert pairs_that_keep_outputs(network, pairs, draw(3, 4, 4)) == [("3", "5")]
    batches = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
    assert pairs_that_keep_outputs(batches, [("0", "3")], draw(2, 3, 4, 4)) == [("0", "3")]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_bias_correction_takes_the_mean_error_away():
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    ).double()  # fmt: skip
    network = copy.deepcopy(reference)
    for layer in [network[0], network[2], network[5]]:
        quantize_weights(layer, scheme=Scheme(3, "symmetric", "tensor"))
    batches = [draw(5, 3, 6, 6, seed=seed, dtype=torch.float64) + 0.5 for seed in range(3)]

    def mean_error(layers):
        total = sum(
            (network[:layers](batch) - reference[:layers](batch)).transpose(0, 1).flatten(1).sum(1) for batch in batches
        )
        return (total / 15).abs().max().item()

    assert min(mean_error(layers) for layers in (1, 3, 6)) > 1e-3
    network.train()
    assert correct_biases(network, reference, batches) == ["0", "2", "5"]
    assert network.training
    assert max(mean_error(layers) for layers in (1, 3, 6)) < 1e-6
    with pytest.raises(InputError, match="at least one batch"):
        correct_biases(network, reference, [])
    with pytest.raises(InputError, match="same linear"):
        correct_biases(nn.Sequential(nn.ReLU()), reference, batches)


# Usefulness


@pytest.mark.slow
def test_calibration_data_that_is_not_finite_is_refused():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    odd = torch.ones(2, 3)
    odd[0, 0] = math.nan
    with pytest.raises(InputError, match="bias correction: the outputs of '0' on the calibration data hold NaN"):
        correct_biases(copy.deepcopy(network), network, [torch.ones(2, 3), odd])
    with pytest.raises(InputError, match="inputs of the layer of 'first' hold NaN"):
        input_moments(network, {"first": network[0]}, [(torch.ones(2, 3), None), (odd, None)])


def test_on_digits_eight_bits_cost_nothing_and_training_repairs_two_bits():
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = (images[:1257], labels[:1257]), (images[1257:], labels[1257:])

    def fit(network, steps):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(train[0]), train[1]).backward()
            optimizer.step()

    def right(network):
        return int((network(test[0]).argmax(dim=1) == test[1]).sum())

    def quantized(scheme, **options):
        network = copy.deepcopy(dense)
        for layer in (network[0], network[2]):
            quantize_weights(layer, scheme=scheme, **options)
        return network

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    fit(dense, 100)
    eight = quantized(Scheme(8))
    assert right(eight) >= right(dense) - 1
    assert ((eight(test[0]) - dense(test[0])).norm() / dense(test[0]).norm()).item() < 0.06
    for options in (
        {"scheme": Scheme(2)}, {"scheme": Scheme(2), "estimator": "lsq"},
        {"scheme": Scheme(1, "binary")}, {"scheme": Scheme(2, "ttq", "tensor")},
    ):  # fmt: skip
        network = quantized(**options)
        before = right(network)
        fit(network, 100)
        assert right(network) >= before + 54, options
    assert right(quantized(Scheme(2))) < right(dense) - 54


# Mixed precision


def errors_and_counts(seed=0):
    weights = {f"layer{n}": draw(4, 10 + 7 * n, seed=seed + n) * (1 + n) for n in range(5)}
    errors = {name: weight_errors(weight, rule="minmax") for name, weight in weights.items()}
    return errors, {name: weight.numel() for name, weight in weights.items()}


def test_mixed_precision_keeps_the_budget_and_more_of_it_never_takes_bits_away():
    errors, counts = errors_and_counts()
    overhead = dict.fromkeys(counts, 16)
    least = sum(-(-count * 2 // 8) + 16 for count in counts.values())
    before = None
    for budget in range(least, sum(counts.values()) + 16 * 5 + 40, 3):
        chosen = allocate_bits(errors, counts, budget=budget, overhead=overhead)
        assert sum(-(-counts[name] * bits // 8) + 16 for name, bits in chosen.items()) <= budget
        assert before is None or all(bits >= before[name] for name, bits in chosen.items())
        before = chosen
    assert set(before.values()) == {8}
    with pytest.raises(InputError, match=f"need {least}"):
        allocate_bits(errors, counts, budget=least - 1, overhead=overhead)


def test_mixed_precision_is_the_best_where_bits_cost_the_same_and_help_less_and_less():
    errors = {
        name: {bits: size * 4.0**-bits for bits in range(2, 7)}
        for name, size in zip("abcd", (1, 7, 30, 400), strict=True)
    }
    counts = dict.fromkeys(errors, 64)
    for budget in range(64, 193, 8):
        chosen = allocate_bits(errors, counts, budget=budget)
        best = min(
            sum(errors[name][width] for name, width in zip(errors, widths, strict=True))
            for widths in itertools.product(range(2, 7), repeat=4)
            if sum(8 * width for width in widths) <= budget
        )
        assert sum(errors[name][width] for name, width in chosen.items()) == pytest.approx(best)
    assert len(set(allocate_bits(errors, counts, budget=128).values())) > 1


def test_bits_that_do_not_help_are_not_bought():
    errors = {"flat": {2: 1.0, 4: 1.0, 8: 1.5}, "steep": {2: 5.0, 3: 5.5, 8: 0.1}}
    assert allocate_bits(errors, {"flat": 10, "steep": 10}, budget=1000) == {"flat": 2, "steep": 8}
    with pytest.raises(InputError, match="same weights"):
        allocate_bits(errors, {"flat": 10}, budget=1000)
    with pytest.raises(InputError, match="'none'"):
        allocate_bits({"none": {}}, {"none": 3}, budget=10)


def test_parametrized_layers_stay_of_this_package():
    layer = nn.Linear(3, 3)
    assert describe_weights(layer) == {}
    quantize_weights(layer, scheme=Scheme(4))
    assert parametrize.is_parametrized(layer, "weight")
    assert "4 bit symmetric" in repr(layer)


def test_weights_that_several_layers_share_are_not_equalised():
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU())
    network[2].weight = network[0].weight
    inputs = torch.randn(5, 6)
    before = network(inputs)
    equalise(network)
    torch.testing.assert_close(network(inputs), before)
    with pytest.raises(InputError, match="one shares its weight with another layer"):
        equalise(network, pairs=[("0", "2")])
