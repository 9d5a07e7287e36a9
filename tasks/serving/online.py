"""Look-ups by key of the newest feature values: in a version's files, or in Redis.

In a version's files, without loading it:

    key ── stable hash ──▶ file ── bisection of the row groups' statistics ──▶ row group ── index ──▶ row

A version that is hash-partitioned and sorted by (entity, as_of) needs one row group a key; footers and the most
recently used row groups stay in memory. For an entity with rows at several as-of times the last one counts. Versions
made before partitions existed are searched whole, which takes as long as reading them.

In Redis, for look-ups over the network in a fraction of a millisecond:

    <group>              hash   version, as_of, entity, schema, ttl, export    written last; readers follow it
    <group>:<entity>     hash   feature → text, _version, _as_of, _export      one row; a null is a missing field
    <group>/expiring     zset   entity → as_of of each row that has a time to live
    <group>/lock                one export at a time

Export n stamps its rows with n and then writes n to the group's hash. A row with a lower stamp is of an entity that
no longer has a row: readers treat it as missing, and the export deletes it at its end. A row is replaced as a whole.
With a time to live, Redis drops each row when it expires; the set still records that it existed.
"""

from __future__ import annotations

import bisect
import contextlib
import datetime as dt
import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.engine.partition import bucket_of
from tasks.features.rows import read_keys
from tasks.io import storage
from tasks.io.disk import MIB
from tasks.io.errors import ConfigError, DefinitionError, InputError, VersionConflict, VersionNotFound
from tasks.io.tensors import Int64Array
from tasks.io.text import closest
from tasks.store import layout
from tasks.store.catalogue import feature_names, newest
from tasks.store.layout import AS_OF
from tasks.store.manifest import Manifest
from tasks.store.reading import data_files, explained, open_data, opened
from tasks.training_sets.definition import expired, moment_of, time_to_live

if TYPE_CHECKING:
    from redis import Redis


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

    def _order(self, wanted: pa.Array, distinct: pa.Array, row_of: Int64Array) -> pa.Array:
        """Return the row number of each key among the found rows, null without one."""
        number = pc.index_in(wanted, value_set=distinct).fill_null(-1).to_numpy()
        rows = np.append(row_of, -1)[number]
        return pa.array(rows, mask=rows < 0)

    def _places(self, distinct: pa.Array) -> dict[Place, Int64Array]:
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
        return str(self.manifest)


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


ROWS_AT_ONCE = 500
LOCK_SECONDS = 60

_EXPIRING, _COMING = "expiring", "expiring-next"

_VERSION, _EXPORT, _AS_OF = "_version", "_export", "_as_of"
_MICROSECOND = dt.timedelta(microseconds=1)


def connect(url: str) -> Redis:
    """Return a client of a Redis server, such as redis://localhost:6379/0, that has answered.

    Raises:
        ConfigError: the client isn't installed, or the URL isn't a Redis URL.
        ConnectionError: no server answers at the URL.
    """
    try:
        import redis
    except ModuleNotFoundError as fault:
        raise ConfigError("the Redis client isn't installed: pip install 'training-data-pipelines[redis]'") from fault
    try:
        client = redis.Redis.from_url(url)
    except ValueError as fault:
        raise ConfigError(f"no Redis URL: {fault}; give one such as redis://localhost:6379/0") from fault
    try:
        client.ping()
    except redis.exceptions.RedisError as fault:  # its message has the host, and never the URL's password
        raise ConnectionError(f"Redis doesn't answer ({fault}): start the server, or correct the URL") from fault
    return client


