"""Recalibration of BatchNorm's statistics after a network's weights have changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill_lightning.errors import InputError, refusing
from distill_lightning.layers import asleep


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]], *, limit: int | None = None) -> int:
    """Measure the running statistics of BatchNorm anew, in place, but for those in frozen parts that are in eval mode.

    They become the plain average of each batch's mean and unbiased variance. Only the BatchNorm layers run in train
    mode, so dropout has no effect and draws no random numbers. Parameters, momentum and the modes of all modules are
    restored. A network without running statistics is not run at all. A network that is frozen as a whole has no part
    that is to stay as it is.

    Args:
        network: the network, on the device of the batches.
        batches: inputs of the network, only training data; a tuple holds several arguments.
        limit: the largest number of batches; ``None`` for all.

    Returns:
        Number of batches used.

    Raises:
        InputError: there is no batch, one has a single value per channel, or the new statistics are not finite; the old
            ones are kept then.
    """
    kept = asleep(network)
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m not in kept]
    if not norms:
        return 0
    modes = [(module, module.training) for module in network.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    count = 0
    done = False
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # in PyTorch, the cumulative average
            norm.train()
        for batch in batches:
            if limit is not None and count >= limit:
                break
            with refusing("BatchNorm recalibration", ValueError):
                network(*batch) if isinstance(batch, (tuple, list)) else network(batch)
            count += 1
        if not count:
            raise InputError("BatchNorm recalibration: no batch came: give at least one batch of training inputs")
        _check_finite(norms)
        done = True
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not done:
                for name, buffer in buffers.items():
                    norm.get_buffer(name).copy_(buffer)
    return count


def _check_finite(norms: Iterable[nn.Module]) -> None:
    if not all(bool(buffer.isfinite().all()) for norm in norms for buffer in norm.buffers()):
        raise InputError("BatchNorm recalibration: a batch gives NaN or infinity: check the data and the network")
