"""Published data that was cut, altered, swapped or added to since: who notices, when, and in what words.

| reader | notices |
|---|---|
| `read_table` | another size or number of rows; with `verify`, any byte |
| `versions.verify`, training-delivery | any byte of any file that the manifest lists |
| `TrainingStream`, `read_version` (Ray) | another size at opening, any byte when its batch is first read |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.source import check_digests, find_source, read_units
from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, PipelineError
from tasks.loader.shards import open_version
from tasks.loader.stream import TrainingStream
from tasks.loader.version_files import MappedFile
from tasks.store import layout, versions
from tests.delivery.making import damage, image_version, table_version
from tests.delivery.sources import FEATURES, IMAGES, configured, publish_customers, publish_pictures
from tests.store.publishing import DATASET, publish
from tests.tables import Proven

FLOW, COMMIT = "training-delivery", "publishing"


def place(root: Path, dataset: str = DATASET, version: int = 1) -> Path:
    return Path(layout.version_uri(str(root), dataset, version))


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, as somebody with an editor would."""
    path = directory / layout.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def setter(*keys: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


FIELDS = [
    "format",
    "dataset",
    "version",
    "status",
    "created_at",
    "files",
    "columns",
    "balances",
    "profile",
    "gate",
    "inputs",
    "config",
    "code_digest",
    "packages",
    "run",
]
WRONG = [None, [], {}, "x", -1, 1.5, True, [None], {"x": None}, "\0", 10**30]


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_of_a_manifest_is_what_it_must_be(tmp_path: Path, field: str, proven: Proven) -> None:
    """Missing, or of another type or value: an error of ours that names the file; never a guess."""
    publish(str(tmp_path), "run")
    directory = place(tmp_path)
    whole = (directory / layout.MANIFEST).read_text()
    assert field in json.loads(whole)

    def read() -> None:
        versions.read_table(str(tmp_path), DATASET, verify=True)
        versions.latest(str(tmp_path), DATASET)

    refused = 0
    for value in [*WRONG, "gone"]:
        content = json.loads(whole)
        if value == "gone":
            del content[field]
        else:
            content[field] = value
        (directory / layout.MANIFEST).write_text(json.dumps(content))
        try:
            read()
        except PipelineError as fault:
            named = layout.MANIFEST in str(fault) or "v1" in str(fault)
            assert named, fault  # noqa: PT017 - which values are refused is counted below
            refused += 1
    free = {"config": 2, "profile": 1, "packages": 1, "code_digest": 2, "balances": 1, "inputs": 1, "columns": 1}
    # Earlier formats; numbers are seconds since 1970; true is 1.
    may = {"format": 3, "created_at": 2, "version": 1}
    assert refused >= len(WRONG) + 1 - free.get(field, 0) - may.get(field, 0), f"{field}: {refused} refused"
    proven("manifest with a field missing or of another kind", COMMIT, "CorruptVersion that names the file")


CUTS = [0, 1, 0.3, 0.9, 0.999]


@pytest.mark.parametrize("share", CUTS)
def test_a_manifest_that_is_cut_or_no_manifest(tmp_path: Path, share: float, proven: Proven) -> None:
    version = Path(table_version(str(tmp_path), 30))
    path = version / layout.MANIFEST
    whole = path.read_bytes()
    odd = [
        whole[: int(share * len(whole))] if share < 1 else whole[:1],
        whole.decode().encode("utf-16"),
        b"[" * 100_000,
    ]
    for data in [*odd, b"\x1f\x8b" + whole, b"null", b'{"format": 1}', whole + b"x", whole.replace(b"}", b"", 1)]:
        path.write_bytes(data)
        with pytest.raises(CorruptVersion, match=r"_manifest.json can't be read as a manifest .*publish a new version"):
            TrainingStream(str(version), batch_size=10)
    proven("manifest cut short or no JSON", FLOW, "CorruptVersion that names the file")


ELSEWHERE = ["../v2/part-00000-a1.parquet", "/etc/passwd", "s3://bucket/x.parquet", "a\\b", "a//b", "./a", ""]


@pytest.mark.parametrize("path", ELSEWHERE)
@pytest.mark.parametrize("kind", ["files", "rejected_files", "side_files"])
def test_a_manifest_that_lists_files_elsewhere(tmp_path: Path, path: str, kind: str, proven: Proven) -> None:
    publish(str(tmp_path), "run")
    publish(str(tmp_path), "another")
    rewrite(place(tmp_path), lambda content: content.update({kind: [{**content["files"][0], "path": path}]}))
    for read in (versions.read_table, versions.resolve):
        with pytest.raises(CorruptVersion, match=r"_manifest.json can't be read as a manifest .*1 validation error"):
            read(str(tmp_path), DATASET, 1)
    proven("manifest that lists a file outside of its directory", COMMIT, "CorruptVersion, nothing is opened")


DEFINITIONS = {
    "a kind that there isn't": setter("definition", "kind", value="video"),
    "no batches": setter("definition", "batch_size", value=0),
    "a size that is a word": setter("definition", "batch_size", value="ten"),
    "samples of no files": setter("definition", "samples", value={}),
    "more samples than there are": setter("definition", "samples", "train", value=31),
    "samples that are a list": setter("definition", "samples", value=[30]),
    "features that are missing": lambda content: content["definition"].pop("feature_count"),
    "a label of no kind": setter("definition", "label", value={}),
    "no constants to normalise by": setter("definition", "normalise", value={}),
    "constants that don't belong together": setter("definition", "normalise", "mean", value=[0.0]),
    "fewer rows than samples": setter("files", 0, "rows", value=29),
}


@pytest.mark.parametrize("change", DEFINITIONS.values(), ids=DEFINITIONS)
def test_a_definition_that_contradicts_itself(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], proven: Proven
) -> None:
    version = table_version(str(tmp_path), 30)
    rewrite(Path(version), change)
    with pytest.raises(CorruptVersion, match=r"/v1: its manifest contradicts itself: .*: publish a new version"):
        open_version(version)
    proven("manifest that contradicts itself", FLOW, "CorruptVersion that says what")


