"""The leak canary: rows from the future are planted, and must change nothing. Pure.

For some rows of a bucket the history gets rows of the same entity that don't count at the row's time: later ones,
and, where it matters, expired ones and ones known too late or no longer. The same function repeats the join; if a
row now finds something else, it has used data that it mustn't, and the run fails.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from tasks.io.errors import LeakFound
from tasks.store.layout import AS_OF
from tasks.training_sets.asof import Int64Array, join_asof
from tasks.training_sets.history import FROM, TIME, UNTIL

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
