"""What is exported to Redis is what the files say, also after an export that was stopped or repeated."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.io.errors import ConfigError, DefinitionError, InputError, VersionConflict, VersionNotFound
from tasks.serving.feature_store import FeatureStore
from tasks.serving.online import RedisLookup, export_latest
from tasks.store.versions import withdraw
from tests.serving.feature_versions import ENTITY, GROUP, customers, days, publish_features
from tests.serving.redis_server import redis_url  # noqa: F401 - a fixture

redis = pytest.importorskip("redis", reason="the Redis client isn't installed")


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The server, empty."""
    found: str = request.getfixturevalue("redis_url")
    redis.Redis.from_url(found).flushall()
    return found


def test_redis_answers_as_the_files_do(tmp_path: Path, url: str) -> None:
    root = str(tmp_path)
    frame = customers(range(1200), days(0, 1)).with_columns(
        pl.when(pl.col(ENTITY) % 5 > 0).then(pl.col("total_spent") / 7).alias("total_spent"),
        pl.when(pl.col(ENTITY) == 3).then(float("nan")).otherwise(float("inf")).alias("odd"),
        pl.lit(dt.datetime(2024, 1, 1, 12, 0, 0, 1), pl.Datetime("us")).alias("seen"),
        (pl.col(ENTITY) % 2 == 0).alias("even"),
        pl.lit("ü:\n\"'\0 ").alias("text"),
    )
    publish_features(root, frame)
    assert export_latest(root, GROUP, url) == 1200
    store, rows = FeatureStore(root), {ENTITY: [3, 5, 7, None, 99_999, 7]}
    found, expected = (store.get_online_features([f"{GROUP}:*"], rows, from_redis=u).to_arrow() for u in (url, None))
    assert found.schema == expected.schema
    assert found.drop_columns("odd") == expected.drop_columns("odd")
    assert str(found["odd"].to_pylist()) == str(expected["odd"].to_pylist()) == "[nan, inf, inf, None, None, inf]"


def test_an_export_can_be_repeated_and_takes_what_is_gone_away(tmp_path: Path, url: str) -> None:
    root, client = str(tmp_path), redis.Redis.from_url(url)
    publish_features(root, customers(range(10)))
    for _ in range(2):
        export_latest(root, GROUP, url)
        assert len(client.keys(f"{GROUP}:*")) == 10
    publish_features(root, customers(range(5, 12), days(1)))
    export_latest(root, GROUP, url)
    assert sorted(client.keys(f"{GROUP}:*")) == sorted(f"{GROUP}:{n}".encode() for n in range(5, 12))
    assert client.hgetall(f"{GROUP}:7")[b"_version"] == b"2"
    withdraw(root, "feature-store/customer-features", 2, "wrong", "anna")
    export_latest(root, GROUP, url)
    found = RedisLookup(GROUP, url)
    assert found.version == 1
    assert found.rows([4, 7, 11], ["total_spent"])["total_spent"].to_pylist() == [4000.0, 7000.0, None]


def test_an_export_that_was_stopped_leaves_whole_rows_and_is_finished_by_the_next(tmp_path: Path, url: str) -> None:
    root = str(tmp_path)
    publish_features(root, customers(range(2000)), buckets=4)
    export_latest(root, GROUP, url)
    publish_features(root, customers(range(1000, 3000), days(1)), buckets=4)

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_latest(root, GROUP, url, on_written=stop)
    values = RedisLookup(GROUP, url).rows(range(2000), ["total_spent", "city"]).to_pylist()
    assert all(row["total_spent"] in (key * 1000.0, key * 1000.0 + 1) for key, row in enumerate(values))
    assert export_latest(root, GROUP, url) == 2000, "the lock of an export that was stopped is free again"
    found = RedisLookup(GROUP, url).rows([999, 1000, 2999], ["total_spent"])
    assert found["total_spent"].to_pylist() == [None, 1_000_001.0, 2_999_001.0]


def recent(*ages: dt.timedelta) -> list[dt.datetime]:
    now = dt.datetime.now(dt.UTC)
    return [now - age for age in ages]


