"""Credentials that the store refuses, reported with cause and cure, whichever library met the refusal.

S3 gives its reason only in a response body, and a response to HEAD has none: pyarrow then says 'HTTP status 400', s3fs
'Bad Request'. So the same request is sent once more by GET.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from tasks.io.errors import CredentialsRefused, causes
from tasks.io.location import is_s3, normalise, s3_filesystem

P = ParamSpec("P")
R = TypeVar("R")

_CAUSES = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), "have expired"),
    **dict.fromkeys(("InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId"), "are unknown to the store"),
    "SignatureDoesNotMatch": "don't fit together: the secret isn't that of the key",
    "NoCredentialsError": "are missing",
    "PartialCredentialsError": "are incomplete",
}
_CURE = (
    "renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile or role that gives them, "
    "where the flow runs and on Ray's nodes, and run again"
)
_NAMED = re.compile(rf"\b({'|'.join(_CAUSES)})\b")
_BY_STATUS = re.compile(r"HTTP status 40[03]|AWS Error ACCESS_DENIED")


def refused_credentials(error: BaseException) -> str | None:
    """Return the store's reason to refuse the credentials, as an error or one of its causes names it; else None."""
    for link in causes(error):
        response = getattr(link, "response", None)
        code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else type(link).__name__
        if code in _CAUSES:
            return _CAUSES[code]
        # pyarrow, and s3fs errors raised in another process, name it in their text alone.
        if isinstance(link, OSError) and (named := _NAMED.search(str(link))):
            return _CAUSES[named[1]]
    return None


def refusal(place: str, cause: str) -> CredentialsRefused:
    """Return the error of credentials that are refused at a place."""
    return CredentialsRefused(f"can't use {place}: the credentials {cause}; {_CURE}")


@contextlib.contextmanager
def refusals_explained(uri: str) -> Iterator[None]:
    """Explain refused credentials of requests for a URI in this block.

    Raises:
        CredentialsRefused: the store doesn't accept the credentials, or there are none.
    """
    try:
        yield
    except Exception as error:
        cause = refused_credentials(error) or (_asked_again(uri) if _is_unexplained(error) else None)
        if cause is None:
            raise
        raise refusal(repr(normalise(uri)), cause) from error


def explains_refusals(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument is the URI with `refusals_explained`."""

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        with refusals_explained(str(args[0] if args else kwargs["uri"])):
            return function(*args, **kwargs)

    return explained


def s3_error_code(error: BaseException) -> str:
    """Return the S3 error code behind an error of s3fs; '' if there is none."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _is_unexplained(error: BaseException) -> bool:
    return isinstance(error, OSError) and (
        s3_error_code(error) in ("400", "403") or _BY_STATUS.search(str(error)) is not None
    )


def _asked_again(uri: str) -> str | None:
    uri = normalise(uri)
    if not is_s3(uri):
        return None
    filesystem, path = s3_filesystem(uri)
    bucket, _, key = path.partition("/")
    try:
        if key:
            filesystem.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        else:
            filesystem.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except Exception as error:  # noqa: BLE001 - whatever the answer, the first error is reported
        return refused_credentials(error)
    return None
