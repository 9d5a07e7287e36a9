"""The training-delivery flow as it runs: a real API, a real Ray, Ray Train, a local disk and S3."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from flows.image_augmentation import image_augmentation
from flows.training_delivery import training_delivery
from tasks.artifacts import read_artifacts
from tasks.delivery.config import DeliveryConfig, DeliveryThresholds, TrainingConfig
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.io import storage
from tasks.io.errors import ConfigError, GateFailed, VersionNotFound
from tasks.loader.stream import TrainingStream
from tasks.publication import committed_version
from tasks.report.report import Report
from tasks.store import layout, versions
from tasks.training.trainer import read_state
from tests.conftest import LOCAL_AND_S3, new_root
from tests.runs import Run, assert_whole
from tests.test_runner import messages

pytestmark = pytest.mark.usefixtures("stack")

COPIES = "training-datasets/streaming-ready"
FEATURES, IMAGES = f"{COPIES}/customer-features", f"{COPIES}/images"
ALONE = TrainingConfig(enabled=False)


@dataclass(frozen=True)
class DeliveryRun(Run):
    """A run of this flow that has ended."""

    def notes(self) -> dict[str, str]:
        [version] = self.published
        return dict(version.notes)


def start(root: str, **settings: object) -> DeliveryRun:
    return DeliveryRun(root, training_delivery(DeliveryConfig(root=root, **settings), return_state=True))


def completed(root: str, **settings: object) -> DeliveryRun:
    return start(root, **settings).completed()


@pytest.fixture(scope="module", params=LOCAL_AND_S3)
def first(request: pytest.FixtureRequest) -> DeliveryRun:
    """A delivery of nothing in particular from an empty root."""
    return completed(new_root(request), name="first", training=ALONE)


@pytest.fixture(scope="module")
def store(first: DeliveryRun) -> str:
    """A root with the features of the sample."""
    return first.root


@pytest.fixture(scope="module")
def tables(store: str, tmp_path_factory: pytest.TempPathFactory) -> DeliveryRun:
    """Customers delivered to two workers."""
    cache = str(tmp_path_factory.mktemp("cache"))
    training = TrainingConfig(epochs=4, batch_size=32, workers=2, cache_dir=cache)
    return completed(store, target="spending_trend", ready_only=False, batch_size=64, training=training)


local = pytest.mark.parametrize("first", ["local"], indirect=True)


@local
def test_on_an_empty_root_the_features_of_the_sample_are_made_first(first: DeliveryRun) -> None:
    names = [version.dataset for version in first.published]
    assert names == ["feature-store/customer-features", "feature-store/product-features", f"{COPIES}/first"]
    assert_whole(first, f"{COPIES}/first")
    assert any("making the features of the sample first" in line for line in messages(first.id))


def test_a_run_publishes_a_whole_copy(tables: DeliveryRun) -> None:
    manifest = assert_whole(tables, FEATURES)
    [version] = tables.published
    source = versions.resolve(tables.root, "feature-store/customer-features")
    [record] = manifest.inputs
    assert (record.name, record.version, record.rows) == (source.dataset, 1, source.rows)
    samples = manifest.definition["samples"]
    assert version.rows == sum(samples.values()) == source.rows
    assert set(samples) == {"train", "validation"}
    assert manifest.definition["label"]["classes"] == ["decreasing", "increasing", "stable"]


def test_the_copy_streams_the_features_of_the_source(tables: DeliveryRun) -> None:
    """Back in their own units, the streamed rows are the source's."""
    manifest = tables.record()
    source = versions.read_table(tables.root, "feature-store/customer-features").to_pandas()
    names = [entry["name"] for entry in manifest.definition["features"]]
    column = names.index("total_spent")
    found = []
    for split in manifest.definition["samples"]:
        with TrainingStream(tables.uri, batch_size=50, split=split, normalise=False) as stream:
            found += [batch["features"][batch["mask"]][:, column].numpy() for batch in stream]
    wanted = np.sort(source["total_spent"].to_numpy(np.float32))
    assert np.array_equal(np.sort(np.concatenate(found)), wanted)


def test_it_trained_on_every_sample(tables: DeliveryRun) -> None:
    run = next(iter(storage.list_directories(layout.training_runs(tables.root, "customer-features"))))
    base = layout.join(layout.training_runs(tables.root, "customer-features"), run)
    report = Report.model_validate_json(storage.read_bytes(layout.join(base, layout.REPORT_JSON)))
    verdicts = {check.name: check for check in report.gate.checks}
    assert verdicts["complete"].verdict == verdicts["consumed"].verdict == "pass", report.gate
    assert verdicts["consumed"].figure == tables.record().definition["samples"]["train"]
    assert verdicts["learned"].verdict == "pass", verdicts["learned"].message
    page = storage.read_bytes(layout.join(base, layout.REPORT_HTML)).decode()
    assert re.search(r"(data|compute)-bound", page)
    assert page.count("data:image/") >= 2, "how it learned, and how it was fed"
    notes = tables.notes()
    assert notes["curves"] == layout.join(base, layout.REPORT_HTML)
    assert re.match(r"4 epochs in \d+ s: .*accuracy 0\.\d+", notes["trained"])
    state = read_state(notes["model"])
    assert state, "the checkpoint is empty"


