"""The delivery job as Ray Data plans: a published version becomes streaming-ready files in a global random order.

    units ─ look ─ notes ─ profile ─ encoder, label ─┐
               └─ hashes ─ check ─ repeated keys ────┴─ units ─ scatter ─ buckets ─ gather ─ files

The order must be random over the whole split, so every file gets samples from every unit: their bytes go through Ray
Data's shuffle, from the unit that read them to the bucket that sorts and writes them. Gathering each file directly from
the sources instead would read each row group once a file. Data beyond the object store's size spills to disk. A task
holds a unit or a bucket, however large the whole is.

Nothing here is visible to readers until the version is committed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import class_counts, describe, fit, named_profile, samples_of
from tasks.delivery.shuffle import Checked, Look, Shuffle, StreamingReady, UnitNote, WrittenBucket
from tasks.delivery.source import SPLITS, Repeats, Source, merge_repeats, read_units
from tasks.engine.cluster import losses_explained
from tasks.engine.jobs import Parts, Shuffled, shuffle
from tasks.io.errors import BalanceError
from tasks.quality.profile import TableProfile, added
from tasks.store.manifest import RowBalance, check_equal
from tasks.store.reservation import Reservation

KEYS_PER_PART = 4_000_000
"""Approximate number of hashes that one task checks."""
MAX_PARTS = 256
KEY_BYTES = 24
"""Bytes of a row's hashes in the shuffle."""

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
        source: Result of `find_source`.
        reservation: Where to write.
        on_rows: Called with numbers of rows as they are done: written, or left out.
        unit_bytes: Size of the pieces that tasks read, in memory.

    Raises:
        BalanceError: rows were lost or doubled on the way.
        ConfigError: the target or a feature can't be encoded.
        CorruptVersion: a file of the source is missing, can't be read, or differs from its manifest.
        ResourceError: memory or disk are too small; it says what to do.
    """
    units = tuple(read_units(source, unit_bytes))
    started = time.monotonic()
    shares = max(1, min(MAX_PARTS, source.manifest.rows // KEYS_PER_PART))
    look = Look(config, source, reservation, units, shares)
    profile: TableProfile | None = None

    def on_note(note: UnitNote) -> None:
        nonlocal profile
        assert note.profile is not None
        profile, note.profile = added(profile, note.profile), None

    with losses_explained(config.less_at_once):
        seen: Shuffled[UnitNote, Checked] = shuffle(
            Parts(len(units)),
            2 * shares,
            look.scatter,
            look.gather,
            names=("look at rows", "check keys"),
            volume=source.manifest.rows * KEY_BYTES,
            lanes=2,
            on_note=on_note,
        )
        on_rows(sum(note.left_out for note in seen.notes))
        looked = time.monotonic()
        assert profile is not None, "a source has a unit"
        delivery = fit(look, seen.notes, profile)
        made, keys = int(samples_of(seen.notes).sum()), int(seen.carried[:, 0].sum())
        check_equal(source.manifest.dataset, made, keys, "became samples, {} had their keys checked")
        repeats = merge_repeats(checked.repeats for checked in seen.summaries)
        written = _write(delivery, repeats, len(units), on_rows)
    timings = {"look": looked - started, "shuffle and write": time.monotonic() - looked}
    samples = dict(zip(SPLITS, samples_of(seen.notes).tolist(), strict=True))
    entities = np.sum([checked.entities for checked in seen.summaries], axis=0).tolist()
    return StreamingReady(
        reservation=reservation,
        files=tuple(made.entry for made in written),
        rejected_files=tuple(note.rejected_file for note in seen.notes if note.rejected_file is not None),
        schema=delivery.form.schema,
        profile=named_profile(profile, delivery.label, seen.notes),
        balances=(_balance(source, seen.notes, written),),
        definition=describe(delivery, {split: count for split, count in samples.items() if count}),
        samples=samples,
        class_counts=class_counts(delivery.label, written),
        entities=dict(zip(SPLITS, entities, strict=True)),
        leaking_entities=sum(checked.leaking for checked in seen.summaries),
        repeated_keys=sum(len(own.rows) for own in repeats.values()),
        duplicate_ids=sum(made.duplicate_ids for made in written),
        timings=timings,
    )


def _write(delivery: Shuffle, repeats: dict[int, Repeats], units: int, on_rows: Progress) -> list[WrittenBucket]:
    """Gather and write the samples of each bucket; return the files in the buckets' order."""
    buckets = len(delivery.buckets)
    if not buckets:
        return []
    done: Shuffled[int, WrittenBucket | None] = shuffle(
        Parts(units),
        buckets,
        partial(delivery.scatter, repeats),
        delivery.gather,
        names=("encode samples", "sort and write"),
        volume=delivery.source.manifest.rows * delivery.form.sample_bytes,
        on_summary=lambda made: on_rows(made.entry.rows) if made is not None else None,
    )
    return [made for made in done.summaries if made is not None]


def _balance(source: Source, notes: Sequence[UnitNote], written: Sequence[WrittenBucket]) -> RowBalance:
    """Return the row balance: in = out + rejected + filtered, checked against the manifest and the written files."""
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
        rows_out=sum(made.entry.rows for made in written),
        rejected=dict(sorted(rejected.items())),
        filtered=dict(sorted(filtered.items())),
    )
    balance.check()
    for split, wanted in enumerate(samples_of(notes).tolist()):
        found = sum(made.entry.rows for made in written if made.split == split)
        if found != wanted:
            raise BalanceError(f"{name}: {wanted} samples were meant for {SPLITS[split]}, {found} were written")
    return balance
