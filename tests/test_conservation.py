"""The conservation law: whoever loses, doubles or hides a row in any job fails the run, with the figures.

Each job is sabotaged in a worker, in ways that its own counts agree with: only a second count can tell.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tasks.delivery import definition
from tasks.delivery import pipeline as delivery
from tasks.delivery.shuffle import Look, Shuffle
from tasks.delivery.source import find_source
from tasks.engine.jobs import mapped
from tasks.features import pipeline as features
from tasks.features.config import FeatureStoreConfig
from tasks.features.plan import plan_features, with_uris
from tasks.features.shuffle import Job
from tasks.features.standard import SAMPLE_AS_OF, STANDARD, write_sample
from tasks.features.writer import WrittenPart, write_part
from tasks.images import pipeline as images
from tasks.images.augment import augment_unit
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.outcomes import UnitNote
from tasks.images.plan import plan_images
from tasks.images.sample import write_sample as write_images
from tasks.io import storage
from tasks.io.errors import BalanceError
from tasks.store import layout
from tasks.store.manifest import FileEntry, RowBalance
from tasks.store.reservation import reserve
from tasks.store.versions import check_written
from tasks.training_sets import pipeline as serving
from tasks.training_sets.definition import SpineSource
from tasks.training_sets.plan import plan_training_set
from tasks.training_sets.shuffle import Job as JoinJob
from tests.delivery.sources import configured, publish_customers
from tests.training_sets.test_pipeline import STARTED, config, model, publish_history, spine, written

pytestmark = pytest.mark.usefixtures("ray_cluster")

FIGURES = re.compile(r"\d+ .*[+-]\d+ unaccounted for")


def shorter(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """Frames, of which the first that has rows lacks one."""
    found = next(number for number, frame in enumerate(frames) if frame.height)
    return [frame.slice(1) if number == found else frame for number, frame in enumerate(frames)]


def shorter_of(frames: Mapping[int, pl.DataFrame]) -> dict[int, pl.DataFrame]:
    return dict(zip(frames, shorter(list(frames.values())), strict=True))


class LosesOnSending(Job):
    def scatter(self, index: int) -> Any:
        note, frames = super().scatter(index)
        return note, shorter(frames) if index == 0 else frames


class DoublesOnSending(Job):
    def scatter(self, index: int) -> Any:
        note, frames = super().scatter(index)
        return note, [pl.concat([frame, frame.head(1)]) for frame in frames] if index == 0 else frames


class LosesOnTaking(Job):
    def gather(self, slot: int, frames: Mapping[int, pl.DataFrame]) -> Any:
        return super().gather(slot, shorter_of(frames) if slot == 0 else frames)


class LosesFeatures(Job):
    def gather(self, slot: int, frames: Mapping[int, pl.DataFrame]) -> Any:
        summary, table = super().gather(slot, frames)
        return summary, table.slice(1) if slot == 0 else table


class HidesWhatItRead(Job):
    """Sends one row less and says that it never read it."""

    def scatter(self, index: int) -> Any:
        note, frames = super().scatter(index)
        if index == 0:
            note.tally.rows_in -= 1
            note.tally.rows_out -= 1
            whole = [frames[: self.buckets], frames[self.buckets :]]
            frames = [frame for own in whole for frame in (shorter(own) if own else own)]
        return note, frames


class ForgetsAUnit(Job):
    def scatter(self, index: int) -> Any:
        note, frames = super().scatter(index)
        if index == 0:
            note.tally.rows_in = note.tally.rows_out = 0
            note.tally.rejected.clear()
            note.tally.filtered.clear()
            frames = [frame.clear() for frame in frames]
        return note, frames


def loses_on_writing(table: pa.Table, part: int, **more: Any) -> WrittenPart:
    return write_part(table.slice(1) if part == 0 else table, part, **more)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_sample(str(tmp_path_factory.mktemp("shop")), 5_000, 0)


def compute(shop: dict[str, str], root: Path) -> list[Any]:
    config = FeatureStoreConfig(root=str(root), rows_per_bucket=1_000, **shop)
    (plan,) = plan_features(with_uris(STANDARD, config), config, (SAMPLE_AS_OF,))
    reservations = [reserve(str(root), planned.group.name, "run") for planned in plan.groups]
    return features.compute_groups(plan, config, reservations, SAMPLE_AS_OF)


@pytest.mark.parametrize(
    ("name", "saboteur", "message"),
    [
        ("Job", LosesOnSending, "were sent to their buckets"),
        ("Job", DoublesOnSending, "were sent to their buckets"),
        ("Job", LosesOnTaking, "were taken there"),
        ("Job", LosesFeatures, "were handed on"),
        ("Job", HidesWhatItRead, "stand in the files"),
        ("Job", ForgetsAUnit, "stand in the files"),
        ("write_part", loses_on_writing, "were written"),
    ],
)
def test_the_feature_job(  # noqa: PLR0917 - parameters of pytest
    shop: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    saboteur: Any,
    message: str,
) -> None:
    monkeypatch.setattr(features, name, saboteur)
    with pytest.raises(BalanceError, match=message) as caught:
        compute(shop, tmp_path)
    assert FIGURES.search(str(caught.value)), caught.value


def test_a_dimension_that_is_looked_up_is_balanced_too(shop: dict[str, str], tmp_path: Path) -> None:
    """Customers' features use the products' categories: a product that is rejected must not vanish unseen."""
    products = pl.read_parquet(shop["products"])
    flawed = pl.concat([products, products.head(3), products.head(2).with_columns(category=pl.lit("other"))])
    flawed = pl.concat([flawed, products.head(4).with_columns(product_id=pl.lit(None, products["product_id"].dtype))])
    uri = str(tmp_path / "products.parquet")
    flawed.write_parquet(uri)
    groups = {group.reservation.dataset: group for group in compute({**shop, "products": uri}, tmp_path)}
    customers = groups["customer-features"]
    balances = {balance.name: balance for balance in customers.balances}
    assert (balances["products"].rows_in, balances["products"].rows_out) == (flawed.height, products.height)
    assert balances["products"].deduplicated == 3
    assert balances["products"].rejected == {"conflicting_product_id": 2, "null_product_id": 4}
    kept = [entry for entry in customers.rejected_files if entry.path.startswith("_rejected/products")]
    assert sum(entry.rows for entry in kept) == 6
    for group in groups.values():
        uri = group.reservation.uri
        check_written(group.reservation.dataset, uri, group.files, group.rejected_files, group.balances)


class JoinLosesOnSending(JoinJob):
    def scatter(self, buckets: int, index: int) -> Any:
        note, frames = super().scatter(buckets, index)
        return note, shorter(frames) if index == 0 else frames


class JoinLosesOnTaking(JoinJob):
    def gather(self, number: int, buckets: int, index: int, frames: Mapping[int, pl.DataFrame]) -> Any:
        return super().gather(number, buckets, index, shorter_of(frames) if index == 0 else frames)


class JoinLosesOnWriting(JoinJob):
    def write(self, table: pa.Table, part: int) -> FileEntry:
        return super().write(table.slice(1) if part == 0 else table, part)


class JoinForgetsAUnit(JoinJob):
    def _read(self, index: int) -> Any:
        kept, note = super()._read(index)
        if index == 0:
            kept = kept.clear()
            note.tally.rows_in = note.tally.rows_out = 0
            note.tally.rejected.clear()
            note.tally.filtered.clear()
        return kept, note


@pytest.mark.parametrize(
    ("saboteur", "message"),
    [
        (JoinLosesOnSending, "were sent to their buckets"),
        (JoinLosesOnTaking, "were taken there"),
        (JoinLosesOnWriting, "unaccounted for"),
        (JoinForgetsAUnit, "stand in the files"),
    ],
)
def test_the_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saboteur: Any, message: str) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    declared = model(SpineSource(uri=written(spine(600), tmp_path)), "customer-features:*")
    planned = plan_training_set(declared, STANDARD, config(root), STARTED)
    monkeypatch.setattr(serving, "Job", saboteur)
    reservation = reserve(root, layout.training_ready_dataset("churn"), "run")
    with pytest.raises(BalanceError, match=message):
        serving.build_training_set(planned, reservation)


def loses_an_image(job: Any, unit: int) -> UnitNote:
    note = augment_unit(job, unit)
    return dataclasses.replace(note, images=note.images - 1, augmented=note.augmented - 1) if unit == 0 else note


def loses_rows(job: Any, unit: int) -> UnitNote:
    note = augment_unit(job, unit)
    short = {split: entry.model_copy(update={"rows": entry.rows - 1}) for split, entry in note.files.items()}
    return dataclasses.replace(note, files=short) if unit == 0 else note


def forgets_a_unit(*given: Any, **options: Any) -> Iterator[UnitNote]:
    return (note for note in mapped(*given, **options) if note.unit)


def does_a_unit_twice(*given: Any, **options: Any) -> Iterator[UnitNote]:
    return (note for note in mapped(*given, **options) for _ in range(1 if note.unit else 2))


@pytest.mark.parametrize(
    ("name", "saboteur", "message"),
    [
        ("mapped", forgets_a_unit, "units of images: 3 were planned, of 2 there are notes"),
        ("mapped", does_a_unit_twice, "units of images: 3 were planned, of 4 there are notes"),
        ("augment_unit", loses_an_image, r"images: \d+ were planned, \d+ were looked at: \+1 unaccounted for"),
        ("augment_unit", loses_rows, r"unit 0, split \w+: \d+ variants were made, \d+ were written"),
    ],
)
def test_the_image_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, saboteur: Any, message: str) -> None:
    sample = write_images(str(tmp_path / "sample"), 40, 0)
    settings = {"augmentation": Augmentation(size=16, variants=1), "images_per_file": 16}
    config = ImageAugmentationConfig(root=str(tmp_path), **sample, **settings)
    plan = plan_images(config, reserve(str(tmp_path), layout.image_dataset("images"), "run"), None)
    monkeypatch.setattr(images, name, saboteur)
    with pytest.raises(BalanceError, match=message):
        images.augment_images(plan, config)


class LooksPast(Look):
    """Leaves a sample's key out of what is checked."""

    def scatter(self, index: int) -> Any:
        note, frames = super().scatter(index)
        return note, [*shorter(frames[: self.parts]), *frames[self.parts :]] if index == 0 else frames


