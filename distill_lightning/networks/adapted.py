"""Networks with weights from a file, and networks that read other inputs than the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.networks.provenance import recipe_of, recorded, remember, remembered
from distill_lightning.networks.weights import load_strictly, read_weights


@recorded
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


@remembered
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

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.networks import AdaptedInput
        >>> adapted = AdaptedInput(nn.Flatten(), size=[1, 2], mean=0.5, std=0.5)
        >>> adapted(torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2))
        tensor([[-1.,  1.]])
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
        remember(self, None if inner is None else arguments)

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


def likely_input_shape(network: nn.Module) -> tuple[int, int, int]:
    """The first convolution's input channels, at 32x32: enough to find the channels of a convolutional feature map.

    Raises:
        InputError: the network has no two-dimensional convolution to tell from.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.networks import likely_input_shape
        >>> likely_input_shape(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        (3, 32, 32)
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, 32, 32)
    raise InputError(f"{type(network).__name__} has no convolution to tell its input from: give input_shape=(C, H, W)")


def _per_channel(value: float | Sequence[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).reshape(-1)
