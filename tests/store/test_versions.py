"""The commit protocol: whatever is killed, raced or repeated, a version is whole or isn't there."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io import storage
from tasks.io.errors import (
    BalanceError,
    ConfigError,
    CorruptVersion,
    GateFailed,
    Superseded,
    VersionConflict,
    VersionNotFound,
)
from tasks.io.storage import ParquetStream
from tasks.store import layout, versions
from tasks.store.manifest import FileEntry, Manifest, ReportDigest
from tasks.store.versions import withdraw
from tests.store import publishing
from tests.store.publishing import DATASET, PARTS, ROWS, manifest_of, publish, table, write

SPAWN = multiprocessing.get_context("spawn")
ELSEWHERE = versions.Owner(host="other", boot_id="other boot", pid=1, process_start="1")


def dead_owner() -> versions.Owner:
    """A process of this machine that has ended."""
    return versions.current_owner().model_copy(update={"process_start": "0"})


def version_uri(root: str, version: int = 1) -> str:
    return layout.version_uri(storage.normalise(root), DATASET, version)


def files_of(root: str, version: int = 1) -> set[str]:
    uri = version_uri(root, version)
    return {info.uri.removeprefix(uri + "/") for info in storage.list_files(uri, include_hidden=True)}


def assert_whole(root: str, version: int) -> str:
    """Check that a version is one run's and nothing else's; give that run."""
    manifest = versions.resolve(root, DATASET, version)
    versions.verify(root, manifest)
    data = versions.read_table(root, DATASET, version)
    assert data["id"].to_pylist() == list(range(PARTS * ROWS))
    assert data["run"].unique().to_pylist() == [manifest.run.flow_run_id]
    visible = {info.uri for info in storage.list_files(version_uri(root, version))}
    assert visible == set(versions.data_files(root, manifest))
    return manifest.run.flow_run_id


# One publisher


def test_versions_count_up_and_latest_is_the_highest(root: str) -> None:
    assert versions.latest(root, DATASET) is None
    assert versions.published_versions(root, DATASET) == []
    for number in (1, 2, 3):
        assert publish(root, f"run-{number}").version == number
    assert versions.published_versions(root, DATASET) == [1, 2, 3]
    assert [assert_whole(root, number) for number in (1, 2, 3)] == ["run-1", "run-2", "run-3"]
    newest = versions.latest(root, DATASET)
    assert newest == versions.resolve(root, DATASET) == versions.read_manifest(root, DATASET, 3)
    assert versions.read_table(root, DATASET)["run"].unique().to_pylist() == ["run-3"]


def test_nothing_is_readable_before_the_commit(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    write(reservation)
    assert versions.published_versions(root, DATASET) == []
    with pytest.raises(VersionNotFound, match=r"has no published version.*run the flow that publishes it"):
        versions.read_table(root, DATASET)


def test_a_commit_can_be_repeated(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    files = write(reservation)
    first = versions.commit(reservation, manifest_of(reservation, files))
    again = versions.commit(reservation, manifest_of(reservation, files))  # with a later created_at
    assert again == first
    assert versions.reserve(root, DATASET, "other").version == 2


def test_a_committed_run_finds_its_version_and_cannot_damage_it(root: str) -> None:
    first = publish(root, "run")
    reservation = versions.reserve(root, DATASET, "run")
    assert (reservation.version, reservation.committed) == (1, True)
    assert versions.discard_attempt_files(reservation) == []
    files = write(reservation)  # a flow that doesn't look at `committed` and does all again
    assert versions.commit(reservation, manifest_of(reservation, files)) == first
    assert assert_whole(root, 1) == "run"
    assert versions.published_versions(root, DATASET) == [1]


def test_datasets_are_independent_and_listed(root: str) -> None:
    assert versions.list_datasets(root) == []
    names = [layout.feature_dataset("a"), "feature-store/training-ready/model", "training-datasets/images"]
    for name in names:
        assert publish(root, "run", name).version == 1
    storage.write_bytes(layout.join(root, layout.METADATA), b"")
    assert versions.list_datasets(root) == names


def rejected_rows(reservation: versions.Reservation) -> FileEntry:
    uri = reservation.rejected_uri("transactions", 0)
    return reservation.entry(storage.write_parquet(pa.table({"reason": ["null"]}), uri))


def test_a_rejected_version_keeps_its_evidence_and_no_data(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    files = write(reservation)
    rejected = rejected_rows(reservation)
    storage.write_bytes(layout.join(reservation.uri, layout.REPORT_HTML), b"report")
    manifest = manifest_of(reservation, files, status="rejected", verdict="fail", rejected_files=(rejected,))
    versions.commit(reservation, manifest)
    assert versions.commit(reservation, manifest) == manifest
    assert files_of(root) == {"_reservation.json", "_manifest.json", "_report.html", rejected.path}
    assert versions.read_manifest(root, DATASET, 1).files == tuple(files)
    versions.verify(root, manifest)
    assert versions.published_versions(root, DATASET) == []
    with pytest.raises(VersionNotFound, match=r"v1 was rejected by the quality gate \(see .*/v1/_report.html\)"):
        versions.resolve(root, DATASET, 1)
    with pytest.raises(VersionNotFound, match=r"rejected"):
        versions.data_files(root, manifest)
    retried = versions.reserve(root, DATASET, "run")  # the same run, its input repaired
    assert (retried.version, retried.committed) == (2, False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lost": 3}, BalanceError, r"transactions: rows don't balance.*\+3 unaccounted for"),
        ({"lost": 3, "status": "rejected"}, BalanceError, r"don't balance"),
        ({"verdict": "fail"}, GateFailed, r"v1 is not published"),
    ],
)
def test_a_manifest_that_must_not_stand_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    reservation = versions.reserve(str(tmp_path), DATASET, "run")
    with pytest.raises(error, match=message):
        versions.commit(reservation, manifest_of(reservation, write(reservation), **options))
    assert not storage.exists(layout.join(reservation.uri, layout.MANIFEST))


@pytest.mark.parametrize(("damage", "found"), [(None, "no such file"), (b"short", "5 bytes")])
def test_a_manifest_of_files_that_are_not_there_is_refused(root: str, damage: bytes | None, found: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    files = write(reservation)
    if damage is None:
        storage.delete(reservation.data_uri(1))
    else:
        storage.write_bytes(reservation.data_uri(1), damage)
    with pytest.raises(CorruptVersion, match=rf"part-00001-a1.parquet: {files[1].bytes} bytes expected, found {found}"):
        versions.commit(reservation, manifest_of(reservation, files))
    assert versions.published_versions(root, DATASET) == []


# Attempts


def test_a_retry_is_a_new_attempt_that_removes_what_the_first_left(root: str) -> None:
    first = versions.reserve(root, DATASET, "run")
    write(first)
    second = versions.reserve(root, DATASET, "run")
    assert (second.version, second.attempt, second.committed) == (1, 2, False)
    assert second.data_uri(0) != first.data_uri(0)
    assert versions.discard_attempt_files(second) == ["part-00000-a1.parquet", "part-00001-a1.parquet"]
    assert files_of(root) == {"_reservation.json", "_reservation-2.json"}
    versions.commit(second, manifest_of(second, write(second)))
    assert files_of(root) == {
        *("_reservation.json", "_reservation-2.json", "_manifest.json"),
        *("part-00000-a2.parquet", "part-00001-a2.parquet"),
    }


def test_a_later_attempt_may_take_over_files_of_an_earlier_one(root: str) -> None:
    first = versions.reserve(root, DATASET, "run")
    taken, left = write(first)
    second = versions.reserve(root, DATASET, "run")
    assert second.attempt == 2
    own = second.entry(storage.write_parquet(table("run", 7), second.data_uri(7)))
    manifest = versions.commit(second, manifest_of(second, [taken, own]))
    assert versions.data_files(root, manifest) == [f"{second.uri}/{taken.path}", f"{second.uri}/{own.path}"]
    versions.verify(root, manifest)
    assert not storage.exists(f"{second.uri}/{left.path}")


def test_side_files_stay_and_are_verified(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    side, other = (f"{reservation.uri}/{layout.side_name(name, 1)}" for name in ("originals", "other"))
    entry = reservation.entry(storage.write_parquet(table("run", 0), side))
    storage.write_bytes(other, b"a note of the work")
    manifest = versions.commit(reservation, manifest_of(reservation, write(reservation), side_files=(entry,)))
    assert versions.resolve(root, DATASET).side_files == (entry,)
    assert storage.exists(side)
    assert not storage.exists(other)
    versions.verify(root, manifest)
    storage.write_bytes(side, b"altered")
    with pytest.raises(CorruptVersion, match="originals"):
        versions.verify(root, manifest)


def test_a_missing_side_file_is_not_published(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    uri = f"{reservation.uri}/{layout.side_name('originals', 1)}"
    entry = reservation.entry(storage.write_parquet(table("run", 0), uri))
    storage.delete(uri)
    with pytest.raises(CorruptVersion, match=r"originals.*no such file"):
        versions.commit(reservation, manifest_of(reservation, write(reservation), side_files=(entry,)))
    assert versions.latest(root, DATASET) is None


def test_an_older_attempt_cannot_commit_after_a_newer_one_began(root: str) -> None:
    zombie = versions.reserve(root, DATASET, "run")
    files = write(zombie)
    newer = versions.reserve(root, DATASET, "run")
    with pytest.raises(VersionConflict, match=r"attempt 1 of run 'run' was superseded by attempt 2 of run 'run'"):
        versions.commit(zombie, manifest_of(zombie, files))
    versions.commit(newer, manifest_of(newer, write(newer)))
    files = write(zombie)
    with pytest.raises(VersionConflict, match=r"v1 was committed by attempt 2 of run 'run' at 20.*not by attempt 1"):
        versions.commit(zombie, manifest_of(zombie, files))
    assert assert_whole(root, 1) == "run"


def test_an_older_attempt_that_commits_first_stays_whole(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst order: the older attempt has made all its checks when the newer one begins, elsewhere."""
    zombie = versions.reserve(root, DATASET, "run", ELSEWHERE)
    files = write(zombie)
    newer = versions.reserve(root, DATASET, "run")
    assert versions.discard_attempt_files(newer) == []  # it may be alive, as it is
    newer_files = write(newer)
    with monkeypatch.context() as patch:
        patch.setattr(versions, "ensure_newest", lambda _: None)
        versions.commit(zombie, manifest_of(zombie, files))
    with pytest.raises(VersionConflict, match=r"committed by attempt 1 of run 'run'"):
        versions.commit(newer, manifest_of(newer, newer_files))
    assert assert_whole(root, 1) == "run"
    assert versions.reserve(root, DATASET, "run").committed


