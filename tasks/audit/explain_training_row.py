"""One row of a training set, explained: the origin of its target and of each of its features."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from tasks.audit.explain_holders import holders_section, made_from
from tasks.audit.explain_matches import Match, days_of, matches
from tasks.audit.explain_samples import split_row
from tasks.audit.explain_sources import ROW, declared_sources, events_section, key_type_in, rows_of_key
from tasks.audit.explained import (
    Explanation,
    Section,
    gate_section,
    look_for,
    rejected_sections,
    rejected_sources,
    version_section,
)
from tasks.audit.inputs import check_files
from tasks.audit.replay_rows import same
from tasks.core import layout
from tasks.core.errors import PipelineError
from tasks.core.manifest import Manifest
from tasks.core.missing import missing_values
from tasks.core.own_columns import EVENT_TIME, TARGET
from tasks.core.settings import config_of
from tasks.delivery.config import DeliveryConfig
from tasks.features.rows import ColumnPlan, RowPlan
from tasks.serving.spine import SPINE


def explain_training_row(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Explain where a row of a training set comes from, and who has it."""
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
    """The target, and the rows of the source that it was made of."""
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
    """The row of the user's own table."""
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
    """Features that each group gave."""
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
    """Each feature, compared with the value that the version has now."""
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
    """The split that each copy gives the entity, and why; without a copy, that of the usual settings."""
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
