"""The stages of the delivery job, as each task runs them. Pure, but for the files they read and write.

- look: a unit's files are compared with their manifest; it is read and judged; its train rows are profiled, its keys
  are hashed, its rejected rows are written.
- check: the hashes of a part of their range, of all units: finds repeated keys and entities in several splits.
- scatter: a unit is read again, encoded, and cut into buckets by random keys.
- gather: a bucket, of all units, is sorted by random key and written as a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.encoding import (
    Encoder,
    Label,
    LabelVector,
    is_missing,
    label_columns,
    label_counts,
    length_name,
    numbers,
    profile_features,
    sequences,
)
from tasks.delivery.source import (
    SPLITS,
    Repeats,
    Source,
    Unit,
    bucket_of,
    check_digests,
    entity_splits,
    find_repeats,
    random_keys,
    read_pieces,
    repeated,
    sample_ids,
    sample_keys,
    split_entities,
)
from tasks.engine.partition import split_by_key
from tasks.io import storage
from tasks.io.hashing import stable_hash
from tasks.io.tensors import BoolArray, Int8Array, Int64Array, UInt64Array, ragged_array, tensor_array, to_numpy
from tasks.loader.samples import IMAGE, LABEL, SAMPLE_ID, SampleFormat, pick, write_samples
from tasks.quality.profile import TableProfile
from tasks.quality.rules import Figures, Written
from tasks.quality.sketch import TopValues
from tasks.store import layout
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation

NOT_READY = "not_training_ready"
REASON, FILE, ROW = "_reason", "_file", "_row"


@dataclass(slots=True, kw_only=True)
class UnitNote:
    """Result of the first look at a unit.

    Attributes:
        unit: Its number.
        rows: Rows read.
        filtered: Rows left out on purpose, by reason.
        rejected: Rows rejected, by reason.
        rejected_file: File of the rejected rows.
        samples: Rows that became samples, by split.
        label_columns: Columns that labels are made of.
        labels: Values of each of those that may be classes, by split.
        profile: Profile of the features, of those columns and of the weights, in the train split, until it is merged;
            of sequences of their lengths.
        elements: Elements of all values of any length that became samples: sequences, or bytes of encoded images.
        longest: Elements of the longest one.
    """

    unit: int
    rows: int
    filtered: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    rejected_file: FileEntry | None = None
    samples: Int64Array
    label_columns: tuple[str, ...]
    labels: dict[str, list[TopValues]]
    profile: TableProfile | None
    elements: int = 0
    longest: int = 0

    @property
    def left_out(self) -> int:
        """Number of rows that become no sample."""
        return self.filtered.total() + self.rejected.total()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Result of checking a part of the hashes: repeated keys by unit, entities by split, and those in several."""

    repeats: dict[int, Repeats] = field(default_factory=dict)
    entities: Int64Array = field(default_factory=lambda: np.zeros(len(SPLITS), np.int64))
    leaking: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenBucket:
    """A written file and its contents.

    Attributes:
        entry: The file.
        split: Number of its split.
        class_counts: Samples of each class, by class id; None without classes.
        duplicate_ids: Samples with the id of another sample.
    """

    entry: FileEntry
    split: int
    class_counts: Int64Array | None
    duplicate_ids: int


@dataclass(frozen=True, kw_only=True)
class CopyFigures(Figures):
    """Figures of a copy; the profile is of the source's features and of the label, in the train split.

    Attributes:
        definition: `manifest.definition`.
        samples: number of samples by split.
        class_counts: samples by split, then class; empty without classes.
        entities: distinct entities by split.
        leaking_entities: entities that are in several splits.
        repeated_keys: rows with the entity (and time) of an earlier row.
        duplicate_ids: samples with the id of another sample.
    """

    definition: dict[str, Any]
    samples: dict[str, int]
    class_counts: dict[str, dict[str, int]]
    entities: dict[str, int]
    leaking_entities: int
    repeated_keys: int
    duplicate_ids: int


@dataclass(frozen=True, kw_only=True)
class StreamingReady(CopyFigures, Written):
    """Result of writing a copy, before the commit; the files are in the order of their splits' samples."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Rows of a unit that become samples, with their splits and entities; and the other rows."""

    rows: pa.Table
    splits: Int8Array
    entities: UInt64Array
    read: int
    reasons: Counter[str]
    rejected: pa.Table


@dataclass(frozen=True, slots=True)
class Look:
    """The first look at all units; `parts` parts of the hashes are checked one by one."""

    config: DeliveryConfig
    source: Source
    reservation: Reservation
    units: tuple[Unit, ...]
    parts: int

    def scatter(self, index: int) -> tuple[UnitNote, list[pl.DataFrame]]:
        """Verify, read and judge a unit; return its note, and its keys and its entities in parts."""
        check_digests(self.units[index])
        # How long encoded images are decides how many samples a file has.
        columns = self.source.columns + ([IMAGE] if self.source.encoding else [])
        loaded = load(self.units[index], self.source, self.config, columns)
        note = note_of(index, loaded, self.source, self.config)
        if loaded.rejected.num_rows:
            uri = self.reservation.rejected_uri("rows", index)
            note.rejected_file = self.reservation.entry(storage.write_parquet(loaded.rejected, uri))
        keys = pl.DataFrame({"key": keys_of(loaded.rows, self.source), "row": np.arange(loaded.rows.num_rows)})
        entities = pl.DataFrame({"key": loaded.entities, "split": loaded.splits.astype(np.int64)}).unique()
        return note, [*split_by_key(keys, "key", self.parts), *split_by_key(entities, "key", self.parts)]

    def gather(self, part: int, frames: Mapping[int, pl.DataFrame]) -> tuple[Checked, pa.Table]:
        """Check a part of the keys, or, after those, of the entities; frames by unit."""
        rows = pl.concat(frames.values())
        hashes = rows["key"].to_numpy()
        if part < self.parts:
            units = np.repeat(list(frames), [len(frame) for frame in frames.values()])
            found = Checked(repeats=find_repeats(hashes, units, rows["row"].to_numpy()))
        else:
            entities, leaking = split_entities(hashes, rows["split"].to_numpy().astype(np.int8))
            found = Checked(entities=entities, leaking=leaking)
        return found, pa.table({})


@dataclass(frozen=True, slots=True)
class Bucket:
    """A planned file: a part of the range of random keys of a split."""

    split: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffle:
    """The second pass: encode all units, and gather the samples of each bucket."""

    config: DeliveryConfig
    source: Source
    reservation: Reservation
    units: tuple[Unit, ...]
    form: SampleFormat
    encoder: Encoder | None
    label: Label | LabelVector | None
    buckets: tuple[Bucket, ...]
    """Buckets by split, then part."""
    longest: int = 0
    """Elements of the longest value of any length: a sequence, or the bytes of an encoded image."""

    def scatter(self, repeats: Mapping[int, Repeats], index: int) -> tuple[int, list[pa.Table]]:
        """Return the number of a unit's samples, and the samples for each bucket.

        Args:
            repeats: Rows with keys of other rows, by unit.
            index: Number of the unit.
        """
        columns = self.source.columns + ([IMAGE] if self.source.image else [])
        loaded = load(self.units[index], self.source, self.config, columns)
        ids = sample_ids(keys_of(loaded.rows, self.source), repeats.get(index, Repeats()))
        samples = encode(loaded.rows, ids, self.form, self.encoder, self.label, self.source)
        number = bucket_numbers(self.buckets, loaded.splits, random_keys(ids, self.config.seed))
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(len(self.buckets) + 1))
        samples = pick([samples], order)
        return len(ids), [samples.slice(start, end - start) for start, end in pairwise(bounds.tolist())]

    def gather(self, number: int, frames: Mapping[int, pa.Table]) -> tuple[WrittenBucket | None, pa.Table]:
        """Write a bucket's samples by their random keys; nothing if there are none."""
        parts = list(frames.values())
        ids = np.concatenate([to_numpy(part, SAMPLE_ID) for part in parts])
        if not len(ids):
            return None, pa.table({})
        bucket = self.buckets[number]
        keys = random_keys(ids, self.config.seed)
        order = np.argsort(keys, kind="stable")
        uri = self.reservation.data_uri(bucket.part, layout.split_directory(SPLITS[bucket.split]))
        written = write_samples(uri, parts, order, self.form)
        counts = None
        if isinstance(self.label, Label) and self.label.kind == "class":
            labels = np.concatenate([to_numpy(part, LABEL) for part in parts])
            counts = np.bincount(labels, minlength=len(self.label.classes))
        made = WrittenBucket(
            entry=self.reservation.entry(written),
            split=bucket.split,
            class_counts=counts,
            duplicate_ids=repeated(keys[order]),  # the keys are a bijection of the ids
        )
        return made, pa.table({})


