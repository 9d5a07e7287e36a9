"""What a file says of its own parts, where the decoder doesn't look: a PNG's checksums, a JPEG 2000's end. Pure."""

from __future__ import annotations

import struct
import zlib
from typing import Literal

_PNG_HEAD = 8
_PNG_PART = struct.Struct(">I4s")
_BOX = struct.Struct(">I4s")
_CODESTREAM = b"\xff\x4f\xff\x51"
_END = b"\xff\xd9"


def unseen_damage(name: str, data: bytes | memoryview) -> tuple[Literal["truncated", "corrupt"], str] | None:
    """Reason and detail of damage that Pillow passes; None if there is none.

    What is missing of a JPEG 2000 would be blank, and a changed pixel of a PNG that is stored without compression
    would be taken as it is.

    Args:
        name: The format's name.
        data: The file.
    """
    if name == "JPEG2000" and not jpeg2000_is_whole(data):
        return "truncated", "The JPEG2000 file ends before its picture does, or lacks its end mark."
    part = broken_png_part(data) if name == "PNG" else None
    return ("corrupt", f"The PNG file is damaged: the checksum of its part {part} is wrong.") if part else None


def broken_png_part(data: bytes | memoryview) -> str | None:
    """The first part that the picture is made of whose checksum (CRC-32) is wrong; None if there is none.

    A part that is cut is left to the decoder, and so are the parts that no pixel is in (PNG specification, 5.4: their
    names begin with a small letter).
    """
    view, at = memoryview(data).cast("B"), _PNG_HEAD
    while at + 12 <= len(view):
        length, kind = _PNG_PART.unpack_from(view, at)
        end = at + 8 + length
        if end + 4 > len(view):
            return None
        if kind[:1].isupper() and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return str(kind, "ascii", "replace")
        if kind == b"IEND":
            return None
        at = end + 4
    return None


def jpeg2000_is_whole(data: bytes | memoryview) -> bool:
    """Whether a JPEG 2000 file has its whole codestream, up to the end mark (ITU-T T.800, annexes A and I).

    The file is the codestream itself, perhaps with zeros behind it, or consists of boxes of which one holds it.
    """
    view = memoryview(data).cast("B")
    if bytes(view[:4]) == _CODESTREAM:
        return bytes(view).rstrip(b"\0").endswith(_END)
    at = 0
    while at + 8 <= len(view):
        length, kind = _BOX.unpack_from(view, at)
        start = at + 8
        if length == 1 and at + 16 <= len(view):  # a length of 64 bits
            length, start = int.from_bytes(view[at + 8 : at + 16], "big"), at + 16
        end = len(view) if length == 0 else at + length
        if kind == b"jp2c":
            whole = bytes(view[start:end])
            return end <= len(view) and (whole.rstrip(b"\0") if length == 0 else whole).endswith(_END)
        if end <= at:
            return False
        at = end
    return False
