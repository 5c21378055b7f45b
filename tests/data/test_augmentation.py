"""RandAugment, colour jitter and lighting against torchvision's operations, which change one image at a time."""

import colorsys
import math
from statistics import NormalDist

import pytest
import torch
from torch.nn import functional
from torchvision.transforms import functional as F

from distill_lightning import ColorJitter, InputError, Lighting, RandAugment
from distill_lightning.data import image_operations as operations
from distill_lightning.data.augmentation import _OPERATIONS
from distill_lightning.data.views import uniform_draws


def shear(image, along, down):
    angles = [math.degrees(math.atan(amount)) for amount in (along, down)]
    return F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, center=[0, 0])


def moved(image, right, down):
    return F.affine(image, angle=0.0, translate=[int(right), int(down)], scale=1.0, shear=[0.0, 0.0])


# What torchvision does by the names that the paper has, with the amount for a level in [-1, 1].
REFERENCE = {
    "Identity": lambda image, level: image,
    "ShearX": lambda image, level: shear(image, 0.3 * level, 0.0),
    "ShearY": lambda image, level: shear(image, 0.0, 0.3 * level),
    "TranslateX": lambda image, level: moved(image, 150 / 331 * image.shape[2] * level, 0),
    "TranslateY": lambda image, level: moved(image, 0, 150 / 331 * image.shape[1] * level),
    "Rotate": lambda image, level: F.rotate(image, 30 * level),
    "Brightness": lambda image, level: F.adjust_brightness(image, 1 + 0.9 * level),
    "Color": lambda image, level: F.adjust_saturation(image, 1 + 0.9 * level),
    "Contrast": lambda image, level: F.adjust_contrast(image, 1 + 0.9 * level),
    "Sharpness": lambda image, level: F.adjust_sharpness(image, 1 + 0.9 * level),
    "Posterize": lambda image, level: F.posterize(image, 8 - round(4 * abs(level))),
    "Solarize": lambda image, level: F.solarize(image, 255 * (1 - abs(level))),
    "AutoContrast": lambda image, level: F.autocontrast(image),
    "Equalize": lambda image, level: F.equalize(image),
}
MOVING = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
NAMES = list(REFERENCE)


def pictures(channels, height=20, width=24):
    """Noise, fields of colour, dull ones, one of a single colour, and one of two."""
    generator = torch.Generator().manual_seed(channels)
    noise = torch.randint(0, 256, (4, channels, height, width), generator=generator, dtype=torch.uint8)
    fields = functional.interpolate(noise[:, :, :5, :5].float(), size=(height, width), mode="bilinear")
    single, two = torch.full_like(noise[:1], 77), noise[:1] // 128 * 200
    return torch.cat([noise, fields.to(torch.uint8), noise // 4 + 90, single, two])


def differing(one, other):
    return (one != other).float().mean().item()


# RandAugment


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_torchvisions(name, channels):
    images = pictures(channels)
    for magnitude in (0, 5, 9, 30):
        # Half of the images one way, half the other.
        way = torch.arange(len(images)) % 2
        draws = torch.stack([torch.full((len(images),), (NAMES.index(name) + 0.5) / 14), 0.25 + way / 2], dim=1)
        made = RandAugment(operations=1, magnitude=magnitude)(images, draws)
        signs = (1 - 2 * way).tolist()
        wanted = [REFERENCE[name](image, sign * magnitude / 30) for image, sign in zip(images, signs, strict=True)]
        # torchvision's coordinates are of 32 bits: between two pixels it may take the other one.
        assert differing(made, torch.stack(wanted)) <= (0.01 if name in MOVING else 0), magnitude


def test_the_operations_stand_in_torchvisions_order():
    assert list(_OPERATIONS) == NAMES


def test_operations_follow_one_another_each_image_by_its_own():
    images, index = pictures(3), torch.arange(14)
    draws = uniform_draws(5, index, torch.full_like(index, 2), 6)
    made = RandAugment(operations=3, magnitude=12)(images, draws)
    kinds = set()
    for image, result, row in zip(images, made, draws.tolist(), strict=True):
        wanted = image
        for which, way in zip(row[::2], row[1::2], strict=True):
            kinds.add(NAMES[int(14 * which)])
            wanted = REFERENCE[NAMES[int(14 * which)]](wanted, (12 if way < 0.5 else -12) / 30)
        assert differing(wanted, result) < 0.02
    assert len(kinds) > 8


def test_what_becomes_of_an_image_does_not_depend_on_the_batch():
    images, index = pictures(3), torch.arange(14)
    draws = uniform_draws(0, index, index, 8)
    augment, before = RandAugment(operations=4, magnitude=15), images.clone()
    whole = augment(images, draws)
    assert torch.equal(images, before)
    assert torch.equal(augment(images.flip(0), draws.flip(0)).flip(0), whole)
    assert all(torch.equal(augment(images[[row]], draws[[row]])[0], whole[row]) for row in range(14))


def test_every_operation_is_drawn_equally_often_and_either_way():
    index = torch.arange(7000)
    draws = uniform_draws(0, index, index, RandAugment(operations=1).draws)
    assert (draws[:, 0] * 14).long().bincount().sub(500).abs().max() < 100
    bright = RandAugment(operations=1, magnitude=30)(
        torch.full((2, 1, 3, 3), 100, dtype=torch.uint8), torch.tensor([[6.5 / 14, 0.49], [6.5 / 14, 0.5]])
    )
    assert bright[:, 0, 0, 0].tolist() == [190, 10]


@pytest.mark.parametrize("name", ["Sharpness", "Equalize", "Rotate", "ShearX", "AutoContrast"])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3)])
def test_tiny_images_are_changed_as_large_ones_are(name, size):
    images = pictures(3)[:, :, : size[0], : size[1]]
    draws = torch.tensor([[(NAMES.index(name) + 0.5) / 14, 0.0]]).expand(len(images), 2)
    made = RandAugment(operations=1, magnitude=10)(images, draws)
    wanted = torch.stack([REFERENCE[name](image, 1 / 3) for image in images])
    assert differing(made, wanted) <= (0.2 if name in MOVING else 0)


