"""Which errors are tried again: a table first, then real tasks and a real Ray."""

import inspect
import os
import pickle
import signal

import httpx
import pytest
import ray
from prefect import flow, task
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from tasks.engine.cluster import causes, data_context
from tasks.io.errors import BalanceError, ConfigError, GateFailed, SourceError
from tasks.runner import RETRY, final_unless_transient, retry_condition, worth_retrying


def carried(cause: BaseException) -> RayTaskError:
    return RayTaskError("kernel", "traceback", cause, proctitle="ray::kernel", pid=1, ip="127.0.0.1")


def wrapped(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SourceError("no such column"), False),  # the same input gives it again
        (ConfigError("bad field"), False),
        (GateFailed("refused"), False),
        (BalanceError("rows vanished"), False),
        (ValueError("a plain bug"), False),
        (ZeroDivisionError(), False),
        (TaskCancelledError(), False),  # somebody wanted it to stop
        (WorkerCrashedError(), True),
        (NodeDiedError("node gone"), True),
        (OutOfMemoryError("killed for memory"), True),
        (ObjectLostError("ab" * 28, None, ""), True),
        (httpx.ConnectError("the API restarts"), True),
        (carried(ConcurrencySlotAcquisitionError("the API is away")), True),  # as a task starts
        (ConnectionResetError("the store hung up"), True),
        (carried(ConnectionResetError("the store hung up")), True),
        (carried(ValueError("a bug on a worker")), False),  # judged by its cause
        (carried(SourceError("bad file")), False),
        (carried(WorkerCrashedError()), True),
        (carried(ValueError("dual")).as_instanceof_cause(), False),
        (carried(OutOfMemoryError("dual")).as_instanceof_cause(), True),
        (wrapped(RuntimeError("job failed"), WorkerCrashedError()), True),
        (wrapped(SourceError("can't read it"), WorkerCrashedError()), False),  # ours decides, whatever lies below
    ],
    ids=repr,
)
def test_what_is_worth_another_try(error: BaseException, expected: bool) -> None:
    assert worth_retrying(error) is expected


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError(1), RuntimeError(2)
    first.__cause__, second.__cause__ = second, first
    assert not worth_retrying(first)


def test_prefect_accepts_the_condition() -> None:
    assert inspect.isfunction(retry_condition)  # any other callable would silently mean 'never'
    assert pickle.loads(pickle.dumps(retry_condition)) is retry_condition


@pytest.mark.parametrize(
    ("error", "calls", "completed"),
    [(WorkerCrashedError(), 3, True), (SourceError("no such file"), 1, False), (ValueError("bug"), 1, False)],
    ids=repr,
)
def test_a_task_is_tried_again_only_for_transient_errors(
    prefect_api: str, error: Exception, calls: int, completed: bool
) -> None:
    seen = []

    @task(**RETRY)
    def work() -> str:
        seen.append(error)
        if len(seen) < 3:
            raise error
        return "done"

    @flow
    def once() -> str:
        return work()

    assert once(return_state=True).is_completed() is completed
    assert len(seen) == calls


def test_a_flow_tells_of_credentials_that_a_library_met_on_its_own(prefect_api: str) -> None:
    @flow(retries=1)
    def read() -> None:
        with final_unless_transient("take less"):
            raise RuntimeError("the job failed") from carried(
                OSError(
                    "AWS Error UNKNOWN (HTTP status 400) during GetObject operation: Unable to parse ExceptionName: "
                    "ExpiredToken Message: The provided token has expired."
                )
            )

    state = read(return_state=True)
    assert state.is_failed()
    assert "can't use the store: the credentials have expired; renew AWS_ACCESS_KEY_ID" in str(state.message)


def raise_source_error(batch):
    raise SourceError("row 7 has no price")


def kill_worker():
    os.kill(os.getpid(), signal.SIGKILL)


def test_our_own_error_survives_a_ray_data_job(ray_cluster: None) -> None:
    with data_context(), pytest.raises(ray.exceptions.RayError) as caught:
        ray.data.range(4, override_num_blocks=1).map_batches(raise_source_error).materialize()
    assert any(isinstance(link, SourceError) for link in causes(caught.value))
    assert not worth_retrying(caught.value)


def test_a_killed_worker_is_worth_another_try(ray_cluster: None) -> None:
    with pytest.raises(WorkerCrashedError) as caught:
        ray.get(ray.remote(num_cpus=0, max_retries=0)(kill_worker).remote())
    assert worth_retrying(caught.value)
