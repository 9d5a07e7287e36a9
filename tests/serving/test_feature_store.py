"""The store as its users read it: the newest values, values at a time, and what there is."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, DefinitionError, InputError, SourceError, VersionNotFound
from tasks.serving.feature_store import FeatureStore
from tasks.store import layout, versions
from tasks.store.versions import withdraw
from tests.serving.feature_versions import DAY, ENTITY, GROUP, customers, days, publish_features

DATASET = layout.feature_dataset(GROUP)
BAD_DAYS = [-1, 0, float("nan"), float("inf"), True, "30", 1e9]
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


NOW = DAY + dt.timedelta(days=32)  # the newest values are 30 days old


@pytest.mark.parametrize(
    ("late", "statuses", "value"),
    [
        (0, ["PRESENT", "NULL", "NOT_FOUND", "NOT_FOUND"], 7002.0),  # exactly as old as it may be
        (1, ["EXPIRED", "EXPIRED", "NOT_FOUND", "NOT_FOUND"], None),  # a microsecond older
    ],
)
def test_values_expire_alike_in_look_ups_and_at_a_time(
    root: str, late: int, statuses: list[str], value: float | None
) -> None:
    spent = pl.when(pl.col(ENTITY) != 8).then("total_spent").alias("total_spent")
    publish_features(root, customers(range(10), days(0, 2)).with_columns(spent))
    store, now = FeatureStore(root), NOW + dt.timedelta(microseconds=late)
    keys = [7, 8, 99, None]
    features: Any = {"features": [f"{GROUP}:total_spent"], "ttl_days": 30, "include_status": True}
    online = store.get_online_features(entity_rows={ENTITY: keys}, now=now, **features).to_dict()
    assert online == {ENTITY: keys, "total_spent": [value, None, None, None], "total_spent__status": statuses}
    spine = pl.DataFrame({ENTITY: keys, "event_timestamp": [now] * 4})
    past = store.get_historical_features(spine, **features).to_dict()
    assert {name: past[name] for name in online} == online
    without = store.get_online_features([f"{GROUP}:total_spent"], {ENTITY: keys}, ttl_days=30, now=now).to_dict()
    assert without == {ENTITY: keys, "total_spent": [value, None, None, None]}
    ever = store.get_online_features([f"{GROUP}:*"], {ENTITY: keys}, include_status=True).to_dict()
    assert ever["total_spent__status"] == ["PRESENT", "NULL", "NOT_FOUND", "NOT_FOUND"]
    assert list(ever) == [ENTITY, *(f"{n}{end}" for n in ("total_spent", "orders", "city") for end in ("", "__status"))]


def test_a_status_at_a_time_tells_expired_from_not_yet_there(store: FeatureStore) -> None:
    found = store.get_historical_features(
        pl.DataFrame(SPINE), [f"{GROUP}:city"], ttl_days=2, strict=True, include_status=True
    )
    assert found.to_dict()["city__status"] == ["PRESENT", "EXPIRED", "NOT_FOUND"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"ttl_days": days}, r"ttl_days = .*number of days above 0") for days in BAD_DAYS),
        ({"now": dt.datetime(2024, 1, 1)}, r"datetime with a time zone"),
        ({"now": dt.datetime(2999, 1, 1, tzinfo=dt.UTC)}, r"now = 2999.* is in the future"),
        ({"features": f"{GROUP}:city"}, r"give a list"),
        ({"features": [1]}, r"'1' names no feature"),
        ({"entity_rows": []}, r"no entities are asked for"),
        ({"entity_rows": {ENTITY: 17}}, r"give a list of keys, such as \{'customer_id': \[17\]\}"),
        ({"entity_rows": {ENTITY: "17"}}, r"give a list of keys"),
        ({"entity_rows": [{ENTITY: 1}, {"custmer_id": 2}]}, r"row 0 of the entities has no 'custmer_id'"),
        ({"entity_rows": [17]}, r"row 0 of the entities is 17"),
        ({"entity_rows": {ENTITY: [1], "city": ["a"]}}, r"have a column 'city' already.*full_feature_names"),
        ({"entity_rows": 17}, r"rows of type int can't be read"),
    ],
)
def test_arguments_of_look_ups_that_can_not_be_meant(store: FeatureStore, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        store.get_online_features(**{"features": [f"{GROUP}:city"], "entity_rows": {ENTITY: [1]}, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": ""}, "give the path"),
        ({"root": None}, "give the path"),
        ({"refresh_seconds": -1}, "refresh_seconds = -1"),
        ({"cache_bytes": float("nan")}, "cache_bytes = nan"),
    ],
)
def test_a_store_that_can_not_be(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureStore(**arguments)


@pytest.mark.parametrize("version", [1, "1", "v1"])
def test_a_version_is_named_as_one_likes(store: FeatureStore, version: Any) -> None:
    assert FeatureStore(Path(store.root)).describe(GROUP, version).version == 1
    assert versions.read_table(store.root, DATASET, version).num_rows == 20
    found = store.get_online_features([f"{GROUP}:total_spent@{version}"], {ENTITY: [7]})
    assert found.to_dict()["total_spent"] == [7001.0]
    with pytest.raises(ConfigError, match="no version; write it as v3 or 3"):
        store.describe(GROUP, f"{version}.5")


def test_entities_may_be_a_table(store: FeatureStore) -> None:
    for table in (pa.table({ENTITY: [3]}), pl.DataFrame({ENTITY: [3]}), pd.DataFrame({ENTITY: [3]})):
        assert store.get_online_features([f"{GROUP}:orders"], table).to_dict() == {ENTITY: [3], "orders": [3]}


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


def test_rows_that_can_not_be_read(store: FeatureStore, tmp_path: Path) -> None:
    def fails(rows: Any, message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            store.get_historical_features(rows, [f"{GROUP}:city"], **options).to_arrow()

    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    fails(str(tmp_path / "cut.parquet"), r"cut.parquet can't be read: .*mend or remove the file")
    twice = pa.table([[1], [1], days(0)], names=[ENTITY, ENTITY, "event_timestamp"])
    fails(twice, r"several columns named 'customer_id'")
    fails(pd.DataFrame({ENTITY: [1, "a"], "event_timestamp": days(0, 1)}), r"values of one type")
    fails(pa.table(SPINE), r"ttl_days = -1", ttl_days=-1)


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
