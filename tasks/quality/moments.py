"""Exact moments: the same mean and deviation, to the bit, however the values were cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

# 2**-_SCALE divides every float64: frexp's mantissas are integers over 2**53, and its exponents at least -1073.
_SCALE = 1126
_SUM_CHUNK = 1 << 19


@dataclass(frozen=True)
class Moments:
    """Exact sums of finite float64 values and of their squares, so that the mean is correctly rounded.

    Attributes:
        count: number of values.
        total: sum of the values times 2**1126.
        squares: sum of the squares times 2**2252.
    """

    count: int = 0
    total: int = 0
    squares: int = 0

    @classmethod
    def of(cls, values: FloatArray) -> Moments:
        """Return the sums of an array of finite values, shape (n,)."""
        total = squares = 0
        for start in range(0, len(values), _SUM_CHUNK):
            part_total, part_squares = _exact_sums(values[start : start + _SUM_CHUNK])
            total += part_total
            squares += part_squares
        return cls(len(values), total, squares)

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """Return the sums over any number of parts; integers add without error, so the order makes no difference."""
        parts = list(parts)
        return cls(sum(p.count for p in parts), sum(p.total for p in parts), sum(p.squares for p in parts))

    @property
    def mean(self) -> float | None:
        """Return the mean, or None if there is no value."""
        return float(Fraction(self.total, self.count << _SCALE)) if self.count else None

    @property
    def std(self) -> float | None:
        """Return the sample standard deviation (n - 1), or None below two values."""
        if self.count < 2:
            return None
        numerator = self.count * self.squares - self.total**2
        if numerator == 0:
            return 0.0
        denominator = (self.count * (self.count - 1)) << (2 * _SCALE)
        # A power of four is factored out, as the variance of large values may overflow when their deviation doesn't.
        shift = (numerator.bit_length() - denominator.bit_length()) // 2
        scaled = Fraction(numerator, denominator) / Fraction(4) ** shift
        try:
            return math.ldexp(math.sqrt(scaled), shift)
        except OverflowError:  # only for values of both signs near the limits of float64
            return math.inf


def _exact_sums(values: FloatArray) -> tuple[int, int]:
    """Return sum and sum of squares as integers (scaled as in Moments), of at most 2**19 values.

    Each value is m * 2**e with an integer m of 53 bits, cut into a * 2**27 + b; the pieces of m and m**2 are summed by
    exponent, each sum below 2**53 and so exact in float64.
    """
    fractions, exponents = np.frexp(values)
    mantissas = np.ldexp(fractions, 53).astype(np.int64)
    lowest = int(exponents.min())
    groups = exponents - lowest
    a, b = mantissas >> 27, mantissas & 0x7FFFFFF
    total = squares = 0

    def sums(pieces: Int64Array) -> list[int]:
        return [int(x) for x in np.bincount(groups, weights=pieces)]

    def wide_sums(pieces: Int64Array) -> list[int]:
        return [(h << 32) + low for h, low in zip(sums(pieces >> 32), sums(pieces & 0xFFFFFFFF), strict=True)]

    for group, (hi, lo, hi2, cross, lo2) in enumerate(
        zip(sums(a), sums(b), wide_sums(a * a), wide_sums(a * b), wide_sums(b * b), strict=True)
    ):
        shift = group + lowest - 53 + _SCALE
        total += ((hi << 27) + lo) << shift
        squares += ((hi2 << 54) + (cross << 28) + lo2) << (2 * shift)
    return total, squares
