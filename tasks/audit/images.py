"""Images of a version: made again from their files, and explained.

A replay decodes, draws, augments, judges, labels and splits anew. The split depends on all images, and is made from the
version's table of all of them (`_originals`): from ids, classes and groups. Likeness of images is taken from there
unchanged, since finding it would decode all of them.

An explanation tells an image's file, each variant and its judgement, the reason for its split, and shows a picture.
All facts about each original are in one file beside the data (`_originals`). The draws aren't stored: they
are a function of the seed, the image's id and its size, and are repeated. So is the split, of all originals.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from tasks.audit.explanation import (
    Explanation,
    Found,
    Section,
    absent,
    closest_of,
    find_rows,
    refuse,
    rejected_rows,
)
from tasks.audit.holders import closing_sections
from tasks.audit.inputs import Cause, check_files, input_causes
from tasks.audit.replay_rows import (
    Again,
    Difference,
    Replayed,
    Unreadable,
    by_file,
    differences,
    missing,
    placed,
)
from tasks.engine.partition import frame_of
from tasks.features.writer import to_arrow
from tasks.images.augment import augment_again
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.decode import Decoded, Decoder
from tasks.images.draws import Draws, draws_of, image_keys, policy_seeds, window
from tasks.images.engines import FATAL, MINOR
from tasks.images.labels import join_labels, read_labels
from tasks.images.outcomes import ORIGINALS, original_rows, originals_entry, split_again
from tasks.images.rows import IMAGE, decode_images
from tasks.images.sheets import levels, thumbnail, tile_sheet
from tasks.images.sources import list_images
from tasks.images.split import SPLITS
from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, SourceError
from tasks.io.hashing import stable_hash
from tasks.io.notation import missing_values
from tasks.io.tensors import Int8Array, Int32Array, Int64Array, UInt8Array, UInt64Array
from tasks.store.layout import READY
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.reading import data_files, opened
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
            raise CorruptVersion(f"{manifest}: {fault.cause.text}") from fault
        self._config = self._runnable(config_of(ImageAugmentationConfig, manifest))
        self._class_ids: dict[str, int] = manifest.definition["classes"]
        originals = frame_of(table)
        labelled = originals.join(self._label(originals), on="image_id", how="left", maintain_order="left")
        self._originals = labelled.with_columns(pl.col("now").fill_null("no label"))
        _, splits = split_again(table, self._config)
        ids = self._originals["image_id"]
        self._splits = {image: SPLITS[split] for image, split in zip(ids, splits.tolist(), strict=True)}

    @property
    def total(self) -> int:
        """Number of images."""
        return self._originals.height

    def replay(self, chosen: Int64Array) -> list[Replayed]:
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

    def _label(self, originals: pl.DataFrame) -> pl.DataFrame:
        """Return the class `now` and the size of each image, as a run would; as they were if that isn't possible."""
        config, records = self._config, {record.name: record for record in self.manifest.inputs}
        if "labels" in records:
            causes = input_causes(records["labels"], check_files(records["labels"]))
            self.causes += [replace(cause, columns=_OF_ALL_IMAGES) for cause in causes]
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
            known = frame_of(join_labels(listing, labels, config.classes).images)
        except SourceError as fault:
            text = f"the images can't be listed and labelled again: {fault}"
            self.causes.append(Cause("input", text, _OF_ALL_IMAGES))
            self.notes.append(text)
            known = originals
        return known.select("image_id", now=pl.col("class_name").cast(pl.String), size="bytes")

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
        for image, name, differing in zip(owners, names, of_rows, strict=True):
            found[image] += [replace(difference, row=name) for difference in differing]
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
        usable = pl.col("now").is_in([*self._class_ids])
        planned = originals.select(
            "image_id",
            "uri",
            bytes="size",
            class_name=pl.when(usable).then("now").otherwise("class_name"),
            key=pl.Series(image_keys(originals["image_id"].to_list(), self._config.seed)),
        )
        ids = pl.col("class_name").replace_strict(self._class_ids, return_dtype=pl.Int32)
        return to_arrow(planned.with_columns(class_id=ids))

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
        stored = to_arrow(originals.select(ORIGINALS.names)).cast(ORIGINALS)
        found = differences(stored, made, placed(ids, names))
        for number, (was, now) in enumerate(originals.select("class_name", "now").rows()):
            if now not in (was, *self._class_ids):  # such a class could be given to no row
                found[number] = (*found[number], Difference("class_name", was, now))
        return {image: list(differing) for image, differing in zip(ids, found, strict=True)}


