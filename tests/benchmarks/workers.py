"""Processes for the sides of a benchmark, each started once, with its imports, before anything is timed."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[[Any], Any]
"""Does the work that a message asks for, and gives an answer; both are pickled."""
Maker = Callable[[], Work]
"""Loads what the work needs; called in the process that works, which imports its module to find it."""


class CannotRun(Exception):
    """A library is missing, or doesn't work on this machine."""


class Workers:
    """Processes that work at the same time, started once and kept; a context manager.

    Args:
        makers: Makes the work, one a process.

    Raises:
        CannotRun: the work can't be made.
    """

    def __init__(self, makers: Sequence[Maker]) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self._connections: list[Connection] = []
        for make in makers:
            ours, theirs = context.Pipe()
            # Not a daemon: those may not have workers of their own, as a DataLoader has.
            process = context.Process(target=_serve, args=(theirs, make))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        try:
            for connection in self._connections:
                _answer(connection)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Any) -> list[Any]:
        """What each process answers.

        Raises:
            CannotRun: the work failed.
        """
        for connection in self._connections:
            connection.send(message)
        return [_answer(connection) for connection in self._connections]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
                process.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _answer(connection: Connection) -> Any:
    try:
        fault, answer = connection.recv()
    except EOFError:
        raise CannotRun("its process has died") from None
    if fault:
        raise CannotRun(fault)
    return answer


def _serve(connection: Connection, make: Maker) -> None:
    try:
        work = make()
        connection.send((None, None))
        while True:
            try:
                message = connection.recv()
            except EOFError:  # the other side has closed
                return
            connection.send((None, work(message)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the one who asked is to know
        missing = isinstance(error, ModuleNotFoundError)
        with contextlib.suppress(BrokenPipeError):  # unless another process has failed already
            connection.send((f"{error.name} isn't installed" if missing else traceback.format_exc(), None))
