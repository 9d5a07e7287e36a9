"""The two halves of the feature job, as each task runs them. Pure, but for the files they read and write.

The work is cut into slots: a slot is one bucket of one group. scatter: a unit of a source is read, judged,
completed by look-ups and split by entity. gather: the rows of a bucket of entities become features, joined to
their dimension rows. Then each part is scored and written. Rejected rows are written on the way, by the task that
read them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.engine.partition import split_by_key
from tasks.features.definitions import JoinHow
from tasks.features.history import evaluate_history
from tasks.features.kernel import join_dimension
from tasks.features.parts import (
    by_time,
    numeric_features,
    repeated_keys,
    sketches,
    stamped,
    to_arrow,
    write_rejected,
)
from tasks.features.plan import FeaturePlan, GroupPlan, LookupPlan, SourcePlan
from tasks.features.rows import REASON, TIME, JudgedRows, judge
from tasks.features.sources import RawRows, ReadUnit, read
from tasks.features.state import FILE, ROW, in_order, read_kept, write_kept
from tasks.features.tallies import BucketSummary, EventTally, Tally, UnitNote
from tasks.io.notation import suspects
from tasks.quality.profile import merge_profiles, profile_table
from tasks.store.conservation import check_equal
from tasks.store.layout import AS_OF
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation

LINE = "_line"
MALFORMED = "malformed_row"
JUDGED_ROWS = 65_536
"""Number of rows of small pieces that are judged at once."""


@dataclass(frozen=True, slots=True)
class Split:
    """Input of one task: some units of the events (group None), or of the dimension of a group.

    files: numbers of the events' files, one a unit; they are all new to the same groups.
    """

    source: SourcePlan
    group: int | None
    index: int
    units: tuple[ReadUnit, ...]
    files: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Job:
    """State shared by all tasks; stored once in the object store."""

    plan: FeaturePlan
    reservations: tuple[Reservation, ...]
    splits: tuple[Split, ...]
    buckets: int
    lookups: tuple[pl.DataFrame, ...]
    join: JoinHow
    created: dt.datetime

    @property
    def typed(self) -> tuple[int, ...]:
        """Numbers of the first split of each source: their frames give a bucket its columns, also without rows."""
        firsts: dict[int | None, int] = {}
        for index, split in enumerate(self.splits):
            firsts.setdefault(split.group, index)
        return tuple(firsts.values())

    def scatter(self, index: int) -> tuple[UnitNote, list[pl.DataFrame]]:
        """Read and judge one split and cut its rows by entity, for each group that reads them.

        Args:
            index: Number of the split.

        Returns:
            Counts, and one frame a slot.

        """
        split = self.splits[index]
        numbered = bool(self.plan.states) and split.group is None
        kept, tally, rejected = read_and_judge(split.source, *split.units, files=split.files if numbered else None)
        note = UnitNote(tally)
        if split.group is None:
            kept = looked_up(kept, self.plan.lookups, self.lookups)
        frames: list[pl.DataFrame] = []
        for number, planned in enumerate(self.plan.groups):
            rows = kept.clear()
            if split.group is None:
                rows = self._of_group(kept, planned)
                note.without_entity[number] = kept.height - rows.height
                if not self.reads(number, split):
                    rows = rows.clear()
            elif split.group == number:
                rows = kept
            frames += split_by_key(rows, planned.group.entity, self.buckets) if rows.height else [rows] * self.buckets
        if rejected is not None:
            for number in self._readers(split):
                entry = write_rejected(self.reservations[number], split.source.name, split.index, rejected)
                note.rejected_files[number] = entry
        return note, frames

    def reads(self, group: int, split: Split) -> bool:
        """Return True if a group takes the rows of a split of the events."""
        return split.group is None and self.plan.reads(group, split.files[0])

    def _readers(self, split: Split) -> list[int]:
        """Return the groups that a split is read for."""
        if split.group is not None:
            return [split.group]
        return [number for number in range(len(self.plan.groups)) if self.reads(number, split)]

    def _of_group(self, events: pl.DataFrame, planned: GroupPlan) -> pl.DataFrame:
        """Return a group's events: its columns, and only rows with its entity."""
        places = [FILE, ROW] if self.plan.states else []
        return events.select([*planned.columns, *places]).filter(pl.col(planned.group.entity).is_not_null())

    def gather(self, slot: int, frames: Mapping[int, pl.DataFrame]) -> tuple[BucketSummary, pa.Table]:
        """Compute the features of a bucket's entities, join their dimension rows, stamp and profile them."""
        number, part = divmod(slot, self.buckets)
        planned, reservation = self.plan.groups[number], self.reservations[number]
        events, counts = self._events(number, part, self._of(frames, None))
        features = snapshots_of(planned, events, self.plan.time, self.plan.as_of)
        entities = Tally(rows_in=entity_rows(events, planned.group.entity, self.plan.time, self.plan.as_of))
        check_equal(planned.group.name, entities.rows_in, features.height, "have events, {} got features")
        dimension = Tally()
        rejected_files: list[FileEntry] = []
        unmatched = 0
        if planned.dimension is not None:
            rows = pl.concat(self._of(frames, number))
            rows, conflicting = unique_dimension_rows(rows, planned.group.entity, dimension)
            joined = join_dimension(planned.group, features, rows, self.join)
            features, unmatched = joined.kept, joined.unmatched
            entities.rejected.update(joined.rejected[REASON].to_list())
            for name, rejected in ((f"{planned.dimension.name}-conflicts", conflicting), ("entities", joined.rejected)):
                if rejected.height:
                    rejected_files.append(write_rejected(reservation, name, part, rejected))
        entities.rows_out = features.height
        table = to_arrow(stamped(features, self.created, reservation.version))
        numbers = table.select([*numeric_features(table.schema, planned), AS_OF])
        profiles = [profile_table(piece.drop_columns([AS_OF])) for piece in by_time(numbers, self.plan.as_of)]
        several = len(self.plan.as_of) > 1
        summary = BucketSummary(
            group=number,
            events=counts,
            dimension=dimension,
            entities=entities,
            duplicate_keys=repeated_keys(features, planned.group.entity),
            suspects=self._suspects(planned, features),
            unmatched=unmatched,
            rejected_files=rejected_files,
            profile=merge_profiles(profiles),
            quantiles=[sketches(profile) for profile in profiles] if several else [],
        )
        return summary, table

    def _of(self, frames: Mapping[int, pl.DataFrame], group: int | None) -> list[pl.DataFrame]:
        """Return the frames from a group's dimension, or from the events (None)."""
        return [frame for index, frame in frames.items() if self.splits[index].group == group]

    def _suspects(self, planned: GroupPlan, features: pl.DataFrame) -> list[str]:
        """Return entities that look like missing values; a category may well be unknown."""
        entity = planned.group.entity
        is_key = any(column.name == entity and column.kind == "key" for column in self.plan.events.rows.columns)
        return suspects(features[entity]) if is_key else []

    def _events(self, number: int, part: int, arrived: list[pl.DataFrame]) -> tuple[pl.DataFrame, EventTally]:
        """Return the events of a bucket that count, in the files' order; an incremental run's new ones are kept."""
        planned, time = self.plan.groups[number], self.plan.time
        counts = EventTally(new=sum(frame.height for frame in arrived))
        if not self.plan.states:
            events = pl.concat(arrived)
            counts.newest = events[time].max()  # type: ignore[assignment]
            return events, counts
        state = self.plan.states[number]
        nothing = self._no_events(planned)
        new = pl.concat([nothing, *arrived])
        columns = {name: kind for name, kind in nothing.schema.items() if name != ROW or state.whole}
        kept = read_kept(state.links, part, self.buckets, planned.group.entity, columns)
        events = in_order([kept, new.select(list(columns))])
        to_write = events if state.whole else new
        if to_write.height:
            table = to_arrow(to_write.with_columns(pl.col(pl.Categorical).cast(pl.String)))
            counts.file = write_kept(table, self.reservations[number], part)
            counts.by_file.update(dict(to_write[FILE].value_counts().iter_rows()))
        counts.kept = kept.height
        last = self.plan.as_of[-1]
        counts.new_late, counts.kept_late = (int((frame[time] > last).sum()) for frame in (new, kept))
        events = events.filter(pl.col(time) <= last).select(planned.columns)
        counts.newest = events[time].max()  # type: ignore[assignment]
        return events, counts

    def _no_events(self, planned: GroupPlan) -> pl.DataFrame:
        """Return an empty frame of a group's events."""
        raw = pl.DataFrame(schema=dict.fromkeys(self.plan.events.rows.file_columns, pl.String))
        judged = judge(raw, self.plan.events.rows).kept
        placed = judged.with_columns(pl.lit(0, pl.Int32).alias(FILE), pl.lit(0, pl.Int64).alias(ROW))
        return self._of_group(looked_up(placed, self.plan.lookups, self.lookups), planned)


