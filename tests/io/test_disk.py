"""Files past the page cache: the bytes that were given, whatever the pieces, and whatever the file system can do."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io import disk
from tasks.io.disk import PIECE, NewFile
from tasks.io.errors import DiskFull
from tasks.io.location import is_transient

SIZES = [0, 1, 4095, 4096, 4097, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 4096 + 5]
Write = Callable[[int, memoryview], int]


def some_bytes(count: int) -> bytes:
    return (bytes(range(251)) * (count // 251 + 1))[:count]


def written(path: Path, pieces: list[bytes]) -> bytes:
    file = NewFile(str(path))
    for piece in pieces:
        file.append(memoryview(piece))
    file.close()
    return path.read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_a_file_has_the_bytes_that_were_given(tmp_path: Path, size: int) -> None:
    data = some_bytes(size)
    assert written(tmp_path / "x", [data]) == data


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 3 * PIECE), max_size=6))
def test_pieces_make_no_difference(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    data = some_bytes(2 * PIECE + 12_345)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(places)]
    assert written(tmp_path_factory.mktemp("pieces") / "x", pieces) == data


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some are: they say so when the file is opened, and may have made it by then."""
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & disk._DIRECT:
            os.close(real(path, flags & ~disk._DIRECT, mode))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    data = some_bytes(PIECE + 5000)
    assert written(tmp_path / "x", [data]) == data


def refused_if_direct(fail: Callable[[int], bool]) -> Write:
    """A write that fails as one of unfit size or place does, as long as the file is direct."""
    import fcntl

    real, count = os.write, 0

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal count
        count += 1
        if fail(count) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & disk._DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    return write


@pytest.mark.parametrize("first", [1, 2])
def test_direct_writes_that_are_refused_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setattr(os, "write", refused_if_direct(lambda number: number >= first))
    data = some_bytes(3 * PIECE + 5000)
    assert written(tmp_path / "x", [data]) == data


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: max(1, len(data) // 3)]))
    data = some_bytes(PIECE + 100)
    assert written(tmp_path / "x", [data]) == data


@pytest.mark.parametrize("size", [100, 3 * PIECE])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    file = NewFile(str(tmp_path / "x"))

    def write() -> None:
        file.append(memoryview(some_bytes(size)))
        file.close()

    with pytest.raises(DiskFull, match=r"the disk is full: 'x' can't be written to .* MiB are free\. Make room there"):
        write()
    file.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_isnt_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        NewFile(str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_discarding_deletes(tmp_path: Path) -> None:
    file = NewFile(str(tmp_path / "x"))
    file.append(memoryview(some_bytes(2 * PIECE)))
    file.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_quota_and_inodes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(number: int) -> None:
        with disk.told_if_full(str(tmp_path / "not-yet-there" / "x")):
            raise OSError(number, os.strerror(number))

    with pytest.raises(DiskFull, match=r"'x' can't be written to .* where the quota is used up, though"):
        write(errno.EDQUOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk.MIB, total=3 * disk.MIB))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_favail=0))
    with pytest.raises(DiskFull, match=r"where 1\.0 MiB of 3\.0 MiB are free, but no more files can be made"):
        write(errno.ENOSPC)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk.told_if_full(str(tmp_path / "x")):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_full_disk_is_not_tried_again() -> None:
    told = pickle.loads(pickle.dumps(DiskFull("the disk is full")))
    assert str(told) == "the disk is full"
    assert not is_transient(told)
