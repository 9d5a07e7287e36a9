"""A small publisher on the commit protocol, for tests that run it in this process, in many, or kill it half-way."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import pyarrow as pa

from tasks.io import storage
from tasks.io.errors import PipelineError, VersionConflict
from tasks.store import versions
from tasks.store.manifest import ColumnSpec, FileEntry, GateResult, Manifest, RowBalance, Status, Verdict
from tests.manifests import manifest

DATASET = "feature-store/customer-features"
ROWS, PARTS = 50, 2
LOST_THE_RACE = r"superseded by attempt|was committed by attempt|was removed while it was written"
"""Messages of the attempts that didn't publish; which one depends on how far they had come."""


def table(run_id: str, index: int) -> pa.Table:
    """Rows that say which run wrote them."""
    return pa.table({"id": range(index * ROWS, (index + 1) * ROWS), "run": [run_id] * ROWS})


def write(reservation: versions.Reservation) -> list[FileEntry]:
    """All data files of an attempt."""
    return [
        reservation.entry(storage.write_parquet(table(reservation.run_id, index), reservation.data_uri(index)))
        for index in range(PARTS)
    ]


def manifest_of(
    reservation: versions.Reservation,
    files: list[FileEntry],
    *,
    status: Status = "published",
    verdict: Verdict = "pass",
    rejected_files: tuple[FileEntry, ...] = (),
    side_files: tuple[FileEntry, ...] = (),
    lost: int = 0,
    config: dict[str, object] | None = None,
) -> Manifest:
    """Manifest of files; `lost` rows are unaccounted for."""
    rows = sum(file.rows for file in files)
    return manifest(
        reservation,
        status=status,
        files=tuple(files),
        rejected_files=rejected_files,
        side_files=side_files,
        columns=(ColumnSpec(name="id", type="int64"), ColumnSpec(name="run", type="string")),
        balances=(RowBalance(name="transactions", rows_in=rows + lost, rows_out=rows),),
        gate=GateResult(verdict=verdict, checks=()),
        config=config or {},
    )


def publish(root: str, run_id: str, dataset: str = DATASET) -> Manifest:
    """Reserve, write and commit."""
    reservation = versions.reserve(root, dataset, run_id)
    versions.discard_attempt_files(reservation)
    return versions.commit(reservation, manifest_of(reservation, write(reservation)))


def race(root: str, name: str, times: int, start: Barrier, result: Connection) -> None:
    """Publish some versions as fast as possible, together with other processes."""
    start.wait(60)
    try:
        result.send([publish(root, f"{name}-{turn}").version for turn in range(times)])
    except PipelineError as error:
        result.send(repr(error))


def race_for_one_run(root: str, start: Barrier, result: Connection) -> None:
    """Publish as the same run as other processes do: one of them publishes, the others must conflict or agree."""
    start.wait(60)
    try:
        result.send(publish(root, "same").version)
    except VersionConflict as error:
        result.send(str(error))


def stop_at(root: str, run_id: str, point: str, reached: Connection) -> None:
    """Publish up to a point, say so, and hang there until killed."""

    def hang(*_: object) -> None:
        reached.send(point)
        time.sleep(600)

    reservation = versions.reserve(root, DATASET, run_id)
    if point == "reserved":
        hang()
    if point == "in mid-write":
        storage.write_parquet(table(run_id, 0), reservation.data_uri(0))
        os.replace = hang  # type: ignore[assignment]
        storage.write_parquet(table(run_id, 1), reservation.data_uri(1))
        hang()  # on S3 there is no rename to hang in
    files = write(reservation)
    if point == "before the manifest":
        hang()
    versions.commit(reservation, manifest_of(reservation, files))
    hang()
