"""The rows that a model learns from: those of a label, or of a user's table, which is checked before any work starts.

A label is evaluated on whole entities:

    … events ≤ t …            decide if an entity has a row at t (only those of the last `active_days`, if given)
    t < events ≤ t + days     give its target

Rows of a table are read and judged like the features' events (`tasks.features.rows`): a row without a readable time or
without a target is rejected with the reason, and so is one whose key can't be read; a row without its entity key is
kept, and gets no features.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.types as pt

from tasks.features.config import FeatureStoreConfig
from tasks.features.csv_text import polars_type
from tasks.features.definitions import ColumnKind, FeatureGroup
from tasks.features.kernel import evaluate
from tasks.features.keys import KeyType
from tasks.features.plan import SourcePlan, key_type_of
from tasks.features.rows import TIME, ColumnPlan, RowPlan
from tasks.features.schema import check_kind, check_times, settled
from tasks.features.sources import SourceTable, inspect
from tasks.io.errors import SourceError
from tasks.io.notation import missing_values
from tasks.io.text import closest
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.training_sets.definition import Label, Model, SpineSource
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


# --- a user's table ---

SPINE = "spine"
_MAPPING = "spine: {{columns: {{{}: …}}}}"


def plan_spine(
    model: Model, keys: Mapping[str, KeyType | None], config: FeatureStoreConfig, known: SourceTable | None = None
) -> SourcePlan:
    """Find the files of a model's spine and plan the reading of their rows.

    Args:
        model: A model whose spine is a table.
        keys: Entity keys that the spine must have, each with its type in the features (None: from the files).
        config: Time zone, epoch unit and earliest time.
        known: The spine's files, if they are known; else they are searched at its URI.

    Raises:
        SourceError: the spine is missing, unreadable, or lacks a column.

    """
    assert isinstance(model.spine, SpineSource)
    table = known or inspect(SPINE, model.spine.uri)
    wanted = (*keys, EVENT_TIME, TARGET)
    unknown = sorted(set(model.spine.columns) - set(wanted))
    if unknown:
        raise SourceError(
            f"model '{model.name}' maps '{unknown[0]}', which isn't read from its spine{closest(unknown[0], wanted)}"
        )
    names = {ours: model.spine.columns.get(ours, ours) for ours in wanted}
    for ours, theirs in names.items():
        _check_column(model, table, ours, theirs)
    missing = missing_values(config.null_values)
    table = settled(table, [names[ours] for ours in (*keys, TARGET)], missing, sampled=[names[EVENT_TIME]])
    check_times(table, names[EVENT_TIME], config.epoch_unit, f"the spine of model '{model.name}'")
    for ours, theirs in names.items():
        kind: ColumnKind = "time" if ours == EVENT_TIME else "any" if ours == TARGET else "key"
        check_kind(table, kind, ours, theirs, _MAPPING.format(ours))
    columns = [
        ColumnPlan(
            name=key,
            source_name=names[key],
            kind="key",
            key_type=of or key_type_of(table, names[key]) or "string",
            strict=True,
        )
        for key, of in keys.items()
    ]
    columns.append(ColumnPlan(name=EVENT_TIME, source_name=names[EVENT_TIME], kind="time", required=True))
    columns.append(_target(model, names[TARGET], table.type_of(names[TARGET])))
    return SourcePlan(
        table=table,
        rows=RowPlan(
            source=SPINE,
            columns=tuple(columns),
            time=EVENT_TIME,
            earliest=config.earliest,
            timezone=config.timezone,
            epoch_unit=config.epoch_unit,
            missing=missing,
        ),
    )


def _check_column(model: Model, table: SourceTable, ours: str, theirs: str) -> None:
    for file in table.files:
        if theirs not in file.schema.names:
            raise SourceError(
                f"the spine of model '{model.name}': {file.info.uri} has no column '{theirs}'"
                f"{closest(theirs, file.schema.names)}. If '{ours}' bears another name, say so in the model: "
                f"{_MAPPING.format(ours)}"
            )


def _target(model: Model, source_name: str, kind: pa.DataType) -> ColumnPlan:
    """Plan a target, which keeps its kind: classes stay integers or text; numbers must be finite to be learnable.

    Raises:
        SourceError: its type can't be learned.

    """
    if pt.is_floating(kind):
        return ColumnPlan(name=TARGET, source_name=source_name, kind="number", required=True)
    if pt.is_integer(kind):  # a file of booleans among them counts as 0 and 1
        return ColumnPlan(name=TARGET, source_name=source_name, kind="any", required=True, dtype=pl.Int64())
    if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_dictionary(kind):
        return ColumnPlan(name=TARGET, source_name=source_name, kind="key", key_type="string", required=True)
    if not (pt.is_boolean(kind) or pt.is_decimal(kind) or pt.is_string_view(kind) or pt.is_null(kind)):
        raise SourceError(
            f"the spine of model '{model.name}': the target '{source_name}' is of type {kind}; only numbers, booleans "
            f"and text can be learnt: derive one of them, or map another column: {_MAPPING.format(TARGET)}"
        )
    return ColumnPlan(name=TARGET, source_name=source_name, kind="any", required=True, dtype=polars_type(kind))
