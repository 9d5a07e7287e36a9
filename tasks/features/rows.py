"""Rows of a source converted to the declared form, each kept or rejected with a reason. Pure: frames in, frames out.

Treatment of odd values:

| value | becomes |
|---|---|
| null (or empty CSV field) in a required column | rejected, `null_<column>` |
| float key from 2⁵³ on (float32: 2²⁴), which may be several whole numbers | rejected, `inexact_<column>` |
| text that is no number / no time | rejected, `unparsable_<column>` |
| NaN, +inf, -inf in a required number | rejected, `not_finite_<column>` |
| NaN, inf, unparsable in an optional number | null |
| negative amount | kept (a refund), or rejected as `negative_<column>` by choice |
| time with an offset or zone | converted to UTC |
| time without a zone | taken to be in `timezone` (UTC by default) |
| time that doesn't exist in the zone (clock forward) | rejected, `unparsable_<column>`; of two equal ones the earlier |
| time before the year 1 or after 9999 | rejected, `unparsable_<column>` |
| time before `earliest` | rejected, `too_early_<column>` |
| time after as_of | filtered, `after_as_of` |
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from tasks.features.csv_text import as_type, localised, parsed_time
from tasks.features.definitions import ColumnKind
from tasks.features.keys import KeyType, as_key, is_inexact
from tasks.io.notation import DEFAULT, MissingValues

TIME = pl.Datetime("us", "UTC")
REASON = "_reason"
AFTER_AS_OF = "after_as_of"

EpochUnit = Literal["s", "ms", "us", "ns"]
_TYPED_KINDS = ("key", "number", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnPlan:
    """Reading of one column of a source.

    name: ours; source_name: the file's. key_type: what a key becomes, decided over all sources, so that keys
    of different files and tables are equal when they mean the same. dtype: type of an 'any' column, None as it is.
    strict: an unreadable value is rejected, although the column may be null.
    """

    name: str
    source_name: str
    kind: ColumnKind
    required: bool = False
    key_type: KeyType = "string"
    dtype: pl.DataType | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Rules for reading and judging the rows of one source.

    time: the event time's column, None for a dimension. as_of: later events are filtered. timezone: IANA zone of
    times without one. epoch_unit: unit of integers in a time column since 1970-01-01 UTC. missing: text of CSV that
    means no value.
    """

    source: str
    columns: tuple[ColumnPlan, ...]
    time: str | None = None
    as_of: dt.datetime | None = None
    earliest: dt.datetime = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    timezone: str = "UTC"
    epoch_unit: EpochUnit | None = None
    reject_negative: tuple[str, ...] = ()
    missing: MissingValues = DEFAULT

    @property
    def file_columns(self) -> tuple[str, ...]:
        """The file's names of the columns to read."""
        return tuple(dict.fromkeys(column.source_name for column in self.columns))

    @property
    def categories(self) -> tuple[str, ...]:
        """The file's names of the columns with few distinct values."""
        return tuple(column.source_name for column in self.columns if column.kind == "category")

    @property
    def typed(self) -> tuple[str, ...]:
        """The file's names of the columns of keys, numbers and times."""
        return tuple({column.source_name: None for column in self.columns if column.kind in _TYPED_KINDS})


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """rows_in = kept.height + rejected.height + sum(filtered.values()); rejected_rows: numbers of the rejected rows."""

    kept: pl.DataFrame
    rejected: pl.DataFrame
    rejected_rows: pl.Series
    filtered: Mapping[str, int] = field(default_factory=dict)


def judge(raw: pl.DataFrame, plan: RowPlan) -> JudgedRows:
    """Type, check and split the rows of one file or part of a file.

    Args:
        raw: Columns named as in the file; columns outside the plan are kept with rejected rows only.
        plan: Rules for the rows.

    Returns:
        kept has the plan's columns under our names; rejected has raw's columns and `_reason`.

    """
    typed = raw.select(_typed(column, raw.schema[column.source_name], plan) for column in plan.columns)
    reasons = [reason for column in plan.columns for reason in _reasons(column, raw, plan)]
    # The usual case is clean data: one boolean pass decides if reasons must be spelled out.
    bad = pl.any_horizontal(pl.lit(value=False), *(fault for fault, _ in reasons))
    checked = pl.concat([typed, raw.select(pl.all().name.prefix(_RAW))], how="horizontal")
    is_bad = checked.select(bad.alias("bad"))["bad"]
    rejected = raw.clear().with_columns(pl.lit(None, pl.String).alias(REASON))
    kept = typed
    if is_bad.any():
        first = pl.coalesce(pl.when(fault).then(pl.lit(reason)) for fault, reason in reasons)
        why = checked.filter(is_bad).select(first.alias(REASON))
        rejected = raw.filter(is_bad).with_columns(why[REASON])
        kept = typed.filter(~is_bad)
    numbers = is_bad.arg_true().cast(pl.Int64)
    filtered: dict[str, int] = {}
    if plan.time is not None and plan.as_of is not None:
        before = kept.height
        kept = kept.filter(pl.col(plan.time) <= plan.as_of)
        if before > kept.height:
            filtered[AFTER_AS_OF] = before - kept.height
    return JudgedRows(kept, rejected, numbers, filtered)


