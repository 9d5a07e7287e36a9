"""How rows go wrong: faults of a stated size, put into a copy of a table. Pure, and the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.core.hashing import stable_hash

BoolArray = npt.NDArray[np.bool_]

NULLS, SHIFT, DOUBLED, ODD, LOST = 0.6, 3.0, 0.2, 0.01, 0.1
"""Sizes: share of nulls, standard deviations of a shift, share of rows twice, share of odd values, share of lost rows.

Chosen so that any gate in its senses refuses them, or at least warns.
"""


def some(rows: int, share: float) -> BoolArray:
    """Which of some rows are hit: this share of them, at least one, spread by a hash; shape (rows,)."""
    hit = np.zeros(rows, dtype=np.bool_)
    count = min(rows, max(1, int(np.ceil(round(share * rows, 6)))))
    hit[np.argsort(stable_hash(pa.array(np.arange(rows))), kind="stable")[:count]] = True
    return hit


def with_nulls(table: pa.Table, columns: Sequence[str], share: float = NULLS) -> pa.Table:
    """Nulls in a share of the rows of some columns."""
    hit = pa.array(some(table.num_rows, share))
    for name in columns:
        kind = table.schema.field(name).type
        table = with_column(table, name, pc.if_else(hit, pa.scalar(None, kind), table[name]))
    return table


def with_values(table: pa.Table, column: str, value: Any, share: float = ODD) -> pa.Table:
    """One value in a share of the rows of a column, of the column's own type."""
    kind = table.schema.field(column).type
    hit = pa.array(some(table.num_rows, share))
    return with_column(table, column, pc.if_else(hit, pa.scalar(value, kind), table[column]))


def shifted(table: pa.Table, column: str, distance: float, hit: BoolArray | None = None) -> pa.Table:
    """A number moved by a distance in some rows, or all; whole numbers stay whole, and within their type."""
    kind = table.schema.field(column).type
    values = table[column].combine_chunks()
    known = values.is_valid().to_numpy(zero_copy_only=False)
    numbers = values.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False).copy()
    numbers[slice(None) if hit is None else hit] += distance
    if pt.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        edge = min(float(limits.max), 2.0**62)
        numbers = np.clip(np.round(numbers), max(float(limits.min), -(2.0**62)), edge)
    moved = pa.array(numbers, mask=~known).cast(kind, safe=False)
    return with_column(table, column, moved)


def doubled(table: pa.Table, share: float = DOUBLED) -> pa.Table:
    """A share of the rows twice: their copies follow at the end."""
    return pa.concat_tables([table, table.filter(pa.array(some(table.num_rows, share)))]).combine_chunks()


def lost(table: pa.Table, share: float = LOST) -> pa.Table:
    """A share of the rows taken away."""
    return table.filter(pa.array(~some(table.num_rows, share)))


def renamed(table: pa.Table, column: str) -> pa.Table:
    """A column under another name."""
    return table.rename_columns([f"{name}_renamed" if name == column else name for name in table.column_names])


def with_column(table: pa.Table, column: str, values: Any) -> pa.Table:
    """Other values in a column that stays where it is; its type may become that of the values."""
    place = table.schema.get_field_index(column)
    kind = values.type if isinstance(values, pa.Array | pa.ChunkedArray) else None
    return table.set_column(place, pa.field(column, kind) if kind is not None else column, values)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type can be shifted."""
    return bool(pt.is_integer(kind) or pt.is_floating(kind))


def spread(table: pa.Table, column: str) -> float:
    """Standard deviation of a number's finite values, 0 without any."""
    values = table[column].drop_null().cast(pa.float64(), safe=False).to_numpy()
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) else 0.0


def varied(table: pa.Table, names: Sequence[str]) -> str | None:
    """The first of some columns that is a number and differs between rows; None if there is none."""
    numbers = [name for name in names if is_number(table.schema.field(name).type)]
    return next((name for name in numbers if spread(table, name) > 0), None)
