"""Images of a version made again, from their files: decoded, drawn, augmented, judged, labelled and split anew.

The split depends on all images, and is made from the version's table of all of them (`_originals`): from ids,
classes and groups. Likeness of images is taken from there unchanged, since finding it would decode all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.audit.inputs import Cause, check_files, input_causes
from tasks.audit.replay_rows import (
    Again,
    Difference,
    IntArray,
    Replayed,
    Unreadable,
    by_file,
    differences,
    frame_of,
    missing,
    placed,
)
from tasks.images.augment import augment_again
from tasks.images.config import ImageAugmentationConfig
from tasks.images.draws import image_keys
from tasks.images.labels import join_labels, read_labels
from tasks.images.outcomes import ORIGINALS, original_rows, originals_entry, split_again
from tasks.images.sources import list_images
from tasks.images.split import SPLITS
from tasks.io.errors import CorruptVersion, SourceError
from tasks.io.notation import missing_values
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.settings import config_of

AT_ONCE = 32
"""Number of images whose variants are held in memory at a time."""

_OF_ALL_IMAGES = frozenset({"class_id", "class_name", "one_hot_label", "split", "bytes"})
"""Columns that the listing and the labels decide, not the content of an image's file."""


class ImagesAgain(Again):
    """The images of one version, to be made again, each with all of its variants and its record."""

    unit = "image"

    def __init__(self, root: str, manifest: Manifest) -> None:
        super().__init__(root, manifest)
        self._entry = originals_entry(manifest)
        try:
            table = self.stored.read(self._entry)
        except Unreadable as fault:
            raise CorruptVersion(f"{manifest.dataset} v{manifest.version}: {fault.cause.text}") from fault
        self._originals = frame_of(table)
        self._config = self._runnable(config_of(ImageAugmentationConfig, manifest))
        self._class_ids: dict[str, int] = manifest.definition["classes"]
        self._labels = self._label()
        _, splits = split_again(table, self._config)
        ids = self._originals["image_id"]
        self._splits = {image: SPLITS[split] for image, split in zip(ids, splits.tolist(), strict=True)}

    @property
    def total(self) -> int:
        """Number of images."""
        return self._originals.height

    def replay(self, chosen: IntArray) -> list[Replayed]:
        """Make some images again, and compare them."""
        replayed: list[Replayed] = []
        for split in SPLITS:
            variants = self._config.variants_in(split)
            files = [(entry, entry.rows // variants) for entry in self.manifest.files if _split_of(entry) == split]
            own = self._originals.with_row_index("number").filter(pl.col("split") == split)
            places = np.flatnonzero(np.isin(own["number"].to_numpy(), chosen))
            counts = [count for _, count in files]
            # The table of originals may have more images in a split than its files have room for.
            no_rows = (Difference("(rows)", "0", str(variants)),)
            left = own["image_id"].gather(places[places >= sum(counts)])
            replayed += [Replayed(name=name, file=split, differences=no_rows) for name in left]
            starts = dict(zip((entry.path for entry, _ in files), np.cumsum(counts) - counts, strict=True))
            for entry, numbers in by_file(files, places[places < sum(counts)]):
                # A file's images follow each other in the table of originals, but not in the same order.
                for start in range(0, len(numbers), AT_ONCE):
                    replayed += self._compare(entry, own[starts[entry.path] + numbers[start : start + AT_ONCE]])
        return replayed

    def _runnable(self, config: ImageAugmentationConfig) -> ImageAugmentationConfig:
        """Fit the configuration to this machine; without a GPU, one that requests it runs on the CPU."""
        policy = config.augmentation.policy
        if policy is not None:
            text = f"the policy '{policy}' is code of your own, of which the manifest has no digest"
            self.causes.append(Cause("policy", text))
        if not config.num_gpus:
            return config
        import torch

        if torch.cuda.is_available():
            text = f"made on a GPU, made again on this one ({torch.cuda.get_device_name()})"
        else:
            text = "made on a GPU, made again on the CPU: resized pixels may be a level off"
            config = config.model_copy(update={"num_gpus": 0.0, "device": "cpu"})
        self.causes.append(Cause("device", text))
        self.notes.append(text)
        return config

    def _label(self) -> dict[str, tuple[str, int]] | None:
        """Label the images as a run would now: class and size by id; None if they can't be listed any more."""
        config, records = self._config, {record.name: record for record in self.manifest.inputs}
        if "labels" in records:
            found = input_causes(records["labels"], check_files(records["labels"]))
            self.causes += [replace(cause, columns=_OF_ALL_IMAGES) for cause in found]
        try:
            listing = list_images(records["images"].uri)
            (then,), (now,) = records["images"].files, listing.record().files
            if then.fingerprint != now.fingerprint:
                text = f"the images under {listing.uri} aren't the same files, sizes and times as they were"
                self.causes.append(Cause("input", text, _OF_ALL_IMAGES))
            labels = None
            if "labels" in records:
                where = records["labels"].files[0].uri
                missing = missing_values(config.null_values)
                labels = read_labels(where, config.id_column, config.class_column, config.group_column, missing)
            joined = frame_of(join_labels(listing, labels, config.classes).images)
        except SourceError as fault:
            text = f"the images can't be listed and labelled again: {fault}"
            self.causes.append(Cause("input", text, _OF_ALL_IMAGES))
            self.notes.append(text)
            return None
        return {image: (name, size) for image, name, size in joined.select("image_id", "class_name", "bytes").rows()}

    def _compare(self, entry: FileEntry, originals: pl.DataFrame) -> list[Replayed]:
        """Compare some images of one file with their replays."""
        ids = originals["image_id"].to_list()
        try:
            owners = self.stored.read(entry, columns=["original_image_id"])["original_image_id"]
            mask = pc.is_in(owners, value_set=pa.array(ids, pa.string()))
            stored = self.stored.read(entry, np.flatnonzero(mask.to_numpy()))
        except Unreadable as fault:
            return [missing(image, entry, fault.cause) for image in ids]
        planned = self._planned(originals)
        config = self._config.of_split(_split_of(entry))
        outcomes, rows = augment_again(config, max(self._class_ids.values()) + 1, planned.drop_columns(["bytes"]))
        found = self._of_originals(originals, planned, outcomes)
        names, owners = stored["image_id"].to_pylist(), stored["original_image_id"].to_pylist()
        of_rows = differences(stored, rows, placed(names, rows["image_id"].to_pylist()))
        for image, name, own in zip(owners, names, of_rows, strict=True):
            found[image] += [replace(difference, row=name) for difference in own]
        for image, count in ((image, owners.count(image)) for image in ids):
            if count != config.augmentation.variants:
                found[image].append(Difference("(rows)", str(count), str(config.augmentation.variants)))
        shared = (*self.stored.check(entry), *self.stored.check(self._entry))
        changed = _changed(originals, outcomes)
        return [
            Replayed(
                name=image, file=entry.path, differences=tuple(found[image]), causes=(*shared, *changed.get(image, ()))
            )
            for image in ids
        ]

    def _planned(self, originals: pl.DataFrame) -> pa.Table:
        """Plan some images as a run would; the class of one without a usable label now is the version's."""
        ids = originals["image_id"].to_list()
        classes, sizes = [], []
        for image, was, size in originals.select("image_id", "class_name", "bytes").rows():
            name, now = (was, size) if self._labels is None else self._labels.get(image, (was, None))
            classes.append(name if name in self._class_ids else was)
            sizes.append(now)
        return pa.table(
            {
                "image_id": pa.array(ids, pa.string()),
                "uri": pa.array(originals["uri"].to_list(), pa.string()),
                "bytes": pa.array(sizes, pa.int64()),
                "class_name": pa.array(classes, pa.string()),
                "class_id": pa.array([self._class_ids[name] for name in classes], pa.int32()),
                "key": image_keys(ids, self._config.seed),
            }
        )

    def _of_originals(
        self, originals: pl.DataFrame, planned: pa.Table, outcomes: pa.Table
    ) -> dict[str, list[Difference]]:
        """Compare the records of some images with their replays; alike isn't found again."""
        ids = originals["image_id"].to_list()
        good = outcomes["reason"].is_null()
        images = planned.filter(good)
        names = images["image_id"].to_pylist()
        alike = originals.filter(pl.Series(good.to_pylist()))["alike"].to_list()
        made = original_rows(images, outcomes.filter(good), [self._splits[image] for image in names], alike)
        stored = originals.select(ORIGINALS.names).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(ORIGINALS)
        found = differences(stored, made, placed(ids, names))
        if self._labels is not None:
            for number, (image, was) in enumerate(originals.select("image_id", "class_name").rows()):
                now, _ = self._labels.get(image, ("no label", 0))
                if now not in (was, *self._class_ids):  # such a class could be given to no row
                    found[number] = (*found[number], Difference("class_name", was, now))
        return {image: list(own) for image, own in zip(ids, found, strict=True)}


def _split_of(entry: FileEntry) -> str:
    return entry.path.partition("/")[0].removeprefix("split=")


def _changed(originals: pl.DataFrame, outcomes: pa.Table) -> Mapping[str, Sequence[Cause]]:
    """Return the images whose file has changed."""
    rows = zip(originals.select("image_id", "uri", "content_xxh3").rows(), outcomes.to_pylist(), strict=True)
    found = {}
    for (image, uri, content), outcome in rows:
        if outcome["content"] != content:
            reason = f"is rejected now ({outcome['reason']}: {outcome['detail']})"
            text = "has changed" if outcome["reason"] is None else reason
            found[image] = [Cause("input", f"the input {uri} {text}")]
    return found
