"""The version to be delivered, checked before any work starts: its kind, columns, files and splits.

All faults of a source as a whole are found here, with an error that names the column and the cure;
faults of a row are found in `shuffle`.

A sample's identity, its split and its place in the order are stable hashes:

    entity ─┬───────────── split        never by row: an entity's rows stay together
            └ + times ─ key ─ + ordinal ─ sample id ─ + seed ─ random key ─ place in the split's order

A key depends only on the source's values, so it is the same in every version that holds the row. Rows with the same
key are distinguished by an ordinal, in the order of the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from tasks.delivery.config import DeliveryConfig
from tasks.io import storage
from tasks.io.errors import ConfigError
from tasks.io.hashing import is_text, stable_hash
from tasks.io.tensors import (
    Float64Array,
    Int8Array,
    Int64Array,
    TensorSpec,
    UInt64Array,
    encoded_spec,
    is_tensor,
    tensor_spec,
)
from tasks.io.text import closest
from tasks.loader.samples import IMAGE
from tasks.store import layout, versions
from tasks.store.layout import AS_OF, EVENT_TIME, IMAGE_ID, READY, RECORDS, TARGET
from tasks.store.manifest import FileEntry, InputRecord, Manifest
from tasks.store.reading import compare, explained, opened, verify_digest

SPLITS = ("train", "validation", "test")

_ORDER, _SPLIT = 0, 1  # each draw of a seed has a separate hash function
_PURPOSES = 2


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows of one unit that repeat an earlier row's key: their numbers, and their ordinals from 1."""

    rows: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    ordinals: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))


def sample_keys(columns: Sequence[pa.Array | pa.ChunkedArray]) -> UInt64Array:
    """Return the key of each row: the stable hash of the first column, mixed with those of the others."""
    keys = stable_hash(columns[0])
    for position, column in enumerate(columns[1:], 1):
        keys = _mixed(keys ^ stable_hash(column, position))
    return keys


def sample_ids(keys: UInt64Array, repeats: Repeats) -> Int64Array:
    """Return the keys as int64; keys of repeating rows are mixed with their ordinal."""
    ids = keys.copy()
    if len(repeats.rows):
        ids[repeats.rows] = _mixed(keys[repeats.rows] ^ stable_hash(pa.array(repeats.ordinals)))
    return ids.view(np.int64)


def random_keys(ids: Int64Array, seed: int) -> UInt64Array:
    """Return the sort keys of samples: a bijection of their ids for each seed, so that distinct ids never tie."""
    return stable_hash(pa.array(ids), seed * _PURPOSES + _ORDER)


def split_draws(entities: UInt64Array, seed: int) -> Float64Array:
    """Return a draw in [0, 1) for each entity, given by its hash; the shares of the splits cut it from below."""
    draws: Float64Array = stable_hash(pa.array(entities), seed * _PURPOSES + _SPLIT) / 2.0**64
    return draws


def entity_splits(entities: UInt64Array, seed: int, validation: float, test: float) -> Int8Array:
    """Return the number of the split (`SPLITS`) of entities, given by their hashes, for the shares of two splits."""
    draws = split_draws(entities, seed)
    return np.select([draws < validation, draws < validation + test], [1, 2], 0).astype(np.int8)


def repeated(ordered: UInt64Array) -> int:
    """Return the number of keys, in ascending order, that equal the previous one."""
    return int(np.count_nonzero(np.diff(ordered) == 0))


def bucket_of(keys: UInt64Array, buckets: int) -> npt.NDArray[np.uint32]:
    """Return the part of the keys' range of each key, of equal parts, ascending with the key; at most 2**32 parts."""
    return ((keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.uint32)


def find_repeats(keys: UInt64Array, units: Int64Array, rows: Int64Array) -> dict[int, Repeats]:
    """Return, by unit, the rows with the key of an earlier row.

    Args:
        keys: All rows that may share keys, shape (n,).
        units: Unit of each row.
        rows: Row within its unit.
    """
    order = np.lexsort((rows, units, keys))
    sorted_keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[: len(keys)])
    ordinals = np.arange(len(keys)) - np.repeat(first, np.diff(first, append=len(keys)))
    later = np.flatnonzero(ordinals)
    found = {}
    for unit in np.unique(units[order[later]]).tolist():
        own = later[units[order[later]] == unit]
        found[unit] = Repeats(rows[order[own]], ordinals[own])
    return found


