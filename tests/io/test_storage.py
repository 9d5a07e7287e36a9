"""Storage: the same behaviour on a local disk and on S3, and no half-written file anywhere."""

from __future__ import annotations

import os
import pickle
import stat
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import (
    GetTimeoutError,
    ObjectReconstructionFailedError,
    RayTaskError,
    StreamingGeneratorReplayInconsistentError,
)

from tasks.io import storage
from tasks.io.errors import ConfigError, GateFailed, PipelineError, SourceError
from tasks.io.location import is_transient
from tasks.io.storage import ParquetStream
from tasks.store import layout
from tasks.store.layout import join

TABLE = pa.table({"id": [1, 2, 3], "name": ["a", "b", None]})


def names(infos: list[storage.FileInfo], base: str) -> list[str]:
    return [info.uri.removeprefix(storage.normalise(base) + "/") for info in infos]


# Locations


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b/", "/a/b"),
        ("/a/../b", "/b"),
        ("file:///a/b", "/a/b"),
        ("file:///a%20b", "/a b"),  # a file URI is percent-encoded, a path isn't
        ("/a%20b", "/a%20b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://bucket/Key", "s3://bucket/Key"),  # schemes have no case, keys have
        ("s3://bucket/a b%20c", "s3://bucket/a b%20c"),
    ],
)
def test_normalise_gives_the_one_spelling(uri: str, expected: str) -> None:
    assert storage.normalise(uri) == expected


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.normalise("data/x") == f"{tmp_path}/data/x"


@given(st.text(string.ascii_letters + string.digits + "/._-*%~ é", min_size=1))
def test_normalise_twice_is_normalise(path: str) -> None:
    for uri in (path, f"s3://bucket/{path}", f"file:///{path}"):
        if (uri.startswith("s3:") and {".", ".."} & set(path.split("/"))) or "%00" in uri:
            continue  # refused
        once = storage.normalise(uri)
        if not uri.startswith("file"):  # what was percent-encoded in a file URI may decode to anything
            assert storage.normalise(once) == once


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", r"'gs://bucket/x'.*scheme 'gs'.*'s3://bucket/prefix'"),
        ("s3:///x", r"'s3:///x' has no bucket"),
        ("s3:/bucket/x", r"'s3:/bucket/x' is no S3 location.*two slashes"),
        ("file://host/x", r"names a host"),
        ("s3://bucket/../other/x", r"'s3://bucket/../other/x' has a part '.' or '..'.*write the location out"),
        ("S3://bucket/a/./x", r"has a part '.' or '..'"),
        ("s3://bucket/x?versionId=1", r"'s3://…' has '\?versionId=', .*rename the object"),
        ("/a\0b", r"holds a null character"),
        ("file:///a%00b", r"holds a null character"),
        ("", r"empty"),
    ],
)
def test_an_unusable_location_is_refused_with_its_cure(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        storage.normalise(uri)


@given(st.text(string.ascii_letters + string.digits + "+/=", min_size=8))
def test_secrets_in_a_location_are_refused_and_never_repeated(secret: str) -> None:
    secret = f"S{secret}T"
    for uri in (
        f"s3://KEY:{secret}@bucket/x",
        f"s3:KEY:{secret}@b",
        f"https://KEY:{secret}@host/x",
        f"gs://b?k={secret}",
    ):
        with pytest.raises(ConfigError) as caught:
            storage.normalise(uri)
        assert secret not in str(caught.value)
        assert "KEY" not in str(caught.value).replace("_KEY", "").replace("ACCESS_", "")


# Files


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"x" * 3_000_000])
def test_what_was_written_is_read(root: str, data: bytes) -> None:
    uri = join(root, "deep/er/file")
    assert not storage.exists(uri)
    storage.write_bytes(uri, data)
    assert storage.exists(uri)
    assert storage.exists(join(root, "deep"))
    assert storage.read_bytes(uri) == data
    storage.write_bytes(uri, b"other")
    assert storage.read_bytes(uri) == b"other"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


def test_read_many_leaves_out_only_what_is_missing(root: str) -> None:
    for name in ("a", "b"):
        storage.write_bytes(join(root, name), name.encode())
    found = storage.read_many(join(root, name) for name in ("a", "none", "b"))
    assert found == {storage.normalise(join(root, name)): name.encode() for name in ("a", "b")}
    assert storage.read_many([]) == {}
    assert storage.read_many([join(root, "none")]) == {}


