"""Images that are stored as JPEGs are delivered as their pixels would be, whatever changes them on the way."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.images.config import Augmentation, Centred
from tasks.io.errors import ConfigError, CorruptVersion
from tasks.loader.mixed import MixedStream
from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamLoader
from tests.delivery.making import Columns, cut, damage, decoded, encoded, image_samples, jpegs, publish

SHAPE = (3, 12, 10)
FILES = [7 + number % 3 for number in range(17)]
"""Samples of files, of which a version has so many that its order has two streams."""
SAMPLES = sum(FILES)
STORED = jpegs(image_samples(SAMPLES, 1, SHAPE))
RAW: dict[str, Any] = {"as_numpy": True, "normalise": False}


def noisy(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return (image + generator.integers(0, 9, image.shape)).astype(np.uint8)


def turned(image: Any) -> Any:
    return image.flip(2)


CHANGES: dict[str, dict[str, Any]] = {
    "as stored": {},
    "augmented": {"transform": Augmentation(size=8, degrees=30)},
    "centred": {"transform": Centred(size=9)},
    "function": {"transform": noisy},
    "torch": {"transform": turned, "transform_threads": 2},
    "mixed": {"mixup": 0.3, "cutmix": 1.0},
    "augmented and mixed": {"transform": Augmentation(size=8), "mixup": 0.3},
}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A version of JPEGs, and one of their pixels."""
    root = str(tmp_path_factory.mktemp("root"))
    of_jpegs = publish(root, {"train": cut(STORED, *FILES)}, shape=SHAPE, group_batches=4)
    of_pixels = publish(root, {"train": cut(decoded(STORED), *FILES)}, dataset="training-datasets/streaming-ready/raw")
    return of_jpegs, of_pixels


def delivered(uri: str, count: int = 1, steps: int | None = None, **options: Any) -> list[dict[str, np.ndarray]]:
    """Batches of all workers, step by step."""
    streams = [TrainingStream(uri, rank=rank, world_size=count, **{**RAW, **options}) for rank in range(count)]
    for stream in streams:
        stream.set_epoch(1)
    found = [batch for step in list(zip(*streams, strict=True))[:steps] for batch in step]
    for stream in streams:
        stream.close()
    return found


def same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in pairs)


@settings(max_examples=12)
@given(
    change=st.sampled_from([*CHANGES]),
    count=st.integers(1, 3),
    batch_size=st.integers(1, 40),
    prefetch=st.sampled_from([0, 2]),
    threads=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**63 - 1),
)
def test_jpegs_are_delivered_as_their_pixels_are(  # noqa: PLR0917
    versions: tuple[str, str], change: str, count: int, batch_size: int, prefetch: int, threads: Any, seed: int
) -> None:
    of_jpegs, of_pixels = versions
    options = {"batch_size": batch_size, "seed": seed, **CHANGES[change]}
    found = delivered(of_jpegs, count, prefetch=prefetch, **({"transform_threads": threads} | options))
    assert same(found, delivered(of_pixels, count, prefetch=0, **options))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_resumed_is_the_whole_and_a_sample_is_what_a_step_saw_of_it(
    versions: tuple[str, str], change: str
) -> None:
    options: dict[str, Any] = {"batch_size": 9, "normalise": True, "as_numpy": True, **CHANGES[change]}
    whole = delivered(versions[0], **options)
    with TrainingStream(versions[0], **options) as stream:
        stream.set_epoch(1)
        iteration = iter(stream)
        first = [next(iteration) for _ in range(2)]
        state = json.loads(json.dumps(stream.state_dict()))
    with TrainingStream(versions[0], **options) as stream:
        stream.load_state_dict(state)
        assert same([*first, *stream], whole)
        sample, image = int(first[0]["sample_id"][0]), first[0]["image"][0]
        if change in ("augmented", "centred", "function", "torch"):
            assert np.array_equal(stream.sample(sample, epoch=1)["image"], image)
        raw = TrainingStream(versions[1], batch_size=1, as_numpy=True).sample(sample)
        with TrainingStream(versions[0], batch_size=1, as_numpy=True, normalise=False) as bare:
            assert bare.sample(sample)["image"].dtype == np.uint8
            pixels = decoded(STORED)["image"][STORED["sample_id"] == sample][0]
            assert np.array_equal(bare.sample(sample)["image"], pixels)
        assert stream.sample(sample).keys() == raw.keys()
    if not CHANGES[change]:
        with (
            TrainingStream(versions[0], batch_size=1, as_numpy=True) as alone,
            pytest.raises(ConfigError, match="epoch = 1: without a transform a sample is the same in each"),
        ):
            alone.sample(sample, epoch=1)


