"""Index of a dataset: a summary of its manifests, so that not all of them must be read. It is never authoritative.

    {dataset}/_index/versions.json   the settled versions, one entry each
    {dataset}/_index/changing-v3     v3 was, or is about to be, withdrawn or pruned: look at v3 itself

An entry is never revoked, so anyone may write it at any time, without a lock: manifests don't change, and a version
that is withdrawn or pruned is marked first. A mark is never removed. Only the entry 'pruned' overrides it, as no number
is reused.

- The index is behind (its writer was killed, or an older one was written over a newer): versions without an entry are
  looked at directly. The existing numbers always come from the directory.
- It is missing or damaged: the same, for all versions; the next publisher rebuilds it.
- It has entries of missing numbers (the versions were removed by hand): these don't count.
- A reader that has chosen a version reads its manifest, and checks for a withdrawal, before it uses it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from tasks.io import storage
from tasks.io.hashing import digest
from tasks.store import layout
from tasks.store.manifest import Count, Manifest, Record

_FORMAT = 1


class IndexedVersion(Record):
    """Index entry of a settled version."""

    version: int = Field(ge=1, description="Version number N of vN.")
    status: Literal["published", "rejected", "pruned"] = Field(description="As in its manifest, or pruned since.")
    created_at: dt.datetime | None = Field(default=None, description="When the manifest was made, UTC.")
    run_id: str = Field(default="", description="Run that made it.")
    manifest_bytes: Count = Field(default=0, description="Size of the manifest in bytes.")
    manifest_stamp: str = Field(default="", description="The manifest's mark of change, as a listing shows it.")
    rows: Count = Field(default=0, description="Rows in the data files.")
    bytes: Count = Field(default=0, description="Size of the data files in bytes.")
    files_digest: str = Field(default="", description="Digest of the data files' paths and sizes, see `files_digest`.")
    columns: Count = Field(default=0, description="Number of columns.")
    as_of: tuple[dt.datetime, ...] = Field(default=(), description="Times (UTC) that its features are of.")
    newest_event: dt.datetime | None = Field(default=None, description="Time of the newest event it was made from.")
    verdict: str = Field(default="", description="The gate's verdict.")
    note: str = Field(default="", description="Why the gate rejected it.")
    thresholds: Any = Field(default=None, description="The thresholds it was judged by, if its kind has them.")
    state_digest: str | None = Field(default=None, description="What decides which events an incremental run keeps.")
    state_parent: int | None = Field(default=None, description="The version whose state it continues.")
    made_from: tuple[tuple[str, int], ...] = Field(default=(), description="Versions of our datasets that it read.")


class _Index(Record):
    format: Literal[1] = Field(description="Version of this file's own schema.")
    dataset: str = Field(description="Dataset name.")
    versions: tuple[IndexedVersion, ...] = Field(description="Entries, ascending.")


def indexed(manifest: Manifest, size: int, stamp: str) -> IndexedVersion:
    """Return the index entry of a version.

    Args:
        manifest: Manifest of the version.
        size: The manifest's size in bytes.
        stamp: The manifest's mark of change, as `storage.stamp_of` gives it.
    """
    state = manifest.definition.get("state")
    state = state if isinstance(state, dict) else {}
    event, parent, known = manifest.definition.get("newest_event"), state.get("parent"), state.get("digest")
    failed = [check.message for check in manifest.gate.checks if check.verdict == "fail"]
    return IndexedVersion(
        version=manifest.version,
        status=manifest.status,
        created_at=manifest.created_at,
        run_id=manifest.run.flow_run_id,
        manifest_bytes=size,
        manifest_stamp=stamp,
        rows=manifest.rows,
        bytes=sum(file.bytes for file in manifest.files),
        files_digest=files_digest((file.path, file.bytes) for file in manifest.files),
        columns=len(manifest.columns),
        as_of=manifest.as_of,
        newest_event=dt.datetime.fromisoformat(event) if isinstance(event, str) else None,
        verdict=manifest.gate.verdict,
        note="; ".join(failed) if manifest.status == "rejected" else "",
        thresholds=manifest.config.get("thresholds"),
        state_digest=known if isinstance(known, str) else None,
        state_parent=parent if isinstance(parent, int) else None,
        made_from=tuple(dict.fromkeys((one.name, one.version) for one in manifest.inputs if one.version is not None)),
    )


def files_digest(files: Iterable[tuple[str, int]]) -> str:
    """Return a digest of files by their paths and sizes in bytes, in any order; hexadecimal."""
    text = "".join(f"{path}\0{size}\n" for path, size in sorted(files))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_index(root: str, dataset: str) -> dict[int, IndexedVersion]:
    """Return entries by version; none if the index is missing, damaged, another dataset's or another release's."""
    uri = layout.index_uri(root, dataset)
    try:
        data = storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    stated, _, body = data.partition(b"\n")
    if stated.decode(errors="replace") != digest(body):
        return {}
    try:
        index = _Index.model_validate_json(body)
    except ValidationError:
        return {}
    return {one.version: one for one in index.versions} if index.dataset == dataset else {}


def write_index(root: str, dataset: str, entries: Mapping[int, IndexedVersion]) -> None:
    """Write the entries of settled versions over the last ones; concurrent writers lose no true information.

    If it can't be written, readers are slower and otherwise unaffected.
    """
    ordered = tuple(entries[number] for number in sorted(entries))
    body = _Index(format=_FORMAT, dataset=dataset, versions=ordered).model_dump_json(exclude_defaults=True).encode()
    storage.write_bytes(layout.index_uri(root, dataset), digest(body).encode() + b"\n" + body)


def mark(root: str, dataset: str, version: int) -> None:
    """Mark a version so that readers look at it directly; call it before the version is withdrawn or pruned."""
    storage.put_if_absent(layout.mark_uri(root, dataset, version), b"")


def marked(root: str, dataset: str) -> frozenset[int]:
    """Return the versions that have a mark."""
    place = layout.index_uri(root, dataset).rpartition("/")[0]
    return frozenset(
        number
        for info in storage.list_files(place, include_hidden=True, recursive=False)
        if (number := layout.marked_version(info.uri)) is not None
    )
