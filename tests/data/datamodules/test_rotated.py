"""Images turned by an angle that becomes their target."""

import gzip
import inspect
import math
import struct

import pytest
import torch
from sklearn.datasets import load_digits

from distill_lightning import (
    DigitsDataModule,
    FashionMNISTDataModule,
    InputError,
    RegressionModule,
    RotatedDigitsDataModule,
    RotatedFashionMNISTDataModule,
    SmallResNet,
)
from distill_lightning.data.datamodules import ViewOptions
from distill_lightning.data.datamodules.rotated import rotate
from distill_lightning.data.views import uniform_draws
from distill_lightning.testing import tiny_trainer

TRAIN, TEST = 200, 60


def small_fashion_mnist(folder):
    """A few images in Fashion-MNIST's real on-disk format; all of noise, so that no two are alike."""
    generator = torch.Generator().manual_seed(0)
    pixels = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        pixels[part] = torch.randint(1, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        header = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels[part].numpy().tobytes()))
        labels = (torch.arange(count) % 10).to(torch.uint8)
        header = struct.pack(">HBBI", 0, 8, 1, count)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.numpy().tobytes()))
    return {part: images[:, None] for part, images in pixels.items()}


@pytest.fixture
def fashion(tmp_path):
    """The pixels in the files, and a function that makes the data module that reads them."""
    pixels = small_fashion_mnist(tmp_path)
    defaults = {"data_dir": tmp_path, "val_size": 50}
    return pixels, lambda **options: RotatedFashionMNISTDataModule(**(defaults | options))


def some_images(count, channels, height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


# rotate


def naive_rotate(image, angle):
    """Pixel by pixel: where it comes from, with the rows upwards, and the four pixels around that place."""
    height, width = image.shape
    values = image.tolist()

    def at(row, column):
        return values[row][column] if 0 <= row < height and 0 <= column < width else 0

    result = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, (height - 1) / 2 - row
            # Turned back, that is clockwise.
            from_x = math.cos(angle) * x + math.sin(angle) * y
            from_y = -math.sin(angle) * x + math.cos(angle) * y
            source_row, source_column = (height - 1) / 2 - from_y, from_x + (width - 1) / 2
            top, left = math.floor(source_row), math.floor(source_column)
            down, right = source_row - top, source_column - left
            result[row, column] = (
                (1 - down) * ((1 - right) * at(top, left) + right * at(top, left + 1))
                + down * ((1 - right) * at(top + 1, left) + right * at(top + 1, left + 1))
            )  # fmt: skip
    return result


@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 5, 9), (1, 9, 4), (1, 1, 1)])
def test_a_turned_image_is_the_loop(shape):
    angles = torch.tensor([0.0, 0.3, -0.3, 1.0, -2.0, 3.0, math.pi / 4])
    images = some_images(len(angles), *shape)
    turned = rotate(images, angles)
    assert turned.dtype == torch.uint8
    assert turned.shape == images.shape
    for n, angle in enumerate(angles.tolist()):
        for channel in range(shape[0]):
            expected = naive_rotate(images[n, channel], angle)
            # Rounded once, and grid_sample works in float32.
            assert (turned[n, channel].double() - expected).abs().max().item() < 0.501


@pytest.mark.parametrize("size", [1, 2, 7, 8, 28])
def test_quarter_turns_are_exact_and_counter_clockwise(size):
    images = some_images(3, 2, size, size)
    for quarters in (-2, -1, 0, 1, 2):
        turned = rotate(images, torch.full((3,), quarters * math.pi / 2))
        assert torch.equal(turned, torch.rot90(images, quarters, dims=(2, 3)))


def test_a_bright_spot_on_the_right_turns_up():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 8] = 255
    row, column = (rotate(image, torch.tensor([math.pi / 4]))[0, 0] > 60).double().nonzero().double().mean(dim=0)
    assert row.item() == pytest.approx(4 - 4 * math.sin(math.pi / 4), abs=0.5)
    assert column.item() == pytest.approx(4 + 4 * math.cos(math.pi / 4), abs=0.5)


def test_corners_turned_out_are_lost_and_where_nothing_was_is_zero():
    turned = rotate(torch.full((1, 1, 20, 20), 200, dtype=torch.uint8), torch.tensor([math.pi / 4]))[0, 0]
    assert turned[10, 10].item() == 200
    assert [turned[0, 0].item(), turned[0, -1].item(), turned[-1, 0].item(), turned[-1, -1].item()] == [0] * 4


