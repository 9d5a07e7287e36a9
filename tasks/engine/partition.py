"""Frames: made of Arrow tables, split by key, and packed for another process. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from tasks.io.hashing import stable_hash

Frame: TypeAlias = pl.DataFrame | pa.Table

_POLARS, _NARROWED = b"polars", b"narrowed"
_ALIGNMENT = 8
"""Bytes: an Arrow stream is read in place only if it begins at a multiple of this."""


def bucket_of(keys: pa.Array | pa.ChunkedArray, buckets: int) -> npt.NDArray[np.uint16]:
    """Return the bucket of each key by its stable hash; `buckets` is at most 65,536."""
    return (stable_hash(keys) % np.uint64(buckets)).astype(np.uint16)


def frame_of(table: pa.Table, *, rechunk: bool = True) -> pl.DataFrame:
    """Return an Arrow table as a frame; without `rechunk`, as a view of it."""
    frame = pl.from_arrow(table, rechunk=rechunk)
    assert isinstance(frame, pl.DataFrame)
    return frame


def split_by_key(frame: pl.DataFrame, key: str, buckets: int) -> list[pl.DataFrame]:
    """Split rows by a stable hash of their key; rows keep their order within a bucket.

    Args:
        frame: Rows; the key column must be hashable by `stable_hash`.
        key: Column whose equal values go to the same bucket.
        buckets: Number of buckets, at most 65,536.

    Returns:
        One frame a bucket, some of them empty.
    """
    if buckets == 1:
        return [frame]
    bucket = bucket_of(frame[key].to_arrow(compat_level=pl.CompatLevel.oldest()), buckets)
    # A stable sort of 16-bit integers is a radix sort: one pass, and it keeps the order of the rows.
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=buckets))
    ordered = frame[order]
    return [ordered.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def pack(values: Sequence[Frame | bytes]) -> pa.LargeBinaryArray:
    """Pack frames for another process: each becomes an Arrow stream, all in one buffer.

    Whole numbers of a Polars frame travel in the narrowest type that holds them, which takes a quarter off the volume
    for a tenth of the time that lz4 takes (on 1.25 million transactions: 36 to 26 bytes a row in 10 ms; lz4: 19 bytes
    in 90 ms).

    Args:
        values: Frames of Polars or Arrow; bytes are taken unchanged, with zeros behind them.

    Returns:
        One value a frame. If the buffer is aligned, so is each value: `unpack` copies nothing.
    """
    tables = [value if isinstance(value, bytes) else _travelling(value) for value in values]
    ends = np.cumsum([0, *(_size(table) for table in tables)], dtype=np.int64)
    buffer = pa.allocate_buffer(int(ends[-1]))
    with pa.FixedSizeBufferWriter(buffer) as sink:
        for table, end in zip(tables, ends[1:].tolist(), strict=True):
            if isinstance(table, bytes):
                sink.write(table)
                sink.write(bytes(end - sink.tell()))
            else:
                _write(table, sink)
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(tables), [None, pa.py_buffer(ends), buffer])


def unpack(stream: pa.Buffer) -> Frame:
    """Return a packed frame: a view of the stream, except for numbers that were narrowed."""
    table = pa.ipc.open_stream(stream).read_all()
    metadata = table.schema.metadata or {}
    if _POLARS not in metadata:
        return table
    frame = frame_of(table, rechunk=False)
    names = [frame.columns[int(number)] for number in metadata[_NARROWED].split()]
    return frame.with_columns(pl.col(names).cast(pl.Int64)) if names else frame


def _travelling(frame: Frame) -> pa.Table:
    if isinstance(frame, pa.Table):
        return frame
    narrowed = [column.shrink_dtype() for column in frame if column.dtype == pl.Int64]
    names = {column.name for column in narrowed if column.dtype != pl.Int64}
    table = frame.with_columns(narrowed).to_arrow(compat_level=pl.CompatLevel.newest())
    numbers = " ".join(str(number) for number, name in enumerate(frame.columns) if name in names)
    return table.replace_schema_metadata({_POLARS: b"", _NARROWED: numbers.encode()})


def _size(value: pa.Table | bytes) -> int:
    if isinstance(value, bytes):
        return -(-len(value) // _ALIGNMENT) * _ALIGNMENT
    sink = pa.MockOutputStream()
    _write(value, sink)
    return int(sink.size())


def _write(table: pa.Table, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
