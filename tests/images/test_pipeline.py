"""The jobs on a real Ray: the same rows for any division of the work; nothing is lost, leaked or done twice."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from tasks.images import sources
from tasks.images.augment import ImageJob, augment_again
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.pipeline import AugmentedImages, augment_images, check_policy, digest_in_tasks
from tasks.images.plan import ImagePlan, plan_images, read_units
from tasks.images.rows import decode_images
from tasks.images.sample import picture, picture_class, write_sample
from tasks.images.sources import content_groups, list_images
from tasks.io import storage
from tasks.io.errors import BalanceError, ConfigError
from tasks.store import layout
from tasks.store.reservation import Reservation, reserve
from tests.images.oracle import reference_variant

pytestmark = pytest.mark.usefixtures("ray_cluster")

DATASET = "training-datasets/images"
SMALL = Augmentation(size=24, variants=2)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A hundred pictures with the usual flaws."""
    return write_sample(str(tmp_path_factory.mktemp("sample")), 100, 7)


def configured(root: str, sample: dict[str, str], **settings: Any) -> ImageAugmentationConfig:
    settings = {"augmentation": SMALL, "images_per_file": 16, **settings}
    return ImageAugmentationConfig(root=root, **sample, **settings)


def run(config: ImageAugmentationConfig, run_id: str | None = None) -> tuple[ImagePlan, AugmentedImages]:
    plan = plan_images(config, reserve(config.root, DATASET, run_id or uuid.uuid4().hex), None)
    return plan, augment_images(plan, config)


def rows(augmented: AugmentedImages) -> pl.DataFrame:
    """All written rows, with the split of their directory, in the order of their ids."""
    tables = []
    for entry in augmented.files:
        with storage.open_input(layout.join(augmented.reservation.uri, entry.path)) as source:
            table = pq.read_table(source)
        assert table.num_rows == entry.rows
        split = entry.path.split("/")[0].removeprefix("split=")
        tables.append(table.append_column("split", pa.array([split] * table.num_rows)))
    frame = pl.from_arrow(pa.concat_tables(tables).replace_schema_metadata())
    assert isinstance(frame, pl.DataFrame)
    return frame.sort("image_id")


def originals(augmented: AugmentedImages) -> pl.DataFrame:
    (entry,) = augmented.side_files
    with storage.open_input(layout.join(augmented.reservation.uri, entry.path)) as source:
        frame = pl.from_arrow(pq.read_table(source))
    assert isinstance(frame, pl.DataFrame)
    return frame


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, sample: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> AugmentedImages:
    return run(configured(str(tmp_path_factory.mktemp("undisturbed")), sample))[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"images_per_file": 1000},
        {"images_per_file": 7},
        {"workers": "actors", "actors": 1},
        pytest.param({"workers": "actors", "actors": 2, "images_per_file": 33}, marks=pytest.mark.nightly),
    ],
)
def test_rows_dont_depend_on_the_division_of_the_work(
    sample: dict[str, str], undisturbed: AugmentedImages, tmp_path: Path, settings: dict[str, Any]
) -> None:
    augmented = run(configured(str(tmp_path), sample, **settings))[1]
    assert rows(augmented).equals(rows(undisturbed))
    named = ["image_id", "content_xxh3", "split", "alike", "perceptual_hash", "mean_score"]
    assert (
        originals(augmented)
        .select(named)
        .sort("image_id")
        .equals(originals(undisturbed).select(named).sort("image_id"))
    )
    assert augmented.profile.columns() == undisturbed.profile.columns()


def test_images_and_store_on_s3_give_the_same_rows(
    sample: dict[str, str], undisturbed: AugmentedImages, s3_root: str
) -> None:
    for info in storage.list_files(sample["images"]):
        name = info.uri.rpartition("/")[2]
        storage.write_bytes(layout.join(s3_root, "source", name), storage.read_bytes(info.uri))
    storage.write_bytes(layout.join(s3_root, "labels.csv"), storage.read_bytes(sample["labels"]))
    source = {"images": layout.join(s3_root, "source"), "labels": layout.join(s3_root, "labels.csv")}
    augmented = run(configured(layout.join(s3_root, "root"), source))[1]
    assert rows(augmented).drop("file_path").equals(rows(undisturbed).drop("file_path"))


