"""Spilled objects of a Ray that was killed are deleted, those of others stay; and messages for lost workers."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from tasks import runner
from tasks.engine.cluster import OLDER_THAN, delete_left_over, losses_explained, worker_env
from tasks.io.errors import DiskFull, PipelineError, SourceError, WorkersKilled
from tasks.runner import final_unless_transient, worth_retrying


@pytest.fixture
def sessions() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path may have a hundred bytes
        yield Path(short)


def session(sessions: Path, name: str, age: float = OLDER_THAN + 60) -> Path:
    """A session with a spilled object and the socket of a dead node; gives the object's path."""
    place = sessions / f"session_{name}" / "ray_spilled_objects_ab12"
    place.mkdir(parents=True)
    spilled = place / "object"
    spilled.write_bytes(b"spilled")
    (place.parent / "sockets").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.parent / "sockets" / "raylet"))  # closed, its file stays: as after a kill
    then = time.time() - age
    os.utime(place.parent, (then, then))
    return spilled


def test_those_of_a_dead_ray_go(sessions: Path) -> None:
    spilled = session(sessions, "dead")
    (sessions / "session_latest").symlink_to(spilled.parents[1])
    assert delete_left_over(sessions) == 1
    assert not spilled.parent.exists()
    assert spilled.parents[1].exists(), "its logs stay"
    assert delete_left_over(sessions) == 0


def test_those_of_a_ray_that_lives_stay(sessions: Path) -> None:
    spilled = session(sessions, "lives")
    with socket.socket(socket.AF_UNIX) as second:  # of its two nodes one is dead
        second.bind(str(spilled.parents[1] / "sockets" / "raylet.1"))
        second.listen()
        then = time.time() - 2 * OLDER_THAN
        os.utime(spilled.parents[1], (then, then))
        assert delete_left_over(sessions) == 0
        assert spilled.exists()
    assert delete_left_over(sessions) == 1


def test_those_of_a_ray_that_is_starting_stay(sessions: Path) -> None:
    spilled = session(sessions, "young", age=0)
    assert delete_left_over(sessions) == 0
    assert spilled.exists()


def test_a_machine_without_ray(sessions: Path) -> None:
    assert delete_left_over(sessions / "nowhere") == 0


# As Ray 2.60's memory monitor writes it.
KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 92ed) was "
    "22.69GB / 23.54GB (0.963890)\n  OOM kill reason: the threshold was exceeded"
)


def carried(cause: BaseException) -> RayTaskError:
    return RayTaskError("kernel", "traceback", cause, proctitle="ray::kernel", pid=1, ip="127.0.0.1")


def explained(error: BaseException) -> PipelineError:
    with pytest.raises(PipelineError) as told, losses_explained("lower --rows-per-bucket (it is 9)"):
        raise error
    assert told.value.__cause__ is error
    assert not worth_retrying(told.value), "it was tried again by Ray"
    return told.value


@pytest.mark.parametrize("error", [OutOfMemoryError(KILLED), carried(OutOfMemoryError(KILLED))], ids=repr)
def test_memory(error: BaseException) -> None:
    told = explained(error)
    assert isinstance(told, WorkersKilled)
    assert "at each of its 4 tries, as its node had too little memory left (22.69GB / 23.54GB in use)" in str(told)
    assert "lower --rows-per-bucket (it is 9), or give each node more memory, or fewer CPUs" in str(told)


@pytest.mark.parametrize("error", [WorkerCrashedError(), ActorDiedError(), ActorUnavailableError("gone", b"x" * 16)])
def test_a_worker_that_dies_without_a_word(error: BaseException) -> None:
    told = explained(error)
    assert isinstance(told, WorkersKilled)
    for words in ("died at each of its 4 tries", "want of memory", "lower --rows-per-bucket", "python-core-worker-*"):
        assert words in str(told)


@pytest.mark.parametrize("error", [OutOfDiskError(), carried(OutOfDiskError())], ids=repr)
def test_nowhere_to_spill_to(error: BaseException) -> None:
    told = explained(error)
    assert isinstance(told, DiskFull)
    assert "RAY_object_spilling_directory" in str(told)


@pytest.mark.parametrize("error", [NodeDiedError("gone"), carried(ValueError("a bug")), SourceError("bad"), OSError(5)])
def test_everything_else_passes_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as told, losses_explained("lower it"):
        raise error
    assert told.value is error


def test_workers_that_are_killed_for_memory_are_replaced_some_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_task_oom_retries", raising=False)
    assert worker_env()["RAY_task_oom_retries"] == "3"  # Ray's own default is to go on for ever
    monkeypatch.setenv("RAY_task_oom_retries", "7")
    assert worker_env()["RAY_task_oom_retries"] == "7"


def test_a_whole_task_that_was_killed_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "worth_retrying", lambda _: True)  # else it asks the API for the flow run
    with pytest.raises(WorkersKilled) as told, final_unless_transient("lower --file-megabytes (it is 128)"):
        raise OutOfMemoryError(KILLED)
    assert str(told.value).startswith("out of memory: Ray killed the worker of a task, as its node had too little")
    assert "To go on: lower --file-megabytes (it is 128), or give each node more memory" in str(told.value)
    for other in (SourceError("bad"), ConnectionResetError("the store hung up")):
        with pytest.raises(type(other)) as told, final_unless_transient("lower --file-megabytes (it is 128)"):
            raise other
        assert told.value is other
