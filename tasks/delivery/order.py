"""The order of an epoch, and which worker takes what: a function of (version, seed, epoch) alone, in bounded memory.

    samples of a split, in the order of its files
      └─ chunks of some consecutive samples: what is read together from a disk
           └─ regions of about 1 GiB of consecutive chunks: what a node needs of a remote version at a time

Regions are permuted; in each its chunks are permuted; some consecutive chunks of that order form a window; the samples
of a window are permuted. A split below the size of a region is one region, and one below that of a window is permuted
as a whole. Samples of a version lie in a random order to begin with, so that the neighbours in a chunk have nothing in
common.

The epoch's samples in this order are cut into batches, numbered over all workers. With W workers at batch p, worker r
takes batch p + r, and all go on to p + W. So the place of a training is one number, whatever W is, and going on with
another W is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tasks.delivery.kernel import draw_key, shuffle

IntArray = npt.NDArray[np.int64]
Remainder = Literal["pad", "drop"]

ORDER = 1
"""Number of this way to order, for the states of streams: any change that gives another order needs another number."""

# Chunks of 256 rows of a table or 8 images are read at nearly the speed of memory; so are windows that stay in the
# cache. Larger windows mix more; all sizes are those of whole samples, so that the columns picked change no order.
_CHUNK_BYTES, _CHUNK_SAMPLES = 1 << 20, (8, 256)
_WINDOW_BYTES, _WINDOW_CHUNKS = 64 << 20, (64, 256)
_REGION_BYTES = 1 << 30

_REGIONS, _CHUNKS, _SAMPLES = range(3)  # levels of draws: append to them, never renumber
_WINDOWS_KEPT = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a split is cut, all powers of two.

    Attributes:
        chunk: samples in a chunk.
        window: chunks in a window.
        region: chunks in a region.
    """

    chunk: int
    window: int
    region: int

    @classmethod
    def of(cls, sample_bytes: int) -> Sizes:
        """Sizes for samples of so many bytes."""
        chunk = min(max(_power(_CHUNK_BYTES // sample_bytes), _CHUNK_SAMPLES[0]), _CHUNK_SAMPLES[1])
        chunk_bytes = chunk * sample_bytes
        window = min(max(_power(_WINDOW_BYTES // chunk_bytes), _WINDOW_CHUNKS[0]), _WINDOW_CHUNKS[1])
        return cls(chunk, window, max(_power(_REGION_BYTES // chunk_bytes), window))


class EpochOrder:
    """The samples of one epoch by their positions in it.

    Args:
        samples: Number of samples, at least 1.
        sizes: How they are cut.
        seed: In [0, 2**63).
        epoch: Number of the epoch, from 0.
        shuffled: Without, the samples come as they are stored.

    """

    def __init__(self, samples: int, sizes: Sizes, seed: int, epoch: int, shuffled: bool = True) -> None:
        assert samples > 0, "an epoch without samples has no order"
        self.samples, self.sizes = samples, sizes
        self._seed, self._epoch, self._shuffled = seed, epoch, shuffled
        self._chunks = self._chunk_order()
        whole = len(self._chunks) * sizes.chunk
        self._missing = whole - samples  # the last chunk is as much shorter than others
        self._last = int(np.flatnonzero(self._chunks == len(self._chunks) - 1)[0])
        self._kept: dict[int, IntArray] = {}

    def take(self, start: int, count: int) -> IntArray:
        """Samples at `count` positions from `start` on, (count,); behind the last one follow the first ones again."""
        parts: list[IntArray] = []
        position, left = start % self.samples, count
        while left:
            window = self.window_at(position)
            inside = self._window(window)
            at = position - self._start(window)
            part = inside[at : at + left]
            parts.append(part)
            left -= len(part)
            position = (position + len(part)) % self.samples
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def window_at(self, position: int) -> int:
        """Window of a position in [0, samples)."""
        size = self.sizes.chunk * self.sizes.window
        window = position // size
        # The short chunk moves all later windows forward.
        return window + 1 if position >= self._start(window + 1) else window

    def chunks_from(self, window: int, count: int) -> IntArray:
        """The first samples of `count` chunks in the order of the epoch, from a window on; fewer at its end."""
        first = window * self.sizes.window
        return self._chunks[first : first + count] * self.sizes.chunk

    def _start(self, window: int) -> int:
        """Position of a window's first sample."""
        place = min(window * self.sizes.window, len(self._chunks))
        return place * self.sizes.chunk - (self._missing if place > self._last else 0)

    def _chunk_order(self) -> IntArray:
        count = -(-self.samples // self.sizes.chunk)
        chunks = np.arange(count, dtype=np.int64)
        if not self._shuffled:
            return chunks
        regions = np.arange(-(-count // self.sizes.region), dtype=np.int64)
        shuffle(regions, self._key(_REGIONS, 0))
        parts = [chunks[region * self.sizes.region : (region + 1) * self.sizes.region] for region in regions]
        for region, part in zip(regions, parts, strict=True):
            shuffle(part, self._key(_CHUNKS, int(region)))
        return np.concatenate(parts)

    def _window(self, window: int) -> IntArray:
        """Samples of a window in their order; read-only."""
        if window not in self._kept:
            while len(self._kept) >= _WINDOWS_KEPT:
                del self._kept[next(iter(self._kept))]
            firsts = self.chunks_from(window, self.sizes.window)
            found = (firsts[:, None] + np.arange(self.sizes.chunk)).ravel()
            if self._missing and found.max() >= self.samples:
                found = found[found < self.samples]
            if self._shuffled:
                shuffle(found, self._key(_SAMPLES, window))
            found.flags.writeable = False
            self._kept[window] = found
        return self._kept[window]

    def _key(self, level: int, number: int) -> np.uint64:
        return np.uint64(draw_key(self._seed, self._epoch, level, number))


def batch_count(samples: int, batch_size: int, remainder: Remainder) -> int:
    """Batches of an epoch over all workers: 'pad' has one for the rest, 'drop' leaves it out."""
    return samples // batch_size if remainder == "drop" else -(-samples // batch_size)


def step_count(batches: int, world_size: int, remainder: Remainder, consumed: int = 0) -> int:
    """Steps that each worker has left when all together have consumed some of an epoch's batches."""
    left = max(batches - consumed, 0)
    return left // world_size if remainder == "drop" else -(-left // world_size)


def mean_displacement(order: IntArray) -> float:
    """How far samples are from where they are stored, on average, by that of a full permutation (a third of them).

    Args:
        order: (n,) a permutation of range(n).
    """
    count = len(order)
    moved = np.abs(order - np.arange(count)).mean()
    return float(moved / ((count * count - 1) / (3 * count)))


def class_runs(labels: npt.NDArray[Any]) -> float:
    """Mean length of the runs of equal labels, by that of a full permutation of them: 1 is as good as that.

    Args:
        labels: (n,) classes in the order of delivery, two different ones at least.
    """
    count = len(labels)
    runs = 1 + np.count_nonzero(labels[1:] != labels[:-1])
    _, sizes = np.unique(labels, return_counts=True)
    # Neighbours differ with this probability, n - 1 pairs, and each such pair begins a run.
    differ = 1 - float((sizes * (sizes - 1.0)).sum()) / (count * (count - 1.0))
    return (1 + (count - 1) * differ) / runs


def _power(number: int) -> int:
    """The largest power of two that isn't above a number, and at least 1."""
    return 1 << max(number.bit_length() - 1, 0)
