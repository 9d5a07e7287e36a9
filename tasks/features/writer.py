"""Rows of a bucket scored and written: quality of each row, plain types, one file. Pure, but for the files.

Quality of a row: missing values, outliers against global fences, score and readiness. The fences come from quantiles
over the whole dataset (Tukey's rule: outside [Q1 − 1.5·IQR, Q3 + 1.5·IQR]; J. W. Tukey, Exploratory Data Analysis,
1977), never from one block.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.engine.partition import frame_of
from tasks.features.config import Thresholds
from tasks.features.plan import GroupPlan
from tasks.features.rows import TIME
from tasks.io import storage
from tasks.io.tensors import Float64Array
from tasks.quality.profile import TableProfile, profile_table
from tasks.quality.sketch import QuantileSketch
from tasks.store.layout import AS_OF, CREATED, MISSING, OUTLYING, READY, SCORE, VERSION
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.reservation import Reservation


@dataclass(frozen=True, slots=True)
class Fences:
    """Lower and upper bound of a column's usual values."""

    lower: float
    upper: float


def fences(columns: Sequence[str], quantiles: Callable[[str, Sequence[float]], Float64Array]) -> dict[str, Fences]:
    """Return Tukey's fences per numeric column; a column without finite values has none.

    Args:
        columns: Numeric columns.
        quantiles: Returns the global quantiles (column, levels) → values; NaN if there is no finite value.
    """
    found = {}
    for column in columns:
        quartiles = quantiles(column, (0.25, 0.75))
        if quartiles[0] <= quartiles[1]:
            with np.errstate(over="ignore"):  # fences of the largest floats are infinite: nothing is outside
                reach = 1.5 * (quartiles[1] - quartiles[0])
                found[column] = Fences(float(quartiles[0] - reach), float(quartiles[1] + reach))
    return found


def fences_of(sketches: Mapping[str, QuantileSketch]) -> dict[str, Fences]:
    """Return the fences of columns from the sketches of all their values."""
    return fences(list(sketches), lambda column, levels: sketches[column].quantiles(levels))


def fences_again(
    manifest: Manifest, as_of: Sequence[dt.datetime], columns: Sequence[str], rows: Callable[[], Iterable[pa.Table]]
) -> dict[dt.datetime, dict[str, Fences]]:
    """Recompute the fences of a published version bit by bit, as quantiles depend on the values alone.

    Args:
        manifest: The version's; with one as-of time its profile has the quartiles.
        as_of: Times of the version whose fences are wanted, UTC.
        columns: Numeric features.
        rows: Returns the stored `columns` and as_of, table by table; called if the version has several times.

    Returns:
        The fences of each time.
    """
    if len(manifest.as_of) <= 1:

        def recorded(name: str, levels: Sequence[float]) -> Float64Array:
            known = manifest.profile[name].quantiles if name in manifest.profile else {}
            return np.array([known.get(str(level), np.nan) for level in levels])

        return dict.fromkeys(as_of, fences(columns, recorded))
    parts: dict[dt.datetime, dict[str, list[QuantileSketch]]]
    parts = {moment: {name: [] for name in columns} for moment in as_of}
    for table in rows():
        for moment, own in parts.items():
            profile = profile_table(table.filter(pc.equal(table[AS_OF], moment)).select(columns))
            for name, sketches in own.items():
                sketches.append(profile.sketch(name))
    return {
        moment: fences_of({name: QuantileSketch.merge_all(sketches) for name, sketches in own.items()})
        for moment, own in parts.items()
    }


def score_rows(
    frame: pl.DataFrame,
    features: Sequence[str],
    bounds: Mapping[str, Fences],
    *,
    missing_below: float,
    outliers_below: float,
    score_above: float,
) -> pl.DataFrame:
    """Add the quality columns to each row.

    Args:
        frame: One row an entity.
        features: Columns that are judged: missing_value_ratio is the share of them that is null or NaN.
        bounds: Fences of the numeric ones among them: outlier_ratio is the share of these columns that is outside
            (a missing value is not an outlier). 0 if there are none.
        missing_below: A row is ready only with missing_value_ratio below this,
        outliers_below: and outlier_ratio below this,
        score_above: and feature_quality_score above this, which is 1 − (missing_value_ratio + outlier_ratio)/2.

    Returns:
        frame and missing_value_ratio, outlier_ratio, feature_quality_score (float64), is_training_ready (bool).
    """
    missing = [
        pl.col(c).is_null() | pl.col(c).is_nan() if frame.schema[c].is_float() else pl.col(c).is_null()
        for c in features
    ]
    outside = [
        ((pl.col(c) < bounds[c].lower) | (pl.col(c) > bounds[c].upper)).fill_null(value=False)
        for c in features
        if c in bounds
    ]
    # NaN compares as greater than everything in Polars; it is missing, not an outlier.
    outside = [
        flag & pl.col(c).is_not_nan().fill_null(value=False) if frame.schema[c].is_float() else flag
        for flag, c in zip(outside, [c for c in features if c in bounds], strict=True)
    ]
    return (
        frame.with_columns(_share(missing).alias(MISSING), _share(outside).alias(OUTLYING))
        .with_columns((1 - (pl.col(MISSING) + pl.col(OUTLYING)) / 2).alias(SCORE))
        .with_columns(
            (
                (pl.col(MISSING) < missing_below) & (pl.col(OUTLYING) < outliers_below) & (pl.col(SCORE) > score_above)
            ).alias(READY)
        )
    )


def _share(flags: list[pl.Expr]) -> pl.Expr:
    return pl.sum_horizontal(f.cast(pl.Int64) for f in flags) / len(flags) if flags else pl.lit(0.0)


ROW_GROUP = 8192
"""Rows of a row group: a look-up of one entity decodes one, and a hundred groups' statistics are quick to search."""

_NUMERIC = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal)


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """A written data file; profile has the columns that weren't profiled for the fences.

    schema, profile: until they are added to those of other files.
    """

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
    final = to_arrow(scored_rows(frame_of(table), planned, bounds, thresholds))
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