def test_every_image_is_a_row_or_rejected_with_a_reason(sample: dict[str, str], undisturbed: AugmentedImages) -> None:
    images, labels = undisturbed.balances
    assert images.rows_in == len(list(Path(sample["images"]).iterdir()))
    assert images.rows_out == undisturbed.images == len(originals(undisturbed))
    assert images.rejected == {
        "conflicting_labels": 1,
        "empty_file": 1,
        "not_an_image": 1,
        "truncated": 1,
        "unlabelled": 1,
    }
    assert labels.rejected == {"conflicting_labels": 2, "no_image": 1}
    kept = []
    for entry in undisturbed.rejected_files:
        with storage.open_input(layout.join(undisturbed.reservation.uri, entry.path)) as source:
            table = pq.read_table(source)
        kept += [(entry.path.split("/")[1].split("-")[0], row["reason"], row["detail"]) for row in table.to_pylist()]
    assert sorted(reason for source, reason, _ in kept if source != "labels") == sorted(images.rejected)
    assert all(detail for _, _, detail in kept)
    written = rows(undisturbed)
    assert len(written) == undisturbed.variants < 2 * images.rows_out
    assert written["image_id"].n_unique() == len(written)


def test_variants_are_torchvisions(sample: dict[str, str], undisturbed: AugmentedImages) -> None:
    from tasks.images.decode import Decoded, Decoder
    from tasks.images.draws import draw, image_keys

    written = rows(undisturbed)
    decoder = Decoder(10**7, (255, 255, 255))
    for name in ("img-000003", "img-000042"):
        own = written.filter(pl.col("original_image_id") == name)
        decoded = decoder.decode(Path(own["file_path"][0]).read_bytes())
        assert isinstance(decoded, Decoded)
        height, width = decoded.pixels.shape[:2]
        draws = draw(image_keys([name], 0), np.array([height]), np.array([width]), SMALL)
        for number, stored in enumerate(own["image"]):
            made = np.frombuffer(stored, np.uint8).reshape(3, 24, 24).astype(int)
            assert np.abs(made - reference_variant(decoded.pixels, draws, number, 24)).mean() < 1


@pytest.mark.parametrize(
    "name",
    [
        "own_generator",
        pytest.param("system_randomness", marks=pytest.mark.nightly),
        pytest.param("drawn_at_import", marks=pytest.mark.nightly),
        pytest.param("transform", marks=pytest.mark.nightly),
    ],
)
def test_a_policy_that_gives_something_else_each_time_is_refused(
    sample: dict[str, str], tmp_path: Path, name: str
) -> None:
    augmentation = Augmentation(size=16, variants=2, policy=f"tests.images.policies:{name}")
    config = configured(str(tmp_path), sample, augmentation=augmentation)
    plan = plan_images(config, reserve(config.root, DATASET, "run"), None)
    job = ImageJob(config=config, reservation=plan.reservation, plan_uri=plan.uri, digests=plan.digests, classes=9)
    if name == "transform":
        check_policy(job)
        return
    with pytest.raises(
        ConfigError, match=rf"policies:{name}' isn't reproducible: \d+ of 1\d variants.*seeded for each"
    ):
        check_policy(job)


