"""From what a worker takes in each step to its batches, in one thread; and single samples, checked in the same way.

order of each source ─ takes of a step ─ samples, gathered from their files ─ transformed, mixed ─ batch

Threads transform the samples of a batch while the next one is gathered, so that they needn't wait for it.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

import numpy as np

from tasks.io.errors import ConfigError, CorruptVersion, InputError
from tasks.io.tensors import AnyArray, Int64Array, TensorSpec, UInt64Array
from tasks.loader.arguments import LIMIT, whole_number
from tasks.loader.kernel import mix_samples, sample_keys
from tasks.loader.mixing import Mixing, alpha_of
from tasks.loader.order import MIXES, TRANSFORMS, Reading
from tasks.loader.placement import INPUTS, Placement
from tasks.loader.samples import LABEL, SAMPLE_ID
from tasks.loader.sequences import OWN, Padding
from tasks.loader.shards import Joined, Shards
from tasks.loader.sources import Picked, Source, Take, Takes, pick
from tasks.loader.transforms import (
    Change,
    Decoding,
    Encoded,
    Mapped,
    Undecodable,
    Wait,
    change_of,
    decoding_of,
    described,
    nothing,
)
from tasks.loader.version_files import CURE, Version, stored_column

MASK = "mask"
SOURCE = "source"
_MASK_SPEC, _SOURCE_SPEC = TensorSpec((), "bool"), TensorSpec((), "int64")


class Made(NamedTuple):
    """A batch on its way from the producing thread to the consumer."""

    placed: Any
    samples: tuple[int, ...]
    bytes: int
    skipped: int
    cut: int = 0


def make_batches(
    sources: Sequence[Source],
    joined: Joined,
    place: Placement,
    steps: Iterator[list[Takes]],
    *,
    columns: Sequence[str],
    masked: bool,
    numbered: bool,
    delivery: Delivery | None,
    padding: Padding | None,
    ahead: int,
) -> Iterator[Made]:
    """Yield a worker's batches of some steps.

    Args:
        sources: The sources at their beginning.
        joined: Their shards as one sequence.
        place: Maker of batches.
        steps: What the worker takes in each group of steps; real samples come first.
        columns: Columns to deliver.
        masked: True to add a column that tells which samples are real.
        numbered: True to add a column of the samples' sources.
        delivery: What changes the samples; None: they are delivered as they are stored.
        padding: What makes arrays of sequences; None without any.
        ahead: Batches to begin with while threads still change the samples of the one before.
    """
    if delivery is None:
        read = _stored(sources, joined, place, steps, columns=columns, padding=padding)
    else:
        read = delivery.batches(sources, joined, place, steps, ahead)
    with closing(read):
        for gathered, (count, shown), parts, real, size, skipped, cut in read:
            if masked:
                mask = gathered[MASK] = place.buffer(_MASK_SPEC, count)
                mask[:shown], mask[shown:] = True, False
            if numbered:
                numbers = gathered[SOURCE] = place.buffer(_SOURCE_SPEC, count)
                done = 0
                for number, _, own in parts.tolist():
                    numbers[done : done + own] = number
                    done += own
            yield Made(place.place(gathered), tuple(real), size, skipped, cut)


class _Read(NamedTuple):
    """Columns of a batch, as they were read and changed.

    Attributes:
        gathered: arrays by column.
        rows: number of rows, and of real ones.
        parts: (P, 3) of which the first and the last are the source and the number of the samples of each part.
        real: real samples of each source.
        size: bytes that were read.
        skipped: damaged samples.
        cut: sequences that were cut.
    """

    gathered: dict[str, AnyArray]
    rows: tuple[int, int]
    parts: Int64Array
    real: list[int]
    size: int
    skipped: int
    cut: int = 0


def _stored(
    sources: Sequence[Source],
    joined: Joined,
    place: Placement,
    steps: Iterator[list[Takes]],
    *,
    columns: Sequence[str],
    padding: Padding | None,
) -> Generator[_Read]:
    """Yield the samples of some steps as they are stored."""
    specs = sources[0].shards.columns
    plain = [name for name in columns if padding is None or name not in OWN]
    packed = padding is not None and sources[0].row > 0
    for takes in steps:
        picks = pick(sources, takes)
        for step in range(len(takes[0].parts)):
            if padding is not None and packed:
                yield _packed(sources[0], takes[0].at(step), place, columns, padding)
                continue
            picked, cut = next(picks), 0
            gathered = {name: place.buffer(specs[name], picked.size) for name in plain}
            joined.gather(picked.samples, picked.parts, gathered)
            size, shown = sum([values.nbytes for values in gathered.values()]), sum(picked.real)
            if padding is not None:
                bound = sources[0].bound(takes[0].at(step)) if len(sources) == 1 else None
                made, lengths, read = padding.fill(sources, picked.by_part(), place, columns, bound)
                lengths = lengths[:shown]
                cut, size = int(np.count_nonzero(padding.cut(lengths) < lengths)), size + read
                gathered = {name: made[name] if name in made else gathered[name] for name in columns}
            yield _Read(gathered, (picked.size, shown), picked.parts, picked.real, size, picked.skipped, cut)


def _packed(source: Source, take: Take, place: Placement, columns: Sequence[str], padding: Padding) -> _Read:
    """Return a worker's batch of rows of several samples."""
    index, counts, shown = source.rows(take)
    source.announce(take)
    row_of = np.repeat(np.arange(len(counts)), counts)
    real = before = int(counts[:shown].sum())
    good = source.shards.usable(index)
    if good is not None:
        real = int(np.count_nonzero(good[:before]))
        index, row_of = index[good], row_of[good]
    gathered, lengths, size = padding.pack(source, (index, row_of), place, columns, (len(counts), source.row))
    cut = int(np.count_nonzero(padding.cut(lengths[:real]) < lengths[:real]))
    parts = np.array([[take.source, 0, len(counts)]])
    return _Read(gathered, (len(counts), shown), parts, [real], size, before - real, cut)


