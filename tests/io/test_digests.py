"""Digests by their method, and manifests from before there was a choice."""

from __future__ import annotations

import hashlib

import pytest
from blake3 import blake3
from pydantic import ValidationError

from tasks.io.digests import Digest, digest
from tasks.io.errors import InputError
from tasks.store.manifest import FileEntry

DATA = b"some bytes" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()


def test_a_digest_says_its_method() -> None:
    assert digest(DATA) == f"blake3:{blake3(DATA).hexdigest()}"
    assert digest(DATA, like=f"sha256:{'0' * 64}") == f"sha256:{SHA256}"


@pytest.mark.parametrize("like", ["blake3:", "sha256:"])
def test_pieces_make_no_difference(like: str) -> None:
    made = Digest(like)
    for start in range(0, len(DATA), 777):
        made.update(memoryview(DATA)[start : start + 777])
    assert str(made) == digest(DATA, like)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match=r"'md5:00' is no digest .*blake3, sha256"):
        digest(DATA, like="md5:00")


def test_earlier_manifests_are_read() -> None:
    entry = FileEntry.model_validate({"path": "a", "rows": 1, "bytes": 2, "sha256": SHA256})
    assert entry == FileEntry(path="a", rows=1, bytes=2, digest=f"sha256:{SHA256}")
    assert FileEntry.model_validate(entry.model_dump()) == entry


@pytest.mark.parametrize("text", ["", SHA256, "md5:" + SHA256, "sha256:" + SHA256[1:], f"blake3:{SHA256} "])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="digest"):
        FileEntry(path="a", rows=1, bytes=2, digest=text)
