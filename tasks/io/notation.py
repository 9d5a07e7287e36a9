"""Notation of a user: times and ranges, texts for a missing value, and YAML.

Missing values have one rule for every reader of CSV, for quoted and unquoted fields alike. By default a field of a key,
a number or a time is missing if it is blank or one of `TYPED`, as pandas, R and databases write it. In a column of text
NA may be Namibia and None a name: there only `TEXT` is missing. A user's list replaces both, for all columns. Parquet
has real nulls: its text is never missing.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import polars as pl
import yaml
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


TEXT = ("", "null", "NULL", r"\N", "#N/A", "#N/A N/A", "#NA", "<NA>")
"""Missing in every column: no text has this meaning."""

TYPED = (
    *TEXT,
    *("NA", "N/A", "n/a", "NaN", "nan", "-NaN", "-nan", "None", "Null"),
    *("1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
)
"""Missing in columns of keys, numbers and times."""

_SUSPECTS = frozenset(
    [text.casefold() for text in TYPED]
    + ["-", "--", "---", "?", "??", ".", "..", "n.a.", "na.", "not available", "not applicable", "missing", "unknown"]
    + ["undefined", "nil", "(null)", "(none)", "(blank)", "empty", "-1", "-9", "-99", "-999", "-9999", "-99999"]
)


@dataclass(frozen=True, slots=True)
class MissingValues:
    """Texts of CSV fields that are missing: in columns of text, and in those of keys, numbers and times."""

    text: tuple[str, ...] = TEXT
    typed: tuple[str, ...] = TYPED

    @property
    def ambiguous(self) -> tuple[str, ...]:
        """Texts that are missing only in columns of keys, numbers and times."""
        return tuple(mark for mark in self.typed if mark not in self.text)

    def described(self) -> str:
        """Return the choice as a sentence."""
        everywhere = ", ".join(mark for mark in self.text if mark) or "nothing else"
        if not self.ambiguous:
            return f"null in CSV: blank fields, {everywhere}"
        return (
            f"null in CSV: blank fields, {everywhere}; in keys, numbers and times also {', '.join(self.ambiguous)} "
            f"(--null-values says otherwise)"
        )


DEFAULT = MissingValues()


def missing_values(given: Sequence[str] | None) -> MissingValues:
    """Return the missing values of a user's list, and blank fields; the defaults if it is None."""
    if given is None:
        return DEFAULT
    marks = tuple(dict.fromkeys(["", *given]))
    return MissingValues(marks, marks)


def without(values: pl.Expr, marks: Sequence[str]) -> pl.Expr:
    """Replace certain values of text by null; comparisons of short text are cheaper than a set."""
    return pl.when(~pl.any_horizontal(values == mark for mark in marks)).then(values)


def suspects(keys: pl.Series) -> list[str]:
    """Return keys that may mean 'no value', such as 'none', '?' or -999; sorted."""
    text = keys.unique().drop_nulls().cast(pl.String)
    short = text.filter(text.str.len_bytes() <= 14)
    return sorted(key for key in short if key.strip().casefold() in _SUSPECTS)


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a duplicate name in a mapping (YAML would take the last) and leaves times as text.

    Only the code that expects a date converts it; 2024-13-01 would otherwise be an error of YAML, without a place.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (str(key.tag), str(key.value))
            if isinstance(key, yaml.ScalarNode) and name in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(name)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ARG002
        return super().construct_object(node, deep=True)  # refuses a node that contains itself


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str | bytes) -> Any:
    """Return the contents of a YAML document.

    Raises:
        ValueError: it is no valid YAML, or a name occurs twice in a mapping; the message gives the place.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as fault:
        raise ValueError(" ".join(str(fault).split())) from fault
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault
