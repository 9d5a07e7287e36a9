"""Features agree with a brute force of what they mean, and don't depend on how the work is cut."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.engine.partition import split_by_key
from tasks.features.definitions import FeatureGroup, Window
from tasks.features.kernel import check_derived, evaluate, evaluate_history, join_dimension, made_up
from tasks.features.rows import TIME
from tasks.features.standard import CUSTOMER_FEATURES, PRODUCT_FEATURES
from tasks.io.errors import DefinitionError
from tests.features import oracle

AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
COLUMNS = ("customer_id", "product_id", "timestamp", "amount", "category")
GROUPS = [
    pytest.param(CUSTOMER_FEATURES, oracle.customer_features, id="customers"),
    pytest.param(PRODUCT_FEATURES, oracle.product_features, id="products"),
]
Oracle = Callable[[pd.DataFrame, dt.datetime], pd.DataFrame]
Transaction = tuple[object, object, dt.datetime, float, str | None]

# Few moments, so that many tie; the edges of the windows, and a step to either side of them.
EDGES = [AS_OF - dt.timedelta(days=days) for days in (0, 7, 30, 90)]
MOMENTS = [edge + step for edge in EDGES for step in (-SECOND, dt.timedelta(0), SECOND) if edge + step <= AS_OF]
times = st.sampled_from(MOMENTS) | st.datetimes(dt.datetime(2023, 1, 1), AS_OF.replace(tzinfo=None)).map(
    lambda moment: moment.replace(tzinfo=dt.UTC)
)
# Quarters, refunds among them: their sums are exact, so the oracle's figures have no rounding of their own.
amounts = st.integers(-40_000, 400_000).map(lambda quarters: quarters / 4) | st.sampled_from([0.0, 1.0, -1.0])
categories = st.sampled_from(["books", "toys", "garden", "", None])
integer_keys = st.integers(-3, 4) | st.sampled_from([2**62, -(2**63)])
string_keys = st.sampled_from(["a", "b", "007", "7", "ä", "", "Zoë"])


def transactions_of(keys: st.SearchStrategy[object]) -> st.SearchStrategy[list[Transaction]]:
    return st.lists(st.tuples(keys, keys, times, amounts, categories), min_size=1, max_size=40)


any_transactions = st.one_of(transactions_of(integer_keys), transactions_of(string_keys))


def frame_of(rows: list[Transaction]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=list(COLUMNS), orient="row", infer_schema_length=None)
    return frame.with_columns(
        pl.col("timestamp").cast(TIME), pl.col("amount").cast(pl.Float64), pl.col("category").cast(pl.Categorical)
    )


def pandas_of(rows: list[Transaction]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series([row[i] for row in rows], dtype=object) for i, name in enumerate(COLUMNS)})


def assert_agrees(found: pl.DataFrame, expected: pd.DataFrame) -> None:
    assert found.columns == list(expected.columns)
    for row, wanted in zip(found.rows(named=True), expected.to_dict("records"), strict=True):
        for name, value in wanted.items():
            if isinstance(value, float):
                assert math.isclose(row[name], value, rel_tol=1e-9, abs_tol=1e-9), (name, row[name], value)
            else:
                assert row[name] == value, (name, row, value)


@pytest.mark.parametrize(("group", "brute_force"), GROUPS)
@settings(max_examples=120)
@given(rows=any_transactions)
@example(rows=[(1, 1, AS_OF, 5.0, "books")])  # one transaction: no spread, no days
@example(rows=[(1, 1, AS_OF, 5.0, None), (1, 2, AS_OF, -5.0, None)])  # a refund cancels out, no category is known
@example(rows=[(1, p, AS_OF - SECOND, float(p), "x") for p in range(9)])  # all at one time: products break the tie
def test_features_mean_what_they_say(group: FeatureGroup, brute_force: Oracle, rows: list[Transaction]) -> None:
    found = evaluate(group, frame_of(rows), "timestamp", AS_OF)
    assert_agrees(found, brute_force(pandas_of(rows), AS_OF))


@pytest.mark.parametrize(("group", "brute_force"), GROUPS)
@settings(max_examples=50)
@given(rows=any_transactions, data=st.data())
def test_the_order_of_rows_makes_no_difference(
    group: FeatureGroup, brute_force: Oracle, rows: list[Transaction], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    found = evaluate(group, frame_of(shuffled), "timestamp", AS_OF)
    assert_agrees(found, brute_force(pandas_of(rows), AS_OF))


@pytest.mark.parametrize("buckets", [1, 3, 8])
@pytest.mark.parametrize("group", [CUSTOMER_FEATURES, PRODUCT_FEATURES], ids=lambda group: group.name)
@settings(max_examples=40)
@given(rows=any_transactions)
def test_features_are_the_same_bits_however_entities_are_split(
    group: FeatureGroup, buckets: int, rows: list[Transaction]
) -> None:
    assert_same_bits(group, frame_of(rows), buckets)


SUMS = FeatureGroup(name="sums", entity="customer_id", features={"count": pl.len(), "sum": pl.col("amount").sum()})


@pytest.mark.parametrize("buckets", [1, 3, 8, 40])
@pytest.mark.parametrize("group", [CUSTOMER_FEATURES, PRODUCT_FEATURES, SUMS], ids=lambda group: group.name)
def test_also_many_rows_give_the_same_bits(group: FeatureGroup, buckets: int) -> None:
    """Enough rows that the engine may add up in parts, and amounts whose sums depend on the order of adding."""
    draw = np.random.default_rng(0)
    count = 60_000
    frame = pl.DataFrame(
        {
            "customer_id": (3_000 * draw.random(count) ** 2).astype(np.int64),
            "product_id": (50 * draw.random(count) ** 2).astype(np.int64),
            "timestamp": np.datetime64("2024-06-01", "us") + draw.integers(0, 2 * 10**13, count).astype("m8[us]"),
            "amount": draw.lognormal(3, 2, count),
            "category": draw.choice(["books", "toys", "garden"], count),
        }
    ).with_columns(pl.col("timestamp").dt.replace_time_zone("UTC"), pl.col("category").cast(pl.Categorical))
    assert_same_bits(group, frame, buckets)


def assert_same_bits(group: FeatureGroup, frame: pl.DataFrame, buckets: int) -> None:
    whole = evaluate(group, frame, "timestamp", AS_OF)
    parts = [evaluate(group, part, "timestamp", AS_OF) for part in split_by_key(frame, group.entity, buckets)]
    together = pl.concat(parts).sort(group.entity)
    assert together.schema == whole.schema
    floats = [name for name, dtype in whole.schema.items() if dtype == pl.Float64]
    as_bits = pl.col(floats).reinterpret(dtype=pl.Int64) if floats else []
    assert together.with_columns(as_bits).equals(whole.with_columns(as_bits))


def test_types_are_plain() -> None:
    found = evaluate(CUSTOMER_FEATURES, frame_of([("a", "p", AS_OF, 1.0, "books")]), "timestamp", AS_OF)
    assert set(found.dtypes) == {pl.String, pl.Int64, pl.Float64}


def test_no_rows_give_no_entities_but_all_columns() -> None:
    found = evaluate(CUSTOMER_FEATURES, frame_of([("a", "p", AS_OF, 1.0, "books")]).clear(), "timestamp", AS_OF)
    assert found.height == 0
    assert found.columns == ["customer_id", *CUSTOMER_FEATURES.feature_names]


amount, time = pl.col("amount"), pl.col("timestamp")
OVER_NOTHING = [
    # feature, value over a window without rows
    ("count", pl.len(), 0),
    ("sum", amount.sum(), 0),
    ("distinct", pl.col("category").drop_nulls().n_unique(), 0),
    ("any", (amount > 0).any(), False),
    ("mean", amount.mean(), None),
    ("max", amount.max(), None),
    ("last", amount.last(), None),
    ("std, null made 0", amount.std().fill_null(0.0), 0.0),
]


@pytest.mark.parametrize(("why", "feature", "expected"), OVER_NOTHING, ids=[case[0] for case in OVER_NOTHING])
def test_window_over_no_rows(why: str, feature: pl.Expr, expected: object) -> None:
    """Customer a has rows in the window, b has none; and when nobody has any, b's value is the same."""
    group = group_of({"n": pl.len()}, windows=(Window(days=7, features={"x": feature}),))
    old = AS_OF - dt.timedelta(days=7)  # just outside: a window begins after as_of − days
    both = frame_of([("a", "p", AS_OF, 2.0, "books"), ("b", "p", old, 3.0, "toys")])
    for frame in (both, both.filter(pl.col("customer_id") == "b")):
        row = evaluate(group, frame, "timestamp", AS_OF).row(by_predicate=pl.col("customer_id") == "b", named=True)
        assert row["x_7d"] == expected
        assert row["n"] == 1


