"""One variant by torchvision itself: a call of `torchvision.transforms.v2.functional` for each operation drawn.

Nothing here is shared with the engines under test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.images.draws import Draws


def reference_variant(pixels: npt.NDArray[np.uint8], draws: Draws, row: int, size: int) -> npt.NDArray[np.uint8]:
    """The variant that a row of draws describes, (3, size, size), of pixels (height, width, 3 or more: RGB first)."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    apply: list[Any] = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    neutral = (1, 1, 1, 0)
    top, left, height, width = (int(value) for value in draws.crop[row])
    image = torch.from_numpy(np.ascontiguousarray(pixels[:, :, :3])).permute(2, 0, 1)
    image = functional.resized_crop(
        image, top, left, height, width, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    if draws.flip[row]:
        image = functional.horizontal_flip(image)
    image = functional.rotate(image, float(draws.angle[row]), interpolation=InterpolationMode.NEAREST, fill=[0.0])
    for operation in draws.order[row]:
        amount = float(draws.jitter[row, operation])
        if amount != neutral[operation]:
            image = apply[operation](image, amount)
    return np.ascontiguousarray(image.numpy())
