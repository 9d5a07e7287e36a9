"""Points in time in a user's notation: one, several, or a range with a step."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from typing import Annotated
from zoneinfo import ZoneInfo

import polars as pl
from pydantic import AfterValidator, BeforeValidator

MOST = 10_000
"""Most times in a list; more are a mistake in the step."""

_STEP = re.compile(r"[1-9][0-9]*(h|d|w|mo|q|y)")


def _split(value: object) -> object:
    """Split 'a,b' into a list, as well as one time; times become their text."""
    values = value.split(",") if isinstance(value, str) else [value] if isinstance(value, dt.date) else value
    if not isinstance(values, list | tuple):
        return () if value is None else value
    texts = [part.isoformat() if isinstance(part, dt.date) else part for part in values]
    return tuple(part.strip() if isinstance(part, str) else part for part in texts if part != "")


def _canonical(values: tuple[str, ...]) -> tuple[str, ...]:
    expand(values)
    return tuple("/".join(_spelled(part) for part in value.split("/")) for value in values)


def _spelled(text: str) -> str:
    text = text.strip()
    if _STEP.fullmatch(text):
        return text
    moment = _parse(text)
    return (moment if moment.tzinfo is None else moment.astimezone(dt.UTC)).isoformat()


def _parse(text: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(text.strip())
    except ValueError as fault:
        raise ValueError(
            f"'{text.strip()}' is no time; write ISO 8601 such as 2024-12-31 or 2024-12-31T12:00Z"
        ) from fault
    return moment


def _local(moment: dt.datetime, zone: ZoneInfo) -> dt.datetime:
    """Return a time by the zone's clock, without the zone."""
    return moment if moment.tzinfo is None else moment.astimezone(zone).replace(tzinfo=None)


def _utc(moment: dt.datetime, zone: ZoneInfo) -> dt.datetime:
    """Return a time in UTC; one without an offset is in the zone, the earlier of two equal ones."""
    return (moment.replace(tzinfo=zone) if moment.tzinfo is None else moment).astimezone(dt.UTC)


def expand(values: Iterable[str], timezone: str = "UTC") -> tuple[dt.datetime, ...]:
    """Return all the times of a list, UTC, ascending, each once.

    Args:
        values: Times (ISO 8601), and ranges 'START/END/STEP' with both ends included, the end also where no step meets
            it; a step is a number of h, d, w, mo, q or y, such as '1d' or '3mo'. A range from the 31st has the last day
            of shorter months.
        timezone: IANA zone of times without an offset, whose clock steps of days and more follow: midnight stays
            midnight when the clock changes.

    Raises:
        ValueError: a value is neither, or they are more than `MOST` times.

    """
    found: set[dt.datetime] = set()
    zone = ZoneInfo(timezone)
    for value in values:
        first, *rest = value.split("/")
        if not rest:
            found.add(_utc(_parse(first), zone))
            continue
        if len(rest) != 2 or not _STEP.fullmatch(rest[1].strip()):
            raise ValueError(f"'{value}' is no range of times; write START/END/STEP such as 2024-01-31/2024-12-31/1mo")
        found |= set(_range(_parse(first), _parse(rest[0]), rest[1].strip(), value=value, zone=zone))
        if len(found) > MOST:
            break
    if len(found) > MOST:
        raise ValueError(f"{', '.join(values)} stands for over {MOST:,} times; take a longer step")
    return tuple(sorted(found))


def _range(start: dt.datetime, end: dt.datetime, step: str, *, value: str, zone: ZoneInfo) -> Iterable[dt.datetime]:
    last = _utc(end, zone)
    if last < _utc(start, zone):
        raise ValueError(f"'{value}' ends before it begins; swap the two times")
    count, unit = re.fullmatch(r"([0-9]+)([a-z]+)", step).groups()  # type: ignore[union-attr]
    # Steps of hours have a fixed length when the clock changes; days and longer steps follow the clock.
    origin = pl.Series([_utc(start, zone).replace(tzinfo=None) if unit == "h" else _local(start, zone)])
    for number in range(MOST + 1):
        # Counted from the start each time, so that the last day of a month stays the last day.
        moment: dt.datetime = origin.dt.offset_by(f"{int(count) * number}{unit}")[0]
        moment = moment.replace(tzinfo=dt.UTC) if unit == "h" else _utc(moment, zone)
        if moment >= last:
            yield last
            return
        yield moment


Times = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_canonical)]
"""Configuration field: times and ranges as text, in UTC if they have an offset; `expand` returns the times."""
