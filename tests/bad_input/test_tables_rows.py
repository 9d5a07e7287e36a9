"""Rows with wrong values: each is rejected with a reason and kept aside, or counts as it should; an oracle says how."""

from __future__ import annotations

import datetime as dt
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bad_input.shop import (
    AS_OF,
    CUSTOMERS,
    FIRST,
    ROWS,
    Made,
    customers,
    here_and_now,
    make,
    products,
    transactions,
)
from tests.features import oracle
from tests.tables import Proven

pytestmark = pytest.mark.usefixtures("ray_cluster")
FRESH_PLACE = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAN, INF = float("nan"), float("inf")
GOOD = transactions()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    here_and_now(monkeypatch)


def assert_as_by_hand(made: Made, kept: dict[str, list[Any]]) -> None:
    """The customers' features are those of a brute force over the rows that must have been kept."""
    expected = oracle.customer_features(pd.DataFrame(kept), AS_OF)
    assert made.features["customer_id"].to_list() == expected["customer_id"].to_list()
    for name in expected.columns:
        ours, theirs = made.features[name], expected[name]
        if ours.dtype == np.float64:
            scale = 1e-9 * max(1.0, *map(abs, kept["amount"]))
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=scale, err_msg=name)
        elif name != "spending_trend":
            assert ours.to_list() == theirs.to_list(), name


# Amounts


@FRESH_PLACE
@given(
    amounts=st.lists(
        st.none()
        | st.sampled_from([NAN, INF, -INF, -0.0, 0.0])
        | st.floats(-1e100, 1e100)
        | st.integers(-(2**53), 2**53).map(float),
        min_size=ROWS,
        max_size=ROWS,
    )
)
def test_whatever_the_amounts_are_the_finite_ones_count(
    tmp_path_factory: pytest.TempPathFactory, in_this_process: None, amounts: list[float | None]
) -> None:
    place = tmp_path_factory.mktemp("amounts")
    made, _ = make(place, {"t.parquet": transactions(amount=pa.array(amounts, pa.float64()))})
    sound = [amount is not None and math.isfinite(amount) for amount in amounts]
    nulls = sum(amount is None for amount in amounts)
    wanted = {"null_amount": nulls, "not_finite_amount": ROWS - nulls - sum(sound)}
    assert made.reasons == {reason: count for reason, count in wanted.items() if count}
    kept = {name: [v for v, ok in zip(values, sound, strict=True) if ok] for name, values in GOOD.items()}
    kept["amount"] = [float(amount) for amount, ok in zip(amounts, sound, strict=True) if ok and amount is not None]
    keep_sums(made, kept)


def keep_sums(made: Made, kept: dict[str, list[Any]]) -> None:
    """Counts and sums by customer; what cancels in sums of large amounts is as inexact as floats are."""
    by_customer: dict[int, list[float]] = {}
    for customer, amount in zip(kept["customer_id"], kept["amount"], strict=True):
        by_customer.setdefault(customer, []).append(amount)
    found = made.features.set_index("customer_id")
    assert found["transaction_count"].to_dict() == {key: len(values) for key, values in by_customer.items()}
    for key, values in by_customer.items():
        largest = max(map(abs, values))
        assert found["total_spent"][key] == pytest.approx(math.fsum(values), rel=1e-12, abs=1e-12 * largest)


def test_not_finite_amounts_are_rejected_and_the_rest_is_right(tmp_path: Path, proven: Proven) -> None:
    odd = [NAN, INF, -INF, None]
    amounts = pa.array([*odd, *GOOD["amount"][4:]], pa.float64())
    made, _ = make(tmp_path, {"t.parquet": transactions(amount=amounts)})
    assert made.reasons == {"not_finite_amount": 3, "null_amount": 1}
    assert set(made.rejected["_row"].to_list()) == {0, 1, 2, 3}
    assert_as_by_hand(made, {name: values[4:] for name, values in GOOD.items()})
    proven("NaN and infinities", "feature-store", "rejected, counted by reason")


