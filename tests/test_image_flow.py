"""The image-augmentation flow as it runs: a real API, a real Ray, a local disk and S3."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from torchvision.transforms import v2

from flows.image_augmentation import image_augmentation
from tasks.artifacts import read_artifacts
from tasks.images.config import Augmentation, ImageAugmentationConfig, ImageThresholds
from tasks.images.rows import decode_images
from tasks.images.sample import picture, write_sample
from tasks.io import storage
from tasks.io.errors import GateFailed
from tasks.io.tensors import to_torch
from tasks.store import layout, versions
from tests.conftest import LOCAL_AND_S3, new_root
from tests.images.test_rows import COLUMNS
from tests.runs import Run, assert_rejected, assert_whole
from tests.test_runner import messages

pytestmark = pytest.mark.usefixtures("stack")

DATASET = "training-datasets/images"
ENTRY = "flows.image_augmentation:image_augmentation"
SIZE = 32
FLAWS = {  # of the sample: what stands in _rejected/ of its files
    "flaw-empty": "empty_file",
    "flaw-html": "not_an_image",
    "flaw-truncated": "truncated",
    "flaw-two-labels": "conflicting_labels",
    "flaw-unlabelled": "unlabelled",
}


class ToFit:
    """A policy of one's own, which the flow is told by its import path."""

    def __init__(self) -> None:
        self._transform = v2.Compose([v2.Resize(SIZE), v2.RandomCrop(SIZE), v2.RandomVerticalFlip()])

    def __call__(self, image: object) -> object:
        return self._transform(image)


too_small = v2.CenterCrop(SIZE - 1)


@dataclass(frozen=True)
class ImageRun(Run):
    """A run of this flow that has ended."""

    def rows(self) -> pa.Table:
        """All rows with the split of their directory, by image_id."""
        tables = []
        for uri in versions.data_files(self.root, self.record()):
            table = pq.ParquetFile(storage.open_input(uri)).read()
            split = re.search(r"/split=(\w+)/", uri)
            assert split, f"{uri} is in no split"
            tables.append(table.append_column("split", pa.array([split[1]] * table.num_rows)))
        return pa.concat_tables(tables).sort_by("image_id")

    def originals(self) -> pl.DataFrame:
        [entry] = self.record().side_files
        return read(layout.join(self.uri, entry.path))


def read(uri: str) -> pl.DataFrame:
    frame = pl.from_arrow(pq.read_table(storage.open_input(uri)))
    assert isinstance(frame, pl.DataFrame)
    return frame


def configured(root: str, **settings: object) -> ImageAugmentationConfig:
    usual = {"augmentation": Augmentation(size=SIZE), "images_per_file": 16}
    return ImageAugmentationConfig(root=root, **{**usual, **settings})


def start(root: str, **settings: object) -> ImageRun:
    return ImageRun(root, image_augmentation(configured(root, **settings), return_state=True))


def completed(root: str, **settings: object) -> ImageRun:
    return start(root, **settings).completed()


def encoded(pixels: np.ndarray, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def by_pillow(images: np.ndarray, kind: str, **options: int) -> np.ndarray:
    """What Pillow makes of pictures, shape (n, 3, height, width), that it saves and opens."""
    made = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, kind, **options)
        made.append(np.asarray(Image.open(buffer).convert("RGB")).transpose(2, 0, 1))
    return np.stack(made)


def put(base: Path, files: Mapping[str, bytes]) -> str:
    """Write files below a directory."""
    for name, data in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(data)
    return str(base)


def pictures(names: list[str], seed: int = 5) -> dict[str, bytes]:
    """A picture of its own for each name."""
    return {name: encoded(picture(seed, number)) for number, name in enumerate(names)}


def labelled(path: Path, rows: list[tuple[str, ...]], header: str = "image_id,class_name") -> str:
    """Write a file of labels."""
    pl.DataFrame(rows, schema=header.split(","), orient="row").write_csv(path)
    return str(path)


@pytest.fixture(scope="module", params=LOCAL_AND_S3)
def sample(request: pytest.FixtureRequest) -> ImageRun:
    """The sample, with the usual flaws; its images stand where the data goes, so on S3 both are there."""
    return completed(new_root(request), sample_images=100)


local = pytest.mark.parametrize("sample", ["local"], indirect=True)


# What a run publishes


