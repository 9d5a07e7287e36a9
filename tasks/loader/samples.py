"""Samples as files: the streaming-ready format, of which `tasks/delivery/FORMAT.md` is the specification.

A row of a file is a sample. The values of a column lie in the file one after the other, so that a reader maps it into
memory and picks samples by their address. The footer has the checksums: one for each batch of consecutive samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from tasks.io.errors import ConfigError
from tasks.io.storage import ParquetStream, WrittenFile
from tasks.io.tensors import Int64Array, TensorSpec, parquet_settings, tensor_array, tensor_field, tensor_spec, to_numpy

FEATURES, IMAGE, LABEL, WEIGHT, SAMPLE_ID = "features", "image", "label", "weight", "sample_id"
BATCH_SIZE, FEATURE_COUNT, BATCH_ID = "batch_size", "feature_count", "batch_id"
DIMENSIONS = ("channel", "height", "width")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFormat:
    """Format of a version's samples.

    Attributes:
        kind: 'table' or 'images'.
        shape: of a sample's values: (features,), or (3, height, width).
        label: element type of the labels; None without labels.
        batch_size: samples of a batch, which has a checksum; images are checked one by one.
        weight: True if they have weights to be drawn by.
    """

    kind: Literal["table", "images"]
    shape: tuple[int, ...]
    label: Literal["int64", "float32"] | None
    batch_size: int
    weight: bool = False

    @classmethod
    def of(cls, definition: Mapping[str, Any]) -> Self:
        """Return the format of a version by its `manifest.definition`.

        Raises:
            ConfigError: the version isn't streaming-ready, or its rows are blocks of samples.
            AttributeError, KeyError, TypeError, ValueError: the definition contradicts itself.
        """
        if "block_size" in definition:
            raise ConfigError(
                "this version's rows are blocks of samples, which only earlier versions of this code read; make a new "
                "copy of its source with the training-delivery flow"
            )
        if not {"kind", BATCH_SIZE, "samples", "normalise"} <= definition.keys():
            raise ConfigError(
                "this version isn't streaming-ready; make a streaming-ready copy of it with the training-delivery flow"
            )
        kind, label, size = definition["kind"], definition["label"], int(definition[BATCH_SIZE])
        if size < 1 or kind not in ("table", "images"):
            raise ValueError(f"kind {kind!r} in batches of {size}")
        table = kind == "table"
        if not table and definition[IMAGE]["dtype"] != "uint8":
            raise ValueError(f"images of {definition[IMAGE]['dtype']}")
        return cls(
            kind=kind,
            shape=(int(definition[FEATURE_COUNT]),) if table else tuple(map(int, definition[IMAGE]["shape"])),
            label=None if label is None else "int64" if label["kind"] == "class" else "float32",
            batch_size=size,
            weight=definition.get(WEIGHT) is not None,
        )

    @property
    def columns(self) -> dict[str, TensorSpec]:
        """Columns of a sample, in the files' order; the first has its values."""
        if self.kind == "table":
            columns = {FEATURES: TensorSpec(self.shape, "float32", ("feature",))}
        else:
            columns = {IMAGE: TensorSpec(self.shape, "uint8", DIMENSIONS)}
        if self.label is not None:
            columns[LABEL] = TensorSpec((), self.label)
        if self.weight:
            columns[WEIGHT] = TensorSpec((), "float32")
        return {**columns, SAMPLE_ID: TensorSpec((), "int64")}

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample."""
        return sum(spec.width for spec in self.columns.values())

    @property
    def schema(self) -> pa.Schema:
        """Schema of the data files: plain columns of numbers beside that of the values."""
        return pa.schema(
            [
                tensor_field(name, spec.shape, spec.dtype, spec.dimensions)
                if spec.shape
                else pa.field(name, pa.from_numpy_dtype(np.dtype(spec.dtype)), nullable=False)
                for name, spec in self.columns.items()
            ]
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Options of the data files.

        Raises:
            InputError: a batch is too large for a page of Parquet.
        """
        return parquet_settings(self.schema, batch_size=self.batch_size)


def pick(parts: Sequence[pa.Table], index: Int64Array) -> pa.Table:
    """Return a copy of some samples of one or more parts; numbers run through all parts."""
    starts = np.cumsum([0, *(part.num_rows for part in parts)])
    owner = np.searchsorted(starts, index, side="right") - 1
    own = {number: np.flatnonzero(owner == number) for number in np.unique(owner).tolist()}
    schema, arrays = parts[0].schema, []
    for field in schema:
        spec = tensor_spec(field)
        values = np.empty((len(index), *spec.shape), spec.stored)
        for number, places in own.items():
            values[places] = to_numpy(parts[number], field.name)[index[places] - starts[number]]
        arrays.append(tensor_array(values) if spec.shape else pa.array(values))
    return pa.Table.from_arrays(arrays, schema=schema)


def batch_ids(samples: pa.Table, batch_size: int) -> list[str]:
    """Return the checksum of each batch: XXH3-128 of its columns' values, one column after the other, hexadecimal."""
    columns = [to_numpy(samples, name) for name in samples.column_names]
    hashers = [xxhash.xxh3_128() for _ in range(0, samples.num_rows, batch_size)]
    for values in columns:
        for number, hasher in enumerate(hashers):
            hasher.update(values[number * batch_size : (number + 1) * batch_size].data)
    return [hasher.hexdigest() for hasher in hashers]


def noted_ids(footer: pq.FileMetaData) -> list[str]:
    """Return the checksums of a file's batches, as its footer has them."""
    text: bytes = (footer.metadata or {}).get(BATCH_ID.encode(), b"")
    return text.decode("ascii", "replace").split()


def write_samples(uri: str, parts: Sequence[pa.Table], order: Int64Array, form: SampleFormat) -> WrittenFile:
    """Write one or more samples in an order, as one file, in the memory of a row group.

    Args:
        uri: Name of the file.
        parts: The samples; numbers run through all parts.
        order: Numbers of the samples to write, in this order.
        form: Their format.
    """
    settings, found = form.settings, list[str]()
    step = settings["row_group_size"]
    with ParquetStream(uri, form.schema, **settings) as stream:
        for start in range(0, len(order), step):
            samples = pick(parts, order[start : start + step])
            stream.write(samples)
            found += batch_ids(samples, form.batch_size)
        features = form.shape[0] if form.kind == "table" else 0
        stream.describe({BATCH_SIZE: str(form.batch_size), FEATURE_COUNT: str(features), BATCH_ID: " ".join(found)})
    return stream.written