class ForgetsRows(Look):
    """Says that it read one row less, and that there was one sample less."""

    def scatter(self, index: int) -> Any:
        note, frames = super().scatter(index)
        if index == 0:
            note.rows -= 1
            note.samples = note.samples - np.array([1, 0, 0])
            frames = [*shorter(frames[: self.parts]), *frames[self.parts :]]
        return note, frames


class LosesSamples(Shuffle):
    def gather(self, number: int, frames: Mapping[int, pa.Table]) -> Any:
        first = next((unit for unit, frame in frames.items() if len(frame)), None) if number == 0 else None
        return super().gather(number, {unit: frame.slice(unit == first) for unit, frame in frames.items()})


@pytest.mark.parametrize(
    ("module", "name", "saboteur", "message"),
    [
        (delivery, "Look", LooksPast, r"\d+ became samples, \d+ had their keys checked: \+1 unaccounted for"),
        (delivery, "Look", ForgetsRows, r"has 900 rows, 899 were read"),
        (definition, "Shuffle", LosesSamples, r"unaccounted for"),
    ],
)
def test_the_delivery_job(  # noqa: PLR0917 - parameters of pytest
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, saboteur: Any, message: str
) -> None:
    root = str(tmp_path)
    publish_customers(root)
    config = configured(root)
    monkeypatch.setattr(module, name, saboteur)
    reservation = reserve(root, layout.streaming_dataset(config.dataset_name), "run")
    with pytest.raises(BalanceError, match=message):
        delivery.write_streaming_ready(config, find_source(config), reservation)


