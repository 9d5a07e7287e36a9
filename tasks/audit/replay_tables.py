"""What replays of feature versions and of training sets share: rows of tables, their configuration, their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from tasks.audit.replay_causes import CheckedFile, check_files, input_causes, table_of
from tasks.audit.replay_rows import (
    Answer,
    Cause,
    Difference,
    Replayed,
    StoredFiles,
    Unreadable,
    by_file,
    choose,
    missing,
)
from tasks.core.errors import ConfigError, SourceError
from tasks.core.manifest import FileEntry, InputRecord, Manifest
from tasks.features.definitions import Definitions
from tasks.features.sources import SourceTable, inspect

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """The sampled rows of a version as they are stored, each with its file; and those that can't be read."""

    table: pa.Table
    files: tuple[FileEntry, ...]
    rows: tuple[int, ...]
    """Number of each within its file."""
    unreadable: tuple[Replayed, ...]


@dataclass(slots=True)
class Sources:
    """The source files of a version as they are now, by source; and what is otherwise than it was."""

    files: dict[str, list[CheckedFile]] = field(default_factory=dict)
    tables: dict[str, SourceTable] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)


def config_of(kind: type[Config], manifest: Manifest, **now: Any) -> Config:
    """The configuration that a version was made with, and what of it is otherwise now, such as the root.

    Raises:
        ConfigError: this code can't use it.

    """
    try:
        return kind.model_validate(manifest.config | now)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "as a whole"
        raise ConfigError(
            f"{manifest.dataset} v{manifest.version}: this code can't use its configuration "
            f"({where}: {first['msg']}); replay it with the code that made it"
        ) from fault


def stored_rows(manifest: Manifest, stored: StoredFiles, sample: int, seed: int) -> StoredRows:
    """Read some rows of a version, in the order of its files."""
    tables: list[pa.Table] = []
    files: list[FileEntry] = []
    numbers: list[int] = []
    unreadable: list[Replayed] = []
    chosen = choose(manifest.rows, sample, seed)
    for entry, rows in by_file([(entry, entry.rows) for entry in manifest.files], chosen):
        try:
            tables.append(stored.read(entry, rows))
        except Unreadable as fault:
            unreadable += [missing(f"{entry.path} row {row}", entry, fault.cause) for row in rows.tolist()]
            continue
        files += [entry] * len(rows)
        numbers += rows.tolist()
    table = pa.concat_tables(tables) if tables else pa.table({})
    return StoredRows(table=table, files=tuple(files), rows=tuple(numbers), unreadable=tuple(unreadable))


def rows_replayed(
    stored: StoredFiles, taken: StoredRows, names: Sequence[str], found: Sequence[tuple[Difference, ...]]
) -> tuple[Replayed, ...]:
    """Each sampled row with its differences, and that its file was altered, if it was."""
    replayed = [
        Replayed(name=name, file=entry.path, differences=own, causes=causes_of(stored, entry))
        for name, entry, own in zip(names, taken.files, found, strict=True)
    ]
    return (*replayed, *taken.unreadable)


def causes_of(stored: StoredFiles, entry: FileEntry) -> tuple[Cause, ...]:
    """That a file was altered, if it was."""
    cause = stored.check(entry)
    return () if cause is None else (cause,)


def row_answer(manifest: Manifest, stored: StoredFiles, replayed: tuple[Replayed, ...], **more: Any) -> Answer:
    """The answer about some rows of a version."""
    return Answer(unit="row", total=manifest.rows, replayed=replayed, altered=stored.altered, **more)


def sources_of(records: Sequence[InputRecord], kept: str | None = None) -> Sources:
    """Compare the files of sources with their fingerprints.

    Args:
        records: Inputs that are raw files.
        kept: Source whose events are kept beside the version: of its files only those are taken that are the same.

    Raises:
        SourceError: of a source no file is there any more.

    """
    sources = Sources()
    for record in records:
        files = sources.files[record.name] = check_files(record)
        sources.causes += input_causes(record, files)
    for record in records:
        usable = [file for file in sources.files[record.name] if not (record.name == kept and file.changed)]
        sources.tables[record.name] = table_of(record, usable)
    return sources


def present(definitions: Definitions, sources: Sources, notes: list[str]) -> Definitions:
    """Definitions whose dimensions are there: those that a version took nothing of may be gone since.

    They decide no value, but types of keys; `sources` gets their tables, `notes` what is gone.
    """
    dimensions = dict(definitions.dimensions)
    for name, dimension in definitions.dimensions.items():
        if dimension.uri is None or name in sources.tables:
            continue
        try:
            sources.tables[name] = inspect(name, dimension.uri)
        except SourceError as fault:
            dimensions[name] = replace(dimension, uri=None)
            notes.append(f"'{name}', of which nothing was taken but the types of keys, can't be looked at: {fault}")
    return replace(definitions, dimensions=dimensions)


def frame_of(table: pa.Table) -> pl.DataFrame:
    """An Arrow table as a frame."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def only_of(rows: pl.DataFrame, keys: pl.DataFrame) -> pl.DataFrame:
    """The rows of some keys, in their order; null is no key."""
    name = keys.columns[0]
    wanted = keys.select(pl.col(name).cast(rows.schema[name], strict=False))
    return rows.join(wanted, on=name, how="semi", maintain_order="left")
