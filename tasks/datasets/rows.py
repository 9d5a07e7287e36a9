"""Rows of a Ray Dataset as they are stored: their columns, the rejected ones, and the ids of the others. Pure.

    block ─ same columns and types ─ rows without label, entity or picture are set aside ─ id of each row ─ file

A row's id is the stable hash of its values. So it is the same however the dataset is cut into blocks, and whatever the
order of its rows; and so are the samples, splits and order of a streaming-ready copy, which are functions of the ids.
The sum of two further hashes of all ids is the digest of the content: that of a multiset of rows (the additive hash of
Bellare & Micciancio 1997, "A new paradigm for collision-free hashing", with hashes that resist chance, not attackers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.types as pt
from blake3 import blake3
from PIL import Image

from tasks.datasets.config import DatasetConfig
from tasks.delivery.source import sample_keys
from tasks.images.decode import Decoder, Rejection
from tasks.io.errors import ConfigError, SourceError
from tasks.io.hashing import is_text, stable_hash
from tasks.io.tensors import TensorSpec, parquet_settings, tensor_array, tensor_field
from tasks.io.text import closest
from tasks.store.layout import IMAGE_ID, ROW_ID

IMAGE = "image"
REASON, DETAIL = "_reason", "_detail"
_ROW = "_row"
CHANNELS = 3
_DIMENSIONS = ("channel", "height", "width")
_WHITE = (255, 255, 255)
_FIRST, _SECOND = 1, 2  # seeds of the two hashes of an id
_MASK = (1 << 64) - 1
_STORED = "numbers, booleans, text, dates and times"

Content = tuple[int, int, int]
"""Number of rows, and the sums of both hashes of their ids, modulo 2**64."""


@dataclass(frozen=True, slots=True)
class Form:
    """Columns of a version.

    Attributes:
        config: The settings.
        given: Columns that blocks have, without that of the images, in their stored types.
        image: Shape of the stored images; None for tables.
    """

    config: DatasetConfig
    given: pa.Schema
    image: TensorSpec | None

    @property
    def key(self) -> str:
        """Column of the rows' ids."""
        return ROW_ID if self.image is None else IMAGE_ID

    @property
    def schema(self) -> pa.Schema:
        """Schema of the data files."""
        fields = [pa.field(self.key, pa.int64(), nullable=False)]
        if self.image is not None:
            fields.append(tensor_field(IMAGE, self.image.shape, self.image.dtype, _DIMENSIONS))
        return pa.schema([*fields, *self.given])

    @property
    def settings(self) -> dict[str, Any]:
        """Options of the Parquet files."""
        return {} if self.image is None else parquet_settings(self.schema)

    def define(self, content: Content) -> dict[str, Any]:
        """Return `manifest.definition`: JSON."""
        defined: dict[str, Any] = {
            "entity": self.config.entity or self.key,
            "key": self.key,
            "target": ",".join(self.config.labels) or None,
            "content": f"{content[1]:016x}{content[2]:016x}",
        }
        if self.image is not None:
            defined["image"] = {"format": self.image.dtype, "shape": list(self.image.shape)}
        return defined


@dataclass(frozen=True, slots=True)
class Made:
    """Stored rows of a block, its rejected rows, and their number by reason."""

    rows: pa.Table
    rejected: pa.Table
    reasons: Counter[str]


def form_of(head: pa.Table, config: DatasetConfig) -> Form:
    """Decide on the columns of a version by the first rows of a dataset.

    Args:
        head: The rows, at least one.
        config: The settings.

    Raises:
        ConfigError: the configuration names a column that isn't there, or one that can't be used.
        SourceError: a column's name or type can't be stored.
    """
    names, dataset = head.column_names, f"dataset '{config.name}'"
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise SourceError(f"{dataset} has two columns '{twice}': rename one of them")
    asked = [*(("label", name) for name in config.labels), ("entity", config.entity), ("image", config.image)]
    for option, name in asked:
        if name is not None and name not in names:
            raise ConfigError(f"{option}: {dataset} has no column '{name}'{closest(name, names)}")
    own = {ROW_ID} if config.image is None else {IMAGE_ID, IMAGE} - {config.image}
    fields = []
    for field in head.schema:
        if field.name in own or not field.name.strip() or field.name.startswith("_"):
            raise SourceError(
                f"{dataset} has a column '{field.name}': that name is kept for the rows' own columns; rename it"
            )
        if field.name != config.image:
            fields.append(pa.field(field.name, _stored_type(field, dataset)))
    given = pa.schema(fields)
    for label in config.labels:
        if pt.is_date(kind := given.field(label).type) or pt.is_timestamp(kind):
            raise ConfigError(f"label = '{label}' is {kind}: only text, booleans and numbers can be learned")
    image = None if config.image is None else _image_spec(head.schema.field(config.image), config)
    if image is None and not fields:
        raise SourceError(f"{dataset} has no column")
    return Form(config, given, image)


