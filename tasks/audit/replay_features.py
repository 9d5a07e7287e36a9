"""Rows of a feature version made again: of what the sources hold, only the sampled entities' events are kept.

sources ─ judge ─ look up ─ events of the sampled entities ─┐
├─ features at each as-of time ─ join ─ score ─ compare
events that versions have kept of files gone since ─────────┘
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from tasks.audit.replay_causes import other_declaration, why_not
from tasks.audit.replay_rows import (
    Answer,
    Cause,
    StoredFiles,
    Unreadable,
    differences,
    keys_of,
    placed,
    text_of,
)
from tasks.audit.replay_tables import (
    config_of,
    frame_of,
    only_of,
    present,
    row_answer,
    rows_replayed,
    sources_of,
    stored_rows,
)
from tasks.core import layout
from tasks.core.errors import DefinitionError, PipelineError
from tasks.core.manifest import Manifest
from tasks.core.own_columns import AS_OF, CREATED, QUALITY
from tasks.core.partition import bucket_of
from tasks.core.profile import profile_table
from tasks.core.reading import read_manifest
from tasks.core.sketch import QuantileSketch
from tasks.features.config import FeatureStoreConfig
from tasks.features.incremental import kept_links
from tasks.features.kernel import join_dimension
from tasks.features.loading import declared
from tasks.features.lookups import lookup_tables
from tasks.features.parts import numeric_features, scored_rows, sketches, stamped, to_arrow
from tasks.features.plan import FeaturePlan, GroupPlan, plan_features, with_uris
from tasks.features.scoring import Fences, fences
from tasks.features.stages import (
    looked_up,
    read_and_judge,
    snapshots_of,
    unique_dimension_rows,
)
from tasks.features.state import FILE, StateLink, in_order, read_kept
from tasks.features.tallies import Tally

Bounds = dict[dt.datetime, dict[str, Fences]]


def replay_features(root: str, manifest: Manifest, sample: int, seed: int) -> Answer:
    """Make some rows of a feature version again, and compare them.

    Args:
        root: Root of the store.
        manifest: The version's.
        sample: Number of rows.
        seed: Decides which.

    Raises:
        ConfigError: this code can't use the version's configuration.
        CorruptVersion: a stored file has the right digest and can't be read.

    """
    stored = StoredFiles(layout.version_uri(root, manifest.dataset, manifest.version))
    taken = stored_rows(manifest, stored, sample, seed)
    again = _Again(root, manifest, stored)
    rebuilt = taken.table.slice(0, 0)
    if len(taken.table):
        try:
            rebuilt = again.rows(taken.table)
        except (PipelineError, OSError) as fault:
            again.causes.append(why_not(fault))
    keys, names = [], []
    if len(taken.table):
        keys = keys_of(taken.table, [again.entity, AS_OF])
        names = [f"{again.entity} {text_of(key)} as of {time.isoformat()}" for key, time in keys]
    places = placed(keys, keys_of(rebuilt, [again.entity, AS_OF]) if len(rebuilt) else [])
    replayed = rows_replayed(stored, taken, names, differences(taken.table, rebuilt, places))
    return row_answer(manifest, stored, replayed, causes=tuple(again.causes), notes=tuple(again.notes))


def created_of(manifest: Manifest) -> dt.datetime:
    """The stamp of a feature version's rows, as its profile has it."""
    profile = manifest.profile.get(CREATED)
    if profile is None or not isinstance(profile.maximum, str):
        return manifest.created_at
    return dt.datetime.fromisoformat(profile.maximum)


