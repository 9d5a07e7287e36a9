"""A picture that lacks something is none, however well its file is closed; what is beside the pixels doesn't matter."""

from __future__ import annotations

import io
import itertools
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tasks.images.formats import read_scans
from tests.images.test_decode import (
    HEIGHT,
    WIDTH,
    decoder,
    encoded,
    in_mode,
    pixels_of,
    png,
    reference,
    rejection_of,
    scene,
)
from tests.images.test_decode_depth import Tags, tiff

ROW = 4 * 3  # bytes of 4 pixels


def rows(count: int, shade: int = 90) -> bytes:
    return (b"\0" + bytes([shade]) * ROW) * count


def interlaced(data: bytes) -> bytes:
    header = data[12:28] + b"\1"
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def in_icon(data: bytes) -> bytes:
    return b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", len(data), 22) + data


def in_apple_icon(data: bytes) -> bytes:
    """Of 128 × 128 pixels."""
    return b"icns" + struct.pack(">I", 16 + len(data)) + b"ic07" + struct.pack(">I", 8 + len(data)) + data


WITHOUT_ROWS = {
    "one row of 8": png(4, 8, 8, 2, rows(7)),
    "all rows": png(4, 8, 8, 2, b""),
    "half a row": png(4, 8, 8, 2, rows(8)[:-5]),
    "16 bits": png(4, 8, 16, 0, (b"\0" + bytes([9]) * 8) * 7),
    "1 bit": png(4, 8, 1, 0, b"\0\x70" * 7),
    "palette": png(4, 8, 8, 3, (b"\0" + bytes([1]) * 4) * 7, (b"PLTE", bytes(range(6)))),
    "alpha": png(4, 8, 8, 6, (b"\0" + bytes([1]) * 16) * 7),
    "the last pass": interlaced(png(1, 2, 8, 0, b"\0\5")),
    "the last row of the last pass": interlaced(png(4, 4, 8, 0, b"\0\5" * 2 + b"\0\5\5" * 3 + b"\0\5\5\5\5")),
    "in an icon": in_icon(png(16, 16, 8, 6, (b"\0" + bytes([1]) * 64) * 15)),
    "in an icon of Apple's": in_apple_icon(png(128, 128, 8, 6, (b"\0" + bytes([1]) * 512) * 100)),
    "the picture itself": png(4, 8, 8, 2, rows(8)).replace(b"IDAT", b"iDAt"),
}


@pytest.mark.parametrize("data", WITHOUT_ROWS.values(), ids=WITHOUT_ROWS)
def test_a_png_without_some_rows_is_truncated(data: bytes) -> None:
    assert rejection_of(data).reason == "truncated"


BLACK = {
    "the last row": png(4, 8, 8, 2, rows(7) + rows(1, 0)),
    "all rows": png(4, 8, 8, 2, rows(8, 0)),
    "interlaced": interlaced(png(4, 4, 8, 0, bytes(2 * 2 + 3 * 3 + 5 * 2))),
    "interlaced, one pixel": interlaced(png(1, 1, 8, 0, b"\0\0")),
    "more rows than there are": png(4, 8, 8, 2, rows(20, 0)),
    "in an icon": in_icon(png(16, 16, 8, 6, (b"\0" + bytes(64)) * 16)),
}


@pytest.mark.parametrize("data", BLACK.values(), ids=BLACK)
def test_a_black_row_is_no_missing_one(data: bytes) -> None:
    assert np.array_equal(pixels_of(data), reference(data))


BESIDE: dict[str, list[tuple[bytes, bytes]]] = {
    "short gamma": [(b"gAMA", b"\0")],
    "short resolution": [(b"pHYs", b"\0\0\1")],
    "short colours": [(b"cHRM", bytes(31)), (b"sRGB", b"")],
    "short animation": [(b"acTL", b"\0\0")],
    "an animation without frames": [(b"acTL", bytes(8))],
    "a frame out of order": [(b"acTL", b"\0\0\0\2" + bytes(4)), (b"fcTL", b"\0\0\0\7" + bytes(22))],
    "a frame that is too large": [
        (b"acTL", b"\0\0\0\1" + bytes(4)),
        (b"fcTL", struct.pack(">5I", 0, 99, 99, 0, 0) + bytes(6)),
    ],
    "long packed text": [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_500_000)))],
    "long international text": [(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(1_500_000)))],
    "text packed in an unknown way": [(b"zTXt", b"Comment\0\7x")],
    "a long profile": [(b"iCCP", b"sRGB\0\0" + zlib.compress(bytes(1_500_000)))],
    "a profile packed in an unknown way": [(b"iCCP", b"sRGB\0\7x")],
    "a cut profile": [(b"iCCP", b"sRGB")],
    "a short background": [(b"bKGD", b""), (b"hIST", b"\0"), (b"tIME", b""), (b"sPLT", b"")],
    "one that nobody knows": [(b"prVt", bytes(99))],
    "long text that may turn": [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1_500_000)))],
}


