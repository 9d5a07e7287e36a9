"""The servers around a run go away while it runs, killed (-9) or hanging: Prefect's, and the S3 endpoint.

One whole flow for each fault: how a flow's process, its tasks on Ray and the store's clients bear it is the same code
for all three (`tasks.runner` and `tasks.io.storage`), and no flow has any of its own.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import ray
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.io import storage
from tasks.store import layout, versions
from tests.faults.failpoints import environment
from tests.faults.forwarder import Forwarder, forwarder
from tests.faults.three_flows import DATASETS, Starter, Store
from tests.faults.three_flows import IMAGES as IMAGE_FLOW
from tests.faults.watching import watching
from tests.processes import Command, own_home, start_prefect_server
from tests.tables import Proven
from tests.test_runner import eventually

pytestmark = pytest.mark.slow

[IMAGES] = DATASETS[IMAGE_FLOW]
START_SECONDS, END_SECONDS = 300, 400


@pytest.fixture
def whole(undisturbed: Store) -> dict[str, str]:
    """Contents of a run that nobody disturbed."""
    return contents(str(undisturbed.root))


def contents(root: str) -> dict[str, str]:
    """Digest of each file of the latest version, by its name without the attempt, once all of them are verified."""
    manifest = versions.resolve(root, IMAGES)
    versions.verify(root, manifest)
    entries = (*manifest.files, *manifest.rejected_files, *manifest.side_files)
    return {re.sub(r"-a\d+\.", ".", entry.path): entry.digest for entry in entries}


def failed(command: Command) -> str:
    """The last words of a run that must fail, by itself and in bounded time."""
    output, errors = command.process.communicate(timeout=END_SECONDS)
    assert command.process.returncode == 1, f"it ended with {command.process.returncode}:\n{errors}\n{output}"
    assert "Traceback" not in errors.splitlines()[-1]
    told = [line for line in errors.splitlines() if line.startswith("failed: ")]
    assert told, f"nothing is told at the end:\n{errors}"
    return told[-1]


@dataclass
class Server:
    """A Prefect server that can be killed and started again where it was."""

    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        self.process = start_prefect_server(self.port, self.home)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = Server(own_home(tmp_path / "server"), port)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def held(
    server: Server, start: Starter, undisturbed: Store, ray_cluster: None, tmp_path: Path
) -> Callable[..., Command]:
    """Start a run on this session's Ray and kill the Prefect server once it has reserved its version.

    All that is left to do follows without it: planning, augmenting and judging on Ray, and the commit.
    """
    address = ray.get_runtime_context().gcs_address

    def run(root: str, **settings: str) -> Command:
        hold = tmp_path / "hold"
        armed = environment(tmp_path / "hook", "after reserving", Path(root, IMAGES, "v1"), hold)
        config = undisturbed.config(IMAGE_FLOW, root=root)
        command = start(IMAGE_FLOW, config, PREFECT_API_URL=server.url, RAY_ADDRESS=address, **armed, **settings)
        eventually(lambda: hold.exists() or command.process.poll() is not None, bool, START_SECONDS)
        assert hold.exists(), command.process.communicate()
        server.kill()
        hold.unlink()
        return command

    return run


def test_the_prefect_server_is_killed_in_mid_run_and_comes_back(
    server: Server, held: Callable[..., Command], whole: dict[str, str], tmp_path: Path, proven: Proven
) -> None:
    root = str(tmp_path / "root")
    with watching(root):
        command = held(root)
        time.sleep(3)  # the outage itself
        server.start()
        command.finish()
    assert contents(root) == whole
    assert versions.published_versions(root, IMAGES) == [1]
    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(versions.resolve(root, IMAGES).run.flow_run_id))
        assert run.state is not None
        assert run.state.is_completed(), run.state
    result = "run completes, same digests, the server knows"
    proven("Prefect server killed (-9) in mid-run, back after seconds", "image-augmentation", result)


@pytest.mark.nightly
def test_the_prefect_server_is_killed_in_mid_run_for_good(
    server: Server, held: Callable[..., Command], tmp_path: Path, proven: Proven
) -> None:
    root = str(tmp_path / "root")
    with watching(root):
        # Prefect's client tries each of its requests again itself: by default 5 times, for a minute.
        told = failed(held(root, PIPELINE_API_PATIENCE_SECONDS="2", PREFECT_CLIENT_MAX_RETRIES="2"))
    assert server.url in told
    assert versions.published_versions(root, IMAGES) == []
    result = "run fails in bounded time and names the server, nothing visible"
    proven("Prefect server killed (-9) in mid-run, for good", "image-augmentation", result)


@pytest.fixture
def endpoint(s3_url: str) -> Iterator[Forwarder]:
    """What stands before the S3 endpoint."""
    with forwarder(s3_url) as started:
        yield started


@pytest.fixture
def reserved(endpoint: Forwarder, s3_root: str, start: Starter, undisturbed: Store) -> Callable[..., Command]:
    """Start a run and wait until it has reserved its version: it plans, reads and writes from here on."""

    def run(**settings: str) -> Command:
        config = undisturbed.config(IMAGE_FLOW, root=s3_root)
        command = start(IMAGE_FLOW, config, AWS_ENDPOINT_URL=endpoint.url, **settings)
        uri = layout.join(layout.version_uri(s3_root, IMAGES, 1), layout.reservation_name(1))
        eventually(lambda: storage.exists(uri) or command.process.poll() is not None, bool, START_SECONDS)
        assert storage.exists(uri), command.process.communicate()
        return command

    return run


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "begin", "end"),
    [("killed (-9)", Forwarder.kill, Forwarder.start), ("hanging", Forwarder.hang, Forwarder.go_on)],
    ids=["killed", "hanging"],
)
def test_the_s3_endpoint_is_away_for_some_seconds(
    request: pytest.FixtureRequest, fault: str, begin: Any, end: Any
) -> None:
    endpoint, s3_root, whole = (request.getfixturevalue(name) for name in ("endpoint", "s3_root", "whole"))
    with watching(s3_root):
        command = request.getfixturevalue("reserved")(PIPELINE_RETRY_DELAY_SECONDS="2")
        begin(endpoint)
        time.sleep(5)  # the outage itself
        end(endpoint)
        command.finish()
    assert versions.published_versions(s3_root, IMAGES) == [1]
    assert contents(s3_root) == whole
    note = request.getfixturevalue("proven")
    note(f"S3 endpoint {fault} for some seconds", "image-augmentation", "tried again, same digests")


@pytest.mark.nightly
def test_the_s3_endpoint_is_killed_for_good(
    endpoint: Forwarder, s3_root: str, reserved: Callable[..., Command], proven: Proven
) -> None:
    with watching(s3_root):
        command = reserved(PIPELINE_RETRY_DELAY_SECONDS="2", AWS_MAX_ATTEMPTS="2")
        endpoint.kill()
        told = failed(command)
    assert endpoint.url.removeprefix("http://") in told or "s3" in told.lower(), told
    assert versions.published_versions(s3_root, IMAGES) == []
    result = "run fails in bounded time and names the endpoint, nothing visible"
    proven("S3 endpoint killed (-9) for good", "image-augmentation", result)
