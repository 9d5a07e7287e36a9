"""Rows split by key and packed are the same rows."""

from __future__ import annotations

import datetime as dt

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.engine.partition import pack, split_by_key, unpack

integers = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5), max_size=60)
texts = st.lists(st.text(max_size=3), max_size=60)


def numbered(keys: list[int] | list[str], dtype: type[pl.DataType]) -> pl.DataFrame:
    return pl.DataFrame({"key": pl.Series(keys, dtype=dtype), "row": pl.Series(range(len(keys)), dtype=pl.Int64)})


frames = st.one_of(
    integers.map(lambda keys: numbered(keys, pl.Int64)),
    texts.map(lambda keys: numbered(keys, pl.String)),
    texts.map(lambda keys: numbered(keys, pl.Categorical)),
)


@given(frame=frames, buckets=st.integers(1, 12))
def test_the_buckets_are_the_rows(frame: pl.DataFrame, buckets: int) -> None:
    parts = split_by_key(frame, "key", buckets)
    assert len(parts) == buckets
    assert all(part.schema == frame.schema for part in parts)
    assert pl.concat(parts).sort("row").equals(frame)
    homes: dict[object, int] = {}
    for number, part in enumerate(parts):
        assert part["row"].is_sorted()  # rows keep their order
        for key in part["key"]:
            assert homes.setdefault(key, number) == number  # all rows of a key are in one bucket


@given(keys=texts, buckets=st.integers(1, 12), data=st.data())
def test_a_key_has_its_bucket_wherever_it_comes(keys: list[str], buckets: int, data: st.DataObject) -> None:
    """Neither the other rows nor the column's encoding decide: files and dimension tables meet in one bucket."""
    cut = data.draw(st.integers(0, len(keys)))
    whole = split_by_key(numbered(keys, pl.String), "key", buckets)
    part = split_by_key(numbered(keys[:cut], pl.Categorical), "key", buckets)
    for some, all_rows in zip(part, whole, strict=True):
        assert set(some["key"].cast(pl.String)) <= set(all_rows["key"])


def test_many_keys_spread_evenly() -> None:
    sizes = [part.height for part in split_by_key(numbered(list(range(100_000)), pl.Int64), "key", 16)]
    assert min(sizes) > 6_250 * 0.95
    assert max(sizes) < 6_250 * 1.05


def test_as_many_buckets_as_can_be() -> None:
    parts = split_by_key(numbered([1, 2, 1], pl.Int64), "key", 65_536)
    assert sorted(part.height for part in parts if part.height) == [1, 2]


HOMES = [
    (pl.Int64, [1, 2, 3, -1], [[-1], [2], [1, 3]]),
    (pl.String, ["a", "b", "ä", ""], [["b"], [""], ["a", "ä"]]),
]


@pytest.mark.parametrize(("dtype", "keys", "homes"), HOMES, ids=["integers", "text"])
def test_where_a_key_goes_never_changes(
    dtype: type[pl.DataType], keys: list[int] | list[str], homes: list[list[object]]
) -> None:
    """Golden: another bucket would be another file for the entity, and other bytes in every version."""
    assert [part["key"].to_list() for part in split_by_key(numbered(keys, dtype), "key", 3)] == homes


TIMES = pl.Series([dt.datetime(2024, 1, 1), None], dtype=pl.Datetime("us")).dt.replace_time_zone("UTC")
PACKED = [
    ("whole numbers of any size", pl.DataFrame({"x": [2**63 - 1, -(2**63), 0, None]})),
    ("small whole numbers", pl.DataFrame({"x": [1, -2, 300, None]})),
    ("no value at all", pl.DataFrame({"x": pl.Series([None, None], dtype=pl.Int64)})),
    ("no rows", pl.DataFrame({"x": pl.Series([], dtype=pl.Int64), "s": pl.Series([], dtype=pl.String)})),
    ("other integers", pl.DataFrame({"x": [1, 2], "y": [1, 2]}, schema={"x": pl.Int32, "y": pl.UInt64})),
    ("floats", pl.DataFrame({"x": [1.5, float("nan"), -0.0, float("inf"), None]})),
    ("text", pl.DataFrame({"x": ["ä", "", None]})),
    ("categories", pl.DataFrame({"x": pl.Series(["b", "a", None, "b"], dtype=pl.Categorical)})),
    ("times", pl.DataFrame({"x": TIMES, "d": [dt.date(2024, 1, 1), None], "t": [dt.time(12), None]})),
    ("booleans and lists", pl.DataFrame({"x": [True, None], "y": [[1, 2], []]})),
    ("a slice", pl.DataFrame({"x": range(1000), "s": ["long enough to stand apart"] * 1000}).slice(990, 5)),
    ("many chunks", pl.concat([pl.DataFrame({"x": [n]}) for n in range(5)], rechunk=False)),
]


@pytest.mark.parametrize(("why", "frame"), PACKED, ids=[case[0] for case in PACKED])
def test_packed_and_unpacked(why: str, frame: pl.DataFrame) -> None:
    [packed] = pack([frame])
    unpacked = unpack(packed.as_buffer())
    assert isinstance(unpacked, pl.DataFrame)
    assert unpacked.schema == frame.schema
    assert unpacked.equals(frame)


def test_small_whole_numbers_travel_light() -> None:
    small, large = numbered([1] * 10_000, pl.Int64), numbered([2**62] * 10_000, pl.Int64)
    assert pack([small]).nbytes < pack([large]).nbytes - 60_000


@given(frame=frames, buckets=st.integers(1, 5))
def test_split_packed_and_unpacked(frame: pl.DataFrame, buckets: int) -> None:
    packed = pack(split_by_key(frame, "key", buckets))
    parts = [unpack(part.as_buffer()) for part in packed]
    assert pl.concat(parts).sort("row").equals(frame)


def test_arrow_tables_and_bytes_travel_too_and_each_begins_where_it_can_be_read_in_place() -> None:
    table = pa.table({"x": pa.array([b"abc", b"def"], pa.binary(3)), "y": [1, None]}).replace_schema_metadata(
        {"a": "b"}
    )
    packed = pack([b"note", table, b"", numbered([1, 2], pl.Int64), table.slice(0, 0)])
    values = [value.as_buffer() for value in packed]
    assert all((value.address - values[0].address) % 8 == 0 for value in values)
    assert values[0].to_pybytes() == b"note" + bytes(4)
    assert unpack(values[1]).equals(table, check_metadata=True)
    assert len(values[2]) == 0
    assert unpack(values[3]).equals(numbered([1, 2], pl.Int64))
    assert unpack(values[4]).schema.equals(table.schema, check_metadata=True)
    column = unpack(values[1])["x"].chunk(0).buffers()[1]
    assert values[1].address <= column.address < values[1].address + len(values[1]), "it was copied"
