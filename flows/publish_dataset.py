"""Publish-dataset flow: a Ray Dataset → a version in the store; and, on request, a stream that can be resumed.

It is called from Python, in the process that made the dataset:

    from flows.publish_dataset import publish, read_mds, stream_of
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import ray.data
from prefect import flow
from prefect.runtime import flow_run
from pydantic import ValidationError

from flows.training_delivery import training_delivery
from tasks.by_hand import local_api
from tasks.datasets.config import DatasetConfig
from tasks.datasets.pipeline import check_dataset, find_form, read_mds
from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.features.loading import first_mistake
from tasks.io import storage
from tasks.io.errors import ConfigError
from tasks.kinds import kind_of
from tasks.loader.options import Options
from tasks.loader.stream import TrainingStream
from tasks.publication import (
    PublishedVersion,
    committed_version,
    flow_settings,
    publish_versions,
    published,
    reserve_versions,
)
from tasks.published_datasets import find_same_rows, validate_rows, write_rows
from tasks.runner import run_record, running
from tasks.store import layout, versions

__all__ = ["publish", "read_mds", "stream_of"]


def publish(
    dataset: ray.data.Dataset,
    name: str,
    *,
    root: str = "data",
    label: str | Sequence[str] | None = None,
    entity: str | None = None,
    image: str | None = None,
    image_size: tuple[int, int] | None = None,
    reuse: bool = True,
    **settings: Any,
) -> PublishedVersion:
    """Publish a Ray Dataset as the next version of `datasets/<name>`: its rows, a manifest, a gate's verdict, a report.

    Ray's workers write the rows; none passes through this process. Readers see the version whole or not at all.

    Args:
        dataset: Columns of numbers, booleans, text, dates and times; and one of images. Its pipeline runs once, and its
            beginning twice: the columns and types of the first rows are those of the version.
        name: Name of the dataset in the store.
        root: Root of the store: a directory or s3://bucket/prefix.
        label: Column to learn, or several; rows without a value in it are rejected, counted and kept apart.
        entity: Column whose equal values share a split in streaming-ready copies; likewise. None: each row by itself.
        image: Column of images: uint8 tensors, height × width × channels or channels first, or encoded files.
        image_size: Height and width that images are resized to, pixels.
        reuse: Return the latest version if it has just these rows: the dataset is materialised in Ray's object stores
            for the comparison, if there is a version, and nothing is written.
        settings: Further fields of `DatasetConfig`, such as `thresholds`.

    Returns:
        The published version.

    Raises:
        ConfigError: a setting is wrong, or Ray doesn't run.
        SourceError: the dataset is empty, its columns can't be stored, or change between blocks.
        GateFailed: the gate refused the rows; nothing was published.
    """
    chosen = {"name": name, "root": root, "label": label, "entity": entity, "image": image, "image_size": image_size}
    config = _config(DatasetConfig, chosen | settings)
    storage.check_root(config.root)
    check_dataset(dataset)
    with local_api():
        return _publish(dataset, config, reuse)


def stream_of(
    dataset: ray.data.Dataset,
    name: str,
    *,
    batch_size: int,
    root: str = "data",
    label: str | Sequence[str] | None = None,
    entity: str | None = None,
    image: str | None = None,
    image_size: tuple[int, int] | None = None,
    reuse: bool = True,
    settings: Mapping[str, Any] | None = None,
    delivery: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> TrainingStream:
    """Publish a Ray Dataset, make its streaming-ready copy, and open a stream on that.

    So a pipeline of Ray Data ends in a loader with a global order, each sample once an epoch, checksums, and a place
    that any number of workers goes on from in mid-epoch. The rest of an epoch needs neither the pipeline nor Ray.

    A second call with the same rows writes nothing: it opens the copy that there is.

    Args:
        dataset: As in `publish`.
        name: Name of the dataset, and of its copy, `training-datasets/streaming-ready/<name>`.
        batch_size: Samples in a batch of each worker.
        root: As in `publish`.
        label: As in `publish`.
        entity: As in `publish`.
        image: As in `publish`.
        image_size: As in `publish`.
        reuse: As in `publish`, for the copy, too.
        settings: Further fields of `DatasetConfig`.
        delivery: Further fields of `DeliveryConfig`, such as `features`. All rows are in the train split, unless
            `validation_share` or `test_share` is among them.
        options: Of `TrainingStream`, such as `seed`, `rank` and `world_size`.

    Returns:
        The stream, to be closed.

    Raises:
        ConfigError, SourceError, GateFailed: as `publish`.
        ConfigError: another dataset has a copy of that name, or an option of the stream is wrong.
    """
    chosen = {"name": name, "root": root, "label": label, "entity": entity, "image": image, "image_size": image_size}
    config = _config(DatasetConfig, {**chosen, **(settings or {})})
    source = layout.ray_dataset(config.name)
    target = ",".join(config.labels) or None
    asked = {"root": config.root, "dataset": source, "target": target, "validation_share": 0.0, **(delivery or {})}
    asked |= {"training": TrainingConfig(enabled=False)}
    wanted = _config(DeliveryConfig, asked)
    storage.check_root(config.root)
    check_dataset(dataset)
    _check_copy(config.root, wanted, source)
    with local_api():
        version = _publish(dataset, config, reuse)
        wanted = wanted.model_copy(update={"root": storage.normalise(config.root), "version": version.version})
        uri = _copy_of(wanted, version) if reuse else None
        if uri is None:
            [copy] = training_delivery(wanted)
            uri = copy.uri
    return TrainingStream(uri, batch_size=batch_size, **options)


def _config(model: Any, values: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as fault:
        raise ConfigError(first_mistake(model, fault)) from fault


def _publish(dataset: ray.data.Dataset, config: DatasetConfig, reuse: bool) -> PublishedVersion:
    name = layout.ray_dataset(config.name)

    # A flow of its own for each call: a dataset is no parameter that Prefect could record.
    @flow(name="publish-dataset", **_settings())
    def publish_dataset(config: DatasetConfig) -> list[PublishedVersion]:
        with running(config) as settings:
            compared = reuse and versions.latest(settings.root, name) is not None
            rows = dataset.materialize() if compared else dataset  # the pipeline runs once
            form = find_form(rows, settings)
            if compared:
                same = find_same_rows(rows, form)
                if same is not None:
                    return [published(settings.root, same)]
            [reservation] = reserve_versions(settings.root, [name], str(flow_run.id))
            if reservation.committed:
                return [committed_version(reservation)]
            made = write_rows(rows, form, reservation)
            judged = validate_rows(made, settings, run_record())
            return publish_versions([judged], settings.root)

    [version] = publish_dataset(config)
    return version


def _settings() -> dict[str, Any]:
    """Return the flow's settings; its tasks are calls in this process, whose Ray has the dataset."""
    return {name: value for name, value in flow_settings(_described).items() if name != "task_runner"}


def _described(config: DatasetConfig) -> str:
    return f"publish {config.name}"


def _check_copy(root: str, wanted: DeliveryConfig, source: str) -> None:
    """Check that the copy's name isn't taken by the copy of another dataset.

    Raises:
        ConfigError: it is.
    """
    name = layout.streaming_dataset(wanted.dataset_name)
    latest = versions.latest(root, name)
    other = source if latest is None else latest.definition.get("source", {}).get("dataset")
    if other != source:
        raise ConfigError(f"name = '{wanted.dataset_name}' is taken: {name} is a copy of {other}; give another name")


def _copy_of(wanted: DeliveryConfig, version: PublishedVersion) -> str | None:
    """Return the URI of the latest copy if it is the one that a delivery would make; else None."""
    name = layout.streaming_dataset(wanted.dataset_name)
    latest = versions.latest(wanted.root, name)
    if latest is None or latest.definition.get("source") != {"dataset": version.dataset, "version": version.version}:
        return None
    same = latest.config == wanted.model_dump(mode="json")
    same = same and latest.code_digest == kind_of(name).digest(latest.definition)
    return layout.version_uri(wanted.root, name, latest.version) if same else None
