"""Commit protocol: a version exists from the moment its manifest does, whole or not at all.

    reserve → write files → validate → commit → read
                                         │
                            put-if-absent of vN/_manifest.json

Versions are never mixed. The conditional create of the manifest is the only deciding step: of any number of attempts
one succeeds, and the manifest names exactly that attempt's files. Files of an attempt that may still be alive are
deleted only after the decision, when it can no longer publish; files of dead attempts earlier.

No two published versions have the same base. A version carries over state (the classes' ids) from the latest version
when it was planned, its base. Before it is published, every number between the two is decided: an undecided one gets a
manifest with status 'rejected' by put-if-absent, which blocks its run. After that nothing below can be published any
more, and a publisher above must decide this number first. So of two runs with one base the first publishes, and the
other is `Superseded` and plans again.

A withdrawal is one more record beside the manifest, made by put-if-absent: the first one counts, readers skip the
version, and no published file is rewritten. The data stays, so that everything made from it can still be explained;
`retention` deletes it.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence

import pyarrow.parquet as pq

from tasks.io import storage
from tasks.io.errors import (
    CorruptVersion,
    DamagedManifest,
    GateFailed,
    Superseded,
    VersionConflict,
    VersionNotFound,
)
from tasks.store import layout
from tasks.store.manifest import (
    SUPERSEDED,
    CheckResult,
    FileEntry,
    GateResult,
    Manifest,
    RowBalance,
    RunRecord,
    check_equal,
    lists_apart,
)
from tasks.store.reading import (
    PRUNED,
    Withdrawal,
    data_files,
    latest,
    list_datasets,
    live_manifests,
    overview,
    published_versions,
    read_committed,
    read_manifest,
    read_table,
    resolve,
    update_index,
    verify,
    withdrawal_uri,
)
from tasks.store.reservation import (
    Attempt,
    Owner,
    Reservation,
    attempts,
    current_owner,
    ensure_newest,
    find_manifest,
    parse_manifest,
    reserve,
    version_numbers,
)
from tasks.store.version_index import mark, read_index

__all__ = [
    "Attempt",
    "Owner",
    "Reservation",
    "attempt_of",
    "attempts",
    "check_written",
    "commit",
    "current_owner",
    "data_files",
    "discard_attempt_files",
    "ensure_newest",
    "latest",
    "list_datasets",
    "live_manifests",
    "orphans",
    "overview",
    "published_versions",
    "read_manifest",
    "read_table",
    "reserve",
    "resolve",
    "update_index",
    "verify",
    "version_numbers",
    "withdraw",
]

_ATTEMPT = re.compile(r"-a([0-9]+)\.")


def check_written(
    dataset: str,
    uri: str,
    files: Sequence[FileEntry],
    rejected: Sequence[FileEntry],
    balances: Sequence[RowBalance],
) -> None:
    """Compare the reports of a version's files with their contents.

    Every balance must add up, every file must hold as many rows as reported, and the files of rejected rows as
    many as the balances count.

    Raises:
        BalanceError: they differ; the message has both figures.
    """
    for balance in balances:
        balance.check()
    entries = [*files, *rejected]
    counted = storage.in_threads(lambda entry: _rows_in(layout.join(uri, entry.path)), entries)
    for entry, rows in zip(entries, counted, strict=True):
        check_equal(f"{dataset}, {entry.path}", entry.rows, rows, "were reported as written, the file holds {}")
    reasons = sum(sum(balance.rejected.values()) for balance in balances)
    check_equal(dataset, reasons, sum(entry.rows for entry in rejected), "were rejected, _rejected/ holds {}")


def _rows_in(uri: str) -> int:
    with storage.open_input(uri) as source:
        return int(pq.read_metadata(source).num_rows)


def commit(reservation: Reservation, manifest: Manifest, base: int | None = None) -> Manifest:
    """Publish the files written under a reservation, or record that the gate rejected them.

    A repeated call, after a lost response or in a retry, returns the manifest that was committed first. Data files of a
    version with status 'rejected' are deleted, so that a reader that just opens the directory can't mistake them for
    data; the manifest still lists them, and _rejected/ and the reports stay.

    Args:
        reservation: Reservation of the version.
        manifest: Manifest of the version.
        base: Number of the latest version when this one was planned, 0 for none: it is published only while that is the
            latest one. None: no state was carried over, so others may be published meanwhile.

    Returns:
        The manifest in the store.

    Raises:
        BalanceError: rows don't balance.
        GateFailed: the gate's verdict is 'fail' but the status is 'published'.
        CorruptVersion: a file of the manifest is missing, or has another size.
        VersionConflict: a newer attempt exists, or another one has committed; the message names it.
        Superseded: a version above `base` was published meanwhile, or is about to be; this one is recorded as rejected.
    """
    assert (manifest.dataset, manifest.version) == (reservation.dataset, reservation.version), "another's manifest"
    assert (manifest.run.flow_run_id, manifest.run.attempt) == (reservation.run_id, reservation.attempt), "other run"
    published = manifest.status == "published"
    assert manifest.files or not published, "a published version has at least one file, which bears its schema"
    for balance in manifest.balances:
        balance.check()
    if published and manifest.gate.verdict == "fail":
        failed = "; ".join(check.message for check in manifest.gate.checks if check.verdict == "fail")
        raise GateFailed(f"{manifest} is not published: the quality gate says: {failed}")

    stated, lists = lists_apart(manifest)
    data = stated.model_dump_json(indent=2).encode()
    uri = layout.join(reservation.uri, layout.MANIFEST)
    decided = _decided(reservation, data)
    if decided is None:
        ensure_newest(reservation)
        if stated.file_lists is not None:
            storage.write_bytes(layout.join(reservation.uri, stated.file_lists.path), lists)
        stored = parse_manifest(uri, data, manifest.dataset, manifest.version)
        listed = (*stored.files, *stored.companions)
        _check_present(reservation, listed if published else stored.companions)
        if published and base is not None:
            _go_on_from(base, reservation, manifest)
        discard_attempt_files(reservation, keep=[file.path for file in listed])
        _delete(reservation, _replaced(reservation, [file.path for file in listed]))
        if not published:
            _delete(reservation, [file.path for file in manifest.files])
        decided = stored if storage.put_if_absent(uri, data) else _decided(reservation, data)
        assert decided is not None, "a committed manifest is never removed"
    _delete(reservation, orphans(reservation.uri, decided))
    update_index(reservation.root, reservation.dataset)
    return decided


def _decided(reservation: Reservation, data: bytes) -> Manifest | None:
    """Return the committed manifest, if it is this attempt's; None before the decision."""
    uri = layout.join(reservation.uri, layout.MANIFEST)
    try:
        found = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(uri, found, reservation.dataset, reservation.version)
    same_run = manifest.run.flow_run_id == reservation.run_id
    given_way = manifest.superseded is not None
    own = same_run and (reservation.committed or manifest.run.attempt == reservation.attempt)
    if found == data or (own and not given_way):
        return manifest
    mine = [path for path in orphans(reservation.uri, manifest) if attempt_of(path) == reservation.attempt]
    _delete(reservation, mine)
    if given_way:
        raise Superseded(f"{reservation}: {manifest.superseded}")
    raise VersionConflict(
        f"{reservation} was committed by attempt {manifest.run.attempt} of run "
        f"{manifest.run.flow_run_id!r} at {manifest.created_at.isoformat()}, not by attempt {reservation.attempt} of "
        f"run {reservation.run_id!r}: reserve again to publish a further version"
    )