def test_variants_of_one_image_share_a_split_and_so_do_copies(undisturbed: AugmentedImages) -> None:
    written = rows(undisturbed)
    assert written.group_by("original_image_id").agg(pl.col("split").n_unique())["split"].max() == 1
    table = originals(undisturbed)
    alike = table.filter(pl.col("alike").is_not_null())
    assert (
        alike.group_by("alike").agg(pl.len(), pl.col("split").n_unique().alias("splits"))["splits"].to_list() == [1] * 3
    )
    assert undisturbed.like_group_count == 3
    assert undisturbed.leaking_groups == 0
    by_split = dict(table.group_by("split").len().iter_rows())
    assert by_split == dict(table.join(written, left_on="image_id", right_on="original_image_id")
                            .unique("image_id").group_by("split_right").len().iter_rows())  # fmt: skip


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., str]:
    """A class-per-folder source of n pictures, with near-duplicates of the first ones."""

    def make(count: int, copies: int) -> str:
        base = tmp_path / "source"
        for number in range(count):
            path = base / picture_class(number) / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(picture(11, number)))
        for number in range(copies):
            pixels = picture(11, number)
            small = np.asarray(Image.fromarray(pixels).resize((pixels.shape[1] // 2, pixels.shape[0] // 2)))
            (base / picture_class(number) / f"copy-{number:03d}.jpg").write_bytes(jpeg(small, 60))
        return str(base)

    return make


def test_near_duplicates_found_at_the_end_move_to_the_right_split(folders: Callable[..., str], tmp_path: Path) -> None:
    source = folders(60, 30)
    config = ImageAugmentationConfig(
        root=str(tmp_path / "root"), images=source, augmentation=SMALL, images_per_file=16, validation_share=0.3
    )
    plan, augmented = run(config)
    planned = pl.from_arrow(pa.concat_tables(read_units(plan.uri, range(plan.units), plan.images_per_unit)))
    assert isinstance(planned, pl.DataFrame)
    table = originals(augmented).with_columns(copy=pl.col("image_id").str.replace("copy-", ""))
    pairs = table.group_by("copy").agg(pl.len(), pl.col("split").n_unique().alias("splits"))
    assert pairs.filter(pl.col("len") == 2).height == 30
    assert pairs["splits"].max() == 1, "a picture and its copy are in different splits"
    joined = planned.join(table, on="image_id", suffix="_now")
    names = pl.Series(["train", "validation", "test"])
    moved = joined.filter(names.gather(joined["split"].cast(pl.UInt32)) != joined["split_now"])
    assert moved.height > 0, "nothing had to move: the test shows nothing"
    assert augmented.moved_units > 0
    written = rows(augmented)
    assert len(written) == sum({"train": 2, "validation": 1}[split] for split in table["split"])
    now = dict(table.select("image_id", "split").iter_rows())
    assert all(now[name] == split for name, split in written.select("original_image_id", "split").iter_rows())
    # What moved has the pixels and the figures of its split.
    units = pa.concat_tables(read_units(plan.uri, range(plan.units), plan.images_per_unit))
    for split in ("train", "validation"):
        mine = table.filter(pl.col("split") == split)["image_id"].to_list()
        chosen = units.filter(pa.compute.is_in(units["image_id"], pa.array(mine)))
        outcomes, made = augment_again(config.of_split(split), len(plan.classes), chosen)
        wanted = pl.from_arrow(made.replace_schema_metadata())
        assert isinstance(wanted, pl.DataFrame)
        stored = written.filter(pl.col("split") == split).drop("split")
        assert stored.equals(wanted.sort("image_id"))
        noted = table.join(pl.DataFrame({"image_id": chosen["image_id"].to_pylist()}), on="image_id", how="inner")
        noted = noted.sort("image_id").select("mean_score", "passed", "ready", "content_xxh3")
        by_id = np.argsort(chosen["image_id"].to_pylist())
        scores = [float(np.mean(outcomes["scores"][row].as_py())) for row in by_id.tolist()]
        assert noted["mean_score"].to_list() == pytest.approx(scores)
        assert noted["passed"].to_list() == outcomes["passed"].take(pa.array(by_id)).to_pylist()
        assert noted["content_xxh3"].to_list() == outcomes["content"].take(pa.array(by_id)).to_pylist()


def test_images_that_arent_trained_on_may_be_augmented_like_the_others(
    sample: dict[str, str], undisturbed: AugmentedImages, tmp_path: Path
) -> None:
    augmented = run(configured(str(tmp_path), sample, evaluation="augmented"))[1]
    every, usual = rows(augmented), rows(undisturbed)
    assert len(every) == 2 * augmented.images
    assert every.filter(pl.col("split") == "train").equals(usual.filter(pl.col("split") == "train"))
    held_out = usual.filter(pl.col("split") == "validation")
    assert held_out["augmentation_id"].unique().to_list() == [0]
    assert not every.join(held_out, on="image_id").filter(pl.col("image") == pl.col("image_right")).height


def test_without_variants_each_image_is_there_once(
    sample: dict[str, str], undisturbed: AugmentedImages, tmp_path: Path
) -> None:
    config = configured(str(tmp_path), sample, augmentation=SMALL.model_copy(update={"variants": 0}))
    augmented = run(config)[1]
    stored, usual = rows(augmented), rows(undisturbed)
    assert len(stored) == augmented.images == augmented.variants
    assert set(stored["split"]) == {"train", "validation"}
    assert set(stored["original_image_id"]) == set(usual["original_image_id"])
    assert (
        stored.select("original_image_id", "split")
        .sort("original_image_id")
        .equals(usual.select("original_image_id", "split").unique().sort("original_image_id"))
    )
    with pytest.raises(ValidationError, match="variants = 0 makes no use of policy = 'any:policy'"):
        Augmentation(variants=0, policy="any:policy")


def attempt_after(config: ImageAugmentationConfig, run_id: str) -> tuple[ImagePlan, AugmentedImages]:
    """Run again under the same reservation, as a retry or a resumed run does."""
    plan, augmented = run(config, run_id)
    assert plan.reservation.attempt > 1
    return plan, augmented


def digests(augmented: AugmentedImages) -> dict[str, str]:
    """SHA-256 of each data file, by its name without the attempt."""
    return {entry.path.rpartition("-a")[0]: entry.digest for entry in augmented.files}


def notes(reservation: Reservation) -> list[Path]:
    return sorted(Path(reservation.uri, layout.WORK).glob("unit-*"))


def test_a_second_attempt_takes_over_what_is_finished(sample: dict[str, str], tmp_path: Path) -> None:
    config = configured(str(tmp_path), sample)
    first = run(config, "run")[1]
    plan, second = attempt_after(config, "run")
    assert second.resumed_units == plan.units == 7
    assert digests(second) == digests(first)
    assert rows(second).equals(rows(first))
    assert originals(second).equals(originals(first))


@pytest.mark.parametrize("fault", ["no note", "cut note", "cut file", "no file"])
def test_only_what_isnt_whole_is_done_again(sample: dict[str, str], tmp_path: Path, fault: str) -> None:
    config = configured(str(tmp_path), sample)
    first = run(config, "run")[1]
    note = notes(first.reservation)[3]
    data = Path(first.reservation.uri, "split=train", "part-00003-a1.parquet")
    if fault == "no note":
        note.unlink()
    elif fault == "cut note":
        note.write_bytes(note.read_bytes()[:-10])
    elif fault == "cut file":
        data.write_bytes(data.read_bytes()[:-10])
    else:
        data.unlink()
    plan, second = attempt_after(config, "run")
    assert second.resumed_units == plan.units - 1
    assert digests(second) == digests(first)
    assert any("part-00003-a2" in entry.path for entry in second.files)


def test_another_configuration_takes_nothing_over(sample: dict[str, str], tmp_path: Path) -> None:
    first = run(configured(str(tmp_path), sample), "run")[1]
    second = attempt_after(configured(str(tmp_path), sample, seed=1), "run")[1]
    assert second.resumed_units == 0
    assert set(digests(first).values()).isdisjoint(digests(second).values())


def test_a_changed_source_file_is_augmented_again(folders: Callable[..., str], tmp_path: Path) -> None:
    source = folders(32, 0)
    config = ImageAugmentationConfig(root=str(tmp_path / "root"), images=source, augmentation=SMALL, images_per_file=8)
    run(config, "run")
    path = sorted(Path(source).rglob("*.jpg"))[20]
    path.write_bytes(jpeg(picture(12, 20)))
    second = attempt_after(config, "run")[1]
    assert second.resumed_units == 3


def test_images_that_vanish_are_rejected_not_lost(folders: Callable[..., str], tmp_path: Path) -> None:
    source = folders(20, 0)
    config = ImageAugmentationConfig(root=str(tmp_path / "root"), images=source, augmentation=SMALL, images_per_file=8)
    plan = plan_images(config, reserve(config.root, DATASET, "run"), None)
    sorted(Path(source).rglob("*.jpg"))[3].unlink()
    augmented = augment_images(plan, config)
    assert augmented.balances[0].rejected == {"unreadable": 1}
    assert augmented.images == 19


def test_no_image_that_can_be_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "cats"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"<html>gone</html>")
    config = ImageAugmentationConfig(root=str(tmp_path / "root"), images=str(tmp_path / "source"), augmentation=SMALL)
    augmented = run(config)[1]
    assert augmented.files == ()
    assert augmented.images == 0
    assert augmented.balances[0].rejected == {"not_an_image": 3}


def test_files_that_hold_other_rows_than_they_should_fail_the_run(sample: dict[str, str], tmp_path: Path) -> None:
    config = configured(str(tmp_path), sample)
    first = run(config, "run")[1]
    note = notes(first.reservation)[0]
    table = pq.read_table(note)
    meta = table.schema.metadata[b"unit"].replace(b'"rows": ', b'"rows": 1')
    pq.write_table(table.replace_schema_metadata({b"unit": meta}), note)
    with pytest.raises(BalanceError, match=r"unit 0, split train: \d+ variants were made, 1\d+ were written"):
        attempt_after(config, "run")


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "cpu"},
        pytest.param({"device": "cpu", "workers": "actors", "actors": 1}, marks=pytest.mark.nightly),
    ],
)
def test_the_torch_engine_gives_the_same_splits_and_nearly_the_same_pixels(
    sample: dict[str, str], undisturbed: AugmentedImages, tmp_path: Path, settings: dict[str, Any]
) -> None:
    made, wanted = rows(run(configured(str(tmp_path), sample, **settings))[1]), rows(undisturbed)
    assert made.select("image_id", "split", "class_id").equals(wanted.select("image_id", "split", "class_id"))
    pixels = [
        np.stack([np.frombuffer(one, np.uint8) for one in frame["image"]]).astype(int) for frame in (made, wanted)
    ]
    assert np.abs(pixels[0] - pixels[1]).mean() < 0.5


