"""Mixup, CutMix and Cutout against loops over pixels, then their invariances, then their edges."""

import math

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.data.mixing import cutmix, cutout, mixup


def some(*shape, seed=0, dtype=torch.float64):
    """Numbers of which none is zero."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5).to(dtype)


def shares_and_centres(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    return draws[:, 0], draws[:, 1:]


def inside(place, centre, side, length):
    """Whether a pixel belongs to an interval that is given in parts of the axis, rounded to whole pixels."""
    start = round((centre - side / 2) * length)
    return start <= place < start + round(side * length)


# mixup


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3, 5), (4,), (1, 2, 2)])
def test_mixup_is_the_loop(shape):
    first, second, share = some(*shape), some(*shape, seed=1), shares_and_centres(shape[0])[0]
    mixed = mixup(first, second, share)
    assert mixed.shape == shape
    for row, part in enumerate(share.tolist()):
        pairs = zip(first[row].flatten().tolist(), second[row].flatten().tolist(), strict=True)
        assert mixed[row].flatten().tolist() == pytest.approx([part * a + (1 - part) * b for a, b in pairs], rel=1e-14)


def test_mixup_of_a_share_of_one_quarter_is_a_hand_value():
    mixed = mixup(torch.tensor([[8.0, 0.0]]), torch.tensor([[4.0, 2.0]]), torch.tensor([0.25]))
    assert mixed.tolist() == [[5.0, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixup_with_a_whole_share_is_the_input_bit_for_bit(dtype):
    first, second = some(3, 2, 4, 4, dtype=dtype), some(3, 2, 4, 4, seed=1, dtype=dtype)
    whole, none = mixup(first, second, torch.ones(3)), mixup(first, second, torch.zeros(3))
    assert whole.dtype == none.dtype == dtype
    assert torch.equal(whole, first)
    assert torch.equal(none, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("beside", [math.inf, -math.inf, math.nan, 1.0])
def test_mixup_with_a_whole_share_is_the_input_beside_any_number(dtype, beside):
    first = torch.tensor([[-0.0, 1.0, math.inf, 3.0]], dtype=dtype)
    mixed = mixup(first, torch.full_like(first, beside), torch.ones(1))
    assert torch.equal(mixed, first)
    assert mixed.signbit().tolist() == first.signbit().tolist()
    # Of an infinity, any part is one.
    part = mixup(torch.ones(1, 1, dtype=dtype), torch.full((1, 1), beside, dtype=dtype), torch.tensor([0.5]))
    assert torch.equal(part.isfinite(), torch.full((1, 1), math.isfinite(beside)))


def test_mixup_with_a_whole_share_has_the_gradients_of_the_product():
    first, second = some(2, 3).requires_grad_(), torch.full((2, 3), math.inf).requires_grad_()
    mixup(first, second, torch.tensor([1.0, 1.0])).sum().backward()
    assert first.grad.tolist() == [[1.0] * 3] * 2
    assert second.grad.tolist() == [[0.0] * 3] * 2


def test_mixup_leaves_its_inputs_alone_and_lets_gradients_through():
    first, second = some(2, 3).requires_grad_(), some(2, 3, seed=1).requires_grad_()
    copies = first.detach().clone(), second.detach().clone()
    mixup(first, second, torch.tensor([0.25, 1.0])).sum().backward()
    assert torch.equal(first, copies[0])
    assert torch.equal(second, copies[1])
    assert first.grad.tolist() == [[0.25] * 3, [1.0] * 3]
    assert second.grad.tolist() == [[0.75] * 3, [0.0] * 3]


def test_mixup_with_one_share_and_a_permutation_keeps_the_mean_of_the_batch():
    images = some(6, 1, 3, 3)
    mixed = mixup(images, images[torch.tensor([3, 0, 5, 1, 4, 2])], torch.full((6,), 0.3))
    assert torch.allclose(mixed.mean(dim=0), images.mean(dim=0), rtol=1e-6)


def test_mixup_swapped_is_mixup_with_the_other_share():
    first, second, share = some(4, 5), some(4, 5, seed=1), shares_and_centres(4)[0]
    assert torch.allclose(mixup(first, second, share), mixup(second, first, 1 - share), rtol=1e-14)


def test_mixup_stays_between_its_inputs():
    first, second, share = some(50, 4), some(50, 4, seed=1), shares_and_centres(50)[0]
    mixed = mixup(first, second, share)
    assert (mixed >= torch.minimum(first, second) - 1e-12).all()
    assert (mixed <= torch.maximum(first, second) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_mixup_refuses_what_has_nothing_in_between(dtype):
    # A share in such a type would be 0.
    with pytest.raises(InputError, match=r"Mixup needs inputs of a floating type, got torch\.\w+: convert them first"):
        mixup(torch.ones(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.tensor([0.5, 0.5]))


# cutmix


def naive_cutmix(first, second, share, centre):
    """Pixel by pixel; also the share of the pixels that are still the first's."""
    result, left = first.clone(), []
    count, _, height, width = first.shape
    for n in range(count):
        side = math.sqrt(1 - float(share[n]))
        taken = 0
        for y in range(height):
            for x in range(width):
                if inside(y, float(centre[n, 0]), side, height) and inside(x, float(centre[n, 1]), side, width):
                    result[n, :, y, x] = second[n, :, y, x]
                    taken += 1
        left.append(1 - taken / (height * width))
    return result, left


