"""Appearance of bytes that no decoder accepts, for the rejection's message: an error page, a drawing, a video."""

from __future__ import annotations

import re
from dataclasses import dataclass


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