def _gather_encoded(sources: Sequence[Source], picked: Sequence[tuple[int, Int64Array]], decoding: Decoding) -> Encoded:
    """Return the encoded pictures of the picked samples of some sources, one after the other."""
    parts = [sources[number].shards.gather_ragged(index) for number, index in picked]
    if len(parts) == 1:
        return Encoded(*parts[0], decoding)
    sizes = np.concatenate([np.diff(starts) for _, starts in parts])
    return Encoded(np.concatenate([data for data, _ in parts]), np.concatenate([[0], np.cumsum(sizes)]), decoding)


def _keys(level: int, parts: Iterable[tuple[int, int, Int64Array, Int64Array]]) -> UInt64Array:
    """Return the keys of samples, (n,), by the seed, the epoch, the numbers and the copies of each part."""
    keys = []
    for seed, epoch, numbers, copies in parts:
        keys.append(np.empty(len(numbers), np.uint64))
        sample_keys(seed, epoch, level, numbers, copies, keys[-1])
    return np.concatenate(keys)


class _Begun(NamedTuple):
    """A batch whose samples are being changed.

    Attributes:
        takes: what the worker takes.
        parts: likewise, with the samples of each.
        made: columns, of which the inputs are there when the threads are done.
        wait: waits for them.
        real: real samples of each source.
        skipped: damaged samples.
        size: bytes that were read.
        memory: memory by name that isn't handed out.
    """

    takes: Sequence[Take]
    parts: Sequence[tuple[Take, Reading]]
    made: dict[str, AnyArray]
    wait: Wait
    real: list[int]
    skipped: int
    size: int
    memory: dict[str, AnyArray]


