"""The training-set job on Ray: rows of the spine go to their entities' buckets and find their features there.

    label events ─ exchange ─ rows ─┐
                                    ├─ exchange by each entity key ─ as-of join ─ canary ─ write ─ review
    spine files ─ judge ────────────┘                  └─ each version's part of the bucket, read in place

Only the spine travels; the features, usually many times as large, are read where they are needed. Nothing here is
visible to readers until the version is committed.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import ray

from tasks.core.errors import SourceError
from tasks.core.exchange import collect, exchange
from tasks.core.manifest import ColumnSpec, FileEntry, RowBalance
from tasks.core.profile import TableProfile, merge_profiles
from tasks.core.reservation import Reservation
from tasks.core.sketch import QuantileSketch
from tasks.features.sources import ReadUnit, read_units
from tasks.features.stages import read_and_judge, unique_dimension_rows
from tasks.features.tallies import Tally, check_arrival
from tasks.serving.definition import EVENT_TIME
from tasks.serving.history import History
from tasks.serving.plan import TrainingSetPlan
from tasks.serving.stages import Job, JoinedBucket, LabelledBucket, Review, SpineNote

MAX_BUCKETS = 256
HISTORY_SHARE = 4
"""Feature rows that take the memory of one row of `rows_per_bucket`: they aren't held with copies on their way."""

SAMPLE_ROWS = 200_000

