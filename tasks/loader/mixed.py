"""Several published versions as one stream, mixed by weight.

    with MixedStream({images: 3, hard: 1}, batch_size=64) as stream:  # 48 and 16 samples in each batch
        for batch in stream:
            batch["source"]                                            # int64 (64,): 0 for images, 1 for hard

It promises what a `TrainingStream` promises, and iterates, prefetches and resumes by the same code. The samples of a
source come in the order of its own epochs: when it is used up within an epoch of the mix, or with the end of one, it
goes on with its next order, so that each of its samples comes once before any of them comes again.

A step takes its samples of each source together, sorted by stream, and each worker takes its batch's number of them:
the order of sources is a sequence of batches that are numbered over all workers, so that any number of them agrees.

An epoch of N samples has a quota of each source, whole numbers that add up to N. Three orders keep them exactly:

| mix | the source of each sample |
|---|---|
| stratified | spread evenly: in the first n samples each source has its share of n, rounded down or up, for any n |
| proportional | a random permutation of the quotas' items, drawn from the seed |
| alternating | that of its batch; the batches are spread evenly |

All are functions of the quotas, the seed and the epoch, whatever the number of workers.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np

from tasks.io.errors import ConfigError, InputError
from tasks.io.tensors import Int64Array
from tasks.loader.arguments import LIMIT, one_of, place, whole_number
from tasks.loader.batch_stream import Batch, BatchStream
from tasks.loader.kernel import draw_key, draw_sources, spread_sources
from tasks.loader.options import Options
from tasks.loader.order import SEEDS, SOURCES, EpochOrder, Share, Sizes
from tasks.loader.sampling import weight_of
from tasks.loader.sources import Source, Takes, steps_at_once

Mix = Literal["stratified", "proportional", "alternating"]
By = Literal["proportion", "repeat", "choose"]
Stop = Literal["first", "all"]

_STEPS = 64  # that are planned at a time
_NEARLY = Fraction(1, 10**6)  # of a sample: weights such as 1/3 are rounded


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

    def before(self, places: Sequence[int] | Int64Array) -> Int64Array:
        """Return the samples of each source before some places, (places, sources).

        Args:
            places: In ascending order, none before the last ones asked for. After an epoch another one begins.
        """
        ends = np.asarray(places, np.int64) // self._unit
        if self._key is None and self._period <= ends[-1] - ends[0]:
            # Periods are the same, so that a walk through one of them tells all.
            laps = ends // self._period
            asked, back = np.unique(ends - laps * self._period, return_inverse=True)
            counts = np.empty((len(asked), len(self._quotas)), np.int64)
            spread_sources(self._quotas, 0, np.zeros(len(self._quotas), np.int64), asked, counts)
            found = counts[back] + laps[:, None] * self._quotas
            self._lap, self._position, self._counts = int(laps[-1]), int(ends[-1]), found[-1].copy()
            return found * self._unit
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


class _Stretch(NamedTuple):
    """A part of the training with the same weights, up to the end of an epoch.

    Attributes:
        weights: of the sources, as given.
        since: batches of the epoch before it.
        taken: samples of each source before it, since the beginning.
    """

    weights: tuple[float, ...]
    since: int
    taken: tuple[int, ...]


class MixedStream(BatchStream):
    """Batches of samples of several streaming-ready versions for one worker.

    Batches have a further column 'source', int64 (n,): the number of each sample's version, in the order of `sources`.
    Samples of one version lie together in a batch, and those that `mask` leaves out come last.

    All inputs are normalised with the constants of the first version: a model needs one scale for all, that it can be
    used with later, and that stays when weights change.

    Args:
        sources: Weight of each version, named by its directory (…/v3), or by that of a dataset for its latest version.
        batch_size: Samples of a batch of each worker.
        mix: 'stratified': in each batch each source has its share of the samples; where this is no whole number,
            rounded so that in any number of first batches it has its share, rounded down or up. 'proportional': the
            source of each sample is drawn from the seed. 'alternating': each batch is of one source, so that workers
            take turns with it, and read more files. In an epoch, the numbers are exact in each.
        by: Meaning of the weights. 'proportion': shares of the samples. 'repeat': how often a source comes in an epoch;
            0.5 is half of it. 'choose': samples of an epoch.
        epoch_size: Samples of an epoch over all workers, by 'proportion'; None: given by `stop`. Alternating ones are
            whole batches.
        stop: Length of an epoch by 'proportion'. 'first': until the first source is used up, so that no sample comes
            twice. 'all': until each is used up, while smaller ones are repeated.
        options: Those of `BatchStream`.

    Raises:
        ConfigError: an argument is invalid, it isn't a streaming-ready version, or versions don't fit together.
        VersionNotFound: there is no such published version.
        CorruptVersion: as for `BatchStream`.

    """

    _numbered = True

    def __init__(
        self,
        sources: Mapping[str | os.PathLike[str], float],
        *,
        batch_size: int,
        mix: Mix = "stratified",
        by: By = "proportion",
        epoch_size: int | None = None,
        stop: Stop = "first",
        **options: Unpack[Options],
    ) -> None:
        one_of("mix", mix, ("stratified", "proportional", "alternating"))
        one_of("by", by, ("proportion", "repeat", "choose"))
        one_of("stop", stop, ("first", "all"))
        if not isinstance(sources, Mapping) or not sources:
            raise ConfigError(f"sources = {sources!r}: give a mapping of versions to their weights")
        self._names = [_name(uri) for uri in sources]
        if len(set(self._names)) < len(self._names):
            raise ConfigError(f"sources = {sources!r}: a version is there twice; give it one weight")
        self._mix, self._by = mix, by
        weights = self._checked(sources)
        if epoch_size is not None:
            cure = f"give the samples of an epoch, below {LARGEST:,}"
            epoch_size = whole_number("epoch_size", epoch_size, cure, least=1, below=LARGEST)
            if by != "proportion":
                raise ConfigError(f"epoch_size = {epoch_size}: by = {by!r} determines it; leave one of them out")
        super().__init__(self._names, batch_size=batch_size, **options)
        if epoch_size is not None and mix == "alternating" and epoch_size % batch_size:
            raise ConfigError(f"epoch_size = {epoch_size}: alternating batches of {batch_size} need a multiple of it")
        self._sizes = [self._sizes_of(shards, shards.samples) for shards in self._opened]
        size = self._epoch_size(weights, stop) if epoch_size is None else epoch_size
        manifests = [version.manifest for version in self._versions]
        told = {
            "datasets": [manifest.dataset for manifest in manifests],
            "versions": [manifest.version for manifest in manifests],
            "split": self._split,
            "samples": [shards.samples for shards in self._opened],
        }
        self._set_order(size, told, mix=mix, by=by, epoch_size=size, opened_with=list(weights))
        self._stretch = _Stretch(weights, 0, (0,) * len(weights))

    def set_weights(self, sources: Mapping[str | os.PathLike[str], float]) -> None:
        """Change the weights from the next batch on; every worker does so after the same batch.

        The length of an epoch stays. Iterations go on. States have the weights with them.

        Args:
            sources: As for the constructor: a weight for each source, in any order.

        Raises:
            ConfigError: a weight is missing, below zero, infinite or not a number, or all are 0.
        """
        names = {_name(uri) for uri in sources} if isinstance(sources, Mapping) else set()
        if names != set(self._names):
            unfit = ", ".join(map(repr, sorted(names ^ set(self._names))))
            raise ConfigError(f"sources = {sources!r}: give a weight for each source and for no other ({unfit})")
        weights = self._checked(sources)
        self._refuse_uncounted()
        stretch = self._stretch
        before = self._order_of(stretch).before([(self._consumed - stretch.since) * self._batch_size])[0]
        taken = [done + count for done, count in zip(stretch.taken, before.tolist(), strict=True)]
        self._stretch = _Stretch(weights, self._consumed, tuple(taken))
        self._changes += 1

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, as if all earlier ones had had the present weights."""
        super().set_epoch(epoch)
        weights = self._stretch.weights
        self._stretch = _Stretch(weights, 0, tuple(self._epoch * quota for quota in self._quotas(weights, 0)))

    def distribution(self) -> dict[str, dict[str, int]]:
        """Return the samples of each source: 'natural' in its split, and 'epoch' in one of the present weights.

        `stats.source_samples` are those that this worker delivered.
        """
        natural = [shards.samples for shards in self._opened]
        quotas = self._quotas(self._stretch.weights, 0)
        return {
            kind: dict(zip(self._names, counts, strict=True))
            for kind, counts in (("natural", natural), ("epoch", quotas))
        }

    def sample(
        self,
        source: str | os.PathLike[str],
        sample_id: int | None = None,
        *,
        index: int | None = None,
        epoch: int | None = None,
    ) -> Batch:
        """Return one sample of a source; see `TrainingStream.sample`.

        Epochs are those of the source: the times that it was begun as a whole, from 0.

        Raises:
            InputError: there is no such source or sample, or not exactly one of the last arguments is given.
            CorruptVersion: it is damaged or missing.
        """
        one_of("source", _name(source), self._names)
        return self._sample(self._names.index(_name(source)), sample_id, index, epoch)

    def _checked(self, sources: Mapping[Any, Any]) -> tuple[float, ...]:
        """Return the weights in the order of the sources."""
        named = {_name(uri): weight_of(f"weight of {_name(uri)!r}", weight) for uri, weight in sources.items()}
        weights = tuple(named[name] for name in self._names)
        if not any(weights):
            raise ConfigError(f"sources = {sources!r}: all weights are 0; give one of them a weight above 0")
        if self._by == "choose" and not all(weight.is_integer() for weight in weights):
            raise ConfigError(f"sources = {sources!r}: by = 'choose' takes whole numbers of samples")
        return weights

    def _shares(self, weights: Sequence[float]) -> list[Fraction]:
        """Return numbers in the proportion of the sources' samples."""
        # The number that is written: 0.1 is one tenth, not the nearest float.
        shares = [Fraction(repr(weight)) for weight in weights]
        if self._by == "repeat":
            return [share * shards.samples for share, shards in zip(shares, self._opened, strict=True)]
        return shares

    def _epoch_size(self, weights: Sequence[float], stop: Stop) -> int:
        shares = self._shares(weights)
        if self._by == "proportion":
            sources = zip(shares, self._opened, strict=True)
            lengths = [shards.samples * sum(shares) / share for share, shards in sources if share]
            size = math.floor(min(lengths) + _NEARLY) if stop == "first" else math.ceil(max(lengths) - _NEARLY)
        else:
            size = round(sum(shares))
        if self._mix == "alternating":
            batches = size / self._batch_size
            size = (math.ceil(batches) if stop == "all" else max(math.floor(batches), 1)) * self._batch_size
        if not 0 < size < LARGEST:
            raise ConfigError(
                f"weights {list(weights)} of sources of {[shards.samples for shards in self._opened]} samples make an "
                f"epoch of {size:,}: use weights for 1 to {LARGEST - 1:,}, or give epoch_size"
            )
        return size

    def _quotas(self, weights: Sequence[float], since: int) -> list[int]:
        """Return the samples of each source from a batch of an epoch on."""
        unit = self._batch_size if self._mix == "alternating" else 1
        left = self._samples - since * self._batch_size
        return [count * unit for count in apportion(left // unit, self._shares(weights))]

    def _order_of(self, stretch: _Stretch) -> SourceOrder:
        quotas = self._quotas(stretch.weights, stretch.since)
        key = int(draw_key(self._seed, self._epoch, SOURCES, stretch.since))
        return SourceOrder(quotas, self._mix, self._batch_size, key)

    def _next_epoch(self) -> None:
        super()._next_epoch()
        weights, since, taken = self._stretch
        quotas = self._quotas(weights, since)
        self._stretch = _Stretch(weights, 0, tuple(map(sum, zip(taken, quotas, strict=True))))

    def _place(self) -> dict[str, Any]:
        weights, since, taken = self._stretch
        return {**super()._place(), "weights": list(weights), "since": since, "taken": list(taken)}

    def _restore(self, state: Mapping[str, Any], cure: str) -> None:
        weights, since, taken = state["weights"], state["since"], state["taken"]
        count = len(self._names)
        if type(since) is not int or not 0 <= since <= state["batches"]:
            raise InputError(f"the state's since = {since!r} is none of {state['batches']} batches before it: {cure}")
        for name, values, kind, most in (("weights", weights, float, float("inf")), ("taken", taken, int, LIMIT // 2)):
            if (
                not isinstance(values, list)
                or len(values) != count
                or not all(type(value) is kind and 0 <= value < most for value in values)
                or (name == "weights" and not any(values))
            ):
                raise InputError(f"the state's {name} = {values!r} aren't those of {count} sources: {cure}")
        self._stretch = _Stretch(tuple(weights), since, tuple(taken))

    def _sources(self) -> list[Source]:
        seeds = [self._seed, *(int(draw_key(self._seed, 0, SEEDS, n)) >> 1 for n in range(1, len(self._names)))]
        return [
            Source(shards, _laps(shards.samples, sizes, seed, self._shuffle), seed)
            for shards, sizes, seed in zip(self._opened, self._sizes, seeds, strict=True)
        ]

    def _takes(self, epoch: int, first: int, starts: range, share: Share) -> Iterator[list[Takes]]:
        stretch = self._stretch
        assert epoch == self._epoch, "a stretch is one of the current epoch"
        begin = (first - stretch.since) * self._batch_size
        return _steps(
            self._order_of(stretch),
            [shards.samples for shards in self._opened],
            stretch.taken,
            real=self._samples - stretch.since * self._batch_size,
            starts=range(begin + starts.start, begin + starts.stop, starts.step),
            share=share,
        )


def _name(uri: Any) -> str:
    return place("uri", uri, "name each source by the directory of a version")


def _laps(samples: int, sizes: Sizes, seed: int, shuffle: bool) -> Callable[[int], EpochOrder]:
    return lambda lap: EpochOrder(samples, sizes, seed, lap, shuffle)


def _steps(
    order: SourceOrder,
    samples: Sequence[int],
    taken: Sequence[int],
    *,
    real: int,
    starts: range,
    share: Share,
) -> Iterator[list[Takes]]:
    """Yield what a worker takes in each group of steps.

    Args:
        order: Order of the sources in a stretch.
        samples: Samples of each source.
        taken: Samples of each source before the stretch.
        real: Samples of the stretch; those that follow them fill batches.
        starts: Samples of the stretch before each step.
        share: The worker's part of a step.
    """
    share_low, share_high = share.bounds
    most = steps_at_once(share.batch_size)
    for group in range(0, len(starts), _STEPS):
        begins = np.array(starts[group : group + _STEPS], np.int64)
        ends = np.clip(real, begins, begins + share.step)
        places = np.stack([begins, ends, begins + share_low, begins + share_high], axis=1)
        asked, back = np.unique(places, return_inverse=True)
        counts = order.before(asked)[back].reshape(*places.shape, len(samples)) + taken
        begin, last, part_low, part_high = counts.transpose(1, 0, 2)
        # The real ones of a step, and of them the worker's; and how many more it takes to fill its batch.
        bounds = [np.clip(part, begin, last) - begin for part in (part_low, part_high)]
        fillers = np.maximum(part_high, last) - np.maximum(part_low, last)
        laps = begin // samples
        parts = np.stack([begin - laps * samples, last - begin, *bounds], axis=2)
        mine = bounds[0] < bounds[1]
        alone = (fillers > 0).any(axis=1) | (mine & (parts[..., :2].sum(axis=2) > samples)).any(axis=1)
        apart = alone[1:] | alone[:-1] | (laps[1:] != laps[:-1]).any(axis=1)
        seams = {*range(0, len(begins), most), *(np.flatnonzero(apart) + 1).tolist(), len(begins)}
        for first, end in itertools.pairwise(sorted(seams)):
            if alone[first]:
                yield _step(begin[first].tolist(), parts[first].tolist(), fillers[first].tolist(), samples, share)
                continue
            takes: list[Takes] = []
            for source in np.flatnonzero(mine[first:end].any(axis=0)).tolist():
                own = np.ascontiguousarray(parts[first:end, source])  # another layout would be compiled anew
                size, low, high = own[int(mine[first:end, source].argmax()), 1:].tolist()
                takes.append(Takes(source, int(laps[first, source]), own, (size, low, high)))
            yield takes


def _step(
    begin: Sequence[int], parts: Sequence[Sequence[int]], fillers: Sequence[int], samples: Sequence[int], share: Share
) -> list[Takes]:
    """Return what a worker takes in a step, also from several laps of a source, and to fill its batch.

    Args:
        begin: Samples of each source before the step.
        parts: Size, low and high of the step in each source, after its start.
        fillers: Samples of each source that fill the batch.
        samples: Samples of each source.
        share: The worker's part of a step.
    """
    takes: list[Takes] = []
    for source, (_, size, first, end) in enumerate(parts):
        start, low, high, step = begin[source], first, end, (size, first, end)
        while low < high:
            lap, at = divmod(start, samples[source])
            here = min(begin[source] + size - start, samples[source] - at)
            if low < here:
                takes.append(Takes(source, lap, np.array([[at, here, low, min(high, here)]]), step))
            start += here
            low, high = max(low - here, 0), high - here
    for source, count in enumerate(fillers):
        if count:
            # Those with which the lap began: the files that the worker reads have them.
            step = (count * share.world_size, count * share.rank, count * (share.rank + 1))
            lap = max(begin[source] + parts[source][1] - 1, 0) // samples[source]
            takes.append(Takes(source, lap, np.array([[0, *step]]), step, real=False))
    return takes
