from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io.errors import ConfigError, CorruptVersion, InputError, PipelineError
from tasks.loader.order import EpochOrder, Share, Sizes
from tasks.loader.sampling import Draws
from tasks.loader.stream import TrainingStream
from tests.delivery.making import Columns, cut, damage, image_samples, image_version, publish, table_samples

FILES = [40, 25, 3, 32] + [10] * 12
SAMPLES = sum(FILES)
"""220 samples in 16 files: two streams, of classes that are not equally frequent."""


def columns() -> Columns:
    samples, draw = table_samples(SAMPLES), np.random.default_rng(1)
    samples["label"] = draw.choice(3, SAMPLES, p=[0.7, 0.25, 0.05])
    ids = samples.pop("sample_id")
    return {**samples, "weight": np.round(draw.exponential(2, SAMPLES), 1).astype(np.float32), "sample_id": ids}


STORED = columns()
CLASSES = np.bincount(STORED["label"], minlength=4)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("root"))
    return publish(root, {"train": cut(STORED, *FILES)}, batch_size=10, group_batches=3)


def workers(uri: str, count: int, state: Any = None, **options: Any) -> list[TrainingStream]:
    options = {"batch_size": 8, "as_numpy": True, "prefetch": 0, "columns": ["label", "sample_id"], **options}
    streams = [TrainingStream(uri, rank=rank, world_size=count, **options) for rank in range(count)]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
    return streams


def run(streams: list[TrainingStream], steps: int | None = None) -> list[list[int]]:
    """Ids of the real samples of each step, sorted."""
    found = []
    for number, step in enumerate(zip(*streams, strict=True), start=1):
        found.append(sorted(i for batch in step for i in batch["sample_id"][batch["mask"]].tolist()))
        if number == steps:
            break
    return found


def times(steps: list[list[int]]) -> np.ndarray[Any, Any]:
    """How often each stored sample was delivered."""
    place = {int(sample): at for at, sample in enumerate(STORED["sample_id"])}
    return np.bincount([place[i] for step in steps for i in step], minlength=SAMPLES)


GROUPS = st.integers(1, 60).flatmap(
    lambda samples: st.tuples(
        st.lists(st.integers(0, 4), min_size=samples, max_size=samples),
        st.lists(st.one_of(st.integers(0, 9), st.floats(0.01, 1e300)), min_size=5, max_size=5),
    ).filter(lambda drawn: any(drawn[1][group] for group in drawn[0]))
)


@settings(max_examples=50)
@given(groups=GROUPS, size=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_samples_and_groups_come_as_often_as_their_weights_say(groups, size, seed, epoch) -> None:
    members, weights = np.array(groups[0]), np.array(groups[1], float)
    found = Draws(members, weights, size).of_epoch(seed, epoch)
    assert (np.diff(found) >= 0).all()
    counts = np.bincount(found, minlength=len(members))
    scaled = weights[members] / weights[members].max()
    expected = size * scaled / scaled.sum()
    assert counts.sum() == size
    assert (np.abs(counts - expected) < 1 + 1e-6).all()
    assert not counts[weights[members] == 0].any()
    by_group = (np.bincount(members, values, minlength=5) for values in (counts, expected))
    assert (np.abs(np.subtract(*by_group)) < 1 + 1e-6).all()


@settings(max_examples=50)
@given(groups=GROUPS, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_without_replacement_no_sample_comes_twice_and_more_would_bend_the_proportions(groups, seed, epoch) -> None:
    members, weights = np.array(groups[0]), np.array(groups[1], float)
    draws = Draws(members, weights, None, replacement=False)
    found = draws.of_epoch(seed, epoch)
    assert len(set(found.tolist())) == len(found) == draws.size
    with pytest.raises(
        ConfigError, match=f"epoch_size = {draws.size + 1} without replacement: .* at most {draws.size}"
    ):
        Draws(members, weights, draws.size + 1, replacement=False)


@settings(max_examples=50)
@given(samples=st.integers(1, 80), size=st.integers(1, 200), seed=st.integers(0, 2**40), epochs=st.integers(1, 12))
def test_epochs_go_on_through_the_samples(samples: int, size: int, seed: int, epochs: int) -> None:
    draws = Draws(np.zeros(samples, np.int64), np.ones(1), size)
    found = np.concatenate([draws.of_epoch(seed, epoch) for epoch in range(epochs)])
    counts = np.bincount(found, minlength=samples)
    assert counts.max() - counts.min() <= 1


def test_random_points_draw_each_sample_with_its_weight() -> None:
    draws, epochs = Draws(np.arange(4), np.array([1.0, 2, 3, 4]), 3), 4000
    counts = np.bincount(np.concatenate([draws.of_epoch(7, epoch) for epoch in range(epochs)]), minlength=4)
    assert np.abs(counts - epochs * 3 * np.arange(1, 5) / 10).max() < 5 * (epochs / 4) ** 0.5


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=80).filter(any),
    streams=st.sampled_from([1, 2, 4]),
    batch_size=st.integers(1, 20),
    count=st.integers(1, 4),
)
def test_an_order_of_drawn_samples_has_each_as_often_whoever_takes_them(counts, streams, batch_size, count) -> None:
    drawn = np.repeat(np.arange(len(counts)), counts)
    size, sizes = len(drawn), Sizes(4, 2, 8, streams, 8)
    order = EpochOrder(size, sizes, 1, 2, True, drawn.copy())
    found = order.take(0, size)
    assert np.bincount(found, minlength=len(counts)).tolist() == counts
    shares = [Share(rank, count, batch_size) for rank in range(count)]
    for start in range(0, size, count * batch_size):
        parts = [order.part(start, share) for share in shares]
        real = np.concatenate([part[:kept] for part, kept in parts])
        assert sorted(real) == sorted(found[start : start + count * batch_size])
    firsts, ends = order.chunks_of(order.streams_cut(0, size, 0, size), 0, size)
    assert sorted(firsts.tolist()) == drawn.tolist()
    assert (ends == firsts + 1).all()


