"""Image files: every file below a location is a candidate, filtered or rejected, and copies are found cheaply."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images import sources
from tasks.images.sources import (
    LISTING,
    REJECTED_IMAGES,
    ImageListing,
    content_groups,
    digest_files,
    group_by_digest,
    list_images,
    same_size_rows,
    shown,
)
from tasks.io import listing as listing_module
from tasks.io import storage
from tasks.io.errors import SourceError


def put(root: str, *names: str, data: bytes = b"x") -> str:
    for name in names:
        storage.write_bytes(f"{root}/{name}", data)
    return root


def column(listing: ImageListing, name: str) -> list[object]:
    values: list[object] = listing.table[name].to_pylist()
    return values


def reasons(listing: ImageListing) -> dict[str, str]:
    return dict(zip(*(listing.rejected[name].to_pylist() for name in ("path", "reason")), strict=True))


def test_few_files_of_a_listing_are_held_as_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0

    class Counted(storage.FileInfo):
        def __init__(self, *values: Any) -> None:
            nonlocal alive, most
            super().__init__(*values)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    names = [f"cats/{number:03d}.png" for number in range(200)]
    put(str(tmp_path), *names)
    monkeypatch.setattr(sources, "_AT_ONCE", 8)
    monkeypatch.setattr(listing_module, "FileInfo", Counted)
    listing = list_images(str(tmp_path))
    assert column(listing, "path") == names
    assert 8 <= most <= 20
    together = list_images(str(tmp_path)).record()
    monkeypatch.setattr(sources, "_AT_ONCE", 1000)
    assert list_images(str(tmp_path)).record() == together


def test_every_file_is_listed_locally_and_on_s3(root: str) -> None:
    put(root, "b.png", "cats/1.jpg", "cats/deep/2.JPEG", "dogs/1.jpg", "no_suffix", data=b"four")
    put(root, ".DS_Store", "cats/Thumbs.db", "__MACOSX/cats/._1.jpg", "cats/.ipynb_checkpoints/1.jpg", ".git/index")
    put(root, "labels.csv", "cats/notes.TXT", "archive.tar.gz")
    listing = list_images(root + "/")
    assert listing.table.schema == LISTING
    assert listing.rejected.schema == REJECTED_IMAGES
    assert listing.rejected.num_rows == 0
    assert column(listing, "path") == ["b.png", "cats/1.jpg", "cats/deep/2.JPEG", "dogs/1.jpg", "no_suffix"]
    assert column(listing, "image_id") == ["b", "cats/1", "cats/deep/2", "dogs/1", "no_suffix"]
    assert column(listing, "folder") == [None, "cats", "cats", "dogs", None]
    assert column(listing, "uri") == [f"{root}/{path}" for path in column(listing, "path")]
    assert column(listing, "bytes") == [4] * 5
    stamps = {info.uri: info.stamp for info in storage.list_files(root)}
    assert column(listing, "stamp") == [stamps[uri] for uri in column(listing, "uri")]
    assert dict(listing.filtered) == {"junk": 5, "not_image_suffix": 3}
    assert listing.files == 13


def test_names_of_cameras_and_classes_are_no_junk(root: str) -> None:
    paths = [".hidden.png", "_DSC0001.JPG", "_background_noise_/1.jpg", "cats/.thumbs/4.png", "cats/_MG_2.JPG"]
    listing = list_images(put(root, *paths))
    assert column(listing, "path") == paths
    assert column(listing, "folder") == [None, None, "_background_noise_", "cats", "cats"]
    assert listing.files == 5


def test_a_directory_is_listed_under_each_path_to_it_whatever_the_disks_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the class dogs vanishes, and its images are cats."""
    put(str(tmp_path), "cats/1.jpg", "dogs/2.jpg", "dogs/3.jpg")
    (tmp_path / "cats" / "more").symlink_to(tmp_path / "dogs")
    (tmp_path / "dogs" / "up").symlink_to(tmp_path)
    (tmp_path / "zoo").symlink_to(tmp_path / "cats")
    expected = ["cats/1.jpg", "cats/more/2.jpg", "cats/more/3.jpg", "dogs/2.jpg", "dogs/3.jpg"]
    expected += ["zoo/1.jpg", "zoo/more/2.jpg", "zoo/more/3.jpg"]
    scandir = os.scandir
    for order in (sorted, lambda entries, key: sorted(entries, key=key, reverse=True)):
        monkeypatch.setattr(os, "scandir", lambda path, order=order: order(scandir(path), key=lambda one: one.name))
        assert column(list_images(str(tmp_path)), "path") == expected
    monkeypatch.setattr(os, "scandir", scandir)
    assert column(list_images(f"{tmp_path}/**/*.jpg"), "path") == expected


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*.jpg"])
def test_links_that_lead_nowhere_are_rejected(tmp_path: Path, pattern: str) -> None:
    put(str(tmp_path), "1.jpg")
    (tmp_path / "annexed.jpg").symlink_to(".git/annex/objects/none")
    (tmp_path / "ring.jpg").symlink_to("ring.jpg")
    listing = list_images(f"{tmp_path}{pattern}")
    assert column(listing, "path") == ["1.jpg"]
    assert reasons(listing) == {"annexed.jpg": "not_a_file", "ring.jpg": "not_a_file"}
    assert "git annex get" in listing.rejected["detail"][0].as_py()


