"""The feature-store job as a Ray Data plan: a shuffle computes all groups of a source, then all is scored and written.

    read units ─ judge ─ look up ─ split by entity ─┐
                                                    ├─ shuffle ─ evaluate ─ join ─ profile ─ score ─ write
    dimension files ─ judge ─ split by key ─────────┘

Nothing here is visible to readers until the versions are committed.

Rows are balanced from three independent counts: those that the tasks sent, that the shuffle carried, and that the tasks
took must be equal in number; the rows that were read must equal the counts in the files' footers.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from tasks.engine.cluster import losses_explained
from tasks.engine.jobs import Parts, Shuffled, mapped, shuffle
from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.gate import GroupFigures
from tasks.features.plan import FeaturePlan, GroupPlan
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
from tasks.features.writer import Fences, WrittenPart, feature_columns, fences, fences_of, write_part
from tasks.io.memory import released
from tasks.io.tensors import Int64Array
from tasks.quality.profile import TableProfile, added, merge_profiles
from tasks.quality.rules import Written
from tasks.quality.sketch import QuantileSketch
from tasks.store.manifest import FileEntry, RowBalance, check_equal
from tasks.store.reservation import Reservation

MAX_BUCKETS = 4096
SNAPSHOTS_PER_BUCKET = 8
"""As-of times whose rows take about as much memory as the events, with some ten events an entity."""

PACKED_BYTES = {"key": 5, "time": 8, "number": 8, "category": 3, "any": 16}
"""Approximate bytes of a value of each kind in the shuffle."""

Progress = Callable[[int], None]
Sketches = dict[str, QuantileSketch]


@dataclass(frozen=True, slots=True)
class GroupPart:
    """A file of a group, by the group's number."""

    group: int
    part: WrittenPart


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
    lookups = [read_lookup(lookup, plan.rows_per_bucket) for lookup in plan.lookups]
    tables = tuple(categorised(plan, lookup) for lookup in lookups)
    job = Job(plan, tuple(reservations), tuple(_splits(plan)), buckets, tables, config.join, created)
    quantiles: list[list[Sketches]] = [[] for _ in plan.groups]
    numbers: list[TableProfile | None] = [None] * groups

    def on_summary(summary: BucketSummary) -> None:
        # The profiles of all buckets and as-of times are large: they are merged as they come.
        assert summary.profile is not None
        numbers[summary.group] = added(numbers[summary.group], summary.profile)
        found, summary.quantiles, summary.profile = summary.quantiles, [], None
        sums = quantiles[summary.group]
        quantiles[summary.group] = [_merged(*pair) for pair in zip(sums, found, strict=True)] if sums else found

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
        results = [_results(job, number, done, numbers[number], quantiles[number]) for number in range(groups)]
        written = _write(job, done.tables, results, config.thresholds)
    timings = {"read and compute": computed - started, "score and write": time.monotonic() - computed}
    return [
        _finish(
            job,
            result,
            [part for part in written if part.group == number],
            [lookup for lookup in lookups if _joins(plan.groups[number], lookup)],
            timings,
        )
        for number, result in enumerate(results)
    ]


def _merged(one: Sketches, other: Sketches) -> Sketches:
    return {name: sketch.merge(other[name]) for name, sketch in one.items()}


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

    numbers: profile of the numeric features. rows: of each bucket's table.
    """

    number: int
    notes: Sequence[UnitNote]
    summaries: Sequence[BucketSummary]
    balances: tuple[RowBalance, ...]
    numbers: TableProfile
    fences: Mapping[dt.datetime, Mapping[str, Fences]]
    rows: Int64Array


def _results(
    job: Job,
    number: int,
    done: Shuffled[UnitNote, BucketSummary],
    numbers: TableProfile | None,
    quantiles: Sequence[Sketches],
) -> _Result:
    """Add up the tasks' reports on a group."""
    members = slice(number * job.buckets, (number + 1) * job.buckets)
    summaries = done.summaries[members]
    assert numbers is not None, "each group has a bucket"
    return _Result(
        number=number,
        notes=done.notes,
        summaries=summaries,
        balances=_group_balances(job, number, done.notes, summaries, done.carried[:, number]),
        numbers=numbers,
        fences=_fences(job.plan.as_of, numbers, quantiles),
        rows=done.rows[members],
    )


