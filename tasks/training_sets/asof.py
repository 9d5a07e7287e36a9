"""The point-in-time join: for each row the newest features available at its time. Pure.

    as_of      Jan ───── Feb ───── Mar            a row at the 20th of February gets those as of February
    event                     ×

A history is read from versions that are sorted by (entity, as_of), so each entity has one *run* of ascending times
a version. A row's features are found by a bisection of each of its entity's runs: nothing is sorted, and only the
runs' first rows are matched by key. A history in any other order is sorted first.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
import numpy.typing as npt
import polars as pl

from tasks.store.layout import AS_OF
from tasks.training_sets.history import FROM, TIME, UNTIL

Int64Array = npt.NDArray[np.int64]

MOST_RUNS = 64
"""More runs of an entity than this mean that its rows aren't sorted."""

_NEVER = np.iinfo(np.int64).max
_ALWAYS = np.iinfo(np.int64).min


def join_asof(
    spine: pl.DataFrame,
    history: pl.DataFrame,
    *,
    entity: str,
    event_time: str,
    ttl: dt.timedelta | None = None,
    strict: bool = False,
    known_at: bool = False,
) -> Int64Array:
    """Find the features of each spine row.

    Args:
        spine: Rows with the entity key and the event time (a timestamp with a time zone).
        history: Rows as `history.read_bucket` gives them; of equal (entity, as_of) the last one counts.
        entity: Key column of both.
        event_time: The spine's time column.
        ttl: Ignore features older than this (event time − as_of).
        strict: Require as_of < event time, instead of ≤.
        known_at: Count only rows with _created ≤ event time < _superseded.

    Returns:
        The number of the history's row for each spine row, or −1: without a key or a time, or if no row counts.

    """
    runs = _runs(history, entity)
    order: Int64Array | None = None
    if runs.most > MOST_RUNS:
        sorted_rows = history.select(entity, AS_OF).with_row_index("\x00row").sort(entity, AS_OF, "\x00row")
        order = sorted_rows["\x00row"].to_numpy().astype(np.int64)
        history = history[order]
        runs = _runs(history, entity)
    keys = spine.select(pl.col(entity).cast(runs.codes.schema[entity], strict=False))
    codes = keys.join(runs.codes, on=entity, how="left", maintain_order="left")["code"]
    none = np.empty(0, dtype=np.int64)
    found: Int64Array = _search(
        codes.fill_null(-1).to_numpy(),
        _ticks(spine[event_time], _ALWAYS),
        (runs.offsets, runs.starts, runs.ends),
        (
            _ticks(history[AS_OF], _NEVER),
            _ticks(history[FROM], _ALWAYS) if known_at else none,
            _ticks(history[UNTIL], _NEVER) if known_at else none,
        ),
        (-1 if ttl is None else ttl // dt.timedelta(microseconds=1), strict),
    )
    return found if order is None else np.append(order, -1)[found]


class _Runs:
    """Runs of one entity's rows with ascending as_of, grouped by entity, within an entity by their place."""

    def __init__(self, codes: pl.DataFrame, offsets: Int64Array, starts: Int64Array, ends: Int64Array) -> None:
        """Keep the runs: codes is entity → code, and the entity's runs are offsets[code] to offsets[code + 1]."""
        self.codes = codes
        self.offsets = offsets
        self.starts = starts
        self.ends = ends

    @property
    def most(self) -> int:
        """Largest number of runs of an entity."""
        return int(np.diff(self.offsets).max(initial=0))


def _runs(history: pl.DataFrame, entity: str) -> _Runs:
    key, moment = pl.col(entity), pl.col(AS_OF)
    begins = key.ne_missing(key.shift()) | (moment < moment.shift()).fill_null(value=True)
    heads = history.select(pl.arg_where(begins)).to_series().to_numpy().astype(np.int64)
    keys = history.select(entity)[heads]
    codes = keys.unique().drop_nulls().with_row_index("code").select(entity, pl.col("code").cast(pl.Int64))
    code = keys.join(codes, on=entity, how="left", maintain_order="left")["code"].fill_null(codes.height).to_numpy()
    place = np.argsort(code, kind="stable")
    counts = np.bincount(code, minlength=codes.height)[: codes.height]
    ends = np.append(heads[1:], history.height)
    return _Runs(codes, np.append(0, np.cumsum(counts)).astype(np.int64), heads[place], ends[place])


def _ticks(times: pl.Series, null: int) -> Int64Array:
    """Return microseconds since 1970, UTC."""
    ticks = times.cast(TIME).to_physical().fill_null(null).to_numpy()
    return cast(Int64Array, ticks)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], numba.njit(nogil=True, cache=True)(function))


@_compiled
def _search(
    codes: Int64Array,
    times: Int64Array,
    runs: tuple[Int64Array, Int64Array, Int64Array],
    history: tuple[Int64Array, Int64Array, Int64Array],
    limits: tuple[int, bool],
) -> Int64Array:
    """Return the number of the history's row for each (code, time), or −1.

    Args:
        codes: Entity of each row, −1 without.
        times: Time of each row, `_ALWAYS` without.
        runs: offsets, starts and ends of the runs.
        history: as_of, and the interval in which each row was known (both empty: always).
        limits: Time-to-live (−1: none), and True if as_of must be before the time.

    """
    offsets, starts, ends = runs
    as_of, known_from, known_until = history
    ttl, strict = limits
    found = np.full(len(codes), -1, dtype=np.int64)
    for row in range(len(codes)):
        code, time = codes[row], times[row]
        if code < 0 or time == np.iinfo(np.int64).min:
            continue
        latest = np.iinfo(np.int64).min
        if ttl >= 0 and time >= latest + ttl:
            latest = time - ttl  # the oldest as_of that counts; each match raises it
        for run in range(offsets[code], offsets[code + 1]):
            low, high = starts[run], ends[run]
            while low < high:
                middle = (low + high) // 2
                if as_of[middle] < time or (as_of[middle] == time and not strict):
                    low = middle + 1
                else:
                    high = middle
            candidate = low - 1
            while candidate >= starts[run] and as_of[candidate] >= latest:
                if len(known_from) == 0 or known_from[candidate] <= time < known_until[candidate]:
                    # Of equal times the later row: versions are ordered oldest first.
                    found[row], latest = candidate, as_of[candidate]
                    break
                candidate -= 1
    return found
