"""Both sides of a training set's shuffles, as each task runs them. Pure, but for the files they read and write.

    label_scatter, label_gather: events are read and split by entity; an entity's events become rows of the spine.
    scatter, gather: rows of the spine are read and split by an entity key; those of a bucket find their features.
    review: a written file is read back, profiled and sampled.

Features are never shuffled: the task of a bucket reads that bucket's part of each version itself.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.engine.partition import split_by_key
from tasks.features.shuffle import LookedUp, Tally, looked_up, read_and_judge, read_lookup
from tasks.features.sources import ReadUnit, together
from tasks.features.writer import ROW_GROUP, to_arrow, write_rejected
from tasks.io import storage
from tasks.io.hashing import stable_hash
from tasks.io.tensors import Int64Array, UInt64Array
from tasks.quality.profile import TableProfile, profile_table
from tasks.quality.sketch import QuantileSketch
from tasks.store import layout
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation
from tasks.training_sets.asof import join_asof, plant
from tasks.training_sets.history import History, read_bucket
from tasks.training_sets.plan import TrainingSetPlan, label_rows

ORDER = "_spine_order"
"""Number of a row in the spine, for several shuffles; a split has fewer than 2**40 rows."""

_SPLIT_BITS = 40


@dataclass(frozen=True, slots=True)
class SpineNote:
    """Report of a scatter task: its rows, the file of the rejected ones, and the newest time."""

    tally: Tally
    rejected: FileEntry | None = None
    newest: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class LabelledBucket:
    """Report of a task that made rows of a label: events that arrived, and rows made."""

    events: int
    rows: int


@dataclass(slots=True)
class JoinedBucket:
    """Report of a gather task on its bucket. file and times (microseconds) are known once it is written."""

    rows: int
    matched: Counter[str] = field(default_factory=Counter)
    planted: int = 0
    null_keys: int = 0
    duplicates: int = 0
    schema: pa.Schema | None = None
    file: FileEntry | None = None
    times: QuantileSketch | None = None


@dataclass(frozen=True, slots=True)
class Review:
    """Review of a written file: profiles of its earlier and later rows, and a sample with its hashes."""

    earlier: TableProfile
    later: TableProfile
    sample: pa.Table
    hashes: UInt64Array


@dataclass(frozen=True, slots=True)
class Job:
    """State shared by all tasks; stored once in the object store."""

    plan: TrainingSetPlan
    reservation: Reservation
    splits: tuple[tuple[ReadUnit, ...], ...]
    lookups: tuple[pl.DataFrame, ...] = ()

    def label_scatter(self, buckets: int, index: int) -> tuple[SpineNote, list[pl.DataFrame]]:
        """Read and judge one split of a label's events and split them by entity; filter events without an entity."""
        assert self.plan.label is not None
        events = self.plan.label.events
        kept, note = self._read(index)
        kept = looked_up(kept, events.lookups, self.lookups)
        entity = self.plan.model.entity
        rows = kept.select(events.groups[0].columns).filter(pl.col(entity).is_not_null())
        if lost := kept.height - rows.height:
            note.tally.rows_out -= lost
            note.tally.filtered[f"null_{entity}"] += lost
        return note, split_by_key(rows, entity, buckets)

    def label_gather(self, _: int, frames: Mapping[int, pl.DataFrame]) -> tuple[LabelledBucket, pa.Table]:
        """Make the label's rows of a bucket of entities, at all its times."""
        assert self.plan.label is not None
        plan = self.plan.label
        events = pl.concat(frames.values())
        rows = label_rows(plan.label, events, plan.events.time, plan.times)
        return LabelledBucket(events.height, rows.height), to_arrow(rows)

    def scatter(self, buckets: int, index: int) -> tuple[SpineNote, list[pl.DataFrame]]:
        """Read and judge one split of the spine and split its rows by their first entity key."""
        kept, note = self._read(index)
        return note, self.split(kept, index, 0, buckets)

    def split(self, rows: pl.DataFrame, index: int, number: int, buckets: int) -> list[pl.DataFrame]:
        """Split rows by the entity key of a turn, numbering them in the first of several."""
        if number == 0 and len(self.plan.entities) > 1:
            first = index << _SPLIT_BITS
            rows = rows.with_columns(pl.int_range(first, first + rows.height, dtype=pl.Int64).alias(ORDER))
        return split_by_key(rows, self.plan.entities[number], buckets)

    def _read(self, index: int) -> tuple[pl.DataFrame, SpineNote]:
        source = self.plan.source
        kept, tally, rejected = read_and_judge(source, *self.splits[index])
        entry = None if rejected is None else write_rejected(self.reservation, source.name, index, rejected)
        assert source.rows.time is not None
        newest: dt.datetime | None = kept[source.rows.time].max()  # type: ignore[assignment]
        return kept, SpineNote(tally, entry, newest)

    def gather(
        self, number: int, buckets: int, index: int, frames: Mapping[int, pl.DataFrame]
    ) -> tuple[JoinedBucket, pa.Table]:
        """Join the features of one entity key to a bucket of rows; in the last turn write them.

        Args:
            number: Number of the turn, and of its entity key.
            buckets: Number of buckets.
            index: Number of the bucket.
            frames: Its rows by unit, in the order of the spine.
        """
        entity = self.plan.entities[number]
        rows = pl.concat(frames.values())
        order = [ORDER] if ORDER in rows.columns else []
        rows = rows.sort(entity, EVENT_TIME, *order, maintain_order=True)
        summary = JoinedBucket(rows.height)
        rows = self._joined(rows, entity, index, buckets, summary)
        if number + 1 < len(self.plan.entities):
            return summary, to_arrow(rows)
        summary.null_keys = rows[entity].null_count()
        summary.duplicates = repeated_rows(rows, entity)
        table = to_arrow(rows.select(*self.plan.entities[::-1], EVENT_TIME, *self.plan.columns, TARGET))
        summary.schema = table.schema
        summary.times = QuantileSketch.of(rows[EVENT_TIME].to_physical().to_numpy().astype(np.float64))
        if len(table):
            summary.file = self.write(table, index)
        return summary, pa.table({})

    def _joined(self, rows: pl.DataFrame, entity: str, index: int, buckets: int, summary: JoinedBucket) -> pl.DataFrame:
        model = self.plan.model
        for history in self.plan.histories:
            if history.entity != entity:
                continue
            known, found = find_features(self.plan, history, rows, index, buckets)
            options = {"entity": entity, "event_time": EVENT_TIME, "ttl": self.plan.ttl}
            flags = {"strict": model.strict, "known_at": model.known_at}
            summary.planted += plant(rows, known, found, **options, **flags)  # type: ignore[arg-type]
            summary.matched[history.group] += int(np.count_nonzero(found >= 0))
            rows = rows.hstack(taken(known, found, self.plan.columns_of(history)))
        return rows

    def write(self, table: pa.Table, part: int) -> FileEntry:
        """Write a part in the format of feature versions: by entity and time, in small row groups."""
        written = storage.write_parquet(table, self.reservation.data_uri(part), row_group_size=ROW_GROUP)
        return self.reservation.entry(written)

    def review(self, file: FileEntry, later: tuple[float, bool], share: float) -> Review:
        """Read a file back: profile its earlier and later rows, and sample it.

        Args:
            file: A file written by `gather`.
            later: Time (microseconds since 1970) from which rows are later, and True if rows at that time are, too.
            share: Share of the rows to sample.
        """
        with storage.open_input(layout.join(self.reservation.uri, file.path)) as source:
            table = pq.read_table(source, use_threads=False)
        latest = is_later(table, later)
        entity = self.plan.model.entity
        hashes = stable_hash(table[entity]) ^ stable_hash(table[EVENT_TIME], seed=1)
        chosen = np.flatnonzero(hashes <= np.uint64(min(share, 1.0) * (2**64 - 2**11)))
        return Review(
            earlier=profile_table(table.filter(pc.invert(latest))),
            later=profile_table(table.filter(latest)),
            sample=table.select([entity, *self.plan.columns, TARGET]).take(pa.array(chosen)),
            hashes=hashes[chosen],
        )


