"""The flows in operation: server, worker, a Ray cluster of two nodes and S3, each a process of its own on loopback."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelling

from tasks.io import storage
from tasks.store import layout, versions
from tasks.store.reservation import attempts, version_numbers
from tests.conftest import new_bucket
from tests.processes import PROJECT, own_home, prefect_server, ran, two_nodes
from tests.test_readme import blocks
from tests.test_runner import eventually

pytestmark = pytest.mark.slow

IMAGES, COPY = "training-datasets/images", "training-datasets/streaming-ready/images"
CUSTOMERS = "feature-store/customer-features"
LARGE = {
    "sample_transactions": 2_000_000,
    "rows_per_bucket": 50_000,
    "thresholds": {"drift_warn": 100, "drift_fail": 100},  # it is another sample than the small one's
}
SMALL_IMAGES = {"sample_images": 100, "augmentation": {"size": 32, "variants": 2}}


@dataclass(frozen=True)
class Site:
    """Everything that runs, as its users see it: the API, and the root of the datasets."""

    client: SyncPrefectClient
    root: str
    environment: dict[str, str]
    workers: list[psutil.Popen] = field(default_factory=list)

    def start_worker(self) -> None:
        """Start a worker; the last one of the list is the one that runs."""
        command = [sys.executable, "-m", "prefect", *WORK]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.workers.append(psutil.Popen(command, cwd=PROJECT, env=self.environment, **quiet))

    def logs(self, run: UUID) -> list[str]:
        """Messages of a run, those of its tasks on Ray too."""
        only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        return [log.message for log in self.client.read_logs(only)]

    def command(self, *words: str) -> str:
        """Run Prefect's command line as an operator does."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        done = ran(command, 120, cwd=PROJECT, env=self.environment)
        assert done.returncode == 0, f"{words}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, deployment: str, **config: Any) -> FlowRun:
        """Start a deployment through the API, as the UI does."""
        found = self.client.read_deployment_by_name(deployment)
        return self.client.create_flow_run_from_deployment(
            found.id, parameters={"config": {"root": self.root, **config}}
        )

    def ended(self, run: UUID, seconds: float = 420) -> FlowRun:
        """The run, once it is over."""
        return eventually(lambda: self.client.read_flow_run(run), lambda found: found.state.is_final(), seconds)

    def runs(self, deployment: str) -> list[FlowRun]:
        """Runs of a deployment, the first to start first."""
        found = self.client.read_deployment_by_name(deployment)
        only = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[found.id]))
        return self.client.read_flow_runs(flow_run_filter=only, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=50)

    def idle_cpus(self) -> float:
        """CPUs of the Ray cluster that nothing runs on."""
        look = "import ray; ray.init(log_to_driver=False); print(ray.available_resources().get('CPU', 0))"
        told = subprocess.check_output([sys.executable, "-c", look], env=self.environment, text=True, timeout=60)
        return float(told.split()[-1])

    def reserved(self, run: UUID) -> list[tuple[int, int]]:
        """The version that a run holds, if any, and its attempt; it may have been that of a run that was ended."""
        chains = {number: attempts(self.root, CUSTOMERS, number) for number in version_numbers(self.root, CUSTOMERS)}
        return [(number, len(chain)) for number, chain in chains.items() if chain and chain[-1].run_id == str(run)]

    def artifacts(self, run: UUID) -> set[str]:
        """Keys of a run's artifacts."""
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
        return {artifact.key for artifact in self.client.read_artifacts(artifact_filter=only) if artifact.key}


@pytest.fixture(scope="module")
def site(s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = own_home(tmp_path_factory.mktemp("server"))
    root = new_bucket(s3_url)
    quick = {"PREFECT_API_SERVICES_SCHEDULER_LOOP_SECONDS": "2", "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2"}
    with prefect_server(home, **quick) as url, two_nodes() as address:
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "PREFECT_HOME": str(tmp_path_factory.mktemp("worker")),
            "PREFECT_API_URL": url,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "RAY_ADDRESS": address,
            "PIPELINE_ROOT": root,
        }
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            here = Site(client, root, environment)
            here.command(*POOL)
            for _ in range(2):  # the second time everything is there
                here.command(*DEPLOY)
            here.command("automation", "create", "--from-file", "deployments/automations.yaml")
            here.start_worker()
            try:
                yield here
            finally:
                here.workers[-1].terminate()
                try:
                    here.workers[-1].wait(20)
                except psutil.TimeoutExpired:  # Prefect's worker sometimes doesn't end of its own
                    here.workers[-1].kill()
                    here.workers[-1].wait(20)


