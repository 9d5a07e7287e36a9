from __future__ import annotations

import gc
import itertools
import threading
import time
import traceback
import weakref

import pytest

from tasks.loader.prefetch import Prefetch


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_items_come_in_order_and_the_thread_ends_with_them() -> None:
    assert list(Prefetch(iter(range(100)), 3)) == list(range(100))
    assert threads() == 0


def test_no_more_than_depth_are_made_ahead() -> None:
    made: list[int] = []
    items = Prefetch((made.append(number) or number for number in itertools.count()), 3)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) == 4  # one was taken, three wait
    items.close()
    assert threads() == 0
    assert list(items) == []


def test_a_failure_comes_after_the_items_before_it_with_its_traceback() -> None:
    def faulty():
        yield 1
        raise ZeroDivisionError("in the middle")

    items = Prefetch(faulty(), 3)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="in the middle") as caught:
        next(items)
    assert "faulty" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert list(items) == []
    assert threads() == 0


def test_the_thread_ends_when_nobody_uses_it_any_more() -> None:
    ended = []

    def endless():
        try:
            yield from itertools.count()
        finally:
            ended.append(True)

    items = Prefetch(endless(), 2)
    next(items)
    there = weakref.ref(items)
    del items
    gc.collect()
    assert there() is None
    assert threads() == 0
    assert ended == [True]
