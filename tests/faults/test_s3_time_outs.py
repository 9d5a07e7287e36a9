"""A store that takes requests and never answers is given up within about a minute and a half, whichever client asks."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from tasks.io import storage
from tasks.io.location import is_transient
from tasks.io.storage import ParquetStream
from tests.faults.proxy import broken_s3, reset_in_answer, silent
from tests.tables import Proven

pytestmark = pytest.mark.slow

DEFAULT_SECONDS = 15  # that the store may be silent, if nobody says otherwise
LONGEST_PAUSES = 1 + 2 + 4 + 8  # between botocore's five tries
PATIENCE = 90


def stream(uri: str) -> None:
    table = pa.table({"id": [1]})
    with ParquetStream(uri, table.schema) as parquet:
        parquet.write(table)


REQUESTS: dict[str, Callable[[str], object]] = {
    "exists": storage.exists,
    "open_input": storage.open_input,
    "read_bytes": storage.read_bytes,
    "write_bytes": lambda uri: storage.write_bytes(uri, b"x"),
    "put_if_absent": lambda uri: storage.put_if_absent(uri, b"x"),
    "list_files": storage.list_files,
    "delete": storage.delete,
    "stream": stream,
}


def test_a_dead_store_is_given_up(s3_url: str, s3_root: str, monkeypatch: pytest.MonkeyPatch, proven: Proven) -> None:
    monkeypatch.setenv("PIPELINE_S3_TIMEOUT_SECONDS", "1")

    def failure(name: str) -> BaseException | None:
        try:
            REQUESTS[name](f"{s3_root}/{name}")
        except Exception as error:  # noqa: BLE001 - judged below
            return error
        return None

    with broken_s3(s3_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with proxy.inject(silent, times=None), ThreadPoolExecutor(len(REQUESTS)) as pool:
            failures = dict(zip(REQUESTS, pool.map(failure, REQUESTS), strict=True))
        for name, error in failures.items():
            assert error is not None, f"{name} has ended well without an answer"
            assert is_transient(error), f"{name} isn't worth another try: {error!r}"
            tries = sum(re.search(rf"/{name}\b|%2F{name}\b", key) is not None for _, key in proxy.seen)
            assert 1 < tries * DEFAULT_SECONDS <= PATIENCE - LONGEST_PAUSES, f"{name} was tried {tries} times"
    proven("S3 never answers again", "publishing", "given up after 1½ minutes at most, and tried again as a whole")


@pytest.mark.parametrize("read", [storage.read_bytes, lambda uri: storage.read_many([uri])[uri]], ids=["one", "many"])
def test_what_breaks_off_in_mid_body_is_read_again(
    s3_url: str, s3_root: str, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], bytes]
) -> None:
    uri, data = f"{s3_root}/x", b"0123456789" * 1000
    storage.write_bytes(uri, data)
    with broken_s3(s3_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with proxy.inject(reset_in_answer, "GET", "/x$", times=3) as rule:
            assert read(uri) == data
        assert rule.met == 3
        with (
            proxy.inject(reset_in_answer, "GET", "/x$", times=None),
            pytest.raises(Exception, match="payload") as caught,
        ):
            read(uri)
    assert is_transient(caught.value)
