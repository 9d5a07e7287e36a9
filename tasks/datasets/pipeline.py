"""The job that writes a Ray Dataset as a version: its blocks never leave the workers.

    dataset ─ write_datasink ─ files, rejected rows, digests of the content ─┐
                files ─ read again: profile, digests of the content ─────────┴─ compared

Nothing here is visible to readers until the version is committed.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.block import BlockAccessor

from tasks.datasets.config import DatasetConfig
from tasks.datasets.mds import read_index, read_shard
from tasks.datasets.rows import Content, Form, added_up, content_of, empty, form_of, make_rows
from tasks.engine.cluster import LOST_WORKER_RETRIES, data_context, losses_explained
from tasks.engine.jobs import Parts, in_blocks, mapped, original_errors
from tasks.io import storage
from tasks.io.errors import BalanceError, ConfigError
from tasks.quality.profile import TableProfile, added, profile_table
from tasks.quality.rules import Written
from tasks.store import layout
from tasks.store.manifest import FileEntry, RowBalance, check_equal
from tasks.store.reservation import Reservation

HEAD_ROWS = 1000
"""First rows of a dataset, whose columns are those of the version."""

WRITE_BYTES = 64 * 2**20
"""Least size in memory of the blocks that become one file."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class DatasetWritten:
    """Result of the job: the version before its commit, and its definition."""

    written: Written
    definition: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows that one task has read, the rejected ones by reason, the digest of the others, and its files."""

    rows: int
    reasons: Counter[str]
    content: Content
    file: FileEntry | None = None
    rejected: FileEntry | None = None


class _VersionFiles(ray.data.Datasink[_Part]):
    """Sink of Ray Data that writes the blocks of a task to a file of a version, piece by piece.

    Without a reservation it writes nothing, and digests the rows.
    """

    def __init__(self, form: Form, reservation: Reservation | None) -> None:
        self._form = form
        self._reservation = reservation
        self.rows = 0
        self.parts: list[_Part] = []

    @property
    def min_bytes_per_write(self) -> int:
        """Least size of a task's input, bytes."""
        return WRITE_BYTES

    def write(self, blocks: Iterable[Any], ctx: Any) -> _Part:
        """Write the blocks of a task; a repeated task writes the same files."""
        form, held = self._form, self._reservation
        rows, reasons = 0, Counter[str]()
        contents: list[Content] = []
        rejected: list[pa.Table] = []
        file: FileEntry | None = None
        kept_apart: FileEntry | None = None
        stream: storage.ParquetStream | None = None
        with contextlib.ExitStack() as stack:
            for made in (make_rows(piece, form) for block in blocks for piece in _pieces(block, form)):
                rows += made.rows.num_rows + made.rejected.num_rows
                reasons += made.reasons
                rejected += [made.rejected] if made.rejected.num_rows else []
                contents.append(content_of(made.rows[form.key]))
                if made.rows.num_rows and held is not None:
                    if stream is None:
                        uri = held.data_uri(ctx.task_idx)
                        stream = stack.enter_context(storage.ParquetStream(uri, form.schema, **form.settings))
                    stream.write(made.rows)
        if held is not None:
            file = held.entry(stream.written) if stream is not None else None
            if rejected:
                uri = held.rejected_uri("rows", ctx.task_idx)
                kept_apart = held.entry(storage.write_parquet(pa.concat_tables(rejected), uri))
        return _Part(rows, reasons, added_up(contents), file, kept_apart)

    def on_write_complete(self, write_result: Any) -> None:
        """Keep what the tasks have said; Ray has counted the rows, too."""
        self.rows, self.parts = int(write_result.num_rows), list(write_result.write_returns)


def _pieces(block: Any, form: Form) -> Iterator[pa.Table]:
    """Yield the rows of a block; those of images in row groups, as a file may be much smaller than its pixels."""
    table = BlockAccessor.for_block(block).to_arrow()
    step = form.settings.get("row_group_size", max(table.num_rows, 1))
    for start in range(0, table.num_rows, step):
        yield table.slice(start, step)


def _run(dataset: ray.data.Dataset, form: Form, reservation: Reservation | None) -> _VersionFiles:
    """Send a dataset's blocks to a sink, by Ray's workers, with the dataset's own settings."""
    sink = _VersionFiles(form, reservation)
    with original_errors(), losses_explained(form.config.less_at_once), data_context():
        dataset.write_datasink(sink, ray_remote_args={"max_retries": LOST_WORKER_RETRIES})
    check_equal(form.config.name, sink.rows, sum(part.rows for part in sink.parts), "came from Ray, {} were read")
    return sink


