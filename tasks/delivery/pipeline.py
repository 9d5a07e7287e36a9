"""The delivery job on Ray: a published version becomes streaming-ready files in a global random order.

    units ─ look ─ notes ─ profile ─ encoder, label ─┐
               └─ hashes ─ check ─ repeated keys ────┴─ units ─ scatter ─ buckets ─ gather ─ files

The order must be random over the whole split, so every file gets samples from every unit: bytes go through Ray's
object store once, from the unit that read them to the bucket that sorts and writes them. Gathering each file straight
from the sources instead would read each row group once a file. The store holds a share of the samples at a time (a
wave: the sources are read again for the next one, which takes a fraction of the time of writing them); what is more
than `MAX_WAVES` of them spills to disk. A task holds a unit or a bucket, however large the whole is: on 2 CPUs, 12,000
images of 150 KB took 4 s and 310 MB a worker, 4,000 took 294 MB; 6 million rows of 20 numbers, in row groups of a
million, took 21 s and 890 MB a worker, 2 million took 855 MB.

Nothing here is visible to readers until the version is committed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray

from tasks.core.cluster import LOST_WORKER_RETRIES, object_store_bytes
from tasks.core.conservation import check_equal
from tasks.core.errors import BalanceError
from tasks.core.exchange import collect, exchange, losses_explained
from tasks.core.manifest import RowBalance
from tasks.core.profile import merge_profiles
from tasks.core.reservation import Reservation
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import describe, named_profile
from tasks.delivery.fitting import class_counts, fit, samples_of
from tasks.delivery.keys import SPLITS, Repeats, merge_repeats
from tasks.delivery.source import Source, read_units
from tasks.delivery.stages import Look, Shuffle, StreamingReady, UnitNote, WrittenBucket

KEYS_PER_PART = 4_000_000
"""Hashes that one task checks, about."""
MAX_PARTS = 256
MAX_WAVES = 8
STORE_SHARE = 0.6
"""Of the object store that one wave's samples may take; Ray begins to spill at 0.8."""

Progress = Callable[[int], None]


