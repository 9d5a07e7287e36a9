"""Profiles merge in any order, agree with pandas, and say no more than is known."""

import datetime as dt
import itertools
import math
import pickle
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.io.errors import InputError
from tasks.quality.profile import TableProfile, merge_profiles, profile_table
from tasks.store.manifest import ColumnProfile

UTC = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema(
    {
        "price": pa.float64(),
        "quantity": pa.int32(),
        "loyal": pa.bool_(),
        "store": pa.string(),
        "at": UTC,
        "tags": pa.list_(pa.string()),
    }
)
rows = st.fixed_dictionaries(
    {
        "price": st.none() | st.floats(),
        "quantity": st.none() | st.integers(-(2**31), 2**31 - 1),
        "loyal": st.none() | st.booleans(),
        "store": st.none() | st.text(max_size=3),
        "at": st.none() | st.datetimes(timezones=st.just(dt.UTC)),
        "tags": st.none() | st.lists(st.text(max_size=2), max_size=2),
    }
)


def profile_of(values: Sequence[object], kind: pa.DataType | None = None) -> ColumnProfile:
    return profile_table(pa.table({"x": pa.array(values, kind)})).columns()["x"]


@given(records=st.lists(rows, max_size=20), cuts=st.lists(st.integers(0, 20), max_size=4), order=st.randoms())
def test_blocks_and_their_order_leave_no_trace(
    records: list[dict[str, object]], cuts: list[int], order: object
) -> None:
    table = pa.Table.from_pylist(records, SCHEMA)
    ends = sorted({0, len(records), *(min(cut, len(records)) for cut in cuts)})
    blocks = [table.slice(a, b - a) for a, b in itertools.pairwise(ends)] or [table]
    order.shuffle(blocks)  # type: ignore[attr-defined]
    merged = merge_profiles([profile_table(block) for block in blocks])
    assert merged == profile_table(table)
    assert merged.columns() == profile_table(table).columns()


def test_numbers_agree_with_pandas() -> None:
    values = np.random.default_rng(0).lognormal(size=3000).round(2)
    column = profile_of([*values, None, math.nan, math.inf, -math.inf])
    series = pd.Series(values)
    assert (column.kind, column.count, column.nulls, column.nans, column.infinities) == ("numeric", 3004, 1, 1, 2)
    assert (column.minimum, column.maximum) == (series.min(), series.max())
    assert column.mean == pytest.approx(series.mean(), rel=1e-14)
    assert column.std == pytest.approx(series.std(), rel=1e-14)
    assert (column.distinct, column.distinct_exact) == (series.nunique(), True)
    assert list(column.quantiles) == ["0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99"]
    assert list(column.quantiles.values()) == [series.quantile(float(level)) for level in column.quantiles]
    assert column.histogram is not None
    assert column.histogram.counts == tuple(np.histogram(values, column.histogram.edges)[0])
    assert sum(column.histogram.counts) == 3000


NUMERIC = [
    ([1, 2, 2**31], pa.int64(), 1.0, float(2**31)),
    ([0, 255], pa.uint8(), 0.0, 255.0),
    ([2**64 - 1, 3], pa.uint64(), 3.0, 2.0**64),  # loses its last digits, as documented
    ([0.5, 0.25], pa.float16(), 0.25, 0.5),
    ([Decimal("1.10"), Decimal("-2.20")], pa.decimal128(5, 2), -2.2, 1.1),
    ([7, 7, 9], pa.dictionary(pa.int8(), pa.int64()), 7.0, 9.0),
]


@pytest.mark.parametrize(("values", "kind", "low", "high"), NUMERIC, ids=[str(case[1]) for case in NUMERIC])
def test_every_numeric_type(values: list[object], kind: pa.DataType, low: float, high: float) -> None:
    column = profile_of([*values, None], kind)
    assert (column.kind, column.nulls, column.minimum, column.maximum) == ("numeric", 1, low, high)
    assert column.distinct == len(set(values))


def test_distinct_numbers_are_exact_while_the_sketch_is() -> None:
    column = profile_of([n * 0.37 for n in range(9000)])
    assert (column.distinct, column.distinct_exact) == (9000, True)


