"""A small writer of streaming-ready versions, for the tests of what reads them."""

from __future__ import annotations

import datetime as dt
import itertools
import struct
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
import xxhash

from tasks.io import storage
from tasks.io.hashing import stable_hash
from tasks.io.storage import ParquetStream
from tasks.io.tensors import parquet_settings, ragged_array, tensor_array, tensor_field
from tasks.store import versions
from tasks.store.layout import join, split_directory
from tasks.store.manifest import ColumnSpec, GateResult, Manifest, RowBalance, RunRecord

DATASET = "training-datasets/streaming-ready/toys"
FEATURES = 3
SHAPE = (3, 4, 5)

Columns = dict[str, npt.NDArray[Any]]


def table_samples(count: int, seed: int = 0, features: int = FEATURES) -> Columns:
    """Rows of a table with two classes."""
    draw = np.random.default_rng(seed)
    return {
        "features": draw.normal(5, 3, (count, features)).astype(np.float32),
        "label": draw.integers(0, 2, count),
        "sample_id": _ids(count, seed),
    }


def image_samples(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Columns:
    """Images of noise with four classes."""
    draw = np.random.default_rng(seed)
    return {
        "image": draw.integers(0, 256, (count, *shape), np.uint8),
        "label": draw.integers(0, 4, count),
        "sample_id": _ids(count, seed),
    }


def sequence_samples(
    count: int, seed: int = 0, longest: int = 20, dtype: str = "uint8", lengths: Sequence[int] | None = None
) -> Columns:
    """Sequences of numbers, of given or of drawn lengths, some of them 0, with two classes."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(0, longest + 1, count) if lengths is None else np.array(lengths, np.int64)
    values = np.empty(count, object)
    for number, size in enumerate(sizes.tolist()):
        values[number] = draw.integers(0, 256, size).astype(dtype)
    return {
        "sequence": values,
        "length": sizes,
        "label": draw.integers(0, 2, count),
        "sample_id": _ids(count, seed),
    }


def jpegs(samples: Columns, quality: int = 95) -> Columns:
    """Images as JPEGs, with their lengths beside them."""
    values = np.empty(len(samples["image"]), object)
    for number, image in enumerate(samples["image"]):
        pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
        values[number] = np.frombuffer(simplejpeg.encode_jpeg(pixels, quality, "RGB", "444"), np.uint8)
    return encoded(samples, values)


def encoded(samples: Columns, values: npt.NDArray[Any]) -> Columns:
    """Samples with these bytes as their images."""
    lengths = np.array([len(value) for value in values])
    others = {name: column for name, column in samples.items() if name not in ("image", "length")}
    return {"image": values, "length": lengths, **others}


def decoded(samples: Columns) -> Columns:
    """Images of pixels, of JPEGs."""
    images = np.stack([simplejpeg.decode_jpeg(value, "RGB").transpose(2, 0, 1) for value in samples["image"]])
    return {"image": images} | {name: values for name, values in samples.items() if name not in ("image", "length")}


def _ids(count: int, seed: int) -> npt.NDArray[np.int64]:
    return stable_hash(pa.array(range(count)), seed).view(np.int64)


def rows_of(samples: Columns) -> pa.Table:
    """Samples as rows of a file."""
    fields, arrays = [], []
    for name, values in samples.items():
        if values.dtype == object:
            lengths = [len(value) for value in values]
            arrays.append(ragged_array(np.concatenate(values), np.cumsum([0, *lengths])))
            fields.append(tensor_field(name, (-1,), values[0].dtype))
            continue
        plain = values.ndim == 1
        arrays.append(pa.array(values) if plain else tensor_array(values))
        made = pa.field(name, arrays[-1].type, nullable=False)
        fields.append(made if plain else tensor_field(name, values.shape[1:], values.dtype))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def ids_of(samples: Columns, batch_size: int) -> list[str]:
    """Checksums of the batches of a file."""
    starts = range(0, len(samples["sample_id"]), batch_size)
    return [
        xxhash.xxh3_128_hexdigest(b"".join(_bytes(values[start : start + batch_size]) for values in samples.values()))
        for start in starts
    ]


def _bytes(values: npt.NDArray[Any]) -> bytes:
    if values.dtype != object:
        return values.tobytes()
    return b"".join(struct.pack("<I", value.nbytes) + value.tobytes() for value in values)


def publish(
    root: str,
    splits: dict[str, Sequence[Columns]],
    *,
    batch_size: int = 1,
    group_batches: int | None = None,
    dataset: str = DATASET,
    shape: tuple[int, ...] = SHAPE,
    **settings: Any,
) -> str:
    """Publish a version; its URI.

    Args:
        root: Root of the store.
        splits: Samples of each file of each split.
        batch_size: Samples of a batch; those of images have 1.
        group_batches: Batches in a row group; None: as in production.
        dataset: Dataset name.
        shape: Of images that are JPEGs.
        settings: Options of Parquet that differ.
    """
    run_id = uuid.uuid4().hex
    reservation = versions.reserve(root, dataset, run_id)
    entries = []
    columns = {name for files in splits.values() for file in files for name in file}
    kind = "table" if "features" in columns else "sequences" if "sequence" in columns else "images"
    for split, files in splits.items():
        for index, samples in enumerate(files):
            table = rows_of(samples)
            uri = reservation.data_uri(index, split_directory(split))
            options = {**parquet_settings(table.schema, value_bytes=1, batch_size=batch_size), **settings}
            with ParquetStream(uri, table.schema, **options) as stream:
                step = (group_batches or table.num_rows) * batch_size
                for start in range(0, table.num_rows, step):
                    stream.write(table.slice(start, step))
                ids = " ".join(ids_of(samples, batch_size))
                stream.describe({"batch_size": str(batch_size), "batch_id": ids})
            entries.append(reservation.entry(stream.written))
    rows = sum(entry.rows for entry in entries)
    first = next(iter(splits.values()))[0]
    manifest = Manifest(
        dataset=dataset,
        version=reservation.version,
        status="published",
        created_at=dt.datetime.now(dt.UTC),
        files=tuple(entries),
        columns=tuple(ColumnSpec(name=field.name, type=str(field.type), nullable=False) for field in table.schema),
        balances=(RowBalance(name="samples", rows_in=rows, rows_out=rows),),
        profile={},
        gate=GateResult(verdict="pass", checks=()),
        inputs=(),
        config={},
        definition={
            "kind": kind,
            "batch_size": batch_size,
            "seed": 0,
            "samples": {name: sum(len(file["sample_id"]) for file in files) for name, files in splits.items()},
            "label": _label(first),
            "normalise": _normalise(first),
            **({"weight": {"column": "w"}} if "weight" in first else {}),
            **(
                {"feature_count": first["features"].shape[1], "features": []}
                if kind == "table"
                else {"sequence": {"dtype": first["sequence"][0].dtype.name, **_lengths(first)}}
                if kind == "sequences"
                else {"image": {"dtype": "uint8", **_pictures(first, shape)}}
            ),
        },
        code_digest="0",
        packages={},
        run=RunRecord(flow_run_id=run_id, attempt=reservation.attempt),
    )
    versions.commit(reservation, manifest)
    return reservation.uri


def _pictures(first: Columns, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the definition says of images: of the first file's, or of JPEGs of a shape."""
    if "length" not in first:
        return {"shape": list(first["image"].shape[1:])}
    return {"shape": list(shape), "encoding": "jpeg", **_lengths(first)}


def _label(first: Columns) -> dict[str, Any] | None:
    if "label" not in first:
        return None
    values = first["label"]
    if values.ndim == 1:
        return {"column": "label", "kind": "class", "classes": ["a", "b", "c", "d"]}
    columns = [f"label {number}" for number in range(values.shape[1])]
    if values.dtype == np.int64:
        return {"columns": columns, "kind": "classes", "classes": [["a", "b", "c", "d"]] * len(columns)}
    return {"columns": columns, "kind": "numbers", "mean": [0.0] * len(columns), "std": [1.0] * len(columns)}


def _lengths(first: Columns) -> dict[str, Any]:
    """Lengths of the first file, as stand-ins for those of a whole split."""
    return {"mean_length": float(first["length"].mean()), "longest": int(first["length"].max())}


def _normalise(first: Columns) -> dict[str, Any]:
    """Constants of the first file, as stand-ins for those of a whole split."""
    if "sequence" in first:
        return {"mean": [], "std": []}
    if "length" in first:
        return {"mean": [0.5] * 3, "std": [0.25] * 3, "scale": 255}
    if "features" in first:
        values, axes, scale = first["features"].astype(np.float64), (0,), {}
    else:
        values, axes, scale = first["image"] / 255, (0, 2, 3), {"scale": 255}
    std = values.std(axis=axes)
    return {"mean": values.mean(axis=axes).tolist(), "std": np.where(std > 0, std, 1).tolist(), **scale}


def cut(samples: Columns, *sizes: int) -> list[Columns]:
    """Samples of some files, of so many samples each."""
    bounds = np.cumsum([0, *sizes])
    assert bounds[-1] == len(samples["sample_id"])
    return [{name: v[a:b] for name, v in samples.items()} for a, b in itertools.pairwise(bounds)]


def table_version(root: str, *sizes: int, seed: int = 0, batch_size: int = 10, **options: Any) -> str:
    """A table whose train split has files of so many samples."""
    files = cut(table_samples(sum(sizes), seed), *sizes)
    return publish(root, {"train": files}, batch_size=batch_size, **{"group_batches": 3, **options})


def image_version(root: str, *sizes: int, seed: int = 0, **options: Any) -> str:
    """Images whose train split has files of so many samples."""
    files = cut(image_samples(sum(sizes), seed), *sizes)
    return publish(root, {"train": files}, **{"group_batches": 7, **options})


def sequence_version(
    root: str, *sizes: int, seed: int = 0, batch_size: int = 10, samples: Columns | None = None, **options: Any
) -> str:
    """Sequences whose train split has files of so many samples: these, or drawn ones."""
    files = cut(sequence_samples(sum(sizes), seed) if samples is None else samples, *sizes)
    return publish(root, {"train": files}, batch_size=batch_size, **{"group_batches": 3, **options})


def damage(version: str, path: str, at: int, by: bytes = b"\xff") -> None:
    """Change one byte of a local file."""
    name = join(version, path)
    data = bytearray(storage.read_bytes(name))
    data[at] ^= by[0]
    with open(name, "wb") as file:
        file.write(data)
