"""Spines and labels that are wrong: refused, rejected with a reason, or right."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from tasks.features.standard import STANDARD, TRANSACTIONS
from tasks.io.errors import InputError, SourceError, VersionNotFound
from tasks.runner import worth_retrying
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.training_sets.definition import Label
from tests.bad_input import training_sets
from tests.bad_input.shop import csv, put, transactions
from tests.bad_input.training_sets import DAY, ROWS, Joined, join, spine
from tests.tables import Proven

pytestmark = pytest.mark.usefixtures("ray_cluster")
GOOD = spine()
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    training_sets.features(root)
    return root


@pytest.fixture
def place(store: Path, tmp_path: Path) -> Path:
    """A root of the test's own with the store's features."""
    (tmp_path / "feature-store").symlink_to(store / "feature-store")
    return tmp_path


def one(place: Path, **changed: Any) -> Joined:
    return join(place, {"s.parquet": spine(**changed)})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # row of the table, changed columns, message
    ("a column is missing", {TARGET: None}, r"s\.parquet has no column 'target'.*spine: \{columns: \{target: …\}\}"),
    ("a column is missing", {"customer_id": None}, r"has no column 'customer_id'.*columns: \{customer_id"),
    ("a column is missing", {EVENT_TIME: None}, r"has no column 'event_timestamp'"),
    (
        "a column is of another type",
        {"customer_id": [True] * ROWS},
        r"is of type bool.*whole numbers or text.*columns:",
    ),
    ("a column is of another type", {EVENT_TIME: list(range(ROWS))}, r"holds integers.*--epoch-unit"),
    ("a column is of another type", {EVENT_TIME: [0.5] * ROWS}, r"is of type double; it must be a timestamp, date"),
    (
        "a column is of another type",
        {TARGET: [DAY] * ROWS},
        r"target 'target' is of type timestamp.*only numbers, boolea",
    ),
    ("a column is of another type", {TARGET: [b"a"] * ROWS}, r"'target' is of type binary; only numbers, booleans and"),
    ("a column is nested", {"customer_id": [[1]] * ROWS}, r"is of type list.*it must be whole numbers or text"),
    ("a column is nested", {TARGET: [[1]] * ROWS}, r"'target' is of type list.*only numbers, booleans and text"),
    ("a column is nested", {TARGET: [{"a": 1}] * ROWS}, r"'target' is of type struct"),
]


@pytest.mark.parametrize(("row", "changed", "message"), REFUSED, ids=[f"{r[0]}: {r[2][:30]}" for r in REFUSED])
def test_refused(place: Path, proven: Proven, row: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=f"(?s)spine.*{message}") as caught:
        one(place, **changed)
    assert not worth_retrying(caught.value)
    proven(row, "feature-store", "refused, naming file, column and cure")


@pytest.mark.parametrize(
    ("files", "features", "message"),
    [
        ("/no/such/spine*.csv", (), r"spine '/no/such/spine\*\.csv': no .* file found \(nothing is there\)"),
        ({"s.parquet": pa.table(GOOD).slice(0, 0)}, (), r"spine '.*' has no rows"),
        ({"s.parquet": b""}, (), r"s\.parquet can't be read as parquet"),
        (
            {"s.parquet": GOOD},
            ("customer-features:total_spend",),
            r"no feature 'total_spend'; did you mean 'total_spent'",
        ),
        ({"s.parquet": GOOD}, ("customers-features:orders",), r"did you mean 'customer-features'"),
    ],
)
def test_what_isnt_there_is_named(place: Path, proven: Proven, files: Any, features: Any, message: str) -> None:
    with pytest.raises((InputError, VersionNotFound), match=message) as caught:
        join(place, files, *features)
    assert not worth_retrying(caught.value)
    proven("a feature, group or spine that isn't there", "feature-store", "refused, naming the closest")


WORDS = list(map(str, GOOD["customer_id"][1:]))
FLOATS = list(map(float, GOOD["customer_id"][1:]))
MOMENTS = list(map(str, GOOD[EVENT_TIME]))
REJECTED: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("null times", {EVENT_TIME: [None, *GOOD[EVENT_TIME][1:]]}, {f"null_{EVENT_TIME}": 1}),
    ("absurd times", {EVENT_TIME: ["soon", "10000-01-01", *MOMENTS[2:]]}, {f"unparsable_{EVENT_TIME}": 2}),
    ("absurd times", {EVENT_TIME: ["0001-01-01", *MOMENTS[1:]]}, {f"too_early_{EVENT_TIME}": 1}),
    ("NaN and infinities", {TARGET: [NAN, INF, *map(float, GOOD[TARGET][2:])]}, {"not_finite_target": 2}),
    ("null labels", {TARGET: [None, *GOOD[TARGET][1:]]}, {"null_target": 1}),
    ("keys that are no whole numbers", {"customer_id": ["abc", *WORDS]}, {"unparsable_customer_id": 1}),
    ("keys that are no whole numbers", {"customer_id": [1.5, *FLOATS]}, {"unparsable_customer_id": 1}),
    ("keys beyond 2^53 as floats", {"customer_id": [2.0**53, *FLOATS]}, {"inexact_customer_id": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "changed", "reasons"), REJECTED, ids=[f"{r[0]}: {r[2]}" for r in REJECTED])
def test_rejected(place: Path, proven: Proven, row: str, changed: dict[str, Any], reasons: dict[str, int]) -> None:
    made = one(place, **changed)
    assert made.reasons == reasons
    assert len(made.rows) == ROWS - sum(reasons.values())
    assert_right(made)
    proven(row, "feature-store", "rejected, counted by reason")


def assert_right(made: Joined) -> None:
    """Each row has its own customer's features of the last time before it; the canary was planted, and not found."""
    assert made.computed.planted > 0
    for row in made.rows.itertuples():
        day = max((time for time in training_sets.TIMES if time <= row.event_timestamp), default=None)
        wanted = None if day is None else row.customer_id * 1000.0 + (day - DAY).days
        assert row.feature_total_spent == wanted


