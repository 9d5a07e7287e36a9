"""The labels file is read as text, and each of its rows is used, or has a reason."""

from __future__ import annotations

import datetime as dt
import gzip
import json
from collections import Counter
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.images.labels import (
    IMAGES,
    LABELS,
    REJECTED_LABELS,
    Joined,
    assign_class_ids,
    folder_labels,
    join_labels,
    labels_record,
    read_labels,
)
from tasks.images.sources import LISTING, REJECTED_IMAGES, ImageListing, list_images
from tasks.io import storage
from tasks.io.errors import CorruptVersion, SourceError
from tasks.io.notation import DEFAULT

CSV = b"image_id,class_name\n1,cat\n2,dog\n"


def read(path: Path, data: bytes, group: str | None = None) -> list[tuple[object, ...]]:
    path.write_bytes(data)
    table = read_labels(str(path), "image_id", "class_name", group)
    assert table.schema == LABELS
    columns = ["row", "image_id", "class_name", *(["group"] if group else [])]
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


TEXT: list[tuple[str, bytes, list[tuple[object, ...]]]] = [
    ("plain", CSV, [(0, "1", "cat"), (1, "2", "dog")]),
    ("a byte order mark", b"\xef\xbb\xbf" + CSV, [(0, "1", "cat"), (1, "2", "dog")]),
    ("Windows line ends", CSV.replace(b"\n", b"\r\n"), [(0, "1", "cat"), (1, "2", "dog")]),
    ("old Mac line ends", CSV.replace(b"\n", b"\r"), [(0, "1", "cat"), (1, "2", "dog")]),
    ("no line end at the end", CSV[:-1], [(0, "1", "cat"), (1, "2", "dog")]),
    ("blank lines have no number", b"\n" + CSV.replace(b"\n2", b"\n\n2"), [(0, "1", "cat"), (1, "2", "dog")]),
    ("numbers as they are written", b"image_id,class_name\n007,1.50\n1e5,0\n", [(0, "007", "1.50"), (1, "1e5", "0")]),
    ("quotes", b'"image_id","class_name"\n"a,b","say ""hi"""\n', [(0, "a,b", 'say "hi"')]),
    ("nulls", b"image_id,class_name\n,null\nNULL,\n", [(0, None, None), (1, None, None)]),
    ("quoted or not, the same are null", b'image_id,class_name\n"","null"\n', [(0, None, None)]),
    ("NA and None may be classes", b"image_id,class_name\n1,NA\n2,None\n", [(0, "1", "NA"), (1, "2", "None")]),
    ("but no image", b'image_id,class_name\nNA,cat\n"None",cow\n', [(0, None, "cat"), (1, None, "cow")]),
    ("booleans stay text", b"image_id,class_name\n1,true\n2,False\n", [(0, "1", "true"), (1, "2", "False")]),
    ("other columns, other order", b"x,class_name,image_id\n9,cat,1\n", [(0, "1", "cat")]),
    ("letters of any language", "image_id,class_name\n1,żółw\n".encode(), [(0, "1", "żółw")]),
    ("a header over two lines", b'"the\nnote",image_id,class_name\nx,1,cat\n', [(0, "1", "cat")]),
]  # fmt: skip


@pytest.mark.parametrize(("why", "data", "rows"), TEXT, ids=[case[0] for case in TEXT])
def test_csv(tmp_path: Path, why: str, data: bytes, rows: list[tuple[object, ...]]) -> None:
    assert read(tmp_path / "labels.csv", data) == rows


def test_tabs_go_by_the_suffix(tmp_path: Path) -> None:
    assert read(tmp_path / "labels.TSV", CSV.replace(b",", b"\t")) == [(0, "1", "cat"), (1, "2", "dog")]


def test_lines_with_a_wrong_number_of_fields(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"image_id,class_name\n1\n2,dog\n\n3,cow,x\n" + b"4," + b"y" * 300 + b",z\n5,cat\n6\t\n")
    table = read_labels(str(path), "image_id", "class_name")
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert table["image_id"].to_pylist() == [None, "2", None, None, "5", None]
    short = "4," + "y" * 97 + "…" + "y" * 98 + ",z"
    assert table["malformed"].to_pylist() == ["1", None, "3,cow,x", short, None, r"6\x09"]


def test_malformed_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"image_id,class_name\n1\n")
    assert read_labels(str(path), "image_id", "class_name")["malformed"].to_pylist() == ["1"]


