"""The runner's repairs, each against a real API server and a real Ray."""

import contextvars
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import psutil
import pytest
import ray
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import State, TaskRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed
from prefect_ray.context import remote_options

from tasks.engine.cluster import cluster_address, data_context, explained_versions, has_web_server, init_options
from tasks.io.errors import ConfigError
from tasks.runner import RayJobRunner, await_api, ray_runner

T = TypeVar("T")
pytestmark = pytest.mark.usefixtures("stack")


def eventually(read: Callable[[], T], accept: Callable[[T], bool], seconds: float = 15) -> T:
    """What `read` gives once it is accepted: states and logs reach the API a little after the fact."""
    give_up = time.monotonic() + seconds
    while not accept(value := read()) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert accept(value), value
    return value


def task_runs(flow_run_id: UUID) -> list[TaskRun]:
    with get_client(sync_client=True) as client:
        return client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))


def messages(flow_run_id: UUID) -> list[str]:
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), limit=200)
    return [log.message for log in logs]


def run_id(state: State) -> UUID:
    assert state.state_details.flow_run_id is not None
    return state.state_details.flow_run_id


@task
def count_rows(rows: int) -> int:
    with data_context():
        total = ray.data.range(rows, override_num_blocks=4).map_batches(lambda batch: batch).count()
    get_run_logger().info("counted %d: the last line of this task", total)
    return total


@task
def fail(message: str) -> None:
    get_run_logger().info("about to fail with %s", message)
    raise ValueError(message)


@task
def die_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@task
def sleep(seconds: float, marker: str | None = None) -> str:
    get_run_logger().info("sleeping")
    if marker:
        Path(marker).touch()
    time.sleep(seconds)
    return "slept"


@task
def after(value: str) -> str:
    return value


def test_two_jobs_at_once_on_two_cpus_end_and_all_their_logs_arrive() -> None:
    @flow(task_runner=ray_runner(), timeout_seconds=60)
    def both() -> list[int]:
        return [future.result() for future in [count_rows.submit(1000), count_rows.submit(2000)]]

    state = both(return_state=True)
    assert state.result() == [1000, 2000]
    assert {run.state_name for run in task_runs(run_id(state))} == {"Completed"}
    lines = messages(run_id(state))  # at once: the tasks sent them before they ended
    assert {f"counted {n}: the last line of this task" for n in (1000, 2000)} <= set(lines)


def test_a_failing_task_fails_with_its_own_error_and_its_logs() -> None:
    @flow(task_runner=ray_runner())
    def failing() -> None:
        fail.submit("no such column").result()

    state = failing(return_state=True)
    with pytest.raises(ValueError, match="no such column"):
        state.result()
    assert "about to fail with no such column" in messages(run_id(state))
    assert [run.state_name for run in task_runs(run_id(state))] == ["Failed"]


def test_a_killed_worker_is_a_crashed_task_run_and_a_flow_with_retries_recovers(tmp_path: Path) -> None:
    @flow(task_runner=ray_runner(), retries=1)
    def recovering() -> str:
        return die_once.submit(str(tmp_path / "died")).result()

    state = recovering(return_state=True)
    assert state.result() == "alive"
    runs = sorted(task_runs(run_id(state)), key=lambda run: str(run.created))
    assert [run.state_name for run in runs] == ["Crashed", "Completed"]  # two runs: Ray itself didn't try again
    assert "WorkerCrashedError" in runs[0].state.message


def test_what_waits_for_a_crashed_task_is_crashed_too(tmp_path: Path) -> None:
    @flow(task_runner=ray_runner())
    def chain() -> str:
        return after.submit(die_once.submit(str(tmp_path / "died"))).result()

    state = chain(return_state=True)
    assert not state.is_completed()
    runs = eventually(lambda: task_runs(run_id(state)), lambda runs: len(runs) == 2)
    assert {run.state_name for run in runs} == {"Crashed"}


