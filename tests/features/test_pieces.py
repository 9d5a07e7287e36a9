"""Large CSV files are read in pieces, side by side, as if each were read as a whole."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.errors import SourceError
from tasks.features import pieces
from tasks.features.sources import ReadUnit, inspect, read, read_units

FIELDS = st.sampled_from(
    ["", "x", "7.5", '"a,b"', '"two\nlines"', '"with ""quotes"""', 'in"side', '""', "é", " ", '"\r\n"']
)
LINES = st.lists(FIELDS, min_size=1, max_size=4).map(",".join) | st.just("")
TEXTS = st.tuples(st.lists(LINES, max_size=30), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())


def all_rows(units: list[ReadUnit]) -> tuple[list[tuple[int, tuple[str | None, ...]]], list[str]]:
    """Rows with their numbers in the file, and the malformed lines."""
    rows, malformed = [], []
    for unit in units:
        for raw in read(unit):
            rows += list(enumerate(raw.frame.rows(), raw.first_row)) if not raw.malformed else []
            # Numbers of rows in a block with malformed lines are judged by their count alone.
            rows += [(-1, row) for row in raw.frame.rows()] if raw.malformed else []
            malformed += raw.malformed
    return rows, malformed


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, piece=st.integers(1, 60), block=st.integers(1, 50))
def test_pieces_give_the_rows_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: tuple[list[str], str, bool, bool], piece: int, block: int
) -> None:
    lines, ending, mark, ended = text
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    written = ending.join(["a,b", *lines]) + (ending if ended else "")
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + written.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_BLOCK", block)
        whole = inspect("t", str(path)).files[0] if lines and any(lines) else None
        if whole is None or whole.rows == 0:
            return
        patch.setattr(pieces, "PIECE_BYTES", piece)
        cut = inspect("t", str(path))
    units = read_units(cut, ["a", "b"], 10)
    assert len(units) == max(1, len(cut.files[0].pieces))
    one = ReadUnit(str(path), "csv", ("a", "b"))
    (rows, malformed), (wanted, wanted_malformed) = all_rows(units), all_rows([one])
    assert [row for _, row in rows] == [row for _, row in wanted]
    assert malformed == wanted_malformed
    if not malformed:
        assert rows == wanted
    if cut.files[0].pieces:
        assert sum(unit.rows for unit in units) == len(rows) + len(malformed)
        starts = [unit.first_row for unit in units]
        assert starts == [sum(unit.rows for unit in units[:number]) for number in range(len(units))]


def test_a_large_file_is_cut_and_a_small_or_compressed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    frame = pl.DataFrame({"a": range(10_000), "b": ["text"] * 10_000})
    frame.write_csv(tmp_path / "large.csv")
    size = (tmp_path / "large.csv").stat().st_size
    found = inspect("t", str(tmp_path / "large.csv")).files[0].pieces
    assert size // 1020 <= len(found) <= size // 1000 + 1
    assert [one.start for one in found[1:]] == [one.end for one in found[:-1]]
    assert found[-1].end == size
    assert sum(one.rows for one in found) == 10_000
    frame[:150].write_csv(tmp_path / "small.csv")
    assert inspect("t", str(tmp_path / "small.csv")).files[0].pieces == ()
    # Not compressed well, so that it is large enough.
    packed = gzip.compress((tmp_path / "large.csv").read_bytes(), compresslevel=0)
    (tmp_path / "packed.csv.gz").write_bytes(packed)
    assert inspect("t", str(tmp_path / "packed.csv.gz")).files[0].pieces == ()


def test_a_quote_that_is_not_closed_is_told_with_its_line_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    lines = [
        "a,b",
        '1,"two\nlines"',
        *(f"{number},text" for number in range(50)),
        '51,"open',
        *("52,x" for _ in range(9)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    units = read_units(inspect("t", str(tmp_path / "t.csv")), ["a", "b"], 10)
    assert len(units) == 4
    with pytest.raises(SourceError, match=r"the quoted field that begins in line 54 isn't closed"):
        all_rows(units)
