"""Rows of every format read back as what was put in, and tell where each variant came from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.engines import Scored, measure, score
from tasks.images.rows import Originals, build_rows, decode_images, normalise, one_hot, rows_schema
from tasks.io.errors import ConfigError, InputError
from tasks.io.storage import write_parquet
from tasks.io.tensors import AnyArray, is_tensor, parquet_settings, tensor_spec, to_numpy

Format = Literal["uint8", "float32", "jpeg", "webp"]
FORMATS: tuple[Format, ...] = ("uint8", "float32", "jpeg", "webp")
COLUMNS = [
    "image_id",
    "original_image_id",
    "augmentation_id",
    "file_path",
    "image",
    "class_id",
    "class_name",
    "one_hot_label",
    "data_quality_score",
    "validation_passed",
    "quality_issues",
    "is_training_ready",
]


def configured(form: Format = "uint8", size: int = 16, variants: int = 3, **changes: Any) -> ImageAugmentationConfig:
    changes = {"evaluation": "augmented", **changes}
    return ImageAugmentationConfig(format=form, augmentation=Augmentation(size=size, variants=variants), **changes)


def test_a_policy_with_a_scale_of_its_own_leaves_none_for_images_that_it_isnt_asked_of() -> None:
    images = np.zeros((2, 3, 16, 16), np.float32)
    with pytest.raises(ConfigError, match=r"gives float32 in a scale of its own.*--evaluation augmented"):
        build_rows(configured("float32", variants=1, evaluation="center"), images, originals(2), scored(images), 3)


def originals(count: int = 2) -> Originals:
    return Originals(
        ids=pa.array([f"scan_{n}" for n in range(count)], pa.string()),
        uris=pa.array([f"s3://bucket/scan_{n}.png" for n in range(count)], pa.string()),
        class_ids=np.arange(count, dtype=np.int32) % 3,
        class_names=pa.array(["bee", "cat", "dog"] * count, pa.string()).slice(0, count),
    )


def pictures(count: int, size: int = 16) -> npt.NDArray[np.uint8]:
    """Smooth pictures, each unlike the others: compressed formats keep them nearly as they are."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(2 * x + n / 3) * np.cos(y * (c + 1)) for n in range(count) for c in range(3)]
    planes = np.array(waves).reshape(count, 3, size, size) if count else np.empty((0, 3, size, size))
    return (127.5 + 100 * planes).astype(np.uint8)


def scored(images: AnyArray) -> Scored:
    count = len(images)
    measured = measure(images) if images.dtype in (np.uint8, np.float32) else measure(pictures(count))
    return score(measured, np.ones(count, np.float32), np.zeros(count, np.int32), 3, configured().thresholds)


def built(
    config: ImageAugmentationConfig | None = None, images: AnyArray | None = None, count: int = 2, classes: int = 3
) -> pa.Table:
    config = config or configured()
    images = pictures(count * config.augmentation.variants, config.augmentation.size) if images is None else images
    return build_rows(config, images, originals(count), scored(images), classes)


def reread(table: pa.Table) -> pa.Table:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **parquet_settings(table.schema))
    return pq.read_table(buffer)


def test_each_variant_says_what_it_is_and_where_it_came_from() -> None:
    table = built()
    assert table.column_names == COLUMNS
    assert table.drop_columns(["image", "one_hot_label"]).slice(2, 2).to_pylist() == [
        {
            "image_id": "scan_0_aug_2",
            "original_image_id": "scan_0",
            "augmentation_id": 2,
            "file_path": "s3://bucket/scan_0.png",
            "class_id": 0,
            "class_name": "bee",
            "data_quality_score": 1.0,
            "validation_passed": True,
            "quality_issues": [],
            "is_training_ready": True,
        },
        {
            "image_id": "scan_1_aug_0",
            "original_image_id": "scan_1",
            "augmentation_id": 0,
            "file_path": "s3://bucket/scan_1.png",
            "class_id": 1,
            "class_name": "cat",
            "data_quality_score": 1.0,
            "validation_passed": True,
            "quality_issues": [],
            "is_training_ready": True,
        },
    ]
    assert to_numpy(table, "one_hot_label").tolist() == [[1, 0, 0]] * 3 + [[0, 1, 0]] * 3


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_schema_is_the_same_whatever_the_rows(form: Format, count: int) -> None:
    table = built(configured(form), count=count)
    assert table.num_rows == 3 * count
    assert table.schema.equals(rows_schema(configured(form), 3), check_metadata=True)
    assert reread(table).schema.equals(table.schema, check_metadata=True)
    assert not any(field.nullable for field in table.schema)
    table.validate(full=True)
    assert not any(column.null_count for column in table.columns)
    assert decode_images(table).shape == (3 * count, 3, 16, 16)


