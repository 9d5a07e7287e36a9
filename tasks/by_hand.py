"""Manual runs of a flow, `python -m flows.feature_store`: arguments, a Prefect API and a Ray, and the exit code.

Exit codes: 0 published, 1 the run failed (one sentence on stderr, the traceback with --debug), 2 wrong arguments
(option, value and cure on stderr), 130 interrupted by Ctrl-C, 143 by SIGTERM; both report the versions published
before.

The flows start this before they import anything else: help, errors and Ctrl-C needn't wait for libraries.

Without an API address Prefect starts one embedded server for the flow's process, and each Ray worker starts another on
the same SQLite file. `local_api` starts one, in a separate process, for all of them; with a configured PREFECT_API_URL
it starts none. The history stays in Prefect's home directory, so `prefect server start` shows it later. Run as a module
(`python -m tasks.by_hand FD`) this is that server's process.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

from tasks.io.errors import FAILED, WRONG_ARGUMENTS, ConfigError, InputError, PipelineError, causes
from tasks.io.memory import collect_seldom

STOPS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM

START_SECONDS = 120.0  # a first start also migrates a new database: 10 s on an idle machine
STOP_SECONDS = 10.0
HURRIED_SECONDS = 3.0
GARBAGE_SECONDS, GARBAGE_OBJECTS, GARBAGE_ROUNDS = 5.0, 10_000, 12
GRACE_SECONDS = 9.0  # ending a run takes 2 to 5 s: it cancels its tasks, informs the API, stops Ray and the API
LAST_WORDS_SECONDS = 2.0

_TOLD_ONCE = ("Encountered exception during execution",)
_STATE_DETAILS = re.compile(r"(Finished in state \w+)\(.*\)", re.DOTALL)


def run_by_hand(entry: str, config: str, argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the flow on a local API and Ray (or those of the environment), print the result.

    A first argument that isn't an option is a command about the store (`commands`), not a run.

    Args:
        entry: The flow as 'module:name'. It is imported only once the arguments are right, which takes seconds.
        config: The flow's configuration model, likewise.
        argv: Arguments; those of the process if None.

    Returns:
        The exit code.
    """
    collect_seldom()
    argv = sys.argv[1:] if argv is None else argv
    earlier = len(_commits())

    def ending(number: int) -> str:
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        return f"{word}: {_published(earlier)}"

    with stops_unwind(lambda: ending(stopped[0])) as stopped:
        try:
            return _run(entry, config, argv, earlier, stopped)
        except BaseException as fault:
            if not stopped and not isinstance(fault, KeyboardInterrupt):
                raise
        # On a line of its own, whatever Prefect and Ray have turned the exception into: a progress bar may be
        # unfinished.
        number = stopped[0] if stopped else signal.SIGINT
        print(f"\n{ending(number)}", file=sys.stderr)
        return 128 + number


def _run(entry: str, config: str, argv: Sequence[str], earlier: int, stopped: Sequence[int]) -> int:
    module, name = entry.split(":")
    if argv and not argv[0].startswith("-"):
        from tasks.cli import commands

        return commands.run(argv, f"python -m {module}")
    from tasks.cli.command_line import parse_arguments
    from tasks.io.storage import check_root

    holder, model = config.split(":")
    try:
        config_type = getattr(importlib.import_module(holder), model)
        settings, debug = parse_arguments(config_type, argv, prog=f"python -m {module}")
        check_root(settings.root)
    except InputError as fault:
        print(f"error: {one_sentence(fault)}", file=sys.stderr)
        return WRONG_ARGUMENTS
    except PipelineError as fault:
        print(f"error: {one_sentence(fault)}", file=sys.stderr)
        return FAILED
    started = time.monotonic()
    try:
        with _quiet_failures(debug), local_stack():
            from prefect import tags

            flow = getattr(importlib.import_module(module), name)
            with tags(flow.name, "by hand"):
                result = flow(settings)
    except Exception as fault:
        if debug or stopped:
            raise
        published = f"; before that, {_published(earlier)}" if len(_commits()) > earlier else ""
        # On a line of its own: Prefect ends some of its messages without a line break.
        print(f"\nfailed: {one_sentence(fault)}{published}", file=sys.stderr)
        return WRONG_ARGUMENTS if isinstance(_own(fault), ConfigError) else FAILED
    print(summary(result))
    print(f"finished in {time.monotonic() - started:.0f} s")
    return 0


