"""Source tables: whatever can be wrong with one is named, and every row is read once and in order."""

from __future__ import annotations

import datetime as dt
import gzip
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.features.schema import settled
from tasks.features.sources import SourceTable, check_columns, inspect, read, read_units
from tasks.io.errors import SourceError
from tasks.io.notation import DEFAULT

CSV = b"id,name\n1,a\n2,b\n"


def write(directory: Path, **files: bytes | pa.Table) -> str:
    """Files by name, with '__' for '.' and '___' for '/'."""
    for name, content in files.items():
        path = directory / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path)
    return str(directory)


def rows_of(table: SourceTable, columns: tuple[str, ...], rows_per_unit: int = 10) -> list[tuple[object, ...]]:
    pieces = [piece.frame for unit in read_units(table, columns, rows_per_unit) for piece in read(unit)]
    return [row for piece in pieces for row in piece.rows()]


def ids(*values: int | None) -> pa.Table:
    return pa.table({"id": pa.array(values, pa.int64())})


PLACES: list[tuple[str, Callable[[Path], str], list[str]]] = [
    # where, how it is named, the files found
    ("a file", lambda d: f"{d}/b.parquet", ["b.parquet"]),
    ("a CSV file", lambda d: f"{d}/c.csv", ["c.csv"]),
    ("a file URI", lambda d: f"file://{d}/b.parquet", ["b.parquet"]),
    ("a directory, and those below", str, ["a.PARQUET", "b.parquet", "c.csv", "month=1/d.parquet"]),
    ("a glob", lambda d: f"{d}/*.parquet", ["b.parquet"]),
    ("a glob over directories", lambda d: f"{d}/**/*.parquet", ["b.parquet", "month=1/d.parquet"]),
    ("a glob of directories", lambda d: f"{d}/month=*", ["month=1/d.parquet"]),
]


@pytest.mark.parametrize(("why", "uri", "found"), PLACES, ids=[case[0] for case in PLACES])
def test_places(tmp_path: Path, why: str, uri: Callable[[Path], str], found: list[str]) -> None:
    write(tmp_path, a__PARQUET=ids(1), b__parquet=ids(2), c__csv=b"id\n3\n")
    write(tmp_path, _hidden__parquet=ids(9), notes__txt=b"id\n9\n", _SUCCESS=b"")
    write(tmp_path / "month=1", d__parquet=ids(4))
    table = inspect("events", uri(tmp_path))
    assert [Path(file.info.uri).relative_to(tmp_path).as_posix() for file in table.files] == found
    numbers = {"a": "1", "b": "2", "c": "3", "d": "4"}
    expected = [numbers[Path(name).stem] for name in found]
    assert [str(row[0]) for row in rows_of(table, ("id",))] == expected  # in the order of the files


WRONG: list[tuple[str, dict[str, bytes | pa.Table], str]] = [
    ("nothing is there", {}, r"no \.parquet or \.csv file found \(nothing is there\); give a file, directory, glob"),
    ("other files", {"x__txt": b"a", "y__json": b"{}"}, r"\(it holds 2 other files, such as .*x\.txt\)"),
    ("an empty CSV file", {"x__csv": b""}, r"x\.csv can't be read as csv: .*empty: it has not even a header"),
    ("a blank CSV file", {"x__csv": b"\n\n"}, r"x\.csv can't be read as csv: .*empty"),
    ("a CSV header only", {"x__csv": b"id,name\n"}, r"has no rows in its 1 files"),
    ("headers only", {"x__csv": b"id\n", "y__csv": b"id\n"}, r"has no rows in its 2 files"),
    ("Parquet without rows", {"x__parquet": ids()}, r"has no rows in its 1 files"),
    ("CSV in Latin-1", {"x__csv": "id\nKöln\n".encode("latin-1")}, r"x\.csv can't be read as csv: .*UTF-?8"),
    ("a header in Latin-1", {"x__csv": "größe\n1\n".encode("latin-1")}, r"x\.csv can't be read as csv: .*utf-8"),
    ("Parquet of no bytes", {"x__parquet": b""}, r"x\.parquet can't be read as parquet: .*0 bytes"),
    ("CSV named Parquet", {"x__parquet": CSV}, r"x\.parquet can't be read as parquet: .*another format"),
    ("CSV named gzip", {"x__csv__gz": CSV}, r"x\.csv\.gz can't be read as csv: it can't be decompressed"),
    ("a column twice", {"x__csv": b"id,id\n1,2\n"}, r"x\.csv has several columns named 'id'; rename or remove one"),
    ("one of many is broken", {"x__csv": CSV, "y__parquet": CSV}, r"y\.parquet can't be read"),
]


