"""Blocks: zeros behind the last sample, a checksum of exactly the bytes, and files that a reader can map."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from tasks.io import storage
from tasks.io.tensors import is_tensor, to_numpy
from tasks.loader.blocks import BlockFormat, Samples, block_checksums, block_table, pick, write_samples
from tasks.loader.version_files import MappedFile

TABLE = BlockFormat(kind="table", shape=(3,), label="float32", block_size=4)
IMAGES = BlockFormat(kind="images", shape=(3, 2, 2), label="int64", block_size=1)


def samples(form: BlockFormat, count: int) -> Samples:
    draw = np.random.default_rng(count)
    values = (draw.normal(size=(count, *form.shape)) * 100).astype(form.dtype)
    labels = None if form.label is None else np.arange(count).astype(form.label)
    return Samples(values, labels, draw.integers(-(2**63), 2**63, count))


@pytest.mark.parametrize("form", [TABLE, IMAGES, BlockFormat(kind="table", shape=(1,), label=None, block_size=1)])
@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_a_block_holds_its_samples_then_zeros_and_its_checksum(form: BlockFormat, count: int) -> None:
    given = samples(form, count)
    table = block_table(given, form)
    blocks = -(-count // form.block_size)
    assert table.schema.equals(form.schema, check_metadata=True)
    assert table["batch_size"].to_pylist() == [min(form.block_size, count - b * form.block_size) for b in range(blocks)]
    assert set(table["feature_count"].to_pylist()) == {form.shape[0] if form.kind == "table" else 0}
    expected: dict[str, Any] = {form.values: given.values, "label": given.labels, "sample_id": given.ids}
    for name, values in expected.items():
        if values is None:
            assert name not in table.column_names
            continue
        stored = to_numpy(table, name).reshape(blocks * form.block_size, *values.shape[1:])
        np.testing.assert_array_equal(stored[:count], values)
        assert not stored[count:].any()
    tensors = [field.name for field in table.schema if is_tensor(field)]
    for row in range(blocks):
        data = b"".join(table[name][row].as_py() for name in tensors)
        assert table["batch_id"][row].as_py() == xxhash.xxh3_128_hexdigest(data)
    assert block_checksums(table) == table["batch_id"].to_pylist()


@pytest.mark.parametrize("form", [TABLE, IMAGES])
def test_a_file_holds_the_samples_in_the_order_asked_for_and_can_be_mapped(form: BlockFormat, tmp_path: Path) -> None:
    given, order = samples(form, 23), np.random.default_rng(0).permutation(23)
    path = tmp_path / "part.parquet"
    written = write_samples(str(path), [given], order, form)
    assert (written.bytes, written.digest) == (path.stat().st_size, storage.digest_of(str(path)))
    assert written.rows == -(-23 // form.block_size)
    table = pq.read_table(path)
    ids = to_numpy(table, "sample_id").reshape(-1)[:23]
    assert ids.tolist() == given.ids[order].tolist()
    with path.open("rb") as file:
        mapped = MappedFile(file, str(path))
    assert mapped.blocks == written.rows
    assert all(mapped.is_intact(block) for block in range(mapped.blocks))


def test_large_files_are_written_in_row_groups(tmp_path: Path) -> None:
    form = BlockFormat(kind="table", shape=(256,), label=None, block_size=4096)  # 4 MiB: 7 of them are within 32 MiB
    given = Samples(np.ones((4096 * 9 + 1, 256), np.float32), None, np.arange(4096 * 9 + 1))
    write_samples(str(tmp_path / "part.parquet"), [given], np.arange(len(given)), form)
    footer = pq.ParquetFile(tmp_path / "part.parquet").metadata
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [4, 4, 2]


@pytest.mark.parametrize("bounds", [[0, 9], [0, 4, 9], [0, 0, 4, 4, 9, 9]])
def test_samples_are_picked_through_all_parts(bounds: list[int]) -> None:
    whole = samples(TABLE, 9)
    parts = [whole.take(np.arange(start, end)) for start, end in pairwise(bounds)]
    index = np.array([8, 0, 3, 3, 4, 7])
    picked, expected = pick(parts, index), whole.take(index)
    np.testing.assert_array_equal(picked.values, expected.values)
    np.testing.assert_array_equal(picked.labels, expected.labels)
    np.testing.assert_array_equal(picked.ids, expected.ids)
