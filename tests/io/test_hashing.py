"""Digests by their method, also in old manifests; hashes are pinned, agree across encodings, and spread well."""

from __future__ import annotations

import datetime as dt
import hashlib
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.io.errors import InputError
from tasks.io.hashing import NULL_HASH, Digest, digest, stable_hash
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


@pytest.mark.parametrize("text", ["", SHA256, "md5:" + SHA256, "sha256:" + SHA256[1:], f"blake3:{SHA256} "])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="digest"):
        FileEntry(path="a", rows=1, bytes=2, digest=text)


def one(value: object, kind: pa.DataType, seed: int = 0) -> int:
    return int(stable_hash(pa.array([value], kind), seed)[0])


GOLDEN = [
    (0, pa.int64(), 0, 0x48218226FF3CD4BF),
    (1, pa.int64(), 0, 0xEA8568D2E45FD6CB),
    (1, pa.int64(), 7, 0x3CA4FBD2393808BC),
    (-1, pa.int64(), 0, 0x9E0160293A33AAF7),
    (2**63 - 1, pa.int64(), 0, 0x7BE5E381FB2A2EE5),
    (0.0, pa.float64(), 0, 0x48218226FF3CD4BF),
    (-1.5, pa.float64(), 0, 0x4440429074993C93),
    (True, pa.bool_(), 0, 0xEA8568D2E45FD6CB),
    ("", pa.string(), 0, 0x48218226FF3CD4BF),
    ("a", pa.string(), 0, 0x45A19FC011994A4A),
    ("customer-0000042", pa.string(), 0, 0x8D2907D91E8FD1F2),
    ("customer-0000042", pa.string(), 7, 0xACD410AC6E033D9D),
    ("αβγ € 中文 and more", pa.string(), 0, 0x32680F6806D3AA35),
    (None, pa.int64(), 7, 0x9AE16A3B2F90404F),
    (dt.date(2020, 1, 1), pa.date32(), 0, 0x874770F5343A775A),
]


@pytest.mark.parametrize(("value", "kind", "seed", "expected"), GOLDEN, ids=str)
def test_pinned(value: object, kind: pa.DataType, seed: int, expected: int) -> None:
    """Keys were partitioned by these numbers: they may never change."""
    assert one(value, kind, seed) == expected


ALIKE = [
    (5, [pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]),
    (-5, [pa.int8(), pa.int16(), pa.int32(), pa.int64()]),
    (0.5, [pa.float16(), pa.float32(), pa.float64()]),
    ("naïve café au lait", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]),
    (b"12345678", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(8), pa.string()]),
    (Decimal("1.10"), [pa.decimal128(5, 2), pa.decimal128(20, 2), pa.decimal256(40, 2)]),
]


@pytest.mark.parametrize(("value", "kinds"), ALIKE, ids=lambda v: str(v)[:20])
def test_encoding_makes_no_difference(value: object, kinds: list[pa.DataType]) -> None:
    assert len({one(value, kind) for kind in kinds}) == 1


def test_times_hash_by_their_ticks() -> None:
    moment = dt.datetime(2024, 2, 29, 12, 30, tzinfo=dt.UTC)
    micros = int(moment.timestamp()) * 1_000_000
    assert one(moment, pa.timestamp("us", tz="UTC")) == one(micros, pa.int64())
    assert one(dt.date(1970, 1, 11), pa.date32()) == one(10, pa.int64())
    assert one(dt.timedelta(seconds=3), pa.duration("s")) == one(3, pa.int64())
    assert one(dt.time(0, 0, 7), pa.time32("s")) == one(7, pa.int64())


def test_zeros_and_nans_hash_alike_and_nulls_apart() -> None:
    odd_nan = np.array([0x7FF8000000000001, 0xFFF8000000000000], dtype=np.uint64).view(np.float64)
    hashes = stable_hash(pa.array([0.0, -0.0, *odd_nan, np.nan, None]))
    assert hashes[0] == hashes[1]
    assert len(set(hashes[2:5])) == 1
    assert hashes[5] == NULL_HASH
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, 3]),
        pa.array([True, None, False]),
        pa.array([1.0, None]),
        pa.array(["a", None, "", "b"]),
        pa.array(["a", None, "a"]).dictionary_encode(),
        pa.array([None, None]),
        pa.array([dt.date(2020, 1, 1), None]),
    ],
    ids=lambda column: str(column.type),
)
def test_nulls_have_one_constant_in_every_type(column: pa.Array) -> None:
    null = np.array(column.is_null())
    for seed in (0, 1):
        assert np.array_equal(stable_hash(column, seed) == NULL_HASH, null)


texts = st.lists(st.one_of(st.none(), st.text(max_size=30)), max_size=30)


@given(values=texts, seed=st.integers(0, 3), cut=st.integers(0, 30))
def test_position_and_neighbours_make_no_difference(values: list[str | None], seed: int, cut: int) -> None:
    """A slice, a chunk or a lone value hashes as it does in the whole column."""
    column = pa.array(values, pa.string())
    whole = stable_hash(column, seed)
    cut = min(cut, len(values))
    assert np.array_equal(stable_hash(column.slice(cut), seed), whole[cut:])
    assert np.array_equal(stable_hash(pa.chunked_array([column.slice(0, cut), column.slice(cut)]), seed), whole)
    assert np.array_equal(stable_hash(column.dictionary_encode(), seed), whole)
    assert [one(value, pa.string(), seed) for value in values] == whole.tolist()


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=2), seed=st.integers())
def test_distinct_integers_never_collide(values: list[int], seed: int) -> None:
    assert len(set(stable_hash(pa.array(values, pa.int64()), seed).tolist())) == len(values)


def test_padding_never_makes_strings_alike() -> None:
    strings = [b"\0" * n for n in range(40)] + [b"a" + b"\0" * n for n in range(40)]
    assert len(set(stable_hash(pa.array(strings)).tolist())) == len(strings)


def test_every_bit_of_sequential_keys_is_fair() -> None:
    """Customers 0, 1, 2, … must spread over partitions: each hash bit is set in half of the keys (±6 sigma)."""
    n = 100_000
    for column in (pa.array(np.arange(n)), pa.array([f"customer-{i}" for i in range(n)])):
        hashes = stable_hash(column)
        ones = np.array([np.count_nonzero(hashes >> np.uint64(bit) & np.uint64(1)) for bit in range(64)])
        assert np.all(np.abs(ones - n / 2) < 6 * np.sqrt(n / 4))
        assert len(np.unique(hashes)) == n


def test_another_process_agrees() -> None:
    code = (
        "import pyarrow as pa; from tasks.io.hashing import stable_hash;"
        "print(stable_hash(pa.array(['a', 'bc', None, 'customer-0000042'])).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(stable_hash(pa.array(["a", "bc", None, "customer-0000042"])).tolist())


def test_empty_columns_have_no_hashes() -> None:
    for kind in (pa.int64(), pa.string(), pa.float64(), pa.null(), pa.dictionary(pa.int32(), pa.string())):
        assert stable_hash(pa.array([], kind)).shape == (0,)
        assert stable_hash(pa.chunked_array([], kind)).dtype == np.uint64


def test_nested_types_are_refused() -> None:
    with pytest.raises(InputError, match=r"can't hash a column of type list.*: hash its fields"):
        stable_hash(pa.array([[1]]))
