"""Every rule passes, warns and fails on the right side of its bound, and says so in a sentence."""

import datetime as dt
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.io.errors import InputError
from tasks.quality.profile import TableProfile, chance_index, population_stability_index, profile_table
from tasks.quality.rules import (
    check_balance,
    check_class_balance,
    check_drift,
    check_finite,
    check_freshness,
    check_invalid_share,
    check_leak,
    check_nulls,
    check_outlier_share,
    check_range,
    check_ready_share,
    check_reference,
    check_rejected_share,
    check_rows,
    check_schema,
    check_split_sizes,
    check_stratification,
    check_unique,
    gate,
)
from tasks.store.manifest import CheckResult, ColumnProfile, RowBalance

NAN = math.nan
AS_OF = dt.datetime(2024, 3, 11, tzinfo=dt.UTC)


def numbers(
    count: int = 100,
    *,
    nulls: int = 0,
    nans: int = 0,
    infinities: int = 0,
    low: float | None = 0.0,
    high: float | None = 10.0,
) -> ColumnProfile:
    return ColumnProfile(
        kind="numeric", count=count, nulls=nulls, nans=nans, infinities=infinities, minimum=low, maximum=high
    )


def balance(rows_in: int, rows_out: int, rejected: int = 0) -> RowBalance:
    return RowBalance(name="transactions", rows_in=rows_in, rows_out=rows_out, rejected={"no key": rejected})


def stratified(rows: dict[str, tuple[int, int]]) -> CheckResult:
    counts = {name: {"train": train, "validation": validation} for name, (train, validation) in rows.items()}
    return check_stratification("class_name", counts, {"train": 0.8, "validation": 0.2})


