"""Credentials that the store refuses: told by their cause, whichever library met it."""

from __future__ import annotations

import pytest

from tasks.io.errors import CredentialsRefused, SourceError
from tasks.io.location import refusals_explained, refused_credentials


class ClientError(Exception):
    """The shape of botocore's error."""

    def __init__(self, code: str) -> None:
        super().__init__(f"An error occurred ({code}) when calling the GetObject operation: …")
        self.response = {"Error": {"Code": code}}


class NoCredentialsError(Exception):
    """Bears a name of botocore's."""


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (caused(PermissionError("The provided token has expired."), ClientError("ExpiredToken")), "have expired"),
        (caused(PermissionError("…"), ClientError("InvalidAccessKeyId")), "are unknown to the store"),
        (caused(PermissionError("…"), ClientError("SignatureDoesNotMatch")), "don't fit together"),
        (NoCredentialsError("Unable to locate credentials"), "are missing"),
        # pyarrow, and s3fs once an error was pickled
        (OSError("AWS Error UNKNOWN (HTTP status 400) during GetObject …: … ExceptionName: ExpiredToken"), "have"),
        (OSError(5, "An error occurred (InvalidToken) when calling the PutObject operation: …"), "are unknown"),
        (caused(PermissionError("Access Denied"), ClientError("AccessDenied")), None),  # a policy, not the credentials
        (caused(OSError(16, "…"), ClientError("SlowDown")), None),
        (ValueError("ExpiredToken"), None),  # somebody's text
        (OSError("can't read ExpiredTokens.csv"), None),
    ],
    ids=repr,
)
def test_what_the_store_has_against_credentials(error: BaseException, cause: str | None) -> None:
    found = refused_credentials(error)
    assert found == cause or (found and cause and found.startswith(cause))


def test_the_cause_and_the_cure_are_told() -> None:
    told = r"^can't use 's3://bucket/x': the credentials have expired; renew AWS_ACCESS_KEY_ID, .* and run again$"
    with pytest.raises(CredentialsRefused, match=told), refusals_explained("s3://bucket/x"):
        raise caused(PermissionError("…"), ClientError("ExpiredToken"))


def test_other_errors_pass_as_they_are() -> None:
    error = SourceError("no such column")
    with pytest.raises(SourceError) as caught, refusals_explained("s3://bucket/x"):
        raise error
    assert caught.value is error


def test_a_local_disk_has_no_credentials() -> None:
    with pytest.raises(OSError, match="HTTP status 403"), refusals_explained("/data/x"):
        raise OSError("HTTP status 403")
