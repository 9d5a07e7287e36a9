"""The training-set job as Ray Data plans: rows of the spine move to their entities' buckets and find features there.

    label events ─ shuffle ─ rows ─┐
                                   ├─ shuffle by each entity key ─ as-of join ─ canary ─ write ─ review
    spine files ─ judge ───────────┘                  └─ each version's part of the bucket, read in place

Only the spine is shuffled; the features, usually many times as large, are read where they are needed. Nothing here is
visible to readers until the version is committed.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.engine.cluster import losses_explained
from tasks.engine.jobs import Parts, Shuffled, mapped, shuffle
from tasks.engine.partition import frame_of
from tasks.features.shuffle import Tally, check_rows_read, check_way
from tasks.io.errors import SourceError
from tasks.io.tensors import UInt64Array
from tasks.quality.profile import TableProfile, added, merge_profiles
from tasks.quality.rules import Written
from tasks.quality.sketch import QuantileSketch
from tasks.store.layout import EVENT_TIME
from tasks.store.manifest import FileEntry, RowBalance, check_equal
from tasks.store.reading import verify_digest
from tasks.store.reservation import Reservation
from tasks.training_sets.gate import TrainingSetFigures
from tasks.training_sets.history import History
from tasks.training_sets.plan import TrainingSetPlan
from tasks.training_sets.shuffle import (
    Job,
    JoinedBucket,
    LabelledBucket,
    Review,
    SpineNote,
    label_lookups,
    later_bound,
    splits_of,
    units_of,
)

MAX_BUCKETS = 256
HISTORY_SHARE = 4
"""Feature rows that take the memory of one row of `rows_per_bucket`: they aren't copied in a shuffle."""

