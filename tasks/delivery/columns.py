"""Values of a source's columns as they are encoded, and their statistics. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.delivery.source import is_text
from tasks.quality.moments import Moments
from tasks.quality.profile import ColumnPartial, TableProfile, profile_table
from tasks.quality.sketch import TopValues

FloatArray = npt.NDArray[np.float32]

MOST_VALUES = 1 << 16
"""Maximum number of distinct values of a text column that are counted."""
LONGEST_VALUE = 1024
"""Bytes of the longest text that is counted."""


def numbers(column: pa.ChunkedArray) -> FloatArray:
    """Return numbers or booleans as float32, shape (n,); NaN where they are missing, infinite or too large."""
    if pt.is_boolean(column.type):
        column = column.cast(pa.uint8())
    elif pt.is_decimal(column.type):
        column = column.cast(pa.float64())
    values: FloatArray = pc.fill_null(column.cast(pa.float32(), safe=False), math.nan).to_numpy()
    if not (finite := np.isfinite(values)).all():
        values = np.where(finite, values, np.float32(math.nan))
    return values


def is_missing(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return a mask of missing or unusable values of a feature or a target, shape (n,)."""
    if pt.is_floating(column.type) or pt.is_decimal(column.type):
        return np.isnan(numbers(column))
    missing: npt.NDArray[np.bool_] = column.is_null().to_numpy()
    return missing


def text_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text, booleans ('true', 'false') or whole numbers as text."""
    if pt.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_string())


def top_values(texts: pa.ChunkedArray, capacity: int) -> TopValues:
    """Return counts of distinct texts, up to a number of them."""
    values, counts = texts.drop_null().value_counts().flatten()
    return TopValues.of(values, counts, capacity, LONGEST_VALUE)


def profile_features(
    rows: pa.Table, columns: Sequence[str], chosen: npt.NDArray[np.bool_] | None = None
) -> TableProfile:
    """Return the profile of feature columns, or of a target, as encoded: missing values count as null.

    Args:
        rows: Rows to profile.
        columns: Names of the columns.
        chosen: Mask of the rows that count, shape (n,); all of them if not given.
    """
    partials = {}
    for name in columns:  # one at a time: together they would take as much memory as the rows
        column = rows[name] if chosen is None else rows[name].filter(pa.array(chosen))
        cleaned = _cleaned(column)
        partial = profile_table(pa.table({name: cleaned})).partial(name)
        partials[name] = replace(partial, top=top_values(cleaned, MOST_VALUES)) if partial.kind == "string" else partial
    return TableProfile(rows.num_rows if chosen is None else int(chosen.sum()), partials)


def _cleaned(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text, booleans, or float64 with null for missing values."""
    if is_text(column.type):
        return text_of(column)
    if pt.is_boolean(column.type):
        return column
    values = numbers(column).astype(np.float64)
    return pa.chunked_array([pa.array(values, mask=np.isnan(values))])


def moments_of(partial: ColumnPartial) -> Moments:
    """Return the moments of numbers or booleans."""
    return flag_moments(*_ones(partial)) if partial.kind == "boolean" else partial.moments or Moments()


def bounds_of(partial: ColumnPartial) -> tuple[float, float]:
    """Return the smallest and largest number or boolean; zeros if there is none."""
    if partial.kind == "boolean":
        return flag_bounds(*_ones(partial))
    sketch = partial.quantiles
    return (float(sketch.lows[0]), float(sketch.highs[-1])) if sketch and sketch.count else (0.0, 0.0)


def _ones(partial: ColumnPartial) -> tuple[int, int]:
    """Return the number of true booleans, and of all."""
    counts: Mapping[str, int] = (partial.top.counts if partial.top else None) or {}
    return counts.get("true", 0), sum(counts.values())


def flag_moments(ones: int, rows: int) -> Moments:
    """Return the moments of a column that is 1 in some rows, and 0 in the others."""
    one = Moments.of(np.ones(1))
    return Moments(rows, one.total * ones, one.squares * ones)


def flag_bounds(ones: int, rows: int) -> tuple[float, float]:
    """Return the smallest and largest value of a column that is 1 in some rows, and 0 in the others."""
    return float(0 < rows == ones), float(ones > 0)
