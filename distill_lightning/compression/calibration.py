"""Running a network on calibration data without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.parameters import cuda_devices, parameters_of
from distill_lightning.errors import InputError

Batches = Iterable[tuple[Any, Any]]
"""Pairs of inputs (a tensor ``(N, ...)``, or a tuple of arguments for a network with several) and targets ``(N, ...)``,
on the network's device, from the training set."""

Loss = Callable[[Any, Any], Tensor]
"""Of the network's output and the targets a scalar: a mean over the samples."""


def inputs_of(inputs: Any) -> tuple[Any, ...]:
    """A network's arguments: those of a tuple, or the one input."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In eval mode; every module is afterwards in the mode that it was in."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def calibrating(network: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Modes, buffers, ``requires_grad`` and the global random state are afterwards as they were before.

    Transformer layers run as the modules that they consist of, without the fast path that bypasses these in eval mode.

    Args:
        network: run in here.
        training: run it in train mode: BatchNorm uses the batch's own statistics.
    """
    modes = {module: module.training for module in network.modules()}
    buffers = {buffer: buffer.clone() for buffer in network.buffers()}
    needed = {parameter: parameter.requires_grad for parameter in network.parameters()}
    # cuDNN's recurrent layers have no backward in eval mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        network.train(training)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=cuda_devices(network)), cudnn:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode
        for parameter, need in needed.items():
            parameter.requires_grad_(need)
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


def gradients(
    network: nn.Module,
    paths: Iterable[str],
    batches: Batches,
    loss: Loss,
    *,
    training: bool = False,
    each: bool = False,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The loss's gradients in some parameters, batch by batch; the parameters' own ``.grad`` is left alone.

    Args:
        network: in eval mode while this runs, unless ``training``; left as it was.
        paths: of the parameters.
        batches: calibration data.
        loss: a mean over the samples.
        training: run in train mode.
        each: one sample at a time.

    Yields:
        Gradients by path, zeros where a parameter takes no part, and the number of samples.

    Raises:
        InputError: a path names no parameter, there is no batch, or the loss is no finite scalar.
    """
    parameters = parameters_of(network, paths)
    seen = False
    with calibrating(network, training=training), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_()
        for inputs, targets in _split(batches) if each else batches:
            seen = True
            arguments = inputs_of(inputs)
            value = loss(network(*arguments), targets)
            if value.ndim or not value.isfinite():
                raise InputError(f"the loss on the calibration data must be a finite scalar, got {value.detach()}")
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
            yield dict(zip(parameters, found, strict=True)), len(arguments[0])
    if not seen:
        raise InputError("there is no calibration batch: give at least one pair (inputs, targets)")


def _split(batches: Batches) -> Iterator[tuple[Any, Any]]:
    """Batches of one sample."""
    for inputs, targets in batches:
        for number in range(len(targets)):
            one = tuple(part[number : number + 1] if isinstance(part, Tensor) else part for part in inputs_of(inputs))
            yield one, targets[number : number + 1]