IDS = [
    ("cats/1.jpg", "cats/1"),
    ("a.b.png", "a.b"),  # only the last suffix goes
    ("v1.2/x", "v1.2/x"),  # a directory's dot is none
    ("v1.2/x.png", "v1.2/x"),
    ("x.", "x"),
    ("x..png", "x."),
    ("spaces in name.png", "spaces in name"),
    ("Łódź/zdjęcie.png", "Łódź/zdjęcie"),
    ("a[1]*?.png", "a[1]*?"),  # what a glob would take for a pattern
    ("n\u200bx.png", "n\u200bx"),  # unprintable, but no control character
]


def test_ids(tmp_path: Path) -> None:
    put(str(tmp_path), *(path for path, _ in IDS if path != "v1.2/x"))
    listing = list_images(str(tmp_path))
    found = dict(zip(column(listing, "path"), column(listing, "image_id"), strict=True))
    assert found == {path: image_id for path, image_id in IDS if path != "v1.2/x"}
    put(str(tmp_path / "other"), "v1.2/x")
    assert column(list_images(str(tmp_path / "other")), "image_id") == ["v1.2/x"]


PLACES: list[tuple[str, Callable[[str], str], list[str]]] = [
    # where, how it is named, paths
    ("a directory", str, ["cats/1.png", "cats2/1.png", "top.png"]),
    ("a file URI", lambda d: f"file://{d}", ["cats/1.png", "cats2/1.png", "top.png"]),
    ("one below", lambda d: f"{d}/cats", ["1.png"]),  # and not cats2
    ("a single file", lambda d: f"{d}/cats/1.png", ["1.png"]),
    ("a glob of directories", lambda d: f"{d}/cats*", ["cats/1.png", "cats2/1.png"]),
    ("a glob of files", lambda d: f"{d}/c*/1.*", ["cats/1.png", "cats2/1.png"]),
    ("a glob further down", lambda d: f"{d}/cats/?.png", ["1.png"]),
]


@pytest.mark.parametrize(("why", "uri", "paths"), PLACES, ids=[case[0] for case in PLACES])
def test_places(tmp_path: Path, why: str, uri: Callable[[str], str], paths: list[str]) -> None:
    put(str(tmp_path), "cats/1.png", "cats2/1.png", "top.png")
    listing = list_images(uri(str(tmp_path)))
    assert column(listing, "path") == paths
    assert [listing.base + str(path) for path in paths] == column(listing, "uri")


@pytest.mark.parametrize("pattern", ["cats*", "*/1.png"])
def test_a_glob_on_s3(s3_root: str, pattern: str) -> None:
    put(s3_root, "cats/1.png", "cats2/1.png")
    assert column(list_images(f"{s3_root}/{pattern}"), "path") == ["cats/1.png", "cats2/1.png"]


def test_a_directory_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    put(str(tmp_path / "a[1]"), "cats/1.png")
    assert column(list_images(str(tmp_path / "a[1]")), "path") == ["cats/1.png"]


def test_a_whole_bucket(s3_root: str) -> None:
    bucket = s3_root.rpartition("/")[0]
    put(bucket, "cats/1.png")
    assert column(list_images(bucket), "folder") == ["cats"]


def test_keys_with_empty_parts(s3_root: str) -> None:
    """S3 has no directories: 'a//b.png' is another key than 'a/b.png', and both can be read."""
    put(s3_root, "a/b.png", "a//c.png", "/d.png")
    listing = list_images(s3_root)
    assert column(listing, "path") == ["/d.png", "a//c.png", "a/b.png"]
    assert column(listing, "folder") == [None, "a", "a"]
    assert [storage.read_bytes(str(uri)) for uri in column(listing, "uri")] == [b"x"] * 3


