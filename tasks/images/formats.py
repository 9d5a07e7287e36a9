"""Contents of an image file besides its pixels: a JPEG's header, and checks of the parts that a file declares. Pure.

A decoder fills in missing parts: rows that a PNG's stream lacks are black, scans that a progressive
JPEG lacks are blur, a strip without an offset is read from the file's beginning. The parts' lengths, numbers
and checksums reveal it.

Segments of a JPEG are as in ITU-T T.81, annex B. Only ordinary headers are read here; a decoder handles the others.
Bytes that no decoder accepts get a description for the rejection's message.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

ORIENTATION_TAG = 274  # TIFF 6.0


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Height and width in pixels, as stored; and other facts that choose the decoder."""

    height: int
    width: int
    inks: int  # 1: gray, 3: colour, 4: CMYK or YCCK
    may_be_turned: bool  # EXIF or XMP seem to have an orientation
    scans: Scans


@dataclass(frozen=True, slots=True)
class Scans:
    """Passes over the picture, of which progressive JPEGs have about ten; and True if they send every bit of it."""

    count: int
    are_complete: bool


_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_TAGS = tuple(struct.pack(order, ORIENTATION_TAG) for order in (">H", "<H"))
_START_OF_SCAN = 0xDA
_APPLICATION_1 = 0xE1
_TABLES = (0xC4, 0xC8, 0xCC)  # their markers are among those of the frames
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in _TABLES)
_IN_ONE = Scans(1, are_complete=True)

# Within a scan's data 0xFF is followed by 0, or by a restart's number.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_NOTHING_SENT = 16  # more bits than any coefficient's low end lacks


def read_jpeg_header(data: bytes | memoryview) -> JpegHeader | None:
    """Read the segments before the picture.

    Args:
        data: A file that begins as a JPEG; a view must be of unsigned bytes.

    Returns:
        The header; None if anything in it is unusual or missing.
    """
    at = 2
    frame = frame_marker = None
    may_be_turned = False
    try:
        while True:
            prefix, marker, length = _SEGMENT.unpack_from(data, at)
            if prefix != 0xFF or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
                return None
            if marker == _START_OF_SCAN:
                break
            if marker == _APPLICATION_1:  # EXIF and XMP
                block = bytes(data[at + 4 : at + 2 + length])
                may_be_turned |= b"Orientation" in block or any(tag in block for tag in _TAGS)
            elif marker in _FRAMES:
                frame, frame_marker = _FRAME.unpack_from(data, at + 4), marker
            at += 2 + length
        inks_of_scan = data[at + 4]
    except (struct.error, IndexError):
        return None
    if frame is None:
        return None
    bits, height, width, inks = frame
    if bits != 8 or inks not in (1, 3, 4) or not height * width:
        return None
    in_one = frame_marker not in _PROGRESSIVE and inks_of_scan == inks
    return JpegHeader(height, width, inks, may_be_turned, _IN_ONE if in_one else read_scans(data))


def read_scans(data: bytes | memoryview) -> Scans:
    """Read the headers of all scans of a JPEG's first picture.

    A decoder doesn't notice missing scans: a progressive JPEG without its last scans becomes a blurred picture,
    one whose colours come one after the other a gray one.

    Args:
        data: A file that begins as a JPEG; a view must be of unsigned bytes.
    """
    lacking: dict[int, list[int]] = {}  # lowest bits that each coefficient of each ink still lacks
    count = 0
    found = _MARKER.search(data, 2)
    while found is not None:
        at, marker = found.start(), data[found.start() + 1]
        if marker in (0xD8, 0xD9):
            break
        body = bytes(data[at + 4 : at + 4 + 20])
        if marker in _FRAMES and len(body) > 5:
            inks = data[at + 10 : at + 10 + 3 * body[5] : 3]
            lacking = {ink: [_NOTHING_SENT] * (64 if marker in _PROGRESSIVE else 1) for ink in inks}
        elif marker == _START_OF_SCAN and body:
            count += 1
            _send(body, lacking)
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found = _MARKER.search(data, at + 2 + length)
    return Scans(count, are_complete=not any(any(bits) for bits in lacking.values()))


def _send(scan: bytes, lacking: dict[int, list[int]]) -> None:
    """Record a scan's data: some inks' coefficients of a range, down to a bit (ITU-T T.81, B.2.3 and G.1)."""
    end = 1 + 2 * scan[0]
    if len(scan) < end + 3:
        return
    first, last, known, low_bit = scan[end], scan[end + 1], scan[end + 2] >> 4, scan[end + 2] & 15
    for ink in scan[1:end:2]:
        bits = lacking.get(ink, [])
        if len(bits) == 1:  # all at once
            bits[0] = 0
        these = slice(first, max(first, last + 1))
        if known == 0 or set(bits[these]) == {known}:  # else it refines data that was never sent
            bits[these] = [low_bit] * len(bits[these])


