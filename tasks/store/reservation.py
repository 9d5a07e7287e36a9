"""Reservation of version numbers: before anything is written, by one conditional create each.

A version's attempts are a chain of files, each made by put-if-absent, so that everybody sees the same chain:

    v3/_reservation.json      run A, attempt 1      its process was killed
    v3/_reservation-2.json    run A, attempt 2      the same run again: a retry; or another run that took v3 over
    v3/_manifest.json         the commit (`versions.commit`)

Only the newest attempt may commit. Names of data files contain the attempt's number, so that no attempt can damage
another's. A reservation that can't be read belongs to an unknown run: its version is left alone, with a warning.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from tasks.io import storage
from tasks.io.errors import CorruptVersion, DamagedManifest, VersionConflict
from tasks.store import layout
from tasks.store.manifest import MANIFEST_FORMAT, FileEntry, Manifest, Record, with_lists
from tasks.store.version_index import IndexedVersion, read_index, write_index

Ordinal = Annotated[int, Field(ge=1)]

_LOG = logging.getLogger(__name__)
_warned: set[str] = set()


def pass_over(fault: CorruptVersion) -> None:
    """Warn of damaged files that are skipped, once in a process."""
    if str(fault) not in _warned:
        _warned.add(str(fault))
        _LOG.warning("passed over: %s", fault)


class Owner(Record):
    """Process, distinguished from every other one, also from a later one with the same pid."""

    host: str = Field(description="Host name, for people.")
    boot_id: str = Field(description="Boot and process namespace within which pids are comparable; '' if unknown.")
    pid: int = Field(description="Process id.")
    process_start: str = Field(description="When the process started, in the operating system's own terms.")

    def is_gone(self) -> bool:
        """Return True if the process is known to have ended; False for one that isn't visible from here."""
        return bool(self.boot_id) and self.boot_id == _boot_id() and _process_start(self.pid) != self.process_start


NOBODY = Owner(host="", boot_id="", pid=0, process_start="")
"""Owner of an attempt without a process; its end can't be known."""


class Attempt(Record):
    """Attempt to write a version, from its reservation file."""

    run_id: str = Field(description="Run that made the attempt.")
    attempt: Ordinal = Field(description="Number of the attempt under the same version.")
    owner: Owner = Field(description="Process that answers for the attempt.")
    created_at: dt.datetime = Field(description="When it was reserved, UTC.")
    token: str = Field(description="Makes each reservation's contents unique.")


class Reservation(Record):
    """Right to write a version: `versions.commit` accepts it until a newer attempt exists."""

    root: str = Field(description="Normalised root, the same for processes in other working directories.")
    dataset: str = Field(description="Dataset name.")
    version: Ordinal = Field(description="Version number N of vN.")
    run_id: str = Field(description="Run that holds it.")
    attempt: Ordinal = Field(description="Number of the attempt.")
    committed: bool = Field(default=False, description="This run has published the version before: nothing is to do.")

    def __str__(self) -> str:
        """Return the version's name in sentences."""
        return f"{self.dataset} v{self.version}"

    @property
    def uri(self) -> str:
        """Directory of the version."""
        return layout.version_uri(self.root, self.dataset, self.version)

    def data_uri(self, index: int, directory: str = "") -> str:
        """Return the URI of data file `index`; `directory` is a subdirectory such as 'split=train'."""
        return layout.join(self.uri, *([directory] if directory else []), layout.part_name(index, self.attempt))

    def rejected_uri(self, source: str, index: int) -> str:
        """Return the URI of a file of rejected rows of a source."""
        return layout.join(self.uri, layout.rejected_name(source, index, self.attempt))

    def entry(self, written: storage.WrittenFile) -> FileEntry:
        """Return the manifest entry of a file that was written under this reservation."""
        prefix = self.uri + "/"
        assert written.uri.startswith(prefix), f"{written.uri} is not in {self.uri}"
        path = written.uri.removeprefix(prefix)
        return FileEntry(path=path, rows=written.rows, bytes=written.bytes, digest=written.digest)


def current_owner() -> Owner:
    """Return the calling process as an owner."""
    pid = os.getpid()
    return Owner(host=socket.gethostname(), boot_id=_boot_id(), pid=pid, process_start=_process_start(pid) or "")


