"""Processes of their own for tests: a flow as somebody starts it in a shell, its end by force, and a Prefect server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prefect
import psutil

from tasks.by_hand import _Ready

PROJECT = Path(__file__).parents[1]
ENDED_BY_THEMSELVES = 60.0  # the API server, Ray and its workers notice within some seconds that the flow is gone
PATIENCE = 300.0  # with a run that takes 15 s on an idle machine
OUTLIVE = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # Ray's own agents don't always

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 150 * 2**20})
second = cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
cluster.wait_for_nodes()
print(cluster.address, second.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def migrated_template() -> Path:
    """Where an empty, migrated database of this Prefect release is kept (see `tests.conftest.prefect_api`)."""
    return Path(tempfile.gettempdir()) / f"prefect-{prefect.__version__}-migrated-{os.getuid()}.db"


def ran(command: Sequence[str], timeout: float, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A process that has ended within some seconds, with whatever status, and its output as text."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, **settings)


def ran_pytest(*options: str, timeout: float, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A run of pytest in a process of its own."""
    return ran([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options], timeout, **settings)


def own_home(home: Path) -> Path:
    """Make a Prefect home of its own, with an empty database that is migrated if there is one (which saves 10 s)."""
    home.mkdir(parents=True, exist_ok=True)
    if (template := migrated_template()).exists():
        shutil.copy(template, home / "prefect.db")
    return home


def shell_environment(home: Path) -> dict[str, str]:
    """This process's environment with a Prefect home of its own and, as in a fresh shell, without an API address."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return {**environment, "PREFECT_HOME": str(home), "PYTHONPATH": str(PROJECT)}


@dataclass
class Command:
    """A flow as somebody starts it in a shell, and every process that it started."""

    process: subprocess.Popen[str]
    family: set[psutil.Process] = field(default_factory=set)

    @classmethod
    def start(cls, module: str, options: Sequence[str], home: Path, **environment: str) -> Command:
        """Start `python -m module` with some options, and what the environment has besides a shell's."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *options],
            env=shell_environment(home) | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return cls(process)

    def look(self) -> None:
        """Note the processes that are there now: once the flow is dead nobody can tell whose they were."""
        try:
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def finish(self) -> str:
        """Wait for a good end; what the flow wrote to stderr."""
        output, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, f"the run failed:\n{errors}\n{output}"
        return errors

    def fail(self) -> str:
        """Wait for a bad end; what the flow wrote to stderr."""
        output, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode not in (0, None), f"the run ended well:\n{errors}\n{output}"
        return errors

    def kill_when(self, reached: Callable[[], bool]) -> None:
        """Kill the flow's own process as soon as something is so."""
        give_up, turn = time.monotonic() + PATIENCE, 0
        while not reached():
            assert self.process.poll() is None, f"the run ended first:\n{self.process.communicate()}"
            assert time.monotonic() < give_up, "the run wrote nothing"
            if turn % 10 == 0:  # each look takes some milliseconds
                self.look()
            turn += 1
            time.sleep(0.01)
        self.look()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def await_kill(self) -> None:
        """Wait until the flow's own process has been killed by something that the test armed."""
        give_up = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < give_up:
            self.look()
            time.sleep(0.1)  # each look takes some milliseconds
        output = self.process.communicate() if self.process.poll() is not None else "it goes on"
        assert self.process.poll() == -signal.SIGKILL, f"the run wasn't killed ({self.process.poll()}): {output}"

    def end_family(self) -> set[str]:
        """Wait for what the flow left behind, end what is still there and give its names."""
        names = {}
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                names[process] = process.name()
        agents = [process for process, name in names.items() if name in OUTLIVE]
        _, alive = psutil.wait_procs([process for process in names if process not in agents], ENDED_BY_THEMSELVES)
        for process in (*alive, *agents):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return {names[process] for process in alive}

    def stop(self) -> None:
        """End whatever is left, for the end of a test."""
        if self.process.poll() is None:
            self.look()
            self.process.kill()
            self.process.communicate()
        self.end_family()


@dataclass(frozen=True)
class TwoNodes:
    """A Ray cluster of a head and a second node."""

    address: str
    raylet: int
    """Process of the second node; its death is the node's."""

    def kill_second(self) -> None:
        """Kill the second node, with its object store; its workers follow by themselves."""
        os.kill(self.raylet, signal.SIGKILL)


@contextlib.contextmanager
def cluster_of_two(**settings: str) -> Iterator[TwoNodes]:
    """A Ray cluster of a head and a second node, of one CPU each, in processes of their own.

    Args:
        settings: Further variables of its environment.

    """
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RAY_AUTH_MODE": "disabled", **settings}
    with subprocess.Popen(
        [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        words = (line.split() for line in iter(process.stdout.readline, ""))
        found = next((pair for pair in words if len(pair) == 2 and pair[0].rpartition(":")[2].isdecimal()), None)
        assert found, "the cluster didn't start"
        try:
            yield TwoNodes(found[0], int(found[1]))
        finally:
            process.communicate("", timeout=60)


@contextlib.contextmanager
def two_nodes() -> Iterator[str]:
    """As `cluster_of_two`; yields its address alone."""
    with cluster_of_two() as cluster:
        yield cluster.address


@contextlib.contextmanager
def prefect_server(home: Path, *, ui: bool = False, **settings: str) -> Iterator[str]:
    """The server that people run, `prefect server start`, in a process of its own; yields its API's address.

    Args:
        home: Its Prefect home.
        ui: Whether it serves the UI too.
        settings: Further variables of its environment.

    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start_prefect_server(port, home, ui=ui, **settings)
    try:
        yield f"http://127.0.0.1:{port}/api"
    finally:
        server.terminate()
        server.wait(20)


def start_prefect_server(port: int, home: Path, *, ui: bool = False, **settings: str) -> subprocess.Popen[bytes]:
    """Start `prefect server start` on a port and wait until it answers; arguments as `prefect_server`'s."""
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        command if ui else [*command, "--no-ui"],
        env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_UI_API_URL": url, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _Ready(server, url)()
    except BaseException:
        server.kill()
        server.wait()
        raise
    return server
