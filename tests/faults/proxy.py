"""A proxy before the S3 endpoint that breaks chosen requests, so that clients meet the faults of a real network.

A test injects a fault for a while, and fails if no request met it:

    with broken_s3(url) as proxy, proxy.inject(answers(503, "SlowDown"), "PUT", "_manifest", times=3) as rule:
        ...  # the environment's AWS_ENDPOINT_URL is proxy.url
    assert rule.met == 3
"""

from __future__ import annotations

import http.client
import os
import re
import select
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_OF_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}
_RST_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass
class Answer:
    """What the store said."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Rule:
    """Which requests meet a fault: a method, a pattern of '/bucket/key?query', some of them or all."""

    fault: Fault
    method: re.Pattern[str]
    key: re.Pattern[str]
    skip: int
    times: int | None
    since: re.Pattern[str] | None
    met: int = 0
    lifted: threading.Event = field(default_factory=threading.Event)

    def applies(self, method: str, key: str) -> bool:
        """Whether this request meets the fault; counts it."""
        if self.since is not None:
            if not self.since.search(f"{method} {key}"):
                return False
            self.since = None
        if not self.method.fullmatch(method) or not self.key.search(key):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None and self.met >= self.times:
            return False
        self.met += 1
        return True


class Exchange(BaseHTTPRequestHandler):
    """One request and what becomes of it."""

    protocol_version = "HTTP/1.1"
    server: _Server
    body: bytes | None

    def serve(self) -> None:
        self.body = None
        key = urllib.parse.unquote(self.path)
        rule = self.server.proxy.rule_of(self.command, key)
        if rule is None:
            self.send(self.forward())
        else:
            rule.fault(self, rule)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815 - named by the base class

    def read(self, length: int | None = None) -> bytes:
        """The request's body, or its first bytes."""
        if self.body is not None:
            return self.body
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            self.body = b"".join(pieces)
            return self.body
        whole = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(whole if length is None else min(length, whole))
        if length is None:
            self.body = data
        return data

    def forward(self) -> Answer:
        """Let the store do it."""
        body = self.read()
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_HOP}
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection(self.server.proxy.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _OF_ONE_HOP]
            return Answer(response.status, kept, response.read())
        finally:
            connection.close()

    def send(self, answer: Answer, pieces: int = 1, pause: threading.Event | None = None, seconds: float = 0) -> None:
        """Give an answer to the client, in pieces with pauses between them."""
        self.send_head(answer)
        if self.command == "HEAD":
            return
        step = max(1, -(-len(answer.body) // pieces))
        for start in range(0, len(answer.body), step):
            if pause is not None:
                pause.wait(seconds)
            self.wfile.write(answer.body[start : start + step])

    def send_head(self, answer: Answer) -> None:
        """Give the client the status and headers alone."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        length = len(answer.body)
        if self.command == "HEAD":
            length = int({name.lower(): value for name, value in answer.headers}.get("content-length", 0))
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reset(self) -> None:
        """Cut the connection as a dying host does, without a goodbye."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        os.close(self.connection.detach())  # close() would wait for the files made of the socket

    def hang(self, lifted: threading.Event) -> None:
        """Say nothing until the client gives up or the rule is lifted."""
        while not lifted.wait(0.02):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                break
        self.reset()

    def log_message(self, *_: object) -> None:
        """Say nothing: a test that fails shows what it asserts."""


Fault = Callable[[Exchange, Rule], None]


def answers(status: int, code: str, message: str = "injected") -> Fault:
    """The store refuses: nothing is done, and the body names an S3 error code (which an answer to HEAD hasn't)."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    def fault(exchange: Exchange, rule: Rule) -> None:
        exchange.read()
        told = b"" if exchange.command == "HEAD" else body
        exchange.send(Answer(status, [("Content-Type", "application/xml")], told))

    return fault


def slow(seconds: float) -> Fault:
    """The store does it, and answers after a while."""

    def fault(exchange: Exchange, rule: Rule) -> None:
        answer = exchange.forward()
        rule.lifted.wait(seconds)
        exchange.send(answer)

    return fault


def trickle(pieces: int, seconds: float) -> Fault:
    """The answer's body comes in pieces, with a pause before each."""

    def fault(exchange: Exchange, rule: Rule) -> None:
        exchange.send(exchange.forward(), pieces, rule.lifted, seconds)

    return fault


def silent(exchange: Exchange, rule: Rule) -> None:
    """The request is taken and never answered; nothing is done."""
    exchange.read()
    exchange.hang(rule.lifted)


def reset(exchange: Exchange, rule: Rule) -> None:
    """The connection is cut once the request is there; nothing is done."""
    exchange.read()
    exchange.reset()


def reset_in_request(exchange: Exchange, rule: Rule) -> None:
    """The connection is cut in the middle of the request's body; nothing is done."""
    exchange.read(int(exchange.headers.get("Content-Length", 0)) // 2)
    exchange.reset()


def reset_in_answer(exchange: Exchange, rule: Rule) -> None:
    """The store does it, and the connection is cut in the middle of its answer."""
    answer = exchange.forward()
    exchange.send_head(answer)
    exchange.wfile.write(answer.body[: len(answer.body) // 2])
    exchange.reset()


def lost(then: Fault) -> Fault:
    """The store does it, but the client is not told: it meets another fault instead of the answer."""

    def fault(exchange: Exchange, rule: Rule) -> None:
        answer = exchange.forward()
        assert answer.status < 300, f"the store itself refused what should have been lost: {answer}"
        then(exchange, rule)

    return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.proxy = proxy

    def handle_error(self, *_: object) -> None:
        """A client that hung up is no news here."""


class Proxy:
    """Stands before an S3 endpoint; see the module."""

    def __init__(self, target: str) -> None:
        self.target = urllib.parse.urlsplit(target).netloc
        self.seen: list[tuple[str, str]] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def rule_of(self, method: str, key: str) -> Rule | None:
        """The first rule that a request meets."""
        with self._lock:
            self.seen.append((method, key))
            return next((rule for rule in self._rules if rule.applies(method, key)), None)

    @contextmanager
    def inject(
        self,
        fault: Fault,
        method: str = ".*",
        key: str = "",
        *,
        skip: int = 0,
        times: int | None = 1,
        since: str | None = None,
    ) -> Iterator[Rule]:
        """Break requests while the block runs.

        Args:
            fault: What happens to them.
            method: Pattern of their method.
            key: Pattern that is searched for in '/bucket/key?query'.
            skip: How many of them pass before.
            times: How many of them are broken; None breaks all until the block ends.
            since: Pattern of 'METHOD /bucket/key?query': requests before the first such one pass.

        Raises:
            AssertionError: none has met it, so that the block has shown nothing.

        """
        rule = Rule(fault, re.compile(method), re.compile(key), skip, times, re.compile(since) if since else None)
        with self._lock:
            self._rules.append(rule)
        try:
            yield rule
        finally:
            with self._lock:
                self._rules.remove(rule)
            rule.lifted.set()
        assert rule.met, f"no request met the fault: {method} {key!r}; there were {self.seen[-20:]}"

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def broken_s3(target: str) -> Iterator[Proxy]:
    """Start a proxy before an endpoint on a free port of 127.0.0.1."""
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy.run, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join(10)