def test_many_images_are_turned_like_one():
    images, angles = some_images(4100, 1, 3, 3), torch.linspace(-1, 1, 4100)
    turned = rotate(images, angles)
    for n in (0, 4095, 4096, 4099):
        assert torch.equal(turned[n : n + 1], rotate(images[n : n + 1], angles[n : n + 1]))


def test_turning_leaves_the_images_alone():
    images = some_images(2, 1, 5, 5)
    copy = images.clone()
    rotate(images, torch.tensor([0.0, 1.0])).zero_()
    assert torch.equal(images, copy)


# Fashion-MNIST's files


def test_the_images_are_those_of_the_files_turned_by_their_targets(fashion):
    pixels, data_of = fashion
    data = data_of(seed=3, subset=100, test_size=20)
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(3))
    originals = {"val": pixels["train"][order[:50]], "train": pixels["train"][order[50:150]], "test": pixels["t10k"]}
    for split, size in (("train", 100), ("val", 50), ("test", 20)):
        dataset = data.dataset(split)
        assert dataset.targets.shape == (size, 1)
        assert dataset.targets.dtype == torch.float32
        assert torch.equal(dataset.images, rotate(originals[split][:size], dataset.targets[:, 0]))
        assert not torch.equal(dataset.images, originals[split][:size])


@pytest.mark.parametrize("options", [{"subset": 10}, {"val_size": 120}, {"batch_size": 7}, {"order_seed": 5}])
def test_an_image_keeps_its_angle_whatever_the_split(fashion, options):
    _, data_of = fashion
    found = []
    for data in (data_of(), data_of(**options)):
        datasets = [data.dataset(split) for split in ("train", "val")]
        # A turned image tells by how much it was turned.
        found.append({bytes(image.flatten().tolist()) for dataset in datasets for image in dataset.images})
    assert len(found[0]) == TRAIN
    assert len(found[1]) == min(TRAIN, options.get("subset", TRAIN) + 50)
    assert found[1] <= found[0]


def test_the_seed_draws_the_angles(fashion):
    _, data_of = fashion
    first, again, other = (data_of(seed=seed).dataset("test").targets for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not (first == other).any()


def test_training_and_test_images_and_the_crops_have_draws_of_their_own(fashion):
    # In the order of the files.
    _, data_of = fashion
    data = data_of(max_angle=90)
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))
    train = torch.zeros(TRAIN, 1)
    train[order[:50]], train[order[50:]] = data.dataset("val").targets, data.dataset("train").targets
    test = data.dataset("test").targets
    draws = {"train": train[:TEST, 0], "test": test[:, 0]}
    for view in (0, 1):
        crop = uniform_draws(0, torch.arange(TEST), torch.full((TEST,), view), 3)
        draws |= {f"crop {view} {place}": crop[:, place] for place in range(3)}
    table = torch.corrcoef(torch.stack([values.double() for values in draws.values()]))
    # Four standard errors of a correlation of 60 independent pairs.
    assert (table - torch.eye(len(table))).abs().max().item() < 4 / math.sqrt(TEST)


def test_a_training_batch_is_normalised_and_its_targets_are_radians(fashion):
    _, data_of = fashion
    data = data_of(batch_size=16, max_angle=30)
    batch = next(iter(data.train_dataloader()))
    plain = data.dataset("train")
    assert batch.target.shape == (16, 1)
    assert torch.equal(batch.target, plain.targets[batch.index])
    expected = (plain.images[batch.index].double() / 255 - 0.286) / 0.353
    assert torch.allclose(batch.input.double(), expected, atol=1e-5)
    assert 0.3 < batch.target.abs().max().item() <= math.pi / 6


def test_a_crop_moves_an_image_and_leaves_its_target(fashion):
    _, data_of = fashion
    data = data_of(padding=3, batch_size=150)
    loader = data.train_dataloader()
    inputs, targets = [], []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batch = next(iter(loader))
        rows = batch.index.argsort()
        inputs.append(batch.input[rows])
        targets.append(batch.target[rows])
    assert torch.equal(*targets)
    assert (inputs[0] != inputs[1]).flatten(1).any(dim=1).float().mean().item() > 0.9


def test_no_view_is_mirrored(fashion):
    _, data_of = fashion
    assert data_of().flip is False
    assert "flip" not in inspect.signature(RotatedFashionMNISTDataModule).parameters


