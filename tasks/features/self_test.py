"""The faults that a feature group's gate is shown, in a sample of the version's own rows. Pure, but for the reading.

events ─ judge ─ tally ─┐                    the same functions as in the job, on a few thousand rows:
features ─ join ─ score ─ profile ─ gate     an entity's event is its key and the newest event's time
dimension ─ unique ─┘
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.core import injection, layout
from tasks.core.injection import DOUBLED, LOST, NULLS, ODD, SHIFT
from tasks.core.manifest import FaultResult, GateResult, Manifest
from tasks.core.own_columns import AS_OF, CREATED, FEATURES, READY, VERSION
from tasks.core.profile import profile_table
from tasks.core.sampling import sample_rows
from tasks.core.self_test import Fault, as_previous, inject
from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import FeatureGroup
from tasks.features.gate import judge_group
from tasks.features.kernel import join_dimension
from tasks.features.keys import key_type
from tasks.features.parts import repeated_keys, to_arrow
from tasks.features.rows import REASON, TIME, ColumnPlan, RowPlan
from tasks.features.rows import judge as judge_rows
from tasks.features.scoring import fences, score_rows
from tasks.features.stages import unique_dimension_rows
from tasks.features.tallies import Tally

MOST_FEATURES = 64
"""Features that a sample has at most, the first ones: of a thousand, more would only take longer."""
REJECTED, ORPHANS, OUTLIERS = 0.4, 0.95, 0.2
EVENT = "_event_time"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What a fault changes. events: entity and time; features: a row an entity and time; dimension: a row an entity.

    lost: share of the rows that vanish between computing and writing.
    """

    events: pa.Table
    features: pa.Table
    dimension: pa.Table | None
    lost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    group: FeatureGroup
    config: FeatureStoreConfig
    manifest: Manifest
    columns: tuple[str, ...]
    """The features of the sample: the group's and its dimension's."""
    plan: RowPlan
    previous: Manifest | None

    def judge(self, rows: _Rows) -> GateResult:
        """Judge some rows as the job does."""
        written, tallies, unmatched = self._written(rows)
        scored = self._scored(written)
        table = to_arrow(scored)
        newest: dt.datetime | None = tallies.newest
        return judge_group(
            self.group,
            self.config,
            schema=table.schema,
            features=[name for name in table.column_names if name in self.columns],
            profile=profile_table(table),
            balances=[tally.balance(name) for name, tally in tallies.by_name.items()],
            duplicate_keys=repeated_keys(scored, self.group.entity),
            unmatched=unmatched,
            ready=int(scored[READY].sum()),
            newest_event=newest if self.manifest.definition.get("newest_event") else None,
            as_of=_last(self.manifest),
            previous=self.previous,
            times=self.manifest.as_of,
        )

    def profiled(self, rows: _Rows) -> Manifest:
        """The version as if the sample were all of it, to compare with."""
        table = to_arrow(self._scored(self._written(rows)[0]))
        return as_previous(self.previous or self.manifest, table.schema, profile_table(table))

    def _written(self, rows: _Rows) -> tuple[pl.DataFrame, _Tallies, int]:
        judged = judge_rows(_frame(rows.events), self.plan)
        events = Tally(rows_in=rows.events.num_rows, rows_out=judged.kept.height)
        events.rejected.update(judged.rejected[REASON].to_list())
        events.filtered.update(judged.filtered)
        tallies = _Tallies({self.group.source: events}, judged.kept[EVENT].max())  # type: ignore[arg-type]
        features, unmatched = _frame(rows.features), 0
        entities = Tally(rows_in=features.height)
        if rows.dimension is not None:
            assert self.group.dimension is not None, "only a group with a dimension has its columns"
            dimension = Tally()
            kept, _ = unique_dimension_rows(_frame(rows.dimension), self.group.entity, dimension)
            joined = join_dimension(self.group, features, kept, self.config.join)
            features, unmatched = joined.kept, joined.unmatched
            entities.rejected.update(joined.rejected[REASON].to_list())
            tallies.by_name[self.group.dimension] = dimension
        if rows.lost:
            features = features.filter(pl.Series(~injection.some(features.height, rows.lost)))
        entities.rows_out = features.height
        tallies.by_name[self.group.name] = entities
        return features, tallies, unmatched

    def _scored(self, features: pl.DataFrame) -> pl.DataFrame:
        """The rows with their quality, by the fences of their own as-of time."""
        names = [name for name in features.columns if name in self.columns]
        bounds = self.config.thresholds
        snapshots = features.partition_by(AS_OF, maintain_order=True) if features.height else [features]
        scored = []
        for rows in snapshots:
            numbers = to_arrow(rows.select(name for name in names if rows.schema[name].is_numeric()))
            usual = fences(numbers.column_names, profile_table(numbers).quantiles)
            scored.append(
                score_rows(
                    rows,
                    names,
                    usual,
                    missing_below=bounds.missing,
                    outliers_below=bounds.outliers,
                    score_above=bounds.score,
                )
            )
        return pl.concat(scored)


