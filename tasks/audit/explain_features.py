"""One entity's row of a feature version, explained."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.audit.explain_holders import holders_section
from tasks.audit.explain_sources import declared_sources, dimension_section, events_section, files_section
from tasks.audit.explain_training_row import matches
from tasks.audit.explained import (
    Explanation,
    Held,
    Section,
    gate_section,
    look_for,
    rejected_sections,
    rejected_sources,
    version_section,
)
from tasks.features.config import Thresholds
from tasks.features.definitions import Column
from tasks.features.writer import Fences, fences_again
from tasks.io import storage
from tasks.io.errors import PipelineError
from tasks.store.catalogue import declarations, feature_names
from tasks.store.manifest import Manifest
from tasks.store.own_columns import AS_OF, QUALITY
from tasks.store.reading import data_files

MOST_ROWS = 5_000_000
"""Maximum rows of a version with several times for which the fences of one are recomputed."""
_MISSING, _RATIO, _SCORE, _READY = QUALITY


def explain_features(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Explain the origin of a row of features, and its holders."""
    entity: str = manifest.definition["entity"]
    held = look_for(root, manifest, key, at, time=AS_OF, spellings=_spellings(manifest, entity))
    if isinstance(held, Explanation):
        return held
    values, concerned = _values(manifest, held.row, _bounds(root, manifest, held.row))
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


def _spellings(manifest: Manifest, entity: str) -> set[str]:
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


def _values(manifest: Manifest, row: Mapping[str, Any], bounds: Mapping[str, Fences]) -> tuple[Section, dict[str, str]]:
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
