"""Augmentation of one unit of images, in a Ray task or actor; nothing here depends on Ray.

bytes ─ decode ─ fingerprint ─ K variants ─ judge ─ rows ─ one file a split ─ note
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from tasks.images.config import ImageAugmentationConfig
from tasks.images.decode import Decoded, Decoder, Rejection
from tasks.images.duplicates import perceptual_hash
from tasks.images.engines import Engine, Scored, make_engine, score
from tasks.images.formats import read_jpeg_header
from tasks.images.outcomes import OUTCOMES, UnitNote, note_uri, read_outcomes, write_note
from tasks.images.plan import read_unit
from tasks.images.rows import Originals, build_rows, decode_images, rows_schema
from tasks.images.sources import REJECTED_IMAGES
from tasks.images.split import SPLITS
from tasks.io import storage
from tasks.io.errors import SourceError
from tasks.io.location import is_transient
from tasks.io.storage import FileInfo, ParquetStream
from tasks.io.tensors import Int8Array, UInt8Array, parquet_settings
from tasks.store import layout
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation

IMAGES_AT_ONCE = 32
"""Images that are drawn, judged and written together; a row group of a file."""
BYTES_AT_ONCE = 64 << 20
"""Bytes of variants: of large ones there are fewer at once."""
PAGE_BYTES = 1 << 20
READ_AHEAD = 16
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageJob:
    """State shared by all tasks."""

    config: ImageAugmentationConfig
    reservation: Reservation
    plan_uri: str
    digests: tuple[str, ...]
    classes: int


@dataclass(slots=True)
class Worker:
    """State that a process keeps from one unit to the next."""

    engine: Engine
    decoders: list[Decoder]


_Outcome = dict[str, Any]
"""Outcome of one image, by `OUTCOMES`; what isn't known, as of a rejected one, isn't in it."""


@dataclass(slots=True)
class _Clock:
    """Wall time by stage: each `lap` counts for the stage that has just ended."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


@lru_cache(maxsize=2)
def worker_for(config: ImageAugmentationConfig) -> Worker:
    """Return this process's worker for training images or others; loaded once while the configuration is the same."""
    engine = make_engine(config)
    count = IMAGES_AT_ONCE if engine.keeps else 1
    return Worker(engine, [Decoder(config.max_pixels, config.background) for _ in range(count)])


def augment_unit(job: ImageJob, unit: int) -> UnitNote:
    """Augment and write one unit.

    Returns:
        Its note, which is also stored beside the data.

    Raises:
        OSError: the store fails transiently; an unreadable image is rejected instead.
    """
    planned = read_unit(job.plan_uri, unit, job.config.images_per_file)
    clock = _Clock()
    outcomes: list[_Outcome] = [{} for _ in range(planned.num_rows)]
    splits = planned["split"].to_numpy()
    files = {}
    for number in np.unique(splits):
        rows = np.flatnonzero(splits == number)
        place = unit, SPLITS[number]
        entry = _augment_split(job, place, planned.take(rows), [outcomes[row] for row in rows], clock)
        if entry is not None:
            files[SPLITS[number]] = entry
    table = pa.Table.from_pylist(outcomes, schema=OUTCOMES)
    reasons = pc.value_counts(table["reason"].drop_null()).to_pylist()
    note = UnitNote(
        unit=unit,
        uri=note_uri(job.reservation, unit),
        digest=job.digests[unit],
        images=planned.num_rows,
        augmented=table["reason"].null_count,
        rejected={entry["values"]: entry["counts"] for entry in reasons},
        files=files,
        rejected_file=_write_rejected(job, unit, planned, table),
        seconds=dict(clock.seconds),
    )
    write_note(note, table)
    return note


def _augment_split(
    job: ImageJob, place: tuple[int, str], planned: pa.Table, outcomes: Sequence[_Outcome], clock: _Clock
) -> FileEntry | None:
    """Write the file of a unit's images of one split; return None if none of them can be decoded."""
    unit, split = place
    tables = _rows(job.config.of_split(split), job.classes, planned, outcomes, clock)
    first = next(tables, None)
    if first is None:
        return None
    with open_rows(job, job.reservation.data_uri(unit, layout.split_directory(split))) as stream:
        for table in chain([first], tables):
            stream.write(table)
            clock.lap("write")
    clock.lap("write")
    return job.reservation.entry(stream.written)


