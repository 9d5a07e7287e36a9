"""Files of S3 on the local disk, shared by all processes of a node, up to a number of bytes.

    {cache_dir}/_stream-cache/CACHEDIR.TAG               marks the directory's owner, and exempts it from backups
                             {method}-{digest}.parquet  a whole file, checked; modified when it was last used
                             .{name}.lock               held by the process that downloads it
                             .{name}.{random}.tmp       a download on its way

The directory belongs to the cache, known by its tag; only files of these names are counted and evicted in it, and
other files in `cache_dir` or beside them stay. A file's name is its digest, so nothing in the cache is
ever out of date, and versions share common files. A reader of a file holds a shared lock on it, which
ends with the last mapping: files in use aren't evicted, as that would free nothing. All locks are those of the kernel
(flock) and end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tasks.io import storage
from tasks.io.disk import told_if_full
from tasks.io.errors import ConfigError, CorruptVersion
from tasks.io.hashing import PATTERN, Digest
from tasks.loader.arguments import place, whole_number
from tasks.loader.version_files import CURE
from tasks.store.manifest import FileEntry

DEFAULT_BYTES = 50 * 10**9
OWN_DIRECTORY = "_stream-cache"
"""Name of the cache's directory; readers of directories, such as pandas, skip names that begin with '_'."""
TAG = "CACHEDIR.TAG"
# The first line is that of bford.info/cachedir, which tar, borg, restic and others know.
_TAG_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# Files of S3, kept by tasks.loader.cache. What has a digest for its name may be deleted here at any time.
"""
_WHOLE = re.compile(PATTERN.replace(":", "-") + r"\.parquet")
_ON_ITS_WAY = re.compile(rf"\.{_WHOLE.pattern}\.[0-9a-f]{{32}}\.tmp")
_PIECE = 8 << 20
# A link under a file's name could lead to a foreign file, and a pipe to nothing.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def default_directory() -> Path:
    """Return the default directory for files: in the user's cache directory."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored unless absolute, by its specification
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "training-data-pipelines"


def local_directory(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the directory of an argument: `default_directory()` for None.

    Raises:
        ConfigError: it is not a path, empty, or a URI.
    """
    if cache_dir is None:
        return default_directory()
    cure = f"name a directory on a local disk, or leave it out for '{default_directory()}'"
    name = place("cache_dir", cache_dir, cure)
    if "://" in name:
        raise ConfigError(f"cache_dir = {name!r}: {cure}")
    return Path(name).expanduser().absolute()


def limit_of(cache_bytes: int | None) -> int:
    """Return the number of bytes of an argument: `DEFAULT_BYTES` for None.

    Raises:
        ConfigError: it isn't a whole number above 0.
    """
    if cache_bytes is None:
        return DEFAULT_BYTES
    cure = "give the bytes that files may use, a whole number above 0"
    return whole_number("cache_bytes", cache_bytes, cure, least=1)


@dataclass(slots=True)
class CacheCounts:
    """A process's cache statistics: files found, files downloaded, and the bytes of the latter."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0


class FileCache:
    """The cache, as one process sees it.

    Args:
        directory: Parent of the cache's directory; None: `default_directory()`.
        limit: Bytes of all files together; None: `DEFAULT_BYTES`. Exceeded only by files that are all in use.

    Attributes:
        directory: the cache's directory.

    Raises:
        ConfigError: the limit isn't above 0, or the directory can't be made or written, or belongs to another program.

    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.limit, parent = limit_of(limit), local_directory(directory)
        self.counts = CacheCounts()
        self._lock = threading.Lock()
        self.directory = parent / OWN_DIRECTORY
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._locked("tag"):
                self._tag()
        except OSError as error:
            raise ConfigError(
                f"cache_dir = '{parent}' can't be used ({error.strerror}): name a directory on a local disk that "
                "can be written"
            ) from error

    def _tag(self) -> None:
        """Tag the directory as the cache's, unless it has foreign files."""
        if (self.directory / TAG).exists():
            return
        foreign = sorted(path.name for path in self.directory.iterdir() if path.name != _lock_name("tag"))
        if foreign:
            raise ConfigError(
                f"'{self.directory}' is no cache of this project's ('{TAG}' is missing) and holds '{foreign[0]}': name "
                "another cache_dir, or empty it"
            )
        (self.directory / TAG).write_text(_TAG_TEXT)

    def open(self, uri: str, entry: FileEntry, stop: threading.Event | None = None) -> BinaryIO:
        """Open a file, downloaded first if necessary; it isn't evicted as long as it, or a mapping of it, is open.

        If several processes and threads open a file at the same time, one downloads it, and the others wait.

        Args:
            uri: Place of the file.
            entry: Its entry in the manifest.
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
        """Open a cached file with a shared lock on it."""
        file = _open_own(self.directory / name)
        if file is None:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        now = os.fstat(file.fileno())
        # It may have been evicted between the two steps; a shorter one was cut by another program.
        if not now.st_nlink or now.st_size != size:
            file.close()
            return None
        os.utime(file.fileno())
        return file

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Wait for the lock of a name, and hold it."""
        with (self.directory / _lock_name(name)).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def discard(self, entry: FileEntry) -> None:
        """Delete a damaged file: its next reader downloads it again."""
        (self.directory / _name(entry)).unlink(missing_ok=True)

    def _download(self, uri: str, entry: FileEntry, name: str, stop: threading.Event | None) -> BinaryIO:
        temporary = self.directory / f".{name}.{uuid.uuid4().hex}.tmp"
        file = self._reserve(temporary, entry.bytes)
        try:
            with told_if_full(str(temporary)):
                found, size = _copy(uri, entry, file, stop)
            if (found, size) != (entry.digest, entry.bytes):
                raise CorruptVersion(
                    f"{uri} differs from its manifest: expected {entry.bytes} bytes of {entry.digest}, found "
                    f"{size} of {found}: {CURE}"
                )
            # Not synchronised with the disk: damage by a power cut is noticed by the batches' checksums.
            temporary.replace(self.directory / name)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return file

    def _reserve(self, temporary: Path, size: int) -> BinaryIO:
        """Evict the least recently used files to make room; open a file with a shared lock on it."""
        with self._locked("eviction"):
            left, files = self.limit - size, []
            with os.scandir(self.directory) as entries:
                names = [entry.name for entry in entries]
            for name in names:
                path = self.directory / name
                if _ON_ITS_WAY.fullmatch(name):  # of others, or of a process that died
                    left -= 0 if _evict(path) else _size(path)[1]
                elif _WHOLE.fullmatch(name):
                    files.append((*_size(path), path))
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
    """Copy a file to a local one; return its digest and size."""
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


def _lock_name(name: str) -> str:
    return f".{name}.lock"


def _open_own(path: Path) -> BinaryIO | None:
    """Open a file of the cache; return None if there is none, or its name isn't a regular file."""
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    return None


def _size(path: Path) -> tuple[int, int]:
    """Return the time of a file's last use, ns, and its bytes; zeros if another process has removed it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size if stat.S_ISREG(found.st_mode) else 0


def _evict(path: Path) -> bool:
    """Delete a file of the cache that no process has open; return True if it no longer exists."""
    file = _open_own(path)
    if file is None:
        return not os.path.lexists(path)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Its name may belong to another file by now, downloaded anew.
        if os.fstat(file.fileno()).st_nlink:
            path.unlink(missing_ok=True)
    return True
