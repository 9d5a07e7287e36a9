"""The Ray job: how it is cut into waves changes nothing that is written."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.core.hashing import stable_hash
from tasks.core.reservation import reserve
from tasks.features import pipeline
from tasks.features.config import FeatureStoreConfig
from tasks.features.pipeline import ComputedGroup, compute_groups, pieces_to_read
from tasks.features.plan import plan_features, with_uris
from tasks.features.sample import SAMPLE_AS_OF, write_sample
from tasks.features.standard import STANDARD

SLOTS = 16  # 8 buckets of each of the two groups


def compute(sample: dict[str, str], root: Path) -> tuple[list[ComputedGroup], int]:
    """Both groups, with their dimensions, and the pieces that were read."""
    config = FeatureStoreConfig(root=str(root), rows_per_bucket=1_000, **sample)
    (plan,) = plan_features(with_uris(STANDARD, config), config, (SAMPLE_AS_OF,))
    reservations = [reserve(str(root), planned.group.name, "run") for planned in plan.groups]
    read: list[int] = []
    groups = compute_groups(plan, config, reservations, SAMPLE_AS_OF, on_read=read.append)
    assert sum(read) == pieces_to_read(plan)
    return groups, sum(read)


def test_rows_lie_where_a_look_up_finds_them(ray_cluster: None, tmp_path: Path) -> None:
    """In the file of their bucket, by entity and time; also where a time has no rows yet."""
    sample = write_sample(str(tmp_path / "sample"), 5_000, 0)
    config = FeatureStoreConfig(root=str(tmp_path), rows_per_bucket=1_000, **sample)
    before_all = SAMPLE_AS_OF - dt.timedelta(days=5_000)
    times = (before_all, *(SAMPLE_AS_OF - dt.timedelta(days=days) for days in (720, 300, 0)))
    (plan,) = plan_features(with_uris(STANDARD, config), config, times)
    reservations = [reserve(str(tmp_path), planned.group.name, "run") for planned in plan.groups]
    for planned, group in zip(plan.groups, compute_groups(plan, config, reservations, SAMPLE_AS_OF), strict=True):
        key, buckets = planned.group.entity, pipeline.bucket_count(plan)
        assert buckets & (buckets - 1) == 0
        for file in group.files:
            rows = pq.read_table(f"{group.reservation.uri}/{file.path}")
            bucket = int(file.path.split("-")[1])
            assert set((stable_hash(rows[key]) % buckets).tolist()) == {bucket}
            places = list(zip(rows[key].to_pylist(), rows["as_of"].to_pylist(), strict=True))
            assert places == sorted(places)
            assert len(set(places)) == len(places)
        assert group.profile.rows == group.balances[-1].rows_out
        assert group.duplicate_keys == 0
        assert before_all not in set(rows["as_of"].to_pylist())


@pytest.mark.parametrize("waves", [2, 3, 8])
def test_waves_change_no_byte_and_no_count(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waves: int
) -> None:
    sample = write_sample(str(tmp_path / "sample"), 5_000, 0)
    whole, pieces = compute(sample, tmp_path / "whole")
    # Both groups need two keys, the time and the amount, customers also the category: a store for a wave's share of it.
    size = pipeline.PACKED_BYTES
    volume = 5_000 * (2 * (2 * size["key"] + size["time"] + size["number"]) + size["any"])
    monkeypatch.setattr(pipeline, "object_store_bytes", lambda: int(volume / waves / pipeline.STORE_SHARE) + 10)
    cut, cut_pieces = compute(sample, tmp_path / "cut")
    assert cut_pieces == waves * pieces
    for one, other in zip(whole, cut, strict=True):
        assert other.files == one.files
        assert other.rejected_files == one.rejected_files
        assert other.balances == one.balances
        assert other.profile.columns() == one.profile.columns()
        assert len(one.files) == SLOTS // 2
        assert one.rejected_files
