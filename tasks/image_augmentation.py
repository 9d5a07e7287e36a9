"""Tasks of the image-augmentation flow. Thin: each names a step, reports progress and calls the pipeline.

Tasks pass small frozen values; their output is on storage.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import progress, publish_table
from tasks.images.config import ImageAugmentationConfig
from tasks.images.gate import ImageFigures, class_summary, summary_csv
from tasks.images.pipeline import AugmentedImages, augment_images, digest_in_tasks, draw_in_tasks
from tasks.images.plan import ImagePlan, plan_images
from tasks.images.sample import write_sample
from tasks.images.sheets import charts, contact_picture, reject_picture, reject_table
from tasks.images.split import SPLITS
from tasks.io import storage
from tasks.publication import JudgedVersion, judged_version
from tasks.report.report import DataTable, Picture
from tasks.runner import RETRY
from tasks.store import layout, versions
from tasks.store.manifest import RunRecord
from tasks.store.reservation import Reservation


@task(name="prepare-images", cache_policy=NO_CACHE, **RETRY)
def prepare_images(config: ImageAugmentationConfig) -> ImageAugmentationConfig:
    """Make the sample if no images are given; return the configuration with every URI normalised."""
    if config.images is not None:
        return config
    uris = write_sample(config.root, config.sample_images, config.seed, draw_in_tasks)
    get_run_logger().info("No images are given: using the sample in %s", uris["images"])
    return config.model_copy(update=uris)


@task(name="plan-images", cache_policy=NO_CACHE, **RETRY)
def plan_run(config: ImageAugmentationConfig, reservation: Reservation) -> ImagePlan:
    """List and label the images, give each class its id, and divide the work into units."""
    plan = plan_images(config, reservation, versions.latest(reservation.root, reservation.dataset), digest_in_tasks)
    get_run_logger().info(
        "%d images of %d classes, in %d units of up to %d",
        plan.images,
        len(plan.classes),
        plan.units,
        config.images_per_file,
    )
    return plan


@task(name="augment-images", tags=["ray-data"], cache_policy=NO_CACHE, **RETRY)
def augment(plan: ImagePlan, config: ImageAugmentationConfig) -> AugmentedImages:
    """Augment, judge, write and split all images: the Ray job."""
    logger = get_run_logger()
    with progress("Augmenting", total=plan.images, unit="images") as done:
        augmented = augment_images(plan, config, on_images=done)
    if augmented.resumed_units:
        logger.info("%d of %d units were there from an earlier attempt", augmented.resumed_units, plan.units)
    logger.info(
        "%d variants of %d images written in %d files",
        augmented.variants,
        augmented.images,
        len(augmented.files),
    )
    if augmented.like_group_count:
        logger.info("%d groups of images that belong together share a split", augmented.like_group_count)
    return augmented


@task(name="validate-images", cache_policy=NO_CACHE, **RETRY)
def validate_images(
    plan: ImagePlan, augmented: AugmentedImages, config: ImageAugmentationConfig, run: RunRecord
) -> JudgedVersion:
    """Judge the dataset against its thresholds and the last version; write its report and show it in Prefect."""
    reservation = augmented.reservation
    # Judged against the version that the classes are carried over from: the commit requires it to be the latest still.
    previous = versions.read_manifest(reservation.root, reservation.dataset, plan.base) if plan.base else None
    counts = split_counts(plan, augmented)
    figures = ImageFigures(
        schema=augmented.schema,
        profile=augmented.profile,
        balances=augmented.balances,
        variants=sum(entry.rows for entry in augmented.files),
        passed=augmented.originals.passed,
        ready=augmented.originals.ready,
        class_counts=_class_counts(plan, augmented),
        split_counts=counts,
        class_ids=plan.classes,
        leaking_groups=augmented.leaking_groups,
        duplicate_ids=augmented.duplicate_ids,
    )
    summary = _summary(plan, augmented, config)
    storage.write_bytes(layout.join(reservation.uri, layout.CLASS_SUMMARY), summary_csv(summary))
    publish_table(f"{config.name}-classes", summary.to_pylist(), f"Classes and splits of {reservation.dataset}")
    return judged_version(
        augmented,
        config,
        run,
        previous,
        recorded=image_record(plan, augmented, config),
        figures=figures,
        base=plan.base,
        pictures=tuple(_pictures(augmented, config, counts)),
        tables=tuple(_tables(plan, augmented)),
    )


def split_counts(plan: ImagePlan, augmented: AugmentedImages) -> dict[str, dict[str, int]]:
    """Return augmented images by class, then split; a known class without any has zeros."""
    names = {number: name for name, number in plan.classes.items()}
    counts: dict[str, dict[str, int]] = {name: defaultdict(int) for name in plan.classes}
    for number, split in zip(augmented.class_ids.tolist(), augmented.splits.tolist(), strict=True):
        counts[names[number]][SPLITS[split]] += 1
    return {name: {split: by_split[split] for split in SPLITS if by_split[split]} for name, by_split in counts.items()}


def _class_counts(plan: ImagePlan, augmented: AugmentedImages) -> dict[str, int]:
    return {name: int((augmented.class_ids == number).sum()) for name, number in plan.classes.items()}


def _summary(plan: ImagePlan, augmented: AugmentedImages, config: ImageAugmentationConfig) -> Any:
    names = sorted(plan.classes, key=plan.classes.__getitem__)
    return class_summary(
        class_names=names,
        class_ids=augmented.class_ids,
        splits=[SPLITS[split] for split in augmented.splits.tolist()],
        mean_scores=augmented.originals.mean_scores,
        passed=augmented.originals.passed_variants,
        ready=augmented.originals.ready_variants,
        variants={split: config.variants_in(split) for split in SPLITS},
    )


def image_record(plan: ImagePlan, augmented: AugmentedImages, config: ImageAugmentationConfig) -> dict[str, Any]:
    """Return what the manifest of images has besides that of every version."""
    augmentation = config.augmentation
    definition = {
        "classes": plan.classes,
        "image": {
            "format": config.format,
            "shape": [3, augmentation.size, augmentation.size],
            "dimensions": ["channel", "height", "width"],
            "normalised": config.format == "float32",
        },
        "normalise": {"mean": list(augmentation.mean), "std": list(augmentation.std), "scale": 255},
        "splits": {name: int((augmented.splits == number).sum()) for number, name in enumerate(SPLITS)},
        "variants": augmentation.variants,
        "evaluation": config.evaluation,
        "images": _class_counts(plan, augmented),
    }
    return {"side_files": augmented.side_files, "inputs": plan.inputs, "definition": definition}


def _pictures(
    augmented: AugmentedImages, config: ImageAugmentationConfig, counts: dict[str, dict[str, int]]
) -> list[Picture]:
    found = [contact_picture(augmented.examples, config)]
    found.append(reject_picture(augmented.rejected_files, augmented.reservation, config))
    return [picture for picture in found if picture is not None] + charts(counts, augmented.sizes)


def _tables(plan: ImagePlan, augmented: AugmentedImages) -> list[DataTable]:
    tables = [_speed_table(plan, augmented)]
    if augmented.like_groups:
        rows = tuple(
            (group.split, len(group.image_ids), ", ".join(group.image_ids[:10])) for group in augmented.like_groups
        )
        left_out = augmented.like_group_count - len(rows)
        note = f"{left_out:,} more groups are in _originals/, column 'alike'." if left_out else ""
        title = "Images that share a split: copies, near-duplicates, or of one group"
        tables.append(DataTable(title=title, columns=("split", "images", "first of them"), rows=rows, note=note))
    rejected = reject_table(augmented.balances[0].rejected, augmented.balances[0].rows_in)
    return [*tables, *([rejected] if rejected is not None else [])]


def _speed_table(plan: ImagePlan, augmented: AugmentedImages) -> DataTable:
    total = sum(augmented.stage_seconds.values()) or 1.0
    rows = tuple(
        (stage, round(seconds, 2), round(seconds / total, 3), round(seconds / max(plan.images, 1) * 1000, 3))
        for stage, seconds in sorted(augmented.stage_seconds.items(), key=lambda item: -item[1])
    )
    wall = augmented.timings["augment and write"]
    note = f"Over all workers; the job took {wall:.1f} s: {plan.images / max(wall, 1e-9):,.0f} images a second"
    note += f" ({augmented.resumed_units} of {plan.units} units taken over from an earlier attempt)."
    return DataTable(
        title="Where the time went",
        columns=("stage", "seconds", "share", "milliseconds an image"),
        rows=rows,
        note=note,
    )
