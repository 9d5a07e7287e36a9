"""Age limit of values: one rule for training sets, the join in memory, look-ups in files and in Redis. Pure.

A value is expired if time − as_of is above the time to live; a value of exactly that age counts (`asof.join_asof`).
The time is a row's event time, or that of a look-up. Each value has a status:

    PRESENT     the value
    NULL        the entity has a row in time, and no value in it
    EXPIRED     null, as the entity's newest row is older than the time to live
    NOT_FOUND   null, as the entity has no row
"""

from __future__ import annotations

import datetime as dt
import math
from numbers import Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.io.errors import InputError

Status = Literal["PRESENT", "NULL", "EXPIRED", "NOT_FOUND"]
Mask = npt.NDArray[np.bool_]

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


def expired(as_of: pa.Array | pa.ChunkedArray, now: dt.datetime, ttl: dt.timedelta | None) -> Mask:
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
    found: Mask = pc.less(ticks, oldest).fill_null(False).to_numpy(zero_copy_only=False).astype(np.bool_)
    return found


def without(values: pa.ChunkedArray, rows: Mask) -> pa.ChunkedArray:
    """Return values with null in some rows."""
    return pc.if_else(pa.array(rows), pa.scalar(None, values.type), values) if rows.any() else values


def statuses(values: pa.ChunkedArray, found: Mask, late: Mask) -> pa.Array:
    """Return the status of each value.

    Args:
        values: The values, null where there is none.
        found: Mask of rows whose entities have a row.
        late: Mask of expired rows among them.

    """
    there = values.is_valid().to_numpy().astype(np.bool_)
    names = np.select([~found, late, ~there], ["NOT_FOUND", "EXPIRED", "NULL"], "PRESENT")
    return pa.array(names.tolist(), pa.string())
