"""Where things are: the one spelling of a URI, and the file systems behind it.

S3 is set up by the environment alone, in the AWS names: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
(or any other source of the AWS default chain), AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or
AWS_DEFAULT_REGION.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from typing import Any

import fsspec
import pyarrow.fs as pafs

from tasks.core.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)


def normalise(uri: str) -> str:
    """Turn a URI into its one spelling: an absolute local path, or 's3://bucket/key' without a slash at the end.

    A relative path depends on the working directory: normalise it once, before other processes are given it.

    Raises:
        ConfigError: unknown scheme, no bucket, or credentials inside the URI (which are not repeated).
    """
    if not uri:
        raise ConfigError("the location is empty: give a path or 's3://bucket/prefix'")
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
    return "s3://" + rest.rstrip("/")


def _redacted(uri: str) -> str:
    """A URI fit for a message: whatever could hold a password or a signature is left out."""
    head, separator, rest = uri.partition("://") if "://" in uri else uri.partition(":")
    return f"{head}{separator}…" if re.search(r"[@:?]", rest) else uri


def is_s3(uri: str) -> bool:
    """Whether a normalised URI is on S3."""
    return uri.startswith("s3://")


def _s3_environment() -> tuple[str | None, str | None]:
    """Endpoint URL and region, as the environment has them now."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return endpoint or None, region or None


def s3_filesystem(uri: str) -> tuple[Any, str]:
    """Give the s3fs file system (cached by fsspec per process, thread and settings) and the path in it."""
    endpoint, region = _s3_environment()
    # A cached listing would hide what other publishers have just reserved or committed.
    settings: dict[str, Any] = {"use_listings_cache": False, "endpoint_url": endpoint}
    if region:
        settings["client_kwargs"] = {"region_name": region}
    return fsspec.filesystem("s3", **settings), uri.removeprefix("s3://")


@functools.lru_cache(maxsize=8)
def _arrow_s3(endpoint: str | None, region: str | None, _access_key: str | None) -> pafs.FileSystem:
    # The library's own time-outs (1 s and 3 s) are too short for a busy network; the key is only part of the cache key.
    settings: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60}
    if endpoint:
        parts = urllib.parse.urlsplit(endpoint)
        settings |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if region:
        settings["region"] = region
    return pafs.S3FileSystem(**settings)


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Native pyarrow file system for a URI, and the path in it."""
    uri = normalise(uri)
    if is_s3(uri):
        return _arrow_s3(*_s3_environment(), os.environ.get("AWS_ACCESS_KEY_ID")), uri.removeprefix("s3://")
    return pafs.LocalFileSystem(), uri
