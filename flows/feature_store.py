"""Feature-store flow: transactions, customers, products → versioned features → models' training sets.

Run it by hand with `python -m flows.feature_store --help`; deploy it as `flows.feature_store.feature_store`. Commands
show and change the store: `python -m flows.feature_store list`, `… --help` of each.
"""

from __future__ import annotations

import datetime as dt
import sys

if __name__ == "__main__":
    from tasks.by_hand import run_by_hand

    sys.exit(run_by_hand("flows.feature_store:feature_store", "tasks.features.config:FeatureStoreConfig"))

from prefect import flow
from prefect.runtime import flow_run

from tasks.feature_store import (
    build_set,
    compute_features,
    plan_sources,
    plan_training_sets,
    prepare_sources,
    unfinished,
    validate_features,
    validate_set,
)
from tasks.features.config import FeatureStoreConfig
from tasks.publication import PublishedVersion, flow_settings, publish_versions, reserve_versions
from tasks.runner import run_record, running
from tasks.store import layout

DEFAULTS = FeatureStoreConfig()


def _described(config: FeatureStoreConfig) -> str:
    source = config.transactions or config.definitions or "the sample"
    what = "features of" if config.compute else "training sets from"
    return f"{what} {source.rstrip('/').rpartition('/')[2]}"


@flow(name="feature-store", **flow_settings(_described))
def feature_store(config: FeatureStoreConfig = DEFAULTS) -> list[PublishedVersion]:
    """Compute features, check and publish them as new versions; build the training sets of the models that read them.

    Args:
        config: Settings for reading, computing, checking, joining and publishing.
    """
    with running(config) as settings:
        started = flow_run.scheduled_start_time or dt.datetime.now(dt.UTC)
        sourced = prepare_sources.submit(settings).result()
        features = _features(sourced, started) if settings.compute else []
        training_sets = _training_sets(sourced, started) if settings.models is not None else []
        return [*features, *training_sets]


def _features(config: FeatureStoreConfig, started: dt.datetime) -> list[PublishedVersion]:
    plans = plan_sources.submit(config, started).result()
    groups = [[layout.feature_dataset(planned.group.name) for planned in plan.groups] for plan in plans]
    reserved = [reserve_versions(config.root, datasets, str(flow_run.id)) for datasets in groups]
    # By an earlier attempt of this run.
    committed = [reservation for group in reserved for reservation in group if reservation.committed]
    left = unfinished(plans, reserved)
    computed = [compute_features.submit(plan, config, reservations, started) for plan, reservations in left]
    judged = [
        validate_features.submit(plan, number, group, config, run_record())
        for (plan, _), groups in zip(left, computed, strict=True)
        for number, group in enumerate(groups.result())
    ]
    return publish_versions([version.result() for version in judged], config.root, committed, together=True)


def _training_sets(config: FeatureStoreConfig, started: dt.datetime) -> list[PublishedVersion]:
    plans = plan_training_sets.submit(config, started).result()
    models = [layout.training_ready_dataset(plan.model.name) for plan in plans]
    reserved = reserve_versions(config.root, models, str(flow_run.id))
    committed = [reservation for reservation in reserved if reservation.committed]
    left = [(plan, one) for plan, one in zip(plans, reserved, strict=True) if not one.committed]
    built = [build_set.submit(plan, reservation) for plan, reservation in left]
    judged = [
        validate_set.submit(plan, computed.result(), config, run_record())
        for (plan, _), computed in zip(left, built, strict=True)
    ]
    return publish_versions([version.result() for version in judged], config.root, committed)