TEXT = ColumnProfile(kind="string", count=3)
CASES: list[tuple[str, Callable[[], CheckResult], str]] = [
    ("rows at the minimum", lambda: check_rows(10, 10), "pass"),
    ("rows below it", lambda: check_rows(9, 10), "fail"),
    ("nulls at the warning bound", lambda: check_nulls("x", numbers(nulls=10), 0.1, 0.2), "pass"),
    ("nulls above it", lambda: check_nulls("x", numbers(nulls=11), 0.1, 0.2), "warn"),
    ("nulls at the failing bound", lambda: check_nulls("x", numbers(nulls=20), 0.1, 0.2), "warn"),
    ("nulls above that", lambda: check_nulls("x", numbers(nulls=21), 0.1, 0.2), "fail"),
    ("no row has no null", lambda: check_nulls("x", numbers(count=0), 0, 0), "pass"),
    ("a bound of NaN", lambda: check_nulls("x", numbers(), NAN, NAN), "fail"),
    ("finite", lambda: check_finite("x", numbers()), "pass"),
    ("one NaN", lambda: check_finite("x", numbers(nans=1)), "fail"),
    ("one infinity", lambda: check_finite("x", numbers(infinities=1)), "fail"),
    ("in range, at both ends", lambda: check_range("x", numbers(), 0, 10), "pass"),
    ("below", lambda: check_range("x", numbers(low=-0.1), 0, 10), "fail"),
    ("above", lambda: check_range("x", numbers(high=10.1), 0, 10), "fail"),
    ("above, but only a warning", lambda: check_range("x", numbers(high=10.1), 0, 10, warn_only=True), "warn"),
    ("open above", lambda: check_range("x", numbers(high=1e300), 0, None), "pass"),
    ("open below", lambda: check_range("x", numbers(low=-1e300), None, 10), "pass"),
    ("a minimum of NaN", lambda: check_range("x", numbers(low=NAN), 0, 10), "fail"),
    ("NaN lies in no range", lambda: check_range("x", numbers(nans=1), None, None), "fail"),
    ("infinity lies in no range", lambda: check_range("x", numbers(infinities=2), 0, None, warn_only=True), "warn"),
    ("nothing to judge", lambda: check_range("x", numbers(low=None, high=None), 0, 10), "pass"),
    ("text has no range", lambda: check_range("x", TEXT, 0, 10), "fail"),
    ("unique", lambda: check_unique("customer_id", 0), "pass"),
    ("one duplicate", lambda: check_unique("customer_id", 1), "fail"),
    ("references at the warning bound", lambda: check_reference("product", 1, 100, 0.01, 0.05), "pass"),
    ("references above it", lambda: check_reference("product", 2, 100, 0.01, 0.05), "warn"),
    ("references above the failing bound", lambda: check_reference("product", 6, 100, 0.01, 0.05), "fail"),
    ("no reference at all", lambda: check_reference("product", 0, 0, 0, 0), "pass"),
    ("balanced", lambda: check_balance(balance(10, 8, 2)), "pass"),
    ("rows vanished", lambda: check_balance(balance(10, 8, 1)), "fail"),
    ("rows appeared", lambda: check_balance(balance(10, 11)), "fail"),
    ("few rejected", lambda: check_rejected_share(balance(100, 99, 1), 0.01, 0.05), "pass"),
    ("more rejected", lambda: check_rejected_share(balance(100, 98, 2), 0.01, 0.05), "warn"),
    ("many rejected", lambda: check_rejected_share(balance(100, 90, 10), 0.01, 0.05), "fail"),
    ("nothing read, nothing rejected", lambda: check_rejected_share(balance(0, 0), 0, 0), "pass"),
    ("few outliers", lambda: check_outlier_share("x", 1, 100, 0.01, 0.05), "pass"),
    ("more outliers", lambda: check_outlier_share("x", 2, 100, 0.01, 0.05), "warn"),
    ("many outliers", lambda: check_outlier_share("x", 6, 100, 0.01, 0.05), "fail"),
    ("enough ready", lambda: check_ready_share(9, 10, 0.9, 0.5), "pass"),
    ("few ready", lambda: check_ready_share(8, 10, 0.9, 0.5), "warn"),
    ("too few ready", lambda: check_ready_share(4, 10, 0.9, 0.5), "fail"),
    ("none to be ready", lambda: check_ready_share(0, 0, 0.0, 0.0), "fail"),
    ("few invalid", lambda: check_invalid_share(1, 100, 0.01, 0.05), "pass"),
    ("more invalid", lambda: check_invalid_share(2, 100, 0.01, 0.05), "warn"),
    ("many invalid", lambda: check_invalid_share(6, 100, 0.01, 0.05), "fail"),
    ("no row to be invalid", lambda: check_invalid_share(0, 0, 0, 0), "pass"),
    ("groups are whole", lambda: check_leak(0), "pass"),
    ("a group in two splits", lambda: check_leak(1), "fail"),
    ("shares are kept", lambda: stratified({"cat": (8, 2), "dog": (80, 20)}), "pass"),
    ("one row off", lambda: stratified({"cat": (9, 1), "dog": (79, 21)}), "pass"),
    ("rounding", lambda: stratified({"cat": (3, 0), "dog": (1, 0), "bee": (0, 1)}), "pass"),
    ("two rows off, of a hundred", lambda: stratified({"cat": (82, 18)}), "warn"),
    ("two rows off, of a thousand", lambda: stratified({"cat": (802, 198)}), "pass"),
    ("eleven rows off, of a thousand", lambda: stratified({"cat": (811, 189)}), "warn"),
    ("the worse of two classes", lambda: stratified({"cat": (800, 200), "dog": (10, 0)}), "warn"),
    ("few rows off weigh more in a small class", lambda: stratified({"cat": (8_090, 1_910), "dog": (5, 5)}), "warn"),
    ("no class to share out", lambda: stratified({}), "pass"),
    ("balanced classes", lambda: check_class_balance("churned", [("no", 90), ("yes", 10)], 0.1), "pass"),
    ("a rare class", lambda: check_class_balance("churned", [("no", 91), ("yes", 9)], 0.1), "fail"),
    ("one class", lambda: check_class_balance("churned", [("no", 100)], 0.0), "fail"),
    ("no class", lambda: check_class_balance("churned", [], 0.0), "fail"),
    ("two empty classes", lambda: check_class_balance("churned", [("no", 0), ("yes", 0)], 0.0), "fail"),
    ("fresh, at the bound", lambda: check_freshness(dt.date(2024, 3, 10), AS_OF, 1, 7), "pass"),
    ("ageing", lambda: check_freshness("2024-03-09T23:59:59Z", AS_OF, 1, 7), "warn"),
    ("stale", lambda: check_freshness(dt.datetime(2024, 3, 3), AS_OF.replace(tzinfo=None), 1, 7), "fail"),
    ("no record", lambda: check_freshness(None, AS_OF, 1, 7), "fail"),
    ("from the future", lambda: check_freshness("2024-03-12", AS_OF, 1, 7), "warn"),
]