def test_a_definition_of_another_shape_is_noticed_in_the_files(tmp_path: Path, proven: Proven) -> None:
    version = table_version(str(tmp_path), 30)
    rewrite(Path(version), setter("definition", "feature_count", value=4))
    with pytest.raises(CorruptVersion, match=r"'features': \(\(3,\), 'float32'\).*as its manifest says"):
        TrainingStream(version, batch_size=10)
    proven("manifest that contradicts its files", FLOW, "CorruptVersion that names the column")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(bytes(data))


def test_any_byte_is_noticed_by_who_verifies(tmp_path: Path, proven: Proven) -> None:
    manifest = publish(str(tmp_path), "run")
    path = place(tmp_path) / manifest.files[0].path
    whole = path.read_bytes()
    for at in np.linspace(0, len(whole) - 1, 40).astype(int).tolist():
        flip(path, at)
        with pytest.raises(CorruptVersion, match=r"part-00000-a1.parquet: digests differ from its manifest: expected"):
            versions.verify(str(tmp_path), manifest)
        with pytest.raises(CorruptVersion, match=r"digests differ"):
            versions.read_table(str(tmp_path), DATASET, verify=True)
        path.write_bytes(whole)
    versions.verify(str(tmp_path), manifest)
    proven("one byte of a data file changed", COMMIT, "CorruptVersion by verify, whichever byte")


def looked_at(config: DeliveryConfig) -> None:
    for unit in read_units(find_source(config), 2000):
        check_digests(unit)


