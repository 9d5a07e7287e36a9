"""The index beside the versions: requests don't grow with their number, and it is never believed against them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.httpsession import AIOHTTPSession
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.audit.holders import made_from
from tasks.io import storage
from tasks.io.hashing import digest
from tasks.store import layout, reading, reservation, retention, version_index, versions
from tasks.store.catalogue import versions_table, write_versions_csv
from tests.store.publishing import DATASET, manifest_of, publish, race, table, write

DEAD = versions.current_owner().model_copy(update={"process_start": "0"})
SPAWN = multiprocessing.get_context("spawn")


# The number of requests


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the S3 requests and local reads, writes and listings of this process, in their order."""
    seen: list[str] = []
    send = AIOHTTPSession.send

    async def sent(self: AIOHTTPSession, request: Any) -> Any:
        seen.append(f"{request.method} {request.url}")
        return await send(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AIOHTTPSession, "send", sent)
        for name in ("read_bytes", "exists", "stat"):
            patch.setattr(Path, name, _noting(seen, name, getattr(Path, name)))
        for name in ("scandir", "link", "rename", "replace"):
            patch.setattr(os, name, _noting(seen, name, getattr(os, name)))
        yield seen


def _noting(seen: list[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **more: Any) -> Any:
        if "prefix" in str(args[0]):
            seen.append(name)
        return method(*args, **more)

    return noted


def whole_publish(root: str, run: str) -> None:
    """Everything that a flow asks the store for, but for its own data."""
    base = versions.latest(root, DATASET)
    held = versions.reserve(root, DATASET, run)
    versions.discard_attempt_files(held)
    manifest = manifest_of(held, write(held))
    versions.commit(held, manifest, base.version if base else 0)
    write_versions_csv(root)


def copies(root: str, count: int) -> None:
    """Versions up to a number, as if each had been published: the first one's files under other numbers."""
    first = versions.read_manifest(root, DATASET, 1)
    uri = layout.version_uri(root, DATASET, 1)
    files = {info.uri.removeprefix(f"{uri}/") for info in storage.list_files(uri, include_hidden=True)}
    contents = {path: storage.read_bytes(layout.join(uri, path)) for path in files}
    for number in range(2, count + 1):
        copy = first.model_copy(update={"version": number})
        contents[layout.MANIFEST] = copy.model_dump_json(indent=2).encode()
        for path, data in contents.items():
            storage.write_bytes(layout.join(layout.version_uri(root, DATASET, number), path), data)


def requests(root: str, total: int) -> dict[str, int]:
    """How many requests each step takes with so many versions; the index is as the last publisher left it."""
    copies(root, total - 1)
    publish(root, "last")
    steps: dict[str, Callable[[], object]] = {
        "latest": lambda: versions.latest(root, DATASET),
        "resolve": lambda: versions.resolve(root, DATASET, total - 3),
        "refresh": lambda: reading.first_live(root, DATASET, [reading.overview(root, DATASET).live[-1].version]),
        "table": lambda: versions_table(root, [DATASET]),
        "made from": lambda: made_from(root, versions.read_manifest(root, DATASET, 1)),
        "publish": lambda: whole_publish(root, "one more"),
    }
    found = {}
    for name, step in steps.items():
        with counted() as seen:
            step()
        found[name] = len(seen)
    return found


def assert_constant(root: str, few: int, many: int) -> None:
    figures = []
    for total in (few, many):
        place = layout.join(root, f"prefix-{total}")
        publish(place, "first")
        figures.append(requests(place, total))
    assert figures[0] == figures[1], figures
    assert 0 < figures[1]["latest"] <= 8, figures
    assert figures[1]["publish"] <= 70, figures


def test_requests_do_not_grow_with_the_number_of_versions(root: str) -> None:
    assert_constant(storage.normalise(root), 10, 60)


@pytest.mark.nightly
def test_a_thousand_versions_take_as_many_requests_as_ten(s3_root: str) -> None:
    # A listing tells of a thousand names at once, and one more version comes with the publish that is counted.
    assert_constant(storage.normalise(s3_root), 10, 990)


def test_many_rejected_or_pruned_versions_on_top_cost_no_requests(root: str) -> None:
    root = storage.normalise(layout.join(root, "prefix"))
    publish(root, "first")
    figures = []
    for turn in range(2):
        for number in range(6):
            held = versions.reserve(root, DATASET, f"{turn}-{number}")
            versions.commit(held, manifest_of(held, write(held), status="rejected", verdict="fail"))
            if number % 2:
                retention.prune(root, retention.prunable(root, DATASET))
        with counted() as seen:
            newest = versions.latest(root, DATASET)
        assert newest is not None
        assert newest.version == 1
        figures.append(len(seen))
    assert figures[0] == figures[1]


# What it may say


def scanned(root: str) -> dict[str, Any]:
    """What a reader of every file of the store sees, without the index."""
    found = reading.read_committed(root, DATASET)
    live = [one.version for one in found.live]
    return {
        "latest": max(live, default=None),
        "live": live,
        "table": [(n, one.status, one.rows) for n, one in found.versions.items()],
    }


def seen(root: str) -> dict[str, Any]:
    """The same, as readers see it."""
    newest = versions.latest(root, DATASET)
    rows = versions_table(root, [DATASET])
    found = reading.overview(root, DATASET)
    assert [one.version for one in found.live] == versions.published_versions(root, DATASET)
    return {
        "latest": newest.version if newest else None,
        "live": [one.version for one in found.live],
        "table": list(zip(*(rows[name].to_pylist() for name in ("version", "status", "record_count")), strict=True)),
    }


class Store:
    """A store that somebody works on, one step after another."""

    def __init__(self, root: str) -> None:
        self.root, self.turn = root, 0
        self.index = Path(layout.index_uri(root, DATASET))
        self.older: list[bytes] = []
        self.given: list[int] = []

    def do(self, step: str, which: int) -> None:
        self.turn += 1
        if self.index.exists():
            self.older.append(self.index.read_bytes())
        committed = reading.read_committed(self.root, DATASET)
        published = [n for n, one in committed.versions.items() if one.status == "published"]
        if step in ("publish", "reject", "kill", "publish and kill"):
            owner = DEAD if step == "kill" else None
            held = versions.reserve(self.root, DATASET, f"run {self.turn}", owner)
            files = write(held)
            if step == "kill":
                return
            self.given.append(held.version)
            rejected = step == "reject"
            with pytest.MonkeyPatch.context() as patch:
                if step == "publish and kill":  # after the manifest, before the index
                    patch.setattr(versions, "update_index", lambda *_: None)
                status, verdict = ("rejected", "fail") if rejected else ("published", "pass")
                versions.commit(held, manifest_of(held, files, status=status, verdict=verdict))  # type: ignore[arg-type]
        elif step == "withdraw" and published:
            versions.withdraw(self.root, DATASET, published[which % len(published)], "wrong", "anna")
        elif step == "publish again" and committed.withdrawals:
            number = list(committed.withdrawals)[which % len(committed.withdrawals)]
            storage.delete(reading.withdrawal_uri(self.root, DATASET, number))
        elif step == "prune":
            retention.prune(self.root, retention.prunable(self.root, DATASET, keep=1 + which % 2))
        elif step == "kill the pruning":
            for one in retention.prunable(self.root, DATASET, keep=1)[:1]:
                uri = layout.version_uri(self.root, DATASET, one.version)
                version_index.mark(self.root, DATASET, one.version)
                retention._take_over(self.root, one)
                storage.delete(layout.join(uri, layout.MANIFEST))
        elif step == "damage the index" and self.index.exists():
            data = self.index.read_bytes()
            self.index.write_bytes(data[: which * len(data) // 10])
        elif step == "delete the index":
            shutil.rmtree(self.index.parent, ignore_errors=True)
        elif step == "put back an older index" and self.older:
            self.index.parent.mkdir(parents=True, exist_ok=True)
            self.index.write_bytes(self.older[which % len(self.older)])


STEPS = (
    "publish",
    "reject",
    "kill",
    "publish and kill",
    "withdraw",
    "publish again",
    "prune",
    "kill the pruning",
    "damage the index",
    "put back an older index",
)


def followed(steps: list[tuple[str, int]]) -> list[int]:
    """Take some steps and compare what readers see after each; return the numbers given to versions."""
    with tempfile.TemporaryDirectory() as root:
        store = Store(root)
        for step, which in steps:
            store.do(step, which)
            assert seen(root) == scanned(root), step
        return store.given


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), max_size=14))
def test_readers_see_what_a_scan_of_all_manifests_sees(steps: list[tuple[str, int]]) -> None:
    given = followed(steps)
    assert len(set(given)) == len(given), "no number is given twice"


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from((*STEPS[:-1], "delete the index")), st.integers(0, 9)), max_size=12))
def test_nothing_is_lost_with_the_index(steps: list[tuple[str, int]]) -> None:
    followed(steps)


