"""What a layer raises about a batch, in words that say which network it is and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from distill_lightning.data.batch import Batch, first_tensor, tensors_of
from distill_lightning.data.detection_batch import DetectionBatch
from distill_lightning.errors import InputError
from distill_lightning.teachers.ensemble import TeacherEnsemble

GivenT = TypeVar("GivenT")
ResultT = TypeVar("ResultT")


def explained(module: Any, run: Callable[[GivenT], ResultT], given: GivenT, where: str) -> ResultT:
    """Run networks on a batch; should a layer fail on the shape that the batch has, say so in one line.

    Nothing is looked at before something has failed. Then the batch is run once more, uncompiled and with a hook on
    every layer that could be the reason. A failure that these do not explain is raised as it was.

    Args:
        module: whose student, teachers and other layers are run.
        run: a function of the batch.
        given: the batch, or a tensor of inputs.
        where: which batch it is, for the message.

    Raises:
        InputError: the inputs hold no tensor, the first layer of a network takes another number of channels or values
            than the batch has, or a BatchNorm in train mode gets a single value per channel.
    """
    try:
        return run(given)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        inputs = given.input if isinstance(given, Batch) else given
        # Networks of texts may read them as they are, and fail for other reasons.
        if not isinstance(error, RuntimeError) and next(tensors_of(inputs), None) is None:
            raise InputError(
                f"{type(module).__name__}: {where} has no tensor among its inputs, which are of the type "
                f"{type(inputs).__name__}: let the data module give tensors (of PIL images v2.ToImage() makes some)"
            ) from error
        if isinstance(error, (InputError, torch.OutOfMemoryError, TypeError, AttributeError)):
            raise
        reason = _reason(module, partial(run, given), given, where)
        if reason is None:
            raise
        raise InputError(f"{type(module).__name__}: {reason}") from error


def _reason(module: Any, run_again: Callable[[], Any], given: Any, where: str) -> str | None:
    images = first_tensor(given.input if isinstance(given, Batch) else given)
    if isinstance(given, DetectionBatch):
        # Its images come one by one.
        images = images[None]
    found: list[str] = []
    handles = []
    for who, network in _networks_of(module):
        first = _First(who, images, where, found)
        handles += [layer.register_forward_pre_hook(partial(first, name)) for name, layer in network.named_modules()]
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            handles.append(layer.register_forward_pre_hook(partial(_look_at_norm, name, where, found)))
    try:
        # The failure itself comes once more, and is known already.
        with torch.compiler.set_stance("force_eager"), contextlib.suppress(Exception):
            run_again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _networks_of(module: Any) -> Iterator[tuple[str, nn.Module]]:
    if hasattr(module, "student"):
        yield f"the student ({type(module.student).__name__})", module.student
    given = list(getattr(module, "teachers", ()))
    members = [one for network in given for one in (network if isinstance(network, TeacherEnsemble) else [network])]
    for number, network in enumerate(members):
        yield f"teacher {number} ({type(network).__name__})", network


class _First:
    """Compares what the first layer with weights of a network takes with what it gets."""

    def __init__(self, who: str, images: Tensor, where: str, found: list[str]) -> None:
        self.who, self.images, self.where, self.found = who, images, where, found
        self.is_over = False

    def __call__(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        taken = _taken_by(layer)
        if self.is_over or taken is None or not inputs or not isinstance(inputs[0], Tensor):
            return
        self.is_over = True
        what, wanted, dimension = taken
        layer_name = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
        shape = ", ".join(map(str, self.images.shape[1:]))
        if of_type := _other_type(layer, inputs[0]):
            self.found.append(f"{self.who} cannot read {self.where} by its first layer, {layer_name}: {of_type}")
            return
        # A lazy layer takes whatever comes first.
        if not wanted or inputs[0].ndim < abs(dimension) or inputs[0].shape[dimension] == wanted:
            return
        got = inputs[0].shape[dimension]
        self.found.append(
            f"{self.who} reads {wanted} {what}{'s' if wanted > 1 else ''} by its first layer, {layer_name}, which gets "
            f"{got} of the inputs (N, {shape}) of {self.where}: "
            f"{_way_out(layer, inputs[0].shape, what, wanted, got)}"
        )


def _taken_by(layer: nn.Module) -> tuple[str, int, int] | None:
    """What a layer with weights takes, how many, and in which dimension; ``None``: it has none."""
    if isinstance(layer, _ConvNd):
        return "channel", layer.in_channels, -1 - len(layer.kernel_size)
    if isinstance(layer, _BatchNorm):
        return "channel", layer.num_features, 1
    if isinstance(layer, nn.Linear):
        return "value", layer.in_features, -1
    return None


def _other_type(layer: nn.Module, given: Tensor) -> str | None:
    """What is wrong with the type of a layer's input, and the way out; ``None``: nothing."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or given.dtype == weight.dtype:
        return None
    if given.dtype == torch.uint8:
        return "its inputs are bytes: let the data module give v2.ToDtype(torch.float32, scale=True)"
    if given.is_floating_point() and torch.is_autocast_enabled(given.device.type):
        return None
    return f"its inputs are {given.dtype}, its weights {weight.dtype}: let the data module convert them"


def _way_out(layer: nn.Module, shape: Sequence[int], what: str, wanted: int, got: int) -> str:
    if what == "value":
        return "build the network for such inputs, or let the data module give others"
    if isinstance(layer, nn.Conv2d) and len(shape) == 3:
        return "they have no channels: let the data module give image[None]"
    if isinstance(layer, nn.Conv2d) and shape[-1] == wanted:
        return "their channels are last: let the data module give image.permute(2, 0, 1)"
    change = {(True, False): f"image.expand({wanted}, -1, -1)", (False, True): "image.mean(0, keepdim=True)"}
    how = change.get((got == 1, wanted == 1))
    return (
        f"build the network with in_channels={got} (timm: in_chans={got}), or let the data module give images of "
        f"{wanted}{f', {how}' if how else ''}"
    )


def _look_at_norm(name: str, where: str, found: list[str], layer: _BatchNorm, inputs: tuple[Any, ...]) -> None:
    # SyncBatchNorm has the other processes' values, too.
    if not layer.training or isinstance(layer, nn.SyncBatchNorm) or not isinstance(inputs[0], Tensor):
        return
    if inputs[0].numel() == inputs[0].shape[1]:
        found.append(
            f"{type(layer).__name__} {name!r} cannot be trained on {where}, which leaves it one value per channel: "
            "where that is the last, smaller batch of an epoch, give the data module (or its DataLoader) "
            "drop_last=True, else a larger batch_size"
        )
