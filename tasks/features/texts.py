"""Columns of CSV text: the common type of all their values, and the values of that type. Pure.

A column's type is the join of its values' types, so that neither their order nor the cut into blocks or files makes a
difference:

    null < integer < float                 an integer that no float holds exactly is text beside floats
    null < boolean, time, day < timestamp  everything else together is text

An integer is in canonical form: 007, +7 and digits beyond 64 bits are text, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import polars as pl
import pyarrow as pa
import pyarrow.types as pt

Kind = Literal["null", "integer", "wide", "float", "boolean", "date", "timestamp", "time", "text"]

TYPES: dict[Kind, pa.DataType] = {
    "null": pa.null(),
    "integer": pa.int64(),
    "wide": pa.int64(),
    "float": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
    "time": pa.time64("us"),
    "text": pa.string(),
}
EXACT = 2**53
"""Up to here a float represents every whole number."""

_JOINS: dict[frozenset[Kind], Kind] = {
    frozenset(("integer", "wide")): "wide",
    frozenset(("integer", "float")): "float",
    frozenset(("date", "timestamp")): "timestamp",
}
_TIME = pl.Datetime("us", "UTC")
_FORMS = (
    *("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d"),
    *("%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M%#z"),
)
"""No text matches two of them."""
_NO_FLOAT = r"^[+-]?0[0-9]|^\+|^-?[0-9]+$"
"""A leading zero or plus, and digits alone: an identifier, or an integer of another size."""


def join(kinds: Sequence[Kind]) -> Kind:
    """Return the narrowest kind that holds the values of all."""
    return reduce(_join, kinds, "null")


def _join(one: Kind, other: Kind) -> Kind:
    if other in (one, "null"):
        return one
    return other if one == "null" else _JOINS.get(frozenset((one, other)), "text")


def kind_of(values: pl.Series, missing: Sequence[str], found: Kind = "null") -> Kind:
    """Return the kind of all values of a column of text.

    Args:
        values: Some of them.
        missing: Text that means no value.
        found: Kind of the others.

    """
    rest = values.drop_nulls()
    if found in _TESTS or not any(map(_like_an_integer, missing)):
        # Most columns continue as they begin, so that this is enough for most blocks.
        found, rest = _sorted_out(found if found in _TESTS else "integer", found, rest)
    rest = rest.str.strip_chars()
    rest = rest.filter(~_any_of(rest, ("", *missing)))
    for kind in _TESTS:
        if found == "text" or not len(rest):
            return found
        found, rest = _sorted_out(kind, found, rest)
    return "text" if len(rest) else found


def _sorted_out(kind: Kind, found: Kind, values: pl.Series) -> tuple[Kind, pl.Series]:
    """Return the known kind joined with another, if some values are of it, and the values that aren't of it."""
    holds = _TESTS[kind](values).fill_null(value=False)
    if not holds.any():
        return found, values
    return _join(found, kind), values.clear() if holds.all() else values.filter(~holds)


def _like_an_integer(mark: str) -> bool:
    return mark.removeprefix("-").isdigit()


def _any_of(values: pl.Series, marks: Sequence[str]) -> pl.Series:
    return reduce(lambda one, other: one | other, (values == mark for mark in dict.fromkeys(marks)))


def _is_integer(text: pl.Series) -> pl.Series:
    return text.cast(pl.Int64, strict=False).cast(pl.String) == text


def _is_exact(text: pl.Series) -> pl.Series:
    return _is_integer(text) & text.cast(pl.Int64, strict=False).is_between(-EXACT, EXACT)


def _is_float(text: pl.Series) -> pl.Series:
    plain = text.cast(pl.Float64, strict=False).is_not_null() & ~text.str.contains(_NO_FLOAT)
    return plain | (text == "-0")


def _is_parsed(wanted: pl.DataType) -> Callable[[pl.Series], pl.Series]:
    def holds(text: pl.Series) -> pl.Series:
        return text.to_frame("x").select(as_type(pl.col("x"), wanted, "UTC"))["x"].is_not_null()

    return holds


_TESTS: dict[Kind, Callable[[pl.Series], pl.Series]] = {
    "integer": _is_exact,
    "wide": _is_integer,
    "float": _is_float,
    "boolean": _is_parsed(pl.Boolean()),
    "date": _is_parsed(pl.Date()),
    "timestamp": _is_parsed(pl.Datetime()),
    "time": _is_parsed(pl.Time()),
}


def polars_type(kind: pa.DataType) -> pl.DataType | None:
    """Return Polars' type for a column of an Arrow type; None for those that it can't read."""
    if pt.is_decimal256(kind):  # Polars panics
        return None
    try:
        frame = pl.from_arrow(pa.schema([pa.field("x", kind)]).empty_table())
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    assert isinstance(frame, pl.DataFrame)
    return frame.schema["x"]


def as_type(text: pl.Expr, wanted: pl.DataType, timezone: str) -> pl.Expr:
    """Return text as values of a type; null for values that don't fit."""
    match wanted:
        case pl.String():
            typed = text
        case pl.Boolean():
            typed = text.str.to_lowercase().replace_strict({"true": True, "false": False}, default=None)
        case pl.Date():
            typed = text.str.to_date("%Y-%m-%d", strict=False)
        case pl.Time():
            typed = pl.coalesce(text.str.to_time(form, strict=False) for form in ("%H:%M:%S%.f", "%H:%M"))
        case pl.Datetime():
            typed = parsed_time(text, timezone)
        case _:
            typed = text.str.strip_chars().cast(wanted, strict=False)
    return typed


def parsed_time(text: pl.Expr, timezone: str) -> pl.Expr:
    """Parse ISO 8601 with 'T' or a space, with or without seconds, fraction and offset; formats may differ row by row.

    Args:
        text: The times.
        timezone: IANA zone of those without an offset.

    """
    return text.map_batches(lambda values: _parsed(values.cast(pl.String), timezone), return_dtype=_TIME)


def _parsed(text: pl.Series, timezone: str) -> pl.Series:
    """Return times in UTC; usually all have one form, so that the other forms needn't be tried."""
    iso = text.str.strip_chars().str.replace("T", " ", literal=True).str.replace(r"[Zz]$", "+00:00")
    found = pl.Series(text.name, dtype=_TIME).extend_constant(None, len(text))
    for form in _FORMS:
        if found.null_count() == text.null_count():
            break
        times = iso.str.to_datetime(form, time_unit="us", strict=False, ambiguous="earliest")
        if times.null_count() == len(times):
            continue
        if times.dtype != _TIME:
            times = times.to_frame("x").select(localised(pl.col("x"), timezone))["x"]
        found = found.zip_with(found.is_not_null(), times)
    return found


def localised(naive: pl.Expr, timezone: str) -> pl.Expr:
    """Return times of a zone in UTC; null where the clock skipped them, the earlier of two equal ones."""
    local = naive.dt.replace_time_zone(timezone, ambiguous="earliest", non_existent="null")
    return local if timezone == "UTC" else local.dt.convert_time_zone("UTC")
