"""Faults of a store: transient ones, and credentials that it refuses.

Transient faults are those of the network and of a busy store, never those of the input. Refused credentials are
reported with cause and cure, whichever library met the refusal: S3 gives its reason only in a response body, and a
response to HEAD has none: pyarrow then says 'HTTP status 400', s3fs 'Bad Request'. So the same request is sent once
more by GET.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import ssl
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from tasks.io.errors import CredentialsRefused, PipelineError, causes
from tasks.io.location import is_s3, normalise, s3_filesystem

_PERMANENT = (
    PipelineError,
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    ssl.SSLCertVerificationError,
)
_TRANSIENT = (ConnectionError, TimeoutError)

# s3fs turns S3's 503 and 409 into EBUSY and 500 into EREMOTEIO. The original error is its __cause__, which pickling
# between processes drops, so the number has to be enough.
_TRANSIENT_ERRNO = frozenset(
    {errno.EBUSY, errno.EREMOTEIO, errno.EAGAIN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)

# By name, so that the check doesn't import botocore and aiohttp if only local files are used.
_TRANSIENT_NAMES = frozenset(
    {
        *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),
        *("HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError"),
        *("ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError", "IncompleteRead"),
        # Ray errors: the node died with its objects, and Ray couldn't recompute them.
        *("ObjectLostError", "StreamingGeneratorReplayInconsistentError"),
    }
)
_PERMANENT_NAMES = frozenset({"SSLError", "ClientSSLError", "ClientConnectorCertificateError"})

_TRANSIENT_CODES = frozenset(
    {
        *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestTimeoutException"),
        *("Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "TooManyRequestsException"),
        *("RequestLimitExceeded", "BandwidthLimitExceeded", "OperationAborted", "ConditionalRequestConflict"),
    }
)

# s3fs gives errors that it doesn't know errno EIO, and names the code only in the text, which survives pickling.
_CODE_IN_TEXT = re.compile(r"An error occurred \((\w+)\) when calling")

# pyarrow reports all details in the text of an OSError: 'AWS Error SLOW_DOWN during …', 'AWS Error UNKNOWN (HTTP status
# 503) during …', 'AWS Error NETWORK_CONNECTION during …: curlCode: 28, Timeout was reached'.
_ARROW_ERROR = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?")
_ARROW_TRANSIENT = frozenset(
    {
        *("SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "NETWORK_CONNECTION", "THROTTLING"),
        "REQUEST_TIMEOUT",
    }
)


def is_transient(error: BaseException) -> bool:
    """Return True if trying again may help.

    The error and then its causes are judged, outermost first; the first verdict decides. So an
    `InputError` raised because of a lost connection stays permanent, and an unknown wrapper takes its cause's verdict.
    """
    for link in causes(error, contexts=True):
        verdict = _verdict(link)
        if verdict is not None:
            return verdict
    return False


def _verdict(error: BaseException) -> bool | None:
    """Return True for a transient error, False for a permanent one, None if this error alone doesn't decide."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, _PERMANENT) or names & _PERMANENT_NAMES:
        return False
    if isinstance(error, _TRANSIENT) or names & _TRANSIENT_NAMES:
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code in _TRANSIENT_CODES or _is_transient_status(status if status is not None else code)
    return _told_by(error) if isinstance(error, OSError) else None


def _told_by(error: OSError) -> bool | None:
    """Return the verdict by an error's number or text, for pyarrow, or s3fs in another process."""
    if match := _ARROW_ERROR.search(str(error)):
        return match[1] in _ARROW_TRANSIENT or _is_transient_status(match[2])
    if error.errno in _TRANSIENT_ERRNO:
        return True
    if match := _CODE_IN_TEXT.search(str(error)):
        return match[1] in _TRANSIENT_CODES or _is_transient_status(match[1])
    return None


def _is_transient_status(status: object) -> bool:
    """Check that an HTTP status means 'later' (time-out, too many requests, server error; not 'not implemented')."""
    text = str(status)
    return text in ("408", "429") or (re.fullmatch(r"5\d\d", text) is not None and text != "501")


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
