"""Workers that Ray kills for memory at each try: the run ends, and says what to lower; it doesn't go on for ever.

Nightly: how much memory others take meanwhile decides whom Ray kills.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tasks.store import versions
from tests.faults.test_ray_workers import CURES
from tests.faults.three_flows import DATASETS, DELIVERY, Planted, Reader, Starter, Store, copied, fault
from tests.tables import Proven

pytestmark = pytest.mark.nightly


def test_a_task_that_always_takes_too_much_memory(
    undisturbed: Store, start: Starter, tmp_path: Path, proven: Proven
) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 8 << 30:
        pytest.skip(f"it takes up to 6 GiB, and {memory.available >> 30} GiB are available")
    store, planted = copied(undisturbed, tmp_path / "root"), Planted(tmp_path / "planted")
    function, cure = CURES[DELIVERY]
    limit = (memory.total - memory.available + (3 << 30)) / memory.total
    monitor = {"RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    environment = planted.environment()
    planted.arm(fault(function, does="hoard", when="before", times=1000, mib=6000))
    with Reader(store, DELIVERY):
        told = start(DELIVERY, store.config(DELIVERY), **environment, **monitor).fail()
    assert "out of memory: Ray killed the worker of a task" in told, told
    # It may have taken the task that drives the job with it, even before a second try: then the flow has run again.
    assert 1 <= planted.struck() < 100
    assert "memory" in told.splitlines()[-1], told
    assert cure in told.splitlines()[-1], told
    for dataset in DATASETS[DELIVERY]:
        assert versions.published_versions(str(store.root), dataset) == [1]
    row = "each worker of a task killed by Ray for memory"
    proven(row, DELIVERY, "some tries, then the run fails and says what to lower")
