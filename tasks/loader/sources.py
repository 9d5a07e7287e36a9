"""What a worker takes from each source of its batches, and which samples these are, for some steps at once.

Steps are dealt in groups, so that a batch costs few calls, however many sources it has. Nothing else depends on groups:
files are announced, mapped and checked step by step, as the samples are gathered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tasks.io.tensors import Int64Array
from tasks.loader.order import EpochOrder, Reading
from tasks.loader.shards import Shards

_SAMPLES, _STEPS = 1 << 14, 64  # that are dealt at once


def steps_at_once(batch_size: int) -> int:
    """Return the steps of a group, for batches of so many samples."""
    return min(max(_SAMPLES // batch_size, 1), _STEPS)


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


class Takes(NamedTuple):
    """A worker's samples of one source in the steps of a group: takes that have all but their parts in common.

    Attributes:
        source: as of `Take`.
        lap: likewise.
        parts: (steps, 4) start, size, low and high of each step; low is high where nothing is taken, not in all steps.
        step: as of the first take.
        real: as of `Take`.
    """

    source: int
    lap: int
    parts: Int64Array
    step: tuple[int, int, int]
    real: bool = True

    def at(self, step: int) -> Take:
        """Return the take of a step."""
        start, size, low, high = self.parts[step].tolist()
        return Take(self.source, self.lap, start, size, low, high, self.step, self.real)


class Source:
    """The samples of a source, step by step.

    Args:
        shards: Its samples.
        order_of: Returns the order of a lap.
        seed: Seed of its orders, and of the draws of its samples.

    """

    row = 0
    """Elements of a row of several samples; 0 where each sample has a row of its own."""

    def __init__(self, shards: Shards, order_of: Callable[[int], EpochOrder], seed: int) -> None:
        self.shards, self._order_of, self.seed = shards, order_of, seed
        self._laps: dict[int, tuple[EpochOrder, Int64Array]] = {}  # with the streams that the worker reads
        # What was announced: rounds, and positions, of a lap.
        self._lap, self._rounds, self._named = -1, 0, 0

    def deal(self, takes: Takes) -> tuple[Int64Array, Int64Array]:
        """Return a worker's samples, step by step, and the number of real ones of each, (steps,), which come first."""
        taken = takes.parts[:, 2] < takes.parts[:, 3]
        order, _ = self._lap_of(takes.at(int(taken.argmax())))
        index, real = order.cuts(takes.parts)
        return index, real if takes.real else np.zeros_like(real)

    def reading(self, take: Take, paired: bool) -> Reading:
        """Return a worker's samples as `deal` does, with what they need to be transformed, and mixed if `paired`."""
        reading = self._lap_of(take)[0].reading(take.start, take.size, take.low, take.high, paired)
        return reading if take.real else reading._replace(real=0)

    def rows(self, take: Take) -> tuple[Int64Array, Int64Array, int]:
        """Return the samples of a worker's rows of a step, how many each row has, and the number of real rows."""
        index, real = self._lap_of(take)[0].cut(take.start, take.size, take.low, take.high)
        return index, np.ones(len(index), np.int64), real if take.real else 0

    def bound(self, take: Take) -> int | None:  # noqa: ARG002 - that of groups depends on the step
        """Return the elements of a row of sequences, if the step says it; None: the longest one of a batch says it."""
        return None

    def has_news(self, takes: Takes) -> bool:
        """Return True if `announce` has something to do in some step."""
        return takes.real and (takes.lap != self._lap or int(takes.parts[-1, :2].sum()) > self._named)

    def announce(self, take: Take) -> None:
        """Announce the chunks that are needed soon to the shards; the samples of the take were dealt before."""
        if not take.real or take.low == take.high:
            return
        if take.lap != self._lap:
            self._lap, self._rounds, self._named = take.lap, 0, 0
            self._laps = {lap: found for lap, found in self._laps.items() if lap >= take.lap}
        end = take.start + take.size
        if end <= self._named:
            return
        order, streams = self._lap_of(take)
        sizes, first, last = order.sizes, order.round_at(take.start), order.round_at(end - 1)
        if self.shards.remote:
            chunks = order.chunks_of(streams, first, max(sizes.ahead, (last + 1 - first) * sizes.window))
        else:
            begin = max(first, self._rounds)
            chunks = order.chunks_of(streams, begin, (last + 2 - begin) * sizes.window)
        self.shards.soon(*chunks, sizes.chunk)
        # A stream may be a round ahead.
        self._rounds, self._named = last + 2, order.position_of(last + 1)

    def _lap_of(self, take: Take) -> tuple[EpochOrder, Int64Array]:
        """Return the order of a take's lap, and its streams that the worker reads."""
        if take.lap not in self._laps:
            order = self._order_of(take.lap)
            self._laps[take.lap] = order, order.streams_cut(take.start, *take.step)
        return self._laps[take.lap]


