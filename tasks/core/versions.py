"""The commit protocol: a version exists from the moment its manifest does, whole or not at all.

    reserve → write files → validate → commit → read
                                         │
                            put-if-absent of vN/_manifest.json

Why nothing is ever mixed. The conditional create of the manifest is the only deciding step: of any number of attempts
one succeeds, and the manifest names exactly that attempt's files. Files of an attempt that may still be alive are
deleted only after the decision, when it can't publish any more; files of dead attempts earlier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.core import layout, storage
from tasks.core.errors import CorruptVersion, GateFailed, VersionConflict
from tasks.core.manifest import FileEntry, Manifest
from tasks.core.reading import (
    committed_manifests,
    data_files,
    latest,
    list_datasets,
    live_manifests,
    published_versions,
    read_manifest,
    read_table,
    resolve,
    verify,
)
from tasks.core.reservation import (
    Attempt,
    Owner,
    Reservation,
    attempts,
    current_owner,
    ensure_newest,
    parse_manifest,
    reserve,
    version_numbers,
)

__all__ = [
    "Attempt",
    "Owner",
    "Reservation",
    "attempt_of",
    "attempts",
    "commit",
    "committed_manifests",
    "current_owner",
    "data_files",
    "discard_attempt_files",
    "ensure_newest",
    "latest",
    "list_datasets",
    "live_manifests",
    "orphans",
    "published_versions",
    "read_manifest",
    "read_table",
    "reserve",
    "resolve",
    "verify",
    "version_numbers",
]

_ATTEMPT = re.compile(r"-a([0-9]+)\.")


def commit(reservation: Reservation, manifest: Manifest) -> Manifest:
    """Publish what was written under a reservation, or record that the gate rejected it.

    Doing it again, after a lost answer or in a retry, gives the manifest that was committed first. Of a version with
    status 'rejected' the data files are deleted, so that no reader that just opens the directory can take them for
    data; the manifest still says what they were, and _rejected/ and the reports stay.

    Returns:
        The manifest as it stands in the store.

    Raises:
        BalanceError: rows don't balance.
        GateFailed: the gate's verdict is 'fail' but the status is 'published'.
        CorruptVersion: a file that the manifest lists isn't there, or has another size.
        VersionConflict: a newer attempt exists, or another one has committed; it is named.
    """
    assert (manifest.dataset, manifest.version) == (reservation.dataset, reservation.version), "another's manifest"
    assert (manifest.run.flow_run_id, manifest.run.attempt) == (reservation.run_id, reservation.attempt), "other run"
    published = manifest.status == "published"
    assert manifest.files or not published, "a published version has at least one file, which bears its schema"
    for balance in manifest.balances:
        balance.check()
    if published and manifest.gate.verdict == "fail":
        failed = "; ".join(check.message for check in manifest.gate.checks if check.verdict == "fail")
        raise GateFailed(f"{manifest.dataset} v{manifest.version} is not published: the quality gate says: {failed}")

    data = manifest.model_dump_json(indent=2).encode()
    uri = layout.join(reservation.uri, layout.MANIFEST)
    stored = parse_manifest(uri, data, manifest.dataset, manifest.version)
    decided = _decided(reservation, data)
    if decided is None:
        ensure_newest(reservation)
        kept = (*manifest.rejected_files, *manifest.side_files)
        listed = (*manifest.files, *kept)
        _check_present(reservation, listed if published else kept)
        discard_attempt_files(reservation, keep=[file.path for file in listed])
        _delete(reservation, _replaced(reservation, [file.path for file in listed]))
        if not published:
            _delete(reservation, [file.path for file in manifest.files])
        decided = stored if storage.put_if_absent(uri, data) else _decided(reservation, data)
        assert decided is not None, "a committed manifest is never removed"
    _delete(reservation, orphans(reservation.uri, decided))
    return decided


def _decided(reservation: Reservation, data: bytes) -> Manifest | None:
    """The manifest that stands, if it is this attempt's own; None before the decision."""
    uri = layout.join(reservation.uri, layout.MANIFEST)
    try:
        found = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(uri, found, reservation.dataset, reservation.version)
    same_run = manifest.run.flow_run_id == reservation.run_id
    if found == data or (same_run and (reservation.committed or manifest.run.attempt == reservation.attempt)):
        return manifest
    mine = [path for path in orphans(reservation.uri, manifest) if attempt_of(path) == reservation.attempt]
    _delete(reservation, mine)
    raise VersionConflict(
        f"{reservation.dataset} v{reservation.version} was committed by attempt {manifest.run.attempt} of run "
        f"{manifest.run.flow_run_id!r} at {manifest.created_at.isoformat()}, not by attempt {reservation.attempt} of "
        f"run {reservation.run_id!r}: reserve again to publish a further version"
    )


def discard_attempt_files(reservation: Reservation, keep: Sequence[str] = ()) -> list[str]:
    """Delete what earlier attempts have left, as far as they are known to be over; meant for the start of an attempt.

    An attempt is over when its process is gone, or when it was made by the same process as this one. What an attempt
    elsewhere has left stays until the commit: it may still be alive and publish first.

    Args:
        reservation: The newest attempt.
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
    paths = [path for path in _paths(reservation.uri) if attempt_of(path) in over] if over else []
    paths = [path for path in paths if path not in set(keep)]
    _delete(reservation, paths)
    return paths


def _replaced(reservation: Reservation, listed: Sequence[str]) -> list[str]:
    """Data files of this attempt that it doesn't list, as it has written others in their place.

    They go before the manifest comes: a reader that just opens the directory would see their rows twice, and for ever
    if this process were killed in between.
    """
    own = [path for path in _paths(reservation.uri) if attempt_of(path) == reservation.attempt]
    return [path for path in own if path not in set(listed) and not path.startswith(("_", "."))]


def _paths(uri: str) -> list[str]:
    # What a link leads to isn't the version's, and must never be deleted with it.
    found = storage.list_files(uri, include_hidden=True, follow_links=False)
    return [info.uri.removeprefix(uri + "/") for info in found]


def attempt_of(path: str) -> int | None:
    """Number of the attempt that wrote a file of a version, which its name bears; None for any other file."""
    match = _ATTEMPT.search(path.rpartition("/")[2])
    return int(match[1]) if match else None


def orphans(uri: str, manifest: Manifest) -> list[str]:
    """Files of a committed version that belong to no reader: not listed, and not the protocol's or the report's.

    Args:
        uri: Directory of the version.
        manifest: Its manifest.

    Returns:
        Paths relative to the directory.
    """
    kept = {file.path for file in (*manifest.rejected_files, *manifest.side_files)}
    if manifest.status == "published":
        kept |= {file.path for file in manifest.files}
    # Of the temporary files one may be another process's reservation on its way, which is then written again.
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
