"""Objects on disk that a killed Ray had spilled.

Ray deletes them when it ends in order. After a kill -9 of the process that started it they remain, sometimes gigabytes,
in a directory that no later Ray reads.
"""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

OLDER_THAN = 120.0
"""Seconds. A Ray that is starting has no socket yet."""


def delete_left_over(sessions: Path) -> int:
    """Delete the spilled objects of Rays that are dead.

    Args:
        sessions: The directory of all Ray sessions of this machine.

    Returns:
        Number of deleted directories.

    """
    deleted = 0
    for place in sessions.glob("session_*/ray_spilled_objects_*"):
        session = place.parent
        if session.is_symlink() or _is_young(session) or _answers(session):
            continue
        shutil.rmtree(place, ignore_errors=True)  # another process may be deleting it, or it belongs to another user
        deleted += not place.exists()
    return deleted


def _is_young(session: Path) -> bool:
    try:
        return time.time() - session.stat().st_mtime < OLDER_THAN
    except FileNotFoundError:
        return True


def _answers(session: Path) -> bool:
    """Return True if a node of the session answers, or if that is unknown."""
    for path in (session / "sockets").glob("raylet*"):
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                continue
            except OSError:
                return True
            return True
    return False
