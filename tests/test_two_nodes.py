"""Delivery and training on a Ray cluster of two nodes, joined by RAY_ADDRESS: nothing in the code changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.feature_store import feature_store
from tasks.features.config import FeatureStoreConfig
from tasks.io import storage
from tasks.report.report import Report
from tasks.store import layout, versions
from tasks.training.loops import TrainingRun, train
from tests.processes import own_home, ran, shell_environment, two_nodes

pytestmark = pytest.mark.nightly


def train_and_say_where(run: TrainingRun) -> None:
    """The usual training, by workers that leave the name of their node."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    assert run.run_uri is not None
    storage.write_bytes(layout.join(run.run_uri, f"node-{run.rank}"), node.encode())
    train(run)


@pytest.fixture
def address() -> Iterator[str]:
    """A head and a second node of one CPU each, in processes of their own."""
    with two_nodes() as found:
        yield found


def test_a_cluster_of_two_nodes(stack: str, address: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    feature_store(FeatureStoreConfig(root=root, sample_transactions=4000))
    options = ["--root", root, "--target", "spending_trend", "--no-ready-only", "--training.epochs", "2"]
    options += ["--training.workers", "2", "--training.cpus-per-worker", "1", "--training.batch-size", "32"]
    options += ["--training.function", "tests.test_two_nodes:train_and_say_where"]
    environment = shell_environment(own_home(tmp_path / "home")) | {"RAY_ADDRESS": address}
    started = time.monotonic()
    done = ran([sys.executable, "-m", "flows.training_delivery", *options], 300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, f"after {time.monotonic() - started:.0f} s:\n{done.stdout}\n{done.stderr}"
    assert versions.published_versions(root, "training-datasets/streaming-ready/customer-features") == [1]
    runs = layout.training_runs(root, "customer-features")
    [name] = storage.list_directories(runs)
    nodes = {storage.read_bytes(layout.join(runs, name, f"node-{rank}")) for rank in (0, 1)}
    assert len(nodes) == 2, "both workers were on one node"
    report = Report.model_validate_json(storage.read_bytes(layout.join(runs, name, layout.REPORT_JSON)))
    assert {check.name: check.verdict for check in report.gate.checks}["consumed"] == "pass"
