"""Models from Python and YAML files are alike; mistakes in them are named (`tests.test_declarations`)."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import polars as pl
import pytest

from tasks.io import storage
from tasks.io.errors import DefinitionError
from tasks.io.notation import expand
from tasks.training_sets.definition import (
    FeatureReference,
    Label,
    Model,
    SpineSource,
    column_names,
    load_models,
    select,
)
from tests.features.test_loading import written

PYTHON = """
    import polars as pl
    from tasks.training_sets.definition import FeatureReference, Label, Model, SpineSource, column_names

    churned = Label(
        name="churned",
        entity="customer_id",
        at=("2024-04-30T00:00:00/2024-11-30T00:00:00/1mo",),
        days=30,
        target=pl.sql_expr("COUNT(*) = 0"),
        active_days=90,
    )
    churn = Model(
        name="churn",
        entity="customer_id",
        spine=churned,
        features=(FeatureReference("customer-features", "*"),),
        ttl_days=60,
    )
    demand = Model(
        name="demand",
        entity="product_id",
        spine=SpineSource(uri="sold.parquet", columns={"target": "sold", "event_timestamp": "day"}),
        features=(
            FeatureReference("product-features", "total_sales", 3),
            FeatureReference("product-features", "sales_velocity", 3),
        ),
        strict=True,
        known_at=True,
    )
"""
YAML = """
    labels:
      churned: {entity: customer_id, at: 2024-04-30/2024-11-30/1mo, days: 30, active_days: 90, target: "COUNT(*) = 0"}
    models:
      churn: {label: churned, features: ["customer-features:*"], ttl_days: 60}
      demand:
        entity: product_id
        spine: {uri: sold.parquet, columns: {target: sold, event_timestamp: day}}
        features: ["product-features:total_sales@v3", "product-features:sales_velocity@v3"]
        strict: true
        known_at: true