def test_files_of_one_id_are_all_rejected(root: str) -> None:
    put(root, "x.png", "x.jpg", "X.png", "cats/x.png", "y.png", "y", "y.gif", "y.bmp", "y.webp")
    listing = list_images(root)
    assert column(listing, "path") == ["X.png", "cats/x.png"]
    assert reasons(listing) == dict.fromkeys(
        ["x.jpg", "x.png", "y", "y.bmp", "y.gif", "y.png", "y.webp"], "duplicate_id"
    )
    details = dict(zip(*(listing.rejected[name].to_pylist() for name in ("path", "detail")), strict=True))
    assert details["x.png"] == "the id of x.jpg, x.png; keep one of them"
    assert details["y"] == "the id of y, y.bmp, y.gif and 2 more; keep one of them"
    assert listing.files == 9


def test_names_that_nobody_could_store(tmp_path: Path) -> None:
    """Bytes that aren't UTF-8 (which Python shows as surrogates), line ends, and very long paths."""
    directory = os.fsencode(tmp_path)
    for name in (b"\xff.png", b"K\xf6ln.png", b"a\nb.png", b"tab\t.png", b"del\x7f.png", b"good.png"):
        Path(os.fsdecode(directory + b"/" + name)).write_bytes(b"x")
    os.mkdir(directory + b"/\xe9t\xe9")
    Path(os.fsdecode(directory + b"/\xe9t\xe9/1.png")).write_bytes(b"x")
    deep = "/".join(["d" * 200] * 5)  # 1,004 characters
    put(f"{tmp_path}/{deep}", "e" * 15 + ".png", "e" * 16 + ".png")
    listing = list_images(str(tmp_path))
    assert column(listing, "path") == [f"{deep}/{'e' * 15}.png", "good.png"]
    found = reasons(listing)
    assert set(found.values()) == {"bad_name"}
    escaped = {r"\xff.png", r"K\xf6ln.png", r"a\x0ab.png", r"tab\x09.png", r"del\x7f.png", r"\xe9t\xe9/1.png"}
    assert set(found) == escaped | {f"{deep}/{'e' * 16}.png"}


def test_bad_names_alone(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"x")
    listing = list_images(str(tmp_path))
    assert (listing.table.num_rows, listing.table.schema, listing.files) == (0, LISTING, 1)
    assert content_groups(listing.table).tolist() == []
    assert listing.record().rows == 0


def test_a_location_whose_own_name_is_bad(tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(SourceError, match=r"/\\xff': nothing is there"):
        list_images(place)
    put(place, "1.png")
    assert reasons(list_images(place)) == {"1.png": "bad_name"}


def test_control_characters_on_s3(s3_root: str) -> None:
    put(s3_root, "tab\t.png", "good.png")
    assert reasons(list_images(s3_root)) == {r"tab\x09.png": "bad_name"}


def test_pipes_and_sockets_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), "good.png", "empty.png", "empty2.png", data=b"")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes only
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind("socket.png")
        listing = list_images(str(tmp_path))
    assert reasons(listing) == {"pipe.png": "not_a_file", "socket.png": "not_a_file"}
    assert content_groups(listing.table).tolist() == [0, 0, 0]


def test_links_are_followed(tmp_path: Path) -> None:
    put(str(tmp_path / "elsewhere"), "1.png")
    put(str(tmp_path / "images"), "2.png")
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/up").symlink_to(tmp_path / "images")
    (tmp_path / "images/dangling.png").symlink_to(tmp_path / "nowhere")
    assert column(list_images(str(tmp_path / "images")), "path") == ["2.png", "linked/1.png"]


WRONG: list[tuple[str, list[str], str, str]] = [
    # what is wrong, files, what is listed, message
    ("missing", [], "nowhere", r"images '.*/nowhere': nothing is there; correct the location, or give another"),
    ("junk only", [".DS_Store", "a/._1.png"], "", r"none of its 2 files can be an image, such as .*\.DS_Store; give"),
    ("no match", ["x.png"], "*.jpg", r"images '.*/\*\.jpg': nothing matches; correct the pattern"),
    ("tables only", ["x.csv", "y/z.parquet"], "", r"none of its 2 files can be an image, such as .*x\.csv; give"),
    ("a table itself", ["x.csv"], "x.csv", r"none of its 1 file can be an image"),
]


