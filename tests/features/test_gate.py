"""Every check of the gate can fail, and none fails on good data."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.definitions import FeatureGroup
from tasks.features.gate import GroupFigures, judge_group
from tasks.quality.profile import profile_table
from tasks.store.layout import CREATED, VERSION
from tasks.store.manifest import GateResult, Manifest, RowBalance
from tests.gates import of, one_check, passes_every_check
from tests.manifests import manifest

AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
ROWS = 1_000
SPENDING = FeatureGroup(
    name="spending",
    entity="customer_id",
    dimension="customers",
    features={"purchases": pl.len(), "spent": pl.col("amount").sum()},
    bounds={"purchases": (1, None), "spent": (None, 1e6)},
)
FEATURES = ("purchases", "spent", "segment")  # the last one of the dimension


def data(rows: int = ROWS, **changes: Any) -> pa.Table:
    """Good rows, as they are written; changes replace columns, None removes one."""
    draw = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "customer_id": pa.array(range(rows)),
        "purchases": pa.array(draw.integers(1, 50, rows)),
        "spent": pa.array(draw.normal(100, 10, rows)),
        "segment": pa.array(draw.choice(["a", "b"], rows).tolist()),
        "missing_value_ratio": pa.array([0.0] * rows),
        "outlier_ratio": pa.array([0.0] * rows),
        "feature_quality_score": pa.array([1.0] * rows),
        "is_training_ready": pa.array([True] * rows),
        "as_of": pa.array([AS_OF] * rows, pa.timestamp("us", "UTC")),
        CREATED: pa.array([AS_OF] * rows, pa.timestamp("us", "UTC")),
        VERSION: pa.array(["v1"] * rows),
    } | changes
    return pa.table({name: values for name, values in columns.items() if values is not None})


EVENTS = RowBalance(name="transactions", rows_in=5_000, rows_out=5_000)
CUSTOMERS = RowBalance(name="customers", rows_in=ROWS, rows_out=ROWS)
ENTITIES = RowBalance(name="spending", rows_in=ROWS, rows_out=ROWS)


def judge(table: pa.Table | None = None, config: FeatureStoreConfig | None = None, **changes: Any) -> GateResult:
    table = data() if table is None else table
    previous = changes.pop("previous", None)
    figures: dict[str, Any] = {
        "group": SPENDING,
        "schema": table.schema,
        "features": FEATURES,
        "profile": profile_table(table),
        "balances": (EVENTS, CUSTOMERS, ENTITIES),
        "duplicate_keys": 0,
        "unmatched": 0,
        "ready": ROWS,
        "newest_event": AS_OF,
        "as_of": AS_OF,
    }
    return judge_group(config or FeatureStoreConfig(), GroupFigures(**figures | changes), previous)


def thresholds(**values: Any) -> FeatureStoreConfig:
    return FeatureStoreConfig(thresholds=Thresholds(**values))


def published(table: pa.Table) -> Manifest:
    """The manifest of an earlier version with these rows."""
    return manifest("feature-store/spending", table.schema, profile=profile_table(table).columns())


def test_good_data_pass_every_check() -> None:
    result = judge(previous=published(data()), config=thresholds(fresh_warn_days=1, fresh_fail_days=2))
    passes_every_check(
        result,
        "rows, schema, unique, balance, rejected, reference, nulls, finite, range, outliers, ready, freshness, drift",
    )


DAY = dt.timedelta(days=1)


@pytest.mark.parametrize(
    ("times", "before", "judged"),
    [
        ((AS_OF,), (AS_OF - DAY,), True),  # day by day
        ((AS_OF,), (AS_OF,), True),
        ((AS_OF,), (), True),  # the last version doesn't say
        ((AS_OF - DAY, AS_OF), (AS_OF,), False),  # a history against a snapshot
        ((AS_OF - DAY,), (AS_OF,), False),  # a day of the past, computed again
        ((AS_OF,), (AS_OF - DAY, AS_OF), False),
    ],
)
def test_drift_is_judged_between_versions_of_like_times(
    times: tuple[dt.datetime, ...], before: tuple[dt.datetime, ...], judged: bool
) -> None:
    previous = published(data()).model_copy(update={"as_of": before})
    checks = [check for check in judge(previous=previous, times=times).checks if check.name == "drift"]
    assert any(check.column for check in checks) == judged
    if not judged:
        assert [check.message.partition(":")[0] for check in checks] == ["Drift isn't judged"]


def gaps(share: float, values: Any) -> pa.Array:
    return pa.array(values, mask=np.arange(ROWS) < share * ROWS)


def replaced(balance: RowBalance, **changes: Any) -> RowBalance:
    return balance.model_copy(update=changes)


numbers = np.random.default_rng(1).normal(100, 10, ROWS)
shifted = data(spent=pa.array(numbers + 10))
CASES: list[tuple[str, Callable[[], GateResult], str, str | None, str]] = [
    # why, the judgement, check, column, verdict
    (
        "no rows",
        lambda: judge(data().slice(0, 0), ready=0),
        "rows",
        None,
        "fail",
    ),
    ("a declared feature is missing", lambda: judge_without("spent"), "schema", "spent", "fail"),
    ("a quality column is missing", lambda: judge(data(is_training_ready=None)), "schema", "is_training_ready", "fail"),
    ("a column too many", lambda: judge(data(debug=pa.array([1] * ROWS))), "schema", "debug", "fail"),
    ("an entity twice", lambda: judge(duplicate_keys=1), "unique", "customer_id", "fail"),
    (
        "rows vanish",
        lambda: judge(balances=(replaced(EVENTS, rows_out=4_999), CUSTOMERS, ENTITIES)),
        "balance",
        "transactions",
        "fail",
    ),
    (
        "entities vanish",
        lambda: judge(balances=(EVENTS, CUSTOMERS, replaced(ENTITIES, rows_in=ROWS + 1))),
        "balance",
        "spending",
        "fail",
    ),
    ("some rows are rejected", lambda: judge(balances=rejected(100)), "rejected", "transactions", "warn"),
    ("many rows are rejected", lambda: judge(balances=rejected(1_500)), "rejected", "transactions", "fail"),
    ("some without a dimension row", lambda: judge(unmatched=60), "reference", "customer_id", "warn"),
    ("most without a dimension row", lambda: judge(unmatched=910), "reference", "customer_id", "fail"),
    ("some nulls", lambda: judge(data(spent=gaps(0.2, numbers))), "nulls", "spent", "warn"),
    ("mostly nulls", lambda: judge(data(spent=gaps(0.6, numbers))), "nulls", "spent", "fail"),
    ("text is mostly null", lambda: judge(data(segment=gaps(0.6, ["a"] * ROWS))), "nulls", "segment", "fail"),
    ("a NaN", lambda: judge(data(spent=pa.array([np.nan, *numbers[1:]]))), "finite", "spent", "fail"),
    ("an infinity", lambda: judge(data(spent=pa.array([np.inf, *numbers[1:]]))), "finite", "spent", "fail"),
    ("below the bounds", lambda: judge(data(purchases=pa.array([0] * ROWS))), "range", "purchases", "fail"),
    ("above the bounds", lambda: judge(data(spent=pa.array([1e7] * ROWS))), "range", "spent", "fail"),
    ("some outliers", lambda: judge(data(outlier_ratio=pa.array([0.3] * ROWS))), "outliers", None, "warn"),
    ("many outliers", lambda: judge(data(outlier_ratio=pa.array([0.6] * ROWS))), "outliers", None, "fail"),
    ("few ready", lambda: judge(ready=400), "ready", None, "warn"),
    ("too few ready", lambda: judge(ready=400, config=thresholds(ready_fail=0.45)), "ready", None, "fail"),
    ("old", lambda: aged(2, fresh_warn_days=1, fresh_fail_days=7), "freshness", None, "warn"),
    ("too old", lambda: aged(8, fresh_warn_days=1, fresh_fail_days=7), "freshness", None, "fail"),
    ("old, where only failing is asked for", lambda: aged(8, fresh_fail_days=7), "freshness", None, "fail"),
    ("old, where only a warning is asked for", lambda: aged(999, fresh_warn_days=1), "freshness", None, "warn"),
    ("no event", lambda: judge(newest_event=None, config=thresholds(fresh_warn_days=1)), "freshness", None, "fail"),
    ("drift", lambda: judge(shifted, previous=published(data())), "drift", "spent", "fail"),
    (
        "drift of text",
        lambda: judge(data(segment=pa.array(["a"] * ROWS)), previous=published(data())),
        "drift",
        "segment",
        "fail",
    ),
    (
        "drift within wider bounds",
        lambda: judge(shifted, previous=published(data()), config=thresholds(drift_warn=0.2, drift_fail=9)),
        "drift",
        "spent",
        "warn",
    ),
    ("a column that the last version had", lambda: judge(previous=BEFORE["a column more"]), "schema", "brand", "fail"),
    ("a column's type is another", lambda: judge(previous=BEFORE["another type"]), "schema", "purchases", "fail"),
]


def judge_without(column: str, config: FeatureStoreConfig | None = None) -> GateResult:
    """A file without a feature's column; what is profiled is what is declared."""
    others = tuple(name for name in FEATURES if name != column)
    return judge(data(**{column: None}), config, profile=profile_table(data()), features=others)


