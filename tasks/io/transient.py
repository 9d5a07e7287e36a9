"""Transient faults: those of the network and of a busy store, never those of the input."""

from __future__ import annotations

import errno
import re
import ssl

from tasks.io.errors import PipelineError, causes

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