def test_put_if_absent_creates_once_and_never_replaces(root: str) -> None:
    uri = join(root, "v1/_manifest.json")
    assert storage.put_if_absent(uri, b"first") is True
    assert storage.put_if_absent(uri, b"second") is False
    assert storage.put_if_absent(uri, b"first") is False
    assert storage.read_bytes(uri) == b"first"
    assert names(storage.list_files(root, include_hidden=True), root) == ["v1/_manifest.json"]


def test_the_link_decides_when_a_file_appears_after_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    link = os.link

    def late_rival(source: str, destination: str) -> None:
        target.write_bytes(b"rival")
        link(source, destination)

    monkeypatch.setattr(os, "link", late_rival)
    assert storage.put_if_absent(str(target), b"ours") is False
    assert target.read_bytes() == b"rival"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_on_its_way_that_somebody_tidied_up_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, taken = os.link, []

    def tidied_up(temporary: str, path: str) -> None:
        assert storage.is_temporary(temporary)
        assert not storage.is_temporary(path)
        if not taken:
            taken.append(temporary)
            os.remove(temporary)
        link(temporary, path)

    monkeypatch.setattr(os, "link", tidied_up)
    assert storage.put_if_absent(str(tmp_path / "_manifest.json"), b"1")
    assert taken
    assert [path.name for path in tmp_path.iterdir()] == ["_manifest.json"]


def test_a_disk_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, destination: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConfigError, match=r"no hard links.*another disk or on S3"):
        storage.put_if_absent(str(tmp_path / "x"), b"")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "x"
    storage.write_bytes(str(target), b"old")

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="Input/output"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"")
    (tmp_path / "y").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "y").stat().st_mode)


