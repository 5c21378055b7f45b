"""What augmentations do to the bytes of images: a whole batch at once, each image by its own amount.

Given the same amount, each does what torchvision's function does to a uint8 tensor (hues may differ by one level). All
sums are sums of whole numbers, and no image looks at another one, so what becomes of it is the same, bit for bit, in
whatever batch it stands. Images are uint8 ``(N, C, H, W)``, grey or red, green and blue, and so is what comes out;
amounts are float64 ``(N,)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# The parts of red, green and blue in grey.
_GREY = (0.2989, 0.587, 0.114)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Mixed with black: 0 is black, 1 the image, more is lighter."""
    return _mixed(images, torch.zeros_like(images), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Mixed with its greys: 0 is grey, 1 the image, more is more colourful; grey images stay as they are."""
    return images if images.shape[1] == 1 else _mixed(images, _grey(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Mixed with its mean grey: 0 is uniform grey, 1 the image, more is more contrast."""
    sums = _grey(images).sum(dim=(1, 2, 3), keepdim=True)
    return _mixed(images, sums.float() / (images.shape[2] * images.shape[3]), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Mixed with a blurred image, each pixel of which counts 5 times and its 8 neighbours once; the edge is kept."""
    if min(images.shape[2:]) <= 2:
        return images
    # 16 bits hold 13 bytes.
    pixels = images.to(torch.int16)
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26  # rounded thirteenths, of which none is a half
    return _mixed(images, blurred, factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Colours are turned around the colour circle, by parts of it; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images.float() / 255).unbind(dim=1)
    highest = torch.maximum(torch.maximum(red, green), blue)
    extent = highest - torch.minimum(torch.minimum(red, green), blue)
    # A grey has no hue: whichever it is given, it stays grey.
    divisor = extent.masked_fill(extent == 0, 1)
    from_green, from_blue = 2 + (blue - red) / divisor, 4 + (red - green) / divisor
    sixth = torch.where(highest == green, from_green, from_blue)
    sixth = torch.where(highest == red, (green - blue) / divisor, sixth)
    turned = sixth + (6 * shift).float()[:, None, None]
    channels = []
    for start in (5, 3, 1):
        # How far a channel lies below the highest one, in parts of the extent: up and down along the circle.
        place = (turned + start) % 6
        channels.append(highest - extent * torch.minimum(place, 4 - place).clamp(0, 1))
    turned_back: Tensor = (torch.stack(channels, dim=1) * 255).round().to(torch.uint8)
    return turned_back


def posterize(images: Tensor, bits: int) -> Tensor:
    """The upper bits of each byte alone."""
    return images & (256 - (1 << (8 - bits)))


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Bytes from a threshold on are inverted."""
    return torch.where(images >= threshold, 255 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel is stretched so that its darkest pixel is 0 and its lightest 255."""
    low, high = (edge(dim=(2, 3), keepdim=True).float() for edge in (images.amin, images.amax))
    flat = low == high
    scale = 255 / (high - low).masked_fill(flat, 255)
    return ((images - low.masked_fill(flat, 0)) * scale).clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor) -> Tensor:
    """Each channel's histogram is made even, as far as bytes that are equal stay equal."""
    pixels = images.flatten(2).long()
    histogram = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64)
    histogram.scatter_add_(2, pixels, torch.ones_like(pixels))
    lightest = histogram.gather(2, pixels.amax(dim=2, keepdim=True))
    step = (pixels.shape[2] - lightest) // 255
    levels = (histogram.cumsum(dim=2) + step // 2) // step.clamp_min(1)
    table = F.pad(levels, (1, 0))[..., :-1].clamp(0, 255)
    made = table.gather(2, pixels).to(torch.uint8).view_as(images)
    return torch.where(step[..., None] == 0, images, made)


def shear_x(images: Tensor, amount: Tensor) -> Tensor:
    """Rows are moved to the left, by this part of their distance from the upper edge."""
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    return _fetched(images, (one, amount, amount * images.shape[2] / 2), (zero, one, zero))


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """Columns are moved upwards, by this part of their distance from the left edge."""
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    return _fetched(images, (one, zero, zero), (amount, one, amount * images.shape[3] / 2))


def translate_x(images: Tensor, pixels: Tensor) -> Tensor:
    """Moved to the right, by whole pixels."""
    one, zero = torch.ones_like(pixels), torch.zeros_like(pixels)
    return _fetched(images, (one, zero, -pixels.trunc()), (zero, one, zero))


def translate_y(images: Tensor, pixels: Tensor) -> Tensor:
    """Moved down, by whole pixels."""
    one, zero = torch.ones_like(pixels), torch.zeros_like(pixels)
    return _fetched(images, (one, zero, zero), (zero, one, -pixels.trunc()))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turned about the centre, counter-clockwise."""
    # By Python: the last bit of a vectorised cosine could depend on the place in the batch.
    angles = [math.radians(number) for number in degrees.tolist()]
    cos, sin = (degrees.new_tensor([function(angle) for angle in angles]) for function in (math.cos, math.sin))
    zero = torch.zeros_like(degrees)
    return _fetched(images, (cos, -sin, zero), (sin, cos, zero))


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = (part * images[:, channel] for channel, part in enumerate(_GREY))
    return (red + green + blue).to(torch.uint8)[:, None]


def _mixed(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    own, rest = ((part.float()[:, None, None, None]) for part in (factor, 1 - factor))
    return (own * images + rest * other).clamp_(0, 255).to(torch.uint8)


def _fetched(images: Tensor, column_of: tuple[Tensor, ...], row_of: tuple[Tensor, ...]) -> Tensor:
    """Each pixel from the nearest to where it comes from, black where that is outside the image.

    Args:
        images: to be moved.
        column_of: of the place where a pixel comes from, the parts of its own column and row, and what is added, all
            from the image's centre.
        row_of: the same of that place's row.
    """
    height, width = images.shape[2:]
    columns = torch.arange(width, dtype=torch.float64) + 0.5 - width / 2
    rows = torch.arange(height, dtype=torch.float64)[:, None] + 0.5 - height / 2

    def place(parts: tuple[Tensor, ...], length: int) -> Tensor:
        of_column, of_row, added = (part[:, None, None] for part in parts)
        return (of_column * columns + of_row * rows + (added + (length / 2 - 0.5))).round().long()

    column, row = place(column_of, width), place(row_of, height)
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    source = (row * width + column).masked_fill(outside, 0).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, source).view_as(images).masked_fill(outside[:, None], 0)
