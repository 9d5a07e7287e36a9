"""Readers of the store: list the versions, and read exactly the files that a published one lists.

A version is *live* while it is published and not withdrawn; 'latest' is the highest live one, and isn't stored. A
version whose manifest is damaged isn't live: it is skipped with a warning, and an error if requested by its number. A
version that may be read later (the store fails), or by a newer release, is never skipped.

Functions about all versions use the index (`version_index`), which isn't authoritative: a version that is chosen to be
read is looked at directly.
"""

from __future__ import annotations

import datetime as dt
import difflib
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, DamagedManifest, PipelineError, VersionNotFound
from tasks.io.listing import FileInfo
from tasks.io.location import is_transient
from tasks.io.tensors import Int64Array
from tasks.store import layout
from tasks.store.manifest import FileEntry, Manifest, Record
from tasks.store.reservation import attempts, find_manifest, parse_manifest, pass_over, version_numbers
from tasks.store.version_index import IndexedVersion, indexed, marked, read_index, write_index

CURE = "publish a new version from the same sources, or restore the file from a copy"
PRUNED = "pruned"
"""Run id that holds the number of a version whose files `retention` has deleted, so that it is never reused."""
_AT_ONCE = 32
_LOG = logging.getLogger(__name__)

Version = TypeVar("Version", Manifest, IndexedVersion)


class Withdrawal(Record):
    """Reason, time and author of a version's withdrawal."""

    reason: str = Field(description="Why readers must not use it, in words.")
    when: dt.datetime | None = Field(
        default=None, description="When it was withdrawn, UTC; None if that can't be read."
    )
    by: str = Field(default="unknown", description="Who withdrew it.")

    def __str__(self) -> str:
        if self.when is None:
            return f"withdrawn: {self.reason}"
        return f"withdrawn by {self.by} at {self.when:%Y-%m-%d %H:%M} UTC: {self.reason}"


def withdrawal_of(root: str, dataset: str, version: int) -> Withdrawal | None:
    """Return the withdrawal of a version; None if it isn't withdrawn."""
    uris = {version: withdrawal_uri(storage.normalise(root), dataset, version)}
    return parse_withdrawals(uris, storage.read_many(uris.values())).get(version)


def withdrawn(root: str, dataset: str) -> dict[int, Withdrawal]:
    """Return the withdrawn versions of a dataset, ascending."""
    root = storage.normalise(root)
    uris = {version: withdrawal_uri(root, dataset, version) for version in version_numbers(root, dataset)}
    return parse_withdrawals(uris, storage.read_many(uris.values()))


def withdrawal_uri(root: str, dataset: str, version: int) -> str:
    """Return the URI of the record of a version's withdrawal, if it is withdrawn; `root` is normalised."""
    return layout.join(layout.version_uri(root, dataset, version), layout.WITHDRAWN)


def parse_withdrawals(uris: Mapping[int, str], contents: Mapping[str, bytes]) -> dict[int, Withdrawal]:
    """Return withdrawals by version, from the contents of the existing records.

    Every record counts: one that can't be read withdraws its version all the same.
    """
    withdrawals = {}
    for version, uri in uris.items():
        if uri in contents:
            try:
                withdrawals[version] = Withdrawal.model_validate_json(contents[uri])
            except ValidationError as fault:
                withdrawals[version] = Withdrawal(
                    reason=f"{uri} can't be read as a record ({fault.error_count()} errors in {len(contents[uri])} "
                    "bytes): delete that file to publish the version again, and withdraw it anew after that"
                )
    return withdrawals


@dataclass(frozen=True, slots=True)
class Committed(Generic[Version]):
    """Committed versions by their numbers, ascending, those with damaged manifests, and withdrawals."""

    versions: Mapping[int, Version]
    damaged: Mapping[int, DamagedManifest]
    withdrawals: Mapping[int, Withdrawal]

    @property
    def live(self) -> list[Version]:
        """Live versions."""
        withdrawn = self.withdrawals
        return [one for n, one in self.versions.items() if one.status == "published" and n not in withdrawn]

    @property
    def unreadable(self) -> dict[int, DamagedManifest]:
        """Damaged manifests of versions that aren't withdrawn."""
        return {n: fault for n, fault in self.damaged.items() if n not in self.withdrawals}

    def warned(self) -> Self:
        """Warn of damaged versions that are skipped, of each once in a process."""
        for fault in self.unreadable.values():
            pass_over(fault)
        return self