def rejected(count: int) -> tuple[RowBalance, ...]:
    return replaced(EVENTS, rows_out=5_000 - count, rejected={"null_amount": count}), CUSTOMERS, ENTITIES


def aged(days: int, **bounds: float) -> GateResult:
    return judge(newest_event=AS_OF - dt.timedelta(days=days), config=thresholds(**bounds))


BEFORE = {
    "a column more": published(data(brand=pa.array(["x"] * ROWS))),
    "another type": published(data(purchases=pa.array([1.5] * ROWS))),
}


test_check = one_check(CASES)


def test_a_schema_may_change_when_that_is_allowed() -> None:
    allowed = FeatureStoreConfig(allow_schema_change=True)
    assert of(judge(previous=BEFORE["a column more"], config=allowed), "schema").verdict == "pass"
    result = judge(previous=BEFORE["another type"], config=allowed)
    assert of(result, "schema").verdict == "pass"


def test_a_new_feature_needs_no_permission() -> None:
    assert judge(previous=published(data(spent=None))).verdict == "pass"


def test_even_then_every_declared_feature_must_be_there() -> None:
    result = judge_without("spent", FeatureStoreConfig(allow_schema_change=True))
    assert of(result, "schema").column == "spent"


WITHOUT = [
    ("the last version, no drift", {}, "drift"),
    ("bounds of age, no freshness", {}, "freshness"),
    ("a dimension table, no references", {"balances": (EVENTS, ENTITIES)}, "reference"),
]


@pytest.mark.parametrize(("why", "changes", "name"), WITHOUT, ids=[case[0] for case in WITHOUT])
def test_without(why: str, changes: dict[str, Any], name: str) -> None:
    assert name not in {check.name for check in judge(**changes).checks}


def test_drift_is_not_judged_on_few_rows() -> None:
    few = data().slice(0, 100)
    assert of(judge(shifted, previous=published(few)), "drift", "spent").verdict == "pass"


def test_the_share_of_rejected_rows_is_not_asked_of_entities() -> None:
    """An entity without a dimension row is rejected too, and has a bound of its own."""
    entities = replaced(ENTITIES, rows_in=2 * ROWS, rejected={"no_customers_row": ROWS})
    result = judge(balances=(EVENTS, CUSTOMERS, entities))
    assert {check.column for check in result.checks if check.name == "rejected"} == {"transactions", "customers"}


def test_a_group_without_dimension_has_no_references() -> None:
    result = judge(group=dataclasses.replace(SPENDING, dimension=None), balances=(EVENTS, ENTITIES))
    assert "reference" not in {check.name for check in result.checks}