def _split_of(entry: FileEntry) -> str:
    return entry.path.partition("/")[0].removeprefix("split=")


def _changed(originals: pl.DataFrame, outcomes: pa.Table) -> Mapping[str, Sequence[Cause]]:
    """Return the images whose file has changed."""
    rows = zip(originals.select("image_id", "uri", "content_xxh3").rows(), outcomes.to_pylist(), strict=True)
    changed = {}
    for (image, uri, content), outcome in rows:
        if outcome["content"] != content:
            reason = f"is rejected now ({outcome['reason']}: {outcome['detail']})"
            text = "has changed" if outcome["reason"] is None else reason
            changed[image] = [Cause("input", f"the input {uri} {text}")]
    return changed


_SIDE, _LINES = 240, 5
_PIXELS = 1024
_MARGIN = 16
_MOST_BYTES = 4 << 20
_COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))
_NAMES = ("red", "blue", "green", "orange", "violet", "turquoise")


def write_picture(
    path: str,
    config: ImageAugmentationConfig,
    image: tuple[Mapping[str, Any], str],
    variants: pa.Table,
    words: Sequence[str],
) -> dict[str, Any]:
    """Write the picture, a local .png or .webp.

    Args:
        path: File to write; an existing one is replaced.
        config: The version's configuration.
        image: Its row in the table of originals, and the state of its file.
        variants: Stored rows of its variants.
        words: Transforms of each, in words.

    Returns:
        Facts about the file.

    Raises:
        ConfigError: the file can't be written.
    """
    items = [_before(config, *image)]
    if variants.num_rows:
        variants = variants.sort_by("augmentation_id")
        numbers, issues = (variants[name].to_pylist() for name in ("augmentation_id", "quality_issues"))
        for number, stored, wrong in zip(numbers, decode_images(variants), issues, strict=True):
            prefix = f"{', '.join(wrong)}: " if wrong else ""
            coloured = config.augmentation.policy is None and number < len(_NAMES)
            name = f"variant {number}" + (f" ({_NAMES[number]})" if coloured else "")
            items.append((name, prefix + words[number], levels(stored, config.augmentation)))
    data = _opaque(tile_sheet(items, _SIDE, _MOST_BYTES, lines=_LINES), path)
    try:
        Path(path).write_bytes(data)
    except OSError as fault:
        raise ConfigError(f"--picture {path} can't be written: {fault.strerror}; give another place") from fault
    return {"written to": str(Path(path).resolve()), "bytes": len(data), "shows": [name for name, _, _ in items]}


def _before(
    config: ImageAugmentationConfig, original: Mapping[str, Any], state: str
) -> tuple[str, str, UInt8Array | None]:
    """Return the original with its crops; a text if the file has changed."""
    name, size = f"original: {original['class_name']}", f"{original['width']} × {original['height']} px"
    if state != "unchanged":
        return name, f"its file is {state}", None
    decoded = Decoder(config.max_pixels, config.background).decode(storage.read_bytes(original["uri"]))
    if not isinstance(decoded, Decoded):
        return name, f"it can't be decoded here: {decoded.reason}", None
    small = thumbnail(decoded.pixels[:, :, :3], _PIXELS).copy()
    text = f"{size}, {original['format']}, {original['split']}"
    if config.of_split(original["split"]).augmentation.policy is not None:
        return name, text, small
    scale = small.shape[0] / original["height"], small.shape[1] / original["width"]
    for crop, colour in zip(draws_of(config, original).crop.tolist(), _COLOURS, strict=False):
        _frame(small, crop, scale, colour)
    return name, f"{text}; the frames are the variants' crops", small


