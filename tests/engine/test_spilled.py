"""Spilled objects of a Ray that was killed go; those of one that lives or is just starting stay."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.engine.spilled import OLDER_THAN, delete_left_over


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