COLUMNS: list[tuple[str, pa.Array, list[str | None]]] = [
    ("text", pa.array(["007", None, "1.0"]), ["007", None, "1.0"]),
    ("large text", pa.array(["a"], pa.large_string()), ["a"]),
    ("text views", pa.array(["a", None], pa.string_view()), ["a", None]),
    ("categories", pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
    ("categories of numbers", pa.array([7.0, 8.0]).dictionary_encode(), ["7", "8"]),
    ("bytes", pa.array([b"a"]), ["a"]),
    ("whole numbers", pa.array([7, -1, 2**63 - 1, None]), ["7", "-1", "9223372036854775807", None]),
    ("unsigned", pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
    ("whole numbers with nulls, by pandas", pa.array([7.0, float("nan"), -0.0]), ["7", None, "0"]),
    ("fractions", pa.array([0.5, 1e300, float("inf"), None]), ["0.5", "1e+300", "inf", None]),
    ("narrow fractions", pa.array([0.1, 3.0], pa.float32()), ["0.1", "3"]),
    ("booleans", pa.array([True, False]), ["true", "false"]),
    ("dates", pa.array([dt.date(2024, 2, 29)]), ["2024-02-29"]),
    ("nothing", pa.nulls(2), [None, None]),
]  # fmt: skip


@pytest.mark.parametrize(("why", "values", "texts"), COLUMNS, ids=[case[0] for case in COLUMNS])
def test_parquet(tmp_path: Path, why: str, values: pa.Array, texts: list[str | None]) -> None:
    path = str(tmp_path / "labels.parquet")
    pq.write_table(pa.table({"junk": [[1]] * len(values), "image_id": values, "class_name": values}), path)
    table = read_labels(path, "image_id", "class_name")
    assert table["image_id"].to_pylist() == table["class_name"].to_pylist() == texts
    assert table["row"].to_pylist() == list(range(len(texts)))


def test_parquet_under_another_name_and_a_column_for_two_ends(tmp_path: Path) -> None:
    path = str(tmp_path / "labels.dat")
    pq.write_table(pa.table({"image.id": [1], "kind": ["cat"]}), path)
    table = read_labels(path, "image.id", "kind", "kind")
    assert table.drop_columns(["malformed", "row"]).to_pylist() == [
        {"image_id": "1", "class_name": "cat", "group": "cat"}
    ]


@given(st.lists(st.tuples(st.text(), st.none() | st.text()), min_size=1, max_size=8))
def test_quoted_text_of_any_kind_survives(rows: list[tuple[str, str | None]]) -> None:
    import tempfile

    names, classes = zip(*rows, strict=True)
    table = pa.table({"image_id": pa.array(names), "class_name": pa.array(classes)})
    with tempfile.TemporaryDirectory() as directory:
        pa_csv.write_csv(table, f"{directory}/labels.csv", pa_csv.WriteOptions(quoting_style="needed"))
        found = read_labels(f"{directory}/labels.csv", "image_id", "class_name")
    assert found["image_id"].to_pylist() == [None if name in DEFAULT.typed else name for name in names]
    assert found["class_name"].to_pylist() == [None if name in DEFAULT.text else name for name in classes]


def test_local_and_s3(root: str) -> None:
    storage.write_bytes(f"{root}/labels.csv", b"id;x,kind,patient\n1,cat,p1\n")
    table = read_labels(f"{root}/labels.csv", "id;x", "kind", "patient")
    assert table["group"].to_pylist() == ["p1"]
    record = labels_record(f"{root}/labels.csv", 1)
    assert (record.name, record.rows, record.files[0].bytes) == ("labels", 1, 27)
    for place, message in (
        ("missing.csv", r"labels '.*missing\.csv' can't be read: no such file; correct the location"),
        ("", r"can't be read: it is a directory; give one file of it, such as .*/labels\.csv"),
    ):
        with pytest.raises(SourceError, match=message):
            read_labels(f"{root}/{place}".rstrip("/"), "id", "kind")


PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"image_id": ["x"] * 100, "class_name": ["y"] * 100}), PARQUET)
PARQUET_BYTES = PARQUET.getvalue().to_pybytes()

