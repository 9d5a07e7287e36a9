"""Images that aren't there any more, or are others, when they are read; odd names; labels that can't be meant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.images.augment import ImageJob, augment_unit
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.outcomes import UnitNote
from tasks.images.plan import plan_images
from tasks.io import storage
from tasks.io.errors import SourceError
from tasks.store import layout
from tasks.store.reservation import reserve
from tests.images.test_decode import encoded, scene
from tests.tables import Proven

FLOW = "image-augmentation"
PICTURE = encoded(scene(), "PNG")


def run(
    root: Path | str, between: Callable[[Any], object] = lambda _: None, **settings: Any
) -> tuple[UnitNote, list[Any]]:
    """Plan, let something happen to the images, and augment; the note, and what was rejected while decoding."""
    small = {"augmentation": Augmentation(size=16, variants=1), "near_duplicates": None, **settings}
    images = f"{root}/images" if isinstance(root, str) else root / "images"
    config = ImageAugmentationConfig(root=f"{root}/store", images=str(images), **small)
    reservation = reserve(config.root, layout.image_dataset(config.name), "run")
    plan = plan_images(config, reservation, None)
    between(images)
    job = ImageJob(
        config=config, reservation=reservation, plan_uri=plan.uri, digests=plan.digests, classes=len(plan.classes)
    )
    note = augment_unit(job, 0)
    if note.rejected_file is None:
        return note, []
    rows = pq.read_table(layout.join(reservation.uri, note.rejected_file.path)).to_pylist()
    return note, [(row["path"], row["reason"], row["detail"]) for row in rows]


def put(root: Path, *names: str, data: bytes = PICTURE) -> None:
    for name in names:
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def swapped_for_a_directory(images: Path) -> None:
    (images / "cats/1.png").unlink()
    (images / "cats/1.png").mkdir()


def replaced_by_one_of_its_size(images: Path) -> None:
    os.utime(images / "cats/1.png", ns=(1, 1))


def linked_to_itself(images: Path) -> None:
    (images / "cats/1.png").unlink()
    (images / "cats/1.png").symlink_to(images / "cats/1.png")


BETWEEN = {
    "vanishes": (lambda images: (images / "cats/1.png").unlink(), "No such file"),
    "grows": (
        lambda images: (images / "cats/1.png").write_bytes(PICTURE + b"x"),
        "written to after it was listed; run again",
    ),
    "is cut": (
        lambda images: (images / "cats/1.png").write_bytes(PICTURE[:99]),
        "written to after it was listed; run again",
    ),
    "is replaced by another of its size": (replaced_by_one_of_its_size, "written to after it was listed; run again"),
    "becomes a directory": (swapped_for_a_directory, "Is a directory"),
    "becomes a link to itself": (linked_to_itself, "symbolic links"),
}


@pytest.mark.parametrize(("between", "said"), BETWEEN.values(), ids=BETWEEN)
def test_a_file_that_changes_after_it_was_listed(
    tmp_path: Path, between: Callable[[Path], object], said: str, proven: Proven
) -> None:
    put(tmp_path, "cats/1.png", "dogs/2.png")
    note, rejected = run(tmp_path, between)
    assert [(path, reason) for path, reason, _ in rejected] == [("cats/1.png", "unreadable")]
    assert said in rejected[0][2]
    assert (note.images, note.augmented, note.rejected) == (2, 1, {"unreadable": 1})
    proven("image that vanishes or changes between listing and reading", FLOW, "rejected: unreadable, and counted")


def test_an_object_that_is_replaced_by_another_of_its_size(s3_root: str, proven: Proven) -> None:
    other = PICTURE[:-4] + b"else"
    for name, data in (("cats/1.png", PICTURE), ("dogs/2.png", PICTURE)):
        storage.write_bytes(f"{s3_root}/images/{name}", data)
    note, rejected = run(s3_root, lambda images: storage.write_bytes(f"{images}/cats/1.png", other))
    assert [(path, reason) for path, reason, _ in rejected] == [("cats/1.png", "unreadable")]
    assert "written to after it was listed; run again" in rejected[0][2]
    assert (note.images, note.augmented) == (2, 1)
    proven("image that vanishes or changes between listing and reading", FLOW, "rejected: unreadable, and counted")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proven: Proven) -> None:
    """As root may read everything, the system's answer is given here by hand."""
    put(tmp_path, "cats/1.png", "dogs/2.png")
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    _, rejected = run(tmp_path)
    assert [reason for _, reason, _ in rejected] == ["unreadable"]
    assert "Permission denied" in rejected[0][2]
    proven("image that may not be read", FLOW, "rejected: unreadable, and counted")