@pytest.mark.parametrize("chunks", BESIDE.values(), ids=BESIDE)
def test_what_is_beside_the_pixels_of_a_png_does_not_matter(chunks: list[tuple[bytes, bytes]]) -> None:
    data = png(4, 8, 8, 2, rows(8), *chunks)
    want = pixels_of(png(4, 8, 8, 2, rows(8)))
    assert np.array_equal(pixels_of(data), want)
    for kind, body in chunks[:3]:  # nor its checksum, nor its place
        start = data.index(kind)
        checksum = start + 4 + len(body)
        part = data[start - 4 : checksum + 4]
        assert np.array_equal(pixels_of(data[:checksum] + bytes(4) + data[checksum + 4 :]), want)
        assert np.array_equal(pixels_of(data.replace(part, b"", 1)[:-12] + part + data[-12:]), want)


def test_a_text_that_may_turn_takes_no_memory() -> None:
    """600 MB of zeros in 600 KB; and 80 MB that aren't packed."""
    packed = zlib.compress(bytes(200_000_000), 9)
    texts = [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed), (b"zTXt", b"Raw profile type exif\0\0" + packed)]
    texts += [(b"tEXt", b"Raw profile type exif\0" + b"x" * 400_000)] * 200
    data = png(4, 8, 8, 2, rows(8), *texts, (b"iCCP", b"sRGB\0\0" + packed))
    tracemalloc.start()
    try:
        pixels_of(data)
        assert tracemalloc.get_traced_memory()[1] < len(data) + 8_000_000
    finally:
        tracemalloc.stop()


EXIF = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # turned by a quarter
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HEX = b"\nexif\n%8d\n%s\n" % (len(EXIF), EXIF.hex().encode())
TURNING = {
    "EXIF": (b"eXIf", EXIF),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "packed XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    "EXIF in a text": (b"tEXt", b"Raw profile type exif\0" + HEX),
    "EXIF in a packed text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(HEX)),
}


@pytest.mark.parametrize("chunk", TURNING.values(), ids=TURNING)
@pytest.mark.parametrize("after", [False, True])
def test_what_turns_a_png_is_kept(chunk: tuple[bytes, bytes], after: bool) -> None:
    data = png(4, 8, 8, 2, rows(8), chunk)
    if after:
        part = data[33 : data.index(b"IDAT") - 4]
        data = data[:33] + data[33 + len(part) : -12] + part + data[-12:]
    assert pixels_of(data).shape == (4, 8, 3)
    assert np.array_equal(pixels_of(data), reference(data))


@pytest.mark.parametrize(
    "chunk", [(b"tRNS", b"\0\x5a" * 3), TURNING["EXIF"], TURNING["XMP"]], ids=lambda chunk: chunk[0]
)
def test_a_wrong_checksum_of_what_changes_pixels_is_damage(chunk: tuple[bytes, bytes]) -> None:
    data = bytearray(png(4, 8, 8, 2, rows(8), chunk))
    data[data.index(b"IDAT") - 5] ^= 1
    found = rejection_of(bytes(data))
    assert found.reason == "corrupt"
    assert chunk[0].decode() in found.detail


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("stray", [b"", b"\7\7\7"])
def test_a_progressive_jpeg_without_some_scans_is_truncated(mode: str, stray: bytes) -> None:
    """Any of them; with stray bytes before its tables another decoder has it."""
    data = encoded(in_mode(mode), "JPEG", progressive=True)
    data = data.replace(b"\xff\xdb", stray + b"\xff\xdb", 1)
    starts = [found.start() for found in re.finditer(b"\xff\xda", data)]
    assert np.array_equal(pixels_of(data), reference(data))
    for start, end in itertools.pairwise([*starts, len(data) - 2]):
        assert rejection_of(data[:start] + b"\xff\xd9").reason == "truncated"
        assert rejection_of(data[:start] + data[end:]).reason == "truncated"


def scan(*inks: int) -> bytes:
    body = bytes([len(inks)]) + b"".join(bytes([ink, 0]) for ink in inks) + b"\0\x3f\0"
    return b"\xff\xda" + struct.pack(">H", 2 + len(body)) + body + b"\x12\xff\0\xff\xd3"


