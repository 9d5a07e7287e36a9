"""Pictures that are cut, damaged, disguised, odd or enormous: decoded to the right pixels, or rejected with a reason.

What every format and mode becomes is in tests/images/test_decode.py; here is what goes wrong on the way.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tasks.images.augment import expected_size
from tasks.images.decode import Decoded, Decoder, Rejection
from tasks.images.formats import read_jpeg_header
from tasks.images.sources import list_images
from tasks.io import storage
from tests.images.test_decode import encoded, png, reference, scene
from tests.tables import Proven

FLOW = "image-augmentation"
LIMIT = 1_000_000


def decoded(data: bytes, limit: int = LIMIT) -> Decoded | Rejection:
    return Decoder(limit, (255, 255, 255)).decode(data)


def rejected(data: bytes, limit: int = LIMIT) -> Rejection:
    found = decoded(data, limit)
    assert isinstance(found, Rejection), "it was decoded"
    return found


def pixels(data: bytes, limit: int = LIMIT) -> np.ndarray:
    found = decoded(data, limit)
    assert isinstance(found, Decoded), found
    return found.pixels[..., :3]


CUTS = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "interlaced-size PNG": ("PNG", {"optimize": True}),
    "GIF": ("GIF", {}),
    "WebP": ("WEBP", {"lossless": True}),
    "lossy WebP": ("WEBP", {"quality": 80}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {}),
    "LZW TIFF": ("TIFF", {"compression": "tiff_lzw"}),
    "JPEG 2000": ("JPEG2000", {}),
}


@pytest.mark.parametrize(("form", "options"), CUTS.values(), ids=CUTS)
def test_a_cut_file_gives_no_picture_or_the_whole_one(form: str, options: dict[str, object], proven: Proven) -> None:
    """At every place: a part of a picture is never taken for a picture."""
    image = scene(24, 31)
    data = encoded(image, form, **options)
    whole = reference(data)
    reasons: dict[str, int] = {}
    one = Decoder(LIMIT, (255, 255, 255))
    for length in range(len(data)):
        found = one.decode(data[:length])
        if isinstance(found, Decoded):
            assert np.array_equal(found.pixels[..., :3], whole), f"{length} of {len(data)} bytes give other pixels"
            continue
        reasons[found.reason] = reasons.get(found.reason, 0) + 1
    assert set(reasons) <= {"empty_file", "not_an_image", "truncated", "corrupt", "unsupported"}
    assert max(reasons, key=lambda reason: reasons[reason]) == "truncated", reasons
    proven("file cut short at any place", FLOW, "rejected: truncated")


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if crc is None else crc)
    )


def test_a_png_with_a_wrong_checksum_is_damaged(proven: Proven) -> None:
    data = encoded(scene(), "PNG")
    at = data.index(b"IDAT")
    length = int.from_bytes(data[at - 4 : at], "big")
    crc = at + 4 + length
    for place, kind in ((crc, "IDAT"), (at + 4 + length // 2, "IDAT"), (data.index(b"IHDR") + 17, "IHDR")):
        bad = bytearray(data)
        bad[place] ^= 0x10
        found = rejected(bytes(bad))
        assert found.reason == "corrupt"
        assert re.fullmatch(f"The PNG file is damaged: .*checksum .*{kind}.*", found.detail)
    raw = png(64, 64, 8, 0, bytes(65 * 64))
    stored = raw.replace(
        zlib.compress(bytes(65 * 64)), zlib.compress(bytes(65 * 64), 0)
    )  # pixels lie there as they are
    at = stored.index(b"IDAT")
    flipped = bytearray(stored)
    flipped[at + 200] ^= 0x01
    assert rejected(bytes(flipped)).reason == "corrupt"
    proven("PNG whose checksum is wrong", FLOW, "rejected: corrupt")


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(form: str, proven: Proven) -> None:
    first, others = scene(), [Image.new("RGB", (53, 37), colour) for colour in ("red", "blue")]
    data = encoded(first, form, save_all=True, append_images=others, **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(pixels(data), reference(data))
    if form != "GIF":
        assert np.array_equal(pixels(data), np.asarray(first))
    proven("animation (GIF, APNG, WebP)", FLOW, "its first frame")


def test_an_animation_cut_in_its_first_frame_is_no_picture_of_it(proven: Proven) -> None:
    data = encoded(scene(), "PNG", save_all=True, append_images=[Image.new("RGB", (53, 37), "red")])
    assert rejected(data[: data.index(b"fcTL", data.index(b"IDAT")) - 30]).reason == "truncated"
    assert np.array_equal(pixels(data[: data.index(b"fdAT")]), np.asarray(scene()))
    proven("animation cut in its first frame", FLOW, "rejected: truncated")


def adobe(image: Image.Image, transform: int) -> bytes:
    """A CMYK JPEG as Adobe's programs write it: inks inverted, marked by an APP14 segment."""
    data = encoded(image, "JPEG", quality=95)
    at = data.find(b"\xff\xee")
    if at < 0:
        segment = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
        return data[:2] + segment + data[2:]
    return data[: at + 15] + bytes([transform]) + data[at + 16 :]


