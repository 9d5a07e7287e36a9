"""An object store that is too small: what doesn't fit is spilled to disk and comes back, and nothing of it stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from tasks.engine.cluster import OLDER_THAN
from tests.faults import large_shuffle
from tests.faults.three_flows import DELIVERY, FEATURES, Reader, Starter, Store, assert_same_rows, copied
from tests.processes import PATIENCE, PROJECT, Command
from tests.tables import Proven

pytestmark = pytest.mark.slow

# So that small data is spilled: all but the smallest results go to the store, which spills when a thousandth is full.
EAGER = {
    "PIPELINE_OBJECT_STORE_BYTES": str(large_shuffle.STORE_BYTES),
    "RAY_max_direct_call_object_size": "1000",
    "RAY_object_spilling_threshold": "0.001",
    "RAY_min_spilling_size": "0",
}


class Watcher(threading.Thread):
    """Notes the files that Ray has spilled to a directory; each stays until its objects are freed."""

    def __init__(self, place: Path) -> None:
        super().__init__(daemon=True)
        self._place, self._end = place, threading.Event()
        self.seen: set[str] = set()

    def run(self) -> None:
        while not self._end.wait(0.005):
            self.seen.update(os.path.join(at, file) for at, _, files in os.walk(self._place) for file in files)

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join(30)


@pytest.fixture
def spilled(tmp_path: Path) -> Iterator[Path]:
    """A directory to spill to, of which nothing may be left."""
    place = tmp_path / "spilled"
    place.mkdir()
    yield place
    left = [path for path in place.rglob("*") if path.is_file()]
    assert left == [], "spilled files stay on the disk"


SHUFFLE = (sys.executable, "-m", large_shuffle.__name__)


def run_shuffle(**environment: str) -> subprocess.CompletedProcess[str]:
    """The large shuffle in a process of its own: twice as much as the object store holds."""
    whole = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    return subprocess.run(SHUFFLE, env=whole, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_no_room_to_spill_to(disk: Path) -> None:
    done = run_shuffle(RAY_object_spilling_directory=str(disk))
    assert done.returncode == 1, f"it ended well: {done.stdout}"
    [told] = [line for line in done.stdout.splitlines() if line.startswith("DiskFull ")]
    assert "RAY_object_spilling_directory" in told
    assert [path for path in disk.rglob("*") if path.is_file()] == []


@pytest.mark.nightly
@pytest.mark.parametrize("flow", [FEATURES, DELIVERY])
def test_a_flow_whose_objects_are_spilled(
    flow: str, undisturbed: Store, start: Starter, spilled: Path, proven: Proven
) -> None:
    store = copied(undisturbed, spilled.parent / "root")
    with Watcher(spilled) as watcher, Reader(store, flow):
        start(flow, store.config(flow), **EAGER, RAY_object_spilling_directory=str(spilled)).finish()
    assert watcher.seen, "nothing was spilled"
    assert_same_rows(store, flow)
    proven("object store too small", flow, "objects are spilled and come back, same digests, no spilled file stays")


@pytest.mark.nightly
def test_what_doesnt_fit_is_spilled_and_what_a_killed_ray_has_spilled_goes_with_the_next_one(proven: Proven) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # the paths of Ray's sockets have little room
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RAY_TMPDIR": short}
        killed = Command(subprocess.Popen(SHUFFLE, env=environment, stdout=PIPE, stderr=PIPE, text=True))
        killed.kill_when(lambda: any(path.is_file() for path in Path(short).glob("ray/session_*/ray_spilled_*/*")))
        killed.end_family()
        [left] = {path.parent for path in Path(short).glob("ray/session_2*/ray_spilled_*/*")}
        then = time.time() - 2 * OLDER_THAN
        os.utime(left.parent, (then, then))
        with Watcher(Path(short)) as watcher:
            done = run_shuffle(RAY_TMPDIR=short)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == large_shuffle.expected()
        assert not left.exists(), "the killed Ray's objects stay on the disk"
        assert any("ray_spilled" in path and not path.startswith(str(left)) for path in watcher.seen), (
            "nothing is spilled"
        )
        assert not list(Path(short).glob("ray/session_2*/ray_spilled_*/*"))
    proven("killed while objects are spilled", FEATURES, "the next run deletes them")
