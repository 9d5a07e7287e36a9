"""One row of a training set or of a feature version, explained.

A feature's history in a training set consists of the versions that the training set's manifest names, regardless of
later publications or withdrawals; the match is the flow's (`tasks.training_sets.asof`).
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.audit.explanation import (
    Explanation,
    Held,
    Section,
    gate_section,
    look_for,
    rejected_sections,
    rejected_sources,
    version_section,
)
from tasks.audit.holders import holders_section, made_from, split_row
from tasks.audit.inputs import (
    ROW,
    check_files,
    declared_sources,
    dimension_section,
    events_section,
    files_section,
    key_type_in,
    rows_of_key,
)
from tasks.audit.replay_rows import same
from tasks.delivery.config import DeliveryConfig
from tasks.engine.partition import bucket_of
from tasks.features.config import Thresholds
from tasks.features.definitions import Column
from tasks.features.rows import ColumnPlan, RowPlan
from tasks.features.writer import Fences, fences_again
from tasks.io import storage
from tasks.io.errors import PipelineError, VersionNotFound
from tasks.io.notation import missing_values
from tasks.store import layout
from tasks.store.catalogue import declarations, feature_names
from tasks.store.layout import AS_OF, EVENT_TIME, QUALITY, TARGET
from tasks.store.manifest import Manifest
from tasks.store.reading import data_files, read_manifest
from tasks.store.settings import config_of
from tasks.training_sets.asof import join_asof
from tasks.training_sets.definition import FeatureReference
from tasks.training_sets.history import FROM, TIME, UNTIL, History, HistoryVersion, history_of, read_bucket
from tasks.training_sets.spine import SPINE


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
    concerned |= dict.fromkeys(rejected_sources(held.rejected), "has rejected rows of it")
    sections = [
        held.section,
        *_target(manifest, (entity, value), row, moment),
        _features(manifest, matched, moment),
        _values(manifest, matched, row),
        *rejected_sections(held.rejected),
        gate_section(manifest, concerned),
        _splits(root, manifest, entity, value),
        holders_section(root, manifest, entity, value),
        version_section(root, manifest),
    ]
    headline = f"{entity} {key} of {manifest.dataset} v{manifest.version}, event at {moment:%Y-%m-%d %H:%M} UTC"
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
    record = next((one for one in manifest.inputs if one.version is None and one.name == label["source"]), None)
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
        told: dict[str, object] = {"rows": None}
        try:
            if (found := rows_of_key(file, plan, entity, value)) is not None:
                told["rows"] = found.kept.filter(pl.col(EVENT_TIME) == moment)[ROW].to_list()
        except PipelineError as fault:
            told["note"] = str(fault)
        rows.append(file.as_row() | told)
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
    copies = [one for one in made_from(root, manifest)[0] if layout.kind(one.dataset) == "streaming-copy"]
    rows = []
    for copy in copies:
        try:
            config = config_of(DeliveryConfig, copy)
            rows.append(split_row(config, entity, value, f"{copy.dataset} v{copy.version}"))
        except PipelineError as fault:
            rows.append({"copy": f"{copy.dataset} v{copy.version}", "split": None, "why": str(fault)})
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
    found = []
    for group in groups:
        own = {column: ref.feature for column, ref in references.items() if ref.group == group}
        found.append(_match(root, manifest, row, group, own))
    return found


def _match(root: str, manifest: Manifest, row: Mapping[str, Any], group: str, own: Mapping[str, str]) -> Match:
    dataset = layout.feature_dataset(group)
    read = sorted(record.version for record in manifest.inputs if record.name == dataset and record.version)
    known, gone = [], []
    for version in read:
        try:
            known.append(read_manifest(root, dataset, version))
        except VersionNotFound:
            gone.append(version)
    told: dict[str, Any] = {"group": group, "versions": tuple(read), "gone": tuple(gone)}
    if not known:
        return Match(**told, why="every version that was read has been deleted since")
    try:
        history = history_of(root, group, list(dict.fromkeys(own.values())), known)
        value = row.get(history.entity)
        if value is None:
            return Match(**told, why=f"the row has no {history.entity}")
        rows, versions = _rows_of(root, history, value, known_at=bool(manifest.definition["known_at"]))
    except PipelineError as fault:
        return Match(**told, why=f"the history can't be read: {fault}")
    when, options = row[EVENT_TIME], _options(manifest)
    spine = pl.DataFrame({history.entity: [value], EVENT_TIME: [when]}, schema_overrides={EVENT_TIME: TIME})
    place = int(join_asof(spine, rows, entity=history.entity, event_time=EVENT_TIME, **options)[0])
    if place < 0:
        return Match(**told, why=_why_not(rows, when, options))
    as_of = rows[AS_OF][place]
    values = rows.row(place, named=True)
    columns = {column: values[feature] for column, feature in own.items()}
    before = "before" if options["strict"] else "at or before"
    why = f"the newest {before} the event" + (" that was known by then" if options["known_at"] else "")
    return Match(**told, version=versions[place].version, as_of=as_of, age=when - as_of, why=why, columns=columns)


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


MOST_ROWS = 5_000_000
"""Maximum rows of a version with several times for which the fences of one are recomputed."""
_MISSING, _RATIO, _SCORE, _READY = QUALITY


def explain_features(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Explain the origin of a row of features, and its holders."""
    entity: str = manifest.definition["entity"]
    held = look_for(root, manifest, key, at, time=AS_OF, spellings=_source_spellings(manifest, entity))
    if isinstance(held, Explanation):
        return held
    values, concerned = _feature_values(manifest, held.row, _bounds(root, manifest, held.row))
    concerned |= dict.fromkeys(rejected_sources(held.rejected), "has rejected rows of it")

    def given(training_set: Manifest, row: Mapping[str, Any]) -> bool:
        matched = [one for one in matches(root, training_set, row) if one.dataset == manifest.dataset]
        return any((one.version, one.as_of) == (manifest.version, held.moment) for one in matched)

    sections = [
        held.section,
        values,
        _quality(manifest, held.row, values.rows),
        *_sources(manifest, entity, held),
        *rejected_sections(held.rejected),
        gate_section(manifest, concerned),
        holders_section(root, manifest, entity, held.key, given),
        version_section(root, manifest),
    ]
    headline = f"{entity} {key} of {manifest.dataset} v{manifest.version}, as of {held.moment:%Y-%m-%d %H:%M} UTC"
    return Explanation(manifest, key, "held", headline, sections)


