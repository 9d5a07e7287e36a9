"""A declaration is checked when it is made, and says what it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from tasks.features.definitions import (
    Column,
    Definitions,
    DimensionSource,
    EventSource,
    FeatureGroup,
    Window,
    feature_digests,
)
from tasks.features.standard import CUSTOMER_FEATURES, PRODUCT_FEATURES, STANDARD
from tasks.io.errors import DefinitionError
from tasks.store.layout import FEATURES

AMOUNT = pl.col("amount")
TIME = {"at": Column(kind="time")}


def group(**changes: Any) -> FeatureGroup:
    return FeatureGroup(**{"name": "visits", "entity": "user", "features": {"n": pl.len()}, **changes})


MISTAKES = [
    ("capitals", lambda: group(name="Visits"), r"feature group name 'Visits': use lower-case letters"),
    ("a path", lambda: group(name="../visits"), r"feature group name '\.\./visits'"),
    ("no name", lambda: group(name=""), r"feature group name ''"),
    ("no features", lambda: group(features={}), r"'visits' declares no features; give at least one"),
    ("a feature twice", lambda: group(derived={"n": pl.lit(1)}), r"'visits' declares n twice; rename"),
    (
        "a window's feature twice",
        lambda: group(windows=(Window(days=7, features={"n": pl.len()}),), derived={"n_7d": pl.lit(1), "n": pl.lit(2)}),
        r"'visits' declares n, n_7d twice",
    ),
    ("a feature named as the entity", lambda: group(derived={"user": pl.lit(1)}), r"feature named as its entity"),
    ("bounds of nothing", lambda: group(bounds={"m": (0, 1)}), r"bounds for m, which it doesn't declare; known: n"),
    (
        "bounds of a misspelled feature",
        lambda: group(features={"total": pl.len()}, bounds={"totl": (0, 1)}),
        r"did you mean 'total'\?",
    ),
    (
        "no feature's name",
        lambda: group(features={"": pl.len()}),
        r"'visits', feature '': begin with a letter .* 'total_spent'",
    ),
    ("a star", lambda: group(features={"*": pl.len()}), r"feature '\*': begin with a letter"),
    ("a blank", lambda: group(derived={"a b": pl.lit(1)}), r"feature 'a b': begin with a letter .* such as 'a_b', so"),
    ("a number first", lambda: group(features={"7d": pl.len()}), r"feature '7d': .* such as 'feature_7d'"),
    ("an underscore first", lambda: group(features={"_reason": pl.len()}), r"feature '_reason': .* such as 'reason'"),
    ("a window's star", lambda: Window(days=7, features={"*": pl.len()}), r"window's feature '\*'"),
    *(
        (
            f"our {name}",
            lambda name=name: group(derived={name: pl.lit(1)}),
            rf"'{name}': the rows get a column '{name}' of ours",
        )
        for name in FEATURES
    ),
    ("an entity that is ours", lambda: group(entity="as_of"), r"its entity 'as_of' has the name of a column"),
    (
        "a dimension's column",
        lambda: DimensionSource(name="users", key="u", columns=("as_of",)),
        r"'users', column 'as_of': the",
    ),
    (
        "a dimension's mapped column",
        lambda: DimensionSource(name="users", key="u", mapping={"u": "id", "feature_version": "v"}),
        r"'users', column 'feature_version': the rows get a column 'feature_version' of ours \(.*'own_feature_version'",
    ),
    ("a dimension's blank", lambda: DimensionSource(name="users", key="u", columns=("sign up",)), r"such as 'sign_up'"),
    (
        "a source's as_of",
        lambda: EventSource(name="visits", time="at", columns={**TIME, "as_of": Column()}),
        r"'as_of' is what expressions find the as-of time by",
    ),
    ("a version's name", lambda: group(name="v3"), r"name 'v3': it is kept for a version, such as 'my-v3'"),
    ("a place of ours", lambda: group(name="training-ready"), r"'training-ready': it is kept for something else"),
    ("its source's name", lambda: group(name="transactions"), r"named as the table that it reads; rename it"),
    (
        "SQL in Python",
        lambda: group(features={"n": "COUNT(*)"}),
        r"feature 'n': 'COUNT\(\*\)' is text; in Python .* YAML",
    ),
    (
        "SQL in a window",
        lambda: Window(days=7, features={"n": "COUNT(*)"}),
        r"window of 7 days, feature 'n': .* is text",
    ),
    (
        "a number as a feature",
        lambda: group(derived={"m": 5}),
        r"feature 'm': a int is no expression; give one of Polars'",
    ),
    ("bounds upside down", lambda: group(bounds={"n": (5, 1)}), r"bounds of 'n' are 5, 1; give the lowest value"),
    ("bounds of NaN", lambda: group(bounds={"n": (float("nan"), None)}), r"bounds of 'n' are nan, None"),
    *(
        (
            f"{days} days",
            lambda days=days: Window(days=days, features={}),
            r"days: give a number of days of at least 1 and",
        )
        for days in (-1, 1.5, float("nan"), float("inf"), 1_000_000, "7")
    ),
    ("no days", lambda: Window(days=0, features={}), r"window of 0 days: give a number of days of at least 1"),
    (
        "an undeclared time",
        lambda: EventSource(name="visits", time="when", columns=TIME),
        r"source 'visits': its time column 'when' is not declared; add it to columns with kind 'time'",
    ),
    (
        "a time of another kind",
        lambda: EventSource(name="visits", time="at", columns={"at": Column(kind="number")}),
        r"'at' is not declared",
    ),
    ("a source's name", lambda: EventSource(name="my visits", time="at", columns=TIME), r"source name 'my visits'"),
    ("a dimension's name", lambda: DimensionSource(name="-users", key="user"), r"source name '-users'"),
]


@pytest.mark.parametrize(("why", "declare", "message"), MISTAKES, ids=[case[0] for case in MISTAKES])
def test_mistakes(why: str, declare: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        declare()


def test_names_come_in_order() -> None:
    windows = tuple(Window(days=days, features={"n": pl.len(), "s": AMOUNT.sum()}) for days in (7, 30))
    declared = group(features={"z": pl.len(), "a": AMOUNT.sum()}, windows=windows, derived={"ratio": pl.col("a")})
    assert declared.feature_names == ["z", "a", "n_7d", "s_7d", "n_30d", "s_30d", "ratio"]


COLUMNS = [
    ("only counted", group(), {"user"}),
    ("a column", group(features={"s": AMOUNT.sum()}), {"user", "amount"}),
    ("several", group(features={"s": AMOUNT.sort_by("at", "item").last()}), {"user", "amount", "at", "item"}),
    ("in a window", group(windows=(Window(days=7, features={"s": AMOUNT.sum()}),)), {"user", "amount"}),
    ("derived ones need features", group(derived={"x": pl.col("n") + 1}), {"user"}),
    ("as_of is given", group(features={"s": (pl.col("as_of") - pl.col("at")).max()}), {"user", "at"}),
    ("itself", group(features={"s": pl.col("user").n_unique()}), {"user"}),
]


@pytest.mark.parametrize(("why", "declared", "columns"), COLUMNS, ids=[case[0] for case in COLUMNS])
def test_columns_that_a_group_needs(why: str, declared: FeatureGroup, columns: set[str]) -> None:
    assert declared.event_columns == columns


CHANGES = [
    ("another name", {"name": "visitors"}),
    ("another expression", {"features": {"n": pl.len() + 1}}),
    ("another feature's name", {"features": {"m": pl.len()}}),
    ("another entity", {"entity": "page"}),
    ("another source", {"source": "clicks"}),
    ("a window", {"windows": (Window(days=7, features={"n": pl.len()}),)}),
    ("a dimension", {"dimension": "users"}),
    ("a derived feature", {"derived": {"x": pl.col("n")}}),
    ("bounds", {"bounds": {"n": (0, None)}}),
]


@pytest.mark.parametrize(("why", "change"), CHANGES, ids=[case[0] for case in CHANGES])
def test_the_digest_tells_declarations_apart(why: str, change: dict[str, Any]) -> None:
    assert group().describe() == group().describe()
    assert group(**change).describe() != group().describe()


def test_a_declaration_is_plain_values_in_the_manifest() -> None:
    described = group(windows=(Window(days=7, features={"s": AMOUNT.sum()}),), bounds={"n": (1, None)}).describe()
    assert described == {
        "name": "visits",
        "entity": "user",
        "source": "transactions",
        "dimension": None,
        "features": {"n": "len()"},
        "windows": [{"days": 7, "features": {"s": 'col("amount").sum()'}}],
        "derived": {},
        "bounds": {"n": [1, None]},
    }


def test_own_definitions_lie_over_the_standard_ones() -> None:
    own = Definitions(groups={"customer-features": group(name="customer-features"), "visits": group()})
    together = own.over(STANDARD)
    assert list(together.groups) == ["customer-features", "product-features", "visits"]
    assert together.groups["customer-features"].entity == "user"
    assert together.events == STANDARD.events
    assert together.dimensions == STANDARD.dimensions


SELECTED = [
    ((), ["customer-features", "product-features"]),
    (("product-features",), ["product-features"]),
    (("product-features", "customer-features"), ["customer-features", "product-features"]),
]


@pytest.mark.parametrize(("names", "expected"), SELECTED, ids=["all", "one", "in the order of declaration"])
def test_select(names: tuple[str, ...], expected: list[str]) -> None:
    assert [chosen.name for chosen in STANDARD.select(names)] == expected


UNKNOWN = [
    (STANDARD, ("costumer-features",), r"no feature group is named 'costumer-features'; did you mean 'customer-fea"),
    (STANDARD, ("xyz",), r"no feature group is named 'xyz'; known: customer-features, product-features"),
    (Definitions(), ("xyz",), r"known: none"),
    (
        Definitions(groups={"visits": group(source="transaction")}).over(STANDARD),
        (),
        r"'visits' reads the source 'transaction', which isn't declared; did you mean 'transactions'\?",
    ),
    (
        Definitions(groups={"visits": group(dimension="customer")}).over(STANDARD),
        (),
        r"'visits' joins the dimension 'customer', which isn't declared; did you mean 'customers'\?",
    ),
]


@pytest.mark.parametrize(("definitions", "names", "message"), UNKNOWN, ids=[case[2][:40] for case in UNKNOWN])
def test_unknown_names(definitions: Definitions, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        definitions.select(names)


def test_the_standard_groups_use_only_declared_columns() -> None:
    for declared in STANDARD.groups.values():
        assert declared.event_columns <= set(STANDARD.events[declared.source].columns)
    assert CUSTOMER_FEATURES.dimension in STANDARD.dimensions


# Digests

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