def test_a_run_publishes_a_whole_version(sample: ImageRun) -> None:
    manifest = assert_whole(sample, DATASET, beside=[layout.CLASS_SUMMARY])
    [version] = sample.published
    assert (version.dataset, version.version) == (DATASET, 1)
    assert (version.rows, version.verdict) == (manifest.rows, manifest.gate.verdict)
    assert version.uri == layout.version_uri(sample.root, DATASET, 1)
    assert storage.exists(version.report), "the report isn't where the flow says"
    images, labels = manifest.balances
    assert (images.name, images.rows_in, images.rejected) == ("images", 108, dict.fromkeys(FLAWS.values(), 1))
    assert (labels.name, labels.rows_in, labels.rejected) == ("labels", 109, {"conflicting_labels": 2, "no_image": 1})
    assert images.rows_out == 103
    in_train = manifest.definition["splits"]["train"]
    assert manifest.rows == 3 * in_train + (103 - in_train), "images that aren't trained on have one row"
    assert {entry.path.split("/")[0] for entry in manifest.files} == {"split=train", "split=validation"}


def test_the_manifest_says_what_a_trainer_must_know(sample: ImageRun) -> None:
    manifest, rows = sample.record(), sample.rows()
    assert [column.name for column in manifest.columns] == COLUMNS
    splits = {
        name: rows.filter(pa.compute.equal(rows["split"], name))["original_image_id"]
        for name in ("train", "validation")
    }
    assert manifest.definition == {
        "classes": {"checks": 0, "dots": 1, "rings": 2, "stripes": 3, "triangles": 4},
        "image": {
            "format": "uint8",
            "shape": [3, SIZE, SIZE],
            "dimensions": ["channel", "height", "width"],
            "normalised": False,
        },
        "normalise": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "scale": 255},
        "splits": {**{name: len(ids.unique()) for name, ids in splits.items()}, "test": 0},
        "variants": 3,
        "evaluation": "center",
        "images": dict(sorted(Counter(sample.originals()["class_name"]).items())),
    }
    assert ImageAugmentationConfig.model_validate(manifest.config) == configured(
        sample.root, sample_images=100, images=manifest.inputs[0].uri, labels=manifest.inputs[1].uri
    )
    assert [(record.name, record.rows) for record in manifest.inputs] == [("images", 108), ("labels", 109)]


def test_every_image_has_its_variants_in_one_split(sample: ImageRun) -> None:
    rows = sample.rows()
    assert rows.column_names == [*COLUMNS, "split"]
    frame = rows.drop(["image", "one_hot_label"]).to_pandas()
    assert (frame["image_id"] == frame["original_image_id"] + "_aug_" + frame["augmentation_id"].astype(str)).all()
    by_original = frame.groupby("original_image_id")
    numbers = {"train": [0, 1, 2], "validation": [0]}
    assert all(sorted(own["augmentation_id"]) == numbers[own["split"].iloc[0]] for _, own in by_original)
    assert (by_original["split"].nunique() == 1).all(), "an original is in two splits"
    shares = by_original["split"].first().value_counts(normalize=True)
    assert abs(shares["validation"] - 0.2) < 0.02
    classes = sample.record().definition["classes"]
    assert frame["class_id"].tolist() == frame["class_name"].map(classes).tolist()
    assert np.array_equal(to_torch(rows, "one_hot_label").numpy(), np.eye(5, dtype=np.uint8)[frame["class_id"]])
    told = pl.read_csv(storage.read_bytes(sample.record().inputs[1].uri)).filter(~pl.col("image_id").is_in([*FLAWS]))
    expected = dict(told.iter_rows())
    assert frame["class_name"].tolist() == frame["original_image_id"].map(expected).tolist()
    for name, uri in by_original["file_path"].first().items():
        assert uri.rpartition("/")[2].startswith(f"{name}."), "file_path is another image's"
    assert storage.exists(frame["file_path"][0])


def test_the_pictures_can_be_read_back(sample: ImageRun) -> None:
    rows = sample.rows()
    images = decode_images(rows)
    assert (images.shape, images.dtype) == ((rows.num_rows, 3, SIZE, SIZE), np.uint8)
    plain = np.stack([np.frombuffer(value, np.uint8).reshape(3, SIZE, SIZE) for value in rows["image"].to_pylist()])
    assert np.array_equal(images, plain)
    assert np.array_equal(to_torch(rows, "image").numpy(), plain)
    assert len(np.unique(plain.reshape(len(plain), -1), axis=0)) > 0.98 * len(plain), "variants aren't varied"
    # A variant looks like its original: its colours lie nearer to it than to the other originals, mostly.
    paths = dict(zip(rows["original_image_id"].to_pylist(), rows["file_path"].to_pylist(), strict=True))
    colours = {
        name: np.asarray(Image.open(io.BytesIO(storage.read_bytes(uri))).convert("RGB").resize((8, 8))).mean((0, 1))
        for name, uri in paths.items()
    }
    names, table = list(colours), np.stack(list(colours.values()))
    own = [names.index(name) for name in rows["original_image_id"].to_pylist()]
    gaps = np.abs(plain.mean((2, 3))[:, None] - table[None]).sum(2)
    ranks = (gaps < gaps[np.arange(len(own)), own][:, None]).sum(1)
    assert np.median(ranks) < 0.15 * len(names), "variants don't look like their originals"