WRONG: list[tuple[str, str, bytes, str]] = [
    ("an empty file", "x.csv", b"", r"the file is empty: it has not even a header"),
    ("blank lines", "x.csv", b"\n\r\n\n", r"the file is empty"),
    ("a header only", "x.csv", b"image_id,class_name\n", r"have no rows below the columns' names"),
    ("a byte order mark only", "x.csv", b"\xef\xbb\xbf", r"the file is empty"),
    ("Latin-1", "x.csv", "image_id,class_name\n1,cat\n2,ö\n".encode("latin-1"), r"line 3 is no UTF-8 .*save it"),
    ("UTF-16", "x.csv", CSV.decode().encode("utf-16"), r"line 1 is no UTF-8 .*it is in UTF-16: save"),
    ("gzip", "x.csv.gz", gzip.compress(CSV), r"it is compressed with gzip: decompress"),
    ("a workbook", "x.xlsx", b"PK\x03\x04\x14\x00\xff\xfe", r"a zip file or an Excel workbook: save it as CSV"),
    ("another column", "x.csv", b"id,label\n1,cat\n", r"no column 'image_id'\. Set id_column to one of .*: id, label"),
    ("another spelling", "x.csv", b"Image_ID,class_name\n1,cat\n", r"Did you mean 'Image_ID'\? Set id_column to"),
    ("a space before", "x.csv", b"image_id, class_name\n1,cat\n", r"Did you mean ' class_name'\?"),
    ("semicolons", "x.csv", CSV.replace(b",", b";"), r"Fields seem to be separated by ';'; save it with commas"),
    ("tabs", "x.csv", CSV.replace(b",", b"\t"), r"separated by '\\t'"),
    ("spaces", "x.csv", CSV.replace(b",", b" "), r"separated by ' '; save it with commas"),
    ("a column twice", "x.csv", b"image_id,class_name,image_id\n1,cat,2\n", r"several columns are named 'image_id'"),
    ("a huge header", "x.csv", b"x" * 200_000, r"can't be read: field larger"),
    ("no Parquet", "x.parquet", CSV, r"can't be read: .*Parquet magic bytes.*give a Parquet file, or CSV"),
    ("Parquet of no bytes", "x.parquet", b"", r"can't be read: .*0 bytes"),
    ("Parquet cut short", "x.parquet", PARQUET_BYTES[:-20], r"can't be read: "),
    ("Parquet damaged", "x.parquet", PARQUET_BYTES[:8] + b"\xff" * 40 + PARQUET_BYTES[48:], r"can't be read: "),
]  # fmt: skip


@pytest.mark.parametrize(("why", "name", "data", "message"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_named(tmp_path: Path, why: str, name: str, data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=rf"(?s)labels '.*/{name}'.*{message}"):
        read(tmp_path / name, data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([[1]]), r"column 'image_id' of type list<.*> can't be read as text; give text or numbers"),
        (pa.array([b"\xff"]), r"column 'image_id' of type binary can't be read as text"),
    ],
)
def test_parquet_columns_that_are_no_text(tmp_path: Path, values: pa.Array, message: str) -> None:
    path = str(tmp_path / "labels.parquet")
    pq.write_table(pa.table({"image_id": values, "class_name": ["x"]}), path)
    with pytest.raises(SourceError, match=message):
        read_labels(path, "image_id", "class_name")


def test_parquet_without_rows_or_with_a_column_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "labels.parquet")
    pq.write_table(pa.table({"image_id": pa.nulls(0), "class_name": pa.nulls(0)}), path)
    with pytest.raises(SourceError, match="have no rows"):
        read_labels(path, "image_id", "class_name")
    twice = pa.Table.from_arrays([pa.array([1])] * 3, names=["image_id", "image_id", "class_name"])
    pq.write_table(twice, path)
    with pytest.raises(SourceError, match="several columns are named 'image_id'"):
        read_labels(path, "image_id", "class_name")


def test_a_group_column_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no column 'patient'\. Set group_column to one of its columns: image_id"):
        read(tmp_path / "labels.csv", CSV, "patient")


def test_a_long_row_of_another_column(tmp_path: Path) -> None:
    """Longer than the reader's usual block, which no row may straddle."""
    data = b"image_id,class_name,note\n1,cat," + b"x" * 3_000_000 + b"\n2,dog,\n"
    assert read(tmp_path / "labels.csv", data) == [(0, "1", "cat"), (1, "2", "dog")]


# Labels joined to files

Label = tuple[str | None, str | None] | tuple[str | None, str | None, str | None]


def listing_of(*paths: str, filtered: int = 0) -> ImageListing:
    """A listing as list_images makes it, without files."""
    ids = {path: path[: len(path) - len(suffix_of(path))] for path in paths}
    times = Counter(ids.values())
    good = [path for path in sorted(paths) if times[ids[path]] == 1]
    bad = [path for path in sorted(paths) if times[ids[path]] > 1]
    table = {
        "uri": [f"/data/{path}" for path in good],
        "path": good,
        "image_id": [ids[path] for path in good],
        "bytes": [1] * len(good),
        "stamp": [""] * len(good),
        "folder": [path.split("/")[0] if "/" in path else None for path in good],
    }
    rejected = {
        "uri": [f"/data/{path}" for path in bad],
        "path": bad,
        "image_id": [ids[path] for path in bad],
        "class_name": [None] * len(bad),
        "reason": ["duplicate_id"] * len(bad),
        "detail": ["…"] * len(bad),
    }
    return ImageListing(
        uri="/data",
        base="/data/",
        table=pa.table(table, schema=LISTING),
        rejected=pa.table(rejected, schema=REJECTED_IMAGES),
        filtered={"not_image_suffix": filtered} if filtered else {},
    )