def test_as_of_is_a_column() -> None:
    days = (pl.col("as_of").first() - time.max()).dt.total_days()
    since_first = (pl.col("as_of").first() - time.min()).dt.total_days()
    group = group_of(
        {"days_since_last": days},
        windows=(Window(days=30, features={"days_since_first": since_first}),),
        derived={"year": pl.col("as_of").dt.year()},
    )
    rows = frame_of([("a", "p", AS_OF - dt.timedelta(days=days), 1.0, None) for days in (3, 20, 40)])
    assert evaluate(group, rows, "timestamp", AS_OF).row(0) == ("a", 3, 20, 2025)


def group_of(features: dict[str, pl.Expr], **rest: object) -> FeatureGroup:
    return FeatureGroup(name="visits", entity="customer_id", features=features, **rest)  # type: ignore[arg-type]


good = {"n": pl.len()}
BROKEN = [
    ("a list", group_of({**good, "all": amount}), r"'visits': 'all' gives a list for each customer_id.*\.mean\(\)"),
    (
        "a list in a window",
        group_of(good, windows=(Window(days=7, features={"all": amount}),)),
        "'visits': 'all_7d' gives a list",
    ),
    ("as_of without first()", group_of({"age": pl.col("as_of") - time.max()}), "'age' gives a list"),
    (
        "no such column",
        group_of({**good, "x": pl.col("nope").sum()}),
        r"'visits': feature 'x' = .*nope.* can't be",
    ),
    ("wrong types", group_of({**good, "x": (time + amount).sum()}), "'visits': feature 'x' = .* can't be evaluated"),
    (
        "no such column in a window",
        group_of(good, windows=(Window(days=7, features={"x": pl.col("nope").sum()}),)),
        "'visits': feature 'x' = .*nope",
    ),
    (
        "derived from what isn't there",
        group_of(good, derived={"x": pl.col("m") + 1}),
        "'visits': derived feature 'x' = .*can't be evaluated.*it can use the features declared before it and 'as_of'",
    ),
    (
        "derived from a later one",
        group_of(good, derived={"x": pl.col("y") + 1, "y": pl.col("n")}),
        "derived feature 'x'",
    ),
    ("derived drops rows", group_of(good, derived={"x": pl.col("n").filter(pl.col("n") > 5)}), "derived feature 'x'"),
]


