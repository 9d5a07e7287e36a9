"""Whole flows on an S3 that misbehaves: they publish what an undisturbed run does, or fail with the cause and cure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from prefect.client.schemas.objects import State

from flows.feature_store import feature_store
from flows.image_augmentation import image_augmentation
from flows.training_delivery import training_delivery
from tasks.delivery.config import DeliveryConfig
from tasks.features.config import FeatureStoreConfig
from tasks.images.config import ImageAugmentationConfig
from tasks.images.sample import write_sample
from tasks.io import storage
from tasks.store import layout, versions
from tasks.store.manifest import Manifest
from tests.conftest import another_ray, new_bucket
from tests.faults.proxy import Fault, Proxy, answers, broken_s3, lost, reset, silent, slow
from tests.faults.three_flows import assert_failed_at_once, first_by_default
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
ROUNDS: dict[str, list[tuple[str, Fault, Target]]] = {
    "refused": [
        ("S3 answers 503", answers(503, "SlowDown"), READING),
        ("S3 answers 409", answers(409, "ConditionalRequestConflict"), RESERVING),
        ("S3 answers 500", answers(500, "InternalError"), LISTING),
        ("S3 did it, then reset", lost(reset), DATA_ONCE),
        ("S3 answers 412 without cause", answers(412, "PreconditionFailed"), COMMITTING),
    ],
    "cut off": [
        ("S3 is slow", slow(0.5), READING),
        ("S3 answers 503", answers(503, "SlowDown"), LISTING),
        ("S3 did it, then time-out", lost(silent), RESERVING),
        ("S3 resets the connection", reset, DATA),
        ("S3 answers 500", answers(500, "InternalError"), COMMITTING),
    ],
}
"""Faults of one run each: it meets one after the other, at each kind of request; `test_s3_publishing` tries each at
each."""


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

    def content(self, manifest: Manifest) -> object:
        """What a version holds, without what names its run."""
        if self.flow == "feature-store":  # its rows say when they were made
            table = versions.read_table(self.root, manifest.dataset, manifest.version, verify=True)
            return table.drop_columns(OF_THE_RUN).to_pydict()
        entries = (*manifest.files, *manifest.rejected_files, *manifest.side_files)
        return {re.sub(r"-a\d+\.", ".", entry.path): entry.digest for entry in entries}


@pytest.fixture(scope="module")
def proxy(s3_url: str, stack: str) -> Iterator[Proxy]:
    """A proxy through which this process, and a Ray of its own, see S3."""
    with broken_s3(s3_url) as proxy:
        environment = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_MAX_ATTEMPTS": str(CLIENT_TRIES),
            "PIPELINE_S3_TIMEOUT_SECONDS": "5",
        }
        with another_ray(**environment), pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            yield proxy


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, s3_url: str, proxy: Proxy) -> Subject:
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


@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        *first_by_default(
            ("image-augmentation", "refused"),
            ("image-augmentation", "cut off"),
            ("feature-store", "cut off"),
            ("feature-store", "refused"),
            ("training-delivery", "refused"),
            ("training-delivery", "cut off"),
        ),
    ],
    indirect=["subject"],
)
def test_passing_faults_are_survived(subject: Subject, proxy: Proxy, proven: Proven, kind: str) -> None:
    faults = ROUNDS[kind]
    version = next_version(subject)
    with ExitStack() as injected:
        for _, fault, (method, key, times) in faults:
            injected.enter_context(proxy.inject(fault, method, key, times=times))
        run = subject.run()
    assert_same_again(subject, run, version)
    for row, _, _ in faults:
        proven(row, subject.flow, "tried again, same digests" if row != "S3 is slow" else "waited for, same digests")


@pytest.mark.parametrize("subject", ["image-augmentation"], indirect=True)
def test_expired_credentials(subject: Subject, proxy: Proxy, proven: Proven) -> None:
    version = next_version(subject)
    expired = answers(400, "ExpiredToken", "The provided token has expired.")
    with proxy.inject(expired, times=None, since=r"PUT .*/v\d+/(?!_)") as rule:
        failed = subject.run()
    told = assert_failed_at_once(failed)
    assert re.search(r"the credentials have expired; renew AWS_ACCESS_KEY_ID", told), told
    assert rule.met < 100, "tried again and again in vain"
    for dataset in subject.datasets:
        assert versions.published_versions(subject.root, dataset) == list(range(1, version))
    again = subject.run()
    assert again.state.is_completed(), again.state.message
    for dataset in subject.datasets:
        first = versions.resolve(subject.root, dataset, 1)
        assert subject.content(again.manifest(dataset)) == subject.content(first)
    proven("S3 credentials expire", subject.flow, "fails at once and says so; published once they are renewed")