SAMPLE_ROWS = 200_000
VALUE_BYTES = 8
"""Approximate bytes of a value in the shuffle."""

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class ComputedSet(TrainingSetFigures, Written):
    """Result of building a model's training set, before the commit.

    sample: entity, features and target of up to `SAMPLE_ROWS` rows, by a hash of entity and time.
    """

    histories: tuple[History, ...]
    null_keys: int
    newest_event: dt.datetime | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Rows of a label, one table a bucket, with the finished times and the counts."""

    tables: Parts
    finished: tuple[dt.datetime, ...]
    rows: Tally


def bucket_count(plan: TrainingSetPlan) -> int:
    """Return the number of buckets, a power of two: each holds about `rows_per_bucket` rows with their features."""
    rows = max(plan.source.table.estimated_rows(), plan.history_rows // HISTORY_SHARE)
    wanted = -(-rows // plan.rows_per_bucket)
    return min(MAX_BUCKETS, 1 << (wanted - 1).bit_length()) if wanted > 1 else 1


def pieces_to_read(plan: TrainingSetPlan) -> int:
    """Return the number of pieces of the spine's or the label's files that the job will read."""
    return len(splits_of(plan))


def build_training_set(
    plan: TrainingSetPlan,
    reservation: Reservation,
    *,
    on_read: Progress = lambda _: None,
    on_joined: Progress = lambda _: None,
) -> ComputedSet:
    """Join a model's rows with the features known at their times and write them under a reservation.

    Args:
        plan: Plan of the training set.
        reservation: Target of the write.
        on_read: Called with the number of pieces of files read, as they are read.
        on_joined: Called with the number of buckets joined, as they are.

    Raises:
        BalanceError: rows were lost or doubled on the way.
        LeakFound: the join took a row that was planted in the future.
        SourceError: a file can't be read, or no time of a label is over.
        CorruptVersion: a file of a feature version is missing or was altered.
        ResourceError: memory or disk are too small; it says what to do.
    """
    started = time.monotonic()
    lookups = label_lookups(plan)
    job = Job(plan, reservation, splits_of(plan), tuple(lookup.rows for lookup in lookups))
    sources, rejected = Tally(), list[FileEntry]()
    newest: list[dt.datetime] = []

    def noted(note: SpineNote) -> None:
        sources.add(note.tally)
        if note.rejected is not None:
            rejected.append(note.rejected)
        if note.newest is not None:
            newest.append(note.newest)

    with losses_explained(f"lower --rows-per-bucket (it is {plan.rows_per_bucket:,})"):
        _verify_histories(plan)
        labelled = _label(job, noted, on_read) if plan.label is not None else None
        made = time.monotonic()
        turns = _turns(job, noted, labelled, on_read, on_joined)
    joined = time.monotonic()
    balances = _balances(job, sources, labelled, turns)
    last = turns[-1].summaries
    rejected += [entry for lookup in lookups for entry in lookup.write_rejected(reservation)]
    files = [bucket.file for bucket in last if bucket.file is not None]
    schema = _schema(last)
    if not files:  # without any row there is still one file: a schema for the gate to judge
        files = [job.write(schema.empty_table(), 0)]
    times = QuantileSketch.merge_all(bucket.times for bucket in last if bucket.times is not None)
    earlier, later, sample = _review(job, files, times)
    timings = {"read and join": joined - made, "profile": time.monotonic() - joined}
    return ComputedSet(
        reservation=reservation,
        files=tuple(files),
        rejected_files=tuple(sorted(rejected, key=lambda file: file.path)),
        schema=schema,
        profile=merge_profiles([earlier, later]),
        profile_earlier=earlier,
        profile_later=later,
        balances=(*balances[:-1], *(lookup.balance for lookup in lookups), balances[-1]),
        model=plan.model,
        features=tuple(plan.columns),
        histories=plan.histories,
        matched=_matched(plan, turns),
        null_keys=sum(bucket.null_keys for bucket in last),
        rows=sum(bucket.rows for bucket in last),
        planted=sum(bucket.planted for turn in turns for bucket in turn.summaries),
        sample=sample,
        newest_event=max(newest) if newest else None,
        duplicates=sum(bucket.duplicates for bucket in last),
        timings=({"label": made - started} if labelled else {}) | timings,
        notes=(*plan.notes, *_unfinished(plan, labelled)),
    )


def _verify_histories(plan: TrainingSetPlan) -> None:
    """Compare the feature files with their manifests, byte by byte: row groups have no checksum that readers check.

    Raises:
        CorruptVersion: a file is missing or differs.
    """
    versions = [version for history in plan.histories for version in history.versions]
    files = [pair for version in versions for pair in zip(version.files, version.digests, strict=True)]

    def verify(number: int) -> None:
        verify_digest(*files[number])

    for _ in mapped(Parts(len(files)), verify, name="verify feature files"):
        pass


def _label(job: Job, noted: Callable[[SpineNote], None], on_read: Progress) -> _Labelled:
    """Return the label's rows, one table a bucket of entities."""
    plan = job.plan.label
    assert plan is not None
    buckets = bucket_count(job.plan)
    done: Shuffled[SpineNote, LabelledBucket] = shuffle(
        Parts(len(job.splits)),
        buckets,
        partial(job.label_scatter, buckets),
        job.label_gather,
        names=(f"read {job.plan.source.name}", "make the label"),
        volume=_packed_bytes(job.plan),
        on_scattered=on_read,
    )
    sent = Tally()
    newest = [note.newest for note in done.notes if note.newest is not None]
    for note in done.notes:
        sent.add(note.tally)
        noted(note)
    taken = sum(summary.events for summary in done.summaries)
    check_way(job.plan.source.name, sent.rows_out, int(done.carried.sum()), taken)
    made = sum(summary.rows for summary in done.summaries)
    check_equal(f"label {plan.label.name}", made, int(done.rows.sum()), "were made, {} were handed on")
    finished = plan.finished(max(newest) if newest else None)
    if not finished:
        raise SourceError(
            f"label '{plan.label.name}': no time of {', '.join(plan.label.at)} has {plan.label.days} days behind it "
            f"by {_day(plan.complete or (max(newest) if newest else None))}, up to which its events reach; "
            f"give earlier times, fewer days, or a later --as-of"
        )
    return _Labelled(done.tables, finished, Tally(rows_in=made))


def _turns(
    job: Job,
    noted: Callable[[SpineNote], None],
    labelled: _Labelled | None,
    on_read: Progress,
    on_joined: Progress,
) -> list[Shuffled[SpineNote, JoinedBucket]]:
    """Shuffle the rows by each entity key in turn, the model's last."""
    buckets = bucket_count(job.plan)
    turns: list[Shuffled[SpineNote, JoinedBucket]] = []
    for number, entity in enumerate(job.plan.entities):
        scatter: Callable[..., tuple[SpineNote, list[pl.DataFrame]]]
        if turns:
            source, scatter = turns[-1].tables, partial(_scatter_table, job, number, buckets)
        elif labelled is not None:
            source, scatter = labelled.tables, partial(_scatter_labelled, job, labelled.finished, buckets)
        else:
            source, scatter = Parts(len(job.splits)), partial(job.scatter, buckets)
        done: Shuffled[SpineNote, JoinedBucket] = shuffle(
            source,
            buckets,
            scatter,
            partial(job.gather, number, buckets),
            names=(f"split by {entity}", f"join features of {entity}"),
            volume=_packed_bytes(job.plan),
            on_scattered=on_read if not turns and labelled is None else _ignored,
            on_gathered=on_joined if number + 1 == len(job.plan.entities) else _ignored,
        )
        for note in () if turns else done.notes:
            if labelled is None:
                noted(note)
            else:
                labelled.rows.rows_out += note.tally.rows_out
                labelled.rows.filtered += note.tally.filtered
        turns.append(done)
    return turns


