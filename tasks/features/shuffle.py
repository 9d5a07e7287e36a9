"""Both sides of the feature job's shuffle, as each task runs them. Pure, but for the files they read and write.

A task writes one bucket of one group. scatter: a unit of a source is read, judged, completed by look-ups and split by
entity. gather: the rows of a bucket of entities become features, joined to their dimension rows. Then each bucket is
scored and written. Rejected rows are written on the way, by the task that read them.

Look-up dimensions are read once, in the driver, and given to every task, so they fit in memory. Each task reports its
counts (`UnitNote`, `BucketSummary`): small values that add up.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.engine.partition import split_by_key
from tasks.features.definitions import JoinHow
from tasks.features.incremental import FILE, ROW, in_order, read_kept, write_kept
from tasks.features.kernel import evaluate_history, join_dimension
from tasks.features.plan import FeaturePlan, GroupPlan, LookupPlan, SourcePlan
from tasks.features.rows import REASON, TIME, JudgedRows, judge
from tasks.features.sources import RawRows, ReadUnit, read
from tasks.features.writer import numeric_features, repeated_keys, stamped, to_arrow, write_rejected
from tasks.io.notation import suspects
from tasks.store.layout import AS_OF
from tasks.store.manifest import FileEntry, RowBalance, check_equal
from tasks.store.reservation import Reservation


@dataclass(slots=True)
class Tally:
    """Row counts of one source in one unit; adds up over units."""

    rows_in: int = 0
    rows_out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    deduplicated: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of another."""
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        self.rejected += other.rejected
        self.filtered += other.filtered
        self.deduplicated += other.deduplicated

    def pass_on(self, later: Tally) -> None:
        """Add the later treatment of the kept rows."""
        self.rows_out = later.rows_out
        self.rejected += later.rejected
        self.filtered += later.filtered
        self.deduplicated += later.deduplicated

    def balance(self, name: str) -> RowBalance:
        """Return the counts in the manifest's form."""
        return RowBalance(
            name=name,
            rows_in=self.rows_in,
            rows_out=self.rows_out,
            rejected=dict(sorted(self.rejected.items())),
            filtered=dict(sorted(self.filtered.items())),
            deduplicated=self.deduplicated,
        )


@dataclass(slots=True)
class UnitNote:
    """Report of a scatter task: its source's tally, and by group the rows without entity and the rejected file."""

    tally: Tally
    without_entity: dict[int, int] = field(default_factory=dict)
    rejected_files: dict[int, FileEntry] = field(default_factory=dict)


@dataclass(slots=True)
class EventTally:
    """Events of a bucket: those read and, in an incremental run, those kept by earlier versions.

    new_late, kept_late: of these, after the last as-of time, so that they don't count (a run that isn't incremental
    has filtered them before). newest: time of the newest that counts. file: file of the new kept ones; by_file:
    their number by the number of their source file.
    """

    new: int = 0
    new_late: int = 0
    kept: int = 0
    kept_late: int = 0
    newest: dt.datetime | None = None
    file: FileEntry | None = None
    by_file: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class BucketSummary:
    """Report of a gather task on its bucket; entities are counted once for each as-of time.

    suspects: keys that look like missing values. numeric: names of the features with quantiles.
    """

    group: int
    events: EventTally
    dimension: Tally
    entities: Tally
    duplicate_keys: int
    suspects: list[str]
    unmatched: int
    rejected_files: list[FileEntry]
    numeric: tuple[str, ...]


def check_rows_read(source: SourcePlan, units: Sequence[ReadUnit], tally: Tally) -> None:
    """Compare the number of read rows with the files' footers; for a CSV file with the count from its cutting.

    The rows of uncut CSV files aren't counted before.

    Raises:
        BalanceError: they differ.
    """
    if all(unit.format == "parquet" or unit.piece is not None for unit in units):
        said = sum(unit.rows for unit in units)
        check_equal(source.name, said, tally.rows_in, "stand in the files, {} were read")


def check_way(name: str, sent: int, carried: int, taken: int) -> None:
    """Compare the rows sent to the buckets, those carried there by the shuffle, and those taken from it.

    Raises:
        BalanceError: they differ.
    """
    check_equal(name, sent, carried, "were sent to their buckets, {} were carried there")
    check_equal(name, carried, taken, "were carried to their buckets, {} were taken there")


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
        """Compute the features of a bucket's entities, join their dimension rows and stamp them."""
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
        summary = BucketSummary(
            group=number,
            events=counts,
            dimension=dimension,
            entities=entities,
            duplicate_keys=repeated_keys(features, planned.group.entity),
            suspects=self._suspects(planned, features),
            unmatched=unmatched,
            rejected_files=rejected_files,
            numeric=tuple(numeric_features(table.schema, planned)),
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
    snapshots = evaluate_history(planned.group, events, time, as_of)
    return pl.concat(
        frame.with_columns(pl.lit(moment, TIME).alias(AS_OF)) for frame, moment in zip(snapshots, as_of, strict=True)
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
    pieces = (_Piece(unit, file, raw) for unit, file in zip(units, files, strict=True) for raw in read(unit))
    # An empty file, too, has typed columns.
    first = next(pieces, _Piece(units[0], files[0], RawRows(_no_rows(units[0]), 0)))
    held, rows = [first], first.raw.frame.height
    for piece in pieces:
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


@dataclass(frozen=True, slots=True)
class LookedUp:
    """A dimension by key: the rows to join to events, and the counts of the others.

    rejected: frames of rejected rows with their reason, each with the name of its file.
    """

    plan: LookupPlan
    rows: pl.DataFrame
    balance: RowBalance
    rejected: tuple[tuple[str, int, pl.DataFrame], ...]

    def write_rejected(self, reservation: Reservation) -> list[FileEntry]:
        """Write the rejected rows beside a version that was made with this dimension."""
        return [write_rejected(reservation, name, index, frame) for name, index, frame in self.rejected]


def read_lookup(plan: LookupPlan, rows_per_unit: int) -> LookedUp:
    """Read a dimension and return one row a key.

    Raises:
        SourceError: a file can't be read.
        BalanceError: rows were lost.
    """
    source = plan.dimension
    tally, kept = Tally(), Tally()
    frames, rejected = [], []
    units = source.units(rows_per_unit)
    for index, unit in enumerate(units):
        rows, own, bad = read_and_judge(source, unit)
        frames.append(rows)
        tally.add(own)
        if bad is not None:
            rejected.append((source.name, index, bad))
    check_rows_read(source, units, tally)
    unique, conflicting = unique_dimension_rows(pl.concat(frames), plan.key, kept)
    if conflicting.height:
        rejected.append((f"{source.name}-conflicts", 0, conflicting))
    tally.pass_on(kept)
    balance = tally.balance(source.name)
    balance.check()
    return LookedUp(plan, unique, balance, tuple(rejected))


def categorised(plan: FeaturePlan, lookup: LookedUp) -> pl.DataFrame:
    """Return the rows to join to the events of a plan; columns that are categories in the events become categories."""
    categories = {column.name for column in plan.events.rows.columns if column.kind == "category"}
    names = [name for name in lookup.plan.columns if name in categories]
    return lookup.rows.with_columns(pl.col(name).cast(pl.Categorical) for name in names)


def lookup_tables(plan: FeaturePlan) -> tuple[pl.DataFrame, ...]:
    """Return the rows of all look-up dimensions of a plan, in the form for its tasks."""
    return tuple(categorised(plan, read_lookup(lookup, plan.rows_per_bucket)) for lookup in plan.lookups)
