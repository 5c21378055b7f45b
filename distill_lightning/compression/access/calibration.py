"""Running a network on calibration data without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.parameters import cuda_devices, parameters_of
from distill_lightning.errors import InputError

Batches = Iterable[tuple[Any, Any]]
"""Pairs of inputs (a tensor ``(N, ...)``, or a tuple of arguments for a network with several) and targets ``(N, ...)``,
on the network's device, from the training set."""

Loss = Callable[[Any, Any], Tensor]
"""A function of the network's output and the targets that returns a scalar, a mean over the samples."""


def inputs_of(inputs: Any) -> tuple[Any, ...]:
    """A network's arguments: the entries of a tuple, or the single input."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def first_samples(inputs: Any, count: int) -> Any:
    """The first samples of a batch's inputs.

    Args:
        inputs: a tensor ``(N, ...)``, or a nest of tuples, lists and dicts, whose tensors all have the batch as their
            first dimension; what is no tensor in it, or has no dimension, stays as it is.
        count: number of samples.

    Example:
        >>> import torch
        >>> from distill_lightning.compression.access.calibration import first_samples
        >>> first_samples((torch.zeros(8, 3), {"mask": torch.ones(8, 1)}), 1)
        (tensor([[0., 0., 0.]]), {'mask': tensor([[1.]])})
    """
    return each_tensor(partial(_cut, rows=slice(count)), inputs)


def each_tensor(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Inputs with a function applied to each of their tensors, in the same nest of tuples, lists and dicts."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: each_tensor(function, part) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = [each_tensor(function, part) for part in inputs]
        # A NamedTuple takes its fields one by one.
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def tensors_in(inputs: Any) -> list[Tensor]:
    """The tensors of a nest of tuples, lists and dicts, in its order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each_tensor(keep, inputs)
    return found


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let Transformer layers run through their submodules, which their fast path bypasses in eval mode."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def calibrating(network: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Restore modes, buffers, ``requires_grad`` and the global random state after this context.

    Transformer layers run through their submodules, see `without_fast_path`.

    Args:
        network: the network to run inside the context.
        training: whether it runs in train mode, in which BatchNorm uses the batch's own statistics.
    """
    modes = {module: module.training for module in network.modules()}
    buffers = {buffer: buffer.clone() for buffer in network.buffers()}
    needed = {parameter: parameter.requires_grad for parameter in network.parameters()}
    # cuDNN's recurrent layers have no backward in eval mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    try:
        network.train(training)
        with torch.random.fork_rng(devices=cuda_devices(network)), cudnn, without_fast_path():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, need in needed.items():
            parameter.requires_grad_(need)
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


@contextmanager
def watching(layers: Mapping[str, nn.Module], look: Callable[..., None], *, outputs: bool = False) -> Iterator[None]:
    """Inside this context ``look(path, layer, arguments)`` is called before each call of a layer.

    With ``outputs`` it is called after the layer instead, also with what that returned.
    """
    hooks = [
        layer.register_forward_hook(partial(look, path))
        if outputs
        else layer.register_forward_pre_hook(partial(look, path))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradients(
    network: nn.Module,
    paths: Iterable[str],
    batches: Batches,
    loss: Loss,
    *,
    training: bool = False,
    each: bool = False,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The gradients of the loss with respect to some parameters, batch by batch; their own ``.grad`` is left alone.

    Args:
        network: the network, in eval mode meanwhile unless ``training``; left as it was.
        paths: paths of the parameters.
        batches: calibration data.
        loss: a mean over the samples.
        training: whether the network runs in train mode.
        each: whether there is a gradient for each sample.

    Yields:
        Gradients by path, zeros where a parameter has no influence, and the number of samples.

    Raises:
        InputError: a path names no parameter, there is no batch, or the loss is not a finite scalar.
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
            # Embeddings may have sparse ones.
            whole = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]
            yield dict(zip(parameters, whole, strict=True)), len(tensors_in(arguments)[0])
    if not seen:
        raise InputError("there is no calibration batch: give at least one pair (inputs, targets)")


def _split(batches: Batches) -> Iterator[tuple[Any, Any]]:
    """Batches of one sample."""
    for inputs, targets in batches:
        for number in range(len(targets)):
            one = slice(number, number + 1)
            yield each_tensor(partial(_cut, rows=one), inputs), targets[one]


def _cut(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows] if tensor.ndim else tensor
