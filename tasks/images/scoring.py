"""Judgement of variants for training: figures of their pixels, issues, and a score. Pure.

A fatal issue makes a variant invalid, with score 0. A minor one lowers the score, which begins at 1, by its weight. By
the weights, one minor issue leaves a variant training-ready at the usual bound of 0.5, and any two don't.

    fatal          not_finite     a value is NaN or infinite
                   wrong_shape    the transform returned another shape than requested
                   wrong_dtype    the transform returned another element type than requested
                   out_of_range   a normalised value outside the range of pixels
                   constant       almost no variation over the variant
                   bad_label      the class id belongs to no class
    minor  0.375   low_contrast, dark, bright
           0.25    magnified      a small crop was enlarged: it shows less detail than its pixels suggest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.images.config import ImageThresholds
from tasks.io.errors import InputError

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

FATAL = ("not_finite", "wrong_shape", "wrong_dtype", "out_of_range", "constant", "bad_label")
MINOR = {"low_contrast": 0.375, "dark": 0.375, "bright": 0.375, "magnified": 0.25}
ISSUES = (*FATAL, *MINOR)
ISSUES_TYPE = pa.list_(pa.field("element", pa.string()))  # as Parquet names it: written and read types are equal

# Values that were normalised on another device or in half precision may miss the ends by a little.
_TOLERANCE = 1e-2
_EVEN = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of n variants, over all channels and pixels of each; float32 arrays of shape (n,)."""

    mean: FloatArray  # of levels 0 to 255, or of the values themselves without `levels`
    std: FloatArray  # likewise, of the population (divided by the number of values)
    minimum: FloatArray | None = None  # smallest stored value; None for uint8, which is in range by its type
    maximum: FloatArray | None = None
    finite: BoolArray | None = None  # True if all values are; None for uint8
    levels: bool = True  # False if the values of black and white are unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The judgement of n variants."""

    score: FloatArray  # in [0, 1]
    passed: BoolArray  # no fatal issue
    issues: pa.ListArray  # names of issues, in the order of ISSUES
    ready: BoolArray  # training-ready: passed, with a high enough score


def measure(
    images: npt.NDArray[Any], mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
) -> Measured:
    """Return figures of variants that don't come from the compiled kernel, which computes them itself.

    Args:
        images: Shape (n, channels, height, width), uint8 or float32.
        mean: Each channel's mean by which float32 values were normalised; None if unknown, as with a user's
            policy. The figures are then those of the values.
        std: Each channel's standard deviation; None if unknown.

    Raises:
        InputError: another shape or element type.
    """
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise InputError(f"can't measure variants of shape {images.shape}; they must be (n, channels, height, width)")
    if images.dtype == np.uint8:
        return _measure_levels(images)
    if images.dtype != np.float32:
        raise InputError(f"can't measure variants of {images.dtype}; they must be uint8 or float32")
    return _measure_floats(images, mean, std)


