"""Random parameters of every variant, from (seed, image id, variant) alone.

Counter-based, as Philox and splitmix64 are: the value of a draw is the splitmix64 finaliser of key + counter · golden,
where the key is a hash of the image's id under the seed, and the counter names variant, purpose and attempt. So
draws don't depend on the number, order, or batches of other draws. A batch is drawn at once.

The distributions are those of torchvision.transforms.v2: RandomResizedCrop, RandomHorizontalFlip, RandomRotation and
ColorJitter (torchvision 0.29); the numbers aren't, as torch draws them one after another.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.images.config import Augmentation, Centred, ImageAugmentationConfig, Original
from tasks.io.hashing import stable_hash
from tasks.io.tensors import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array, UInt8Array, UInt64Array

CROP_ATTEMPTS = 10
_LONGEST = 4

# Purposes of a draw. Their numbers affect the draws: append to them, never renumber.
_AREA, _RATIO, _TOP, _LEFT, _FLIP, _ANGLE, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ORDER, _POLICY = range(12)
_PURPOSE_BITS = 4
_ATTEMPT_BITS = 4

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 by the golden ratio: consecutive counters are far apart
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Draws:
    """Parameters of n variants, one row each.

    Attributes:
        crop: int32 (n, 4): top, left, height, width, pixels of the oriented original.
        flip: bool (n,): True to swap left and right, after the crop.
        angle: float32 (n,): degrees, positive is counter-clockwise, after the flip.
        jitter: float32 (n, 4): factors of brightness, contrast and saturation; shift of hue, turns. A factor of
            exactly 1 and a shift of exactly 0 mean that the operation isn't applied.
        order: uint8 (n, 4): order[:, k] is the colour operation applied k-th: 0 brightness, 1 contrast, 2 saturation,
            3 hue.
    """

    crop: Int32Array
    flip: BoolArray
    angle: Float32Array
    jitter: Float32Array
    order: UInt8Array


def image_keys(image_ids: Sequence[str], seed: int) -> UInt64Array:
    """Return the key of each image, (m,): BLAKE2b of its id, keyed by the seed.

    Args:
        image_ids: Ids, any text.
        seed: Seed, in [0, 2**63).
    """
    key = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in image_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def draws_of(config: ImageAugmentationConfig, original: Mapping[str, Any]) -> Draws:
    """Draw the variants of one original again.

    Args:
        config: The configuration of its version.
        original: Its row in the table of originals: image_id, height, width and split.
    """
    keys = image_keys([original["image_id"]], config.seed)
    height, width = (np.array([original[name]], np.int64) for name in ("height", "width"))
    return draw(keys, height, width, config.of_split(original["split"]).augmentation)


def draw(
    keys: UInt64Array, heights: npt.NDArray[np.integer], widths: npt.NDArray[np.integer], augmentation: Augmentation
) -> Draws:
    """Draw parameters of all variants of m images: n = m × variants rows, i · variants + v for variant v of image i.

    As in torchvision, an operation whose range is empty (brightness, contrast, saturation or hue of 0) isn't applied:
    its factor is exactly 1, its shift exactly 0. A `Centred` augmentation isn't random: its crop is the whole image,
    or the middle of one that is longer than four times its shorter side.

    Args:
        keys: (m,) from `image_keys`.
        heights: (m,) heights of the oriented originals, at least 1 pixel.
        widths: (m,) widths, likewise.
        augmentation: Bounds of the parameters.
    """
    if isinstance(augmentation, Centred):
        return _whole(np.asarray(heights, np.int64), np.asarray(widths, np.int64))
    variants = augmentation.variants
    streams = _streams(keys, variants)
    height, width = (np.repeat(np.asarray(side, dtype=np.int64), variants) for side in (heights, widths))
    assert (height * width > 0).all(), "an image without pixels was to be cropped"
    purposes = np.arange(_TOP, _ORDER + 1, dtype=np.uint64)
    uniform = dict(zip(purposes.tolist(), _uniform(streams[None, :], purposes[:, None]), strict=True))

    crop = np.empty((len(streams), 4), dtype=np.int32)
    crop[:, 2], crop[:, 3], fitted = _crop_sizes(streams, height, width, augmentation)
    room = np.stack((height - crop[:, 2], width - crop[:, 3]))
    anywhere = np.stack((uniform[_TOP], uniform[_LEFT])) * (room + 1)
    crop[:, 0], crop[:, 1] = np.where(fitted, anywhere.astype(np.int64), room // 2)

    jitter = np.empty((len(streams), 4), dtype=np.float32)
    for column, purpose, spread in (
        (0, _BRIGHTNESS, augmentation.brightness),
        (1, _CONTRAST, augmentation.contrast),
        (2, _SATURATION, augmentation.saturation),
    ):
        low = max(0.0, 1 - spread)
        jitter[:, column] = low + (1 + spread - low) * uniform[purpose]
    jitter[:, 3] = _symmetric(uniform[_HUE], augmentation.hue)
    return Draws(
        crop=crop,
        flip=uniform[_FLIP] < augmentation.flip,
        angle=_symmetric(uniform[_ANGLE], augmentation.degrees).astype(np.float32),
        jitter=jitter,
        order=_ORDERS[(uniform[_ORDER] * len(_ORDERS)).astype(np.intp)],
    )


def _whole(heights: Int64Array, widths: Int64Array) -> Draws:
    count = len(heights)
    longest = _LONGEST * np.minimum(heights, widths)  # the whole of a line of pixels would be resized to gigabytes
    height, width = np.minimum(heights, longest), np.minimum(widths, longest)
    return Draws(
        crop=np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1).astype(np.int32),
        flip=np.zeros(count, np.bool_),
        angle=np.zeros(count, np.float32),
        jitter=np.tile(np.array([1, 1, 1, 0], np.float32), (count, 1)),
        order=np.tile(_ORDERS[0], (count, 1)),
    )


def window(height: int, width: int, augmentation: Augmentation) -> tuple[int, int, int, int]:
    """Return the size to which a crop of this size is resized, and the place of the size × size pixels taken from it.

    Returns:
        Height and width, pixels; top and left of the taken pixels. For a `Centred` augmentation as torchvision's
        Resize(size × 256/224) and CenterCrop(size); for an `Original` as Resize(size) and CenterCrop(size).
    """
    size = augmentation.size
    if not isinstance(augmentation, Centred):
        return size, size, 0, 0
    side, short = size if isinstance(augmentation, Original) else round(size * 256 / 224), min(height, width)
    tall, wide = int(side * height / short), int(side * width / short)
    return tall, wide, round((tall - size) / 2), round((wide - size) / 2)


def policy_seeds(keys: UInt64Array, variants: int) -> UInt64Array:
    """Return the seed of a user's policy for each variant, (m × variants,), rows as in `draw`."""
    return _bits(_streams(keys, variants), np.array([_POLICY], dtype=np.uint64))


