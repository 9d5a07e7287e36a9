"""Plan of a training set, made before the work starts: its rows, versions and columns. Pure.

A plan is a frozen value that goes to the workers.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Definitions
from tasks.features.keys import KeyType, key_type
from tasks.features.plan import FeaturePlan, SourcePlan, plan_features
from tasks.features.sources import SourceTable
from tasks.io.errors import DefinitionError
from tasks.io.notation import expand
from tasks.store.layout import TRAINING_SET
from tasks.store.manifest import InputRecord, RowBalance
from tasks.training_sets.definition import FeatureReference, Label, Model, Pin, column_names
from tasks.training_sets.history import History, resolve_history
from tasks.training_sets.spine import SPINE, as_group, plan_spine

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
        """Return the times whose days are over.

        Args:
            newest: Time of the newest event.

        """
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
