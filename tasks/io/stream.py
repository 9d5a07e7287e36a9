"""Parquet files written piece by piece, in the memory of one page, locally and on S3."""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.io.digests import Digest
from tasks.io.disk import NewFile, put_in_place, temporary_name
from tasks.io.location import is_s3, normalise, s3_filesystem
from tasks.io.refusal import refusals_explained
from tasks.io.storage import WrittenFile, no_bucket, parquet_options


class ParquetStream:
    """Writer of one Parquet file piece by piece, in memory of a page: each table becomes a row group (or several).

    A context manager. The whole file appears under its name when the block succeeds; a block that fails leaves nothing.
    Afterwards `written` describes the file.

    Args:
        uri: Name of the file.
        schema: Schema of the tables to come.
        settings: As `write_parquet`'s.

    """

    def __init__(self, uri: str, schema: pa.Schema, **settings: Any) -> None:
        self._uri = normalise(uri)
        self._sink: _Sink = _S3Sink(self._uri) if is_s3(self._uri) else _LocalSink(self._uri)
        options = parquet_options(settings)
        self._row_group_size = options.pop("row_group_size")
        self._rows = 0
        self._written: WrittenFile | None = None
        try:
            self._writer = pq.ParquetWriter(pa.PythonFile(self._sink, mode="w"), schema, **options)
        except BaseException:
            self._sink.discard()
            raise

    def write(self, table: pa.Table) -> None:
        """Append a table's rows."""
        self._writer.write_table(table, row_group_size=self._row_group_size)
        self._rows += table.num_rows

    @property
    def written(self) -> WrittenFile:
        """Rows, bytes and digest of the whole file."""
        assert self._written is not None, "the file isn't finished"
        return self._written

    def __enter__(self) -> ParquetStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with contextlib.suppress(Exception):  # report the first error
                self._writer.close()
            self._sink.discard()
            return
        try:
            self._writer.close()
            self._sink.commit()
        except BaseException:
            self._sink.discard()
            raise
        self._written = WrittenFile(self._uri, self._rows, self._sink.bytes, str(self._sink.digest))


class _Sink:
    """File object for pyarrow that counts and hashes a stream's bytes on their way."""

    closed = False

    def __init__(self) -> None:
        self.bytes = 0
        self.digest = Digest()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._append(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """Do nothing: pyarrow calls it, but `commit` or `discard` end the file."""

    def _append(self, data: bytes) -> None:
        raise NotImplementedError

    def commit(self) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        raise NotImplementedError


class _LocalSink(_Sink):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._temporary = temporary_name(path)
        self._file = NewFile(self._temporary)

    def _append(self, data: bytes) -> None:
        self._file.append(memoryview(data).cast("B"))

    def commit(self) -> None:
        self._file.close()
        put_in_place(self._temporary, self._path)

    def discard(self) -> None:
        self._file.discard()


class _S3Sink(_Sink):
    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri
        filesystem, path = s3_filesystem(uri)
        with refusals_explained(uri):
            self._file = filesystem.open(path, "wb", autocommit=False)

    def _append(self, data: bytes) -> None:
        with refusals_explained(self._uri):
            self._file.write(data)

    def commit(self) -> None:
        try:
            with refusals_explained(self._uri):
                self._file.close()
                self._file.commit()
        except FileNotFoundError as error:
            raise no_bucket(self._uri) from error

    def discard(self) -> None:
        self._file.closed = True  # otherwise its finaliser would upload the partial data
        self._file.discard()
