"""Look-ups find the newest row of exactly the entities that are asked for, however the version is laid out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io import storage
from tasks.io.errors import CorruptVersion, DefinitionError, InputError
from tasks.serving import online
from tasks.serving.online import Lookup
from tasks.store import versions
from tasks.store.catalogue import newest
from tasks.store.versions import withdraw
from tests.serving.feature_versions import ENTITY, customers, days, publish_features


@pytest.mark.parametrize("buckets", [1, 4, None])
def test_a_key_gets_its_own_newest_row_and_an_unknown_one_nulls(root: str, buckets: int | None) -> None:
    times = days(0, 1, 2) if buckets else days(2)
    manifest = publish_features(root, customers(range(0, 500, 2), times), buckets=buckets, row_group_size=16)
    found = Lookup(root, manifest).rows([4, 3, 498, 4, None, 10**12], ["total_spent", "city"])
    assert found.to_pydict() == {
        "total_spent": [4002.0, None, 498002.0, 4002.0, None, None],
        "city": ["city 1", None, "city 0", "city 1", None, None],
    }


@pytest.mark.parametrize("number", range(8))
def test_the_last_row_counts_also_where_an_entity_spans_row_groups(tmp_path: Path, number: int) -> None:
    """Five rows an entity in row groups of three: each boundary cuts an entity somewhere else."""
    manifest = publish_features(str(tmp_path), customers(range(8), days(*range(5))), buckets=1, row_group_size=3)
    found = Lookup(str(tmp_path), manifest).rows([number], ["total_spent"])
    assert found["total_spent"].to_pylist() == [number * 1000.0 + 4]


@settings(max_examples=25)
@given(
    held=st.lists(st.integers(-5, 60), min_size=1, max_size=60, unique=True),
    asked=st.lists(st.one_of(st.none(), st.integers(-8, 70)), max_size=40),
    times=st.integers(1, 4),
    buckets=st.sampled_from([1, 2, 8]),
    size=st.integers(1, 9),
    text=st.booleans(),
)
def test_look_ups_equal_a_search_through_all_rows(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    held: list[int],
    asked: list[int | None],
    times: int,
    buckets: int,
    size: int,
    text: bool,
) -> None:
    root = str(tmp_path_factory.mktemp("root"))
    frame = customers(held, days(*range(times)))
    keys: list[Any] = [None if key is None else f"é{key}" if text else key for key in asked]
    if text:
        frame = frame.with_columns(pl.format("é{}", ENTITY).alias(ENTITY))
    manifest = publish_features(root, frame, buckets=buckets, row_group_size=size)
    last = {row[ENTITY]: row["total_spent"] for row in frame.sort("as_of").to_dicts()}
    found = Lookup(root, manifest, cache_bytes=200).rows(keys, ["total_spent"])  # a cache that throws away all the time
    assert found["total_spent"].to_pylist() == [last.get(key) for key in keys]


def test_any_columns_in_any_order_and_the_key_too(tmp_path: Path) -> None:
    manifest = publish_features(str(tmp_path), customers(range(50)))
    lookup = Lookup(str(tmp_path), manifest)
    assert lookup.rows([3], ["city"]).to_pydict() == {"city": ["city 0"]}
    assert lookup.rows([3], ["orders", "city", ENTITY]).to_pydict() == {"orders": [3], "city": ["city 0"], ENTITY: [3]}
    assert lookup.rows([], ["orders"]).schema == pa.schema([("orders", pa.int64())])
    assert lookup.rows(pa.chunked_array([[1], [2]]), ["orders"]).to_pydict() == {"orders": [1, 2]}


def test_keys_that_are_of_another_type_are_cast_or_refused(tmp_path: Path) -> None:
    lookup = Lookup(str(tmp_path), publish_features(str(tmp_path), customers(range(5))))
    assert lookup.rows(["3"], ["orders"]).to_pydict() == {"orders": [3]}  # as a command line gives them
    with pytest.raises(InputError, match=r"keys of feature-store/customer-features v1 .* are of type int64"):
        lookup.rows(["three"], ["orders"])
    with pytest.raises(DefinitionError, match=r"v1 has no column 'total_spend'; did you mean 'total_spent'"):
        lookup.rows([3], ["total_spend"])


def test_only_the_row_groups_of_the_keys_are_read_and_used_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = publish_features(str(tmp_path), customers(range(10_000)), row_group_size=100)
    lookup = Lookup(str(tmp_path), manifest)
    read: list[int] = []
    original = online.pq.ParquetFile

    class Counting(original):  # type: ignore[misc, valid-type]
        def read_row_group(self, group: int, **options: Any) -> pa.Table:
            read.append(group)
            return super().read_row_group(group, **options)

    monkeypatch.setattr(online.pq, "ParquetFile", Counting)
    lookup.rows([17, 17, 18], ["orders"])
    assert len(read) <= 2
    lookup.rows([17], ["orders"])
    assert len(read) <= 2, "it was in memory"


def test_the_cache_keeps_to_its_size() -> None:
    cache = online._Cache(most=1000)
    for number in range(20):
        cache.put((0, number), pa.record_batch([np.zeros(50)], names=["a"]))  # 400 bytes
        assert cache._bytes == sum(batch.nbytes for batch in cache._held.values()) <= 1000
    assert list(cache._held) == [(0, 18), (0, 19)]
    cache.put((0, 20), pa.record_batch([np.zeros(500)], names=["a"]))
    assert (cache._bytes, cache.get((0, 20))) == (0, None), "what is larger than the cache isn't kept"


def test_threads_may_share_a_lookup(tmp_path: Path) -> None:
    manifest = publish_features(str(tmp_path), customers(range(5000)), row_group_size=64)
    lookup = Lookup(str(tmp_path), manifest, cache_bytes=20_000)
    asked = [[number, 4999 - number] for number in range(0, 2500, 25)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda keys: lookup.rows(keys, ["total_spent"])["total_spent"].to_pylist(), asked))
    assert found == [[key * 1000.0 for key in keys] for keys in asked]


def test_a_missing_file_is_named(root: str) -> None:
    manifest = publish_features(root, customers(range(50)), buckets=1)
    storage.delete(versions.data_files(root, manifest)[0])
    with pytest.raises(CorruptVersion, match=r"part-00000-a1.parquet is missing"):
        Lookup(root, manifest).rows([1], ["orders"])


def test_an_old_day_computed_again_does_not_serve_old_values(tmp_path: Path) -> None:
    root = str(tmp_path)
    dataset = "feature-store/customer-features"
    assert newest(root, dataset) is None
    for times, served in ((days(0, 1), 1), (days(2), 2), (days(0), 2)):
        publish_features(root, customers(range(5), times))
        assert newest(root, dataset) == versions.read_manifest(root, dataset, served)
    publish_features(root, customers(range(5), days(1)), buckets=None)
    live = versions.live_manifests(root, dataset)
    assert [manifest.as_of for manifest in live] == [days(0, 1), days(2), days(0), days(1)]
    assert newest(root, dataset) == live[1]
    withdraw(root, dataset, 2, "wrong", "anna")
    assert newest(root, dataset) == live[3], "of those that hold the newest as-of time that is left the newest"
