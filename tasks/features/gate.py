"""The quality gate of a feature group, and its fault tests. Pure, but for reading the sample.

The fault tests run the job's functions on a sample of the version's rows:

keys, times ─ judge ─ tally ─┐                the same functions as in the job, on a few thousand rows:
features ─ join ─ score ─ profile ─ gate      an entity's event is its key and the newest event's time
dimension ─ unique ─┘
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.definitions import FeatureGroup
from tasks.features.kernel import join_dimension
from tasks.features.rows import AFTER_AS_OF, REASON, TIME, ColumnPlan, KeyType, RowPlan
from tasks.features.rows import judge as judge_rows
from tasks.features.shuffle import Tally, unique_dimension_rows
from tasks.features.writer import fences, repeated_keys, score_rows, to_arrow
from tasks.quality import faults, rules
from tasks.quality.faults import MOST_FEATURES, NULLS, Faults, Sample, Trial, sample_rows
from tasks.quality.profile import TableProfile, profile_table
from tasks.quality.rules import Figures
from tasks.store.layout import AS_OF, CREATED, FEATURES, OUTLYING, READY, VERSION
from tasks.store.manifest import CheckResult, ColumnProfile, GateResult, Manifest, RowBalance

NEVER_STALE = float("inf")
TAKEN_FOR_FINER = dt.datetime(1970, 3, 1, tzinfo=dt.UTC)
"""Today's counts in a unit a thousand times coarser than assumed are all before this time."""


@dataclass(frozen=True, kw_only=True)
class GroupFigures(Figures):
    """Figures of a feature group; the balance of the entities is the last.

    Attributes:
        group: The declaration.
        features: Columns that count as features: the group's and its dimension's.
        duplicate_keys: Rows with the entity key of another row.
        unmatched: Entities without a dimension row, once for each as-of time with features.
        ready: Training-ready rows.
        newest_event: Time of the newest event that counted.
        as_of: Time up to which events count, the last of them.
        times: All times that the version holds.
        suspects: Keys that look like missing values.
        drift: Drift of the columns of whose profile no sketch is left, against the version `compared`.
    """

    group: FeatureGroup
    features: tuple[str, ...]
    duplicate_keys: int
    unmatched: int
    ready: int
    newest_event: dt.datetime | None
    as_of: dt.datetime
    times: tuple[dt.datetime, ...] = ()
    suspects: tuple[str, ...] = ()
    drift: Mapping[str, CheckResult] = field(default_factory=dict)
    compared: int | None = None


def judge_group(config: FeatureStoreConfig, figures: GroupFigures, previous: Manifest | None) -> GateResult:
    """Judge the written files of a group by its thresholds and the last published version, if there is one."""
    bounds, group, schema, features = config.thresholds, figures.group, figures.schema, figures.features
    profile, balances, as_of = figures.profile, figures.balances, figures.as_of
    columns = profile.columns()
    entities = balances[-1]
    checks: list[CheckResult] = [rules.check_rows(profile.rows, 1)]
    types = {field.name: str(field.type) for field in schema}
    checks += rules.check_schema(types, _expected_types(group, types, features, previous, config))
    checks.append(rules.check_unique(group.entity, figures.duplicate_keys))
    if figures.suspects:
        checks.append(_missing_keys(group.entity, figures.suspects))
    checks += [rules.check_balance(balance) for balance in balances]
    checks += [
        rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail) for balance in balances[:-1]
    ]
    if any(balance.name == group.dimension for balance in balances[:-1]):
        found, asked = figures.unmatched, entities.rows_in
        checks.append(rules.check_reference(group.entity, found, asked, bounds.orphan_warn, bounds.orphan_fail))
    for name in features:
        checks.append(rules.check_nulls(name, columns[name], bounds.null_warn, bounds.null_fail))
        if pa.types.is_floating(schema.field(name).type):
            checks.append(rules.check_finite(name, columns[name]))
    checks += [
        rules.check_range(name, columns[name], minimum, maximum)
        for name, (minimum, maximum) in group.bounds.items()
        if name in columns  # a missing one fails the schema
    ]
    checks += _event_times(balances[0], figures.newest_event, as_of, config)
    checks.append(_outliers(columns, features, profile.rows, config))
    checks.append(rules.check_ready_share(figures.ready, profile.rows, bounds.ready_warn, bounds.ready_fail))
    if bounds.fresh_warn_days is not None or bounds.fresh_fail_days is not None:
        fail_after = bounds.fresh_fail_days or NEVER_STALE
        warn_after = bounds.fresh_warn_days or fail_after
        checks.append(rules.check_freshness(figures.newest_event, as_of, warn_after, fail_after))
    if previous is not None and (other := _incomparable(figures.times, previous)):
        checks.append(other)
    elif previous is not None:
        assert not figures.drift or figures.compared == previous.version, "drift is against another version"
        checks += [
            figures.drift.get(name) or check_drift(name, profile, previous.profile[name], bounds)
            for name in features
            if name in previous.profile
        ]
    return rules.gate(checks)


