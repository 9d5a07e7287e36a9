"""All-to-all exchange: rows that belong together come to one place, whichever file they stood in.

Why this isn't `Dataset.repartition(keys=…)` or `groupby`: Ray Data's shuffle brings the same rows to the same
place through several copies of its own, and takes over three times as long on 10 million rows
(`python -m tests.benchmarks.feature_store --repartition` shows both). Here a task packs the rows of each bucket
once, as an Arrow stream, straight into Ray's object store, and the task of the bucket maps them from there. What Ray
gives stays: objects spill to disk when the store is full, a lost one is made again, tasks run wherever the cluster
has a CPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import ray
import ray.exceptions

from tasks.core.cluster import LOST_WORKER_RETRIES
from tasks.core.errors import BalanceError, DiskFull, PipelineError, WorkersKilled
from tasks.core.partition import Packed, pack, unpack

Note = TypeVar("Note")
Summary = TypeVar("Summary")


@dataclass(frozen=True, slots=True)
class Exchanged(Generic[Note, Summary]):
    """What an exchange gives: a note a unit, a summary and a reference to an Arrow table a bucket, in order.

    carried: rows that went from each unit to each bucket, shape (units, buckets); rows: those of each table.
    """

    notes: list[Note]
    summaries: list[Summary]
    tables: list[ray.ObjectRef[Any]]
    carried: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Counted(Generic[Note]):
    """What a task reports, and the rows that were counted around it."""

    report: Note
    moved: npt.NDArray[np.int64]
    rows: int = 0


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
        BalanceError: rows that were sent didn't arrive, or others did.
        PipelineError: what `scatter` or `gather` raised on purpose; the tasks that were still to run are cancelled.
        RayTaskError: they failed otherwise, likewise.

    """
    # Both functions carry the whole plan with them: stored once, not once a task.
    scatter_ref, gather_ref = ray.put(scatter), ray.put(gather)
    scattered: list[Any] = [
        _scatter_unit.options(num_returns=buckets + 1).remote(scatter_ref, unit, buckets) for unit in range(units)
    ]
    sent = collect([refs[0] for refs in scattered], lambda counted: on_note(counted.report))
    gathered: list[Any] = [
        _gather_bucket.remote(gather_ref, bucket, *(refs[bucket + 1] for refs in scattered))
        for bucket in range(buckets)
    ]
    # From here on only the gathering tasks hold the packed rows, so each is freed when its task is done.
    del scattered
    arrived = collect([summary for summary, _ in gathered], lambda counted: on_summary(counted.report))
    carried = _matrix([counted.moved for counted in sent], (units, buckets))
    _check_carried(carried, _matrix([counted.moved for counted in arrived], (buckets, units)).T)
    return Exchanged(
        notes=[counted.report for counted in sent],
        summaries=[counted.report for counted in arrived],
        tables=[table for _, table in gathered],
        carried=carried,
        rows=np.array([counted.rows for counted in arrived], np.int64),
    )


def _matrix(rows: Sequence[npt.NDArray[np.int64]], shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(shape)


def _check_carried(sent: npt.NDArray[np.int64], arrived: npt.NDArray[np.int64]) -> None:
    different = np.argwhere(sent != arrived)
    if len(different):
        unit, bucket = different[0].tolist()
        raise BalanceError(
            f"{int(sent.sum())} rows were sent, {int(arrived.sum())} arrived: {int((sent - arrived).sum()):+d} "
            f"unaccounted for; unit {unit} sent {sent[unit, bucket]} rows to bucket {bucket}, where "
            f"{arrived[unit, bucket]} arrived"
        )


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
            # By force: what merely interrupts a worker in the middle of an import leaves half a module behind, and
            # every later task of that worker fails for a reason of its own.
            ray.cancel(ref, force=True, recursive=True)
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


@contextlib.contextmanager
def losses_explained(cure: str) -> Iterator[None]:
    """Around a Ray job: what ends it for want of memory or disk becomes a sentence, and isn't tried again.

    Ray has tried by itself `LOST_WORKER_RETRIES` times: what has then killed each worker will kill the next one, too.

    Args:
        cure: What the user can set so that a task needs less memory.

    Raises:
        WorkersKilled: each try of a task lost its worker.
        DiskFull: Ray's object store is full, and so is the disk that it spills to.

    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PipelineError):
            raise
        ours = explained_loss(error, cure, f" at each of its {LOST_WORKER_RETRIES + 1} tries")
        if ours is None:
            raise
        raise ours from error


def explained_loss(error: BaseException, cure: str, often: str = "") -> PipelineError | None:
    """What a user is told of a Ray job, or of a whole task, that ended for want of memory or disk; None otherwise.

    Args:
        error: What Ray raised.
        cure: What the user can set so that a task needs less memory.
        often: How often it happened.

    """
    return next(filter(None, (_explained(link, cure, often) for link in causes(error))), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what Ray carried from a worker, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, ray.exceptions.RayTaskError):
            waiting.append(link.cause)
        waiting.append(link.__cause__)


def _explained(error: BaseException, cure: str, often: str) -> PipelineError | None:
    more = f"{cure}, or give each node more memory, or fewer CPUs so that it runs fewer tasks at once"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        found = re.search(r"was ([\d.]+ ?GB / [\d.]+ ?GB)", str(error))
        used = f" ({found[1]} in use)" if found else ""
        return WorkersKilled(
            f"out of memory: Ray killed the worker of a task{often}, as its node had too little memory left{used}. "
            f"To go on: {more}"
        )
    if isinstance(error, (ray.exceptions.WorkerCrashedError, *_ACTOR_LOSSES)):
        return WorkersKilled(
            f"the worker of a task died{often} without a word, as it does when the system kills it for want of memory "
            f"(its kernel's log tells). To go on: {more}. If there was memory enough, Ray's logs say more: the files "
            "python-core-worker-* in /tmp/ray/session_latest/logs of the node"
        )
    if isinstance(error, ray.exceptions.OutOfDiskError):
        return DiskFull(
            "Ray's object store is full, and so is the disk that it spills to (by default that of /tmp). Make room "
            "there, name another directory in RAY_object_spilling_directory, or make the object store larger "
            "(PIPELINE_OBJECT_STORE_BYTES), and start again"
        )
    return None


_ACTOR_LOSSES = (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError)


@ray.remote(num_cpus=1, max_retries=LOST_WORKER_RETRIES, scheduling_strategy="SPREAD")
def _scatter_unit(scatter: Callable[[int], tuple[Any, list[pl.DataFrame]]], unit: int, buckets: int) -> list[Any]:
    note, frames = scatter(unit)
    assert len(frames) == buckets, f"unit {unit} gave {len(frames)} frames for {buckets} buckets"
    heights = np.array([frame.height for frame in frames], np.int64)
    return [_Counted(note, heights), *(pack(frame) for frame in frames)]


@ray.remote(num_cpus=1, num_returns=2, max_retries=LOST_WORKER_RETRIES, scheduling_strategy="SPREAD")
def _gather_bucket(
    gather: Callable[[int, list[pl.DataFrame]], tuple[Any, pa.Table]], bucket: int, *packed: Packed
) -> tuple[_Counted[Any], pa.Table]:
    frames = [unpack(rows) for rows in packed]
    heights = np.array([frame.height for frame in frames], np.int64)
    summary, table = gather(bucket, frames)
    return _Counted(summary, heights, table.num_rows), table
