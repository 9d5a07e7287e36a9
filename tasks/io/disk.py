"""Files on a local disk: written whole or not at all, large ones past the page cache; and errors of full disks.

Data that is written once and not read soon gains nothing from the page cache, and pays for it: the kernel must find a
fresh page for each 4 KiB, copy into it, and write it out later, often while other processes wait for fsync. On 1.5 GB
(2 virtual CPUs) buffered writes took 1.1 to 4.0 s, 0.7 to 2.7 s of them CPU; direct writes of 4 MiB took 0.4 s and 0.05
s. If the file system has no direct writes, buffered ones are used.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tasks.io.errors import DiskFull, VersionConflict

if sys.platform != "win32":
    import fcntl

PIECE = 4 << 20
"""Bytes of one write; a multiple of every file system's block."""
MIB = 1 << 20
_BLOCK = 4096
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_DIRECT = getattr(os, "O_DIRECT", 0)
_SPARE: list[mmap.mmap] = []  # fresh memory costs as much as the copy into it, so buffers are reused
_MOST_SPARE = 4


class NewFile:
    """File written from start to end by its own thread, so that the caller needn't wait.

    Args:
        path: Name of the file, which mustn't exist yet.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with told_if_full(path):
            self._descriptor, self._direct = _create(path)
        self._buffer, self._filled = _buffer(), 0
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)

    def append(self, data: memoryview) -> None:
        """Append bytes; a later call, at the latest `close`, raises the error of a failed write.

        Raises:
            DiskFull: there is no room for the bytes of an earlier call.
        """
        while data:
            taken = min(len(data), PIECE - self._filled)
            self._buffer[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if self._filled == PIECE:
                self._pass_on()

    def _pass_on(self) -> None:
        full, self._buffer, self._filled = self._buffer, _buffer(), 0
        self._wait()
        self._writing = self._thread.submit(self._write, full)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, full: mmap.mmap) -> None:
        try:
            self._write_all(memoryview(full))
        finally:
            _give_back(full)

    def _write_all(self, data: memoryview) -> None:
        with data, told_if_full(self._path):
            done = 0
            while done < len(data):
                try:
                    done += os.write(self._descriptor, data[done:])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._no_longer_direct()
                if done % _BLOCK:  # a short write, as on a disk that is nearly full
                    self._no_longer_direct()

    def _no_longer_direct(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._direct = False

    def close(self) -> None:
        """Write the rest, and return when everything is on the disk.

        Raises:
            DiskFull: there is no room; call `discard` afterwards.
            OSError: something couldn't be written; likewise.
        """
        self._wait()
        whole = self._filled - self._filled % _BLOCK
        self._write_all(memoryview(self._buffer)[:whole])
        self._no_longer_direct()  # the end isn't a whole block
        self._write_all(memoryview(self._buffer)[whole : self._filled])
        with told_if_full(self._path):
            os.fsync(self._descriptor)
        self._end()

    def discard(self) -> None:
        """Close and delete the file, whatever was written."""
        with contextlib.suppress(OSError):
            self._wait()
        self._end()
        Path(self._path).unlink(missing_ok=True)

    def _end(self) -> None:
        self._thread.shutdown()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            _give_back(self._buffer)


@contextlib.contextmanager
def told_if_full(path: str) -> Iterator[None]:
    """Raise the error of a full disk, met while a file is written, as a sentence with figures and a cure.

    Args:
        path: The file, or the directory, that is written.

    Raises:
        DiskFull: the disk is full, or a quota is used up.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskFull) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(_no_room(path, error)) from error


def _no_room(path: str, error: OSError) -> str:
    place = next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())
    there = shutil.disk_usage(place)
    figures = f"{there.free / MIB:,.1f} MiB of {there.total / MIB:,.1f} MiB are free"
    if error.errno == errno.EDQUOT:
        figures = f"the quota is used up, though {figures}"
    elif not os.statvfs(place).f_favail:
        figures += ", but no more files can be made"
    return (
        f"the disk is full: {os.path.basename(path)!r} can't be written to {str(place)!r}, where {figures}. Make room "
        "there (old versions go by the command 'prune'), or put it on a larger disk or on S3, and start again"
    )


def _create(path: str) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            Path(path).unlink(missing_ok=True)  # some file systems create the file before they refuse
    return os.open(path, flags, 0o666), False


def _buffer() -> mmap.mmap:
    """Return memory aligned to a page, as direct writes need it."""
    try:
        return _SPARE.pop()
    except IndexError:
        return mmap.mmap(-1, PIECE)


def _give_back(buffer: mmap.mmap) -> None:
    if len(_SPARE) < _MOST_SPARE:
        _SPARE.append(buffer)


def temporary_name(path: str) -> str:
    """Return a new hidden name beside `path`; create its directory if necessary."""
    parent, name = os.path.split(path)
    with told_if_full(path):
        os.makedirs(parent, exist_ok=True)
    return f"{parent}/.{name}.{uuid.uuid4().hex}.tmp"


def is_temporary(path: str) -> bool:
    """Return True for a name of `temporary_name`: a file not yet renamed, or left by a killed process."""
    return _TEMPORARY.fullmatch(os.path.basename(path)) is not None


def put_in_place(temporary: str, path: str) -> None:
    """Give a finished file its final name.

    Raises:
        DiskFull: there is no room for the name.
        VersionConflict: the file is missing: a commit removes the unfinished files of other attempts.
    """
    try:
        with told_if_full(path):
            os.replace(temporary, path)
    except FileNotFoundError as error:
        raise VersionConflict(
            f"{path!r} was removed while it was written: another attempt has committed this version; "
            "run again to publish a further one"
        ) from error
    sync_directory(path)


def sync_directory(path: str) -> None:
    """Make a new name survive a power cut; fsync of the file alone doesn't."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
