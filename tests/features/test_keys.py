"""Which values are the same key: one rule for the flows, the join, look-ups and Redis."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from tasks.features.rows import as_key, key_type, read_keys
from tasks.io.errors import InputError

REFUSED = object()
BIG = 2**53 + 1  # the least whole number that no float64 is

# Given values, and the keys that they are among integers and among text.
CASES: list[tuple[str, Any, Any, Any]] = [
    ("integers", [7, -7, None], [7, -7, None], ["7", "-7", None]),
    ("an integer that no float is", [BIG], [BIG], [str(BIG)]),
    ("unsigned", pa.array([7], pa.uint64()), [7], ["7"]),
    ("unsigned beyond 64 bits with a sign", pa.array([2**63], pa.uint64()), REFUSED, [str(2**63)]),
    ("Python's, beyond 64 bits", [2**63], REFUSED, REFUSED),
    ("whole floats, and NaN for none", [7.0, float("nan"), None], [7, None, None], ["7", None, None]),
    ("a broken float", [7.5], REFUSED, REFUSED),
    ("an infinite float", [float("inf")], REFUSED, REFUSED),
    ("the largest exact float", [2.0**53 - 1], [2**53 - 1], [str(2**53 - 1)]),
    ("a float that may be two numbers", [2.0**53], REFUSED, REFUSED),
    ("a narrow float that may be two numbers", pa.array([2.0**24], pa.float32()), REFUSED, REFUSED),
    ("numpy's narrow float", [np.float32(2**24)], REFUSED, REFUSED),
    ("numpy's scalars", [np.int64(7), np.uint8(8)], [7, 8], ["7", "8"]),
    ("pandas' missing value", [7, pd.NA], [7, None], ["7", None]),
    ("whole decimals", [Decimal("7.00"), Decimal(BIG)], [7, BIG], ["7", str(BIG)]),
    ("a decimal without a scale beyond 64 bits", [Decimal(2**63)], REFUSED, REFUSED),
    ("a broken decimal", [Decimal("7.5")], REFUSED, REFUSED),
    ("leading zeros", ["007", "+7"], [7, 7], ["007", "+7"]),
    ("text with spaces or as CSV has it", [" 7 ", "7.0"], [7, 7], [" 7 ", "7.0"]),
    ("an exact number as text", [str(BIG)], [BIG], [str(BIG)]),
    ("text beyond 64 bits", [str(2**63)], REFUSED, [str(2**63)]),
    ("text that is no number", ["seven"], REFUSED, ["seven"]),
    ("no text", [""], REFUSED, [""]),
    ("underscores", ["1_0"], REFUSED, ["1_0"]),
    ("bytes", [b"7"], [7], ["7"]),
    ("a dictionary", pa.array(["7"]).dictionary_encode(), [7], ["7"]),
    ("a boolean", [True], REFUSED, REFUSED),
    ("numpy's boolean among integers", [1, np.True_], REFUSED, REFUSED),
    ("a column of booleans", pa.array([True]), REFUSED, REFUSED),
    ("a date, whose days would be a number", [dt.date(1970, 1, 8)], REFUSED, ["1970-01-08"]),
    ("a time", [dt.datetime(1970, 1, 1)], REFUSED, REFUSED),
    ("values of two types", [1, "a"], REFUSED, REFUSED),
    ("a list", [[1]], REFUSED, REFUSED),
    ("nothing", [], [], []),
    ("none only", [None], [None], [None]),
]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_what_is_the_same_key(case: tuple[str, Any, Any, Any], kind: pa.DataType) -> None:
    _, given, as_integer, as_text = case
    expected = as_integer if kind == pa.int64() else as_text
    if expected is REFUSED:
        with pytest.raises(InputError, match=rf"^keys of 'a' (are of type {kind}|must be values of one type)"):
            read_keys(given, kind, "keys of 'a'")
    else:
        found = read_keys(given, kind, "keys of 'a'")
        assert (found.type, found.to_pylist()) == (kind, expected)


@pytest.mark.parametrize("wanted", ["int64", "string"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_flows_rows_are_read_by_the_same_rule(case: tuple[str, Any, Any, Any], wanted: Any) -> None:
    _, given, as_integer, as_text = case
    try:
        array = given if isinstance(given, pa.Array) else pa.array(given)
    except (pa.ArrowInvalid, OverflowError):
        pytest.skip("no column of a file")
    frame = pl.DataFrame({"key": pl.Series(array)})
    if frame.schema["key"] in (pl.Boolean, pl.Datetime("us")) or frame.schema["key"] == pl.List:
        pytest.skip("refused by its type, before a row is read")
    if given and isinstance(given, list) and any(isinstance(one, np.bool_) for one in given):
        pytest.skip("no column of a file")
    expected = as_integer if wanted == "int64" else as_text
    found = frame.select(as_key(pl.col("key"), frame.schema["key"], wanted))["key"].to_list()
    assert found == ([None] * len(array) if expected is REFUSED else expected)


def test_errors_name_values_rows_and_the_cure() -> None:
    with pytest.raises(InputError, match=r"can't be 9007199254740992.0 \(row 1\); from 9007199254740992 on a Float64"):
        read_keys([1.0, 2.0**53], pa.int64(), "keys")
    with pytest.raises(InputError, match=r"'a' \(row 0\), 'b' \(row 1\), 'c' \(row 2\) and 2 more"):
        read_keys(list("abcde"), pa.int64(), "keys")


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (pa.int32(), [7.0], [7]),
        (pa.int32(), [2**31], REFUSED),
        (pa.float64(), [BIG], REFUSED),  # a store whose keys are floats
        (pa.float64(), [7, None], [7.0, None]),
        (pa.bool_(), [True], [True]),
        (pa.bool_(), [1], REFUSED),
        (pa.dictionary(pa.int32(), pa.string()), ["a", 7.0][:1], ["a"]),
        (pa.date32(), [dt.date(2024, 1, 1)], [dt.date(2024, 1, 1)]),
    ],
)
def test_keys_of_other_types_are_exact_or_refused(kind: pa.DataType, given: list[Any], expected: Any) -> None:
    if expected is REFUSED:
        with pytest.raises(InputError, match=r"keys (are of type|must be)"):
            read_keys(given, kind, "keys")
    else:
        assert read_keys(given, kind, "keys").to_pylist() == expected


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([pa.int8(), pa.float32(), pa.decimal128(5, 2), pa.null()], "int64"),
        ([pa.int64(), pa.string()], "string"),
        ([pa.null()], "string"),
        ([], "string"),
        ([pa.date32()], "string"),
    ],
)
def test_a_key_is_an_integer_if_every_column_of_it_can_be(kinds: list[pa.DataType], expected: str) -> None:
    assert key_type(kinds) == expected
