"""A model's inputs, as a value: its rows (the spine), its target (the label), and its features.

A *spine* is a table of (entity key, event timestamp, target): each row gets the features that were known at that
time. It is the user's table, or made by a *label*: a target computed from the events *after* a time, for every
entity that existed *before* it. Features come only from before, labels only from after.

A value has an age limit, by one rule for training sets, the join in memory, and look-ups in files and in Redis:

A value is expired if time − as_of is above the time to live; a value of exactly that age counts (`asof.join_asof`).
The time is a row's event time, or that of a look-up. Each value has a status:

    PRESENT     the value
    NULL        the entity has a row in time, and no value in it
    EXPIRED     null, as the entity's newest row is older than the time to live
    NOT_FOUND   null, as the entity has no row

A user's Python file declares values of `Model` at module level. A YAML file declares the same: labels by name, with
their targets in SQL, and models that name a label or a user's table; nothing in it is executed.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.features.definitions import check_days, check_expression
from tasks.features.loading import by_name, first_mistake, is_yaml, python_values, sql_expression, yaml_content
from tasks.io.errors import DefinitionError, InputError
from tasks.io.notation import Times
from tasks.io.tensors import BoolArray
from tasks.io.text import COLUMN, check_dataset_name, closest
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


Status = Literal["PRESENT", "NULL", "EXPIRED", "NOT_FOUND"]

STATUS = "__status"
"""Suffix of a feature's status column."""

_MOST_DAYS = 500_000  # some 1,400 years: a time before the year 1 can't be represented


def time_to_live(days: Any) -> dt.timedelta | None:
    """Return a time to live given in days; None is for ever.

    Raises:
        InputError: it isn't a number above 0, or it is above 500,000.
    """
    if days is None:
        return None
    number = isinstance(days, Real) and not isinstance(days, bool | np.bool_)
    if not number or not math.isfinite(days) or not 0 < days <= _MOST_DAYS:
        raise InputError(f"ttl_days = {days!r}: give a number of days above 0, such as 30 or 0.5, or None for no limit")
    return dt.timedelta(days=float(days))


def moment_of(now: Any) -> dt.datetime:
    """Return the time for measuring ages: the clock's, or the given one.

    Raises:
        InputError: it isn't a time with a time zone, or it is in the future.
    """
    clock = dt.datetime.now(dt.UTC)
    if now is None:
        return clock
    if not isinstance(now, dt.datetime) or now.tzinfo is None:
        raise InputError(f"now = {now!r}: give a datetime with a time zone, such as datetime.now(timezone.utc)")
    if now > clock:
        raise InputError(f"now = {now.isoformat()} is in the future: nobody knows which values will be newest by then")
    return now.astimezone(dt.UTC)


def expired(as_of: pa.Array | pa.ChunkedArray, now: dt.datetime, ttl: dt.timedelta | None) -> BoolArray:
    """Return a mask of rows older than the time to live, False for rows without a time.

    Args:
        as_of: Times of the rows, null for an entity without one; with a time zone, or UTC.
        now: Time to measure by.
        ttl: Time to live; None: no row is expired.
    """
    if ttl is None:
        return np.zeros(len(as_of), np.bool_)
    ticks = as_of.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    oldest = (now - ttl - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)
    found: BoolArray = pc.less(ticks, oldest).fill_null(False).to_numpy(zero_copy_only=False).astype(np.bool_)
    return found


def without(values: pa.ChunkedArray, rows: BoolArray) -> pa.ChunkedArray:
    """Return values with null in some rows."""
    return pc.if_else(pa.array(rows), pa.scalar(None, values.type), values) if rows.any() else values


def statuses(values: pa.ChunkedArray, found: BoolArray, late: BoolArray) -> pa.Array:
    """Return the status of each value.

    Args:
        values: The values, null where there is none.
        found: Mask of rows whose entities have a row.
        late: Mask of expired rows among them.
    """
    there = values.is_valid().to_numpy().astype(np.bool_)
    names = np.select([~found, late, ~there], ["NOT_FOUND", "EXPIRED", "NULL"], "PRESENT")
    return pa.array(names.tolist(), pa.string())


