"""`explain` of images: the drawn parameters give the stored pictures, and the picture shows them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from tasks.audit.images import drawn_rows
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.draws import Draws
from tasks.images.rows import decode_images
from tasks.store import versions
from tests.audit.explained_store import Store, explained, facts, refused, rows
from tests.images.oracle import reference_variant

DATASET = "training-datasets/images"
ORDER = ("brightness", "contrast", "saturation", "hue")


def test_what_was_drawn_gives_what_is_stored(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("img-000020", "img-000021", "img-000040"):
        answer = explained(store, capsys, f"images v1 {key}")
        told = rows(answer, "transforms")
        draws = Draws(
            crop=np.array([[row[n] for n in ("top", "left", "height", "width")] for row in told], np.int32),
            flip=np.array([row["flip"] for row in told]),
            angle=np.array([row["degrees"] for row in told], np.float32),
            jitter=np.array([[row[name] for name in ORDER] for row in told], np.float32),
            order=np.array([[ORDER.index(name) for name in row["order"]] for row in told], np.uint8),
        )
        pixels = np.array(Image.open(facts(answer, "source")["file"]).convert("RGB"))
        assert pixels.shape[:2] == (facts(answer, "source")["height"], facts(answer, "source")["width"])
        for number, row in enumerate(rows(answer, "quality")):
            table = pq.read_table(f"{store.root}/{DATASET}/v1/{row['file']}").slice(row["row"], 1)
            assert table["image_id"].to_pylist() == [row["id"]] == [f"{key}_aug_{number}"]
            stored = decode_images(table)[0].astype(float)
            wanted = reference_variant(pixels, draws, number, 32).astype(float)
            assert np.abs(stored - wanted).mean() < 1.5, (key, number)
            assert table["data_quality_score"][0].as_py() == row["score"]
            assert table["is_training_ready"][0].as_py() == row["training-ready"]


def test_the_file_its_contents_and_its_label(store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = explained(store, capsys, "images v1 img-000033")
    source = facts(answer, "source")
    data = Path(source["file"]).read_bytes()
    assert source["content"] == f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"
    assert (source["bytes"], source["now"]) == (len(data), "unchanged")
    manifest = versions.read_manifest(store.root, DATASET, 1)
    assert manifest.definition["classes"][source["class"]] == source["class id"]
    assert source["labelled by"].endswith("labels.csv, columns image_id, class_name")
    shutil.copy(source["file"], tmp_path / "kept")
    Path(source["file"]).write_bytes(data + b"\0")
    try:
        assert facts(explained(store, capsys, "images v1 img-000033"), "source")["now"] == "changed since"
        Path(source["file"]).unlink()
        assert facts(explained(store, capsys, "images v1 img-000033"), "source")["now"] == "gone"
    finally:
        shutil.copy(tmp_path / "kept", source["file"])


def test_every_split_is_computed_again_as_it_was(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    originals = pq.read_table(f"{store.root}/{DATASET}/v1/_originals")
    held_out = originals.filter(pc.equal(originals["split"], "validation"))["image_id"].to_pylist()
    for key in [*held_out[:3], "img-000021"]:
        split = facts(explained(store, capsys, f"images v1 {key}"), "split")
        assert split["split"] == ("validation" if key in held_out else split["split"])
        assert split["computed again"] == f"{split['split']}, as it was"
    answer = explained(store, capsys, "images v1 copy-exact_aug_1")
    assert {(row["belongs with"], row["which is"]) for row in rows(answer, "split")} == {
        ("copy-exact", "this image"),
        ("img-000020", "the same bytes"),
    }
    near = rows(explained(store, capsys, "images v1 img-000041"), "split")
    assert {row["belongs with"] for row in near} == {"img-000041", "copy-recompressed"}
    assert any("of 64 bits" in row["which is"] for row in near)
    assert len({row["split"] for row in near}) == 1


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("flaw-empty", "empty_file"),
        ("flaw-truncated", "truncated"),
        ("flaw-html.jpg", "not_an_image"),
        ("flaw-unlabelled", "unlabelled"),
        ("flaw-missing", "no_image"),
        ("flaw-two-labels", "conflicting_labels"),
    ],
)
def test_rejected_images_are_an_answer(store: Store, capsys: pytest.CaptureFixture[str], key: str, reason: str) -> None:
    answer = explained(store, capsys, f"images v1 {key}")
    assert answer["answer"] == "rejected"
    assert {row["reason"] for row in rows(answer, "rejected")} == {reason}
    assert all(row["detail"] for row in rows(answer, "rejected"))


def test_unknown_images_and_wrong_arguments(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refused(store, capsys, "images v1 img-00002")
    assert code == 1
    assert told.endswith("closest: img-000020, img-000021, img-000022\n")
    assert refused(store, capsys, "images v1 img-000020 --picture x.jpg")[0] == 2
    assert refused(store, capsys, "images v1 img-000020 --at 2024-01-01")[0] == 2
    assert refused(store, capsys, "images v1 img-000020 --picture /nowhere/x.png")[0] == 2


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_the_picture_shows_before_and_after(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"both.{suffix}"
    answer = explained(store, capsys, f"images v1 img-000020 --picture {path}")
    assert facts(answer, "picture")["shows"] == ["original: stripes", "variant 0 (red)", "variant 1 (blue)"]
    with Image.open(path) as opened:
        assert opened.format == suffix.upper()
        shown = np.asarray(opened.convert("RGB")).astype(float)
    # Three pictures side by side: the middle of each is what it must be.
    row = rows(answer, "quality")[0]
    table = pq.read_table(f"{store.root}/{DATASET}/v1/{row['file']}").slice(row["row"], 2)
    side, pitch, margin = 480, 504, 16  # two pixels a CSS pixel
    for number, variant in enumerate(decode_images(table), 1):
        left = margin + number * pitch
        tile = shown[margin : margin + side, left : left + side]
        small = tile.reshape(32, 15, 32, 15, 3).mean(axis=(1, 3))
        inside = np.abs(small - np.moveaxis(variant, 0, 2))[4:-4, 4:-4]
        assert inside.mean() < 12, f"variant {number} isn't where it should be"
    red = (shown[:, :side, 0] - shown[:, :side, 1:].max(axis=2) > 60).sum()
    assert red > 500, "the crop of variant 0 isn't framed"


def test_what_is_told_of_an_image_that_isnt_trained_on() -> None:
    """One row, without chance, also where training images go through a policy."""
    config = ImageAugmentationConfig(augmentation=Augmentation(size=56, variants=3, policy="any:policy"))
    original = {"image_id": "x", "height": 100, "width": 200, "split": "test"}
    [row], [words] = drawn_rows(config, original)
    assert (row["top"], row["left"], row["height"], row["width"], row["flip"], row["degrees"]) == (
        0,
        0,
        100,
        200,
        False,
        0,
    )
    assert words.startswith(
        "200 × 100 px at left 0, top 0 (100.0% of the area), made 128 × 64, of which the middle 56 × 56"
    )
    assert len(drawn_rows(config, original | {"split": "train"})[0]) == 3
