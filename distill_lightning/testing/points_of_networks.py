"""The contract's points about networks: what learns, what is frozen, and what becomes of both in files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill_lightning.data.batch import tensors_of
from distill_lightning.networks.weights import read_weights
from distill_lightning.testing.points import (
    Build,
    data_of,
    fitted,
    is_awake,
    kit_of,
    make,
    network_of,
    networks_of,
    point,
    require,
    require_same,
    snapshot,
)
from distill_lightning.testing.tiny import tiny_trainer


@point
def frozen_networks_do_not_change(build: Build) -> None:
    """Parameters and buffers are bitwise what they were, also after the user called ``module.train()``."""
    module, teachers = make(build)
    before = [snapshot(network) for network in teachers]
    frozen = {name: snapshot(networks_of(one)) for name, one in module.frozen.items()}
    module.train()
    tiny_trainer(max_epochs=2).fit(module, datamodule=data_of(build))
    for number, (network, state) in enumerate(zip(teachers, before, strict=True)):
        require_same(state, snapshot(network), f"teacher {number} changed in fit")
    for name, state in frozen.items():
        require_same(state, snapshot(networks_of(module.frozen[name])), f"{name} changed in fit")


@point
def averages_of_weights_leave_frozen_networks_alone(build: Build) -> None:
    """Stochastic and exponential averages are of what learns: frozen networks stay, and stand in no checkpoint."""
    callbacks: list[Any] = [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]
    if hasattr(pl.callbacks, "EMAWeightAveraging"):  # since Lightning 2.6
        callbacks.append(pl.callbacks.EMAWeightAveraging())
    for callback in callbacks:
        module, teachers = make(build)
        for part in (network.get_submodule(kit_of(build).part) for network in teachers):
            # Statistics that were reset would be those of a fresh network.
            if isinstance(part, _BatchNorm):
                part.running_mean.fill_(0.3)  # type: ignore[union-attr]  # it keeps statistics
        before = [snapshot(network) for network in teachers]
        trainer = tiny_trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, datamodule=data_of(build))
        kind = type(callback).__name__
        for number, (network, state) in enumerate(zip(teachers, before, strict=True)):
            require_same(state, snapshot(network), f"{kind} changed teacher {number}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "module.ckpt"
            trainer.save_checkpoint(path)
            state_dict = torch.load(path, weights_only=True)["state_dict"]
        require(state_dict.keys() == module.state_dict().keys(), f"{kind} changes what a checkpoint holds")


@point
def the_optimizer_holds_exactly_what_learns(build: Build) -> None:
    """Every parameter with ``requires_grad`` once, each with a gradient, no other, nothing frozen."""

    def look(_trainer: Any, pl_module: Any, *_: Any) -> None:
        missing = [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        require(not missing, f"no gradient reaches {missing[:3]}")

    # No class of a function's own: jsonargparse looks through all callbacks there are, and cannot import such a one.
    module, trainer = fitted(build, callbacks=[LambdaCallback(on_before_optimizer_step=look)])
    held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    learning = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    require(len(held) == len(set(held)), "a parameter stands twice in the optimiser")
    missing = [name for key, name in learning.items() if key not in held]
    require(not missing, f"not in the optimiser: {missing[:3]}")
    require(set(held) <= set(learning), "the optimiser holds parameters that do not learn")
    for name, frozen in module.frozen.items():
        awake = [path for path, parameter in networks_of(frozen).named_parameters() if parameter.requires_grad]
        require(not awake, f"{name} is frozen, but {awake[:3]} require gradients")


@point
def modes_are_kept(build: Build) -> None:
    """The student trains in train mode whatever its mode before, but for frozen parts; frozen networks in eval mode."""
    module, _ = make(build)
    seen: list[bool] = []

    def look(_trainer: Any, pl_module: Any, *_: Any) -> None:
        asleep = {id(part) for part in _frozen_parts(pl_module.student)}
        seen.append(all(child.training for child in pl_module.student.modules() if id(child) not in asleep))
        for name, frozen in pl_module.frozen.items():
            require(not is_awake(frozen), f"{name} is in train mode while the student trains")

    module.eval()
    tiny_trainer(callbacks=[LambdaCallback(on_train_batch_start=look)]).fit(module, datamodule=data_of(build))
    require(bool(seen) and all(seen), "after module.eval(), fit trained the student in eval mode")
    module.train()
    for name, frozen in module.frozen.items():
        require(not is_awake(frozen), f"train() woke {name}")


def _frozen_parts(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of a network whose parameters are all frozen, fixed positions for example, and what is in them."""
    for part in network.modules():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield from part.modules()


