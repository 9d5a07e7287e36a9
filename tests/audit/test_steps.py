"""What `explain` shows of a step is what the training's stream delivered in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.cli import commands
from tasks.images.config import Augmentation
from tasks.loader.mixed import MixedStream
from tasks.loader.stream import TrainingStream
from tasks.store import versions
from tests.audit.explained_store import Store, explained, facts, refused, rows
from tests.audit.replay_store import JPEGS, TEXTS
from tests.audit.replay_store import Store as Made

IMAGES, CHURN = "training-datasets/streaming-ready/images", "training-datasets/streaming-ready/churn"
RAW: dict[str, Any] = {"as_numpy": True, "normalise": False, "prefetch": 0}
COLUMNS = ["image", "label", "weight", "sample_id"]


def after(stream: Any, steps: int, path: Path) -> dict[str, Any]:
    """Deliver some batches, save the state, and return the next batch."""
    iteration = iter(stream)
    for _ in range(steps):
        next(iteration)
    path.write_text(json.dumps(stream.state_dict()))
    found: dict[str, Any] = next(iteration)
    return found


def ids(answer: dict[str, Any]) -> list[str]:
    return [row["sample id"] for row in rows(answer, "samples")]


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_saved_state_shows_the_very_pictures_and_labels_of_the_step_after_it(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    options: dict[str, Any] = {"transform": Augmentation(size=24, degrees=30), "mixup": 0.4, "cutmix": 1.0, **RAW}
    uri, state, sheet = f"{store.root}/{IMAGES}/v1", tmp_path / "state.json", tmp_path / f"sheet.{suffix}"
    with TrainingStream(uri, batch_size=8, seed=5, rank=1, world_size=2, columns=COLUMNS, **options) as stream:
        stream.set_epoch(1)
        batch = after(stream, 3, state)
    transform = '--transform {"size":24,"degrees":30}'
    line = f"{IMAGES} v1 --state {state} --rank 1 --world-size 2 {transform} --picture {sheet}"
    answer = explained(store, capsys, line)
    assert answer["headline"].startswith(f"step 3 of epoch 1 of {IMAGES} v1: worker 1 of 2 got 8 samples")
    assert ids(answer) == [str(sample) for sample in batch["sample_id"]]
    classes = versions.read_manifest(store.root, IMAGES, 1).definition["label"]["classes"]
    for row, label, weight in zip(rows(answer, "samples"), batch["label"], batch["weight"], strict=True):
        assert row["label"] == {name: share for name, share in zip(classes, label.tolist(), strict=True) if share}
        assert row["weight"] == weight
        assert f"{row['image_id']}".startswith(row["original_image_id"])
    assert any(len(row["label"]) == 2 for row in rows(answer, "samples"))
    with Image.open(sheet) as opened:
        assert opened.format == suffix.upper()
        shown = np.asarray(opened.convert("RGB"))
    for place, picture in enumerate(batch["image"]):
        top, left = 8 + place // 3 * (24 + 18 + 8), 8 + place % 3 * (112 + 8)
        assert np.array_equal(shown[top : top + 24, left : left + 24], picture.transpose(1, 2, 0))
    told = f"{IMAGES} v1 --epoch 1 --step 3 --seed 5 --batch-size 8 --mixup 0.4 --cutmix 1"
    again = explained(store, capsys, f"{told} --rank 1 --world-size 2 {transform}")
    assert rows(again, "samples") == rows(answer, "samples")
    moved = explained(store, capsys, f"{IMAGES} v1 --state {state} {transform} --world-size 2 --epoch 0 --step 1")
    assert moved["headline"].startswith("step 1 of epoch 0")
    assert ids(moved) != ids(answer)


def test_samples_of_a_table_come_with_their_source_rows_and_inputs(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings are those of the copy's own training, as in the answer about a row."""
    training = versions.read_manifest(store.root, CHURN, 1).config["training"]
    settings = {"batch_size": training["batch_size"], "seed": training["seed"], "world_size": training["workers"]}
    with TrainingStream(f"{store.root}/{CHURN}/v1", rank=1, **settings, **RAW) as stream:
        batch = next(iter(stream))
    answer = explained(store, capsys, f"{CHURN} v1 --step 0 --rank 1")
    samples = rows(answer, "samples")
    assert ids(answer) == [str(sample) for sample in batch["sample_id"]]
    assert np.array_equal(np.float32([row["features"] for row in samples]), batch["features"])
    real = [row for row in samples if row.get("real", "yes") == "yes"]
    assert len(real) == batch["mask"].sum() == facts(answer, "samples")["real"]
    row = real[0]
    known = explained(store, capsys, f"{CHURN} v1 {row['customer_id']} --at {row['event_timestamp']}")
    source = rows(known, "source")[0]
    assert (source["sample id"], source["file"], source["row"]) == (row["sample id"], row["file"], row["row"])
    position = rows(known, "position")[0]
    assert (position["step"], position["worker"], position["in batch"]) == (0, 1, row["place"])
    assert commands.run(["explain", CHURN, "v1", "--step", "0", "--root", store.root]) == 0
    assert "features" not in capsys.readouterr().out.partition("VERSION")[0].lower()


