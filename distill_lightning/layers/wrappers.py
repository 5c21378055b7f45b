"""Networks without what wraps them: `torch.compile`, several devices, activation checkpoints, averages of weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What wrappers that have no public class call the module in them."""

_HOLDERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""Classes of wrappers that compute what their ``module`` computes."""


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself, taken out of all wrappers around it; those inside of it stay.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import unwrapped
        >>> network = nn.Linear(1, 1)
        >>> unwrapped(nn.DataParallel(network)) is network
        True
    """
    while (name := _inner_name(network)) is not None:
        network = network.get_submodule(name)
    return network


def named_parts(network: nn.Module) -> dict[str, nn.Module]:
    """All modules of a network by the names that they have without wrappers, which are left out, in its order.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import named_parts
        >>> list(named_parts(nn.Sequential(nn.DataParallel(nn.Sequential(nn.Linear(1, 1))))))
        ['', '0', '0.0']
    """
    return dict(_parts(network, "", set()))


def part_at(network: nn.Module, name: str) -> nn.Module | None:
    """The module that has a name of `named_parts`; ``None``: there is none.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers.wrappers import part_at
        >>> part_at(nn.Sequential(nn.DataParallel(nn.Linear(1, 1))), "0")
        Linear(in_features=1, out_features=1, bias=True)
    """
    module = unwrapped(network)
    for part in name.split("."):
        child = module._modules.get(part)  # noqa: SLF001  (`get_submodule` makes an error of a name that is not there)
        if child is None:
            return None
        module = unwrapped(child)
    return module


def plain_name(network: nn.Module, name: str) -> str:
    """A module's, parameter's or buffer's dotted name in a network as it is without wrappers.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import plain_name
        >>> plain_name(nn.Sequential(nn.DataParallel(nn.Linear(1, 1))), "0.module.weight")
        '0.weight'
    """
    kept: list[str] = []
    module: object = network
    for part in name.split("."):
        if part != _inner_name(module):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` is around a module, or ``module.compile()`` was called.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers.wrappers import is_compiled
        >>> is_compiled(nn.Linear(1, 1))
        False
    """
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules  # noqa: SLF001


def _inner_name(module: object) -> str | None:
    if isinstance(module, _HOLDERS):
        return "module"
    if not isinstance(module, nn.Module):
        return None
    return next((name for name in _INNER if name in module._modules), None)  # noqa: SLF001


def _parts(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from _parts(child, f"{name}.{child_name}" if name else child_name, seen)
