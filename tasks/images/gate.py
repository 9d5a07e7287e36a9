"""The quality gate of a version of augmented images, and its summary by class. Pure."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.images.config import ImageAugmentationConfig
from tasks.images.rows import ENCODED, IMAGE, LABEL, rows_schema
from tasks.images.split import SPLITS
from tasks.io.errors import InputError
from tasks.io.tensors import TENSOR
from tasks.io.text import plural
from tasks.quality import rules
from tasks.quality.figures import Figures
from tasks.quality.profile import ColumnPartial, TableProfile
from tasks.quality.sketch import TopValues
from tasks.store.manifest import CheckResult, ColumnProfile, GateResult, Manifest, RowBalance

CLASS = "class_name"
SCORE = "data_quality_score"


@dataclass(frozen=True, kw_only=True)
class ImageFigures(Figures):
    """Figures of augmented images; the schema has the metadata of its fields, the profile may lack image and label.

    Attributes:
        variants: Rows of the data files.
        passed: Rows without a fatal issue.
        ready: Training-ready rows.
        class_counts: Augmented images by class; a known class without any counts as 0.
        split_counts: The same images by class, then split, counted apart.
        class_ids: Id of each known class.
        leaking_groups: Groups of related images that are in several splits.
        duplicate_ids: Rows with the image_id of another row.

    """

    variants: int
    passed: int
    ready: int
    class_counts: Mapping[str, int]
    split_counts: Mapping[str, Mapping[str, int]]
    class_ids: Mapping[str, int]
    leaking_groups: int
    duplicate_ids: int


def judge_images(config: ImageAugmentationConfig, figures: ImageFigures, previous: Manifest | None) -> GateResult:
    """Judge the written images by the thresholds and the last published version, if there is one.

    Against the last published version, a changed column warns where the configuration or the classes explain it: the
    image column for another format, size or normalisation, the one-hot label for another number of classes. Any other
    difference fails.
    """
    schema, profile, balances = figures.schema, figures.profile, figures.balances
    variants, passed, ready = figures.variants, figures.passed, figures.ready
    class_counts, split_counts = figures.class_counts, figures.split_counts
    assert 0 <= ready <= passed <= variants, f"{ready} ready of {passed} passed of {variants}"
    bounds = config.thresholds
    columns = profile.columns()
    classes = len(class_counts)
    images = sum(class_counts.values())
    shares = split_shares(config)
    sizes: Counter[str] = Counter()
    for by_split in split_counts.values():
        sizes.update(by_split)
    checks: list[CheckResult] = [rules.check_rows(profile.rows, 1)]
    expected = {field.name: _described(field) for field in rows_schema(config, max(classes, 1))}
    checks += rules.check_schema({field.name: _described(field) for field in schema}, expected)
    checks.append(rules.check_unique("image_id", figures.duplicate_ids))
    checks.append(_distinct_ids(figures.class_ids))
    accounts = [
        RowBalance(
            name="variants",
            rows_in=sum(count * config.variants_in(split) for split, count in sizes.items()),
            rows_out=variants,
        ),
        RowBalance(name="data files", rows_in=variants, rows_out=profile.rows),
        RowBalance(name="splits", rows_in=images, rows_out=sizes.total()),
    ]
    checks += [rules.check_balance(balance) for balance in (*balances, *accounts)]
    checks += [rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail) for balance in balances]
    checks.append(rules.check_invalid_share(variants - passed, variants, bounds.invalid_warn, bounds.invalid_fail))
    checks.append(rules.check_ready_share(ready, variants, bounds.ready_warn, bounds.ready_fail))
    if "class_id" in columns:
        checks.append(rules.check_range("class_id", columns["class_id"], 0, classes - 1))
    if SCORE in columns:
        checks.append(rules.check_range(SCORE, columns[SCORE], 0, 1))
    checks.append(_class_balance(config, class_counts))
    checks.append(rules.check_leak(figures.leaking_groups))
    checks += rules.check_split_sizes(sizes, shares, essential=SPLITS[0])
    checks.append(rules.check_stratification(CLASS, split_counts, shares))
    if previous is not None:
        checks += _against(previous, config, schema, profile, class_counts)
    return rules.gate(checks)


def split_shares(config: ImageAugmentationConfig) -> dict[str, float]:
    """Return the requested share of the images for each split."""
    train = 1 - config.validation_share - config.test_share
    return dict(zip(SPLITS, (train, config.validation_share, config.test_share), strict=True))


def class_summary(
    *,
    class_names: Sequence[str],
    class_ids: npt.NDArray[np.integer[Any]],
    splits: Sequence[str] | npt.NDArray[Any] | pa.Array,
    mean_scores: npt.NDArray[np.floating[Any]],
    passed: npt.NDArray[np.integer[Any]],
    ready: npt.NDArray[np.integer[Any]],
    variants: Mapping[str, int],
    split_names: Sequence[str] = SPLITS,
) -> pa.Table:
    """Return one row for each class and split, in this order, also without images; independent of the images' order.

    Args:
        class_names: By class id.
        class_ids: Class of each image, shape (n,).
        splits: Name of each image's split.
        mean_scores: Mean quality score of each image's variants.
        passed: Variants of each image that passed validation.
        ready: Variants of each image that are training-ready.
        variants: Variants of each image of a split.
        split_names: Splits, in the order of the rows.

    Returns:
        class_id, class_name, split, originals, variants, mean_quality (null without images), passed, ready.

    Raises:
        InputError: a class id or a split that isn't among the names, or arrays of different lengths.
    """
    names = np.asarray(splits.to_pylist() if isinstance(splits, pa.Array) else splits, dtype=str)
    lengths = {len(array) for array in (class_ids, names, mean_scores, passed, ready)}
    if len(lengths) > 1:
        raise InputError(f"figures of {sorted(lengths)} images; every array must have one for each image")
    if len(class_ids) and not 0 <= class_ids.min() <= class_ids.max() < len(class_names):
        raise InputError(f"class ids from {class_ids.min()} to {class_ids.max()}, where there are {len(class_names)}")
    unknown = sorted(set(names.tolist()) - set(split_names))
    if unknown:
        raise InputError(f"{unknown[0]!r} is no split: they are {', '.join(split_names)}")
    codes = np.zeros(len(names), dtype=np.int64)
    for code, name in enumerate(split_names):
        codes[names == name] = code
    groups = class_ids.astype(np.int64) * len(split_names) + codes
    order = np.lexsort((mean_scores, groups))  # one order of summation, whatever the order of the images
    rows = len(class_names) * len(split_names)

    def total(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.bincount(groups[order], weights=values[order], minlength=rows).astype(np.float64)

    originals = np.bincount(groups, minlength=rows)
    means = total(mean_scores.astype(np.float64)) / np.maximum(originals, 1)
    return pa.table(
        {
            "class_id": pa.array(np.repeat(np.arange(len(class_names)), len(split_names)), pa.int32()),
            "class_name": pa.array([name for name in class_names for _ in split_names], pa.string()),
            "split": pa.array(list(split_names) * len(class_names), pa.string()),
            "originals": pa.array(originals, pa.int64()),
            "variants": pa.array(
                originals * np.tile([variants[name] for name in split_names], len(class_names)), pa.int64()
            ),
            "mean_quality": pa.array(means, pa.float64(), mask=originals == 0),
            "passed": pa.array(total(passed).astype(np.int64)),
            "ready": pa.array(total(ready).astype(np.int64)),
        }
    )


def summary_csv(summary: pa.Table) -> bytes:
    """Return a summary as CSV (UTF-8, with a header, quoted where needed)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # pyarrow's quotes every text
    writer.writerow(summary.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in summary.columns), strict=True))
    return text.getvalue().encode()


