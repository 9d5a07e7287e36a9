"""Samples of a streaming-ready copy made again from its source version: order, ids, labels and values.

All rows of the source are read for their ids and splits, since these decide the place of each sample: about thirty
bytes a row are held. Only the rows of the requested samples are encoded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.audit.inputs import input_version, why_not
from tasks.audit.replay_rows import (
    Again,
    Difference,
    IntArray,
    Replayed,
    StoredFiles,
    Unreadable,
    by_file,
    differences,
    missing,
    placed,
)
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import block_format, encoder_of, label_of
from tasks.delivery.keys import SPLITS, Repeats, bucket_of, find_repeats, random_keys, sample_ids
from tasks.delivery.shuffle import encode, keys_of, load, plan_buckets
from tasks.delivery.source import read_units, source_of
from tasks.io.errors import PipelineError, SourceError
from tasks.io.tensors import is_tensor, tensor_array, to_numpy
from tasks.loader.blocks import CHECKSUM, IMAGE, Samples, block_checksums, block_table, pick
from tasks.store import layout
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.settings import config_of


class CopyAgain(Again):
    """The samples of one copy, to be made again with their blocks."""

    unit = "sample"

    def __init__(self, root: str, manifest: Manifest) -> None:
        super().__init__(root, manifest)
        self._counts = {path: int(count) for path, count in manifest.definition["file_samples"].items()}
        self._form, self._encoder = block_format(manifest), encoder_of(manifest)

    @property
    def total(self) -> int:
        """Number of samples."""
        return sum(self._counts.values())

    def replay(self, chosen: IntArray) -> list[Replayed]:
        """Make the blocks of some samples again, and compare the samples and their blocks."""
        files = by_file([(entry, self._counts[entry.path]) for entry in self.manifest.files], chosen)
        size = self._form.block_size
        blocks = {entry.path: np.unique(numbers // size) for entry, numbers in files}
        made: dict[str, pa.Table] = {}
        try:
            made = self._blocks(blocks)
        except (PipelineError, OSError) as fault:
            self.causes.append(why_not(fault))
        replayed: list[Replayed] = []
        for entry, numbers in files:
            own, again = blocks[entry.path], made.get(entry.path)
            replayed += _compare(self.stored, entry, numbers, size=size, blocks=own, made=again)
        return replayed

    def _blocks(self, wanted: Mapping[str, IntArray]) -> dict[str, pa.Table]:
        """Make the blocks of some numbers of each file, if there are as many."""
        [record] = self.manifest.inputs
        version = input_version(self.root, record, self.causes)
        if version is None:
            raise SourceError(f"the version that it was made from, {record.name} v{record.version}, can't be read")
        self._config = config_of(DeliveryConfig, self.manifest, root=self.root)
        self._source = source_of(self._config, self.root, version)
        self._units = tuple(read_units(self._source))
        keys, splits = [], []
        for unit in self._units:
            loaded = load(unit, self._source, self._config, self._source.columns)
            keys.append(keys_of(loaded.rows, self._source))
            splits.append(loaded.splits)
        units = np.repeat(np.arange(len(keys)), [len(own) for own in keys])
        repeats = find_repeats(np.concatenate(keys), units, np.concatenate([np.arange(len(own)) for own in keys]))
        ids = [sample_ids(own, repeats.get(unit, Repeats())) for unit, own in enumerate(keys)]
        order = self._order(np.concatenate(ids), np.concatenate(splits))
        size = self._form.block_size
        blocks: dict[str, list[IntArray]] = {}
        for path, numbers in wanted.items():
            own = order.get(_place_of(path), np.empty(0, np.int64))
            found = [own[number * size : (number + 1) * size] for number in numbers.tolist()]
            blocks[path] = [block for block in found if len(block)]
        every = [block for own in blocks.values() for block in own]
        if not every:
            return {path: self._form.schema.empty_table() for path in wanted}
        needed = np.unique(np.concatenate(every))
        samples = self._encoded(needed, ids)
        return {
            path: pa.concat_tables(
                [
                    self._form.schema.empty_table(),
                    *(block_table(pick(samples, np.searchsorted(needed, block)), self._form) for block in own),
                ]
            )
            for path, own in blocks.items()
        }

    def _order(self, ids: IntArray, splits: npt.NDArray[np.int8]) -> dict[tuple[str, int], IntArray]:
        """Return rows of the source that become samples, by split and file, in the order of their samples.

        Rows are numbered through all units, counting only kept ones.
        """
        drawn = random_keys(ids, self._config.seed)
        counts = np.bincount(splits, minlength=len(SPLITS))
        found = {}
        for bucket in plan_buckets(counts, self._form, self._config.file_megabytes * (1 << 20)):
            own = np.flatnonzero(splits == bucket.split)
            own = own[bucket_of(drawn[own], bucket.parts) == bucket.part]
            found[SPLITS[bucket.split], bucket.part] = own[np.argsort(drawn[own], kind="stable")]
        return found

    def _encoded(self, rows: IntArray, ids: list[IntArray]) -> list[Samples]:
        """Make samples of some rows, ascending, from their units."""
        starts = np.cumsum([0, *(len(own) for own in ids)])
        unit_of = np.searchsorted(starts, rows, side="right") - 1
        columns = self._source.columns + ([IMAGE] if self._source.image else [])
        version = self._source.manifest
        files = StoredFiles(self.root, version, f"of the input {version.dataset} v{version.version}, ")
        entries = {layout.join(files.base, entry.path): entry for entry in version.files}
        label = label_of(self.manifest, numbered=self._source.classes is not None)
        parts = []
        for number in np.unique(unit_of).tolist():
            for file, _ in self._units[number].pieces:
                found = files.check(entries[file.uri])
                self.causes += [cause for cause in found if cause not in self.causes]
            loaded = load(self._units[number], self._source, self._config, columns)
            own = rows[unit_of == number] - starts[number]
            parts.append(encode(loaded.rows.take(pa.array(own)), ids[number][own], self._encoder, label))
        return parts


def _compare(
    stored: StoredFiles, entry: FileEntry, numbers: IntArray, *, size: int, blocks: IntArray, made: pa.Table | None
) -> list[Replayed]:
    """Compare some samples of one file, and their blocks.

    Args:
        stored: The version's files.
        entry: The file.
        numbers: Samples, by their number in the file.
        size: Samples of a block.
        blocks: Numbers of their blocks.
        made: These blocks, made again, if there are as many now.

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
    found = differences(before, now, placed(range(len(names)), np.flatnonzero(there).tolist()))
    checksums = zip(table[CHECKSUM].to_pylist(), block_checksums(table), strict=True)
    of_block = [
        () if noted == own else (Difference(f"{CHECKSUM} of the block", noted, own),) for noted, own in checksums
    ]
    return [
        Replayed(name=name, file=entry.path, differences=(*own, *of_block[row]), causes=stored.check(entry))
        for name, own, row in zip(names, found, rows.tolist(), strict=True)
    ]


def _samples(blocks: pa.Table, rows: IntArray, within: IntArray, size: int) -> pa.Table:
    """Return some samples of blocks, with the numbers of their blocks; a tensor is its bytes."""
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


def _place_of(path: str) -> tuple[str, int]:
    """Return split and number of a data file."""
    number = layout.part_number(path)
    assert number is not None, f"{path} isn't named as a part"
    return path.partition("/")[0].removeprefix("split="), number
