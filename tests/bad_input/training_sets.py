"""Rows of a user's own (spines) that a test spoils, and the training set that is made of them."""

from __future__ import annotations

import datetime as dt
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Definitions
from tasks.features.standard import STANDARD
from tasks.io import storage
from tasks.store import layout
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.store.reservation import reserve
from tasks.training_sets.definition import FeatureReference, Label, Model, SpineSource
from tasks.training_sets.gate import judge_training_set
from tasks.training_sets.pipeline import ComputedSet, build_training_set
from tasks.training_sets.plan import plan_training_set
from tests.bad_input.shop import Files, Judged, Table, put
from tests.serving.feature_versions import DAY, customers, days, publish_features

STARTED = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
ROWS, ENTITIES = 40, 10
TIMES = days(0, 30, 60)


def features(root: Path) -> None:
    """Publish features of customers 0 to 9 as of `TIMES`."""
    publish_features(str(root), customers(range(ENTITIES), TIMES), buckets=2)


def spine(**changed: Any) -> Table:
    """Columns of a good spine; some of them changed, or None to leave them out."""
    columns: Table = {
        "customer_id": [row % ENTITIES for row in range(ROWS)],
        EVENT_TIME: [DAY + dt.timedelta(days=2 * row, hours=1) for row in range(ROWS)],
        TARGET: [row // 2 % 2 for row in range(ROWS)],
    }
    return {name: values for name, values in {**columns, **changed}.items() if values is not None}


@dataclass
class Joined(Judged):
    """What the job has made of a spine."""

    computed: ComputedSet
    rows: pd.DataFrame


def join(
    root: Path,
    files: Files | str,
    *wanted: str,
    columns: dict[str, str] | None = None,
    label: Label | None = None,
    definitions: Definitions = STANDARD,
    **settings: Any,
) -> Joined:
    """Plan a model, build its training set on Ray and judge it: all that the flow does before it publishes.

    Args:
        root: A store with features.
        files: The spine's, by name, or where they are.
        wanted: Features; total_spent and orders by default.
        columns: Our names to the spine's.
        label: Takes the spine's place.
        definitions: Declared sources, for a label.
        settings: Of the configuration.
    """
    uri = files if isinstance(files, str) else put(root / "spine", files)
    names = wanted or ("customer-features:total_spent", "customer-features:orders")
    model = Model(
        name="churn",
        entity="customer_id",
        spine=label or SpineSource(uri=uri, columns=columns or {}),
        features=tuple(map(FeatureReference.parse, names)),
    )
    config = FeatureStoreConfig(root=str(root), **settings)
    planned = plan_training_set(model, definitions, config, STARTED)
    reservation = reserve(str(root), layout.training_ready_dataset("churn"), "run")
    computed = build_training_set(planned, reservation)
    for balance in computed.balances:
        assert balance.missing == 0, balance
    tables = [read(reservation.uri, file.path) for file in computed.files]
    rejected = [pl.DataFrame(read(reservation.uri, file.path)) for file in computed.rejected_files]
    aside = pl.concat(rejected, how="diagonal_relaxed") if rejected else pl.DataFrame()
    gate = judge_training_set(config, computed, None)
    found = Joined(gate, aside, computed, pa.concat_tables(tables).to_pandas())
    assert found.reasons == dict(computed.balances[0].rejected)
    assert len(found.rows) == computed.rows
    return found


def read(uri: str, path: str) -> pa.Table:
    """One written file."""
    return pq.read_table(io.BytesIO(storage.read_bytes(layout.join(uri, path))))
