"""Rows of a feature version made again: of the sources' rows, only the sampled entities' events are kept.

sources ─ judge ─ look up ─ events of the sampled entities ─┐
├─ features at each as-of time ─ join ─ score ─ compare
events that versions have kept of files deleted since ──────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.audit.inputs import other_declaration, present, sources_of
from tasks.audit.replay_rows import StoredFiles, TableAgain, Unreadable, frame_of, matching
from tasks.engine.partition import bucket_of
from tasks.features.config import FeatureStoreConfig
from tasks.features.incremental import FILE, in_order, kept_links, read_kept
from tasks.features.kernel import join_dimension
from tasks.features.loading import declared
from tasks.features.plan import FeaturePlan, GroupPlan, StateLink, plan_features, with_uris
from tasks.features.shuffle import Tally, looked_up, lookup_tables, read_and_judge, snapshots_of, unique_dimension_rows
from tasks.features.writer import fences_again, numeric_features, scored_rows, stamped, to_arrow
from tasks.io.errors import DefinitionError
from tasks.store.manifest import Manifest
from tasks.store.own_columns import AS_OF, QUALITY
from tasks.store.reading import read_manifest
from tasks.store.settings import config_of
from tasks.training_sets.history import created_of


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
        beside = [one.name for one in definitions.select(self._config.groups) if one.source == group.source]
        config = self._config.model_copy(update={"groups": tuple(beside)})
        [plan] = plan_features(definitions, config, manifest.as_of, self._sources.tables)
        return next(one for one in plan.groups if one.group.name == name), plan

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
        found = [_only(link, lost) for link in kept_links(self.manifest, self.root, source)]
        links = [link for link in found if link.live]
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
    live = {own: today for own, today in link.live.items() if today in numbers}
    return replace(link, live=live, complete=False)
