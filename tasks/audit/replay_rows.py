"""Stored rows and rows made again: choose some, read them, make them again and compare."""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.audit.inputs import Cause, why_not
from tasks.engine.partition import frame_of
from tasks.io import storage
from tasks.io.errors import CorruptVersion, PipelineError
from tasks.io.location import is_transient
from tasks.io.tensors import Int64Array
from tasks.io.text import shortened
from tasks.store import layout
from tasks.store.layout import AS_OF
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.reading import rows_of

ABSENT = "no row"
_SHOWN = 80
_ORDINAL = "\x00ordinal"


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs from the stored one; row: its row among several of the replayed item."""

    column: str
    stored: str
    rebuilt: str
    row: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One row, image or sample; causes: reasons why it alone may differ, such as its altered file."""

    name: str
    file: str
    differences: tuple[Difference, ...] = ()
    causes: tuple[Cause, ...] = ()


class Unreadable(Exception):
    """A stored file was altered so that nothing can be read from it."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.text)
        self.cause = cause


class StoredFiles:
    """The stored files of a version, each compared with its digest once, before it is read.

    Args:
        root: Root of the store.
        manifest: The version's.
        role: Words before 'the stored file …' that name the version, for one that another was made from.
    """

    def __init__(self, root: str, manifest: Manifest, role: str = "") -> None:
        self.base = manifest.uri(root)
        self._role = role
        self._seen: dict[str, Cause | None] = {}

    @property
    def altered(self) -> tuple[Cause, ...]:
        """Compared files that have changed."""
        return tuple(cause for cause in self._seen.values() if cause is not None)

    def check(self, entry: FileEntry) -> tuple[Cause, ...]:
        """Compare a file's bytes with its digest: return one cause if it was altered, else none."""
        if entry.path not in self._seen:
            text = self._compared(entry)
            kind = "input" if self._role else "stored"
            self._seen[entry.path] = Cause(kind, f"{self._role}the stored file {entry.path} {text}") if text else None
        cause = self._seen[entry.path]
        return () if cause is None else (cause,)

    def _compared(self, entry: FileEntry) -> str:
        try:
            present = storage.digest_of(layout.join(self.base, entry.path), entry.digest)
        except FileNotFoundError:
            return "is gone; restore it from a copy"
        if present == entry.digest:
            return ""
        then, now = (digest[: digest.find(":") + 13] + "…" for digest in (entry.digest, present))
        return f"was altered since it was published ({then} then, {now} now); restore it from a copy"

    def read(self, entry: FileEntry, rows: Int64Array | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Read some rows of a file, ascending, or all of them.

        Raises:
            Unreadable: the file was altered, and can't be read any more.
            CorruptVersion: it matches the manifest, and can't be read.
        """
        altered = self.check(entry)
        uri = layout.join(self.base, entry.path)
        try:
            with storage.open_input(uri) as source:
                file = pq.ParquetFile(source)
                if rows is None:
                    return file.read(columns=None if columns is None else list(columns))
                return rows_of(file, rows, columns)
        except (pa.ArrowException, OSError, IndexError, KeyError) as fault:
            if is_transient(fault):
                raise
            if altered:
                raise Unreadable(*altered) from fault
            raise CorruptVersion(f"{uri} can't be read as Parquet ({fault}), though its digest is right") from fault


def choose(total: int, sample: int, seed: int) -> Int64Array:
    """Choose some items by their numbers, ascending; all of them if there are no more than requested."""
    if sample >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(np.random.default_rng(seed).choice(total, sample, replace=False, shuffle=False)).astype(np.int64)


def by_file(files: Sequence[tuple[FileEntry, int]], chosen: Int64Array) -> list[tuple[FileEntry, Int64Array]]:
    """Return the chosen numbers within each file, from files with their numbers of items."""
    starts = np.concatenate([[0], np.cumsum([count for _, count in files])]).astype(np.int64)
    owner = np.searchsorted(starts, chosen, side="right") - 1
    return [(files[number][0], chosen[owner == number] - starts[number]) for number in np.unique(owner).tolist()]


def missing(name: str, entry: FileEntry, cause: Cause) -> Replayed:
    """Return the outcome for an item that can't be read from its file."""
    differences = (Difference("(row)", "can't be read", "–"),)
    return Replayed(name=name, file=entry.path, differences=differences, causes=(cause,))


class Again(ABC):
    """The rows, images or samples of one version, to be made again.

    Attributes:
        unit: Kind of item: 'row', 'image' or 'sample'.
        stored: The version's files.
        causes: Things that have changed; they are collected while rows are made.
        notes: Things that couldn't be made again, or only similarly; also collected.

    Raises:
        ConfigError: this code can't use the version's configuration.
        CorruptVersion: a file that describes the version's content was altered.
    """

    unit = "row"

    def __init__(self, root: str, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self.stored = StoredFiles(root, manifest)
        self.causes: list[Cause] = []
        self.notes: list[str] = []

    @property
    def total(self) -> int:
        """Number of items in the version."""
        return self.manifest.rows

    @abstractmethod
    def replay(self, chosen: Int64Array) -> list[Replayed]:
        """Make some of them again, by their numbers, ascending, and compare them.

        Raises:
            CorruptVersion: a stored file has the right digest and can't be read.
        """


class TableAgain(Again):
    """The rows of one version of a table, which are identified by an entity and a time."""

    time: str
    """Column of the time."""

    @abstractmethod
    def rows(self, sampled: pa.Table) -> pa.Table:
        """Make the rows of the sampled entities, with those of one key in the order of a file."""

    @property
    def entity(self) -> str:
        """Column of the entity."""
        return str(self.manifest.definition["entity"])

    def replay(self, chosen: Int64Array) -> list[Replayed]:
        """Make some rows again, and compare them."""
        columns = (self.entity, self.time)
        tables: list[pa.Table] = []
        files: list[FileEntry] = []
        keys: list[tuple[Any, ...]] = []
        unreadable: list[Replayed] = []
        for entry, rows in by_file([(entry, entry.rows) for entry in self.manifest.files], chosen):
            try:
                table, every = self.stored.read(entry, rows), self.stored.read(entry, columns=columns)
            except Unreadable as fault:
                unreadable += [missing(f"{entry.path} row {row}", entry, fault.cause) for row in rows.tolist()]
                continue
            tables.append(table)
            files += [entry] * len(rows)
            in_file = _ordinals(every, columns)
            keys += [in_file[row] for row in rows.tolist()]
        if not tables:
            return unreadable
        taken = pa.concat_tables(tables)
        made = taken.slice(0, 0)
        try:
            made = self.rows(taken)
        except (PipelineError, OSError) as fault:
            self.causes.append(why_not(fault))
        found = differences(taken, made, placed(keys, _ordinals(made, columns)))
        replayed = [
            Replayed(name=_name(columns, key), file=entry.path, differences=own, causes=self.stored.check(entry))
            for key, entry, own in zip(keys, files, found, strict=True)
        ]
        return [*replayed, *unreadable]


def _ordinals(table: pa.Table, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return the key of each row, with the number of rows before it that have the same."""
    keys = frame_of(table.select(columns))
    return keys.with_columns(pl.int_range(pl.len()).over(columns).alias(_ORDINAL)).rows()


def _name(columns: tuple[str, str], key: tuple[Any, ...]) -> str:
    value, time, number = key
    word = "as of" if columns[1] == AS_OF else "at"
    return f"{columns[0]} {text_of(value)} {word} {time.isoformat()}" + (f", the {number + 1}. of it" if number else "")


def differences(stored: pa.Table, rebuilt: pa.Table, places: Sequence[int | None]) -> list[tuple[Difference, ...]]:
    """Compare rows, to the last bit of each value.

    Args:
        stored: Stored rows.
        rebuilt: Rows made again, in any order.
        places: For each stored row its number among the rebuilt ones; None if it wasn't made.

    Returns:
        The differences of each stored row, none if there are none.
    """
    found: list[list[Difference]] = [
        [Difference("(row)", "there", ABSENT)] if place is None else [] for place in places
    ]
    pairs = [(row, place) for row, place in enumerate(places) if place is not None]
    for name in dict.fromkeys([*stored.column_names, *rebuilt.column_names]):
        kinds = [str(t.schema.field(name).type) if name in t.column_names else "no column" for t in (stored, rebuilt)]
        if kinds[0] != kinds[1]:
            for row, _ in pairs:
                found[row].append(Difference(name, *kinds))
            continue
        before, now = stored[name].to_pylist(), rebuilt[name].to_pylist()
        for row, place in pairs:
            if not same(before[row], now[place]):
                found[row].append(Difference(name, *_shown(before[row], now[place])))
    return [tuple(differing) for differing in found]


def same(one: Any, other: Any) -> bool:
    """Return True if two values are the same to the last bit; NaN is NaN, and 0.0 isn't -0.0."""
    if isinstance(one, float) and isinstance(other, float):
        return struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def _shown(one: Any, other: Any) -> tuple[str, str]:
    """Return two values that differ, as text; for bytes how many differ, and the first."""
    if isinstance(one, bytes) and isinstance(other, bytes):
        if len(one) != len(other):
            return f"{len(one):,} bytes", f"{len(other):,} bytes"
        pair = [np.frombuffer(value, np.uint8) for value in (one, other)]
        places = np.flatnonzero(pair[0] != pair[1])
        first = int(places[0])
        what = f"{len(places):,} of {len(one):,} bytes; the first, {first:,}: "
        return f"{what}{pair[0][first]}", f"{pair[1][first]}"
    return text_of(one), text_of(other)


def text_of(value: Any) -> str:
    """Return a value as text with all its digits, in one line."""
    text = "null" if value is None else str(value)
    return shortened(" ".join(text.split()), _SHOWN) if text.split() else repr(value)


def placed(stored: Sequence[Any], rebuilt: Sequence[Any]) -> list[int | None]:
    """Return the place of each stored key among the rebuilt ones, None if it is missing."""
    places: Mapping[Any, int] = {key: place for place, key in enumerate(rebuilt)}
    return [places.get(key) for key in stored]


def matching(rows: pl.DataFrame, wanted: pl.DataFrame) -> pl.DataFrame:
    """Return the rows that have some keys, null among them, in their order.

    Args:
        rows: The rows.
        wanted: The keys: some columns of the rows, of any types.
    """
    typed = wanted.select(pl.col(name).cast(rows.schema[name], strict=False) for name in wanted.columns)
    return rows.join(typed, on=wanted.columns, how="semi", nulls_equal=True, maintain_order="left")
