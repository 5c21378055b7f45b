"""Real inputs without labels: which they are, and what is done with them."""

import pytest
import torch
from torch.utils.data import TensorDataset

from distill_lightning import DigitsDataModule, InputError, UnlabelledSampler
from distill_lightning.data.batch import Batch
from distill_lightning.data.views import Draws, uniform_draws


def draws_of(rows, seed=5):
    return Draws(seed, torch.arange(rows) * 3, torch.arange(rows) % 4)


def test_the_rest_is_what_the_subset_leaves_of_the_training_images():
    data = DigitsDataModule(subset=100)
    whole = DigitsDataModule().dataset("train")
    train, rest = data.dataset("train"), data.dataset("rest")
    assert torch.equal(torch.cat([train.images, rest.images]), whole.images)
    assert torch.equal(torch.cat([train.targets, rest.targets]), whole.targets)
    assert not len(DigitsDataModule().dataset("rest"))


def test_each_row_gets_the_sample_of_its_draw_in_its_own_view():
    data = DigitsDataModule(subset=100)
    rest = data.dataset("rest", augment=True)
    found = UnlabelledSampler(data)(torch.zeros(6, 1, 16, 16), draws_of(6))
    index, view = torch.arange(6) * 3, torch.arange(6) % 4
    for row, place in enumerate(uniform_draws(5, index, view, 1)[:, 0].tolist()):
        expected = rest[int(place * len(rest)), int(view[row])].input
        assert torch.equal(found[row], expected)


def test_all_samples_come_in_time():
    data = DigitsDataModule(subset=900)
    sampler = UnlabelledSampler(data)
    assert len(sampler.samples) == 100
    sampler.samples.make = lambda index, view: Batch(index[:, None].float())
    index = torch.arange(900)
    seen = torch.cat(
        [sampler(torch.zeros(900, 1), Draws(0, index, torch.full_like(index, view))) for view in range(20)]
    )
    counts = seen.long().flatten().bincount(minlength=100)
    # 180 are expected of each; the standard deviation is 13.
    assert counts.min() > 120
    assert counts.max() < 240


def test_it_keeps_the_batch_s_type_and_gives_as_many_rows_as_there_are_draws():
    sampler = UnlabelledSampler(DigitsDataModule(subset=100))
    assert sampler(torch.zeros(2, 1, 16, 16, dtype=torch.float64), draws_of(5)).dtype == torch.float64
    assert sampler(torch.zeros(2, 1, 16, 16), draws_of(5)).shape == (5, 1, 16, 16)


def test_another_split_and_another_set_tell_themselves_apart():
    every = [DigitsDataModule(subset=100), DigitsDataModule(subset=200), DigitsDataModule(subset=100, padding=2)]
    told = {repr(UnlabelledSampler(data)) for data in every} | {repr(UnlabelledSampler(every[0], split="val"))}
    assert len(told) == 4
    assert repr(UnlabelledSampler(DigitsDataModule(subset=100))) == repr(
        UnlabelledSampler(DigitsDataModule(subset=100))
    )


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(InputError, match="DigitsDataModule has no samples in its split 'rest': set its subset"):
        UnlabelledSampler(DigitsDataModule())(torch.zeros(2, 1, 16, 16), draws_of(2))
    with pytest.raises(InputError, match=r"samples of shape \(1, 8, 8\), the training's have \(1, 16, 16\)"):
        UnlabelledSampler(DigitsDataModule(subset=9, image_size=8))(torch.zeros(2, 1, 16, 16), draws_of(2))
    for split in ("unlabelled", "val_2"):
        with pytest.raises(InputError, match=f"UnlabelledSampler: DigitsDataModule has no split '{split}'"):
            UnlabelledSampler(DigitsDataModule(), split=split)(torch.zeros(2, 1, 16, 16), draws_of(2))
    with pytest.raises(InputError, match="data must be a ViewDataModule.*got TensorDataset"):
        UnlabelledSampler(TensorDataset(torch.zeros(2)))
