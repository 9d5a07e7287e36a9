"""Look-ups by key in a feature version, without loading it: the newest values of some entities in milliseconds.

    key ── stable hash ──▶ file ── bisection of the row groups' statistics ──▶ row group ── index ──▶ row

A version that is hash-partitioned and sorted by (entity, as_of) needs one row group a key; footers and the most
recently used row groups stay in memory. For an entity with rows at several as-of times the last one counts. Versions
made before partitions existed are searched whole, which takes as long as reading them.
"""

from __future__ import annotations

import bisect
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.engine.partition import bucket_of
from tasks.features.keys import read_keys
from tasks.io import storage
from tasks.io.disk import MIB
from tasks.io.errors import DefinitionError
from tasks.io.names import closest
from tasks.store import layout
from tasks.store.manifest import Manifest
from tasks.store.reading import data_files, explained, open_data

CACHE_BYTES = 256 * MIB

# Local reads are limited by decoding, which scales with cores; on S3 each waits for the network.
_THREADS = 16

Place = tuple[int, int]
"""Number of a file and of a row group in it."""


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """An open file with its footer, and the smallest and largest key of each row group (None: not recorded)."""

    uri: str
    source: pa.NativeFile
    footer: pq.FileMetaData
    schema: pa.Schema
    lowest: list[Any] | None
    highest: list[Any] | None


