"""The configuration: every field is described and bounded, and what is wrong is said."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.io.notation import expand

UTC = dt.UTC


@pytest.mark.parametrize("model", [FeatureStoreConfig, Thresholds])
def test_every_field_is_described_in_a_sentence_and_has_a_default(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert not field.is_required(), name


@pytest.mark.parametrize("model", [FeatureStoreConfig, Thresholds])
def test_a_configuration_is_frozen_and_knows_its_fields(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model(trehsold=1)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(model(), next(iter(model.model_fields)), "other")


@pytest.mark.parametrize("model", [FeatureStoreConfig, Thresholds])
def test_it_survives_json(model: type[BaseModel]) -> None:
    """Prefect and the manifest keep it as JSON."""
    config = model()
    assert model.model_validate_json(config.model_dump_json()) == config


TIMES = [
    ("2024-06-01T12:00:00Z", dt.datetime(2024, 6, 1, 12, tzinfo=UTC)),
    ("2024-06-01T12:00:00", dt.datetime(2024, 6, 1, 12, tzinfo=UTC)),
    ("2024-06-01T12:00:00+02:00", dt.datetime(2024, 6, 1, 10, tzinfo=UTC)),
    ("2024-06-01", dt.datetime(2024, 6, 1, tzinfo=UTC)),
    (dt.datetime(2024, 6, 1), dt.datetime(2024, 6, 1, tzinfo=UTC)),
    (dt.datetime(2024, 6, 1, tzinfo=dt.timezone(dt.timedelta(hours=-5))), dt.datetime(2024, 6, 1, 5, tzinfo=UTC)),
]


@pytest.mark.parametrize(("given", "expected"), TIMES, ids=[str(case[0]) for case in TIMES])
def test_times_become_utc(given: Any, expected: dt.datetime) -> None:
    config = FeatureStoreConfig(as_of=given, earliest=given)
    for found in (config.earliest, *expand(config.as_of)):
        assert found == expected
        assert found.tzinfo is UTC
    assert FeatureStoreConfig(as_of=config.as_of) == config.model_copy(
        update={"earliest": FeatureStoreConfig().earliest}
    )


GROUPS = [
    ("a,b", ("a", "b")),
    (" a , b ,", ("a", "b")),
    ("", ()),
    (["a", "b"], ("a", "b")),
    (("a",), ("a",)),
]


@pytest.mark.parametrize(("given", "expected"), GROUPS, ids=[repr(case[0]) for case in GROUPS])
def test_groups(given: object, expected: tuple[str, ...]) -> None:
    assert FeatureStoreConfig(groups=given).groups == expected  # type: ignore[arg-type]


ACCEPTED: list[dict[str, Any]] = [
    {"rows_per_bucket": 1_000},
    {"sample_transactions": 100},
    {"sample_transactions": 100_000_000},
    {"seed": 2**63 - 1},
    {"timezone": "America/Argentina/Buenos_Aires"},
    {"epoch_unit": "ns"},
    {"negative_amounts": "reject"},
    {"join": "left"},
    {"transactions": "t", "customers": "c", "products": "p"},
    {"definitions": "own.py", "customers": "c"},
    {"thresholds": {"null_warn": 0, "null_fail": 0}},
    {"thresholds": {"ready_warn": 1, "ready_fail": 1}},
    {"thresholds": {"drift_warn": 5, "drift_fail": 10}},
]


@pytest.mark.parametrize("values", ACCEPTED, ids=str)
def test_accepted(values: dict[str, Any]) -> None:
    FeatureStoreConfig(**values)


shares = [name for name in Thresholds.model_fields if not name.startswith(("drift", "fresh"))]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"root": ""}, r"root\s.*at least 1 character"),
    ({"timezone": "Mars/Olympus"}, r"'Mars/Olympus' is no IANA time zone; give one such as UTC or Europe/Berlin"),
    ({"timezone": "CEST"}, r"'CEST' is no IANA time zone"),
    ({"epoch_unit": "m"}, r"epoch_unit\s.*'s', 'ms', 'us' or 'ns'"),
    ({"negative_amounts": "drop"}, r"negative_amounts\s.*'keep' or 'reject'"),
    ({"join": "outer"}, r"join\s.*'inner' or 'left'"),
    ({"rows_per_bucket": 999}, r"rows_per_bucket\s.*greater than or equal to 1000"),
    ({"sample_transactions": 99}, r"sample_transactions\s.*greater than or equal to 100"),
    ({"sample_transactions": 100_000_001}, r"sample_transactions\s.*less than or equal to 100000000"),
    ({"seed": -1}, r"seed\s.*greater than or equal to 0"),
    ({"seed": 2**63}, r"seed\s.*less than 9223372036854775808"),
    ({"as_of": "yesterday"}, r"as_of\s.*'yesterday' is no time; write ISO 8601"),
    ({"earliest": "yesterday"}, r"earliest\s.*valid datetime"),
    ({"transaction_columns": ["amount"]}, r"transaction_columns\s.*valid dictionary"),
    ({"customers": "c"}, r"customers or products are given without transactions; give transactions too, or none"),
    ({"products": "p"}, r"customers or products are given without transactions"),
    ({"thresholds": {"fresh_warn_days": 0}}, r"fresh_warn_days\s.*greater than 0"),
    ({"thresholds": {"drift_warn": -0.1}}, r"drift_warn\s.*greater than or equal to 0"),
    ({"thresholds": {"drift_warn": float("nan")}}, r"drift_warn\s.*finite number"),
    ({"thresholds": {"null_warn": 0.6}}, r"null_warn = 0.6 is above null_fail = 0.5; a warning must come first"),
    ({"thresholds": {"rejected_fail": 0.001}}, r"rejected_warn = 0.01 is above rejected_fail = 0.001"),
    ({"thresholds": {"orphan_warn": 1}}, r"orphan_warn = 1.0 is above orphan_fail = 0.9"),
    ({"thresholds": {"drift_warn": 0.3}}, r"drift_warn = 0.3 is above drift_fail = 0.25"),
    ({"thresholds": {"outlier_warn": 0.6}}, r"outlier_warn = 0.6 is above outlier_fail = 0.5"),
    ({"thresholds": {"ready_fail": 0.6}}, r"ready_fail = 0.6 is above ready_warn = 0.5; a warning must come first"),
    (
        {"thresholds": {"fresh_warn_days": 9, "fresh_fail_days": 2}},
        r"fresh_warn_days = 9.0 is above fresh_fail_days = 2",
    ),
    *(({"thresholds": {name: 1.1}}, rf"{name}\s.*less than or equal to 1") for name in shares),
    *(({"thresholds": {name: -0.1}}, rf"{name}\s.*greater than or equal to 0") for name in shares),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        FeatureStoreConfig(**values)
