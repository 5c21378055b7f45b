"""What `FEEDModule` needs and what knows nothing of it: its arguments' rules, and the shapes of features."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.layers import FeatureTap, Paraphraser
from distill_lightning.teachers import TeacherStore

_MANY_PARAMETERS = 50_000_000
# Of the matrix that reduces channels; with another one, stores would hold something else.
_SEED = 0x46454544


def refuse_negative(**weights: Sequence[float]) -> None:
    """Refuse weights below zero."""
    for name, values in weights.items():
        wrong = [value for value in values if not value >= 0]
        if wrong:
            raise InputError(f"{name} cannot be negative, got {wrong[0]}")


def refuse_unknown(**options: tuple[str, Sequence[str]]) -> None:
    """Refuse options, with what each may be, that are something else."""
    for name, (value, known) in options.items():
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def refuse_unused(user: str, **given: bool) -> None:
    """Refuse what was given although another option, ``user``, leaves no use for it."""
    for name, is_given in given.items():
        if is_given:
            raise InputError(f"FEED: {user} does not use {name}: leave it out")


def check_paraphrasers(paraphrasers: Sequence[nn.Module] | nn.ModuleList, teachers: int | None) -> None:
    """Refuse paraphrasers that are not one for each of so many teachers; ``None``: there are none."""
    if teachers is None:
        raise InputError("FEED: paraphrasers without teachers have nothing to read: a store holds their codes")
    one_each(teachers, "paraphrasers", paraphrasers)
    if not all(isinstance(paraphraser, Paraphraser) for paraphraser in paraphrasers):
        raise InputError("FEED: paraphrasers must be layers.Paraphraser networks, trained beforehand")


def paraphrased_shape(number: int, paraphraser: Paraphraser, layer: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Of the code of teacher ``number``'s feature map, whose shape is given."""
    if paraphraser.channels != width(shape):
        raise InputError(
            f"FEED: paraphraser {number} is for {paraphraser.channels} channels and teacher {number}'s {layer!r} gives "
            f"{width(shape)}: give the paraphraser that was trained on that layer"
        )
    return (shape[0], paraphraser.factors, *shape[2:])


def warn_of_many_parameters(translators: nn.Module) -> None:
    """Warn the caller of FEEDModule of translators that are larger than most networks."""
    parameters = sum(parameter.numel() for parameter in translators.parameters())
    if parameters > _MANY_PARAMETERS:
        warnings.warn(
            f"FEED's translators have {parameters:,} parameters: transform='conv1x1' has far fewer", stacklevel=3
        )


def one_each(count: int, name: str, values: Any) -> list[Any]:
    """One value for all teachers, or a sequence with one value each."""
    one = isinstance(values, str) or not isinstance(values, Iterable)
    each = [values] * count if one else list(values)
    if len(each) != count:
        raise InputError(f"FEED: {len(each)} {name} for {count} teachers: give one each")
    return each


def sites(shape: Sequence[int]) -> Sequence[int]:
    """Where a feature has values: rows and columns of ``(N, C, H, W)``, the length of ``(N, L, C)``, nothing else."""
    return shape[2:] if len(shape) == 4 else shape[1:-1]


def width(shape: Sequence[int]) -> int:
    """Channels of a feature: the second dimension of ``(N, C, H, W)``, the last of ``(N, C)`` or ``(N, L, C)``."""
    return shape[1] if len(shape) == 4 else shape[-1]


def resized(feature: Tensor, size: Sequence[int]) -> Tensor:
    """A feature map at another size: averages where it is smaller, else bilinear."""
    height, width = size
    if height <= feature.shape[2] and width <= feature.shape[3]:
        return F.adaptive_avg_pool2d(feature, (height, width))
    return F.interpolate(feature, size=(height, width), mode="bilinear", align_corners=False)