def test_any_reader_opens_a_version_as_it_is(sample: ImageRun) -> None:
    uri, rows = sample.uri, sample.record().rows
    frame = pd.read_parquet(uri)
    assert (len(frame), list(frame.columns)) == (rows, [*COLUMNS, "split"]), "pandas"
    dataset = ray.data.read_parquet(
        [layout.join(uri, layout.split_directory(name)) for name in ("train", "validation")]
    )
    assert dataset.count() == rows, "Ray Data"
    if storage.is_s3(uri):
        return
    pattern = f"{uri}/split=*/*.parquet"
    by_polars = pl.read_parquet(pattern, hive_partitioning=True)
    assert (len(by_polars), by_polars.columns) == (rows, [*COLUMNS, "split"]), "Polars"
    by_duckdb = duckdb.sql(f"SELECT * FROM read_parquet('{pattern}', hive_partitioning=true)")
    assert (len(by_duckdb), by_duckdb.columns) == (rows, [*COLUMNS, "split"]), "DuckDB"
    counted = duckdb.sql(
        f"SELECT split, count(*) FROM read_parquet('{pattern}', hive_partitioning=true) GROUP BY split"
    )
    assert dict(counted.fetchall()) == dict(Counter(frame["split"]))


def test_rejected_images_are_kept_with_their_reasons(sample: ImageRun) -> None:
    manifest = sample.record()
    tables = {entry.path: read(layout.join(sample.uri, entry.path)) for entry in manifest.rejected_files}
    images = pl.concat([table for table in tables.values() if "uri" in table.columns])
    assert dict(images.select("image_id", "reason").iter_rows()) == FLAWS
    assert images["detail"].str.len_chars().min() > 5, "a reason without an explanation"
    assert all(storage.exists(uri) for uri in images["uri"])
    [labels] = [table for path, table in tables.items() if "/labels-" in path]
    assert sorted(labels.select("image_id", "reason").iter_rows()) == [
        ("flaw-missing", "no_image"),
        ("flaw-two-labels", "conflicting_labels"),
        ("flaw-two-labels", "conflicting_labels"),
    ]
    used = sample.originals()
    assert used["image_id"].n_unique() == len(used) == manifest.balances[0].rows_out
    assert not set(used["image_id"]) & set(images["image_id"]), "an image is used and rejected"


def test_the_summary_of_classes_is_a_recount_of_the_rows(sample: ImageRun) -> None:
    summary = pd.read_csv(io.BytesIO(storage.read_bytes(layout.join(sample.uri, layout.CLASS_SUMMARY))))
    assert len(summary) == 5 * 3, "a row for each class and split"
    rows = sample.rows().drop(["image", "one_hot_label"]).to_pandas()
    counted = rows.groupby(["class_id", "class_name", "split"]).agg(
        originals=("original_image_id", "nunique"),
        variants=("image_id", "size"),
        mean_quality=("data_quality_score", "mean"),
        passed=("validation_passed", "sum"),
        ready=("is_training_ready", "sum"),
    )
    found = summary.set_index(["class_id", "class_name", "split"])
    pd.testing.assert_frame_equal(
        found[found["originals"] > 0], counted, check_dtype=False, check_index_type=False, rtol=1e-6
    )
    empty = found[found["originals"] == 0]
    assert empty.drop(columns="mean_quality").eq(0).all(axis=None)
    assert empty["mean_quality"].isna().all()


# What the API shows of it


