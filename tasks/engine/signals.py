"""Ctrl-C and SIGTERM: when they may end the work, and how soon it must have ended then."""

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

GRACE_SECONDS = 9.0  # ending a run takes 2 to 5 s: it cancels its tasks, informs the API, stops Ray and the API
LAST_WORDS_SECONDS = 2.0


@contextmanager
def held() -> Generator[None]:
    """Delay a stop until the block has ended, for work that must not be half done.

    A second stop takes effect at once. Outside the main thread, which alone gets signals, nothing changes.
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
            for one in waiting:  # each in turn, as this block may be nested in another held one
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
    """End the process within some seconds of a stop, after its `finally` blocks have stopped what was started.

    The first SIGINT raises `KeyboardInterrupt`, the first SIGTERM `SystemExit` with TERMINATED. A second stop, or one
    that isn't done after `grace` seconds, ends the process at once; its own Ray and API follow.

    Args:
        last_words: Text for stderr in that case.
        grace: Seconds.

    Yields:
        Signals received so far, whatever libraries have made of the exception.

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
