"""What a JPEG says before its picture: size, inks, and whether something may turn it. Pure.

Segments are as in ITU-T T.81, annex B. Only the ordinary is read here; a decoder sees to the odd.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

ORIENTATION_TAG = 274  # TIFF 6.0


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Height and width in pixels, as stored; and what else decides how to decode."""

    height: int
    width: int
    inks: int  # 1: gray, 3: colour, 4: CMYK or YCCK
    may_be_turned: bool  # EXIF or XMP seem to have an orientation
    scans: int  # passes over the picture, of which progressive JPEGs have about ten


_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_TAGS = tuple(struct.pack(order, ORIENTATION_TAG) for order in (">H", "<H"))
_START_OF_SCAN = 0xDA
_APPLICATION_1 = 0xE1
_TABLES = (0xC4, 0xC8, 0xCC)  # their markers stand among those of the frames
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


def read_jpeg_header(data: bytes | memoryview) -> JpegHeader | None:
    """Read the segments before the picture.

    Args:
        data: A file that begins as a JPEG; a view must be of unsigned bytes.

    Returns:
        The header; None if anything in it is out of the ordinary, or missing.

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
            elif marker <= 0xCF and marker not in _TABLES:
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
    scans = 1 if in_one else bytes(data[at:]).count(b"\xff\xda")
    return JpegHeader(height, width, inks, may_be_turned, scans)
