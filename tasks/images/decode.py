"""Encoded images to pixels: any bytes become 8-bit RGB, or a reason for their rejection. Pure, but for a buffer.

Decoding rules:

- Every format that Pillow opens; of several frames or pages the first. Ordinary JPEGs are decoded by simplejpeg
  (libjpeg-turbo), whose pixels equal Pillow's bit by bit; all else by Pillow.
- The orientation in the EXIF or XMP block is applied. An unreadable block turns nothing.
- Transparent pixels are composited over the background, whether by an alpha channel, a palette or one clear colour.
- Gray is replicated. Palette, CMYK, YCCK, YCbCr, LAB and HSV are converted as Pillow does. Colour profiles (ICC) are
  ignored: numbers stay as they are.
- Gray of more than 8 bits is scaled by the file's declared range: its black becomes 0 and its white 255, with the
  rest between in proportion, rounded. Of n bits that is 0 to 2^n - 1, or with a sign -2^(n-1) to 2^(n-1) - 1, however
  little of it is used; of a PGM it is 0 to its greatest value. If white is zero, it is inverted. One exception:
  32 bits with a sign of which no value is outside [0, 65535] are 16-bit gray, which Pillow writes in this way. A PNG's
  significant bits (sBIT) and a TIFF's statistics of integers declare no range.
- Floats are scaled by a TIFF's SMinSampleValue and SMaxSampleValue. Without them they are assumed to be in [0, 1] if
  the greatest is at most 2 (a filter may have overshot), else in [0, 255]. They are clipped there. NaN becomes 0.
- Parts of a file that don't affect pixels (text, gamma, colour profile, resolution, further frames) may be damaged,
  of any length, or missing.

Rejections, by name:

- `empty_file`: there are no bytes.
- `not_an_image`: the bytes are of no known image format; the detail describes their appearance.
- `unsupported`: an image whose format or variant can't be decoded here. No other program is ever used for decoding,
  so PostScript is among them.
- `too_many_pixels`: the header declares more than the limit; found before memory is allocated.
- `truncated`: the file ends before its picture does, or lacks some of it, even with a valid end: rows, strips,
  tiles, or scans. A JPEG without its end mark counts as such: the rest of an interrupted copy may be zeros, which
  decode as gray.
- `corrupt`: anything else that the decoder refuses, PNGs with a wrong checksum of a part that affects pixels, and
  JPEGs with detected damage of the compressed data, which Pillow alone would pass with gray or garbled areas. Stray
  bytes before a JPEG's markers are no damage.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import EpsImagePlugin, IcoImagePlugin, Image, ImageFile, Jpeg2KImagePlugin, PngImagePlugin, TiffImagePlugin

from tasks.images.formats import (
    ORIENTATION_TAG,
    DamageError,
    appearance,
    check_icon,
    check_png_rows,
    check_scans,
    check_tiff_parts,
    check_tiles,
    jpeg2000_depths,
    picture_end,
    png_picture,
    read_jpeg_header,
    read_scans,
    with_deeper_samples,
)
from tasks.io.tensors import UInt8Array

Reason = Literal["empty_file", "not_an_image", "unsupported", "too_many_pixels", "truncated", "corrupt"]
REASONS: tuple[Reason, ...] = get_args(Reason)


# A larger picture's memory is released with the picture, so that one giant doesn't burden a worker for life.
_KEPT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture: height × width × 4 bytes (red, green, blue, any), in C order; and the name of its format."""

    pixels: UInt8Array
    format: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """Reason why bytes give no picture: a stable name, and a sentence for a person."""

    reason: Reason
    detail: str


