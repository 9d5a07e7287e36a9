"""Faults of a streaming copy that its gate notices; the laws of all gates are in `tests.test_kinds`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.delivery import gate
from tasks.delivery.config import DeliveryThresholds, TrainingConfig
from tasks.delivery.gate import trial
from tasks.delivery.source import find_source
from tasks.quality import rules
from tasks.quality.faults import Trial, unproven
from tests.delivery.sources import FEATURES, IMAGES, configured, publish_customers, publish_pictures
from tests.gates import RULES, by_fault, lax, made_by, noticed


def expected(dataset: str, key: str, entity: str, label: str, **of: str) -> dict[str, Any]:
    """What notices each fault of a copy of a dataset, but for those of features."""
    return {
        "no rows": ("refused", "rows"),
        "duplicates": ("warned", f"repeated keys of {key}"),
        "written twice": ("refused", "unique of sample_id"),
        "lost rows": ("refused", f"balance of {dataset}"),
        "bad rows": ("refused", f"rejected of {dataset}"),
        "split overlap": ("refused", f"leak of {entity}"),
        "no train rows": ("refused", "split of train"),
        "rare class": ("warned", f"class balance of {label}"),
        "missing class": ("warned", "classes of validation"),
        "schema": ("refused", f"schema of {of['schema']} columns"),
        "weights": ("not applicable", ""),
        "shift": ("refused", f"drift of {of['drift']}"),
    }


EXPECTED = expected(FEATURES, "customer_id, as_of", "customer_id", "target", schema="Source", drift="visits") | {
    "nulls": ("refused", "nulls of visits"),
    "constant": ("warned", "constant"),
}
OF_IMAGES = expected(
    IMAGES, "image_id", "original_image_id", "class_id", schema="Label", drift="class_id"
) | dict.fromkeys(("nulls", "constant"), ("not applicable", ""))
ODD = {"nulls", "rejected"}
"""Checks that don't pass on the sample as it is."""
BOUNDS = DeliveryThresholds.model_fields
SAID = {
    "split overlap": (
        "20% of the rows were copied into another split, with the same customer_id.",
        "values of customer_id are in several splits",
    ),
}
LAXEST = lax(bad_rows="rejected", nulls="missing", shift="drift") | {"rare class": {"balance_warn": 0}}
CHECKS = {
    **{fault: RULES[fault] for fault in ("no rows", "lost rows")},
    **made_by(rules, written_twice="check_unique"),
    **made_by(gate, duplicates="_repeats", split_overlap="_leak", no_train_rows="_splits"),
    **made_by(gate, missing_class="_classes", constant="_constants", schema="_against"),
}


def tried(root: Path, dataset: str = FEATURES, **changes: Any) -> Trial[Any]:
    thresholds = DeliveryThresholds(**{name: changes.pop(name) for name in [*changes] if name in BOUNDS})
    if dataset == FEATURES:
        publish_customers(str(root), 1500)
    config = configured(str(root), dataset=dataset, thresholds=thresholds, **changes)
    source = find_source(config)
    # A copy's manifest gives no more than its name here: what is sampled is the source.
    return trial(source, source.manifest, config, None)


@pytest.mark.parametrize("encoding", [None, "jpeg"])
def test_images_have_their_faults_too(tmp_path: Path, encoding: str | None) -> None:
    publish_pictures(str(tmp_path), 200, 60, encoding=encoding)
    results = by_fault(tried(tmp_path, IMAGES))
    assert noticed(results) == OF_IMAGES
    assert results["nulls"].message == "Images have no features."


def test_where_rows_with_nulls_are_rejected_the_rejections_are_what_must_notice(tmp_path: Path) -> None:
    result = by_fault(tried(tmp_path, nulls="reject", rejected_warn=0.5, rejected_fail=0.55))["nulls"]
    assert (result.outcome, result.caught_by[0]) == ("refused", f"rejected of {FEATURES}")


def test_weights_of_zero_alone_are_noticed(tmp_path: Path) -> None:
    made = tried(tmp_path, weight="visits")
    results = by_fault(made)
    assert noticed(results)["weights"] == ("refused", "weights of visits")
    assert results["weights"].message == "visits is 0 in every row of the train split: nothing can be drawn by it."
    assert unproven(made.judge(made.sample), tuple(results.values())) == ()


def test_more_samples_asked_for_than_a_sample_has_are_no_fault_of_the_sample(tmp_path: Path) -> None:
    results = by_fault(tried(tmp_path, minimum_samples=1_000_000))
    assert results["no rows"].outcome == "refused"


def test_features_of_one_kind_and_no_target_leave_some_faults_without_a_place(tmp_path: Path) -> None:
    results = by_fault(tried(tmp_path, features=("city",), target="spent"))
    without = {name for name, result in results.items() if result.outcome == "not applicable"}
    assert without == {"rare class", "missing class", "constant", "shift", "weights"}
    assert results["schema"].outcome == "refused"


def test_sequences_have_faults_of_their_own(tmp_path: Path) -> None:
    results = by_fault(tried(tmp_path, sequence="city", training=TrainingConfig(enabled=False)))
    assert (results["empty sequences"].outcome, results["empty sequences"].caught_by[0]) == (
        "refused",
        f"rejected of {FEATURES}",
    )
    assert results["nulls"].message == "Sequences have no features."
    assert [result for result in results.values() if result.outcome == "blind"] == []
