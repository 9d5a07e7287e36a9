"""A damaged manifest costs its own version only: readers and runs go on with the others, and it can be withdrawn."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.io import storage
from tasks.io.errors import CorruptVersion, DamagedManifest, VersionNotFound
from tasks.store import layout, reading, reservation, retention, versions
from tasks.store.lineage import trace
from tests.store.publishing import DATASET, manifest_of, publish, write

COPY = f"{layout.STREAMING_READY}/copy"


def place(root: str, version: int, dataset: str = DATASET) -> Path:
    return Path(layout.version_uri(root, dataset, version)) / layout.MANIFEST


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Three versions, of which the second and third are damaged."""
    for number in (1, 2, 3):
        publish(str(tmp_path), f"run-{number}")
    for number in (2, 3):
        whole = place(str(tmp_path), number).read_bytes()
        place(str(tmp_path), number).write_bytes(whole[: len(whole) // 2])
    reservation._warned.clear()
    return str(tmp_path)


def test_readers_pass_it_over_and_are_warned_once(root: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert versions.resolve(root, DATASET).version == 1
            assert versions.published_versions(root, DATASET) == [1]
            assert [one.version for one in versions.live_manifests(root, DATASET)] == [1]
            assert versions.read_table(root, DATASET)["run"][0].as_py() == "run-1"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all("passed over" in text and "restore the file from a copy" in text for text in told), told


def test_who_asks_for_it_by_its_number_is_told_what_is_wrong(root: str) -> None:
    with pytest.raises(DamagedManifest, match=r"v3/_manifest.json can't be read .*'rollback .* v3' withdraws it"):
        versions.resolve(root, DATASET, 3)


def test_where_nothing_else_is_left_the_latest_is_an_error_that_says_so(root: str) -> None:
    versions.withdraw(root, DATASET, 1, "wrong", "anna")
    assert versions.latest(root, DATASET) is None
    with pytest.raises(DamagedManifest, match=r"v3/_manifest.json"):
        versions.resolve(root, DATASET)


def test_a_withdrawal_ends_the_matter(root: str, caplog: pytest.LogCaptureFixture) -> None:
    for number in (2, 3):
        versions.withdraw(root, DATASET, number, "damaged", "anna")
    with caplog.at_level(logging.WARNING):
        assert versions.resolve(root, DATASET).version == 1
    assert not caplog.records
    with pytest.raises(VersionNotFound, match="v3 was withdrawn by anna"):
        versions.resolve(root, DATASET, 3)
    found = retention.survey(root, DATASET, keep=1)
    assert [(one.version, one.state) for one in found.prunable] == [(2, "withdrawn"), (3, "withdrawn")]
    retention.prune(root, found.prunable)
    assert versions.version_numbers(root, DATASET) == [1, 2, 3], "their numbers aren't given again"
    assert publish(root, "run-4").version == 4


@pytest.mark.parametrize("run", ["run-3", "run-4"])
def test_a_run_publishes_all_the_same(root: str, run: str) -> None:
    """Also the one whose own version is damaged: nobody can tell whether it was published."""
    assert publish(root, run).version == 4
    assert versions.resolve(root, DATASET).version == 4


def test_it_is_not_taken_for_abandoned_and_keeps_what_it_may_be_made_from(root: str) -> None:
    late = dt.datetime.now(dt.UTC) + 10 * retention.ABANDONED_AFTER
    publish(root, "run-4")
    found = retention.survey(root, DATASET, keep=1, now=late)
    assert found.prunable == ()
    assert "manifest is damaged: restore" in found.held[3]
    assert "v3, whose manifest is damaged, may continue its state" in found.held[1] or "v2" in found.held[1]
    for number in (2, 3):
        versions.withdraw(root, DATASET, number, "damaged", "anna")
    publish(root, "copy", COPY)
    place(root, 1, COPY).write_bytes(b"")
    found = retention.survey(root, DATASET, keep=1, now=late)
    assert [one.version for one in found.prunable] == [2, 3]
    assert found.held == {1: f"{COPY} v1, whose manifest is damaged, may have been made from it"}
    assert retention.leftovers(root, [DATASET, COPY]) == []


def test_what_was_made_from_it_has_a_lineage(root: str) -> None:
    copied = versions.read_manifest(root, DATASET, 1).model_copy(update={"version": 3})
    record = copied.as_input(layout.version_uri(root, DATASET, 3))
    held = versions.reserve(root, COPY, "copy")
    versions.commit(held, manifest_of(held, write(held)).model_copy(update={"inputs": (record,)}))
    assert [one.status for one in trace(root, COPY, 1).versions] == ["published", "gone"]
    runs = Path(layout.training_runs(root, "copy")) / "v1-x"
    runs.mkdir(parents=True)
    (runs / layout.REPORT_JSON).write_text("{}")
    assert trace(root, COPY, 1).trainings == ()


READERS = [versions.latest, versions.resolve, versions.live_manifests]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_store_that_fails_is_not_taken_for_damage(
    root: str, read: Callable[[str, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: Path) -> bytes:
        raise OSError(5, "Input/output error", str(uri))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(root, DATASET)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_newer_format_is_refused(root: str, read: Callable[[str, str], object]) -> None:
    place(root, 3).write_bytes(b'{"format": 99, "anything": []}')
    with pytest.raises(CorruptVersion, match=r"format 99.*use a newer release") as caught:
        read(root, DATASET)
    assert not isinstance(caught.value, DamagedManifest)


def test_files_that_are_missing_or_of_another_size_are_found_by_a_listing(root: str) -> None:
    manifest = versions.read_manifest(root, DATASET, 1)
    first, second = versions.data_files(root, manifest)
    Path(first).unlink()
    Path(second).write_bytes(b"x")
    listed = {info.uri: info.bytes for info in storage.list_files(root)}
    assert reading.faults_of_files(root, manifest, listed) == [
        f"{manifest.files[0].path} is missing",
        f"{manifest.files[1].path} has 1 bytes, not {manifest.files[1].bytes}",
    ]
