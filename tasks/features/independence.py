"""Detection of derived features that use other entities' rows: they would depend on the cut of the work. Pure.

A feature of an entity is sound if its value is the same, to the last bit, in any company: among
all entities, among some of them in another order, alone. It is compared twice: on rows generated from the types, with
ties and nulls, before any row is read; and in the job on a few of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

IntArray = npt.NDArray[np.int64]

ROWS = 12
"""Rows that are compared: an expression is evaluated a few more times on at most this many."""

_VALUES = (3, 1, 4, 1, 8, 5, 9, 2, 6, 5, 7, 3)
_NULLS = (4, 10)
_STEPS = (1, 5, 7, 11)  # they share no divisor with ROWS: each column has all values, in a separate order
_DAY = {"ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}

_WHOLE = np.arange(ROWS)
_SHUFFLED = np.array([7, 2, 11, 0, 5, 9, 3, 10, 1, 6, 8, 4])
COMPANIES = (
    _SHUFFLED,
    _WHOLE[::-1],
    _WHOLE[: ROWS // 2],
    _WHOLE[ROWS // 2 :],
    _WHOLE[::2],
    _WHOLE[1::3],
    *(_WHOLE[row : row + 1] for row in (0, 1, 4, ROWS - 1)),
)
"""Subsets of the generated rows on which an expression is evaluated together."""


def looks_elsewhere(
    expression: pl.Expr, rows: pl.DataFrame, values: pl.Series, companies: Sequence[IntArray] | None = None
) -> bool:
    """Return True if the values of some entities depend on the others evaluated with them, or on their order.

    Args:
        expression: A derived feature.
        rows: Its input, a row an entity.
        values: Its values for all of them.
        companies: Numbers of rows to evaluate it on together; by default a few in another order, and two alone.

    """
    if companies is None:
        some = np.unique(np.linspace(0, rows.height - 1, ROWS).astype(np.int64)) if rows.height else _WHOLE[:0]
        companies = (some[_SHUFFLED[len(some) > _SHUFFLED]], some[:1], some[-1:]) if len(some) > 1 else ()
    return any(not _same(_evaluated(expression, rows[some]), values.gather(some)) for some in companies)


def _evaluated(expression: pl.Expr, rows: pl.DataFrame) -> pl.Series:
    return rows.with_columns(expression.alias("\x00value"))["\x00value"]


def _same(one: pl.Series, other: pl.Series) -> bool:
    """Return True if two series are equal to the last bit; a null is equal to a null, NaN to NaN."""
    if one.dtype != other.dtype or not one.equals(other, null_equal=True):
        return False
    if not one.dtype.is_float():
        return True
    signs = [np.signbit(series.fill_null(1.0).fill_nan(1.0).to_numpy()) for series in (one, other)]
    return bool(np.array_equal(*signs))


def made_up(schema: pl.Schema, entity: str) -> Iterator[pl.DataFrame]:
    """Yield rows of different entities with a schema's columns: once without nulls, once with some in each column."""
    for nulls in (False, True):
        columns = [pl.Series(entity, _typed(list(range(ROWS)), schema[entity]))]
        for number, (name, kind) in enumerate(schema.items()):
            if name == entity:
                continue
            step = _STEPS[number % len(_STEPS)]
            places = [(row * step + number) % ROWS for row in range(ROWS)]
            values = [None if nulls and place in _NULLS else _VALUES[place] for place in places]
            columns.append(pl.Series(name, _typed(values, kind)))
        yield pl.DataFrame(columns)


def _typed(values: Sequence[int | None], kind: pl.DataType) -> pl.Series:
    """Return small whole numbers as values of a type, equal ones as equal; nulls if the type can't represent them."""
    numbers = pl.Series(values, dtype=pl.Int64)
    if kind.is_float():
        numbers = numbers.cast(pl.Float64) * 1.375 - 4.2
    elif isinstance(kind, pl.Datetime | pl.Duration):
        numbers = numbers * _DAY[kind.time_unit]
    elif kind == pl.Boolean:
        numbers = numbers % 2
    elif isinstance(kind, pl.Enum):
        return pl.Series(
            [None if value is None else kind.categories[value % len(kind.categories)] for value in values]
        ).cast(kind)
    elif kind in (pl.Categorical, pl.Binary):
        return numbers.cast(pl.String).cast(kind)
    try:
        return numbers.cast(kind, strict=False)
    except pl.exceptions.PolarsError:
        return pl.Series([None] * len(values), dtype=kind)