def test_a_task_that_the_flow_leaves_running_is_cancelled(tmp_path: Path) -> None:
    @flow(task_runner=ray_runner())
    def leaving() -> str:
        sleep.submit(120, str(tmp_path / "started"))
        eventually((tmp_path / "started").exists, bool)
        return "left"

    begin = time.monotonic()
    state = leaving(return_state=True)
    assert state.result() == "left"
    assert time.monotonic() - begin < 60
    assert [run.state_name for run in task_runs(run_id(state))] == ["Cancelled"]
    assert "sleeping" in messages(run_id(state))


def test_a_result_that_is_late() -> None:
    @flow(task_runner=ray_runner())
    def impatient() -> str:
        future = sleep.submit(2)
        with pytest.raises(TimeoutError, match="did not complete within"):
            future.result(timeout=0.2)
        future.wait(timeout=0.1)
        return future.result()

    assert impatient() == "slept"


def test_the_cluster_that_was_there_stays() -> None:
    with RayJobRunner() as runner:
        assert runner.task_options == {"num_cpus": 0, "max_retries": 0}
    assert ray.is_initialized()


def test_options_reach_the_duplicate_and_the_task() -> None:
    @task
    def held() -> float:
        return ray.get_runtime_context().get_assigned_resources().get("CPU", 0)

    @flow(task_runner=ray_runner({"num_cpus": 1}))
    def options() -> tuple[float, float]:
        mine = held.submit().result()
        with remote_options(num_cpus=0):
            return mine, held.submit().result()

    runner = ray_runner({"num_cpus": 1})
    assert runner.duplicate() == runner
    assert runner.duplicate() != ray_runner()
    assert options() == (1, 0)


def test_starting_a_runner_keeps_the_sigterm_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with RayJobRunner():
        assert signal.getsignal(signal.SIGTERM) is before


STOPPED = """
import sys
from prefect import flow
from tasks.by_hand import local_stack
from tasks.runner import ray_runner
from tests.test_runner import sleep

@flow(task_runner=ray_runner(), flow_run_name=sys.argv[1])
def stopped(marker: str) -> str:
    return sleep.submit(300, marker).result()

with local_stack(num_cpus=1):
    stopped(sys.argv[2])
"""


