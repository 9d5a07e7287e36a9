"""An S3 endpoint for tests: moto's server as a process of its own, so that several processes can race for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
FAULTY = "faulty"
OUTAGE = 4


@contextmanager
def s3_endpoint() -> Iterator[str]:
    """Start the server on a free port of 127.0.0.1 and give its URL; it ends with the block, or with this process."""
    environment = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()  # printed once the socket listens
            assert port, f"the S3 server didn't start (exit status {server.poll()})"
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def one_at_a_time(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Serialise requests: moto looks whether a key exists and then writes it, where S3 does both in one step."""
    lock = threading.Lock()

    def locked(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with lock:
            return application(environ, start_response)

    return locked


def out_of_order(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Answer 503 for a while in buckets whose name begins with 'faulty': to OUTAGE reads of the transactions.

    It begins with the first reservation, so that it meets the job that computes, and lasts longer than the client
    tries by itself.
    """
    left: dict[str, int] = {}

    def unreliable(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        if bucket.startswith(FAULTY):
            if environ["REQUEST_METHOD"] == "PUT" and key.endswith("_reservation.json"):
                left.setdefault(bucket, OUTAGE)
            if environ["REQUEST_METHOD"] == "GET" and "/transactions/" in key and left.get(bucket, 0) > 0:
                left[bucket] -= 1
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        return application(environ, start_response)

    return unreliable


def _exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _serve() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = out_of_order(one_at_a_time(DomainDispatcherApplication(create_backend_app)))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
