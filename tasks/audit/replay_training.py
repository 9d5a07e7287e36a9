"""Rows of a training set made again: the spine's or the label's, joined with the feature versions of the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.audit.replay_causes import input_version, other_declaration, why_not
from tasks.audit.replay_rows import (
    Answer,
    Cause,
    StoredFiles,
    differences,
    keys_of,
    ordinals,
    placed,
    text_of,
)
from tasks.audit.replay_tables import (
    StoredRows,
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
from tasks.core.errors import DefinitionError, PipelineError, SourceError
from tasks.core.manifest import Manifest
from tasks.core.own_columns import EVENT_TIME, TARGET
from tasks.core.partition import bucket_of
from tasks.features.config import FeatureStoreConfig
from tasks.features.loading import declared
from tasks.features.parts import to_arrow
from tasks.features.plan import with_uris
from tasks.features.stages import looked_up, read_and_judge
from tasks.features.texts import polars_type
from tasks.serving.asof import join_asof
from tasks.serving.definition import Label, Pin
from tasks.serving.history import History, history_among, read_bucket
from tasks.serving.labels import label_rows
from tasks.serving.loading import load_models
from tasks.serving.plan import TrainingSetPlan, plan_training_set
from tasks.serving.stages import label_lookups, taken, units_of

_PLACE = "\x00place"


def replay_training_set(root: str, manifest: Manifest, sample: int, seed: int) -> Answer:
    """Make some rows of a training set again, and compare them.

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
    sampled = stored_rows(manifest, stored, sample, seed)
    again = _Again(root, manifest)
    rebuilt = sampled.table.slice(0, 0)
    keys, names = [], []
    if len(sampled.table):
        keys = _stored_keys(sampled, stored, again.entity)
        names = [
            f"{again.entity} {text_of(key)} at {time.isoformat()}" + (f", the {number + 1}. of it" if number else "")
            for key, time, number in keys
        ]
        try:
            rebuilt = again.rows(sampled.table)
        except (PipelineError, OSError) as fault:
            again.causes.append(why_not(fault))
    made = ordinals(keys_of(rebuilt, [again.entity, EVENT_TIME])) if len(rebuilt) else []
    found = differences(sampled.table, rebuilt, placed(keys, made))
    replayed = rows_replayed(stored, sampled, names, found)
    return row_answer(manifest, stored, replayed, causes=tuple(again.causes), notes=tuple(again.notes))


def _stored_keys(sampled: StoredRows, stored: StoredFiles, entity: str) -> list[tuple[Any, ...]]:
    """Entity and time of each sampled row, and how many rows of both stand before it: all of them are in its file."""
    found: list[tuple[Any, ...]] = []
    of_file: dict[str, list[tuple[Any, ...]]] = {}
    for entry, row in zip(sampled.files, sampled.rows, strict=True):
        if entry.path not in of_file:
            of_file = {
                entry.path: ordinals(keys_of(stored.read(entry, columns=[entity, EVENT_TIME]), [entity, EVENT_TIME]))
            }
        found.append(of_file[entry.path][row])
    return found


