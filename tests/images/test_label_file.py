"""The file of labels: every value as it is written, and whatever can be wrong with the file is named."""

from __future__ import annotations

import datetime as dt
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images.label_file import LABELS, labels_record, read_labels
from tasks.io import storage
from tasks.io.errors import SourceError
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
