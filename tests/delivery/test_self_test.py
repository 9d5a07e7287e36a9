"""The gate of a copy notices every fault, and is called blind to one whose check can't notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.delivery import gate
from tasks.delivery import self_test as module
from tasks.delivery.config import DeliveryThresholds
from tasks.delivery.gate import judge_copy
from tasks.delivery.self_test import self_test
from tasks.delivery.source import find_source
from tasks.quality import rules
from tasks.quality.faults import unproven
from tasks.store.manifest import FaultResult, GateResult
from tests.delivery.sources import FEATURES, IMAGES, configured, publish_customers, publish_pictures
from tests.gates import calm

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
OF_IMAGES = {
    "no rows": ("refused", "rows"),
    "duplicates": ("warned", "repeated keys of image_id"),
    "written twice": ("refused", "unique of sample_id"),
    "lost rows": ("refused", f"balance of {IMAGES}"),
    "bad rows": ("refused", f"rejected of {IMAGES}"),
    "split overlap": ("refused", "leak of original_image_id"),
    "no train rows": ("refused", "split of train"),
    "rare class": ("warned", "class balance of class_id"),
    "missing class": ("warned", "classes of validation"),
    "nulls": ("not applicable", ""),
    "constant": ("not applicable", ""),
    "schema": ("refused", "schema of Label columns"),
    "shift": ("refused", "drift of class_id"),
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


def outcomes(root: Path, dataset: str = FEATURES, **changes: Any) -> dict[str, FaultResult]:
    config = configured(str(root), dataset=dataset, **changes)
    source = find_source(config)
    # A copy's manifest gives no more than its name here: what is sampled is the source.
    return {result.fault: result for result in self_test(source, source.manifest, config, None)}


def shown(results: dict[str, FaultResult]) -> dict[str, tuple[str, str]]:
    return {name: (result.outcome, (*result.caught_by, "")[0]) for name, result in results.items()}


def test_every_fault_is_noticed_by_the_check_that_it_is_aimed_at(tmp_path: Path) -> None:
    publish_customers(str(tmp_path), 1500)
    results = outcomes(tmp_path)
    assert shown(results) == EXPECTED
    assert (
        results["split overlap"].injected
        == "20% of the rows were copied into another split, with the same customer_id."
    )
    assert "values of customer_id are in several splits" in results["split overlap"].message


def test_images_have_their_faults_too(tmp_path: Path) -> None:
    publish_pictures(str(tmp_path), 200, 60)
    results = outcomes(tmp_path, IMAGES)
    assert shown(results) == OF_IMAGES
    assert results["nulls"].message == "Images have no features."


def test_every_check_of_the_gate_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[GateResult] = []

    def remembered(*args: Any) -> GateResult:
        seen.append(judge_copy(*args))
        return seen[-1]

    monkeypatch.setattr(module, "judge_copy", remembered)
    publish_customers(str(tmp_path), 1500)
    results = outcomes(tmp_path)
    assert unproven(seen[0], tuple(results.values())) == ()


@pytest.mark.parametrize("fault", LAXEST)
def test_a_threshold_too_lax_makes_the_gate_blind(tmp_path: Path, fault: str) -> None:
    publish_customers(str(tmp_path), 1500)
    result = outcomes(tmp_path, thresholds=DeliveryThresholds(**LAXEST[fault]))[fault]
    assert result.outcome == "blind"
    assert result.message.startswith(f"'{EXPECTED[fault][1]}' still passes: ")


@pytest.mark.parametrize("fault", CHECKS)
def test_a_check_that_never_complains_makes_the_gate_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    owner, name = CHECKS[fault]
    monkeypatch.setattr(owner, name, calm(getattr(owner, name)))
    publish_customers(str(tmp_path), 1500)
    assert outcomes(tmp_path)[fault].outcome == "blind"


def test_where_rows_with_nulls_are_rejected_the_rejections_are_what_must_notice(tmp_path: Path) -> None:
    publish_customers(str(tmp_path), 1500)
    lenient = DeliveryThresholds(rejected_warn=0.5, rejected_fail=0.55)
    result = outcomes(tmp_path, nulls="reject", thresholds=lenient)["nulls"]
    assert (result.outcome, result.caught_by[0]) == ("refused", f"rejected of {FEATURES}")


def test_more_samples_asked_for_than_a_sample_has_are_no_fault_of_the_sample(tmp_path: Path) -> None:
    publish_customers(str(tmp_path), 1500)
    results = outcomes(tmp_path, thresholds=DeliveryThresholds(minimum_samples=1_000_000))
    assert results["no rows"].outcome == "refused"


def test_features_of_one_kind_and_no_target_leave_some_faults_without_a_place(tmp_path: Path) -> None:
    publish_customers(str(tmp_path), 1500)
    results = outcomes(tmp_path, features=("city",), target="spent")
    without = {name for name, result in results.items() if result.outcome == "not applicable"}
    assert without == {"rare class", "missing class", "constant", "shift"}
    assert results["schema"].outcome == "refused"
