"""The files of a version's split, as one sequence of samples to gather from.

Files on a local disk are mapped into memory directly: of a split of many files the first ones at once, others
shortly before their first use. Those of S3 come through the cache, in the same way; only those needed soon
stay mapped, so that the cache can evict the others.

A mapped file that is truncated or written to is noticed: each is checked before a batch is gathered, unless that was
done in the last 20 ms. A truncation in between, read before the next check, still ends the process by SIGBUS;
written files are compared with their checksums anew within about a second.
"""

from __future__ import annotations

import operator
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from tasks.io import storage
from tasks.io.errors import CorruptVersion
from tasks.io.tensors import AnyArray, BoolArray, Int32Array, Int64Array
from tasks.loader.cache import FileCache
from tasks.loader.kernel import (
    BAD,
    GOOD,
    UNKNOWN,
    Places,
    Values,
    batches_of,
    copy_values,
    fetch,
    fetch_values,
    files_of,
    find_values,
    gather,
    unknown_batches,
    unlocated_files,
)
from tasks.loader.samples import PREFIX_BYTES, SampleFormat
from tasks.loader.version_files import CURE, MappedFile, Version, misfits, missing_file, open_version
from tasks.store import layout
from tasks.store.manifest import FileEntry

__all__ = ["OnCorrupt", "Shards", "Version", "open_version"]

OnCorrupt = Literal["raise", "skip"]

_NEAR_ENTRIES = 1 << 20
_DOWNLOADS = 4  # at a time
_MAPPED_AT_ONCE = 512  # local files, when a split is opened: errors in them are raised then
_LOOK_SECONDS, _TIMES_SECONDS = 0.02, 1.0  # between checks of files' lengths, and of their times, which take longer
_LOOK_SHARE = 1 / 500  # of the time at most, however many files there are
_NO_ADDRESSES = np.empty(0, np.int64)
_FETCH_BYTES = 1 << 18  # of a chunk that is fetched as a whole; for smaller ones the system's read-ahead is enough


