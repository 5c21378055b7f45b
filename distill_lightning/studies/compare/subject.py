"""Which network of a module is evaluated, whatever module it is."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from distill_lightning.errors import InputError
from distill_lightning.layers.call import only_output
from distill_lightning.modules import DistillationModule
from distill_lightning.networks.provenance import plain_network
from distill_lightning.networks.weights import write_weights


class Judge(DistillationModule):
    """What a comparison asks of a module of its own, its outputs, its scores and its file, for any network.

    Args:
        student: the network.
        num_classes: see `DistillationModule`.
        num_targets: see `DistillationModule`; an output of so many numbers is a point, whose variance is not known.
    """

    per_position = True

    def __init__(self, student: nn.Module, *, num_classes: int | None = None, num_targets: int | None = None) -> None:
        super().__init__(student, num_classes=num_classes, num_targets=num_targets)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The network's output; a point with variances that are NaN."""
        output = super().forward(*inputs, **named)
        if self.num_targets is None:
            return output
        if output.ndim == 1 and self.num_targets == 1:
            output = output[:, None]
        if output.shape[-1] == self.num_targets:
            output = torch.cat([output, torch.full_like(output, torch.nan)], dim=-1)
        return output


class Subject:
    """What of a run's module a comparison evaluates, and keeps.

    Evaluated is the attribute that the row names by ``evaluate``, else the module's ``student``, else what its
    ``forward`` computes, else the network that it was given. Kept, for rows that learn from it or begin with it, is the
    network that the module was given, where the module holds it and the row names none; else what is evaluated.

    Args:
        key: of the row in the YAML file, for messages.
        module: of the run.
        given: the network that was handed to it; ``None``: it has built its own.
        evaluate: dotted path of an attribute; ``None``: the row names none.

    Attributes:
        module: of the run.
        is_own: whether the module is one of this package's, and says itself what it is evaluated by.

    Raises:
        InputError: the module has no such attribute, or nothing to evaluate.
    """

    def __init__(
        self, key: str, module: pl.LightningModule, given: nn.Module | None = None, *, evaluate: str | None = None
    ) -> None:
        self.module = module
        self.is_own = isinstance(module, DistillationModule) and evaluate is None
        held = next((name for name, part in module.named_modules() if part is given), "")
        if evaluate is not None:
            _check_attribute(key, module, evaluate)
            self._evaluated = self._kept = evaluate
        elif isinstance(getattr(module, "student", None), nn.Module):
            self._evaluated = self._kept = "student"
        elif type(module).forward is not pl.LightningModule.forward:
            self._evaluated, self._kept = "", held
        elif held:
            self._evaluated = self._kept = held
        else:
            raise InputError(
                f"{key}: {type(module).__name__} has no student and no forward: name the network that is to be "
                "evaluated by evaluate: <attribute>"
            )

    @property
    def evaluated(self) -> nn.Module:
        """The network whose outputs count."""
        return _part(self.module, self._evaluated)

    @property
    def kept(self) -> nn.Module:
        """The network whose weights are kept after the last epoch, and counted as the row's."""
        return _part(self.module, self._kept)

    def export(self, path: Path) -> None:
        """Write the weights that others begin with, or learn from."""
        _export(self.module, self.kept, path)

    def export_evaluated(self, path: Path) -> None:
        """Write the weights of what is evaluated."""
        _export(self.module, self.evaluated, path)

    def judge(self, told: Any) -> DistillationModule:
        """What gives the outputs and scores of the network that is evaluated.

        Args:
            told: the data module, which tells ``num_classes`` or ``num_targets``.
        """
        if self.is_own and isinstance(self.module, DistillationModule):
            return self.module
        num_classes = getattr(told, "num_classes", None)
        num_targets = None if num_classes is not None else getattr(told, "num_targets", None)
        judge = Judge(self.evaluated, num_classes=num_classes, num_targets=num_targets)
        device = next((parameter.device for parameter in self.evaluated.parameters()), torch.device("cpu"))
        return judge.to(device)

    def check(self, key: str, told: Any, batch: Any) -> None:
        """Look at what the network that is evaluated says to a batch.

        Args:
            key: of the row in the YAML file, with which the message begins.
            told: the data module.
            batch: of it.

        Raises:
            InputError: that is no output of the task.
        """
        judge = self.judge(told).eval()
        with torch.no_grad():
            output = only_output(self.evaluated, judge(batch))
        who = f"{key}: what is evaluated of {type(self.module).__name__}"
        judge.output.check(who, self.evaluated, output.shape, per_position=True)
        judge.output.check_values(who, judge.output.laid_out(output))


def _export(module: pl.LightningModule, network: nn.Module, path: Path) -> None:
    if isinstance(module, DistillationModule) and network is module.student:
        module.export_student(path)
    else:
        write_weights(plain_network(network), path)


def _part(module: pl.LightningModule, path: str) -> nn.Module:
    # Asked for anew each time: a module may put another network there, a smaller one for example.
    found: nn.Module = operator.attrgetter(path)(module) if path else module
    return found


def _check_attribute(key: str, module: pl.LightningModule, path: str) -> None:
    try:
        found = _part(module, path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Module):
        names = ", ".join(name for name, _ in module.named_children()) or "none"
        raise InputError(f"{key}.evaluate: {type(module).__name__} has no network {path!r}; it has {names}")
