"""Engines that make variants (the compiled kernel, torch on a device, a user's policy), and the judgement of variants.

A fatal issue makes a variant invalid, with score 0. A minor one lowers the score, which begins at 1, by its weight. By
the weights, one minor issue leaves a variant training-ready at the usual bound of 0.5, and any two don't.

    fatal          not_finite     a value is NaN or infinite
                   constant       almost no variation over the variant
                   bad_label      the class id belongs to no class
    minor  0.375   low_contrast, dark, bright
           0.25    magnified      a small crop was enlarged: it shows less detail than its pixels suggest
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.images.config import Augmentation, ImageAugmentationConfig, ImageThresholds
from tasks.images.draws import Draws, draw, window
from tasks.io.errors import InputError
from tasks.io.tensors import AnyArray, BoolArray, Float32Array, UInt8Array, UInt64Array

FATAL = ("not_finite", "constant", "bad_label")
MINOR = {"low_contrast": 0.375, "dark": 0.375, "bright": 0.375, "magnified": 0.25}
ISSUES = (*FATAL, *MINOR)
ISSUES_TYPE = pa.list_(pa.field("element", pa.string()))  # as Parquet names it: written and read types are equal

_EVEN = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of n variants, over all channels and pixels of each; float32 arrays of shape (n,)."""

    mean: Float32Array  # of levels 0 to 255, or of the values themselves without `levels`
    std: Float32Array  # likewise, of the population (divided by the number of values)
    finite: BoolArray | None = None  # True if all values are; None for uint8
    levels: bool = True  # False if the values of black and white are unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The judgement of n variants."""

    score: Float32Array  # in [0, 1]
    passed: BoolArray  # no fatal issue
    issues: pa.ListArray  # names of issues, in the order of ISSUES
    ready: BoolArray  # training-ready: passed, with a high enough score


