"""Row quality: missing values, outliers against global fences, score and readiness. Pure.

The fences come from quantiles over the whole dataset (Tukey's rule: outside [Q1 − 1.5·IQR, Q3 + 1.5·IQR];
J. W. Tukey, Exploratory Data Analysis, 1977), never from one block.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.quality.profile import profile_table
from tasks.quality.sketch import QuantileSketch
from tasks.store.layout import AS_OF, MISSING, OUTLYING, READY, SCORE
from tasks.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Fences:
    """Lower and upper bound of a column's usual values."""

    lower: float
    upper: float


def fences(
    columns: Sequence[str], quantiles: Callable[[str, Sequence[float]], npt.NDArray[np.float64]]
) -> dict[str, Fences]:
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

        def recorded(name: str, levels: Sequence[float]) -> npt.NDArray[np.float64]:
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
