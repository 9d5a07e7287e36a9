"""Real Ray Train runs on two CPUs: metrics, a worker killed within an epoch, and another number of workers."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.io.errors import ConfigError, CorruptVersion
from tasks.loader.shards import open_version
from tasks.training.loops import build_model, train
from tasks.training.monitoring import TrainingResult
from tasks.training.trainer import Records, check_resources, load_function, read_records, read_state, train_version
from tests.conftest import new_bucket
from tests.delivery import making, toys

BATCH = 8
TRAIN = 203
STEPS = 13  # of two workers in an epoch: 26 batches, the last one of 3 samples


def settings(function: str | None = None, **changes: Any) -> TrainingConfig:
    chosen = {"epochs": 2, "batch_size": BATCH, "learning_rate": 0.01, "hidden": (16,), "workers": 2, "seed": 3}
    own = {"function": f"tests.delivery.toys:{function}"} if function else {}
    return TrainingConfig(**{**chosen, **own, **changes})


def published(root: str) -> str:
    """A small table, of which a class can be learned: 203 samples to train in two files, and 57 to validate."""
    splits = {"train": making.table_samples(TRAIN, seed=1), "validation": making.table_samples(57, seed=2)}
    for samples in splits.values():
        samples["label"] = (samples["features"][:, 0] > samples["features"][:, 1]).astype(np.int64)
    train_files = making.cut(splits["train"], 120, TRAIN - 120)
    return making.publish(root, {"train": train_files, "validation": [splits["validation"]]}, batch_size=10)


SAMPLE_IDS = Counter(making.table_samples(TRAIN, seed=1)["sample_id"].tolist())


def consumed(run_uri: str) -> list[dict[str, Any]]:
    """The attempts of a run's workers: where each began, and what it consumed at which step."""
    attempts = []
    for path in Path(run_uri, "consumed").iterdir():
        begin, *steps = map(json.loads, path.read_text().splitlines())
        attempts.append({**begin, "steps": steps})
    return sorted(attempts, key=lambda attempt: (attempt["begins_after"], attempt["rank"]))


