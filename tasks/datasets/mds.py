"""MosaicML Streaming's format, MDS: its directories are read as tables, and streaming-ready copies are written as it.

A directory has an `index.json` and shards. A shard, little-endian:

    uint32 samples · uint32 offset of each sample, and of the end · JSON, which isn't needed · samples
    sample: uint32 size of each value of no fixed size · values, in the order of the index's columns

Values are never unpickled. https://docs.mosaicml.com/projects/streaming describes the encodings of values.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, SourceError
from tasks.loader.samples import SampleFormat
from tasks.loader.stream import TrainingStream
from tasks.loader.version_files import open_version
from tasks.store import layout

INDEX = "index.json"
SHARD_BYTES = 64 * 2**20
_FORMAT, _VERSION = "mds", 2
_BATCH_BYTES = 16 * 2**20
_CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}
_NUMBERS = {"int": "int64"} | {
    name: name
    for name in (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        "float16",
        "float32",
        "float64",
    )
}
_HASHES = xxhash.algorithms_available | {name for name in hashlib.algorithms_available if "shake" not in name}
_CHECKSUM = "xxh128"
_GATHERED = 64

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


class _File(BaseModel):
    basename: str
    bytes: int = Field(ge=0)
    hashes: dict[str, str] = Field(default_factory=dict)


class Shard(BaseModel):
    """One shard, as the index describes it."""

    format: Literal["mds"]
    version: Literal[2]
    column_names: list[str] = Field(min_length=1)
    column_encodings: list[str]
    column_sizes: list[int | None]
    compression: str | None = None
    raw_data: _File
    zip_data: _File | None = None
    samples: int = Field(ge=0)


class _Index(BaseModel):
    version: Literal[2]
    shards: list[Shard]


def read_index(uri: str) -> list[Shard]:
    """Read the index of an MDS directory, local or on S3.

    Raises:
        SourceError: there is none, it is no index of MDS, or a column or a compression can't be read.
    """
    place = layout.join(storage.normalise(uri), INDEX)
    try:
        index = _Index.model_validate_json(storage.read_bytes(place))
    except FileNotFoundError as error:
        raise SourceError(f"{uri!r} is no MDS directory: it has no {INDEX}; name the one with the shards") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise SourceError(
            f"{place} is no index of MDS version {_VERSION} ({where}: {first['msg']}); write the dataset anew with "
            "MosaicML's MDSWriter"
        ) from error
    for shard in index.shards:
        _check(place, shard)
    if not any(shard.samples for shard in index.shards):
        raise SourceError(f"{place} has no sample")
    return index.shards


def _check(place: str, shard: Shard) -> None:
    lengths = {len(shard.column_names), len(shard.column_encodings), len(shard.column_sizes)}
    if len(lengths) != 1:
        raise SourceError(
            f"{place}: a shard's columns, encodings and sizes are of different numbers: {sorted(lengths)}"
        )
    for name, encoding in zip(shard.column_names, shard.column_encodings, strict=True):
        if _reader(encoding) is None:
            raise SourceError(
                f"{place}: column '{name}' is encoded as '{encoding}', which can't be read here: numbers, text, bytes, "
                "JSON, images (jpeg, png, pil) and arrays of one shape and type can; write it as one of these"
            )
    for file in filter(None, (shard.raw_data, shard.zip_data)):
        if fault := layout.escape_of(file.basename):
            raise SourceError(f"{place}: shard {file.basename!r} {fault}: shards are in the index's directory")
    if shard.zip_data is not None and _codec(shard) is None:
        raise SourceError(
            f"{place}: compression '{shard.compression}' can't be read here: none, {', '.join(_CODECS)} can"
        )


def _codec(shard: Shard) -> str | None:
    return _CODECS.get((shard.compression or "").partition(":")[0])


def read_shard(uri: str, shard: Shard) -> pa.Table:
    """Read a shard as a table: images are bytes of their files, arrays are Arrow's fixed-shape tensors, JSON is text.

    Args:
        uri: The directory.
        shard: One of its shards.

    Raises:
        CorruptVersion: its file is missing, or isn't the one of the index.
    """
    file = shard.zip_data or shard.raw_data
    place = layout.join(storage.normalise(uri), file.basename)
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError as error:
        raise CorruptVersion(f"{place} is missing, and the index names it: copy the directory anew") from error
    _compare(place, file, data)
    if shard.zip_data is not None:
        try:
            data = pa.CompressedInputStream(pa.BufferReader(data), _codec(shard)).read()
        except (OSError, pa.ArrowException) as error:
            raise CorruptVersion(f"{place} can't be decompressed ({error}): copy the directory anew") from error
        _compare(f"{place}, decompressed,", shard.raw_data, data)
    try:
        return _table(np.frombuffer(data, np.uint8), shard)
    except (ValueError, IndexError, pa.ArrowException, OSError) as error:
        raise CorruptVersion(f"{place} can't be read as a shard of MDS ({error}): write it anew") from error


def _compare(place: str, file: _File, data: bytes) -> None:
    if len(data) != file.bytes:
        raise CorruptVersion(f"{place} has {len(data)} bytes, the index says {file.bytes}: copy the directory anew")
    for method, wanted in file.hashes.items():
        if method in _HASHES and _hash(method, data) != wanted:
            raise CorruptVersion(f"{place} has another {method} than the index says: copy the directory anew")


def _hash(method: str, data: bytes) -> str:
    if method in xxhash.algorithms_available:
        return str(getattr(xxhash, f"{method}_hexdigest")(data))
    return hashlib.new(method, data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class _Values:
    """Values of a column: the bytes of the shard, and where each begins and how long it is."""

    data: UInt8Array
    starts: Int64Array
    sizes: Int64Array

    def one_by_one(self) -> Iterator[bytes]:
        for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True):
            yield self.data[start : start + size].tobytes()

    def binary(self) -> pa.Array:
        return pa.array(list(self.one_by_one()), pa.large_binary())

    def text(self) -> pa.Array:
        return self.binary().cast(pa.large_string())

    def numbers(self, dtype: str, shape: tuple[int, ...] = ()) -> npt.NDArray[Any]:
        width = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if len(self.sizes) and (self.sizes != width).any():
            raise ValueError(f"a value of {self.sizes.max()} bytes, where {width} are right")
        if width <= _GATHERED:  # an index takes eight times the memory of the bytes that it picks
            found = self.data[self.starts[:, None] + np.arange(width)]
        else:
            found = np.empty((len(self.starts), width), np.uint8)
            for row, start in enumerate(self.starts.tolist()):
                found[row] = self.data[start : start + width]
        values: npt.NDArray[Any] = found.view(np.dtype(dtype).newbyteorder("<")).reshape(-1, *shape)
        return values


def _table(data: UInt8Array, shard: Shard) -> pa.Table:
    count = int(data[:4].view("<u4")[0])
    if count != shard.samples:
        raise ValueError(f"it has {count} samples, the index says {shard.samples}")
    starts = data[4 : 4 * (count + 2)].view("<u4").astype(np.int64)
    if len(starts) != count + 1 or starts[-1] != len(data) or (np.diff(starts) < 0).any():
        raise ValueError("its offsets don't lie in it")
    loose = [number for number, size in enumerate(shard.column_sizes) if not size]
    place, columns = starts[:-1] + 4 * len(loose), []
    for number, (encoding, fixed) in enumerate(zip(shard.column_encodings, shard.column_sizes, strict=True)):
        if fixed:
            sizes = np.full(count, fixed, np.int64)
        else:
            heads = _Values(data, starts[:-1] + 4 * loose.index(number), np.full(count, 4, np.int64))
            sizes = heads.numbers("uint32").astype(np.int64)
        if (place + sizes > starts[1:]).any():
            raise ValueError(f"a value of column '{shard.column_names[number]}' is longer than its sample")
        read = _reader(encoding)
        assert read is not None, "encodings are checked with the index"
        columns.append(read(_Values(data, place, sizes)))
        place = place + sizes
    return pa.table(columns, names=shard.column_names)


def _reader(encoding: str) -> Callable[[_Values], pa.Array] | None:
    """Return the function that reads values of an encoding; None if there is none."""
    name, _, options = encoding.partition(":")
    if name in _NUMBERS and not options:
        return lambda values: pa.array(values.numbers(_NUMBERS[name]).ravel())
    if name == "ndarray":
        dtype, _, shape = options.partition(":")
        if dtype not in _NUMBERS or not shape.replace(",", "").isdecimal():
            return None
        sides = tuple(map(int, shape.strip(",").split(",")))
        return lambda values: _tensors(values.numbers(dtype, sides))
    return _READERS.get(encoding)


def _tensors(values: npt.NDArray[Any]) -> pa.Array:
    """Return arrays as Arrow's fixed-shape tensors, also none."""
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), values.shape[1:])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=kind.storage_type)
    return pa.ExtensionArray.from_storage(kind, lists)


