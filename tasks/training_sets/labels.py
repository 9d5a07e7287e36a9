"""A label evaluated on whole entities: their events after a time, for all that had events before it. Pure.

… events ≤ t …            decide if an entity has a row at t (only those of the last `active_days`, if given)
t < events ≤ t + days     give its target
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import numpy as np
import polars as pl

from tasks.features.definitions import FeatureGroup
from tasks.features.kernel import evaluate
from tasks.features.rows import TIME
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.training_sets.definition import Label
from tasks.training_sets.loading import load_models

_MICROSECOND = dt.timedelta(microseconds=1)


def label_groups(path: str) -> list[FeatureGroup]:
    """Return the labels of a file of models, as groups of their events."""
    spines = [model.spine for model in load_models(path).values()]
    return [as_group(spine) for spine in spines if isinstance(spine, Label)]


def as_group(label: Label) -> FeatureGroup:
    """Return the label as a group of one feature, so that it is planned and evaluated like features."""
    return FeatureGroup(
        name=f"label-{label.name}", entity=label.entity, source=label.source, features={TARGET: label.target}
    )


def label_rows(label: Label, events: pl.DataFrame, time: str, times: Sequence[dt.datetime]) -> pl.DataFrame:
    """Return the rows of a label.

    Args:
        label: The declaration.
        events: All rows of some entities in the order of the files: the columns of the label's group, and the time.
        time: Name of the event time's column (microseconds, UTC).
        times: Times to evaluate it at.

    Returns:
        One row for each time and entity with events by then: the entity, `event_timestamp` and `target`, which is
        null where the expression has no value; in order of the times.

    Raises:
        DefinitionError: the expression can't be evaluated, or gives several values an entity.

    """
    group = as_group(label)
    moments = events[time].dt.epoch("us").to_numpy()
    order = np.argsort(moments, kind="stable")
    moments = moments[order]

    def between(after: dt.datetime | None, until: dt.datetime) -> pl.DataFrame:
        """Return events in after < time ≤ until, in the order of the files."""
        first = 0 if after is None else int(np.searchsorted(moments, _ticks(after), side="right"))
        last = int(np.searchsorted(moments, _ticks(until), side="right"))
        return events[np.sort(order[first:last])]

    over_nothing = _over_no_rows(group, events)
    found = [_no_rows(group, events, time)]
    for moment in times:
        since = None if label.active_days is None else moment - dt.timedelta(days=label.active_days)
        there = between(since, moment).select(label.entity).unique()
        after = between(moment, moment + dt.timedelta(days=label.days))
        targets = evaluate(group, after, time, moment)
        idle = there.join(targets, on=label.entity, how="anti").with_columns(
            pl.lit(over_nothing, targets.schema[TARGET]).alias(TARGET)
        )
        rows = pl.concat([targets.join(there, on=label.entity, how="semi"), idle])
        found.append(rows.with_columns(pl.lit(moment, TIME).alias(EVENT_TIME)).sort(label.entity))
    return pl.concat(rows.select(label.entity, EVENT_TIME, TARGET) for rows in found)


def _over_no_rows(group: FeatureGroup, events: pl.DataFrame) -> object:
    """Return the target over no rows: 0 for a count or a sum, None for a mean."""
    try:
        return events.clear().select(group.features[TARGET].alias(TARGET)).item()
    except (pl.exceptions.PolarsError, ValueError):
        return None


def _no_rows(group: FeatureGroup, events: pl.DataFrame, time: str) -> pl.DataFrame:
    empty = evaluate(group, events.clear(), time, dt.datetime(1970, 1, 1, tzinfo=dt.UTC))
    return empty.with_columns(pl.lit(None, TIME).alias(EVENT_TIME))


def _ticks(moment: dt.datetime) -> int:
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // _MICROSECOND
