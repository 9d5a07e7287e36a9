"""Locations: the canonical spelling of a URI, its file system and the faults of that, times set by the environment.

S3 is set up by the environment alone, in the AWS names: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (or
any other source of the AWS default chain), AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION.
PIPELINE_S3_TIMEOUT_SECONDS is how long the store may be silent before a request is sent again (15 s if not set;
connecting takes at most 5). Each library tries a request a few times by itself, so that an unreachable store fails a
call within about a minute and a half; then the whole task is retried.

Transient faults are those of the network and of a busy store, never those of the input. Refused credentials are
reported with cause and cure, whichever library met the refusal: S3 gives its reason only in a response body, and a
response to HEAD has none: pyarrow then says 'HTTP status 400', s3fs 'Bad Request'. So the same request is sent once
more by GET.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import ssl
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import pyarrow.fs as pafs

from tasks.io.errors import ConfigError, CredentialsRefused, PipelineError, causes

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_CONNECT_SECONDS = 5.0


def normalise(uri: str) -> str:
    """Turn a URI into its canonical form: an absolute local path, or 's3://bucket/key' without a slash at the end.

    A relative path depends on the working directory: normalise it once, before passing it to other processes.

    Raises:
        ConfigError: unknown scheme, no bucket, credentials inside the URI (which are not repeated), or text that
            libraries read as a parent directory, another bucket or another version of a key.
    """
    if not uri:
        raise ConfigError("the location is empty: give a path or 's3://bucket/prefix'")
    if "\0" in uri or (uri.lower().startswith("file:") and "%00" in uri):
        raise ConfigError(f"{_redacted(uri)!r} holds a null character, which no path can have: correct the location")
    match = _SCHEME.match(uri)
    if match is None:
        if uri.lower().startswith("s3:"):
            raise ConfigError(f"{_redacted(uri)!r} is no S3 location: write 's3://bucket/prefix', with two slashes")
        return os.path.abspath(os.path.expanduser(uri))
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        if not rest.startswith("/"):
            raise ConfigError(f"{_redacted(uri)!r} names a host, not a path: write 'file:///path', with three slashes")
        return os.path.abspath(urllib.parse.unquote(rest))
    if scheme != "s3":
        raise ConfigError(
            f"can't open {_redacted(uri)!r}: scheme {scheme!r} is not supported; "
            "use a local path, 'file:///path' or 's3://bucket/prefix'"
        )
    bucket = rest.partition("/")[0]
    if ":" in bucket or "@" in bucket:
        raise ConfigError(
            "an S3 location contains what looks like credentials ('s3://…@…'): write 's3://bucket/prefix', "
            "and put credentials into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not bucket:
        raise ConfigError(f"{uri!r} has no bucket: write 's3://bucket/prefix'")
    if fault := odd_key(rest):
        raise ConfigError(f"{_redacted(uri)!r} {fault}: write the location out, or rename the object")
    return "s3://" + rest.rstrip("/")


def odd_key(key: str) -> str | None:
    """Explain why libraries would confuse an object on S3 with another one; None for nearly all names.

    pyarrow opens 's3://one/../two/x' as 'x' in the bucket 'two', and s3fs 'x?versionId=1' as a version of 'x'.
    """
    if {".", ".."} & set(key.split("/")):
        return "has a part '.' or '..', which is a name on S3 and a way up to libraries"
    return "has '?versionId=', which would be read as a version of another object" if "?versionId=" in key else None


def _redacted(uri: str) -> str:
    """Return a URI fit for a message: without anything that could hold a password or a signature."""
    head, separator, rest = uri.partition("://") if "://" in uri else uri.partition(":")
    return f"{head}{separator}…" if re.search(r"[@:?]", rest) else uri


def is_s3(uri: str) -> bool:
    """Return True if a normalised URI is on S3."""
    return uri.startswith("s3://")


def _s3_environment() -> tuple[str | None, str | None]:
    """Return the endpoint URL and region from the current environment."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return endpoint or None, region or None


def s3_filesystem(uri: str) -> tuple[Any, str]:
    """Return the s3fs file system (cached by fsspec per process, thread and settings) and the path in it."""
    import fsspec

    endpoint, region = _s3_environment()
    # A cached listing would hide recent reservations and commits of other publishers.
    silence = _silence_seconds()
    patience = {"connect_timeout": min(_CONNECT_SECONDS, silence), "read_timeout": silence}
    settings: dict[str, Any] = {"use_listings_cache": False, "endpoint_url": endpoint, "config_kwargs": patience}
    if region:
        settings["client_kwargs"] = {"region_name": region}
    filesystem = fsspec.filesystem("s3", **settings)
    # botocore below it sends a request 5 times already (AWS_MAX_ATTEMPTS). s3fs does that 5 times again, and reading a
    # file 5 times that: 125 time-outs, half an hour, until the failure of the store is reported.
    filesystem.retries = 1
    return filesystem, uri.removeprefix("s3://")


def seconds_from_environment(name: str, default: float, most: float, least: float = 0.0) -> float:
    """Return a time that an environment variable may set, seconds.

    Args:
        name: Name of the variable.
        default: Value if the variable is unset or empty.
        most: Upper bound.
        least: Lower bound.

    Raises:
        ConfigError: it isn't a number from `least` to `most`.
    """
    text = os.environ.get(name, "").strip() or f"{default:g}"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not least <= seconds <= most:
        raise ConfigError(f"{name} must be a number of seconds from {least:g} to {most:g}; it is {text!r}")
    return seconds


def _silence_seconds() -> float:
    return seconds_from_environment("PIPELINE_S3_TIMEOUT_SECONDS", 15, most=600, least=0.1)


@functools.lru_cache(maxsize=8)
def _arrow_s3(endpoint: str | None, region: str | None, _access_key: str | None, silence: float) -> pafs.FileSystem:
    # The library's default time-outs (1 s and 3 s) are too short for a busy network; the key is only part of the cache
    # key.
    settings: dict[str, Any] = {"connect_timeout": min(_CONNECT_SECONDS, silence), "request_timeout": silence}
    if endpoint:
        parts = urllib.parse.urlsplit(endpoint)
        settings |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if region:
        settings["region"] = region
    return pafs.S3FileSystem(**settings)


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the native pyarrow file system for a URI, and the path in it."""
    uri = normalise(uri)
    if is_s3(uri):
        return _arrow_s3(*_s3_environment(), os.environ.get("AWS_ACCESS_KEY_ID"), _silence_seconds()), uri.removeprefix(
            "s3://"
        )
    return pafs.LocalFileSystem(), uri


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
