"""Sources that are wrong as a whole: each is refused before any row is read, by file, column and cure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.io.errors import SourceError
from tasks.runner import worth_retrying
from tests.bad_input.shop import ROWS, Files, Made, customers, here_and_now, make, products, put, transactions
from tests.tables import Proven

pytestmark = pytest.mark.usefixtures("ray_cluster")

GOOD = transactions()
TIMES = GOOD["timestamp"]


def one(**changed: Any) -> Files:
    return {"t.parquet": transactions(**changed)}


def two(first: dict[str, Any], second: dict[str, Any]) -> Files:
    return {"a.parquet": first, "b.parquet": second}


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    # row of the table, what, arguments of `make`, message
    ("a column is missing", "a key", {"transactions": one(customer_id=None)}, r"t\.parquet has no column 'customer_i"),
    (
        "a column is missing",
        "amount",
        {"transactions": one(amount=None)},
        r"t\.parquet has no column 'amount'.*map it: --transaction-columns",
    ),
    ("a column is missing", "time", {"transactions": one(timestamp=None)}, r"t\.parquet has no column 'timestamp'"),
    (
        "a column is missing",
        "customers",
        {"customers": {"c.parquet": customers(customer_id=None)}},
        r"customers: .*c\.parquet has no column 'customer_id'.*--customer-columns",
    ),
    (
        "a column is missing",
        "products",
        {"products": {"p.parquet": products(price=None)}},
        r"products: .*p\.parquet has no column 'price'",
    ),
    (
        "a column is renamed",
        "amounts",
        {"transactions": {"t.parquet": {**transactions(amount=None), "amounts": GOOD["amount"]}}},
        r"no column 'amount'\. Did you mean 'amounts'\?",
    ),
    (
        "a column is renamed",
        "capitals",
        {"transactions": {"t.parquet": {name.upper(): values for name, values in GOOD.items()}}},
        r"no column 'customer_id'\. Did you mean 'CUSTOMER_ID'\?",
    ),
    (
        "a column is of another type",
        "times as amounts",
        {"transactions": one(amount=TIMES)},
        r"'amount' of .*t\.parquet is of type timestamp.*'amount' is a number: it must be integers.*map another",
    ),
    (
        "a column is of another type",
        "durations as amounts",
        {"transactions": one(amount=[dt.timedelta(1)] * ROWS)},
        r"is of type duration.*must be integers, floats, decimals, or text of numbers",
    ),
    (
        "a column is of another type",
        "bytes as amounts",
        {"transactions": one(amount=[b"1"] * ROWS)},
        r"is of type binary.*must be integers, floats",
    ),
    (
        "a column is of another type",
        "integers as times",
        {"transactions": one(timestamp=list(range(ROWS)))},
        r"'timestamp' holds integers \(int64\); say what they count since 1970: --epoch-unit",
    ),
    (
        "a column is of another type",
        "booleans as keys",
        {"transactions": one(customer_id=[True] * ROWS)},
        r"is of type bool, but 'customer_id' is a key: it must be whole numbers or text",
    ),
    (
        "a column is of another type",
        "times as keys",
        {"customers": {"c.parquet": customers(customer_id=TIMES[:8])}},
        r"customers: column 'customer_id'.*timestamp.*it must be whole numbers or text; .*--customer-columns",
    ),
    (
        "a column is of another type",
        "decimals wider than can be read",
        {"customers": {"c.parquet": customers(age=pa.array([Decimal(1)] * 8, pa.decimal256(60, 1)))}},
        r"customers: column 'age'.*decimal256\(60, 1\), which can't be read; convert it to a plain type",
    ),
    *(
        (
            "a column is nested",
            f"{name} of {column}",
            {"transactions": one(**{column: [value] * ROWS})},
            rf"column '{column}'.*t\.parquet is of type {name}.*'{column}' is a .*: it must be",
        )
        for column in ("customer_id", "amount", "category")
        for name, value in (("list", [1]), ("struct", {"a": 1}))
    ),
    (
        "files differ: a column is missing",
        "required",
        {"transactions": two(GOOD, transactions(amount=None))},
        r"b\.parquet has no column 'amount'.*the files don't share one schema. Add it, or leave the file out",
    ),
    (
        "files differ: a column is missing",
        "optional, and a dimension has one of that name",
        {"transactions": two(GOOD, transactions(category=None)), "products": {"p.parquet": products()}},
        r"b\.parquet has no column 'category'.*the files don't share one schema",
    ),
    (
        "files differ: another type",
        "times of which some are integers",
        {"transactions": two(GOOD, transactions(timestamp=list(range(ROWS))))},
        r"holds integers \(int64\); say what they count",
    ),
    (
        "files differ: another type",
        "amounts of which some are lists",
        {"transactions": two(GOOD, transactions(amount=[[1.0]] * ROWS))},
        r"'amount' of .*b\.parquet is of type list",
    ),
    (
        "files differ: another type",
        "numbers and lists in a dimension",
        {"customers": two(customers(), customers(age=[[1]] * 8))},
        r"customers: column 'age' is of type int64 in .*a\.parquet and list.* in .*b\.parquet, which no type holds",
    ),
    ("no file", "an empty directory", {"transactions": {}}, r"no \.parquet or \.csv file found \(nothing is there\)"),
    ("no file", "a missing path", {"transactions": "/no/such/place"}, r"'/no/such/place': no .*\(nothing is there\)"),
    ("no file", "a glob", {"transactions": "/no/such/*.csv"}, r"'/no/such/\*\.csv': no .*give a file, directory, glob"),
    (
        "no file",
        "other files",
        {"transactions": {"x.json": "{}", "y.csv.bz2": b""}},
        r"it holds 2 other files, such as .*x\.json",
    ),
    ("a file without rows", "of 0 bytes", {"transactions": {"t.parquet": b""}}, r"t\.parquet can't be read.*0 bytes"),
    (
        "a file without rows",
        "Parquet",
        {"transactions": {"t.parquet": pa.table(GOOD).slice(0, 0)}},
        r"transactions '.*' has no rows in its 1 files",
    ),
    (
        "a file without rows",
        "customers",
        {"customers": {"c.parquet": pa.table(customers()).slice(0, 0)}},
        r"customers '.*' has no rows in its 1 files",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[f"{case[0]}: {case[1]}" for case in REFUSED])
def test_refused_before_any_row_is_read(
    tmp_path: Path, proven: Proven, case: tuple[str, str, dict[str, Any], str]
) -> None:
    row, _, arguments, message = case
    given = {"transactions": {"good.parquet": GOOD}, **arguments}
    with pytest.raises(SourceError, match=f"(?s){message}") as caught:
        make(tmp_path, **given)
    assert not worth_retrying(caught.value)
    proven(row, "feature-store", "refused, naming file, column and cure" if "column" in row else "refused")


@pytest.mark.parametrize("column", range(5), ids=list(GOOD))
def test_a_flipped_byte_is_found_by_the_pages_checksum(tmp_path: Path, proven: Proven, column: int) -> None:
    file = tmp_path / "t.parquet"
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table(GOOD), file, **options)
    metadata = pq.read_metadata(file).row_group(0).column(column)
    data = bytearray(file.read_bytes())
    data[metadata.data_page_offset + metadata.total_compressed_size - 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(SourceError, match=r"t\.parquet can't be read as parquet.*(CRC|damaged)"):
        make(tmp_path, str(file))
    proven("a byte of a Parquet page is flipped", "feature-store", "refused if the file has checksums, not tried again")


def test_a_damaged_page_is_told_from_a_broken_connection(tmp_path: Path, proven: Proven) -> None:
    """The footer is whole, so that it is a task on Ray that meets it; its error comes back as it is."""
    place = Path(put(tmp_path / "t", {"t.parquet": GOOD}))
    metadata = pq.read_metadata(place / "t.parquet").row_group(0).column(3)
    data = bytearray((place / "t.parquet").read_bytes())
    start = metadata.dictionary_page_offset or metadata.data_page_offset
    for position in range(start, start + 12):
        data[position] ^= 0xFF
    (place / "t.parquet").write_bytes(data)
    with pytest.raises(SourceError, match=r"t\.parquet can't be read as parquet, it may be damaged") as caught:
        make(tmp_path, str(place))
    assert not worth_retrying(caught.value)
    proven("a page of a Parquet file is damaged", "feature-store", "refused, not tried again")


@pytest.mark.parametrize("cut", [1, 8, 300])
def test_a_file_that_is_cut_short(tmp_path: Path, proven: Proven, cut: int) -> None:
    place = Path(put(tmp_path / "t", {"t.parquet": GOOD}))
    (place / "t.parquet").write_bytes((place / "t.parquet").read_bytes()[:-cut])
    with pytest.raises(SourceError, match=r"t\.parquet can't be read as parquet: .*it may be cut short"):
        make(tmp_path, str(place))
    proven("a Parquet file is cut short", "feature-store", "refused")


# What differs, but means the same, gives the same features


def expected(root: Path, twice: bool = False) -> list[Made]:
    return make(root / "expected", two(GOOD, GOOD) if twice else one())


def assert_alike(found: list[Made], wanted: list[Made]) -> None:
    for one_made, other in zip(found, wanted, strict=True):
        ours, theirs = one_made.features, other.features
        key = ours.columns[0]
        ours[key] = ours[key].astype(str)
        theirs[key] = theirs[key].astype(str)
        assert list(ours.columns) == list(theirs.columns)
        for name in ours.columns:
            assert ours[name].to_list() == theirs[name].to_list(), f"{name} differs"
        assert one_made.gate.verdict == other.gate.verdict == "pass"


def texts(name: str) -> list[str]:
    return [value.isoformat() if isinstance(value, dt.datetime) else str(value) for value in GOOD[name]]


SAME: list[tuple[str, str, Callable[[], Files]]] = [
    ("files differ: more columns, another order", "extra", lambda: two(GOOD, {"x": [1] * ROWS, **GOOD})),
    (
        "files differ: more columns, another order",
        "order",
        lambda: two(GOOD, {name: GOOD[name] for name in reversed(GOOD)}),
    ),
    (
        "files differ: unit and zone of times",
        "units",
        lambda: two(
            transactions(timestamp=pa.array(TIMES, pa.timestamp("ms", "UTC"))),
            transactions(timestamp=pa.array(TIMES, pa.timestamp("ns", "Asia/Tokyo"))),
        ),
    ),
    (
        "files differ: unit and zone of times",
        "naive and with a zone",
        lambda: two(GOOD, transactions(timestamp=[time.replace(tzinfo=None) for time in TIMES])),
    ),
    (
        "files differ: unit and zone of times",
        "text with offsets",
        lambda: two(
            GOOD,
            transactions(
                timestamp=[
                    time.astimezone(dt.timezone(dt.timedelta(hours=n % 9 - 4))).isoformat()
                    for n, time in enumerate(TIMES)
                ]
            ),
        ),
    ),
    ("files differ: another type", "keys as text", lambda: two(GOOD, transactions(customer_id=texts("customer_id")))),
    (
        "files differ: another type",
        "keys as floats",
        lambda: two(GOOD, transactions(product_id=[float(key) for key in GOOD["product_id"]])),
    ),
    (
        "files differ: another type",
        "keys as decimals",
        lambda: two(
            GOOD,
            transactions(customer_id=pa.array(map(Decimal, GOOD["customer_id"]), pa.decimal128(38, 2))),
        ),
    ),
    (
        "files differ: another type",
        "amounts as text",
        lambda: two(GOOD, transactions(amount=pa.array(texts("amount"), pa.large_string()))),
    ),
    (
        "files differ: another type",
        "amounts as decimals",
        lambda: two(GOOD, transactions(amount=pa.array(map(Decimal, texts("amount")), pa.decimal128(9, 2)))),
    ),
    (
        "files differ: another type",
        "dictionaries",
        lambda: two(GOOD, transactions(category=pa.array(GOOD["category"]).dictionary_encode())),
    ),
]


@pytest.mark.parametrize("case", SAME, ids=[f"{case[0]}: {case[1]}" for case in SAME])
def test_what_means_the_same_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proven: Proven, case: tuple[str, str, Callable[[], Files]]
) -> None:
    row, _, files = case
    here_and_now(monkeypatch)
    assert_alike(make(tmp_path, files()), expected(tmp_path, twice=True))
    proven(row, "feature-store", "the same features")


ODD = ["a b", "q\"uo'te", "__index_level_0__", "", "\n", "Amount", "AMOUNT", "_reason", "_file", "_row", "as_of", "😀"]


def test_columns_of_odd_names_stand_beside_ours(tmp_path: Path, proven: Proven) -> None:
    odd = {**{name: ["x"] * ROWS for name in ODD}, **GOOD}
    assert_alike(make(tmp_path, {"t.parquet": odd}), expected(tmp_path))
    proven("column names with spaces, quotes, other capitals", "feature-store", "the same features")


@pytest.mark.parametrize("name", ODD)
def test_a_column_of_an_odd_name_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proven: Proven, name: str
) -> None:
    """Also where rows are rejected, whose columns stand beside our own `_reason`."""
    here_and_now(monkeypatch)
    spoiled = {**transactions(amount=None), name: [None, *GOOD["amount"][1:]]}
    made = make(tmp_path, {"t.parquet": spoiled}, transaction_columns={"amount": name})
    assert [one_made.reasons for one_made in made] == [{"null_amount": 1}] * 2
    assert made[0].features["total_spent"].sum() == sum(GOOD["amount"][1:])
    proven("column names with spaces, quotes, other capitals", "feature-store", "mapped as any other")


def test_a_dimensions_days_and_times_are_brought_together(tmp_path: Path, proven: Proven) -> None:
    """A day in one file and a time in another: neither loses anything."""
    late = [dt.datetime(2020, 1, 1, 17, 30)] * 4
    first, second = (
        {name: values[part] for name, values in customers().items()} for part in (slice(0, 4), slice(4, 8))
    )
    made, _ = make(tmp_path, one(), two(first, {**second, "signup_date": late}))
    days = made.features["signup_date"].to_list()
    assert [day.hour for day in days] == [0] * 4 + [17] * 4
    proven("files differ: another type", "feature-store", "a type that holds both")


def test_a_truth_value_is_not_made_of_a_number(tmp_path: Path) -> None:
    first, second = customers(age=[True] * 8), customers(age=[7] * 8, customer_id=list(range(8, 16)))
    made, _ = make(tmp_path, one(customer_id=[row % 16 for row in range(ROWS)]), two(first, second))
    assert set(made.features["age"]) == {1, 7}
