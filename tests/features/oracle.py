"""The two standard feature groups again, by brute force: plain loops over plain values, from what the names mean.

Nothing here is shared with the code under test, so that an error in an expression can't be in both.
"""

from __future__ import annotations

import datetime as dt
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

Row = Mapping[str, Any]


def customer_features(transactions: pd.DataFrame, as_of: dt.datetime) -> pd.DataFrame:
    """One row a customer, sorted by customer."""
    return pd.DataFrame([_customer(key, rows, as_of) for key, rows in _by("customer_id", transactions)])


def product_features(transactions: pd.DataFrame, as_of: dt.datetime) -> pd.DataFrame:
    """One row a product, sorted by product; as_of plays no part, as no feature looks back from it."""
    return pd.DataFrame([_product(key, rows) for key, rows in _by("product_id", transactions)])


def _customer(key: object, rows: Sequence[Row], as_of: dt.datetime) -> dict[str, Any]:
    amounts = [row["amount"] for row in rows]
    mean = math.fsum(amounts) / len(amounts)
    latest = sorted(rows, key=lambda row: (row["timestamp"], row["product_id"], row["amount"]), reverse=True)[:5]
    recent = math.fsum(row["amount"] for row in latest) / len(latest)
    categories = {row["category"] for row in rows if row["category"] is not None}
    days = _days(rows)
    found: dict[str, Any] = {
        "customer_id": key,
        "transaction_count": len(rows),
        "total_spent": math.fsum(amounts),
        "avg_transaction_value": mean,
        "transaction_std": statistics.stdev(amounts) if len(amounts) > 1 else 0.0,
        "days_active": days,
        "unique_categories": len(categories),
        "recent_avg_transaction": recent,
    }
    for window in (7, 30, 90):
        inside = [row["amount"] for row in rows if row["timestamp"] > as_of - dt.timedelta(days=window)]
        found[f"transaction_count_{window}d"] = len(inside)
        found[f"total_spent_{window}d"] = math.fsum(inside)
    found["purchase_frequency"] = len(rows) / max(days, 1)
    found["category_diversity"] = len(categories) / len(rows)
    found["spending_trend"] = "stable"
    if recent - mean > 0.1 * abs(mean):
        found["spending_trend"] = "increasing"
    if mean - recent > 0.1 * abs(mean):
        found["spending_trend"] = "decreasing"
    return found


def _product(key: object, rows: Sequence[Row]) -> dict[str, Any]:
    amounts = [row["amount"] for row in rows]
    purchases = Counter(row["customer_id"] for row in rows)
    days = _days(rows)
    velocity = len(rows) / max(days, 1)
    return {
        "product_id": key,
        "total_sales": len(rows),
        "total_revenue": math.fsum(amounts),
        "avg_sale_price": math.fsum(amounts) / len(amounts),
        "price_variance": statistics.variance(amounts) if len(amounts) > 1 else 0.0,
        "unique_customers": len(purchases),
        "repeat_customer_share": sum(count > 1 for count in purchases.values()) / len(purchases),
        "days_on_sale": days,
        "repeat_purchase_rate": sum(count - 1 for count in purchases.values()) / len(purchases),
        "sales_velocity": velocity,
        "performance_tier": "high" if velocity > 1 else "medium" if velocity > 0.1 else "low",
    }


def _by(key: str, transactions: pd.DataFrame) -> Iterator[tuple[object, list[Row]]]:
    rows = transactions.astype(object).where(transactions.notna(), None).to_dict("records")
    for value in sorted({row[key] for row in rows}):
        yield value, [row for row in rows if row[key] == value]


def _days(rows: Sequence[Row]) -> int:
    times = [row["timestamp"] for row in rows]
    return int((max(times) - min(times)).days)
