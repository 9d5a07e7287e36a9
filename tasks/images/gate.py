"""The quality gate of a version of augmented images, its summary by class, and its fault tests.

Pure, but for reading the sample. The fault tests run the job's functions on a sample of the version's images:

    files ─ decode ─ rejected ─┐
    figures ─ score ─ profile ─┼─ gate
    contents ─ groups ─ splits ┘

These are the functions of the job. No pixel is read: the sample is of the table of originals, and an image's mean score
takes the place of its variants' scores.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.images.config import ImageAugmentationConfig
from tasks.images.decode import Decoder, Rejection
from tasks.images.engines import Measured, score
from tasks.images.outcomes import grouped, leaking_groups, profile_variants, repeated_keys
from tasks.images.rows import IMAGE, LABEL, rows_schema
from tasks.images.split import SPLITS
from tasks.io import storage
from tasks.io.errors import InputError
from tasks.io.hashing import stable_hash
from tasks.io.tensors import ENCODED, TENSOR, AnyArray, Float64Array, Int64Array
from tasks.io.text import plural
from tasks.quality import faults, rules
from tasks.quality.faults import BAD, DOUBLED, Fault, Faults, Sample, Trial, rarest, sample_rows
from tasks.quality.profile import ColumnPartial, TableProfile
from tasks.quality.rules import Figures
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
    splits: Sequence[str] | AnyArray | pa.Array,
    mean_scores: npt.NDArray[np.floating[Any]],
    passed: npt.NDArray[np.integer[Any]],
    ready: npt.NDArray[np.integer[Any]],
    variants: Mapping[str, int],
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
    unknown = sorted(set(names.tolist()) - set(SPLITS))
    if unknown:
        raise InputError(f"{unknown[0]!r} is no split: they are {', '.join(SPLITS)}")
    codes = np.zeros(len(names), dtype=np.int64)
    for code, name in enumerate(SPLITS):
        codes[names == name] = code
    groups = class_ids.astype(np.int64) * len(SPLITS) + codes
    order = np.lexsort((mean_scores, groups))  # one order of summation, whatever the order of the images
    rows = len(class_names) * len(SPLITS)

    def total(values: AnyArray) -> Float64Array:
        return np.bincount(groups[order], weights=values[order], minlength=rows).astype(np.float64)

    originals = np.bincount(groups, minlength=rows)
    means = total(mean_scores.astype(np.float64)) / np.maximum(originals, 1)
    return pa.table(
        {
            "class_id": pa.array(np.repeat(np.arange(len(class_names)), len(SPLITS)), pa.int32()),
            "class_name": pa.array([name for name in class_names for _ in SPLITS], pa.string()),
            "split": pa.array(list(SPLITS) * len(class_names), pa.string()),
            "originals": pa.array(originals, pa.int64()),
            "variants": pa.array(
                originals * np.tile([variants[name] for name in SPLITS], len(class_names)), pa.int64()
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


_COLUMNS = ("image_id", "content_xxh3", "height", "width", CLASS, "class_id", "split", "alike")
_JUDGED = ("mean_score", "passed", "ready")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows(Sample):
    """A row an image, as in the table of originals; bad: share whose files are empty; lost: share without variants.

    passed, ready: shares of an image's variants, not numbers as there: in another split it has more or fewer of them.
    schema: of the data files. classes: id of each known class.
    """

    schema: pa.Schema
    classes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Trial(Trial[_Rows]):
    balance: str
    """Name of the images' balance."""
    noun: ClassVar[str] = "image"
    splits: ClassVar = ("split", *SPLITS[:2])

    def figures(self, rows: _Rows) -> ImageFigures:
        table, rejected = rows.table, {}
        decoder = Decoder(self.config.max_pixels, self.config.background)
        if rows.bad and isinstance(empty := decoder.decode(b""), Rejection):
            table = faults.lost(table, rows.bad)
            rejected[empty.reason] = rows.table.num_rows - table.num_rows
        counts: dict[str, dict[str, int]] = {name: {} for name in rows.classes}
        pairs = Counter(zip(table[CLASS].to_pylist(), table["split"].to_pylist(), strict=True))
        for (name, split), count in sorted(pairs.items()):
            counts[name][split] = count
        splits = np.array([SPLITS.index(split) for split in table["split"].to_pylist()], np.int8)
        linked = stable_hash(pc.coalesce(table["alike"], table["image_id"])).view(np.int64)
        groups = grouped([], linked, stable_hash(table["content_xxh3"]), np.ones(table.num_rows, np.bool_))
        written = faults.lost(table, rows.lost)
        variants = _variants_of(written, self.config)
        scores = np.repeat(written["mean_score"].to_numpy().astype(np.float32), variants)
        ends = np.cumsum([0, *variants]).astype(np.int32)
        judged = written.append_column("scores", pa.ListArray.from_arrays(pa.array(ends), pa.array(scores)))
        images = RowBalance(name=self.balance, rows_in=rows.table.num_rows, rows_out=table.num_rows, rejected=rejected)
        return ImageFigures(
            schema=rows.schema,
            profile=profile_variants(written, judged, written["split"]),
            balances=(images,),
            variants=int(variants.sum()),
            passed=round(written["passed"].to_numpy() @ variants),
            ready=round(written["ready"].to_numpy() @ variants),
            class_counts=dict.fromkeys(rows.classes, 0) | Counter(table[CLASS].to_pylist()),
            split_counts=counts,
            class_ids=rows.classes,
            leaking_groups=leaking_groups(groups, splits),
            duplicate_ids=repeated_keys(stable_hash(table["image_id"])),
        )

    def faults(self) -> Faults:
        bounds, schema, classes = self.config.thresholds, self.sample.schema, self.sample.classes
        counts = Counter(self.table[CLASS].to_pylist())
        rare, largest = rarest(counts), min(counts, key=lambda name: (-counts[name], name), default="")
        own, most = (pc.equal(self.table[CLASS], name).to_numpy() for name in (rare, largest))
        alike = "There are no two classes."
        alone = "" if rare else alike
        yield self.no_rows()
        yield self.duplicates("unique of image_id")
        yield self.lost_rows("variants")
        yield self.bad_rows("empty files", "the images' files were emptied", self.balance)
        yield self._looking("blank pictures", "black", "invalid", 0.0, 0.0)
        dim = (bounds.constant + bounds.low_contrast) / 2
        yield self._looking("dark pictures", "dark and of low contrast", "ready", bounds.dark / 2, dim)
        words = f"A copy of {DOUBLED:.0%} of the images was put into another split, under another name."
        names = pc.binary_join_element_wise(self.copies["image_id"], "copy", "_")
        copies = faults.with_values(self.copies, ["alike"], None, 1.0)
        yield self.split_overlap(words, "leak", faults.with_column(copies, "image_id", names))
        yield self.no_train_rows()
        words = f"Every image of class {largest} was put into the validation split."
        table = faults.with_values(self.table, ["split"], SPLITS[1], most)
        yield self.fault("uneven split", words, f"stratification of {CLASS}", table=table)
        yield self.rare_class(CLASS, rare, own, own, alone)
        words, table = f"All images of class {rare} were taken away.", faults.lost(self.table, own)
        # With more classes than a profile lists, only the balance has all of them.
        aims = (f"classes of {CLASS}", *([f"class balance of {CLASS}"] if len(counts) > 20 else []))
        yield self.fault("missing class", words, aims, alone, table=table)
        yield self.one_class(CLASS if rare else "", rare, alone)
        halved = pc.divide(self.table["mean_score"], pa.scalar(2, pa.float32()))
        table = faults.with_column(self.table, "mean_score", halved)
        yield self.fault("worse pictures", "Every image's quality score was halved.", f"drift of {SCORE}", table=table)
        yield self.out_of_range("range", "range of class_id", "class_id", len(classes))
        yield self.out_of_range("score range", f"range of {SCORE}", "mean_score", 1.5)
        names = list(classes) if len(classes) > 1 else [""]
        words, alone = f"Class {names[-1]} was given the id of another class.", "" if names[-1] else alike
        shared = {**classes, names[-1]: classes.get(names[0], 0)}
        yield self.fault("shared class id", words, "unique of class_id", alone, classes=shared)
        words, column = f"Column {schema.names[0]} was left out.", f"schema of {schema.names[0]}"
        yield self.fault("schema", words, column, schema=schema.remove(0))
        text = schema.set(schema.get_field_index("class_id"), pa.field("class_id", pa.string()))
        yield self.fault("other type", "Column class_id was made text.", "compatibility of class_id", schema=text)

    def _looking(self, name: str, look: str, aims: str, mean: float, std: float) -> Fault:
        """Return a fault that gives images variants of this light and contrast, judged by the job's rules."""
        one, classes = np.ones(1, np.float32), len(self.sample.classes)
        figures = Measured(mean=one * np.float32(mean), std=one * np.float32(std))
        found = score(figures, one, np.zeros(1, np.int32), classes, self.config.thresholds)
        table = self.table
        for column, values in zip(_JUDGED, (found.score, found.passed, found.ready), strict=True):
            table = faults.with_values(table, [column], float(values[0]), BAD)
        return self.fault(name, f"The variants of {BAD:.0%} of the images were made {look}.", aims, table=table)


