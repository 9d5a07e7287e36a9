"""Bounded sample of a version's rows, from a few row groups: by stable hashes, so deterministic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.io import storage
from tasks.io.hashing import stable_hash
from tasks.store.reading import explained

SAMPLE_ROWS = 5000
MOST_FILES = 16
MOST_READ = 50_000
"""Rows that are read for a sample, not counting the last row group; all rows of a smaller version."""


class RowGroup(NamedTuple):
    """Row group of a file, and its rows."""

    uri: str
    number: int
    rows: int


def sample_rows(
    uris: Sequence[str],
    columns: Sequence[str],
    key: str,
    convert: Callable[[str, pa.Table], pa.Table] = lambda _, table: table,
) -> pa.Table:
    """Sample rows of a version, in the order of their files: those whose keys have the lowest hashes.

    Either all read rows of a key are taken, or none, except for a key with more rows than `SAMPLE_ROWS`. Of a version
    of more than `MOST_READ` rows, or `MOST_FILES` files, only some files and row groups are read, by their hashes.

    Args:
        uris: Parquet files of one schema, at least one.
        columns: Columns to read.
        key: Column among them whose hashes decide.
        convert: Function that changes the rows of a file by its name, such as to add a column derived from its
            directory.

    """
    tables = []
    for uri, number, _ in chosen_groups(uris) or [RowGroup(uris[0], 0, 0)]:
        with explained(uri), storage.open_input(uri) as source:
            file = pq.ParquetFile(source)
            groups = range(file.num_row_groups)[number : number + 1]  # no group in a file without rows
            table = file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
        tables.append(convert(uri, table.select(list(columns))))
    table = pa.concat_tables(tables, promote_options="default")
    if table.num_rows <= SAMPLE_ROWS:
        return table.combine_chunks()
    hashes = stable_hash(table[key])
    chosen = np.flatnonzero(hashes < np.partition(hashes, SAMPLE_ROWS)[SAMPLE_ROWS])
    if len(chosen) < SAMPLE_ROWS // 2:  # a key with more rows than fit
        chosen = np.argsort(hashes, kind="stable")[:SAMPLE_ROWS]
    return table.take(pa.array(np.sort(chosen))).combine_chunks()


def chosen_groups(uris: Sequence[str]) -> list[RowGroup]:
    """Choose the row groups that a sample is taken from, in the order of the files."""
    groups = []
    for uri in (uris[place] for place in sorted(_by_hash(uris)[:MOST_FILES])):
        with explained(uri), storage.open_input(uri) as source:
            metadata = pq.read_metadata(source)
        groups += [
            RowGroup(uri, number, metadata.row_group(number).num_rows) for number in range(metadata.num_row_groups)
        ]
    places = _by_hash([f"{group.uri}:{group.number}" for group in groups])
    read = np.cumsum([groups[place].rows for place in places])
    return [groups[place] for place in sorted(places[: np.searchsorted(read, MOST_READ) + 1])]


def _by_hash(names: Sequence[str]) -> list[int]:
    """Return the indices of names in the order of their last parts' hashes, independent of the store's path."""
    hashes = stable_hash(pa.array(["/".join(name.split("/")[-2:]) for name in names], pa.string()))
    places: list[int] = np.argsort(hashes, kind="stable").tolist()
    return places