# Colour jitter

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_jittered_as_by_torchvision_in_the_drawn_order(channels):
    images, index = pictures(channels), torch.arange(14)
    jitter = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.7, hue=0.3)
    ranges = [(0.6, 1.4), (0.0, 2.5), (0.3, 1.7), (-0.3, 0.3)]
    draws = uniform_draws(3, index, index, jitter.draws)
    made = jitter(images, draws)
    orders = set()
    for image, result, row in zip(images, made, draws.tolist(), strict=True):
        order, wanted = sorted(range(4), key=row[4:].__getitem__), image
        orders.add(tuple(order))
        for number in order:
            low, high = ranges[number]
            wanted = ADJUST[number](wanted, low + (high - low) * row[number])
        # A hue may be one level off, which a contrast of up to 2.5 and a saturation of 1.7 then spread.
        assert (wanted.int() - result.int()).abs().max() <= (0 if channels == 1 else 5)
    assert len(orders) > 6


def test_the_recipe_for_imagenet_leaves_hues_alone_and_is_torchvisions_bit_for_bit():
    images, index = pictures(3), torch.arange(14)
    draws = uniform_draws(1, index, index, 8)
    for image, result, row in zip(images, ColorJitter()(images, draws), draws.tolist(), strict=True):
        wanted = image
        for number in sorted(range(3), key=row[4:].__getitem__):
            wanted = ADJUST[number](wanted, 0.6 + 0.8 * row[number])
        assert torch.equal(wanted, result)


def test_a_hue_is_turned_as_colorsys_says():
    images = pictures(3)[:, :, :4, :4]
    shifts = torch.linspace(-0.5, 0.5, len(images), dtype=torch.float64)
    turned = operations.hue(images, shifts)
    for image, result, shift in zip(images, turned, shifts.tolist(), strict=True):
        for colour, found in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
            wanted = [255 * channel for channel in colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)]
            assert found == pytest.approx(wanted, abs=0.501)


def test_without_any_range_nothing_changes():
    images = pictures(3)
    assert torch.equal(ColorJitter(brightness=0, contrast=0, saturation=0)(images, torch.rand(14, 8)), images)


# Lighting


def test_lighting_adds_the_same_noise_to_all_pixels():
    components = [[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]]
    images, draws = torch.rand(5, 3, 2, 2), uniform_draws(0, torch.arange(5), torch.arange(5), 3)
    for image, result, row in zip(images, Lighting(std=0.2)(images, draws), draws.tolist(), strict=True):
        shares = [NormalDist(0, 0.2).inv_cdf(number) for number in row]
        for channel in range(3):
            noise = sum(
                share * scale * component[channel]
                for share, scale, component in zip(shares, (0.2175, 0.0188, 0.0045), components, strict=True)
            )
            assert torch.allclose(result[channel], image[channel] + noise, atol=1e-6)


def test_lighting_bears_a_draw_of_zero():
    assert Lighting()(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3)).isfinite().all()


# Options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugment(operations=0), "RandAugment: operations must be at least 1, got 0"),
        (lambda: RandAugment(magnitude=31), "RandAugment: magnitude must be from 0 to 30, got 31"),
        (lambda: RandAugment(magnitude=9.5), "RandAugment: magnitude must be an integer, got 9.5"),
        (lambda: ColorJitter(contrast=-0.1), "ColorJitter: contrast cannot be negative, got -0.1"),
        (lambda: ColorJitter(hue=0.6), r"ColorJitter: hue must be in \[0, 0.5\], got 0.6"),
        (lambda: ColorJitter(brightness=math.nan), "ColorJitter: brightness must be a finite number, got nan"),
        (lambda: Lighting(std=0), "Lighting: std must be positive, got 0: leave the option out for none"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
