"""Ray's workers, killed -9 in mid-task: the task runs again, and the version is that of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core import layout, storage
from tasks.delivery.config import TrainingConfig
from tasks.delivery.training import read_records
from tests.delivery.test_training import consumed, kept
from tests.faults.three_flows import (
    DATASETS,
    DELIVERY,
    FEATURES,
    IMAGES,
    Reader,
    Starter,
    Store,
    assert_same_rows,
    copied,
    fault,
    start,
    undisturbed,
)
from tests.tables import Proven

__all__ = ["start", "undisturbed"]

pytestmark = pytest.mark.slow

# After the call: what the task writes is written, and nobody knows of it.
KILLED = {
    FEATURES: (
        "tasks.features.stages:Job.scatter",
        "tasks.features.stages:Job.gather",
        "tasks.features.parts:write_part",
    ),
    IMAGES: ("tasks.images.stages:augment_unit",),
    DELIVERY: (
        "tasks.delivery.stages:Look.scatter",
        "tasks.delivery.stages:Shuffle.scatter",
        "tasks.delivery.stages:Shuffle.gather",
    ),
}


@pytest.mark.parametrize("flow", KILLED)
def test_a_worker_killed_in_mid_task(
    flow: str, undisturbed: Store, start: Starter, tmp_path: Path, proven: Proven
) -> None:
    store = copied(undisturbed, tmp_path / "root")
    faults = [fault(function) for function in KILLED[flow]]
    with Reader(store, flow) as reader:
        start(flow, store.config(flow), *faults).finish()
    assert start.struck() == len(faults), "not every worker was killed"
    assert_same_rows(store, flow)
    assert {number for numbers in reader.seen.values() for number in numbers} <= {1, 2}
    proven("a Ray worker killed in mid-task", flow, "the task runs again, same digests")


def test_an_actor_killed_in_mid_batch(undisturbed: Store, start: Starter, tmp_path: Path, proven: Proven) -> None:
    store = copied(undisturbed, tmp_path / "root")
    with Reader(store, IMAGES):
        start(IMAGES, store.config(IMAGES, workers="actors"), fault(KILLED[IMAGES][0], times=2)).finish()
    assert start.struck() == 2, "not every actor was killed"
    assert_same_rows(store, IMAGES)
    proven("an actor killed in mid-batch", IMAGES, "the batch runs again in a new actor, same digests")


def test_a_training_worker_killed_in_mid_epoch(
    undisturbed: Store, start: Starter, tmp_path: Path, proven: Proven
) -> None:
    store = copied(undisturbed, tmp_path / "root")
    training = TrainingConfig(
        function="tests.delivery.toys:killed_once",
        **{"epochs": 2, "batch_size": 16, "workers": 2, "hidden": (8,), "checkpoint_every_steps": 5, "max_failures": 1},
    )
    start(DELIVERY, store.config(DELIVERY, training=training)).finish()
    assert_same_rows(store, DELIVERY)
    runs = layout.training_runs(str(store.root), "customer-features")
    [name] = storage.list_directories(runs)
    _, _, restarts = read_records(layout.join(runs, name))
    assert restarts == 1, "no worker was killed"
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
