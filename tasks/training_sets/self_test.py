"""Fault tests of a training set, in a sample of the version's rows. Pure, but for the reading.

spine rows ─ judge ─ tally ─┐
spine ──┐                   │        the same functions as in the job, on a few thousand rows:
        ├─ as-of join ─ canary ─ profile ─ gate
history ┘                            the features of a row become a separate history, known at its time
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.features.config import FeatureStoreConfig
from tasks.features.rows import TIME
from tasks.features.self_test import judge_events
from tasks.features.writer import to_arrow
from tasks.io.errors import LeakFound
from tasks.quality import faults
from tasks.quality.faults import MOST_FEATURES, NULLS, Faults, Sample, Trial, sample_rows
from tasks.quality.leakage import as_text
from tasks.quality.profile import merge_profiles, profile_table
from tasks.quality.sketch import QuantileSketch
from tasks.store import layout
from tasks.store.layout import AS_OF, EVENT_TIME, TARGET
from tasks.store.manifest import Manifest, RowBalance
from tasks.training_sets.asof import Int64Array, join_asof, plant
from tasks.training_sets.definition import FeatureReference, Model, SpineSource
from tasks.training_sets.gate import TrainingSetFigures, judge_training_set
from tasks.training_sets.history import FROM, UNTIL
from tasks.training_sets.shuffle import is_later, later_bound, repeated_rows, taken

_YEAR = dt.timedelta(days=366)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows(Sample):
    """Rows with their features. late: delay until these are known. join: function that finds them."""

    late: dt.timedelta = dt.timedelta()
    join: Callable[..., Int64Array] = join_asof


@dataclass(frozen=True, kw_only=True)
class _Trial(Trial[_Rows]):
    model: Model
    groups: Mapping[str, tuple[str, ...]]
    """Columns of the sample by group."""
    source: str

    def figures(self, rows: _Rows) -> TrainingSetFigures:
        model, frame, planted, matched = self.model, pl.DataFrame(rows.table), 0, {}
        joined = spine = frame.drop(self.features, strict=False)
        _, read = judge_events(spine.select(model.entity, EVENT_TIME), self.source, rows.bad, required=False)
        options = {"entity": model.entity, "event_time": EVENT_TIME, "ttl": None, "strict": model.strict}
        for group, columns in self.groups.items():
            own = [name for name in columns if name in frame.columns]
            history = self._history(frame, own, rows.late)
            found = rows.join(spine, history, **options)
            planted += plant(spine, history, found, join=rows.join, **options)  # type: ignore[arg-type]
            matched[group] = int(np.count_nonzero(found >= 0))
            joined = joined.hstack(taken(history, found, {name: name for name in own}))
        table = to_arrow(joined.select(frame.columns))
        kept = faults.lost(table, rows.lost)
        later = self._later(kept)
        earlier, latest = profile_table(kept.filter(pc.invert(later))), profile_table(kept.filter(later))
        return TrainingSetFigures(
            model=model,
            rows=table.num_rows,
            schema=kept.schema,
            features=tuple(self.features),
            profile=merge_profiles([earlier, latest]),
            profile_earlier=earlier,
            profile_later=latest,
            balances=(read, RowBalance(name=model.name, rows_in=table.num_rows, rows_out=kept.num_rows)),
            matched=matched,
            planted=planted,
            duplicates=repeated_rows(pl.DataFrame(kept), model.entity),
            sample=kept,
        )

    def _history(self, rows: pl.DataFrame, columns: list[str], late: dt.timedelta) -> pl.DataFrame:
        """Return the features of rows, as a history: known at their rows' time, or later."""
        entity, before = self.model.entity, dt.timedelta(microseconds=1 if self.model.strict else 0)
        some = pl.any_horizontal(pl.lit(value=False), *(pl.col(name).is_not_null() for name in columns))
        known = rows.filter(some).drop_nulls([entity, EVENT_TIME])
        never = (pl.lit(None, TIME).alias(name) for name in (FROM, UNTIL))
        moments = (pl.col(EVENT_TIME) - before + late).alias(AS_OF)
        return known.select(entity, moments, *never, *columns).sort(entity, AS_OF, maintain_order=True)

    def _later(self, table: pa.Table) -> pa.ChunkedArray:
        """Mark the latest rows, by the job's split."""
        times = table[EVENT_TIME].drop_null().cast(pa.int64()).to_numpy().astype(np.float64)
        return is_later(table, later_bound(QuantileSketch.of(times), self.config.label_thresholds.later_share))

    def faults(self) -> Faults:
        table, entity = self.table, self.model.entity
        yield self.no_rows()
        yield self.duplicates("repeated rows")
        yield self.lost_rows(self.model.name)
        yield self.bad_rows("bad rows", f"the rows of {self.source} lost their time", self.source)
        words, group = "All features were computed as of a year after their rows.", next(iter(self.groups))
        yield self.fault("late features", words, f"unmatched of {group}", late=_YEAR)
        words = "The join was made to take features of up to a year after a row."
        ahead = self.fault("future features", words, "canary", join=_looking_ahead)
        yield replace(ahead, raises=(LeakFound,))
        words = f"Every {entity} was made null, so that no row from the future can be planted."
        yield self.values("no keys", "canary", entity, None, words=words)
        yield self.values("null keys", f"nulls of {entity}", entity, None, NULLS)
        yield self.values("null labels", f"nulls of {TARGET}", TARGET, None, NULLS)
        words = "Every row was given the label of the first."
        first = table[TARGET][0].as_py() if table.num_rows else None
        yield self.values("one label", f"target of {TARGET}", TARGET, first, words=words)
        copy = self.real or self.features[0]
        table = faults.with_column(table, copy, _as_number(table[TARGET]))
        yield self.fault("label copy", f"The label was copied into {copy}.", f"leakage of {copy}", table=table)
        yield self.schema(self.first)
        yield self.nulls()
        yield self.not_finite()
        yield self.shift()
        latest = self._later(self.table).to_numpy()
        yield self.shift(name="late shift", check="drift over time", where=" of the latest rows", hit=latest)


