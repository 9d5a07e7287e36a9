"""The feature-store job as a Ray Data plan: a shuffle computes all groups of a source, then all is scored and written.

    read units ─ judge ─ look up ─ split by entity ─┐
                                                    ├─ shuffle ─ evaluate ─ join ─┬───────────── score ─ write
    dimension files ─ judge ─ split by key ─────────┘                             └─ profile ─ fences ─┘

Nothing here is visible to readers until the versions are committed.

Rows are balanced from three independent counts: those that the tasks sent, that the shuffle carried, and that the tasks
took must be equal in number; the rows that were read must equal the counts in the files' footers.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.engine.cluster import losses_explained
from tasks.engine.jobs import Parts, Shuffled, mapped, shuffle
from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.gate import GroupFigures
from tasks.features.plan import FeaturePlan, GroupPlan
from tasks.features.profiles import ColumnFigures, GroupProfile, Profiling
from tasks.features.rows import AFTER_AS_OF
from tasks.features.shuffle import (
    BucketSummary,
    EventTally,
    Job,
    LookedUp,
    Split,
    Tally,
    UnitNote,
    categorised,
    check_rows_read,
    check_way,
    read_lookup,
)
from tasks.features.sources import ReadUnit, together
from tasks.features.writer import WrittenPart, feature_columns, write_part
from tasks.io import storage
from tasks.io.memory import released
from tasks.io.tensors import Int64Array
from tasks.quality.profile import TableProfile, added, profile_table
from tasks.quality.rules import Written
from tasks.store import layout
from tasks.store.manifest import FileEntry, Manifest, RowBalance, check_equal
from tasks.store.reading import latest
from tasks.store.reservation import Reservation

MAX_BUCKETS = 4096
SNAPSHOTS_PER_BUCKET = 8
"""As-of times whose rows take about as much memory as the events, with some ten events an entity."""

PACKED_BYTES = {"key": 5, "time": 8, "number": 8, "category": 3, "any": 16}
"""Approximate bytes of a value of each kind in the shuffle."""

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class ComputedGroup(GroupFigures, Written):
    """Result of computing one group, before the commit.

    side_files, state: the events kept by an incremental run, and their entry in the manifest's definition.
    """

    side_files: tuple[FileEntry, ...]
    state: Mapping[str, Any] | None


def bucket_count(plan: FeaturePlan) -> int:
    """Return the number of buckets a group: each holds about `rows_per_bucket` events, on any cluster.

    A power of two, so that the buckets of versions of different sizes nest. A long history has more
    of them, for the rows that come out.
    """
    rows = plan.events.table.estimated_rows() * max(1, len(plan.as_of) // SNAPSHOTS_PER_BUCKET)
    wanted = max(1, min(MAX_BUCKETS, -(-rows // plan.rows_per_bucket)))
    return 1 << (wanted - 1).bit_length()


@released()
def compute_groups(
    plan: FeaturePlan,
    config: FeatureStoreConfig,
    reservations: Sequence[Reservation],
    created: dt.datetime,
    *,
    on_read: Progress = lambda _: None,
    on_computed: Progress = lambda _: None,
) -> list[ComputedGroup]:
    """Compute, score and write all groups of a plan under their reservations.

    Args:
        plan: Plan of the computation.
        config: Join and thresholds.
        reservations: One a group, in the plan's order.
        created: Stamp of every row, UTC.
        on_read: Called with the number of pieces of files read, as they are read.
        on_computed: Called with the number of buckets computed, as they are.

    Raises:
        BalanceError: rows were lost or doubled on the way.
        SourceError: a file can't be read.
        DefinitionError: a feature can't be computed.
        ResourceError: memory or disk are too small; it says what to do.
    """
    buckets, groups = bucket_count(plan), len(plan.groups)
    previous = [latest(reservation.root, reservation.dataset) for reservation in reservations]
    lookups = [read_lookup(lookup, plan.rows_per_bucket) for lookup in plan.lookups]
    tables = tuple(categorised(plan, lookup) for lookup in lookups)
    job = Job(plan, tuple(reservations), tuple(_splits(plan)), buckets, tables, config.join, created)
    columns: list[tuple[str, ...]] = [()] * groups

    def on_summary(summary: BucketSummary) -> None:
        columns[summary.group], summary.numeric = summary.numeric, ()

    started = time.monotonic()
    with losses_explained(config.less_at_once):
        done = shuffle(
            Parts(len(job.splits)),
            groups * buckets,
            job.scatter,
            job.gather,
            names=(f"read {plan.events.name}", "compute features"),
            volume=_packed_bytes(plan),
            lanes=groups,
            typed=job.typed,
            on_scattered=on_read,
            on_gathered=on_computed,
            on_summary=on_summary,
        )
        computed = time.monotonic()
        before = tuple(manifest.profile if manifest is not None else {} for manifest in previous)
        profiling = Profiling(buckets, tuple(columns), plan.as_of, before, config.thresholds)
        profiles = _profiles(profiling, done)
        results = [_results(job, number, done, profiles[number]) for number in range(groups)]
        written = _write(job, done.tables, results, config.thresholds)
    timings = {"read and compute": computed - started, "score and write": time.monotonic() - computed}
    return [
        _finish(
            job,
            result,
            written[number],
            [lookup for lookup in lookups if _joins(plan.groups[number], lookup)],
            timings,
            compared=version.version if version is not None else None,
        )
        for number, (result, version) in enumerate(zip(results, previous, strict=True))
    ]


def compared(computed: ComputedGroup, previous: Manifest | None) -> ComputedGroup:
    """Return a group whose drift can be judged against a version.

    If another version was the last one when the group was computed, its files are read and profiled again.
    """
    if previous is None or previous.version == computed.compared:
        return computed
    profile: TableProfile | None = None
    for entry in computed.files:
        data = storage.read_bytes(layout.join(computed.reservation.uri, entry.path))
        profile = added(profile, profile_table(pq.read_table(pa.BufferReader(data), columns=list(computed.features))))
    assert profile is not None, "a group has a file"
    partials = {**computed.profile.partials, **profile.partials}
    return replace(computed, profile=TableProfile(profile.rows, partials), drift={}, compared=previous.version)


def _profiles(profiling: Profiling, done: Shuffled[UnitNote, BucketSummary]) -> list[GroupProfile]:
    """Profile the numeric features of all buckets."""
    groups, figures = range(len(profiling.columns)), list[ColumnFigures]()
    if profiling.slots:
        figures = shuffle(
            done.tables,
            profiling.slots,
            profiling.scatter,
            profiling.gather,
            names=("profile features", "merge profiles"),
            volume=profiling.volume(done.rows.tolist()),
        ).summaries
    return [profiling.of_group(group, figures) for group in groups]


def pieces_to_read(plan: FeaturePlan) -> int:
    """Return the number of pieces of files that the job will read."""
    return sum(1 for _ in _splits(plan))


def _packed_bytes(plan: FeaturePlan) -> int:
    """Return the approximate bytes of all rows in the shuffle."""
    kinds = {column.name: column.kind for column in plan.events.rows.columns}
    row_bytes = sum(PACKED_BYTES[kinds.get(name, "any")] for group in plan.groups for name in group.columns)
    return plan.read_table.estimated_rows() * row_bytes


def _splits(plan: FeaturePlan) -> Iterator[Split]:
    numbers = {file.info.uri: number for number, file in enumerate(plan.events.table.files)}

    def readers(unit: ReadUnit) -> tuple[bool, ...]:
        return tuple(plan.reads(group, numbers[unit.uri]) for group in range(len(plan.groups)))

    units = plan.events.units(plan.rows_per_bucket, plan.read_table)
    for index, own in enumerate(together(units, plan.rows_per_bucket, readers)):
        yield Split(plan.events, None, index, own, tuple(numbers[unit.uri] for unit in own))
    for group, planned in enumerate(plan.groups):
        if planned.dimension is not None:
            units = planned.dimension.units(plan.rows_per_bucket)
            for index, own in enumerate(together(units, plan.rows_per_bucket)):
                yield Split(planned.dimension, group, index, own)


def _joins(planned: GroupPlan, lookup: LookedUp) -> bool:
    """Return True if a group uses a look-up that isn't balanced as the group's dimension."""
    joined = planned.dimension.name if planned.dimension is not None else None
    return lookup.balance.name != joined and bool(set(lookup.plan.columns) & set(planned.columns))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """Result of a group before its rows are scored.

    profile: of the numeric features. rows: of each bucket's table.
    """

    number: int
    notes: Sequence[UnitNote]
    summaries: Sequence[BucketSummary]
    balances: tuple[RowBalance, ...]
    profile: GroupProfile
    rows: Int64Array


def _results(
    job: Job,
    number: int,
    done: Shuffled[UnitNote, BucketSummary],
    profile: GroupProfile,
) -> _Result:
    """Add up the tasks' reports on a group."""
    members = slice(number * job.buckets, (number + 1) * job.buckets)
    summaries = done.summaries[members]
    return _Result(
        number=number,
        notes=done.notes,
        summaries=summaries,
        balances=_group_balances(job, number, done.notes, summaries, done.carried[:, number]),
        profile=profile,
        rows=done.rows[members],
    )