@np.errstate(over="ignore", divide="ignore")  # sides that overflow don't fit
def _crop_sizes(
    streams: UInt64Array, height: Int64Array, width: Int64Array, augmentation: Augmentation
) -> tuple[Int64Array, Int64Array, BoolArray]:
    """Return height and width of each crop, and True if an attempt fitted; otherwise the crop belongs in the middle.

    An attempt draws a share of the area, uniformly, and a ratio of width to height, log-uniformly, and fits if neither
    side exceeds the image's. Else the whole image is taken, or as much of it as the bounds of the ratio allow, but at
    least one pixel (torchvision's would be empty and fail, as with a ratio of 0.001 on 100 × 100 pixels).
    """
    low_ratio, high_ratio = augmentation.ratio
    low_log, high_log = math.log(low_ratio), math.log(high_ratio)
    low_scale, high_scale = augmentation.scale
    ratio = width / height
    crop_height = np.where(ratio < low_ratio, np.maximum(1, np.rint(width / low_ratio)), height).astype(np.int64)
    crop_width = np.where(ratio > high_ratio, np.maximum(1, np.rint(height * high_ratio)), width).astype(np.int64)
    fitted = np.zeros(len(streams), dtype=np.bool_)
    pending = np.arange(len(streams))
    purposes = np.array([[_AREA], [_RATIO]], dtype=np.uint64)
    for attempt in range(CROP_ATTEMPTS):
        share, place = _uniform(streams[pending], purposes, attempt)
        area = height[pending] * width[pending] * (low_scale + (high_scale - low_scale) * share)
        aspect = np.exp(low_log + (high_log - low_log) * place)
        attempted_width = np.rint(np.sqrt(area * aspect))  # rint rounds halves to even, as Python's round does
        attempted_height = np.rint(np.sqrt(area / aspect))
        fits = (attempted_width > 0) & (attempted_width <= width[pending])
        fits &= (attempted_height > 0) & (attempted_height <= height[pending])
        done = pending[fits]
        crop_height[done], crop_width[done], fitted[done] = attempted_height[fits], attempted_width[fits], True
        pending = pending[~fits]
        if not len(pending):
            break
    return crop_height, crop_width, fitted


def _streams(keys: UInt64Array, variants: int) -> UInt64Array:
    """Return the state of each variant's first counter, (m × variants,), image by image."""
    counters = np.arange(variants, dtype=np.uint64) << np.uint64(_PURPOSE_BITS + _ATTEMPT_BITS)
    return (keys[:, None] + counters * np.uint64(_GOLDEN)).ravel()


def _bits(streams: UInt64Array, purpose: UInt64Array, attempt: int = 0) -> UInt64Array:
    """Return 64 random bits for each pair of stream and purpose, broadcast."""
    counters = (purpose << np.uint64(_ATTEMPT_BITS)) + np.uint64(attempt)
    states = streams + counters * np.uint64(_GOLDEN)
    return stable_hash(pa.array(states.ravel())).reshape(states.shape)


def _uniform(streams: UInt64Array, purpose: UInt64Array, attempt: int = 0) -> Float64Array:
    """Return uniform draws in [0, 1), of 53 bits."""
    return (_bits(streams, purpose, attempt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _symmetric(uniform: Float64Array, bound: float) -> Float64Array:
    """Scale uniform draws to ± bound; exactly 0 if that is 0."""
    return (2 * uniform - 1) * bound + 0.0  # + 0.0 makes 0.0 of -0.0
