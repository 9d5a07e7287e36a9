"""The image-augmentation jobs on Ray: Ray Data augments units of images; near-duplicates are searched in parts.

    plan ─ units ─ augment, write ─ notes ─┬─ near-duplicates ─ groups ─ splits ─ units whose split has changed
                                           └─ originals, profile

Each image is decoded once. Its near-duplicates are known only when all are decoded, so its file may belong to the
wrong split by then: such units are rewritten by copying. Nothing here is visible to readers until the
version is committed.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tasks.engine.cluster import cluster_cpus, losses_explained
from tasks.engine.jobs import Parts, mapped
from tasks.images.augment import ImageJob, augment_again, augment_unit, resplit_unit, unlike_variants
from tasks.images.config import ImageAugmentationConfig
from tasks.images.duplicates import similar_pairs
from tasks.images.outcomes import (
    Gathered,
    Likeness,
    OriginalsFile,
    UnitNote,
    finished_units,
    gather,
    leaking_groups,
    moved_units,
    repeated_keys,
    settle,
    wanted_splits,
    write_originals,
)
from tasks.images.plan import ImagePlan, read_unit, read_units
from tasks.images.rows import rows_schema
from tasks.images.sample import Labels
from tasks.images.sheets import Example, choose_examples
from tasks.images.sources import digest_here, digest_part
from tasks.images.split import SPLITS
from tasks.io import storage
from tasks.io.errors import BalanceError, ConfigError
from tasks.io.memory import released
from tasks.io.tensors import Float32Array, Int8Array, Int32Array, Int64Array
from tasks.quality.rules import Written
from tasks.store import layout
from tasks.store.manifest import FileEntry, RowBalance, check_equal

PARTS_FROM = 200_000
"""Number of images from which the search for near-duplicates is worth dividing."""
NAMED_GROUPS = 1000
SAMPLE, SAMPLE_VARIANTS = 8, 3
"""Images, and variants of each, that a policy makes twice before the run."""
GPU_TOLERANCE = 0.02
"""Share of the values' span: a GPU may sum in another order each time."""

