"""CSV text that is wrong: no row of it is lost unseen."""

from __future__ import annotations

import csv as python_csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.features.csv_text import QuotedText
from tasks.features.sources import inspect, read, read_units
from tasks.io.errors import SourceError
from tasks.io.notation import DEFAULT
from tests.bad_input.shop import ROWS, Files, csv, here_and_now, make, put, transactions
from tests.tables import Proven

GOOD = transactions()
TEXT = csv(GOOD)
HEADER = TEXT.splitlines()[0]
MARKED = "the quoted field that begins in line {} {}, and would swallow the rows behind it; close it, or double"


@pytest.fixture(autouse=True)
def _in_this_process(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here_and_now(monkeypatch)


GOES_ON = "goes on behind the quote that closes it"
UNCLOSED = (
    ("at the beginning", TEXT.replace("toys", '"toys', 1), 3, "isn't closed"),
    ("at the end", TEXT + '1,2,2024-05-03,5,"toys', ROWS + 2, "isn't closed"),
    ("two of them", TEXT.replace("toys", '"toys', 2), 3, GOES_ON),
    ("between those that are", TEXT.replace("toys", '"toys', 1).replace("food", '"food"'), 3, GOES_ON),
)
REFUSED: list[tuple[str, str, str | bytes, str]] = [
    ("CSV is not in UTF-8", "Latin-1", TEXT.replace("toys", "jouët").encode("latin-1"), r"can't be read.*not in UTF-8"),
    ("CSV is not in UTF-8", "UTF-16", TEXT.encode("utf-16"), r"can't be read as csv.*not in UTF-8"),
    ("CSV is not in UTF-8", "UTF-16, no mark", TEXT.encode("utf-16-le"), r"NUL bytes, as UTF-16 does: write"),
    *(
        ("CSV with a quote that isn't closed", which, text, MARKED.format(line, fault))
        for which, text, line, fault in UNCLOSED
    ),
    ("CSV of other separators", "semicolons", csv(GOOD, ";"), r"Its fields are separated by semicolons; only commas"),
    ("CSV of other separators", "tabs", csv(GOOD, "\t"), r"Its fields are separated by tabs; only commas are read"),
    ("CSV of other separators", "bars", csv(GOOD, "|"), r"Its fields are separated by vertical bars"),
    ("CSV of other separators", "spaces alone", csv(GOOD, " "), r"Its fields are separated by spaces; only commas"),
    ("CSV of other separators", "spaces", TEXT.replace(",", ", "), r"Did you mean ' product_id'\?"),
    ("a file without rows", "no bytes", b"", r"the file is empty: it has not even a header"),
    ("a file without rows", "a header", HEADER + "\n", r"has no rows in its 1 files"),
    ("a file without rows", "a header, no line end", HEADER, r"has no rows in its 1 files"),
    ("CSV without its header", "", TEXT.split("\n", 1)[1], r"several columns named '0'|has no column"),
    ("the same column twice", "", f"amount,{TEXT}".replace("\n", "\n1,")[:-2], r"several columns named 'amount'"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[f"{case[0]}: {case[1]}" for case in REFUSED])
def test_refused(tmp_path: Path, proven: Proven, case: tuple[str, str, str | bytes, str]) -> None:
    row, _, text, message = case
    with pytest.raises(SourceError, match=f"(?s)t.csv.*{message}|'.*{message}"):
        make(tmp_path, {"t.csv": text})
    proven(row, "feature-store", "refused, naming the line" if "line" in message else "refused")


READ: list[tuple[str, str, Callable[[], Files]]] = [
    ("CSV with other line ends", "Windows", lambda: {"t.csv": TEXT.replace("\n", "\r\n")}),
    ("CSV with other line ends", "old Macs", lambda: {"t.csv": TEXT.replace("\n", "\r")}),
    ("CSV with other line ends", "none at the end", lambda: {"t.csv": TEXT.rstrip("\n")}),
    ("CSV with other line ends", "blank lines", lambda: {"t.csv": TEXT.replace("\n", "\n\n")}),
    ("CSV with a byte order mark", "", lambda: {"t.csv": TEXT.encode("utf-8-sig")}),
    ("CSV beside a header without rows", "", lambda: {"a.csv": HEADER, "t.csv": TEXT}),
    ("CSV with a quote within text", "", lambda: {"t.csv": TEXT.replace("toys", 'to"ys')}),
    ("CSV with long and odd text", "", lambda: {"t.csv": TEXT.replace("toys", f'"{"y" * 10_000}\n😀, ""\u202e"""')}),
    ("CSV with a field of megabytes", "", lambda: {"t.csv": TEXT.replace("toys", f'"{"y," * 2**20}"', 1)}),
]


@pytest.mark.parametrize("case", READ, ids=[f"{case[0]}: {case[1]}" for case in READ])
def test_read_as_it_is_meant(tmp_path: Path, proven: Proven, case: tuple[str, str, Callable[[], Files]]) -> None:
    row, _, files = case
    made, _ = make(tmp_path, files())
    assert made.features["total_spent"].sum() == sum(GOOD["amount"])
    assert made.balances["transactions"].rows_in == ROWS
    proven(row, "feature-store", "every row read")


def test_rows_of_a_wrong_number_of_fields_are_rejected(tmp_path: Path, proven: Proven) -> None:
    bad = ["1,2", "1,2,3,4,5,6,7", '1,"a,b"']
    made, _ = make(tmp_path, {"t.csv": TEXT + "\n".join(bad) + "\n"})
    assert made.reasons == {"malformed_row": 3}
    assert made.rejected["_line"].to_list() == bad
    assert made.balances["transactions"].rows_in == ROWS + 3
    proven("CSV with a wrong number of fields in a row", "feature-store", "rejected, with its text")


AMOUNTS = {
    "unparsable_amount": ['"1,000.5"', "1_000", "$5", "5 €", "0x10", "٣", "TRUE", "yes", "1.2.3", '"5,5"'],
    "not_finite_amount": ["1e309", "-1e999", "inf", "-Infinity"],
    "null_amount": ["", "NULL", '""', '" "', "NA", "NaN", '"N/A"', "None", r"\N"],
}


def test_amounts_in_words_are_rejected_with_what_they_are(tmp_path: Path, proven: Proven) -> None:
    for reason, amounts in AMOUNTS.items():
        text = HEADER + "\n" + "".join(f"1,2,2024-05-01,{amount},toys\n" for amount in [*amounts, "7"])
        made, _ = make(tmp_path / reason, {"t.csv": text})
        assert made.reasons == {reason: len(amounts)}
        assert made.features["total_spent"].to_list() == [7.0]
    proven("amounts that are no numbers", "feature-store", "rejected, counted by reason")


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_missing_value_is_no_customer(tmp_path: Path, quote: str) -> None:
    """As R writes it, quoted or not."""
    marked = "".join(f"{quote}{key}{quote},2,2024-05-01,1,toys\n" for key in ("NA", "", "12", "None"))
    made, _ = make(tmp_path, {"t.csv": HEADER + "\n" + marked})
    assert made.features["customer_id"].to_list() == [12]
    assert made.reasons == {"null_customer_id": 3}


def test_a_key_that_looks_like_a_missing_value_is_pointed_out(tmp_path: Path) -> None:
    keys = ["a", "unknown", "-999", "-", "NA"]
    made, _ = make(tmp_path, {"t.csv": HEADER + "\n" + "".join(f"{key},2,2024-05-01,1,toys\n" for key in keys)})
    (check,) = (check for check in made.gate.checks if check.name == "missing keys")
    assert check.verdict == "warn"
    assert check.message.startswith("customer_id '-', '-999', 'unknown' looks like a missing value")
    assert made.reasons == {"null_customer_id": 1}


def test_keys_that_a_spreadsheet_has_spoiled_are_rejected(tmp_path: Path, proven: Proven) -> None:
    keys = ["1.23E+15", "3.7", "12.0", "12"]
    text = HEADER + "\n" + "".join(f"{key},2,2024-05-01,1,toys\n" for key in keys)
    made, _ = make(tmp_path, {"t.csv": text})
    assert made.features["customer_id"].to_list() == [12]
    assert made.reasons == {"unparsable_customer_id": 2}
    proven("keys that are no whole numbers", "feature-store", "rejected, counted by reason")


# The law: whatever a table's text is, written by the rules it is read as it was; and any text at all is read or refused

field = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=6) | st.sampled_from(
    ['"', '""', ",", "\n", "x\ny", 'a"b', "", " "]
)
table = st.lists(st.tuples(field, field, field), min_size=1, max_size=8)


def read_all(place: Path) -> tuple[list[tuple[Any, ...]], list[str]]:
    source = inspect("events", str(place))
    pieces = [piece for unit in read_units(source, ("a", "b", "c"), 10) for piece in read(unit)]
    return [row for piece in pieces for row in piece.frame.rows()], [t for piece in pieces for t in piece.malformed]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=table, block=st.sampled_from([1, 2, 3, 7, 1 << 20]))
