"""The sample is the same on every machine, in whatever blocks it is made, and has the flaws that it says."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tasks.features import standard
from tasks.features.sources import inspect
from tasks.features.standard import (
    SAMPLE_AS_OF,
    sample_customers,
    sample_products,
    sample_transactions,
    sizes,
    write_sample,
)
from tasks.io.errors import SourceError

GOLDEN: list[tuple[str, Callable[[], pl.DataFrame], str]] = [
    (
        "the first block of transactions",
        lambda: sample_transactions(1000, 0, 0, 1000),
        "3f48ab1c123bf9d9e3d3703a418b086d88bbc07f2de4e0918da6d0250983c20c",
    ),
    (
        "the second block",
        lambda: sample_transactions(1000, 0, 1, 3000),
        "bf5f1fdc5b127e6051b0990e58e415768039699673cf11b1278a725594a9c004",
    ),
    (
        "customers",
        lambda: sample_customers(1000, 0),
        "416e6f1437c291c35b8beed311c32f251002ca63dee02650b5c2264a196076a2",
    ),
    (
        "products",
        lambda: sample_products(1000, 0),
        "5af064a77ab394082000ee9cafcec0c8623ef9eeef106862678b453c4fe43a43",
    ),
]


@pytest.mark.parametrize(("why", "make", "digest"), GOLDEN, ids=[case[0] for case in GOLDEN])
def test_golden(why: str, make: Callable[[], pl.DataFrame], digest: str) -> None:
    """SHA-256 of the table as CSV; a change of the sample changes every figure in the documentation."""
    assert hashlib.sha256(make().write_csv().encode()).hexdigest() == digest


MAKERS: list[tuple[str, Callable[[int], pl.DataFrame]]] = [
    ("transactions", lambda seed: sample_transactions(500, seed, 0, 500)),
    ("customers", lambda seed: sample_customers(500, seed)),
    ("products", lambda seed: sample_products(500, seed)),
]


@pytest.mark.parametrize(("name", "make"), MAKERS, ids=[case[0] for case in MAKERS])
def test_the_seed_decides(name: str, make: Callable[[int], pl.DataFrame]) -> None:
    assert make(1).equals(make(1))
    assert not make(1).equals(make(2))


def test_blocks_differ_and_depend_on_no_other_block() -> None:
    first, second = (sample_transactions(300, 0, block, 600) for block in (0, 1))
    assert not first.equals(second)
    assert second.equals(sample_transactions(300, 0, 1, 600))


SHARES: list[tuple[str, pl.Expr, float]] = [
    # flaw, rows that have it, share of all rows
    ("refunds", pl.col("amount") < 0, 0.01),
    ("no amount", pl.col("amount").is_null(), 0.002),
    ("amount NaN", pl.col("amount").is_nan(), 0.001),
    ("no customer", pl.col("customer_id").is_null(), 0.002),
    ("after as_of", pl.col("timestamp") > SAMPLE_AS_OF, 0.003),
    ("a customer of no table", pl.col("customer_id") >= sizes(400_000)[0], 0.01),
]


@pytest.fixture(scope="module")
def transactions() -> pl.DataFrame:
    """Enough transactions to count their flaws."""
    return sample_transactions(400_000, 7, 0, 400_000)


@pytest.mark.parametrize(("flaw", "rows", "share"), SHARES, ids=[case[0] for case in SHARES])
def test_flaws(transactions: pl.DataFrame, flaw: str, rows: pl.Expr, share: float) -> None:
    """Within five deviations of the stated share."""
    count = transactions.select(rows.fill_null(value=False).sum()).item()
    assert count == pytest.approx(400_000 * share, abs=5 * (400_000 * share) ** 0.5)


def test_all_else_is_in_order(transactions: pl.DataFrame) -> None:
    customers, products = sizes(400_000)
    assert transactions["timestamp"].min() >= dt.datetime(2024, 1, 1, tzinfo=dt.UTC)  # type: ignore[operator]
    assert transactions.filter(pl.col("timestamp") < SAMPLE_AS_OF)["timestamp"].is_sorted()
    assert transactions["product_id"].is_between(0, products - 1).all()
    assert transactions["customer_id"].drop_nulls().is_between(0, customers + 9).all()
    assert transactions["product_id"].null_count() == transactions["timestamp"].null_count() == 0


@pytest.mark.parametrize("total", [100, 5_000])
def test_tables_have_one_row_a_key(total: int) -> None:
    customers, products = sizes(total)
    assert sample_customers(total, 0)["customer_id"].to_list() == list(range(customers))
    assert sample_products(total, 0)["product_id"].to_list() == list(range(products))
    for table in (sample_customers(total, 0), sample_products(total, 0)):
        assert sum(table.null_count().row(0)) == 0


def test_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard, "BLOCK", 1_000)
    uris = write_sample(str(tmp_path), 2_500, 0)
    tables = {name: inspect(name, uri) for name, uri in uris.items()}
    parts = [pl.read_parquet(file.info.uri) for file in tables["transactions"].files]
    assert [part.height for part in parts] == [1_000, 1_000, 500]
    for block, part in enumerate(parts):
        assert part.equals(sample_transactions(part.height, 0, block, 2_500))
    customers = pl.read_csv(tables["customers"].files[0].info.uri, try_parse_dates=True)
    assert customers.equals(sample_customers(2_500, 0))
    assert pl.read_parquet(tables["products"].files[0].info.uri).equals(sample_products(2_500, 0))


def files_under(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def test_written_once(tmp_path: Path) -> None:
    uris = write_sample(str(tmp_path), 200, 0)
    before = files_under(tmp_path)
    assert write_sample(str(tmp_path), 200, 0) == uris
    assert files_under(tmp_path) == before  # not even touched


def test_a_write_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    uris = write_sample(str(tmp_path), 200, 0)
    before = {name: content for name, (content, _) in files_under(tmp_path).items()}
    (tmp_path / "samples/feature-store/200-0/_complete").unlink()
    Path(inspect("products", uris["products"]).files[0].info.uri).unlink()
    with pytest.raises(SourceError):
        inspect("products", uris["products"])
    write_sample(str(tmp_path), 200, 0)
    assert {name: content for name, (content, _) in files_under(tmp_path).items()} == before


def test_samples_of_other_sizes_and_seeds_stand_side_by_side(tmp_path: Path) -> None:
    places = {
        write_sample(str(tmp_path), total, seed)["transactions"] for total, seed in ((200, 0), (200, 1), (300, 0))
    }
    assert len(places) == 3
