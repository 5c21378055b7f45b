"""Networks of torchvision, timm and pytorchcv, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import nn

from distill_lightning.errors import InputError, refusing
from distill_lightning.libraries import package
from distill_lightning.networks.provenance import factory_with_recipe

# Those who make a network of another library ask for it here.
__all__ = ["package", "pytorchcv_network", "timm_network", "torchvision_network"]


@factory_with_recipe
def torchvision_network(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A classification network of torchvision, randomly initialised.

    Args:
        name: as in ``torchvision.models.list_models()``, for example ``"resnet18"``.
        num_classes: ``K``.
        in_channels: channels of the images; for any number but 3 the first convolution is replaced by a new one.

    Raises:
        InputError: torchvision has no such network.

    Example:
        >>> from distill_lightning.networks import torchvision_network
        >>> network = torchvision_network("resnet18", num_classes=10, in_channels=1)
        >>> network.conv1.in_channels, network.fc.out_features
        (1, 10)
    """
    models = package("torchvision.models", extra="")
    if name not in models.list_models(module=models):
        near = _near(name, models.list_models(module=models))
        raise InputError(f"torchvision has no network {name!r}: {near}see torchvision.models.list_models()")
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return network if in_channels == 3 else _with_input_channels(network, in_channels)


@factory_with_recipe
def timm_network(name: str, *, num_classes: int, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """A network of timm.

    Args:
        name: as in ``timm.list_models()``, for example ``"resnet18"``.
        num_classes: ``K``.
        in_channels: channels of the images.
        pretrained: load timm's weights, which are downloaded unless they are cached.

    Raises:
        InputError: timm is not installed, or has no such network or no such weights of it.

    Example:
        >>> from distill_lightning.networks import timm_network
        >>> network = timm_network("resnet10t", num_classes=10)
        >>> network.fc.out_features
        10
    """
    timm = package("timm", extra="timm")
    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise InputError(f"timm has no network {name!r}: {_near(name, timm.list_models())}see timm.list_models()")
    with refusing(f"timm_network {name!r}", RuntimeError):
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels
        )
    return network


@factory_with_recipe
def pytorchcv_network(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """A network of pytorchcv, which has the CIFAR networks of the papers (``"resnet20_cifar100"`` and so on).

    Args:
        name: as in pytorchcv's model provider.
        num_classes: ``K``.
        in_channels: channels of the images.
        image_size: rows and columns of the images; ``None`` for the network's own (32 for CIFAR, 224 for ImageNet).
        pretrained: load pytorchcv's weights, which are downloaded unless they are cached.

    Raises:
        InputError: pytorchcv is not installed, or has no such network.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import pytorchcv_network
        >>> network = pytorchcv_network("resnet20_cifar10", num_classes=10)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    provider = package("pytorchcv.model_provider", extra="pytorchcv")
    options: dict[str, Any] = {"pretrained": pretrained, "in_channels": in_channels}
    if image_size is not None:
        options["in_size"] = (image_size, image_size)
    try:
        network: nn.Module = provider.get_model(name, **options)
    except ValueError as error:
        raise InputError(f"pytorchcv has no network {name!r}: see pytorchcv's list of models") from error
    features = network.get_submodule("features")
    if image_size is not None and isinstance(getattr(features, "final_pool", None), nn.AvgPool2d):
        # The CIFAR networks always pool 8x8, whatever in_size says; this pools any size, and 8x8 to the same result.
        features.add_module("final_pool", nn.AdaptiveAvgPool2d(1))
    # The CIFAR networks accept only 10 or 100 classes; otherwise the last layer is replaced, as in fine-tuning.
    if network.num_classes != num_classes:
        if not isinstance(network.output, nn.Linear):
            raise InputError(f"pytorchcv's {name!r} has {network.num_classes} classes and no last layer to replace")
        network.output = nn.Linear(network.output.in_features, num_classes)
        network.num_classes = num_classes  # type: ignore[assignment]  # a plain number, not a parameter
    return network


def _with_input_channels(network: nn.Module, in_channels: int) -> nn.Module:
    """Replace the first convolution by a new one of the same kind for another number of channels."""
    name, conv = next((name, child) for name, child in network.named_modules() if isinstance(child, nn.Conv2d))
    options = ("out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    replacement = nn.Conv2d(
        in_channels, **{option: getattr(conv, option) for option in options}, bias=conv.bias is not None
    )
    parent, _, child_name = name.rpartition(".")
    setattr(network.get_submodule(parent), child_name, replacement)
    return network


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known))
    return f"similar names: {', '.join(near)}; " if near else ""
