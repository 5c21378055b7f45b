"""Modules whose frozen parts stay bit for bit as they were, and out of every checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from distill_lightning.compression.recipe import is_computed, plain_copy
from distill_lightning.compression.structure import note_structure, restore_structure
from distill_lightning.errors import InputError
from distill_lightning.layers import fingerprint
from distill_lightning.modules.hparams import plain, rebuild, takes
from distill_lightning.networks import recipe_of
from distill_lightning.networks.weights import check_architecture, read_checkpoint, write_weights
from distill_lightning.teachers import TeacherEnsemble


class FrozenPartsModule(pl.LightningModule):
    """A student, and submodules beside it that are frozen.

    Those named in ``frozen`` stay in eval mode and out of checkpoints, which hold how they were built and a fingerprint
    of their weights instead; one that is ``None`` is left alone. Base of `DistillationModule`, which sets what is
    needed here.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    student: nn.Module

    def __init__(self) -> None:
        super().__init__()
        # Arguments that no checkpoint can hold, and those that are the defaults since this module was loaded from one.
        self._objects: list[str] = []
        self._missing: list[str] = []
        self._fingerprints: dict[str, str] = {}

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (nn.Module's signature)
        """Set the mode of everything but the frozen submodules, which stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            if getattr(self, name) is not None:
                getattr(self, name).eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out; note how every network was built instead, and what the frozen ones weigh."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not self._is_frozen(name)}
        # LightningCLI notes the class itself; here it is noted for a module that was made in Python, too. A plain dict,
        # because older Lightning versions save a class of their own, which weights_only=True refuses.
        made_by = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["hyper_parameters"] = plain({"_class_path": made_by, **checkpoint.get("hyper_parameters", {})})
        checkpoint["fingerprints"] = self._fingerprints or self._fingerprint()
        checkpoint["recipes"] = {"student": recipe_of(self.student)}
        checkpoint["objects"] = self._objects
        note_structure(self, checkpoint)
        teachers = getattr(self, "teachers", None)
        if isinstance(teachers, TeacherEnsemble):
            checkpoint["recipes"]["teachers"] = {
                "networks": [recipe_of(network) for network in teachers],
                **teachers.options(),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the live frozen weights back, so that loading stays strict.

        Raises:
            InputError: the checkpoint is of another architecture.
        """
        restore_structure(self, checkpoint)
        checkpoint["state_dict"] = self.check_weights(checkpoint["state_dict"])
        fingerprints = self._fingerprint()
        for name, known in checkpoint.get("fingerprints", {}).items():
            if fingerprints.get(name) != known:
                warnings.warn(
                    f"{name}: the weights are not those that this checkpoint was trained with; predictions are not "
                    f"touched, but training on would follow other {name}",
                    stacklevel=2,
                )

    def check_weights(self, state: Mapping[str, Tensor], *, source: str = "what is being loaded") -> dict[str, Tensor]:
        """A checkpoint's weights together with the live frozen ones, ready to be loaded strictly.

        Raises:
            InputError: they are of another architecture than this module; the message begins with ``source``.
        """
        live = {name: value for name, value in self.state_dict().items() if self._is_frozen(name)}
        complete = {**state, **live}
        check_architecture(self, complete, source=source)
        return complete

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a restricted classmethod with more arguments
        cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu", **overrides: Any
    ) -> Self:
        """Build the module of a checkpoint, its networks included where this package's factories made them.

        Only tensors and plain values are read, never pickled code.

        Args:
            checkpoint_path: a checkpoint of this class.
            map_location: the device that the module is put on.
            overrides: constructor arguments that replace what the checkpoint holds. A network that was built elsewhere
                must be given (``student=...``, ``teachers=...``); if the training is to go on, the optimiser and
                whatever else was no plain value, too: `fit` warns of those that are missing.

        Raises:
            InputError: there is no such checkpoint, it is of another module or architecture, or it cannot tell how a
                network was built.
        """
        checkpoint = read_checkpoint(Path(checkpoint_path))
        if "recipes" not in checkpoint:
            raise InputError(
                f"{checkpoint_path} is the checkpoint of another kind of module: distill_lightning.Pretrained(network, "
                "checkpoint, part=...) takes a network's weights from it"
            )
        recipes = {
            name: recipe
            for name, recipe in checkpoint.get("recipes", {}).items()
            if name not in overrides and takes(cls, name)
        }
        known = {
            name: value
            for name, value in checkpoint["hyper_parameters"].items()
            if takes(cls, name) and name != "_class_path"
        }
        module = cls(**{**known, **{name: rebuild(name, recipe) for name, recipe in recipes.items()}, **overrides})
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        kept = {*overrides, *recipes}
        module._missing = [name for name in checkpoint.get("objects", []) if name not in kept]
        return module.to(map_location)

    def export_student(self, path: str | Path) -> Path:
        """Write the plain student's state dict; a freshly built network of its kind loads it with ``strict=True``.

        Weights that are computed (quantized, shared) are written as the values that they have. A network that was
        shrunk fits one of its own sizes: `compression.recipe.rebuild`.

        Args:
            path: ``.safetensors``, or ``.pt`` / ``.pth`` for `torch.save`.

        Returns:
            The path.

        Raises:
            InputError: another suffix.
        """
        student = plain_copy(self.student) if is_computed(self.student) else self.student
        return write_weights(student, Path(path))

    def _is_frozen(self, name: str) -> bool:
        return name.startswith(tuple(f"{frozen}." for frozen in self.frozen))

    def _fingerprint(self) -> dict[str, str]:
        networks = {name: getattr(self, name) for name in self.frozen}
        return {name: fingerprint(network) for name, network in networks.items() if network is not None}
