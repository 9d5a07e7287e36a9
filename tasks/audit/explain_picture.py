"""An image before and after, as one picture: the original with the crops in it, and each variant as it is stored."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.images.config import ImageAugmentationConfig
from tasks.images.decode import Decoded, Decoder
from tasks.images.draws import draws_of
from tasks.images.examples import levels
from tasks.images.rows import decode_images
from tasks.images.sheets import thumbnail, tile_sheet
from tasks.io import storage
from tasks.io.errors import ConfigError

ByteArray = npt.NDArray[np.uint8]

_SIDE, _LINES = 240, 5
_PIXELS = 1024
_MARGIN = 16
_MOST_BYTES = 4 << 20
_COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))
_NAMES = ("red", "blue", "green", "orange", "violet", "turquoise")


def write_picture(
    path: str,
    config: ImageAugmentationConfig,
    image: tuple[Mapping[str, Any], str],
    variants: pa.Table,
    words: Sequence[str],
) -> dict[str, Any]:
    """Write the picture, a local .png or .webp.

    Args:
        path: File to write; an existing one is replaced.
        config: The version's configuration.
        image: Its row in the table of originals, and the state of its file.
        variants: Stored rows of its variants.
        words: Transforms of each, in words.

    Returns:
        Facts about the file.

    Raises:
        ConfigError: the file can't be written.

    """
    items = [_before(config, *image)]
    if variants.num_rows:
        variants = variants.sort_by("augmentation_id")
        numbers, issues = (variants[name].to_pylist() for name in ("augmentation_id", "quality_issues"))
        for number, stored, wrong in zip(numbers, decode_images(variants), issues, strict=True):
            told = f"{', '.join(wrong)}: " if wrong else ""
            coloured = config.augmentation.policy is None and number < len(_NAMES)
            name = f"variant {number}" + (f" ({_NAMES[number]})" if coloured else "")
            items.append((name, told + words[number], levels(stored, config.augmentation)))
    data = _opaque(tile_sheet(items, _SIDE, _MOST_BYTES, lines=_LINES), path)
    try:
        Path(path).write_bytes(data)
    except OSError as fault:
        raise ConfigError(f"--picture {path} can't be written: {fault.strerror}; give another place") from fault
    return {"written to": str(Path(path).resolve()), "bytes": len(data), "shows": [name for name, _, _ in items]}


def _before(
    config: ImageAugmentationConfig, original: Mapping[str, Any], state: str
) -> tuple[str, str, ByteArray | None]:
    """Return the original with its crops; a text if the file has changed."""
    name, size = f"original: {original['class_name']}", f"{original['width']} × {original['height']} px"
    if state != "unchanged":
        return name, f"its file is {state}", None
    decoded = Decoder(config.max_pixels, config.background).decode(storage.read_bytes(original["uri"]))
    if not isinstance(decoded, Decoded):
        return name, f"it can't be decoded here: {decoded.reason}", None
    small = thumbnail(decoded.pixels[:, :, :3], _PIXELS).copy()
    text = f"{size}, {original['format']}, {original['split']}"
    if config.of_split(original["split"]).augmentation.policy is not None:
        return name, text, small
    scale = small.shape[0] / original["height"], small.shape[1] / original["width"]
    for crop, colour in zip(draws_of(config, original).crop.tolist(), _COLOURS, strict=False):
        _frame(small, crop, scale, colour)
    return name, f"{text}; the frames are the variants' crops", small


def _frame(pixels: ByteArray, crop: Sequence[int], scale: tuple[float, float], colour: tuple[int, int, int]) -> None:
    """Draw the border of a crop into a picture."""
    top, left = round(crop[0] * scale[0]), round(crop[1] * scale[1])
    bottom, right = round((crop[0] + crop[2]) * scale[0]), round((crop[1] + crop[3]) * scale[1])
    wide = max(2, max(pixels.shape[:2]) // 150)
    inside = pixels[top:bottom, left:right]
    for side in (inside[:wide], inside[-wide:], inside[:, :wide], inside[:, -wide:]):
        side[...] = colour


def _opaque(sheet: bytes, path: str) -> bytes:
    """Encode a sheet on white, in the format of a file's suffix."""
    from PIL import Image

    with Image.open(io.BytesIO(sheet)) as opened:
        image = opened.convert("RGBA")
    left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
    ground = Image.new("RGBA", (right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN), "white")
    ground.alpha_composite(image.crop((left, top, right, bottom)), (_MARGIN, _MARGIN))
    data = io.BytesIO()
    flat = ground.convert("RGB")
    if path.lower().endswith(".png"):
        flat.save(data, "PNG", optimize=True)
    else:
        flat.save(data, "WEBP", quality=90)
    return data.getvalue()
