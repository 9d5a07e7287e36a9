"""A plain TCP forwarder as a process of its own, in place of an endpoint that loses its memory when it is killed.

`python -m tests.faults.forwarder PORT HOST:PORT`; it says 'ready' once it listens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

from tests.processes import PROJECT


class Forwarder:
    """An address before an endpoint, which can be killed, hang, and come back at the same port."""

    def __init__(self, target: str) -> None:
        self.target = target
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, also after a kill."""
        command = [sys.executable, "-m", "tests.faults.forwarder", str(self.port), self.target]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready", "the forwarder didn't start"

    def kill(self) -> None:
        """Kill -9: what is under way is cut off, and new connections are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def hang(self) -> None:
        """Say nothing any more: connections are made, but nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End of `hang`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def forwarder(target: str) -> Iterator[Forwarder]:
    """A forwarder to a URL such as http://127.0.0.1:5000, for the time of the block."""
    started = Forwarder(target.removeprefix("http://"))
    try:
        yield started
    finally:
        started.kill()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _serve(port: int, host: str, target: int) -> None:
    listener = socket.create_server(("127.0.0.1", port), backlog=128)
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        endpoint = socket.create_connection((host, target))
        for ends in ((client, endpoint), (endpoint, client)):
            threading.Thread(target=_pump, args=ends, daemon=True).start()


if __name__ == "__main__":
    name, _, number = sys.argv[2].partition(":")
    _serve(int(sys.argv[1]), name, int(number))
