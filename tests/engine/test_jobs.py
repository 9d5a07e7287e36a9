"""The engine: every part is done once, rows come whole to their bucket, and what is lost on the way is noticed."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pytest
import ray
import ray.data

from tasks.engine import jobs, watchers
from tasks.engine.cluster import data_context
from tasks.engine.jobs import Parts, mapped, partition_keys, shuffle
from tasks.io.errors import BalanceError, PipelineError, SourceError
from tasks.io.location import is_transient
from tests.benchmarks.growth import References
from tests.test_runner import eventually

pytestmark = pytest.mark.usefixtures("ray_cluster")

NAMES = ("read", "compute")
ROWS, BUCKETS = 100, 6


def read(part: int) -> tuple[str, list[pl.DataFrame]]:
    """A hundred numbers of a part by their remainder; the part with number 1 has none for half of the buckets."""
    rows = pl.DataFrame({"x": range(part * ROWS, (part + 1) * ROWS)})
    frames = [rows.filter(pl.col("x") % BUCKETS == bucket) for bucket in range(BUCKETS)]
    return f"part {part}", [frame.clear() if part == 1 and bucket % 2 else frame for bucket, frame in enumerate(frames)]


def compute(bucket: int, frames: Mapping[int, pl.DataFrame]) -> tuple[list[int], pa.Table]:
    whole = pl.concat(frames.values())
    assert whole.schema == {"x": pl.Int64}
    assert set((whole["x"] % BUCKETS).to_list()) <= {bucket}
    return list(frames), whole.to_arrow()


def tables_of(tables: Parts) -> dict[int, list[int]]:
    def rows(bucket: int, table: pa.Table) -> tuple[int, list[int]]:
        return bucket, table["x"].to_pylist()

    return dict(mapped(tables, rows, name="look"))


@pytest.mark.parametrize("blocks", [1, 2, 2048])
def test_each_part_is_done_once(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    monkeypatch.setattr(jobs, "MAX_BLOCKS", blocks)
    monkeypatch.setattr(jobs, "cluster_cpus", lambda: 0)
    assert sorted(mapped(Parts(5), lambda part: part * part, name="square")) == [0, 1, 4, 9, 16]
    values = [(number, "x" * number) for number in range(4)]
    assert sorted(mapped(Parts(4, values), lambda part, value: (part, value), name="same")) == list(enumerate(values))
    with data_context() as context:
        assert Parts(50).dataset(context).materialize().num_blocks() == min(blocks, 50)


def test_a_pool_of_processes_keeps_what_it_has_loaded() -> None:
    loaded: dict[str, int] = {}

    def load(part: int) -> tuple[int, int]:
        return part, loaded.setdefault("by", os.getpid() * 1000 + part)

    found = dict(mapped(Parts(6), load, name="load", actors=1))
    assert sorted(found) == list(range(6))
    assert len(set(found.values())) == 1


@pytest.mark.parametrize(
    ("partitions", "disk"),
    [(1, False), (4, False), (1024, False), pytest.param(4, True, marks=pytest.mark.nightly)],
)
def test_rows_come_to_their_bucket_in_the_parts_order(
    monkeypatch: pytest.MonkeyPatch, partitions: int, disk: bool
) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "use_disk_based_hash_shuffle", disk)
    monkeypatch.setattr(jobs, "MAX_PARTITIONS", partitions)
    monkeypatch.setattr(jobs, "PARTITION_BYTES", 1)
    told: dict[str, list[int]] = {"read": [], "computed": []}
    done = shuffle(
        Parts(3), BUCKETS, read, compute, names=NAMES, volume=10_000, lanes=2,
        on_scattered=told["read"].append, on_gathered=told["computed"].append,
    )  # fmt: skip
    assert done.notes == ["part 0", "part 1", "part 2"]
    expected = {
        bucket: [n for n in range(3 * ROWS) if n % BUCKETS == bucket and not (bucket % 2 and n // ROWS == 1)]
        for bucket in range(BUCKETS)
    }
    assert tables_of(done.tables) == expected
    assert done.rows.tolist() == [len(rows) for rows in expected.values()]
    assert done.summaries == [[0, 2] if bucket % 2 else [0, 1, 2] for bucket in range(BUCKETS)]  # no empty frames
    sent = [[len(frame) for frame in read(part)[1]] for part in range(3)]
    assert done.carried.tolist() == np.array(sent).reshape(3, 2, 3).sum(axis=2).tolist()
    assert {name: sum(counts) for name, counts in told.items()} == {"read": 3, "computed": BUCKETS}


def test_the_driver_holds_no_object_for_each_part_and_bucket() -> None:
    """What `tests/benchmarks/growth.py` measures, as counts: objects by parts and buckets, not by their product."""
    held = {}
    for parts in (12, 48):
        references = References(0.02)
        gc.collect()
        references.sample()
        earlier = references.most  # what other tests of this process hold
        references.start()
        done = shuffle(
            Parts(parts),
            parts,
            lambda part, parts=parts: (None, [pl.DataFrame({"x": [part]})] * parts),
            lambda _, frames: (len(frames), pl.concat(frames.values()).to_arrow()),
            names=NAMES,
            volume=parts * jobs.PARTITION_BYTES,  # a partition a bucket
        )
        references.stop()
        assert done.summaries == [parts] * parts
        held[parts] = references.most - earlier
    assert held[48] < 48 * 48 / 4, f"{held} objects"
    assert held[48] <= 5 * held[12], f"{held} objects"


@pytest.mark.parametrize("cpus", [2, 64, 1600])
@pytest.mark.parametrize("gibibytes", [0.1, 10, 100])
def test_objects_of_a_shuffle_have_a_bound_on_any_cluster(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gibibytes: float
) -> None:
    monkeypatch.setattr(jobs, "cluster_cpus", lambda: cpus)
    volume = int(gibibytes * 2**30)
    for buckets in (1, 100, 4096):
        partitions = jobs._partition_count(buckets, volume)
        batch = jobs._batch_bytes(volume, partitions)
        few = -(-volume // batch) * partitions <= 1.01 * jobs.MAX_SHARDS + partitions
        assert few or batch == jobs.MAX_BATCH_BYTES
        assert batch <= max(jobs.MIN_BATCH_BYTES, volume // min(2 * cpus, jobs.MAX_SHARDS // partitions))


def test_settings_of_ray_data_are_those_of_before() -> None:
    context = ray.data.DataContext.get_current()
    names = ("shuffle_input_batch_bytes", "shuffle_compression", "custom_execution_callback_classes")
    before = {name: getattr(context, name) for name in names}
    done = shuffle(Parts(3), BUCKETS, read, compute, names=NAMES, volume=10_000)
    assert {name: getattr(context, name) for name in names} == before
    assert done.tables.tables is not None
    assert done.tables.tables.context.shuffle_compression == "none", "the plan had other settings"


def test_tables_of_a_shuffle_are_parts_of_the_next_one() -> None:
    first = shuffle(Parts(3), BUCKETS, read, compute, names=NAMES, volume=10_000)

    def by_tens(bucket: int, table: pa.Table) -> tuple[int, list[pa.Table]]:
        tens = np.array(table["x"]) // 10 % 2
        return bucket, [table.filter(pa.array(tens == even)) for even in (0, 1)]

    def count(_: int, tables: Mapping[int, pa.Table]) -> tuple[dict[int, int], pa.Table]:
        return {bucket: len(table) for bucket, table in tables.items()}, pa.table({})

    done = shuffle(first.tables, 2, by_tens, count, names=("split again", "count"), volume=10_000)
    assert done.notes == list(range(BUCKETS))
    assert sum(sum(counts.values()) for counts in done.summaries) == first.rows.sum()
    assert done.carried.ravel().tolist() == first.rows.tolist()


def test_without_a_part_each_bucket_is_computed_of_nothing() -> None:
    def nothing(bucket: int, frames: Mapping[int, Any]) -> tuple[int, pa.Table]:
        assert frames == {}
        return bucket, pa.table({"x": [bucket]})

    done = shuffle(Parts(0), 3, read, nothing, names=NAMES, volume=0)
    assert (done.notes, done.summaries, done.rows.tolist()) == ([], [0, 1, 2], [1, 1, 1])
    assert tables_of(done.tables) == {0: [0], 1: [1], 2: [2]}


def test_every_partition_has_a_key_that_leads_to_it() -> None:
    for partitions in (1, 2, 7, 64):
        keys = partition_keys(partitions)
        with data_context():
            table = pa.table({"partition": pa.array(keys, pa.int32())})
            found = ray.data.from_arrow(table).repartition(partitions, keys=["partition"]).materialize()
        assert len(set(keys)) == partitions
        blocks = [found.num_blocks(), *(len(block["partition"]) for block in found.iter_batches(batch_size=None))]
        assert blocks == [partitions, *[1] * partitions]


class Loses:
    """What can go wrong with packed rows between two processes."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self, block: pa.Table, gather: Any) -> Any:
        sent = block["bucket"].to_numpy()
        first = int(np.flatnonzero(sent == 0)[0]) if (sent == 0).any() else None
        if first is not None:
            others = np.delete(np.arange(len(block)), first)
            if self._what == "a frame":
                block = block.take(others)
            elif self._what == "doubles a frame":
                block = block.take([*others, first, first])
            elif self._what == "a row":
                [shorter] = jobs.pack([jobs.unpack(block["data"][first].as_buffer())[1:]])
                row = (
                    block.slice(first, 1)
                    .drop_columns(["data"])
                    .append_column("data", pa.array([shorter.as_py()], pa.large_binary()))
                )
                block = pa.concat_tables([block.take(others), row])
        if self._what == "a note":
            block = block.filter(pa.array((sent != -1) | (block["index"].to_numpy() != 2)))
        return ORIGINAL(block, gather)