def _source_spellings(manifest: Manifest, entity: str) -> set[str]:
    """Return the names of the entity's column in the sources."""
    names = {entity}
    for setting in ("transaction_columns", "customer_columns", "product_columns"):
        names.add(manifest.config.get(setting, {}).get(entity, entity))
    try:
        definitions = declared_sources(manifest).definitions
    except PipelineError:
        return names
    names |= {name for source in definitions.events.values() for name in source.columns.get(entity, Column()).also}
    mappings = [source.mapping for source in definitions.events.values()]
    mappings += [source.mapping for source in definitions.dimensions.values()]
    return names | {mapping[entity] for mapping in mappings if entity in mapping}


def _feature_values(
    manifest: Manifest, row: Mapping[str, Any], bounds: Mapping[str, Fences]
) -> tuple[Section, dict[str, str]]:
    """Return each feature with its declaration and anomalies; and the columns with anomalies."""
    declared, rows, concerned = declarations(manifest), [], {}
    dimension = manifest.definition.get("dimension")
    for name in feature_names(manifest):
        value, fence = row[name], bounds.get(name)
        issue = None
        if value is None or (isinstance(value, float) and np.isnan(value)):
            issue = "missing"
        elif fence is not None and float(value) < fence.lower:
            issue = f"outlier: below the fence of {fence.lower:.6g}"
        elif fence is not None and float(value) > fence.upper:
            issue = f"outlier: above the fence of {fence.upper:.6g}"
        if issue:
            concerned[name] = f"this row: {issue.partition(':')[0]}"
        rows.append(
            {
                "feature": name,
                "value": value,
                "issue": issue,
                "lower fence": fence.lower if fence else None,
                "upper fence": fence.upper if fence else None,
                "declared as": declared.get(name) or (f"column of {dimension}" if dimension else None),
            }
        )
    return Section(title="values", rows=rows, shown=("feature", "value", "issue", "declared as")), concerned


