"""Parquet files written piece by piece: whole or not at all, and described by exactly their bytes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3

from tasks.io import storage
from tasks.io.errors import ConfigError
from tasks.io.stream import ParquetStream
from tasks.store import layout

SCHEMA = pa.schema([("id", pa.int64()), ("bytes", pa.binary(1000))])


def piece(start: int, count: int) -> pa.Table:
    rng = np.random.default_rng(start)
    values = pa.py_buffer(rng.integers(0, 256, count * 1000, dtype=np.uint8))
    binary = pa.FixedSizeBinaryArray.from_buffers(pa.binary(1000), count, [None, values])
    return pa.table({"id": np.arange(start, start + count), "bytes": binary}, schema=SCHEMA)


def read(uri: str) -> pa.Table:
    with storage.open_input(uri) as source:
        return pq.read_table(source)


def everything(uri: str) -> list[str]:
    return [info.uri for info in storage.list_files(uri, include_hidden=True)]


# 60 MB go to S3 in several parts, 12 MB are more than is held back before the disk is asked to begin.
@pytest.mark.parametrize("counts", [[], [0], [1], [10, 20, 5], [4000] * 3, [10_000] * 6])
def test_pieces_are_one_file(root: str, counts: list[int]) -> None:
    uri = layout.join(root, "a", "part.parquet")
    pieces = [piece(sum(counts[:number]), count) for number, count in enumerate(counts)]
    with ParquetStream(uri, SCHEMA) as stream:
        for table in pieces:
            stream.write(table)
    wanted = pa.concat_tables(pieces) if pieces else SCHEMA.empty_table()
    assert read(uri).equals(wanted)
    data = storage.read_bytes(uri)
    written = stream.written
    assert (written.uri, written.rows, written.bytes) == (storage.normalise(uri), sum(counts), len(data))
    assert written.digest == f"blake3:{blake3(data).hexdigest()}"
    assert everything(root) == [storage.normalise(uri)]


def test_settings_and_pieces_give_row_groups(tmp_path) -> None:
    uri = str(tmp_path / "x.parquet")
    with ParquetStream(uri, SCHEMA, row_group_size=8, compression={"id": "zstd"}, use_dictionary=["id"]) as stream:
        stream.write(piece(0, 20))
        stream.write(piece(20, 3))
    file = pq.ParquetFile(uri)
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [8, 8, 4, 3]
    assert file.metadata.row_group(0).column(1).compression == "UNCOMPRESSED"


def test_a_block_that_fails_leaves_nothing(root: str) -> None:
    uri = layout.join(root, "part.parquet")

    def write() -> None:
        with ParquetStream(uri, SCHEMA) as stream:
            for number in range(7):
                stream.write(piece(number, 10_000))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write()
    assert everything(root) == []


def test_another_schema_leaves_nothing(root: str) -> None:
    uri = layout.join(root, "part.parquet")

    def write() -> None:
        with ParquetStream(uri, SCHEMA) as stream:
            stream.write(pa.table({"other": [1]}))

    with pytest.raises(ValueError, match="schema"):
        write()
    assert everything(root) == []


def test_the_old_file_stays_until_the_new_one_is_whole(root: str) -> None:
    uri = layout.join(root, "part.parquet")
    storage.write_parquet(piece(0, 3), uri)
    with ParquetStream(uri, SCHEMA) as stream:
        stream.write(piece(0, 12_000))
        assert read(uri).num_rows == 3
    assert read(uri).num_rows == 12_000


def test_a_bucket_that_isnt_there(s3_url: str) -> None:
    def write() -> None:
        with ParquetStream("s3://no-such-bucket-here/x.parquet", SCHEMA) as stream:
            stream.write(piece(0, 3))

    with pytest.raises(ConfigError, match=r"no-such-bucket-here.*doesn't exist"):
        write()