def merge_repeats(parts: Iterable[Mapping[int, Repeats]]) -> dict[int, Repeats]:
    """Return the repeats by unit, merged from several parts of the keys."""
    merged: dict[int, Repeats] = {}
    for part in parts:
        for unit, repeats in part.items():
            before = merged.get(unit, Repeats())
            merged[unit] = Repeats(
                np.concatenate([before.rows, repeats.rows]), np.concatenate([before.ordinals, repeats.ordinals])
            )
    return merged


def split_entities(entities: UInt64Array, splits: Int8Array) -> tuple[Int64Array, int]:
    """Return the number of distinct entities in each split, shape (3,), and of entities in several splits."""
    pairs = np.unique(np.stack([entities, splits.astype(np.uint64)], axis=1), axis=0)
    counts = np.bincount(pairs[:, 1].astype(np.int64), minlength=len(SPLITS))
    _, seen = np.unique(pairs[:, 0], return_counts=True)
    return counts, int((seen > 1).sum())


def _mixed(values: UInt64Array) -> UInt64Array:
    return stable_hash(pa.array(values))


CLASS_ID = "class_id"
ORIGINAL_ID = "original_image_id"
TIMES = (EVENT_TIME, "event_time", "timestamp", AS_OF)
"""Columns that distinguish rows of one entity."""
UNIT_BYTES = 64 << 20

USUAL_TARGETS = {"customer-features": "spending_trend", "product-features": "performance_tier"}
"""Default targets of the project's feature groups, so that they can be tried at once. Both
follow from other features of the same row: an example of how, not of what, to learn."""

