"""A label against the same thing counted by hand in pandas."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import polars as pl
import pytest

from tasks.io.errors import DefinitionError
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.training_sets.definition import Label
from tasks.training_sets.plan import label_rows
from tests.serving.feature_versions import DAY, days

TIMES = days(0, 30, 60)


def events(count: int = 400, seed: int = 0) -> pl.DataFrame:
    """Events at whole hours, some of them exactly at the label's times and at the ends of its days."""
    rng = np.random.default_rng(seed)
    hours = np.append(rng.integers(-24 * 40, 24 * 90, count), [0, 24 * 30, 24 * 60] * 4)
    return pl.DataFrame(
        {
            "customer_id": rng.integers(0, 12, len(hours)),
            "timestamp": [DAY + dt.timedelta(hours=int(hour)) for hour in hours],
            "amount": rng.random(len(hours)).round(3),
        }
    )


def label(target: pl.Expr, active_days: int | None = None) -> Label:
    return Label(name="x", entity="customer_id", at=("2024-01-31",), days=30, target=target, active_days=active_days)


@pytest.mark.parametrize("active_days", [None, 10])
def test_rows_are_what_pandas_counts(active_days: int | None) -> None:
    frame = events()
    found = label_rows(label(pl.col("amount").sum(), active_days), frame, "timestamp", TIMES)
    table = frame.to_pandas()
    wanted = []
    for moment in map(pd.Timestamp, TIMES):
        before = table[table.timestamp <= moment]
        if active_days is not None:
            before = before[before.timestamp > moment - pd.Timedelta(days=active_days)]
        after = table[(table.timestamp > moment) & (table.timestamp <= moment + pd.Timedelta(days=30))]
        sums = after.groupby("customer_id").amount.sum()
        wanted += [(customer, moment, sums.get(customer, 0.0)) for customer in sorted(before.customer_id.unique())]
    assert found.select("customer_id", EVENT_TIME).rows() == [(c, t.to_pydatetime()) for c, t, _ in wanted]
    assert found[TARGET].to_list() == pytest.approx([value for *_, value in wanted])


def test_who_does_nothing_has_the_value_over_no_rows() -> None:
    frame = events().filter(pl.col("timestamp") <= DAY)
    churned = label_rows(label(pl.sql_expr("COUNT(*) = 0")), frame, "timestamp", TIMES[:1])
    assert churned[TARGET].to_list() == [True] * frame["customer_id"].n_unique()
    mean = label_rows(label(pl.col("amount").mean()), frame, "timestamp", TIMES[:1])
    assert mean[TARGET].null_count() == mean.height > 0


def test_later_events_of_others_change_nothing_and_rows_stand_in_the_order_of_files() -> None:
    frame = events()
    last = label_rows(label(pl.col("amount").last()), frame, "timestamp", TIMES)
    later = frame.filter(pl.col("timestamp") <= TIMES[-1] + dt.timedelta(days=30))
    assert label_rows(label(pl.col("amount").last()), later, "timestamp", TIMES).equals(last)
    one = frame.filter((pl.col("customer_id") == 3) & (pl.col("timestamp") > DAY) & (pl.col("timestamp") <= TIMES[1]))
    assert last.filter(pl.col("customer_id") == 3)[TARGET][0] == one["amount"][-1]


def test_without_events_there_are_no_rows_but_their_types() -> None:
    found = label_rows(label(pl.len()), events().clear(), "timestamp", TIMES)
    assert found.height == 0
    assert found.schema == {
        "customer_id": pl.Int64,
        EVENT_TIME: pl.Datetime("us", "UTC"),
        TARGET: pl.Int64,
    }


def test_an_expression_that_gives_a_list_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"label-x.*gives a list"):
        label_rows(label(pl.col("amount")), events(), "timestamp", TIMES)
