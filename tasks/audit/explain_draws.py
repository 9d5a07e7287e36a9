"""The parameters that were drawn for the variants of an image, as numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.draws import Draws, draw, image_keys, policy_seeds, window

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def draws_of(config: ImageAugmentationConfig, original: Mapping[str, Any]) -> Draws:
    """The draws of an image's variants, made again from the seed, its id and its size."""
    keys = image_keys([original["image_id"]], config.seed)
    height, width = (np.array([original[name]], np.int64) for name in ("height", "width"))
    return draw(keys, height, width, config.of_split(original["split"]).augmentation)


def drawn_rows(config: ImageAugmentationConfig, original: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """One row a variant; and the same in a sentence each."""
    config = config.of_split(original["split"])
    if config.augmentation.policy is not None:
        seeds = policy_seeds(image_keys([original["image_id"]], config.seed), config.augmentation.variants)
        rows = [{"variant": number, "seed of the policy": str(seed)} for number, seed in enumerate(seeds.tolist())]
        return rows, [f"by {config.augmentation.policy}"] * len(rows)
    draws = draws_of(config, original)
    rows = [_row(draws, number, original, config.augmentation) for number in range(config.augmentation.variants)]
    return rows, [f"{row['crop']}; {row['then']}; {row['colours']}" for row in rows]


def _row(draws: Draws, number: int, original: Mapping[str, Any], augmentation: Augmentation) -> dict[str, Any]:
    top, left, height, width = draws.crop[number].tolist()
    size = augmentation.size
    tall, wide, _, _ = window(height, width, augmentation)
    made = f"made {wide} × {tall}" + (f", of which the middle {size} × {size}" if (tall, wide) != (size, size) else "")
    share = height * width / (original["height"] * original["width"])
    flip, angle = bool(draws.flip[number]), float(draws.angle[number])
    jitter = dict(zip(OPERATIONS, draws.jitter[number].tolist(), strict=True))
    order = [OPERATIONS[one] for one in draws.order[number].tolist()]
    applied = [name for name in order if jitter[name] != _NEUTRAL[OPERATIONS.index(name)]]
    turned = f"turned {abs(angle):.2f}° {'counter-' if angle > 0 else ''}clockwise" if angle else "not turned"
    return {
        "variant": number,
        "top": top,
        "left": left,
        "height": height,
        "width": width,
        "share of the area": round(share, 6),
        "flip": flip,
        "degrees": angle,
        **jitter,
        "order": order,
        "crop": f"{width} × {height} px at left {left}, top {top} ({share:.1%} of the area), {made}",
        "then": f"{'mirrored' if flip else 'not mirrored'}, {turned}",
        "colours": ", ".join(_words(name, jitter[name]) for name in applied) or "as they are",
    }


def _words(name: str, amount: float) -> str:
    if name == "hue":
        return f"hue {amount * 360:+.1f}°"
    return f"{name} × {amount:.3f}"
