"""Retention: find the versions that may be deleted, and delete them; versions still in use stay.

A version stays if it is the latest live one, if a published version anywhere under the root was made from it, or if a
version that stays continues its state. One whose manifest is damaged stays until it is withdrawn, and so does what it
may have been made from: a copy of the manifest may still come back.

The number of a deleted version is never reused: `prune` takes it over with a new attempt before it deletes anything, as
a run takes over an abandoned version (`reservation`).
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from tasks.io import storage
from tasks.io.errors import ConfigError, VersionConflict
from tasks.io.listing import FileInfo
from tasks.store import layout
from tasks.store.reading import PRUNED, Overview, list_dataset, list_datasets, overview, read_committed, update_index
from tasks.store.reservation import NOBODY, Attempt, attempts, version_numbers
from tasks.store.version_index import IndexedVersion, mark
from tasks.store.versions import attempt_of, orphans

State = Literal["published", "withdrawn", "rejected", "abandoned"]

ABANDONED_AFTER = dt.timedelta(days=7)
"""Age at which an uncommitted version of a process elsewhere counts as abandoned."""

CUT_OFF_AFTER = dt.timedelta(days=1)
"""Age at which a temporary file counts as left by a killed process: no single file takes so long to write."""

_ORDER: Mapping[State, int] = {"rejected": 0, "abandoned": 0, "withdrawn": 1, "published": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prunable:
    """Version that may be deleted."""

    dataset: str
    version: int
    state: State
    created: dt.datetime
    files: int
    bytes: int
    only_here: tuple[dt.datetime, ...] = ()
    """As-of times that no remaining version holds: deletion loses this history."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Versions that may be deleted, in that order, and reasons why others that are old enough or too many stay."""

    prunable: tuple[Prunable, ...]
    held: Mapping[int, str] = field(default_factory=dict)


