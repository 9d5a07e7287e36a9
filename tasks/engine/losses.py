"""Messages for Ray jobs that fail for want of memory or disk."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import ray.exceptions

from tasks.engine.cluster import LOST_WORKER_RETRIES
from tasks.io.errors import DiskFull, PipelineError, WorkersKilled, causes


@contextlib.contextmanager
def losses_explained(cure: str) -> Iterator[None]:
    """Turn the end of a Ray job for want of memory or disk into a one-sentence error that isn't retried.

    Ray has tried `LOST_WORKER_RETRIES` times by itself: the cause that killed each worker will kill the next one, too.

    Args:
        cure: User action that reduces a task's memory.

    Raises:
        WorkersKilled: each try of a task lost its worker.
        DiskFull: Ray's object store is full, and so is the disk that it spills to.

    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PipelineError):
            raise
        ours = explained_loss(error, cure, f" at each of its {LOST_WORKER_RETRIES + 1} tries")
        if ours is None:
            raise
        raise ours from error


def explained_loss(error: BaseException, cure: str, often: str = "") -> PipelineError | None:
    """Return the error for a Ray job, or a whole task, that ended for want of memory or disk; None for other errors.

    Args:
        error: Error that Ray raised.
        cure: User action that reduces a task's memory.
        often: Number of tries, such as ' at each of its 4 tries'.

    """
    return next(filter(None, (_explained(link, cure, often) for link in causes(error))), None)


def _explained(error: BaseException, cure: str, often: str) -> PipelineError | None:
    more = f"{cure}, or give each node more memory, or fewer CPUs so that it runs fewer tasks at once"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        found = re.search(r"was ([\d.]+ ?GB / [\d.]+ ?GB)", str(error))
        used = f" ({found[1]} in use)" if found else ""
        return WorkersKilled(
            f"out of memory: Ray killed the worker of a task{often}, as its node had too little memory left{used}. "
            f"To go on: {more}"
        )
    if isinstance(error, (ray.exceptions.WorkerCrashedError, *_ACTOR_LOSSES)):
        return WorkersKilled(
            f"the worker of a task died{often} without a word, as it does when the system kills it for want of memory "
            f"(its kernel's log tells). To go on: {more}. If there was memory enough, Ray's logs say more: the files "
            "python-core-worker-* in /tmp/ray/session_latest/logs of the node"
        )
    if isinstance(error, ray.exceptions.OutOfDiskError):
        return DiskFull(
            "Ray's object store is full, and so is the disk that it spills to (by default that of /tmp). Make room "
            "there, name another directory in RAY_object_spilling_directory, or make the object store larger "
            "(PIPELINE_OBJECT_STORE_BYTES), and start again"
        )
    return None


_ACTOR_LOSSES = (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError)
