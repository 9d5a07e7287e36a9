"""Locations: the canonical spelling of a URI, and the file systems behind it.

S3 is set up by the environment alone, in the AWS names: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (or
any other source of the AWS default chain), AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION.
PIPELINE_S3_TIMEOUT_SECONDS is how long the store may be silent before a request is sent again (15 s if not set;
connecting takes at most 5). Each library tries a request a few times by itself, so that an unreachable store fails a
call within about a minute and a half; then the whole task is retried.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from typing import Any

import fsspec
import pyarrow.fs as pafs

from tasks.io.errors import ConfigError

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


def _silence_seconds() -> float:
    text = os.environ.get("PIPELINE_S3_TIMEOUT_SECONDS", "").strip() or "15"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.1 <= seconds <= 600:
        raise ConfigError(f"PIPELINE_S3_TIMEOUT_SECONDS must be a number of seconds from 0.1 to 600; it is {text!r}")
    return seconds


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
