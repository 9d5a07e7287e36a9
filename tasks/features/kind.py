"""Feature groups, as a kind of dataset."""

from __future__ import annotations

from tasks.audit.features import FeaturesAgain, explain_features
from tasks.audit.kind import Kind
from tasks.features.config import FeatureStoreConfig
from tasks.features.gate import judge_group, trial

KIND = Kind(
    config=FeatureStoreConfig,
    code=("tasks.features",),
    undeclared=("newest_event", "state"),
    judge=judge_group,
    trial=trial,
    again=FeaturesAgain,
    explain=explain_features,
    cures={
        "drift": "if the change is meant, raise --thresholds.drift-fail",
        "schema": "if the change is meant, give --allow-schema-change",
        "nulls": "complete the source, or raise --thresholds.null-fail",
        "rejected": "mend the rows in _rejected/, or raise --thresholds.rejected-fail",
        "reference": "complete the dimension table, or raise --thresholds.orphan-fail",
        "outliers": "look for wrong units in the source, or raise --thresholds.outlier-fail",
        "ready": "see which features are missing or outlying, or lower --thresholds.ready-fail",
        "freshness": "look why no newer events arrived, or raise --thresholds.fresh-fail-days",
    },
)
