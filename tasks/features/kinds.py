"""Types of files' columns that can be read as each kind of column: checked before any row is read. Pure.

Other types are refused, not cast: ticks of a time would be amounts, the text of a struct a key.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.types as pt

from tasks.features.definitions import ColumnKind
from tasks.features.settling import whole_numbers
from tasks.features.sources import SourceTable, how_to_map
from tasks.features.texts import polars_type
from tasks.io.errors import SourceError

Test = Callable[[pa.DataType], bool]

_TEXT: tuple[Test, ...] = (pt.is_string, pt.is_large_string, pt.is_string_view)
_NUMBERS: tuple[Test, ...] = (pt.is_integer, pt.is_floating, pt.is_decimal)
_DIGITS = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_BYTES: tuple[Test, ...] = (pt.is_binary, pt.is_large_binary)
_READABLE: Mapping[ColumnKind, tuple[Test, ...]] = {
    "number": (*_NUMBERS, *_TEXT, pt.is_boolean, pt.is_null),
    "key": (*_NUMBERS, *_TEXT, *_BYTES, pt.is_date, pt.is_null),
    "category": (*_NUMBERS, *_TEXT, *_BYTES, pt.is_boolean, pt.is_date, pt.is_null),
    "time": (pt.is_timestamp, pt.is_date, pt.is_integer, pt.is_string, pt.is_large_string, pt.is_null),
}
_WANTED: Mapping[ColumnKind, str] = {
    "number": "integers, floats, decimals, or text of numbers",
    "key": "whole numbers or text",
    "category": "text, numbers or booleans",
}


def check_kind(table: SourceTable, kind: ColumnKind, ours: str, theirs: str, mapping: str | None = None) -> None:
    """Check that a column of every file can be read as its declared kind.

    Args:
        table: The source, whose files all have the column; settled, if it has CSV files.
        kind: Kind to read it as; 'time' is judged by `check_times`.
        ours: Our name for it.
        theirs: The files' name for it.
        mapping: Instruction for mapping another column, if not that of `how_to_map`.

    Raises:
        SourceError: a column can't; the message names the file, the column, its type and the expected one.

    """
    types: dict[pa.DataType, str] = {}
    for file in table.files:
        types.setdefault(file.type_of(theirs), file.info.uri)
    for found, uri in types.items():
        where = f"{table.name}: column '{theirs}' of {uri} is of type {found}"
        if polars_type(found) is None:
            raise SourceError(f"{where}, which can't be read; convert it to a plain type such as double or string")
        if kind in _WANTED and not _is_readable(found, kind):
            raise SourceError(
                f"{where}, but '{ours}' is a {kind}: it must be {_WANTED[kind]}; convert it, or map another column: "
                f"{mapping or how_to_map(table.name, ours)}"
            )


def check_times(table: SourceTable, column: str, epoch_unit: str | None, where: str | None = None) -> None:
    """Check that a column of every file can be read as times.

    Args:
        table: The source, settled by the column's first block.
        column: The files' name of the column.
        epoch_unit: Unit of integers, if given.
        where: Name of the source in messages, if it isn't the table's.

    Raises:
        SourceError: it can't, or holds integers that are dates, or integers without a given unit.

    """
    where = where or table.name
    for file in table.files:
        kind = file.type_of(column)
        if pt.is_integer(kind):
            ends = whole_numbers(file, column)
            if ends is not None and all(map(is_date, ends)):
                raise SourceError(
                    f"{where}: the time column '{column}' of {file.info.uri} holds integers such as {ends[0]}: they "
                    f"are dates, not counts since 1970; write them as ISO 8601, {iso_date(ends[0])}"
                )
            if epoch_unit is None:
                raise SourceError(
                    f"{where}: the time column '{column}' holds integers ({kind}); say what they count since 1970: "
                    f"--epoch-unit s, ms, us or ns"
                )
        if not _is_readable(kind, "time"):
            raise SourceError(
                f"{where}: the time column '{column}' is of type {kind}; it must be a timestamp, date, "
                f"ISO 8601 text, or an integer with --epoch-unit"
            )


def is_date(number: int) -> bool:
    """Return True if a whole number reads as a date of 1900 to 2099: YYYYMMDD, optionally with HHMM or HHMMSS."""
    return iso_date(number) is not None


def iso_date(number: int) -> str | None:
    """Return such a number in ISO 8601; None for any other."""
    text = str(number)
    if len(text) not in _DIGITS or not 1900 <= int(text[:4]) < 2100:
        return None
    try:
        moment = dt.datetime.strptime(text, _DIGITS[len(text)]).replace(tzinfo=dt.UTC)
    except ValueError:
        return None
    return f"{moment:%Y-%m-%d}" if len(text) == 8 else f"{moment:%Y-%m-%dT%H:%M:%S}"


def _is_readable(kind: pa.DataType, wanted: ColumnKind) -> bool:
    if pt.is_dictionary(kind) and wanted != "time":
        kind = kind.value_type
    return any(test(kind) for test in _READABLE[wanted])