_WHAT = "models"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _LabelText(_Strict):
    entity: str
    at: Times
    days: int
    target: str
    source: str = "transactions"
    active_days: int | None = None


class _SpineText(_Strict):
    uri: str
    columns: dict[str, str] = Field(default_factory=dict)


class _ModelText(_Strict):
    label: str | None = None
    spine: _SpineText | None = None
    entity: str | None = None
    features: list[str]
    ttl_days: float | None = None
    strict: bool = False
    known_at: bool = False


class _File(_Strict):
    labels: dict[str, _LabelText] = Field(default_factory=dict)
    models: dict[str, _ModelText] = Field(default_factory=dict)


def load_models(path: str) -> dict[str, Model]:
    """Read a models file (local, or YAML in any supported storage): models by name, in order of declaration.

    Raises:
        DefinitionError: The file is missing, of another kind, or invalid; the message says where and why.
    """
    return _from_yaml(path) if is_yaml(_WHAT, path) else _from_python(path)


def select(models: Mapping[str, Model], names: Sequence[str]) -> list[Model]:
    """Return the models of these names (all if none is given), in order of declaration.

    Raises:
        DefinitionError: A name is unknown.
    """
    for name in names:
        if name not in models:
            raise DefinitionError(f"no model is named '{name}'{closest(name, list(models))}")
    return [model for name, model in models.items() if not names or name in names]


def _from_python(path: str) -> dict[str, Model]:
    found = by_name(path, python_values(_WHAT, path), Model)
    if not found:
        raise DefinitionError(f"models '{path}' declares nothing; assign a Model to a module-level name")
    return found


def _from_yaml(path: str) -> dict[str, Model]:
    content = yaml_content(_WHAT, path)
    try:
        file = _File.model_validate(content)
    except ValidationError as fault:
        raise DefinitionError(f"models '{path}': {first_mistake(_File, fault)}") from fault
    if not file.models:
        raise DefinitionError(f"models '{path}' declares nothing; give models")
    try:
        labels = {name: _label(name, text) for name, text in file.labels.items()}
        return {name: _model(name, text, labels) for name, text in file.models.items()}
    except DefinitionError as fault:
        raise DefinitionError(f"models '{path}': {fault}") from fault


def _label(name: str, text: _LabelText) -> Label:
    target = sql_expression(f"label '{name}': target", text.target)
    return Label(name=name, **{**dict(text), "target": target})


def _model(name: str, text: _ModelText, labels: Mapping[str, Label]) -> Model:
    if (text.label is None) == (text.spine is None):
        what = "has neither a label nor a spine" if text.label is None else "has a label and a spine"
        raise DefinitionError(
            f"model '{name}' {what}; give one of the two: label, a name under labels, or spine, the uri of a table"
        )
    spine: Label | SpineSource
    if text.spine is not None:
        spine = SpineSource(uri=text.spine.uri, columns=text.spine.columns)
    else:
        assert text.label is not None, "one of the two is given"
        if text.label not in labels:
            raise DefinitionError(
                f"model '{name}' names the label '{text.label}', which isn't declared"
                f"{closest(text.label, list(labels))}"
            )
        spine = labels[text.label]
    entity = text.entity or (spine.entity if isinstance(spine, Label) else None)
    if entity is None:
        raise DefinitionError(f"model '{name}' has no entity; give the key column of its spine, such as customer_id")
    return Model(
        name=name,
        entity=entity,
        spine=spine,
        features=tuple(_reference(name, reference) for reference in text.features),
        ttl_days=text.ttl_days,
        strict=text.strict,
        known_at=text.known_at,
    )


def _reference(model: str, text: str) -> FeatureReference:
    try:
        return FeatureReference.parse(text)
    except DefinitionError as fault:
        raise DefinitionError(f"model '{model}': {fault}") from fault
