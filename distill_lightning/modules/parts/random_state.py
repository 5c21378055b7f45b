"""The random numbers of a training that goes on from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from distill_lightning.lightning_internals import begins_anew
from distill_lightning.part import Part
from distill_lightning.processes import gathered


class RandomState(Part):
    """The state of torch's generators, which dropout and torchvision's detectors draw from, kept in checkpoints.

    A training that goes on in as many processes draws the numbers that it would have drawn without the interruption;
    with another number of processes, or on a device of another kind, its generators are left as they are. Generators of
    Python and NumPy are not kept: nothing in this package draws from them in training.

    Example:
        >>> from distill_lightning.modules.parts.random_state import RandomState
        >>> (state,) = RandomState().state_dict()["processes"]
        >>> state["cpu"].dtype
        torch.uint8
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._kept: list[dict[str, torch.Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """The generators' states of all processes, which all call it."""
        own = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self._device)
        return {"processes": gathered(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep them until the training starts: until then loaders, among others, draw."""
        self._kept = state["processes"]

    def training_starts(self, module: Any) -> None:
        """Draw from here on as after the checkpoint: the iterator of an epoch that is half done has been made by now.

        `ResumableLoader` makes its own later, but draws nothing then.
        """
        self._device = module.device
        kept, self._kept = self._kept, []
        if begins_anew(module.trainer) or len(kept) != module.trainer.world_size:
            return
        own = kept[module.trainer.global_rank]
        torch.set_rng_state(own["cpu"].cpu())
        if self._device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"].cpu(), self._device)