@dataclass(frozen=True, slots=True)
class Overview(Committed[IndexedVersion]):
    """Summary of all committed versions of a dataset.

    pruned: entries of pruned versions. undecided: numbers that are only reserved. stored: contents of the index.
    """

    pruned: Mapping[int, IndexedVersion]
    undecided: Sequence[int]
    stored: Mapping[int, IndexedVersion]

    @property
    def settled(self) -> dict[int, IndexedVersion]:
        """Entries that will never be revoked."""
        return {**self.pruned, **{n: one for n, one in self.versions.items() if n not in self.withdrawals}}


def read_manifest(root: str, dataset: str, version: int) -> Manifest:
    """Return the manifest of a committed version, published or rejected.

    Raises:
        VersionNotFound: the version isn't committed; the message names those that are published.
        CorruptVersion: the manifest is damaged (`DamagedManifest`), or of a format that a newer release writes.
    """
    root = storage.normalise(root)
    manifest = find_manifest(root, dataset, version)
    if manifest is None:
        chain = attempts(root, dataset, version)
        pruned = bool(chain) and chain[-1].run_id == PRUNED
        cause = f"{dataset} v{version} was pruned at {chain[-1].created_at:%Y-%m-%d %H:%M} UTC" if pruned else None
        raise _not_found(root, dataset, cause or f"{dataset} has no version v{version} under {root}")
    return manifest


def live_manifests(root: str, dataset: str) -> list[Manifest]:
    """Return manifests of all live versions, by ascending version; for callers that need each of them whole.

    Raises:
        CorruptVersion: a manifest is of a format that a newer release writes.
    """
    return read_committed(root, dataset).warned().live


def read_committed(root: str, dataset: str, numbers: Sequence[int] | None = None) -> Committed[Manifest]:
    """Read the manifests of some versions, or of all, and the withdrawals, in one round of requests.

    Args:
        root: Root of the store.
        dataset: Dataset name.
        numbers: Versions to look at; None: all versions ever begun.

    Raises:
        CorruptVersion: a manifest is of a format that a newer release writes.
    """
    root = storage.normalise(root)
    numbers = version_numbers(root, dataset) if numbers is None else numbers
    return _looked_at(root, dataset, numbers, _whole)


def _looked_at(
    root: str, dataset: str, numbers: Sequence[int], keep: Callable[[Manifest, str, bytes], Version]
) -> Committed[Version]:
    """Read some versions in one round of requests; `keep` gets a manifest, its URI and its bytes."""
    found: dict[int, Version] = {}
    damaged: dict[int, DamagedManifest] = {}
    manifests: dict[int, str] = {n: _manifest_uri(root, dataset, n) for n in numbers}
    records: dict[int, str] = {n: withdrawal_uri(root, dataset, n) for n in numbers}
    contents = storage.read_many([*manifests.values(), *records.values()])
    for number, uri in manifests.items():
        if uri in contents:
            try:
                manifest = parse_manifest(uri, contents[uri], dataset, number)
            except DamagedManifest as fault:
                damaged[number] = fault
            else:
                found[number] = keep(manifest, uri, contents[uri])
    return Committed(dict(sorted(found.items())), damaged, parse_withdrawals(records, contents))


def _whole(manifest: Manifest, *_: object) -> Manifest:
    return manifest


def _in_short(manifest: Manifest, uri: str, data: bytes) -> IndexedVersion:
    return indexed(manifest, len(data), storage.stamp_of(uri, data))


