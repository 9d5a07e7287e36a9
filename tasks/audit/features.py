"""Rows of a feature version: made again, and explained.

Of the sources' rows, only the sampled entities' events are kept:

    sources ─ judge ─ look up ─ events of the sampled entities ─┐
                                                                ├─ features at each as-of time ─ join ─ score ─ compare
    events that versions have kept of files deleted since ──────┘
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.audit.explanation import Explanation, Held, Section, look_for
from tasks.audit.holders import closing_sections
from tasks.audit.inputs import (
    declared_sources,
    dimension_section,
    events_section,
    files_section,
    other_declaration,
    present,
    sources_of,
)
from tasks.audit.replay_rows import StoredFiles, TableAgain, Unreadable, matching
from tasks.audit.training_sets import matches
from tasks.engine.partition import bucket_of, frame_of
from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.definitions import Column
from tasks.features.incremental import FILE, in_order, kept_links, read_kept
from tasks.features.kernel import join_dimension
from tasks.features.loading import declared
from tasks.features.plan import FeaturePlan, GroupPlan, StateLink, plan_features, with_uris
from tasks.features.shuffle import Tally, looked_up, lookup_tables, read_and_judge, snapshots_of, unique_dimension_rows
from tasks.features.writer import Fences, fences_again, numeric_features, scored_rows, stamped, to_arrow
from tasks.io import storage
from tasks.io.errors import DefinitionError, PipelineError
from tasks.store.catalogue import declarations, feature_names
from tasks.store.layout import AS_OF, QUALITY
from tasks.store.manifest import Manifest
from tasks.store.reading import data_files, read_manifest
from tasks.store.settings import config_of
from tasks.training_sets.history import (
    created_of,
)

MOST_ROWS = 5_000_000
"""Maximum rows of a version with several times for which the fences of one are recomputed."""
_MISSING, _RATIO, _SCORE, _READY = QUALITY


class FeaturesAgain(TableAgain):
    """The rows of a feature version, to be made again."""

    time = AS_OF

    def __init__(self, root: str, manifest: Manifest) -> None:
        super().__init__(root, manifest)
        self._config = config_of(FeatureStoreConfig, manifest, root=root)

    def rows(self, sampled: pa.Table) -> pa.Table:
        """Make all rows of the sampled entities, in written form."""
        planned, plan = self._plan()
        keys = frame_of(sampled.select([self.entity])).unique()
        features = snapshots_of(planned, self._events(plan, planned, keys), plan.time, plan.as_of)
        if planned.dimension is not None:
            read = (
                read_and_judge(planned.dimension, unit)[0] for unit in planned.dimension.units(plan.rows_per_bucket)
            )
            rows, _ = unique_dimension_rows(pl.concat(matching(one, keys) for one in read), self.entity, Tally())
            features = join_dimension(planned.group, features, rows, self._config.join).kept
        features = stamped(features, created_of(self.manifest), self.manifest.version)
        columns = numeric_features(to_arrow(features).schema, planned)
        bounds = fences_again(self.manifest, plan.as_of, columns, lambda: self._stored_rows([*columns, AS_OF]))
        return to_arrow(scored_rows(features, planned, bounds, self._config.thresholds))

    def _stored_rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for entry in self.manifest.files:
            try:
                yield self.stored.read(entry, columns=columns)
            except Unreadable as fault:  # without these rows the fences differ, and so does the quality of all
                self.causes.append(replace(fault.cause, columns=frozenset(QUALITY)))

    def _plan(self) -> tuple[GroupPlan, FeaturePlan]:
        """Plan the run again, over only the files that it read, if they exist."""
        manifest = self.manifest
        definitions = with_uris(declared(self._config.definitions), self._config)
        name = manifest.dataset.rpartition("/")[2]
        if name not in definitions.groups:
            raise DefinitionError(f"the feature group '{name}' isn't declared any more")
        group = definitions.groups[name]
        self.causes += other_declaration(manifest, group.describe())
        kept = group.source if "state" in manifest.definition else None
        self._sources = sources_of(manifest.inputs, kept)
        self.causes += self._sources.causes
        definitions = present(definitions, self._sources, self.notes)
        # The needed columns, and those that rows are rejected for, depend on all groups of a run that read one source.
        beside = [member.name for member in definitions.select(self._config.groups) if member.source == group.source]
        config = self._config.model_copy(update={"groups": tuple(beside)})
        [plan] = plan_features(definitions, config, manifest.as_of, self._sources.tables)
        return next(planned for planned in plan.groups if planned.group.name == name), plan

    def _events(self, plan: FeaturePlan, planned: GroupPlan, keys: pl.DataFrame) -> pl.DataFrame:
        """Read the entities' events up to the last as-of time, in the order of the files."""
        # Later ones are left out only here, so that kept events and those of files are treated equally.
        source = replace(plan.events, rows=replace(plan.events.rows, as_of=None))
        numbers = {file.info.uri: file.number for file in self._sources.files[source.name] if file.info is not None}
        lookups = lookup_tables(plan)
        frames = []
        for unit in source.units(plan.rows_per_bucket):
            rows, _, _ = read_and_judge(source, unit, files=[numbers[unit.uri]])
            rows = looked_up(rows, plan.lookups, lookups).select(*planned.columns, FILE)
            frames.append(matching(rows, keys))
        frames += self._kept(source.name, keys, frames[0].schema)
        together = pl.concat(frames)
        together = in_order([together]) if together.height else together
        return together.filter(pl.col(plan.time) <= plan.as_of[-1]).select(planned.columns)

    def _kept(self, source: str, keys: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> list[pl.DataFrame]:
        """Read the events of changed or deleted files that versions have kept."""
        lost = {file.number for file in self._sources.files[source] if file.state != "unchanged"}
        if not lost or "state" not in self.manifest.definition:
            return []
        kept = [_only(link, lost) for link in kept_links(self.manifest, self.root, source)]
        links = [link for link in kept if link.live]
        for link in links:
            version = read_manifest(self.root, self.manifest.dataset, link.version)
            files = StoredFiles(self.root, version, f"of v{link.version}: ")
            self.causes += [cause for entry in version.side_files for cause in files.check(entry)]
        named = ", ".join(f"v{link.version}" for link in links)
        self.notes.append(f"events of files that aren't there as they were are taken from those that {named} kept")
        buckets: int = self.manifest.definition["state"]["buckets"]
        parts = np.unique(bucket_of(keys[self.entity].to_arrow(compat_level=pl.CompatLevel.oldest()), buckets))
        return [matching(read_kept(links, part, buckets, self.entity, schema), keys) for part in parts.tolist()]


def _only(link: StateLink, numbers: set[int]) -> StateLink:
    """Leave out the events of other files."""
    live = {number: today for number, today in link.live.items() if today in numbers}
    return replace(link, live=live, complete=False)


def explain_features(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Explain the origin of a row of features, and its holders."""
    entity: str = manifest.definition["entity"]
    held = look_for(root, manifest, key, at, time=AS_OF, spellings=_source_spellings(manifest, entity))
    if isinstance(held, Explanation):
        return held
    values, concerned = _feature_values(manifest, held.row, _bounds(root, manifest, held.row))

    def given(training_set: Manifest, row: Mapping[str, Any]) -> bool:
        matched = [match for match in matches(root, training_set, row) if match.dataset == manifest.dataset]
        return any((match.version, match.as_of) == (manifest.version, held.moment) for match in matched)

    sections = [
        held.section,
        values,
        _quality(manifest, held.row, values.rows),
        *_sources(manifest, entity, held),
        *closing_sections(root, manifest, (entity, held.key), concerned, held.rejected, given=given),
    ]
    headline = f"{entity} {key} of {manifest}, as of {held.moment:%Y-%m-%d %H:%M} UTC"
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
    issues = Counter(str(value["issue"]).partition(":")[0] for value in values if value["issue"])
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
        "missing": [value["feature"] for value in values if value["issue"] == "missing"] or None,
        _RATIO: row[_RATIO],
        "outliers": [value["feature"] for value in values if str(value["issue"]).startswith("outlier")] or None,
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
