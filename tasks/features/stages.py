"""The two halves of the feature job, as each task runs them. Pure, but for the files they read and write.

The work is cut into slots: a slot is one bucket of one group. scatter: a unit of a source is read, judged,
completed by look-ups and split by entity. gather: the rows of a bucket of entities become features, joined to
their dimension rows. Then each part is scored and written. Rejected rows are written on the way, by the task that
met them.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa

from tasks.core import storage
from tasks.core.manifest import FileEntry, RowBalance
from tasks.core.partition import split_by_key
from tasks.core.profile import TableProfile, profile_table
from tasks.core.reservation import Reservation
from tasks.features.config import Thresholds
from tasks.features.definitions import AS_OF, JoinHow
from tasks.features.kernel import evaluate, join_dimension
from tasks.features.plan import FeaturePlan, GroupPlan, SourcePlan
from tasks.features.rows import REASON, TIME, judge
from tasks.features.scoring import Fences, score_rows
from tasks.features.sources import ReadUnit, read

FILE, ROW, LINE = "_file", "_row", "_line"
CREATED, VERSION = "feature_creation_date", "feature_version"
MALFORMED = "malformed_row"
PART = "\x00part"
_NUMERIC = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal)


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

    def balance(self, name: str) -> RowBalance:
        """The counts as the manifest keeps them."""
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
    """What a scatter task reports: its source's tally, and by group the rows without entity and the rejected file."""

    tally: Tally
    without_entity: dict[int, int] = field(default_factory=dict)
    rejected_files: dict[int, FileEntry] = field(default_factory=dict)
    newest: dt.datetime | None = None


@dataclass(slots=True)
class BucketSummary:
    """What a gather task reports of its bucket."""

    group: int
    events: int
    dimension: Tally
    entities: Tally
    duplicate_keys: int
    unmatched: int
    rejected_files: list[FileEntry]
    profile: TableProfile


@dataclass(frozen=True, slots=True)
class Unit:
    """One reading task: a unit of the events (group None), or of the dimension of a group."""

    source: SourcePlan
    group: int | None
    index: int
    read: ReadUnit


@dataclass(frozen=True, slots=True)
class Job:
    """All that the tasks share; stored once in the object store."""

    plan: FeaturePlan
    reservations: tuple[Reservation, ...]
    units: tuple[Unit, ...]
    buckets: int
    lookups: tuple[pl.DataFrame, ...]
    join: JoinHow
    created: dt.datetime

    def scatter(self, wave: range, index: int) -> tuple[UnitNote, list[pl.DataFrame]]:
        """Read and judge one unit and split its rows by entity, for each group that wants them.

        Args:
            wave: Slots to give frames for; slot = group number · buckets + bucket.
            index: Number of the unit. The wave that has slot 0 also writes the rejected rows.

        Returns:
            Counts, and one frame a slot of the wave.

        """
        unit = self.units[index]
        if unit.group is not None and 0 not in wave and not self._slots_of(unit.group, wave):
            # A dimension whose group is computed in another wave; wave 0 has counted its rows.
            return UnitNote(Tally()), [pl.DataFrame()] * len(wave)
        kept, tally, rejected = read_and_judge(unit.source, unit.read)
        note = UnitNote(tally)
        if unit.group is None:
            note.newest = kept[self.plan.time].max()  # type: ignore[assignment]
            for lookup, table in zip(self.plan.lookups, self.lookups, strict=True):
                kept = kept.join(table, on=lookup.key, how="left", maintain_order="left")
        frames: list[pl.DataFrame] = []
        for number, planned in enumerate(self.plan.groups):
            rows = kept.clear()
            if unit.group is None:
                rows = kept.select(planned.columns).filter(pl.col(planned.group.entity).is_not_null())
                note.without_entity[number] = kept.height - rows.height
            elif unit.group == number:
                rows = kept
            if wanted := self._slots_of(number, wave):
                first = number * self.buckets
                split = split_by_key(rows, planned.group.entity, self.buckets) if rows.height else [rows] * self.buckets
                frames += split[wanted.start - first : wanted.stop - first]
        if rejected is not None and 0 in wave:
            for number in range(len(self.plan.groups)) if unit.group is None else [unit.group]:
                entry = write_rejected(self.reservations[number], unit.source.name, unit.index, rejected)
                note.rejected_files[number] = entry
        return note, frames

    def _slots_of(self, group: int, wave: range) -> range:
        """The slots of a group that are in the wave."""
        first = group * self.buckets
        return range(max(first, wave.start), min(first + self.buckets, wave.stop))

    def gather(self, wave: range, index: int, frames: list[pl.DataFrame]) -> tuple[BucketSummary, pa.Table]:
        """Compute the features of a bucket's entities, join their dimension rows, stamp and profile them."""
        number, part = divmod(wave[index], self.buckets)
        planned, reservation = self.plan.groups[number], self.reservations[number]
        events = pl.concat([f for f, unit in zip(frames, self.units, strict=True) if unit.group is None])
        features = evaluate(planned.group, events, self.plan.time, self.plan.as_of)
        entities = Tally(rows_in=features.height)
        dimension = Tally()
        rejected_files: list[FileEntry] = []
        unmatched = 0
        if planned.dimension is not None:
            rows = pl.concat([f for f, unit in zip(frames, self.units, strict=True) if unit.group == number])
            rows, conflicting = unique_dimension_rows(rows, planned.group.entity, dimension)
            joined = join_dimension(planned.group, features, rows, self.join)
            features, unmatched = joined.kept, joined.unmatched
            entities.rejected.update(joined.rejected[REASON].to_list())
            for name, rejected in ((f"{planned.dimension.name}-conflicts", conflicting), ("entities", joined.rejected)):
                if rejected.height:
                    rejected_files.append(write_rejected(reservation, name, part, rejected))
        entities.rows_out = features.height
        stamped = features.with_columns(
            pl.lit(self.plan.as_of, TIME).alias(AS_OF),
            pl.lit(self.created, TIME).alias(CREATED),
            pl.lit(f"v{reservation.version}").alias(VERSION),
        )
        table = to_arrow(stamped)
        summary = BucketSummary(
            group=number,
            events=events.height,
            dimension=dimension,
            entities=entities,
            duplicate_keys=features.height - features[planned.group.entity].n_unique(),
            unmatched=unmatched,
            rejected_files=rejected_files,
            profile=profile_table(table.select(numeric_features(table.schema, planned))),
        )
        return summary, table.append_column(PART, pa.array([part] * len(table), pa.int32()))


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """One data file as it was written; profile has the columns that weren't profiled for the fences before."""

    entry: FileEntry
    schema: pa.Schema
    profile: TableProfile
    ready: int