@pytest.mark.parametrize("size", [8, 17, 224])
def test_uint8_comes_back_bit_for_bit_and_is_not_copied(size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3, size, size), dtype=np.uint8)
    table = built(configured(size=size), images)
    found = decode_images(table)
    assert found.__array_interface__["data"][0] == images.__array_interface__["data"][0]
    assert np.array_equal(decode_images(reread(table)), images)


def test_float32_is_normalised_as_torchvision_does_it() -> None:
    import torch

    config = configured("float32")
    images = np.arange(6 * 3 * 16 * 16, dtype=np.uint64).astype(np.uint8).reshape(6, 3, 16, 16)
    found = decode_images(reread(built(config, images)))
    # torchvision: to_dtype_image divides by 255, normalize_image subtracts and divides in place, all in float32
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.augmentation.mean, config.augmentation.std))
    wanted = torch.from_numpy(images).to(torch.float32).div_(255).sub_(mean).div_(std)
    assert np.array_equal(found, wanted.numpy())


def test_normalised_pictures_can_be_turned_back() -> None:
    images = pictures(2)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    back = normalise(images, mean, std) * np.array(std)[:, None, None] + np.array(mean)[:, None, None]
    assert np.array_equal(np.rint(back * 255), images)


def test_floats_of_a_policy_are_stored_as_they_are() -> None:
    images = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
    images[0, 0, 0, 0] = np.nan
    table = built(configured("float32"), images)
    assert decode_images(reread(table)).tobytes() == images.tobytes()
    assert table["quality_issues"][0].as_py() == ["not_finite"]


@pytest.mark.parametrize(("form", "decibels"), [("jpeg", 40), ("webp", 33)])
@pytest.mark.parametrize("size", [9, 64])
def test_compressed_pictures_come_back_nearly_as_they_were(form: Format, decibels: float, size: int) -> None:
    config = configured(form, size=size)
    images = pictures(6, size)
    table = reread(built(config, images))
    found = decode_images(table)
    assert found.shape == images.shape
    error = np.mean((found.astype(float) - images) ** 2, axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error)).min() > decibels
    assert np.array_equal(decode_images(table.slice(2, 3)), found[2:5])
    assert np.array_equal(decode_images(table.to_batches()[0]), found)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_channels_keep_their_places(form: Format) -> None:
    images = np.zeros((3, 3, 16, 16), np.uint8)
    for channel in range(3):
        images[channel, channel] = 250
    found = decode_images(built(configured(form), images, count=1))
    assert found.mean(axis=(2, 3)).argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_quality_is_what_the_configuration_says(form: Format) -> None:
    draw = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    sizes = [
        built(configured(form, size=32, quality=quality), draw, count=1)["image"].nbytes for quality in (10, 90, 100)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def test_the_image_field_says_how_to_read_it() -> None:
    spec = tensor_spec(rows_schema(configured("float32", size=10), 3).field("image"))
    assert (spec.shape, spec.dtype, spec.dimensions) == ((3, 10, 10), "float32", ("channel", "height", "width"))
    field = rows_schema(configured("jpeg", size=10), 3).field("image")
    assert not is_tensor(field)
    assert json.loads(field.metadata[b"encoded_image"]) == {
        "encoding": "jpeg",
        "shape": [3, 10, 10],
        "dtype": "uint8",
        "dimensions": ["channel", "height", "width"],
    }


def test_a_file_of_rows_reads_back(tmp_path: Path) -> None:
    table = built(count=50)
    written = write_parquet(table, str(tmp_path / "rows.parquet"), **parquet_settings(table.schema))
    assert pq.read_table(written.uri).equals(table)


def test_labels_of_no_class_are_zeros() -> None:
    assert one_hot(np.array([1, -1, 2, 0], np.int32), 2).tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]
    assert one_hot(np.array([], np.int32), 4).shape == (0, 4)


