"""What lies where: files and directories below a URI, on a local disk or S3."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.core.location import is_s3, normalise, s3_filesystem
from tasks.core.refusal import explains_refusals

_HIDDEN = (".", "_")


@dataclass(frozen=True)
class FileInfo:
    """A file as a listing shows it."""

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
    """List files, sorted by URI.

    Args:
        uri: A file, a directory or S3 prefix, or a glob ('data/2024-*/*.csv'; '**' spans directories). A glob that
            matches a directory stands for the files in it.
        suffixes: Endings to keep, such as ('.csv', '.csv.gz'), in any case; None keeps all.
        recursive: Whether to look below the first level of a directory.
        include_hidden: Whether to list names that begin with '.' or '_' and what is below them; names in `uri` itself
            are never hidden.
        follow_links: Whether to look through symbolic links to directories; those who delete don't, and are given the
            link itself.

    Returns:
        The files; [] when nothing is there or matches.
    """
    uri = normalise(uri)

    def list_below(place: str) -> Iterator[FileInfo]:
        if is_s3(place):
            return _list_s3(place, recursive, include_hidden)
        return _list_local(place, recursive, include_hidden, follow_links)

    found = {info.uri: info for info in list_below(uri)}
    if not found and glob.has_magic(uri):
        base = re.split(r"[*?\[]", uri, maxsplit=1)[0].rpartition("/")[0]
        matches = _glob_s3(uri) if is_s3(uri) else glob.glob(uri, recursive=True, include_hidden=True)
        for match in matches:
            if include_hidden or not _is_hidden(match[len(base) :]):
                found |= {info.uri: info for info in list_below(match)}
    endings = None if suffixes is None else tuple(suffix.lower() for suffix in suffixes)
    return [found[name] for name in sorted(found) if endings is None or name.lower().endswith(endings)]


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(_HIDDEN) for part in relative.split("/"))


def _list_local(path: str, recursive: bool, include_hidden: bool, follow_links: bool) -> Iterator[FileInfo]:
    if Path(path).is_file():
        yield _local_info(path, os.stat(path))
        return
    pending, seen = [path], set()
    while pending:
        directory = pending.pop()
        try:
            entries = list(os.scandir(directory))
            status = os.stat(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if (status.st_dev, status.st_ino) in seen:  # a symbolic link back up
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith(_HIDDEN) and not include_hidden:
                continue
            if entry.is_dir(follow_symlinks=follow_links):
                pending.extend([entry.path] if recursive else [])
                continue
            try:
                yield _local_info(entry.path, entry.stat(follow_symlinks=follow_links))
            except FileNotFoundError:  # another process removed it since, or a link leads nowhere
                continue


def _local_info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(path, status.st_size, str(status.st_mtime_ns))


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
    """Names of the directories directly below a URI, sorted; [] when there are none."""
    uri = normalise(uri)
    try:
        if not is_s3(uri):
            return sorted(entry.name for entry in os.scandir(uri) if entry.is_dir())
        filesystem, path = s3_filesystem(uri)
        entries = filesystem.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "directory")
