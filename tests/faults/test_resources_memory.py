"""Workers that are killed for memory at each try: the run ends, and says what to lower; it doesn't go on for ever."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tasks.core import versions
from tasks.core.cluster import LOST_WORKER_RETRIES
from tests.faults.three_flows import (
    DATASETS,
    DELIVERY,
    FEATURES,
    IMAGES,
    Reader,
    Starter,
    Store,
    copied,
    fault,
    start,
    undisturbed,
)
from tests.tables import Proven

__all__ = ["start", "undisturbed"]

pytestmark = pytest.mark.slow

CURES = {
    FEATURES: ("tasks.features.stages:Job.gather", "lower --rows-per-bucket (it is 1,000)"),
    IMAGES: ("tasks.images.stages:augment_unit", "lower --images-per-file (it is 16)"),
    DELIVERY: ("tasks.delivery.stages:Shuffle.scatter", "lower --file-megabytes (it is 0.01)"),
}


@pytest.fixture
def store(undisturbed: Store, tmp_path: Path) -> Store:
    return copied(undisturbed, tmp_path / "root")


def assert_ended(told: str, store: Store, flow: str, cure: str) -> None:
    last = told.splitlines()[-1]
    assert "memory" in last, told
    assert cure in last, told
    for dataset in DATASETS[flow]:
        assert versions.published_versions(str(store.root), dataset) == [1]


@pytest.mark.parametrize(
    ("flow", "changes"), [(FEATURES, {}), (IMAGES, {}), (IMAGES, {"workers": "actors"}), (DELIVERY, {})], ids=str
)
def test_a_task_whose_workers_are_always_killed_as_the_kernel_does(
    flow: str, changes: dict[str, str], store: Store, start: Starter, proven: Proven
) -> None:
    config = store.config(flow, **changes)
    with Reader(store, flow):
        told = start(flow, config, fault(CURES[flow][0], when="before", times=1000)).fail()
    assert f"died at each of its {LOST_WORKER_RETRIES + 1} tries" in told
    assert LOST_WORKER_RETRIES < start.struck() < 1000
    assert "Retry" not in told, "what kills each of its workers was tried again"
    assert_ended(told, store, flow, CURES[flow][1])
    proven("each worker of a task killed", flow, "4 tries, then the run fails and says what to lower")


def test_a_task_that_always_takes_too_much_memory(store: Store, start: Starter, proven: Proven) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 8 << 30:
        pytest.skip(f"it takes up to 6 GiB, and {memory.available >> 30} GiB are available")
    limit = (memory.total - memory.available + (3 << 30)) / memory.total
    hog = fault(CURES[DELIVERY][0], does="hoard", when="before", times=1000, mib=6000)
    monitor = {"RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    with Reader(store, DELIVERY):
        told = start(DELIVERY, store.config(DELIVERY), hog, **monitor).fail()
    assert "out of memory: Ray killed the worker of a task" in told, told
    # It may have taken the task that drives the job with it: then the flow has run again, once.
    assert 2 <= start.struck() < 100
    assert_ended(told, store, DELIVERY, "--file-megabytes")
    row = "each worker of a task killed by Ray for memory"
    proven(row, DELIVERY, "some tries, then the run fails and says what to lower")
