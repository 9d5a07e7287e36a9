"""Tensors of one shape as a column: raw bytes in Parquet, arrays without a copy in numpy and PyTorch.

A tensor column is an Arrow `fixed_size_binary` column: each value holds a tensor's elements in C order, little-endian.
The field's metadata describes them, under the key `tensor`:

    {"shape": [3, 224, 224], "dtype": "uint8", "byteorder": "little", "dimensions": ["channel", "height", "width"]}

Single numbers need none of this: a plain column of them, without nulls, is read as tensors of shape ().

Vectors of any length are a `large_binary` column in the same way, of shape [null]; here it is (-1,). Encoded pictures
are a binary column with the key `encoded_image`, which has their encoding, and the shape that they are decoded to.

Arrow's fixed-shape tensors, and Ray Data's, are lists in Parquet, which has no integer below 32 bits: an image of
224 × 224 × 3 bytes takes 602 KB in a file instead of 151 KB. Libraries without tensors (pandas, Polars, DuckDB) read
binary values. For Ray Data and others there is `as_fixed_shape_tensors`.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from tasks.io.errors import InputError

if TYPE_CHECKING:
    import torch

AnyArray = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]
UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

TENSOR, ENCODED = b"tensor", b"encoded_image"
ANY_LENGTH = (-1,)
"""Shape of vectors of any length."""
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = ("bool", *_INTEGERS, "float16", "float32", "float64")
_MAX_WIDTH = 2**31 - 1  # Arrow's limit for a fixed_size_binary

# A row group is one page, and is read whole. On 384 variants of photographs (224 × 224 × 3, uint8), in ms of CPU an
# image to write and to read, by rows in a group: 16 rows 0.050 and 0.040, 32 rows 0.055 and 0.028, 64 rows 0.054 and
# 0.018, 128 rows 0.057 and 0.014, 256 rows 0.051 and 0.018. Within 32 MiB that is 128 of these images.
_GROUP_BYTES = 32 << 20
_GROUP_ROWS = 1 << 20
# Later versions of pyarrow end a page after 20,000 rows; earlier ones have neither that limit nor an option for it.
_PAGES_END_BY_ROWS = "max_rows_per_page" in inspect.signature(pq.write_table).parameters


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and element type of a column's tensors."""

    shape: tuple[int, ...]  # (-1,) for vectors of any length
    dtype: str  # numpy's name, one of DTYPES
    dimensions: tuple[str, ...] = ()  # a name for each dimension, or none at all

    @property
    def variable(self) -> bool:
        """True for vectors of any length."""
        return self.shape == ANY_LENGTH

    @property
    def size(self) -> int:
        """Number of elements; 1 for vectors of any length."""
        return 1 if self.variable else math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one tensor; of an element of vectors of any length."""
        return self.size * self.stored.itemsize

    @property
    def stored(self) -> np.dtype[Any]:
        """Stored element type, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")


def tensor_field(
    name: str, shape: Iterable[int], dtype: npt.DTypeLike, dimensions: Iterable[str] = (), nullable: bool = False
) -> pa.Field:
    """Return the field of a tensor column.

    Args:
        name: Column name.
        shape: Length of each dimension, at least 1; () for single numbers, (-1,) for vectors of any length, even 0.
        dtype: Booleans (a byte each), integers of 8 to 64 bits, or floats of 16 to 64 bits; stored little-endian.
        dimensions: Name of each dimension, such as 'channel', 'height', 'width'.
        nullable: Whether values may be missing. If not, a page of a Parquet file holds nothing but the tensors.

    Raises:
        InputError: another element type, a dimension below 1, tensors of 2 GiB or more, or the number of names differs
            from that of dimensions.
    """
    spec = TensorSpec(tuple(int(length) for length in shape), _dtype_name(dtype), tuple(dimensions))
    if not spec.variable and any(length < 1 for length in spec.shape):
        raise InputError(f"column {name!r}: shape {spec.shape} is empty; every dimension must be at least 1")
    if spec.width > _MAX_WIDTH:
        raise InputError(
            f"column {name!r}: a tensor of shape {spec.shape} of {spec.dtype} takes {spec.width:,} bytes, and Arrow "
            f"holds at most {_MAX_WIDTH:,} in a value; split it"
        )
    if spec.dimensions and len(spec.dimensions) != len(spec.shape):
        raise InputError(f"column {name!r}: {len(spec.dimensions)} names for {len(spec.shape)} dimensions; name each")
    stated: list[int | None] = [None] if spec.variable else [*spec.shape]
    described = {"shape": stated, "dtype": spec.dtype, "byteorder": "little", "dimensions": spec.dimensions}
    text = json.dumps(described, separators=(",", ":")).encode()
    kind = pa.large_binary() if spec.variable else pa.binary(spec.width)
    return pa.field(name, kind, nullable=nullable, metadata={TENSOR: text})