def test_sums_that_overflow_are_refused_by_the_gate(tmp_path: Path, proven: Proven) -> None:
    made, _ = make(tmp_path, {"t.parquet": transactions(amount=[1e308] * ROWS)})
    assert "total_spent holds 0 NaN and 8 infinities" in made.faults
    proven("amounts whose sum overflows", "feature-store", "refused by the gate, naming the feature")


def test_a_negative_zero_is_nothing_paid(tmp_path: Path, proven: Proven) -> None:
    amounts = [-0.0, *GOOD["amount"][1:]]
    made, _ = make(tmp_path, {"t.parquet": transactions(amount=amounts)}, negative_amounts="reject")
    assert made.reasons == {}
    assert_as_by_hand(made, {**GOOD, "amount": amounts})
    proven("a negative zero", "feature-store", "counts as zero")


@pytest.mark.parametrize("column", ["customer_id", "product_id", "timestamp", "amount"])
def test_a_column_without_any_value_leaves_nothing_to_publish(
    tmp_path: Path, in_this_process: None, proven: Proven, column: str
) -> None:
    made, _ = make(tmp_path, {"t.parquet": transactions(**{column: pa.nulls(ROWS)})})
    assert made.reasons == {f"null_{column}": ROWS}
    assert f"{ROWS} of {ROWS} rows (100.00%) were rejected" in made.faults
    proven("a column is all null", "feature-store", "every row rejected, refused by the gate")


def test_a_dimension_column_without_any_value_is_refused_by_the_gate(tmp_path: Path, proven: Proven) -> None:
    made, _ = make(tmp_path, {"t.parquet": GOOD}, {"c.parquet": customers(age=pa.nulls(CUSTOMERS))})
    assert "8 of 8 rows (100.00%) have no age" in made.faults
    proven("a column is all null", "feature-store", "refused by the gate")


# Times

MOMENTS = st.datetimes(dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59))
ODD_TICKS = [-(2**63), 2**63 - 1, 2**62, 0, -1, 1, -62_135_596_800_000_001, 253_402_300_800_000_000]


@FRESH_PLACE
@given(
    moments=st.lists(MOMENTS, min_size=ROWS, max_size=ROWS),
    form=st.sampled_from(["us", "ms", "text", "naive", "dates"]),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns"]),
)
def test_whatever_the_times_are_each_row_is_kept_rejected_or_later(
    tmp_path_factory: pytest.TempPathFactory, in_this_process: None, moments: list[dt.datetime], form: str, zone: str
) -> None:
    aware = [moment.replace(tzinfo=dt.UTC, microsecond=0) for moment in moments]
    columns: dict[str, Any] = {
        "us": pa.array(aware, pa.timestamp("us", "UTC")),
        "ms": pa.array(aware, pa.timestamp("ms", "UTC")),
        "text": [moment.isoformat() for moment in aware],
        "naive": pa.array([moment.replace(tzinfo=None) for moment in aware], pa.timestamp("us")),
        "dates": [moment.date() for moment in aware],
    }
    place = tmp_path_factory.mktemp("times")
    made, _ = make(place, {"t.parquet": transactions(timestamp=columns[form])}, timezone=zone)
    balance = made.balances["transactions"]
    if form in ("us", "ms", "text"):  # no zone plays a part
        early = sum(moment < dt.datetime(1970, 1, 1, tzinfo=dt.UTC) for moment in aware)
        late = sum(moment > AS_OF for moment in aware)
        assert (sum(balance.rejected.values()), balance.filtered.get("after_as_of", 0)) == (early, late)
    assert set(made.reasons) <= {"too_early_timestamp", "unparsable_timestamp"}