class Lookup:
    """Look-ups in one feature version; may be used by several threads at once."""

    def __init__(self, root: str, manifest: Manifest, cache_bytes: int = CACHE_BYTES) -> None:
        """Remember the places of the version's files; open them on first use.

        Args:
            root: Root of the store.
            manifest: A published version of a feature group.
            cache_bytes: Decoded row groups that stay in memory.

        """
        self.manifest = manifest
        self.entity: str = manifest.definition["entity"]
        self._uris = data_files(root, manifest)
        self._partition = manifest.partition if _is_by(manifest, self.entity) else None
        self._file_of = {layout.part_number(file.path): index for index, file in enumerate(manifest.files)}
        self._files: dict[int, _OpenFile] = {}
        self._cache = _Cache(cache_bytes)

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema of the version."""
        return self._file(0).schema

    def rows(self, keys: Iterable[Any], columns: Sequence[str]) -> pa.Table:
        """Return the newest values of some entities, one row a key in the keys' order; nulls for a key without rows.

        Args:
            keys: Keys, an Arrow array or plain values; a null has no row, and keys may repeat.
            columns: Columns to return, in this order.

        Raises:
            DefinitionError: the version has no such column.
            InputError: a key can't belong to this entity.
            CorruptVersion: a file is missing, of another size, or can't be read.

        """
        for name in columns:
            if name not in self.schema.names:
                raise DefinitionError(f"{self._name()} has no column '{name}'{closest(name, self.schema.names)}")
        kind = self.schema.field(self.entity).type
        wanted = read_keys(keys, kind, f"keys of {self._name()} ('{self.entity}')")
        distinct = wanted.unique().drop_null()
        by_place = self._places(distinct)
        places = sorted(by_place)
        batches = self._read(places, [self.entity, *(name for name in columns if name != self.entity)])
        found: list[pa.RecordBatch] = []
        row_of = np.full(len(distinct), -1, dtype=np.int64)
        total = 0
        for place, batch in zip(places, batches, strict=True):
            numbers = by_place[place]
            hits = pc.index_in(batch.column(self.entity), value_set=distinct.take(pa.array(numbers)))
            rows = np.flatnonzero(hits.is_valid().to_numpy(zero_copy_only=False))
            # Ascending (entity, as_of): of several rows of a key, the last assignment wins.
            row_of[numbers[hits.drop_null().to_numpy()]] = total + np.arange(len(rows))
            found.append(batch.select(list(columns)).take(pa.array(rows)))
            total += len(rows)
        fields = pa.schema([self.schema.field(name) for name in columns])
        order = self._order(wanted, distinct, row_of)
        table = pa.Table.from_batches(found, schema=fields).combine_chunks()
        return table.take(order)

    def _order(self, wanted: pa.Array, distinct: pa.Array, row_of: npt.NDArray[np.int64]) -> pa.Array:
        """Return the row number of each key among the found rows, null without one."""
        number = pc.index_in(wanted, value_set=distinct).fill_null(-1).to_numpy()
        rows = np.append(row_of, -1)[number]
        return pa.array(rows, mask=rows < 0)

    def _places(self, distinct: pa.Array) -> dict[Place, npt.NDArray[np.int64]]:
        """Return row groups that may have the keys, each with the numbers of those keys."""
        found: dict[Place, list[int]] = {}
        values = distinct.to_pylist()
        if self._partition is None:
            files: Sequence[Iterable[int]] = [range(len(self._uris))] * len(values)
        else:
            buckets = bucket_of(distinct, self._partition.buckets).tolist()
            files = [[self._file_of[b]] if b in self._file_of else [] for b in buckets]
        self._open_all({index for some in files for index in some})
        for number, (value, some) in enumerate(zip(values, files, strict=True)):
            for index in some:
                for group in _groups(self._file(index), value, ordered=self._partition is not None):
                    found.setdefault((index, group), []).append(number)
        return {place: np.array(numbers, dtype=np.int64) for place, numbers in found.items()}

    def _read(self, places: Sequence[Place], columns: list[str]) -> list[pa.RecordBatch]:
        """Return row groups with at least these columns, from the cache if possible; read the others at once."""
        found = {place: self._cache.get(place) for place in places}
        missing = [place for place, held in found.items() if held is None or not set(columns) <= {*held.schema.names}]
        decode = functools.partial(self._decode, columns=columns)
        # Passing a single one to another thread would only cost time.
        decoded = _pool().map(decode, missing) if len(missing) > 1 else map(decode, missing)
        found |= zip(missing, decoded, strict=True)
        return [batch for batch in found.values() if batch is not None]

    def _decode(self, place: Place, columns: list[str]) -> pa.RecordBatch:
        """Read the columns of a row group that the cache lacks."""
        held = self._cache.get(place)
        missing = [name for name in columns if held is None or name not in held.schema.names]
        if held is not None and not missing:  # another thread has read it meanwhile
            return held
        file = self._file(place[0])
        with explained(file.uri):
            # A separate reader for each thread; it costs little once the footer is known.
            reader = pq.ParquetFile(file.source, metadata=file.footer, pre_buffer=storage.is_s3(file.uri))
            table = reader.read_row_group(place[1], columns=missing, use_threads=False).select(missing).combine_chunks()
        arrays = [column.chunk(0) for column in table.columns]
        if held is not None:
            missing, arrays = [*held.schema.names, *missing], [*held.columns, *arrays]
        batch = pa.record_batch(arrays, names=missing)
        self._cache.put(place, batch)
        return batch

    def _open_all(self, indices: Iterable[int]) -> None:
        closed = sorted(index for index in indices if index not in self._files)
        if len(closed) > 1:
            list(_pool().map(self._file, closed))

    def _file(self, index: int) -> _OpenFile:
        if index not in self._files:
            self._files[index] = _open(self._uris[index], self.manifest.files[index].bytes, self.entity)
        return self._files[index]

    def _name(self) -> str:
        return f"{self.manifest.dataset} v{self.manifest.version}"


def _is_by(manifest: Manifest, entity: str) -> bool:
    return manifest.partition is not None and manifest.partition.key == entity


def _open(uri: str, size: int, entity: str) -> _OpenFile:
    with explained(uri):
        source = open_data(uri, size)
        reader = pq.ParquetFile(source)
    footer, schema = reader.metadata, reader.schema_arrow
    number = schema.names.index(entity)
    found = [footer.row_group(group).column(number).statistics for group in range(footer.num_row_groups)]
    known = all(statistics is not None and statistics.has_min_max for statistics in found)
    bounds = [(s.min, s.max) for s in found] if known else None
    lowest, highest = ([low for low, _ in bounds], [high for _, high in bounds]) if bounds is not None else (None, None)
    return _OpenFile(uri, source, footer, schema, lowest, highest)


def _groups(file: _OpenFile, value: Any, *, ordered: bool) -> Iterable[int]:
    """Return row groups that may have a key; for ordered rows, the one with its last row."""
    if file.lowest is None or file.highest is None:
        return range(file.footer.num_row_groups)
    if ordered:
        group = bisect.bisect_right(file.lowest, value) - 1
        return [group] if group >= 0 and value <= file.highest[group] else []
    bounds = zip(file.lowest, file.highest, strict=True)
    return [group for group, (low, high) in enumerate(bounds) if low <= value <= high]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="lookup")


class _Cache:
    """The most recently used row groups, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[Place, pa.RecordBatch] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, place: Place) -> pa.RecordBatch | None:
        with self._lock:
            if place in self._held:
                self._held.move_to_end(place)
            return self._held.get(place)

    def put(self, place: Place, batch: pa.RecordBatch) -> None:
        with self._lock:
            before = self._held.pop(place, None)
            self._bytes += batch.nbytes - (before.nbytes if before is not None else 0)
            self._held[place] = batch
            while self._bytes > self._most and self._held:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= dropped.nbytes
