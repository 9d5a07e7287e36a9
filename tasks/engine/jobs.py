"""Jobs as Ray Data plans: a function over the parts of a job, and the keyed shuffle that brings rows together.

    parts ─ map_batches(read) ─ repartition(keys=[partition]) ─ map_batches(compute) ─ reports and tables

Rows are packed for the shuffle: all rows that go from one part to one bucket are one row of Ray Data, an Arrow stream
in a binary column. So blocks of several sources and of several groups share a plan, categories and exact types are
preserved, and the shuffle moves few large values: on 10 million rows of transactions, packing and moving them takes as
much CPU time as reading them.

Reports of the functions (counts, files, profiles) travel beside the rows, pickled: only our own processes make and read
them, within one job.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from ray.exceptions import RayTaskError

from tasks.engine.cluster import LOST_WORKER_RETRIES, cluster_cpus, data_context, nodes
from tasks.engine.partition import Frame, pack, unpack
from tasks.io.errors import BalanceError, PipelineError, causes
from tasks.io.tensors import Int64Array
from tasks.store.manifest import check_equal

if TYPE_CHECKING:  # importing it takes longer than a small job: only the processes of a job do
    import ray.data

Note = TypeVar("Note")
Summary = TypeVar("Summary")
Result = TypeVar("Result")
Progress = Callable[[int], None]

MAX_BLOCKS = 128
"""Blocks at the start of a plan, on up to 32 CPUs: a block may hold several parts. Each takes 45 KB and 25 ms of the
driver."""

PARTITION_BYTES = 64 * 2**20
"""Packed rows for one reducing task, approximate bytes."""

SMALL_BYTES = 4 * 2**20
"""Packed rows for which no further process is worth its start, of 1 to 2 s, approximate bytes."""

MIN_BATCH_BYTES, MAX_BATCH_BYTES = 16 * 2**20, 2**30
"""Bytes of packed rows for one mapping task of the shuffle; the second is Ray Data's default bound."""

MAX_PARTITIONS = 1024
"""Most partitions of a shuffle: each mapping task makes one object a partition."""

MAX_SHARDS = 2**15
"""Most such objects in all, unless mapping tasks would be too large: the driver takes 20 KB for each."""

FETCH_SECONDS = 60.0
"""Time that a task of a shuffle's second half waits for some of its rows: rows of a dead node may never come."""

_KEY, _BUCKET, _INDEX, _ROWS = "partition", "bucket", "index", "rows"
_VALUE, _REPORT, _DATA = "value", "report", "data"
_ADVICE = "\nFailed to apply UDF transform"
"""Beginning of the text that Ray Data appends to an error: advice on retries, which isn't for our users."""

_NOTE = -1
"""Bucket number of a row that holds a part's report instead of packed rows."""


