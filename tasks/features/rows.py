"""Rows of a source converted to the declared form, each kept or rejected with a reason; and the keys of entities. Pure.

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

Keys: the flows, the point-in-time join, look-ups in files and in Redis, and the commands all read them by these rules:

| given | where keys are integers (int64) | where keys are text |
|---|---|---|
| whole number of any width | the number; beyond 64 bits refused | its digits: 7 is '7', never '007' |
| float | the number if it is whole and below 2⁵³ (float32: 2²⁴, float16: 2¹¹), else refused | the number's digits |
| decimal | the number if it is whole, else refused | the number's digits |
| text, bytes | the number that it spells, spaces and '.0' aside: '007' is 7; else refused | itself: '007' isn't '7' |
| date | refused | as in ISO 8601 |
| boolean, time, list | refused | refused |
| null, NaN | no key | no key |

From 2⁵³ on a float may be any of several whole numbers: 9007199254740993 read as a float is another customer's key.
Refused rows of a flow are rejected with a reason; in a look-up a refused key is an error.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.features.csv_text import as_type, localised, parsed_time
from tasks.features.definitions import ColumnKind
from tasks.io.errors import InputError
from tasks.io.hashing import is_text
from tasks.io.notation import DEFAULT, MissingValues

KeyType = Literal["int64", "string"]

_EXACT = {"Float16": 2**11, "Float32": 2**24, "Float64": 2**53}
"""From here on a float may be several whole numbers."""
_TEXT = (pl.String, pl.Categorical, pl.Enum)
_GIVEN, _KEY = "given", "key"
_SHOWN = 3


def key_type(kinds: Iterable[pa.DataType]) -> KeyType:
    """Return the type of a key from the types of all its columns: an integer if possible in each, else text.

    Floats count as whole numbers: data frames use them for integers with nulls.
    """
    told = [kind for kind in kinds if not pt.is_null(kind)]  # a column without any value has no type
    whole = all(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind) for kind in told)
    return "int64" if told and whole else "string"


def as_key(source: pl.Expr, dtype: pl.DataType, wanted: KeyType) -> pl.Expr:
    """Return an expression that converts keys to the wanted type; null for values that can't be such a key."""
    if dtype.is_float():
        whole = source.cast(pl.Int64, strict=False)
        source = pl.when((source == whole) & ~is_inexact(source, dtype)).then(whole)
    elif isinstance(dtype, pl.Decimal):
        whole = source.cast(pl.Int64, strict=False)
        source = pl.when(source == whole.cast(pl.Decimal(38, dtype.scale), strict=False)).then(whole)
    elif dtype == pl.Binary:
        source = source.cast(pl.String, strict=False)
    if wanted == "string":
        return source.cast(pl.String, strict=False)
    if dtype in _TEXT or dtype == pl.Binary:
        source = source.cast(pl.String).str.strip_chars().str.strip_suffix(".0")
    elif not (dtype.is_numeric() or dtype == pl.Null):  # a date would become the number of its days
        source = pl.when(pl.lit(value=False)).then(source.is_null())
    return source.cast(pl.Int64, strict=False)


