"""Networks of torchvision, timm and pytorchcv, by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from distill_lightning.errors import InputError, check_one_of, refusing
from distill_lightning.libraries import package
from distill_lightning.networks.provenance import factory_with_recipe

# Those who make a network of another library ask for it here.
__all__ = ["package", "pytorchcv_network", "timm_network", "torchvision_network"]

# pytorchcv names six of this family; the blocks of all are its own.
_CIFAR_RESNEXT = re.compile(r"resnext(\d+)_(\d+)x(\d+)d_cifar\d+")


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
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    stem: Literal["own", "conv3x3"] = "own",
    pretrained: bool = False,
) -> nn.Module:
    """A network of pytorchcv, which has the CIFAR networks of the papers (``"resnet20_cifar100"`` and so on).

    Args:
        name: as in pytorchcv's model provider; or a ResNeXt for CIFAR with other numbers, for example
            ``"resnext29_8x64d_cifar100"``, of 29 layers with 8 groups of 64 channels.
        num_classes: ``K``.
        in_channels: channels of the images.
        image_size: rows and columns of the images; ``None`` for the network's own (32 for CIFAR, 224 for ImageNet).
        stem: what the network begins with. ``"conv3x3"``: one 3x3 convolution of stride 1, in place of the 7x7
            convolution and the pooling with which networks for ImageNet shrink an image four times; so ResNet-18,
            DenseNet-121 and others are trained on CIFAR.
        pretrained: load pytorchcv's weights, which are downloaded unless they are cached.

    Raises:
        InputError: pytorchcv is not installed, or has no such network or no such weights of it; or the network does not
            begin as networks for ImageNet do, and ``stem`` is to be another.

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
    check_one_of("stem", stem, ("own", "conv3x3"))
    try:
        network: nn.Module = provider.get_model(name, **options)
    except ValueError as error:
        found = _CIFAR_RESNEXT.fullmatch(name)
        if found is None:
            raise InputError(f"pytorchcv has no network {name!r}: see pytorchcv's list of models") from error
        network = _cifar_resnext(name, *map(int, found.groups()), num_classes=num_classes, **options)
    features = network.get_submodule("features")
    if stem != "own":
        _shrink_stem(name, features)
    is_resized = image_size is not None or stem != "own"
    if is_resized and isinstance(getattr(features, "final_pool", None), nn.AvgPool2d):
        # These always pool 8x8 or 7x7, whatever in_size says; this pools any size, and theirs to the same result.
        features.add_module("final_pool", nn.AdaptiveAvgPool2d(1))
    # The CIFAR networks accept only 10 or 100 classes; otherwise the last layer is replaced, as in fine-tuning.
    if network.num_classes != num_classes:
        if not isinstance(network.output, nn.Linear):
            raise InputError(f"pytorchcv's {name!r} has {network.num_classes} classes and no last layer to replace")
        network.output = nn.Linear(network.output.in_features, num_classes)
        network.num_classes = num_classes  # type: ignore[assignment]  # a plain number, not a parameter
    return network


def _cifar_resnext(name: str, depth: int, groups: int, width: int, *, pretrained: bool, **options: Any) -> nn.Module:
    """A ResNeXt for CIFAR that pytorchcv has no name for."""
    if (depth - 2) % 9:
        raise InputError(f"pytorchcv_network {name!r}: a ResNeXt for CIFAR has 9 n + 2 layers, 20, 29 or 38 say")
    if pretrained:
        raise InputError(f"pytorchcv has no weights of {name!r}: leave pretrained out")
    make = package("pytorchcv.models.resnext_cifar", extra="pytorchcv").get_resnext_cifar
    network: nn.Module = make(blocks=depth, cardinality=groups, bottleneck_width=width, **options)
    return network


def _shrink_stem(name: str, features: nn.Module) -> None:
    """Put a 3x3 convolution of stride 1 in the place of a first block that shrinks the image."""
    first = getattr(features, "init_block", None)
    convolution = next((part for part in first.modules() if isinstance(part, nn.Conv2d)), None) if first else None
    if convolution is None or convolution.stride == (1, 1):
        raise InputError(f"pytorchcv's {name!r} begins with no convolution that shrinks the image: leave stem out")
    stem = nn.Conv2d(convolution.in_channels, convolution.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(stem.weight)  # as pytorchcv draws its convolutions
    features.add_module("init_block", stem)


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
