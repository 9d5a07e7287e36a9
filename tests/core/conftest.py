"""Roots for tests that hold on a local disk and on S3 alike."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.s3 import ENVIRONMENT, s3_endpoint


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """URL of an S3 endpoint, to which the environment points from here on."""
    with s3_endpoint() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        yield url
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_root(s3_url: str) -> str:
    """A fresh prefix in a fresh bucket."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(endpoint_url=s3_url).mkdir(bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """A fresh root, local and on S3 in turn."""
    if request.param == "local":
        path: Path = request.getfixturevalue("tmp_path")
        return str(path / "root")
    uri: str = request.getfixturevalue("s3_root")
    return uri