@point
def a_frozen_part_keeps_its_mode(build: Build) -> None:
    """A student's BatchNorm without gradients and in eval mode keeps its statistics; in train mode it moves them.

    Any other layer without gradients keeps its mode and its weights.
    """
    for training in (False, True):
        module, _ = make(build)
        part = module.student.get_submodule(kit_of(build).part).requires_grad_(requires_grad=False).train(mode=training)
        before = snapshot(part)
        tiny_trainer().fit(module, datamodule=data_of(build))
        require(part.training == training, f"fit put a frozen part that came with training={training} in another mode")
        if isinstance(part, _BatchNorm):
            moved = not torch.equal(before["running_mean"], part.state_dict()["running_mean"])
            require(moved == training, f"a frozen part with training={training} has other statistics than that says")
        require(torch.equal(before["weight"], part.state_dict()["weight"]), "fit trained a frozen part")


@point
def a_checkpoint_holds_the_student_and_no_teacher(build: Build) -> None:
    """It loads with ``weights_only=True``; a missing student key raises."""
    module, teachers = make(build)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=data_of(build))
    places = {value.data_ptr() for network in teachers for value in network.state_dict().values()}
    theirs = {name for name, value in module.state_dict().items() if value.data_ptr() in places}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.ckpt"
        trainer.save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=True)
        kept = sorted(theirs & checkpoint["state_dict"].keys())
        require(not kept, f"the checkpoint holds {kept[:3]}")
        for name, value in module.student.state_dict().items():
            require(torch.equal(checkpoint["state_dict"][f"student.{name}"], value), f"student.{name} differs")
        head = kit_of(build).head
        del checkpoint["state_dict"][f"student.{head}"]
        torch.save(checkpoint, path)
        other, _ = make(build)
        try:
            tiny_trainer(max_epochs=2).fit(other, datamodule=data_of(build), ckpt_path=str(path))
        except (ValueError, RuntimeError) as error:
            require(head in str(error), f"a missing student key is not named: {error}")
            return
    raise AssertionError(f"a checkpoint without student.{head} was loaded")


@point
def prediction_is_the_students_alone(build: Build) -> None:
    """``forward`` and ``predict`` give the student's output and run no teacher."""
    module, teachers = make(build)
    calls: list[str] = []
    for network in teachers:
        network.register_forward_hook(lambda *_: calls.append("teacher"))
    kit, data = kit_of(build), data_of(build)
    data.setup("predict")
    module.eval()
    inputs = kit.examples()
    with torch.no_grad():
        require(_same(module(inputs), kit.run(module.student, inputs)), "forward is not the student's output")
    outputs = tiny_trainer().predict(module, datamodule=data)
    with torch.no_grad():
        expected = [kit.predict(module.student, batch) for batch in data.predict_dataloader()]
    require(_same(outputs, expected), "predict is not the student's output")
    require(not calls, "a teacher ran in forward or predict")


@point
def an_exported_student_is_a_plain_network(build: Build) -> None:
    """The file loads with ``strict=True`` into a freshly built network, which gives the same logits."""
    module, _ = fitted(build)
    kit = kit_of(build)
    inputs = kit.examples()
    module.eval()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("student.safetensors", "student.pt"):
            plain = network_of(build)
            plain.load_state_dict(read_weights(module.export_student(Path(folder) / name)), strict=True)
            with torch.no_grad():
                # Another memory layout may change the last bits.
                pairs = _pairs(kit.run(plain.eval(), inputs), module(inputs))
                close = all(torch.allclose(first, second, rtol=1e-5, atol=1e-6) for first, second in pairs)
                require(close, f"{name}: the logits differ")


def _pairs(first: Any, second: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two nests, which have equally many."""
    tensors, others = list(tensors_of(first)), list(tensors_of(second))
    require(len(tensors) == len(others), f"{len(tensors)} tensors are given where the student gives {len(others)}")
    return list(zip(tensors, others, strict=True))


def _same(first: Any, second: Any) -> bool:
    """Whether two nests, of which the first holds tensors, hold the same ones."""
    pairs = _pairs(first, second)
    return bool(pairs) and all(torch.equal(one, other) for one, other in pairs)
