"""Every training batch tells which sample each of its rows is, whatever the data module does."""

import copy
import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from distill_lightning import Batch, DigitsDataModule, IndexedDataModule, InputError, SelfKDModule
from distill_lightning.cli import main
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

N = 13


class Numbers(Dataset):
    """Sample ``i`` is the number ``10 * i``, so an index can be read off an input."""

    def __init__(self, make=lambda x: (x, x.long() % 3)):
        self.make = make

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.make(torch.tensor([10.0 * index]))


def pair(x):
    return x, x.long()[0] % 3


def with_more(x):
    return [x, x.long()[0] % 3, "a name", x]


def keyed(x):
    return {"image": x, "label": x.long()[0] % 3}


class Sample(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor
    index: int
    weather: int = 7


def named(x):
    return Sample(x, x.long()[0] % 3, -1)


class AtOnce(Numbers):
    """Gives a whole list of samples in one call."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class WholeBatch(Numbers):
    """Gives a whole batch in one call; there is nothing left to collate."""

    def __getitems__(self, indices):
        x = torch.tensor([[10.0 * index] for index in indices])
        return x, x.long()[:, 0] % 3


def as_it_is(batch):
    return batch


def turned(samples):
    """A collate_fn of a user."""
    x, y = default_collate(samples)
    return Batch(target=y, input=x)


class Data(pl.LightningDataModule):
    """A data module of someone who knows nothing of indices."""

    def __init__(self, dataset=None, **options):
        super().__init__()
        self.dataset = Numbers(pair) if dataset is None else dataset
        self.options = {"batch_size": 4} | options
        self.calls = []
        self.num_classes, self.input_shape = 3, (1,)

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {stage.value}")

    def teardown(self, stage):
        self.calls.append(f"teardown {stage.value}")

    def train_dataloader(self):
        return DataLoader(self.dataset, **self.options)

    def val_dataloader(self):
        return DataLoader(Numbers(pair), batch_size=5)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.calls.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self):
        return {"seen": len(self.calls)}

    def load_state_dict(self, state_dict):
        self.calls.append(f"load {state_dict}")


def batches(dataset=None, **options):
    return list(IndexedDataModule(Data(dataset, **options)).train_dataloader())


def inputs_and_index(batch):
    if isinstance(batch, dict):
        return batch["image"], batch["index"]
    return (batch.image, batch.index) if isinstance(batch, Sample) else (batch.input, batch.index)


def check(found, *, every=True):
    """Each index is that of its row; together they are all samples."""
    seen = []
    for batch in found:
        x, index = inputs_and_index(batch)
        assert index.dtype == torch.int64
        assert torch.equal(10.0 * index, x[:, 0])
        seen += index.tolist()
    if every:
        assert sorted(seen) == list(range(N))
    return seen


@pytest.mark.parametrize("make", [pair, with_more, keyed, named], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_kind_of_batch_gets_its_index(make, shuffle):
    found = batches(Numbers(make), shuffle=shuffle)
    seen = check(found)
    assert (seen == sorted(seen)) != shuffle
    assert [type(batch) for batch in found] == [{keyed: dict, named: Sample}.get(make, Batch)] * 4
    for batch in found:
        x, _ = inputs_and_index(batch)
        y = batch["label"] if make is keyed else Batch.of(batch).target
        assert torch.equal(y, x[:, 0].long() % 3)
        if make is named:
            assert set(batch.weather.tolist()) == {7}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 3, "collate_fn": turned},
        {"num_workers": 2, "shuffle": True},
        {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 3},
        {"sampler": list(reversed(range(N)))},
        {"batch_size": 1, "batch_sampler": BatchSampler(RandomSampler(range(N)), 5, drop_last=False)},
        {"batch_size": 1, "batch_sampler": [[0, 5, 12], [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]]},
        {"batch_size": None, "sampler": BatchSampler(RandomSampler(range(N)), 5, drop_last=False)},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("dataset", [Numbers, AtOnce, WholeBatch], ids=lambda dataset: dataset.__name__)
def test_every_kind_of_loader_keeps_its_way(dataset, options):
    if dataset is WholeBatch:
        options = options | {"collate_fn": as_it_is}
    if options.get("batch_size", 1) is None:
        dataset = OfLists
    found = batches(dataset(pair), **options)
    check(found)
    assert {type(batch) for batch in found} == {Batch}


class OfLists(Numbers):
    """Reads lists of indices, as a loader without batching asks for."""

    def __getitem__(self, indices):
        x = torch.tensor([[10.0 * index] for index in indices])
        return x, x.long()[:, 0] % 3


def test_some_samples_may_be_left_out_or_come_twice():
    assert len(check(batches(drop_last=True), every=False)) == 12
    weights = [1.0, 0, 0, 1] + [0.0] * 9
    seen = check(batches(sampler=WeightedRandomSampler(weights, 20)), every=False)
    assert set(seen) == {0, 3}
    assert len(seen) == 20


def test_the_order_is_that_of_the_loader_alone():
    for options in ({"shuffle": True}, {"shuffle": True, "generator": torch.Generator().manual_seed(3)}, {}):
        orders = []
        for wrap in (IndexedDataModule, as_it_is):
            torch.manual_seed(1)
            if "generator" in options:
                options["generator"].manual_seed(3)
            loader = wrap(Data(**options)).train_dataloader()
            orders.append([[Batch.of(batch).input.tolist() for batch in loader] for _ in range(2)])
        assert orders[0] == orders[1]


def test_a_subset_counts_its_own_positions():
    found = batches(Subset(Numbers(pair), [7, 3, 11]), batch_size=2)
    assert [batch.index.tolist() for batch in found] == [[0, 1], [2]]
    assert [batch.input[:, 0].tolist() for batch in found] == [[70, 30], [110]]


def test_all_options_of_the_loader_are_kept():
    given = {
        "batch_size": 3, "num_workers": 2, "drop_last": True, "timeout": 5, "worker_init_fn": seed_worker,
        "multiprocessing_context": "spawn", "generator": torch.Generator(), "prefetch_factor": 4,
        "persistent_workers": True, "pin_memory": True, "in_order": False,
    }  # fmt: skip
    data = Data(**given)
    plain, loader = data.train_dataloader(), IndexedDataModule(data).train_dataloader()
    for name in given:
        assert getattr(loader, name) == getattr(plain, name), name
    assert loader.sampler.data_source is data.dataset
    assert (len(loader), len(loader.dataset), loader.dataset.make) == (4, N, pair)
    assert loader.dataset[2] == (torch.tensor([20.0]), torch.tensor(2))


def seed_worker(worker):
    torch.manual_seed(worker)


def test_our_own_batches_keep_what_they_tell():
    data = TinyDataModule(samples=10, batch_size=4)
    wrapped = IndexedDataModule(TinyDataModule(samples=10, batch_size=4))
    for module in (data, wrapped):
        module.setup("fit")
    found = [[list(batch) for batch in module.train_dataloader()] for module in (data, wrapped)]
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Loader(DataLoader):
    """A loader of a user, with an option of its own."""

    def __init__(self, dataset, repeat=1, **options):
        super().__init__(dataset, **options)
        self.repeat = repeat

    def __iter__(self):
        for batch in super().__iter__():
            yield from [batch] * self.repeat


class Forgetful(Loader):
    def __init__(self, dataset, times=1, **options):
        super().__init__(dataset, repeat=times, **options)


class Narrow(DataLoader):
    def __init__(self, dataset):
        super().__init__(dataset, batch_size=4)


class Of(Data):
    """Whatever loader is given."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


def test_a_loader_of_a_users_class_stays_one():
    loader = IndexedDataModule(Of(Loader(Numbers(pair), repeat=2, batch_size=4))).train_dataloader()
    assert type(loader) is Loader
    assert len(check(loader, every=False)) == 2 * N


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


class ByName(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, name):
        return torch.zeros(1), 0


def shortened(samples):
    return default_collate(samples[1:])


def shortened_batch(samples):
    return Batch(*shortened(samples))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Endless()), "Endless is an IterableDataset, whose samples have no index"),
        ([DataLoader(Numbers(pair))], "needs one DataLoader for training, got list"),
        (Forgetful(Numbers(pair), times=2), "cannot build the Forgetful again, which does not keep its times"),
        (Narrow(Numbers(pair)), "cannot build a Narrow with DataLoader's arguments"),
        (DataLoader(ByName(), sampler=["a", "b"]), "not indexed by integers, but by str"),
        (DataLoader(Numbers(pair), batch_size=None), "a data set that yields whole batches cannot tell their samples"),
        (DataLoader(Numbers(pair), batch_size=4, collate_fn=shortened), "4 samples became a batch of 3"),
        (DataLoader(Numbers(pair), batch_size=4, collate_fn=shortened_batch), "4 samples became a batch of 3"),
        (DataLoader(Numbers(lambda x: x), batch_size=4), "a batch must be a Batch, a dict, or a"),
    ],
)
def test_what_has_no_index_is_refused(loader, message):
    with pytest.raises(InputError, match=message):
        list(IndexedDataModule(Of(loader)).train_dataloader())


