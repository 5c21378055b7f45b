"""Example inputs at another batch size, and whether a network takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import calibrating, each_tensor, inputs_of, tensors_in
from distill_lightning.errors import InputError, in_a_line


def at_batch(example_inputs: Any, size: int) -> Any:
    """Example inputs at another batch size: their samples repeated, or only the first ones.

    Args:
        example_inputs: a tensor, or a tuple of arguments; the batch is the first dimension of each tensor in them.
        size: the new batch size.

    Raises:
        InputError: a tensor without samples.
    """

    def resized(value: Tensor) -> Tensor:
        if not value.ndim or not len(value):
            raise InputError(f"example inputs of shape {tuple(value.shape)} have no sample: give a batch (N, ...)")
        return value[torch.arange(size, device=value.device) % len(value)]

    return each_tensor(resized, example_inputs)


def check_batch(network: nn.Module, example_inputs: Any, other: Any, advice: str) -> None:
    """Refuse a network that runs with the batch of its example inputs and not with another one.

    Args:
        network: the network.
        example_inputs: a tensor, or a tuple of arguments, with which it runs.
        other: the same of another batch size.
        advice: what to do instead, for the message.

    Raises:
        InputError: it does not run with the other batch.
    """
    own, size = (len(tensors_in(given)[0]) for given in (example_inputs, other))
    with calibrating(network), torch.no_grad():
        try:
            network(*inputs_of(other))
        except Exception as error:  # a network may raise anything
            raise InputError(
                f"{type(network).__name__} runs with a batch of {own} and not with one of {size} "
                f"({in_a_line(error, at_most=300)}): {advice}"
            ) from error