def export_latest(
    root: str,
    group: str,
    url: str,
    *,
    ttl_days: float | None = None,
    on_written: Callable[[int], None] | None = None,
) -> int:
    """Write the newest values of every entity of a group; idempotent.

    Args:
        root: Root of the store.
        group: Feature group.
        url: Redis server.
        ttl_days: Days after its as-of time at which a row expires: Redis drops it then, and readers return EXPIRED.
            None: never.
        on_written: Called with the number of newly written rows.

    Returns:
        Number of rows written, without those already expired.

    Raises:
        InputError: `ttl_days` isn't a number above 0.
        VersionNotFound: the group has no published version.
        VersionConflict: another export of the group is under way.
        CorruptVersion: a file of the version is missing, of another size, or can't be read.
    """
    ttl, now = time_to_live(ttl_days), moment_of(None)
    manifest = newest(root, layout.feature_dataset(group))
    if manifest is None:
        raise VersionNotFound(f"feature group '{group}' has no published version under {root}; run the flow first")
    client = connect(url)
    from redis.exceptions import LockError

    lock = client.lock(f"{group}/lock", timeout=LOCK_SECONDS, blocking=False)
    if not lock.acquire():
        raise VersionConflict(f"another export of '{group}' to Redis is under way; wait until it is over")
    try:
        number = int(client.hincrby(group, "begun", 1))
        rows = 0
        schema: pa.Schema | None = None
        client.delete(f"{group}/{_COMING}")
        for table in _newest_rows(root, manifest):
            schema = table.schema
            for start in range(0, table.num_rows, ROWS_AT_ONCE):
                piece = table.slice(start, ROWS_AT_ONCE)
                stamps = {_VERSION: str(manifest.version), _EXPORT: str(number)}
                written = _write(client, group, piece, stamps, ttl=ttl, now=now)
                lock.reacquire()
                rows += written
                if on_written is not None:
                    on_written(written)
        assert schema is not None, "a published version has a file"
        _hand_over(client, group, _header(manifest, schema, number, ttl_days))
        _delete_gone(client, group, number)
    except LockError as fault:
        raise VersionConflict(f"the export of '{group}' was overtaken by another one; export again") from fault
    finally:
        with contextlib.suppress(LockError):  # it may have expired
            lock.release()
    return rows


class RedisLookup:
    """Look-ups in an exported group, with the same answers as `online.Lookup` on the exported version."""

    def __init__(self, group: str, url: str) -> None:
        """Read the header of the export.

        Raises:
            VersionNotFound: the group wasn't exported to this server.
        """
        self._group = group
        self._client = connect(url)
        header = cast("Mapping[bytes, bytes]", self._client.hgetall(group))
        if b"export" not in header:
            raise VersionNotFound(
                f"feature group '{group}' isn't in Redis: write it there first, "
                f"with: python -m flows.feature_store export {group} --redis URL"
            )
        self.schema: pa.Schema = pa.ipc.read_schema(pa.py_buffer(header[b"schema"]))
        self.entity = header[b"entity"].decode()
        if b"ttl" not in header:
            raise VersionNotFound(
                f"feature group '{group}' in Redis is of an earlier release, without times: export it again"
            )
        self.version = int(header[b"version"])
        self.ttl = time_to_live(float(header[b"ttl"])) if header[b"ttl"] else None
        self.features: list[str] = json.loads(header[b"features"])

    def rows(self, keys: Iterable[Any], columns: Sequence[str]) -> pa.Table:
        """Return the values of some entities, one row a key in the order of the keys; nulls for a key without a row.

        For a row that Redis has dropped as expired, as_of is still returned.

        Raises:
            DefinitionError: no such column was exported.
            InputError: a key can't belong to this entity.
        """
        for name in columns:
            if name not in self.schema.names:
                raise DefinitionError(f"'{self._group}' in Redis has no '{name}'{closest(name, self.features)}")
        kind = self.schema.field(self.entity).type
        texts = read_keys(keys, kind, f"keys of '{self._group}' ('{self.entity}')").cast(pa.string()).to_pylist()
        fields = [_AS_OF if name == AS_OF else name for name in columns]
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hget(self._group, "export")
        pipeline.zmscore(f"{self._group}/{_EXPIRING}", [text or "" for text in texts] or [""])
        for text in texts:
            pipeline.hmget(f"{self._group}:{text}", [_EXPORT, *fields])
        export, dropped, *found = pipeline.execute()
        valid = [
            row[0] is not None and int(row[0]) >= int(export) and text is not None
            for row, text in zip(found, texts, strict=True)
        ]
        values = {
            name: _typed(
                [row[number] if there else None for row, there in zip(found, valid, strict=True)],
                self.schema.field(name).type,
            )
            for number, name in enumerate(columns, start=1)
            if name != AS_OF
        }
        if AS_OF in columns:
            ticks = [
                int(row[fields.index(_AS_OF) + 1]) if there else None if text is None or score is None else int(score)
                for row, there, text, score in zip(found, valid, texts, dropped, strict=False)
            ]
            values[AS_OF] = pa.array(ticks, pa.timestamp("us", "UTC")).cast(self.schema.field(AS_OF).type)
        return pa.table(values, schema=pa.schema([self.schema.field(name) for name in columns]))