def check_drift(name: str, now: TableProfile, before: ColumnProfile, bounds: Thresholds) -> CheckResult:
    """Check a feature's drift from an earlier version by the configured bounds."""
    return rules.check_drift(name, now, before, warn_above=bounds.drift_warn, fail_above=bounds.drift_fail)


def _event_times(
    events: RowBalance, newest: dt.datetime | None, as_of: dt.datetime, config: FeatureStoreConfig
) -> list[CheckResult]:
    """Return a result on event times that a wrong unit or zone has shifted; nothing if they may be right."""
    late = events.filtered.get(AFTER_AS_OF, 0)
    if late and not events.rows_out:
        message = (
            f"All {late} events lie after {as_of:%Y-%m-%d %H:%M} UTC: give a later --as-of, or look at --epoch-unit "
            f"and --timezone."
        )
    elif config.epoch_unit not in (None, "s") and newest is not None and newest < TAKEN_FOR_FINER:
        message = (
            f"The newest event is of {newest:%Y-%m-%d}: counts of a coarser unit, such as seconds, seem to be taken "
            f"for {config.epoch_unit}; give another --epoch-unit."
        )
    else:
        return []
    return [CheckResult(name="event times", verdict="fail", bound="up to as_of, and plausible", message=message)]


def _missing_keys(entity: str, suspects: Sequence[str]) -> CheckResult:
    told = ", ".join(map(repr, suspects))
    message = (
        f"{entity} {told} looks like a missing value: if it is one, make it null in the source, or for CSV name it: "
        f"--null-values={','.join(suspects)} (which takes the place of the default ones)."
    )
    return CheckResult(name="missing keys", column=entity, verdict="warn", bound="no such key", message=message)


def _incomparable(times: Sequence[dt.datetime], previous: Manifest) -> CheckResult | None:
    """Return why drift against the last version is meaningless; None if it is meaningful.

    Features over all events grow with time: a history, or a day of the past, differs from today's snapshot by nature.
    """
    before = previous.as_of
    if not times or not before or (len(times) == len(before) and times[-1] >= before[-1]):
        return None
    held = [f"{len(some)} as-of times up to {some[-1].date()}" for some in (times, before)]
    message = f"Drift isn't judged: this version holds {held[0]}, v{previous.version} {held[1]}."
    return CheckResult(name="drift", verdict="pass", bound="versions of like as-of times", message=message)


def _expected_types(
    group: FeatureGroup,
    found: Mapping[str, str],
    features: Sequence[str],
    previous: Manifest | None,
    config: FeatureStoreConfig,
) -> dict[str, str]:
    """Return the expected columns: the declared ones, and those of the last version with their types."""
    names = dict.fromkeys([group.entity, *group.feature_names, *features, *FEATURES])
    types = {name: found.get(name, "any type") for name in names}
    if previous is not None and not config.allow_schema_change:
        types |= {column.name: column.type for column in previous.columns}
    return types


def _outliers(
    columns: dict[str, ColumnProfile], features: Sequence[str], rows: int, config: FeatureStoreConfig
) -> CheckResult:
    numeric = sum(columns[name].kind == "numeric" for name in features)
    values = rows * numeric
    outliers = round((columns[OUTLYING].mean or 0.0) * values)
    bounds = config.thresholds
    return rules.check_outlier_share("all numeric features", outliers, values, bounds.outlier_warn, bounds.outlier_fail)


