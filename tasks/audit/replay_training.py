"""Rows of a training set made again: the spine's or the label's, joined with the feature versions of the manifest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.audit.inputs import input_version, other_declaration, present, sources_of
from tasks.audit.replay_rows import StoredFiles, TableAgain, frame_of, matching
from tasks.engine.partition import bucket_of
from tasks.features.config import FeatureStoreConfig
from tasks.features.csv_text import polars_type
from tasks.features.loading import declared
from tasks.features.plan import with_uris
from tasks.features.shuffle import looked_up, read_and_judge
from tasks.features.writer import to_arrow
from tasks.io.errors import DefinitionError, SourceError
from tasks.store import layout
from tasks.store.manifest import Manifest
from tasks.store.own_columns import EVENT_TIME, TARGET
from tasks.store.settings import config_of
from tasks.training_sets.definition import Label, Pin
from tasks.training_sets.history import History, history_among
from tasks.training_sets.loading import load_models
from tasks.training_sets.plan import TrainingSetPlan, plan_training_set
from tasks.training_sets.shuffle import find_features, label_lookups, taken, units_of
from tasks.training_sets.spine import label_rows

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
