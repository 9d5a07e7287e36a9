"""One entity's row of a feature version, explained."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tasks.audit.explain_entity import look_for
from tasks.audit.explain_holders import holders_section
from tasks.audit.explain_rows import Found, column_type
from tasks.audit.explain_sources import (
    Declared,
    FileNow,
    declared_sources,
    dimension_plan,
    event_plan,
    events_by_file,
    files_now,
    rows_of_key,
    table_of,
)
from tasks.audit.explain_version import (
    gate_section,
    pick_time,
    rejected_section,
    rejected_sources,
    version_section,
)
from tasks.audit.explained import Explanation, Section, explanation
from tasks.core import storage
from tasks.core.errors import PipelineError
from tasks.core.manifest import InputRecord, Manifest
from tasks.core.own_columns import AS_OF, QUALITY
from tasks.core.reading import data_files
from tasks.core.sketch import QuantileSketch
from tasks.features.config import Thresholds
from tasks.features.definitions import Column
from tasks.features.scoring import Fences, fences
from tasks.serving.catalogue import declarations, feature_names

MOST_ROWS = 5_000_000
"""Rows of a version with several times up to which the fences of one are computed again."""
_NUMBERS = ("int", "uint", "float", "double", "halffloat", "decimal")
_MISSING, _RATIO, _SCORE, _READY = QUALITY


def explain_features(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Where a row of features comes from, and who has it.

    Args:
        root: Root of the store.
        manifest: A feature version.
        key: The entity.
        at: As-of time; None: the newest that the version holds of the entity.

    Raises:
        InputError: the version has no such row, and has rejected none.
        ConfigError: the key or the time can't be one.

    """
    entity: str = manifest.definition["entity"]
    held = look_for(root, manifest, key, _spellings(manifest, entity))
    if isinstance(held, Explanation):
        return held
    value, found, rejected = held.value, held.found, held.rejected
    times = _times(found)
    moment = pick_time(manifest, key, times, at)
    place, row = times.index(moment), found.rows[times.index(moment)]
    bounds = _bounds(root, manifest, row, moment)
    values, concerned = _values(manifest, row, bounds)
    sections = [
        Section(
            title="row",
            facts={
                entity: value,
                "as of": moment,
                "times held": sorted(times),
                "file": found.places[place][0],
                "row": found.places[place][1],
                "read": found.read_of(manifest),
            },
        ),
        values,
        _quality(manifest, row, values.rows),
        *source_sections(manifest, entity, value, moment),
        *([rejected_section(rejected)] if rejected else []),
        gate_section(manifest, concerned | dict.fromkeys(rejected_sources(rejected), "has rejected rows of it")),
        holders_section(root, manifest, entity, value, moment),
        version_section(root, manifest),
    ]
    headline = f"{entity} {key} of {manifest.dataset} v{manifest.version}, as of {moment:%Y-%m-%d %H:%M} UTC"
    return explanation(manifest, key, "held", headline, sections)


def _spellings(manifest: Manifest, entity: str) -> set[str]:
    """Names that the entity's column has in the sources."""
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


def _times(found: Found) -> list[dt.datetime]:
    return [moment.astimezone(dt.UTC) for moment in found.table[AS_OF].to_pylist()]


def _values(manifest: Manifest, row: Mapping[str, Any], bounds: Mapping[str, Fences]) -> tuple[Section, dict[str, str]]:
    """Each feature with its declaration and what is odd about it; and the columns that are odd."""
    declared, rows, concerned = declarations(manifest), [], {}
    dimension = manifest.definition.get("dimension")
    for name in feature_names(manifest):
        value, fence = row[name], bounds.get(name)
        issue = ""
        if value is None or (isinstance(value, float) and np.isnan(value)):
            issue = "missing"
        elif fence is not None and not fence.lower <= float(value) <= fence.upper:
            side = "below" if float(value) < fence.lower else "above"
            issue = f"outlier: {side} the fence of {fence.lower if side == 'below' else fence.upper:.6g}"
        if issue:
            concerned[name] = f"this row: {issue.partition(':')[0]}"
        rows.append(
            {
                "feature": name,
                "value": value,
                "issue": issue or None,
                "lower fence": fence.lower if fence else None,
                "upper fence": fence.upper if fence else None,
                "declared as": declared.get(name) or (f"column of {dimension}" if dimension else None),
            }
        )
    return Section(title="values", rows=rows, shown=("feature", "value", "issue", "declared as")), concerned