"""


@pytest.fixture(params=["py", "yaml", "yml"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Model]:
    """The same models from a file of each kind."""
    return load_models(written(tmp_path, f"models.{request.param}", PYTHON if request.param == "py" else YAML))


def test_a_model_with_a_label(models: dict[str, Model]) -> None:
    churn = models["churn"]
    assert list(models) == ["churn", "demand"]
    assert isinstance(churn.spine, Label)
    assert (churn.name, churn.entity, churn.ttl_days, churn.strict, churn.known_at) == (
        "churn",
        "customer_id",
        60,
        False,
        False,
    )
    assert churn.features == (FeatureReference("customer-features", "*"),)
    assert [f"{time:%m-%d}" for time in expand(churn.spine.at)][:3] == ["04-30", "05-30", "06-30"]
    assert (churn.spine.days, churn.spine.active_days, churn.spine.source) == (30, 90, "transactions")
    events = pl.DataFrame({"customer_id": [1, 1, 2]})
    assert events.group_by("customer_id", maintain_order=True).agg(churn.spine.target.alias("t"))["t"].to_list() == [
        False,
        False,
    ]
    assert events.clear().select(churn.spine.target).item() is True


def test_a_model_with_a_table(models: dict[str, Model]) -> None:
    demand = models["demand"]
    assert demand.spine == SpineSource(uri="sold.parquet", columns={"target": "sold", "event_timestamp": "day"})
    assert (demand.entity, demand.strict, demand.known_at, demand.ttl_days) == ("product_id", True, True, None)
    assert [str(ref) for ref in demand.features] == [
        "product-features:total_sales@v3",
        "product-features:sales_velocity@v3",
    ]


def test_both_kinds_of_file_declare_the_same(tmp_path: Path) -> None:
    python, yaml = (load_models(written(tmp_path, *file)) for file in (("m.py", PYTHON), ("m.yaml", YAML)))
    assert {name: model.describe() for name, model in python.items()} == {
        name: model.describe() for name, model in yaml.items()
    }


TIMES = [
    ("a day, which YAML takes for a date", "2024-01-31", ("2024-01-31T00:00:00",)),
    ("a moment, which YAML takes for one", "2024-01-31T12:00:00Z", ("2024-01-31T12:00:00+00:00",)),
    ("days in a list", "[2024-01-31, 2024-02-29]", ("2024-01-31T00:00:00", "2024-02-29T00:00:00")),
    ("text with commas", "'2024-01-31, 2024-02-29'", ("2024-01-31T00:00:00", "2024-02-29T00:00:00")),
    (
        "a range beside a day",
        "[2024-01-01, 2024-02-01/2024-03-01/1mo]",
        ("2024-01-01T00:00:00", "2024-02-01T00:00:00/2024-03-01T00:00:00/1mo"),
    ),
]


@pytest.mark.parametrize(("why", "at", "expected"), TIMES, ids=[case[0] for case in TIMES])
def test_times(tmp_path: Path, why: str, at: str, expected: tuple[str, ...]) -> None:
    text = yaml_of(WON, at=at)
    spine = load_models(written(tmp_path, "models.yaml", text))["m"].spine
    assert isinstance(spine, Label)
    assert spine.at == expected


def test_a_file_on_s3(s3_root: str) -> None:
    storage.write_bytes(f"{s3_root}/models.yaml", dedent(YAML).encode())
    assert list(load_models(f"{s3_root}/models.yaml")) == ["churn", "demand"]


def test_some_of_the_models_are_selected(models: dict[str, Model]) -> None:
    assert [model.name for model in select(models, ())] == ["churn", "demand"]
    assert [model.name for model in select(models, ("demand", "churn"))] == ["churn", "demand"]
    assert [model.name for model in select(models, ("demand",))] == ["demand"]


def test_an_unknown_model_is_named_with_the_closest(models: dict[str, Model]) -> None:
    with pytest.raises(DefinitionError, match=r"no model is named 'chrun'; did you mean 'churn'\?"):
        select(models, ("chrun",))
    with pytest.raises(DefinitionError, match=r"no model is named 'x'; known: churn, demand"):
        select(models, ("x",))


FEATURES = "features: ['g:n']"
LABEL = {"entity": "u", "at": "2024-01-31", "days": 30, "target": "COUNT(*)"}
SPINE = "entity: u, spine: {uri: s.csv}"


def yaml_of(model: str, **label: object) -> str:
    """A file of one model and its label, of which some fields are others."""
    fields = ", ".join(f"{name}: {value}" for name, value in {**LABEL, **label}.items())
    return f"{{labels: {{won: {{{fields}}}}}, models: {{m: {{{model}}}}}}}"


WON = f"label: won, {FEATURES}"
MISTAKES = [
    # why, text, message
    ("YAML of nothing", "# later", r"declares nothing; give models"),
    (
        "labels alone",
        "labels: {l: {entity: u, at: 2024-01-31, days: 30, target: COUNT(*)}}",
        r"declares nothing; give models",
    ),
    ("YAML of a list", "- models", r"own\.yaml': the file: .*dictionary.*\(found \['models'\]\)"),
    ("an unknown part", "model: {}", r"own\.yaml': model is unknown; did you mean 'models'\?"),
    (
        "an unknown field of a model",
        yaml_of(f"lable: won, {FEATURES}"),
        r"models\.m\.lable is unknown; did you mean 'label'\?",
    ),
    (
        "an unknown field of a label",
        yaml_of(WON, activ_days=3),
        r"labels\.won\.activ_days is unknown; did you mean 'active_days'",
    ),
    (
        "an unknown field of a spine",
        yaml_of(f"entity: u, spine: {{url: s.csv, uri: s.csv}}, {FEATURES}"),
        r"models\.m\.spine\.url is unknown; did you mean 'uri'\?",
    ),
    ("no features", yaml_of("label: won"), r"models\.m\.features is missing"),
    ("an empty list of features", yaml_of("label: won, features: []"), r"'m' reads no features; give some"),
    (
        "a feature without its group",
        yaml_of("label: won, features: [total_spent]"),
        r"own\.yaml': model 'm': 'total_spent' names no feature; write group:feature",
    ),
    ("a feature twice", yaml_of("label: won, features: ['g:n', 'g:n']"), r"names g:n twice; leave one"),
    ("two versions of a group", yaml_of("label: won, features: ['g:n', 'g:o@v3']"), r"reads 'g' in several versions"),
    (
        "an undeclared label",
        yaml_of(f"label: wonn, {FEATURES}"),
        r"model 'm' names the label 'wonn', which isn't declared; did you mean 'won'\?",
    ),
    ("neither label nor spine", yaml_of(FEATURES), r"model 'm' has neither a label nor a spine; give one"),
    ("a label and a spine", yaml_of(f"label: won, {SPINE}, {FEATURES}"), r"'m' has a label and a spine"),
    ("a spine without entity", yaml_of(f"spine: {{uri: s.csv}}, {FEATURES}"), r"'m' has no entity; give"),
    ("another entity than the label's", yaml_of(f"label: won, entity: v, {FEATURES}"), r"is about v, but"),
    ("a time to live of nothing", yaml_of(f"label: won, ttl_days: 0, {FEATURES}"), r"model 'm': ttl_days = 0"),
    *(
        (
            f"a time to live of {days}",
            yaml_of(f"label: won, ttl_days: {days}, {FEATURES}"),
            rf"model 'm': ttl_days = {re.escape(told)}: give a number of days above 0 and at most 36,525",
        )
        for days, told in (("-1", "-1.0"), (".nan", "nan"), (".inf", "inf"), ("1e9", "1000000000.0"))
    ),
    (
        "a label of centuries",
        yaml_of(WON, days=1000000),
        r"label 'won': days = 1000000: give a number of days of at least 1 and at most 36,525",
    ),
    ("an impossible date", yaml_of(WON, at="2024-13-01", days=3), r"'2024-13-01' is no time; write ISO 8601"),
    (
        "a key that is named as the target",
        yaml_of(f"spine: {{uri: s.csv}}, entity: target, {FEATURES}"),
        r"'m': its entity 'target' is named as a column of ours",
    ),
    (
        "a time to live in words",
        yaml_of(f"label: won, ttl_days: two, {FEATURES}"),
        r"models\.m\.ttl_days: .*valid number.* \(found 'two'\)",
    ),
    ("a target that is no SQL", yaml_of(WON, target="COUNT("), r"label 'won': target 'COUNT\(' is no SQL expression: "),
    (
        "a time that is none",
        yaml_of(WON, at="someday"),
        r"labels\.won\.at: 'someday' is no time; write ISO 8601.* \(found 'someday'\)",
    ),
    (
        "a range that goes backwards",
        yaml_of(WON, at="2024-03-01/2024-01-01/1mo"),
        r"labels\.won\.at: .* ends before it begins; swap",
    ),
    ("no times", yaml_of(WON, at="[]"), r"label 'won' has no times"),
    ("no days", yaml_of(WON, days=0), r"label 'won': days .* at least 1"),
    ("a name that is no directory", yaml_of("x: 1").replace("m:", "M/x:"), r"models\.M/x\.(x|features)"),
    (
        "another name that is no directory",
        yaml_of(WON).replace("m:", "M/x:"),
        r"model name 'M/x': use lower-case letters",
    ),
    (
        "a model twice",
        f"models:\n  m: {{{SPINE}, {FEATURES}}}\n  m: {{{SPINE}, {FEATURES}}}",
        r"no valid YAML: 'm' stands twice.*line 3",
    ),
]
PYTHON_MISTAKES = [
    ("a Python file of nothing", "x = 1", r"own\.py' declares nothing; assign a Model"),
    (
        "a model twice in Python",
        PYTHON + "\n    again = Model(name='churn', entity='u', spine=SpineSource(uri='s'), features=churn.features)",
        r"own\.py' declares 'churn' twice; rename one",
    ),
]


WRONG = """
    from tasks.training_sets.definition import Model, SpineSource
    m = Model(name="m", entity="u", spine=SpineSource(uri="s"), features=())