def test_an_index_is_made_again_where_it_is_missing_damaged_or_behind(root: str) -> None:
    for number in range(3):
        publish(root, f"run-{number}")
    root = storage.normalise(root)
    uri = layout.index_uri(root, DATASET)
    whole = storage.read_bytes(uri)
    body = whole.partition(b"\n")[2]
    other = body.replace(DATASET.encode(), b"feature-store/others")
    for wrong in (b"", whole[:-7], whole.replace(b"published", b"publ1shed"), digest(other).encode() + b"\n" + other):
        storage.write_bytes(uri, wrong)
        assert version_index.read_index(root, DATASET) == {}
        assert seen(root) == scanned(root)
        versions.update_index(root, DATASET)
        assert storage.read_bytes(uri) == whole


def test_an_index_of_versions_that_were_removed_by_hand_hides_none_of_the_new_ones(tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, "run-1")
    for number in (2, 3):
        held = versions.reserve(root, DATASET, f"run-{number}")
        versions.commit(held, manifest_of(held, write(held), status="rejected", verdict="fail"))
    for number in (2, 3):
        shutil.rmtree(layout.version_uri(root, DATASET, number))
    assert seen(root) == scanned(root)
    held = versions.reserve(root, DATASET, "new")
    assert held.version == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "update_index", lambda *_: None)
        versions.commit(held, manifest_of(held, write(held)))
    publish_after = versions.reserve(root, DATASET, "in flight")  # so that v2 isn't on top
    assert publish_after.version == 3
    assert seen(root) == scanned(root)
    assert seen(root)["latest"] == 2


