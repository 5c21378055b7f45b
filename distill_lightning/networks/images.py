"""Small networks for small images."""

from __future__ import annotations

from torch import Tensor, nn

from distill_lightning.errors import InputError
from distill_lightning.layers import GaussianHead
from distill_lightning.networks.provenance import class_with_recipe, set_recipe
from distill_lightning.networks.sizes import check_sizes


@class_with_recipe
class SmallCNN(nn.Module):
    """A plain convolutional network for small images, without shortcuts.

    Three times a 3x3 convolution, BatchNorm and ReLU, with ``width``, ``2 * width`` and ``4 * width`` channels, and
    2x2 max pooling between them; then global average pooling and a linear layer ``head``. It has 53,362 parameters
    with 10 classes and the defaults. For feature distillation, tap ``features``: after the last ReLU, before pooling.

    Args:
        num_classes: ``K``.
        in_channels: channels of the images, which need at least 4 rows and columns.
        width: channels of the first convolution.

    Raises:
        InputError: a size that is not positive.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import SmallCNN
        >>> network = SmallCNN(num_classes=10)
        >>> network(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in network.parameters())
        53362
    """

    def __init__(self, num_classes: int, *, in_channels: int = 1, width: int = 24) -> None:
        super().__init__()
        arguments = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        check_sizes("SmallCNN", arguments)
        set_recipe(self, arguments)
        self.features = nn.Sequential(
            *self._convolution(in_channels, width),
            nn.MaxPool2d(2),
            *self._convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *self._convolution(2 * width, 4 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return conv, nn.BatchNorm2d(channels_out), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``."""
        logits: Tensor = self.head(self.pool(self.features(images)).flatten(1))
        return logits


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


@class_with_recipe
class SmallResNet(nn.Module):
    """A residual network for small images on a CPU, used in the demos and the tests.

    A 3x3 stem, then three stages ``stage1`` to ``stage3`` of ``depth`` residual blocks with ``width``, ``2 * width``
    and ``4 * width`` channels (the second and third stage halve the image), global average pooling and a linear layer
    ``head`` (a `GaussianHead` for regression). Width 8 and depth 1 cost 2.4 million multiply-accumulates at 28x28. For
    feature distillation, tap ``stage3``: after the last ReLU, before pooling.

    Args:
        num_classes: ``K`` of a classifier.
        num_targets: ``d`` of a regression network, instead of ``num_classes``.
        in_channels: channels of the images.
        width: channels of the first stage.
        depth: residual blocks in each stage.

    Raises:
        InputError: a size that is not positive, or not exactly one of ``num_classes`` and ``num_targets``.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import SmallResNet
        >>> SmallResNet(num_classes=10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> SmallResNet(num_targets=2)(torch.zeros(2, 1, 28, 28)).shape  # means and log-variances
        torch.Size([2, 4])
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
            raise InputError("SmallResNet needs either num_classes (a classifier) or num_targets (a regression)")
        arguments = {**outputs, "in_channels": in_channels, "width": width, "depth": depth}
        check_sizes("SmallResNet", arguments)
        set_recipe(self, arguments)
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