@pytest.mark.parametrize(("why", "files", "message"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_named(tmp_path: Path, why: str, files: dict[str, bytes | pa.Table], message: str) -> None:
    uri = write(tmp_path, **files)
    with pytest.raises(SourceError, match=f"(?s)events.*{message}"):
        inspect("events", uri)


@pytest.mark.parametrize("cut", [8, 100, 1])
def test_a_parquet_file_that_is_cut_short(tmp_path: Path, cut: int) -> None:
    write(tmp_path, x__parquet=ids(*range(100)))
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-cut])
    with pytest.raises(SourceError, match=r"x\.parquet can't be read as parquet: .*it may be cut short"):
        inspect("events", str(tmp_path))


def test_a_csv_file_that_breaks_further_down(tmp_path: Path) -> None:
    """Its beginning is looked at before the work; what comes after a megabyte is met while reading."""
    good = b"".join(b"%d,some text\n" % number for number in range(100_000))
    table = inspect("events", write(tmp_path, x__csv=b"id,name\n" + good + b"1,K\xf6ln\n"))
    with pytest.raises(SourceError, match=r"x\.csv can't be read as csv: .*UTF8"):
        rows_of(table, ("id", "name"))


def test_compressed_csv(tmp_path: Path) -> None:
    table = inspect("events", write(tmp_path, x__csv__gz=gzip.compress(CSV)))
    assert rows_of(table, ("id", "name")) == [("1", "a"), ("2", "b")]


CSV_TEXT: list[tuple[str, bytes, list[tuple[object, ...]]]] = [
    # every column as text, null where nothing stands
    ("plain", CSV, [("1", "a"), ("2", "b")]),
    ("a byte order mark", b"\xef\xbb\xbf" + CSV, [("1", "a"), ("2", "b")]),
    ("Windows line ends", CSV.replace(b"\n", b"\r\n"), [("1", "a"), ("2", "b")]),
    ("no line end at the end", CSV[:-1], [("1", "a"), ("2", "b")]),
    ("blank lines", CSV.replace(b"\n2", b"\n\n2"), [("1", "a"), ("2", "b")]),
    ("a line end in quotes", b'id,name\n1,"a\nb"\n2,"c,d"\n', [("1", "a\nb"), ("2", "c,d")]),
    ("quotes in quotes", b'id,name\n1,"say ""hi"""\n', [("1", 'say "hi"')]),
    ("nulls", b"id,name\n,null\nNULL,\n", [(None, None), (None, None)]),
    ("quoted or not, the same are null", b'id,name\n"","null"\n', [(None, None)]),
    ("other columns between", b"id,junk,name\n1,x,a\n", [("1", "a")]),
    ("numbers stay as they are written", b"id,name\n007,1.50\n", [("007", "1.50")]),
    ("spaces stay", b"id,name\n 1 , a\n", [(" 1 ", " a")]),
    ("letters of any language", "id,name\n1,Łódź\n".encode(), [("1", "Łódź")]),
]  # fmt: skip


@pytest.mark.parametrize(("why", "text", "rows"), CSV_TEXT, ids=[case[0] for case in CSV_TEXT])
def test_csv(tmp_path: Path, why: str, text: bytes, rows: list[tuple[object, ...]]) -> None:
    table = inspect("events", write(tmp_path, x__csv=text))
    assert table.has("name")
    assert rows_of(table, ("id", "name")) == rows
    assert rows_of(table, ("name", "id")) == [row[::-1] for row in rows]


def test_csv_lines_with_a_wrong_number_of_fields_are_kept_apart(tmp_path: Path) -> None:
    uri = write(tmp_path, x__csv=b"id,name\n1,a\n2\n3,c\n4,d,e\n", y__csv=b"id,name\n5\n")
    pieces = [piece for unit in read_units(inspect("events", uri), ("id", "name"), 10) for piece in read(unit)]
    assert [piece.frame["id"].to_list() for piece in pieces] == [["1", "3"], []]
    assert [piece.malformed for piece in pieces] == [("2", "4,d,e"), ("5",)]


def test_a_csv_file_longer_than_its_look_ahead(tmp_path: Path) -> None:
    """The look-ahead of a megabyte ends within a quoted field."""
    lines = [f'{number},"one line\nand another, {number}"\n' for number in range(50_000)]
    table = inspect("events", write(tmp_path, x__csv=("id,name\n" + "".join(lines)).encode()))
    assert settled(table, ["id"], DEFAULT).type_of("id") == pa.int64()
    found = rows_of(table, ("id",))
    assert found == [(str(number),) for number in range(50_000)]


