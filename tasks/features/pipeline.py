"""The feature-store jobs on Ray: one exchange computes all groups of a source, a Ray Data job scores and writes.

    read units ─ judge ─ look up ─ split by entity ─┐
                                                    ├─ exchange ─ evaluate ─ join ─ profile ─ score ─ write
    dimension files ─ judge ─ split by key ─────────┘

Nothing here is visible to readers until the versions are committed.
"""

from __future__ import annotations

import datetime as dt
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from tasks.core.cluster import LOST_WORKER_RETRIES, data_context, object_store_bytes
from tasks.core.conservation import check_equal
from tasks.core.exchange import Exchanged, exchange, losses_explained
from tasks.core.manifest import ColumnSpec, FileEntry, RowBalance
from tasks.core.profile import TableProfile, merge_profiles
from tasks.core.reservation import Reservation
from tasks.core.sketch import QuantileSketch
from tasks.features.balances import group_balances
from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.lookups import LookedUp, categorised, read_lookup
from tasks.features.parts import WrittenPart, feature_columns, write_part
from tasks.features.plan import FeaturePlan, GroupPlan
from tasks.features.scoring import Fences, fences
from tasks.features.stages import PART, Job, Unit
from tasks.features.tallies import BucketSummary, UnitNote

MAX_BUCKETS = 256
SNAPSHOTS_PER_BUCKET = 8
"""As-of times whose rows take about the memory that the events themselves take, with some ten events an entity."""

MAX_WAVES = 8
STORE_SHARE = 0.7
"""Of the object store that one wave's rows may take; Ray begins to spill at 0.8."""

PACKED_BYTES = {"key": 5, "time": 8, "number": 8, "category": 3, "any": 16}
"""Bytes that a value of each kind takes on its way, about."""

Progress = Callable[[int], None]
Sketches = dict[str, QuantileSketch]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedGroup:
    """What was written for one group, and what is known of it; nothing is committed yet.

    suspects: keys that look like missing values.
    entities, unmatched, ready: rows, so an entity counts once for each as-of time that it has features at.
    side_files, state: the events that an incremental run has kept, and what the manifest's definition says of them.
    """

    reservation: Reservation
    files: tuple[FileEntry, ...]
    rejected_files: tuple[FileEntry, ...]
    side_files: tuple[FileEntry, ...]
    state: Mapping[str, Any] | None
    schema: pa.Schema
    profile: TableProfile
    balances: tuple[RowBalance, ...]
    features: tuple[str, ...]
    duplicate_keys: int
    suspects: tuple[str, ...]
    entities: int
    unmatched: int
    ready: int
    newest_event: dt.datetime | None
    timings: dict[str, float]

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """Schema of the data files, for the manifest."""
        return tuple(ColumnSpec(name=f.name, type=str(f.type), nullable=f.nullable) for f in self.schema)


