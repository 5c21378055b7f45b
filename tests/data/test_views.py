"""Views as pure functions of seed, index and view."""

import itertools
import math
import statistics

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from distill_lightning.data.views import CROP_DRAWS, Draws, crop_and_flip, random_box, uniform_draws

LAST = 1 - 2.0**-53
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def keys(indices, views):
    return torch.tensor(indices, dtype=torch.long), torch.tensor(views, dtype=torch.long)


def naive_mix(state):
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def naive_draws(seed, index, view, count, first=0):
    """SplitMix64 over seed, index and view in Python's unbounded integers."""
    key = naive_mix((seed + GOLDEN) & MASK)
    for part in (index, view):
        key = naive_mix(key ^ ((part * GOLDEN + 1) & MASK))
    numbers = range(first + 1, first + count + 1)
    mixed = [naive_mix(key ^ naive_mix((number * GOLDEN) & MASK)) for number in numbers]
    return [(draw >> 11) / 2**53 for draw in mixed]


# uniform_draws


@pytest.mark.parametrize("seed", [0, 1, 12345, -1, 2**63, 2**64 + 5, -(2**70) + 3])
@pytest.mark.parametrize(("index", "view"), [(0, 0), (0, 1), (1, 0), (59999, 163), (2**40, 2**33)])
def test_draws_are_those_of_python_integers(seed, index, view):
    draws = uniform_draws(seed, *keys([index], [view]), 4)
    assert draws.dtype == torch.float64
    assert draws.tolist() == [naive_draws(seed, index, view, 4)]


def test_seeds_are_read_modulo_2_to_the_64():
    index, view = keys([3, 4], [0, 1])
    assert torch.equal(uniform_draws(-1, index, view, 3), uniform_draws(2**64 - 1, index, view, 3))


def test_draws_do_not_depend_on_the_order_of_the_batch():
    index, view = torch.arange(50), torch.arange(50) % 3
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform_draws(7, index[order], view[order], 3), uniform_draws(7, index, view, 3)[order])


@pytest.mark.parametrize("size", [1, 7, 49])
def test_draws_do_not_depend_on_the_split_of_the_batch(size):
    index, view = torch.arange(50), torch.arange(50) % 3
    parts = [uniform_draws(7, i, v, 3) for i, v in zip(index.split(size), view.split(size), strict=True)]
    assert torch.equal(torch.cat(parts), uniform_draws(7, index, view, 3))


def test_more_draws_begin_with_the_fewer():
    index, view = keys([0, 9], [2, 5])
    assert torch.equal(uniform_draws(1, index, view, 8)[:, :3], uniform_draws(1, index, view, 3))


