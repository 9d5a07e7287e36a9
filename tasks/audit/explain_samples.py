"""Samples of a streaming-ready copy that an entity or an image became, and the place of each.

A sample's id, split and place in the order are functions of its row in the source version, so they are computed from
there; then the one file that must have it is asked whether it has: by its column of ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.audit.explain_rows import Found, find_rows, typed_key
from tasks.core import layout, storage
from tasks.core.errors import ConfigError, CorruptVersion, PipelineError
from tasks.core.hashing import stable_hash
from tasks.core.manifest import FileEntry, Manifest
from tasks.core.own_columns import READY
from tasks.core.reading import read_manifest
from tasks.core.tensors import to_numpy
from tasks.delivery.blocks import SAMPLE_ID, BlockFormat
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.keys import (
    SPLITS,
    Repeats,
    bucket_of,
    entity_splits,
    random_keys,
    sample_ids,
    sample_keys,
    split_draws,
)
from tasks.delivery.source import Source
from tasks.delivery.stages import judge, plan_buckets

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of a copy.

    Attributes:
        source: Its row in the source version; without the pixels.
        source_file: File of that row.
        source_row: Its number there.
        sample_id: Its id.
        split: Its split.
        file: Its file; None if it isn't where it must be.
        block: Row of the file, which is a block of samples.
        place: Its place in the block.
        position: Its number among the samples of the split, in the order of the files.

    """

    source: dict[str, Any]
    source_file: str
    source_row: int
    sample_id: int
    split: str
    file: str | None
    block: int = 0
    place: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What became of an entity's rows: samples, and rows that were left out, each with the reason."""

    source: Manifest
    held: tuple[Sample, ...]
    left_out: tuple[tuple[dict[str, Any], str], ...]
    read: str


def delivery_config(copy: Manifest) -> DeliveryConfig:
    """Configuration of a copy.

    Raises:
        PipelineError: it isn't one of this version of the project.

    """
    try:
        return DeliveryConfig.model_validate(copy.config)
    except ValueError as fault:
        raise PipelineError(f"the copy's configuration can't be read here: {str(fault).splitlines()[0]}") from fault


def source_of(root: str, copy: Manifest) -> Manifest:
    """The version that a copy is of.

    Raises:
        VersionNotFound: it was deleted.

    """
    source = copy.definition["source"]
    return read_manifest(root, source["dataset"], source["version"])


def block_format(copy: Manifest) -> BlockFormat:
    """What a block of a copy holds."""
    definition, label = copy.definition, copy.definition.get("label")
    images = definition["kind"] == "images"
    shape = definition["image"]["shape"] if images else [definition["feature_count"]]
    dtype: Any = None if label is None else "int64" if label["kind"] == "class" else "float32"
    return BlockFormat(
        kind=definition["kind"], shape=tuple(shape), label=dtype, block_size=int(definition["block_size"])
    )


def find_samples(root: str, copy: Manifest, key: str) -> Samples:
    """The samples of an entity, or of an image or one of its variants.

    Args:
        root: Root of the store.
        copy: A streaming-ready version.
        key: The entity's key; of images the id of an original or of a variant.

    Raises:
        VersionNotFound: the source version was deleted.
        CorruptVersion: a file is missing.
        ConfigError: the key can't be one.

    """
    source, config = source_of(root, copy), delivery_config(copy)
    wanted = _columns(copy, source, config)
    found = _source_rows(root, copy, source, key, wanted)
    if not found.table.num_rows:
        return Samples(source=source, held=(), left_out=(), read=found.read_of(source))
    rows = found.table
    codes, reasons = judge(rows, _as_source(root, copy, source, rows.schema, config), config)
    good = np.flatnonzero(codes == 0)
    plain = rows.to_pylist()
    left_out = tuple((plain[row], reasons[codes[row]]) for row in np.flatnonzero(codes).tolist())
    if not len(good):
        return Samples(source=source, held=(), left_out=left_out, read=found.read_of(source))
    kept = rows.take(pa.array(good))
    keys = sample_keys([kept[name] for name in copy.definition["keys"]])
    ids = sample_ids(keys, _repeats(keys))
    drawn = entity_splits(
        stable_hash(kept[copy.definition["entity"]]), config.seed, config.validation_share, config.test_share
    )
    places = [found.places[row] for row in good.tolist()]
    held = []
    for number, (place, sample_id) in enumerate(zip(places, ids.tolist(), strict=True)):
        split = _split_of(place[0]) or SPLITS[int(drawn[number])]
        spot = _locate(root, copy, split, sample_id, config)
        told = {"source": plain[good[number]], "source_file": place[0], "source_row": place[1]}
        held.append(Sample(**told, sample_id=sample_id, split=split, **spot))
    return Samples(source=source, held=tuple(held), left_out=left_out, read=found.read_of(source))


def feature_columns(copy: Manifest) -> list[str]:
    """Columns of the source that became features."""
    return list(dict.fromkeys(feature["column"] for feature in copy.definition.get("features", ())))


