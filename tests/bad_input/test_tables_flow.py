"""Whole runs of the feature store on bad tables: what the user is told, and that nothing is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.feature_store import feature_store
from tasks.features.config import FeatureStoreConfig
from tasks.io.errors import GateFailed, SourceError
from tests.bad_input.shop import AS_OF, csv, put, transactions
from tests.runs import Run, assert_nothing_published, assert_whole
from tests.tables import Proven

pytestmark = pytest.mark.usefixtures("stack")

DATASETS = ["feature-store/customer-features", "feature-store/product-features"]
TEXT = csv(transactions())


def start(root: Path, files: Any, **settings: Any) -> Run:
    uri = put(root / "transactions", files)
    config = FeatureStoreConfig(root=str(root), transactions=uri, as_of=AS_OF.isoformat(), **settings)
    return Run(str(root), feature_store(config, return_state=True))


@pytest.mark.parametrize(
    ("row", "files", "settings", "kind", "message"),
    [
        (
            "CSV with a quote that isn't closed",
            {"t.csv": TEXT.replace("toys", '"toys', 1)},
            {},
            SourceError,
            r"t\.csv can't be read as csv: the quoted field that begins in line 3 isn't closed",
        ),
        (
            "a column is of another type",
            {"t.parquet": transactions(amount=transactions()["timestamp"])},
            {},
            SourceError,
            r"'amount' of .*t\.parquet is of type timestamp.*it must be integers, floats",
        ),
        (
            "amounts that are no numbers",
            {"t.csv": csv(transactions(amount=["5 €"] * 40))},
            {},
            GateFailed,
            r"transactions: 40 of 40 rows \(100\.00%\) were rejected",
        ),
        (
            "times in another unit than said",
            {"t.parquet": transactions(timestamp=[int(t.timestamp()) for t in transactions()["timestamp"]])},
            {"epoch_unit": "ms"},
            GateFailed,
            r"counts of a coarser unit, such as seconds, seem to be taken for ms; give another --epoch-unit",
        ),
    ],
    ids=["quote", "type", "amounts", "unit"],
)
def test_a_run_that_fails(
    tmp_path: Path, proven: Proven, *, row: str, files: Any, settings: Any, kind: type[Exception], message: str
) -> None:
    start(tmp_path, files, **settings).failed_at_once(kind, message)
    assert_nothing_published(str(tmp_path), DATASETS)
    proven(row, "feature-store", "the run fails at once, nothing is published")


def test_a_run_with_some_bad_rows_publishes_the_others(tmp_path: Path, proven: Proven) -> None:
    bad = "1,2\n,2,2024-05-01,1,toys\n1,2,soon,1,toys\n1,2,2024-05-01,NaN,toys\n1,2,2024-05-01,inf,toys\n"
    run = start(tmp_path, {"t.csv": TEXT + bad}).completed()
    for dataset in DATASETS:
        manifest = assert_whole(run, dataset)
        assert manifest.balances[0].rejected == {
            "malformed_row": 1,
            "null_customer_id": 1,
            "unparsable_timestamp": 1,
            "null_amount": 1,
            "not_finite_amount": 1,
        }
        assert sum(file.rows for file in manifest.rejected_files) == 5
    proven("some rows are bad", "feature-store", "rejected, counted and kept; the others are published")