def value_range(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[float, float]:
    """Return the range of normalised pixels: the values of black and white in the widest channels."""
    means, stds = np.asarray(mean), np.asarray(std)
    return float(np.min(-means / stds)), float(np.max((1 - means) / stds))


def score(
    measured: Measured,
    magnification: FloatArray,
    class_ids: npt.NDArray[np.integer[Any]],
    classes: int,
    thresholds: ImageThresholds,
    *,
    expected: tuple[float, float] | None = None,
    shape_ok: BoolArray | None = None,
    dtype_ok: BoolArray | None = None,
) -> Scored:
    """Judge n variants.

    Args:
        measured: Their figures.
        magnification: Area of the output by that of the crop; NaN if unknown. Shape (n,).
        class_ids: Shape (n,).
        classes: Number of classes: ids go from 0 to one below it.
        thresholds: Bounds. Those of light and contrast are in levels: without them only a variant whose values are
            all the same, as far as float32 can tell, is constant.
        expected: Range of the values (`value_range`), judged with a hundredth of it to spare; None leaves it open.
        shape_ok: True if the transform returned the right shape, shape (n,); others aren't judged further.
        dtype_ok: True if it returned the right element type, shape (n,); others aren't judged further.

    Raises:
        InputError: arrays of different lengths.
    """
    count = len(measured.mean)
    yes = np.ones(count, dtype=bool)
    shape_ok, dtype_ok = (yes if flags is None else flags for flags in (shape_ok, dtype_ok))
    lengths = {len(array) for array in (measured.mean, measured.std, magnification, class_ids, shape_ok, dtype_ok)}
    if lengths != {count}:
        raise InputError(f"figures of {sorted(lengths)} variants; every array must have one for each variant")
    judged = shape_ok & dtype_ok
    mean, std = measured.mean, measured.std
    finite = np.isfinite(mean) & np.isfinite(std)
    if measured.finite is not None:
        finite &= measured.finite
    flags = dict.fromkeys(ISSUES, ~yes)
    flags["not_finite"] = judged & ~finite
    flags["wrong_shape"], flags["wrong_dtype"] = ~shape_ok, ~dtype_ok
    flags["bad_label"] = (class_ids < 0) | (class_ids >= classes)
    judged = judged & finite
    if expected is not None and measured.minimum is not None and measured.maximum is not None:
        spare = _TOLERANCE * (expected[1] - expected[0])
        within = (measured.minimum >= expected[0] - spare) & (measured.maximum <= expected[1] + spare)
        flags["out_of_range"] = judged & ~within
    if measured.levels:
        flags["constant"] = judged & (std < thresholds.constant)
        flags["low_contrast"] = judged & (std < thresholds.low_contrast) & ~flags["constant"]
        flags["dark"] = judged & (mean < thresholds.dark)
        flags["bright"] = judged & (mean > thresholds.bright)
    else:
        flags["constant"] = judged & (std <= _EVEN * np.abs(mean))
    flags["magnified"] = judged & (magnification > thresholds.magnified)

    passed = ~np.logical_or.reduce([flags[name] for name in FATAL])
    lost = sum((flags[name] * weight for name, weight in MINOR.items()), np.zeros(count))
    scores = np.where(passed, np.maximum(1 - lost, 0), 0).astype(np.float32)
    return Scored(score=scores, passed=passed, issues=_names(flags, count), ready=passed & (scores >= thresholds.score))


def _names(flags: dict[str, BoolArray], count: int) -> pa.ListArray:
    """Return the names of the raised flags of each row, shape (count,)."""
    raised = np.stack([flags[name] for name in ISSUES], axis=1)
    offsets = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(raised.sum(axis=1), out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(ISSUES).take(pa.array(np.nonzero(raised)[1])), type=ISSUES_TYPE)


def _measure_levels(images: npt.NDArray[np.uint8]) -> Measured:
    levels = np.arange(256.0)
    mean, std = np.empty(len(images), np.float32), np.empty(len(images), np.float32)
    for row, image in enumerate(images):
        counts = np.bincount(image.ravel(), minlength=256)  # whole numbers: exact in any order
        mean[row] = center = counts @ levels / image.size
        std[row] = np.sqrt(counts @ (levels - center) ** 2 / image.size)
    return Measured(mean=mean, std=std)


def _measure_floats(
    images: npt.NDArray[np.float32], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Measured:
    levels = mean is not None and std is not None
    figures = np.full((4, len(images)), np.nan, np.float32)
    for row, image in enumerate(images):
        low, high = image.min(), image.max()  # NaN if any value is
        figures[2:, row] = low, high
        if not np.isfinite(low) or not np.isfinite(high):
            continue
        values = image.astype(np.float64)
        if levels:
            values *= np.asarray(std)[:, None, None]
            values += np.asarray(mean)[:, None, None]
            values *= 255
        figures[:2, row] = values.mean(), values.std()
    means, stds, minimum, maximum = figures
    finite = np.isfinite(minimum) & np.isfinite(maximum)
    return Measured(mean=means, std=stds, minimum=minimum, maximum=maximum, finite=finite, levels=levels)
