"""Networks whose inputs or outputs differ from those of the others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.errors import InputError, check_finite
from distill_lightning.functional.common import wide
from distill_lightning.layers import GaussianHead
from distill_lightning.networks.provenance import class_with_recipe, drop_recipes, recipe_of, set_recipe


@class_with_recipe
class AdaptedInput(nn.Module):
    r"""A network whose images are normalised and resized as in its own training, unlike those of the other networks.

    .. math:: x \mapsto \mathrm{resize}\left( \frac{x \cdot \sigma_0 + \mu_0 - \mu}{\sigma} \right)

    First the values: the data module's normalisation (``source_mean``, ``source_std``) is undone, and the network's own
    (``mean``, ``std``) is applied. Then the size: bilinear, with antialiasing, in float32. The names in the state dict
    and the dotted layer paths are the network's, after the prefix ``network.``; the state dict does not contain the
    arguments given here.

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
        network: a network of images ``(N, C, H, W)``.
        size: rows and columns that ``network`` expects; ``None`` leaves the images' size unchanged.
        mean: :math:`\mu`, which ``network`` expects to be subtracted from values in ``[0, 1]``: a number, or one per
            channel. ``None``, as then also ``std``, leaves the values unchanged.
        std: :math:`\sigma`, by which ``network`` expects them to be divided: a number, or one per channel.
        source_mean: :math:`\mu_0`, which the data module has subtracted: a number, or one per channel.
        source_std: :math:`\sigma_0`, by which the data module has divided: a number, or one per channel.

    Raises:
        InputError: an invalid ``size``, a standard deviation that is not positive, one of ``mean`` and ``std`` without
            the other, ``source_mean`` or ``source_std`` without them, different numbers of channels, or, on a call,
            inputs with another number of channels.

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
                "AdaptedInput: source_mean and source_std need mean and std, the normalisation that the network expects"
            )
        given = {"mean": 0.0 if mean is None else mean, "std": 1.0 if std is None else std}
        given |= {"source_mean": source_mean, "source_std": source_std}
        values = {name: _per_channel(value) for name, value in given.items()}
        for name, value in values.items():
            check_finite(f"AdaptedInput: {name}", *value.tolist())
        channels = {len(value) for value in values.values() if len(value) > 1}
        if len(channels) > 1:
            raise InputError(
                f"AdaptedInput: mean, std and their sources have {sorted(channels)} channels: give equally many"
            )
        for name in ("std", "source_std"):
            if not (values[name] > 0).all():
                raise InputError(f"AdaptedInput: {name} must be positive, got {given[name]}")
        self.network = network
        self.size = None if size is None else (int(size[0]), int(size[1]))
        scale = values["source_std"] / values["std"]
        shift = (values["source_mean"] - values["mean"]) / values["std"]
        # Not persistent: the state dict holds what the network's own files hold, and nothing else.
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, value.float()[:, None, None], persistent=False)
        inner = recipe_of(network)
        arguments: dict[str, Any] = {"network": inner, "size": self.size and list(self.size)}
        if mean is not None:
            arguments |= {name: value.tolist() for name, value in values.items()}
        set_recipe(self, None if inner is None else arguments)

    def extra_repr(self) -> str:
        """The size, shown when the network is printed."""
        return f"size={self.size}"

    def forward(self, images: Tensor) -> Tensor:
        """The network's output for ``images`` as the data module gives them, ``(N, C, H, W)``."""
        channels = max(len(self.scale), len(self.shift))
        if images.ndim != 4 or channels not in (1, images.shape[1]):
            raise InputError(
                f"AdaptedInput: inputs of shape {tuple(images.shape)} do not match the {channels} channels of mean "
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
        InputError: the network has no two-dimensional convolution.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.networks import likely_input_shape
        >>> likely_input_shape(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        (3, 32, 32)
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, 32, 32)
    raise InputError(
        f"{type(network).__name__} has no convolution that shows its input's shape: give input_shape=(C, H, W)"
    )


def without_deviation(network: nn.Module) -> nn.Module:
    """A copy of a network that returns only the means of its Gaussian, ``(N, d)``, the same up to rounding.

    Args:
        network: ends in a `GaussianHead`.

    Raises:
        InputError: the network has no such head, or several.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import GaussianHead
        >>> from distill_lightning.networks import without_deviation
        >>> network = nn.Sequential(nn.Linear(8, 4), GaussianHead(4, num_targets=2))
        >>> network(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
        >>> without_deviation(network)(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """
    heads = [name for name, module in network.named_modules() if isinstance(module, GaussianHead)]
    if len(heads) != 1:
        raise InputError(f"{type(network).__name__} has {len(heads)} GaussianHead layers where one is needed")
    head = network.get_submodule(heads[0])
    if head is network:
        return network.means()  # type: ignore[operator,no-any-return]  # the network is the head
    plain = copy.deepcopy(network)
    parent, _, name = heads[0].rpartition(".")
    setattr(plain.get_submodule(parent), name, head.means())  # type: ignore[operator]  # checked above
    # They would build the network with the head.
    drop_recipes(plain)
    return plain


def _per_channel(value: float | Sequence[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).reshape(-1)