@pytest.mark.parametrize(("why", "check", "verdict"), CASES, ids=[case[0] for case in CASES])
def test_verdict(why: str, check: Callable[[], CheckResult], verdict: str) -> None:
    result = check()
    assert result.verdict == verdict
    assert result.bound
    assert result.message.endswith(".")


SENTENCES = [
    (check_nulls("age", numbers(count=1234, nulls=123), 0.05, 0.2), "123 of 1,234 rows (9.97%) have no age.", "≤ 0.05"),
    (check_rows(1, 1000), "1 row, where at least 1,000 are asked for.", "≥ 1,000"),
    (check_range("age", numbers(low=-3.0), 0, None), "The smallest age is -3, below 0.", "0 to ∞"),
    (
        check_balance(balance(10, 7, 1)),
        "transactions: 10 in, 7 out, 1 rejected, 0 filtered, 0 deduplicated: +2 unaccounted for.",
        "= 0",
    ),
    (
        check_freshness("2024-03-01", AS_OF, 1, 7),
        "The newest record is of 2024-03-01 00:00 UTC, 10.0 days before 2024-03-11 00:00.",
        "≤ 7",
    ),
]


@pytest.mark.parametrize(("result", "message", "bound"), SENTENCES)
def test_sentences(result: CheckResult, message: str, bound: str) -> None:
    assert (result.message, result.bound) == (message, bound)


SPLITS: list[tuple[str, dict[str, int], dict[str, str]]] = [
    # why, rows by split, verdicts; train is asked for 0.4, validation for 0.6, and test for none
    ("all have rows", {"train": 4, "validation": 6}, {"train": "pass", "validation": "pass"}),
    ("no validation", {"train": 4}, {"train": "pass", "validation": "warn"}),
    ("nothing to train on", {"validation": 6}, {"train": "fail", "validation": "pass"}),
    ("nothing at all", {}, {"train": "fail", "validation": "warn"}),
    (
        "an uncalled split",
        {"train": 4, "validation": 6, "test": 1},
        {"train": "pass", "validation": "pass", "test": "fail"},
    ),
    (
        "an unknown split",
        {"train": 4, "validation": 6, "dev": 1},
        {"train": "pass", "validation": "pass", "dev": "fail"},
    ),
]


@pytest.mark.parametrize(("why", "sizes", "verdicts"), SPLITS, ids=[case[0] for case in SPLITS])
def test_split_sizes(why: str, sizes: dict[str, int], verdicts: dict[str, str]) -> None:
    results = check_split_sizes(sizes, {"train": 0.4, "validation": 0.6, "test": 0.0}, essential="train")
    assert {result.column: result.verdict for result in results} == verdicts
    assert all(result.message.endswith(".") and result.bound for result in results)


def test_a_share_that_is_no_round_number_allows_one_row_too() -> None:
    shares = {"train": 1 - 0.1 - 0.3, "validation": 0.1, "test": 0.3}  # 0.6000000000000001
    counts = {"cat": {"train": 5, "validation": 1, "test": 4}}
    assert check_stratification("class_name", counts, shares).verdict == "pass"


def test_the_worst_class_is_named() -> None:
    result = stratified({"cat": (9, 1), "dog": (60, 40), "bee": (79, 21)})
    assert result.message == "class_name 'dog' has 60 of its 100 rows in train, where 80 would be its share."
    assert (result.figure, result.bound) == (pytest.approx(20), "≤ 1")