TYPES = [
    # values of a CSV column, the type it is taken to be of
    ("integers", ["1", "-2", "0"], pa.int64()),
    ("integers with gaps", ["1", "", "NULL"], pa.int64()),
    ("leading zeros are text", ["007", "12"], pa.string()),
    ("floats", ["1.0", "2.5"], pa.float64()),
    ("beyond 64 bits, text keeps the digits", ["9" * 20, "1"], pa.string()),
    ("a plus is text", ["+1", "2"], pa.string()),
    ("dates", ["2024-01-01", "2024-01-02"], pa.date32()),
    ("text", ["1", "a"], pa.string()),
    ("nothing", ["", ""], pa.null()),
]


@pytest.mark.parametrize(("why", "values", "kind"), TYPES, ids=[case[0] for case in TYPES])
def test_types_of_csv_columns(tmp_path: Path, why: str, values: list[str], kind: pa.DataType) -> None:
    text = "x,y\n" + "".join(f"{value},1\n" for value in values)
    table = settled(inspect("events", write(tmp_path, x__csv=text.encode())), ["x"], DEFAULT)
    assert table.type_of("x") == kind


FILES = [
    # types of a column in two files, its type in the source
    (pa.int64(), pa.int64(), pa.int64()),
    (pa.null(), pa.float64(), pa.float64()),
    (pa.null(), pa.null(), pa.null()),
    (pa.int32(), pa.int64(), pa.int64()),
    (pa.int64(), pa.float64(), pa.float64()),
    (pa.float32(), pa.int8(), pa.float64()),
    (pa.int64(), pa.string(), pa.string()),
    (pa.date32(), pa.timestamp("ms"), pa.timestamp("us")),
    (pa.timestamp("us"), pa.timestamp("us", "Asia/Tokyo"), pa.timestamp("us", "UTC")),
    (pa.bool_(), pa.int8(), pa.int64()),
    (pa.decimal128(5, 2), pa.int8(), pa.float64()),
    (pa.bool_(), pa.string(), pa.string()),
    (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.string()), pa.string()),
    (pa.large_string(), pa.float64(), pa.string()),
]


@pytest.mark.parametrize(("first", "second", "together"), FILES, ids=str)
def test_files_may_differ_in_a_columns_type(
    tmp_path: Path, first: pa.DataType, second: pa.DataType, together: pa.DataType
) -> None:
    for name, kind in (("a", first), ("b", second)):
        pq.write_table(pa.table({"x": pa.nulls(1, kind)}), tmp_path / f"{name}.parquet")
    assert inspect("events", str(tmp_path)).type_of("x") == together


MISSING = [
    # files, wanted columns (ours: theirs), message
    (
        {"x__csv": b"id,amout\n1,2\n"},
        {"amount": "amount"},
        r"transactions: .*x\.csv has no column 'amount'. Did you mean 'amout'\? If it bears another name, map it: "
        r"--transaction-columns '\{\"amount\": \"…\"\}'. Its columns: id, amout",
    ),
    ({"x__csv": CSV}, {"amount": "amount"}, r"has no column 'amount'. If it bears another name, map it"),
    (
        {"x__csv": b"id,sales\n1,2\n"},
        {"amount": "sale"},
        r"no column 'sale'. Did you mean 'sales'\? The mapping says that it is 'amount'",
    ),
    (
        {"x__csv": b"id,amount\n1,2\n", "y__csv": CSV},
        {"amount": "amount"},
        r"y\.csv has no column 'amount'. Other files of the source have it: the files don't share one schema",
    ),
]


@pytest.mark.parametrize(("files", "wanted", "message"), MISSING, ids=["misspelled", "absent", "mapped", "one file"])
def test_missing_columns(tmp_path: Path, files: dict[str, bytes], wanted: dict[str, str], message: str) -> None:
    table = inspect("transactions", write(tmp_path, **files))
    with pytest.raises(SourceError, match=message):
        check_columns(table, wanted)


def test_files_of_one_schema_are_looked_at_once(tmp_path: Path) -> None:
    files: dict[str, bytes | pa.Table] = {f"{number:02d}__parquet": ids(number) for number in range(20)}
    source = write(tmp_path, **files, x__parquet=pa.table({"id": ["x"]}), y__parquet=ids(None))
    table = inspect("events", source)
    assert [len(table.files), len(list(table.unlike))] == [22, 2]
    assert set(table.types("id")) == {pa.int64(), pa.string()}
    known = settled(table, ["id"], DEFAULT)
    assert len(list(known.unlike)) == 22, "files may differ in their values"
    assert set(known.types("id")) == {file.type_of("id") for file in known.files}
    alone = inspect("events", write(tmp_path / "alone", **files))
    assert settled(alone, ["id"], DEFAULT) is alone