def _bounds(root: str, manifest: Manifest, row: Mapping[str, Any], moment: dt.datetime) -> dict[str, Fences]:
    """Fences of the row's time: from the profile of a version of one time, else computed again of that time's rows."""
    numeric = [n for n in feature_names(manifest) if column_type(manifest, n).startswith(_NUMBERS)]
    if len(manifest.as_of) <= 1:
        profile = manifest.profile

        def recorded(name: str, levels: Sequence[float]) -> Any:
            return np.array([profile[name].quantiles.get(str(level), np.nan) for level in levels])

        return fences([name for name in numeric if name in profile], recorded)
    if not row.get(_RATIO) or manifest.rows > MOST_ROWS:
        return {}
    sketches: dict[str, list[QuantileSketch]] = {name: [] for name in numeric}
    for uri in data_files(root, manifest):
        with storage.open_input(uri) as source:
            table = pq.read_table(source, columns=[*numeric, AS_OF], filters=[(AS_OF, "=", moment)])
        for name in numeric:
            sketches[name].append(QuantileSketch.of(table[name].drop_null().to_numpy()))
    merged = {name: QuantileSketch.merge_all(parts) for name, parts in sketches.items()}
    return fences(numeric, lambda name, levels: merged[name].quantiles(levels))


def _quality(manifest: Manifest, row: Mapping[str, Any], values: Sequence[Mapping[str, Any]]) -> Section:
    """The quality columns, and which bound decides."""
    issues = Counter(str(one["issue"]).partition(":")[0] for one in values if one["issue"])
    numeric = sum(column_type(manifest, one["feature"]).startswith(_NUMBERS) for one in values)
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
    outliers = round(row[_RATIO] * numeric)
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


def source_sections(manifest: Manifest, entity: str, value: int | str, moment: dt.datetime) -> list[Section]:
    """The source files, with the numbers of the entity's events in each, and its rows in the dimension."""
    records = {record.name: record for record in manifest.inputs if record.version is None}
    source = manifest.definition.get("source", "")
    sections = []
    try:
        declared = declared_sources(manifest)
    except PipelineError as fault:
        return [_only_files("sources", record, str(fault)) for record in records.values()]
    if source in records:
        spans = {"events": (None, moment), "later": (moment, None)}
        sections.append(events_section(declared, manifest, records[source], (entity, value), spans))
    dimension = manifest.definition.get("dimension")
    for name, record in records.items():
        if name == dimension:
            sections.append(_dimension(declared, manifest, record, value))
        elif name != source:
            sections.append(_only_files(f"looked up in {name}", record, ""))
    return sections


def _only_files(title: str, record: InputRecord, note: str) -> Section:
    return Section(title=title, rows=[now.told() for now in files_now(record)], notes=[note] if note else [])


def events_section(
    declared: Declared,
    manifest: Manifest,
    record: InputRecord,
    key: tuple[str, int | str],
    spans: Mapping[str, tuple[Any, Any]],
) -> Section:
    """Files of events, with how many the key has in each of some spans of time."""
    entity, value = key
    now = files_now(record)
    title = f"events in {record.name}"
    source = declared.definitions.events.get(record.name)
    if source is None or entity not in source.columns:
        cause = declared.note or f"'{record.name}' isn't declared any more"
        return Section(title=title, rows=[one.told() for one in now], notes=[f"Events aren't counted: {cause}."])
    try:
        table = table_of(record, now)
        if table is None:
            return Section(title=title, rows=[one.told() for one in now], notes=["Nothing is left to count events in."])
        plan = event_plan(declared, source, entity, manifest, table)
        rows, read = events_by_file(now, plan, entity, value, spans)
    except PipelineError as fault:
        return Section(title=title, rows=[one.told() for one in now], notes=[f"Events can't be counted: {fault}"])
    totals = {name: sum(row[name] or 0 for row in rows) for name in (*spans, "rejected")}
    notes = [_doubt(now)] if _doubt(now) else []
    if declared.note:
        notes.append(f"As the source is usually declared; {declared.note}.")
    return Section(title=title, facts={"source": record.uri, **totals, "read": read}, rows=rows, notes=notes)


def _doubt(files: Sequence[FileNow]) -> str:
    """What keeps the counts from being those of the version."""
    gone, changed = (sum(now.state == state for now in files) for state in ("gone", "changed since"))
    told = [f"{gone} of {len(files)} files are gone"] if gone else []
    told += [f"{changed} of {len(files)} files have changed since, and are counted as they are now"] if changed else []
    return "; ".join(told) + "." if told else ""


def _dimension(declared: Declared, manifest: Manifest, record: InputRecord, value: int | str) -> Section:
    """Rows of the dimension that have the key: the first is joined, others are copies or contradict it."""
    title, now = f"rows of {record.name}", files_now(record)
    source = declared.definitions.dimensions.get(record.name)
    if source is None:
        return Section(title=title, rows=[one.told() for one in now], notes=[declared.note] if declared.note else [])
    plan = dimension_plan(source, manifest)
    rows = []
    for one in now:
        try:
            numbers = rows_of_key(one, plan, source.key, value).kept["row"].to_list() if one.info is not None else None
        except PipelineError as fault:
            return Section(title=title, rows=[one.told() for one in now], notes=[str(fault)])
        rows.append(one.told() | {"rows": numbers})
    many = sum(len(row["rows"] or ()) for row in rows)
    note = ["Of several rows the first counts: copies of it are dropped, others are rejected."] if many > 1 else []
    return Section(title=title, rows=rows, notes=[*note, *([_doubt(now)] if _doubt(now) else [])])
