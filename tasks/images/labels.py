r"""Class of each image: the table of labels, joined to the files; each row is used, or has a reason.

The labels file, CSV or Parquet, is read as a table of text: class and group of each image.

A label names its image by the file's path below the listed directory, with or without suffix; a label without '/'
also by the bare file name, with or without suffix. The first of these four that matches any file decides. Both
sides are compared with '\' read as '/', spaces around and './' in front dropped, and accents composed (NFC); case
matters. In classes and groups outer spaces are dropped, too, and their accents composed.

Treatment of odd labels:

| label | becomes |
|---|---|
| CSV line with a wrong number of fields; control characters in a value, as after an open quote | `malformed_row` |
| id or class null or blank | `null_id`, `null_class` |
| names no file, or several | `no_image`, `ambiguous_image` |
| its file is itself rejected | the file's reason: `duplicate_id`, `bad_name`, `not_a_file` |
| two classes for one file, whatever the spelling of its id | all rejected, and the image: `conflicting_labels` |
| one class, but two groups for one file (no group is one, too) | all rejected, and the image: `conflicting_groups` |
| a class outside the allowed ones | rejected, and the image: `unknown_class` |
| file, class and group of an earlier row | deduplicated |

An image without a label is `unlabelled`.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from unicodedata import normalize

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from tasks.engine.partition import frame_of
from tasks.images.sources import (
    LISTING,
    NAMED,
    REJECTED_IMAGES,
    SUFFIX,
    ImageListing,
    as_table,
    name_some,
    shown,
)
from tasks.io import storage
from tasks.io.errors import CorruptVersion, SourceError
from tasks.io.location import is_transient
from tasks.io.notation import DEFAULT, MissingValues, without
from tasks.io.text import plural, shortened
from tasks.store.manifest import InputFile, InputRecord, RowBalance

_TEXT = pa.string()
LABELS = pa.schema([("row", pa.int64()), *((name, _TEXT) for name in ("image_id", "class_name", "group", "malformed"))])

_POLARS = {name: pl.Int64 if name == "row" else pl.String for name in LABELS.names}
_SHOWN = 200
_BLOCK = 2**30  # a single block, if possible: no row may be longer than a block
_EXACT = 2.0**53
_NOT_TEXT = {
    b"\x1f\x8b": "it is compressed with gzip: decompress it",
    b"PK": "it is a zip file or an Excel workbook: save it as CSV in UTF-8",
    b"\xff\xfe": "it is in UTF-16: save it in UTF-8",
    b"\xfe\xff": "it is in UTF-16: save it in UTF-8",
}


def read_labels(
    uri: str,
    id_column: str,
    class_column: str,
    group_column: str | None = None,
    missing: MissingValues = DEFAULT,
) -> pa.Table:
    """Read a CSV or Parquet file of labels, all values as text.

    Text is unchanged: '007' stays. Parquet's whole floats, as data frames with nulls hold integers, become '7',
    and NaN becomes null. In CSV the missing values are null: a class is text, ids and groups are keys. A file is
    Parquet by its first bytes or its suffix, else CSV: separated by commas, or by tabs if its suffix is '.tsv'.

    Returns:
        Columns of `LABELS`, in the file's order. row: number in the file from 0, header and blank lines not counted.
        malformed: the text of a CSV line with a wrong number of fields, whose other columns are null.

    Raises:
        SourceError: the file is missing, empty, unreadable, or lacks these columns.
    """
    location = storage.normalise(uri)
    wanted = {"id_column": id_column, "class_column": class_column}
    if group_column is not None:
        wanted["group_column"] = group_column
    malformed: dict[int, str] = {}
    try:
        with storage.open_input(location) as source:
            head = source.read(4)
            source.seek(0)
            if head == b"PAR1" or location.lower().endswith(".parquet"):
                table = _read_parquet(source, wanted)
            else:
                separator = "\t" if location.lower().endswith(".tsv") else ","
                table = _read_csv(source.read(), wanted, separator, malformed, missing=missing)
    except SourceError as fault:
        raise SourceError(f"labels '{shown(uri)}': {fault}") from fault.__cause__
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, csv.Error, UnicodeDecodeError) as fault:
        raise SourceError(
            f"labels '{shown(uri)}' can't be read: {shown(str(fault).splitlines()[0])}; "
            "give a Parquet file, or CSV in UTF-8 (is it cut short, of another format, or a quote left open?)"
        ) from fault
    except OSError as fault:
        # Arrow raises the same for damaged pages and for a broken connection: only the latter may be retried.
        if is_transient(fault):
            raise
        raise SourceError(f"labels '{shown(uri)}' can't be read: {_cause(location, fault)}") from fault
    if not table.num_rows + len(malformed):
        raise SourceError(f"labels '{shown(uri)}' have no rows below the columns' names; give a row for each image")
    numbers = np.delete(np.arange(table.num_rows + len(malformed)), list(malformed))
    columns = {name: table[column] for name, column in zip(LABELS.names[1:], wanted.values(), strict=False)}
    good = pl.DataFrame({"row": numbers}).with_columns(
        **{name: frame_of(pa.table({name: column}))[name] for name, column in columns.items()}
    )
    bad = pl.DataFrame({"row": list(malformed), "malformed": list(malformed.values())}, schema_overrides=_POLARS)
    frame = pl.concat([pl.DataFrame(schema=_POLARS), good, bad], how="diagonal").sort("row")
    return as_table(frame, LABELS)


def labels_record(uri: str, rows: int) -> InputRecord:
    """Return the manifest's record of the labels' file; read its fingerprint."""
    (info,) = storage.list_files(uri)
    entry = InputFile(uri=info.uri, bytes=info.bytes, fingerprint=storage.fingerprint(info))
    return InputRecord(name="labels", uri=uri, rows=rows, files=(entry,))


def _cause(location: str, fault: OSError) -> str:
    infos = [] if isinstance(fault, PermissionError) else storage.list_files(location)
    if infos and infos[0].uri != location:
        return f"it is a directory; give one file of it, such as {shown(infos[0].uri)}"
    if infos or isinstance(fault, PermissionError):
        return f"{fault}; it may be damaged, or not yours to read"
    return "no such file; correct the location"


def _read_parquet(source: pa.NativeFile, wanted: Mapping[str, str]) -> pa.Table:
    with pq.ParquetFile(source) as file:
        _check_columns(file.schema_arrow.names, wanted)
        table = file.read(columns=list(dict.fromkeys(wanted.values())))
    texts = {}
    for name in wanted.values():
        try:
            texts[name] = _as_text(table[name])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as fault:
            kind = table.schema.field(name).type
            raise SourceError(f"column '{name}' of type {kind} can't be read as text; give text or numbers") from fault
    return pa.table(texts)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    text = column.cast(_TEXT)
    if not pa.types.is_floating(column.type):
        return text
    whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), _EXACT))
    text = pc.if_else(whole, column.cast(pa.int64(), safe=False).cast(_TEXT), text)
    return pc.if_else(pc.is_nan(column), None, text)


def _read_csv(
    data: bytes, wanted: Mapping[str, str], separator: str, malformed: dict[int, str], *, missing: MissingValues
) -> pa.Table:
    """Read the wanted columns as text; collect lines with a wrong number of fields in `malformed`, by row."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        hint = next((hint for start, hint in _NOT_TEXT.items() if data.startswith(start)), "save it in UTF-8")
        line = data.count(b"\n", 0, fault.start) + 1
        raise SourceError(f"line {line} is no UTF-8 ({fault.reason} at byte {fault.start:,}); {hint}") from fault
    header = next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row), None)
    if header is None:
        raise SourceError("the file is empty: it has not even a header; give a row for each image")
    _check_columns(header, wanted)

    def note(row: pa_csv.InvalidRow) -> str:
        malformed[row.number - 2] = shown(shortened(row.text or "", _SHOWN))  # rows count from 1, with the header
        return "skip"

    table = pa_csv.read_csv(
        pa.BufferReader(data),
        # Rows have numbers only if one thread reads them.
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=min(max(len(data) + 1, 2**20), _BLOCK)),
        parse_options=pa_csv.ParseOptions(delimiter=separator, invalid_row_handler=note, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(wanted.values(), _TEXT),
            include_columns=list(dict.fromkeys(wanted.values())),
            strings_can_be_null=True,
            null_values=list(missing.text),
        ),
    )
    keys = {column for setting, column in wanted.items() if setting != "class_column"} - {wanted["class_column"]}
    nulls = [without(pl.col(column), missing.ambiguous) for column in sorted(keys)] if missing.ambiguous else []
    return as_table(frame_of(table).with_columns(nulls), table.schema)


