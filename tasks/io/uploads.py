"""Unfinished uploads to S3: invisible in every listing of objects, and charged for until they are aborted."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.io.location import is_s3, normalise, s3_filesystem
from tasks.io.refusal import explains_refusals, s3_error_code

_UNKNOWN_TO_THE_SERVER = ("NotImplemented", "MethodNotAllowed")


@dataclass(frozen=True, slots=True)
class Upload:
    """Multipart upload that was begun, and neither completed nor aborted."""

    uri: str
    upload_id: str


@explains_refusals
def unfinished_uploads(uri: str, before: dt.datetime) -> list[Upload]:
    """Find the uploads below a URI that were begun before a time, sorted by URI; [] on a local disk.

    Raises:
        PermissionError: the credentials may not list uploads (`s3:ListBucketMultipartUploads`).
        CredentialsRefused: the store doesn't accept the credentials.

    """
    uri = normalise(uri)
    if not is_s3(uri):
        return []
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    found = [
        Upload(f"s3://{bucket}/{entry['Key']}", entry["UploadId"])
        for entry in _entries(uri, bucket, f"{prefix}/" if prefix else "")
        if entry["Initiated"] < before
    ]
    return sorted(found, key=lambda upload: (upload.uri, upload.upload_id))


@explains_refusals
def abort_upload(uri: str, upload_id: str) -> None:
    """Abort an upload and so delete its parts; one that has ended already is no error."""
    filesystem, path = s3_filesystem(uri)
    bucket, _, key = path.partition("/")
    try:
        filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
    except FileNotFoundError:
        return


def _entries(uri: str, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    filesystem, _ = s3_filesystem(uri)
    marks: dict[str, str] = {}
    while True:
        try:
            page = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marks)
        except OSError as error:
            if s3_error_code(error) not in _UNKNOWN_TO_THE_SERVER:
                raise
            return
        # Not every server respects the prefix.
        yield from (entry for entry in page.get("Uploads", []) if entry["Key"].startswith(prefix))
        if not page.get("IsTruncated"):
            return
        marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