def tensor_array(values: AnyArray) -> pa.FixedSizeBinaryArray:
    """Return tensors as a column, over the same memory if that is C-contiguous and little-endian, else copied.

    Args:
        values: Shape (n, *shape). Don't write to it while the column is in use.

    Raises:
        InputError: no leading dimension, or as `tensor_field`.
    """
    if not values.ndim:
        raise InputError("a single number is no column of tensors; give an array of shape (n, …)")
    field = tensor_field("values", values.shape[1:], values.dtype)
    stored = np.ascontiguousarray(values, dtype=tensor_spec(field).stored)
    return pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, pa.py_buffer(stored)])


def ragged_array(values: AnyArray, offsets: Int64Array) -> pa.LargeBinaryArray:
    """Return vectors of any length as a column, over the same memory if that is C-contiguous and little-endian.

    Args:
        values: Elements of all vectors, one after the other, shape (m,).
        offsets: Start of each vector's elements, and the end, shape (n + 1,).
    """
    spec = TensorSpec(ANY_LENGTH, _dtype_name(values.dtype))
    stored = np.ascontiguousarray(values, dtype=spec.stored)
    bounds = np.ascontiguousarray(offsets * spec.width, dtype="<i8")
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(stored)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def is_tensor(field: pa.Field) -> bool:
    """Return True if a field was made by `tensor_field`."""
    kind = field.type
    return (pt.is_fixed_size_binary(kind) or pt.is_large_binary(kind)) and TENSOR in (field.metadata or {})


def tensor_spec(field: pa.Field) -> TensorSpec:
    """Return the shape and element type of a column of tensors, or of plain numbers.

    Raises:
        InputError: it isn't one, or its metadata can't be read or doesn't fit its width.
    """
    if pt.is_integer(field.type) or pt.is_floating(field.type):
        return TensorSpec((), field.type.to_pandas_dtype().__name__)
    if not is_tensor(field):
        raise InputError(
            f"column {field.name!r} ({field.type}) is no column of tensors or numbers: tensors are fixed_size_binary "
            f"and have {TENSOR.decode()!r} in the field's metadata; if it was lost on the way, take the schema of the "
            "file"
        )
    text = field.metadata[TENSOR]
    try:
        described = json.loads(text)
        names = tuple(map(str, described.get("dimensions", ())))
        shape = ANY_LENGTH if described["shape"] == [None] else tuple(map(int, described["shape"]))
        spec = TensorSpec(shape, _dtype_name(described["dtype"]), names)
        order = described.get("byteorder", "little")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"column {field.name!r}: {text!r} doesn't describe a tensor; write the column anew") from error
    if order != "little":
        raise InputError(f"column {field.name!r}: byte order {order!r} is unknown here; write it little-endian")
    if spec.variable != pt.is_large_binary(field.type):
        raise InputError(
            f"column {field.name!r}: shape {described['shape']} doesn't fit values of {field.type}; the metadata "
            "belongs to another column"
        )
    if not spec.variable and spec.width != field.type.byte_width:
        raise InputError(
            f"column {field.name!r}: tensors of shape {spec.shape} of {spec.dtype} take {spec.width:,} bytes, but its "
            f"values have {field.type.byte_width:,}; the metadata belongs to another column"
        )
    return spec


def encoded_field(name: str, encoding: str, shape: Iterable[int], dimensions: Iterable[str]) -> pa.Field:
    """Return the field of a column of encoded uint8 pictures, of the shape that they have when they are decoded."""
    described = {"encoding": encoding, "shape": [*shape], "dtype": "uint8", "dimensions": [*dimensions]}
    text = json.dumps(described, separators=(",", ":")).encode()
    return pa.field(name, pa.binary(), nullable=False, metadata={ENCODED: text})


def encoded_spec(field: pa.Field) -> tuple[str, TensorSpec] | None:
    """Return the encoding of a column made by `encoded_field`, and its decoded pictures; None for other columns."""
    text = (field.metadata or {}).get(ENCODED)
    if text is None:
        return None
    described = json.loads(text)
    return str(described["encoding"]), TensorSpec(tuple(described["shape"]), described["dtype"])