def _png(raw: bytes) -> bytes:
    """Return a raw picture of Pillow's as a PNG, without loss: width, height and length of the mode, mode, pixels."""
    width, height, length = np.frombuffer(raw[:12], "<u4").tolist()
    mode = raw[12 : 12 + length].decode()
    sink = io.BytesIO()
    Image.frombytes(mode, (width, height), raw[12 + length :]).save(sink, "png", compress_level=1)
    return sink.getvalue()


_READERS: Mapping[str, Callable[[_Values], pa.Array]] = {
    **dict.fromkeys(("bytes", "jpeg", "png"), _Values.binary),
    **dict.fromkeys(("str", "json", "str_decimal"), _Values.text),
    "str_int": lambda values: values.text().cast(pa.int64()),
    "str_float": lambda values: values.text().cast(pa.float64()),
    "pil": lambda values: pa.array([_png(raw) for raw in values.one_by_one()], pa.large_binary()),
}


def export_mds(
    uri: str,
    out: str,
    *,
    split: str = "train",
    compression: Literal["zstd"] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a split of a streaming-ready version as an MDS directory, which MosaicML's StreamingDataset reads.

    The samples are as stored, and in that order: 'features' or 'image' as an array, 'label', 'sample_id'. Each batch is
    compared with its checksum. The index is written last.

    Args:
        uri: Directory of a version (…/v3), or of a dataset for its latest version.
        out: Directory to write, local or s3://bucket/prefix; it must not have an index yet.
        split: 'train', 'validation' or 'test'.
        compression: 'zstd', or None.
        shard_bytes: Largest size of a shard, bytes.

    Returns:
        Number of samples.

    Raises:
        ConfigError: it isn't a streaming-ready version, there is no such split, or `out` has an index.
        CorruptVersion: a file of the version is missing or damaged.
    """
    place = layout.join(storage.normalise(out), INDEX)
    if storage.exists(place):
        raise ConfigError(f"{out!r} has an {INDEX} already: name a directory without one, or remove it first")
    form = SampleFormat.of(open_version(uri).definition)
    if form.kind == "sequences":
        raise ConfigError(f"{uri} has sequences of any length, and only samples of one size can be exported as MDS")
    width = form.delivered_bytes
    limit = max(1, shard_bytes // (width + 4))
    batch = max(1, min(limit, _BATCH_BYTES // width))
    shards: list[dict[str, Any]] = []
    kept: list[dict[str, npt.NDArray[Any]]] = []
    total = 0
    with TrainingStream(uri, batch_size=batch, split=split, shuffle=False, as_numpy=True, normalise=False) as stream:
        for delivered in stream:
            mask = delivered["mask"]
            kept.append({name: values[mask] for name, values in sorted(delivered.items()) if name != "mask"})
            total += int(mask.sum())
            while sum(len(part["sample_id"]) for part in kept) >= limit:
                joined = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
                shards.append(_write(out, len(shards), {name: v[:limit] for name, v in joined.items()}, compression))
                kept = [{name: values[limit:] for name, values in joined.items()}]
    left = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
    if len(left["sample_id"]):
        shards.append(_write(out, len(shards), left, compression))
    storage.write_bytes(place, json.dumps({"version": _VERSION, "shards": shards}, sort_keys=True).encode())
    return total


def _write(
    out: str, number: int, samples: Mapping[str, npt.NDArray[Any]], compression: Literal["zstd"] | None
) -> dict[str, Any]:
    """Write a shard; return its entry in the index. All values are of a fixed size."""
    names, count = sorted(samples), len(samples["sample_id"])
    values = {name: np.ascontiguousarray(samples[name], samples[name].dtype.newbyteorder("<")) for name in names}
    rows = [values[name].reshape(count, -1).view(np.uint8) for name in names]
    stated: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "column_names": names,
        "column_encodings": [_encoding(values[name]) for name in names],
        "column_sizes": [row.shape[1] for row in rows],
        "compression": compression,
        "hashes": [_CHECKSUM],
        "size_limit": None,
    }
    described = json.dumps(stated, sort_keys=True).encode()
    width = sum(row.shape[1] for row in rows)
    first = 4 + 4 * (count + 1) + len(described)
    offsets = (first + width * np.arange(count + 1)).astype("<u4")
    data = np.uint32(count).astype("<u4").tobytes() + offsets.tobytes() + described + np.hstack(rows).tobytes()
    base = f"shard.{number:05d}.{_FORMAT}"
    entry = stated | {"samples": count, "raw_data": _stated(base, data), "zip_data": None}
    if compression is not None:
        base, data = f"{base}.{compression}", pa.compress(data, codec=compression, asbytes=True)
        entry["zip_data"] = _stated(base, data)
    storage.write_bytes(layout.join(storage.normalise(out), base), data)
    return entry


def _encoding(values: npt.NDArray[Any]) -> str:
    if values.ndim == 1:
        return values.dtype.name
    return f"ndarray:{values.dtype.name}:{','.join(map(str, values.shape[1:]))}"


def _stated(base: str, data: bytes) -> dict[str, Any]:
    return {"basename": base, "bytes": len(data), "hashes": {_CHECKSUM: _hash(_CHECKSUM, data)}}
