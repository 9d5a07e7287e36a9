"""The quality gate of a training set, and its fault tests. Pure, but for reading the sample.

The fault tests run the job's functions on a sample of the version's rows:

spine rows ─ judge ─ tally ─┐
spine ──┐                   │        the same functions as in the job, on a few thousand rows:
        ├─ as-of join ─ canary ─ profile ─ gate
history ┘                            the features of a row become a separate history, known at its time
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.features.config import FeatureStoreConfig
from tasks.features.gate import judge_events
from tasks.features.rows import TIME
from tasks.features.writer import to_arrow
from tasks.io.errors import LeakFound
from tasks.io.tensors import Int64Array
from tasks.io.text import plural
from tasks.quality import faults, rules
from tasks.quality.faults import MOST_FEATURES, NULLS, Faults, Sample, Trial, sample_rows
from tasks.quality.leakage import as_text
from tasks.quality.profile import TableProfile, merge_profiles, profile_table
from tasks.quality.rules import Figures
from tasks.quality.sketch import QuantileSketch
from tasks.store.layout import AS_OF, EVENT_TIME, TARGET
from tasks.store.manifest import CheckResult, GateResult, Manifest, RowBalance
from tasks.training_sets.asof import join_asof, plant
from tasks.training_sets.definition import FeatureReference, Model, SpineSource
from tasks.training_sets.history import FROM, UNTIL
from tasks.training_sets.shuffle import is_later, later_bound, repeated_rows, taken


@dataclass(frozen=True, kw_only=True)
class TrainingSetFigures(Figures):
    """Figures of a training set.

    Attributes:
        model: The declaration.
        rows: Number of rows written.
        features: Names of the `feature_*` columns.
        profile_earlier: Profile of the rows before the latest.
        profile_later: Profile of the latest share of the rows by event time.
        matched: Group → rows with features in time.
        planted: Rows from the future planted as a test, none of which was matched.
        duplicates: Rows that repeat another's entity and event time.
        sample: Some rows: the features and the target, and the entity if it is known.
    """

    model: Model
    rows: int
    features: tuple[str, ...]
    profile_earlier: TableProfile
    profile_later: TableProfile
    matched: Mapping[str, int]
    planted: int
    duplicates: int
    sample: pa.Table


def judge_training_set(
    config: FeatureStoreConfig, computed: TrainingSetFigures, previous: Manifest | None
) -> GateResult:
    """Judge the training set of a model by its thresholds and the last published version, if there is one."""
    bounds, model = config.label_thresholds, computed.model
    columns = computed.profile.columns()
    checks: list[CheckResult] = [rules.check_rows(computed.rows, 1)]
    types = {field.name: str(field.type) for field in computed.schema}
    checks += rules.check_schema(types, _expected_types(model, computed.features, types, previous, config))
    checks += [rules.check_balance(balance) for balance in computed.balances]
    checks += [
        rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail) for balance in computed.balances
    ]
    checks += [
        rules.check_unmatched(group, matched, computed.rows, bounds.unmatched_warn, bounds.unmatched_fail)
        for group, matched in computed.matched.items()
    ]
    checks.append(rules.check_canary(computed.planted))
    if model.entity in columns:  # a row without its key is kept, and finds no features
        checks.append(rules.check_nulls(model.entity, columns[model.entity], 0.0, 1.0))
    checks += [rules.check_nulls(name, columns[name], 0.0, 0.0) for name in (EVENT_TIME, TARGET) if name in columns]
    checks.append(_repeats(model, computed.duplicates))
    present = [name for name in computed.features if name in columns]  # a missing one fails the schema
    checks += [rules.check_nulls(name, columns[name], bounds.null_warn, bounds.null_fail) for name in present]
    checks += [
        rules.check_finite(name, columns[name])
        for name in (*computed.features, TARGET)
        if name in columns and pt.is_floating(computed.schema.field(name).type)
    ]
    if TARGET in columns:
        checks.append(rules.check_target(TARGET, computed.profile.partial(TARGET), bounds.class_warn))
        checks += _leaks(config, computed)
    checks += _drifts(config, computed, previous)
    return rules.gate(checks)


def _expected_types(
    model: Model,
    features: Sequence[str],
    found: Mapping[str, str],
    previous: Manifest | None,
    config: FeatureStoreConfig,
) -> dict[str, str]:
    """Return the declared columns with their previous types; a model with the same features has the same columns."""
    keys = [name for name in found if name not in features]
    names = dict.fromkeys([model.entity, EVENT_TIME, *keys, *features, TARGET])
    types = {name: found.get(name, "any type") for name in names}
    if previous is None or config.allow_schema_change:
        return types
    same = previous.definition.get("features") == model.describe()["features"]
    return types | {column.name: column.type for column in previous.columns if same or column.name in types}


def _repeats(model: Model, duplicates: int) -> CheckResult:
    """Check that each row is unique in entity and time: a repeated row counts twice in training, perhaps on purpose."""
    message = f"{plural(duplicates, 'row')} repeat the {model.entity} and {EVENT_TIME} of another; all are kept."
    message = message if duplicates else f"Every {model.entity} has each {EVENT_TIME} once."
    return rules.at_most("repeated rows", model.entity, duplicates, (0, math.inf), message)


def _leaks(config: FeatureStoreConfig, computed: TrainingSetFigures) -> list[CheckResult]:
    """Check how well each feature alone predicts the target, on a sample of the rows."""
    sample, bounds, entity = computed.sample, config.label_thresholds, computed.model.entity
    sound = sample[TARGET].is_valid()
    if pt.is_floating(sample.schema.field(TARGET).type):
        sound = pc.and_(sound, pc.is_finite(pc.fill_null(sample[TARGET], 0.0)))
    sample = sample.filter(sound)
    entities = sample[entity] if entity in sample.column_names else None
    target = rules.prepare_target(sample[TARGET], computed.profile.partial(TARGET), entities)
    if target is None:
        return []
    return [
        rules.check_leakage(name, sample[name], target, bounds.leak_warn, bounds.leak_fail)
        for name in computed.features
        if name in sample.column_names
    ]


def _drifts(config: FeatureStoreConfig, computed: TrainingSetFigures, previous: Manifest | None) -> list[CheckResult]:
    """Compare the latest rows with the others, and this version with the last: both only warn."""
    bounds = config.label_thresholds
    names = [name for name in (*computed.features, TARGET) if name in computed.profile.partials]
    earlier = computed.profile_earlier.columns()
    checks = [
        rules.check_drift(
            name,
            computed.profile_later,
            earlier[name],
            warn_above=bounds.later_drift_warn,
            fail_above=math.inf,
            against="the earlier rows",
        ).model_copy(update={"name": "drift over time"})
        for name in names
    ]
    before = previous.profile if previous is not None else {}
    checks += [
        rules.check_drift(name, computed.profile, before[name], warn_above=bounds.drift_warn, fail_above=math.inf)
        for name in names
        # With another type it is another column, which the schema's check has judged.
        if name in before and before[name].kind == computed.profile.partial(name).kind
    ]
    return checks


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
    names = [column.name for column in manifest.columns if column.name not in columns or column.name in chosen]
    table = sample_rows([manifest.uri(root, file.path) for file in manifest.files], names, model.entity)
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
