"""The labels file as a table of text: class and group of each image."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from tasks.images.sources import as_frame, as_table, shown
from tasks.io import storage
from tasks.io.errors import SourceError
from tasks.io.faults import is_transient
from tasks.io.notation import DEFAULT, MissingValues, without
from tasks.io.text import shortened
from tasks.store.manifest import InputFile, InputRecord

_TEXT = pa.string()
LABELS = pa.schema([("row", pa.int64()), *((name, _TEXT) for name in ("image_id", "class_name", "group", "malformed"))])

_POLARS = {name: pl.Int64 if name == "row" else pl.String for name in LABELS.names}
_SHOWN = 200
_BLOCK = 2**30  # a single block, if possible: no row may be longer than a block
_EXACT = 2.0**53
_NOT_TEXT = {
    b"\x1f\x8b": "it is compressed with gzip: decompress it",
    b"PK": "it is a zip file or an Excel workbook: save it as CSV in UTF-8",
    b"\xff\xfe": "it is in UTF-16: save it in UTF-8",
    b"\xfe\xff": "it is in UTF-16: save it in UTF-8",
}


def read_labels(
    uri: str,
    id_column: str,
    class_column: str,
    group_column: str | None = None,
    missing: MissingValues = DEFAULT,
) -> pa.Table:
    """Read a CSV or Parquet file of labels, all values as text.

    Text is unchanged: '007' stays. Parquet's whole floats, as data frames with nulls hold integers, become '7',
    and NaN becomes null. In CSV the missing values are null: a class is text, ids and groups are keys. A file is
    Parquet by its first bytes or its suffix, else CSV: separated by commas, or by tabs if its suffix is '.tsv'.

    Returns:
        Columns of `LABELS`, in the file's order. row: number in the file from 0, header and blank lines not counted.
        malformed: the text of a CSV line with a wrong number of fields, whose other columns are null.

    Raises:
        SourceError: the file is missing, empty, unreadable, or lacks these columns.
    """
    location = storage.normalise(uri)
    wanted = {"id_column": id_column, "class_column": class_column}
    if group_column is not None:
        wanted["group_column"] = group_column
    malformed: dict[int, str] = {}
    try:
        with storage.open_input(location) as source:
            head = source.read(4)
            source.seek(0)
            if head == b"PAR1" or location.lower().endswith(".parquet"):
                table = _read_parquet(source, wanted)
            else:
                separator = "\t" if location.lower().endswith(".tsv") else ","
                table = _read_csv(source.read(), wanted, separator, malformed, missing=missing)
    except SourceError as fault:
        raise SourceError(f"labels '{shown(uri)}': {fault}") from fault.__cause__
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, csv.Error, UnicodeDecodeError) as fault:
        raise SourceError(
            f"labels '{shown(uri)}' can't be read: {shown(str(fault).splitlines()[0])}; "
            "give a Parquet file, or CSV in UTF-8 (is it cut short, of another format, or a quote left open?)"
        ) from fault
    except OSError as fault:
        # Arrow raises the same for damaged pages and for a broken connection: only the latter may be retried.
        if is_transient(fault):
            raise
        raise SourceError(f"labels '{shown(uri)}' can't be read: {_cause(location, fault)}") from fault
    if not table.num_rows + len(malformed):
        raise SourceError(f"labels '{shown(uri)}' have no rows below the columns' names; give a row for each image")
    numbers = np.delete(np.arange(table.num_rows + len(malformed)), list(malformed))
    columns = {name: table[column] for name, column in zip(LABELS.names[1:], wanted.values(), strict=False)}
    good = pl.DataFrame({"row": numbers}).with_columns(
        **{name: as_frame(pa.table({name: column}))[name] for name, column in columns.items()}
    )
    bad = pl.DataFrame({"row": list(malformed), "malformed": list(malformed.values())}, schema_overrides=_POLARS)
    frame = pl.concat([pl.DataFrame(schema=_POLARS), good, bad], how="diagonal").sort("row")
    return as_table(frame, LABELS)


def labels_record(uri: str, rows: int) -> InputRecord:
    """Return the manifest's record of the labels' file; read its fingerprint."""
    (info,) = storage.list_files(uri)
    entry = InputFile(uri=info.uri, bytes=info.bytes, fingerprint=storage.fingerprint(info))
    return InputRecord(name="labels", uri=uri, rows=rows, files=(entry,))


def _cause(location: str, fault: OSError) -> str:
    infos = [] if isinstance(fault, PermissionError) else storage.list_files(location)
    if infos and infos[0].uri != location:
        return f"it is a directory; give one file of it, such as {shown(infos[0].uri)}"
    if infos or isinstance(fault, PermissionError):
        return f"{fault}; it may be damaged, or not yours to read"
    return "no such file; correct the location"


def _read_parquet(source: pa.NativeFile, wanted: Mapping[str, str]) -> pa.Table:
    with pq.ParquetFile(source) as file:
        _check_columns(file.schema_arrow.names, wanted)
        table = file.read(columns=list(dict.fromkeys(wanted.values())))
    texts = {}
    for name in wanted.values():
        try:
            texts[name] = _as_text(table[name])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as fault:
            kind = table.schema.field(name).type
            raise SourceError(f"column '{name}' of type {kind} can't be read as text; give text or numbers") from fault
    return pa.table(texts)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    text = column.cast(_TEXT)
    if not pa.types.is_floating(column.type):
        return text
    whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), _EXACT))
    text = pc.if_else(whole, column.cast(pa.int64(), safe=False).cast(_TEXT), text)
    return pc.if_else(pc.is_nan(column), None, text)


def _read_csv(
    data: bytes, wanted: Mapping[str, str], separator: str, malformed: dict[int, str], *, missing: MissingValues
) -> pa.Table:
    """Read the wanted columns as text; collect lines with a wrong number of fields in `malformed`, by row."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        hint = next((hint for start, hint in _NOT_TEXT.items() if data.startswith(start)), "save it in UTF-8")
        line = data.count(b"\n", 0, fault.start) + 1
        raise SourceError(f"line {line} is no UTF-8 ({fault.reason} at byte {fault.start:,}); {hint}") from fault
    header = next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row), None)
    if header is None:
        raise SourceError("the file is empty: it has not even a header; give a row for each image")
    _check_columns(header, wanted)

    def note(row: pa_csv.InvalidRow) -> str:
        malformed[row.number - 2] = shown(shortened(row.text or "", _SHOWN))  # rows count from 1, with the header
        return "skip"

    table = pa_csv.read_csv(
        pa.BufferReader(data),
        # Rows have numbers only if one thread reads them.
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=min(max(len(data) + 1, 2**20), _BLOCK)),
        parse_options=pa_csv.ParseOptions(delimiter=separator, invalid_row_handler=note, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(wanted.values(), _TEXT),
            include_columns=list(dict.fromkeys(wanted.values())),
            strings_can_be_null=True,
            null_values=list(missing.text),
        ),
    )
    keys = {column for setting, column in wanted.items() if setting != "class_column"} - {wanted["class_column"]}
    nulls = [without(pl.col(column), missing.ambiguous) for column in sorted(keys)] if missing.ambiguous else []
    return as_table(as_frame(table).with_columns(nulls), table.schema)


def _check_columns(names: Sequence[str], wanted: Mapping[str, str]) -> None:
    for setting, column in wanted.items():
        count = names.count(column)
        if count > 1:
            raise SourceError(f"several columns are named '{column}'; rename or remove one of them")
        if not count:
            close = get_close_matches(column.lower(), [name.lower() for name in names], n=1)
            found = next(name for name in names if name.lower() == close[0]) if close else None
            hint = f" Did you mean '{shown(found)}'?" if found is not None else ""
            if len(names) == 1 and (other := next((mark for mark in ";\t| " if mark in names[0]), None)):
                hint = f" Fields seem to be separated by {other!r}; save it with commas."
            there = shortened(shown(", ".join(names)), 5 * _SHOWN)
            raise SourceError(f"no column '{column}'.{hint} Set {setting} to one of its columns: {there}")