def write_streaming_ready(
    config: DeliveryConfig,
    source: Source,
    reservation: Reservation,
    *,
    on_rows: Progress = lambda _: None,
    unit_bytes: int | None = None,
) -> StreamingReady:
    """Write the streaming-ready copy of a version under a reservation.

    The bytes of every data file are a function of the source's rows, the configuration and the seed alone.

    Args:
        config: How samples are made, split and ordered.
        source: What `find_source` has found.
        reservation: Where to write.
        on_rows: Called with numbers of rows as they are done: written, or found to be left out.
        unit_bytes: Size of the pieces that tasks read, in memory.

    Raises:
        BalanceError: rows were lost or doubled on the way.
        ConfigError: the target or a feature can't be encoded.
        CorruptVersion: a file of the source is missing, can't be read, or differs from its manifest.
        ResourceError: memory or disk are too small; it says what to do.
    """
    units = tuple(read_units(source, unit_bytes))
    started = time.monotonic()
    parts = max(1, min(MAX_PARTS, source.manifest.rows // KEYS_PER_PART))
    look = Look(config, source, reservation, units, parts)
    with losses_explained(f"lower --file-megabytes (it is {config.file_megabytes:g})"):
        seen = exchange(len(units), 2 * parts, look.scatter, look.gather, on_note=lambda note: on_rows(note.left_out))
        looked = time.monotonic()
        profile = merge_profiles([note.profile for note in seen.notes])
        shuffle = fit(look, seen.notes, profile)
        made, keys = int(samples_of(seen.notes).sum()), int(seen.carried[:, :parts].sum())
        check_equal(source.manifest.dataset, made, keys, "became samples, {} had their keys checked")
        repeats = merge_repeats(checked.repeats for checked in seen.summaries)
        written = list(_write(shuffle, repeats, on_rows))
    timings = {"look": looked - started, "shuffle and write": time.monotonic() - looked}
    samples = dict(zip(SPLITS, samples_of(seen.notes).tolist(), strict=True))
    entities = np.sum([part.entities for part in seen.summaries], axis=0).tolist()
    return StreamingReady(
        reservation=reservation,
        files=tuple(made.entry for made in written),
        rejected_files=tuple(note.rejected_file for note in seen.notes if note.rejected_file is not None),
        schema=shuffle.form.schema,
        profile=named_profile(profile, shuffle.label, seen.notes),
        balances=(_balance(source, seen.notes, written),),
        definition=describe(shuffle, written, {split: count for split, count in samples.items() if count}),
        samples=samples,
        class_counts=class_counts(shuffle.label, written),
        entities=dict(zip(SPLITS, entities, strict=True)),
        leaking_entities=sum(part.leaking for part in seen.summaries),
        repeated_keys=sum(len(own.rows) for own in repeats.values()),
        duplicate_ids=sum(made.duplicate_ids for made in written),
        timings=timings,
    )


def _write(shuffle: Shuffle, repeats: dict[int, Repeats], on_rows: Progress) -> Iterator[WrittenBucket]:
    """Write all buckets, some at a time; files in the buckets' order."""
    shared = ray.put(shuffle)
    for wave in _waves(shuffle):
        scattered: list[Any] = [
            _scatter_unit.options(num_returns=len(wave) + 1).remote(shared, unit, repeats.get(unit, Repeats()), wave)
            for unit in range(len(shuffle.units))
        ]
        gathered: list[Any] = [
            _gather_bucket.remote(shared, bucket, *(refs[number + 1] for refs in scattered))
            for number, bucket in enumerate(wave)
        ]
        # From here on only the gathering tasks hold the samples, so each part is freed when its task is done.
        sent = [refs[0] for refs in scattered]
        del scattered
        made = collect([*sent, *gathered], lambda one: on_rows(one.samples) if isinstance(one, WrittenBucket) else None)
        yield from (one for one in made if isinstance(one, WrittenBucket))


def _waves(shuffle: Shuffle) -> list[range]:
    """Buckets in turns, by the size of all samples and of the object store."""
    count = len(shuffle.buckets)
    volume = shuffle.source.manifest.rows * shuffle.form.sample_bytes
    waves = min(-(-volume // max(1, int(STORE_SHARE * object_store_bytes()))), MAX_WAVES, count)
    bounds = [count * wave // max(waves, 1) for wave in range(waves + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


@ray.remote(num_cpus=1, max_retries=LOST_WORKER_RETRIES, scheduling_strategy="SPREAD")
def _scatter_unit(shuffle: Shuffle, unit: int, repeats: Repeats, wave: range) -> list[Any]:
    return [unit, *shuffle.scatter(unit, repeats, wave)]


@ray.remote(num_cpus=1, max_retries=LOST_WORKER_RETRIES, scheduling_strategy="SPREAD")
def _gather_bucket(shuffle: Shuffle, bucket: int, *parts: Any) -> WrittenBucket | None:
    return shuffle.gather(bucket, parts)


def _balance(source: Source, notes: Sequence[UnitNote], written: Sequence[WrittenBucket]) -> RowBalance:
    """Where the rows went: in = out + rejected + filtered, checked against the manifest and what was written."""
    rejected: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    for note in notes:
        rejected.update(note.rejected)
        filtered.update(note.filtered)
    name = source.manifest.dataset
    read = sum(note.rows for note in notes)
    if read != source.manifest.rows:
        raise BalanceError(f"{name} v{source.manifest.version} has {source.manifest.rows} rows, {read} were read")
    balance = RowBalance(
        name=name,
        rows_in=read,
        rows_out=sum(made.samples for made in written),
        rejected=dict(sorted(rejected.items())),
        filtered=dict(sorted(filtered.items())),
    )
    balance.check()
    for split, wanted in enumerate(samples_of(notes).tolist()):
        found = sum(made.samples for made in written if made.split == split)
        if found != wanted:
            raise BalanceError(f"{name}: {wanted} samples were meant for {SPLITS[split]}, {found} were written")
    return balance
