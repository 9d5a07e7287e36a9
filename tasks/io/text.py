"""Text for a reader: figures in readable form, rules for names, the closest known name, and tables for a terminal.

Tables keep whole rows when piped. Data may contain terminal commands (colours, titles, a cleared screen): no control
character of a value reaches the terminal.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches

from pydantic_core import to_json
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.io.errors import DefinitionError

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | str | None, in_full_below: float = 1e12) -> str:
    """Format whole numbers in full with thousands separators, others to four significant digits; keep text as it is.

    Numbers from `in_full_below` on, and tiny ones, are formatted as 1.23 × 10¹⁵.
    """
    if value is None or isinstance(value, str):
        return value or "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= in_full_below or 0 < size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    if value == round(value) or size >= 1000:
        return f"{value:,.0f}"
    decimals = 3 - math.floor(math.log10(size))
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")


def share(value: float) -> str:
    """Format a share in [0, 1] in per cent: 12.3 %; 0 % and 100 % only if exact."""
    if math.isnan(value):
        return "–"
    if 0 < value < 0.001:
        return "< 0.1 %"
    if 0.999 < value < 1:
        return "> 99.9 %"
    return f"{value * 100:.1f}".removesuffix(".0") + " %"


def duration(seconds: float) -> str:
    """Format a time span: 85 ms, 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """Return a count with its noun: 1 row, 2,000 rows."""
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"


def shortened(text: str, longest: int) -> str:
    """Shorten text to some number of characters, with an ellipsis in its middle for the omitted part."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


COLUMN = r"[A-Za-z_][\w.-]*"
"""Pattern of a feature's name in a reference such as 'customer-features:total_spent'."""

_DATASET = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")
_VERSION = re.compile(r"v[0-9]+")


def closest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error sentence with the cure: the closest names, or all of a few."""
    names = list(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
    return f"; known: {', '.join(sorted(names)) or 'none'}"


def check_dataset_name(what: str, name: str, taken: Collection[str] = ()) -> None:
    """Check a name that becomes a directory and a Prefect artifact's key.

    Args:
        what: Kind of thing that it names, for the message.
        name: The name.
        taken: Names that have another meaning there.

    Raises:
        DefinitionError: the name isn't allowed; the message has the rule and an allowed name.
    """
    plain = isinstance(name, str) and _DATASET.fullmatch(name)
    if plain and name not in taken and not _VERSION.fullmatch(name):
        return
    rule = "use lower-case letters, digits, single dashes or underscores"
    word = "-".join(re.findall(r"[a-z0-9]+", str(name).lower())) or what.rpartition(" ")[2]
    if plain:
        rule = f"it is kept for {'a version' if _VERSION.fullmatch(name) else 'something else in its place'}"
        word = f"my-{word}"
    raise DefinitionError(
        f"{what} name '{name}': {rule}, such as '{word}' (it becomes a directory and a Prefect artifact key)"
    )


def check_column_name(what: str, name: str, own: Collection[str] = ()) -> None:
    """Check the name of a feature, or of another column that is published beside features.

    Args:
        what: Owner of the name, for the message, such as "feature group 'x', feature".
        name: The name.
        own: Columns that the pipeline adds to the same rows.

    Raises:
        DefinitionError: it can't be used in a reference, or is in `own`; the message has an allowed name.
    """
    word = "_".join(re.findall(r"\w+", str(name))).strip("_")
    if not re.match(r"[A-Za-z]", word):
        word = f"feature_{word}" if word else "total_spent"
    if name in own:
        raise DefinitionError(
            f"{what} '{name}': the rows get a column '{name}' of ours ({', '.join(own)}), which would replace it; "
            f"rename it, such as 'own_{name}'"
        )
    if isinstance(name, str) and re.fullmatch(COLUMN, name) and not name.startswith("_"):
        return
    raise DefinitionError(
        f"{what} '{name}': begin with a letter and go on with letters, digits, '_', '.' or '-', such as '{word}', so "
        f"that models and look-ups can name it"
    )


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
