"""Rows of a training set: made again, and explained.

A feature's history consists of the versions that the training set's manifest names, regardless of later publications
or withdrawals; the match is the flow's (`tasks.training_sets.asof`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.audit.explanation import Explanation, Section, look_for
from tasks.audit.holders import closing_sections, made_from, split_row
from tasks.audit.inputs import (
    ROW,
    check_files,
    declared_sources,
    events_section,
    input_version,
    key_type_in,
    other_declaration,
    present,
    rows_of_key,
    sources_of,
)
from tasks.audit.replay_rows import StoredFiles, TableAgain, matching, same
from tasks.delivery.config import DeliveryConfig
from tasks.engine.partition import bucket_of, frame_of
from tasks.features.config import FeatureStoreConfig
from tasks.features.csv_text import polars_type
from tasks.features.loading import declared
from tasks.features.plan import with_uris
from tasks.features.rows import ColumnPlan, RowPlan
from tasks.features.shuffle import looked_up, read_and_judge
from tasks.features.writer import to_arrow
from tasks.io.errors import DefinitionError, PipelineError, SourceError, VersionNotFound
from tasks.io.notation import missing_values
from tasks.store import layout
from tasks.store.layout import AS_OF, EVENT_TIME, TARGET
from tasks.store.manifest import Manifest
from tasks.store.reading import read_manifest
from tasks.store.settings import config_of
from tasks.training_sets.asof import join_asof
from tasks.training_sets.definition import FeatureReference, Label, Pin, load_models
from tasks.training_sets.history import (
    FROM,
    TIME,
    UNTIL,
    History,
    HistoryVersion,
    history_among,
    history_of,
    read_bucket,
)
from tasks.training_sets.plan import SPINE, TrainingSetPlan, label_rows, plan_training_set
from tasks.training_sets.shuffle import find_features, label_lookups, taken, units_of

_PLACE = "\x00place"


class TrainingSetAgain(TableAgain):
    """The rows of a training set, to be made again."""

    time = EVENT_TIME

    def __init__(self, root: str, manifest: Manifest) -> None:
        super().__init__(root, manifest)
        self._config = config_of(FeatureStoreConfig, manifest, root=root)
        self._versions: dict[str, list[tuple[Manifest, StoredFiles]]] = {}

    def rows(self, sampled: pa.Table) -> pa.Table:
        """Make the rows of the sampled entities and times, in the order of a training set."""
        plan = self._plan()
        wanted = frame_of(sampled.select([self.entity, EVENT_TIME])).unique()
        rows = self._labelled(plan, wanted) if plan.label is not None else self._spine(plan, wanted)
        for history in plan.histories:
            rows = self._joined(plan, history, rows)
        return to_arrow(rows.select(*plan.entities[::-1], EVENT_TIME, *plan.columns, TARGET))

    def _plan(self) -> TrainingSetPlan:
        """Plan the run again, over only the files and versions that it read."""
        config, manifest = self._config, self.manifest
        name = manifest.definition["name"]
        if config.models is None:
            raise DefinitionError(f"{manifest} doesn't say where its model is declared")
        models = load_models(config.models)
        if name not in models:
            raise DefinitionError(f"the model '{name}' isn't declared in {config.models} any more")
        model = models[name]
        self.causes += other_declaration(manifest, model.describe())
        for record in manifest.inputs:
            if record.version is not None and (version := input_version(self.root, record, self.causes)) is not None:
                role = f"of the input {record.name} v{record.version}, "
                stored = (version, StoredFiles(self.root, version, role))
                self._versions.setdefault(record.name, []).append(stored)
        sources = sources_of([record for record in manifest.inputs if record.version is None])
        self.causes += sources.causes
        definitions = with_uris(declared(config.definitions), config)
        if isinstance(model.spine, Label):
            definitions = present(definitions, sources, self.notes)
        # A label's days were over when the run started, so later events are in no row, whenever that was.
        return plan_training_set(
            model, definitions, config, manifest.created_at, resolve=self._history, known=sources.tables
        )

    def _history(self, root: str, group: str, features: Sequence[str], _: Pin) -> History:
        """Return the history of the manifest's versions, regardless of later publications or withdrawals."""
        versions = [version for version, _ in self._versions.get(layout.feature_dataset(group), ())]
        if not versions:
            raise SourceError(f"no version of '{group}' that it was made from is there any more")
        return history_among(root, group, features, sorted(versions, key=lambda one: one.version))

    def _spine(self, plan: TrainingSetPlan, wanted: pl.DataFrame) -> pl.DataFrame:
        """Read the spine's rows of some entities and times, in its order."""
        return pl.concat(matching(read_and_judge(plan.source, unit)[0], wanted) for unit in units_of(plan))

    def _labelled(self, plan: TrainingSetPlan, wanted: pl.DataFrame) -> pl.DataFrame:
        """Make the label's rows of some entities and times, from their events."""
        assert plan.label is not None, "only called for a label"
        events = plan.label.events
        lookups = tuple(lookup.rows for lookup in label_lookups(plan))
        keys = wanted.select(self.entity).drop_nulls().unique()
        frames = []
        for unit in units_of(plan):
            rows, _, _ = read_and_judge(events.events, unit)
            rows = looked_up(rows, events.lookups, lookups).select(events.groups[0].columns)
            frames.append(matching(rows, keys))
        made = label_rows(plan.label.label, pl.concat(frames), events.time, plan.label.times)
        return matching(made, wanted).drop_nulls(TARGET)

    def _joined(self, plan: TrainingSetPlan, history: History, rows: pl.DataFrame) -> pl.DataFrame:
        """Join each row with the newest features of one group available at its time."""
        kind, buckets = polars_type(history.key_type), history.buckets
        assert kind is not None, "a published key has a type that can be read"
        keys = rows[history.entity].cast(kind, strict=False)
        part_of = bucket_of(keys.to_arrow(compat_level=pl.CompatLevel.oldest()), buckets)
        numbered = rows.with_row_index(_PLACE)
        pieces = []
        for part in np.unique(part_of).tolist():
            members = numbered.filter(pl.Series(part_of == part))
            member_keys = members[history.entity].cast(keys.dtype, strict=False)
            self._check(history, part)
            known, found = find_features(plan, history, members, part, buckets, keys=member_keys)
            pieces.append(members.hstack(taken(known, found, plan.columns_of(history))))
        return pl.concat(pieces).sort(_PLACE).drop(_PLACE) if pieces else rows

    def _check(self, history: History, part: int) -> None:
        """Compare the files of a bucket, of all versions, with their manifests."""
        files = {
            version.version: version.files_of(history.entity, part, history.buckets)[0] for version in history.versions
        }
        for manifest, stored in self._versions[layout.feature_dataset(history.group)]:
            for entry in manifest.files:
                if layout.join(stored.base, entry.path) in files.get(manifest.version, ()):
                    self.causes += [cause for cause in stored.check(entry) if cause not in self.causes]