def _described(field: pa.Field) -> str:
    """Return a column's type with its metadata: 3 × 224² of uint8 and 3 × 112² of float32 are the same bytes."""
    metadata = field.metadata or {}
    return " ".join([str(field.type), *(metadata[key].decode() for key in (TENSOR, ENCODED) if key in metadata)])


def _distinct_ids(class_ids: Mapping[str, int]) -> CheckResult:
    shared = len(class_ids) - len(set(class_ids.values()))
    message = "Every class has an id of its own."
    if shared:
        owners = Counter(class_ids.values())
        names = sorted(name for name, number in class_ids.items() if owners[number] > 1)
        message = f"{plural(len(names), 'class', 'classes')} share an id with another: {', '.join(names[:5])}."
    return rules.at_most("unique", "class_id", shared, (0, 0), message)


def _class_balance(config: ImageAugmentationConfig, counts: Mapping[str, int]) -> CheckResult:
    # A class of earlier versions that is excluded on purpose isn't missing.
    judged = {name: count for name, count in counts.items() if count or not config.classes or name in config.classes}
    share = config.thresholds.balance_warn / max(len(judged), 1)
    check = rules.check_class_balance(CLASS, sorted(judged.items()), share)
    intended = len(judged) > 1 or len(config.classes) == 1  # one class is a mistake unless requested
    return check.model_copy(update={"verdict": "warn"}) if check.verdict == "fail" and intended else check