def test_a_root_that_cannot_be_written_to_is_refused_at_once(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.check_root(f"{tmp_path}/new/root")
    storage.check_root(f"{s3_root}/new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for root in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"/file' is no directory; give another root"):
            storage.check_root(f"{tmp_path}/{root}")
    with pytest.raises(ConfigError, match=r"bucket 'no-such-bucket' doesn't exist; create it"):
        storage.check_root("s3://no-such-bucket/x")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may be run by root, who may do everything
    with pytest.raises(ConfigError, match=rf"no permission to write in '{tmp_path}'"):
        storage.check_root(f"{tmp_path}/new")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(PipelineError, match=r"can't reach 's3://b/x': .*127\.0\.0\.1:9.*correct AWS_ENDPOINT_URL"):
        storage.check_root("s3://b/x")


def test_a_missing_bucket_is_named(s3_url: str) -> None:
    for write in (storage.write_bytes, storage.put_if_absent):
        with pytest.raises(ConfigError, match=r"bucket 'no-such-bucket' doesn't exist; create it"):
            write("s3://no-such-bucket/x", b"")
    assert storage.list_files("s3://no-such-bucket/x") == []
    assert storage.list_files("s3://no-such-bucket/*.csv") == []
    assert storage.list_directories("s3://no-such-bucket") == []
    assert not storage.exists("s3://no-such-bucket/x")


# Listings

TREE = ["a.csv", "b.CSV.gz", "sub/c.csv", "sub/d.parquet", "_skip/e.csv", ".hid.csv", "sub/_f.csv", "other/g.csv"]


@pytest.mark.parametrize(
    ("pattern", "options", "expected"),
    [
        ("", {}, ["a.csv", "b.CSV.gz", "other/g.csv", "sub/c.csv", "sub/d.parquet"]),
        ("", {"suffixes": (".csv", ".csv.gz")}, ["a.csv", "b.CSV.gz", "other/g.csv", "sub/c.csv"]),
        ("", {"recursive": False}, ["a.csv", "b.CSV.gz"]),
        ("", {"include_hidden": True}, sorted(TREE)),
        ("sub", {}, ["sub/c.csv", "sub/d.parquet"]),
        ("su", {}, []),  # a prefix of a name is no directory, on S3 either
        ("a.csv", {}, ["a.csv"]),
        ("_skip", {}, ["_skip/e.csv"]),  # named by the caller, so not hidden
        ("sub/_f.csv", {}, ["sub/_f.csv"]),
        ("*.csv", {}, ["a.csv"]),
        ("*/*.csv", {}, ["other/g.csv", "sub/c.csv"]),
        ("**/*.csv", {}, ["a.csv", "other/g.csv", "sub/c.csv"]),
        ("s*", {}, ["sub/c.csv", "sub/d.parquet"]),  # a directory stands for its files
        ("[os]*/?.csv", {}, ["other/g.csv", "sub/c.csv"]),
        ("_skip/*.csv", {}, ["_skip/e.csv"]),
        ("*.json", {}, []),
        ("none", {}, []),
    ],
)
def test_list_files(root: str, pattern: str, options: dict[str, object], expected: list[str]) -> None:
    for name in TREE:
        storage.write_bytes(join(root, name), name.encode())
    found = storage.list_files(join(root, pattern) if pattern else root, **options)  # type: ignore[arg-type]
    assert names(found, root) == expected
    assert [info.bytes for info in found] == [len(name) for name in expected]


def test_list_directories_gives_immediate_children(root: str) -> None:
    for name in ("v1/x/y", "v10/x", "file", "_z/x"):
        storage.write_bytes(join(root, name), b"")
    assert storage.list_directories(root) == ["_z", "v1", "v10"]
    assert storage.list_directories(join(root, "none")) == []
    assert storage.list_directories(join(root, "file")) == []


def test_a_name_with_glob_characters_is_found_as_it_is(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a[1].csv"), b"")
    assert names(storage.list_files(str(tmp_path / "a[1].csv")), str(tmp_path)) == ["a[1].csv"]


@pytest.mark.parametrize("pattern", ["link", "link/**"])
def test_each_directory_is_listed_once_without_links_back_and_links_to_nowhere_are_seen(
    tmp_path: Path, pattern: str
) -> None:
    (tmp_path / "data" / "2024").mkdir(parents=True)
    (tmp_path / "data" / "x.csv").write_bytes(b"")
    (tmp_path / "data" / "2024" / "y.csv").write_bytes(b"rows")
    (tmp_path / "data" / "2024" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a-latest").symlink_to(tmp_path / "data" / "2024")
    (tmp_path / "data" / "broken").symlink_to(tmp_path / "none")
    (tmp_path / "data" / "ring").symlink_to("ring")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    found = storage.list_files(str(tmp_path / pattern))
    assert names(found, str(tmp_path)) == ["link/2024/y.csv", "link/broken", "link/ring", "link/x.csv"]
    assert [info.bytes for info in found] == [4, 0, 0, 0]
    below = storage.list_files(str(tmp_path / "data"), (".csv",))
    assert names(below, str(tmp_path)) == ["data/2024/y.csv", "data/x.csv"], "rows would count twice"


def test_a_directory_of_tables_is_read_without_what_writers_leave_beside_them(root: str) -> None:
    """Spark's marks and summaries, and what our own versions have beside their data."""
    own = ["_manifest.json", "_reservation.json", "_rejected/transactions-00000.parquet", "_originals/a1.parquet"]
    spark = ["_SUCCESS", "_metadata", "_common_metadata", "_temporary/0/part-1.parquet", ".part-0.parquet.crc"]
    for name in ("part-0.parquet", *own, *spark):
        storage.write_bytes(join(root, name), b"x")
    assert names(storage.list_files(root), root) == ["part-0.parquet"]


# Tables


def test_parquet_digest_and_size_are_those_of_the_stored_bytes(root: str) -> None:
    written = storage.write_parquet(TABLE, join(root, "part.parquet"))
    data = storage.read_bytes(join(root, "part.parquet"))
    assert (written.rows, written.bytes) == (3, len(data))
    assert written.digest == f"blake3:{blake3(data).hexdigest()}" == storage.digest_of(written.uri)
    assert written.uri == storage.normalise(join(root, "part.parquet"))
    with storage.open_input(written.uri) as source:
        assert pq.read_table(source).equals(TABLE)


def test_parquet_settings_reach_the_file(tmp_path: Path) -> None:
    ours = storage.write_parquet(TABLE, str(tmp_path / "ours"))
    raw = storage.write_parquet(
        TABLE, str(tmp_path / "raw"), compression="none", use_dictionary=False, row_group_size=1
    )
    assert pq.ParquetFile(ours.uri).metadata.row_group(0).column(0).compression == "ZSTD"
    metadata = pq.ParquetFile(raw.uri).metadata
    assert (metadata.num_row_groups, metadata.row_group(0).column(0).compression) == (3, "UNCOMPRESSED")


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (storage.write_parquet(TABLE, str(tmp_path / name)) for name in "ab")
    assert first.digest == second.digest


def test_open_input_serves_csv(root: str) -> None:
    storage.write_bytes(join(root, "x.csv"), b"a,b\n1,2\n")
    with storage.open_input(join(root, "x.csv")) as source:
        assert pacsv.read_csv(source).to_pydict() == {"a": [1], "b": [2]}
    with pytest.raises(FileNotFoundError):
        storage.open_input(join(root, "none.csv"))


def test_the_arrow_file_system_is_made_once_for_an_environment(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = storage.arrow_filesystem("s3://bucket/a/b")
    assert isinstance(first, pafs.S3FileSystem)
    assert path == "bucket/a/b"
    assert storage.arrow_filesystem("s3://bucket/c")[0] is first
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")  # the more specific name wins
    assert storage.arrow_filesystem("s3://bucket/c")[0] is not first


# Fingerprints


def test_a_fingerprint_tells_contents_apart(root: str) -> None:
    marks = []
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        storage.write_bytes(join(root, name), data)
        (info,) = storage.list_files(join(root, name))
        marks.append(storage.fingerprint(info))
    assert marks[0] == marks[1] != marks[2]
    assert marks[0].startswith("etag:" if root.startswith("s3:") else "blake2b:")


@pytest.mark.parametrize("offset", [0, 4_500_000, 8_999_999])
def test_a_sampled_fingerprint_sees_start_middle_end_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    monkeypatch.setattr(storage, "SAMPLE_ABOVE", 8 << 20)
    path = tmp_path / "big"

    def mark(data: bytearray, when: int) -> str:
        path.write_bytes(data)
        os.utime(path, ns=(when, when))
        return storage.fingerprint(storage.list_files(str(path))[0])

    data = bytearray(9_000_000)
    before = mark(data, 1)
    assert before.startswith("sampled-blake2b:")
    assert mark(data, 1) == before
    assert mark(data, 2) != before
    data[offset] = 1
    assert mark(data, 1) != before


# Faults


class ClientError(Exception):
    """The shape of botocore's error: a response with a code and an HTTP status."""

    def __init__(self, code: str, status: int | None) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class EndpointConnectionError(Exception):
    """Bears a name of botocore's."""


def chained(outer: BaseException, cause: BaseException) -> BaseException:
    outer.__cause__ = cause
    return outer


def arrow(text: str) -> OSError:
    return OSError(
        f"When reading information for key 'x' in bucket 'b': AWS Error {text} during HeadObject operation: …"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (EndpointConnectionError(), True),
        (ClientError("SlowDown", 503), True),
        (ClientError("InternalError", 500), True),
        (ClientError("RequestTimeout", 400), True),
        (ClientError("ConditionalRequestConflict", 409), True),
        (ClientError("503", None), True),  # a HEAD request has no body, so the status is its code
        (ClientError("NoSuchBucket", 404), False),
        (ClientError("AccessDenied", 403), False),
        (ClientError("NotImplemented", 501), False),
        (OSError(16, "Please reduce your request rate"), True),  # s3fs's SlowDown, its cause lost by pickling
        (OSError(121, "Internal Server Error"), True),
        (OSError(5, "An error occurred (ConditionalRequestConflict) when calling the PutObject operation: …"), True),
        (OSError(5, "An error occurred (NoSuchLifecycle) when calling the PutObject operation: …"), False),
        (OSError(28, "No space left on device"), False),
        (chained(OSError(22, "?"), ClientError("SlowDown", 503)), True),
        (arrow("UNKNOWN (HTTP status 503)"), True),
        (arrow("SLOW_DOWN"), True),
        (arrow("NETWORK_CONNECTION"), True),
        (arrow("ACCESS_DENIED"), False),
        (arrow("NO_SUCH_BUCKET"), False),
        (arrow("UNKNOWN (HTTP status 400)"), False),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (SourceError("x"), False),
        (GateFailed("x"), False),
        (chained(SourceError("x"), ConnectionError()), False),  # we have judged it already
        (chained(RuntimeError("wrapper"), ConnectionError()), True),
        (RayTaskError("step", "Traceback …", GetTimeoutError()).as_instanceof_cause(), True),
        (StreamingGeneratorReplayInconsistentError("fewer objects"), True),
        (ObjectReconstructionFailedError("00", b"", "step"), True),
        (chained(RuntimeError("wrapper"), SourceError("x")), False),
        (chained(ConnectionError(), FileNotFoundError()), True),  # what went wrong last counts
        (ValueError("x"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_transient(error: BaseException, expected: bool) -> None:
    assert is_transient(error) is expected


def test_real_errors_of_an_endpoint_that_is_not_there(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def read_several(uri: str) -> dict[str, bytes]:
        return storage.read_many([uri, uri + "2"])

    for request in (storage.read_bytes, read_several, storage.open_input, storage.list_files, storage.exists):
        with pytest.raises(Exception, match=r"(?i)connect") as caught:
            request("s3://bucket/x")
        assert is_transient(caught.value)


@pytest.mark.parametrize("text", ["soon", "0", "601", "nan"])
def test_a_time_out_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PIPELINE_S3_TIMEOUT_SECONDS", text)
    for request in (storage.read_bytes, storage.open_input):
        with pytest.raises(ConfigError, match=rf"PIPELINE_S3_TIMEOUT_SECONDS must be .* 0.1 to 600; it is '{text}'"):
            request("s3://bucket/x")


def test_values_travel_between_processes() -> None:
    info = storage.FileInfo("s3://bucket/x", 1, "etag")
    assert pickle.loads(pickle.dumps(info)) == info


SCHEMA = pa.schema([("id", pa.int64()), ("bytes", pa.binary(1000))])


def piece(start: int, count: int) -> pa.Table:
    rng = np.random.default_rng(start)
    values = pa.py_buffer(rng.integers(0, 256, count * 1000, dtype=np.uint8))
    binary = pa.FixedSizeBinaryArray.from_buffers(pa.binary(1000), count, [None, values])
    return pa.table({"id": np.arange(start, start + count), "bytes": binary}, schema=SCHEMA)


def read(uri: str) -> pa.Table:
    with storage.open_input(uri) as source:
        return pq.read_table(source)


def everything(uri: str) -> list[str]:
    return [info.uri for info in storage.list_files(uri, include_hidden=True)]


# 60 MB go to S3 in several parts, 12 MB are more than is held back before the disk is asked to begin.
@pytest.mark.parametrize("counts", [[], [0], [1], [10, 20, 5], [4000] * 3, [10_000] * 6])
def test_pieces_are_one_file(root: str, counts: list[int]) -> None:
    uri = layout.join(root, "a", "part.parquet")
    pieces = [piece(sum(counts[:number]), count) for number, count in enumerate(counts)]
    with ParquetStream(uri, SCHEMA) as stream:
        for table in pieces:
            stream.write(table)
    wanted = pa.concat_tables(pieces) if pieces else SCHEMA.empty_table()
    assert read(uri).equals(wanted)
    data = storage.read_bytes(uri)
    written = stream.written
    assert (written.uri, written.rows, written.bytes) == (storage.normalise(uri), sum(counts), len(data))
    assert written.digest == f"blake3:{blake3(data).hexdigest()}"
    assert everything(root) == [storage.normalise(uri)]


def test_settings_and_pieces_give_row_groups(tmp_path) -> None:
    uri = str(tmp_path / "x.parquet")
    with ParquetStream(uri, SCHEMA, row_group_size=8, compression={"id": "zstd"}, use_dictionary=["id"]) as stream:
        stream.write(piece(0, 20))
        stream.write(piece(20, 3))
    file = pq.ParquetFile(uri)
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [8, 8, 4, 3]
    assert file.metadata.row_group(0).column(1).compression == "UNCOMPRESSED"


def test_a_block_that_fails_leaves_nothing(root: str) -> None:
    uri = layout.join(root, "part.parquet")

    def write() -> None:
        with ParquetStream(uri, SCHEMA) as stream:
            for number in range(7):
                stream.write(piece(number, 10_000))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write()
    assert everything(root) == []


def test_another_schema_leaves_nothing(root: str) -> None:
    uri = layout.join(root, "part.parquet")

    def write() -> None:
        with ParquetStream(uri, SCHEMA) as stream:
            stream.write(pa.table({"other": [1]}))

    with pytest.raises(ValueError, match="schema"):
        write()
    assert everything(root) == []


def test_the_old_file_stays_until_the_new_one_is_whole(root: str) -> None:
    uri = layout.join(root, "part.parquet")
    storage.write_parquet(piece(0, 3), uri)
    with ParquetStream(uri, SCHEMA) as stream:
        stream.write(piece(0, 12_000))
        assert read(uri).num_rows == 3
    assert read(uri).num_rows == 12_000


def test_a_bucket_that_isnt_there(s3_url: str) -> None:
    def write() -> None:
        with ParquetStream("s3://no-such-bucket-here/x.parquet", SCHEMA) as stream:
            stream.write(piece(0, 3))

    with pytest.raises(ConfigError, match=r"no-such-bucket-here.*doesn't exist"):
        write()


def test_threads_work_only_some_results_ahead() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    results = storage.in_threads(make, range(1000), threads=2)
    for taken in range(10):
        assert next(results) == taken
        assert len(made) <= taken + 1 + 4
    assert list(results) == list(range(10, 1000))
    results = storage.in_threads(make, range(1000), threads=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(made) <= 1000 + 1 + 5