def _columns(copy: Manifest, source: Manifest, config: DeliveryConfig) -> list[str]:
    definition, known = copy.definition, {column.name for column in source.columns}
    names = [*definition["keys"], definition["entity"], *feature_columns(copy)]
    names += [definition["label"]["column"]] if definition.get("label") else []
    names += [READY] if config.ready_only else []
    names += ["quality_issues", "data_quality_score"] if definition["kind"] == "images" else []
    return [name for name in dict.fromkeys(names) if name in known]


def _source_rows(root: str, copy: Manifest, source: Manifest, key: str, columns: Sequence[str]) -> Found:
    entity, first = copy.definition["entity"], copy.definition["keys"][0]
    found = find_rows(root, source, entity, typed_key(source, entity, key), columns=columns)
    if found.table.num_rows or first == entity:
        return found
    return find_rows(root, source, first, typed_key(source, first, key), columns=columns)


def _as_source(root: str, copy: Manifest, source: Manifest, schema: pa.Schema, config: DeliveryConfig) -> Source:
    label = copy.definition.get("label")
    return Source(
        root=root,
        manifest=source,
        kind=copy.definition["kind"],
        files=(),
        schema=schema,
        features=tuple(feature_columns(copy)),
        target=None if label is None else label["column"],
        entity=copy.definition["entity"],
        keys=tuple(copy.definition["keys"]),
        ready=READY if config.ready_only and READY in schema.names else None,
    )


def _repeats(keys: npt.NDArray[np.uint64]) -> Repeats:
    """Rows that share the key of an earlier one, with their ordinals; all rows of a key are here."""
    seen: dict[int, int] = {}
    rows, ordinals = [], []
    for row, key in enumerate(keys.tolist()):
        if key in seen:
            rows.append(row)
            ordinals.append(seen[key])
        seen[key] = seen.get(key, 0) + 1
    return Repeats(np.array(rows, np.int64), np.array(ordinals, np.int64))


def _split_of(path: str) -> str | None:
    """The split that a file's directory names, which a copy keeps."""
    directory = path.rpartition("/")[0]
    return next((split for split in SPLITS if directory == layout.split_directory(split)), None)


def split_files(copy: Manifest, split: str) -> list[FileEntry]:
    """Files of a split, in the manifest's order, which is that of its samples."""
    return [entry for entry in copy.files if entry.path.startswith(layout.split_directory(split) + "/")]


def _locate(root: str, copy: Manifest, split: str, sample_id: int, config: DeliveryConfig) -> dict[str, Any]:
    """Where a sample stands in its split; first where its random key says, then anywhere."""
    form, counts = block_format(copy), copy.definition["file_samples"]
    own = split_files(copy, split)
    total = int(copy.definition["samples"].get(split, 0))
    parts = len(plan_buckets(np.array([total]), form, config.file_megabytes * (1 << 20)))
    key = random_keys(np.array([sample_id], np.int64), config.seed)
    part = int(bucket_of(key, max(parts, 1))[0])
    for entry in sorted(own, key=lambda one: layout.part_number(one.path) != part):
        ids = _ids(root, copy, entry)[: counts[entry.path]]
        (hits,) = np.nonzero(ids == sample_id)
        if len(hits):
            row = int(hits[0])
            before = sum(int(counts[one.path]) for one in own[: own.index(entry)])
            block, place = divmod(row, form.block_size)
            return {"file": entry.path, "block": block, "place": place, "position": before + row}
    return {"file": None}


def _ids(root: str, copy: Manifest, entry: FileEntry) -> Int64Array:
    uri = layout.join(layout.version_uri(storage.normalise(root), copy.dataset, copy.version), entry.path)
    try:
        with storage.open_input(uri) as source:
            ids: Int64Array = to_numpy(pq.ParquetFile(source).read(columns=[SAMPLE_ID]), SAMPLE_ID).ravel()
            return ids
    except FileNotFoundError as fault:
        raise CorruptVersion(f"{uri} is missing; restore it from a copy, or deliver the version again") from fault


def split_row(config: DeliveryConfig, entity: str, value: int | str, copy: str) -> dict[str, Any]:
    """The split of an entity under the settings of a copy, with the draw that decides it."""
    hashed = stable_hash(pa.array([value]))
    share = float(split_draws(hashed, config.seed)[0])
    split = SPLITS[int(entity_splits(hashed, config.seed, config.validation_share, config.test_share)[0])]
    test = config.validation_share + config.test_share
    bounds = f"validation below {config.validation_share:g}" + (f", test below {test:g}" if config.test_share else "")
    why = f"the hash of {entity} and seed {config.seed} draws {share:.4f}; {bounds}, else train"
    return {"copy": copy, "split": split, "draw": round(share, 6), "why": why}


def summary(root: str, copy: Manifest, key: str) -> str:
    """How many samples of a key a copy has, in words."""
    try:
        found = find_samples(root, copy, key)
    except ConfigError:
        return "no sample"
    except PipelineError as fault:
        return f"can't be told: {fault}"
    splits = sorted({sample.split for sample in found.held if sample.file is not None})
    count = sum(sample.file is not None for sample in found.held)
    told = f"{count} sample{'s' if count != 1 else ''}" if count else "no sample"
    told += f" in {' and '.join(splits)}" if splits else ""
    reasons = sorted({reason for _, reason in found.left_out})
    return told + (f"; {len(found.left_out)} rows left out ({', '.join(reasons)})" if reasons else "")
