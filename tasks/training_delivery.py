"""Tasks of the training-delivery flow. Thin: each names a step, reports progress and calls the pipeline.

Tasks pass small frozen values; their output is on storage.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from contextlib import suppress

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import progress, publish_report, publish_table, repeated
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.pipeline import write_streaming_ready
from tasks.delivery.shuffle import StreamingReady
from tasks.delivery.source import Source
from tasks.delivery.source import find_source as find
from tasks.io import storage
from tasks.publication import JudgedVersion, PublishedVersion, judged_version
from tasks.report.report import Report, to_html
from tasks.runner import RETRY
from tasks.store import layout, versions
from tasks.store.manifest import GateResult, RunRecord
from tasks.store.reservation import Reservation
from tasks.training.monitoring import (
    TrainingResult,
    drawn_table,
    epoch_table,
    headline,
    judge_training,
    training_pictures,
    worker_table,
)

LOOK_SECONDS = 2.0


@task(name="find-source", cache_policy=NO_CACHE, **RETRY)
def find_source(config: DeliveryConfig) -> Source:
    """Find the published version and select the data to deliver."""
    source = find(config)
    get_run_logger().info(
        "%s v%d: %s rows, %s; target %s",
        source.manifest.dataset,
        source.manifest.version,
        f"{source.manifest.rows:,}",
        source.kind if source.kind != "table" else f"{len(source.features)} features",
        ", ".join(source.targets) or "none",
    )
    return source


@task(name="write-copy", tags=["ray-data"], cache_policy=NO_CACHE, **RETRY)
def write_copy(source: Source, config: DeliveryConfig, reservation: Reservation) -> StreamingReady:
    """Encode, shuffle and write the streaming-ready copy: the Ray job."""
    with progress("Delivering", total=source.manifest.rows, unit="rows") as done:
        copy = write_streaming_ready(config, source, reservation, on_rows=done)
    get_run_logger().info(
        "%s samples written in %d files (%s)",
        f"{sum(copy.samples.values()):,}",
        len(copy.files),
        ", ".join(f"{split}: {count:,}" for split, count in copy.samples.items()),
    )
    return copy


@task(name="validate-copy", cache_policy=NO_CACHE, **RETRY)
def validate_copy(source: Source, copy: StreamingReady, config: DeliveryConfig, run: RunRecord) -> JudgedVersion:
    """Judge the copy against its thresholds and the last version; write its report and show it in Prefect."""
    reservation = copy.reservation
    previous = versions.latest(reservation.root, reservation.dataset)
    return judged_version(
        copy,
        config,
        run,
        previous,
        recorded={"definition": copy.definition, "inputs": (source.record(),)},
        name=f"{config.dataset_name}-streaming",  # the source's report has the plain name
        title=f"{config.dataset_name} v{reservation.version}, streaming-ready",
    )


@task(name="train-model", tags=["ray-train"], cache_policy=NO_CACHE, **RETRY)
def train_model(version: PublishedVersion, config: DeliveryConfig, run: RunRecord) -> PublishedVersion:
    """Train on the copy through Ray Train, and report; a retry continues from the last checkpoint."""
    from tasks.training.trainer import read_records, train_version  # torch: only this task needs it

    logger = get_run_logger()
    runs = layout.training_runs(config.root, config.dataset_name)
    name = f"v{version.version}-{run.flow_run_id}"
    with progress("Training", total=config.training.epochs, unit="epochs") as done:

        def count() -> None:
            with suppress(Exception):  # a late count is no reason to end a training
                done(len(read_records(layout.join(runs, name)).epochs) - done.done)

        with repeated(count, LOOK_SECONDS):
            result = train_version(version.uri, config.training, runs, name)
        done(len(result.epochs) - done.done)
    for epoch in result.epochs:
        figures = (f"{name.replace('_', ' ')} {value:.6g}" for name, value in epoch.items() if name != "epoch")
        logger.info("Epoch %d: %s", epoch["epoch"], ", ".join(figures))
    gate = _report_training(version, config, run, result)
    lines = headline(result)
    for word, text in lines:
        logger.info("%s: %s", word, text)
    (logger.info if gate.verdict == "pass" else logger.warning)("Training: verdict %s", gate.verdict)
    report = layout.join(result.run_uri, layout.REPORT_HTML)
    return dataclasses.replace(version, notes=(*version.notes, *lines, ("curves", report)))


def _report_training(
    version: PublishedVersion, config: DeliveryConfig, run: RunRecord, result: TrainingResult
) -> GateResult:
    """Write the training's report beside its checkpoints, and show it in Prefect."""
    manifest = versions.resolve(config.root, version.dataset, version.version)
    training = config.training
    gate = judge_training(result, manifest.definition, training.epochs, training.remainder)
    workers = worker_table(result.workers)
    report = Report.of(
        manifest,
        None,
        title=f"Training on {config.dataset_name} v{version.version}",
        verdict=gate.verdict,
        created_at=dt.datetime.now(dt.UTC),
        rows=version.rows,
        balances=(),
        gate=gate,
        self_test=(),
        profile={},
        inputs=(manifest.as_input(version.uri),),
        run=run,
        config=training.model_dump(mode="json"),
        definition={},
        timings={"training": result.seconds},
        pictures=tuple(training_pictures(result.epochs, result.workers)),
        tables=(
            epoch_table(result.epochs, result.workers),
            workers,
            *([drawn_table(result.drawn, training.balance or "version")] if result.drawn else []),
        ),
    )
    html = layout.join(result.run_uri, layout.REPORT_HTML)
    storage.write_bytes(html, to_html(report))
    storage.write_bytes(layout.join(result.run_uri, layout.REPORT_JSON), report.to_json())
    name = f"{config.dataset_name}-training"
    publish_report(name, report.to_markdown(), report.checks_table(), html)
    rows = [dict(zip(workers.columns, row, strict=True)) for row in workers.rows]
    publish_table(f"{name}-workers", rows, workers.note or "What each worker's stream delivered.")
    return gate
