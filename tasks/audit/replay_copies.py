"""Samples of a streaming-ready copy made again from its source version: order, ids, labels and values.

All rows of the source are looked at for their ids and splits, since these decide which sample stands where: about
thirty bytes a row are held. Only the rows of the samples that were asked for are encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from tasks.audit.replay_causes import input_version, why_not
from tasks.audit.replay_rows import (
    Answer,
    Cause,
    Difference,
    Replayed,
    StoredFiles,
    Unreadable,
    by_file,
    choose,
    differences,
    missing,
    placed,
)
from tasks.audit.replay_tables import causes_of, config_of
from tasks.core import layout
from tasks.core.errors import PipelineError, SourceError
from tasks.core.manifest import FileEntry, Manifest
from tasks.core.tensors import is_tensor, tensor_array, to_numpy
from tasks.delivery.blocks import CHECKSUM, IMAGE, BlockFormat, Samples, block_table
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.encoding import Encoder, Feature
from tasks.delivery.keys import SPLITS, Repeats, bucket_of, find_repeats, random_keys, sample_ids, sample_keys
from tasks.delivery.label import Label
from tasks.delivery.source import Source, Unit, read_units, source_of
from tasks.delivery.stages import load, plan_buckets

IntArray = npt.NDArray[np.int64]


def replay_copy(root: str, manifest: Manifest, sample: int, seed: int) -> Answer:
    """Make the blocks of some samples of a streaming-ready copy again, and compare the samples and their blocks.

    Args:
        root: Root of the store.
        manifest: The copy's.
        sample: Number of samples.
        seed: Decides which.

    Raises:
        ConfigError: this code can't use the version's configuration.
        CorruptVersion: a stored file has the right digest and can't be read.

    """
    stored = StoredFiles(layout.version_uri(root, manifest.dataset, manifest.version))
    counts = {path: int(count) for path, count in manifest.definition["file_samples"].items()}
    size = int(manifest.definition["block_size"])
    chosen = by_file(
        [(entry, counts[entry.path]) for entry in manifest.files], choose(sum(counts.values()), sample, seed)
    )
    blocks = {entry.path: np.unique(numbers // size) for entry, numbers in chosen}
    causes: list[Cause] = []
    made: dict[str, pa.Table] = {}
    try:
        made = _Again(root, manifest, causes).blocks(blocks)
    except (PipelineError, OSError) as fault:
        causes.append(why_not(fault))
    replayed: list[Replayed] = []
    for entry, numbers in chosen:
        replayed += _compare(stored, entry, numbers, size=size, blocks=blocks[entry.path], made=made.get(entry.path))
    return Answer(
        unit="sample",
        total=sum(counts.values()),
        replayed=tuple(replayed),
        causes=tuple(causes),
        altered=stored.altered,
    )


def _compare(
    stored: StoredFiles, entry: FileEntry, numbers: IntArray, *, size: int, blocks: IntArray, made: pa.Table | None
) -> list[Replayed]:
    """Compare some samples of one file, and the blocks that they stand in.

    Args:
        stored: The version's files.
        entry: The file.
        numbers: Samples, by their number in the file.
        size: Samples of a block.
        blocks: Numbers of the blocks that have them.
        made: These blocks, made again, as far as there are so many now.

    """
    names = [f"{entry.path} sample {number}" for number in numbers.tolist()]
    try:
        table = stored.read(entry, blocks)
    except Unreadable as fault:
        return [missing(name, entry, fault.cause) for name in names]
    rows = np.searchsorted(blocks, numbers // size)
    before = _samples(table, rows, numbers % size, size)
    there = np.zeros(0, np.bool_) if made is None else rows < made.num_rows
    now = before.slice(0, 0) if made is None else _samples(made, rows[there], (numbers % size)[there], size)
    places = placed(range(len(names)), np.flatnonzero(there).tolist())
    found = differences(before, now, places)
    checked = [_own_checksum(table, row) for row in range(table.num_rows)]
    return [
        Replayed(name=name, file=entry.path, differences=(*own, *checked[row]), causes=causes_of(stored, entry))
        for name, own, row in zip(names, found, rows.tolist(), strict=True)
    ]


def _samples(blocks: pa.Table, rows: IntArray, within: IntArray, size: int) -> pa.Table:
    """Some samples of blocks, with what is said of their blocks; a tensor is its bytes."""
    columns: dict[str, pa.Array] = {}
    for field in blocks.schema:
        if not is_tensor(field):
            columns[field.name] = blocks[field.name].take(pa.array(rows))
            continue
        values = to_numpy(blocks, field.name)
        own = values.reshape(blocks.num_rows, size, *values.shape[1 if size == 1 and field.name == IMAGE else 2 :])
        picked = own[rows, within]
        columns[field.name] = pa.array(picked) if picked.ndim == 1 else tensor_array(picked)
    return pa.table(columns)


def _own_checksum(blocks: pa.Table, row: int) -> tuple[Difference, ...]:
    """Whether a stored block has another checksum than the one that stands beside it."""
    hasher = xxhash.xxh3_128()
    for field in blocks.schema:
        if is_tensor(field):
            hasher.update(blocks[field.name][row].as_py())
    noted = blocks[CHECKSUM][row].as_py()
    return () if noted == hasher.hexdigest() else (Difference(f"{CHECKSUM} of the block", noted, hasher.hexdigest()),)


class _Again:
    """The samples of one copy, made again; what is otherwise than it was gathers on the way."""

    def __init__(self, root: str, manifest: Manifest, causes: list[Cause]) -> None:
        self._causes = causes
        [record] = manifest.inputs
        source, found = input_version(root, record)
        causes += found
        if source is None:
            raise SourceError(f"the version that it was made from, {record.name} v{record.version}, can't be read")
        self._config = config_of(DeliveryConfig, manifest, root=root)
        self._source = source_of(self._config, root, source)
        self._units = tuple(read_units(self._source))
        self._files = StoredFiles(layout.version_uri(root, source.dataset, source.version))
        self._entries = {entry.path: entry for entry in source.files}
        self._starts = np.zeros(1, np.int64)
        self._ids = np.empty(0, np.int64)
        self._form, self._encoder, self._label = _encoding(manifest.definition, self._source)

    def blocks(self, wanted: Mapping[str, IntArray]) -> dict[str, pa.Table]:
        """The blocks of some numbers of each file, as far as there are so many."""
        order = self._order()
        size = self._form.block_size
        rows: dict[str, list[IntArray]] = {}
        for path, numbers in wanted.items():
            own = order.get(_place_of(path), np.empty(0, np.int64))
            found = [own[number * size : (number + 1) * size] for number in numbers.tolist()]
            rows[path] = [block for block in found if len(block)]
        every = [block for blocks in rows.values() for block in blocks]
        needed = np.unique(np.concatenate(every)) if every else np.empty(0, np.int64)
        samples = self._encoded(needed)
        return {
            path: pa.concat_tables(
                [
                    self._form.schema.empty_table(),
                    *(block_table(samples.take(np.searchsorted(needed, block)), self._form) for block in blocks),
                ]
            )
            for path, blocks in rows.items()
        }

    def _order(self) -> dict[tuple[str, int], IntArray]:
        """Rows of the source that become samples, by split and file, in the order of their samples.

        Rows are numbered through all units, those alone that are kept.
        """
        keys, splits = [], []
        for unit in self._units:
            loaded = load(unit, self._source, self._config, self._source.columns)
            keys.append(sample_keys([loaded.rows[name] for name in self._source.keys]))
            splits.append(loaded.splits)
        self._starts = np.concatenate([[0], np.cumsum([len(own) for own in keys])]).astype(np.int64)
        self._ids = _ids_of(keys)
        split_of = np.concatenate(splits)
        drawn = random_keys(self._ids, self._config.seed)
        counts = np.bincount(split_of, minlength=len(SPLITS))
        found = {}
        for bucket in plan_buckets(counts, self._form, self._config.file_megabytes * (1 << 20)):
            own = np.flatnonzero(split_of == bucket.split)
            own = own[bucket_of(drawn[own], bucket.parts) == bucket.part]
            found[SPLITS[bucket.split], bucket.part] = own[np.argsort(drawn[own], kind="stable")]
        return found

    def _encoded(self, rows: IntArray) -> Samples:
        """Some rows, ascending, as samples."""
        unit_of = np.searchsorted(self._starts, rows, side="right") - 1
        columns = self._source.columns + ([IMAGE] if self._source.image else [])
        parts = []
        for number in np.unique(unit_of).tolist():
            self._check(self._units[number])
            loaded = load(self._units[number], self._source, self._config, columns)
            own = loaded.rows.take(pa.array(rows[unit_of == number] - self._starts[number]))
            label = None if self._label is None else self._label.encode(own[self._label.column])
            values = to_numpy(own, IMAGE) if self._encoder is None else self._encoder.encode(own)
            parts.append(Samples(values, label, self._ids[rows[unit_of == number]]))
        labels = [part.labels for part in parts if part.labels is not None]
        return Samples(
            np.concatenate([part.values for part in parts]) if parts else np.empty((0, *self._form.shape)),
            np.concatenate(labels) if labels else None,
            self._ids[rows],
        )

    def _check(self, unit: Unit) -> None:
        """Compare the files of a unit with the source version's manifest."""
        for file, _ in unit.pieces:
            path = file.uri.removeprefix(f"{self._files.base}/")
            if (cause := self._files.check(self._entries[path])) is not None:
                text = f"of the input {self._source.manifest.dataset} v{self._source.manifest.version}, {cause.text}"
                self._causes += [one for one in [Cause("input", text)] if one not in self._causes]


