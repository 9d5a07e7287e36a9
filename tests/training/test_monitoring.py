"""Data report of a training: sums by worker, verdicts with their advice, and pictures that open."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from tasks.training.monitoring import (
    WAIT_BOUND,
    TrainingResult,
    WorkerEpoch,
    drawn_table,
    epoch_table,
    headline,
    judge_bound,
    judge_training,
    throughput,
    training_pictures,
    worker_table,
)

ONE = WorkerEpoch(
    epoch=0,
    worker=0,
    samples=1000,
    seconds=2.0,
    wait_seconds=0.1,
    bytes_read=5_000_000,
    cache_hits=1,
    cache_misses=0,
    skipped_samples=0,
)
WORKERS = [
    replace(ONE, wait_seconds=1.9, cache_hits=0, cache_misses=2),  # the first epoch fills the cache
    replace(ONE, worker=1, seconds=4.0),
    replace(ONE, epoch=1, skipped_samples=3),
    replace(ONE, epoch=1, worker=1, samples=500, seconds=1.0, wait_seconds=0.1),
]
EPOCHS = [
    {"epoch": 0, "train_loss": 0.7, "validation_loss": 0.71, "accuracy": 0.5},
    {"epoch": 1, "train_loss": 0.512345678, "validation_loss": 0.6, "accuracy": 0.8, "auc": 0.9},
]


def test_each_worker_has_a_row_over_all_epochs_whose_wait_share_leaves_out_the_first() -> None:
    table = worker_table(WORKERS)
    assert table.columns == (
        "worker",
        "samples",
        "samples/s",
        "wait share",
        "MB read",
        "cache hits",
        "cache misses",
        "skipped",
    )
    assert table.rows == ((0, 2000, 500.0, 0.05, 10.0, 1, 2, 3), (1, 1500, 300.0, 0.1, 10.0, 2, 0, 0))
    assert "compute-bound" in table.note


def test_the_slowest_worker_sets_the_throughput() -> None:
    assert throughput(WORKERS) == {0: 2000 / 4.0, 1: 1500 / 2.0}


def test_an_epoch_has_a_row_with_gaps_where_a_metric_is_missing() -> None:
    table = epoch_table(EPOCHS, WORKERS)
    assert table.columns == ("epoch", "train loss", "validation loss", "accuracy", "AUC", "samples/s")
    assert table.rows == ((0, 0.7, 0.71, 0.5, None, 500.0), (1, 0.512346, 0.6, 0.8, 0.9, 750.0))
    assert epoch_table(EPOCHS, []).rows[0][-1] is None, "a function of one's own may report no figures of workers"


@pytest.mark.parametrize(
    ("changes", "verdict", "advice"),
    [
        ({"wait_seconds": 2.0 * WAIT_BOUND}, "compute-bound", "more workers"),  # at the bound
        ({"wait_seconds": 2.02 * WAIT_BOUND, "cache_hits": 0}, "data-bound", "faster disk"),
        ({"wait_seconds": 1.0, "cache_hits": 1}, "data-bound", "put cache_dir on a faster disk"),
        ({"wait_seconds": 1.0, "cache_misses": 1}, "data-bound", "raise cache_gigabytes"),
        ({"wait_seconds": 9.0}, "data-bound", "100 %"),  # clocks that disagree give no share above 1
    ],
)
def test_the_verdict_and_what_follows(changes: dict[str, float], verdict: str, advice: str) -> None:
    bound = judge_bound([replace(ONE, **changes)])
    assert bound is not None
    assert bound.verdict == verdict
    assert advice in bound.sentence
    assert verdict in bound.sentence


def test_the_first_epoch_is_left_out_where_there_are_more() -> None:
    bound = judge_bound(WORKERS)
    assert bound is not None
    assert (bound.verdict, bound.wait_share) == ("compute-bound", pytest.approx(0.2 / 3.0))
    alone = judge_bound(WORKERS[:1])
    assert alone is not None
    assert alone.verdict == "data-bound"


def test_without_figures_there_is_no_verdict_and_no_picture() -> None:
    assert judge_bound([]) is None
    assert worker_table([]).rows == ()
    assert training_pictures([], []) == []


def test_pictures_are_transparent_and_the_same_every_time() -> None:
    numbers = [{"epoch": 0, "train_loss": 0.7, "rmse": 5000.0, "r2": 0.4}]
    for epochs in (EPOCHS, EPOCHS[:1], numbers, [{"epoch": 0, "train_loss": 0.5}]):
        pictures = training_pictures(epochs, WORKERS)
        assert [picture.title for picture in pictures] == ["How it learned", "How it was fed"]
        assert pictures == training_pictures(epochs, WORKERS)
        for picture in pictures:
            with Image.open(io.BytesIO(base64.b64decode(picture.data))) as image:
                assert image.width == 1620
                assert image.convert("RGBA").getpixel((0, 0))[3] == 0


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


def test_balanced_classes_are_shown_beside_those_of_the_split() -> None:
    drawn = {"natural": {"no": 90, "yes": 10}, "epoch": {"no": 50, "yes": 50}}
    assert drawn_table(drawn, "class").rows == (("no", 90, 50), ("yes", 10, 50))
    [check] = [
        one for one in judge_training(result(drawn=drawn), DEFINITION, 2, "pad").checks if one.name == "consumed"
    ]
    assert check.message == "Each epoch had 100 samples, drawn by weight."


def test_the_headline_has_the_last_epoch_the_limit_and_the_model() -> None:
    lines = dict(headline(result()))
    assert lines["trained"] == "2 epochs in 12 s: train loss 0.5, auc 0.9, 100 samples/s"
    assert lines["limit"].startswith("compute-bound: ")
    assert lines["model"] == "/runs/v1/checkpoint"
    assert set(dict(headline(result(workers=(), checkpoint_uri=None, epochs=())))) == {"trained"}
