"""Long lists of files stand beside the manifest: nobody who reads a version sees a difference."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.io import storage
from tasks.io.errors import CorruptVersion, DamagedManifest
from tasks.store import layout, retention, versions
from tasks.store.manifest import MOST_INLINE, FileEntry, InputFile, InputRecord, Manifest, lists_apart, with_lists
from tests.store.publishing import DATASET, manifest_of, publish, table

LISTS = "_files/part-00000-a1.parquet"


def written(held: versions.Reservation, count: int) -> list[FileEntry]:
    return [
        held.entry(storage.write_parquet(table(held.run_id, index).slice(0, 1), held.data_uri(index)))
        for index in range(count)
    ]


def inputs(count: int) -> tuple[InputRecord, ...]:
    files = tuple(InputFile(uri=f"s3://raw/t/{n}.parquet", bytes=n, fingerprint=f"etag:{n}") for n in range(count))
    return (
        InputRecord(name="products", uri="s3://raw/p"),
        InputRecord(name="transactions", uri="s3://raw/t", rows=7, files=files),
    )


def published(root: str, *, files: int = 3, sources: int = MOST_INLINE) -> tuple[Manifest, Manifest]:
    """What a run says, and what stands in the store."""
    held = versions.reserve(root, DATASET, "run")
    rejected_uri = held.rejected_uri("transactions", 0)
    rejected = held.entry(storage.write_parquet(table("r", 0), rejected_uri))
    side = held.entry(storage.write_parquet(table("s", 0), layout.join(held.uri, layout.side_name("state", 1))))
    said = manifest_of(held, written(held, files), rejected_files=(rejected,), side_files=(side,))
    said = said.model_copy(update={"inputs": inputs(sources)})
    return said, versions.commit(held, said)


MANY = [(MOST_INLINE + 1, 0), (2, MOST_INLINE), (2, 2 * MOST_INLINE)]


@pytest.mark.parametrize(
    ("root", "files", "sources"),
    [
        *(("local", *lists) for lists in MANY),
        *(pytest.param("s3", *lists, marks=() if lists[0] == 2 else pytest.mark.nightly) for lists in MANY),
    ],
    indirect=["root"],
)
def test_a_manifest_of_many_files_stays_small_and_says_as_much(root: str, files: int, sources: int) -> None:
    said, stored = published(root, files=files, sources=sources)
    uri = layout.version_uri(root, DATASET, 1)
    raw = storage.read_bytes(layout.join(uri, layout.MANIFEST))
    assert len(raw) < 5_000
    assert json.loads(raw)["files"] == []
    assert stored.file_lists is not None
    assert stored.model_copy(update={"file_lists": None}) == said
    for found in (
        versions.resolve(root, DATASET),
        versions.latest(root, DATASET),
        *versions.live_manifests(root, DATASET),
    ):
        assert found == stored
    versions.verify(root, stored)
    assert versions.orphans(uri, stored) == []
    assert versions.read_table(root, DATASET).num_rows == files
    listed = pq.read_table(layout.join(uri, LISTS)) if not storage.is_s3(uri) else None
    if listed is not None:
        assert listed.filter(pq.filters_to_expression([("list", "==", "data")])).num_rows == files


def test_short_lists_stay_in_the_manifest(tmp_path: Path) -> None:
    said, stored = published(str(tmp_path), files=2, sources=MOST_INLINE - 4)
    assert stored == said
    assert stored.file_lists is None
    assert not Path(layout.version_uri(str(tmp_path), DATASET, 1), LISTS).exists()


def test_a_commit_that_is_made_again_gives_the_same_manifest(tmp_path: Path) -> None:
    held = versions.reserve(str(tmp_path), DATASET, "run")
    said = manifest_of(held, written(held, 2)).model_copy(update={"inputs": inputs(MOST_INLINE)})
    assert versions.commit(held, said) == versions.commit(held, said)


def test_lists_that_were_altered_or_are_gone_damage_the_manifest(tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, "first")
    held = versions.reserve(root, DATASET, "second")
    said = manifest_of(held, written(held, 2)).model_copy(update={"inputs": inputs(MOST_INLINE)})
    versions.commit(held, said)
    lists = Path(layout.version_uri(root, DATASET, 2), LISTS)
    whole = lists.read_bytes()
    lists.write_bytes(whole[:-9] + bytes(9))
    with pytest.raises(DamagedManifest, match=r"its lists of files, _files/part.*aren't those.*restore the file"):
        versions.read_manifest(root, DATASET, 2)
    lists.unlink()
    with pytest.raises(DamagedManifest, match=r"its lists of files, _files/part.*are missing"):
        versions.read_manifest(root, DATASET, 2)
    latest = versions.latest(root, DATASET)
    assert latest is not None
    assert latest.version == 1
    lists.write_bytes(whole)
    assert versions.resolve(root, DATASET).version == 2


def test_a_rejected_version_keeps_its_lists(tmp_path: Path) -> None:
    root = str(tmp_path)
    held = versions.reserve(root, DATASET, "run")
    said = manifest_of(held, written(held, 2), status="rejected", verdict="fail")
    stored = versions.commit(held, said.model_copy(update={"inputs": inputs(MOST_INLINE)}))
    assert versions.read_manifest(root, DATASET, 1) == stored
    assert [file.path for file in stored.files] == [file.path for file in said.files]
    versions.verify(root, stored)


def test_a_pruned_version_leaves_no_lists(tmp_path: Path) -> None:
    root = str(tmp_path)
    published(root)
    for number in range(3):
        publish(root, f"later-{number}")
    retention.prune(root, retention.prunable(root, DATASET, keep=1))
    assert not Path(layout.version_uri(root, DATASET, 1), LISTS).exists()


def test_a_file_outside_of_the_version_is_no_file_of_it(tmp_path: Path) -> None:
    said, _ = published(str(tmp_path))
    outside = said.files[0].model_copy(update={"path": "../v9/part-00000-a1.parquet"})
    stated, data = lists_apart(said.model_copy(update={"files": (outside, *said.files[1:])}))
    assert stated.file_lists is not None
    storage.write_bytes(layout.join(str(tmp_path), stated.file_lists.path), data)
    with pytest.raises(ValueError, match="inside of its directory"):
        with_lists(str(tmp_path), stated)


def test_missing_lists_are_named_when_a_version_is_verified(tmp_path: Path) -> None:
    root = str(tmp_path)
    _, stored = published(root)
    Path(layout.version_uri(root, DATASET, 1), LISTS).unlink()
    with pytest.raises(CorruptVersion, match=r"_files/part-00000-a1.parquet is missing"):
        versions.verify(root, stored)