def _go_on_from(base: int, reservation: Reservation, manifest: Manifest) -> None:
    """Ensure that nothing above the base is, or can be, published before this version; else record it as rejected.

    Raises:
        Superseded: there is such a version.
    """
    run = RunRecord(flow_run_id=reservation.run_id, attempt=reservation.attempt)
    first = f"Run {reservation.run_id} went on first from {_named(base)}, with v{reservation.version}."
    entries = read_index(reservation.root, reservation.dataset)
    between = [number for number in range(base + 1, reservation.version) if number not in entries]
    known = read_committed(reservation.root, reservation.dataset, between)
    for number in between:
        if number in known.versions or number in known.damaged:
            continue
        uri = layout.join(layout.version_uri(reservation.root, reservation.dataset, number), layout.MANIFEST)
        chain = attempts(reservation.root, reservation.dataset, number)
        if not (chain and chain[-1].run_id == PRUNED):
            closed = Manifest(
                dataset=reservation.dataset,
                version=number,
                status="rejected",
                created_at=dt.datetime.now(dt.UTC),
                files=(),
                columns=(),
                balances=(),
                profile={},
                gate=_given_way(first),
                inputs=(),
                config={},
                code_digest="",
                packages={},
                run=run,
            )
            storage.put_if_absent(uri, closed.model_dump_json(indent=2).encode())
    newest = latest(reservation.root, reservation.dataset)
    if newest is not None and newest.version > base:
        message = f"It began from {_named(base)}, and v{newest.version} was published meanwhile."
        gate = _given_way(message, *manifest.gate.checks)
        commit(reservation, manifest.model_copy(update={"status": "rejected", "gate": gate}))
        raise Superseded(f"{reservation}: {message}")


def _named(base: int) -> str:
    return f"v{base}" if base else "no version"