KEYS: list[tuple[str, list[Any] | pa.Array]] = [
    ("text", [str(key) for key in GOOD["customer_id"]]),
    ("floats", [float(key) for key in GOOD["customer_id"]]),
    ("decimals", pa.array(map(Decimal, GOOD["customer_id"]), pa.decimal128(20, 2))),
    ("int8", pa.array(GOOD["customer_id"], pa.int8())),
]


@pytest.mark.parametrize(("what", "keys"), KEYS, ids=[case[0] for case in KEYS])
def test_keys_of_another_type_find_their_features(place: Path, proven: Proven, what: str, keys: Any) -> None:
    made = one(place, customer_id=keys)
    assert made.gate.verdict == "pass"
    assert_right(made)
    proven("keys of another type in the spine", "feature-store", "the same features")


def test_rows_without_their_key_are_kept_and_find_nothing(place: Path, proven: Proven) -> None:
    made = one(place, customer_id=[None, *GOOD["customer_id"][1:]])
    assert made.computed.null_keys == 1
    assert made.rows["feature_total_spent"].isna().sum() == 1
    proven("null keys", "feature-store", "in a spine: kept without features, counted")


def test_times_before_all_features_are_refused_by_the_gate(place: Path, proven: Proven) -> None:
    made = one(place, **{EVENT_TIME: [DAY - dt.timedelta(days=5)] * ROWS})
    assert made.computed.matched == {"customer-features": 0}
    assert "40 of 40 rows (100.00%) found no customer-features in time" in made.faults
    proven("label times outside of the histories", "feature-store", "refused by the gate")


def test_times_after_all_features_have_the_last(place: Path, proven: Proven) -> None:
    times = [DAY + dt.timedelta(days=3_000, hours=row) for row in range(ROWS)]
    late = one(place, **{EVENT_TIME: times})
    assert_right(late)
    assert late.computed.matched == {"customer-features": ROWS}
    proven("label times outside of the histories", "feature-store", "after them: the last features")