def test_stopping_a_flow_by_hand_cancels_it_and_leaves_nothing_behind(stack: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_API_URL": stack, "PREFECT_HOME": str(tmp_path)}
    names = {number: f"stopped-by-{number.name}-{os.getpid()}" for number in (signal.SIGTERM, signal.SIGINT)}
    flows = {
        number: subprocess.Popen(
            [sys.executable, "-c", STOPPED, name, str(tmp_path / name)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, name in names.items()
    }
    started = []
    for number, process in flows.items():  # both at once: most of the time is start-up
        marker = tmp_path / names[number]
        eventually(lambda: marker.exists() or process.poll() is not None, bool, seconds=90)  # noqa: B023
        started += psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
    for number, process in flows.items():
        _, errors = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 1}[number], errors
        assert number != signal.SIGINT or errors.rstrip().endswith("Stopped by hand (KeyboardInterrupt).")
        with get_client(sync_client=True) as client:
            named = FlowRunFilter(name=FlowRunFilterName(any_=[names[number]]))
            [run] = client.read_flow_runs(flow_run_filter=named)
        assert run.state_name == "Cancelled", errors
        assert [run.state_name for run in task_runs(run.id)] == ["Cancelled"]
    assert started
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_a_crash_that_the_api_never_heard_of_is_recorded() -> None:
    """A worker killed before its first event leaves no task run to correct."""

    @flow(task_runner=ray_runner())
    def ghost() -> None:
        future = after.submit("x")
        future.wait()
        future._task_run_id = UUID(int=future._task_run_id.int ^ 1)
        future.record(Crashed(message="worker lost"))

    state = ghost(return_state=True)
    assert {run.state_name for run in task_runs(run_id(state))} == {"Completed", "Crashed"}


def test_the_address_is_chosen_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address() is None
    local = init_options(num_cpus=2)
    assert (local["address"], local["num_cpus"], local["include_dashboard"]) == ("local", 2, False)
    assert "runtime_env" not in local  # local workers inherit
    monkeypatch.setenv("PIPELINE_OBJECT_STORE_BYTES", "100000000")
    assert init_options()["object_store_memory"] == 100_000_000
    monkeypatch.setenv("PIPELINE_OBJECT_STORE_BYTES", "2 GB")
    with pytest.raises(ConfigError, match=r"whole number of bytes.*'2 GB'"):
        init_options()


def test_a_remote_cluster_gets_the_settings_but_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    options = init_options(num_cpus=2, env={"PREFECT_API_URL": "http://api"})
    assert options["address"] == "ray://head:10001"
    assert "num_cpus" not in options  # Ray refuses it for a cluster that exists
    sent = options["runtime_env"]["env_vars"]
    assert (sent["PREFECT_API_URL"], sent["POLARS_MAX_THREADS"]) == ("http://api", "1")
    assert "hidden" not in str(options)
    with pytest.raises(ConfigError, match="looks like a credential"):
        init_options(env={"AWS_SECRET_ACCESS_KEY": "hidden"})


def test_workers_have_their_environment() -> None:
    names = ("POLARS_MAX_THREADS", "RAY_DATA_DISABLE_PROGRESS_BARS")
    assert ray.get(ray.remote(num_cpus=0)(lambda: [os.environ.get(name) for name in names]).remote()) == ["1", "1"]
    assert "POLARS_MAX_THREADS" not in os.environ  # the flow's own process keeps its threads


def test_other_versions_are_explained() -> None:
    with (
        pytest.raises(ConfigError, match=r"(?s)'head:6379' runs other versions.*same image"),
        explained_versions("head:6379"),
    ):
        raise RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9.0")
    with pytest.raises(RuntimeError, match="something else"), explained_versions("head:6379"):
        raise RuntimeError("something else")


def test_settings_of_a_job_fit_the_cluster_and_come_back() -> None:
    context = ray.data.DataContext.get_current()
    before = context.op_resource_reservation_enabled
    with data_context(cpus=2) as inside:
        assert not inside.op_resource_reservation_enabled
        assert not inside.enable_progress_bars
    with data_context(cpus=64) as inside:
        assert inside.op_resource_reservation_enabled
    assert context.op_resource_reservation_enabled == before


def test_a_local_ray_has_no_process_that_serves_nobody(ray_cluster: None) -> None:
    """Else a first run would wait for a web server, an autoscaler, and two actors of Ray Data."""
    session = ray._private.worker._global_node.get_session_dir_path()
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    own = [command for command in commands if session in command]
    assert any("raylet" in command for command in own)
    assert not [command for command in own if "/dashboard.py" in command or "/monitor.py" in command]
    assert not has_web_server()

    def named() -> set[str]:
        return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}

    before = named()
    with data_context():
        assert ray.data.range(100).map_batches(lambda batch: batch).count() == 100
    assert named() == before


def test_the_process_of_a_flow_imports_no_library_of_its_tasks() -> None:
    """They take seconds; the flow's own process only submits."""
    flows = "flows.feature_store, flows.image_augmentation, flows.training_delivery"
    heavy = "{'ray.data', 'ray.train', 'torch', 'torchvision', 'numba', 'pandas', 'matplotlib'}"
    code = f"import sys, {flows}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_task_waits_while_the_api_is_away() -> None:
    asked: list[str] = []

    class Back(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        await_api(patience=0)  # gives up, and leaves the error to whoever needs the API
        waiting = threading.Thread(target=contextvars.copy_context().run, args=(await_api,))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        with HTTPServer(("127.0.0.1", port), Back) as server:
            server.timeout = 10
            server.handle_request()
        waiting.join(10)
    assert asked == ["/api/health"]