def bucket_count(plan: FeaturePlan) -> int:
    """Buckets a group: so many that each holds about `rows_per_bucket` events, whatever the cluster's size.

    A power of two, so that the buckets of versions of different sizes lie within each other. A long history has more
    of them, for the rows that come out.
    """
    rows = plan.events.table.estimated_rows() * max(1, len(plan.as_of) // SNAPSHOTS_PER_BUCKET)
    wanted = max(1, min(MAX_BUCKETS, -(-rows // plan.rows_per_bucket)))
    return 1 << (wanted - 1).bit_length()


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
        plan: What to compute.
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
    buckets = bucket_count(plan)
    lookups = [read_lookup(lookup, plan.rows_per_bucket) for lookup in plan.lookups]
    tables = tuple(categorised(plan, lookup) for lookup in lookups)
    job = Job(plan, tuple(reservations), tuple(_units(plan)), buckets, tables, config.join, created)
    started = time.monotonic()
    quantiles: list[list[Sketches]] = [[] for _ in plan.groups]
    explained = partial(losses_explained, f"lower --rows-per-bucket (it is {config.rows_per_bucket:,})")
    with explained():
        done = _exchange_in_waves(job, quantiles, on_read, on_computed)
    compute_seconds = time.monotonic() - started
    computed = []
    for number in range(len(plan.groups)):
        own = slice(number * buckets, (number + 1) * buckets)
        started = time.monotonic()
        with explained():
            group = _finish(
                job,
                number,
                Exchanged(done.notes, done.summaries[own], done.tables[own], done.carried[:, own], done.rows[own]),
                [lookup for lookup in lookups if _joins(plan.groups[number], lookup)],
                quantiles=quantiles[number],
                thresholds=config.thresholds,
            )
        timings = {"read and compute (all groups)": compute_seconds, "score and write": time.monotonic() - started}
        computed.append(replace(group, timings=timings))
    return computed


def _exchange_in_waves(
    job: Job, quantiles: list[list[Sketches]], on_read: Progress, on_computed: Progress
) -> Exchanged[UnitNote, BucketSummary]:
    """Exchange some slots at a time, so many that their rows stay within the object store, reading anew for each wave.

    Reading a Parquet unit again takes a tenth of the time that its rows take to spill to disk and to come back.
    The quantiles of each group at each as-of time are added up as they come, since those of all buckets are large.
    """

    def on_summary(summary: BucketSummary) -> None:
        found, summary.quantiles = summary.quantiles, []
        sums = quantiles[summary.group]
        quantiles[summary.group] = [_merged(*pair) for pair in zip(sums, found, strict=True)] if sums else found
        on_computed(1)

    notes: list[UnitNote] = []
    summaries: list[BucketSummary] = []
    tables: list[Any] = []
    carried, rows = [], []
    for wave in _waves(job.plan):
        done = exchange(
            len(job.units),
            len(wave),
            partial(job.scatter, wave),
            partial(job.gather, wave),
            on_note=lambda _: on_read(1),
            on_summary=on_summary,
        )
        notes = notes or done.notes
        summaries += done.summaries
        tables += done.tables
        carried.append(done.carried)
        rows.append(done.rows)
    return Exchanged(notes, summaries, tables, np.concatenate(carried, axis=1), np.concatenate(rows))


def _merged(one: Sketches, other: Sketches) -> Sketches:
    return {name: sketch.merge(other[name]) for name, sketch in one.items()}


def pieces_to_read(plan: FeaturePlan) -> int:
    """Pieces of files that the job will read, in all its waves."""
    return len(_waves(plan)) * sum(1 for _ in _units(plan))


def _waves(plan: FeaturePlan) -> list[range]:
    """Slots in turns, by the rows' estimated size on their way and the object store's."""
    kinds = {column.name: column.kind for column in plan.events.rows.columns}
    row_bytes = sum(PACKED_BYTES[kinds.get(name, "any")] for group in plan.groups for name in group.columns)
    volume = plan.read_table.estimated_rows() * row_bytes
    count = -(-volume // max(1, int(STORE_SHARE * object_store_bytes())))
    slots = bucket_count(plan) * len(plan.groups)
    # Text is slow to parse again, and far too large data would be read too often: those spill instead.
    count = 1 if any(file.format == "csv" for file in plan.read_table.files) else max(1, min(count, MAX_WAVES, slots))
    bounds = [slots * wave // count for wave in range(count + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def _units(plan: FeaturePlan) -> Iterator[Unit]:
    numbers = {file.info.uri: number for number, file in enumerate(plan.events.table.files)}
    for index, unit in enumerate(plan.events.units(plan.rows_per_bucket, plan.read_table)):
        yield Unit(plan.events, None, index, unit, numbers[unit.uri])
    for number, planned in enumerate(plan.groups):
        if planned.dimension is not None:
            for index, unit in enumerate(planned.dimension.units(plan.rows_per_bucket)):
                yield Unit(planned.dimension, number, index, unit)


def _joins(planned: GroupPlan, lookup: LookedUp) -> bool:
    """Whether a group's events are completed by a look-up whose rows the group doesn't balance as its dimension."""
    own = planned.dimension.name if planned.dimension is not None else None
    return lookup.balance.name != own and bool(set(lookup.plan.columns) & set(planned.columns))


def _finish(
    job: Job,
    number: int,
    done: Exchanged[UnitNote, BucketSummary],
    lookups: Sequence[LookedUp],
    *,
    quantiles: Sequence[Sketches],
    thresholds: Thresholds,
) -> ComputedGroup:
    """Score and write one group, and add up what its tasks reported."""
    planned, reservation = job.plan.groups[number], job.reservations[number]
    notes, summaries, tables = done.notes, done.summaries, done.tables
    balances = group_balances(job, number, notes, summaries, done.carried)
    numbers = merge_profiles([summary.profile for summary in summaries])
    bounds = _fences(job.plan.as_of, numbers, quantiles)
    write = partial(write_part, planned=planned, reservation=reservation, bounds=bounds, thresholds=thresholds)
    # Without a single entity there is still one file: a schema for the gate to judge.
    written = _write(tables, write) if balances[-1].rows_out else [write(ray.get(tables[0]).drop_columns([PART]), 0)]
    entities = balances[-1]
    handed_on, in_files = int(done.rows.sum()), sum(part.entry.rows for part in written)
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
        profile=_whole_profile(written, numbers),
        balances=(*balances[:-1], *(lookup.balance for lookup in lookups), entities),
        features=tuple(feature_columns(written[0].schema.names, planned)),
        duplicate_keys=sum(summary.duplicate_keys for summary in summaries),
        suspects=tuple(sorted({key for summary in summaries for key in summary.suspects})),
        entities=entities.rows_in,
        unmatched=sum(summary.unmatched for summary in summaries),
        ready=sum(part.ready for part in written),
        newest_event=max(newest) if newest else None,
        timings={},
    )


def _fences(
    as_of: Sequence[dt.datetime], numbers: TableProfile, quantiles: Sequence[Sketches]
) -> dict[dt.datetime, dict[str, Fences]]:
    """Fences of each as-of time, from its own rows: what is computed beside it makes no difference."""
    if len(as_of) == 1:
        return {as_of[0]: fences(list(numbers.partials), numbers.quantiles)}

    def quantiles_of(sketches: Sketches, name: str, levels: Sequence[float]) -> npt.NDArray[np.float64]:
        return sketches[name].quantiles(levels)

    return {
        moment: fences(list(sketches), partial(quantiles_of, sketches))
        for moment, sketches in zip(as_of, quantiles, strict=True)
    }


def _whole_profile(written: Sequence[WrittenPart], numbers: TableProfile) -> TableProfile:
    """Profile of the data files in their order of columns; the numeric features were profiled for the fences."""
    rest = merge_profiles([part.profile for part in written])
    partials = {**rest.partials, **numbers.partials}
    return TableProfile(rest.rows, {name: partials[name] for name in written[0].schema.names})


def _write(tables: Sequence[Any], write: Callable[[pa.Table, int], WrittenPart]) -> list[WrittenPart]:
    """Score and write every part in a Ray Data job; parts in order."""

    def write_block(block: pa.Table) -> pa.Table:
        # A block is a part; one that got no entity has no rows, and so no part number.
        written = [
            write(block.filter(pc.equal(block[PART], part)).drop_columns([PART]), part)
            for part in block[PART].unique().to_pylist()
        ]
        return pa.table({"part": pa.array([pickle.dumps(part) for part in written], pa.large_binary())})

    with data_context():
        dataset = ray.data.from_arrow_refs(list(tables)).map_batches(
            write_block,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            max_retries=LOST_WORKER_RETRIES,  # Ray Data would try for ever
        )
        # What comes back was made by our own tasks a moment ago, so it may be unpickled.
        parts: list[WrittenPart] = [pickle.loads(row["part"]) for row in dataset.take_all()]  # noqa: S301
    return sorted(parts, key=lambda part: part.entry.path)
