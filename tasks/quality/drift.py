"""Population stability index: how far a column has moved since an earlier version.

PSI = Σ (p - q) ln(p / q) over bins, with p and q the shares of the two versions: Jeffreys' divergence, in the form
that credit scoring uses (Siddiqi 2006, "Credit Risk Scorecards"), where 0.1 is a shift to look at and 0.25 a large
one. Two samples of n and m rows from one population differ by chance: their PSI over k bins behaves as
(1/n + 1/m) χ²(k-1) (Yurdakul & Naranjo 2020, "Statistical properties of the population stability index").
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tasks.quality.profile import ColumnPartial
from tasks.store.manifest import ColumnProfile

Int64Array = npt.NDArray[np.int64]

SMOOTHING = 0.5
_Z_999 = 3.090232306167813


def population_stability_index(now: Int64Array, before: Int64Array) -> float:
    """Return the PSI of two arrays of counts over the same bins, shape (bins,); NaN if a side has no count at all.

    Half a row is added to each bin of either side (the Jeffreys prior), as an empty bin would make it infinite.
    """
    if not now.sum() or not before.sum():
        return math.nan
    p = (now + SMOOTHING) / (now.sum() + SMOOTHING * len(now))
    q = (before + SMOOTHING) / (before.sum() + SMOOTHING * len(before))
    return float(np.sum((p - q) * np.log(p / q)))


def chance_index(now: int, before: int, bins: int) -> float:
    """Return the PSI that chance alone exceeds once in a thousand times, for two samples of some numbers of rows.

    The quantile of χ² is Wilson and Hilferty's (1931) approximation, within 2 % of the truth for 2 bins or more.
    """
    freedom = bins - 1
    if freedom < 1:
        return 0.0
    spread = 2 / (9 * freedom)
    return freedom * float(1 - spread + _Z_999 * math.sqrt(spread)) ** 3 * (1 / max(now, 1) + 1 / max(before, 1))


def binned(now: ColumnPartial, before: ColumnProfile) -> tuple[Int64Array, Int64Array]:
    """Count both versions over the earlier one's bins, each of shape (bins,), int64.

    Numbers: the bins of the earlier histogram, the outer two open; if each bin was one value, values beyond them are
    counted apart, as a new code matters however near it lies. Strings and booleans: the earlier top values, and one bin
    for all others. One more bin for missing values (null, NaN, infinite) if either version has any.

    The caller ensures that both are of one kind, and that counts of values were not dropped.
    """
    missing = [now.nulls + now.nans + now.infinities, before.nulls + before.nans + before.infinities]
    if now.quantiles is not None:
        edges, seen = ((), (0,)) if before.histogram is None else (before.histogram.edges, before.histogram.counts)
        if before.distinct_exact and before.distinct == len(seen):
            # One bin a value: any value beyond the first or the last is new, however near. The histogram's outer edges
            # leave room around them, in which a column of one value could move unnoticed.
            seen = (0, *seen, 0)
            low, high = float(before.minimum or 0.0), float(before.maximum or 0.0)
            edges = (low, *edges[1:-1], float(np.nextafter(high, np.inf)))
        else:
            edges = edges[1:-1]
        new = now.quantiles.histogram([-np.inf, *edges, np.inf])
        old = np.array(seen, dtype=np.int64)
    else:
        assert now.top is not None
        assert now.top.counts is not None
        listed = dict(before.top_values)
        new = np.array([now.top.counts.get(value, 0) for value in listed] + [0], dtype=np.int64)
        old = np.array([*listed.values(), 0], dtype=np.int64)
        new[-1] = now.count - missing[0] - new.sum()
        old[-1] = before.count - missing[1] - old.sum()
    if any(missing):
        new, old = np.append(new, missing[0]), np.append(old, missing[1])
    occupied = (new > 0) | (old > 0)
    return new[occupied], old[occupied]