def overview(
    root: str,
    dataset: str,
    known: Mapping[int, IndexedVersion] | None = None,
    listed: Mapping[str, FileInfo] | None = None,
) -> Overview:
    """Return all committed versions of a dataset from the index; versions not settled there are looked at directly.

    The number of requests depends on how many versions aren't settled, not on how many there are.

    Args:
        root: Root of the store.
        dataset: Dataset name.
        known: Settled entries of an earlier call.
        listed: Every file of the dataset, as `list_dataset` gives them: entries are compared with the manifests' sizes
            and stamps, so that a manifest that was damaged or removed since is noticed. None: it isn't noticed, and a
            caller that uses a version must read its manifest.

    Raises:
        CorruptVersion: a manifest is of a format that a newer release writes.
    """
    root = storage.normalise(root)
    numbers = version_numbers(root, dataset) if listed is None else _numbers(root, dataset, listed)
    stored = {} if known is not None and known.keys() >= set(numbers) else read_index(root, dataset)
    entries = {**stored, **(known or {})}
    entries = {n: entries[n] for n in numbers if n in entries}
    pruned = {n: one for n, one in entries.items() if one.status == "pruned"}
    if listed is None:
        marks = marked(root, dataset)  # after the index: its entries were true until the mark was made
        found = {n: one for n, one in entries.items() if n not in marks and n not in pruned}
        unsure = [n for n in numbers if n not in found and n not in pruned]
    else:
        found = {n: one for n, one in entries.items() if _unchanged(root, dataset, one, listed)}
        unsure = [n for n in numbers if n not in found and _manifest_uri(root, dataset, n) in listed]
        pruned = {n: one for n, one in pruned.items() if n not in unsure}
    damaged: dict[int, DamagedManifest] = {}
    withdrawals: dict[int, Withdrawal] = {}
    for start in range(0, len(unsure), _AT_ONCE):
        looked_at = _looked_at(root, dataset, unsure[start : start + _AT_ONCE], _in_short)
        found |= looked_at.versions
        damaged |= looked_at.damaged
        withdrawals |= looked_at.withdrawals
    undecided = [n for n in unsure if n not in found and n not in damaged]
    return Overview(dict(sorted(found.items())), damaged, withdrawals, pruned, undecided, stored)


def _numbers(root: str, dataset: str, listed: Iterable[str]) -> list[int]:
    found = {layout.version_and_path(root, dataset, uri)[0] for uri in listed}
    return sorted(number for number in found if number is not None)


def _unchanged(root: str, dataset: str, entry: IndexedVersion, listed: Mapping[str, FileInfo]) -> bool:
    """Compare an entry with the listing of its manifest; a version that may be withdrawn is looked at."""
    info = listed.get(_manifest_uri(root, dataset, entry.version))
    same = info is not None and (info.bytes, info.stamp) == (entry.manifest_bytes, entry.manifest_stamp)
    return same and withdrawal_uri(root, dataset, entry.version) not in listed


def _manifest_uri(root: str, dataset: str, version: int) -> str:
    return layout.join(layout.version_uri(root, dataset, version), layout.MANIFEST)


def list_dataset(root: str, dataset: str, *, follow_links: bool = True) -> dict[str, FileInfo]:
    """Return every file of a dataset by its URI, hidden ones too."""
    place = layout.dataset_uri(storage.normalise(root), dataset)
    return {info.uri: info for info in storage.list_files(place, include_hidden=True, follow_links=follow_links)}


def update_index(root: str, dataset: str) -> None:
    """Add newly settled versions to the index; rebuild it if it is missing or damaged.

    Call it after each change. If it fails, readers are slower and see the same.
    """
    root = storage.normalise(root)
    try:
        found = overview(root, dataset)
        settled = found.settled
        for number in set(found.undecided) & marked(root, dataset) if found.undecided else ():
            chain = attempts(root, dataset, number)
            if chain and chain[-1].run_id == PRUNED:
                settled[number] = IndexedVersion(version=number, status="pruned")
        if settled != found.stored:
            write_index(root, dataset, settled)
    except (OSError, PipelineError) as error:
        _LOG.warning(
            "the index of %s isn't up to date, so readers look at more versions than they need: %s", dataset, error
        )


def published_versions(root: str, dataset: str) -> list[int]:
    """Return the numbers of the live versions, ascending."""
    return [one.version for one in overview(root, dataset, listed=list_dataset(root, dataset)).warned().live]


def latest(root: str, dataset: str) -> Manifest | None:
    """Return the manifest of the highest live version, or None without any."""
    root = storage.normalise(root)
    numbers = version_numbers(root, dataset)[::-1]
    newest = first_live(root, dataset, numbers[:1])  # mostly it is that one, and no further request is needed
    if newest is None and numbers:
        entries = read_index(root, dataset)
        # Rejected or pruned versions stay so; all others in the index are looked at.
        left = [n for n in numbers[1:] if n not in entries or entries[n].status == "published"]
        newest = first_live(root, dataset, left)
    return newest


def first_live(root: str, dataset: str, numbers: Sequence[int]) -> Manifest | None:
    """Return the manifest of the first live version of a sequence, by the versions themselves; None without any."""
    start, some = 0, 1
    while start < len(numbers):
        tried = numbers[start : start + some]
        live = {manifest.version: manifest for manifest in read_committed(root, dataset, tried).warned().live}
        for number in tried:
            if number in live:
                return live[number]
        start, some = start + some, min(2 * some, _AT_ONCE)
    return None


