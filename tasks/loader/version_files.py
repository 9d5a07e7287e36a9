"""Files of a streaming-ready version: mapped into memory, and checked against the manifest before a sample is read.

The values of a column chunk are one page without levels: they are contiguous and end where it ends. This is checked
here, in the footer and in the page's header, before any value is read by its address.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion
from tasks.io.tensors import AnyArray, Int64Array, TensorSpec, tensor_spec, to_numpy
from tasks.loader.arguments import place
from tasks.loader.samples import BATCH_SIZE, LENGTH, PREFIX_BYTES, SampleFormat, noted_ids
from tasks.store import layout, versions
from tasks.store.manifest import FileEntry, Manifest

CURE = "publish a new version from the same sources, or restore the file from a copy"

_HEADER_BYTES = 64  # more than the part of a page's header that is read
_DATA_PAGES = (0, 3)


@dataclass(frozen=True, slots=True)
class RawColumn:
    """Place of a column's values.

    Attributes:
        spec: Shape and element type of a value.
        offsets: int64 (row groups,), start of each row group's values in the file.
        sizes: int64 (row groups,), bytes of each row group's values, with the prefixes of values of any length.
    """

    spec: TensorSpec
    offsets: Int64Array
    sizes: Int64Array


class MappedFile:
    """A memory-mapped file of samples.

    Args:
        file: The open file; it may be closed afterwards.
        name: Name of the file in errors.

    Attributes:
        columns: Columns by name, in the schema's order.
        ragged: The column of values of any length; None if there is none.
        starts: int64 (row groups + 1,), first sample of each row group, and the end.
        batch_size: Samples of a batch.
        address: Address of the file's first byte; valid as long as this object exists.
        bytes: Length of the file.
        places: int64 (samples,), start of each value of any length in the file, after `locate`; −1 where the lengths
            contradict the page. None before.

    Raises:
        CorruptVersion: it isn't a Parquet file of samples, or its values aren't contiguous.

    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        status = os.fstat(file.fileno())
        self._inode, self._written = (status.st_dev, status.st_ino), (status.st_mtime_ns, status.st_ctime_ns)
        try:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
            self._parquet = pq.ParquetFile(pa.BufferReader(pa.py_buffer(self._map)))
            specs = {field.name: tensor_spec(field) for field in self._parquet.schema_arrow}
        except (pa.ArrowInvalid, ValueError) as error:
            raise CorruptVersion(f"{name} can't be read as Parquet ({error}): {CURE}") from error
        self.address: int = self._bytes.ctypes.data
        self.bytes = len(self._bytes)
        self.places: Int64Array | None = None
        footer = self._parquet.metadata
        rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self.columns = {name: self._raw_column(spec, place) for place, (name, spec) in enumerate(specs.items())}
        self.ragged = next((column for column in self.columns.values() if column.spec.variable), None)
        if self.ragged is not None and self.columns.get(LENGTH, self.ragged).spec != TensorSpec((), "int64"):
            raise CorruptVersion(f"{name}: values of any length have no int64 column {LENGTH!r} beside them: {CURE}")
        size = (footer.metadata or {}).get(BATCH_SIZE.encode(), b"")
        self.batch_size = int(size) if size.isdigit() else 0
        if not self.batch_size or (self.starts[:-1] % self.batch_size).any():
            raise CorruptVersion(f"{name}: its row groups aren't whole batches, of {BATCH_SIZE} = {size!r}: {CURE}")
        self._checksums: list[str] = []
        self._view = memoryview(self._map)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    def check_length(self) -> None:
        """Check that the file hasn't been truncated: reading past its end would end the process by SIGBUS.

        Raises:
            CorruptVersion: it has been truncated.
        """
        size = self._map.size()
        if size < len(self._map):
            raise CorruptVersion(f"{self.name} was cut from {len(self._map)} to {size} bytes while it was read: {CURE}")

    def was_written(self) -> bool:
        """Return True if the times of the file under this path have changed since the last call, or the mapping.

        Another file under the same name is no change: the mapped one stays.
        """
        try:
            status = os.stat(self.name)
        except OSError:
            return False
        if (status.st_dev, status.st_ino) != self._inode:
            return False
        before, self._written = self._written, (status.st_mtime_ns, status.st_ctime_ns)
        return before != self._written

    def is_intact(self, batch: int) -> bool:
        """Return True if a batch matches the stored checksum.

        Raises:
            CorruptVersion: the footer hasn't a checksum for each batch.
        """
        first = batch * self.batch_size
        count = min(self.batch_size, self.samples - first)
        group = int(np.searchsorted(self.starts, first, side="right")) - 1
        hasher = xxhash.xxh3_128()
        for column in self.columns.values():
            if column is self.ragged:
                page = self._page(group, first, count)
                if page is None:
                    return False
                hasher.update(page)
                continue
            start = int(column.offsets[group]) + (first - int(self.starts[group])) * column.spec.width
            hasher.update(self._view[start : start + count * column.spec.width])
        if not self._checksums:
            self._checksums = noted_ids(self._parquet.metadata)
            if len(self._checksums) != (batches := -(-self.samples // self.batch_size)):
                raise CorruptVersion(f"{self.name} has {len(self._checksums)} checksums of {batches} batches: {CURE}")
        return hasher.hexdigest() == self._checksums[batch]

    def locate(self) -> list[int]:
        """Find the places of values of any length by their lengths; return the row groups where those can't be right.

        The first call reads the column of lengths, and keeps 8 bytes a sample.
        """
        assert self.ragged is not None, "values of one length are found without their places"
        width = self.ragged.spec.width
        places, odd = np.empty(self.samples, np.int64), []
        for group, (start, end) in enumerate(itertools.pairwise(self.starts.tolist())):
            lengths, own = self._lengths(group, start, end - start), places[start:end]
            most = int(self.ragged.sizes[group])
            # Sums of lengths below this can't overflow: a page has at most 2**31 bytes and values.
            if end > start and lengths.min() >= 0 and lengths.max() <= most:
                ends = np.cumsum(lengths * width + PREFIX_BYTES)
                if ends[-1] == most:
                    own[:] = self.ragged.offsets[group] + ends - lengths * width
                    continue
            own[:] = -1
            odd.append(group)
        self.places = places
        return odd

    def _lengths(self, group: int, first: int, count: int) -> Int64Array:
        """Return the lengths of some samples of a row group, as the file has them now."""
        place = int(self.columns[LENGTH].offsets[group]) + (first - int(self.starts[group])) * 8
        return np.frombuffer(self._map, "<i8", count, place)

    def _page(self, group: int, first: int, count: int) -> memoryview | None:
        """Return the part of a page with values of any length; None if it has other lengths than their column."""
        assert self.ragged is not None, "there are such values"
        if self.places is None:
            self.locate()
        assert self.places is not None, "they were located"
        places = self.places[first : first + count]
        sizes = self._lengths(group, first, count) * self.ragged.spec.width
        start, end = int(places[0]) - PREFIX_BYTES, int(places[-1] + sizes[-1])
        if start < 0 or end > self.ragged.offsets[group] + self.ragged.sizes[group]:
            return None
        prefixes = self._bytes[places[:, None] - PREFIX_BYTES + np.arange(PREFIX_BYTES)].view("<u4").ravel()
        return self._view[start:end] if np.array_equal(prefixes, sizes) else None

    def _raw_column(self, spec: TensorSpec, position: int) -> RawColumn:
        footer, column = self._parquet.metadata, self._parquet.schema.column(position)
        if column.path != column.name or column.max_definition_level:
            raise CorruptVersion(f"{self.name}: column {column.path!r} may hold nulls, which samples mustn't: {CURE}")
        offsets, sizes = np.empty((2, footer.num_row_groups), np.int64)
        for group in range(footer.num_row_groups):
            chunk = footer.row_group(group).column(position)
            header = bytes(self._bytes[chunk.data_page_offset : chunk.data_page_offset + _HEADER_BYTES])
            found, size = _page_bytes(header), footer.row_group(group).num_rows * spec.width
            if spec.variable and found is not None:
                size = found if found <= chunk.total_compressed_size else -1
            end = chunk.data_page_offset + chunk.total_compressed_size
            offsets[group], sizes[group] = end - size, size
            if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or found != size:
                raise CorruptVersion(
                    f"{self.name}: the values of column {column.name!r} don't lie one after the other in row group "
                    f"{group}; write the file as tasks/delivery/FORMAT.md says, and publish it anew"
                )
        return RawColumn(spec, offsets, sizes)


def _page_bytes(header: bytes) -> int | None:
    """Return the size of a data page's contents from its header; None if it isn't a data page.

    Thrift's compact protocol: a field's number and type in a byte, then its value. The first fields of a page's header
    are its kind and its size, 32-bit integers in zigzag and 7-bit groups.
    """
    if len(header) < 3 or header[0] != 0x15 or header[1] >> 1 not in _DATA_PAGES or header[2] != 0x15:
        return None
    value = 0
    for position, byte in enumerate(header[3:8]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value >> 1
    return None


_PLACES = f"…/{layout.STREAMING_READY}/<name>/vN, or without vN for the latest one"
_ODD_NUMBER = re.compile(r"v?-?[0-9.]+")


@dataclass(frozen=True, slots=True)
class Version:
    """A published streaming-ready version.

    Attributes:
        root: Root of the store.
        manifest: Everything known about the version.
    """

    root: str
    manifest: Manifest

    @property
    def uri(self) -> str:
        """Directory of the version."""
        return self.manifest.uri(self.root)

    @property
    def definition(self) -> dict[str, Any]:
        """Definition of its samples: kind, sizes, features, label, constants to normalise by."""
        return self.manifest.definition

    def files(self, split: str) -> list[FileEntry]:
        """Return the files of a split, in the manifest's order.

        Raises:
            ConfigError: there is no such split, or it has no samples.
        """
        found = files_of(self.manifest, split)
        if not sum(entry.rows for entry in found):
            names = [name for name, count in self.definition["samples"].items() if count]
            raise ConfigError(f"{self.uri} has no samples in split {split!r}: use " + " or ".join(map(repr, names)))
        return found


def files_of(manifest: Manifest, split: str) -> list[FileEntry]:
    """Return the files of a split of a streaming-ready version, in the manifest's order."""
    return [entry for entry in manifest.files if entry.path.startswith(layout.split_directory(split) + "/")]


def open_version(uri: str | os.PathLike[str]) -> Version:
    """Find a streaming-ready version by its directory, or the latest one by that of its dataset.

    Raises:
        ConfigError: it isn't a place, or not one of streaming-ready datasets.
        VersionNotFound: there is no such published version.
        CorruptVersion: its manifest can't be read.
    """
    uri = storage.normalise(place("uri", uri, f"name the directory of a version, {_PLACES}"))
    above, _, last = uri.rpartition("/")
    number = layout.parse_version(last)
    directory = uri if number is None else above
    root, found, name = directory.rpartition(f"/{layout.TRAINING_DATASETS}/")
    if not found or not name:
        raise ConfigError(f"{uri!r} is no streaming-ready version: name {_PLACES}")
    if number is None and _ODD_NUMBER.fullmatch(last):
        raise ConfigError(f"{uri!r} has no version {last!r}: versions are v1, v2, …; name {_PLACES}")
    dataset = layout.join(layout.TRAINING_DATASETS, name)
    manifest = versions.resolve(root, dataset, "latest" if number is None else number)
    version = Version(root, manifest)
    try:
        fault = _contradiction(manifest)
    except ConfigError as error:
        raise ConfigError(f"{version.uri}: {error}") from error
    if fault:
        raise CorruptVersion(f"{version.uri}: its manifest contradicts itself: {fault}: {CURE}")
    return version


def _contradiction(manifest: Manifest) -> str | None:
    """Return a contradiction in a streaming-ready version's definition; None if there is none."""
    said = manifest.definition
    try:
        SampleFormat.of(said)
        samples = {split: int(count) for split, count in said["samples"].items()}
        constants = [[float(value) for value in said["normalise"][name]] for name in ("mean", "std")]
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        return f"definition ({type(fault).__name__}: {fault})"
    if len(constants[0]) != len(constants[1]):
        return f"{len(constants[0])} means and {len(constants[1])} deviations to normalise by"
    for split, count in samples.items():
        if (found := sum(entry.rows for entry in files_of(manifest, split))) != count:
            return f"{count} samples in split {split!r}, and {found} in its files"
    if (total := sum(samples.values())) != manifest.rows:
        return f"{total} samples in all splits, and {manifest.rows} in its files"
    return None


def misfits(version: Version, files: Sequence[FileEntry]) -> Iterator[tuple[int, CorruptVersion]]:
    """Yield the number and the error of each file that is missing or of the wrong size, found by one listing."""
    base = version.uri
    directories = {layout.join(base, entry.path.rpartition("/")[0]) for entry in files}
    sizes = {info.uri: info.bytes for inside in directories for info in storage.list_files(inside)}
    for file, entry in enumerate(files):
        uri = layout.join(base, entry.path)
        if sizes.get(uri) == entry.bytes:
            continue
        if uri in sizes:
            problem = f"{uri}: bytes differ from its manifest: expected {entry.bytes}, found {sizes[uri]}"
            yield file, CorruptVersion(f"{problem}: {CURE}")
        else:
            yield file, missing_file(uri)


def missing_file(uri: str) -> CorruptVersion:
    """Return the error for a file that isn't there."""
    return CorruptVersion(f"{uri} is missing, but its manifest lists it: {CURE}")


def stored_column(version: Version, split: str, name: str) -> AnyArray:
    """Return the labels, weights or ids of all samples of a split, (n,), in the order of the files.

    Only this column is read, also from S3. It isn't compared with checksums.

    Raises:
        ConfigError: there is no such split, or it has no samples.
        CorruptVersion: a file is missing, or can't be read.
    """
    found, dtype = [], SampleFormat.of(version.definition).columns[name].dtype
    for entry in version.files(split):
        uri = layout.join(version.uri, entry.path)
        try:
            with storage.open_input(uri) as file:
                values = to_numpy(pq.read_table(file, columns=[name]), name)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise CorruptVersion(f"{uri}: its column {name!r} can't be read ({error}): {CURE}") from error
        if len(values) != entry.rows or values.dtype != dtype:
            what = f"{len(values)} {values.dtype} in {name!r} instead of {entry.rows} {dtype}"
            raise CorruptVersion(f"{uri}: {what}: {CURE}")
        found.append(values)
    return np.concatenate(found)


def refuse_misfits(versions: Sequence[Version]) -> None:
    """Check that the samples of versions can be in one batch, and mean the same.

    Raises:
        ConfigError: they differ in kind, shape, element type, names of the features, labels or classes.
    """
    first, *others = versions
    for other in others:
        for name, of in _MEANINGS.items():
            values = of(first.definition), of(other.definition)
            if values[0] == values[1]:
                continue
            here = name
            if all(isinstance(value, list) for value in values):  # hundreds of names, of which one differs
                pairs = enumerate(itertools.zip_longest(*values))
                number, values = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
                here = f"{name} {number}"
            raise ConfigError(
                f"{other.uri} doesn't fit {first.uri}: {here} is {values[1]!r} and {values[0]!r}; publish it anew with "
                "the same options of the training-delivery flow, or leave it out"
            )


_MEANINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "kind": lambda definition: definition["kind"],
    "shape": lambda definition: SampleFormat.of(definition).shape,
    "feature": lambda definition: [feature["name"] for feature in definition.get("features", ())],
    "encoding": lambda definition: SampleFormat.of(definition).encoding,
    "element type": lambda definition: SampleFormat.of(definition).dtype,
    "number of labels": lambda definition: SampleFormat.of(definition).labels,
    "kind of label": lambda definition: (definition["label"] or {}).get("kind"),
    "class": lambda definition: list((definition["label"] or {}).get("classes") or ()),
}
