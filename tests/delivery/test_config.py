"""What a configuration refuses, and how it names the copy."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tasks.delivery.config import DeliveryConfig, DeliveryThresholds, TrainingConfig


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (DeliveryConfig, {"validation_share": 0.6, "test_share": 0.4}, "nothing is left to train on"),
        (DeliveryConfig, {"target": "age", "features": "age,city"}, "also a feature or the entity"),
        (DeliveryConfig, {"target": "age", "entity": "age"}, "also a feature or the entity"),
        (DeliveryConfig, {"training": {"balance": "weight"}}, "draws by stored weights; name their column with weight"),
        (DeliveryConfig, {"name": "v3"}, "can't name a dataset; .* such as 'my-v3'"),
        (DeliveryConfig, {"name": "streaming-ready"}, "such as 'my-streaming-ready'"),
        (DeliveryConfig, {"name": ""}, "such as 'my-images'"),
        (DeliveryConfig, {"name": "My Copy"}, "can't name a dataset; .* such as 'my-copy'"),
        (DeliveryConfig, {"version": 0}, "version"),
        (DeliveryConfig, {"version": "newest"}, "latest"),
        (DeliveryConfig, {"unknown": 1}, "unknown"),
        (DeliveryThresholds, {"missing_warn": 0.6}, "a warning must come first"),
        (DeliveryThresholds, {"drift_warn": 2}, "a warning must come first"),
        (TrainingConfig, {"function": "no path"}, "no import path"),
        (TrainingConfig, {"workers": 0}, "workers"),
        (TrainingConfig, {"hidden": (0,)}, "hidden"),
    ],
)
def test_what_cannot_be_is_refused(model: type, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "customer-features"),
        ({"dataset": "training-datasets/images"}, "images"),
        ({"dataset": "plain"}, "plain"),
        ({"name": "mine"}, "mine"),
    ],
)
def test_the_copy_is_named_after_the_dataset(settings: dict[str, str], name: str) -> None:
    assert DeliveryConfig(**settings).dataset_name == name


@pytest.mark.parametrize("version", ["v3", "3", 3])
def test_a_version_is_named_with_or_without_v(version: object) -> None:
    assert DeliveryConfig.model_validate({"version": version}).version == 3


def test_names_come_from_a_command_line_with_commas() -> None:
    config = DeliveryConfig(features="total_*, age", exclude="city")
    assert config.features == ("total_*", "age")
    assert config.exclude == ("city",)


def test_it_survives_its_own_json() -> None:
    config = DeliveryConfig(target="x", version=3, training=TrainingConfig(hidden=(3, 2)))
    assert DeliveryConfig.model_validate_json(config.model_dump_json()) == config
