"""Samples as files: ordinary columns, a checksum of the bytes of each batch, and files that a reader can map."""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from tasks.io import storage
from tasks.io.errors import ConfigError, InputError
from tasks.io.tensors import ragged_array, tensor_array, to_numpy
from tasks.loader.samples import SampleFormat, batch_ids, noted_ids, pick, write_samples
from tasks.loader.version_files import MappedFile

TABLE = SampleFormat(kind="table", shape=(3,), label="float32", batch_size=4)
IMAGES = SampleFormat(kind="images", shape=(3, 2, 2), label="int64", batch_size=1)
BARE = SampleFormat(kind="table", shape=(1,), label=None, batch_size=1)
TEXTS = SampleFormat(kind="sequences", shape=(-1,), label="int64", batch_size=4)
TOKENS = SampleFormat(kind="sequences", shape=(-1,), label=None, batch_size=1, dtype="int32")
FORMS = [TABLE, IMAGES, BARE, TEXTS, TOKENS]


def samples(form: SampleFormat, count: int) -> pa.Table:
    draw = np.random.default_rng(count)
    dtype = next(iter(form.columns.values())).dtype
    if form.shape == (-1,):
        lengths = draw.integers(0, 9, count)
        values = draw.integers(0, 256, lengths.sum()).astype(dtype)
        columns = [ragged_array(values, np.cumsum([0, *lengths])), pa.array(lengths)]
    else:
        columns = [tensor_array((draw.normal(size=(count, *form.shape)) * 100).astype(dtype))]
    labels = [] if form.label is None else [pa.array(np.arange(count).astype(form.label))]
    ids = pa.array(draw.integers(-(2**63), 2**63, count))
    return pa.Table.from_arrays([*columns, *labels, ids], schema=form.schema)