def _against(
    previous: Manifest,
    config: ImageAugmentationConfig,
    schema: pa.Schema,
    profile: TableProfile,
    class_counts: Mapping[str, int],
) -> list[CheckResult]:
    checks = _compatibility(previous, config, schema)
    warn_above, fail_above = config.thresholds.drift_warn, config.thresholds.drift_fail
    if CLASS in previous.profile:
        before = _images_before(previous)
        if before.distinct == len(before.top_values):  # else the classes of that version aren't known
            checks.append(_same_classes(previous.version, class_counts, before))
        # Counted by image: the variants of one are not independent samples.
        now = _by_image(class_counts)
        checks.append(rules.check_drift(CLASS, now, before, warn_above=warn_above, fail_above=fail_above))
    if SCORE in previous.profile and SCORE in profile.partials:
        checks.append(
            rules.check_drift(SCORE, profile, previous.profile[SCORE], warn_above=warn_above, fail_above=fail_above)
        )
    return checks


def _choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration's settings of the pictures; None for missing ones."""
    augmentation = config.get("augmentation", {})
    found = {name: augmentation.get(name) for name in ("size", "variants")} | {"format": config.get("format")}
    for name in ("mean", "std"):
        values = augmentation.get(name) if config.get("format") == "float32" else None
        found[name] = values and tuple(values)
    return found


def _compatibility(previous: Manifest, config: ImageAugmentationConfig, schema: pa.Schema) -> list[CheckResult]:
    """Check that readers of the last version can read this one."""
    label = {column.name: column.type for column in previous.columns}.get(LABEL)
    now, before = _choices(config.model_dump()), _choices(previous.config)
    changed = [name for name in ("format", "size", "mean", "std") if before[name] != now[name] and before["format"]]
    explained = {IMAGE: bool(changed), LABEL: label is not None}
    results = []
    for check in rules.check_schema(
        {field.name: str(field.type) for field in schema}, {column.name: column.type for column in previous.columns}
    ):
        if check.verdict == "pass" or (changed and check.column == IMAGE):
            continue
        known = check.column is not None and explained.get(check.column, False) and check.column in schema.names
        message = f"{check.message.rstrip('.')}, unlike v{previous.version}."
        if not known:
            message += " Publish it under another name, so that no reader breaks."
        update = {"name": "compatibility", "verdict": "warn" if known else "fail", "message": message}
        results.append(check.model_copy(update=update))
    if changed:
        words = "; ".join(f"{name} is {now[name]} and was {before[name]}" for name in changed)
        message = f"Images are stored otherwise than in v{previous.version}: {words}."
        results.append(
            CheckResult(
                name="compatibility", column=IMAGE, verdict="warn", figure=words, bound="as before", message=message
            )
        )
    message = f"Columns and types are those of v{previous.version}."
    good = CheckResult(
        name="compatibility", verdict="pass", figure=float(len(schema)), bound="as before", message=message
    )
    return results or [good]


def _same_classes(version: int, counts: Mapping[str, int], profile: ColumnProfile) -> CheckResult:
    """Check that the same classes have images as before."""
    now, before = {name for name, count in counts.items() if count}, {name for name, _ in profile.top_values}
    words = [
        f"{plural(len(names), 'class', 'classes')} {what}: {', '.join(sorted(names)[:5])}{', …' * (len(names) > 5)}"
        for what, names in (("appeared", now - before), ("vanished", before - now))
        if names
    ]
    message = f"The classes are those of v{version}."
    if words:
        message = f"Since v{version}, {' and '.join(words)}."
    return CheckResult(
        name="classes",
        column=CLASS,
        verdict="warn" if words else "pass",
        figure=float(len(now)),
        bound="as before",
        message=message,
    )


def _by_image(class_counts: Mapping[str, int]) -> TableProfile:
    names, counts = pa.array(list(class_counts), pa.string()), pa.array(list(class_counts.values()), pa.int64())
    images = sum(class_counts.values())
    return TableProfile(images, {CLASS: ColumnPartial("string", "string", images, 0, top=TopValues.of(names, counts))})


def _images_before(previous: Manifest) -> ColumnProfile:
    """Return an earlier version's profile of classes, by image; without counts, all had equally many variants."""
    images = previous.definition.get("images")
    if images is not None:
        counted = {name: count for name, count in images.items() if count}
        return _by_image(counted).columns()[CLASS].model_copy(update={"distinct": len(counted)})
    profile, variants = previous.profile[CLASS], _choices(previous.config)["variants"] or 1
    top = tuple((value, count // variants) for value, count in profile.top_values)
    return profile.model_copy(
        update={"count": profile.count // variants, "nulls": profile.nulls // variants, "top_values": top}
    )
