"""Models as a user declares them in YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def churn_and(at: str, days: int, features: Sequence[str], ttl_days: int, **others: dict[str, Any]) -> str:
    """YAML of the model `churn` with some features of customers, of its label, and of other models."""
    label = {"entity": "customer_id", "at": at, "days": days, "target": "COUNT(*) = 0"}
    references = [f"customer-features:{name}" for name in features]
    churn = {"label": "churned", "features": references, "ttl_days": ttl_days}
    return yaml.safe_dump({"labels": {"churned": label}, "models": {"churn": churn, **others}})