# Everything else is the data module's


def test_attributes_are_read_and_set_through_it():
    data = Data()
    wrapped = IndexedDataModule(data)
    assert (wrapped.num_classes, wrapped.options, wrapped.trainer) == (3, {"batch_size": 4}, None)
    wrapped.options = {"batch_size": 6}
    wrapped.trainer = "the trainer"
    assert (data.options, data.trainer) == ({"batch_size": 6}, "the trainer")
    assert len(wrapped.train_dataloader()) == 3
    with pytest.raises(AttributeError, match="nonsense"):
        wrapped.nonsense  # noqa: B018
    for other in (copy.deepcopy(IndexedDataModule(Data())), pickle.loads(pickle.dumps(IndexedDataModule(Data())))):
        assert other.setup.__self__ is other.datamodule
        assert other.num_classes == 3


class Noting(pl.LightningModule):
    """Writes down what it is trained with."""

    def __init__(self, folder=None):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.folder = folder
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.input[:, 0].tolist(), batch.index.tolist()))
        return self.layer(batch.input).mean()

    def validation_step(self, batch, batch_idx):
        assert type(batch) is list

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_end(self):
        if self.folder:
            torch.save(self.seen, Path(self.folder) / f"{self.global_rank}.pt")


def test_a_trainer_calls_the_data_modules_hooks(tmp_path):
    wrapped, module = IndexedDataModule(Data()), Noting()
    trainer = tiny_trainer(num_sanity_val_steps=0)
    trainer.fit(module, datamodule=wrapped)
    assert wrapped.calls == ["prepare_data", "setup fit", *["transfer"] * 7, "teardown fit"]
    assert wrapped.datamodule.trainer is trainer
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = IndexedDataModule(Data())
    tiny_trainer(max_epochs=2).fit(module, datamodule=again, ckpt_path=str(tmp_path / "run.ckpt"))
    assert again.calls[2] == "load {'seen': 10}"