def _commits() -> Sequence[Any]:
    """Return the versions that this process has begun to commit; none before the module that does it is imported."""
    publication = sys.modules.get("tasks.publication")
    return getattr(publication, "COMMITTING", ())


def _published(earlier: int) -> str:
    """Describe which of this run's versions readers see, by the store."""
    names = []
    for judged in _commits()[earlier:]:
        manifest = judged.manifest
        name = str(manifest)
        try:
            from tasks.publication import is_published

            if is_published(judged):
                names.append(name)
        except Exception as fault:  # noqa: BLE001 - the store itself may have failed
            names.append(f"perhaps {name} (the store doesn't say: {one_sentence(fault)})")
    verb = "was" if len(names) == 1 else "were"
    return f"{' and '.join(names)} {verb} published, nothing else" if names else "nothing was published"


def one_sentence(fault: BaseException) -> str:
    """Return a failure as one sentence: our error if one is among the causes, else the last line of the fault."""
    ours = _own(fault)
    if ours is None and (lost := _lost_api(fault)) is not None:
        url = os.environ.get("PREFECT_API_URL", "its address")
        return f"the Prefect API at {url} can't be reached ({type(lost).__name__}); start it again, then run this again"
    text = str(ours if ours is not None else fault).strip() or type(fault).__name__
    notes = getattr(ours, "__notes__", ())
    last = text.splitlines()[-1] if ours is None else " ".join(text.split())
    kind = "" if ours is not None else f"{type(fault).__name__}: "
    return f"{kind}{last}" + "".join(f" ({note})" for note in notes)


def summary(result: Sequence[Any]) -> str:
    """Describe the published versions for a person: location, verdict, rows, balances and report."""
    lines = []
    for version in result:
        lines.append(f"{version.dataset} v{version.version}: {version.rows:,} rows, verdict {version.verdict}")
        lines.append(f"  data     {version.uri}")
        lines.append(f"  report   {version.report}")
        for balance in version.balances:
            parts = [f"{balance.rows_in:,} in", f"{balance.rows_out:,} out"]
            for word, counts in (("rejected", balance.rejected), ("filtered", balance.filtered)):
                if counts:
                    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
                    parts.append(f"{sum(counts.values()):,} {word} ({reasons})")
            if balance.deduplicated:
                parts.append(f"{balance.deduplicated:,} deduplicated")
            lines.append(f"  balance  {balance.name}: {', '.join(parts)}")
        lines += [f"  {word:8s} {text}" for word, text in version.notes]
    return "\n".join(lines)


def _own(fault: BaseException | None) -> PipelineError | None:
    """Return the first of our errors in a chain of causes."""
    for link in causes(fault, contexts=True):
        for error in (getattr(link, "cause", None), link):  # Ray's error is also of its class, but has a traceback
            if isinstance(error, PipelineError):
                return error
    return None


def _lost_api(fault: BaseException | None) -> BaseException | None:
    """Return the first connection error to Prefect's API, which only Prefect's client raises."""
    names = {"TransportError", "ConcurrencySlotAcquisitionError"}
    return next(
        (link for link in causes(fault, contexts=True) if names & {kind.__name__ for kind in type(link).__mro__}), None
    )