class Delivery:
    """Makes the decoded, transformed and mixed columns of batches; for one thread at a time.

    Args:
        transform: The transform; None for none.
        mixup: Parameter alpha of MixUp; None or 0 for none.
        cutmix: Parameter alpha of CutMix; None or 0 for none.
        threads: Threads that transform and decode; None: for an Augmentation and for decoding the CPUs of this process,
            shared among the workers of this node, else 1.
        definition: `manifest.definition` of the version.
        specs: Columns of a sample that a batch may have.
        encoded: True for images that are to be decoded.
        columns: Those to deliver.
        normalise: True if inputs are normalised afterwards.

    Attributes:
        identity: what a state says of it.
        columns: columns to gather.

    Raises:
        ConfigError: an argument is invalid, or doesn't fit the version.

    """

    def __init__(
        self,
        *,
        transform: Any,
        mixup: Any,
        cutmix: Any,
        threads: Any,
        definition: Mapping[str, Any],
        specs: Mapping[str, TensorSpec],
        encoded: bool,
        columns: Sequence[str],
        normalise: bool,
    ) -> None:
        alphas = {"mixup": alpha_of("mixup", mixup), "cutmix": alpha_of("cutmix", cutmix)}
        self.identity: dict[str, Any] = {name: alpha for name, alpha in alphas.items() if alpha}
        self._mixing = Mixing(**alphas) if self.identity else None
        self._pictures = definition["kind"] == "images"
        self._input = INPUTS[1] if self._pictures else INPUTS[0]
        self._specs, self._delivered = specs, tuple(columns)
        label = definition["label"] or {}
        self._classes = len(label["classes"]) if label.get("kind") == "class" else 0
        self._means = len(definition["normalise"]["mean"]) if normalise else None
        self._refuse_misfits(alphas, definition)
        self.columns = tuple(dict.fromkeys((*columns, SAMPLE_ID)))
        self._idle: list[dict[str, AnyArray]] = []  # memory that no batch uses now
        self._change: Change | None = None
        if transform is not None:
            self._change, digest = change_of(transform, specs[self._input], threads, pictures=self._pictures)
            self.identity |= digest
        stored = self._change is not None and self._change.takes_stored
        self._located = self._input if stored and not encoded else None  # the inputs that are read where they are
        self._decoding: Decoding | None = None
        if encoded:
            spec = specs[self._input]
            if self._change is not None and stored:
                self._decoding = Decoding(spec, self._change.team)
            else:
                self._decoding = decoding_of(spec, threads)

    def _refuse_misfits(self, alphas: Mapping[str, float], definition: Mapping[str, Any]) -> None:
        if self._input not in self._delivered:
            raise ConfigError(
                f"columns = {list(self._delivered)} leave out {self._input!r}, which is to be transformed: add it"
            )
        for name, alpha in alphas.items():
            if not alpha:
                continue
            if not self._classes:
                kinds = {"number": "labels that are numbers", "classes": "several labels", "numbers": "several labels"}
                kind = "no label" if definition["label"] is None else kinds[definition["label"]["kind"]]
                raise ConfigError(f"{name} = {alpha}: it mixes classes, and the version has {kind}; leave it out")
            if LABEL not in self._delivered:
                raise ConfigError(f"{name} = {alpha}: columns = {list(self._delivered)} leave out 'label', add it")
        if alphas["cutmix"] and not self._pictures:
            raise ConfigError(f"cutmix = {alphas['cutmix']}: it is for pictures; use mixup for rows of a table")

    def batches(
        self,
        sources: Sequence[Source],
        joined: Joined,
        place: Placement,
        steps: Iterator[list[Takes]],
        ahead: int,
    ) -> Generator[_Read]:
        """Yield a worker's batches of some steps.

        What can't be read is raised after the batches before it.

        Args:
            sources: The sources.
            joined: Their shards as one sequence.
            place: Maker of batches.
            steps: What the worker takes in each group of steps; real samples come first.
            ahead: Batches to begin with while threads still change the samples of the one before.
        """
        begun = deque[_Begun]()
        try:
            for takes in steps:
                for step in range(len(takes[0].parts)):
                    own = [taken.at(step) for taken in takes]
                    try:
                        begun.append(
                            self._begin(sources, joined, place, [take for take in own if take.low < take.high])
                        )
                    except Exception:
                        while begun:
                            yield self._finish(begun.popleft(), sources, joined, place)
                        raise
                    while len(begun) > ahead:
                        yield self._finish(begun.popleft(), sources, joined, place)
            while begun:
                yield self._finish(begun.popleft(), sources, joined, place)
        finally:
            for one in begun:  # else threads would go on in memory that the next iteration uses
                with suppress(Exception):
                    one.wait()

    def _begin(self, sources: Sequence[Source], joined: Joined, place: Placement, takes: Sequence[Take]) -> _Begun:
        """Read the samples of a step, and begin to change them."""
        real, skipped = [0] * len(sources), 0
        wanted = [sources[take.source].reading(take, self._mixing is not None) for take in takes]
        for take in takes:  # all of them first: a source drops files that it needs in no later lap
            sources[take.source].announce(take)
        parts: list[tuple[Take, Reading]] = []
        for take, whole in zip(takes, wanted, strict=True):
            good = sources[take.source].shards.usable(whole.samples)
            reading = whole if good is None else whole.without(good)
            real[take.source] += reading.real
            skipped += whole.real - reading.real
            parts.append((take, reading))
        memory = self._idle.pop() if self._idle else {}
        ends = np.cumsum([len(reading.samples) for _, reading in parts])
        read = [(take.source, reading.samples) for take, reading in parts]
        raw = self._raw(int(ends[-1]), place, memory)
        index, among = Picked.of(read, real)[:2]
        joined.gather(index, among, raw, self._located)
        if self._located is not None:
            raw[self._located] = Mapped(raw[self._located], self._specs[self._located], joined.held)
        if self._decoding is not None:
            raw[self._input] = _gather_encoded(sources, read, self._decoding)
        size = sum(raw[name].nbytes for name in self._delivered)
        ids = np.split(raw[SAMPLE_ID], ends[:-1])
        keys = _keys(
            TRANSFORMS,
            (
                (sources[take.source].seed, take.lap, own, reading.copies)
                for (take, reading), own in zip(parts, ids, strict=True)
            ),
        )
        made, wait = self._changed(raw, keys, place, memory)
        return _Begun(takes, parts, made, wait, real, skipped, size, memory)

    def _finish(self, begun: _Begun, sources: Sequence[Source], joined: Joined, place: Placement) -> _Read:
        """Wait until the samples are changed, and mix them."""
        try:
            begun.wait()
        except Undecodable as error:
            ends = np.cumsum([len(reading.samples) for _, reading in begun.parts])
            for row, what in error.faults.items():
                part = int(np.searchsorted(ends, row, side="right"))
                take, reading = begun.parts[part]
                sample = int(reading.samples[row - ends[part]])
                sources[take.source].shards.leave_out({sample: what})
            self._idle.append(begun.memory)
            return self._finish(self._begin(sources, joined, place, begun.takes), sources, joined, place)
        made = begun.made
        if self._mixing is not None:
            made = self._mixed(self._mixing, made, sources, begun.parts, place)
        self._idle.append(begun.memory)
        sizes = [[take.source, 0, len(reading.own)] for take, reading in begun.parts]
        rows = sum(size for _, _, size in sizes), sum(begun.real)
        return _Read(made, rows, np.array(sizes), begun.real, begun.size, begun.skipped)

    def single(
        self, raw: dict[str, Any], place: Placement, *, seed: int, epoch: int | None, copy: int
    ) -> dict[str, AnyArray]:
        """Return the columns of one sample, transformed as in an epoch, but not mixed.

        Args:
            raw: `columns` of the sample, (1, …) each; of an encoded picture its bytes, and where it starts.
            place: Maker of batches.
            seed: Seed of its source.
            epoch: Epoch of its source; None: not transformed.
            copy: Which of its copies in the epoch.

        Raises:
            Undecodable: it can't be decoded.
        """
        if self._decoding is not None:
            data, starts = raw[self._input]
            raw = {**raw, self._input: Encoded(data, starts, self._decoding)}
        if epoch is None:
            raw = {name: raw[name] for name in self._delivered}
            made, wait = self._decoded(raw, place.buffer)
            wait()
            return made
        keys = _keys(TRANSFORMS, [(seed, epoch, raw[SAMPLE_ID], np.array([copy], np.int64))])
        made, wait = self._changed(raw, keys, place, None)
        wait()
        return made

    def close(self) -> None:
        """End the threads."""
        if self._change is not None:
            self._change.team.close()
        if self._decoding is not None:
            self._decoding.team.close()

    def _raw(self, count: int, place: Placement, memory: dict[str, AnyArray]) -> dict[str, Any]:
        """Return memory to gather the columns of one length in: what goes on as it is into that of a batch."""
        raw: dict[str, Any] = {}
        for name in self.columns:
            spec = self._specs[name]
            if name == self._located:
                raw[name] = np.empty(count, np.int64)
            elif name == self._input and self._decoding is not None:
                continue
            elif self._mixing is None and name in self._delivered and not (name == self._input and self._change):
                raw[name] = place.buffer(spec, count)
            else:
                raw[name] = _scratch(memory, f"raw {name}", spec, count)
        return raw

    def _decoded(self, raw: dict[str, Any], new: Callable[[TensorSpec, int], AnyArray]) -> tuple[dict[str, Any], Wait]:
        """Return the columns with pictures that are being decoded in new memory, if they are encoded."""
        if self._decoding is None:
            return raw, nothing
        encoded: Encoded = raw[self._input]
        out = new(self._decoding.spec, len(encoded))
        return {**raw, self._input: out}, encoded.planes(out)

    def _changed(
        self, raw: dict[str, Any], keys: UInt64Array, place: Placement, memory: dict[str, AnyArray] | None
    ) -> tuple[dict[str, AnyArray], Wait]:
        """Return the columns with inputs that are being transformed, and a function that waits for that.

        The inputs are in memory of a batch unless they are to be mixed.

        Args:
            raw: `columns` of the samples.
            keys: (n,) keys of their draws.
            place: Maker of batches.
            memory: Memory that isn't handed out; None for samples that aren't mixed.
        """
        change, mixed = self._change, self._mixing is not None and memory is not None

        def held(spec: TensorSpec, count: int, name: str) -> AnyArray:
            return np.empty((count, *spec.shape), spec.dtype) if memory is None else _scratch(memory, name, spec, count)

        decoded = nothing
        if change is None or not change.takes_stored:
            passing = mixed or change is not None
            raw, decoded = self._decoded(raw, functools.partial(held, name="decoded") if passing else place.buffer)
        made = raw if mixed else {name: raw[name] for name in self._delivered}
        if change is None or not (change.takes_stored or len(keys)):
            return made, decoded
        try:
            decoded()
        except Undecodable:
            return made, decoded  # which says so when it is called again

        def new(spec: TensorSpec) -> AnyArray:
            self._refuse_form(spec)
            return held(spec, len(keys), "transformed") if mixed else place.buffer(spec, len(keys))

        values, wait = change.start(raw[self._input], keys, raw[SAMPLE_ID], new)
        return {**made, self._input: values}, wait

    def _refuse_form(self, spec: TensorSpec) -> None:
        """Refuse transformed inputs that can't be normalised or cut."""
        shape = described(spec)
        if self._means is not None and (spec.dtype == "uint8") == self._pictures:
            if len(spec.shape) != (3 if self._pictures else 1) or spec.shape[0] != self._means:
                what = f"{self._means} channels" if self._pictures else f"{self._means} features"
                raise ConfigError(
                    f"the transform gives {shape}, and what is normalised has {what}: use normalise=False"
                )
        elif self._means is not None and not self._pictures:
            raise ConfigError(f"the transform gives {shape}, and features are normalised as floats: give floats")
        if "cutmix" in self.identity and len(spec.shape) != 3:
            raise ConfigError(f"cutmix = {self.identity['cutmix']}: the transform gives {shape}, not pictures")

    def _mixed(
        self,
        mixing: Mixing,
        made: dict[str, AnyArray],
        sources: Sequence[Source],
        parts: Sequence[tuple[Take, Reading]],
        place: Placement,
    ) -> dict[str, AnyArray]:
        firsts = np.cumsum([0, *(len(reading.samples) for _, reading in parts)])
        own = np.concatenate([reading.own + first for (_, reading), first in zip(parts, firsts, strict=False)])
        partner = np.concatenate([reading.partner + first for (_, reading), first in zip(parts, firsts, strict=False)])
        count = len(own)
        keys = _keys(
            MIXES,
            (
                (sources[take.source].seed, take.lap, reading.pair, np.zeros(len(reading.pair), np.int64))
                for take, reading in parts
            ),
        )
        values = made[self._input]
        shape = values.shape[1:] if values.ndim == 4 else (1, 1, math.prod(values.shape[1:]))
        weights, boxes = mixing.draw(keys, *shape[1:])
        weights[own == partner] = 1
        out = place.buffer(TensorSpec(values.shape[1:], values.dtype.name), count)
        pictures, target = values.reshape(len(values), *shape), out.reshape(count, *shape)
        rounding = np.float32(0.5 if values.dtype == np.uint8 else 0)
        mix_samples(pictures, own, partner, weights, boxes, rounding, target)
        soft = place.buffer(TensorSpec((self._classes,), "float32"), count)
        soft[...] = 0
        rows = np.arange(count)
        soft[rows, made[LABEL][own]] = weights
        soft[rows, made[LABEL][partner]] += 1 - weights
        mixed = {self._input: out, LABEL: soft}
        for name in self._delivered:
            if name not in mixed:
                mixed[name] = place.buffer(self._specs[name], count)
                np.take(made[name], own, axis=0, out=mixed[name])
        return {name: mixed[name] for name in self._delivered}


