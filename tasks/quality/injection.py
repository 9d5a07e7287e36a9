"""Faults of a stated size in a copy of a table. Pure and deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.io.hashing import stable_hash

BoolArray = npt.NDArray[np.bool_]

NULLS, DOUBLED, ODD, LOST, BAD, ONE_CLASS = 0.6, 0.2, 0.01, 0.1, 0.4, 0.9
"""Shares: of values made null, and of rows put in twice, given odd values, lost, made unusable, put into one class.

Chosen so that any sound gate refuses them, or at least warns.
"""
SHIFT = 3.0
"""Standard deviations of a shift, chosen for the same reason."""


def some(rows: int, share: float) -> BoolArray:
    """Choose a share of some rows, rounded up and spread by a hash; shape (rows,)."""
    hit = np.zeros(rows, dtype=np.bool_)
    count = int(np.ceil(round(share * rows, 6)))
    hit[np.argsort(stable_hash(pa.array(np.arange(rows))), kind="stable")[:count]] = True
    return hit


def with_values(table: pa.Table, columns: Sequence[str], value: Any, where: float | BoolArray) -> pa.Table:
    """Put a value (None: null) into columns, of their type: in a share of the rows, or in those of a mask."""
    hit = pa.array(_mask(table, where))
    for name in columns:
        kind = table.schema.field(name).type
        table = with_column(table, name, pc.if_else(hit, pa.scalar(value, kind), table[name]))
    return table


def shifted(table: pa.Table, column: str, distance: float, hit: BoolArray | None = None) -> pa.Table:
    """Move a number by a distance in some rows, or in all; integers are rounded and stay within their type."""
    kind = table.schema.field(column).type
    values = table[column].combine_chunks()
    known = values.is_valid().to_numpy(zero_copy_only=False)
    numbers = values.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False).copy()
    numbers[slice(None) if hit is None else hit] += distance
    if pt.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        edge = min(float(limits.max), 2.0**62)
        numbers = np.clip(np.round(numbers), max(float(limits.min), -(2.0**62)), edge)
    return with_column(table, column, pa.array(numbers, mask=~known).cast(kind, safe=False))


def lost(table: pa.Table, where: float | BoolArray) -> pa.Table:
    """Remove rows: a share of them, or those of a mask."""
    return table.filter(pa.array(~_mask(table, where)))


def _mask(table: pa.Table, where: float | BoolArray) -> BoolArray:
    return some(table.num_rows, where) if isinstance(where, float) else where


def with_column(table: pa.Table, column: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Replace the values and type of a column; its position stays."""
    return table.set_column(table.schema.get_field_index(column), pa.field(column, values.type), values)


def is_number(kind: pa.DataType) -> bool:
    """Check that a column of this type can be shifted."""
    return bool(pt.is_integer(kind) or pt.is_floating(kind))


def spread(table: pa.Table, column: str) -> float:
    """Return the standard deviation of a number's finite values, 0 without any."""
    values = table[column].drop_null().cast(pa.float64(), safe=False).to_numpy()
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) else 0.0
