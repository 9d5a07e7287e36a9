"""Connection to Ray, local or remote: its settings, its spilled objects, and messages for lost workers.

Spilled objects: Ray deletes them when it ends in order. After a kill -9 of the process that started it they remain,
sometimes gigabytes, in a directory that no later Ray reads.

The address comes from RAY_ADDRESS on purpose: with no address at all, `ray.init` joins whatever cluster happens to
run on the host. Without RAY_ADDRESS the pipelines start their own Ray and stop it afterwards.

Worker environment. A local Ray inherits the environment of the process that starts it, so AWS_* credentials reach its
workers by themselves, and the few variables that workers need are set only while `ray.init` runs. (A runtime_env would
do the same, but every worker then waits for the runtime-env agent: the first task took 1.1 s instead of 0.4 s.) A
remote cluster gets them by runtime_env, without any credential: a runtime_env is shown in the dashboard and written to
logs. There, give the nodes a role or their own environment.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.exceptions
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private.node import Node
from ray.experimental.internal_kv import _internal_kv_get

from tasks.io.errors import ConfigError, DiskFull, PipelineError, WorkersKilled, causes
from tasks.io.memory import collect_seldom

OLDER_THAN = 120.0
"""Seconds. A Ray that is starting has no socket yet."""


def delete_left_over(sessions: Path) -> int:
    """Delete the spilled objects of Rays that are dead.

    Args:
        sessions: The directory of all Ray sessions of this machine.

    Returns:
        Number of deleted directories.
    """
    deleted = 0
    for place in sessions.glob("session_*/ray_spilled_objects_*"):
        session = place.parent
        if session.is_symlink() or _is_young(session) or _answers(session):
            continue
        shutil.rmtree(place, ignore_errors=True)  # another process may be deleting it, or it belongs to another user
        deleted += not place.exists()
    return deleted


def _is_young(session: Path) -> bool:
    try:
        return time.time() - session.stat().st_mtime < OLDER_THAN
    except FileNotFoundError:
        return True


def _answers(session: Path) -> bool:
    """Return True if a node of the session answers, or if that is unknown."""
    for path in (session / "sockets").glob("raylet*"):
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                continue
            except OSError:
                return True
            return True
    return False


NAMESPACE = "training-data"

# The reservation sets a share of the CPUs aside for each operator of a Ray Data plan. A fused plan has two or three, so
# that on a few CPUs about one task runs at a time (16 tasks of 0.15 s on 2 CPUs: 2.75 s with it, 1.36 s without). It is
# also the memory back-pressure between operators: from this size on it costs little, so it is left on.
RESERVATION_FROM_CPUS = 8

LOST_WORKER_RETRIES = 3
"""Times that Ray runs a task again after its worker died; bounded, as a task may kill each of its workers."""

# Ray counts workers killed for memory apart, by default without end. The caller's setting takes precedence.
_OOM_RETRIES = "RAY_task_oom_retries"

_WORKER_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # their tokens would land in the task's log
    "POLARS_MAX_THREADS": "1",  # a worker holds one CPU; a thread pool per worker would fight over the same cores
    "RAY_USAGE_STATS_ENABLED": "0",
    # As `worker_process_setup_hook` of a runtime_env, which a local Ray doesn't get.
    ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.prepare_worker",
}
_PASSED_ON = ("PREFECT_API_URL", "PIPELINE_API_PATIENCE_SECONDS", "PIPELINE_NODE_PATIENCE_SECONDS")
_SECRET_MARKS = ("KEY", "SECRET", "TOKEN", "PASSWORD", "AUTH")


def cluster_address() -> str | None:
    """Return RAY_ADDRESS, or None if it is unset or empty: then the pipelines start a local Ray."""
    return os.environ.get("RAY_ADDRESS", "").strip() or None


def worker_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that every Ray worker needs; some are passed on if the driver has them.

    Raises:
        ConfigError: `extra` names a credential, which would be readable in the dashboard of a remote cluster.
    """
    passed_on = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    for name in extra or {}:
        if any(mark in name.upper() for mark in _SECRET_MARKS):
            raise ConfigError(
                f"{name} looks like a credential and can't be sent to Ray workers by runtime_env, which anybody "
                "sees in Ray's dashboard; set it in the environment of the nodes instead"
            )
    return {**_WORKER_ENV, **_retries_for_memory(), **passed_on, **(extra or {})}


