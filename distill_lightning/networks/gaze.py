"""A small network that reads an image of an eye and the pose of the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_lightning.layers import GaussianHead
from distill_lightning.networks.provenance import class_with_recipe, set_recipe
from distill_lightning.networks.sizes import check_sizes


@class_with_recipe
class GazeNet(nn.Module):
    """Where an eye looks: a convolutional network on its image, with the head's pose beside the last feature.

    Three times a 3x3 convolution, BatchNorm and ReLU, with ``width``, ``2 * width`` and ``4 * width`` channels, and 2x2
    max pooling between them; the feature map, averaged to 3x5 so that it still tells where the pupil is; a linear layer
    to ``8 * width`` with ReLU; and, with the pose appended, the last layer ``head``: a `GaussianHead`, or a linear
    layer of means alone. It has 146,940 parameters with the defaults, and costs 5.4 million multiply-accumulates. For
    feature distillation, tap ``features``: after the last ReLU, before the averaging.

    As the networks of the paper of MPIIGaze, it has a few convolutions on the grey image and takes the pose in at the
    end. Zhang, Sugano, Fritz, Bulling: *Appearance-Based Gaze Estimation in the Wild*, https://arxiv.org/abs/1504.02863

    Args:
        num_targets: ``d``; 2: pitch and yaw.
        width: channels of the first convolution.
        deviation: whether it gives log-variances, too, ``(N, 2 d)``, or the means alone, ``(N, d)``.

    Raises:
        InputError: a size that is not positive.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import GazeNet
        >>> network = GazeNet()
        >>> network(image=torch.zeros(4, 1, 36, 60), pose=torch.zeros(4, 2)).shape
        torch.Size([4, 4])
        >>> sum(parameter.numel() for parameter in network.parameters())
        146940
    """

    def __init__(self, num_targets: int = 2, *, width: int = 16, deviation: bool = True) -> None:
        super().__init__()
        sizes = {"num_targets": num_targets, "width": width}
        check_sizes("GazeNet", sizes)
        set_recipe(self, {**sizes, "deviation": deviation})
        self.features = nn.Sequential(
            *self._convolution(1, width),
            nn.MaxPool2d(2),
            *self._convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *self._convolution(2 * width, 4 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d((3, 5))
        self.hidden = nn.Sequential(nn.Linear(4 * width * 3 * 5, 8 * width), nn.ReLU())
        features = 8 * width + 2
        self.head = GaussianHead(features, num_targets) if deviation else nn.Linear(features, num_targets)

    @staticmethod
    def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return conv, nn.BatchNorm2d(channels_out), nn.ReLU()

    def forward(self, image: Tensor, pose: Tensor) -> Tensor:
        """A Gaussian's parameters ``(N, 2 d)``, or its means, of images ``(N, 1, H, W)`` and poses ``(N, 2)``."""
        feature = self.hidden(self.pool(self.features(image)).flatten(1))
        output: Tensor = self.head(torch.cat([feature, pose.to(feature.dtype)], dim=1))
        return output
