"""A model's inputs, as a value: its rows (the spine), its target (the label), and its features.

A *spine* is a table of (entity key, event timestamp, target): each row gets the features that were known at that
time. It is the user's table, or made by a *label*: a target computed from the events *after* a time, for every
entity that existed *before* it. Features come only from before, labels only from after.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

from tasks.features.definitions import check_days, check_expression
from tasks.io.errors import DefinitionError
from tasks.io.text import COLUMN, check_dataset_name
from tasks.store.layout import TRAINING_SET

ALL = "*"
Pin = int | Literal["latest"] | None

_REFERENCE = re.compile(rf"([a-z0-9][a-z0-9_-]*):({COLUMN}|\*)(?:@(?:v?([1-9][0-9]*)|(latest)))?")


@dataclass(frozen=True, slots=True, order=True)
class FeatureReference:
    """One feature of a group, as models and look-ups name it: 'group:feature', or 'group:*' for all of the group.

    pin: None reads the group's history, all its published versions together; a number ('…@v3') that version alone;
    'latest' ('…@latest') the newest version alone.
    """

    group: str
    feature: str
    pin: Pin = None

    @classmethod
    def parse(cls, text: str) -> FeatureReference:
        """Return a reference from its text.

        Raises:
            DefinitionError: It isn't of the form 'group:feature'.

        """
        match = _REFERENCE.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise DefinitionError(
                f"'{text}' names no feature; write group:feature such as customer-features:total_spent, "
                f"with @v3 or @latest behind it to read that version alone"
            )
        pin: Pin = int(match[3]) if match[3] else "latest" if match[4] else None
        return cls(match[1], match[2], pin)

    def __str__(self) -> str:
        pin = "" if self.pin is None else "@latest" if self.pin == "latest" else f"@v{self.pin}"
        return f"{self.group}:{self.feature}{pin}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpineSource:
    """A user's table: Parquet or CSV, a file, directory, glob or S3 prefix.

    columns: our names (the entity keys, `event_timestamp`, `target`) to the table's; names that aren't given are
    unchanged.
    """

    uri: str
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A target computed from events, for every entity at each of some times.

    at: times as `tasks.io.notation.expand` takes them. An entity has a row at a time t if it has an event at or before
    t (in the `active_days` before t, if given). target: an expression over its events in t < time ≤ t + days;
    without any, its value over no rows (0 for a count). Times whose days aren't over yet have no rows.
    """

    name: str
    entity: str
    at: tuple[str, ...]
    days: int
    target: pl.Expr
    source: str = "transactions"
    active_days: int | None = None

    def __post_init__(self) -> None:
        check_dataset_name("label", self.name)
        check_days(f"label '{self.name}': days = {self.days!r}", self.days)
        if self.active_days is not None:
            check_days(f"label '{self.name}': active_days = {self.active_days!r}", self.active_days)
        check_expression(f"label '{self.name}', target", self.target)
        if not self.at:
            raise DefinitionError(f"label '{self.name}' has no times; give 'at', such as 2024-01-31/2024-11-30/1mo")

    def describe(self) -> dict[str, Any]:
        """Return the declaration as plain values."""
        return {
            "name": self.name,
            "entity": self.entity,
            "source": self.source,
            "at": list(self.at),
            "days": self.days,
            "active_days": self.active_days,
            "target": str(self.target),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model's inputs.

    entity: key column of the spine, whose rows training-delivery keeps in one split. features: joined at each
    row's time; groups of other entities are joined by their key, if the spine has that column. ttl_days: ignore
    features older than this. strict: as_of < event time, instead of ≤. known_at: only features whose version had been
    created by the event time.
    """

    name: str
    entity: str
    spine: SpineSource | Label
    features: tuple[FeatureReference, ...]
    ttl_days: float | None = None
    strict: bool = False
    known_at: bool = False

    def __post_init__(self) -> None:
        check_dataset_name("model", self.name)
        if not self.features:
            raise DefinitionError(f"model '{self.name}' reads no features; give some, such as customer-features:*")
        twice = sorted({str(ref) for ref in self.features if self.features.count(ref) > 1})
        if twice:
            raise DefinitionError(f"model '{self.name}' names {', '.join(twice)} twice; leave one out")
        pins: dict[str, set[Pin]] = {}
        for ref in self.features:
            pins.setdefault(ref.group, set()).add(ref.pin)
        mixed = sorted(group for group, found in pins.items() if len(found) > 1)
        if mixed:
            raise DefinitionError(
                f"model '{self.name}' reads '{mixed[0]}' in several versions at once; pin all its features alike"
            )
        if self.ttl_days is not None:
            check_days(f"model '{self.name}': ttl_days = {self.ttl_days}", self.ttl_days, whole=False)
        if self.entity in TRAINING_SET:
            raise DefinitionError(
                f"model '{self.name}': its entity '{self.entity}' is named as a column of ours; map the key to another "
                f"name"
            )
        if isinstance(self.spine, Label) and self.spine.entity != self.entity:
            raise DefinitionError(
                f"model '{self.name}' is about {self.entity}, but its label '{self.spine.name}' about "
                f"{self.spine.entity}; give both the same entity"
            )

    @property
    def groups(self) -> tuple[str, ...]:
        """Feature groups of the features, in order."""
        return tuple(dict.fromkeys(ref.group for ref in self.features))

    def describe(self) -> dict[str, Any]:
        """Return the declaration as plain values, for the manifest; equal declarations give equal values."""
        spine = (
            {"label": self.spine.describe()}
            if isinstance(self.spine, Label)
            else {"uri": self.spine.uri, "columns": dict(self.spine.columns)}
        )
        return {
            "name": self.name,
            "entity": self.entity,
            "spine": spine,
            "features": [str(ref) for ref in self.features],
            "ttl_days": None if self.ttl_days is None else float(self.ttl_days),
            "strict": self.strict,
            "known_at": self.known_at,
        }


def column_names(references: Sequence[FeatureReference]) -> list[str]:
    """Return the names of the features' columns in a training set: 'feature_<name>', with the group if names collide.

    Args:
        references: Features, each 'group:*' already spelled out.

    Raises:
        DefinitionError: two of them would have the same column.

    """
    names = [ref.feature for ref in references]
    found: dict[str, FeatureReference] = {}
    columns = [
        f"feature_{ref.feature}"
        if names.count(ref.feature) == 1
        else f"feature_{ref.group.replace('-', '_')}__{ref.feature}"
        for ref in references
    ]
    for column, ref in zip(columns, references, strict=True):
        if found.setdefault(column, ref) is not ref:
            raise DefinitionError(f"'{found[column]}' and '{ref}' would both be the column '{column}'; leave one out")
    return columns
