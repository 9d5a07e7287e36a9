"""Declaration of a feature group: the rows that it reads, its entity, and its features as expressions.

A group is a value. Nothing here computes: `kernel.py` evaluates a group on whole entities, `rows.py` brings a
source's rows into the declared form. The two standard groups are declared in `standard.py`, in the same way as a
user's groups in a Python or YAML file (`loading.py`).

Features with equal digests mean the same, in any version. A group changes often and most of its features don't:
versions are comparable feature by feature.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

from tasks.io.errors import DefinitionError
from tasks.io.text import check_column_name, check_dataset_name, closest
from tasks.store import layout
from tasks.store.layout import AS_OF, FEATURES

ColumnKind = Literal["key", "time", "number", "category", "any"]
JoinHow = Literal["inner", "left"]

MOST_DAYS = 36_525
"""Maximum days of a window, a label or a time to live: a hundred years."""

_PLACES = (layout.TRAINING_READY, layout.METADATA)
_KEPT = tuple(path.removeprefix(f"{layout.FEATURE_STORE}/").partition("/")[0] for path in _PLACES)
"""Directories beside those of the groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a source, as expressions see it.

    kind: 'key' (integer or text), 'time' (microseconds, UTC), 'number' (float64), 'category' (text with few
    values) or 'any' (unchanged). required: a row without a valid value is rejected. also: other names
    that files may use, which count if nothing is mapped and no file has a column of our name.
    """

    kind: ColumnKind = "any"
    required: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSource:
    """A table of events: many rows an entity, each at a time.

    columns: our names and their columns; optional ones may be missing from the files.
    """

    name: str
    time: str
    columns: Mapping[str, Column]
    uri: str | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_dataset_name("source", self.name)
        if AS_OF in self.columns:
            raise DefinitionError(
                f"source '{self.name}': '{AS_OF}' is what expressions find the as-of time by; give the column another "
                f"name, and map it"
            )
        if self.time not in self.columns or self.columns[self.time].kind != "time":
            raise DefinitionError(
                f"source '{self.name}': its time column '{self.time}' is not declared; "
                f"add it to columns with kind 'time'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DimensionSource:
    """A table about an entity: one row a key.

    columns: the columns to take. If `mapping` is given, exactly the mapped columns are taken.
    """

    name: str
    key: str
    columns: tuple[str, ...] = ()
    uri: str | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_dataset_name("source", self.name)
        for column in {*self.columns, *self.mapping} - {self.key}:
            check_column_name(f"dimension '{self.name}', column", column, FEATURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Features over the last `days` days up to as_of: rows with as_of − days < time ≤ as_of.

    Each feature's name gets the suffix `_{days}d`. An entity without rows in the window gets the value that the
    expression has over no rows (0 for a count or a sum, null for a mean).
    """

    days: int
    features: Mapping[str, pl.Expr]

    def __post_init__(self) -> None:
        check_days(f"window of {self.days!r} days", self.days)
        for name, expression in self.features.items():
            check_column_name("window's feature", name)
            check_expression(f"window of {self.days} days, feature '{name}'", expression)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureGroup:
    """Features of one kind of entity.

    entity: the key column of the event source. features: aggregations over all rows of an entity up to as_of.
    windows: the same over trailing windows. derived: expressions over the same entity's features above, evaluated in
    order. dimension: name of the dimension source to join by the entity key. bounds: lowest and
    highest value that a feature may have (None: open), judged by the quality gate.
    """

    name: str
    entity: str
    features: Mapping[str, pl.Expr]
    source: str = "transactions"
    windows: tuple[Window, ...] = ()
    derived: Mapping[str, pl.Expr] = field(default_factory=dict)
    dimension: str | None = None
    bounds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_dataset_name("feature group", self.name, _KEPT)
        if self.name in (self.source, self.dimension):
            raise DefinitionError(f"feature group '{self.name}' is named as the table that it reads; rename it")
        if not self.features:
            raise DefinitionError(f"feature group '{self.name}' declares no features; give at least one")
        names = self.feature_names
        for name in names:
            check_column_name(f"feature group '{self.name}', feature", name, FEATURES)
        for name, expression in (*self.features.items(), *self.derived.items()):
            check_expression(f"feature group '{self.name}', feature '{name}'", expression)
        if self.entity in FEATURES:
            raise DefinitionError(
                f"feature group '{self.name}': its entity '{self.entity}' has the name of a column that its rows get; "
                f"map the key to another name"
            )
        if self.entity in names:
            raise DefinitionError(f"feature group '{self.name}' has a feature named as its entity; rename it")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DefinitionError(f"feature group '{self.name}' declares {', '.join(twice)} twice; rename one of them")
        unbounded = sorted(set(self.bounds) - set(names))
        if unbounded:
            raise DefinitionError(
                f"feature group '{self.name}' gives bounds for {', '.join(unbounded)}, which it doesn't declare"
                f"{closest(unbounded[0], names)}"
            )
        for name, (low, high) in self.bounds.items():
            # NaN is neither above nor below anything.
            if not (-math.inf if low is None else low) <= (math.inf if high is None else high):
                raise DefinitionError(
                    f"feature group '{self.name}': bounds of '{name}' are {low}, {high}; give the lowest value, then "
                    f"the highest"
                )

    def check_dimension(self, columns: Iterable[str]) -> None:
        """Check that no column of the dimension has the name of a feature.

        Raises:
            DefinitionError: a column has.
        """
        clash = sorted(set(columns) & set(self.feature_names))
        if clash:
            raise DefinitionError(
                f"feature group '{self.name}': {', '.join(clash)} is both a feature and a column of the dimension "
                f"'{self.dimension}'; rename the feature, or leave the column out of the dimension's mapping"
            )

    @property
    def feature_names(self) -> list[str]:
        """Names of all features, in order: aggregations, windows, derived."""
        windows = [f"{name}_{window.days}d" for window in self.windows for name in window.features]
        return [*self.features, *windows, *self.derived]

    @property
    def event_columns(self) -> set[str]:
        """Columns of the events that the group needs, including its entity key; as_of is not one of them."""
        expressions = [*self.features.values(), *(e for window in self.windows for e in window.features.values())]
        roots = {root for expression in expressions for root in expression.meta.root_names()}
        return (roots | {self.entity}) - {AS_OF}

    def describe(self) -> dict[str, Any]:
        """Return the declaration as plain values, for the manifest; equal declarations give equal values."""
        return {
            "name": self.name,
            "entity": self.entity,
            "source": self.source,
            "dimension": self.dimension,
            "features": {name: str(expression) for name, expression in self.features.items()},
            "windows": [
                {"days": window.days, "features": {name: str(e) for name, e in window.features.items()}}
                for window in self.windows
            ],
            "derived": {name: str(expression) for name, expression in self.derived.items()},
            "bounds": {name: list(bounds) for name, bounds in self.bounds.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Definitions:
    """Sources and feature groups by name. A user's definitions override the standard ones."""

    events: Mapping[str, EventSource] = field(default_factory=dict)
    dimensions: Mapping[str, DimensionSource] = field(default_factory=dict)
    groups: Mapping[str, FeatureGroup] = field(default_factory=dict)

    def over(self, base: Definitions) -> Definitions:
        """Return these definitions over `base`: same names replace, others are added."""
        return Definitions(
            events={**base.events, **self.events},
            dimensions={**base.dimensions, **self.dimensions},
            groups={**base.groups, **self.groups},
        )

    def select(self, names: tuple[str, ...]) -> list[FeatureGroup]:
        """Return the groups of these names (all if none is given), in order of declaration.

        Raises:
            DefinitionError: A name is unknown, or a group names a source that isn't declared.
        """
        for name in names:
            if name not in self.groups:
                raise DefinitionError(f"no feature group is named '{name}'{closest(name, self.groups)}")
        chosen = [group for name, group in self.groups.items() if not names or name in names]
        for group in chosen:
            if group.source not in self.events:
                raise DefinitionError(
                    f"feature group '{group.name}' reads the source '{group.source}', which isn't declared"
                    f"{closest(group.source, self.events)}"
                )
            if group.dimension is not None and group.dimension not in self.dimensions:
                raise DefinitionError(
                    f"feature group '{group.name}' joins the dimension '{group.dimension}', which isn't declared"
                    f"{closest(group.dimension, self.dimensions)}"
                )
        return chosen


def check_expression(what: str, value: object) -> None:
    """Check that a declared feature is an expression.

    Raises:
        DefinitionError: it is something else, such as SQL.
    """
    if isinstance(value, str):
        raise DefinitionError(
            f'{what}: {value!r} is text; in Python a feature is a Polars expression, such as pl.col("amount").sum(); '
            f"SQL goes into a YAML file, or into pl.sql_expr(…)"
        )
    if not isinstance(value, pl.Expr):
        raise DefinitionError(
            f'{what}: a {type(value).__name__} is no expression; give one of Polars\', such as pl.col("amount").sum()'
        )


def check_days(what: str, days: float, *, whole: bool = True) -> None:
    """Check a time span that a user declares in days.

    Raises:
        DefinitionError: it isn't a number above 0, or is over `MOST_DAYS`.
    """
    fits = isinstance(days, int | float) and 0 < days <= MOST_DAYS  # NaN doesn't
    if not fits or (whole and days != int(days)):
        least = "a number of days of at least 1" if whole else "a number of days above 0"
        raise DefinitionError(f"{what}: give {least} and at most {MOST_DAYS:,}")


_COLUMN = re.compile(r'col\("((?:[^"\\]|\\.)*)"\)')


def feature_digests(definition: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each declared feature of a group, in order of declaration, without its dimension's columns.

    Args:
        definition: A group in the form of `FeatureGroup.describe` and the manifest.

    Returns:
        Name → SHA-256, hexadecimal, of the entity, the source, the expression, the window's days, and for a derived
        feature the digests of the features that it names. Bounds and other features don't affect values.
    """
    base = {"entity": definition["entity"], "source": definition.get("source")}
    found = {
        name: _digest(base | {"days": None, "expression": text})
        for name, text in definition.get("features", {}).items()
    }
    for window in definition.get("windows", ()):
        days = window["days"]
        found |= {
            f"{name}_{days}d": _digest(base | {"days": days, "expression": text})
            for name, text in window["features"].items()
        }
    for name, text in definition.get("derived", {}).items():
        uses = {column: found[column] for column in sorted(set(_COLUMN.findall(text))) if column in found}
        found[name] = _digest({"entity": base["entity"], "expression": text, "of": uses})
    return found


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
