"""What the contract's points are made of: the module under test, a training of it, and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from distill_lightning.modules import DistillationModule
from distill_lightning.teachers import Frozen
from distill_lightning.testing.kits import ImageKit, Kit, Norm
from distill_lightning.testing.tiny import tiny_trainer


class Build(Protocol):
    """Makes the module under test.

    ::

        def build(student, teachers, num_classes):
            return MyModule(student, teachers, num_classes=num_classes)

    It must be a function at the top level of a file, not a lambda: other processes import it.

    A function with an attribute ``kit`` has networks and data of another kind, see `Kit`; `TranslationKit` and
    `DetectionKit` are two. One with an attribute ``num_targets`` makes a regression: its networks give that many means
    and as many log-variances, and ``num_classes`` is ignored. One with an attribute ``partners`` gets training views
    with partners to be mixed with.
    """

    def __call__(self, student: nn.Module, teachers: list[nn.Module], num_classes: int) -> DistillationModule:
        """A module that trains ``student``, under ``teachers`` where it has any."""


Check = Callable[[Build], None]
CONTRACT: dict[str, Check] = {}


def point(check: Check) -> Check:
    """Add a check to `CONTRACT` under its own name."""
    CONTRACT[check.__name__] = check
    return check


def kit_of(build: Build) -> Kit:
    """The networks and data that a module is tested with."""
    kit: Kit | None = getattr(build, "kit", None)
    if kit is not None:
        return kit
    return ImageKit(num_targets=getattr(build, "num_targets", None), partners=getattr(build, "partners", False))


def require(condition: bool, message: str) -> None:  # noqa: FBT001
    """Assert, also where Python is told to leave out assertions."""
    if not condition:
        raise AssertionError(message)


def make(
    build: Build, *, seed: int = 0, num_classes: int | None = None, norm: Norm = "batch"
) -> tuple[DistillationModule, list[nn.Module]]:
    """The module, whose student is initialised by ``seed``, and its teachers, who are always the same."""
    num_classes = kit_of(build).num_classes if num_classes is None else num_classes
    torch.manual_seed(1000)
    teachers = [network_of(build, num_classes, norm=norm) for _ in range(2)]
    torch.manual_seed(seed)
    module = build(network_of(build, num_classes, norm=norm), teachers, num_classes)
    return module, teachers


def network_of(build: Build, num_classes: int | None = None, *, norm: Norm = "batch") -> nn.Module:
    """A network of the kind that the module trains."""
    kit = kit_of(build)
    return kit.network(kit.num_classes if num_classes is None else num_classes, norm=norm)


def data_of(build: Build, **options: Any) -> pl.LightningDataModule:
    """Data that the module can be trained on."""
    return kit_of(build).data(**options)


def fitted(build: Build, *, seed: int = 0, **options: Any) -> tuple[DistillationModule, pl.Trainer]:
    """The module after a training, and its Trainer."""
    module, _ = make(build, seed=seed)
    trainer = tiny_trainer(**options)
    trainer.fit(module, datamodule=data_of(build))
    return module, trainer


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def networks_of(frozen: Frozen) -> nn.ModuleList:
    """Frozen networks as a module."""
    return nn.ModuleList(frozen.networks)


def is_awake(frozen: Frozen) -> bool:
    """Whether any part of frozen networks is in train mode."""
    return any(child.training for network in frozen.networks for child in network.modules())


def require_same(first: dict[str, Tensor], second: dict[str, Tensor], message: str) -> None:
    """Assert that two snapshots are the same, bit for bit."""
    require(first.keys() == second.keys(), f"{message}: other tensors {sorted(first.keys() ^ second.keys())}")
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    require(not different, f"{message}: {different[:3]} differ")
