"""Published Ray Datasets, as a kind of dataset."""

from __future__ import annotations

from tasks.audit.datasets import DatasetAgain, explain_row
from tasks.audit.kind import Kind
from tasks.datasets.config import DatasetConfig
from tasks.datasets.gate import judge_dataset, trial

KIND = Kind(
    config=DatasetConfig,
    code=("tasks.datasets",),
    judge=judge_dataset,
    trial=trial,
    again=DatasetAgain,
    explain=explain_row,
    cures={
        "drift": "if the change is meant, raise thresholds.drift_fail",
        "schema": "if the change is meant, give allow_schema_change=True",
        "nulls": "complete or drop the column, or raise thresholds.missing_fail",
        "rejected": "see _rejected/ for each row and its reason, or raise thresholds.rejected_fail",
        "rows": "look at the dataset's filters, or lower thresholds.minimum_rows",
        "target": "look at the column that is named as the label",
    },
)