def explain_training_row(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Explain the origin of a row of a training set, and its holders."""
    entity: str = manifest.definition["entity"]
    held = look_for(root, manifest, key, at, time=EVENT_TIME, spellings=_spellings(manifest, entity))
    if isinstance(held, Explanation):
        return held
    value, moment, row = held.key, held.moment, held.row
    matched = matches(root, manifest, row)
    concerned = {TARGET: "this row's target"} | {
        column: f"this row: {'missing' if row[column] is None else 'has a value'}"
        for column in manifest.definition["columns"]
    }
    concerned |= {match.group: "this row found none" for match in matched if match.version is None}
    splits = _splits(root, manifest, entity, value)
    sections = [
        held.section,
        *_target(manifest, (entity, value), row, moment),
        _features(manifest, matched, moment),
        _values(manifest, matched, row),
        *closing_sections(root, manifest, (entity, value), concerned, held.rejected, splits=[splits]),
    ]
    headline = f"{entity} {key} of {manifest}, event at {moment:%Y-%m-%d %H:%M} UTC"
    return Explanation(manifest, key, "held", headline, sections)


def _spellings(manifest: Manifest, entity: str) -> set[str]:
    columns = manifest.definition["spine"].get("columns", {})
    return {entity, columns.get(entity, entity), manifest.config.get("transaction_columns", {}).get(entity, entity)}


def _target(
    manifest: Manifest, key: tuple[str, int | str], row: Mapping[str, Any], moment: dt.datetime
) -> list[Section]:
    """Return the target, and the source rows that it was made of."""
    spine = manifest.definition["spine"]
    if "label" not in spine:
        return [_from_table(manifest, key, row, moment)]
    label = spine["label"]
    end = moment + dt.timedelta(days=label["days"])
    since = None if label["active_days"] is None else moment - dt.timedelta(days=label["active_days"])
    facts = {
        "target": row[TARGET],
        "label": label["name"],
        "expression": label["target"],
        "over events after": moment,
        "and until": end,
        "there is a row, as": f"{key[0]} had an event by {moment:%Y-%m-%d %H:%M}"
        + (f" and after {since:%Y-%m-%d %H:%M}" if since else ""),
    }
    section = Section(title="target", facts=facts)
    record = next(
        (source for source in manifest.inputs if source.version is None and source.name == label["source"]), None
    )
    if record is None:
        return [section]
    try:
        declared = declared_sources(manifest)
    except PipelineError as fault:
        return [section, Section(title=f"events in {record.name}", notes=[str(fault)])]
    spans = {"before": (since, moment), "in the window": (moment, end)}
    return [section, events_section(declared, manifest, record, key, spans)]


def _from_table(manifest: Manifest, key: tuple[str, int | str], row: Mapping[str, Any], moment: dt.datetime) -> Section:
    """Return the row of the user's table."""
    entity, value = key
    record = next(one for one in manifest.inputs if one.version is None and one.name == SPINE)
    columns = manifest.definition["spine"]["columns"]
    names = {ours: columns.get(ours, ours) for ours in (entity, EVENT_TIME)}
    plan = RowPlan(
        source=SPINE,
        columns=(
            ColumnPlan(name=entity, source_name=names[entity], kind="key", key_type=key_type_in(manifest, entity)),
            ColumnPlan(name=EVENT_TIME, source_name=names[EVENT_TIME], kind="time", required=True),
        ),
        time=EVENT_TIME,
        timezone=manifest.config["timezone"],
        epoch_unit=manifest.config["epoch_unit"],
        missing=missing_values(manifest.config.get("null_values")),
    )
    rows = []
    for file in check_files(record):
        events: dict[str, object] = {"rows": None}
        try:
            if (found := rows_of_key(file, plan, entity, value)) is not None:
                events["rows"] = found.kept.filter(pl.col(EVENT_TIME) == moment)[ROW].to_list()
        except PipelineError as fault:
            events["note"] = str(fault)
        rows.append(file.as_row() | events)
    return Section(
        title="target", facts={"target": row[TARGET], "from": f"the table {record.uri}", "read as": names}, rows=rows
    )


def _features(manifest: Manifest, matched: Sequence[Match], moment: dt.datetime) -> Section:
    """Return the features from each group."""
    definition = manifest.definition
    days = definition["ttl_days"]
    rows = [
        {
            "group": match.group,
            "from": None if match.version is None else f"v{match.version}",
            "as of": match.as_of,
            "age": None if match.age is None else days_of(match.age),
            "age seconds": None if match.age is None else match.age.total_seconds(),
            "why": match.why,
            "versions read": [f"v{version}" for version in match.versions],
            "deleted since": [f"v{version}" for version in match.gone] or None,
        }
        for match in matched
    ]
    rule = f"as of {'before' if definition['strict'] else 'at or before'} {moment:%Y-%m-%d %H:%M}"
    rule += "" if days is None else f", at most {days:g} days old"
    rule += ", known by then" if definition["known_at"] else ""
    shown = ("group", "from", "as of", "age", "why", "versions read")
    return Section(title="features", facts={"rule": rule}, rows=rows, shown=shown)


def _values(manifest: Manifest, matched: Sequence[Match], row: Mapping[str, Any]) -> Section:
    """Compare each feature with the version's present value."""
    given = {column: match for match in matched for column in match.columns}
    rows = []
    for column, reference in manifest.definition["columns"].items():
        match = given.get(column)
        if match is None:
            state = "nothing was matched" if row[column] is None else "its version can't be looked at"
        else:
            state = "as in the version" if same(match.columns[column], row[column]) else "DIFFERS from the version"
        rows.append({"column": column, "value": row[column], "reference": reference, "check": state})
    return Section(title="values", rows=rows)


def _splits(root: str, manifest: Manifest, entity: str, value: int | str) -> Section:
    """Return the split of the entity in each copy, and why; without a copy, that of the usual settings."""
    copies = [version for version in made_from(root, manifest)[0] if layout.kind(version.dataset) == "streaming-copy"]
    rows = []
    for copy in copies:
        try:
            config = config_of(DeliveryConfig, copy)
            rows.append(split_row(config, entity, value, str(copy)))
        except PipelineError as fault:
            rows.append({"copy": str(copy), "split": None, "why": str(fault)})
    notes = []
    if not copies:
        rows.append(split_row(DeliveryConfig(), entity, value, "(none yet)"))
        notes.append("No copy was made of it yet; this is what the usual settings would give.")
    return Section(title="split", rows=rows, notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Match of a feature group and a training row.

    Attributes:
        group: Name of the group.
        versions: Versions that were read for the training set.
        version: The version whose row was matched; None: none.
        as_of: Time of that row.
        age: Time from then to the event.
        why: The match in words, or why there is none.
        columns: Column of the training set → value in the matched row.
        gone: Versions that were read and have been deleted since.
    """

    group: str
    versions: tuple[int, ...]
    version: int | None = None
    as_of: dt.datetime | None = None
    age: dt.timedelta | None = None
    why: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    gone: tuple[int, ...] = ()

    @property
    def dataset(self) -> str:
        """Dataset of the group."""
        return layout.feature_dataset(self.group)


def matches(root: str, manifest: Manifest, row: Mapping[str, Any]) -> list[Match]:
    """Return the match of each group for a row of a training set.

    Args:
        root: Root of the store.
        manifest: The training set.
        row: The row, with its keys and its time.
    """
    references = {column: FeatureReference.parse(text) for column, text in manifest.definition["columns"].items()}
    groups = dict.fromkeys(reference.group for reference in references.values())
    matched = []
    for group in groups:
        features = {column: ref.feature for column, ref in references.items() if ref.group == group}
        matched.append(_match(root, manifest, row, group, features))
    return matched


def _match(root: str, manifest: Manifest, row: Mapping[str, Any], group: str, features: Mapping[str, str]) -> Match:
    dataset = layout.feature_dataset(group)
    read = sorted(record.version for record in manifest.inputs if record.name == dataset and record.version)
    known, gone = [], []
    for version in read:
        try:
            known.append(read_manifest(root, dataset, version))
        except VersionNotFound:
            gone.append(version)
    common: dict[str, Any] = {"group": group, "versions": tuple(read), "gone": tuple(gone)}
    if not known:
        return Match(**common, why="every version that was read has been deleted since")
    try:
        history = history_of(root, group, list(dict.fromkeys(features.values())), known)
        value = row.get(history.entity)
        if value is None:
            return Match(**common, why=f"the row has no {history.entity}")
        rows, versions = _rows_of(root, history, value, known_at=bool(manifest.definition["known_at"]))
    except PipelineError as fault:
        return Match(**common, why=f"the history can't be read: {fault}")
    when, options = row[EVENT_TIME], _options(manifest)
    spine = pl.DataFrame({history.entity: [value], EVENT_TIME: [when]}, schema_overrides={EVENT_TIME: TIME})
    place = int(join_asof(spine, rows, entity=history.entity, event_time=EVENT_TIME, **options)[0])
    if place < 0:
        return Match(**common, why=_why_not(rows, when, options))
    as_of = rows[AS_OF][place]
    values = rows.row(place, named=True)
    columns = {column: values[feature] for column, feature in features.items()}
    before = "before" if options["strict"] else "at or before"
    why = f"the newest {before} the event" + (" that was known by then" if options["known_at"] else "")
    return Match(**common, version=versions[place].version, as_of=as_of, age=when - as_of, why=why, columns=columns)


def _options(manifest: Manifest) -> dict[str, Any]:
    days = manifest.definition["ttl_days"]
    ttl = None if days is None else dt.timedelta(days=days)
    return {"ttl": ttl, "strict": manifest.definition["strict"], "known_at": manifest.definition["known_at"]}


def _rows_of(root: str, history: History, value: Any, known_at: bool) -> tuple[pl.DataFrame, list[HistoryVersion]]:
    """Return the rows of an entity in all versions, oldest first, and the version of each."""
    keys = pl.Series(history.entity, [value])
    bucket = int(bucket_of(keys.to_arrow(), history.buckets)[0])
    frames, owners = [], []
    for version in history.versions:
        alone = replace(history, versions=(version,))
        frame = read_bucket(root, alone, bucket, history.buckets, known_at=known_at, keys=keys)
        frames.append(frame)
        owners += [version] * frame.height
    return pl.concat(frames), owners


def _why_not(rows: pl.DataFrame, when: dt.datetime, options: Mapping[str, Any]) -> str:
    """Return why no row of a history counts."""
    times = rows[AS_OF].to_list()
    before = [moment for moment in times if (moment < when if options["strict"] else moment <= when)]
    if not times:
        return "the versions have no row of this key"
    if not before:
        return f"none before: the first is of {min(times):%Y-%m-%d %H:%M}"
    young = [moment for moment in before if options["ttl"] is None or when - moment <= options["ttl"]]
    if not young:
        age = days_of(when - max(before))
        return f"too old: the newest before is {age} old, and ttl_days is {options['ttl'] / dt.timedelta(days=1):g}"
    known = [until is None or until > when for start, until in rows.select(FROM, UNTIL).iter_rows() if start <= when]
    return "none was known by then" if not any(known) else "none that was known by then is before the event"


def days_of(span: dt.timedelta) -> str:
    """Return a span of time in days."""
    days = span / dt.timedelta(days=1)
    return f"{days:.4g} day{'s' if days != 1 else ''}"