@pytest.mark.parametrize("transform", [0, 2])
def test_adobes_inverted_inks_are_pillows_pixels(transform: int, proven: Proven) -> None:
    white = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    data = adobe(white, transform)
    assert b"Adobe" in data
    assert np.array_equal(pixels(data), reference(data))
    if transform == 0:
        assert pixels(data).mean() > 250, "white paper came out as ink"
    proven("CMYK JPEG with Adobe's inverted inks", FLOW, "Pillow's pixels, not a negative")


BLOCKS: dict[str, Callable[[], bytes]] = {
    "EXIF of 65,533 bytes": lambda: encoded(scene(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(65_519)),
    "EXIF of 20 MB in a PNG": lambda: encoded(scene(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(20_000_000)),
    "EXIF whose directory is a loop": lambda: encoded(
        scene(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0" + bytes(8)
    ),
    "an ICC profile of the screen": lambda: encoded(
        scene(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    "an ICC profile of noise": lambda: encoded(scene(), "JPEG", icc_profile=bytes(range(256)) * 2000),
    "text chunks of 1 MB": lambda: png(
        4, 4, 8, 0, bytes(20), *[(b"tEXt", b"Comment\0" + b"x" * 1_000_000) for _ in range(3)]
    ),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_what_stands_beside_the_picture_changes_no_pixel(make: Callable[[], bytes], proven: Proven) -> None:
    data = make()
    assert np.array_equal(pixels(data), reference(data))
    proven("huge, odd or looping EXIF, ICC and text", FLOW, "the same pixels")


def test_a_compressed_text_bomb_takes_no_memory(proven: Proven) -> None:
    """200 MB of zeros in 200 KB of a zTXt chunk, before a picture of 4 pixels."""
    bomb = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    data = png(2, 2, 8, 0, bytes(6), (b"zTXt", bomb))
    assert len(data) < 300_000
    grown = peak_growth(data, LIMIT)
    assert grown < 64 << 20, f"{grown >> 20} MiB"
    proven("compressed text bomb in a PNG", FLOW, "bounded memory")


SIZES = {
    "1 × 1": (1, 1),
    "65,000 × 1": (65_000, 1),
    "1 × 65,000": (1, 65_000),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), SIZES.values(), ids=SIZES)
def test_the_narrowest_pictures_are_decoded_and_augmented(width: int, height: int, form: str, proven: Proven) -> None:
    from tasks.images.config import Augmentation, ImageAugmentationConfig
    from tasks.images.draws import image_keys
    from tasks.images.duplicates import perceptual_hash
    from tasks.images.engines import make_engine

    ramp = np.linspace(0, 255, width * height).astype(np.uint8).reshape(height, width)
    data = encoded(Image.fromarray(np.stack([ramp] * 3, -1)), form)
    found = decoded(data)
    assert isinstance(found, Decoded)
    assert found.pixels.shape[:2] == (height, width)
    perceptual_hash(found.pixels)
    engine = make_engine(ImageAugmentationConfig(augmentation=Augmentation(size=16, variants=2)))
    made, *_ = engine.variants(iter([found.pixels]), image_keys(["narrow"], 0), [expected_size(data)])
    assert made.shape == (2, 3, 16, 16)
    proven(f"picture of {'1 × 1' if width == height else '65,000 × 1'} pixels", FLOW, "augmented")


ZERO = {
    "JPEG": encoded(scene(16, 16), "JPEG").replace(b"\x08\0\x10\0\x10", b"\x08\0\x00\0\x00"),
    "PNG": png(0, 5, 8, 2, b""),
    "PNG, no rows": png(5, 0, 8, 2, b""),
    "GIF": b"GIF89a" + bytes(7) + b"\x2c" + bytes(9) + b"\x02\x02\x44\x01\0;",
    "BMP": encoded(scene(16, 16), "BMP")[:18] + bytes(8) + encoded(scene(16, 16), "BMP")[26:],
    "PPM": b"P6 0 0 255\n",
    "TIFF": encoded(scene(16, 16), "TIFF").replace(b"\x00\x01\x04\x00\x01\x00\x00\x00\x10", b"\0\1\4\0\1\0\0\0\0"),
}


@pytest.mark.parametrize("data", ZERO.values(), ids=ZERO)
def test_no_pixels_are_no_picture(data: bytes, proven: Proven) -> None:
    assert rejected(data).reason in ("corrupt", "truncated", "not_an_image", "unsupported")
    proven("header that says 0 × 0 pixels", FLOW, "rejected: corrupt")


_PEAK = """
import re, sys
from tasks.images.decode import Decoder

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

data, limit, small = open(sys.argv[1], "rb").read(), int(sys.argv[2]), open(sys.argv[3], "rb").read()
decoder = Decoder(limit, (0, 0, 0))
decoder.decode(small)
before = peak()
found = decoder.decode(data)
print(peak() - before, type(found).__name__, getattr(found, "reason", None) or found.pixels.shape)
"""


def peak_growth(data: bytes, limit: int, expected: str | None = None) -> int:
    """Bytes by which a process's peak memory grows while it decodes; a process of its own, as peaks never fall."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        big, small = Path(place, "big"), Path(place, "small")
        big.write_bytes(data)
        small.write_bytes(encoded(scene(), "PNG"))
        made = subprocess.run(
            [sys.executable, "-c", _PEAK, str(big), str(limit), str(small)],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
    grown, *found = made.stdout.split(maxsplit=2)
    if expected is not None:
        assert expected in " ".join(found)
    return int(grown)


def fifty_megapixels(form: str) -> bytes:
    ramp = np.add.outer(np.arange(6250, dtype=np.uint32), np.arange(8000, dtype=np.uint32)).astype(np.uint8)
    image = Image.fromarray(ramp).convert("RGB")
    return encoded(image, form, **({"compress_level": 1} if form == "PNG" else {"quality": 50}))


@pytest.mark.parametrize(("form", "copies"), [("JPEG", 1.5), ("PNG", 3)])
def test_fifty_megapixels_are_decoded_in_the_memory_of_their_pixels(form: str, copies: float, proven: Proven) -> None:
    """4 bytes a pixel for what is given back; Pillow holds its own picture beside it."""
    data = fifty_megapixels(form)
    pixels_bytes = 8000 * 6250 * 4
    grown = peak_growth(data, 50_000_000, "Decoded (6250, 8000, 4)")
    assert pixels_bytes * 0.9 < grown < copies * pixels_bytes, f"{grown >> 20} MiB"
    refused = peak_growth(data, 49_999_999, "too_many_pixels")
    assert refused < 8 << 20, f"{refused >> 20} MiB"
    proven("50 megapixels within --max-pixels", FLOW, "decoded in 4 bytes a pixel (PNG: 12 at most)")
    proven("50 megapixels above --max-pixels", FLOW, "rejected: too_many_pixels, by its header")


def gif_bomb() -> bytes:
    """A picture of 16 pixels whose second frame is 65,535 × 65,535; and whose codes unpack to as much."""
    data = encoded(scene(4, 4), "GIF")
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x08\x04\x00\x01\x00\x01\x00"
    return data[:-1] + frame + b";"


def png_bomb() -> bytes:
    """10,000 × 10,000 pixels of one colour in 100 KB: real, and above the limit."""
    return png(10_000, 10_000, 8, 0, bytes(10_001 * 10_000))


def test_bombs_of_each_kind_take_no_memory(proven: Proven) -> None:
    assert len(png_bomb()) < 200_000
    assert peak_growth(png_bomb(), 89_478_485, "too_many_pixels") < 8 << 20
    assert peak_growth(gif_bomb(), LIMIT, "Decoded (4, 4, 4)") < 8 << 20  # the first frame, and never the second
    short = png(100, 100, 8, 0, bytes(200_000_000))  # more rows than the header says
    assert peak_growth(short, LIMIT) < 32 << 20
    proven("decompression bomb (PNG, GIF)", FLOW, "rejected, or its first frame; bounded memory")


DISGUISED = {
    "a PNG named .jpg": ("a.jpg", encoded(scene(), "PNG"), None),
    "a JPEG named .png": ("a.png", encoded(scene(), "JPEG"), None),
    "a picture named .docx": ("a.docx", encoded(scene(), "PNG"), None),
    "an SVG named .png": ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "SVG"),
    "an SVG": ("a.svg", b"<?xml version='1.0'?>\n<svg>", "SVG"),
    "an HTML page named .jpg": ("a.jpg", b"<html><body>404 Not Found</body></html>", "HTML"),
    "a pickle named .png": ("a.png", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.", "no known"),
    "a program named .png": ("a.png", b"\x7fELF\x02\x01\x01" + bytes(200), "no known"),
}


@pytest.mark.parametrize(("name", "data", "said"), DISGUISED.values(), ids=DISGUISED)
def test_files_go_by_their_contents(tmp_path: Path, name: str, data: bytes, said: str | None, proven: Proven) -> None:
    (tmp_path / name).write_bytes(data)
    listing = list_images(str(tmp_path))
    assert listing.table["path"].to_pylist() == [name]
    found = decoded(storage.read_bytes(listing.table["uri"].to_pylist()[0]))
    if said is None:
        assert isinstance(found, Decoded)
        proven("picture with another format's suffix", FLOW, "decoded by its contents")
        return
    assert isinstance(found, Rejection)
    assert found.reason == "not_an_image"
    assert said in found.detail
    proven("text, drawing or program with a picture's suffix", FLOW, "rejected: not_an_image")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff\xe0\x00\x02" * 10_000,  # segments without end
        b"\xff\xd8\xff\xe1\xff\xff",  # a segment longer than the file
        b"\xff\xd8\xff\xe1\x00\x00" * 2,  # a segment shorter than its own length
        b"\xff\xd8\xff\xc0\x00\x0b\x08\xff\xff\xff\xff\x03",  # a frame, and nothing after it
        b"\xff\xd8\xff\xc0\x00\x02\xff\xda\x00\x02",  # an empty frame
    ],
)
def test_odd_jpeg_headers_are_left_to_the_decoder(data: bytes) -> None:
    assert read_jpeg_header(data) is None
    assert rejected(data).reason in ("truncated", "corrupt", "not_an_image", "unsupported")