def test_schema() -> None:
    expected = {"id": "int64", "name": "string", "age": "int32"}
    (same,) = check_schema({"name": "string", "age": "int32", "id": "int64"}, expected)
    assert same.verdict == "pass"
    results = check_schema({"id": "int32", "name": "string", "extra": "bool"}, expected)
    assert [(r.column, r.verdict, r.figure, r.bound) for r in results] == [
        ("age", "fail", "missing", "int32"),
        ("extra", "fail", "bool", "no such column"),
        ("id", "fail", "int32", "int64"),
    ]


def test_gate_takes_the_worst_verdict() -> None:
    good, fair, bad = check_rows(1, 1), check_nulls("x", numbers(nulls=1), 0, 1), check_rows(0, 1)
    assert gate([good]).verdict == "pass"
    assert gate([good, fair]).verdict == "warn"
    assert gate([bad, fair, good]).verdict == "fail"
    assert gate([bad, fair, good]).checks == (bad, fair, good)
    with pytest.raises(AssertionError, match="without checks"):
        gate([])


def profiles(now: object, before: object, kind: pa.DataType | None = None) -> tuple[TableProfile, ColumnProfile]:
    table = profile_table(pa.table({"x": pa.array(now, kind)}))
    return table, profile_table(pa.table({"x": pa.array(before, kind)})).columns()["x"]


def normal(mean: float = 0.0, n: int = 20_000, seed: int = 0) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.random.default_rng(seed).normal(mean, size=n)


MIXED = ["a"] * 600 + ["b"] * 400
DRIFT = [
    ("the same rows", normal(), normal(), "pass"),
    ("another sample", normal(seed=1), normal(), "pass"),
    ("0.4 of a deviation: PSI about 0.16", normal(0.4, seed=1), normal(), "warn"),
    ("a whole deviation", normal(1.0, seed=1), normal(), "fail"),
    ("all beyond the old range", normal(100), normal(), "fail"),
    ("all one value", np.zeros(1000), normal(), "fail"),
    ("few values, same shares", [1, 2, 3] * 300, [3, 1, 2] * 500, "pass"),
    ("few values, other shares", [1] * 800 + [2] * 200, [1, 2] * 500, "fail"),
    ("a value never seen before", [1, 2, 7] * 300, [1, 2] * 500, "fail"),
    ("zero-inflated, zeros gone", normal(5, 1000), [0.0] * 900 + list(range(1, 101)), "fail"),
    ("nulls appeared", [1.0, None] * 500, [1.0] * 1000, "fail"),
    ("became all null", [None] * 1000, [1.0, 2.0] * 500, "fail"),
    ("was all null, and still is", [None] * 1000, [None] * 1000, "pass"),
    ("was all null, and no longer", [1.0] * 1000, [None] * 1000, "fail"),
    ("too few rows before", [1.0] * 1000, [2.0] * 199, "pass"),
    ("too few rows now", [1.0] * 199, [2.0] * 1000, "pass"),
    ("small samples of one population", normal(n=200, seed=1), normal(n=200, seed=2), "pass"),
    ("small samples far apart", normal(3, n=200), normal(n=200), "fail"),
]


@pytest.mark.parametrize(("why", "now", "before", "verdict"), DRIFT, ids=[case[0] for case in DRIFT])
def test_drift_of_numbers(why: str, now: object, before: object, verdict: str) -> None:
    result = check_drift("x", *profiles(now, before, pa.float64()))
    assert result.verdict == verdict, result.message