@pytest.mark.parametrize(
    ("scans", "are_complete"), [([1, 2, 3], True), ([1, 2], False), ([1, 1, 1], False), ([], False)]
)
def test_colours_may_come_one_after_the_other(scans: list[int], are_complete: bool) -> None:
    """Baseline; the second picture of the file doesn't count."""
    frame = b"\xff\xc0\x00\x11\x08\0\x10\0\x10\x03\1\x22\0\2\x11\0\3\x11\0"
    data = b"\xff\xd8" + frame + b"".join(map(scan, scans)) + b"\xff\xd9\xff\xd8" + frame + scan(1, 2, 3) + b"\xff\xd9"
    found = read_scans(data)
    assert (found.count, found.are_complete) == (len(scans), are_complete)


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (16, 16)}, {"irreversible": True}])
def test_a_jpeg_2000_that_is_cut_and_closed_is_truncated(options: dict[str, object]) -> None:
    data = encoded(scene(), "JPEG2000", **options)
    for length in range(data.index(b"\xff\x90"), len(data) - 2, 97):
        assert rejection_of(data[:length] + b"\xff\xd9").reason == "truncated"


def test_a_jpeg_2000_without_a_tile_is_truncated() -> None:
    data = encoded(scene(), "JPEG2000", no_jp2=True, tile_size=(16, 16))
    starts = [found.start() for found in re.finditer(rb"\xff\x90\0\x0a", data)]
    assert len(starts) == 12
    for start, end in itertools.pairwise(starts):
        assert rejection_of(data[:start] + data[end:]).reason == "truncated"


@pytest.mark.parametrize("interlace", [0, 1])
def test_a_gif_without_some_rows_is_truncated(interlace: int) -> None:
    """Also where another picture follows, of which the decoder would take them."""
    first, second = scene(20, WIDTH).convert("P"), Image.effect_noise((WIDTH, 20), 90).convert("P")
    data = encoded(first, "GIF", save_all=True, append_images=[second, second], interlace=interlace)
    assert np.array_equal(pixels_of(data), reference(data))
    at = data.index(b"\x2c\0\0\0\0")
    taller = struct.pack("<H", HEIGHT)
    data = data[:8] + taller + data[10 : at + 7] + taller + data[at + 9 :]
    assert rejection_of(data).reason == "truncated"


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA"])
def test_an_icon_without_some_rows_is_truncated(mode: str) -> None:
    """The mask behind them would be taken for them."""
    data = encoded(in_mode(mode, scene(16, 32)), "ICO", bitmap_format="bmp", sizes=[(32, 16)])
    assert np.array_equal(pixels_of(data), reference(data))
    taller = data[:7] + b"\x20" + data[8:30] + struct.pack("<i", 64) + data[34:]
    assert rejection_of(taller).reason == "truncated"


STRIPED: Tags = {256: 8, 257: 12, 278: 4}
STRIPS = bytes([50]) * 32, bytes([100]) * 32, bytes([150]) * 32
TILED: Tags = {256: 32, 257: 16, 322: 16, 323: 16}
TILES = bytes([50]) * 256, bytes([100]) * 256


def packed(*parts: bytes) -> list[bytes]:
    return [zlib.compress(part) for part in parts]


def tiled(tags: Tags, *parts: bytes) -> bytes:
    """Strips become tiles by the names of their tags."""
    data = tiff({**TILED, **tags}, *parts)
    return data.replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 324, 4)).replace(
        struct.pack("<HH", 279, 4), struct.pack("<HH", 325, 4)
    )


SOUND = {
    "strips": tiff(STRIPED, *STRIPS),
    "packed strips": tiff({**STRIPED, 259: 8}, *packed(*STRIPS)),
    "a last strip that is shorter": tiff({**STRIPED, 257: 10}, *STRIPS[:2], STRIPS[2][:16]),
    "a last strip whose rows are said to be more": tiff({**STRIPED, 257: 10}, *STRIPS),
    "tiles": tiled({}, *TILES),
    "packed tiles": tiled({259: 8}, *packed(*TILES)),
}
LACKING = {
    "two strips of three": tiff(STRIPED, *STRIPS[:2]),
    "two packed strips of three": tiff({**STRIPED, 259: 8}, *packed(*STRIPS[:2])),
    "a strip at 0": tiff({**STRIPED, 273: (122, 0, 154)}, *STRIPS),
    "a strip without bytes": tiff({**STRIPED, 279: (32, 0, 32)}, *STRIPS),
    "a packed strip without bytes": tiff({**STRIPED, 259: 8, 279: (12, 0, 12)}, *packed(*STRIPS)),
    "a strip beyond the end": tiff({**STRIPED, 273: (122, 154, 9999)}, *STRIPS),
    "a packed strip beyond the end": tiff({**STRIPED, 259: 8, 273: (122, 154, 9999)}, *packed(*STRIPS)),
    "a strip cut by the end": tiff(STRIPED, *STRIPS)[:-9],
    "a strip with fewer bytes than its rows": tiff({**STRIPED, 279: (32, 9, 32)}, *STRIPS),
    "one tile of two": tiled({}, TILES[0]),
    "a tile at 0": tiled({273: (122, 0)}, *TILES),
    "a packed tile without bytes": tiled({259: 8, 279: (12, 0)}, *packed(*TILES)),
}