Progress = Callable[[int], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class LikeGroup:
    """Images that share a split because they are related."""

    image_ids: tuple[str, ...]
    split: str


@dataclass(frozen=True, kw_only=True)
class AugmentedImages(Written):
    """Result of augmenting the images, before the commit."""

    side_files: tuple[FileEntry, ...]
    images: int
    variants: int
    originals: OriginalsFile
    class_ids: Int64Array
    """Class of each augmented image; the next two fields have the same order."""
    splits: Int8Array
    sizes: Int32Array
    """Height and width of each augmented image, shape (n, 2)."""
    leaking_groups: int
    duplicate_ids: int
    like_groups: tuple[LikeGroup, ...]
    """The first `NAMED_GROUPS` of them."""
    like_group_count: int
    examples: tuple[Example, ...]
    resumed_units: int
    moved_units: int
    stage_seconds: dict[str, float]
    """Wall time of each stage, summed over all workers."""


def digest_in_tasks(parts: Sequence[pa.Array]) -> Iterator[pa.Array]:
    """Yield the digests of some files, part by part; if there are many, tasks read them.

    Raises:
        ResourceError: memory or disk are too small; it says what to do.
    """
    if len(parts) < 2:
        yield from digest_here(parts)
        return
    with losses_explained("give fewer images"):
        yield from _in_order(digest_part, parts, "look for copies")


def draw_in_tasks(draw: Callable[[range], Labels], numbers: Sequence[range]) -> Iterator[Labels]:
    """Draw the pictures of a sample in tasks; see `write_sample`."""
    with losses_explained("ask for fewer --sample-images"):
        yield from _in_order(draw, numbers, "draw the sample")


def _in_order(function: Callable[[Any], Result], values: Sequence[Any], name: str) -> Iterator[Result]:
    """Yield the results of a function of each value, run in tasks."""

    def run(number: int, value: Any) -> tuple[int, Result]:
        return number, function(value)

    found = dict(mapped(Parts(len(values), values), run, name=name))
    yield from (found[number] for number in range(len(values)))


@released()
def augment_images(
    plan: ImagePlan, config: ImageAugmentationConfig, *, on_images: Progress = lambda _: None
) -> AugmentedImages:
    """Augment all images of a plan, split them, and write everything under the plan's reservation.

    Results of an earlier attempt are reused.

    Args:
        plan: Plan of the run.
        config: Configuration of the run.
        on_images: Called with the number of images done, as they are.

    Raises:
        BalanceError: images were lost or doubled on the way.
        ConfigError: the policy can't be loaded, returns something other than images, or isn't deterministic.
        ResourceError: memory or disk are too small; it says what to do.
    """
    job = ImageJob(
        config=config,
        reservation=plan.reservation,
        plan_uri=plan.uri,
        digests=plan.digests,
        classes=max(plan.classes.values()) + 1,
    )
    started = time.monotonic()
    finished = finished_units(plan)
    on_images(sum(note.images for note in finished.values()))
    todo = [unit for unit in range(plan.units) if unit not in finished]
    if todo:
        check_policy(job)
    made = []
    for note in _augment(job, todo):
        made.append(note)
        on_images(note.images)
    ordered = _each_once(plan, [*finished.values(), *made])
    timings = {"augment and write": time.monotonic() - started}

    started = time.monotonic()
    found, likeness = gather(plan, ordered, read_units(plan.uri, range(plan.units), plan.images_per_unit))
    groups, splits = settle(found, likeness, config, _near_duplicates(found, likeness, config))
    del likeness
    timings["find duplicates and split"] = time.monotonic() - started

    started = time.monotonic()
    moved = moved_units(found, splits, plan.images_per_unit)
    for note in _resplit(job, [ordered[unit] for unit in moved], found, splits):
        ordered[note.unit] = note
    files = {note.unit: note.files for note in ordered}
    timings["move to other splits"] = time.monotonic() - started

    started = time.monotonic()
    _check_files(files, splits, plan, config)
    firsts, counts = np.unique(groups[groups >= 0], return_counts=True)
    companies = firsts[counts > 1]
    names = _names(plan, companies)
    written = write_originals(plan, ordered, groups, splits, names)
    timings["profile"] = time.monotonic() - started
    good = found.augmented
    return AugmentedImages(
        reservation=plan.reservation,
        files=tuple(entry for unit in sorted(files) for entry in files[unit].values()),
        rejected_files=(*plan.rejected_files, *(n.rejected_file for n in ordered if n.rejected_file is not None)),
        side_files=(written.entry,),
        schema=_written_schema(plan, files) or rows_schema(config, job.classes),
        profile=written.profile,
        balances=_balances(plan, ordered),
        images=int(good.sum()),
        variants=sum(int((splits == number).sum()) * config.variants_in(split) for number, split in enumerate(SPLITS)),
        originals=written,
        class_ids=found.class_id[good],
        splits=splits[good],
        sizes=np.stack([found.height[good], found.width[good]], axis=1),
        leaking_groups=leaking_groups(groups, splits),
        duplicate_ids=repeated_keys(found.key),
        like_groups=tuple(_like_groups(plan, groups, splits, companies[:NAMED_GROUPS])),
        like_group_count=len(companies),
        examples=tuple(_examples(plan, found, splits, written.mean_scores, files)),
        resumed_units=len(finished),
        moved_units=len(moved),
        timings=timings,
        stage_seconds=_stage_seconds(ordered),
    )


def check_policy(job: ImageJob) -> None:
    """Make a sample with a user's policy twice, each time in a new process and another order.

    Raises:
        ConfigError: the variants differ.
    """
    policy = job.config.augmentation.policy
    if policy is None:
        return
    sample = read_unit(job.plan_uri, 0, job.config.images_per_file).slice(0, SAMPLE)
    few = job.config.augmentation.model_copy(
        update={"variants": min(job.config.augmentation.variants, SAMPLE_VARIANTS)}
    )
    config = job.config.model_copy(update={"augmentation": few})
    make: Any = _made_apart
    turns = []
    for rows in (sample, sample.take(pa.array(np.arange(sample.num_rows)[::-1]))):
        own_process = {"env_vars": {"POLICY_SAMPLE": uuid.uuid4().hex}}  # no worker has this environment yet
        options = {"num_cpus": 1, "num_gpus": config.num_gpus, "runtime_env": own_process}
        turns.append(make.options(**options).remote(config, job.classes, rows))
    with losses_explained("take smaller images, or another policy"):
        made, again = ray.get(turns)
    unlike = unlike_variants(made, again, GPU_TOLERANCE if config.num_gpus else 0.0)
    if unlike:
        raise ConfigError(
            f"policy = '{policy}' isn't reproducible: {len(unlike)} of {made.num_rows} variants of a sample differ "
            f"when they are made again in another process and order, such as {unlike[0]}; nothing was published. A "
            "variant must follow from its image and the generators of torch, random and numpy.random alone, which are "
            "seeded for each one: use them in the call, in place of generators of its own "
            "(numpy.random.default_rng(), torch.Generator(), random.Random()), the system's randomness (os.urandom, "
            "secrets) and what is kept from one image to the next"
        )


@ray.remote
def _made_apart(config: ImageAugmentationConfig, classes: int, planned: pa.Table) -> pa.Table:
    return augment_again(config, classes, planned)[1]


def _augment(job: ImageJob, units: Sequence[int]) -> Iterator[UnitNote]:
    """Yield notes of the units as they are finished, in any order."""

    def augment(_: int, unit: int) -> UnitNote:
        return augment_unit(job, unit)

    yield from _mapped(augment, "augment images", units, job.config)


def _each_once(plan: ImagePlan, notes: Sequence[UnitNote]) -> list[UnitNote]:
    """Return notes in the units' order: one for each, with all its images."""
    by_unit = {note.unit: note for note in notes}
    check_equal("units of images", plan.units, len(notes), "were planned, of {} there are notes")
    check_equal("units of images", plan.units, len(by_unit), "were planned, {} different ones are done")
    check_equal("images", plan.images, sum(note.images for note in notes), "were planned, {} were looked at")
    return [by_unit[unit] for unit in range(plan.units)]


def _mapped(
    function: Callable[[int, Any], UnitNote], name: str, items: Sequence[Any], config: ImageAugmentationConfig
) -> Iterator[UnitNote]:
    """Run a function on each item, in tasks or actors, by the configuration."""
    if not items:
        return
    actors = min(config.actors or max(1, _places(config)), len(items)) if config.workers == "actors" else None
    with losses_explained(config.less_at_once):
        yield from mapped(Parts(len(items), items), function, name=name, actors=actors, num_gpus=config.num_gpus)


def _places(config: ImageAugmentationConfig) -> int:
    """Return the number of workers that the cluster has room for."""
    if config.num_gpus:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return int(resources.get("GPU", 0) / config.num_gpus)
    return cluster_cpus()


def _near_duplicates(found: Gathered, likeness: Likeness, config: ImageAugmentationConfig) -> list[Int64Array]:
    """Return pairs of near-duplicates among the augmented images, rows of the plan; in parts if there are many."""
    if config.near_duplicates is None:
        return []
    valid = found.augmented & likeness.structured
    arguments = (likeness.hash, likeness.colours, config.near_duplicates)
    if len(found.key) < PARTS_FROM:
        return [similar_pairs(*arguments, valid=valid)]
    count = 2 * cluster_cpus()

    def search(part: int) -> Int64Array:
        return similar_pairs(*arguments, part, count, valid=valid)

    with losses_explained(f"turn the search off with --near-duplicates null (it is {config.near_duplicates})"):
        return list(mapped(Parts(count), search, name="find near-duplicates"))


def _resplit(job: ImageJob, notes: Sequence[UnitNote], found: Gathered, splits: Int8Array) -> list[UnitNote]:
    """Return new notes of the units with images that now belong to another split."""
    per_unit = job.config.images_per_file
    items = [
        (note, wanted_splits(found, splits, slice(note.unit * per_unit, (note.unit + 1) * per_unit))) for note in notes
    ]

    def move(_: int, item: tuple[UnitNote, Any]) -> UnitNote:
        return resplit_unit(job, *item)

    return list(_mapped(move, "move images to their splits", items, job.config))


def _check_files(
    files: Mapping[int, Mapping[str, FileEntry]],
    splits: Int8Array,
    plan: ImagePlan,
    config: ImageAugmentationConfig,
) -> None:
    """Check that each unit's files hold as many rows of each split as its images give."""
    for unit, entries in files.items():
        own = splits[unit * plan.images_per_unit : (unit + 1) * plan.images_per_unit]
        for number, split in enumerate(SPLITS):
            expected = int((own == number).sum()) * config.variants_in(split)
            rows = entries[split].rows if split in entries else 0
            if rows != expected:
                raise BalanceError(f"unit {unit}, split {split}: {expected} variants were made, {rows} were written")


def _written_schema(plan: ImagePlan, files: Mapping[int, Mapping[str, FileEntry]]) -> pa.Schema | None:
    """Return the schema of the first data file, as its readers see it."""
    for unit in sorted(files):
        for entry in files[unit].values():
            with storage.open_input(layout.join(plan.reservation.uri, entry.path)) as source:
                return pq.ParquetFile(source).schema_arrow
    return None


def _balances(plan: ImagePlan, notes: Sequence[UnitNote]) -> tuple[RowBalance, ...]:
    """Return the plan's balances with decoding's rejections, each checked."""
    images, *others = plan.balances
    rejected = Counter(images.rejected)
    for note in notes:
        rejected.update(note.rejected)
    images = images.model_copy(
        update={"rows_out": sum(note.augmented for note in notes), "rejected": dict(sorted(rejected.items()))}
    )
    for balance in (images, *others):
        balance.check()
    return (images, *others)


def _names(plan: ImagePlan, rows: Int64Array) -> dict[int, str]:
    """Return the image ids of some rows of the plan."""
    per_unit = plan.images_per_unit
    names: dict[int, str] = {}
    units = np.unique(rows // per_unit).tolist()
    for unit, planned in zip(units, read_units(plan.uri, units, per_unit), strict=True):
        own = rows[rows // per_unit == unit]
        ids = planned["image_id"].take(pa.array(own - unit * per_unit)).to_pylist()
        names |= dict(zip(own.tolist(), ids, strict=True))
    return names


def _like_groups(
    plan: ImagePlan,
    groups: Int64Array,
    splits: Int8Array,
    firsts: Int64Array,
) -> Iterator[LikeGroup]:
    members = np.flatnonzero(np.isin(groups, firsts))
    names = _names(plan, members)
    for first in firsts.tolist():
        own = members[groups[members] == first]
        yield LikeGroup(image_ids=tuple(names[row] for row in own.tolist()), split=SPLITS[splits[first]])


def _examples(
    plan: ImagePlan,
    found: Gathered,
    splits: Int8Array,
    scores: Float32Array,
    files: Mapping[int, Mapping[str, FileEntry]],
) -> Iterator[Example]:
    good = np.flatnonzero(found.augmented)
    for row in good[choose_examples(found.key[good], found.class_id[good], scores)].tolist():
        unit, place = divmod(row, plan.images_per_unit)
        planned = read_unit(plan.uri, unit, plan.images_per_unit).slice(place, 1).to_pylist()[0]
        split = SPLITS[splits[row]]
        yield Example(
            image_id=planned["image_id"],
            uri=planned["uri"],
            class_name=planned["class_name"],
            split=split,
            file=layout.join(plan.reservation.uri, files[unit][split].path),
        )


def _stage_seconds(notes: Sequence[UnitNote]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for note in notes:
        total.update(note.seconds)
    return dict(total)
