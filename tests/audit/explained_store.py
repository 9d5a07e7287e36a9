"""A store with a version of every kind, small and full of flaws, for the tests of `explain`: made by the flows."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from flows.feature_store import feature_store
from flows.image_augmentation import image_augmentation
from flows.training_delivery import training_delivery
from tasks.cli import commands
from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.features.config import FeatureStoreConfig
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.sample import write_sample
from tests.training_sets.declared import churn_and

TIMES = ("2024-03-31", "2024-06-30")
EVENTS = 3_000


@dataclass(frozen=True)
class Store:
    """Where the versions are, and the tables that they were made from."""

    root: str
    place: Path
    images: str

    @property
    def transactions(self) -> list[str]:
        """Files of the events."""
        return sorted(map(str, (self.place / "transactions").iterdir()))


def write_tables(place: Path) -> dict[str, Any]:
    """Transactions in three files, the last of them CSV, and customers; both have rows that are rejected."""
    draw = np.random.default_rng(5)
    seconds = draw.integers(0, 182 * 86_400, EVENTS)
    start = np.datetime64("2024-01-01T00:00:00", "us")
    frame = pd.DataFrame(
        {
            "customer_id": draw.integers(0, 60, EVENTS),
            "product_id": draw.integers(0, 25, EVENTS),
            "timestamp": start + seconds.astype("timedelta64[s]"),
            "amount": np.round(draw.lognormal(3, 1, EVENTS), 2),
            "category": draw.choice(["food", "toys", "books"], EVENTS),
        }
    )
    frame.loc[[10, 1500], "amount"] = np.nan
    frame.loc[[10, 1500], "customer_id"] = 7
    frame.loc[2500, "timestamp"] = pd.NaT
    frame.loc[2500, "customer_id"] = 900  # who has no other event
    frame.loc[2501, "customer_id"] = 901  # whom the customers' table hasn't
    folder = place / "transactions"
    folder.mkdir(parents=True)
    frame[:1000].to_parquet(folder / "a.parquet", row_group_size=300)
    frame[1000:2000].to_parquet(folder / "b.parquet")
    frame[2000:].to_csv(folder / "c.csv", index=False)
    customers = pd.DataFrame({"customer_id": range(60), "age": draw.integers(18, 80, 60), "location": "Lima"})
    customers.loc[3, "location"] = "red \x1b[31malert\x1b[0m"
    twice = pd.DataFrame({"customer_id": [4], "age": [99], "location": ["Oslo"]})
    pd.concat([customers, twice]).to_parquet(place / "customers.parquet", index=False)
    mapping = {name: name for name in ("customer_id", "age", "location")}
    return {
        "transactions": str(folder),
        "customers": str(place / "customers.parquet"),
        "customer_columns": mapping,
    }


def write_models(place: Path) -> str:
    """A model whose rows a label makes, and one whose rows are a table."""
    days = [dt.datetime(2024, 5, 1, tzinfo=dt.UTC), dt.datetime(2024, 2, 1, tzinfo=dt.UTC)]
    spine = pl.DataFrame(
        {
            "customer_id": [number for number in range(40) for _ in days],
            "day": days * 40,
            "target": [float(number % 5) for number in range(80)],
        }
    ).with_columns(pl.when(pl.col("customer_id") != 11).then("target").alias("target"))
    spine.write_parquet(place / "spine.parquet")
    worth = {
        "entity": "customer_id",
        "spine": {"uri": str(place / "spine.parquet"), "columns": {"event_timestamp": "day"}},
        "features": ["customer-features:total_spent", "customer-features:spending_trend"],
    }
    file = place / "models.yaml"
    features = ("transaction_count", "total_spent_90d", "location")
    file.write_text(churn_and("2024-04-15/2024-05-15/1mo", 10, features, 40, worth=worth))
    return str(file)


def make_store(place: Path) -> Store:
    """Run the flows; two feature versions, two training sets, images, and copies of a training set and the images."""
    root = str(place / "root")
    tables = write_tables(place)
    loose = {"drift_warn": 100, "drift_fail": 100, "rejected_warn": 0.0001, "rejected_fail": 0.5}
    loose |= {"orphan_fail": 0.5}
    features = FeatureStoreConfig(
        root=root, as_of=TIMES, groups=("customer-features",), rows_per_bucket=1_000, thresholds=loose, **tables
    )
    feature_store(features.model_copy(update={"as_of": TIMES[:1]}))
    labels = {"unmatched_fail": 1.0, "leak_fail": 1.0, "rejected_fail": 0.5}
    feature_store(
        FeatureStoreConfig(**features.model_dump() | {"models": write_models(place), "label_thresholds": labels})
    )
    sample = write_sample(str(place / "pictures"), 100, 7)
    image_augmentation(
        ImageAugmentationConfig(
            root=root,
            **sample,
            augmentation=Augmentation(size=32, variants=2),
            images_per_file=40,
            seed=3,
            evaluation="augmented",
        )
    )
    deliver = {"root": root, "training": TrainingConfig(enabled=False), "batch_size": 16}
    weighted = {"dataset": "training-datasets/images", "weight": "data_quality_score"}
    training_delivery(DeliveryConfig(file_megabytes=0.02, **weighted, **deliver))
    training_delivery(DeliveryConfig(dataset="feature-store/training-ready/churn", **deliver | {"seed": 4}))
    return Store(root, place, sample["images"])


def explained(store: Store, capsys: pytest.CaptureFixture[str], line: str) -> dict[str, Any]:
    """What `explain` answers in JSON.

    On stderr, what the workers of earlier runs have logged may still come in.
    """
    code = commands.run(["explain", *line.split(), "--json", "--root", store.root])
    out, err = capsys.readouterr()
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def rows(answer: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Rows of a section."""
    found: list[dict[str, Any]] = answer["sections"][section]["rows"]
    return found


def facts(answer: dict[str, Any], section: str) -> dict[str, Any]:
    """Facts of a section."""
    found: dict[str, Any] = answer["sections"][section]["facts"]
    return found


def refused(store: Store, capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str]:
    """The exit code and what is complained of."""
    code = commands.run(["explain", *line.split(), "--root", store.root])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.fixture(scope="session", name="store")
def made_store(stack: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store, made once."""
    return make_store(tmp_path_factory.mktemp("explained"))