ORPHANS, OUTLIERS = 0.95, 0.2
EVENT = "_event_time"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows(Sample):
    """Rows of a version. orphaned: share of the dimension's rows that are missing. days: added to the events' age."""

    orphaned: float = 0.0
    days: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Trial(Trial[_Rows]):
    group: FeatureGroup
    manifest: Manifest
    dimension: tuple[str, ...] | None
    """Columns of the group's dimension in the sample; None without a dimension."""

    def figures(self, rows: _Rows) -> GroupFigures:
        group, frame, unmatched = self.group, pl.DataFrame(rows.table), 0
        as_of = self.manifest.as_of[-1] if self.manifest.as_of else self.manifest.created_at
        newest = self.manifest.definition.get("newest_event")
        moment = (dt.datetime.fromisoformat(newest) if newest else as_of) - dt.timedelta(days=rows.days)
        events = frame.select(group.entity, pl.lit(moment, TIME).alias(EVENT))
        read, balance = judge_events(events, group.source, rows.bad, required=True, as_of=as_of)
        balances, entities = [balance], Tally(rows_in=frame.height)
        if self.dimension is not None:
            found = pl.any_horizontal(pl.lit(not self.dimension), pl.col(self.dimension).is_not_null())
            known = frame.filter(found).select(group.entity, *self.dimension).unique(maintain_order=True)
            known = known.filter(pl.Series(~faults.some(known.height, rows.orphaned)))
            tally = Tally()
            kept, _ = unique_dimension_rows(known, group.entity, tally)
            joined = join_dimension(group, frame.drop(self.dimension), kept, self.config.join)
            frame, unmatched = joined.kept, joined.unmatched
            entities.rejected.update(joined.rejected[REASON].to_list())
            balances.append(tally.balance(str(group.dimension)))
        frame = frame.filter(pl.Series(~faults.some(frame.height, rows.lost)))
        entities.rows_out = frame.height
        features = [name for name in frame.columns if name in {*self.features, *(self.dimension or ())}]
        scored = self._scored(frame, features)
        table = to_arrow(scored)
        latest: Any = read[EVENT].max()
        return GroupFigures(
            group=group,
            schema=table.schema,
            features=tuple(features),
            profile=profile_table(table),
            balances=(*balances, entities.balance(group.name)),
            duplicate_keys=repeated_keys(scored, group.entity),
            unmatched=unmatched,
            ready=int(scored[READY].sum()),
            newest_event=latest if newest else None,
            as_of=as_of,
            times=self.manifest.as_of,
        )

    def _scored(self, frame: pl.DataFrame, features: list[str]) -> pl.DataFrame:
        """Add the rows' quality, by the fences of their as-of time."""
        bounds, scored = self.config.thresholds, []
        for rows in frame.partition_by(AS_OF, maintain_order=True) if frame.height else [frame]:
            numbers = to_arrow(rows.select(name for name in features if rows.schema[name].is_numeric()))
            usual = fences(numbers.column_names, profile_table(numbers).quantiles)
            limits = {"missing_below": bounds.missing, "outliers_below": bounds.outliers, "score_above": bounds.score}
            scored.append(score_rows(rows, features, usual, **limits))
        return pl.concat(scored)

    def faults(self) -> Faults:
        group, bounds = self.group, self.config.thresholds
        yield self.no_rows()
        yield self.duplicates(f"unique of {group.entity}")
        yield self.lost_rows(group.name)
        yield self.bad_rows("bad events", f"the {group.source} lost their time", group.source)
        words = f"{ORPHANS:.0%} of the dimension's rows were taken away."
        why_not = "The group has no dimension table." if self.dimension is None else ""
        yield self.fault("orphans", words, f"reference of {group.entity}", why_not, orphaned=ORPHANS)
        yield self.schema(next((name for name in self.features if name not in group.bounds), self.first))
        yield self.nulls()
        yield self.not_finite()
        bounded, beyond = self._beyond()
        why_not = "The group declares no bounds of its numbers."
        yield self.out_of_range("range", f"range of {bounded}", bounded, beyond, why_not)
        yield self.shift("drift")
        # The share of outliers is over all numbers, including the dimension's.
        others = [name for name in self.dimension or () if faults.is_number(self.table.schema.field(name).type)]
        numbers = [*self.numbers, *others]
        words = f"{OUTLIERS:.0%} of the entities had all their numbers moved by 100 standard deviations."
        why_not = "" if numbers else "No feature is a number."
        yield self.fault("outliers", words, "outliers", why_not, table=self._far(numbers))
        words = f"All of the group's features were made null in {NULLS:.0%} of the rows."
        table = faults.with_values(self.table, self.features, None, NULLS)
        yield self.fault("unready rows", words, "ready", table=table)
        days = 10 * max(bounds.fresh_warn_days or 0, bounds.fresh_fail_days or 0)
        words = f"Every event was moved back by {days:g} days, ten times the bound." if days else "Events were aged."
        why_not = "No bound of the newest event's age is configured (fresh_warn_days, fresh_fail_days)."
        yield self.fault("stale", words, "freshness", "" if days else why_not, days=days)

    def _far(self, numbers: list[str]) -> pa.Table:
        """Move the numbers of some entities far away."""
        keys = self.table[self.group.entity]
        chosen = keys.unique().filter(pa.array(faults.some(len(keys.unique()), OUTLIERS)))
        table, hit = self.table, pc.is_in(keys, chosen).to_numpy()
        for name in numbers:
            table = faults.shifted(table, name, 100 * (faults.spread(table, name) or 1.0), hit)
        return table

    def _beyond(self) -> tuple[str, float]:
        """Return the first bounded number, and a value outside its bounds; no name without any."""
        for name, (low, high) in self.group.bounds.items():
            if name in self.numbers and high is not None:
                return name, math.ceil(high + abs(high) + 1)
            if name in self.numbers and low is not None:
                return name, math.floor(low - abs(low) - 1)
        return "", 0.0


