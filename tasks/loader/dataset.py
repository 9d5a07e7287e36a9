"""A streaming-ready version as a Ray Dataset, for iteration with Ray.

`TrainingStream` is faster and can be resumed; this is for Ray pipelines: further transformations, several
datasets together, `train.get_dataset_shard(...).iter_torch_batches(...)`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from tasks.io import storage
from tasks.io.errors import CorruptVersion
from tasks.io.tensors import as_fixed_shape_tensors, tensor_array, tensor_field, to_numpy
from tasks.loader.arguments import picked_columns, truth_values
from tasks.loader.blocks import block_checksums
from tasks.loader.version_files import CHECKSUM, CURE, misfits, open_version
from tasks.store import layout

_REAL = "batch_size"


def read_version(
    uri: str | os.PathLike[str], split: str = "train", columns: Sequence[str] | None = None, *, verify: bool = True
) -> ray.data.Dataset:
    """Read the samples of a split: only the files that the manifest lists, a row for each sample.

    'features' and 'image' are Ray's tensors, as they are stored: not normalised (the constants are in the manifest's
    definition); 'label' and 'sample_id' are numbers.

    Args:
        uri: Directory of a version (…/v3), or of a dataset for its latest version.
        split: 'train', 'validation' or 'test'.
        columns: Names of columns; None: all.
        verify: Compare each block with its checksum, which reads all columns.

    Raises:
        ConfigError: it isn't a streaming-ready version, there is no such split or column, or `verify` isn't a bool.
        VersionNotFound: there is no such published version.
        CorruptVersion: a file is missing or has another size. (Within Ray's error, a damaged block.)
    """
    truth_values(verify=verify)
    version = open_version(uri)
    definition = version.definition
    there = ["features" if definition["kind"] == "table" else "image"]
    there += [*(["label"] if definition["label"] is not None else []), "sample_id"]
    picked = picked_columns(columns, there)
    uris = [layout.join(version.uri, entry.path) for entry, _ in version.files(split)]
    for _, fault in misfits(version, version.files(split)):
        raise fault
    filesystem, _ = storage.arrow_filesystem(version.uri)
    paths = [storage.arrow_filesystem(uri)[1] for uri in uris]
    # The directory names contain the split, and would become a column.
    blocks = ray.data.read_parquet(paths, filesystem=filesystem, partitioning=None)
    take_apart = functools.partial(_samples, columns=picked, block_size=int(definition["block_size"]), verify=verify)
    read = [*there, CHECKSUM] if verify else picked
    return blocks.select_columns([*read, _REAL]).map_batches(take_apart, batch_format="pyarrow")


def _verify(blocks: pa.Table) -> None:
    for expected, found in zip(blocks[CHECKSUM].to_pylist(), block_checksums(blocks), strict=True):
        if found != expected:
            raise CorruptVersion(f"block {expected} has not the checksum that stands beside it: {CURE}")


def _samples(blocks: pa.Table, columns: Sequence[str], block_size: int, verify: bool) -> pa.Table:
    """Return one row a sample: blocks are split, and the padding of the last one is dropped."""
    if verify:
        _verify(blocks)
    real = np.arange(block_size) < np.asarray(blocks[_REAL])[:, None]
    fields: list[pa.Field] = []
    arrays: list[Any] = []
    for name in columns:
        values = to_numpy(blocks, name)
        if values.ndim > 1 and name != "image":
            values = values.reshape(-1, *values.shape[2:])
        if not real.all():
            values = values[real.ravel()]
        if values.ndim == 1:
            arrays.append(pa.array(values))
            fields.append(pa.field(name, arrays[-1].type, nullable=False))
        else:
            fields.append(tensor_field(name, values.shape[1:], values.dtype))
            arrays.append(tensor_array(values))
    return as_fixed_shape_tensors(pa.Table.from_arrays(arrays, schema=pa.schema(fields)))