ORIGINAL = jobs._gathered


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a frame", r"\d+ rows were sent, \d+ arrived: \+\d+ unaccounted for; of bucket 0, \d+ were sent"),
        ("doubles a frame", "bucket 0: 4 parts arrived, 3 of them different ones"),
        ("a row", r"bucket 0, part \d: (\d+) rows were sent, \d+ arrived: \+1 unaccounted"),
        ("a note", "parts of the work: 3 were begun, 2 have told what they did"),
    ],
)
def test_what_is_lost_on_the_way_is_noticed(monkeypatch: pytest.MonkeyPatch, what: str, message: str) -> None:
    monkeypatch.setattr(jobs, "_gathered", Loses(what))
    with pytest.raises(BalanceError, match=message):
        shuffle(Parts(3), BUCKETS, read, compute, names=NAMES, volume=10_000)


def test_the_plan_names_our_steps(caplog: pytest.LogCaptureFixture) -> None:
    done = shuffle(Parts(3), BUCKETS, read, compute, names=("read transactions", "compute features"), volume=1)
    assert done.tables.tables is not None
    told = done.tables.tables.stats()
    steps = ["MapBatches(read transactions)", "HashShuffleMap", "HashShuffleReduce", "MapBatches(compute features)"]
    assert [step for step in steps if step in told] == steps
    assert sorted(steps, key=told.index) == steps