class Shards:
    """The samples of a split by their numbers, in the order of the manifest's files.

    One thread at a time may use it.

    Args:
        version: The version.
        split: The split.
        cache: Cache for files of S3; not used for local ones.
        on_corrupt: 'raise' on damage, or 'skip' the affected samples.
        verify: True to check each batch's checksum before its first use.

    Attributes:
        samples: number of samples, including damaged ones.
        columns: columns of a sample, by name.
        ragged: name of the column of values of any length; None if there is none.
        encoded: True for encoded images, which are decoded for a batch.
        delivered: columns that a batch may have, by name.
        delivered_bytes: bytes of a sample in a batch.
        sample_bytes: bytes of all columns of a sample, of a mean one if its values have any length.
        files: number of files, including skipped ones.
        remote: True if its files come through the cache.
        skipped_files: number of skipped files.
        picked: names of the columns to gather.
        settled_until: time, of the monotonic clock, up to which all samples are usable without a call of `usable`.

    Raises:
        ConfigError: as `Version.files`.
        CorruptVersion: a file is missing, or differs from its manifest or its format; or all are skipped.

    """

    def __init__(
        self,
        version: Version,
        split: str,
        cache: FileCache | None = None,
        on_corrupt: OnCorrupt = "raise",
        verify: bool = True,
    ) -> None:
        self._version, self._cache, self._skip = version, cache, on_corrupt == "skip"
        self._files = version.files(split)
        form = SampleFormat.of(version.definition)
        self._batch_size = form.batch_size
        self.remote = storage.is_s3(version.uri)
        self.columns, self.sample_bytes = form.columns, form.sample_bytes
        self.encoded, self.delivered, self.delivered_bytes = (
            form.encoding is not None,
            form.delivered,
            form.delivered_bytes,
        )
        self.ragged = next((name for name, spec in self.columns.items() if spec.variable), None)
        counts = np.array([entry.rows for entry in self._files], np.int64)
        self.samples, self.files = int(counts.sum()), len(self._files)
        self.skipped_files = 0
        self._batch_starts = np.concatenate([[0], np.cumsum(-(-counts // self._batch_size))])
        self._status = np.zeros(self._batch_starts[-1], np.uint8)
        self._unknown = np.empty(0, np.int64)
        self._verify, self._unchecked = verify, len(self._status) if verify else 0
        self._next_look = self._next_times = self.settled_until = 0.0
        self._read = np.empty(0, np.bool_)  # chunks that were fetched, once and for all
        self._stays = sum(entry.bytes for entry in self._files) < memory_bytes() // 2
        self.picked: tuple[str, ...] = ()
        self._fixed: tuple[str, ...] = ()  # those of the picked columns whose values have one length
        self._widths = np.empty(0, np.int64)
        self._mapped: dict[int, MappedFile] = {}
        self._bad: set[int] = set()
        self._damaged = False
        self._coming: dict[int, Future[MappedFile]] = {}
        self._stop, self._halt = threading.Event(), np.zeros(1, np.uint8)
        self._pool = ThreadPoolExecutor(_DOWNLOADS if self.remote else 1, "fetch")
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._near, self._shift = _near(self._starts)
        self._check_sizes()
        if not self.remote:
            for file in range(min(len(self._files), _MAPPED_AT_ONCE)):
                self._map(file)
        self._tabulate()

    def close(self) -> None:
        """Stop the current fetches."""
        self._stop.set()
        self._halt[0] = 1
        self._pool.shutdown(wait=False, cancel_futures=True)

    def usable(self, index: Int64Array) -> BoolArray | None:
        """Return a mask of the samples that can be gathered, (n,); None for all of them.

        Map the files of the samples, and check their batches.

        Raises:
            CorruptVersion: some are damaged, and `on_corrupt` is 'raise'; or all samples are damaged.
        """
        if len(self._mapped) + len(self._bad) < len(self._files):
            self._require(self._files_of(index, index + 1))
        if time.monotonic() >= self._next_look:
            self._look()
        if self.ragged is not None:
            self._locate(index)
        if self._unchecked or self._damaged:
            batches = np.empty(len(index), np.int64)
            batches_of(self._places, index, batches)
            if self._unchecked:
                self._check_batches(batches)
            if self._damaged:
                good: BoolArray = self._status[batches] != BAD
                return None if good.all() else good
        settled = self.ragged is None and not self._unchecked and len(self._mapped) == len(self._files)
        self.settled_until = self._next_look if settled else 0.0
        return None

    def gather(self, index: Int64Array, out: Mapping[str, AnyArray]) -> None:
        """Copy the values of some columns of usable samples, each of one length.

        Args:
            index: (n,) samples that are usable.
            out: Target arrays by column: C-contiguous, (n, *shape).
        """
        Joined([self]).gather(index, np.array([[0, 0, len(index)]]), out)

    def tables(self, names: tuple[str, ...]) -> tuple[Places, Int64Array]:
        """Return the places of the samples, and the (columns, row groups) addresses of columns of one length.

        They are valid, and the addresses the same object, until files are mapped or other columns picked.
        """
        if names != self._fixed:
            self.pick(names)
        return self._places, self._addresses

    @property
    def held(self) -> Mapping[int, MappedFile]:
        """The mapped files by number; addresses in them are valid as long as this object, not the shards' next one."""
        return self._mapped

    def find(self, index: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return address and bytes of the values of any length of usable samples, (n,) each.

        They are valid until the next call of another method. `kernel.copy_values` copies them.

        Raises:
            CorruptVersion: lengths were changed since they were checked.
        """
        found = np.empty((2, len(index)), np.int64)
        if (odd := find_values(self._places, index, self._values, found)) >= 0:
            [file] = self._files_of(index[odd : odd + 1], index[odd : odd + 1] + 1)
            raise CorruptVersion(f"{self._mapped[file].name}: its lengths were changed while it was read: {CURE}")
        return found[0], found[1]

    def gather_ragged(self, index: Int64Array) -> tuple[AnyArray, Int64Array]:
        """Return the values of any length of usable samples: elements, (m,), and where each one starts, (n + 1,)."""
        assert self.ragged is not None, "its values have one length"
        spec, (addresses, sizes) = self.columns[self.ragged], self.find(index)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        data = np.empty(starts[-1] // spec.width, spec.dtype)
        copy_values(addresses, sizes, data.ctypes.data + starts[:-1])
        return data, starts // spec.width

    def fault(self, sample: int, what: str) -> CorruptVersion:
        """Return the error of a sample that can't be decoded."""
        file = int(np.searchsorted(self._starts, sample, side="right")) - 1
        uri = layout.join(self._version.uri, self._files[file].path)
        return CorruptVersion(f"{uri}: sample {sample - self._starts[file]} can't be decoded: {what}: {CURE}")

    def leave_out(self, faults: Mapping[int, str]) -> None:
        """Skip samples that can't be decoded from now on, or raise the error of the first one.

        Args:
            faults: Why not, by the sample's number.

        Raises:
            CorruptVersion: `on_corrupt` is 'raise'; or all samples are damaged.
        """
        for sample, what in faults.items():
            error = self.fault(sample, what)
            if not self._skip:
                raise error
            batch = np.empty(1, np.int64)
            batches_of(self._places, np.array([sample]), batch)
            self._mark(int(batch[0]), BAD)
            self._refuse_if_nothing_is_left(error)

    def pick(self, names: tuple[str, ...]) -> None:
        """Choose the columns to gather."""
        self.picked = names
        fixed = tuple(name for name in names if not self.columns[name].variable)
        if fixed != self._fixed:
            self._fixed = fixed
            self._widths = np.array([self.columns[name].width for name in fixed], np.int64)
            self._pick()

    def soon(self, firsts: Int64Array, ends: Int64Array, chunk: int) -> None:
        """Announce the samples that are needed soon, so that they are ready then.

        Remote files are downloaded in this order, and others needn't stay mapped. Local ones are mapped, and read ahead
        at their first use.

        Args:
            firsts: (n,) first samples of chunks.
            ends: (n,) ends of the chunks.
            chunk: Samples of a whole chunk.
        """
        wanted = self._files_of(firsts, ends)
        if not self.remote:
            self._require(wanted)
            self._read_ahead(firsts, ends, chunk)
            return
        for file in wanted:
            if file not in self._mapped and file not in self._bad and file not in self._coming:
                self._coming[file] = self._pool.submit(self._open, file)
        kept = set(wanted)
        for file in self._coming.keys() - kept:
            # A present but never used one would stay mapped, and in the cache.
            if self._coming[file].cancel() or self._coming[file].done():
                del self._coming[file]
        if self._mapped.keys() - kept:
            self._mapped = {file: mapped for file, mapped in self._mapped.items() if file in kept}
            self.settled_until = 0.0
            self._tabulate()

    def _read_ahead(self, firsts: Int64Array, ends: Int64Array, chunk: int) -> None:
        if chunk * self.sample_bytes < _FETCH_BYTES or self._bad:
            return
        if not len(self._read):
            self._read = np.zeros(-(-self.samples // chunk), np.bool_)
        # The short chunk that ends a stream may share its number with the next stream's first one; either is correct.
        fresh = ~self._read[firsts // chunk]
        self._read[firsts // chunk] = self._stays
        addresses, widths = self._addresses, self._widths
        self._pool.submit(fetch, self._places, firsts[fresh], ends[fresh], addresses, widths, self._halt)
        if self.ragged in self.picked:
            self._locate(np.stack([firsts, ends - 1]).ravel())
            ranges = [one for pair in zip(firsts[fresh], ends[fresh], strict=True) for one in self._ranges(*pair)]
            if ranges:
                starts, stops = np.array(ranges, np.int64).T.copy()
                self._pool.submit(fetch_values, starts, stops, self._halt)

    def _ranges(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield address and end of the values of any length of a chunk in each of its files, but for the last one."""
        for file in self._files_of(np.array([first]), np.array([end])):
            mapped = self._mapped[file]
            if mapped.places is not None:
                own = mapped.places[max(first - self._starts[file], 0) : end - self._starts[file]]
                if len(own) and own.min() >= 0:
                    yield mapped.address + int(own[0]) - PREFIX_BYTES, mapped.address + int(own[-1])

    def _files_of(self, firsts: Int64Array, ends: Int64Array) -> list[int]:
        """Return the files of some ranges of samples, in their order."""
        found = np.empty(self.files, np.int64)
        return [int(file) for file in found[: files_of(self._places, firsts, ends, found)]]

    def _require(self, files: Sequence[int]) -> None:
        """Map those of some files that aren't mapped yet."""
        missing = [file for file in files if file not in self._mapped and file not in self._bad]
        for file in missing:
            self._map(file)
        if missing:
            self._tabulate()

    def _map(self, file: int) -> None:
        if file in self._bad:
            return
        try:
            coming = self._coming.pop(file, None)
            self._mapped[file] = self._open(file) if coming is None else coming.result()
        except CorruptVersion as error:
            self._leave_out(file, error)

    def _leave_out(self, file: int, error: CorruptVersion) -> None:
        """Skip a file, or raise its error."""
        if not self._skip:
            raise error
        self._bad.add(file)
        self.skipped_files += 1
        self._mark(slice(self._batch_starts[file], self._batch_starts[file + 1]), BAD)
        self._refuse_if_nothing_is_left(error)

    def _mark(self, batches: slice | int, status: np.uint8) -> None:
        self._status[batches] = status
        self._unchecked = int(np.count_nonzero(self._status == UNKNOWN)) if self._verify else 0
        self._damaged = self._damaged or status == BAD
        self.settled_until = 0.0

    def _refuse_if_nothing_is_left(self, error: CorruptVersion) -> None:
        if self._damaged and (self._status == BAD).all():
            raise CorruptVersion(f"all {self.samples:,} samples are damaged or missing; the last: {error}") from error

    def _look(self) -> None:
        """Find mapped files that were truncated or written to since the last check."""
        started = time.monotonic()
        # Using a file of the cache changes its times.
        times = not self.remote and started >= self._next_times
        for file, mapped in self._mapped.items():
            if file in self._bad:
                continue
            try:
                mapped.check_length()
            except CorruptVersion as error:
                self._leave_out(file, error)
                continue
            if times and mapped.was_written():
                own = self._status[self._batch_starts[file] : self._batch_starts[file + 1]]
                own[own == GOOD] = UNKNOWN
                mapped.places, self._values.located[file] = None, 0
                self._unchecked = int(np.count_nonzero(self._status == UNKNOWN)) if self._verify else 0
        now = time.monotonic()
        if times:
            self._next_times = now + _TIMES_SECONDS
        self._next_look = now + max(_LOOK_SECONDS, (now - started) / _LOOK_SHARE)

    def _open(self, file: int) -> MappedFile:
        entry = self._files[file]
        uri = layout.join(self._version.uri, entry.path)
        with self._open_bytes(uri, entry) as opened:
            mapped = MappedFile(opened, uri)
        found, said = (mapped.samples, mapped.batch_size), (entry.rows, self._batch_size)
        if found != said:
            what = "{:,} samples in batches of {:,}"
            raise CorruptVersion(f"{uri} has {what.format(*found)}, its manifest says {what.format(*said)}: {CURE}")
        stored = {name: (column.spec.shape, column.spec.dtype) for name, column in mapped.columns.items()}
        wanted = {name: (spec.shape, spec.dtype) for name, spec in self.columns.items()}
        if stored != wanted:
            raise CorruptVersion(f"{uri}: its columns {stored} aren't {wanted}, as its manifest says: {CURE}")
        return mapped

    def _open_bytes(self, uri: str, entry: FileEntry) -> BinaryIO:
        if not self.remote:
            try:
                return Path(uri).open("rb")
            except FileNotFoundError as error:
                raise missing_file(uri) from error
        assert self._cache is not None, "a remote version needs a cache"
        return self._cache.open(uri, entry, self._stop)

    def _check_sizes(self) -> None:
        for file, fault in misfits(self._version, self._files):
            self._leave_out(file, fault)

    def _locate(self, index: Int64Array) -> None:
        """Find the places of the values of any length in the files of some samples."""
        found = np.empty(len(index), np.int64)
        for file in found[: unlocated_files(self._places, index, self._values, found)].tolist():
            mapped = self._mapped.get(file)
            if mapped is None or file in self._bad:
                continue
            for group in mapped.locate():
                fault = CorruptVersion(
                    f"{mapped.name}: the lengths in row group {group} aren't those of its {self.ragged}s: {CURE}"
                )
                self._discard(file)
                if not self._skip:
                    raise fault
                first, end = (self._batch_starts[file] - -mapped.starts[group : group + 2] // self._batch_size).tolist()
                self._mark(slice(first, end), BAD)
                self._refuse_if_nothing_is_left(fault)
            self._values.located[file] = mapped.places.ctypes.data if mapped.places is not None else 0

    def _discard(self, file: int) -> None:
        """Drop a damaged file from the cache, so that it's downloaded anew next time."""
        if self._cache is not None and self.remote:
            self._cache.discard(self._files[file])

    def _check_batches(self, batches: Int64Array) -> None:
        if len(self._unknown) < len(batches):
            self._unknown = np.empty(len(batches), np.int64)
        for batch in self._unknown[: unknown_batches(batches, self._status, self._unknown)]:
            file = int(np.searchsorted(self._batch_starts, batch, side="right")) - 1
            within = int(batch - self._batch_starts[file])
            try:
                if not self._mapped[file].is_intact(within):
                    raise CorruptVersion(
                        f"{self._mapped[file].name}: batch {within} has not the checksum in the footer: {CURE}"
                    )
                self._status[batch] = GOOD
                self._unchecked -= 1
            except CorruptVersion as error:
                self._discard(file)
                if not self._skip:
                    raise
                self._mark(int(batch), BAD)
                self._refuse_if_nothing_is_left(error)

    def _tabulate(self) -> None:
        """Build the tables of the samples' places, for the files that are mapped now."""
        groups, starts, sizes = [0], [np.empty(0, np.int64)], []
        for file in range(len(self._files)):
            mapped = self._mapped.get(file)
            groups.append(groups[-1] + (len(mapped.starts) - 1 if mapped else 0))
            sizes.append(int(mapped.starts[1]) if mapped else 1)
            if mapped is not None:
                starts.append(self._starts[file] + mapped.starts[:-1])
        self._places = Places(
            files=self._starts,
            near=self._near,
            shift=self._shift,
            groups=np.array(groups, np.int64),
            size=np.array(sizes, np.int64),
            starts=np.concatenate(starts),
            batches=self._batch_starts,
            batch_size=self._batch_size,
        )
        located, addresses, ends = np.zeros((3, len(self._files)), np.int64)
        for file, mapped in self._mapped.items():
            located[file] = mapped.places.ctypes.data if mapped.places is not None else 0
            addresses[file], ends[file] = mapped.address, mapped.address + mapped.bytes
        self._values = Values(located, addresses, ends)
        self._pick()

    def _pick(self) -> None:
        """Build the table of the picked columns' addresses, (columns, row groups)."""
        self._addresses = np.empty((len(self._fixed), len(self._places.starts)), np.int64)
        for row, name in zip(self._addresses, self._fixed, strict=True):
            for file, mapped in self._mapped.items():
                first, end = self._places.groups[file : file + 2]
                row[first:end] = mapped.address + mapped.columns[name].offsets


class Joined:
    """The samples of several splits as one sequence, whose values are copied by one call.

    One thread at a time may use it, and the shards.

    Args:
        all_shards: Samples of each split.

    """

    def __init__(self, all_shards: Sequence[Shards]) -> None:
        self._all = tuple(all_shards)
        counts = [shards.samples for shards in self._all]
        self._firsts = np.cumsum([0, *counts[:-1]])
        self._near: tuple[Int32Array, int] | None = None
        self._own: list[Int64Array | None] = [None] * len(self._all)  # the addresses that were joined

    def gather(
        self, index: Int64Array, parts: Int64Array, out: Mapping[str, AnyArray], located: str | None = None
    ) -> None:
        """Copy the values of some columns of usable samples, each of one length, one part after the other.

        Args:
            index: Samples by their numbers in their split.
            parts: (P, 3) number of the split of each part, its place in `index`, and the number of its samples.
            out: Target arrays by column: C-contiguous, (n, *shape) for the n samples of all parts.
            located: The column for whose values the target gets their addresses instead, int64 (n,). They are valid
                as long as `held` of all shards.
        """
        tables = [shards.tables(tuple(out)) for shards in self._all]
        if not all(map(operator.is_, self._own, (addresses for _, addresses in tables))):
            self._own = [addresses for _, addresses in tables]
            self._places = self._join([places for places, _ in tables])
            self._addresses = np.concatenate([addresses for _, addresses in tables], axis=1)
        widths = np.array([self._all[0].columns[name].width for name in out], np.int64)
        to = np.array(list(map(address_of, out.values())), np.int64)
        column, found = (-1, _NO_ADDRESSES) if located is None else (list(out).index(located), out[located])
        gather(self._places, index, parts, self._firsts, self._addresses, widths, to, column, found)

    @property
    def held(self) -> tuple[Mapping[int, MappedFile], ...]:
        """`Shards.held` of each split."""
        return tuple(shards.held for shards in self._all)

    def _join(self, parts: Sequence[Places]) -> Places:
        """Return the places of all samples, numbered one split after the other."""
        if len(parts) == 1:
            return parts[0]
        firsts = self._firsts
        ends = firsts[-1:] + self._all[-1].samples
        files = np.concatenate([*(own.files[:-1] + first for own, first in zip(parts, firsts, strict=True)), ends])
        groups = np.cumsum([0, *(len(own.starts) for own in parts)])
        if self._near is None:
            self._near = _near(files)
        return Places(
            files,
            *self._near,
            groups=np.concatenate(
                [*(own.groups[:-1] + first for own, first in zip(parts, groups, strict=False)), groups[-1:]]
            ),
            size=np.concatenate([own.size for own in parts]),
            starts=np.concatenate([own.starts + first for own, first in zip(parts, firsts, strict=True)]),
            batches=np.concatenate([own.batches[:-1] for own in parts]),
            batch_size=parts[0].batch_size,
        )


def common_columns(all_shards: Sequence[Shards]) -> list[str]:
    """Return the names of the columns that batches of several versions may have."""
    return [name for name in all_shards[0].delivered if all(name in shards.delivered for shards in all_shards)]


def address_of(values: AnyArray) -> int:
    """Return the address of an array's first byte."""
    address: int = values.__array_interface__["data"][0]
    return address


def memory_bytes() -> int:
    """Return the bytes of the machine's memory, which holds the operating system's file cache."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _near(starts: Int64Array) -> tuple[Int32Array, int]:
    """Return the file of every 2**shift-th sample, and shift: starting points of the search for a sample's file."""
    samples, shift = int(starts[-1]), 0
    while samples >> shift > _NEAR_ENTRIES:
        shift += 1
    first = np.arange(0, samples, 1 << shift)
    return (np.searchsorted(starts, first, side="right") - 1).astype(np.int32), shift
