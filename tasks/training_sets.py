"""The feature-store flow's tasks that build models' training sets. Thin, as in `feature_store.py`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from tasks.artifacts import progress
from tasks.core import layout, versions
from tasks.core.errors import GateFailed
from tasks.core.lineage import trace_manifest
from tasks.core.manifest import GateResult, InputRecord, Manifest, Partition, RunRecord
from tasks.core.metadata import write_versions_csv
from tasks.core.own_columns import EVENT_TIME
from tasks.core.provenance import code_digest
from tasks.core.report import Report
from tasks.core.reservation import Reservation, reserve
from tasks.core.stopping import held
from tasks.feature_store import declared
from tasks.features.config import FeatureStoreConfig
from tasks.features.plan import with_uris
from tasks.publication import (
    JudgedVersion,
    PublishedVersion,
    committed_version,
    manifest_of,
    proven,
    publish,
    write_report,
)
from tasks.retries import RETRY
from tasks.serving.gate import judge_training_set
from tasks.serving.loading import load_models, select
from tasks.serving.pipeline import ComputedSet, bucket_count, build_training_set, pieces_to_read
from tasks.serving.plan import TrainingSetPlan, plan_training_set
from tasks.serving.self_test import self_test

_CODE = Path(__file__).parent
_CURES = {
    "leakage": "take the feature out of the model, or raise --label-thresholds.leak-fail if it is known before",
    "unmatched": "compute features as of earlier times, lengthen ttl_days, or raise --label-thresholds.unmatched-fail",
    "nulls": "compute features as of earlier times, or raise --label-thresholds.null-fail",
    "rejected": "mend the rows in _rejected/, or raise --label-thresholds.rejected-fail",
    "schema": "if the change is meant, give --allow-schema-change",
    "target": "look at the label's definition and its times",
}


@task(name="plan-training-sets", cache_policy=NO_CACHE, **RETRY)
def plan_training_sets(config: FeatureStoreConfig, started: dt.datetime) -> list[TrainingSetPlan]:
    """Read the models' file, find the features that each model reads, and look at its spine."""
    assert config.models is not None, "only called for a file of models"
    definitions = with_uris(declared(config), config)
    models = select(load_models(config.models), config.only_models)
    plans = [plan_training_set(model, definitions, config, started) for model in models]
    for plan in plans:
        held = ", ".join(
            f"{history.group} v{'+v'.join(str(version.version) for version in history.versions)}"
            for history in plan.histories
        )
        get_run_logger().info("%s: %d features from %s", plan.model.name, len(plan.references), held)
        for note in plan.label.events.notes if plan.label is not None else ():
            get_run_logger().info("%s: %s", plan.model.name, note)
    return plans


@task(name="reserve-training-sets", cache_policy=NO_CACHE, **RETRY)
def reserve_training_sets(plans: Sequence[TrainingSetPlan], root: str, run_id: str) -> list[Reservation]:
    """Reserve the next version of every training set; what an earlier attempt left is removed.

    Called in the flow's own process, whose death frees the reservation.
    """
    reserved = [reserve(root, layout.training_ready_dataset(plan.model.name), run_id) for plan in plans]
    for reservation in reserved:
        versions.discard_attempt_files(reservation)
    return reserved


def _build_run_name() -> str:
    return f"build {task_run.parameters['plan'].model.name}"


def _validate_run_name() -> str:
    reservation = task_run.parameters["computed"].reservation
    return f"validate {reservation.dataset.rpartition('/')[2]} v{reservation.version}"


@task(name="build-training-set", task_run_name=_build_run_name, tags=["ray-data"], cache_policy=NO_CACHE, **RETRY)
def build_set(plan: TrainingSetPlan, reservation: Reservation) -> ComputedSet:
    """Join a model's rows with the features known at their times, and write them: the Ray job."""
    logger = get_run_logger()
    name = plan.model.name
    with (
        progress(f"Reading the rows of {name}", total=pieces_to_read(plan), unit="pieces of files") as read,
        progress(f"Joining features of {name}", total=bucket_count(plan), unit="buckets") as joined,
    ):
        computed = build_training_set(plan, reservation, on_read=read, on_joined=joined)
    logger.info("%s: %s rows in %d files", reservation.dataset, f"{computed.rows:,}", len(computed.files))
    for group, matched in computed.matched.items():
        logger.info("%s: %s of them found features in time", group, f"{matched:,}")
    for note in computed.notes:
        logger.warning("%s: %s", name, note)
    return computed