def test_draws_leave_the_global_generator_alone_and_do_not_read_it():
    index, view = keys([0, 9], [2, 5])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = uniform_draws(1, index, view, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(uniform_draws(1, index, view, 3), first)


def test_every_seed_index_view_and_place_has_its_own_draw():
    index, view = torch.arange(40).repeat_interleave(10), torch.arange(10).repeat(40)
    draws = torch.stack([uniform_draws(seed, index, view, 3) for seed in range(20)])
    assert len(draws.unique()) == 20 * 400 * 3


def test_index_and_view_are_not_interchangeable():
    assert not torch.equal(uniform_draws(0, *keys([2], [5]), 3), uniform_draws(0, *keys([5], [2]), 3))


def many_draws():
    """4 draws each of 100 views of 100 samples, ``(100, 100, 4)``."""
    index, view = torch.arange(100).repeat_interleave(100), torch.arange(100).repeat(100)
    return uniform_draws(3, index, view, 4).reshape(100, 100, 4)


def test_draws_are_uniform():
    draws = many_draws().flatten()
    count = len(draws)
    assert draws.min().item() >= 0
    assert draws.max().item() < 1
    # Four standard errors of the mean and of the variance of a uniform variable.
    assert abs(draws.mean().item() - 1 / 2) < 4 * math.sqrt(1 / 12 / count)
    assert abs(draws.var().item() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    # Kolmogorov and Smirnov's largest gap between the two distribution functions, at 1 percent.
    ranks = torch.arange(1, count + 1, dtype=torch.float64) / count
    ordered = draws.sort().values
    gap = torch.maximum((ranks - ordered).abs(), (ranks - 1 / count - ordered).abs()).max().item()
    assert gap < 1.63 / math.sqrt(count)


@pytest.mark.parametrize("place", range(4))
def test_each_place_of_the_draws_is_uniform(place):
    tenths = (many_draws()[:, :, place] * 10).long().flatten().bincount(minlength=10)
    # Chi-squared of 9 degrees of freedom, at 0.1 percent.
    assert ((tenths - 1000.0).square() / 1000).sum().item() < 27.9


def correlation(first, second):
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


@pytest.mark.parametrize("lag", [1, 2, 10])
def test_neighbours_are_not_correlated(lag):
    draws = many_draws()
    bound = 4 / math.sqrt(draws[lag:].numel())
    assert abs(correlation(draws[lag:], draws[:-lag])) < bound
    assert abs(correlation(draws[:, lag:], draws[:, :-lag])) < bound


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
def test_places_of_one_view_are_not_correlated(first, second):
    draws = many_draws()
    assert abs(correlation(draws[:, :, first], draws[:, :, second])) < 4 / math.sqrt(draws[:, :, 0].numel())


def test_neighbouring_seeds_are_not_correlated():
    index, view = torch.arange(10_000), torch.zeros(10_000, dtype=torch.long)
    first, second = uniform_draws(0, index, view, 1), uniform_draws(1, index, view, 1)
    assert abs(correlation(first, second)) < 4 / math.sqrt(10_000)


# first


@pytest.mark.parametrize("first", [0, 1, 7, 2**32, 2**40 + 3, 5 * 2**32])
def test_draws_that_are_passed_over_are_those_of_python_integers(first):
    draws = uniform_draws(3, *keys([5, 6], [1, 2]), 4, first=first)
    assert draws.tolist() == [naive_draws(3, 5, 1, 4, first), naive_draws(3, 6, 2, 4, first)]


def test_passing_over_some_draws_leaves_the_rest():
    index, view = keys([0, 9, 4], [2, 5, 0])
    whole = uniform_draws(1, index, view, 10)
    for first in range(8):
        assert torch.equal(uniform_draws(1, index, view, 2, first=first), whole[:, first : first + 2])


def test_each_row_may_pass_over_its_own_number_of_draws():
    index, view = keys([5, 5, 6], [1, 1, 2])
    draws = uniform_draws(3, index, view, 3, first=torch.tensor([0, 2**32, 4]))
    assert draws.tolist() == [naive_draws(3, 5, 1, 3), naive_draws(3, 5, 1, 3, 2**32), naive_draws(3, 6, 2, 3, 4)]


# Draws


def test_a_stream_goes_on_where_it_stopped():
    index, view = keys([0, 9, 4], [2, 5, 0])
    whole = uniform_draws(1, index, view, 7)
    draws = Draws(1, index, view)
    assert len(draws) == 3
    parts = [draws.uniform(count) for count in (2, 1, 4)]
    assert [tuple(part.shape) for part in parts] == [(3, 2), (3, 1), (3, 4)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_normal_numbers_and_an_order_use_up_the_stream_as_uniform_ones_do():
    index, view = torch.arange(6), torch.zeros(6, dtype=torch.long)
    whole = uniform_draws(1, index, view, 6)
    draws = Draws(1, index, view)
    assert draws.normal(2).shape == (6, 2)
    order = draws.order()
    assert torch.equal(draws.uniform(3), whole[:, 3:])
    assert order.tolist() == sorted(range(6), key=whole[:, 2].tolist().__getitem__)
    groups = [whole[:4, 0].argsort(), whole[4:, 0].argsort()]
    assert torch.equal(Draws(1, index, view).order(4), torch.cat(groups))


def test_copies_of_a_view_have_streams_of_their_own():
    index, view = keys([5, 5, 5, 6], [1, 1, 1, 1])
    draws = Draws(3, index, view, copy=torch.tensor([0, 1, 2, 1]))
    first, second = draws.uniform(2), draws.uniform(3)
    for row, (number, copy) in enumerate([(5, 0), (5, 1), (5, 2), (6, 1)]):
        expected = naive_draws(3, number, 1, 5, copy * 2**32)
        assert first[row].tolist() == expected[:2]
        assert second[row].tolist() == expected[2:]


def test_the_first_copy_is_the_view_itself():
    index, view = keys([5, 6], [1, 2])
    copied = Draws(3, index, view, copy=torch.zeros(2, dtype=torch.long))
    assert torch.equal(copied.uniform(3), Draws(3, index, view).uniform(3))


def test_a_row_gets_the_same_whichever_rows_are_with_it():
    index, view, copy = torch.arange(20) % 7, torch.arange(20) % 3, torch.arange(20) // 7
    rows = torch.tensor([13, 2, 19])
    whole, part = Draws(4, index, view, copy=copy), Draws(4, index[rows], view[rows], copy=copy[rows])
    for _ in range(2):
        assert torch.equal(part.uniform(2), whole.uniform(2)[rows])
        assert torch.equal(part.normal(2), whole.normal(2)[rows])


def test_a_stream_leaves_the_global_generator_and_its_keys_alone():
    index, view = keys([0, 9], [2, 5])
    copy = torch.tensor([1, 0])
    state = torch.get_rng_state()
    draws = Draws(1, index, view, copy=copy)
    for draw in (lambda: draws.uniform(2), lambda: draws.normal(2), draws.order):
        draw()
    assert torch.equal(torch.get_rng_state(), state)
    assert (index.tolist(), view.tolist(), copy.tolist()) == ([0, 9], [2, 5], [1, 0])


def test_normal_numbers_are_the_quantiles_of_the_uniform_ones():
    index, view = torch.arange(50), torch.zeros(50, dtype=torch.long)
    levels = uniform_draws(2, index, view, 3)
    found = Draws(2, index, view).normal(3)
    assert found.dtype == torch.float32
    quantile = statistics.NormalDist().inv_cdf
    for row, level in zip(found.tolist(), levels.tolist(), strict=True):
        assert row == pytest.approx([quantile(value) for value in level], rel=1e-6, abs=1e-6)


def test_normal_numbers_are_standard():
    count = 20_000
    found = Draws(0, torch.arange(count), torch.zeros(count, dtype=torch.long)).normal(2).double().flatten()
    # Four standard errors of the mean, the variance and the fourth moment.
    assert abs(found.mean().item()) < 4 / math.sqrt(2 * count)
    assert abs(found.square().mean().item() - 1) < 4 * math.sqrt(2 / (2 * count))
    assert abs(found.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / (2 * count))


@pytest.mark.parametrize(("dtype", "step"), [(torch.float64, 2.0**-53), (torch.float32, 2.0**-24)])
def test_normal_numbers_are_finite_at_both_ends_of_the_uniform_ones(dtype, step, monkeypatch):
    # float32 is what Apple's devices give; its ends are drawn once in 17 million times.
    ends = torch.tensor([[0.0, 0.5, 1 - step]], dtype=dtype)
    draws = Draws(0, *keys([0], [0]))
    monkeypatch.setattr(draws, "uniform", lambda count: ends)
    low, middle, high = draws.normal(3)[0].tolist()
    end = statistics.NormalDist().inv_cdf(step / 2)
    assert low == pytest.approx(end, rel=1e-4)
    assert high == pytest.approx(-end, rel=1e-4)
    assert abs(middle) < 1e-6


@pytest.mark.slow
def test_the_order_is_a_permutation_and_every_one_is_equally_likely():
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    index = torch.arange(3)
    for view in range(1200):
        counts[tuple(Draws(0, index, torch.full_like(index, view)).order().tolist())] += 1
    # Chi-squared of 5 degrees of freedom, at 0.1 percent.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5


def test_a_stream_of_no_rows_is_empty():
    none = torch.empty(0, dtype=torch.long)
    draws = Draws(0, none, none, copy=none)
    assert len(draws) == 0
    assert draws.uniform(2).shape == draws.normal(2).shape == (0, 2)
    assert draws.order().shape == (0,)


# crop_and_flip


def naive_crop_and_flip(images, draws, *, padding, flip):
    """Pixel by pixel; outside the image is zero."""
    count, channels, height, width = images.shape
    result = torch.zeros_like(images)
    for n in range(count):
        row_draw, column_draw, flip_draw = draws[n].tolist()
        top = math.floor(row_draw * (2 * padding + 1)) - padding
        left = math.floor(column_draw * (2 * padding + 1)) - padding
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    across = width - 1 - x if flip and flip_draw < 0.5 else x
                    row, column = top + y, left + across
                    if 0 <= row < height and 0 <= column < width:
                        result[n, c, y, x] = images[n, c, row, column]
    return result


def some_images(count, channels, height, width, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, height, width), generator=generator).to(dtype)


@pytest.mark.parametrize("padding", [0, 1, 2, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 4, 4), (3, 3, 5)])
def test_crop_and_flip_is_the_loop(padding, flip, channels, height, width):
    images = some_images(12, channels, height, width)
    draws = uniform_draws(5, torch.arange(12), torch.zeros(12, dtype=torch.long), 3)
    expected = naive_crop_and_flip(images, draws, padding=padding, flip=flip)
    assert torch.equal(crop_and_flip(images, draws, padding=padding, flip=flip), expected)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("row", [0.0, LAST])
@pytest.mark.parametrize("column", [0.0, LAST])
@pytest.mark.parametrize("mirror", [0.0, 0.5, LAST])
def test_draws_at_the_extremes_stay_inside_the_padded_image(padding, row, column, mirror):
    images = some_images(1, 2, 4, 5)
    draws = torch.tensor([[row, column, mirror]], dtype=torch.float64)
    expected = naive_crop_and_flip(images, draws, padding=padding, flip=True)
    assert torch.equal(crop_and_flip(images, draws, padding=padding, flip=True), expected)


def test_the_lowest_draw_shows_the_padding_above_and_left():
    images = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    view = crop_and_flip(images, torch.tensor([[0.0, 0.0, 0.9]], dtype=torch.float64), padding=1, flip=False)
    assert view[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]


def test_the_highest_draw_shows_the_padding_below_and_right():
    images = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    view = crop_and_flip(images, torch.tensor([[LAST, LAST, 0.9]], dtype=torch.float64), padding=1, flip=False)
    assert view[0, 0].tolist() == [[5, 6, 0], [8, 9, 0], [0, 0, 0]]


def test_the_middle_draw_is_the_image_and_below_one_half_it_is_mirrored():
    images = some_images(2, 1, 3, 4)
    draws = torch.tensor([[0.5, 0.5, 0.49], [0.5, 0.5, 0.5]], dtype=torch.float64)
    view = crop_and_flip(images, draws, padding=2, flip=True)
    assert torch.equal(view[0], images[0].flip(2))
    assert torch.equal(view[1], images[1])
    assert torch.equal(crop_and_flip(images, draws, padding=2, flip=False), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32, torch.bool])
