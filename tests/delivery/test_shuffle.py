"""The stages without Ray: which rows become samples, where the others are, and what comes into a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.delivery.shuffle import Look, judge, load, plan_buckets
from tasks.delivery.source import Source, entity_splits, find_source, read_units
from tasks.io.hashing import stable_hash
from tasks.loader.samples import SampleFormat
from tasks.store.layout import join
from tasks.store.reservation import reserve
from tests.delivery.sources import FEATURES, IMAGES, configured, customers, publish, publish_customers, publish_pictures


def first_unit(root: str, **settings: Any) -> tuple[Any, Source, Any]:
    config = configured(root, **settings)
    source = find_source(config)
    return config, source, read_units(source)[0]


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({}, ["", "", "null_k", "null_target", "not_training_ready", ""]),
        ({"ready_only": False}, ["", "", "null_k", "null_target", "null_k", ""]),
        ({"nulls": "reject"}, ["", "null_x", "null_k", "null_target", "not_training_ready", "null_s"]),
        ({"target": "x"}, ["", "null_x", "null_k", "", "not_training_ready", ""]),
    ],
)
def test_each_row_that_is_left_out_has_its_first_reason(
    tmp_path: Path, settings: dict[str, Any], reasons: list[str]
) -> None:
    table = pa.table(
        {
            "k": [1, 2, None, 4, None, 6],
            "x": [1.0, float("nan"), None, 4.0, 5.0, 6.0],
            "s": ["a", "b", "c", "d", "e", None],
            "target": ["u", "v", "u", None, None, "v"],
            "is_training_ready": [True, True, True, True, None, True],
        }
    )
    publish(str(tmp_path), FEATURES, [("", table)], {"entity": "k"})
    config, source, unit = first_unit(str(tmp_path), **settings)
    codes, names = judge(table, source, config)
    assert [names[code] for code in codes] == reasons
    loaded = load(unit, source, config, source.columns)
    assert loaded.rows["k"].to_pylist() == [
        k for k, why in zip(table["k"].to_pylist(), reasons, strict=True) if not why
    ]
    assert loaded.read == 6
    assert loaded.reasons.total() == 6 - loaded.rows.num_rows
    rejected = [row for row, why in enumerate(reasons) if why and why != "not_training_ready"]
    assert loaded.rejected["_row"].to_pylist() == rejected
    assert loaded.rejected["_reason"].to_pylist() == [reasons[row] for row in rejected]


def test_rows_whose_weight_cant_be_drawn_by_are_rejected_with_the_reason(tmp_path: Path) -> None:
    weights = [1.5, 0.0, -0.25, None, float("nan"), float("inf"), -0.0, 1e300]
    table = pa.table({"k": range(8), "x": range(8), "w": weights, "target": [0, 1] * 4})
    publish(str(tmp_path), FEATURES, [("", table)], {"entity": "k"})
    config, source, unit = first_unit(str(tmp_path), weight="w")
    assert source.features == ("x",)
    loaded = load(unit, source, config, source.columns)
    assert loaded.rows["k"].to_pylist() == [0, 1, 6]
    assert loaded.rejected["_reason"].to_pylist() == ["negative_w", "null_w", "null_w", "null_w", "null_w"]


def test_rejected_rows_say_where_they_stood(tmp_path: Path) -> None:
    table = publish_customers(str(tmp_path), rows=300, files=3, row_group=20)
    config = configured(str(tmp_path), ready_only=False)
    source = find_source(config)
    reservation = reserve(str(tmp_path), "copy", "run")
    look = Look(config, source, reservation, tuple(read_units(source, 5000)), 1)
    notes = [look.scatter(unit)[0] for unit in range(len(look.units))]
    assert len(notes) > 3
    files = [note.rejected_file for note in notes if note.rejected_file is not None]
    rows = pa.concat_tables(pq.read_table(join(reservation.uri, entry.path)) for entry in files)
    expected = [row for row, value in enumerate(table["target"].to_pylist()) if value is None]
    places = [
        int(name.split("part-")[1][:5]) * 100 + row
        for name, row in zip(rows["_file"].to_pylist(), rows["_row"].to_pylist(), strict=True)
    ]
    assert places == expected
    assert rows["customer_id"].to_pylist() == [row * 7 for row in expected]
    assert set(rows["_reason"].to_pylist()) == {"null_target"}
    assert sum(note.rejected.total() for note in notes) == len(expected)


def test_tables_are_split_by_their_entity_and_images_keep_their_split(tmp_path: Path) -> None:
    publish_customers(str(tmp_path))
    publish_pictures(str(tmp_path))
    config, source, unit = first_unit(str(tmp_path), validation_share=0.3, test_share=0.2)
    loaded = load(unit, source, config, source.columns)
    wanted = entity_splits(stable_hash(loaded.rows["customer_id"]), 0, 0.3, 0.2)
    assert loaded.splits.tolist() == wanted.tolist()
    assert set(loaded.splits.tolist()) == {0, 1, 2}
    config, source, unit = first_unit(str(tmp_path), dataset=IMAGES)
    loaded = load(unit, source, config, source.columns)
    assert loaded.splits.tolist() == [int(name[0]) - 1 for name in loaded.rows["image_id"].to_pylist()]


def test_hashes_of_all_rows_are_found_in_some_part(tmp_path: Path) -> None:
    publish_customers(str(tmp_path), rows=200)
    config, source, unit = first_unit(str(tmp_path))
    look = Look(config, source, reserve(str(tmp_path), "copy", "run"), (unit,), 4)
    note, frames = look.scatter(0)
    assert len(frames) == 8
    assert sum(len(frame) for frame in frames[:4]) == sum(len(frame) for frame in frames[4:]) == note.samples.sum()
    checked = [look.gather(part, {0: frame})[0] for part, frame in enumerate(frames)]
    assert sum(part.entities for part in checked).tolist() == note.samples.tolist()  # type: ignore[union-attr]
    assert not any(part.repeats or part.leaking for part in checked)


@pytest.mark.parametrize(
    ("samples", "file_bytes", "parts"),
    [
        ([100, 20, 0], 10**9, [1, 1, 0]),
        ([100, 20, 0], 28 * 30, [4, 1, 0]),
        ([3, 0, 2], 1, [3, 0, 2]),  # a file has at least one sample's room
        ([0, 0, 0], 1, [0, 0, 0]),
    ],
)
def test_a_split_has_as_many_files_as_its_samples_need(samples: list[int], file_bytes: int, parts: list[int]) -> None:
    form = SampleFormat(kind="table", shape=(3,), label="int64", batch_size=10)
    assert form.sample_bytes == 28
    buckets = plan_buckets(np.array(samples), form, file_bytes)
    assert [sum(bucket.split == split for bucket in buckets) for split in range(3)] == parts


def test_the_profile_is_of_the_train_split_alone(tmp_path: Path) -> None:
    publish_customers(str(tmp_path), rows=200)
    config, source, unit = first_unit(str(tmp_path))
    note, _ = Look(config, source, reserve(str(tmp_path), "copy", "run"), (unit,), 1).scatter(0)
    table = customers(200)
    splits = entity_splits(stable_hash(table["customer_id"]), 0, 0.2, 0.0)
    kept = np.array(
        [
            ready and target is not None and split == 0
            for ready, target, split in zip(
                table["is_training_ready"].to_pylist(), table["target"].to_pylist(), splits, strict=True
            )
        ]
    )
    assert note.profile is not None
    assert note.profile.rows == kept.sum() == note.samples[0]
    spent = table["spent"].to_numpy()[kept]
    assert note.profile.partial("spent").nulls == (~np.isfinite(spent)).sum()
