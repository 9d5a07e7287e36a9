"""Samples as files: the streaming-ready format, of which `tasks/delivery/FORMAT.md` is the specification.

A row of a file is a sample. The values of a column lie in the file one after the other, so that a reader maps it into
memory and picks samples by their address. Values of any length have a column of their lengths beside them, whose sums
are their places. The footer has the checksums: one for each batch of consecutive samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from tasks.io.errors import ConfigError, InputError
from tasks.io.storage import ParquetStream, WrittenFile
from tasks.io.tensors import (
    ANY_LENGTH,
    Int64Array,
    TensorSpec,
    parquet_settings,
    tensor_array,
    tensor_field,
    tensor_spec,
    to_numpy,
    to_ragged,
)

FEATURES, IMAGE, SEQUENCE, LENGTH = "features", "image", "sequence", "length"
LABEL, WEIGHT, SAMPLE_ID = "label", "weight", "sample_id"
BATCH_SIZE, FEATURE_COUNT, BATCH_ID = "batch_size", "feature_count", "batch_id"
DIMENSIONS = ("channel", "height", "width")
PREFIX_BYTES = 4  # before each value of any length: its bytes, as Parquet has it
SEQUENCE_DTYPES = ("uint8", "int32", "int64", "float32", "float64")

_GROUP_BYTES = 32 << 20  # of values of any length, in a row group of more than a batch
_PAGE_BYTES = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFormat:
    """Format of a version's samples.

    Attributes:
        kind: 'table', 'images' or 'sequences'.
        shape: of a sample's values: (features,), (3, height, width), or (-1,) for sequences of any length.
        label: element type of the labels; None without labels.
        labels: labels of a sample; None for one, which is a plain number.
        batch_size: samples of a batch, which has a checksum; images are checked one by one.
        dtype: element type of sequences.
        encoding: of images that are stored encoded, as bytes of any length; None for pixels.
        mean_length: of values of any length the mean number of elements, rounded up.
        weight: True if they have weights to be drawn by.
    """

    kind: Literal["table", "images", "sequences"]
    shape: tuple[int, ...]
    label: Literal["int64", "float32"] | None
    batch_size: int
    labels: int | None = None
    dtype: str = "uint8"
    encoding: Literal["jpeg"] | None = None
    mean_length: int = 0
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
        if size < 1 or kind not in ("table", "images", "sequences"):
            raise ValueError(f"kind {kind!r} in batches of {size}")
        dtype, mean_length, encoding = "uint8", 0, None
        if kind == "table":
            shape: tuple[int, ...] = (int(definition[FEATURE_COUNT]),)
        elif kind == "images":
            told = definition[IMAGE]
            shape, dtype, encoding = tuple(map(int, told["shape"])), told["dtype"], told.get("encoding")
            if encoding not in (None, "jpeg"):
                raise ValueError(f"images encoded as {encoding}")
            mean_length = 0 if encoding is None else math.ceil(told["mean_length"])
        else:
            told = definition[SEQUENCE]
            shape, dtype, mean_length = ANY_LENGTH, told["dtype"], math.ceil(told["mean_length"])
        if dtype not in (SEQUENCE_DTYPES if kind == "sequences" else ("uint8",)):
            raise ValueError(f"{kind} of {dtype}")
        return cls(
            kind=kind,
            shape=shape,
            label=None if label is None else "int64" if label["kind"] in ("class", "classes") else "float32",
            labels=_labels(label),
            batch_size=size,
            dtype=dtype,
            encoding=encoding,
            mean_length=mean_length,
            weight=definition.get(WEIGHT) is not None,
        )

    @property
    def ragged(self) -> bool:
        """True if a sample's values have any length."""
        return self.shape == ANY_LENGTH or self.encoding is not None

    @property
    def columns(self) -> dict[str, TensorSpec]:
        """Columns of a sample, in the files' order; the first has its values, of any length with their lengths."""
        if self.kind == "table":
            columns = {FEATURES: TensorSpec(self.shape, "float32", ("feature",))}
        elif self.kind == "sequences":
            columns = {SEQUENCE: TensorSpec(self.shape, self.dtype)}
        else:
            columns = {IMAGE: TensorSpec(self.shape, "uint8", DIMENSIONS)}
        if self.encoding is not None:
            columns[IMAGE] = TensorSpec(ANY_LENGTH, "uint8")
        if self.ragged:
            columns[LENGTH] = TensorSpec((), "int64")
        if self.label is not None:
            columns[LABEL] = TensorSpec(() if self.labels is None else (self.labels,), self.label)
        if self.weight:
            columns[WEIGHT] = TensorSpec((), "float32")
        return {**columns, SAMPLE_ID: TensorSpec((), "int64")}

    @property
    def delivered(self) -> dict[str, TensorSpec]:
        """Columns of a sample that a batch may have: encoded images are decoded."""
        if self.encoding is None:
            return self.columns
        others = {name: spec for name, spec in self.columns.items() if name != LENGTH}
        return {**others, IMAGE: TensorSpec(self.shape, "uint8", DIMENSIONS)}

    @property
    def delivered_bytes(self) -> int:
        """Bytes of a sample in a batch."""
        return self.sample_bytes if self.encoding is None else sum(spec.width for spec in self.delivered.values())

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample; with values of any length about those of a mean one."""
        return sum(
            PREFIX_BYTES + self.mean_length * spec.width if spec.variable else spec.width
            for spec in self.columns.values()
        )

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
        settings = parquet_settings(self.schema, value_bytes=PREFIX_BYTES, batch_size=self.batch_size)
        if self.ragged:  # a row group, which is cut by its bytes, is a page however large it is
            settings["data_page_size"] = _PAGE_BYTES
        return settings

    def row_groups(self, parts: Sequence[pa.Table], order: Int64Array) -> Iterator[Int64Array]:
        """Yield the numbers of the samples of each row group: whole batches, of about 32 MiB.

        Raises:
            InputError: a batch is too large for a page of Parquet.
        """
        step = self.settings["row_group_size"]
        if not self.ragged:
            yield from (order[start : start + step] for start in range(0, len(order), step))
            return
        name, spec = next(iter(self.columns.items()))
        sizes = PREFIX_BYTES + np.concatenate([to_numpy(part, LENGTH) for part in parts])[order] * spec.width
        ends = np.minimum(np.arange(self.batch_size, len(order) + self.batch_size, self.batch_size), len(order))
        ends, after = np.concatenate([[0], ends]), np.concatenate([[0], np.cumsum(sizes)])
        batch = 0
        while batch + 1 < len(ends):
            start = ends[batch]
            if (size := int(after[ends[batch + 1]] - after[start])) > _PAGE_BYTES:
                raise InputError(
                    f"batch_size = {self.batch_size:,}: column {name!r} has {size:,} bytes in a batch, more than a "
                    f"page of Parquet holds ({_PAGE_BYTES:,}); use a smaller one"
                )
            fitting = np.searchsorted(after[ends], after[start] + _GROUP_BYTES, side="right") - 1
            batch = min(max(int(fitting), batch + 1), batch + max(step // self.batch_size, 1))
            yield order[start : ends[batch]]


def _labels(label: Mapping[str, Any] | None) -> int | None:
    """Return how many labels a sample has; None for one, or none."""
    if label is None or label["kind"] in ("class", "number"):
        return None
    return len(label["mean" if label["kind"] == "numbers" else "classes"])


def pick(parts: Sequence[pa.Table], index: Int64Array) -> pa.Table:
    """Return a copy of some samples of one or more parts; numbers run through all parts."""
    starts = np.cumsum([0, *(part.num_rows for part in parts)])
    owner = np.searchsorted(starts, index, side="right") - 1
    own = {number: np.flatnonzero(owner == number) for number in np.unique(owner).tolist()}
    schema, arrays = parts[0].schema, []
    for field in schema:
        spec = tensor_spec(field)
        if spec.variable:
            pieces = [
                parts[number][field.name].combine_chunks().take(pa.array(index[places] - starts[number]))
                for number, places in own.items()
            ]
            found = [*own.values()]
            back = np.argsort(np.concatenate(found)) if found else np.empty(0, np.int64)
            arrays.append(pa.concat_arrays([pa.array([], field.type), *pieces]).take(pa.array(back)))
            continue
        values = np.empty((len(index), *spec.shape), spec.stored)
        for number, places in own.items():
            values[places] = to_numpy(parts[number], field.name)[index[places] - starts[number]]
        arrays.append(tensor_array(values) if spec.shape else pa.array(values))
    return pa.Table.from_arrays(arrays, schema=schema)


def batch_ids(samples: pa.Table, batch_size: int) -> list[str]:
    """Return the checksum of each batch: XXH3-128 of its columns' values, one column after the other, hexadecimal.

    Before each value of any length are its bytes, a little-endian number of 4 bytes, as in a page of Parquet.
    """
    hashers = [xxhash.xxh3_128() for _ in range(0, samples.num_rows, batch_size)]
    for field in samples.schema:
        if tensor_spec(field).variable:
            elements, bounds = to_ragged(samples, field.name)
            data, ends = elements.view(np.uint8).data, (bounds * elements.itemsize).tolist()
            sizes = np.diff(ends).astype("<u4").view(np.uint8).data
            for row, (start, end) in enumerate(itertools.pairwise(ends)):
                hasher = hashers[row // batch_size]
                hasher.update(sizes[row * PREFIX_BYTES : (row + 1) * PREFIX_BYTES])
                hasher.update(data[start:end])
            continue
        values = to_numpy(samples, field.name)
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
    found = list[str]()
    with ParquetStream(uri, form.schema, **form.settings) as stream:
        for group in form.row_groups(parts, order):
            samples = pick(parts, group)
            stream.write(samples)
            found += batch_ids(samples, form.batch_size)
        features = form.shape[0] if form.kind == "table" else 0
        stream.describe({BATCH_SIZE: str(form.batch_size), FEATURE_COUNT: str(features), BATCH_ID: " ".join(found)})
    return stream.written
