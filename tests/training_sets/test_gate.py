"""Every check of a training set can fail or warn, and none does on good data."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.features.config import FeatureStoreConfig, LabelThresholds
from tasks.quality.profile import profile_table
from tasks.store.manifest import GateResult, Manifest, RowBalance
from tasks.training_sets.definition import FeatureReference, Model, SpineSource
from tasks.training_sets.gate import TrainingSetFigures, judge_training_set
from tests.gates import of, one_check, passes_every_check
from tests.manifests import manifest

START = dt.datetime(2024, 4, 30, tzinfo=dt.UTC)
ROWS = 2_000
LATER = 1_600  # rows from here on are the latest
FEATURES = ("feature_spent", "feature_trend", "feature_age")
GROUP = "customer-features"
MODEL = Model(
    name="churn",
    entity="customer_id",
    spine=SpineSource(uri="spine.parquet"),
    features=(FeatureReference(GROUP, "spent"), FeatureReference(GROUP, "trend"), FeatureReference(GROUP, "age")),
)
CHURNED = np.random.default_rng(9).random(ROWS) < 0.2


def data(**changes: Any) -> pa.Table:
    """Good rows in the order of time; changes replace columns, None removes one."""
    draw = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "customer_id": pa.array(draw.integers(0, 300, ROWS)),
        "event_timestamp": pa.array([START + dt.timedelta(hours=n) for n in range(ROWS)], pa.timestamp("us", "UTC")),
        "feature_spent": pa.array(draw.normal(100, 10, ROWS) - 10 * CHURNED),
        "feature_trend": pa.array(draw.choice(["up", "down", "stable"], ROWS).tolist()),
        "feature_age": pa.array(draw.integers(18, 90, ROWS)),
        "target": pa.array(CHURNED),
    } | changes
    return pa.table({name: values for name, values in columns.items() if values is not None})


SPINE = RowBalance(name="churn", rows_in=ROWS, rows_out=ROWS)


def figures(table: pa.Table, **changes: Any) -> TrainingSetFigures:
    found: dict[str, Any] = {
        "model": MODEL,
        "rows": table.num_rows,
        "schema": table.schema,
        "features": tuple(name for name in table.column_names if name.startswith("feature_")),
        "profile": profile_table(table),
        "profile_earlier": profile_table(table.slice(0, LATER)),
        "profile_later": profile_table(table.slice(LATER)),
        "balances": (SPINE,),
        "matched": {GROUP: ROWS},
        "planted": 50,
        "duplicates": 0,
        "sample": table,
    }
    return TrainingSetFigures(**found | changes)


def judge(
    table: pa.Table | None = None,
    *,
    config: FeatureStoreConfig | None = None,
    previous: Manifest | None = None,
    **changes: Any,
) -> GateResult:
    computed = figures(data() if table is None else table, **changes)
    return judge_training_set(config or FeatureStoreConfig(), computed, previous)


def published(table: pa.Table, model: Model = MODEL) -> Manifest:
    """The manifest of an earlier version with these rows."""
    profile, definition = profile_table(table).columns(), model.describe()
    return manifest("feature-store/training-ready/churn", table.schema, profile=profile, definition=definition)


def bounds(**values: Any) -> FeatureStoreConfig:
    return FeatureStoreConfig(label_thresholds=LabelThresholds(**values))


def test_good_data_pass_every_check() -> None:
    result = judge(previous=published(data()))
    passes_every_check(
        result,
        "rows, schema, balance, rejected, unmatched, canary, "
        "nulls, repeated rows, finite, target, leakage, drift over time, drift",
    )
    assert {c.column for c in result.checks if c.name == "leakage"} == set(FEATURES)


def gaps(share: float, values: Any) -> pa.Array:
    return pa.array(values, mask=np.arange(ROWS) < share * ROWS)


def balance(**changes: Any) -> tuple[RowBalance, ...]:
    return (SPINE.model_copy(update=changes),)


numbers = np.random.default_rng(1).normal(100, 10, ROWS)
growing = pa.array(numbers + np.where(np.arange(ROWS) < LATER, 0, 20))
leaking = np.where(CHURNED, 0.0, 30.0) + np.random.default_rng(2).normal(0, 1, ROWS)
weak_leak = np.where(CHURNED, 0.0, 2.6) + np.random.default_rng(2).normal(0, 1, ROWS)
CASES: list[tuple[str, Callable[[], GateResult], str, str | None, str]] = [
    # why, the judgement, check, column, verdict
    ("no rows", lambda: judge(data().slice(0, 0), matched={GROUP: 0}), "rows", None, "fail"),
    ("no target", lambda: judge(data(target=None)), "schema", "target", "fail"),
    ("no entity", lambda: judge(data(customer_id=None)), "schema", "customer_id", "fail"),
    ("no time", lambda: judge(data(event_timestamp=None)), "schema", "event_timestamp", "fail"),
    ("rows vanish", lambda: judge(balances=balance(rows_out=ROWS - 1)), "balance", "churn", "fail"),
    ("some rows are rejected", lambda: judge(balances=rejected(100)), "rejected", "churn", "warn"),
    ("many rows are rejected", lambda: judge(balances=rejected(1_000)), "rejected", "churn", "fail"),
    ("some without features", lambda: judge(matched={GROUP: ROWS // 2}), "unmatched", GROUP, "warn"),
    ("all without features", lambda: judge(matched={GROUP: 0}), "unmatched", GROUP, "fail"),
    ("no canary", lambda: judge(planted=0), "canary", None, "fail"),
    ("a row without its key", lambda: judge(data(customer_id=gaps(0.01, [1] * ROWS))), "nulls", "customer_id", "warn"),
    ("a row without target", lambda: judge(data(target=gaps(0.001, CHURNED))), "nulls", "target", "fail"),
    (
        "a feature that is missing",
        lambda: judge(data(feature_spent=gaps(0.5, numbers))),
        "nulls",
        "feature_spent",
        "warn",
    ),
    (
        "a feature that is missing where none may be",
        lambda: judge(data(feature_spent=gaps(0.5, numbers)), config=bounds(null_warn=0, null_fail=0.1)),
        "nulls",
        "feature_spent",
        "fail",
    ),
    ("rows twice", lambda: judge(duplicates=3), "repeated rows", "customer_id", "warn"),
    (
        "a NaN",
        lambda: judge(data(feature_spent=pa.array([np.nan, *numbers[1:]]))),
        "finite",
        "feature_spent",
        "fail",
    ),
    (
        "a target that is infinite",
        lambda: judge(data(target=pa.array([np.inf, *numbers[1:]]))),
        "finite",
        "target",
        "fail",
    ),
    ("one class", lambda: judge(data(target=pa.array([True] * ROWS))), "target", "target", "fail"),
    ("a rare class", lambda: judge(data(target=pa.array(np.arange(ROWS) < 20))), "target", "target", "warn"),
    ("a constant number", lambda: judge(data(target=pa.array([2.5] * ROWS))), "target", "target", "fail"),
    ("a leak", lambda: judge(data(feature_spent=pa.array(leaking))), "leakage", "feature_spent", "fail"),
    ("nearly a leak", lambda: judge(data(feature_spent=pa.array(weak_leak))), "leakage", "feature_spent", "warn"),
    (
        "a leak in words",
        lambda: judge(data(feature_trend=pa.array(np.where(CHURNED, "gone", "up").tolist()))),
        "leakage",
        "feature_trend",
        "fail",
    ),
    (
        "a leak of a number",
        lambda: judge(data(target=pa.array(numbers), feature_spent=pa.array(numbers * 2))),
        "leakage",
        "feature_spent",
        "fail",
    ),
    (
        "a leak that is allowed",
        lambda: judge(data(feature_spent=pa.array(leaking)), config=bounds(leak_warn=1, leak_fail=1)),
        "leakage",
        "feature_spent",
        "pass",
    ),
    ("later rows differ", lambda: judge(data(feature_spent=growing)), "drift over time", "feature_spent", "warn"),
    (
        "the target drifts",
        lambda: judge(data(target=pa.array(np.arange(ROWS) % 2 > (np.arange(ROWS) > LATER)))),
        "drift over time",
        "target",
        "warn",
    ),
    (
        "unlike the last version",
        lambda: judge(data(feature_spent=pa.array(numbers + 20)), previous=published(data())),
        "drift",
        "feature_spent",
        "warn",
    ),
    (
        "a column of another type than in the last version",
        lambda: judge(previous=published(data(feature_age=pa.array([1.5] * ROWS)))),
        "schema",
        "feature_age",
        "fail",
    ),
    (
        "a column that the last version had, of features named alike",
        lambda: judge(previous=published(data(feature_city=pa.array(["x"] * ROWS)))),
        "schema",
        "feature_city",
        "fail",
    ),
]


def rejected(count: int) -> tuple[RowBalance, ...]:
    return balance(rows_out=ROWS - count, rejected={"null_target": count})


test_check = one_check(CASES)


def test_drift_holds_nothing_up() -> None:
    shifted = data(feature_spent=pa.array(numbers * 100), target=pa.array(CHURNED))
    assert judge(shifted, previous=published(data())).verdict == "warn"


def test_a_model_that_names_other_features_has_other_columns() -> None:
    """What the last version had matters to who changed nothing."""
    before = dataclasses.replace(MODEL, features=(*MODEL.features, FeatureReference(GROUP, "city")))
    wider = published(data(feature_city=pa.array(["x"] * ROWS)), before)
    assert of(judge(previous=wider), "schema").verdict == "pass"


def test_a_schema_may_change_when_that_is_allowed() -> None:
    allowed = FeatureStoreConfig(allow_schema_change=True)
    previous = published(data(feature_age=pa.array(["x"] * ROWS), feature_city=pa.array(["x"] * ROWS)))
    result = judge(previous=previous, config=allowed)
    assert (of(result, "schema").verdict, result.verdict) == ("pass", "pass")


def test_further_entity_keys_are_no_surprise() -> None:
    assert judge(data(product_id=pa.array([1] * ROWS))).verdict == "pass"


def test_names_that_tell_what_their_entity_always_does_are_no_leak() -> None:
    """The sample's rows of one entity are judged together, if it says whose they are."""
    table = data()
    always = np.random.default_rng(3).random(300) < 0.3
    keys = table["customer_id"].to_numpy()
    told = data(feature_trend=pa.array([f"name {key}" for key in keys]), target=pa.array(always[keys]))
    assert of(judge(told), "leakage", "feature_trend").verdict == "pass"


def test_the_sample_may_lack_the_entity() -> None:
    sample = data(customer_id=None, event_timestamp=None)
    assert judge(sample=sample).verdict == "pass"


def test_without_rows_no_check_breaks() -> None:
    empty = data().slice(0, 0)
    assert judge(empty, matched={GROUP: 0}, planted=0).verdict == "fail"