@dataclass(slots=True)
class _Tallies:
    """Row counts by the name of their balance, the entities' last; the newest event that counts."""

    by_name: dict[str, Tally]
    newest: dt.datetime | None


def self_test(
    root: str, manifest: Manifest, config: FeatureStoreConfig, previous: Manifest | None
) -> tuple[FaultResult, ...]:
    """Inject faults into a sample of a version, and judge each.

    Drift and types are compared with the sample as it is; whether they can be compared at all, with the last version.

    Args:
        root: Root of the store.
        manifest: The version's; it need not be committed.
        config: Thresholds and choices.
        previous: Manifest of the last published version, if there is one.

    """
    group, columns = _sampled_group(manifest)
    uri = layout.version_uri(root, manifest.dataset, manifest.version)
    names = [group.entity, *columns, AS_OF, CREATED, VERSION]
    table = sample_rows([layout.join(uri, file.path) for file in manifest.files], names, group.entity)
    trial = _Trial(
        group=group,
        config=config,
        manifest=manifest,
        columns=columns,
        plan=_row_plan(group, table, _last(manifest)),
        previous=previous,
    )
    rows = _sample(trial, table)
    trial = replace(trial, previous=trial.profiled(rows))
    return inject(trial.judge(rows), list(_faults(trial, rows)))


def _sampled_group(manifest: Manifest) -> tuple[FeatureGroup, tuple[str, ...]]:
    """The group as far as the gate asks, and its columns that are sampled: those with bounds, and the first."""
    definition = manifest.definition
    own = [*definition["features"]]
    own += [f"{name}_{window['days']}d" for window in definition["windows"] for name in window["features"]]
    own += definition["derived"]
    stamps = {definition["entity"], *FEATURES}
    known = [column.name for column in manifest.columns if column.name not in stamps]
    wanted = set([*definition["bounds"], *known][:MOST_FEATURES])
    columns = tuple(name for name in known if name in wanted)
    group = FeatureGroup(
        name=definition["name"],
        entity=definition["entity"],
        source=definition["source"],
        features={name: pl.lit(None) for name in own if name in wanted} or {own[0]: pl.lit(None)},
        dimension=definition["dimension"],
        bounds={name: tuple(bounds) for name, bounds in definition["bounds"].items() if name in wanted},
    )
    return group, columns


def _row_plan(group: FeatureGroup, table: pa.Table, as_of: dt.datetime) -> RowPlan:
    of_key = key_type([table.schema.field(group.entity).type])
    key = ColumnPlan(name=group.entity, source_name=group.entity, kind="key", required=True, key_type=of_key)
    time = ColumnPlan(name=EVENT, source_name=EVENT, kind="time", required=True)
    return RowPlan(source=group.source, columns=(key, time), time=EVENT, as_of=as_of)


