"""The gate on copies that are made up: each rule passes, warns and fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa
import pytest

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.encoding import profile_features
from tasks.delivery.gate import judge_copy
from tasks.delivery.shuffle import StreamingReady
from tasks.store.manifest import CheckResult, GateResult, Manifest, RowBalance
from tasks.store.reservation import Reservation
from tests.manifests import manifest


def definition(**changes: Any) -> dict[str, Any]:
    features = [
        {"name": "x", "column": "x", "minimum": 0.0, "maximum": 5.0},
        {"name": "c=a", "column": "c", "minimum": 0.0, "maximum": 1.0},
    ]
    label = {"column": "y", "kind": "class", "classes": ["no", "yes"]}
    known = {"kind": "table", "batch_size": 10, "feature_count": 2, "entity": "k", "keys": ["k"]}
    return {**known, "features": features, "label": label, **changes}


def copy(**changes: Any) -> StreamingReady:
    """A copy with nothing to complain of."""
    rows = pa.table({"x": [float(n % 6) for n in range(300)], "c": ["a", "b"] * 150, "y": ["no", "yes"] * 150})
    good = StreamingReady(
        reservation=Reservation(root="r", dataset="d", version=2, run_id="run", attempt=1),
        files=(),
        rejected_files=(),
        schema=pa.schema([]),
        profile=profile_features(rows, ["x", "c", "y"]),
        balances=(RowBalance(name="d", rows_in=400, rows_out=400),),
        definition=definition(),
        samples={"train": 300, "validation": 100, "test": 0},
        class_counts={"train": {"no": 150, "yes": 150}, "validation": {"no": 50, "yes": 50}},
        entities={"train": 300, "validation": 100, "test": 0},
        leaking_entities=0,
        repeated_keys=0,
        duplicate_ids=0,
        timings={},
    )
    return dataclasses.replace(good, **changes)


def published(made: StreamingReady) -> Manifest:
    return manifest("d", profile=made.profile.columns(), definition=made.definition)


def odd(result: GateResult) -> dict[tuple[str, str | None], str]:
    """Checks that didn't pass."""
    return {(check.name, check.column): check.verdict for check in result.checks if check.verdict != "pass"}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"columns": ["c", "y"], "kind": "classes", "classes": [["a", "b"], ["no", "yes"]]}, {}),
        ({"columns": ["x"], "kind": "numbers", "mean": [0.0, 0.0], "std": [1.0, 1.0]}, {("target", "x[1]"): "fail"}),
        ({"columns": ["c", "one"], "kind": "classes", "classes": [["a", "b"], ["z"]]}, {("target", "one"): "fail"}),
    ],
)
def test_each_of_several_labels_must_differ(label: dict[str, Any], expected: dict[tuple[str, str], str]) -> None:
    rows = pa.table(
        {
            "x": [float(n % 6) for n in range(300)],
            "c": ["a", "b"] * 150,
            "y": ["no", "yes"] * 150,
            "one": ["z"] * 300,
            "x[0]": [float(n % 7) for n in range(300)],
            "x[1]": [2.0] * 300,
        }
    )
    made = copy(profile=profile_features(rows, rows.column_names), definition=definition(label=label), class_counts={})
    assert odd(judge_copy(DeliveryConfig(), made, None)) == expected
    assert odd(judge_copy(DeliveryConfig(), made, published(copy()))) == expected | {
        ("schema", "Label columns"): "fail",
        ("schema", "Label kinds"): "fail",
    }


def test_a_good_copy_passes_alone_and_after_itself() -> None:
    assert odd(judge_copy(DeliveryConfig(), copy(), None)) == {}
    assert odd(judge_copy(DeliveryConfig(), copy(), published(copy()))) == {}


@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        (
            {"samples": {"train": 0, "validation": 4, "test": 0}},
            {},
            {("rows", None): "fail", ("split", "train"): "fail"},
        ),
        ({"samples": {"train": 9, "validation": 0, "test": 0}}, {}, {("split", "validation"): "warn"}),
        ({"samples": {"train": 9, "validation": 0, "test": 0}}, {"validation_share": 0}, {}),
        ({}, {"thresholds": {"minimum_samples": 301}}, {("rows", None): "fail"}),
        ({"duplicate_ids": 1}, {}, {("unique", "sample_id"): "fail"}),
        ({"repeated_keys": 3}, {}, {("repeated keys", "k"): "warn"}),
        ({"leaking_entities": 2}, {}, {("leak", "k"): "fail"}),
        ({"balances": (RowBalance(name="d", rows_in=400, rows_out=399),)}, {}, {("balance", "d"): "fail"}),
        (
            {"balances": (RowBalance(name="d", rows_in=100, rows_out=95, rejected={"null_y": 5}),)},
            {},
            {("rejected", "d"): "warn"},
        ),
        ({"class_counts": {"train": {"no": 99, "yes": 1}}}, {}, {("class balance", "y"): "warn"}),
        (
            {"class_counts": {"train": {"no": 99, "yes": 0}}},
            {},
            {("class balance", "y"): "warn", ("classes", "train"): "warn"},
        ),
        ({"class_counts": {"train": {"no": 99}}}, {}, {("class balance", "y"): "fail"}),
        (
            {"class_counts": {"train": {"no": 9, "yes": 9}, "validation": {"no": 0, "yes": 9}}},
            {},
            {("classes", "validation"): "warn"},
        ),
    ],
)
def test_what_is_odd_is_told(changes: dict[str, Any], config: dict[str, Any], expected: dict[Any, str]) -> None:
    assert odd(judge_copy(DeliveryConfig(**config), copy(**changes), None)) == expected