@task(name="validate-training-set", task_run_name=_validate_run_name, cache_policy=NO_CACHE, **RETRY)
def validate_set(
    plan: TrainingSetPlan, computed: ComputedSet, config: FeatureStoreConfig, run: RunRecord
) -> JudgedVersion:
    """Judge a training set, its label above all; write its report and show it in Prefect."""
    reservation = computed.reservation
    previous = versions.latest(reservation.root, reservation.dataset)
    gate = judge_training_set(plan.model, config, computed, previous)
    manifest = _manifest(plan, computed, config=config, run=run, gate=gate)
    if config.self_test:
        manifest = proven(manifest, lambda: self_test(reservation.root, manifest, config, previous))
    report = Report.of(
        manifest,
        previous,
        f"Training set of {plan.model.name} v{manifest.version}",
        timings=computed.timings,
        identifiers=(plan.model.entity, EVENT_TIME),
        lineage=trace_manifest(reservation.root, manifest),
        notes=computed.notes,
    )
    manifest = write_report(report, manifest, reservation, f"{plan.model.name}-training-set")
    log = get_run_logger()
    (log.info if gate.verdict == "pass" else log.warning)("%s: verdict %s", reservation.dataset, gate.verdict)
    return JudgedVersion(reservation, manifest)


@task(name="publish-training-sets", cache_policy=NO_CACHE, **RETRY)
def publish_training_sets(
    judged: Sequence[JudgedVersion], root: str, committed: Sequence[Reservation] = ()
) -> list[PublishedVersion]:
    """Commit every training set that passed its gate; a model isn't held up by another one's data.

    Called in the flow's own process: a commit is a conditional write, safe to repeat, but not to run in two places.

    Args:
        judged: The training sets that this attempt has written.
        root: Root of the store.
        committed: Those that an earlier attempt of this run has published.

    Raises:
        GateFailed: the gate failed a training set; it is recorded as rejected, the others are published.
        VersionConflict: another publisher holds a version.

    """
    published = [committed_version(reservation) for reservation in committed]
    failed: list[GateFailed] = []
    with held():
        for version in judged:
            try:
                published += publish([version], root, _CURES)
            except GateFailed as fault:
                failed.append(fault)
        write_versions_csv(root)
    if failed:
        beside = ", ".join(f"{version.dataset} v{version.version}" for version in published)
        raise GateFailed(" ".join(map(str, failed)) + (f" (published beside it: {beside})" if beside else ""))
    return published


def _manifest(
    plan: TrainingSetPlan, computed: ComputedSet, *, config: FeatureStoreConfig, run: RunRecord, gate: GateResult
) -> Manifest:
    model = plan.model
    parts = [_CODE / "core", _CODE / "features", _CODE / "serving"]
    return manifest_of(
        computed,
        gate,
        config,
        run,
        code_digest(*parts, extra=model.digest()),
        partition=Partition(key=model.entity, buckets=bucket_count(plan)),
        inputs=(*_feature_inputs(plan, computed.reservation.root), *plan.source_records(computed)),
        definition={**model.describe(), "columns": plan.columns},
    )


def _feature_inputs(plan: TrainingSetPlan, root: str) -> list[InputRecord]:
    """The feature versions that were read, each with its files."""
    inputs = []
    for history in plan.histories:
        dataset = layout.feature_dataset(history.group)
        for version in history.versions:
            manifest = versions.read_manifest(root, dataset, version.version)
            inputs.append(manifest.as_input(layout.version_uri(root, dataset, version.version)))
    return inputs
