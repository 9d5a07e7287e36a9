"""Samples of any length in groups of like ones: steps of one length bucket, or rows that whole samples fill.

Both are made of the order of an epoch (see `order`), which is computed as a whole: 8 bytes a sample, once more while it
is made, and 8 bytes for each sample's length.

    length_buckets   the samples wait by bucket, in the epoch's order, until a step of all workers is full; at the end
                     of the epoch those that are left, of all buckets, fill the last steps
    pack             the samples of each stream, in their order, are laid into the first of some open rows that has
                     room; rows come in the order of their first samples

So a sample's neighbours change with each epoch, and nothing depends on the number of workers: buckets on the samples of
a whole step, rows on nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.io.errors import ConfigError, CorruptVersion
from tasks.io.tensors import Int64Array
from tasks.loader.arguments import whole_number
from tasks.loader.kernel import fill_buckets, fill_rows
from tasks.loader.order import EpochOrder, Sizes
from tasks.loader.samples import LENGTH
from tasks.loader.sequences import Padding
from tasks.loader.shards import Shards
from tasks.loader.sources import Source, Take, Takes
from tasks.loader.version_files import CURE, Version, stored_column

OPEN_ROWS = 64
"""Rows of a stream that are filled at the same time."""

_AHEAD = 2048  # samples whose files are announced ahead of their use

Stretches = tuple[tuple[int, int], ...]
"""Parts of an epoch that were planned for steps of one size each: batches before the part, and samples of a step."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows of an epoch in their order.

    Attributes:
        samples: (n,) samples, in the order of their rows.
        firsts: (rows + 1,) first sample of each row; None: each sample is a row.
        streams: first sample of each stream, and the end.
    """

    samples: Int64Array
    firsts: Int64Array | None
    streams: Int64Array

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.samples) if self.firsts is None else len(self.firsts) - 1

    def cut(self, start: int, count: int, low: int, high: int) -> tuple[Int64Array, int]:
        """Return a part of some consecutive rows, which are sorted by stream, and the number of real ones in it.

        Arguments are those of `EpochOrder.cut`, of rows; those beyond the end are the first ones, not real, and last.
        """
        places = np.arange(start, start + count)
        rows = places % self.rows
        first = rows if self.firsts is None else self.firsts[rows]
        stream = np.searchsorted(self.streams, self.samples[first], side="right")
        own = np.argsort(stream, kind="stable")[low:high]
        real = places[own] < self.rows
        return np.concatenate([rows[own[real]], rows[own[~real]]]), int(np.count_nonzero(real))

    def samples_of(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the samples of some rows, one row after the other, and how many each has."""
        if self.firsts is None:
            return self.samples[rows], np.ones(len(rows), np.int64)
        firsts = self.firsts[rows]
        counts = self.firsts[rows + 1] - firsts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.samples[np.repeat(firsts, counts) + within], counts


