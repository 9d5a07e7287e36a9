"""Ray's workers, killed -9 in mid-task: the task runs again, and the version is that of an undisturbed run.

A training's worker is killed in `tests/training/test_trainer.py`, and within a whole flow here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.delivery.config import TrainingConfig
from tasks.engine.cluster import LOST_WORKER_RETRIES
from tasks.io import storage
from tasks.store import layout, versions
from tasks.training.trainer import read_records
from tests.faults.three_flows import (
    DATASETS,
    DELIVERY,
    FEATURES,
    IMAGES,
    Reader,
    Runner,
    Store,
    assert_failed_at_once,
    assert_same_rows,
    copied,
    fault,
    first_by_default,
)
from tests.tables import Proven
from tests.training.test_trainer import consumed, kept

pytestmark = pytest.mark.slow

# After the call: what the task writes is written, and nobody knows of it.
KILLED = {
    FEATURES: (
        "tasks.features.shuffle:Job.scatter",
        "tasks.features.shuffle:Job.gather",
        "tasks.features.writer:write_part",
    ),
    IMAGES: ("tasks.images.augment:augment_unit",),
    DELIVERY: (
        "tasks.delivery.shuffle:Look.scatter",
        "tasks.delivery.shuffle:Shuffle.scatter",
        "tasks.delivery.shuffle:Shuffle.gather",
    ),
}


@pytest.mark.parametrize("flow", first_by_default(FEATURES, IMAGES, DELIVERY))
def test_a_worker_killed_in_mid_task(
    flow: str, undisturbed: Store, run: Runner, tmp_path: Path, proven: Proven
) -> None:
    store = copied(undisturbed, tmp_path / "root")
    faults = [fault(function) for function in KILLED[flow]]
    with Reader(store, flow) as reader:
        ended = run(flow, store.config(flow), *faults)
    assert ended.state.is_completed(), ended.state.message
    assert run.struck() == len(faults), "not every worker was killed"
    assert_same_rows(store, flow)
    assert {number for numbers in reader.seen.values() for number in numbers} <= {1, 2}
    proven("a Ray worker killed in mid-task", flow, "the task runs again, same digests")


def test_an_actor_killed_in_mid_batch(undisturbed: Store, run: Runner, tmp_path: Path, proven: Proven) -> None:
    store = copied(undisturbed, tmp_path / "root")
    with Reader(store, IMAGES):
        ended = run(IMAGES, store.config(IMAGES, workers="actors"), fault(KILLED[IMAGES][0], times=2))
    assert ended.state.is_completed(), ended.state.message
    assert run.struck() == 2, "not every actor was killed"
    assert_same_rows(store, IMAGES)
    proven("an actor killed in mid-batch", IMAGES, "the batch runs again in a new actor, same digests")


CURES = {
    FEATURES: ("tasks.features.shuffle:Job.gather", "lower --rows-per-bucket (it is 1,000)"),
    IMAGES: ("tasks.images.augment:augment_unit", "lower --images-per-file (it is 16)"),
    DELIVERY: ("tasks.delivery.shuffle:Shuffle.scatter", "lower --file-megabytes (it is 0.01)"),
}


@pytest.mark.parametrize(
    ("flow", "changes"),
    first_by_default((IMAGES, {"workers": "actors"}), (IMAGES, {}), (FEATURES, {}), (DELIVERY, {})),
    ids=str,
)
def test_a_task_whose_workers_are_always_killed_as_the_kernel_does_for_memory(
    *, flow: str, changes: dict[str, str], undisturbed: Store, run: Runner, tmp_path: Path, proven: Proven
) -> None:
    store = copied(undisturbed, tmp_path / "root")
    function, cure = CURES[flow]
    with Reader(store, flow):
        ended = run(flow, store.config(flow, **changes), fault(function, when="before", times=1000))
    told = assert_failed_at_once(ended)
    assert f"died at each of its {LOST_WORKER_RETRIES + 1} tries" in told
    assert "memory" in told
    assert cure in told
    assert LOST_WORKER_RETRIES < run.struck() < 1000
    for dataset in DATASETS[flow]:
        assert versions.published_versions(str(store.root), dataset) == [1]
    proven("each worker of a task killed", flow, "4 tries, then the run fails and says what to lower")


@pytest.mark.nightly
def test_a_training_worker_killed_in_mid_epoch(undisturbed: Store, run: Runner, tmp_path: Path, proven: Proven) -> None:
    store = copied(undisturbed, tmp_path / "root")
    training = TrainingConfig(
        function="tests.delivery.toys:killed_once",
        **{"epochs": 2, "batch_size": 16, "workers": 2, "hidden": (8,), "checkpoint_every_steps": 5, "max_failures": 1},
    )
    ended = run(DELIVERY, store.config(DELIVERY, training=training))
    assert ended.state.is_completed(), ended.state.message
    assert_same_rows(store, DELIVERY)
    runs = layout.training_runs(str(store.root), "customer-features")
    [name] = storage.list_directories(runs)
    assert read_records(layout.join(runs, name)).restarts == 1, "no worker was killed"
    attempts = consumed(layout.join(runs, name))
    assert {attempt["begins_after"] > 0 for attempt in attempts} == {False, True}, "it didn't go on from a checkpoint"
    train = store.manifest(DATASETS[DELIVERY][0], 2).definition["samples"]["train"]
    for epoch, counts in kept(attempts).items():
        assert (len(counts), set(counts.values())) == (train, {1}), f"epoch {epoch}: a sample is lost or doubled"
    batches = {(step["epoch"], step["step"], attempt["rank"]): [] for attempt in attempts for step in attempt["steps"]}
    for attempt in attempts:
        for step in attempt["steps"]:
            batches[step["epoch"], step["step"], attempt["rank"]].append(step["ids"])
    again = [ids for ids in batches.values() if len(ids) > 1]
    assert again, "no step was done twice, so nothing went back to the checkpoint"
    assert all(ids == first for first, *rest in again for ids in rest), "the second time, the order was another"
    proven("an actor killed in mid-batch", DELIVERY, "training goes on from the last checkpoint, same order of samples")
