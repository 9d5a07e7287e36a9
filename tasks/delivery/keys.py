"""Identity of a sample, its split, and its place in the order: all by stable hashes. Pure.

    entity ─┬───────────── split        never by row: an entity's rows stay together
            └ + times ─ key ─ + ordinal ─ sample id ─ + seed ─ random key ─ place in the split's order

A key depends only on the source's values, so it is the same in every version that holds the row. Rows with the same
key are distinguished by an ordinal, in the order of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.io.hashing import stable_hash

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
SplitArray = npt.NDArray[np.int8]

SPLITS = ("train", "validation", "test")

_ORDER, _SPLIT = 0, 1  # each draw of a seed has a separate hash function
_PURPOSES = 2


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows of one unit that repeat an earlier row's key: their numbers, and their ordinals from 1."""

    rows: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    ordinals: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))


def sample_keys(columns: Sequence[pa.Array | pa.ChunkedArray]) -> UInt64Array:
    """Return the key of each row: the stable hash of the first column, mixed with those of the others."""
    keys = stable_hash(columns[0])
    for position, column in enumerate(columns[1:], 1):
        keys = _mixed(keys ^ stable_hash(column, position))
    return keys


def sample_ids(keys: UInt64Array, repeats: Repeats) -> Int64Array:
    """Return the keys as int64; keys of repeating rows are mixed with their ordinal."""
    ids = keys.copy()
    if len(repeats.rows):
        ids[repeats.rows] = _mixed(keys[repeats.rows] ^ stable_hash(pa.array(repeats.ordinals)))
    return ids.view(np.int64)


def random_keys(ids: Int64Array, seed: int) -> UInt64Array:
    """Return the sort keys of samples: a bijection of their ids for each seed, so that distinct ids never tie."""
    return stable_hash(pa.array(ids), seed * _PURPOSES + _ORDER)


def split_draws(entities: UInt64Array, seed: int) -> npt.NDArray[np.float64]:
    """Return a draw in [0, 1) for each entity, given by its hash; the shares of the splits cut it from below."""
    draws: npt.NDArray[np.float64] = stable_hash(pa.array(entities), seed * _PURPOSES + _SPLIT) / 2.0**64
    return draws


def entity_splits(entities: UInt64Array, seed: int, validation: float, test: float) -> SplitArray:
    """Return the number of the split (`SPLITS`) of entities, given by their hashes, for the shares of two splits."""
    draws = split_draws(entities, seed)
    return np.select([draws < validation, draws < validation + test], [1, 2], 0).astype(np.int8)


def repeated(ordered: UInt64Array) -> int:
    """Return the number of keys, in ascending order, that equal the previous one."""
    return int(np.count_nonzero(np.diff(ordered) == 0))


def bucket_of(keys: UInt64Array, buckets: int) -> npt.NDArray[np.uint32]:
    """Return the part of the keys' range of each key, of equal parts, ascending with the key; at most 2**32 parts."""
    return ((keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.uint32)


def find_repeats(keys: UInt64Array, units: Int64Array, rows: Int64Array) -> dict[int, Repeats]:
    """Return, by unit, the rows with the key of an earlier row.

    Args:
        keys: All rows that may share keys, shape (n,).
        units: Unit of each row.
        rows: Row within its unit.
    """
    order = np.lexsort((rows, units, keys))
    sorted_keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[: len(keys)])
    ordinals = np.arange(len(keys)) - np.repeat(first, np.diff(first, append=len(keys)))
    later = np.flatnonzero(ordinals)
    found = {}
    for unit in np.unique(units[order[later]]).tolist():
        own = later[units[order[later]] == unit]
        found[unit] = Repeats(rows[order[own]], ordinals[own])
    return found


def merge_repeats(parts: Iterable[Mapping[int, Repeats]]) -> dict[int, Repeats]:
    """Return the repeats by unit, merged from several parts of the keys."""
    merged: dict[int, Repeats] = {}
    for part in parts:
        for unit, repeats in part.items():
            before = merged.get(unit, Repeats())
            merged[unit] = Repeats(
                np.concatenate([before.rows, repeats.rows]), np.concatenate([before.ordinals, repeats.ordinals])
            )
    return merged


def split_entities(entities: UInt64Array, splits: SplitArray) -> tuple[Int64Array, int]:
    """Return the number of distinct entities in each split, shape (3,), and of entities in several splits."""
    pairs = np.unique(np.stack([entities, splits.astype(np.uint64)], axis=1), axis=0)
    counts = np.bincount(pairs[:, 1].astype(np.int64), minlength=len(SPLITS))
    _, seen = np.unique(pairs[:, 0], return_counts=True)
    return counts, int((seen > 1).sum())


def _mixed(values: UInt64Array) -> UInt64Array:
    return stable_hash(pa.array(values))
