"""Pruning deletes what nobody needs, whole, and never gives a number again."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from tasks.io import storage
from tasks.io.errors import ConfigError, VersionConflict, VersionNotFound
from tasks.store import layout, retention, versions
from tasks.store.manifest import InputRecord, Manifest
from tasks.store.retention import prunable, prune, survey
from tests.store.publishing import DATASET, manifest_of, publish, write

TRAINING = "feature-store/training-ready/churn"
DEAD = versions.current_owner().model_copy(update={"process_start": "0"})


def published(root: str, dataset: str = DATASET, **changes: Any) -> Manifest:
    number = len(versions.version_numbers(root, dataset))
    reservation = versions.reserve(root, dataset, f"{dataset} {number}")
    manifest = manifest_of(reservation, write(reservation)).model_copy(update=changes)
    return versions.commit(reservation, manifest)


def rejected(root: str) -> Manifest:
    reservation = versions.reserve(root, DATASET, f"rejected {len(versions.version_numbers(root, DATASET))}")
    return versions.commit(reservation, manifest_of(reservation, write(reservation), status="rejected", verdict="fail"))


def numbers(found: list[retention.Prunable]) -> list[tuple[int, str]]:
    return [(version.version, version.state) for version in found]


def files_of(root: str, version: int) -> list[str]:
    uri = layout.version_uri(storage.normalise(root), DATASET, version)
    return [info.uri.removeprefix(f"{uri}/") for info in storage.list_files(uri, include_hidden=True)]


def test_the_newest_stay_and_the_others_go_rejected_and_abandoned_ones_first(root: str) -> None:
    for _ in range(3):
        published(root)
    rejected(root)
    published(root)
    write(versions.reserve(root, DATASET, "killed", DEAD))
    assert numbers(prunable(root, DATASET)) == [(4, "rejected"), (6, "abandoned")]
    found = prunable(root, DATASET, keep=2)
    assert numbers(found) == [(4, "rejected"), (6, "abandoned"), (1, "published"), (2, "published")]
    assert prune(root, found) == sum(version.bytes for version in found) > 0
    assert versions.published_versions(root, DATASET) == [3, 5]
    for version in (1, 2, 4, 6):
        assert all(name.startswith("_reservation") for name in files_of(root, version))
    assert prunable(root, DATASET, keep=2) == [], "there is nothing left to do"
    for version in (3, 5):
        versions.verify(root, versions.resolve(root, DATASET, version))


def test_a_number_that_was_pruned_is_never_given_again(tmp_path: Path) -> None:
    """Neither to the next run, nor to the run that had it: those who noted v2 must never find something else in it."""
    root = str(tmp_path)
    publish(root, "first")
    publish(root, "second")
    versions.withdraw(root, DATASET, 2, "wrong", "anna")
    prune(root, prunable(root, DATASET, keep=1))
    assert files_of(root, 2) == ["_reservation-2.json", "_reservation.json"]
    assert publish(root, "second").version == 3
    assert publish(root, "next").version == 4
    with pytest.raises(VersionNotFound, match=r"v2 was pruned at 20.*; published: v1, v3, v4"):
        versions.resolve(root, DATASET, 2)


@pytest.mark.parametrize(
    ("age", "keep", "gone"),
    [
        (dt.timedelta(days=3), None, [1, 2]),  # made on the days 0 to 4, looked at on day 5
        (dt.timedelta(days=0), None, [1, 2, 3, 4]),  # the latest stays, whatever its age
        (dt.timedelta(days=3), 4, [1]),  # both bounds
        (dt.timedelta(days=9), 1, []),
        (None, 3, [1, 2]),
        (None, None, []),
    ],
)
def test_bounds_by_age_and_by_number(
    tmp_path: Path, age: dt.timedelta | None, keep: int | None, gone: list[int]
) -> None:
    start = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    for day in range(5):
        published(str(tmp_path), created_at=start + dt.timedelta(days=day))
    found = survey(str(tmp_path), DATASET, keep=keep, older_than=age, now=start + dt.timedelta(days=5))
    assert [version.version for version in found.prunable] == gone


def test_what_a_published_version_was_made_from_stays(tmp_path: Path) -> None:
    root = str(tmp_path)
    for _ in range(4):
        published(root)
    used = tuple(InputRecord(name=DATASET, uri="x", version=version) for version in (1, 3))
    published(root, TRAINING, inputs=used[:1])
    unpublished = versions.reserve(root, TRAINING, "unpublished")
    other = manifest_of(unpublished, write(unpublished), status="rejected", verdict="fail")
    versions.commit(unpublished, other.model_copy(update={"inputs": used}))
    found = survey(root, DATASET, keep=1)
    assert [version.version for version in found.prunable] == [2, 3]
    assert found.held == {1: f"{TRAINING} v1 was made from it"}
    versions.withdraw(root, TRAINING, 1, "why", "anna")
    assert survey(root, DATASET, keep=1).held, "its data stays, and so does what explains it"


def test_a_chain_of_states_stays_as_far_as_it_is_needed(tmp_path: Path) -> None:
    """v5 continues v4, and v4 v2; v3 began anew."""
    root = str(tmp_path)
    for parent in (None, 1, None, 2, 4):
        published(root, definition={"state": {"parent": parent}})
    found = survey(root, DATASET, keep=1)
    assert [version.version for version in found.prunable] == [3]
    assert found.held == {
        4: "v5 continues its state",
        2: "v4 continues its state",
        1: "v2 continues its state",
    }


def test_history_that_would_be_lost_is_named(tmp_path: Path) -> None:
    root = str(tmp_path)
    times = [dt.datetime(2024, 1, day, tzinfo=dt.UTC) for day in (1, 2, 3)]
    published(root, as_of=tuple(times[:2]))
    published(root, as_of=tuple(times[1:]))
    assert [version.only_here for version in prunable(root, DATASET, keep=1)] == [(times[0],)]


def test_what_somebody_works_on_is_left_alone(tmp_path: Path) -> None:
    root = str(tmp_path)
    published(root)
    write(versions.reserve(root, DATASET, "elsewhere", versions.Owner(host="h", boot_id="b", pid=1, process_start="1")))
    write(versions.reserve(root, DATASET, "here"))
    assert survey(root, DATASET).prunable == ()
    later = dt.datetime.now(dt.UTC) + retention.ABANDONED_AFTER + dt.timedelta(minutes=1)
    assert [version.version for version in survey(root, DATASET, now=later).prunable] == [2, 3]


def test_a_version_that_is_taken_over_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(versions.reserve(root, DATASET, "killed", DEAD))
    found = prunable(root, DATASET)
    taken = versions.reserve(root, DATASET, "next")
    assert (taken.version, taken.attempt) == (1, 2)
    with pytest.raises(VersionConflict, match=r"v1 is being written again"):
        prune(root, found)
    versions.commit(taken, manifest_of(taken, write(taken)))
    assert versions.published_versions(root, DATASET) == [1]


@pytest.mark.parametrize("survivors", range(4))
def test_pruning_that_was_stopped_leaves_no_half_of_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    """Killed after each deletion in turn: the version is whole or isn't there, and doing it again finishes."""
    root = str(tmp_path)
    published(root)
    published(root)
    delete, left = storage.delete, [survivors]

    def killed(uri: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(uri)

    found = prunable(root, DATASET, keep=1)
    monkeypatch.setattr(storage, "delete", killed)
    if survivors < 3:
        with pytest.raises(KeyboardInterrupt):
            prune(root, found)
    else:
        prune(root, found)
    monkeypatch.undo()
    for number in versions.published_versions(root, DATASET):
        versions.verify(root, versions.resolve(root, DATASET, number))
    prune(root, prunable(root, DATASET, keep=1))
    assert files_of(root, 1) == ["_reservation-2.json", "_reservation.json"]
    assert versions.published_versions(root, DATASET) == [2]


@pytest.mark.parametrize(
    ("options", "message"), [({"keep": 0}, "keep = 0"), ({"older_than": dt.timedelta(-1)}, "older_than")]
)
def test_bounds_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prunable(str(tmp_path), DATASET, **options)
