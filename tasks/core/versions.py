"""The commit protocol and the readers: a version exists from the moment its manifest does, whole or not at all.

    reserve → write files → validate → commit → read
                                         │
                            put-if-absent of vN/_manifest.json

Why nothing is ever mixed. The conditional create of the manifest is the only deciding step: of any number of attempts
one succeeds, and the manifest names exactly that attempt's files. Files of an attempt that may still be alive are
deleted only after the decision, when it can't publish any more; files of dead attempts earlier.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import layout, storage
from tasks.core.errors import ConfigError, CorruptVersion, GateFailed, VersionConflict, VersionNotFound
from tasks.core.manifest import FileEntry, Manifest
from tasks.core.reservation import (
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

__all__ = [
    "Attempt",
    "Owner",
    "Reservation",
    "attempts",
    "commit",
    "committed_manifests",
    "current_owner",
    "data_files",
    "discard_attempt_files",
    "ensure_newest",
    "latest",
    "list_datasets",
    "published_versions",
    "read_manifest",
    "read_table",
    "reserve",
    "resolve",
    "verify",
    "version_numbers",
]

_ATTEMPT = re.compile(r"-a([0-9]+)\.")
_CURE = "publish a new version from the same sources, or restore the file from a copy"


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
        if not published:
            _delete(reservation, [file.path for file in manifest.files])
        decided = stored if storage.put_if_absent(uri, data) else _decided(reservation, data)
        assert decided is not None, "a committed manifest is never removed"
    _delete(reservation, _orphans(reservation, decided))
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
    mine = [path for path in _orphans(reservation, manifest) if _attempt_of(path) == reservation.attempt]
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
    paths = [path for path in _paths(reservation) if _attempt_of(path) in over] if over else []
    paths = [path for path in paths if path not in set(keep)]
    _delete(reservation, paths)
    return paths


def _paths(reservation: Reservation) -> list[str]:
    found = storage.list_files(reservation.uri, include_hidden=True)
    return [info.uri.removeprefix(reservation.uri + "/") for info in found]


def _attempt_of(path: str) -> int | None:
    match = _ATTEMPT.search(path.rpartition("/")[2])
    return int(match[1]) if match else None


def _orphans(reservation: Reservation, manifest: Manifest) -> list[str]:
    """Files of a committed version that belong to no reader: not listed, and not the protocol's or the report's."""
    kept = {file.path for file in (*manifest.rejected_files, *manifest.side_files)}
    if manifest.status == "published":
        kept |= {file.path for file in manifest.files}
    # A hidden name without an attempt may be another process's reservation on its way.
    return [
        path
        for path in _paths(reservation)
        if path not in kept and (_attempt_of(path) is not None or not path.startswith(("_", ".")))
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


def read_manifest(root: str, dataset: str, version: int) -> Manifest:
    """Manifest of a committed version, published or rejected.

    Raises:
        VersionNotFound: the version isn't committed; the message names those that are published.
        CorruptVersion: the manifest is cut short, altered, another version's, or of a format unknown here.
    """
    root = storage.normalise(root)
    manifest = find_manifest(root, dataset, version)
    if manifest is None:
        raise _not_found(root, dataset, f"{dataset} has no version v{version} under {root}")
    return manifest


def committed_manifests(root: str, dataset: str) -> list[Manifest]:
    """Manifests of all committed versions, published and rejected, by ascending version.

    Raises:
        CorruptVersion: as `read_manifest`.
    """
    root = storage.normalise(root)
    uris = {
        layout.join(layout.version_uri(root, dataset, version), layout.MANIFEST): version
        for version in version_numbers(root, dataset)
    }
    contents = storage.read_many(uris)
    return [parse_manifest(uri, contents[uri], dataset, version) for uri, version in uris.items() if uri in contents]


def published_versions(root: str, dataset: str) -> list[int]:
    """Numbers of the published versions, ascending."""
    return [manifest.version for manifest in committed_manifests(root, dataset) if manifest.status == "published"]


def latest(root: str, dataset: str) -> Manifest | None:
    """Manifest of the highest published version, or None when there is none."""
    root = storage.normalise(root)
    for version in reversed(version_numbers(root, dataset)):
        manifest = find_manifest(root, dataset, version)
        if manifest is not None and manifest.status == "published":
            return manifest
    return None


def resolve(root: str, dataset: str, version: int | Literal["latest"] = "latest") -> Manifest:
    """Manifest of a published version.

    Raises:
        VersionNotFound: there is no such version, or the gate rejected it; the message names those that there are.
        CorruptVersion: as `read_manifest`.
    """
    root = storage.normalise(root)
    if version == "latest":
        newest = latest(root, dataset)
        if newest is None:
            raise _not_found(root, dataset, f"{dataset} has no published version under {root}")
        return newest
    manifest = read_manifest(root, dataset, version)
    if manifest.status != "published":
        report = layout.join(layout.version_uri(root, dataset, version), layout.REPORT_HTML)
        cause = f"{dataset} v{version} was rejected by the quality gate (see {report})"
        raise _not_found(root, dataset, cause)
    return manifest


def _not_found(root: str, dataset: str, cause: str) -> VersionNotFound:
    published = published_versions(root, dataset)
    if published:
        names = ", ".join(f"v{version}" for version in published)
        return VersionNotFound(f"{cause}; published: {names}; name one of them or 'latest'")
    known = list_datasets(root)
    close = difflib.get_close_matches(dataset, known, n=3, cutoff=0.5)
    if dataset in known:
        cure = "run the flow that publishes it"
    elif close:
        cure = "did you mean " + " or ".join(repr(name) for name in close) + "?"
    elif known:
        cure = "datasets there: " + ", ".join(repr(name) for name in known)
    else:
        cure = "there are no datasets; run the flow that publishes it, or correct the root"
    return VersionNotFound(f"{cause}; {cure}")


def list_datasets(root: str) -> list[str]:
    """Names of all datasets under a root that have a version, published or not, sorted."""
    root = storage.normalise(root)
    found: list[str] = []
    pending = [""]
    while pending:
        dataset = pending.pop()
        names = storage.list_directories(layout.join(root, dataset) if dataset else root)
        if dataset and any(layout.parse_version(name) is not None for name in names):
            found.append(dataset)
        pending.extend(
            layout.join(dataset, name) if dataset else name
            for name in names
            if layout.parse_version(name) is None and not name.startswith(("_", "."))
        )
    return sorted(found)


def data_files(root: str, manifest: Manifest) -> list[str]:
    """URIs of exactly the files that make up a published version, in the manifest's order.

    Raises:
        VersionNotFound: the gate rejected the version, so that it has no data.
    """
    root = storage.normalise(root)
    if manifest.status != "published":
        raise _not_found(root, manifest.dataset, f"{manifest.dataset} v{manifest.version} was rejected")
    base = layout.version_uri(root, manifest.dataset, manifest.version)
    return [layout.join(base, file.path) for file in manifest.files]


def read_table(
    root: str,
    dataset: str,
    version: int | Literal["latest"] = "latest",
    columns: Sequence[str] | None = None,
    verify: bool = False,
) -> pa.Table:
    """Read a published version into memory: the files that its manifest lists, in that order, and no others.

    Args:
        root: Root of the store.
        dataset: Dataset name.
        version: Version number, or 'latest'.
        columns: Columns to read, in this order; None reads all.
        verify: Whether to compare every file's digest first. Without it, sizes and row counts are compared.

    Raises:
        VersionNotFound: as `resolve`.
        ConfigError: a column isn't in the version.
        CorruptVersion: a file is missing or differs from the manifest.
    """
    manifest = resolve(root, dataset, version)
    known = [column.name for column in manifest.columns]
    for column in columns or ():
        if column not in known:
            close = difflib.get_close_matches(column, known, n=1) or known
            raise ConfigError(
                f"{dataset} v{manifest.version} has no column {column!r}: use " + " or ".join(map(repr, close))
            )
    if verify:
        _verify_files(root, manifest, manifest.files)
    uris = data_files(root, manifest)
    tables = [_read_file(uri, file, columns) for uri, file in zip(uris, manifest.files, strict=True)]
    return pa.concat_tables(tables)


def _read_file(uri: str, expected: FileEntry, columns: Sequence[str] | None) -> pa.Table:
    try:
        with storage.open_input(uri) as source:
            _compare(uri, "bytes", expected.bytes, source.size())
            table = pq.ParquetFile(source).read(columns=None if columns is None else list(columns))
    except FileNotFoundError as error:
        raise CorruptVersion(f"{uri} is missing, but its manifest lists it: {_CURE}") from error
    except pa.ArrowInvalid as error:
        raise CorruptVersion(f"{uri} can't be read as Parquet ({error}): {_CURE}") from error
    _compare(uri, "rows", expected.rows, table.num_rows)
    return table if columns is None else table.select(list(columns))


def verify(root: str, manifest: Manifest) -> None:
    """Compare every file that a manifest lists with it, byte by byte: data, rejected rows and report.

    Raises:
        CorruptVersion: a file is missing or differs; the message names it, and what was expected and found.
    """
    published = manifest.status == "published"
    data = manifest.files if published else ()
    _verify_files(root, manifest, (*data, *manifest.rejected_files, *manifest.side_files))
    if manifest.report is not None:
        base = layout.version_uri(storage.normalise(root), manifest.dataset, manifest.version)
        _verify_digest(layout.join(base, layout.REPORT_JSON), f"sha256:{manifest.report.json_sha256}")
        _verify_digest(layout.join(base, layout.REPORT_HTML), f"sha256:{manifest.report.html_sha256}")


def _verify_files(root: str, manifest: Manifest, files: Sequence[FileEntry]) -> None:
    base = layout.version_uri(storage.normalise(root), manifest.dataset, manifest.version)
    sizes = {info.uri: info.bytes for info in storage.list_files(base, include_hidden=True)}

    def verify_file(file: FileEntry) -> None:
        uri = layout.join(base, file.path)
        if uri in sizes:
            _compare(uri, "bytes", file.bytes, sizes[uri])
        _verify_digest(uri, file.digest)

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(verify_file, files))


def _verify_digest(uri: str, expected: str) -> None:
    try:
        _compare(uri, "digests", expected, storage.digest_of(uri, expected))
    except FileNotFoundError as error:
        raise CorruptVersion(f"{uri} is missing, but its manifest lists it: {_CURE}") from error


def _compare(uri: str, what: str, expected: object, found: object) -> None:
    if found != expected:
        raise CorruptVersion(f"{uri}: {what} differ from its manifest: expected {expected}, found {found}: {_CURE}")