class Decoder:
    """Decoder of images, one after the other, into one reused buffer: use one for each thread.

    Where Pillow decodes, threads take turns, as its settings are process-wide: its limit of pixels and its tolerance
    of truncated files are set temporarily, and restored.

    Args:
        max_pixels: Images with more are rejected.
        background: Colour behind transparent pixels: red, green, blue.
    """

    def __init__(self, max_pixels: int, background: tuple[int, int, int]) -> None:
        self._max_pixels = max_pixels
        self._background = background
        self._kept: UInt8Array = np.empty(0, np.uint8)

    def decode(self, data: bytes | memoryview) -> Decoded | Rejection:
        """Decode an image, or return why not; no bytes make it raise.

        The pixels are valid until the next call, which may overwrite them.
        """
        if not isinstance(data, bytes):
            data = data.cast("B")  # Arrow's buffers are of signed bytes
        if not len(data):
            return Rejection("empty_file", "The file is empty.")
        try:
            found = self._decode_jpeg(data) if data[:3] == b"\xff\xd8\xff" else None
            return found or self._decode_by_pillow(data)
        except DamageError as fault:
            return Rejection(fault.reason, fault.detail)
        except MemoryError:
            return Rejection(
                "too_many_pixels", "Decoding it takes more memory than there is; lower --max-pixels to say so sooner."
            )

    def _decode_jpeg(self, data: bytes | memoryview) -> Decoded | Rejection | None:
        """Decode an ordinary JPEG quickly; return None for others."""
        header = read_jpeg_header(data)
        if header is None:
            return None
        height, width = header.height, header.width
        if height * width > self._max_pixels:
            return _too_many(width, height, self._max_pixels)
        if header.scans.count > _MAX_SCANS:
            return Rejection("unsupported", f"This JPEG has {header.scans.count:,} scans, more than any encoder makes.")
        check_scans(header.scans)
        orientation = _jpeg_orientation(data, self._max_pixels) if header.may_be_turned else 1
        room = self._room(height * width * 4)
        buffer = room if orientation == 1 else np.empty(height * width * 4, np.uint8)
        colours = "CMYK" if header.inks == 4 else "RGBX"
        try:
            pixels = simplejpeg.decode_jpeg(data, colours, buffer=buffer, strict=True)  # raises libjpeg's warnings
        except ValueError as fault:
            return _jpeg_damage(str(fault))
        if header.inks == 4:
            return None  # it is valid, but only Pillow knows Adobe's ink colours
        if orientation != 1:
            stored, pixels = pixels, _shaped(room, height, width, orientation)
            _as_stored(pixels, orientation)[:] = stored.view(np.uint32)[..., 0]
        return Decoded(pixels, "JPEG")

    def _decode_by_pillow(self, data: bytes | memoryview) -> Decoded | Rejection:
        with _pillow(self._max_pixels):
            image = _identify(data, self._max_pixels)
            if isinstance(image, Rejection):
                return image
            name = image.format or "nameless"
            try:
                width, height = image.size
                if width * height > self._max_pixels:
                    return _too_many(width, height, self._max_pixels)
                if name in ("JPEG", "MPO"):
                    check_scans(read_scans(memoryview(data).cast("B")))
                if isinstance(image, IcoImagePlugin.IcoImageFile):
                    entry = image.ico.entry[image.ico.getentryindex(image.size)]
                    check_icon(data, entry.offset, entry.size)
                if isinstance(image, TiffImagePlugin.TiffImageFile):
                    check_tiff_parts(image.tag_v2, data)
                    _mend_byte_order(image)
                if (end := picture_end(name, data)) is not None:
                    _read_until(image, io.BytesIO(data[:end]))
                _scale_clear_colour(image)
                image.load()
                return Decoded(self._painted(image, data), name)
            except (DamageError, MemoryError):
                raise
            except Exception as fault:  # noqa: BLE001  # plugins raise whatever a malformed file leads them to
                return _rejection(name, fault, data, self._max_pixels)

    def _painted(self, image: Image.Image, data: bytes | memoryview) -> UInt8Array:
        width, height = image.size
        orientation = _orientation(image)
        is_deep = image.mode == "F" or image.mode.startswith("I")
        scale = _declared_scale(image, data) if is_deep else None
        image = _in_whole_range(image, data)
        pixels = _shaped(self._room(width * height * 4), height, width, orientation)
        stored = _as_stored(pixels, orientation)
        for top, band in _bands(image):
            raw = _rgb(band, self._background, scale).tobytes("raw", "RGBX")
            stored[top : top + band.height] = np.frombuffer(raw, np.uint32).reshape(band.height, width)
        return pixels

    def _room(self, size: int) -> UInt8Array:
        if size > _KEPT_BYTES:
            return np.empty(size, np.uint8)
        if size > self._kept.size:
            self._kept = np.empty(min(_KEPT_BYTES, max(size, 2 * self._kept.size)), np.uint8)
        return self._kept


# libjpeg's warnings of lost picture data (jerror.h); its others are of stray bytes, odd versions, a missing end.
_DAMAGE = re.compile("Corrupt JPEG data: (premature end of data segment|bad (Huffman|arithmetic) code|found marker)")
_NO_END = "Premature end of JPEG file"