def output_and_feature(tap: FeatureTap, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of a network that is tapped in one layer."""
    output, features = tap(inputs)
    return output, features[tap.layers[0]]


def check_channels(tap: FeatureTap, input_shape: Sequence[int], channels: int | None) -> None:
    """Look at a tapped feature of a student that was compressed.

    Args:
        tap: of the student.
        input_shape: of one input.
        channels: that the translators read; ``None``: there are none.

    Raises:
        InputError: the feature has others.
    """
    layer = tap.layers[0]
    now = width(tap.shapes(input_shape)[1][layer])
    if channels is not None and now != channels:
        raise InputError(
            f"FEED: the student's {layer!r} gives {now} channels, and the translators read {channels}: give the step "
            f"that prunes them exclude=..., naming the layer that {layer!r} ends with"
        )


def zero_share(feature: Tensor, eps: float) -> Tensor:
    """The share of samples whose feature has a norm below ``eps``, and so cannot be normalised."""
    norms: Tensor = torch.linalg.vector_norm(wide(feature.detach()).flatten(1), dim=1)
    return (norms < eps).float().mean()


# What a store keeps


def feature_name(number: int | str) -> str:
    """What a teacher's feature is called among the answers."""
    return f"feature_{number}"


def stored_shapes(
    store: TeacherStore | None, size: int | None = None, channels: int | None = None
) -> list[tuple[int, ...]]:
    """Of the feature maps in a store, for one sample.

    Args:
        store: that is there.
        size: rows and columns that they must have; ``None``: any.
        channels: that they must have; ``None``: any.
    """
    if store is None:
        raise InputError("FEED: teachers is null and there is no store: give teachers, or a complete TeacherStore")
    shapes = store.shapes()
    found = [(1, *shapes[name]) for name in sorted(shapes, key=len) if name.startswith(feature_name(""))]
    if not found:
        raise InputError(f"FEED: the store {store.path} holds no feature maps: give one that FEEDModule has filled")
    for shape in found:
        if (size and tuple(sites(shape)) != (size, size)) or (channels and width(shape) != channels):
            raise InputError(
                f"FEED: the store {store.path} holds features {tuple(shape[1:])}: give the target_size and the "
                "target_channels that it was filled with"
            )
    return found


# Features in fewer numbers


def pooled(feature: Tensor, size: int | None) -> Tensor:
    """A feature map ``(N, C, H, W)`` at ``size`` rows and columns, by averages; ``None``: as it is."""
    return feature if size is None else F.adaptive_avg_pool2d(feature, (size, size))


def orthonormal_rows(rows: int, columns: int) -> Tensor:
    """A random matrix ``(rows, columns)`` with orthonormal rows, float32, the same on every call."""
    index, view = torch.arange(rows), torch.full((rows,), columns)
    drawn = Draws(_SEED, index, view).normal(columns).double()
    basis, triangle = torch.linalg.qr(drawn.T)
    # Which sign a direction has is the library's choice.
    signed: Tensor = basis * triangle.diagonal().sign()
    return signed.T.float().contiguous()


class Reduction(nn.Module):
    """A teacher's feature map ``(N, C, H, W)`` with fewer sites and channels; nothing in it is learnt.

    Args:
        width: ``C``.
        size: rows and columns that it is pooled to; ``None``: as many as there are.
        channels: that it is projected to, by `orthonormal_rows`; ``None``: all.
    """

    weight: Tensor | None

    def __init__(self, width: int, *, size: int | None, channels: int | None) -> None:
        super().__init__()
        self.size = size
        # Not in checkpoints: it is the same in every run.
        weight = None if channels is None else orthonormal_rows(channels, width)[:, :, None, None]
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, feature: Tensor) -> Tensor:
        """The reduced map, ``(N, channels, size, size)``."""
        feature = pooled(feature, self.size)
        return feature if self.weight is None else F.conv2d(feature, self.weight.to(feature.dtype))


def reduced_shape(who: str, shape: Sequence[int], size: int | None, channels: int | None) -> tuple[int, ...]:
    """Of a feature map after its reduction.

    Raises:
        InputError: it is no map, or smaller than that; the message begins with ``who``.
    """
    reduced = list(shape)
    for name, wanted, places in (("target_size", size, (2, 3)), ("target_channels", channels, (1,))):
        if wanted is None:
            continue
        if len(shape) != 4:
            raise InputError(f"FEED: the {who}'s feature has shape {tuple(shape)}, not (N, C, H, W): leave out {name}")
        least = min(shape[place] for place in places)
        if not 1 <= wanted <= least:
            raise InputError(
                f"FEED: {name} must be from 1 to {least}, because the {who}'s feature is {tuple(shape[1:])}, got "
                f"{wanted}"
            )
        for place in places:
            reduced[place] = wanted
    return tuple(reduced)
