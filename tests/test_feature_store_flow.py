"""The feature-store flow as it runs: a real API, a real Ray, a local disk and S3."""

from __future__ import annotations

import datetime as dt
import io
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from flows.feature_store import feature_store
from tasks.artifacts import read_artifacts
from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.features.standard import SAMPLE_AS_OF, sample_customers, sample_products, sample_transactions
from tasks.io import storage
from tasks.io.errors import GateFailed, SourceError
from tasks.store import layout, versions
from tasks.store.catalogue import versions_table
from tests.conftest import LOCAL_AND_S3, new_bucket, new_root
from tests.features import oracle
from tests.runs import Run, assert_nothing_published, assert_rejected, assert_whole
from tests.s3 import FAULTY
from tests.test_runner import messages

pytestmark = pytest.mark.usefixtures("stack")

CUSTOMERS, PRODUCTS = "feature-store/customer-features", "feature-store/product-features"
BOTH = [CUSTOMERS, PRODUCTS]
OF_THE_RUN = ["feature_creation_date", "feature_version"]
DAY = dt.timedelta(days=1)
SMALL = 2_000


@dataclass(frozen=True)
class FeatureRun(Run):
    """A run of this flow that has ended."""

    def features(self, dataset: str) -> pd.DataFrame:
        """The features alone, by entity."""
        table = versions.read_table(self.root, dataset, self.manifest(dataset).version, verify=True)
        frame = table.to_pandas()
        return frame.drop(columns=OF_THE_RUN).sort_values(frame.columns[0], ignore_index=True)


def start(root: str, **settings: object) -> FeatureRun:
    config = FeatureStoreConfig(root=root, **{"sample_transactions": SMALL, **settings})
    return FeatureRun(root, feature_store(config, return_state=True))


def completed(root: str, **settings: object) -> FeatureRun:
    return start(root, **settings).completed()


