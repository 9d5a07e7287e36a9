"""The sample is the same on every machine and for every count, has the flaws it names, and no near-duplicates else."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.images.sample import (
    CLASSES,
    FLAWS,
    FLAWS_FROM,
    flawed_files,
    picture,
    picture_class,
    picture_file,
    write_sample,
)
from tasks.io.errors import InputError

PIXELS = {
    0: "d478b2495a8310ca269d01d8bda850ac3bc96351a8b006252f93ce03f1f46529",
    1: "30b4149142dd80d244b848af37f7802218afd3a8aac86602b9cef9e23f019a43",
    2: "6a1e89c2d76611a54ada5ed00128ff3898d130834efa8b8c6b0112a6bea15a98",
    3: "dfa67737102790aa9519176652c200a32a8c93d5788d4aaae51821de099daa2a",
    4: "25568a84e32d24befd073857f04c719eb5d81f67afb8ad3a9447929039cc62e3",
}


@pytest.mark.parametrize("number", PIXELS)
def test_golden(number: int) -> None:
    """SHA-256 of the pixels, one picture of each class; a change changes every figure in the documentation."""
    pixels = picture(0, number)
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    assert (picture_class(number), digest) == (CLASSES[number], PIXELS[number])


def test_seed_and_number_decide() -> None:
    assert np.array_equal(picture(3, 7), picture(3, 7))
    digests = {
        hashlib.sha256(picture(seed, number).tobytes()).digest() for seed in (0, 1, 2**63 - 1) for number in (0, 5)
    }
    assert len(digests) == 6


def test_sizes_and_light() -> None:
    for number in range(60):
        pixels = picture(1, number)
        height, width, channels = pixels.shape
        assert (channels, pixels.dtype) == (3, np.uint8)
        assert 160 <= min(height, width) <= max(height, width) <= 400
        assert max(height, width) >= 200
        assert pixels.std() > 12, number
        assert 16 < pixels.mean() < 239, number
    shapes = [picture(1, number).shape for number in range(20)]
    assert any(height > width for height, width, _ in shapes)
    assert any(height < width for height, width, _ in shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """The directory of images, and the labels, of the smallest sample that has flaws."""
    uris = write_sample(str(tmp_path_factory.mktemp("root")), FLAWS_FROM, 0)
    return Path(uris["images"]), labels_of(uris["labels"])


def labels_of(uri: str) -> list[tuple[str, str]]:
    with open(uri, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image_id", "class_name"]
    return [(image_id, name) for image_id, name in rows]


def whole(labels: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(image_id, name) for image_id, name in labels if image_id.startswith("img-")]


def found(images: Path) -> dict[str, Path]:
    return {path.stem: path for path in images.iterdir()}


def test_what_is_written(written: tuple[Path, list[tuple[str, str]]]) -> None:
    images, labels = written
    files = found(images)
    assert len(whole(labels)) == FLAWS_FROM
    assert set(Counter(name for _, name in whole(labels)).values()) == {FLAWS_FROM // len(CLASSES)}
    assert set(files) == ({image_id for image_id, _ in labels} | {"flaw-unlabelled"}) - {"flaw-missing"}
    assert set(files) == {f"img-{number:06d}" for number in range(FLAWS_FROM)} | set(FLAWS) - {"flaw-missing"}
    for number, (image_id, _) in enumerate(whole(labels)):
        with Image.open(files[image_id]) as image:
            shown = ImageOps.exif_transpose(image)
            assert (shown.height, shown.width) == picture(0, number).shape[:2]


def test_decoded_pixels_are_those_of_the_picture(written: tuple[Path, list[tuple[str, str]]]) -> None:
    """Also of those turned by EXIF: a turned picture would differ by far more than compression does."""
    files = found(written[0])
    for number in range(50):
        with Image.open(files[f"img-{number:06d}"]) as image:
            if image.mode == "RGBA":
                continue
            shown = np.asarray(ImageOps.exif_transpose(image).convert("L"), float)
        assert np.abs(shown - np.asarray(Image.fromarray(picture(0, number)).convert("L"))).mean() < 6, number


def test_forms(written: tuple[Path, list[tuple[str, str]]]) -> None:
    counts: Counter[str] = Counter()
    for image_id, path in found(written[0]).items():
        if image_id.startswith("img-"):
            with Image.open(path) as image:
                assert path.suffix == {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[str(image.format)]
                counts[f"{image.format} {image.mode}"] += 1
                counts["turned"] += image.getexif().get(0x0112, 1) != 1
    assert counts["JPEG CMYK"] == counts["PNG RGBA"] == 1
    assert min(counts[form] for form in ("JPEG L", "PNG RGB", "WEBP RGB", "turned")) >= 2
    assert counts["JPEG RGB"] > 80


def test_every_class_comes_in_every_form() -> None:
    """Else a model could tell a class by its grey pictures."""
    forms = {number % 41: number for number in (5, 12, 17, 9)}
    for residue in forms:
        assert {picture_class(residue + 41 * turn) for turn in range(5)} == set(CLASSES)


def test_flaws(written: tuple[Path, list[tuple[str, str]]]) -> None:
    images, labels = written
    files = found(images)
    named = Counter(image_id for image_id, _ in labels)
    assert [file.image_id for file in flawed_files(0)] == list(FLAWS)
    assert files["flaw-empty"].read_bytes() == b""
    with pytest.raises(UnidentifiedImageError):
        Image.open(files["flaw-html"])
    with Image.open(files["flaw-truncated"]) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    for whole_picture in ("flaw-unlabelled", "flaw-two-labels"):
        with Image.open(files[whole_picture]) as image:
            image.load()
    assert named["flaw-unlabelled"] == 0
    assert named["flaw-missing"] == 1
    assert len({name for image_id, name in labels if image_id == "flaw-two-labels"}) == 2
    assert {image_id for image_id, count in named.items() if count > 1} == {"flaw-two-labels"}


@pytest.mark.parametrize(
    ("copy", "number", "exact"),
    [("copy-exact", 20, True), ("copy-recompressed", 41, False), ("copy-resized", 62, False)],
)
def test_copies(written: tuple[Path, list[tuple[str, str]]], copy: str, number: int, exact: bool) -> None:
    images, labels = written
    files, classes = found(images), dict(labels)
    original = f"img-{number:06d}"
    assert classes[copy] == classes[original]
    assert (files[copy].read_bytes() == files[original].read_bytes()) is exact
    hashes = [perceptual_hash(np.asarray(Image.open(files[image_id]).convert("L"))) for image_id in (copy, original)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 6


def perceptual_hash(grey: np.ndarray) -> int:
    """64-bit DCT hash: signs of the 8 × 8 lowest frequencies of 32 × 32 pixels against their median."""
    small = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BOX), float)
    cosines = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)
    low = (cosines @ small @ cosines.T).ravel()
    return int("".join("01"[int(value > np.median(low))] for value in low), 2)


def test_different_pictures_are_no_near_duplicates() -> None:
    """Of 600 pictures no two hashes come near the 6 bits by which the flow takes pictures for copies."""
    hashes = []
    for number in range(600):
        grey = np.asarray(Image.fromarray(picture(0, number)).convert("L"))
        hashes.append(perceptual_hash(grey))
    nearest = min((a ^ b).bit_count() for index, a in enumerate(hashes) for b in hashes[:index])
    assert nearest > 8


def files_under(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_larger_sample_starts_with_the_smaller_one(
    written: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    images, labels = written
    uris = write_sample(str(tmp_path), 23, 0)
    few = labels_of(uris["labels"])
    assert few == labels[:23]
    assert len(list(Path(uris["images"]).iterdir())) == 23
    for path in Path(uris["images"]).iterdir():
        assert path.read_bytes() == (images / path.name).read_bytes()
    classes = Counter(name for _, name in few)
    assert max(classes.values()) - min(classes.values()) <= 1


def test_written_once(tmp_path: Path) -> None:
    uris = write_sample(str(tmp_path), 3, 0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_sample(str(tmp_path), 3, 0) == uris
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_write_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    write_sample(str(tmp_path), 12, 0)
    before = files_under(tmp_path)
    base = tmp_path / "samples/image-augmentation/12-0"
    (base / "_complete").unlink()
    (base / "images/img-000004.jpg").write_bytes(b"part")
    (base / "labels.csv").unlink()
    write_sample(str(tmp_path), 12, 0)
    assert files_under(tmp_path) == before


def test_samples_of_other_counts_and_seeds_stand_side_by_side(tmp_path: Path) -> None:
    places = {write_sample(str(tmp_path), count, seed)["images"] for count, seed in ((1, 0), (1, 1), (2, 0))}
    assert len(places) == 3


def test_more_pictures_than_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.images.sample._AT_ONCE", 4)
    labels = labels_of(write_sample(str(tmp_path), 9, 0)["labels"])
    assert [image_id for image_id, _ in labels] == [f"img-{number:06d}" for number in range(9)]


def test_a_sample_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sample of 0 images"):
        write_sample(str(tmp_path), 0, 0)


def test_a_picture_file_holds_a_whole_image() -> None:
    file = picture_file(5, 123_456_789)
    assert file.image_id == "img-123456789"
    assert file.data is not None
    Image.open(io.BytesIO(file.data)).load()