def _packed_bytes(plan: TrainingSetPlan) -> int:
    """Return the approximate bytes of all rows in the shuffle, including features found so far."""
    return plan.source.table.estimated_rows() * VALUE_BYTES * (len(plan.source.rows.columns) + len(plan.columns))


def _ignored(_: object) -> None:
    """Ignore a report."""


def _scatter_table(
    job: Job, number: int, buckets: int, index: int, rows: pa.Table
) -> tuple[SpineNote, list[pl.DataFrame]]:
    """Split a bucket of the previous turn by the next entity key."""
    return SpineNote(Tally()), job.split(frame_of(rows, rechunk=False), index, number, buckets)


def _scatter_labelled(
    job: Job, finished: tuple[dt.datetime, ...], buckets: int, index: int, table: pa.Table
) -> tuple[SpineNote, list[pl.DataFrame]]:
    """Split a bucket of a label's rows, without those whose days aren't over and those without a target."""
    rows = frame_of(table, rechunk=False)
    over = rows.filter(pl.col(EVENT_TIME).is_in(pl.Series(finished, dtype=rows.schema[EVENT_TIME]).implode()))
    kept = over.drop_nulls("target")
    counts = {"not_over": rows.height - over.height, "no_target": over.height - kept.height}
    filtered = Counter({reason: count for reason, count in counts.items() if count})
    note = SpineNote(Tally(rows_in=rows.height, rows_out=kept.height, filtered=filtered))
    return note, job.split(kept, index, 0, buckets)


def _balances(
    job: Job, sources: Tally, labelled: _Labelled | None, turns: Sequence[Shuffled[SpineNote, JoinedBucket]]
) -> tuple[RowBalance, ...]:
    """Return the balances of the source and of the rows, each checked: rows sent, carried and taken must agree."""
    plan = job.plan
    check_rows_read(plan.source, units_of(plan), sources)
    balances = [sources.balance(plan.source.name)]
    if labelled is not None:
        assert plan.label is not None
        balances.append(labelled.rows.balance(f"label {plan.label.label.name}"))
    name, rows = balances[-1].name, balances[-1].rows_out
    for number, turn in enumerate(turns):
        check_way(name, rows, int(turn.carried.sum()), sum(bucket.rows for bucket in turn.summaries))
        if number + 1 < len(turns):
            check_equal(name, rows, int(turn.rows.sum()), "were taken, {} were handed on with their features")
    written = sum(bucket.file.rows for bucket in turns[-1].summaries if bucket.file is not None)
    balances.append(RowBalance(name=plan.model.name, rows_in=rows, rows_out=written))
    for balance in balances:
        balance.check()
    return tuple(balances)


def _matched(plan: TrainingSetPlan, turns: Sequence[Shuffled[SpineNote, JoinedBucket]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for turn in turns:
        for bucket in turn.summaries:
            found.update(bucket.matched)
    return {history.group: found[history.group] for history in plan.histories}


def _schema(buckets: Sequence[JoinedBucket]) -> pa.Schema:
    schema = buckets[0].schema
    assert schema is not None, "the last turn's buckets know their schema"
    return schema


def _review(job: Job, files: Sequence[FileEntry], times: QuantileSketch) -> tuple[TableProfile, TableProfile, pa.Table]:
    """Profile and sample the files.

    Returns:
        Profiles of the earlier rows and of the latest share by time, as even as equal times allow; and the rows of the
        lowest hashes, by their hash: independent of the tasks that read them.
    """
    bound = later_bound(times, job.plan.later_share)
    rows = sum(file.rows for file in files)
    share = 1.05 * SAMPLE_ROWS / max(1, rows)  # a little more, of which the lowest hashes are taken
    earlier: TableProfile | None = None
    later: TableProfile | None = None
    samples: dict[int, pa.Table] = {}
    hashes: dict[int, UInt64Array] = {}

    def review(number: int) -> tuple[int, Review]:
        return number, job.review(files[number], bound, share)

    for number, one in mapped(Parts(len(files)), review, name="profile and sample"):
        earlier, later = added(earlier, one.earlier), added(later, one.later)
        samples[number], hashes[number] = one.sample, one.hashes
    assert earlier is not None, "there is a file"
    assert later is not None
    order = np.argsort(np.concatenate([hashes[number] for number in sorted(hashes)]), kind="stable")[:SAMPLE_ROWS]
    sample = pa.concat_tables([samples[number] for number in sorted(samples)]).take(pa.array(order)).combine_chunks()
    return earlier, later, sample


def _unfinished(plan: TrainingSetPlan, labelled: _Labelled | None) -> list[str]:
    """Return a sentence about the times that a label leaves out."""
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
