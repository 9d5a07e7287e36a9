"""Plan of a run: every image with its label, class id and split, in units that one task augments and writes.

The plan is a Parquet file in the reserved version's directory; a task reads the row group of its unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.images.config import ImageAugmentationConfig
from tasks.images.draws import image_keys
from tasks.images.duplicates import group_images
from tasks.images.labels import Joined, assign_class_ids, join_labels, labels_record, read_labels
from tasks.images.sources import Digested, content_groups, digest_here, list_images
from tasks.images.split import SPLITS, split_images
from tasks.io import storage
from tasks.io.errors import CorruptVersion
from tasks.io.hashing import stable_hash
from tasks.io.memory import released
from tasks.io.notation import missing_values
from tasks.io.storage import ParquetStream
from tasks.io.tensors import Int64Array
from tasks.store import layout
from tasks.store.lineage import job_digest, package_versions
from tasks.store.manifest import FileEntry, InputRecord, Manifest, RowBalance
from tasks.store.reservation import Reservation

PLAN = pa.schema(
    dict.fromkeys(("image_id", "uri", "path"), pa.string())
    | {"bytes": pa.int64()}
    | dict.fromkeys(("stamp", "class_name"), pa.string())
    | {"class_id": pa.int32(), "key": pa.uint64(), "linked": pa.int64(), "split": pa.int8()}
)
"""A row an image. key: of its draws and its place in the split. linked: number of the first image known to be
related, by contents or by the group column. split: before near-duplicates are known."""

PLAN_ROW_GROUP = 8192
"""Approximate number of images of a row group."""

# Settings that don't affect the bytes of a unit's files, except through the plan's rows.
_ELSEWHERE = {"root", "name", "images", "labels", "near_duplicates", "workers", "actors", "sample_images", "self_test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePlan:
    """A planned run; the images themselves are in the file at `uri`."""

    reservation: Reservation
    base: int
    """Number of the version from which the classes' ids are carried over; 0 for none."""
    uri: str
    images: int
    images_per_unit: int
    digests: tuple[str, ...]
    """Digest of each unit: equal digests give equal files."""
    classes: dict[str, int]
    balances: tuple[RowBalance, ...]
    rejected_files: tuple[FileEntry, ...]
    inputs: tuple[InputRecord, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.digests)


@released()
def plan_images(
    config: ImageAugmentationConfig,
    reservation: Reservation,
    previous: Manifest | None,
    digested: Digested = digest_here,
) -> ImagePlan:
    """List and label the images, and write the plan under the reservation.

    Args:
        config: Configuration. `images` must be given.
        reservation: The version to be written.
        previous: Manifest of the last published version: its classes keep their ids.
        digested: Digests files of equal size, as in `content_groups`.

    Raises:
        CorruptVersion: the last version gives one id to two classes.
        SourceError: images or labels are missing or unreadable, or don't match.
    """
    assert config.images is not None, "the sample is made before"
    listing = list_images(config.images)
    missing = missing_values(config.null_values)
    labels = (
        read_labels(config.labels, config.id_column, config.class_column, config.group_column, missing)
        if config.labels
        else None
    )
    joined = join_labels(listing, labels, config.classes)
    classes = _class_ids(joined.images["class_name"].unique().to_pylist(), previous, reservation.root)
    rows = _rows(joined.images, classes, config, digested)
    inputs = [listing.record()]
    if config.labels and labels is not None:
        inputs.append(labels_record(config.labels, labels.num_rows))
    uri = layout.join(reservation.uri, layout.work_name("plan", 0, reservation.attempt))
    job = _job_digest(config, classes)
    digests = []
    together = units_together(config.images_per_file) * config.images_per_file
    with ParquetStream(uri, PLAN, row_group_size=together) as stream:
        for first in range(0, rows.num_rows, together):
            group = rows.slice(first, together)
            stream.write(group)
            starts = range(0, group.num_rows, config.images_per_file)
            digests += [_unit_digest(group.slice(start, config.images_per_file), job) for start in starts]
    return ImagePlan(
        reservation=reservation,
        base=previous.version if previous is not None else 0,
        uri=uri,
        images=rows.num_rows,
        images_per_unit=config.images_per_file,
        digests=tuple(digests),
        classes=classes,
        balances=(joined.image_balance, *([joined.label_balance] if joined.label_balance is not None else [])),
        rejected_files=tuple(_write_rejected(joined, reservation)),
        inputs=tuple(inputs),
    )


