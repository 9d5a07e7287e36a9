"""Long lists of files, kept beside a manifest: the manifest stays small, however many files a version has or read.

A manifest names its data files, rejected files and side files, and the files of its inputs. Where these are more than
`MOST_INLINE` together, they are the rows of one Parquet file, `_files/part-00000-a<attempt>.parquet`, whose digest is
in the manifest:

    list    string  'data', 'rejected', 'side' or 'input'
    input   int32   place of the input in the manifest's inputs, from 0; null in the other lists
    path    string  relative to the version's directory; of an input: location of the file
    rows    int64   null for an input
    bytes   int64
    digest  string  with its method as prefix; of an input: its fingerprint
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.io import storage
from tasks.io.digests import digest
from tasks.store import layout
from tasks.store.manifest import FileEntry, InputFile, Manifest

MOST_INLINE = 500
_LISTS = {"data": "files", "rejected": "rejected_files", "side": "side_files"}
_INPUT = "input"
_SCHEMA = pa.schema(
    [
        pa.field("list", pa.string(), nullable=False),
        pa.field("input", pa.int32()),
        pa.field("path", pa.string(), nullable=False),
        pa.field("rows", pa.int64()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
    ]
)


def lists_apart(manifest: Manifest) -> tuple[Manifest, bytes]:
    """Return a manifest in its stored form, and the contents of the file with its lists; b'' if they are short."""
    named = [(name, None, getattr(manifest, field)) for name, field in _LISTS.items()]
    of_inputs = [(_INPUT, place, one.files) for place, one in enumerate(manifest.inputs)]
    tables = [_table(*one) for one in (*named, *of_inputs)]
    table = pa.concat_tables(tables)
    if table.num_rows <= MOST_INLINE:
        return manifest, b""
    data = storage.parquet_bytes(table).to_pybytes()
    path = layout.side_name("files", manifest.run.attempt)
    entry = FileEntry(path=path, rows=table.num_rows, bytes=len(data), digest=digest(data))
    inputs = tuple(one.model_copy(update={"files": ()}) for one in manifest.inputs)
    emptied: dict[str, object] = dict.fromkeys(_LISTS.values(), ())
    return manifest.model_copy(update={**emptied, "inputs": inputs, "file_lists": entry}), data


def with_lists(uri: str, manifest: Manifest) -> Manifest:
    """Return a complete manifest, the inverse of `lists_apart`.

    Args:
        uri: Directory of the version.
        manifest: Manifest in its stored form.

    Raises:
        ValueError: the file with the lists is missing, or isn't the one written with the manifest.

    """
    entry = manifest.file_lists
    if entry is None:
        return manifest
    try:
        data = storage.read_bytes(layout.join(uri, entry.path))
    except FileNotFoundError as error:
        raise ValueError(f"its lists of files, {entry.path}, are missing") from error
    if digest(data, entry.digest) != entry.digest:
        raise ValueError(f"its lists of files, {entry.path}, aren't those that it was written with")
    table = pq.read_table(pa.BufferReader(data), schema=_SCHEMA)
    lists = {
        field: tuple(
            FileEntry(path=path, rows=rows, bytes=size, digest=stated)
            for path, rows, size, stated in _rows(table, pc.equal(table["list"], name))
        )
        for name, field in _LISTS.items()
    }
    inputs = tuple(
        one.model_copy(
            update={
                "files": tuple(
                    InputFile(uri=path, bytes=size, fingerprint=stated)
                    for path, _, size, stated in _rows(table, pc.equal(table["input"], place))
                )
            }
        )
        for place, one in enumerate(manifest.inputs)
    )
    return manifest.model_copy(update={**lists, "inputs": inputs})


def _table(name: str, place: int | None, files: Sequence[FileEntry | InputFile]) -> pa.Table:
    own = [one for one in files if isinstance(one, FileEntry)]
    sources = [one for one in files if isinstance(one, InputFile)]
    columns = {
        "list": [name] * len(files),
        "input": [place] * len(files),
        "path": [*(one.path for one in own), *(one.uri for one in sources)],
        "rows": [*(one.rows for one in own), *(None for _ in sources)],
        "bytes": [one.bytes for one in files],
        "digest": [*(one.digest for one in own), *(one.fingerprint for one in sources)],
    }
    return pa.table(columns, schema=_SCHEMA)


def _rows(table: pa.Table, which: pa.ChunkedArray) -> Iterator[tuple[str, int, int, str]]:
    found = table.filter(which)
    yield from zip(*(found[name].to_pylist() for name in ("path", "rows", "bytes", "digest")), strict=True)