def _numeric(manifest: Manifest) -> list[str]:
    """Return the features with fences."""
    profile = manifest.profile
    return [name for name in feature_names(manifest) if name in profile and profile[name].kind == "numeric"]


def _bounds(root: str, manifest: Manifest, row: Mapping[str, Any]) -> Mapping[str, Fences]:
    """Recompute the fences of the row's time, unless nothing is outside of them, or the version is too large."""
    moment: dt.datetime = row[AS_OF]
    numeric = _numeric(manifest)
    if len(manifest.as_of) > 1 and (not row.get(_RATIO) or manifest.rows > MOST_ROWS):
        return {}

    def stored() -> Iterator[pa.Table]:
        for uri in data_files(root, manifest):
            with storage.open_input(uri) as source:
                yield pq.read_table(source, columns=[*numeric, AS_OF], filters=[(AS_OF, "=", moment)])

    return fences_again(manifest, [moment], numeric, stored)[moment]


def _quality(manifest: Manifest, row: Mapping[str, Any], values: Sequence[Mapping[str, Any]]) -> Section:
    """Return the quality columns, and the deciding bound."""
    issues = Counter(str(one["issue"]).partition(":")[0] for one in values if one["issue"])
    bounds = Thresholds.model_validate(manifest.config["thresholds"])
    because = [
        f"{name} {row[name]:.4g} is not {side} {bound:g} (thresholds.{setting})"
        for name, side, bound, setting, good in (
            (_MISSING, "below", bounds.missing, "missing", row[_MISSING] < bounds.missing),
            (_RATIO, "below", bounds.outliers, "outliers", row[_RATIO] < bounds.outliers),
            (_SCORE, "above", bounds.score, "score", row[_SCORE] > bounds.score),
        )
        if not good
    ]
    outliers = round(row[_RATIO] * len(_numeric(manifest)))
    notes = []
    if outliers != issues["outlier"]:
        notes.append(
            f"{outliers} features are outside of their fences, {issues['outlier']} of them are named: the version has "
            f"{len(manifest.as_of)} times and {manifest.rows:,} rows, too many to compute the fences again"
            if manifest.rows > MOST_ROWS
            else f"{outliers} features were outside of their fences, by today's reckoning {issues['outlier']} are"
        )
    facts = {
        _MISSING: row[_MISSING],
        "missing": [one["feature"] for one in values if one["issue"] == "missing"] or None,
        _RATIO: row[_RATIO],
        "outliers": [one["feature"] for one in values if str(one["issue"]).startswith("outlier")] or None,
        _SCORE: row[_SCORE],
        "training-ready": row[_READY],
        "because": "; ".join(because) or "every bound is kept",
    }
    return Section(title="quality", facts={n: v for n, v in facts.items() if v is not None}, notes=notes)


def _sources(manifest: Manifest, entity: str, held: Held) -> list[Section]:
    """Return the source files, with the numbers of the entity's events in each, and its rows in the dimension."""
    records = {record.name: record for record in manifest.inputs if record.version is None}
    try:
        declared = declared_sources(manifest)
    except PipelineError as fault:
        return [files_section("sources", record, str(fault)) for record in records.values()]
    sections = []
    source, dimension = manifest.definition.get("source"), manifest.definition.get("dimension")
    if source in records:
        spans = {"events": (None, held.moment), "later": (held.moment, None)}
        sections.append(events_section(declared, manifest, records[source], (entity, held.key), spans))
    for name, record in records.items():
        if name == dimension:
            sections.append(dimension_section(declared, manifest, record, held.key))
        elif name != source:
            sections.append(files_section(f"looked up in {name}", record))
    return sections