def test_only_images_that_are_asked_for_are_decoded(tmp_path: Path) -> None:
    values = STORED["image"].copy()
    values[:] = [np.zeros(3, np.uint8)] * SAMPLES
    uri = publish(str(tmp_path), {"train": cut(encoded(STORED, values), *FILES)}, shape=SHAPE)
    found = delivered(uri, batch_size=16, columns=["label", "sample_id"])
    ids = np.concatenate([batch["sample_id"][batch["mask"]] for batch in found])
    assert sorted(ids.tolist()) == sorted(STORED["sample_id"].tolist())
    with pytest.raises(ConfigError, match=r"columns = \['length'\]: give a list of some of 'image', 'label', 'sample"):
        delivered(uri, batch_size=16, columns=["length"])


def test_processes_of_a_loader_decode_too(versions: tuple[str, str]) -> None:
    options: dict[str, Any] = {"batch_size": 16, "transform": Augmentation(size=8), "normalise": False, "device": "cpu"}
    with TrainingStream(versions[0], **options) as stream:
        found = [batch["image"].numpy() for batch in StreamLoader(stream, num_workers=1)]
    with TrainingStream(versions[1], **options) as stream:
        assert all(np.array_equal(image, batch["image"]) for image, batch in zip(found, stream, strict=True))


def test_jpegs_are_mixed_with_other_jpegs_and_not_with_pixels(versions: tuple[str, str], tmp_path: Path) -> None:
    more = jpegs(image_samples(40, 5, SHAPE))
    uris = (
        publish(str(tmp_path / "a"), {"train": [more]}, shape=SHAPE),
        publish(str(tmp_path / "b"), {"train": [decoded(more)]}),
    )
    options: dict[str, Any] = {"batch_size": 12, "transform": Augmentation(size=8), "cutmix": 1.0, **RAW}
    with (
        MixedStream({versions[0]: 1, uris[0]: 1}, **options) as of_jpegs,
        MixedStream({versions[1]: 1, uris[1]: 1}, **options) as of_pixels,
    ):
        assert same(list(of_jpegs), list(of_pixels))
        sample = int(more["sample_id"][3])
        pixels = decoded(more)["image"][3]
        assert np.array_equal(of_jpegs.sample(uris[0], sample)["image"], pixels)
    with pytest.raises(ConfigError, match="encoding is None and 'jpeg'; publish it anew with the same options"):
        MixedStream({versions[0]: 1, uris[1]: 1}, **options)


def a_jpeg(height: int, width: int, colours: str = "RGB") -> np.ndarray:
    channels = {"RGB": 3, "GRAY": 1}[colours]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return np.frombuffer(simplejpeg.encode_jpeg(pixels, 95, colours, "444" if channels == 3 else "Gray"), np.uint8)


