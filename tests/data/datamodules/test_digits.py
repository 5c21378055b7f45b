"""scikit-learn's digits."""

import pytest
import torch
from sklearn.datasets import load_digits

from distill_lightning import DigitsDataModule, InputError


def images_of(data, split):
    return data.dataset(split).images


def test_the_digits_are_1797_and_split_without_overlap():
    data = DigitsDataModule(image_size=8)
    sizes = [len(data.dataset(split)) for split in ("train", "val", "test")]
    assert sizes == [1000, 297, 500]
    rows = torch.cat([images_of(data, split).flatten(1) for split in ("train", "val", "test")])
    original = torch.from_numpy(load_digits().images).flatten(1)
    assert torch.equal(sorted_rows(rows), sorted_rows((original * 255 / 16).round().to(torch.uint8)))


def sorted_rows(rows):
    return torch.tensor(sorted(rows.tolist()))


def test_the_pixels_of_8x8_images_are_the_originals_on_a_scale_of_255():
    data = DigitsDataModule(image_size=8, test_size=500)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:500]
    original = torch.from_numpy(load_digits().images)[order]
    assert torch.equal(images_of(data, "test")[:, 0].double(), (original * 255 / 16).round())
    assert torch.equal(data.dataset("test").targets, torch.from_numpy(load_digits().target)[order])


@pytest.mark.parametrize("size", [8, 16, 11])
def test_images_have_the_size_asked_for(size):
    data = DigitsDataModule(image_size=size)
    batch = next(iter(data.train_dataloader()))
    assert data.input_shape == (1, size, size)
    assert batch.input.shape == (64, 1, size, size)
    assert images_of(data, "train").dtype == torch.uint8


def test_images_are_16x16_by_default():
    assert DigitsDataModule().input_shape == (1, 16, 16)


@pytest.mark.slow
def test_enlarged_images_are_bilinear_in_the_small_ones():
    small, large = (images_of(DigitsDataModule(image_size=size), "test")[:20, 0].double() for size in (8, 16))
    # At twice the size every pixel mixes its two nearest in each direction 3 to 1, the border repeating itself.
    for n in range(20):
        for y in range(16):
            for x in range(16):
                near_y, near_x = y // 2, x // 2
                far_y = min(max(near_y + (1 if y % 2 else -1), 0), 7)
                far_x = min(max(near_x + (1 if x % 2 else -1), 0), 7)
                mixed = sum(
                    weight_y * weight_x * small[n, row, column].item()
                    for row, weight_y in ((near_y, 0.75), (far_y, 0.25))
                    for column, weight_x in ((near_x, 0.75), (far_x, 0.25))
                )
                # Both were rounded once.
                assert abs(large[n, y, x].item() - mixed) <= 1.01


def test_the_mean_and_deviation_are_those_of_the_images():
    data = DigitsDataModule()
    pixels = torch.cat([images_of(data, split).flatten() for split in ("train", "val", "test")]).double() / 255
    assert pixels.mean().item() == pytest.approx(data.mean, abs=2e-3)
    assert pixels.std().item() == pytest.approx(data.std, abs=2e-3)


def test_every_class_is_in_every_split():
    data = DigitsDataModule()
    for split in ("train", "val", "test"):
        assert data.dataset(split).targets.unique().tolist() == list(range(10))
    assert data.num_classes == len(data.class_names) == 10


def test_two_data_modules_of_one_seed_give_bit_identical_batches():
    batches = [next(iter(DigitsDataModule(seed=3).train_dataloader())) for _ in range(2)]
    assert all(torch.equal(*parts) for parts in zip(*batches, strict=True))


def test_the_seed_draws_the_test_images():
    first, second = (images_of(DigitsDataModule(seed=seed), "test") for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_seed_does_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    first = images_of(DigitsDataModule(), "test")
    torch.manual_seed(1)
    assert torch.equal(images_of(DigitsDataModule(), "test"), first)


def test_digits_are_never_mirrored():
    assert DigitsDataModule().flip is False


@pytest.mark.parametrize("size", [0, -8])
def test_an_image_size_that_is_not_positive_is_refused(size):
    with pytest.raises(InputError, match=f"image_size must be at least 1, got {size}"):
        DigitsDataModule(image_size=size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_size": 1797}, "test_size=1797 leaves none of 1797 digits to train on"),
        ({"test_size": 5000}, "test_size=5000 leaves none of 1797 digits"),
        ({"val_size": 1297}, "val_size=1297 leaves none of 1297 images to train on"),
        ({"subset": 1001}, "subset=1001 is larger than the 1000 training images that val_size=297 leaves"),
    ],
)
def test_a_split_larger_than_the_digits_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        DigitsDataModule(**arguments).setup()


def test_without_a_test_size_no_test_image_may_be_trained_on():
    with pytest.raises(InputError, match="test_size"):
        DigitsDataModule(test_size=None).setup()