def write_at_once(reservation: versions.Reservation) -> None:
    write(reservation)


def write_as_a_stream(reservation: versions.Reservation) -> None:
    rows = table(reservation.run_id, 0)
    with ParquetStream(reservation.data_uri(0), rows.schema) as stream:
        stream.write(rows)


@pytest.mark.parametrize("write_late", [write_at_once, write_as_a_stream])
def test_an_attempt_that_still_writes_after_anothers_commit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_late: Callable[[versions.Reservation], None]
) -> None:
    root = str(tmp_path)
    first = versions.reserve(root, DATASET, "same")
    replace = os.replace

    def too_late(source: str, target: str) -> None:
        monkeypatch.undo()
        publish(root, "same")
        replace(source, target)

    monkeypatch.setattr(os, "replace", too_late)
    with pytest.raises(
        VersionConflict, match=r"part-00000-a1.parquet' was removed while .* another attempt has commit"
    ):
        write_late(first)
    assert assert_whole(root, 1) == "same"


def test_a_lost_answer_to_a_create_is_no_conflict(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends again what had arrived, and is told that the file exists."""
    create = storage.put_if_absent
    monkeypatch.setattr(storage, "put_if_absent", lambda uri, data: create(uri, data) and False)
    assert publish(root, "run").version == 1
    monkeypatch.undo()
    assert (len(versions.attempts(root, DATASET, 1)), assert_whole(root, 1)) == (1, "run")


def test_a_faster_attempt_of_the_same_run_is_joined_not_passed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes retry one run at once: the slower one must not begin a second version."""
    create = storage.put_if_absent

    def let_the_other_go_first(uri: str, data: bytes) -> bool:
        monkeypatch.undo()
        assert versions.reserve(root, DATASET, "run").attempt == 1
        return create(uri, data)

    monkeypatch.setattr(storage, "put_if_absent", let_the_other_go_first)
    reservation = versions.reserve(root, DATASET, "run")
    assert (reservation.version, reservation.attempt) == (1, 2)


def test_only_what_a_dead_process_of_this_machine_holds_is_taken_over(root: str) -> None:
    versions.reserve(root, DATASET, "alive")
    versions.reserve(root, DATASET, "elsewhere", ELSEWHERE)
    versions.reserve(root, DATASET, "dead", dead_owner())
    taken = versions.reserve(root, DATASET, "next")
    assert (taken.version, taken.attempt) == (3, 2)
    assert [link.run_id for link in versions.attempts(root, DATASET, 3)] == ["dead", "next"]
    assert versions.reserve(root, DATASET, "dead").version == 4  # its number is gone


def test_a_version_below_a_published_one_is_never_taken_over(root: str) -> None:
    versions.reserve(root, DATASET, "slow")
    publish(root, "fast")
    first = version_uri(root) + "/_reservation.json"
    record = json.loads(storage.read_bytes(first))
    record["owner"]["process_start"] = "0"
    storage.write_bytes(first, json.dumps(record).encode())
    assert publish(root, "next").version == 3
    latest = versions.latest(root, DATASET)
    assert latest is not None
    assert latest.run.flow_run_id == "next"


def test_a_directory_without_a_reservation_is_used_only_if_empty(tmp_path: Path) -> None:
    (tmp_path / DATASET / "v1").mkdir(parents=True)  # killed between mkdir and link
    (tmp_path / DATASET / "v1" / "._reservation.json.0.tmp").write_bytes(b"{")
    assert versions.reserve(str(tmp_path), DATASET, "run").version == 1
    foreign = tmp_path / DATASET / "v2" / "theirs.parquet"
    foreign.parent.mkdir()
    foreign.write_bytes(b"theirs")
    assert publish(str(tmp_path), "other").version == 3
    assert foreign.exists()


@pytest.mark.parametrize("committed", [True, False])
def test_an_unreadable_reservation_is_named_and_left_alone(
    root: str, committed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if committed:
        publish(root, "first")
    storage.write_bytes(version_uri(root) + "/_reservation.json", b"{")
    with caplog.at_level(logging.WARNING):
        assert publish(root, "run").version == 2
    told = re.search(r"v1/_reservation.json is no reservation.*remove that version's directory", caplog.text)
    assert bool(told) is not committed, "who has reserved a committed version matters to nobody"
    assert versions.published_versions(root, DATASET) == [1, 2][not committed :]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_is_gone_when_its_pid_belongs_to_another() -> None:
    owner = versions.current_owner()
    assert not owner.is_gone()
    assert dead_owner().is_gone()
    assert not ELSEWHERE.is_gone()
    assert not owner.model_copy(update={"boot_id": ""}).is_gone()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text().split()[21]
        child = owner.model_copy(update={"pid": process.pid, "process_start": started})
        assert not child.is_gone()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: ended, not yet collected
        assert child.is_gone()
    assert child.is_gone()


def test_what_a_dead_process_published_is_not_taken_over(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run", dead_owner())
    versions.commit(reservation, manifest_of(reservation, write(reservation)))
    assert versions.reserve(root, DATASET, "next").version == 2


STEPS = st.lists(
    st.tuples(st.sampled_from(["reserve", "write", "commit", "reject", "die"]), st.integers(0, 2)), max_size=25
)


@settings(max_examples=40)
@given(steps=STEPS)
def test_any_order_of_steps_publishes_each_run_once_and_leaves_no_holes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    """Three runs reserve, write, commit and die (their processes are gone) in any order."""
    root = str(tmp_path_factory.mktemp("root"))
    held: dict[int, versions.Reservation] = {}
    generation = dict.fromkeys(range(3), 0)
    done: dict[int, Manifest] = {}
    for step, run in steps:
        if step == "reserve":
            held[run] = versions.reserve(root, DATASET, f"run-{run}", dead_owner())
            assert held[run].committed == (run in done)
            assert held[run].committed or not storage.exists(layout.join(held[run].uri, layout.MANIFEST))
        elif step == "die":
            held.pop(run, None)
            generation[run] += 1
        elif run in held and not held[run].committed:
            if step == "write" and storage.exists(layout.join(held[run].uri, layout.MANIFEST)):
                continue  # what a dead attempt still writes after the commit is nobody's: readers go by the manifest
            files = write(held[run])
            if step == "write":
                continue
            status, verdict = ("published", "pass") if step == "commit" else ("rejected", "fail")
            try:
                manifest = manifest_of(held[run], files, status=status, verdict=verdict)  # type: ignore[arg-type]
                committed = versions.commit(held[run], manifest)
            except VersionConflict:
                continue
            if committed.status == "published":
                assert done.setdefault(run, committed) == committed
            held.pop(run)
    numbers = versions.version_numbers(root, DATASET)
    assert numbers == list(range(1, len(numbers) + 1))
    assert {assert_whole(root, number) for number in versions.published_versions(root, DATASET)} == {
        f"run-{run}" for run in done
    }
    assert len(versions.published_versions(root, DATASET)) == len(done)


# Many processes


def run_together(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Run a function in processes that begin at the same moment; give what each sent."""
    start = SPAWN.Barrier(len(arguments))
    pipes = [SPAWN.Pipe(duplex=False) for _ in arguments]
    processes = [
        SPAWN.Process(target=target, args=(*own, start, pipe[1]), daemon=True)
        for own, pipe in zip(arguments, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()  # so that a child that dies gives EOFError instead of a wait for ever
    results = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return results


@pytest.mark.parametrize(("publishers", "times"), [(2, 3), (5, 1)])
def test_racing_publishers_leave_dense_whole_versions(root: str, publishers: int, times: int) -> None:
    results = run_together(publishing.race, [(root, f"p{number}", times) for number in range(publishers)])
    expected = list(range(1, publishers * times + 1))
    assert sorted(version for mine in results for version in mine) == expected
    assert versions.published_versions(root, DATASET) == expected
    runs = [assert_whole(root, version) for version in expected]
    assert len(set(runs)) == publishers * times
    for number, mine in enumerate(results):
        assert [runs[version - 1] for version in mine] == [f"p{number}-{turn}" for turn in range(times)]


def test_processes_that_all_claim_to_be_one_run_publish_once(root: str) -> None:
    results = run_together(publishing.race_for_one_run, [(root,)] * 3)
    assert 1 in results
    others = [str(result) for result in results if result != 1]
    assert all(re.search(publishing.LOST_THE_RACE, other) for other in others), others
    assert versions.published_versions(root, DATASET) == [1]
    assert assert_whole(root, 1) == "same"


def kill_at(root: str, point: str) -> None:
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=publishing.stop_at, args=(root, "killed", point, sender), daemon=True)
    process.start()
    sender.close()
    assert receiver.recv() == point
    process.kill()
    process.join()


@pytest.mark.parametrize(
    ("point", "run_id"),
    [
        ("reserved", "started again"),
        ("in mid-write", "killed"),
        ("in mid-write", "started again"),
        ("before the manifest", "started again"),
    ],
)
def test_after_kill_9_the_same_again_publishes_the_same_version(root: str, point: str, run_id: str) -> None:
    kill_at(root, point)
    assert versions.published_versions(root, DATASET) == []
    before = files_of(root)
    assert len(before) == {"reserved": 1, "in mid-write": 3, "before the manifest": 3}[point]
    manifest = publish(root, run_id)
    assert (manifest.version, manifest.run.attempt) == (1, 2)
    assert assert_whole(root, 1) == run_id
    assert files_of(root) == {
        *("_reservation.json", "_reservation-2.json", "_manifest.json"),
        *(file.path for file in manifest.files),
    }


def test_replaced_files_are_gone_before_the_manifest_comes(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    files = write(reservation)
    storage.write_parquet(table("replaced", 7), reservation.data_uri(7, "split=train"))
    put = storage.put_if_absent
    seen: list[str] = []

    def at_the_manifest(uri: str, data: bytes) -> bool:
        seen.extend(info.uri for info in storage.list_files(version_uri(root)))
        return put(uri, data)

    monkeypatch.setattr(storage, "put_if_absent", at_the_manifest)
    manifest = versions.commit(reservation, manifest_of(reservation, files))
    assert seen == versions.data_files(root, manifest), "whoever opens the directory sees more than the manifest lists"


def test_temporary_files_of_dead_attempts_go_with_the_commit(tmp_path: Path) -> None:
    reservation = versions.reserve(str(tmp_path), DATASET, "run")
    left = [Path(reservation.uri, f".{name}.{'0' * 32}.tmp") for name in ("_reservation.json", layout.MANIFEST)]
    for file in left:
        file.write_bytes(b"{")
    versions.commit(reservation, manifest_of(reservation, write(reservation)))
    assert not any(file.exists() for file in left)
    assert_whole(str(tmp_path), 1)


def test_after_kill_9_behind_the_commit_the_same_run_publishes_nothing_more(root: str) -> None:
    kill_at(root, "committed")
    assert publish(root, "killed").version == 1
    assert publish(root, "started again").version == 2


# Readers


def test_a_version_is_read_as_it_is(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    files = write(reservation)
    rejected = rejected_rows(reservation)
    versions.commit(reservation, manifest_of(reservation, files, rejected_files=(rejected,)))
    expected = versions.read_table(root, DATASET)
    assert expected.num_rows == ROWS * PARTS
    filesystem, path = storage.arrow_filesystem(reservation.uri)
    assert pads.dataset(path, filesystem=filesystem, format="parquet").to_table().equals(expected)
    frame = pd.read_parquet(path, filesystem=filesystem)
    assert frame["id"].tolist() == expected["id"].to_pylist()
    if not root.startswith("s3://"):  # DuckDB's S3 reader is an extension that it downloads
        assert len(pd.read_parquet(reservation.uri)) == ROWS * PARTS
        found = duckdb.execute(f"SELECT count(*), max(id) FROM '{reservation.uri}/*.parquet'").fetchall()
        assert found == [(ROWS * PARTS, ROWS * PARTS - 1)]


def test_files_in_subdirectories_are_part_of_a_version(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    files = [
        reservation.entry(storage.write_parquet(publishing.table("run", index), reservation.data_uri(0, split)))
        for index, split in enumerate(("split=train", "split=validation"))
    ]
    manifest = versions.commit(reservation, manifest_of(reservation, files))
    assert [file.path for file in manifest.files] == [
        f"split={name}/part-00000-a1.parquet" for name in ("train", "validation")
    ]
    assert assert_whole(root, 1) == "run"
    assert versions.read_table(root, DATASET).column_names == ["id", "run"]


def test_columns_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    publish(str(tmp_path), "run")
    assert versions.read_table(str(tmp_path), DATASET, columns=["run", "id"]).column_names == ["run", "id"]
    with pytest.raises(ConfigError, match=r"v1 has no column 'runs': use 'run'"):
        versions.read_table(str(tmp_path), DATASET, columns=["runs"])


@pytest.mark.parametrize(
    ("dataset", "version", "message"),
    [
        (DATASET, 9, r"has no version v9 under .*; published: v1, v2; name one of them or 'latest'"),
        ("feature-store/customer-featurs", "latest", r"did you mean 'feature-store/customer-features'\?"),
        ("zzz", "latest", r"datasets there: 'feature-store/customer-features'"),
    ],
)
def test_a_version_that_is_not_there_is_answered_with_those_that_are(
    tmp_path: Path, dataset: str, version: Any, message: str
) -> None:
    for run in "ab":
        publish(str(tmp_path), run)
    with pytest.raises(VersionNotFound, match=message):
        versions.read_table(str(tmp_path), dataset, version)


def test_an_empty_root_says_so(root: str) -> None:
    with pytest.raises(VersionNotFound, match=r"there are no datasets; run the flow"):
        versions.resolve(root, DATASET)


# Damage


def flip_byte(uri: str) -> None:
    data = bytearray(storage.read_bytes(uri))
    data[len(data) // 2] ^= 1
    storage.write_bytes(uri, bytes(data))


def test_a_changed_byte_is_found_by_its_digest(root: str) -> None:
    manifest = publish(root, "run")
    flip_byte(versions.data_files(root, manifest)[1])
    message = (
        rf"part-00001-a1.parquet: digests differ.*expected {manifest.files[1].digest}, found blake3:[0-9a-f]{{64}}"
    )
    with pytest.raises(CorruptVersion, match=message):
        versions.verify(root, manifest)
    with pytest.raises(CorruptVersion, match=message):
        versions.read_table(root, DATASET, verify=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (storage.delete, r"part-00000-a1.parquet is missing, but its manifest lists it: publish a new version"),
        (lambda uri: storage.write_bytes(uri, storage.read_bytes(uri)[:-9]), r"bytes differ.*expected \d+, found \d+"),
        (lambda uri: storage.write_bytes(uri, b""), r"bytes differ.*expected \d+, found 0"),
    ],
    ids=["deleted", "cut short", "emptied"],
)
def test_a_missing_or_short_file_is_found_by_every_reader(
    root: str, damage: Callable[[str], None], message: str
) -> None:
    manifest = publish(root, "run")
    damage(versions.data_files(root, manifest)[0])
    with pytest.raises(CorruptVersion, match=message):
        versions.verify(root, manifest)
    with pytest.raises(CorruptVersion, match=message):
        versions.read_table(root, DATASET)


def test_a_file_that_is_no_longer_parquet_is_named(tmp_path: Path) -> None:
    manifest = publish(str(tmp_path), "run")
    uri = versions.data_files(str(tmp_path), manifest)[0]
    storage.write_bytes(uri, b"x" * manifest.files[0].bytes)
    with pytest.raises(CorruptVersion, match=r"part-00000-a1.parquet can't be read as Parquet"):
        versions.read_table(str(tmp_path), DATASET)


def test_a_changed_report_is_found(root: str) -> None:
    reservation = versions.reserve(root, DATASET, "run")
    for name in (layout.REPORT_JSON, layout.REPORT_HTML):
        storage.write_bytes(layout.join(reservation.uri, name), b"report")
    digest = storage.digest_of(layout.join(reservation.uri, layout.REPORT_JSON), "sha256:").partition(":")[2]
    manifest = manifest_of(reservation, write(reservation)).model_copy(
        update={"report": ReportDigest(json_sha256=digest, html_sha256=digest)}
    )
    versions.verify(root, versions.commit(reservation, manifest))
    storage.write_bytes(layout.join(reservation.uri, layout.REPORT_HTML), b"other")
    with pytest.raises(CorruptVersion, match=r"_report.html: digests differ"):
        versions.verify(root, manifest)


@given(st.data())
@settings(max_examples=30)
def test_a_manifest_cut_anywhere_is_corrupt(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = str(tmp_path_factory.mktemp("root"))
    publish(root, "run")
    uri = version_uri(root) + "/_manifest.json"
    whole = storage.read_bytes(uri)
    storage.write_bytes(uri, whole[: data.draw(st.integers(0, len(whole) - 1))])
    for read in (versions.resolve, lambda *of: versions.resolve(*of, 1), lambda *of: versions.read_manifest(*of, 1)):
        with pytest.raises(CorruptVersion, match=r"v1/_manifest.json can't be read as a manifest"):
            read(root, DATASET)
    assert (versions.latest(root, DATASET), versions.published_versions(root, DATASET)) == (None, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"is the manifest of .* v2, where that of .* v1 is expected"),
        ({"format": 99}, r"has format 99, this release reads up to 1: use a newer release"),
        ({"status": "fine"}, r"can't be read as a manifest.*1 validation error"),
        ({"surplus": 1}, r"can't be read as a manifest"),
        ({"files": None}, r"can't be read as a manifest"),
    ],
)
def test_an_altered_manifest_is_corrupt(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    publish(str(tmp_path), "run")
    path = Path(version_uri(str(tmp_path))) / "_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptVersion, match=message):
        versions.read_manifest(str(tmp_path), DATASET, 1)


# Versions that go on from the one before


def begun(root: str, run_id: str) -> Callable[[], Manifest]:
    """A version that is written and only has to be committed, on the latest there is now."""
    newest = versions.latest(root, DATASET)
    reservation = versions.reserve(root, DATASET, run_id)
    manifest = manifest_of(reservation, write(reservation))
    return lambda: versions.commit(reservation, manifest, newest.version if newest is not None else 0)


@pytest.mark.parametrize("first", [0, 1], ids=["the lower number first", "the higher number first"])
def test_of_two_runs_with_one_base_the_first_publishes_and_the_other_plans_anew(root: str, first: int) -> None:
    publish(root, "base")
    runs = [begun(root, "a"), begun(root, "b")]
    winner, loser = runs[first], runs[1 - first]
    number = winner().version
    for _ in range(2):  # also a commit that is repeated
        with pytest.raises(Superseded, match=r"began from v1|went on first from v1"):
            loser()
    assert versions.published_versions(root, DATASET) == [1, number]
    assert {path for path in files_of(root, 5 - number) if path.startswith("part")} == set(), "data of no version"
    with pytest.raises(VersionNotFound, match=rf"v{5 - number} wasn't published: "):
        versions.resolve(root, DATASET, 5 - number)
    again = begun(root, "ab"[1 - first])
    assert again().version == 4
    assert [assert_whole(root, version) for version in (number, 4)] == ["ab"[first], "ab"[1 - first]]


def test_what_was_rejected_withdrawn_or_pruned_since_the_base_is_no_obstacle(root: str) -> None:
    publish(root, "base")
    last = begun(root, "last")  # v2; all that follows is done before it commits
    failed = versions.reserve(root, DATASET, "failed")
    versions.commit(failed, manifest_of(failed, write(failed), status="rejected", verdict="fail"))
    publish(root, "withdrawn")
    withdraw(root, DATASET, 4, "wrong", "me")
    assert last().version == 2
    assert versions.published_versions(root, DATASET) == [1, 2]


OPERATIONS = ("put_if_absent", "exists", "read_bytes", "read_many", "list_directories", "list_files", "delete")


@pytest.mark.parametrize("outer", [0, 1], ids=["the lower is interrupted", "the higher is interrupted"])
def test_two_runs_with_one_base_never_both_publish_wherever_one_overtakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: int
) -> None:
    for step in range(1000):
        root = str(tmp_path / str(step))
        publish(root, "base")
        runs = [begun(root, "a"), begun(root, "b")]
        left, results = [step], list[str]()

        def attempt(run: Callable[[], Manifest], results: list[str] = results) -> None:
            try:
                results.append(run().run.flow_run_id)
            except Superseded:
                results.append("superseded")

        def watched(name: str, runs: list[Callable[[], Manifest]] = runs, left: list[int] = left) -> Callable[..., Any]:
            operation = getattr(storage, name)

            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == -1:
                    attempt(runs[1 - outer])
                return operation(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(storage, name, watched(name))
            attempt(runs[outer])
        if left[0] >= 0:  # the whole commit took fewer steps
            assert step > 10, "nothing was interrupted"
            return
        assert len(results) == 2
        assert results.count("superseded") == 1, f"at step {step}: {results}"
        [winner] = [result for result in results if result != "superseded"]
        [published] = [n for n in versions.published_versions(root, DATASET) if n != 1]
        assert assert_whole(root, published) == winner