def _stored_type(field: pa.Field, dataset: str) -> pa.DataType:
    """Return the type that a column is stored in: text is plain, whatever its encoding."""
    kind = field.type
    if is_text(kind):
        return pa.large_string()
    if pt.is_null(kind):
        raise SourceError(
            f"{dataset}: column '{field.name}' has no value in the first rows, so that its type is unknown: cast it, "
            "or drop it (dataset.drop_columns)"
        )
    numeric = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)
    if numeric or pt.is_boolean(kind) or pt.is_date(kind) or pt.is_timestamp(kind):
        return kind
    cure = "drop it (dataset.drop_columns), or derive columns of these from it"
    if _is_tensor(kind) or pt.is_binary(kind) or pt.is_large_binary(kind):
        cure += "; a column of images is named with image"
    raise SourceError(f"{dataset}: column '{field.name}' is {kind}, and only {_STORED} can be stored: {cure}")


def _is_tensor(kind: pa.DataType) -> bool:
    # Arrow's tensors, and Ray's of one shape or of several.
    return isinstance(kind, pa.BaseExtensionType) and "tensor" in kind.extension_name.lower()


def _image_spec(field: pa.Field, config: DatasetConfig) -> TensorSpec:
    kind, what = field.type, f"image = '{field.name}'"
    encoded = pt.is_binary(kind) or pt.is_large_binary(kind)
    if not (encoded or _is_tensor(kind)):
        raise ConfigError(
            f"{what} is {kind}: give uint8 tensors of (height, width, {CHANNELS}), or encoded files as bytes"
        )
    if config.image_size is not None:
        return TensorSpec((CHANNELS, *config.image_size), "uint8", _DIMENSIONS)
    shape = getattr(kind, "shape", (None,))  # Ray's tensors of several shapes have None for each side
    if encoded or None in shape:
        have = "are encoded files" if encoded else "have several shapes"
        raise ConfigError(f"{what}: the images {have}: give image_size=(height, width), which they are resized to")
    empty = np.empty((1, *map(int, shape)), np.uint8)
    return TensorSpec(_channels_first(empty[0], what).shape, "uint8", _DIMENSIONS)


def _channels_first(pixels: npt.NDArray[Any], what: str) -> npt.NDArray[np.uint8]:
    """Return an image as (3, height, width); gray is repeated.

    Raises:
        SourceError: it isn't uint8, or has another number of channels.
    """
    if pixels.dtype != np.uint8:
        raise SourceError(f"{what} holds {pixels.dtype} tensors: convert the images to uint8, from 0 to 255")
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and shape[2] in (1, CHANNELS):
        pixels = np.moveaxis(pixels, 2, 0)
    elif not (pixels.ndim == 3 and shape[0] in (1, CHANNELS)):
        raise SourceError(
            f"{what} holds tensors of shape {shape}: give (height, width, {CHANNELS}), or gray (height, width)"
        )
    return np.broadcast_to(pixels, (CHANNELS, *pixels.shape[1:]))


def make_rows(block: pa.Table, form: Form) -> Made:
    """Return a block's rows as they are stored, and those that are rejected.

    Raises:
        SourceError: the block has other columns or types than the first one.
    """
    config, rows = form.config, _conform(block, form)
    codes, reasons = np.zeros(block.num_rows, np.int16), [""]
    details: dict[int, str] = {}

    def mark(bad: npt.NDArray[np.bool_], reason: str) -> None:
        if bad.any():
            if reason not in reasons:
                reasons.append(reason)
            codes[bad & (codes == 0)] = reasons.index(reason)

    for name in config.required:
        column = block[name] if name == config.image else rows[name]
        mark(column.is_null(nan_is_null=name != config.image).to_numpy(zero_copy_only=False), f"null_{name}")
    pictures: list[npt.NDArray[np.uint8]] = []
    if form.image is not None:
        decoder = Decoder(config.max_pixels, _WHITE)
        for row, value in enumerate(_values(block[config.image])):
            if codes[row]:
                continue
            found = _picture(value, form, decoder)
            if isinstance(found, Rejection):
                mark(np.arange(len(codes)) == row, found.reason)
                details[row] = found.detail
            else:
                pictures.append(found)
    good = codes == 0
    rows = rows.append_column(_ROW, pa.array(np.arange(len(codes))))  # a table without columns would forget its length
    kept = rows if good.all() else rows.filter(pa.array(good))
    if form.image is not None:
        images = np.stack(pictures) if pictures else np.empty((0, *form.image.shape), np.uint8)
        kept = kept.add_column(0, form.schema.field(IMAGE), tensor_array(images))
    bad = np.flatnonzero(~good).tolist()
    kept, rejected = kept.drop_columns([_ROW]), rows.take(pa.array(bad, pa.int64()))
    for name, texts in ((REASON, [reasons[codes[row]] for row in bad]), (DETAIL, [details.get(row) for row in bad])):
        rejected = rejected.append_column(name, pa.array(texts, pa.string()))
    rejected = rejected.drop_columns([_ROW])
    counts = Counter({reasons[code]: int(count) for code, count in enumerate(np.bincount(codes)) if code and count})
    return Made(identified(kept, form.key).cast(form.schema), rejected, counts)


