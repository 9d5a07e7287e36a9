"""Judged events kept beside a version, so that a later run needn't read and judge their files again.

    {version}/_events/part-<bucket>-a1.parquet    the bucket's new events, with their file and row

A version keeps the events of the files that it read itself; those of earlier files stay with earlier versions, so that
the state of a version is a chain of links. An event is alive as long as its file exists unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.engine.partition import bucket_of
from tasks.io import storage
from tasks.store import layout
from tasks.store.manifest import FileEntry
from tasks.store.reading import explained
from tasks.store.reservation import Reservation

DIRECTORY = "_events"
FILE, ROW = "_file", "_row"
MAX_LINKS = 16
"""Links of a chain; after that many all live events are rewritten in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLink:
    """The events kept by one version.

    buckets: number of them. files: URI by bucket; one without events has none. live: those of the source files that the
    version read that exist unchanged, number in that version's inputs → number among today's files.
    rows: their events. complete: True if all of its files exist.
    """

    version: int
    buckets: int
    files: Mapping[int, str]
    live: Mapping[int, int]
    rows: int
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlan:
    """Sources of a group's events.

    digest: rules for reading and judging events; states of equal digests fit together. parent: version whose
    state is extended. depth: links of the chain, with the new one. new: numbers of the source files to read.
    whole: write all live events, not only the new ones, and begin a new chain.
    """

    digest: str
    parent: int | None
    depth: int
    links: tuple[StateLink, ...]
    new: frozenset[int]
    whole: bool

    @property
    def rows(self) -> int:
        """Number of live events kept by earlier versions."""
        return sum(link.rows for link in self.links)

    def record(self, rows: Mapping[int, int], files: int, buckets: int) -> dict[str, object]:
        """Return the manifest's definition of the version's own state.

        Args:
            rows: Number of written events, by the number of their source file.
            files: Number of source files.
            buckets: Number of buckets.

        """
        written = range(files) if self.whole else sorted(self.new)
        return {
            "digest": self.digest,
            "parent": None if self.whole else self.parent,
            "depth": 1 if self.whole else self.depth,
            "buckets": buckets,
            "files": [[number, rows.get(number, 0)] for number in written],
        }


def bucket_files(version_uri: str, side_files: Sequence[FileEntry]) -> dict[int, str]:
    """Return the URIs of a version's kept events, by bucket."""
    kept = [file.path for file in side_files if file.path.startswith(f"{DIRECTORY}/")]
    numbered = ((layout.part_number(path), path) for path in kept)
    return {number: layout.join(version_uri, path) for number, path in numbered if number is not None}


def read_kept(
    links: Sequence[StateLink], bucket: int, buckets: int, entity: str, schema: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    """Return events of one of today's buckets kept by earlier versions.

    Args:
        links: The chain.
        bucket: Bucket of the entities.
        buckets: Number of buckets, a power of two, as in every link.
        entity: Key column.
        schema: Columns to return and their types, among them `FILE`: the number of the source file, as of today.

    """
    frames = [_read_link(link, bucket, buckets, entity, schema) for link in links if link.live]
    return pl.concat([pl.DataFrame(schema=schema), *frames])


def _read_link(
    link: StateLink, bucket: int, buckets: int, entity: str, schema: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    numbers = range(bucket, link.buckets, buckets) if link.buckets > buckets else [bucket % link.buckets]
    texts = [name for name, dtype in schema.items() if dtype == pl.Categorical]
    live = None if link.complete else [(FILE, "in", list(link.live))]
    frames = []
    for uri in (link.files[number] for number in numbers if number in link.files):
        with explained(uri), storage.open_input(uri) as source:
            table = pq.read_table(
                source, columns=list(schema), filters=live, use_threads=False, read_dictionary=texts, pre_buffer=True
            )
        if link.buckets < buckets:
            table = table.filter(pa.array(bucket_of(table[entity], buckets) == bucket))
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        today = pl.col(FILE).replace_strict(dict(link.live), return_dtype=pl.Int32)
        frames.append(frame.with_columns(today).cast(pl.Schema(schema)))
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


def in_order(events: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Return each entity's events in the order of a full reading: by file, and by row in each.

    Within one file an entity's events come from one frame, in their order, so that the rows' numbers aren't needed.
    """
    together = pl.concat(events)
    files = together[FILE].to_numpy()
    if np.all(files[:-1] <= files[1:]):
        return together
    # A stable sort of 16-bit integers is a radix sort; more files than that are rare.
    narrow = files.astype(np.uint16) if files.max() < 2**16 else files
    return together[np.argsort(narrow, kind="stable")]


def write_kept(events: pa.Table, reservation: Reservation, bucket: int) -> FileEntry:
    """Write a bucket's events beside the version."""
    uri = reservation.data_uri(bucket, DIRECTORY)
    plain = [name for name in events.column_names if name != ROW]
    options = {"use_dictionary": plain, "column_encoding": {ROW: "DELTA_BINARY_PACKED"}}
    return reservation.entry(storage.write_parquet(events, uri, **options))
