"""Colour operations on many uint8 images at once, each with a separate factor: torchvision's, bit by bit.

Torchvision's functions take one factor for a whole batch. These take images of (n, 3, height, width) and factors of
(n, 1, 1, 1), float32, and follow `torchvision/transforms/v2/functional/_color.py` (0.29) step by step, with the same
rounding. Results don't depend on the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_EXACT_SUM = 2**24  # sums of integers up to here are exact in float32, in any order


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with black, or away from it."""
    return _bytes(images * factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with their mean luma, or away from it."""
    import torch

    luma = _luma(images)
    if luma[0].numel() * 255 <= _EXACT_SUM:
        mean = luma.mean(dim=(1, 2, 3), keepdim=True)
    else:  # a sum's rounding depends on its order, which depends on the batch
        mean = torch.cat([one.mean(dim=(1, 2, 3), keepdim=True) for one in torch.split(luma, 1)])
    return _blend(images, mean, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend images with the luma of each pixel, or away from it."""
    return _blend(images, _luma(images), factors)


def hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue of HSV; step by step as torchvision, whose conversions are Pillow's."""
    import torch

    rgb = images.float().mul_(1 / 255)
    red, green, _ = rgb.unbind(dim=1)
    low, high = torch.aminmax(rgb, dim=1)
    grey, span = high == low, high - low
    share = span / torch.where(grey, 1.0, high)
    from_high = (high.unsqueeze(1) - rgb) / torch.where(grey, 1.0, span).unsqueeze(1)
    to_red, to_green, to_blue = from_high.unbind(dim=1)
    sixths = torch.where(
        high == red,
        to_blue - to_green,
        torch.where(high == green, to_red + 2.0 - to_blue, to_green + 4.0 - to_red),
    )
    circle = sixths.mul_(1 / 6).add_(1.0).fmod_(1.0).add_(shifts[:, 0]).remainder_(1.0).mul_(6)
    sector = circle.floor()
    fraction = share * circle.sub_(sector)
    without = 1.0 - share
    falling = (1.0 - fraction).mul_(high).clamp_(0.0, 1.0)
    rising = fraction.add_(without).mul_(high).clamp_(0.0, 1.0)
    lowest = without.mul_(high).clamp_(0.0, 1.0)
    choices = torch.stack((high, lowest, falling, rising), dim=1)
    # Components for red, green and blue in each sixth of the circle.
    parts = torch.tensor([[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]], device=images.device)
    turned = choices.gather(1, parts[:, sector.to(torch.int32).remainder_(6)].movedim(0, 1))
    return turned.mul_(256 - 1e-3).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """Return whole levels as float32, (n, 1, height, width); weights of ITU-R BT.601."""
    red, green, blue = images.unbind(dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Mix images · factor + others · (1 - factor); the second product isn't rounded before the sum.

    torch fuses that step for a single factor but not for a tensor of them. In float64 the product is exact.
    """
    rest = (1 - factors.double()).float().double()
    return _bytes((images * factors).double().add_(others.double() * rest).float())


def _bytes(values: Tensor) -> Tensor:
    import torch

    return values.clamp_(0, 255).to(torch.uint8)
