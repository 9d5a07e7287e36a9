"""Header of a JPEG: size, inks, and possible orientation; and completeness of its scans. Pure.

Segments are as in ITU-T T.81, annex B. Only ordinary files are read here; a decoder handles the others.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

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