def test_a_table_written_by_the_rules_is_read_as_it_was(
    tmp_path: Path, rows: list[tuple[str, ...]], block: int
) -> None:
    """In whatever pieces its bytes come."""
    text = io.StringIO()
    writer = python_csv.writer(text, lineterminator="\n", quoting=python_csv.QUOTE_ALL)
    writer.writerows([("a", "b", "c"), *rows])
    put(tmp_path, {"t.csv": text.getvalue()})
    found, malformed = read_all(tmp_path)
    expected = [tuple(None if field in DEFAULT.text else field for field in row) for row in rows]
    assert (found, malformed) == (expected, [])
    pieces(text.getvalue().encode(), block)


def pieces(text: bytes, size: int) -> bytes:
    """The text as it passes the check, in pieces of some bytes."""
    checked = QuotedText("t.csv", pa.BufferReader(text))
    whole = b""
    while piece := checked.read(size):
        whole += piece
    return whole


@settings(max_examples=300)
@given(text=st.text('",\nab', max_size=40).map(str.encode))
def test_the_check_says_the_same_in_whatever_pieces_text_comes(text: bytes) -> None:
    def verdict(size: int) -> str:
        try:
            assert pieces(text, size) == text
        except SourceError as fault:
            return str(fault)
        return "sound"

    assert {verdict(size) for size in (1, 2, 3, 5, 1000)} == {verdict(1000)}
    assert (verdict(1000) == "sound") == (_fault_by_hand(text.decode()) is None)


def _fault_by_hand(text: str) -> str | None:
    """What is wrong with the quotes, sign by sign, as RFC 4180 has it."""
    place, begins = 0, True
    while place < len(text):
        sign = text[place]
        place += 1
        if sign != '"' or not begins:
            begins = sign in ",\n"
            continue
        opened = place
        while True:
            closing = text.find('"', place)
            if closing < 0:
                return "open"
            place = closing + 1
            if text[place : place + 1] != '"':
                break
            place += 1
        if text[place : place + 1] not in ("", ",", "\n") and "\n" in text[opened:closing]:
            return "goes on"
        begins = False
    return None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60) | st.text('",\n\r1a ', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused_by_our_own_errors(tmp_path: Path, body: bytes) -> None:
    put(tmp_path, {"t.csv": b"a,b,c\n" + body})
    try:
        rows, malformed = read_all(tmp_path)
    except SourceError as fault:
        assert str(tmp_path) in str(fault)  # noqa: PT017 - many examples, of which some are refused
    else:
        assert all(len(row) == 3 for row in rows)
        assert len(rows) + len(malformed) <= body.count(b"\n") + body.count(b"\r") + 1
