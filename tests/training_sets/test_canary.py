"""The canary is silent on an honest join and sings on every broken one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import polars as pl
import pytest

from tasks.io.errors import LeakFound
from tasks.training_sets.asof import join_asof
from tasks.training_sets.canary import plant

START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
UTC = pl.Datetime("us", "UTC")
DAY = dt.timedelta(days=1)
OPTIONS = {"entity": "key", "event_time": "time"}
SPINE = pl.DataFrame(
    [(key, START + day * DAY) for key in range(20) for day in range(10)] + [(None, START), (5, None)],
    schema={"key": pl.Int64, "time": UTC},
    orient="row",
)
HISTORY = pl.DataFrame(
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
    rows = join_asof(SPINE, HISTORY, **OPTIONS, **flags)
    kinds = 2 + ("ttl" in flags) + 2 * ("known_at" in flags)
    assert plant(SPINE, HISTORY, rows, **OPTIONS, **flags) == 20 * kinds


def test_nothing_to_plant_for_is_no_leak() -> None:
    spine = SPINE.clear()
    assert plant(spine, HISTORY, join_asof(spine, HISTORY, **OPTIONS), **OPTIONS) == 0
    without = HISTORY.clear()
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
    rows = join(spine, HISTORY, **OPTIONS, ttl=flags.get("ttl"), **{k: v for k, v in flags.items() if k != "ttl"})
    with pytest.raises(LeakFound, match=message):
        plant(spine, HISTORY, rows, **OPTIONS, **flags, join=join)


def test_a_result_that_the_join_didn_t_give_is_found() -> None:
    rows = join_asof(SPINE, HISTORY, **OPTIONS)
    rows[:] = 0
    with pytest.raises(LeakFound, match=r"rows changed.* got another row"):
        plant(SPINE, HISTORY.filter(key=1), rows, **OPTIONS)