@pytest.mark.parametrize("kind", ["float32", "jpeg", "webp"])
def test_other_formats_hold_the_same_pictures(
    sample: dict[str, str], undisturbed: AugmentedImages, tmp_path: Path, kind: str
) -> None:
    augmented = run(configured(str(tmp_path), sample, format=kind, quality=98))[1]
    wanted = {row["image_id"]: np.frombuffer(row["image"], np.uint8) for row in rows(undisturbed).to_dicts()}
    entry = augmented.files[0]
    table = pq.read_table(Path(augmented.reservation.uri, entry.path))
    images = decode_images(table)
    if kind == "float32":
        mean, std = np.array(SMALL.mean)[:, None, None], np.array(SMALL.std)[:, None, None]
        images = np.rint((images * std + mean) * 255)
    for name, image in zip(table["image_id"].to_pylist(), images, strict=True):
        gap = np.abs(image.astype(int).ravel() - wanted[name])
        assert gap.max() == 0 if kind == "float32" else gap.mean() < 30  # tiny pictures of bright colours suffer


def test_many_files_of_one_size_are_compared_in_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that plans opens none of them, and finds the same copies."""
    for number in range(40):
        (tmp_path / f"{number:02d}.png").write_bytes(b"%d" % (number % 9))
    table = list_images(str(tmp_path)).table
    here = content_groups(table)
    assert len(set(here.tolist())) == 9
    monkeypatch.setattr(sources, "DIGESTED_AT_ONCE", 7)
    monkeypatch.setattr(sources, "digest_files", None)
    assert content_groups(table, digest_in_tasks).tolist() == here.tolist()
