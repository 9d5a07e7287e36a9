"""Text of CSV files: cut into pieces, checked quotes, and the types of its values.

Tasks read the pieces of a large file in parallel, each from the start of a row. Row starts can't be recognised in the
middle of a file, as quoted text may hold line ends: so a file is scanned once from its beginning, field by field by the
rules of RFC 4180 and pyarrow, at some hundreds of megabytes a second. Compressed files have no middle; they stay whole.

Quotes are checked while a file is read: Arrow's reader takes everything from an unclosed one up to the next quote, or
to the end of the file, for one field, and would silently swallow the following rows.

A column's type is the join of its values' types, so that neither their order nor the cut into blocks or files makes a
difference:

    null < integer < float                 an integer that no float holds exactly is text beside floats
    null < boolean, time, day < timestamp  everything else together is text

An integer is in canonical form: 007, +7 and digits beyond 64 bits are text, and stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.types as pt

from tasks.io import storage
from tasks.io.compiled import Compiled
from tasks.io.errors import SourceError
from tasks.io.tensors import Int64Array, UInt8Array

PIECE_BYTES = 64 * 2**20
"""Approximate bytes of a piece; a file of less than twice as much isn't cut."""

_BLOCK = 16 * 2**20

_FIELD, _TEXT, _QUOTED, _AFTER_QUOTE = range(4)  # at a field's start, within one, within quotes, after a quote there
_LINE_FEED, _RETURN, _DOUBLE_QUOTE, _COMMA = b'\n\r",'

_START = (_FIELD, 1, 0, 0, 0)
"""The place before a file's first byte, see `_follow`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a CSV file.

    Attributes:
        header: bytes of the file's header, from its beginning.
        start: offset of the piece's first byte.
        end: offset behind its last one.
        rows: rows in it, including malformed ones.
        first_row: number of its first row in the file, from 0.
        lines: lines of the file between the header and the piece.
    """

    header: int
    start: int
    end: int
    rows: int
    first_row: int
    lines: int