def test_the_api_has_the_artifacts_of_a_run(sample: ImageRun) -> None:
    artifacts = read_artifacts(sample.id)
    by_key = {artifact.key: artifact for artifact in artifacts if artifact.key}
    assert set(by_key) >= {"images-report", "images-checks", "images-classes"}
    report, manifest = str(by_key["images-report"].data), sample.record()
    assert manifest.gate.verdict in report.lower(), "the report doesn't say the verdict"
    assert "![Contact sheet](data:image/webp;base64," in report
    assert "![Rejected images](data:image/" in report
    assert layout.join(sample.uri, layout.REPORT_HTML) in report
    checks = json.loads(str(by_key["images-checks"].data))
    told = Counter((row["check"], row["column"], row["verdict"]) for row in checks)
    assert told == Counter((check.name, check.column, check.verdict) for check in manifest.gate.checks)
    classes = pd.DataFrame(json.loads(str(by_key["images-classes"].data)))
    summary = pd.read_csv(io.BytesIO(storage.read_bytes(layout.join(sample.uri, layout.CLASS_SUMMARY))))
    pd.testing.assert_frame_equal(classes, summary, check_dtype=False)
    [progress] = [artifact for artifact in artifacts if artifact.type == "progress"]
    assert float(str(progress.data)) == 100.0
    assert re.search(r"Augmenting: 106 of 106 images.*; done", str(progress.description))


def test_the_api_has_logs_and_names_of_the_tasks_on_ray(sample: ImageRun) -> None:
    lines = messages(sample.id)
    assert "106 images of 5 classes, in 7 units of up to 16" in lines
    assert any(re.fullmatch(r"\d+ variants of 103 images written in \d+ files", line) for line in lines), lines
    assert f"{DATASET}: verdict {sample.record().gate.verdict}" in lines
    tasks = sample.tasks()
    assert {(task.state_name, task.run_count) for task in tasks.values()} == {("Completed", 1)}
    assert [task.tags for name, task in tasks.items() if name.startswith("augment-images")] == [["ray-data"]]
    assert sample.flow_run().name.startswith("augment the sample ")
    assert sample.record().run.flow_run_name == sample.flow_run().name


def test_the_page_stands_by_itself(sample: ImageRun) -> None:
    page = storage.read_bytes(layout.join(sample.uri, layout.REPORT_HTML)).decode()
    assert page.count("data:image/") >= 3, "contact sheet, rejected images and charts"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "it needs the network"
    for reason in FLAWS.values():
        assert reason in page


# The next version

CLASS_OF_SCRIPT = "<script>alert('class')</script>"
PER_IMAGE = 9  # so many that drift is judged: it needs 200 rows


@pytest.fixture(scope="module")
def next_versions(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRun]:
    """Three classes by directory; then, by labels, one of them is gone, and two are new."""
    base = tmp_path_factory.mktemp("versions")
    names = [f"{kind}/{number}.jpg" for number in range(8) for kind in ("dogs", "cats", "owls")]
    images = put(base / "images", pictures(names))
    many = Augmentation(size=SIZE, variants=PER_IMAGE)
    usual = {"validation_share": 0.25, "augmentation": many, "evaluation": "augmented"}
    first = completed(str(base / "root"), images=images, **usual)
    put(base / "images", pictures([f"new/{number}.jpg" for number in range(8)], seed=6))
    rows = [(name, name.split("/")[0]) for name in names if not name.startswith("dogs")]
    rows += [(f"new/{number}.jpg", CLASS_OF_SCRIPT if number < 4 else "ants") for number in range(8)]
    again = completed(
        str(base / "root"),
        images=images,
        labels=labelled(base / "labels.csv", rows),
        thresholds=ImageThresholds(rejected_fail=1, drift_fail=100),
        **usual,
    )
    return [first, again]


def test_the_directory_of_an_image_is_its_class(next_versions: list[ImageRun]) -> None:
    first = next_versions[0]
    manifest = assert_whole(first, DATASET, beside=[layout.CLASS_SUMMARY])
    assert [record.name for record in manifest.inputs] == ["images"]
    assert [balance.name for balance in manifest.balances] == ["images"]
    rows = first.rows().select(["original_image_id", "class_name"]).to_pylist()
    assert len(rows) == PER_IMAGE * 24
    assert all(row["original_image_id"].split("/")[0] == row["class_name"] for row in rows)