def _rows(
    config: ImageAugmentationConfig, classes: int, planned: pa.Table, outcomes: Sequence[_Outcome], clock: _Clock
) -> Iterator[pa.Table]:
    """Yield the rows of some images' variants, some images at a time; record the outcome of each image."""
    worker = worker_for(config)
    keys = planned["key"].to_numpy()
    uris = planned["uri"].to_pylist()
    listed: Sequence[FileInfo | None] = [None] * len(uris)
    if "stamp" in planned.column_names:  # copies were searched among the contents that were listed
        listed = list(map(FileInfo, uris, planned["bytes"].to_pylist(), planned["stamp"].to_pylist()))
    for first, contents in _chunks(_contents(uris, listed), config):
        members = outcomes[first : first + len(contents)]
        images = _decoded(worker, contents, members, clock)
        sizes = [expected_size(data) for data in contents]
        made, measured, magnification = worker.engine.variants(images, keys[first : first + len(members)], sizes)
        clock.lap("augment")
        if not len(made):
            continue
        augmented = [outcome for outcome in members if "reason" not in outcome]
        chunk = planned.slice(first, len(members)).filter(pa.array(["reason" not in outcome for outcome in members]))
        originals = Originals(
            ids=chunk["image_id"].combine_chunks(),
            uris=chunk["uri"].combine_chunks(),
            class_ids=chunk["class_id"].to_numpy(),
            class_names=chunk["class_name"].combine_chunks(),
        )
        variants = config.augmentation.variants
        scored = score(measured, magnification, np.repeat(originals.class_ids, variants), classes, config.thresholds)
        _note_scores(augmented, scored, variants)
        table = build_rows(config, made, originals, scored, classes)
        clock.lap("judge")
        yield table