def read_mds(uri: str) -> ray.data.Dataset:
    """Read an MDS directory, MosaicML Streaming's format, as a Ray Dataset.

    Each shard is read by a task, and compared with the index's size and hashes.

    Images (jpeg, png, pil) are the bytes of files, arrays are tensors, JSON is text.

    Args:
        uri: The directory with index.json, local or s3://bucket/prefix.

    Raises:
        SourceError: it has no index of MDS, no sample, or a column or a compression that can't be read.
        CorruptVersion: (within Ray's error) a shard is missing, or isn't the one of the index.
    """
    shards = read_index(uri)

    def read(rows: pa.Table) -> Iterator[pa.Table]:
        for number in rows["shard"].to_pylist():
            yield read_shard(uri, shards[number])

    numbers = pa.table({"shard": [number for number, shard in enumerate(shards) if shard.samples]})
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "max_retries": LOST_WORKER_RETRIES}
    with data_context():
        return in_blocks(numbers).map_batches(read, **options)


def check_dataset(dataset: Any) -> None:
    """Check that a Ray Dataset is given, and that Ray runs.

    Raises:
        ConfigError: it is something else, or Ray doesn't run.
    """
    if not isinstance(dataset, ray.data.Dataset):
        raise ConfigError(
            f"dataset is a {type(dataset).__name__}, no Ray Dataset: make one of it, such as by ray.data.from_pandas, "
            "ray.data.from_arrow or ray.data.read_parquet"
        )
    if not ray.is_initialized():
        raise ConfigError(
            "Ray isn't running in this process, and a Ray Dataset lives in its Ray: call ray.init() first, make the "
            "dataset then, and publish it before ray.shutdown()"
        )


def find_form(dataset: ray.data.Dataset, config: DatasetConfig) -> Form:
    """Return the columns of a version of a dataset, from its first rows; runs the beginning of its pipeline.

    Raises:
        ConfigError, SourceError: as `rows.form_of`.
        SourceError: the dataset is empty.
    """
    with original_errors(), losses_explained(config.less_at_once), data_context():
        head = dataset.limit(HEAD_ROWS)
        batches: Iterator[Any] = iter(head.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        table = next(batches, None)
    if table is None or not table.num_rows:
        raise empty(config.name)
    return form_of(table, config)


def find_content(dataset: ray.data.Dataset, form: Form) -> tuple[int, Content]:
    """Return the number of a dataset's rows, and the digest of those that would be published; runs its pipeline.

    Raises:
        SourceError: blocks differ in their columns.
    """
    sink = _run(dataset, form, None)
    return sink.rows, added_up([part.content for part in sink.parts])


def write_dataset(
    dataset: ray.data.Dataset, form: Form, reservation: Reservation, *, on_rows: Progress = lambda _: None
) -> DatasetWritten:
    """Write a Ray Dataset under a reservation, by Ray's workers, with its own settings.

    Args:
        dataset: The dataset.
        form: Result of `find_form`.
        reservation: Where to write.
        on_rows: Called with numbers of rows as they are read again.

    Raises:
        BalanceError: rows were lost or doubled on the way.
        SourceError: blocks differ in their columns, or no row is left.
        ResourceError: memory or disk are too small; it says what to do.
    """
    config, started = form.config, time.monotonic()
    sink = _run(dataset, form, reservation)
    parts = sink.parts
    wrote = time.monotonic()
    reasons = sum((part.reasons for part in parts), Counter[str]())
    files = sorted((part.file for part in parts if part.file is not None), key=lambda file: file.path)
    if not sink.rows:
        raise empty(config.name)
    balance = RowBalance(
        name=config.name,
        rows_in=sink.rows,
        rows_out=sum(file.rows for file in files),
        rejected=dict(sorted(reasons.items())),
    )
    balance.check()
    profile = profile_table(_profiled(form.schema.empty_table(), form))
    contents: list[Content] = []
    with losses_explained(config.less_at_once):
        reread = partial(_read_again, form=form)
        uris = [layout.join(reservation.uri, file.path) for file in files]
        for own, content in mapped(Parts(len(uris), values=uris), reread, name="read again"):
            profile = added(profile, own)
            contents.append(content)
            on_rows(content[0])
    content = added_up([part.content for part in parts])
    if content != (stored := added_up(contents)):
        raise BalanceError(f"{config.name}: rows of digest {content} were written, and {stored} are in the files")
    written = Written(
        reservation=reservation,
        files=tuple(files),
        rejected_files=tuple(part.rejected for part in parts if part.rejected is not None),
        schema=form.schema,
        profile=profile,
        balances=(balance,),
        timings={"write": wrote - started, "read again": time.monotonic() - wrote},
    )
    return DatasetWritten(written, form.define(content))


def _read_again(_: int, uri: str, form: Form) -> tuple[TableProfile, Content]:
    """Profile a stored file, and digest its rows, one row group at a time."""
    profile = profile_table(_profiled(form.schema.empty_table(), form))
    contents = []
    with storage.open_input(uri) as source:
        file = pq.ParquetFile(source)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=[form.key, *form.given.names], use_threads=False)
            profile = added(profile, profile_table(_profiled(rows, form)))
            contents.append(content_of(rows[form.key]))
    return profile, added_up(contents)


def _profiled(rows: pa.Table, form: Form) -> pa.Table:
    """Return the columns that are profiled: neither images nor ids."""
    return rows.select(form.given.names)
