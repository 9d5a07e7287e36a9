"""A feature group evaluated as of several times in one pass. Pure: frames in, frames out.

Between two times most entities have no event. Their aggregations over all events can't have changed and are
kept; windows, which move with the time, and derived features are evaluated anew. Each time's features are those of
`kernel.evaluate` on the events up to it, to the last bit.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from tasks.features.definitions import FeatureGroup
from tasks.features.kernel import aggregate, complete, evaluate, uses_as_of

_CODE = "\x00code"


def evaluate_history(
    group: FeatureGroup, events: pl.DataFrame, time: str, as_of: Sequence[dt.datetime]
) -> Iterator[pl.DataFrame]:
    """Compute all features of a group as of each time.

    Args:
        group: The declaration.
        events: All rows of some entities, as `kernel.evaluate` takes them, up to the last time.
        time: Name of the event time's column.
        as_of: Times, UTC, ascending, at least one.

    Yields:
        For each time the result of `kernel.evaluate` for the events up to it: an entity without one has no row.

    Raises:
        DefinitionError: as `kernel.evaluate`.

    """
    if len(as_of) == 1:
        yield evaluate(group, events, time, as_of[0])
        return
    ticks = events[time].to_physical().to_numpy()
    # Number of the first time that an event counts for.
    first = np.searchsorted(_ticks(as_of), ticks, side="left")
    codes = _codes(events, group.entity)
    plain: pl.DataFrame | None = None
    for number, moment in enumerate(as_of):
        counts = first <= number
        if plain is None or uses_as_of(group.features):
            plain = aggregate(group, events.filter(pl.Series(counts)), moment)
        else:
            plain = _renewed(plain, group, events, moment, counts & _of_same_entities(codes, first == number))

        def after(start: dt.datetime, counts: npt.NDArray[np.bool_] = counts) -> pl.DataFrame:
            return events.filter(pl.Series(counts & (ticks > _ticks([start])[0])))

        yield complete(group, plain, events, moment, after)


def _renewed(
    plain: pl.DataFrame, group: FeatureGroup, events: pl.DataFrame, as_of: dt.datetime, rows: npt.NDArray[np.bool_]
) -> pl.DataFrame:
    """Return the plain aggregations, recomputed for some entities; rows: all events that count of these entities."""
    if not rows.any():
        return plain
    fresh = aggregate(group, events.filter(pl.Series(rows)), as_of)
    return pl.concat([plain.join(fresh, on=group.entity, how="anti"), fresh])


def _of_same_entities(codes: npt.NDArray[np.uint32], rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return a mask of all rows of the entities of some rows."""
    touched = np.zeros(int(codes.max(initial=0)) + 1, dtype=bool)
    touched[codes[rows]] = True
    return touched[codes]


def _codes(events: pl.DataFrame, entity: str) -> npt.NDArray[np.uint32]:
    """Return a small number for each row's entity."""
    keys = events.select(pl.col(entity).unique()).with_row_index(_CODE)
    coded = events.select(entity).join(keys, on=entity, how="left", maintain_order="left")
    return coded[_CODE].to_numpy()


def _ticks(times: Sequence[dt.datetime]) -> npt.NDArray[np.int64]:
    return pl.Series(times, dtype=pl.Datetime("us", "UTC")).to_physical().to_numpy()
