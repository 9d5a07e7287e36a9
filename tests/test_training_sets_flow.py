"""Two models with different rows and features, built from one store in one flow run, and delivered to trainers."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
import yaml

from flows.feature_store import feature_store
from flows.training_delivery import training_delivery
from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.features.config import FeatureStoreConfig
from tasks.io import storage
from tasks.io.errors import GateFailed
from tasks.store import layout, versions
from tasks.store.manifest import Manifest
from tests.runs import Run, assert_whole
from tests.training_sets.declared import churn_and

pytestmark = [pytest.mark.usefixtures("stack"), pytest.mark.slow]

CHURN, DEMAND = (layout.training_ready_dataset(model) for model in ("churn", "demand"))
MONTHS = "2024-03-31/2024-12-31/1mo"


def models(root: str) -> str:
    """A file of two models: customers by a label, products by a table of the user's own."""
    days = pl.datetime_range(dt.datetime(2024, 6, 1), dt.datetime(2024, 11, 1), "1mo", time_zone="UTC", eager=True)
    products = pl.DataFrame({"product_id": range(40)}).join(pl.DataFrame({"day": days}), how="cross")
    products = products.with_columns(
        (pl.col("product_id") * 7 % 11 + pl.col("day").dt.month()).cast(pl.Float64).alias("sold")
    )
    table = layout.join(root, "sold.parquet")
    storage.write_parquet(products.to_arrow(), table)
    demand = {
        "entity": "product_id",
        "spine": {"uri": table, "columns": {"target": "sold", "event_timestamp": "day"}},
        "features": ["product-features:total_sales", "product-features:sales_velocity"],
    }
    file = layout.join(root, "models.yaml")
    features = ("transaction_count", "total_spent_90d", "spending_trend")
    storage.write_bytes(file, churn_and("2024-04-30/2024-11-30/1mo", 30, features, 45, demand=demand).encode())
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, stack: str) -> Run:
    root = str(tmp_path_factory.mktemp("training-sets"))
    config = FeatureStoreConfig(root=root, sample_transactions=4_000, as_of=(MONTHS,), models=models(root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
        patch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", layout.join(root, "events.json"))
        patch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
        return Run(root, feature_store(config, return_state=True)).completed()


def test_one_run_publishes_features_and_both_training_sets(built: Run) -> None:
    names = [version.dataset for version in built.published]
    assert names == ["feature-store/customer-features", "feature-store/product-features", CHURN, DEMAND]
    for dataset in names:
        assert_whole(built, dataset)
    features = built.manifest(names[0])
    assert [moment.date().isoformat() for moment in features.as_of][:2] == ["2024-03-31", "2024-04-30"]


@pytest.mark.parametrize(("dataset", "entity"), [(CHURN, "customer_id"), (DEMAND, "product_id")])
def test_a_training_set_has_features_from_before_and_its_inputs(built: Run, dataset: str, entity: str) -> None:
    manifest = built.manifest(dataset)
    rows = versions.read_table(built.root, dataset).to_pandas()
    assert list(rows.columns[:2]) == [entity, "event_timestamp"]
    assert rows.columns[-1] == "target"
    assert all(name.startswith("feature_") for name in rows.columns[2:-1])
    source = next(record for record in manifest.inputs if record.version is not None)
    assert (source.name, source.version) == (f"feature-store/{dataset_group(dataset)}", 1)
    expected = joined(built, manifest, rows[[entity, "event_timestamp"]])
    for column in rows.columns[2:-1]:
        pd.testing.assert_series_equal(rows[column], expected[column], check_dtype=False, check_names=False)


def dataset_group(dataset: str) -> str:
    return "customer-features" if dataset == CHURN else "product-features"


def joined(built: Run, manifest: Manifest, spine: pd.DataFrame) -> pd.DataFrame:
    """Each row's newest features by pandas' own as-of join."""
    entity = str(spine.columns[0])
    history = versions.read_table(built.root, f"feature-store/{dataset_group(manifest.dataset)}").to_pandas()
    order = spine.reset_index().sort_values("event_timestamp", kind="stable")
    tolerance = pd.Timedelta(days=manifest.definition["ttl_days"]) if manifest.definition["ttl_days"] else None
    found = pd.merge_asof(
        order,
        history.sort_values("as_of", kind="stable"),
        left_on="event_timestamp",
        right_on="as_of",
        by=entity,
        tolerance=tolerance,
    )
    found = found.set_index("index").sort_index()
    return found.rename(
        columns={reference.partition(":")[2]: column for column, reference in manifest.definition["columns"].items()}
    )


@pytest.mark.parametrize(("dataset", "kind"), [(CHURN, "class"), (DEMAND, "number")])
def test_training_delivery_takes_it_by_name(built: Run, dataset: str, kind: str) -> None:
    config = DeliveryConfig(root=built.root, dataset=dataset, training=TrainingConfig(enabled=False))
    [copy] = training_delivery(config)
    manifest = versions.resolve(built.root, copy.dataset)
    assert manifest.definition["label"]["kind"] == kind
    assert manifest.definition["label"]["column"] == "target"
    assert {feature["column"] for feature in manifest.definition["features"]} == {
        column.name for column in built.manifest(dataset).columns if column.name.startswith("feature_")
    }


def test_a_label_among_the_features_isnt_published_and_doesnt_hold_the_other_up(built: Run, tmp_path: Path) -> None:
    declared = yaml.safe_load(Path(models(built.root)).read_text())
    spine = declared["models"]["demand"]["spine"]
    features = versions.read_table(built.root, "feature-store/product-features").to_pandas()
    leaking = features[["product_id", "as_of", "total_sales"]].rename(columns={"as_of": "day", "total_sales": "sold"})
    leaking.to_parquet(tmp_path / "leaking.parquet")
    spine["uri"] = str(tmp_path / "leaking.parquet")
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump(declared))
    state = feature_store(
        FeatureStoreConfig(
            root=built.root, sample_transactions=4_000, models=str(file), compute=False, as_of=(MONTHS,)
        ),
        return_state=True,
    )
    with pytest.raises(GateFailed, match=r"feature_total_sales.*published beside it: .*churn v2"):
        state.result()
    assert versions.published_versions(built.root, DEMAND) == [1]


def test_openlineage_is_told_of_the_run_and_what_it_made_from_what(built: Run) -> None:
    events = [json.loads(line) for line in Path(built.root, "events.json").read_text().splitlines()]
    assert [events[0]["eventType"], events[-1]["eventType"]] == ["START", "COMPLETE"]
    assert {events[0]["job"]["name"], events[-1]["job"]["name"]} == {"feature-store"}
    made = {
        one["name"]: event for event in events for one in event.get("outputs", ()) if event["eventType"] == "COMPLETE"
    }
    assert {version.dataset for version in built.published} <= {name.removeprefix(f"{built.root}/") for name in made}
    [churn] = [event for name, event in made.items() if name.endswith(CHURN)]
    assert any(one["name"].endswith("customer-features") for one in churn["inputs"])
