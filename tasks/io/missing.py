r"""Text that means 'no value' in a CSV field: one rule for every reader of CSV, for quoted and unquoted fields alike.

By default a field of a key, a number or a time is missing if it is blank or one of `TYPED`, as pandas, R and databases
write it. In a column of text NA may be Namibia and None a name: there only `TEXT` is missing. A user's list replaces
both, for all columns. Parquet has real nulls: its text is never missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

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