def test_crop_and_flip_keeps_the_type_and_the_input(dtype):
    images = some_images(4, 1, 5, 5, dtype)
    before = images.clone()
    draws = uniform_draws(0, torch.arange(4), torch.zeros(4, dtype=torch.long), 3)
    view = crop_and_flip(images, draws, padding=2, flip=True)
    assert view.dtype == dtype
    assert torch.equal(view, naive_crop_and_flip(images, draws, padding=2, flip=True))
    view.zero_()
    assert torch.equal(images, before)


def test_a_view_without_crop_and_flip_is_a_new_tensor():
    images = some_images(2, 1, 3, 3)
    view = crop_and_flip(images, torch.zeros(2, 3, dtype=torch.float64), padding=0, flip=False)
    assert torch.equal(view, images)
    assert view.data_ptr() != images.data_ptr()


def test_an_empty_batch_has_no_views():
    none = torch.empty(0, dtype=torch.long)
    view = crop_and_flip(torch.empty(0, 1, 4, 4), uniform_draws(0, none, none, 3), padding=2, flip=True)
    assert view.shape == (0, 1, 4, 4)


def test_every_offset_and_both_orientations_are_about_equally_frequent():
    # One bright pixel in the middle of 5x5: where it ends up tells the offsets.
    images = torch.zeros(5000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 1
    draws = uniform_draws(11, torch.arange(5000), torch.zeros(5000, dtype=torch.long), 3)
    places = crop_and_flip(images, draws, padding=2, flip=True).sum(dim=(0, 1)).double()
    assert places.sum().item() == 5000
    # Chi-squared of 24 degrees of freedom, at 0.1 percent.
    assert ((places - 200).square() / 200).sum().item() < 51.2
    corner = torch.zeros(5000, 1, 1, 2, dtype=torch.uint8)
    corner[..., 0] = 1
    kept = crop_and_flip(corner, draws, padding=0, flip=True)[..., 0].sum().item()
    assert abs(kept - 2500) < 4 * math.sqrt(5000 / 4)


# random_box

USUAL = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


def box_draws(count, seed=0):
    return uniform_draws(seed, *keys(range(count), [0] * count), CROP_DRAWS).tolist()


def naive_box(height, width, draws, scale, ratio):
    """Rejection, written from the definition: area and ratio first, then the place among all that fit."""
    draws = iter(draws)
    for _ in range(10):
        u_area, u_ratio, u_top, u_left = (next(draws) for _ in range(4))
        area = (u_area * scale[1] + (1 - u_area) * scale[0]) * width * height
        shape = ratio[0] * (ratio[1] / ratio[0]) ** u_ratio
        wide, tall = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if wide in range(1, width + 1) and tall in range(1, height + 1):
            tops, lefts = list(range(height - tall + 1)), list(range(width - wide + 1))
            return tops[math.floor(u_top * len(tops))], lefts[math.floor(u_left * len(lefts))], tall, wide
    tall, wide = height, width
    if width / height < ratio[0]:
        tall = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        wide = max(1, round(height * ratio[1]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


@pytest.mark.slow
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.5), (0.9, 1.0)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.2, 3.0)])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (375, 500), (224, 224), (7, 90), (90, 7), (1, 1), (1, 300)])
def test_a_box_is_the_one_that_the_definition_gives(height, width, scale, ratio):
    for draws in box_draws(200):
        assert random_box(height, width, draws, scale=scale, ratio=ratio) == naive_box(
            height, width, draws, scale, ratio
        )


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(40, 60), (375, 500), (30, 90), (200, 60), (224, 224)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    count = 4000
    boxes = torch.tensor([random_box(height, width, draws, **USUAL) for draws in box_draws(count)]).double()
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, list(USUAL["scale"]), list(USUAL["ratio"])) for _ in range(count)]
    theirs = torch.tensor(theirs).double()
    whole = torch.tensor([height, width]).double()
    for tell in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        # Where in what is left over the box lies: 0 is the top, 1 the bottom.
        lambda box: (box[:, 0] + 0.5) / (whole[0] - box[:, 2] + 1),
        lambda box: (box[:, 1] + 0.5) / (whole[1] - box[:, 3] + 1),
    ):
        assert ks_2samp(tell(boxes), tell(theirs)).pvalue > 0.01