def _scratch(memory: dict[str, AnyArray], name: str, spec: TensorSpec, count: int) -> AnyArray:
    """Return a named part of some memory, (count, *shape)."""
    held = memory.get(name)
    if held is None or len(held) < count or held.shape[1:] != spec.shape or held.dtype.name != spec.dtype:
        held = memory[name] = np.empty((count + count // 4, *spec.shape), spec.dtype)
    return held[:count]


class Lookup:
    """Samples of a split, one by one.

    The first look-up by id reads all ids of the split, which then take 16 bytes each.

    Args:
        version: The version.
        split: The split.
        shards: Its samples, for this object alone, whose picked columns are returned.
        place: Maker of batches, for this object alone.
        padding: What makes arrays of sequences; None without any.

    Attributes:
        shards: as given.

    """

    def __init__(
        self, version: Version, split: str, shards: Shards, place: Placement, padding: Padding | None = None
    ) -> None:
        self._version, self._split, self.shards, self._place, self._padding = version, split, shards, place, padding
        self._ids = self._order = np.empty(0, np.int64)

    def sample(
        self, sample_id: Any, index: Any, change: Callable[[dict[str, Any], Placement], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Return the picked columns of one sample, by its id or by its number.

        Args:
            sample_id: Its id, or None.
            index: Its number, or None.
            change: Makes the columns to return of the picked ones, (1, …) each; values of any length come as they do
                from `Shards.gather_ragged`.

        Raises:
            InputError: there is no such sample, or not exactly one of the arguments is given.
            CorruptVersion: it is damaged or missing.
        """
        if (sample_id is None) == (index is None):
            raise InputError("sample: give either an id or index=, the number of the sample in the split")
        if index is None:
            index = self._index_of(whole_number("sample_id", sample_id, "ids are of int64", least=-LIMIT))
        last = self.shards.samples - 1
        cure = f"split {self._split!r} of {self._version.uri} has samples 0 to {last}"
        number = np.array([whole_number("index", index, cure, below=last + 1)], np.int64)
        good = self.shards.usable(number)
        if good is not None and not good[0]:
            raise CorruptVersion(f"sample {number[0]} of {self._version.uri} is damaged or missing: {CURE}")
        columns, ragged = self.shards.columns, self.shards.ragged
        names = self.shards.picked
        plain = [name for name in names if name != ragged and (self._padding is None or name not in OWN)]
        gathered: dict[str, Any] = {name: self._place.buffer(columns[name], 1) for name in plain}
        encoded = self.shards.gather_ragged(number) if self.shards.encoded and ragged in names else None
        self.shards.gather(number, gathered)
        if encoded is not None:
            gathered[str(ragged)] = encoded
        if self._padding is not None:
            made = self._padding.fill([self], [(0, number)], self._place, names)[0]
            gathered = {name: made[name] if name in made else gathered[name] for name in names}
        if change is not None:
            try:
                gathered = change(gathered, self._place)
            except Undecodable as error:
                raise self.shards.fault(int(number[0]), error.faults[0]) from error
        return {name: values[0] for name, values in self._place.receive(self._place.place(gathered)).items()}

    def _index_of(self, sample_id: int) -> int:
        if not len(self._ids):
            ids = stored_column(self._version, self._split, "sample_id")
            self._order = np.argsort(ids, kind="stable")
            self._ids = ids[self._order]
        place = int(np.searchsorted(self._ids, sample_id))
        if place == len(self._ids) or self._ids[place] != sample_id:
            raise InputError(
                f"sample_id = {sample_id}: split {self._split!r} of {self._version.uri} has no such sample; "
                "give one from its column 'sample_id', or its number as index="
            )
        return int(self._order[place])

    def close(self) -> None:
        """Stop downloads."""
        self.shards.close()
