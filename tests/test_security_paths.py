"""Names and files that were given or read lead nowhere but where they belong, and nothing in them is run.

What the product makes of names, links, locations and files that try; the rules over the source text are in
test_security_source.py.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.delivery.config import DeliveryConfig
from tasks.features.config import FeatureStoreConfig
from tasks.features.loading import load_definitions
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.labels import read_labels
from tasks.images.sources import list_images
from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, DefinitionError, PipelineError, SourceError
from tasks.loader.cache import OWN_DIRECTORY, TAG, FileCache
from tasks.loader.shards import open_version
from tasks.store import layout, versions
from tasks.store.manifest import FileEntry
from tasks.store.retention import prunable, prune
from tasks.store.versions import withdraw
from tasks.training.trainer import STATE, load_function, read_state
from tasks.training_sets.definition import FeatureReference, load_models
from tests.delivery.making import table_version
from tests.store import publishing

# --- names

ESCAPES = [
    *("../x", "x/../../y", "/etc/passwd", "s3://other/x", "file:///etc/passwd", "..", ".", "", "a//b", "a/", "./a"),
    *("a\\b", "..\\x", "a\nb", "a\0b", "a\x7fb", "a?versionId=1"),
]


@pytest.mark.parametrize("path", ESCAPES)
def test_a_manifest_lists_no_file_outside_of_its_version(path: str) -> None:
    digest = "blake3:" + "0" * 64
    with pytest.raises(ValidationError, match="a version's files are inside of its directory"):
        FileEntry(path=path, rows=1, bytes=1, digest=digest)
    with pytest.raises(ConfigError, match=r"can't name a dataset, as it .*: give its name below the root"):
        layout.version_uri("/root", path, 1)


@settings(max_examples=300)
@given(st.text(st.sampled_from("ab./\\:%~\0\n ") | st.characters(), max_size=12))
def test_what_a_name_may_be_stays_inside(path: str) -> None:
    if layout.escape_of(path) is None:
        assert storage.normalise(layout.join("/root/x/v1", path)) == f"/root/x/v1/{path}"
        assert storage.normalise(layout.join("s3://bucket/x/v1", path)) == f"s3://bucket/x/v1/{path}"


@pytest.mark.parametrize("dataset", ["../outside", "feature-store/../../outside", "/outside", "a\\b"])
def test_no_dataset_outside_of_the_root_is_read_written_or_deleted(tmp_path: Path, dataset: str) -> None:
    root = str(tmp_path / "store/root")
    publishing.publish(str(tmp_path / "store"), "run", "outside")
    before = sorted(path for path in tmp_path.rglob("*"))
    for act in (
        lambda: versions.reserve(root, dataset, "run"),
        lambda: versions.resolve(root, dataset),
        lambda: versions.read_table(root, dataset, 1),
        lambda: withdraw(root, dataset, 1, "why", "me"),
        lambda: prunable(root, dataset, keep=1),
    ):
        with pytest.raises(ConfigError, match="can't name a dataset"):
            act()
    assert sorted(path for path in tmp_path.rglob("*")) == before


NAMES = ["../x", "a/b", "/x", "..", "A", "a\\b", "s3://b", "a\n", "v1", "", "_x", ".x", "-x"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_configurations_name_one_directory(name: str) -> None:
    for config in (ImageAugmentationConfig, DeliveryConfig):
        with pytest.raises(ValidationError, match=r"can't name a dataset|at least 1"):
            config(name=name)


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", "a\\b", "a b", "a\n", ""])
def test_names_of_groups_and_models_name_one_directory(tmp_path: Path, name: str) -> None:
    group = {"entity": "customer_id", "features": {"n": "COUNT(*)"}}
    model = {"entity": "customer_id", "spine": {"uri": "x.parquet"}, "features": ["customer-features:*"]}
    for load, content in (
        (load_definitions, {"groups": {name: group}}),
        (load_models, {"models": {name: model}}),
    ):
        file = tmp_path / "given.yaml"
        file.write_text(json.dumps(content))  # JSON is YAML
        with pytest.raises(DefinitionError, match="use lower-case letters"):
            load(str(file))


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a\\b", "a\n"])
def test_a_group_that_a_model_names_is_below_the_root(name: str) -> None:
    with pytest.raises(PipelineError, match=r"names no feature|can't name a dataset|no group"):
        versions.resolve("/nowhere", layout.feature_dataset(FeatureReference.parse(f"{name}:x").group))


@pytest.mark.parametrize("path", ["os", "os:", ":system", "../x:y", "os.path:join; import os", "a b:c"])
def test_import_paths_are_nothing_else(path: str) -> None:
    with pytest.raises(ValidationError, match="is no import path"):
        Augmentation(policy=path)
    with pytest.raises(ConfigError, match=r"is no import path|can't import|has no"):
        load_function(path)


# --- links


def test_links_in_a_version_are_never_deleted_through(tmp_path: Path) -> None:
    """A link into somebody's data, left in a version: commit and prune remove the link, or leave it, and no more."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data-a1.parquet").write_text("precious")
    (precious / "plain.txt").write_text("precious")
    root = str(tmp_path / "root")
    reservation = versions.reserve(root, publishing.DATASET, "run")
    files = publishing.write(reservation)
    (Path(reservation.uri) / "linked").symlink_to(precious)
    (Path(reservation.uri) / "one-a1.parquet").symlink_to(precious / "data-a1.parquet")
    versions.commit(reservation, publishing.manifest_of(reservation, files))
    assert not (Path(reservation.uri) / "linked").exists()  # no reader's, so it goes as any stray file does
    assert not (Path(reservation.uri) / "one-a1.parquet").is_symlink()
    (Path(reservation.uri) / "linked").symlink_to(precious)
    publishing.publish(root, "second")
    assert prune(root, prunable(root, publishing.DATASET, keep=1)) > 0
    assert versions.published_versions(root, publishing.DATASET) == [2]
    assert sorted(path.name for path in precious.iterdir()) == ["data-a1.parquet", "plain.txt"]


