"""The contract's points about trainings: what they end with, and under which circumstances they run."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F  # its usual name

from distill_lightning.data.batch import Batch, Key
from distill_lightning.testing.points import (
    Build,
    data_of,
    fitted,
    kit_of,
    make,
    point,
    require,
    require_same,
    snapshot,
)
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy
from distill_lightning.testing.tiny import tiny_trainer
from distill_lightning.testing.waits import Wait, Waits


@point
def a_resumed_run_equals_the_uninterrupted_one(build: Build) -> None:
    """Bit for bit: weights, optimiser, whatever else the module keeps; the student draws random numbers on the way."""

    class StopAfterOne(pl.callbacks.Checkpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(path)
            trainer.should_stop = True

    def trained(*callbacks: pl.Callback, seed: int = 0, ckpt_path: str | None = None) -> tuple[Any, pl.Trainer]:
        module, _ = make(build, seed=seed)
        module.student.get_submodule(kit_of(build).part).register_forward_hook(_with_dropout)
        trainer = tiny_trainer(max_epochs=3, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=data_of(build), ckpt_path=ckpt_path)
        return module, trainer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.ckpt"
        whole, whole_trainer = trained()
        trained(StopAfterOne())
        # Another seed: everything that matters must come from the checkpoint.
        resumed, trainer = trained(seed=7, ckpt_path=str(path))
    require(trainer.current_epoch == whole_trainer.current_epoch == 3, "the resumed run did not go on to the end")
    require_same(snapshot(whole), snapshot(resumed), "after resuming")
    first, second = (run.optimizers[0].state_dict()["state"] for run in (whole_trainer, trainer))
    for key, state in first.items():
        require_same(
            {name: value for name, value in state.items() if isinstance(value, Tensor)},
            {name: value for name, value in second[key].items() if isinstance(value, Tensor)},
            f"after resuming, the optimiser's state {key}",
        )
    # The share of a term that has faded by then stands in the uninterrupted run alone.
    missing = whole_trainer.callback_metrics.keys() - trainer.callback_metrics.keys()
    lost = sorted(name for name in missing if not name.endswith("_share"))
    require(not lost, f"after resuming, {lost[:3]} are not logged")
    for name, value in trainer.callback_metrics.items():
        require(torch.equal(value, whole_trainer.callback_metrics[name]), f"after resuming, {name} differs")


def _with_dropout(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return F.dropout(output, 0.2, training=layer.training)


@point
def two_seeded_runs_agree(build: Build) -> None:
    """Bit for bit."""
    first, second = (fitted(build, seed=3, max_epochs=2)[0] for _ in range(2))
    require_same(snapshot(first), snapshot(second), "two runs with one seed")


@point
def the_logged_terms_sum_to_the_loss(build: Build) -> None:
    """``train/loss`` is the sum of ``train/<term>`` times its weight, and the shares sum to one."""
    weights: dict[str, float] = {}

    def look(_trainer: Any, pl_module: Any, *_: Any) -> None:
        weights.update(pl_module.weights())

    _, trainer = fitted(build, callbacks=[LambdaCallback(on_train_batch_end=look)])
    logged = trainer.callback_metrics
    total = sum(weight * float(logged[f"train/{name}"]) for name, weight in weights.items())
    loss = float(logged["train/loss"])
    require(abs(total - loss) <= 1e-5 * abs(loss), f"the terms sum to {total}, train/loss is {loss}")
    shares = [float(value) for name, value in logged.items() if name.endswith("_share")]
    require(not shares or abs(sum(shares) - 1) < 1e-5, f"the shares sum to {sum(shares)}")


@point
def accumulation_and_clipping_work(build: Build) -> None:
    """``accumulate_grad_batches`` and ``gradient_clip_val`` are the Trainer's and do what they say."""
    norms: list[float] = []

    def look(trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(norms):
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

    watch = LambdaCallback(on_train_batch_end=look)
    _, trainer = fitted(build, accumulate_grad_batches=2, gradient_clip_val=1e-3, callbacks=[watch])
    require(trainer.global_step == 2, f"3 batches, 2 accumulated: {trainer.global_step} optimiser steps, not 2")
    require(max(norms) <= 1.001e-3, f"gradients of norm {max(norms)} went past gradient_clip_val=1e-3")


@point
def one_sample_and_two_classes_work(build: Build) -> None:
    """A batch of one and the smallest number of classes."""
    fewest = kit_of(build).fewest_classes
    module, _ = make(build, num_classes=fewest)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=data_of(build, num_classes=fewest, samples=3, batch_size=1))
    require(bool(torch.isfinite(trainer.callback_metrics["train/loss"])), "the loss of single samples is not finite")


@point
def a_bf16_step_is_finite(build: Build) -> None:
    """Under ``precision="bf16-mixed"``."""
    module, trainer = fitted(build, precision="bf16-mixed")
    require(bool(torch.isfinite(trainer.callback_metrics["train/loss"])), "the loss is not finite")
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters()), "a parameter is not finite")


@point
def a_training_step_does_not_wait_for_the_device(build: Build) -> None:
    """No ``.item()``, no boolean mask as an index, in the loss, its gradient, or the optimiser's step; see `Waits`."""
    module, _ = make(build)
    step, prepare, waits = module.optimizer_step, module.prepared, Waits()

    def prepared(batch: Any, batch_idx: int = 0) -> Batch:
        # Where there is a device, the key stays behind on the host, and is another tensor than the index.
        batch.key = Key(batch.index.clone(), batch.view.clone())
        waits.keep_on_host(batch.key)
        return prepare(batch, batch_idx)

    def watched(*args: Any, **kwargs: Any) -> None:
        with waits:
            step(*args, **kwargs)

    # The loss and its gradient are computed within.
    module.optimizer_step = watched  # type: ignore[method-assign]
    module.prepared = prepared  # type: ignore[method-assign]
    tiny_trainer().fit(module, datamodule=data_of(build))
    found = [wait for wait in waits.found if not _packages(wait) & kit_of(build).waiting]
    told = "\n".join(f"{wait.what}:\n{wait.stack}" for wait in found)
    count = sum(waits.found[wait] for wait in found)
    require(not found, f"{count} hidden synchronisations in a step, {told}")


def _packages(wait: Wait) -> frozenset[str]:
    """The folders of the innermost line of a wait, the package that it is in among them."""
    places = re.findall(r'File "([^"]*)"', wait.stack)
    return frozenset(Path(places[-1]).parts) if places else frozenset()


@point
def two_processes_equal_one(build: Build) -> None:
    """Two gloo processes with half of each batch end, and validate, as one process with whole batches does."""
    alone, _ = make(build, norm="group")
    together = copy.deepcopy(alone)
    single = tiny_trainer(max_epochs=2)
    single.fit(alone, datamodule=data_of(build, batch_size=8, val_size=23))
    double = tiny_trainer(max_epochs=2, devices=2, strategy=process_strategy(), callbacks=[LeaveTheGroup()])
    double.fit(together, datamodule=data_of(build, batch_size=4, val_size=23))
    for name, value in single.callback_metrics.items():
        if name.endswith("_share"):
            continue  # a mean of ratios depends on how the samples are divided
        other = double.callback_metrics[name]
        close = torch.allclose(value, other, rtol=1e-3, atol=1e-4)
        require(close, f"two processes log another {name} than one: {other} and {value}")
    for name, value in alone.state_dict().items():
        other = together.state_dict()[name]
        close = torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-5)
        require(close, f"two processes end elsewhere than one: {name} by {(value - other).abs().max()}")