def test_large_identifiers_stay_distinct() -> None:
    assert profile_of([2**60, 2**60 + 1, 2**60 + 2], pa.int64()).distinct == 3


TEXT = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXT, ids=str)
def test_every_string_type(kind: pa.DataType) -> None:
    values = pa.array(["a", "b", "a", None, ""]).cast(kind)
    column = profile_table(pa.table({"x": values})).columns()["x"]
    assert (column.kind, column.nulls, column.distinct, column.distinct_exact) == ("string", 1, 3, True)
    assert column.top_values == (("a", 2), ("", 1), ("b", 1))


def test_string_encodings_merge() -> None:
    plain, encoded = pa.array(["a", "b"]), pa.array(["b", "c"]).dictionary_encode()
    merged = merge_profiles([profile_table(pa.table({"x": x})) for x in (plain, encoded)])
    assert merged.columns()["x"].top_values == (("b", 2), ("a", 1), ("c", 1))


def test_top_values_end_where_they_are_too_many() -> None:
    column = profile_of([f"customer-{i}" for i in range(5000)])
    assert column.top_values == ()
    assert column.distinct == pytest.approx(5000, rel=0.1)
    assert not column.distinct_exact


def test_booleans() -> None:
    column = profile_of([True, True, True, False, None])
    assert column.kind == "boolean"
    assert column.top_values == (("true", 3), ("false", 1))
    assert (column.mean, column.distinct, column.distinct_exact) == (0.75, 2, True)


TIMES = [
    ([dt.date(2020, 1, 2), dt.date(1969, 12, 31)], pa.date32(), "1969-12-31", "2020-01-02"),
    ([dt.date(2020, 1, 2)], pa.date64(), "2020-01-02", "2020-01-02"),
    ([dt.datetime(2020, 1, 2, 3, 4, 5)], pa.timestamp("ns"), "2020-01-02T03:04:05", "2020-01-02T03:04:05"),
    ([dt.datetime(2020, 1, 2, 3, 4, 5, 60, dt.UTC)], UTC, "2020-01-02T03:04:05.000060Z", "2020-01-02T03:04:05.000060Z"),
    ([None], UTC, None, None),
]


@pytest.mark.parametrize(("values", "kind", "low", "high"), TIMES, ids=[str(case[1]) for case in TIMES])
def test_times_are_iso_8601(values: list[object], kind: pa.DataType, low: str | None, high: str | None) -> None:
    column = profile_of(values, kind)
    assert (column.kind, column.minimum, column.maximum) == ("temporal", low, high)
    if low:
        dt.datetime.fromisoformat(low)


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.binary(), pa.duration("s"), pa.null()], ids=str)
def test_other_types_are_counted(kind: pa.DataType) -> None:
    column = profile_of([None, None], kind)
    assert (column.kind, column.count, column.nulls, column.distinct) == ("other", 2, 2, None)


def test_empty_and_all_null_columns_claim_nothing() -> None:
    for values in ([], [None]):
        column = profile_of(values, pa.float64())
        assert (column.minimum, column.mean, column.std, column.histogram) == (None, None, None, None)
        assert column.quantiles == {}
        assert column.distinct == 0
    table = profile_table(SCHEMA.empty_table())
    assert table.rows == 0
    assert math.isnan(table.quantiles("price", [0.5])[0])


def test_a_null_typed_block_merges_with_any_type() -> None:
    blocks = [pa.table({"x": pa.nulls(3)}), pa.table({"x": [1.0, 2.0]}), pa.table({"x": pa.nulls(1)})]
    column = merge_profiles([profile_table(block) for block in blocks]).columns()["x"]
    assert (column.kind, column.count, column.nulls, column.mean) == ("numeric", 6, 4, 1.5)


HISTOGRAMS = [
    ("few distinct: a bin each", [1, 1, 2, 5], (0.5, 1.5, 3.5, 6.5), (2, 1, 1)),
    ("one value", [3.0, 3.0], (2.5, 3.5), (2,)),
    ("neighbouring floats", [1.0, math.nextafter(1, 2)], None, (1, 1)),
    ("the extremes", [-1.7e308, 1.7e308], None, (1, 1)),
    ("zero-inflated: the zeros alone", [0.0] * 900 + list(range(1, 101)), None, None),
    ("heavy maximum: alone", list(range(100)) + [500.0] * 900, None, None),
]