def reserve(root: str, dataset: str, run_id: str, owner: Owner | None = None) -> Reservation:
    """Reserve the version that a run will write.

    - A run that has published before gets that version again, marked `committed`.
    - A run that holds an unpublished version gets it again, as a new attempt (a retry, or a resume after a crash).
    - Versions above all others whose last owner is a dead process of this machine are taken over, lowest first, so that
      a killed run leaves no gap. A version held by a process on another machine is left alone: it may be alive.
    - Otherwise the run gets the number after the highest. A version that the gate rejected keeps its number.

    Args:
        root: Root of the store.
        dataset: Dataset name.
        run_id: Unique id of the run, the same for its retries.
        owner: Process whose death ends the attempt, such as the flow's if a worker calls; None: this process.
    """
    root = storage.normalise(root)
    owner = owner or current_owner()
    while True:  # every turn after the first means that another publisher got the number, so progress is guaranteed
        numbers = version_numbers(root, dataset)
        entries = read_index(root, dataset)
        decided = {number: entries[number] for number in numbers if number in entries}
        chains = _chains(root, dataset, [number for number in numbers if number not in decided])
        held, committed = _held(root, dataset, run_id, chains, decided)
        version = held or next(iter(_abandoned(root, dataset, chains, decided)), max(numbers, default=0) + 1)
        if version in entries and version not in decided:
            write_index(root, dataset, decided)  # without removed versions, one of which had this number
        chain = attempts(root, dataset, version) if version in decided else chains.get(version, ())
        attempt = len(chain) + 1
        reservation = Reservation(
            root=root, dataset=dataset, version=version, run_id=run_id, attempt=attempt, committed=committed
        )
        # Look again after each failure, rather than try the next number: the faster publisher may be the same run.
        if _claim(reservation, owner):
            return reservation


def version_numbers(root: str, dataset: str) -> list[int]:
    """Return the numbers of all versions that were ever begun, ascending, whether or not they were published."""
    names = storage.list_directories(layout.dataset_uri(root, dataset))
    return sorted(version for name in names if (version := layout.parse_version(name)) is not None)


def attempts(root: str, dataset: str, version: int) -> tuple[Attempt, ...]:
    """Return the attempts to write a version, first to newest; an unreadable reservation gets the owner `NOBODY`."""
    return _chains(storage.normalise(root), dataset, [version])[version]


def ensure_newest(reservation: Reservation) -> None:
    """Check that no newer attempt has replaced this reservation; call it before overwriting a file.

    Raises:
        VersionConflict: a newer attempt exists; the message names it.
    """
    successor = layout.join(reservation.uri, layout.reservation_name(reservation.attempt + 1))
    if storage.exists(successor):
        newest = attempts(reservation.root, reservation.dataset, reservation.version)[-1]
        raise VersionConflict(
            f"{reservation}: attempt {reservation.attempt} of run "
            f"{reservation.run_id!r} was superseded by attempt {newest.attempt} of run {newest.run_id!r} "
            f"(process {newest.owner.pid} on {newest.owner.host}); this one must end without publishing"
        )


def _chains(root: str, dataset: str, versions: list[int]) -> dict[int, tuple[Attempt, ...]]:
    """Read attempts of many versions in as many rounds of requests as the longest chain has links, plus one."""
    chains: dict[int, tuple[Attempt, ...]] = dict.fromkeys(versions, ())
    growing, attempt = versions, 1
    while growing:
        name = layout.reservation_name(attempt)
        uris = {version: layout.join(layout.version_uri(root, dataset, version), name) for version in growing}
        contents = storage.read_many(uris.values())
        growing = [version for version in growing if uris[version] in contents]
        for version in growing:
            try:
                link = _parse(uris[version], contents[uris[version]])
            except CorruptVersion as fault:
                pass_over(fault)
                link = Attempt(run_id="", attempt=attempt, owner=NOBODY, created_at=dt.datetime.now(dt.UTC), token="")
            chains[version] += (link,)
        attempt += 1
    return chains


def _parse(uri: str, data: bytes) -> Attempt:
    try:
        return Attempt.model_validate_json(data)
    except ValidationError as error:
        raise CorruptVersion(
            f"{uri} is no reservation ({error.error_count()} errors in {len(data)} bytes): "
            "something else has written it; remove that version's directory if nothing in it is needed"
        ) from error


