"""The standard sources and the two feature groups that come with the project, customers and products; and a sample.

They are declared like a user's; nothing else in the code knows their names.

The sample is a small deterministic shop: transactions of a year, customers and products, with the usual flaws. Every
block of rows has a separate counter-based generator (Philox, keyed by seed and block), so the tables don't depend on
the number of blocks, and are the same on every machine.
"""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl

from tasks.features.definitions import Column, Definitions, DimensionSource, EventSource, FeatureGroup, Window
from tasks.io import storage
from tasks.store import layout

RECENT = 5
"""Number of 'recent' transactions: the last 5 by time."""

TREND_TOLERANCE = 0.1
"""A recent mean within ±10 % of the overall mean is a stable trend."""

HIGH_SALES_PER_DAY = 1.0
MEDIUM_SALES_PER_DAY = 0.1

TRANSACTIONS = EventSource(
    name="transactions",
    time="timestamp",
    columns={
        "customer_id": Column(kind="key", required=True),
        "product_id": Column(kind="key", required=True),
        "timestamp": Column(kind="time", required=True),
        "amount": Column(kind="number", required=True),
        "category": Column(kind="category", also=("product_category",)),
    },
)
CUSTOMERS = DimensionSource(name="customers", key="customer_id", columns=("age", "gender", "location", "signup_date"))
PRODUCTS = DimensionSource(name="products", key="product_id", columns=("category", "brand", "price", "launch_date"))

_amount = pl.col("amount")
_time = pl.col("timestamp")
_days_between = (_time.max() - _time.min()).dt.total_days()
# A total order, so that ties in time don't make 'the last five' depend on the order of the rows.
_latest_first = _amount.sort_by("timestamp", "product_id", "amount", descending=True)
_tolerance = TREND_TOLERANCE * pl.col("avg_transaction_value").abs()
_change = pl.col("recent_avg_transaction") - pl.col("avg_transaction_value")

CUSTOMER_FEATURES = FeatureGroup(
    name="customer-features",
    entity=CUSTOMERS.key,
    source=TRANSACTIONS.name,
    dimension=CUSTOMERS.name,
    features={
        "transaction_count": pl.len(),
        "total_spent": _amount.sum(),
        "avg_transaction_value": _amount.mean(),
        "transaction_std": _amount.std().fill_null(0.0),
        "days_active": _days_between,
        "unique_categories": pl.col("category").drop_nulls().n_unique(),
        "recent_avg_transaction": _latest_first.head(RECENT).mean(),
    },
    windows=tuple(
        Window(days=days, features={"transaction_count": pl.len(), "total_spent": _amount.sum()})
        for days in (7, 30, 90)
    ),
    derived={
        "purchase_frequency": pl.col("transaction_count") / pl.max_horizontal("days_active", pl.lit(1)),
        "category_diversity": pl.col("unique_categories") / pl.col("transaction_count"),
        "spending_trend": pl.when(_change > _tolerance)
        .then(pl.lit("increasing"))
        .when(_change < -_tolerance)
        .then(pl.lit("decreasing"))
        .otherwise(pl.lit("stable")),
    },
    bounds={
        "transaction_count": (1, None),
        **dict.fromkeys(("transaction_std", "days_active", "purchase_frequency", "unique_categories"), (0, None)),
        "category_diversity": (0, 1),
    },
)

PRODUCT_FEATURES = FeatureGroup(
    name="product-features",
    entity=PRODUCTS.key,
    source=TRANSACTIONS.name,
    dimension=PRODUCTS.name,
    features={
        "total_sales": pl.len(),
        "total_revenue": _amount.sum(),
        "avg_sale_price": _amount.mean(),
        "price_variance": _amount.var().fill_null(0.0),
        "unique_customers": pl.col("customer_id").n_unique(),
        "repeat_customer_share": (pl.col("customer_id").unique_counts() > 1).mean(),
        "days_on_sale": _days_between,
    },
    derived={
        "repeat_purchase_rate": (pl.col("total_sales") - pl.col("unique_customers"))
        / pl.max_horizontal("unique_customers", pl.lit(1)),
        "sales_velocity": pl.col("total_sales") / pl.max_horizontal("days_on_sale", pl.lit(1)),
        "performance_tier": pl.when(pl.col("sales_velocity") > HIGH_SALES_PER_DAY)
        .then(pl.lit("high"))
        .when(pl.col("sales_velocity") > MEDIUM_SALES_PER_DAY)
        .then(pl.lit("medium"))
        .otherwise(pl.lit("low")),
    },
    bounds={
        "total_sales": (1, None),
        "price_variance": (0, None),
        "unique_customers": (1, None),
        "repeat_customer_share": (0, 1),
        "repeat_purchase_rate": (0, None),
        "sales_velocity": (0, None),
    },
)

STANDARD = Definitions(
    events={TRANSACTIONS.name: TRANSACTIONS},
    dimensions={CUSTOMERS.name: CUSTOMERS, PRODUCTS.name: PRODUCTS},
    groups={CUSTOMER_FEATURES.name: CUSTOMER_FEATURES, PRODUCT_FEATURES.name: PRODUCT_FEATURES},
)