def kept(attempts: list[dict[str, Any]]) -> dict[int, Counter[int]]:
    """How often each sample counts in each epoch: steps after the checkpoint that the next attempt began with don't."""
    begins = sorted({attempt["begins_after"] for attempt in attempts})
    found: dict[int, Counter[int]] = {}
    for attempt in attempts:
        later = [begin for begin in begins if begin > attempt["begins_after"]]
        for step in attempt["steps"]:
            if not later or step["step"] <= later[0]:
                found.setdefault(step["epoch"], Counter()).update(step["ids"])
    return found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no import path; write it like"),
        ("nowhere:train", "can't import 'nowhere': ModuleNotFoundError"),
        ("tests.delivery.toys:tarin", "'tests.delivery.toys' has no 'tarin'"),
        ("tests.delivery.toys:NO_FUNCTION", "is a int, no function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_function(path)
    assert path in str(caught.value)


def test_a_function_is_found_by_its_import_path() -> None:
    assert load_function("tasks.training.loops:train") is train


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 5}, r"workers = 5 of 0.5 CPU each need 2.5, and the cluster has 2: take fewer"),
        ({"use_gpu": True}, r"workers = 2 of 1 GPU each need 2, and the cluster has 0: train with use_gpu = false"),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    check_resources(settings())
    with pytest.raises(ConfigError, match=message):
        check_resources(settings(**changes))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A run without any accident, started from a Ray task as the flow does it, with everything on S3."""
    root = new_bucket(s3_url)
    config = settings(cache_dir=str(tmp_path_factory.mktemp("cache")))

    @ray.remote(num_cpus=0, max_retries=0)
    def flow_task() -> TrainingResult:
        return train_version(published(root), config, f"{root}/runs", "run")

    result: TrainingResult = ray.get(flow_task.remote(), timeout=120)
    return result


def test_a_run_within_a_ray_task_gives_metrics_and_figures_of_each_worker(undisturbed: TrainingResult) -> None:
    assert [epoch["epoch"] for epoch in undisturbed.epochs] == [0, 1]
    first, last = undisturbed.epochs
    assert set(last) == {"epoch", "train_loss", "validation_loss", "accuracy", "auc"}
    assert last["train_loss"] < first["train_loss"]
    assert last["auc"] > 0.9
    assert undisturbed.restarts == 0
    assert [(one.epoch, one.worker) for one in undisturbed.workers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for epoch in (0, 1):
        own = [one for one in undisturbed.workers if one.epoch == epoch]
        assert sum(one.samples for one in own) == TRAIN
        assert all(0 <= one.wait_seconds <= one.seconds for one in own)
        assert all(one.bytes_read > 0 for one in own)
    assert sum(one.cache_misses for one in undisturbed.workers) >= 2, "two files came from S3"


@pytest.mark.usefixtures("s3_url")
def test_its_last_checkpoint_can_be_read_without_ray(undisturbed: TrainingResult) -> None:
    assert undisturbed.checkpoint_uri is not None
    assert undisturbed.checkpoint_uri.startswith("s3://")
    state = read_state(undisturbed.checkpoint_uri)
    model = build_model(open_version(undisturbed.version_uri).definition, settings())
    model.load_state_dict(state["model"])
    assert state["progress"]["steps"] == 2 * STEPS
    assert state["progress"]["history"] == list(undisturbed.epochs)
    assert state["stream"]["epoch"] == 2


@pytest.mark.usefixtures("ray_cluster")
def test_a_mix_keeps_its_versions_for_the_whole_run(tmp_path: Path) -> None:
    own, runs = published(str(tmp_path)), str(tmp_path / "runs")
    others = [making.table_samples(90, seed=seed) for seed in (4, 5)]
    dataset = making.DATASET.rpartition("/")[0] + "/hard"
    hard = making.publish(str(tmp_path), {"train": others[:1]}, batch_size=10, dataset=dataset)
    name = making.DATASET.rpartition("/")[2]
    config = settings(mix={"hard": 1, name: 3}, epochs=1, workers=1)
    first = train_version(own, config, runs, "run")
    assert first.drawn == {"natural": {own: TRAIN, hard: 90}, "epoch": {own: 203, hard: 67}}
    assert [one.samples for one in first.workers] == [270]

    making.publish(str(tmp_path), {"train": others[1:]}, batch_size=10, dataset=dataset)
    again = train_version(own, settings(mix={"hard": 1, name: 3}, epochs=2, workers=1), runs, "run")
    assert hard in again.drawn["natural"]
    assert [one.samples for one in again.workers] == [270, 270]
    with pytest.raises(ConfigError, match=r"mix = .*: this run has begun with .*hard.*; give these, or"):
        train_version(own, settings(mix={name: 3}, workers=1), runs, "run")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"training": {"mix": {"hard": 1}}}, r"leaves out 'customer-features', which this run makes"),
        ({"training": {"mix": {"customer-features": 1}, "balance": "class"}}, "both choose samples; give one of them"),
        ({"training": {"mix": {"customer-features": -1}}}, "greater than or equal to 0"),
        ({"training": {"mix": {"Hard Ones": 1}}}, "can't name a dataset"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_at_once(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeliveryConfig.model_validate(config)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_costs_neither_a_sample_nor_a_digit(undisturbed: TrainingResult, tmp_path: Path) -> None:
    version = published(str(tmp_path))
    config = settings("killed_once", checkpoint_every_steps=5, max_failures=1)
    result = train_version(version, config, str(tmp_path / "runs"), "run")
    attempts = consumed(result.run_uri)
    assert [(attempt["begins_after"], attempt["rank"]) for attempt in attempts] == [(0, 0), (0, 1), (5, 0), (5, 1)]
    assert attempts[1]["steps"][-1]["step"] == toys.KILL_AFTER
    assert kept(attempts) == {0: SAMPLE_IDS, 1: SAMPLE_IDS}
    assert result.restarts == 1
    assert result.epochs == undisturbed.epochs


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_of_two_workers_goes_on_with_one(tmp_path: Path) -> None:
    version, runs = published(str(tmp_path)), str(tmp_path / "runs")
    config = settings("stopped_once", checkpoint_every_steps=5, max_failures=0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(CorruptVersion, match="is no good"):  # the worker's error, not Ray's
        train_version(version, config, runs, "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert read_records(f"{runs}/run") == Records(restarts=1)

    result = train_version(version, config.model_copy(update={"workers": 1}), runs, "run")
    attempts = consumed(result.run_uri)
    assert [(a["begins_after"], a["rank"], a["workers"]) for a in attempts] == [(0, 0, 2), (0, 1, 2), (5, 0, 1)]
    assert kept(attempts) == {0: SAMPLE_IDS, 1: SAMPLE_IDS}
    assert [(one.epoch, one.worker) for one in result.workers] == [(0, 0), (1, 0)]
    assert result.workers[1].samples == TRAIN
    assert result.checkpoint_uri is not None
    # 10 of 26 batches were done by two workers in 5 steps; then one worker took a step for each batch.
    assert read_state(result.checkpoint_uri)["progress"]["steps"] == 5 + 16 + 26
