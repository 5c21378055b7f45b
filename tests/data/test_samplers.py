"""Samplers against loops over rows, their distributions, their invariances and their refusals."""

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn

from distill_lightning import (
    CutMixSampler,
    EmpiricalSampler,
    FunctionSampler,
    GeneratorSampler,
    InputError,
    MixupSampler,
)
from distill_lightning.data.batch import map_tensors
from distill_lightning.data.mixing import mixup
from distill_lightning.data.samplers import count_rows, join, take
from distill_lightning.data.views import Draws, uniform_draws

PAIRS = [MixupSampler, CutMixSampler]


class ImageAndPose(NamedTuple):
    image: torch.Tensor
    pose: torch.Tensor


def images_of(count, channels=1, height=4, width=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)


def poses_of(count, seed=1):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def keys_of(rows, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(1000, (rows,), generator=generator), torch.randint(9, (rows,), generator=generator)


def draws_of(rows, seed=0):
    return Draws(7, *keys_of(rows, seed))


# Quantiles of Beta(alpha, alpha) that can be written down.
QUANTILES = {0.5: lambda level: math.sin(math.pi * level / 2) ** 2, 1.0: lambda level: level}


def naive_pairs(count, rows, alpha, seed=0):
    """Rows that are mixed and the first's share in each, from the draws in plain Python."""
    table = uniform_draws(7, *keys_of(rows, seed), 5).tolist()
    second = []
    for start in range(0, rows, count):
        part = range(start, min(start + count, rows))
        second += [place - start for place in sorted(part, key=lambda row: table[row][0])]
    short = rows % count
    if short:
        # A round that is not whole is spread over the batch, beginning where its first row's draw says.
        begin = int(table[-short][1] * count)
        second[-short:] = [(place * count // short + begin) % count for place in second[-short:]]
        for row in table:
            row.pop(1)
    shares = [QUANTILES[alpha](row[1]) for row in table]
    return [row % count for row in range(rows)], second, shares, [row[2:4] for row in table]


# mixup and cutmix


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("count", "rows"), [(6, 6), (6, 15), (6, 4), (1, 3), (5, 10)])
def test_mixup_is_the_loop(alpha, count, rows):
    images = images_of(count)
    mixed = MixupSampler(alpha).mix(images, draws_of(rows))
    first, second, shares, _ = naive_pairs(count, rows, alpha)
    assert mixed.first.tolist() == first
    assert mixed.second.tolist() == second
    assert mixed.share.tolist() == pytest.approx(shares, abs=2e-6)
    for row, share in enumerate(shares):
        expected = share * images[first[row]].double() + (1 - share) * images[second[row]].double()
        assert torch.allclose(mixed.inputs[row].double(), expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("count", "rows"), [(6, 6), (6, 15), (6, 4)])
def test_cutmix_is_the_loop(alpha, count, rows):
    images = images_of(count, channels=2)
    mixed = CutMixSampler(alpha).mix(images, draws_of(rows))
    first, second, shares, centres = naive_pairs(count, rows, alpha)
    assert mixed.first.tolist() == first
    assert mixed.second.tolist() == second
    for row, (share, centre) in enumerate(zip(shares, centres, strict=True)):
        side, taken = math.sqrt(1 - share), 0
        starts = [round((place - side / 2) * length) for place, length in zip(centre, (4, 6), strict=True)]
        sizes = [round(side * length) for length in (4, 6)]
        for y in range(4):
            for x in range(6):
                cut = starts[0] <= y < starts[0] + sizes[0] and starts[1] <= x < starts[1] + sizes[1]
                taken += cut
                source = images[second[row]] if cut else images[first[row]]
                assert torch.equal(mixed.inputs[row, :, y, x], source[:, y, x])
        assert mixed.share[row].item() == pytest.approx(1 - taken / 24, abs=1e-6)


@pytest.mark.parametrize("sampler", PAIRS)
@pytest.mark.parametrize(("count", "rows"), [(8, 8), (8, 24), (8, 20), (8, 3)])
def test_every_row_is_mixed_in_as_often_as_it_is_begun_with(sampler, count, rows):
    mixed = sampler().mix(images_of(count), draws_of(rows))
    whole = rows - rows % count
    assert Counter(mixed.first[:whole].tolist()) == Counter(mixed.second[:whole].tolist())
    assert all(len(part.unique()) == len(part) for part in torch.split(mixed.second, count))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", PAIRS)
def test_a_round_that_is_not_whole_takes_its_partners_from_the_whole_pool(sampler):
    counts = Counter()
    for seed in range(600):
        partners = sampler().mix(images_of(3), draws_of(3, seed), pool=images_of(8, seed=1)).second.tolist()
        assert len(set(partners)) == 3
        counts.update(partners)
    assert sorted(counts) == list(range(8))
    # 1800 partners over 8 rows: a standard deviation of 14 around 225.
    assert all(abs(count - 225) < 60 for count in counts.values())


def test_paired_rows_are_mixed_with_the_row_beside_them():
    images, pool = images_of(3), images_of(3, seed=1)
    mixed = MixupSampler().mix(images, draws_of(7), pool=pool, paired=True)
    rows = torch.arange(7) % 3
    assert torch.equal(mixed.first, rows)
    assert torch.equal(mixed.second, rows)
    assert torch.equal(mixed.inputs, mixup(images[rows], pool[rows], mixed.share))


def test_a_sampler_of_ones_own_need_not_know_of_pools():
    class Plain(MixupSampler):
        def forward(self, inputs, draws):
            return super().forward(inputs, draws)

        def mix(self, inputs, draws):
            return super().mix(inputs, draws)

    assert torch.equal(Plain()(images_of(4), draws_of(4)), MixupSampler()(images_of(4), draws_of(4)))


def test_what_is_mixed_in_comes_from_the_pool():
    images, pool = images_of(3), images_of(5, seed=1)
    mixed = MixupSampler().mix(images, draws_of(3), pool=pool)
    expected = mixup(images[mixed.first], pool[mixed.second], mixed.share)
    assert torch.equal(mixed.inputs, expected)
    assert torch.equal(MixupSampler()(images, draws_of(3), pool=pool), expected)


@pytest.mark.parametrize("sampler", PAIRS)
def test_each_row_has_a_share_of_its_own_and_each_round_a_permutation(sampler):
    mixed = sampler().mix(images_of(8, height=30, width=30), draws_of(24))
    assert len(mixed.share.unique()) > 20
    assert len({tuple(part.tolist()) for part in torch.split(mixed.second, 8)}) == 3
    assert ((mixed.share >= 0) & (mixed.share <= 1)).all()


# The distribution functions of Beta(alpha, alpha), where they are polynomials or the arcsine's.
DISTRIBUTIONS = {
    0.5: lambda x: 2 / math.pi * x.sqrt().asin(),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
    4.0: lambda x: 35 * x**4 - 84 * x**5 + 70 * x**6 - 20 * x**7,
}


@pytest.mark.parametrize("alpha", DISTRIBUTIONS)
def test_the_shares_are_those_of_the_beta_distribution(alpha):
    rows = 4000
    share = MixupSampler(alpha).mix(torch.zeros(10, 1), draws_of(rows)).share.double().sort().values
    level = DISTRIBUTIONS[alpha](share)
    ranks = torch.arange(1, rows + 1, dtype=torch.float64) / rows
    # Kolmogorov and Smirnov's largest gap between the two distribution functions, at 1 percent.
    assert torch.maximum((ranks - level).abs(), (ranks - 1 / rows - level).abs()).max().item() < 1.63 / math.sqrt(rows)


@pytest.mark.parametrize("alpha", DISTRIBUTIONS)
def test_the_table_of_shares_is_as_fine_as_its_steps(alpha):
    rows = 500
    share = MixupSampler(alpha).mix(torch.zeros(10, 1), draws_of(rows)).share.double()
    level = uniform_draws(7, *keys_of(rows), 2)[:, 1]
    assert (DISTRIBUTIONS[alpha](share) - level).abs().max().item() < 1 / 4096


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 1e4])
def test_extreme_alphas_give_shares(alpha):
    mixed = MixupSampler(alpha).mix(images_of(4), draws_of(200))
    assert ((mixed.share >= 0) & (mixed.share <= 1)).all()
    middle = ((mixed.share - 0.5).abs() < 0.1).float().mean().item()
    assert middle > 0.98 if alpha == 1e4 else middle < 0.1