def suffix_of(path: str) -> str:
    name = path.rpartition("/")[2]
    return name[name.rindex(".") :] if "." in name[1:] else ""


def labels_of(*labels: Label) -> pa.Table:
    rows = [(*label, None)[:3] for label in labels]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
    return pa.table([list(range(len(rows))), *columns, [None] * len(rows)], schema=LABELS)


def classes(joined: Joined) -> dict[str, str]:
    return dict(zip(*(joined.images[name].to_pylist() for name in ("path", "class_name")), strict=True))


def image_faults(joined: Joined) -> dict[str, str]:
    return dict(zip(*(joined.rejected_images[name].to_pylist() for name in ("path", "reason")), strict=True))


def label_faults(joined: Joined) -> dict[int, str]:
    return dict(zip(*(joined.rejected_labels[name].to_pylist() for name in ("row", "reason")), strict=True))


def check(joined: Joined) -> None:
    """What holds of every join."""
    assert joined.images.schema == IMAGES
    assert joined.rejected_images.schema == REJECTED_IMAGES
    assert joined.rejected_labels.schema == REJECTED_LABELS
    joined.image_balance.check()
    assert joined.image_balance.rows_out == joined.images.num_rows
    assert joined.image_balance.rejected == Counter(joined.rejected_images["reason"].to_pylist())
    assert joined.images["uri"].to_pylist() == sorted(set(joined.images["uri"].to_pylist()))
    assert joined.rejected_images["uri"].to_pylist() == sorted(joined.rejected_images["uri"].to_pylist())
    for table in (joined.rejected_images, joined.rejected_labels):
        assert table["reason"].null_count == table["detail"].null_count == 0
    assert joined.images["class_name"].null_count == 0
    if joined.label_balance is not None:
        joined.label_balance.check()
        assert joined.label_balance.rows_out == joined.images.num_rows
        assert joined.label_balance.rejected == Counter(joined.rejected_labels["reason"].to_pylist())
        assert joined.rejected_labels["row"].to_pylist() == sorted(set(joined.rejected_labels["row"].to_pylist()))


FILES = ("1.png", "cats/1.jpg", "cats/2.jpg", "dogs/3.v2.png", "dogs/2.png", "twin.jpg", "twin.jpg.png", "x/a b.png")

MATCHES: list[tuple[str, str, str]] = [
    # why, the label's id, the file or the reason
    ("the path", "cats/1.jpg", "cats/1.jpg"),
    ("the path without suffix", "cats/1", "cats/1.jpg"),
    ("the name", "3.v2.png", "dogs/3.v2.png"),
    ("the name without suffix", "3.v2", "dogs/3.v2.png"),
    ("only one suffix may be left out", "3", "no_image"),
    ("the path goes before the name", "1", "1.png"),
    ("the path goes before the path without suffix", "twin.jpg", "twin.jpg"),
    ("and each file can still be named", "twin.jpg.png", "twin.jpg.png"),
    ("a name in two directories", "2", "ambiguous_image"),
    ("but its suffix tells", "2.png", "dogs/2.png"),
    ("a path is no name", "other/1.jpg", "no_image"),
    ("a path below another directory", "images/cats/1.jpg", "no_image"),
    ("case matters", "CATS/1.jpg", "no_image"),
    ("another suffix", "cats/1.png", "no_image"),
    ("from Windows", "cats\\1.jpg", "cats/1.jpg"),
    ("from a shell", "./cats/1", "cats/1.jpg"),
    ("spaces around", "  cats/1\t\r", "cats/1.jpg"),
    ("a tab within", "cats\t/1", "malformed_row"),
    ("spaces within", "a b", "x/a b.png"),
    ("another space", "a  b", "no_image"),
    ("a directory", "cats", "no_image"),
    ("a directory with its slash", "cats/", "no_image"),
    ("nothing but dots", "./", "no_image"),
    ("part of a name", "cat", "no_image"),
    ("what a pattern would match", "cats/?", "no_image"),
]


@pytest.mark.parametrize(("why", "image_id", "outcome"), MATCHES, ids=[case[0] for case in MATCHES])
def test_which_file_a_label_names(why: str, image_id: str, outcome: str) -> None:
    files = (*FILES, "anchor.png")
    joined = join_labels(listing_of(*files), labels_of((image_id, "found"), ("anchor", "other")))
    check(joined)
    found = [path for path, name in classes(joined).items() if name == "found"]
    assert (found or [label_faults(joined)[0]]) == [outcome]


def test_several_candidates_are_named() -> None:
    files = listing_of(*(f"{letter}/1.png" for letter in "abcde"), "z.png")
    joined = join_labels(files, labels_of(("1", "cat"), ("z", "dog")))
    assert joined.rejected_labels["detail"].to_pylist() == ["may be a/1.png, b/1.png, c/1.png and 2 more"]