def test_the_api_has_the_artifacts_of_a_run(tables: DeliveryRun) -> None:
    artifacts = read_artifacts(tables.id)
    by_key = {artifact.key: artifact for artifact in artifacts if artifact.key}
    assert set(by_key) >= {
        "customer-features-streaming-report",
        "customer-features-streaming-checks",
        "customer-features-training-report",
        "customer-features-training-workers",
    }
    report = str(by_key["customer-features-training-report"].data)
    assert "![How it learned](data:image/png;base64," in report
    rows = json.loads(str(by_key["customer-features-training-workers"].data))
    assert [row["worker"] for row in rows] == [0, 1]
    assert sum(row["samples"] for row in rows) == 4 * tables.record().definition["samples"]["train"]
    told = [str(artifact.description) for artifact in artifacts if artifact.type == "progress"]
    assert any(re.search(r"Delivering: ([\d,]+) of \1 rows.*; done", one) for one in told), told
    assert any(re.search(r"Training: 4 of 4 epochs.*; done", one) for one in told), told
    lines = messages(tables.id)
    assert any(line.startswith("Epoch 3: train loss") for line in lines), lines


def test_a_run_that_is_tried_again_takes_its_version_as_it_is(tables: DeliveryRun) -> None:
    again = versions.reserve(tables.root, FEATURES, str(tables.id))
    assert again.committed
    [version] = tables.published
    assert (committed_version(again).uri, committed_version(again).rows) == (version.uri, version.rows)


@local
def test_the_same_input_and_seed_give_the_same_files(store: str) -> None:
    settings: dict[str, object] = {"target": "spending_trend", "name": "again", "ready_only": False, "batch_size": 64}
    one = completed(store, training=ALONE, **settings)
    two = completed(store, training=ALONE, **settings)
    assert two.record().version == one.record().version + 1
    assert [entry.digest for entry in one.record().files] == [entry.digest for entry in two.record().files]
    assert ("drift", "pass") in {(check.name, check.verdict) for check in two.record().gate.checks}


# What a user may get wrong


@local
@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"dataset": "feature-store/customer-feature"}, VersionNotFound, "customer-features"),
        ({"version": 7}, VersionNotFound, "no version v7.*published: v1"),
        ({"target": "spending_tend"}, ConfigError, "no column 'spending_tend'; did you mean 'spending_trend'"),
        (
            {"target": "spending_trend", "training": TrainingConfig(function="no.such.module:train")},
            ConfigError,
            r"can't import 'no\.such\.module'",
        ),
    ],
    ids=["dataset", "version", "target", "function"],
)
def test_mistakes_are_told(store: str, settings: dict[str, object], kind: type[Exception], message: str) -> None:
    start(store, **settings).failed_at_once(kind, message)


@local
def test_a_failed_gate_publishes_nothing(store: str) -> None:
    thresholds = DeliveryThresholds(minimum_samples=10_000_000)
    start(store, target="spending_trend", name="few", thresholds=thresholds).failed_at_once(GateFailed, "few")
    assert versions.published_versions(store, f"{COPIES}/few") == []


# Images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DeliveryRun:
    root = str(tmp_path_factory.mktemp("pictures") / "root")
    augmentation = Augmentation(size=32, scale=(0.5, 1.0))
    image_augmentation(ImageAugmentationConfig(root=root, sample_images=150, augmentation=augmentation))
    training = TrainingConfig(epochs=8, batch_size=16, workers=1)
    return completed(root, dataset="training-datasets/images", ready_only=False, training=training)


def test_images_are_delivered_and_learned(pictures: DeliveryRun) -> None:
    manifest = assert_whole(pictures, IMAGES)
    source = versions.resolve(pictures.root, "training-datasets/images")
    assert manifest.definition["label"]["classes"] == sorted(source.definition["classes"])
    accuracy = re.search(r"accuracy (0\.\d+|1)", pictures.notes()["trained"])
    assert accuracy, pictures.notes()
    assert float(accuracy[1]) > 0.4, "five classes: chance gives 0.2"


def test_images_keep_their_split_and_their_bytes(pictures: DeliveryRun) -> None:
    rows = versions.read_table(pictures.root, "training-datasets/images")
    wanted = sorted(rows["image"].to_pylist())
    found = []
    for split in pictures.record().definition["samples"]:
        with TrainingStream(pictures.uri, batch_size=20, split=split, normalise=False, as_numpy=True) as stream:
            for batch in stream:
                found += [image.tobytes() for image in batch["image"][batch["mask"]]]
    assert sorted(found) == wanted


def test_the_run_can_be_read_by_anybody(pictures: DeliveryRun, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.read_parquet(pictures.uri)
    assert len(frame) == sum(pictures.record().definition["samples"].values())