@pytest.mark.parametrize("step", ["scatter", "gather", "mapped"])
def test_what_is_raised_on_purpose_arrives_as_it_was(step: str) -> None:
    def bad_part(part: int) -> tuple[str, Sequence[pl.DataFrame]]:
        if part == 2:
            raise SourceError("row 7 has no price")
        return read(part)

    def bad_bucket(bucket: int, frames: Mapping[int, pl.DataFrame]) -> Any:
        if bucket == 3:
            raise SourceError("row 7 has no price")
        return compute(bucket, frames)

    scatter, gather = bad_part if step == "scatter" else read, bad_bucket if step == "gather" else compute
    with pytest.raises(PipelineError, match=r"^row 7 has no price$") as caught:  # noqa: PT012
        if step == "mapped":
            list(mapped(Parts(3), bad_part, name="fail"))
        else:
            shuffle(Parts(3), BUCKETS, scatter, gather, names=NAMES, volume=1)
    assert type(caught.value) is SourceError


def test_what_still_runs_when_another_part_fails_ends(tmp_path: Path) -> None:
    mark = tmp_path / "pid"

    def linger(part: int) -> None:
        if part == 0:
            partial = mark.with_suffix(".partial")
            partial.write_text(str(os.getpid()))
            partial.rename(mark)
            for _ in range(6000):
                time.sleep(0.1)
        while not mark.exists():
            time.sleep(0.01)
        raise SourceError("row 7 has no price")

    started = time.monotonic()
    with pytest.raises(SourceError, match=r"^row 7"):
        list(mapped(Parts(2), linger, name="linger"))
    assert time.monotonic() - started < 300, "it waited for the other part"
    worker = psutil.Process(int(mark.read_text())) if psutil.pid_exists(int(mark.read_text())) else None
    deadline = time.monotonic() + 60
    while worker is not None and worker.is_running() and "linger" in " ".join(worker.cmdline()):
        assert time.monotonic() < deadline, "the other part goes on"
        time.sleep(0.1)