def write_part(
    table: pa.Table,
    part: int,
    *,
    planned: GroupPlan,
    reservation: Reservation,
    bounds: Mapping[str, Fences],
    thresholds: Thresholds,
) -> WrittenPart:
    """Score the rows of one part against the global fences and write them as one file."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    scored = score_rows(
        frame,
        feature_columns(table.schema.names, planned),
        bounds,
        missing_below=thresholds.missing,
        outliers_below=thresholds.outliers,
        score_above=thresholds.score,
    )
    scored = scored.select(pl.exclude(AS_OF, CREATED, VERSION), AS_OF, CREATED, VERSION)
    final = to_arrow(scored)
    entry = reservation.entry(storage.write_parquet(final, reservation.data_uri(part)))
    profiled = set(numeric_features(table.schema, planned))
    rest = final.select([name for name in final.column_names if name not in profiled])
    return WrittenPart(entry, final.schema, profile_table(rest), int(scored["is_training_ready"].sum()))


def read_and_judge(source: SourcePlan, unit: ReadUnit) -> tuple[pl.DataFrame, Tally, pl.DataFrame | None]:
    """Read a unit of a source and judge its rows: those kept, the counts, and those rejected (None: none)."""
    tally = Tally()
    kept, rejected = [], []
    for raw in read(unit):
        judged = judge(raw.frame, source.rows)
        kept.append(judged.kept)
        tally.rows_in += raw.frame.height + len(raw.malformed)
        tally.rows_out += judged.kept.height
        tally.filtered.update(judged.filtered)
        if judged.rejected.height:
            tally.rejected.update(judged.rejected[REASON].to_list())
            rejected.append(
                judged.rejected.with_columns(
                    pl.lit(unit.uri).alias(FILE), (judged.rejected_rows + raw.first_row).alias(ROW)
                )
            )
        if raw.malformed:
            tally.rejected[MALFORMED] += len(raw.malformed)
            lines = pl.DataFrame({LINE: list(raw.malformed)}, schema={LINE: pl.String})
            rejected.append(lines.with_columns(pl.lit(MALFORMED).alias(REASON), pl.lit(unit.uri).alias(FILE)))
    # An empty file, too, has typed columns.
    frame = pl.concat(kept) if kept else judge(_no_rows(unit), source.rows).kept
    return frame, tally, pl.concat(rejected, how="diagonal_relaxed") if rejected else None


def _no_rows(unit: ReadUnit) -> pl.DataFrame:
    return pl.DataFrame(schema=dict.fromkeys(unit.columns, pl.String))


def unique_dimension_rows(rows: pl.DataFrame, key: str, tally: Tally) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One row a key: copies of a row are dropped, of rows that contradict each other the first is kept.

    Args:
        rows: Dimension rows in the order of the files.
        key: Key column.
        tally: Gets the counts: rows_in, rows_out, deduplicated.

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


def feature_columns(names: Sequence[str], planned: GroupPlan) -> list[str]:
    """The columns that are judged as features: the group's own and those of its dimension."""
    dimension = [c.name for c in planned.dimension.rows.columns] if planned.dimension is not None else []
    wanted = {*planned.group.feature_names, *dimension} - {planned.group.entity}
    return [name for name in names if name in wanted]


def numeric_features(schema: pa.Schema, planned: GroupPlan) -> list[str]:
    """The features that have quantiles, and so fences."""
    return [
        name
        for name in feature_columns(schema.names, planned)
        if any(is_kind(schema.field(name).type) for is_kind in _NUMERIC)
    ]


def to_arrow(frame: pl.DataFrame) -> pa.Table:
    """An Arrow table with the plain types that every Parquet reader knows."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    plain = [
        field.with_type(pa.string()) if pa.types.is_large_string(field.type) else field.with_type(field.type)
        for field in table.schema
    ]
    return table.cast(pa.schema(plain))


def write_rejected(reservation: Reservation, source: str, index: int, rows: pl.DataFrame) -> FileEntry:
    """Keep rejected rows beside the version that they are missing from."""
    return reservation.entry(
        storage.write_parquet(to_arrow(_uncategorised(rows)), reservation.rejected_uri(source, index))
    )


def _uncategorised(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))
