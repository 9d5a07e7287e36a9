"""A derived feature depends on its own entity alone; one that doesn't is found before any row is read."""

from __future__ import annotations

import datetime as dt
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.features.definitions import FeatureGroup, Window
from tasks.features.independence import made_up
from tasks.features.kernel import check_derived, evaluate
from tasks.features.rows import TIME
from tasks.io.errors import DefinitionError

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


def group_of(expression: pl.Expr, then: pl.Expr | None = None) -> FeatureGroup:
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
    for group in (group_of(expression), group_of(total + 1, expression)):
        name = list(group.derived)[-1]
        with pytest.raises(
            DefinitionError, match=rf"(?s)'g': derived feature '{name}' = .* looks at other entities' rows.*"
        ):
            check_derived(group, no_events(), AS_OF)


@pytest.mark.parametrize("expression", ALONE, ids=str)
def test_what_looks_at_its_own_entity_is_not(expression: pl.Expr) -> None:
    check_derived(group_of(expression), no_events(), AS_OF)


def test_what_only_some_rows_show_is_refused_by_the_job() -> None:
    """No made-up row has a thousand events."""
    group = group_of(pl.when(n >= 1000).then(n.cum_sum(reverse=True)).otherwise(n))
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


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from([pl.Int64(), pl.String(), pl.Categorical()]), kinds=st.lists(KINDS, max_size=8))
def test_rows_are_made_up_of_any_types(key: pl.DataType, kinds: list[pl.DataType]) -> None:
    schema = pl.Schema({**{f"c{number}": kind for number, kind in enumerate(kinds)}, "key": key})
    for rows in made_up(schema, "key"):
        assert rows["key"].n_unique() == rows.height
        assert {name: rows.schema[name] for name in schema} == dict(schema)
