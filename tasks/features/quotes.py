"""Check of a CSV file's quotes while it is read: an unclosed one would silently swallow the following rows.

Arrow's reader takes everything up to the next quote, or to the end of the file, for one field.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa

from tasks.features.pieces import PieceText
from tasks.io.errors import SourceError

_QUOTE = ord('"')
_BESIDE = np.isin(np.arange(256), list(b',\r\n"'))
"""Bytes that may occur beside a quote."""
_OPENING = re.compile(rb'[,\r\n]"')
_MARK = b"\xef\xbb\xbf"


class QuotedText:
    """A CSV file for `pyarrow.PythonFile`, whose quotes are checked as they pass.

    In RFC 4180 text, quotes open and close in turn (an escaped one does both), each beside a comma, the end
    of a line or another quote: that is checked for all of them at once. Elsewhere, as with a quote within an unquoted
    field, fields are followed one by one.
    """

    def __init__(self, uri: str, stream: pa.NativeFile | PieceText, left_out: int = 0) -> None:
        """Wrap a stream at its beginning; some lines of the file after the header are left out."""
        self._uri, self._stream = uri, stream
        self._before, self._pending = b"\n", b""
        self._inside, self._begins = False, True
        self._line = self._opened = 1 + left_out
        self.closed = False

    def read(self, size: int | None = None) -> bytes:
        """Return some bytes; none at the end.

        Raises:
            SourceError: a quoted field isn't closed, or continues after its closing quote after several lines.

        """
        piece: bytes = self._stream.read(size)
        text = self._pending + (piece.removeprefix(_MARK) if self._begins else piece)
        self._begins = False
        if piece:  # a quote is judged by the bytes after it, and a run of them together
            checked = text[:-1].rstrip(b'"')
            self._pending = text[len(checked) :]
            self._check(checked, self._pending[:1])
        else:
            self._pending = b""
            self._check(text, b"\n")
            if self._inside:
                raise self._fault("isn't closed")
        return piece

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()
        self.closed = True

    def _check(self, text: bytes, behind: bytes) -> None:
        if not text:
            return
        whole = self._before + text + behind
        signs = np.frombuffer(whole, np.uint8)
        quotes = np.flatnonzero(signs[1:-1] == _QUOTE) + 1
        opening, closing = quotes[self._inside :: 2], quotes[not self._inside :: 2]
        if len(quotes):
            if _BESIDE[signs[opening - 1]].all() and _BESIDE[signs[closing + 1]].all():
                self._inside ^= bool(len(quotes) % 2)
                if self._inside and len(fields := opening[signs[opening - 1] != _QUOTE]):
                    self._opened = self._line_at(whole, int(fields[-1]))
            else:
                self._follow(whole)
        self._line += text.count(b"\n")
        self._before = text[-1:]

    def _follow(self, whole: bytes) -> None:
        """Follow the quoted fields of some text, with a byte more at both ends, one by one."""
        end, place = len(whole) - 1, 0
        while True:
            if not self._inside:
                found = _OPENING.search(whole, place, end)
                if found is None:
                    return
                self._inside, place = True, found.end()
                self._opened = self._line_at(whole, place)
            quote = whole.find(b'"', max(place, 1), end)
            if quote < 0:
                return
            place = quote + 1
            if whole[place] == _QUOTE:
                place += 1
                continue
            self._inside = False
            if whole[place] not in b",\r\n" and self._line_at(whole, quote) > self._opened:
                raise self._fault("goes on behind the quote that closes it")

    def _line_at(self, whole: bytes, place: int) -> int:
        return self._line + whole.count(b"\n", 1, place)

    def _fault(self, what: str) -> SourceError:
        return SourceError(
            f"{self._uri} can't be read as csv: the quoted field that begins in line {self._opened:,} {what}, and "
            f"would swallow the rows behind it; close it, or double the quotes that belong to its text"
        )
