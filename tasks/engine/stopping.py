"""Ctrl-C and SIGTERM: when they may end what is under way, and how soon it must have ended then."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM

GRACE_SECONDS = 9.0  # ending a run takes 2 to 5 s: it cancels its tasks, tells the API, stops Ray and the API
LAST_WORDS_SECONDS = 2.0


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
            for one in waiting:  # each, as this may itself be within something held
                signal.raise_signal(one)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
        if len(waiting) == 1:
            signal.raise_signal(waiting[0])


@contextmanager
def stops_unwind(last_words: Callable[[], str], grace: float = GRACE_SECONDS) -> Generator[list[int]]:
    """End the process of a stop within some seconds, after its `finally` blocks have stopped what was started.

    The first SIGINT raises `KeyboardInterrupt`, the first SIGTERM `SystemExit` with TERMINATED. A second stop, or one
    that isn't through after `grace` seconds, ends the process as it stands; a Ray and an API of its own follow.

    Args:
        last_words: What is then said on stderr.
        grace: Seconds.

    Yields:
        Signals that have come; what libraries make of the exception doesn't matter to the one who asks here.

    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def leave(number: int) -> None:
        _timer(LAST_WORDS_SECONDS, os._exit, 128 + number)
        try:
            print(f"\n{last_words()}; what was started ends by itself", file=sys.stderr, flush=True)
        finally:
            os._exit(128 + number)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stopped.append(number)
        if len(stopped) > 1:
            leave(number)
        watch.append(_timer(grace, leave, number))
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)

    watch: list[threading.Timer] = []
    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield stopped
    finally:
        for timer in watch:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _timer(seconds: float, function: Callable[[int], object], number: int) -> threading.Timer:
    timer = threading.Timer(seconds, function, [number])
    timer.daemon = True
    timer.start()
    return timer
