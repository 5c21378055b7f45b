"""Students and teachers by name, typed so that they can be written in YAML, and networks with weights from a file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.layers import GaussianHead
from distill_lightning.weights import load_strictly, read_weights

P = ParamSpec("P")
Recipe = dict[str, Any]
"""How a network was built, in plain types: ``{"factory": name, "arguments": {...}}``."""

_FACTORIES: dict[str, Callable[..., nn.Module]] = {}


def recipe_of(network: nn.Module) -> Recipe | None:
    """How one of this module's factories built ``network``; ``None`` for a network built elsewhere."""
    recipe: Recipe | None = network.__dict__.get("_recipe")
    return recipe


def build_from(recipe: Recipe) -> nn.Module:
    """Build a network again from its recipe, with fresh weights (or the file's, if it was `Pretrained`).

    Only this module's own factories are ever called, whatever the recipe names.

    Raises:
        InputError: the recipe names no factory of this module.
    """
    if recipe.get("factory") not in _FACTORIES:
        raise InputError(f"no network factory {recipe.get('factory')!r}: known are {', '.join(_FACTORIES)}")
    arguments = dict(recipe["arguments"])
    if isinstance(arguments.get("network"), Mapping):
        arguments["network"] = build_from(arguments["network"])
    return _FACTORIES[recipe["factory"]](**arguments)


def _recorded(factory: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """Have a factory note its recipe on the networks it returns."""
    name = factory.__name__
    names = factory.__code__.co_varnames

    @wraps(factory)
    def recording(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        arguments = {key: _plain(value) for key, value in given.items()}
        network = factory(*args, **kwargs)
        # A network from elsewhere inside leaves nothing to rebuild from.
        unknown = any(isinstance(given[key], nn.Module) and value is None for key, value in arguments.items())
        network.__dict__["_recipe"] = None if unknown else {"factory": name, "arguments": arguments}
        return network

    _FACTORIES[name] = recording
    return recording


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return recipe_of(value)
    return str(value) if isinstance(value, Path) else value


class _Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut; a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.relu(self.norm1(self.conv1(inputs)))
        outputs: Tensor = self.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))
        return outputs


class SmallResNet(nn.Module):
    """A residual network for small images on a CPU; the family of the demos and the tests.

    A 3x3 stem, then three stages ``stage1`` to ``stage3`` of ``depth`` residual blocks with ``width``, ``2 * width``
    and ``4 * width`` channels (the second and third stage halve the image), global average pooling and a linear layer
    ``head`` (a `GaussianHead` in a regression). Width 8 and depth 1 cost 2.4 million multiply-adds at 28x28. The tap
    for feature distillation is ``stage3``: after the last ReLU, before pooling.

    Args:
        num_classes: ``K`` of a classifier.
        num_targets: ``d`` of a regression, instead of ``num_classes``.
        in_channels: channels of the images.
        width: channels of the first stage.
        depth: residual blocks in each stage.

    Raises:
        InputError: a size that is not positive.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        num_targets: int | None = None,
        in_channels: int = 1,
        width: int = 8,
        depth: int = 1,
    ) -> None:
        super().__init__()
        outputs = {"num_targets": num_targets} if num_classes is None else {"num_classes": num_classes}
        if (num_classes is not None and num_targets is not None) or None in outputs.values():
            raise InputError("SmallResNet needs num_classes (a classifier) or num_targets (a regression), and not both")
        arguments = {**outputs, "in_channels": in_channels, "width": width, "depth": depth}
        for name, value in arguments.items():
            if not value or value < 1:
                raise InputError(f"SmallResNet: {name} must be at least 1, got {value}")
        self.__dict__["_recipe"] = {"factory": "SmallResNet", "arguments": arguments}
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stage1 = self._stage(width, width, depth, stride=1)
        self.stage2 = self._stage(width, 2 * width, depth, stride=2)
        self.stage3 = self._stage(2 * width, 4 * width, depth, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, num_classes) if num_classes else GaussianHead(4 * width, num_targets or 1)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, depth: int, *, stride: int) -> nn.Sequential:
        first = _Block(channels_in, channels_out, stride)
        return nn.Sequential(first, *(_Block(channels_out, channels_out, 1) for _ in range(depth - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)``, or a Gaussian's parameters ``(N, 2 d)``, of images ``(N, C, H, W)``."""
        feature = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(self.pool(feature).flatten(1))
        return logits


_FACTORIES["SmallResNet"] = SmallResNet


