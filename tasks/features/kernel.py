"""A feature group evaluated on whole entities, as of one time or several. Pure: one bucket of entities at a time.

Every row of an entity is in the same frame (the shuffle ensures that), so the expressions see all of them, and
the rows of an entity come in the order of the files, so that sums of floats don't depend on the cut of the work.

Several times are evaluated in one pass: between two of them most entities have no event, so their aggregations over all
events can't have changed and are kept; windows, which move with the time, and derived features are evaluated anew. Each
time's features are those of `evaluate` on the events up to it, to the last bit.

A derived feature must not use other entities' rows, as it would depend on the cut of the work. It is sound if its value
is the same, to the last bit, in any company: among all entities, among some of them in another order, alone. It is
compared twice: on rows generated from the types, with ties and nulls, before any row is read; and in the job on a few
of its rows.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from tasks.features.definitions import FeatureGroup, JoinHow
from tasks.features.rows import REASON, TIME
from tasks.io.errors import DefinitionError
from tasks.io.tensors import BoolArray, Int64Array
from tasks.store.layout import AS_OF

After: TypeAlias = Callable[[dt.datetime], pl.DataFrame]
"""Gives the events after a time, up to the as-of time."""

_FAULTS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, ArithmeticError, LookupError, TypeError, ValueError)
"""Exceptions of expressions for unexpected values; a Python function in one raises its own."""


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Entities with their dimension columns, and those without a dimension row (with `_reason`)."""

    kept: pl.DataFrame
    rejected: pl.DataFrame
    unmatched: int


def evaluate(group: FeatureGroup, events: pl.DataFrame, time: str, as_of: dt.datetime) -> pl.DataFrame:
    """Compute all features of a group.

    Args:
        group: The declaration.
        events: All rows of some entities: the group's `event_columns`; no null in the entity column.
        time: Name of the event time's column.
        as_of: Time (UTC) up to which the rows reach; windows end here.

    Returns:
        One row an entity, sorted by it: the entity column and the features in order of declaration;
        integers as int64, floats as float64, categories as strings.

    Raises:
        DefinitionError: An expression can't be evaluated, or gives several values an entity.
    """
    plain = aggregate(group, events, as_of)
    return complete(group, plain, events, as_of, lambda start: events.filter(pl.col(time) > start))


def aggregate(group: FeatureGroup, events: pl.DataFrame, as_of: dt.datetime) -> pl.DataFrame:
    """Compute the plain aggregations alone: a row an entity, in any order, in the expressions' types."""
    return _aggregate(group, _with_as_of(group.features, events, as_of), group.features, "")


def complete(
    group: FeatureGroup, plain: pl.DataFrame, events: pl.DataFrame, as_of: dt.datetime, after: After
) -> pl.DataFrame:
    """Add windows and derived features to the plain aggregations.

    Args:
        group: The declaration.
        plain: Result of `aggregate` over all events up to as_of.
        events: Events, for their types.
        as_of: Time (UTC) up to which the rows reach.
        after: The events after a time and up to as_of.

    Returns:
        As `evaluate`.
    """
    return _plain_types(_derive(group, _windowed(group, plain, events, as_of, after), as_of)).sort(group.entity)


def check_derived(group: FeatureGroup, events: pl.DataFrame, as_of: dt.datetime) -> None:
    """Check on generated rows that derived features use no other entity, as soon as the events' types are known.

    Expressions that can't be evaluated on them, such as on text that must be a date, are judged by the job on its rows.

    Args:
        group: The declaration.
        events: No rows, with the columns and types of the events that the group reads.
        as_of: An as-of time, UTC.

    Raises:
        DefinitionError: a derived feature uses other entities.
    """
    if not group.derived:
        return
    try:
        features = _windowed(group, aggregate(group, events, as_of), events, as_of, lambda _: events)
    except (DefinitionError, *_FAULTS):
        return
    for rows in made_up(features.schema, group.entity):
        derived = rows.with_columns(pl.lit(as_of, TIME).alias(AS_OF))
        for name in group.derived:
            try:
                derived = _derived(group, name, derived, COMPANIES)
            except DefinitionError:
                raise
            except _FAULTS:
                break