def trial(root: str, manifest: Manifest, config: FeatureStoreConfig, previous: Manifest | None) -> Trial[_Rows]:
    """Sample a version's rows.

    Drift and types are compared with the sample as it is; their comparability, with the last version.
    """
    group, columns = _sampled_group(manifest)
    names = [group.entity, *columns, AS_OF, CREATED, VERSION]
    joined = any(balance.name == group.dimension for balance in manifest.balances)
    return _Trial(
        sample=_Rows(
            table=sample_rows([manifest.uri(root, file.path) for file in manifest.files], names, group.entity)
        ),
        features=tuple(name for name in columns if name in group.feature_names),
        before=previous or manifest,
        group=group,
        config=config,
        gate=judge_group,
        manifest=manifest,
        dimension=tuple(name for name in columns if name not in group.feature_names) if joined else None,
    )


def _sampled_group(manifest: Manifest) -> tuple[FeatureGroup, tuple[str, ...]]:
    """Return the group as far as the gate uses it, and its columns in the sample: those with bounds, and the first."""
    definition = manifest.definition
    own = [*definition["features"]]
    own += [f"{name}_{window['days']}d" for window in definition["windows"] for name in window["features"]]
    own += definition["derived"]
    stamps = {definition["entity"], *FEATURES}
    known = [column.name for column in manifest.columns if column.name not in stamps]
    wanted = set([*definition["bounds"], *known][:MOST_FEATURES])
    columns = tuple(name for name in known if name in wanted)
    same = {name: definition[name] for name in ("name", "entity", "source", "dimension")}
    bounds = {name: tuple(bounds) for name, bounds in definition["bounds"].items() if name in wanted}
    return FeatureGroup(features={name: pl.lit(None) for name in own if name in wanted}, bounds=bounds, **same), columns


def judge_events(
    events: pl.DataFrame, source: str, bad: float, *, required: bool, as_of: dt.datetime | None = None
) -> tuple[pl.DataFrame, RowBalance]:
    """Judge events, a key and a time each, as the job does; the times of a share (`bad`) are removed before.

    `required` rejects events without a key, too; those after `as_of` are left out.
    """
    key, time = events.columns
    raw = events.with_columns(pl.when(~pl.Series(faults.some(events.height, bad))).then(pl.col(time)).alias(time))
    of_key: KeyType = "int64" if events.schema[key].is_integer() else "string"
    columns = (
        ColumnPlan(name=key, source_name=key, kind="key", required=required, key_type=of_key),
        ColumnPlan(name=time, source_name=time, kind="time", required=True),
    )
    judged = judge_rows(raw, RowPlan(source=source, columns=columns, time=time, as_of=as_of))
    tally = Tally(rows_in=events.height, rows_out=judged.kept.height)
    tally.rejected.update(judged.rejected[REASON].to_list())
    tally.filtered.update(judged.filtered)
    return judged.kept, tally.balance(source)
