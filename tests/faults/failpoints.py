"""Kill points of a flow's process, without a line in the product: Python's own audit events say what it is about to do.

A `sitecustomize.py` that stands first on PYTHONPATH arms the process that a test starts, and each process of Python
that it starts (Ray's workers inherit the environment). Before a file is opened, renamed, linked or removed, Python
tells the hook; at the point that the test names, the hook kills the *flow's* process with SIGKILL. A worker that comes
to the point doesn't go on: what is on the disk then is what was there at that moment, each time.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.processes import PROJECT

POINT, VERSION, FLOW, HOLD = "FAILPOINT", "FAILPOINT_VERSION", "FAILPOINT_FLOW", "FAILPOINT_HOLD"
WRITTEN = "FAILPOINT_WRITTEN"

_SITECUSTOMIZE = "from tests.faults.failpoints import arm\n\narm()\n"


@dataclass(frozen=True)
class Point:
    """A moment of a run: just before something is done to a file of a version, as soon as enough files are there."""

    event: str
    """The audit event: open, os.rename, os.link or os.remove."""
    name: str
    """Pattern of the file's name; for a rename or a link, of the name that it gets."""
    written: int = 0
    """How many data files must be there."""


POINTS = {
    # The reservation's link is there, the temporary file that it was made from too.
    "after reserving": Point("os.remove", r"\._reservation.*\.tmp"),
    "in mid-data": Point("os.rename", r"part-.*\.parquet", written=2),
    "after the data, before the report": Point("os.rename", r"_report\.html"),
    "after the report, before the manifest": Point("open", r"\._manifest\.json\..*\.tmp"),
    "in mid-manifest": Point("os.link", r"_manifest\.json"),
    "right after the manifest": Point("os.remove", r"\._manifest\.json\..*\.tmp"),
}


def environment(
    directory: Path, point: str, version: Path, hold: Path | None = None, written: int | None = None
) -> dict[str, str]:
    """Variables that arm the processes of a run.

    Args:
        directory: An empty directory of the test's.
        point: A key of `POINTS`.
        version: Directory of the version that is meant; nothing else counts.
        hold: A file that appears when the point is reached, where the run then waits until it is deleted; None: the
            flow is killed there.
        written: How many data files must be there, if not as many as the point says.

    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    needed = POINTS[point].written if written is None else written
    armed = {"PYTHONPATH": f"{directory}{os.pathsep}{PROJECT}", POINT: point, VERSION: str(version)}
    armed[WRITTEN] = str(needed)
    return armed if hold is None else {**armed, HOLD: str(hold)}


def arm() -> None:
    """Have this process, the flow's or one of its Ray's, kill the flow at the point that the environment names."""
    os.environ.setdefault(FLOW, str(os.getpid()))  # the first one that comes here is the flow
    flow, version, point = int(os.environ[FLOW]), os.environ[VERSION], POINTS[os.environ[POINT]]
    needed = int(os.environ[WRITTEN])
    within, name = version + "/", re.compile(point.name)
    hold = Path(os.environ[HOLD]) if HOLD in os.environ else None
    changes_name = point.event in ("os.rename", "os.link")
    busy = threading.local()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != point.event or getattr(busy, "counting", False):
            return
        path = arguments[1] if changes_name else arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        place = str(path)
        if not place.startswith(within) or not name.fullmatch(os.path.basename(place)):
            return
        busy.counting = True  # what counting opens is no event of the run
        written = sum(1 for _ in Path(version).rglob("part-*.parquet"))
        busy.counting = False
        if written < needed:
            return
        if hold is not None:
            hold.touch()
            while hold.exists():
                time.sleep(0.05)
            return
        os.kill(flow, signal.SIGKILL)
        threading.Event().wait()  # a worker: Ray ends it, as it ends all of a lost driver's

    sys.addaudithook(hook)
