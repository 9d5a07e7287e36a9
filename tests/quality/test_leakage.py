"""A feature from the future is found whatever its shape, and none that honestly tells something."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.quality.leakage import Leakage, leakage
from tasks.quality.profile import profile_table
from tasks.quality.rules import check_leakage, check_target, classes_of, prepare_target
from tasks.store.manifest import CheckResult

ROWS = 2_000
WARN, FAIL = 0.95, 0.99
draw = np.random.default_rng(0)
CHURNED = draw.random(ROWS) < 0.1
REVENUE = np.where(draw.random(ROWS) < 0.4, 0.0, draw.lognormal(3, 1.5, ROWS))  # many zeros, a long tail
TIERS = draw.choice(["bronze", "gold", "silver"], ROWS, p=[0.7, 0.1, 0.2])
CUSTOMERS = draw.integers(0, 400, ROWS)
NOISE = draw.normal(0, 1, ROWS)
TENTHS = np.clip(np.round(10 * NOISE), -15, 15)


def chunked(values: Any) -> pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([pa.array(values)])


def prepared(target: Any, entities: Any) -> Any:
    target = chunked(target)
    partial = profile_table(pa.table({"target": target})).partial("target")
    ready = prepare_target(target, partial, None if entities is None else chunked(entities))
    assert ready is not None
    return ready


def measured(feature: Any, target: Any, entities: Any = None) -> Leakage | None:
    return leakage(chunked(feature), prepared(target, entities))


def judged(feature: Any, target: Any, entities: Any = None) -> CheckResult:
    return check_leakage("feature_x", chunked(feature), prepared(target, entities), WARN, FAIL)


def with_gaps(values: Any, gaps: Any) -> pa.Array:
    return pa.array(values, mask=np.asarray(gaps))


LEAKS = [
    ("the target itself", CHURNED, CHURNED),
    ("its opposite", ~CHURNED, CHURNED),
    ("in numbers with noise", CHURNED * 10 + NOISE, CHURNED),
    ("in words", np.where(CHURNED, "closed", "open"), CHURNED),
    ("in words, as a dictionary", pa.array(np.where(CHURNED, "closed", "open")).dictionary_encode(), CHURNED),
    ("neither high nor low", np.where(CHURNED, 0, draw.choice([-1, 1], ROWS) * 5) + NOISE, CHURNED),
    ("by what is missing", with_gaps(NOISE, ~CHURNED), CHURNED),
    ("by what is there", with_gaps(NOISE, CHURNED), CHURNED),
    ("by text that is missing", with_gaps(["x"] * ROWS, CHURNED), CHURNED),
    (
        "a date of closing",
        with_gaps([dt.date(2024, 1, 1) + dt.timedelta(days=int(n)) for n in range(ROWS)], ~CHURNED),
        CHURNED,
    ),
    (
        "a time of closing",
        with_gaps([dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=n) for n in range(ROWS)], ~CHURNED),
        CHURNED,
    ),
    ("a NaN where there was no closing", np.where(CHURNED, NOISE, np.nan), CHURNED),
    ("of classes that are 0 and 1", CHURNED.astype(np.int64) * 3, CHURNED.astype(np.int64)),
    ("of classes that are 0.0 and 1.0", CHURNED.astype(np.float32), CHURNED.astype(np.float32)),
    ("of one class of three", (TIERS == "gold") * 1.0, TIERS),
    ("of a number", REVENUE, REVENUE),
    ("of a number, in other units", REVENUE * -0.01 + 7, REVENUE),
    ("of a number, rounded", np.round(REVENUE), REVENUE),
    ("of a number, as its square about a middle", NOISE, NOISE**2),
    ("of a number, as text", [f"about {n}" for n in TENTHS], TENTHS / 10),
    ("of a decimal", pc.cast(pa.array(np.round(REVENUE, 2)), pa.decimal128(12, 2)), REVENUE),
]


@pytest.mark.parametrize(("why", "feature", "target"), LEAKS, ids=[case[0] for case in LEAKS])
def test_a_leak_is_found(why: str, feature: Any, target: Any) -> None:
    check = judged(feature, target)
    assert (check.name, check.column) == ("leakage", "feature_x")
    assert check.verdict == "fail", check.message


@pytest.mark.parametrize(("why", "feature", "target"), LEAKS[:4] + LEAKS[15:17], ids=lambda case: str(case)[:20])
def test_a_leak_is_found_in_a_hundred_rows(why: str, feature: Any, target: Any) -> None:
    few = np.r_[np.flatnonzero(CHURNED)[:30], np.flatnonzero(~CHURNED)[:70]]
    assert judged(np.asarray(feature)[few], np.asarray(target)[few]).verdict == "fail"


HONEST = [
    ("noise", NOISE, CHURNED),
    ("a good feature", CHURNED * 1.5 + NOISE, CHURNED),
    ("nothing but one value", np.ones(ROWS), CHURNED),
    ("nothing at all", pa.nulls(ROWS, pa.float64()), CHURNED),
    ("a category of noise", draw.choice(list("abcdefgh"), ROWS), CHURNED),
    ("a text of its own in each row", [f"order {n}" for n in range(ROWS)], CHURNED),
    ("a number of its own in each row", np.arange(ROWS), CHURNED),
    ("noise about three classes", NOISE, TIERS),
    ("noise about a number", NOISE, REVENUE),
    ("a good feature of a number", REVENUE * np.exp(NOISE), REVENUE),
    ("a text of its own about a number", [f"order {n}" for n in range(ROWS)], REVENUE),
    ("infinities", np.where(NOISE > 1, np.inf, -np.inf), REVENUE),
]


@pytest.mark.parametrize(("why", "feature", "target"), HONEST, ids=[case[0] for case in HONEST])
def test_an_honest_feature_passes(why: str, feature: Any, target: Any) -> None:
    assert judged(feature, target).verdict == "pass"


def test_what_an_entity_always_does_is_no_leak_of_its_name() -> None:
    """Each customer always churns or never does; his name tells rows of other times, and no other customers."""
    always = np.random.default_rng(1).random(400) < 0.3
    names, target = [f"customer {n}" for n in CUSTOMERS], always[CUSTOMERS]
    assert judged(names, target, CUSTOMERS).verdict == "pass"
    assert judged(names, target).verdict == "fail"  # as a table's of which nobody knows whose rows these are


@settings(max_examples=60)
@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.sampled_from(["class", "number", "text", "few", "rare"]))
def test_noise_in_few_rows_is_no_leak(rows: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    target: Any = rng.random(rows) if kind == "number" else rng.random(rows) < (0.05 if kind == "rare" else 0.5)
    if kind != "number" and target.all() | ~target.any():
        target[0] = ~target[0]
    feature: dict[str, Callable[[], Any]] = {
        "text": lambda: [str(n) for n in rng.integers(0, rows, rows)],
        "few": lambda: rng.integers(0, 3, rows),
    }
    assert judged(feature.get(kind, lambda: rng.random(rows))(), target).verdict == "pass"


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=10, max_size=200))
def test_the_area_is_that_of_all_pairs(rows: list[tuple[int, bool]]) -> None:
    """At least the share of pairs of one row of either class that the order of values gets right, ties by half."""
    values, flags = np.array([value for value, _ in rows]), np.array([flag for _, flag in rows])
    if flags.all() or not flags.any():
        return
    one, other = values[flags][:, None], values[~flags][None, :]
    area = ((one > other) + (one == other) / 2).mean()
    found = measured(values, flags)
    assert found is not None
    assert found.score >= max(area, 1 - area) - 1e-9


def test_it_depends_on_no_chunks() -> None:
    feature, target = chunked(CHURNED * 1.5 + NOISE), chunked(CHURNED)
    cut = pa.chunked_array([feature.slice(0, 7).combine_chunks(), feature.slice(7).combine_chunks()])
    assert measured(cut, target) == measured(feature, target)


def test_types_without_order_are_not_judged() -> None:
    check = judged(pa.array([[1.0]] * ROWS), CHURNED)
    assert check.verdict == "pass"
    assert "isn't judged: it is list<item: double>" in check.message


def test_too_few_rows_are_not_judged() -> None:
    check = judged([1, 2, 3, 4], [True, False, False, False])
    assert (check.verdict, "too few" in check.message) == ("pass", True)


def test_the_sentence_names_class_and_figure() -> None:
    assert "tells 'gold' from the others: area under the ROC curve 1.0000" in judged(TIERS == "gold", TIERS).message
    assert "explains 100.0% of the target's variance" in judged(REVENUE, REVENUE).message


TARGETS: list[tuple[str, Any, str]] = [
    # why, the target, verdict
    ("two classes", [True, False] * 50, "pass"),
    ("one class", [True] * 100, "fail"),
    ("a rare class", [True] + [False] * 99, "warn"),
    ("three classes of text", ["a", "b", "c"] * 30, "pass"),
    ("text without end", [f"text {n}" for n in range(2_000)], "fail"),
    ("a number", REVENUE, "pass"),
    ("a constant number", [2.5] * 100, "fail"),
    ("two numbers", [0.0] * 99 + [1.0], "warn"),
    ("many whole numbers", list(range(2_000)), "pass"),
    ("one whole number", [3] * 100, "fail"),
    ("no row", pa.array([], pa.float64()), "fail"),
    ("no row of text", pa.array([], pa.string()), "fail"),
]


@pytest.mark.parametrize(("why", "values", "verdict"), TARGETS, ids=[case[0] for case in TARGETS])
def test_targets(why: str, values: Any, verdict: str) -> None:
    check = check_target("target", profile_table(pa.table({"target": values})).partial("target"), 0.02)
    assert (check.name, check.verdict) == ("target", verdict), check.message


def test_classes_are_named_alike_whatever_their_width() -> None:
    for kind in (pa.int8(), pa.int64(), pa.float32(), pa.float64()):
        assert classes_of(profile_table(pa.table({"t": pa.array([0, 1, 1], kind)})).partial("t")) == {"0": 1, "1": 2}
