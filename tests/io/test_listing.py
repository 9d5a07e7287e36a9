"""Uploads to S3 that a killed process has begun are found and aborted."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.cli import commands, store_commands
from tasks.io import listing, storage
from tasks.io.listing import abort_upload, unfinished_uploads
from tasks.io.location import s3_filesystem
from tasks.store import layout, versions
from tests.io.test_refusals import ClientError
from tests.store.publishing import DATASET, publish

NOW = dt.datetime.now(dt.UTC)
BEGUN = dt.datetime(2010, 11, 10, 20, 48, 33, tzinfo=dt.UTC)  # moto says so of every upload


def begin(uri: str) -> str:
    """Upload one part of a file, and no more."""
    filesystem, path = s3_filesystem(uri)
    bucket, _, key = path.partition("/")
    number: str = filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
    filesystem.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=number, PartNumber=1, Body=b"1234")
    return number


def test_an_upload_is_found_and_aborted(s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    publish(s3_root, "one")
    part, other = layout.join(s3_root, f"{DATASET}/v2/part-00000-a1.parquet"), f"{s3_root}-other/part.parquet"
    begin(part)
    begin(other)
    assert storage.list_files(layout.join(s3_root, f"{DATASET}/v2"), include_hidden=True) == []
    assert [upload.uri for upload in unfinished_uploads(s3_root, NOW)] == [part]
    assert unfinished_uploads(s3_root, BEGUN) == [], "what was begun since may be alive"

    assert commands.run(["prune", "--root", s3_root]) == 0
    told = "would abort 1 upload to S3 that killed runs have left unfinished; give --yes to do it\n"
    assert told in capsys.readouterr().out
    assert commands.run(["prune", "--root", s3_root, "--json", "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["uploads"] == [part]
    assert unfinished_uploads(s3_root, NOW) == []
    assert [upload.uri for upload in unfinished_uploads(f"{s3_root}-other", NOW)] == [other]
    assert commands.run(["prune", "--root", s3_root]) == 0
    assert capsys.readouterr().out.startswith("nothing to delete")
    versions.verify(s3_root, versions.resolve(s3_root, DATASET, 1))


def test_one_that_has_ended_meanwhile_is_no_error(s3_root: str) -> None:
    uri = f"{s3_root}/part.parquet"
    number = begin(uri)
    for _ in range(2):
        abort_upload(uri, number)


def test_a_local_disk_has_none(tmp_path: Path) -> None:
    assert unfinished_uploads(str(tmp_path), NOW) == []


class Server:
    """Answers in pages of two, or with an error."""

    def __init__(self, keys: list[str], error: OSError | None = None, code: str = "") -> None:
        self.keys, self.error, self.code = keys, error, code
        self.requests = 0

    def call_s3(self, method: str, Bucket: str, Prefix: str, KeyMarker: str = "", UploadIdMarker: str = "") -> Any:  # noqa: N803 - S3's names
        assert (method, Bucket, Prefix) in [("list_multipart_uploads", "bucket", prefix) for prefix in ("root/", "")]
        self.requests += 1
        if self.error is not None:
            raise self.error from ClientError(self.code)
        begin = self.keys.index(KeyMarker) + 1 if KeyMarker else 0
        assert UploadIdMarker == (f"id-{KeyMarker}" if KeyMarker else "")
        page = self.keys[begin : begin + 2]
        more = begin + 2 < len(self.keys)
        marks = {"NextKeyMarker": page[-1], "NextUploadIdMarker": f"id-{page[-1]}"} if more else {}
        entries = [{"Key": key, "UploadId": f"id-{key}", "Initiated": BEGUN} for key in page]
        return {"Uploads": entries, "IsTruncated": more, **marks} if entries else {"IsTruncated": False}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], Server]:
    def take_over(server: Server) -> Server:
        monkeypatch.setattr(listing, "s3_filesystem", lambda uri: (server, uri.removeprefix("s3://")))
        return server

    return take_over


def test_all_pages_are_read(serve: Callable[[Server], Server]) -> None:
    keys = [f"root/{name}" for name in "abcde"]
    server = serve(Server([*keys[:3], "rooted/x", *keys[3:]]))
    assert [upload.uri for upload in unfinished_uploads("s3://bucket/root", NOW)] == [f"s3://bucket/{k}" for k in keys]
    assert server.requests == 3
    serve(Server([]))
    assert unfinished_uploads("s3://bucket", NOW) == []


def test_a_server_that_knows_no_such_list_has_none(serve: Callable[[Server], Server]) -> None:
    serve(Server([], OSError("not implemented"), "NotImplemented"))
    assert unfinished_uploads("s3://bucket/root", NOW) == []


def test_who_may_not_look_prunes_the_rest(
    serve: Callable[[Server], Server],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve(Server([], PermissionError("Access Denied"), "AccessDenied"))
    with pytest.raises(PermissionError, match="Access Denied"):
        unfinished_uploads("s3://bucket/root", NOW)
    monkeypatch.setattr(
        store_commands, "unfinished_uploads", lambda _, before: unfinished_uploads("s3://bucket/root", before)
    )
    publish(str(tmp_path), "one")
    assert commands.run(["prune", "--root", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("nothing to delete")
    assert "can't be listed (s3:ListBucketMultipartUploads): Access Denied" in told.err
