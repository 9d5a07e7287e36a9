"""The way through one source of a stream: the samples of each step, and the files that are needed soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.loader.order import EpochOrder
from tasks.loader.shards import Shards


class Take(NamedTuple):
    """A worker's samples of one source in a step: a part of some consecutive samples of the source's order.

    Attributes:
        source: number of the source.
        lap: epoch of the source's own order.
        start: position of the step's first sample in it.
        size: samples of the step.
        low: start of the worker's part of them, when they are sorted by stream.
        high: end of the part.
        step: size, low and high of the whole step, of which this may be the part in one lap; they tell which streams
            the worker reads.
        real: False for samples that only fill a batch.
    """

    source: int
    lap: int
    start: int
    size: int
    low: int
    high: int
    step: tuple[int, int, int]
    real: bool = True


class Source:
    """The samples of a source, step by step.

    Args:
        shards: Its samples.
        order_of: Returns the order of a lap.

    """

    def __init__(self, shards: Shards, order_of: Callable[[int], EpochOrder]) -> None:
        self.shards, self._order_of = shards, order_of
        self._lap, self._named = -1, 0

    def samples(self, take: Take) -> tuple[npt.NDArray[np.int64], int]:
        """Return a worker's samples, (high - low,), and the number of real ones, which come first.

        Chunks that are needed soon are announced to the shards.
        """
        _, lap, start, size, low, high, step, real = take
        if lap != self._lap:
            self._lap, self._named, self._order = lap, 0, self._order_of(lap)
            self._streams = self._order.streams_cut(start, *step)
        if real:
            self._announce(start, size)
        index, found = self._order.cut(start, size, low, high)
        return index, found if real else 0

    def _announce(self, start: int, count: int) -> None:
        order, sizes, named = self._order, self._order.sizes, self._named
        first, last = order.round_at(start), order.round_at(start + count - 1)
        if last + 2 <= named:  # a stream may be a round ahead
            return
        if self.shards.remote:
            chunks = order.chunks_of(self._streams, first, max(sizes.ahead, (last + 1 - first) * sizes.window))
        else:
            begin = max(first, named)
            chunks = order.chunks_of(self._streams, begin, (last + 2 - begin) * sizes.window)
        self.shards.soon(*chunks, sizes.chunk)
        self._named = last + 2
