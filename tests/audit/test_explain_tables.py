"""`explain` of feature rows, training rows and samples: against pandas, brute force and the stream of a training."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import s3fs

from tasks.cli import commands
from tasks.io import storage
from tasks.io.hashing import stable_hash
from tasks.loader.stream import TrainingStream
from tasks.report.report import Report
from tasks.store import layout, versions
from tasks.store.manifest import GateResult
from tasks.store.versions import withdraw
from tests.audit.explained_store import Store, explained, facts, refused, rows

GROUP = "customer-features"


def events(store: Store) -> pd.DataFrame:
    frames = []
    for path in store.transactions:
        frame = pd.read_csv(path, parse_dates=["timestamp"]) if path.endswith("csv") else pd.read_parquet(path)
        frames.append(frame.assign(file=path))
    return pd.concat(frames)


@pytest.mark.parametrize(("key", "at"), [(7, "2024-03-31"), (7, "2024-06-30"), (42, None)])
def test_events_are_counted_as_pandas_counts_them(
    store: Store, capsys: pytest.CaptureFixture[str], key: int, at: str | None
) -> None:
    answer = explained(store, capsys, f"{GROUP} v2 {key}" + (f" --at {at}" if at else ""))
    frame = events(store)
    mine = frame[frame.customer_id == key]
    good, until = mine[mine.amount.notna()], pd.Timestamp(at or "2024-06-30")
    wanted = {
        path: (
            int((good[good.file == path].timestamp <= until).sum()),
            int((good[good.file == path].timestamp > until).sum()),
            int(mine[mine.file == path].amount.isna().sum()),
        )
        for path in store.transactions
    }
    told = rows(answer, "events_in_transactions")
    assert {row["file"]: (row["events"], row["later"], row["rejected"]) for row in told} == wanted
    assert {row["now"] for row in told} == {"unchanged"}
    values = {row["feature"]: row["value"] for row in rows(answer, "values")}
    assert values["transaction_count"] == sum(count for count, _, _ in wanted.values())
    assert values["total_spent"] == pytest.approx(good[good.timestamp <= until].amount.sum())
    assert facts(answer, "row")["as of"] == f"{until:%Y-%m-%d}T00:00:00Z"


def test_the_row_is_found_by_its_partition(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    answer = explained(store, capsys, f"{GROUP} v2 7 --at 2024-06-30")
    where, manifest = facts(answer, "row"), versions.read_manifest(store.root, f"feature-store/{GROUP}", 2)
    data = pq.read_table(f"{store.root}/feature-store/{GROUP}/v2/{where['file']}").slice(where["row"], 1).to_pylist()[0]
    assert (data["customer_id"], str(data["as_of"])[:10]) == (7, "2024-06-30")
    assert len(manifest.files) == 4
    assert where["read"] == "footers of 1 of 4 data files, 1 row groups"
    assert set(
        (
            stable_hash(pq.read_table(f"{store.root}/feature-store/{GROUP}/v2/{where['file']}")["customer_id"]) % 4
        ).tolist()
    ) == {int(where["file"].split("-")[1])}


def test_outliers_are_those_outside_of_the_fences_of_the_rows_time(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    table = versions.read_table(store.root, f"feature-store/{GROUP}", 2).to_pandas()
    table = table[table.as_of == pd.Timestamp("2024-03-31", tz="UTC")].set_index("customer_id")
    odd = table[table.outlier_ratio > 0]
    assert len(odd) > 2, "the data has no outliers to explain"
    numbers = [
        name for name in table.columns[: list(table).index("missing_value_ratio")] if table[name].dtype.kind in "if"
    ]
    low, high = table[numbers].quantile(0.25), table[numbers].quantile(0.75)
    for key in odd.index[:3]:
        answer = explained(store, capsys, f"{GROUP} v2 {key} --at 2024-03-31")
        row, reach = table.loc[key], 1.5 * (high - low)
        wanted = [name for name in numbers if not low[name] - reach[name] <= row[name] <= high[name] + reach[name]]
        assert facts(answer, "quality")["outliers"] == wanted
        assert answer["sections"]["quality"]["notes"] == []
        assert facts(answer, "quality")["training-ready"] == bool(row.is_training_ready)
        ready = facts(answer, "quality")["because"] == "every bound is kept"
        assert ready == bool(row.is_training_ready)


def test_who_holds_a_row(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    held = {
        row["who"]: (row["relation"], row["holds"])
        for row in rows(explained(store, capsys, f"{GROUP} v2 7 --at 2024-03-31"), "held_by")
    }
    # A label at the 15th of April finds the features of March, which are 15 days old; at the 15th of May they are too
    # old. The table's rows of the 1st of May find them, and those of February find none.
    assert held["feature-store/training-ready/churn v1"] == (
        "made from it",
        "2 rows, 2024-04-15, 2024-05-15; 1 of them have this row's features",
    )
    assert held["feature-store/training-ready/worth v1"][1].endswith("; 1 of them have this row's features")
    assert held[f"feature-store/{GROUP} v1"] == ("other version", "1 row, 2024-03-31")
    assert held["training-datasets/streaming-ready/churn v1"][1] == "2 samples in train"


def test_rejected_rows_are_an_answer(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    kept = explained(store, capsys, f"{GROUP} v2 7")
    told = [(row["reason"], Path(row["source file"]).name, row["source row"]) for row in rows(kept, "rejected")]
    assert told == [("null_amount", "a.parquet", 10), ("null_amount", "b.parquet", 500)]
    nobody = explained(store, capsys, f"{GROUP} v2 900")
    assert nobody["answer"] == "rejected"
    [row] = rows(nobody, "rejected")
    assert (row["reason"], Path(row["source file"]).name, row["source row"], row["detail"]) == (
        "null_timestamp",
        "c.csv",
        500,
        "timestamp is missing",
    )
    [row] = rows(explained(store, capsys, f"{GROUP} v2 901"), "rejected")
    assert (row["reason"], row["detail"]) == (
        "no_customers_row",
        "customers has no row of this key, and join = inner",
    )
    twice = explained(store, capsys, f"{GROUP} v2 4")
    assert rows(twice, "rows_of_customers")[0]["rows"] == [4, 60]
    assert [row["reason"] for row in rows(twice, "rejected")] == ["conflicting_customer_id"]
    gate = {row["column"]: row["concerns"] for row in rows(twice, "gate")}
    assert gate["customers"] == "has rejected rows of it"


def test_unknown_keys_and_wrong_arguments(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refused(store, capsys, f"{GROUP} v2 61")
    assert code == 1
    assert (
        f"error: feature-store/{GROUP} v2 has no customer_id '61', among its rows or its rejected ones; "
        "closest: 59, 58, 57"
    ) in told.splitlines()
    code, told = refused(store, capsys, f"{GROUP} v2 seven")
    assert code == 2
    assert "those are whole numbers, such as 7" in told
    code, told = refused(store, capsys, f"{GROUP} v2 7 --at 2024-04-01")
    assert code == 1
    assert "closest: 2024-03-31T00:00:00+00:00, 2024-06-30T00:00:00+00:00" in told
    assert refused(store, capsys, f"{GROUP} v2 7 --at yesterday")[0] == 2
    assert refused(store, capsys, f"{GROUP} v2 7 --picture x.png")[0] == 2
    assert refused(store, capsys, f"{GROUP} v9 7")[0] == 1


def test_sources_that_are_gone_or_changed_are_named(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone, changed, _ = (Path(path) for path in store.transactions)
    shutil.move(gone, tmp_path / "a")
    shutil.copy(changed, tmp_path / "b")
    pd.read_parquet(changed)[:900].to_parquet(changed)
    try:
        answer = explained(store, capsys, f"{GROUP} v2 7")
    finally:
        shutil.move(tmp_path / "a", gone)
        shutil.copy(tmp_path / "b", changed)
    states = [row["now"] for row in rows(answer, "events_in_transactions")]
    assert states == ["gone", "changed since", "unchanged"]
    assert answer["sections"]["events_in_transactions"]["notes"] == [
        "1 of 3 files are gone; 1 of 3 files have changed since, and are counted as they are now."
    ]
    assert rows(answer, "events_in_transactions")[0]["events"] is None


def test_data_sends_no_command_to_the_terminal(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["explain", GROUP, "v2", "3", "--root", store.root]) == 0
    text = capsys.readouterr().out
    assert r"red \x1b[31malert\x1b[0m" in text
    assert "\x1b" not in text
    assert commands.run(["explain", GROUP, "v2", "3", "--json", "--root", store.root]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    location = next(row for row in rows(json.loads(text), "values") if row["feature"] == "location")
    assert location["value"] == "red \x1b[31malert\x1b[0m"
    assert "\x1b" not in refused(store, capsys, f"{GROUP} v2 \x1b[2J7")[1]


def test_neither_ray_nor_prefect_is_loaded(store: Store) -> None:
    code = (
        "import sys; from tasks.cli import commands\n"
        f"for line in ('{GROUP} v2 7', 'churn v1 7', 'images v1 img-000020', "
        "'training-datasets/streaming-ready/churn v1 7'):\n"
        f"    assert commands.run(['explain', *line.split(), '--root', {store.root!r}]) == 0\n"
        "assert not {'ray', 'prefect'} & set(sys.modules), 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        f"{GROUP} v2 7 --at 2024-03-31",
        "churn v1 7",
        "images v1 img-000020",
        "training-datasets/streaming-ready/churn v1 7",
        "training-datasets/streaming-ready/images v1 img-000020",
    ],
)
def test_the_answer_from_s3_is_that_from_a_disk(
    store: Store, capsys: pytest.CaptureFixture[str], s3_root: str, s3_url: str, line: str
) -> None:
    s3fs.S3FileSystem(endpoint_url=s3_url).put(store.root, s3_root.removeprefix("s3://"), recursive=True)
    there = explained(Store(s3_root, store.place, store.images), capsys, line)
    here = explained(store, capsys, line)
    here["sections"]["version"]["facts"]["data"] = there["sections"]["version"]["facts"]["data"]
    assert json.loads(json.dumps(here).replace(store.root, s3_root)) == json.loads(
        json.dumps(there).replace(store.root, s3_root)
    )


def test_a_withdrawn_version_says_so(store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    shutil.copytree(store.root, root)
    withdraw(root, f"feature-store/{GROUP}", 1, "a test", "the tests")
    answer = explained(Store(root, store.place, store.images), capsys, f"{GROUP} v1 7")
    assert facts(answer, "version")["status"] == "withdrawn"
    assert "a test" in facts(answer, "version")["withdrawn"]
    assert storage.exists(facts(answer, "version")["data"])


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
                assert section["facts"]["checksum of its batch"].startswith("matches")
                if name == "images":
                    assert section["facts"]["check"] == "the same pixels as in the source"
                    stored, _, score = section["facts"]["weight"].partition(", of data_quality_score = ")
                    assert float(stored) == pytest.approx(float(score), rel=1e-6)
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
