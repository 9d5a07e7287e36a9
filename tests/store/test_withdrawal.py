"""A withdrawn version is passed over by every reader, and nothing that was published is changed."""

from __future__ import annotations

import pytest

from tasks.io import storage
from tasks.io.errors import VersionNotFound
from tasks.store import layout, reading, versions
from tests.store.publishing import DATASET, manifest_of, publish, write


def test_readers_pass_a_withdrawn_version_over(root: str) -> None:
    for number in (1, 2, 3):
        publish(root, f"run-{number}")
    before = {info.uri: info.stamp for info in storage.list_files(storage.normalise(root), include_hidden=True)}
    versions.withdraw(root, DATASET, 3, "wrong currency", "anna")
    newest = versions.latest(root, DATASET)
    assert newest is not None
    assert newest.version == versions.resolve(root, DATASET).version == 2
    assert versions.published_versions(root, DATASET) == [1, 2]
    assert [manifest.version for manifest in versions.live_manifests(root, DATASET)] == [1, 2]
    assert versions.version_numbers(root, DATASET) == [1, 2, 3]
    assert versions.read_table(root, DATASET)["run"].unique().to_pylist() == ["run-2"]
    with pytest.raises(
        VersionNotFound, match=r"v3 was withdrawn by anna at 20.* UTC: wrong currency; published: v1, v2"
    ):
        versions.resolve(root, DATASET, 3)
    after = {info.uri: info.stamp for info in storage.list_files(storage.normalise(root), include_hidden=True)}
    place = storage.normalise(root)
    added = [reading.withdrawal_uri(place, DATASET, 3), layout.mark_uri(place, DATASET, 3)]
    assert after == before | {uri: after[uri] for uri in added}
    assert publish(root, "run-4").version == 4, "the number isn't given again"


def test_the_first_withdrawal_stands(root: str) -> None:
    publish(root, "run")
    versions.withdraw(root, DATASET, 1, "first", "anna")
    versions.withdraw(root, DATASET, 1, "second", "ben")
    assert {n: (w.reason, w.by) for n, w in reading.withdrawn(root, DATASET).items()} == {1: ("first", "anna")}
    assert versions.latest(root, DATASET) is None
    with pytest.raises(VersionNotFound, match=r"has no published version"):
        versions.resolve(root, DATASET)


def test_only_a_published_version_can_be_withdrawn(tmp_path) -> None:
    root = str(tmp_path)
    publish(root, "run")
    reservation = versions.reserve(root, DATASET, "rejected")
    versions.commit(reservation, manifest_of(reservation, write(reservation), status="rejected", verdict="fail"))
    with pytest.raises(VersionNotFound, match=r"v2 was rejected.*of v1, v2"):
        versions.withdraw(root, DATASET, 2, "why", "anna")
    with pytest.raises(VersionNotFound, match=r"v7 isn't published"):
        versions.withdraw(root, DATASET, 7, "why", "anna")
    assert reading.withdrawn(root, DATASET) == {}
    assert reading.withdrawn(root, "feature-store/none") == {}


def test_a_record_that_is_cut_short_is_no_leave_to_read(tmp_path) -> None:
    """Whoever withdrew the version meant it, and the others can still be read."""
    root = str(tmp_path)
    publish(root, "a")
    publish(root, "b")
    storage.write_bytes(layout.join(layout.version_uri(root, DATASET, 2), layout.WITHDRAWN), b'{"reason": "wro')
    assert versions.resolve(root, DATASET).version == 1
    assert versions.published_versions(root, DATASET) == [1]
    with pytest.raises(VersionNotFound, match=r"v2 was withdrawn: .*_withdrawn.json can't be read .*delete that file"):
        versions.resolve(root, DATASET, 2)


def test_manifests_that_are_known_are_not_read_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    publish(root, "a")
    publish(root, "b")
    known = reading.overview(root, DATASET).settled
    publish(root, "c")
    storage.delete(layout.index_uri(root, DATASET))
    versions.withdraw(root, DATASET, 1, "why", "anna")
    asked: list[str] = []
    read_many = storage.read_many

    def counted(uris):
        asked.extend(uris)
        return read_many(asked)

    monkeypatch.setattr(storage, "read_many", counted)
    assert [one.version for one in reading.overview(root, DATASET, known).live] == [2, 3]
    asked_for = [uri.split("/")[-2] for uri in asked if uri.endswith(layout.MANIFEST)]
    assert asked_for == ["v1", "v3"], "the one that has a mark and the one that is new"
