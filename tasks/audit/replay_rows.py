"""Rows as they are stored and as they were made again: which to take, how to read them, and where they differ."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import layout, storage
from tasks.core.errors import CorruptVersion
from tasks.core.manifest import FileEntry
from tasks.core.numerals import shortened
from tasks.core.transient import is_transient

IntArray = npt.NDArray[np.int64]

ABSENT = "no row"
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Cause:
    """What may be why something differs: its kind, such as 'input' or 'library', and a sentence.

    columns: those that it can make differ; none means any.
    """

    kind: str
    text: str
    columns: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that isn't as it is stored; row: which of several rows of what was replayed, if it has several."""

    column: str
    stored: str
    rebuilt: str
    row: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One row, image or sample; causes: why it alone may differ, such as its file that was altered."""

    name: str
    file: str
    differences: tuple[Difference, ...] = ()
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a replay of one kind of dataset has found.

    unit: what was sampled, 'row', 'image' or 'sample'; total: how many the version has. causes: what is known to be
    otherwise than it was, for all of them. altered: stored files that aren't what the manifest says. notes: what
    couldn't be made again, or only alike.
    """

    unit: str
    total: int
    replayed: tuple[Replayed, ...]
    causes: tuple[Cause, ...] = ()
    altered: tuple[Cause, ...] = ()
    notes: tuple[str, ...] = ()


