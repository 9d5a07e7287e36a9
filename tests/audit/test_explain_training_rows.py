"""`explain` of training rows and samples: matches against brute force, samples against the stream of a training."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.io import storage
from tasks.loader.stream import TrainingStream
from tasks.report.report import Report
from tasks.store import layout, versions
from tasks.store.manifest import GateResult
from tests.audit.explained_store import Store, explained, facts, refused, rows
from tests.audit.test_explain_features import events

CHURN, WORTH, COPIES = "churn", "worth", "training-datasets/streaming-ready"


@pytest.mark.parametrize(
    ("line", "age", "why"),
    [
        ("churn v1 7 --at 2024-04-15", "15 days", "the newest at or before the event"),
        ("churn v1 7 --at 2024-05-15", None, "too old: the newest before is 45 days old, and ttl_days is 40"),
        ("worth v1 7 --at 2024-05-01", "31 days", "the newest at or before the event"),
        ("worth v1 7 --at 2024-02-01", None, "none before: the first is of 2024-03-31 00:00"),
    ],
)
def test_which_features_a_row_was_given_and_why(
    store: Store, capsys: pytest.CaptureFixture[str], line: str, age: str | None, why: str
) -> None:
    match = "v2" if age else None
    answer = explained(store, capsys, line)
    [group] = rows(answer, "features")
    assert (group["from"], group["age"], group["why"]) == (match, age, why)
    assert group["versions read"] == ["v1", "v2"]
    values = {row["column"]: row for row in rows(answer, "values")}
    table = versions.read_table(store.root, "feature-store/customer-features", 2).to_pandas()
    source = table[(table.customer_id == 7) & (table.as_of == pd.Timestamp("2024-03-31", tz="UTC"))].iloc[0]
    for column, row in values.items():
        assert row["value"] == (None if match is None else source[column.removeprefix("feature_")])
        assert row["check"] == ("nothing was matched" if match is None else "as in the version")


def test_how_a_label_came_about(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    frame = events(store)
    frame = frame[frame.amount.notna() & frame.timestamp.notna()]
    targets = set()
    for key in range(0, 60, 6):
        answer = explained(store, capsys, f"churn v1 {key} --at 2024-05-15")
        mine = frame[frame.customer_id == key].timestamp
        start, end = pd.Timestamp("2024-05-15"), pd.Timestamp("2024-05-25")
        counted = facts(answer, "events_in_transactions")
        window = int(((mine > start) & (mine <= end)).sum())
        assert (counted["before"], counted["in the window"]) == (int((mine <= start).sum()), window)
        assert facts(answer, "target")["target"] == (window == 0)
        targets.add(facts(answer, "target")["target"])
    assert False in targets


def test_where_a_target_of_a_table_stands(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    spine = pd.read_parquet(store.place / "spine.parquet")
    answer = explained(store, capsys, "worth v1 23 --at 2024-02-01")
    [file] = rows(answer, "target")
    [number] = file["rows"]
    assert spine.loc[number, "customer_id"] == 23
    assert spine.loc[number, "target"] == facts(answer, "target")["target"]
    rejected = explained(store, capsys, "worth v1 11")
    assert rejected["answer"] == "rejected"
    assert [(row["reason"], row["source row"]) for row in rows(rejected, "rejected")] == [
        ("null_target", 22),
        ("null_target", 23),
    ]


def test_unknown_rows(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refused(store, capsys, "worth v1 77")
    assert (code, told.rpartition("; ")[2]) == (1, "closest: 39, 38, 37\n")
    code, told = refused(store, capsys, f"{COPIES}/churn v1 77")
    assert (code, told.rpartition("; ")[2]) == (1, "closest: 59, 58, 57\n")
    assert refused(store, capsys, f"{COPIES}/images v1 nothing")[0] == 1
    assert refused(store, capsys, f"{COPIES}/images v1 img-000020 --at 2024-01-01")[0] == 2


@pytest.mark.parametrize("name", ["churn", "images"])
def test_samples_stand_where_the_stream_delivers_them(
    store: Store, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    uri = f"{store.root}/{COPIES}/{name}/v1"
    training = versions.read_manifest(store.root, f"{COPIES}/{name}", 1).config["training"]
    delivered = {}
    for rank in range(training["workers"]):
        stream = TrainingStream(
            uri,
            batch_size=training["batch_size"],
            seed=training["seed"],
            rank=rank,
            world_size=training["workers"],
            as_numpy=True,
        )
        for step, batch in enumerate(stream):
            for place, (sample, real) in enumerate(zip(batch["sample_id"].tolist(), batch["mask"], strict=True)):
                if real:
                    values = batch["features" if name == "churn" else "image"][place]
                    delivered[str(sample)] = (step, rank, place, np.array(values), batch["label"][place])
        # The images have so many files that their order has several streams.
        assert (stream._sizes.streams > 1) == (name == "images")
    seen = 0
    for key in ["7", "3", "8", "41"] if name == "churn" else ["img-000020", "img-000041", "img-000062_aug_1"]:
        answer = explained(store, capsys, f"{COPIES}/{name} v1 {key}")
        for row in rows(answer, "position"):
            assert (row["sample id"] in delivered) == (row["split"] == "train")
            if row["split"] != "train":
                assert "step" not in row
                continue
            step, rank, place, values, label = delivered[row["sample id"]]
            assert (row["step"], row["worker"], row["in batch"]) == (step, rank, place)
            seen += 1
            if name == "churn":
                told = [one["normalised"] for one in rows(answer, "values")]
                np.testing.assert_allclose(values, told, atol=1e-4)
                assert {one["check"] for one in rows(answer, "values")} == {"as encoded"}
                assert facts(answer, "values")["label"].startswith(f"{int(label)} (")
        for title, section in answer["sections"].items():
            if title.startswith("values"):
                assert section["facts"]["checksum of the block"].startswith("matches")
                if name == "images":
                    assert section["facts"]["check"] == "the same pixels as in the source"
    assert seen > 2


def test_splits_are_those_of_the_copys_files(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    found = set()
    for key in range(0, 60, 4):
        answer = explained(store, capsys, f"{COPIES}/churn v1 {key}")
        split = facts(answer, "split")["split"]
        assert {row["file"].partition("/")[0] for row in rows(answer, "position")} == {f"split={split}"}
        [row] = rows(explained(store, capsys, f"churn v1 {key}"), "split")
        assert (row["split"], row["draw"] < 0.2) == (split, split == "validation")
        found.add(split)
    assert found == {"train", "validation"}


def with_training(store: Store, place: Path, **settings: object) -> tuple[Store, str]:
    """A copy of the store in which a model was trained on the copy of churn, and the training's place."""
    root = str(place / "root")
    shutil.copytree(store.root, root)
    manifest = versions.read_manifest(root, f"{COPIES}/churn", 1)
    run = layout.join(layout.training_runs(root, "churn"), "v1-run")
    report = Report.of(
        manifest,
        None,
        verdict="pass",
        created_at=dt.datetime(2024, 7, 1, tzinfo=dt.UTC),
        gate=GateResult(verdict="pass", checks=()),
        config=manifest.config["training"] | settings,
    )
    storage.write_bytes(layout.join(run, layout.REPORT_JSON), report.to_json())
    return Store(root, store.place, store.images), run


def test_trainings_on_a_copy_are_named(store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there, run = with_training(store, tmp_path, batch_size=8, workers=1, seed=9)
    answer = explained(there, capsys, f"{COPIES}/churn v1 7")
    held = {row["who"]: row["holds"] for row in rows(answer, "held_by")}
    split = facts(answer, "split")["split"]
    assert held[run] == ("learned from it, each epoch" if split == "train" else "was measured on it")
    assert facts(answer, "position")["epoch 0 as of"] == f"{run}: seed 9, batch_size 8, workers 1"
    assert run in {row["who"] for row in rows(explained(there, capsys, "customer-features v1 7"), "held_by")}


def test_a_sample_of_the_remainder_that_a_training_drops_has_no_step(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there, _ = with_training(store, tmp_path, batch_size=1000, remainder="drop")
    answers = [explained(there, capsys, f"{COPIES}/churn v1 {key}") for key in (7, 3, 8, 41)]
    steps = [row["step"] for answer in answers for row in rows(answer, "position") if row["split"] == "train"]
    assert set(steps) == {"none: it is in the remainder, which is dropped"}
