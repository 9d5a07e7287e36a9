"""Types of columns hold for all of their values, wherever in whichever file of the source they are."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.features import sources
from tasks.features.csv_text import EXACT, TYPES, as_type, join, kind_of, polars_type
from tasks.features.plan import key_type_of, units_of
from tasks.features.rows import ColumnPlan, RowPlan, judge
from tasks.features.schema import read_csv, settled
from tasks.features.sources import SourceTable, inspect, read, read_units
from tasks.io.errors import SourceError
from tasks.io.listing import list_files
from tasks.io.notation import DEFAULT, missing_values

# The law of texts: a column's kind is the join of its values' kinds, and every value can be read as it

NUMBERS = ("1", "-7", " 8 ", "007", "+1", "1.5", "1e3", ".5", "-0", "nan", "inf", "1_0", str(EXACT + 1), "9" * 20)
TIMES = ("2024-01-31", "2024-01-31T10:00Z", "2024-01-31 10:00:00.5", "12:30")
text = st.sampled_from(["", " ", "NA", "true", "False", "a", *NUMBERS, *TIMES]) | st.text(
    "0123456789.-eE:TZ ", max_size=8
)


def kind(*values: str) -> str:
    return kind_of(pl.Series(values, dtype=pl.String), DEFAULT.typed)


@settings(max_examples=60)
@given(values=st.lists(text, max_size=8), cut=st.integers(0, 8))
def test_order_and_cut_make_no_difference(values: list[str], cut: int) -> None:
    whole = kind(*values)
    assert kind(*reversed(values)) == whole
    assert join([kind(value) for value in values]) == whole
    parts = pl.Series(values[:cut], dtype=pl.String), pl.Series(values[cut:], dtype=pl.String)
    assert kind_of(parts[1], DEFAULT.typed, kind_of(parts[0], DEFAULT.typed)) == whole


@settings(max_examples=60)
@given(values=st.lists(text, max_size=8))
def test_every_value_is_read_and_whole_numbers_keep_their_digits(values: list[str]) -> None:
    found = kind_of(pl.Series(values, dtype=pl.String), DEFAULT.typed)
    wanted = polars_type(TYPES[found])
    assert wanted is not None
    typed = pl.DataFrame({"x": pl.Series(values, dtype=pl.String)}).select(as_type(pl.col("x"), wanted, "UTC"))["x"]
    for value, one in zip(values, typed, strict=True):
        if value.strip() and value not in DEFAULT.typed:
            assert one is not None, f"{value!r} isn't a {found}"
            if value.strip().isdigit():
                assert str(int(one)) == value.strip() if found != "text" else one == value


# Files that begin with whole numbers

LONG = "".join(f"{number},x\n" for number in range(100_000, 250_000))
"""1.2 MB, more than a look at the beginning sees."""

LATER = [
    # what follows later, the type of the column, of a key
    ("a leading zero", "02139", pa.string(), "string"),
    ("text", "K1A 0B1", pa.string(), "string"),
    ("a fraction", "33.5", pa.float64(), "int64"),
    ("a missing value", "NA", pa.int64(), "int64"),
    ("an integer beyond 64 bits", "9" * 20, pa.string(), "string"),
]


@pytest.mark.parametrize(("why", "value", "wanted", "of_key"), LATER, ids=[case[0] for case in LATER])
def test_what_follows_counts_as_much_as_the_beginning(
    tmp_path: Path, why: str, value: str, wanted: pa.DataType, of_key: str
) -> None:
    (tmp_path / "a.csv").write_text("id,x\n" + LONG + f"{value},x\n")
    table = settled(inspect("events", str(tmp_path)), ["id"], DEFAULT)
    assert table.type_of("id") == wanted
    assert key_type_of(table, "id") == of_key


@pytest.mark.parametrize("values", [["1", "02139"], ["1", "x"], ["1", "2.5"], ["true", "1"], ["2024-01-01", "NA"]])
def test_blocks_and_files_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str]
) -> None:
    found = set()
    monkeypatch.setattr(sources, "_CSV_BLOCK", 64)
    for number in range(4):
        rows = [value for value in values for _ in range(50)]
        random.Random(number).shuffle(rows)
        place = tmp_path / str(number)
        place.mkdir()
        for file in range(1 + number % 2):
            (place / f"{file}.csv").write_text("x,y\n" + "".join(f"{row},1\n" for row in rows[file :: 1 + number % 2]))
        found.add(settled(inspect("events", str(place)), ["x"], DEFAULT).type_of("x"))
    assert found == {TYPES[kind_of(pl.Series(values), DEFAULT.typed)]}


def keys_of(table: SourceTable, column: str = "id") -> list[Any]:
    table = settled(table, [column], DEFAULT)
    key = ColumnPlan(
        name="key", source_name=column, kind="key", required=True, key_type=key_type_of(table, column) or "string"
    )
    rows = RowPlan(source="events", columns=(key,))
    judged = [judge(raw.frame, rows) for unit in units_of(table, rows, 10) for raw in read(unit)]
    return [key for piece in judged for key in piece.kept["key"]]


def test_keys_are_never_renumbered(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id\n1001\n1.5\n")
    (tmp_path / "b.csv").write_text("id\n01001\n")
    assert keys_of(inspect("events", str(tmp_path))) == ["1001", "1.5", "01001"]


def write(place: Path, **columns: pa.Array) -> str:
    for name, values in columns.items():
        pq.write_table(pa.table({"id": values}), place / f"{name}.parquet")
    return str(place)


def test_unsigned_keys_beyond_64_bits_with_a_sign_keep_their_digits(tmp_path: Path) -> None:
    uri = write(tmp_path, a=pa.array([1, 2**64 - 1], pa.uint64()), b=pa.array([-5], pa.int64()))
    assert keys_of(inspect("events", uri)) == ["1", str(2**64 - 1), "-5"]


@pytest.mark.parametrize("statistics", [True, False])
def test_a_file_without_values_takes_no_digits(tmp_path: Path, statistics: bool) -> None:
    large = pa.table({"id": pa.array([EXACT + 1], pa.int64())})
    for name, table in (("a", large), ("b", pa.table({"id": pa.nulls(1, pa.float64())}))):
        pq.write_table(table, tmp_path / f"{name}.parquet", write_statistics=statistics)
    table = settled(inspect("events", str(tmp_path)), ["id"], DEFAULT)
    assert table.type_of("id") == pa.int64()


def test_whole_numbers_that_no_float_holds_stay_exact_beside_floats(tmp_path: Path) -> None:
    uri = write(tmp_path, a=pa.array([EXACT + 1], pa.int64()), b=pa.array([0.5]))
    assert settled(inspect("events", uri), ["id"], DEFAULT).type_of("id") == pa.string()
    uri = write(tmp_path, a=pa.array([EXACT], pa.int64()), b=pa.array([0.5]))
    assert settled(inspect("events", uri), ["id"], DEFAULT).type_of("id") == pa.float64()


def test_a_truth_value_of_csv_is_no_number_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id\ntrue\n")
    table = settled(inspect("events", write(tmp_path, b=pa.array([1]))), ["id"], DEFAULT)
    assert table.type_of("id") == pa.string()


# Missing values


@pytest.mark.parametrize("quote", ["", '"'])
def test_quoted_or_not_a_missing_value_is_one(tmp_path: Path, quote: str) -> None:
    fields = ["NA", "", "null", "7", "N/A", "None"]
    lines = "".join(f"{quote}{field}{quote},{quote}{field}{quote}\n" for field in fields)
    (tmp_path / "a.csv").write_text("id,name\n" + lines)
    units = read_units(inspect("events", str(tmp_path)), ("id", "name"), 10, typed=["id"])
    frame = pl.concat(piece.frame for unit in units for piece in read(unit))
    assert frame["id"].to_list() == [None, None, None, "7", None, None]
    assert frame["name"].to_list() == ["NA", None, None, "7", "N/A", "None"]  # Namibia, and a person


def test_what_is_given_is_missing_everywhere_and_nothing_else_but_blanks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,name\n-,NA\nNA,-\n,7\n")
    units = read_units(
        inspect("events", str(tmp_path)), ("id", "name"), 10, missing=missing_values(["NA"]), typed=["id"]
    )
    frame = pl.concat(piece.frame for unit in units for piece in read(unit))
    assert frame.rows() == [("-", None), (None, "-"), (None, "7")]


# Tables that are read as a whole


def test_a_table_of_csv_is_read_with_types_that_hold(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,n,at\n" + "".join(f"{line},2024-01-31\n" for line in LONG.split()))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"id,n,at\n02139,y,NA\n"))
    table = read_csv("rows", str(tmp_path), list_files(str(tmp_path)))
    assert table.num_rows == 150_001
    assert table.slice(150_000).to_pylist() == [{"id": "02139", "n": "y", "at": None}]
    assert pa.types.is_date(table.schema.field("at").type)


def test_a_line_of_another_number_of_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,n\n1,2\n1,2,3\n")
    with pytest.raises(SourceError, match=r"a\.csv has a line of another number of fields.* 2: '1,2,3'; correct it"):
        read_csv("rows", str(tmp_path), list_files(str(tmp_path)))


# Columns of the path


def test_a_column_of_the_path_is_a_column(tmp_path: Path) -> None:
    for year, place in ((2023, "New%20York"), (2024, "__HIVE_DEFAULT_PARTITION__")):
        directory = tmp_path / f"year={year}" / f"place={place}"
        directory.mkdir(parents=True)
        (directory / "a.csv").write_text("id\n1\n2\n")
        pq.write_table(pa.table({"id": [3]}), directory / "b.parquet")
    table = settled(inspect("events", str(tmp_path)), ["year"], DEFAULT)
    assert table.type_of("year") == pa.int64()
    frames = [piece.frame for unit in read_units(table, ("year", "place"), 10, ("place",)) for piece in read(unit)]
    assert pl.concat(frames).rows() == [("2023", "New York")] * 3 + [("2024", None)] * 3
    assert keys_of(table, "year") == [2023] * 3 + [2024] * 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_that_contradicts_its_path_is_refused(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "month=01"
    directory.mkdir()
    content = pl.DataFrame({"id": [1, 2], "month": [1, 2]})
    content.write_csv(directory / "a.csv") if kind == "csv" else content.write_parquet(directory / "a.parquet")
    table = inspect("events", f"{tmp_path}/month=*")
    with pytest.raises(SourceError, match=r"a\.\w+: column 'month' holds '?2'?, but the file's path says month=01"):
        [piece for unit in read_units(table, ("id", "month"), 10) for piece in read(unit)]
    assert [piece.frame["id"].to_list() for unit in read_units(table, ("id",), 10) for piece in read(unit)] != []
