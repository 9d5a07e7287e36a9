"""Tasks of the feature-store flow: features, then models' training sets. Thin: each names a step and calls its job.

Tasks pass small frozen values; their output is on storage.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from tasks.artifacts import progress
from tasks.features import loading
from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Definitions
from tasks.features.incremental import with_state
from tasks.features.pipeline import ComputedGroup, bucket_count, compared, compute_groups, pieces_to_read
from tasks.features.plan import FeaturePlan, check_mappings, needs_sample, plan_features, with_uris
from tasks.features.standard import SAMPLE_AS_OF, write_sample
from tasks.io.notation import expand
from tasks.publication import JudgedVersion, judged_version
from tasks.runner import RETRY
from tasks.store import layout, versions
from tasks.store.layout import AS_OF, CREATED, EVENT_TIME, VERSION
from tasks.store.manifest import InputRecord, Partition, RunRecord
from tasks.store.reservation import Reservation
from tasks.training_sets.definition import load_models, select
from tasks.training_sets.pipeline import ComputedSet, build_training_set
from tasks.training_sets.pipeline import bucket_count as set_bucket_count
from tasks.training_sets.pipeline import pieces_to_read as set_pieces_to_read
from tasks.training_sets.plan import TrainingSetPlan, label_groups, plan_training_set


@task(name="prepare-sources", cache_policy=NO_CACHE, **RETRY)
def prepare_sources(config: FeatureStoreConfig) -> FeatureStoreConfig:
    """Make the sample if no source is given; return the configuration with every URI normalised."""
    labels = label_groups(config.models) if config.models is not None else []
    definitions = declared(config)
    check_mappings(with_uris(definitions, config), labels)
    if not needs_sample(definitions, config):
        return config
    uris = write_sample(config.root, config.sample_transactions, config.seed)
    get_run_logger().info("No transactions are given: using the sample in %s", uris["transactions"])
    return config.model_copy(update={**uris, "as_of": config.as_of or (SAMPLE_AS_OF.isoformat(),)})


@task(name="plan-features", cache_policy=NO_CACHE, **RETRY)
def plan_sources(config: FeatureStoreConfig, started: dt.datetime) -> list[FeaturePlan]:
    """Inspect all sources and decide what is read, joined and computed."""
    plans = plan_features(
        with_uris(declared(config), config), config, expand(config.as_of, config.timezone) or (started,)
    )
    if config.incremental:
        plans = [with_state(plan, config.root) for plan in plans]
    for plan in plans:
        _log_plan(plan)
    return plans


def _log_plan(plan: FeaturePlan) -> None:
    table = plan.read_table
    times = [moment.isoformat() for moment in plan.as_of]
    get_run_logger().info(
        "%s: reading %d of %d files, about %d rows; computing %s as of %s",
        plan.events.name,
        len(table.files),
        len(plan.events.table.files),
        table.estimated_rows(),
        ", ".join(planned.group.name for planned in plan.groups),
        times[0] if len(times) == 1 else f"{len(times)} times, {times[0]} to {times[-1]}",
    )
    for note in plan.notes:
        get_run_logger().info("%s: %s", plan.events.name, note)
    for planned, state in zip(plan.groups, plan.states, strict=False):
        if state.parent is not None:
            get_run_logger().info("%s: %d events are kept by v%d", planned.group.name, state.rows, state.parent)


def unfinished(
    plans: Sequence[FeaturePlan], reserved: Sequence[Sequence[Reservation]]
) -> list[tuple[FeaturePlan, list[Reservation]]]:
    """Return the remaining work: the plans without the groups that an earlier attempt of this run has published.

    That attempt was stopped between two commits. Its published versions stay; the other groups are computed now.
    """
    left = []
    for plan, own in zip(plans, reserved, strict=True):
        numbers = [number for number, reservation in enumerate(own) if not reservation.committed]
        groups = tuple(plan.groups[number] for number in numbers)
        states = tuple(plan.states[number] for number in numbers) if plan.states else ()
        if numbers:
            left.append((replace(plan, groups=groups, states=states), [own[number] for number in numbers]))
    return left


def _compute_run_name() -> str:
    groups = task_run.parameters["plan"].groups
    return f"compute {', '.join(planned.group.name for planned in groups)}"


def _validate_run_name() -> str:
    reservation = task_run.parameters["computed"].reservation
    return f"validate {reservation.dataset.rpartition('/')[2]} v{reservation.version}"


@task(name="compute-features", task_run_name=_compute_run_name, tags=["ray-data"], cache_policy=NO_CACHE, **RETRY)
def compute_features(
    plan: FeaturePlan, config: FeatureStoreConfig, reservations: Sequence[Reservation], created: dt.datetime
) -> list[ComputedGroup]:
    """Compute, score and write all groups of one event source: the Ray job."""
    logger = get_run_logger()
    buckets = bucket_count(plan) * len(plan.groups)
    with (
        progress(f"Reading {plan.events.name}", total=pieces_to_read(plan), unit="pieces of files") as read,
        progress("Computing features", total=buckets, unit="buckets") as computed,
    ):
        groups = compute_groups(plan, config, reservations, created, on_read=read, on_computed=computed)
    for group in groups:
        logger.info(
            "%s: %d entities written in %d files", group.reservation.dataset, group.profile.rows, len(group.files)
        )
    return groups


@task(name="validate-features", task_run_name=_validate_run_name, cache_policy=NO_CACHE, **RETRY)
def validate_features(
    plan: FeaturePlan, number: int, computed: ComputedGroup, config: FeatureStoreConfig, run: RunRecord
) -> JudgedVersion:
    """Judge one group against its thresholds and the last version; write its report and show it in Prefect."""
    group, reservation = computed.group, computed.reservation
    previous = versions.latest(reservation.root, reservation.dataset)
    times = config.as_of or tuple(moment.isoformat() for moment in plan.as_of)
    return judged_version(
        compared(computed, previous),
        config.model_copy(update={"as_of": times}),
        run,
        previous,
        recorded=group_record(plan, number, computed),
        identifiers=(group.entity, AS_OF, CREATED, VERSION),
    )


def group_record(plan: FeaturePlan, number: int, computed: ComputedGroup) -> dict[str, Any]:
    """Return what the manifest of a group has besides that of every version."""
    planned = plan.groups[number]
    balances = {balance.name: balance for balance in computed.balances}
    sources = [plan.events, *(lookup.dimension for lookup in plan.lookups)]
    sources += [planned.dimension] if planned.dimension is not None else []
    tables = {source.name: source.table for source in sources}
    prints = {plan.events.name: plan.fingerprints}
    inputs = tuple(
        table.record(balances[name].rows_in if name in balances else None, prints.get(name, ()))
        for name, table in tables.items()
    )
    newest = computed.newest_event.isoformat() if computed.newest_event is not None else None
    state = {"state": dict(computed.state)} if computed.state is not None else {}
    return {
        "side_files": computed.side_files,
        "partition": Partition(key=planned.group.entity, buckets=bucket_count(plan)),
        "as_of": plan.as_of,
        "inputs": inputs,
        "definition": {**planned.group.describe(), "newest_event": newest, **state},
    }


@task(name="plan-training-sets", cache_policy=NO_CACHE, **RETRY)
def plan_training_sets(config: FeatureStoreConfig, started: dt.datetime) -> list[TrainingSetPlan]:
    """Read the models' file, find the features that each model reads, and inspect its spine."""
    assert config.models is not None, "only called for a file of models"
    definitions = with_uris(declared(config), config)
    models = select(load_models(config.models), config.only_models)
    plans = [plan_training_set(model, definitions, config, started) for model in models]
    for plan in plans:
        sources = ", ".join(
            f"{history.group} v{'+v'.join(str(version.version) for version in history.versions)}"
            for history in plan.histories
        )
        get_run_logger().info("%s: %d features from %s", plan.model.name, len(plan.references), sources)
        for note in plan.label.events.notes if plan.label is not None else ():
            get_run_logger().info("%s: %s", plan.model.name, note)
    return plans


