"""Listings below a URI, on a local disk or S3: files, directories, and unfinished uploads.

Unfinished uploads are invisible in every listing of objects, and charged for until they are aborted.
"""

from __future__ import annotations

import datetime as dt
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tasks.io.location import explains_refusals, is_s3, normalise, s3_error_code, s3_filesystem

_HIDDEN = (".", "_")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """File in a listing."""

    uri: str
    bytes: int
    stamp: str
    """Cheap mark of change: the ETag on S3, the modification time in ns on a local disk."""


@explains_refusals
def list_files(
    uri: str,
    suffixes: Iterable[str] | None = None,
    *,
    recursive: bool = True,
    include_hidden: bool = False,
    follow_links: bool = True,
) -> list[FileInfo]:
    """List files, sorted by URI, each once: under the path without links to its directory if there is one.

    Args:
        uri: A file, a directory or S3 prefix, or a glob ('data/2024-*/*.csv'; '**' spans directories). A glob that
            matches a directory lists the files in it.
        suffixes: Endings to keep, such as ('.csv', '.csv.gz'), in any case; None keeps all.
        recursive: Whether to look below the first level of a directory.
        include_hidden: Whether to list names that begin with '.' or '_' and what is below them; names in `uri` itself
            are never hidden.
        follow_links: Whether to look through symbolic links to directories; code that deletes doesn't, and gets the
            link itself. A link back to a directory on the way to it isn't followed. A broken link is a file of 0 bytes.

    Returns:
        The files; [] if nothing exists or matches.
    """
    files = each_file(uri, recursive=recursive, include_hidden=include_hidden, follow_links=follow_links)
    endings = None if suffixes is None else tuple(suffix.lower() for suffix in suffixes)
    found = {info.uri: info for info in files}
    if not is_s3(normalise(uri)):
        found = _one_path_each(found)
    return [found[name] for name in sorted(found) if endings is None or name.lower().endswith(endings)]


def each_file(
    uri: str, *, recursive: bool = True, include_hidden: bool = False, follow_links: bool = True
) -> Iterator[FileInfo]:
    """Yield files in no certain order, each under each of its paths: `list_files` for more of them than to hold."""
    uri = normalise(uri)

    def list_below(place: str) -> Iterator[FileInfo]:
        if is_s3(place):
            return _list_s3(place, recursive, include_hidden)
        return _list_local(place, recursive, include_hidden, follow_links)

    nothing = True
    for info in list_below(uri):
        nothing = False
        yield info
    if not nothing or not glob.has_magic(uri):
        return
    base = re.split(r"[*?\[]", uri, maxsplit=1)[0].rpartition("/")[0]
    if is_s3(uri):
        matches = _glob_s3(uri)
    elif "**" in uri.split("/"):
        matches = _glob_everywhere(uri, base, follow_links)
    else:
        matches = _glob_local(uri, base)
    found: dict[str, FileInfo] = {}
    for match in matches:
        if include_hidden or not _is_hidden(match[len(base) :]):
            is_entry = not is_s3(uri) and not os.path.isdir(match)  # also a broken link
            below = _entry_info(Path(match), follow_links) if is_entry else list_below(match)
            found |= {info.uri: info for info in below}
    yield from found.values()


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(_HIDDEN) for part in relative.split("/"))


