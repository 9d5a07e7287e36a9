"""A small deterministic set of labelled pictures: five textures in any colours and light, with the usual flaws.

Every picture has a separate counter-based generator (Philox, keyed by seed and number), so it doesn't depend on the
number of pictures. Pixels come from operations that IEEE 754 rounds exactly (no sine, no exponential, no sum in
undefined order), so they are the same on every machine; the files are too, if their encoders are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tasks.io import storage
from tasks.io.errors import InputError
from tasks.io.tensors import Float32Array, UInt8Array
from tasks.store import layout

if TYPE_CHECKING:
    from PIL import Image as PIL_Image


CLASSES = ("stripes", "checks", "dots", "rings", "triangles")
FLAWS_FROM = 100
FLAWS = {
    "flaw-empty": "a file of no bytes",
    "flaw-truncated": "a JPEG that ends halfway",
    "flaw-html": "a web page named .jpg",
    "flaw-unlabelled": "a picture without a label",
    "flaw-missing": "a label without a picture",
    "flaw-two-labels": "a picture with two labels",
    "copy-exact": "the bytes of another picture",
    "copy-recompressed": "another picture at a lower quality",
    "copy-resized": "another picture, smaller",
}

# Forms other than a plain JPEG, by the picture's number: at once, and again every 41 pictures. 41 is no multiple of
# five, so each class comes in each form.
_CMYK, _RGBA = 3, 8
_FORMS = {5: "png", 26: "png", 12: "webp", 33: "webp", 17: "grey", 9: "turned", 30: "turned", 38: "turned"}
_FORMS_REPEAT = 41
_TURNS = {3: 2, 6: 1, 8: 3}  # EXIF orientation: quarter turns to the left of the stored pixels
_ORIENTATION = 0x0112

_CELLS = 32  # a power of two; shapes repeat after so many cells, which no picture holds
_COARSE = 40  # points of the grid that slow variation is made on
_COPIED = (20, 41, 62)
_EXTRA = 1 << 62  # numbers of the pictures that aren't counted
_WRITERS = 4
_AT_ONCE = 32
"""Pictures that one task draws."""
Labels = list[str]
"""Lines of the labels' file: image_id,class_name."""
Drawn = Callable[[Callable[[range], Labels], Sequence[range]], Iterator[Labels]]


@dataclass(frozen=True, slots=True)
class SampleFile:
    """One file of the sample: its name, its bytes, and the classes that the labels give it (none, one or two)."""

    image_id: str
    suffix: str
    data: bytes | None
    classes: tuple[str, ...]


def write_sample(root: str, count: int, seed: int, drawn: Drawn = map) -> dict[str, str]:
    """Write the sample under the root, unless it exists; return the URIs of the images and of their labels.

    The labels are a CSV file of image_id (the file's name without its suffix) and class_name.

    Args:
        root: Root of the datasets.
        count: Number of whole pictures with one label each; from `FLAWS_FROM` on, `FLAWS` are added to them.
        seed: Seed, in [0, 2**63).
        drawn: Yields the results of a function that draws some pictures, for each of several ranges of numbers, in
            their order.

    Raises:
        InputError: fewer than one picture is requested.
    """
    if count < 1:
        raise InputError(f"a sample of {count} images has nothing in it; ask for 1 or more")
    base = layout.sample(root, "image-augmentation", f"{count}-{seed}")
    uris = {"images": layout.join(base, "images"), "labels": layout.join(base, "labels.csv")}
    done = layout.join(base, "_complete")
    if storage.exists(done):
        return uris
    images = uris["images"]

    def draw(numbers: range) -> Labels:
        return _written(images, (picture_file(seed, number) for number in numbers))

    labels = ["image_id,class_name"]
    for some in drawn(draw, [range(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE)]):
        labels += some
    if count >= FLAWS_FROM:
        labels += _written(images, flawed_files(seed))
    storage.write_bytes(uris["labels"], ("\n".join(labels) + "\n").encode())
    storage.write_bytes(done, b"")
    return uris


