"""The store as its users read it: the newest values, values at a time, and what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from tasks.core import layout, storage
from tasks.core.errors import CorruptVersion, DefinitionError, InputError, SourceError, VersionNotFound
from tasks.core.withdrawal import withdraw
from tasks.serving.store import FeatureStore
from tests.serving.feature_versions import ENTITY, GROUP, customers, days, publish_features

DATASET = layout.feature_dataset(GROUP)
PRODUCTS = "product-features"


def products(numbers: range) -> pl.DataFrame:
    return customers(numbers).rename({ENTITY: "product_id"}).with_columns(pl.col("orders") * 10)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    root = str(tmp_path)
    publish_features(root, customers(range(10), days(0, 1)))
    publish_features(root, customers(range(10), days(2)))
    publish_features(root, products(range(5)), PRODUCTS, "product_id")
    return FeatureStore(root, refresh_seconds=0)


# The newest values


@pytest.mark.parametrize("rows", [{ENTITY: [3, 99]}, [{ENTITY: 3}, {ENTITY: 99}]])
def test_online_features_are_the_newest_ones(root: str, rows: Any) -> None:
    publish_features(root, customers(range(10), days(0, 1)))
    publish_features(root, customers(range(10), days(2)))
    found = FeatureStore(root).get_online_features([f"{GROUP}:total_spent", f"{GROUP}:city"], rows)
    expected = {ENTITY: [3, 99], "total_spent": [3002.0, None], "city": ["city 0", None]}
    assert found.to_dict() == expected == found.to_arrow().to_pydict() == found.to_polars().to_dict(as_series=False)
    assert found.to_df().equals(found.to_pandas())


def test_groups_of_different_entities_are_looked_up_together(store: FeatureStore) -> None:
    rows = {ENTITY: [1, 2], "product_id": [4, 3]}
    features = [f"{PRODUCTS}:orders", f"{GROUP}:orders", f"{GROUP}:city"]
    assert store.get_online_features(features, rows).to_dict() == {
        **rows,
        f"{PRODUCTS}__orders": [40, 30],
        f"{GROUP}__orders": [1, 2],
        "city": ["city 1", "city 2"],
    }
    named = store.get_online_features([f"{GROUP}:city"], rows, full_feature_names=True).to_dict()
    assert list(named) == [ENTITY, "product_id", f"{GROUP}__city"]


def test_all_features_of_a_group_and_of_one_version(store: FeatureStore) -> None:
    rows = {ENTITY: [7]}
    every = store.get_online_features([f"{GROUP}:*", f"{GROUP}:orders"], rows).to_dict()
    assert every == {ENTITY: [7], "total_spent": [7002.0], "orders": [0], "city": ["city 1"]}
    assert store.get_online_features([f"{GROUP}:total_spent@v1"], rows).to_dict()["total_spent"] == [7001.0]


def test_a_new_version_and_a_withdrawal_are_seen(store: FeatureStore) -> None:
    def value() -> list[float]:
        return store.get_online_features([f"{GROUP}:total_spent"], {ENTITY: [7]}).to_dict()["total_spent"]

    assert value() == [7002.0]
    publish_features(store.root, customers(range(10), days(3)))
    assert value() == [7003.0]
    withdraw(store.root, DATASET, 3, "wrong", "anna")
    assert value() == [7002.0]
    publish_features(store.root, customers(range(10), days(1), scale=2.0))  # an old day again
    assert value() == [7002.0]
    latest = store.get_online_features([f"{GROUP}:total_spent@latest"], {ENTITY: [7]}).to_dict()
    assert latest["total_spent"] == [14002.0]


def test_what_is_known_of_the_newest_version_lasts_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_features(str(tmp_path), customers(range(10)))
    store = FeatureStore(str(tmp_path), refresh_seconds=3600)
    for _ in range(2):
        assert store.get_online_features([f"{GROUP}:orders"], {ENTITY: [3]}).to_dict()["orders"] == [3]
        monkeypatch.setattr(storage, "list_directories", lambda _: pytest.fail("the store was looked at again"))


@pytest.mark.parametrize(
    ("features", "rows", "error", "message"),
    [
        (["total_spent"], {ENTITY: [1]}, DefinitionError, r"'total_spent' names no feature; write group:feature"),
        (
            [f"{GROUP}:total_spend"],
            {ENTITY: [1]},
            DefinitionError,
            r"no feature 'total_spend'; did you mean 'total",
        ),
        (["customer-feature:city"], {ENTITY: [1]}, VersionNotFound, r"no feature group '.*did you mean 'customer-feat"),
        ([f"{GROUP}:city@v9"], {ENTITY: [1]}, VersionNotFound, r"has no version v9.*published: v1, v2"),
        ([f"{GROUP}:city"], {"customer": [1]}, InputError, r"is looked up by 'customer_id'.*did you mean 'customer'"),
        ([f"{GROUP}:city"], {ENTITY: ["x"]}, InputError, r"\('customer_id'\) are of type int64"),
        ([f"{GROUP}:city"], {ENTITY: [1.0, 2.0**53]}, InputError, r"can't be 9007199254740992.0 \(row 1\)"),
        ([f"{GROUP}:city"], {ENTITY: [True]}, InputError, r"are of type bool; convert"),
        ([f"{GROUP}:city"], {ENTITY: [1], "b": []}, InputError, r"different lengths"),
        ([f"{GROUP}:city@v1", f"{GROUP}:city@v2"], {ENTITY: [1]}, DefinitionError, r"one name|__city"),
        ([], {ENTITY: [1]}, DefinitionError, r"no features are asked for"),
    ],
)
def test_mistakes_get_errors_that_name_the_cure(
    store: FeatureStore, features: list[str], rows: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        store.get_online_features(features, rows)


def test_a_root_without_anything_says_so(tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path / "nothing"))
    assert list(store.list()) == []
    with pytest.raises(VersionNotFound, match=r"nothing is there yet; run the flow, or correct the root"):
        store.get_online_features([f"{GROUP}:city"], {ENTITY: [1]})


# Values at a time

SPINE = {ENTITY: [7, 8, 7], "event_timestamp": [*days(1), *days(5), *days(-1)], "bought": [1, 0, 1]}


@pytest.mark.parametrize(
    "spine",
    [pa.table(SPINE), pl.DataFrame(SPINE), pd.DataFrame(SPINE)],
    ids=["arrow", "polars", "pandas"],
)
def test_historical_features_are_those_of_each_rows_time(store: FeatureStore, spine: Any) -> None:
    found = store.get_historical_features(spine, [f"{GROUP}:total_spent"]).to_dict()
    assert found["total_spent"] == [7001.0, 8002.0, None]
    assert (list(found), found["bought"]) == ([*SPINE, "total_spent"], [1, 0, 1])
    strict = store.get_historical_features(spine, [f"{GROUP}:total_spent"], strict=True, ttl_days=2).to_dict()
    assert strict["total_spent"] == [7000.0, None, None]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_may_be_a_file(store: FeatureStore, tmp_path: Path, kind: str) -> None:
    uri = str(tmp_path / f"spine.{kind}")
    frame = pl.DataFrame(SPINE)
    frame.write_parquet(uri) if kind == "parquet" else frame.write_csv(uri, datetime_format="%Y-%m-%dT%H:%M:%SZ")
    found = store.get_historical_features(uri, [f"{GROUP}:total_spent"])
    assert found.to_dict()["total_spent"] == [7001.0, 8002.0, None]
    with pytest.raises(SourceError, match="no Parquet or CSV file"):
        store.get_historical_features(f"{uri}.gone", [f"{GROUP}:total_spent"]).to_arrow()


def test_a_ray_dataset_of_historical_features(store: FeatureStore, ray_cluster: None) -> None:
    found = store.get_historical_features(pa.table(SPINE), [f"{GROUP}:total_spent"]).to_ray()
    assert [row["total_spent"] for row in found.take_all()] == [7001.0, 8002.0, None]


def test_mistakes_in_historical_features_are_told_at_once(store: FeatureStore) -> None:
    with pytest.raises(DefinitionError, match="did you mean 'total_spent'"):
        store.get_historical_features(pa.table(SPINE), [f"{GROUP}:total_spend"])
    with pytest.raises(InputError, match="rows of type int can't be read"):
        store.get_historical_features(3, [f"{GROUP}:city"]).to_arrow()  # type: ignore[arg-type]


# What there is


def test_damaged_and_incomplete_versions_are_told(store: FeatureStore) -> None:
    first, second = (Path(layout.version_uri(store.root, DATASET, number)) for number in (1, 2))
    manifest = (second / layout.MANIFEST).read_bytes()
    (second / layout.MANIFEST).write_bytes(manifest[:-5])
    lost = sorted(first.glob("*.parquet"))
    lost[0].unlink()
    lost[1].write_bytes(b"x")
    assert [(one.name, one.version, one.status) for one in store.list()] == [
        (GROUP, 1, "v1 incomplete, v2 damaged"),
        (PRODUCTS, 1, "ok"),
    ]
    found = {one.version: one for one in store.versions(GROUP)}
    assert {number: one.status for number, one in found.items()} == {1: "incomplete", 2: "damaged"}
    assert f"{lost[0].name} is missing and 1 more: publish a new version" in found[1].note
    assert "can't be read as a manifest" in found[2].note
    assert store.describe(GROUP).faults[0] == f"{lost[0].name} is missing"
    for asked in (range(10), [0, 1, 2, 3]):
        with pytest.raises(CorruptVersion, match=r"is missing, but its manifest|bytes differ from its manifest"):
            store.get_online_features([f"{GROUP}:city"], {ENTITY: list(asked)})
    with pytest.raises(CorruptVersion, match=r"is missing, but its manifest|bytes differ from its manifest"):
        store.get_historical_features(pa.table(SPINE), [f"{GROUP}:city"]).to_arrow()
    second.joinpath(layout.MANIFEST).write_bytes(manifest)
    assert store.get_online_features([f"{GROUP}:city"], {ENTITY: [1]}).to_dict()["city"] == ["city 1"]


def test_datasets_and_versions_are_told(store: FeatureStore) -> None:
    withdraw(store.root, DATASET, 2, "wrong currency", "anna")
    assert [(one.name, one.kind, one.version, one.versions) for one in store.list()] == [
        (GROUP, "features", 1, 1),
        (PRODUCTS, "features", 1, 1),
    ]
    found = store.versions(GROUP)
    assert [(one.version, one.status, one.as_of) for one in found] == [
        (1, "published", days(0, 1)),
        (2, "withdrawn", days(2)),
    ]
    assert "wrong currency" in found[1].note
    one = store.describe(GROUP)
    assert (one.version, one.rows, one.entity, one.as_of) == (1, 20, ENTITY, days(0, 1))
    spent = next(column for column in one.columns if column.name == "total_spent")
    assert (spent.type, spent.declared, spent.nulls, spent.maximum) == ("double", 'col("total_spent")', 0.0, 9001.0)
    assert store.describe(DATASET, 1) == one
    with pytest.raises(VersionNotFound, match="was withdrawn by anna"):
        store.describe(GROUP, 2)
