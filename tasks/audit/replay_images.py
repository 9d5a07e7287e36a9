"""Images of a version made again, from their files: decoded, drawn, augmented, judged, labelled and split anew.

What depends on all images is made of what the version knows of all of them (`_originals`): the split, from ids,
classes and groups. Which images are alike is taken from there as it is, since to find it all of them are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.audit.replay_causes import check_files, input_causes
from tasks.audit.replay_rows import (
    Answer,
    Cause,
    Difference,
    Replayed,
    StoredFiles,
    Unreadable,
    by_file,
    choose,
    differences,
    missing,
    placed,
)
from tasks.audit.replay_tables import causes_of, config_of, frame_of
from tasks.core import layout
from tasks.core.errors import CorruptVersion, SourceError
from tasks.core.manifest import FileEntry, Manifest
from tasks.core.missing import missing_values
from tasks.images.config import ImageAugmentationConfig
from tasks.images.draws import image_keys
from tasks.images.label_file import read_labels
from tasks.images.labels import join_labels
from tasks.images.originals import ORIGINALS, row_means
from tasks.images.sources import list_images
from tasks.images.split import SPLITS, split_images
from tasks.images.stages import augment_again

AT_ONCE = 32
"""Images whose variants are held in memory at a time."""

_OF_ALL_IMAGES = frozenset({"class_id", "class_name", "one_hot_label", "split", "bytes"})
"""Columns that the listing and the labels decide, not what is in an image's own file."""


