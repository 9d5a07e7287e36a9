"""Models' training sets, as a kind of dataset."""

from __future__ import annotations

from tasks.audit.kind import Kind
from tasks.audit.training_sets import TrainingSetAgain, explain_training_row
from tasks.features.config import FeatureStoreConfig
from tasks.training_sets.gate import judge_training_set, trial

KIND = Kind(
    config=FeatureStoreConfig,
    code=("tasks.features", "tasks.training_sets"),
    undeclared=("columns",),
    judge=judge_training_set,
    trial=trial,
    again=TrainingSetAgain,
    explain=explain_training_row,
    cures={
        "leakage": "take the feature out of the model, or raise --label-thresholds.leak-fail if it is known before",
        "unmatched": "compute features as of earlier times, lengthen ttl_days, or raise "
        "--label-thresholds.unmatched-fail",
        "nulls": "compute features as of earlier times, or raise --label-thresholds.null-fail",
        "rejected": "mend the rows in _rejected/, or raise --label-thresholds.rejected-fail",
        "schema": "if the change is meant, give --allow-schema-change",
        "target": "look at the label's definition and its times",
    },
)
