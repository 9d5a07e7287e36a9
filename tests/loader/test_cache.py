from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import random
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion
from tasks.io.hashing import digest
from tasks.loader.cache import OWN_DIRECTORY, TAG, FileCache, default_directory
from tasks.store.manifest import FileEntry


def put(root: str, name: str, data: bytes) -> tuple[str, FileEntry]:
    """A file in the store and what a manifest says of it."""
    uri = f"{root}/{name}"
    storage.write_bytes(uri, data)
    return uri, FileEntry(path=name, rows=1, bytes=len(data), digest=digest(data))


def kept(cache: FileCache) -> list[str]:
    """Contents of the files in the cache, by their first byte."""
    return sorted(path.read_bytes()[:1].decode() for path in cache.directory.glob("[!.]*.parquet"))


def test_a_file_is_downloaded_once_and_found_then(s3_root: str, tmp_path: Path) -> None:
    uri, entry = put(s3_root, "a", b"a" * 1000)
    cache, another = FileCache(tmp_path / "cache"), FileCache(tmp_path / "cache")
    for user in (cache, cache, another):
        with user.open(uri, entry) as file:
            assert file.read() == b"a" * 1000 or user is cache
    assert (cache.counts.hits, cache.counts.misses, cache.counts.bytes_read) == (1, 1, 1000)
    assert (another.counts.hits, another.counts.misses, another.counts.bytes_read) == (1, 0, 0)
    storage.delete(uri)
    another.open(uri, entry).close()


def test_the_same_bytes_are_kept_once(s3_root: str, tmp_path: Path) -> None:
    cache = FileCache(tmp_path)
    for name in ("v1", "v2"):
        cache.open(*put(s3_root, name, b"same")).close()
    assert (cache.counts.hits, cache.counts.misses) == (1, 1)


def test_what_was_used_longest_ago_goes_first(s3_root: str, tmp_path: Path) -> None:
    files = {name: put(s3_root, name, name.encode() * 100) for name in "abcd"}
    cache = FileCache(tmp_path, limit=300)
    for moment, name in enumerate("abcabd"):
        cache.open(*files[name]).close()
        for path in cache.directory.glob("[!.]*.parquet"):  # clocks of file systems are coarse
            if path.read_bytes()[:1] == name.encode():
                os.utime(path, (moment, moment))
    assert kept(cache) == ["a", "b", "d"]


def test_a_file_in_use_stays_also_if_only_its_mapping_is_open(s3_root: str, tmp_path: Path) -> None:
    files = {name: put(s3_root, name, name.encode() * 100) for name in "abc"}
    cache = FileCache(tmp_path, limit=200)
    with cache.open(*files["a"]) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name in "bc":
        cache.open(*files[name]).close()
    assert kept(cache) == ["a", "c"]
    mapped.close()
    cache.open(*files["b"]).close()
    assert kept(cache) == ["b", "c"]


def test_files_in_use_may_exceed_the_limit_for_a_while(s3_root: str, tmp_path: Path) -> None:
    files = {name: put(s3_root, name, name.encode() * 100) for name in "abc"}
    cache = FileCache(tmp_path, limit=150)
    with cache.open(*files["a"]), cache.open(*files["b"]):
        assert kept(cache) == ["a", "b"]
    cache.open(*files["c"]).close()
    assert kept(cache) == ["c"]


@pytest.mark.parametrize("change", [b"b" * 1000, b"a" * 999, b"a" * 1001], ids=["altered", "shorter", "longer"])
def test_a_download_that_differs_is_refused_and_leaves_nothing(s3_root: str, tmp_path: Path, change: bytes) -> None:
    uri, entry = put(s3_root, "a", b"a" * 1000)
    storage.write_bytes(uri, change)
    cache = FileCache(tmp_path)
    with pytest.raises(CorruptVersion, match=r"/a differs from its manifest: expected 1000 bytes of blake3:.*found"):
        cache.open(uri, entry)
    assert [path.name for path in cache.directory.iterdir() if not path.name.endswith(".lock")] == [TAG]
    storage.write_bytes(uri, b"a" * 1000)
    cache.open(uri, entry).close()


def test_a_missing_file_is_named(s3_root: str, tmp_path: Path) -> None:
    uri, entry = put(s3_root, "a", b"a")
    storage.delete(uri)
    with pytest.raises(CorruptVersion, match="/a is missing, but its manifest lists it"):
        FileCache(tmp_path).open(uri, entry)


def test_a_cached_file_that_was_cut_or_discarded_is_downloaded_again(s3_root: str, tmp_path: Path) -> None:
    uri, entry = put(s3_root, "a", b"a" * 100)
    cache = FileCache(tmp_path)
    cache.open(uri, entry).close()
    (path,) = cache.directory.glob("[!.]*.parquet")
    path.write_bytes(b"a")
    with cache.open(uri, entry):
        assert path.read_bytes() == b"a" * 100
    cache.discard(entry)
    cache.open(uri, entry).close()
    assert cache.counts.misses == 3


def test_what_a_dead_process_left_is_removed(s3_root: str, tmp_path: Path) -> None:
    uri, entry = put(s3_root, "a", b"a")
    cache = FileCache(tmp_path)
    name = entry.digest.replace(":", "-")
    dead, alive = (cache.directory / f".{name}.parquet.{letter * 32}.tmp" for letter in "de")
    dead.write_bytes(b"x" * 100)
    alive.write_bytes(b"x" * 100)
    with alive.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        cache.open(uri, entry).close()
    assert not dead.exists()
    assert alive.exists()