def picture(seed: int, number: int) -> UInt8Array:
    """Return the pixels of one picture, (height, width, 3); its class is `picture_class(number)`.

    The sides are 160 to 400 pixels. The texture is turned, bent, in two colours of different brightness, unevenly lit
    and noisy; only its shape depends on the class.
    """
    draw = _generator(seed, number)
    height, width = _size(draw)
    bend, light, tint = _fields(draw, height, width)
    mask = _texture(draw, picture_class(number), height, width, bend)
    front, back = _colours(draw)
    light *= np.float32(0.75 + 0.35 * draw.random())
    grain = draw.integers(0, 256, (2, height, width), dtype=np.uint8).astype(np.float32)
    noise = (grain[0] - grain[1]) * np.float32((1 + 7 * draw.random()) / 256) + np.float32(0.5)
    pixels = np.empty((height, width, 3), np.uint8)
    for channel, warmth in enumerate((24, 0, -24)):
        plane = mask * (front[channel] - back[channel])
        plane += back[channel]
        plane *= light
        plane += noise
        plane += tint * np.float32(warmth)
        pixels[..., channel] = np.minimum(np.maximum(plane, 0), 255)
    return pixels


def picture_class(number: int) -> str:
    """Return the class of a picture: classes take turns."""
    return CLASSES[number % len(CLASSES)]


def picture_file(seed: int, number: int) -> SampleFile:
    """Return a picture as a file: mostly JPEG; some PNG, WebP, grey or turned by EXIF, one CMYK, one transparent."""
    form = "cmyk" if number == _CMYK else "rgba" if number == _RGBA else _FORMS.get(number % _FORMS_REPEAT, "jpeg")
    suffix, data = _encoded(picture(seed, number), form, _generator(seed, number, stream=1))
    return SampleFile(f"img-{number:06d}", suffix, data, (picture_class(number),))


def flawed_files(seed: int) -> Iterator[SampleFile]:
    """Yield the files of `FLAWS`, in that order; copies are of pictures that every sample with flaws has."""
    from PIL import Image

    truncated, unlabelled, twice = (
        _saved(Image.fromarray(picture(seed, _EXTRA + number)), "JPEG", quality=90) for number in range(3)
    )
    html = b"<!doctype html>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n"
    yield SampleFile("flaw-empty", ".jpg", b"", (CLASSES[0],))
    yield SampleFile("flaw-truncated", ".jpg", truncated[: len(truncated) // 2], (picture_class(_EXTRA),))
    yield SampleFile("flaw-html", ".jpg", html, (CLASSES[2],))
    yield SampleFile("flaw-unlabelled", ".jpg", unlabelled, ())
    yield SampleFile("flaw-missing", "", None, (CLASSES[3],))
    yield SampleFile("flaw-two-labels", ".jpg", twice, (picture_class(_EXTRA + 2), picture_class(_EXTRA + 3)))
    exact, recompressed, resized = _COPIED
    original = picture_file(seed, exact)
    yield SampleFile("copy-exact", original.suffix, original.data, original.classes)
    image = Image.fromarray(picture(seed, recompressed))
    yield SampleFile("copy-recompressed", ".jpg", _saved(image, "JPEG", quality=60), (picture_class(recompressed),))
    image = Image.fromarray(picture(seed, resized))
    smaller = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)
    yield SampleFile("copy-resized", ".jpg", _saved(smaller, "JPEG", quality=90), (picture_class(resized),))


def _written(base: str, files: Iterator[SampleFile]) -> Labels:
    """Write some files, while the next ones are drawn; return their labels."""

    def write(file: SampleFile) -> Labels:
        if file.data is not None:
            storage.write_bytes(layout.join(base, file.image_id + file.suffix), file.data)
        return [f"{file.image_id},{name}" for name in file.classes]

    return [line for lines in storage.in_threads(write, files, threads=_WRITERS) for line in lines]


def _encoded(pixels: UInt8Array, form: str, draw: np.random.Generator) -> tuple[str, bytes]:
    """Return suffix and bytes of a picture in one of the forms."""
    from PIL import Image

    quality = int(draw.integers(85, 96))
    image = Image.fromarray(pixels)
    match form:
        case "png":
            return ".png", _saved(image, "PNG", compress_level=1)
        case "rgba":
            image.putalpha(Image.fromarray(_cut_out(*pixels.shape[:2])))
            return ".png", _saved(image, "PNG", compress_level=1)
        case "webp":
            return ".webp", _saved(image, "WEBP", quality=quality, method=2)
    exif = Image.Exif()
    match form:
        case "grey":
            image = image.convert("L")
        case "cmyk":
            image = image.convert("CMYK")
        case "turned":
            orientation = int(draw.choice(list(_TURNS)))
            exif[_ORIENTATION] = orientation
            image = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, _TURNS[orientation])))
    return ".jpg", _saved(image, "JPEG", quality=quality, exif=exif or b"")