@pytest.mark.parametrize("shape", [(40, 1, 8, 8), (40, 3, 5, 9), (40, 2, 1, 1), (40, 1, 7, 2)])
def test_cutmix_is_the_loop(shape):
    first, second = some(*shape), some(*shape, seed=1)
    share, centre = shares_and_centres(shape[0])
    mixed, left = cutmix(first, second, share, centre)
    expected, naive_left = naive_cutmix(first, second, share, centre)
    assert torch.equal(mixed, expected)
    assert left.dtype == share.dtype
    assert left.tolist() == pytest.approx(naive_left, abs=1e-12)


def test_the_rectangle_of_cutmix_has_the_images_proportions():
    # A quarter of 8x4 in the middle: rows 2 to 5, columns 1 and 2.
    first, second = torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
    mixed, left = cutmix(first, second, torch.tensor([0.75]), torch.tensor([[0.5, 0.5]]))
    expected = torch.zeros(8, 4)
    expected[2:6, 1:3] = 1
    assert torch.equal(mixed[0, 0], expected)
    assert left.item() == 0.75


def test_the_centre_of_cutmix_is_in_parts_of_height_then_width():
    first, second = torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 4, 8)
    mixed, _ = cutmix(first, second, torch.tensor([0.75]), torch.tensor([[0.25, 0.75]]))
    expected = torch.zeros(4, 8)
    expected[0:2, 4:8] = 1
    assert torch.equal(mixed[0, 0], expected)


@pytest.mark.parametrize(("centre", "corner"), [((0.0, 0.0), (0, 0)), ((1.0, 1.0), (3, 3)), ((0.0, 1.0), (0, 3))])
def test_what_cutmix_puts_outside_the_image_is_cut_off_and_counts_for_the_first(centre, corner):
    mixed, left = cutmix(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.tensor([0.75]), torch.tensor([centre]))
    assert mixed.nonzero().tolist() == [[0, 0, *corner]]
    assert left.item() == 1 - 1 / 16


def test_the_share_that_cutmix_returns_is_that_of_the_pixels():
    first, second = torch.zeros(60, 2, 6, 7), torch.ones(60, 2, 6, 7)
    share, centre = shares_and_centres(60, seed=3)
    mixed, left = cutmix(first, second, share, centre)
    assert torch.allclose(left, 1 - mixed.double().mean(dim=(1, 2, 3)), atol=1e-6)
    # Rounding and cutting off change it.
    assert not torch.allclose(left, share, atol=0.02)


def test_cutmix_with_whole_shares_is_an_input_bit_for_bit():
    first, second = some(2, 3, 5, 5), some(2, 3, 5, 5, seed=1)
    centre = torch.tensor([[0.1, 0.9], [0.5, 0.5]], dtype=torch.float64)
    mixed, left = cutmix(first, second, torch.tensor([1.0, 0.0]), centre)
    assert torch.equal(mixed[0], first[0])
    assert torch.equal(mixed[1], second[1])
    assert left.tolist() == [1, 0]