def test_names_with_composed_and_decomposed_accents() -> None:
    """A Mac writes 'é' as 'e' and an accent, nearly everybody else as one character."""
    decomposed = normalize("NFD", "café/été.png")
    joined = join_labels(listing_of(decomposed), labels_of(("café/été", normalize("NFD", "crème"))), ["crème"])
    assert classes(joined) == {decomposed: "crème"}
    assert set(classes(join_labels(listing_of(decomposed), None, ["café"])).values()) == {"café"}


def test_files_that_only_a_disk_can_tell_apart() -> None:
    files = listing_of("é.png", normalize("NFD", "é.png"), "a\\b.png", "a/b.png", "ok.png")
    joined = join_labels(files, labels_of(("é", "cat"), ("a/b.png", "cat"), ("ok", "cat")))
    assert label_faults(joined) == {0: "ambiguous_image", 1: "ambiguous_image"}
    assert set(classes(join_labels(files, None))) == {"a/b.png"}


JUDGED: list[tuple[str, list[Label], list[str], dict[str, str], dict[int, str], int]] = [
    # why, labels, classes to take, faults of images a.png and b.png, faults of labels, exact copies
    ("all is well", [("a", "cat"), ("b", "dog")], [], {}, {}, 0),
    ("an image without label", [("a", "cat")], [], {"b.png": "unlabelled"}, {}, 0),
    ("a label without image", [("a", "cat"), ("b", "dog"), ("c", "dog")], [], {}, {2: "no_image"}, 0),
    ("an exact copy", [("a", "cat"), ("b", "dog"), ("a", "cat")], [], {}, {}, 1),
    ("a copy in another spelling", [("a", "cat"), ("b", "dog"), ("./a.png", " cat ")], [], {}, {}, 1),
    ("two classes", [("a", "cat"), ("b", "dog"), ("a", "dog")], [], {"a.png": "conflicting_labels"},
     {0: "conflicting_labels", 2: "conflicting_labels"}, 0),
    ("two classes in two spellings", [("a", "cat"), ("b", "dog"), ("a.png", "dog")], [],
     {"a.png": "conflicting_labels"}, {0: "conflicting_labels", 2: "conflicting_labels"}, 0),
    ("case tells classes apart", [("a", "cat"), ("b", "dog"), ("a", "Cat")], [], {"a.png": "conflicting_labels"},
     {0: "conflicting_labels", 2: "conflicting_labels"}, 0),
    ("copies in a conflict are no copies", [("a", "cat"), ("a", "cat"), ("a", "dog"), ("b", "dog")], [],
     {"a.png": "conflicting_labels"}, dict.fromkeys((0, 1, 2), "conflicting_labels"), 0),
    ("a conflict with a class that isn't taken", [("a", "cat"), ("b", "cat"), ("a", "dog")], ["cat"],
     {"a.png": "conflicting_labels"}, {0: "conflicting_labels", 2: "conflicting_labels"}, 0),
    ("no class", [("a", None), ("b", "dog")], [], {"a.png": "unlabelled"}, {0: "null_class"}, 0),
    ("a blank class", [("a", "  "), ("b", "dog")], [], {"a.png": "unlabelled"}, {0: "null_class"}, 0),
    ("no class, and one", [("a", None), ("b", "dog"), ("a", "cat")], [], {}, {0: "null_class"}, 0),
    ("no class, and one not taken", [("a", None), ("b", "dog"), ("a", "cat")], ["dog"], {"a.png": "unknown_class"},
     {0: "null_class", 2: "unknown_class"}, 0),
    ("no id", [(None, "cat"), (" ", "cat"), ("b", "dog")], [], {"a.png": "unlabelled"},
     {0: "null_id", 1: "null_id"}, 0),
    ("nothing at all", [(None, None), ("a", "cat"), ("b", "dog")], [], {}, {0: "null_id"}, 0),
    ("no class, no image", [("c", None), ("a", "cat"), ("b", "dog")], [], {}, {0: "null_class"}, 0),
    ("a class that isn't taken", [("a", "cat"), ("b", "cow")], ["cat", "dog"], {"b.png": "unknown_class"},
     {1: "unknown_class"}, 0),
    ("copies that aren't taken", [("a", "cat"), ("b", "cow"), ("b", "cow")], ["cat"], {"b.png": "unknown_class"},
     {1: "unknown_class", 2: "unknown_class"}, 0),
    ("spaces around the classes to take", [("a", "cat"), ("b", "dog")], [" cat", "dog "], {}, {}, 0),
    ("groups", [("a", "cat", "p1"), ("b", "dog", "p1")], [], {}, {}, 0),
    ("copies with their group", [("a", "cat", "p1"), ("b", "dog", None), ("a", "cat", "p1"), ("b", "dog", " ")], [],
     {}, {}, 2),
    ("two groups", [("a", "cat", "p1"), ("b", "dog", "p1"), ("a", "cat", "p2")], [], {"a.png": "conflicting_groups"},
     {0: "conflicting_groups", 2: "conflicting_groups"}, 0),
    ("a group and none", [("a", "cat", "p1"), ("b", "dog", "p1"), ("a", "cat", None)], [],
     {"a.png": "conflicting_groups"}, {0: "conflicting_groups", 2: "conflicting_groups"}, 0),
    ("two classes and groups", [("a", "cat", "p1"), ("b", "dog", "p1"), ("a", "dog", "p2")], [],
     {"a.png": "conflicting_labels"}, {0: "conflicting_labels", 2: "conflicting_labels"}, 0),
    ("a quote left open", [("a", "cat\nb,dog"), ("b", "dog")], [], {"a.png": "unlabelled"}, {0: "malformed_row"}, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "allowed", "images", "rows", "copies"), [case[1:] for case in JUDGED], ids=[case[0] for case in JUDGED]
)
def test_what_becomes_of_labels(
    labels: list[Label], allowed: list[str], images: dict[str, str], rows: dict[int, str], copies: int
) -> None:
    joined = join_labels(listing_of("a.png", "b.png", filtered=3), labels_of(*labels), allowed)
    check(joined)
    assert image_faults(joined) == images
    assert label_faults(joined) == rows
    assert joined.label_balance is not None
    assert joined.label_balance.deduplicated == copies
    assert joined.label_balance.rows_in == len(labels)
    assert joined.image_balance.rows_in == 5
    assert joined.image_balance.filtered == {"not_image_suffix": 3}