def _ids_of(keys: Sequence[npt.NDArray[np.uint64]]) -> IntArray:
    """Ids of the samples of all units, those of repeated keys told apart as the copy does."""
    units = np.repeat(np.arange(len(keys)), [len(own) for own in keys])
    rows = np.concatenate([np.arange(len(own)) for own in keys])
    repeats = find_repeats(np.concatenate(keys), units, rows)
    return np.concatenate([sample_ids(own, repeats.get(unit, Repeats())) for unit, own in enumerate(keys)])


def _place_of(path: str) -> tuple[str, int]:
    """Split and number of a data file."""
    number = layout.part_number(path)
    assert number is not None, f"{path} isn't named as a part"
    return path.partition("/")[0].removeprefix("split="), number


def _encoding(definition: Mapping[str, Any], source: Source) -> tuple[BlockFormat, Encoder | None, Label | None]:
    """How samples were made, as the definition says."""
    label = _label(definition["label"], source)
    if definition["kind"] == "table":
        features = tuple(Feature(**described) for described in definition["features"])
        encoder: Encoder | None = Encoder(features)
        shape: tuple[int, ...] = (len(features),)
    else:
        encoder, shape = None, tuple(definition["image"]["shape"])
    form = BlockFormat(
        kind=definition["kind"],
        shape=shape,
        label=label.dtype if label else None,
        block_size=int(definition["block_size"]),
    )
    return form, encoder, label


def _label(described: Mapping[str, Any] | None, source: Source) -> Label | None:
    if described is None:
        return None
    if described["kind"] == "number":
        return Label(column=described["column"], kind="number", mean=described["mean"], std=described["std"])
    classes = tuple(described["classes"])
    # Where the source numbers its classes itself, the column holds the numbers.
    values = classes if source.classes is None else tuple(map(str, range(len(classes))))
    return Label(column=described["column"], kind="class", values=values, classes=classes)