def test_a_root_may_be_a_link(tmp_path: Path) -> None:
    """Links are the administrator's: they are followed by who reads and writes."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    publishing.publish(str(tmp_path / "root"), "run")
    assert versions.read_table(str(tmp_path / "disk"), publishing.DATASET, verify=True).num_rows == 100


# --- locations


def test_no_location_leads_into_another_bucket(s3_url: str) -> None:
    """Pyarrow opens 's3://one/../two/x' as 'x' in the bucket 'two'."""
    import s3fs

    filesystem = s3fs.S3FileSystem(endpoint_url=s3_url)
    for bucket in ("one-bucket", "two-bucket"):
        filesystem.mkdir(bucket)
    storage.write_bytes("s3://two-bucket/x/secret", b"another's")
    with pytest.raises(ConfigError, match=r"'\.\.', which is a name on S3 and a way up to libraries"):
        storage.open_input("s3://one-bucket/../two-bucket/x/secret")
    filesystem_of_arrow, _ = storage.arrow_filesystem("s3://one-bucket")
    with filesystem_of_arrow.open_input_file("one-bucket/../two-bucket/x/secret") as file:
        assert file.read() == b"another's"  # if this fails, the library has mended it


def test_locations_are_taken_literally(root: str) -> None:
    """Percent signs, question marks and line ends are characters of a name like all others."""
    names = ["a%2F..%2Fb", "a?b=c", "a#b", "..a", "a..", "~a", "$HOME", "a;b"]
    names += [] if root.startswith("s3:") else ["a\nb"]  # moto has no such keys
    for name in names:
        storage.write_bytes(layout.join(root, name), name.encode())
    assert {info.uri for info in storage.list_files(root, include_hidden=True)} == {f"{root}/{n}" for n in names}
    assert [storage.read_bytes(f"{root}/{name}") for name in names] == [name.encode() for name in names]


def test_images_whose_keys_libraries_would_misread_are_rejected(s3_root: str) -> None:
    import s3fs

    filesystem = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    storage.write_bytes(f"{s3_root}/cats/1.png", b"x")
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    key = f"{prefix}/cats/1.png?versionId=2"
    filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=b"y")
    listing = list_images(s3_root)
    assert listing.table["path"].to_pylist() == ["cats/1.png"]
    assert listing.rejected.select(["path", "reason"]).to_pylist() == [
        {"path": "cats/1.png?versionId=2", "reason": "bad_name"}
    ]


# --- deserialisation


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / STATE)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read_state(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def pickled_column(place: Path) -> pa.Array:
    """A column of Ray Data's type for Python objects, whose values are traps."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    kind: Any = ArrowPythonObjectType()
    return kind.wrap_array(pa.array([pickle.dumps(Trap(place))] * 3, pa.large_binary()))


