"""The job on a real Ray: the same bytes for any division of the work, a global random order, and nothing lost."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.delivery import pipeline
from tasks.delivery.gate import judge_copy
from tasks.delivery.pipeline import write_streaming_ready
from tasks.delivery.shuffle import StreamingReady
from tasks.delivery.source import entity_splits, find_source, random_keys
from tasks.engine import jobs
from tasks.io.errors import BalanceError, ConfigError, CorruptVersion
from tasks.io.hashing import stable_hash
from tasks.io.tensors import to_ragged
from tasks.store import layout, versions
from tasks.store.reservation import reserve
from tests.delivery.sources import (
    FEATURES,
    IMAGES,
    configured,
    publish,
    publish_customers,
    publish_pictures,
    read_samples,
)
from tests.manifests import manifest

pytestmark = pytest.mark.usefixtures("ray_cluster")


def deliver(root: str, unit_bytes: int | None = None, **settings: Any) -> StreamingReady:
    config = configured(root, **settings)
    reservation = reserve(root, layout.streaming_dataset(config.dataset_name), uuid.uuid4().hex)
    return write_streaming_ready(config, find_source(config), reservation, unit_bytes=unit_bytes)


def digests(made: StreamingReady) -> dict[str, str]:
    return {entry.path: entry.digest for entry in made.files}


def kept_rows(table: pa.Table) -> pa.Table:
    """Customers that become samples."""
    good = [
        bool(ready) and target is not None
        for ready, target in zip(table["is_training_ready"].to_pylist(), table["target"].to_pylist(), strict=True)
    ]
    return table.filter(pa.array(good))


def ids_of(table: pa.Table) -> npt.NDArray[np.int64]:
    keys = stable_hash(table["customer_id"])
    return stable_hash(pa.array(keys ^ stable_hash(table["as_of"], 1))).view(np.int64)


def test_every_row_is_accounted_for_and_every_sample_is_what_it_was(root: str) -> None:
    table = publish_customers(root)
    done: list[int] = []
    config = configured(root, batch_size=64)
    reservation = reserve(root, layout.streaming_dataset("customer-features"), "run")
    made = write_streaming_ready(config, find_source(config), reservation, on_rows=done.append)
    assert sum(done) == 900
    (balance,) = made.balances
    kept = kept_rows(table)
    ready = sum(map(bool, table["is_training_ready"].to_pylist()))
    assert (balance.rows_in, balance.rows_out, balance.filtered) == (
        900,
        kept.num_rows,
        {"not_training_ready": 900 - ready},
    )
    assert balance.rejected == {"null_target": ready - kept.num_rows}
    assert sum(entry.rows for entry in made.rejected_files) == ready - kept.num_rows
    rows = {sample: row for row, sample in enumerate(ids_of(kept).tolist())}
    seen = 0
    for split, wanted in enumerate(("train", "validation")):
        samples = read_samples(reservation.uri, made.files, wanted)
        assert len(samples["sample_id"]) == made.samples[wanted] == made.definition["samples"][wanted]
        seen += len(samples["sample_id"])
        own = kept.take([rows[sample] for sample in samples["sample_id"].tolist()])
        assert set(entity_splits(stable_hash(own["customer_id"]), 0, 0.2, 0.0).tolist()) == {split}
        classes = made.definition["label"]["classes"]
        assert [classes[number] for number in samples["label"].tolist()] == own["target"].to_pylist()
        names = [feature["name"] for feature in made.definition["features"]]
        cities = samples["features"][:, names.index("city=Oslo")]
        assert cities.tolist() == [city == "Oslo" for city in own["city"].to_pylist()]
        visits = samples["features"][:, names.index("visits")].tolist()
        pairs = zip(visits, own["visits"].to_pylist(), strict=True)
        assert all(found == was for found, was in pairs if was is not None)
        counted = {name: int((samples["label"] == number).sum()) for number, name in enumerate(classes)}
        assert made.class_counts[wanted] == counted
    assert seen == kept.num_rows
    assert made.entities == made.samples
    assert (made.leaking_entities, made.repeated_keys, made.duplicate_ids) == (0, 0, 0)


JPEGS = "training-datasets/jpegs"


@pytest.mark.parametrize(
    "settings",
    [
        {"file_megabytes": 0.005},
        {"file_megabytes": 0.001, "dataset": IMAGES},
        {"file_megabytes": 0.008, "dataset": JPEGS},
    ],
)
def test_the_bytes_are_the_same_however_the_work_is_divided(
    tmp_path: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [str(tmp_path / name) for name in ("one", "two", "three")]
    for root, groups in zip(roots, (50, 1000, 17), strict=True):
        publish_customers(root, files=1 if groups == 1000 else 3, row_group=groups)
        publish_pictures(root)
        publish_pictures(root, dataset=JPEGS, row_group=groups, encoding="jpeg")
    first = deliver(roots[0], **settings)
    assert len(first.files) > 5
    few = deliver(roots[1], unit_bytes=1, **settings)
    monkeypatch.setattr(jobs, "PARTITION_BYTES", 1)  # as many partitions as buckets
    monkeypatch.setattr(pipeline, "KEYS_PER_PART", 100)  # several parts
    many = deliver(roots[2], unit_bytes=3000, **settings)
    for other in (few, many):
        assert digests(other) == digests(first)
        assert other.definition == first.definition
        assert other.profile.columns() == first.profile.columns()
        assert (other.balances, other.class_counts, other.entities) == (
            first.balances,
            first.class_counts,
            first.entities,
        )


def test_the_order_is_a_random_permutation_of_the_whole_split_whatever_the_files(tmp_path: Any) -> None:
    root = str(tmp_path)
    table = publish_customers(root, rows=3000, row_group=100)
    whole = deliver(root, ready_only=False)
    cut = deliver(root, ready_only=False, file_megabytes=0.01)
    assert (len(whole.files), len(cut.files) > 10) == (2, True)
    orders = [read_samples(made.reservation.uri, made.files, "train")["sample_id"] for made in (whole, cut)]
    assert orders[0].tolist() == orders[1].tolist()
    keys = random_keys(orders[0], 0)
    assert (np.diff(keys.astype(object)) > 0).all()
    place = {sample: row for row, sample in enumerate(ids_of(table).tolist())}
    rows = np.array([place[sample] for sample in orders[0].tolist()])
    moved = np.abs(np.argsort(np.argsort(rows)) - np.arange(len(rows))).mean() / len(rows)
    assert moved == pytest.approx(1 / 3, abs=0.02)  # of a uniform permutation
    assert np.corrcoef(rows, np.arange(len(rows)))[0, 1] == pytest.approx(0, abs=0.07)
    other = deliver(root, ready_only=False, seed=1)
    again = read_samples(other.reservation.uri, other.files, "train")["sample_id"]
    common = [sample for sample in again.tolist() if sample in set(orders[0].tolist())]
    ranks = {sample: rank for rank, sample in enumerate(orders[0].tolist())}
    assert np.corrcoef([ranks[sample] for sample in common], range(len(common)))[0, 1] == pytest.approx(0, abs=0.07)


def test_images_keep_their_split_pixels_and_classes(root: str) -> None:
    tables = publish_pictures(root)
    made = deliver(root, dataset=IMAGES)
    assert (made.definition["batch_size"], made.definition["image"]) == (1, {"shape": [3, 4, 5], "dtype": "uint8"})
    assert made.definition["normalise"] == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "scale": 255}
    assert made.definition["label"]["classes"] == ["cat", "dog", "owl"]
    for split, table in tables.items():
        kept = table.filter(table["is_training_ready"])
        samples = read_samples(made.reservation.uri, made.files, split)
        rows = {sample: row for row, sample in enumerate(stable_hash(kept["image_id"]).view(np.int64).tolist())}
        own = kept.take([rows[sample] for sample in samples["sample_id"].tolist()])
        assert len(own) == len(kept) == made.samples[split]
        assert samples["label"].tolist() == own["class_id"].to_pylist()
        assert [image.tobytes() for image in samples["image"]] == own["image"].to_pylist()
        assert made.entities[split] == len(kept["original_image_id"].unique())
    assert judge_copy(configured(root, dataset=IMAGES), made, None).verdict == "pass"


def test_jpegs_are_copied_byte_by_byte(tmp_path: Any) -> None:
    root = str(tmp_path)
    tables = publish_pictures(root, dataset=JPEGS, encoding="jpeg")
    made = deliver(root, dataset=JPEGS)
    lengths, told = [], made.definition["image"]
    for split, table in tables.items():
        kept = table.filter(table["is_training_ready"])
        values = dict(
            zip(stable_hash(kept["image_id"]).view(np.int64).tolist(), kept["image"].to_pylist(), strict=True)
        )
        rows = pa.concat_tables(
            pq.read_table(f"{made.reservation.uri}/{entry.path}")
            for entry in made.files
            if entry.path.startswith(f"split={split}/")
        )
        assert rows.column_names == ["image", "length", "label", "sample_id"]
        assert rows["image"].to_pylist() == [values[sample] for sample in rows["sample_id"].to_pylist()]
        assert rows["length"].to_pylist() == [len(value) for value in rows["image"].to_pylist()]
        lengths += rows["length"].to_pylist()
    assert told == {
        "shape": [3, 4, 5],
        "dtype": "uint8",
        "encoding": "jpeg",
        "mean_length": -(-sum(lengths) // len(lengths)),
        "longest": max(lengths),
    }
    assert judge_copy(configured(root, dataset=JPEGS), made, None).verdict == "pass"


def test_an_image_whose_variants_are_in_two_splits_is_found(tmp_path: Any) -> None:
    tables = publish_pictures(str(tmp_path / "first"), train=12, validation=0)
    table = tables["train"]
    files = [("split=train", table.slice(0, 11)), ("split=validation", table.slice(11))]
    publish(str(tmp_path / "second"), IMAGES, files, {"image": {}, "classes": {"a": 0, "b": 1, "c": 2}})
    made = deliver(str(tmp_path / "second"), dataset=IMAGES)
    assert made.leaking_entities == 1
    assert judge_copy(configured("x"), made, None).verdict == "fail"


def test_rows_of_one_entity_share_a_split_and_those_of_one_key_are_told_apart(tmp_path: Any) -> None:
    root = str(tmp_path)
    rows = 2000
    days = np.arange(rows) // 300  # each entity has rows of some days, and several of the same one
    table = pa.table(
        {
            "k": np.arange(rows) % 150,
            "timestamp": pa.array(days * 86_400_000_000, pa.timestamp("us")),
            "x": np.arange(rows, dtype=np.float64),
            "target": np.arange(rows) % 2,
        }
    )
    publish(root, FEATURES, [("", table.slice(0, 900)), ("", table.slice(900))], {"entity": "k"}, row_group=70)
    made = deliver(root, unit_bytes=5000)
    assert made.repeated_keys == rows - len({*zip(table["k"].to_pylist(), days.tolist(), strict=True)})
    assert made.repeated_keys > 0
    assert (made.duplicate_ids, made.leaking_entities, sum(made.entities.values())) == (0, 0, 150)
    entities: dict[str, set[int]] = {}
    ids: list[int] = []
    for split in ("train", "validation"):
        samples = read_samples(made.reservation.uri, made.files, split)
        ids += samples["sample_id"].tolist()
        entities[split] = {int(x) % 150 for x in samples["features"][:, 0].tolist()}
        runs = np.abs(np.diff(samples["features"][:, 0] % 150)) == 0
        assert runs.mean() < 0.05  # rows of an entity aren't neighbours
    assert not entities["train"] & entities["validation"]
    assert len(set(ids)) == rows
    assert digests(deliver(root)) == digests(made)


def test_weights_lie_beside_the_samples_that_have_them(tmp_path: Any) -> None:
    root = str(tmp_path)
    kept = kept_rows(publish_customers(root))
    made = deliver(root, weight="visits")
    assert made.definition["weight"] == {"column": "visits"}
    assert made.schema.names == ["features", "label", "weight", "sample_id"]
    assert made.balances[0].rejected["null_visits"] == kept["visits"].null_count
    weights = dict(zip(ids_of(kept).tolist(), kept["visits"].to_pylist(), strict=True))
    for split in ("train", "validation"):
        samples = read_samples(made.reservation.uri, made.files, split)
        assert samples["weight"].dtype == np.float32
        assert samples["weight"].tolist() == [weights[sample] for sample in samples["sample_id"].tolist()]
    [check] = [check for check in judge_copy(configured(root), made, None).checks if check.name == "weights"]
    assert (check.verdict, check.figure) == ("pass", 39)


@pytest.mark.parametrize("nulls", ["reject", "zero"])
def test_missing_features_are_rejected_or_filled(tmp_path: Any, nulls: str) -> None:
    root = str(tmp_path)
    publish_customers(root)
    made = deliver(root, nulls=nulls)
    (balance,) = made.balances
    names = [feature["name"] for feature in made.definition["features"]]
    if nulls == "reject":
        assert {"null_visits", "null_spent", "null_member", "null_city"} < set(balance.rejected)
        assert not [name for name in names if name.endswith("_missing")]
        assert sum(entry.rows for entry in made.rejected_files) == sum(balance.rejected.values())
    else:
        assert set(balance.rejected) == {"null_target"}
        filled = next(feature for feature in made.definition["features"] if feature["name"] == "spent")
        assert filled["fill"] == 0
        assert "spent_missing" in names


def test_a_copy_without_a_label_and_one_with_numbers(tmp_path: Any) -> None:
    root = str(tmp_path)
    table = publish_customers(root)
    numbers = deliver(root, target="spent")
    label = numbers.definition["label"]
    samples = read_samples(numbers.reservation.uri, numbers.files, "train")
    assert samples["label"].dtype == np.float32
    assert (label["kind"], label["mean"]) == ("number", pytest.approx(samples["label"].mean(), rel=1e-5))
    assert label["std"] == pytest.approx(samples["label"].astype(float).std(ddof=1))
    bare = pa.table({name: table[name] for name in ("customer_id", "spent")})
    publish(root, "feature-store/bare", [("", bare)], {"entity": "customer_id"})
    made = deliver(root, dataset="feature-store/bare", training={"enabled": False})
    assert made.definition["label"] is None
    assert made.schema.names == ["features", "sample_id"]
    assert judge_copy(configured(root), made, None).verdict == "pass"


def test_several_labels_are_a_vector_of_one_kind(tmp_path: Any) -> None:
    root = str(tmp_path)
    table = publish_customers(root)
    made = deliver(root, target="spent,visits", target_kind="number", batch_size=64)
    label = made.definition["label"]
    samples = read_samples(made.reservation.uri, made.files, "train")
    assert (samples["label"].dtype, samples["label"].shape[1:]) == (np.float32, (2,))
    assert (label["columns"], label["kind"]) == (["spent", "visits"], "numbers")
    assert label["mean"] == pytest.approx(samples["label"].mean(axis=0, dtype=np.float64).tolist(), rel=1e-5)
    rows = dict(zip(ids_of(table).tolist(), table.select(["spent", "visits"]).to_pylist(), strict=True))
    for sample, found in zip(samples["sample_id"].tolist(), samples["label"].tolist(), strict=True):
        assert found == [np.float32(rows[sample]["spent"]), rows[sample]["visits"]]
    assert set(made.balances[0].rejected) == {"null_spent", "null_visits"}
    assert judge_copy(configured(root), made, None).verdict != "fail"
    made = deliver(root, target="city,member", exclude="target")
    assert made.definition["label"]["classes"] == [["Bonn", "Lima", "Oslo", "Rome"], ["false", "true"]]
    classes = read_samples(made.reservation.uri, made.files, "train")["label"]
    assert (classes.dtype, classes.max(axis=0).tolist()) == (np.int64, [3, 1])
    checks = {(check.name, check.column): check for check in judge_copy(configured(root), made, None).checks}
    assert f"of {len(classes)} rows" in checks["target", "city"].message
    with pytest.raises(ConfigError, match=r"'spent,city' mixes classes and numbers: spent \(number\), city \(c"):
        deliver(root, target="spent,city")


def test_a_list_is_several_labels(tmp_path: Any) -> None:
    root, draw = str(tmp_path), np.random.default_rng(0)
    values = draw.normal(size=(50, 3)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 3)
    lists = pa.concat_arrays([lists, pa.array([None, [1, None, 2]], lists.type)])
    table = pa.table({"k": np.arange(52), "x": draw.normal(size=52), "place": lists})
    publish(root, FEATURES, [("", table)], {"entity": "k"}, row_group=20)
    made = deliver(root, target="place", validation_share=0.0)
    assert made.definition["label"]["columns"] == ["place"]
    assert made.balances[0].rejected == {"null_place": 2}
    samples = read_samples(made.reservation.uri, made.files, "train")
    rows = {sample: row for row, sample in enumerate(stable_hash(table["k"]).view(np.int64).tolist())}
    order = [rows[sample] for sample in samples["sample_id"].tolist()]
    assert np.array_equal(samples["label"], values[order])
    assert {"place[0]", "place[1]", "place[2]"} <= set(made.profile.columns())


def test_only_the_last_batch_of_a_file_is_shorter(tmp_path: Any) -> None:
    root = str(tmp_path)
    publish_customers(root)
    made = deliver(root, batch_size=32, file_megabytes=0.005)
    assert len(made.files) > 5
    for entry in made.files:
        footer = pq.read_metadata(f"{made.reservation.uri}/{entry.path}")
        assert footer.num_rows == entry.rows
        metadata = footer.metadata
        assert metadata[b"batch_size"] == b"32"
        assert int(metadata[b"feature_count"]) == made.definition["feature_count"]
        assert len(metadata[b"batch_id"].split()) == -(-entry.rows // 32)


def test_nothing_to_train_on_is_written_and_judged(tmp_path: Any) -> None:
    root = str(tmp_path)
    table = publish_customers(root, rows=40)
    none = table.set_column(table.column_names.index("is_training_ready"), "is_training_ready", pa.array([False] * 40))
    publish(root, "feature-store/none", [("", none)], {"entity": "customer_id"})
    made = deliver(root, dataset="feature-store/none", exclude="city")
    assert (made.files, made.balances[0].filtered) == ((), {"not_training_ready": 40})
    assert judge_copy(configured(root), made, None).verdict == "fail"


def test_errors_of_the_workers_come_as_they_were_raised(tmp_path: Any) -> None:
    root = str(tmp_path)
    tables = publish_pictures(root)
    table = tables["train"]
    odd = table.set_column(3, "class_id", pa.array([7] * len(table), pa.int32()))
    publish(root, IMAGES, [("split=train", odd)], {"image": {}, "classes": {"a": 0, "b": 1}})
    with pytest.raises(ValueError, match="'7', which is none of the version's classes"):
        deliver(root, dataset=IMAGES)
    config = configured(root, dataset=IMAGES, version=1)
    source = find_source(config)
    (tmp_path / IMAGES / "v1" / "split=train" / "part-00000-a1.parquet").unlink()
    with pytest.raises(CorruptVersion, match=r"part-00000-a1.parquet is missing"):
        write_streaming_ready(config, source, reserve(root, "copy", "run"))


def test_a_version_that_has_lost_rows_is_not_delivered(tmp_path: Any) -> None:
    root = str(tmp_path)
    publish_customers(root)
    config = configured(root)
    source = find_source(config)
    object.__setattr__(source, "files", source.files[:2])
    with pytest.raises(BalanceError, match="has 900 rows, 600 were read"):
        write_streaming_ready(config, source, reserve(root, "copy", "run"))


def test_a_text_of_too_many_values_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    texts = pa.table(
        {"k": range(70_000), "t": [str(n) for n in range(70_000)], "target": [n % 2 for n in range(70_000)]}
    )
    publish(root, FEATURES, [("", texts)], {"entity": "k"})
    with pytest.raises(ConfigError, match="--exclude t"):
        deliver(root, validation_share=0)


def test_a_reader_of_the_format_finds_every_sample_once(tmp_path: Any) -> None:
    from tasks.loader.stream import TrainingStream

    root = str(tmp_path)
    publish_customers(root)
    made = deliver(root, file_megabytes=0.01, batch_size=32)
    reservation = made.reservation
    version = manifest(
        reservation,
        files=made.files,
        rejected_files=made.rejected_files,
        columns=made.columns,
        balances=made.balances,
        profile=made.profile.columns(),
        inputs=(find_source(configured(root)).record(),),
        definition=made.definition,
    )
    versions.commit(reservation, version)
    expected = read_samples(reservation.uri, made.files, "train")
    with TrainingStream(reservation.uri, batch_size=50, normalise=False, remainder="pad") as stream:
        batches = list(stream)
    ids = np.concatenate([batch["sample_id"][batch["mask"]].numpy() for batch in batches])
    features = np.concatenate([batch["features"][batch["mask"]].numpy() for batch in batches])
    assert sorted(ids.tolist()) == sorted(expected["sample_id"].tolist())
    rows = {sample: row for row, sample in enumerate(expected["sample_id"].tolist())}
    np.testing.assert_array_equal(features, expected["features"][[rows[sample] for sample in ids.tolist()]])


def publish_texts(root: str, rows: int = 300) -> pa.Table:
    """Publish texts and lists of tokens of any length, some of them missing or empty, with a class."""
    draw = np.random.default_rng(0)
    texts = ["ż" * int(size) + "ab" for size in draw.integers(0, 40, rows)]
    tokens = [draw.integers(0, 9, size).tolist() for size in draw.integers(1, 30, rows)]
    texts[3:5], tokens[7:9], tokens[9] = [None, ""], [None, []], [1, None]
    table = pa.table(
        {
            "k": np.arange(rows),
            "text": pa.array(texts),
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
            "target": draw.choice(["x", "y"], rows),
        }
    )
    publish(root, FEATURES, [("", table.slice(0, 120)), ("", table.slice(120))], {"entity": "k"}, row_group=40)
    return table


@pytest.mark.parametrize(("sequence", "dtype", "bad"), [("text", "uint8", [1, 1]), ("tokens", "int32", [2, 1])])
def test_sequences_are_samples_and_rows_without_are_rejected(
    tmp_path: Any, sequence: str, dtype: str, bad: list[int]
) -> None:
    root = str(tmp_path)
    table = publish_texts(root)
    options: dict[str, Any] = {"sequence": sequence, "training": {"enabled": False}, "batch_size": 16}
    made = deliver(root, **options, file_megabytes=0.002)
    assert digests(deliver(root, **options, file_megabytes=0.002, unit_bytes=500)) == digests(made)
    [balance] = made.balances
    assert balance.rejected == {f"null_{sequence}": bad[0], f"empty_{sequence}": bad[1]}
    told = made.definition["sequence"]
    lengths = []
    rows = {sample: row for row, sample in enumerate(stable_hash(table["k"]).view(np.int64).tolist())}
    for split in ("train", "validation"):
        own = [entry for entry in made.files if entry.path.startswith(f"split={split}/")]
        assert len(own) > 1
        for entry in own:
            samples = pq.read_table(layout.join(made.reservation.uri, entry.path), partitioning=None)
            values, starts = to_ragged(samples, "sequence")
            assert values.dtype == dtype
            parts = np.split(values, starts[1:-1])
            for sample, part, length in zip(samples["sample_id"].to_pylist(), parts, samples["length"], strict=True):
                raw = table[sequence][rows[sample]].as_py()
                assert part.tolist() == list(raw.encode() if isinstance(raw, str) else raw)
                assert len(part) == length.as_py()
                lengths.append(len(part))
    assert len(lengths) == balance.rows_out == table.num_rows - sum(bad)
    assert (told["column"], told["dtype"], told["longest"]) == (sequence, dtype, max(lengths))
    assert told["mean_length"] == -(-sum(lengths) // len(lengths))
    gate = judge_copy(configured(root, **options), made, None)
    assert {check.name for check in gate.checks if check.verdict == "fail"} == set()
    assert f"length of {sequence}" in made.profile.columns()
