"""Training through Ray Train: workers that share one stream, checkpoints, and restarts.

If a worker dies, the others stop too; all restart from the last checkpoint, which holds the stream's place beside the
model. So each sample counts once an epoch, whatever failed, and with any number of workers after the restart.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ray
import ray.train
import torch

from tasks.delivery.config import TrainingConfig
from tasks.engine.cluster import connect, environment, handler_kept, has_web_server
from tasks.io import storage
from tasks.io.errors import ConfigError, PipelineError
from tasks.loader.version_files import Version, open_version
from tasks.store import layout
from tasks.store.settings import load_object
from tasks.training.loops import Send, State, TrainingRun, open_run
from tasks.training.monitoring import TrainingResult, WorkerEpoch

DEFAULT_FUNCTION = "tasks.training.loops:train"
STATE = "state.pt"
RECORDS = "records"
MIX = "mix.json"
CHECKPOINTS_KEPT = 2

_LOG = logging.getLogger(__name__)

# Interval at which the controller polls its workers. Within it a report waits for the previous one, and a death isn't
# noticed; Ray's default is 2 s, too long for short epochs. A poll costs one small call of each worker.
_ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
# One machine can't lose a node, and the watcher for lost nodes logs an error. Its workers may be polled more often: the
# epochs of a small training take less than the interval.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}


def train_version(uri: str, config: TrainingConfig, storage_path: str, run_name: str) -> TrainingResult:
    """Train on a streaming-ready version in `config.workers` workers; resume the same run if it was stopped.

    A later call with the same `storage_path` and `run_name`, after a crash or with another number of workers, resumes
    from the last checkpoint; for a complete run it returns the result again.

    Args:
        uri: The version's directory, or the dataset's for its latest version.
        config: Training and number of workers.
        storage_path: Directory or s3:// prefix of the runs' checkpoints; every node of the cluster must reach it.
        run_name: Name of the run under `storage_path`.

    Raises:
        ConfigError: the function can't be imported, the cluster is too small, or the version has no label.
        VersionNotFound: there is no such published version.
        PipelineError: any other error of this kind in a worker, such as `CorruptVersion`.
        ray.train.TrainingFailedError: workers died or failed more than `config.max_failures` times.
    """
    start = time.monotonic()
    version = open_version(uri)
    load_function(config.function or DEFAULT_FUNCTION)
    run_uri = layout.join(storage.normalise(storage_path), run_name)
    started = connect()
    try:
        check_resources(config)
        result = _fit(version, config, run_uri)
    finally:
        if started:
            ray.shutdown()
    records = read_records(run_uri)
    checkpoint = None
    if result.checkpoint is not None:
        checkpoint = layout.join(run_uri, result.checkpoint.path.rstrip("/").rpartition("/")[2])
    return TrainingResult(
        version_uri=version.uri,
        run_uri=run_uri,
        epochs=records.epochs,
        workers=records.workers,
        restarts=records.restarts,
        checkpoint_uri=checkpoint,
        seconds=time.monotonic() - start,
        drawn=records.drawn,
    )


def load_function(path: str) -> Callable[[TrainingRun], Any]:
    """Return the training function with an import path, 'package.module:name'.

    Raises:
        ConfigError: it can't be imported, or isn't a function; the message says which part is wrong.
    """
    found = load_object("function", path)
    if not callable(found):
        raise ConfigError(
            f"function = '{path}' is a {type(found).__name__}, no function; name a function of one TrainingRun"
        )
    function: Callable[[TrainingRun], Any] = found
    return function


def check_resources(config: TrainingConfig) -> None:
    """Raise an error if the cluster can never hold all workers: Ray would wait for them.

    An autoscaling cluster is left to Ray, which knows its limits.

    Raises:
        ConfigError: there are too few CPUs or GPUs; it says how many.
    """
    from ray._private.state import state  # Ray Train uses it, too; there is no public API

    if state.get_max_resources_from_cluster_config():
        return
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, each in (("CPU", config.cpus_per_worker), ("GPU", float(config.use_gpu))):
        if config.workers * each > there.get(name, 0.0) + 1e-6:
            cure = "take fewer workers, or smaller cpus_per_worker" if name == "CPU" else "train with use_gpu = false"
            raise ConfigError(
                f"workers = {config.workers} of {each:g} {name} each need {config.workers * each:g}, and the cluster "
                f"has {there.get(name, 0.0):g}: {cure}, or add nodes"
            )


def read_state(checkpoint_uri: str) -> dict[str, Any]:
    """Return the contents of a checkpoint, on the CPU; load only tensors and plain values, and run no code.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    data = storage.read_bytes(layout.join(checkpoint_uri, STATE))
    found: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return found