def _sample(trial: _Trial, table: pa.Table) -> _Rows:
    """The sample in the parts that the job had: events, features, and the dimension's rows."""
    group, manifest = trial.group, trial.manifest
    frame = _frame(table)
    own = [group.entity, *group.feature_names, AS_OF, CREATED, VERSION]
    others = [name for name in trial.columns if name not in own]
    newest = manifest.definition.get("newest_event")
    moment = dt.datetime.fromisoformat(newest) if newest else _last(manifest)
    events = frame.select(group.entity, pl.lit(moment, TIME).alias(EVENT))
    joined = any(balance.name == group.dimension for balance in manifest.balances)
    dimension = None
    if joined:
        known = frame.filter(pl.any_horizontal(pl.col(name).is_not_null() for name in others)) if others else frame
        dimension = to_arrow(known.select(group.entity, *others).unique(maintain_order=True))
    own += [] if joined else others
    features = frame.select(name for name in frame.columns if name in own)
    return _Rows(events=to_arrow(events), features=to_arrow(features), dimension=dimension)


def _faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    yield from _row_faults(trial, rows)
    yield from _column_faults(trial, rows)
    yield from _whole_faults(trial, rows)


def _row_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Rows that are missing, twice, or in the wrong place."""
    entity, source = trial.group.entity, trial.group.source
    judged = _judging(trial, rows)
    yield Fault(
        name="no rows",
        injected="Every row was taken away.",
        aims=("rows",),
        judge=judged(lambda r: replace(r, features=r.features.slice(0, 0), events=r.events.slice(0, 0))),
    )
    yield Fault(
        name="duplicates",
        injected=f"{DOUBLED:.0%} of the rows were put in twice, with the same {entity}.",
        aims=(f"unique of {entity}",),
        judge=judged(lambda r: replace(r, features=injection.doubled(r.features))),
    )
    yield Fault(
        name="lost rows",
        injected=f"{LOST:.0%} of the computed rows were lost before they were written.",
        aims=(f"balance of {trial.group.name}",),
        judge=judged(lambda r: replace(r, lost=LOST)),
    )
    yield Fault(
        name="bad events",
        injected=f"{REJECTED:.0%} of the {source} lost their time.",
        aims=(f"rejected of {source}",),
        judge=judged(lambda r: replace(r, events=injection.with_nulls(r.events, [EVENT], REJECTED))),
    )
    orphaned = judged(lambda r: replace(r, dimension=r.dimension and injection.lost(r.dimension, ORPHANS)))
    yield Fault(
        name="orphans",
        injected=f"{ORPHANS:.0%} of the dimension's rows were taken away.",
        aims=(f"reference of {entity}",),
        judge=orphaned if rows.dimension is not None else None,
        why_not="The group has no dimension table.",
    )


def _column_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Values of one feature that can't be, chosen by its kind."""
    judged, own = _judging(trial, rows), _own_features(trial, rows)
    number = injection.varied(rows.features, own)
    first = number or own[0]
    free = next((name for name in own if name not in trial.group.bounds), first)
    yield Fault(
        name="schema",
        injected=f"Column {free} was given another name.",
        aims=("schema", f"schema of {free}"),
        judge=judged(lambda r: replace(r, features=injection.renamed(r.features, free))),
    )
    yield Fault(
        name="nulls",
        injected=f"{NULLS:.0%} of {first} were made null.",
        aims=(f"nulls of {first}",),
        judge=judged(lambda r: replace(r, features=injection.with_nulls(r.features, [first]))),
    )
    real = next((name for name in own if pa.types.is_floating(rows.features.schema.field(name).type)), "")
    yield Fault(
        name="not finite",
        injected=f"{ODD:.0%} of {real or 'a feature'} were made infinite.",
        aims=(f"finite of {real}",),
        judge=judged(lambda r: replace(r, features=injection.with_values(r.features, real, math.inf)))
        if real
        else None,
        why_not="No feature is a floating-point number.",
    )
    bounded, beyond = _beyond(trial, rows)
    yield Fault(
        name="range",
        injected=f"{ODD:.0%} of {bounded or 'a feature'} were put out of their declared bounds.",
        aims=(f"range of {bounded}",),
        judge=judged(lambda r: replace(r, features=injection.with_values(r.features, bounded, beyond)))
        if bounded
        else None,
        why_not="The group declares no bounds of its numbers.",
    )
    yield Fault(
        name="shift",
        injected=f"{number or 'A number'} was shifted by {SHIFT:g} standard deviations.",
        aims=(f"drift of {number}", "drift"),
        judge=judged(lambda r: replace(r, features=_shifted(r.features, number))) if number else None,
        why_not="No feature is a number that differs between rows.",
    )


