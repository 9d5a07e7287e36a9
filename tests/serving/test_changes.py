"""What a changed declaration changes and breaks is told before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.features.definitions import Column, Definitions, DimensionSource, EventSource, FeatureGroup, Window
from tasks.features.standard import STANDARD
from tasks.serving.changes import Changes, GroupChange, plan_changes
from tasks.store import layout
from tasks.store.versions import withdraw
from tasks.training_sets.definition import FeatureReference, Model, SpineSource
from tests.serving.feature_versions import GROUP, customers, days, publish_features
from tests.store.test_version_index import counted

amount = pl.col("amount")
EVENTS = EventSource(
    name="transactions",
    time="timestamp",
    columns={
        "customer_id": Column(kind="key"),
        "timestamp": Column(kind="time"),
        "amount": Column(kind="number"),
        "category": Column(kind="category"),
    },
)
CITIES = DimensionSource(name="customers", key="customer_id", columns=("city",))
OWN = FeatureGroup(
    name=GROUP,
    entity="customer_id",
    dimension="customers",
    features={"total_spent": amount.sum(), "orders": pl.len()},
)


def declared(*groups: FeatureGroup) -> Definitions:
    return Definitions(
        events={"transactions": EVENTS},
        dimensions={"customers": CITIES},
        groups={group.name: group for group in groups},
    )


def changed(**changes: Any) -> FeatureGroup:
    return dataclasses.replace(OWN, **changes)


def model(*features: str, name: str = "churn") -> dict[str, Model]:
    references = tuple(FeatureReference.parse(text) for text in features)
    spine = SpineSource(uri="spine.parquet")
    return {name: Model(name=name, entity="customer_id", spine=spine, features=references)}


@pytest.fixture
def store(tmp_path: object) -> str:
    """Two versions of the group, of three times."""
    root = str(tmp_path)
    publish_features(root, customers(range(5), days(0, 30)), definition=OWN.describe())
    publish_features(root, customers(range(5), days(30, 60)), definition=OWN.describe())
    return root


def trained(root: str, models: Mapping[str, Model]) -> None:
    """Publish a training set of each model, by its declaration alone."""
    for one in models.values():
        dataset = layout.training_ready_dataset(one.name)
        publish_features(root, customers(range(3)), definition=one.describe(), dataset=dataset)


def only(changes: Changes) -> GroupChange:
    (change,) = changes.groups
    return change


def test_nothing_changed(store: str) -> None:
    changes = plan_changes(store, declared(OWN), model(f"{GROUP}:*", f"{GROUP}:orders"))
    assert only(changes) == GroupChange(group=GROUP, status="unchanged", version=2, retyped={})
    assert (changes.breaks, changes.notes) == ((), ())
    assert changes.to_text() == f"{GROUP}: unchanged, against v2"


def test_more_versions_take_no_more_requests(tmp_path: Path) -> None:
    root, more = f"{tmp_path}/prefix", changed(features={**OWN.features, "mean": amount.mean()})
    counts, day = [], 0
    for _ in range(2):
        for _ in range(4):
            publish_features(root, customers(range(3), days(day := day + 1)), definition=OWN.describe())
            trained(root, model(f"{GROUP}:orders"))
        with counted() as seen:
            change = only(plan_changes(root, declared(more), {}))
        assert change.recompute == days(*range(1, day + 1))
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_bounds_and_the_order_of_features_change_nothing(store: str) -> None:
    group = changed(features=dict(reversed(OWN.features.items())), bounds={"orders": (1, None)})
    assert only(plan_changes(store, declared(group), {})).status == "unchanged"


def test_in_an_empty_store_all_is_new(tmp_path: object) -> None:
    changes = plan_changes(str(tmp_path), STANDARD, model("customer-features:age", "product-features:total_sales"))
    assert {change.group: change.status for change in changes.groups} == {
        "customer-features": "new",
        "product-features": "new",
    }
    assert changes.breaks == ()


def test_what_is_published_and_not_declared_here_stays(store: str) -> None:
    changes = plan_changes(store, declared(), model(f"{GROUP}:*"))
    assert only(changes).status == "undeclared"
    assert changes.breaks == ()


CASES: list[tuple[str, FeatureGroup, dict[str, Any]]] = [
    (
        "a feature more",
        changed(features={**OWN.features, "mean": amount.mean()}),
        {"added": ("mean",), "recompute": days(0, 30, 60)},
    ),
    (
        "a window more",
        changed(windows=(Window(days=7, features={"orders": pl.len()}),)),
        {"added": ("orders_7d",), "recompute": days(0, 30, 60)},
    ),
    ("a feature less", changed(features={"orders": pl.len()}), {"removed": ("total_spent",)}),
    ("no dimension any more", changed(dimension=None), {"removed": ("city",)}),
    (
        "another expression of the same type",
        changed(features={**OWN.features, "total_spent": amount.abs().sum()}),
        {"redeclared": ("total_spent",), "recompute": days(0, 30, 60)},
    ),
    (
        "another type",
        changed(features={**OWN.features, "orders": amount.sum()}),
        {"redeclared": ("orders",), "retyped": {"orders": ("double", "int64")}, "recompute": days(0, 30, 60)},
    ),
    (
        "text instead of a number",
        changed(features={**OWN.features, "orders": pl.col("category").mode().first()}),
        {"redeclared": ("orders",), "retyped": {"orders": ("string", "int64")}, "recompute": days(0, 30, 60)},
    ),
    (
        "a type that only the file knows",
        changed(features={**OWN.features, "orders": pl.col("basket").max()}),
        {"redeclared": ("orders",), "recompute": days(0, 30, 60)},
    ),
    (
        "a count of what only the file knows",
        changed(features={**OWN.features, "total_spent": pl.col("basket").n_unique()}),
        {"redeclared": ("total_spent",), "retyped": {"total_spent": ("int64", "double")}, "recompute": days(0, 30, 60)},
    ),
    (
        "what can't be evaluated has no type",
        changed(features={**OWN.features, "orders": pl.col("category").sqrt()}),
        {"redeclared": ("orders",), "recompute": days(0, 30, 60)},
    ),
]


@pytest.mark.parametrize(("why", "group", "expected"), CASES, ids=[case[0] for case in CASES])
def test_changes_of_a_group(store: str, why: str, group: FeatureGroup, expected: dict[str, Any]) -> None:
    change = only(plan_changes(store, declared(group), {}))
    assert change == GroupChange(group=GROUP, status="changed", version=2, **{"retyped": {}, **expected})


def test_a_derived_feature_changes_with_what_it_names(tmp_path: object) -> None:
    group = changed(derived={"per_order": pl.col("total_spent") / pl.col("orders")}, dimension=None)
    frame = customers(range(3)).with_columns(per_order=pl.lit(1.0)).drop("city")
    publish_features(str(tmp_path), frame, definition=group.describe())
    other = dataclasses.replace(group, features={**group.features, "total_spent": amount.abs().sum()})
    assert only(plan_changes(str(tmp_path), declared(other), {})).redeclared == ("total_spent", "per_order")


BREAKS = [
    # why, the group as it is to be, what the model reads, its sentence
    (
        "a feature that is removed",
        changed(features={"orders": pl.len()}),
        f"{GROUP}:total_spent",
        "reads customer-features:total_spent, which v2 has and the declaration hasn't any more; keep it, or",
    ),
    (
        "a feature that is retyped",
        changed(features={**OWN.features, "orders": amount.sum()}),
        f"{GROUP}:orders",
        "would be double instead of int64; cast it",
    ),
    ("a feature that never was", OWN, f"{GROUP}:total_spend", "isn't declared; did you mean 'total_spent'?"),
    (
        "a group that never was",
        OWN,
        "costumer-features:orders",
        "reads 'costumer-features', which is neither declared nor published; did you mean 'customer-features'?",
    ),
    ("a version that isn't there", OWN, f"{GROUP}:orders@v7", "has no version v7"),
    ("a version without the feature", OWN, f"{GROUP}:order@v1", "that version hasn't; did you mean 'orders'?"),
]


@pytest.mark.parametrize("case", BREAKS, ids=[case[0] for case in BREAKS])
@pytest.mark.parametrize("of", ["the file", "a published training set"])
def test_what_breaks_a_model(store: str, case: tuple[str, FeatureGroup, str, str], of: str) -> None:
    _, group, feature, sentence = case
    models = model(feature)
    if of != "the file":
        trained(store, models)
    (found,) = plan_changes(store, declared(group), models if of == "the file" else {}).breaks
    assert found.startswith("model 'churn' reads")
    assert sentence in found


def test_a_withdrawn_version_breaks_who_reads_it(store: str) -> None:
    withdraw(store, layout.feature_dataset(GROUP), 1, "wrong prices", "ann")
    (found,) = plan_changes(store, declared(OWN), model(f"{GROUP}:orders@v1")).breaks
    assert "wrong prices" in found


def test_a_pinned_version_stays_as_it_is(store: str) -> None:
    changes = plan_changes(store, declared(changed(features={"orders": amount.sum()})), model(f"{GROUP}:*@v1"))
    assert only(changes).removed == ("total_spent",)
    assert (changes.breaks, changes.notes) == ((), ())


def test_all_features_break_who_has_trained_on_them(store: str) -> None:
    """Who never trained takes what there is."""
    fewer = declared(changed(features={"orders": pl.len()}))
    models = model(f"{GROUP}:*")
    assert plan_changes(store, fewer, models).breaks == ()
    trained(store, models)
    (found,) = plan_changes(store, fewer, models).breaks
    assert "total_spent" in found


def test_the_file_counts_instead_of_what_was_published(store: str) -> None:
    trained(store, model(f"{GROUP}:total_spent"))
    fewer = declared(changed(features={"orders": pl.len()}))
    assert len(plan_changes(store, fewer, {}).breaks) == 1
    assert plan_changes(store, fewer, model(f"{GROUP}:orders")).breaks == ()


def test_another_meaning_is_worth_a_note(store: str) -> None:
    other = changed(features={**OWN.features, "total_spent": amount.abs().sum()})
    changes = plan_changes(store, declared(other), {**model(f"{GROUP}:*"), **model(f"{GROUP}:orders", name="other")})
    assert changes.breaks == ()
    (note,) = changes.notes
    assert "model 'churn' reads customer-features:total_spent, declared otherwise" in note


def test_in_words(store: str) -> None:
    group = changed(features={"orders": amount.sum(), "mean": amount.mean()})
    text = plan_changes(store, declared(group), model(f"{GROUP}:orders")).to_text()
    assert text.splitlines() == [
        "customer-features: changed, against v2",
        "  + mean",
        "  - total_spent",
        "  ~ orders (int64 → double)",
        "  to compute again: 3 as-of times, 2024-01-31 to 2024-03-31",
        "breaks: model 'churn' reads customer-features:orders, which would be double instead of int64; "
        "cast it in the declaration, or give the new one another name",
    ]