def survey(
    root: str,
    dataset: str,
    *,
    keep: int | None = None,
    older_than: dt.timedelta | None = None,
    now: dt.datetime | None = None,
) -> Survey:
    """Find the versions of a dataset that may be deleted: rejected and abandoned ones first, then from the oldest.

    Args:
        root: Root of the store.
        dataset: Dataset name.
        keep: Number of live versions that stay, from the newest; None: by age alone. With neither bound no published
            version goes, only rejected and abandoned ones.
        older_than: Versions younger than this stay in any case; None: any age.
        now: Reference time; the clock's if omitted.

    Raises:
        ConfigError: `keep` is below 1, or `older_than` is negative.
        CorruptVersion: a manifest is of a format that a newer release writes.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"keep = {keep}: at least the latest version stays; give 1 or more")
    if older_than is not None and older_than < dt.timedelta(0):
        raise ConfigError(f"older_than = {older_than}: give a time of 0 or more")
    root = storage.normalise(root)
    now = now or dt.datetime.now(dt.UTC)
    listed = list_dataset(root, dataset, follow_links=False)
    committed = overview(root, dataset, listed=listed)
    known, taken_back = committed.versions, committed.withdrawals
    states = {n: _state(one, n in taken_back) for n, one in known.items()}
    created = {n: one.created_at or now for n, one in known.items()}
    for number in committed.damaged.keys() & taken_back.keys():
        states[number], created[number] = "withdrawn", taken_back[number].when or now
    for number, since in _abandoned(root, dataset, known.keys() | committed.damaged.keys(), listed, now).items():
        states[number], created[number] = "abandoned", since

    live = [n for n in sorted(known) if states[n] == "published"]
    spared = set(live[-(keep or 1) :])
    if keep is None and older_than is None:
        spared |= {n for n in states if states[n] in ("published", "withdrawn")}
    wanted = {n for n in states if n not in spared and (older_than is None or created[n] < now - older_than)}
    held = _held(root, dataset, committed, states, wanted) if wanted else {}
    wanted -= set(held)
    held |= dict.fromkeys(committed.unreadable, "its manifest is damaged: restore it from a copy, or withdraw it first")
    kept = {moment for n in live if n not in wanted for moment in known[n].as_of}
    found = []
    for n in sorted(wanted, key=lambda n: (_ORDER[states[n]], n)):
        files = _files(root, dataset, n)
        lost = tuple(t for t in known[n].as_of if t not in kept) if states[n] == "published" else ()
        size = sum(info.bytes for info in files)
        found.append(
            Prunable(
                dataset=dataset,
                version=n,
                state=states[n],
                created=created[n],
                files=len(files),
                bytes=size,
                only_here=lost,
            )
        )
    return Survey(tuple(found), held)


def prunable(
    root: str, dataset: str, *, keep: int | None = None, older_than: dt.timedelta | None = None
) -> list[Prunable]:
    """Return the versions that may be deleted, as `survey` finds them, in the order of deletion."""
    return list(survey(root, dataset, keep=keep, older_than=older_than).prunable)


def prune(root: str, chosen: Iterable[Prunable]) -> int:
    """Delete versions: the manifest first, so that no reader sees a part, then all but the reservation.

    If it is interrupted, run it again. A reader that has opened a version before may miss files.

    Returns:
        Deleted bytes.

    Raises:
        VersionConflict: a new attempt at one of them has begun since.
    """
    root = storage.normalise(root)
    deleted = 0
    changed: dict[str, None] = {}
    for version in chosen:
        changed[version.dataset] = None
        uri = layout.version_uri(root, version.dataset, version.version)
        mark(root, version.dataset, version.version)
        _take_over(root, version)
        storage.delete(layout.join(uri, layout.MANIFEST))
        for info in _files(root, version.dataset, version.version):
            storage.delete(info.uri)
        deleted += version.bytes
    for dataset in changed:
        update_index(root, dataset)
    return deleted


def leftovers(root: str, datasets: Iterable[str], now: dt.datetime | None = None) -> list[FileInfo]:
    """Find files of killed runs: nobody reads them, and no later run removes them.

    - In committed versions, files that the commit didn't get to delete.
    - Everywhere below the root, on a local disk, temporary files that are older than `CUT_OFF_AFTER`. (On S3 they are
      uploads that were never completed, see `listing`.)

    Raises:
        CorruptVersion: a manifest can't be read.
    """
    root = storage.normalise(root)
    found: dict[str, FileInfo] = {}
    for dataset in datasets:
        committed = (read_committed(root, dataset, [number]).warned() for number in version_numbers(root, dataset))
        for manifest in (manifest for one in committed for manifest in one.versions.values()):
            uri = layout.version_uri(root, dataset, manifest.version)
            # Foreign files aren't ours to delete.
            left = [path for path in orphans(uri, manifest) if attempt_of(path) or storage.is_temporary(path)]
            gone = {layout.join(uri, path) for path in left}
            listed = storage.list_files(uri, include_hidden=True) if gone else []
            found |= {info.uri: info for info in listed if info.uri in gone}
    if not storage.is_s3(root):  # which has no temporary files
        oldest = ((now or dt.datetime.now(dt.UTC)) - CUT_OFF_AFTER).timestamp() * 1e9
        below = [info for info in storage.list_files(root, include_hidden=True) if storage.is_temporary(info.uri)]
        found |= {info.uri: info for info in below if float(info.stamp) < oldest}
    return [found[uri] for uri in sorted(found)]


def _state(version: IndexedVersion, taken_back: bool) -> State:
    if version.status != "published":
        return "rejected"
    return "withdrawn" if taken_back else "published"


def _abandoned(
    root: str, dataset: str, committed: Set[int], listed: Iterable[str], now: dt.datetime
) -> dict[int, dt.datetime]:
    """Return versions with files but without manifest or live owner, with the time of their last attempt."""
    found = {}
    # Without files there is nothing to gain, and a pruned number is final.
    filled = {layout.version_and_path(root, dataset, uri)[0] for uri in listed if not _holds_number(uri)}
    for number in sorted(number for number in filled if number is not None and number not in committed):
        chain = attempts(root, dataset, number)
        if not chain:
            continue  # not our directory
        last = chain[-1]
        if last.run_id == PRUNED or last.owner.is_gone() or last.created_at < now - ABANDONED_AFTER:
            found[number] = last.created_at
    return found


def _held(
    root: str, dataset: str, committed: Overview, states: Mapping[int, State], wanted: set[int]
) -> dict[int, str]:
    """Return versions that are, or may be, in use, and by whom."""
    held: dict[int, str] = {}
    known = committed.versions
    if layout.kind(dataset) == "features":
        for number in committed.unreadable:
            why = f"v{number}, whose manifest is damaged, may continue its state"
            held |= dict.fromkeys((n for n in wanted if n < number and n in known), why)
    for other in list_datasets(root):
        if other == dataset:
            continue
        found = overview(root, other, listed=list_dataset(root, other))
        if found.unreadable and layout.kind(other) in ("training-set", "streaming-copy"):
            why = f"{other} v{max(found.unreadable)}, whose manifest is damaged, may have been made from it"
            held |= dict.fromkeys((n for n in wanted if n in known and n not in held), why)
        for one in found.versions.values():
            if one.status != "published":
                continue
            for name, version in one.made_from:
                if name == dataset and version in wanted:
                    held.setdefault(version, f"{other} v{one.version} was made from it")
    # A chain of states: a version that a remaining one continues stays, and so does the one that it continues.
    staying = sorted(n for n in known if states[n] != "rejected" and (n not in wanted or n in held))
    while staying:
        number = staying.pop()
        parent = known[number].state_parent
        if parent in wanted and parent not in held:
            held[parent] = f"v{number} continues its state"
            staying.append(parent)
    return held


def _files(root: str, dataset: str, version: int) -> Sequence[FileInfo]:
    """Return the files of a version that are deleted with it: all but its reservations."""
    uri = layout.version_uri(root, dataset, version)
    # The target of a link isn't the version's, and must never be deleted with it.
    found = storage.list_files(uri, include_hidden=True, follow_links=False)
    return [info for info in found if not _holds_number(info.uri)]


def _holds_number(uri: str) -> bool:
    """Return True if a file is a reservation, which stays for ever."""
    return uri.rpartition("/")[2].startswith(layout.reservation_name(1).removesuffix(".json"))


def _take_over(root: str, version: Prunable) -> None:
    """Hold the number for ever: the newest attempt, of a run that never ends and never commits."""
    chain = attempts(root, version.dataset, version.version)
    if chain and chain[-1].run_id == PRUNED:
        return
    taken = version.state == "abandoned" and chain[-1].created_at != version.created
    mark = Attempt(
        run_id=PRUNED,
        attempt=len(chain) + 1,
        owner=NOBODY,
        created_at=dt.datetime.now(dt.UTC),
        token=uuid.uuid4().hex,
    )
    uri = layout.version_uri(root, version.dataset, version.version)
    data = mark.model_dump_json(indent=2).encode()
    place = layout.join(uri, layout.reservation_name(mark.attempt))
    if taken or (not storage.put_if_absent(place, data) and storage.read_bytes(place) != data):
        raise VersionConflict(
            f"{version.dataset} v{version.version} is being written again by another run; look again what may go"
        )