_RAW = "\x00raw:"
_TICKS = 2**63 - 1
_CALENDAR = (-62_135_596_800_000_000, 253_402_300_799_999_999)
"""First microsecond of the year 1 and last of 9999, since 1970."""
_TEXT = (pl.String, pl.Categorical)


def _typed(column: ColumnPlan, dtype: pl.DataType, plan: RowPlan) -> pl.Expr:
    """Return an expression that converts a column to its declared type; null for values that don't fit."""
    source = pl.col(column.source_name)
    match column.kind:
        case "key":
            typed = as_key(source, dtype, column.key_type)
        case "number":
            text = source.cast(pl.String).str.strip_chars() if dtype in _TEXT else source
            typed = text.cast(pl.Float64, strict=False)
            if not column.required:
                typed = pl.when(typed.is_finite()).then(typed)
        case "time":
            typed = _time(source, dtype, plan)
        case "category":
            typed = source.cast(pl.String, strict=False).cast(pl.Categorical) if dtype != pl.Categorical else source
        case "any":
            typed = source if column.dtype in (None, dtype) else _as_type(source, dtype, column.dtype, plan)
    return typed.alias(column.name)


def _as_type(source: pl.Expr, dtype: pl.DataType, wanted: pl.DataType | None, plan: RowPlan) -> pl.Expr:
    """Convert a column of another type than in the source's first file, or CSV text; null for values that don't fit."""
    assert wanted is not None
    if wanted == TIME and (dtype == pl.Date or isinstance(dtype, pl.Datetime)):
        return _time(source, dtype, plan)
    if dtype != pl.String:
        return source.cast(wanted, strict=False)
    return as_type(source, wanted, plan.timezone)


def _time(source: pl.Expr, dtype: pl.DataType, plan: RowPlan) -> pl.Expr:
    if isinstance(dtype, pl.Datetime) or dtype == pl.Date:
        zone = dtype.time_zone if isinstance(dtype, pl.Datetime) else None
        source = source.dt.convert_time_zone("UTC") if zone not in (None, "UTC") else source
        times = source.cast(pl.Datetime("us", zone and "UTC"), strict=False)
        return _in_calendar(times) if zone is not None else localised(_in_calendar(times), plan.timezone)
    if dtype == pl.String and plan.epoch_unit is None:
        return parsed_time(source, plan.timezone)
    # Integers, also as text: plan.py has ensured that a unit is given.
    count = (source.str.strip_chars() if dtype == pl.String else source).cast(pl.Int64, strict=False)
    scale = {"s": 1_000_000, "ms": 1_000}.get(plan.epoch_unit or "us", 1)
    # A count in a finer unit than the given one would overflow, to an arbitrary time.
    count = pl.when(count.is_between(-_TICKS // scale, _TICKS // scale)).then(count)
    microseconds = count // 1_000 if plan.epoch_unit == "ns" else count * scale
    return _in_calendar(microseconds.cast(pl.Datetime("us"))).dt.replace_time_zone("UTC")


def _in_calendar(times: pl.Expr) -> pl.Expr:
    """Return times, null outside the years 1 to 9999: neither Python nor the time zones' rules support others."""
    return pl.when(times.to_physical().is_between(*_CALENDAR)).then(times)


def _reasons(column: ColumnPlan, raw: pl.DataFrame, plan: RowPlan) -> list[tuple[pl.Expr, str]]:
    """Return possible faults of a column's values, each as (boolean expression, reason), first match wins."""
    given = pl.col(_RAW + column.source_name)
    value = pl.col(column.name)
    found: list[tuple[pl.Expr, str]] = []
    negative = ((value < 0).fill_null(value=False), f"negative_{column.name}")
    is_text = raw.schema[column.source_name] in _TEXT
    # A blank string is CSV's null in a quoted field.
    missing = given.is_null() | (given.cast(pl.String).str.strip_chars() == "" if is_text else pl.lit(value=False))
    if not column.required and column.name != plan.time:  # without its time no event can be placed
        if column.strict:
            found += [(reason & ~missing, name) for reason, name in _unreadable(column, raw, given, value)]
        return [*found, negative] if column.name in plan.reject_negative else found
    found.append((missing, f"null_{column.name}"))
    found += _unreadable(column, raw, given, value)
    if column.kind == "number":
        found.append((~value.is_finite(), f"not_finite_{column.name}"))
    if column.name in plan.reject_negative:
        found.append(negative)
    if column.kind == "time":
        found.append((value < plan.earliest, f"too_early_{column.name}"))
    return found


def _unreadable(column: ColumnPlan, raw: pl.DataFrame, given: pl.Expr, value: pl.Expr) -> list[tuple[pl.Expr, str]]:
    found = []
    dtype = raw.schema[column.source_name]
    if column.kind == "key" and dtype.is_float():
        found.append((is_inexact(given, dtype), f"inexact_{column.name}"))
    if column.kind in ("number", "time", "key"):
        found.append((value.is_null(), f"unparsable_{column.name}"))
    return found