# Encoders make about ten. A small file with thousands would occupy a worker for minutes.
_MAX_SCANS = 100


def _jpeg_orientation(data: bytes | memoryview, max_pixels: int) -> int:
    with _pillow(max_pixels):
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                return _orientation(image)
        except Exception:  # noqa: BLE001  # the picture's decoder says what is wrong with the file
            return 1


def _jpeg_damage(said: str) -> Rejection | None:
    """Return the meaning of simplejpeg's message; None if Pillow must judge."""
    if _DAMAGE.match(said):
        return Rejection("corrupt", f"The JPEG file is damaged: {said}.")
    if said == _NO_END:
        return Rejection("truncated", "The JPEG file ends before its picture does, or lacks its end mark.")
    return None


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION_TAG, 1)
        return int(found) if found in range(2, 9) else 1
    except Exception:  # noqa: BLE001  # a broken EXIF block turns nothing
        return 1


def _shaped(room: UInt8Array, height: int, width: int, orientation: int) -> UInt8Array:
    """Return the buffer's view for a picture stored as height × width."""
    if orientation >= 5:
        height, width = width, height
    return room[: height * width * 4].reshape(height, width, 4)


def _as_stored(pixels: UInt8Array, orientation: int) -> npt.NDArray[np.uint32]:
    """Return the pixels of an upright picture as words, in the order of the stored picture."""
    words = pixels.view(np.uint32)[..., 0]
    if orientation in (5, 6, 7, 8):
        words = words.T
    if orientation in (3, 4, 6, 7):
        words = words[::-1]
    if orientation in (2, 3, 7, 8):
        words = words[:, ::-1]
    return words


_TURN = threading.Lock()

# Raw modes of big-endian samples, and those of the machine's order.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


class _Png(PngImagePlugin.PngImageFile):
    """Pillow's PNG, but all rows must be present, and parts that don't affect pixels aren't read."""

    _picture: bytes | None = None

    def _open(self) -> None:
        assert self.fp is not None
        self._picture = png_picture(self.fp.read())
        self.fp = io.BytesIO(self._picture)
        super()._open()

    def load(self) -> Any:
        picture, self._picture = self._picture, None
        if picture is not None and not self.tile:
            raise DamageError("truncated", "The PNG file has no picture in it.")
        found = super().load()
        # Missing rows are zero: only then, or with interlacing, is counting them worthwhile.
        if picture is not None and (self.info.get("interlace") or not any(self._last_row())):
            check_png_rows(picture)
        return found

    def _last_row(self) -> bytes:
        return self.crop((0, self.height - 1, self.width, self.height)).tobytes()


class _Jpeg2K(Jpeg2KImagePlugin.Jpeg2KImageFile):
    """Pillow's JPEG 2000, but all tiles must be present."""

    def load(self) -> Any:
        if self.tile and self.fp is not None:
            self.fp.seek(0)
            check_tiles(self.fp.read())
        return super().load()


_OURS: dict[str, type[ImageFile.ImageFile]] = {"PNG": _Png, "JPEG2000": _Jpeg2K}