@_recorded
def torchvision_network(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A classification network of torchvision, randomly initialised.

    Args:
        name: as in ``torchvision.models.list_models()``, for example ``"resnet18"``.
        num_classes: ``K``.
        in_channels: channels of the images; other than 3 replaces the first convolution by a new one.

    Raises:
        InputError: torchvision has no such network.
    """
    models = _package("torchvision.models", extra="")
    if name not in models.list_models(module=models):
        raise InputError(f"torchvision has no network {name!r}: see torchvision.models.list_models()")
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return network if in_channels == 3 else _with_input_channels(network, in_channels)


@_recorded
def timm_network(name: str, *, num_classes: int, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """A network of timm.

    Args:
        name: as in ``timm.list_models()``, for example ``"resnet18"``.
        num_classes: ``K``.
        in_channels: channels of the images.
        pretrained: load timm's weights, which fetches them unless they are cached.

    Raises:
        InputError: timm is not installed, or has no such network.
    """
    timm = _package("timm", extra="timm")
    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise InputError(f"timm has no network {name!r}: see timm.list_models()")
    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    return network


@_recorded
def pytorchcv_network(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """A network of pytorchcv, which has the CIFAR networks of the papers (``"resnet20_cifar100"`` and so on).

    Args:
        name: as in pytorchcv's model provider.
        num_classes: ``K``.
        in_channels: channels of the images.
        image_size: rows and columns of the images; ``None`` leaves the network's own (32 for CIFAR, 224 for ImageNet).
        pretrained: load pytorchcv's weights, which fetches them unless they are cached.

    Raises:
        InputError: pytorchcv is not installed, or has no such network.
    """
    provider = _package("pytorchcv.model_provider", extra="pytorchcv")
    options: dict[str, Any] = {"pretrained": pretrained, "in_channels": in_channels}
    if image_size is not None:
        options["in_size"] = (image_size, image_size)
    try:
        network: nn.Module = provider.get_model(name, **options)
    except ValueError as error:
        raise InputError(f"pytorchcv has no network {name!r}: see pytorchcv's list of models") from error
    features = network.get_submodule("features")
    if image_size is not None and isinstance(getattr(features, "final_pool", None), nn.AvgPool2d):
        # The CIFAR networks pool a fixed 8x8, whatever in_size says; this pools any size, and 8x8 to the same.
        features.add_module("final_pool", nn.AdaptiveAvgPool2d(1))
    # The CIFAR networks accept 10 or 100 classes alone; another number gets a new last layer, as for fine-tuning.
    if network.num_classes != num_classes:
        if not isinstance(network.output, nn.Linear):
            raise InputError(f"pytorchcv's {name!r} has {network.num_classes} classes and no last layer to replace")
        network.output = nn.Linear(network.output.in_features, num_classes)
        network.num_classes = num_classes  # type: ignore[assignment]  # a plain number, not a parameter
    return network


@_recorded
def Pretrained(network: nn.Module, checkpoint: str | Path, part: str | None = None) -> nn.Module:  # noqa: N802  (reads as a class in YAML)
    """A network with its weights from a file; the same network is returned, so dotted layer paths stay as they are.

    The file is ``.safetensors``, or a PyTorch file that is a plain state dict, has one under ``"state_dict"``, or is a
    checkpoint of this package (then the student's weights are taken). Only tensors are read: a file that would run
    code when unpickled is refused.

    Args:
        network: built like the one that was saved.
        checkpoint: path of the file.
        part: the submodule of what was saved whose weights are taken, in place of the student: ``"generator"`` of a
            `GeneratorModule`'s checkpoint, ``"paraphrasers.0"`` of a `ParaphraserModule`'s.

    Raises:
        InputError: the file is missing, damaged, unsafe, has no such part, or holds another architecture's weights.
    """
    load_strictly(network, read_weights(Path(checkpoint), part=part), source=str(checkpoint))
    return network


class AdaptedInput(nn.Module):
    r"""A network that reads inputs as it was trained to, whatever the data module gives to the others.

    .. math:: x \mapsto \mathrm{resize}\left( \frac{x \cdot \sigma_0 + \mu_0 - \mu}{\sigma} \right)

    First the values: the data module's normalisation is undone (``source_mean``, ``source_std``) and the network's own
    is done (``mean``, ``std``). Then the size: bilinear, with antialiasing, in float32. The state dict is the network's
    with ``network.`` before every name, and dotted layer paths begin so, too; the numbers given here are no part of it.

    ::

        teachers:
          - class_path: distill_lightning.AdaptedInput
            init_args:
              network: {class_path: distill_lightning.timm_network, init_args: {...}}
              size: [380, 380]                    # the data module's images are smaller
              mean: 0.5                           # Inception's normalisation ...
              std: 0.5
              source_mean: [0.485, 0.456, 0.406]  # ... where the data module does ImageNet's
              source_std: [0.229, 0.224, 0.225]

    Args:
        network: reads images ``(N, C, H, W)``.
        size: rows and columns that ``network`` wants; ``None``: as they come.
        mean: :math:`\mu`, which is subtracted from values in ``[0, 1]`` for ``network``: a number, or one per channel;
            ``None``, and ``std`` too: the values stay as they come.
        std: :math:`\sigma`, likewise.
        source_mean: :math:`\mu_0`, which the data module has subtracted: a number, or one per channel.
        source_std: :math:`\sigma_0`, which the data module has divided by, likewise.

    Raises:
        InputError: a ``size`` that is none, a standard deviation that is not positive, one of ``mean`` and ``std``
            without the other, a source without them, different numbers of channels, or, on a call, inputs with another
            number of channels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        size: Sequence[int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        source_mean: float | Sequence[float] = 0.0,
        source_std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise InputError(f"AdaptedInput: size must be rows and columns, both at least 1, got {list(size)}")
        if (mean is None) != (std is None):
            raise InputError(f"AdaptedInput: mean and std belong together, got mean={mean} and std={std}")
        if mean is None and (source_mean, source_std) != (0.0, 1.0):
            raise InputError(
                "AdaptedInput: source_mean and source_std give way to the network's own: give mean and std"
            )
        given = {"mean": 0.0 if mean is None else mean, "std": 1.0 if std is None else std}
        given |= {"source_mean": source_mean, "source_std": source_std}
        values = {name: _per_channel(value) for name, value in given.items()}
        channels = {len(value) for value in values.values() if len(value) > 1}
        if len(channels) > 1:
            raise InputError(f"AdaptedInput: mean, std and their sources are for {sorted(channels)} channels: give one")
        for name in ("std", "source_std"):
            if not (values[name] > 0).all():
                raise InputError(f"AdaptedInput: {name} must be positive, got {given[name]}")
        self.network = network
        self.size = None if size is None else (int(size[0]), int(size[1]))
        scale = values["source_std"] / values["std"]
        shift = (values["source_mean"] - values["mean"]) / values["std"]
        # Not persistent: what the network's own files hold is all that there is to load.
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, value.float()[:, None, None], persistent=False)
        inner = recipe_of(network)
        arguments: dict[str, Any] = {"network": inner, "size": self.size and list(self.size)}
        if mean is not None:
            arguments |= {name: value.tolist() for name, value in values.items()}
        self.__dict__["_recipe"] = None if inner is None else {"factory": "AdaptedInput", "arguments": arguments}

    def extra_repr(self) -> str:
        """The size, which no weight tells."""
        return f"size={self.size}"

    def forward(self, images: Tensor) -> Tensor:
        """The network's output for ``images`` as the data module gives them, ``(N, C, H, W)``."""
        channels = max(len(self.scale), len(self.shift))
        if images.ndim != 4 or channels not in (1, images.shape[1]):
            raise InputError(
                f"AdaptedInput: inputs of shape {tuple(images.shape)} do not go with the {channels} channels of mean "
                "and std: give images (N, C, H, W), and one number per channel or one for all"
            )
        values = images * self.scale + self.shift
        if self.size is not None:
            resized = F.interpolate(wide(values), self.size, mode="bilinear", antialias=True, align_corners=False)
            values = resized.to(values.dtype)
        output: Tensor = self.network(values)
        return output


_FACTORIES["AdaptedInput"] = AdaptedInput


def _per_channel(value: float | Sequence[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).reshape(-1)


def likely_input_shape(network: nn.Module) -> tuple[int, int, int]:
    """The first convolution's input channels, at 32x32: enough to find the channels of a convolutional feature map.

    Raises:
        InputError: the network has no two-dimensional convolution to tell from.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, 32, 32)
    raise InputError(f"{type(network).__name__} has no convolution to tell its input from: give input_shape=(C, H, W)")


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


def _package(name: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".", maxsplit=1)[0]:
            raise
        package = f"'distill-lightning[{extra}]'" if extra else error.name
        raise InputError(f"{error.name} is not installed: pip install {package}") from error