def test_details_name_what_differs() -> None:
    labels = labels_of(("a", "cat"), ("a", "dog"), ("b", "cat", "p2"), ("b", "cat"), ("c", "cow"), ("d", None))
    joined = join_labels(
        listing_of("a.png", "b.png", "c.png", "d.png", "e.png", "f.png"), concat(labels, "f", "cat"), ["cat"]
    )
    found = {row["path"]: (row["class_name"], row["detail"]) for row in joined.rejected_images.to_pylist()}
    assert found == {
        "a.png": (None, "cat, dog"),
        "b.png": ("cat", "groups (none), p2"),
        "c.png": ("cow", "not among the classes to take"),
        "d.png": (None, "its label: no class"),
        "e.png": (None, "no label names it alone"),
    }


def concat(labels: pa.Table, image_id: str, class_name: str) -> pa.Table:
    row = {"row": labels.num_rows, "image_id": image_id, "class_name": class_name, "group": None, "malformed": None}
    return pa.concat_tables([labels, pa.Table.from_pylist([row], schema=LABELS)])


def test_a_label_of_a_rejected_image_bears_its_reason() -> None:
    joined = join_labels(listing_of("x.png", "x.jpg", "y.png"), labels_of(("x.png", "cat"), ("x", "cat"), ("y", "cat")))
    check(joined)
    assert label_faults(joined) == {0: "duplicate_id", 1: "ambiguous_image"}
    assert image_faults(joined) == {"x.jpg": "duplicate_id", "x.png": "duplicate_id"}


def test_malformed_lines_are_counted(tmp_path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"image_id,class_name\na,cat\nb\n")
    labels = read_labels(str(tmp_path / "labels.csv"), "image_id", "class_name")
    joined = join_labels(listing_of("a.png", "b.png"), labels)
    check(joined)
    assert joined.rejected_labels.to_pylist() == [
        {
            "row": 1,
            "image_id": None,
            "class_name": None,
            "reason": "malformed_row",
            "detail": "wrong number of fields: b",
        }
    ]


def test_directories_as_classes() -> None:
    files = listing_of("cats/1.png", "cats/deep/2.png", "dogs/1.png", "top.png", "cats/3.png", "cats/3.jpg", filtered=1)
    assert folder_labels(files)["image_id"].to_pylist() == ["cats/1.png", "cats/deep/2.png", "dogs/1.png"]
    joined = join_labels(files, None, ["cats"])
    check(joined)
    assert joined.label_balance is None
    assert joined.rejected_labels.num_rows == 0
    assert classes(joined) == {"cats/1.png": "cats", "cats/deep/2.png": "cats"}
    assert image_faults(joined) == {
        "cats/3.jpg": "duplicate_id",
        "cats/3.png": "duplicate_id",
        "dogs/1.png": "unknown_class",
        "top.png": "unlabelled",
    }


