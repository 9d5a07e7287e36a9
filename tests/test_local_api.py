"""One API for a flow run by hand and its Ray workers; nothing left behind, however it ends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tasks.by_hand import _client_settings, _Ready, local_api, local_stack
from tasks.io.errors import PipelineError
from tests.processes import own_home, prefect_server, shell_environment

RUN = """
import json, sys
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from tasks.by_hand import local_stack
from tasks.runner import ray_runner
from tests.test_runner import count_rows, messages

@flow(task_runner=ray_runner())
def by_hand() -> int:
    return count_rows.submit(100).result()

with local_stack(num_cpus=2) as url:
    assert PREFECT_API_URL.value() == url
    state = by_hand(return_state=True)
    print(json.dumps({"url": url, "rows": state.result(), "logs": messages(state.state_details.flow_run_id)}))
assert not PREFECT_API_URL.value()
"""

WAIT = """
import time
from tasks.by_hand import local_api
with local_api() as url:
    print(url, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start a script as somebody at a terminal would: with a Prefect home, without an API address."""
    started = []

    def run(script: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=shell_environment(own_home(tmp_path / str(len(started)))),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=2)
    except httpx.TransportError:
        return True
    return False


def test_flow_and_workers_share_one_api_and_both_are_gone_afterwards(start) -> None:
    process = start(RUN)
    seen: set[psutil.Process] = set()
    while process.poll() is None:
        seen |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    told = json.loads(output.splitlines()[-1])
    assert told["rows"] == 100
    assert "counted 100: the last line of this task" in told["logs"]  # written in a Ray worker
    assert "Still processing" not in errors
    assert seen
    _, alive = psutil.wait_procs(seen, timeout=10)
    assert not alive
    assert refused(told["url"])


def test_the_server_goes_however_its_owner_ends(start) -> None:
    """Ctrl-C, and a kill that no `finally` survives; SIGTERM is among the runner's tests."""
    owners = {number: start(WAIT) for number in (signal.SIGINT, signal.SIGKILL)}
    for number, owner in owners.items():
        url = owner.stdout.readline().strip()
        assert httpx.get(f"{url}/health", timeout=10).is_success
        [server] = psutil.Process(owner.pid).children()
        owner.send_signal(number)
        owner.wait(20)
        psutil.wait_procs([server], timeout=10)
        assert refused(url), number.name


def test_a_configured_api_is_used_and_left_alone(prefect_api: str, ray_cluster: None) -> None:
    with local_api() as url:
        assert url == prefect_api
    with local_stack() as url:
        assert url == prefect_api
        assert os.environ["PREFECT_API_URL"] == url  # Ray workers that start from here on find it
    assert httpx.get(f"{prefect_api}/health").is_success
    assert "PREFECT_API_URL" not in os.environ

    import ray

    assert ray.is_initialized()


def test_the_settings_come_back_after_an_error(prefect_api: str) -> None:
    from prefect.settings import PREFECT_API_URL

    def failing() -> None:
        with _client_settings("http://127.0.0.1:9/api"):
            assert PREFECT_API_URL.value() == "http://127.0.0.1:9/api"
            raise KeyError("job")

    with pytest.raises(KeyError, match="job"):
        failing()
    assert PREFECT_API_URL.value() == prefect_api
    assert "PREFECT_API_URL" not in os.environ


def test_cyclic_garbage_is_freed_in_a_thread_of_its_own() -> None:
    """A cursor freed in the event loop's thread would wait for a lock that only the event loop can release."""
    lines = """
        import gc, threading, time
        from tasks.by_hand import _collect_garbage_in_a_thread

        class Cursor:
            def __del__(self):
                freed.append(threading.current_thread())

        freed = []
        _collect_garbage_in_a_thread(0.05)
        for _ in range(20):
            cursor = Cursor()
            cursor.itself = cursor
            del cursor
            [[] for _ in range(10_000)]  # would begin a collection here
        give_up = time.monotonic() + 30
        while len(freed) < 20 and time.monotonic() < give_up:
            time.sleep(0.01)
        assert len(freed) == 20, len(freed)
        assert threading.main_thread() not in freed
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], check=True, timeout=60)


def test_slots_of_tags_are_given_while_others_write(prefect_api: str) -> None:
    """Prefect's answer 503 costs each task with tags that gets it 2 s."""
    done = threading.Event()

    def write(number: int) -> None:
        with httpx.Client(base_url=prefect_api) as client:
            for turn in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
                name = f"writer-{os.getpid()}-{number}-{turn}"
                client.post("/variables/", json={"name": name, "value": turn}).raise_for_status()

    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=prefect_api) as client:
        writers = [pool.submit(write, number) for number in range(4)]
        try:
            request = {"slots": 1, "names": ["tag:ray-data"]}
            answers = [client.post("/v2/concurrency_limits/increment-with-lease", json=request) for _ in range(100)]
        finally:
            done.set()
    for writer in writers:
        writer.result()
    assert {answer.status_code for answer in answers} == {200}


def test_a_server_that_ends_at_once_is_explained() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(PipelineError, match=r"ended with code 3.*prefect server start"):
        _Ready(process, "http://127.0.0.1:9/api")()


def test_a_real_prefect_server(ray_cluster: None, tmp_path: Path) -> None:
    """What flows do here also works against the server that people run, not only against the embedded one."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.artifacts import publish_report, read_artifacts
    from tasks.runner import drain_api_queues, ray_runner
    from tests.test_runner import count_rows, messages

    with prefect_server(own_home(tmp_path)) as url, temporary_settings({PREFECT_API_URL: url}):
        from prefect import flow

        @flow(task_runner=ray_runner())
        def counted() -> int:
            rows = count_rows.submit(50).result()
            publish_report("counted", "# 50 rows", [{"check": "rows", "figure": rows}])
            return rows

        state = counted(return_state=True)
        assert state.result() == 50
        assert "counted 50: the last line of this task" in messages(state.state_details.flow_run_id)
        keys = {artifact.key for artifact in read_artifacts(state.state_details.flow_run_id)}
        assert keys == {"counted-report", "counted-checks"}
        drain_api_queues()