Progress = Callable[[int], None]
Scatter = Callable[[int], tuple[SpineNote, list[pl.DataFrame]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedSet:
    """What was written for a model, and what is known of it; nothing is committed yet.

    profile_earlier, profile_later: of the rows before and in the latest share by event time. matched: group → rows
    that found features. planted: rows of the canary, none of which was found. duplicates: rows that repeat the entity
    and time of another. sample: entity, features and target of up to `SAMPLE_ROWS` rows, by a hash of entity and time.
    """

    reservation: Reservation
    files: tuple[FileEntry, ...]
    rejected_files: tuple[FileEntry, ...]
    schema: pa.Schema
    profile: TableProfile
    profile_earlier: TableProfile
    profile_later: TableProfile
    balances: tuple[RowBalance, ...]
    features: tuple[str, ...]
    histories: tuple[History, ...]
    matched: Mapping[str, int]
    null_keys: int
    rows: int
    planted: int
    sample: pa.Table
    newest_event: dt.datetime | None
    duplicates: int
    timings: dict[str, float]
    notes: tuple[str, ...]

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """Schema of the data files, for the manifest."""
        return tuple(ColumnSpec(name=f.name, type=str(f.type), nullable=f.nullable) for f in self.schema)


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Rows of a label, one table a bucket, with the times that are over and what was counted."""

    tables: list[Any]
    finished: tuple[dt.datetime, ...]
    rows: Tally


def bucket_count(plan: TrainingSetPlan) -> int:
    """Buckets of a training set, a power of two: each holds about `rows_per_bucket` rows, its features counted in."""
    rows = max(plan.source.table.estimated_rows(), plan.history_rows // HISTORY_SHARE)
    wanted = -(-rows // plan.rows_per_bucket)
    return min(MAX_BUCKETS, 1 << (wanted - 1).bit_length()) if wanted > 1 else 1


def pieces_to_read(plan: TrainingSetPlan) -> int:
    """Pieces of the spine's or the label's files that the job will read."""
    return len(_units(plan))


def build_training_set(
    plan: TrainingSetPlan,
    reservation: Reservation,
    *,
    on_read: Progress = lambda _: None,
    on_joined: Progress = lambda _: None,
) -> ComputedSet:
    """Join a model's rows with the features known at their times and write them under a reservation.

    Args:
        plan: What to build.
        reservation: Where to write it.
        on_read: Called with the number of pieces of files read, as they are read.
        on_joined: Called with the number of buckets joined, as they are.

    Raises:
        BalanceError: rows were lost or doubled on the way.
        LeakFound: the join took a row that was planted in the future.
        SourceError: a file can't be read, or no time of a label is over.
        CorruptVersion: a file of a feature version is missing.

    """
    started = time.monotonic()
    job = Job(plan, reservation, _units(plan), _lookup_tables(plan))
    sources, rejected = Tally(), list[FileEntry]()
    newest: list[dt.datetime] = []

    def noted(note: SpineNote) -> None:
        sources.add(note.tally)
        if note.rejected is not None:
            rejected.append(note.rejected)
        if note.newest is not None:
            newest.append(note.newest)
        on_read(1)

    labelled = _label(job, noted, newest) if plan.label is not None else None
    made = time.monotonic()
    turns = _turns(job, noted, labelled, on_joined)
    joined = time.monotonic()
    balances = _balances(plan, sources, labelled, turns)
    last = turns[-1]
    files = [bucket.file for bucket in last if bucket.file is not None]
    schema = _schema(last)
    if not files:  # without a single row there is still one file: a schema for the gate to judge
        files = [job.write(schema.empty_table(), 0)]
    reviews = _review(job, files, QuantileSketch.merge_all(bucket.times for bucket in last if bucket.times is not None))
    earlier, later = (merge_profiles([getattr(one, half) for one in reviews]) for half in ("earlier", "later"))
    timings = {"read and join": joined - made, "profile": time.monotonic() - joined}
    return ComputedSet(
        reservation=reservation,
        files=tuple(files),
        rejected_files=tuple(sorted(rejected, key=lambda file: file.path)),
        schema=schema,
        profile=merge_profiles([earlier, later]),
        profile_earlier=earlier,
        profile_later=later,
        balances=balances,
        features=tuple(plan.columns),
        histories=plan.histories,
        matched=_matched(plan, turns),
        null_keys=sum(bucket.null_keys for bucket in last),
        rows=sum(bucket.rows for bucket in last),
        planted=sum(bucket.planted for turn in turns for bucket in turn),
        sample=_sample(reviews),
        newest_event=max(newest) if newest else None,
        duplicates=sum(bucket.duplicates for bucket in last),
        timings=({"label": made - started} if labelled else {}) | timings,
        notes=(*plan.notes, *_unfinished(plan, labelled)),
    )


def _units(plan: TrainingSetPlan) -> tuple[ReadUnit, ...]:
    return tuple(read_units(plan.source.table, plan.source.file_columns, plan.rows_per_bucket, plan.source.categories))


def _lookup_tables(plan: TrainingSetPlan) -> tuple[pl.DataFrame, ...]:
    """Dimension columns that a label's expression uses, by key: given to every task, so they fit in memory."""
    tables = []
    for lookup in plan.label.events.lookups if plan.label is not None else ():
        source = lookup.dimension
        units = read_units(source.table, source.file_columns, plan.rows_per_bucket, source.categories)
        rows = pl.concat(read_and_judge(source, unit)[0] for unit in units)
        tables.append(unique_dimension_rows(rows, lookup.key, Tally())[0])
    return tuple(tables)


def _label(job: Job, noted: Callable[[SpineNote], None], newest: Sequence[dt.datetime]) -> _Labelled:
    """Make the label's rows, one table a bucket of entities."""
    plan = job.plan.label
    assert plan is not None
    buckets = bucket_count(job.plan)
    sent = Tally()

    def noted_too(note: SpineNote) -> None:
        sent.add(note.tally)
        noted(note)

    done = exchange(len(job.units), buckets, partial(job.label_scatter, buckets), job.label_gather, on_note=noted_too)
    summaries: list[LabelledBucket] = done.summaries
    check_arrival(job.plan.source.name, sent.rows_out, sum(summary.events for summary in summaries))
    finished = plan.finished(max(newest) if newest else None)
    if not finished:
        raise SourceError(
            f"label '{plan.label.name}': no time of {', '.join(plan.label.at)} has {plan.label.days} days behind it "
            f"by {_day(plan.complete or (max(newest) if newest else None))}, up to which its events reach; "
            f"give earlier times, fewer days, or a later --as-of"
        )
    return _Labelled(done.tables, finished, Tally(rows_in=sum(summary.rows for summary in summaries)))


def _turns(
    job: Job, noted: Callable[[SpineNote], None], labelled: _Labelled | None, on_joined: Progress
) -> list[list[JoinedBucket]]:
    """Exchange the rows by each entity key in turn, the model's own last; summaries of each turn's buckets."""
    buckets = bucket_count(job.plan)
    turns: list[list[JoinedBucket]] = []
    tables: list[Any] | None = None
    on_note: Callable[[SpineNote], None]
    for number in range(len(job.plan.entities)):
        is_last = number + 1 == len(job.plan.entities)
        if tables is not None:
            units, scatter, on_note = len(tables), partial(_scatter_table, job, tables, number, buckets), _ignored
        elif labelled is not None:
            units, on_note = len(labelled.tables), partial(_counted, labelled.rows)
            scatter = partial(_scatter_labelled, job, labelled.tables, labelled.finished, buckets)
        else:
            units, scatter, on_note = len(job.units), partial(job.scatter, buckets), noted
        done = exchange(
            units,
            buckets,
            scatter,
            partial(job.gather, number, buckets),
            on_note=on_note,
            on_summary=(lambda _: on_joined(1)) if is_last else _ignored,
        )
        tables = done.tables
        turns.append(done.summaries)
    return turns


def _ignored(_: object) -> None:
    """Nothing is to be told."""


def _counted(tally: Tally, note: SpineNote) -> None:
    tally.rows_out += note.tally.rows_out
    tally.filtered += note.tally.filtered


def _scatter_table(
    job: Job, tables: Sequence[Any], number: int, buckets: int, index: int
) -> tuple[SpineNote, list[pl.DataFrame]]:
    """Split a bucket of the turn before by the next entity key."""
    return SpineNote(Tally()), job.split(_frame(ray.get(tables[index])), index, number, buckets)


def _scatter_labelled(
    job: Job, tables: Sequence[Any], finished: tuple[dt.datetime, ...], buckets: int, index: int
) -> tuple[SpineNote, list[pl.DataFrame]]:
    """Split a bucket of a label's rows, without those whose days aren't over and those that have no target."""
    rows = _frame(ray.get(tables[index]))
    over = rows.filter(pl.col(EVENT_TIME).is_in(pl.Series(finished, dtype=rows.schema[EVENT_TIME]).implode()))
    kept = over.drop_nulls("target")
    counts = {"not_over": rows.height - over.height, "no_target": over.height - kept.height}
    filtered = Counter({reason: count for reason, count in counts.items() if count})
    note = SpineNote(Tally(rows_in=rows.height, rows_out=kept.height, filtered=filtered))
    return note, job.split(kept, index, 0, buckets)


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table, rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _balances(
    plan: TrainingSetPlan, sources: Tally, labelled: _Labelled | None, turns: Sequence[Sequence[JoinedBucket]]
) -> tuple[RowBalance, ...]:
    """Balances of the source and of the rows, each checked: what was sent must have arrived, in every turn."""
    balances = [sources.balance(plan.source.name)]
    if labelled is not None:
        assert plan.label is not None
        balances.append(labelled.rows.balance(f"label {plan.label.label.name}"))
    for turn in turns:
        check_arrival(balances[-1].name, balances[-1].rows_out, sum(bucket.rows for bucket in turn))
    written = sum(bucket.file.rows for bucket in turns[-1] if bucket.file is not None)
    balances.append(RowBalance(name=plan.model.name, rows_in=balances[-1].rows_out, rows_out=written))
    for balance in balances:
        balance.check()
    return tuple(balances)


def _matched(plan: TrainingSetPlan, turns: Sequence[Sequence[JoinedBucket]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for turn in turns:
        for bucket in turn:
            found.update(bucket.matched)
    return {history.group: found[history.group] for history in plan.histories}


def _schema(buckets: Sequence[JoinedBucket]) -> pa.Schema:
    schema = buckets[0].schema
    assert schema is not None, "the last turn's buckets know their schema"
    return schema


def _review(job: Job, files: Sequence[FileEntry], times: QuantileSketch) -> list[Review]:
    """Profile and sample the files; the latest share of the rows by time apart, as even as equal times allow."""
    later = (0.0, False)
    rows = sum(file.rows for file in files)
    if times.count:
        bound, first = float(times.quantiles([1 - job.plan.later_share])[0]), float(times.lows[0])
        later = (np.ceil(bound), bound > first)
    share = 1.05 * SAMPLE_ROWS / max(1, rows)  # a little more, of which the lowest hashes are taken
    job_ref = ray.put(job)
    refs = [_review_file.remote(job_ref, file, later, share) for file in files]
    reviews: list[Review] = collect(refs, _ignored)
    return reviews


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def _review_file(job: Job, file: FileEntry, later: tuple[float, bool], share: float) -> Review:
    return job.review(file, later, share)


def _sample(reviews: Sequence[Review]) -> pa.Table:
    """The rows of the lowest hashes, by their hash: which task met them leaves no trace."""
    hashes = np.concatenate([review.hashes for review in reviews])
    order = np.argsort(hashes, kind="stable")[:SAMPLE_ROWS]
    return pa.concat_tables([review.sample for review in reviews]).take(pa.array(order)).combine_chunks()


def _unfinished(plan: TrainingSetPlan, labelled: _Labelled | None) -> list[str]:
    """The times that a label leaves out, in a sentence."""
    if plan.label is None or labelled is None:
        return []
    left = [moment for moment in plan.label.times if moment not in labelled.finished]
    if not left:
        return []
    named = ", ".join(map(_day, left[:3])) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    return [f"label '{plan.label.label.name}' leaves out {named}: {plan.label.label.days} days aren't over by the end"]


def _day(moment: dt.datetime | None) -> str:
    if moment is None:
        return "no event"
    midnight = moment.time() == dt.time()
    return moment.date().isoformat() if midnight else moment.isoformat(timespec="seconds")