@pytest.mark.parametrize(("why", "group", "message"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_expressions_name_group_and_feature(why: str, group: FeatureGroup, message: str) -> None:
    rows = frame_of([("a", "p", AS_OF, 1.0, "x"), ("b", "p", AS_OF, 1.0, "x")])
    with pytest.raises(DefinitionError, match=f"(?s){message}"):
        evaluate(group, rows, "timestamp", AS_OF)


FEATURES = pl.DataFrame({"customer_id": [1, 2, 3], "total_spent": [10.0, 20.0, 30.0]})
DIMENSION = pl.DataFrame({"customer_id": [3, 1, 9], "age": pl.Series([33, 11, 99], dtype=pl.Int32)})


def test_inner_join_rejects_entities_without_a_dimension_row() -> None:
    joined = join_dimension(CUSTOMER_FEATURES, FEATURES, DIMENSION, "inner")
    assert joined.kept.rows() == [(1, 10.0, 11), (3, 30.0, 33)]
    assert joined.rejected.rows() == [(2, 20.0, "no_customers_row")]
    assert joined.unmatched == 1
    assert joined.kept.schema["age"] == pl.Int64


def test_left_join_keeps_them() -> None:
    joined = join_dimension(CUSTOMER_FEATURES, FEATURES, DIMENSION, "left")
    assert joined.kept.rows() == [(1, 10.0, 11), (2, 20.0, None), (3, 30.0, 33)]
    assert joined.rejected.height == 0
    assert joined.unmatched == 1


@pytest.mark.parametrize("how", ["inner", "left"])
@given(keys=st.lists(st.integers(0, 20), unique=True), known=st.lists(st.integers(0, 20), unique=True))
def test_every_entity_is_kept_or_rejected(how: str, keys: list[int], known: list[int]) -> None:
    features = pl.DataFrame({"customer_id": sorted(keys)}, schema={"customer_id": pl.Int64})
    dimension = pl.DataFrame({"customer_id": known}, schema={"customer_id": pl.Int64})
    joined = join_dimension(CUSTOMER_FEATURES, features, dimension, how)  # type: ignore[arg-type]
    assert joined.kept.height + joined.rejected.height == len(keys)
    assert joined.unmatched == len(set(keys) - set(known))


def test_a_dimension_column_may_not_bear_a_features_name() -> None:
    dimension = DIMENSION.rename({"age": "total_spent"})
    with pytest.raises(DefinitionError, match=r"'customer-features': total_spent is both a feature.*rename"):
        join_dimension(CUSTOMER_FEATURES, FEATURES, dimension, "inner")


@pytest.mark.parametrize("expression", [pl.col("n") / pl.col("n").sum(), pl.col("n").rank(), pl.col("n").shift()])
def test_a_derived_feature_that_looks_at_other_entities_is_refused(expression: pl.Expr) -> None:
    rows = pl.DataFrame({"key": [1, 2, 2, 3], "at": [dt.datetime(2024, 1, 1, tzinfo=dt.UTC)] * 4})
    group = FeatureGroup(name="g", entity="key", features={"n": pl.len()}, derived={"x": expression})
    with pytest.raises(DefinitionError, match=r"'x' = .* looks at other entities' rows"):
        evaluate(group, rows, "at", dt.datetime(2024, 2, 1, tzinfo=dt.UTC))


# Several as-of times

START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
DAY_TICKS = 86_400_000_000
_amount, _time = pl.col("amount"), pl.col("timestamp")
AGE = FeatureGroup(
    name="age",
    entity="customer_id",
    features={"since": (pl.col("as_of").first() - _time.max()).dt.total_days(), "last": _amount.last()},
    windows=(Window(days=2, features={"n": pl.len(), "mean": _amount.mean(), "last": pl.col("category").last()}),),
    derived={"year": pl.col("as_of").dt.year(), "less": pl.col("n_2d") - pl.lit(1, pl.UInt32)},
)
LAST = FeatureGroup(name="last", entity="category", features={"last": _amount.last(), "sum": _amount.sum()})
HISTORY_GROUPS = [CUSTOMER_FEATURES, PRODUCT_FEATURES, AGE, LAST]


def events(rows: int, days: int, seed: int) -> pl.DataFrame:
    """Rows in no order of time, many at the very edges of days, with amounts whose sums depend on their order."""
    draw = np.random.default_rng(seed)
    ticks = draw.integers(0, days * DAY_TICKS, rows)
    ticks = np.where(draw.random(rows) < 0.3, ticks // DAY_TICKS * DAY_TICKS, ticks)
    at = np.datetime64(START.replace(tzinfo=None), "us") + ticks.astype("m8[us]")
    return pl.DataFrame(
        {
            "customer_id": (draw.random(rows) ** 2 * rows / 4).astype(np.int64),
            "product_id": draw.integers(0, 9, rows).astype(str),
            "timestamp": pl.Series(at).dt.replace_time_zone("UTC").cast(TIME),
            "amount": draw.lognormal(3, 2, rows),
            "category": pl.Series(draw.choice(["a", "b", "c"], rows), dtype=pl.Categorical),
        }
    )


def bits(frame: pl.DataFrame) -> pl.DataFrame:
    floats = [name for name, dtype in frame.schema.items() if dtype == pl.Float64]
    return frame.with_columns(pl.col(floats).reinterpret(dtype=pl.Int64)) if floats else frame


@pytest.mark.parametrize("group", HISTORY_GROUPS, ids=lambda group: group.name)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 300),
    seed=st.integers(0, 1000),
    days=st.lists(st.integers(-2, 14), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_each_time_is_as_it_is_alone(group: FeatureGroup, rows: int, seed: int, days: list[int]) -> None:
    times = [START + DAY * day for day in days]
    counted = events(rows, 10, seed).filter(pl.col("timestamp") <= times[-1])
    found = list(evaluate_history(group, counted, "timestamp", times))
    assert len(found) == len(times)
    for moment, frame in zip(times, found, strict=True):
        alone = evaluate(group, counted.filter(pl.col("timestamp") <= moment), "timestamp", moment)
        assert frame.schema == alone.schema
        assert bits(frame).equals(bits(alone)), moment


def test_an_entity_has_no_row_before_its_first_event() -> None:
    counted = pl.DataFrame({"key": [1, 2, 1], "at": [START, START + 2 * DAY, START + 3 * DAY]})
    counted = counted.cast({"at": TIME})
    group = FeatureGroup(name="g", entity="key", features={"n": pl.len()})
    times = [START - DAY, START, START + 2 * DAY, START + 3 * DAY]
    found = [frame.rows() for frame in evaluate_history(group, counted, "at", times)]
    assert found == [[], [(1, 1)], [(1, 1), (2, 1)], [(1, 2), (2, 1)]]


# Independence of other entities

AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
EVENTS: dict[str, Any] = {
    "user": pl.Int64,
    "at": TIME,
    "amount": pl.Float64,
    "shop": pl.Categorical,
    "paid": pl.Boolean,
}
n, total, shop, last = pl.col("n"), pl.col("total"), pl.col("shop"), pl.col("last")


def fails_on_four(value: int) -> float:
    if value == 4:
        raise ValueError("not written for four")
    return value / 2


ELSEWHERE = [
    n.shift(),
    n.shift(-1),
    total.cum_sum(),
    total.cum_sum(reverse=True),
    n / n.sum(),
    total - total.mean(),
    n.rank(),
    n.rank().over("shop"),
    pl.len().over("shop"),
    total.sum().over("n"),
    n.max(),
    n.first(),
    pl.len(),
    pl.int_range(pl.len()),
    n.sort(),
    n.reverse(),
    n.shuffle(seed=1),
    n.is_unique(),
    n.is_first_distinct(),
    total.diff(),
    total.rolling_mean(3),
    total.ewm_mean(alpha=0.5),
    total.fill_null(strategy="forward"),
    total.interpolate(),
    total.fill_null(total.mean()),
    (total > total.median()).cast(pl.Int64),
    pl.when(shop == "4").then(n.shift()).otherwise(n),
    pl.when(pl.col("paid")).then(0).otherwise(n.cum_count()),
    last.max() - last,
    shop.mode().first(),
    n.map_batches(lambda column: column / column.max(), return_dtype=pl.Float64),
]
ALONE = [
    n + 1,
    total / n,
    total / pl.max_horizontal("n", pl.lit(1)),
    pl.lit("x"),
    pl.lit(None),
    total.sqrt(),
    total.log(),
    (total - total).sqrt() / 0,
    -0.0 * n,
    total.sum().over("user"),
    n.rank().over("user"),
    pl.concat_list("n", "n_7d").list.max(),
    pl.concat_list(n, pl.col("n_7d")).list.eval(pl.element().rank()).list.first(),
    pl.mean_horizontal("n", "total"),
    pl.struct("n", "total").hash(),
    pl.when(total > 3).then(pl.lit("much")).otherwise(shop.cast(pl.String)),
    shop.cast(pl.String).str.to_uppercase(),
    shop.cast(pl.String).str.to_date("%Y"),  # what isn't made for the made-up rows is left to the job
    (pl.col("as_of") - last).dt.total_days(),
    last.dt.truncate("1mo"),
    total.fill_null(0).round(1),
    pl.col("paid").cast(pl.Int8) * n,
    n.map_elements(fails_on_four, return_dtype=pl.Float64),
]


def derived_group(expression: pl.Expr, then: pl.Expr | None = None) -> FeatureGroup:
    return FeatureGroup(
        name="g",
        entity="user",
        features={
            "n": pl.len(),
            "total": pl.col("amount").sum(),
            "shop": pl.col("shop").first(),
            "last": pl.col("at").max(),
            "paid": pl.col("paid").any(),
        },
        windows=(Window(days=7, features={"n": pl.len()}),),
        derived={"x": expression, **({} if then is None else {"y": then})},
    )


def no_events() -> pl.DataFrame:
    return pl.DataFrame(schema=EVENTS)


@pytest.mark.parametrize("expression", ELSEWHERE, ids=str)
def test_what_looks_at_other_entities_is_refused(expression: pl.Expr) -> None:
    for group in (derived_group(expression), derived_group(total + 1, expression)):
        name = list(group.derived)[-1]
        with pytest.raises(
            DefinitionError, match=rf"(?s)'g': derived feature '{name}' = .* looks at other entities' rows.*"
        ):
            check_derived(group, no_events(), AS_OF)


@pytest.mark.parametrize("expression", ALONE, ids=str)
def test_what_looks_at_its_own_entity_is_not(expression: pl.Expr) -> None:
    check_derived(derived_group(expression), no_events(), AS_OF)


def test_what_only_some_rows_show_is_refused_by_the_job() -> None:
    """No made-up row has a thousand events."""
    group = derived_group(pl.when(n >= 1000).then(n.cum_sum(reverse=True)).otherwise(n))
    check_derived(group, no_events(), AS_OF)
    rows = pl.DataFrame({"user": [1] * 1000 + [2] * 2}).with_columns(
        pl.lit(AS_OF).cast(TIME).alias("at"),
        pl.lit(1.0).alias("amount"),
        pl.lit("a").cast(pl.Categorical).alias("shop"),
        pl.lit(value=True).alias("paid"),
    )
    assert evaluate(group, rows.filter(pl.col("user") == 1), "at", AS_OF)["x"].to_list() == [1000]
    with pytest.raises(DefinitionError, match=r"'x' = .* looks at other entities' rows"):
        evaluate(group, rows, "at", AS_OF)


KINDS = st.sampled_from(
    [
        *(pl.Int8(), pl.UInt32(), pl.Int64(), pl.Float32(), pl.Float64(), pl.Boolean(), pl.String(), pl.Binary()),
        *(pl.Date(), pl.Time(), pl.Datetime("ms"), pl.Datetime("ns", "UTC"), pl.Duration("us"), pl.Categorical()),
        *(pl.Decimal(10, 2), pl.Enum(["a", "b"]), pl.List(pl.Int64()), pl.Struct({"a": pl.Int8()}), pl.Null()),
    ]
)


@settings(max_examples=60)
@given(key=st.sampled_from([pl.Int64(), pl.String(), pl.Categorical()]), kinds=st.lists(KINDS, max_size=8))
def test_rows_are_made_up_of_any_types(key: pl.DataType, kinds: list[pl.DataType]) -> None:
    schema = pl.Schema({**{f"c{number}": kind for number, kind in enumerate(kinds)}, "key": key})
    for rows in made_up(schema, "key"):
        assert rows["key"].n_unique() == rows.height
        assert {name: rows.schema[name] for name in schema} == dict(schema)