class _Again:
    """The rows of one training set, made again; what is otherwise than it was gathers on the way."""

    def __init__(self, root: str, manifest: Manifest) -> None:
        self.causes: list[Cause] = []
        self.notes: list[str] = []
        self.entity: str = manifest.definition["entity"]
        self._root = root
        self._manifest = manifest
        self._config = config_of(FeatureStoreConfig, manifest, root=root)
        self._versions: dict[str, list[Manifest]] = {}
        self._files: dict[str, StoredFiles] = {}

    def rows(self, sampled: pa.Table) -> pa.Table:
        """The rows of the sampled entities and times, in the order in which a training set has those of one."""
        plan = self._plan()
        wanted = frame_of(sampled.select([self.entity, EVENT_TIME])).unique()
        rows = self._labelled(plan, wanted) if plan.label is not None else self._spine(plan, wanted)
        for history in plan.histories:
            rows = self._joined(plan, history, rows)
        return to_arrow(rows.select(*plan.entities[::-1], EVENT_TIME, *plan.columns, TARGET))

    def _plan(self) -> TrainingSetPlan:
        """The plan of the run, over just the files and versions that it read."""
        config, manifest = self._config, self._manifest
        name = manifest.definition["name"]
        if config.models is None:
            raise DefinitionError(f"{manifest.dataset} v{manifest.version} doesn't say where its model is declared")
        models = load_models(config.models)
        if name not in models:
            raise DefinitionError(f"the model '{name}' isn't declared in {config.models} any more")
        model = models[name]
        self.causes += other_declaration(manifest, model.describe())
        for record in manifest.inputs:
            if record.version is not None:
                found, causes = input_version(self._root, record)
                self.causes += causes
                self._versions.setdefault(record.name, []).extend([] if found is None else [found])
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
        """The history of the versions that the manifest names, whatever was published or withdrawn since."""
        versions = sorted(self._versions.get(layout.feature_dataset(group), ()), key=lambda one: one.version)
        if not versions:
            raise SourceError(f"no version of '{group}' that it was made from is there any more")
        return history_among(root, group, features, versions)

    def _spine(self, plan: TrainingSetPlan, wanted: pl.DataFrame) -> pl.DataFrame:
        """The spine's rows of some entities and times, in its order."""
        frames = []
        for unit in units_of(plan):
            rows, _, _ = read_and_judge(plan.source, unit)
            frames.append(_matching(rows, wanted))
        return pl.concat(frames)

    def _labelled(self, plan: TrainingSetPlan, wanted: pl.DataFrame) -> pl.DataFrame:
        """The label's rows of some entities and times, from their events."""
        assert plan.label is not None, "only called for a label"
        events = plan.label.events
        lookups = tuple(lookup.rows for lookup in label_lookups(plan))
        keys = wanted.select(self.entity).drop_nulls().unique()
        frames = []
        for unit in units_of(plan):
            rows, _, _ = read_and_judge(events.events, unit)
            rows = looked_up(rows, events.lookups, lookups).select(events.groups[0].columns)
            frames.append(only_of(rows, keys))
        made = label_rows(plan.label.label, pl.concat(frames), events.time, plan.label.times)
        return _matching(made, wanted).drop_nulls(TARGET)

    def _joined(self, plan: TrainingSetPlan, history: History, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows with the newest features of one group that were there at their times."""
        model, buckets = plan.model, _buckets(history)
        kind = polars_type(history.key_type)
        assert kind is not None, "a published key has a type that can be read"
        keys = rows[history.entity].cast(kind, strict=False)
        part_of = bucket_of(keys.to_arrow(compat_level=pl.CompatLevel.oldest()), buckets)
        numbered = rows.with_row_index(_PLACE)
        pieces = []
        for part in np.unique(part_of).tolist():
            own = numbered.filter(pl.Series(part_of == part))
            own_keys = own[history.entity].cast(keys.dtype, strict=False)
            self._check(history, part, buckets)
            known = read_bucket(self._root, history, part, buckets, known_at=model.known_at, keys=own_keys)
            found = join_asof(
                own,
                known,
                entity=history.entity,
                event_time=EVENT_TIME,
                ttl=plan.ttl,
                strict=model.strict,
                known_at=model.known_at,
            )
            pieces.append(own.hstack(taken(known, found, plan.columns_of(history))))
        return pl.concat(pieces).sort(_PLACE).drop(_PLACE) if pieces else rows

    def _check(self, history: History, part: int, buckets: int) -> None:
        """Compare the files of a bucket, of all versions, with their manifests."""
        dataset = layout.feature_dataset(history.group)
        manifests = {manifest.version: manifest for manifest in self._versions[dataset]}
        for version in history.versions:
            base = layout.version_uri(self._root, dataset, version.version)
            files = self._files.setdefault(base, StoredFiles(base))
            uris, _ = version.files_of(history.entity, part, buckets)
            for entry in manifests[version.version].files:
                if layout.join(base, entry.path) in uris and (cause := files.check(entry)) is not None:
                    text = f"of the input {dataset} v{version.version}, {cause.text}"
                    self.causes += [one for one in [Cause("input", text)] if one not in self.causes]


def _buckets(history: History) -> int:
    """So many buckets that every version's files can be told apart by them."""
    return max([1, *(one.partition.buckets for one in history.versions if one.partition is not None)])


def _matching(rows: pl.DataFrame, wanted: pl.DataFrame) -> pl.DataFrame:
    """The rows of some entities, null among them, and times, in their order."""
    typed = wanted.select(pl.col(name).cast(rows.schema[name], strict=False) for name in wanted.columns)
    return rows.join(typed, on=wanted.columns, how="semi", nulls_equal=True, maintain_order="left")