def test_the_ends_of_the_draws_are_in_the_table(monkeypatch):
    for end in (0.0, 1 - 2.0**-53):
        draws = draws_of(3)
        monkeypatch.setattr(draws, "uniform", lambda count, end=end: torch.full((3, count), end, dtype=torch.float64))
        assert MixupSampler(0.5).mix(images_of(3), draws).share.tolist() == pytest.approx([round(end)] * 3, abs=1e-6)


@pytest.mark.parametrize("sampler", PAIRS)
def test_calling_a_sampler_gives_the_mixed_inputs_alone(sampler):
    images = images_of(5)
    assert torch.equal(sampler(2.0)(images, draws_of(7)), sampler(2.0).mix(images, draws_of(7)).inputs)


@pytest.mark.parametrize("sampler", PAIRS)
def test_the_same_draws_give_the_same_and_others_others(sampler):
    images = images_of(5)
    assert torch.equal(sampler()(images, draws_of(9)), sampler()(images, draws_of(9)))
    assert not torch.equal(sampler()(images, draws_of(9)), sampler()(images, draws_of(9, seed=1)))


def all_samplers():
    generator = nn.Sequential(nn.Linear(3, 24), nn.BatchNorm1d(24), nn.Unflatten(1, (1, 4, 6)))
    return [EmpiricalSampler(), MixupSampler(), CutMixSampler(), GeneratorSampler(generator, 3)]


