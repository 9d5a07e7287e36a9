"""Transactions for benchmarks, written once and kept: `rows / 50` customers, 20,000 products, one year."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PRODUCTS = 20_000
CATEGORIES = 40
FILE_ROWS = 1_250_000
START = np.datetime64("2025-01-01", "us")
_DAY = 86_400_000_000


def transactions(directory: Path, rows: int) -> Path:
    """Directory of Parquet files with `rows` transactions; made unless it is there.

    Customers' and products' shares are heavy-tailed; 1 % of the amounts are refunds and 0.1 % are null or NaN.
    """
    target = directory / f"transactions-{rows}"
    done = target / "_done.json"
    if done.exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    draw = np.random.Generator(np.random.Philox(key=[7, 0]))
    shares = draw.pareto(1.5, max(1, rows // 50)) + 0.2
    customers = np.cumsum(shares) / shares.sum()
    weights = 1 / (np.arange(PRODUCTS) + 10) ** 0.8
    products = np.cumsum(weights) / weights.sum()
    price = draw.lognormal(2.5, 1, PRODUCTS)
    category = np.array([f"category-{i:02d}" for i in range(CATEGORIES)])[draw.integers(0, CATEGORIES, PRODUCTS)]
    for part, first in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - first)
        product = np.searchsorted(products, draw.random(count))
        amount = np.round(price[product] * draw.lognormal(0, 0.2, count), 2)
        amount[draw.random(count) < 0.01] *= -1
        amount[draw.random(count) < 0.0005] = np.nan
        table = pa.table(
            {
                "customer_id": np.searchsorted(customers, draw.random(count)),
                "product_id": product,
                "amount": pa.array(amount, mask=draw.random(count) < 0.0005),
                "timestamp": pa.array(START + (draw.random(count) * 365 * _DAY).astype("timedelta64[us]")),
                "category": pa.array(category[product]),
            }
        )
        pq.write_table(table, target / f"part-{part:03d}.parquet", row_group_size=FILE_ROWS // 2)
    done.write_text(json.dumps({"rows": rows}))
    return target