def _frame(pixels: UInt8Array, crop: Sequence[int], scale: tuple[float, float], colour: tuple[int, int, int]) -> None:
    """Draw the border of a crop into a picture."""
    top, left = round(crop[0] * scale[0]), round(crop[1] * scale[1])
    bottom, right = round((crop[0] + crop[2]) * scale[0]), round((crop[1] + crop[3]) * scale[1])
    wide = max(2, max(pixels.shape[:2]) // 150)
    inside = pixels[top:bottom, left:right]
    for side in (inside[:wide], inside[-wide:], inside[:, :wide], inside[:, -wide:]):
        side[...] = colour


def _opaque(sheet: bytes, path: str) -> bytes:
    """Encode a sheet on white, in the format of a file's suffix."""
    from PIL import Image

    with Image.open(io.BytesIO(sheet)) as opened:
        image = opened.convert("RGBA")
    left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
    ground = Image.new("RGBA", (right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN), "white")
    ground.alpha_composite(image.crop((left, top, right, bottom)), (_MARGIN, _MARGIN))
    data = io.BytesIO()
    flat = ground.convert("RGB")
    if path.lower().endswith(".png"):
        flat.save(data, "PNG", optimize=True)
    else:
        flat.save(data, "WEBP", quality=90)
    return data.getvalue()


OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
_DECIDING = ["image_id", "class_id", "alike", "split", "content_xxh3", "perceptual_hash"]
_ORIGINAL, _VARIANT = "original_image_id", re.compile(r"(.+)_aug_[0-9]+")
_FACTS = ("image_id", "augmentation_id", "data_quality_score", "validation_passed", "quality_issues", READY)
_MEMBERS = 50


def explain_image(root: str, manifest: Manifest, key: str, picture: str | None = None) -> Explanation:
    """Explain the origin of an image, its outcome, and its holders."""
    config = config_of(ImageAugmentationConfig, manifest)
    nothing = pa.table({"image_id": pa.array([], "string")})
    known = _read_originals(root, manifest, columns=_DECIDING) if manifest.status == "published" else nothing
    image_id = _named(known, key)
    if image_id is None:
        rejected = rejected_rows(root, manifest, {"image_id", "path", "uri"}, {key})
        if not rejected:
            data_files(root, manifest)  # raises if the gate rejected the version
            refuse(manifest, "image", key, closest_of(known["image_id"].to_pylist(), key))
        notes = ["A rejected image has no variants, so no picture was written."] if picture is not None else []
        concerned = {"images": "this image", "labels": "this image's label"}
        what = ("image", key)
        return absent(root, manifest, what, rejected, "it was rejected", concerned=concerned, notes=notes)
    [original] = _read_originals(root, manifest, filters=[("image_id", "=", image_id)]).to_pylist()
    columns = [*_FACTS, *([] if picture is None else [IMAGE])]
    variants = find_rows(root, manifest, _ORIGINAL, image_id, columns=columns)
    state = _file_state(original)
    drawn, words = drawn_rows(config, original)
    concerned = {name: f"the {name} as they were read" for name in ("images", "labels")}
    sections = [
        _source(manifest, original, state),
        _transforms(config.of_split(original["split"]), drawn),
        _quality(config, variants),
        _split(config, known, original),
        *closing_sections(root, manifest, (_ORIGINAL, image_id), concerned),
    ]
    if picture is not None:
        facts = write_picture(picture, config, (original, state), variants.table, words)
        sections.insert(0, Section(title="picture", facts=facts))
    headline = f"image {image_id} of {manifest}: {variants.table.num_rows} variants"
    return Explanation(manifest, key, "held", f"{headline} in {original['split']}", sections)


def _read_originals(root: str, manifest: Manifest, **how: Any) -> pa.Table:
    """Return the table of originals, in the order of the plan."""
    uri = manifest.uri(root, originals_entry(manifest).path)
    with opened(uri) as source:
        return pq.read_table(source, **how)


def _named(known: pa.Table, key: str) -> str | None:
    """Return the image that a key names: by its id, or by that of one of its variants."""
    variant = _VARIANT.fullmatch(key)
    for name in (key, *([variant[1]] if variant else [])):
        if pc.any(pc.equal(known["image_id"], name)).as_py():
            return name
    return None


def _file_state(original: Mapping[str, Any]) -> str:
    """Compare the image's file with its original contents."""
    try:
        data = storage.read_bytes(original["uri"])
    except FileNotFoundError:
        return "gone"
    return "unchanged" if xxhash.xxh3_128_hexdigest(data) == original["content_xxh3"] else "changed since"


def _source(manifest: Manifest, original: Mapping[str, Any], state: str) -> Section:
    labels = next((record for record in manifest.inputs if record.name == "labels"), None)
    facts: dict[str, Any] = {
        "file": original["uri"],
        "bytes": original["bytes"],
        "content": f"xxh3:{original['content_xxh3']}",
        "now": state,
        "format": original["format"],
        "height": original["height"],
        "width": original["width"],
        "class": original["class_name"],
        "class id": original["class_id"],
    }
    if labels is None:
        facts["labelled by"] = "the first directory of its path"
        return Section(title="source", facts=facts)
    columns = [manifest.config[name] for name in ("id_column", "class_column", "group_column")]
    facts["labelled by"] = f"{labels.uri}, columns {', '.join(name for name in columns if name)}"
    return Section(title="source", facts=facts, rows=[file.as_row() for file in check_files(labels)])


def _transforms(config: ImageAugmentationConfig, drawn: Sequence[Mapping[str, Any]]) -> Section:
    augmentation = config.augmentation
    facts = {
        "seed": config.seed,
        "variants": augmentation.variants,
        "size": f"{augmentation.size} × {augmentation.size}",
    }
    facts |= {"stored as": config.format}
    if augmentation.policy is not None:
        note = (
            f"The transforms are those of the policy {augmentation.policy}, and so are its draws: each variant is made "
            "with the generators of torch, numpy and Python seeded by the number given here."
        )
        return Section(title="transforms", facts=facts, rows=drawn, notes=[note])
    return Section(title="transforms", facts=facts, rows=drawn, shown=("variant", "crop", "then", "colours"))


def _quality(config: ImageAugmentationConfig, variants: Found) -> Section:
    bound = config.thresholds.score
    rows = []
    for row, (path, number) in sorted(
        zip(variants.rows, variants.places, strict=True), key=lambda pair: pair[0]["image_id"]
    ):
        issues = row["quality_issues"]
        fatal = [issue for issue in issues if issue in FATAL]
        lost = [f"{issue} -{MINOR[issue]:g}" for issue in issues if issue in MINOR]
        if fatal:
            why = f"{', '.join(fatal)}: invalid, whatever its score"
        else:
            side = "≥" if row["data_quality_score"] >= bound else "<"
            why = f"score {row['data_quality_score']:g} {side} {bound:g} (thresholds.score)"
            why += f", by {', '.join(lost)}" if lost else ""
        rows.append(
            {
                "variant": row["augmentation_id"],
                "id": row["image_id"],
                "score": row["data_quality_score"],
                "issues": issues,
                "valid": row["validation_passed"],
                "training-ready": row[READY],
                "why": why,
                "file": path,
                "row": number,
            }
        )
    bounds = config.thresholds.model_dump(include={"constant", "low_contrast", "dark", "bright", "magnified"})
    facts = {name: value for name, value in bounds.items() if any(name in row["issues"] for row in rows)}
    shown = ("variant", "score", "issues", "training-ready", "why", "file", "row")
    return Section(title="quality", facts=facts, rows=rows, shown=shown)


def drawn_rows(config: ImageAugmentationConfig, original: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw the variants again: one row each, and one sentence each."""
    config = config.of_split(original["split"])
    if config.augmentation.policy is not None:
        seeds = policy_seeds(image_keys([original["image_id"]], config.seed), config.augmentation.variants)
        rows = [{"variant": number, "seed of the policy": str(seed)} for number, seed in enumerate(seeds.tolist())]
        return rows, [f"by {config.augmentation.policy}"] * len(rows)
    draws = draws_of(config, original)
    rows = [_row(draws, number, original, config.augmentation) for number in range(config.augmentation.variants)]
    return rows, [f"{row['crop']}; {row['then']}; {row['colours']}" for row in rows]


def _row(draws: Draws, number: int, original: Mapping[str, Any], augmentation: Augmentation) -> dict[str, Any]:
    top, left, height, width = draws.crop[number].tolist()
    size = augmentation.size
    tall, wide, _, _ = window(height, width, augmentation)
    made = f"made {wide} × {tall}" + (f", of which the middle {size} × {size}" if (tall, wide) != (size, size) else "")
    share = height * width / (original["height"] * original["width"])
    flip, angle = bool(draws.flip[number]), float(draws.angle[number])
    jitter = dict(zip(OPERATIONS, draws.jitter[number].tolist(), strict=True))
    order = [OPERATIONS[operation] for operation in draws.order[number].tolist()]
    applied = [name for name in order if jitter[name] != _NEUTRAL[OPERATIONS.index(name)]]
    turned = f"turned {abs(angle):.2f}° {'counter-' if angle > 0 else ''}clockwise" if angle else "not turned"
    return {
        "variant": number,
        "top": top,
        "left": left,
        "height": height,
        "width": width,
        "share of the area": round(share, 6),
        "flip": flip,
        "degrees": angle,
        **jitter,
        "order": order,
        "crop": f"{width} × {height} px at left {left}, top {top} ({share:.1%} of the area), {made}",
        "then": f"{'mirrored' if flip else 'not mirrored'}, {turned}",
        "colours": ", ".join(_words(name, jitter[name]) for name in applied) or "as they are",
    }


def _words(name: str, amount: float) -> str:
    if name == "hue":
        return f"hue {amount * 360:+.1f}°"
    return f"{name} × {amount:.3f}"


def _split(config: ImageAugmentationConfig, known: pa.Table, original: Mapping[str, Any]) -> Section:
    """Return the split of an image, related images that share it, and the deciding rule.

    Args:
        config: The version's configuration.
        known: image_id, class_id, alike and split of all of its originals.
        original: The image, with its perceptual hash.
    """
    keys = image_keys(known["image_id"].to_pylist(), config.seed)
    groups, again = split_again(known, config)
    mine = pc.index(known["image_id"], original["image_id"]).as_py()
    members = np.flatnonzero(groups == groups[mine])
    shares = f"validation {config.validation_share:g}, test {config.test_share:g}, the rest train"
    if len(members) == 1:
        classes = known["class_id"].to_numpy()
        why = f"class '{original['class_name']}': {_alone(keys, classes, groups, again, mine)}"
    else:
        why = _together(keys, members, again[mine], config)
    facts: dict[str, Any] = {"split": original["split"], "shares": shares, "why": why}
    agrees = SPLITS[again[mine]] == original["split"]
    facts["computed again"] = f"{SPLITS[again[mine]]}, {'as it was' if agrees else 'NOT as it was'}"
    rows = [
        {
            "belongs with": known["image_id"][row].as_py(),
            "split": known["split"][row].as_py(),
            "which is": "this image" if row == mine else _likeness(known, row, original),
        }
        for row in (members[:_MEMBERS].tolist() if len(members) > 1 else ())
    ]
    left_out = len(members) - _MEMBERS
    notes = [f"{left_out} more belong with it."] if left_out > 0 and rows else []
    return Section(title="split", facts=facts, rows=rows, notes=notes)


def _alone(keys: UInt64Array, classes: Int32Array, groups: Int64Array, splits: Int8Array, mine: int) -> str:
    """Describe a single image's place among those of its class, in the order of their keys."""
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    single = np.flatnonzero((classes == classes[mine]) & (sizes[group_of] == 1))
    order = single[np.argsort(keys[single])]
    place = int(np.flatnonzero(order == mine)[0]) + 1
    counts = np.bincount(splits[single], minlength=len(SPLITS))
    taken = f"the first {counts[1]} are validation's" + (f", the last {counts[2]} test's" if counts[2] else "")
    return (
        f"by the hash of its id and the seed it is number {place} of its {len(single)} images that stand alone; "
        f"{taken}, the others train's"
    )


def _together(keys: UInt64Array, members: Int64Array, split: int, config: ImageAugmentationConfig) -> str:
    """Describe a group's draw by its smallest key, and if it was granted."""
    draw = float(stable_hash(pa.array([keys[members].min()]))[0] / 2.0**64)
    test = config.validation_share + config.test_share
    drawn = 1 if draw < config.validation_share else 2 if draw < test else 0
    reason = (
        f"it shares a split with {len(members) - 1} more, as they belong together; the smallest hash of them draws "
        f"{draw:.4f}: {SPLITS[drawn]}"
    )
    if drawn == split:
        return reason
    return f"{reason}, which had no room for them in their classes (or train would have had none of a class)"


def _likeness(known: pa.Table, row: int, original: Mapping[str, Any]) -> str:
    """Describe the likeness of two images of a group, by their contents."""
    if known["content_xxh3"][row].as_py() == original["content_xxh3"]:
        return "the same bytes"
    bits = (known["perceptual_hash"][row].as_py() ^ original["perceptual_hash"]).bit_count()
    return f"{bits} of 64 bits of the perceptual hash differ"