class Records(NamedTuple):
    """Reports of a run so far; if an epoch was reported twice, before and after a restart, the later report counts.

    Attributes:
        epochs: metrics of each epoch.
        workers: figures of each worker in each epoch.
        restarts: number of restarts of all workers.
        drawn: as `TrainingResult.drawn`.
    """

    epochs: tuple[dict[str, Any], ...] = ()
    workers: tuple[WorkerEpoch, ...] = ()
    restarts: int = 0
    drawn: Mapping[str, Mapping[str, int]] = MappingProxyType({})


def read_records(run_uri: str) -> Records:
    """Return what a run's workers have reported so far."""
    uris = [info.uri for info in storage.list_files(layout.join(run_uri, RECORDS))]
    contents = storage.read_many(uris)
    epochs: dict[int, list[dict[str, Any]]] = {}
    restarts = 0
    for uri in sorted(contents):
        record = json.loads(contents[uri])
        restarts += "failures" in record
        for message in record.get("reports", [])[:1]:
            epochs[message["epoch"]] = record["reports"]
    in_order = sorted(epochs.items())
    metrics = tuple({"epoch": epoch, **reports[0]["metrics"]} for epoch, reports in in_order)
    workers = tuple(
        _worker_epoch(epoch, rank, report["worker"])
        for epoch, reports in in_order
        for rank, report in enumerate(reports)
    )
    drawn: Mapping[str, Mapping[str, int]] = next((reports[0].get("drawn", {}) for _, reports in in_order), {})
    return Records(metrics, workers, restarts, drawn)


def _worker_epoch(epoch: int, rank: int, counted: Mapping[str, float]) -> WorkerEpoch:
    return WorkerEpoch(
        epoch=epoch,
        worker=rank,
        samples=int(counted["samples"]),
        seconds=counted["seconds"],
        wait_seconds=counted["wait_seconds"],
        bytes_read=int(counted["bytes_read"]),
        cache_hits=int(counted["cache_hits"]),
        cache_misses=int(counted["cache_misses"]),
        skipped_samples=int(counted["skipped_samples"]),
    )