def test_a_class_keeps_its_id_for_ever(next_versions: list[ImageRun]) -> None:
    first, again = next_versions
    assert first.record().definition["classes"] == {"cats": 0, "dogs": 1, "owls": 2}
    classes = {"cats": 0, "dogs": 1, "owls": 2, CLASS_OF_SCRIPT: 3, "ants": 4}
    assert again.record().definition["classes"] == classes, "the absent class lost its id, or an old one moved"
    manifest, rows = assert_whole(again, DATASET, beside=[layout.CLASS_SUMMARY]), again.rows()
    assert manifest.version == 2
    assert dict(zip(rows["class_name"].to_pylist(), rows["class_id"].to_pylist(), strict=True)) == {
        name: number for name, number in classes.items() if name != "dogs"
    }
    label = to_torch(rows, "one_hot_label")
    assert label.shape == (rows.num_rows, 5)
    assert label.argmax(1).tolist() == rows["class_id"].to_pylist()
    assert manifest.balances[0].rejected == {"unlabelled": 8}


def test_an_image_keeps_its_variants_from_version_to_version(next_versions: list[ImageRun]) -> None:
    one, two = (
        dict(zip(rows["image_id"].to_pylist(), rows["image"].to_pylist(), strict=True))
        for rows in (run.rows() for run in next_versions)
    )
    both = set(one) & set(two)
    assert len(both) == PER_IMAGE * 16
    assert all(one[name] == two[name] for name in both)


def test_a_version_is_compared_with_the_last_one(next_versions: list[ImageRun]) -> None:
    first, again = ({(check.name, check.column): check for check in run.record().gate.checks} for run in next_versions)
    compared = {("drift", "class_name"), ("drift", "data_quality_score"), ("classes", "class_name")}
    assert not compared & set(first), "there was nothing to compare the first version with"
    assert compared <= set(again)
    drift = again["drift", "class_name"]  # counted by image, not by variant
    assert (drift.verdict, drift.figure) == ("pass", None), "chance alone explains what 24 images do"
    assert drift.message.startswith("Drift of class_name isn't judged: 24 rows now and 24 before")
    assert isinstance(again["drift", "data_quality_score"].figure, float)
    message = again["classes", "class_name"].message
    assert message == f"Since v1, 2 classes appeared: {CLASS_OF_SCRIPT}, ants and 1 class vanished: dogs."
    labels = again["compatibility", "one_hot_label"]
    assert (labels.verdict, "unlike v1" in labels.message) == ("warn", True)
    page = storage.read_bytes(layout.join(next_versions[1].uri, layout.REPORT_HTML)).decode()
    assert "v1" in page


def test_a_class_name_is_text_and_nothing_else(next_versions: list[ImageRun]) -> None:
    again = next_versions[1]
    page = storage.read_bytes(layout.join(again.uri, layout.REPORT_HTML)).decode()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    by_key = {artifact.key: str(artifact.data) for artifact in read_artifacts(again.id)}
    assert "<script>alert" not in by_key["images-report"]
    summary = pl.read_csv(storage.read_bytes(layout.join(again.uri, layout.CLASS_SUMMARY)))
    assert CLASS_OF_SCRIPT in summary["class_name"].to_list()


def test_a_failed_gate_leaves_the_last_version_as_the_latest(next_versions: list[ImageRun], tmp_path: Path) -> None:
    root = next_versions[0].root
    broken = {f"cats/broken-{number}.jpg": b"<html>Not Found</html>" for number in range(12)}
    images = put(tmp_path, {**pictures([f"{kind}/{n}.jpg" for n in range(6) for kind in ("cats", "owls")]), **broken})
    run = start(root, images=images, thresholds=ImageThresholds(rejected_fail=0.3, drift_fail=100))
    why = (
        r"nothing was published\. training-datasets/images: .*12 of 24 rows \(50\.00%\).* \(asked for ≤ 0\.3\)\. "
        r"To go on: see _rejected/ .*raise --thresholds\.rejected-fail\. Reports: \S+/v3/_report\.html"
    )
    run.failed_at_once(GateFailed, why)
    assert versions.published_versions(root, DATASET) == [1, 2]
    latest = versions.latest(root, DATASET)
    assert latest is not None
    assert latest.version == 2
    uri, manifest = layout.version_uri(root, DATASET, 3), assert_rejected(root, DATASET, 3)
    rejected = pl.concat([read(layout.join(uri, entry.path)) for entry in manifest.rejected_files])
    assert rejected["reason"].to_list() == ["not_an_image"] * 12
    assert b"not_an_image" in storage.read_bytes(layout.join(uri, layout.REPORT_HTML))
    assert storage.exists(layout.join(uri, layout.CLASS_SUMMARY))


# What belongs together