@pytest.mark.parametrize("kind", ["features", "images"])
def test_any_byte_of_its_source_stops_the_delivery(tmp_path: Path, kind: str, proven: Proven) -> None:
    """Raw pixels and numbers would pass Parquet's reader, and reach the model."""
    if kind == "features":
        publish_customers(str(tmp_path), rows=60, files=2)
    else:
        publish_pictures(str(tmp_path), train=20, validation=10)
    config = configured(str(tmp_path), dataset=FEATURES if kind == "features" else IMAGES)
    source = find_source(config)
    looked_at(config)
    path = Path(source.files[1].uri)
    whole = path.read_bytes()
    silent = 0
    for at in np.linspace(4, len(whole) - 9, 30).astype(int).tolist():
        flip(path, at)
        with pytest.raises(CorruptVersion, match=rf"{path.name}.*: publish a new version"):
            looked_at(config)
        try:
            pq.read_table(path)
            silent += 1
        except Exception:  # noqa: BLE001 - whatever Parquet says of damage
            pass
        path.write_bytes(whole)
    assert silent, "every change was noticed by Parquet itself: the test shows nothing"
    proven("one byte of the source changed", FLOW, "CorruptVersion before anything is written")


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_on_a_changed_source_publishes_nothing(tmp_path: Path, proven: Proven) -> None:
    from tests.delivery.test_pipeline import deliver

    publish_pictures(str(tmp_path), train=20, validation=10)
    path = Path(find_source(configured(str(tmp_path), dataset=IMAGES)).files[0].uri)
    flip(path, 100)
    with pytest.raises(CorruptVersion, match=r"digests differ from its manifest: expected blake3:"):
        deliver(str(tmp_path), dataset=IMAGES)
    assert versions.published_versions(str(tmp_path), "training-datasets/streaming-ready/images") == []
    proven("one byte of the source changed", FLOW, "CorruptVersion before anything is written")


@pytest.mark.usefixtures("ray_cluster")
def test_a_changed_sample_reaches_neither_a_stream_nor_ray(tmp_path: Path, proven: Proven) -> None:
    from tasks.loader.dataset import read_version

    version = image_version(str(tmp_path), 20)
    path = "split=train/part-00000-a1.parquet"
    with (Path(version) / path).open("rb") as file:
        raw = MappedFile(file, path).columns["label"]
    damage(version, path, int(raw.offsets[1]) + raw.spec.width)
    with (
        TrainingStream(version, batch_size=5) as stream,
        pytest.raises(CorruptVersion, match=f"{path}: batch 8 has not the checksum in the footer: publish"),
    ):
        list(stream)
    with pytest.raises(Exception, match=r"CorruptVersion.*batch 8 has not the checksum in the footer"):
        read_version(version, columns=["sample_id"]).to_pandas()
    assert len(read_version(version, columns=["sample_id"], verify=False).to_pandas()) == 20
    proven("one byte of a sample changed", FLOW, "CorruptVersion by the stream and by Ray when it is read; or skipped")


