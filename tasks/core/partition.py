"""Rows split by key, and packed for the way to another process. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from tasks.core.hashing import stable_hash


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows on their way: an Arrow stream, and the int64 columns that travel in a narrower type."""

    stream: npt.NDArray[np.uint8]
    narrowed: tuple[str, ...]


def bucket_of(keys: pa.Array | pa.ChunkedArray, buckets: int) -> npt.NDArray[np.uint16]:
    """Bucket of each key by its stable hash; `buckets` is at most 65,536."""
    return (stable_hash(keys) % np.uint64(buckets)).astype(np.uint16)


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
    # A stable sort of 16-bit integers is a radix sort: one pass, and the order of the rows stays.
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=buckets))
    ordered = frame[order]
    return [ordered.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def pack(frame: pl.DataFrame) -> Packed:
    """Rows as an Arrow stream in a numpy array, which Ray stores and maps without a copy.

    Whole numbers travel in the narrowest type that holds them, which takes a quarter off the volume for a tenth of
    the time that lz4 takes (on 1.25 million transactions: 36 to 26 bytes a row in 10 ms; lz4: 19 bytes in 90 ms).
    """
    narrowed = [column.shrink_dtype() for column in frame if column.dtype == pl.Int64]
    names = tuple(column.name for column in narrowed if column.dtype != pl.Int64)
    stream = frame.with_columns(narrowed).write_ipc_stream(
        None, compression="uncompressed", compat_level=pl.CompatLevel.newest()
    )
    return Packed(np.frombuffer(stream.getbuffer(), dtype=np.uint8), names)


def unpack(packed: Packed) -> pl.DataFrame:
    """The rows again: a view of the packed ones, but for the numbers that were narrowed."""
    frame = pl.from_arrow(pa.ipc.open_stream(pa.py_buffer(packed.stream)).read_all(), rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(pl.col(packed.narrowed).cast(pl.Int64)) if packed.narrowed else frame