@pytest.mark.parametrize(("why", "files", "place", "message"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_named(root: str, why: str, files: list[str], place: str, message: str) -> None:
    put(root, *files)
    if root.startswith("s3://") and not files:
        put(root, "elsewhere.png")
    with pytest.raises(SourceError, match=message):
        list_images(f"{root}/{place}".rstrip("/"))


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file is in it or below; put images there, or give another"):
        list_images(str(tmp_path))


def test_a_bucket_that_is_missing(s3_root: str) -> None:
    with pytest.raises(SourceError, match="nothing is there"):
        list_images("s3://no-such-bucket-here/images")


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to(tmp_path / "x.png")
    assert reasons(list_images(str(tmp_path))) == {"x.png": "not_a_file"}


def test_the_record_notices_changes(tmp_path: Path) -> None:
    root = put(str(tmp_path), "a.png", "b.png")
    record = list_images(root).record()
    assert (record.name, record.uri, record.rows, record.files[0].bytes) == ("images", root, 2, 2)
    assert list_images(root).record() == record
    prints = {record.files[0].fingerprint}
    os.utime(tmp_path / "a.png", ns=(0, 0))
    prints.add(list_images(root).record().files[0].fingerprint)
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    prints.add(list_images(root).record().files[0].fingerprint)
    assert len(prints) == 3
    assert all(mark.startswith("listing-blake2b:") for mark in prints)


# Copies


def test_copies(root: str) -> None:
    put(root, "a/1.png", "a/3.png", "b/1.jpg", data=b"same")
    put(root, "a/2.png", data=b"diff")  # the same size
    put(root, "a/4.png", "c/5.png", data=b"longer")
    put(root, "b/6.png", data=b"of a size of its own")
    assert content_groups(list_images(root).table).tolist() == [0, 1, 0, 3, 0, 5, 3]


def test_the_same_bytes_uploaded_in_parts_are_not_found_on_s3(s3_root: str) -> None:
    """The ETag of a multipart upload is no digest of the contents."""
    import s3fs

    data = bytes(5 * 2**20 + 1)
    put(s3_root, "a.png", "b.png", data=data)
    filesystem = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    with filesystem.open(f"{s3_root}/c.png", "wb", block_size=5 * 2**20) as file:
        file.write(data)
    listing = list_images(s3_root)
    assert len(set(column(listing, "stamp"))) == 2
    assert content_groups(listing.table).tolist() == [0, 0, 2]


def test_only_files_of_one_size_are_read(tmp_path: Path) -> None:
    """A file that can't be read goes unnoticed where its size is its own, and is alike to none elsewhere."""
    put(str(tmp_path), "a.png", "b.png", "c.png", data=b"same")
    put(str(tmp_path), "d.png", data=b"alone")
    table = list_images(str(tmp_path)).table
    (tmp_path / "d.png").unlink()
    assert content_groups(table).tolist() == [0, 0, 0, 3]
    (tmp_path / "a.png").unlink()
    assert content_groups(table).tolist() == [0, 1, 1, 3]
    assert digest_files([str(tmp_path / "a.png"), str(tmp_path)]) == [None, None]


def test_a_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    data = bytearray(9 * 2**20)  # more than one piece
    put(str(tmp_path), "a.png", data=bytes(data))
    data[-1] = 1
    put(str(tmp_path), "b.png", data=bytes(data))
    assert content_groups(list_images(str(tmp_path)).table).tolist() == [0, 1]


@given(st.lists(st.sampled_from([b"", b"a", b"b", b"aa", b"ab", b"abc"]), max_size=12), st.data())
def test_groups_are_those_of_the_contents(contents: list[bytes], data: st.DataObject) -> None:
    sizes = np.array([len(content) for content in contents], dtype=np.int64)
    rows = same_size_rows(sizes)
    assert rows.tolist() == [row for row, size in enumerate(sizes) if (sizes == size).sum() > 1]
    gone = {row for row in rows.tolist() if data.draw(st.booleans())}
    digests = pl.Series([None if row in gone else contents[row] for row in rows.tolist()], dtype=pl.Binary)
    expected = [
        row if row in gone else next(i for i, c in enumerate(contents) if c == contents[row] and i not in gone)
        for row in range(len(contents))
    ]
    assert group_by_digest(len(contents), rows, digests).tolist() == expected


def test_a_part_of_a_listing(tmp_path: Path) -> None:
    put(str(tmp_path), *(f"{number}.png" for number in range(6)))
    table = list_images(str(tmp_path)).table
    assert content_groups(table.slice(2, 3)).tolist() == [0, 0, 0]
    assert content_groups(pa.concat_tables([table.slice(0, 1), table.slice(4)])).tolist() == [0, 0, 0]


@given(st.text())
def test_what_is_shown_can_be_stored(text: str) -> None:
    escaped = shown(text)
    escaped.encode()
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in escaped)
    assert shown(escaped) == escaped
