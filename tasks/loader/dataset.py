"""A streaming-ready version as a Ray Dataset, for iteration with Ray.

`TrainingStream` is faster and can be resumed; this is for Ray pipelines: further transformations, several
datasets together, `train.get_dataset_shard(...).iter_torch_batches(...)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from tasks.engine.jobs import in_blocks
from tasks.io import storage
from tasks.io.errors import CorruptVersion
from tasks.io.tensors import as_fixed_shape_tensors, to_ragged
from tasks.loader.arguments import picked_columns, truth_values
from tasks.loader.samples import SEQUENCE, SampleFormat, batch_ids, noted_ids
from tasks.loader.version_files import CURE, misfits, open_version
from tasks.store import layout


def read_version(
    uri: str | os.PathLike[str], split: str = "train", columns: Sequence[str] | None = None, *, verify: bool = True
) -> ray.data.Dataset:
    """Read the samples of a split: only the files that the manifest lists, a row for each sample.

    'features' and 'image' are Ray's tensors, as they are stored: not normalised (the constants are in the manifest's
    definition); 'sequence' is a list; 'label' and 'sample_id' are numbers.

    Args:
        uri: Directory of a version (…/v3), or of a dataset for its latest version.
        split: 'train', 'validation' or 'test'.
        columns: Names of columns; None: all.
        verify: Compare each batch with its checksum, which reads all columns.

    Raises:
        ConfigError: it isn't a streaming-ready version, there is no such split or column, or `verify` isn't a bool.
        VersionNotFound: there is no such published version.
        CorruptVersion: a file is missing or has another size. (Within Ray's error, a damaged batch.)
    """
    truth_values(verify=verify)
    version = open_version(uri)
    form, files = SampleFormat.of(version.definition), version.files(split)
    picked = picked_columns(columns, list(form.columns))
    for _, fault in misfits(version, files):
        raise fault

    def read(rows: pa.Table) -> Iterator[pa.Table]:
        for file in rows["file"].to_pylist():
            yield from _samples(file, form, picked, verify)

    uris = [layout.join(version.uri, entry.path) for entry in files]
    if not ray.is_initialized():
        ray.init()  # as Ray Data itself does
    return in_blocks(pa.table({"file": uris})).map_batches(read, batch_size=None, batch_format="pyarrow")


def _samples(uri: str, form: SampleFormat, columns: Sequence[str], verify: bool) -> Iterator[pa.Table]:
    """Yield some columns of a file, a row group at a time."""
    with storage.open_input(uri) as source:
        file, done = pq.ParquetFile(source), 0
        noted = noted_ids(file.metadata)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=None if verify else list(columns), use_threads=False)
            if verify:
                found = batch_ids(rows, form.batch_size)
                for number, batch_id in enumerate(found, done):
                    if noted[number : number + 1] != [batch_id]:
                        raise CorruptVersion(f"{uri}: batch {number} has not the checksum in the footer: {CURE}")
                done += len(found)
            yield _lists(as_fixed_shape_tensors(rows.select(list(columns)).replace_schema_metadata(None)))


def _lists(rows: pa.Table) -> pa.Table:
    """Return the table with its sequences as lists of numbers."""
    if SEQUENCE not in rows.column_names:
        return rows
    values, starts = to_ragged(rows, SEQUENCE)
    lists = pa.LargeListArray.from_arrays(pa.array(starts), pa.array(values))
    return rows.set_column(rows.column_names.index(SEQUENCE), SEQUENCE, lists)