def test_slices_and_large_strings_of_originals_are_taken() -> None:
    whole = originals(4)
    part = Originals(
        ids=whole.ids.slice(2).cast(pa.large_string()),
        uris=whole.uris.slice(2),
        class_ids=whole.class_ids[2:].astype(np.int64),  # type: ignore[arg-type]
        class_names=whole.class_names.slice(2).dictionary_encode(),
    )
    images = pictures(12)
    expected = build_rows(configured(), images, whole, scored(images), 3).slice(6)
    assert build_rows(configured(), images[6:], part, scored(images[6:]), 3).equals(expected)


def replaced(**changes: Any) -> Originals:
    values = {name: getattr(originals(), name) for name in ("ids", "uris", "class_ids", "class_names")}
    return Originals(**values | changes)


def build(images: AnyArray | None = None, form: Format = "uint8", **changes: Any) -> pa.Table:
    images = pictures(6) if images is None else images
    return build_rows(configured(form), images, replaced(**changes), scored(pictures(6)), 3)


def damaged(value: bytes, form: Format = "jpeg") -> pa.Table:
    field = rows_schema(configured(form), 3).field("image")
    return pa.table([pa.array([value], pa.binary())], schema=pa.schema([field]))


def encoded(size: int, form: Format = "jpeg") -> bytes:
    data: bytes = built(configured(form, size=size), count=1)["image"][0].as_py()
    return data


WRONG: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("too few", lambda: build(pictures(5)), ConfigError, r"where \(6, 3, 16, 16\) is asked for"),
    ("another size", lambda: build(pictures(6, 15)), ConfigError, "end the policy in a resize"),
    ("channels last", lambda: build(pictures(6).transpose(0, 2, 3, 1)), ConfigError, r"shape \(6, 16, 16, 3\)"),
    ("float to uint8", lambda: build(pictures(6).astype("f4")), ConfigError, "gives float32.*choose format = float32"),
    ("float to jpeg", lambda: build(pictures(6).astype("f4"), "jpeg"), ConfigError, "choose format = float32"),
    ("doubles", lambda: build(pictures(6).astype("f8"), "float32"), ConfigError, "end the policy in uint8 or float32"),
    ("an id too few", lambda: build(uris=pa.array(["a"])), InputError, "1 uris of 2 images"),
    ("no name", lambda: build(class_names=pa.array(["a", None])), InputError, "no class_names"),
    ("no id", lambda: build(ids=pa.array(["a", None])), InputError, "no ids"),
    (
        "scores too few",
        lambda: build_rows(configured(), pictures(6), originals(), scored(pictures(5)), 3),
        InputError,
        "5 values of score for 6 variants",
    ),
    ("no column", lambda: decode_images(built(), "picture"), InputError, "no column 'picture'"),
    ("text", lambda: decode_images(built(), "class_name"), InputError, "holds no images"),
    ("damaged", lambda: decode_images(damaged(b"\xff\xd8\xff junk")), InputError, "row 0 .* is no jpeg image"),
    ("cut short", lambda: decode_images(damaged(encoded(16)[:100])), InputError, "row 0 .* is no jpeg image"),
    ("empty", lambda: decode_images(damaged(b"")), InputError, "row 0 .* is no jpeg image"),
    ("no webp", lambda: decode_images(damaged(encoded(16), "webp")), InputError, "row 0 .* is no webp image"),
    ("webp cut short", lambda: decode_images(damaged(encoded(16, "webp")[:60], "webp")), InputError, "is no webp"),
    ("of another size", lambda: decode_images(damaged(encoded(17))), InputError, r"shape \(3, 17, 17\), not"),
]


@pytest.mark.parametrize(("why", "act", "error", "message"), WRONG, ids=[case[0] for case in WRONG])
def test_refused(why: str, act: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()