@dataclass(slots=True)
class _Files:
    """Written files of a group, by their buckets, and what they add up to; schema: of the first bucket's file."""

    entries: dict[int, FileEntry] = field(default_factory=dict)
    first: int = 0
    schema: pa.Schema | None = None
    profile: TableProfile | None = None
    ready: int = 0


def _write(job: Job, tables: Parts, results: Sequence[_Result], thresholds: Thresholds) -> list[_Files]:
    """Score the rows of all buckets and write a file for each that has rows.

    A group without any row still has one file: a schema for the gate to judge.
    """
    writers = [
        partial(
            write_part,
            planned=job.plan.groups[result.number],
            reservation=job.reservations[result.number],
            bounds=result.profile.fences,
            thresholds=thresholds,
        )
        for result in results
    ]
    empty = [not result.rows.any() for result in results]
    buckets = job.buckets

    def score_and_write(slot: int, table: pa.Table) -> tuple[int, WrittenPart] | None:
        number, part = divmod(slot, buckets)
        if not table.num_rows and not (empty[number] and part == 0):
            return None
        return slot, writers[number](table, part)

    written = [_Files() for _ in results]
    for made in mapped(tables, score_and_write, name="score and write"):
        if made is not None:
            slot, part = made
            files, bucket = written[slot // buckets], slot % buckets
            if files.schema is None or bucket < files.first:
                files.schema, files.first = part.schema, bucket
            files.entries[bucket] = part.entry
            files.profile = added(files.profile, part.profile)
            files.ready += part.ready
    return written


def _finish(
    job: Job,
    result: _Result,
    written: _Files,
    lookups: Sequence[LookedUp],
    timings: Mapping[str, float],
    *,
    compared: int | None,
) -> ComputedGroup:
    """Return the result of one group."""
    number, notes, summaries, balances = result.number, result.notes, result.summaries, result.balances
    planned, reservation = job.plan.groups[number], job.reservations[number]
    files = tuple(entry for _, entry in sorted(written.entries.items()))
    assert written.schema is not None, "a group has a file"
    features = tuple(feature_columns(written.schema.names, planned))
    entities = balances[-1]
    handed_on, in_files = int(result.rows.sum()), sum(entry.rows for entry in files)
    check_equal(reservation.dataset, entities.rows_out, handed_on, "of features were computed, {} were handed on")
    check_equal(reservation.dataset, handed_on, in_files, "of features were handed on, {} were written")
    newest = [summary.events.newest for summary in summaries if summary.events.newest is not None]
    by_file = sum((summary.events.by_file for summary in summaries), Counter[int]())
    rejected = [note.rejected_files[number] for note in notes if number in note.rejected_files]
    rejected += [entry for summary in summaries for entry in summary.rejected_files]
    rejected += [entry for lookup in lookups for entry in lookup.write_rejected(reservation)]
    return ComputedGroup(
        reservation=reservation,
        files=files,
        rejected_files=tuple(rejected),
        side_files=tuple(summary.events.file for summary in summaries if summary.events.file is not None),
        state=job.plan.states[number].record(by_file, len(job.plan.events.table.files), job.buckets)
        if job.plan.states
        else None,
        schema=written.schema,
        profile=_whole_profile(written, result.profile, features),
        balances=(*balances[:-1], *(lookup.balance for lookup in lookups), entities),
        features=features,
        duplicate_keys=sum(summary.duplicate_keys for summary in summaries),
        suspects=tuple(sorted({key for summary in summaries for key in summary.suspects})),
        group=planned.group,
        as_of=job.plan.as_of[-1],
        times=tuple(job.plan.as_of),
        unmatched=sum(summary.unmatched for summary in summaries),
        ready=written.ready,
        newest_event=max(newest) if newest else None,
        drift=result.profile.drift,
        compared=compared,
        timings=dict(timings),
    )


def _whole_profile(written: _Files, numbers: GroupProfile, features: Sequence[str]) -> TableProfile:
    """Return the data files' profile in their order of columns; the numeric features were profiled for the fences.

    Only features that the gate may compare with another version keep their counts of values.
    """
    rest = written.profile
    assert rest is not None, "a group has a file"
    assert written.schema is not None, "and so it has a schema"
    others = {name: one if name in features else one.without_sketches() for name, one in rest.partials.items()}
    partials = {**others, **numbers.partials}
    return TableProfile(rest.rows, {name: partials[name] for name in written.schema.names})


def _group_balances(
    job: Job, number: int, notes: Sequence[UnitNote], summaries: Sequence[BucketSummary], sent: Int64Array
) -> tuple[RowBalance, ...]:
    """Return the balances of the events, the dimension and the entities of a group, each checked.

    Events kept by earlier versions have a separate balance.

    Args:
        job: The job.
        number: Number of the group.
        notes: One a split.
        summaries: One a bucket of the group.
        sent: Rows that each split sent to the group's buckets.

    Raises:
        BalanceError: rows were lost or doubled; it has the figures.
    """
    planned = job.plan.groups[number]
    balances = _event_balances(job, number, notes, summaries, sent)
    if planned.dimension is not None:
        balances.append(_dimension_balance(job, number, notes, summaries, sent))
    entities = Tally()
    for summary in summaries:
        entities.add(summary.entities)
    balances.append(entities.balance(planned.group.name))
    for balance in balances:
        balance.check()
    return tuple(balances)


def _event_balances(
    job: Job, number: int, notes: Sequence[UnitNote], summaries: Sequence[BucketSummary], sent: Int64Array
) -> list[RowBalance]:
    """Return the balance of the events read and, in an incremental run, of those kept by earlier versions."""
    planned, source = job.plan.groups[number], job.plan.events
    own = [index for index, split in enumerate(job.splits) if job.reads(number, split)]
    events = Tally()
    for index in own:
        events.add(notes[index].tally)
    check_rows_read(source, [unit for index in own for unit in job.splits[index].units], events)
    _filter(events, f"null_{planned.group.entity}", sum(notes[index].without_entity[number] for index in own))
    arrived = [summary.events for summary in summaries]
    check_way(source.name, events.rows_out, int(sent[own].sum()), sum(tally.new for tally in arrived))
    _filter(events, AFTER_AS_OF, sum(tally.new_late for tally in arrived))
    balances = [events.balance(source.name)]
    if job.plan.states and job.plan.states[number].links:
        balances.append(_kept_balance(job, number, arrived))
    return balances


def _kept_balance(job: Job, number: int, arrived: Sequence[EventTally]) -> RowBalance:
    """Return the balance of the events kept by earlier versions."""
    state, count = job.plan.states[number], sum(tally.kept for tally in arrived)
    name = f"{job.plan.events.name} kept by v{state.parent}"
    check_equal(name, state.rows, count, "are kept, {} were read")
    kept = Tally(rows_in=count, rows_out=count)
    _filter(kept, AFTER_AS_OF, sum(tally.kept_late for tally in arrived))
    return kept.balance(name)


def _dimension_balance(
    job: Job, number: int, notes: Sequence[UnitNote], summaries: Sequence[BucketSummary], sent: Int64Array
) -> RowBalance:
    dimension = job.plan.groups[number].dimension
    assert dimension is not None, "only a group with a dimension has its balance"
    own = [index for index, split in enumerate(job.splits) if split.group == number]
    read, kept = Tally(), Tally()
    for index in own:
        read.add(notes[index].tally)
    for summary in summaries:
        kept.add(summary.dimension)
    check_rows_read(dimension, [unit for index in own for unit in job.splits[index].units], read)
    check_way(dimension.name, read.rows_out, int(sent[own].sum()), kept.rows_in)
    read.pass_on(kept)
    return read.balance(dimension.name)


def _filter(tally: Tally, reason: str, rows: int) -> None:
    """Count kept rows as filtered."""
    if rows:
        tally.rows_out -= rows
        tally.filtered[reason] += rows