def test_the_other_arguments_are_those_of_the_data_module_beneath(tmp_path):
    for rotated, beneath in (
        (RotatedDigitsDataModule, DigitsDataModule),
        (RotatedFashionMNISTDataModule, FashionMNISTDataModule),
    ):
        given, below = (
            inspect.signature(kind).parameters.keys() - {"options"} | ViewOptions.__optional_keys__
            for kind in (rotated, beneath)
        )
        given -= {"max_angle"}
        # A turned image of which RandAugment turns another view has not the angle that is its target.
        assert given == below - {"flip", "cutout", "randaugment"}
        options = {"subset": 11, "val_size": 12, "test_size": 13, "batch_size": 14, "padding": 15, "views": 16}
        options |= {"seed": 17, "order_seed": 18, "num_workers": 19, "partners": True, "views_per_load": 2}
        options |= {"drop_last": True}
        special = {"image_size": 20} if rotated is RotatedDigitsDataModule else {"data_dir": tmp_path, "download": True}
        assert options.keys() | special.keys() == given
        data = rotated(**options, **special)
        assert {name: getattr(data, name) for name in given} == options | special


@pytest.mark.parametrize("rotated", [RotatedDigitsDataModule, RotatedFashionMNISTDataModule])
def test_a_regressions_data_say_so(rotated):
    data = rotated()
    assert data.num_classes is None
    assert data.num_targets == 1


@pytest.mark.parametrize("rotated", [RotatedDigitsDataModule, RotatedFashionMNISTDataModule])
@pytest.mark.parametrize("angle", [0, -5.0, 180.5, float("nan")])
def test_an_angle_out_of_range_is_refused(rotated, angle):
    with pytest.raises(InputError, match=f"max_angle is in degrees, above 0 and up to 180, got {angle}"):
        rotated(max_angle=angle)


def test_a_missing_folder_is_refused_as_ever(tmp_path):
    with pytest.raises(InputError, match=r"no train-images-idx3-ubyte\.gz in"):
        RotatedFashionMNISTDataModule(data_dir=tmp_path).setup()


# the digits


def test_the_digits_are_those_of_scikit_learn_turned_by_their_targets():
    data = RotatedDigitsDataModule(image_size=8, test_size=500)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    original = (torch.from_numpy(load_digits().images)[order[:500], None] * 255 / 16).round().to(torch.uint8)
    test = data.dataset("test")
    assert torch.equal(test.images, rotate(original, test.targets[:, 0]))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [1000, 297, 500]


@pytest.mark.parametrize("degrees", [90.0, 180.0, 20.0])
def test_the_angles_are_uniform_in_radians(degrees):
    data = RotatedDigitsDataModule(max_angle=degrees, image_size=8)
    angles = torch.cat([data.dataset(split).targets[:, 0] for split in ("train", "val", "test")]).double()
    level = (angles / math.radians(degrees) + 1) / 2
    count = len(level)
    assert len(level.unique()) > 0.99 * count
    ranks, ordered = torch.arange(1, count + 1, dtype=torch.float64) / count, level.sort().values
    assert ordered[0].item() >= 0
    assert ordered[-1].item() <= 1 + 1e-6
    # Kolmogorov and Smirnov's largest gap between the two distribution functions, at 1 percent.
    assert torch.maximum((ranks - ordered).abs(), (ranks - 1 / count - ordered).abs()).max().item() < 1.63 / count**0.5


def test_the_angle_of_a_digit_does_not_tell_its_class():
    data, plain = RotatedDigitsDataModule(image_size=8), DigitsDataModule(image_size=8)
    angles, classes = data.dataset("train").targets[:, 0].double(), plain.dataset("train").targets
    for number in range(10):
        mean = angles[classes == number].mean().item()
        # Four standard errors of the mean of numbers that are uniform on an interval of length pi.
        assert abs(mean) < 4 * math.pi / math.sqrt(12 * (classes == number).sum().item())


def test_a_regression_trains_on_turned_digits():
    data = RotatedDigitsDataModule(max_angle=60, subset=64, val_size=20, test_size=30, batch_size=32)
    module = RegressionModule(SmallResNet(num_targets=1, width=2), num_targets=1, input_shape=data.input_shape)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=data)
    metrics = trainer.callback_metrics
    targets = data.dataset("val").targets
    module.eval()
    with torch.no_grad():
        output = module(next(iter(data.val_dataloader())).input)
    assert metrics["val/mae"].item() == pytest.approx((output[:, :1] - targets).abs().mean().item(), rel=1e-4)
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/mae"] < math.pi