class _Again:
    """The rows of one version, made again; what is otherwise than it was gathers on the way."""

    def __init__(self, root: str, manifest: Manifest, stored: StoredFiles) -> None:
        self.causes: list[Cause] = []
        self.notes: list[str] = []
        self.entity: str = manifest.definition["entity"]
        self._root = root
        self._manifest = manifest
        self._stored = stored
        self._config = config_of(FeatureStoreConfig, manifest, root=root)

    def rows(self, sampled: pa.Table) -> pa.Table:
        """All rows of the sampled rows' entities, as they would be written."""
        planned, plan = self._plan()
        keys = frame_of(sampled.select([self.entity])).unique()
        features = snapshots_of(planned, self._events(plan, planned, keys), plan.time, plan.as_of)
        if planned.dimension is not None:
            read = (
                read_and_judge(planned.dimension, unit)[0] for unit in planned.dimension.units(plan.rows_per_bucket)
            )
            rows, _ = unique_dimension_rows(pl.concat(only_of(one, keys) for one in read), self.entity, Tally())
            features = join_dimension(planned.group, features, rows, self._config.join).kept
        features = stamped(features, created_of(self._manifest), self._manifest.version)
        columns = numeric_features(to_arrow(features).schema, planned)
        bounds = self._bounds(columns, plan.as_of)
        return to_arrow(scored_rows(features, planned, bounds, self._config.thresholds))

    def _plan(self) -> tuple[GroupPlan, FeaturePlan]:
        """The plan of the run over just the files that it read, as far as they are there."""
        manifest = self._manifest
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
        # Which columns are needed, and rows rejected for, is decided for all groups of a run that read one source.
        beside = [one.name for one in definitions.select(self._config.groups) if one.source == group.source]
        config = self._config.model_copy(update={"groups": tuple(beside)})
        [plan] = plan_features(definitions, config, manifest.as_of, self._sources.tables)
        return next(one for one in plan.groups if one.group.name == name), plan

    def _events(self, plan: FeaturePlan, planned: GroupPlan, keys: pl.DataFrame) -> pl.DataFrame:
        """The entities' events up to the last as-of time, in the order of the files."""
        # Later ones are left out only here, so that kept events and those of files are treated alike.
        source = replace(plan.events, rows=replace(plan.events.rows, as_of=None))
        numbers = {file.info.uri: file.number for file in self._sources.files[source.name] if file.info is not None}
        lookups = lookup_tables(plan)
        frames = []
        for unit in source.units(plan.rows_per_bucket):
            rows, _, _ = read_and_judge(source, unit, files=[numbers[unit.uri]])
            rows = looked_up(rows, plan.lookups, lookups).select(*planned.columns, FILE)
            frames.append(only_of(rows, keys))
        frames += self._kept(source.name, keys, frames[0].schema)
        together = pl.concat(frames)
        together = in_order([together]) if together.height else together
        return together.filter(pl.col(plan.time) <= plan.as_of[-1]).select(planned.columns)

    def _kept(self, source: str, keys: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> list[pl.DataFrame]:
        """Events of files that aren't there as they were, where versions have kept them."""
        lost = {file.number for file in self._sources.files[source] if file.changed}
        if not lost or "state" not in self._manifest.definition:
            return []
        found = [_only(link, lost) for link in kept_links(self._manifest, self._root, source)]
        links = [link for link in found if link.live]
        self._check(links)
        named = ", ".join(f"v{link.version}" for link in links)
        self.notes.append(f"events of files that aren't there as they were are taken from those that {named} kept")
        buckets: int = self._manifest.definition["state"]["buckets"]
        parts = np.unique(bucket_of(keys[self.entity].to_arrow(compat_level=pl.CompatLevel.oldest()), buckets))
        return [only_of(read_kept(links, part, buckets, self.entity, schema), keys) for part in parts.tolist()]

    def _check(self, links: Sequence[StateLink]) -> None:
        """Compare the files of kept events with the manifests that list them."""
        for link in links:
            base = layout.version_uri(self._root, self._manifest.dataset, link.version)
            files = StoredFiles(base)
            for entry in read_manifest(self._root, self._manifest.dataset, link.version).side_files:
                files.check(entry)
            self.causes += [Cause("input", f"of v{link.version}: {cause.text}") for cause in files.altered]

    def _bounds(self, columns: Sequence[str], as_of: Sequence[dt.datetime]) -> Bounds:
        """The fences of the run: of one time the manifest's profile has the quartiles, of several the stored rows.

        Quantiles depend on the values alone, so those of all stored rows are those of the run, bit by bit.
        """
        if len(as_of) > 1:
            return self._bounds_by_rows(columns, as_of)
        profile = self._manifest.profile

        def noted(name: str, levels: Sequence[float]) -> npt.NDArray[np.float64]:
            known = profile[name].quantiles if name in profile else {}
            return np.array([known.get(str(level), np.nan) for level in levels])

        return {as_of[0]: fences(columns, noted)}

    def _bounds_by_rows(self, columns: Sequence[str], as_of: Sequence[dt.datetime]) -> Bounds:
        parts: dict[dt.datetime, dict[str, list[QuantileSketch]]] = {
            moment: {name: [] for name in columns} for moment in as_of
        }
        for entry in self._manifest.files:
            try:
                rows = frame_of(self._stored.read(entry, columns=[*columns, AS_OF]))
            except Unreadable as fault:  # the fences are others' without these rows, and so is the quality of all
                self.causes.append(replace(fault.cause, columns=frozenset(QUALITY)))
                continue
            for (moment,), own in rows.partition_by(AS_OF, as_dict=True).items():
                for name, sketch in sketches(profile_table(to_arrow(own.select(columns)))).items():
                    parts[moment][name].append(sketch)
        return {moment: _fences_by(parts[moment]) for moment in as_of}


def _fences_by(parts: Mapping[str, list[QuantileSketch]]) -> dict[str, Fences]:
    whole = {name: QuantileSketch.merge_all(own) for name, own in parts.items()}

    def measured(name: str, levels: Sequence[float]) -> Any:
        return whole[name].quantiles(levels)

    return fences(list(whole), measured)


def _only(link: StateLink, numbers: set[int]) -> StateLink:
    """A link without the events of other files."""
    live = {own: today for own, today in link.live.items() if today in numbers}
    return replace(link, live=live, complete=False)