def test_a_worker_interrupted_while_it_imports_does_not_get_further_tasks(tmp_path: Path) -> None:
    mark, ended = tmp_path / "importing", tmp_path / "ended"
    package = tmp_path / "half"
    package.mkdir()
    (package / "core.py").touch()
    (package / "__init__.py").write_text(
        "import pathlib, time\n"
        "import half.core\n"
        f"mark, ended = pathlib.Path({str(mark)!r}), pathlib.Path({str(ended)!r})\n"
        "if not mark.exists():\n"
        "    mark.touch()\n"
        "    try:\n"
        "        for _ in range(6000):\n"
        "            time.sleep(0.1)\n"
        "    finally:\n"
        "        ended.touch()\n"
        "half.core\n"  # no attribute, if the submodule was imported before its package
    )

    def import_it(part: int) -> int:
        sys.path.insert(0, str(tmp_path))
        import half  # type: ignore[import-not-found]

        return len(half.core.__name__) and part

    def import_or_fail(part: int) -> int:
        if part == 0:
            return import_it(part)
        while not mark.exists():
            time.sleep(0.01)
        raise SourceError("row 7 has no price")

    with pytest.raises(SourceError, match=r"^row 7"):
        list(mapped(Parts(2), import_or_fail, name="fail"))
    assert eventually(ended.exists, lambda there: there)
    assert sorted(mapped(Parts(4), import_it, name="import")) == [0, 1, 2, 3]


def test_a_plan_that_lost_a_node_and_comes_no_further_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/faults/test_ray_nodes.py` kills real ones."""
    alive, idle, clock = {"a": True, "b": True}, set[str](), [0.0]

    def nodes() -> list[dict[str, object]]:
        return [{"NodeID": one, "Alive": up, "DeathReason": 4 if one in idle else 2} for one, up in alive.items()]

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(watchers.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("PIPELINE_NODE_PATIENCE_SECONDS", "10")
    step = SimpleNamespace(metrics=SimpleNamespace(num_tasks_finished=0))
    watch = watchers.Nodes()

    def look(after: float) -> None:
        clock[0] += after
        watch.look([step])

    look(11)  # all nodes are there: a task may take its time
    alive["b"] = False
    look(9)
    step.metrics.num_tasks_finished = 1
    look(9)  # it came further
    look(9)
    with pytest.raises(TimeoutError, match="of 2 Ray nodes 1 were lost, and no task of the job has ended") as e:
        look(2)
    assert is_transient(e.value)
    idle.add("b")  # an autoscaler lets go what holds nothing
    look(60)
    alive["c"] = True
    again = watchers.Nodes()  # the job that runs anew knows of no loss
    clock[0] += 60
    again.look([step])