def trial(root: str, manifest: Manifest, config: FeatureStoreConfig, previous: Manifest | None) -> Trial[_Rows]:
    """Sample a training set; drift and types are compared with the sample as it is."""
    definition = manifest.definition
    same = {name: definition[name] for name in ("name", "entity", "strict", "known_at")}
    features = tuple(FeatureReference.parse(text) for text in definition["features"])
    model = Model(spine=SpineSource(uri=""), features=features, **same)
    columns: Mapping[str, str] = definition["columns"]
    groups: dict[str, tuple[str, ...]] = {}
    for name in list(columns)[:MOST_FEATURES]:
        group = columns[name].partition(":")[0]
        groups[group] = (*groups.get(group, ()), name)
    chosen = [name for names in groups.values() for name in names]
    uri = layout.version_uri(root, manifest.dataset, manifest.version)
    names = [column.name for column in manifest.columns if column.name not in columns or column.name in chosen]
    table = sample_rows([layout.join(uri, file.path) for file in manifest.files], names, model.entity)
    return _Trial(
        sample=_Rows(table=table),
        features=chosen,
        before=previous or manifest,
        model=model,
        config=config,
        gate=judge_training_set,
        groups=groups,
        source=manifest.balances[0].name,
    )


def _as_number(label: pa.ChunkedArray) -> pa.Array:
    """Return a label as a number: itself, or the place of its class."""
    if faults.is_number(label.type):
        return label.cast(pa.float64(), safe=False).combine_chunks()
    return as_text(label).combine_chunks().dictionary_encode().indices.cast(pa.float64())


def _looking_ahead(spine: pl.DataFrame, history: pl.DataFrame, **options: Any) -> Int64Array:
    """Join wrongly: take what is known a year later."""
    return join_asof(spine.with_columns(pl.col(EVENT_TIME) + _YEAR), history, **options)