class _Recorder(ray.train.UserCallback):
    """Recorder of the workers' reports as JSON beside the checkpoints; runs in Ray Train's controller.

    Ray keeps metrics only with checkpoints, only of rank 0, and only as long as the checkpoint.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        if metrics and "epoch" in metrics[0]:
            self._write({"reports": metrics})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        self._write({"failures": {rank: str(error)[-2000:] for rank, error in worker_exceptions.items()}})
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        _LOG.warning("Worker %s failed: if failures are left, all workers start again from the last checkpoint.", ranks)

    def _write(self, record: dict[str, Any]) -> None:
        # In the order of time, also after another process has resumed the run.
        storage.write_bytes(layout.join(self._uri, f"{time.time_ns():020d}.json"), json.dumps(record).encode())


def _pinned(version: Version, mix: Mapping[str, float], run_uri: str) -> dict[str, float] | None:
    """Return the directories of the versions to mix and their weights, that of this run first; None if none are mixed.

    The latest versions of the others are looked up once a run: a retry trains on the same.
    """
    if not mix:
        return None
    own = version.manifest.dataset
    above = layout.join(version.root, own).rpartition("/")[0]
    names = sorted(mix, key=lambda name: name != own.rpartition("/")[2])  # normalised by the constants of the first
    place = layout.join(run_uri, MIX)
    if not storage.exists(place):
        found = [version.uri, *(open_version(layout.join(above, name)).uri for name in names[1:])]
        storage.put_if_absent(place, json.dumps(dict(zip(names, found, strict=True))).encode())
    uris = json.loads(storage.read_bytes(place))
    if sorted(uris) != sorted(names):
        raise ConfigError(
            f"mix = {dict(mix)}: this run has begun with {', '.join(sorted(uris))}; give these, or start a new run"
        )
    return {uris[name]: mix[name] for name in names}


def _fit(version: Version, config: TrainingConfig, run_uri: str) -> Any:
    """Return Ray Train's result of the run."""
    api: Any = ray.train  # its type hints are those of its first version
    base, _, name = run_uri.rpartition("/")
    filesystem, path = storage.arrow_filesystem(base)
    local = not _has_state_api()
    trainer = _trainer(local)(
        _work,
        train_loop_config={
            "uri": version.uri,
            "definition": dict(version.definition),
            "config": config,
            "run_uri": run_uri,
            "mix": _pinned(version, config.mix, run_uri),
        },
        scaling_config=api.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker},
        ),
        run_config=api.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=api.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            # Ray's default is to retry for ever when the cluster is too small for the workers.
            failure_config=api.FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=config.max_failures
            ),
            callbacks=[_Recorder(layout.join(run_uri, RECORDS))],
            logging_config=api.LoggingConfig(log_level="ERROR"),
        ),
    )
    # Ray Train reads its settings from the environment of the process that calls it; what is set there stays.
    wanted = {**_ENVIRONMENT, **(_LOCAL_ENVIRONMENT if local else {})}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    with environment(missing), handler_kept(signal.SIGINT):
        try:
            return trainer.fit()
        except api.TrainingFailedError as error:
            ours = _own_error(error)
            if ours is None:
                raise
            raise ours from error


def _work(settings: dict[str, Any]) -> None:
    """Run one worker: open its streams, load the last checkpoint, call the function."""
    from ray.train.torch import get_device
    from ray.train.v2._internal.execution import context as reporting

    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)  # overrides Ray's setting: two lines a report
    config: TrainingConfig = settings["config"]
    function = load_function(config.function or DEFAULT_FUNCTION)
    context = ray.train.get_context()
    resumed = None
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            resumed = torch.load(Path(folder, STATE), map_location="cpu", weights_only=True)
    with open_run(
        settings["uri"],
        settings["definition"],
        config,
        send=_sender(context.get_world_rank()),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
        resumed=resumed,
        run_uri=settings["run_uri"],
        mix=settings["mix"],
    ) as run:
        function(run)


def _sender(rank: int) -> Send:
    def send(message: dict[str, Any], state: State | None) -> None:
        if state is None or rank:
            ray.train.report(message)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(dict(state), Path(folder, STATE))
            ray.train.report(message, checkpoint=ray.train.Checkpoint.from_directory(folder))

    return send


def _own_error(error: Exception) -> PipelineError | None:
    """Return the first PipelineError of a worker: its message says what to do, and if a retry can help."""
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())]
    return next((cause for cause in causes if isinstance(cause, PipelineError)), None)


def _has_state_api() -> bool:
    """Return True if the cluster has a dashboard, whose State API lists its actors; a local Ray of ours has none."""
    if not has_web_server():
        return False
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # Without the address it takes any Ray on this machine.
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=10)
    except (RayStateApiException, ConnectionError):
        return False
    return True


def _trainer(local: bool) -> Any:
    """Return TorchTrainer; on a local Ray without helpers for the absent State API and for Ray Datasets, which we lack.

    There the actor that the controller waits for starts beside it.
    """
    from ray.train.torch import TorchTrainer

    if not local:
        return TorchTrainer
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()  # type: ignore[misc]  # its hints are of Ray Train's first version
            return [one for one in made if not isinstance(one, (PlacementGroupCleanerCallback, DatasetsCallback))]

    return LocalTrainer