@pytest.mark.parametrize(("why", "values", "edges", "counts"), HISTOGRAMS, ids=[case[0] for case in HISTOGRAMS])
def test_histogram(
    why: str, values: list[float], edges: tuple[float, ...] | None, counts: tuple[int, ...] | None
) -> None:
    histogram = profile_of(values, pa.float64()).histogram
    assert histogram is not None
    assert edges is None or histogram.edges == edges
    assert counts is None or histogram.counts == counts
    assert np.all(np.diff(histogram.edges) > 0)
    assert np.all(np.isfinite(histogram.edges))
    assert sum(histogram.counts) == len(values)
    assert len(values) < 100 or 900 in histogram.counts


@pytest.mark.parametrize("value", [1.7976931348623157e308, -1.7976931348623157e308, 0.0, 5e-324])
def test_a_column_of_one_value_has_finite_edges_around_it(value: float) -> None:
    histogram = profile_of([value] * 3, pa.float64()).histogram
    assert histogram is not None
    assert histogram.counts == (3,)
    assert all(map(math.isfinite, histogram.edges))
    assert histogram.edges[0] <= value <= histogram.edges[1]


def test_continuous_bins_hold_about_equal_counts() -> None:
    histogram = profile_of(list(np.random.default_rng(0).lognormal(size=50_000)), pa.float64()).histogram
    assert histogram is not None
    assert len(histogram.counts) == 20
    assert min(histogram.counts) > 2400
    assert max(histogram.counts) < 2600


def test_profiles_travel_small() -> None:
    rng = np.random.default_rng(0)
    table = pa.table({f"x{i}": rng.normal(size=50_000) for i in range(4)})
    profile = profile_table(table)
    pickled = pickle.dumps(profile)
    assert len(pickled) < 4 * 300_000
    assert pickle.loads(pickled) == profile


def test_profiles_survive_json() -> None:
    for column in profile_table(pa.table({"x": [0.1, math.nan], "s": ["a", None]})).columns().values():
        assert ColumnProfile.model_validate_json(column.model_dump_json()) == column


def test_a_profile_without_sketches_is_small_and_has_the_same_figures() -> None:
    draw = np.random.default_rng(0)
    table = pa.table({"x": draw.normal(size=50_000), "s": ["a", None] * 25_000, "day": [dt.date(2024, 1, 1)] * 50_000})
    whole = profile_table(table)
    small = TableProfile(whole.rows, {name: one.without_sketches() for name, one in whole.partials.items()})
    assert small.columns() == whole.columns()
    assert len(pickle.dumps(small)) < 10_000 < len(pickle.dumps(whole))
    with pytest.raises(AssertionError, match="sketches of x were dropped"):
        merge_profiles([small, whole])
    with pytest.raises(AssertionError, match="sketches of x were dropped"):
        small.quantiles("x", [0.5])


def price(kind: pa.DataType, name: str = "price") -> TableProfile:
    return profile_table(pa.table({name: pa.array([1], kind)}))


WRONG = [
    ([], "no profiles to merge"),
    ([price(pa.int64()), price(pa.float64())], "column 'price' is double and int64"),
    ([price(pa.int64()), price(pa.int64(), "cost")], "column 'cost' isn't in all of them"),
]


@pytest.mark.parametrize(("profiles", "message"), WRONG, ids=[case[1] for case in WRONG])
def test_different_schemas_are_refused(profiles: list[TableProfile], message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_profiles(profiles)


def test_unknown_columns_and_kinds_are_refused() -> None:
    profile = profile_table(pa.table({"x": ["a"]}))
    with pytest.raises(InputError, match="no column 'y' in the profile: it has x"):
        profile.quantiles("y", [0.5])
    with pytest.raises(InputError, match="only a numeric one has quantiles"):
        profile.quantiles("x", [0.5])
    with pytest.raises(InputError, match="share a name"):
        profile_table(pa.table([[1], [2]], names=["x", "x"]))
