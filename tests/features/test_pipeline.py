"""The Ray job: how its rows are brought to their buckets changes nothing that is written."""

from __future__ import annotations

import datetime as dt
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.engine import jobs
from tasks.feature_store import group_record
from tasks.features import pipeline
from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Definitions, FeatureGroup
from tasks.features.gate import judge_group
from tasks.features.pipeline import ComputedGroup, compared, compute_groups, pieces_to_read
from tasks.features.plan import plan_features, with_uris
from tasks.features.sources import ReadUnit, together
from tasks.features.standard import SAMPLE_AS_OF, STANDARD, write_sample
from tasks.io.hashing import stable_hash
from tasks.publication import manifest_of
from tasks.quality import sketch
from tasks.store import layout, versions
from tasks.store.manifest import RunRecord
from tasks.store.reading import latest
from tasks.store.reservation import reserve

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


def test_many_small_files_are_read_by_few_tasks_and_give_the_same_bytes(ray_cluster: None, tmp_path: Path) -> None:
    sample = write_sample(str(tmp_path / "sample"), 5_000, 0)
    table = pq.read_table(sample["transactions"])
    small = tmp_path / "small"
    small.mkdir()
    for number in range(100):
        pq.write_table(table.slice(number * 50, 50), small / f"{number:03d}.parquet")
    few, _ = compute(sample, tmp_path / "few")
    many, pieces = compute({**sample, "transactions": str(small)}, tmp_path / "many")
    assert pieces == 5 + 2, "tasks read a thousand rows, whatever their files; and each dimension"
    for one, other in zip(few, many, strict=True):
        assert other.files == one.files
        assert other.balances == one.balances
        assert sum(entry.rows for entry in other.rejected_files) == sum(entry.rows for entry in one.rejected_files)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40),
    rows=st.integers(1, 40),
)
def test_units_are_put_together_in_order_by_size_and_kind(sizes: list[tuple[int, bool]], rows: int) -> None:
    units = [
        ReadUnit(f"{number}", "parquet", (), rows=size, first_row=kind) for number, (size, kind) in enumerate(sizes)
    ]
    tasks = together(units, rows, lambda unit: unit.first_row)
    assert [unit for task in tasks for unit in task] == units
    assert all(task for task in tasks)
    assert all(len(task) == 1 or sum(unit.rows for unit in task) <= rows for task in tasks)
    assert all(len({unit.first_row for unit in task}) == 1 for task in tasks)
    for one, other in pairwise(tasks):
        full = sum(unit.rows for unit in one) + other[0].rows > rows
        assert full or one[-1].first_row != other[0].first_row, "there was room for another unit"


@pytest.mark.parametrize("partitions", [1, 3, 16])
def test_the_partitions_of_the_shuffle_change_no_byte_and_no_count(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    sample = write_sample(str(tmp_path / "sample"), 5_000, 0)
    whole, pieces = compute(sample, tmp_path / "whole")
    monkeypatch.setattr(jobs, "MAX_PARTITIONS", partitions)
    monkeypatch.setattr(jobs, "PARTITION_BYTES", 1)
    cut, cut_pieces = compute(sample, tmp_path / "cut")
    assert cut_pieces == pieces
    for one, other in zip(whole, cut, strict=True):
        assert other.files == one.files
        assert other.rejected_files == one.rejected_files
        assert other.balances == one.balances
        assert other.profile.columns() == one.profile.columns()
        assert len(one.files) == SLOTS // 2
        assert one.rejected_files


def test_the_driver_holds_no_sketch_of_each_column_time_and_bucket(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `tests/benchmarks/growth.py` measures, as counts: sketches take half a megabyte each."""
    alive = most = 0

    def counted(*arguments: Any) -> sketch.QuantileSketch:
        nonlocal alive, most
        made = unpickled(*arguments)
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(made, ended)
        return made

    def ended() -> None:
        nonlocal alive
        alive -= 1

    unpickled = sketch._unpickled
    monkeypatch.setattr(sketch, "_unpickled", counted)
    transactions = write_sample(str(tmp_path / "sample"), 20_000, 0)["transactions"]
    held = []
    for number, (columns, times, rows_per_bucket) in enumerate(
        [(3, 1, 2_500), (3, 1, 1_000), (30, 1, 2_500), (3, 6, 2_500)]
    ):
        features = {f"amount_{n}": (pl.col("amount") * (n + 1)).sum() for n in range(columns)}
        wide = FeatureGroup(name="wide", entity="customer_id", source="transactions", features=features)
        declared = Definitions(events=STANDARD.events, dimensions={}, groups={"wide": wide})
        root = str(tmp_path / str(number))
        config = FeatureStoreConfig(root=root, transactions=transactions, rows_per_bucket=rows_per_bucket)
        as_of = tuple(SAMPLE_AS_OF - dt.timedelta(days=30 * back) for back in reversed(range(times)))
        (plan,) = plan_features(with_uris(declared, config), config, as_of)
        most = 0
        (group,) = compute_groups(plan, config, [reserve(root, "wide", "run")], SAMPLE_AS_OF)
        assert group.profile.columns()["amount_2"].quantiles
        held.append(most)
    assert held == held[:1] * len(held), "more buckets, columns and times, and as many sketches"


def test_drift_is_judged_against_the_last_version_whenever_that_was_published(
    ray_cluster: None, tmp_path: Path
) -> None:
    root, found = str(tmp_path / "root"), []
    for seed in (0, 1):
        run = RunRecord(flow_run_id=f"run {seed}")
        sample = write_sample(str(tmp_path / str(seed)), 5_000, seed)
        config = FeatureStoreConfig(root=root, rows_per_bucket=1_000, **sample)
        (plan,) = plan_features(with_uris(STANDARD, config), config, (SAMPLE_AS_OF,))
        datasets = [layout.feature_dataset(planned.group.name) for planned in plan.groups]
        reservations = [reserve(root, dataset, run.flow_run_id) for dataset in datasets]
        previous = [latest(root, dataset) for dataset in datasets]
        for number, group in enumerate(compute_groups(plan, config, reservations, SAMPLE_AS_OF)):
            before = previous[number]
            gate = judge_group(config, compared(group, before), before)
            if before is not None:
                assert compared(group, before) is group
                unaware = replace(group, drift={}, compared=None)
                assert judge_group(config, compared(unaware, before), before) == gate
                found.append(sum(check.name == "drift" and "PSI" in check.message for check in gate.checks))
            recorded = group_record(plan, number, group)
            versions.commit(group.reservation, manifest_of(group, gate, config, run, recorded))
    assert len(found) == 2
    assert found[0] >= 3, "the customers; of products there are too few to judge"
