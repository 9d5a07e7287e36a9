from __future__ import annotations

import math
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from tasks.images.config import Augmentation, Centred
from tasks.images.draws import draw, policy_seeds
from tasks.images.kernel import FusedEngine
from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, InputError
from tasks.loader.mixed import MixedStream
from tasks.loader.shards import Joined
from tasks.loader.stream import TrainingStream
from tests.conftest import new_bucket
from tests.delivery.making import damage, image_samples, publish, table_samples, table_version
from tests.images import policies

SHAPE = (3, 12, 10)
FILES = [7 + number % 3 for number in range(17)]
"""Samples of files, of which a version has so many that its order has two streams."""
SAMPLES = sum(FILES)
AUGMENTATION = Augmentation(size=8, degrees=30)
RAW: dict[str, Any] = {"as_numpy": True, "normalise": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pictures(str(tmp_path_factory.mktemp("root")), FILES)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return table_version(str(tmp_path_factory.mktemp("root")), 40, 1, 23, batch_size=10)


def pictures(root: str, files: list[int], **options: Any) -> str:
    return publish(root, {"train": [image_samples(count, n, SHAPE) for n, count in enumerate(files)]}, **options)


def originals(files: list[int] = FILES) -> dict[int, tuple[np.ndarray, int]]:
    """Picture and label of each sample of `pictures`."""
    found = {}
    for number, count in enumerate(files):
        made = image_samples(count, number, SHAPE)
        found |= dict(
            zip(made["sample_id"].tolist(), zip(made["image"], made["label"].tolist(), strict=True), strict=True)
        )
    return found


def delivered(streams: list[Any], steps: int | None = None) -> list[dict[str, Any]]:
    """Real samples of the workers, one by one, in the order of the steps."""
    found = []
    for step, batches in enumerate(zip(*streams, strict=True)):
        for batch in batches:
            names = batch.keys() - {"mask"}
            found += [{name: batch[name][row] for name in names} for row in np.flatnonzero(batch["mask"])]
        if steps is not None and step + 1 == steps:
            break
    return found


def opened(uri: str, count: int = 1, batch_size: int = 16, **options: Any) -> list[TrainingStream]:
    options = {**RAW, "batch_size": batch_size, "world_size": count, **options}
    return [TrainingStream(uri, rank=rank, **options) for rank in range(count)]


def by_id(samples: list[dict[str, Any]], column: str = "image") -> dict[int, tuple[bytes, bytes]]:
    found = {int(one["sample_id"]): (one[column].tobytes(), one["label"].tobytes()) for one in samples}
    assert len(found) == len(samples), "a sample came twice"
    return found


def key(seed: int, epoch: int, sample: int, copy: int = 0) -> int:
    """The key of a sample's draws, by whole numbers of Python: splitmix64 over seed, epoch, 6, id and copy."""
    most, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mixed(value: int) -> int:
        value &= most
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & most
        value = (value ^ value >> 27) * 0x94D049BB133111EB & most
        return value ^ value >> 31

    state = mixed(seed + golden)
    for part in (epoch, 6, sample & most, copy):
        state = mixed((state ^ part) + golden)
    return state


def by_kernel(picture: np.ndarray, key: int, augmentation: Augmentation = AUGMENTATION) -> np.ndarray:
    """The first variant that the flow's kernel makes of a picture."""
    one = augmentation.model_copy(update={"variants": 1})
    pixels = np.zeros((*SHAPE[1:], 4), np.uint8)
    pixels[:, :, :3] = picture.transpose(1, 2, 0)
    draws = draw(np.array([key], np.uint64), np.array([SHAPE[1]]), np.array([SHAPE[2]]), one)
    out = np.empty((1, 3, augmentation.size, augmentation.size), np.uint8)
    FusedEngine(one).augment(pixels, draws, 0, out, np.empty((1, 2), np.float32))
    return out[0]


# --- the same pixels whatever delivers them ---


@settings(max_examples=15)
@given(
    count=st.integers(1, 4),
    batch_size=st.integers(1, 40),
    prefetch=st.integers(0, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 3),
)
def test_each_picture_is_what_the_kernel_makes_by_its_key(
    images: str, *, count, batch_size, prefetch, threads, seed, epoch
) -> None:
    streams = opened(
        images, count, batch_size, prefetch=prefetch, seed=seed, transform=AUGMENTATION, transform_threads=threads
    )
    for stream in streams:
        stream.set_epoch(epoch)
    found = {int(one["sample_id"]): one for one in delivered(streams)}
    expected = originals()
    assert found.keys() == expected.keys()
    for sample, one in found.items():
        picture, label = expected[sample]
        np.testing.assert_array_equal(one["image"], by_kernel(picture, key(seed, epoch, sample)))
        assert one["label"] == label


def noisy(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return values + generator.integers(0, 100, values.shape).astype(values.dtype)


TRANSFORMS: dict[str, dict[str, Any]] = {
    "kernel": {"transform": AUGMENTATION},
    "torchvision": {"transform": v2.Compose([v2.RandomResizedCrop(8), v2.ColorJitter(0.9)])},
    "torchvision in threads": {"transform": v2.RandomAffine(40, (0.2, 0.2)), "transform_threads": 3},
    "function": {"transform": noisy},
    "mixup": {"mixup": 0.4},
    "both": {"transform": AUGMENTATION, "mixup": 0.4, "cutmix": 1.0},
}


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_any_number_of_workers_delivers_the_same_samples_anew_in_each_epoch(images: str, options) -> None:
    epochs = [by_id(delivered(opened(images, **options))) for _ in range(2)]
    assert epochs[0] == epochs[1]
    for count, batch_size in ((2, 8), (3, 5), (4, 16), (1, 1)):
        streams = opened(images, count, batch_size, **options)
        assert by_id(delivered(streams)) == epochs[0]
        again = by_id(delivered(streams))
        changed = sum(again[sample] != epochs[0][sample] for sample in again)
        assert changed > 0.9 * SAMPLES


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_resumed_stream_goes_on_with_the_same_samples(images: str, options) -> None:
    whole = opened(images, **options)
    epochs = [by_id(delivered(whole)), by_id(delivered(whole))]
    first = opened(images, 2, **options)
    before = by_id(delivered(first, steps=2))
    rest = opened(images, 3, **options)
    for stream in rest:
        stream.load_state_dict(first[0].state_dict())
    after = by_id(delivered(rest))
    assert not before.keys() & after.keys()
    assert before | after == epochs[0]
    assert by_id(delivered(rest)) == epochs[1]


def test_copies_of_a_drawn_sample_have_draws_of_their_own(images: str) -> None:
    for options in ({"weights": {"a": 40.0}}, {"repeat": 3}):
        streams = opened(images, 2, transform=AUGMENTATION, **options)
        found: dict[int, list[bytes]] = {}
        for one in delivered(streams):
            found.setdefault(int(one["sample_id"]), []).append(one["image"].tobytes())
        assert max(map(len, found.values())) > 2
        for sample, copies in list(found.items())[:20]:
            again = [streams[0].sample(sample, epoch=0, copy=copy)["image"].tobytes() for copy in range(len(copies))]
            assert sorted(copies) == sorted(again)


# --- functions and torchvision ---


def test_torchvision_draws_as_after_a_seed_of_torch(images: str) -> None:
    transform = v2.Compose(
        [v2.RandomResizedCrop(8), v2.RandAugment(), v2.RandomErasing(), v2.ToDtype(torch.float32), v2.GaussianNoise()]
    )
    expected = originals()
    before = torch.random.get_rng_state()
    for one in delivered(opened(images, transform=transform))[:40]:
        sample = int(one["sample_id"])
        seed = policy_seeds(np.array([key(0, 0, sample)], np.uint64), 1)
        with torch.random.fork_rng([]):
            torch.manual_seed(int(seed[0]))
            wanted = transform(torch.from_numpy(expected[sample][0]))
        np.testing.assert_array_equal(one["image"], wanted.numpy())
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_training_draws_as_if_there_were_no_transform(images: str) -> None:
    """Dropout and transforms draw at the same time, in their threads."""
    torch.manual_seed(3)
    wanted = [torch.rand(5) for _ in range(SAMPLES)]
    transform = v2.RandomResizedCrop(8)
    expected = by_id(delivered(opened(images, transform=transform)))
    torch.manual_seed(3)
    found = []
    (stream,) = opened(images, transform=transform, batch_size=1, prefetch=8)
    samples = []
    for batch in stream:
        found.append(torch.rand(5))
        samples.append({name: values[0] for name, values in batch.items()})
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    assert by_id(samples) == expected


def test_a_function_gets_rows_of_a_table_and_a_generator(table: str) -> None:
    def function(row: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return row + generator.normal(size=row.shape)  # float64

    def by_torch(row: torch.Tensor) -> torch.Tensor:
        return row.double() + torch.randn_like(row)

    rows = {**dict(zip(*(table_samples(64)[name].tolist() for name in ("sample_id", "features")), strict=True))}
    for transform in (function, by_torch):
        found = delivered(opened(table, 2, transform=transform))
        gaps = np.stack([one["features"] - np.array(rows[int(one["sample_id"])], np.float32) for one in found])
        assert found[0]["features"].dtype == np.float32
        assert 0.7 < gaps.std() < 1.3
        assert len(np.unique(gaps.round(4))) > 150
        plain, normalised = (
            by_id(delivered(opened(table, transform=transform, normalise=one)), "features") for one in (False, True)
        )
        (stream,) = opened(table)
        mean, std = (np.array(stream.definition["normalise"][name], np.float32) for name in ("mean", "std"))
        for sample, (row, _) in plain.items():
            wanted = (np.frombuffer(row, np.float32) - mean) / std
            np.testing.assert_allclose(np.frombuffer(normalised[sample][0], np.float32), wanted, rtol=1e-6)


def test_bytes_are_normalised_and_floats_are_as_the_transform_gives_them(images: str) -> None:
    expected = originals()
    for one in delivered(opened(images, transform=lambda picture: picture.flip(-1), normalise=True)):
        (stream,) = opened(images)
        constants = stream.definition["normalise"]
        mean, std = (np.array(constants[name], np.float32)[:, None, None] for name in ("mean", "std"))
        flipped = expected[int(one["sample_id"])][0][:, :, ::-1]
        np.testing.assert_allclose(one["image"], (flipped / np.float32(255) - mean) / std, atol=1e-5)
        break
    scaled = v2.ToDtype(torch.float32, scale=True)
    (stream,) = opened(images, transform=scaled, normalise=True, as_numpy=False, device="cpu", channels_last=True)
    batch = next(iter(stream))
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    for picture, sample in zip(batch["image"], batch["sample_id"], strict=True):
        np.testing.assert_allclose(picture, expected[int(sample)][0] / np.float32(255), rtol=1e-6)


def test_an_evaluation_takes_the_middle_without_draws(images: str) -> None:
    centred = Centred(size=8)
    streams = opened(images, transform=centred)
    first, second = by_id(delivered(streams)), by_id(delivered(streams))
    assert first == second
    sample, (picture, _) = next(iter(originals().items()))
    assert first[sample][0] == by_kernel(picture, 0, centred).tobytes()


def test_a_policy_is_seeded_as_a_transform(images: str) -> None:
    policy = Augmentation(size=policies.SIZE, policy="tests.images.policies:transform")
    named = by_id(delivered(opened(images, transform=policy), steps=2))
    assert named == by_id(delivered(opened(images, transform=policies.transform), steps=2))


# --- mixtures ---


def partners(uri: str, seed: int) -> dict[int, int]:
    """Partner of each sample, by its position in the order of two streams."""
    order = [int(one["sample_id"]) for one in delivered(opened(uri, batch_size=1, seed=seed))]
    return {sample: order[at ^ 2] if at ^ 2 < len(order) else sample for at, sample in enumerate(order)}


@settings(max_examples=12)
@given(
    mixup=st.sampled_from([0, 0.2, 1, 8]),
    cutmix=st.sampled_from([0, 0.3, 1]),
    count=st.integers(1, 4),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_a_mixture_is_of_a_sample_and_its_partner(images: str, *, mixup, cutmix, count, batch_size, seed) -> None:
    if not mixup and not cutmix:
        mixup = 1
    expected, pairs = originals(), partners(images, seed)
    found = delivered(opened(images, count, batch_size, seed=seed, mixup=mixup, cutmix=cutmix))
    assert len(found) == SAMPLES
    weights, boxed = {}, 0
    for one in found:
        sample = int(one["sample_id"])
        (own, label), (other, second) = expected[sample], expected[pairs[sample]]
        soft = one["label"]
        assert soft.dtype == np.float32
        assert soft.shape == (4,)
        assert soft.sum() == pytest.approx(1, abs=1e-6)
        assert set(np.flatnonzero(soft)) <= {label, second}
        if label == second:
            continue
        weight = weights[sample] = float(soft[label])
        blend = own * np.float32(weight) + other * np.float32(1 - weight)
        is_blend = (abs(one["image"] - blend) <= 0.51).all()
        from_own, from_other = (one["image"] == own).all(axis=0), (one["image"] == other).all(axis=0)
        is_boxed = (from_own | from_other).all() and abs(from_own.mean() - weight) < 0.02
        boxed += bool(is_boxed and not is_blend)
        assert (mixup and is_blend) or (cutmix and is_boxed)
    for sample, weight in weights.items():
        assert weight == pytest.approx(weights[pairs[sample]], abs=1e-6)
    if not mixup and cutmix == 1:
        assert boxed > SAMPLES / 5
    if mixup == 8 and not cutmix:
        assert np.mean(list(weights.values())) == pytest.approx(0.5, abs=0.1)


def test_a_worker_reads_few_samples_more_for_its_partners(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    gather = Joined.gather

    def counted(joined: Joined, index: np.ndarray, parts: np.ndarray, *arguments: Any) -> None:
        read.append(int(parts[:, 2].sum()))
        gather(joined, index, parts, *arguments)

    monkeypatch.setattr(Joined, "gather", counted)
    for batch_size in (16, 17):
        read.clear()
        delivered(opened(images, 2, batch_size, mixup=1.0))
        assert max(read) <= batch_size + 4  # two streams


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_batches_before_a_damaged_one_are_delivered(tmp_path, prefetch: int, threads: int) -> None:
    uri = pictures(str(tmp_path), [10])
    place, picture = "split=train/part-00000-a1.parquet", image_samples(10, 0, SHAPE)["image"][7]
    damage(uri, place, storage.read_bytes(f"{uri}/{place}").index(picture.tobytes()) + 9)
    options = {"shuffle": False, "transform": AUGMENTATION, "transform_threads": threads, "prefetch": prefetch}
    (stream,) = opened(uri, batch_size=2, **options)
    found: list[np.ndarray] = []
    with stream, pytest.raises(CorruptVersion, match="batch 7 has not the checksum"):
        found.extend(batch["image"].copy() for batch in stream)
    assert len(found) == 3
    for sample, made in zip(image_samples(10, 0, SHAPE)["sample_id"].tolist(), np.concatenate(found), strict=False):
        np.testing.assert_array_equal(made, by_kernel(originals([10])[sample][0], key(0, 0, sample)))


def test_the_partner_of_a_damaged_sample_has_none(tmp_path) -> None:
    uri = pictures(str(tmp_path), [10])
    place = "split=train/part-00000-a1.parquet"
    data = storage.read_bytes(f"{uri}/{place}")
    for picture in image_samples(10, 0, SHAPE)["image"][2:5]:
        damage(uri, place, data.index(picture.tobytes()) + 9)
    expected = originals([10])
    ways = ((1, 10), (2, 3), (1, 1))
    runs = [by_id(delivered(opened(uri, *way, mixup=1.0, on_corrupt="skip"))) for way in ways]
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) == 7
    alone = [sample for sample, (image, _) in runs[0].items() if image == expected[sample][0].tobytes()]
    assert alone
    for sample in alone:
        assert np.frombuffer(runs[0][sample][1], np.float32).max() == 1


def test_rows_of_a_table_are_blended(table: str) -> None:
    rows = dict(zip(*(table_samples(64)[name].tolist() for name in ("sample_id", "features")), strict=True))
    labels = dict(zip(*(table_samples(64)[name].tolist() for name in ("sample_id", "label")), strict=True))
    order = [int(one["sample_id"]) for one in delivered(opened(table, batch_size=1))]
    for one in delivered(opened(table, 3, mixup=1.0)):
        at = order.index(int(one["sample_id"]))
        own, other = order[at], order[at ^ 1]
        if labels[own] != labels[other]:
            weight = one["label"][labels[own]]
            wanted = weight * np.array(rows[own]) + (1 - weight) * np.array(rows[other])
            np.testing.assert_allclose(one["features"], wanted, rtol=1e-4, atol=1e-4)


# --- several versions, look-ups, states ---


def test_workers_of_a_mix_deliver_the_same_samples(tmp_path) -> None:
    uris = [pictures(str(tmp_path), [30]), pictures(str(tmp_path), [11])]
    runs = []
    for count, batch_size in ((1, 12), (3, 4), (2, 6)):
        streams: list[Any] = [
            MixedStream(
                {uris[0]: 1, uris[1]: 1}, batch_size=batch_size, stop="all", rank=rank, world_size=count,
                transform=AUGMENTATION, mixup=0.5, cutmix=0.5, **RAW,
            )
            for rank in range(count)
        ]  # fmt: skip
        found = delivered(streams)
        runs.append(sorted((int(one["source"]), one["image"].tobytes(), one["label"].tobytes()) for one in found))
    assert runs[0] == runs[1] == runs[2]
    assert len({image for _, image, _ in runs[0]}) == len(runs[0]), "the repeated samples look the same"
    stream = MixedStream({uris[0]: 1, uris[1]: 1}, batch_size=10, stop="all", transform=AUGMENTATION, **RAW)
    for number, uri in enumerate(uris):
        stream.set_epoch(0)
        one = next(one for one in delivered([stream]) if one["source"] == number)
        np.testing.assert_array_equal(stream.sample(uri, int(one["sample_id"]), epoch=0)["image"], one["image"])


def test_files_of_a_bucket_are_mixed_as_local_ones(images: str, s3_url: str, tmp_path) -> None:
    remote = pictures(new_bucket(s3_url), FILES)
    options = {"transform": AUGMENTATION, "mixup": 0.5}
    streams = opened(remote, 2, 9, cache_dir=tmp_path, **options)
    assert by_id(delivered(streams)) == by_id(delivered(opened(images, **options)))


def test_a_look_up_shows_what_a_step_saw(images: str) -> None:
    (stream,) = opened(images, transform=AUGMENTATION, columns=["image", "label"], normalise=True)
    (ids,) = opened(images)
    stream.set_epoch(2)
    ids.set_epoch(2)
    batch, names = next(iter(stream)), next(iter(ids))["sample_id"]
    assert batch.keys() == {"image", "label", "mask"}
    shown = stream.sample(int(names[5]), epoch=2)
    assert shown.keys() == {"image", "label"}
    np.testing.assert_array_equal(shown["image"], batch["image"][5])
    assert stream.sample(int(names[5]))["image"].shape == SHAPE
    assert stream.sample(int(names[5]), epoch=3)["image"].tobytes() != shown["image"].tobytes()
    assert ids.sample(int(names[5]))["image"].tobytes() == originals()[int(names[5])][0].tobytes()
    with pytest.raises(ConfigError, match="epoch = 2: without a transform a sample is the same in each"):
        ids.sample(int(names[5]), epoch=2)


def test_states_hold_what_identifies_the_transform_and_nothing_else(images: str) -> None:
    plain, function, kernel, mixed = (
        opened(images, **options)[0].state_dict()
        for options in ({}, {"transform": noisy}, {"transform": AUGMENTATION}, {"mixup": 0.2, "cutmix": 1})
    )
    assert plain == function
    assert kernel.keys() - plain.keys() == {"augmentation"}
    assert {name: mixed[name] for name in mixed.keys() - plain.keys()} == {"mixup": 0.2, "cutmix": 1.0}
    alike = AUGMENTATION.model_copy(update={"variants": 7, "mean": (0.0, 0.0, 0.0)})
    (stream,) = opened(images, transform=alike)
    stream.load_state_dict(kernel)
    for other in (AUGMENTATION.model_copy(update={"hue": 0.2}), Centred(**AUGMENTATION.model_dump())):
        (stream,) = opened(images, transform=other)
        with pytest.raises(InputError, match="belongs to another stream: augmentation '"):
            stream.load_state_dict(kernel)
    (stream,) = opened(images, mixup=0.3, cutmix=1)
    with pytest.raises(InputError, match=r"mixup 0.2 \(here 0.3\)"):
        stream.load_state_dict(mixed)


def test_closing_ends_the_threads(images: str) -> None:
    before = set(threading.enumerate())
    (stream,) = opened(images, transform=AUGMENTATION, transform_threads=3)
    next(iter(stream))
    own = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("transform")]
    assert own
    stream.close()
    for thread in own:
        thread.join(10)
        assert not thread.is_alive()


# --- bad input ---


def some_smaller(picture: torch.Tensor) -> torch.Tensor:
    return picture[:, : 3 + int(torch.rand(1) < 0.5)]


def some_floats(picture: torch.Tensor) -> torch.Tensor:
    return picture.double() if torch.rand(1) < 0.5 else picture


def of_numpy(picture: torch.Tensor) -> torch.Tensor:
    return picture + np.random.randint(9)


def of_python(picture: torch.Tensor) -> torch.Tensor:
    return picture + random.randrange(9)


def three(picture: Any, generator: Any, further: Any) -> Any:
    return picture, generator, further


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (v2.RandomResizedCrop, {}, r"RandomResizedCrop'>.*a class: give an instance"),
    (5, {}, "transform = 5: give an Augmentation"),
    (three, {}, r"takes the arguments \(picture: "),
    (some_smaller, {}, r"uint8 of 3 × . × 10 for sample -?\d+, and uint8 of 3 × . × 10 for sample -?\d+: all must"),
    (some_floats, {}, "(uint8.*float32|float32.*uint8) of 3 × 12 × 10 for sample"),
    (of_numpy, {}, "two different results for sample .*draws from Python's or numpy's own generator"),
    (of_python, {}, "two different results for sample .*the second argument"),
    (v2.ToPILImage(), {}, "gives Image for sample"),
    (lambda picture: picture.int(), {}, "gives int32 for sample .*uint8 or floats"),
    (lambda picture: picture[:1], {"normalise": True}, r"gives uint8 of 1 × 12 × 10, .*3 channels.*normalise=False"),
    (lambda picture: torch.randint_like(picture, 0, 9), {}, "draws by torch's randint_like, which takes no generator"),
    (AUGMENTATION, {"columns": ["label"]}, r"leave out 'image', which is to be transformed"),
    (AUGMENTATION, {"transform_threads": 0}, "transform_threads = 0: give the number"),
    (None, {"transform_threads": 2}, "transform_threads = 2 without a transform"),
    (None, {"mixup": -1}, "mixup = -1: give alpha"),
    (None, {"cutmix": math.nan}, "cutmix = nan: give alpha"),
    (None, {"mixup": "much"}, "mixup = 'much': give alpha"),
    (None, {"mixup": 1, "columns": ["image"]}, "leave out 'label'"),
    (lambda picture: picture.flatten(), {"cutmix": 1}, "cutmix = 1.0: the transform gives uint8 of 360, not pictures"),
]


@pytest.mark.parametrize(("transform", "options", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_what_cannot_be_delivered_is_refused(images: str, transform, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        delivered(opened(images, transform=transform, **options))


TABLE_BAD: list[tuple[dict[str, Any], str]] = [
    ({"transform": AUGMENTATION}, "an Augmentation, which is for pictures"),
    ({"cutmix": 1}, "cutmix = 1.0: it is for pictures; use mixup"),
    ({"transform": lambda row: row[:2], "normalise": True}, "gives float32 of 2, .*3 features.*normalise=False"),
    ({"transform": lambda row: row.byte(), "normalise": True}, "gives uint8 of 3, and features are normalised"),
]


@pytest.mark.parametrize(("options", "message"), TABLE_BAD)
def test_what_cannot_be_delivered_of_rows_is_refused(table: str, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        delivered(opened(table, **options))


def test_an_error_of_a_function_names_the_sample(images: str) -> None:
    def broken(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        raise ZeroDivisionError("a bug of its author")

    with pytest.raises(ZeroDivisionError) as caught:
        delivered(opened(images, transform=broken))
    assert any("broken" in note and "of sample" in note for note in caught.value.__notes__)