def prepare_worker() -> None:
    """Make this worker import quickly, and end when it is interrupted while it imports a module.

    Ray interrupts the running tasks of a plan that fails or isn't read to its end, and gives their workers the next
    tasks. Python removes a module whose import failed and keeps the submodules that were imported by then: some
    packages can't be imported again after that (numba: "partially initialized module"), also by a retry.
    """

    def interrupted(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                raise SystemExit("interrupted while it imported a module")
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    collect_seldom()


def _retries_for_memory() -> dict[str, str]:
    return {_OOM_RETRIES: os.environ.get(_OOM_RETRIES, str(LOST_WORKER_RETRIES))}


def init_options(
    *, num_cpus: int | None = None, object_store_memory: int | None = None, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the arguments for `ray.init`, for the cluster that `cluster_address` names.

    `num_cpus` and `object_store_memory` (bytes; PIPELINE_OBJECT_STORE_BYTES if not given) size a local Ray only: a
    remote cluster has its own. Prefer `connect`, which also gives a local Ray's workers their environment.

    Raises:
        ConfigError: PIPELINE_OBJECT_STORE_BYTES isn't a whole number, or `env` names a credential.
    """
    options: dict[str, Any] = {"namespace": NAMESPACE}
    if (address := cluster_address()) is not None:
        return {
            **options,
            "address": address,
            "logging_level": logging.WARNING,
            "runtime_env": {"env_vars": worker_env(env)},
        }
    options |= {"address": "local", "include_dashboard": False, "logging_level": logging.ERROR}
    if num_cpus is not None:
        options["num_cpus"] = num_cpus
    if (memory := object_store_memory or _object_store_bytes()) is not None:
        options["object_store_memory"] = memory
    return options


def connect(
    *, num_cpus: int | None = None, object_store_memory: int | None = None, env: Mapping[str, str] | None = None
) -> bool:
    """Join the cluster or start a local Ray; return True if this call did it, False if the process already had one.

    The caller that gets True calls `ray.shutdown()`. The process's SIGTERM handler is kept: Ray's exits at once, so
    that a cancelled flow run would be recorded as crashed. A stop waits until a local Ray has started, and ends it.

    Raises:
        ConfigError: the cluster runs another version of Ray or Python, or a setting is wrong.
        ConnectionError: no cluster answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return False
    options = init_options(num_cpus=num_cpus, object_store_memory=object_store_memory, env=env)
    local = options["address"] == "local"
    if local:
        delete_left_over(Path(get_default_ray_temp_dir()))  # type: ignore[no-untyped-call]
    try:
        with (
            held() if local else contextlib.nullcontext(),
            replaced_attributes([(ray._private.utils, "set_sigterm_handler", lambda _: None)]),
            environment(worker_env(env) if local else _retries_for_memory()),
            explained_versions(options["address"]),
            _bare_services() if local else contextlib.nullcontext(),
        ):
            _plain_worker_output(local)
            try:
                ray.init(**options)
            except ConnectionError as error:
                raise ConnectionError(
                    f"no Ray cluster answers at RAY_ADDRESS={options['address']!r}: {error}; start it, correct the "
                    "address, or unset RAY_ADDRESS to run on a local Ray"
                ) from error
    except BaseException:  # also a stop
        ray.shutdown()
        raise
    return True


@contextlib.contextmanager
def _bare_services() -> Generator[None]:
    """Start a Ray without processes that serve nobody on one machine without a dashboard.

    `include_dashboard=False` still starts its web server, and the node's agent imports all that it might show. The
    monitor would ask a cloud for nodes. Ray 2.60, which pyproject.toml pins, has no settings for them. `ray.init` waits
    for the first two: without them it takes two thirds of the time, and 4 s less of CPU.
    """
    not_installed = ImportError("a local Ray has no dashboard")
    replaced: list[tuple[Any, str, Any]] = [
        (Node, "start_api_server", lambda node, **_: setattr(node, "_webui_url", "")),
        (Node, "start_monitor", lambda _: None),
        (ray._private.utils, "get_dashboard_dependency_error", lambda: not_installed),
    ]
    with replaced_attributes(replaced):
        yield


@contextlib.contextmanager
def replaced_attributes(replaced: Sequence[tuple[Any, str, Any]]) -> Generator[None]:
    """Give some objects other attributes, each as (object, name, value), and restore them afterwards."""
    before = [(holder, name, inspect.getattr_static(holder, name)) for holder, name, _ in replaced]
    for holder, name, value in replaced:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _plain_worker_output(local: bool) -> None:
    """Print workers' output to this process's console, without colour codes if that is a file or a pipe.

    On a local Ray omit '(name pid=…)' before each line, too: a log line names its task run itself. (Ray reads its
    variable for that when it is imported, which is too early for us.)
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if local and "RAY_DISABLE_WORKER_LOG_PREFIX" not in os.environ:
        ray_constants.RAY_DISABLE_WORKER_LOG_PREFIX = True


def cluster_cpus() -> int:
    """Return the CPUs of the whole connected cluster, at least 1."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1)))


def dashboard_url() -> str | None:
    """Return the web address of the cluster's dashboard, or None if it has none."""
    node = ray._private.worker._global_node
    found = getattr(node, "webui_url", None) if node is not None else None
    return f"http://{found}" if found and not found.startswith("http") else found or None


def nodes() -> list[dict[str, Any]]:
    """Return the cluster's nodes with their CPUs, GPUs, memory and object store (GiB)."""
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        resources = node["Resources"]
        found.append(
            {
                "node": node["NodeManagerAddress"],
                "alive": node["Alive"],
                "CPUs": resources.get("CPU", 0),
                "GPUs": resources.get("GPU", 0),
                "memory GiB": round(resources.get("memory", 0) / 2**30, 1),
                "object store GiB": round(resources.get("object_store_memory", 0) / 2**30, 1),
            }
        )
    return sorted(found, key=lambda node: (not node["alive"], str(node["node"])))


@contextlib.contextmanager
def data_context(cpus: int | None = None, **more: Any) -> Iterator[Any]:
    """Set Ray Data's settings for one job and restore them afterwards; yield the DataContext.

    A Dataset copies the context when it is created, so create it inside.

    Args:
        cpus: The cluster's size, if it is known.
        more: Further settings, by their names in the DataContext.
    """
    from ray._private.log import PlainRayHandler
    from ray.data import DataContext  # 1.6 s to import: only jobs pay for it
    from ray.util.debug import log_once

    _share_workers()
    context = DataContext.get_current()
    settings = {
        "op_resource_reservation_enabled": (cpus or cluster_cpus()) >= RESERVATION_FROM_CPUS,
        "enable_progress_bars": sys.stderr.isatty(),
        # Otherwise a map function's error arrives as UserCodeException with its cause only as text: a transient fault
        # of the store couldn't be told from bad input.
        "raise_original_map_exception": True,
        **more,
    }
    before = {name: getattr(context, name) for name in settings}
    # Each job announces its start, plan and end on the console; Ray's log file keeps them.
    consoles = [handler for handler in logging.getLogger("ray.data").handlers if isinstance(handler, PlainRayHandler)]
    levels = [handler.level for handler in consoles]
    for name, value in settings.items():
        setattr(context, name, value)
    for handler in consoles:
        handler.setLevel(logging.WARNING)
    # Mark two warnings of each worker as logged: that bars are off, and that the job will hang if no CPU is free, which
    # happens for a moment between two jobs.
    for warning in ("ray_data_progress_manager_disabled", "cpu_warning"):
        log_once(warning)
    try:
        with warnings.catch_warnings(), replaced_attributes([] if has_web_server() else _without_actors()):
            # No other argument sets `max_retries` of a job's tasks; Ray Data's default is to retry for ever.
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            yield context
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


def _share_workers() -> None:
    """Let all steps of a plan run in the same workers.

    Ray Data runs the two halves of a shuffle under runtime_envs of their own, and Ray shares no worker between
    different ones: on few CPUs each step would end the workers of the last one and start its own, some seconds every
    time (a shuffle of 8 rows: 4.9 s, with shared workers 0.2 s). The cost: memory that one step maps counts in the
    other's resident size, too.
    """
    from ray.data._internal.execution.operators import hash_shuffle_v2
    from ray.data._internal.execution.operators.shuffle_operators import shuffle_reduce_operator

    # Both are read for each plan. Ray 2.60, which pyproject.toml pins, has no setting for it.
    hash_shuffle_v2._SHUFFLE_MAP_RUNTIME_ENV.clear()
    shuffle_reduce_operator._SHUFFLE_REDUCE_RUNTIME_ENV.clear()


def has_web_server() -> bool:
    """Return True if the connected cluster has Ray's web server; all have but those that `connect` has started."""
    found = _internal_kv_get(ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD)
    return found is not None


def _without_actors() -> list[tuple[Any, str, Any]]:
    """Return replacements for Ray Data's two actors on a local Ray: figures for a dashboard, and the wish for nodes.

    A job would wait until the processes of both have started, one after the other; Ray 2.60 has no setting for it.
    """
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.interfaces import ExecutionResources
    from ray.data._internal.stats import _StatsManager

    class OneMachine(ClusterAutoscaler):
        def try_trigger_scaling(self) -> None:
            pass

        def on_executor_shutdown(self) -> None:
            pass

        def get_total_resources(self) -> ExecutionResources:
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            total: ExecutionResources = ExecutionResources.from_resource_dict(resources)
            return total

    figures = ("register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics")
    return [
        (streaming_executor, "create_cluster_autoscaler", lambda *_, **__: OneMachine()),
        (_StatsManager, "gen_dataset_id_from_stats_actor", staticmethod(lambda: uuid.uuid4().hex)),
        *((_StatsManager, name, staticmethod(lambda *_, **__: None)) for name in figures),
    ]


@contextlib.contextmanager
def explained_versions(address: str) -> Generator[None]:
    """Turn Ray's refusal of another Ray or Python version into a ConfigError with the cure.

    Raises:
        ConfigError: driver and cluster at `address` don't run the same versions.
    """
    try:
        yield
    except RuntimeError as error:
        if "version mismatch" not in str(error).lower():
            raise
        python = ".".join(map(str, sys.version_info[:3]))
        raise ConfigError(
            f"the Ray cluster at {address!r} runs other versions than this process (Ray {ray.__version__}, Python "
            f"{python}): {error}\nRun both from the same image, or install the cluster's versions here"
        ) from error


def _object_store_bytes() -> int | None:
    text = os.environ.get("PIPELINE_OBJECT_STORE_BYTES", "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(
            f"PIPELINE_OBJECT_STORE_BYTES must be a whole number of bytes, like 2000000000; it is {text!r}"
        )
    return int(text)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Generator[None]:
    """Set variables of this process's environment, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def held() -> Generator[None]:
    """Delay a stop until the block has ended, for work that must not be half done.

    A second stop takes effect at once. Outside the main thread, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        waiting.append(number)
        if len(waiting) > 1:
            restore()
            for received in waiting:  # each in turn, as this block may be nested in another held one
                signal.raise_signal(received)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
        if len(waiting) == 1:
            signal.raise_signal(waiting[0])


@contextlib.contextmanager
def handler_kept(number: int) -> Generator[None]:
    """Restore the process's handler of a signal afterwards: Ray replaces some and doesn't restore them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(number, handler)


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
