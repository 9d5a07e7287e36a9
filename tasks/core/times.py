"""Points in time as a user writes them: one, several, or a range with a step."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from typing import Annotated

import polars as pl
from pydantic import AfterValidator, BeforeValidator

MOST = 10_000
"""Times that a list may stand for; more are a slip of the step."""

_STEP = re.compile(r"[1-9][0-9]*(h|d|w|mo|q|y)")


def _split(value: object) -> object:
    """Let one time, or 'a,b', stand for a list; times become their text."""
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
    return text if _STEP.fullmatch(text) else _parse(text).isoformat()


def _parse(text: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(text.strip())
    except ValueError as fault:
        raise ValueError(
            f"'{text.strip()}' is no time; write ISO 8601 such as 2024-12-31 or 2024-12-31T12:00Z"
        ) from fault
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)


def expand(values: Iterable[str]) -> tuple[dt.datetime, ...]:
    """All the times that a list stands for, UTC, ascending, each once.

    Args:
        values: Times (ISO 8601, UTC if they have no offset), and ranges 'START/END/STEP' with both ends included; a
            step is a number of h, d, w, mo, q or y, such as '1d' or '3mo'. Months end where they end: a range from
            the 31st has the last day of shorter months.

    Raises:
        ValueError: a value is neither, or they are more than `MOST` times.

    """
    found: set[dt.datetime] = set()
    for value in values:
        first, *rest = value.split("/")
        if not rest:
            found.add(_parse(first))
            continue
        if len(rest) != 2 or not _STEP.fullmatch(rest[1].strip()):
            raise ValueError(f"'{value}' is no range of times; write START/END/STEP such as 2024-01-31/2024-12-31/1mo")
        found |= set(_range(_parse(first), _parse(rest[0]), rest[1].strip(), value))
        if len(found) > MOST:
            break
    if len(found) > MOST:
        raise ValueError(f"{', '.join(values)} stands for over {MOST:,} times; take a longer step")
    return tuple(sorted(found))


def _range(start: dt.datetime, end: dt.datetime, step: str, value: str) -> Iterable[dt.datetime]:
    if end < start:
        raise ValueError(f"'{value}' ends before it begins; swap the two times")
    count, unit = re.fullmatch(r"([0-9]+)([a-z]+)", step).groups()  # type: ignore[union-attr]
    origin = pl.Series([start], dtype=pl.Datetime("us", "UTC"))
    for number in range(MOST + 1):
        # Counted from the start each time, so that a month's last day stays one.
        moment: dt.datetime = origin.dt.offset_by(f"{int(count) * number}{unit}")[0]
        if moment > end:
            return
        yield moment


Times = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_canonical)]
"""A field of a configuration: times and ranges as text, normalised to UTC; `expand` gives the times."""