def looked_up(events: pl.DataFrame, lookups: Sequence[LookupPlan], tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Return events with the dimension columns that expressions over them use; null without a row."""
    for lookup, table in zip(lookups, tables, strict=True):
        events = events.join(table, on=lookup.key, how="left", maintain_order="left")
    return events


def snapshots_of(planned: GroupPlan, events: pl.DataFrame, time: str, as_of: Sequence[dt.datetime]) -> pl.DataFrame:
    """Return the features of whole entities as of each time, in order of the times, with a column of the time."""
    found = evaluate_history(planned.group, events, time, as_of)
    return pl.concat(
        frame.with_columns(pl.lit(moment, TIME).alias(AS_OF)) for frame, moment in zip(found, as_of, strict=True)
    )


def entity_rows(events: pl.DataFrame, entity: str, time: str, as_of: Sequence[dt.datetime]) -> int:
    """Return the number of rows that a bucket's events must give: one for each entity and time from its first event on.

    Args:
        events: Events of whole entities up to the last time.
        entity: Their key.
        time: Their time.
        as_of: Times, ascending.

    """
    if len(as_of) == 1:
        return events[entity].n_unique()
    first = events.group_by(entity).agg(pl.col(time).min())[time]
    return sum(int((first <= moment).sum()) for moment in as_of)


def read_and_judge(
    source: SourcePlan, *units: ReadUnit, files: Sequence[int] | None = None
) -> tuple[pl.DataFrame, Tally, pl.DataFrame | None]:
    """Read units of a source and judge their rows; return the kept ones, the counts, and the rejected ones or None.

    With the numbers of their files, the kept rows have them (`FILE`), and their number in the file (`ROW`).
    """
    tally = Tally()
    kept, rejected = [], []
    numbers: Sequence[int] | Sequence[None] = [None] * len(units) if files is None else files
    for pieces in _judged_together(units, numbers):
        frames = [piece.raw.frame for piece in pieces]
        judged = judge(pl.concat(frames), source.rows)
        starts = np.cumsum([0, *(frame.height for frame in frames)])
        kept.append(judged.kept if files is None else _placed(judged, pieces))
        tally.rows_in += int(starts[-1])
        tally.rows_out += judged.kept.height
        tally.filtered.update(judged.filtered)
        if judged.rejected.height:
            tally.rejected.update(judged.rejected[REASON].to_list())
            rows = judged.rejected_rows.to_numpy()
            which = np.searchsorted(starts, rows, side="right") - 1
            firsts = np.array([piece.raw.first_row for piece in pieces])
            places = pl.Series(FILE, [pieces[number].unit.uri for number in which], pl.String)
            numbered = pl.Series(ROW, rows - starts[which] + firsts[which], pl.Int64)
            rejected.append(judged.rejected.with_columns(places, numbered))
        for piece in pieces:
            if lines := list(piece.raw.malformed):
                tally.rows_in += len(lines)
                tally.rejected[MALFORMED] += len(lines)
                bad = pl.DataFrame({LINE: lines}, schema={LINE: pl.String})
                rejected.append(bad.with_columns(pl.lit(MALFORMED).alias(REASON), pl.lit(piece.unit.uri).alias(FILE)))
    return pl.concat(kept), tally, pl.concat(rejected, how="diagonal_relaxed") if rejected else None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Unchanged rows of a file, with its number if requested."""

    unit: ReadUnit
    file: int | None
    raw: RawRows


def _judged_together(units: Sequence[ReadUnit], files: Sequence[int] | Sequence[None]) -> Iterator[list[_Piece]]:
    """Yield pieces of units, small ones of equal types together, as a judgement takes 2 ms for any number of rows."""
    found = (_Piece(unit, file, raw) for unit, file in zip(units, files, strict=True) for raw in read(unit))
    # An empty file, too, has typed columns.
    first = next(found, _Piece(units[0], files[0], RawRows(_no_rows(units[0]), 0)))
    held, rows = [first], first.raw.frame.height
    for piece in found:
        if rows + piece.raw.frame.height > JUDGED_ROWS or piece.raw.frame.schema != first.raw.frame.schema:
            yield held
            first, held, rows = piece, [], 0
        held.append(piece)
        rows += piece.raw.frame.height
    yield held


def _placed(judged: JudgedRows, pieces: Sequence[_Piece]) -> pl.DataFrame:
    """Return the kept rows with their file and row; nothing may have been filtered."""
    heights = [piece.raw.frame.height for piece in pieces]
    files = np.repeat(np.array([piece.file for piece in pieces], np.int32), heights)
    firsts = [np.arange(piece.raw.first_row, piece.raw.first_row + piece.raw.frame.height) for piece in pieces]
    bad = judged.rejected_rows.to_numpy()
    return judged.kept.with_columns(
        pl.Series(FILE, np.delete(files, bad), pl.Int32),
        pl.Series(ROW, np.delete(np.concatenate(firsts), bad), pl.Int64),
    )


def _no_rows(unit: ReadUnit) -> pl.DataFrame:
    return pl.DataFrame(schema=dict.fromkeys(unit.columns, pl.String))


def unique_dimension_rows(rows: pl.DataFrame, key: str, tally: Tally) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return one row a key: copies of a row are dropped, of rows that contradict each other the first is kept.

    Args:
        rows: Dimension rows in the order of the files.
        key: Key column.
        tally: Receives the counts: rows_in, rows_out, deduplicated.

    Returns:
        The rows to join, and the contradicting ones with `_reason`.

    """
    distinct = rows.unique(maintain_order=True)
    first = distinct[key].is_first_distinct()
    conflicting = distinct.filter(~first).with_columns(pl.lit(f"conflicting_{key}").alias(REASON))
    kept = distinct.filter(first)
    tally.rows_in, tally.rows_out = rows.height, kept.height
    tally.deduplicated = rows.height - distinct.height
    tally.rejected.update(conflicting[REASON].to_list())
    return kept, conflicting