@pytest.mark.parametrize("kind", ["us", "ms", "ns", "date32", "integers"])
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_ticks_that_are_no_time_at_all_are_rejected(
    tmp_path: Path, in_this_process: None, proven: Proven, kind: str, zone: str
) -> None:
    """Values that a cast would wrap around, or that a time zone's rules don't know."""
    ticks = pa.array([ODD_TICKS[row % len(ODD_TICKS)] for row in range(ROWS)], pa.int64())
    if kind == "date32":
        ticks = pa.array([(-(2**31), 2**31 - 1, 0, 2**30)[row % 4] for row in range(ROWS)], pa.int32())
    options: dict[str, Any] = {"epoch_unit": "us"} if kind == "integers" else {}
    types = {"date32": pa.date32(), "integers": pa.int64()}
    column = ticks.cast(types[kind] if kind in types else pa.timestamp(kind))
    made, _ = make(tmp_path, {"t.parquet": transactions(timestamp=column)}, timezone=zone, **options)
    assert set(made.reasons) <= {"too_early_timestamp", "unparsable_timestamp"}
    assert sum(made.reasons.values()) >= ROWS // 4
    proven("absurd times", "feature-store", "rejected, counted by reason")


TEXTS = {
    "0001-01-01": "too_early_timestamp",
    "1677-09-21T00:12:43": "too_early_timestamp",
    "1969-12-31T23:59:59": "too_early_timestamp",
    "10000-01-01": "unparsable_timestamp",
    "2024-13-01": "unparsable_timestamp",
    "2024-05-01T25:00": "unparsable_timestamp",
    "2024-03-31T02:30": "unparsable_timestamp",  # not in Berlin, where the clocks went forward
}


def test_times_as_text(tmp_path: Path, proven: Proven) -> None:
    later = ["2262-04-12", "9999-12-31T23:59:59.999999Z"]
    moments = [*TEXTS, *later, *[moment.isoformat() for moment in GOOD["timestamp"][len(TEXTS) + 2 :]]]
    made, _ = make(tmp_path, {"t.parquet": transactions(timestamp=moments)}, timezone="Europe/Berlin")
    assert made.reasons == Counter(TEXTS.values())
    assert made.balances["transactions"].filtered == {"after_as_of": 2}
    assert_as_by_hand(made, {name: values[len(TEXTS) + 2 :] for name, values in GOOD.items()})
    proven("absurd times", "feature-store", "rejected, counted by reason")
    proven("times in an hour that the clock skips", "feature-store", "rejected")


@pytest.mark.parametrize(
    ("count", "unit", "message"),
    [
        (
            1,
            "ms",
            r"The newest event is of 1970-01-\d\d: counts of a coarser unit, such as seconds.* taken for ms; give",
        ),
        (1_000, "us", r"The newest event is of 1970-01-\d\d: counts of a coarser unit"),
        (1_000, "s", r"transactions: 40 of 40 rows \(100\.00%\) were rejected"),  # beyond the year 9999
        (1_000_000_000, "us", r"transactions: 40 of 40 rows \(100\.00%\) were rejected"),
    ],
)
@pytest.mark.usefixtures("in_this_process")
def test_counts_of_another_unit_are_refused_by_the_gate(
    tmp_path: Path, proven: Proven, count: int, unit: str, message: str
) -> None:
    ticks = [int(moment.timestamp()) * count for moment in GOOD["timestamp"]]
    made, _ = make(tmp_path, {"t.parquet": transactions(timestamp=ticks)}, epoch_unit=unit)
    assert re.search(message, made.faults), made.faults
    proven("times in another unit than said", "feature-store", "refused by the gate")


def test_events_of_the_future_alone_are_refused_by_the_gate(tmp_path: Path, proven: Proven) -> None:
    later = [moment + dt.timedelta(days=365) for moment in GOOD["timestamp"]]
    made, _ = make(tmp_path, {"t.parquet": transactions(timestamp=later)})
    assert made.balances["transactions"].filtered == {"after_as_of": ROWS}
    assert "All 40 events lie after 2024-07-01 00:00 UTC: give a later --as-of, or look at --epoch-unit" in made.faults
    proven("events of the future", "feature-store", "filtered, counted; nothing else: refused by the gate")


# Keys

