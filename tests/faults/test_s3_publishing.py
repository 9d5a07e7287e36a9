"""The commit protocol on an S3 that misbehaves: a version is published once and whole, or there is a clear error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tasks.io import storage
from tasks.io.errors import ConfigError, CredentialsRefused
from tasks.io.location import is_transient
from tasks.store import layout, versions
from tasks.store.manifest import Manifest
from tests.faults.proxy import (
    Fault,
    Proxy,
    answers,
    broken_s3,
    lost,
    reset,
    reset_in_answer,
    reset_in_request,
    silent,
    slow,
    trickle,
)
from tests.faults.reader import Reader, reader
from tests.store.publishing import DATASET, publish
from tests.tables import Proven

pytestmark = pytest.mark.slow

REQUESTS = {
    "reserving": ("PUT", r"/v2/_reservation"),
    "writing data": ("PUT", r"/v2/part-"),
    "committing": ("PUT", r"/v2/_manifest\.json"),
    "looking for a manifest": ("GET|HEAD", r"/v2/_manifest\.json"),
    "listing": ("GET", r"list-type=2"),
}
WRITES, READS = ["reserving", "writing data", "committing"], ["looking for a manifest", "listing"]
CREATES, ALL = ["reserving", "committing"], list(REQUESTS)
CLIENT_TRIES = 2
LONGER = CLIENT_TRIES + 1  # the first call fails, the second is saved by the client's own second try

EXPIRED = answers(400, "ExpiredToken", "The provided token has expired.")
FAULTS: dict[str, tuple[Fault, list[str], int]] = {
    "S3 answers 409": (answers(409, "ConditionalRequestConflict"), WRITES, LONGER),
    "S3 answers 412 without cause": (answers(412, "PreconditionFailed"), CREATES, LONGER),
    "S3 answers 500": (answers(500, "InternalError"), ALL, LONGER),
    "S3 answers 503": (answers(503, "SlowDown"), ALL, LONGER),
    "S3 is slow": (slow(0.3), ALL, 1),
    "S3's answer trickles": (trickle(5, 0.1), READS, LONGER),
    "S3 resets the connection": (reset, ALL, 2 * LONGER),  # aiohttp itself sends a request again on a new connection
    "S3 resets in mid-request": (reset_in_request, WRITES, LONGER),
    "S3 resets in mid-answer": (reset_in_answer, READS, LONGER),
    "S3 does not answer": (silent, ALL, LONGER),
    "S3 did it, then reset": (lost(reset), WRITES, 1),
    "S3 did it, then 500": (lost(answers(500, "InternalError")), WRITES, 1),
    "S3 did it, then time-out": (lost(silent), WRITES, 1),
}
SURVIVED = [
    pytest.param(row, request, marks=() if request == requests[-(number % 2)] else pytest.mark.nightly)
    for number, (row, (_, requests, _)) in enumerate(FAULTS.items())
    for request in requests
]


@pytest.fixture(scope="module")
def proxy(s3_url: str) -> Iterator[Proxy]:
    """A proxy through which this process sees S3, and few tries of the client, so that tests needn't wait for many."""
    with broken_s3(s3_url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_MAX_ATTEMPTS", str(CLIENT_TRIES))
        patch.setenv("PIPELINE_S3_TIMEOUT_SECONDS", "0.5")
        yield proxy


@pytest.fixture(scope="module")
def onlooker(s3_url: str, proxy: Proxy) -> Iterator[Reader]:
    """A reader who sees S3 as it is."""
    with reader({"AWS_ENDPOINT_URL": s3_url, "PIPELINE_S3_TIMEOUT_SECONDS": "20"}) as onlooker:
        yield onlooker


@pytest.fixture
def root(s3_root: str, proxy: Proxy) -> str:
    """A store with one version."""
    publish(s3_root, "before")
    return s3_root


def publish_with_retries(root: str, run_id: str) -> Manifest:
    """As a task does it: again, as long as the fault may pass."""
    for _ in range(5):
        try:
            return publish(root, run_id)
        except Exception as error:
            if not is_transient(error):
                raise
    raise AssertionError("five tries weren't enough")


def digests(manifest: Manifest) -> dict[str, str]:
    return {re.sub(r"-a\d+\.", ".", file.path): file.digest for file in manifest.files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the run publishes that is disturbed elsewhere."""
    return digests(publish(str(tmp_path_factory.mktemp("undisturbed")), "disturbed"))


def assert_published_once(root: str, manifest: Manifest, onlooker: Reader, undisturbed: dict[str, str]) -> None:
    """The version is v2, whole, the only one of its run, and without leavings; nobody has seen anything else."""
    seen = onlooker.stop()
    assert not seen.problems, f"a reader met {seen.problems[:3]} in {seen.looks} looks"
    assert seen.latest == [1, 2]
    assert versions.published_versions(root, DATASET) == [1, 2]
    versions.verify(root, versions.resolve(root, DATASET, 2))
    again = publish(root, "disturbed")
    assert again == manifest == versions.resolve(root, DATASET, 2), "the same run has published twice"
    base = layout.version_uri(root, DATASET, 2)
    names = {info.uri.removeprefix(base + "/") for info in storage.list_files(base, include_hidden=True)}
    listed = {file.path for file in manifest.files}
    left = {name for name in names - listed - {layout.MANIFEST} if not name.startswith("_reservation")}
    assert not left, f"nobody cleaned up {left}"
    assert digests(manifest) == undisturbed


@pytest.mark.parametrize(("row", "request_kind"), SURVIVED)
def test_a_passing_fault_is_survived(
    *,
    root: str,
    proxy: Proxy,
    onlooker: Reader,
    undisturbed: dict[str, str],
    proven: Proven,
    row: str,
    request_kind: str,
) -> None:
    fault, _, times = FAULTS[row]
    onlooker.watch(root)
    with proxy.inject(fault, *REQUESTS[request_kind], times=times) as rule:
        manifest = publish_with_retries(root, "disturbed")
    assert rule.met <= times
    assert_published_once(root, manifest, onlooker, undisturbed)
    proven(row, "publishing", "published once, same digests")


@pytest.mark.parametrize("request_kind", WRITES)
def test_a_success_that_is_lost_to_a_dying_connection_is_found_by_the_next_try(
    *, root: str, proxy: Proxy, onlooker: Reader, undisturbed: dict[str, str], proven: Proven, request_kind: str
) -> None:
    """The store did it, and the client fails for good before it can learn so: the run begins again."""
    onlooker.watch(root)
    with ExitStack() as faults:
        first = faults.enter_context(proxy.inject(lost(reset), *REQUESTS[request_kind]))
        faults.enter_context(proxy.inject(reset, *REQUESTS[request_kind], times=2 * CLIENT_TRIES - 1))
        manifest = publish_with_retries(root, "disturbed")
    assert first.met == 1
    assert_published_once(root, manifest, onlooker, undisturbed)
    assert manifest.run.attempt == (1 if request_kind == "committing" else 2)
    proven("S3 did it, then the client gives up", "publishing", "published once, same digests")


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("request_kind", ALL)
def test_expired_credentials_end_the_run_at_once(
    *,
    root: str,
    proxy: Proxy,
    onlooker: Reader,
    undisturbed: dict[str, str],
    proven: Proven,
    request_kind: str,
    status: int,
) -> None:
    onlooker.watch(root)
    expired = answers(status, "ExpiredToken", "The provided token has expired.")
    with (
        proxy.inject(expired, *REQUESTS[request_kind], times=None) as rule,
        pytest.raises(CredentialsRefused, match=r"'s3://.*': the credentials have expired; renew AWS_ACCESS") as caught,
    ):
        publish(root, "disturbed")
    assert not is_transient(caught.value)
    assert rule.met <= 3, "tried again in vain"
    assert versions.published_versions(root, DATASET) == [1]
    manifest = publish(root, "disturbed")
    assert_published_once(root, manifest, onlooker, undisturbed)
    proven("S3 credentials expire", "publishing", "fails at once and says so; published once they are renewed")


@pytest.mark.parametrize("request_kind", WRITES)
def test_a_bucket_that_vanished_is_named(
    *, root: str, proxy: Proxy, onlooker: Reader, undisturbed: dict[str, str], proven: Proven, request_kind: str
) -> None:
    onlooker.watch(root)
    gone = answers(404, "NoSuchBucket", "The specified bucket does not exist")
    with (
        proxy.inject(gone, *REQUESTS[request_kind], times=None),
        pytest.raises(ConfigError, match=r"can't write 's3://.*': bucket '.*' doesn't exist; create it or correct"),
    ):
        publish(root, "disturbed")
    assert versions.published_versions(root, DATASET) == [1]
    assert_published_once(root, publish(root, "disturbed"), onlooker, undisturbed)
    proven("the S3 bucket vanishes", "publishing", "fails at once and says so; published once it is back")
