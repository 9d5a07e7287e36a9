"""The feature-store flow: transactions, customers, products → versioned features.

Run it by hand with `python -m flows.feature_store --help`; deploy it as `flows.feature_store.feature_store`.
"""

from __future__ import annotations

import datetime as dt
import sys

from prefect import flow
from prefect.runtime import flow_run

from tasks.core import storage
from tasks.feature_store import (
    compute_features,
    plan_sources,
    prepare_sources,
    publish_versions,
    reserve_versions,
    validate_features,
)
from tasks.features.config import FeatureStoreConfig
from tasks.publication import PublishedVersion, run_record
from tasks.retries import final_unless_transient
from tasks.runner import ray_runner

DEFAULTS = FeatureStoreConfig()


def _run_name() -> str:
    config = flow_run.parameters["config"]
    source = config.transactions or config.definitions or "the sample"
    return f"features of {source.rstrip('/').rpartition('/')[2]} {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M:%S}"


@flow(name="feature-store", flow_run_name=_run_name, task_runner=ray_runner(), retries=1, retry_delay_seconds=5)
def feature_store(config: FeatureStoreConfig = DEFAULTS) -> list[PublishedVersion]:
    """Compute features of customers and products, check them, and publish them as new versions.

    Args:
        config: What to read, compute, check and publish.

    """
    with final_unless_transient():
        started = flow_run.scheduled_start_time or dt.datetime.now(dt.UTC)
        config = config.model_copy(update={"root": storage.normalise(config.root)})
        sourced = prepare_sources.submit(config).result()
        plans = plan_sources.submit(sourced, started).result()
        reserved = reserve_versions(plans, config.root, str(flow_run.id))
        computed = [
            compute_features.submit(plan, sourced, reservations, started)
            for plan, reservations in zip(plans, reserved, strict=True)
        ]
        judged = [
            validate_features.submit(plan, number, group, sourced, run_record())
            for plan, groups in zip(plans, computed, strict=True)
            for number, group in enumerate(groups.result())
        ]
        return publish_versions([version.result() for version in judged], config.root)


if __name__ == "__main__":
    from tasks.command_line import run_by_hand

    sys.exit(run_by_hand("flows.feature_store:feature_store", FeatureStoreConfig))
