"""Faults of images that their gate notices; the laws of all gates are in `tests.test_kinds`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.images import gate
from tasks.images.config import Augmentation, ImageAugmentationConfig, ImageThresholds
from tasks.images.gate import trial
from tasks.images.outcomes import ORIGINALS
from tasks.images.rows import rows_schema
from tasks.io.errors import InputError
from tasks.quality import rules
from tasks.quality.faults import Trial
from tasks.store.manifest import FaultResult, FileEntry, Manifest, RowBalance
from tests.gates import RULES, by_fault, lax, made_by, outcomes
from tests.manifests import manifest

CLASSES = {"bee": 100, "cat": 150, "dog": 250}
EXPECTED = outcomes("""
    no rows          refused  rows
    duplicates       refused  unique of image_id
    lost rows        refused  balance of variants
    empty files      refused  rejected of images
    blank pictures   refused  invalid
    dark pictures    warned  ready
    split overlap    refused  leak
    no train rows    refused  split of train
    uneven split     warned  stratification of class_name
    rare class       warned  class balance of class_name
    missing class    warned  classes of class_name
    shift            refused  drift of class_name
    worse pictures   refused  drift of data_quality_score
    range            refused  range of class_id
    score range      refused  range of data_quality_score
    shared class id  refused  unique of class_id
    schema           refused  schema of image_id
    other type       refused  compatibility of class_id
""")
SAID = {
    "split overlap": (
        "A copy of 20% of the images was put into another split, under another name.",
        "100 groups of rows that belong together are in several splits.",
    ),
}
LAXEST = lax(empty_files="rejected", blank_pictures="invalid", shift="drift", worse_pictures="drift") | {
    "dark pictures": {"ready_warn": 0, "ready_fail": 0},
    "rare class": {"balance_warn": 0},
}
CHECKS = {
    **{fault: RULES[fault] for fault in ("no rows", "duplicates", "lost rows", "schema", "range")},
    **made_by(rules, split_overlap="check_leak", no_train_rows="check_split_sizes"),
    **made_by(rules, uneven_split="check_stratification", score_range="check_range"),
    **made_by(gate, missing_class="_same_classes", other_type="_compatibility"),
}


def originals(counts: dict[str, int] | None = None) -> pa.Table:
    """Good images, a fifth of each class in validation."""
    counts = counts or CLASSES
    names = [name for name, count in counts.items() for _ in range(count)]
    rows = len(names)
    places = [place for count in counts.values() for place in range(count)]
    columns: dict[str, Any] = {
        "image_id": [f"{name}/{place}" for name, place in zip(names, places, strict=True)],
        "uri": ["x"] * rows,
        "bytes": [9] * rows,
        "content_xxh3": [f"{number:032x}" for number in range(rows)],
        "format": ["JPEG"] * rows,
        "height": [32] * rows,
        "width": [32] * rows,
        "class_name": names,
        "class_id": [list(counts).index(name) for name in names],
        "split": ["validation" if place % 5 == 0 else "train" for place in places],
        "alike": [None] * rows,
        "perceptual_hash": np.arange(rows),
        "mean_score": np.random.default_rng(0).choice([0.75, 0.875, 1.0], rows),
        "passed": [1 if place % 5 == 0 else 2 for place in places],
        "ready": [1 if place % 5 == 0 else 2 for place in places],
        "issues": [[]] * rows,
    }
    return pa.table({name: pa.array(columns[name], ORIGINALS.field(name).type) for name in ORIGINALS.names})


def configured(**thresholds: Any) -> ImageAugmentationConfig:
    return ImageAugmentationConfig(
        augmentation=Augmentation(size=16, variants=2), thresholds=ImageThresholds(**thresholds)
    )


def tried(root: Path, table: pa.Table | None = None, **thresholds: Any) -> Trial[Any]:
    table = originals() if table is None else table
    config = configured(**thresholds)
    directory = root / "training-datasets" / "images" / "v1" / "_originals"
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / "part-00000-a1.parquet")
    return trial(str(root), version(config, table), config, None)


def outcomes(root: Path, table: pa.Table | None = None) -> dict[str, FaultResult]:
    return by_fault(tried(root, table))


def version(config: ImageAugmentationConfig, table: pa.Table, path: str = "_originals") -> Manifest:
    names = table["class_name"].unique().to_pylist()
    entry = FileEntry(path=f"{path}/part-00000-a1.parquet", rows=len(table), bytes=1, digest=f"sha256:{'0' * 64}")
    return manifest(
        "training-datasets/images",
        rows_schema(config, len(names)),
        side_files=(entry,),
        balances=(RowBalance(name="images", rows_in=len(table), rows_out=len(table)),),
        config=config.model_dump(mode="json"),
        definition={"classes": {name: number for number, name in enumerate(names)}},
    )


def test_copies_that_the_grouping_misses_make_the_gate_blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = lambda _near, _linked, _content, augmented: np.arange(len(augmented))  # noqa: E731
    monkeypatch.setattr(gate, "grouped", alone)
    assert outcomes(tmp_path)["split overlap"].outcome == "blind"


def test_scores_that_are_all_perfect_still_show_worse_pictures(tmp_path: Path) -> None:
    table = originals()
    place = table.schema.get_field_index("mean_score")
    table = table.set_column(place, "mean_score", pa.array(np.ones(len(table), np.float32)))
    assert outcomes(tmp_path, table)["worse pictures"].outcome == "refused"


def test_one_class_leaves_some_faults_without_a_place(tmp_path: Path) -> None:
    results = outcomes(tmp_path, originals({"cat": 300}))
    without = {name for name, result in results.items() if result.outcome == "not applicable"}
    assert without == {"rare class", "missing class", "shift", "shared class id"}


def test_a_large_table_of_originals_is_sampled_the_same_each_time(tmp_path: Path) -> None:
    table = originals({"cat": 9_000, "dog": 6_000})
    first, second = (outcomes(tmp_path / name, table) for name in ("a", "b"))
    assert first == second
    assert "of 5,000" in first["empty files"].message


def test_a_version_without_a_table_of_originals_says_so(tmp_path: Path) -> None:
    config = ImageAugmentationConfig()
    manifest = version(config, originals(), "_other")
    with pytest.raises(InputError, match="images v1 has no table of originals: publish it anew"):
        trial(str(tmp_path), manifest, config, None)
