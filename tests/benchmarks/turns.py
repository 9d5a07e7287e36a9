"""How benchmarks measure: sides that take turns in one run, medians and ratios of their rounds, peak memory."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

GIB = 2**30

Side = Callable[[Path], object]
"""Does its work once; what it writes goes to an empty directory."""


@contextlib.contextmanager
def scratch(prefix: str, directory: Path | None = None) -> Iterator[Path]:
    """An empty directory, gone afterwards; in the system's own place, if no other is given."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def take_turns(
    sides: Mapping[str, Side],
    repeats: int,
    *,
    prefix: str,
    directory: Path | None = None,
    cold: Collection[str] = (),
    rest: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of each side, run in turns; the first round warms up and doesn't count.

    Args:
        sides: The sides, by name.
        repeats: Rounds that count.
        prefix: Of the names of scratch directories.
        directory: Where those are made.
        cold: Sides that aren't warmed up.
        rest: Seconds to wait before each side, after all that was written is on the disk, so that no side pays for
            the one before it; None: neither.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    width = max(12, *map(len, sides))
    for turn in range(repeats + 1):
        for name, side in sides.items():
            if turn == 0 and name in cold:
                continue
            if rest is not None:
                os.sync()
                time.sleep(rest)
            with scratch(prefix, directory) as target:
                elapsed = timed(side, target)
            print(f"  {round_name(turn)} {name:{width}s} {elapsed:7.2f} s", flush=True)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def grow(
    side: Callable[[Path, Path], object],
    sources: Mapping[int, Path],
    repeats: int,
    *,
    prefix: str,
    item: str,
    unit: str,
    directory: Path | None = None,
) -> dict[int, list[float]]:
    """Print the time of an item for sources of two sizes, in turns; return the rounds' peak memory by size, GiB.

    Args:
        side: Its work, of a source and an empty directory.
        sources: The sources by their numbers of items; of the first round, which doesn't count, only the smallest.
        repeats: Rounds that count.
        prefix: Of the names of scratch directories.
        item: What an item is called.
        unit: Of the time of an item: 'ns' or 'µs'.
        directory: Where scratch directories are made.
    """
    times: dict[int, list[float]] = {count: [] for count in sources}
    peaks: dict[int, list[float]] = {count: [] for count in sources}
    for turn in range(repeats + 1):
        for count, source in sources.items():
            if turn == 0 and count > min(sources):
                continue
            os.sync()
            with scratch(prefix, directory) as target:
                elapsed, peak = timed_with_memory(partial(side, source), target)
            each = elapsed / count * {"ns": 1e9, "µs": 1e6}[unit]
            print(
                f"  {round_name(turn)} {count:,} {item}s {elapsed:7.2f} s, {each:5.0f} {unit} each, "
                f"peak {peak / GIB:.2f} GiB",
                flush=True,
            )
            if turn:
                times[count].append(each)
                peaks[count].append(peak / GIB)
    few, many = (statistics.median(values) for values in times.values())
    small, large = sources
    print(
        f"time of each {item}: {few:.0f} {unit} at {small:,}, {many:.0f} {unit} at {large:,}, "
        f"ratio {ratio(times[large], times[small])}"
    )
    return peaks


def timed(side: Side, target: Path) -> float:
    """Seconds that a side takes."""
    started = time.perf_counter()
    side(target)
    return time.perf_counter() - started


def timed_with_memory(side: Side, target: Path) -> tuple[float, int]:
    """Seconds that a side takes, and peak memory meanwhile, bytes."""
    memory = PeakMemory()
    memory.start()
    try:
        elapsed = timed(side, target)
    finally:
        memory.stop()
    return elapsed, memory.bytes


def round_name(turn: int) -> str:
    """What a round is called; the first is the warm-up."""
    return f"round {turn}" if turn else "warm-up"


def median(values: Sequence[float], rate: Callable[[float], str]) -> str:
    """The rounds' median in seconds, and the rate that it means."""
    middle = statistics.median(values)
    return f"median {middle:7.2f} s, {rate(middle)}"


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Ratio of two sides, round by round: median, smallest and largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"median {statistics.median(ratios):5.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def machine() -> str:
    """Name and number of the processors that this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}"


class Sampler(threading.Thread):
    """Looks at something again and again until it is stopped."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds = seconds
        self._done = threading.Event()

    def sample(self) -> None:
        """Look once."""
        raise NotImplementedError

    def run(self) -> None:
        while not self._done.wait(self._seconds):
            self.sample()

    def stop(self) -> None:
        self._done.set()
        self.join()


class PeakMemory(Sampler):
    """Largest proportional set size of this process and its children; shared memory counts once."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.bytes = 0

    def sample(self) -> None:
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        self.bytes = max(self.bytes, total)