GOOD = STORED["image"][0]
BAD: dict[str, tuple[np.ndarray, str]] = {
    "cut": (GOOD[: len(GOOD) // 2], "truncated: "),
    "nothing": (GOOD[:0], "empty_file: The file is empty"),
    "noise": (np.arange(60, dtype=np.uint8), "not_an_image: "),
    "smaller": (a_jpeg(6, 10), r"it has 10 × 6 pixels, and the manifest says a picture of 10 × 12 pixels"),
    "larger": (a_jpeg(120, 100), r"it has more pixels than a picture of 10 × 12 pixels, as the manifest says"),
    "turned": (a_jpeg(10, 12), r"it has 12 × 10 pixels, and the manifest says a picture of 10 × 12 pixels"),
}


def with_bad(at: list[int], value: np.ndarray) -> Columns:
    values = STORED["image"].copy()
    for place in at:
        values[place] = value
    return encoded(STORED, values)


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_of_that_size_is_named_or_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    value, message = BAD[kind]
    places = [8, 9, 60]  # samples 1 and 2 of the second file, and one of the eighth
    uri = publish(str(tmp_path), {"train": cut(with_bad(places, value), *FILES)}, shape=SHAPE)
    change = CHANGES["augmented and mixed"] if kind in ("cut", "smaller") else {}
    with (
        TrainingStream(uri, batch_size=16, **change, **RAW) as stream,
        pytest.raises(CorruptVersion, match=rf"part-0000[17]-a1.parquet: sample \d can't be decoded: {message}"),
    ):
        list(stream)
    skipping: dict[str, Any] = {"batch_size": 16, "on_corrupt": "skip", **change, **RAW}
    with TrainingStream(uri, **skipping) as stream:
        with pytest.raises(CorruptVersion, match=f"part-00001-a1.parquet: sample 1 can't be decoded: {message}"):
            stream.sample(index=8)
        for epoch in range(2):
            ids = np.concatenate([batch["sample_id"][batch["mask"]] for batch in stream])
            left = np.delete(STORED["sample_id"], places)
            assert sorted(ids.tolist()) == sorted(left.tolist())
            assert stream.stats.skipped_samples == 3 * (epoch + 1)
    alone = delivered(uri, 2, **skipping)
    ids = np.concatenate([batch["sample_id"][batch["mask"]] for batch in alone])
    assert sorted(ids.tolist()) == sorted(left.tolist())


def test_nothing_but_noise_is_an_error_even_if_it_is_skipped(tmp_path: Path) -> None:
    uri = publish(str(tmp_path), {"train": cut(with_bad([*range(SAMPLES)], BAD["noise"][0]), *FILES)}, shape=SHAPE)
    with (
        TrainingStream(uri, batch_size=16, on_corrupt="skip", **RAW) as stream,
        pytest.raises(CorruptVersion, match=f"all {SAMPLES} samples are damaged or missing; the last: .*parquet"),
    ):
        list(stream)


def test_a_changed_byte_is_found_by_the_checksum_before_it_is_decoded(tmp_path: Path) -> None:
    uri = publish(str(tmp_path), {"train": cut(STORED, *FILES)}, shape=SHAPE)
    damage(uri, "split=train/part-00000-a1.parquet", 300)
    with (
        TrainingStream(uri, batch_size=16, **RAW) as stream,
        pytest.raises(CorruptVersion, match=r"part-00000-a1.parquet: batch \d has not the checksum"),
    ):
        list(stream)


def test_gray_pictures_and_those_of_other_decoders_have_three_channels(tmp_path: Path) -> None:
    values, cmyk = STORED["image"].copy(), io.BytesIO()
    values[0] = a_jpeg(12, 10, "GRAY")
    Image.new("CMYK", (10, 12), (10, 20, 30, 40)).save(cmyk, "JPEG", quality=95)
    values[1] = np.frombuffer(cmyk.getvalue(), np.uint8)
    uri = publish(str(tmp_path), {"train": cut(encoded(STORED, values), *FILES)}, shape=SHAPE)
    with TrainingStream(uri, batch_size=1, **RAW) as stream:
        gray, inks = (stream.sample(index=index)["image"] for index in (0, 1))
    assert gray.shape == inks.shape == SHAPE
    assert np.array_equal(gray[0], gray[2])
    with Image.open(io.BytesIO(values[1].tobytes())) as opened:
        assert np.array_equal(inks, np.asarray(opened.convert("RGB")).transpose(2, 0, 1))