@contextmanager
def _quiet_failures(debug: bool) -> Iterator[None]:
    """Without --debug, keep text that the one sentence repeats off the console; the API gets all of it."""
    if debug:
        yield
        return
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    import prefect.main  # noqa: F401 - sets logging up: before, there is no console to put a filter on
    from prefect.settings import PREFECT_API_URL

    # The page of an embedded server no longer exists when somebody opens it.
    left_out = _TOLD_ONCE if PREFECT_API_URL.value() else (*_TOLD_ONCE, "View at ")

    def for_a_person(record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        message = record.getMessage()
        record.msg, record.args = _STATE_DETAILS.sub(r"\1", message), ()
        return not message.startswith(left_out)

    # On the handlers, not the loggers: those also feed the API. The API's handler comes first, so it gets every record.
    consoles = logging.getLogger().handlers[:]
    for console in consoles:
        console.addFilter(for_a_person)
    try:
        yield
    finally:
        for console in consoles:
            console.removeFilter(for_a_person)


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
def _server() -> Generator[tuple[str, _Ready]]:
    from prefect.settings import PREFECT_API_URL, get_current_settings

    if configured := PREFECT_API_URL.value():
        yield configured, _Ready(None, configured)
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # The child inherits the listening socket: the port is reserved from now on, and no other process can take it
        # between choosing and binding.
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.by_hand", str(listener.fileno())],
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

    def __init__(self, process: subprocess.Popen[bytes] | None, url: str) -> None:
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


def _stop(process: subprocess.Popen[bytes], patience: float) -> None:
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
    gc.disable()  # imports take a tenth less time; see also `_collect_garbage_in_a_thread`
    import uvicorn
    from prefect.server.api.server import create_app

    _let_requests_for_slots_wait()
    app = create_app(ephemeral=True, final=True)
    _collect_garbage_in_a_thread(GARBAGE_SECONDS)
    config = uvicorn.Config(app, log_level="error", lifespan="on", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def _let_requests_for_slots_wait() -> None:
    """Make requests for slots of tags wait for the database's lock; each task with tags makes one as it starts.

    Prefect's handler is replaced in this process. These requests read before they write. If another request has
    written in between, SQLite refuses that at once, Prefect 3.8 answers 503, and its client tries again after 2 s. A
    transaction whose first statement writes, if only nothing, waits for its turn.
    """
    from prefect.server.api import concurrency_limits_v2
    from sqlalchemy import text

    api: Any = concurrency_limits_v2
    acquire = api._acquire_concurrency_slots

    async def acquire_in_turn(session: Any, **request: Any) -> Any:
        await session.execute(text("DELETE FROM concurrency_limit_v2 WHERE 0"))
        return await acquire(session=session, **request)

    api._acquire_concurrency_slots = acquire_in_turn


def _collect_garbage_in_a_thread(seconds: float) -> None:
    """Collect this process's cyclic garbage in a thread of its own from now on, once in some seconds.

    A failed SQL statement leaves a cursor in its error's traceback. Freed by a collection in the event loop's thread,
    the cursor waits for its connection, which waits up to 60 s for the database's lock, whose holder waits for the
    event loop: all requests hang (aiosqlite 0.22, Prefect 3.8). In another thread only that thread waits. A collection
    takes some 100 ms, which an idle server needn't spend each time.
    """

    def collect() -> None:
        while True:
            for _ in range(GARBAGE_ROUNDS):
                time.sleep(seconds)
                if gc.get_count()[0] > GARBAGE_OBJECTS:
                    break
            gc.collect()

    gc.disable()
    gc.freeze()  # what has been imported is never garbage
    threading.Thread(target=collect, name="garbage", daemon=True).start()


@contextmanager
def stops_unwind(last_words: Callable[[], str], grace: float = GRACE_SECONDS) -> Generator[list[int]]:
    """End the process within some seconds of a stop, after its `finally` blocks have stopped what was started.

    The first SIGINT raises `KeyboardInterrupt`, the first SIGTERM `SystemExit` with TERMINATED. A second stop, or one
    that isn't done after `grace` seconds, ends the process at once; its own Ray and API follow.

    Args:
        last_words: Text for stderr in that case.
        grace: Seconds.

    Yields:
        Signals received so far, whatever libraries have made of the exception.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def leave(number: int) -> None:
        _timer(LAST_WORDS_SECONDS, os._exit, 128 + number)
        try:
            print(f"\n{last_words()}; what was started ends by itself", file=sys.stderr, flush=True)
        finally:
            os._exit(128 + number)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stopped.append(number)
        if len(stopped) > 1:
            leave(number)
        watch.append(_timer(grace, leave, number))
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)

    watch: list[threading.Timer] = []
    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield stopped
    finally:
        for timer in watch:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _timer(seconds: float, function: Callable[[int], object], number: int) -> threading.Timer:
    timer = threading.Timer(seconds, function, [number])
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
