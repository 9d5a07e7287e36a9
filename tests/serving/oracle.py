"""The point-in-time join as one would explain it: for each row, look at every row of the history."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def asof(
    spine: Sequence[Row],
    history: Sequence[Row],
    *,
    ttl: dt.timedelta | None = None,
    strict: bool = False,
    known_at: bool = False,
) -> list[int]:
    """Number of the history's row for each spine row, or −1; columns: key, time; key, as_of, _created, _superseded."""
    found = []
    for row in spine:
        best = -1
        for number, past in enumerate(history):
            if row["key"] is None or row["time"] is None or past["key"] != row["key"]:
                continue
            age = row["time"] - past["as_of"]
            if age < dt.timedelta(0) or (strict and not age) or (ttl is not None and age > ttl):
                continue
            until = past["_superseded"]
            if known_at and not (past["_created"] <= row["time"] and (until is None or row["time"] < until)):
                continue
            if best < 0 or past["as_of"] >= history[best]["as_of"]:
                best = number
        found.append(best)
    return found


def known(
    versions: Sequence[tuple[dt.datetime, Sequence[Row]]], row: Row, *, known_at: bool = False, **options: Any
) -> Row | None:
    """Feature row that counts for a spine row, from versions (created, rows), oldest first; None without.

    Of each as_of the newest version that holds it counts, for known_at the newest of those created by the row's time.
    """
    held = [v for v in versions if not known_at or (row["time"] is not None and v[0] <= row["time"])]
    newest = {past["as_of"]: number for number, (_, rows) in enumerate(held) for past in rows}
    history = [
        {**past, "_created": None, "_superseded": None}
        for number, (_, rows) in enumerate(held)
        for past in rows
        if newest[past["as_of"]] == number
    ]
    number = asof([row], history, **options)[0]
    return history[number] if number >= 0 else None
