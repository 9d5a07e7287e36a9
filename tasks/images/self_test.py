"""The faults that the images' gate is shown, in a sample of the version's own images. Pure, but for the reading.

    files ─ decode ─ rejected ─┐
    figures ─ score ─ profile ─┼─ gate
    contents ─ groups ─ splits ┘

These are the functions of the job. No pixel is read: the sample is of the table of originals, whose mean score stands
for each of an image's variants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.core import injection, layout, storage
from tasks.core.errors import InputError
from tasks.core.hashing import stable_hash
from tasks.core.injection import DOUBLED, LOST, ODD
from tasks.core.manifest import FaultResult, GateResult, Manifest, RowBalance
from tasks.core.profile import TableProfile
from tasks.core.sampling import sample_rows
from tasks.core.self_test import Fault, as_previous, inject
from tasks.images.config import ImageAugmentationConfig
from tasks.images.decode import Decoder, Rejection
from tasks.images.gate import CLASS, SCORE, judge_images
from tasks.images.originals import grouped, leaking_groups, profile_variants, repeated_keys
from tasks.images.rows import rows_schema
from tasks.images.scoring import Measured, score
from tasks.images.split import SPLITS

BAD, ONE_CLASS = 0.4, 0.9
_COLUMNS = ("image_id", "content_xxh3", "height", "width", CLASS, "class_id", "split", "alike")
_JUDGED = ("mean_score", "passed", "ready")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What a fault changes. table: a row an image, as in the table of originals; schema: of the data files.

    passed, ready: shares of an image's variants, not numbers as there: in another split it has more or fewer of them.
    empty: share of the images whose files are empty. lost: share whose variants get lost before they are written.
    """

    table: pa.Table
    schema: pa.Schema
    empty: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    config: ImageAugmentationConfig
    classes: Mapping[str, int]
    name: str
    """Of the images' balance."""
    previous: Manifest | None

    def judge(self, rows: _Rows) -> GateResult:
        """Judge some images as the job does."""
        table, rejected = self._decoded(rows)
        written = injection.lost(table, rows.lost) if rows.lost else table
        variants = self.variants(written)
        counts = self._split_counts(table)
        splits = np.array([SPLITS.index(split) for split in table["split"].to_pylist()], np.int8)
        everything = np.ones(table.num_rows, np.bool_)
        linked = stable_hash(pc.coalesce(table["alike"], table["image_id"])).view(np.int64)
        groups = grouped([], linked, stable_hash(table["content_xxh3"]), everything)
        images = RowBalance(
            name=self.name,
            rows_in=rows.table.num_rows,
            rows_out=table.num_rows,
            rejected=dict(sorted(rejected.items())),
        )
        return judge_images(
            self.config,
            schema=rows.schema,
            profile=self.profile(written),
            balances=(images,),
            variants=int(variants.sum()),
            passed=round(written["passed"].to_numpy() @ variants),
            ready=round(written["ready"].to_numpy() @ variants),
            class_counts={name: sum(by_split.values()) for name, by_split in counts.items()},
            split_counts=counts,
            class_ids=self.classes,
            leaking_groups=leaking_groups(groups, splits),
            duplicate_ids=repeated_keys(stable_hash(table["image_id"])),
            previous=self.previous,
        )

    def profile(self, table: pa.Table) -> TableProfile:
        """Profile of the variants' rows."""
        variants = self.variants(table)
        scores = np.repeat(table["mean_score"].to_numpy().astype(np.float32), variants)
        offsets = np.concatenate([[0], np.cumsum(variants)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(scores))
        judged = pa.table({"scores": pa.chunked_array([lists]), "height": table["height"], "width": table["width"]})
        return profile_variants(table, judged, table["split"])

    def variants(self, table: pa.Table) -> npt.NDArray[np.int64]:
        """Variants of each image."""
        counts = {split: self.config.variants_in(split) for split in SPLITS}
        return np.array([counts[split] for split in table["split"].to_pylist()], np.int64)

    def _decoded(self, rows: _Rows) -> tuple[pa.Table, Counter[str]]:
        """The images that can be decoded, and why the others can't."""
        rejected: Counter[str] = Counter()
        if not rows.empty:
            return rows.table, rejected
        hit = injection.some(rows.table.num_rows, rows.empty)
        bad = hit.copy()
        decoder = Decoder(self.config.max_pixels, self.config.background)
        for row in np.flatnonzero(hit).tolist():
            found = decoder.decode(b"")
            bad[row] = isinstance(found, Rejection)
            if isinstance(found, Rejection):
                rejected[found.reason] += 1
        return rows.table.filter(pa.array(~bad)), rejected

    def _split_counts(self, table: pa.Table) -> dict[str, dict[str, int]]:
        """Images by class, then split; a known class without any stands there with nothing."""
        counts: dict[str, dict[str, int]] = {name: {} for name in self.classes}
        pairs = Counter(zip(table[CLASS].to_pylist(), table["split"].to_pylist(), strict=True))
        for (name, split), count in sorted(pairs.items()):
            counts[name][split] = count
        return counts


def self_test(
    root: str, manifest: Manifest, config: ImageAugmentationConfig, previous: Manifest | None
) -> tuple[FaultResult, ...]:
    """Inject faults into a sample of a version's images, and judge each.

    Drift, classes and columns are compared with the sample as it is.

    Args:
        root: Root of the store.
        manifest: The version's; it need not be committed.
        config: Thresholds and choices.
        previous: Manifest of the last published version, if there is one.

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
    trial = _Trial(config=config, classes=classes, name=manifest.balances[0].name, previous=None)
    variants = trial.variants(table)
    for name in ("passed", "ready"):
        table = injection.with_column(table, name, pa.array(table[name].to_numpy() / variants, pa.float64()))
    rows = _Rows(table=table, schema=schema)
    before = as_previous(previous or manifest, schema, trial.profile(table))
    definition = {**before.definition, "images": dict(Counter(table[CLASS].to_pylist()))}
    trial = replace(trial, previous=before.model_copy(update={"config": manifest.config, "definition": definition}))
    return inject(trial.judge(rows), list(_faults(trial, rows)))


def _faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    yield from _row_faults(trial, rows)
    yield from _picture_faults(trial, rows)
    yield from _split_faults(trial, rows)
    yield from _class_faults(trial, rows)
    yield from _column_faults(trial, rows)


def _row_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Images that are missing or twice."""
    judged = _judging(trial, rows)
    yield Fault(
        name="no rows",
        injected="Every image was taken away.",
        aims=("rows",),
        judge=judged(lambda r: replace(r, table=r.table.slice(0, 0))),
    )
    yield Fault(
        name="duplicates",
        injected=f"{DOUBLED:.0%} of the images were put in twice, with the same id.",
        aims=("unique of image_id",),
        judge=judged(lambda r: replace(r, table=injection.doubled(r.table))),
    )
    yield Fault(
        name="lost rows",
        injected=f"The variants of {LOST:.0%} of the images were lost before they were written.",
        aims=("balance of variants",),
        judge=judged(lambda r: replace(r, lost=LOST)),
    )


def _picture_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Pictures that can't be decoded, or that show nothing."""
    judged, bounds = _judging(trial, rows), trial.config.thresholds
    yield Fault(
        name="empty files",
        injected=f"The files of {BAD:.0%} of the images were emptied.",
        aims=(f"rejected of {trial.name}",),
        judge=judged(lambda r: replace(r, empty=BAD)),
    )
    yield Fault(
        name="blank pictures",
        injected=f"The variants of {BAD:.0%} of the images were made black.",
        aims=("invalid",),
        judge=judged(lambda r: replace(r, table=_scored(r.table, trial, mean=0.0, std=0.0))),
    )
    dim = (bounds.constant + bounds.low_contrast) / 2
    yield Fault(
        name="dark pictures",
        injected=f"The variants of {BAD:.0%} of the images were made dark and of low contrast.",
        aims=("ready",),
        judge=judged(lambda r: replace(r, table=_scored(r.table, trial, mean=bounds.dark / 2, std=dim))),
    )


def _split_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Images in a split where they don't belong."""
    judged = _judging(trial, rows)
    counts = Counter(rows.table[CLASS].to_pylist())
    largest = min(counts, key=lambda name: (-counts[name], name)) if counts else ""
    yield Fault(
        name="split overlap",
        injected=f"A copy of {DOUBLED:.0%} of the images was put into another split, under another name.",
        aims=("leak",),
        judge=judged(lambda r: replace(r, table=_overlapping(r.table))),
    )
    yield Fault(
        name="no train rows",
        injected="Every image was put into the validation split.",
        aims=("split of train",),
        judge=judged(lambda r: replace(r, table=_in_split(r.table, SPLITS[1]))),
    )
    yield Fault(
        name="uneven split",
        injected=f"Every image of class {largest} was put into the validation split.",
        aims=(f"stratification of {CLASS}",),
        judge=judged(lambda r: replace(r, table=_class_in_split(r.table, largest, SPLITS[1]))),
    )


def _class_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Classes that are missing, rare, or that take the place of others."""
    judged, table = _judging(trial, rows), rows.table
    counts = Counter(table[CLASS].to_pylist())
    rarest = min(counts, key=lambda name: (counts[name], name)) if len(counts) > 1 else ""
    why = "There are no two classes."
    yield Fault(
        name="rare class",
        injected=f"All images but one of class {rarest} were taken away.",
        aims=(f"class balance of {CLASS}",),
        judge=judged(lambda r: replace(r, table=_without(r.table, rarest, keep=1))) if rarest else None,
        why_not=why,
    )
    yield Fault(
        name="missing class",
        injected=f"All images of class {rarest} were taken away.",
        # Of more classes than a profile lists, only the balance knows which there were.
        aims=(f"classes of {CLASS}", *([f"class balance of {CLASS}"] if len(counts) > 20 else [])),
        judge=judged(lambda r: replace(r, table=_without(r.table, rarest))) if rarest else None,
        why_not=why,
    )
    yield Fault(
        name="shift",
        injected=f"{ONE_CLASS:.0%} of the images were given class {rarest}.",
        aims=(f"drift of {CLASS}",),
        judge=judged(lambda r: replace(r, table=injection.with_values(r.table, CLASS, rarest, ONE_CLASS)))
        if rarest
        else None,
        why_not=why,
    )
    yield Fault(
        name="worse pictures",
        injected="The quality score of every image was halved.",
        aims=(f"drift of {SCORE}",),
        judge=judged(lambda r: replace(r, table=_halved(r.table))),
    )


def _column_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Values and columns that can't be."""
    judged = _judging(trial, rows)
    beyond = len(trial.classes)
    yield Fault(
        name="range",
        injected=f"{ODD:.0%} of the images were given class id {beyond}, which is no class's.",
        aims=("range of class_id",),
        judge=judged(lambda r: replace(r, table=injection.with_values(r.table, "class_id", beyond))),
    )
    yield Fault(
        name="score range",
        injected=f"{ODD:.0%} of the images were given a quality score of 1.5.",
        aims=(f"range of {SCORE}",),
        judge=judged(lambda r: replace(r, table=injection.with_values(r.table, "mean_score", 1.5))),
    )
    names = list(trial.classes)
    shared = {names[-1]: trial.classes[names[0]]} if len(names) > 1 else {}
    yield Fault(
        name="shared class id",
        injected=f"Class {', '.join(shared)} was given the id of another class.",
        aims=("unique of class_id",),
        judge=(lambda: replace(trial, classes={**trial.classes, **shared}).judge(rows)) if shared else None,
        why_not="There are no two classes.",
    )
    column = rows.schema.names[0]
    yield Fault(
        name="schema",
        injected=f"Column {column} was left out.",
        aims=(f"schema of {column}",),
        judge=judged(lambda r: replace(r, schema=r.schema.remove(0))),
    )
    place = rows.schema.get_field_index("class_id")
    yield Fault(
        name="other type",
        injected="Column class_id was made text.",
        aims=("compatibility of class_id",),
        judge=judged(lambda r: replace(r, schema=r.schema.set(place, pa.field("class_id", pa.string())))),
    )


def _judging(trial: _Trial, rows: _Rows) -> Callable[[Callable[[_Rows], _Rows]], Callable[[], GateResult]]:
    return lambda change: lambda: trial.judge(change(rows))


def _scored(table: pa.Table, trial: _Trial, mean: float, std: float) -> pa.Table:
    """The images, a share of them with variants of this light and contrast, judged as the job judges them."""
    hit = injection.some(table.num_rows, BAD)
    ones = np.ones(int(hit.sum()), np.float32)
    class_ids = table["class_id"].to_numpy()[hit]
    found = score(
        Measured(mean=ones * np.float32(mean), std=ones * np.float32(std)),
        ones,
        class_ids,
        len(trial.classes),
        trial.config.thresholds,
    )
    for name, values in {"mean_score": found.score, "passed": found.passed, "ready": found.ready}.items():
        column = table[name].to_numpy().copy()
        column[hit] = values
        table = injection.with_column(table, name, pa.array(column, table.schema.field(name).type))
    return table


def _overlapping(table: pa.Table) -> pa.Table:
    """Some images once more, under other names: the copies in validation, and the others in train."""
    copies = table.filter(pa.array(injection.some(table.num_rows, DOUBLED)))
    names = pc.binary_join_element_wise(copies["image_id"], "copy", "_")
    copies = injection.with_column(
        injection.with_column(copies, "image_id", names), "alike", pa.nulls(len(names), pa.string())
    )
    return pa.concat_tables([_in_split(table, SPLITS[0]), _in_split(copies, SPLITS[1])])


def _in_split(table: pa.Table, split: str) -> pa.Table:
    return injection.with_column(table, "split", pa.array([split] * table.num_rows, pa.string()))


def _class_in_split(table: pa.Table, name: str, split: str) -> pa.Table:
    moved = pc.if_else(pc.equal(table[CLASS], name), split, table["split"])
    return injection.with_column(table, "split", moved)


def _without(table: pa.Table, name: str, keep: int = 0) -> pa.Table:
    stay = pc.not_equal(table[CLASS], name).to_numpy(zero_copy_only=False).copy()
    stay[np.flatnonzero(~stay)[:keep]] = True
    return table.filter(pa.array(stay))


def _halved(table: pa.Table) -> pa.Table:
    scores = table["mean_score"].to_numpy() / 2
    return injection.with_column(table, "mean_score", pa.array(scores, table.schema.field("mean_score").type))
