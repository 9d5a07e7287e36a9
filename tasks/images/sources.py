"""Listing of image files: one row a file, with the id that labels and splits use.

Only names and sizes are read. Decoding decides if a file holds an image, so every file is a
candidate, whatever its suffix, except for those that are evidently something else (`NOT_IMAGES`).

Treatment of odd files:

| file | becomes |
|---|---|
| name, or directory on the way to it, that a system or a tool keeps beside files (`JUNK`) | filtered, `junk` |
| suffix of a table, text, program, archive or array (`NOT_IMAGES`, in any case) | filtered, `not_image_suffix` |
| name not in UTF-8, with control characters, of over 1,024 characters, or with '..' on S3 | rejected, `bad_name` |
| pipe, socket, device, or broken link | rejected, `not_a_file` |
| same name except for the suffix: x.png and x.jpg | all rejected, `duplicate_id` |
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.engine.partition import frame_of
from tasks.io import storage
from tasks.io.errors import SourceError
from tasks.io.location import is_transient, odd_key, refusals_explained
from tasks.io.tensors import Int64Array
from tasks.io.text import plural
from tasks.store.manifest import InputFile, InputRecord

LISTING = pa.schema(
    dict.fromkeys(("uri", "path", "image_id"), pa.string())
    | {"bytes": pa.int64(), "stamp": pa.string(), "folder": pa.string()}
)
REJECTED_IMAGES = pa.schema(dict.fromkeys(("uri", "path", "image_id", "class_name", "reason", "detail"), pa.string()))

NOT_IMAGES = (
    *(".csv", ".tsv", ".parquet", ".json", ".jsonl", ".txt", ".md", ".xml", ".yaml", ".yml", ".html", ".htm"),
    *(".py", ".zip", ".tar", ".gz", ".npy", ".npz", ".mat", ".pdf"),
)
NOT_IMAGE_SUFFIX = "not_image_suffix"
JUNK = frozenset(
    {
        *(".ds_store", ".appledouble", ".lsoverride", ".spotlight-v100", ".fseventsd", ".trashes", "__macosx"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *(".directory", ".nomedia", ".thumbnails", "@eadir", "lost+found"),
        *(".git", ".gitignore", ".gitattributes", ".gitkeep", ".gitmodules", ".dvc", ".dvcignore", ".svn", ".hg"),
        *(".ipynb_checkpoints", "__pycache__", ".cache", "_success", "_temporary"),
    }
)
"""Names, in lower case, of files and directories that aren't the user's."""
_JUNK_STARTS = ("._", ".trash-", ".nfs", ".fuse_hidden")
_JUNK = "junk"
LONGEST_PATH = 1024
NAMED = 3  # names that a message lists before 'and n more'

# The character before the dot keeps a name that is all suffix ('.png') from becoming empty.
SUFFIX = r"([^/])\.[^./]*$"

_PIECE = 2**20
_AT_ONCE = 8192
"""Files of a listing that are held as objects; all others are rows of a table."""
DIGESTED_AT_ONCE = 4096
"""Files that one task reads to find copies."""
_FOUND = {"path": pl.String, "bytes": pl.Int64, "stamp": pl.String, "reason": pl.String}
Digested = Callable[[Sequence[pa.Array]], Iterator[pa.Array]]
_UNSHOWABLE = re.compile(r"[\ud800-\udfff\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageListing:
    """The image files below a location.

    uri: the listed location. base: the base of relative paths, with '/' at its end. table: columns of `LISTING`, a
    row a candidate, sorted by uri, with unique image ids. rejected: columns of `REJECTED_IMAGES`, sorted by uri.
    filtered: files left out on purpose, by reason.
    """

    uri: str
    base: str
    table: pa.Table
    rejected: pa.Table
    filtered: Mapping[str, int]

    @property
    def files(self) -> int:
        """Number of files found: candidates, rejected and filtered."""
        candidates: int = self.table.num_rows + self.rejected.num_rows
        return candidates + sum(self.filtered.values())

    def record(self) -> InputRecord:
        """Return the manifest's record of this input: all candidates as one entry, with a digest of the listing.

        The digest is over path, size and stamp (modification time or ETag) of each candidate: the fingerprints of a
        million files are in the version's rows, not in its manifest.
        """
        digest = hashlib.blake2b(digest_size=32)
        lines = pl.concat_str("path", "bytes", "stamp", separator="\t")
        for number, some in enumerate(frame_of(self.table).iter_slices(_AT_ONCE)):
            text = "\n".join(some.select(lines).to_series())
            digest.update(f"\n{text}".encode() if number else text.encode())
        total = int(np.sum(self.table["bytes"].to_numpy(), dtype=np.int64))
        entry = InputFile(uri=self.uri, bytes=total, fingerprint=f"listing-blake2b:{digest.hexdigest()}")
        return InputRecord(name="images", uri=self.uri, rows=self.table.num_rows, files=(entry,))


def list_images(uri: str) -> ImageListing:
    """List the image files below a directory or S3 prefix; a glob or a single file may be given too.

    Paths are relative to the directory; to the part before the first wildcard for a glob ('data/2024-*/x' → 'data');
    to its directory for a single file. image_id is the path without its last suffix ('cats/1.jpg' → 'cats/1', 'a.b.png'
    → 'a.b'); folder is the path's first directory, null for a file at the top.

    Raises:
        SourceError: nothing is there, it can't be listed, or no file in it can be an image.
    """
    root = storage.normalise(uri)
    found = _Found()
    frames = [found.add(infos, _base(root, infos[0].uri)) for infos in _listed(root)]
    if not found.images:
        raise SourceError(
            f"images '{shown(root)}': none of its {plural(found.files, 'file')} can be an image, "
            f"such as {shown(found.first)}; give the directory or prefix of the images"
        )
    frame = pl.concat(frames, rechunk=True)
    del frames
    base = shown(found.base)
    good = frame.filter(pl.col("reason").is_null()).sort("path")
    kept, rejected = _set_duplicates_apart(_described(good, base))
    odd = _described(frame.filter(pl.col("reason").is_not_null()), base)
    odd = odd.with_columns(detail=pl.col("reason").replace_strict(_DETAILS, return_dtype=pl.String))
    rejected = pl.concat([rejected, odd.select(rejected.columns)]).sort("uri", "path")
    left_out = {_JUNK: found.junk, NOT_IMAGE_SUFFIX: found.files - found.junk - found.images}
    return ImageListing(
        uri=shown(root),
        base=base,
        table=as_table(kept, LISTING),
        rejected=as_table(rejected, REJECTED_IMAGES),
        filtered={reason: count for reason, count in left_out.items() if count},
    )


@dataclass(slots=True)
class _Found:
    """Counts of the files listed so far; first: the first by name."""

    files: int = 0
    junk: int = 0
    images: int = 0
    first: str = ""
    base: str = ""

    def add(self, infos: Sequence[storage.FileInfo], base: str) -> pl.DataFrame:
        """Count some files; return those that may be images: path, bytes, stamp, and reason if they can't be."""
        wanted = [info for info in infos if not _is_junk(info.uri[len(base) :])]
        images = [info for info in wanted if not info.uri.lower().endswith(NOT_IMAGES)]
        self.files += len(infos)
        self.junk += len(infos) - len(wanted)
        self.images += len(images)
        first = min(info.uri for info in infos)
        self.first, self.base = min(self.first or first, first), base
        return pl.DataFrame(
            {
                "path": [shown(info.uri[len(base) :]) for info in images],
                "bytes": [info.bytes for info in images],
                "stamp": [info.stamp for info in images],
                "reason": [_fault(info, len(base)) for info in images],
            },
            schema=_FOUND,
        )


