"""Figures in readable form: 1,234,567 and 0.0312, never 1e+06 or 0.30000000000000004."""

from __future__ import annotations

import math

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
