"""The Ray job: how it is cut into waves changes nothing that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.reservation import reserve
from tasks.features import pipeline
from tasks.features.config import FeatureStoreConfig
from tasks.features.pipeline import ComputedGroup, compute_groups, pieces_to_read
from tasks.features.plan import plan_features, with_uris
from tasks.features.sample import SAMPLE_AS_OF, write_sample
from tasks.features.standard import STANDARD

SLOTS = 10  # 5 buckets of each of the two groups


def compute(sample: dict[str, str], root: Path) -> tuple[list[ComputedGroup], int]:
    """Both groups, with their dimensions, and the pieces that were read."""
    config = FeatureStoreConfig(root=str(root), rows_per_bucket=1_000, **sample)
    (plan,) = plan_features(with_uris(STANDARD, config), config, SAMPLE_AS_OF)
    reservations = [reserve(str(root), planned.group.name, "run") for planned in plan.groups]
    read: list[int] = []
    groups = compute_groups(plan, config, reservations, SAMPLE_AS_OF, on_read=read.append)
    assert sum(read) == pieces_to_read(plan)
    return groups, sum(read)


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