class TrainOnly(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Numbers(pair), batch_size=4)


def test_what_the_data_module_does_not_have_is_not_invented():
    trainer = tiny_trainer()
    with pytest.warns(UserWarning, match="have no `val_dataloader`"):
        trainer.fit(Noting(), datamodule=IndexedDataModule(TrainOnly()))
    assert trainer.num_val_batches == []


@pytest.mark.slow
def test_two_processes_with_lightnings_own_sampler_get_the_right_indices(tmp_path, start_method):
    data = IndexedDataModule(Data(TensorDataset(10.0 * torch.arange(N)[:, None], torch.zeros(N)), shuffle=True))
    tiny_trainer(devices=2, strategy=f"ddp_{start_method}", max_epochs=2).fit(Noting(str(tmp_path)), datamodule=data)
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for x, index in seen[0] + seen[1]:
        assert x == [10.0 * number for number in index]
    for epoch in (slice(0, 2), slice(2, 4)):
        # 13 samples for two processes: one comes twice.
        indices = [number for rank in (0, 1) for _, index in seen[rank][epoch] for number in index]
        assert len(indices) == N + 1
        assert set(indices) == set(range(N))


def test_overfitting_a_few_batches_keeps_the_indices():
    module = Noting()
    with pytest.warns(UserWarning, match="You requested to overfit"):
        tiny_trainer(overfit_batches=2).fit(module, datamodule=IndexedDataModule(Data(shuffle=True)))
    assert [index for _, index in module.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class Foreign(pl.LightningDataModule):
    """Images as anyone would have them."""

    num_classes, input_shape = 3, (1, 8, 8)

    def train_dataloader(self):
        return DataLoader(self.images(), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.images(), batch_size=4)

    def images(self):
        return TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3)


def test_self_kd_trains_on_it():
    module = SelfKDModule(TinyNet(), num_classes=3)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=IndexedDataModule(Foreign()))
    assert float(trainer.callback_metrics["train/known_fraction"]) == 1
    with pytest.raises(InputError, match=r"wrap the data in IndexedDataModule\(datamodule\)"):
        tiny_trainer(max_epochs=2).fit(SelfKDModule(TinyNet(), num_classes=3), datamodule=Foreign())


@pytest.mark.slow
def test_the_command_line_builds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = main(
        ["fit", "--model", "SelfKDModule", "--model.student", "SmallResNet", "--model.student.num_classes", "10",
         "--data", "IndexedDataModule", "--data.datamodule", "DigitsDataModule", "--data.datamodule.subset", "64",
         "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    )  # fmt: skip
    assert status == 0
    assert DigitsDataModule.num_classes == 10
