"""Replays where inputs are gone, changed, kept elsewhere or newer; on S3; and what the command prints and refuses."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tasks.audit.replay_rows import choose, differences, same
from tasks.cli import commands
from tasks.cli.audit_commands import ALARM
from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.images.duplicates import perceptual_hash
from tasks.io import storage
from tasks.store.versions import withdraw
from tests.audit.replay_store import (
    CHURN,
    COPY,
    CUSTOMERS,
    DEMAND,
    IMAGES,
    PRODUCTS,
    Store,
    changed,
    feature_settings,
    make_copy,
    make_features,
    read,
)
from tests.audit.replayed import (  # noqa: F401 - fixtures
    Replay,
    put_back_afterwards,
    replaying,
)

PICTURES_AT = "samples/image-augmentation/30-7"


def picture_of(store: Store, image: str) -> Path:
    [found] = Path(store.root, PICTURES_AT, "images").glob(f"{image}.*")
    return found


def test_an_image_that_changed_differs_alone(store: Store, replay: Replay) -> None:
    file = picture_of(store, "img-000003")
    pixels = np.asarray(Image.open(file).convert("RGB")) // 2
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    file.write_bytes(data.getvalue())
    found = replay(store, IMAGES)
    assert found.code == 1
    assert list(found.differing) == ["img-000003"]
    assert f"the input {file} has changed" in found.reasons
    assert {"image", "content_xxh3", "format", "perceptual_hash"} <= found.columns
    assert ALARM.text not in found.reasons


def test_an_image_that_is_gone_or_damaged_cant_be_made_again(store: Store, replay: Replay) -> None:
    gone, damaged = picture_of(store, "img-000003"), picture_of(store, "img-000004")
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:100])
    found = replay(store, IMAGES)
    assert set(found.differing) == {"img-000003", "img-000004"}
    texts = {name: str(row["reasons"]) for name, row in found.differing.items()}
    assert f"the input {gone} is rejected now (unreadable: " in texts["img-000003"]
    assert f"the input {damaged} is rejected now (" in texts["img-000004"]
    shutil.rmtree(gone.parent)
    found = replay(store, IMAGES)
    assert len(found.differing) == found.values["total"]
    assert any("can't be listed and labelled again" in note for note in found.values["notes"])


def test_images_whose_times_alone_changed_are_the_same(store: Store, replay: Replay) -> None:
    picture_of(store, "img-000003").touch()
    found = replay(store, IMAGES)
    assert found.code == 0
    [cause] = found.values["changed"]
    assert "aren't the same files, sizes and times as they were" in cause["text"]


def test_a_changed_label_explains_the_class_and_not_the_pixels(
    store: Store, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{store.root}/{PICTURES_AT}/labels.csv"
    lines = storage.read_bytes(uri).decode().splitlines()
    image, was = next(line.split(",") for line in lines if line.startswith("img-000003"))
    other = next(name for line in lines[1:] if (name := line.split(",")[1]) != was)
    text = "\n".join(f"{image},{other}" if line.startswith(image) else line for line in lines)
    storage.write_bytes(uri, text.encode())
    found = replay(store, IMAGES)
    assert list(found.differing) == ["img-000003"]
    assert found.columns == {"class_name", "class_id", "one_hot_label"}
    [reason] = found.reasons
    assert reason.startswith(f"an input of 'labels' changed: {uri} has changed")

    monkeypatch.setattr("tasks.images.augment.perceptual_hash", _another_hash)
    assert ALARM.text in replay(store, IMAGES).reasons


def _another_hash(pixels: Any) -> tuple[Any, ...]:
    found, *others = perceptual_hash(pixels)
    return (found ^ 1, *others)


def test_a_table_of_originals_that_was_altered_is_found(store: Store, replay: Replay) -> None:
    [entry] = store.manifest(IMAGES).side_files
    uri = store.uri(IMAGES, entry.path)
    written = storage.write_parquet(changed(read(uri), "mean_score", 5, 0.25), uri)
    assert {"stored"} == replay(store, IMAGES).kinds
    store.admit(IMAGES, entry, bytes=written.bytes, digest=written.digest)
    found = replay(store, IMAGES)
    assert (found.columns, found.reasons, len(found.differing)) == ({"mean_score"}, {ALARM.text}, 1)
    storage.write_parquet(changed(read(uri), "split", 5, "test"), uri)
    assert len(replay(store, IMAGES, sample=30).differing) > 0


def test_an_image_made_on_a_gpu_is_made_again_as_well_as_can_be(store: Store, replay: Replay) -> None:
    manifest = store.manifest(IMAGES)
    store.edit_manifest(IMAGES, config={**manifest.config, "num_gpus": 1.0})
    found = replay(store, IMAGES, sample=4)
    assert any(note.startswith("made on a GPU, made again on") for note in found.values["notes"])
    assert found.kinds <= {"device"}


# Versions that stand upon others


@pytest.fixture
def daily(ray_cluster: None, tmp_path: Path) -> Store:
    """Two incremental versions, of which the second reads one file alone."""
    store = Store(str(tmp_path / "daily"))
    config = feature_settings(store, incremental=True, as_of=("2024-10-01",))
    late = store.source("transactions/c.parquet")
    table = read(late)
    storage.delete(late)
    make_features(store.root, config)
    storage.write_parquet(table, late)
    make_features(store.root, config.model_copy(update={"as_of": ("2024-11-01", "2024-12-01")}))
    return store


def test_events_that_versions_have_kept_stand_in_for_files_that_are_gone(daily: Store, replay: Replay) -> None:
    assert daily.manifest(CUSTOMERS, 2).definition["state"]["parent"] == 1
    for version in (1, 2):
        assert replay(daily, CUSTOMERS, version).code == 0
        assert replay(daily, PRODUCTS, version).code == 0
    storage.delete(daily.source("transactions/a.parquet"))
    late = daily.source("transactions/c.parquet")
    storage.write_parquet(changed(read(late), "amount", 7, 1e6), late)
    found = replay(daily, CUSTOMERS, 2)
    assert found.code == 0, found.differing
    assert len(found.values["changed"]) == 2
    assert found.values["notes"] == [
        "events of files that aren't there as they were are taken from those that v1, v2 kept"
    ]
    entry = daily.manifest(CUSTOMERS).side_files[0]
    uri = daily.uri(CUSTOMERS, entry.path)
    storage.write_parquet(changed(read(uri), "amount", 0, 1e6), uri)
    found = replay(daily, CUSTOMERS, 2)
    assert found.code == 1
    assert any(text.startswith(f"of v1: the stored file {entry.path} was altered") for text in found.reasons)


def test_what_was_published_or_withdrawn_since_makes_no_difference(store: Store, replay: Replay) -> None:
    config = feature_settings(store, as_of=("2024-11-15",))
    make_features(store.root, config)
    withdraw(store.root, CUSTOMERS, 1, "a test", by="a test")
    withdraw(store.root, CHURN, 1, "a test", by="a test")
    for dataset in (CHURN, DEMAND, COPY, CUSTOMERS):
        found = replay(store, dataset)
        assert found.code == 0, found.differing
    assert replay(store, CUSTOMERS, 2).code == 0


def test_features_of_one_time_are_scored_by_the_profiles_quartiles(store: Store, replay: Replay) -> None:
    make_features(store.root, feature_settings(store, as_of=("2024-12-15",)))
    found = replay(store, CUSTOMERS, 2)
    assert found.code == 0, found.differing
    assert any(
        value
        for value in read(store.uri(CUSTOMERS, store.manifest(CUSTOMERS, 2).files[0].path, 2))[
            "outlier_ratio"
        ].to_pylist()
    )


def test_on_s3_inputs_are_compared_by_their_etag(ray_cluster: None, s3_root: str, replay: Replay) -> None:
    store = Store(s3_root)
    make_features(s3_root, feature_settings(store, rows=600, as_of=("2024-12-15",)))
    plain = TrainingConfig(enabled=False)
    make_copy(s3_root, DeliveryConfig(root=s3_root, dataset=CUSTOMERS, ready_only=False, training=plain))
    copy = "training-datasets/streaming-ready/customer-features"
    assert [replay(store, name).code for name in (CUSTOMERS, PRODUCTS, copy)] == [0, 0, 0]
    uri = store.source("transactions/a.parquet")
    storage.write_parquet(changed(read(uri), "amount", 3, 1e6), uri)
    found = replay(store, CUSTOMERS)
    assert found.code == 1
    [reason] = found.reasons
    assert reason.startswith(f"an input of 'transactions' changed: {uri} has changed (etag:")


# The command


def test_the_answer_as_text(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["replay", "product-features", "v1", "--sample", "1000", "--root", store.root]
    assert commands.run(command) == 0
    out = capsys.readouterr().out
    rows = store.manifest(PRODUCTS).rows
    assert f"replayed  {rows} of {rows} rows, seed 0" in out
    assert "made by   code and libraries are the same" in out
    entry = store.manifest(PRODUCTS).files[0]
    product = store.table(PRODUCTS, entry)["product_id"][0].as_py()
    store.rewrite(PRODUCTS, entry, "total_sales", 0, 123_456, hide=True)
    assert commands.run(command) == 1
    out = capsys.readouterr().out
    assert "differ    1" in out
    [line] = [line for line in out.splitlines() if line.startswith(f"product_id {product} as of ")]
    assert " total_sales  123456 " in line
    assert [line for line in out.splitlines() if line.startswith(ALARM.text)]


def test_what_cant_be_replayed_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> tuple[int, str]:
        code = commands.run(["replay", *words, "--root", store.root])
        return code, capsys.readouterr().err

    code, err = refused("custmer-features", "v1")
    assert (code, "did you mean 'customer-features'" in err) == (1, True)
    code, err = refused(CUSTOMERS, "v9")
    assert (code, "has no version v9" in err) == (1, True)
    store.edit_manifest(CUSTOMERS, status="rejected")
    code, err = refused(CUSTOMERS, "v1")
    assert (code, "v1 was rejected" in err) == (1, True)
    config = store.manifest(PRODUCTS).config
    store.edit_manifest(PRODUCTS, config={**config, "as_of_time": "no setting"})
    code, err = refused(PRODUCTS, "v1")
    assert (code, "this code can't use its configuration (as_of_time: " in err) == (2, True)


# Values


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (0.0, -0.0, False),
        (math.nan, -math.nan, True),
        (0.1 + 0.2, 0.3, False),
        (1, True, False),
        (1, 1.0, False),
        (None, None, True),
        (None, math.nan, False),
        ([1.0, math.nan], [1.0, math.nan], True),
        (["a"], ["a", "b"], False),
    ],
)
def test_values_are_the_same_to_the_last_bit(one: Any, other: Any, equal: bool) -> None:
    assert same(one, other) is equal


def test_differences_name_column_types_and_missing_rows() -> None:
    stored = pa.table({"key": [1, 2, 3], "x": [1.0, 2.0, 3.0], "old": ["a", "b", "c"]})
    rebuilt = pa.table({"key": [3, 1], "x": pa.array([3, 1], pa.int64()), "new": [1, 2]})
    first, second, third = differences(stored, rebuilt, [1, None, 0])
    assert [(one.column, one.stored, one.rebuilt) for one in first] == [
        ("x", "double", "int64"),
        ("old", "string", "no column"),
        ("new", "no column", "int64"),
    ]
    assert [one.column for one in second] == ["(row)"]
    assert first == third


def test_a_sample_is_a_set_of_rows_that_its_seed_decides() -> None:
    assert choose(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    chosen = choose(10**9, 1000, 3)
    assert len(set(chosen.tolist())) == 1000
    assert (np.diff(chosen) > 0).all()
    assert choose(10**9, 1000, 3).tolist() == chosen.tolist() != choose(10**9, 1000, 4).tolist()
