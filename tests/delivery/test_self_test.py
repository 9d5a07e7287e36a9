"""Faults of a streaming copy that its gate notices; the laws of all gates are in `tests.test_kinds`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.delivery import gate
from tasks.delivery.config import DeliveryThresholds
from tasks.delivery.self_test import trial
from tasks.delivery.source import find_source
from tasks.quality import rules
from tasks.quality.faults import Trial
from tests.delivery.sources import FEATURES, IMAGES, configured, publish_customers, publish_pictures
from tests.gates import by_fault, noticed

EXPECTED = {
    "no rows": ("refused", "rows"),
    "duplicates": ("warned", "repeated keys of customer_id, as_of"),
    "written twice": ("refused", "unique of sample_id"),
    "lost rows": ("refused", f"balance of {FEATURES}"),
    "bad rows": ("refused", f"rejected of {FEATURES}"),
    "split overlap": ("refused", "leak of customer_id"),
    "no train rows": ("refused", "split of train"),
    "rare class": ("warned", "class balance of target"),
    "missing class": ("warned", "classes of validation"),
    "nulls": ("refused", "nulls of visits"),
    "constant": ("warned", "constant"),
    "schema": ("refused", "schema of Source columns"),
    "shift": ("refused", "drift of visits"),
}
OF_IMAGES = EXPECTED | {
    "duplicates": ("warned", "repeated keys of image_id"),
    "lost rows": ("refused", f"balance of {IMAGES}"),
    "bad rows": ("refused", f"rejected of {IMAGES}"),
    "split overlap": ("refused", "leak of original_image_id"),
    "rare class": ("warned", "class balance of class_id"),
    "nulls": ("not applicable", ""),
    "constant": ("not applicable", ""),
    "schema": ("refused", "schema of Label columns"),
    "shift": ("refused", "drift of class_id"),
}
ODD = {"nulls", "rejected"}
"""Checks that don't pass on the sample as it is."""
BOUNDS = DeliveryThresholds.model_fields
SAID = {
    "split overlap": (
        "20% of the rows were copied into another split, with the same customer_id.",
        "values of customer_id are in several splits",
    ),
}
LAXEST: dict[str, dict[str, Any]] = {
    "bad rows": {"rejected_warn": 1, "rejected_fail": 1},
    "nulls": {"missing_warn": 1, "missing_fail": 1},
    "shift": {"drift_warn": 1e9, "drift_fail": 1e9},
    "rare class": {"balance_warn": 0},
}
CHECKS: dict[str, tuple[Any, str]] = {
    "no rows": (rules, "check_rows"),
    "duplicates": (gate, "_repeats"),
    "written twice": (rules, "check_unique"),
    "lost rows": (rules, "check_balance"),
    "split overlap": (gate, "_leak"),
    "no train rows": (gate, "_splits"),
    "missing class": (gate, "_classes"),
    "constant": (gate, "_constants"),
    "schema": (gate, "_against"),
}


def tried(root: Path, dataset: str = FEATURES, **changes: Any) -> Trial[Any]:
    thresholds = DeliveryThresholds(**{name: changes.pop(name) for name in [*changes] if name in BOUNDS})
    if dataset == FEATURES:
        publish_customers(str(root), 1500)
    config = configured(str(root), dataset=dataset, thresholds=thresholds, **changes)
    source = find_source(config)
    # A copy's manifest gives no more than its name here: what is sampled is the source.
    return trial(source, source.manifest, config, None)


def test_images_have_their_faults_too(tmp_path: Path) -> None:
    publish_pictures(str(tmp_path), 200, 60)
    results = by_fault(tried(tmp_path, IMAGES))
    assert noticed(results) == OF_IMAGES
    assert results["nulls"].message == "Images have no features."


def test_where_rows_with_nulls_are_rejected_the_rejections_are_what_must_notice(tmp_path: Path) -> None:
    result = by_fault(tried(tmp_path, nulls="reject", rejected_warn=0.5, rejected_fail=0.55))["nulls"]
    assert (result.outcome, result.caught_by[0]) == ("refused", f"rejected of {FEATURES}")


def test_more_samples_asked_for_than_a_sample_has_are_no_fault_of_the_sample(tmp_path: Path) -> None:
    results = by_fault(tried(tmp_path, minimum_samples=1_000_000))
    assert results["no rows"].outcome == "refused"


def test_features_of_one_kind_and_no_target_leave_some_faults_without_a_place(tmp_path: Path) -> None:
    results = by_fault(tried(tmp_path, features=("city",), target="spent"))
    without = {name for name, result in results.items() if result.outcome == "not applicable"}
    assert without == {"rare class", "missing class", "constant", "shift"}
    assert results["schema"].outcome == "refused"
