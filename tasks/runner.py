"""Task runner for flows on Ray: prefect-ray's with five repairs; and the retry rules of tasks.

Flows write `@flow(task_runner=ray_runner())`. The cluster is chosen when the flow run starts, not when its module is
imported: RAY_ADDRESS, or a local Ray; a Ray that already runs in the process (a notebook, a test, `local_stack`) is
used and left running.

A task writes `@task(**RETRY)`. Transient faults (the store's 5xx and time-outs, a lost Ray worker, node or object, a
worker killed for memory) are retried with growing delays; all other errors fail at once: bad input stays bad.
"""

import concurrent.futures
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TypeVar
from uuid import UUID

import httpx
import ray
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.context import FlowRunContext
from prefect.exceptions import CrashedRun, ObjectNotFound, PrefectException, TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, exception_to_crashed_state
from prefect.tasks import Task, exponential_backoff
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect_ray import RayTaskRunner
from prefect_ray.context import RemoteOptionsContext, remote_options
from prefect_ray.task_runners import PrefectRayFuture
from ray import exceptions as lost

from tasks.artifacts import publish_cluster, show_progress
from tasks.engine.cluster import cluster_address, connect, dashboard_url, explained_loss, nodes
from tasks.io.errors import PipelineError, causes
from tasks.io.location import is_transient, normalise, refusal, refused_credentials, seconds_from_environment
from tasks.store.manifest import RunRecord
from tasks.store.settings import FlowSettings

Config = TypeVar("Config", bound=FlowSettings)

DRAIN_SECONDS = 10.0  # for the logs and events of one task at its end; usually about 0.1
CANCEL_GRACE_SECONDS = 3.0  # a cancelled task may write its last logs before its worker is killed
LISTEN_SECONDS = 0.5  # between two checks for a signal
API_PATIENCE_SECONDS = 300.0  # a server's restart with its migrations takes a minute; PIPELINE_API_PATIENCE_SECONDS
EVENT_DELAY_SECONDS = 2.0  # a task run is in the API only once the worker's first event has arrived


def await_api(patience: float | None = None) -> None:
    """Wait while the API is unreachable, up to `patience` seconds; then the next request raises the error.

    None: PIPELINE_API_PATIENCE_SECONDS, or 300.

    A task that starts asks the API for its concurrency slots, and would fail if the server is just being restarted.
    """
    url = PREFECT_API_URL.value()
    if patience is None:
        patience = seconds_from_environment("PIPELINE_API_PATIENCE_SECONDS", API_PATIENCE_SECONDS, most=86_400)
    give_up = time.monotonic() + patience
    while url:
        try:
            httpx.get(f"{url}/health", timeout=5)
            return
        except httpx.TransportError:
            if time.monotonic() > give_up:
                return
            time.sleep(1)


def ray_runner(task_options: Mapping[str, Any] | None = None) -> "RayJobRunner":
    """Return the task runner of every flow here; `task_options` are Ray's remote options for all the flow's tasks."""
    return RayJobRunner(task_options)


