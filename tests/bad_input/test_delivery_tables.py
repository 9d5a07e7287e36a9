"""Tables that can't be delivered as they are: refused, rejected with a reason, or right."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.training_delivery import training_delivery
from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.delivery.source import find_source
from tasks.io.errors import ConfigError, GateFailed, PipelineError, VersionNotFound
from tasks.runner import worth_retrying
from tasks.store import versions
from tests.bad_input.deliveries import ROWS, deliver, table
from tests.delivery.sources import FEATURES, configured, publish
from tests.tables import Proven

pytestmark = pytest.mark.usefixtures("ray_cluster")
NAN, INF = float("nan"), float("inf")
LONG = ["x" * 10_000 + str(row % 3) for row in range(ROWS)]

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], type[PipelineError], str]] = [
    # row of the table, changed columns, settings, error, message
    ("a column is missing", {"target": None}, {}, ConfigError, r"no column 'target' to learn: name one with --target"),
    ("a column is missing", {}, {"target": "targe"}, ConfigError, r"no column 'targe'; did you mean 'target'\?"),
    ("a column is missing", {}, {"features": "spend"}, ConfigError, r"no column 'spend'; did you mean 'spent'\?"),
    ("a column is missing", {}, {"entity": "client"}, ConfigError, r"entity: .* has no column 'client'"),
    (
        "a column is of another type",
        {"spent": [b"1"] * ROWS},
        {"features": "spent"},
        ConfigError,
        r"'spent' is binary: only",
    ),
    (
        "a column is of another type",
        {"target": [dt.date(2024, 1, 1)] * ROWS},
        {},
        ConfigError,
        r"'target' is date32.*only",
    ),
    (
        "a column is of another type",
        {"target": pa.nulls(ROWS)},
        {},
        ConfigError,
        r"'target' is null: only text, booleans",
    ),
    (
        "a column is of another type",
        {"is_training_ready": ["yes"] * ROWS},
        {},
        ConfigError,
        r"'is_training_ready' is string, no boolean: publish it as one, or take all rows with --no-ready-only",
    ),
    (
        "a column is nested",
        {"spent": [[1.0]] * ROWS},
        {"features": "spent"},
        ConfigError,
        r"'spent' is list.*derive one",
    ),
    ("a column is nested", {"target": [{"a": 1}] * ROWS}, {}, ConfigError, r"'target' is struct.*only text, booleans"),
    (
        "a column is nested",
        {"customer_id": [[1]] * ROWS},
        {},
        ConfigError,
        r"column 'customer_id' names its rows, but is list",
    ),
    ("a column is nested", {"as_of": [[1]] * ROWS}, {}, ConfigError, r"column 'as_of' names its rows, but is list"),
    (
        "10,000-character and odd strings",
        {"city": LONG},
        {},
        ConfigError,
        r"'city' .* more than 1,024 bytes.*--exclude city",
    ),
    (
        "10,000-character and odd strings",
        {"target": LONG},
        {},
        ConfigError,
        r"target = 'target' .*long ones: that is no class",
    ),
    ("a version or dataset that isn't there", {}, {"version": 7}, VersionNotFound, r"has no version v7.*published: v1"),
    (
        "a version or dataset that isn't there",
        {},
        {"dataset": "feature-store/customer-feature"},
        VersionNotFound,
        r"no published version .*did you mean 'feature-store/customer-features'\?",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=[f"{case[0]}: {case[4][:30]}" for case in REFUSED])
def test_refused(tmp_path: Path, proven: Proven, case: tuple[str, Any, Any, type[PipelineError], str]) -> None:
    row, changed, options, kind, message = case
    with pytest.raises(kind, match=message) as caught:
        deliver(tmp_path, table(**changed), **options)
    assert not worth_retrying(caught.value)
    proven(row, "training-delivery", "refused, naming the column and the cure")


AGAINST: list[tuple[str, dict[str, Any], str]] = [
    (
        "no row is training-ready",
        {"is_training_ready": [False] * ROWS},
        "No row is left: 60 rows not_training_ready; take",
    ),
    (
        "no row is training-ready",
        {"is_training_ready": pa.nulls(ROWS, pa.bool_())},
        "No row is left: 60 rows not_training",
    ),
    ("a column is all null", {"spent": pa.nulls(ROWS)}, "rows (100.00%) have no spent"),
    ("a column is all null", {"spent": [NAN] * ROWS}, "rows (100.00%) have no spent"),
    ("a target that is all null", {"target": pa.nulls(ROWS, pa.float64())}, "60 of 60 rows (100.00%) were rejected"),
    ("a target that is constant", {"target": [1] * ROWS}, "target has 1 class: nothing can be learned"),
    ("a target that is constant", {"target": ["yes"] * ROWS}, "target has 1 class: nothing can be learned"),
    ("a target that is constant", {"target": [1.5] * ROWS}, "target is 1.5 in every row: nothing can be learned"),
    ("null keys", {"customer_id": pa.nulls(ROWS, pa.int64())}, "60 of 60 rows (100.00%) were rejected"),
    ("one key with all of the rows", {"customer_id": [1] * ROWS}, "where 80.0% of all are asked for"),
    ("huge values", {"target": [1e308, -1e308, 1.0] * 20}, "40 of 60 rows (66.67%) were rejected"),
]


@pytest.mark.parametrize("case", AGAINST, ids=[f"{case[0]}: {case[2][:30]}" for case in AGAINST])
def test_refused_by_the_gate(tmp_path: Path, proven: Proven, case: tuple[str, dict[str, Any], str]) -> None:
    row, changed, message = case
    made = deliver(tmp_path, table(**changed))
    assert message in made.faults
    proven(row, "training-delivery", "refused by the gate")


def test_a_version_without_rows_is_refused_by_the_gate(tmp_path: Path, proven: Proven) -> None:
    made = deliver(tmp_path, pa.table(table()).slice(0, 0))
    assert "0 rows, where at least 1 are asked for" in made.faults
    proven("a file without rows", "training-delivery", "refused by the gate")


ODD = [NAN, INF, -INF, None, 1e300, -0.0]


@pytest.mark.parametrize("nulls", ["mean", "zero", "reject"])
def test_what_is_missing_is_filled_marked_or_rejected(tmp_path: Path, proven: Proven, nulls: str) -> None:
    spent = [*ODD, *[float(row) for row in range(6, ROWS)]]
    made = deliver(tmp_path, table(spent=pa.array(spent, pa.float64())), nulls=nulls)
    values = made.samples["features"][:, made.names.index("spent")]
    assert np.isfinite(values).all()
    sound = [-0.0, *map(float, range(6, ROWS))]
    if nulls == "reject":
        assert made.reasons == {"null_spent": 5}
        assert sorted(values.tolist()) == sorted(np.float32(sound).tolist())
        assert "spent_missing" not in made.names
        proven("NaN and infinities", "training-delivery", "nulls=reject: rejected, counted")
        return
    flags = made.samples["features"][:, made.names.index("spent_missing")]
    assert flags.sum() == 5
    fills = set(values[flags == 1].tolist())
    assert len(fills) == 1
    assert fills == {0.0} or nulls == "mean"
    assert sorted(values[flags == 0].tolist()) == sorted(np.float32(sound).tolist())
    proven("NaN and infinities", "training-delivery", f"nulls={nulls}: filled, and marked in a column")


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spent=st.lists(st.none() | st.floats(), min_size=ROWS, max_size=ROWS),
    cities=st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=4), min_size=ROWS, max_size=ROWS),
    nulls=st.sampled_from(["mean", "zero", "reject"]),
)
def test_whatever_the_values_are_every_row_is_accounted_for_and_the_matrix_is_finite(
    tmp_path_factory: pytest.TempPathFactory, spent: list[float | None], cities: list[str | None], nulls: str
) -> None:
    columns = table(spent=pa.array(spent, pa.float64()), city=pa.array(cities, pa.string()))
    place = tmp_path_factory.mktemp("values")
    try:
        made = deliver(place, columns, nulls=nulls)
    except ConfigError as fault:
        assert "nothing can be encoded" in str(fault)  # noqa: PT017 - of some examples all rows are rejected
        return
    if made.samples:
        assert np.isfinite(made.samples["features"]).all()


def test_keys_that_are_nan_are_none(tmp_path: Path, proven: Proven) -> None:
    made = deliver(tmp_path, table(customer_id=[NAN, *map(float, range(1, ROWS))]))
    assert made.reasons == {"null_customer_id": 1}
    proven("null keys", "training-delivery", "rejected, counted by reason")


def test_views_of_text_are_text(tmp_path: Path) -> None:
    """A type that pyarrow's own readers give, and that its kernels can't take rows of."""
    views = {name: pa.array(["b", "a"] * 30).cast(pa.string_view()) for name in ("city", "target")}
    made = deliver(tmp_path, table(**views))
    assert made.copy.definition["label"]["classes"] == ["a", "b"]
    assert {"city=a", "city=b"} <= set(made.names)


def test_columns_of_odd_names_are_features_of_their_own(tmp_path: Path, proven: Proven) -> None:
    odd = {"a \"b'\n😀": [1.0, 2.0] * 30, "a[b]*": [3.0, 4.0] * 30, "Spent": [1.0, 2.0] * 30, "SPENT": ["u", "v"] * 30}
    made = deliver(tmp_path, {**table(), **odd})
    assert {"a \"b'\n😀", "a[b]*", "Spent", "SPENT=u", "SPENT=v", "spent"} <= set(made.names)
    assert len(set(made.names)) == made.samples["features"].shape[1]
    only = find_source(configured(str(tmp_path), features="a[b]*"))
    assert only.features == ("a[b]*",)
    proven("column names with spaces, quotes, other capitals", "training-delivery", "features as any other")


# As flows


def start(root: Path, **settings: Any) -> BaseException:
    config = DeliveryConfig(root=str(root), training=TrainingConfig(enabled=False), **settings)
    state = training_delivery(config, return_state=True)
    error = state.result(raise_on_failure=False)
    assert isinstance(error, BaseException), "the run has published"
    return error


@pytest.mark.usefixtures("stack")
def test_a_run_without_a_ready_row_publishes_nothing_and_says_why(tmp_path: Path, proven: Proven) -> None:
    columns = pa.table(table(is_training_ready=[False] * ROWS))
    publish(str(tmp_path), FEATURES, [("", columns)], {"entity": "customer_id"})
    error = start(tmp_path)
    assert isinstance(error, GateFailed)
    assert "No row is left: 60 rows not_training_ready; take all rows with --no-ready-only" in str(error)
    assert versions.published_versions(str(tmp_path), "training-datasets/streaming-ready/customer-features") == []
    proven("no row is training-ready", "training-delivery", "the run fails, nothing is published")
