"""Views that are changed besides cropping and mirroring, of images in memory and in files."""

import numpy as np
import pytest
import torch
from PIL import Image

from distill_lightning import ColorJitter, DigitsDataModule, ImageFolderDataModule, InputError, Lighting, RandAugment
from distill_lightning.data.datamodules import Images, ImageTensors
from distill_lightning.data.views import uniform_draws

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
KEYS = [(index, view) for index in range(12) for view in (0, 3)]


def bytes_of(inputs, mean=MEAN, std=STD):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return ((inputs * std + mean) * 255).round().to(torch.uint8)


def draws_of(count, first, seed=0):
    index, view = torch.tensor(KEYS).T
    return uniform_draws(seed, index, view, first + count)[:, first:]


def same_alone_and_together(dataset):
    """Whether a view is the same, bit for bit, in whatever batch."""
    whole = dataset.__getitems__(KEYS).input
    backwards = dataset.__getitems__(KEYS[::-1]).input.flip(0)
    return torch.equal(whole, backwards) and all(
        torch.equal(dataset[key].input, row) for key, row in zip(KEYS, whole, strict=True)
    )


# In memory


def tensors(**options):
    pixels = torch.randint(0, 256, (12, 3, 10, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageTensors(Images(pixels, torch.arange(12)), mean=MEAN, std=STD, **options)


def test_a_view_loses_a_square_around_the_centre_that_its_draws_give():
    whole = tensors(padding=2, flip=True).__getitems__(KEYS).input
    cut = tensors(padding=2, flip=True, cutout=4).__getitems__(KEYS).input
    for before, after, (down, right) in zip(whole, cut, draws_of(2, first=3).tolist(), strict=True):
        for row in range(10):
            for column in range(12):
                top, left = round(10 * down - 2), round(12 * right - 2)
                lost = top <= row < top + 4 and left <= column < left + 4
                wanted = torch.zeros(3) if lost else before[:, row, column]
                assert torch.equal(after[:, row, column], wanted)
    assert (cut != whole).any(dim=1).flatten(1).any(dim=1).float().mean() > 0.9


def test_randaugment_changes_the_cropped_bytes():
    augment = RandAugment(operations=3, magnitude=14)
    cropped = bytes_of(tensors(padding=2, flip=True).__getitems__(KEYS).input)
    found = tensors(padding=2, flip=True, randaugment=augment).__getitems__(KEYS).input
    assert torch.equal(bytes_of(found), augment(cropped, draws_of(6, first=5)))
    assert (bytes_of(found) != cropped).flatten(1).any(dim=1).float().mean() > 0.8


def test_what_is_cut_out_is_the_mean_colour_whatever_else_was_done():
    options = {"padding": 2, "flip": True, "randaugment": RandAugment()}
    both, one = (tensors(**options, cutout=cutout).__getitems__(KEYS).input for cutout in (5, 0))
    changed = both != one
    assert (both[changed] == 0).all()
    assert changed.any(dim=1).flatten(1).sum(dim=1).max() == 25


def test_views_in_memory_are_the_same_in_any_batch():
    assert same_alone_and_together(tensors(padding=2, flip=True, cutout=4, randaugment=RandAugment(4, 20)))


def test_a_view_that_is_changed_is_not_like_the_others():
    assert tensors().views_are_alike
    assert not tensors(cutout=2).views_are_alike
    assert not tensors(randaugment=RandAugment()).views_are_alike


def test_only_training_views_are_changed():
    plain, changed = DigitsDataModule(padding=0), DigitsDataModule(padding=0, cutout=4, randaugment=RandAugment())
    for split in ("val", "test"):
        assert torch.equal(changed.dataset(split)[3].input, plain.dataset(split)[3].input)
    first = [data.dataset("train", augment=True).__getitems__(KEYS).input for data in (plain, changed)]
    assert (first[0] != first[1]).flatten(1).any(dim=1).float().mean() > 0.9


def test_partners_are_changed_by_their_own_draws():
    options = {"padding": 2, "flip": True, "cutout": 4, "randaugment": RandAugment()}
    partner = tensors(**options, partners=True).__getitems__(KEYS).partner
    keys = list(zip(partner.index.tolist(), partner.view.tolist(), strict=True))
    assert torch.equal(tensors(**options).__getitems__(keys).input, partner.input)


def test_stores_of_views_without_the_options_are_still_theirs():
    known = "ImageTensors 1 {'mean': 0.305, 'std': 0.318, 'seed': 0, 'padding': 1, 'flip': False, 'partners': False}"
    assert DigitsDataModule().fingerprint()["transform"] == known
    with_both = DigitsDataModule(cutout=3, randaugment=RandAugment()).fingerprint()["transform"]
    assert with_both == known[:-1] + ", 'cutout': 3, 'randaugment': RandAugment(operations=2, magnitude=9)}"


def test_a_negative_square_is_refused():
    with pytest.raises(InputError, match="cutout is a square's side in pixels, 0 for none, got -1"):
        DigitsDataModule(cutout=-1)


# In files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for part, count in (("train", 14), ("val", 3)):
        (folder / part / "cat").mkdir(parents=True)
        for number in range(count):
            fields = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(fields.repeat(4, axis=0).repeat(4, axis=1)).save(folder / part / "cat" / f"{number}.png")
    return folder


def files(folder, **options):
    defaults = {"image_size": 16, "resize_size": 18, "val_size": 2, "mean": MEAN, "std": STD, "num_workers": 0}
    return ImageFolderDataModule(data_dir=folder, **(defaults | options))


def views(folder, **options):
    return files(folder, **options).dataset("train", augment=True)


def test_files_are_changed_by_randaugment_then_the_jitter_then_the_lighting(folder):
    augment, jitter, lighting = RandAugment(2, 12), ColorJitter(hue=0.1), Lighting(0.2)
    plain = views(folder).__getitems__(KEYS).input
    found = views(folder, randaugment=augment, color_jitter=jitter, lighting=lighting).__getitems__(KEYS).input
    # The flip and ten trials of a crop have the first 41 numbers.
    changed = augment(bytes_of(plain), draws_of(4, first=52))
    changed = jitter(changed, draws_of(8, first=41)).float() / 255
    changed = lighting(changed, draws_of(3, first=49))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose(found, (changed - mean) / std, atol=1e-5)
    assert (found != plain).flatten(1).any(dim=1).all()


@pytest.mark.parametrize(
    "option", [{"randaugment": RandAugment()}, {"color_jitter": ColorJitter()}, {"lighting": Lighting()}]
)
def test_an_option_changes_training_views_and_their_fingerprint_alone(folder, option):
    plain, changed = files(folder), files(folder, **option)
    assert not torch.equal(
        plain.dataset("train", augment=True)[0].input, changed.dataset("train", augment=True)[0].input
    )
    for split in ("train", "val", "test"):
        assert torch.equal(plain.dataset(split)[0].input, changed.dataset(split)[0].input)
    assert plain.fingerprint()["data"] == changed.fingerprint()["data"]
    ((name, choice),) = option.items()
    known = "'image_size': 16, 'crop_scale': (0.08, 1.0), 'crop_ratio': (0.75, 1.3333333333333333), 'flip': True, "
    assert plain.fingerprint()["transform"].endswith(f"{known}'partners': False}}")
    assert changed.fingerprint()["transform"] == plain.fingerprint()["transform"][:-1] + f", '{name}': {choice}}}"


def test_views_of_files_are_the_same_in_any_batch(folder):
    every = {"randaugment": RandAugment(3, 9), "color_jitter": ColorJitter(hue=0.2), "lighting": Lighting()}
    assert same_alone_and_together(views(folder, **every))


def test_a_damaged_image_stays_of_the_mean_colour(folder, tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "train" / "cat" / f"{number}.png").write_bytes(b"no image")
    (tmp_path / "val").symlink_to(folder / "val")
    dataset = views(tmp_path, on_damaged="skip", lighting=Lighting(), color_jitter=ColorJitter())
    batch = dataset.__getitems__([(0, 0), (1, 2)])
    assert not batch.counted.any()
    assert not batch.input.any()


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (380, 434)])
def test_the_sizes_of_meal_v2_are_read(folder, size, resize):
    data = files(folder, image_size=size, resize_size=resize, batch_size=2)
    assert data.input_shape == (3, size, size)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader)).input.shape == (2, 3, size, size)