def _windowed(
    group: FeatureGroup, plain: pl.DataFrame, events: pl.DataFrame, as_of: dt.datetime, after: After
) -> pl.DataFrame:
    """Return the plain aggregations with those over windows."""
    features = plain
    for window in group.windows:
        inside = _with_as_of(window.features, after(as_of - dt.timedelta(days=window.days)), as_of)
        suffix = f"_{window.days}d"
        over_nothing = _over_no_rows(_with_as_of(window.features, events.clear(), as_of), window.features, suffix)
        features = features.join(
            _aggregate(group, inside, window.features, suffix), on=group.entity, how="left", maintain_order="left"
        ).with_columns(pl.col(name).fill_null(value) for name, value in over_nothing.items() if value is not None)
    return features


def uses_as_of(features: Mapping[str, pl.Expr]) -> bool:
    """Return True if an expression uses the as-of time, so that its value changes without any new event."""
    return any(AS_OF in expression.meta.root_names() for expression in features.values())


def join_dimension(group: FeatureGroup, features: pl.DataFrame, dimension: pl.DataFrame, how: JoinHow) -> JoinedRows:
    """Join the group's dimension rows to its entities.

    Args:
        group: The declaration; the dimension's key column must have the entity's name.
        features: One row an entity.
        dimension: One row a key.
        how: 'inner': an entity without dimension row is rejected (reason `no_<dimension>_row`, features kept);
            'left': it stays, with nulls.
    """
    group.check_dimension(dimension.columns)
    unmatched = features.join(dimension.select(group.entity), on=group.entity, how="anti", maintain_order="left")
    kept = features.join(dimension, on=group.entity, how=how, maintain_order="left")
    reason = pl.lit(f"no_{group.dimension}_row").alias(REASON)
    rejected = unmatched if how == "inner" else unmatched.clear()
    return JoinedRows(_plain_types(kept), rejected.with_columns(reason), unmatched.height)


_GATHERED = "\x00gathered"


def _with_as_of(features: Mapping[str, pl.Expr], events: pl.DataFrame, as_of: dt.datetime) -> pl.DataFrame:
    return events.with_columns(pl.lit(as_of, TIME).alias(AS_OF)) if uses_as_of(features) else events


def _aggregate(group: FeatureGroup, events: pl.DataFrame, features: Mapping[str, pl.Expr], suffix: str) -> pl.DataFrame:
    named = [expression.alias(name + suffix) for name, expression in features.items()]
    # If all expressions are as simple as a sum, Polars (2.1) adds partial sums in an order that differs from run
    # to run, and with it the last bits. A more complex one makes it gather each entity's rows first, at no cost.
    gathered = pl.col(group.entity).head(1).len().alias(_GATHERED)
    try:
        aggregated = events.group_by(group.entity).agg(*named, gathered).drop(_GATHERED)
    except pl.exceptions.PolarsError as fault:
        raise _refused(group, features, events, fault) from fault
    for name, dtype in aggregated.schema.items():
        if dtype == pl.List:
            raise DefinitionError(
                f"feature group '{group.name}': '{name}' gives a list for each {group.entity}, not one value; "
                f"end the expression in an aggregation such as .mean(), .last() or .n_unique()"
            )
    return aggregated


def _over_no_rows(events: pl.DataFrame, features: Mapping[str, pl.Expr], suffix: str) -> dict[str, object]:
    """Return the value of each expression over no rows: 0 for a count or a sum, None for a mean."""
    try:
        return events.clear().select(e.alias(name + suffix) for name, e in features.items()).row(0, named=True)
    except (pl.exceptions.PolarsError, IndexError):
        return {name + suffix: None for name in features}


def _refused(
    group: FeatureGroup, features: Mapping[str, pl.Expr], events: pl.DataFrame, fault: Exception
) -> DefinitionError:
    """Find the faulty feature, by evaluating them one by one on no rows."""
    for name, expression in features.items():
        try:
            events.clear().group_by(group.entity).agg(expression.alias(name))
        except pl.exceptions.PolarsError as own:
            fault, culprit = own, f"feature '{name}' = {expression}"
            break
    else:
        culprit = f"features {', '.join(features)}"
    return DefinitionError(f"feature group '{group.name}': {culprit} can't be evaluated: {fault}")


def _derive(group: FeatureGroup, features: pl.DataFrame, as_of: dt.datetime) -> pl.DataFrame:
    features = features.with_columns(pl.lit(as_of, TIME).alias(AS_OF))
    for name, expression in group.derived.items():
        try:
            features = _derived(group, name, features)
        except pl.exceptions.PolarsError as fault:
            raise DefinitionError(
                f"feature group '{group.name}': derived feature '{name}' = {expression} can't be evaluated: {fault}; "
                f"it can use the features declared before it and '{AS_OF}'"
            ) from fault
    return features.drop(AS_OF)


