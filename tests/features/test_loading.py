"""Definitions from Python and YAML files work alike; mistakes in them are named (`tests.test_declarations`)."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from textwrap import dedent

import polars as pl
import pytest

from tasks.features.definitions import Column, Definitions
from tasks.features.kernel import evaluate
from tasks.features.loading import load_definitions
from tasks.features.rows import TIME

AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)

PYTHON = """
    import polars as pl
    from tasks.features.definitions import Column, DimensionSource, EventSource, FeatureGroup, Window

    visits = EventSource(
        name="visits",
        time="at",
        uri="visits.csv",
        mapping={"user": "uid"},
        columns={"user": Column(kind="key", required=True), "at": Column(kind="time"), "pages": Column(kind="number")},
    )
    users = DimensionSource(name="users", key="user", columns=("country",), uri="users.csv")
    engagement = FeatureGroup(
        name="engagement",
        entity="user",
        source="visits",
        dimension="users",
        features={
            "visits": pl.len(),
            "pages": pl.col("pages").sum(),
            "long_visits": (pl.col("pages") > 10).sum(),
            "countries": pl.col("country").n_unique(),
        },
        windows=tuple(Window(days=days, features={"pages": pl.col("pages").sum()}) for days in (7, 30)),
        derived={"pages_per_visit": pl.col("pages") / pl.col("visits")},
        bounds={"visits": (1, None)},
    )
"""

YAML = """
    events:
      visits:
        time: at
        uri: visits.csv
        mapping: {user: uid}
        columns:
          user: {kind: key, required: true}
          at: time
          pages: number
    dimensions:
      users: {key: user, columns: [country], uri: users.csv}
    groups:
      engagement:
        entity: user
        source: visits
        dimension: users
        features:
          visits: COUNT(*)
          pages: SUM(pages)
          long_visits: COUNT(*) FILTER (WHERE pages > 10)
          countries: COUNT(DISTINCT country)
        windows:
          - days: [7, 30]
            features: {pages: "COALESCE(SUM(pages), 0)"}
        derived:
          pages_per_visit: pages / visits
        bounds: {visits: [1, null]}
