"""Files of S3 on the local disk, shared by all processes of a node, up to a number of bytes.

    {directory}/{method}-{digest}.parquet      a whole file, checked; its modification time is that of its last use
    {directory}/.{name}.lock                   held by the process that downloads it
    {directory}/.{name}.{random}.tmp           a download on its way

A file's name is its digest, so nothing in the cache is ever out of date, and versions share what they have in common.
Whoever reads a file holds a shared lock on it, which ends with the last mapping: files in use aren't evicted, as that
would free nothing. All locks are those of the kernel (flock) and end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tasks.core import storage
from tasks.core.digests import Digest
from tasks.core.errors import ConfigError, CorruptVersion
from tasks.core.manifest import FileEntry
from tasks.delivery.mapped import CURE

DEFAULT_BYTES = 50 * 10**9
_PIECE = 8 << 20


def default_directory() -> Path:
    """Where files are kept if nothing else is said: in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "training-data-pipelines"


@dataclass(slots=True)
class CacheCounts:
    """What a process has had of the cache: files found, files downloaded, and the bytes of the latter."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0


class FileCache:
    """The cache, as one process sees it.

    Args:
        directory: Where; None: `default_directory()`.
        limit: Bytes of all files together; None: `DEFAULT_BYTES`. Exceeded only by files that are all in use.

    Raises:
        ConfigError: the limit isn't above 0, or the directory can't be made.

    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.directory = Path(directory).expanduser().absolute() if directory is not None else default_directory()
        self.limit = DEFAULT_BYTES if limit is None else limit
        self.counts = CacheCounts()
        self._lock = threading.Lock()
        if self.limit <= 0:
            raise ConfigError(f"cache_bytes = {limit} leaves no room for a file: give the bytes that may be used")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cache_dir = '{self.directory}' can't be used ({error.strerror}): name a directory that can be written"
            ) from error

    def open(self, uri: str, entry: FileEntry, stop: threading.Event | None = None) -> BinaryIO:
        """Open a file, downloaded first if need be; it isn't evicted as long as it, or a mapping of it, is open.

        Of several processes and threads that want a file at the same time one downloads it, and the others wait.

        Args:
            uri: Where the file is.
            entry: What its manifest says of it.
            stop: Ends a download when it is set.

        Raises:
            CorruptVersion: the file is missing, or differs from its manifest in size or digest.
            InterruptedError: `stop` was set.
        """
        name = _name(entry)
        if entry.bytes > self.limit:
            raise ConfigError(
                f"cache_bytes = {self.limit:,} is less than one file of the version ({uri}: {entry.bytes:,} bytes): "
                "give the cache room for some files"
            )
        found = self._open_whole(name, entry.bytes)
        if found is not None:
            return self._count(found, 0)
        with self._locked(name):
            found = self._open_whole(name, entry.bytes)
            if found is not None:
                return self._count(found, 0)
            return self._count(self._download(uri, entry, name, stop), entry.bytes)

    def _count(self, file: BinaryIO, downloaded: int) -> BinaryIO:
        with self._lock:
            self.counts.hits += not downloaded
            self.counts.misses += bool(downloaded)
            self.counts.bytes_read += downloaded
        return file

    def _open_whole(self, name: str, size: int) -> BinaryIO | None:
        """Open a file that is there, with a shared lock on it."""
        path = self.directory / name
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        now = os.fstat(file.fileno())
        # It may have been evicted between the two steps; a shorter one was cut by somebody else.
        if not now.st_nlink or now.st_size != size:
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return file

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of a name, or wait for it."""
        with (self.directory / f".{name}.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def discard(self, entry: FileEntry) -> None:
        """Forget a file, as it turned out to be damaged: the next one who wants it downloads it again."""
        (self.directory / _name(entry)).unlink(missing_ok=True)

    def _download(self, uri: str, entry: FileEntry, name: str, stop: threading.Event | None) -> BinaryIO:
        temporary = self.directory / f".{name}.{uuid.uuid4().hex}.tmp"
        file = self._reserve(temporary, entry.bytes)
        try:
            found, size = _copy(uri, entry, file, stop)
            if (found, size) != (entry.digest, entry.bytes):
                raise CorruptVersion(
                    f"{uri} differs from its manifest: expected {entry.bytes} bytes of {entry.digest}, found "
                    f"{size} of {found}: {CURE}"
                )
            # Not synchronised with the disk: what a power cut damages is noticed by the blocks' own checksums.
            temporary.replace(self.directory / name)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return file

    def _reserve(self, temporary: Path, size: int) -> BinaryIO:
        """Make room for a file of some bytes: what was used longest ago goes; open it, with a shared lock on it."""
        with self._locked("eviction"):
            left = self.limit - size
            for path in self.directory.glob(".*.tmp"):  # of others, or of a process that died
                if not _evict(path):
                    left -= path.stat().st_size if path.exists() else 0
            files = []
            for path in self.directory.glob("[!.]*.parquet"):
                with contextlib.suppress(FileNotFoundError):
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            left -= sum(held for _, held, _ in files)
            for _, held, path in sorted(files):
                if left >= 0:
                    break
                left += held if _evict(path) else 0
            file = temporary.open("x+b")
            fcntl.flock(file, fcntl.LOCK_SH)
            file.truncate(size)  # so that others count it
            return file


def _name(entry: FileEntry) -> str:
    return f"{entry.digest.replace(':', '-')}.parquet"


def _copy(uri: str, entry: FileEntry, target: BinaryIO, stop: threading.Event | None) -> tuple[str, int]:
    """Copy a file to a local one; its digest and size."""
    digest, size = Digest(entry.digest), 0
    try:
        with storage.open_input(uri) as source:
            while piece := source.read(_PIECE):
                if stop is not None and stop.is_set():
                    raise InterruptedError(f"{uri}: the download was stopped")
                digest.update(piece)
                target.write(piece)
                size += len(piece)
    except FileNotFoundError as error:
        raise CorruptVersion(f"{uri} is missing, but its manifest lists it: {CURE}") from error
    target.flush()
    return str(digest), size


def _evict(path: Path) -> bool:
    """Delete a file of the cache that nobody has open; whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
