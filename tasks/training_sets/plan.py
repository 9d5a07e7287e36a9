"""Plan of a training set, made before the work starts: its rows, versions and columns. Pure.

A plan is a frozen value that goes to the workers. Its rows are those of a label, or of a user's table, which is checked
before any work starts. A label is evaluated on whole entities:

    … events ≤ t …            decide if an entity has a row at t (only those of the last `active_days`, if given)
    t < events ≤ t + days     give its target

Rows of a table are read and judged like the features' events (`tasks.features.rows`): a row without a readable time or
without a target is rejected with the reason, and so is one whose key can't be read; a row without its entity key is
kept, and gets no features.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.types as pt

from tasks.features.config import FeatureStoreConfig
from tasks.features.csv_text import polars_type
from tasks.features.definitions import ColumnKind, Definitions, FeatureGroup
from tasks.features.kernel import evaluate
from tasks.features.plan import FeaturePlan, SourcePlan, key_type_of, plan_features
from tasks.features.rows import TIME, ColumnPlan, KeyType, RowPlan, key_type
from tasks.features.schema import check_kind, check_times, settled
from tasks.features.sources import SourceTable, inspect
from tasks.io.errors import DefinitionError, SourceError
from tasks.io.notation import expand, missing_values
from tasks.io.text import closest
from tasks.store.layout import EVENT_TIME, TARGET, TRAINING_SET
from tasks.store.manifest import InputRecord, RowBalance
from tasks.training_sets.definition import FeatureReference, Label, Model, Pin, SpineSource, column_names, load_models
from tasks.training_sets.history import History, resolve_history

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


ResolveHistory = Callable[[str, str, Sequence[str], Pin], History]


class Balanced(Protocol):
    """Holder of the row balances of its sources."""

    @property
    def balances(self) -> tuple[RowBalance, ...]:
        """Row balances by the sources' names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelPlan:
    """A label: its events, its times, and the time up to which the events are complete (None: their newest)."""

    label: Label
    events: FeaturePlan
    times: tuple[dt.datetime, ...]
    complete: dt.datetime | None

    def finished(self, newest: dt.datetime | None) -> tuple[dt.datetime, ...]:
        """Return the times whose days are over."""
        until = self.complete or newest
        days = dt.timedelta(days=self.label.days)
        return tuple(moment for moment in self.times if until is not None and until - moment >= days)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetPlan:
    """Everything that the workers need to know.

    references: the features, with '*' expanded, in the order of `columns`. columns: name of each feature's column →
    its reference. history_rows: rows of all versions that are read. spine: the user's table, label: the
    label; one of them.
    """

    model: Model
    root: str
    references: tuple[FeatureReference, ...]
    histories: tuple[History, ...]
    columns: Mapping[str, str]
    history_rows: int
    spine: SourcePlan | None
    label: LabelPlan | None
    rows_per_bucket: int
    later_share: float

    @property
    def source(self) -> SourcePlan:
        """Source of the rows: the spine's files, or the label's events."""
        if self.spine is not None:
            return self.spine
        assert self.label is not None, "a model has a spine or a label"
        return self.label.events.events

    @property
    def entities(self) -> tuple[str, ...]:
        """Entity keys of the rows; the model's is the last."""
        others = dict.fromkeys(history.entity for history in self.histories if history.entity != self.model.entity)
        return (*others, self.model.entity)

    @property
    def ttl(self) -> dt.timedelta | None:
        """Age above which features are ignored."""
        return None if self.model.ttl_days is None else dt.timedelta(days=self.model.ttl_days)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what is left out."""
        return tuple(
            f"{history.group} v{version} isn't read: {reason}"
            for history in self.histories
            for version, reason in history.left_out
        )

    def columns_of(self, history: History) -> dict[str, str]:
        """Return the features of a history → names of their columns."""
        named = zip(self.references, self.columns, strict=True)
        return {ref.feature: column for ref, column in named if ref.group == history.group}

    def source_records(self, computed: Balanced) -> list[InputRecord]:
        """Return the source files as they were read, for the manifest; on a local disk their fingerprints read them."""
        rows = next((b.rows_in for b in computed.balances if b.name == self.source.name), None)
        records = [self.source.table.record(rows)]
        if self.label is not None:
            records += [lookup.dimension.table.record(None) for lookup in self.label.events.lookups]
        return records


def plan_training_set(
    model: Model,
    definitions: Definitions,
    config: FeatureStoreConfig,
    started: dt.datetime,
    *,
    resolve: ResolveHistory = resolve_history,
    known: Mapping[str, SourceTable] | None = None,
) -> TrainingSetPlan:
    """Plan a model's training set.

    Args:
        model: The declaration.
        definitions: Declared sources with their URIs, for labels.
        config: The user's configuration; features are those published in its root by now.
        started: Start of the run, UTC: no label reads later events.
        resolve: Function that finds a group's history.
        known: Sources with known files, by name; the others are searched at their URIs.

    Raises:
        DefinitionError: a feature, a source or an entity is missing.
        VersionNotFound: a feature group, or a pinned version, is missing.
        SourceError: the spine or the label's events are missing, unreadable, or lack a column.
    """
    histories, references = [], []
    for group in model.groups:
        own = [ref for ref in model.features if ref.group == group]
        history = resolve(config.root, group, [ref.feature for ref in own], own[0].pin)
        histories.append(history)
        references += [FeatureReference(group, feature, own[0].pin) for feature in history.features]
    keys = _key_types(model, histories)
    spine, label = None, None
    if isinstance(model.spine, Label):
        label = _plan_label(model, model.spine, definitions, config, started=started, keys=keys, known=known)
    else:
        spine = plan_spine(model, keys, config, (known or {}).get(SPINE))
    names = column_names(references)
    if taken := sorted(set(names) & {*keys, *TRAINING_SET}):
        raise DefinitionError(
            f"model '{model.name}': '{taken[0]}' is both a key and a feature's column; rename the key"
        )
    return TrainingSetPlan(
        model=model,
        root=config.root,
        references=tuple(references),
        histories=tuple(histories),
        columns=dict(zip(names, map(str, references), strict=True)),
        history_rows=sum(version.rows for history in histories for version in history.versions),
        spine=spine,
        label=label,
        rows_per_bucket=config.rows_per_bucket,
        later_share=config.label_thresholds.later_share,
    )


def _key_types(model: Model, histories: list[History]) -> dict[str, KeyType | None]:
    """Return the entity keys of the spine with their types, taken from the features; None if no feature has it."""
    found: dict[str, History] = {}
    for history in histories:
        first = found.setdefault(history.entity, history)
        if first.key_type != history.key_type:
            raise DefinitionError(
                f"model '{model.name}': {history.entity} is of type {first.key_type} in {first.group}, of type "
                f"{history.key_type} in {history.group}; compute one of them again from keys of the same type"
            )
    types: dict[str, KeyType | None] = {entity: key_type([history.key_type]) for entity, history in found.items()}
    return {**types, model.entity: types.get(model.entity)}


def _plan_label(
    model: Model,
    label: Label,
    definitions: Definitions,
    config: FeatureStoreConfig,
    *,
    started: dt.datetime,
    keys: Mapping[str, KeyType | None],
    known: Mapping[str, SourceTable] | None,
) -> LabelPlan:
    strangers = [key for key in keys if key != label.entity]
    if strangers:
        raise DefinitionError(
            f"model '{model.name}' reads features of {strangers[0]}, but the rows of its label '{label.name}' have no "
            f"{strangers[0]}; leave them out, or give a spine with both columns"
        )
    group = as_group(label)
    only = Definitions(events=definitions.events, dimensions=definitions.dimensions, groups={group.name: group})
    complete = expand(config.as_of, config.timezone)[-1] if config.as_of else None
    (planned,) = plan_features(only, config.model_copy(update={"groups": ()}), (complete or started,), known)
    rows = planned.events.rows
    columns = tuple(
        replace(column, key_type=keys[label.entity] or column.key_type) if column.name == label.entity else column
        for column in rows.columns
    )
    events = replace(planned.events, rows=replace(rows, columns=columns))
    return LabelPlan(
        label=label, events=replace(planned, events=events), times=expand(label.at, config.timezone), complete=complete
    )