def _newest_rows(root: str, manifest: Manifest) -> Iterator[pa.Table]:
    """Yield the last row of each entity, file by file; an entity is in one file, its rows by as_of."""
    import pyarrow.parquet as pq

    entity = manifest.definition["entity"]
    columns = [entity, *feature_names(manifest), AS_OF]
    for uri, file in zip(data_files(root, manifest), manifest.files, strict=True):
        with opened(uri, file.bytes) as source:
            table = pq.ParquetFile(source).read(columns=columns).select(columns)
        last = pl.Series(table[entity]).is_last_distinct()
        yield table.filter(last.to_arrow())


def _write(
    client: Redis,
    group: str,
    table: pa.Table,
    stamps: Mapping[Any, Any],
    *,
    ttl: dt.timedelta | None,
    now: dt.datetime,
) -> int:
    """Write rows and their expiry times; return the number of those that haven't expired."""
    entity = table.column_names[0]
    ticks = table[AS_OF].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_pylist()
    late = expired(table[AS_OF], now, ttl)
    texts = {name: _texts(table[name], name) for name in table.column_names if name != AS_OF}
    pipeline = client.pipeline(transaction=True)
    for number, key in enumerate(texts[entity]):
        if ttl is not None:
            pipeline.zadd(f"{group}/{_COMING}", {str(key): ticks[number]})
        if late[number]:  # values of it from an earlier export are deleted at the end, with the other removed rows
            continue
        row: dict[Any, Any] = {name: values[number] for name, values in texts.items() if values[number] is not None}
        pipeline.delete(f"{group}:{key}")
        pipeline.hset(f"{group}:{key}", mapping={**row, _AS_OF: ticks[number], **stamps})
        if ttl is not None:  # Redis removes a key in the millisecond after the given one
            pipeline.pexpireat(f"{group}:{key}", (ticks[number] + ttl // _MICROSECOND) // 1000)
    pipeline.execute()
    return int(len(late) - late.sum())


def _hand_over(client: Redis, group: str, header: Mapping[Any, Any]) -> None:
    """Switch readers to the new export."""
    pipeline = client.pipeline(transaction=True)
    pipeline.hset(group, mapping=dict(header))
    pipeline.delete(f"{group}/{_EXPIRING}")
    if client.exists(f"{group}/{_COMING}"):
        pipeline.rename(f"{group}/{_COMING}", f"{group}/{_EXPIRING}")
    pipeline.execute()


def _texts(column: pa.ChunkedArray, name: str) -> list[str | None]:
    try:
        texts: list[str | None] = column.cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as fault:
        raise InputError(f"'{name}' is of type {column.type}, which has no text: leave it out of the group") from fault
    return texts


def _typed(texts: list[bytes | None], kind: pa.DataType) -> pa.Array:
    return pa.array([None if text is None else text.decode() for text in texts], pa.string()).cast(kind)


def _header(manifest: Manifest, schema: pa.Schema, number: int, ttl_days: float | None) -> dict[Any, Any]:
    return {
        "entity": manifest.definition["entity"],
        "version": manifest.version,
        "as_of": max(moment.isoformat() for moment in manifest.as_of) if manifest.as_of else "",
        "features": json.dumps(feature_names(manifest)),
        "schema": schema.remove_metadata().serialize().to_pybytes(),
        "ttl": "" if ttl_days is None else repr(float(ttl_days)),
        "exported_at": dt.datetime.now(dt.UTC).isoformat(),
        "export": number,
    }


def _delete_gone(client: Redis, group: str, number: int) -> None:
    """Delete the rows of entities that are missing from this export."""
    keys: list[bytes] = []
    for key in client.scan_iter(match=f"{group}:*", count=1000):
        keys.append(key)
        if len(keys) == 1000:
            _delete_older(client, keys, number)
            keys = []
    _delete_older(client, keys, number)


def _delete_older(client: Redis, keys: Sequence[bytes], number: int) -> None:
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.hget(key, _EXPORT)
    stamps = pipeline.execute() if keys else []
    old = [key for key, stamp in zip(keys, stamps, strict=True) if stamp is not None and int(stamp) < number]
    if old:
        client.delete(*old)