def cut(info: storage.FileInfo) -> tuple[Piece, ...]:
    """Return the pieces of a CSV file; none if it is better read as a whole."""
    if info.bytes < 2 * PIECE_BYTES or info.uri.lower().endswith(".gz"):
        return ()
    place = np.array(_START, np.int64)
    ends: list[Int64Array] = []
    offset = 0
    with storage.open_input(info.uri) as stream:
        while block := stream.read(_BLOCK):
            found = np.empty((_BLOCK // PIECE_BYTES + 2, 3), np.int64)
            ends.append(found[: _follow(np.frombuffer(block, np.uint8), offset, PIECE_BYTES, place, found)])
            offset += len(block)
    rows_end = [(int(end), int(rows), int(lines)) for end, rows, lines in np.concatenate(ends)]
    if not rows_end or rows_end[-1][0] == offset:
        rows_end = rows_end[:-1]
    if len(rows_end) < 2:
        return ()
    header = rows_end[0][0]
    total = int(place[2]) + (not place[1])
    bounds = [*rows_end, (offset, total, 0)]
    return tuple(
        Piece(header, start, end, after - before, before - 1, lines - rows_end[0][2])  # without the header's row
        for (start, before, lines), (end, after, _) in pairwise(bounds)
    )


_jit = Compiled(globals(), error_model="numpy")


@_jit
def _follow(
    text: UInt8Array,
    offset: int,
    piece: int,
    place: Int64Array,
    found: Int64Array,
) -> int:
    """Follow some text, field by field, and record the ends of rows at which pieces may end; return their number.

    Args:
        text: The text.
        offset: Its offset in the file.
        piece: Bytes of a piece.
        place: (5,): state, whether the line is blank so far, rows and lines that have ended, and the offset from which
            on the end of a row is wanted; at first `_START`, changed to the end of the text.
        found: Array for the ends, (n, 3): offset after the end of the row, rows and lines up to there.
    """
    state, blank, rows, lines, wanted = place[0], place[1], place[2], place[3], place[4]
    count = 0
    for at in range(len(text)):
        sign = text[at]
        if sign == _LINE_FEED:
            lines += 1
        if state == _QUOTED:
            if sign == _DOUBLE_QUOTE:
                state = _AFTER_QUOTE
            continue
        if state == _AFTER_QUOTE and sign == _DOUBLE_QUOTE:
            state = _QUOTED
            continue
        if sign in (_LINE_FEED, _RETURN):
            if not blank:
                rows += 1
            blank, state = 1, _FIELD
            if sign == _LINE_FEED and rows and offset + at + 1 >= wanted:
                found[count, 0], found[count, 1], found[count, 2] = offset + at + 1, rows, lines
                count += 1
                # The first is the header's; pieces begin after it.
                wanted = offset + at + 1 + piece
            continue
        blank = 0
        if sign == _COMMA:
            state = _FIELD
        elif sign == _DOUBLE_QUOTE and state == _FIELD:
            state = _QUOTED
        else:
            state = _TEXT
    place[0], place[1], place[2], place[3], place[4] = state, blank, rows, lines, wanted
    return count


class PieceText:
    """A piece as a separate file, with the header in front, to be read from the beginning."""

    def __init__(self, stream: pa.NativeFile, piece: Piece) -> None:
        self._stream, self._piece = stream, piece
        self._place = 0

    def read(self, size: int | None = None) -> bytes:
        """Return some bytes; none at the end."""
        header, start, end = self._piece.header, self._piece.start, self._piece.end
        if self._place == header < start:
            self._stream.seek(start)
            self._place = start
        stop = header if self._place < header else end
        left = stop - self._place
        data: bytes = self._stream.read(left if size is None else min(size, left))
        self._place += len(data)
        if size is None and stop == header:
            return data + self.read()
        return data

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


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


Kind = Literal["null", "integer", "wide", "float", "boolean", "date", "timestamp", "time", "text"]

TYPES: dict[Kind, pa.DataType] = {
    "null": pa.null(),
    "integer": pa.int64(),
    "wide": pa.int64(),
    "float": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
    "time": pa.time64("us"),
    "text": pa.string(),
}
EXACT = 2**53
"""Up to here a float represents every whole number."""

_JOINS: dict[frozenset[Kind], Kind] = {
    frozenset(("integer", "wide")): "wide",
    frozenset(("integer", "float")): "float",
    frozenset(("date", "timestamp")): "timestamp",
}
_TIME = pl.Datetime("us", "UTC")
_FORMS = (
    *("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d"),
    *("%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M%#z"),
)
"""No text matches two of them."""
_NO_FLOAT = r"^[+-]?0[0-9]|^\+|^-?[0-9]+$"
"""A leading zero or plus, and digits alone: an identifier, or an integer of another size."""


def join(kinds: Sequence[Kind]) -> Kind:
    """Return the narrowest kind that holds the values of all."""
    return reduce(_join, kinds, "null")


def _join(one: Kind, other: Kind) -> Kind:
    if other in (one, "null"):
        return one
    return other if one == "null" else _JOINS.get(frozenset((one, other)), "text")


def kind_of(values: pl.Series, missing: Sequence[str], found: Kind = "null") -> Kind:
    """Return the kind of all values of a column of text.

    Args:
        values: Some of them.
        missing: Text that means no value.
        found: Kind of the others.
    """
    rest = values.drop_nulls()
    if found in _TESTS or not any(map(_like_an_integer, missing)):
        # Most columns continue as they begin, so that this is enough for most blocks.
        found, rest = _sorted_out(found if found in _TESTS else "integer", found, rest)
    rest = rest.str.strip_chars()
    rest = rest.filter(~_any_of(rest, ("", *missing)))
    for kind in _TESTS:
        if found == "text" or not len(rest):
            return found
        found, rest = _sorted_out(kind, found, rest)
    return "text" if len(rest) else found


def _sorted_out(kind: Kind, found: Kind, values: pl.Series) -> tuple[Kind, pl.Series]:
    """Return the known kind joined with another, if some values are of it, and the values that aren't of it."""
    holds = _TESTS[kind](values).fill_null(value=False)
    if not holds.any():
        return found, values
    return _join(found, kind), values.clear() if holds.all() else values.filter(~holds)


def _like_an_integer(mark: str) -> bool:
    return mark.removeprefix("-").isdigit()


def _any_of(values: pl.Series, marks: Sequence[str]) -> pl.Series:
    return reduce(lambda one, other: one | other, (values == mark for mark in dict.fromkeys(marks)))


def _is_integer(text: pl.Series) -> pl.Series:
    return text.cast(pl.Int64, strict=False).cast(pl.String) == text


def _is_exact(text: pl.Series) -> pl.Series:
    return _is_integer(text) & text.cast(pl.Int64, strict=False).is_between(-EXACT, EXACT)


def _is_float(text: pl.Series) -> pl.Series:
    plain = text.cast(pl.Float64, strict=False).is_not_null() & ~text.str.contains(_NO_FLOAT)
    return plain | (text == "-0")


def _is_parsed(wanted: pl.DataType) -> Callable[[pl.Series], pl.Series]:
    def holds(text: pl.Series) -> pl.Series:
        return text.to_frame("x").select(as_type(pl.col("x"), wanted, "UTC"))["x"].is_not_null()

    return holds


_TESTS: dict[Kind, Callable[[pl.Series], pl.Series]] = {
    "integer": _is_exact,
    "wide": _is_integer,
    "float": _is_float,
    "boolean": _is_parsed(pl.Boolean()),
    "date": _is_parsed(pl.Date()),
    "timestamp": _is_parsed(pl.Datetime()),
    "time": _is_parsed(pl.Time()),
}


def polars_type(kind: pa.DataType) -> pl.DataType | None:
    """Return Polars' type for a column of an Arrow type; None for those that it can't read."""
    if pt.is_decimal256(kind):  # Polars panics
        return None
    try:
        frame = pl.from_arrow(pa.schema([pa.field("x", kind)]).empty_table())
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    assert isinstance(frame, pl.DataFrame)
    return frame.schema["x"]


def as_type(text: pl.Expr, wanted: pl.DataType, timezone: str) -> pl.Expr:
    """Return text as values of a type; null for values that don't fit."""
    match wanted:
        case pl.String():
            typed = text
        case pl.Boolean():
            typed = text.str.to_lowercase().replace_strict({"true": True, "false": False}, default=None)
        case pl.Date():
            typed = text.str.to_date("%Y-%m-%d", strict=False)
        case pl.Time():
            typed = pl.coalesce(text.str.to_time(form, strict=False) for form in ("%H:%M:%S%.f", "%H:%M"))
        case pl.Datetime():
            typed = parsed_time(text, timezone)
        case _:
            typed = text.str.strip_chars().cast(wanted, strict=False)
    return typed


def parsed_time(text: pl.Expr, timezone: str) -> pl.Expr:
    """Parse ISO 8601 with 'T' or a space, with or without seconds, fraction and offset; formats may differ row by row.

    Args:
        text: The times.
        timezone: IANA zone of those without an offset.
    """
    return text.map_batches(lambda values: _parsed(values.cast(pl.String), timezone), return_dtype=_TIME)


def _parsed(text: pl.Series, timezone: str) -> pl.Series:
    """Return times in UTC; usually all have one form, so that the other forms needn't be tried."""
    iso = text.str.strip_chars().str.replace("T", " ", literal=True).str.replace(r"[Zz]$", "+00:00")
    found = pl.Series(text.name, dtype=_TIME).extend_constant(None, len(text))
    for form in _FORMS:
        if found.null_count() == text.null_count():
            break
        times = iso.str.to_datetime(form, time_unit="us", strict=False, ambiguous="earliest")
        if times.null_count() == len(times):
            continue
        if times.dtype != _TIME:
            times = times.to_frame("x").select(localised(pl.col("x"), timezone))["x"]
        found = found.zip_with(found.is_not_null(), times)
    return found


def localised(naive: pl.Expr, timezone: str) -> pl.Expr:
    """Return times of a zone in UTC; null where the clock skipped them, the earlier of two equal ones."""
    local = naive.dt.replace_time_zone(timezone, ambiguous="earliest", non_existent="null")
    return local if timezone == "UTC" else local.dt.convert_time_zone("UTC")