@contextlib.contextmanager
def _pillow(max_pixels: int) -> Iterator[None]:
    """Set Pillow's settings as required, and restore them."""
    wanted = (
        (Image, "MAX_IMAGE_PIXELS", max_pixels / 2),  # Pillow refuses what exceeds twice this, also within containers
        (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
        (EpsImagePlugin, "gs_binary", False),  # PostScript is a program: it isn't run
        (PngImagePlugin, "PngImageFile", _Png),  # the format within icons
        (Jpeg2KImagePlugin, "Jpeg2KImageFile", _Jpeg2K),
    )
    with _TURN, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.init()
        before = [(module, name, getattr(module, name)) for module, name, _ in wanted]
        try:
            for module, name, value in wanted:
                setattr(module, name, value)
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


def _identify(data: bytes | memoryview, max_pixels: int) -> ImageFile.ImageFile | Rejection:
    """Open as Image.open, but with a fixed order of formats, and keep a format's error."""
    stream = io.BytesIO(data)
    prefix = bytes(data[:16])
    complaint = None
    for name in sorted(Image.OPEN, key=lambda name: (Image.OPEN[name][1] is None, name)):
        factory, accept = Image.OPEN[name]
        accepted = accept is None or _accepted(accept, prefix)
        if isinstance(accepted, str):
            complaint = Rejection("unsupported", f"{accepted}.")
        if accepted is not True:
            continue
        try:
            stream.seek(0)
            return _OURS.get(name, factory)(stream, "")
        except (DamageError, MemoryError):
            raise
        except Exception as fault:  # noqa: BLE001  # plugins raise whatever a malformed file leads them to
            if accept is not None and complaint is None:
                complaint = _rejection(name, fault, data, max_pixels)
    look = appearance(data)
    if look is not None:
        return Rejection("unsupported" if look.is_image else "not_an_image", f"It looks like {look.what}.")
    return complaint or Rejection("not_an_image", "The bytes are of no known image format.")


def _accepted(accept: Callable[[bytes], bool | str], prefix: bytes) -> bool | str:
    try:
        accepted = accept(prefix)
    except Exception:  # noqa: BLE001  # a file of a few bytes is too short for some
        return False
    return accepted if isinstance(accepted, str) else bool(accepted)


def _scale_clear_colour(image: ImageFile.ImageFile) -> None:
    """Scale a PNG's clear colour to 8 bits, as Pillow does only with the pixels (PNG specification, tRNS)."""
    clear = image.info.get("transparency")
    if image.format == "PNG" and image.tile and clear is not None:
        match image.tile[0].args:
            case "L;2":
                image.info["transparency"] = clear * 85
            case "L;4":
                image.info["transparency"] = clear * 17
            case "RGB;16B":
                image.info["transparency"] = tuple(value >> 8 for value in clear)


def _read_until(image: ImageFile.ImageFile, start: io.BytesIO) -> None:
    """Give an image's decoder only the start of its file; a TGA reads its footer after that."""
    if image.format == "QOI":
        image.fp = start  # its decoder reads by itself
    else:
        vars(image).update(load_read=start.read, load_seek=start.seek)


def _mend_byte_order(image: TiffImagePlugin.TiffImageFile) -> None:
    """Fix the byte order: libtiff unpacks samples in the machine's order, but Pillow assumes the file's."""
    for index, (decoder, extents, offset, args) in enumerate(image.tile):
        if decoder == "libtiff" and isinstance(args, tuple):
            raw = _NATIVE.get(args[0], args[0])
            image.tile[index] = ImageFile._Tile(decoder, extents, offset, (raw, *args[1:]))


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the picture in pieces of about a million pixels, so that conversions don't hold several copies of it."""
    rows = max(1, 2**20 // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _rgb(image: Image.Image, background: tuple[int, int, int], scale: _Scale | None) -> Image.Image:
    """Convert any mode to RGB, composited over the background; scale gray of more than 8 bits."""
    if scale is not None:
        values = np.asarray(image)
        clear = image.info.get("transparency")
        image = Image.fromarray(scale.eight_bits(values))
        if clear is None:
            return image.convert("RGB")
        mask = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
        mask = image.getchannel("A")
    else:
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image.convert("RGB"), mask=mask)
    return canvas


_EARLY = re.compile(
    "truncated|incomplete|end of (data|file)|not enough (image )?data|requires a buffer|too small|not large enough",
    re.I,
)
_BEYOND_US = re.compile("unsupported|not supported|unimplemented|unknown|cannot (handle|find)|ghostscript|^mpeg", re.I)

_ADDRESS = re.compile("<[^<>]* at 0x[0-9a-f]+>")  # it would differ from run to run


def _too_many(width: int, height: int, max_pixels: int) -> Rejection:
    return Rejection(
        "too_many_pixels",
        f"The image has {width:,} × {height:,} pixels, more than {max_pixels:,}; raise --max-pixels if it is no bomb.",
    )


def _rejection(name: str, fault: Exception, data: bytes | memoryview, max_pixels: int) -> Rejection:
    """Return the rejection for an error of Pillow's decoder of a format."""
    said = " ".join(_ADDRESS.sub("", str(fault)).split())[:200].rstrip(".") or type(fault).__name__
    if isinstance(fault, Image.DecompressionBombError):
        # Pillow's message only has the product of width and height.
        checked = [frame.f_locals.get("size") for frame, _ in traceback.walk_tb(fault.__traceback__)][-1]
        return _too_many(checked[0], checked[1], max_pixels) if checked else Rejection("too_many_pixels", f"{said}.")
    if _EARLY.search(said) or _ends_early(name, data):
        return Rejection("truncated", f"The {name} file ends before its picture does: {said}.")
    if _BEYOND_US.search(f"{name}: {said}"):
        return Rejection("unsupported", f"This variant of {name} can't be decoded here: {said}.")
    return Rejection("corrupt", f"The {name} file is damaged: {said}.")


def _ends_early(name: str, data: bytes | memoryview) -> bool:
    """Return True if a refused file lacks bytes, by its format's length fields."""
    head, tail = bytes(data[:16]), bytes(data[-16:])
    order: Literal["big", "little"] = "big" if head[:1] == b"M" else "little"
    lacks = {
        "BMP": int.from_bytes(head[2:6], "little") > len(data),
        "GIF": not tail.rstrip(b"\0").endswith(b";"),
        "JPEG": not tail.rstrip(b"\0").endswith(b"\xff\xd9"),
        "JPEG2000": not tail.rstrip(b"\0").endswith(b"\xff\xd9"),
        "PNG": b"IEND" not in bytes(data),
        "TIFF": max(8, int.from_bytes(head[4:8], order) + 2) > len(data),
        "WEBP": int.from_bytes(head[4:8], "little") + 8 > len(data),
    }
    return lacks.get(name, False)


_BITS, _PHOTOMETRIC, _FORMAT, _LEAST, _GREATEST = 258, 262, 339, 340, 341  # TIFF 6.0
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2


@dataclass(frozen=True, slots=True)
class _Scale:
    """The samples that are black and white; and their type, if Pillow assumes another."""

    black: float
    white: float
    dtype: str | None = None

    def eight_bits(self, values: npt.NDArray[np.generic]) -> UInt8Array:
        """Return gray values of any range in 8 bits, rounded and clipped to black and white; NaN becomes 0."""
        if self.dtype is not None:
            values = values.view(self.dtype)
        if values.dtype.kind == "u" and values.itemsize == 2 and values.size > 2**16:
            table = self.eight_bits(np.arange(2**16, dtype=np.uint16))
            return table[values.astype(np.uint16, copy=False)]  # quicker
        shares = (values.astype(np.float64) - self.black) * (255 / (self.white - self.black))
        np.nan_to_num(shares, copy=False, nan=0, posinf=255, neginf=0)
        gray: UInt8Array = np.rint(shares.clip(0, 255)).astype(np.uint8)
        return gray


def _declared_scale(image: Image.Image, data: bytes | memoryview) -> _Scale:
    """Return the scale of a loaded gray picture of more than 8 bits: of mode I, I;16 or F."""
    if image.mode == "F":
        return _float_scale(image)
    if image.mode == "I" and image.format == "PPM":
        return _Scale(0, 65535)  # Pillow has scaled them, whatever the greatest value was
    if image.format == "JPEG2000":
        bits = min(16, max(jpeg2000_depths(data)[:1], default=16))
        return _Scale(0, (2**bits - 1) << (16 - bits))  # Pillow has moved them to the upper end of 16 bits
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
        return _Scale(black, white, "u4" if bits == 32 and not is_signed else None)
    return _Scale(black, white, "i2" if is_signed else None)


def _is_of_16_bits(image: Image.Image) -> bool:
    """Return True if all values fit 16 bits: Pillow, for one, writes such pictures as signed 32-bit integers."""
    values = np.asarray(image)
    return bool(values.min() >= 0 and values.max() <= 65535)


def _float_scale(image: Image.Image) -> _Scale:
    """Return a TIFF's declared scale; else up to 1 if the greatest is at most 2 (a filter's overshoot), or to 255."""
    black, white = 0.0, 0.0
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        black, white = (float(_first(image.tag_v2.get(tag, 0))) for tag in (_LEAST, _GREATEST))
    if not (math.isfinite(white - black) and black < white):
        values = np.asarray(image)
        black, white = 0.0, 1.0 if values.max(initial=0, where=np.isfinite(values)) <= 2 else 255.0
    return _Scale(white, black) if _is_negative(image) else _Scale(black, white)


def _is_negative(image: Image.Image) -> bool:
    """Return True if the file declares white as zero."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _in_whole_range(image: Image.Image, data: bytes | memoryview) -> Image.Image:
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
