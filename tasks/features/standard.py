"""The standard sources and the two feature groups that come with the project: customers and products.

They are declared like a user's; nothing else in the code knows their names.
"""

from __future__ import annotations

import polars as pl

from tasks.features.definitions import Column, Definitions, DimensionSource, EventSource, FeatureGroup, Window

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
    entity="customer_id",
    source="transactions",
    dimension="customers",
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
        "transaction_std": (0, None),
        "days_active": (0, None),
        "purchase_frequency": (0, None),
        "unique_categories": (0, None),
        "category_diversity": (0, 1),
    },
)

PRODUCT_FEATURES = FeatureGroup(
    name="product-features",
    entity="product_id",
    source="transactions",
    dimension="products",
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