def test_files_may_differ_in_what_is_not_wanted(tmp_path: Path) -> None:
    files = {"a__parquet": pa.table({"id": [1], "x": [1]}), "b__parquet": pa.table({"y": ["?"], "id": [2]})}
    table = inspect("events", write(tmp_path, **files))
    check_columns(table, {"key": "id"})
    assert table.has("id")
    assert not table.has("x")
    assert rows_of(table, ("id",)) == [(1,), (2,)]


def test_a_header_without_rows_among_others(tmp_path: Path) -> None:
    table = inspect("events", write(tmp_path, a__csv=b"id,name\n", b__csv=CSV, c__parquet=ids()))
    assert rows_of(table, ("id",)) == [("1",), ("2",)]


@settings(max_examples=60)
@given(
    files=st.lists(st.tuples(st.integers(0, 25), st.integers(1, 9)), min_size=1, max_size=4),
    rows_per_unit=st.integers(1, 40),
)
def test_units_cover_every_row_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[int, int]], rows_per_unit: int
) -> None:
    directory = tmp_path_factory.mktemp("units")
    expected = []
    for number, (rows, group) in enumerate(files):
        values = [number * 100 + row for row in range(rows)]
        expected += values
        pq.write_table(ids(*values), directory / f"{number}.parquet", row_group_size=group)
    if not expected:
        return
    table = inspect("events", str(directory))
    units = read_units(table, ("id",), rows_per_unit)
    assert rows_of(table, ("id",), rows_per_unit) == [(value,) for value in expected]
    for unit in units:
        (piece,) = read(unit)
        assert piece.frame["id"][0] % 100 == piece.first_row  # the number of the row in its file
        assert piece.frame.height <= rows_per_unit or len(unit.row_groups) == 1
    assert table.estimated_rows() == len(expected)


def test_row_numbers_of_csv(tmp_path: Path) -> None:
    (unit,) = read_units(inspect("events", write(tmp_path, x__csv=CSV)), ("id",), 1)
    assert [piece.first_row for piece in read(unit)] == [0]


def test_text_with_few_values_is_read_as_categories(tmp_path: Path) -> None:
    content = pa.table({"kind": ["a", "b", None, "a"], "id": [1, 2, 3, 4]})
    table = inspect("events", write(tmp_path, x__parquet=content, y__csv=b"kind,id\na,5\n"))
    units = read_units(table, ("kind", "id"), 10, dictionary=("kind", "id"))
    frames = [piece.frame for unit in units for piece in read(unit)]
    assert frames[0].dtypes == [pl.Categorical, pl.Int64]
    assert frames[0]["kind"].to_list() == ["a", "b", None, "a"]
    assert frames[1]["kind"].to_list() == ["a"]


def test_the_record_names_every_file_and_its_fingerprint(tmp_path: Path) -> None:
    uri = write(tmp_path, x__csv=CSV, y__parquet=ids(1))
    record = inspect("events", uri).record(3)
    assert (record.name, record.uri, record.rows) == ("events", uri, 3)
    assert [Path(file.uri).name for file in record.files] == ["x.csv", "y.parquet"]
    assert record.files[0].bytes == len(CSV)
    assert record.files[0].fingerprint.startswith("blake2b:")
    (tmp_path / "x.csv").write_bytes(CSV.replace(b"a", b"z"))
    changed = inspect("events", uri).record(3)
    assert changed.files[0].fingerprint != record.files[0].fingerprint
    assert changed.files[1] == record.files[1]


def test_times_of_parquet_stay_times(tmp_path: Path) -> None:
    moment = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    table = inspect(
        "events", write(tmp_path, x__parquet=pa.table({"at": pa.array([moment], pa.timestamp("ns", "UTC"))}))
    )
    assert rows_of(table, ("at",)) == [(moment,)]


def test_a_link_that_leads_nowhere_is_no_file_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id\n1\n")
    (tmp_path / "b.csv").symlink_to(tmp_path / "none.csv")
    with pytest.raises(SourceError, match=r"events: .*b\.csv isn't there: it is a link that leads nowhere.*dvc pull"):
        inspect("events", str(tmp_path))
