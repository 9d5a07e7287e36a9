"""The order of an epoch and of its workers: a function of (version, seed, epoch) alone, in bounded memory.

    samples of a split, in the order of its files
      └─ canonical streams: C ranges of equally many samples, C a power of two up to 64, of at least 8 files each
           └─ regions of consecutive chunks: about 1 GiB in all streams together, and a file at least
                └─ chunks of some consecutive samples: the unit of a read from a disk

In a stream the regions are permuted, and the chunks in each region. Some consecutive chunks of that order form a
window, and the samples of a window are permuted. A stream smaller than a region is one region, and one smaller
than a window is permuted as a whole. A version's samples are stored in a random order, so that the neighbours in
a chunk have nothing in common.

An epoch interleaves the streams: sample i is the next one of stream bit_reverse(i mod C). Any 2**k consecutive samples
therefore come from streams that are spread evenly. C depends on the version's files alone.

A step takes the next world_size * batch_size samples of the epoch. They are sorted by stream, and worker r takes the
r-th part. So the order of steps depends on no worker, and each worker reads few streams, and few files. The place of a
training is one number, the batches that all workers together have consumed, so that resuming with another number of
workers is arithmetic.

    4 streams, 2 workers, batches of 2 samples; a step has samples a0 c0 b0 d0, where c0 is the first of stream c
      worker 0: a0 b0      worker 1: c0 d0
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tasks.io.tensors import BoolArray, Int64Array
from tasks.loader.kernel import collect, deal, deal_parts, draw_key, samples_of, shuffle

Remainder = Literal["pad", "drop"]

ORDER = 2
"""Number of this ordering, for the states of streams: any change of the order needs another number."""

# Chunks of 256 rows of a table or 8 images are read at nearly the speed of memory; the same holds for windows in the
# cache. Larger windows mix more; sizes are those of whole samples, so that the choice of columns changes no order.
_CHUNK_BYTES, _CHUNK_SAMPLES = 1 << 20, (8, 256)
_WINDOW_BYTES, _WINDOW_CHUNKS = 64 << 20, (64, 256)  # of all streams together
_REGION_BYTES = 1 << 30  # of all streams together
# With one file a stream, a small cache would drop files before they are used up, and a single worker would download
# all of them before its first batch.
_MOST_STREAMS, _STREAM_FILES = 64, 8

_REGIONS, _CHUNKS, _SAMPLES, DRAWS, SOURCES, SEEDS, TRANSFORMS, MIXES = range(
    8
)  # levels of draws: append to them, never renumber
_STREAM_DRAWS = 32  # bits for the draws of a level in a stream


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a split's parts: streams, and in each stream regions, windows and chunks.

    Attributes:
        chunk: samples in a chunk, a power of two.
        window: chunks in a window of a stream, a power of two.
        region: chunks in a region of a stream.
        streams: number of streams, a power of two.
        ahead: chunks of a stream whose files are fetched from a remote store ahead of their use.
    """

    chunk: int
    window: int
    region: int
    streams: int
    ahead: int

    @classmethod
    def of(cls, sample_bytes: int, samples: int, files: int) -> Sizes:
        """Return the sizes for a split.

        Args:
            sample_bytes: Bytes of a sample.
            samples: Number of samples.
            files: Number of files.

        """
        streams = _power(min(_MOST_STREAMS, files // _STREAM_FILES))
        chunk = min(max(_power(_CHUNK_BYTES // sample_bytes), _CHUNK_SAMPLES[0]), _CHUNK_SAMPLES[1])
        chunk_bytes = chunk * sample_bytes
        window = min(max(_power(_WINDOW_BYTES // chunk_bytes), _WINDOW_CHUNKS[0]), _WINDOW_CHUNKS[1])
        ahead = max(_power(_REGION_BYTES // chunk_bytes), window) // streams
        # With regions smaller than a file, a cache too small for the split would download files again for each region.
        region = max(ahead, -(-samples // (files * chunk)))
        return cls(chunk, window // streams, region, streams, ahead)


class Share(NamedTuple):
    """A worker's part of each step.

    Attributes:
        rank: number of the worker, from 0.
        world_size: number of workers.
        batch_size: samples of each worker.
    """

    rank: int
    world_size: int
    batch_size: int

    @property
    def step(self) -> int:
        """Samples of a step."""
        return self.world_size * self.batch_size

    @property
    def bounds(self) -> tuple[int, int]:
        """Start and end of the worker's part in a step."""
        return self.rank * self.batch_size, (self.rank + 1) * self.batch_size


class Reading(NamedTuple):
    """Samples of a batch, with what they need to be transformed.

    Attributes:
        samples: (m,) samples to read: those of the batch and their partners.
        copies: (m,) which of its copies in the epoch each is, from 0.
        own: (n,) place in `samples` of each sample of the batch; real ones come first.
        partner: (n,) place in `samples` of its partner; its own if it has none.
        pair: (n,) position in the epoch of the first of both: the pair's name.
        real: number of real ones.
    """

    samples: Int64Array
    copies: Int64Array
    own: Int64Array
    partner: Int64Array
    pair: Int64Array
    real: int

    def without(self, good: BoolArray) -> Reading:
        """Return the reading without the damaged samples, (m,) False; partners of these have none."""
        there = good[self.own]
        own = self.own[there]
        partner = np.where(good[self.partner[there]], self.partner[there], own)
        place = np.cumsum(good) - 1
        real = int(np.count_nonzero(there[: self.real]))
        return Reading(self.samples[good], self.copies[good], place[own], place[partner], self.pair[there], real)


class EpochOrder:
    """The samples of one epoch by their positions in it.

    Args:
        samples: Number of samples, at least 1.
        sizes: Sizes of the parts.
        seed: In [0, 2**63).
        epoch: Number of the epoch, from 0.
        shuffled: False: the samples come as they are stored, as one stream.
        drawn: (samples,) ascending, the stored sample of each sample of the epoch, some repeatedly; None: each once.
            It is used up.

    Attributes:
        samples: as given.
        sizes: likewise.
        bounds: (streams + 1,) first sample of each stream, and the end.

    """

    def __init__(  # noqa: PLR0917 - the first five are what an order is a function of
        self,
        samples: int,
        sizes: Sizes,
        seed: int,
        epoch: int,
        shuffled: bool = True,
        drawn: Int64Array | None = None,
    ) -> None:
        assert samples > 0, "an epoch without samples has no order"
        self.samples, self.sizes = samples, sizes
        self._seed, self._epoch, self._shuffled = seed, epoch, shuffled
        # No stream is empty.
        self._turns = _bit_reversed(min(sizes.streams, _power(samples)) if shuffled else 1)
        # The last turn is incomplete: the streams that it visits have one sample more.
        lengths = samples // len(self._turns) + (self._turns < samples % len(self._turns))
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])
        self._streams: dict[int, _Stream] = {}
        # The current window of each stream, and its range of places in the stream.
        window = min(sizes.chunk * sizes.window, int(lengths.max()))
        self._round = len(self._turns) * sizes.chunk * sizes.window
        self._windows = np.empty((len(self._turns), window), np.int64)
        self._starts, self._ends = np.zeros((2, len(self._turns)), np.int64)
        self._drawn = drawn
        self._again: Int64Array | None = None
        if drawn is not None:
            # Copies of a stream's first sample that earlier streams have.
            self._earlier = self.bounds[:-1] - np.searchsorted(drawn, drawn[self.bounds[:-1]])
            for first, end in itertools.pairwise(self.bounds):
                _part_copies(drawn[first:end])

    def take(self, start: int, count: int) -> Int64Array:
        """Return the samples at `count` positions from `start` on, (count,); after the last one it starts again."""
        found, streams = np.empty(count, np.int64), len(self._turns)
        done, position = 0, start % self.samples
        while done < count:
            piece = found[done : done + self.samples - position]
            runs, _ = deal(self._turns, self.samples, position, len(piece), 0, len(piece))
            for run in range(len(runs)):
                stream, _, size = runs[run]
                piece[(self._turns[stream] - position) % streams :: streams] = self._collect(runs[run : run + 1], size)
            done, position = done + len(piece), 0
        return self._stored(found)

    def part(self, start: int, share: Share) -> tuple[Int64Array, int]:
        """Return a worker's batch of the step from a position on: (batch_size,) samples, and the number of real ones.

        A step that goes beyond the epoch's end is filled with the epoch's first samples. They come last in a batch.
        """
        return self.cut(start, share.step, *share.bounds)

    def cut(self, start: int, count: int, low: int, high: int) -> tuple[Int64Array, int]:
        """Return a part of some consecutive samples, which are sorted by stream, and the number of real ones in it.

        Args:
            start: Position of the first one.
            count: Number of samples; those beyond the epoch's end are its first ones, not real, and last in the part.
            low: Start of the part among them.
            high: End of the part.
        """
        found, real = self.cuts(np.array([[start, count, low, high]], np.int64))
        return found, int(real[0])

    def cuts(self, parts: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return what `cut` returns for each of some parts, one after the other, and their numbers of real samples.

        Args:
            parts: (n, 4) arguments of `cut`.
        """
        runs, real = deal_parts(self._turns, self.samples, parts)
        return self._stored(self._collect(runs, int((parts[:, 3] - parts[:, 2]).sum()))), real

    def reading(self, start: int, count: int, low: int, high: int, paired: bool) -> Reading:
        """Return the part of some consecutive samples that `cut` returns, in its order, and partners for them.

        Partners are neighbours in a stream: whatever the steps, a sample has the same one, and nearly all are in the
        same part. At the ends of a part's streams one more sample is read.

        Args:
            start: As for `cut`.
            count: Likewise.
            low: Likewise.
            high: Likewise.
            paired: True for partners; the last sample of a stream of an odd length has none.
        """
        runs, real = deal(self._turns, self.samples, start, count, low, high)
        streams, places, sizes = runs.T.copy()
        within = np.arange(high - low) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if paired:
            lengths = np.diff(self.bounds)[streams]
            runs[:, 1] = places & ~1
            runs[:, 2] = np.minimum((places + sizes + 1) & ~1, lengths) - runs[:, 1]
        begins, counts = runs.T[1:].copy()
        found = self._collect(runs, int(counts.sum()))
        own = within + np.repeat(np.cumsum(counts) - counts + places - begins, sizes)
        partner, place = own, within + np.repeat(places, sizes)
        if paired:
            there = (place ^ 1) < np.repeat(lengths, sizes)
            partner = np.where(there, own + (place ^ 1) - place, own)
        pair = (place & ~1) * len(self._turns) + np.repeat(self._turns[streams], sizes)
        return Reading(self._stored(found), self._copies(found), own, partner, pair, real)

    def streams_cut(self, start: int, count: int, low: int, high: int) -> Int64Array:
        """Return the streams of the parts that `cut` takes of this step and of later ones as large."""
        whole = max((self.samples - start) // count, 1)
        # A worker's part depends on the first stream of a step, which recurs.
        starts = range(start, start + min(whole, len(self._turns)) * count, count)
        dealt = [deal(self._turns, self.samples, first, count, low, high)[0][:, 0] for first in starts]
        return np.unique(np.concatenate(dealt))

    def round_at(self, position: int) -> int:
        """Return the round of a position: in round n, streams are about in their n-th window, and not before it."""
        return position // self._round

    def position_of(self, number: int) -> int:
        """Return the first position of a round."""
        return number * self._round

    def chunks_of(self, streams: Int64Array, number: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Return first samples and ends of `count` chunks of each of some streams from a round on, in order of use.

        There are fewer at the end of the epoch. Of drawn samples each is a range of its own.
        """
        pieces = [self._stream(stream).chunks(number, count) for stream in streams.tolist()]
        firsts = np.full((max(map(len, pieces)), len(pieces)), -1, np.int64)
        for column, piece in enumerate(pieces):
            firsts[: len(piece), column] = piece
        ends = np.minimum(firsts + self.sizes.chunk, self.bounds[streams + 1])
        there = firsts >= 0
        firsts, ends = firsts[there], ends[there]
        if self._drawn is None:
            return firsts, ends
        places = firsts[:, None] + np.arange(self.sizes.chunk)
        samples = self._drawn[places[places < ends[:, None]]]
        return samples, samples + 1

    def _stored(self, found: Int64Array) -> Int64Array:
        return found if self._drawn is None else self._drawn[found]

    def _copies(self, found: Int64Array) -> Int64Array:
        """Return which of its sample's copies each place of the drawn samples holds, from 0."""
        drawn = self._drawn
        if drawn is None:
            return np.zeros(len(found), np.int64)
        if self._again is None:  # in a stream the second copies begin where samples descend, then the third ones
            self._again = np.flatnonzero(drawn[1:] <= drawn[:-1]) + 1
        streams = np.searchsorted(self.bounds, found, side="right") - 1
        firsts = self.bounds[streams]
        copies: Int64Array = np.searchsorted(self._again, found, side="right")
        copies -= np.searchsorted(self._again, firsts, side="right")
        copies += np.where(drawn[found] == drawn[firsts], self._earlier[streams], 0)
        return copies

    def _collect(self, runs: Int64Array, count: int) -> Int64Array:
        """Return the samples of runs, (count,); uses up `runs`."""
        found = np.empty(count, np.int64)
        run = done = 0
        while True:
            run, done = collect(runs, run, self._windows, self._starts, self._ends, found, done)
            if run == len(runs):
                return found
            self._load(int(runs[run, 0]), int(runs[run, 1]))

    def _load(self, number: int, place: int) -> None:
        """Make the window of a place in a stream the current one."""
        stream = self._stream(number)
        window = stream.window_at(place)
        start = stream.start(window)
        self._starts[number], self._ends[number] = start, start + stream.fill(window, self._windows[number])

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            first, end = self.bounds[number : number + 2].tolist()
            key = (self._seed, self._epoch, number) if self._shuffled else None
            self._streams[number] = _Stream(first, end, self.sizes, key)
        return self._streams[number]


class _Stream:
    """The samples of one stream in their order.

    Args:
        first: First sample.
        end: The last sample + 1.
        sizes: Sizes of the parts.
        key: Seed, epoch, and number of the stream; None: as they are stored.

    """

    def __init__(self, first: int, end: int, sizes: Sizes, key: tuple[int, int, int] | None) -> None:
        self._first, self._end, self._sizes, self._key = first, end, sizes, key
        self._order = self._chunk_order()
        # The last chunk is shorter than others by so many samples.
        self._missing = len(self._order) * sizes.chunk - (end - first)
        self._last = int(np.flatnonzero(self._order == len(self._order) - 1)[0])

    def window_at(self, place: int) -> int:
        """Return the window of a place in the stream."""
        window = place // (self._sizes.chunk * self._sizes.window)
        # The short chunk moves all later windows forward.
        return window + 1 if place >= self.start(window + 1) else window

    def start(self, window: int) -> int:
        """Return the place of a window's first sample."""
        chunk = min(window * self._sizes.window, len(self._order))
        return chunk * self._sizes.chunk - (self._missing if chunk > self._last else 0)

    def chunks(self, window: int, count: int) -> Int64Array:
        """Return the first samples of `count` chunks from a window on; fewer at the end."""
        start = window * self._sizes.window
        return self._first + self._order[start : start + count] * self._sizes.chunk

    def fill(self, window: int, out: Int64Array) -> int:
        """Write a window's samples in their order to an array that may be longer; return their number."""
        count = samples_of(self.chunks(window, self._sizes.window), self._sizes.chunk, self._end, out)
        self._shuffle(out[:count], _SAMPLES, window)
        return count

    def _chunk_order(self) -> Int64Array:
        size = self._sizes.region
        chunks = np.arange(-(-(self._end - self._first) // self._sizes.chunk), dtype=np.int64)
        if self._key is None:
            return chunks
        regions = np.arange(-(-len(chunks) // size), dtype=np.int64)
        self._shuffle(regions, _REGIONS, 0)
        parts = [chunks[region * size : (region + 1) * size] for region in regions]
        for region, part in zip(regions, parts, strict=True):
            self._shuffle(part, _CHUNKS, int(region))
        return np.concatenate(parts)

    def _shuffle(self, values: Int64Array, level: int, number: int) -> None:
        if self._key is not None:
            seed, epoch, stream = self._key
            shuffle(values, np.uint64(draw_key(seed, epoch, level, stream << _STREAM_DRAWS | number)))


def batch_count(samples: int, batch_size: int, remainder: Remainder) -> int:
    """Return the batches of an epoch over all workers: 'pad' adds one for the rest, 'drop' leaves it out."""
    return samples // batch_size if remainder == "drop" else -(-samples // batch_size)


def step_count(batches: int, world_size: int, remainder: Remainder, consumed: int = 0) -> int:
    """Return the steps left for each worker after some of an epoch's batches were consumed by all together."""
    left = max(batches - consumed, 0)
    return left // world_size if remainder == "drop" else -(-left // world_size)


def _part_copies(drawn: Int64Array) -> None:
    """Sort ascending samples in place: first one of each, then the second copy of each, and so on.

    Copies that lie together would be shuffled in one window, and come shortly after one another.
    """
    first = np.flatnonzero(np.diff(drawn, prepend=-1))
    if len(first) < len(drawn):
        copies = np.arange(len(drawn)) - np.repeat(first, np.diff(first, append=len(drawn)))
        drawn[:] = drawn[np.argsort(copies, kind="stable")]


def _power(number: int) -> int:
    """Return the largest power of two ≤ a number, and at least 1."""
    return 1 << max(number.bit_length() - 1, 0)


def _bit_reversed(count: int) -> Int64Array:
    """Return the numbers below a power of two, bits reversed: the turn of each stream, and the stream of each turn."""
    turns = np.zeros(1, np.int64)
    while len(turns) < count:
        turns = np.concatenate([2 * turns, 2 * turns + 1])
    return turns
