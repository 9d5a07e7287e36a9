"""Streaming-ready copies, as a kind of dataset."""

from __future__ import annotations

from typing import Any

from tasks.audit.copies import CopyAgain, explain_sample
from tasks.audit.holders import source_version
from tasks.audit.kind import Kind
from tasks.delivery import gate, source
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.gate import judge_copy
from tasks.quality.faults import Trial
from tasks.store.manifest import Manifest


def _trial(root: str, manifest: Manifest, config: DeliveryConfig, previous: Manifest | None) -> Trial[Any]:
    copied = source.source_of(config, root, source_version(root, manifest))
    return gate.trial(copied, manifest, config, previous)


KIND = Kind(
    config=DeliveryConfig,
    code=("tasks.delivery", "tasks.loader"),
    judge=judge_copy,
    trial=_trial,
    again=CopyAgain,
    explain=explain_sample,
    cures={
        "drift": "if the change is meant, raise --thresholds.drift-fail",
        "schema": "if the change is meant, give --allow-schema-change",
        "nulls": "complete the source, or raise --thresholds.missing-fail",
        "rejected": "see _rejected/ for each row and its reason, or raise --thresholds.rejected-fail",
        "rows": "see _rejected/ and the balance: too few rows came through",
    },
)