@pytest.mark.parametrize("data", SOUND.values(), ids=SOUND)
def test_strips_and_tiles_are_read(data: bytes) -> None:
    assert np.array_equal(pixels_of(data), reference(data))
    assert sorted(set(pixels_of(data).ravel().tolist())) in ([50, 100, 150], [50, 100])


@pytest.mark.parametrize("data", LACKING.values(), ids=LACKING)
def test_a_tiff_without_a_strip_or_tile_is_truncated(data: bytes) -> None:
    assert rejection_of(data).reason == "truncated"


@pytest.mark.parametrize(("mode", "compression"), [("1", "group3"), ("1", "group4"), ("RGB", "jpeg")])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_strip_that_ends_early_is_truncated(mode: str, compression: str, share: float) -> None:
    """Of a compression that fills in what lacks."""
    data = encoded(in_mode(mode), "TIFF", compression=compression)
    with Image.open(io.BytesIO(data)) as image:
        (length,) = image.tag_v2[279]
    assert np.array_equal(pixels_of(data), reference(data))
    shorter = re.sub(
        struct.pack("<HHI", 279, 4, 1) + b"....",
        lambda found: found[0][:8] + struct.pack("<I", int(share * length)),
        data,
        flags=re.S,
    )
    assert shorter != data
    assert rejection_of(shorter).reason == "truncated"


def test_the_footer_of_a_tga_may_say_that_it_has_no_alpha() -> None:
    data = encoded(in_mode("RGBA"), "TGA")
    extension = struct.pack("<H", 495) + bytes(493)  # its last byte is the kind of alpha
    footer = struct.pack("<II", len(data) - 26, 0) + data[-18:]
    opaque = data[:-26] + extension + footer
    assert np.array_equal(pixels_of(opaque), reference(opaque))
    assert not np.array_equal(pixels_of(opaque), pixels_of(data))


# Of rows so short that what follows the picture could be one.
FOLLOWED: dict[str, tuple[str, dict[str, object], int]] = {
    "TGA": ("RGB", {}, 14),
    "packed TGA": ("L", {"compression": "tga_rle"}, 14),
    "PCX": ("P", {}, 10),
    "QOI": ("RGB", {}, 11),
}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_what_follows_a_picture_is_no_row_of_it(name: str, width: int) -> None:
    mode, options, at = FOLLOWED[name]
    data = encoded(in_mode(mode, scene(30, width)), name.rsplit(maxsplit=1)[-1], **options)
    assert np.array_equal(pixels_of(data), reference(data))
    assert rejection_of(data[:at] + bytes([data[at] + 1]) + data[at + 1 :]).reason == "truncated"


TALLER: dict[str, tuple[str, dict[str, object], Callable[[bytes], bytes]]] = {
    "PPM": ("RGB", {}, lambda data: data.replace(b"53 37", b"53 38")),
    "PGM": ("L", {}, lambda data: data.replace(b"53 37", b"53 38")),
    "PBM": ("1", {}, lambda data: data.replace(b"53 37", b"53 38")),
    "BMP": ("RGB", {}, lambda data: data[:22] + b"\x26" + data[23:]),
    "TGA": ("RGB", {}, lambda data: data[:14] + b"\x26" + data[15:]),
    "packed TGA": ("RGB", {"compression": "tga_rle"}, lambda data: data[:14] + b"\x26" + data[15:]),
    "PCX": ("RGB", {}, lambda data: data[:10] + b"\x25" + data[11:]),
    "SGI": ("RGB", {}, lambda data: data[:9] + b"\x26" + data[10:]),
    "QOI": ("RGB", {}, lambda data: data[:11] + b"\x26" + data[12:]),
    "DDS": ("RGB", {}, lambda data: data[:12] + b"\x26" + data[13:]),
    "XBM": ("1", {}, lambda data: data.replace(b"height 37", b"height 38")),
}


@pytest.mark.parametrize("name", TALLER)
def test_any_format_with_fewer_rows_than_declared_is_truncated(name: str) -> None:
    mode, options, change = TALLER[name]
    data = encoded(in_mode(mode), {"PGM": "PPM", "PBM": "PPM"}.get(name, name.rsplit(maxsplit=1)[-1]), **options)
    assert np.array_equal(pixels_of(data), reference(data))
    assert change(data) != data
    assert rejection_of(change(data), decoder()).reason == "truncated"
