"""Samples as blocks, and blocks as files: writing the streaming-ready format.

A row of a file is a block of `block_size` samples. Its tensors are raw bytes, so that a reader maps the file into
memory and picks samples by their address; the tail of a file's last block is zeros. `batch_id` is the XXH3-128 of the
block's tensors in the schema's order: its name and its checksum.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from tasks.io.storage import ParquetStream, WrittenFile
from tasks.io.tensors import is_tensor, parquet_settings, tensor_array, tensor_field, tensor_spec, to_numpy

AnyArray = npt.NDArray[Any]

FEATURES, IMAGE, LABEL, SAMPLE_ID = "features", "image", "label", "sample_id"
SIZE, WIDTH, CHECKSUM = "batch_size", "feature_count", "batch_id"
DIMENSIONS = ("channel", "height", "width")
_SHAPE, _DTYPE = b"shape", b"dtype"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """Format of a block.

    Attributes:
        kind: 'table', or 'images', whose blocks are one image each and have no axis for it.
        shape: of a sample's values: (features,), or (3, height, width).
        label: element type of the labels; None without labels.
        block_size: samples of a block.
    """

    kind: Literal["table", "images"]
    shape: tuple[int, ...]
    label: Literal["int64", "float32"] | None
    block_size: int

    @property
    def values(self) -> str:
        """Name of the column of the samples' values."""
        return FEATURES if self.kind == "table" else IMAGE

    @property
    def dtype(self) -> str:
        """Element type of the samples' values."""
        return "float32" if self.kind == "table" else "uint8"

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's tensors."""
        label = np.dtype(self.label).itemsize if self.label else 0
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize + label + 8

    @property
    def schema(self) -> pa.Schema:
        """Schema of the data files."""
        axes = (self.block_size,) if self.kind == "table" else ()
        names = ("sample", "feature") if self.kind == "table" else DIMENSIONS
        fields = [tensor_field(self.values, (*axes, *self.shape), self.dtype, names)]
        if self.label is not None:
            fields.append(tensor_field(LABEL, axes, self.label))
        fields += [
            tensor_field(SAMPLE_ID, axes, "int64"),
            pa.field(SIZE, pa.int32(), nullable=False),
            pa.field(WIDTH, pa.int32(), nullable=False),
            pa.field(CHECKSUM, pa.string(), nullable=False),
        ]
        return pa.schema(fields)


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples: float32 or uint8 (n, *shape); int64 or float32 (n,), or None; int64 (n,)."""

    values: AnyArray
    labels: AnyArray | None
    ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: npt.NDArray[np.int64]) -> Samples:
        """Return a copy of some samples."""
        return Samples(self.values[index], None if self.labels is None else self.labels[index], self.ids[index])

    def to_arrow(self) -> pa.Table:
        """Return the samples as a table, a view where they are contiguous."""
        columns = {"values": self.values, "ids": self.ids} | ({} if self.labels is None else {"labels": self.labels})
        fields = [
            pa.field(
                name,
                pa.binary(int(np.prod(column.shape[1:])) * column.dtype.itemsize),
                metadata={_SHAPE: str(column.shape[1:]), _DTYPE: str(column.dtype)},
            )
            for name, column in columns.items()
        ]
        raw = [pa.py_buffer(np.ascontiguousarray(column)) for column in columns.values()]
        arrays = [
            pa.FixedSizeBinaryArray.from_buffers(field.type, len(self), [None, buffer])
            for field, buffer in zip(fields, raw, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Samples:
        """Return the samples of a table that `to_arrow` made, a view."""
        found = {field.name: _column(table[field.name], field) for field in table.schema}
        return cls(found["values"], found.get("labels"), found["ids"])


def _column(values: pa.ChunkedArray, field: pa.Field) -> AnyArray:
    shape = (len(values), *literal_eval(field.metadata[_SHAPE].decode()))
    dtype = np.dtype(field.metadata[_DTYPE].decode())
    if not len(values):
        return np.empty(shape, dtype)
    (array,) = values.chunks
    row = field.type.byte_width
    raw = np.frombuffer(array.buffers()[1], np.uint8, len(array) * row, array.offset * row)
    found: AnyArray = raw.view(dtype).reshape(shape)
    return found


def pick(parts: Sequence[Samples], index: npt.NDArray[np.int64]) -> Samples:
    """Return a copy of some samples of one or more parts; numbers run through all parts."""
    starts = np.cumsum([0, *(len(part) for part in parts)])
    owner = np.searchsorted(starts, index, side="right") - 1
    like = next(part for part in parts if len(part))
    values = np.empty((len(index), *like.values.shape[1:]), like.values.dtype)
    labels = None if like.labels is None else np.empty(len(index), like.labels.dtype)
    ids = np.empty(len(index), np.int64)
    for number in np.unique(owner).tolist():
        own = np.flatnonzero(owner == number)
        found = parts[number].take(index[own] - starts[number])
        values[own], ids[own] = found.values, found.ids
        if labels is not None:
            labels[own] = found.labels
    return Samples(values, labels, ids)


def block_table(samples: Samples, form: BlockFormat) -> pa.Table:
    """Return samples as whole blocks, the last one padded with zeros."""
    count = len(samples)
    blocks = -(-count // form.block_size)
    schema = form.schema
    tensors = {form.values: samples.values, LABEL: samples.labels, SAMPLE_ID: samples.ids}
    arrays: list[pa.Array] = []
    stored: list[AnyArray] = []
    for field in schema:
        if not is_tensor(field):
            continue
        column, spec = tensors[field.name], tensor_spec(field)
        assert column is not None, f"samples without {field.name}"
        whole = np.ascontiguousarray(column, spec.stored)
        if count < blocks * form.block_size:
            whole = np.zeros((blocks * form.block_size, *column.shape[1:]), spec.stored)
            whole[:count] = column
        stored.append(whole.reshape(blocks, -1))
        arrays.append(tensor_array(whole.reshape(blocks, *spec.shape)))
    sizes = np.full(blocks, form.block_size, np.int32)
    sizes[-1] = count - (blocks - 1) * form.block_size
    width = form.shape[0] if form.kind == "table" else 0
    arrays += [
        pa.array(sizes),
        pa.array(np.full(blocks, width, np.int32)),
        pa.array(_checksums(stored, blocks), pa.string()),
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def block_checksums(blocks: pa.Table) -> list[str]:
    """Return the checksum of each block, computed from its tensors; compare with the column `batch_id`."""
    tensors = [to_numpy(blocks, field.name) for field in blocks.schema if is_tensor(field)]
    return _checksums(tensors, blocks.num_rows)


def _checksums(tensors: Sequence[AnyArray], blocks: int) -> list[str]:
    """Return the XXH3-128 of each block's tensors, shape (blocks, ...) each, in the schema's order; hexadecimal."""
    hashers = [xxhash.xxh3_128() for _ in range(blocks)]
    for values in tensors:
        for block, hasher in zip(values, hashers, strict=True):
            hasher.update(np.ascontiguousarray(block).data)
    return [hasher.hexdigest() for hasher in hashers]


def write_samples(uri: str, parts: Sequence[Samples], order: npt.NDArray[np.int64], form: BlockFormat) -> WrittenFile:
    """Write one or more samples in an order, as one file, in the memory of a row group.

    Args:
        uri: Name of the file.
        parts: The samples; numbers run through all parts.
        order: Numbers of the samples to write, in this order.
        form: Format of a block.
    """
    schema = form.schema
    settings = parquet_settings(schema)
    step = settings["row_group_size"] * form.block_size
    with ParquetStream(uri, schema, **settings) as stream:
        for start in range(0, len(order), step):
            stream.write(block_table(pick(parts, order[start : start + step]), form))
    return stream.written