_IDENTIFIER = re.compile(r"(.*_)?(id|uuid|key)|file_path|index", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A data file: rows of each row group, the number of its split, if its directory names one, and its digest."""

    uri: str
    row_groups: tuple[int, ...]
    split: int | None
    digest: str


@dataclass(frozen=True, slots=True)
class Unit:
    """The input of one task: row groups of some files, in their order."""

    index: int
    pieces: tuple[tuple[SourceFile, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A published version and the parts of it that are used.

    Attributes:
        root: Root of the store.
        manifest: Everything known about the version.
        kind: 'table', 'images' or 'sequences'.
        files: Its data files.
        schema: Arrow schema of the data files.
        features: Columns that become features; none for images.
        targets: Columns that become the label, if any: one of numbers, classes or lists, or several.
        entity: Column whose equal values share a split.
        keys: Columns that identify a sample; the first is hashed, the others are mixed in.
        ready: Column that marks the usable rows, if used.
        weight: Column of the samples' weights, if any.
        image: Shape and element type of the images, when they are decoded.
        encoding: Encoding of images that are stored encoded.
        image_bytes: Bytes of a stored image, about.
        classes: Names of the classes by id, if the version has them.
        sequence: Column of the sequences, if these are the samples.
    """

    root: str
    manifest: Manifest
    kind: Literal["table", "images", "sequences"]
    files: tuple[SourceFile, ...]
    schema: pa.Schema
    features: tuple[str, ...]
    targets: tuple[str, ...]
    entity: str
    keys: tuple[str, ...]
    ready: str | None
    weight: str | None = None
    image: TensorSpec | None = None
    encoding: Literal["jpeg"] | None = None
    image_bytes: int = 0
    classes: tuple[str, ...] | None = None
    sequence: str | None = None

    @property
    def columns(self) -> list[str]:
        """Columns that are read, without the images."""
        names = [*self.keys, self.entity, self.ready, *self.targets, *self.features, self.weight, self.sequence]
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def row_bytes(self) -> int:
        """Approximate bytes of a row in memory."""
        lists = sum(8 * (list_size(self.schema.field(name).type) or 0) for name in self.targets)
        if self.sequence is not None:  # compressed text takes about a third
            lists += 3 * sum(entry.bytes for entry in self.manifest.files) // max(self.manifest.rows, 1)
        return 16 * len(self.columns) + lists + self.image_bytes

    def record(self) -> InputRecord:
        """Return the manifest's record of this input."""
        return self.manifest.as_input(self.manifest.uri(self.root))


def needs_sample(config: DeliveryConfig) -> bool:
    """Return True if features must be made first: no dataset or version is requested, and the store never had any."""
    if config.model_fields_set & {"dataset", "version"}:
        return False
    committed = (
        one
        for name in versions.list_datasets(config.root)
        for one in versions.overview(config.root, name).warned().versions.values()
    )
    return not any(one.status == "published" for one in committed)


def find_source(config: DeliveryConfig) -> Source:
    """Find the version that the configuration names, and choose its columns.

    Raises:
        VersionNotFound: there is no such published version.
        CorruptVersion: its manifest or a file can't be read.
        ConfigError: a column isn't there or can't be used, or there is no target to train on.
    """
    root = storage.normalise(config.root)
    return source_of(config, root, versions.resolve(root, config.dataset, config.version))


def source_of(config: DeliveryConfig, root: str, manifest: Manifest) -> Source:
    """Choose the columns of a version.

    Raises:
        CorruptVersion: one of its files can't be read.
        ConfigError: as `find_source`.
    """
    files, schema = _look(root, manifest)
    name = str(manifest)
    images = "image" in manifest.definition or (IMAGE in schema.names and is_tensor(schema.field(IMAGE)))
    images = images and config.sequence is None
    if config.sequence is not None:
        _check_sequence(config.sequence, schema, name)
    image, encoding = _image(schema, name) if images else (None, None)
    entity = config.entity or manifest.definition.get("entity", ORIGINAL_ID if images else None)
    if entity is None:
        raise ConfigError(
            f"{name} doesn't say what its rows are about: name the column whose rows must share a split with "
            f"--entity, one of {', '.join(schema.names)}"
        )
    key = manifest.definition.get("key")  # of rows that have ids
    times = [column for column in ([key] if key else TIMES) if column in schema.names and column != entity]
    keys = [IMAGE_ID] if images else [entity, *times]
    for column in (entity, *keys):
        _check_column(column, schema, name, "entity" if column == entity else "key")
        if pt.is_nested(kind := schema.field(column).type):
            raise ConfigError(
                f"{name}: column '{column}' names its rows, but is {kind}: only numbers, text and times can; name "
                f"another column with --entity, or publish it in another type"
            )
    if config.ready_only and READY in schema.names and not pt.is_boolean(schema.field(READY).type):
        raise ConfigError(
            f"{name}: column '{READY}' is {schema.field(READY).type}, no boolean: publish it as one, or take all rows "
            f"with --no-ready-only"
        )
    if config.weight is not None:
        _check_column(config.weight, schema, name, "weight")
        if not _is_number(kind := schema.field(config.weight).type):
            raise ConfigError(f"weight = '{config.weight}' is {kind}: weights are numbers of 0 or more; derive one")
    usual = manifest.definition.get("target") or (CLASS_ID if images else TARGET)
    targets = _targets(config, schema, name, usual)
    if config.weight in targets:
        raise ConfigError(f"weight = '{config.weight}' is also the target; derive a column of weights from it")
    return Source(
        root=root,
        manifest=manifest,
        kind="images" if images else "table" if config.sequence is None else "sequences",
        files=files,
        schema=schema,
        features=()
        if images or config.sequence is not None
        else _features(config, schema, name, {entity, *keys[1:], config.weight}, targets),
        targets=targets,
        entity=entity,
        keys=tuple(keys),
        ready=READY if config.ready_only and READY in schema.names else None,
        weight=config.weight,
        image=image,
        encoding=encoding,
        image_bytes=_image_bytes(manifest, image, encoding),
        classes=_classes(manifest) if images and CLASS_ID in targets else None,
        sequence=config.sequence,
    )


def read_units(source: Source, unit_bytes: int | None = None) -> list[Unit]:
    """Cut the files into units of about so many bytes in memory (`UNIT_BYTES`), whole row groups each."""
    limit = max(1, (unit_bytes or UNIT_BYTES) // source.row_bytes)
    units: list[Unit] = []
    pieces: list[tuple[SourceFile, tuple[int, ...]]] = []
    rows = 0
    for file in source.files:
        groups: list[int] = []
        for group, count in enumerate(file.row_groups):
            if rows and rows + count > limit:
                pieces += [(file, tuple(groups))] if groups else []
                units.append(Unit(len(units), tuple(pieces)))
                pieces, groups, rows = [], [], 0
            groups.append(group)
            rows += count
        pieces += [(file, tuple(groups))] if groups else []
    return [*units, Unit(len(units), tuple(pieces))] if pieces else units


def read_pieces(unit: Unit, columns: Sequence[str]) -> Iterator[tuple[SourceFile, pa.Table]]:
    """Yield the rows of a unit, one table a piece.

    Raises:
        CorruptVersion: a file is missing or can't be read.
    """
    for file, groups in unit.pieces:
        with opened(file.uri) as source:
            table = pq.ParquetFile(source).read_row_groups(list(groups), columns=list(columns), use_threads=False)
        yield (
            file,
            table.cast(_without_views(table.schema)) if any(map(pt.is_string_view, table.schema.types)) else table,
        )


def _without_views(schema: pa.Schema) -> pa.Schema:
    """Return the schema with plain text instead of text views, from which Arrow can't take rows."""
    plain = [field.with_type(pa.large_string()) if pt.is_string_view(field.type) else field for field in schema]
    return pa.schema(plain, schema.metadata)


def check_digests(unit: Unit) -> None:
    """Compare the files that begin in a unit with their manifest, byte by byte: in all units, each file once.

    A column's pages have no checksum, and pixels are stored raw: a changed byte would reach the model.

    Raises:
        CorruptVersion: a file is missing or differs.
    """
    for file, groups in unit.pieces:
        if groups[0] == 0:
            with explained(file.uri):
                verify_digest(file.uri, file.digest)


def _look(root: str, manifest: Manifest) -> tuple[tuple[SourceFile, ...], pa.Schema]:
    """Return the files' row groups, and the first one's schema, from their footers."""
    uris = versions.data_files(root, manifest)

    def footer(uri: str, entry: FileEntry) -> tuple[SourceFile, pa.Schema]:
        with opened(uri, entry.bytes) as source:
            file = pq.ParquetFile(source)
            rows = tuple(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
            compare(uri, "rows", entry.rows, sum(rows))
            return SourceFile(uri, rows, split_of(uri), entry.digest), file.schema_arrow

    found = list(storage.in_threads(footer, uris, manifest.files))
    return tuple(file for file, _ in found), found[0][1]


def split_of(uri: str) -> int | None:
    """Return the number of the split that a file's directory names; None if it names none."""
    directory = uri.rpartition("/")[0].rpartition("/")[2]
    names = {layout.split_directory(split): number for number, split in enumerate(SPLITS)}
    return names.get(directory)


def _image(schema: pa.Schema, name: str) -> tuple[TensorSpec, Literal["jpeg"] | None]:
    """Return shape and element type of the images, and the encoding of those that are stored encoded."""
    _check_column(IMAGE, schema, name, "image")
    field = schema.field(IMAGE)
    spec = tensor_spec(field) if is_tensor(field) else None
    if spec is not None and spec.dtype == "uint8" and len(spec.shape) == 3:
        return spec, None
    encoded = encoded_spec(field)
    if encoded is not None and encoded[0] == "jpeg":
        return encoded[1], "jpeg"
    stored = f"{spec.dtype} tensors of shape {spec.shape}" if spec else f"{encoded[0] if encoded else field.type}"
    raise ConfigError(
        f"{name} holds its images as {stored}; only uint8 tensors of (channel, height, width) and JPEGs can be "
        "delivered: publish them anew with `python -m flows.image_augmentation --format uint8` or jpeg"
    )


def _image_bytes(manifest: Manifest, image: TensorSpec | None, encoding: str | None) -> int:
    if image is None or encoding is None:
        return 0 if image is None else image.width
    return sum(file.bytes for file in manifest.files) // max(manifest.rows, 1)


def _classes(manifest: Manifest) -> tuple[str, ...] | None:
    known = manifest.definition.get("classes")
    if not isinstance(known, dict) or not known:
        return None
    names = {int(number): str(name) for name, number in known.items()}
    return tuple(names.get(number, str(number)) for number in range(max(names) + 1))


def _targets(config: DeliveryConfig, schema: pa.Schema, name: str, usual: str) -> tuple[str, ...]:
    found = config.targets
    if config.target is not None and config.target in schema.names:
        found = (config.target,)
    if not found:
        several = tuple(usual.split(","))
        found = (usual,) if usual in schema.names else several if set(several) <= set(schema.names) else ()
    if not found and config.training.enabled:
        example = USUAL_TARGETS.get(config.dataset.rpartition("/")[2])
        found = (example,) if example is not None and example in schema.names else ()
    for target in found:
        _check_column(target, schema, name, "target")
        _check_target(target, schema.field(target).type, config, alone=len(found) == 1)
    if not found and config.training.enabled:
        likely = [field.name for field in schema if is_text(field.type) and field.name not in RECORDS]
        names = ", ".join(likely or [field.name for field in schema if _is_feature(field.type)])
        raise ConfigError(
            f"{name} has no column '{usual}' to learn: name one with --target, such as {names}; or make the copy "
            "alone with --no-training.enabled"
        )
    return found


def _check_target(target: str, kind: pa.DataType, config: DeliveryConfig, *, alone: bool) -> None:
    if list_size(kind) is not None:
        if not alone:
            raise ConfigError(
                f"target = '{config.target}': column '{target}' is {kind}, several labels by itself; name it alone"
            )
        if config.target_kind == "class":
            raise ConfigError(f"target = '{target}' is {kind}: only text, booleans and whole numbers can be classes")
        return
    if not (_is_number(kind) or pt.is_boolean(kind) or is_text(kind)):
        raise ConfigError(
            f"target = '{target}' is {kind}: only text, booleans, numbers and lists of numbers of one size can be "
            "learned; derive one of them"
        )
    if config.target_kind == "number" and is_text(kind):
        raise ConfigError(f"target = '{target}' is {kind}, no number: leave target_kind = auto, or convert it")
    if config.target_kind == "class" and not (is_text(kind) or pt.is_boolean(kind) or pt.is_integer(kind)):
        raise ConfigError(f"target = '{target}' is {kind}: only text, booleans and whole numbers can be classes")


def _features(
    config: DeliveryConfig, schema: pa.Schema, name: str, taken: set[str | None], targets: Sequence[str]
) -> tuple[str, ...]:
    """Return the names of the columns that become features, in the schema's order."""
    usable = {field.name for field in schema if _is_feature(field.type)} - set(targets)
    excluded = _matching(config.exclude, schema.names, schema, name, "exclude")
    if config.features:
        chosen = _matching(config.features, sorted(usable - taken), schema, name, "features")
        for column in config.features:
            if column in schema.names and column not in usable:
                raise ConfigError(
                    f"features: column '{column}' is {schema.field(column).type}: only numbers, booleans and text can "
                    "be features; derive one of them, such as the days before as_of of a date"
                )
    else:
        chosen = {column for column in usable - taken - RECORDS if not _IDENTIFIER.fullmatch(column)}
        chosen = {column for column in chosen if column.startswith("feature_")} or chosen
    found = tuple(column for column in schema.names if column in chosen - excluded)
    if not found:
        raise ConfigError(
            f"{name} has no features: of its columns {', '.join(schema.names)} none is left; name some with --features"
        )
    return found


def _matching(patterns: Sequence[str], known: Sequence[str], schema: pa.Schema, name: str, option: str) -> set[str]:
    """Return the columns that patterns name; a plain name may be any column."""
    found: set[str] = set()
    for pattern in patterns:
        matches = [column for column in known if fnmatchcase(column, pattern)]
        if not matches and pattern in schema.names:
            matches = [pattern]
        if not matches:
            _check_column(pattern, schema, name, option)
        found.update(matches)
    return found


def _check_column(column: str, schema: pa.Schema, name: str, option: str) -> None:
    if column not in schema.names:
        raise ConfigError(f"{option}: {name} has no column '{column}'{closest(column, schema.names)}")


def _check_sequence(column: str, schema: pa.Schema, name: str) -> None:
    _check_column(column, schema, name, "sequence")
    kind = schema.field(column).type
    if sequence_dtype(kind) is None:
        raise ConfigError(
            f"sequence = '{column}' is {kind}: only text, bytes, and lists of floats or of whole numbers that int64 "
            "holds can be delivered; convert it"
        )


def sequence_dtype(kind: pa.DataType) -> str | None:
    """Return the element type of a column's sequences: that of lists, or the smallest stored one that holds it."""
    if is_text(kind) or pt.is_binary(kind) or pt.is_large_binary(kind):
        return "uint8"
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        return _ELEMENTS.get(str(kind.value_type))
    return None


_ELEMENTS = {
    "uint8": "uint8",
    **dict.fromkeys(("int8", "int16", "uint16", "int32"), "int32"),
    **dict.fromkeys(("uint32", "int64"), "int64"),
    **dict.fromkeys(("halffloat", "float"), "float32"),
    "double": "float64",
}


def list_size(kind: pa.DataType) -> int | None:
    """Return the elements of lists, or tensors, of numbers that all have one size; None for other types."""
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.storage_type
    fits = pt.is_fixed_size_list(kind) and _is_number(kind.value_type) and kind.list_size
    return kind.list_size if fits else None


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind))


def _is_feature(kind: pa.DataType) -> bool:
    # A column without any value has Arrow's null type.
    return _is_number(kind) or bool(pt.is_boolean(kind) or pt.is_null(kind)) or is_text(kind)
