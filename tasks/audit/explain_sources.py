"""Source files as they are now against what a version recorded of them, and the rows of one key in them.

Sources are read as the flow reads them (`tasks.features.rows`), but first by the key alone; the other columns only of
row groups that have it. Python files of definitions aren't run: what a version names may have come from anywhere.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import polars as pl

from tasks.audit.explain_rows import is_whole
from tasks.core import storage
from tasks.core.errors import PipelineError
from tasks.core.manifest import InputFile, InputRecord, Manifest
from tasks.core.missing import missing_values
from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Definitions, DimensionSource, EventSource
from tasks.features.keys import KeyType
from tasks.features.loading import is_yaml, load_definitions
from tasks.features.plan import key_type_of, names_in_files, units_of, with_uris
from tasks.features.rows import REASON, ColumnPlan, RowPlan, judge
from tasks.features.settling import settled
from tasks.features.sources import ReadUnit, SourceTable, inspect_files, read
from tasks.features.standard import STANDARD

State = Literal["unchanged", "changed since", "gone"]
_READERS = 16
_ROWS_AT_ONCE = 1  # row groups are looked into one by one


@dataclass(frozen=True, slots=True)
class FileNow:
    """A file of a source that a version was made from, and what has become of it; info is None where it is gone."""

    source: str
    recorded: InputFile
    state: State
    info: storage.FileInfo | None

    def told(self) -> dict[str, Any]:
        """As a row of a table."""
        recorded = self.recorded
        return {"file": recorded.uri, "bytes": recorded.bytes, "fingerprint": recorded.fingerprint, "now": self.state}


def files_now(record: InputRecord) -> list[FileNow]:
    """Every file of an input, compared with its fingerprint; on a local disk that reads it."""

    def look(file: InputFile) -> FileNow:
        infos = [info for info in storage.list_files(file.uri, include_hidden=True) if info.uri == file.uri]
        if not infos:
            return FileNow(record.uri, file, "gone", None)
        same = infos[0].bytes == file.bytes and storage.fingerprint(infos[0]) == file.fingerprint
        return FileNow(record.uri, file, "unchanged" if same else "changed since", infos[0])

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(look, record.files))


@dataclass(slots=True)
class KeyedRows:
    """The rows of a key in one file.

    kept: typed rows under our names, with `row`, their number in the file. rejected: number of rows by reason.
    groups, of_groups: pieces of the file whose other columns were read, of all.
    """

    kept: pl.DataFrame
    rejected: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    of_groups: int = 0


ROW = "row"


def rows_of_key(now: FileNow, plan: RowPlan, key: str, value: int | str) -> KeyedRows:
    """Rows of a key in a file, each kept or rejected as the flow does it.

    Args:
        now: The file, which is there.
        plan: How the source is read.
        key: Our name of the key column.
        value: The key.

    Raises:
        SourceError: the file can't be read.

    """
    assert now.info is not None, "what is gone can't be read"
    (file,) = inspect_files(plan.source, now.source, [now.info]).files
    key_column = next(column for column in plan.columns if column.name == key)
    by_key = replace(plan, columns=(replace(key_column, required=False),), time=None, as_of=None, reject_negative=())
    found = KeyedRows(_nothing(plan))
    parts = []
    for unit in units_of(SourceTable(plan.source, now.source, (file,)), plan, _ROWS_AT_ONCE):
        found.of_groups += 1
        if not _has(unit, by_key, key_column.source_name, key, value):
            continue
        found.groups += 1
        for raw in read(unit):
            mine = judge(raw.frame, by_key).kept[key] == value
            numbers = pl.Series(ROW, range(raw.first_row, raw.first_row + raw.frame.height), pl.Int64)
            frame, rows = raw.frame.filter(mine.fill_null(False)), numbers.filter(mine.fill_null(False))
            judged = judge(frame, plan)
            found.rejected.update(judged.rejected[REASON].to_list())
            good = ~pl.Series(range(frame.height), dtype=pl.Int64).is_in(judged.rejected_rows.implode())
            parts.append(judged.kept.with_columns(rows.filter(good)))
    if parts:
        found.kept = pl.concat([found.kept, *parts], how="vertical_relaxed")
    return found


def _has(unit: ReadUnit, by_key: RowPlan, source_name: str, key: str, value: int | str) -> bool:
    if unit.format == "csv":  # text is read as a whole anyway
        return True
    rows = read(replace(unit, columns=(source_name,)))
    return any((judge(raw.frame, by_key).kept[key] == value).any() for raw in rows)


def _nothing(plan: RowPlan) -> pl.DataFrame:
    raw = pl.DataFrame(schema={column.source_name: pl.String for column in plan.columns})
    return judge(raw, plan).kept.with_columns(pl.Series(ROW, [], pl.Int64))


@dataclass(frozen=True, slots=True)
class Declared:
    """Sources as a version's configuration declares them, and why some may be missing."""

    definitions: Definitions
    config: FeatureStoreConfig
    note: str = ""


