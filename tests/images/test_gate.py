"""Every check of the gate can fail, and none fails on good data; the summary counts each image once."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images.config import Augmentation, ImageAugmentationConfig, ImageThresholds
from tasks.images.gate import ImageFigures, class_summary, judge_images, split_shares, summary_csv
from tasks.images.rows import rows_schema
from tasks.images.split import SPLITS
from tasks.io.errors import InputError
from tasks.quality.profile import profile_table
from tasks.store.manifest import ColumnSpec, GateResult, Manifest, RowBalance
from tests.gates import of, one_check, passes_every_check
from tests.manifests import manifest

SIZE, VARIANTS = 16, 2
CLASSES = {"bee": 100, "cat": 150, "dog": 250}
IMAGES = sum(CLASSES.values())
ROWS = VARIANTS * IMAGES


def configured(size: int = SIZE, form: str = "uint8", **changes: Any) -> ImageAugmentationConfig:
    augmentation = Augmentation(size=size, variants=changes.pop("variants", VARIANTS))
    changes = {"evaluation": "augmented", **changes}
    thresholds = {name: changes.pop(name) for name in list(changes) if name in ImageThresholds.model_fields}
    return ImageAugmentationConfig(
        augmentation=augmentation, format=form, thresholds=ImageThresholds(**thresholds), **changes
    )


def split(counts: Mapping[str, int], validation: float = 0.2) -> dict[str, dict[str, int]]:
    found = {}
    for name, count in counts.items():
        kept = round(count * validation)
        found[name] = {"train": count - kept, "validation": kept}
    return found


def data(
    counts: Mapping[str, int] = CLASSES, variants: int = VARIANTS, scores: float = 1.0, low: float = 0.1, **changes: Any
) -> pa.Table:
    """The columns that are profiled; a share of `low` has a score of 0.75."""
    names = [name for name, count in counts.items() for _ in range(count * variants)]
    ids = [index for index, count in enumerate(counts.values()) for _ in range(count * variants)]
    score = np.where(np.arange(len(names)) % 100 < 100 * low, 0.75, scores)
    columns = {
        "class_id": pa.array(ids, pa.int32()),
        "class_name": pa.array(names, pa.string()),
        "data_quality_score": pa.array(score, pa.float32()),
        "is_training_ready": pa.array([True] * len(names)),
    }
    return pa.table(columns | changes)


IMAGES_IN = RowBalance(name="images", rows_in=IMAGES + 2, rows_out=IMAGES, rejected={"unreadable": 2})


def judge(
    counts: Mapping[str, int] = CLASSES,
    config: ImageAugmentationConfig | None = None,
    table: pa.Table | None = None,
    previous: Manifest | None = None,
    **changes: Any,
) -> GateResult:
    config = config or configured()
    variants = config.augmentation.variants
    rows = sum(counts.values()) * variants
    table = data(counts, variants) if table is None else table
    figures: dict[str, Any] = {
        "schema": rows_schema(config, max(len(counts), 1)),
        "profile": profile_table(table),
        "balances": (IMAGES_IN,),
        "variants": rows,
        "passed": rows,
        "ready": rows,
        "class_counts": counts,
        "split_counts": split(counts),
        "class_ids": {name: number for number, name in enumerate(counts)},
        "leaking_groups": 0,
        "duplicate_ids": 0,
    }
    return judge_images(config, ImageFigures(**figures | changes), previous)


def published(
    counts: Mapping[str, int] = CLASSES, config: ImageAugmentationConfig | None = None, **changes: Any
) -> Manifest:
    """The manifest of an earlier version with these classes."""
    config = config or configured()
    values: dict[str, Any] = {
        "version": 4,
        "profile": profile_table(data(counts, config.augmentation.variants)).columns(),
        "config": config.model_dump(mode="json"),
    }
    return manifest("training-datasets/images", rows_schema(config, len(counts)), **values | changes)


def test_good_data_pass_every_check() -> None:
    result = judge(previous=published())
    passes_every_check(
        result,
        "rows, schema, unique, balance, rejected, invalid, ready, "
        "range, class balance, leak, split, stratification, compatibility, classes, drift",
    )
    assert {check.column for check in result.checks if check.name == "drift"} == {"class_name", "data_quality_score"}


def schema_with(change: Callable[[pa.Schema], pa.Schema]) -> GateResult:
    return judge(schema=change(rows_schema(configured(), len(CLASSES))))


def without_metadata(schema: pa.Schema) -> pa.Schema:
    return schema.set(4, schema.field(4).remove_metadata())


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def rejected(count: int) -> RowBalance:
    return IMAGES_IN.model_copy(update={"rows_out": IMAGES + 2 - count, "rejected": {"unreadable": count}})


NONE = {"bee": 0, "cat": 0}
EMPTY = data(NONE)
RARE = {"bee": 33, "cat": 233, "dog": 234}
ids = data()["class_id"].to_numpy()
CASES: list[tuple[str, Callable[[], GateResult], str, str | None, str]] = [
    # why, the judgement, check, column, verdict
    ("no rows", lambda: judge(NONE, table=EMPTY), "rows", None, "fail"),
    ("no rows, none ready", lambda: judge(NONE, table=EMPTY), "ready", None, "fail"),
    ("no rows, none to train on", lambda: judge(NONE, table=EMPTY), "split", "train", "fail"),
    ("two classes share an id", lambda: judge(class_ids={"bee": 0, "cat": 1, "dog": 1}), "unique", "class_id", "fail"),
    ("a column is missing", lambda: schema_with(lambda s: s.remove(0)), "schema", "image_id", "fail"),
    ("one too many", lambda: schema_with(lambda s: s.append(pa.field("x", pa.int8()))), "schema", "x", "fail"),
    ("the tensor's metadata is lost", lambda: schema_with(without_metadata), "schema", "image", "fail"),
    (
        "as many bytes, but another shape",
        lambda: judge(schema=rows_schema(configured(8, "float32"), 3)),
        "schema",
        "image",
        "fail",
    ),
    ("jpeg instead of webp", lambda: judge(config=configured(form="webp"), schema=JPEG), "schema", "image", "fail"),
    (
        "a label of another length",
        lambda: judge(schema=rows_schema(configured(), 4)),
        "schema",
        "one_hot_label",
        "fail",
    ),
    ("an id twice", lambda: judge(duplicate_ids=1), "unique", "image_id", "fail"),
    (
        "images vanish",
        lambda: judge(balances=(RowBalance(name="images", rows_in=9, rows_out=8),)),
        "balance",
        "images",
        "fail",
    ),
    ("a variant is missing", lambda: judge(variants=ROWS - 1, passed=9, ready=9), "balance", "variants", "fail"),
    ("a file is missing", lambda: judge(table=data().slice(1)), "balance", "data files", "fail"),
    ("an image is in no split", lambda: judge(split_counts=split({**CLASSES, "bee": 99})), "balance", "splits", "fail"),
    ("some images are rejected", lambda: judge(balances=(rejected(30),)), "rejected", "images", "warn"),
    ("many images are rejected", lambda: judge(balances=(rejected(200),)), "rejected", "images", "fail"),
    ("some are invalid", lambda: judge(passed=ROWS - 20, ready=ROWS - 20), "invalid", None, "warn"),
    ("many are invalid", lambda: judge(passed=ROWS - 200, ready=ROWS - 200), "invalid", None, "fail"),
    ("few are ready", lambda: judge(ready=ROWS // 2), "ready", None, "warn"),
    ("too few are ready", lambda: judge(config=configured(ready_fail=0.6), ready=ROWS // 2), "ready", None, "fail"),
    (
        "a label too high",
        lambda: judge(table=replaced(data(), "class_id", pa.array(ids + 1))),
        "range",
        "class_id",
        "fail",
    ),
    (
        "a label below 0",
        lambda: judge(table=replaced(data(), "class_id", pa.array(ids - 1))),
        "range",
        "class_id",
        "fail",
    ),
    ("a score above 1", lambda: judge(table=data(scores=1.5)), "range", "data_quality_score", "fail"),
    ("a score of NaN", lambda: judge(table=data(scores=np.nan)), "range", "data_quality_score", "fail"),
    ("a rare class", lambda: judge({**RARE, "bee": 32}), "class balance", None, "warn"),
    ("a class without images", lambda: judge({**CLASSES, "fly": 0}), "class balance", None, "warn"),
    ("one class", lambda: judge({"bee": 500}), "class balance", None, "fail"),
    ("one class, as asked", lambda: judge({"bee": 500}, configured(classes=("bee",))), "class balance", None, "warn"),
    ("a group in two splits", lambda: judge(leaking_groups=1), "leak", None, "fail"),
    ("no validation", lambda: judge(split_counts=split(CLASSES, 0)), "split", "validation", "warn"),
    ("nothing to train on", lambda: judge(split_counts=split(CLASSES, 1)), "split", "train", "fail"),
    ("an uncalled test split", lambda: judge(split_counts=with_test(1)), "split", "test", "fail"),
    (
        "no test split, where one is asked for",
        lambda: judge(config=configured(test_share=0.1)),
        "split",
        "test",
        "warn",
    ),
    ("a class is all in one split", lambda: judge(split_counts=lopsided()), "stratification", None, "warn"),
    ("a class more", lambda: judge(previous=published({"bee": 100, "cat": 150})), "classes", None, "warn"),
    ("a class less", lambda: judge(previous=published({**CLASSES, "fly": 1})), "classes", None, "warn"),
    (
        "a class that is known and has no image any more",
        lambda: judge({**CLASSES, "fly": 0}, previous=published({**CLASSES, "fly": 1})),
        "classes",
        None,
        "warn",
    ),
    ("other classes", lambda: judge(previous=published({"x": 100, "y": 150, "z": 250})), "drift", "class_name", "fail"),
    ("more of a class", lambda: judge(previous=published({**CLASSES, "dog": 800})), "drift", "class_name", "warn"),
    ("worse scores", lambda: judge(table=data(low=0.4), previous=published()), "drift", "data_quality_score", "warn"),
    (
        "much worse scores",
        lambda: judge(table=data(low=0.9), previous=published()),
        "drift",
        "data_quality_score",
        "fail",
    ),
]
JPEG = rows_schema(configured(form="jpeg"), 3)


def with_test(count: int) -> dict[str, dict[str, int]]:
    counts = split(CLASSES)
    return {**counts, "bee": {"train": 80 - count, "validation": 20, "test": count}}


def lopsided() -> dict[str, dict[str, int]]:
    return {**split(CLASSES), "bee": {"train": 100, "validation": 0}}


test_check = one_check(CASES)


def test_a_fifth_of_an_equal_part_is_enough() -> None:
    assert of(judge({"bee": 34, "cat": 233, "dog": 233}), "class balance").verdict == "pass"


def test_a_class_that_is_left_out_on_purpose_is_not_rare() -> None:
    counts = {**CLASSES, "fly": 0}
    assert of(judge(counts, configured(classes=tuple(CLASSES))), "class balance").verdict == "pass"
    assert of(judge(counts, configured(classes=tuple(counts))), "class balance").verdict == "warn"


def test_classes_that_came_and_went_are_named() -> None:
    result = judge({"bee": 100, "cat": 150, "dog": 0, "elk": 250}, previous=published())
    assert of(result, "classes").message == "Since v4, 1 class appeared: elk and 1 class vanished: dog."


COMPATIBLE: list[tuple[str, Manifest, str, str]] = [
    # why, the last version, columns that differ, verdict
    ("the same", published(), "", "pass"),
    ("another size", published(config=configured(32)), "image", "warn"),
    ("another format, and as many bytes", published(config=configured(8, "float32")), "image", "warn"),
    ("another number of variants", published(config=configured(variants=9)), "", "pass"),
    ("another seed", published(config=configured(seed=1)), "", "pass"),
    ("a class more", published({**CLASSES, "fly": 90}), "one_hot_label", "warn"),
    ("another size and a class more", published({**CLASSES, "fly": 90}, configured(32)), "one_hot_label image", "warn"),
    (
        "an image of another type without a reason",
        published(
            columns=(*published().columns[:4], ColumnSpec(name="image", type="string"), *published().columns[5:])
        ),
        "image",
        "fail",
    ),
    (
        "a column more",
        published(columns=(*published().columns, ColumnSpec(name="blur", type="float"))),
        "blur",
        "fail",
    ),
    ("a column less", published(columns=published().columns[1:]), "image_id", "fail"),
    (
        "no label before",
        published(columns=tuple(c for c in published().columns if c.name != "one_hot_label")),
        "one_hot_label",
        "fail",
    ),
    ("a configuration that says nothing", published(config=configured()).model_copy(update={"config": {}}), "", "pass"),
]


@pytest.mark.parametrize(("why", "previous", "columns", "verdict"), COMPATIBLE, ids=[case[0] for case in COMPATIBLE])
def test_compatibility(why: str, previous: Manifest, columns: str, verdict: str) -> None:
    checks = [check for check in judge(previous=previous).checks if check.name == "compatibility"]
    assert [check.column for check in checks if check.column] == columns.split()
    assert {check.verdict for check in checks} == {verdict}


def test_a_label_that_is_gone_is_not_explained_by_the_classes() -> None:
    schema = rows_schema(configured(), 3)
    result = judge(schema=schema.remove(schema.names.index("one_hot_label")), previous=published())
    assert of(result, "compatibility", "one_hot_label").verdict == "fail"


def test_other_constants_of_normalisation_are_told() -> None:
    now = configured(form="float32")
    other = now.augmentation.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    before = published(config=now.model_copy(update={"augmentation": other}))
    check = of(judge(config=now, previous=before), "compatibility")
    assert check.verdict == "warn"
    assert check.message == (
        "Images are stored otherwise than in v4: mean is (0.485, 0.456, 0.406) and was (0.5, 0.5, 0.5)."
    )
    assert of(judge(previous=published()), "compatibility").verdict == "pass"


def test_images_that_arent_trained_on_have_one_row() -> None:
    config = configured(evaluation="center")
    counts = split(CLASSES)
    rows = sum(VARIANTS * one["train"] + one["validation"] for one in counts.values())
    table = pa.concat_tables([data({n: c["train"] for n, c in counts.items()}, VARIANTS)])
    table = pa.concat_tables([table, data({n: c["validation"] for n, c in counts.items()}, 1)])
    before = published(config=config, definition={"images": CLASSES}, profile=profile_table(table).columns())
    figures = {"variants": rows, "passed": rows, "ready": rows, "previous": before}
    result = judge(config=config, table=table, **figures)
    assert {check.name: check.verdict for check in result.checks if check.verdict != "pass"} == {}
    result = judge(config=config, table=table, **figures | {"variants": rows + 1})
    assert of(result, "balance", "variants").verdict == "fail"


def test_more_variants_are_no_drift() -> None:
    result = judge(previous=published(config=configured(variants=7)))
    assert of(result, "drift", "class_name").verdict == "pass"
    assert of(result, "drift", "class_name").figure == 0.0


def test_drift_of_classes_is_counted_by_image() -> None:
    """100 images a version are too few to judge, however many variants they have."""
    few = {"bee": 20, "cat": 30, "dog": 50}
    config = configured(variants=50)
    result = judge(few, config, previous=published({"bee": 50, "cat": 30, "dog": 20}, config))
    assert "isn't judged: 100 rows now and 100 before" in of(result, "drift", "class_name").message


def test_many_classes_are_judged_by_those_that_the_manifest_lists() -> None:
    counts = {f"class_{n:02d}": 20 for n in range(30)}
    result = judge(counts, previous=published(counts))
    assert of(result, "drift", "class_name").verdict == "pass"
    assert "classes" not in {check.name for check in result.checks}


def test_class_names_that_are_long_or_odd() -> None:
    counts = {"'; drop": 100, "ü" * 300: 100, "": 100, "a,b\n": 100}
    assert judge(counts).verdict == "pass"
    judge(counts, previous=published(counts))


def test_a_profile_without_some_columns_is_judged_by_what_it_has() -> None:
    result = judge(table=data().select(["is_training_ready"]), previous=published())
    assert {check.column for check in result.checks if check.name in ("range", "drift")} == {"class_name"}


@pytest.mark.parametrize(("validation", "test"), [(0.2, 0.0), (0.0, 0.0), (0.1, 0.3)])
def test_shares_add_up(validation: float, test: float) -> None:
    shares = split_shares(configured(validation_share=validation, test_share=test))
    assert tuple(shares) == SPLITS
    assert sum(shares.values()) == pytest.approx(1)
    assert (shares["validation"], shares["test"]) == (validation, test)


@dataclasses.dataclass(frozen=True)
class Image:
    class_id: int
    split: str
    score: float
    passed: int
    ready: int


def summary(images: list[Image], names: tuple[str, ...] = ("bee", "cat", "dog"), variants: int = 3) -> pa.Table:
    return class_summary(
        class_names=names,
        class_ids=np.array([image.class_id for image in images], np.int32),
        splits=pa.array([image.split for image in images], pa.string()),
        mean_scores=np.array([image.score for image in images], np.float64),
        passed=np.array([image.passed for image in images], np.int64),
        ready=np.array([image.ready for image in images], np.int64),
        variants=dict.fromkeys(SPLITS, variants),
    )


def test_the_summary_by_hand() -> None:
    images = [
        Image(1, "train", 1.0, 3, 3),
        Image(1, "train", 0.5, 2, 1),
        Image(1, "test", 0.25, 1, 0),
        Image(0, "validation", 1.0, 3, 3),
    ]
    table = summary(images, ("bee", "cat"))
    assert summary_csv(table).decode() == (
        "class_id,class_name,split,originals,variants,mean_quality,passed,ready\n"
        "0,bee,train,0,0,,0,0\n"
        "0,bee,validation,1,3,1.0,3,3\n"
        "0,bee,test,0,0,,0,0\n"
        "1,cat,train,2,6,0.75,5,4\n"
        "1,cat,validation,0,0,,0,0\n"
        "1,cat,test,1,3,0.25,1,0\n"
    )


images = st.builds(
    Image,
    class_id=st.integers(0, 2),
    split=st.sampled_from(SPLITS),
    score=st.floats(0, 1),
    passed=st.integers(0, 3),
    ready=st.integers(0, 3),
)


@given(found=st.lists(images, max_size=20), order=st.randoms())
def test_the_order_of_images_leaves_no_trace(found: list[Image], order: Any) -> None:
    table = summary(found)
    shuffled = list(found)
    order.shuffle(shuffled)
    assert summary_csv(summary(shuffled)) == summary_csv(table)
    assert table.num_rows == 9
    for row in table.to_pylist():
        here = [i for i in found if (i.class_id, i.split) == (row["class_id"], row["split"])]
        assert row["originals"] == len(here)
        assert row["variants"] == 3 * len(here)
        assert (row["passed"], row["ready"]) == (sum(i.passed for i in here), sum(i.ready for i in here))
        mean = sum(i.score for i in here) / len(here) if here else None
        assert row["mean_quality"] == (pytest.approx(mean) if here else None)


def test_names_that_need_quotes_survive_csv() -> None:
    names = ('a "b"', "c,d", "line\nbreak", "ü", "")
    rows = list(csv.DictReader(io.StringIO(summary_csv(summary([], names)).decode(), newline="")))
    assert [row["class_name"] for row in rows[::3]] == list(names)


WRONG: list[tuple[list[Image], str]] = [
    ([Image(3, "train", 1, 1, 1)], "class ids from 3 to 3, where there are 3"),
    ([Image(-1, "train", 1, 1, 1)], "class ids from -1 to -1"),
    ([Image(0, "dev", 1, 1, 1)], "'dev' is no split: they are train, validation, test"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[case[1] for case in WRONG])
def test_refused(wrong: list[Image], message: str) -> None:
    with pytest.raises(InputError, match=message):
        summary(wrong)


def test_arrays_of_different_lengths_are_refused() -> None:
    one = np.zeros(1)
    with pytest.raises(InputError, match=r"figures of \[1, 2\] images"):
        class_summary(
            class_names=("bee",),
            class_ids=one.astype(np.int32),
            splits=["train"],
            mean_scores=np.zeros(2),
            passed=one.astype(np.int64),
            ready=one.astype(np.int64),
            variants=dict.fromkeys(SPLITS, 1),
        )