TEXT_DRIFT = [
    ("the same shares", MIXED, MIXED * 2, "pass"),
    ("a little moved", ["a"] * 780 + ["b"] * 220, MIXED, "warn"),
    ("moved", ["a"] * 100 + ["b"] * 900, MIXED, "fail"),
    ("a new value", [*MIXED, *["c"] * 500], MIXED, "fail"),
    ("nulls appeared", [*MIXED, *[None] * 1000], MIXED, "fail"),
    ("was all null", MIXED, [None] * 1000, "fail"),
    ("identifiers aren't judged", [f"n{i}" for i in range(2000)], [f"b{i}" for i in range(2000)], "pass"),
    ("few values became many", [f"n{i}" for i in range(2000)], MIXED, "warn"),
    ("the 21st value is 'other'", [f"v{i % 30}" for i in range(3000)], [f"v{i % 30}" for i in range(6000)], "pass"),
]


@pytest.mark.parametrize(("why", "now", "before", "verdict"), TEXT_DRIFT, ids=[case[0] for case in TEXT_DRIFT])
def test_drift_of_strings(why: str, now: object, before: object, verdict: str) -> None:
    result = check_drift("x", *profiles(now, before, pa.string()))
    assert result.verdict == verdict, result.message


def test_drift_of_booleans_and_times() -> None:
    assert check_drift("x", *profiles([True, False] * 200, [True] * 390 + [False] * 10)).verdict == "fail"
    dates = [dt.date(2020, 1, 1)] * 300
    result = check_drift("x", *profiles(dates, dates))
    assert result.verdict == "pass"
    assert result.figure is None
    assert "isn't judged: it is temporal" in result.message


def test_a_column_that_changed_its_kind_fails() -> None:
    now, _ = profiles(["1"] * 300, ["1"] * 300)
    _, before = profiles([1] * 300, [1] * 300)
    assert check_drift("x", now, before).message == "x is string, where the last version had numeric."
    with pytest.raises(InputError, match="no column 'y'"):
        check_drift("y", now, before)


def test_two_empty_versions_fail_when_judging_is_forced() -> None:
    assert check_drift("x", *profiles([], [], pa.float64()), minimum_rows=0).verdict == "fail"


def test_the_index_by_hand() -> None:
    """Shares of 0.6 and 0.4 against 0.5 and 0.5, with half a row more in each bin."""
    p, q = np.array([60.5, 40.5]) / 101, np.array([50.5, 50.5]) / 101
    expected = (p[0] - q[0]) * math.log(p[0] / q[0]) + (p[1] - q[1]) * math.log(p[1] / q[1])
    assert population_stability_index(np.array([60, 40]), np.array([50, 50])) == pytest.approx(expected)
    assert math.isnan(population_stability_index(np.array([0, 0]), np.array([5, 5])))


counts = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1).map(np.array)


@given(pairs=counts.filter(lambda pairs: bool(pairs.sum(axis=0).all())))
def test_the_index_is_symmetric_and_never_negative(pairs: "np.ndarray[tuple[int, int], np.dtype[np.int64]]") -> None:
    forth = population_stability_index(pairs[:, 0], pairs[:, 1])
    back = population_stability_index(pairs[:, 1], pairs[:, 0])
    assert forth == pytest.approx(back, abs=1e-12)
    assert forth >= 0
    assert population_stability_index(pairs[:, 0], pairs[:, 0]) == 0


def test_chance_rarely_exceeds_its_index() -> None:
    """Of 3,000 pairs of samples of one population, about one in a thousand lies beyond."""
    rng = np.random.default_rng(0)
    now, before = rng.multinomial(500, [0.05] * 20, size=(2, 3000))
    beyond = sum(
        population_stability_index(a, b) > chance_index(500, 500, 20) for a, b in zip(now, before, strict=True)
    )
    assert beyond <= 10
    assert chance_index(500, 500, 1) == 0


@pytest.mark.parametrize("moved", [0.5, 0.7, 1.2, np.nextafter(1.0, 2.0)])
def test_a_column_of_one_value_drifts_however_near_the_new_value_lies(moved: float) -> None:
    before = profile_table(pa.table({"score": np.ones(500)})).columns()["score"]
    same = check_drift("score", profile_table(pa.table({"score": np.ones(300)})), before)
    other = check_drift("score", profile_table(pa.table({"score": np.full(300, moved)})), before)
    assert (same.verdict, other.verdict) == ("pass", "fail")
