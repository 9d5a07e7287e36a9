"""A feature group evaluated on whole entities. Pure: frames in, frames out; one bucket of entities at a time.

Every row of an entity is in the same frame (the shuffle ensures that), so the expressions see all of them, and
the rows of an entity come in the order of the files, so that sums of floats don't depend on the cut of the work.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from tasks.features.definitions import FeatureGroup, JoinHow
from tasks.features.independence import COMPANIES, looks_elsewhere, made_up
from tasks.features.rows import REASON, TIME
from tasks.io.errors import DefinitionError
from tasks.store.layout import AS_OF

IntArray = npt.NDArray[np.int64]
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
    group: FeatureGroup,
    plain: pl.DataFrame,
    events: pl.DataFrame,
    as_of: dt.datetime,
    after: Callable[[dt.datetime], pl.DataFrame],
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
    group: FeatureGroup,
    plain: pl.DataFrame,
    events: pl.DataFrame,
    as_of: dt.datetime,
    after: Callable[[dt.datetime], pl.DataFrame],
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
    group: FeatureGroup, name: str, before: pl.DataFrame, companies: Sequence[IntArray] | None = None
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
