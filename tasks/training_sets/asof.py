"""The point-in-time join: for each row the newest features available at its time. Pure.

    as_of      Jan ───── Feb ───── Mar            a row at the 20th of February gets those as of February
    event                     ×

A history is read from versions that are sorted by (entity, as_of), so each entity has one *run* of ascending times
a version. A row's features are found by a bisection of each of its entity's runs: nothing is sorted, and only the
runs' first rows are matched by key. A history in any other order is sorted first.

The leak canary: for some rows of a bucket the history gets rows of the same entity that don't count at the row's time:
later ones, and, where it matters, expired ones and ones known too late or no longer. The same function repeats the
join; if a row now finds something else, it has used data that it mustn't, and the run fails.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import polars as pl

from tasks.io.compiled import Compiled
from tasks.io.errors import LeakFound
from tasks.io.tensors import Int64Array
from tasks.store.layout import AS_OF
from tasks.training_sets.history import FROM, TIME, UNTIL

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


_jit = Compiled(globals())


@_jit
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


SAMPLE = 1000
"""Spine rows of a bucket for which rows are planted, each of another entity."""

_TICK = dt.timedelta(microseconds=1)
_FIRST, _LAST = pl.lit(dt.datetime(1, 1, 2, tzinfo=dt.UTC), TIME), pl.lit(None, TIME)
_ROW = "\x00row"


def plant(
    spine: pl.DataFrame,
    history: pl.DataFrame,
    rows: Int64Array,
    *,
    entity: str,
    event_time: str,
    ttl: dt.timedelta | None = None,
    strict: bool = False,
    known_at: bool = False,
    join: Callable[..., Int64Array] = join_asof,
) -> int:
    """Plant rows, join again, and compare.

    Args:
        spine: The bucket's rows, as they were joined.
        history: Its history, as it was joined.
        rows: Result of the join: for each spine row the history's row, or −1.
        entity: Key column of both.
        event_time: The spine's time column.
        ttl: As in the join.
        strict: As in the join.
        known_at: As in the join.
        join: The function that joined.

    Returns:
        Number of planted rows.

    Raises:
        LeakFound: a spine row finds another row than before; the message names it.
    """
    sampled = _sample(spine, entity, event_time)
    if not sampled.height:
        return 0
    columns = [entity, AS_OF, FROM, UNTIL]
    keys = sampled.select(pl.col(entity).cast(history.schema[entity], strict=False))
    own = history.select(columns).with_row_index(_ROW).join(keys, on=entity, how="semi", maintain_order="left")
    before = np.append(own[_ROW].to_numpy().astype(np.int64), -1)
    kinds = list(_kinds(pl.col(event_time).cast(TIME), ttl=ttl, strict=strict, known_at=known_at))
    planted = [
        sampled.select(
            pl.col(entity).cast(history.schema[entity], strict=False),
            moment.alias(AS_OF),
            created.alias(FROM),
            until.alias(UNTIL),
        )
        for _, moment, created, until in kinds
    ]
    more = pl.concat([own.select(columns), *planted])
    options = {"entity": entity, "event_time": event_time, "ttl": ttl, "strict": strict, "known_at": known_at}
    found = join(sampled.drop(_ROW), more, **options)
    real = found < own.height
    again = np.where(real, before[np.where(real, found, -1)], -2)
    changed = np.flatnonzero(again != rows[sampled[_ROW].to_numpy()])
    if len(changed):
        first = sampled.row(int(changed[0]), named=True)
        number = int(found[changed[0]]) - own.height
        what = kinds[number // sampled.height][0] if number >= 0 else "another row"
        raise LeakFound(
            f"{len(changed)} of {sampled.height} rows changed when rows that they can't know were added: the row of "
            f"{entity} {first[entity]!r} at {first[event_time]} got {what}; nothing is published, as the features of "
            f"this join can't be trusted: report it"
        )
    return sampled.height * len(kinds)


def _sample(spine: pl.DataFrame, entity: str, event_time: str) -> pl.DataFrame:
    """Return rows from the whole spine with their numbers, one an entity, so that planted rows concern no other row."""
    rows = spine.select(entity, event_time).with_row_index(_ROW).drop_nulls()
    return rows.gather_every(max(1, rows.height // SAMPLE)).unique(entity, keep="any", maintain_order=True)


def _kinds(
    time: pl.Expr, *, ttl: dt.timedelta | None, strict: bool, known_at: bool
) -> Iterator[tuple[str, pl.Expr, pl.Expr, pl.Expr]]:
    """Return the planted rows for a row's time: their name in an error, as_of, created and superseded."""
    within = time - _TICK if strict else time
    yield "features from its future", time if strict else time + _TICK, _FIRST, _LAST
    yield "features from its far future", time + dt.timedelta(days=365), _FIRST, _LAST
    if ttl is not None:
        yield "features older than the time-to-live", time - ttl - _TICK, _FIRST, _LAST
    if known_at:
        yield "features that were computed after it", within, time + _TICK, _LAST
        yield "features that were superseded by then", within, _FIRST, time
