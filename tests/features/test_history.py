"""Several as-of times in one pass give what each of them gives alone, to the last bit."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.features.definitions import FeatureGroup, Window
from tasks.features.history import evaluate_history
from tasks.features.kernel import evaluate
from tasks.features.rows import TIME
from tasks.features.standard import CUSTOMER_FEATURES, PRODUCT_FEATURES

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
GROUPS = [CUSTOMER_FEATURES, PRODUCT_FEATURES, AGE, LAST]


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


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
@settings(max_examples=25, deadline=None)
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