def augment_again(config: ImageAugmentationConfig, classes: int, planned: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Make the variants of a few images in memory, as `augment_unit` makes and writes those of a unit.

    Args:
        config: Configuration of their split (`of_split`).
        classes: Number of classes.
        planned: Columns image_id, uri, class_name, class_id and key of the plan; with bytes and stamp, files that have
            changed since the listing are rejected, as in the job.

    Returns:
        The outcome of each image, by `OUTCOMES`; and the rows of the augmented ones, by `rows_schema`.
    """
    outcomes: list[_Outcome] = [{} for _ in range(planned.num_rows)]
    schema = rows_schema(config, classes)
    # Formats that aren't encoded are views of the engine's memory, which the next images overwrite.
    kept = [_copied(table) for table in _rows(config, classes, planned, outcomes, _Clock())]
    return pa.Table.from_pylist(outcomes, schema=OUTCOMES), pa.concat_tables([schema.empty_table(), *kept])


def unlike_variants(made: pa.Table, again: pa.Table, tolerance: float) -> list[str]:
    """Return ids of variants that differ when they are made again.

    Args:
        made: Rows by `rows_schema`.
        again: The same variants in any order.
        tolerance: Mean difference to ignore, relative to the span of the values.
    """
    one, other = (table.sort_by("image_id") for table in (made, again))
    first, second = (decode_images(table).astype(np.float32) for table in (one, other))
    unlike = np.ones(len(first), np.bool_)
    if first.shape == second.shape:
        gaps = np.abs(first - second).mean(axis=(1, 2, 3))
        unlike = ~(gaps <= tolerance * np.ptp(first, axis=(1, 2, 3)))  # also NaN
    names: list[str] = one["image_id"].filter(pa.array(unlike)).to_pylist()
    return names


def _copied(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.arange(table.num_rows)))


def open_rows(job: ImageJob, uri: str) -> ParquetStream:
    """Open a file of rows for writing."""
    schema = rows_schema(job.config, job.classes)
    # Pages that fit the processor's cache, checked after each row: they pass from buffer to buffer, and
    # some images are written in half the time of one large page.
    pages = {"data_page_size": PAGE_BYTES, "write_batch_size": 1}
    return ParquetStream(uri, schema, **parquet_settings(schema) | pages)


def _chunks(
    contents: Iterator[bytes | OSError], config: ImageAugmentationConfig
) -> Iterator[tuple[int, list[bytes | OSError]]]:
    """Yield some files' contents at a time, with the number of the first."""
    augmentation = config.augmentation
    variant_bytes = augmentation.variants * augmentation.size**2 * 3 * (4 if config.format == "float32" else 1)
    most = max(1, min(IMAGES_AT_ONCE, BYTES_AT_ONCE // variant_bytes))
    first = 0
    while chunk := list(islice(contents, most)):
        yield first, chunk
        first += len(chunk)


def expected_size(data: bytes | OSError) -> tuple[int, int]:
    """Return height and width of an ordinary JPEG; (1, 1) for anything else, whose size is known after decoding."""
    header = None if isinstance(data, OSError) else read_jpeg_header(data)
    return (1, 1) if header is None or header.may_be_turned else (header.height, header.width)


def _decoded(
    worker: Worker, contents: Sequence[bytes | OSError], outcomes: Sequence[_Outcome], clock: _Clock
) -> Iterator[UInt8Array | None]:
    """Yield the pixels of each file, decoded on demand; None for a rejected one, whose reason is recorded."""
    clock.lap("read")
    for number, (data, outcome) in enumerate(zip(contents, outcomes, strict=True)):
        if isinstance(data, OSError):
            outcome |= {"reason": UNREADABLE, "detail": f"The file can't be read: {data}."}
            yield None
            continue
        decoded = worker.decoders[number % len(worker.decoders)].decode(data)
        clock.lap("decode")
        if isinstance(decoded, Rejection):
            outcome |= {"reason": decoded.reason, "detail": decoded.detail}
            yield None
            continue
        _note_picture(outcome, data, decoded)
        clock.lap("fingerprint")
        yield decoded.pixels
        clock.lap("augment")


def _contents(uris: Sequence[str], listed: Sequence[FileInfo | None]) -> Iterator[bytes | OSError]:
    """Yield the contents of each file, in order, or its fault; from S3 some are read ahead."""
    if not uris or not storage.is_s3(uris[0]):
        yield from map(_content, uris, listed)
        return
    ahead: deque[Future[bytes | OSError]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as readers:
        for uri, known in zip(uris, listed, strict=True):
            ahead.append(readers.submit(_content, uri, known))
            if len(ahead) == READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _content(uri: str, listed: FileInfo | None) -> bytes | OSError:
    """Return a file, or its fault."""
    try:
        return storage.read_bytes(uri, listed)
    except OSError as error:
        if is_transient(error):
            raise
        return error


def _note_picture(outcome: _Outcome, data: bytes, decoded: Decoded) -> None:
    height, width = decoded.pixels.shape[:2]
    found, colours, structured = perceptual_hash(decoded.pixels)
    outcome |= {"content": xxhash.xxh3_128_hexdigest(data), "format": decoded.format, "height": height, "width": width}
    outcome |= {"hash": found, "structured": structured, "colours": colours.tobytes()}


def _note_scores(outcomes: Sequence[_Outcome], scored: Scored, variants: int) -> None:
    scores, passed, ready = (a.reshape(-1, variants) for a in (scored.score, scored.passed, scored.ready))
    issues = scored.issues.to_pylist()
    for number, outcome in enumerate(outcomes):
        of_image = issues[number * variants : (number + 1) * variants]
        outcome |= {
            "scores": scores[number].tolist(),
            "passed": int(passed[number].sum()),
            "ready": int(ready[number].sum()),
            "issues": sorted({issue for some in of_image for issue in some}),
        }


def _write_rejected(job: ImageJob, unit: int, planned: pa.Table, outcomes: pa.Table) -> FileEntry | None:
    bad = outcomes["reason"].is_valid()
    if not pc.any(bad).as_py():
        return None
    columns: dict[str, Any] = {name: planned[name] for name in ("uri", "path", "image_id", "class_name")}
    columns |= {name: outcomes[name] for name in ("reason", "detail")}
    rows = pa.table(columns).filter(bad).cast(REJECTED_IMAGES)
    return job.reservation.entry(storage.write_parquet(rows, job.reservation.rejected_uri("images", unit)))


def resplit_unit(job: ImageJob, note: UnitNote, wanted: dict[str, Int8Array]) -> UnitNote:
    """Rewrite a unit's rows, each to its present split; the old files stay until the commit.

    Rows are copied, except for images that enter or leave train: their variants differ, so they are read and
    made again.

    Args:
        job: The job.
        note: Note of the unit.
        wanted: For each file of the note, by its split: the split of each of its images, in the file's order.

    Returns:
        Its new note, with the new files.

    Raises:
        SourceError: an image has changed since it was read first.
    """
    streams: dict[int, ParquetStream] = {}
    number = len(job.digests) + note.unit  # separate names: the old files may be needed by another attempt

    def write(target: int, rows: pa.Table) -> None:
        if target not in streams:
            directory = layout.split_directory(SPLITS[target])
            streams[target] = stack.enter_context(open_rows(job, job.reservation.data_uri(number, directory)))
        streams[target].write(rows)

    outcomes = next(iter(read_outcomes([note], OUTCOMES.names)))
    with ExitStack() as stack:
        for split, entry in note.files.items():
            kept = np.array([job.config.alike(split, one) for one in SPLITS])
            per_row = np.repeat(np.where(kept[wanted[split]], wanted[split], -1), job.config.variants_in(split))
            done = 0
            for rows in _row_groups(layout.join(job.reservation.uri, entry.path)):
                own = per_row[done : done + rows.num_rows]
                done += rows.num_rows
                for target in np.unique(own[own >= 0]):
                    write(target, rows.filter(pa.array(own == target)))
            assert done == len(per_row), f"{entry.path} has {done} rows, its note has {len(per_row)}"
        outcomes, seconds = _made_again(job, note, wanted, outcomes, write)
    files = {SPLITS[target]: job.reservation.entry(stream.written) for target, stream in sorted(streams.items())}
    uri = layout.join(job.reservation.uri, layout.work_name("resplit", note.unit, job.reservation.attempt))
    moved = replace(note, uri=uri, files=files, seconds=seconds)
    write_note(moved, outcomes)
    return moved


def _made_again(
    job: ImageJob,
    note: UnitNote,
    wanted: Mapping[str, Int8Array],
    outcomes: pa.Table,
    write: Callable[[int, pa.Table], None],
) -> tuple[pa.Table, dict[str, float]]:
    """Make the variants of images that enter or leave train.

    Returns:
        The present outcomes of all images; and wall time by stage, including the first making.
    """
    clock = _Clock()
    clock.seconds.update(note.seconds)
    planned = read_unit(job.plan_uri, note.unit, job.config.images_per_file)
    was = planned["split"].to_numpy()
    good = outcomes["reason"].is_null().to_numpy()
    now = was.copy()
    for split, targets in wanted.items():
        now[good & (was == SPLITS.index(split))] = targets
    order = np.arange(len(was))
    for target in np.unique(now[good]):
        others = [number for number, split in enumerate(SPLITS) if not job.config.alike(split, SPLITS[target])]
        rows = np.flatnonzero(good & (now == target) & np.isin(was, others))
        again: list[_Outcome] = [{} for _ in rows]
        for table in _rows(job.config.of_split(SPLITS[target]), job.classes, planned.take(rows), again, clock):
            write(int(target), table)
            clock.lap("write")
        before = outcomes["content"].take(pa.array(rows)).to_pylist()
        for row, variant, content in zip(rows.tolist(), again, before, strict=True):
            if variant.get("content") != content or "reason" in variant:
                raise SourceError(f"{planned['uri'][row].as_py()} has changed since this run read it first; run again")
        order[rows] = outcomes.num_rows + np.arange(len(rows))
        outcomes = pa.concat_tables([outcomes, pa.Table.from_pylist(again, schema=OUTCOMES)])
    return outcomes.take(pa.array(order)), dict(clock.seconds)


def _row_groups(uri: str) -> Iterator[pa.Table]:
    with storage.open_input(uri) as source:
        file = pq.ParquetFile(source)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)
