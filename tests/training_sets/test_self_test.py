"""Faults of a training set that its gate notices; the laws of all gates are in `tests.test_kinds`."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.features.config import FeatureStoreConfig, LabelThresholds
from tasks.quality import rules
from tasks.quality.faults import Trial
from tasks.quality.profile import profile_table
from tasks.store.manifest import FaultResult, FileEntry, Manifest, RowBalance
from tasks.training_sets import gate
from tasks.training_sets.gate import trial
from tests.gates import RULES, by_fault, lax, made_by, outcomes
from tests.manifests import manifest

START = dt.datetime(2024, 4, 30, tzinfo=dt.UTC)
ROWS = 2_000
FEATURES = ("feature_spent", "feature_trend", "feature_age")
EXPECTED = outcomes("""
    no rows          refused  rows
    duplicates       warned  repeated rows of customer_id
    lost rows        refused  balance of churn
    bad rows         refused  rejected of spine
    late features    refused  unmatched of customer-features
    future features  refused  canary
    no keys          refused  canary
    null keys        warned  nulls of customer_id
    null labels      refused  nulls of target
    one label        refused  target of target
    label copy       refused  leakage of feature_spent
    schema           refused  schema of feature_spent
    nulls            warned  nulls of feature_spent
    not finite       refused  finite of feature_spent
    shift            warned  drift of feature_spent
    late shift       warned  drift over time of feature_spent
""")
SAID = {
    "label copy": ("The label was copied into feature_spent.", "area under the ROC curve 1.0000"),
    "future features": ("The join was made to take", "got features from its far future"),
}
LAXEST = lax(bad_rows="rejected", late_features="unmatched", label_copy="leak", nulls="null") | {
    "shift": {"drift_warn": 1e9},
    "late shift": {"later_drift_warn": 1e9},
}
CHECKS = {
    **{fault: RULES[fault] for fault in ("no rows", "lost rows", "schema", "not finite")},
    **made_by(rules, duplicates="at_most", null_labels="check_nulls", one_label="check_target"),
    **made_by(rules, no_keys="check_canary", null_keys="check_nulls"),
}


def data(rows: int = ROWS) -> pa.Table:
    draw = np.random.default_rng(0)
    churned = np.random.default_rng(9).random(rows) < 0.2
    times = [START + dt.timedelta(hours=n) for n in range(rows)]
    return pa.table(
        {
            "customer_id": pa.array(draw.integers(0, 300, rows)),
            "event_timestamp": pa.array(times, pa.timestamp("us", "UTC")),
            "feature_spent": pa.array(draw.normal(100, 10, rows) - 10 * churned),
            "feature_trend": pa.array(draw.choice(["up", "down", "stable"], rows).tolist()),
            "feature_age": pa.array(draw.integers(18, 90, rows)),
            "target": pa.array(churned),
        }
    ).sort_by("customer_id")


def written(root: Path, table: pa.Table) -> Manifest:
    """The manifest of a training set with these rows."""
    directory = root / "feature-store" / "training-ready" / "churn" / "v1"
    directory.mkdir(parents=True)
    pq.write_table(table, directory / "part-00000-a1.parquet")
    references = {name: f"customer-features:{name.removeprefix('feature_')}" for name in FEATURES}
    return manifest(
        "feature-store/training-ready/churn",
        table.schema,
        created_at=START,
        files=(FileEntry(path="part-00000-a1.parquet", rows=len(table), bytes=1, digest=f"sha256:{'0' * 64}"),),
        balances=tuple(RowBalance(name=name, rows_in=len(table), rows_out=len(table)) for name in ("spine", "churn")),
        profile=profile_table(table).columns(),
        definition={
            "name": "churn",
            "entity": "customer_id",
            "spine": {"uri": "spine.parquet", "columns": {}},
            "features": list(references.values()),
            "ttl_days": None,
            "strict": False,
            "known_at": False,
            "columns": references,
        },
    )


def tried(root: Path, table: pa.Table | None = None, **thresholds: Any) -> Trial[Any]:
    config = FeatureStoreConfig(label_thresholds=LabelThresholds(**thresholds))
    return trial(str(root), written(root, data() if table is None else table), config, None)


def outcomes(root: Path, table: pa.Table | None = None) -> dict[str, FaultResult]:
    return by_fault(tried(root, table))


def test_a_canary_that_never_sings_makes_the_gate_blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "plant", lambda *_args, **_more: 1)
    results = outcomes(tmp_path)
    assert (results["future features"].outcome, results["no keys"].outcome) == ("blind", "blind")


def test_too_few_rows_for_leakage_are_called_blind_with_the_reason(tmp_path: Path) -> None:
    result = outcomes(tmp_path, data(12))["label copy"]
    assert result.outcome == "blind"
    assert "Leakage through feature_spent isn't judged" in result.message


@pytest.mark.parametrize("kind", ["number", "text"])
def test_a_label_of_any_kind_is_copied(tmp_path: Path, kind: str) -> None:
    draw = np.random.default_rng(1)
    labels = {"number": pa.array(draw.normal(size=ROWS)), "text": pa.array(draw.choice(["a", "b", "c"], ROWS).tolist())}
    table = data()
    table = table.set_column(table.schema.get_field_index("target"), "target", labels[kind])
    result = outcomes(tmp_path, table)["label copy"]
    assert (result.outcome, result.caught_by[0]) == ("refused", "leakage of feature_spent")