@pytest.mark.parametrize("number", range(4))
def test_a_sampler_leaves_the_batch_and_the_global_generator_alone(number):
    images, sampler = images_of(5), all_samplers()[number]
    copy, state = images.clone(), torch.get_rng_state()
    made = sampler(images, draws_of(8))
    assert torch.equal(torch.get_rng_state(), state)
    made.fill_(-1)
    assert torch.equal(images, copy)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 3, 8])
@pytest.mark.parametrize("number", range(4))
def test_shapes_and_types_are_the_batchs(number, rows, dtype):
    # The sampler as a Trainer of that precision would have it, too.
    sampler = all_samplers()[number].to(dtype)
    made = sampler(images_of(5, dtype=dtype), draws_of(rows))
    assert made.dtype == dtype
    assert made.shape == (rows, 1, 4, 6)
    assert not made.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shares_are_about_the_same_in_every_precision(dtype):
    share = MixupSampler(0.5).to(dtype).mix(images_of(5, dtype=dtype), draws_of(20)).share
    wide = MixupSampler(0.5).mix(images_of(5), draws_of(20)).share
    assert share.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(share.double(), wide.double(), atol=5e-3)


@pytest.mark.parametrize("structure", [tuple, list, ImageAndPose, dict])
def test_several_inputs_are_mixed_by_mixup_alike_and_keep_their_structure(structure):
    images, poses = images_of(5), poses_of(5)
    inputs = {"image": images, "pose": poses}
    if structure is not dict:
        inputs = ImageAndPose(images, poses) if structure is ImageAndPose else structure([images, poses])
    mixed = MixupSampler(0.5).mix(inputs, draws_of(12))
    assert type(mixed.inputs) is structure
    made = list(mixed.inputs.values()) if structure is dict else list(mixed.inputs)
    assert structure is not dict or list(mixed.inputs) == ["image", "pose"]
    alone = MixupSampler(0.5).mix(images, draws_of(12))
    assert torch.equal(made[0], alone.inputs)
    share = alone.share[:, None]
    assert torch.allclose(made[1], share * poses[alone.first] + (1 - share) * poses[alone.second])