def test_a_version_that_was_damaged_since_is_never_read(tmp_path: Path) -> None:
    root = str(tmp_path)
    for number in (1, 2):
        publish(root, f"run-{number}")
    place = Path(layout.version_uri(root, DATASET, 2)) / layout.MANIFEST
    place.write_bytes(place.read_bytes()[:100])
    newest = versions.latest(root, DATASET)
    assert newest is not None
    assert newest.version == 1
    assert versions.published_versions(root, DATASET) == [1]
    indexed = [one.version for one in reading.overview(root, DATASET).live]
    assert indexed == [1, 2], "nothing has told the index"
    assert reading.first_live(root, DATASET, indexed[::-1]) == newest


def test_a_store_where_the_index_cannot_be_written_publishes_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path)
    place = Path(layout.index_uri(root, DATASET)).parent
    place.parent.mkdir(parents=True)
    place.write_bytes(b"in the way")
    publish(root, "run")
    assert "index" in caplog.text
    assert seen(root) == scanned(root)


def test_two_publishers_share_no_number_and_the_index_ends_whole(root: str) -> None:
    start = SPAWN.Barrier(2)
    pipes = [SPAWN.Pipe(duplex=False) for _ in range(2)]
    racers = [
        SPAWN.Process(target=race, args=(root, name, 4, start, pipe[1]), daemon=True)
        for name, pipe in zip("ab", pipes, strict=True)
    ]
    for racer in racers:
        racer.start()
    answers = [pipe[0].recv() for pipe in pipes]
    for racer in racers:
        racer.join(60)
    assert sorted(number for answer in answers for number in answer) == list(range(1, 9)), answers
    assert seen(root) == scanned(root)
    publish(root, "afterwards")
    entries = version_index.read_index(storage.normalise(root), DATASET)
    assert {n: one.status for n, one in entries.items()} == dict.fromkeys(range(1, 10), "published")
    again = reservation.reserve(root, DATASET, "a-0")
    assert (again.committed, again.version) == (True, min(answers[0])), "a run finds its version by the index"


def test_a_commit_of_many_files_looks_at_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by how often a file's path is hashed: it is quadratic where a set is made for each of them."""

    class Counting(str):
        hashed = 0

        def __hash__(self) -> int:
            Counting.hashed += 1
            return super().__hash__()

    counts = []
    for files in (100, 400):
        root = str(tmp_path / str(files))
        held = versions.reserve(root, DATASET, "run", DEAD)
        held = versions.reserve(root, DATASET, "run")
        entries = [held.entry(storage.write_parquet(table("run", n), held.data_uri(n))) for n in range(files)]
        listing = versions._paths
        monkeypatch.setattr(versions, "_paths", lambda uri, listing=listing: [Counting(path) for path in listing(uri)])
        paths = [Counting(entry.path) for entry in entries]
        Counting.hashed = 0
        versions.discard_attempt_files(held, keep=paths)
        versions._replaced(held, paths)
        counts.append(Counting.hashed)
        monkeypatch.undo()
        versions.commit(held, manifest_of(held, entries))
    assert counts[1] <= 5 * counts[0], counts