def _saved(image: PIL_Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _cut_out(height: int, width: int) -> UInt8Array:
    """Return the opacity of an ellipse that fills the picture."""
    y, x = np.ogrid[:height, :width]
    inside = 1 - (2 * y / height - 1) ** 2 - (2 * x / width - 1) ** 2
    return np.clip(inside * 2550, 0, 255).astype(np.uint8)


def _size(draw: np.random.Generator) -> tuple[int, int]:
    """Return height and width: the longer 200 to 400 pixels, the shorter at least 160 and six tenths of it."""
    longer = 200 + int(201 * draw.random())
    shorter = max(160, int(longer * (0.6 + 0.4 * draw.random())))
    return (longer, shorter) if draw.random() < 0.5 else (shorter, longer)


def _directions(draw: np.random.Generator, count: int) -> Float32Array:
    """Return cosines and sines of angles within a quarter turn of 0, (2, count), by the tangents of their halves."""
    tangent = 2 * draw.random(count) - 1
    square = tangent * tangent
    return np.stack([(1 - square) / (1 + square), 2 * tangent / (1 + square)]).astype(np.float32)


def _colours(draw: np.random.Generator) -> tuple[Float32Array, Float32Array]:
    """Return two colours whose luma differs by at least 70."""
    pairs = draw.integers(0, 256, (64, 2, 3))
    luma = pairs @ np.array([77, 150, 29]) >> 8
    distinct = np.flatnonzero(abs(luma[:, 0] - luma[:, 1]) >= 70)
    front, back = pairs[distinct[0]] if len(distinct) else np.array([[230] * 3, [40] * 3])
    return front.astype(np.float32), back.astype(np.float32)


def _fields(draw: np.random.Generator, height: int, width: int) -> Float32Array:
    """Return slow variations over a picture, (3, height, width): bend of the texture, light and warmth of the colours.

    They are made on a coarse grid and interpolated linearly.
    """
    coarse = _COARSE
    ramp = np.linspace(-1, 1, coarse, dtype=np.float32) * np.float32(0.2)
    cosine, sine = _directions(draw, 1)
    light = 1 + cosine * ramp + sine * ramp[:, None]
    for points, strength in ((3, 0.34), (4, 0.26), (10, 0.16)):
        light += np.float32(strength) * _smooth_noise(draw, coarse, points)
    fields = np.stack([_smooth_noise(draw, coarse, 6), light, _smooth_noise(draw, coarse, 3)])
    before, part = _between(width, coarse)
    fields = fields[:, :, before] + part * (fields[:, :, before + 1] - fields[:, :, before])
    before, part = _between(height, coarse)
    steps = np.diff(fields, axis=1)
    whole: Float32Array = steps[:, before]
    whole *= part[:, None]
    whole += fields[:, before]
    return whole


def _smooth_noise(draw: np.random.Generator, length: int, points: int) -> Float32Array:
    """Return random values of -1 to 1 at points × points places, smooth between them (value noise), as a square."""
    grid = draw.random((points, points), dtype=np.float32) * 2 - 1
    before, part = _between(length, points)
    part = part * part * (3 - 2 * part)
    grid = grid[before] + part[:, None] * (grid[before + 1] - grid[before])
    return grid[:, before] + part * (grid[:, before + 1] - grid[:, before])


def _between(length: int, points: int) -> tuple[npt.NDArray[np.intp], Float32Array]:
    """Return for each of `length` places the grid point before it, and its part of the way to the next one."""
    place = np.arange(length, dtype=np.float32) * np.float32((points - 1) / length)
    before = place.astype(np.intp)
    return before, place - before.astype(np.float32)


def _texture(draw: np.random.Generator, name: str, height: int, width: int, bend: Float32Array) -> Float32Array:
    """Return the share of the front colour of each pixel, from 0 to 1, with edges one pixel wide."""
    cosine, sine = _directions(draw, 1)
    single = name in ("stripes", "checks")
    widest = (0.06 + 0.07 * draw.random()) if single else (0.13 + 0.09 * draw.random())
    period = np.float32(widest * min(height, width))
    y = np.arange(height, dtype=np.float32)[:, None] / period
    x = np.arange(width, dtype=np.float32)[None, :] / period
    phase = draw.random(2, dtype=np.float32) * _CELLS
    wobble = np.float32(0.5 * draw.random()) * bend
    across = cosine * x + sine * y + wobble + phase[0]
    along = cosine * y - sine * x + wobble + phase[1]
    if name == "stripes":
        return _soft((np.float32(0.15 + 0.2 * draw.random()) - _from_middle(across)) * period)
    if name == "checks":
        first, second = (_soft((_from_middle(value / 2) - np.float32(0.25)) * 2 * period) for value in (across, along))
        return first + second - 2 * first * second
    return _shapes(draw, name, across, along, period)


def _shapes(
    draw: np.random.Generator, name: str, across: Float32Array, along: Float32Array, period: np.float32
) -> Float32Array:
    """Return coverage by a disc, ring or triangle in each cell of a grid, slightly shifted and of random size."""
    column, row = np.floor(across), np.floor(along)
    cell = (column.astype(np.intp) & _CELLS - 1) * _CELLS + (row.astype(np.intp) & _CELLS - 1)
    kinds = _CELLS * _CELLS
    aside, beside, growth = draw.random((3, kinds), dtype=np.float32) - np.float32(0.5)
    x = across - column - np.take(np.float32(0.5) + np.float32(0.2) * aside, cell)
    y = along - row - np.take(np.float32(0.5) + np.float32(0.2) * beside, cell)
    size = np.take(1 + np.float32(0.3) * growth, cell)
    if name == "triangles":
        cosine, sine = np.take(_directions(draw, kinds), cell, axis=1)
        x, y = cosine * x + sine * y, cosine * y - sine * x
        # Farthest of the three sides: y upwards, and the two that lean against it.
        side = np.maximum(np.float32(0.8660254) * abs(x) - y / 2, y)
        return _soft((np.float32(0.21) * size - side) * period)
    distance = np.sqrt(x * x + y * y)
    if name == "rings":
        return _soft((np.float32(0.08) - abs(distance - np.float32(0.3) * size)) * period)
    return _soft((np.float32(0.32) * size - distance) * period)


def _from_middle(value: Float32Array) -> Float32Array:
    """Return the distance of the fraction from one half."""
    distance: Float32Array = abs(value - np.floor(value) - np.float32(0.5))
    return distance


def _soft(distance: Float32Array) -> Float32Array:
    """Return the coverage of a pixel whose centre is so many pixels within the edge."""
    coverage: Float32Array = np.minimum(np.maximum(distance + np.float32(0.5), 0), 1)
    return coverage


def _generator(seed: int, number: int, stream: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream]))