def test_pickles_in_parquet_files_are_never_loaded(tmp_path: Path) -> None:
    """Ray Data registers a type for pickled Python objects; any file may say that a column is of it."""
    from tasks.features.sources import inspect, read, read_units

    column = pickled_column(tmp_path / "sprung")
    column[0].as_py()  # the trap works: whoever asks for a value springs it
    assert (tmp_path / "sprung").exists()
    (tmp_path / "sprung").rmdir()
    file = tmp_path / "evil.parquet"
    pq.write_table(pa.table({"image_id": column, "class_name": ["a", "b", "c"]}), file)
    with pytest.raises(SourceError, match=r"column 'image_id' of type .* can't be read as text"):
        read_labels(str(file), "image_id", "class_name")
    source = inspect("transactions", str(file))
    for unit in read_units(source, ["image_id", "class_name"], 10):
        for rows in read(unit):
            assert rows.frame.height == 3
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "sql",
    [
        "(SELECT * FROM read_csv('{file}'))",
        "amount IN (SELECT x FROM read_csv('{file}'))",
        "amount IN (FROM read_csv('{file}'))",
        "EXISTS (SeLeCt 1 FROM read_csv('{file}'))",
        "amount = ANY( select x from scan_parquet('{file}'))",
        "$$'$$ || (SELECT x FROM read_csv('{file}')) || $$'$$",
        "amount IN (/* */ FROM read_csv('{file}'))",
        "'\\' || (SELECT x FROM read_csv('{file}')) || '",
    ],
)
def test_definitions_read_no_file(tmp_path: Path, sql: str) -> None:
    """Polars would read it while it parses."""
    secret = tmp_path / "secret.csv"
    secret.write_text("the-secret-header\n1\n")
    text = sql.format(file=secret)
    for load, content in (
        (load_definitions, {"groups": {"g": {"entity": "customer_id", "features": {"n": text}}}}),
        (
            load_models,
            {
                "labels": {"l": {"entity": "customer_id", "at": ["2024-01-31"], "days": 1, "target": text}},
                "models": {"m": {"label": "l", "features": ["customer-features:*"]}},
            },
        ),
    ):
        file = tmp_path / "given.yaml"
        file.write_text(json.dumps(content))
        with pytest.raises(DefinitionError, match=r"has a subquery or names a file: write an expression") as caught:
            load(str(file))
        assert "the-secret-header" not in str(caught.value)