def units_of(plan: TrainingSetPlan) -> list[ReadUnit]:
    """Return the pieces of the spine's or the label's files."""
    return plan.source.units(plan.rows_per_bucket)


def splits_of(plan: TrainingSetPlan) -> tuple[tuple[ReadUnit, ...], ...]:
    """Return the pieces that each task reads."""
    return tuple(together(units_of(plan), plan.rows_per_bucket))


def label_lookups(plan: TrainingSetPlan) -> tuple[LookedUp, ...]:
    """Return dimension columns that a label's expression uses, by key: given to every task, so they fit in memory."""
    lookups = plan.label.events.lookups if plan.label is not None else ()
    return tuple(read_lookup(lookup, plan.rows_per_bucket) for lookup in lookups)


def repeated_rows(rows: pl.DataFrame, entity: str) -> int:
    """Return the number of rows that repeat the entity and time of another."""
    return rows.height - rows.select(entity, EVENT_TIME).n_unique()


def later_bound(times: QuantileSketch, share: float) -> tuple[float, bool]:
    """Return the start of the latest share of the rows, as close to the share as equal times allow.

    Args:
        times: Microseconds since 1970 of all rows.
        share: Share of the rows.

    Returns:
        Time from which rows are later, and True if rows at that time are, too.
    """
    if not times.count:
        return 0.0, False
    bound, first = float(times.quantiles([1 - share])[0]), float(times.lows[0])
    return float(np.ceil(bound)), bound > first


def is_later(table: pa.Table, later: tuple[float, bool]) -> pa.ChunkedArray:
    """Return a mask of later rows, by the result of `later_bound`."""
    bound, included = later
    ticks = table[EVENT_TIME].cast(pa.int64())
    return pc.greater_equal(ticks, int(bound)) if included else pc.greater(ticks, int(bound))


def find_features(
    plan: TrainingSetPlan,
    history: History,
    rows: pl.DataFrame,
    bucket: int,
    buckets: int,
    *,
    keys: pl.Series | None = None,
) -> tuple[pl.DataFrame, Int64Array]:
    """Find the features of rows of one bucket of entities in a history.

    Args:
        plan: Plan with the rules of the match.
        history: Features over time.
        rows: The rows.
        bucket: Number of the bucket.
        buckets: Number of buckets.
        keys: Entities of the rows; None reads the features of all.

    Returns:
        The bucket's features, and for each row its match among them, or −1.
    """
    model = plan.model
    known = read_bucket(plan.root, history, bucket, buckets, known_at=model.known_at, keys=keys)
    options = {"event_time": EVENT_TIME, "ttl": plan.ttl, "strict": model.strict, "known_at": model.known_at}
    return known, join_asof(rows, known, entity=history.entity, **options)  # type: ignore[arg-type]


def taken(history: pl.DataFrame, found: Int64Array, columns: dict[str, str]) -> pl.DataFrame:
    """Return the features of the matched rows, null for −1, under the names of their columns."""
    if not history.height:
        nothing = history.select(pl.col(feature).alias(column) for feature, column in columns.items())
        return nothing.clear(len(found))
    places = pl.Series("place", found)
    places = places.set(places < 0, None) if len(found) and found.min() < 0 else places
    return history.select(pl.col(feature).gather(places).alias(column) for feature, column in columns.items())