def _list_local(path: str, recursive: bool, include_hidden: bool, follow_links: bool) -> Iterator[FileInfo]:
    if Path(path).is_file():
        yield _local_info(path, os.stat(path))
        return
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(path, frozenset())]
    while pending:
        directory, above = pending.pop()
        try:
            entries = list(os.scandir(directory))
            status = os.stat(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        place = (status.st_dev, status.st_ino)
        if place in above:  # a symbolic link to a parent directory
            continue
        for entry in entries:
            if entry.name.startswith(_HIDDEN) and not include_hidden:
                continue
            if _is_directory(entry, follow_links):
                pending.extend([(entry.path, above | {place})] if recursive else [])
                continue
            yield from _entry_info(entry, follow_links)


def _is_directory(entry: os.DirEntry[str], follow_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_links)
    except OSError:  # a cycle of links, or a directory without permission
        return False


def _entry_info(entry: os.DirEntry[str] | Path, follow_links: bool) -> Iterator[FileInfo]:
    """Yield a file, or the link itself if it is broken; nothing if another process has removed it since."""
    try:
        yield _local_info(os.fspath(entry), entry.stat(follow_symlinks=follow_links))
    except OSError:
        with suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISLNK(status.st_mode):
                raise
            yield FileInfo(os.fspath(entry), 0, _stamp(status))


def _glob_everywhere(pattern: str, base: str, follow_links: bool) -> list[str]:
    """Return files that match a pattern with '**' or lie in a matching directory; glob.glob loops in cycles of links.

    As a matching directory includes the files in it, all but the hidden ones are listed without looking below a match.
    """
    wanted = pattern[len(base) + 1 :].split("/")
    found = (
        info.uri for info in _list_local(base or "/", recursive=True, include_hidden=True, follow_links=follow_links)
    )
    return [uri for uri in found if _begins(uri[len(base) + 1 :].split("/"), wanted)]


def _begins(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return True if a path, or a directory on the way to it, matches."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return _begins(parts, pattern[1:]) or (bool(parts) and _begins(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _begins(parts[1:], pattern[1:])


def _glob_local(pattern: str, base: str) -> list[str]:
    """Return matches of a pattern without '**', except paths that lead back to a directory."""
    return [match for match in glob.glob(pattern, include_hidden=True) if not _comes_back(os.path.dirname(match), base)]


def _comes_back(directory: str, base: str) -> bool:
    places = set()
    while len(directory) >= len(base):
        place = os.path.realpath(directory)
        if place in places:
            return True
        places.add(place)
        directory = os.path.dirname(directory)
    return False


def _one_path_each(found: dict[str, FileInfo]) -> dict[str, FileInfo]:
    """Keep one path to each directory: the one without links, or the first."""
    chosen: dict[str, str] = {}
    for directory in sorted({os.path.dirname(uri) for uri in found}):
        real = os.path.realpath(directory)
        if chosen.setdefault(real, directory) != directory and directory == real:
            chosen[real] = directory
    kept = set(chosen.values())
    return {uri: info for uri, info in found.items() if os.path.dirname(uri) in kept}


def local_stamp(path: str) -> str:
    """Return the current `FileInfo.stamp` of a local file."""
    return _stamp(os.stat(path))


def _stamp(status: os.stat_result) -> str:
    return str(status.st_mtime_ns)


def _local_info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(path, status.st_size, _stamp(status))


def _list_s3(uri: str, recursive: bool, include_hidden: bool) -> Iterator[FileInfo]:
    filesystem, path = s3_filesystem(uri)
    try:
        entries = filesystem.find(path, detail=True).values() if recursive else filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return
    for entry in entries:
        name = entry["name"]
        # A key that ends with '/' only marks a directory in consoles.
        if entry["type"] != "file" or name.endswith("/"):
            continue
        if include_hidden or name == path or not _is_hidden(name[len(path) + 1 :]):
            yield FileInfo(f"s3://{name}", entry["size"], entry["ETag"].strip('"'))


def _glob_s3(uri: str) -> list[str]:
    filesystem, path = s3_filesystem(uri)
    try:
        return [f"s3://{match}" for match in filesystem.glob(path)]
    except FileNotFoundError:
        return []


@explains_refusals
def list_directories(uri: str) -> list[str]:
    """Return names of the directories directly below a URI, sorted; [] if there are none."""
    uri = normalise(uri)
    try:
        if not is_s3(uri):
            return sorted(entry.name for entry in os.scandir(uri) if entry.is_dir())
        filesystem, path = s3_filesystem(uri)
        entries = filesystem.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "directory")


_UNKNOWN_TO_THE_SERVER = ("NotImplemented", "MethodNotAllowed")


@dataclass(frozen=True, slots=True)
class Upload:
    """Multipart upload that was begun, and neither completed nor aborted."""

    uri: str
    upload_id: str


@explains_refusals
def unfinished_uploads(uri: str, before: dt.datetime) -> list[Upload]:
    """Find the uploads below a URI that were begun before a time, sorted by URI; [] on a local disk.

    Raises:
        PermissionError: the credentials may not list uploads (`s3:ListBucketMultipartUploads`).
        CredentialsRefused: the store doesn't accept the credentials.
    """
    uri = normalise(uri)
    if not is_s3(uri):
        return []
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    found = [
        Upload(f"s3://{bucket}/{entry['Key']}", entry["UploadId"])
        for entry in _entries(uri, bucket, f"{prefix}/" if prefix else "")
        if entry["Initiated"] < before
    ]
    return sorted(found, key=lambda upload: (upload.uri, upload.upload_id))


@explains_refusals
def abort_upload(uri: str, upload_id: str) -> None:
    """Abort an upload and so delete its parts; one that has ended already is no error."""
    filesystem, path = s3_filesystem(uri)
    bucket, _, key = path.partition("/")
    try:
        filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
    except FileNotFoundError:
        return


def _entries(uri: str, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    filesystem, _ = s3_filesystem(uri)
    marks: dict[str, str] = {}
    while True:
        try:
            page = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marks)
        except OSError as error:
            if s3_error_code(error) not in _UNKNOWN_TO_THE_SERVER:
                raise
            return
        # Not every server respects the prefix.
        yield from (entry for entry in page.get("Uploads", []) if entry["Key"].startswith(prefix))
        if not page.get("IsTruncated"):
            return
        marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
