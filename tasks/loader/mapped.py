"""One Parquet file in memory, and the addresses of the raw values of its tensor columns.

`tasks.io.tensors.parquet_settings` writes tensor columns raw, each column chunk as one page without levels: its
values are contiguous and end where the column chunk ends. This is checked here, in the footer and
in the page's header, before any value is read by its address.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from tasks.io.errors import CorruptVersion
from tasks.io.tensors import TensorSpec, is_tensor, tensor_spec

CURE = "publish a new version from the same sources, or restore the file from a copy"
CHECKSUM = "batch_id"

_CHECKSUM_BYTES = 16
_HEADER_BYTES = 64  # more than the part of a page's header that is read
_DATA_PAGES = (0, 3)


@dataclass(frozen=True, slots=True)
class RawColumn:
    """Place of a tensor column's values.

    Attributes:
        spec: Shape and element type of a block's values.
        offsets: int64 (row groups,), start of each row group's values in the file.
    """

    spec: TensorSpec
    offsets: npt.NDArray[np.int64]


class MappedFile:
    """A memory-mapped file of blocks.

    Args:
        file: The open file; it may be closed afterwards.
        name: Name of the file in errors.

    Attributes:
        columns: Tensor columns by name, in the schema's order.
        starts: int64 (row groups + 1,), first block of each row group, and the end.
        address: Address of the file's first byte; valid as long as this object exists.

    Raises:
        CorruptVersion: it isn't a Parquet file, or its tensors aren't contiguous.

    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        status = os.fstat(file.fileno())
        self._inode, self._written = (status.st_dev, status.st_ino), (status.st_mtime_ns, status.st_ctime_ns)
        try:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
            self._parquet = pq.ParquetFile(pa.BufferReader(pa.py_buffer(self._map)))
        except (pa.ArrowInvalid, ValueError) as error:
            raise CorruptVersion(f"{name} can't be read as Parquet ({error}): {CURE}") from error
        self.address: int = self._bytes.ctypes.data
        footer = self._parquet.metadata
        rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        schema = self._parquet.schema_arrow
        self.columns = {
            field.name: self._raw_column(tensor_spec(field), position)
            for position, field in enumerate(schema)
            if is_tensor(field)
        }
        self._checksums: dict[int, bytes] = {}
        self._view = memoryview(self._map)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
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

    def is_intact(self, block: int) -> bool:
        """Return True if a block's tensors match the stored checksum.

        Raises:
            CorruptVersion: the checksums can't be read.
        """
        group = int(np.searchsorted(self.starts, block, side="right")) - 1
        row = block - int(self.starts[group])
        hasher = xxhash.xxh3_128()
        for column in self.columns.values():
            start = int(column.offsets[group]) + row * column.spec.width
            hasher.update(self._view[start : start + column.spec.width])
        expected = self._checksums_of(group)
        return hasher.digest() == expected[row * _CHECKSUM_BYTES : (row + 1) * _CHECKSUM_BYTES]

    def _checksums_of(self, group: int) -> bytes:
        """Return the checksums of a row group's blocks, 16 bytes each."""
        if group not in self._checksums:
            try:
                texts = self._parquet.read_row_group(group, columns=[CHECKSUM])[CHECKSUM].to_pylist()
                found = bytes.fromhex("".join(texts))
            except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
                raise CorruptVersion(f"{self.name}: its checksums can't be read ({error}): {CURE}") from error
            if len(found) != _CHECKSUM_BYTES * len(texts):
                raise CorruptVersion(f"{self.name}: {CHECKSUM!r} of row group {group} are no XXH3-128: {CURE}")
            self._checksums[group] = found
        return self._checksums[group]

    def _raw_column(self, spec: TensorSpec, position: int) -> RawColumn:
        footer, column = self._parquet.metadata, self._parquet.schema.column(position)
        if column.path != column.name or column.max_definition_level:
            raise CorruptVersion(f"{self.name}: column {column.path!r} may hold nulls, which tensors mustn't: {CURE}")
        offsets = np.empty(footer.num_row_groups, np.int64)
        for group in range(footer.num_row_groups):
            chunk = footer.row_group(group).column(position)
            size = footer.row_group(group).num_rows * spec.width
            end = chunk.data_page_offset + chunk.total_compressed_size
            offsets[group] = end - size
            header = bytes(self._bytes[chunk.data_page_offset : chunk.data_page_offset + _HEADER_BYTES])
            if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or _page_bytes(header) != size:
                raise CorruptVersion(
                    f"{self.name}: the values of column {column.name!r} don't lie one after the other in row group "
                    f"{group}; write the file with tasks.io.tensors.parquet_settings, and publish it anew"
                )
        return RawColumn(spec, offsets)


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