"""
ATTACKS = [
    ("a Python name", "models: !!python/name:os.system"),
    (
        "a call in a target",
        "{{labels: {{l: {{entity: u, at: 2024-01-31, days: 1, target: \"open('{marker}', 'w')\"}}}}, models: {{}}}}",
    ),
    (
        "a file in a target",
        "{{labels: {{l: {{entity: u, at: 2024-01-31, days: 1, target: \"read_csv('{marker}')\"}}}}, models: {{}}}}",
    ),
]


def test_two_features_never_share_a_column() -> None:
    def columns(*texts: str) -> list[str]:
        return column_names([FeatureReference.parse(text) for text in texts])

    assert columns("a-b:x", "c:x", "c:y") == ["feature_a_b__x", "feature_c__x", "feature_y"]
    for texts in (("a-b:x", "a_b:x"), ("a:x", "b:x", "c:a__x")):
        with pytest.raises(DefinitionError, match=r"would both be the column 'feature_a.*'; leave one out"):
            columns(*texts)


def test_a_target_in_python_is_an_expression() -> None:
    with pytest.raises(DefinitionError, match=r"label 'won', target: 'COUNT\(\*\)' is text; in Python .*pl\.sql_expr"):
        Label(name="won", entity="u", at=("2024-01-31",), days=3, target="COUNT(*)")  # type: ignore[arg-type]