def test_copies_of_a_sample_are_far_apart() -> None:
    """Each has its place among the chunks of the stream, instead of one beside the other in the same window."""
    drawn = np.repeat(np.arange(1000), 4)
    found = EpochOrder(4000, Sizes(8, 2, 512, 1, 512), 0, 0, True, drawn).take(0, 4000)
    places = np.argsort(found, kind="stable").reshape(1000, 4)
    assert np.diff(places, axis=1).mean() > 600  # of random places: 800


CASES: list[dict[str, Any]] = [
    {"balance": "class"},
    {"balance": "class", "replacement": False},
    {"weights": {"a": 1, "c": 5.5}},
    {"weights": "weight"},
    {"weights": "weight", "replacement": False},
    {"weights": {0: 0, 2: 3}, "epoch_size": 100},
    {"weights": (STORED["sample_id"][::3], np.linspace(0, 4, len(STORED["sample_id"][::3])))},
    {"epoch_size": 50},
    {"repeat": 3},
]


@pytest.mark.parametrize("options", CASES)
def test_each_step_is_the_same_for_any_number_of_workers_and_what_is_resumed_is_the_whole(version, options) -> None:
    (alone,) = workers(version, 1, **options, batch_size=24)
    epochs = [run([alone]) for _ in range(3)]
    for count in (2, 3):
        streams = workers(version, count, **options, batch_size=24 // count)
        assert [run(streams) for _ in range(3)] == epochs
    found: list[list[int]] = []
    state = None
    for count, steps in ((3, 1), (1, 2), (2, 1), (3, None)):
        streams = workers(version, count, state, **options, batch_size=2)
        found += run(streams, steps)
        state = streams[0].state_dict()
    assert state is not None
    assert state["epoch"] == 1
    assert sorted(i for step in found for i in step) == sorted(i for step in epochs[0] for i in step)


@pytest.mark.parametrize("options", CASES)
def test_what_is_delivered_is_what_the_distribution_says(version, options) -> None:
    (stream,) = workers(version, 1, **options)
    for _ in range(2):
        told = stream.distribution()
        assert list(told["natural"].values()) == CLASSES.tolist()
        counts = np.bincount(STORED["label"], times(run([stream])), minlength=4)
        assert list(told["epoch"].values()) == counts.tolist()


def test_balanced_classes_come_equally_often(version) -> None:
    (stream,) = workers(version, 1, balance="class", epoch_size=301)
    assert sorted(stream.distribution()["epoch"].values()) in ([0, 100, 100, 101], [0, 100, 101, 100])
    counts = times(run([stream]))
    for number in range(3):
        own = counts[STORED["label"] == number]
        assert own.max() - own.min() <= 1
    (stream,) = workers(version, 1, balance="class", replacement=False)
    assert list(stream.distribution()["epoch"].values()) == [CLASSES[2]] * 3 + [0]


def test_weights_of_ids_are_those_of_samples(version) -> None:
    hard = STORED["sample_id"][[3, 77, 150]]
    (stream,) = workers(version, 1, weights=(hard.tolist(), [5, 5, 0]))
    counts = times(run([stream]))
    scale = SAMPLES / (SAMPLES + 2 * 4 - 1)
    assert counts[150] == 0
    assert all(abs(counts[at] - 5 * scale) < 1 for at in (3, 77))
    assert abs(counts.sum() - counts[[3, 77]].sum() - (SAMPLES - 3) * scale) <= 2


def test_stored_weights_draw_as_the_same_ones_given_by_id(version) -> None:
    ids, weights = STORED["sample_id"], STORED["weight"]
    (stored,), (given_by_id,) = workers(version, 1, weights="weight"), workers(version, 1, weights=(ids, weights))
    assert stored.state_dict() == given_by_id.state_dict()
    assert run([stored]) == run([given_by_id])


def test_weights_are_delivered_where_they_are_named(version) -> None:
    (usual,), (named,) = workers(version, 1, columns=None), workers(version, 1, columns=["weight", "sample_id"])
    assert set(next(iter(usual))) == {"features", "label", "sample_id", "mask"}
    place = {int(sample): at for at, sample in enumerate(STORED["sample_id"])}
    for batch in named:
        assert batch["weight"].dtype == np.float32
        assert batch["weight"].tolist() == STORED["weight"][[place[i] for i in batch["sample_id"].tolist()]].tolist()


def test_the_distribution_by_weight_has_each_weight_or_ten_ranges_of_them(version, tmp_path: Path) -> None:
    (stream,) = workers(version, 1, weights="weight", epoch_size=500)
    told, counts = stream.distribution("weight"), times(run([stream]))
    assert len(told["natural"]) == 10
    assert sum(told["natural"].values()) == SAMPLES
    for name, natural in told["natural"].items():
        low, _, high = name.partition(" – ")
        own = (STORED["weight"] >= np.float32(low)) & (STORED["weight"] <= np.float32(high or low))
        assert (natural, told["epoch"][name]) == (own.sum(), counts[own].sum())
    few = {**STORED, "weight": np.arange(SAMPLES, dtype=np.float32) % 3}
    (stream,) = workers(publish(str(tmp_path), {"train": [few]}, batch_size=10), 1, weights="weight")
    assert list(stream.distribution("weight")["natural"]) == ["0", "1", "2"]
    assert stream.distribution("weight")["epoch"]["0"] == 0


def test_stored_weights_that_are_missing_or_wrong_are_refused(tmp_path: Path) -> None:
    bare = {name: values for name, values in STORED.items() if name != "weight"}
    uri = publish(str(tmp_path / "bare"), {"train": [bare]}, batch_size=10)
    with pytest.raises(ConfigError, match="has no weights: make the copy with --weight COLUMN, or give weights by"):
        workers(uri, 1, weights="weight")
    with pytest.raises(ConfigError, match=r"columns = \['weight'\]: give a list of some of 'features', 'label', 's"):
        workers(uri, 1, columns=["weight"])
    (stream,) = workers(uri, 1)
    with pytest.raises(ConfigError, match="has no weights"):
        stream.distribution("weight")
    for number, (value, error, message) in enumerate(
        [
            (0, ConfigError, "weights of all 220 samples are 0"),
            (-1, CorruptVersion, "weight -1.0 of a sample is no finite number of 0 or more: publish"),
            (float("nan"), CorruptVersion, "weight nan of a sample is no finite number"),
        ]
    ):
        odd = {**STORED, "weight": np.full(SAMPLES, value, np.float32)}
        uri = publish(str(tmp_path / f"{number}"), {"train": [odd]}, batch_size=10)
        with pytest.raises(error, match=message):
            workers(uri, 1, weights="weight")


def test_without_weights_nothing_changes(version) -> None:
    (plain,), (same,) = workers(version, 1), workers(version, 1, replacement=False)
    assert plain.state_dict() == same.state_dict()
    assert list(plain.state_dict()) == [
        *("dataset", "version", "split", "samples", "seed", "batch_size", "shuffle", "remainder", "order"),
        *("epoch", "batches"),
    ]
    assert plain.distribution()["epoch"] == plain.distribution()["natural"]
    (stored,) = workers(version, 1, repeat=2, shuffle=False)
    found = np.concatenate([batch["sample_id"][batch["mask"]] for batch in stored])
    assert np.array_equal(found, np.tile(STORED["sample_id"], 2))


@pytest.mark.parametrize(
    ("saved", "opened", "message"),
    [
        ({"balance": "class"}, {"weights": {"a": 2}}, r"weights '\w+' \(here '\w+'\)"),
        ({"balance": "class"}, {}, r"epoch_size 220 \(here none\), replacement True \(here none\), weights '\w+'"),
        ({"epoch_size": 60}, {"epoch_size": 61}, r"epoch_size 60 \(here 61\)"),
        ({}, {"repeat": 2}, "the state lacks epoch_size, replacement, weights"),
        ({"weights": {"a": 2}}, {"weights": {"a": 2.1}}, "weights"),
    ],
)
def test_a_state_of_other_weights_is_refused(version, saved, opened, message: str) -> None:
    (stream,) = workers(version, 1, **saved)
    with pytest.raises(InputError, match=message):
        workers(version, 1, stream.state_dict(), **opened)


UNKNOWN = int(STORED["sample_id"].max()) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": -1}}, "weights of class 'a' = -1: use finite numbers, 0 or more"),
        ({"weights": {"a": float("nan")}}, "weights of class 'a' = nan: use finite"),
        ({"weights": {"a": float("inf")}}, "weights of class 'a' = inf: use finite"),
        ({"weights": {"a": "2"}}, "weights of class 'a' = '2': use finite"),
        ({"weights": {"e": 1}}, "weights of class 'e': there is no such class; use some of 'a', 'b', 'c', 'd'"),
        ({"weights": {4: 1}}, "weights of class 4: there is no such class"),
        ({"weights": {"a": 0, "b": 0, "c": 0}}, "weights of all 220 samples are 0: give some"),
        ({"weights": 5}, r"weights = 5: give a mapping of classes to weights, or \(ids, weights\)"),
        ({"weights": ([1, 2], [1])}, r"weights of ids of shape \(2,\)"),
        ({"weights": ([1.5], [1])}, "type float64: give"),
        ({"weights": (["x"], ["y"])}, r"weights: give a mapping .* \(could not convert"),
        ({"weights": ([1], [-1])}, "weights of id 1 = -1.0: use finite"),
        ({"weights": ([1], [float("nan")])}, "weights of id 1 = nan: use finite"),
        ({"weights": ([1, 1], [1, 1])}, "weights of id 1: it is there twice"),
        ({"weights": ([UNKNOWN], [1])}, rf"weights of id {UNKNOWN}: split 'train' of .* \(1 of 1 ids are unknown\)"),
        ({"weights": (STORED["sample_id"], np.zeros(SAMPLES))}, "weights of all 220 samples are 0"),
        ({"weights": "w"}, r"weights = 'w': give a mapping .* or 'weight' for the stored weights"),
        ({"weights": "weight", "balance": "class"}, "balance and weights: give one of them"),
        ({"balance": "label"}, "balance = 'label': use 'class'"),
        ({"balance": "class", "weights": {"a": 1}}, "balance and weights: give one of them"),
        ({"replacement": 1}, "replacement = 1: use True or False"),
        ({"repeat": 0}, "repeat = 0: give how often"),
        ({"epoch_size": 0}, "epoch_size = 0: an epoch has at least one sample"),
        ({"epoch_size": 10, "repeat": 2}, "epoch_size = 10 and repeat = 2: give one"),
        (
            {"epoch_size": 10**15},
            "an epoch of 1,000,000,000,000,000 drawn samples takes 8 bytes each, more than memory",
        ),
        ({"epoch_size": 221, "replacement": False}, "epoch_size = 221 without replacement: .* use at most 220"),
        ({"epoch_size": 4, "remainder": "drop"}, "split 'train' has 4 samples"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(version, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        workers(version, 1, **options)


def test_labels_that_are_none_or_wrong_are_refused(tmp_path: Path) -> None:
    samples = table_samples(10)
    wrong = publish(str(tmp_path / "wrong"), {"train": [{**samples, "label": samples["label"] + 3}]}, batch_size=5)
    with pytest.raises(CorruptVersion, match="label 4 is none of 4 classes: publish a new version"):
        TrainingStream(wrong, batch_size=2, balance="class")
    del samples["label"]
    bare = publish(str(tmp_path / "bare"), {"train": [samples]}, batch_size=5)
    with pytest.raises(ConfigError, match="has no labels, not classes: give weights by id"):
        TrainingStream(bare, batch_size=2, balance="class")
    with TrainingStream(bare, batch_size=2, as_numpy=True, weights=([], [])) as stream:
        assert sum(len(batch["sample_id"]) for batch in stream) == 10
        with pytest.raises(ConfigError, match="has no labels"):
            stream.distribution()


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_several_labels_are_delivered_and_are_no_classes_to_balance(tmp_path: Path, dtype: type) -> None:
    samples = table_samples(30)
    samples["label"] = np.random.default_rng(0).integers(0, 4, (30, 3)).astype(dtype)
    uri = publish(str(tmp_path), {"train": cut(samples, 20, 10)}, batch_size=5)
    with TrainingStream(uri, batch_size=8, as_numpy=True) as stream:
        batches = [{name: values[batch["mask"]] for name, values in batch.items()} for batch in stream]
    place = {number: row for row, number in enumerate(samples["sample_id"].tolist())}
    order = [place[number] for batch in batches for number in batch["sample_id"].tolist()]
    found = np.concatenate([batch["label"] for batch in batches])
    assert (sorted(order), found.dtype) == (list(range(30)), dtype)
    assert np.array_equal(found, samples["label"][order])
    options: list[dict[str, Any]] = [{"balance": "class"}, {"weights": {"a": 2}}]
    for option in options:
        with pytest.raises(ConfigError, match="has several labels each, not classes: give weights by id"):
            TrainingStream(uri, batch_size=8, **option)
    with pytest.raises(ConfigError, match=r"mixup = 0\.2: it mixes classes, and the version has several labels"):
        TrainingStream(uri, batch_size=8, mixup=0.2)


def test_weights_of_a_version_on_s3_read_its_labels_only(s3_root: str, tmp_path: Path) -> None:
    uri = publish(s3_root, {"train": cut(STORED, *FILES)}, batch_size=10)
    (stream,) = workers(uri, 1, balance="class", cache_dir=tmp_path)
    assert stream.stats.cache_misses == 0
    assert len(set(np.bincount(STORED["label"], times(run([stream])))[:3].astype(int) // 73)) == 1
    assert stream.sample(index=3)["sample_id"] == STORED["sample_id"][3]
    stream.close()


def test_a_sample_is_looked_up_by_id_and_by_number(version) -> None:
    (stream,) = workers(version, 1, columns=None, normalise=False)
    iteration = iter(stream)
    next(iteration)
    for at in (0, 99, SAMPLES - 1):
        for found in (stream.sample(int(STORED["sample_id"][at])), stream.sample(index=np.int64(at))):
            assert found.keys() == STORED.keys() - {"weight"}
            assert np.array_equal(found["features"], STORED["features"][at])
            assert (found["label"], found["sample_id"]) == (STORED["label"][at], STORED["sample_id"][at])
    assert len(list(iteration)) == len(stream) - 1  # the iteration goes on
    for arguments, message in (
        ({"sample_id": UNKNOWN}, f"sample_id = {UNKNOWN}: split 'train' of .*v1 has no such sample; give one"),
        ({"sample_id": "x"}, "sample_id = 'x': ids are of int64"),
        ({"index": SAMPLES}, "index = 220: split 'train' of .*v1 has samples 0 to 219"),
        ({"index": -1}, "index = -1: split"),
        ({}, "give either an id or index="),
        ({"sample_id": 1, "index": 1}, "give either an id or index="),
    ):
        with pytest.raises(InputError, match=message):
            stream.sample(**arguments)
    stream.close()
    with pytest.raises(PipelineError, match="the stream is closed"):
        stream.sample(index=0)


def test_a_looked_up_image_is_a_normalised_tensor(tmp_path: Path) -> None:
    stream = TrainingStream(image_version(str(tmp_path), 12), batch_size=4, device="cpu")
    ids = image_samples(12)["sample_id"]
    expected = {int(i): image for batch in stream for i, image in zip(batch["sample_id"], batch["image"], strict=True)}
    kept = [stream.sample(int(sample))["image"] for sample in ids]
    for sample, image in zip(ids, kept, strict=True):
        assert image.dtype == torch.float32
        assert torch.equal(image, expected[int(sample)])


def test_a_damaged_sample_is_not_returned(tmp_path: Path) -> None:
    samples = table_samples(60)
    version = publish(str(tmp_path), {"train": [samples]}, batch_size=10)
    part = "split=train/part-00000-a1.parquet"
    damage(version, part, (Path(version) / part).read_bytes().index(samples["features"][0].tobytes()))
    (stream,) = workers(version, 1)
    assert stream.sample(index=10)["sample_id"] == samples["sample_id"][10]
    with pytest.raises(CorruptVersion, match=f"{part}: batch 0 has not the checksum"):
        stream.sample(index=9)
    (stream,) = workers(version, 1, on_corrupt="skip")
    with pytest.raises(CorruptVersion, match=r"sample 9 of .*v1 is damaged or missing"):
        stream.sample(int(samples["sample_id"][9]))
