"""Feature versions as the flow writes them, made by hand: partitioned by entity, sorted by (entity, as_of)."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from tasks.engine.partition import split_by_key
from tasks.io import storage
from tasks.quality.profile import merge_profiles, profile_table
from tasks.store import layout, versions
from tasks.store.manifest import (
    FileEntry,
    InputRecord,
    Manifest,
    Partition,
    RowBalance,
)
from tests.manifests import manifest

GROUP = "customer-features"
ENTITY = "customer_id"
DAY = dt.datetime(2024, 1, 31, tzinfo=dt.UTC)


def days(*numbers: int) -> tuple[dt.datetime, ...]:
    """Times some days after `DAY`."""
    return tuple(DAY + dt.timedelta(days=number) for number in numbers)


def customers(numbers: Sequence[int], as_of: Sequence[dt.datetime] = (DAY,), scale: float = 1.0) -> pl.DataFrame:
    """Features of customers at some times; a value tells whose and when it is."""
    rows = pl.DataFrame({ENTITY: numbers}, schema={ENTITY: pl.Int64}).join(
        pl.DataFrame({"as_of": as_of}, schema={"as_of": pl.Datetime("us", "UTC")}), how="cross"
    )
    day = (pl.col("as_of") - DAY).dt.total_days()
    return rows.select(
        ENTITY,
        ((pl.col(ENTITY) * 1000 + day) * scale).cast(pl.Float64).alias("total_spent"),
        (pl.col(ENTITY) % 7).alias("orders"),
        pl.format("city {}", pl.col(ENTITY) % 3).alias("city"),
        pl.lit(True).alias("is_training_ready"),
        "as_of",
    )


def publish_features(
    root: str,
    frame: pl.DataFrame,
    group: str = GROUP,
    entity: str = ENTITY,
    *,
    buckets: int | None = 4,
    row_group_size: int = 8192,
    created: dt.datetime = DAY,
    definition: Mapping[str, Any] | None = None,
    inputs: tuple[InputRecord, ...] = (),
    dataset: str | None = None,
) -> Manifest:
    """Publish the rows as the next version; `buckets` None: in one file, of no partition."""
    reservation = versions.reserve(root, dataset or layout.feature_dataset(group), uuid.uuid4().hex)
    stamped = frame.with_columns(
        pl.lit(created, pl.Datetime("us", "UTC")).alias("feature_creation_date"),
        pl.lit(f"v{reservation.version}").alias("feature_version"),
    )
    parts = split_by_key(stamped, entity, buckets) if buckets else [stamped]
    files: list[FileEntry] = []
    profiles = []
    schema = _plain(stamped).schema
    for number, part in enumerate(parts):
        if part.height:
            table = _plain(part.sort(entity, "as_of") if buckets else part)
            written = storage.write_parquet(table, reservation.data_uri(number), row_group_size=row_group_size)
            files.append(reservation.entry(written))
            profiles.append(profile_table(table))
    times = tuple(frame["as_of"].unique().sort().to_list())
    features = [name for name in frame.columns if name not in (entity, "as_of", "is_training_ready")]
    version = manifest(
        reservation,
        schema,
        created_at=created,
        files=tuple(files),
        partition=Partition(key=entity, buckets=buckets) if buckets else None,
        as_of=times,
        balances=(RowBalance(name="transactions", rows_in=frame.height, rows_out=frame.height),),
        profile=merge_profiles(profiles).columns(),
        inputs=inputs,
        config={"as_of": [t.isoformat() for t in times], "seed": 0},
        definition=definition
        or {
            "name": group,
            "entity": entity,
            "source": "transactions",
            "features": {name: f'col("{name}")' for name in features},
        },
    )
    return versions.commit(reservation, version)


def _plain(frame: pl.DataFrame) -> pa.Table:
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    kinds = {pa.large_string(): pa.string()}
    return table.cast(pa.schema([field.with_type(kinds.get(field.type, field.type)) for field in table.schema]))