"""


@pytest.fixture(params=["py", "yaml", "yml"])
def definitions(request: pytest.FixtureRequest, tmp_path: Path) -> Definitions:
    """The same definitions from a file of each kind."""
    return load_definitions(written(tmp_path, f"own.{request.param}", PYTHON if request.param == "py" else YAML))


def written(directory: Path, name: str, text: str) -> str:
    """The URI of a file that has this text."""
    path = directory / name
    path.write_text(dedent(text))
    return str(path)


def test_sources(definitions: Definitions) -> None:
    visits, users = definitions.events["visits"], definitions.dimensions["users"]
    assert visits.columns == {
        "user": Column(kind="key", required=True),
        "at": Column(kind="time"),
        "pages": Column(kind="number"),
    }
    assert (visits.time, visits.uri, visits.mapping) == ("at", "visits.csv", {"user": "uid"})
    assert (users.key, users.columns, users.uri) == ("user", ("country",), "users.csv")


def test_groups_work(definitions: Definitions) -> None:
    days_ago = [("ann", 1, 12.0, "de"), ("ann", 20, 4.0, "at"), ("ann", 200, 2.0, "de"), ("bob", 60, 5.0, "fr")]
    events = pl.DataFrame(
        [(user, AS_OF - dt.timedelta(days=days), pages, country) for user, days, pages, country in days_ago],
        schema={"user": pl.String, "at": TIME, "pages": pl.Float64, "country": pl.String},
        orient="row",
    )
    group = definitions.groups["engagement"]
    assert group.event_columns == {"user", "pages", "country"}
    assert group.bounds == {"visits": (1, None)}
    assert group.dimension == "users"
    assert evaluate(group, events, "at", AS_OF).rows(named=True) == [
        {
            "user": "ann",
            "visits": 3,
            "pages": 18.0,
            "long_visits": 1,
            "countries": 2,
            "pages_7d": 12.0,
            "pages_30d": 16.0,
            "pages_per_visit": 6.0,
        },
        {
            "user": "bob",
            "visits": 1,
            "pages": 5.0,
            "long_visits": 0,
            "countries": 1,
            "pages_7d": 0.0,
            "pages_30d": 0.0,
            "pages_per_visit": 5.0,
        },
    ]


def test_a_sum_over_no_rows_is_null_as_in_sql(tmp_path: Path) -> None:
    text = "groups: {g: {entity: u, features: {n: COUNT(*)}, windows: [{days: 7, features: {n: COUNT(*), s: SUM(x)}}]}}"
    group = load_definitions(written(tmp_path, "own.yaml", text)).groups["g"]
    events = pl.DataFrame({"u": ["ann"], "at": [AS_OF - dt.timedelta(days=7)], "x": [1.0]})
    assert evaluate(group, events, "at", AS_OF).rows() == [("ann", 1, 0, None)]


def test_they_stand_in_the_manifest(definitions: Definitions) -> None:
    assert definitions.groups["engagement"].describe()["entity"] == "user"


def test_a_group_of_yaml_reads_the_standard_source(tmp_path: Path) -> None:
    text = "groups: {spending: {entity: customer_id, features: {total: SUM(amount)}}}"
    found = load_definitions(written(tmp_path, "own.yaml", text))
    assert found.groups["spending"].source == "transactions"


GROUP = "groups: {g: {entity: user, features: {n: COUNT(*)}"
MISTAKES = [
    # why, text, message
    ("YAML of nothing", "# later", r"declares nothing; give groups, events or dimensions"),
    ("YAML of a list", "- groups", r"own\.yaml': the file: .*dictionary"),
    ("an unknown part", "group: {}", r"own\.yaml': group is unknown; did you mean 'groups'\?"),
    ("an unknown field", GROUP + ", windws: []}}", r"groups\.g\.windws is unknown; did you mean 'windows'"),
    ("no entity", "groups: {g: {features: {n: COUNT(*)}}}", r"groups\.g\.entity is missing"),
    ("no features", "groups: {g: {entity: user, features: {}}}", r"'g' declares no features"),
    ("features as a list", "groups: {g: {entity: user, features: [n]}}", r"groups\.g\.features: .*dictionary"),
    (
        "broken SQL",
        "groups: {g: {entity: user, features: {n: SUM(amount}}}",
        r"feature group 'g', feature 'n': 'SUM\(amount' is no SQL expression: ",
    ),
    (
        "an unknown function",
        "groups: {g: {entity: user, features: {n: EVAL('1')}}}",
        r"feature group 'g', feature 'n': .* is no SQL expression: ",
    ),
    ("a broken derived feature", GROUP + ", derived: {x: n +}}}", r"feature group 'g', feature 'x': 'n \+' is no SQL"),
    (
        "an unknown kind of column",
        "events: {e: {time: at, columns: {at: date}}}",
        r"events\.e\.columns\.at\.kind: Input should be 'key', 'time'",
    ),
    (
        "an undeclared time",
        "events: {e: {time: at, columns: {user: key}}}",
        r"source 'e': its time column 'at' is not declared",
    ),
    ("a name that is no directory", GROUP.replace("g:", "G/x:") + "}}", r"feature group name 'G/x'"),
    ("a window of no days", GROUP + ", windows: [{days: 0, features: {}}]}}", r"window of 0 days"),
    (
        "an unknown field of a column",
        "events: {time: {time: at, columns: {at: {kind: time, requird: true}}}}",
        r"events\.time\.columns\.at\.requird is unknown; did you mean 'required'\?",
    ),
    ("an unknown field of a window", GROUP + ", windows: [{dayz: 7, features: {}}]}}", r"did you mean 'days'"),
    ("a window without end", GROUP + ", windows: [{days: .inf, features: {}}]}}", r"days\.0: .*finite"),
    ("a feature twice", GROUP.replace("n:", "n: MIN(x), n:") + "}}", r"'n' stands twice"),
    ("a group twice", GROUP + "}, g: {}}", r"'g' stands twice"),
    ("an impossible date", GROUP + ", windows: 2024-13-01}}", r"groups\.g\.windows: "),
    ("a window of centuries", GROUP + ", windows: [{days: 1000000, features: {}}]}}", r"at most 36,525"),
]
PYTHON_MISTAKES = [
    (
        "a Python group twice",
        """
        import polars as pl
        from tasks.features.definitions import FeatureGroup
        one = FeatureGroup(name="g", entity="u", features={"n": pl.len()})
        other = FeatureGroup(name="g", entity="u", features={"m": pl.len()})
        """,
        r"own\.py' declares 'g' twice; rename one of them",
    ),
    ("a Python file of nothing", "x = 1", r"own\.py' declares nothing; assign a FeatureGroup"),
]


WRONG = """
    from tasks.features.definitions import FeatureGroup
    g = FeatureGroup(name="g", entity="user", features={})
"""
ATTACKS = [
    ("a Python name", "groups: !!python/name:os.system"),
    ("a call in a feature", "groups: {{g: {{entity: u, features: {{n: open('{marker}', 'w')}}}}}}"),
    ("a file in a feature", "groups: {{g: {{entity: u, features: {{n: read_csv('{marker}')}}}}}}"),
]