def _given_way(message: str, *others: CheckResult) -> GateResult:
    check = CheckResult(
        name=SUPERSEDED, verdict="fail", bound="no version was published since its planning", message=message
    )
    return GateResult(verdict="fail", checks=(*others, check))


def discard_attempt_files(reservation: Reservation, keep: Sequence[str] = ()) -> list[str]:
    """Delete files of earlier attempts that are known to be over; meant for the start of an attempt.

    An attempt is over if its process has ended, or is this one. Files of an attempt elsewhere stay until the commit: it
    may still be alive and publish first.

    Args:
        reservation: Reservation of the newest attempt.
        keep: Paths that this attempt has taken over, relative to the version's directory.

    Returns:
        Paths of the deleted files, relative to the version's directory.
    """
    if storage.exists(layout.join(reservation.uri, layout.MANIFEST)):
        return []
    chain = attempts(reservation.root, reservation.dataset, reservation.version)
    owner = chain[reservation.attempt - 1].owner
    earlier = chain[: reservation.attempt - 1]
    over = {link.attempt for link in earlier if link.owner == owner or link.owner.is_gone()}
    kept = set(keep)
    paths = [path for path in _paths(reservation.uri) if attempt_of(path) in over] if over else []
    paths = [path for path in paths if path not in kept]
    _delete(reservation, paths)
    return paths


def _replaced(reservation: Reservation, listed: Sequence[str]) -> list[str]:
    """Return data files of this attempt that its manifest doesn't list, because others replaced them.

    They are deleted before the manifest is written: a reader that just opens the directory would see their rows twice,
    and for ever if this process were killed in between.
    """
    kept = set(listed)
    own = [path for path in _paths(reservation.uri) if attempt_of(path) == reservation.attempt]
    return [path for path in own if path not in kept and not path.startswith(("_", "."))]


def _paths(uri: str) -> list[str]:
    # The target of a link isn't the version's, and must never be deleted with it.
    found = storage.list_files(uri, include_hidden=True, follow_links=False)
    return [info.uri.removeprefix(uri + "/") for info in found]


def attempt_of(path: str) -> int | None:
    """Return the number of the attempt that wrote a version's file, from its name; None for any other file."""
    match = _ATTEMPT.search(path.rpartition("/")[2])
    return int(match[1]) if match else None


def orphans(uri: str, manifest: Manifest) -> list[str]:
    """Return files of a committed version that no reader needs: not listed, and not the protocol's or the report's.

    Returns:
        Paths relative to the directory.
    """
    kept = {file.path for file in manifest.companions}
    if manifest.status == "published":
        kept |= {file.path for file in manifest.files}
    # A temporary file may be another process's reservation in progress, which is then written again.
    return [
        path
        for path in _paths(uri)
        if path not in kept
        and (attempt_of(path) is not None or not path.startswith(("_", ".")) or storage.is_temporary(path))
    ]


def _delete(reservation: Reservation, paths: Sequence[str]) -> None:
    for path in paths:
        storage.delete(layout.join(reservation.uri, path))


def _check_present(reservation: Reservation, files: Sequence[FileEntry]) -> None:
    sizes = {info.uri: info.bytes for info in storage.list_files(reservation.uri, include_hidden=True)}
    for file in files:
        uri = layout.join(reservation.uri, file.path)
        if sizes.get(uri) != file.bytes:
            found = f"{sizes[uri]} bytes" if uri in sizes else "no such file"
            raise CorruptVersion(
                f"{uri}: {file.bytes} bytes expected, found {found}; nothing was published: run again to write it anew"
            )


def withdraw(root: str, dataset: str, version: int, reason: str, by: str) -> None:
    """Withdraw a published version: readers skip it, and 'latest' is then the one before. A second call is no error.

    A version whose manifest is damaged can be withdrawn too: it causes no more warnings, and `prune` deletes it.

    Raises:
        VersionNotFound: the version isn't published.
    """
    root = storage.normalise(root)
    try:
        manifest = find_manifest(root, dataset, version)
        published = manifest is not None and manifest.status == "published"
    except DamagedManifest:
        published = True
    if not published:
        known = ", ".join(f"v{number}" for number in version_numbers(root, dataset)) or "none"
        state = "isn't published" if manifest is None else "was rejected by the quality gate: nobody reads it"
        raise VersionNotFound(f"{dataset} v{version} {state}; name a published version to withdraw (of {known})")
    mark(root, dataset, version)
    record = Withdrawal(reason=reason, when=dt.datetime.now(dt.UTC), by=by)
    storage.put_if_absent(withdrawal_uri(root, dataset, version), record.model_dump_json(indent=2).encode())
