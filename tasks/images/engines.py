"""One way to call what makes the variants: the compiled kernel, torch on a device, or a policy of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.draws import Draws, UInt64Array, draw
from tasks.images.scoring import Measured, measure

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

Variants = tuple[npt.NDArray[Any], Measured, FloatArray]
"""The variants, shape (m × K, 3, size, size), image by image; their figures; the crops' magnification."""


class Engine(Protocol):
    """Makes the variants of some images; loaded once per worker."""

    def variants(self, images: Sequence[UInt8Array], keys: UInt64Array) -> Variants:
        """K variants of each image, in its order.

        Args:
            images: m pictures, RGBX, shape (height, width, 4) each.
            keys: Keys of the images (`tasks.images.draws.image_keys`), shape (m,).

        Returns:
            uint8 or float32 variants, valid until the next call; see `Variants`.

        """
        ...


def make_engine(config: ImageAugmentationConfig) -> Engine:
    """The engine that a configuration asks for.

    Raises:
        ConfigError: the policy can't be loaded, or there is no such device.

    """
    augmentation = config.augmentation
    device = ("cuda" if config.num_gpus else "cpu") if config.device == "auto" else config.device
    if augmentation.policy is not None:
        return _ByPolicy(augmentation, device)
    if config.device == "auto" and not config.num_gpus:
        return _Fused(augmentation)
    return _ByTorch(augmentation, device)


class _Fused:
    def __init__(self, augmentation: Augmentation) -> None:
        from tasks.images.kernel import FusedEngine  # numba: 0.7 s to import and load

        self._augmentation = augmentation
        self._engine = FusedEngine(augmentation)
        self._out = np.empty((0, 3, augmentation.size, augmentation.size), np.uint8)

    def variants(self, images: Sequence[UInt8Array], keys: UInt64Array) -> Variants:
        count = len(images) * self._augmentation.variants
        if count > len(self._out):
            self._out = np.empty((count, *self._out.shape[1:]), np.uint8)
        out, figures = self._out[:count], np.empty((count, 2), np.float32)
        draws = _draws(images, keys, self._augmentation)
        for number, pixels in enumerate(images):
            first = number * self._augmentation.variants
            own = slice(first, first + self._augmentation.variants)
            self._engine.augment(pixels, draws, first, out[own], figures[own])
        measured = Measured(mean=figures[:, 0], std=figures[:, 1])
        return out, measured, _magnification(draws, self._augmentation)


class _ByTorch:
    def __init__(self, augmentation: Augmentation, device: str) -> None:
        from tasks.images.transforms import TorchEngine  # torchvision: 5 s to import

        self._augmentation = augmentation
        self._engine = TorchEngine(augmentation, device)

    def variants(self, images: Sequence[UInt8Array], keys: UInt64Array) -> Variants:
        draws = _draws(images, keys, self._augmentation)
        made = self._engine.apply(images, draws)
        return made, measure(made), _magnification(draws, self._augmentation)


class _ByPolicy:
    def __init__(self, augmentation: Augmentation, device: str) -> None:
        from tasks.images.transforms import PolicyEngine

        assert augmentation.policy is not None, "without a policy there is another engine"
        self._engine = PolicyEngine(augmentation.policy, augmentation, device)

    def variants(self, images: Sequence[UInt8Array], keys: UInt64Array) -> Variants:
        made = self._engine.apply(images, keys)
        return made, measure(made), np.full(len(made), np.nan, np.float32)


def _draws(images: Sequence[UInt8Array], keys: UInt64Array, augmentation: Augmentation) -> Draws:
    heights = np.array([pixels.shape[0] for pixels in images], np.int64)
    widths = np.array([pixels.shape[1] for pixels in images], np.int64)
    return draw(keys, heights, widths, augmentation)


def _magnification(draws: Draws, augmentation: Augmentation) -> FloatArray:
    area = draws.crop[:, 2].astype(np.float32) * draws.crop[:, 3]
    return np.asarray(augmentation.size**2 / area, np.float32)