@pytest.fixture
def stored(root: str) -> tuple[str, FileEntry, FileEntry]:
    """The directory of a version, with a file of ten rows and one of three rejected rows."""
    uri = layout.join(root, "v1")
    entries = []
    for path, rows in (("part-00000-a1.parquet", 10), ("_rejected/x-00000-a1.parquet", 3)):
        made = storage.write_parquet(pa.table({"id": range(rows)}), layout.join(uri, path))
        entries.append(FileEntry(path=path, rows=rows, bytes=made.bytes, digest=made.digest))
    return uri, *entries


Change = Callable[[FileEntry], FileEntry]


@pytest.mark.parametrize(
    ("data", "rejected", "balance", "message"),
    [
        (11, 3, {"bad": 3}, r"part-00000-a1.parquet: 11 were reported as written, the file holds 10: \+1"),
        (10, 2, {"bad": 2}, r"_rejected/x-00000-a1.parquet: 2 were reported as written, the file holds 3: -1"),
        (10, 3, {"bad": 2, "worse": 2}, r"4 were rejected, _rejected/ holds 3: \+1"),
        (10, 3, {}, r"0 were rejected, _rejected/ holds 3: -3"),
    ],
)
def test_a_version_holds_what_was_reported(
    stored: tuple[str, FileEntry, FileEntry], data: int, rejected: int, balance: dict[str, int], message: str
) -> None:
    uri, file, left_out = stored

    def check(rows: int, rejected_rows: int, reasons: dict[str, int]) -> None:
        balanced = RowBalance(name="x", rows_in=10 + sum(reasons.values()), rows_out=10, rejected=reasons)
        files = [entry.model_copy(update={"rows": count}) for entry, count in ((file, rows), (left_out, rejected_rows))]
        check_written("d", uri, files[:1], files[1:], [balanced])

    check(10, 3, {"bad": 3})
    with pytest.raises(BalanceError, match=message):
        check(data, rejected, balance)


def test_a_balance_that_does_not_add_up_is_no_version(stored: tuple[str, FileEntry, FileEntry]) -> None:
    uri, file, _ = stored
    with pytest.raises(BalanceError, match=r"12 in, 10 out, .*: \+2 unaccounted for"):
        check_written("d", uri, [file], [], [RowBalance(name="x", rows_in=12, rows_out=10)])
