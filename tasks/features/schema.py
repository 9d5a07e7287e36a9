"""Schema of a source: types of its columns, decided by all of their values and checked before any row is judged.

A CSV file doesn't declare its columns' types, and its beginning doesn't predict the rest: zip codes that begin
in another state get leading zeros. So each CSV file is read once for the columns whose type matters, until they
prove to be text. A Parquet file declares its types, but not which values fit a type that must also hold those of other
files; its statistics do.

Files' types that can't be read as the declared kind of column are refused, not cast: ticks of a time would be amounts,
the text of a struct a key.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from tasks.features.csv_text import EXACT, Kind, as_type, kind_of, polars_type
from tasks.features.definitions import ColumnKind
from tasks.features.sources import (
    ColumnValues,
    ReadUnit,
    SourceFile,
    SourceTable,
    check_columns,
    how_to_map,
    inspect_files,
    read,
    read_units,
)
from tasks.io import storage
from tasks.io.errors import SourceError
from tasks.io.notation import DEFAULT, MissingValues
from tasks.io.text import shortened

_SAMPLE = 10_000
_SHOWN = 200


def settled(
    table: SourceTable, columns: Iterable[str], missing: MissingValues, sampled: Iterable[str] = ()
) -> SourceTable:
    """Return the table with the types that its values determine for some columns.

    Args:
        table: The source, whose files all have the columns.
        columns: Columns whose type must hold for every value.
        missing: Text of CSV that means no value.
        sampled: Columns for which the first rows of each CSV file are enough.

    Raises:
        SourceError: a file can't be read.
    """
    whole = tuple(dict.fromkeys(columns))
    first = tuple(name for name in dict.fromkeys(sampled) if name not in whole)
    differing = [name for name in whole if _may_not_fit(table, name)]
    if not differing and all(file.format == "parquet" and not file.added for file in table.files):
        return table

    def settle(file: SourceFile) -> SourceFile:
        found = {name: _of_path(file.in_path[name], missing) for name in (*whole, *first) if name in file.added}
        if file.format == "csv":
            all_of, some_of = ([name for name in names if name not in found] for names in (whole, first))
            found |= _of_csv(file, all_of, some_of, missing)
        elif wanted := [name for name in differing if name not in found]:
            found |= _of_parquet(file, wanted)
        return replace(file, values={**file.values, **found})

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return replace(table, files=tuple(pool.map(settle, table.files)))


def _may_not_fit(table: SourceTable, column: str) -> bool:
    """Return True if a type for the column depends on values of Parquet files."""
    types = {file.schema.field(column).type for file in table.unlike}
    return len(types) > 1 or pa.uint64() in types


def _of_path(value: str | None, missing: MissingValues) -> ColumnValues:
    return _values(kind_of(pl.Series([value], dtype=pl.String), missing.typed))


def _values(kind: Kind, marks: tuple[str, ...] = ()) -> ColumnValues:
    return ColumnValues(kind, EXACT + 1 if kind == "wide" else 0, marks)


def _of_csv(
    file: SourceFile, whole: Sequence[str], first: Sequence[str], missing: MissingValues
) -> dict[str, ColumnValues]:
    """Read a CSV file as long as a column may still prove to be of another type."""
    pending = [*whole, *first]
    kinds: dict[str, Kind] = dict.fromkeys(pending, "null")
    marks: dict[str, tuple[str, ...]] = {}
    unit = ReadUnit(file.info.uri, "csv", tuple(pending), missing=missing)
    for raw in read(unit) if pending and file.rows != 0 else ():
        for name in pending:
            values = raw.frame[name] if name in whole else raw.frame[name][:_SAMPLE]
            kinds[name] = kind_of(values, missing.typed, kinds[name])
        if not marks:
            marks = {name: _marks(raw.frame[name], missing) for name in kinds}
        pending = [name for name in pending if kinds[name] != "text" and name in whole]
        if not pending:
            break
    return {name: _values(kind, marks.get(name, ())) for name, kind in kinds.items()}


def _marks(values: pl.Series, missing: MissingValues) -> tuple[str, ...]:
    return tuple(sorted(values.filter(values.is_in(missing.ambiguous)).unique()))


def _of_parquet(file: SourceFile, columns: Sequence[str]) -> dict[str, ColumnValues]:
    """Return columns without any value and magnitudes of whole numbers: from statistics, else from the values."""
    found = {}
    with storage.open_input(file.info.uri) as source, pq.ParquetFile(source) as opened:
        for name in columns:
            kind = file.schema.field(name).type
            if pt.is_floating(kind) or pt.is_integer(kind):
                empty, low, high = _extremes(opened, name)
                largest = max(abs(low), abs(high)) if pt.is_integer(kind) and not empty else 0
                found[name] = ColumnValues("null" if empty else None, largest)
    return found


def _extremes(file: pq.ParquetFile, column: str) -> tuple[bool, int, int]:
    """Return True if a column has no value, and its smallest and largest ones."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    found = []
    for group in groups:
        chunks = map(group.column, range(group.num_columns))
        statistics = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == column)
        if statistics is not None and statistics.has_null_count and statistics.null_count == group.num_rows:
            continue
        if statistics is None or not statistics.has_min_max:
            break
        found += [statistics.min, statistics.max]
    else:
        return not found, min(found, default=0), max(found, default=0)
    values = file.read(columns=[column])[column]
    ends = pc.min_max(values)
    return values.null_count == len(values), ends["min"].as_py() or 0, ends["max"].as_py() or 0


def read_csv(name: str, uri: str, infos: Sequence[storage.FileInfo]) -> pa.Table:
    """Read CSV files as a whole, each column with the type that all of its values have.

    Args:
        name: Role of the rows, for messages.
        uri: Place where they were found.
        infos: The files, at least one, in the order of the rows.

    Raises:
        SourceError: a file can't be read, lacks a column of the others, or has a line with another number of fields.
    """
    table = inspect_files(name, uri, infos)
    names = list(dict.fromkeys(column for file in table.files for column in file.schema.names))
    check_columns(table, {column: column for column in names})
    table = settled(table, names, DEFAULT)
    types = {column: polars_type(table.type_of(column)) or pl.String() for column in names}
    typed = [as_type(pl.col(column), wanted, "UTC").alias(column) for column, wanted in types.items()]
    frames = [pl.DataFrame(schema=dict.fromkeys(names, pl.String)).select(typed)]
    for unit in read_units(table, names, 1):
        for raw in read(unit):
            if raw.malformed:
                raise SourceError(
                    f"{name}: {unit.uri} has a line of another number of fields than its header's {len(names)}: "
                    f"'{shortened(raw.malformed[0], _SHOWN)}'; correct it, or quote text that holds commas"
                )
            frames.append(raw.frame.select(typed))
    return pl.concat(frames).to_arrow()


def whole_numbers(file: SourceFile, column: str) -> tuple[int, int] | None:
    """Return the smallest and largest value of a column of whole numbers, for CSV of its first block; None without any.

    Raises:
        SourceError: the file can't be read.
    """
    if file.format == "parquet" and column not in file.added:
        with storage.open_input(file.info.uri) as source, pq.ParquetFile(source) as opened:
            empty, low, high = _extremes(opened, column)
        return None if empty else (low, high)
    if column in file.added:
        text = pl.Series([file.in_path[column]], dtype=pl.String)
    else:
        text = next(read(ReadUnit(file.info.uri, "csv", (column,)))).frame[column]
    values = text.str.strip_chars().cast(pl.Int64, strict=False).drop_nulls()
    return (values.min(), values.max()) if len(values) else None  # type: ignore[return-value]


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
    for file in table.unlike:
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
