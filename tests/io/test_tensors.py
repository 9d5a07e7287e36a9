"""Tensor columns: raw bytes that come back bit for bit, without a copy wherever the memory allows it."""

from __future__ import annotations

import io
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.io.errors import InputError
from tasks.io.storage import write_parquet
from tasks.io.tensors import (
    DTYPES,
    TENSOR,
    AnyArray,
    TensorSpec,
    as_fixed_shape_tensors,
    is_tensor,
    parquet_settings,
    ragged_array,
    tensor_array,
    tensor_field,
    tensor_spec,
    to_numpy,
    to_ragged,
    to_torch,
)


@st.composite
def tensors(draw: st.DrawFn) -> AnyArray:
    """Arrays (n, *shape) of any type and byte order, some of them strided."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES))).newbyteorder(draw(st.sampled_from("<>")))
    shape = draw(st.tuples(st.integers(0, 6), *[st.integers(1, 3)] * draw(st.integers(0, 3))))
    values = draw(hnp.arrays(dtype, shape))
    match draw(st.sampled_from(["plain", "fortran", "reversed", "every other"])):
        case "fortran":
            return np.asfortranarray(values)
        case "reversed":
            return values[::-1]
        case "every other":
            return np.repeat(values, 2, axis=0)[::2]
    return values


def column(values: AnyArray, name: str = "x", nullable: bool = False) -> pa.Table:
    field = tensor_field(name, values.shape[1:], values.dtype, nullable=nullable)
    return pa.table([tensor_array(values)], schema=pa.schema([field]))


def rechunked(table: pa.Table, cuts: list[int]) -> pa.Table:
    """The same rows in chunks, empty ones among them, each a slice of a larger buffer."""
    ends = [0, *sorted(min(cut, table.num_rows) for cut in cuts), table.num_rows]
    parts = [table.slice(start, end - start) for start, end in itertools.pairwise(ends)]
    return pa.concat_tables(parts) if parts else table


def same(found: AnyArray, wanted: AnyArray) -> None:
    assert found.shape == wanted.shape
    assert found.dtype.newbyteorder("=") == wanted.dtype.newbyteorder("=")
    assert found.tobytes() == wanted.astype(wanted.dtype.newbyteorder("<")).tobytes()  # also the bits of NaN


@settings(max_examples=200)
@given(values=tensors(), start=st.integers(0, 4), cuts=st.lists(st.integers(0, 6), max_size=3))
def test_every_array_comes_back(values: AnyArray, start: int, cuts: list[int]) -> None:
    table = rechunked(column(values).slice(start), cuts)
    same(to_numpy(table, "x"), values[start:])
    batches = [to_numpy(batch, "x") for batch in table.to_batches()]
    same(np.concatenate([*batches, to_numpy(table.slice(0, 0), "x")]), values[start:])
    same(to_torch(table, "x").numpy(), values[start:])


@settings(max_examples=100)
@given(values=tensors(), cuts=st.lists(st.integers(0, 6), max_size=3))
def test_every_array_survives_parquet(values: AnyArray, cuts: list[int]) -> None:
    table = rechunked(column(values), cuts)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **parquet_settings(table.schema))
    read = pq.read_table(buffer)
    assert read.schema.equals(table.schema, check_metadata=True)
    same(to_numpy(read, "x"), values)


@settings(max_examples=100)
@given(values=tensors(), start=st.integers(0, 4), cuts=st.lists(st.integers(0, 6), max_size=3))
def test_arrows_own_tensors_hold_the_same(values: AnyArray, start: int, cuts: list[int]) -> None:
    table = as_fixed_shape_tensors(rechunked(column(values).slice(start), cuts))
    parts = [chunk.to_numpy_ndarray() for chunk in table["x"].chunks if len(chunk)]
    wanted = values[start:]
    if wanted.dtype == bool:
        wanted = wanted.astype(np.uint8)
    same(np.concatenate([*parts, np.empty((0, *wanted.shape[1:]), wanted.dtype)]), wanted)
    table.validate(full=True)


IMAGES = np.arange(6 * 3 * 4 * 5, dtype=np.uint8).reshape(6, 3, 4, 5)


def address(values: AnyArray) -> int:
    return int(values.__array_interface__["data"][0])


def test_nothing_is_copied_that_need_not_be() -> None:
    table = column(IMAGES)
    assert address(to_numpy(table, "x")) == address(IMAGES)
    assert address(to_numpy(table.slice(2, 3), "x")) == address(IMAGES[2])
    assert to_torch(table.slice(2, 3), "x").data_ptr() == address(IMAGES[2])
    own = as_fixed_shape_tensors(table.slice(2, 3))["x"].chunk(0).to_numpy_ndarray()
    assert address(own) == address(IMAGES[2])
    empty_first = pa.concat_tables([table.slice(0, 0), table.slice(1)])
    assert address(to_numpy(empty_first, "x")) == address(IMAGES[1])
    two = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert address(to_numpy(two, "x")) != address(IMAGES)


def test_views_outlive_the_table_and_cant_be_written_to() -> None:
    table = column(IMAGES.copy())
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    tables = (table, rechunked(table, [2]), table.slice(0, 0), pq.read_table(buffer))
    views = [to_numpy(one, "x") for one in tables]
    torched = to_torch(table, "x")
    del table, tables
    same(views[0], IMAGES)
    same(torched.numpy(), IMAGES)
    for view in views:
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0


def test_torch_has_nothing_to_warn_of() -> None:
    buffer = io.BytesIO()
    pq.write_table(column(IMAGES), buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_torch(pq.read_table(buffer), "x").shape == IMAGES.shape


def test_numbers_at_odd_addresses_reach_torch() -> None:
    """A file mapped into memory has its pages where they are."""
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = pa.py_buffer(b"\0" + wanted.tobytes()).slice(1)
    field = tensor_field("x", (3,), "float32")
    table = pa.table([pa.FixedSizeBinaryArray.from_buffers(field.type, 2, [None, raw])], schema=pa.schema([field]))
    found = to_torch(table, "x")
    assert found.data_ptr() % 4 == 0
    same(found.numpy(), wanted)


def test_the_field_says_what_it_holds() -> None:
    field = tensor_field("image", (3, 224, 224), np.uint8, ("channel", "height", "width"))
    assert (field.type, field.nullable) == (pa.binary(150_528), False)
    assert json.loads(field.metadata[TENSOR]) == {
        "shape": [3, 224, 224],
        "dtype": "uint8",
        "byteorder": "little",
        "dimensions": ["channel", "height", "width"],
    }
    spec = tensor_spec(field)
    assert spec == TensorSpec((3, 224, 224), "uint8", ("channel", "height", "width"))
    assert (spec.size, spec.width) == (150_528, 150_528)
    assert is_tensor(field)
    assert tensor_spec(tensor_field("x", (), ">f4")) == TensorSpec((), "float32")
    assert not is_tensor(pa.field("x", pa.binary(4)))
    assert not is_tensor(pa.field("x", pa.int32(), metadata=field.metadata))


def test_stored_bytes_are_little_endian_whatever_came() -> None:
    values = np.array([[1, 256]], dtype=">u2")
    assert tensor_array(values)[0].as_py() == b"\x01\x00\x00\x01"


def described(**changes: Any) -> pa.Table:
    """A column whose metadata says something else than is there."""
    said = {"shape": [2], "dtype": "uint8", "byteorder": "little"} | changes
    return with_metadata(json.dumps(said).encode())


def with_metadata(text: bytes | None) -> pa.Table:
    field = pa.field("x", pa.binary(2), metadata={TENSOR: text} if text is not None else None)
    return pa.table([pa.array([b"ab"], pa.binary(2))], schema=pa.schema([field]))


with_null = pa.table(
    [pa.array([b"ab", None], pa.binary(2))], schema=pa.schema([tensor_field("x", (2,), "uint8", nullable=True)])
)
WRONG: list[tuple[str, Callable[[], object], str]] = [
    ("no such column", lambda: to_numpy(column(IMAGES), "y"), "there is no column 'y': the table has x"),
    ("a name twice", lambda: to_numpy(pa.table([[1], [2]], names=["x", "x"]), "x"), "2 columns are named 'x'"),
    ("text", lambda: to_numpy(pa.table({"x": ["1"]}), "x"), "is no column of tensors.*take the schema of the file"),
    ("missing number", lambda: to_numpy(pa.table({"x": [1, None]}), "x"), "holds 1 null"),
    ("metadata lost", lambda: to_numpy(with_metadata(None), "x"), "is no column of tensors or numbers"),
    ("metadata is no JSON", lambda: to_numpy(with_metadata(b"?"), "x"), "doesn't describe a tensor"),
    ("metadata is a list", lambda: to_numpy(with_metadata(b"[1]"), "x"), "doesn't describe a tensor"),
    ("metadata without a shape", lambda: to_numpy(with_metadata(b"{}"), "x"), "doesn't describe a tensor"),
    ("a type that nobody has", lambda: to_numpy(described(dtype="float7"), "x"), "doesn't describe a tensor"),
    ("another width", lambda: to_numpy(described(shape=[3]), "x"), "take 3 bytes, but its values have 2"),
    ("big-endian", lambda: to_numpy(described(byteorder="big"), "x"), "byte order 'big' is unknown"),
    ("a null", lambda: to_numpy(with_null, "x"), "holds 1 null .the first in row 1 of its chunk"),
    ("a null, for Arrow", lambda: as_fixed_shape_tensors(with_null), "holds 1 null"),
    ("an empty dimension", lambda: tensor_field("x", (3, 0), "uint8"), "every dimension must be at least 1"),
    ("a negative dimension", lambda: tensor_field("x", (-1, -3), "uint8"), "every dimension must be at least 1"),
    ("too large", lambda: tensor_field("x", (2**29,), "float32"), "takes 2,147,483,648 bytes"),
    ("names too few", lambda: tensor_field("x", (3, 4), "uint8", ("channel",)), "1 names for 2 dimensions"),
    ("text", lambda: tensor_array(np.array([["a"]])), "tensors of str32 can't be stored"),
    ("complex", lambda: tensor_field("x", (3,), "complex64"), "tensors of complex64 can't be stored"),
    ("times", lambda: tensor_field("x", (3,), "datetime64[s]"), "can't be stored"),
    ("one number", lambda: tensor_array(np.float32(1) + np.zeros(())), "no column of tensors"),
]


@pytest.mark.parametrize(("why", "act", "message"), WRONG, ids=[case[0] for case in WRONG])
def test_refused(why: str, act: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        act()


def test_a_slice_without_the_null_is_good() -> None:
    same(to_numpy(with_null.slice(0, 1), "x"), np.array([[97, 98]], np.uint8))


def mixed(rows: int = 10) -> pa.Table:
    """An image, a small tensor, an encoded image, and columns of other kinds."""
    images = np.random.default_rng(0).integers(0, 256, (rows, 3, 64, 64), dtype=np.uint8)
    schema = pa.schema(
        [
            pa.field("id", pa.string()),
            tensor_field("image", (3, 64, 64), np.uint8),
            tensor_field("label", (4,), np.float32),
            pa.field("jpeg", pa.binary()),
            pa.field("score", pa.float32()),
            pa.field("issues", pa.list_(pa.string())),
            pa.field("where", pa.struct([("x.y", pa.int32())])),
        ]
    )
    columns = [
        pa.array([f"image_{n}" for n in range(rows)]),
        tensor_array(images),
        tensor_array(np.eye(4, dtype=np.float32)[np.arange(rows) % 4]),
        pa.array([bytes([n % 256]) * 100 for n in range(rows)], pa.binary()),
        pa.array(np.linspace(0, 1, rows), pa.float32()),
        pa.array([["dark"] * (n % 3) for n in range(rows)]),
        pa.array([{"x.y": n} for n in range(rows)], pa.struct([("x.y", pa.int32())])),
    ]
    return pa.table(columns, schema=schema)


def test_images_lie_raw_in_the_file_and_other_columns_are_packed(tmp_path: Path) -> None:
    table = mixed(500)
    settings = parquet_settings(table.schema)
    settings["row_group_size"] = 128
    written = write_parquet(table, str(tmp_path / "x.parquet"), **settings)
    assert pq.read_table(written.uri).equals(table)
    metadata = pq.ParquetFile(written.uri).metadata
    assert metadata.num_row_groups == 4
    for group in range(4):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            raw = chunk.path_in_schema in ("image", "label", "jpeg")
            assert chunk.compression == ("UNCOMPRESSED" if raw else "ZSTD"), chunk.path_in_schema
            assert chunk.has_dictionary_page != raw, chunk.path_in_schema
            assert chunk.is_stats_set != raw, chunk.path_in_schema


def test_the_tensors_of_a_row_group_are_one_piece_of_the_file(tmp_path: Path) -> None:
    """What lets a reader map a file into memory and pick rows: they end where their column chunk ends."""
    table = mixed(300)
    options = parquet_settings(table.schema) | {"row_group_size": 64}
    written = write_parquet(table, str(tmp_path / "x.parquet"), **options)
    mapped = np.memmap(written.uri, dtype=np.uint8, mode="r")
    metadata = pq.ParquetFile(written.uri).metadata
    wanted, start = to_numpy(table, "image"), 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        chunk = metadata.row_group(group).column(1)
        end = chunk.data_page_offset + chunk.total_compressed_size
        found = mapped[end - rows * 12_288 : end].reshape(rows, 3, 64, 64)
        assert np.array_equal(found, wanted[start : start + rows])
        start += rows
    assert start == 300


def test_small_tensors_are_one_page_too(tmp_path: Path) -> None:
    values = np.arange(100_000 * 5, dtype=np.float32).reshape(-1, 5)
    written = write_parquet(column(values), str(tmp_path / "x.parquet"), **parquet_settings(column(values).schema))
    metadata = pq.ParquetFile(written.uri).metadata
    chunk = metadata.row_group(0).column(0)
    assert metadata.num_row_groups == 1
    end = chunk.data_page_offset + chunk.total_compressed_size
    raw = Path(written.uri).read_bytes()[end - values.nbytes : end]
    assert raw == values.tobytes()


SIZES = [
    # fields, rows in a group
    ([tensor_field("x", (3, 224, 224), "uint8")], 128),
    ([tensor_field("x", (3, 224, 224), "float32"), tensor_field("label", (10,), "uint8")], 32),
    ([tensor_field("x", (3, 4096, 4096), "float32")], 1),
    ([tensor_field("x", (20,), "float32")], 262_144),
    ([tensor_field("x", (), "uint8")], 1 << 20),
    ([pa.field("x", pa.binary())], 1024),
    ([pa.field("id", pa.int64())], 1 << 20),
    ([], 1 << 20),
]


@pytest.mark.parametrize(("fields", "rows"), SIZES)
def test_row_groups_take_up_to_32_mib(fields: list[pa.Field], rows: int) -> None:
    assert parquet_settings(pa.schema(fields))["row_group_size"] == rows


@given(features=st.integers(1, 10_000), batch_size=st.integers(1, 20_000))
def test_row_groups_of_samples_are_whole_batches(features: int, batch_size: int) -> None:
    schema = pa.schema([tensor_field("x", (features,), "float32"), pa.field("id", pa.int64(), nullable=False)])
    settings = parquet_settings(schema, batch_size=batch_size)
    rows, row_bytes = settings["row_group_size"], 4 * features + 8
    assert rows % batch_size == 0
    assert rows == batch_size or rows * row_bytes <= 32 << 20
    assert settings["data_page_size"] >= rows * row_bytes
    assert (settings["compression"], settings["use_dictionary"]) == ("none", False)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float16", "float32", "float64"])
def test_plain_numbers_are_tensors_without_dimensions(dtype: str) -> None:
    values = np.arange(9).astype(dtype)
    table = pa.table({"x": pa.chunked_array([values[:4], values[4:]])}).slice(1, 7)
    found = to_numpy(table, "x")
    assert (found.dtype, found.flags.writeable) == (np.dtype(dtype), False)
    assert found.tolist() == values[1:8].tolist()
    assert tensor_spec(table.schema.field("x")) == TensorSpec((), dtype)


def test_encoded_images_can_say_how_large_they_are() -> None:
    schema = pa.schema([pa.field("jpeg", pa.binary())])
    assert parquet_settings(schema, value_bytes=1 << 20)["row_group_size"] == 32


@pytest.mark.parametrize("names", [["image"], ["id"], ["id", "image"], ["issues"], ["where", "image"]])
def test_settings_fit_any_choice_of_columns(names: list[str], tmp_path: Path) -> None:
    table = mixed().select(names)
    written = write_parquet(table, str(tmp_path / "x.parquet"), **parquet_settings(table.schema))
    assert pq.read_table(written.uri).equals(table)


def test_other_libraries_read_plain_values(tmp_path: Path) -> None:
    table = mixed()
    path = write_parquet(table, str(tmp_path / "x.parquet"), **parquet_settings(table.schema)).uri
    wanted = [value.as_py() for value in table["image"]]
    assert pd.read_parquet(path)["image"].tolist() == wanted
    assert pl.read_parquet(path)["image"].to_list() == wanted
    assert [row[0] for row in duckdb.sql(f"select image from '{path}' order by score").fetchall()] == wanted


def test_columns_that_are_no_tensors_stay_as_they_are() -> None:
    table = mixed()
    own = as_fixed_shape_tensors(table)
    others = ["id", "jpeg", "score", "issues", "where"]
    assert own.select(others).equals(table.select(others))
    assert own.column_names == table.column_names
    assert own.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), (3, 64, 64))
    assert not own.schema.field("image").nullable


def test_names_of_dimensions_and_other_metadata_stay() -> None:
    field = tensor_field("x", (2, 3), "uint8", ("row", "column"))
    field = field.with_metadata(field.metadata | {b"source": b"scan"})
    table = pa.table([tensor_array(np.zeros((1, 2, 3), np.uint8))], schema=pa.schema([field]))
    own = as_fixed_shape_tensors(table).schema.field("x")
    assert own.type.dim_names == ["row", "column"]
    assert own.metadata == {b"source": b"scan"}


def test_arrows_own_tensors_become_arrays_in_one_go() -> None:
    values = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
    own = as_fixed_shape_tensors(rechunked(column(values), [2, 5]))
    combined = own["x"].combine_chunks()
    combined = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
    same(combined.to_numpy_ndarray(), values)


def test_vectors_of_any_length_come_back_from_any_slice_and_chunk() -> None:
    values = [np.arange(size, dtype=np.int32) - 3 for size in (0, 5, 1, 0, 7)]
    field = tensor_field("x", (-1,), np.int32)
    assert tensor_spec(field) == TensorSpec((-1,), "int32")
    assert (tensor_spec(field).variable, tensor_spec(field).width) == (True, 4)
    column = ragged_array(np.concatenate(values), np.cumsum([0, *map(len, values)]))
    table = pa.Table.from_arrays([column], schema=pa.schema([field]))
    for rows in (table, pa.concat_tables([table.slice(0, 2), table.slice(2)]), table.slice(1, 3), table.slice(5)):
        found, starts = to_ragged(rows, "x")
        assert found.dtype == np.int32
        texts = rows["x"].to_pylist()
        assert [found[a:b].tobytes() for a, b in itertools.pairwise(starts.tolist())] == texts
    assert as_fixed_shape_tensors(table).equals(table)
    with pytest.raises(InputError, match="column 'x' holds vectors of any length, which are no array"):
        to_numpy(table, "x")


def test_what_are_no_vectors_of_any_length_is_refused() -> None:
    field = tensor_field("x", (-1,), np.int32, nullable=True)
    for values, message in (
        ([b"1234", b"12345"], "the value in row 1 isn't whole int32"),
        ([b"1234", None], "column 'x' holds 1 null"),
    ):
        table = pa.Table.from_arrays([pa.array(values, pa.large_binary())], schema=pa.schema([field]))
        with pytest.raises(InputError, match=message):
            to_ragged(table, "x")
    with pytest.raises(InputError, match=r"column 'y' holds int64 of shape \(\), no vectors of any length"):
        to_ragged(pa.table({"y": [1]}), "y")
    for metadata, kind in (
        (field.metadata, pa.binary(4)),
        (tensor_field("x", (4,), np.uint8).metadata, pa.large_binary()),
    ):
        with pytest.raises(InputError, match=r"column 'x': shape .* doesn't fit values of"):
            tensor_spec(pa.field("x", kind, metadata=metadata))