def drain_api_queues(timeout: float = DRAIN_SECONDS) -> None:
    """Send the queued logs and events of this process; one shared registry holds both queues."""
    # Each queue warns 'Still processing items' as soon as it is asked to stop with something in it.
    loggers = [logging.getLogger(name) for name in ("APILogWorker", "EventsWorker")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        APILogWorker.drain_all(timeout=timeout)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class RayJobFuture(PrefectRayFuture[Any]):  # type: ignore[misc]  # prefect_ray is untyped
    """Future of a task run on Ray whose crash also reaches the API."""

    def __init__(self, task_run_id: UUID, wrapped_future: Any, task: Any, flow_run: FlowRun | None) -> None:
        super().__init__(task_run_id=task_run_id, wrapped_future=wrapped_future)
        self._final_state: State[Any] | None = None
        self.task = task
        self.flow_run = flow_run

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task run; a lost worker makes it Crashed, here and in the API."""
        if self._final_state is not None:
            return
        give_up = None if timeout is None else time.monotonic() + timeout
        # Not ray.get: it waits in C++ and swallows what a signal handler raises, so that a cancel is lost.
        outcome = self.wrapped_future.future()
        # Not for ever: a signal that another thread has received doesn't end the main thread's wait.
        while not outcome.done():
            left = LISTEN_SECONDS if give_up is None else min(LISTEN_SECONDS, give_up - time.monotonic())
            if left < 0:
                return
            concurrent.futures.wait([outcome], left)
        try:
            state = outcome.result()
        except Exception as error:  # noqa: BLE001  # whatever Ray raises, the task run ended outside of user code
            state = run_coro_as_sync(exception_to_crashed_state(error))
            self.record(state)
        if isinstance(state, State):
            self._final_state = state

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> Any:
        """Return the task's result.

        Raises:
            TimeoutError: there is no result within `timeout` seconds.
            Exception: the task's exception, or its crash, unless `raise_on_failure` is off.
        """
        self.wait(timeout)
        if self._final_state is None:
            raise TimeoutError(f"Task run {self.task_run_id} did not complete within {timeout} seconds")
        return super().result(timeout=timeout, raise_on_failure=raise_on_failure)

    def done(self) -> bool:
        """Return True if Ray has the task's outcome."""
        return self._final_state is not None or bool(ray.wait([self.wrapped_future], timeout=0)[0])

    def record(self, state: State[Any]) -> None:
        """Write a final state to the API for a task run whose worker can no longer do it.

        A failure to write is printed only: the flow already has the task's real error.
        """
        plain = state.model_copy(update={"data": None})  # the exception itself stays in this process
        try:
            with get_client(sync_client=True) as client:
                if not self._set_state(client, plain):
                    # Killed before its first event, or never started because its input crashed.
                    client.create_task_run(
                        self.task,
                        flow_run_id=self.flow_run.id if self.flow_run else None,
                        dynamic_key=str(self.task_run_id),
                        id=self.task_run_id,
                        name=f"{self.task.name}-{str(self.task_run_id)[:3]}",
                        state=plain,
                    )
        except (httpx.HTTPError, PrefectException) as error:
            print(
                f"Task run {self.task_run_id} is {plain.type.value}, but the API wasn't told: {error}", file=sys.stderr
            )

    def _set_state(self, client: SyncPrefectClient, state: State[Any]) -> bool:
        give_up = time.monotonic() + EVENT_DELAY_SECONDS
        while True:
            try:
                recorded = client.read_task_run(self.task_run_id).state
            except ObjectNotFound:
                if time.monotonic() > give_up:
                    return False
                time.sleep(0.1)
                continue
            # A cancelled worker may still have recorded itself as Crashed (by an interrupt); a result in time stays.
            if recorded is None or not recorded.is_final() or (state.is_cancelled() and recorded.is_crashed()):
                client.set_task_run_state(self.task_run_id, state, force=True)
            return True


class RayJobRunner(RayTaskRunner):  # type: ignore[misc]  # prefect_ray is untyped
    """Variant of RayTaskRunner for tasks that drive Ray Data jobs.

    1. A task holds 0 CPUs. prefect-ray's default of 1 leaves none for the Ray Data job inside it, which then waits
       for ever ("Ray Data hangs inside a task": ray#34042, ray#44687).
    2. `max_retries=0`, and a lost worker is recorded as Crashed. By default Ray runs a killed task again, three
       times, under the same task run and past Prefect's own retries, and its run stays Running in the UI for ever
       ("dead worker leaves a bad state": prefect#15539). Retries are Prefect's: of the task for errors that it
       raises, of the flow for a lost worker.
    3. The log and event queues are drained when a task ends. Otherwise the last two seconds of logs die with the
       worker ("logs of Ray tasks are missing": prefect#14494, prefect#16016).
    4. SIGTERM keeps Prefect's handler, and a flow that stops early cancels its tasks on Ray and records them as
       Cancelled ("cancelled flow run shows as crashed, tasks go on": prefect#12688).
    5. `duplicate()` carries the options: Prefect runs each flow run on a duplicate, and prefect-ray's forgets what
       a subclass adds ("no resources per task": prefect#13010).

    `task_options` are defaults: `with remote_options(...)` around a submit takes precedence.
    """

    DEFAULT_TASK_OPTIONS: Mapping[str, Any] = {"num_cpus": 0, "max_retries": 0}

    def __init__(self, task_options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.task_options = {**self.DEFAULT_TASK_OPTIONS, **(task_options or {})}
        self._futures: list[RayJobFuture] = []
        self._terminal = ExitStack()

    def duplicate(self) -> Self:
        """Return a runner with the same options, for one flow run."""
        return type(self)(self.task_options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RayJobRunner) and self.task_options == other.task_options

    __hash__ = None  # type: ignore[assignment]  # as prefect-ray's: it compares by value and is mutable

    def submit(self, *args: Any, **kwargs: Any) -> RayJobFuture:
        """Start a task on Ray and return its future at once.

        Raises:
            RuntimeError: the runner isn't started; Prefect starts it with the flow run.
        """
        options = {**self.task_options, **RemoteOptionsContext.get().current_remote_options}
        with remote_options(**options):
            submitted = super().submit(*args, **kwargs)
        context = FlowRunContext.get()
        flow_run = context.flow_run if context else None
        task = kwargs["task"] if "task" in kwargs else args[0]
        future = RayJobFuture(submitted.task_run_id, submitted.wrapped_future, task, flow_run)
        if not self._futures and flow_run is not None:
            if cluster_address() is not None:
                publish_cluster(nodes(), dashboard_url())
            self._terminal.enter_context(show_progress(flow_run.id))
        self._futures.append(future)
        return future

    @staticmethod
    def _run_prefect_task(*upstream: Any, **kwargs: Any) -> Any:
        await_api()
        try:
            return RayTaskRunner._run_prefect_task(*upstream, **kwargs)
        finally:
            drain_api_queues()

    def __enter__(self) -> Self:
        # prefect-ray's start reuses a running Ray; it never calls ray.init.
        api = PREFECT_API_URL.value()
        started = connect(env={"PREFECT_API_URL": api} if api else None)
        super().__enter__()
        self._owns_ray = started
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        try:
            self._terminal.close()
            self._settle(exc)
            if isinstance(exc, TerminationSignal | KeyboardInterrupt):
                self._record_stop_by_hand(exc)
        finally:
            super().__exit__(exc_type, exc, traceback)

    def _settle(self, exc: BaseException | None) -> None:
        """Leave no task run in a running state: the finished get their state, the others are cancelled."""
        running = [future for future in self._futures if not future.done()]
        for future in self._futures:
            if future not in running:
                future.wait(DRAIN_SECONDS)  # Ray has the outcome; it reaches the Python future a moment later
        for future in running:
            ray.cancel(future.wrapped_future, recursive=True)
        references = [future.wrapped_future for future in running]
        _, deaf = (
            ray.wait(references, num_returns=len(references), timeout=CANCEL_GRACE_SECONDS) if running else ([], [])
        )
        for reference in deaf:
            ray.cancel(reference, force=True, recursive=True)
        reason = f"{type(exc).__name__} in the flow" if exc else "the flow ended without waiting for it"
        for future in running:
            future.record(Cancelled(message=f"Cancelled on Ray: {reason}."))

    def _record_stop_by_hand(self, exc: BaseException) -> None:
        """Record a flow run that was started and stopped at a terminal as Cancelled; Prefect records it as Crashed.

        A deployed run is left to Prefect, which distinguishes a cancel from a lost machine.
        """
        flow_run = next((future.flow_run for future in self._futures), None)
        if flow_run is None or flow_run.deployment_id is not None:
            return
        state: State[Any] = Cancelled(message=f"Stopped by hand ({type(exc).__name__}).")
        try:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(flow_run.id, state, force=True)
        except (httpx.HTTPError, PrefectException) as error:
            print(f"Flow run {flow_run.id} was stopped, but the API wasn't told: {error}", file=sys.stderr)
            return
        flow_run.state = state  # the engine shares this object and doesn't overwrite a final state


RAY_LOSSES = (
    *(lost.ActorDiedError, lost.ActorUnavailableError, lost.WorkerCrashedError, lost.OutOfMemoryError),
    *(lost.LocalRayletDiedError, lost.NodeDiedError, lost.ObjectLostError),
)
API_LOSSES = (
    ConcurrencySlotAcquisitionError,  # a task that starts while the API is away
    CrashedRun,
    httpx.TransportError,
)


def worth_retrying(error: BaseException) -> bool:
    """Return True if the same call may succeed later.

    An error that Ray carries from a worker is judged by the original error, and a wrapped one by its causes. One of our
    errors anywhere in that chain decides: it was raised on purpose, and the same input gives it again.
    """
    chain = list(causes(error))
    if any(isinstance(link, PipelineError) for link in chain):
        return False
    if any(isinstance(link, (*RAY_LOSSES, *API_LOSSES)) for link in chain):
        return True
    return is_transient(error)


@contextmanager
def final_unless_transient(less_at_once: str) -> Iterator[None]:
    """Allow the flow's retries only for transient errors of its body (Prefect has no condition for a flow's retries).

    A lost worker is transient; bad input and a failed gate end the run at once. Long messages of libraries become a
    sentence: that the store refused the credentials, or that a task's worker was killed for memory.

    Args:
        less_at_once: User action that reduces a task's memory.

    Raises:
        CredentialsRefused: the store refused them to a library that reads directly.
        ResourceError: a task was lost for want of memory or disk.
    """
    try:
        yield
    except Exception as error:
        if not worth_retrying(error):
            with get_client(sync_client=True) as client:
                run = client.read_flow_run(UUID(str(flow_run.id)))
                policy = run.empirical_policy.model_copy(update={"retries": 0})
                client.update_flow_run(run.id, empirical_policy=policy)
        if any(isinstance(link, PipelineError) for link in causes(error)):
            raise
        explained = _told(error, less_at_once)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def running(config: Config) -> Iterator[Config]:
    """Run a flow's steps, whose failures are final unless they are transient; yield its configuration.

    Args:
        config: The flow's parameter; the root of the yielded one is normalised, as other processes get it.
    """
    with final_unless_transient(config.less_at_once):
        yield config.model_copy(update={"root": normalise(config.root)})


def run_record() -> RunRecord:
    """Return the current flow run, for the manifest."""
    return RunRecord(flow_run_id=str(flow_run.id), flow_run_name=flow_run.name, deployment=deployment.name)


def _told(error: BaseException, less_at_once: str) -> PipelineError | None:
    """Return our error for a library's error, if its meaning for the user is known."""
    refused = refused_credentials(error)
    return refusal("the store", refused) if refused else explained_loss(error, less_at_once)


def retry_condition(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Decide on a retry for Prefect, which (3.8) takes a callable that isn't a plain function for 'never'."""
    error = state.data
    return isinstance(error, BaseException) and worth_retrying(error)


RETRY: dict[str, Any] = {
    "retries": 3,
    # 2, 4 and 8 s: the sleep holds the worker's process but, with num_cpus=0, no CPU of the cluster.
    "retry_delay_seconds": exponential_backoff(seconds_from_environment("PIPELINE_RETRY_DELAY_SECONDS", 2, most=600)),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": retry_condition,
}
