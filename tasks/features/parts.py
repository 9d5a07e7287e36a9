"""The rows of a bucket as they are written: plain types, stamped, scored, one file. Pure, but for the files."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.features.config import Thresholds
from tasks.features.plan import GroupPlan
from tasks.features.rows import TIME
from tasks.features.scoring import Fences, score_rows
from tasks.io import storage
from tasks.quality.profile import TableProfile, profile_table
from tasks.quality.sketch import QuantileSketch
from tasks.store.layout import AS_OF, CREATED, READY, VERSION
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation

ROW_GROUP = 8192
"""Rows of a row group: a look-up of one entity decodes one, and a hundred groups' statistics are quick to search."""

_NUMERIC = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal)


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """A written data file; profile has the columns that weren't profiled for the fences."""

    entry: FileEntry
    schema: pa.Schema
    profile: TableProfile
    ready: int


def write_part(
    table: pa.Table,
    part: int,
    *,
    planned: GroupPlan,
    reservation: Reservation,
    bounds: Mapping[dt.datetime, Mapping[str, Fences]],
    thresholds: Thresholds,
) -> WrittenPart:
    """Score the rows of one part against the global fences of their as-of time and write them as one file.

    Rows are sorted by entity and as_of, in row groups so small that a look-up of one entity reads little.
    """
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    final = to_arrow(scored_rows(frame, planned, bounds, thresholds))
    written = storage.write_parquet(final, reservation.data_uri(part), row_group_size=ROW_GROUP)
    entry = reservation.entry(written)
    profiled = set(numeric_features(table.schema, planned))
    rest = final.select([name for name in final.column_names if name not in profiled])
    return WrittenPart(entry, final.schema, profile_table(rest), int(final[READY].to_numpy().sum()))


def stamped(features: pl.DataFrame, created: dt.datetime, version: int) -> pl.DataFrame:
    """Return features with the time of their computation, and their version."""
    return features.with_columns(pl.lit(created, TIME).alias(CREATED), pl.lit(f"v{version}").alias(VERSION))


def scored_rows(
    frame: pl.DataFrame,
    planned: GroupPlan,
    bounds: Mapping[dt.datetime, Mapping[str, Fences]],
    thresholds: Thresholds,
) -> pl.DataFrame:
    """Return stamped rows with their quality, judged against the fences of their as-of time, in written form."""
    names = feature_columns(frame.columns, planned)
    snapshots = frame.partition_by(AS_OF, maintain_order=True) if frame.height else [frame]
    scored = pl.concat(
        score_rows(
            rows,
            names,
            bounds[rows[AS_OF][0]] if rows.height else {},
            missing_below=thresholds.missing,
            outliers_below=thresholds.outliers,
            score_above=thresholds.score,
        )
        for rows in snapshots
    )
    scored = scored.select(pl.exclude(AS_OF, CREATED, VERSION), AS_OF, CREATED, VERSION)
    return scored.sort(planned.group.entity, AS_OF)


def by_time(table: pa.Table, as_of: Sequence[dt.datetime]) -> list[pa.Table]:
    """Return a table, sorted by as_of, as one piece for each time; some may have no row."""
    ticks = table[AS_OF].cast(pa.int64()).to_numpy()
    times = pa.array(as_of, table.schema.field(AS_OF).type).cast(pa.int64()).to_numpy()
    ends = np.searchsorted(ticks, times, side="right").tolist()
    return [table.slice(start, end - start) for start, end in pairwise([0, *ends])]


def repeated_keys(frame: pl.DataFrame, entity: str) -> int:
    """Return the number of rows with the entity of another row of the same as-of time, beyond the first."""
    return frame.height - frame.select(entity, AS_OF).n_unique()


def sketches(profile: TableProfile) -> dict[str, QuantileSketch]:
    """Return the quantiles of all columns of a profile, each numeric."""
    return {name: profile.sketch(name) for name in profile.partials}


def feature_columns(names: Sequence[str], planned: GroupPlan) -> list[str]:
    """Return the columns that are judged as features: the group's and its dimension's."""
    dimension = [c.name for c in planned.dimension.rows.columns] if planned.dimension is not None else []
    wanted = {*planned.group.feature_names, *dimension} - {planned.group.entity}
    return [name for name in names if name in wanted]


def numeric_features(schema: pa.Schema, planned: GroupPlan) -> list[str]:
    """Return the features with quantiles, and so with fences."""
    return [
        name
        for name in feature_columns(schema.names, planned)
        if any(is_kind(schema.field(name).type) for is_kind in _NUMERIC)
    ]


def to_arrow(frame: pl.DataFrame) -> pa.Table:
    """Return an Arrow table with the plain types that every Parquet reader knows."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    plain = [
        field.with_type(pa.string()) if pa.types.is_large_string(field.type) else field.with_type(field.type)
        for field in table.schema
    ]
    return table.cast(pa.schema(plain))


def write_rejected(reservation: Reservation, source: str, index: int, rows: pl.DataFrame) -> FileEntry:
    """Write rejected rows beside the version that lacks them."""
    return reservation.entry(
        storage.write_parquet(to_arrow(_uncategorised(rows)), reservation.rejected_uri(source, index))
    )


def _uncategorised(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))