def test_polars_would_have_read_it(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("the-secret-header\n1\n")
    with pytest.raises(pl.exceptions.PolarsError, match="the-secret-header"):
        pl.sql_expr(f"amount IN (SELECT x FROM read_csv('{tmp_path}/secret.csv'))")


def test_sql_that_is_only_like_a_subquery_is_taken(tmp_path: Path) -> None:
    features = {
        "a": "SUM(amount) FILTER (WHERE category = 'select (from)')",
        "b": "EXTRACT(YEAR FROM MAX(timestamp))",
        "c": 'SUM("select")',
        "d": "COUNT(*)",
        "e": "MAX(selected)",
    }
    file = tmp_path / "given.yaml"
    file.write_text(json.dumps({"groups": {"g": {"entity": "customer_id", "features": features}}}))
    assert list(load_definitions(str(file)).groups["g"].features) == list(features)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir ['{place}']", "!!python/name:os.system ''"])
def test_yaml_makes_no_objects(tmp_path: Path, text: str) -> None:
    file = tmp_path / "given.yaml"
    file.write_text("groups: " + text.format(place=tmp_path / "sprung"))
    for load in (load_definitions, load_models):
        with pytest.raises(DefinitionError, match="is no valid YAML"):
            load(str(file))
    assert not (tmp_path / "sprung").exists()


def test_nothing_that_a_manifest_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config is a record: a policy or a function in it is read by nobody."""
    (tmp_path / "trap_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    version = table_version(str(tmp_path / "root"), 30)
    manifest = open_version(version).manifest
    config = {
        "policy": "trap_module:x",
        "augmentation": {"policy": "trap_module:x"},
        "training": {"function": "trap_module:x"},
        "definitions": str(tmp_path / "trap_module.py"),
    }
    altered = manifest.model_copy(update={"config": config, "definition": {**manifest.definition, **config}})
    Path(version, layout.MANIFEST).write_text(altered.model_dump_json())
    versions.verify(str(tmp_path / "root"), open_version(version).manifest)
    from tasks.loader.stream import TrainingStream

    with TrainingStream(version, batch_size=10) as stream:
        assert len(list(stream)) == 3
    assert not (tmp_path / "sprung").exists()


# --- the cache of the network's files


@pytest.mark.parametrize("digest", ["blake3:../../x", "md5:" + "0" * 32, "blake3:" + "0" * 63 + "/", "../../x", ""])
def test_a_digest_from_the_network_names_no_other_file(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ValidationError, match="String should match pattern"):
        FileEntry(path="a.parquet", rows=1, bytes=1, digest=digest)


def test_a_link_in_the_cache_is_no_file_of_another_size(tmp_path: Path) -> None:
    """What somebody else has put under a file's name isn't taken for it, and isn't overwritten."""
    cache = FileCache(tmp_path / "cache")
    storage.write_bytes(str(tmp_path / "source.parquet"), b"right")
    entry = FileEntry(path="a.parquet", rows=1, bytes=5, digest=storage.digest_of(str(tmp_path / "source.parquet")))
    (tmp_path / "theirs").write_text("theirs, longer")
    (cache.directory / f"{entry.digest.replace(':', '-')}.parquet").symlink_to(tmp_path / "theirs")
    with cache.open(str(tmp_path / "source.parquet"), entry) as file:
        assert file.read() == b"" or file.seek(0) == 0
    assert (tmp_path / "theirs").read_text() == "theirs, longer"


def test_a_download_that_is_something_else_is_named(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "source.parquet"), b"wrong")
    entry = FileEntry(path="a.parquet", rows=1, bytes=5, digest="blake3:" + "0" * 64)
    with pytest.raises(CorruptVersion, match="differs from its manifest: expected 5 bytes of blake3:0000"):
        FileCache(tmp_path / "cache").open(str(tmp_path / "source.parquet"), entry)
    assert [path.name for path in (tmp_path / "cache" / OWN_DIRECTORY).glob("[!.]*")] == [TAG]


def test_credentials_have_no_place_in_a_configuration() -> None:
    for config in (ImageAugmentationConfig, DeliveryConfig, FeatureStoreConfig):
        known = json.dumps(config.model_json_schema()).lower()
        assert not re.search(r'"(password|secret|token|credentials?|access_key\w*)"', known)
