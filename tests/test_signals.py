"""Ctrl-C and SIGTERM: what they wait for, and how a process ends by them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import ray

from tasks.by_hand import TERMINATED, stops_unwind
from tasks.engine import cluster
from tasks.engine.cluster import held

PROGRAM = """
import os, signal, time
from tasks.by_hand import stops_unwind
with stops_unwind(lambda: "last words", grace=0.1):
    try:
        signal.raise_signal(signal.{first})
    except BaseException as stop:
        print(repr(stop), flush=True)
        {then}
"""


def hold(done: list[str], times: int) -> None:
    with held():
        with held():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")


@pytest.mark.parametrize(("times", "reached"), [(1, ["inner", "outer"]), (2, [])])
def test_a_stop_waits_for_what_must_not_be_done_by_half_and_a_second_one_for_nothing(
    times: int, reached: list[str]
) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        hold(done, times)
    assert done == reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_while_ray_starts_waits_and_ends_ray_by_our_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def init(**_: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda *_: sys.exit(15))  # as Ray's does
        signal.raise_signal(signal.SIGTERM)
        done.append("started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("ended"))
    with stops_unwind(str), pytest.raises(SystemExit) as stop:
        cluster.connect(num_cpus=1)
    assert (stop.value.code, done) == (TERMINATED, ["started", "ended"])


def test_a_stop_is_an_exception_and_remembered() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        with stops_unwind(str) as stopped:
            with pytest.raises(kind):
                signal.raise_signal(number)
            assert stopped == [number]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("first", "then", "code"),
    [
        ("SIGINT", "time.sleep(60)", 130),  # whatever hangs
        ("SIGTERM", "time.sleep(60)", 143),
        ("SIGINT", "signal.raise_signal(signal.SIGINT)", 130),  # somebody can't wait
    ],
)
def test_what_does_not_end_is_ended(first: str, then: str, code: int) -> None:
    program = PROGRAM.format(first=first, then=then)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (code, "\nlast words; what was started ends by itself\n")
    assert done.stdout == ("KeyboardInterrupt()\n" if code == 130 else "SystemExit(143)\n")
