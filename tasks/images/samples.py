"""Declared range of a file's samples, so that its black becomes 0 and its white 255. Pure.

Pillow converts most pictures to 8 bits itself. For those that it leaves deeper, or converts without the
declaration, this gives the range.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, Jpeg2KImagePlugin, TiffImagePlugin

from tasks.images.parts import jpeg2000_depths, with_deeper_samples

_BITS, _PHOTOMETRIC, _FORMAT, _LEAST, _GREATEST = 258, 262, 339, 340, 341  # TIFF 6.0
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2


@dataclass(frozen=True, slots=True)
class Scale:
    """The samples that are black and white; and their type, if Pillow assumes another."""

    black: float
    white: float
    dtype: str | None = None

    def eight_bits(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
        """Return gray values of any range in 8 bits, rounded and clipped to black and white; NaN becomes 0."""
        if self.dtype is not None:
            values = values.view(self.dtype)
        if values.dtype.kind == "u" and values.itemsize == 2 and values.size > 2**16:
            table = self.eight_bits(np.arange(2**16, dtype=np.uint16))
            return table[values.astype(np.uint16, copy=False)]  # quicker
        shares = (values.astype(np.float64) - self.black) * (255 / (self.white - self.black))
        np.nan_to_num(shares, copy=False, nan=0, posinf=255, neginf=0)
        gray: npt.NDArray[np.uint8] = np.rint(shares.clip(0, 255)).astype(np.uint8)
        return gray


def declared_scale(image: Image.Image, data: bytes | memoryview) -> Scale:
    """Return the scale of a loaded gray picture of more than 8 bits: of mode I, I;16 or F.

    Args:
        image: The picture.
        data: The picture's file.

    """
    if image.mode == "F":
        return _float_scale(image)
    if image.mode == "I" and image.format == "PPM":
        return Scale(0, 65535)  # Pillow has scaled them, whatever the greatest value was
    if image.format == "JPEG2000":
        bits = min(16, max(jpeg2000_depths(data)[:1], default=16))
        return Scale(0, (2**bits - 1) << (16 - bits))  # Pillow has moved them to the upper end of 16 bits
    bits = 32 if image.mode == "I" else 16
    is_signed = image.mode == "I" or image.format == "FITS"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = _first(image.tag_v2.get(_BITS, 1))
        is_signed = _first(image.tag_v2.get(_FORMAT, _UNSIGNED)) == _SIGNED
    if bits == 32 and is_signed and _is_of_16_bits(image):
        bits, is_signed = 16, False
    black, white = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    if _is_negative(image):
        black, white = white, black
    if image.mode == "I":
        return Scale(black, white, "u4" if bits == 32 and not is_signed else None)
    return Scale(black, white, "i2" if is_signed else None)


def _is_of_16_bits(image: Image.Image) -> bool:
    """Return True if all values fit 16 bits: Pillow, for one, writes such pictures as signed 32-bit integers."""
    values = np.asarray(image)
    return bool(values.min() >= 0 and values.max() <= 65535)


def _float_scale(image: Image.Image) -> Scale:
    """Return a TIFF's declared scale; else up to 1 if the greatest is at most 2 (a filter's overshoot), or to 255."""
    black, white = 0.0, 0.0
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        black, white = (float(_first(image.tag_v2.get(tag, 0))) for tag in (_LEAST, _GREATEST))
    if not (math.isfinite(white - black) and black < white):
        values = np.asarray(image)
        black, white = 0.0, 1.0 if values.max(initial=0, where=np.isfinite(values)) <= 2 else 255.0
    return Scale(white, black) if _is_negative(image) else Scale(black, white)


def _is_negative(image: Image.Image) -> bool:
    """Return True if the file declares white as zero."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def in_whole_range(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """Return a JPEG 2000 of colour or alpha, or of fewer than 8 bits, with samples in 0 to 255; others unchanged.

    Pillow moves samples of n < 8 bits to the upper end of 8, where white isn't 255; for deeper ones it adds half
    a unit before it drops the rest, which makes 256 of white, and of that 0.
    """
    depths = jpeg2000_depths(data) if image.format == "JPEG2000" and image.mode in ("L", "LA", "RGB", "RGBA") else ()
    if not depths or len(depths) != len(image.getbands()):
        return image
    if max(depths) > 8:
        image = _white_again(image, data)
    if min(depths) < 8:
        shifts = [max(0, 8 - bits) for bits in depths]
        image = image.point(
            [min(255, round(value * 255 / (256 - 2**shift))) for shift in shifts for value in range(256)]
        )
    return image


def _white_again(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """Distinguish black from the white that became it: with one bit more announced, samples are between 64 and 192."""
    if all(band.getextrema()[0] for band in image.split()):
        return image  # nothing is black
    halved = Jpeg2KImagePlugin.Jpeg2KImageFile(io.BytesIO(with_deeper_samples(data)))
    halved.load()
    bands = []
    for band, half in zip(image.split(), halved.split(), strict=True):
        values = np.asarray(band).copy()
        values[(values == 0) & (np.asarray(half) >= 128)] = 255
        bands.append(Image.fromarray(values))
    return Image.merge(image.mode, bands)
