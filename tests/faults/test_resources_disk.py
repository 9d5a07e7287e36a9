"""Disks that are full, for real: a small tmpfs that is filled up before a step of the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tasks.io import storage
from tasks.io.disk import MIB, PIECE, NewFile
from tasks.io.errors import DiskFull
from tasks.io.storage import ParquetStream
from tasks.store import versions
from tests.faults import three_flows
from tests.faults.small_disk import fill, make_room
from tests.store import publishing
from tests.tables import Proven
from tests.test_runner import eventually

pytestmark = pytest.mark.slow

STEPS = {
    "data": "disk full while data is written",
    "report": "disk full while the report is written",
    "manifest": "disk full while the manifest is written",
}


def assert_told(text: str, disk: Path) -> None:
    for words in (
        "the disk is full",
        str(disk),
        f"of {shutil.disk_usage(disk).total / MIB:,.1f} MiB are free",
        "prune",
    ):
        assert words in text, f"{words!r} isn't told in: {text}"


def by_stream(path: Path) -> None:
    with ParquetStream(str(path), pa.schema([("x", pa.binary())])) as stream:
        for _ in range(8):
            stream.write(pa.table({"x": [os.urandom(PIECE // 2)]}))


def past_the_cache(path: Path) -> None:
    file = NewFile(str(path))
    try:
        file.append(memoryview(os.urandom(3 * PIECE)))
        file.close()
    except BaseException:
        file.discard()
        raise


WRITERS: dict[str, Callable[[Path], object]] = {
    "write_bytes": lambda path: storage.write_bytes(str(path), os.urandom(PIECE)),
    "put_if_absent": lambda path: storage.put_if_absent(str(path), os.urandom(PIECE)),
    "write_parquet": lambda path: storage.write_parquet(pa.table({"x": [os.urandom(PIECE)]}), str(path)),
    "ParquetStream": by_stream,
    "NewFile": past_the_cache,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("left", [0, 100_000, PIECE + 100_000])
def test_whatever_writes_says_that_the_disk_is_full_and_leaves_nothing(writer: str, left: int, disk: Path) -> None:
    fill(disk, left)
    if left > PIECE and writer not in ("ParquetStream", "NewFile"):
        WRITERS[writer](disk / "there")
        assert (disk / "there").stat().st_size >= PIECE
        return
    with pytest.raises(DiskFull) as told:
        WRITERS[writer](disk / "not-there")
    assert_told(str(told.value), disk)
    assert [path.name for path in disk.iterdir()] == ["filler"]
    make_room(disk)
    WRITERS[writer](disk / "there")
    assert {path.name for path in disk.iterdir()} == {"there"}


@pytest.mark.parametrize("step", ["reservation", *STEPS])
def test_a_publisher_on_a_full_disk(step: str, disk: Path, proven: Proven) -> None:
    root = str(disk / "root")
    old = publishing.publish(root, "before")

    def try_it(full: bool) -> None:
        def before(now: str) -> None:
            if full and now == step:
                fill(disk)

        before("reservation")
        reservation = versions.reserve(root, publishing.DATASET, "run")
        versions.discard_attempt_files(reservation)
        before("data")
        files = publishing.write(reservation)
        before("report")
        storage.write_bytes(f"{reservation.uri}/_report.html", b"x" * 10_000)
        before("manifest")
        versions.commit(reservation, publishing.manifest_of(reservation, files))

    with pytest.raises(DiskFull) as told:
        try_it(full=True)
    assert_told(str(told.value), disk)
    assert versions.resolve(root, publishing.DATASET) == old
    assert three_flows.temporary_files(disk) == []
    make_room(disk)
    try_it(full=False)
    assert versions.published_versions(root, publishing.DATASET) == [1, 2], "the number wasn't taken over"
    versions.verify(root, versions.resolve(root, publishing.DATASET))
    if step in STEPS:
        proven(STEPS[step], "publishing", "told with figures, old version stays; with room, the same run publishes")


FILLED = [
    (three_flows.FEATURES, "manifest", "tasks.store.versions:commit"),
    *three_flows.first_by_default(
        (three_flows.IMAGES, "data", "tasks.images.augment:augment_unit"),
        (three_flows.FEATURES, "data", "tasks.features.writer:write_part"),
        (three_flows.DELIVERY, "report", "tasks.publication:write_report"),
        (three_flows.DELIVERY, "data", "tasks.delivery.shuffle:Shuffle.gather"),
    ),
]


@pytest.mark.parametrize(("flow", "step", "function"), FILLED)
def test_a_flow_on_a_full_disk(
    *,
    flow: str,
    step: str,
    function: str,
    disk: Path,
    undisturbed: three_flows.Store,
    run: three_flows.Runner,
    monkeypatch: pytest.MonkeyPatch,
    proven: Proven,
) -> None:
    store = three_flows.copied(undisturbed, disk / "root")
    config = store.config(flow)
    faults = [three_flows.fault(function, does="fill", when="before", disk=str(disk))] if step != "manifest" else []
    with three_flows.Reader(store, flow) as reader, monkeypatch.context() as patch:
        if step == "manifest":  # which the flow's own process writes
            commit = versions.commit
            patch.setattr(versions, "commit", lambda *given: (fill(disk), commit(*given)))
        told = three_flows.assert_failed_at_once(run(flow, config, *faults))
    assert run.struck() == len(faults)
    assert_told(told, disk)
    for dataset in three_flows.DATASETS[flow]:
        assert set(reader.seen[dataset]) == {1}
        assert versions.published_versions(str(store.root), dataset) == [1]
    assert eventually(lambda: three_flows.temporary_files(disk), lambda left: not left) == [], (
        "something of another worker stays"
    )

    make_room(disk)
    ended = run(flow, config)
    assert ended.state.is_completed(), ended.state.message
    [version] = {published.version for published in ended.published}
    three_flows.assert_same_rows(store, flow, version)
    proven(STEPS[step], flow, "told with figures, nothing published, not tried again; with room, same digests")