def _write(job: Job, tables: Parts, results: Sequence[_Result], thresholds: Thresholds) -> list[GroupPart]:
    """Score the rows of all buckets and write a file for each that has rows; by group, in the buckets' order.

    A group without any row still has one file: a schema for the gate to judge.
    """
    writers = [
        partial(
            write_part,
            planned=job.plan.groups[result.number],
            reservation=job.reservations[result.number],
            bounds=result.fences,
            thresholds=thresholds,
        )
        for result in results
    ]
    empty = [not result.rows.any() for result in results]
    buckets = job.buckets

    def score_and_write(slot: int, table: pa.Table) -> GroupPart | None:
        number, part = divmod(slot, buckets)
        if not table.num_rows and not (empty[number] and part == 0):
            return None
        return GroupPart(number, writers[number](table, part))

    scored = mapped(tables, score_and_write, name="score and write")
    return sorted(filter(None, scored), key=lambda made: (made.group, made.part.entry.path))


def _finish(
    job: Job,
    result: _Result,
    parts_written: Sequence[GroupPart],
    lookups: Sequence[LookedUp],
    timings: Mapping[str, float],
) -> ComputedGroup:
    """Return the result of one group."""
    number, notes, summaries, balances = result.number, result.notes, result.summaries, result.balances
    planned, reservation = job.plan.groups[number], job.reservations[number]
    written = [made.part for made in parts_written]
    entities = balances[-1]
    handed_on, in_files = int(result.rows.sum()), sum(part.entry.rows for part in written)
    check_equal(reservation.dataset, entities.rows_out, handed_on, "of features were computed, {} were handed on")
    check_equal(reservation.dataset, handed_on, in_files, "of features were handed on, {} were written")
    newest = [summary.events.newest for summary in summaries if summary.events.newest is not None]
    by_file = sum((summary.events.by_file for summary in summaries), Counter[int]())
    rejected = [note.rejected_files[number] for note in notes if number in note.rejected_files]
    rejected += [entry for summary in summaries for entry in summary.rejected_files]
    rejected += [entry for lookup in lookups for entry in lookup.write_rejected(reservation)]
    return ComputedGroup(
        reservation=reservation,
        files=tuple(part.entry for part in written),
        rejected_files=tuple(rejected),
        side_files=tuple(summary.events.file for summary in summaries if summary.events.file is not None),
        state=job.plan.states[number].record(by_file, len(job.plan.events.table.files), job.buckets)
        if job.plan.states
        else None,
        schema=written[0].schema,
        profile=_whole_profile(written, result.numbers),
        balances=(*balances[:-1], *(lookup.balance for lookup in lookups), entities),
        features=tuple(feature_columns(written[0].schema.names, planned)),
        duplicate_keys=sum(summary.duplicate_keys for summary in summaries),
        suspects=tuple(sorted({key for summary in summaries for key in summary.suspects})),
        group=planned.group,
        as_of=job.plan.as_of[-1],
        times=tuple(job.plan.as_of),
        unmatched=sum(summary.unmatched for summary in summaries),
        ready=sum(part.ready for part in written),
        newest_event=max(newest) if newest else None,
        timings=dict(timings),
    )


def _fences(
    as_of: Sequence[dt.datetime], numbers: TableProfile, quantiles: Sequence[Sketches]
) -> dict[dt.datetime, dict[str, Fences]]:
    """Return the fences of each as-of time, from its rows alone: other times make no difference."""
    if len(as_of) == 1:
        return {as_of[0]: fences(list(numbers.partials), numbers.quantiles)}
    return {moment: fences_of(sketches) for moment, sketches in zip(as_of, quantiles, strict=True)}


def _whole_profile(written: Sequence[WrittenPart], numbers: TableProfile) -> TableProfile:
    """Return the data files' profile in their order of columns; the numeric features were profiled for the fences."""
    rest = merge_profiles([part.profile for part in written])
    partials = {**rest.partials, **numbers.partials}
    return TableProfile(rest.rows, {name: partials[name] for name in written[0].schema.names})


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
