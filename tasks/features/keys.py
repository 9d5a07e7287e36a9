"""Keys of entities: rules for equal keys from different sources. Pure.

The flows, the point-in-time join, look-ups in files and in Redis, and the commands all read keys by these rules:

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

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.io.errors import InputError

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
    if not (pt.is_integer(kind) or _is_text(kind)):
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


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _may_be_keys(given: pa.DataType, kind: pa.DataType) -> bool:
    if pt.is_date(given):
        return _is_text(kind)
    numbers = pt.is_integer(given) or pt.is_floating(given) or pt.is_decimal(given)
    return bool(numbers or _is_text(given) or pt.is_binary(given) or pt.is_large_binary(given))


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
