"""The point-in-time join against an oracle that looks at every row."""

from __future__ import annotations

import datetime as dt

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.training_sets.asof import MOST_RUNS, join_asof
from tests.serving import oracle

START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
UTC = pl.Datetime("us", "UTC")
HISTORY = {"key": pl.Int64, "as_of": UTC, "_created": UTC, "_superseded": UTC}

moments = st.integers(-3, 12).map(lambda hours: START + dt.timedelta(hours=hours))
# Key 1 is hot; the time far in the past is one that only a time-to-live keeps away.
keys = st.sampled_from([1, 1, 1, 2, 3, None])
past = st.one_of(moments, st.just(START - dt.timedelta(days=20_000)))
spines = st.lists(st.fixed_dictionaries({"key": keys, "time": st.one_of(moments, st.none())}), min_size=10, max_size=30)
histories = st.lists(
    st.fixed_dictionaries(
        {"key": keys, "as_of": past, "_created": moments, "_superseded": st.one_of(moments, st.none())}
    ),
    min_size=20,
    max_size=80,
)


def join(spine: list, history: list, **options) -> list[int]:
    left = pl.DataFrame(spine, schema={"key": pl.Int64, "time": UTC})
    right = pl.DataFrame(history, schema=HISTORY)
    return join_asof(left, right, entity="key", event_time="time", **options).tolist()


@settings(max_examples=80, deadline=None)
@given(
    spine=spines,
    history=histories,
    ttl=st.one_of(st.none(), st.integers(0, 5).map(lambda hours: dt.timedelta(hours=hours))),
    strict=st.booleans(),
    known_at=st.booleans(),
)
def test_it_finds_what_the_oracle_finds(spine, history, ttl, strict, known_at) -> None:
    options = {"ttl": ttl, "strict": strict, "known_at": known_at}
    assert join(spine, history, **options) == oracle.asof(spine, history, **options)


def test_a_history_in_any_order_is_joined_as_a_sorted_one() -> None:
    hours = [dt.timedelta(hours=n) for n in range(3 * MOST_RUNS)]
    history = [{"key": 1, "as_of": START + hour, "_created": START, "_superseded": None} for hour in reversed(hours)]
    spine = [{"key": 1, "time": START + hour + dt.timedelta(minutes=1)} for hour in hours]
    assert join(spine, history) == oracle.asof(spine, history)


@pytest.mark.parametrize(
    ("age", "options", "matches"),
    [
        (0, {}, True),  # as_of is the event time itself
        (0, {"strict": True}, False),
        (1, {"strict": True}, True),
        (-1, {}, False),  # the future, by a microsecond
        (10, {"ttl": dt.timedelta(microseconds=10)}, True),  # at the edge of its life
        (11, {"ttl": dt.timedelta(microseconds=10)}, False),
        (0, {"ttl": dt.timedelta(0)}, True),
    ],
)
def test_the_edges_are_where_they_are_said_to_be(age: int, options: dict, matches: bool) -> None:
    history = [{"key": 1, "as_of": START - dt.timedelta(microseconds=age), "_created": START, "_superseded": None}]
    assert join([{"key": 1, "time": START}], history, **options) == [0 if matches else -1]


@pytest.mark.parametrize("kind", [pl.String, pl.Int32, pl.UInt64])
def test_keys_of_every_type_and_times_of_every_zone_meet(kind) -> None:
    history = pl.DataFrame([{"key": 7, "as_of": START, "_created": START, "_superseded": None}], schema=HISTORY)
    history = history.with_columns(pl.col("key").cast(kind))
    spine = pl.DataFrame({"key": [7, 8], "time": [START, START]}, schema={"key": pl.Int64, "time": UTC})
    spine = spine.with_columns(pl.col("time").dt.convert_time_zone("Asia/Kolkata"))
    assert join_asof(spine, history, entity="key", event_time="time").tolist() == [0, -1]
