"""Profiles of the numeric features over all buckets, merged in tasks: what is left of a column is small. Pure.

    table of a bucket ─ profile each column ─ shuffle by column and as-of time ─ merge ─ figures, fences, drift

A column's sketches take half a megabyte, at each as-of time and in each bucket, so no process gathers those of all.
"""

from __future__ import annotations

import datetime as dt
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import pyarrow as pa

from tasks.features.config import Thresholds
from tasks.features.gate import check_drift
from tasks.features.writer import Fences, by_time, fences, fences_of
from tasks.quality.profile import ColumnPartial, TableProfile, merge_profiles, profile_table
from tasks.quality.sketch import CAPACITY, DistinctSketch, QuantileSketch
from tasks.store.layout import AS_OF
from tasks.store.manifest import CheckResult, ColumnProfile

AT_ONCE = 16
"""Profiles of a column, one a bucket, that a task holds in memory."""

_PROFILE = "profile"
_COLUMNS = pa.schema([(_PROFILE, pa.large_binary())])


@dataclass(frozen=True, slots=True)
class ColumnFigures:
    """Figures of a column over the whole version.

    partial: without sketches; None for a single as-of time of several. fences: of the column, if it has some.
    drift: from the last version, if that has the column.
    """

    partial: ColumnPartial | None
    fences: Fences | None
    drift: CheckResult | None = None


@dataclass(frozen=True, slots=True)
class Profiling:
    """The work: buckets of groups are profiled, and a slot each merges a column, or a column at one of several times.

    Attributes:
        buckets: Buckets of each group.
        columns: Numeric features of each group.
        as_of: Times.
        before: Profiles of the columns in the last version of each group; none without one.
        thresholds: Bounds of drift.
    """

    buckets: int
    columns: tuple[tuple[str, ...], ...]
    as_of: tuple[dt.datetime, ...]
    before: tuple[Mapping[str, ColumnProfile], ...]
    thresholds: Thresholds

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self._width * sum(map(len, self.columns))

    @property
    def _width(self) -> int:
        """Slots a column: one for all of its rows, and one a time if there are several."""
        return 1 + (len(self.as_of) if len(self.as_of) > 1 else 0)

    @property
    def _firsts(self) -> list[int]:
        """First slot of each group."""
        return [self._width * count for count in accumulate(map(len, self.columns), initial=0)]

    def volume(self, rows: Sequence[int]) -> int:
        """Return about how many bytes the profiles take.

        Args:
            rows: Rows of each bucket.
        """
        times, value, total = len(self.as_of), 17, 0
        for part, count in enumerate(rows):
            of_times = min(count, times * CAPACITY) if times > 1 else 0
            own = (min(count, CAPACITY) + of_times) * value + min(count, DistinctSketch.k) * 8
            total += own * len(self.columns[part // self.buckets])
        return total

    def scatter(self, part: int, table: pa.Table) -> tuple[None, list[pa.Table]]:
        """Profile the columns of a bucket's table, one frame a slot."""
        group = part // self.buckets
        columns, slot = self.columns[group], self._firsts[group]
        pieces = by_time(table.select([*columns, AS_OF]), self.as_of)
        profiles = [profile_table(piece.drop_columns([AS_OF])) for piece in pieces]
        whole = merge_profiles(profiles)
        nothing = _COLUMNS.empty_table()  # imports pandas
        frames = [nothing] * self.slots
        for name in columns:
            frames[slot] = _packed(TableProfile(whole.rows, {name: whole.partials[name]}))
            if len(profiles) > 1:
                for place, sketch in enumerate((profile.sketch(name) for profile in profiles), slot + 1):
                    frames[place] = _packed(sketch) if sketch.count else nothing
            slot += self._width
        return None, frames

    def gather(self, slot: int, frames: Mapping[int, pa.Table]) -> tuple[ColumnFigures, pa.Table]:
        """Merge the profiles of a slot; return their figures, and no rows."""
        # `scatter` of our own tasks made it a moment ago.
        values = (pickle.loads(value.as_py()) for frame in frames.values() for value in frame[_PROFILE])  # noqa: S301
        group, name, moment = self._meaning(slot)
        if moment is not None:
            sketch = QuantileSketch.merge_all([])
            while some := list(islice(values, AT_ONCE)):
                sketch = QuantileSketch.merge_all([sketch, *some])
            return ColumnFigures(None, fences_of({name: sketch}).get(name)), pa.table({})
        whole: TableProfile | None = None
        while some := list(islice(values, AT_ONCE)):
            whole = merge_profiles([*filter(None, [whole]), *some])
        assert whole is not None, "each bucket has a profile of each column"
        before = self.before[group].get(name)
        drift = check_drift(name, whole, before, self.thresholds) if before is not None else None
        found = fences([name], whole.quantiles).get(name)
        return ColumnFigures(whole.partials[name].without_sketches(), found, drift), pa.table({})

    def of_group(self, group: int, figures: Sequence[ColumnFigures]) -> GroupProfile:
        """Return a group's share of the figures of all slots."""
        first, end = self._firsts[group : group + 2]
        profile, bounds, drift = {}, {moment: dict[str, Fences]() for moment in self.as_of}, {}
        for slot in range(first, end):
            _, name, moment = self._meaning(slot)
            own = figures[slot]
            if own.partial is not None:
                profile[name] = own.partial
            if own.drift is not None:
                drift[name] = own.drift
            if own.fences is not None and (moment is not None or self._width == 1):
                bounds[moment or self.as_of[0]][name] = own.fences
        return GroupProfile(profile, bounds, drift)

    def _meaning(self, slot: int) -> tuple[int, str, dt.datetime | None]:
        """Return a slot's group and column, and its time unless it is all of them."""
        group = next(group for group, end in enumerate(self._firsts[1:]) if slot < end)
        column, place = divmod(slot - self._firsts[group], self._width)
        return group, self.columns[group][column], self.as_of[place - 1] if place else None


@dataclass(frozen=True, slots=True)
class GroupProfile:
    """The numeric features of a group: their profile without sketches, fences of each time, and drift."""

    partials: dict[str, ColumnPartial]
    fences: Mapping[dt.datetime, Mapping[str, Fences]]
    drift: Mapping[str, CheckResult]


def _packed(value: object) -> pa.Table:
    return pa.table([pa.array([pickle.dumps(value)], pa.large_binary())], _COLUMNS)
