"""Tasks that are collected together end together."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
import ray

from tasks.core.errors import SourceError
from tasks.core.exchange import collect


def linger(mark: Path) -> None:
    """Say who this is, and go on for long."""
    partial = mark.with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.rename(mark)
    time.sleep(600)


def fail_beside(mark: Path) -> None:
    """Fail once the other task is under way."""
    while not mark.exists():
        time.sleep(0.01)
    raise SourceError("row 7 has no price")


@pytest.mark.usefixtures("ray_cluster")
def test_what_still_runs_when_another_fails_ends_with_its_process(tmp_path: Path) -> None:
    """A worker that is only interrupted, in the middle of an import for example, would spoil its next task."""
    mark = tmp_path / "pid"
    tasks = [ray.remote(num_cpus=0)(task).remote(mark) for task in (linger, fail_beside)]
    with pytest.raises(SourceError, match="row 7"):
        collect(tasks, lambda _: None)
    try:
        worker = psutil.Process(int(mark.read_text()))
    except psutil.NoSuchProcess:
        return
    worker.wait(30)