def declared_sources(manifest: Manifest) -> Declared:
    """Sources of a feature version or a training set; Python files aren't run.

    Raises:
        PipelineError: the configuration isn't one of this version of the project.

    """
    try:
        config = FeatureStoreConfig.model_validate(manifest.config)
    except ValueError as fault:
        raise PipelineError(f"the version's configuration can't be read here: {str(fault).splitlines()[0]}") from fault
    definitions, note = STANDARD, ""
    if config.definitions is not None:
        try:
            if is_yaml("definitions", config.definitions):
                definitions = load_definitions(config.definitions).over(STANDARD)
            else:
                note = f"the definitions stand in {config.definitions}, a Python file, which isn't run for an answer"
        except PipelineError as fault:
            note = str(fault)
    return Declared(with_uris(definitions, config), config, note)


def event_plan(declared: Declared, source: EventSource, entity: str, manifest: Manifest, table: SourceTable) -> RowPlan:
    """How the events of a source are read, as far as it decides which rows of an entity count."""
    config = declared.config
    amount = config.negative_amounts == "reject" and "amount" in source.columns
    missing = missing_values(config.null_values)
    keys = [source.mapping.get(ours, ours) for ours, spec in source.columns.items() if spec.kind == "key"]
    table = settled(table, [theirs for theirs in keys if table.has(theirs)], missing)
    columns = []
    mapping = names_in_files(source, table)
    for ours, spec in source.columns.items():
        theirs = mapping.get(ours, ours)
        needed = spec.required or ours in (entity, source.time) or (amount and ours == "amount")
        if needed and all(theirs in file.schema.names for file in table.files):
            kind = _key_type(manifest, entity) if ours == entity else key_type_of(table, theirs)
            plan = ColumnPlan(
                name=ours, source_name=theirs, kind=spec.kind, required=spec.required, key_type=kind or "string"
            )
            columns.append(plan)
    return RowPlan(
        source=source.name,
        columns=tuple(columns),
        time=source.time,
        earliest=config.earliest,
        timezone=config.timezone,
        epoch_unit=config.epoch_unit,
        reject_negative=("amount",) if amount and any(column.name == "amount" for column in columns) else (),
        missing=missing,
    )


def dimension_plan(source: DimensionSource, manifest: Manifest) -> RowPlan:
    """How the rows of a dimension are found by their key."""
    theirs = source.mapping.get(source.key, source.key)
    key = ColumnPlan(
        name=source.key, source_name=theirs, kind="key", required=True, key_type=_key_type(manifest, source.key)
    )
    return RowPlan(source=source.name, columns=(key,), missing=missing_values(manifest.config.get("null_values")))


def _key_type(manifest: Manifest, column: str) -> KeyType:
    return "int64" if is_whole(manifest, column) else "string"


def table_of(record: InputRecord, files: Sequence[FileNow]) -> SourceTable | None:
    """The files of an input that are there; None if none is.

    Raises:
        SourceError: one can't be read.

    """
    infos = [now.info for now in files if now.info is not None]
    return inspect_files(record.name, record.uri, infos) if infos else None


def events_by_file(
    files: Sequence[FileNow], plan: RowPlan, key: str, value: int | str, spans: Mapping[str, tuple[Any, Any]]
) -> tuple[list[dict[str, Any]], str]:
    """For each file how many events of a key it has in each of some spans of time, and how many rejected ones.

    Args:
        files: The files.
        plan: How they are read.
        key: Our name of the key column.
        value: The key.
        spans: Name of a column of the answer → after which time (None: any), up to which (None: any).

    Returns:
        One row a file, and what was read, in words.

    """
    time = plan.time
    assert time is not None, "events have a time"

    def count(now: FileNow) -> tuple[dict[str, Any], KeyedRows | None]:
        told = now.told()
        if now.info is None:
            return told | dict.fromkeys(spans, None) | {"rejected": None}, None
        found = rows_of_key(now, plan, key, value)
        counts = {name: _within(found.kept[time], *span) for name, span in spans.items()}
        return told | counts | {"rejected": found.rejected.total()}, found

    with ThreadPoolExecutor(_READERS) as pool:
        counted = list(pool.map(count, files))
    read_pieces = [found for _, found in counted if found is not None]
    pieces = sum(found.groups for found in read_pieces), sum(found.of_groups for found in read_pieces)
    return [row for row, _ in counted], f"the key column of every file, all of {pieces[0]} of {pieces[1]} row groups"


def _within(times: pl.Series, after: dt.datetime | None, until: dt.datetime | None) -> int:
    if after is not None:
        times = times.filter(times > after)
    if until is not None:
        times = times.filter(times <= until)
    return len(times)
