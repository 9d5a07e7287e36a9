"""Retry rules of tasks.

A task writes `@task(**RETRY)`. Transient faults (the store's 5xx and time-outs, a lost Ray worker, node or object, a
worker killed for memory) are retried with growing delays; all other errors fail at once: bad input stays bad.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import CrashedRun
from prefect.runtime import flow_run
from prefect.tasks import Task, exponential_backoff
from ray import exceptions as lost

from tasks.engine.cluster import explained_loss
from tasks.io.errors import PipelineError, causes
from tasks.io.faults import is_transient, refusal, refused_credentials
from tasks.store.settings import seconds_from_environment

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
        told = _told(error, less_at_once)
        if told is None:
            raise
        raise told from error


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
