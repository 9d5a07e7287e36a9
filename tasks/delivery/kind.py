"""Streaming-ready copies, as a kind of dataset."""

from __future__ import annotations

from typing import Any

from tasks.audit.explain_sample import explain_sample
from tasks.audit.holders import source_of
from tasks.audit.kind import Kind
from tasks.audit.replay_copies import CopyAgain
from tasks.delivery import self_test, source
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.gate import judge_copy
from tasks.quality.faults import Trial
from tasks.store.manifest import Manifest


def _trial(root: str, manifest: Manifest, config: DeliveryConfig, previous: Manifest | None) -> Trial[Any]:
    copied = source.source_of(config, root, source_of(root, manifest))
    return self_test.trial(copied, manifest, config, previous)


def _samples(manifest: Manifest) -> int:
    """Return the samples of a copy; a row of a table's copy is a block of them."""
    return sum(manifest.definition["samples"].values())


KIND = Kind(
    config=DeliveryConfig,
    code=("tasks.delivery", "tasks.loader"),
    judge=judge_copy,
    trial=_trial,
    again=CopyAgain,
    explain=explain_sample,
    rows=_samples,
    cures={
        "drift": "if the change is meant, raise --thresholds.drift-fail",
        "schema": "if the change is meant, give --allow-schema-change",
        "nulls": "complete the source, or raise --thresholds.missing-fail",
        "rejected": "see _rejected/ for each row and its reason, or raise --thresholds.rejected-fail",
        "rows": "see _rejected/ and the balance: too few rows came through",
    },
)
