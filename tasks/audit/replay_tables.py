"""Rows of a feature version or a training set made again.

Rows of a feature version; of the sources' rows, only the sampled entities' events are kept:

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

from tasks.audit.inputs import input_version, other_declaration, present, sources_of
from tasks.audit.replay_rows import StoredFiles, TableAgain, Unreadable, frame_of, matching
from tasks.engine.partition import bucket_of
from tasks.features.config import FeatureStoreConfig
from tasks.features.csv_text import polars_type
from tasks.features.incremental import FILE, in_order, kept_links, read_kept
from tasks.features.kernel import join_dimension
from tasks.features.loading import declared
from tasks.features.plan import FeaturePlan, GroupPlan, StateLink, plan_features, with_uris
from tasks.features.shuffle import Tally, looked_up, lookup_tables, read_and_judge, snapshots_of, unique_dimension_rows
from tasks.features.writer import fences_again, numeric_features, scored_rows, stamped, to_arrow
from tasks.io.errors import DefinitionError, SourceError
from tasks.store import layout
from tasks.store.layout import AS_OF, EVENT_TIME, QUALITY, TARGET
from tasks.store.manifest import Manifest
from tasks.store.reading import read_manifest
from tasks.store.settings import config_of
from tasks.training_sets.definition import Label, Pin
from tasks.training_sets.history import History, created_of, history_among
from tasks.training_sets.loading import load_models
from tasks.training_sets.plan import TrainingSetPlan, plan_training_set
from tasks.training_sets.shuffle import find_features, label_lookups, taken, units_of
from tasks.training_sets.spine import label_rows


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
            raise DefinitionError(f"{manifest.dataset} v{manifest.version} doesn't say where its model is declared")
        models = load_models(config.models)
        if name not in models:
            raise DefinitionError(f"the model '{name}' isn't declared in {config.models} any more")
        model = models[name]
        self.causes += other_declaration(manifest, model.describe())
        for record in manifest.inputs:
            if record.version is not None and (version := input_version(self.root, record, self.causes)) is not None:
                role = f"of the input {record.name} v{record.version}, "
                own = (version, StoredFiles(self.root, version, role))
                self._versions.setdefault(record.name, []).append(own)
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
            own = numbered.filter(pl.Series(part_of == part))
            own_keys = own[history.entity].cast(keys.dtype, strict=False)
            self._check(history, part)
            known, found = find_features(plan, history, own, part, buckets, keys=own_keys)
            pieces.append(own.hstack(taken(known, found, plan.columns_of(history))))
        return pl.concat(pieces).sort(_PLACE).drop(_PLACE) if pieces else rows

    def _check(self, history: History, part: int) -> None:
        """Compare the files of a bucket, of all versions, with their manifests."""
        files = {one.version: one.files_of(history.entity, part, history.buckets)[0] for one in history.versions}
        for manifest, stored in self._versions[layout.feature_dataset(history.group)]:
            for entry in manifest.files:
                if layout.join(stored.base, entry.path) in files.get(manifest.version, ()):
                    self.causes += [cause for cause in stored.check(entry) if cause not in self.causes]