@pytest.mark.parametrize(("missing", "verdict"), [(29, None), (31, "warn"), (151, "fail")])
def test_missing_values_are_judged_by_their_share(missing: int, verdict: str | None) -> None:
    rows = pa.table({"x": [None] * missing + [1.0] * (300 - missing), "c": ["a"] * 300, "y": ["no"] * 300})
    found = odd(judge_copy(DeliveryConfig(), copy(profile=profile_features(rows, ["x", "c", "y"])), None))
    assert found.get(("nulls", "x")) == verdict


def test_a_feature_that_never_differs_is_named() -> None:
    features = [*definition()["features"], {"name": "z", "column": "x", "minimum": 2.0, "maximum": 2.0}]
    result = judge_copy(DeliveryConfig(), copy(definition=definition(features=features)), None)
    (check,) = [check for check in result.checks if check.name == "constant"]
    assert (check.verdict, check.figure) == ("warn", 1)
    assert check.message.startswith("z never differ")


def images(**samples: int) -> StreamingReady:
    known = definition(kind="images", image={"shape": [3, 4, 4], "dtype": "uint8"})
    del known["features"]
    return copy(definition=known, samples={"train": 0, "validation": 0, "test": 0, **samples})


def test_images_have_their_own_splits_but_need_some_to_train_on() -> None:
    assert odd(judge_copy(DeliveryConfig(), images(train=7, validation=1, test=2), None)) == {}
    assert odd(judge_copy(DeliveryConfig(), images(train=7), None)) == {("split", "validation"): "warn"}
    assert odd(judge_copy(DeliveryConfig(), images(validation=7), None))["split", "train"] == "fail"


NEW_FEATURE = [*definition()["features"], {"name": "z", "column": "z", "minimum": 0, "maximum": 1}]
NEW_CATEGORY = [*definition()["features"], {"name": "c=q", "column": "c", "minimum": 0, "maximum": 1}]


@pytest.mark.parametrize(
    ("before", "what", "verdict", "words"),
    [
        ({"features": NEW_FEATURE}, "Source columns", "fail", "z went"),
        ({"features": NEW_CATEGORY}, "Features", "warn", "c=q went"),
        ({"label": {"column": "y", "kind": "number"}}, "Label kinds", "fail", "class instead of number"),
        ({"label": None}, "Label columns", "fail", "y instead of None"),
        ({"label": {"column": "y", "kind": "class", "classes": ["no"]}}, "Classes", "warn", "yes came"),
        ({"batch_size": 99}, "Batch sizes", "warn", "10 instead of 99"),
        ({"kind": "images"}, "Kinds", "fail", "table instead of images"),
    ],
)
def test_what_has_changed_since_the_last_version(before: Any, what: str, verdict: str, words: str) -> None:
    previous = published(copy(definition=definition(**before)))

    def schema(**config: Any) -> CheckResult:
        checks = judge_copy(DeliveryConfig(**config), copy(), previous).checks
        return next(check for check in checks if (check.name, check.column) == ("schema", what))

    assert schema().verdict == verdict
    assert words in schema().message
    assert schema(allow_schema_change=True).verdict == "warn"


def test_drift_is_judged_on_features_and_label() -> None:
    rows = pa.table({"x": [float(n % 6) + 9 for n in range(300)], "c": ["a", "b"] * 150, "y": ["yes"] * 300})
    drifted = copy(profile=profile_features(rows, ["x", "c", "y"]))
    found = odd(judge_copy(DeliveryConfig(), drifted, published(copy())))
    assert found == {("drift", "x"): "fail", ("drift", "y"): "fail"}
    calm = DeliveryConfig(thresholds={"drift_warn": 50, "drift_fail": 100})
    assert odd(judge_copy(calm, drifted, published(copy()))) == {}