def encode(  # noqa: PLR0917 - rows, and what is known of their samples
    rows: pa.Table,
    ids: Int64Array,
    form: SampleFormat,
    encoder: Encoder | None,
    label: Label | LabelVector | None,
    source: Source,
) -> pa.Table:
    """Make samples of rows, a row each; of a column of sequences, or without an encoder of their images."""
    if source.sequence is not None:
        found = sequences(rows[source.sequence])
        columns = [ragged_array(found.values, np.cumsum([0, *found.lengths])), pa.array(found.lengths)]
    elif form.encoding is not None:
        encoded = rows[IMAGE].cast(pa.large_binary())
        columns = [encoded, pc.binary_length(encoded)]
    else:
        columns = [tensor_array(to_numpy(rows, IMAGE) if encoder is None else encoder.encode(rows))]
    if label is not None:
        made = label.encode_rows(rows)
        columns.append(tensor_array(made) if made.ndim > 1 else pa.array(made))
    if source.weight is not None:
        columns.append(pa.array(numbers(rows[source.weight])))
    return pa.Table.from_arrays([*columns, pa.array(ids)], schema=form.schema)


def note_of(unit: int, loaded: Loaded, source: Source, config: DeliveryConfig) -> UnitNote:
    """Return the note on a unit's rows after the first look."""
    columns = label_columns(loaded.rows, source.targets)
    labels, labelled = {}, tuple(columns)
    for name, column in columns.items():
        counts = [
            label_counts(column.filter(pa.array(loaded.splits == split)), config.target_kind)
            for split in range(len(SPLITS))
        ]
        if found := [values for values in counts if values is not None]:
            labels[name] = found
    lengths = np.zeros(loaded.rows.num_rows, np.int64)
    if source.sequence is not None:
        lengths = sequences(loaded.rows[source.sequence]).lengths
        columns[length_name(source.sequence)] = pa.chunked_array([lengths])
    elif source.encoding is not None and IMAGE in loaded.rows.column_names:
        lengths = pc.fill_null(pc.binary_length(loaded.rows[IMAGE]), 0).to_numpy().astype(np.int64)
    weights = {} if source.weight is None else {source.weight: loaded.rows[source.weight]}
    profiled = pa.table({**{name: loaded.rows[name] for name in source.features}, **columns, **weights})
    return UnitNote(
        unit=unit,
        rows=loaded.read,
        filtered=Counter({NOT_READY: loaded.reasons[NOT_READY]} if loaded.reasons[NOT_READY] else {}),
        rejected=Counter({reason: rows for reason, rows in loaded.reasons.items() if reason != NOT_READY}),
        samples=np.bincount(loaded.splits, minlength=len(SPLITS)),
        label_columns=labelled,
        labels=labels,
        profile=profile_features(profiled, profiled.column_names, loaded.splits == 0),
        elements=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
    )


def keys_of(rows: pa.Table, source: Source) -> UInt64Array:
    """Return the key of each row."""
    return sample_keys([rows[name] for name in source.keys])


