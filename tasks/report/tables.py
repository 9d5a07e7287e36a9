"""Store values as text for a terminal: aligned tables that keep whole rows when piped.

Data may contain terminal commands (colours, titles, a cleared screen): no control character of a value reaches the
terminal.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from pydantic_core import to_json
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.io.text import number, shortened

_WIDEST = 10_000
_CONTROLS = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def show(headings: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Print a table; columns named in `right` are aligned right, as numbers are.

    A terminal folds wide rows; in a pipe each row is one line, whatever its width.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDEST)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(value)) for value in row))
    console.print(table)


def facts(pairs: Mapping[str, object]) -> None:
    """Print names and values, one a line, without those that are None or empty."""
    wanted = {name: _plain(value) for name, value in pairs.items() if value not in (None, "", ())}
    width = max(map(len, wanted), default=0)
    for name, value in wanted.items():
        print(f"{name:{width}s}  {value}")


def printable(text: str) -> str:
    r"""Return text fit for a terminal: control characters, including those of text direction, as '\x1b' or '\u202e'."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or unicodedata.category(one) == "Zs" else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _plain(value: object) -> str:
    return printable(_text(value))


def _text(value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return number(value)
        case dt.datetime():
            return moment(value)
        case _:
            return str(value)


def moment(value: dt.datetime | None) -> str:
    """Format a time, UTC, as short as possible: the date alone at midnight."""
    if value is None:
        return "–"
    value = value.astimezone(dt.UTC) if value.tzinfo else value
    if value.time() == dt.time():
        return f"{value:%Y-%m-%d}"
    return f"{value:%Y-%m-%d %H:%M:%S}" if value.second else f"{value:%Y-%m-%d %H:%M}"


def moments(values: Sequence[dt.datetime]) -> str:
    """Format times: all of a few, else their number between the first and the last."""
    if len(values) <= 3:
        return ", ".join(map(moment, values)) or "–"
    return f"{len(values)} times, {moment(values[0])} to {moment(values[-1])}"


def size(count: int) -> str:
    """Format a number of bytes in the fitting unit."""
    power = min(int(math.log(count, 1024)), len(_UNITS) - 1) if count > 0 else 0
    return f"{number(round(count / 1024**power, 1))} {_UNITS[power]}"


def brief(value: object, longest: int = 60) -> str:
    """Format a value of any length in one line."""
    return shortened(printable(" ".join(_text(value).split())), longest)


def as_json(value: object) -> str:
    """Format a value as JSON for other programs; times in ISO 8601, NaN and infinities as null.

    Control characters are escaped, also those above ASCII: the output may be shown on a terminal.
    """
    text = to_json(value, indent=2, inf_nan_mode="null", fallback=str).decode()
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
