"""Image sets in memory: splits, views, orders and batches."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.connectors import data_connector
from torch.utils.data import DataLoader

from distill_lightning import (
    Batch,
    IndexedDataModule,
    InMemoryImageDataModule,
    InputError,
    RandAugment,
    SupervisedModule,
)
from distill_lightning.data.datamodules import Images, ImageTensors, ResumableLoader, ViewSampler
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

TRAIN, TEST = 120, 30


class Numbered(InMemoryImageDataModule):
    """Every image is its own number: the training files hold 0 to 119, the test files 1000 to 1029."""

    num_classes = 3
    input_shape = (1, 6, 6)
    class_names = ("a", "b", "c")
    mean = 0.25
    std = 0.5
    reads = 0

    def read(self):
        self.reads += 1
        return numbered(range(TRAIN)), numbered(range(1000, 1000 + TEST))


def numbered(numbers):
    """Images whose first pixels are their number in base 200, the rest noise without zeros."""
    numbers = torch.tensor(list(numbers))
    noise = torch.randint(1, 256, (len(numbers), 1, 6, 6), generator=torch.Generator().manual_seed(0))
    noise[:, 0, 0, 0], noise[:, 0, 0, 1] = numbers // 200, numbers % 200
    return Images(noise.to(torch.uint8), numbers % 3)


def numbers_of(images):
    return (images[:, 0, 0, 0].long() * 200 + images[:, 0, 0, 1].long()).tolist()


def data_of(**arguments):
    data = Numbered(**({"val_size": 20, "batch_size": 16} | arguments))
    data.setup()
    return data


def split_numbers(data, split):
    return numbers_of(data.dataset(split).images)


def epoch_of(data, epoch=0):
    """One epoch of training batches, joined."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return joined(loader)


def joined(loader):
    return Batch(*(torch.cat(parts) for parts in zip(*loader, strict=True)))


def by_index(batch):
    order = batch.index.argsort()
    return Batch(*(part[order] for part in batch))


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# splits


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_splits_are_disjoint_and_exhaustive(seed):
    data = data_of(seed=seed)
    train, val, test = (split_numbers(data, split) for split in ("train", "val", "test"))
    assert len(val) == 20
    assert sorted(train + val) == list(range(TRAIN))
    assert test == list(range(1000, 1000 + TEST))


def test_images_keep_their_targets():
    data = data_of(subset=50)
    for split in ("train", "val", "test"):
        assert data.dataset(split).targets.tolist() == [number % 3 for number in split_numbers(data, split)]


def test_the_same_seed_splits_the_same_and_another_seed_otherwise():
    first, again, other = data_of(seed=3), data_of(seed=3), data_of(seed=4)
    for split in ("train", "val"):
        assert split_numbers(first, split) == split_numbers(again, split)
        assert set(split_numbers(first, split)) != set(split_numbers(other, split))


def test_the_split_does_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    first = split_numbers(data_of(), "train")
    torch.manual_seed(1)
    assert split_numbers(data_of(), "train") == first


def test_smaller_subsets_are_part_of_larger_ones_and_leave_validation_alone():
    subsets = [data_of(subset=size) for size in (1, 10, 60, 100, None)]
    numbers = [split_numbers(data, "train") for data in subsets]
    assert [len(part) for part in numbers] == [1, 10, 60, 100, 100]
    for smaller, larger in itertools.pairwise(numbers):
        assert larger[: len(smaller)] == smaller
    assert len({tuple(split_numbers(data, "val")) for data in subsets}) == 1


def test_the_test_images_are_the_first_ones():
    assert split_numbers(data_of(test_size=7), "test") == list(range(1000, 1007))
    assert split_numbers(data_of(test_size=TEST), "test") == list(range(1000, 1000 + TEST))


def test_a_second_setup_reads_nothing():
    data = data_of()
    data.setup("fit")
    data.setup("test")
    data.dataset("train")
    assert data.reads == 1


def test_a_dataset_sets_up_by_itself():
    assert len(Numbered(val_size=20).dataset("train")) == 100


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize(
    ("name", "least"), [("subset", 1), ("val_size", 0), ("test_size", 1), ("batch_size", 1), ("views", 1)]
)
def test_a_size_that_is_too_small_is_refused(name, least, size):
    size += least - 1
    with pytest.raises(
        InputError, match=f"{name} must be at least {least}, got {size}: the split or batch would be empty"
    ):
        Numbered(**({"val_size": 20} | {name: size}))


@pytest.mark.parametrize("name", ["padding", "num_workers"])
def test_a_negative_padding_or_number_of_workers_is_refused(name):
    with pytest.raises(InputError, match=rf"{name} cannot be negative, got -1"):
        Numbered(val_size=20, **{name: -1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_size": TRAIN}, "Numbered: val_size=120 leaves none of 120 images to train on"),
        ({"val_size": TRAIN + 1}, "Numbered: val_size=121 leaves none of 120 images"),
        ({"subset": 101}, "Numbered: subset=101 is larger than the 100 training images that val_size=20 leaves"),
        ({"test_size": TEST + 1}, "Numbered: test_size=31 is larger than the 30 test images"),
    ],
)
def test_a_split_larger_than_the_data_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        data_of(**arguments)


def test_the_largest_splits_that_fit_are_accepted():
    data = data_of(val_size=TRAIN - 1, subset=1, test_size=TEST)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [1, TRAIN - 1, TEST]


def test_a_data_module_without_read_says_so():
    with pytest.raises(NotImplementedError, match=r"InMemoryImageDataModule must define read\(\)"):
        InMemoryImageDataModule(val_size=1).setup()


# batches


def test_a_batch_has_the_documented_types_and_shapes():
    batch = next(iter(data_of().train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.partner is None
    assert [part.dtype for part in batch] == [torch.float32, torch.int64, torch.int64, torch.int64]
    assert [tuple(part.shape) for part in batch] == [(16, 1, 6, 6), (16,), (16,), (16,)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_validation_and_test_give_every_plain_image_once_in_order(split):
    data = data_of(padding=2, flip=True)
    loaders = {"val": data.val_dataloader, "test": data.test_dataloader}
    batch = joined(loaders[split]())
    pixels = data.dataset(split).images
    assert batch.index.tolist() == list(range(len(pixels)))
    assert batch.view.tolist() == [0] * len(pixels)
    assert torch.equal(batch.target, data.dataset(split).targets)
    expected = [(pixel / 255 - 0.25) / 0.5 for pixel in pixels.flatten().tolist()]
    assert batch.input.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_prediction_reads_the_test_images():
    data = data_of()
    assert same(joined(data.predict_dataloader()), joined(data.test_dataloader()))


def test_training_gives_every_image_once_with_its_target_and_index():
    data = data_of()
    batch = by_index(epoch_of(data))
    assert batch.index.tolist() == list(range(100))
    assert torch.equal(batch.target, data.dataset("train").targets)


def test_training_without_padding_and_flip_gives_the_plain_images():
    data = data_of(padding=0, flip=False)
    plain = data.dataset("train")
    expected = (plain.images.double() / 255 - 0.25) / 0.5
    assert torch.allclose(by_index(epoch_of(data)).input.double(), expected, atol=1e-6)


def test_the_padding_of_a_view_is_a_black_pixel_normalised():
    white = Images(torch.full((30, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(30, dtype=torch.long))
    dataset = ImageTensors(white, mean=0.25, std=0.5, padding=2)
    inputs = dataset.__getitems__([(index, 0) for index in range(30)]).input
    assert inputs.unique().tolist() == pytest.approx([(0 - 0.25) / 0.5, (1 - 0.25) / 0.5])


def test_views_may_be_mirrored_without_a_crop():
    data = data_of(padding=0, flip=True)
    plain, batch = data.dataset("train"), by_index(epoch_of(data))
    expected = (plain.images / 255 - 0.25) / 0.5
    kept = (batch.input == expected).flatten(1).all(1)
    mirrored = (batch.input == expected.flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 30 < mirrored.sum().item() < 70


def test_the_last_batch_is_smaller_and_not_dropped():
    assert [len(batch.target) for batch in data_of().train_dataloader()] == [16] * 6 + [4]


# views


def test_another_epoch_gives_other_views_of_the_same_images():
    data = data_of(flip=True)
    first, second = by_index(epoch_of(data, 0)), by_index(epoch_of(data, 1))
    assert first.view.tolist() == [0] * 100
    assert second.view.tolist() == [1] * 100
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.target, second.target)
    different = (first.input != second.input).flatten(1).any(1)
    assert different.float().mean().item() > 0.8


def test_the_same_epoch_again_is_bit_identical():
    assert same(epoch_of(data_of(flip=True), 5), epoch_of(data_of(flip=True), 5))


def test_two_views_repeat_the_first_at_epoch_2_bit_identically():
    data = data_of(views=2, flip=True)
    epochs = [by_index(epoch_of(data, epoch)) for epoch in range(4)]
    assert [epoch.view.unique().tolist() for epoch in epochs] == [[0], [1], [0], [1]]
    assert same(epochs[0], epochs[2])
    assert same(epochs[1], epochs[3])
    assert not torch.equal(epochs[0].input, epochs[1].input)


def test_the_order_of_a_repeated_view_is_drawn_anew():
    data = data_of(views=2)
    assert not torch.equal(epoch_of(data, 0).index, epoch_of(data, 2).index)


def test_one_view_is_the_same_in_every_epoch():
    data = data_of(views=1, flip=True)
    assert same(by_index(epoch_of(data, 0)), by_index(epoch_of(data, 7)))


def test_the_first_of_several_views_is_the_first_of_endless_ones():
    assert same(epoch_of(data_of(views=None)), epoch_of(data_of(views=3)))


def test_views_do_not_depend_on_the_batch_size():
    small, large = (by_index(epoch_of(data_of(batch_size=size, flip=True), 3)) for size in (7, 100))
    assert same(small, large)


def test_another_seed_gives_other_views_of_an_image():
    images = numbered(range(50))
    keys = [(index, 0) for index in range(50)]
    first, second = (
        ImageTensors(images, mean=0.0, std=1.0, seed=seed, padding=2, flip=True).__getitems__(keys) for seed in (0, 1)
    )
    different = (first.input != second.input).flatten(1).any(1)
    assert different.float().mean().item() > 0.8


def test_one_sample_is_a_row_of_the_batch():
    dataset = data_of(flip=True).dataset("train", augment=True)
    batch = dataset.__getitems__([(3, 1), (9, 0), (3, 2)])
    for row, key in enumerate([(3, 1), (9, 0), (3, 2)]):
        sample = dataset[key]
        assert isinstance(sample, Batch)
        assert same(sample, [part[row] for part in batch])
    assert batch.index.tolist() == [3, 9, 3]
    assert batch.view.tolist() == [1, 0, 2]


def test_making_a_batch_does_not_change_the_images():
    data = data_of(flip=True)
    before = data.dataset("train").images.clone()
    epoch_of(data)
    assert torch.equal(data.dataset("train").images, before)


def test_two_workers_give_the_batches_of_none():
    alone, helped = (data_of(num_workers=workers, flip=True, subset=40) for workers in (0, 2))
    loaders = [alone.train_dataloader(), helped.train_dataloader()]
    for epoch in (0, 1):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        assert len(batches[0]) == len(batches[1]) == 3
        assert all(same(one, other) for one, other in zip(*batches, strict=True))


# orders


def test_the_order_seed_changes_the_order_and_nothing_else():
    first, second = (epoch_of(data_of(order_seed=seed, flip=True), 2) for seed in (0, 1))
    assert not torch.equal(first.index, second.index)
    assert same(by_index(first), by_index(second))


def test_the_order_follows_the_seed_where_no_order_seed_is_given():
    assert same(epoch_of(data_of(seed=5)), epoch_of(data_of(seed=5, order_seed=5)))
    assert not torch.equal(epoch_of(data_of(seed=5)).index, epoch_of(data_of(seed=5, order_seed=0)).index)


def test_partners_are_functions_of_the_view_alone():
    data = TinyDataModule()
    data.partners = True
    dataset = data.dataset("train", augment=True)
    keys = [(index, view) for index in (3, 0, 17) for view in (0, 5)]
    whole = dataset.__getitems__(keys)
    for row, key in enumerate(keys):
        alone = dataset[key]
        for part, single in zip(whole.partner, alone.partner, strict=True):
            assert torch.equal(part[row], single)
    # A partner is the very view that its own key gives.
    plain = TinyDataModule().dataset("train", augment=True)
    pairs = list(zip(whole.partner.index.tolist(), whole.partner.view.tolist(), strict=True))
    expected = plain.__getitems__(pairs)
    assert all(torch.equal(part, other) for part, other in zip(whole.partner, expected, strict=True))
    assert whole.partner.view.tolist() == whole.view.tolist()
    assert torch.equal(whole.input, plain.__getitems__(keys).input)


@pytest.mark.parametrize(
    "keys",
    [
        [3, 9],
        list(np.array([3, 9])),
        np.array([3, 9]),
        torch.tensor([3, 9]),
        [(np.int64(3), np.int64(0)), [9, 0]],
        [(torch.tensor(3), torch.tensor(0)), (9, 0)],
    ],
    ids=["int", "numpy", "array", "tensor", "pairs of numpy", "pairs of tensors"],
)
def test_a_sampler_may_yield_indices_of_any_integer_type(keys):
    dataset = TinyDataModule().dataset("train", augment=True)
    batch = dataset.__getitems__(keys)
    assert same(batch, dataset.__getitems__([(3, 0), (9, 0)]))
    assert batch.counted is None
    assert torch.equal(dataset[keys[1]].input, batch.input[1])


def test_a_loader_takes_a_sampler_of_numpy_indices():
    dataset = TinyDataModule().dataset("train")
    loader = DataLoader(
        dataset, batch_size=4, sampler=np.random.default_rng(0).permutation(24), collate_fn=lambda batch: batch
    )
    index = torch.cat([batch.index for batch in loader])
    assert index.tolist() == np.random.default_rng(0).permutation(24).tolist()


def test_every_sample_is_about_as_often_a_partner():
    data = TinyDataModule()
    data.partners = True
    dataset = data.dataset("train", augment=True)
    partners = torch.cat([dataset.__getitems__([(i, view) for i in range(24)]).partner.index for view in range(200)])
    counts = partners.bincount(minlength=24)
    # 4800 draws of 24: a standard deviation of 14 around 200.
    assert ((counts - 200).abs() < 60).all()


def test_without_augmentation_and_unless_asked_for_there_are_no_partners():
    data = TinyDataModule()
    assert data.dataset("train", augment=True)[0, 0].partner is None
    data.partners = True
    assert next(iter(data.val_dataloader())).partner is None
    assert next(iter(data.train_dataloader())).partner is not None


def test_the_fingerprint_tells_samples_their_order_and_the_views_apart():
    def of(change=None, **options):
        data = TinyDataModule(**options)
        if change:
            setattr(data, *change)
        return data.fingerprint()

    assert of() == of()
    assert of(("order_seed", 5)) == of() == of(("batch_size", 3)) == of(views=4)
    assert of(samples=20)["data"] != of()["data"]
    changes = [("padding", 2), ("flip", True), ("partners", True), ("mean", 0.3), ("std", 0.5), ("mean", (0.3,))]
    for change in [*changes, ("cutout", 3), ("randaugment", RandAugment()), ("randaugment", RandAugment(1))]:
        assert of(change)["data"] == of()["data"]
        assert of(change)["transform"] != of()["transform"]
    assert of(seed=1)["transform"] != of()["transform"]


def test_every_epoch_has_its_own_order():
    orders = {tuple(epoch_of(data_of(), epoch).index.tolist()) for epoch in range(5)}
    assert len(orders) == 5


def test_neighbouring_order_seeds_do_not_repeat_each_others_orders():
    orders = {
        tuple(epoch_of(data_of(order_seed=seed), epoch).index.tolist()) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


# ViewSampler


def sampled(length, *, epoch=0, views=None, shuffle=True, seed=3, replicas=1, rank=0):
    sampler = ViewSampler(range(length), views=views, shuffle=shuffle, seed=seed, num_replicas=replicas, rank=rank)
    sampler.set_epoch(epoch)
    pairs = list(sampler)
    assert len(pairs) == len(sampler)
    return pairs


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("shuffle", [False, True])
def test_two_replicas_share_out_the_permutation_of_one(epoch, shuffle):
    whole = sampled(10, epoch=epoch, shuffle=shuffle)
    shares = [sampled(10, epoch=epoch, shuffle=shuffle, replicas=2, rank=rank) for rank in (0, 1)]
    assert not set(shares[0]) & set(shares[1])
    assert [pair for pairs in zip(*shares, strict=True) for pair in pairs] == whole


def test_two_replicas_of_an_odd_number_miss_no_sample():
    shares = [sampled(11, replicas=2, rank=rank) for rank in (0, 1)]
    assert [len(share) for share in shares] == [6, 6]
    assert {index for share in shares for index, _ in share} == set(range(11))


@pytest.mark.parametrize(("views", "expected"), [(None, [0, 1, 2, 3, 4]), (1, [0] * 5), (3, [0, 1, 2, 0, 1])])
def test_the_view_is_the_epoch_modulo_the_views(views, expected):
    found = [{view for _, view in sampled(6, epoch=epoch, views=views)} for epoch in range(5)]
    assert found == [{view} for view in expected]


def test_without_shuffling_the_order_ascends():
    assert sampled(5, shuffle=False, epoch=4, views=1) == [(index, 0) for index in range(5)]


def test_a_trainers_processes_get_their_shares():
    whole = epoch_of(data_of())
    shares = []
    for rank in (0, 1):
        data = data_of()
        data.trainer = SimpleNamespace(
            world_size=2, global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        shares.append(epoch_of(data))
    assert torch.equal(torch.stack([share.index for share in shares], dim=1).flatten(), whole.index)
    assert same(by_index(Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True)))), by_index(whole))


# Going on in the middle of an epoch


def resumable(batches=None, *, epoch=1, workers=0, **options):
    data = TinyDataModule(**options)
    data.num_workers = workers
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    given = [batch.index.tolist() for batch in itertools.islice(loader, batches)]
    return loader, given


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_goes_on_behind_the_batches_of_its_state(batches, workers):
    loader, given = resumable(batches)
    state = loader.state_dict()
    assert state == {"epoch": 1, "batches": batches, "batch_size": 8, "processes": 1}
    _, whole = resumable()
    other, _ = resumable(0, workers=workers)
    other.load_state_dict(state)
    # Lightning calls iter before it sets the epoch.
    other.sampler.set_epoch(0)
    iterator = iter(other)
    other.sampler.set_epoch(1)
    assert given + [batch.index.tolist() for batch in iterator] == whole
    assert other.state_dict() == {"epoch": 1, "batches": 3, "batch_size": 8, "processes": 1}
    # The next epoch is whole.
    assert [batch.index.tolist() for batch in other] == whole


def test_a_state_of_another_epoch_leaves_nothing_out():
    loader, _ = resumable(2)
    other, _ = resumable(0)
    other.load_state_dict(loader.state_dict())
    other.sampler.set_epoch(2)
    assert [batch.index.tolist() for batch in other] == resumable(epoch=2)[1]


def test_with_another_sampler_it_is_an_ordinary_loader():
    loader = resumable(0)[0]
    plain = ResumableLoader(loader.dataset, batch_size=8, collate_fn=loader.collate_fn)
    plain.load_state_dict({"epoch": 0, "batches": 2})
    assert [batch.index.tolist() for batch in plain] == [list(range(k, k + 8)) for k in (0, 8, 16)]
    assert plain.state_dict() == {"epoch": 0, "batches": 3, "batch_size": 8, "processes": 1}


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 12))
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_training_goes_on_from_any_step(tmp_path, step, wrapped):
    class Save(pl.callbacks.Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(0 if ckpt_path is None else 1)
        module = SupervisedModule(TinyNet(), num_classes=3)
        data = TinyDataModule(batch_size=6)
        trainer = tiny_trainer(max_epochs=3, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=IndexedDataModule(data) if wrapped else data, ckpt_path=ckpt_path)
        assert trainer.global_step == 12
        return module.state_dict()

    whole = fit(callbacks=[Save()])
    resumed = fit(tmp_path / "middle.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole if name.startswith("student."))


@pytest.mark.filterwarnings("error:.*does not have many workers")
def test_lightning_does_not_ask_for_workers_where_there_are_to_be_none(monkeypatch):
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda _: 8)
    tiny_trainer(limit_train_batches=1).fit(SupervisedModule(TinyNet(), num_classes=3), datamodule=TinyDataModule())
