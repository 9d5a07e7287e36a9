"""Any bytes become the pixels that a plain use of Pillow gives, or a reason; none make the decoder raise."""

from __future__ import annotations

import functools
import io
import itertools
import os
import struct
import sys
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms, ImageFile, ImageOps

from tasks.images.decode import REASONS, Decoded, Decoder, Rejection, _rgb

BACKGROUND = (200, 100, 50)
MAX_PIXELS = 1_000_000
HEIGHT, WIDTH = 37, 53


def scene(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Gradients with noise: no two corners alike, and no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    red, green, blue = 255 * x / width, 255 * y / height, 255 * (x * y) / (width * height)
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.stack([red, green, blue], axis=-1) + noise).clip(0, 255).astype(np.uint8))


def in_mode(mode: str, image: Image.Image | None = None) -> Image.Image:
    """The scene in any mode of Pillow's; alpha, and the black of CMYK, fall from left to right."""
    image = image or scene()
    alpha = Image.linear_gradient("L").rotate(90).resize(image.size)
    match mode:
        case "LA" | "PA" | "La":
            image = Image.merge("LA", (image.convert("L"), alpha))
        case "RGBA" | "RGBa":
            image.putalpha(alpha)
        case "CMYK":
            image = Image.merge("CMYK", (*image.split(), alpha))  # Pillow's own conversion has no black
        case "I;16" | "I;16B" | "I":
            deep = np.asarray(image.convert("L")).astype(np.uint16) * 257 + np.uint16(100)
            return Image.fromarray(deep.astype({"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]))
        case "LAB":
            srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
            image = ImageCms.applyTransform(image, transform) or image
    return image if image.mode == mode else image.convert(mode)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def reference(data: bytes, background: tuple[int, int, int] = BACKGROUND) -> npt.NDArray[np.uint8]:
    """RGB pixels by Pillow's own means, with the compositing and the depths written out in numpy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image).astype(np.float64)
            depth = 1 if image.mode == "F" else 257
            gray = np.rint(np.clip(values, 0, 255 * depth) / depth).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB"))
        rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    share = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * share + np.array(background) * (1 - share)).astype(np.uint8)


def decoder(max_pixels: int = MAX_PIXELS) -> Decoder:
    return Decoder(max_pixels, BACKGROUND)


def pixels_of(data: bytes | memoryview, by: Decoder | None = None) -> npt.NDArray[np.uint8]:
    """A copy of the RGB pixels of what must be decodable."""
    found = (by or decoder()).decode(data)
    assert isinstance(found, Decoded), found
    whole = found.pixels
    assert (whole.dtype, whole.ndim, whole.shape[2]) == (np.uint8, 3, 4)
    assert whole.flags.c_contiguous
    assert whole.flags.writeable
    return whole[..., :3].copy()


def rejection_of(data: bytes | memoryview, by: Decoder | None = None) -> Rejection:
    found = (by or decoder()).decode(data)
    assert isinstance(found, Rejection), "it was decoded"
    assert found.detail.endswith(".")
    return found


def png(width: int, height: int, depth: int, colours: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, also one that Pillow can't write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


JPEGS: dict[str, tuple[str, dict[str, object]]] = {
    "4:2:0": ("RGB", {"subsampling": "4:2:0"}),
    "4:2:2": ("RGB", {"subsampling": "4:2:2"}),
    "4:4:4": ("RGB", {"subsampling": "4:4:4", "quality": 95}),
    "4:1:1": ("RGB", {"subsampling": "4:1:1"}),
    "stored as RGB": ("RGB", {"keep_rgb": True}),
    "gray": ("L", {}),
    "gray progressive": ("L", {"progressive": True}),
    "progressive 4:2:0": ("RGB", {"progressive": True, "subsampling": "4:2:0"}),
    "progressive 4:4:4": ("RGB", {"progressive": True, "subsampling": "4:4:4"}),
    "optimized, coarse": ("RGB", {"optimize": True, "quality": 10}),
    "restart markers": ("RGB", {"restart_marker_blocks": 2}),
    "CMYK": ("CMYK", {}),
}


@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (64, 128), (1, 1), (1, 99), (17, 1)])
@pytest.mark.parametrize(("mode", "options"), JPEGS.values(), ids=JPEGS)
def test_jpegs_have_pillows_pixels_to_the_bit(mode: str, options: dict[str, object], height: int, width: int) -> None:
    data = encoded(in_mode(mode, scene(height, width)), "JPEG", **options)
    assert np.array_equal(pixels_of(data), reference(data))


@pytest.mark.parametrize("kind", ["4:2:0", "restart markers", "gray", "progressive 4:2:0", "gray progressive", "CMYK"])
def test_a_cut_jpeg_is_rejected(kind: str) -> None:
    """Wherever the cut is, even if it takes the end mark alone."""
    mode, options = JPEGS[kind]
    data = encoded(in_mode(mode), "JPEG", **options)
    one = decoder()
    for length in range(len(data)):
        reason = {0: "empty_file", 1: "not_an_image", 2: "not_an_image"}.get(length, "truncated")
        assert rejection_of(data[:length], one).reason == reason


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_damage_within_a_jpeg_is_seen(mode: str) -> None:
    """Pillow may pass these, with gray or garbled areas."""
    data = encoded(in_mode(mode, scene(256, 256)), "JPEG")
    middle = len(data) // 2
    assert rejection_of(data[:middle] + data[middle + 2000 :]).reason == "corrupt"
    assert rejection_of(data[:middle] + bytes(len(data) - middle)).reason == "truncated"


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "stray bytes before the end mark": lambda data: data[:-2] + b"\x00\x01\x02" * 20 + data[-2:],
    "stray bytes between segments": lambda data: data[:20] + b"\x07" * 5 + data[20:],
    "bytes after the end": lambda data: data + b"appended by a camera",
    "zeros after the end": lambda data: data + bytes(5000),
    "an unknown version of JFIF": lambda data: data.replace(b"JFIF\0\x01", b"JFIF\0\x09"),
    "a broken colour profile": lambda data: data[:20] + b"\xff\xe2\x00\x10ICC_PROFILE\0\x09\x01" + data[20:],
    "fill bytes before a marker": lambda data: data[:20] + b"\xff" * 3 + data[20:],
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_a_jpeg_that_is_only_odd_is_decoded(change: Callable[[bytes], bytes]) -> None:
    data = encoded(scene(), "JPEG")
    assert change(data) != data
    assert np.array_equal(pixels_of(change(data)), reference(data))


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """300 scans of 8,000 × 8,000 pixels fit in 400 kB and take half a minute."""
    data = encoded(scene(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    found = rejection_of(data[:-2] + last * 300 + data[-2:])
    assert found.reason == "unsupported"
    assert "scans" in found.detail


FORMATS = [
    *("PNG", "TIFF", "WEBP", "GIF", "BMP", "DIB", "PPM", "JPEG", "JPEG2000", "ICO", "TGA", "AVIF"),
    *("PCX", "SGI", "DDS", "QOI", "MSP", "SPIDER", "XBM", "BLP", "MPO"),
]
MODES = ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16B", "I", "F"]
LOSSLESS = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}, "ICO": {"sizes": [(WIDTH, HEIGHT)]}}


def savable() -> dict[str, bytes]:
    """All pairs of format and mode that Pillow can write."""
    found = {}
    for file_format, mode in itertools.product(FORMATS, MODES):
        try:
            data = encoded(in_mode(mode), file_format, **LOSSLESS.get(file_format, {}))
            Image.open(io.BytesIO(data)).close()
        except (OSError, ValueError, KeyError):
            continue  # the format has no such mode, or writes what it can't read
        found[f"{file_format} {mode}"] = data
    return found


SAVABLE = savable()


def test_most_formats_and_all_modes_are_tried() -> None:
    assert {name.split()[0] for name in SAVABLE} >= set(FORMATS) - {"AVIF"}  # its codec may be left out of a build
    assert {name.split()[1] for name in SAVABLE} == set(MODES)


@pytest.mark.parametrize("data", SAVABLE.values(), ids=SAVABLE)
def test_any_mode_in_any_format_is_what_pillow_gives(data: bytes) -> None:
    assert np.array_equal(pixels_of(data), reference(data))


@pytest.mark.parametrize("name", ["PNG RGB", "TIFF RGB", "WEBP RGB", "BMP RGB", "PPM RGB", "TGA RGB", "QOI RGB"])
def test_lossless_formats_keep_every_pixel(name: str) -> None:
    assert np.array_equal(pixels_of(SAVABLE[name]), np.asarray(scene()))


def test_the_format_has_pillows_name() -> None:
    for name in ("JPEG RGB", "JPEG CMYK", "PNG P", "WEBP RGBA", "JPEG2000 L"):
        found = decoder().decode(SAVABLE[name])
        assert isinstance(found, Decoded)
        assert found.format == name.split()[0]


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "I;16", "F", "1", "CMYK", "LAB"])
def test_large_pictures_are_converted_in_bands_without_seams(mode: str) -> None:
    image = in_mode(mode, scene(1100, 1000))
    data = encoded(image, "PNG" if mode in ("P", "RGBA", "LA", "I;16", "1") else "TIFF")
    assert np.array_equal(pixels_of(data, decoder(2_000_000)), reference(data))


def test_all_16_bit_values_are_rounded() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    want = np.rint(np.arange(65536) / 257).reshape(256, 256)
    for file_format in ("PNG", "TIFF"):
        found = pixels_of(encoded(Image.fromarray(values), file_format))
        assert np.array_equal(found, np.repeat(want[..., None], 3, axis=2))


FLOATS = {
    "shares": ([0.0, 0.5, 1.0, 0.25], [0, 128, 255, 64]),
    "shares, overshot": ([-0.1, 0.5, 1.2, 2.0], [0, 128, 255, 255]),
    "up to 255": ([0.0, 0.6, 128.4, 255.0], [0, 1, 128, 255]),
    "beyond": ([-5.0, 2.5, 300.0, 65535.0], [0, 2, 255, 255]),
    "not finite": ([np.nan, np.inf, -np.inf, 0.5], [0, 255, 0, 128]),
    "not finite, up to 255": ([np.nan, np.inf, -np.inf, 50.0], [0, 255, 0, 50]),
    "nothing finite": ([np.nan, np.nan, np.inf, -np.inf], [0, 0, 255, 0]),
    "negative": ([-1.0, -2.0, -3.0, -4.0], [0, 0, 0, 0]),
    "huge": ([3e38, -3e38, 1.0, 0.0], [255, 0, 1, 0]),
}


@pytest.mark.parametrize(("values", "want"), FLOATS.values(), ids=FLOATS)
def test_floats_are_shares_or_up_to_255(values: list[float], want: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert pixels_of(encoded(image, "TIFF"))[0, :, 0].tolist() == want


def test_every_alpha_over_every_shade_is_rounded_exactly() -> None:
    shade, alpha = np.mgrid[0:256, 0:256].astype(np.uint8)
    data = encoded(Image.fromarray(np.stack([shade, shade, shade, alpha], axis=-1)), "PNG")
    assert np.array_equal(pixels_of(data), reference(data))


@pytest.mark.parametrize("mode", ["La", "RGBa", "LA", "RGBA", "PA"])
def test_modes_with_alpha_that_no_format_stores(mode: str) -> None:
    image = in_mode(mode)
    plain = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    want = reference(encoded(image.convert(plain).convert("RGBA"), "PNG"))
    assert np.array_equal(np.asarray(_rgb(image, BACKGROUND, None)), want)


TEAL = list(BACKGROUND)  # what shows through
CLEAR_COLOURS = {
    "gray, 1 bit": (png(2, 1, 1, 0, b"\0\x80", (b"tRNS", b"\0\1")), [TEAL, [0, 0, 0]]),
    "gray, 2 bits": (png(2, 1, 2, 0, b"\0\x60", (b"tRNS", b"\0\1")), [TEAL, [170] * 3]),
    "gray, 4 bits": (png(2, 1, 4, 0, b"\0\x56", (b"tRNS", b"\0\5")), [TEAL, [102] * 3]),
    "gray, 8 bits": (png(2, 1, 8, 0, b"\0\x56\x57", (b"tRNS", b"\0\x56")), [TEAL, [0x57] * 3]),
    "gray, 16 bits": (png(2, 1, 16, 0, b"\0\x12\x34\x12\x35", (b"tRNS", b"\x12\x34")), [TEAL, [18] * 3]),
    "colour, 8 bits": (png(2, 1, 8, 2, b"\0\1\2\3\1\2\4", (b"tRNS", b"\0\1\0\2\0\3")), [TEAL, [1, 2, 4]]),
    "colour, 16 bits": (
        png(2, 1, 16, 2, b"\0" + b"\x12\x34" * 3 + b"\x34\x34" * 3, (b"tRNS", b"\x12\x34" * 3)),
        [TEAL, [0x34] * 3],
    ),
    "palette": (png(2, 1, 8, 3, b"\0\1\0", (b"PLTE", bytes(range(6))), (b"tRNS", b"\xff\0")), [TEAL, [0, 1, 2]]),
    "palette, half": (png(1, 1, 8, 3, b"\0\0", (b"PLTE", b"\0\0\0"), (b"tRNS", b"\x80")), [[100, 50, 25]]),
}


@pytest.mark.parametrize(("data", "want"), CLEAR_COLOURS.values(), ids=CLEAR_COLOURS)
def test_one_clear_colour(data: bytes, want: list[list[int]]) -> None:
    assert pixels_of(data)[0].tolist() == want


TURNS: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
TURNABLE: dict[str, tuple[str, str, dict[str, object]]] = {
    "JPEG": ("JPEG", "RGB", {}),
    "gray JPEG": ("JPEG", "L", {}),
    "CMYK JPEG": ("JPEG", "CMYK", {}),
    "PNG": ("PNG", "RGBA", {}),
    "deep PNG": ("PNG", "I;16", {}),
    "TIFF": ("TIFF", "RGB", {}),
    "compressed TIFF": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "WEBP": ("WEBP", "RGB", {"lossless": True}),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(("file_format", "mode", "options"), TURNABLE.values(), ids=TURNABLE)
def test_pictures_are_upright(file_format: str, mode: str, options: dict[str, object], orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = encoded(in_mode(mode), file_format, **options)
    turned = encoded(in_mode(mode), file_format, exif=exif, **options)
    assert np.array_equal(pixels_of(turned), TURNS[orientation](reference(stored)))
    assert np.array_equal(pixels_of(turned), reference(turned))


def test_orientation_may_stand_in_xmp_alone() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(scene(), "JPEG", xmp=xmp)
    assert pixels_of(data).shape == (WIDTH, HEIGHT, 3)
    assert np.array_equal(pixels_of(data), reference(data))


def exif_block(body: bytes) -> bytes:
    return b"Exif\0\0" + body


BROKEN_EXIF = {
    "no header": b"\x12\x01nonsense\x01\x12",
    "no directory": b"II*\0\xff\xff\xff\x7f\x12\x01",
    "cut directory": b"II*\0\x08\0\0\0\x05\0\x12\x01\x03\0",
    "ninth way": b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
    "orientation is text": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0",
    "empty": b"",
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_a_broken_exif_block_turns_nothing(block: bytes, file_format: str) -> None:
    options = LOSSLESS.get(file_format, {})
    plain, data = (encoded(scene(), file_format, exif=exif, **options) for exif in (b"", exif_block(block)))
    assert np.array_equal(pixels_of(data), reference(plain))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_is_taken(file_format: str) -> None:
    first, second = scene(), Image.new("RGB", (WIDTH, HEIGHT), "navy")
    options = LOSSLESS.get(file_format, {})
    data = encoded(first, file_format, save_all=True, append_images=[second], **options)
    found = pixels_of(data)
    assert np.array_equal(found, reference(data))
    assert found.std() > 30  # the second is all of one colour


SMALL = {name: encoded(scene(16, 16), name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
UNSUPPORTED_BMP = SMALL["BMP"][:28] + b"\x1f\0" + SMALL["BMP"][30:]  # 31 bits a pixel
REJECTED: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "empty_file", "empty"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><body>404", "not_an_image", "HTML"),
    "HTML after a byte order mark": (b"\xef\xbb\xbf<HTML>", "not_an_image", "HTML"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "not_an_image", "XML"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "not_an_image", "SVG"),
    "SVG, bare": (b"<?xml version='1.0'?><svg>", "not_an_image", "SVG"),
    "JSON": (b'{"error": "not found"}', "not_an_image", "JSON"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not_an_image", "PDF"),
    "ZIP": (b"PK\x03\x04\x14\0\0\0\x08\0", "not_an_image", "ZIP"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "not_an_image", "gzip"),
    "text": ("Grüße, 漢字\n".encode(), "not_an_image", "text"),
    "text cut within a character": (("a" + "ü" * 600).encode(), "not_an_image", "text"),
    "text that begins like a BMP": (b"BMW makes cars, among other things.", "not_an_image", "text"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "not_an_image", "git lfs pull"),
    "video": (b"\x00\x00\x00\x18ftypmp42\0\0\0\0mp42isom", "not_an_image", "video"),
    "zeros": (bytes(4096), "not_an_image", "zero bytes"),
    "one byte": (b"\xff", "not_an_image", "no known"),
    "HEIC": (b"\x00\x00\x00\x18ftypheic\0\0\0\0mif1heic" + bytes(9), "unsupported", "HEIC"),
    "JPEG XL": (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(9), "unsupported", "JPEG XL"),
    "PostScript": (EPS, "unsupported", "Ghostscript"),
    "PostScript of no size": (b"%!PS\nshowpage\n", "unsupported", "PostScript"),
    "MPEG": (b"\x00\x00\x01\xb3\x16\x00\xf0\xc4" + bytes(30), "unsupported", "MPEG"),
    "BMP of 31 bits": (UNSUPPORTED_BMP, "unsupported", "pixel depth"),
    "12-bit JPEG": (SMALL["JPEG"].replace(b"\x08\0\x10\0\x10", b"\x0c\0\x10\0\x10"), "unsupported", "12-bit"),
    "JPEG without size": (SMALL["JPEG"].replace(b"\x08\0\x10\0\x10", b"\x08\0\0\0\x10"), "corrupt", "JPEG"),
    "PNG of garbage": (png(16, 16, 8, 2, b"")[:40] + b"\x55" * 99 + b"IEND", "corrupt", "PNG"),
    "WebP of garbage": (SMALL["WEBP"][:20] + b"\x55" * (len(SMALL["WEBP"]) - 20), "corrupt", "WEBP"),
    **{f"cut {name}": (data[: len(data) * 2 // 3], "truncated", name) for name, data in SMALL.items()},
    **{
        f"barely a {name}": (data[:12], "truncated", name)
        for name, data in SMALL.items()
        if name not in ("WEBP", "TIFF")
    },
}


@pytest.mark.parametrize(("data", "reason", "hint"), REJECTED.values(), ids=REJECTED)
def test_what_is_rejected_and_why(data: bytes, reason: str, hint: str) -> None:
    found = rejection_of(data)
    assert found.reason == reason
    assert hint in found.detail


def test_every_reason_is_tested() -> None:
    assert {reason for _, reason, _ in REJECTED.values()} | {"too_many_pixels"} == set(REASONS)


def iptc(inner: bytes) -> bytes:
    """A container that holds an image of any format."""
    fields = ((3, 60, b"\1\0"), (3, 20, b"\0\x0a"), (3, 30, b"\0\x0a"), (3, 120, b"\5"), (8, 10, inner))
    return b"".join(bytes([0x1C, *tag]) + struct.pack(">H", len(body)) + body for *tag, body in fields)


def test_no_program_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for PostScript nor for PostScript within another file, even if Pillow had found Ghostscript before."""
    marker = tmp_path / "was_run"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {marker}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for remembered in (None, "gs"):
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", remembered)
        for data in (EPS, iptc(EPS)):
            assert rejection_of(data).reason == "unsupported"
        assert EpsImagePlugin.gs_binary == remembered
    assert not marker.exists()
    with pytest.raises(OSError, match=r"cannot identify|truncated|empty|unrecognized"):  # the trap works
        Image.open(io.BytesIO(EPS)).load()
    assert marker.exists()


WEBP_CANVAS = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16382).to_bytes(3, "little") * 2 + bytes(4)
BOMBS = {
    "PNG": (png(100_000, 100_000, 8, 2, b""), "100,000 × 100,000"),
    "GIF": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + SMALL["GIF"][10:], "65,535 × 65,535"),
    "JPEG": (SMALL["JPEG"].replace(b"\x08\0\x10\0\x10", b"\x08\xff\xdc\xff\xdc"), "65,500 × 65,500"),
    "BMP": (SMALL["BMP"][:18] + struct.pack("<ii", 70_000, 70_000) + SMALL["BMP"][26:], "70,000 × 70,000"),
    "WEBP": (WEBP_CANVAS, "16,383 × 16,383"),
    "PNG in an ICO": (
        b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", 999, 22) + png(50_000, 40_000, 8, 2, b""),
        "50,000 × 40,000",
    ),
    "PNG in an IPTC file": (iptc(png(50_000, 40_000, 8, 2, b"")), "50,000 × 40,000"),
}


@pytest.mark.parametrize(("data", "size"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_rejected_by_their_header(data: bytes, size: str) -> None:
    one = Decoder(89_478_485, BACKGROUND)
    one.decode(SMALL["PNG"])
    tracemalloc.start()
    try:
        found = rejection_of(data, one)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.reason == "too_many_pixels"
    assert size in found.detail
    assert "--max-pixels" in found.detail
    assert peak < 1_000_000


@pytest.mark.parametrize("name", [name for name in SAVABLE if name.split()[1] in ("RGB", "L", "1", "P")])
def test_the_limit_is_exact(name: str) -> None:
    assert isinstance(decoder(WIDTH * HEIGHT).decode(SAVABLE[name]), Decoded)
    assert rejection_of(SAVABLE[name], decoder(WIDTH * HEIGHT - 1)).reason == "too_many_pixels"


def test_the_limit_holds_within_containers() -> None:
    """The container says 10 × 10 pixels."""
    inner = encoded(Image.new("L", (40, 30)), "PNG")
    assert rejection_of(iptc(inner), decoder(1199)).reason == "too_many_pixels"


def test_the_limit_may_be_above_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert pixels_of(SMALL["PNG"]).shape == (16, 16, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_decoding_twice_gives_the_same_and_nothing_leaks() -> None:
    """A buffer that held a larger picture shows nothing of it."""
    one = decoder()
    for name, data in SAVABLE.items():
        first = pixels_of(data, one)
        pixels_of(encoded(Image.effect_noise((300, 300), 90), "JPEG"), one)
        assert np.array_equal(pixels_of(data, one), first), name


def test_the_buffer_is_kept_unless_it_is_huge() -> None:
    one = Decoder(30_000_000, BACKGROUND)

    def decoded(side: int) -> npt.NDArray[np.uint8]:
        found = one.decode(blank(side))
        assert isinstance(found, Decoded)
        return found.pixels

    @functools.cache
    def blank(side: int) -> bytes:
        return encoded(Image.new("L", (side, side)), "JPEG")

    small = decoded(100)
    assert np.shares_memory(small, decoded(100))
    huge = decoded(4200)
    assert not np.shares_memory(huge, decoded(4200))
    assert np.shares_memory(small, decoded(100))


def test_pillows_settings_are_ours_for_the_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that loads truncated images elsewhere in the process doesn't make us accept them."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    data = encoded(scene(), "JPEG")
    assert rejection_of(SMALL["PNG"][:-80]).reason == "truncated"
    assert rejection_of(data[:-80]).reason == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert list(warnings.filters) == filters


def test_pillows_warnings_stay_inside() -> None:
    """Also where the process makes errors of warnings."""
    other_size = b"\0\0\1\0\1\0\x20\x20\0\0\1\0\x20\0" + struct.pack("<II", 999, 22) + SMALL["PNG"]
    with pytest.warns(UserWarning, match="not the expected size"):
        Image.open(io.BytesIO(other_size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels_of(other_size), reference(SMALL["PNG"]))


def test_details_are_the_same_in_every_run() -> None:
    """Pillow's message has the address of a stream."""
    assert rejection_of(iptc(b"no image")).detail == "The IPTC file is damaged: cannot identify image file."


def test_views_of_signed_and_writable_bytes() -> None:
    for data in (SMALL["JPEG"], SMALL["PNG"]):
        want = pixels_of(data)
        signed = memoryview(np.frombuffer(data, np.int8))  # as Arrow's buffers are
        for view in (memoryview(data), signed, memoryview(bytearray(data))):
            assert np.array_equal(pixels_of(view), want)
    assert rejection_of(memoryview(b"")).reason == "empty_file"


@pytest.fixture
def switch_often() -> Iterator[None]:
    """Let threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_with_a_decoder_each(switch_often: None) -> None:
    """Their limits differ, and Pillow has but one setting."""
    before = Image.MAX_IMAGE_PIXELS
    data = [SAVABLE["PNG RGBA"], SAVABLE["JPEG RGB"], SAVABLE["TIFF P"], SAVABLE["ICO RGBA"]]
    faults: list[str] = []

    def work(limit: int) -> None:
        one = decoder(limit)
        for _ in range(10):
            for item in data:
                found = one.decode(item)
                if isinstance(found, Decoded) != (limit >= WIDTH * HEIGHT):
                    faults.append(f"{limit}: {found}")
                elif isinstance(found, Decoded) and not np.array_equal(found.pixels[..., :3], reference(item)):
                    faults.append(f"{limit}: other pixels")

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (WIDTH * HEIGHT, WIDTH * HEIGHT - 1) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert before == Image.MAX_IMAGE_PIXELS


SEEDS = sorted({*SAVABLE.values(), *(data for data, *_ in REJECTED.values()), EPS, iptc(SMALL["PNG"])})
FUZZED = decoder(100_000)


def holds(data: bytes) -> None:
    """Whatever the bytes are, the answer is well-formed, and the same the next time."""
    found = FUZZED.decode(data)
    if isinstance(found, Rejection):
        assert found.reason in REASONS
        assert found.detail.endswith(".")
        assert " at 0x" not in found.detail
        assert FUZZED.decode(data) == found
        return
    height, width, channels = found.pixels.shape
    assert found.pixels.dtype == np.uint8
    assert channels == 4
    assert 0 < height * width <= 100_000
    before = found.pixels[..., :3].copy()
    again = FUZZED.decode(data)
    assert isinstance(again, Decoded)
    assert np.array_equal(again.pixels[..., :3], before)


@settings(max_examples=200)
@given(data=st.binary(max_size=300))
def test_random_bytes_never_raise(data: bytes) -> None:
    holds(data)


BEGINNINGS = sorted({data[:12] for data in SEEDS})


@settings(max_examples=300)
@given(beginning=st.sampled_from(BEGINNINGS), data=st.binary(max_size=300))
def test_random_bytes_after_a_known_beginning_never_raise(beginning: bytes, data: bytes) -> None:
    holds(beginning + data)


@settings(max_examples=600)
@given(seed=st.sampled_from(SEEDS), data=st.data())
def test_mutilated_files_never_raise(seed: bytes, data: st.DataObject) -> None:
    image = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers are where the damage tells.
        at = data.draw(st.integers(0, min(len(image), 200)) | st.integers(0, len(image)))
        match data.draw(st.sampled_from(["change", "cut", "remove", "insert"])):
            case "change":
                image[at : at + 1] = bytes([data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))])
            case "cut":
                del image[at:]
            case "remove":
                del image[at : at + data.draw(st.integers(1, 20))]
            case "insert":
                image[at:at] = data.draw(st.binary(max_size=20))
    holds(bytes(image))