SAMPLE_AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
BLOCK = 1_000_000
CATEGORIES = ("books", "clothing", "electronics", "garden", "grocery", "home", "sports", "toys")
TRANSACTIONS_PER_CUSTOMER = 20
TRANSACTIONS_PER_PRODUCT = 100
_YEAR_SECONDS = 366 * 86_400
_CUSTOMERS, _PRODUCTS, _BLOCKS = 0, 1, 2


def sample_transactions(rows: int, seed: int, block: int, total: int) -> pl.DataFrame:
    """Return one block of transactions of 2024, in the order of time within the block.

    About 1 % are refunds (negative), 0.2 % have no amount, 0.1 % a NaN, 0.2 % no customer, 0.3 % a time after
    `SAMPLE_AS_OF`, and 1 % name customers that aren't in the customers table.

    Args:
        rows: Rows of this block.
        seed: Seed of the sample.
        block: Number of the block.
        total: Rows of all blocks, which determine the numbers of customers and products.
    """
    draw = _generator(seed, _BLOCKS + block)
    customers, products = sizes(total)
    # A few customers and products have most of the transactions, as in any shop.
    customer = (customers * draw.random(rows) ** 1.7).astype(np.int64)
    product = (products * draw.random(rows) ** 2.0).astype(np.int64)
    price = sample_products(total, seed)["price"].to_numpy()
    amount = np.round(price[product] * draw.lognormal(0.0, 0.15, rows), 2)
    amount[draw.random(rows) < 0.01] *= -1
    amount[draw.random(rows) < 0.001] = np.nan
    seconds = np.sort(draw.random(rows)) * _YEAR_SECONDS
    seconds[draw.random(rows) < 0.003] += _YEAR_SECONDS
    start = np.datetime64("2024-01-01T00:00:00", "us")
    stranger = draw.random(rows) < 0.01
    return pl.DataFrame(
        {
            "customer_id": np.where(stranger, customers + customer % 10, customer),
            "product_id": product,
            "timestamp": start + (seconds * 1e6).astype("timedelta64[us]"),
            "amount": amount,
        }
    ).with_columns(
        pl.when(pl.Series(draw.random(rows) >= 0.002)).then(pl.col("customer_id")),
        pl.when(pl.Series(draw.random(rows) >= 0.002)).then(pl.col("amount")),
        pl.col("timestamp").dt.replace_time_zone("UTC"),
    )


def sample_customers(total: int, seed: int) -> pl.DataFrame:
    """Return one row a customer: customer_id, age, gender, location, signup_date."""
    draw = _generator(seed, _CUSTOMERS)
    count, _ = sizes(total)
    signup = np.datetime64("2020-01-01") + draw.integers(0, 4 * 365, count).astype("timedelta64[D]")
    return pl.DataFrame(
        {
            "customer_id": np.arange(count),
            "age": np.clip(draw.normal(42, 14, count), 18, 90).astype(np.int64),
            "gender": draw.choice(["female", "male", "other"], count, p=[0.49, 0.49, 0.02]),
            "location": draw.choice(["Berlin", "Lagos", "Lima", "Osaka", "Toronto"], count),
            "signup_date": signup,
        }
    )


def sample_products(total: int, seed: int) -> pl.DataFrame:
    """Return one row a product: product_id, category, brand, price, launch_date."""
    draw = _generator(seed, _PRODUCTS)
    _, count = sizes(total)
    launch = np.datetime64("2018-01-01") + draw.integers(0, 6 * 365, count).astype("timedelta64[D]")
    return pl.DataFrame(
        {
            "product_id": np.arange(count),
            "category": draw.choice(CATEGORIES, count),
            "brand": [f"brand-{number:02d}" for number in draw.integers(0, 30, count)],
            "price": np.round(draw.lognormal(3.0, 0.6, count), 2),
            "launch_date": launch,
        }
    )


def sizes(total: int) -> tuple[int, int]:
    """Return the number of customers and of products in a sample of `total` transactions."""
    return max(10, total // TRANSACTIONS_PER_CUSTOMER), max(10, total // TRANSACTIONS_PER_PRODUCT)


def write_sample(root: str, total: int, seed: int) -> dict[str, str]:
    """Write the sample under the root, unless it exists; return the URI of each table.

    Transactions and products are Parquet, customers CSV.
    """
    base = layout.sample(root, "feature-store", f"{total}-{seed}")
    uris = {name: layout.join(base, name) for name in ("transactions", "customers", "products")}
    done = layout.join(base, "_complete")
    if storage.exists(done):
        return uris
    for block in range(-(-total // BLOCK)):
        rows = min(BLOCK, total - block * BLOCK)
        table = sample_transactions(rows, seed, block, total).to_arrow()
        storage.write_parquet(table, layout.join(uris["transactions"], f"part-{block:03d}.parquet"))
    storage.write_bytes(
        layout.join(uris["customers"], "customers.csv"), sample_customers(total, seed).write_csv().encode()
    )
    storage.write_parquet(sample_products(total, seed).to_arrow(), layout.join(uris["products"], "products.parquet"))
    storage.write_bytes(done, b"")
    return uris


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))