@pytest.fixture(scope="module", params=LOCAL_AND_S3)
def twice(request: pytest.FixtureRequest) -> list[FeatureRun]:
    """The default sample, two times into the same root."""
    root = new_root(request)
    return [completed(root, sample_transactions=20_000) for _ in range(2)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> FeatureRun:
    """A small sample on the local disk."""
    return completed(str(tmp_path_factory.mktemp("small")))


def sample(rows: int = SMALL) -> dict[str, pl.DataFrame]:
    return {
        "transactions": sample_transactions(rows, 0, 0, rows),
        "customers": sample_customers(rows, 0),
        "products": sample_products(rows, 0),
    }


def put(root: str, tables: dict[str, pl.DataFrame]) -> dict[str, str]:
    """Write tables as sources; the settings that name them."""
    uris = {name: layout.join(root, "sources", f"{name}.parquet") for name in tables}
    for name, table in tables.items():
        storage.write_parquet(table.to_arrow(), uris[name])
    return uris


def usable(transactions: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
    """The rows that count, with their category, by the plainest pandas."""
    rows = transactions.dropna(subset=["customer_id", "product_id", "timestamp", "amount"])
    rows = rows[rows["timestamp"] <= SAMPLE_AS_OF].astype({"customer_id": "int64"})
    return rows.merge(products[["product_id", "category"]], on="product_id", how="left")


def assert_same(left: pd.DataFrame, right: pd.DataFrame, why: str) -> None:
    """Equal to the last bit, not only about."""
    assert list(left.columns) == list(right.columns), why
    for name in left.columns:
        one, other = left[name].to_numpy(), right[name].to_numpy()
        if one.dtype == np.float64:
            one, other = one.view(np.int64), other.view(np.int64)
        assert np.array_equal(one, other), f"{why}: {name} differs"


# What a run publishes


def test_two_runs_publish_two_whole_versions_of_both_groups(twice: list[FeatureRun]) -> None:
    for number, run in enumerate(twice, 1):
        assert [(version.dataset, version.version) for version in run.published] == [(name, number) for name in BOTH]
        for version in run.published:
            manifest = assert_whole(run, version.dataset)
            assert manifest.balances[-1].rows_out == manifest.rows
            assert (version.rows, version.verdict) == (manifest.rows, manifest.gate.verdict)
            assert storage.exists(version.report), "the report isn't where the flow says"
            assert version.uri == layout.version_uri(run.root, version.dataset, number)
    for dataset in BOTH:
        assert versions.published_versions(twice[0].root, dataset) == [1, 2]
        assert_same(twice[0].features(dataset), twice[1].features(dataset), f"{dataset} v1 and v2 of the same input")


def test_the_published_features_are_those_of_a_brute_force(twice: list[FeatureRun]) -> None:
    run = twice[0]
    base = layout.sample(run.root, "feature-store", "20000-0")
    transactions = pd.read_parquet(f"{base}/transactions")
    products = pd.read_parquet(f"{base}/products")
    customers = pd.read_csv(f"{base}/customers/customers.csv", parse_dates=["signup_date"])
    rows = usable(transactions, products)
    for dataset, expected, dimension in (
        (CUSTOMERS, oracle.customer_features(rows, SAMPLE_AS_OF), customers),
        (PRODUCTS, oracle.product_features(rows, SAMPLE_AS_OF), products),
    ):
        key = expected.columns[0]
        expected = expected.merge(dimension, on=key).sort_values(key, ignore_index=True)  # noqa: PLW2901
        found = run.features(dataset)[list(expected.columns)]
        assert len(found) > 100
        assert found[key].to_list() == expected[key].to_list(), f"{dataset}: other entities"
        for name in expected.columns:
            if pd.api.types.is_float_dtype(expected[name]):
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-9, err_msg=name)
            elif pd.api.types.is_datetime64_any_dtype(expected[name]):
                assert (pd.to_datetime(found[name]) == expected[name]).all(), f"{dataset}: {name} differs"
            else:
                assert found[name].to_list() == expected[name].to_list(), f"{dataset}: {name} differs"


def test_rejected_rows_are_kept_with_their_reasons(twice: list[FeatureRun]) -> None:
    run = twice[0]
    raw = pd.read_parquet(layout.sample(run.root, "feature-store", "20000-0") + "/transactions")
    expected = {
        "null_customer_id": int(raw["customer_id"].isna().sum()),
        "null_amount or not_finite_amount": int((raw["customer_id"].notna() & raw["amount"].isna()).sum()),
    }
    for dataset in BOTH:
        manifest = run.manifest(dataset)
        kept: dict[str, Counter[str]] = {}
        for file in manifest.rejected_files:
            uri = layout.join(layout.version_uri(run.root, dataset, 1), file.path)
            table = pq.read_table(storage.open_input(uri))
            assert table.num_rows == file.rows
            source = file.path.removeprefix("_rejected/").rsplit("-", 2)[0]
            kept.setdefault(source, Counter()).update(table["_reason"].to_pylist())
            if source == "transactions":
                assert {"_file", "_row"} <= set(table.column_names), "a rejected row doesn't say where it stood"
        balances = {balance.name: balance for balance in manifest.balances}
        assert kept.pop("transactions") == balances["transactions"].rejected
        assert kept.pop("entities", {}) == manifest.balances[-1].rejected
        assert not kept, "rejected rows of a source that no balance counts"
        told = balances["transactions"].rejected
        assert told["null_customer_id"] == expected["null_customer_id"]
        amounts = told["null_amount"] + told["not_finite_amount"]
        assert amounts == expected["null_amount or not_finite_amount"]
        assert balances["transactions"].rows_in == len(raw) == 20_000


def test_any_reader_opens_a_version_as_it_is(twice: list[FeatureRun]) -> None:
    run = twice[0]
    for dataset in BOTH:
        uri = layout.version_uri(run.root, dataset, 1)
        manifest = run.manifest(dataset)
        columns = [column.name for column in manifest.columns]
        frame = pd.read_parquet(uri)
        assert (len(frame), list(frame.columns)) == (manifest.rows, columns), "pandas"
        rows = ray.data.read_parquet(uri)
        assert (rows.count(), rows.columns()) == (manifest.rows, columns), "Ray Data"
        if not storage.is_s3(uri):
            found = duckdb.sql(f"SELECT * FROM read_parquet('{uri}/*.parquet')")
            assert (len(found), found.columns) == (manifest.rows, columns), "DuckDB"


def test_the_table_of_versions_is_derived_from_the_manifests(twice: list[FeatureRun]) -> None:
    root = twice[0].root
    content = storage.read_bytes(layout.join(root, layout.METADATA))
    table = pacsv.read_csv(io.BytesIO(content))
    assert list(zip(table["dataset"].to_pylist(), table["version"].to_pylist(), strict=True)) == [
        (dataset, number) for dataset in BOTH for number in (1, 2)
    ]
    for row, derived in zip(table.to_pylist(), versions_table(root, BOTH).to_pylist(), strict=True):
        manifest = versions.resolve(root, row["dataset"], row["version"])
        assert (row["record_count"], row["status"]) == (manifest.rows, "published")
        assert row["feature_count"] == derived["feature_count"] == len(manifest.columns)
        assert row["thresholds"] == derived["thresholds"]


# What the API shows of it


def test_the_api_has_the_artifacts_of_a_run(twice: list[FeatureRun]) -> None:
    artifacts = read_artifacts(twice[0].id)
    by_key = {artifact.key: artifact for artifact in artifacts if artifact.key}
    groups = ("customer-features", "product-features")
    assert {f"{group}-{face}" for group in groups for face in ("report", "checks")} <= set(by_key)
    report = str(by_key["customer-features-report"].data)
    verdict = twice[0].manifest(CUSTOMERS).gate.verdict
    assert verdict in report.lower(), "the report doesn't say the verdict"
    assert "](data:image/" in report, "the report shows no picture"
    assert layout.join(layout.version_uri(twice[0].root, CUSTOMERS, 1), layout.REPORT_HTML) in report
    checks = str(by_key["customer-features-checks"].data)
    assert "transaction_count" in checks
    assert "verdict" in checks.lower()
    progress = [artifact for artifact in artifacts if artifact.type == "progress"]
    assert len(progress) == 2, "one progress for reading and one for computing"
    assert {float(str(artifact.data)) for artifact in progress} == {100.0}
    told = " / ".join(sorted(str(artifact.description) for artifact in progress))
    assert re.search(r"Computing features: 2 of 2 buckets.*; done / Reading .*: 3 of 3 pieces of files.*; done", told)


def test_the_api_has_logs_names_and_tags_of_the_tasks_on_ray(twice: list[FeatureRun]) -> None:
    run = twice[1]
    lines = messages(run.id)
    for dataset in BOTH:
        rows = run.manifest(dataset).rows
        assert any(line.startswith(f"{dataset}: {rows} entities written in ") for line in lines), lines
        assert f"{dataset}: verdict {run.manifest(dataset).gate.verdict}" in lines
    tasks = run.tasks()
    assert {task.state_name for task in tasks.values()} == {"Completed"}
    assert {task.run_count for task in tasks.values()} == {1}
    compute = tasks["compute customer-features, product-features"]
    assert compute.tags == ["ray-data"]
    assert {"validate customer-features v2", "validate product-features v2"} <= set(tasks)
    assert run.flow_run().name.startswith("features of the sample ")
    assert run.manifest(CUSTOMERS).run.flow_run_name == run.flow_run().name


# What doesn't change the features


@pytest.mark.parametrize("twice", ["local"], indirect=True)
def test_how_the_work_is_cut_changes_no_bit(twice: list[FeatureRun]) -> None:
    reference = twice[0]
    for rows in (1_000, 5_000):
        run = completed(reference.root, sample_transactions=20_000, rows_per_bucket=rows)
        assert len(run.manifest(CUSTOMERS).files) > 2, "the work wasn't cut"
        for dataset in BOTH:
            assert_same(run.features(dataset), reference.features(dataset), f"{dataset}, {rows} rows a bucket")


def test_the_number_of_cpus_changes_no_bit(small: FeatureRun) -> None:
    @ray.remote(num_cpus=1)
    class Idler:
        """Holds a CPU."""

        def ready(self) -> bool:
            return True

    idler = Idler.remote()
    assert ray.get(idler.ready.remote())
    try:
        run = completed(small.root, rows_per_bucket=1_000)
    finally:
        ray.kill(idler)
    for dataset in BOTH:
        assert_same(run.features(dataset), small.features(dataset), f"{dataset} on one CPU")


# Joins and definitions


def test_without_customers_nothing_is_joined(small: FeatureRun, tmp_path: Path) -> None:
    tables = sample()
    del tables["customers"]
    run = completed(str(tmp_path), **put(str(tmp_path), tables), as_of=SAMPLE_AS_OF)
    manifest = assert_whole(run, CUSTOMERS)
    found, joined = run.features(CUSTOMERS), small.features(CUSTOMERS)
    assert not {"age", "gender", "location", "signup_date"} & set(found.columns)
    assert "category" in run.features(PRODUCTS).columns
    strangers = small.manifest(CUSTOMERS).balances[-1].rejected["no_customers_row"]
    assert strangers > 0
    assert len(found) == manifest.balances[-1].rows_in == len(joined) + strangers
    shared = [name for name in found.columns if name in joined.columns]
    names = [name for name in shared if not name.endswith(("ratio", "score", "ready"))]
    both = found[found["customer_id"].isin(joined["customer_id"])].reset_index(drop=True)
    assert_same(both[names], joined[names], "features with and without a join")


def test_a_left_join_keeps_the_orphans_and_an_inner_join_rejects_them(small: FeatureRun) -> None:
    left = completed(small.root, join="left", groups=("customer-features",))
    rows, inner = left.features(CUSTOMERS), small.features(CUSTOMERS)
    orphans = small.manifest(CUSTOMERS).balances[-1].rejected["no_customers_row"]
    assert len(rows) == len(inner) + orphans
    unknown = rows[~rows["customer_id"].isin(inner["customer_id"])]
    assert len(unknown) == orphans
    assert unknown["age"].isna().all()
    assert unknown["transaction_count"].notna().all()
    assert not any(left.manifest(CUSTOMERS).balances[-1].rejected.values())
    check = next(check for check in left.manifest(CUSTOMERS).gate.checks if "reference" in check.name)
    assert str(orphans) in check.message, check.message


def test_refunds_count_or_are_rejected_by_choice(small: FeatureRun) -> None:
    refunds = int((sample()["transactions"]["amount"] < 0).sum())
    run = completed(small.root, negative_amounts="reject", groups=("product-features",))
    told = run.manifest(PRODUCTS).balances[0].rejected["negative_amount"]
    assert 0 < told <= refunds
    assert "negative_amount" not in small.manifest(PRODUCTS).balances[0].rejected
    assert run.features(PRODUCTS)["total_sales"].sum() < small.features(PRODUCTS)["total_sales"].sum()


PYTHON_GROUP = """
import polars as pl
from tasks.features.definitions import FeatureGroup

BRANDS = FeatureGroup(
    name="basket-features",
    entity="customer_id",
    features={"largest": pl.col("amount").max(), "sales": pl.len()},
    derived={"largest_a_sale": pl.col("largest") / pl.col("sales")},
)
"""
YAML_GROUP = {
    "groups": {
        "basket-features": {
            "entity": "customer_id",
            "features": {"largest": "MAX(amount)", "sales": "COUNT(*)"},
            "derived": {"largest_a_sale": "largest / sales"},
        }
    }
}


@pytest.mark.parametrize("kind", ["py", "yaml"])
def test_a_group_of_ones_own_stands_beside_the_standard_ones(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"groups.{kind}"
    file.write_text(PYTHON_GROUP if kind == "py" else yaml.safe_dump(YAML_GROUP))
    tables = sample()
    groups = ("product-features", "basket-features") if kind == "py" else ()
    sources = put(str(tmp_path), tables)
    run = completed(str(tmp_path), **sources, definitions=str(file), groups=groups, as_of=SAMPLE_AS_OF)
    own = "feature-store/basket-features"
    expected = [PRODUCTS, own] if kind == "py" else [CUSTOMERS, PRODUCTS, own]
    assert [version.dataset for version in run.published] == expected
    rows = usable(tables["transactions"].to_pandas(), tables["products"].to_pandas())
    largest = rows.groupby("customer_id")["amount"].max()
    found = run.features(own).set_index("customer_id")
    assert found["largest"].to_dict() == largest.to_dict()
    assert found["largest_a_sale"].to_dict() == (largest / rows.groupby("customer_id").size()).to_dict()
    assert run.manifest(own).definition["name"] == "basket-features"


# What goes wrong


def test_a_failed_gate_publishes_nothing_of_any_group(tmp_path: Path) -> None:
    root = str(tmp_path)
    run = start(root, thresholds=Thresholds(rejected_warn=0, rejected_fail=0))
    why = r"nothing was published.*transactions: \d+ of 2,000 rows.*raise --thresholds.rejected-fail.*_report\.html"
    run.failed_at_once(GateFailed, why)
    assert "GateFailed" in str(run.state.message)
    assert_nothing_published(root, BOTH)
    for dataset in BOTH:
        assert_rejected(root, dataset, 1)
    good = completed(root)
    assert [version.version for version in good.published] == [2, 2]
    assert versions.published_versions(root, CUSTOMERS) == [2]


def test_one_bad_group_keeps_the_other_back(tmp_path: Path) -> None:
    root = str(tmp_path)
    tables = sample()
    everybody = tables["customers"].with_columns(customer_id=pl.col("customer_id") + 1_000_000)
    sources = put(root, {**tables, "customers": everybody})
    run = start(root, **sources, as_of=SAMPLE_AS_OF, join="left")
    with pytest.raises(GateFailed, match="customer-features") as caught:
        run.state.result()
    assert "product-features:" not in str(caught.value), "the group that passed is blamed"
    assert_nothing_published(root, BOTH)
    other = versions.read_manifest(root, PRODUCTS, 1)
    assert other.status == "rejected"
    assert other.gate.checks[-1].message == f"Not published, because {CUSTOMERS} of the same run failed."


@pytest.mark.parametrize("fault", ["missing column", "no files"])
def test_bad_input_is_one_clear_error_and_leaves_nothing(fault: str, tmp_path: Path) -> None:
    root = str(tmp_path)
    if fault == "missing column":
        sources = put(root, {"transactions": sample()["transactions"].rename({"amount": "sales_value"})})
        message = r"transactions: \S+transactions\.parquet has no column 'amount'.*--transaction-columns"
    else:
        sources = {"transactions": str(tmp_path / "nothing")}
        message = r"transactions '\S+nothing': no \.parquet or \.csv file found"
    run = start(root, **sources, as_of=SAMPLE_AS_OF, groups=("product-features",))
    run.failed_at_once(SourceError, message)
    assert versions.list_datasets(root) == [], "a reservation was left behind"
    good = completed(root, groups=("product-features",))
    assert [(version.dataset, version.version) for version in good.published] == [(PRODUCTS, 1)]
    assert versions.list_datasets(root) == [PRODUCTS], "a group was published that nobody asked for"


def test_a_file_that_turns_out_to_be_damaged_fails_at_once(tmp_path: Path) -> None:
    """Its footer is whole, so planning finds nothing, and the versions are reserved already."""
    root = str(tmp_path)
    sources = put(root, sample())
    path = Path(sources["transactions"])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = random.Random(0).randbytes(len(content) // 2 - 4)
    path.write_bytes(bytes(content))
    run = start(root, **sources, as_of=SAMPLE_AS_OF)
    run.failed_at_once(SourceError, f"{re.escape(str(path))} can't be read as parquet")
    assert_nothing_published(root, BOTH)
    assert versions.version_numbers(root, CUSTOMERS) == [1], "reserved, and its process is alive still"
    good = completed(root)
    assert {version.version for version in good.published} == {2}
    assert_whole(good, CUSTOMERS)


def test_a_busy_store_is_asked_again(s3_url: str, small: FeatureRun) -> None:
    """The store answers 503 to reads of the computing task for longer than its client tries by itself."""
    run = completed(new_bucket(s3_url, FAULTY))
    counts = {name: task.run_count for name, task in run.tasks().items()}
    compute = counts.pop("compute customer-features, product-features")
    assert compute > 1, "the fault wasn't met, or a client hid it"
    assert set(counts.values()) == {1}, counts
    assert run.flow_run().run_count == 1
    for dataset in BOTH:
        assert_whole(run, dataset)
        assert_same(run.features(dataset), small.features(dataset), f"{dataset} after a fault")


# Other servers, other callers


def test_parameters_as_a_deployment_gives_them(small: FeatureRun) -> None:
    parameters = {"root": small.root, "sample_transactions": SMALL, "groups": ["product-features"]}
    run = FeatureRun(small.root, feature_store(parameters, return_state=True)).completed()  # type: ignore[arg-type]
    assert run.flow_run().name.startswith("features of the sample ")
    assert_same(run.features(PRODUCTS), small.features(PRODUCTS), "from plain values")