BIG = 2**53


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()], ids=str)
def test_keys_that_a_float_cannot_hold_are_rejected(
    tmp_path: Path, in_this_process: None, proven: Proven, kind: pa.DataType
) -> None:
    """Two customers would become one."""
    limit = BIG if kind == pa.float64() else 2**24
    keys = [float(limit + 2 * row) if row % 2 else float(row) for row in range(ROWS)]
    made, _ = make(tmp_path, {"t.parquet": transactions(customer_id=pa.array(keys, kind))})
    assert made.reasons == {"inexact_customer_id": ROWS // 2}
    assert set(made.features["customer_id"]) == set(range(0, ROWS, 2))
    proven("keys beyond 2^53 as floats", "feature-store", "rejected, counted by reason")


def test_large_keys_as_whole_numbers_stay_apart(tmp_path: Path, in_this_process: None) -> None:
    keys = [BIG + row for row in range(ROWS)]
    made, _ = make(tmp_path, {"t.parquet": transactions(customer_id=keys)})
    assert made.features["customer_id"].to_list() == keys


@pytest.mark.parametrize("column", ["customer_id", "product_id"])
def test_null_keys_are_rejected(tmp_path: Path, in_this_process: None, proven: Proven, column: str) -> None:
    made, _ = make(tmp_path, {"t.parquet": transactions(**{column: [None, *GOOD[column][1:]]})})
    assert made.reasons == {f"null_{column}": 1}
    assert_as_by_hand(made, {name: values[1:] for name, values in GOOD.items()})
    proven("null keys", "feature-store", "rejected, counted by reason")


PYTHONS_BLANKS = "\x1c\x1d\x1e\x1f"
"""Separators that Python's `strip` alone takes for blanks."""

TEXT_KEYS = st.text(st.characters(codec="utf-8", exclude_characters=PYTHONS_BLANKS), max_size=5) | st.sampled_from(
    ["\0", "a\0", "\n", "😀", "\u202eabc", '"', "'", "\\", "x" * 10_000, "é", "e\u0301", "A", "a", "null"]
)


@FRESH_PLACE
@given(keys=st.lists(TEXT_KEYS, min_size=ROWS, max_size=ROWS))
def test_whatever_text_keys_are_each_is_an_entity(
    tmp_path_factory: pytest.TempPathFactory, in_this_process: None, keys: list[str]
) -> None:
    place = tmp_path_factory.mktemp("keys")
    table = {"t.parquet": transactions(customer_id=pa.array(keys, pa.string()))}
    made, _ = make(place, table, rows_per_bucket=1_000)
    blank = sum(not key.strip() for key in keys)
    assert made.reasons == ({"null_customer_id": blank} if blank else {})
    counted = dict(zip(made.features["customer_id"], made.features["transaction_count"], strict=True))
    assert counted == Counter(key for key in keys if key.strip())


def test_long_and_odd_text(tmp_path: Path, proven: Proven) -> None:
    odd = ["x" * 10_000, "a\0b", "a\nb", "😀", "\u202eabc", 'say "hi"', "<script>", "'"]
    names = {"customer_id": [odd[row % 8] for row in range(ROWS)], "category": odd * (ROWS // 8)}
    dimension = customers(customer_id=odd, location=odd)
    made, _ = make(tmp_path, {"t.parquet": transactions(**names)}, {"c.parquet": dimension})
    assert sorted(made.features["customer_id"]) == sorted(odd)
    assert (made.features["location"] == made.features["customer_id"]).all()
    proven("10,000-character and odd strings", "feature-store", "kept as they are")


# Tables that don't fit together


def test_copies_in_a_dimension_are_dropped_and_contradictions_rejected(tmp_path: Path, proven: Proven) -> None:
    first = customers()
    again = customers(age=[20, 99, *[20 + row for row in range(2, CUSTOMERS)]])
    made, _ = make(tmp_path, {"t.parquet": GOOD}, {"a.parquet": first, "b.parquet": again})
    balance = made.balances["customers"]
    assert (balance.rows_in, balance.rows_out, balance.deduplicated) == (16, 8, 7)
    assert made.reasons == {"conflicting_customer_id": 1}
    assert made.rejected["age"].to_list() == [99]
    assert made.features["age"].to_list() == first["age"]
    proven("duplicate keys in a dimension", "feature-store", "copies dropped, contradictions rejected, both counted")


def test_transactions_that_are_alike_all_count(tmp_path: Path, in_this_process: None, proven: Proven) -> None:
    """Two coffees at one counter are two sales: nothing says that they are one."""
    made, _ = make(tmp_path, {"a.parquet": GOOD, "b.parquet": GOOD})
    assert_as_by_hand(made, {name: values * 2 for name, values in GOOD.items()})
    proven("transactions that are alike", "feature-store", "all count")


@pytest.mark.parametrize("missing", [1, CUSTOMERS])
def test_orphans(tmp_path: Path, proven: Proven, missing: int) -> None:
    strangers = [1000 + row if row < missing else row for row in range(CUSTOMERS)]
    made, _ = make(tmp_path, {"t.parquet": GOOD}, {"c.parquet": customers(customer_id=strangers)})
    assert made.reasons == {"no_customers_row": missing}
    assert made.balances["customer-features"].rejected == {"no_customers_row": missing}
    if missing == CUSTOMERS:
        assert "8 of 8 rows (100.00%) refer to a customer_id that doesn't exist" in made.faults
        proven("orphan foreign keys", "feature-store", "all: refused by the gate")
    else:
        assert made.gate.verdict == "warn"
        proven("orphan foreign keys", "feature-store", "some: rejected, counted")


def test_keys_of_another_form_find_nobody_and_the_gate_says_so(tmp_path: Path, in_this_process: None) -> None:
    padded = [f"00{row}" for row in range(CUSTOMERS)]
    made, _ = make(tmp_path, {"t.parquet": GOOD}, {"c.parquet": customers(customer_id=padded)})
    assert "8 of 8 rows (100.00%) refer to a customer_id that doesn't exist" in made.faults


def test_one_key_with_half_of_the_rows(tmp_path: Path, proven: Proven) -> None:
    """Its bucket is as large as it is; the features are those of pandas, and soon there."""
    count = 30_000
    draw = np.random.default_rng(0)
    keys = np.where(draw.random(count) < 0.5, 7, draw.integers(0, 2_000, count))
    rows = pd.DataFrame(
        {
            "customer_id": keys,
            "product_id": draw.integers(0, 50, count),
            "timestamp": pd.Timestamp(FIRST) + pd.to_timedelta(draw.integers(0, 50 * 86_400, count), unit="s"),
            "amount": draw.random(count).round(2),
            "category": "toys",
        }
    )
    started = time.monotonic()
    made, of_products = make(
        tmp_path,
        {"t.parquet": pa.Table.from_pandas(rows)},
        None,
        {
            "p.parquet": products(
                product_id=list(range(50)),
                category=["toys"] * 50,
                brand=["b"] * 50,
                price=[1.0] * 50,
                launch_date=[dt.date(2020, 1, 1)] * 50,
            )
        },
        rows_per_bucket=2_000,
    )
    assert time.monotonic() - started < 60, "a hang, not a slow machine"
    assert len(made.group.files) > 4
    sums = rows.groupby("customer_id")["amount"].agg(["size", "sum", "mean", "std"])
    found = made.features.set_index("customer_id")
    assert found["transaction_count"].to_dict() == sums["size"].to_dict()
    np.testing.assert_allclose(found["total_spent"], sums["sum"], rtol=1e-9)
    np.testing.assert_allclose(found["transaction_std"], sums["std"].fillna(0), rtol=1e-9, atol=1e-12)
    assert found["transaction_count"][7] > count * 0.45
    assert of_products.features["unique_customers"].sum() == rows.groupby("product_id")["customer_id"].nunique().sum()
    proven("one key with half of the rows", "feature-store", "right, by pandas")
