"""The point-in-time join against an oracle that looks at every row."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io.errors import LeakFound
from tasks.training_sets.asof import MOST_RUNS, join_asof, plant
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


@settings(max_examples=80)
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


# The leak canary

START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
UTC = pl.Datetime("us", "UTC")
DAY = dt.timedelta(days=1)
OPTIONS = {"entity": "key", "event_time": "time"}
SPINE = pl.DataFrame(
    [(key, START + day * DAY) for key in range(20) for day in range(10)] + [(None, START), (5, None)],
    schema={"key": pl.Int64, "time": UTC},
    orient="row",
)
DAILY = pl.DataFrame(
    # One entity in four has no history: a planted row would be the first that it finds.
    [(key, START + day * DAY, START + day * DAY, None) for key in range(20) if key % 4 for day in range(0, 10, 3)],
    schema={"key": pl.Int64, "as_of": UTC, "_created": UTC, "_superseded": UTC},
    orient="row",
)
FLAGS = [
    {},
    {"strict": True},
    {"ttl": 2 * DAY},
    {"known_at": True},
    {"ttl": 2 * DAY, "strict": True, "known_at": True},
]


@pytest.mark.parametrize("flags", FLAGS)
def test_an_honest_join_passes(flags: dict) -> None:
    rows = join_asof(SPINE, DAILY, **OPTIONS, **flags)
    kinds = 2 + ("ttl" in flags) + 2 * ("known_at" in flags)
    assert plant(SPINE, DAILY, rows, **OPTIONS, **flags) == 20 * kinds


def test_nothing_to_plant_for_is_no_leak() -> None:
    spine = SPINE.clear()
    assert plant(spine, DAILY, join_asof(spine, DAILY, **OPTIONS), **OPTIONS) == 0
    without = DAILY.clear()
    assert plant(SPINE, without, join_asof(SPINE, without, **OPTIONS), **OPTIONS) == 40


def later(spine: pl.DataFrame, history: pl.DataFrame, **options):
    """Looks a second too far."""
    moved = spine.with_columns(pl.col("time") + dt.timedelta(seconds=1))
    return join_asof(moved, history, **options)


def ignoring(name: str) -> Callable:
    """Takes no notice of an option."""

    def join(spine: pl.DataFrame, history: pl.DataFrame, **options):
        neutral = None if name == "ttl" else False
        return join_asof(spine, history, **{**options, name: neutral})

    return join


def newest(spine: pl.DataFrame, history: pl.DataFrame, **options):
    """Gives everybody the newest features."""
    return join_asof(spine.with_columns(pl.lit(START + 3650 * DAY, UTC).alias("time")), history, **options)


@pytest.mark.parametrize(
    ("join", "flags", "message"),
    [
        (later, {}, "got features from its future"),
        (newest, {}, "far future"),
        (ignoring("strict"), {"strict": True}, "got features from its future"),
        (ignoring("ttl"), {"ttl": DAY}, "older than the time-to-live"),
        (ignoring("known_at"), {"known_at": True}, "computed after it|superseded by then"),
    ],
)
def test_a_broken_join_is_found(join: Callable, flags: dict, message: str) -> None:
    # At 12:00, so that no honest row lies between the row's time and what the broken join sees.
    spine = SPINE.with_columns(pl.col("time") + DAY / 2)
    rows = join(spine, DAILY, **OPTIONS, ttl=flags.get("ttl"), **{k: v for k, v in flags.items() if k != "ttl"})
    with pytest.raises(LeakFound, match=message):
        plant(spine, DAILY, rows, **OPTIONS, **flags, join=join)


def test_a_result_that_the_join_didn_t_give_is_found() -> None:
    rows = join_asof(SPINE, DAILY, **OPTIONS)
    rows[:] = 0
    with pytest.raises(LeakFound, match=r"rows changed.* got another row"):
        plant(SPINE, DAILY.filter(key=1), rows, **OPTIONS)