def known_classes(manifest: Manifest | None) -> dict[str, int]:
    """Return the class ids of a version by name, from its manifest."""
    return dict(manifest.definition.get("classes", {})) if manifest is not None else {}


def _class_ids(names: Sequence[str], previous: Manifest | None, root: str) -> dict[str, int]:
    try:
        return assign_class_ids(names, known_classes(previous))
    except CorruptVersion as fault:
        assert previous is not None, "nothing else can be wrong"
        raise CorruptVersion(
            f"{previous}: {fault}. Withdraw it, and the next run goes on from the version "
            f"before it: python3 -m flows.feature_store rollback {previous} --force "
            f"--root {root}"
        ) from fault


def read_unit(uri: str, unit: int, images_per_unit: int) -> pa.Table:
    """Return one unit's rows of the plan."""
    [rows] = read_units(uri, [unit], images_per_unit)
    return rows


def read_units(uri: str, units: Iterable[int], images_per_unit: int) -> Iterator[pa.Table]:
    """Yield the rows of some units of the plan one by one; each row group is read once if they are in order."""
    together, held, rows = units_together(images_per_unit), -1, pa.table({})
    with storage.open_input(uri) as source:
        file = pq.ParquetFile(source)
        for unit in units:
            group, place = divmod(unit, together)
            if group != held:
                held, rows = group, file.read_row_group(group)
            yield rows.slice(place * images_per_unit, images_per_unit)


def units_together(images_per_unit: int) -> int:
    """Return units a row group: each task parses the plan's footer, which has an entry a row group and column."""
    return -(-PLAN_ROW_GROUP // images_per_unit)


def _rows(
    images: pa.Table, classes: Mapping[str, int], config: ImageAugmentationConfig, digested: Digested
) -> pa.Table:
    ids = images["image_id"]
    starts = range(0, len(ids), PLAN_ROW_GROUP)
    keys = np.concatenate([image_keys(ids.slice(start, PLAN_ROW_GROUP).to_pylist(), config.seed) for start in starts])
    linked = group_images(len(keys), _group_links(images["group"]), content_groups(images, digested))
    names = images["class_name"].combine_chunks().dictionary_encode()
    of_class = np.array([classes[name] for name in names.dictionary.to_pylist()], np.int32)[names.indices.to_numpy()]
    splits = split_images(keys, of_class.astype(np.int64), linked, config.validation_share, config.test_share)
    columns = {name: images[name] for name in ("image_id", "uri", "path", "bytes", "stamp", "class_name")}
    return pa.table({**columns, "class_id": of_class, "key": keys, "linked": linked, "split": splits}, schema=PLAN)


def _group_links(groups: pa.ChunkedArray) -> list[Int64Array]:
    """Return pairs that link each image of a group with the next one, shape (pairs, 2)."""
    given = np.flatnonzero(groups.is_valid().to_numpy())
    hashes = stable_hash(groups)[given]
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    return [np.stack([given[order[:-1]][same], given[order[1:]][same]], axis=1).astype(np.int64)]


def _job_digest(config: ImageAugmentationConfig, classes: Mapping[str, int]) -> str:
    settings = config.model_dump_json(exclude=_ELSEWHERE)
    libraries = sorted(package_versions().items())
    extra = f"{settings}\n{len(classes)}\n{libraries}\n{len(SPLITS)}"
    return job_digest("tasks.images", extra=extra)


def _unit_digest(unit: pa.Table, job: str) -> str:
    digest = hashlib.blake2b(job.encode(), digest_size=16)
    sink = pa.BufferOutputStream()
    # `linked` counts rows of the whole plan; files depend only on the splits that follow from it.
    with pa.ipc.new_stream(sink, PLAN.remove(PLAN.get_field_index("linked"))) as writer:
        writer.write_table(unit.drop_columns(["linked"]).combine_chunks())
    digest.update(sink.getvalue())
    return digest.hexdigest()


def _write_rejected(joined: Joined, reservation: Reservation) -> list[FileEntry]:
    """Write the rejected rows of the listing and the labels, each with its reason."""
    entries = []
    for source, rows in (("files", joined.rejected_images), ("labels", joined.rejected_labels)):
        if rows.num_rows:
            entries.append(reservation.entry(storage.write_parquet(rows, reservation.rejected_uri(source, 0))))
    return entries