@dataclass(slots=True)
class Grouping:
    """How the samples of a stream are grouped.

    Attributes:
        lengths: (n,) elements of each sample, as they are delivered.
        sizes: sizes of the stream's parts.
        seed: seed of its orders.
        shuffled: False: samples come as they are stored.
        max_length: elements after which they are cut; None: nowhere.
        buckets: upper bounds of the buckets; none for rows.
        row: elements of a row; 0 for buckets.
    """

    lengths: Int64Array
    sizes: Sizes
    seed: int
    shuffled: bool
    max_length: int | None
    buckets: tuple[int, ...]
    row: int
    _last: tuple[Any, Plan] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a state says of it."""
        how = {"pack": self.row} if self.row else {"length_buckets": list(self.buckets)}
        return {**how, "max_length": self.max_length}

    def plan(self, epoch: int, stretches: Stretches = (), batch_size: int = 1) -> Plan:
        """Return the plan of an epoch; the last one is kept.

        Args:
            epoch: The epoch.
            stretches: Of buckets, the parts of the epoch.
            batch_size: Samples of a worker's batch.
        """
        key, last = (epoch, stretches), self._last
        if last is None or last[0] != key:
            order = EpochOrder(len(self.lengths), self.sizes, self.seed, epoch, self.shuffled)
            samples = order.take(0, len(self.lengths))
            found, firsts = (
                self._packed(samples, order) if self.row else (self._bucketed(samples, stretches, batch_size), None)
            )
            last = self._last = key, Plan(found, firsts, order.bounds)
        return last[1]

    def bound(self, samples: Int64Array) -> int:
        """Return the bound of the largest bucket that some samples are in."""
        longest = int(self.lengths[samples].max())
        return self.buckets[int(np.searchsorted(self.buckets, longest))]

    def _bucketed(self, samples: Int64Array, stretches: Stretches, batch_size: int) -> Int64Array:
        found, done = np.empty_like(samples), 0
        ends = [since for since, _ in stretches[1:]] + [len(samples)]
        for (since, step), end in zip(stretches, ends, strict=True):
            order = np.empty(len(samples), np.int64)
            fill_buckets(np.searchsorted(self.buckets, self.lengths[samples]), len(self.buckets), step, order)
            count = min((end - since) * batch_size, len(order))
            found[done : done + count] = samples[order[:count]]
            done += count
            samples = np.delete(samples, order[:count])
        return found

    def _packed(self, samples: Int64Array, order: EpochOrder) -> tuple[Int64Array, Int64Array]:
        stream = np.searchsorted(order.bounds, samples, side="right") - 1
        row_of, rows = np.empty(len(samples), np.int64), 0
        for number in range(len(order.bounds) - 1):
            own = np.flatnonzero(stream == number)
            numbers = np.empty(len(own), np.int64)
            count = fill_rows(self.lengths[samples[own]], self.row, OPEN_ROWS, numbers)
            row_of[own] = numbers + rows
            rows += count
        first = np.full(rows, len(samples), np.int64)
        np.minimum.at(first, row_of, np.arange(len(samples)))
        place = np.empty(rows, np.int64)
        place[np.argsort(first)] = np.arange(rows)
        row_of = place[row_of]
        members = np.argsort(row_of, kind="stable")
        return samples[members], np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])


def grouping_of(
    version: Version, split: str, padding: Padding | None, length_buckets: Any, pack: Any
) -> Callable[[Sizes, int, bool], Grouping]:
    """Read the lengths of a split's samples; return a function that makes their grouping, given the order's arguments.

    Args:
        version: The version.
        split: The split.
        padding: What makes arrays of its sequences; None if it has none.
        length_buckets: As of `TrainingStream`.
        pack: Likewise.

    Raises:
        ConfigError: an argument is invalid, both are given, the version has no sequences, or one of them is too long.
        CorruptVersion: the lengths can't be read, or are below 0.
    """
    if length_buckets is not None and pack is not None:
        raise ConfigError(f"length_buckets = {length_buckets!r} and pack = {pack!r}: give one of them")
    name = f"length_buckets = {length_buckets!r}" if pack is None else f"pack = {pack!r}"
    buckets, row = _bounds(length_buckets), 0
    if pack is not None:
        row = whole_number("pack", pack, "give the elements of a row, at least 1", least=1, below=1 << 31)
    if padding is None:
        raise ConfigError(f"{name}: the version has no sequences; leave it out")
    lengths = padding.cut(stored_column(version, split, LENGTH))
    most = row or buckets[-1]
    if long := int(np.count_nonzero(lengths > most)):
        cure = "a larger row" if row else "a further bucket"
        raise ConfigError(
            f"{name}: {long} of {len(lengths)} sequences are longer, up to {lengths.max()}; give {cure}, or cut them "
            f"with max_length={most}"
        )
    if lengths.min() < 0:
        raise CorruptVersion(f"{version.uri}: a length is {lengths.min()}: {CURE}")
    return lambda sizes, seed, shuffled: Grouping(lengths, sizes, seed, shuffled, padding.max_length, buckets, row)


def _bounds(length_buckets: Any) -> tuple[int, ...]:
    """Return the bounds of buckets, ascending; none for None."""
    if length_buckets is None:
        return ()
    cure = "give the longest length of each bucket, ascending, such as (64, 256, 1024)"
    if not isinstance(length_buckets, Sequence) or isinstance(length_buckets, str | bytes) or not length_buckets:
        raise ConfigError(f"length_buckets = {length_buckets!r}: {cure}")
    bounds = tuple(whole_number("length_buckets", bound, cure, least=1, below=1 << 31) for bound in length_buckets)
    if any(after <= before for before, after in itertools.pairwise(bounds)):
        raise ConfigError(f"length_buckets = {length_buckets!r}: {cure}")
    return bounds


def continued(stretches: Any, since: int, batch_size: int, step: int) -> Stretches | None:
    """Return the parts of an epoch that goes on after some batches; None if the earlier ones can't be.

    Args:
        stretches: The parts up to there, as a state has them.
        since: Batches up to there.
        batch_size: Samples of a worker's batch.
        step: Samples of a step from there on.
    """
    if not isinstance(stretches, list) or not all(isinstance(one, list) and len(one) == 2 for one in stretches):
        return None
    if not all(type(value) is int for one in stretches for value in one):
        return None
    begins = [begin for begin, _ in stretches]
    if begins[:1] != [0] or any(a >= b for a, b in itertools.pairwise([*begins, since + 1])):
        return None
    if any(size < 1 or size % batch_size for _, size in stretches):
        return None
    kept = [(begin, size) for begin, size in stretches if begin < since]
    if not kept or kept[-1][1] != step or (since - kept[-1][0]) * batch_size % step:
        kept.append((since, step))
    return tuple(kept)


class GroupedSource(Source):
    """The samples of a source in groups, step by step.

    Args:
        shards: Its samples.
        grouping: How they are grouped.
        plan_of: Returns the plan of an epoch.

    """

    def __init__(self, shards: Shards, grouping: Grouping, plan_of: Callable[[int], Plan]) -> None:
        super().__init__(shards, _no_order, grouping.seed)
        self.grouping, self._plan_of, self.row = grouping, plan_of, grouping.row

    def deal(self, takes: Takes) -> tuple[Int64Array, Int64Array]:
        """Return a worker's samples, each in a row of its own, step by step, and the real ones of each, (steps,)."""
        plan = self._plan_for(takes.lap)
        rows, real = zip(*(plan.cut(*part) for part in takes.parts.tolist()), strict=True)
        return plan.samples[np.concatenate(rows)], np.array(real, np.int64)

    def rows(self, take: Take) -> tuple[Int64Array, Int64Array, int]:
        """Return the samples of a worker's rows of a step, how many each row has, and the number of real rows."""
        rows, real = self._plan_for(take.lap).cut(*take[2:6])
        return *self._plan.samples_of(rows), real

    def bound(self, take: Take) -> int | None:
        """Return the elements of a row in the batches of all workers of a step."""
        places = np.arange(take.start, take.start + take.size) % self._plan.rows
        return self.grouping.bound(self._plan.samples[places])

    def announce(self, take: Take) -> None:
        """Announce the samples that are needed soon to the shards."""
        plan, step = self._plan, take[3:6]
        if take.start + take.size > self._named:
            steps = max(_AHEAD // (take.high - take.low), 1)
            starts = range(take.start, min(take.start + steps * take.size, plan.rows), take.size)
            coming = np.concatenate([plan.samples_of(plan.cut(start, *step)[0])[0] for start in starts])
            self.shards.soon(coming, coming + 1, 1)
            self._named = take.start + max(steps // 2, 1) * take.size

    def has_news(self, takes: Takes) -> bool:
        """Return True if `announce` has something to do in some step."""
        return int(takes.parts[-1, :2].sum()) > self._named

    def _plan_for(self, lap: int) -> Plan:
        if lap != self._lap:
            self._lap, self._named, self._plan = lap, 0, self._plan_of(lap)
        return self._plan


def _no_order(_: int) -> EpochOrder:
    raise AssertionError("groups have plans")
