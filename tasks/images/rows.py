"""The rows of a data file: one variant each, with its label, its origin, and its judgement. Pure.

The storage format of the picture is the configuration's choice, recorded in its field's metadata:

- uint8: a tensor column (`tasks.io.tensors`) of shape (3, size, size), as the transform returned it.
- float32: the same with (x/255 − mean)/std of each channel.
- jpeg, webp: a binary column; `decode_images` restores uint8. Their loss: 41 dB and 39 dB at quality 95.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.images.config import ImageAugmentationConfig
from tasks.images.engines import ISSUES_TYPE, Scored
from tasks.io.errors import ConfigError, InputError
from tasks.io.tensors import (
    ENCODED,
    AnyArray,
    Float32Array,
    Int32Array,
    UInt8Array,
    encoded_field,
    encoded_spec,
    is_tensor,
    tensor_array,
    tensor_field,
    to_numpy,
)

IMAGE = "image"
LABEL = "one_hot_label"
DIMENSIONS = ("channel", "height", "width")

# On photographs of 224 × 224, method 0 takes 2.5 ms an image, method 4 (Pillow's usual) 5.9 ms for 6 % less.
_WEBP_METHOD = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Originals:
    """The originals of some variants: n of each."""

    ids: pa.Array  # string
    uris: pa.Array  # string
    class_ids: Int32Array
    class_names: pa.Array  # string


def rows_schema(config: ImageAugmentationConfig, classes: int) -> pa.Schema:
    """Return the schema of the data files.

    Args:
        config: Format and size.
        classes: Number of classes, the length of the one-hot label.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("original_image_id", pa.string(), nullable=False),
            pa.field("augmentation_id", pa.int32(), nullable=False),
            pa.field("file_path", pa.string(), nullable=False),
            _image_field(config),
            pa.field("class_id", pa.int32(), nullable=False),
            pa.field("class_name", pa.string(), nullable=False),
            tensor_field(LABEL, (classes,), np.uint8, ("class",)),
            pa.field("data_quality_score", pa.float32(), nullable=False),
            pa.field("validation_passed", pa.bool_(), nullable=False),
            pa.field("quality_issues", ISSUES_TYPE, nullable=False),
            pa.field("is_training_ready", pa.bool_(), nullable=False),
        ]
    )


def build_rows(
    config: ImageAugmentationConfig, images: AnyArray, originals: Originals, scored: Scored, classes: int
) -> pa.Table:
    """Return the rows of the variants of n images, K each, by `rows_schema`; uint8 tensors are not copied.

    Args:
        config: Format, size, normalisation, and K as `augmentation.variants`.
        images: Shape (n·K, 3, size, size), the K variants of an image one after the other; uint8, or float32 from a
            policy that returns floats, which is stored as it is.
        originals: The n images.
        scored: The judgement of the n·K variants.
        classes: Number of classes. An id outside them gets a label of zeros.

    Raises:
        ConfigError: the policy's values can't be stored in this format, or have another shape.
        InputError: inconsistent lengths, or a null.
    """
    variants = config.augmentation.variants
    count = len(originals.ids) * variants
    wanted = (count, 3, config.augmentation.size, config.augmentation.size)
    if images.shape != wanted:
        raise ConfigError(
            f"variants of shape {images.shape}, where {wanted} is asked for ({len(originals.ids)} images, "
            f"augmentation.variants = {variants}); end the policy in a resize or crop to augmentation.size"
        )
    _check_lengths(originals, scored, count)
    repeats = pa.array(np.repeat(np.arange(len(originals.ids)), variants))
    numbers = np.tile(np.arange(variants, dtype=np.int32), len(originals.ids))
    ids = originals.ids.cast(pa.string()).take(repeats)
    class_ids = np.repeat(np.asarray(originals.class_ids, dtype=np.int32), variants)
    columns: dict[str, Any] = {
        "image_id": pc.binary_join_element_wise(ids, "aug", pa.array(numbers).cast(pa.string()), "_"),
        "original_image_id": ids,
        "augmentation_id": pa.array(numbers),
        "file_path": originals.uris.cast(pa.string()).take(repeats),
        IMAGE: _stored(config, images),
        "class_id": pa.array(class_ids),
        "class_name": originals.class_names.cast(pa.string()).take(repeats),
        LABEL: tensor_array(one_hot(class_ids, classes)),
        "data_quality_score": pa.array(scored.score, pa.float32()),
        "validation_passed": pa.array(scored.passed),
        "quality_issues": scored.issues,
        "is_training_ready": pa.array(scored.ready),
    }
    return pa.table(columns, schema=rows_schema(config, classes))


