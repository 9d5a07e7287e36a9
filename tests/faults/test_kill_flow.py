"""A flow's process is killed (-9) at each step of the commit, and the same command is run again.

One root a flow is killed at one point after the other, so that each run also has to make good what several dead ones
have left. Where the point is reached by the flow's own process, the runs share this session's Prefect server and Ray,
as deployed runs do; where a Ray worker reaches it, the flow has its own, as by hand, and they must go away with it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pandas as pd
import pytest
import ray
import yaml
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.states import AwaitingRetry, Crashed
from pydantic import BaseModel

from tasks import commands
from tasks.command_line import parse_arguments
from tasks.core import layout, storage, versions
from tasks.core.cluster import cluster_cpus
from tasks.core.manifest import Manifest
from tasks.delivery.config import DeliveryConfig
from tasks.features.config import FeatureStoreConfig
from tasks.images.config import ImageAugmentationConfig
from tasks.images.sample import write_sample
from tasks.publication import PUBLISHED
from tests.faults.failpoints import environment
from tests.faults.watching import watching
from tests.processes import Command, own_home
from tests.tables import Proven
from tests.test_runner import eventually

pytestmark = pytest.mark.slow

IMAGES, COPY = "training-datasets/images", "training-datasets/streaming-ready/images"
CUSTOMERS, PRODUCTS = "feature-store/customer-features", "feature-store/product-features"
CHURN = layout.training_ready_dataset("churn")
CONFIGS: dict[str, type[BaseModel]] = {
    "image-augmentation": ImageAugmentationConfig,
    "feature-store": FeatureStoreConfig,
    "training-delivery": DeliveryConfig,
}
OF_THE_RUN = ["feature_creation_date", "feature_version"]


@dataclass(frozen=True)
class Flow:
    """A flow with little data in many files."""

    name: str
    datasets: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def module(self) -> str:
        return "flows." + self.name.replace("-", "_")

    def contents(self, root: str, dataset: str, version: int) -> Any:
        """What must be the same in every run: digests by the files' names without the attempt, or values.

        Rows of features say which run made them and when.
        """
        manifest = versions.resolve(root, dataset, version)
        versions.verify(root, manifest)
        if dataset in (CUSTOMERS, PRODUCTS):
            frame = versions.read_table(root, dataset, version, verify=True).to_pandas().drop(columns=OF_THE_RUN)
            rows = tuple(entry.rows for entry in manifest.files)
            return rows, pd.util.hash_pandas_object(frame, index=False).tolist(), list(frame.columns)
        entries = (*manifest.files, *manifest.rejected_files, *manifest.side_files)
        return {re.sub(r"-a\d+\.", ".", entry.path): entry.digest for entry in entries}


@dataclass
class Site:
    """Where the flows of this module run."""

    home: Path
    scratch: Path
    shared: dict[str, str]
    flows: dict[str, Flow] = field(default_factory=dict)
    started: list[Command] = field(default_factory=list)
    _undisturbed: dict[str, str] = field(default_factory=dict)

    def undisturbed(self, name: str) -> str:
        """Root of the run of a flow that nobody disturbs."""
        if name not in self._undisturbed:
            root = self.new_root(self.flows[name], self.scratch / name)
            self.start(self.flows[name], root, *ALONE.get(name, ())).finish()
            self._undisturbed[name] = root
        return self._undisturbed[name]

    def start(self, flow: Flow, root: str, *more: str, alone: bool = False, **environment: str) -> Command:
        """Start a flow, with a Prefect server and a Ray of its own if `alone`."""
        place = {} if alone else self.shared
        home = own_home(self.home, self.scratch / f"home-{len(self.started)}")
        options = ("--root", root, *flow.options, *more)
        self.started.append(Command.start(flow.module, options, home, **{**place, **environment}))
        return self.started[-1]

    def kill(self, flow: Flow, root: str, point: str, dataset: str, *more: str, alone: bool) -> None:
        """Run a flow that is killed at a point of a dataset's first version; its Ray goes away with it."""
        version = Path(root, dataset, "v1")
        armed = environment(self.scratch / "hook", point, version)
        command = self.start(flow, root, *more, alone=alone, **armed)
        command.await_kill()
        if alone:
            assert command.end_family() == set(), "the killed flow's Ray or API server goes on"
        else:
            eventually(ray.available_resources, lambda free: free["CPU"] == cluster_cpus(), 60)

    def deploy(self, flow: Flow, root: str, *more: str) -> UUID:
        """A flow run of a deployment, not started yet."""
        entry = f"{flow.module}.{flow.module.removeprefix('flows.')}"
        config, _ = parse_arguments(CONFIGS[flow.name], ["--root", root, *flow.options, *more])
        with get_client(sync_client=True) as client:
            deployed = client.create_deployment(
                client.create_flow_from_name(flow.name), f"kills-{flow.name}", entrypoint=entry
            )
            parameters = {"config": config.model_dump(mode="json")}
            return client.create_flow_run_from_deployment(deployed, parameters=parameters).id

    def execute(self, run: UUID, **environment: str) -> Command:
        """Start a flow run's process as Prefect's worker starts it."""
        home = own_home(self.home, self.scratch / f"home-{len(self.started)}")
        whole = {**self.shared, "PREFECT__FLOW_RUN_ID": str(run), **environment}
        self.started.append(Command.start("prefect.engine", (), home, **whole))
        return self.started[-1]

    def new_root(self, flow: Flow, path: Path) -> str:
        """An empty root; for training-delivery one with its source."""
        if flow.name == "training-delivery":
            source = Path(self.undisturbed("image-augmentation"), IMAGES)
            shutil.copytree(source, path / IMAGES)
        return str(path)


