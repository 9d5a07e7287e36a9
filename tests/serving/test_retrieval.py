"""Historical features of rows in memory, against the oracle on versions as they were published."""

from __future__ import annotations

import datetime as dt

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io.errors import DefinitionError, InputError, SourceError
from tasks.serving.retrieval import retrieve
from tasks.training_sets.definition import FeatureReference
from tests.serving import oracle
from tests.serving.feature_versions import DAY, ENTITY, GROUP, customers, days, publish_features

TOTAL = FeatureReference(GROUP, "total_spent")
Versions = list[tuple[dt.datetime, list[dict]]]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[str, Versions]:
    """A backfill, one more day, a corrected day for fewer customers (as versions without buckets were), and others."""
    root = str(tmp_path_factory.mktemp("root"))
    made: Versions = []
    for created, numbers, at, buckets in (
        (3, range(12), (0, 1, 2, 3), 4),
        (4, range(14), (4,), 32),
        (6, range(8), (2,), None),
        (9, range(3, 12), (3, 8), 2),
        (10, range(0, 14, 2), (4,), 8),
    ):
        frame = customers(numbers, days(*at), scale=created)
        moment = DAY + dt.timedelta(days=created)
        publish_features(root, frame, buckets=buckets, created=moment)
        made.append((moment, frame.rename({ENTITY: "key"}).to_dicts()))
    return root, made


# Every customer, an unknown one and none, every six hours from before the first features to long after the last.
ROWS = [
    {"key": key, "time": time}
    for key in [*range(15), None]
    for time in [None, *(DAY + dt.timedelta(hours=hour) for hour in range(-12, 300, 6))]
]


@settings(max_examples=30)
@given(
    order=st.randoms(use_true_random=False),
    flags=st.fixed_dictionaries({"strict": st.booleans(), "known_at": st.booleans()}),
    ttl=st.sampled_from([None, 0.5, 1, 3]),
    zone=st.sampled_from(["UTC", "America/New_York", None]),
)
def test_each_row_gets_what_the_oracle_finds(store, order, flags, ttl, zone) -> None:
    root, made = store
    rows = order.choices(ROWS, k=400)
    times = pl.Series("event_timestamp", [row["time"] for row in rows], pl.Datetime("us", "UTC"))
    times = times.dt.replace_time_zone(None) if zone is None else times.dt.convert_time_zone(zone)
    table = pl.DataFrame({ENTITY: pl.Series([row["key"] for row in rows], dtype=pl.Int64)}).with_columns(times)
    found = retrieve(root, table.to_arrow(), [TOTAL], ttl_days=ttl, **flags)
    assert found.select(table.columns).equals(table.to_arrow())
    limit = None if ttl is None else dt.timedelta(days=ttl)
    expected = [oracle.known(made, row, ttl=limit, **flags) for row in rows]
    assert found["total_spent"].to_pylist() == [row and row["total_spent"] for row in expected]


def spine(**columns) -> pa.Table:
    """Customers 1, 2 and one without features, on day 1."""
    moment = DAY + dt.timedelta(days=1)
    return pa.table({ENTITY: [1, 2, 99], "event_timestamp": [moment] * 3} | columns)


def test_pandas_rows_with_a_missing_key_keep_it(store) -> None:
    root, _ = store
    frame = pd.DataFrame({ENTITY: [1, None, 99], "event_timestamp": pd.to_datetime(["2024-02-01"] * 3), "x": "abc"})
    found = retrieve(root, pa.Table.from_pandas(frame, preserve_index=False), [FeatureReference(GROUP, "*")])
    assert found.column_names == [ENTITY, "event_timestamp", "x", "total_spent", "orders", "city"]
    assert found["orders"].to_pylist() == [1, None, None]
    assert found.schema.field("city").type == pa.string()


def test_columns_bear_the_group_where_names_meet(root: str) -> None:
    publish_features(root, customers(range(5)))
    publish_features(root, customers(range(5), scale=2.0), group="other-features")
    both = [TOTAL, FeatureReference("other-features", "total_spent"), FeatureReference(GROUP, "orders")]
    found = retrieve(root, spine(), both)
    assert found.column_names[2:] == [f"{GROUP}__total_spent", "other-features__total_spent", "orders"]
    assert found[f"{GROUP}__total_spent"].to_pylist() == [1000, 2000, None]
    assert found["other-features__total_spent"].to_pylist() == [2000, 4000, None]
    assert retrieve(root, spine(), [TOTAL], full_feature_names=True).column_names[2:] == [f"{GROUP}__total_spent"]


@pytest.mark.parametrize(
    ("table", "references", "error", "message"),
    [
        (spine(), [], DefinitionError, "no features"),
        (spine(total_spent=[0, 0, 0]), [TOTAL], DefinitionError, "full_feature_names"),
        (spine(), [TOTAL, FeatureReference(GROUP, "total_spent", 1)], DefinitionError, "leave one out"),
        (
            spine().rename_columns(["customer", "event_timestamp"]),
            [TOTAL],
            SourceError,
            "no column 'customer_id'.*mean",
        ),
        (spine().drop(["event_timestamp"]), [TOTAL], SourceError, "no column 'event_timestamp'"),
        (spine(event_timestamp=["a", "b", "c"]), [TOTAL], InputError, "give timestamps"),
        (spine(customer_id=["a", "b", "c"]), [TOTAL], InputError, r"of type int64, which can't be 'a' \(row 0\)"),
        (spine(customer_id=[1.0, 2.0, 2.0**53]), [TOTAL], InputError, r"may be several whole numbers"),
        (spine(customer_id=[True, False, True]), [TOTAL], InputError, r"are of type bool; convert"),
    ],
)
def test_mistakes_name_the_cure(store, table, references, error, message) -> None:
    root, _ = store
    with pytest.raises(error, match=message):
        retrieve(root, table, references)
