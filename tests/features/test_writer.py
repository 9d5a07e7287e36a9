"""Fences are Tukey's, and a row's quality is what pandas says it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.features.writer import Fences, fences, score_rows
from tasks.quality.profile import profile_table
from tasks.store.layout import QUALITY

NAN = math.nan
THRESHOLDS = {"missing_below": 0.1, "outliers_below": 0.05, "score_above": 0.8}
Quantiles = Callable[[str, Sequence[float]], npt.NDArray[np.float64]]


def numpy_quantiles(columns: dict[str, list[float]]) -> Quantiles:
    return lambda name, levels: np.percentile(columns[name], [100 * level for level in levels])


@given(values=st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=50))
def test_fences_by_numpy(values: list[float]) -> None:
    first, third = np.percentile(values, [25, 75])
    found = fences(["x"], numpy_quantiles({"x": values}))["x"]
    assert found == Fences(first - 1.5 * (third - first), third + 1.5 * (third - first))


def test_fences_of_a_profile_come_near() -> None:
    """The gate's own quantiles are a sketch's: on 50,000 values within 1 % of a standard deviation."""
    values = np.random.default_rng(0).normal(100, 15, 50_000)
    found = fences(["x"], profile_table(pa.table({"x": values})).quantiles)["x"]
    exact = fences(["x"], numpy_quantiles({"x": values.tolist()}))["x"]
    assert found.lower == pytest.approx(exact.lower, abs=1)
    assert found.upper == pytest.approx(exact.upper, abs=1)


NO_FENCES = [("no value", [None, None]), ("only NaN", [NAN, NAN]), ("no rows", [])]


@pytest.mark.parametrize(("why", "values"), NO_FENCES, ids=[case[0] for case in NO_FENCES])
def test_a_column_without_values_has_no_fences(why: str, values: list[float | None]) -> None:
    table = pa.table({"x": pa.array(values, pa.float64(), from_pandas=False)})
    assert fences(["x"], profile_table(table).quantiles) == {}


def test_equal_values_have_fences_without_room() -> None:
    assert fences(["x"], numpy_quantiles({"x": [5.0] * 9})) == {"x": Fences(5, 5)}


USUAL = Fences(0, 10)
ROWS: list[tuple[str, dict[str, pl.Series], dict[str, Fences], tuple[float, float, float, bool]]] = [
    # why, one row, fences, its quality: missing, outliers, score, ready
    ("all is well", {"x": pl.Series([5.0]), "y": pl.Series([5])}, {"x": USUAL, "y": USUAL}, (0, 0, 1, True)),
    ("on the fence", {"x": pl.Series([0.0]), "y": pl.Series([10])}, {"x": USUAL, "y": USUAL}, (0, 0, 1, True)),
    ("over it", {"x": pl.Series([10.1]), "y": pl.Series([5])}, {"x": USUAL, "y": USUAL}, (0, 0.5, 0.75, False)),
    ("below it", {"x": pl.Series([5.0]), "y": pl.Series([-1])}, {"x": USUAL, "y": USUAL}, (0, 0.5, 0.75, False)),
    ("infinite", {"x": pl.Series([math.inf]), "y": pl.Series([5])}, {"x": USUAL, "y": USUAL}, (0, 0.5, 0.75, False)),
    (
        "null is missing, no outlier",
        {"x": pl.Series([None], dtype=pl.Float64), "y": pl.Series([5])},
        {"x": USUAL, "y": USUAL},
        (0.5, 0, 0.75, False),
    ),
    ("NaN likewise", {"x": pl.Series([NAN]), "y": pl.Series([5])}, {"x": USUAL, "y": USUAL}, (0.5, 0, 0.75, False)),
    ("text may be missing", {"s": pl.Series([None], dtype=pl.String)}, {}, (1, 0, 0.5, False)),
    ("no numeric columns", {"s": pl.Series(["a"]), "b": pl.Series([True])}, {}, (0, 0, 1, True)),
    ("no fences for a number", {"x": pl.Series([1e9])}, {}, (0, 0, 1, True)),
    ("no features", {}, {}, (0, 0, 1, True)),
]


@pytest.mark.parametrize(("why", "row", "bounds", "expected"), ROWS, ids=[case[0] for case in ROWS])
def test_rows(
    why: str, row: dict[str, pl.Series], bounds: dict[str, Fences], expected: tuple[float, float, float, bool]
) -> None:
    frame = pl.DataFrame({"id": [1], **row})
    scored = score_rows(frame, list(row), bounds, **THRESHOLDS)
    assert scored.select(QUALITY).row(0) == expected
    assert scored.drop(QUALITY).equals(frame, null_equal=True)
    assert scored.select(QUALITY).dtypes == [pl.Float64, pl.Float64, pl.Float64, pl.Boolean]


def test_what_is_no_feature_is_not_judged() -> None:
    frame = pl.DataFrame({"id": pl.Series([None], dtype=pl.Int64), "x": [5.0]})
    assert score_rows(frame, ["x"], {"id": USUAL, "x": USUAL}, **THRESHOLDS)["is_training_ready"].item()


READY = [
    # thresholds, ready? The row misses 1 of 4 features and has 1 of 2 numbers outside: the score is 0.625.
    ({"missing_below": 0.26, "outliers_below": 0.51, "score_above": 0.6}, True),
    ({"missing_below": 0.25, "outliers_below": 0.51, "score_above": 0.6}, False),
    ({"missing_below": 0.26, "outliers_below": 0.5, "score_above": 0.6}, False),
    ({"missing_below": 0.26, "outliers_below": 0.51, "score_above": 0.625}, False),
]


@pytest.mark.parametrize(("thresholds", "ready"), READY, ids=["just", "missing", "outliers", "score"])
def test_a_bound_that_is_reached_is_not_kept(thresholds: dict[str, float], ready: bool) -> None:
    frame = pl.DataFrame({"x": [99.0], "y": [5], "s": ["a"], "t": [None]}, schema_overrides={"t": pl.String})
    row = score_rows(frame, list("xyst"), {"x": USUAL, "y": USUAL}, **thresholds).row(0, named=True)
    assert (row["missing_value_ratio"], row["outlier_ratio"], row["feature_quality_score"]) == (0.25, 0.5, 0.625)
    assert row["is_training_ready"] == ready


maybe = st.none() | st.just(NAN) | st.floats(-30, 30) | st.just(math.inf)
tables = st.lists(st.tuples(maybe, maybe, st.none() | st.integers(-30, 30), st.none() | st.text()), max_size=20)


@given(rows=tables)
def test_quality_by_pandas(rows: list[tuple[float | None, float | None, int | None, str | None]]) -> None:
    schema = {"x": pl.Float64, "y": pl.Float64, "n": pl.Int64, "s": pl.String}
    bounds = {"x": Fences(-10, 10), "y": Fences(0, 5), "n": Fences(-20, 20)}
    found = score_rows(pl.DataFrame(rows, schema=schema, orient="row"), list(schema), bounds, **THRESHOLDS)
    table = pd.DataFrame(rows, columns=list(schema))
    numbers = table[["x", "y", "n"]].astype(float)
    outside = (numbers < [-10, 0, -20]) | (numbers > [10, 5, 20])
    missing, outliers = table.isna().mean(axis=1), outside.mean(axis=1)
    score = 1 - (missing + outliers) / 2
    assert found["missing_value_ratio"].to_list() == pytest.approx(missing.tolist())
    assert found["outlier_ratio"].to_list() == pytest.approx(outliers.tolist())
    assert found["feature_quality_score"].to_list() == pytest.approx(score.tolist())
    assert found["is_training_ready"].to_list() == ((missing < 0.1) & (outliers < 0.05) & (score > 0.8)).tolist()