@pytest.fixture(scope="module")
def site(prefect_home: Path, stack: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    shared = {"PREFECT_API_URL": stack, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    scratch = tmp_path_factory.mktemp("kills")
    here = Site(prefect_home, scratch, shared)
    source = write_sample(str(scratch / "source"), 120, 0)
    images = ["--images-per-file", "16", "--augmentation.size", "32", "--augmentation.variants", "2"]
    images += [word for name, uri in source.items() for word in (f"--{name}", uri)]
    features = ["--rows-per-bucket", "1000", "--sample-transactions", "6000"]
    delivery = ["--dataset", IMAGES, "--file-megabytes", "0.05", "--training.epochs", "1", "--training.workers", "1"]
    for flow in (
        Flow("image-augmentation", (IMAGES,), tuple(images)),
        Flow("feature-store", (CUSTOMERS, PRODUCTS), tuple(features)),
        Flow("training-delivery", (COPY,), tuple(delivery)),
    ):
        here.flows[flow.name] = flow
    yield here
    for command in here.started:
        command.stop()


ALONE = {"training-delivery": ("--no-training.enabled",)}
"""Options that leave the training out."""

BEFORE_THE_MANIFEST = {
    "after reserving": False,
    "in mid-data": True,
    "after the data, before the report": True,
    "after the report, before the manifest": False,
    "in mid-manifest": False,
}
"""Points, and whether a Ray worker comes to them."""


def files(root: str, dataset: str, version: int) -> set[str]:
    base = layout.version_uri(root, dataset, version)
    return {info.uri.removeprefix(base + "/") for info in storage.list_files(base, include_hidden=True)}


def assert_nothing_left(root: str, manifest: Manifest) -> None:
    listed = {entry.path for entry in (*manifest.files, *manifest.rejected_files, *manifest.side_files)}
    protocol = {layout.MANIFEST, layout.REPORT_HTML, layout.REPORT_JSON}
    protocol |= {layout.CLASS_SUMMARY} if manifest.dataset == IMAGES else set()
    protocol |= {layout.reservation_name(attempt) for attempt in range(1, manifest.run.attempt + 1)}
    found = files(root, manifest.dataset, manifest.version)
    assert found == listed | protocol, f"{manifest.dataset}: left behind or missing: {found ^ (listed | protocol)}"


@pytest.mark.parametrize("name", ["image-augmentation", "feature-store", "training-delivery"])
def test_a_flow_killed_at_each_step_is_made_good_by_the_next_run(
    site: Site, name: str, tmp_path: Path, proven: Proven
) -> None:
    flow, alone = site.flows[name], ALONE.get(name, ())
    root, dataset = site.new_root(flow, tmp_path / "root"), flow.datasets[0]
    version, before = Path(root, dataset, "v1"), set(versions.list_datasets(root))
    with watching(root) as reader:
        for number, (point, by_a_worker) in enumerate(BEFORE_THE_MANIFEST.items(), 1):
            site.kill(flow, root, point, dataset, *alone, alone=by_a_worker)
            assert len(versions.attempts(root, dataset, 1)) == number, f"{point}: the version wasn't taken over"
            for one in flow.datasets:
                assert versions.published_versions(root, one) == [], f"{point}: {one} is visible"
                assert not Path(root, one, "v2").exists(), "the dead run's number wasn't taken over"
            assert not (version / layout.MANIFEST).exists()
            assert any(version.rglob("part-*.parquet")) == (number > 1), point
            assert (version / layout.REPORT_HTML).exists() == (number > 3), point
        assert {seen for seen in reader.seen if seen[0] not in before} == set()
        site.start(flow, root, *alone).finish()
    for one in flow.datasets:
        assert versions.published_versions(root, one) == [1]
        assert flow.contents(root, one, 1) == flow.contents(site.undisturbed(name), one, 1)
        assert_nothing_left(root, versions.resolve(root, one))
        assert commands.run(["prune", one, "--root", root, "--json", "--yes"]) == 0
        assert_nothing_left(root, versions.resolve(root, one))
    for point in BEFORE_THE_MANIFEST:
        proven(f"flow killed (-9) {point}", name, "nothing visible, next run: same number, same digests")


def test_a_flow_killed_between_two_manifests_leaves_each_dataset_whole(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], proven: Proven
) -> None:
    """Old or new is a promise of each dataset: the first group is new, the second old, until the next run."""
    flow, root = site.flows["feature-store"], str(tmp_path / "root")
    with watching(root) as reader:
        site.kill(flow, root, "right after the manifest", CUSTOMERS, alone=False)
        assert [versions.published_versions(root, one) for one in flow.datasets] == [[1], []]
        site.start(flow, root).finish()
    assert {seen for seen in reader.seen if seen[0] in flow.datasets} == {(CUSTOMERS, 1), (CUSTOMERS, 2), (PRODUCTS, 1)}
    for one, number in ((CUSTOMERS, 1), (CUSTOMERS, 2), (PRODUCTS, 1)):
        assert flow.contents(root, one, number) == flow.contents(site.undisturbed("feature-store"), one, 1)
    assert versions.latest(root, PRODUCTS).run.attempt == 2  # type: ignore[union-attr]
    assert_nothing_left(root, versions.resolve(root, CUSTOMERS, 2))
    assert_nothing_left(root, versions.resolve(root, PRODUCTS))
    # The version that is whole but whose run couldn't tidy up: no later run comes there, prune does.
    assert any(storage.is_temporary(name) for name in files(root, CUSTOMERS, 1))
    assert commands.run(["prune", "--root", root, "--yes"]) == 0
    assert "that killed runs have left" in capsys.readouterr().out
    assert_nothing_left(root, versions.resolve(root, CUSTOMERS, 1))
    result = "each group whole, the first new, the second old; next run publishes both"
    proven("flow killed (-9) between two manifests", "feature-store", result)


def models(root: Path) -> str:
    """A file of one model over customers, by a label."""
    label = {"entity": "customer_id", "at": "2024-06-30/2024-11-30/1mo", "days": 30, "target": "COUNT(*) = 0"}
    features = ["customer-features:transaction_count", "customer-features:total_spent_90d"]
    declared = {"labels": {"churned": label}, "models": {"churn": {"label": "churned", "features": features}}}
    root.mkdir(parents=True, exist_ok=True)
    (root / "models.yaml").write_text(yaml.safe_dump(declared))
    return str(root / "models.yaml")


@pytest.mark.parametrize("name", ["image-augmentation", "feature-store", "training-delivery"])
def test_a_deployed_run_killed_after_a_manifest_goes_on_as_the_same_run(
    site: Site, name: str, tmp_path: Path, proven: Proven
) -> None:
    """Killed before it could tell of it; then Retry, as in the UI, starts the same flow run in a new process."""
    flow, dataset = site.flows[name], site.flows[name].datasets[0]
    root = site.new_root(flow, tmp_path / "root")
    more = ("--as-of", "2024-05-31/2024-12-31/1mo", "--models", models(tmp_path / "root"))
    run = site.deploy(flow, root, *(more if name == "feature-store" else ()))
    with watching(root) as reader, get_client(sync_client=True) as client:
        version = Path(root, dataset, "v1")
        site.execute(run, **environment(site.scratch / "hook", "right after the manifest", version)).await_kill()
        assert versions.published_versions(root, dataset) == [1]
        manifest = versions.resolve(root, dataset)
        assert manifest.run.flow_run_id == str(run)
        client.set_flow_run_state(run, Crashed(), force=True)  # as the automation does
        client.set_flow_run_state(run, AwaitingRetry(), force=True)  # as the UI's button does
        site.execute(run).finish()
        ended = client.read_flow_run(run)
        assert ended.state is not None
        assert ended.state.is_completed(), ended.state
    assert versions.resolve(root, dataset) == manifest, "the version was written again"
    made = [*flow.datasets, *([CHURN] if name == "feature-store" else [])]
    for one in made:
        assert versions.published_versions(root, one) == [1], f"the run has published {one} twice"
        assert versions.resolve(root, one).run.flow_run_id == str(run)
    assert {seen for seen in reader.seen if seen[0] in made} == {(one, 1) for one in made}
    if name != "feature-store":
        assert flow.contents(root, dataset, 1) == flow.contents(site.undisturbed(name), dataset, 1)
    told = eventually(lambda: announced(run), lambda found: found >= set(made))
    assert told == set(made), "what waits for a version never hears of it"
    if name == "feature-store":
        [record] = [record for record in versions.resolve(root, CHURN).inputs if record.name == CUSTOMERS]
        assert record == manifest.as_input(layout.version_uri(root, CUSTOMERS, 1))
        listed = (tmp_path / "root" / layout.METADATA).read_text()
        assert all(one in listed for one in made)
    if name == "training-delivery":
        runs = layout.training_runs(root, "images")
        assert storage.list_directories(runs) == [f"v1-{run}"], "it wasn't trained"
    proven("deployed flow killed (-9) right after the manifest, retried", name, RESUMED[name])


RESUMED = {
    "image-augmentation": "the same version, told of",
    "feature-store": "the same version, told of; the second group and the training set follow",
    "training-delivery": "the same version, told of; trains",
}


def announced(run: UUID) -> set[str]:
    """Datasets of which a run has told that a version is published."""
    names = EventNameFilter(name=[PUBLISHED])
    with get_client(sync_client=True) as client:
        body = {"filter": EventFilter(event=names).model_dump(mode="json"), "limit": 50}
        events = client.request("POST", "/events/filter", json=body).json()["events"]
    mine = [event for event in events if any(str(run) in one["prefect.resource.id"] for one in event["related"])]
    return {str(event["payload"]["dataset"]) for event in mine}