POOL = ("work-pool", "create", "training-data", "--type", "process", "--overwrite")
DEPLOY = ("deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
WORK = ("worker", "start", "--pool", "training-data")


def test_the_readme_shows_the_commands_that_are_run_here() -> None:
    [shown] = [text for language, kind, text in blocks() if (language, kind) == ("sh", "operate")]
    export, *commands = shown.splitlines()
    assert export.startswith("export PIPELINE_ROOT=")
    run = [" ".join(("prefect", *words)) for words in (POOL, ("--no-prompt", *DEPLOY), WORK)]
    assert commands == run


def names(site: Site) -> list[str]:
    flows = {flow.id: flow.name for flow in site.client.read_flows()}
    return sorted(f"{flows[found.flow_id]}/{found.name}" for found in site.client.read_deployments())


def test_one_command_deploys_all_of_them_and_again_changes_nothing(site: Site) -> None:
    assert names(site) == ["feature-store/daily", "image-augmentation/weekly", "training-delivery/on-publication"]
    assert sorted(one.name for one in site.client.read_automations()) == [
        "crash-silent-runs",
        "deliver-what-is-published",
    ]
    daily = site.client.read_deployment_by_name("feature-store/daily")
    [schedule] = daily.schedules
    assert schedule.schedule.timezone == "Europe/Berlin"
    assert daily.parameters == {"config": {"root": site.root}}
    assert daily.concurrency_options.collision_strategy == "ENQUEUE"


@pytest.mark.nightly
def test_a_published_version_starts_its_delivery(site: Site) -> None:
    started = site.start("image-augmentation/weekly", **SMALL_IMAGES)
    images = site.ended(started.id)
    assert images.state.is_completed(), images.state.message
    assert versions.published_versions(site.root, IMAGES) == [1]
    assert {"images-report", "images-checks", "ray-cluster"} <= site.artifacts(started.id)
    [delivery] = eventually(lambda: site.runs("training-delivery/on-publication"), bool, 60)
    assert delivery.parameters == {"config": {"root": site.root, "dataset": IMAGES}}
    assert site.ended(delivery.id).state.is_completed()
    assert versions.published_versions(site.root, COPY) == [1]
    assert {"images-streaming-report", "images-training-report"} <= site.artifacts(delivery.id)


@pytest.mark.nightly
def test_a_schedule_starts_a_run_and_its_logs_are_in_the_api(site: Site) -> None:
    daily = site.client.read_deployment_by_name("feature-store/daily")
    [schedule] = daily.schedules
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=8)
    site.client.update_deployment_schedule(
        daily.id, schedule.id, schedule=IntervalSchedule(interval=dt.timedelta(days=30), anchor_date=soon)
    )
    [run] = eventually(
        lambda: [run for run in site.runs("feature-store/daily") if run.expected_start_time <= soon], bool, 60
    )
    assert run.auto_scheduled
    ended = site.ended(run.id)
    assert ended.state.is_completed(), ended.state.message
    assert versions.published_versions(site.root, CUSTOMERS) == [1]
    told = eventually(lambda: site.logs(run.id), lambda lines: any("entities written" in line for line in lines))
    assert any("verdict pass" in line for line in told), "the logs of the tasks on Ray aren't in the API"


@pytest.mark.nightly
def test_a_cancelled_run_leaves_no_half_version_and_nothing_on_ray(site: Site) -> None:
    before = versions.published_versions(site.root, CUSTOMERS)
    run = site.start("feature-store/daily", **LARGE)
    [(number, _)] = eventually(lambda: site.reserved(run.id), bool, 120)
    site.client.set_flow_run_state(run.id, Cancelling())
    ended = site.ended(run.id, 90)
    assert ended.state.type == StateType.CANCELLED, ended.state
    assert versions.published_versions(site.root, CUSTOMERS) == before
    assert site.idle_cpus() == 2, "the cancelled run's work goes on on Ray"
    assert not storage.exists(layout.join(layout.version_uri(site.root, CUSTOMERS, number), layout.MANIFEST))


@pytest.mark.nightly
def test_a_run_that_loses_its_worker_crashes_and_goes_on_when_it_is_retried(site: Site) -> None:
    run = site.start("feature-store/daily", **LARGE)
    [(number, attempt)] = eventually(lambda: site.reserved(run.id), bool, 120)
    lost = site.workers[-1]
    for process in (*lost.children(recursive=True), lost):
        process.kill()
    lost.wait(10)
    crashed = eventually(lambda: site.client.read_flow_run(run.id), lambda found: found.state.is_crashed(), 240)
    assert "No sign of life" in str(crashed.state.message)
    assert number not in versions.published_versions(site.root, CUSTOMERS)

    site.start_worker()
    site.client.set_flow_run_state(run.id, AwaitingRetry(), force=True)  # as the UI's button does
    ended = eventually(lambda: site.client.read_flow_run(run.id), lambda found: found.state.is_completed(), 180)
    assert ended.state.is_completed()
    manifest = versions.resolve(site.root, CUSTOMERS)
    assert (manifest.version, manifest.run.attempt, manifest.run.flow_run_id) == (number, attempt + 1, str(run.id))