def to_numpy(rows: pa.Table | pa.RecordBatch, column: str) -> AnyArray:
    """Return the tensors, or plain numbers, of a column, shape (n, *shape), read-only.

    One chunk gives a view of Arrow's memory; several are copied together once.

    Raises:
        InputError: there is no such column, it holds no tensors or vectors of any length, or a null.
    """
    field = _field(rows.schema, column)
    spec = tensor_spec(field)
    if spec.variable:
        raise InputError(f"column {column!r} holds vectors of any length, which are no array: take to_ragged")
    parts = [_view(chunk, spec, column) for chunk in _chunks(rows.column(column)) if len(chunk)]
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate(parts) if parts else np.empty((0, *spec.shape), spec.stored)
    joined.flags.writeable = False
    return joined


def to_ragged(rows: pa.Table | pa.RecordBatch, column: str) -> tuple[AnyArray, Int64Array]:
    """Return the vectors of any length of a column: all elements, (m,), read-only, and where each starts, (n + 1,).

    Raises:
        InputError: there is no such column, it holds no such vectors, a null, or bytes that are no whole elements.
    """
    field = _field(rows.schema, column)
    spec = tensor_spec(field)
    if not spec.variable:
        raise InputError(f"column {column!r} holds {spec.dtype} of shape {spec.shape}, no vectors of any length")
    chunks = [chunk for chunk in _chunks(rows.column(column)) if len(chunk)]
    values: pa.LargeBinaryArray = pa.concat_arrays(chunks) if chunks else pa.array([], field.type)
    _refuse_nulls(values, column)
    bounds = np.frombuffer(values.buffers()[1], np.int64, len(values) + 1, values.offset * 8)
    data = np.frombuffer(values.buffers()[2] or b"", np.uint8)[bounds[0] : bounds[-1]]
    bounds = bounds - bounds[0]
    if (odd := bounds % spec.width).any():
        first = int(np.flatnonzero(odd)[0]) - 1
        raise InputError(f"column {column!r}: the value in row {first:,} isn't whole {spec.dtype}; write it anew")
    return data.view(spec.stored), bounds // spec.width


def to_torch(rows: pa.Table | pa.RecordBatch, column: str) -> torch.Tensor:
    """Return the tensors of a column as a CPU tensor of PyTorch, shape (n, *shape), over the memory of `to_numpy`.

    Arrow's memory is shared and never changes, but PyTorch has no read-only tensors: don't write to it in place
    (`x.div_(255)`); move it to a GPU, or compute something new (`x / 255`).

    Raises:
        InputError: as `to_numpy`.
    """
    import torch

    values = to_numpy(rows, column)
    # DLPack, as torch.from_numpy warns of every read-only array. Numbers must lie at multiples of their size.
    native = values if values.dtype.isnative and values.flags.aligned else values.astype(values.dtype.newbyteorder("="))
    return torch.utils.dlpack.from_dlpack(native)


def as_fixed_shape_tensors(table: pa.Table) -> pa.Table:
    """Return the table with its tensor columns as Arrow's fixed-shape tensors, over the same memory.

    Ray Data hands these out as arrays of shape (n, *shape):

        ray.data.read_parquet(files).map_batches(as_fixed_shape_tensors, batch_format="pyarrow")

    Booleans become uint8, as Arrow's have a bit each. Other columns are unchanged.

    Raises:
        InputError: a tensor column holds a null.
    """
    for position, field in enumerate(table.schema):
        if not is_tensor(field) or (spec := tensor_spec(field)).variable:
            continue
        element = pa.uint8() if spec.dtype == "bool" else pa.from_numpy_dtype(np.dtype(spec.dtype))
        kind = pa.fixed_shape_tensor(element, spec.shape, dim_names=spec.dimensions or None)
        chunks = [_extension(chunk, spec, kind, field.name) for chunk in _chunks(table.column(position))]
        others = {key: value for key, value in field.metadata.items() if key != TENSOR}
        named = pa.field(field.name, kind, nullable=field.nullable, metadata=others or None)
        table = table.set_column(position, named, pa.chunked_array(chunks, kind))
    return table