def test_boxes_lie_in_the_image_and_reach_every_edge():
    boxes = [random_box(12, 9, draws, **USUAL) for draws in box_draws(2000)]
    for box in boxes:
        assert 0 <= box.top <= box.top + box.height <= 12
        assert 0 <= box.left <= box.left + box.width <= 9
        assert min(box.height, box.width) > 0
    assert min(box.top for box in boxes) == min(box.left for box in boxes) == 0
    assert max(box.top + box.height for box in boxes) == 12
    assert max(box.left + box.width for box in boxes) == 9


@pytest.mark.parametrize(
    ("height", "width", "box"),
    # Whole images of ratio 1 to 1.5 do not fit into these shapes: the central one does.
    [(100, 20, (40, 0, 20, 20)), (20, 100, (0, 35, 20, 30)), (1, 50, (0, 24, 1, 2))],
)
def test_where_no_box_fits_the_central_one_is_taken(height, width, box):
    for draws in ([LAST] * CROP_DRAWS, [0.0] * CROP_DRAWS, [0.5] * CROP_DRAWS):
        assert random_box(height, width, draws, scale=(1.0, 1.0), ratio=(1.0, 1.5)) == box


def test_the_first_trial_that_fits_is_taken():
    draws = [0.5] * CROP_DRAWS
    # The whole area in the ratio 4 : 3 is too wide for a square; the second trial fits.
    draws[:8] = [LAST, LAST, 0.0, 0.0, 0.0, 0.5, LAST, 0.0]
    assert random_box(100, 100, draws, **USUAL) == (72, 0, 28, 28)
