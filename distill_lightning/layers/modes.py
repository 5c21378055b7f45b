"""Networks in eval mode, for good or for a while; and without their compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.fx import GraphModule

from distill_lightning.errors import InputError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(module: ModuleT) -> ModuleT:
    """Put a network in eval mode and switch its gradients off; the same network is returned.

    What `torch.export` has made computes for good in the mode that it was exported in, which must be eval mode.

    Raises:
        InputError: it was exported in train mode.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import freeze
        >>> network = freeze(nn.Linear(2, 2))
        >>> network.training, network.weight.requires_grad
        (False, False)
    """
    for name, part in module.named_modules():
        if is_exported(part):
            _refuse_train_mode(name, part)
            # Nothing hangs on the flags that are left.
            del part.train, part.eval
    return module.eval().requires_grad_(requires_grad=False)


def is_exported(network: nn.Module) -> bool:
    """Whether `torch.export` has made this module, and it can be put in no other mode.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import is_exported
        >>> is_exported(nn.Linear(2, 2))
        False
    """
    if not isinstance(network, GraphModule) or "eval" not in vars(network):
        return False
    try:
        network.eval()
    except NotImplementedError:
        return True
    return False


def refuse_exported(who: str, network: nn.Module) -> None:
    """Refuse a network that is to be trained, and has a part that `torch.export` has made.

    Args:
        who: the network is, for the message.
        network: that is to be trained.

    Raises:
        InputError: there is such a part.
    """
    for name, part in network.named_modules():
        if is_exported(part):
            raise InputError(
                f"{who}{name and f', in its {name!r},'} was made by torch.export, which fixes the mode that it is in: "
                "give the network that was exported"
            )


def _refuse_train_mode(name: str, exported: nn.Module) -> None:
    for node in exported.graph.nodes:  # type: ignore[union-attr]
        schema = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("train") is True or given.get("training") is True:
            raise InputError(
                f"{name or 'the network'} was exported in train mode ({node.target}), and a frozen network must "
                "compute in eval mode: call network.eval() before torch.export.export"
            )


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
