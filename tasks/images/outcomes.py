"""Outcome of every image: noted unit by unit, then gathered, grouped by likeness, split, and written.

A note is written after its files, so an existing note means complete files. A later attempt of the same version reuses
a unit whose note has the planned digest, and doesn't repeat it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.images.config import ImageAugmentationConfig
from tasks.images.draws import image_keys
from tasks.images.duplicates import SIGNATURE_BYTES, group_images
from tasks.images.plan import ImagePlan, read_units, units_together
from tasks.images.split import SPLITS, split_images
from tasks.io import storage
from tasks.io.errors import CorruptVersion
from tasks.io.hashing import stable_hash
from tasks.io.storage import ParquetStream
from tasks.io.tensors import BoolArray, Float32Array, Int8Array, Int32Array, Int64Array, UInt8Array, UInt64Array
from tasks.quality.profile import TableProfile, merge_profiles, profile_table
from tasks.store import layout
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.reservation import Reservation

OUTCOMES = pa.schema(
    dict.fromkeys(("reason", "detail", "content", "format"), pa.string())
    | {"height": pa.int32(), "width": pa.int32()}
    | {"hash": pa.uint64(), "structured": pa.bool_(), "colours": pa.binary(SIGNATURE_BYTES)}
    | {"scores": pa.list_(pa.float32()), "passed": pa.int32(), "ready": pa.int32(), "issues": pa.list_(pa.string())}
)
"""A row an image of the unit, in the plan's order. reason, detail: of its rejection; null if it was augmented, and
then the rest is set. content: XXH3-128 of the file's bytes. scores: of its variants. issues: of any of them."""

