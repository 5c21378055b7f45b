"""The contract that every module of the package keeps: one check per promise.

One long file, because the points are read, and broken, one by one.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn

from distill_lightning.data.batch import Batch, Key
from distill_lightning.modules import DistillationModule
from distill_lightning.networks.weights import read_weights
from distill_lightning.teachers import Frozen
from distill_lightning.testing.tiny import TinyDataModule, TinyNet, tiny_trainer
from distill_lightning.testing.waits import Waits


class Build(Protocol):
    """Makes the module under test.

    ::

        def build(student, teachers, num_classes):
            return MyModule(student, teachers, num_classes=num_classes)

    It must be a function at the top level of a file, not a lambda: other processes import it.

    A function with an attribute ``num_targets`` makes a regression: its networks give that many means and as many
    log-variances, and ``num_classes`` is ignored. One with an attribute ``partners`` gets training views with
    partners to be mixed with.
    """

    def __call__(self, student: nn.Module, teachers: list[nn.Module], num_classes: int) -> DistillationModule:
        """A module that trains ``student``, under ``teachers`` where it has any."""


Check = Callable[[Build], None]
CONTRACT: dict[str, Check] = {}


def assert_module_contract(build: Build) -> None:
    """Check every point of `CONTRACT`.

    ::

        from distill_lightning.testing import assert_module_contract

        def build(student, teachers, num_classes):
            return MyModule(student, teachers, num_classes=num_classes)

        def test_contract():
            assert_module_contract(build)

    The networks are `TinyNet`, whose ``features`` can be tapped; the two teachers need not be used. With pytest,
    ``@pytest.mark.parametrize("point", CONTRACT)`` and ``CONTRACT[point](build)`` make a test of each point.

    Args:
        build: a function at the top level of a file that makes the module, see `Build`.

    Raises:
        AssertionError: the module breaks a point; the message names it and, where the module waits for the device, the
            line that does.
    """
    for name, check in CONTRACT.items():
        try:
            check(build)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def point(check: Check) -> Check:
    """Add a check to `CONTRACT` under its own name."""
    CONTRACT[check.__name__] = check
    return check


def _require(condition: bool, message: str) -> None:  # noqa: FBT001
    if not condition:
        raise AssertionError(message)


def _make(
    build: Build, *, seed: int = 0, num_classes: int = 3, norm: Literal["batch", "group"] = "batch"
) -> tuple[DistillationModule, list[nn.Module]]:
    torch.manual_seed(1000)
    teachers: list[nn.Module] = [_net(build, num_classes, norm=norm) for _ in range(2)]
    torch.manual_seed(seed)
    module = build(_net(build, num_classes, norm=norm), teachers, num_classes)
    return module, teachers


def _net(build: Build, num_classes: int = 3, *, norm: Literal["batch", "group"] = "batch") -> TinyNet:
    num_targets = getattr(build, "num_targets", None)
    return TinyNet(None if num_targets else num_classes, num_targets=num_targets, norm=norm)


def _data(build: Build, **options: Any) -> TinyDataModule:
    partners = getattr(build, "partners", False)
    return TinyDataModule(num_targets=getattr(build, "num_targets", None), partners=partners, **options)


def _fitted(build: Build, *, seed: int = 0, **options: Any) -> tuple[DistillationModule, pl.Trainer]:
    module, _ = _make(build, seed=seed)
    trainer = tiny_trainer(**options)
    trainer.fit(module, datamodule=_data(build))
    return module, trainer


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _networks(frozen: Frozen) -> nn.ModuleList:
    """Frozen networks as a module."""
    return nn.ModuleList(frozen.networks)


def _is_awake(frozen: Frozen) -> bool:
    return any(child.training for network in frozen.networks for child in network.modules())


def _require_same(first: dict[str, Tensor], second: dict[str, Tensor], message: str) -> None:
    _require(first.keys() == second.keys(), f"{message}: other tensors {sorted(first.keys() ^ second.keys())}")
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    _require(not different, f"{message}: {different[:3]} differ")


@point
def frozen_networks_do_not_change(build: Build) -> None:
    """Parameters and buffers are bitwise what they were, also after the user called ``module.train()``."""
    module, teachers = _make(build)
    before = [_snapshot(network) for network in teachers]
    frozen = {name: _snapshot(_networks(one)) for name, one in module.frozen.items()}
    module.train()
    tiny_trainer(max_epochs=2).fit(module, datamodule=_data(build))
    for number, (network, state) in enumerate(zip(teachers, before, strict=True)):
        _require_same(state, _snapshot(network), f"teacher {number} changed in fit")
    for name, state in frozen.items():
        _require_same(state, _snapshot(_networks(module.frozen[name])), f"{name} changed in fit")


@point
def averages_of_weights_leave_frozen_networks_alone(build: Build) -> None:
    """Stochastic and exponential averages are of what learns: frozen networks stay, and stand in no checkpoint."""
    callbacks: list[Any] = [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]
    if hasattr(pl.callbacks, "EMAWeightAveraging"):  # since Lightning 2.6
        callbacks.append(pl.callbacks.EMAWeightAveraging())
    for callback in callbacks:
        module, teachers = _make(build)
        for network in teachers:
            # Statistics that were reset would be those of a fresh network.
            network.get_submodule("features.1").running_mean.fill_(0.3)  # type: ignore[operator]
        before = [_snapshot(network) for network in teachers]
        trainer = tiny_trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, datamodule=_data(build))
        kind = type(callback).__name__
        for number, (network, state) in enumerate(zip(teachers, before, strict=True)):
            _require_same(state, _snapshot(network), f"{kind} changed teacher {number}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "module.ckpt"
            trainer.save_checkpoint(path)
            state_dict = torch.load(path, weights_only=True)["state_dict"]
        _require(state_dict.keys() == module.state_dict().keys(), f"{kind} changes what a checkpoint holds")


@point
def the_optimizer_holds_exactly_what_learns(build: Build) -> None:
    """Every parameter with ``requires_grad`` once, each with a gradient, no other, nothing frozen."""

    def look(_trainer: Any, pl_module: Any, *_: Any) -> None:
        missing = [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        _require(not missing, f"no gradient reaches {missing[:3]}")

    # No class of a function's own: jsonargparse looks through all callbacks there are, and cannot import such a one.
    module, trainer = _fitted(build, callbacks=[LambdaCallback(on_before_optimizer_step=look)])
    held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    learning = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    _require(len(held) == len(set(held)), "a parameter stands twice in the optimiser")
    missing = [name for key, name in learning.items() if key not in held]
    _require(not missing, f"not in the optimiser: {missing[:3]}")
    _require(set(held) <= set(learning), "the optimiser holds parameters that do not learn")
    for name, frozen in module.frozen.items():
        awake = [path for path, parameter in _networks(frozen).named_parameters() if parameter.requires_grad]
        _require(not awake, f"{name} is frozen, but {awake[:3]} require gradients")


@point
def modes_are_kept(build: Build) -> None:
    """The student trains in train mode whatever its mode before, but for frozen parts; frozen networks in eval mode."""
    module, _ = _make(build)
    seen: list[bool] = []

    def look(_trainer: Any, pl_module: Any, *_: Any) -> None:
        seen.append(all(child.training for child in pl_module.student.modules()))
        for name, frozen in pl_module.frozen.items():
            _require(not _is_awake(frozen), f"{name} is in train mode while the student trains")

    module.eval()
    tiny_trainer(callbacks=[LambdaCallback(on_train_batch_start=look)]).fit(module, datamodule=_data(build))
    _require(bool(seen) and all(seen), "after module.eval(), fit trained the student in eval mode")
    module.train()
    for name, frozen in module.frozen.items():
        _require(not _is_awake(frozen), f"train() woke {name}")


@point
def a_frozen_part_keeps_its_mode(build: Build) -> None:
    """A student's BatchNorm without gradients and in eval mode keeps its statistics; in train mode it moves them."""
    for training in (False, True):
        module, _ = _make(build)
        norm = module.student.get_submodule("features.1").requires_grad_(requires_grad=False).train(mode=training)
        before = _snapshot(norm)
        tiny_trainer().fit(module, datamodule=_data(build))
        moved = not torch.equal(before["running_mean"], norm.state_dict()["running_mean"])
        _require(norm.training == training, f"fit put a frozen part that came with training={training} in another mode")
        _require(moved == training, f"a frozen part with training={training} has other statistics than that says")
        _require(torch.equal(before["weight"], norm.state_dict()["weight"]), "fit trained a frozen part")


