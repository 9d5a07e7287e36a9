"""How a feature group is declared: which rows it reads, whose features they are, and the features as expressions.

A group is a value. Nothing here computes: `kernel.py` evaluates a group on whole entities, `rows.py` brings a
source's rows into the declared form. The two standard groups are declared in `standard.py`, just as a user
declares his own in a Python or YAML file (`loading.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import polars as pl

from tasks.core.errors import DefinitionError

ColumnKind = Literal["key", "time", "number", "category", "any"]
JoinHow = Literal["inner", "left"]

AS_OF = "as_of"
"""Name under which an expression finds the as-of time: a column that is the same in every row."""

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a source, as expressions see it.

    kind: 'key' (integer or text), 'time' (microseconds, UTC), 'number' (float64), 'category' (text with few
    values) or 'any' (left as the file has it). required: a row without a valid value is rejected. also: other names
    that files may give it, which count where nothing is mapped and no file has a column of our name.
    """

    kind: ColumnKind = "any"
    required: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSource:
    """A table of events: many rows an entity, each at a time.

    columns: our names and what stands in them; optional ones may be missing from the files.
    """

    name: str
    time: str
    columns: Mapping[str, Column]
    uri: str | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("source", self.name)
        if self.time not in self.columns or self.columns[self.time].kind != "time":
            raise DefinitionError(
                f"source '{self.name}': its time column '{self.time}' is not declared; "
                f"add it to columns with kind 'time'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DimensionSource:
    """A table that says something about an entity: one row a key.

    columns: the columns to take. If `mapping` is given, exactly the mapped columns are taken.
    """

    name: str
    key: str
    columns: tuple[str, ...] = ()
    uri: str | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("source", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Features over the last `days` days up to as_of: rows with as_of − days < time ≤ as_of.

    Each feature's name gets the suffix `_{days}d`. An entity without rows in the window gets the value that the
    expression has over no rows (0 for a count or a sum, null for a mean).
    """

    days: int
    features: Mapping[str, pl.Expr]

    def __post_init__(self) -> None:
        if self.days < 1:
            raise DefinitionError(f"window of {self.days} days: give a number of days of at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureGroup:
    """Features of one kind of entity.

    entity: the key column of the event source. features: aggregations over all rows of an entity up to as_of.
    windows: the same over trailing windows. derived: expressions over the features above, one row an entity,
    evaluated in order. dimension: name of the dimension source to join by the entity key. bounds: lowest and
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
        _check_name("feature group", self.name)
        if not self.features:
            raise DefinitionError(f"feature group '{self.name}' declares no features; give at least one")
        names = self.feature_names
        if self.entity in names:
            raise DefinitionError(f"feature group '{self.name}' has a feature named as its entity; rename it")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DefinitionError(f"feature group '{self.name}' declares {', '.join(twice)} twice; rename one of them")
        unbounded = sorted(set(self.bounds) - set(names))
        if unbounded:
            raise DefinitionError(
                f"feature group '{self.name}' gives bounds for {', '.join(unbounded)}, which it doesn't declare"
                f"{_closest(unbounded[0], names)}"
            )

    @property
    def feature_names(self) -> list[str]:
        """Names of all features, in order: aggregations, windows, derived."""
        windows = [f"{name}_{window.days}d" for window in self.windows for name in window.features]
        return [*self.features, *windows, *self.derived]

    @property
    def event_columns(self) -> set[str]:
        """Columns of the events that the group needs, its entity key included; as_of is not one of them."""
        expressions = [*self.features.values(), *(e for window in self.windows for e in window.features.values())]
        roots = {root for expression in expressions for root in expression.meta.root_names()}
        return (roots | {self.entity}) - {AS_OF}

    def describe(self) -> dict[str, Any]:
        """The declaration as plain values, for the manifest; equal declarations give equal values."""
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

    def digest(self) -> str:
        """SHA-256 of the declaration, hexadecimal."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Definitions:
    """Sources and feature groups by name. A user's definitions are laid over the standard ones."""

    events: Mapping[str, EventSource] = field(default_factory=dict)
    dimensions: Mapping[str, DimensionSource] = field(default_factory=dict)
    groups: Mapping[str, FeatureGroup] = field(default_factory=dict)

    def over(self, base: Definitions) -> Definitions:
        """These definitions laid over `base`: same names replace, others are added."""
        return Definitions(
            events={**base.events, **self.events},
            dimensions={**base.dimensions, **self.dimensions},
            groups={**base.groups, **self.groups},
        )

    def select(self, names: tuple[str, ...]) -> list[FeatureGroup]:
        """The groups of these names (all if none is named), in order of declaration.

        Raises:
            DefinitionError: A name is unknown, or a group names a source that isn't declared.

        """
        for name in names:
            if name not in self.groups:
                raise DefinitionError(f"no feature group is named '{name}'{_closest(name, self.groups)}")
        chosen = [group for name, group in self.groups.items() if not names or name in names]
        for group in chosen:
            if group.source not in self.events:
                raise DefinitionError(
                    f"feature group '{group.name}' reads the source '{group.source}', which isn't declared"
                    f"{_closest(group.source, self.events)}"
                )
            if group.dimension is not None and group.dimension not in self.dimensions:
                raise DefinitionError(
                    f"feature group '{group.name}' joins the dimension '{group.dimension}', which isn't declared"
                    f"{_closest(group.dimension, self.dimensions)}"
                )
        return chosen


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise DefinitionError(
            f"{what} name '{name}': use lower-case letters, digits, single dashes or underscores, "
            f"beginning with a letter (it becomes a directory and a Prefect artifact key)"
        )


def _closest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """End of an error sentence that names the cure."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(names)) or 'none'}"