def test_cutmix_mixes_what_is_no_image_by_the_share_of_the_pixels():
    images, poses = images_of(5), poses_of(5)
    alone = CutMixSampler().mix(images, draws_of(12))
    mixed = CutMixSampler().mix({"pose": poses, "image": images, "twin": images + 1}, draws_of(12))
    assert torch.equal(mixed.inputs["image"], alone.inputs)
    assert torch.equal(mixed.inputs["twin"], alone.inputs + 1)
    assert torch.equal(mixed.share, alone.share)
    share = mixed.share[:, None]
    assert torch.allclose(mixed.inputs["pose"], share * poses[mixed.first] + (1 - share) * poses[mixed.second])


@pytest.mark.parametrize("inputs", [torch.zeros(3, 4), (torch.zeros(3, 4), torch.zeros(3, 2, 5))])
def test_cutmix_needs_an_image(inputs):
    with pytest.raises(InputError, match=r"CutMix needs images \(N, C, H, W\) among the inputs: use Mixup for others"):
        CutMixSampler()(inputs, draws_of(3))


def test_mixup_refuses_whole_numbers():
    with pytest.raises(InputError, match="Mixup needs inputs of a floating type"):
        MixupSampler()(torch.arange(6).reshape(3, 2), draws_of(3))


@pytest.mark.parametrize("sampler", PAIRS)
@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_no_beta_distribution_has_is_refused(sampler, alpha):
    with pytest.raises(InputError, match=rf"{sampler.__name__}: alpha must be positive and finite, got {alpha}"):
        sampler(alpha)


@pytest.mark.parametrize("sampler", PAIRS)
def test_a_sampler_has_no_weights_and_says_its_alpha(sampler):
    assert not sampler().state_dict()
    assert repr(sampler(0.2)) == f"{sampler.__name__}(alpha=0.2)"


# the batch itself


@pytest.mark.parametrize(("rows", "expected"), [(5, [0, 1, 2, 3, 4]), (2, [0, 1]), (7, [0, 1, 2, 3, 4, 0, 1])])
def test_the_empirical_sampler_gives_the_batch(rows, expected):
    images, poses = images_of(5), poses_of(5)
    assert torch.equal(EmpiricalSampler()(images, draws_of(rows)), images[expected])
    made = EmpiricalSampler()(ImageAndPose(images, poses), draws_of(rows))
    assert torch.equal(made.pose, poses[expected])


# a generator