def replay_images(root: str, manifest: Manifest, sample: int, seed: int) -> Answer:
    """Make all variants of some images of a version again, and compare them and what is noted of their originals.

    Args:
        root: Root of the store.
        manifest: The version's.
        sample: Number of images.
        seed: Decides which.

    Raises:
        ConfigError: this code can't use the version's configuration, or can't load its policy.
        CorruptVersion: the table of originals was altered so that it can't be read.

    """
    stored = StoredFiles(layout.version_uri(root, manifest.dataset, manifest.version))
    again = _Again(manifest, stored)
    originals = again.originals
    chosen = choose(originals.height, sample, seed)
    replayed: list[Replayed] = []
    for split in SPLITS:
        variants = again.variants_in(split)
        files = [(entry, entry.rows // variants) for entry in manifest.files if _split_of(entry) == split]
        own = originals.with_row_index("number").filter(pl.col("split") == split)
        places = np.flatnonzero(np.isin(own["number"].to_numpy(), chosen))
        held = sum(count for _, count in files)
        replayed += [_without_rows(name, split, variants) for name in own["image_id"].gather(places[places >= held])]
        places = places[places < held]
        for entry, numbers in by_file(files, places):
            # A file's images follow each other in the table of originals, but not in the same order.
            before = sum(count for file, count in files[: [file for file, _ in files].index(entry)])
            for start in range(0, len(numbers), AT_ONCE):
                some = own[before + numbers[start : start + AT_ONCE]]
                replayed += again.compare(entry, some)
    return Answer(
        unit="image",
        total=originals.height,
        replayed=tuple(replayed),
        causes=tuple(again.causes),
        altered=stored.altered,
        notes=tuple(again.notes),
    )


def _without_rows(image: str, split: str, variants: int) -> Replayed:
    """An image of which the table of originals says that it is in a split whose files have no room for it."""
    return Replayed(name=image, file=split, differences=(Difference("(rows)", "0", str(variants)),))


def _split_of(entry: FileEntry) -> str:
    return entry.path.partition("/")[0].removeprefix("split=")


@dataclass(frozen=True, slots=True)
class _Labels:
    """Class and size of each image by the listing and the labels as they are now."""

    classes: Mapping[str, str]
    sizes: Mapping[str, int]


class _Again:
    """The images of one version, made again; what is otherwise than it was gathers on the way."""

    def __init__(self, manifest: Manifest, stored: StoredFiles) -> None:
        self.causes: list[Cause] = []
        self.notes: list[str] = []
        self._manifest = manifest
        self._stored = stored
        self._entry = _originals_of(manifest)
        try:
            self.originals = frame_of(stored.read(self._entry))
        except Unreadable as fault:
            raise CorruptVersion(f"{manifest.dataset} v{manifest.version}: {fault.cause.text}") from fault
        # Versions that don't say it were made when all splits were augmented.
        evaluation = manifest.config.get("evaluation", "augmented")
        self._config = self._runnable(config_of(ImageAugmentationConfig, manifest, evaluation=evaluation))
        self.variants_in = self._config.variants_in
        self._class_ids: dict[str, int] = manifest.definition["classes"]
        self._labels = self._label()
        self._splits = self._split()

    def _runnable(self, config: ImageAugmentationConfig) -> ImageAugmentationConfig:
        """The configuration for this machine; without a GPU, one that asks for it runs on the CPU."""
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

    def _label(self) -> _Labels | None:
        """Label the images as a run would now; None if they can't be listed any more."""
        config, records = self._config, {record.name: record for record in self._manifest.inputs}
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
        ids = joined["image_id"].to_list()
        return _Labels(
            dict(zip(ids, joined["class_name"].to_list(), strict=True)),
            dict(zip(ids, joined["bytes"].to_list(), strict=True)),
        )

    def _split(self) -> dict[str, str]:
        """The split of every image, from all ids, classes and groups."""
        ids = self.originals["image_id"].to_list()
        numbers = {name: number for number, name in enumerate(ids)}
        alike = self.originals["alike"].to_list()
        groups = np.array([numbers[image if first is None else first] for image, first in zip(ids, alike, strict=True)])
        classes = np.array([self._class_ids[name] for name in self.originals["class_name"].to_list()], np.int64)
        keys = image_keys(ids, self._config.seed)
        config = self._config
        splits = split_images(keys, classes, groups.astype(np.int64), config.validation_share, config.test_share)
        return {image: SPLITS[split] for image, split in zip(ids, splits.tolist(), strict=True)}

    def compare(self, entry: FileEntry, originals: pl.DataFrame) -> list[Replayed]:
        """Compare some images of one file with what is made of them now."""
        ids = originals["image_id"].to_list()
        try:
            stored = self._rows_of(entry, ids)
        except Unreadable as fault:
            return [missing(image, entry, fault.cause) for image in ids]
        planned = self._planned(originals)
        config = self._config.of_split(_split_of(entry))
        outcomes, rows = augment_again(config, max(self._class_ids.values()) + 1, planned)
        found = self._of_originals(originals, planned, outcomes)
        names, owners = stored["image_id"].to_pylist(), stored["original_image_id"].to_pylist()
        of_rows = differences(stored, rows, placed(names, rows["image_id"].to_pylist()))
        for image, name, own in zip(owners, names, of_rows, strict=True):
            found[image] += [replace(difference, row=name) for difference in own]
        for image, count in ((image, owners.count(image)) for image in ids):
            if count != config.augmentation.variants:
                found[image].append(Difference("(rows)", str(count), str(config.augmentation.variants)))
        shared = (*causes_of(self._stored, entry), *causes_of(self._stored, self._entry))
        changed = self._changed(originals, outcomes)
        return [
            Replayed(
                name=image, file=entry.path, differences=tuple(found[image]), causes=(*shared, *changed.get(image, ()))
            )
            for image in ids
        ]

    def _rows_of(self, entry: FileEntry, ids: Sequence[str]) -> pa.Table:
        """The stored rows of some images of a file."""
        owners = self._stored.read(entry, columns=["original_image_id"])["original_image_id"]
        mask = pc.is_in(owners, value_set=pa.array(ids, pa.string()))
        return self._stored.read(entry, np.flatnonzero(mask.to_numpy()))

    def _planned(self, originals: pl.DataFrame) -> pa.Table:
        """What a run would plan for some images; the class of one that has no usable label now is the version's."""
        ids = originals["image_id"].to_list()
        labelled = [self._class_of(image, was) for image, was in originals.select("image_id", "class_name").rows()]
        return pa.table(
            {
                "image_id": pa.array(ids, pa.string()),
                "uri": pa.array(originals["uri"].to_list(), pa.string()),
                "class_name": pa.array(labelled, pa.string()),
                "class_id": pa.array([self._class_ids[name] for name in labelled], pa.int32()),
                "key": image_keys(ids, self._config.seed),
            }
        )

    def _class_of(self, image: str, was: str) -> str:
        found = was if self._labels is None else self._labels.classes.get(image)
        return found if found in self._class_ids else was

    def _of_originals(
        self, originals: pl.DataFrame, planned: pa.Table, outcomes: pa.Table
    ) -> dict[str, list[Difference]]:
        """Where what is noted of some images differs from what is found of them now; alike isn't found again."""
        ids = originals["image_id"].to_list()
        good = outcomes["reason"].is_null()
        judged = outcomes.filter(good)
        columns = {name: planned[name].filter(good) for name in ("image_id", "uri", "class_name", "class_id")}
        columns |= {name: judged[name] for name in ("format", "height", "width", "passed", "ready", "issues")}
        columns |= {"content_xxh3": judged["content"], "perceptual_hash": judged["hash"]}
        names = columns["image_id"].to_pylist()
        columns["mean_score"] = pa.array(row_means(judged["scores"]) if names else [], pa.float32())
        columns["split"] = pa.array([self._splits[image] for image in names], pa.string())
        columns["alike"] = pa.array(originals.filter(pl.Series(good.to_pylist()))["alike"].to_list(), pa.string())
        sizes = originals["bytes"].to_list() if self._labels is None else [self._labels.sizes.get(i) for i in ids]
        columns["bytes"] = pa.array(sizes, pa.int64()).filter(good.combine_chunks())
        made = pa.table({name: columns[name] for name in ORIGINALS.names}, schema=ORIGINALS)
        stored = originals.select(ORIGINALS.names).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(ORIGINALS)
        found = differences(stored, made, placed(ids, names))
        if self._labels is not None:
            for number, (image, was) in enumerate(originals.select("image_id", "class_name").rows()):
                now = self._labels.classes.get(image, "no label")
                if now not in (was, *self._class_ids):  # such a class could be given to no row
                    found[number] = (*found[number], Difference("class_name", was, now))
        return {image: list(own) for image, own in zip(ids, found, strict=True)}

    def _changed(self, originals: pl.DataFrame, outcomes: pa.Table) -> dict[str, list[Cause]]:
        """The images whose own file isn't what it was."""
        rows = zip(originals.select("image_id", "uri", "content_xxh3").rows(), outcomes.to_pylist(), strict=True)
        found = {}
        for (image, uri, content), outcome in rows:
            if outcome["content"] == content:
                continue
            reason = f"is rejected now ({outcome['reason']}: {outcome['detail']})"
            text = "has changed" if outcome["reason"] is None else reason
            found[image] = [Cause("input", f"the input {uri} {text}")]
        return found


def _originals_of(manifest: Manifest) -> FileEntry:
    found = [entry for entry in manifest.side_files if entry.path.startswith("_originals/")]
    if not found:
        raise CorruptVersion(f"{manifest.dataset} v{manifest.version} has no table of its originals (_originals/)")
    return found[0]