def test_a_download_can_be_stopped(s3_root: str, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    cache = FileCache(tmp_path)
    with pytest.raises(InterruptedError, match="stopped"):
        cache.open(*put(s3_root, "a", b"a"), stop)
    assert kept(cache) == []


def test_only_what_the_cache_has_written_goes(tmp_path: Path) -> None:
    """`cache_dir` may be a version's own directory; and whatever is beside the cache's files is somebody else's."""
    digests = "blake3-" + "0" * 64
    theirs = ["part-00000-a1.parquet", f".x.{'0' * 32}.tmp", f"{digests}.parquet.bak", f"x{digests}.parquet"]
    (tmp_path / "split=train").mkdir()
    for name in [*theirs, f"{digests}.parquet", "split=train/part-00000-a1.parquet"]:
        (tmp_path / name).write_bytes(b"x" * 100)
    cache = FileCache(tmp_path, limit=100)
    for name in theirs:
        (cache.directory / name).write_bytes(b"x" * 100)
    (cache.directory / f"blake3-{'1' * 64}.parquet").symlink_to(tmp_path / theirs[0])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    for name in "abc":
        cache.open(*put(str(tmp_path / "source"), name, name.encode() * 100)).close()
    assert kept(cache) == ["c", "x", "x", "x"]  # the last one, and what isn't the cache's
    assert {path: path.read_bytes() for path in before} == before


def test_a_directory_that_somebody_else_uses_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / OWN_DIRECTORY).mkdir()
    (tmp_path / OWN_DIRECTORY / f"blake3-{'0' * 64}.parquet").write_bytes(b"x")
    with pytest.raises(
        ConfigError, match=r"no cache of this project's \('CACHEDIR.TAG' is missing\) and holds 'blake3-0"
    ):
        FileCache(tmp_path)


def crowd(directory: str, files: list[tuple[str, FileEntry]], number: int, result) -> None:
    """Read all files in some threads, each in orders of its own and with some of them open at a time."""
    cache = FileCache(directory, limit=2 * files[0][1].bytes)

    def read(thread: int) -> None:
        draw, held = random.Random(10 * number + thread), deque[Any](maxlen=thread + 1)
        for uri, entry in [file for _ in range(6) for file in draw.sample(files, len(files))]:
            held.append(cache.open(uri, entry))
            held[-1].seek(0)
            assert digest(held[-1].read()) == entry.digest

    with ThreadPoolExecutor(4) as threads:
        reading = [threads.submit(read, thread) for thread in range(4)]
    result.put([repr(one.exception()) for one in reading if one.exception()])


def test_processes_share_a_cache_of_a_tenth_of_what_they_read(tmp_path: Path) -> None:
    """Each evicts what the others have just read or are about to read."""
    files = [put(str(tmp_path / "source"), str(number), bytes([number]) * 20_000) for number in range(20)]
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    processes = [context.Process(target=crowd, args=(str(tmp_path), files, number, result)) for number in range(2)]
    for process in processes:
        process.start()
    assert [result.get(timeout=60) for _ in processes] == [[], []]
    for process in processes:
        process.join(60)
    cache = FileCache(tmp_path)
    cache.open(*files[0]).close()
    assert not list(cache.directory.glob("*.tmp"))


def use(directory: str, files: list[tuple[str, FileEntry]], start, result) -> None:
    cache = FileCache(directory)
    start.wait(60)
    for uri, entry in files:
        with cache.open(uri, entry) as file:
            assert os.fstat(file.fileno()).st_size == entry.bytes
    result.put((cache.counts.hits, cache.counts.misses))


def test_two_processes_at_once_download_each_file_once(s3_root: str, tmp_path: Path) -> None:
    files = [put(s3_root, str(number), bytes([number]) * 200_000) for number in range(8)]
    context = multiprocessing.get_context("spawn")
    start, result = context.Barrier(2), context.Queue()
    arguments = (str(tmp_path), files, start, result)
    processes = [context.Process(target=use, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    counts = [result.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [sum(column) for column in zip(*counts, strict=True)] == [8, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "cache_bytes = 0: give the bytes that files may use, a whole number above 0"),
        ({"limit": 2}, r"cache_bytes = 2 is less than one file of the version \(.*/a: 3 bytes\)"),
        ({"directory": "/proc/nowhere"}, "cache_dir = '/proc/nowhere' can't be used"),
        ({"directory": "/proc"}, r"cache_dir = '/proc' can't be used \(.*\): name a directory on a local disk"),
        ({"directory": ""}, "cache_dir = '': name a directory on a local disk, or leave it out for '/"),
        ({"directory": "s3://bucket/cache"}, "cache_dir = 's3://bucket/cache': name a directory on a local disk"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(s3_root: str, tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FileCache(**{"directory": tmp_path, **options}).open(*put(s3_root, "a", b"aaa"))


def test_the_default_directory_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_directory() == Path("/caches/training-data-pipelines")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # its specification passes over relative ones
    assert default_directory() == Path.home() / ".cache" / "training-data-pipelines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == Path.home() / ".cache" / "training-data-pipelines"