NOTHING: list[tuple[str, list[str], list[Label] | None, list[str], str]] = [
    ("ids that don't match", ["c/1.png", "c/2.png"], [("n1", "cat"), ("n2", "cat")], [],
     r"Images rejected: 2 unlabelled\. Labels rejected: 2 no_image\. Ids in the labels: 'n1', 'n2'; "
     r"paths of the images: 'c/1\.png', 'c/2\.png'\. A label must name a path below the directory, or a file name"),
    ("no class is taken", ["1.png"], [("1", "cat")], ["Cat"],
     r"1 unknown_class\..*Correct the classes to take; the labels have 1 class: 'cat'\.$"),
    ("no directories", ["1.png", "2.png"], None, [],
     r"2 unlabelled\. Paths: '1\.png', '2\.png'; classes: none\. Put each image into a directory that is named"),
    ("directories not taken", ["cats/1.png", "dogs/2.png"], None, ["cow"],
     r"the labels have 2 classes: 'cats', 'dogs'\.$"),
    ("twins only", ["1.png", "1.jpg"], [("1.png", "cat")], [], r"2 duplicate_id\. Labels rejected: 1 duplicate_id"),
    ("no ids at all", ["1.png"], [(None, "cat")], [], r"1 null_id\. Ids in the labels: none;"),
    ("ids that can't be shown", ["1.png"], [("a\nb", "cat")], [], r"Ids in the labels: 'a\\x0ab';"),
    ("no labels at all", ["1.png"], [], [], r"Labels rejected: none\. Ids in the labels: none;"),
]  # fmt: skip


@pytest.mark.parametrize(("why", "paths", "labels", "allowed", "message"), NOTHING, ids=[case[0] for case in NOTHING])
def test_when_nothing_is_left_both_sides_are_shown(
    why: str, paths: list[str], labels: list[Label] | None, allowed: list[str], message: str
) -> None:
    table = None if labels is None else labels_of(*labels)
    with pytest.raises(SourceError, match=r"images '/data': no image has a usable label\. .*" + message):
        join_labels(listing_of(*paths), table, allowed)


def test_files_and_labels_together(root: str) -> None:
    for path in ("cats/001.jpg", "dogs/002.png", "dogs/003.png", "dogs/004.png"):
        storage.write_bytes(f"{root}/{path}", b"x")
    storage.write_bytes(f"{root}/labels.csv", b"image_id,class_name,scene\n001,cat,7\n002,dog,07\n3,dog,7\n004,cow,7\n")
    labels = read_labels(f"{root}/labels.csv", "image_id", "class_name", "scene")
    joined = join_labels(list_images(root), labels, ("cat", "dog"))
    check(joined)
    assert classes(joined) == {"cats/001.jpg": "cat", "dogs/002.png": "dog"}
    assert joined.images["group"].to_pylist() == ["7", "07"]
    assert image_faults(joined) == {"dogs/003.png": "unlabelled", "dogs/004.png": "unknown_class"}
    assert label_faults(joined) == {2: "no_image", 3: "unknown_class"}
    assert joined.image_balance.filtered == {"not_image_suffix": 1}


# Against a plain loop


Row = tuple[str | None, str | None, str | None]


def files_named(image_id: str, paths: list[str]) -> list[str]:
    key = image_id.replace("\\", "/").strip()
    while key.startswith("./"):
        key = key[2:]
    answers = [[path, path[: len(path) - len(suffix_of(path))]] for path in paths]
    names = [[PurePosixPath(spelling).name for spelling in spellings] for spellings in answers]
    for tier in (answers, names) if "/" not in key else (answers,):
        for choice in (0, 1):
            if found := [path for path, spellings in zip(paths, tier, strict=True) if spellings[choice] == key]:
                return found
    return []


def oracle(
    paths: list[str], labels: list[Row], allowed: list[str]
) -> tuple[dict[str, tuple[str, str | None]], dict[str, str], dict[int, str]]:
    """Class and group by path, faults by path, faults by row."""
    ids = [path[: len(path) - len(suffix_of(path))] for path in paths]
    twins = {path for path, image_id in zip(paths, ids, strict=True) if ids.count(image_id) > 1}
    faults: dict[int, str] = {}
    by_file: dict[str, list[int]] = {}
    for row, (image_id, class_name, _) in enumerate(labels):
        found = files_named(image_id or "", paths)
        if not (image_id or "").strip():
            faults[row] = "null_id"
        elif not (class_name or "").strip():
            faults[row] = "null_class"
        elif len(found) != 1:
            faults[row] = "ambiguous_image" if found else "no_image"
        elif found[0] in twins:
            faults[row] = "duplicate_id"
        else:
            by_file.setdefault(found[0], []).append(row)
    images: dict[str, tuple[str, str | None]] = {}
    bad = {path: "duplicate_id" if path in twins else "unlabelled" for path in paths}
    for path, rows in by_file.items():
        names = {(labels[row][1] or "").strip() for row in rows}
        groups = {(labels[row][2] or "").strip() or None for row in rows}
        reason = "conflicting_labels" if len(names) > 1 else "conflicting_groups" if len(groups) > 1 else None
        if reason is None and allowed and not names <= set(allowed):
            reason = "unknown_class"
        if reason is None:
            images[path] = (names.pop(), groups.pop())
            del bad[path]
        else:
            bad[path] = reason
            faults |= dict.fromkeys(rows, reason)
    return images, bad, faults


