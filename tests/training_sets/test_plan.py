"""What can be wrong with a model's rows and features is said before any work starts, with the cure."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.features.config import FeatureStoreConfig
from tasks.features.plan import with_uris
from tasks.features.standard import STANDARD
from tasks.io.errors import DefinitionError, SourceError, VersionNotFound
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.training_sets.definition import FeatureReference, Label, Model, SpineSource
from tasks.training_sets.plan import TrainingSetPlan, plan_training_set
from tests.serving.feature_versions import DAY, customers, days, publish_features

STARTED = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
ROWS = pl.DataFrame({"customer_id": [1, 2], EVENT_TIME: [DAY, DAY], TARGET: [0, 1]})
LABEL = Label(name="spends", entity="customer_id", at=("2024-01-31/2024-03-31/1mo",), days=30, target=pl.len())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    publish_features(str(tmp_path), customers(range(5)))
    ROWS.write_parquet(tmp_path / "spine.parquet")
    ROWS.rename({EVENT_TIME: "timestamp", TARGET: "amount"}).with_columns(pl.lit(1).alias("product_id")).write_parquet(
        tmp_path / "transactions.parquet"
    )
    return tmp_path


def plan(
    place: Path, *features: str, spine: SpineSource | Label | None = None, entity: str = "customer_id", **options: Any
) -> TrainingSetPlan:
    spine = spine or SpineSource(uri=str(place / "spine.parquet"))
    references = tuple(map(FeatureReference.parse, features or ("customer-features:*",)))
    config = FeatureStoreConfig(root=str(place), transactions=str(place / "transactions.parquet"), **options)
    model = Model(name="churn", entity=entity, spine=spine, features=references)
    return plan_training_set(model, with_uris(STANDARD, config), config, STARTED)


def test_all_features_are_spelled_out(place: Path) -> None:
    planned = plan(place)
    assert planned.columns == {
        "feature_total_spent": "customer-features:total_spent",
        "feature_orders": "customer-features:orders",
        "feature_city": "customer-features:city",
    }
    assert planned.entities == ("customer_id",)
    assert planned.history_rows == 5
    assert planned.notes == ()


def test_versions_that_are_left_out_are_named(place: Path) -> None:
    publish_features(str(place), customers(range(5), days(30)).rename({"orders": "purchases"}))
    assert plan(place, "customer-features:purchases").notes == (
        "customer-features v1 isn't read: it has no 'purchases'",
    )
    assert plan(place, "customer-features:orders@v1").columns == {"feature_orders": "customer-features:orders@v1"}


def spine_without(place: Path, column: str) -> SpineSource:
    ROWS.drop(column).write_parquet(place / "less.parquet")
    return SpineSource(uri=str(place / "less.parquet"))


@pytest.mark.parametrize("column", ROWS.columns)
def test_a_column_that_the_spine_lacks_is_named_with_the_cure(place: Path, column: str) -> None:
    with pytest.raises(SourceError, match=rf"no column '{column}'.*spine: {{columns: {{{column}: …}}}}"):
        plan(place, spine=spine_without(place, column))


def test_a_misspelt_mapping_is_refused(place: Path) -> None:
    source = SpineSource(uri=str(place / "spine.parquet"), columns={"targt": "bought"})
    with pytest.raises(SourceError, match=r"maps 'targt'.*did you mean 'target'"):
        plan(place, spine=source)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1, 2], {}, "say what they count"),
        ([1, 2], {"epoch_unit": "s"}, None),
        ([1.5, 2.5], {}, "is of type double"),
        (["2024-01-31", "x"], {}, None),
    ],
)
def test_times_must_be_readable(place: Path, values: list[Any], options: dict[str, Any], message: str | None) -> None:
    ROWS.with_columns(pl.Series(EVENT_TIME, values)).write_parquet(place / "times.parquet")
    source = SpineSource(uri=str(place / "times.parquet"))
    if message is None:
        assert plan(place, spine=source, **options).spine is not None
        return
    with pytest.raises(SourceError, match=message):
        plan(place, spine=source, **options)


def test_what_isnt_published_is_refused(place: Path) -> None:
    with pytest.raises(DefinitionError, match="did you mean 'orders'"):
        plan(place, "customer-features:order")
    with pytest.raises(VersionNotFound):
        plan(place, "customer-features:orders@v9")
    with pytest.raises(VersionNotFound, match="customer-features"):
        plan(place, "custmer-features:orders")


def test_a_label_reads_features_of_its_own_entity_only(place: Path) -> None:
    planned = plan(place, spine=LABEL)
    assert planned.label is not None
    assert planned.label.times == tuple(dt.datetime(2024, *day, tzinfo=dt.UTC) for day in ((1, 31), (2, 29), (3, 31)))
    assert planned.label.finished(days(60)[0]) == planned.label.times[:2]
    assert planned.label.finished(None) == ()
    products = customers(range(5)).rename({"customer_id": "product_id"})
    publish_features(str(place), products, "product-features", "product_id")
    with pytest.raises(DefinitionError, match=r"reads features of product_id.*have no product_id"):
        plan(place, "customer-features:orders", "product-features:orders", spine=LABEL)


def test_labels_are_complete_up_to_the_last_as_of(place: Path) -> None:
    planned = plan(place, spine=LABEL, as_of="2024-01-31,2024-04-01")
    assert planned.label is not None
    assert planned.label.complete == dt.datetime(2024, 4, 1, tzinfo=dt.UTC)
    assert planned.label.events.events.rows.as_of == planned.label.complete
    assert planned.label.finished(None) == planned.label.times[:2]


def test_a_key_of_two_types_is_refused(place: Path) -> None:
    text = customers(range(5)).with_columns(pl.col("customer_id").cast(pl.String))
    publish_features(str(place), text, "text-features")
    with pytest.raises(DefinitionError, match=r"customer_id is of type int64 in customer-features.*in text-features"):
        plan(place, "customer-features:orders", "text-features:orders")


def test_the_models_own_key_needs_no_features_and_keeps_its_type(place: Path) -> None:
    products = customers(range(5)).rename({"customer_id": "product_id"})
    publish_features(str(place), products, "product-features", "product_id")
    ROWS.with_columns(pl.lit(3).alias("product_id")).write_parquet(place / "both.parquet")
    planned = plan(place, "product-features:orders", spine=SpineSource(uri=str(place / "both.parquet")))
    assert planned.entities == ("product_id", "customer_id")
    assert planned.spine is not None
    assert {c.name: c.key_type for c in planned.spine.rows.columns if c.name in planned.entities} == {
        "product_id": "int64",
        "customer_id": "int64",
    }