def _check_columns(names: Sequence[str], wanted: Mapping[str, str]) -> None:
    for setting, column in wanted.items():
        count = names.count(column)
        if count > 1:
            raise SourceError(f"several columns are named '{column}'; rename or remove one of them")
        if not count:
            close = get_close_matches(column.lower(), [name.lower() for name in names], n=1)
            close_name = next(name for name in names if name.lower() == close[0]) if close else None
            hint = f" Did you mean '{shown(close_name)}'?" if close_name is not None else ""
            if len(names) == 1 and (other := next((mark for mark in ";\t| " if mark in names[0]), None)):
                hint = f" Fields seem to be separated by {other!r}; save it with commas."
            there = shortened(shown(", ".join(names)), 5 * _SHOWN)
            raise SourceError(f"no column '{column}'.{hint} Set {setting} to one of its columns: {there}")


IMAGES = pa.schema([*LISTING, ("class_name", _TEXT), ("group", _TEXT)])
REJECTED_LABELS = pa.schema(
    [("row", pa.int64()), *((name, _TEXT) for name in ("image_id", "class_name", "reason", "detail"))]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Images with their class, and all rejected rows.

    images: columns of `IMAGES`, in the listing's order. rejected_images: columns of `REJECTED_IMAGES`, sorted by uri.
    rejected_labels: columns of `REJECTED_LABELS`, in the file's order; none without a labels file. label_balance is
    None without a labels file.
    """

    images: pa.Table
    rejected_images: pa.Table
    rejected_labels: pa.Table
    image_balance: RowBalance
    label_balance: RowBalance | None


def folder_labels(listing: ImageListing) -> pa.Table:
    """Return the labels of a class-per-directory layout: the class is the first directory of the path.

    Returns:
        Columns of `LABELS`, in the listing's order; row is that of the listing, and image_id the path. Files at the top
        have none.
    """
    frame = frame_of(listing.table).with_row_index("row").filter(pl.col("folder").is_not_null())
    nothing = pl.lit(None, pl.String)
    return as_table(frame.with_columns(image_id="path", class_name="folder", group=nothing, malformed=nothing), LABELS)


def join_labels(listing: ImageListing, labels: pa.Table | None, allowed_classes: Sequence[str] = ()) -> Joined:
    """Assign each image its class, and each rejected image and label its reason.

    Args:
        listing: The image files.
        labels: Columns of `LABELS`; None uses `folder_labels`.
        allowed_classes: Classes to take; all if empty.

    Raises:
        SourceError: no image has a usable label; the message shows counts, and ids of both sides.
    """
    files = _files(listing)
    if labels is None:
        given = frame_of(folder_labels(listing)).with_columns(
            pl.col("row").alias("file"), candidates=pl.lit(1, pl.UInt32), named=pl.lit(None, pl.String)
        )
    else:
        given = frame_of(labels).with_columns(key=_key("image_id"))
        matches = _match(given["key"].drop_nulls().unique(), files)
        given = given.join(matches, on="key", how="left", maintain_order="left")
    judged = _judge(given, files, {_composed(name) for name in allowed_classes})
    used = judged.filter("used").select("file", "class_name", "group")
    listed = frame_of(listing.table).with_row_index("file").cast({"file": pl.Int64})
    images = listed.join(used, on="file", how="inner", maintain_order="left")
    rejected = _without_label(listed.join(used, on="file", how="anti", maintain_order="left"), judged, labels is None)
    rejected_images = pl.concat([frame_of(listing.rejected), rejected]).sort("uri", maintain_order=True)
    bad = judged.filter(pl.col("reason").is_not_null())
    joined = Joined(
        images=as_table(images, IMAGES),
        rejected_images=as_table(rejected_images, REJECTED_IMAGES),
        rejected_labels=as_table(bad if labels is not None else bad.clear(), REJECTED_LABELS),
        image_balance=RowBalance(
            name="images",
            rows_in=listing.files,
            rows_out=images.height,
            rejected=_counts(rejected_images["reason"]),
            filtered=dict(listing.filtered),
        ),
        label_balance=None
        if labels is None
        else RowBalance(
            name="labels",
            rows_in=judged.height,
            rows_out=used.height,
            rejected=_counts(bad["reason"]),
            deduplicated=judged.height - used.height - bad.height,
        ),
    )
    if not images.height:
        raise _nothing_left(listing, joined, judged)
    return joined


def _composed(text: str) -> str:
    return normalize("NFC", text.strip())


def _plain(column: str) -> pl.Expr:
    text = pl.col(column).str.strip_chars().str.normalize("NFC")
    return pl.when(text != "").then(text).alias(column)


def _key(column: str) -> pl.Expr:
    r"""Return the form for comparing a label's id with a file's name; null if nothing is left."""
    text = pl.col(column).str.replace_all("\\", "/", literal=True).str.strip_chars().str.normalize("NFC")
    text = text.str.replace(r"^(\./)+", "")
    return pl.when(text != "").then(text)


def _files(listing: ImageListing) -> pl.DataFrame:
    """Return every candidate, the listing's table first: file, path, image_id, and reason of a rejected one."""
    columns = ["path", "image_id", "reason"]
    good = frame_of(listing.table).with_columns(reason=pl.lit(None, pl.String)).select(columns)
    every = pl.concat([good, frame_of(listing.rejected).select(columns)]).with_row_index("file")
    return every.cast({"file": pl.Int64})


def _match(keys: pl.Series, files: pl.DataFrame) -> pl.DataFrame:
    """Find the files of labels' distinct keys, by the files' possible label ids, the first choice first.

    Returns:
        key, file (null if there are several), candidates, and named, the first of several; keys without a file
        are left out.
    """
    name = pl.col("by_path").str.replace(r"(?s)^.*/", "")
    files = files.with_columns(by_path=_key("path"), by_id=_key("image_id"))
    files = files.with_columns(by_name=name, by_stem=name.str.replace(SUFFIX, "${1}"))
    found = []
    rest = pl.DataFrame({"key": keys})
    for tier in ("by_path", "by_id", "by_name", "by_stem"):
        if tier in ("by_name", "by_stem"):
            rest = rest.filter(~pl.col("key").str.contains("/", literal=True))
        answers = files.select("file", "path", key=tier).join(rest, on="key", how="semi")
        counts = answers.group_by("key").agg(pl.first("file"), pl.len().alias("candidates"))
        several = counts.filter(pl.col("candidates") > 1)
        paths = answers.join(several, on="key", how="semi").group_by("key").agg(pl.col("path").sort().head(NAMED))
        rows = paths.join(several, on="key").select("key", "path", "candidates").rows()
        named = {key: name_some(some, total) for key, some, total in rows}
        names = pl.DataFrame({"key": list(named), "named": list(named.values())}, schema_overrides=_NAMED)
        alone = pl.when(pl.col("candidates") == 1).then("file").alias("file")
        found.append(counts.with_columns(alone).join(names, on="key", how="left"))
        rest = rest.join(counts, on="key", how="anti")
    return pl.concat(found)


_NAMED = {"key": pl.String, "named": pl.String}


def _judge(given: pl.DataFrame, files: pl.DataFrame, allowed: set[str]) -> pl.DataFrame:
    """Add reason and detail, null for valid labels, and used: those that give an image its class."""
    texts = ("image_id", "class_name", "group")
    odd = pl.any_horizontal(
        pl.col(name).str.strip_chars().str.contains(r"\p{Cc}").fill_null(value=False) for name in texts
    )
    why, path = pl.col("file_reason"), pl.col("path")
    faults: list[tuple[pl.Expr, str | pl.Expr, str | pl.Expr]] = [
        (pl.col("malformed").is_not_null(), "malformed_row", pl.format("wrong number of fields: {}", "malformed")),
        (odd, "malformed_row", "a value has control characters: is a quote left open?"),
        (pl.col("image_id").str.strip_chars().fill_null("") == "", "null_id", "no id"),
        (pl.col("class_name").is_null(), "null_class", "no class"),
        (pl.col("candidates").is_null(), "no_image", "no file has this path or name"),
        (pl.col("candidates") > 1, "ambiguous_image", pl.format("may be {}", "named")),
        (why.is_not_null(), why, pl.format("its file {} is rejected", path)),
    ]
    frame = given.join(
        files.select("file", "path", file_reason="reason"), on="file", how="left", maintain_order="left"
    ).with_columns(_plain("class_name"), _plain("group"))
    frame = frame.with_columns(_first(faults, 1, "reason"), _first(faults, 2, "detail"))
    conflicts = _conflicts(frame.filter(pl.col("reason").is_null()))
    frame = frame.join(conflicts, on="file", how="left", maintain_order="left").with_columns(
        reason=pl.coalesce("reason", "conflict"),
        detail=pl.when(pl.col("reason").is_null()).then("among").otherwise("detail"),
    )
    if allowed:
        unknown = pl.col("reason").is_null() & ~pl.col("class_name").is_in(sorted(allowed))
        frame = frame.with_columns(
            reason=pl.when(unknown).then(pl.lit("unknown_class")).otherwise("reason"),
            detail=pl.when(unknown).then(pl.lit("not among the classes to take")).otherwise("detail"),
        )
    holds = pl.col("reason").is_null()
    return frame.with_columns(used=holds & pl.when(holds).then("file").is_first_distinct())


def _first(faults: Sequence[tuple[pl.Expr, str | pl.Expr, str | pl.Expr]], place: int, name: str) -> pl.Expr:
    values = [(fault[0], fault[place]) for fault in faults]
    cases = [pl.when(bad).then(pl.lit(value) if isinstance(value, str) else value) for bad, value in values]
    return pl.coalesce(cases).alias(name)


def _conflicts(labels: pl.DataFrame) -> pl.DataFrame:
    """Return files whose labels differ: file, conflict (the reason) and among."""
    repeated = labels.filter(pl.len().over("file") > 1).group_by("file")
    values = repeated.agg(pl.col("class_name", "group").unique().sort()).filter(
        (pl.col("class_name").list.len() > 1) | (pl.col("group").list.len() > 1)
    )
    rows = [
        (file, "conflicting_labels", name_some(classes))
        if len(classes) > 1
        else (file, "conflicting_groups", "groups " + name_some([str(group or "(none)") for group in groups]))
        for file, classes, groups in values.rows()
    ]
    return pl.DataFrame(rows, schema={"file": pl.Int64, "conflict": pl.String, "among": pl.String}, orient="row")


def _without_label(images: pl.DataFrame, judged: pl.DataFrame, by_folder: bool) -> pl.DataFrame:
    """Return `REJECTED_IMAGES` for images without a class from any label; the reason is that of one of their labels."""
    files = judged.filter(pl.col("reason").is_not_null() & pl.col("file").is_not_null())
    lacks_class = ~pl.col("reason").is_in(["conflicting_labels", "conflicting_groups", "unknown_class"])
    files = (
        files.with_columns(lacks_class.alias("lacks"))
        .sort("lacks", "row")
        .unique("file", keep="first", maintain_order=True)
        .select(
            "file",
            pl.when(pl.col("reason") != "conflicting_labels").then("class_name").alias("class_name"),
            pl.when("lacks").then(pl.lit("unlabelled")).otherwise("reason").alias("reason"),
            pl.when("lacks").then(pl.lit("its label: ") + pl.col("detail")).otherwise("detail").alias("detail"),
        )
    )
    default = "it stands in no directory" if by_folder else "no label names it alone"
    return (
        images.join(files, on="file", how="left", maintain_order="left")
        .with_columns(pl.col("reason").fill_null("unlabelled"), pl.col("detail").fill_null(default))
        .select(REJECTED_IMAGES.names)
    )


def _counts(reasons: pl.Series) -> dict[str, int]:
    return dict(sorted(reasons.value_counts().rows()))


def _nothing_left(listing: ImageListing, joined: Joined, judged: pl.DataFrame) -> SourceError:
    def counted(balance: RowBalance) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in balance.rejected.items()) or "none"

    def quoted(column: pl.Series) -> str:
        return ", ".join(f"'{shown(value)}'" for value in column.drop_nulls().head(NAMED)) or "none"

    found = f"images '{listing.uri}': no image has a usable label. Images rejected: {counted(joined.image_balance)}."
    ids = quoted(pl.concat([frame_of(table)["path"] for table in (listing.table, listing.rejected)]))
    classes = judged["class_name"].drop_nulls().unique().sort()
    if joined.label_balance is None:
        cure = "Put each image into a directory that is named for its class, or give a file of labels."
        found += f" Paths: {ids}; classes: {quoted(classes)}."
    else:
        found += f" Labels rejected: {counted(joined.label_balance)}."
        found += f" Ids in the labels: {quoted(judged['image_id'])}; paths of the images: {ids}."
        cure = "A label must name a path below the directory, or a file name, with or without suffix."
    if set(joined.image_balance.rejected) & {"unknown_class"}:
        number = plural(len(classes), "class", "classes")
        cure = f"Correct the classes to take; the labels have {number}: {quoted(classes)}."
    return SourceError(f"{found} {cure}")


def assign_class_ids(names: Iterable[str], previous: Mapping[str, int] | None = None) -> dict[str, int]:
    """Number the classes so that a number means the same class in every version.

    A class that was numbered before keeps its number, also while it has no images; new ones follow the highest number
    so far, sorted by name.

    Args:
        names: Present classes, in any order and with repeats.
        previous: Numbers given so far, from the last version.

    Returns:
        Numbers by class, ascending.

    Raises:
        CorruptVersion: the previous numbers aren't distinct whole numbers from 0 on.
    """
    known = dict(previous or {})
    for name, number in known.items():
        if type(number) is not int or number < 0:
            raise CorruptVersion(f"class '{name}' has the id {number!r}, which is no whole number from 0 on")
    number, times = next(iter(Counter(known.values()).most_common(1)), (0, 0))
    if times > 1:
        same = [name for name in known if known[name] == number]
        raise CorruptVersion(f"classes {name_some(same)} have the same id, {number}: ids must be distinct")
    start = max(known.values(), default=-1) + 1
    new = sorted(set(names) - known.keys())
    known |= {name: start + position for position, name in enumerate(new)}
    return dict(sorted(known.items(), key=lambda item: item[1]))
