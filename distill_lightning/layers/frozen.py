"""Freezing a network, and telling whether it has stayed the same."""

from __future__ import annotations

import hashlib
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
