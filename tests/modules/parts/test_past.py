"""Where a network's past comes from: what is refused, where it is kept, what a checkpoint holds of the choice."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill_lightning import InputError, MovingAverage, PastModel, SelfKDModule, StoredPast
from distill_lightning.choices import from_plain, plain
from distill_lightning.modules.parts.past import RunningPast
from distill_lightning.modules.parts.past_network import AveragedNetwork, PastNetwork
from distill_lightning.storage import PredictionStore
from distill_lightning.testing import TinyNet


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (StoredPast, {"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (StoredPast, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (StoredPast, {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        (StoredPast, {"in_checkpoint": -1}, "in_checkpoint cannot be negative, got -1: 0 keeps every store in files"),
        (StoredPast, {"keep": 1}, "keep must be at least 2, .* got 1"),
        (StoredPast, {"device": "somewhere"}, "device='somewhere': "),
        (PastModel, {"refresh_epochs": 0}, "refresh_epochs must be at least 1, got 0"),
        (MovingAverage, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        (MovingAverage, {"decay": -0.1}, r"decay must be in \[0, 1\), got -0.1"),
    ],
)
def test_refusals_name_the_class_and_what_is_wrong(kind, options, message):
    with pytest.raises(InputError, match=f"{kind.__name__}: {message}") as error:
        kind(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "past",
    [StoredPast(), StoredPast("float16", 2, "cpu", 0, "rows", 3, 9), PastModel(4), MovingAverage(0.5)],
    ids=lambda past: type(past).__name__,
)
def test_a_past_is_an_immutable_description_that_a_checkpoint_holds(past):
    assert from_plain(plain(past)) == past
    with pytest.raises(dataclasses.FrozenInstanceError):
        past.keep = 3
    # One description may serve several modules: each has a past of its own.
    assert past.start() is not past.start()


def module_of(past, trainer, **options):
    module = SelfKDModule(TinyNet(), num_classes=3, past=past)
    loader = SimpleNamespace(dataset=range(5))
    # Lightning 1.9 puts the loaders together.
    loader.loaders = loader
    module._trainer = SimpleNamespace(default_root_dir=".", local_rank=0, train_dataloader=loader, **trainer)
    return module


@pytest.mark.parametrize("given", [None, "cpu"])
def test_the_store_is_where_it_is_wanted_and_leaves_the_device_with_the_module(monkeypatch, given):
    moves = []

    def to(store, device):
        moves.append(str(device))
        return store

    monkeypatch.setattr(PredictionStore, "to", to)
    # As if the training were on another device.
    monkeypatch.setattr(SelfKDModule, "device", torch.device("meta"))
    trainer = {
        "fit_loop": SimpleNamespace(total_batch_idx=-1), "max_epochs": 2, "max_steps": -1, "max_time": None,
        "current_epoch": 0, "callbacks": [], "early_stopping_callbacks": [], "num_training_batches": 1,
    }  # fmt: skip
    module = module_of(StoredPast(device=given), trainer)
    module.on_train_start()
    module.on_fit_end()
    assert moves == [given or "meta", "cpu"]


def test_a_folder_that_cannot_be_mapped_is_refused(tmp_path):
    module = module_of(StoredPast(in_checkpoint=0), {})
    module.trainer.default_root_dir = "s3://runs"
    with pytest.raises(InputError, match="cannot map predictions in default_root_dir=s3://runs: name a local folder"):
        module.past.begin(module)
    module = module_of(StoredPast(in_checkpoint=0, folder=str(tmp_path), keep=3), {})
    module.trainer.local_rank = 1
    module.past.begin(module)
    sidecar = module.past.store.sidecar
    assert (sidecar.folder, sidecar.keep, sidecar.writes) == (tmp_path, 3, False)


def test_a_past_network_moves_with_what_it_is_told():
    past = PastNetwork(1)
    past.to("meta")
    past.after_epochs(0, 1, TinyNet())
    past.to("meta")
    assert {parameter.device.type for parameter in past.model.parameters()} == {"meta"}


def test_a_past_that_says_nothing_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        RunningPast("nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slow_average_moves_in_every_precision_and_goes_on_where_it_was(dtype):
    student = nn.BatchNorm1d(2).to(dtype)
    average = AveragedNetwork(decay=0.999)
    for value in (1.0, *[2.0] * 100):
        for tensor in (student.weight, student.running_mean):
            tensor.data.fill_(value)
        average.after_step(student)
    resumed = AveragedNetwork(decay=0.999)
    resumed.load_state_dict(average.state_dict(), student)
    for one in (average, resumed):
        for _ in range(50):
            one.after_step(student)
        for name in ("weight", "running_mean"):
            found = getattr(one.model, name)
            assert found.dtype == dtype
            assert found.tolist() == pytest.approx([2 - 0.999**150] * 2, rel=2**-8)
    assert all(torch.equal(a, b) for a, b in zip(average.buffers(), resumed.buffers(), strict=True))
    average.forget()
    assert not list(average.buffers())
