"""What becomes of odd values, and that no row vanishes."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.features.rows import AFTER_AS_OF, REASON, TIME, ColumnPlan, JudgedRows, RowPlan, judge

AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
NAN, INF = float("nan"), float("inf")
NEW_YEAR = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
FIRST_HALF_PAST_TWO = dt.datetime(2024, 10, 27, 0, 30, tzinfo=dt.UTC)
BERLIN = {"timezone": "Europe/Berlin"}
NO_REFUNDS = {"reject_negative": ("x",)}
MAYBE = {"required": False}
TEXT = {"dtype": pl.String}


def judge_one(value: object, kind: str, *, dtype: Any = None, time: str | None = None, **rest: Any) -> JudgedRows:
    """Judge a table of one value; the rest goes to its column's plan or to the table's."""
    of_column = {name: rest.pop(name) for name in ("required", "key_type", "dtype_wanted") if name in rest}
    of_column["dtype"] = of_column.pop("dtype_wanted", None)
    column = ColumnPlan(name="x", source_name="their x", kind=kind, **{"required": True, **of_column})  # type: ignore[arg-type]
    raw = pl.DataFrame({"their x": pl.Series([value], dtype=dtype)})
    return judge(raw, RowPlan(source="test", columns=(column,), time=time, **rest))


def fate(judged: JudgedRows) -> object:
    """The value that was kept, or the reason why not."""
    if judged.rejected.height:
        return judged.rejected[REASON].item()
    return judged.kept["x"].item() if judged.kept.height else dict(judged.filtered)


NULL, UNPARSABLE, NOT_FINITE = "null_x", "unparsable_x", "not_finite_x"
VALUES: list[tuple[str, object, str, dict[str, Any], object]] = [
    # why, value, kind of column, options, what becomes of it
    ("null key", None, "key", {"dtype": pl.Int64, "key_type": "int64"}, NULL),
    ("null number", None, "number", {"dtype": pl.Float64}, NULL),
    ("null time", None, "time", {"dtype": pl.Datetime("us", "UTC")}, NULL),
    ("null category", None, "category", {"dtype": pl.String}, NULL),
    ("null of any kind", None, "any", {"dtype": pl.Int8}, NULL),
    ("a column without any type", None, "time", {"dtype": pl.Null}, NULL),
    ("empty CSV key", "", "key", {}, NULL),
    ("blank CSV key", "  ", "key", {"key_type": "int64"}, NULL),
    ("blank key in a dictionary", "", "key", {"dtype": pl.Categorical}, NULL),
    ("empty CSV number", "", "number", {}, NULL),
    ("empty CSV time", "", "time", {}, NULL),
    ("null where it may be", None, "number", {"dtype": pl.Float64, "required": False}, None),
    ("no number", "twelve", "number", {}, UNPARSABLE),
    ("a decimal comma", "1,5", "number", {}, UNPARSABLE),
    ("no number where it may be null", "twelve", "number", MAYBE, None),
    ("empty where it may be null", "", "number", MAYBE, None),
    ("a number as text", " 3.5 ", "number", {}, 3.5),
    ("an exponent", "1e3", "number", {}, 1000.0),
    ("a number in a dictionary", "3.5", "number", {"dtype": pl.Categorical}, 3.5),
    ("a decimal", Decimal("3.50"), "number", {"dtype": pl.Decimal(9, 2)}, 3.5),
    ("an integer", 3, "number", {"dtype": pl.UInt8}, 3.0),
    ("NaN", NAN, "number", {}, NOT_FINITE),
    ("infinity", INF, "number", {}, NOT_FINITE),
    ("minus infinity", -INF, "number", {}, NOT_FINITE),
    ("NaN as text", "nan", "number", {}, NOT_FINITE),
    ("NaN where it may be null", NAN, "number", MAYBE, None),
    ("infinity where it may be null", -INF, "number", MAYBE, None),
    ("infinity as text where it may be null", "inf", "number", MAYBE, None),
    ("a refund", -3.5, "number", {}, -3.5),
    ("a refund, by choice", -3.5, "number", NO_REFUNDS, "negative_x"),
    ("a refund as text", "-3.5", "number", NO_REFUNDS, "negative_x"),
    ("a refund where null may be", -3.5, "number", NO_REFUNDS | MAYBE, "negative_x"),
    ("null where no refund may be", None, "number", NO_REFUNDS | MAYBE | TEXT, None),
    ("nothing paid", 0.0, "number", NO_REFUNDS, 0.0),
    ("an integer key", 7, "key", {"key_type": "int64", "dtype": pl.Int16}, 7),
    ("an integer key as text", "7", "key", {"key_type": "int64"}, 7),
    ("an integer key with spaces", " 7 ", "key", {"key_type": "int64"}, 7),
    ("a text key where integers are", "seven", "key", {"key_type": "int64"}, UNPARSABLE),
    ("a key beyond 64 bits", "9223372036854775808", "key", {"key_type": "int64"}, UNPARSABLE),
    ("a float key", 3.0, "key", {"key_type": "int64"}, 3),
    ("a float key as CSV has it", "3.0", "key", {"key_type": "int64"}, 3),
    ("a broken key", 3.7, "key", {"key_type": "int64"}, UNPARSABLE),
    ("a broken key as text", "3.7", "key", {"key_type": "int64"}, UNPARSABLE),
    ("a broken key where it may be null", 3.7, "key", {"key_type": "int64", "required": False}, None),
    ("a NaN key", NAN, "key", {"key_type": "int64"}, UNPARSABLE),
    ("an infinite key", INF, "key", {"key_type": "int64"}, UNPARSABLE),
    ("a float key where others are text", 3.0, "key", {}, "3"),
    ("a broken key where others are text", 3.7, "key", {}, UNPARSABLE),
    ("a NaN key where others are text", NAN, "key", {}, UNPARSABLE),
    ("leading zeros", "007", "key", {}, "007"),
    ("an integer where others are text", 7, "key", {"dtype": pl.Int32}, "7"),
    ("text in a dictionary", "a", "key", {"dtype": pl.Categorical}, "a"),
    ("a category", "books", "category", {}, "books"),
    ("a category by number", 3, "category", {}, "3"),
    ("a date", dt.date(2024, 1, 1), "time", {}, NEW_YEAR),
    ("a date in a zone", dt.date(2024, 1, 1), "time", BERLIN, NEW_YEAR - dt.timedelta(hours=1)),
    ("a naive time", dt.datetime(2024, 1, 1), "time", {}, NEW_YEAR),
    ("a naive time in a zone", dt.datetime(2024, 1, 1, 1), "time", BERLIN, NEW_YEAR),
    ("a time with a zone stays itself", NEW_YEAR, "time", {"timezone": "Asia/Tokyo"}, NEW_YEAR),
    ("a time of another zone", NEW_YEAR, "time", {"dtype": pl.Datetime("ns", "America/Lima")}, NEW_YEAR),
    ("clock forward: no such time", dt.datetime(2024, 3, 31, 2, 30), "time", BERLIN, UNPARSABLE),
    ("clock forward, as text", "2024-03-31T02:30:00", "time", BERLIN, UNPARSABLE),
    ("clock back: the earlier", dt.datetime(2024, 10, 27, 2, 30), "time", BERLIN, FIRST_HALF_PAST_TWO),
    ("clock back, as text", "2024-10-27 02:30", "time", BERLIN, FIRST_HALF_PAST_TWO),
    ("seconds", 1704067200, "time", {"epoch_unit": "s"}, NEW_YEAR),
    ("milliseconds", 1704067200_000, "time", {"epoch_unit": "ms"}, NEW_YEAR),
    ("microseconds", 1704067200_000_000, "time", {"epoch_unit": "us"}, NEW_YEAR),
    ("nanoseconds", 1704067200_000_000_999, "time", {"epoch_unit": "ns"}, NEW_YEAR),
    ("seconds as text", " 1704067200", "time", {"epoch_unit": "s"}, NEW_YEAR),
    ("milliseconds as text", "1704067200000", "time", {"epoch_unit": "ms"}, NEW_YEAR),
    ("microseconds as text", "1704067200000000", "time", {"epoch_unit": "us"}, NEW_YEAR),
    ("nanoseconds as text", "1704067200000000000", "time", {"epoch_unit": "ns"}, NEW_YEAR),
    ("no count", "soon", "time", {"epoch_unit": "s"}, UNPARSABLE),
    ("nanoseconds taken for seconds", 1704067200_000_000_000, "time", {"epoch_unit": "s"}, UNPARSABLE),
    ("no time", "soon", "time", {}, UNPARSABLE),
    ("no such day", "2024-02-30", "time", {}, UNPARSABLE),
    ("hour 24", "2024-01-01T24:00:00", "time", {}, UNPARSABLE),
    ("a US date", "01/02/2024", "time", {}, UNPARSABLE),
    ("two years at once", "2024-01-01 2024-01-01", "time", {}, UNPARSABLE),
    ("no event time, though it may be null", "soon", "time", MAYBE | {"time": "x"}, UNPARSABLE),
    ("null event time, though it may be null", None, "time", TEXT | MAYBE | {"time": "x"}, NULL),
    ("another time may be null", "soon", "time", MAYBE, None),
    ("before 1970", "1969-12-31", "time", {}, "too_early_x"),
    ("in the first year", "0001-01-01", "time", {}, "too_early_x"),
    ("at the earliest time", "2024-01-01", "time", {"earliest": NEW_YEAR}, NEW_YEAR),
    ("before the earliest time", "2023-12-31T23:59:59.999999", "time", {"earliest": NEW_YEAR}, "too_early_x"),
    ("at as_of", "2025-01-01T00:00:00Z", "time", {"time": "x", "as_of": AS_OF}, AS_OF),
    ("after as_of", "2025-01-01T00:00:00.000001Z", "time", {"time": "x", "as_of": AS_OF}, {AFTER_AS_OF: 1}),
]  # fmt: skip


@pytest.mark.parametrize(("why", "value", "kind", "options", "expected"), VALUES, ids=[case[0] for case in VALUES])
def test_value(why: str, value: object, kind: str, options: dict[str, Any], expected: object) -> None:
    judged = judge_one(value, kind, **options)
    assert fate(judged) == expected
    assert judged.kept.height + judged.rejected.height + sum(judged.filtered.values()) == 1


ISO = [
    "2024-01-01T00:00:00Z",
    "2024-01-01 00:00:00",
    "2024-01-01T00:00:00",
    "2024-01-01T00:00",
    "2024-01-01 00:00",
    "2024-01-01",
    "  2024-01-01T00:00:00z ",
    "2024-01-01T00:00Z",
    "2024-01-01T00:00:00.000Z",
    "2024-01-01T00:00:00.0000004",
    "2024-01-01T02:00:00+02:00",
    "2024-01-01 02:00:00+0200",
    "2024-01-01 02:00:00+02",
    "2024-01-01T02:00+02:00",
    "2023-12-31T18:30:00.000-05:30",
]


def test_forms_of_iso_8601_may_differ_row_by_row() -> None:
    plan = RowPlan(source="test", columns=(ColumnPlan(name="x", source_name="x", kind="time", required=True),))
    judged = judge(pl.DataFrame({"x": ISO}), plan)
    assert judged.rejected.rows() == []
    assert judged.kept.schema == {"x": TIME}
    assert judged.kept["x"].to_list() == [NEW_YEAR] * len(ISO)


def test_only_times_without_an_offset_are_of_the_zone() -> None:
    plan = RowPlan(
        source="test",
        columns=(ColumnPlan(name="x", source_name="x", kind="time", required=True),),
        timezone="Asia/Tokyo",
    )
    judged = judge(pl.DataFrame({"x": ["2024-01-01T09:00", "2024-01-01T01:00+01:00", "2024-01-01T00:00:00Z"]}), plan)
    assert judged.kept["x"].to_list() == [NEW_YEAR] * 3


def test_a_fraction_is_kept_to_the_microsecond() -> None:
    judged = judge_one("2024-01-01T00:00:00.123456789Z", "time")
    assert fate(judged) == NEW_YEAR + dt.timedelta(microseconds=123456)


ANY = [
    # CSV text, wanted type, what becomes of it; what doesn't fit is null
    ("2024-01-01", pl.Date(), dt.date(2024, 1, 1)),
    ("01.01.2024", pl.Date(), None),
    ("True", pl.Boolean(), True),
    ("FALSE", pl.Boolean(), False),
    ("yes", pl.Boolean(), None),
    (" 42", pl.Int64(), 42),
    ("4.2", pl.Int64(), None),
    ("4.2", pl.Float64(), 4.2),
    ("12:30", pl.Time(), dt.time(12, 30)),
    ("12:30:15", pl.Time(), dt.time(12, 30, 15)),
    ("2024-01-01 00:00:00", pl.Datetime("us"), NEW_YEAR),
    (42, pl.String(), "42"),
    (300, pl.Int8(), None),
]


@pytest.mark.parametrize(("value", "wanted", "expected"), ANY, ids=str)
def test_another_type_than_the_first_file_has(value: object, wanted: pl.DataType, expected: object) -> None:
    assert fate(judge_one(value, "any", dtype_wanted=wanted, required=False)) == expected


PLAN = RowPlan(
    source="transactions",
    columns=(
        ColumnPlan(name="customer_id", source_name="cust", kind="key", required=True, key_type="int64"),
        ColumnPlan(name="timestamp", source_name="when", kind="time", required=True),
        ColumnPlan(name="amount", source_name="sales", kind="number", required=True),
        ColumnPlan(name="discount", source_name="disc", kind="number"),
    ),
    time="timestamp",
    as_of=AS_OF,
    reject_negative=("amount",),
)


def test_the_first_reason_counts_and_the_row_stays_as_it_was() -> None:
    raw = pl.DataFrame(
        [
            ("1", "2024-01-01", "5", "x", "kept"),
            ("", "soon", "nan", "1", "everything is wrong"),
            ("2", "soon", "nan", "1", "all but the key"),
            ("3", "1960-01-01", "-1", "1", "too early comes before negative"),
            ("4", "2024-01-01", "-1", "1", "negative"),
            ("5", "2030-01-01", "", "1", "a row that is wrong isn't filtered"),
            ("6", "2030-01-01", "1", "1", "filtered"),
        ],
        schema=["cust", "when", "sales", "disc", "note"],
        orient="row",
    )
    judged = judge(raw, PLAN)
    assert judged.kept.rows() == [(1, NEW_YEAR, 5.0, None)]
    assert judged.rejected.drop(REASON).equals(raw[1:6])
    assert judged.rejected[REASON].to_list() == [
        "null_customer_id",
        "unparsable_timestamp",
        "too_early_timestamp",
        "negative_amount",
        "null_amount",
    ]
    assert judged.rejected_rows.to_list() == [1, 2, 3, 4, 5]
    assert judged.filtered == {AFTER_AS_OF: 1}


junk = st.sampled_from(["", " ", "x", "nan", "-inf", "1e999", "3.0", "-7", "0", "\x00", "٣", None])
mixed_rows = st.lists(
    st.tuples(
        junk | st.integers().map(str),
        junk | st.sampled_from([*ISO, "2030-01-01", "1950-01-01"]) | st.datetimes().map(str),
        junk | st.floats().map(str),
        junk | st.text(max_size=5),
    ),
    max_size=30,
)


@settings(max_examples=200)
@given(rows=mixed_rows)
def test_no_row_vanishes(rows: list[tuple[str | None, ...]]) -> None:
    raw = pl.DataFrame(rows, schema=dict.fromkeys(["cust", "when", "sales", "disc"], pl.String), orient="row")
    judged = judge(raw, PLAN)
    assert raw.height == judged.kept.height + judged.rejected.height + sum(judged.filtered.values())
    assert judged.rejected.columns == [*raw.columns, REASON]
    assert judged.rejected.drop(REASON).equals(raw[judged.rejected_rows.to_list()])
    assert judged.rejected[REASON].null_count() == 0
    required = judged.kept.drop("discount")
    assert sum(required.null_count().row(0)) == 0
    assert judged.kept["amount"].is_finite().all()
    assert (judged.kept["timestamp"] <= AS_OF).all()


@settings(max_examples=50)
@given(rows=mixed_rows, cut=st.integers(0, 30))
def test_a_row_is_judged_alike_in_whatever_part_it_comes(rows: list[tuple[str | None, ...]], cut: int) -> None:
    raw = pl.DataFrame(rows, schema=dict.fromkeys(["cust", "when", "sales", "disc"], pl.String), orient="row")
    whole, parts = judge(raw, PLAN), [judge(raw[:cut], PLAN), judge(raw[cut:], PLAN)]
    assert pl.concat([part.kept for part in parts]).equals(whole.kept)
    assert pl.concat([part.rejected for part in parts]).equals(whole.rejected)
    filtered = sum((Counter(part.filtered) for part in parts), Counter())
    assert filtered == Counter(whole.filtered)


def test_no_rows_and_no_required_columns() -> None:
    plan = RowPlan(source="test", columns=(ColumnPlan(name="x", source_name="x", kind="any"),))
    for raw in (pl.DataFrame({"x": [1, None]}), pl.DataFrame({"x": []}, schema={"x": pl.Int64})):
        judged = judge(raw, plan)
        assert judged.kept.equals(raw)
        assert judged.rejected.height == 0
