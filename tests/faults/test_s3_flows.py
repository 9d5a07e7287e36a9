"""Whole flows on an S3 that misbehaves: they publish what an undisturbed run does, or fail with the cause and cure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import ray
from prefect.client.schemas.objects import State

from flows.feature_store import feature_store
from flows.image_augmentation import image_augmentation
from flows.training_delivery import training_delivery
from tasks.core import layout, storage, versions
from tasks.core.cluster import connect
from tasks.core.manifest import Manifest
from tasks.delivery.config import DeliveryConfig
from tasks.features.config import FeatureStoreConfig
from tasks.images.config import ImageAugmentationConfig
from tasks.images.sample import write_sample
from tests.conftest import new_bucket
from tests.faults.proxy import Fault, Proxy, answers, broken_s3, lost, reset, silent, slow
from tests.processes import PROJECT
from tests.runs import Run, assert_whole
from tests.tables import Proven

pytestmark = pytest.mark.slow

OF_THE_RUN = ["feature_creation_date", "feature_version"]
CLIENT_TRIES = 2
LONGER = 2 * CLIENT_TRIES  # the tasks have to try again; also where an HTTP library itself sends a request twice

Target = tuple[str, str, int]
DATA: Target = ("PUT|POST", r"/v\d+/(?!_)[^?]*", LONGER)
DATA_ONCE: Target = (*DATA[:2], 1)
READING: Target = ("GET|HEAD", r"\.(parquet|jpg|csv|raw|bin)$", LONGER)
RESERVING: Target = ("PUT", r"/_reservation", 1)
COMMITTING: Target = ("PUT", r"/_manifest\.json", 1)
LISTING: Target = ("GET", r"list-type=2", 1)
FAULTS: dict[str, tuple[Fault, list[Target]]] = {
    "S3 answers 409": (answers(409, "ConditionalRequestConflict"), [DATA, RESERVING, COMMITTING]),
    "S3 answers 412 without cause": (answers(412, "PreconditionFailed"), [RESERVING, COMMITTING]),
    "S3 answers 500": (answers(500, "InternalError"), [DATA, READING, RESERVING, COMMITTING, LISTING]),
    "S3 answers 503": (answers(503, "SlowDown"), [DATA, READING, RESERVING, COMMITTING, LISTING]),
    "S3 is slow": (slow(0.5), [DATA, READING, RESERVING, COMMITTING, LISTING]),
    "S3 resets the connection": (reset, [DATA, READING, RESERVING, COMMITTING, LISTING]),
    "S3 did it, then reset": (lost(reset), [DATA_ONCE, RESERVING, COMMITTING]),
    "S3 did it, then time-out": (lost(silent), [DATA_ONCE, RESERVING, COMMITTING]),
}


@dataclass(frozen=True)
class Subject:
    """A flow, its store, and the version that an undisturbed run has published there."""

    flow: str
    root: str
    options: dict[str, object]
    datasets: list[str]

    def run(self) -> Run:
        """Run it in this process."""
        settings = {"root": self.root, **self.options}
        state: State
        if self.flow == "image-augmentation":
            state = image_augmentation(ImageAugmentationConfig.model_validate(settings), return_state=True)
        elif self.flow == "feature-store":
            state = feature_store(FeatureStoreConfig.model_validate(settings), return_state=True)
        else:
            state = training_delivery(DeliveryConfig.model_validate(settings), return_state=True)
        return Run(self.root, state)

    def command(self, api: str) -> subprocess.CompletedProcess[str]:
        """Run it as somebody does in a shell, on this module's Ray, until its end."""
        words = list(_words(self.options))
        return subprocess.run(
            [sys.executable, "-m", f"flows.{self.flow.replace('-', '_')}", "--root", self.root, *words],
            env={
                **os.environ,
                "PREFECT_API_URL": api,
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
                "PYTHONPATH": str(PROJECT),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def content(self, manifest: Manifest) -> object:
        """What a version holds, without what names its run."""
        if self.flow == "feature-store":  # its rows say when they were made
            table = versions.read_table(self.root, manifest.dataset, manifest.version, verify=True)
            return table.drop_columns(OF_THE_RUN).to_pydict()
        entries = (*manifest.files, *manifest.rejected_files, *manifest.side_files)
        return {re.sub(r"-a\d+\.", ".", entry.path): entry.digest for entry in entries}


def _words(options: dict[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in options.items():
        word = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            yield from _words(value, f"{word}.")
        elif isinstance(value, bool):
            yield f"--{word}" if value else f"--no-{word}"
        else:
            yield from (f"--{word}", str(value))


@pytest.fixture(scope="module")
def proxy(s3_url: str) -> Iterator[Proxy]:
    """A proxy through which this process, and a Ray of its own, see S3."""
    with broken_s3(s3_url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_MAX_ATTEMPTS", str(CLIENT_TRIES))
        patch.setenv("PIPELINE_S3_TIMEOUT_SECONDS", "5")
        yield proxy


@pytest.fixture(scope="module")
def api(prefect_api: str, proxy: Proxy) -> Iterator[str]:
    """The API's address, while Ray's workers have the environment with the proxy; the session's Ray waits."""
    assert os.environ["AWS_ENDPOINT_URL"] == proxy.url, "workers inherit it as Ray starts"
    others = ray.is_initialized()
    ray.shutdown()
    assert connect(num_cpus=2, object_store_memory=200 * 2**20)
    yield prefect_api
    ray.shutdown()
    if others:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.target}")
            patch.delenv("AWS_MAX_ATTEMPTS")
            patch.delenv("PIPELINE_S3_TIMEOUT_SECONDS")
            assert connect(num_cpus=2, object_store_memory=200 * 2**20)


@pytest.fixture(scope="module", params=["image-augmentation", "feature-store", "training-delivery"])
def subject(request: pytest.FixtureRequest, s3_url: str, api: str) -> Subject:
    """A flow whose undisturbed run has published v1."""
    root = new_bucket(s3_url)
    if request.param == "image-augmentation":
        sources: dict[str, object] = dict(write_sample(layout.join(root, "sources"), 24, 0))
        options = {**sources, "images_per_file": 8, "augmentation": {"size": 32}}
        found = Subject(request.param, root, options, ["training-datasets/images"])
    elif request.param == "feature-store":
        datasets = ["feature-store/customer-features", "feature-store/product-features"]
        found = Subject(request.param, root, {"sample_transactions": 1000}, datasets)
    else:
        assert Subject("feature-store", root, {"sample_transactions": 1000}, []).run().state.is_completed()
        options = {"target": "spending_trend", "ready_only": False, "training": {"enabled": False}}
        found = Subject(request.param, root, options, ["training-datasets/streaming-ready/customer-features"])
    undisturbed = found.run()
    assert undisturbed.state.is_completed(), undisturbed.state.message
    return found


def assert_same_again(subject: Subject, run: Run, version: int) -> None:
    """The run has published the next version, whole, with the content of the undisturbed one."""
    assert run.state.is_completed(), run.state.message
    for dataset in subject.datasets:
        manifest = assert_whole(run, dataset, beside(run, dataset))
        assert versions.published_versions(subject.root, dataset) == list(range(1, version + 1))
        assert manifest.version == version
        first = versions.resolve(subject.root, dataset, 1)
        assert subject.content(manifest) == subject.content(first), f"{dataset} v{version} differs from v1"


def beside(run: Run, dataset: str) -> list[str]:
    """Summaries that are made anew from the rest, and that no manifest lists."""
    base = layout.version_uri(run.root, dataset, run.manifest(dataset).version)
    return [layout.CLASS_SUMMARY] if storage.exists(layout.join(base, layout.CLASS_SUMMARY)) else []


def next_version(subject: Subject) -> int:
    return max(versions.published_versions(subject.root, subject.datasets[0])) + 1


@pytest.mark.parametrize("row", FAULTS)
def test_a_passing_fault_is_survived(subject: Subject, proxy: Proxy, proven: Proven, row: str) -> None:
    fault, targets = FAULTS[row]
    version = next_version(subject)
    with ExitStack() as faults:
        for method, key, times in targets:
            faults.enter_context(proxy.inject(fault, method, key, times=times))
        run = subject.run()
    assert_same_again(subject, run, version)
    proven(row, subject.flow, "tried again, same digests" if row != "S3 is slow" else "waited for, same digests")


def test_expired_credentials(subject: Subject, proxy: Proxy, api: str, proven: Proven) -> None:
    version = next_version(subject)
    expired = answers(400, "ExpiredToken", "The provided token has expired.")
    with proxy.inject(expired, times=None, since=r"PUT .*/v\d+/(?!_)") as rule:
        failed = subject.command(api)
    told = failed.stdout + failed.stderr
    assert failed.returncode != 0, told
    assert re.search(r"the credentials have expired; renew AWS_ACCESS_KEY_ID", told), told
    assert rule.met < 100, "tried again and again in vain"
    for dataset in subject.datasets:
        assert versions.published_versions(subject.root, dataset) == list(range(1, version))
    assert_same_again(subject, subject.run(), version)  # the dead run's number, and nothing of it beside the files
    proven("S3 credentials expire", subject.flow, "fails at once and says so; published once they are renewed")