def _derived(
    group: FeatureGroup, name: str, before: pl.DataFrame, companies: Sequence[Int64Array] | None = None
) -> pl.DataFrame:
    """Return the features with another one, if its values depend on the same entity's features alone."""
    expression = group.derived[name]
    after = before.with_columns(expression.alias(name))
    if looks_elsewhere(expression, before, after[name], companies):
        raise DefinitionError(
            f"feature group '{group.name}': derived feature '{name}' = {expression} looks at other entities' rows, "
            f"or at their order, and would depend on how they are spread over tasks (--rows-per-bucket); use features "
            f"of the same entity only, and compare entities where the published version is read"
        )
    return after


def _plain_types(frame: pl.DataFrame) -> pl.DataFrame:
    """Widen integers to int64 and floats to float64, categories to strings: every reader supports these."""
    casts = []
    for name, dtype in frame.schema.items():
        if dtype.is_integer() and dtype not in (pl.Int64, pl.UInt64):
            casts.append(pl.col(name).cast(pl.Int64))
        elif dtype == pl.Float32:
            casts.append(pl.col(name).cast(pl.Float64))
        elif dtype in (pl.Categorical, pl.Enum):
            casts.append(pl.col(name).cast(pl.String))
    return frame.with_columns(casts)


_CODE = "\x00code"


def evaluate_history(
    group: FeatureGroup, events: pl.DataFrame, time: str, as_of: Sequence[dt.datetime]
) -> Iterator[pl.DataFrame]:
    """Compute all features of a group as of each time.

    Args:
        group: The declaration.
        events: All rows of some entities, as `kernel.evaluate` takes them, up to the last time.
        time: Name of the event time's column.
        as_of: Times, UTC, ascending, at least one.

    Yields:
        For each time the result of `kernel.evaluate` for the events up to it: an entity without one has no row.

    Raises:
        DefinitionError: as `kernel.evaluate`.
    """
    if len(as_of) == 1:
        yield evaluate(group, events, time, as_of[0])
        return
    ticks = events[time].to_physical().to_numpy()
    # Number of the first time that an event counts for.
    first = np.searchsorted(_ticks(as_of), ticks, side="left")
    codes = _codes(events, group.entity)
    plain: pl.DataFrame | None = None
    for number, moment in enumerate(as_of):
        counts = first <= number
        if plain is None or uses_as_of(group.features):
            plain = aggregate(group, events.filter(pl.Series(counts)), moment)
        else:
            plain = _renewed(plain, group, events, moment, counts & _of_same_entities(codes, first == number))

        def after(start: dt.datetime, counts: BoolArray = counts) -> pl.DataFrame:
            return events.filter(pl.Series(counts & (ticks > _ticks([start])[0])))

        yield complete(group, plain, events, moment, after)


def _renewed(
    plain: pl.DataFrame, group: FeatureGroup, events: pl.DataFrame, as_of: dt.datetime, rows: BoolArray
) -> pl.DataFrame:
    """Return the plain aggregations, recomputed for some entities; rows: all events that count of these entities."""
    if not rows.any():
        return plain
    fresh = aggregate(group, events.filter(pl.Series(rows)), as_of)
    return pl.concat([plain.join(fresh, on=group.entity, how="anti"), fresh])


def _of_same_entities(codes: npt.NDArray[np.uint32], rows: BoolArray) -> BoolArray:
    """Return a mask of all rows of the entities of some rows."""
    touched = np.zeros(int(codes.max(initial=0)) + 1, dtype=bool)
    touched[codes[rows]] = True
    return touched[codes]


def _codes(events: pl.DataFrame, entity: str) -> npt.NDArray[np.uint32]:
    """Return a small number for each row's entity."""
    keys = events.select(pl.col(entity).unique()).with_row_index(_CODE)
    coded = events.select(entity).join(keys, on=entity, how="left", maintain_order="left")
    return coded[_CODE].to_numpy()


def _ticks(times: Sequence[dt.datetime]) -> Int64Array:
    return pl.Series(times, dtype=pl.Datetime("us", "UTC")).to_physical().to_numpy()


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
    expression: pl.Expr, rows: pl.DataFrame, values: pl.Series, companies: Sequence[Int64Array] | None = None
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
