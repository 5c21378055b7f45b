"""How a network is given inputs of any kind, and which of its outputs is meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distill_lightning.errors import InputError

InputShape = Sequence[int] | Mapping[str, Sequence[int]]
"""Shape of one input, ``(C, H, W)`` say, or those of the tensors that a network gets by keyword, by their names."""


def plain_shape(shape: InputShape) -> InputShape:
    """A shape in tuples, whatever sequences it was given in.

    Example:
        >>> from distill_lightning.layers.call import plain_shape
        >>> plain_shape([1, 28, 28])
        (1, 28, 28)
        >>> plain_shape({"image": [1, 36, 60], "pose": [2]})
        {'image': (1, 36, 60), 'pose': (2,)}
    """
    return {name: tuple(part) for name, part in shape.items()} if isinstance(shape, Mapping) else tuple(shape)


def call(network: nn.Module, inputs: Any) -> Tensor:
    """Run a network on a batch's inputs, and take the one output that is meant.

    Args:
        network: that is run.
        inputs: what it reads, `distill_lightning.Batch.input` for example: a dict by keyword, a tuple or list by
            position, anything else as it is.

    Returns:
        What the network returns, see `only_output`.

    Raises:
        InputError: the network takes no argument of a dict's key, not as many as a tuple has, or does not return one
            output.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import call
        >>> network = nn.Bilinear(2, 3, 1)
        >>> call(network, (torch.zeros(4, 2), torch.zeros(4, 3))).shape
        torch.Size([4, 1])
        >>> call(network, {"input1": torch.zeros(4, 2), "input2": torch.zeros(4, 3)}).shape
        torch.Size([4, 1])
    """
    return only_output(network, outputs_of(network, inputs))


def outputs_of(network: Callable[..., Any], inputs: Any) -> Any:
    """Run a network, or a tap of one, on a batch's inputs; arguments as of `call`, the output is returned as it is.

    Raises:
        InputError: the network takes no argument of a dict's key, or not as many as a tuple has.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import outputs_of
        >>> outputs_of(nn.Bilinear(2, 3, 1), [torch.zeros(4, 2), torch.zeros(4, 3)]).shape
        torch.Size([4, 1])
    """
    if isinstance(inputs, Mapping):
        try:
            return network(**inputs)
        except TypeError:
            _check_keywords(network, inputs)
            raise
    if isinstance(inputs, (tuple, list)):
        try:
            return network(*inputs)
        except TypeError:
            _check_positions(network, inputs)
            raise
    return network(inputs)


def by_position(network: nn.Module, inputs: Any) -> Any:
    """Inputs by name as a tuple in the order of a network's arguments; any other inputs as they are.

    Args:
        network: that is to get them.
        inputs: of a batch.

    Raises:
        InputError: the network takes no argument of a key, or takes one by keyword alone.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import by_position
        >>> by_position(nn.Bilinear(1, 1, 1), {"input2": torch.ones(1, 1), "input1": torch.zeros(1, 1)})
        (tensor([[0.]]), tensor([[1.]]))
    """
    if not isinstance(inputs, Mapping):
        return inputs
    _check_keywords(network, inputs)
    bound = inspect.signature(network.forward).bind(**inputs)
    # A default may stand between two that are given.
    bound.apply_defaults()
    if bound.kwargs:
        raise InputError(
            f"{type(network).__name__} takes {', '.join(bound.kwargs)} by keyword alone, and here it is called by "
            "position: wrap it in a network that takes such arguments"
        )
    return bound.args


def only_output(network: nn.Module, output: Any) -> Tensor:
    """The tensor that is meant among what a network returns.

    That is the tensor itself, the field ``logits`` of a dict, a NamedTuple or an output object of the ``transformers``
    library, or the only tensor in a dict or tuple. Auxiliary outputs, which some networks give in train mode, are left
    out: no loss reaches what computes them.

    Args:
        network: that returned it, for the message.
        output: of the network.

    Raises:
        InputError: there is no such tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import only_output
        >>> only_output(nn.Identity(), {"loss": torch.tensor(0.1), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    named = output._asdict() if isinstance(output, tuple) and hasattr(output, "_asdict") else output
    parts: Mapping[Any, Any] = {}
    if isinstance(named, Mapping):
        parts = named
    elif isinstance(named, (tuple, list)):
        parts = dict(enumerate(named))
    if isinstance(parts.get("logits"), Tensor):
        logits: Tensor = parts["logits"]
        return logits
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    names = ", ".join(map(str, parts)) if isinstance(named, Mapping) else f"{len(tensors)} tensors"
    of = f" of {names}" if parts else ""
    raise InputError(
        f"{type(network).__name__} returns {type(output).__name__}{of}, and one tensor, or one named logits, "
        "is needed: wrap it in a module that returns that"
    )


def _check_positions(network: Any, inputs: Sequence[Any]) -> None:
    """Refuse more or fewer inputs than a network takes by position."""
    name, signature = _taken_by(network)
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise InputError(
            f"{name} takes {', '.join(signature.parameters)}, and the batch gives it {len(inputs)} inputs by position "
            f"({error}): if they are views of its samples, wrap the data in IndexedDataModule(datamodule, "
            "join_views=True)"
        ) from error


def _check_keywords(network: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse keys of a batch that a network has no argument for, or whose arguments it lacks."""
    name, signature = _taken_by(network)
    try:
        signature.bind(**inputs)
    except TypeError as error:
        raise InputError(
            f"{name} takes {', '.join(signature.parameters)}, and the batch gives it {', '.join(inputs)} by keyword "
            f"({error}): name the batch's entries so, or its only input 'input'"
        ) from error


def _taken_by(network: Any) -> tuple[str, inspect.Signature]:
    """The name of a network, or of that which a tap runs, and the arguments that it takes."""
    run = network if isinstance(network, nn.Module) else getattr(network, "network", network)
    return type(run).__name__, inspect.signature(getattr(run, "forward", run))