def _described(frame: pl.DataFrame, base: str) -> pl.DataFrame:
    return frame.with_columns(
        (pl.lit(base) + pl.col("path")).alias("uri"),
        pl.col("path").str.replace(SUFFIX, "${1}").alias("image_id"),
        pl.col("path").str.extract(r"^([^/]+)/").alias("folder"),
        pl.lit(None, pl.String).alias("class_name"),
    )


def _is_junk(path: str) -> bool:
    """Return True if a file, or a directory on the way to it, is one that systems and tools keep beside the user's."""
    parts = path.lower().split("/")
    return storage.is_temporary(path) or any(part in JUNK or part.startswith(_JUNK_STARTS) for part in parts)


def shown(text: str) -> str:
    r"""Return text fit for UTF-8 and for one line: invalid UTF-8 bytes and control characters become '\xff'."""
    if text.isprintable():  # most names: several times as fast as the search
        return text
    return _UNSHOWABLE.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", text)


def name_some(names: Sequence[str], total: int | None = None) -> str:
    """Return the first names, and the number of the others."""
    more = (len(names) if total is None else total) - len(names[:NAMED])
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more else "")


def as_table(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Return a frame as an Arrow table of exactly this schema."""
    return frame.select(schema.names).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)


def _listed(root: str) -> Iterator[list[storage.FileInfo]]:
    """Yield the files below a location, some at a time."""
    nothing = True
    try:
        with refusals_explained(root):
            files = storage.each_file(root, include_hidden=True)
            while infos := list(islice(files, _AT_ONCE)):
                nothing = False
                yield infos
        there = nothing and storage.exists(root)
    except OSError as fault:
        if is_transient(fault):
            raise
        raise SourceError(
            f"images '{shown(root)}' can't be listed: {fault}; correct the location, or the rights or links in it"
        ) from fault
    if not nothing:
        return
    if there:
        cause, cure = "no file is in it or below", "put images there"
    elif glob.has_magic(root):
        cause, cure = "nothing matches", "correct the pattern"
    else:
        cause, cure = "nothing is there", "correct the location"
    raise SourceError(f"images '{shown(root)}': {cause}; {cure}, or give another directory, glob or s3:// prefix")


def _base(root: str, uri: str) -> str:
    """Return the part of a listed file's URI before its relative path, with '/' at its end."""
    below = root.rstrip("/") + "/"
    if uri.startswith(below):
        return below
    if uri != root:  # a glob, as the place itself doesn't exist
        root = re.split(r"[*?\[]", root, maxsplit=1)[0]
    return root.rpartition("/")[0] + "/"


_DETAILS = {
    "bad_name": f"the name isn't UTF-8, has control characters, is longer than {LONGEST_PATH:,} characters, or would "
    "be read as another object's ('..', '?versionId='); rename",
    "not_a_file": "a link that leads nowhere (fetch what it names, as 'git annex get' and 'dvc pull' do), a pipe, a "
    "socket or a device; or remove it",
}


def _fault(info: storage.FileInfo, start: int) -> str | None:
    """Return why a file can't be a candidate; `start` is the start of its relative path."""
    if len(info.uri) - start > LONGEST_PATH or (not info.uri.isprintable() and _UNSHOWABLE.search(info.uri)):
        return "bad_name"
    if storage.is_s3(info.uri) and odd_key(info.uri[start:]):
        return "bad_name"
    # Opening a pipe would wait for ever. They all have size 0, so that few files are checked.
    if not info.bytes and not storage.is_s3(info.uri) and not Path(info.uri).is_file():
        return "not_a_file"
    return None


def _set_duplicates_apart(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return rows with a unique id, and the others with columns of `REJECTED_IMAGES`."""
    unique = frame["image_id"].is_unique()
    shared = frame.filter(~unique)
    names = shared.group_by("image_id").agg(pl.col("path").sort().head(NAMED).alias("names"), pl.len().alias("total"))
    details = [f"the id of {name_some(row['names'], row['total'])}; keep one of them" for row in names.to_dicts()]
    named = names.select("image_id", pl.Series("detail", details, dtype=pl.String))
    rejected = shared.join(named, on="image_id", how="left").with_columns(reason=pl.lit("duplicate_id"))
    return frame.filter(unique), rejected.select(REJECTED_IMAGES.names)


def digest_part(uris: pa.Array) -> pa.Array:
    """Return the digests of some files (`digest_files`), binary."""
    return pa.array(digest_files(uris.to_pylist()), pa.large_binary())


def digest_here(parts: Sequence[pa.Array]) -> Iterator[pa.Array]:
    """Yield the digests of some files, part by part, in this process."""
    return map(digest_part, parts)


def content_groups(table: pa.Table, digested: Digested = digest_here) -> Int64Array:
    """Return for each row of a listing the first row with the same contents (its own number if none is earlier).

    On a local disk files are compared by a digest, and only those with the size of another are read. On S3 nothing
    is read: files are equal if size and ETag are, so copies that were uploaded in parts, or encrypted with KMS, go
    unnoticed here (the search for near duplicates finds them).

    Args:
        table: Columns uri, bytes and stamp, as in `LISTING`; its files all on S3 or all local.
        digested: Returns the digests (`digest_part`) of the parts of the files, given their URIs.
    """
    uris = table["uri"]
    if len(uris) and storage.is_s3(uris[0].as_py()):
        return first_alike(frame_of(table).select("bytes", "stamp"))
    rows = same_size_rows(table["bytes"].to_numpy())
    starts = range(0, len(rows), DIGESTED_AT_ONCE)
    parts = [uris.take(pa.array(rows[start : start + DIGESTED_AT_ONCE])).combine_chunks() for start in starts]
    digests = pl.Series(pa.chunked_array(digested(parts), pa.large_binary()))
    return group_by_digest(table.num_rows, rows, digests)


def same_size_rows(sizes: Int64Array) -> Int64Array:
    """Return rows, ascending, with the size of another row: only those can be copies."""
    return np.flatnonzero(pl.Series(sizes).is_duplicated().to_numpy()).astype(np.int64)


def digest_files(uris: Iterable[str]) -> list[bytes | None]:
    """Return the blake2b of each file's contents; None if a file is missing or may not be read.

    The decoder of that file reports its fault; a transient fault is raised, for a retry.
    """
    return [_digest(uri) for uri in uris]


def _digest(uri: str) -> bytes | None:
    digest = hashlib.blake2b(digest_size=32)
    try:
        with storage.open_input(uri) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as fault:
        if is_transient(fault):
            raise
        return None
    return digest.digest()


def group_by_digest(rows_in_all: int, rows: Int64Array, digests: pl.Series) -> Int64Array:
    """Return the first row with the same contents, for each of `rows_in_all` rows.

    Args:
        rows_in_all: Rows of the listing.
        rows: Rows that were read, ascending; any other equals none.
        digests: Their digests in the same order, binary; null equals none.
    """
    groups = np.arange(rows_in_all, dtype=np.int64)
    read = pl.DataFrame({"row": rows, "digest": digests}).drop_nulls()
    known = read["row"].to_numpy()
    groups[known] = known[first_alike(read.select("digest"))]
    return groups


def first_alike(keys: pl.DataFrame) -> Int64Array:
    """Return for each row the first row that is equal to it in every column."""
    numbered = keys.select(pl.struct(keys.columns).alias("key")).with_row_index("row")
    first = numbered.select(pl.col("row").min().over("key").cast(pl.Int64)).to_series()
    numbers: Int64Array = first.to_numpy()
    return numbers