def _build_run_name() -> str:
    return f"build {task_run.parameters['plan'].model.name}"


@task(name="build-training-set", task_run_name=_build_run_name, tags=["ray-data"], cache_policy=NO_CACHE, **RETRY)
def build_set(plan: TrainingSetPlan, reservation: Reservation) -> ComputedSet:
    """Join a model's rows with the features known at their times, and write them: the Ray job."""
    logger = get_run_logger()
    name = plan.model.name
    with (
        progress(f"Reading the rows of {name}", total=set_pieces_to_read(plan), unit="pieces of files") as read,
        progress(f"Joining features of {name}", total=set_bucket_count(plan), unit="buckets") as joined,
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
    """Judge a training set, especially its label; write its report and show it in Prefect."""
    model, reservation = computed.model, computed.reservation
    return judged_version(
        computed,
        config,
        run,
        versions.latest(reservation.root, reservation.dataset),
        recorded=set_record(plan, computed),
        name=f"{model.name}-training-set",
        traced=True,
        title=f"Training set of {model.name} v{reservation.version}",
        identifiers=(model.entity, EVENT_TIME),
        notes=computed.notes,
    )


def declared(config: FeatureStoreConfig) -> Definitions:
    """Return the standard definitions, overridden by those of the configuration's file; sources as declared."""
    return loading.declared(config.definitions)


def set_record(plan: TrainingSetPlan, computed: ComputedSet) -> dict[str, Any]:
    """Return what the manifest of a training set has besides that of every version."""
    model = plan.model
    return {
        "partition": Partition(key=model.entity, buckets=set_bucket_count(plan)),
        "inputs": (*_feature_inputs(plan, computed.reservation.root), *plan.source_records(computed)),
        "definition": {**model.describe(), "columns": plan.columns},
    }


def _feature_inputs(plan: TrainingSetPlan, root: str) -> list[InputRecord]:
    """Return the feature versions that were read, each with its files."""
    inputs = []
    for history in plan.histories:
        dataset = layout.feature_dataset(history.group)
        for version in history.versions:
            manifest = versions.read_manifest(root, dataset, version.version)
            inputs.append(manifest.as_input(layout.version_uri(root, dataset, version.version)))
    return inputs