def test_a_jpeg_of_a_copy_and_a_step_on_it_are_explained(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here = Store(made.root, tmp_path, "")
    answer = explained(here, capsys, f"{JPEGS} v1 1-3_aug_1")
    told = facts(answer, "values")
    assert (told["shape"], told["stored as"]) == ("3 × 4 × 5", "jpeg, as in the source")
    assert told["check"] == "the same bytes as in the source"
    assert told["checksum of its batch"].startswith("matches")
    [position] = rows(answer, "position")
    step = explained(here, capsys, f"{JPEGS} v1 --step {position['step']} --rank {position['worker']}")
    row = rows(step, "samples")[position["in batch"]]
    assert (row["image_id"], row["sample id"]) == ("1-3_aug_1", position["sample id"])
    sheet = tmp_path / "sheet.png"
    explained(here, capsys, f"{JPEGS} v1 --epoch 1 --batch-size 4 --world-size 1 --picture {sheet}")
    with TrainingStream(f"{made.root}/{JPEGS}/v1", batch_size=4, **RAW) as stream:
        stream.set_epoch(1)
        [first, *_] = next(iter(stream))["image"]
    with Image.open(sheet) as opened:
        assert np.array_equal(np.asarray(opened)[8:12, 8:13], first.transpose(1, 2, 0))


def test_a_step_of_sequences_shows_each_as_it_was_delivered(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here, uri, state = Store(made.root, tmp_path, ""), f"{made.root}/{TEXTS}/v1", tmp_path / "state.json"
    with TrainingStream(uri, batch_size=4, length_buckets=[8, 22], max_length=9, **RAW) as stream:
        batch = after(stream, 1, state)
    answer = explained(here, capsys, f"{TEXTS} v1 --state {state}")
    assert ids(answer) == [str(sample) for sample in batch["sample_id"]]
    for row, length, values in zip(rows(answer, "samples"), batch["length"], batch["sequence"], strict=True):
        assert row["length"] == length == min(9, 2 * (1 + row["k"] * 7 % 11))
        assert row["sequence"] == values[:length].tolist() == list(("ab" * 11).encode()[:length])
    with TrainingStream(uri, batch_size=2, pack=30, **RAW) as stream:
        after(stream, 1, state)
    assert "several sequences fill" in refused(here, capsys, f"{TEXTS} v1 --state {state}")[1]


@pytest.mark.parametrize("drawn", [{"balance": "class"}, {"weights": "weight", "replacement": False}, {"repeat": 2}])
def test_drawn_samples_are_drawn_as_they_were(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path, drawn: dict[str, Any]
) -> None:
    with TrainingStream(f"{store.root}/{IMAGES}/v1", batch_size=8, **drawn, **RAW) as stream:
        batch = after(stream, 2, tmp_path / "state.json")
    answer = explained(store, capsys, f"{IMAGES} v1 --state {tmp_path / 'state.json'}")
    assert ids(answer) == [str(sample) for sample in batch["sample_id"]]


def test_a_step_of_a_mix_names_the_version_of_each_sample(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, more = str(tmp_path / "root"), f"{IMAGES.rpartition('/')[0]}/more"
    shutil.copytree(store.root, root)
    shutil.copytree(f"{root}/{IMAGES}/v1", f"{root}/{more}/v1")
    path = Path(root, more, "v1", "_manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": more}))
    uris = [f"{root}/{name}/v1" for name in (IMAGES, more)]
    with MixedStream(dict(zip(uris, (1, 3), strict=True)), batch_size=8, **RAW) as stream:
        next(iter(stream))
        stream.set_weights(dict.fromkeys(uris, 1))
        batch = after(stream, 1, tmp_path / "state.json")
    copied = Store(root, store.place, store.images)
    answer = explained(copied, capsys, f"{more} v1 --state {tmp_path / 'state.json'}")
    assert ids(answer) == [str(sample) for sample in batch["sample_id"]]
    names = [f"{name} v1" for name in (IMAGES, more)]
    assert [names.index(row["version"]) for row in rows(answer, "samples")] == batch["source"].tolist()
    assert all(row["image_id"] for row in rows(answer, "samples"))
    assert (
        "a mix, whose sources go on" in refused(copied, capsys, f"{more} v1 --state {tmp_path}/state.json --epoch 3")[1]
    )


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("", (2, "name the KEY of a row, or the place of a step with --state FILE, or with --epoch and --step")),
        ("--rank 1", (2, "name the KEY of a row, or the place of a step")),
        ("img-000020 --step 1", (2, "--step is for what a step saw, not for the row of a key; leave it out")),
        ("--step 1 --at 2024-01-01", (2, "--at names a time of a row, and a step has none")),
        ("--step 999", (1, "--step 999: an epoch has steps 0 to ")),
        ("--step 0 --rank 7 --world-size 2", (2, "rank = 7 of world_size = 2")),
        ("--step 0 --transform no.such:thing", (2, "--transform = 'no.such:thing': can't import 'no.such'")),
        ('--step 0 --transform {"sise":3}', (2, "no Augmentation (sise: Extra inputs")),
        ("--step 0 --picture x.jpg", (2, "give a name that ends with .png or .webp")),
        ("--step 0 --picture /nowhere/x.png", (2, "--picture /nowhere/x.png can't be written")),
        ("--state {here}/none.json", (1, "there is no such file; give what state_dict() of a stream")),
        ("--state {here}/text", (1, "isn't JSON")),
        ("--state {here}/list", (1, "holds a list")),
        ("--state {here}/odd", (1, "its batches is '3', no int")),
        (
            "--state {here}/other",
            (1, "the state is of training-datasets/streaming-ready/churn v1, not of training-datasets"),
        ),
        ("--state {here}/good --seed 1", (2, "--seed and --state: the state says it; leave one of them out")),
        ("--state {here}/augmented", (2, "has only a digest of how: give its settings as --transform")),
        ("--state {here}/by_id", (2, "drawn by weights by class or by id, of which it has only a digest")),
        ("--state {here}/mixed", (1, "the state isn't that of a mix")),
    ],
)
def test_what_cant_be_shown_is_said_in_one_line(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, refusal: tuple[int, str]
) -> None:
    uri = f"{store.root}/{IMAGES}/v1"
    with TrainingStream(uri, batch_size=8, **RAW) as stream:
        good, some = stream.state_dict(), [stream.sample(index=3)["sample_id"]]
    with TrainingStream(uri, batch_size=8, weights=(some, [3]), **RAW) as stream:
        by_id = stream.state_dict()
    mixed = {name: value for name, value in good.items() if name not in ("dataset", "version")}
    states = {
        "good": good,
        "list": [1],
        "odd": {**good, "batches": "3"},
        "other": {**good, "dataset": CHURN},
        "augmented": {**good, "augmentation": "1"},
        "by_id": by_id,
        "mixed": {**mixed, "datasets": [IMAGES], "versions": [1]},
    }
    for name, state in states.items():
        (tmp_path / name).write_text(json.dumps(state))
    (tmp_path / "text").write_text("{")
    found, told = refused(store, capsys, f"{IMAGES} v1 {line.replace('{here}', str(tmp_path))}")
    assert found == refusal[0], told
    assert refusal[1] in told
    assert told.count("\n") == 1


def test_only_streaming_copies_have_steps(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert "trainings take steps of streaming copies" in refused(store, capsys, "churn v1 --step 1")[1]
    assert "name the KEY of a row of training-datasets/images" in refused(store, capsys, "images v1")[1]
    assert "holds none; leave it out" in refused(store, capsys, f"{CHURN} v1 --step 0 --picture x.png")[1]
