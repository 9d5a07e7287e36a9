"""Rows of one key in a version, found without reading the version.

    key ── stable hash ──▶ file ── smallest and largest key of its row groups ──▶ row groups ── key column ──▶ rows

A version that isn't partitioned by the key is searched by the footers of its files; without statistics, by the key
column alone. Other columns are read only from row groups that have the key.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.engine.partition import bucket_of
from tasks.features.keys import read_keys
from tasks.io import storage
from tasks.io.errors import ConfigError, InputError
from tasks.store import layout
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.reading import data_files, explained, rows_of

MOST_KEYS = 2_000_000
"""Maximum number of keys that are searched for the closest ones."""
_READERS = 16
_CLOSE, _NEAR = 3, 50


@dataclass(frozen=True, slots=True)
class Found:
    """Found rows, with the file and number of each, and the amount read."""

    table: pa.Table
    places: tuple[tuple[str, int], ...]
    files: int = 0
    groups: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        found: list[dict[str, Any]] = self.table.to_pylist()
        return found

    def read_of(self, manifest: Manifest) -> str:
        """Return the files and row groups that were read, in words."""
        return f"footers of {self.files} of {len(manifest.files)} data files, {self.groups} row groups"


def is_whole(manifest: Manifest, column: str) -> bool:
    """Return True if a column holds whole numbers."""
    return any(one.name == column and one.type.startswith(("int", "uint")) for one in manifest.columns)


def typed_key(manifest: Manifest, column: str, text: str) -> int | str:
    """Return a key in the column's type.

    Raises:
        ConfigError: the column holds whole numbers, and the text isn't one.

    """
    if not is_whole(manifest, column):
        return text
    try:
        (value,) = read_keys([text], pa.int64(), f"keys of {manifest.dataset}").to_pylist()
    except InputError as fault:
        raise ConfigError(
            f"'{text}' is no {column} of {manifest.dataset} v{manifest.version}: those are whole numbers, such as 7"
        ) from fault
    assert isinstance(value, int), "text that is read is a number"
    return value


def find_rows(
    root: str,
    manifest: Manifest,
    column: str,
    value: int | str,
    *,
    columns: Sequence[str] | None = None,
    wanted: Callable[[FileEntry], bool] | None = None,
) -> Found:
    """Return all rows of a version that have a value in a column.

    Args:
        root: Root of the store.
        manifest: The version.
        column: The key column.
        value: The key, in the column's type.
        columns: Columns to return; None for all.
        wanted: Filter of the data files to search; by default all that may have it.

    Raises:
        CorruptVersion: a file is missing.
        VersionNotFound: the gate rejected the version, so that it has no rows.

    """
    entries = list(zip(data_files(root, manifest), manifest.files, strict=True))
    if manifest.partition is not None and manifest.partition.key == column:
        number = int(bucket_of(pa.array([value]), manifest.partition.buckets)[0])
        entries = [(uri, entry) for uri, entry in entries if layout.part_number(entry.path) == number]
    if wanted is not None:
        entries = [(uri, entry) for uri, entry in entries if wanted(entry)]
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda one: _search(one[0], column, value, columns), entries))
    tables = [table for table, _, _ in found if table is not None and table.num_rows]
    return Found(
        pa.concat_tables(tables) if tables else pa.table({}),
        tuple((entry.path, row) for (_, entry), (_, rows, _) in zip(entries, found, strict=True) for row in rows),
        files=len(entries),
        groups=sum(groups for _, _, groups in found),
    )


def read_row(root: str, manifest: Manifest, path: str, row: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one row of a data file by its number.

    Raises:
        CorruptVersion: the file is missing or can't be read.

    """
    uri = layout.join(layout.version_uri(root, manifest.dataset, manifest.version), path)
    with explained(uri), storage.open_input(uri) as source:
        return rows_of(pq.ParquetFile(source), np.array([row]), columns)


def _search(
    uri: str, column: str, value: int | str, columns: Sequence[str] | None
) -> tuple[pa.Table | None, list[int], int]:
    """Return the rows of one file, their numbers in it, and the number of row groups read."""
    with explained(uri), storage.open_input(uri) as source:
        file = pq.ParquetFile(source, pre_buffer=True)
        tables, numbers, groups, start = [], [], 0, 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if _may_have(file, group, column, value):
                groups += 1
                hits = pc.equal(file.read_row_group(group, columns=[column])[column], value).fill_null(False)
                rows = pc.indices_nonzero(hits)
                if len(rows):
                    wanted = None if columns is None else list(columns)
                    tables.append(file.read_row_group(group, columns=wanted).take(rows))
                    numbers += [start + row for row in rows.to_pylist()]
            start += count
    return (pa.concat_tables(tables) if tables else None), numbers, groups


def _may_have(file: pq.ParquetFile, group: int, column: str, value: Any) -> bool:
    """Return True if a row group may have a value, by its footer's smallest and largest one."""
    found = file.metadata.row_group(group)
    number = next((n for n in range(found.num_columns) if found.column(n).path_in_schema == column), None)
    bounds = None if number is None else found.column(number).statistics
    if bounds is None or not bounds.has_min_max or not isinstance(value, type(bounds.min)):
        return True
    return bool(bounds.min <= value <= bounds.max)


def closest_keys(root: str, manifest: Manifest, column: str, value: int | str) -> list[str]:
    """Return the keys of a version that are closest to another; for very large versions, from the first files."""
    keys: set[Any] = set()
    for uri in data_files(root, manifest):
        if len(keys) >= MOST_KEYS:
            break
        with explained(uri), storage.open_input(uri) as source:
            keys.update(pq.read_table(source, columns=[column])[column].unique().drop_null().to_pylist())
    return closest_of(keys, value)


def closest_of(keys: Iterable[Any], value: int | str) -> list[str]:
    """Return the closest of some keys: by difference for numbers, by likeness for text."""
    if isinstance(value, int):
        return [str(key) for key in sorted(keys, key=lambda key: (abs(key - value), key))[:_CLOSE]]
    ordered = sorted(map(str, keys))
    if len(ordered) > 20_000:  # comparing with all is too slow: those beside it, and those that contain it
        place = bisect_left(ordered, value)
        near = ordered[max(place - _NEAR, 0) : place + _NEAR]
        ordered = list(dict.fromkeys([*near, *(key for key in ordered if value in key)][: 4 * _NEAR]))
    begun = [key for key in ordered if key.startswith(value)]
    return [*begun, *difflib.get_close_matches(value, ordered, n=_CLOSE, cutoff=0.5)][:_CLOSE]