def test_rows_expire_and_are_told_from_those_that_never_were(tmp_path: Path, url: str) -> None:
    root, client, hour = str(tmp_path), redis.Redis.from_url(url), dt.timedelta(hours=1)
    old, young = recent(30 * hour, hour)
    publish_features(root, pl.concat([customers(range(5), [old]), customers(range(5, 10), [young])]))
    assert export_latest(root, GROUP, url, ttl_days=1) == 5, "what has expired isn't written"
    assert 22.9 < client.pttl(f"{GROUP}:7") / 3_600_000 < 23, "Redis drops a row a day after its as-of time"
    features = [f"{GROUP}:orders"]

    def statuses(**options: Any) -> list[str]:
        store = FeatureStore(root)
        rows = {ENTITY: [1, 7, 99, None]}
        return store.get_online_features(features, rows, include_status=True, **options).to_dict()["orders__status"]

    expected = ["EXPIRED", "PRESENT", "NOT_FOUND", "NOT_FOUND"]
    assert statuses(from_redis=url) == statuses(from_redis=url, ttl_days=9) == statuses(ttl_days=1) == expected
    assert statuses(from_redis=url, ttl_days=1 / 48)[:2] == ["EXPIRED", "EXPIRED"]
    aging = (dt.datetime.now(dt.UTC) - young + dt.timedelta(seconds=1)) / dt.timedelta(days=1)
    assert export_latest(root, GROUP, url, ttl_days=aging) == 5
    assert statuses(from_redis=url)[1] == "PRESENT"
    while client.exists(f"{GROUP}:7"):
        time.sleep(0.05)
    assert statuses(from_redis=url) == statuses(from_redis=url, now=young) == ["EXPIRED", "EXPIRED", *expected[2:]]
    export_latest(root, GROUP, url)
    assert statuses(from_redis=url) == statuses() == ["PRESENT", "PRESENT", "NOT_FOUND", "NOT_FOUND"]
    assert client.pttl(f"{GROUP}:7") == -1
    assert not client.exists(f"{GROUP}/expiring")
    client.hdel(GROUP, "ttl")
    with pytest.raises(VersionNotFound, match="of an earlier release, without times: export it again"):
        RedisLookup(GROUP, url)
    with pytest.raises(InputError, match="ttl_days = -1"):
        export_latest(root, GROUP, url, ttl_days=-1)


def test_one_export_at_a_time(tmp_path: Path, url: str) -> None:
    publish_features(str(tmp_path), customers(range(10)))
    with redis.Redis.from_url(url).lock(f"{GROUP}/lock", timeout=60), pytest.raises(VersionConflict, match="under way"):
        export_latest(str(tmp_path), GROUP, url)


def test_mistakes_are_named(tmp_path: Path, url: str) -> None:
    root = str(tmp_path)
    with pytest.raises(VersionNotFound, match="no published version"):
        export_latest(root, GROUP, url)
    with pytest.raises(VersionNotFound, match="isn't in Redis"):
        RedisLookup(GROUP, url)
    with pytest.raises(ConfigError, match="no Redis URL"):
        RedisLookup(GROUP, "localhost")
    with pytest.raises(ConnectionError, match=r"Redis doesn't answer .*correct the URL"):
        RedisLookup(GROUP, "redis://:secret@127.0.0.1:1/0")
    publish_features(root, customers(range(10)))
    export_latest(root, GROUP, url)
    with pytest.raises(DefinitionError, match="did you mean 'city'"):
        RedisLookup(GROUP, url).rows([1], ["cty"])
    with pytest.raises(InputError, match="are of type int64"):
        RedisLookup(GROUP, url).rows(["x"], ["city"])
    for key in (2.0**53, True, 1.5):
        with pytest.raises(InputError, match="are of type int64"):
            RedisLookup(GROUP, url).rows([key], ["city"])
    with pytest.raises(DefinitionError, match="is pinned, but Redis has its newest values only"):
        FeatureStore(root).get_online_features([f"{GROUP}:city@v1"], {ENTITY: [1]}, from_redis=url)