DIRECTORIES, SUFFIXES = ["", "c/", "d/", "c/d/"], ["", ".x", ".y", ".x.y"]
PATHS = st.lists(
    st.builds("".join, st.tuples(*(st.sampled_from(part) for part in (DIRECTORIES, "ab", SUFFIXES)))),
    min_size=1,
    max_size=8,
    unique=True,
)
IDS = st.builds(
    "".join,
    st.tuples(
        *(st.sampled_from(part) for part in (["", "", " ", "./"], [*DIRECTORIES, "", "c\\"], "aabz", ["", *SUFFIXES]))
    ),
)
ROWS = st.lists(
    st.tuples(
        IDS | st.sampled_from([None, " "]),
        st.sampled_from(["cat", "cat", "dog", " dog", "cow", "", None]),
        st.sampled_from([None, None, "p", " "]),
    ),
    max_size=10,
)


@settings(max_examples=200)
@given(PATHS, ROWS, st.sampled_from([[], ["cat"], ["cat", "dog"]]))
def test_the_join_is_that_of_a_plain_loop(paths: list[str], rows: list[Row], allowed: list[str]) -> None:
    images, image_reasons, label_reasons = oracle(paths, rows, allowed)
    listing = listing_of(*paths)
    if not images:
        with pytest.raises(SourceError, match="no image has a usable label"):
            join_labels(listing, labels_of(*rows), allowed)
        return
    joined = join_labels(listing, labels_of(*rows), allowed)
    check(joined)
    groups = joined.images["group"].to_pylist()
    assert dict(zip(classes(joined), zip(classes(joined).values(), groups, strict=True), strict=True)) == images
    assert image_faults(joined) == image_reasons
    assert label_faults(joined) == label_reasons


@settings(max_examples=50)
@given(PATHS, ROWS, st.randoms())
def test_the_order_of_the_labels_changes_no_image(paths: list[str], rows: list[Row], random) -> None:
    listing = listing_of(*paths)
    outcomes = []
    for _ in range(2):
        try:
            joined = join_labels(listing, labels_of(*rows))
        except SourceError:
            outcomes.append(None)
        else:
            outcomes.append((joined.images, joined.rejected_images, joined.label_balance))
        random.shuffle(rows)
    assert outcomes[0] == outcomes[1]


# Class ids


@pytest.mark.parametrize(
    ("why", "names", "previous", "ids"),
    [
        ("the first time, sorted", ["dog", "cat", "dog"], {}, {"cat": 0, "dog": 1}),
        ("a new one comes last", ["ant", "cat", "dog"], {"cat": 0, "dog": 1}, {"cat": 0, "dog": 1, "ant": 2}),
        ("one that is absent stays", ["ant"], {"cat": 0, "dog": 1}, {"cat": 0, "dog": 1, "ant": 2}),
        ("gaps stay", ["b", "a"], {"x": 7}, {"x": 7, "a": 8, "b": 9}),
        ("no class", [], {}, {}),
    ],
)
def test_class_ids(why: str, names: list[str], previous: dict[str, int], ids: dict[str, int]) -> None:
    assert list(assign_class_ids(iter(names), previous).items()) == list(ids.items())


@given(st.lists(st.lists(st.text(max_size=3), max_size=6), max_size=5))
def test_a_number_means_the_same_class_for_ever(versions: list[list[str]]) -> None:
    ids: dict[str, int] = {}
    for names in versions:
        before = ids
        ids = assign_class_ids(reversed(names), json.loads(json.dumps(before)))
        assert before.items() <= ids.items()
        assert set(ids) == set(before) | set(names)
        assert list(ids.values()) == list(range(len(ids)))
        assert assign_class_ids(names, ids) == ids


@pytest.mark.parametrize(
    ("previous", "message"),
    [
        ({"cat": 0, "dog": 0}, "classes cat, dog have the same id, 0"),
        ({"cat": -1}, "class 'cat' has the id -1, which is no whole number from 0 on"),
        ({"cat": True}, "'cat' has the id True"),
        ({"cat": 1.0}, "'cat' has the id 1.0"),
        ({"cat": "0"}, "'cat' has the id '0'"),
        ({"cat": None}, "'cat' has the id None"),
    ],
)
def test_previous_ids_that_cannot_be(previous: dict[str, int], message: str) -> None:
    with pytest.raises(CorruptVersion, match=message):
        assign_class_ids(["cat"], previous)
