"""One image, explained: its file, what was drawn for each variant, how these were judged, and why it has its split.

What is known of each original stands in one file beside the data (`_originals`). The draws aren't kept anywhere: they
are a function of the seed, the image's id and its size, and are made again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from tasks.audit.explain_draws import drawn_rows
from tasks.audit.explain_holders import holders_section
from tasks.audit.explain_picture import write_picture
from tasks.audit.explain_rows import Found, closest_of, find_rows
from tasks.audit.explain_sources import files_now
from tasks.audit.explain_split import split_section
from tasks.audit.explain_version import gate_section, refuse, rejected_rows, rejected_section, version_section
from tasks.audit.explained import Explanation, Section, explanation
from tasks.core import layout, storage
from tasks.core.errors import CorruptVersion, PipelineError
from tasks.core.manifest import FileEntry, Manifest
from tasks.core.reading import data_files
from tasks.images.config import ImageAugmentationConfig
from tasks.images.rows import IMAGE
from tasks.images.scoring import FATAL, MINOR

ORIGINALS = "_originals/"
_DECIDING = ["image_id", "class_id", "alike", "split", "content_xxh3", "perceptual_hash"]
_ORIGINAL, _VARIANT = "original_image_id", re.compile(r"(.+)_aug_[0-9]+")
_FACTS = (_ORIGINAL, "image_id", "augmentation_id", "data_quality_score", "validation_passed", "quality_issues")


def explain_image(root: str, manifest: Manifest, key: str, picture: str | None = None) -> Explanation:
    """Where an image comes from, what became of it, and who has it.

    Args:
        root: Root of the store.
        manifest: A version of images.
        key: The image's id, or that of one of its variants.
        picture: File to write the image before and after to.

    Raises:
        InputError: the version has no such image, and has rejected none.
        PipelineError: the version's configuration isn't one of this version of the project.

    """
    config = _config(manifest)
    known = _known(root, manifest) if manifest.status == "published" else pa.table({"image_id": pa.array([], "string")})
    image_id = _named(known, key)
    if image_id is None:
        rejected = rejected_rows(root, manifest, {"image_id", "path", "uri"}, {key})
        if not rejected:
            data_files(root, manifest)  # which says so if the gate rejected the version
            refuse(manifest, "image", key, closest_of(known["image_id"].to_pylist(), key))
        return _rejected(root, manifest, key, rejected, picture)
    original = _original(root, manifest, image_id)
    found = _variants(root, manifest, known, original, config)
    state = _file_state(original)
    drawn, words = drawn_rows(config, original)
    sections = [
        _source(manifest, original, state),
        _transforms(config.of_split(original["split"]), drawn),
        _quality(config, found),
        split_section(config, known, original),
        gate_section(manifest, {"images": "the images as they were read", "labels": "the labels as they were read"}),
        holders_section(root, manifest, _ORIGINAL, image_id),
        version_section(root, manifest),
    ]
    if picture is not None:
        told = write_picture(picture, config, (original, state), _pixels(root, manifest, found), words)
        sections.insert(0, Section(title="picture", facts=told))
    headline = f"image {image_id} of {manifest.dataset} v{manifest.version}: {found.table.num_rows} variants"
    return explanation(manifest, key, "held", f"{headline} in {original['split']}", sections)


def _rejected(
    root: str, manifest: Manifest, key: str, rows: Sequence[dict[str, Any]], picture: str | None
) -> Explanation:
    headline = f"image {key} isn't in {manifest.dataset} v{manifest.version}: it was rejected"
    section = rejected_section(rows)
    notes = ["A rejected image has no variants, so no picture was written."] if picture is not None else []
    section = Section(title=section.title, rows=section.rows, shown=section.shown, notes=notes)
    concerned = {"images": "this image", "labels": "this image's label"}
    sections = [section, gate_section(manifest, concerned), version_section(root, manifest)]
    return explanation(manifest, key, "rejected", headline, sections)


def _config(manifest: Manifest) -> ImageAugmentationConfig:
    try:
        # Versions that don't say it were made when all splits were augmented.
        return ImageAugmentationConfig.model_validate({"evaluation": "augmented", **manifest.config})
    except ValueError as fault:
        raise PipelineError(f"the version's configuration can't be read here: {str(fault).splitlines()[0]}") from fault


def _side_file(root: str, manifest: Manifest) -> str:
    entry = next((one for one in manifest.side_files if one.path.startswith(ORIGINALS)), None)
    if entry is None:
        raise CorruptVersion(f"{manifest.dataset} v{manifest.version} has no file of its originals; publish it anew")
    return layout.join(layout.version_uri(root, manifest.dataset, manifest.version), entry.path)


def _known(root: str, manifest: Manifest) -> pa.Table:
    """Every original of the version, in the order of the plan: what decides its split."""
    uri = _side_file(root, manifest)
    try:
        with storage.open_input(uri) as source:
            return pq.ParquetFile(source).read(columns=_DECIDING)
    except FileNotFoundError as fault:
        raise CorruptVersion(f"{uri} is missing, but its manifest lists it; restore it from a copy") from fault


def _named(known: pa.Table, key: str) -> str | None:
    """The image that a key names: by its id, or by that of one of its variants."""
    variant = _VARIANT.fullmatch(key)
    for name in (key, *([variant[1]] if variant else [])):
        if pc.any(pc.equal(known["image_id"], name)).as_py():
            return name
    return None


def _original(root: str, manifest: Manifest, image_id: str) -> dict[str, Any]:
    with storage.open_input(_side_file(root, manifest)) as source:
        row: dict[str, Any] = pq.read_table(source, filters=[("image_id", "=", image_id)]).to_pylist()[0]
        return row


def _variants(
    root: str, manifest: Manifest, known: pa.Table, original: Mapping[str, Any], config: ImageAugmentationConfig
) -> Found:
    """The rows of an image's variants: in the files of its unit, if they are named as the flow names them."""
    columns = [*_FACTS, "is_training_ready"]
    directory = layout.split_directory(original["split"]) + "/"
    place = pc.index(known["image_id"], original["image_id"]).as_py()
    rejected = sum(sum(balance.rejected.values()) for balance in manifest.balances[:1])
    units = range(place // config.images_per_file, (place + rejected) // config.images_per_file + 1)
    # Rows that changed their split late stand in files behind those of all units.
    last = -(-(known.num_rows + rejected) // config.images_per_file)

    def likely(entry: FileEntry) -> bool:
        number = layout.part_number(entry.path)
        return entry.path.startswith(directory) and (number in units or (number is not None and number > last // 2))

    found = find_rows(root, manifest, _ORIGINAL, original["image_id"], columns=columns, wanted=likely)
    if found.table.num_rows < config.variants_in(original["split"]):
        found = find_rows(root, manifest, _ORIGINAL, original["image_id"], columns=columns)
    return found


def _pixels(root: str, manifest: Manifest, found: Found) -> pa.Table:
    """The stored variants, in their order."""
    paths = {path for path, _ in found.places}
    wanted = found.rows[0][_ORIGINAL] if found.rows else ""
    table = find_rows(root, manifest, _ORIGINAL, wanted, wanted=lambda entry: entry.path in paths).table
    names = [name for name in ("augmentation_id", IMAGE, "quality_issues") if name in table.column_names]
    return table.select(names).sort_by("augmentation_id") if table.num_rows else table


def _file_state(original: Mapping[str, Any]) -> str:
    """What has become of the image's file, by its contents."""
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
    return Section(title="source", facts=facts, rows=[now.told() for now in files_now(labels)])


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
            "with the generators of torch, numpy and Python seeded by the number that stands here."
        )
        return Section(title="transforms", facts=facts, rows=drawn, notes=[note])
    return Section(title="transforms", facts=facts, rows=drawn, shown=("variant", "crop", "then", "colours"))


def _quality(config: ImageAugmentationConfig, found: Found) -> Section:
    bound = config.thresholds.score
    rows = []
    for row, (path, number) in sorted(zip(found.rows, found.places, strict=True), key=lambda one: one[0]["image_id"]):
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
                "training-ready": row["is_training_ready"],
                "why": why,
                "file": path,
                "row": number,
            }
        )
    bounds = config.thresholds.model_dump(include={"constant", "low_contrast", "dark", "bright", "magnified"})
    facts = {name: value for name, value in bounds.items() if any(name in row["issues"] for row in rows)}
    shown = ("variant", "score", "issues", "training-ready", "why", "file", "row")
    return Section(title="quality", facts=facts, rows=rows, shown=shown)