def _whole_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """What is wrong with the rows as a whole."""
    judged, own = _judging(trial, rows), _own_features(trial, rows)
    entity = trial.group.entity
    entities = rows.features[entity].unique()
    chosen = entities.filter(pa.array(injection.some(len(entities), OUTLIERS)))
    # Of the dimension's numbers too: the share is one over all of them.
    numbers = [table for table in (rows.features, rows.dimension) if table is not None and _numbers(table, trial)]

    def far(table: pa.Table) -> pa.Table:
        hit = pc.is_in(table[entity], chosen).to_numpy(zero_copy_only=False)
        for name in _numbers(table, trial):
            table = injection.shifted(table, name, 100 * (injection.spread(table, name) or 1.0), hit)
        return table

    yield Fault(
        name="outliers",
        injected=f"{OUTLIERS:.0%} of the entities had all their numbers moved by 100 standard deviations.",
        aims=("outliers",),
        judge=judged(lambda r: replace(r, features=far(r.features), dimension=r.dimension and far(r.dimension)))
        if numbers
        else None,
        why_not="No feature is a number.",
    )
    yield Fault(
        name="unready rows",
        injected=f"All of the group's features were made null in {NULLS:.0%} of the rows.",
        aims=("ready",),
        judge=judged(lambda r: replace(r, features=injection.with_nulls(r.features, own))),
    )
    bounds = trial.config.thresholds
    days = 10 * max(bounds.fresh_warn_days or 0, bounds.fresh_fail_days or 0)
    yield Fault(
        name="stale",
        injected=f"Every event was moved back by {days:g} days, ten times the bound." if days else "Events were aged.",
        aims=("freshness",),
        judge=judged(lambda r: replace(r, events=_aged(r.events, days))) if days else None,
        why_not="No bound of the newest event's age is configured (fresh_warn_days, fresh_fail_days).",
    )


def _judging(trial: _Trial, rows: _Rows) -> Callable[[Callable[[_Rows], _Rows]], Callable[[], GateResult]]:
    return lambda change: lambda: trial.judge(change(rows))


def _own_features(trial: _Trial, rows: _Rows) -> list[str]:
    """The group's own features in the sample."""
    return [name for name in rows.features.column_names if name in trial.group.feature_names]


def _numbers(table: pa.Table, trial: _Trial) -> list[str]:
    """Features among a table's columns that are numbers."""
    kinds = {name: table.schema.field(name).type for name in table.column_names if name in trial.columns}
    return [name for name, kind in kinds.items() if injection.is_number(kind)]


def _beyond(trial: _Trial, rows: _Rows) -> tuple[str, float]:
    """The first bounded number, and a value that it may not have; no name without any."""
    for name, (low, high) in trial.group.bounds.items():
        known = name in rows.features.column_names and injection.is_number(rows.features.schema.field(name).type)
        if known and high is not None:
            return name, math.ceil(high + abs(high) + 1)
        if known and low is not None:
            return name, math.floor(low - abs(low) - 1)
    return "", 0.0


def _shifted(table: pa.Table, name: str) -> pa.Table:
    return injection.shifted(table, name, SHIFT * injection.spread(table, name))


def _last(manifest: Manifest) -> dt.datetime:
    return manifest.as_of[-1] if manifest.as_of else manifest.created_at


def _aged(events: pa.Table, days: float) -> pa.Table:
    aged = _frame(events).with_columns(pl.col(EVENT) - dt.timedelta(days=days))
    return to_arrow(aged)


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