@point
def a_checkpoint_holds_the_student_and_no_teacher(build: Build) -> None:
    """It loads with ``weights_only=True``; a missing student key raises."""
    module, teachers = _make(build)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=_data(build))
    places = {value.data_ptr() for network in teachers for value in network.state_dict().values()}
    theirs = {name for name, value in module.state_dict().items() if value.data_ptr() in places}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.ckpt"
        trainer.save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=True)
        kept = sorted(theirs & checkpoint["state_dict"].keys())
        _require(not kept, f"the checkpoint holds {kept[:3]}")
        for name, value in module.student.state_dict().items():
            _require(torch.equal(checkpoint["state_dict"][f"student.{name}"], value), f"student.{name} differs")
        del checkpoint["state_dict"]["student.head.weight"]
        torch.save(checkpoint, path)
        other, _ = _make(build)
        try:
            tiny_trainer(max_epochs=2).fit(other, datamodule=_data(build), ckpt_path=str(path))
        except (ValueError, RuntimeError) as error:
            _require("head.weight" in str(error), f"a missing student key is not named: {error}")
            return
    raise AssertionError("a checkpoint without student.head.weight was loaded")


@point
def a_resumed_run_equals_the_uninterrupted_one(build: Build) -> None:
    """Bit for bit: weights, optimiser, whatever else the module keeps."""

    class StopAfterOne(pl.callbacks.Checkpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(path)
            trainer.should_stop = True

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.ckpt"
        whole, whole_trainer = _fitted(build, max_epochs=3)
        _fitted(build, max_epochs=3, callbacks=[StopAfterOne()], enable_checkpointing=True)
        # Another seed: everything that matters must come from the checkpoint.
        resumed, _ = _make(build, seed=7)
        trainer = tiny_trainer(max_epochs=3)
        trainer.fit(resumed, datamodule=_data(build), ckpt_path=str(path))
    _require(trainer.current_epoch == whole_trainer.current_epoch == 3, "the resumed run did not go on to the end")
    _require_same(_snapshot(whole), _snapshot(resumed), "after resuming")
    first, second = (run.optimizers[0].state_dict()["state"] for run in (whole_trainer, trainer))
    for key, state in first.items():
        _require_same(
            {name: value for name, value in state.items() if isinstance(value, Tensor)},
            {name: value for name, value in second[key].items() if isinstance(value, Tensor)},
            f"after resuming, the optimiser's state {key}",
        )
    # The share of a term that has faded by then stands in the uninterrupted run alone.
    missing = whole_trainer.callback_metrics.keys() - trainer.callback_metrics.keys()
    lost = sorted(name for name in missing if not name.endswith("_share"))
    _require(not lost, f"after resuming, {lost[:3]} are not logged")
    for name, value in trainer.callback_metrics.items():
        _require(torch.equal(value, whole_trainer.callback_metrics[name]), f"after resuming, {name} differs")


@point
def two_seeded_runs_agree(build: Build) -> None:
    """Bit for bit."""
    first, second = (_fitted(build, seed=3, max_epochs=2)[0] for _ in range(2))
    _require_same(_snapshot(first), _snapshot(second), "two runs with one seed")


@point
def the_logged_terms_sum_to_the_loss(build: Build) -> None:
    """``train/loss`` is the sum of ``train/<term>`` times its weight, and the shares sum to one."""
    weights: dict[str, float] = {}

    def look(_trainer: Any, pl_module: Any, *_: Any) -> None:
        weights.update(pl_module.weights())

    _, trainer = _fitted(build, callbacks=[LambdaCallback(on_train_batch_end=look)])
    logged = trainer.callback_metrics
    total = sum(weight * float(logged[f"train/{name}"]) for name, weight in weights.items())
    loss = float(logged["train/loss"])
    _require(abs(total - loss) <= 1e-5 * abs(loss), f"the terms sum to {total}, train/loss is {loss}")
    shares = [float(value) for name, value in logged.items() if name.endswith("_share")]
    _require(not shares or abs(sum(shares) - 1) < 1e-5, f"the shares sum to {sum(shares)}")


@point
def accumulation_and_clipping_work(build: Build) -> None:
    """``accumulate_grad_batches`` and ``gradient_clip_val`` are the Trainer's and do what they say."""
    norms: list[float] = []

    def look(trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(norms):
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

    watch = LambdaCallback(on_train_batch_end=look)
    _, trainer = _fitted(build, accumulate_grad_batches=2, gradient_clip_val=1e-3, callbacks=[watch])
    _require(trainer.global_step == 2, f"3 batches, 2 accumulated: {trainer.global_step} optimiser steps, not 2")
    _require(max(norms) <= 1.001e-3, f"gradients of norm {max(norms)} went past gradient_clip_val=1e-3")


@point
def prediction_is_the_students_alone(build: Build) -> None:
    """``forward`` and ``predict`` give the student's output and run no teacher."""
    module, teachers = _make(build)
    calls: list[str] = []
    for network in teachers:
        network.register_forward_hook(lambda *_: calls.append("teacher"))
    data = _data(build)
    data.setup()
    module.eval()
    inputs = next(iter(data.test_dataloader())).input
    with torch.no_grad():
        _require(torch.equal(module(inputs), module.student(inputs)), "forward is not the student's output")
    outputs = tiny_trainer().predict(module, datamodule=data)
    with torch.no_grad():
        expected = [module.student(batch.input) for batch in data.predict_dataloader()]
    _require(torch.equal(torch.cat(outputs), torch.cat(expected)), "predict is not the student's output")  # type: ignore[arg-type]
    _require(not calls, "a teacher ran in forward or predict")


@point
def one_sample_and_two_classes_work(build: Build) -> None:
    """A batch of one and the smallest number of classes."""
    module, _ = _make(build, num_classes=2)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=_data(build, num_classes=2, samples=3, batch_size=1))
    _require(bool(torch.isfinite(trainer.callback_metrics["train/loss"])), "the loss of single samples is not finite")


@point
def a_bf16_step_is_finite(build: Build) -> None:
    """Under ``precision="bf16-mixed"``."""
    module, trainer = _fitted(build, precision="bf16-mixed")
    _require(bool(torch.isfinite(trainer.callback_metrics["train/loss"])), "the loss is not finite")
    _require(all(bool(torch.isfinite(p).all()) for p in module.parameters()), "a parameter is not finite")


@point
def a_training_step_does_not_wait_for_the_device(build: Build) -> None:
    """No ``.item()``, no boolean mask as an index, in the loss, its gradient, or the optimiser's step; see `Waits`."""
    module, _ = _make(build)
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
    tiny_trainer().fit(module, datamodule=_data(build))
    told = "\n".join(f"{wait.what}:\n{wait.stack}" for wait in waits.found)
    _require(not waits.found, f"{waits.found.total()} hidden synchronisations in a step, {told}")


def process_strategy() -> str:
    """The strategy by which a test trains in several processes, ``"ddp_fork"`` where it is possible.

    A forked process need not import everything again, which takes longer than the training; but CUDA, once it is
    initialised, does not work in one, and OpenMP waits for ever for the threads of the process that it came from.
    """
    has_one_thread = torch.get_num_threads() == 1 and os.environ.get("OMP_NUM_THREADS") == "1"
    can_fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    return "ddp_fork" if can_fork and has_one_thread else "ddp_spawn"


def leave_the_group() -> None:
    """End the connection between processes: threads of it that are left at a process's exit may abort it.

    Those of PyTorch 2.6 do not, but may wait for ever for one another when they are told to end.
    """
    if torch.distributed.is_initialized() and not torch.__version__.startswith("2.6."):
        torch.distributed.destroy_process_group()


class _LeaveTheGroup(pl.Callback):
    """Ends the processes' connection with the fit."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        leave_the_group()


@point
def two_processes_equal_one(build: Build) -> None:
    """Two gloo processes with half of each batch end, and validate, as one process with whole batches does."""
    alone, _ = _make(build, norm="group")
    together = copy.deepcopy(alone)
    single = tiny_trainer(max_epochs=2)
    single.fit(alone, datamodule=_data(build, batch_size=8, val_size=23))
    double = tiny_trainer(max_epochs=2, devices=2, strategy=process_strategy(), callbacks=[_LeaveTheGroup()])
    double.fit(together, datamodule=_data(build, batch_size=4, val_size=23))
    for name, value in single.callback_metrics.items():
        if name.endswith("_share"):
            continue  # a mean of ratios depends on how the samples are divided
        other = double.callback_metrics[name]
        close = torch.allclose(value, other, rtol=1e-3, atol=1e-4)
        _require(close, f"two processes log another {name} than one: {other} and {value}")
    for name, value in alone.state_dict().items():
        other = together.state_dict()[name]
        close = torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-5)
        _require(close, f"two processes end elsewhere than one: {name} by {(value - other).abs().max()}")


@point
def an_exported_student_is_a_plain_network(build: Build) -> None:
    """The file loads with ``strict=True`` into a freshly built network, which gives the same logits."""
    module, _ = _fitted(build)
    inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    module.eval()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("student.safetensors", "student.pt"):
            plain = _net(build)
            plain.load_state_dict(read_weights(module.export_student(Path(folder) / name)), strict=True)
            with torch.no_grad():
                # Another memory layout may change the last bits.
                close = torch.allclose(plain.eval()(inputs), module(inputs), rtol=1e-5, atol=1e-6)
                _require(close, f"{name}: the logits differ")