def test_rows_twice_are_kept_and_told(place: Path, proven: Proven) -> None:
    made = join(place, {"a.parquet": GOOD, "b.parquet": GOOD})
    assert (len(made.rows), made.computed.duplicates) == (2 * ROWS, ROWS)
    assert any("40 rows repeat the customer_id" in check.message for check in made.gate.checks)
    proven("duplicate rows in a spine", "feature-store", "kept, and told by the gate")


TARGETS: list[tuple[str, Any, str]] = [
    ("all null", pa.nulls(ROWS), r"spine: 40 of 40 rows (100.00%) were rejected"),
    ("all null", pa.nulls(ROWS, pa.float64()), r"spine: 40 of 40 rows (100.00%) were rejected"),
    ("constant", [1] * ROWS, "target has 1 class: nothing can be learned"),
    ("constant", [1.5] * ROWS, "target has 1 class: nothing can be learned"),
    ("constant", ["yes"] * ROWS, "target has 1 class: nothing can be learned"),
    ("constant", [True] * ROWS, "target has 1 class: nothing can be learned"),
    ("of long texts", ["x" * 10_000 + str(row % 3) for row in range(ROWS)], "too many different values, or long ones"),
]


@pytest.mark.parametrize(("what", "target", "message"), TARGETS, ids=range(len(TARGETS)))
def test_targets_that_teach_nothing_are_refused_by_the_gate(
    place: Path, proven: Proven, what: str, target: Any, message: str
) -> None:
    made = one(place, target=target)
    assert message in made.faults
    proven(f"a target that is {what}", "feature-store", "refused by the gate")


BOOLEANS: list[tuple[str, str, set[object]]] = [
    ("1 and 0", csv(spine(target=[1, 0] * 20)), {1, 0}),
    ("yes and no", csv(spine(target=["yes", "no"] * 20)), {"yes", "no"}),
    ("True and FALSE", csv(spine(target=["True", "FALSE"] * 20)), {True, False}),
]


@pytest.mark.parametrize(("what", "text", "values"), BOOLEANS, ids=[case[0] for case in BOOLEANS])
def test_truth_in_any_words_is_two_classes(
    place: Path, proven: Proven, what: str, text: str, values: set[object]
) -> None:
    made = join(place, {"s.csv": text})
    assert made.gate.verdict == "pass"
    assert set(made.rows[TARGET]) == values
    proven("booleans as 0/1, yes/no", "feature-store", "two classes, as they are written")


def test_numbers_beside_booleans_stay_numbers(place: Path) -> None:
    made = join(place, {"a.parquet": spine(target=[True, False] * 20), "b.parquet": spine(target=[2, 5] * 20)})
    assert set(made.rows[TARGET]) == {0, 1, 2, 5}


def test_a_spines_own_columns_of_our_names_are_not_ours(place: Path) -> None:
    own = {**GOOD, "feature_total_spent": [9] * ROWS, "as_of": [DAY] * ROWS, "_spine_order": [0] * ROWS}
    assert_right(join(place, {"s.parquet": own}))


@pytest.mark.parametrize(
    ("at", "days", "message"),
    [
        (("1990-01-01",), 30, r"0 rows, where at least 1"),
        (("2090-01-01",), 30, r"no time of 2090-01-01 has 30 days behind it by 2024-05-\d\d"),
        (("2024-05-03",), 3_000, r"has 3000 days behind it.*give earlier times, fewer days, or a later --as-of"),
    ],
)
def test_label_times_outside_of_the_events(
    place: Path, proven: Proven, at: tuple[str, ...], days: int, message: str
) -> None:
    uri = put(place / "t", {"t.parquet": transactions()})
    definitions = replace(STANDARD, events={"transactions": replace(TRANSACTIONS, uri=uri)})
    label = Label(name="spends", entity="customer_id", at=at, days=days, target=pl.len())
    try:
        told = join(place, {}, label=label, definitions=definitions).faults
    except SourceError as fault:
        told = str(fault)  # some are refused by the job, some by the gate
    assert re.search(message, told), told
    proven("label times outside of the events", "feature-store", "refused, naming times and cure")
