"""A bounded sample of a version's rows, the same whoever takes it: by stable hashes, from a few row groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import storage
from tasks.core.hashing import stable_hash
from tasks.core.reading import explained

SAMPLE_ROWS = 5000
MOST_FILES = 16
MOST_READ = 50_000
"""Rows that are read for a sample, but for the last row group; of a version of fewer, all."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a file, and its rows."""

    uri: str
    number: int
    rows: int


def sample_rows(
    uris: Sequence[str],
    columns: Sequence[str],
    key: str,
    *,
    rows: int = SAMPLE_ROWS,
    convert: Callable[[str, pa.Table], pa.Table] | None = None,
) -> pa.Table:
    """Rows of a version, in the order of their files: those whose keys have the lowest hashes.

    All rows of a key that are read are taken, or none, but for a key with more rows than asked for. Of a version of
    more than `MOST_READ` rows, or `MOST_FILES` files, only some files and row groups are read, by their hashes.

    Args:
        uris: Parquet files of one schema, at least one.
        columns: Columns to read.
        key: The column among them whose hashes decide.
        rows: Most rows.
        convert: Makes of a file's name and rows what is sampled, such as a column that its directory tells.

    """
    tables = [_read(group, columns, convert) for group in chosen_groups(uris)] or [_empty(uris[0], columns, convert)]
    table = pa.concat_tables(tables, promote_options="default")
    if table.num_rows <= rows:
        return table.combine_chunks()
    hashes = stable_hash(table[key])
    limit = np.partition(hashes, rows)[rows]
    chosen = np.flatnonzero(hashes < limit)
    if len(chosen) < rows // 2:  # a key that has more rows than there is room for
        chosen = np.argsort(hashes, kind="stable")[:rows]
    return table.take(pa.array(np.sort(chosen))).combine_chunks()


def chosen_groups(uris: Sequence[str]) -> list[RowGroup]:
    """The row groups that a sample is taken from, in the order of the files."""
    groups = []
    for uri in (uris[place] for place in sorted(_by_hash(uris)[:MOST_FILES])):
        with explained(uri), storage.open_input(uri) as source:
            metadata = pq.read_metadata(source)
        groups += [
            RowGroup(uri, number, metadata.row_group(number).num_rows) for number in range(metadata.num_row_groups)
        ]
    taken, read = set[int](), 0
    for place in _by_hash([f"{group.uri}:{group.number}" for group in groups]):
        if read >= MOST_READ:
            break
        taken.add(place)
        read += groups[place].rows
    return [groups[place] for place in sorted(taken)]


def _by_hash(names: Sequence[str]) -> list[int]:
    """Places of names in the order of their last parts' hashes: where the store lies makes no difference."""
    hashes = stable_hash(pa.array([_tail(name) for name in names], pa.string()))
    places: list[int] = np.argsort(hashes, kind="stable").tolist()
    return places


def _tail(uri: str) -> str:
    return "/".join(uri.split("/")[-2:])


def _read(group: RowGroup, columns: Sequence[str], convert: Callable[[str, pa.Table], pa.Table] | None) -> pa.Table:
    with explained(group.uri), storage.open_input(group.uri) as source:
        table = pq.ParquetFile(source).read_row_group(group.number, columns=list(columns), use_threads=False)
    table = table.select(list(columns))
    return table if convert is None else convert(group.uri, table)


def _empty(uri: str, columns: Sequence[str], convert: Callable[[str, pa.Table], pa.Table] | None) -> pa.Table:
    with explained(uri), storage.open_input(uri) as source:
        table = pq.ParquetFile(source).schema_arrow.empty_table().select(list(columns))
    return table if convert is None else convert(uri, table)