def resolve(root: str, dataset: str, version: int | str = "latest") -> Manifest:
    """Return the manifest of a live version given as 3, '3', 'v3' or 'latest'.

    Raises:
        VersionNotFound: there is no such version, the gate rejected it, or it is withdrawn; the message names those
            that exist.
        ConfigError: the version isn't a number.
        CorruptVersion: as `read_manifest`; for 'latest', if only damaged versions are left.
    """
    root = storage.normalise(root)
    if version == "latest":
        newest = latest(root, dataset)
        if newest is None:
            damaged = overview(root, dataset, listed=list_dataset(root, dataset)).unreadable
            if damaged:
                raise damaged[max(damaged)]
            raise _not_found(root, dataset, f"{dataset} has no published version under {root}")
        return newest
    version = layout.version_number(version)
    found = read_committed(root, dataset, [version])
    manifest, withdrawal = found.versions.get(version), found.withdrawals.get(version)
    if manifest is None and (version not in found.damaged or withdrawal is None):
        return read_manifest(root, dataset, version)  # raises the error that names the existing versions or the damage
    if manifest is not None and manifest.status != "published":
        report = layout.join(layout.version_uri(root, dataset, version), layout.REPORT_HTML)
        cause = f"{dataset} v{version} was rejected by the quality gate (see {report})"
        if manifest.superseded is not None:
            cause = f"{dataset} v{version} wasn't published: {manifest.superseded.rstrip('.')}"
        raise _not_found(root, dataset, cause)
    if withdrawal is not None:
        raise _not_found(root, dataset, f"{dataset} v{version} was {withdrawal}")
    assert manifest is not None, "a damaged version that isn't withdrawn was refused above"
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
    """Return the names of all datasets under a root that have a version, published or not, sorted.

    A store within another, such as root/other, is skipped: it is a separate root.
    """
    root = storage.normalise(root)
    datasets: list[str] = []
    pending = [""]
    while pending:
        dataset = pending.pop()
        names = storage.list_directories(layout.join(root, dataset) if dataset else root)
        if dataset and {layout.FEATURE_STORE, layout.TRAINING_DATASETS} & set(names):
            continue
        if dataset and any(layout.parse_version(name) is not None for name in names):
            datasets.append(dataset)
        pending.extend(
            layout.join(dataset, name) if dataset else name
            for name in names
            if layout.parse_version(name) is None and not name.startswith(("_", "."))
        )
    return sorted(datasets)


def data_files(root: str, manifest: Manifest) -> list[str]:
    """Return the URIs of exactly the files that make up a published version, in the manifest's order.

    Raises:
        VersionNotFound: the gate rejected the version, so that it has no data.
    """
    root = storage.normalise(root)
    if manifest.status != "published":
        raise _not_found(root, manifest.dataset, f"{manifest} was rejected")
    return [manifest.uri(root, file.path) for file in manifest.files]