def test_a_share_that_rounding_took_past_one_is_one():
    first = some(1, 1, 4, 4)
    mixed, left = cutmix(first, -first, torch.tensor([1 + 1e-7]), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(mixed, first)
    assert left.item() == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_cutmix_keeps_the_type_and_its_inputs(dtype):
    first = torch.randint(1, 100, (6, 2, 5, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    second = first + 100
    copies = first.clone(), second.clone()
    share, centre = shares_and_centres(6)
    mixed, _ = cutmix(first, second, share, centre)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, naive_cutmix(first, second, share, centre)[0])
    mixed.zero_()
    assert torch.equal(first, copies[0])
    assert torch.equal(second, copies[1])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 1, 2, 3, 4)])
def test_cutmix_refuses_what_is_no_image(shape):
    with pytest.raises(
        InputError, match=r"CutMix needs images \(N, C, H, W\), got inputs of shape \(2, .*: leave it out, or use Mixup"
    ):
        cutmix(torch.zeros(shape), torch.ones(shape), torch.ones(2), torch.ones(2, 2))


# cutout


def naive_cutout(images, size, centre):
    result = images.clone()
    count, _, height, width = images.shape
    for n in range(count):
        for y in range(height):
            for x in range(width):
                row, column = float(centre[n, 0]), float(centre[n, 1])
                if inside(y, row, size / height, height) and inside(x, column, size / width, width):
                    result[n, :, y, x] = 0
    return result


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("shape", [(25, 1, 8, 8), (25, 3, 5, 9)])
def test_cutout_is_the_loop(size, shape):
    images, centre = some(*shape), shares_and_centres(shape[0])[1]
    assert torch.equal(cutout(images, size, centre), naive_cutout(images, size, centre))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_cutout_in_the_middle_takes_a_whole_square(size):
    # Of an image that is no square, too.
    cut = cutout(torch.ones(1, 2, 12, 30), size, torch.tensor([[0.5, 0.5]]))
    rows, columns = (cut[0, 0] == 0).nonzero().unbind(dim=1)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (size, size)
    assert (cut == 0).sum().item() == 2 * size * size
    assert abs(float(rows.double().mean()) - 5.5) <= 0.5
    assert abs(float(columns.double().mean()) - 14.5) <= 0.5


def test_cutout_at_a_corner_takes_what_lies_inside():
    cut = cutout(torch.ones(2, 1, 6, 6), 4, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert [(image[0] == 0).nonzero().tolist() for image in cut] == [
        [[0, 0], [0, 1], [1, 0], [1, 1]],
        [[4, 4], [4, 5], [5, 4], [5, 5]],
    ]


def test_each_image_is_cut_at_its_own_place():
    centre = torch.tensor([[0.25, 0.25], [0.75, 0.75]])
    cut = cutout(torch.ones(2, 1, 4, 4), 2, centre)
    assert cut[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert cut[1, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_cutout_keeps_the_type_and_its_input(dtype):
    images = (some(5, 1, 6, 6) * 100).to(dtype)
    copy, centre = images.clone(), shares_and_centres(5)[1]
    cut = cutout(images, 3, centre)
    assert cut.dtype == dtype
    assert torch.equal(cut, naive_cutout(images, 3, centre))
    cut.fill_(1)
    assert torch.equal(images, copy)


def test_cutout_lets_no_gradient_through_where_it_cut():
    images = some(1, 1, 4, 4).requires_grad_()
    cutout(images, 2, torch.tensor([[0.5, 0.5]])).sum().backward()
    assert images.grad[0, 0].tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_cutout_refuses_what_is_no_image(shape):
    with pytest.raises(
        InputError, match=r"Cutout needs images \(N, C, H, W\), got inputs of shape \(2, 3.*: leave it out"
    ):
        cutout(torch.zeros(shape), 2, torch.ones(2, 2))