def trial(root: str, manifest: Manifest, config: ImageAugmentationConfig, previous: Manifest | None) -> Trial[_Rows]:
    """Sample a version's images; drift, classes and columns are compared with the sample as it is.

    Raises:
        InputError: the version has no table of originals.
    """
    originals = [manifest.uri(root, file.path) for file in manifest.side_files if file.path.startswith("_originals/")]
    if not originals:
        raise InputError(f"{manifest} has no table of originals: publish it anew")
    table = sample_rows(originals, [*_COLUMNS, *_JUDGED], "image_id")
    classes: Mapping[str, int] = manifest.definition["classes"]
    schema = rows_schema(config, max(len(classes), 1))
    if manifest.files:
        with storage.open_input(manifest.uri(root, manifest.files[0].path)) as source:
            schema = pq.ParquetFile(source).schema_arrow
    for name in ("passed", "ready"):
        table = faults.with_column(table, name, pa.array(table[name].to_numpy() / _variants_of(table, config)))
    before = previous or manifest
    definition = {**before.definition, "images": dict(Counter(table[CLASS].to_pylist()))}
    return _Trial(
        sample=_Rows(table=table, schema=schema, classes=classes),
        features=(),
        before=before.model_copy(update={"config": manifest.config, "definition": definition}),
        config=config,
        gate=judge_images,
        balance=manifest.balances[0].name,
    )


def _variants_of(table: pa.Table, config: ImageAugmentationConfig) -> Int64Array:
    """Return the number of each image's variants."""
    counts = {split: config.variants_in(split) for split in SPLITS}
    return np.array([counts[split] for split in table["split"].to_pylist()], np.int64)
