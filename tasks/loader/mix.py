"""The order of sources in a mix: how many samples of each come before any place of an epoch.

An epoch of N samples has a quota of each source, whole numbers that add up to N. Three orders keep them exactly:

| mix | the source of each sample |
|---|---|
| stratified | spread evenly: in the first n samples each source has its share of n, rounded down or up, for any n |
| proportional | a random permutation of the quotas' items, drawn from the seed |
| alternating | that of its batch; the batches are spread evenly |

All are functions of the quotas, the seed and the epoch, whatever the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from tasks.loader.kernel import draw_sources, spread_sources

IntArray = npt.NDArray[np.int64]
Mix = Literal["stratified", "proportional", "alternating"]

LARGEST = 1 << 31
"""Upper bound, exclusive, of an epoch's samples: the arithmetic of quotas is that of int64."""


def apportion(size: int, shares: Sequence[Fraction]) -> list[int]:
    """Return whole numbers in proportion to shares that add up to a size, each within one of the exact number.

    The largest fractions are rounded up.
    """
    total = sum(shares)
    exact = [size * share / total for share in shares]
    counts = [math.floor(number) for number in exact]
    by_fraction = sorted(range(len(shares)), key=lambda source: counts[source] - exact[source])
    for source in by_fraction[: size - sum(counts)]:
        counts[source] += 1
    return counts


class SourceOrder:
    """Counts of each source's samples in front of the places of an epoch, which are asked for in ascending order.

    Args:
        quotas: Samples of each source; their sum is below `LARGEST`.
        mix: Kind of the order.
        batch_size: Samples of a batch. Of an alternating mix, each quota is a multiple of it, and each place.
        key: Of the draws of a proportional mix, uint64.

    """

    def __init__(self, quotas: Sequence[int], mix: Mix, batch_size: int, key: int) -> None:
        self._unit = batch_size if mix == "alternating" else 1
        items = [quota // self._unit for quota in quotas]
        # A mix of 3 : 1 repeats itself after four samples, so that any place is found at once.
        self._laps = 1 if mix == "proportional" else math.gcd(*items)
        self._quotas = np.array([count // self._laps for count in items], np.int64)
        self._key = np.uint64(key) if mix == "proportional" else None
        self._period = int(self._quotas.sum())
        self._lap = self._position = 0
        self._counts = np.zeros(len(quotas), np.int64)

    def before(self, places: Sequence[int] | IntArray) -> IntArray:
        """Return the samples of each source before some places, (places, sources).

        Args:
            places: In ascending order, none before the last ones asked for. After an epoch another one begins.
        """
        ends = np.asarray(places, np.int64) // self._unit
        if self._key is None and (lap := int(ends[0]) // self._period) > self._lap:
            self._lap, self._position = lap, lap * self._period
            self._counts[:] = lap * self._quotas
        found = np.empty((len(ends), len(self._quotas)), np.int64)
        if self._key is None:
            done = self._lap * self._period
            within = self._counts - self._lap * self._quotas
            spread_sources(self._quotas, self._position - done, within, ends - done, found)
            found += self._lap * self._quotas
        else:
            draw_sources(self._quotas, self._position, self._counts, ends, found, self._key)
        self._position, self._counts = int(ends[-1]), found[-1].copy()
        return found * self._unit
