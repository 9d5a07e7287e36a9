"""A node of two, killed -9 in mid-run with what its object store holds: lost objects are made again, by the other.

Nightly: with one CPU left, Ray may wait for ever, and the job is run anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.three_flows import (
    DELIVERY,
    FEATURES,
    IMAGES,
    Planted,
    Reader,
    Starter,
    Store,
    assert_same_rows,
    copied,
    fault,
)
from tests.processes import cluster_of_two
from tests.tables import Proven
from tests.test_runner import eventually

pytestmark = pytest.mark.nightly

# The first call waits while the node is killed. By then each node's store holds what the scattering tasks have made.
HELD = {
    FEATURES: "tasks.features.shuffle:Job.gather",
    IMAGES: "tasks.images.augment:augment_unit",
    DELIVERY: "tasks.delivery.shuffle:Shuffle.gather",
}
# Ray looks after its nodes every 3 s, and gives one up after 5 looks. Small results travel in messages: here all but
# the smallest go to the object store of the node that makes them, as large ones do.
CLUSTER = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_max_direct_call_object_size": "1000",
    # It may be given up, to be run anew.
    "RAY_DATA_HASH_SHUFFLE_REDUCE_GET_TIMEOUT_S": "10",
    "PIPELINE_NODE_PATIENCE_SECONDS": "15",
}


@pytest.mark.parametrize("flow", [FEATURES, IMAGES, DELIVERY])
def test_a_node_killed_in_mid_run(
    flow: str, undisturbed: Store, start: Starter, tmp_path: Path, proven: Proven
) -> None:
    store, planted = copied(undisturbed, tmp_path / "root"), Planted(tmp_path / "planted")
    environment = planted.environment()
    planted.arm(fault(HELD[flow], does="wait", when="before"))
    with cluster_of_two(**CLUSTER, **environment) as cluster, Reader(store, flow):
        command = start(flow, store.config(flow), **environment, RAY_ADDRESS=cluster.address)
        eventually(lambda: planted.struck() or command.process.poll() is not None, bool, 300)
        assert planted.struck(), f"the run ended first:\n{command.process.communicate()}"
        cluster.kill_second()
        planted.go_on()
        command.finish()
    assert_same_rows(store, flow)
    proven("a Ray node killed with its objects", flow, "its objects are made again, or the job runs anew: same digests")