def bytes_of(table: pa.Table, name: str, start: int, count: int) -> bytes:
    column = table[name].slice(start, count)
    if pa.types.is_large_binary(column.type):
        return b"".join(struct.pack("<I", len(value)) + value for value in column.to_pylist())
    return to_numpy(table, name)[start : start + count].tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_a_checksum_is_of_exactly_the_bytes_of_a_batch(form: SampleFormat, count: int) -> None:
    table, size = samples(form, count), form.batch_size
    expected = [
        b"".join(bytes_of(table, name, start, size) for name in table.column_names) for start in range(0, count, size)
    ]
    assert batch_ids(table, size) == [xxhash.xxh3_128_hexdigest(data) for data in expected]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_the_samples_in_the_order_asked_for_and_can_be_mapped(form: SampleFormat, tmp_path: Path) -> None:
    given, order = samples(form, 23), np.random.default_rng(0).permutation(23)
    path = tmp_path / "part.parquet"
    written = write_samples(str(path), [given], order, form)
    assert (written.bytes, written.digest) == (path.stat().st_size, storage.digest_of(str(path)))
    table = pq.read_table(path)
    assert written.rows == table.num_rows == 23
    assert table.equals(given.take(pa.array(order)))
    footer = pq.read_metadata(path)
    assert footer.metadata[b"batch_size"] == str(form.batch_size).encode()
    assert footer.metadata[b"feature_count"] == str(form.shape[0] if form.kind == "table" else 0).encode()
    assert noted_ids(footer) == batch_ids(table, form.batch_size)
    with path.open("rb") as file:
        mapped = MappedFile(file, str(path))
    assert (mapped.samples, mapped.batch_size) == (23, form.batch_size)
    assert all(mapped.is_intact(batch) for batch in range(-(-23 // form.batch_size)))


@pytest.mark.parametrize("form", [TABLE, IMAGES])
def test_labels_and_ids_are_ordinary_columns_for_everyone(form: SampleFormat, tmp_path: Path) -> None:
    given, path = samples(form, 9), tmp_path / "part.parquet"
    write_samples(str(path), [given], np.arange(9), form)
    expected = {name: given[name].to_pylist() for name in ("label", "sample_id")}
    frame = pd.read_parquet(path)
    found = duckdb.sql(f"select label, sample_id from '{path}'").fetchnumpy()
    frames = (frame, pl.read_parquet(path), found)
    for one in frames:
        assert {name: np.asarray(one[name]).tolist() for name in expected} == expected
    assert frame.dtypes[["label", "sample_id"]].astype(str).tolist() == [form.label, "int64"]
    first = np.frombuffer(frame[given.column_names[0]][0], to_numpy(given, given.column_names[0]).dtype)
    assert np.array_equal(first, to_numpy(given, given.column_names[0])[0].ravel())


def test_large_files_are_written_in_row_groups_of_whole_batches(tmp_path: Path) -> None:
    # Samples of 1 KiB and 8 bytes: within 32 MiB there are 7 batches of 4096.
    form = SampleFormat(kind="table", shape=(256,), label=None, batch_size=4096)
    count = 4096 * 9 + 1
    arrays = [tensor_array(np.ones((count, 256), np.float32)), pa.array(np.arange(count))]
    given = pa.Table.from_arrays(arrays, schema=form.schema)
    write_samples(str(tmp_path / "part.parquet"), [given], np.arange(count), form)
    footer = pq.ParquetFile(tmp_path / "part.parquet").metadata
    groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    assert groups == [4 * 4096, 4 * 4096, 4096 + 1]
    assert len(footer.metadata[b"batch_id"].split()) == 10


def test_a_batch_larger_than_a_row_group_is_still_one_page(tmp_path: Path) -> None:
    form = SampleFormat(kind="table", shape=(256,), label=None, batch_size=40_000)
    arrays = [tensor_array(np.ones((50_000, 256), np.float32)), pa.array(np.arange(50_000))]
    path = tmp_path / "part.parquet"
    write_samples(str(path), [pa.Table.from_arrays(arrays, schema=form.schema)], np.arange(50_000), form)
    with path.open("rb") as file:
        mapped = MappedFile(file, str(path))
    assert mapped.starts.tolist() == [0, 40_000, 50_000]
    assert mapped.is_intact(0)
    assert mapped.is_intact(1)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_row_groups_of_values_of_any_length_are_cut_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr("tasks.loader.samples._GROUP_BYTES", 1000)
    form = SampleFormat(kind="sequences", shape=(-1,), label=None, batch_size=batch_size)
    lengths = np.random.default_rng(0).integers(0, 300, 58)
    lengths[20] = 5000
    arrays = [ragged_array(np.ones(lengths.sum(), np.uint8), np.cumsum([0, *lengths]))]
    given = pa.Table.from_arrays([*arrays, pa.array(lengths), pa.array(np.arange(58))], schema=form.schema)
    order, path = np.random.default_rng(1).permutation(58), tmp_path / "part.parquet"
    write_samples(str(path), [given.slice(0, 30), given.slice(30)], order, form)
    with path.open("rb") as file:
        mapped = MappedFile(file, str(path))
    assert mapped.locate() == []
    assert all(mapped.is_intact(batch) for batch in range(-(-58 // batch_size)))
    sizes, starts = 4 + lengths[order], mapped.starts
    for start, end in pairwise(starts.tolist()):
        assert start % batch_size == 0
        assert sizes[start:end].sum() <= 1000 or end - start <= batch_size
        # The next batch would have made it larger.
        assert end == 58 or sizes[start : end + batch_size].sum() > 1000
    assert pq.read_table(path).equals(given.take(pa.array(order)))


def test_a_batch_of_sequences_larger_than_a_page_can_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.loader.samples._PAGE_BYTES", 100)
    given = samples(TEXTS, 30)
    with pytest.raises(InputError, match=r"batch_size = 30: column 'sequence' has \d+ bytes in a batch, more than"):
        list(replace(TEXTS, batch_size=30).row_groups([given], np.arange(30)))


def test_a_batch_larger_than_a_page_can_be_is_refused() -> None:
    form = SampleFormat(kind="table", shape=(600,), label=None, batch_size=1_000_000)
    with pytest.raises(InputError, match=r"batch_size = 1,000,000: a batch of 2,400 bytes a row.*use at most 894,784"):
        _ = form.settings


@pytest.mark.parametrize("form", [TABLE, TEXTS])
@pytest.mark.parametrize("bounds", [[0, 9], [0, 4, 9], [0, 0, 4, 4, 9, 9]])
def test_samples_are_picked_through_all_parts(bounds: list[int], form: SampleFormat) -> None:
    whole = samples(form, 9)
    parts = [whole.slice(start, end - start) for start, end in pairwise(bounds)]
    index = np.array([8, 0, 3, 3, 4, 7])
    assert pick(parts, index).equals(whole.take(pa.array(index)), check_metadata=True)


@pytest.mark.parametrize("definition", [{"kind": "table"}, {"batch_size": 1, "entity": "k"}])
def test_another_kind_of_version_is_refused(definition: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="isn't streaming-ready; make a streaming-ready copy of it"):
        SampleFormat.of(definition)
