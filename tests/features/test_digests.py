"""A feature's digest changes with what decides its values, and with nothing else."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from tasks.features.definitions import FeatureGroup, Window
from tasks.features.digests import feature_digests
from tasks.features.standard import CUSTOMER_FEATURES, PRODUCT_FEATURES, STANDARD

GROUP = FeatureGroup(
    name="g",
    entity="key",
    features={"n": pl.len(), "sum": pl.col("amount").sum()},
    windows=(Window(days=7, features={"n": pl.len(), "sum": pl.col("amount").sum()}),),
    derived={"mean": pl.col("sum") / pl.col("n"), "double": pl.col("mean") * 2, "recent": pl.col("n_7d") > 0},
)


def changed(other: FeatureGroup) -> set[str]:
    before, after = feature_digests(GROUP.describe()), feature_digests(other.describe())
    return {name for name in before if before[name] != after.get(name)}


def test_every_feature_has_one() -> None:
    for group in STANDARD.groups.values():
        digests = feature_digests(group.describe())
        assert list(digests) == group.feature_names
    assert len(set(feature_digests(CUSTOMER_FEATURES.describe()).values())) == len(CUSTOMER_FEATURES.feature_names)


def test_what_is_declared_elsewhere_changes_nothing() -> None:
    other = replace(
        GROUP,
        name="h",
        features={"extra": pl.col("amount").max(), **GROUP.features},
        derived={**GROUP.derived, "more": pl.col("n") + 1},
        bounds={"n": (1, None)},
        dimension="customers",
    )
    assert changed(other) == set()


def test_a_change_reaches_what_is_derived_from_it() -> None:
    features = {**GROUP.features, "sum": pl.col("amount").abs().sum()}
    assert changed(replace(GROUP, features=features)) == {"sum", "mean", "double"}
    windows = (Window(days=7, features={**GROUP.windows[0].features, "n": pl.col("amount").len()}),)
    assert changed(replace(GROUP, windows=windows)) == {"n_7d", "recent"}
    derived = {**GROUP.derived, "mean": pl.col("sum") / (pl.col("n") + 1)}
    assert changed(replace(GROUP, derived=derived)) == {"mean", "double"}


def test_entity_and_source_count_for_all() -> None:
    assert changed(replace(GROUP, source="visits")) == set(GROUP.feature_names)
    assert changed(replace(GROUP, entity="other")) == set(GROUP.feature_names)


def test_a_window_is_not_the_whole() -> None:
    digests = feature_digests(GROUP.describe())
    assert digests["n"] != digests["n_7d"]
    assert feature_digests(PRODUCT_FEATURES.describe())["total_sales"] != digests["n"]
