"""Networks in eval mode, for good or for a while; without their compilation; and whether one has stayed the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(module: ModuleT) -> ModuleT:
    """Put a network in eval mode and switch its gradients off; the same network is returned.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import freeze
        >>> network = freeze(nn.Linear(2, 2))
        >>> network.training, network.weight.requires_grad
        (False, False)
    """
    return module.eval().requires_grad_(requires_grad=False)


def wake(network: nn.Module) -> None:
    """Put a network in train mode, but for its frozen parts.

    A part all of whose parameters are frozen keeps the mode that it is in, with everything inside it: a BatchNorm in
    eval mode does not move its statistics. A part without parameters goes with the one that it is in.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import freeze, wake
        >>> network = nn.Sequential(freeze(nn.BatchNorm1d(2)), nn.Dropout(), nn.Linear(2, 2)).eval()
        >>> wake(network)
        >>> [layer.training for layer in network]
        [False, True, True]
    """
    modes = {child: child.training for part in network.modules() if _is_frozen(part) for child in part.modules()}
    network.train()
    for child, training in modes.items():
        child.training = training


def asleep(network: nn.Module) -> set[nn.Module]:
    """All modules in eval mode in the frozen parts of a network which has something else to train.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import asleep, freeze
        >>> network = nn.Sequential(freeze(nn.BatchNorm1d(2)), nn.BatchNorm1d(2))
        >>> asleep(network) == {network[0]}
        True
    """
    if _is_frozen(network):
        return set()
    inside = {child for part in network.modules() if _is_frozen(part) for child in part.modules()}
    return {child for child in inside if not child.training}


def _is_frozen(part: nn.Module) -> bool:
    parameters = list(part.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Eval mode inside this context; afterwards every module is in the mode that it had.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import eval_mode
        >>> network = nn.Dropout()
        >>> with eval_mode(network):
        ...     network.training
        False
        >>> network.training
        True
    """
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def uncompiled(network: nn.Module) -> nn.Module:
    """The network itself, taken out of the wrapper of ``torch.compile(network)`` if it has one.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import uncompiled
        >>> network = nn.Linear(1, 1)
        >>> uncompiled(network) is network
        True
    """
    plain: nn.Module = getattr(network, "_orig_mod", network)
    return plain


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, persistent or not: names, types, shapes and every byte.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import fingerprint
        >>> network = nn.Linear(2, 2)
        >>> before = fingerprint(network)
        >>> with torch.no_grad():
        ...     weight = network.weight.add_(1)
        >>> fingerprint(network) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in {**module.state_dict(), **dict(module.named_buffers())}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # The view as bytes covers types that numpy lacks (bfloat16).
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