class Picked(NamedTuple):
    """Usable samples of a step.

    Attributes:
        samples: Samples of this and of other steps.
        parts: (P, 3) source of each part of the step, its place in `samples`, and the number of its samples.
        size: Number of samples of the step.
        real: Number of real ones of each source.
        skipped: Number of damaged ones.
    """

    samples: Int64Array
    parts: Int64Array
    size: int
    real: list[int]
    skipped: int = 0

    @classmethod
    def of(cls, picked: Sequence[tuple[int, Int64Array]], real: list[int], skipped: int = 0) -> Picked:
        """Make it of the number of the source and the samples of each part."""
        sizes = np.array([len(samples) for _, samples in picked], np.int64)
        parts = np.stack([[source for source, _ in picked], np.cumsum(sizes) - sizes, sizes], axis=1)
        return cls(np.concatenate([samples for _, samples in picked]), parts, int(sizes.sum()), real, skipped)

    def by_part(self) -> list[tuple[int, Int64Array]]:
        """Return the number of the source and the samples of each part."""
        return [(source, self.samples[first : first + size]) for source, first, size in self.parts.tolist()]


def pick(sources: Sequence[Source], takes: Sequence[Takes]) -> Iterator[Picked]:
    """Yield the usable samples of each step of a group; real ones of a source come first, sources as in `takes`.

    Raises:
        CorruptVersion: as `Shards.usable`, in the step that has the sample.
    """
    dealt = [sources[own.source].deal(own) for own in takes]
    samples = np.concatenate([found for found, _ in dealt])
    sizes = np.stack([own.parts[:, 3] - own.parts[:, 2] for own in takes])
    firsts = np.cumsum(sizes).reshape(sizes.shape) - sizes
    numbers = np.repeat([[own.source] for own in takes], sizes.shape[1], axis=1)
    parts = np.ascontiguousarray(np.stack([numbers, firsts, sizes]).transpose(2, 1, 0))
    real = np.zeros((len(parts), len(sources)), np.int64)
    for own, (_, found) in zip(takes, dealt, strict=True):
        real[:, own.source] += found
    news = [own for own in takes if sources[own.source].has_news(own)]
    all_shards = [sources[number].shards for number in {own.source for own in takes}]
    for step, (size, shown) in enumerate(zip(sizes.sum(axis=0).tolist(), real.tolist(), strict=True)):
        for own in news:
            sources[own.source].announce(own.at(step))
        picked, now = Picked(samples, parts[step], size, shown), time.monotonic()
        if any(now >= shards.settled_until for shards in all_shards):
            picked = _usable(sources, picked, [int(found[step]) for _, found in dealt])
        yield picked


def _usable(sources: Sequence[Source], picked: Picked, real: Sequence[int]) -> Picked:
    """Return those samples of a step that are usable; `real` is the number of real ones of each part."""
    found, shown, skipped = [], [0] * len(sources), 0
    for (source, samples), before in zip(picked.by_part(), real, strict=True):
        good = sources[source].shards.usable(samples)
        after = before if good is None else int(np.count_nonzero(good[:before]))
        found.append((source, samples if good is None else samples[good]))
        shown[source], skipped = shown[source] + after, skipped + before - after
    return Picked.of(found, shown, skipped)