def _conform(block: pa.Table, form: Form) -> pa.Table:
    """Return a block's columns in their stored types, without that of the images.

    Raises:
        SourceError: a column is missing, is new, or has another type than in the first block.
    """
    name, wanted = form.config.name, {*form.given.names, *([form.config.image] if form.config.image else [])}
    cure = "give all blocks the same columns and types, such as by a cast in map_batches"
    for column in sorted(wanted ^ {*block.column_names}):
        what = f"lacks column '{column}'" if column in wanted else f"has a column '{column}', which the first one lacks"
        raise SourceError(f"dataset '{name}' changes between blocks: one {what}; {cure}")
    for field in form.given:
        found = block.schema.field(field.name).type
        same = found == field.type or pt.is_null(found) or (is_text(found) and is_text(field.type))
        if not same:
            raise SourceError(
                f"dataset '{name}' changes between blocks: column '{field.name}' is {found} in one, and {field.type} "
                f"in the first; {cure}"
            )
    rows = block.select(form.given.names)
    return rows.cast(form.given) if form.given.names else rows


def _values(column: pa.ChunkedArray) -> Iterator[Any]:
    """Yield each image of a column as an array, or its bytes, or None."""
    for chunk in column.chunks:
        if _is_tensor(chunk.type):
            arrow = isinstance(chunk, pa.FixedShapeTensorArray)
            pixels = chunk.to_numpy_ndarray() if arrow else chunk.to_numpy(zero_copy_only=False)
            yield from pixels
        else:
            yield from (value.as_buffer() for value in chunk)


def _picture(value: Any, form: Form, decoder: Decoder) -> npt.NDArray[np.uint8] | Rejection:
    """Return an image in the shape of the version, or why there is none."""
    assert form.image is not None
    what = f"image = '{form.config.image}'"
    if isinstance(value, np.ndarray):
        pixels = _channels_first(value, what)
    else:
        decoded = decoder.decode(memoryview(value))
        if isinstance(decoded, Rejection):
            return decoded
        pixels = np.moveaxis(decoded.pixels[..., :CHANNELS], 2, 0).copy()
    if pixels.shape == form.image.shape:
        return pixels
    if form.config.image_size is None:
        raise SourceError(
            f"{what}: an image of shape {pixels.shape[1:]} is among those of {form.image.shape[1:]} (height, width): "
            "give image_size=(height, width), which they are resized to"
        )
    height, width = form.config.image_size
    upright = Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, 2)))
    return np.moveaxis(np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR)), 2, 0)


def identified(rows: pa.Table, key: str) -> pa.Table:
    """Return rows with the id of each in front: 63 bits of the stable hash of all its values."""
    names = sorted(rows.column_names)
    keys = sample_keys([_hashable(rows[name]) for name in names]) >> np.uint64(1)
    return rows.add_column(0, pa.field(key, pa.int64(), nullable=False), pa.array(keys.astype(np.int64)))


def _hashable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a digest of each image, which is long, and other columns as they are."""
    if not pt.is_fixed_size_binary(column.type):
        return column
    digests = [blake3(value.as_buffer()).digest() for chunk in column.chunks for value in chunk]
    return pa.chunked_array([pa.array(digests, pa.binary())])


def content_of(ids: pa.ChunkedArray) -> Content:
    """Return the digest of some rows by their ids, which adds up over any parts of them."""
    first, second = (int(np.sum(stable_hash(ids, seed), dtype=np.uint64)) for seed in (_FIRST, _SECOND))
    return len(ids), first, second


def added_up(contents: Sequence[Content]) -> Content:
    """Return the digest of all rows from those of parts of them."""
    counts, first, second = zip((0, 0, 0), *contents, strict=True)
    return sum(counts), sum(first) & _MASK, sum(second) & _MASK


def empty(name: str) -> SourceError:
    """Return the error for a dataset without rows."""
    return SourceError(f"dataset '{name}' has no row to publish: look at its source and its filters")
