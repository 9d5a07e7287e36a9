"""Which versions count together, what supersedes what, and that buckets are cut alike however files are."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest

from tasks.io import storage
from tasks.io.errors import CorruptVersion, DefinitionError, VersionNotFound
from tasks.io.hashing import stable_hash
from tasks.store import layout
from tasks.store.manifest import Manifest
from tasks.store.versions import withdraw
from tasks.training_sets.history import read_bucket, resolve_history
from tests.serving.feature_versions import DAY, ENTITY, GROUP, customers, days, publish_features

DATASET = layout.feature_dataset(GROUP)


def published(root: str, numbers, *at: int, created: int = 0, scale: float = 1.0, **options) -> Manifest:
    """A version of some customers on some days, made on day `created`."""
    frame = customers(numbers, days(*at), scale)
    return publish_features(root, frame, created=DAY + dt.timedelta(days=created), **options)


def whole(root: str, history, buckets: int = 4, **options) -> pl.DataFrame:
    """All buckets together; each has its own rows only."""
    frames = []
    for bucket in range(buckets):
        frame = read_bucket(root, history, bucket, buckets, **options)
        assert (stable_hash(frame[ENTITY].to_arrow()) % np.uint64(buckets) == bucket).all()
        frames.append(frame)
    return pl.concat(frames).sort(ENTITY, "as_of", "_created")


def test_a_history_is_all_live_versions_and_newer_ones_supersede_whole_days(root: str) -> None:
    published(root, range(10), 0, 1, created=1)
    published(root, range(5), 1, 2, created=2, scale=2.0)
    published(root, range(10), 0, 1, 2, created=3)
    withdraw(root, DATASET, 3, "wrong", "me")
    history = resolve_history(root, GROUP, ["*"])
    first, second = history.versions
    assert history.features == ("total_spent", "orders", "city")
    assert (first.version, first.created, first.as_of) == (1, *days(1), days(0, 1))
    assert dict(first.superseded) == dict(zip(days(1), days(2), strict=True))
    assert not second.superseded

    now = whole(root, history)
    counts = dict(now.group_by("as_of").len().iter_rows())
    # On day 1 customers 5 to 9 have no row any more: the newer version has none of them.
    assert counts == dict(zip(days(0, 1, 2), (10, 5, 5), strict=True))
    assert now["_superseded"].null_count() == now.height
    known = whole(root, history, known_at=True)
    assert known.height == 30
    assert known.filter(_superseded=days(2)[0])["as_of"].unique().to_list() == [*days(1)]


def test_a_pinned_history_is_one_version(tmp_path) -> None:
    root = str(tmp_path)
    published(root, range(4), 0)
    published(root, range(4), 0, scale=2.0)
    for pin, number in ((1, 1), ("latest", 2)):
        history = resolve_history(root, GROUP, ["total_spent"], pin)
        assert [version.version for version in history.versions] == [number]
        assert not history.versions[0].superseded
        assert whole(root, history)["total_spent"].to_list() == [0, 1000 * number, 2000 * number, 3000 * number]


def test_versions_that_mean_something_else_are_left_out_with_the_reason(tmp_path) -> None:
    root = str(tmp_path)
    frame = customers(range(4))

    def declared(total: str) -> dict:
        features = {"total_spent": total, "orders": 'col("orders")'}
        return {"name": GROUP, "entity": ENTITY, "source": "transactions", "features": features}

    publish_features(root, frame, definition=declared("a sum"))
    publish_features(root, frame.drop("total_spent"), definition=declared("the new sum"))
    publish_features(root, frame.with_columns(pl.col("total_spent").cast(pl.Int64)), definition=declared("the new sum"))
    publish_features(root, frame, definition=declared("the new sum"))
    history = resolve_history(root, GROUP, ["total_spent"])
    assert [version.version for version in history.versions] == [4]
    reasons = dict(history.left_out)
    assert "declares 'total_spent' otherwise than v4" in reasons[1]
    assert "has no 'total_spent'" in reasons[2]
    assert "of type int64 in it, of double in v4" in reasons[3]
    # A feature that hasn't changed keeps its whole history, as have the dimension's columns.
    assert len(resolve_history(root, GROUP, ["orders", "city"]).versions) == 4


@pytest.mark.parametrize("buckets", [1, 2, 8])
def test_buckets_are_the_same_however_the_files_are_cut(root: str, buckets: int) -> None:
    expected = customers(range(50), days(0, 1, 2)).drop("is_training_ready")
    published(root, range(50), 0, buckets=None)
    published(root, range(50), 1, buckets=2)
    published(root, range(50), 2, buckets=8, row_group_size=3)
    history = resolve_history(root, GROUP, ["*"])
    found = whole(root, history, buckets)
    assert found.select(expected.columns).equals(expected.sort(ENTITY, "as_of"))
    some = pl.Series(ENTITY, [3, 17, 49, 1000])
    assert whole(root, history, buckets, keys=some).equals(found.filter(pl.col(ENTITY).is_in(some.implode())))


def test_a_version_made_before_histories_says_its_time_in_its_profile(tmp_path) -> None:
    root = str(tmp_path)
    frame = customers(range(3)).with_columns(pl.lit(DAY, pl.Datetime("us", "UTC")).alias("as_of"))
    publish_features(root, frame, buckets=None)
    publish_features(root, frame.head(1), buckets=None, created=DAY + dt.timedelta(days=1))
    assert [version.as_of for version in resolve_history(root, GROUP, ["*"]).versions] == [days(0), days(0)]
    assert whole(root, resolve_history(root, GROUP, ["*"])).height == 1


def test_mistakes_name_the_cure(tmp_path) -> None:
    root = str(tmp_path)
    with pytest.raises(VersionNotFound, match="run the flow"):
        resolve_history(root, GROUP, ["*"])
    manifest = published(root, range(4), 0)
    with pytest.raises(VersionNotFound, match="did you mean 'customer-features'"):
        resolve_history(root, "customers-features", ["*"])
    with pytest.raises(DefinitionError, match="did you mean 'total_spent'"):
        resolve_history(root, GROUP, ["total_spend"])
    with pytest.raises(VersionNotFound, match=r"published: v1"):
        resolve_history(root, GROUP, ["*"], 7)
    history = resolve_history(root, GROUP, ["*"])
    storage.delete(layout.join(layout.version_uri(root, DATASET, 1), manifest.files[0].path))
    with pytest.raises(CorruptVersion, match="is missing, but its manifest lists it: publish a new version"):
        whole(root, history)
    withdraw(root, DATASET, 1, "wrong", "me")
    with pytest.raises(VersionNotFound, match="no published version"):
        resolve_history(root, GROUP, ["*"])
