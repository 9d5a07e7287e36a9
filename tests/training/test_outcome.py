"""The verdict of a training by what its workers have reported."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.training.monitoring import TrainingResult, WorkerEpoch
from tasks.training.outcome import headline, judge_training

DEFINITION = {"samples": {"train": 100, "validation": 20}}


def worker(epoch: int, rank: int, **other: Any) -> WorkerEpoch:
    usual = {"samples": 50, "seconds": 1.0, "wait_seconds": 0.01, "bytes_read": 1000}
    counts = {"cache_hits": 0, "cache_misses": 0, "skipped_samples": 0}
    return WorkerEpoch(epoch=epoch, worker=rank, **{**usual, **counts, **other})


def result(**other: Any) -> TrainingResult:
    usual: dict[str, Any] = {
        "version_uri": "/data/v1",
        "run_uri": "/runs/v1",
        "epochs": ({"epoch": 0, "train_loss": 1.0, "auc": 0.6}, {"epoch": 1, "train_loss": 0.5, "auc": 0.9}),
        "workers": tuple(worker(epoch, rank) for epoch in (0, 1) for rank in (0, 1)),
        "restarts": 0,
        "checkpoint_uri": "/runs/v1/checkpoint",
        "seconds": 12.0,
    }
    return TrainingResult(**{**usual, **other})


def verdicts(found: TrainingResult, remainder: str = "pad") -> dict[str, str]:
    return {check.name: check.verdict for check in judge_training(found, DEFINITION, 2, remainder).checks}


def test_a_training_that_went_well_passes() -> None:
    gate = judge_training(result(), DEFINITION, 2, "pad")
    assert gate.verdict == "pass", gate
    assert {check.name for check in gate.checks} == {
        "complete",
        "learned",
        "delivery",
        "skipped",
        "restarts",
        "consumed",
    }


@pytest.mark.parametrize(
    ("other", "check", "verdict"),
    [
        ({"epochs": ({"epoch": 0, "auc": 0.9},)}, "complete", "fail"),
        ({"epochs": ({"epoch": 0, "auc": 0.9}, {"epoch": 1, "auc": 0.5})}, "learned", "warn"),
        ({"epochs": ({"epoch": 0}, {"epoch": 1, "r2": -0.1})}, "learned", "warn"),
        ({"epochs": ({"epoch": 0}, {"epoch": 1, "r2": 0.2})}, "learned", "pass"),
        ({"epochs": ({"epoch": 0}, {"epoch": 1, "train_loss": 0.1})}, "learned", "warn"),
        (
            {"workers": tuple(worker(epoch, rank, wait_seconds=0.2) for epoch in (0, 1) for rank in (0, 1))},
            "delivery",
            "warn",
        ),
        ({"workers": (worker(0, 0, samples=90, skipped_samples=10), worker(1, 0, samples=100))}, "skipped", "warn"),
        ({"workers": (worker(0, 0, samples=90, skipped_samples=10), worker(1, 0, samples=100))}, "consumed", "pass"),
        ({"workers": (worker(0, 0, samples=99), worker(1, 0, samples=100))}, "consumed", "fail"),
        ({"workers": (worker(0, 0, samples=100), worker(1, 0, samples=101))}, "consumed", "fail"),
        ({"restarts": 1}, "restarts", "warn"),
    ],
)
def test_what_went_wrong_is_found(other: dict[str, Any], check: str, verdict: str) -> None:
    assert verdicts(result(**other))[check] == verdict


def test_samples_are_counted_only_where_each_epoch_is_whole() -> None:
    assert "consumed" not in verdicts(result(restarts=1)), "of the epoch that was begun again, a part isn't counted"
    assert "consumed" not in verdicts(result(), remainder="drop")


def test_the_headline_has_the_last_epoch_the_limit_and_the_model() -> None:
    lines = dict(headline(result()))
    assert lines["trained"] == "2 epochs in 12 s: train loss 0.5, auc 0.9, 100 samples/s"
    assert lines["limit"].startswith("compute-bound: ")
    assert lines["model"] == "/runs/v1/checkpoint"
    assert set(dict(headline(result(workers=(), checkpoint_uri=None, epochs=())))) == {"trained"}
