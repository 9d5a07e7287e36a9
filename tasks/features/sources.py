"""Source tables checked before any work starts: their files, schemas, row groups and fingerprints.

All faults of a source as a whole are found here, in the driver, with an error that names the
file, the column and the cure; faults of a single row are found in `rows.py`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pyarrow.types as pt

from tasks.engine.partition import frame_of
from tasks.features.csv_text import EXACT, TYPES, Kind, Piece, PieceText, QuotedText, cut, join
from tasks.io import storage
from tasks.io.errors import SourceError
from tasks.io.location import is_transient
from tasks.io.notation import DEFAULT, MissingValues, without
from tasks.store.manifest import InputFile, InputRecord

SUFFIXES = (".parquet", ".csv", ".csv.gz")
_CSV_BLOCK = 16 * 2**20
_HEAD = 2**20
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
INT64 = 2**63
"""From here on a whole number doesn't fit into 64 bits with a sign."""

Format = Literal["parquet", "csv"]


@dataclass(frozen=True, slots=True)
class ColumnValues:
    """Common properties of all values of a column of one file.

    kind: of text, and 'null' without any value; None otherwise for Parquet, whose schema has it. largest: the
    largest absolute value of whole numbers, as far as it matters. marks: text that would be missing in another column.
    """

    kind: Kind | None
    largest: int = 0
    marks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source. rows and row_groups (rows of each) are None for CSV, which doesn't record them.

    schema: columns of the file, those of CSV as text, and then of its path. in_path: values of the columns that its
    path names ('year=2024/month=01/…'), None for null. added: those of them that the file itself lacks.
    values: results of `schema.settled` about columns. pieces: those of a large CSV file; none for others.
    """

    info: storage.FileInfo
    format: Format
    schema: pa.Schema
    row_groups: tuple[int, ...] | None
    in_path: Mapping[str, str | None] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    values: Mapping[str, ColumnValues] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()

    def type_of(self, column: str) -> pa.DataType:
        """Return the type of a column; for CSV that of its values as far as they have been read."""
        values = self.values.get(column)
        return self.schema.field(column).type if values is None or values.kind is None else TYPES[values.kind]

    @property
    def rows(self) -> int | None:
        """Number of rows, if the file records it."""
        return None if self.row_groups is None else sum(self.row_groups)

    @property
    def estimated_rows(self) -> int:
        """Number of rows, if the file records it; a CSV file is assumed to have 50 bytes a row."""
        return self.info.bytes // 50 + 1 if self.rows is None else self.rows


@dataclass(frozen=True, slots=True)
class SourceTable:
    """All files of a source, sorted by name: their order is the order of the rows."""

    name: str
    uri: str
    files: tuple[SourceFile, ...]

    @property
    def unlike(self) -> Iterator[SourceFile]:
        """The files; of those with one schema and nothing known of their values only the first."""
        seen = set[int]()
        for file in self.files:
            if file.values:
                yield file
            elif id(file.schema) not in seen:
                seen.add(id(file.schema))
                yield file

    def has(self, column: str) -> bool:
        """Return True if every file has the column."""
        return all(column in file.schema.names for file in self.unlike)

    def types(self, column: str) -> dict[pa.DataType, str]:
        """Return the types of a column, each with a file that has it: Parquet's by file, one for all text together."""
        found = dict[pa.DataType, str]()
        texts = dict[str, Kind]()
        for file in self.unlike:
            values = file.values.get(column)
            if values is None or values.kind is None:
                found.setdefault(file.type_of(column), file.info.uri)
            else:
                texts[file.info.uri] = values.kind
        if texts:
            together = join(list(texts.values()))
            others = {kind for kind in found if not pt.is_null(kind)}
            if together == "boolean" and any(not pt.is_boolean(kind) for kind in others):
                together = "text"  # 'true' isn't a number
            found.setdefault(TYPES[together], next((uri for uri, kind in texts.items() if kind == together), "the CSV"))
        return found

    def largest(self, column: str) -> int:
        """Return the largest absolute value of whole numbers of a column, as far as it is known."""
        return max((file.values[column].largest for file in self.files if column in file.values), default=0)

    def type_of(self, column: str) -> pa.DataType:
        """Return the type of a column: the files', or if they differ one that holds the values of all.

        Raises:
            SourceError: there is no such type.
        """
        known = self.types(column)
        types = [kind for kind in known if not pt.is_null(kind)] or list(known)
        together = types[0] if len(types) == 1 else _common_type(types, self.largest(column))
        if together is None:
            told = " and ".join(f"{kind} in {known[kind]}" for kind in types[:2])
            raise SourceError(
                f"{self.name}: column '{column}' is of type {told}, which no type holds together: the files don't "
                f"share one schema; write the column in one type"
            )
        return together

    def estimated_rows(self) -> int:
        """Return the approximate number of rows of all files."""
        return sum(file.estimated_rows for file in self.files)

    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprint of each file, which reads it on a local disk."""
        return tuple(storage.in_threads(lambda file: storage.fingerprint(file.info), self.files))

    def record(self, rows: int | None, fingerprints: Sequence[str] = ()) -> InputRecord:
        """Return the manifest's record of this input; read the files' fingerprints, unless they are given."""
        prints = fingerprints or self.fingerprints()
        files = tuple(
            InputFile(uri=file.info.uri, bytes=file.info.bytes, fingerprint=fingerprint)
            for file, fingerprint in zip(self.files, prints, strict=True)
        )
        return InputRecord(name=self.name, uri=self.uri, rows=rows, files=files)


def _common_type(kinds: Sequence[pa.DataType], largest: int) -> pa.DataType | None:
    """Return a common type of several: text holds all plain ones, times hold days, floats small numbers."""
    plain = [kind.value_type if pt.is_dictionary(kind) else kind for kind in kinds]

    def all_are(*tests: Callable[[pa.DataType], bool]) -> bool:
        return all(any(test(kind) for test in tests) for kind in plain)

    texts = (pt.is_string, pt.is_large_string, pt.is_string_view)
    if all_are(pt.is_integer, pt.is_boolean):
        return pa.int64() if largest < INT64 else pa.string()
    if all_are(pt.is_integer, pt.is_boolean, pt.is_floating, pt.is_decimal):
        return pa.float64() if largest <= EXACT else pa.string()
    if all_are(pt.is_timestamp, pt.is_date):
        zoned = any(pt.is_timestamp(kind) and kind.tz is not None for kind in plain)
        return pa.timestamp("us", "UTC" if zoned else None)
    is_text = any(test(kind) for test in texts for kind in plain)
    if is_text and all_are(*texts, pt.is_integer, pt.is_boolean, pt.is_floating, pt.is_decimal, pt.is_temporal):
        return pa.string()
    return plain[0] if len(set(plain)) == 1 else None


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """Unit of reading: some row groups of a Parquet file, or a CSV file or a piece of it.

    rows: number of rows, approximate for a whole CSV file. first_row: number of its first row in the file, from 0.
    columns: the file's names of the columns to read. dictionary: those of them to read as dictionaries, which for a
    few values is several times as fast as text. in_path, added: as in the file. missing: text of CSV that means no
    value; typed: columns of keys, numbers, times.
    """

    uri: str
    format: Format
    columns: tuple[str, ...]
    row_groups: tuple[int, ...] = ()
    rows: int = 0
    first_row: int = 0
    dictionary: tuple[str, ...] = ()
    in_path: Mapping[str, str | None] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    missing: MissingValues = DEFAULT
    typed: tuple[str, ...] = ()
    piece: Piece | None = None

    @property
    def own(self) -> tuple[str, ...]:
        """Columns that the file itself has."""
        return tuple(name for name in self.columns if name not in self.added)


@dataclass(frozen=True, slots=True)
class RawRows:
    """An unchanged piece of a source; malformed counts CSV lines with a wrong number of fields."""

    frame: pl.DataFrame
    first_row: int
    malformed: tuple[str, ...] = ()


def inspect(name: str, uri: str) -> SourceTable:
    """Find the files of a source and read their schemas.

    Args:
        name: Role of the source, for messages.
        uri: A file, directory, glob or S3 prefix of Parquet or CSV files.

    Raises:
        SourceError: nothing is there, a file can't be read, or the source has no rows.
    """
    infos = storage.list_files(uri, suffixes=SUFFIXES)
    if not infos:
        found = storage.list_files(uri)
        hint = f"it holds {len(found)} other files, such as {found[0].uri}" if found else "nothing is there"
        raise SourceError(
            f"{name} '{uri}': no .parquet or .csv file found ({hint}); give a file, directory, glob or prefix"
        )
    table = inspect_files(name, uri, infos)
    if all(file.rows == 0 for file in table.files):
        raise SourceError(f"{name} '{uri}' has no rows in its {len(table.files)} files")
    return table


def inspect_files(name: str, uri: str, infos: Sequence[storage.FileInfo]) -> SourceTable:
    """Read the schemas of certain files of a source, at least one.

    Raises:
        SourceError: a file can't be read.
    """
    # Most files have the same schema: shared, a file takes 0.1 KB of the plan that each task gets, and not 1.2.
    known: dict[pa.Schema, pa.Schema] = {}
    files = [
        replace(file, schema=known.setdefault(file.schema, file.schema))
        for file in storage.in_threads(lambda info: _inspect_file(name, uri, info), infos)
    ]
    return SourceTable(name, uri, tuple(files))


def check_columns(table: SourceTable, wanted: Mapping[str, str]) -> None:
    """Check that every file has the wanted columns (ours → the file's names).

    Raises:
        SourceError: a file lacks one; the message names the file, the column, and the closest one or how to map it.
    """
    for file in table.unlike:
        for ours, theirs in wanted.items():
            if theirs not in file.schema.names:
                raise SourceError(_missing(table, file, ours, theirs))


def _missing(table: SourceTable, file: SourceFile, ours: str, theirs: str) -> str:
    names = file.schema.names
    close = [name for name in names if name.casefold() == theirs.casefold()] or get_close_matches(theirs, names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    if file.format == "csv" and (separator := _other_separator(names)):
        cure = f"Its fields are separated by {separator}; only commas are read: convert it."
    elif any(theirs in other.schema.names for other in table.files):
        cure = "Other files of the source have it: the files don't share one schema. Add it, or leave the file out."
    elif ours == theirs:
        cure = f"If it bears another name, map it: {how_to_map(table.name, ours)}."
    else:
        cure = f"The mapping says that it is '{ours}'."
    return f"{table.name}: {file.info.uri} has no column '{theirs}'.{hint} {cure} Its columns: {', '.join(names)}"


def _other_separator(names: Sequence[str]) -> str | None:
    """Return the separator of a CSV file whose header is one name."""
    separators = {";": "semicolons", "\t": "tabs", "|": "vertical bars", " ": "spaces"}
    return next((word for sign, word in separators.items() if len(names) == 1 and sign in names[0]), None)


def how_to_map(source: str, column: str) -> str:
    """Return the instruction for mapping a column of a source with another name."""
    if source in ("transactions", "customers", "products"):
        return f'--{source.removesuffix("s")}-columns \'{{"{column}": "…"}}\''
    return f"'mapping: {{{column}: …}}' of '{source}' in the definitions"


def read_units(
    table: SourceTable,
    columns: Sequence[str],
    rows_per_unit: int,
    dictionary: Sequence[str] = (),
    *,
    missing: MissingValues = DEFAULT,
    typed: Sequence[str] = (),
) -> list[ReadUnit]:
    """Cut a source into units of about `rows_per_unit` rows, never across files and in the files' order.

    A large CSV file is read in its pieces.

    Args:
        table: The source.
        columns: The file's names of the columns to read.
        rows_per_unit: Rows; a larger row group is a separate unit.
        dictionary: Columns to read as dictionaries, if a file has them as text.
        missing: Text of CSV that means no value.
        typed: Columns of keys, numbers and times.
    """
    units = []
    for file in table.files:
        whole = ReadUnit(
            uri=file.info.uri,
            format=file.format,
            columns=tuple(columns),
            in_path={name: value for name, value in file.in_path.items() if name in columns},
            added=file.added,
            missing=missing,
            typed=tuple(typed),
            rows=file.estimated_rows,
        )
        if file.row_groups is None:
            parts = [replace(whole, piece=piece, rows=piece.rows, first_row=piece.first_row) for piece in file.pieces]
            units += parts or [whole]
            continue
        texts = [name for name in dictionary if name not in file.added and pt.is_string(file.schema.field(name).type)]
        whole = replace(whole, dictionary=tuple(texts))
        groups: list[int] = []
        held = start = position = 0
        for index, rows in enumerate(file.row_groups):
            if groups and held + rows > rows_per_unit:
                units.append(replace(whole, row_groups=tuple(groups), rows=held, first_row=start))
                groups, held, start = [], 0, position
            groups.append(index)
            held += rows
            position += rows
        if held:
            units.append(replace(whole, row_groups=tuple(groups), rows=held, first_row=start))
    return units


def together(
    units: Sequence[ReadUnit], rows: int, kind: Callable[[ReadUnit], Hashable] = lambda _: None
) -> list[tuple[ReadUnit, ...]]:
    """Combine small units, so that a task reads about as many rows, however small the files are.

    Args:
        units: Units, which stay in order.
        rows: Rows of a task; a unit that has more is read by a separate task.
        kind: Units of different kinds aren't combined.

    Returns:
        The units of each task.
    """
    tasks: list[list[ReadUnit]] = []
    held = 0
    for unit in units:
        if not tasks or held + unit.rows > rows or kind(unit) != kind(tasks[-1][-1]):
            tasks.append([])
            held = 0
        tasks[-1].append(unit)
        held += unit.rows
    return [tuple(task) for task in tasks]


def read(unit: ReadUnit) -> Iterator[RawRows]:
    """Read a unit, a Parquet unit at once and a CSV file block by block, every CSV column as text.

    Raises:
        SourceError: the file can't be read or decoded.
    """
    try:
        if unit.format == "parquet":
            source = storage.open_input(unit.uri)
            # Checksums are verified if a file has some; without them a changed value isn't noticed.
            options = {"pre_buffer": True, "page_checksum_verification": True}
            with pq.ParquetFile(source, read_dictionary=list(unit.dictionary), **options) as file:
                table = file.read_row_groups(list(unit.row_groups), columns=list(unit.own), use_threads=False)
            yield RawRows(_frame(table, unit), unit.first_row)
        else:
            yield from _read_csv(unit)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as fault:
        raise SourceError(f"{unit.uri} can't be read as {unit.format}: {fault}") from fault
    except OSError as fault:
        # Arrow raises the same for damaged pages and for a broken connection: only the latter may be retried.
        if is_transient(fault) or not storage.exists(unit.uri):
            raise
        raise SourceError(f"{unit.uri} can't be read as {unit.format}, it may be damaged: {fault}") from fault


def _frame(table: pa.Table, unit: ReadUnit) -> pl.DataFrame:
    if unit.own:
        frame = frame_of(table.select(list(unit.own)), rechunk=False)
        frame.columns = list(unit.own)  # Polars names a column without a name
    else:
        frame = pl.DataFrame({"": pl.repeat(None, table.num_rows, eager=True)})
    if not unit.in_path:
        return frame
    for name, value in unit.in_path.items():
        if name in unit.added:
            frame = frame.with_columns(pl.lit(value, pl.String).alias(name))
        elif name in unit.columns:
            _check_path(frame[name], value, unit.uri)
    return frame.select(unit.columns)


def _check_path(values: pl.Series, said: str | None, uri: str) -> None:
    """Compare a column of a file with its value in the file's path, as text, number or time.

    Raises:
        SourceError: they differ.
    """
    if said is None:
        differ = values.is_not_null()
    else:
        text = values.cast(pl.String)
        same = text.str.starts_with(said) if values.dtype.is_temporal() else text == said
        number = pl.Series([said]).cast(pl.Float64, strict=False)[0]
        if number is not None:
            same |= text.cast(pl.Float64, strict=False) == number
        differ = ~same.fill_null(value=False)
    if differ.any():
        value = values.filter(differ)[0]
        raise SourceError(
            f"{uri}: column '{values.name}' holds {value!r}, but the file's path says {values.name}={said}; correct "
            f"one of them, or map another column"
        )


def _read_csv(unit: ReadUnit) -> Iterator[RawRows]:
    malformed: list[str] = []

    def note(row: pa_csv.InvalidRow) -> str:
        malformed.append(row.text or "")
        return "skip"

    typed = [name for name in unit.typed if name in unit.own] if unit.missing.ambiguous else []
    nulls = [without(pl.col(name), unit.missing.ambiguous) for name in typed]
    position, stream = unit.first_row, _open_text(unit.uri)
    if unit.piece is None:
        checked = QuotedText(unit.uri, stream)
    else:
        checked = QuotedText(unit.uri, PieceText(stream, unit.piece), unit.piece.lines)
    text = pa.PythonFile(checked, mode="r")
    with text, _open_csv(text, unit, note) as reader:
        for batch in reader:
            frame = _frame(pa.Table.from_batches([batch]), unit).with_columns(nulls)
            yield RawRows(frame, position, tuple(malformed))
            position += frame.height + len(malformed)
            malformed.clear()
    if malformed:
        empty = pl.DataFrame(schema=dict.fromkeys(unit.columns, pl.String))
        yield RawRows(empty, position, tuple(malformed))


def _open_text(uri: str) -> pa.NativeFile:
    stream = storage.open_input(uri)
    return pa.CompressedInputStream(stream, "gzip") if uri.lower().endswith(".gz") else stream


def _open_csv(stream: pa.NativeFile, unit: ReadUnit, on_invalid: object) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        stream,
        read_options=pa_csv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False),
        parse_options=pa_csv.ParseOptions(invalid_row_handler=on_invalid, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(unit.own, pa.string()),
            include_columns=list(unit.own),
            strings_can_be_null=True,
            null_values=list(unit.missing.text),
        ),
    )


def _inspect_file(name: str, uri: str, info: storage.FileInfo) -> SourceFile:
    try:
        if info.uri.lower().endswith(".parquet"):
            metadata = pq.read_metadata(storage.open_input(info.uri))
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            file = SourceFile(info, "parquet", metadata.schema.to_arrow_schema().remove_metadata(), groups)
        else:
            schema, empty = _csv_schema(info.uri)
            file = SourceFile(info, "csv", schema, (0,) if empty else None, pieces=cut(info))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as fault:
        kind = "parquet" if info.uri.lower().endswith(".parquet") else "csv"
        raise SourceError(
            f"{name}: {info.uri} can't be read as {kind}: {str(fault).splitlines()[0]}; "
            f"it may be cut short, of another format, or not in UTF-8"
        ) from fault
    except FileNotFoundError as fault:
        raise SourceError(
            f"{name}: {info.uri} isn't there: it is a link that leads nowhere, or was removed since it was listed; "
            "fetch what the link names (as 'git annex get' and 'dvc pull' do), or remove it"
        ) from fault
    names = file.schema.names
    if twice := sorted({column for column in names if names.count(column) > 1}):
        raise SourceError(f"{name}: {info.uri} has several columns named '{twice[0]}'; rename or remove one of them")
    in_path = _path_values(uri, info.uri)
    added = tuple(column for column in in_path if column not in names)
    schema = pa.schema([*file.schema, *(pa.field(column, pa.string()) for column in added)])
    return replace(file, schema=schema, in_path=in_path, added=added)


def _path_values(source: str, uri: str) -> dict[str, str | None]:
    """Return the columns in the names of directories below a source, as Hive does: 'year=2024/place=New%20York/…'."""
    base = storage.normalise(source)
    place = re.split(r"[*?\[]", base, maxsplit=1)[0].rpartition("/")[0] if glob.has_magic(base) else base
    pairs = (part.partition("=") for part in uri.removeprefix(place).split("/")[:-1]) if uri.startswith(place) else ()
    return {name: None if value == _HIVE_NULL else unquote(value) for name, sign, value in pairs if name and sign}


def _csv_schema(uri: str) -> tuple[pa.Schema, bool]:
    """Return the names of the columns, and True if there are no rows; the beginning must be text in UTF-8."""
    with _open_text(uri) as stream:
        try:
            head = stream.read(_HEAD)
        except OSError as fault:
            if is_transient(fault) or not uri.lower().endswith(".gz"):
                raise
            raise pa.ArrowInvalid(f"it can't be decompressed: {fault}") from fault
    header = head.split(b"\n", 1)[0].decode("utf-8-sig")
    if not header.strip():
        raise pa.ArrowInvalid("the file is empty: it has not even a header")
    if "\0" in header:
        raise pa.ArrowInvalid("its header holds NUL bytes, as UTF-16 does: write it in UTF-8")
    whole = len(head) < _HEAD
    head = head + b"\n" if whole else head[: head.rfind(b"\n") + 1]
    malformed: list[pa_csv.InvalidRow] = []

    def note(row: pa_csv.InvalidRow) -> str:
        malformed.append(row)
        return "skip"

    def parsed(types: Mapping[str, pa.DataType]) -> pa.Table:
        return pa_csv.read_csv(
            pa.BufferReader(head),
            parse_options=pa_csv.ParseOptions(invalid_row_handler=note, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=types),
        )

    names = parsed({}).column_names
    table = parsed(dict.fromkeys(names, pa.string()))  # finds invalid UTF-8
    return pa.schema([pa.field(name, pa.string()) for name in names]), whole and not table.num_rows and not malformed
