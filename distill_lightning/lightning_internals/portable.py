"""A module that is trained alike under every version of Lightning."""

from __future__ import annotations

from inspect import isroutine
from pathlib import PurePath
from typing import Any

import pytorch_lightning as pl
from torch import nn

from distill_lightning.lightning_internals.resuming import _begin_after_finder, go_on
from distill_lightning.lightning_internals.summary import expect_eval_modes, forget_eval_modes
from distill_lightning.lightning_internals.versions import VERSION, refuse_mid_epoch


class PortableModule(pl.LightningModule):
    """A module that is trained alike under every version of Lightning, or refuses what a version cannot do.

    Before 2.2, Lightning puts everything in train mode at a training's start and after a validation, frozen parts, too:
    here parts come out of both in the modes that they were in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept_modes: list[dict[nn.Module, bool]] = []
        # Of a checkpoint that was loaded, see `settle_progress`.
        self.resumed_at: dict[str, Any] | None = None

    def on_fit_start(self) -> None:
        """Note the modes in which the training is to begin.

        Raises:
            InputError: it would go on from inside an epoch, which this version of Lightning cannot.
        """
        refuse_mid_epoch(self.trainer)
        _begin_after_finder(self.trainer)
        # A fit that broke off may have left some.
        self._kept_modes = []
        self._keep_modes()
        expect_eval_modes()

    def on_train_start(self) -> None:
        """Begin in the modes that were noted, and go on at a checkpoint's place."""
        forget_eval_modes()
        self._restore_modes()
        go_on(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let callbacks and schedules keep plain values alone: PyTorch reads nothing else from a file of weights.

        Lightning 1.9 writes the folders of callbacks as they were given, and PyTorch 2.6 a function of the schedule of
        `StochasticWeightAveraging`, which has it anyway.
        """
        for name in checkpoint.keys() & {"callbacks", "lr_schedulers"}:
            checkpoint[name] = _readable(checkpoint[name])

    def _keep_modes(self) -> None:
        self._kept_modes.append({part: part.training for part in self.modules()})

    def _restore_modes(self) -> None:
        for part, training in (self._kept_modes.pop() if self._kept_modes else {}).items():
            part.training = training

    if VERSION < (2, 2):

        def on_validation_model_eval(self) -> None:
            """All in eval mode."""
            self._keep_modes()
            super().on_validation_model_eval()

        def on_validation_model_train(self) -> None:
            """All in the modes of before."""
            super().on_validation_model_train()
            self._restore_modes()

        on_test_model_eval, on_test_model_train = on_validation_model_eval, on_validation_model_train


def _readable(state: Any) -> Any:
    """A state without functions, and with paths as strings."""
    if type(state) is dict:
        return {name: _readable(value) for name, value in state.items() if not isroutine(value)}
    if type(state) is list:
        return [_readable(value) for value in state]
    return str(state) if isinstance(state, PurePath) else state