def decode_images(rows: pa.Table | pa.RecordBatch, column: str = IMAGE) -> AnyArray:
    """Return the images of written rows, shape (n, 3, height, width): uint8, or normalised float32.

    Tensors come as a read-only view if possible (`tasks.io.tensors.to_numpy`).

    Raises:
        InputError: no such column, one without images, or a value that isn't an image of its kind and shape.
    """
    position = rows.schema.get_field_index(column)
    if position < 0 or is_tensor(rows.schema.field(position)):
        return to_numpy(rows, column)
    field = rows.schema.field(position)
    found = encoded_spec(field)
    if found is None:
        raise InputError(
            f"column {column!r} ({field.type}) holds no images: it has neither {ENCODED.decode()!r} nor 'tensor' in "
            "the field's metadata; if it was lost on the way, take the schema of the file"
        )
    encoding, shape = found[0], found[1].shape
    decode = _decode_jpeg if encoding == "jpeg" else _decode_webp
    images = np.empty((rows.num_rows, *shape), dtype=np.uint8)
    for row, value in enumerate(_values(rows.column(column))):
        try:
            image = decode(value).transpose(2, 0, 1)
        except (ValueError, OSError) as error:
            raise InputError(
                f"row {row} of column {column!r} is no {encoding} image ({error}); "
                "the file is damaged: verify the version"
            ) from error
        if image.shape != shape:
            raise InputError(f"row {row} of column {column!r} is an image of shape {image.shape}, not {shape}")
        images[row] = image
    return images


def normalise(images: UInt8Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Float32Array:
    """Return (x/255 − mean)/std of each channel, in float32 and this order, as torchvision's ToDtype and Normalize.

    Args:
        images: Shape (n, channels, height, width).
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, of the same values.
    """
    means, stds = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (mean, std))
    result = np.empty(images.shape, dtype=np.float32)
    for row, image in enumerate(images):  # one at a time stays in the cache
        np.divide(image, np.float32(255), out=result[row])
        result[row] -= means
        result[row] /= stds
    return result


def one_hot(class_ids: Int32Array, classes: int) -> UInt8Array:
    """Return one-hot labels, shape (n, classes), 1 at the class; an id outside of 0 to classes − 1 gives zeros."""
    labels: UInt8Array = (class_ids[:, None] == np.arange(classes, dtype=np.int32)).view(np.uint8)
    return labels


def _image_field(config: ImageAugmentationConfig) -> pa.Field:
    shape = (3, config.augmentation.size, config.augmentation.size)
    if config.format in ("uint8", "float32"):
        return tensor_field(IMAGE, shape, config.format, DIMENSIONS)
    return encoded_field(IMAGE, config.format, shape, DIMENSIONS)


def _check_lengths(originals: Originals, scored: Scored, count: int) -> None:
    for name in ("uris", "class_ids", "class_names"):
        if len(getattr(originals, name)) != len(originals.ids):
            raise InputError(f"{len(getattr(originals, name))} {name} of {len(originals.ids)} images")
    for name in ("score", "passed", "issues", "ready"):
        if len(getattr(scored, name)) != count:
            raise InputError(f"{len(getattr(scored, name))} values of {name} for {count} variants")
    for name in ("ids", "uris", "class_names"):
        if getattr(originals, name).null_count:
            raise InputError(f"an image has no {name}: leave it out before its variants are made")


def _stored(config: ImageAugmentationConfig, images: AnyArray) -> pa.Array:
    if images.dtype == np.float32 and config.format == "float32":
        if config.evaluation == "center" and config.validation_share + config.test_share > 0:
            raise ConfigError(
                f"policy = '{config.augmentation.policy}' gives float32 in a scale of its own, in which validation and "
                "test images can't be given: end it in uint8 (--format float32 normalises by --augmentation.mean and "
                ".std), or augment these too, with --evaluation augmented"
            )
        return tensor_array(images)
    if images.dtype != np.uint8:
        cure = (
            "choose format = float32, or end the policy in uint8"
            if images.dtype == np.float32
            else "end the policy in uint8 or float32"
        )
        raise ConfigError(f"the policy gives {images.dtype}, which format = {config.format} can't hold; {cure}")
    if config.format == "uint8":
        return tensor_array(images)
    if config.format == "float32":
        return tensor_array(normalise(images, config.augmentation.mean, config.augmentation.std))
    encode = _encode_jpeg if config.format == "jpeg" else _encode_webp
    return pa.array([encode(_interleaved(image), config.quality) for image in images], pa.binary())


def _interleaved(image: UInt8Array) -> UInt8Array:
    """Return height × width × channel, contiguous; in a quarter of the time of numpy's copy of the transpose."""
    result = np.empty((*image.shape[1:], image.shape[0]), dtype=np.uint8)
    for channel, plane in enumerate(image):
        result[..., channel] = plane
    return result


def _encode_jpeg(image: UInt8Array, quality: int) -> bytes:
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling="444")
    return data


def _decode_jpeg(data: UInt8Array) -> UInt8Array:
    import simplejpeg

    image: UInt8Array = simplejpeg.decode_jpeg(data, colorspace="RGB")
    return image


def _encode_webp(image: UInt8Array, quality: int) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "WEBP", quality=quality, method=_WEBP_METHOD)
    return data.getvalue()


def _decode_webp(data: UInt8Array) -> UInt8Array:
    from PIL import Image

    with Image.open(io.BytesIO(data.tobytes()), formats=["WEBP"]) as image:
        return np.asarray(image.convert("RGB"))


def _values(column: pa.Array | pa.ChunkedArray) -> Iterator[UInt8Array]:
    """Yield the bytes of each value, without a copy."""
    for value in column:
        yield np.frombuffer(value.as_buffer(), dtype=np.uint8)
