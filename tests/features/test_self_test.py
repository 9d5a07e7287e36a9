"""Faults of a feature group that its gate notices; the laws of all gates are in `tests.test_kinds`."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.definitions import FeatureGroup
from tasks.features.gate import trial
from tasks.quality import rules
from tasks.quality.faults import Trial
from tasks.quality.profile import profile_table
from tasks.store.manifest import FaultResult, FileEntry, Manifest, RowBalance
from tests.features.test_gate import AS_OF, data
from tests.gates import RULES, by_fault, lax, made_by, outcomes
from tests.manifests import manifest

GROUP = FeatureGroup(
    name="spending",
    entity="customer_id",
    dimension="customers",
    features={"purchases": pl.len(), "spent": pl.col("amount").sum()},
    bounds={"purchases": (1, None)},
)
FRESH = FeatureStoreConfig(thresholds=Thresholds(fresh_warn_days=1, fresh_fail_days=2))
EXPECTED = outcomes("""
    no rows       refused  rows
    duplicates    refused  unique of customer_id
    lost rows     refused  balance of spending
    bad events    refused  rejected of transactions
    orphans       refused  reference of customer_id
    schema        refused  schema of spent
    nulls         refused  nulls of purchases
    not finite    refused  finite of spent
    range         refused  range of purchases
    shift         refused  drift of purchases
    outliers      warned  outliers of all numeric features
    unready rows  warned  ready
    stale         refused  freshness
""")
SAID = {
    "nulls": ("60% of purchases were made null.", "600 of 1,000 rows (60.00%) have no purchases."),
}
LAXEST = lax(bad_events="rejected", orphans="orphan", nulls="null", shift="drift", outliers="outlier") | {
    "unready rows": {"ready_warn": 0, "ready_fail": 0}
}
CHECKS = RULES | made_by(rules, stale="check_freshness")


def written(root: Path, table: pa.Table, group: FeatureGroup = GROUP, **changes: Any) -> Manifest:
    """The manifest of a version with these rows, in two files."""
    directory = root / "feature-store" / group.name / "v1"
    directory.mkdir(parents=True)
    half = len(table) // 2
    parts = {"part-00000-a1.parquet": table.slice(0, half), "part-00001-a1.parquet": table.slice(half)}
    for name, part in parts.items():
        pq.write_table(part, directory / name)
    balances = [RowBalance(name="transactions", rows_in=9, rows_out=9)]
    balances += [RowBalance(name=group.dimension, rows_in=9, rows_out=9)] if group.dimension else []
    fields: dict[str, Any] = {
        "created_at": AS_OF,
        "files": tuple(
            FileEntry(path=name, rows=len(part), bytes=1, digest=f"sha256:{'0' * 64}") for name, part in parts.items()
        ),
        "as_of": (AS_OF,),
        "balances": (*balances, RowBalance(name=group.name, rows_in=len(table), rows_out=len(table))),
        "profile": profile_table(table).columns(),
        "definition": {**group.describe(), "newest_event": AS_OF.isoformat()},
    }
    return manifest(f"feature-store/{group.name}", table.schema, **fields | changes)


def tried(root: Path, **thresholds: Any) -> Trial[Any]:
    bounds = Thresholds(**{"fresh_warn_days": 1, "fresh_fail_days": 2} | thresholds)
    return trial(str(root), written(root, data()), FeatureStoreConfig(thresholds=bounds), None)


def outcomes(root: Path, table: pa.Table, config: FeatureStoreConfig = FRESH, **changes: Any) -> dict[str, FaultResult]:
    return by_fault(trial(str(root), written(root, table, **changes), config, None))


def test_too_few_rows_for_drift_are_called_blind_with_the_reason(tmp_path: Path) -> None:
    result = outcomes(tmp_path, data(100))["shift"]
    assert result.outcome == "blind"
    assert "Drift of purchases isn't judged: 100 rows now and 100 before, where 200 are needed." in result.message


def test_what_the_data_has_no_place_for_is_not_applicable(tmp_path: Path) -> None:
    group = FeatureGroup(name="spending", entity="customer_id", features={"purchases": pl.len()})
    table = data().drop_columns(["spent", "segment"])
    results = outcomes(tmp_path, table, FeatureStoreConfig(), group=group)
    without = {name: result.message for name, result in results.items() if result.outcome == "not applicable"}
    assert without == {
        "orphans": "The group has no dimension table.",
        "not finite": "No feature is a floating-point number.",
        "range": "The group declares no bounds of its numbers.",
        "stale": "No bound of the newest event's age is configured (fresh_warn_days, fresh_fail_days).",
    }


def test_a_dimension_full_of_numbers_leaves_the_outliers_noticed(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    table = data()
    for name in ("age", "height", "weight", "income"):
        table = table.add_column(3, name, pa.array(draw.normal(100, 10, len(table))))
    assert outcomes(tmp_path, table)["outliers"].outcome == "warned"


def test_drift_that_is_never_judged_is_not_claimed_to_be_proven(tmp_path: Path) -> None:
    manifest = written(tmp_path, data())
    before = manifest.model_copy(update={"as_of": (AS_OF, AS_OF + dt.timedelta(days=1))})
    results = by_fault(trial(str(tmp_path), manifest, FRESH, before))
    assert results["shift"].outcome == "blind"
    assert "this version holds 1 as-of times up to 2025-01-01, v1 2" in results["shift"].message