def test_a_changed_file_of_s3_is_noticed_as_it_is_fetched(s3_root: str, tmp_path: Path, proven: Proven) -> None:
    version = image_version(s3_root, 20)
    path = f"{version}/split=train/part-00000-a1.parquet"
    data = bytearray(storage.read_bytes(path))
    data[len(data) // 2] ^= 1
    storage.write_bytes(path, bytes(data))
    with (
        TrainingStream(version, batch_size=5, cache_dir=tmp_path / "cache") as stream,
        pytest.raises(CorruptVersion, match=r"differs from its manifest: expected .* bytes of blake3:"),
    ):
        list(stream)
    proven("one byte of a shard on S3 changed", FLOW, "CorruptVersion as it is fetched")


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_that_is_gone_is_named_by_every_reader(tmp_path: Path, proven: Proven) -> None:
    from tasks.loader.dataset import read_version

    version = table_version(str(tmp_path), 30, 30)
    name = "split=train/part-00001-a1.parquet"
    (Path(version) / name).unlink()
    manifest = open_version(version).manifest
    for read in (
        lambda: TrainingStream(version, batch_size=10),
        lambda: read_version(version),
        lambda: versions.verify(str(tmp_path), manifest),
        lambda: versions.read_table(str(tmp_path), manifest.dataset),
    ):
        with pytest.raises(
            CorruptVersion, match=f"{name} is missing, but its manifest lists it: publish a new version"
        ):
            read()
    with TrainingStream(version, batch_size=10, on_corrupt="skip") as stream:
        assert sum(int(batch["mask"].sum()) for batch in stream) == 30
        assert stream.stats.skipped_files == 1
    proven("shard deleted", FLOW, "CorruptVersion at opening; or skipped and counted")


def test_a_source_file_that_is_gone_or_longer_is_named(tmp_path: Path, proven: Proven) -> None:
    publish_customers(str(tmp_path), rows=30, files=2)
    path = place(tmp_path, FEATURES) / "part-00001-a1.parquet"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(CorruptVersion, match=r"part-00001-a1.parquet is missing, but its manifest lists it"):
        find_source(configured(str(tmp_path)))
    shutil.copy(path.with_name("part-00000-a1.parquet"), path)
    if path.stat().st_size != len(whole):
        with pytest.raises(CorruptVersion, match=r"part-00001-a1.parquet: bytes differ from its manifest"):
            find_source(configured(str(tmp_path)))
    proven("source file deleted or replaced", FLOW, "CorruptVersion before any work")


def test_a_source_file_of_another_version_is_noticed(tmp_path: Path, proven: Proven) -> None:
    """Same name, schema, rows and size: only the digest tells."""
    for seed in (1, 2):
        publish_pictures(str(tmp_path), train=20, validation=10)
        del seed
    first, second = (place(tmp_path, IMAGES, number) for number in (1, 2))
    name = "split=train/part-00000-a1.parquet"
    other = bytearray((first / name).read_bytes())
    other[50] ^= 1
    (second / name).write_bytes(bytes(other))
    config = configured(str(tmp_path), dataset=IMAGES)
    with pytest.raises(CorruptVersion, match=r"v2/split=train/part-00000-a1.parquet: digests differ"):
        looked_at(config)
    proven("shard replaced by another version's", FLOW, "CorruptVersion: digests differ")


def test_files_that_no_manifest_lists_are_nobodys(tmp_path: Path, proven: Proven) -> None:
    version = table_version(str(tmp_path), 30)
    directory = Path(version) / "split=train"
    shutil.copy(directory / "part-00000-a1.parquet", directory / "part-00001-a1.parquet")
    (directory / "notes.txt").write_text("x")
    (Path(version) / "stray.parquet").write_bytes(b"PAR1")
    manifest = open_version(version).manifest
    versions.verify(str(tmp_path), manifest)
    with TrainingStream(version, batch_size=10) as stream:
        assert sum(int(batch["mask"].sum()) for batch in stream) == 30
    publish_customers(str(tmp_path), rows=30, files=1)
    extra = place(tmp_path, FEATURES)
    shutil.copy(extra / "part-00000-a1.parquet", extra / "part-00009-a1.parquet")
    assert versions.read_table(str(tmp_path), FEATURES).num_rows == 30
    assert len(find_source(configured(str(tmp_path))).files) == 1
    proven("files added to a version's directory", FLOW, "not read by any reader")


@pytest.mark.parametrize("harm", ["gone", "cut", "swapped"])
def test_the_feature_store_says_what_is_wrong(tmp_path: Path, harm: str, proven: Proven) -> None:
    from tasks.serving.feature_store import FeatureStore

    publish_customers(str(tmp_path), rows=60, files=1, row_group=60)
    path = place(tmp_path, FEATURES) / "part-00000-a1.parquet"
    data = path.read_bytes()
    match harm:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "swapped":
            path.write_bytes(b"something else")
    with pytest.raises(PipelineError, match=r"part-00000-a1.parquet"):
        FeatureStore(str(tmp_path)).get_online_features(
            ["customer-features:visits"], [{"customer_id": 7}, {"customer_id": 14}]
        )
    with pytest.raises(CorruptVersion, match=r"part-00000-a1.parquet"):
        versions.read_table(str(tmp_path), FEATURES)
    proven("feature file deleted, cut or no Parquet", COMMIT, "CorruptVersion that names the file")


def test_a_place_that_is_no_version(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="is no streaming-ready version"):
        open_version(str(tmp_path / "data"))