def test_copies_and_groups_share_a_split(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in range(48)]
    files = pictures([f"{name}.jpg" for name in names])
    copies = {}
    for number in range(8):
        copies[f"bytes-{number:02d}.jpg"] = files[f"{number:02d}.jpg"]
        copies[f"quality-{number + 8:02d}.jpg"] = encoded(picture(5, number + 8), quality=40)
        image = Image.fromarray(picture(5, number + 16))
        smaller = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
        copies[f"half-{number + 16:02d}.jpg"] = encoded(np.asarray(smaller))
    scenes = {name: f"scene {int(name) % 6}" for name in names[24:]}
    rows = [(name, "even" if int(name[-2:]) % 2 == 0 else "odd", scenes.get(name)) for name in names]
    rows += [(name.removesuffix(".jpg"), "even" if int(name[-6:-4]) % 2 == 0 else "odd", None) for name in copies]
    run = completed(
        str(tmp_path / "root"),
        images=put(tmp_path / "images", {**files, **copies}),
        labels=labelled(tmp_path / "labels.csv", rows, "image_id,class_name,scene"),
        group_column="scene",
        validation_share=0.3,
        test_share=0.2,
    )
    table = run.originals()
    facts = {row["image_id"]: row for row in table.to_dicts()}
    together = [{name.removesuffix(".jpg"), name[-6:-4]} for name in copies]
    together += [{name for name in scenes if scenes[name] == scene} for scene in set(scenes.values())]
    assert len(together) == 24 + 6
    for members in together:
        assert len({facts[name]["split"] for name in members}) == 1, f"{members} are in several splits"
        [alike] = {facts[name]["alike"] for name in members}
        assert facts[alike]["alike"] == alike
    assert len(set(table["split"])) == 3, "there are no splits to be torn apart between"
    written = dict(zip(run.rows()["original_image_id"].to_pylist(), run.rows()["split"].to_pylist(), strict=True))
    assert written == {name: row["split"] for name, row in facts.items()}, "the files are of another split"
    report = json.loads(storage.read_bytes(layout.join(run.uri, layout.REPORT_JSON)))
    [listed] = [one for one in report["tables"] if one["title"].startswith("Images that share a split")]
    told = {frozenset(row[2].split(", ")): row[0] for row in listed["rows"]}
    for members in together:
        [split] = [split for group, split in told.items() if members <= group]
        assert split == facts[next(iter(members))]["split"]
    assert any(line.endswith("groups of images that belong together share a split") for line in messages(run.id))


# Formats and ways to compute


@local
@pytest.mark.parametrize(
    "settings",
    [
        {"format": "float32", "workers": "actors", "actors": 1},
        pytest.param({"format": "jpeg", "device": "cpu"}, marks=pytest.mark.nightly),
        {"format": "webp", "quality": 80},
        pytest.param(
            {"augmentation": Augmentation(size=SIZE, policy="tests.test_image_flow:ToFit")}, marks=pytest.mark.nightly
        ),
    ],
    ids=["float32 by actors", "jpeg by torch", "webp", "a policy of one's own"],
)
def test_other_choices_change_neither_ids_nor_splits(sample: ImageRun, settings: dict[str, object]) -> None:
    source = write_sample(sample.root, 100, 0)
    run = completed(sample.root, name="other", images_per_file=32, **source, **settings)
    manifest = assert_whole(run, "training-datasets/other", beside=[layout.CLASS_SUMMARY])
    wanted, rows = sample.rows(), run.rows()
    same = ["image_id", "original_image_id", "augmentation_id", "class_id", "class_name", "one_hot_label", "split"]
    assert rows.select(same).equals(wanted.select(same))
    kind = settings.get("format", "uint8")
    images = decode_images(rows)
    assert manifest.definition["image"]["format"] == kind
    assert images.shape == (rows.num_rows, 3, SIZE, SIZE)
    assert images.dtype == (np.float32 if kind == "float32" else np.uint8)
    if "format" not in settings:
        assert not np.array_equal(images, decode_images(wanted)), "the policy wasn't asked"
        return
    constants = manifest.definition["normalise"]
    mean, std = (np.array(constants[name])[:, None, None] for name in ("mean", "std"))
    levels = (images * std + mean) * 255 if kind == "float32" else images
    if kind == "webp":  # its loss depends on the pictures, and on such small ones it is large: Pillow is the judge
        assert np.array_equal(images, by_pillow(decode_images(wanted), "WEBP", quality=80, method=0))
        return
    gap = np.abs(levels.astype(np.float64) - decode_images(wanted)).mean()
    assert gap < {"float32": 0.01, "jpeg": 3}[str(kind)], f"other pictures: they differ by {gap}"
