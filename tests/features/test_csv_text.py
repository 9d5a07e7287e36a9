"""Large CSV files are read in pieces, side by side, and small files are judged together: neither makes a difference."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.features import csv_text, shuffle
from tasks.features.config import FeatureStoreConfig
from tasks.features.plan import plan_features, with_uris
from tasks.features.sources import ReadUnit, inspect, read, read_units
from tasks.features.standard import SAMPLE_AS_OF, STANDARD, write_sample
from tasks.io.errors import SourceError

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


@settings(max_examples=150)
@given(text=TEXTS, piece=st.integers(1, 60), block=st.integers(1, 50))
def test_pieces_give_the_rows_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: tuple[list[str], str, bool, bool], piece: int, block: int
) -> None:
    lines, ending, mark, ended = text
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    written = ending.join(["a,b", *lines]) + (ending if ended else "")
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + written.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_text, "_BLOCK", block)
        whole = inspect("t", str(path)).files[0] if lines and any(lines) else None
        if whole is None or whole.rows == 0:
            return
        patch.setattr(csv_text, "PIECE_BYTES", piece)
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
    monkeypatch.setattr(csv_text, "PIECE_BYTES", 1000)
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
    monkeypatch.setattr(csv_text, "PIECE_BYTES", 100)
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


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 65_536])
def test_small_files_that_are_judged_together_are_judged_as_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, numbered: bool
) -> None:
    monkeypatch.setattr(shuffle, "JUDGED_ROWS", at_once)
    sample = write_sample(str(tmp_path / "sample"), 400, 0)
    table = pl.read_parquet(sample["transactions"])
    amounts = pl.when(pl.int_range(pl.len()) % 9 == 4).then(pl.lit(float("nan"))).otherwise("amount")
    folder = tmp_path / "files"
    folder.mkdir()
    for number, rows in enumerate(table.with_columns(amounts.alias("amount")).iter_slices(31)):
        if number % 3:
            rows.write_parquet(folder / f"{number:02d}.parquet", row_group_size=10)
        else:
            rows.write_csv(folder / f"{number:02d}.csv")
            with (folder / f"{number:02d}.csv").open("a") as lines:
                lines.write("too,few\n")
    config = FeatureStoreConfig(root=str(tmp_path), **{**sample, "transactions": str(folder)})
    (plan,) = plan_features(with_uris(STANDARD, config), config, (SAMPLE_AS_OF,))
    # An incremental run, which asks for numbers, keeps later events.
    source = replace(plan.events, rows=replace(plan.events.rows, as_of=None)) if numbered else plan.events
    units = source.units(10)
    files = list(range(len(units))) if numbered else None
    kept, tally, rejected = shuffle.read_and_judge(source, *units, files=files)
    alone = [
        shuffle.read_and_judge(source, unit, files=[number] if numbered else None) for number, unit in enumerate(units)
    ]
    assert kept.equals(pl.concat([rows for rows, _, _ in alone]))
    assert rejected is not None
    wanted = pl.concat([rows for _, _, rows in alone if rows is not None], how="diagonal_relaxed")
    order = ["_file", "_row", "_line"]
    assert rejected.sort(order).equals(wanted.select(rejected.columns).sort(order))
    assert rejected.height > 40
    for name in ("rows_in", "rows_out"):
        assert getattr(tally, name) == sum(getattr(one, name) for _, one, _ in alone)
    assert tally.rejected == sum((one.rejected for _, one, _ in alone), type(tally.rejected)())
    assert tally.rejected["malformed_row"] == len(list(folder.glob("*.csv")))
