"""Fault tests of a feature group, in a sample of the version's rows. Pure, but for the reading.

keys, times ─ judge ─ tally ─┐                the same functions as in the job, on a few thousand rows:
features ─ join ─ score ─ profile ─ gate      an entity's event is its key and the newest event's time
dimension ─ unique ─┘
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import FeatureGroup
from tasks.features.gate import GroupFigures, judge_group
from tasks.features.kernel import join_dimension
from tasks.features.keys import KeyType
from tasks.features.rows import REASON, TIME, ColumnPlan, RowPlan
from tasks.features.rows import judge as judge_rows
from tasks.features.shuffle import Tally, unique_dimension_rows
from tasks.features.writer import fences, repeated_keys, score_rows, to_arrow
from tasks.quality import faults
from tasks.quality.faults import MOST_FEATURES, NULLS, Faults, Sample, Trial, sample_rows
from tasks.quality.profile import profile_table
from tasks.store import layout
from tasks.store.layout import AS_OF, CREATED, FEATURES, READY, VERSION
from tasks.store.manifest import Manifest, RowBalance

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
    uri = layout.version_uri(root, manifest.dataset, manifest.version)
    names = [group.entity, *columns, AS_OF, CREATED, VERSION]
    joined = any(balance.name == group.dimension for balance in manifest.balances)
    return _Trial(
        sample=_Rows(table=sample_rows([layout.join(uri, file.path) for file in manifest.files], names, group.entity)),
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
