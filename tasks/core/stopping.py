"""Ctrl-C and SIGTERM: when they may end what is under way, and how soon it must have ended then."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED, TERMINATED = (128 + number for number in STOPS)
"""Exit codes of a process that a stop has ended."""

GRACE_SECONDS = 9.0  # ending a run takes 2 to 5 s: it cancels its tasks, tells the API, stops Ray and the API


@contextmanager
def held() -> Generator[None]:
    """Let what must not be done by half come to its end: a stop that comes meanwhile takes effect afterwards.

    A second one takes effect at once. In another thread than the main one, which no signal reaches, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        waiting.append(number)
        if len(waiting) > 1:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
        if len(waiting) == 1:
            signal.raise_signal(waiting[0])


@contextmanager
def stops_unwind(grace: float = GRACE_SECONDS) -> Generator[None]:
    """End the process of a stop within some seconds, after its `finally` blocks have stopped what was started.

    The first SIGINT raises `KeyboardInterrupt`, the first SIGTERM `SystemExit` with TERMINATED. A second stop, or one
    that isn't through after `grace` seconds, ends the process as it stands; a Ray and an API of its own follow.
    """
    stopped: list[int] = []

    def leave(number: int) -> None:
        print("ended without tidying up: what was started ends by itself", file=sys.stderr, flush=True)
        os._exit(128 + number)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stopped.append(number)
        if len(stopped) > 1:
            leave(number)
        timer = threading.Timer(grace, leave, [number])
        timer.daemon = True
        timer.start()
        timers.append(timer)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    timers: list[threading.Timer] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
