"""Classifiers that are trained for the sake of their layers, with which the students of some rows begin."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule
from torch import nn

from distill_lightning.arguments import takes
from distill_lightning.errors import InputError
from distill_lightning.modules import DistillationModule
from distill_lightning.modules.detection import DetectionModule
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.modules.supervised import RegressionModule
from distill_lightning.modules.translates import Translates
from distill_lightning.studies.compare.config import CompareConfig, Spec
from distill_lightning.studies.compare.foreign_data import ordered
from distill_lightning.studies.compare.outputs_task import Classification
from distill_lightning.studies.compare.specs import filled, find, parsed, remembering_warnings, set_up, told_by
from distill_lightning.studies.compare.tasks import task_of
from distill_lightning.studies.data import splits_of

_OTHER_TASKS = (DetectionModule, RegressionModule, Translates)


class Backbone:
    """Builds what trains the backbone of one name, fresh objects at every call.

    Args:
        name: the key in ``backbones``.
        spec: what stands there.
        network: the student's ``init_args.backbone``.

    Attributes:
        task: by whose metrics it is followed.
        epochs: length of its training.
        splits: fingerprints of its data.
        warned: what the data have warned of.

    Raises:
        ArgumentError: a class that cannot be found or does not take what it is given.
        InputError: data that cannot be read, or data or a module that are not a classifier's.
    """

    def __init__(self, name: str, spec: Spec, network: Spec) -> None:
        key = f"backbones.{name}"
        trains = find(spec.get("class_path"))
        if isinstance(trains, type) and issubclass(trains, _OTHER_TASKS):
            raise InputError(
                f"{key}: a backbone is a classifier's, and {trains.__name__} trains none: name a module that trains a "
                "classifier, such as SupervisedModule"
            )
        self.epochs: int = spec["epochs"]
        self._data = parsed(f"{key}.data", LightningDataModule, spec["data"])
        with remembering_warnings() as self.warned:
            sample = self.data(order_seed=0)
            self.task = task_of(sample)
            if not isinstance(self.task, Classification):
                raise InputError(
                    f"{key}.data: a backbone learns to classify, and {type(sample).__name__} is for another task"
                )
            self.splits = splits_of(set_up(sample))
        known = told_by(sample) | {name: spec.get(name) for name in ("optimizer", "lr_scheduler")}
        self._network = parsed("student.init_args.backbone", nn.Module, filled(f"{key}: its network", network, known))
        module = {name: spec[name] for name in ("class_path", "init_args") if name in spec}
        self._module = parsed(key, Callable[[nn.Module], DistillationModule], filled(key, module, known))

    def data(self, *, order_seed: int, first_epoch: int = 0) -> Any:
        """Its data module, with the training order drawn by ``order_seed``; see `Experiment.data`."""
        return ordered(self._data(), order_seed, first_epoch)

    def module(self) -> DistillationModule:
        """What trains the classifier, with the classifier as its student."""
        module: DistillationModule = self._module()(self._network())
        return module

    def try_on(self, student: Callable[[Path], nn.Module]) -> None:
        """See whether a student takes the weights that this one exports.

        Args:
            student: makes one with the weights of a file.
        """
        module = self.module()
        check_optimizer(module)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "backbone.safetensors")
            module.export_backbone(path)
            student(path)


def backbones_of(config: CompareConfig) -> dict[str, Backbone]:
    """What trains the backbones, by name.

    Raises:
        InputError: the student has no backbone, or takes no weights for it.
    """
    if not config.backbones:
        return {}
    arguments = config.student.get("init_args") or {}
    network = arguments.get("backbone") if isinstance(arguments, Mapping) else None
    if not isinstance(network, Mapping):
        raise InputError(
            f"backbones: {config.student.get('class_path')}, the student, has no classifier to train: name one by "
            "class_path under student.init_args.backbone"
        )
    if "backbone_weights" in arguments:
        raise InputError("student.init_args.backbone_weights: backbones would take its place: leave one of them out")
    return {name: Backbone(name, spec, dict(network)) for name, spec in config.backbones.items()}


def with_backbone(spec: Spec, known: Mapping[str, Any], weights: Path | None = None) -> Spec:
    """A student's spec with the known values in its backbone, too, and with the weights that this begins with.

    Args:
        spec: the student's.
        known: values for arguments that the backbone leaves out.
        weights: a file of ``export_backbone``; ``None``: it begins at random.

    Raises:
        InputError: the student takes no such weights.
    """
    arguments = spec.get("init_args") or {}
    if isinstance(arguments, Mapping) and isinstance(arguments.get("backbone"), Mapping):
        nested = filled("student.init_args.backbone", arguments["backbone"], known)
        spec = {**spec, "init_args": {**arguments, "backbone": nested}}
    if weights is None:
        return spec
    target = find(spec.get("class_path"))
    if target is not None and not takes(target, "backbone_weights"):
        raise InputError(f"backbones: {spec['class_path']}, the student, takes no backbone_weights: leave them out")
    return {**spec, "init_args": {**spec["init_args"], "backbone_weights": str(weights)}}