def plan_buckets(samples: Int64Array, form: SampleFormat, file_bytes: float) -> tuple[Bucket, ...]:
    """Return as many buckets a split as its samples need: the same on any cluster."""
    a_file = max(1, int(file_bytes // form.sample_bytes))
    parts = [-(-int(count) // a_file) for count in samples]
    return tuple(Bucket(split, part, count) for split, count in enumerate(parts) for part in range(count))


def bucket_numbers(buckets: Sequence[Bucket], splits: Int8Array, keys: UInt64Array) -> Int64Array:
    """Return the number of the bucket of each sample, by its split and random key."""
    numbers = np.empty(len(keys), np.int64)
    firsts = {bucket.split: number for number, bucket in enumerate(buckets) if bucket.part == 0}
    for split, first in firsts.items():
        own = splits == split
        numbers[own] = first + bucket_of(keys[own], buckets[first].parts)
    return numbers


def load(unit: Unit, source: Source, config: DeliveryConfig, columns: Sequence[str]) -> Loaded:
    """Read a unit, judge its rows, and assign a split to each valid one.

    Args:
        unit: The unit.
        source: The unit's source.
        config: Selection of rows; shares and seed of the splits.
        columns: Columns to read, at least `source.columns`.
    """
    tables, splits, places = [], [], []
    for file, table in read_pieces(unit, columns):
        tables.append(table.select(columns))
        splits.append(np.full(table.num_rows, -1 if file.split is None else file.split, np.int8))
        places.append((file, table.num_rows))
    rows = pa.concat_tables(tables)
    codes, reasons = judge(rows, source, config)
    rejected = _rejected_rows(rows, codes, reasons, unit, source)
    return admit(rows, np.concatenate(splits), (codes, reasons), source, config, rejected=rejected)


def admit(
    rows: pa.Table,
    given: Int8Array,
    judged: tuple[npt.NDArray[np.int16], list[str]],
    source: Source,
    config: DeliveryConfig,
    *,
    rejected: pa.Table,
) -> Loaded:
    """Return the valid rows, each with its split.

    Args:
        rows: The rows.
        given: Splits of the rows, -1 where the entity draws one.
        judged: Result of `judge`.
        source: Source of the rows.
        config: Shares and seed of the splits.
        rejected: The rejected rows, as they are kept.
    """
    codes, reasons = judged
    counts = Counter({reasons[code]: int(count) for code, count in enumerate(np.bincount(codes)) if code and count})
    good = codes == 0
    kept = rows if good.all() else rows.filter(pa.array(good))
    entities = stable_hash(kept[source.entity])
    found = given[good]
    drawn = entity_splits(entities, config.seed, config.validation_share, config.test_share)
    return Loaded(kept, np.where(found < 0, drawn, found), entities, rows.num_rows, counts, rejected)


def judge(rows: pa.Table, source: Source, config: DeliveryConfig) -> tuple[npt.NDArray[np.int16], list[str]]:
    """Return why each row is left out, as an index into the reasons; 0 means not. The first reason counts."""
    codes, reasons = np.zeros(rows.num_rows, np.int16), [""]

    def mark(bad: BoolArray, reason: str) -> None:
        codes[bad & (codes == 0)] = len(reasons)
        reasons.append(reason)

    if source.ready is not None:
        mark(~pc.fill_null(rows[source.ready], False).to_numpy(), NOT_READY)
    for name in dict.fromkeys([source.entity, source.keys[0]]):
        mark(rows[name].is_null(nan_is_null=True).to_numpy(), f"null_{name}")
    for name in source.targets:
        mark(is_missing(rows[name]), f"null_{name}")
    if source.weight is not None:
        mark(is_missing(rows[source.weight]), f"null_{source.weight}")
        mark(numbers(rows[source.weight]) < 0, f"negative_{source.weight}")
    if source.sequence is not None:
        found = sequences(rows[source.sequence])
        mark(found.missing, f"null_{source.sequence}")
        mark(found.lengths == 0, f"empty_{source.sequence}")
    if config.nulls == "reject":
        for name in source.features:
            mark(is_missing(rows[name]), f"null_{name}")
    return codes, reasons


def _rejected_rows(
    rows: pa.Table, codes: npt.NDArray[np.int16], reasons: Sequence[str], unit: Unit, source: Source
) -> pa.Table:
    """Return the rejected rows unchanged, with the reason and their place; without images."""
    filtered = reasons.index(NOT_READY) if NOT_READY in reasons else 0
    rejected = np.flatnonzero((codes > 0) & (codes != filtered))
    table = rows.select(source.columns).take(pa.array(rejected))
    files, numbers = places_of(unit, rejected)
    added = {
        REASON: pa.array([reasons[code] for code in codes[rejected]], pa.string()),
        FILE: pa.array(files, pa.string()),
        ROW: pa.array(numbers),
    }
    for name, values in added.items():
        table = table.append_column(name, values)
    return table


def places_of(unit: Unit, rows: Int64Array) -> tuple[list[str], Int64Array]:
    """Return the file of some rows of a unit, and their numbers in it."""
    counts = [sum(file.row_groups[group] for group in groups) for file, groups in unit.pieces]
    before = [sum(file.row_groups[: groups[0]]) for file, groups in unit.pieces]
    starts = np.cumsum([0, *counts])
    piece = np.searchsorted(starts, rows, side="right") - 1
    return [unit.pieces[p][0].uri for p in piece.tolist()], rows - starts[piece] + np.array(before, np.int64)[piece]