class Recorded(nn.Module):
    """Passes its input on and keeps it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, latent):
        self.seen.append(latent)
        return latent


def test_a_generator_is_asked_about_standard_normal_numbers_of_the_rows():
    generator = nn.Sequential(Recorded(), nn.Unflatten(1, (1, 1, 3)))
    sampler = GeneratorSampler(generator, 3)
    draws = draws_of(6)
    made = sampler(torch.zeros(4, 1, 1, 3), draws)
    expected = draws_of(6).normal(6)
    assert torch.equal(sampler.generator[0].seen[0], expected[:, :3])
    assert torch.equal(made.flatten(1), expected[:, :3])
    # The same draws, asked again, go on.
    assert torch.equal(sampler(torch.zeros(4, 1, 1, 3), draws).flatten(1), expected[:, 3:])


def test_a_generator_is_frozen_whatever_mode_its_sampler_is_put_in():
    generator = nn.Sequential(nn.Linear(3, 24), nn.BatchNorm1d(24), nn.Dropout(), nn.Unflatten(1, (1, 4, 6)))
    sampler = GeneratorSampler(generator, 3)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    sampler.train()
    made = [sampler(images_of(4), draws_of(5)) for _ in range(2)]
    assert torch.equal(*made)
    assert not any(module.training for module in sampler.generator.modules())
    assert not any(parameter.requires_grad for parameter in sampler.parameters())
    assert all(torch.equal(value, before[name]) for name, value in sampler.generator.state_dict().items())
    # What was given can be trained on.
    assert generator.training
    assert all(parameter.requires_grad for parameter in generator.parameters())


@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 4, 6), (24,)])
def test_a_generator_of_other_inputs_is_refused(shape):
    generator = nn.Sequential(nn.Linear(3, math.prod(shape)), nn.Unflatten(1, shape))
    with pytest.raises(InputError, match=r"the generator makes inputs of shape \(.*\), the data's have \(1, 4, 6\)"):
        GeneratorSampler(generator, 3)(images_of(2), draws_of(2))


def test_a_generator_makes_one_tensor():
    with pytest.raises(InputError, match="the batch's inputs are several: use FunctionSampler.function."):
        GeneratorSampler(nn.Identity(), 3)((images_of(2), poses_of(2)), draws_of(2))


@pytest.mark.parametrize("length", [0, -3])
def test_a_latent_dim_that_is_not_positive_is_refused(length):
    with pytest.raises(InputError, match=f"GeneratorSampler: latent_dim must be at least 1, got {length}"):
        GeneratorSampler(nn.Identity(), length)


# a function


def test_any_function_is_a_sampler():
    def noisy(inputs, draws):
        return inputs[: len(draws)] + draws.normal(1)[:, :, None, None]

    images = images_of(5)
    expected = images[:3] + draws_of(3).normal(1)[:, :, None, None]
    assert torch.equal(FunctionSampler(noisy)(images, draws_of(3)), expected)


# inputs of any structure


@pytest.mark.parametrize(
    "inputs",
    [
        torch.arange(6.0).reshape(3, 2),
        (torch.arange(3), torch.arange(6).reshape(3, 2)),
        [torch.arange(3)],
        {"a": torch.arange(3), "b": torch.arange(6).reshape(3, 2)},
        ImageAndPose(torch.arange(3), torch.arange(6).reshape(3, 2)),
    ],
)
def test_rows_are_counted_taken_and_joined_whatever_the_structure(inputs):
    def parts(values):
        if isinstance(values, torch.Tensor):
            return [values]
        return list(values.values()) if isinstance(values, dict) else list(values)

    assert count_rows(inputs) == 3
    taken = take(inputs, torch.tensor([2, 0]))
    joined = join([inputs, taken, taken])
    doubled = map_tensors(lambda values: values * 2, inputs)
    assert type(taken) is type(joined) is type(doubled) is type(inputs)
    for value, some, whole, double in zip(parts(inputs), parts(taken), parts(joined), parts(doubled), strict=True):
        assert some.tolist() == [value.tolist()[2], value.tolist()[0]]
        assert whole.tolist() == value.tolist() + 2 * some.tolist()
        assert torch.equal(double, value * 2)
    assert count_rows(joined) == 7


def test_a_dicts_inputs_are_joined_by_name():
    first = {"left": torch.zeros(2, 3), "right": torch.ones(2, 3)}
    second = {"right": torch.ones(1, 3), "left": torch.zeros(1, 3)}
    joined = join([first, second])
    assert list(joined) == ["left", "right"]
    assert not joined["left"].any()
    assert joined["right"].all()


@pytest.mark.parametrize(
    "second",
    [
        {"left": torch.zeros(1, 3)},
        {"left": torch.zeros(1, 3), "wrong": torch.zeros(1, 3)},
        (torch.zeros(1, 3), torch.zeros(1, 3)),
        torch.zeros(1, 3),
    ],
)
def test_inputs_of_another_structure_are_not_joined(second):
    first = {"left": torch.zeros(2, 3), "right": torch.ones(2, 3)}
    with pytest.raises(InputError, match=r"a sampler gave other inputs than the batch's .*left, right"):
        join([first, second])
