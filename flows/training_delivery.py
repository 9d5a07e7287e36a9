"""Training-delivery flow: a published version → a streaming-ready copy → tensors in N training workers.

Run it by hand with `python -m flows.training_delivery --help`; deploy it as
`flows.training_delivery.training_delivery`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from tasks.by_hand import run_by_hand

    sys.exit(run_by_hand("flows.training_delivery:training_delivery", "tasks.delivery.config:DeliveryConfig"))

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.source import needs_sample
from tasks.publication import PublishedVersion, committed_version, flow_settings, publish_versions, reserve_versions
from tasks.runner import run_record, running
from tasks.store import layout
from tasks.training_delivery import find_source, train_model, validate_copy, write_copy

DEFAULTS = DeliveryConfig()


def _described(config: DeliveryConfig) -> str:
    return f"deliver {config.dataset.rpartition('/')[2]}"


@flow(name="training-delivery", **flow_settings(_described))
def training_delivery(config: DeliveryConfig = DEFAULTS) -> list[PublishedVersion]:
    """Write a streaming-ready copy of a published version, publish it, and train on it.

    If nothing is published and no dataset is requested, the feature-store flow makes its sample's features first.

    Args:
        config: Settings of the delivery and the training.
    """
    with running(config) as settings:
        features = _sample_features(settings) if needs_sample(settings) else []
        source = find_source.submit(settings).result()
        datasets = [layout.streaming_dataset(settings.dataset_name)]
        [reservation] = reserve_versions(settings.root, datasets, str(flow_run.id))
        if reservation.committed:  # a retry: only the training remains
            version = committed_version(reservation)
        else:
            copy = write_copy.submit(source, settings, reservation).result()
            judged = validate_copy.submit(source, copy, settings, run_record()).result()
            [version] = publish_versions([judged], settings.root)
        if settings.training.enabled:
            version = train_model.submit(version, settings, run_record()).result()
        return [*features, version]


def _sample_features(config: DeliveryConfig) -> list[PublishedVersion]:
    from flows.feature_store import feature_store
    from tasks.features.config import FeatureStoreConfig

    get_run_logger().info(
        "Nothing is published under %s, and no dataset is given: making the features of the sample first", config.root
    )
    return feature_store(FeatureStoreConfig(root=config.root, self_test=config.self_test))