def parquet_settings(schema: pa.Schema, value_bytes: int = 32 << 10, batch_size: int | None = None) -> dict[str, Any]:
    """Return options of `pyarrow.parquet.write_table` for files that consist mainly of tensors or encoded images.

    - Binary columns: no dictionary (it would overflow), no compression and no statistics. Per image of
      224 × 224 × 3 (KB, ms of CPU to write, to read): raw 151, 0.05, 0.02; lz4 124, 0.21, 0.05; zstd 113, 0.32, 0.17.
      Raw rows can also be mapped into memory and picked one by one. Statistics of images have no meaning.
    - Other columns: dictionary, zstd and statistics, as in every file of this project.
    - Row groups of up to 32 MiB, a power of two of batches, so that files can be read in pieces; each column chunk is
      one page. So the tensors of a group lie in the file one after the other, and end where its column chunk ends.

    Args:
        schema: Columns of the file.
        value_bytes: Usual size of a binary value of no fixed size, such as a JPEG.
        batch_size: Rows of a batch of samples, whose plain numbers are stored like tensors; None for other files.

    Raises:
        InputError: a batch is too large for a page.
    """
    payload = {field.name for field in schema if batch_size or _is_binary(field.type)}
    batch_size = batch_size or 1
    widths = [
        value_bytes if pt.is_binary(field.type) or pt.is_large_binary(field.type) else field.type.byte_width
        for field in schema
        if field.name in payload
    ]
    row_bytes = sum(widths)
    others = [path for path in _leaves(schema) if path not in payload]
    limit = min(_GROUP_BYTES // max(row_bytes, 1), _GROUP_ROWS)
    rows = batch_size << max((limit // batch_size).bit_length() - 1, 0)
    if rows * max(widths, default=0) > _MAX_WIDTH:
        raise InputError(
            f"batch_size = {batch_size:,}: a batch of {max(widths):,} bytes a row is more than a page of Parquet holds "
            f"({_MAX_WIDTH:,}); use at most {_MAX_WIDTH // max(widths):,}"
        )
    return {
        "compression": dict.fromkeys(others, "zstd") or "none",
        "use_dictionary": others or False,
        "write_statistics": others or False,
        "row_group_size": rows,
        "data_page_size": max(_GROUP_BYTES, rows * row_bytes),
        # Number of rows between checks of a page's size: encoded images larger than expected still end a page in time.
        "write_batch_size": min(max(rows // 64, 1), 1024),
        **({"max_rows_per_page": rows} if _PAGES_END_BY_ROWS else {}),
    }


def _dtype_name(dtype: npt.DTypeLike) -> str:
    name = np.dtype(dtype).name
    if name not in DTYPES:
        raise InputError(f"tensors of {name} can't be stored; convert them to one of {', '.join(DTYPES)}")
    return name


def _field(schema: pa.Schema, column: str) -> pa.Field:
    found = schema.get_all_field_indices(column)
    if len(found) != 1:
        problem = f"{len(found)} columns are named" if found else "there is no column"
        raise InputError(f"{problem} {column!r}: the table has {', '.join(schema.names) or 'none'}")
    return schema.field(found[0])


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return list(column.chunks) if isinstance(column, pa.ChunkedArray) else [column]


def _payload(chunk: pa.Array, spec: TensorSpec, column: str) -> pa.Buffer:
    """Return the bytes of exactly these tensors, read-only as every slice of a buffer is."""
    _refuse_nulls(chunk, column)
    return chunk.buffers()[1].slice(chunk.offset * spec.width, len(chunk) * spec.width)


def _refuse_nulls(chunk: pa.Array, column: str) -> None:
    if chunk.null_count:
        first = chunk.is_null().index(True).as_py()
        raise InputError(
            f"column {column!r} holds {chunk.null_count:,} null (the first in row {first:,} of its chunk), and a "
            "tensor can't be missing; leave these rows out"
        )


def _view(chunk: pa.Array, spec: TensorSpec, column: str) -> AnyArray:
    return np.frombuffer(_payload(chunk, spec, column), dtype=spec.stored).reshape(len(chunk), *spec.shape)


def _extension(chunk: pa.Array, spec: TensorSpec, kind: pa.DataType, column: str) -> pa.Array:
    element = kind.value_type
    payload = _payload(chunk, spec, column)
    if sys.byteorder == "big":
        payload = pa.py_buffer(np.frombuffer(payload, spec.stored).astype(spec.dtype))
    values = pa.Array.from_buffers(element, len(chunk) * spec.size, [None, payload])
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values, type=kind.storage_type))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pt.is_fixed_size_binary(kind) or pt.is_binary(kind) or pt.is_large_binary(kind))


def _leaves(schema: pa.Schema) -> list[str]:
    """Return Parquet's column names, such as 'issues.list.element' for a list: options must use these."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    written = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [written.column(index).path for index in range(len(written))]