class StoredFiles:
    """The stored files of a version, each looked at once before it is read: is it what the manifest says?

    Args:
        base: Directory of the version.

    """

    def __init__(self, base: str) -> None:
        self.base = base
        self._seen: dict[str, Cause | None] = {}

    @property
    def altered(self) -> tuple[Cause, ...]:
        """Files that aren't as they were, of those that were looked at."""
        return tuple(cause for cause in self._seen.values() if cause is not None)

    def check(self, entry: FileEntry) -> Cause | None:
        """Compare a file's bytes with its digest; None if they are the same."""
        if entry.path not in self._seen:
            self._seen[entry.path] = self._compare(entry)
        return self._seen[entry.path]

    def _compare(self, entry: FileEntry) -> Cause | None:
        try:
            found = storage.digest_of(layout.join(self.base, entry.path), entry.digest)
        except FileNotFoundError:
            return Cause("stored", f"the stored file {entry.path} is gone; restore it from a copy")
        if found == entry.digest:
            return None
        return Cause(
            "stored",
            f"the stored file {entry.path} was altered since it was published ({_short(entry.digest)} then, "
            f"{_short(found)} now); restore it from a copy",
        )

    def read(self, entry: FileEntry, rows: IntArray | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Some rows of a file, ascending, or all of them; None: it was altered so that it can't be read.

        Raises:
            Unreadable: the file was altered, and can't be read any more.
            CorruptVersion: it is what the manifest says, and can't be read.

        """
        cause = self.check(entry)
        uri = layout.join(self.base, entry.path)
        try:
            with storage.open_input(uri) as source:
                return _rows_of(pq.ParquetFile(source), rows, columns)
        except (pa.ArrowException, OSError, IndexError, KeyError) as fault:
            if is_transient(fault):
                raise
            if cause is not None:
                raise Unreadable(cause) from fault
            raise CorruptVersion(f"{uri} can't be read as Parquet ({fault}), though its digest is right") from fault


class Unreadable(Exception):
    """A stored file was altered so that nothing can be read of it."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.text)
        self.cause = cause


def _short(digest: str) -> str:
    return digest[: digest.find(":") + 13] + "…"


def _rows_of(file: pq.ParquetFile, rows: IntArray | None, columns: Sequence[str] | None) -> pa.Table:
    """Some rows of an open file, by reading the row groups that have them, one at a time."""
    wanted = None if columns is None else list(columns)
    if rows is None:
        return file.read(columns=wanted)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if len(rows) and rows[-1] >= starts[-1]:
        raise IndexError(f"row {rows[-1]} of {starts[-1]}")
    group_of = np.searchsorted(starts, rows, side="right") - 1
    tables = [file.schema_arrow.empty_table() if wanted is None else file.schema_arrow.empty_table().select(wanted)]
    for group in np.unique(group_of).tolist():
        own = rows[group_of == group] - starts[group]
        tables.append(file.read_row_group(group, columns=wanted).take(pa.array(own)))
    return pa.concat_tables(tables)


def choose(total: int, sample: int, seed: int) -> IntArray:
    """Numbers of some of so many things, ascending; all of them where they are no more than asked for."""
    if sample >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(np.random.default_rng(seed).choice(total, sample, replace=False, shuffle=False)).astype(np.int64)


def by_file(files: Sequence[tuple[FileEntry, int]], chosen: IntArray) -> list[tuple[FileEntry, IntArray]]:
    """The chosen ones in each file that has some, numbered within it; files come with how many each holds."""
    starts = np.concatenate([[0], np.cumsum([count for _, count in files])]).astype(np.int64)
    owner = np.searchsorted(starts, chosen, side="right") - 1
    return [(files[number][0], chosen[owner == number] - starts[number]) for number in np.unique(owner).tolist()]


def missing(name: str, entry: FileEntry, cause: Cause) -> Replayed:
    """What can't be compared, because it can't be read where it is stored."""
    differences = (Difference("(row)", "can't be read", "–"),)
    return Replayed(name=name, file=entry.path, differences=differences, causes=(cause,))


def ordinals(keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Keys with how often each has stood before, so that rows of equal keys are told apart by their order."""
    seen: dict[tuple[Any, ...], int] = {}
    found = []
    for key in keys:
        seen[key] = seen.get(key, -1) + 1
        found.append((*key, seen[key]))
    return found


def keys_of(table: pa.Table, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Values of some columns, a tuple a row."""
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def differences(stored: pa.Table, rebuilt: pa.Table, places: Sequence[int | None]) -> list[tuple[Difference, ...]]:
    """Where rows differ, to the last bit of each value.

    Args:
        stored: Rows as they are stored.
        rebuilt: Rows as they were made again, in any order.
        places: For each stored row its number among the rebuilt ones; None if it wasn't made.

    Returns:
        For each stored row its differences, none if there are none.

    """
    found: list[list[Difference]] = [
        [Difference("(row)", "there", ABSENT)] if place is None else [] for place in places
    ]
    pairs = [(row, place) for row, place in enumerate(places) if place is not None]
    for name in dict.fromkeys([*stored.column_names, *rebuilt.column_names]):
        for row, difference in _of_column(name, stored, rebuilt, pairs):
            found[row].append(difference)
    return [tuple(own) for own in found]


def _of_column(
    name: str, stored: pa.Table, rebuilt: pa.Table, pairs: Sequence[tuple[int, int]]
) -> list[tuple[int, Difference]]:
    kinds = [str(t.schema.field(name).type) if name in t.column_names else "no column" for t in (stored, rebuilt)]
    if kinds[0] != kinds[1]:
        return [(row, Difference(name, *kinds)) for row, _ in pairs]
    before, now = stored[name].to_pylist(), rebuilt[name].to_pylist()
    return [
        (row, Difference(name, *_shown(before[row], now[place])))
        for row, place in pairs
        if not same(before[row], now[place])
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same to the last bit; NaN is NaN, and 0.0 isn't -0.0."""
    if isinstance(one, float) and isinstance(other, float):
        return struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def _shown(one: Any, other: Any) -> tuple[str, str]:
    """Two values that differ, as text; of bytes how many differ, and the first."""
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
    """A value as text with all its digits, in one line."""
    text = "null" if value is None else str(value)
    return shortened(" ".join(text.split()), _SHOWN) if text.split() else repr(value)


def placed(stored: Sequence[Any], rebuilt: Sequence[Any]) -> list[int | None]:
    """For each stored key its place among the rebuilt ones, None if it isn't there."""
    places: Mapping[Any, int] = {key: place for place, key in enumerate(rebuilt)}
    return [places.get(key) for key in stored]