def measure(images: AnyArray, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Measured:
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


def score(
    measured: Measured,
    magnification: Float32Array,
    class_ids: npt.NDArray[np.integer[Any]],
    classes: int,
    thresholds: ImageThresholds,
) -> Scored:
    """Judge n variants.

    Args:
        measured: Their figures.
        magnification: Area of the output by that of the crop; NaN if unknown. Shape (n,).
        class_ids: Shape (n,).
        classes: Number of classes: ids go from 0 to one below it.
        thresholds: Bounds. Those of light and contrast are in levels: without them only a variant whose values are
            all the same, as far as float32 can tell, is constant.

    Raises:
        InputError: arrays of different lengths.
    """
    count = len(measured.mean)
    lengths = {len(array) for array in (measured.mean, measured.std, magnification, class_ids)}
    if lengths != {count}:
        raise InputError(f"figures of {sorted(lengths)} variants; every array must have one for each variant")
    mean, std = measured.mean, measured.std
    finite = np.isfinite(mean) & np.isfinite(std)
    if measured.finite is not None:
        finite &= measured.finite
    flags = dict.fromkeys(ISSUES, np.zeros(count, dtype=bool))
    flags["not_finite"] = ~finite
    flags["bad_label"] = (class_ids < 0) | (class_ids >= classes)
    if measured.levels:
        flags["constant"] = finite & (std < thresholds.constant)
        flags["low_contrast"] = finite & (std < thresholds.low_contrast) & ~flags["constant"]
        flags["dark"] = finite & (mean < thresholds.dark)
        flags["bright"] = finite & (mean > thresholds.bright)
    else:
        flags["constant"] = finite & (std <= _EVEN * np.abs(mean))
    flags["magnified"] = finite & (magnification > thresholds.magnified)

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


def _measure_levels(images: UInt8Array) -> Measured:
    levels = np.arange(256.0)
    mean, std = np.empty(len(images), np.float32), np.empty(len(images), np.float32)
    for row, image in enumerate(images):
        counts = np.bincount(image.ravel(), minlength=256)  # whole numbers: exact in any order
        mean[row] = center = counts @ levels / image.size
        std[row] = np.sqrt(counts @ (levels - center) ** 2 / image.size)
    return Measured(mean=mean, std=std)


def _measure_floats(images: Float32Array, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Measured:
    levels = mean is not None and std is not None
    figures, finite = np.full((2, len(images)), np.nan, np.float32), np.zeros(len(images), bool)
    for row, image in enumerate(images):
        finite[row] = np.isfinite(image.min()) and np.isfinite(image.max())  # NaN if any value is
        if not finite[row]:
            continue
        values = image.astype(np.float64)
        if levels:
            values *= np.asarray(std)[:, None, None]
            values += np.asarray(mean)[:, None, None]
            values *= 255
        figures[:, row] = values.mean(), values.std()
    return Measured(mean=figures[0], std=figures[1], finite=finite, levels=levels)


HELD_BYTES = 256 << 20
"""Bytes of pixels that wait for a torch engine."""

Variants = tuple[AnyArray, Measured, Float32Array]
"""The variants, shape (m × K, 3, size, size), image by image; their figures; the crops' magnification."""


class Engine(Protocol):
    """Maker of variants of images; loaded once per worker."""

    keeps: bool
    """True if it holds several images at a time: then each needs separate memory."""

    def variants(
        self, images: Iterable[UInt8Array | None], keys: UInt64Array, expected_sizes: Sequence[tuple[int, int]]
    ) -> Variants:
        """Return K variants of each image, in its order.

        Args:
            images: m pictures, RGBX, shape (height, width, 4) each; None for one that can't be decoded and has no
                variants. They are consumed one by one, as they are needed.
            keys: Keys of the images (`tasks.images.draws.image_keys`), shape (m,).
            expected_sizes: Probable height and width of each image: wrong ones only cost time.

        Returns:
            uint8 or float32 variants, valid until the next call; see `Variants`.
        """
        ...


def make_engine(config: ImageAugmentationConfig) -> Engine:
    """Return the engine for a configuration.

    Raises:
        ConfigError: the policy can't be loaded, or the device doesn't exist.
    """
    augmentation = config.augmentation
    device = ("cuda" if config.num_gpus else "cpu") if config.device == "auto" else config.device
    if augmentation.policy is not None:
        return _ByPolicy(augmentation, device)
    if config.device == "auto" and not config.num_gpus:
        return _Fused(augmentation)
    return _ByTorch(augmentation, device)


class _Fused:
    keeps = False

    def __init__(self, augmentation: Augmentation) -> None:
        from tasks.images.kernel import FusedEngine  # numba: 0.7 s to import and load

        self._augmentation = augmentation
        self._engine = FusedEngine(augmentation)
        self._out = np.empty((0, 3, augmentation.size, augmentation.size), np.uint8)

    def variants(
        self, images: Iterable[UInt8Array | None], keys: UInt64Array, expected_sizes: Sequence[tuple[int, int]]
    ) -> Variants:
        # Drawing all at once takes a tenth of the time; each image is augmented right after decoding, in the cache.
        variants = self._augmentation.variants
        count = len(keys) * variants
        if count > len(self._out):
            self._out = np.empty((count, *self._out.shape[1:]), np.uint8)
        figures, magnification = np.empty((count, 2), np.float32), np.empty(count, np.float32)
        draws = _draws(expected_sizes, keys, self._augmentation)
        done = 0
        for number, pixels in enumerate(images):
            if pixels is None:
                continue
            own, first, used = slice(done, done + variants), number * variants, draws
            if pixels.shape[:2] != expected_sizes[number]:
                used, first = _draws([pixels.shape[:2]], keys[number : number + 1], self._augmentation), 0
            self._engine.augment(pixels, used, first, self._out[own], figures[own])
            magnification[own] = _magnification(used, slice(first, first + variants), self._augmentation)
            done += variants
        measured = Measured(mean=figures[:done, 0], std=figures[:done, 1])
        return self._out[:done], measured, magnification[:done]


class _ByTorch:
    keeps = True

    def __init__(self, augmentation: Augmentation, device: str) -> None:
        from tasks.images.transforms import TorchEngine  # torchvision: 5 s to import

        self._augmentation = augmentation
        self._engine = TorchEngine(augmentation, device)

    def variants(
        self,
        images: Iterable[UInt8Array | None],
        keys: UInt64Array,
        expected_sizes: Sequence[tuple[int, int]],  # noqa: ARG002 - all images are there before anything is drawn
    ) -> Variants:
        made, magnification = [], []
        for held, kept in _portions(images, keys):
            draws = _draws([pixels.shape[:2] for pixels in held], kept, self._augmentation)
            made.append(self._engine.apply(held, draws))
            magnification.append(_magnification(draws, slice(None), self._augmentation))
        together = _together(made, self._augmentation)
        return together, measure(together), np.concatenate([np.empty(0, np.float32), *magnification])


class _ByPolicy:
    keeps = True

    def __init__(self, augmentation: Augmentation, device: str) -> None:
        from tasks.images.transforms import PolicyEngine

        assert augmentation.policy is not None, "without a policy there is another engine"
        self._augmentation = augmentation
        self._engine = PolicyEngine(augmentation.policy, augmentation, device)

    def variants(
        self,
        images: Iterable[UInt8Array | None],
        keys: UInt64Array,
        expected_sizes: Sequence[tuple[int, int]],  # noqa: ARG002 - nothing is drawn here
    ) -> Variants:
        made = _together([self._engine.apply(held, kept) for held, kept in _portions(images, keys)], self._augmentation)
        return made, measure(made), np.full(len(made), np.nan, np.float32)


def _portions(images: Iterable[UInt8Array | None], keys: UInt64Array) -> Iterator[tuple[list[UInt8Array], UInt64Array]]:
    """Yield the decodable images with their keys: all at once, unless they are very large."""
    held: list[UInt8Array] = []
    numbers: list[int] = []
    for number, pixels in enumerate(images):
        if pixels is not None:
            held.append(pixels)
            numbers.append(number)
        if sum(one.nbytes for one in held) > HELD_BYTES:
            yield held, keys[numbers]
            held, numbers = [], []
    if held:
        yield held, keys[numbers]


def _together(made: Sequence[AnyArray], augmentation: Augmentation) -> AnyArray:
    if len(made) == 1:
        return made[0]
    return np.concatenate(made) if made else np.empty((0, 3, augmentation.size, augmentation.size), np.uint8)


def _draws(sizes: Sequence[tuple[int, ...]], keys: UInt64Array, augmentation: Augmentation) -> Draws:
    heights, widths = np.array(sizes, np.int64).reshape(-1, 2).T
    return draw(keys, heights, widths, augmentation)


def _magnification(draws: Draws, rows: slice, augmentation: Augmentation) -> Float32Array:
    crops = draws.crop[rows, 2:]
    made = np.array([window(tall, wide, augmentation)[:2] for tall, wide in crops.tolist()], np.float32).reshape(-1, 2)
    return np.asarray(made.prod(axis=1) / (crops[:, 0].astype(np.float32) * crops[:, 1]), np.float32)