_END = b"\xff\xd9"  # the end mark of a JPEG, and of a JPEG 2000's codestream


class DamageError(Exception):
    """A picture has missing or damaged parts that its decoder wouldn't notice. It never leaves the decoder."""

    def __init__(self, reason: Literal["truncated", "corrupt"], detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def check_scans(scans: Scans) -> None:
    """Raise a DamageError for a JPEG that doesn't send all of its picture."""
    if not scans.are_complete:
        raise DamageError("truncated", "The JPEG file lacks some of its scans, so its picture isn't whole.")


_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_PART = struct.Struct(">I4s")
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
_PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PNG_PIXELS = (b"tRNS", b"eXIf")  # parts that may be skipped by their names, but affect pixels
_PNG_TURNING = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")  # texts that may have an orientation
_MOST_TEXT = 2**20


def png_picture(data: bytes) -> bytes:
    """Reduce a PNG to the parts that affect its first picture's pixels: damage or length of the others doesn't matter.

    These are the critical parts, the transparency, the EXIF block, and the texts that may have an orientation, of
    1 MiB together at most. Animations keep the picture for viewers without animations.

    Returns:
        A PNG, cut where the file is cut.

    Raises:
        DamageError: The checksum (CRC-32) of one of these parts is wrong.
    """
    kept: list[bytes | memoryview] = [data[: len(_PNG_MAGIC)]]
    room = _MOST_TEXT
    for kind, whole in _png_parts(data):
        body = whole[8:-4]
        if kind[:1].islower() and kind not in _PNG_PIXELS:
            room -= (length := _turning_text(kind, body, room))
            if not length:
                continue
        if kind.isalpha() and zlib.crc32(whole[4:-4]) != int.from_bytes(whole[-4:], "big"):
            part = str(kind, "ascii")
            raise DamageError("corrupt", f"The PNG file is damaged: the checksum of its part {part} is wrong.")
        kept.append(whole)
    return b"".join(kept)


def _png_parts(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield names and bytes of a PNG's parts; an unsplittable rest has no name and is left to the decoder."""
    view, at = memoryview(data), len(_PNG_MAGIC)
    while at + 8 <= len(view):
        length, kind = _PNG_PART.unpack_from(view, at)
        end = at + 12 + length
        if not kind.isalpha() or end > len(view):
            if not kind.isalpha() or kind[:1].isupper():
                yield b"", view[at:]
            return
        yield kind, view[at:end]
        if kind == b"IEND":
            return
        at = end


def _turning_text(kind: bytes, body: memoryview, room: int) -> int:
    """Return the length of a text that may have an orientation; 0 for others, and for too long or unreadable ones."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return 0
    name, _, text = bytes(body[: room + 200]).partition(b"\0")
    if name not in _PNG_TURNING or len(body) > room + 200:
        return 0
    if kind == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
    else:
        packed, text = kind == b"zTXt", text[kind == b"zTXt" :]
    if packed:
        unpack = zlib.decompressobj()
        try:
            text = unpack.decompress(text, max(room, 1))
        except zlib.error:
            return 0
        if unpack.unconsumed_tail:
            return 0
    return len(text) if len(text) <= room else 0


def check_png_rows(picture: bytes) -> None:
    """Unpack a PNG's pixels, keeping none, to check that there are as many as its header declares.

    Args:
        picture: A PNG that could be decoded, reduced to its picture.

    Raises:
        DamageError: Its compressed stream ends before the last row.
    """
    lacking = 0
    unpack = zlib.decompressobj()
    for kind, whole in _png_parts(picture):
        if kind == b"IHDR":
            lacking = _png_size(whole[8:-4])
        packed = whole[8:-4] if kind == b"IDAT" else b""
        while len(packed) and lacking > 0 and not unpack.eof:
            lacking -= len(unpack.decompress(packed, 2**20))
            packed = unpack.unconsumed_tail
    if lacking > 0:
        raise DamageError("truncated", f"The PNG file's picture lacks its last {lacking:,} bytes.")


def _png_size(header: memoryview) -> int:
    """Return the bytes of all rows, each with its filter's number before it (PNG specification, 7 and 8)."""
    width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", header[:13])
    total = 0
    for left, top, across, down in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = math.ceil((width - left) / across), math.ceil((height - top) / down)
        if columns > 0 and rows > 0:
            total += rows * (1 + math.ceil(columns * depth * _PNG_SAMPLES[colour] / 8))
    return total


_PCX_PALETTE = 1 + 3 * 256
_QOI_END = bytes(7) + b"\1"
_TGA_FOOTER, _TGA_NAME = 26, b"TRUEVISION-XFILE.\0"


def picture_end(name: str, data: bytes | memoryview) -> int | None:
    """Return the latest end of the first picture's bytes; None if the format doesn't record it.

    A decoder that misses pixels would continue with the following data: another picture, a palette, or a footer.
    """
    end = None
    if name == "GIF":
        end = _gif_end(data)
    elif name == "PCX" and len(data) > _PCX_PALETTE and data[-_PCX_PALETTE] == 12 and (data[3], data[65]) == (8, 1):
        end = len(data) - _PCX_PALETTE
    elif name == "QOI" and bytes(data[-len(_QOI_END) :]) == _QOI_END:
        end = len(data) - len(_QOI_END)
    elif name == "TGA" and bytes(data[-len(_TGA_NAME) :]) == _TGA_NAME:
        end = len(data) - _TGA_FOOTER
    return end


def _gif_end(data: bytes | memoryview) -> int | None:
    try:
        at = 13 + _colours(data[10])
        while data[at] == 0x21:  # an extension
            at = _after_blocks(data, at + 2)
        return _after_blocks(data, at + 11 + _colours(data[at + 9])) if data[at] == 0x2C else None
    except IndexError:
        return None


def _colours(flags: int) -> int:
    """Return the bytes of the colour table that a GIF's flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes | memoryview, at: int) -> int:
    while data[at]:
        at += 1 + data[at]
    return at + 1


_DIB = struct.Struct("<IiiHHI12xI")


def check_icon(data: bytes | memoryview, offset: int, size: int) -> None:
    """Check that an icon's bitmap has all its rows before the mask, which would otherwise be read as rows.

    Args:
        data: The file.
        offset: Start of the bitmap, by the file's directory.
        size: Its bytes, and those of its mask, by the same.

    Raises:
        DamageError: They are too few.
    """
    if len(data) < offset + _DIB.size or bytes(data[offset : offset + 8]) == _PNG_MAGIC:
        return
    head, width, twice, _, bits, compression, colours = _DIB.unpack_from(data, offset)
    if compression not in (0, 3) or width <= 0:
        return
    palette = 4 * (colours or 2**bits) if bits <= 8 else 0
    mask = 0 if bits == 32 else 4 * math.ceil(width / 32)
    needed = head + palette + abs(twice) // 2 * (4 * math.ceil(width * bits / 32) + mask)
    if min(size, len(data) - offset) < needed:
        raise DamageError("truncated", f"The ICO file's picture takes {needed:,} bytes and has {size:,} of them.")


_COLUMNS, _ROWS, _BITS, _COMPRESSION, _COLOURS, _SAMPLES, _PLANES = 256, 257, 258, 259, 262, 277, 284
_OLD_JPEG, _OLD_JPEG_OFFSET, _JPEG, _YCBCR = 6, 513, 7, 6
_FAX_3, _FAX_4, _FILL_ORDER = 3, 4, 266
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_STRIPS = (273, 279, 278)  # tags of their offsets, their lengths, and the rows of one
_TILES = (324, 325, 323)
_TILE_COLUMNS = 322


def check_tiff_parts(tags: Mapping[int, Any], data: bytes | memoryview) -> None:
    """Check that a TIFF's first picture has all strips or tiles, each within the file (TIFF 6.0, 3 and 15).

    Raises:
        DamageError: One is missing.
    """
    compression = tags.get(_COMPRESSION, 1)
    if compression == _OLD_JPEG and _OLD_JPEG_OFFSET in tags:
        return  # all of it is at one place
    offsets_tag, lengths_tag, rows_tag = _TILES if _TILES[0] in tags and _STRIPS[0] not in tags else _STRIPS
    offsets, lengths = _numbers(tags.get(offsets_tag)), _numbers(tags.get(lengths_tag))
    rows = max(1, min(tags.get(rows_tag) or tags[_ROWS], 2**31))
    columns = tags.get(_TILE_COLUMNS) or 1 if offsets_tag == _TILES[0] else tags[_COLUMNS]
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANES) == 2 else 1
    number = math.ceil(tags[_ROWS] / rows) * math.ceil(tags[_COLUMNS] / columns) * planes
    what = "tiles" if offsets_tag == _TILES[0] else "strips"
    there = len(offsets) if not lengths else min(len(offsets), len(lengths))
    if there < number:
        raise DamageError("truncated", f"The TIFF file has {there:,} of its picture's {number:,} {what}.")
    for index, offset in enumerate(offsets[:number]):
        size = lengths[index] if lengths else 1
        is_there = size > 0 and 0 < offset < len(data) and (compression == 1 or offset + size <= len(data))
        if is_there and lengths and compression in (_JPEG, _FAX_3, _FAX_4):
            part = bytes(data[offset : offset + size])
            above = rows * index % (rows * math.ceil(tags[_ROWS] / rows))
            is_there = _is_whole(compression, part, min(rows, tags[_ROWS] - above), tags.get(_FILL_ORDER) == 2)
        if not is_there:
            raise DamageError(
                "truncated", f"Number {index + 1} of the TIFF file's {number:,} {what} isn't there, or not whole."
            )
    if compression == 1 and lengths and tags.get(_COLOURS) != _YCBCR:
        _check_uncompressed(tags, lengths[:number], rows if what == "tiles" else 0, columns, planes)


def _is_whole(compression: int, part: bytes, rows: int, is_mirrored: bool) -> bool:
    """Check a strip or tile of a compression whose decoder fills gaps with black: by its end, or its rows' ends."""
    if compression == _JPEG:
        return part.rstrip(b"\0").endswith(_END)
    if is_mirrored:
        part = part.translate(_MIRRORED)
    if compression == _FAX_4:  # ITU-T T.6, 2.4.1.1: two ends of line, and bits that fill the byte
        last = int.from_bytes(part.rstrip(b"\0")[-4:], "big")
        return (last // max(1, last & -last)) & 0xFFFFFF == 0x001001
    ends, zeros = 0, ""
    for start in range(0, len(part), 2**16):
        piece = part[start : start + 2**16]
        bits = f"{zeros}{int.from_bytes(piece, 'big'):0{8 * len(piece)}b}"
        ends += len(re.findall("0{11}1", bits))
        zeros = "0" * (len(bits[-11:]) - len(bits[-11:].rstrip("0")))
    return not ends or ends >= rows  # ITU-T T.4, 4.1.2: one before each row


def _check_uncompressed(
    tags: Mapping[int, Any], lengths: tuple[int, ...], tile_rows: int, columns: int, planes: int
) -> None:
    """Check that the strips or tiles together hold all pixels: missing ones would be read from beyond them."""
    bits = _numbers(tags.get(_BITS, 1))
    samples = tags.get(_SAMPLES, 1)
    bits_of_pixel = bits[0] if planes > 1 else sum(bits[:samples]) if len(bits) > 1 else bits[0] * samples
    rows = tile_rows * len(lengths) if tile_rows else tags[_ROWS] * planes
    needed = rows * math.ceil(columns * bits_of_pixel / 8)
    if sum(lengths) < needed:
        raise DamageError(
            "truncated", f"The TIFF file's picture takes {needed:,} bytes and has {sum(lengths):,} of them."
        )


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(value for value in values if isinstance(value, int)) if isinstance(values, tuple) else ()


_BOX = struct.Struct(">I4s")
_START_OF_TILE = b"\xff\x90"
_CODESTREAM = b"\xff\x4f\xff\x51"
_SIZE = struct.Struct(">HHH8IH")
_TILE_PART = struct.Struct(">2sHHIBB")


def check_tiles(data: bytes) -> None:
    """Check that a JPEG 2000 file has its whole codestream: all tiles' parts, and the end mark (ITU-T T.800, annex A).

    Raises:
        DamageError: A missing part would be blank.
    """
    start, end, is_open = _codestream(memoryview(data))
    stream = data[start:end]
    ends = (stream.rstrip(b"\0") if is_open else stream).endswith(_END)
    if end > len(data) or not ends or not _has_all_tiles(stream):
        raise DamageError(
            "truncated", "The JPEG2000 file ends before its picture does, or lacks a tile or its end mark."
        )


def jpeg2000_depths(data: bytes | memoryview) -> tuple[int, ...]:
    """Return the bits of each component's samples; none if they can't be read."""
    view = memoryview(data).cast("B")
    start = _codestream(view)[0] + 2
    try:
        count = _SIZE.unpack_from(view, start)[-1]
    except struct.error:
        return ()
    return tuple((bits & 0x7F) + 1 for bits in view[start + 40 : start + 40 + 3 * count : 3])


def with_deeper_samples(data: bytes | memoryview) -> bytes:
    """Return the same codestream, but each component announces one bit more than it has."""
    deeper = bytearray(data)
    start = _codestream(memoryview(deeper))[0] + 42
    for component in range(len(jpeg2000_depths(data))):
        deeper[start + 3 * component] += 1
    return bytes(deeper)


def _codestream(view: memoryview) -> tuple[int, int, bool]:
    """Return start and end of the codestream, and True if zeros may follow it (ITU-T T.800, annex I).

    The file is the codestream itself, or consists of boxes of which one holds it.
    """
    if bytes(view[:4]) == _CODESTREAM:
        return 0, len(view), True
    at = 0
    while at + 8 <= len(view):
        length, kind = _BOX.unpack_from(view, at)
        start = at + 8
        if length == 1 and at + 16 <= len(view):  # a length of 64 bits
            length, start = int.from_bytes(view[at + 8 : at + 16], "big"), at + 16
        end = len(view) if length == 0 else at + length
        if kind == b"jp2c":
            return start, end, length == 0
        if end <= at:
            break
        at = end
    return 0, len(view) + 1, False


def _has_all_tiles(stream: bytes) -> bool:
    """Follow the lengths of the tiles' parts to the end mark; leave unreadable ones to the decoder."""
    try:
        width, height, _, _, across, down, left, top = _SIZE.unpack_from(stream, 2)[3:11]
        number = math.ceil((width - left) / across) * math.ceil((height - top) / down)
        at = 2
        while stream[at : at + 2] not in (_START_OF_TILE, _END):  # the main header's segments
            if stream[at] != 0xFF:
                return True
            at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        parts: dict[int, int] = {}
        announced: dict[int, int] = {}
        while stream[at : at + 2] == _START_OF_TILE:
            _, _, tile, length, _, count = _TILE_PART.unpack_from(stream, at)
            parts[tile] = parts.get(tile, 0) + 1
            announced[tile] = max(announced.get(tile, 0), count)
            at = at + length if length else len(stream.rstrip(b"\0")) - 2
    except (struct.error, ZeroDivisionError, IndexError):
        return True
    every_part = all(count >= announced[tile] for tile, count in parts.items())
    return every_part and len(parts) >= number and stream[at : at + 2] == _END


@dataclass(frozen=True, slots=True)
class Appearance:
    """Appearance of bytes, in words for a person; and True for a picture that needs another decoder."""

    what: str
    is_image: bool


_BEGINNINGS = (
    (rb"....ftyp.{0,60}he[iv][cmsx]", Appearance("a HEIC picture; convert it to JPEG or PNG", True)),
    (rb"\xff\x0a|....JXL ", Appearance("a JPEG XL picture; convert it to JPEG or PNG", True)),
    (rb"v/1\x01", Appearance("an OpenEXR picture; convert it to PNG or TIFF", True)),
    (rb"%!PS", Appearance("PostScript, a program, which isn't run; convert it to PNG", True)),
    (rb"%PDF", Appearance("a PDF document", False)),
    (rb"PK\x03\x04", Appearance("a ZIP archive", False)),
    (rb"\x1f\x8b", Appearance("a gzip archive", False)),
    (rb"....ftyp(?!avi|mif|msf)|\x1aE\xdf\xa3", Appearance("a video", False)),
    (rb"\0+\Z", Appearance("nothing but zero bytes", False)),
)
_TEXTS = (
    (r".*<svg[\s>]", "an SVG drawing; convert it to PNG"),
    (r"\s*(<!--.*-->\s*)?<(!doctype )?html", "an HTML page, such as a server's error"),
    (r"\s*<[?!a-z]", "an XML document"),
    (r"\s*[{\[]", "JSON"),
    (r"version https://git-lfs", "a Git LFS pointer; fetch the picture itself with 'git lfs pull'"),
    (r"", "text"),
)
_TEXT = r"\ufeff?[^\0-\x08\x0e-\x1f\ufffd]+\ufffd?\Z"  # the last character may be cut


def appearance(data: bytes | memoryview) -> Appearance | None:
    """Return the appearance of bytes by their first kilobyte; None if unknown."""
    head = bytes(data[:1024])
    for beginning, seen in _BEGINNINGS:
        if re.match(beginning, head, re.S):
            return seen
    text = head.decode("utf-8", "replace")
    if not re.match(_TEXT, text):
        return None
    what = next(what for beginning, what in _TEXTS if re.match(beginning, text.removeprefix("\ufeff"), re.I | re.S))
    return Appearance(what, is_image=False)