def test_odd_names_are_names(tmp_path: Path, proven: Proven) -> None:
    """Spaces, HTML, quotes, percent signs, both forms of an accent, 250 characters; a directory like a file."""
    names = ["a b.png", "<script>alert(1)<.png", "'\"`.png", "%2e%2e.png", "..png", "-rf.png", "e\u0301.png"]
    names = [f"cats/{name}" for name in [*names, "x" * 246 + ".png", "dir.png/1.png", "\u00e9.png"]]
    put(tmp_path, *names, "cats/.x.png", "_x/1.png", "cats/._x.png")
    note, rejected = run(tmp_path)
    assert (note.images, note.augmented, rejected) == (12, 12, []), "all but what macOS keeps beside a file"
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path).parts[0] for path in files} == {"images", "store"}
    proven("image names with spaces, HTML, quotes or accents", FLOW, "taken as they are")


CLASSES = ["../../evil", "<script>alert(1)</script>", "x" * 10_000, "a/b\\c", "007", "=1+1", "CON"]


def test_odd_classes_are_classes(tmp_path: Path, proven: Proven) -> None:
    """They become values, and no file bears their name; '007' stays."""
    put(tmp_path, *(f"{number}.png" for number in range(len(CLASSES))))
    lines = [f'{number}.png,"{name}"' for number, name in enumerate(CLASSES)]
    (tmp_path / "labels.csv").write_text("image_id,class_name\n" + "\n".join(lines) + "\n")
    before = {path for path in tmp_path.parent.rglob("*") if "store" not in path.parts}
    note, rejected = run(tmp_path, labels=str(tmp_path / "labels.csv"))
    assert (note.augmented, rejected) == (len(CLASSES), [])
    assert {path for path in tmp_path.parent.rglob("*") if "store" not in path.parts} == before
    stored = set()
    for entry in note.files.values():
        uri = f"{tmp_path}/store/training-datasets/images/v1/{entry.path}"
        stored |= set(pq.ParquetFile(uri).read(columns=["class_name"])["class_name"].to_pylist())
    assert stored == set(CLASSES)
    proven("class names with HTML, '..', 10,000 characters or '007'", FLOW, "kept as text, in no path")


LABELS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty"),
    "a byte order mark alone": (b"\xef\xbb\xbf", "the file is empty"),
    "Latin-1": ("image_id,class_name\n1.png,Ägypten\n".encode("latin-1"), "line 2 is no UTF-8"),
    "a column that is named otherwise": (b"image_id,label\n1.png,a\n", "no column 'class_name'"),
    "a picture": (PICTURE, "no UTF-8"),
    "no image of these": (b"image_id,class_name\n7.png,a\n", "no image has a usable label"),
    "nulls": (b"image_id,class_name\n1.png,\n1.png,null\n", "no image has a usable label.* 2 null_class"),
    "contradictions": (b"image_id,class_name\n1.png,a\n1,b\n", "no image has a usable label.*2 conflicting_labels"),
}


@pytest.mark.parametrize(("data", "message"), LABELS.values(), ids=LABELS)
def test_labels_that_can_not_be_used(tmp_path: Path, data: bytes, message: str, proven: Proven) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        run(tmp_path, labels=str(tmp_path / "labels.csv"))
    assert list((tmp_path / "store").rglob("*.parquet")) == []
    proven(
        "file of labels that is empty, no UTF-8, without the column or for no image", FLOW, "refused, nothing written"
    )