def is_inexact(source: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Return an expression that is True for finite floats that may be several whole numbers."""
    return source.is_finite() & (source.abs() >= pl.lit(_EXACT[str(dtype)]))


def read_keys(values: Iterable[Any], kind: pa.DataType, what: str) -> pa.Array:
    """Return requested keys in the type of a version's keys.

    Args:
        values: Arrow array or plain values, numpy's and pandas' scalars too; None and NaN are no key.
        kind: Arrow type of the version's key column.
        what: Description of the keys, for errors: "keys of feature-store/customer-features v1 ('customer_id')".

    Returns:
        An array of type `kind`, as long as the values, null where there is no key.

    Raises:
        InputError: a value can't be such a key, or not exactly; the message says which, and why.
    """
    if pt.is_dictionary(kind):
        return read_keys(values, kind.value_type, what).cast(kind)
    array = as_given(values, what)
    if array.type == kind and not pt.is_floating(kind):
        return array
    if pt.is_null(array.type):
        return pa.nulls(len(array), kind)
    if pt.is_floating(array.type):  # pandas and numpy write NaN for a missing number
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    if not (pt.is_integer(kind) or is_text(kind)):
        return _cast(array, kind, what)
    if not _may_be_keys(array.type, kind):
        raise InputError(f"{what} are of type {kind}, the ones given are of type {array.type}; convert them")
    frame = pl.DataFrame({_GIVEN: pl.Series(_GIVEN, array)})
    wanted: KeyType = "int64" if pt.is_integer(kind) else "string"
    frame = frame.with_columns(as_key(pl.col(_GIVEN), frame.schema[_GIVEN], wanted).alias(_KEY))
    _refuse(frame, kind, what)
    return _cast(frame[_KEY].to_arrow(compat_level=pl.CompatLevel.oldest()), kind, what)


def as_given(values: Iterable[Any], what: str) -> pa.Array:
    """Return plain values as an Arrow array of their type: floats keep their width, which limits their exact range.

    Raises:
        InputError: they aren't of one type, or beyond 64 bits.
    """
    if isinstance(values, pa.Array | pa.ChunkedArray):
        array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return array.cast(array.type.value_type) if pt.is_dictionary(array.type) else array
    try:
        return pa.array([_plain(value) for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as fault:
        raise InputError(f"{what} must be values of one type of up to 64 bits: {fault}") from fault


def _plain(value: Any) -> Any:
    """Return None for pandas' missing value, and a Python bool for numpy's, which Arrow would count as 1."""
    if type(value).__name__ == "NAType":
        return None
    return bool(value) if isinstance(value, np.bool_) else value


def _may_be_keys(given: pa.DataType, kind: pa.DataType) -> bool:
    if pt.is_date(given):
        return is_text(kind)
    numbers = pt.is_integer(given) or pt.is_floating(given) or pt.is_decimal(given)
    return bool(numbers or is_text(given) or pt.is_binary(given) or pt.is_large_binary(given))


def _refuse(frame: pl.DataFrame, kind: pa.DataType, what: str) -> None:
    """Raise an error that names the values that aren't keys.

    Raises:
        InputError: there are any.
    """
    numbers = (frame[_GIVEN].is_not_null() & frame[_KEY].is_null()).arg_true()
    if not len(numbers):
        return
    some = [f"{frame[_GIVEN][number]!r} (row {number})" for number in numbers[:_SHOWN]]
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    dtype, why = frame.schema[_GIVEN], ""
    if dtype.is_float() and frame[numbers].select(is_inexact(pl.col(_GIVEN), dtype).any()).item():
        why = f"; from {_EXACT[str(dtype)]} on a {dtype} may be several whole numbers: give integers or text"
    raise InputError(f"{what} are of type {kind}, which can't be {', '.join(some)}{more}{why}")


def _cast(array: pa.Array, kind: pa.DataType, what: str) -> pa.Array:
    """Return the keys in the exact type; booleans, which Arrow casts to anything, only to booleans."""
    try:
        if pt.is_boolean(array.type) != pt.is_boolean(kind):
            raise pa.ArrowTypeError(f"they are of type {array.type}")
        return array.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as fault:
        raise InputError(f"{what} are of type {kind}: {fault}") from fault


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
_FREE_TEXT = (pl.String, pl.Categorical)


def _typed(column: ColumnPlan, dtype: pl.DataType, plan: RowPlan) -> pl.Expr:
    """Return an expression that converts a column to its declared type; null for values that don't fit."""
    source = pl.col(column.source_name)
    match column.kind:
        case "key":
            typed = as_key(source, dtype, column.key_type)
        case "number":
            text = source.cast(pl.String).str.strip_chars() if dtype in _FREE_TEXT else source
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
    free = raw.schema[column.source_name] in _FREE_TEXT
    # A blank string is CSV's null in a quoted field.
    missing = given.is_null() | (given.cast(pl.String).str.strip_chars() == "" if free else pl.lit(value=False))
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
