"""Common interface of the engines that make variants: the compiled kernel, torch on a device, or a user's policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.draws import Draws, UInt64Array, draw, window
from tasks.images.scoring import Measured, measure

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

HELD_BYTES = 256 << 20
"""Bytes of pixels that wait for a torch engine."""

Variants = tuple[npt.NDArray[Any], Measured, FloatArray]
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


def _together(made: Sequence[npt.NDArray[Any]], augmentation: Augmentation) -> npt.NDArray[Any]:
    if len(made) == 1:
        return made[0]
    return np.concatenate(made) if made else np.empty((0, 3, augmentation.size, augmentation.size), np.uint8)


def _draws(sizes: Sequence[tuple[int, ...]], keys: UInt64Array, augmentation: Augmentation) -> Draws:
    heights, widths = np.array(sizes, np.int64).reshape(-1, 2).T
    return draw(keys, heights, widths, augmentation)


def _magnification(draws: Draws, rows: slice, augmentation: Augmentation) -> FloatArray:
    crops = draws.crop[rows, 2:]
    made = np.array([window(tall, wide, augmentation)[:2] for tall, wide in crops.tolist()], np.float32).reshape(-1, 2)
    return np.asarray(made.prod(axis=1) / (crops[:, 0].astype(np.float32) * crops[:, 1]), np.float32)