def _held(
    root: str,
    dataset: str,
    run_id: str,
    chains: Mapping[int, tuple[Attempt, ...]],
    decided: Mapping[int, IndexedVersion],
) -> tuple[int | None, bool]:
    """Return the version that a run has published or still holds, if any, and True if it is published."""
    published = (number for number, entry in decided.items() if (entry.run_id, entry.status) == (run_id, "published"))
    begun = (number for number, chain in chains.items() if any(link.run_id == run_id for link in chain))
    for version in sorted((*published, *begun), reverse=True):
        chain = chains.get(version, ())
        try:
            manifest = find_manifest(root, dataset, version)
        except DamagedManifest:  # it was committed, but is unreadable: the run needs a new number
            continue
        if manifest is None and chain and chain[-1].run_id == run_id:
            return version, False
        # A rejected run that is tried again with other input needs a new number.
        if manifest is not None and manifest.run.flow_run_id == run_id and manifest.status == "published":
            return version, True
    return None, False


def _abandoned(
    root: str, dataset: str, chains: Mapping[int, tuple[Attempt, ...]], decided: Mapping[int, IndexedVersion]
) -> list[int]:
    """Return unpublished versions without a live owner, above all others, ascending.

    Only above all others: a version taken over below a published one would be newer than 'latest'.
    """
    numbers: list[int] = []
    highest = max(decided, default=0)
    for version in sorted((number for number in chains if number > highest), reverse=True):
        chain, uri = chains[version], layout.version_uri(root, dataset, version)
        if storage.exists(layout.join(uri, layout.MANIFEST)) or (chain and not chain[-1].owner.is_gone()):
            break
        # Without a reservation: a process that died between making the directory and reserving it, or foreign data.
        if not chain and storage.list_files(uri):
            break
        numbers.append(version)
    return numbers[::-1]


def _claim(reservation: Reservation, owner: Owner) -> bool:
    attempt = Attempt(
        run_id=reservation.run_id,
        attempt=reservation.attempt,
        owner=owner,
        created_at=dt.datetime.now(dt.UTC),
        token=uuid.uuid4().hex,
    )
    data = attempt.model_dump_json(indent=2).encode()
    uri = layout.join(reservation.uri, layout.reservation_name(reservation.attempt))
    # Exists with our token: the response to a successful request was lost.
    return storage.put_if_absent(uri, data) or storage.read_bytes(uri) == data


def find_manifest(root: str, dataset: str, version: int) -> Manifest | None:
    """Return the manifest of a version, or None if it isn't committed.

    Raises:
        DamagedManifest: the manifest is cut short, altered or another version's.
        CorruptVersion: it is of a format that a newer release writes.
    """
    uri = layout.join(layout.version_uri(root, dataset, version), layout.MANIFEST)
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    return parse_manifest(uri, data, dataset, version)


def parse_manifest(uri: str, data: bytes, dataset: str, version: int) -> Manifest:
    """Parse a manifest from its file's contents, and check it against its location.

    Raises:
        DamagedManifest, CorruptVersion: as `find_manifest`.
    """
    cure = (
        f"restore the file from a copy, or publish a new version from the same sources; readers of the latest pass "
        f"v{version} over, and 'rollback {dataset} v{version}' withdraws it"
    )
    try:
        raw = json.loads(data)
        if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > MANIFEST_FORMAT:
            raise CorruptVersion(
                f"{uri} has format {raw['format']}, this release reads up to {MANIFEST_FORMAT}: use a newer release"
            )
        manifest = with_lists(uri.rpartition("/")[0], Manifest.model_validate_json(data))
    except (ValueError, RecursionError) as error:  # also ValidationError and UnicodeDecodeError
        reason = str(error).splitlines()[0]
        raise DamagedManifest(f"{uri} can't be read as a manifest ({len(data)} bytes; {reason}): {cure}") from error
    if (manifest.dataset, manifest.version) != (dataset, version):
        raise DamagedManifest(
            f"{uri} is the manifest of {manifest}, where that of {dataset} v{version} is expected: {cure}"
        )
    if manifest.status == "published" and not manifest.files:
        raise DamagedManifest(f"{uri} says that the version is published, and lists no data file: {cure}")
    return manifest


def _boot_id() -> str:
    if sys.platform == "linux":
        # Containers on one machine share its boot but not its pids.
        namespace = os.readlink("/proc/self/ns/pid")
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {namespace}"
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "kern.bootsessionuuid")
    return ""


def _process_start(pid: int) -> str | None:
    """Return the start time of a process; None if it doesn't exist or is a zombie."""
    if sys.platform != "linux":
        return _output("ps", "-o", "lstart=", "-p", str(pid)) or None
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the name, may contain spaces and brackets; after it come the state and, 19 fields on, the start.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _output(*command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stdout.strip()
