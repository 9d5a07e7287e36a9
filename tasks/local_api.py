"""Local stack for `python -m flows.x` on one machine: a Prefect API and a Ray, started together.

Without an API address Prefect starts one embedded server for the flow's process, and each Ray worker starts another on
the same SQLite file. `local_api` starts one, in a separate process, for all of them; with a configured PREFECT_API_URL
it starts none. The history stays in Prefect's home directory, so `prefect server start` shows it later.

Run as a module (`python -m tasks.local_api FD`) it is that server's process.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

from tasks.io.errors import PipelineError

START_SECONDS = 120.0  # a first start also migrates a new database: 10 s on an idle machine
STOP_SECONDS = 10.0
HURRIED_SECONDS = 3.0
GARBAGE_SECONDS = 5.0


@contextmanager
def local_stack(num_cpus: int | None = None) -> Generator[str]:
    """Start a Prefect API and a Ray for flows run by hand; yield the API's address.

    The server's process starts first and comes up while Ray does. At the end, also after an error, Ctrl-C or SIGTERM,
    both are stopped; a Ray or an API that ran before is left alone. `num_cpus` sizes a local Ray.

    Raises:
        SystemExit: a flow run was cancelled, or the process got SIGTERM.
        PipelineError: the API server doesn't come up.
        ConfigError: the Ray cluster runs other versions, or a setting is wrong.
        ConnectionError: no cluster answers at RAY_ADDRESS.
    """
    with _sigterm_as_exit(), _one_line_for_a_stop(), _server() as (url, ready):
        import ray

        from tasks.engine.cluster import connect

        with _client_settings(url), ExitStack() as stack:
            if connect(num_cpus=num_cpus, env={"PREFECT_API_URL": url}):
                stack.callback(ray.shutdown)
            ready()
            yield url


@contextmanager
def local_api() -> Generator[str]:
    """Start one Prefect API for this process and the Ray workers that it starts; yield its address.

    Raises:
        PipelineError: the API server doesn't come up.
    """
    with _server() as (url, ready):
        ready()
        with _client_settings(url):
            yield url


@contextmanager
def _server() -> Generator[tuple[str, "_Ready"]]:
    from prefect.settings import PREFECT_API_URL, get_current_settings

    if configured := PREFECT_API_URL.value():
        yield configured, _Ready(None, configured)
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # The child inherits the listening socket: the port is reserved from now on, and no other process can take it
        # between choosing and binding.
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.local_api", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends: see _serve
            start_new_session=True,  # Ctrl-C is for the flow; the server must live until its end is reported
            env={
                **os.environ,
                **get_current_settings().to_environment_variables(exclude_unset=True),
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_SERVER_UI_ENABLED": "false",
                "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
                "DO_NOT_TRACK": "1",
            },
        )
    patience = STOP_SECONDS
    try:
        yield url, _Ready(process, url)
    except (KeyboardInterrupt, SystemExit):
        patience = HURRIED_SECONDS  # somebody waits; and a server that is still starting doesn't listen yet
        raise
    finally:
        _stop(process, patience)


class _Ready:
    """Wait until the server answers."""

    def __init__(self, process: "subprocess.Popen[bytes] | None", url: str) -> None:
        self.process = process
        self.url = url

    def __call__(self) -> None:
        if self.process is None:
            return
        import httpx

        give_up = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < give_up:
            try:
                # The socket listens before the server reads from it, so one request waits instead of many failing.
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        code = self.process.poll()
        state = f"ended with code {code}" if code is not None else f"didn't answer within {START_SECONDS:.0f} s"
        raise PipelineError(
            f"the embedded Prefect server at {self.url} {state}; its messages are above. Start one yourself with "
            "`prefect server start` and set PREFECT_API_URL, or move a damaged database away from PREFECT_HOME"
        )


@contextmanager
def _client_settings(url: str) -> Generator[None]:
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from tasks.runner import drain_api_queues

    before = os.environ.get("PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = url  # for the Ray workers, which inherit it
    try:
        # A flow's end waits about 1 s for the heartbeat's thread; heartbeats are for supervised runs.
        with temporary_settings({PREFECT_API_URL: url}, set_defaults={PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        drain_api_queues()  # before the server stops: at exit Prefect would try a dead API for a minute
        if before is None:
            del os.environ["PREFECT_API_URL"]
        else:
            os.environ["PREFECT_API_URL"] = before


@contextmanager
def _one_line_for_a_stop() -> Generator[None]:
    """Print one line and exit with code 1 instead of Prefect's traceback: the user who stopped the flow knows why."""
    from prefect.exceptions import CancelledRun

    try:
        yield
    except CancelledRun as error:
        raise SystemExit(str(error)) from None


@contextmanager
def _sigterm_as_exit() -> Generator[None]:
    """Let SIGTERM unwind the stack, so that the `finally` blocks stop what was started; the default just dies."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: "subprocess.Popen[bytes]", patience: float) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(listener: socket.socket) -> None:
    """Serve Prefect's API on a listening socket until SIGTERM, or until the parent's end of stdin closes."""

    def follow_parent() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os._exit(1)  # it was still starting, and didn't react

    threading.Thread(target=follow_parent, daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    _collect_garbage_in_a_thread(GARBAGE_SECONDS)
    config = uvicorn.Config(app, log_level="error", lifespan="on", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def _collect_garbage_in_a_thread(seconds: float) -> None:
    """Collect this process's cyclic garbage in a thread of its own from now on, once in some seconds.

    A failed SQL statement leaves a cursor in its error's traceback. Freed by a collection in the event loop's thread,
    the cursor waits for its connection, which waits up to 60 s for the database's lock, whose holder waits for the
    event loop: all requests hang (aiosqlite 0.22, Prefect 3.8). In another thread only that thread waits.
    """

    def collect() -> None:
        while True:
            time.sleep(seconds)
            gc.collect()

    gc.disable()
    gc.freeze()  # what has been imported is never garbage
    threading.Thread(target=collect, name="garbage", daemon=True).start()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
