"""All-to-all exchange: rows that belong together come to one place, whichever file they stood in.

Why this isn't `Dataset.repartition(keys=…)` or `groupby`: Ray Data's shuffle brings the same rows to the same
place through several copies of its own, and takes over three times as long on 10 million rows
(`python -m tests.benchmarks.feature_store --repartition` shows both). Here a task packs the rows of each bucket
once, as an Arrow stream, straight into Ray's object store, and the task of the bucket maps them from there. What Ray
gives stays: objects spill to disk when the store is full, a lost one is made again, tasks run wherever the cluster
has a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import polars as pl
import pyarrow as pa
import ray
import ray.exceptions

from tasks.core.errors import PipelineError
from tasks.core.partition import Packed, pack, unpack

Note = TypeVar("Note")
Summary = TypeVar("Summary")


@dataclass(frozen=True, slots=True)
class Exchanged(Generic[Note, Summary]):
    """What an exchange gives: a note a unit, a summary and a reference to an Arrow table a bucket, in order."""

    notes: list[Note]
    summaries: list[Summary]
    tables: list[ray.ObjectRef[Any]]


def exchange(
    units: int,
    buckets: int,
    scatter: Callable[[int], tuple[Note, list[pl.DataFrame]]],
    gather: Callable[[int, list[pl.DataFrame]], tuple[Summary, pa.Table]],
    *,
    on_note: Callable[[Note], None] = lambda _: None,
    on_summary: Callable[[Summary], None] = lambda _: None,
) -> Exchanged[Note, Summary]:
    """Run `scatter` on each unit, bring the frames of each bucket together, run `gather` on each bucket.

    Args:
        units: Number of units of input.
        buckets: Number of buckets.
        scatter: Unit number → a note and one frame a bucket; runs in a Ray task of one CPU.
        gather: Bucket number and its frames, one a unit in the units' order → a summary and a table, likewise.
        on_note: Called in the driver with each unit's note as it is finished.
        on_summary: Called in the driver with each bucket's summary as it is finished.

    Raises:
        PipelineError: what `scatter` or `gather` raised on purpose; the tasks that were still to run are cancelled.
        RayTaskError: they failed otherwise, likewise.

    """
    # Both functions carry the whole plan with them: stored once, not once a task.
    scatter_ref, gather_ref = ray.put(scatter), ray.put(gather)
    scattered: list[Any] = [
        _scatter_unit.options(num_returns=buckets + 1).remote(scatter_ref, unit, buckets) for unit in range(units)
    ]
    notes = collect([refs[0] for refs in scattered], on_note)
    gathered: list[Any] = [
        _gather_bucket.remote(gather_ref, bucket, *(refs[bucket + 1] for refs in scattered))
        for bucket in range(buckets)
    ]
    # From here on only the gathering tasks hold the packed rows, so each is freed when its task is done.
    del scattered
    summaries = collect([summary for summary, _ in gathered], on_summary)
    return Exchanged(notes, summaries, [table for _, table in gathered])


def collect(refs: Sequence[ray.ObjectRef[Any]], on_result: Callable[[Any], None]) -> list[Any]:
    """Results of tasks in the order of refs; each is shown to `on_result` as soon as it is there.

    Raises:
        PipelineError: what a task raised on purpose; those that were still to run are cancelled.
        RayTaskError: a task failed otherwise, likewise.

    """
    results: dict[ray.ObjectRef[Any], Any] = {}
    waiting = list(refs)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            for ref in done:
                results[ref] = _get(ref)
                on_result(results[ref])
    except BaseException:
        for ref in waiting:
            ray.cancel(ref, recursive=True)
        raise
    return [results[ref] for ref in refs]


def _get(ref: ray.ObjectRef[Any]) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as fault:
        # What we raised on purpose is a sentence for the user; Ray would bury it in the worker's traceback.
        if isinstance(fault.cause, PipelineError):
            raise fault.cause from fault
        raise


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def _scatter_unit(scatter: Callable[[int], tuple[Any, list[pl.DataFrame]]], unit: int, buckets: int) -> list[Any]:
    note, frames = scatter(unit)
    assert len(frames) == buckets, f"unit {unit} gave {len(frames)} frames for {buckets} buckets"
    return [note, *(pack(frame) for frame in frames)]


@ray.remote(num_cpus=1, num_returns=2, scheduling_strategy="SPREAD")
def _gather_bucket(
    gather: Callable[[int, list[pl.DataFrame]], tuple[Any, pa.Table]], bucket: int, *packed: Packed
) -> tuple[Any, pa.Table]:
    return gather(bucket, [unpack(rows) for rows in packed])
