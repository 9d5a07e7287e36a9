"""Fault tests of augmented images, in a sample of the version's images. Pure, but for the reading.

    files ─ decode ─ rejected ─┐
    figures ─ score ─ profile ─┼─ gate
    contents ─ groups ─ splits ┘

These are the functions of the job. No pixel is read: the sample is of the table of originals, and an image's mean score
takes the place of its variants' scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.images.config import ImageAugmentationConfig
from tasks.images.decode import Decoder, Rejection
from tasks.images.gate import CLASS, SCORE, ImageFigures, judge_images
from tasks.images.outcomes import grouped, leaking_groups, profile_variants, repeated_keys
from tasks.images.rows import rows_schema
from tasks.images.scoring import Measured, score
from tasks.images.split import SPLITS
from tasks.io import storage
from tasks.io.errors import InputError
from tasks.io.hashing import stable_hash
from tasks.quality import faults
from tasks.quality.faults import BAD, DOUBLED, Fault, Faults, Sample, Trial, rarest, sample_rows
from tasks.store import layout
from tasks.store.manifest import Manifest, RowBalance

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
    uri = layout.version_uri(root, manifest.dataset, manifest.version)
    originals = [layout.join(uri, file.path) for file in manifest.side_files if file.path.startswith("_originals/")]
    if not originals:
        raise InputError(f"{manifest.dataset} v{manifest.version} has no table of originals: publish it anew")
    table = sample_rows(originals, [*_COLUMNS, *_JUDGED], "image_id")
    classes: Mapping[str, int] = manifest.definition["classes"]
    schema = rows_schema(config, max(len(classes), 1))
    if manifest.files:
        with storage.open_input(layout.join(uri, manifest.files[0].path)) as source:
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


def _variants_of(table: pa.Table, config: ImageAugmentationConfig) -> npt.NDArray[np.int64]:
    """Return the number of each image's variants."""
    counts = {split: config.variants_in(split) for split in SPLITS}
    return np.array([counts[split] for split in table["split"].to_pylist()], np.int64)