def in_blocks(rows: pa.Table) -> ray.data.Dataset:
    """Return rows as the start of a plan: few blocks, however many rows, and with the settings at this time."""
    import ray.data

    count = rows.num_rows
    blocks = min(count, max(MAX_BLOCKS, 4 * cluster_cpus()))
    ends = [count * block // blocks for block in range(blocks + 1)]
    tables = [rows.slice(first, end - first) for first, end in itertools.pairwise(ends)]
    made: ray.data.Dataset = ray.data.from_blocks(tables)  # `from_arrow` would run a task for each, to describe it
    return made


@dataclass(frozen=True, slots=True)
class Parts:
    """Input of a job's steps, processed part by part.

    Attributes:
        count: Number of parts. A step's function gets a part's number first.
        values: Second argument of the function, by part; None: no argument.
        tables: Tables of a shuffle; the function gets the one of its bucket.
    """

    count: int
    values: Sequence[Any] | None = None
    tables: ray.data.Dataset | None = None

    def dataset(self, context: Any) -> ray.data.Dataset:
        """Return the parts as a dataset, a few in each block, that is executed with the settings of a DataContext."""
        if self.tables is not None:
            # A dataset keeps the settings at the time it was made, and so do datasets derived from it.
            vars(self.tables.context).update(vars(context.copy()))
            return self.tables
        rows = pa.table({_INDEX: pa.array(range(self.count), pa.int32())})
        if self.values is not None:
            pickled = pa.array([pickle.dumps(value) for value in self.values], pa.large_binary())
            rows = rows.append_column(_VALUE, pickled)
        return in_blocks(rows)


@dataclass(frozen=True, slots=True)
class Shuffled(Generic[Note, Summary]):
    """Result of a shuffle.

    Attributes:
        notes: Report of each part, in order.
        summaries: Report of each bucket, in order.
        carried: Rows that each part sent, by lane, shape (parts, lanes).
        rows: Rows of each bucket's table, shape (buckets,).
        tables: The buckets' tables, held in Ray's object store: parts of a further step.
    """

    notes: list[Note]
    summaries: list[Summary]
    carried: Int64Array
    rows: Int64Array
    tables: Parts


def mapped(
    source: Parts,
    function: Callable[..., Result],
    *,
    name: str,
    actors: int | None = None,
    num_gpus: float = 0,
) -> Iterator[Result]:
    """Run a function on each part in Ray tasks of one CPU; yield results as they finish, in any order.

    Args:
        source: The parts.
        function: Function to run.
        name: Name of the step in Ray Data's plan and progress.
        actors: Number of processes of a pool that lives as long as the step; None: run in tasks.
        num_gpus: GPUs that a task or process needs.

    Raises:
        PipelineError: the function raised it on purpose.
        RayTaskError: the function failed otherwise, or its worker died each time.
    """

    def run(block: pa.Table) -> Iterator[pa.Table]:
        for item in _items(block):
            yield pa.table({_DATA: pa.array([pickle.dumps(function(*item))], pa.large_binary())})

    if not source.count:
        return
    from tasks.engine.watchers import watched

    with original_errors(), data_context() as context, watched(context, []):
        step = source.dataset(context).map_batches(
            run if actors is None else type(name, (_Runner,), {}),
            **_options(name, run, actors=actors, num_gpus=num_gpus),
        )
        # Our own tasks made the result a moment ago, so it may be unpickled.
        for row in step.iter_rows():
            yield pickle.loads(row[_DATA])  # noqa: S301


class _Runner:
    """Function in a process that lives as long as the step: it loads its state once."""

    def __init__(self, run: Callable[[pa.Table], Iterator[pa.Table]]) -> None:
        self._run = run

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        return self._run(block)


def shuffle(
    source: Parts,
    buckets: int,
    scatter: Callable[..., tuple[Note, Sequence[Frame]]],
    gather: Callable[[int, dict[int, Any]], tuple[Summary, pa.Table]],
    *,
    names: tuple[str, str],
    volume: int,
    lanes: int = 1,
    typed: Sequence[int] = (0,),
    on_scattered: Progress = lambda _: None,
    on_gathered: Progress = lambda _: None,
    on_note: Callable[[Note], None] = lambda _: None,
    on_summary: Callable[[Summary], None] = lambda _: None,
) -> Shuffled[Note, Summary]:
    """Run `scatter` on each part, bring the frames of each bucket together, run `gather` on each bucket.

    Args:
        source: The parts.
        buckets: Number of buckets.
        scatter: Part number (and its table) → a note and one frame a bucket, of Polars or Arrow.
        gather: Bucket number and its frames by part, in the parts' order → a summary and a table. Frames without rows
            don't travel, except those of the parts in `typed`.
        names: Names of the two steps, in Ray Data's plan and progress.
        volume: Approximate bytes of all frames.
        lanes: Number of equal ranges that the buckets are divided into for counting.
        typed: Parts whose frames travel even without rows, for their columns.
        on_scattered: Called with numbers of parts as they are done.
        on_gathered: Called with numbers of buckets as they are done.
        on_note: Called with each note as it arrives, in any order, to remove what needn't be kept.
        on_summary: Called with each summary, likewise.

    Raises:
        BalanceError: rows that were sent didn't arrive, or others did.
        PipelineError: `scatter` or `gather` raised it on purpose.
        RayTaskError: they failed otherwise, or their workers died each time.
    """
    from ray.data import DataContext

    from tasks.engine.watchers import Reached, watched

    count = source.count
    assert typed or not count, "a bucket knows its columns from the frames that were sent to it"
    always = frozenset(typed)
    partitions = _partition_count(buckets, volume)
    keys = partition_keys(partitions)

    def scatter_block(block: pa.Table) -> Iterator[pa.Table]:
        for item in _items(block):
            note, frames = scatter(*item)
            assert len(frames) == buckets, f"part {item[0]} gave {len(frames)} frames for {buckets} buckets"
            yield _sent(item[0], note, frames, keys, with_empty=item[0] in always)

    def gather_block(block: pa.Table) -> Iterator[pa.Table]:
        yield from _gathered(block, gather)

    def gather_nothing(block: pa.Table) -> Iterator[pa.Table]:
        for (bucket,) in _items(block):
            yield _result(bucket, {}, *gather(bucket, {}))

    compression = "none" if len(nodes()) == 1 else "lz4"  # one machine needs no network
    settings: dict[str, Any] = {
        "shuffle_input_batch_bytes": _batch_bytes(volume, partitions),
        "shuffle_compression": compression,
        "hash_shuffle_reduce_get_timeout_s": min(
            DataContext.get_current().hash_shuffle_reduce_get_timeout_s, FETCH_SECONDS
        ),
    }
    watchers = [Reached(names[0], count, on_scattered), Reached(names[1], buckets, on_gathered)]
    with original_errors(), data_context(**settings) as context, watched(context, watchers):
        if count:
            rows = source.dataset(context).map_batches(scatter_block, **_options(names[0], scatter_block))
            grouped = rows.repartition(partitions, keys=[_KEY])
            done = grouped.map_batches(gather_block, **_options(names[1], gather_block)).materialize()
        else:
            step = Parts(buckets).dataset(context)
            done = step.map_batches(gather_nothing, **_options(names[1], gather_nothing)).materialize()
        reports = done.map_batches(_without_data, **_options("report", _without_data))
        return _added_up(reports.iter_rows(), done, (count, buckets, lanes), on_note, on_summary)


@contextlib.contextmanager
def original_errors() -> Iterator[None]:
    """Raise errors that our tasks raised on purpose as they were, not buried in a worker's traceback."""
    try:
        yield
    except Exception as fault:
        # Ray's error is also an instance of our class, but has the traceback as its message.
        ours = next(
            (link for link in causes(fault) if isinstance(link, PipelineError) and not isinstance(link, RayTaskError)),
            None,
        )
        if ours is None:
            raise
        ours.args = (str(ours).partition(_ADVICE)[0], *ours.args[1:])
        if ours is fault:
            raise
        raise ours from fault


def partition_keys(partitions: int) -> list[int]:
    """Return a key for each partition that Ray Data's shuffle brings there.

    Keys that are just numbered would collide by chance: of eight partitions three would get no row.
    """
    from ray.data._internal.arrow_ops.transform_pyarrow import hash_partition

    keys: dict[int, int] = {}
    for first in itertools.count(0, 4 * partitions):
        table = pa.table({_KEY: pa.array(range(first, first + 4 * partitions), pa.int32())})
        for number, rows in hash_partition(table, hash_cols=[_KEY], num_partitions=partitions).items():
            if rows.num_rows:
                keys.setdefault(number, rows[_KEY][0].as_py())
        if len(keys) == partitions:
            return [keys[number] for number in range(partitions)]
    raise AssertionError("unreachable")


def _partition_count(buckets: int, volume: int) -> int:
    for_all_cpus = min(2 * cluster_cpus(), -(-volume // SMALL_BYTES))
    return min(buckets, max(-(-volume // PARTITION_BYTES), for_all_cpus, 1), MAX_PARTITIONS)


def _batch_bytes(volume: int, partitions: int) -> int:
    """Return the bytes for one mapping task of the shuffle: enough tasks for all CPUs, and not too many objects."""
    tasks = min(2 * cluster_cpus(), MAX_SHARDS // partitions)
    return min(max(volume // tasks, MIN_BATCH_BYTES), MAX_BATCH_BYTES)


def _options(name: str, function: Any, *, actors: int | None = None, num_gpus: float = 0) -> dict[str, Any]:
    """Return the options of a `map_batches` whose step is called `name`."""
    function.__name__ = name
    options: dict[str, Any] = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "num_cpus": 1,
    }
    if num_gpus:
        options["num_gpus"] = num_gpus
    # Ray Data would retry for ever, also a task that kills each of its workers.
    if actors is None:
        return {**options, "max_retries": LOST_WORKER_RETRIES}
    from ray.data import ActorPoolStrategy

    return {
        **options,
        "compute": ActorPoolStrategy(size=actors),
        "fn_constructor_args": (function,),
        "max_task_retries": LOST_WORKER_RETRIES,
    }


def _items(block: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Yield the parts in a block: their numbers, with their values if they have some, or buckets and their tables."""
    if _VALUE in block.column_names:
        for index, value in zip(block[_INDEX].to_pylist(), block[_VALUE].to_pylist(), strict=True):
            yield index, pickle.loads(value)  # noqa: S301 - made by the driver
        return
    if _DATA not in block.column_names:
        yield from zip(block[_INDEX].to_pylist(), strict=True)
        return
    for number, (bucket, index) in enumerate(zip(block[_BUCKET].to_pylist(), block[_INDEX].to_pylist(), strict=True)):
        if bucket != _NOTE:
            yield index, unpack(block[_DATA][number].as_buffer())


def _sent(index: int, note: Any, frames: Sequence[Frame], keys: Sequence[int], *, with_empty: bool) -> pa.Table:
    """Return the rows that a part sends, one a bucket, and its note."""
    heights = [len(frame) for frame in frames]
    used = [bucket for bucket, height in enumerate(heights) if height or with_empty]
    report = pickle.dumps((note, np.array(heights, np.int64)))
    return pa.table(
        {
            _KEY: pa.array([keys[number % len(keys)] for number in (*used, index)], pa.int32()),
            _BUCKET: pa.array([*used, _NOTE], pa.int32()),
            _INDEX: pa.array([index] * (len(used) + 1), pa.int32()),
            _ROWS: pa.array([*(heights[bucket] for bucket in used), 0], pa.int64()),
            _DATA: pack([*(frames[bucket] for bucket in used), report]),
        }
    )


def _gathered(block: pa.Table, gather: Callable[[int, dict[int, Any]], tuple[Any, pa.Table]]) -> Iterator[pa.Table]:
    """Yield results of the buckets whose rows are in a block, and the notes in it unchanged."""
    buckets, index, rows = (block[name].to_numpy() for name in (_BUCKET, _INDEX, _ROWS))
    order = np.lexsort((index, buckets))
    bounds = np.flatnonzero(np.diff(buckets[order], prepend=_NOTE - 1, append=np.iinfo(np.int32).max))
    for first, end in itertools.pairwise(bounds.tolist()):
        members = order[first:end].tolist()
        bucket = int(buckets[members[0]])
        values = {int(index[row]): block[_DATA][row].as_buffer() for row in members}
        check_equal(f"bucket {bucket}", len(members), len(values), "parts arrived, {} of them different ones")
        if bucket == _NOTE:
            yield _reported(_NOTE, list(values), [value.to_pybytes() for value in values.values()])
            continue
        frames = {part: unpack(value) for part, value in values.items()}
        for row, (part, frame) in zip(members, frames.items(), strict=True):
            check_equal(f"bucket {bucket}, part {part}", int(rows[row]), len(frame), "rows were sent, {} arrived")
        yield _result(bucket, frames, *gather(bucket, frames))


def _result(bucket: int, frames: Mapping[int, Frame], summary: Any, table: pa.Table) -> pa.Table:
    parts, arrived = np.array(list(frames), np.int32), np.array([len(frame) for frame in frames.values()], np.int64)
    report = pickle.dumps((summary, parts, arrived, table.num_rows))
    return _reported(bucket, [bucket], [report], pack([table]))


def _reported(bucket: int, index: list[int], reports: list[bytes], data: pa.Array | None = None) -> pa.Table:
    return pa.table(
        {
            _BUCKET: pa.array([bucket] * len(index), pa.int32()),
            _INDEX: pa.array(index, pa.int32()),
            _REPORT: pa.array(reports, pa.large_binary()),
            _DATA: pa.nulls(len(index), pa.large_binary()) if data is None else data,
        }
    )


def _without_data(block: pa.Table) -> pa.Table:
    return block.drop_columns([_DATA])


def _added_up(
    reports: Iterator[Mapping[str, Any]],
    tables: ray.data.Dataset,
    shape: tuple[int, int, int],
    on_note: Callable[[Any], None],
    on_summary: Callable[[Any], None],
) -> Shuffled[Any, Any]:
    """Return the reports in order; compare the rows that were sent with those that arrived.

    Args:
        reports: Reports, one a part and one a bucket, in any order.
        tables: The buckets' tables.
        shape: Numbers of parts, buckets and lanes.
        on_note: Called with each note.
        on_summary: Called with each summary.

    Raises:
        BalanceError: they differ, or a report is missing.
    """
    count, buckets, lanes = shape
    notes: dict[int, Any] = {}
    summaries: dict[int, Any] = {}
    sent, arrived = np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)
    carried, taken = np.zeros((count, lanes), np.int64), np.zeros((count, lanes), np.int64)
    rows = np.zeros(buckets, np.int64)
    for row in reports:
        number = row[_INDEX]
        report = pickle.loads(row[_REPORT])  # noqa: S301 - our own tasks made it a moment ago
        if row[_BUCKET] == _NOTE:
            notes[number], heights = report
            on_note(notes[number])
            sent += heights
            carried[number] = heights.reshape(lanes, -1).sum(axis=1)
            continue
        summaries[number], parts, received, rows[number] = report
        on_summary(summaries[number])
        arrived[number] = received.sum()
        taken[parts, number * lanes // buckets] += received
    check_equal("parts of the work", count, len(notes), "were begun, {} have told what they did")
    check_equal("buckets of rows", buckets, len(summaries), "were planned, {} have told what they did")
    for what, before, after in (("bucket", sent, arrived), ("part", carried.ravel(), taken.ravel())):
        different = np.flatnonzero(before != after)
        if len(different):
            first = int(different[0])
            raise BalanceError(
                f"{int(sent.sum())} rows were sent, {int(arrived.sum())} arrived: "
                f"{int(sent.sum() - arrived.sum()):+d} unaccounted for; of {what} {first}, {before[first]} were sent, "
                f"{after[first]} arrived"
            )
    return Shuffled(
        [notes[number] for number in range(count)],
        [summaries[number] for number in range(buckets)],
        carried,
        rows,
        Parts(buckets, tables=tables),
    )