def read_table(
    root: str,
    dataset: str,
    version: int | str = "latest",
    columns: Sequence[str] | None = None,
    verify: bool = False,
) -> pa.Table:
    """Read a published version into memory: the files that its manifest lists, in that order, and no others.

    Args:
        root: Root of the store.
        dataset: Dataset name.
        version: Version number, as 3 or 'v3', or 'latest'.
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
    with opened(uri, expected.bytes) as source:
        table = pq.ParquetFile(source).read(columns=None if columns is None else list(columns))
    compare(uri, "rows", expected.rows, table.num_rows)
    return table if columns is None else table.select(list(columns))


@contextmanager
def opened(uri: str, size: int | None = None) -> Iterator[pa.NativeFile]:
    """Open a data file, and check its size if it is given; explain the errors of reading it in this block.

    Raises:
        CorruptVersion: it is missing, of another size, or not Parquet.
    """
    with explained(uri), open_data(uri, size) as source:
        yield source


def open_data(uri: str, size: int | None = None) -> pa.NativeFile:
    """Open a data file like `opened`, for a file that stays open: read it later within `explained`."""
    with explained(uri):
        source = storage.open_input(uri)
        if size is not None:
            compare(uri, "bytes", size, source.size())
        return source


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Name a data file in the errors of reading it in this block.

    Raises:
        CorruptVersion: it is missing or can't be read as Parquet.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptVersion(f"{uri} is missing, but its manifest lists it: {CURE}") from error
    except pa.ArrowInvalid as error:
        raise CorruptVersion(f"{uri} can't be read as Parquet ({error}): {CURE}") from error
    except OSError as error:
        # Arrow's errors for damaged pages resemble those of a broken connection: only the latter may pass.
        if is_transient(error) or isinstance(error, PermissionError):
            raise
        cause = str(error).splitlines()[0]
        raise CorruptVersion(f"{uri} can't be read, it may be damaged ({cause}): {CURE}") from error


def rows_of(file: pq.ParquetFile, rows: Int64Array, columns: Sequence[str] | None = None) -> pa.Table:
    """Read some rows of an open file by their ascending numbers, one row group at a time.

    Raises:
        IndexError: the file has fewer rows.
    """
    wanted = None if columns is None else list(columns)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if len(rows) and rows[-1] >= starts[-1]:
        raise IndexError(f"row {rows[-1]} of {starts[-1]}")
    group_of = np.searchsorted(starts, rows, side="right") - 1
    empty = file.schema_arrow.empty_table()
    tables = [empty if wanted is None else empty.select(wanted)]
    for group in np.unique(group_of).tolist():
        own = rows[group_of == group] - starts[group]
        tables.append(file.read_row_group(group, columns=wanted).take(pa.array(own)))
    return pa.concat_tables(tables)


def groups_with(file: pq.ParquetFile, column: str, keys: Sequence[Any]) -> list[int]:
    """Return the row groups that may have one of some ascending keys, by the smallest and largest one in the footer.

    Those without statistics, or of keys of another type, may.
    """
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    place, found = leaves.index(column), []
    for group in range(file.num_row_groups):
        bounds = file.metadata.row_group(group).column(place).statistics
        if bounds is not None and bounds.has_min_max and all(isinstance(key, type(bounds.min)) for key in keys[:1]):
            first = bisect_left(keys, bounds.min)
            if first == len(keys) or keys[first] > bounds.max:
                continue
        found.append(group)
    return found


def faults_of_files(root: str, manifest: Manifest, listed: Mapping[str, int]) -> list[str]:
    """Return the faults of a published version's data files, one sentence a file, without opening them.

    Args:
        root: Root of the store.
        manifest: Manifest of the version.
        listed: Size in bytes of every file below its directory, by URI.
    """
    if manifest.status != "published":
        return []
    found = []
    for uri, file in zip(data_files(root, manifest), manifest.files, strict=True):
        if uri not in listed:
            found.append(f"{file.path} is missing")
        elif listed[uri] != file.bytes:
            found.append(f"{file.path} has {listed[uri]} bytes, not {file.bytes}")
    return found


def verify(root: str, manifest: Manifest) -> None:
    """Compare every file of a manifest with it, byte by byte: data, rejected rows and report.

    Raises:
        CorruptVersion: a file is missing or differs; the message names it, and the expected and actual values.
    """
    published = manifest.status == "published"
    data = manifest.files if published else ()
    _verify_files(root, manifest, (*data, *manifest.companions))
    if manifest.report is not None:
        root = storage.normalise(root)
        verify_digest(manifest.uri(root, layout.REPORT_JSON), f"sha256:{manifest.report.json_sha256}")
        verify_digest(manifest.uri(root, layout.REPORT_HTML), f"sha256:{manifest.report.html_sha256}")


def _verify_files(root: str, manifest: Manifest, files: Sequence[FileEntry]) -> None:
    base = manifest.uri(storage.normalise(root))
    sizes = {info.uri: info.bytes for info in storage.list_files(base, include_hidden=True)}

    def verify_file(file: FileEntry) -> None:
        uri = layout.join(base, file.path)
        if uri in sizes:
            compare(uri, "bytes", file.bytes, sizes[uri])
        verify_digest(uri, file.digest)

    list(storage.in_threads(verify_file, files, threads=8))


def verify_digest(uri: str, expected: str) -> None:
    """Compare a file with its digest in the manifest.

    Raises:
        CorruptVersion: it is missing or differs; the message names it, and the expected and actual digests.
    """
    try:
        compare(uri, "digests", expected, storage.digest_of(uri, expected))
    except FileNotFoundError as error:
        raise CorruptVersion(f"{uri} is missing, but its manifest lists it: {CURE}") from error


def compare(uri: str, what: str, expected: object, found: object) -> None:
    """Compare an actual value of a file (its bytes, rows or digest) with its manifest.

    Raises:
        CorruptVersion: they differ; the message names the file, and the expected and actual values.
    """
    if found != expected:
        raise CorruptVersion(f"{uri}: {what} differ from its manifest: expected {expected}, found {found}: {CURE}")