_META = b"unit"
_NAME = re.compile(r"unit-([0-9]{5,})-a([0-9]+)\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitNote:
    """Summary of a finished unit, without its single images."""

    unit: int
    uri: str
    digest: str
    images: int
    augmented: int
    rejected: dict[str, int]
    files: dict[str, FileEntry]
    """Files by split."""
    rejected_file: FileEntry | None
    seconds: dict[str, float]
    """Wall time of each stage."""


def write_note(note: UnitNote, outcomes: pa.Table) -> None:
    """Write a unit's note; `outcomes` has the columns of `OUTCOMES`."""
    described = {
        "digest": note.digest,
        "images": note.images,
        "augmented": note.augmented,
        "rejected": note.rejected,
        "files": {split: entry.model_dump() for split, entry in note.files.items()},
        "rejected_file": note.rejected_file.model_dump() if note.rejected_file is not None else None,
        "seconds": note.seconds,
    }
    storage.write_parquet(outcomes.replace_schema_metadata({_META: json.dumps(described).encode()}), note.uri)


def note_uri(reservation: Reservation, unit: int) -> str:
    """Return the place of an attempt's note of a unit."""
    return layout.join(reservation.uri, layout.work_name("unit", unit, reservation.attempt))


def finished_units(plan: ImagePlan) -> dict[int, UnitNote]:
    """Return units of the plan that this attempt or an earlier one has finished, whose files all exist."""
    reservation = plan.reservation
    infos = storage.list_files(reservation.uri, include_hidden=True)
    sizes = {info.uri.removeprefix(f"{reservation.uri}/"): info.bytes for info in infos}
    notes = [(int(match[1]), info.uri) for info in infos if (match := _NAME.fullmatch(info.uri.rpartition("/")[2]))]
    contents = storage.in_threads(_read_note, (uri for _, uri in notes))
    read = (_parsed(*found, data) for found, data in zip(notes, contents, strict=True))
    return {
        note.unit: note
        for note in read
        if note is not None
        and note.unit < plan.units
        and note.digest == plan.digests[note.unit]
        and all(sizes.get(entry.path) == entry.bytes for entry in _entries(note))
    }


def read_outcomes(notes: Sequence[UnitNote], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield some columns of the images of each unit, unit by unit in their order."""
    # Decoded in one thread: Arrow and malloc would keep megabytes for each of them.
    for data in storage.in_threads(storage.read_bytes, (note.uri for note in notes)):
        yield pq.ParquetFile(pa.BufferReader(data)).read(columns=list(columns), use_threads=False)


def _read_note(uri: str) -> bytes:
    """Return the contents of a note; none if another attempt has removed it since."""
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return b""


def _parsed(unit: int, uri: str, data: bytes) -> UnitNote | None:
    """Return a note, or None if it isn't complete: then its unit is repeated."""
    try:
        metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    except pa.ArrowInvalid:
        return None
    if _META not in metadata:
        return None
    described = json.loads(metadata[_META])
    rejected_file = described["rejected_file"]
    return UnitNote(
        unit=unit,
        uri=uri,
        digest=described["digest"],
        images=described["images"],
        augmented=described["augmented"],
        rejected=described["rejected"],
        files={split: FileEntry.model_validate(entry) for split, entry in described["files"].items()},
        rejected_file=FileEntry.model_validate(rejected_file) if rejected_file is not None else None,
        seconds=described["seconds"],
    )


def _entries(note: UnitNote) -> list[FileEntry]:
    return [*note.files.values(), *([note.rejected_file] if note.rejected_file is not None else [])]


ORIGINALS = pa.schema(
    {"image_id": pa.string(), "uri": pa.string(), "bytes": pa.int64(), "content_xxh3": pa.string()}
    | {"format": pa.string(), "height": pa.int32(), "width": pa.int32()}
    | {"class_name": pa.string(), "class_id": pa.int32(), "split": pa.string(), "alike": pa.string()}
    | {"perceptual_hash": pa.uint64(), "mean_score": pa.float32()}
    | {"passed": pa.int32(), "ready": pa.int32(), "issues": pa.list_(pa.string())}
)
"""A row an augmented image. alike: id of the first image of its group, if it has others: images that share a
split because they are copies of each other or belong to one group. passed, ready: numbers of its variants."""

_FACTS = ("reason", "content", "hash", "structured", "colours", "height", "width")
_JUDGED = ("reason", "scores", "passed", "ready", "issues")


@dataclass(slots=True, kw_only=True)
class Gathered:
    """Every image of the plan, in its order: about a hundred bytes each."""

    key: UInt64Array
    class_id: Int64Array
    planned_split: Int8Array
    augmented: BoolArray
    height: Int32Array
    width: Int32Array


@dataclass(slots=True, kw_only=True)
class Likeness:
    """What only the search for related images needs, of every image of the plan: half of the memory.

    content: hash of the file's contents.
    """

    linked: Int64Array
    content: UInt64Array
    hash: UInt64Array
    colours: UInt8Array
    structured: BoolArray


def gather(plan: ImagePlan, notes: Sequence[UnitNote], planned: Iterable[pa.Table]) -> tuple[Gathered, Likeness]:
    """Gather the facts of all units.

    Args:
        plan: The plan.
        notes: A note a unit, in the units' order.
        planned: Columns `key`, `class_id`, `linked`, `split` of the plan, unit by unit.
    """
    assert [note.unit for note in notes] == list(range(plan.units)), "a unit is missing"
    count, width = plan.images, SIGNATURE_BYTES
    found = Gathered(
        key=np.empty(count, np.uint64),
        class_id=np.empty(count, np.int64),
        planned_split=np.empty(count, np.int8),
        augmented=np.empty(count, np.bool_),
        height=np.empty(count, np.int32),
        width=np.empty(count, np.int32),
    )
    likeness = Likeness(
        linked=np.empty(count, np.int64),
        content=np.empty(count, np.uint64),
        hash=np.empty(count, np.uint64),
        colours=np.empty((count, width), np.uint8),
        structured=np.empty(count, np.bool_),
    )
    start = 0
    for rows, outcomes in zip(planned, read_outcomes(notes, _FACTS), strict=True):
        assert rows.num_rows == outcomes.num_rows, "the notes don't belong to the plan"
        own = slice(start, start + rows.num_rows)
        start = own.stop
        found.key[own] = rows["key"].to_numpy()
        found.class_id[own] = rows["class_id"].to_numpy()
        likeness.linked[own] = rows["linked"].to_numpy()
        found.planned_split[own] = rows["split"].to_numpy()
        found.augmented[own] = outcomes["reason"].is_null().to_numpy()
        likeness.content[own] = stable_hash(outcomes["content"])
        likeness.hash[own] = outcomes["hash"].fill_null(0).to_numpy()
        colours = outcomes["colours"].fill_null(bytes(width)).combine_chunks()
        likeness.colours[own] = np.frombuffer(colours.buffers()[1], np.uint8, len(colours) * width).reshape(-1, width)
        likeness.structured[own] = outcomes["structured"].fill_null(False).to_numpy()
        found.height[own] = outcomes["height"].fill_null(0).to_numpy()
        found.width[own] = outcomes["width"].fill_null(0).to_numpy()
    assert start == count, "the notes don't belong to the plan"
    return found, likeness


def settle(
    found: Gathered, likeness: Likeness, config: ImageAugmentationConfig, near: Iterable[Int64Array]
) -> tuple[Int64Array, Int8Array]:
    """Group related images, and split them.

    Args:
        found: The images.
        likeness: Their likeness.
        config: Shares of the splits.
        near: Pairs of near-duplicates, shape (pairs, 2), rows of the plan.

    Returns:
        The first image of its group, and the split, for each image of the plan; -1 for a rejected image.
    """
    groups = grouped(near, likeness.linked, likeness.content, found.augmented)
    splits = np.full(len(groups), -1, np.int8)
    good = found.augmented
    splits[good] = split_images(
        found.key[good], found.class_id[good], groups[good], config.validation_share, config.test_share
    )
    return groups, splits


def grouped(near: Iterable[Int64Array], linked: Int64Array, content: UInt64Array, augmented: BoolArray) -> Int64Array:
    """Group images that are copies of each other or otherwise related.

    Args:
        near: Pairs of near-duplicates, shape (pairs, 2).
        linked: A common value of images known to be related, shape (n,).
        content: Hash of each file's contents.
        augmented: True for images that count.

    Returns:
        The first image of each image's group, -1 for one that doesn't count; shape (n,).
    """
    pairs = [*near, _chained(linked, augmented), _chained(content, augmented)]
    return np.where(augmented, group_images(len(augmented), pairs), -1)


def repeated_keys(keys: UInt64Array) -> int:
    """Return the number of images with the key of another one, beyond the first."""
    return len(keys) - len(np.unique(keys))


def _chained(values: npt.NDArray[np.generic], chosen: BoolArray) -> Int64Array:
    """Link each chosen row with the next one of the same value, shape (pairs, 2)."""
    rows = np.flatnonzero(chosen)
    order = np.argsort(values[rows], kind="stable")
    same = values[rows][order][1:] == values[rows][order][:-1]
    return np.stack([rows[order[:-1]][same], rows[order[1:]][same]], axis=1).astype(np.int64)


def moved_units(found: Gathered, splits: Int8Array, images_per_unit: int) -> list[int]:
    """Return units with an image that now belongs to another split than its file's."""
    moved = np.flatnonzero(found.augmented & (splits != found.planned_split))
    return [int(unit) for unit in np.unique(moved // images_per_unit)]


def wanted_splits(found: Gathered, splits: Int8Array, unit: slice) -> dict[str, Int8Array]:
    """Return, for each file of a unit, by its planned split: the split of each of its images, in its order."""
    planned, now, augmented = found.planned_split[unit], splits[unit], found.augmented[unit]
    return {SPLITS[number]: now[augmented & (planned == number)] for number in np.unique(planned[augmented]).tolist()}


def leaking_groups(groups: Int64Array, written: Int8Array) -> int:
    """Return the number of groups of images that are in more than one split, as written."""
    good = groups >= 0
    pairs = np.unique(np.stack([groups[good], written[good].astype(np.int64)], axis=1), axis=0)
    return int(len(pairs) - len(np.unique(pairs[:, 0])))


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalsFile:
    """The written table of originals, and its totals."""

    entry: FileEntry
    profile: TableProfile
    """Profile of the data files' rows, without the images, derived from the originals."""
    passed: int
    ready: int
    mean_scores: Float32Array
    """Mean score of each augmented image; the next two fields have the same order."""
    passed_variants: Int32Array
    ready_variants: Int32Array


def write_originals(
    plan: ImagePlan, notes: Sequence[UnitNote], groups: Int64Array, splits: Int8Array, names: Mapping[int, str]
) -> OriginalsFile:
    """Write one row an augmented image, and profile the variants' rows.

    Args:
        plan: The plan.
        notes: A note a unit, in order.
        groups: Group of each image of the plan.
        splits: Split of each image of the plan.
        names: Ids of the images that are the first of a group with company, by their row.
    """
    uri = layout.join(plan.reservation.uri, layout.side_name("originals", plan.reservation.attempt))
    profiles, scores, passed, ready = [], [], [], []
    start = 0
    with ParquetStream(uri, ORIGINALS) as stream:
        outcomes = read_outcomes(notes, [*_JUDGED, "content", "format", "height", "width", "hash"])
        planned = read_units(plan.uri, range(plan.units), plan.images_per_unit)
        # With a row group a unit, the footer would be larger than the data.
        together = units_together(plan.images_per_unit)
        for first in range(0, plan.units, together):
            units = min(together, plan.units - first)
            noted, images = (pa.concat_tables(islice(tables, units)) for tables in (outcomes, planned))
            chosen = slice(start, start + images.num_rows)
            start = chosen.stop
            good = noted["reason"].is_null()
            judged = noted.filter(good)
            mask = good.to_numpy()
            rows = images.filter(good)
            if not rows.num_rows:
                continue
            passed.append(judged["passed"].to_numpy())
            ready.append(judged["ready"].to_numpy())
            split = [SPLITS[one] for one in splits[chosen][mask].tolist()]
            table = original_rows(rows, judged, split, [names.get(group) for group in groups[chosen][mask].tolist()])
            scores.append(table["mean_score"].to_numpy())
            stream.write(table)
            profiles.append(profile_variants(rows, judged, table["split"]))
    assert start == plan.images, "the notes don't belong to the plan"
    empty = pa.table({name: pa.array([], kind) for name, kind in _PROFILED.items()})
    return OriginalsFile(
        entry=plan.reservation.entry(stream.written),
        profile=merge_profiles(profiles or [profile_table(empty)]),
        passed=int(sum(part.sum() for part in passed)),
        ready=int(sum(part.sum() for part in ready)),
        mean_scores=np.concatenate(scores) if scores else np.empty(0, np.float32),
        passed_variants=np.concatenate(passed) if passed else np.empty(0, np.int32),
        ready_variants=np.concatenate(ready) if ready else np.empty(0, np.int32),
    )


def original_rows(images: pa.Table, judged: pa.Table, split: Sequence[str], alike: Sequence[str | None]) -> pa.Table:
    """Return the rows of the table of originals.

    Args:
        images: image_id, uri, bytes, class_name and class_id of augmented images.
        judged: Outcome of each, by `OUTCOMES`.
        split: Split of each.
        alike: Id of the first image of each one's group, if it has others.
    """
    columns = {name: images[name] for name in ("image_id", "uri", "bytes", "class_name", "class_id")}
    columns |= {name: judged[name] for name in ("format", "height", "width", "passed", "ready", "issues")}
    columns |= {"content_xxh3": judged["content"], "perceptual_hash": judged["hash"]}
    columns |= {"split": pa.array(split, pa.string()), "alike": pa.array(alike, pa.string())}
    columns |= {"mean_score": pa.array(row_means(judged["scores"]))}
    return pa.table({name: columns[name] for name in ORIGINALS.names}, schema=ORIGINALS)


def originals_entry(manifest: Manifest) -> FileEntry:
    """Return the file of a version's table of originals.

    Raises:
        CorruptVersion: its manifest lists none.
    """
    found = [entry for entry in manifest.side_files if entry.path.startswith("_originals/")]
    if not found:
        raise CorruptVersion(f"{manifest} has no table of its originals; publish it anew")
    return found[0]


def split_again(originals: pa.Table, config: ImageAugmentationConfig) -> tuple[Int64Array, Int8Array]:
    """Split the originals of a version as `settle` did, from their table.

    Args:
        originals: image_id, class_id and alike of all originals, in their order.
        config: Seed, and shares of the splits.

    Returns:
        The number of the first image of its group, and the split, for each.
    """
    ids = originals["image_id"].combine_chunks()
    first = pc.fill_null(pc.index_in(originals["alike"].combine_chunks(), value_set=ids), -1).to_numpy()
    groups = np.where(first < 0, np.arange(len(ids)), first).astype(np.int64)
    keys = image_keys(ids.to_pylist(), config.seed)
    classes = originals["class_id"].to_numpy().astype(np.int64)
    return groups, split_images(keys, classes, groups, config.validation_share, config.test_share)


_PROFILED = {
    "class_id": pa.int32(),
    "class_name": pa.string(),
    "split": pa.string(),
    "data_quality_score": pa.float32(),
    "original_height": pa.int32(),
    "original_width": pa.int32(),
}


def profile_variants(rows: pa.Table, judged: pa.Table, split: pa.Array | pa.ChunkedArray) -> TableProfile:
    """Profile of the variants' rows of some originals."""
    lists = judged["scores"].combine_chunks()
    parents = pc.list_parent_indices(lists)
    columns = {
        "class_id": rows["class_id"],
        "class_name": rows["class_name"],
        "split": split,
        "original_height": judged["height"],
        "original_width": judged["width"],
    }
    repeated = {name: column.take(parents) for name, column in columns.items()}
    repeated["data_quality_score"] = pc.list_flatten(lists)
    return profile_table(pa.table({name: repeated[name] for name in _PROFILED}))


def row_means(scores: pa.ChunkedArray) -> Float32Array:
    """Return the mean score of each image over its variants, at least one; shape (n,)."""
    lists = scores.combine_chunks()
    counts = pc.list_value_length(lists).to_numpy()
    if not len(counts):
        return np.empty(0, np.float32)
    sums = np.add.reduceat(pc.list_flatten(lists).to_numpy(), np.cumsum(counts) - counts)
    return np.asarray(sums / counts, np.float32)
