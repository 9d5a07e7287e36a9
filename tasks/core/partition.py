"""Rows split by key, and packed for the way to another process. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from tasks.core.hashing import stable_hash

Packed = npt.NDArray[np.uint8]


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
    hashes = stable_hash(frame[key].to_arrow(compat_level=pl.CompatLevel.oldest()))
    bucket = (hashes % np.uint64(buckets)).astype(np.uint16)
    # A stable sort of 16-bit integers is a radix sort: one pass, and the order of the rows stays.
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=buckets))
    ordered = frame[order]
    return [ordered.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def pack(frame: pl.DataFrame) -> Packed:
    """Rows as an Arrow stream in a numpy array, which Ray stores and maps without a copy.

    Not compressed: lz4 took more time than it saved, also where the objects spill.
    """
    stream = frame.write_ipc_stream(None, compression="uncompressed", compat_level=pl.CompatLevel.newest())
    return np.frombuffer(stream.getbuffer(), dtype=np.uint8)


def unpack(packed: Packed) -> pl.DataFrame:
    """The rows again, a view of the packed ones."""
    frame = pl.from_arrow(pa.ipc.open_stream(pa.py_buffer(packed)).read_all(), rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame
