"""Figures read as a person writes them."""

from __future__ import annotations

import math

import pytest

from tasks.io.text import duration, number, plural, share, shortened

NUMBERS = [
    (0.1 + 0.2, "0.3"),
    (0.0, "0"),
    (1e3, "1,000"),
    (1234567.891, "1,234,568"),
    (12.3456, "12.35"),
    (999.96, "1000"),
    (-0.01234567, "-0.01235"),
    (1.25e-7, "1.25 × 10⁻⁷"),
    (1e15, "1 × 10¹⁵"),
    (math.nan, "NaN"),
    (-math.inf, "-∞"),
    ("int32", "int32"),
    (None, "–"),
]


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers(value: float | str | None, text: str) -> None:
    assert number(value) == text


def test_other_numerals() -> None:
    shares = [0, 1, 0.5, 0.1234, 1e-9, 0.9999, math.nan]
    assert list(map(share, shares)) == ["0 %", "100 %", "50 %", "12.3 %", "< 0.1 %", "> 99.9 %", "–"]
    seconds = [0, 0.0854, 0.9996, 4.21, 59.96, 185, 3600, 7620]
    assert list(map(duration, seconds)) == [
        "0 ms",
        "85 ms",
        "1.0 s",
        "4.2 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]
    assert (plural(1, "row"), plural(2000, "class", "classes")) == ("1 row", "2,000 classes")
    assert (shortened("abcdefgh", 5), shortened("abc", 5)) == ("ab…gh", "abc")
